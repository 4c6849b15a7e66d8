"""``ensemble-rm serve``."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import (
    ENSEMBLE,
    AggregatorOptions,
    Loading,
    aggregator_options,
    use_aggregator,
)
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.errors import MissingExtraError, OptionError, RemoteFailureWarning
from ensemble_rm.server.options import NetworkOptions, ServerOptions

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
    from ensemble_rm.server.http.auth import Token

TOKEN_VARIABLE = "ENSEMBLE_RM_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    r"""Serve an ensemble over HTTP.

    It speaks its own wire format, and those of OpenRLHF, vLLM, SGLang and LLaMA-Factory. It binds
    127.0.0.1 by default; any other host needs a token, from --token-file or the variable
    ENSEMBLE_RM_TOKEN. On SIGTERM it finishes accepted requests before it exits. In
    --policy-template, \n is a line break.
    """

    ensemble: Path = argument(ENSEMBLE)
    token_file: Path | None = option(
        "file that contains only the bearer token",
        default=None,
        metavar="FILE",
        panel="Network",
        shown=f"the variable {TOKEN_VARIABLE}",
    )
    network: NetworkOptions = nested(NetworkOptions, panel="Network")
    server: ServerOptions = nested(
        ServerOptions,
        panel="Server",
        name={"metavar": "NAME", "shown": "the folder's name"},
    )
    loading: Loading = nested(Loading, panel="Loading")
    aggregator: AggregatorOptions = aggregator_options()

    example: ClassVar[str] = "  ensemble-rm serve runs/hh --port 8000 --policy-template chatml"

    def run(self, console: Console) -> None:
        """Serve until a signal comes."""
        aggregator = self.aggregator.make()
        try:
            from ensemble_rm.server.lifecycle import serve
        except MissingExtraError:
            raise
        except ImportError as error:
            raise MissingExtraError(
                f"the server needs Starlette, uvicorn and prometheus-client ({error}): "
                "pip install 'ensemble-rm[server]'"
            ) from error
        token, options = read_token(self.token_file), self.options()
        # Logs hold names and numbers only, never a request's text.
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
        )

        def load() -> RewardEnsemble:
            return use_aggregator(self.loading.open(self.ensemble), aggregator)

        def listening(host: str, port: int) -> None:
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            data = {"host": host, "port": port, "token": token is not None}
            print(json.dumps(data) if console.json else f"listening on {where}", flush=True)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RemoteFailureWarning)  # counted in `/metrics` instead
            finished = serve(load, options, network=self.network, token=token, listening=listening)
        if finished is False:  # Python would end a thread inside native code with an abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def options(self) -> ServerOptions:
        """Return the server's options, with the folder's name where no name was given."""
        raw = self.server.raw_text
        if raw.policy_template is not None:  # a shell does not read \n as a line break
            raw = replace(raw, policy_template=raw.policy_template.replace("\\n", "\n"))
        name = self.server.name
        if name == ServerOptions().name:
            name = self.ensemble.absolute().name
        return replace(self.server, name=name, raw_text=raw)


def read_token(file: Path | None) -> Token | None:
    """Return the token of a file, or of the environment; None where there is neither.

    Raises
    ------
    OptionError
        If it is not a token, or the file cannot be read.
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
