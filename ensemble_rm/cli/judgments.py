"""``ensemble-rm judgments``: import, export, report, backup, repair, retract, erase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import RUN, STORE, check_can_write, write_jsonl
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of
from ensemble_rm.errors import DataError, OptionError
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.imports.formats import FORMATS, ImportOptions
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.evidence.erasure import Erasure
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

    The copy is a consistent snapshot, and every judgment, text and batch in it is checked before it
    gets its final name. Copying the file itself loses what is in its log. Back up a PostgreSQL
    store with pg_dump.
    """

    store: str = argument(STORE)
    out: Path = argument("new file for the copy", metavar="OUT")

    example: ClassVar[str] = (
        "  ensemble-rm judgments backup judgments.db backups/judgments-2026-11-30.db"
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


@dataclass(frozen=True, kw_only=True)
class Repair(Command):
    """Migrate a store of an earlier release, check all of it, and restore missing triggers.

    Triggers in the database keep judgments from being changed. Without them a store is not opened.
    Judgments are not repaired: exit code 15 if some were lost or changed.
    """

    store: str = argument(STORE)

    example: ClassVar[str] = "  ensemble-rm judgments repair judgments.db"

    def run(self, console: Console) -> None:
        """Check and repair the store."""
        from ensemble_rm.judgments.checking import repair_store

        with console.progress() as progress:
            checked = repair_store(self.store, progress=progress)
        text = (
            f"{checked.judgments} judgments in {checked.batches} batches and {checked.texts} texts "
            f"are unchanged; head {checked.head}"
        )
        console.result(asdict(checked), text)
        console.next(f"ensemble-rm judgments report {self.store}")


@dataclass(frozen=True, kw_only=True)
class Retract(Command):
    """Take judgments back, without another verdict in their place.

    Each retraction is a judgment of its own that corrects the old one. The history keeps both.
    """

    store: str = argument(STORE)
    ids: tuple[str, ...] = argument("id of a judgment; repeatable", metavar="ID...")
    at: datetime | None = option(
        "time of the retraction", default=None, metavar="TIME", shown="now"
    )

    example: ClassVar[str] = (
        "  ensemble-rm judgments retract judgments.db 3f2a9c0d41b75e6688aa10c9d2e4f701"
    )

    def run(self, console: Console) -> None:
        """Add the retractions."""
        from ensemble_rm.judgments.store import JudgmentStore

        at = self.at or datetime.now(UTC)
        with JudgmentStore.open(self.store) as store:
            ids = set(self.ids)
            rows = store.find(ids)
            if missing := sorted(ids - set(rows)):
                raise DataError(f"{store.name} has no judgment {', '.join(missing)}; check the ids")
            added = store.add([row.retracted(judged_at=at) for row in rows.values()]).added
            data = {"retracted": added, "judgments": store.count()}
        console.result(data, f"{added} retracted; {data['judgments']} judgments count")
        console.next(f"ensemble-rm judgments report {self.store}")


@dataclass(frozen=True, kw_only=True)
class Erase(Command):
    """Erase the texts of judgments, and what was derived from them, for good.

    Without --yes nothing is erased, and what would be is listed. Digests, verdicts and the chain
    stay, so that the store can still be checked. Texts that other judgments share are erased with
    those judgments, unless --keep-shared. The versions that were trained on the judgments are
    listed and not changed. Backups and the database server's own logs are yours to erase.
    """

    store: str = argument(STORE)
    ids: tuple[str, ...] = argument("id of a judgment; repeatable", metavar="ID...")
    runs: tuple[Path, ...] = option(
        f"{RUN}; repeatable", default=(), flag="run", metavar="RUN", shown="none"
    )
    caches: tuple[Path, ...] = option(
        "folder of cached features and scores; repeatable",
        default=(DEFAULT_CACHE,),
        flag="cache-dir",
        metavar="DIR",
        shown=str(DEFAULT_CACHE),
    )
    keep_shared: bool = option("keep texts that other judgments use", default=False)
    yes: bool = option("erase, instead of listing what would be erased", default=False)

    example: ClassVar[str] = (
        "  ensemble-rm judgments erase judgments.db 3f2a9c0d41b75e6688aa10c9d2e4f701 --run runs/hh"
    )

    def run(self, console: Console) -> None:
        """Erase the judgments."""
        from ensemble_rm.evidence.erasure import erase_judgments
        from ensemble_rm.judgments.store import JudgmentStore

        with JudgmentStore.open(self.store) as store:
            erased = erase_judgments(
                store,
                self.ids,
                runs=self.runs,
                caches=self.caches,
                keep_shared=self.keep_shared,
                dry_run=not self.yes,
            )
        console.result(asdict(erased), "\n".join(_erasure_lines(erased)))
        if erased.dry_run:
            console.note("nothing was erased; repeat the command with --yes")


def _erasure_lines(erased: Erasure) -> Iterator[str]:
    would = "would be erased" if erased.dry_run else "erased"
    yield (
        f"{len(erased.judgments)} judgments with {erased.texts} texts {would}, "
        f"{len(erased.shared)} of them because they share a text"
    )
    yield from (f"  {id_}" for id_ in erased.judgments)
    yield f"scores of {erased.scores} pairs, and {len(erased.files)} cache files"
    yield from (f"  {path}" for path in erased.files)
    for entry in erased.versions:
        perhaps = "" if entry.certain else "perhaps "
        yield f"{perhaps}trained on them: {entry.kind} {entry.version} of {entry.run}"


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
