"""A file of judgments into the store: every bad row named, nothing of the good ones lost.

Knows the order of things (read, settle, write) and what the formats are called; knows nothing of
their fields.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.data.loading import read_jsonl
from ensemble_rm.errors import BadRowsError, DataError, OptionError, RowProblem
from ensemble_rm.judgments.imports.argilla import read_record
from ensemble_rm.judgments.imports.label_studio import read_min, read_task
from ensemble_rm.judgments.imports.rows import (
    Imported,
    ImportOptions,
    Row,
    numbered,
    read_own,
    require_source,
)
from ensemble_rm.judgments.store import BATCH, JudgmentStore
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from ensemble_rm.judgments.imports.reconcile import Entry, Settler

Reader = Callable[[int, Mapping[str, Any], ImportOptions], Iterator[Row]]
READERS: dict[str, tuple[Callable[[Path], Iterator[tuple[int, Any]]], Reader]] = {
    "jsonl": (read_jsonl, read_own),
    "label-studio": (numbered, read_task),
    "label-studio-min": (numbered, read_min),
    "argilla": (numbered, read_record),
}
PLAIN = ImportOptions()


def import_judgments(
    store: JudgmentStore,
    path: str | Path,
    *,
    format: str = "jsonl",  # noqa: A002
    options: ImportOptions = PLAIN,
    skip_bad: bool = False,
    correct: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Add a file's judgments to the store; those that are there already are left alone.

    By default the whole file is read before anything is written, and refused where a row is bad.
    A repeated import adds nothing. A row whose external id is stored with other content is bad;
    what Label Studio and Argilla export is there already where only its time differs.

    Parameters
    ----------
    store : JudgmentStore
    path : str or Path
        JSONL, or what the tool exported; gzipped or not.
    format : str
        ``"jsonl"``, ``"label-studio"``, ``"label-studio-min"`` or ``"argilla"``.
    options : ImportOptions
        How the file is read.
    skip_bad : bool
        Add the good rows and report the bad ones, instead of refusing the file.
    correct : bool
        Where a tool's export holds a verdict that changed since an earlier import, add a
        correction that names the old one, instead of calling the row bad. JSONL rows name what
        they correct themselves.
    dry_run : bool
        Write nothing.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Imported

    Raises
    ------
    BadRowsError
        If rows are bad and `skip_bad` is not set; it lists every one, and nothing was written,
        except where another writer took an external id after the file had been read.
    DataError
        If there is no such file, or it cannot be read at all.
    OptionError
        If the format is not known, or it needs an option that is not given.
    StorageError
        If the store cannot be written; whole batches before stay, and the same import goes on.
    """
    if format not in READERS:
        raise OptionError(f"format must be one of {', '.join(READERS)}, not {format!r}")
    if format != "jsonl":
        require_source(options, format)
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    from ensemble_rm.judgments.imports.reconcile import Settler

    def run(stage: str, settler: Settler) -> Imported:
        found = Imported()
        for batch in _batches(path, format, options, found):
            settler.take(batch, found)
            progress(stage, found.verdicts, 0)
        settler.end(found)
        found.problems.sort(key=lambda problem: problem.line)
        return found

    if dry_run or not skip_bad:
        found = run("checking", Settler(store, str(path), correct=correct))
        if found.problems and not skip_bad:
            raise _refusal(path, found, "nothing was written")
        if dry_run:
            return found
    with store.writer() as writer:
        found = run("adding", Settler(store, str(path), correct=correct, writer=writer))
    if found.problems and not skip_bad:
        raise _refusal(path, found, f"another writer was faster; the others ({found.added}) stand")
    return found


def _batches(
    path: Path, format_: str, options: ImportOptions, found: Imported
) -> Iterator[list[Entry]]:
    """Give judgments in batches; count the rest and note problems as they come."""
    from ensemble_rm.judgments.imports.reconcile import Entry

    batch: list[Entry] = []
    left_out: Counter[str] = Counter()
    for row in _rows(path, *READERS[format_], options):
        found.verdicts += 1
        if isinstance(row.content, DataError):
            found.problems.append(RowProblem(str(path), row.line, str(row.content)))
        elif isinstance(row.content, str):
            left_out[row.content] += 1
        else:
            batch.append(Entry(row.line, row.content, row.revised_at))
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch
    found.left_out = dict(sorted(left_out.items()))


def _rows(
    path: Path,
    lines: Callable[[Path], Iterator[tuple[int, Any]]],
    read: Reader,
    options: ImportOptions,
) -> Iterator[Row]:
    try:
        for number, row in lines(path):
            if isinstance(row, DataError):
                yield Row(number, row)
            elif not isinstance(row, Mapping):
                kind = type(row).__name__
                yield Row(number, DataError(f"a row must be an object, not {kind}"))
            else:
                try:
                    yield from read(number, row, options)
                except DataError as error:
                    yield Row(number, error)
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} cannot be read to its end: {error}") from error


def _refusal(path: Path, found: Imported, state: str) -> BadRowsError:
    shown = "\n".join(map(str, found.problems[:20]))
    more = len(found.problems) - 20
    tail = f"\n… and {more} more" if more > 0 else ""
    return BadRowsError(
        f"{len(found.problems)} of {found.verdicts} verdicts of {path} are bad, {state} "
        f"(skip_bad=True or --skip-bad adds the good ones):\n{shown}{tail}",
        found.problems,
    )
