"""Keep human judgments: import them, export them, report how far annotators agree.

STORE is a file's path (SQLite) or postgresql://user@host/name; `import` makes it where there is
none. A store only grows: nothing updates or deletes a judgment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import Bars, add_dry_run, add_json, add_skip_bad, say, write_jsonl
from ensemble_rm.cli.jobs import add_times, read_time
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.judgments.agreement import AgreementReport
    from ensemble_rm.judgments.filter import JudgmentFilter
    from ensemble_rm.judgments.imports.formats import Imported, ImportOptions
    from ensemble_rm.judgments.store import JudgmentStore
    from ensemble_rm.metrics import Interval

HELP = "import, export and report on human judgments"
EXAMPLE = """\
  ensemble-rm judgments import judgments.db november.jsonl
  ensemble-rm judgments import judgments.db export.json --format label-studio --source project-83
  ensemble-rm judgments export judgments.db --since 2026-11-01 --out november.jsonl
  ensemble-rm judgments report judgments.db"""
FORMATS = ("jsonl", "label-studio", "label-studio-min", "argilla")
COUPLES_SHOWN = 20
NAMED = ("source", "batch", "policy", "subset", "annotator", "strategy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, what, add in (
        ("import", "add a file's judgments; a repeated import adds nothing", _add_import),
        ("export", "write judgments as JSONL or as a data set", _add_export),
        ("report", "agreement of annotators, ties, sides", _add_report),
    ):
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("store", metavar="STORE", help="a file, or postgresql://user@host/name")
        add(action)
        add_json(action)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="FILE", help="JSONL or an export (.gz too)")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    parser.add_argument("--source", metavar="NAME", help="of judgments that name none themselves")
    texts = parser.add_argument_group("exports of Label Studio and Argilla")
    texts.add_argument("--question", metavar="NAME", help="the control or question to read")
    for name in ("prompt", "first", "second"):
        texts.add_argument(f"--{name}", metavar="FIELD", help=f"which field holds the {name}")
    texts.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="LABEL=OUTCOME",
        help="what a label means: first, second or tie; as often as needed",
    )
    texts.add_argument(
        "--empty-is-tie", action="store_true", help="a submitted annotation without selection"
    )
    texts.add_argument("--judged-at", metavar="TIME", help="of verdicts that name no time")
    texts.add_argument(
        "--correct",
        action="store_true",
        help="add corrections where annotators changed verdicts since an earlier import",
    )
    parser.add_argument("--assume-utc", action="store_true", help="of times without an offset")
    add_skip_bad(parser)
    add_dry_run(parser, "read and check everything, write nothing")


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="a file; of a data set, a folder (needed)"
    )
    parser.add_argument("--as", choices=["jsonl", "dataset"], default="jsonl", dest="kind")


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which judgments")
    add_times(group)
    for name in NAMED:
        group.add_argument(
            f"--{name}", action="append", metavar="NAME", help="only these; as often as needed"
        )
    group.add_argument(
        "--with-corrected", action="store_true", help="also what corrections replaced"
    )


def run(args: argparse.Namespace) -> None:
    """Run the action."""
    {"import": _import, "export": _export, "report": _report}[args.action](args)


# Import ---------------------------------------------------------------------------------------


def _import(args: argparse.Namespace) -> None:
    from ensemble_rm.judgments.imports.importing import import_judgments

    options = _read_options(args)
    with _store_for(args) as store, Bars(quiet=args.json) as bars:
        found = import_judgments(
            store,
            args.data,
            format=args.format,
            options=options,
            skip_bad=args.skip_bad,
            correct=args.correct,
            dry_run=args.dry_run,
            progress=bars,
        )
        stored = store.count()
    for problem in found.problems:
        print(f"bad row: {problem}", file=sys.stderr)
    said = {
        **_counts(found),
        "bad_rows": [{"line": bad.line, "reason": bad.reason} for bad in found.problems],
        "judgments": stored,
        "dry_run": args.dry_run,
    }
    say(args, said, _import_text(args, found, stored))


@contextmanager
def _store_for(args: argparse.Namespace) -> Iterator[JudgmentStore]:
    """Give the store to import into; a dry run makes none, and checks against an empty one."""
    from ensemble_rm.judgments.store import JudgmentStore

    with ExitStack() as stack:
        if not args.dry_run:
            store = JudgmentStore.create(args.store)
        elif "://" in args.store or Path(args.store).exists():
            store = JudgmentStore.open(args.store, read_only=True)
        else:
            store = JudgmentStore.create(Path(stack.enter_context(TemporaryDirectory())) / "empty")
        yield stack.enter_context(store)


def _counts(found: Imported) -> dict[str, Any]:
    names = ("verdicts", "added", "already", "corrections", "left_out")
    return {name: getattr(found, name) for name in names}


def _import_text(args: argparse.Namespace, found: Imported, stored: int) -> str:
    would = "would be added" if args.dry_run else "added"
    head = (
        f"{found.verdicts} verdicts in {args.data}: {found.added} {would} "
        f"({found.corrections} corrections), {found.already} there already, "
        f"{len(found.problems)} bad"
    )
    rest = [f"{count} left out: {reason}" for reason, count in found.left_out.items()]
    return "\n".join([head, *rest, f"{stored} judgments in the store"])


def _read_options(args: argparse.Namespace) -> ImportOptions:
    from ensemble_rm.judgments.imports.formats import ImportOptions

    labels: dict[str, str] = {}
    for given in args.label:
        label, found, outcome = given.rpartition("=")
        if not found:
            raise OptionError(f"--label needs LABEL=OUTCOME, not {given!r}")
        labels[label] = outcome
    named = ("source", "prompt", "first", "second", "question", "empty_is_tie", "assume_utc")
    return ImportOptions(
        labels=labels,
        judged_at=read_time(args.judged_at, "--judged-at"),
        **{name: getattr(args, name) for name in named},
    )


# Export ---------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> None:
    from ensemble_rm.judgments.exports import export_judgments, judgment_dataset
    from ensemble_rm.judgments.store import JudgmentStore

    if args.out is None and (args.kind == "dataset" or args.json):
        raise OptionError(f"--{'json' if args.json else 'as dataset'} needs --out")
    where = _read_selection(args)
    with JudgmentStore.open(args.store, read_only=True) as store, Bars(quiet=args.json) as bars:
        if args.kind == "dataset":
            judgment_dataset(store, where, progress=bars).save_to_disk(args.out)
        else:
            write_jsonl(args.out, export_judgments(store, where, progress=bars))
        said = {"judgments": store.count(where), "digest": store.digest(where)}
    if args.out is not None:
        said |= {"store": store.name, "out": str(args.out), "as": args.kind}
        say(args, said, f"{said['judgments']} judgments in {args.out}, digest {said['digest']}")


def _read_selection(args: argparse.Namespace) -> JudgmentFilter:
    from ensemble_rm.judgments.filter import JudgmentFilter

    given: Mapping[str, list[str] | None] = {name: getattr(args, name) for name in NAMED}
    return JudgmentFilter(
        since=read_time(args.since, "--since"),
        until=read_time(args.until, "--until"),
        with_corrected=args.with_corrected,
        **{name: tuple(values) for name, values in given.items() if values is not None},
    )


# Report ---------------------------------------------------------------------------------------


def _report(args: argparse.Namespace) -> None:
    from ensemble_rm.judgments.agreement import agreement_report
    from ensemble_rm.judgments.store import JudgmentStore

    with JudgmentStore.open(args.store, read_only=True) as store, Bars(quiet=args.json) as bars:
        found = agreement_report(store, _read_selection(args), progress=bars)
    say(args, found.to_json(), "\n".join(_report_lines(found)))


def _report_lines(found: AgreementReport) -> Iterator[str]:
    yield (
        f"{found.judgments} judgments of {found.pairs} pairs ({found.prompts} prompts) by "
        f"{len(found.raters)} annotators; {found.shared} pairs have several"
    )
    if found.equal_sides:
        yield f"{found.equal_sides} judgments lie between two equal texts and count in nothing else"
    yield f"ties                         {_shown(found.ties)}"
    yield f"first side, of no ties       {_shown(found.first_side)}  (.5 where dealt evenly)"
    swapped = f"{found.swapped} pairs judged in both orders"
    yield f"first side, either order     {_shown(found.first_side_swapped)}  ({swapped})"
    yield f"agreement of two annotators  {_shown(found.agreement)}"
    yield f"Fleiss' kappa                {_shown(found.fleiss_kappa)}"
    yield ""
    width = max([len("annotator"), *(len(rater.annotator) for rater in found.raters)])
    yield (
        f"{'annotator':{width}s} judged  ties  first  shared  agreement with the rest   "
        "kappa                      repeats (same)"
    )
    for rater in found.raters:
        again = f"{rater.repeats}" + (f" ({rater.self_agreement:.2f})" if rater.repeats else "")
        yield (
            f"{rater.annotator:{width}s} {rater.judgments:6d}  {rater.ties.estimate:4.2f}  "
            f"{rater.first_side.estimate:5.2f}  {rater.shared:6d}  {_shown(rater.agreement):24s}  "
            f"{_shown(rater.kappa):25s}  {again}"
        )
    if found.couples:
        yield ""
        yield "couples                        shared  agreement  kappa"
    for couple in sorted(found.couples, key=lambda couple: -couple.shared)[:COUPLES_SHOWN]:
        names = " – ".join(couple.annotators)
        yield f"{names:30s} {couple.shared:6d}  {couple.agreement:9.2f}  {couple.kappa:5.2f}"
    if len(found.couples) > COUPLES_SHOWN:
        yield f"… and {len(found.couples) - COUPLES_SHOWN} more; --json has all"


def _shown(figure: Interval) -> str:
    return f"{figure.estimate:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
