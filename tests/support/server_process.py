"""A server in a process of its own, over scorers that need no model: `python server_process.py …`.

The reward is the completion's length; a completion that holds "slow" takes a while, one that holds
"held" takes until a file is there, one that holds "bad" fails. No limit of time is near unless it
is asked for: on a busy machine a second is soon over.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.server.http import connections as protocol
from ensemble_rm.server.http.auth import Token
from ensemble_rm.server.lifecycle import serve
from ensemble_rm.server.options import BatchOptions, Limits, NetworkOptions, ServerOptions
from ensemble_rm.server.wire.raw_text import RawText


def length(sample: Sample) -> float:
    if "bad" in sample.completion:
        return float("nan")
    return float(len(sample.completion))


def wait_for(file: Path) -> None:
    """Wait until a file is there."""
    while not file.exists():
        time.sleep(0.005)


def begun(hold: Path) -> Path:
    """The file that says that what waits for another one has begun to."""
    return hold.with_suffix(".begun")


def lengths(
    seconds: float = 0.0,
    names: tuple[str, ...] = ("length", "twice"),
    hold: Path | None = None,
) -> RewardEnsemble:
    """Two members, the second of which is always twice the first."""

    def slow(sample: Sample) -> float:
        if "slow" in sample.completion:
            time.sleep(seconds)
        if "held" in sample.completion and hold is not None:
            begun(hold).touch()
            wait_for(hold)
        return length(sample)

    first = FunctionScorer(names[0], slow)
    second = FunctionScorer(names[1], lambda s: 2 * length(s))
    return RewardEnsemble((first, second), Normaliser.identity(2), mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--slow-seconds", type=float, default=0.2)
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--load-when", type=Path)
    parser.add_argument("--drain-seconds", type=float, default=0.0)
    parser.add_argument("--stop-seconds", type=float, default=300.0)
    parser.add_argument("--header-seconds", type=float, default=120.0)
    parser.add_argument("--body-seconds", type=float, default=120.0)
    parser.add_argument("--linger-seconds", type=float, default=120.0)
    parser.add_argument("--max-connections", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--queue-samples", type=int, default=4096)
    parser.add_argument("--token")
    parser.add_argument("--policy-template")
    parser.add_argument("--stop", nargs="+", default=[])
    parser.add_argument("--raw-text-members", nargs="+", default=[])
    parser.add_argument("--port-file", type=Path, required=True)
    args = parser.parse_args()
    protocol._LINGER_SECONDS = args.linger_seconds

    def load() -> RewardEnsemble:
        if args.load_when is not None:
            wait_for(args.load_when)
        return lengths(args.slow_seconds, hold=args.hold)

    def listening(host: str, port: int) -> None:
        scratch = args.port_file.with_suffix(".partial")
        scratch.write_text(str(port))
        scratch.replace(args.port_file)

    options = ServerOptions(
        raw_text=RawText(
            policy_template=args.policy_template,
            raw_text_members=tuple(args.raw_text_members),
            stop=tuple(args.stop),
        ),
        limits=Limits(
            header_seconds=args.header_seconds,
            body_seconds=args.body_seconds,
            max_connections=args.max_connections,
        ),
        batching=BatchOptions(batch_samples=args.rows, queue_samples=args.queue_samples),
    )
    serve(
        load,
        options,
        network=NetworkOptions(
            port=args.port, drain_seconds=args.drain_seconds, stop_seconds=args.stop_seconds
        ),
        token=None if args.token is None else Token(args.token),
        listening=listening,
    )


if __name__ == "__main__":
    main()
