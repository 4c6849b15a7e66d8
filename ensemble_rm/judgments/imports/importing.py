"""Import a file of judgments into the store, and report every bad row.

Implements the steps (read, reconcile, write); the formats read the fields.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_rm.errors import BadRowsError, DataError, RowProblem
from ensemble_rm.judgments.imports.formats import (
    Imported,
    ImportFormat,
    ImportOptions,
    Row,
    find_format,
    require_source,
)
from ensemble_rm.judgments.store import BATCH, JudgmentStore
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from ensemble_rm.judgments.imports.reconcile import Entry, Reconciler


def import_judgments(
    store: JudgmentStore,
    path: str | Path,
    *,
    format: str = "jsonl",  # noqa: A002
    options: ImportOptions | None = None,
    skip_bad: bool = False,
    correct: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Add a file's judgments to the store; those already stored are left unchanged.

    By default the whole file is checked before anything is written, and refused if a row is bad. A
    repeated import adds nothing. A row whose external id is stored with other content is bad; in
    exports of Label Studio and Argilla, a different time alone does not matter.

    Parameters
    ----------
    store : JudgmentStore
    path : str or Path
        Gzipped or not.
    format : str
        Name of a registered `ImportFormat`; built in are ``"jsonl"``, ``"label-studio"``,
        ``"label-studio-min"`` and ``"argilla"``.
    options : ImportOptions, optional
        How the file is read.
    skip_bad : bool
        Add the good rows and report the bad ones, instead of refusing the file.
    correct : bool
        Where a verdict in a tool's export changed since an earlier import, add a correction of the
        old one, instead of reporting a bad row. JSONL rows name themselves what they correct.
    dry_run : bool
        Check everything and write nothing.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Imported

    Raises
    ------
    BadRowsError
        If rows are bad and `skip_bad` is not set; it lists them all. Nothing was written, except
        where another writer took an external id after the check.
    DataError
        If the file does not exist, or cannot be read at all.
    OptionError
        If the format is unknown, or requires an option that is not given.
    StorageError
        If the store cannot be written. Batches written before are kept; the same import continues.
    """
    from ensemble_rm.judgments.imports.reconcile import Reconciler  # needs SQLAlchemy

    reader, options = find_format(format), options or ImportOptions()
    if reader.needs_source:
        require_source(options, format)
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such file: {path}")

    def run(stage: str, reconciler: Reconciler) -> Imported:
        result = Imported()
        for batch in _batches(path, reader, options, result):
            reconciler.add(batch, result)
            progress(stage, result.verdicts, 0)
        reconciler.finish(result)
        # `finish` reports pending corrections of earlier lines last.
        result.problems.sort(key=lambda problem: problem.line)
        return result

    # A pass without writing first, so that a bad row leaves the store unchanged.
    if dry_run or not skip_bad:
        result = run("checking", Reconciler(store, str(path), correct=correct))
        if result.problems and not skip_bad:
            raise _refusal(path, result, "nothing was written")
        if dry_run:
            return result
    with store.writer() as writer:
        result = run("adding", Reconciler(store, str(path), correct=correct, writer=writer))
    if result.problems and not skip_bad:
        kept = f"another process wrote meanwhile; the {result.added} good ones were added"
        raise _refusal(path, result, kept)
    return result


def _batches(
    path: Path, reader: ImportFormat, options: ImportOptions, result: Imported
) -> Iterator[list[Entry]]:
    """Yield judgments in batches; count other rows and problems in `result`."""
    from ensemble_rm.judgments.imports.reconcile import Entry

    batch: list[Entry] = []
    left_out: Counter[str] = Counter()
    for row in _rows(path, reader, options):
        result.verdicts += 1
        if isinstance(row.content, DataError):
            result.problems.append(RowProblem(str(path), row.line, str(row.content)))
        elif isinstance(row.content, str):
            left_out[row.content] += 1
        else:
            batch.append(Entry(row.line, row.content, row.revised_at))
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch
    result.left_out = dict(sorted(left_out.items()))


def _rows(path: Path, reader: ImportFormat, options: ImportOptions) -> Iterator[Row]:
    try:
        for number, row in reader.read_file(path):
            if isinstance(row, DataError):
                yield Row(number, row)
            elif not isinstance(row, Mapping):
                kind = type(row).__name__
                yield Row(number, DataError(f"a row must be an object, not {kind}"))
            else:
                try:
                    yield from reader.read_row(number, row, options)
                except DataError as error:
                    yield Row(number, error)
    # A truncated gzip raises EOFError, a damaged one zlib.error.
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} cannot be read to its end: {error}") from error


def _refusal(path: Path, result: Imported, state: str) -> BadRowsError:
    shown = "\n".join(map(str, result.problems[:20]))
    more = len(result.problems) - 20
    tail = f"\n… and {more} more" if more > 0 else ""
    return BadRowsError(
        f"{len(result.problems)} of {result.verdicts} verdicts of {path} are bad; {state} "
        f"(skip_bad=True or --skip-bad adds the good ones):\n{shown}{tail}",
        result.problems,
    )
