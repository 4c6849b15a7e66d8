"""``ensemble-rm judgments``: import, export, report, backup."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import STORE, check_can_write, write_jsonl
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of
from ensemble_rm.errors import OptionError
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.imports.formats import FORMATS, ImportOptions

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.judgments.agreement import AgreementReport
    from ensemble_rm.judgments.imports.formats import Imported
    from ensemble_rm.judgments.store import JudgmentStore
    from ensemble_rm.metrics import Interval

_IMPORT = ("ensemble_rm.judgments.imports.importing", "import_judgments")
COUPLES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Add a file's judgments to a store; a repeated import adds nothing.

    A store is append-only: judgments are never updated or deleted. It is created if it does not
    exist.
    """

    store: str = argument(STORE)
    data: Path = argument("judgments as JSON lines, or an export (.gz too)", metavar="FILE")
    format: str = option(
        "format of the file",
        default=default_of(*_IMPORT, "format"),
        choices=tuple(FORMATS),
    )
    reading: ImportOptions = nested(
        ImportOptions, panel="Reading", labels={"flag": "label", "metavar": "LABEL=OUTCOME"}
    )
    correct: bool = option(
        "add corrections where annotators changed verdicts since an earlier import",
        default=default_of(*_IMPORT, "correct"),
    )
    skip_bad: bool = option(
        "leave bad rows out, and list them", default=default_of(*_IMPORT, "skip_bad")
    )
    dry_run: bool = option(
        "read and check everything, write nothing", default=default_of(*_IMPORT, "dry_run")
    )

    example: ClassVar[str] = (
        "  ensemble-rm judgments import judgments.db november.jsonl\n"
        "  ensemble-rm judgments import judgments.db export.json --format label-studio \\\n"
        "      --source project-83"
    )

    def run(self, console: Console) -> None:
        """Import the file."""
        from ensemble_rm.judgments.imports.importing import import_judgments

        with self._store() as store, console.progress() as progress:
            imported = import_judgments(
                store,
                self.data,
                format=self.format,
                options=self.reading,
                skip_bad=self.skip_bad,
                correct=self.correct,
                dry_run=self.dry_run,
                progress=progress,
            )
            stored = store.count()
        for problem in imported.problems:
            console.note(f"bad row: {problem}")
        names = ("verdicts", "added", "already", "corrections", "left_out")
        bad = [{"line": bad.line, "reason": bad.reason} for bad in imported.problems]
        data = {name: getattr(imported, name) for name in names} | {"bad_rows": bad}
        data |= {"judgments": stored, "dry_run": self.dry_run}
        console.result(data, self._text(imported, stored))
        for reason, count in imported.left_out.items():
            console.left_out(f"{count}: {reason}")
        console.read(f"{imported.verdicts} verdicts from {self.data}")
        if not self.dry_run:
            console.next(f"ensemble-rm judgments report {self.store}")

    @contextmanager
    def _store(self) -> Iterator[JudgmentStore]:
        """Open the store; a dry run creates none, and checks against an empty one."""
        from ensemble_rm.judgments.store import JudgmentStore

        with ExitStack() as stack:
            if not self.dry_run:
                store = JudgmentStore.create(self.store)
            elif "://" in self.store or Path(self.store).exists():
                store = JudgmentStore.open(self.store, read_only=True)
            else:
                empty = Path(stack.enter_context(TemporaryDirectory())) / "empty"
                store = JudgmentStore.create(empty)
            yield stack.enter_context(store)

    def _text(self, imported: Imported, stored: int) -> str:
        would = "would be added" if self.dry_run else "added"
        return (
            f"{imported.verdicts} verdicts in {self.data}: {imported.added} {would} "
            f"({imported.corrections} corrections), {imported.already} there already, "
            f"{len(imported.problems)} bad\n{stored} judgments in the store"
        )


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a store's judgments as JSON lines or as a data set."""

    store: str = argument(STORE)
    where: JudgmentFilter = nested(JudgmentFilter, panel="Which judgments")
    out: Path | None = option(
        "file, or folder of a data set", default=None, metavar="PATH", shown="standard output"
    )
    kind: Literal["jsonl", "dataset"] = option("format of the export", default="jsonl", flag="as")

    example: ClassVar[str] = (
        "  ensemble-rm judgments export judgments.db --since 2026-11-01 --out november.jsonl"
    )

    def run(self, console: Console) -> None:
        """Export the judgments."""
        from ensemble_rm.judgments.exports import export_judgments, judgment_dataset
        from ensemble_rm.judgments.store import JudgmentStore

        if self.out is None and (self.kind == "dataset" or console.json):
            raise OptionError(f"--{'json' if console.json else 'as dataset'} needs --out")
        where = self.where
        with JudgmentStore.open(self.store, read_only=True) as store, console.progress() as bar:
            if self.kind == "dataset":
                judgment_dataset(store, where, progress=bar).save_to_disk(str(self.out))
            else:
                write_jsonl(self.out, export_judgments(store, where, progress=bar))
            data: dict[str, Any] = {"judgments": store.count(where), "digest": store.digest(where)}
            name = store.name
        if self.out is not None:
            data |= {"store": name, "out": str(self.out), "as": self.kind}
            text = f"{data['judgments']} judgments in {self.out}, digest {data['digest']}"
            console.result(data, text)
            console.save(self.out, config=False)
        console.read(f"{data['judgments']} judgments from {name}")


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Report the agreement of annotators, the share of ties, and a preference for one side."""

    store: str = argument(STORE)
    where: JudgmentFilter = nested(JudgmentFilter, panel="Which judgments")

    example: ClassVar[str] = "  ensemble-rm judgments report judgments.db"

    def run(self, console: Console) -> None:
        """Report on the judgments."""
        from ensemble_rm.judgments.agreement import agreement_report
        from ensemble_rm.judgments.store import JudgmentStore

        with JudgmentStore.open(self.store, read_only=True) as store, console.progress() as bar:
            report = agreement_report(store, self.where, progress=bar)
        console.result(report.to_json(), "\n".join(_report_lines(report)))
        console.read(f"{report.judgments} judgments from {self.store}")
        console.next(f"ensemble-rm recalibrate RUN --judgments {self.store}")


@dataclass(frozen=True, kw_only=True)
class Backup(Command):
    """Copy a SQLite store to a new file while other processes use it.

    The copy is a consistent snapshot, and is checked before it is renamed to its final name. Back
    up a PostgreSQL store with pg_dump.
    """

    store: str = argument(STORE)
    out: Path = option("new file for the copy", metavar="FILE")

    example: ClassVar[str] = (
        "  ensemble-rm judgments backup judgments.db --out backups/judgments-2026-11-30.db"
    )

    def run(self, console: Console) -> None:
        """Copy the store."""
        if self.out.exists():
            raise OptionError(f"{self.out} exists; name a new file")
        check_can_write(self.out)
        from ensemble_rm.judgments.backup import backup_store

        count, digest = backup_store(self.store, self.out)
        data = {"judgments": count, "digest": digest, "out": str(self.out)}
        console.result(data, f"{count} judgments in {self.out}, digest {digest}")
        console.save(self.out, config=False)
        console.next(f"ensemble-rm judgments report {self.out}")


def _report_lines(report: AgreementReport) -> Iterator[str]:
    yield (
        f"{report.judgments} judgments of {report.pairs} pairs ({report.prompts} prompts) by "
        f"{len(report.raters)} annotators; {report.shared} pairs have several"
    )
    if report.equal_sides:
        yield f"{report.equal_sides} judgments compare two equal texts and count in nothing else"
    yield f"ties                         {_shown(report.ties)}"
    yield f"first side, without ties     {_shown(report.first_side)}  (.5 if unbiased)"
    swapped = f"{report.swapped} pairs judged in both orders"
    yield f"first side, either order     {_shown(report.first_side_swapped)}  ({swapped})"
    yield f"agreement of two annotators  {_shown(report.agreement)}"
    yield f"Fleiss' kappa                {_shown(report.fleiss_kappa)}"
    yield ""
    width = max([len("annotator"), *(len(rater.annotator) for rater in report.raters)])
    yield (
        f"{'annotator':{width}s} judged  ties  first  shared  agreement with the rest   "
        "kappa                      repeats (same)"
    )
    for rater in report.raters:
        again = f"{rater.repeats}" + (f" ({rater.self_agreement:.2f})" if rater.repeats else "")
        yield (
            f"{rater.annotator:{width}s} {rater.judgments:6d}  {rater.ties.estimate:4.2f}  "
            f"{rater.first_side.estimate:5.2f}  {rater.shared:6d}  {_shown(rater.agreement):24s}  "
            f"{_shown(rater.kappa):25s}  {again}"
        )
    if report.couples:
        yield ""
        yield "couples                        shared  agreement  kappa"
    for couple in sorted(report.couples, key=lambda couple: -couple.shared)[:COUPLES_SHOWN]:
        names = " – ".join(couple.annotators)
        yield f"{names:30s} {couple.shared:6d}  {couple.agreement:9.2f}  {couple.kappa:5.2f}"
    if len(report.couples) > COUPLES_SHOWN:
        yield f"… and {len(report.couples) - COUPLES_SHOWN} more; --json has all"


def _shown(figure: Interval) -> str:
    return f"{figure.estimate:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
