"""What the subcommands share: options, bars, files read and written."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ensemble_rm.errors import BadRowsError, OptionError

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator
    from ensemble_rm.data.samples import Preferences
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
    from ensemble_rm.members.backbone.trunk import TrunkOptions

COEFFICIENTS = {
    "lam": "λ of uwo",
    "kappa": "κ of lcb",
    "beta": "β of entropic",
    "q": "q of quantile",
    "alpha": "α of cvar",
}


class Bars:
    """Draws one bar a stage on a terminal's standard error; elsewhere nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done, 0 for an unknown number: a Progress."""
        if self._quiet:
            return
        if stage != self._stage or self._bar is None:
            from tqdm import tqdm

            self._close()
            self._stage = stage
            self._bar = tqdm(total=total or None, desc=stage, disable=None, leave=False)
        self._bar.total = total or None
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def add_json(parser: argparse.ArgumentParser, *, rows: bool = False) -> None:
    """Add --json, also where rows are printed that go to no file: they are JSON as they are."""
    what = "print one JSON object, for scripts" + (", where --out has the rows" if rows else "")
    parser.add_argument("--json", action="store_true", help=what)


def add_dry_run(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --dry-run."""
    parser.add_argument("--dry-run", action="store_true", help=what)


def add_ensemble(parser: argparse.ArgumentParser) -> None:
    """Add the saved ensemble, where its backbone lies, and how many models are loaded."""
    add_saved(parser)
    add_max_loaded(parser)


def add_saved(parser: argparse.ArgumentParser) -> None:
    """Add the saved ensemble and where its backbone lies."""
    parser.add_argument("ensemble", type=Path, metavar="ENSEMBLE", help="a saved ensemble's folder")
    parser.add_argument(
        "--backbone", metavar="NAME", help="where the backbone lies now, if not where it was"
    )
    parser.add_argument("--device", help="cuda, mps or cpu; the best available by default")
    parser.set_defaults(max_loaded_models=None)


def add_max_loaded(parser: argparse.ArgumentParser) -> None:
    """Add --max-loaded-models."""
    parser.add_argument(
        "--max-loaded-models",
        type=int,
        metavar="N",
        help="models in memory at once, where they do not fit together; all by default",
    )


def add_pairs(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --data and --skip-bad, for pairs with a verdict."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE_OR_HUB_ID",
        help=f"{what} pairs: JSONL (.gz too) or a Hub data set",
    )
    add_skip_bad(parser)


def add_skip_bad(parser: argparse.ArgumentParser) -> None:
    """Add --skip-bad."""
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, and name them")


def add_rows(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --data, for rows that are scored as they stand."""
    parser.add_argument("--data", required=True, metavar="FILE", help=f"{what} as JSONL (.gz too)")


def add_out_file(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --out, for rows that are written."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"of the {what}; standard output by default"
    )


def add_out_folder(parser: argparse.ArgumentParser) -> None:
    """Add --out, for an ensemble that is made."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the ensemble's")


def add_text(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add how models read text, and return the group."""
    text = parser.add_argument_group("text")
    text.add_argument("--template", choices=["auto", "chat", "pair", "plain"], default="auto")
    text.add_argument("--max-length", type=int, default=512, metavar="TOKENS")
    text.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    text.add_argument("--device", help="cuda, mps or cpu; the best available by default")
    return text


def read_text_options(args: argparse.Namespace) -> TrunkOptions:
    """Return what `add_text` asked for."""
    from ensemble_rm.members.backbone.trunk import TrunkOptions

    return TrunkOptions(args.template, args.max_length, args.dtype, args.device)


def add_aggregator(parser: argparse.ArgumentParser) -> None:
    """Add --aggregator and the coefficients."""
    group = parser.add_argument_group("aggregator")
    group.add_argument(
        "--aggregator",
        metavar="NAME",
        help="mean, minimum, uwo, lcb, entropic, median, quantile or cvar; the ensemble's own "
        "by default",
    )
    for name, what in COEFFICIENTS.items():
        group.add_argument(f"--{name}", type=float, metavar="X", help=what)
    group.add_argument(
        "--nan",
        choices=["raise", "omit"],
        help="what a member without a score does, such as one whose server failed: an error, by "
        "default, or it is left out of that sample",
    )
    group.add_argument(
        "--min-members", type=int, metavar="N", help="the fewest that may make up a reward; 1"
    )


def read_aggregator(args: argparse.Namespace) -> Aggregator | None:
    """Return the aggregator asked for; None where none was.

    Raises
    ------
    OptionError
        If a coefficient is given without a name, or does not fit it.
    """
    from ensemble_rm.aggregation.aggregator import make_aggregator

    names = (*COEFFICIENTS, "nan", "min_members")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.aggregator is None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise OptionError(f"--{option} needs --aggregator")
        return None
    return make_aggregator(args.aggregator, **given)


def open_ensemble(args: argparse.Namespace) -> RewardEnsemble:
    """Load the ensemble that was named; members on other servers get their tokens."""
    from ensemble_rm.cli.tokens import with_tokens
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

    ensemble = RewardEnsemble.from_pretrained(
        args.ensemble,
        backbone=args.backbone,
        device=args.device,
        max_loaded_models=args.max_loaded_models,
    )
    return with_tokens(ensemble)


def read_pairs(source: str, *, skip_bad: bool) -> Preferences:
    """Read preference pairs; report bad, repeated and undecidable rows on standard error."""
    from ensemble_rm.data.loading import read_preferences

    pairs, report = read_preferences(source)
    for problem in report.problems:
        print(f"bad row: {problem}", file=sys.stderr)
    for problem in (*report.duplicates, *report.equal_sides)[:20]:
        print(f"note: {problem}", file=sys.stderr)
    if report.problems or report.duplicates or report.equal_sides:
        print(report.summary(), file=sys.stderr)
    if report.problems and not skip_bad:
        raise BadRowsError(
            f"{len(report.problems)} of {report.rows} rows are bad; mend them, or leave them out "
            "with --skip-bad",
            report.problems,
        )
    return pairs


def write_jsonl(path: Path | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as they come: to FILE.partial, which becomes FILE once all are there.

    To standard output where there is no path.
    """
    if path is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(path)
    with scratch.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    scratch.replace(path)


def scratch_of(path: Path) -> Path:
    """Return where a file is written that becomes `path` once all is there."""
    return path.with_name(f"{path.name}.partial")


def check_can_write(path: Path | None) -> None:
    """Make a file's folder, and see whether it can be written, before that costs anything.

    Raises
    ------
    OptionError
        If the path is a folder's.
    OSError
        If it cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise OptionError(f"{path} is a folder; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(path)
    left_over = scratch.exists()
    scratch.open("a", encoding="utf-8").close()
    if not left_over:
        scratch.unlink()


def known(value: float) -> float | None:
    """Return a number as JSON has it: null in the place of NaN."""
    return None if math.isnan(value) else float(value)


def say(args: argparse.Namespace, found: Mapping[str, Any], text: str) -> None:
    """Print the result: one JSON object with --json, else the text."""
    print(json.dumps(found, ensure_ascii=False) if args.json else text)
