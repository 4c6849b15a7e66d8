"""Serve an ensemble over HTTP.

In its own wire format, and in those of OpenRLHF, vLLM, SGLang and LLaMA-Factory. It binds 127.0.0.1
unless told otherwise; any other host needs a token, from --token-file or from ENSEMBLE_RM_TOKEN. On
SIGTERM it finishes what it accepted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_rm.cli.common import (
    add_aggregator,
    add_ensemble,
    add_json,
    open_ensemble,
    read_aggregator,
)
from ensemble_rm.errors import MissingExtraError, OptionError, RemoteFailureWarning

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
    from ensemble_rm.server.http.auth import Token
    from ensemble_rm.server.options import NetworkOptions, ServerOptions

HELP = "serve rewards over HTTP"
EXAMPLE = "  ensemble-rm serve runs/hh --port 8000 --policy-template chatml"
TOKEN_VARIABLE = "ENSEMBLE_RM_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_aggregator(parser)
    _add_network(parser)
    _add_text(parser)
    _add_batching(parser)
    _add_limits(parser)
    add_json(parser)


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="another than 127.0.0.1 needs a token")
    group.add_argument("--port", type=int, default=8000, help="8000; 0 is any that is free")
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="holds the token, and no more"
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="after SIGTERM, time for balancers to see /ready fail; 0",
    )
    group.add_argument(
        "--stop-seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="for what was accepted, until it is cut off; 300",
    )
    group.add_argument(
        "--access-log", action="store_true", help="a line a request, without its text"
    )
    group.add_argument("--name", metavar="NAME", help="of the model in answers; the folder's name")


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text in the policy's own template")
    group.add_argument(
        "--policy-template",
        metavar="TURN",
        help="how it writes a turn, so that texts can be taken apart: chatml, llama3, gemma, or "
        "text with {role} and {content}",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TOKEN",
        help="ends a turn and is cut off, such as '<|im_end|>'; may be repeated",
    )
    group.add_argument(
        "--raw-text-members",
        nargs="+",
        default=[],
        metavar="NAME",
        help="members that read the policy's template as it is",
    )


def _add_batching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batching")
    for name, kind, default, what in (
        ("batch-tokens", int, 8192, "of a batch at most; a shared prompt counts once"),
        ("batch-samples", int, 256, "of a batch at most"),
        ("window-ms", float, 5.0, "that a free worker waits for others; for a burst, up to 100"),
        ("queue-samples", int, 4096, "that wait at most; what comes then is answered 429"),
        ("queue-tokens", int, 1 << 20, "that wait at most"),
    ):
        group.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{what}; {default}"
        )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for name, kind, default, what in (
        ("max-body-bytes", int, 8 * 2**20, "of a request"),
        ("max-samples", int, 1024, "of a request"),
        ("max-characters", int, 200_000, "of a sample"),
        ("max-tokens", int, 262_144, "of a request, about"),
        ("max-connections", int, 1024, "open at once"),
        ("header-seconds", float, 10.0, "for a request's headers"),
        ("body-seconds", float, 15.0, "for a request's body"),
    ):
        group.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{what}; {default}"
        )
    group.add_argument(
        "--on-truncation",
        choices=["report", "refuse"],
        default="report",
        help="whether a sample that is longer than a member reads has a reward; report",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    aggregator = read_aggregator(args)
    try:
        from ensemble_rm.server.lifecycle import serve
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"the server needs Starlette, uvicorn and prometheus-client ({error}): "
            "pip install 'ensemble-rm[server]'"
        ) from error
    token, options = read_token(args.token_file), read_options(args)
    network = read_network(args)
    # Names and numbers alone; no line holds a request's text.
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
    )

    def load() -> RewardEnsemble:
        ensemble = open_ensemble(args)
        return ensemble if aggregator is None else ensemble.with_aggregator(aggregator)

    def listening(host: str, port: int) -> None:
        said = {"host": host, "port": port, "token": token is not None}
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(json.dumps(said) if args.json else f"listening on {where}", flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RemoteFailureWarning)  # `/metrics` counts them by member
        finished = serve(
            load,
            options,
            network=network,
            token=token,
            listening=listening,
        )
    if finished is False:  # Python would end a thread in the middle of native code with an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def read_token(file: Path | None) -> Token | None:
    """Return the token of a file, or of the environment; None where there is neither.

    Raises
    ------
    OptionError
        If it is no token, or the file cannot be read.
    """
    from ensemble_rm.server.http.auth import Token

    if file is not None:
        try:
            return Token(file.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"--token-file {file} cannot be read: {type(error).__name__}"
            ) from None
    secret = os.environ.get(TOKEN_VARIABLE)
    return None if secret is None else Token(secret.strip())


def read_network(args: argparse.Namespace) -> NetworkOptions:
    """Return the address and the shutdown that the options ask for."""
    from ensemble_rm.server.options import NetworkOptions

    return NetworkOptions(
        host=args.host,
        port=args.port,
        drain_seconds=args.drain_seconds,
        stop_seconds=args.stop_seconds,
        access_log=args.access_log,
    )


def read_options(args: argparse.Namespace) -> ServerOptions:
    """Return what the options ask for."""
    from ensemble_rm.server.options import BatchOptions, Limits, ServerOptions
    from ensemble_rm.server.wire.raw_text import RawText

    template = args.policy_template and args.policy_template.replace("\\n", "\n")
    return ServerOptions(
        name=args.name or args.ensemble.absolute().name,
        limits=Limits(
            max_body_bytes=args.max_body_bytes,
            max_samples=args.max_samples,
            max_characters=args.max_characters,
            max_tokens=args.max_tokens,
            header_seconds=args.header_seconds,
            body_seconds=args.body_seconds,
            max_connections=args.max_connections,
        ),
        batching=BatchOptions(
            batch_tokens=args.batch_tokens,
            batch_samples=args.batch_samples,
            window_seconds=args.window_ms / 1000,
            queue_samples=args.queue_samples,
            queue_tokens=args.queue_tokens,
        ),
        raw_text=RawText(
            policy_template=template or None,
            stop=tuple(args.stop),
            raw_text_members=tuple(args.raw_text_members),
        ),
        on_truncation=args.on_truncation,
    )
