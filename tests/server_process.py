"""A server in a process of its own, over scorers that need no model: `python server_process.py …`.

The reward is the completion's length; a completion that holds "slow" takes a while, one that holds
"bad" fails.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ensemble_rm import FunctionScorer, Normaliser, RewardEnsemble, Sample, mean
from ensemble_rm.server.auth import Token
from ensemble_rm.server.batching import BatchOptions
from ensemble_rm.server.lifecycle import serve
from ensemble_rm.server.limits import Limits
from ensemble_rm.server.raw_text import RawText, TurnTemplate
from ensemble_rm.server.service import ServerOptions


def length(sample: Sample) -> float:
    if "bad" in sample.completion:
        return float("nan")
    return float(len(sample.completion))


def lengths(seconds: float = 0.0, names: tuple[str, ...] = ("length", "twice")) -> RewardEnsemble:
    """Two members, the second of which is always twice the first."""

    def slow(sample: Sample) -> float:
        if "slow" in sample.completion:
            time.sleep(seconds)
        return length(sample)

    first = FunctionScorer(names[0], slow)
    second = FunctionScorer(names[1], lambda s: 2 * length(s))
    return RewardEnsemble((first, second), Normaliser.identity(2), mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--slow-seconds", type=float, default=0.2)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--drain-seconds", type=float, default=0.0)
    parser.add_argument("--stop-seconds", type=float, default=30.0)
    parser.add_argument("--header-seconds", type=float, default=1.0)
    parser.add_argument("--body-seconds", type=float, default=1.0)
    parser.add_argument("--max-connections", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--queue-samples", type=int, default=4096)
    parser.add_argument("--token")
    parser.add_argument("--policy-template")
    parser.add_argument("--stop", nargs="+", default=[])
    parser.add_argument("--raw-text-members", nargs="+", default=[])
    parser.add_argument("--port-file", type=Path, required=True)
    args = parser.parse_args()

    def load() -> RewardEnsemble:
        time.sleep(args.load_seconds)
        return lengths(args.slow_seconds)

    def listening(host: str, port: int) -> None:
        scratch = args.port_file.with_suffix(".partial")
        scratch.write_text(str(port))
        scratch.replace(args.port_file)

    template = None if args.policy_template is None else TurnTemplate(args.policy_template)
    options = ServerOptions(
        raw_text=RawText(template, members=tuple(args.raw_text_members), stop=tuple(args.stop)),
        limits=Limits(
            header_seconds=args.header_seconds,
            body_seconds=args.body_seconds,
            connections=args.max_connections,
        ),
        batching=BatchOptions(rows=args.rows, queue_samples=args.queue_samples),
    )
    serve(
        load,
        options,
        port=args.port,
        token=None if args.token is None else Token(args.token),
        drain_seconds=args.drain_seconds,
        stop_seconds=args.stop_seconds,
        listening=listening,
    )


if __name__ == "__main__":
    main()
