"""``ensemble-rm``: its subcommands, its one error handler, its exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from ensemble_rm import __version__, errors
from ensemble_rm.cli import (
    average_weights,
    calibrate,
    combine,
    compare,
    demo,
    drift,
    evaluate,
    init_reward,
    judgments,
    make_pairs,
    pin,
    precision,
    recalibrate,
    remote,
    retrain,
    rollback,
    route,
    score,
    select,
    serve,
    show,
    train,
    unpin,
    versions,
)

COMMANDS = (
    *(
        train,
        combine,
        remote,
        average_weights,
        calibrate,
        evaluate,
        score,
        compare,
        route,
        precision,
    ),
    *(select, judgments, recalibrate, retrain, drift, versions),
    *(serve, show, rollback, pin, unpin, make_pairs, init_reward, demo),
)

EXIT_CODES = """\
exit codes:
  0    done
  2    an option or argument cannot be used
  3    the data cannot be read or used
  4    a model, a saved ensemble or a cache cannot be read or written
  5    the judgments do not allow a calibration, or it does not apply
  6    training, or scoring, met NaN or infinity, or cannot be resumed
  7    a server that a member or a judge lives on gives no usable answer
  10   a job kept what is published, and says why
  11   a job has too few judgments
  12   a job found drift that no publication answers
  13   another job works on the folder
  130  interrupted
"""

_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.DataError, 3),
    (errors.ModelError, 4),
    (errors.LockedError, 13),
    (errors.StorageError, 4),
    (errors.MissingExtraError, 4),
    (errors.CalibrationError, 5),
    (errors.TrainingError, 6),
    (errors.ScoringError, 6),
    (errors.RemoteError, 7),
    (errors.OptionError, 2),
    (errors.EnsembleRMError, 2),
    (FileNotFoundError, 3),
    (OSError, 4),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every subcommand."""
    parser = argparse.ArgumentParser(
        prog="ensemble-rm",
        description="Robust, calibrated rewards from ensembles of reward models.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ensemble-rm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rsplit(".", 1)[1].replace("_", "-")
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=f"example:\n{module.EXAMPLE}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The process's own where not given.

    Returns
    -------
    int
        The exit code.
    """
    args = make_parser().parse_args(arguments)
    if args.json or not sys.stderr.isatty():
        # Other libraries' bars; ours draws none off a terminal either.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its warnings of heads that are new are what training asks for; what is wrong is an error here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        found: int | None = args.run(args)  # a job's verdict; None is done
    except KeyboardInterrupt:
        print("ensemble-rm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (errors.EnsembleRMError, OSError) as error:
        code = exit_code(error)
        if args.json:
            said = {"error": type(error).__name__, "message": str(error), "exit_code": code}
            print(json.dumps(said, ensure_ascii=False))
        print(f"ensemble-rm {args.command}: {error}", file=sys.stderr)
        return code
    return found or 0
