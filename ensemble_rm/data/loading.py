"""Reads preferences and samples from files and data sets, and names every bad row.

Reads JSONL (plain or gzipped), `datasets` data sets and their Hub ids, in TRL's three shapes.
Knows nothing of models.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ensemble_rm.data.samples import (
    Message,
    Preference,
    Preferences,
    Prompt,
    Sample,
    as_prompt,
    check_unicode,
    prompt_key,
)
from ensemble_rm.errors import (
    BadRowsError,
    DataError,
    MissingExtraError,
    RowProblem,
)

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class LoadReport:
    """What `read_preferences` read, and what is wrong with it.

    Attributes
    ----------
    source : str
    rows, kept : int
        Rows read and pairs kept.
    problems : tuple of RowProblem
        Rows that cannot be used, each with its line and reason.
    duplicates : tuple of RowProblem
        Rows that repeat an earlier one exactly; they are kept, and reported.
    equal_sides : tuple of RowProblem
        Rows whose two completions are the same text; they are kept, and reported.
    """

    source: str
    rows: int
    kept: int
    problems: tuple[RowProblem, ...] = ()
    duplicates: tuple[RowProblem, ...] = ()
    equal_sides: tuple[RowProblem, ...] = ()

    def summary(self) -> str:
        """Return one line for a person."""
        return (
            f"{self.source}: {self.rows} rows, {self.kept} kept, {len(self.problems)} bad, "
            f"{len(self.duplicates)} exact duplicates, {len(self.equal_sides)} with equal sides"
        )


def load_preferences(
    source: str | Path | Iterable[Row], *, skip_bad: bool = False, split: str = "train"
) -> Preferences:
    """Read preference pairs.

    Parameters
    ----------
    source : path, Hub id, or iterable of rows
        A JSONL file (``.gz`` allowed), the Hub id of a data set, a `datasets.Dataset`, or any
        iterable of mappings.
    skip_bad : bool
        Leave bad rows out instead of raising an error.
    split : str
        Split of a Hub data set.

    Returns
    -------
    Preferences
        In the order of the source.

    Raises
    ------
    BadRowsError
        If rows are bad and `skip_bad` is not set; it lists all of them.
    DataError
        If there is no good row.
    """
    pairs, report = read_preferences(source, split=split)
    if report.problems and not skip_bad:
        # Twenty rows show the pattern; a million would hide it.
        shown = "\n".join(str(problem) for problem in report.problems[:20])
        more = len(report.problems) - 20
        tail = f"\n… and {more} more" if more > 0 else ""
        raise BadRowsError(
            f"{len(report.problems)} of {report.rows} rows of {report.source} are bad "
            f"(skip_bad=True or --skip-bad leaves them out):\n{shown}{tail}",
            report.problems,
        )
    return pairs


def read_preferences(
    source: str | Path | Iterable[Row], *, split: str = "train"
) -> tuple[Preferences, LoadReport]:
    """Read the good rows and report the bad ones; see `load_preferences`.

    Raises
    ------
    DataError
        If no row is good; it lists the first reasons.
    """
    # A generator: the source is read once, row by row.
    name, rows = _rows(source, split)
    pairs: list[Preference] = []
    problems: list[RowProblem] = []
    duplicates: list[RowProblem] = []
    equal: list[RowProblem] = []
    seen: dict[tuple[str, str, str], int] = {}
    count = 0
    for line, row in rows:
        count += 1
        try:
            pair = _preference(row)
        except DataError as error:
            problems.append(RowProblem(name, line, str(error)))
            continue
        # By key of the prompt: a text and one user message of that text are the same prompt.
        key = (prompt_key(pair.prompt), pair.chosen, pair.rejected)
        if key in seen:
            # Kept all the same: several annotators may judge the same pair.
            duplicates.append(RowProblem(name, line, f"repeats line {seen[key]} exactly"))
        seen.setdefault(key, line)
        if pair.chosen == pair.rejected:
            # Kept as well, with a margin of 0: only the caller knows whether it is a mistake.
            equal.append(RowProblem(name, line, "chosen and rejected are the same text"))
        pairs.append(pair)
    if not pairs:
        reasons = "\n".join(str(problem) for problem in problems[:5]) or "the file has no rows"
        raise DataError(f"{name} holds no usable preference pair:\n{reasons}")
    report = LoadReport(name, count, len(pairs), tuple(problems), tuple(duplicates), tuple(equal))
    return Preferences(tuple(pairs), name), report


def read_samples(source: str | Path | Iterable[Row]) -> Iterator[Sample]:
    """Stream samples (``prompt`` and ``completion``) from JSONL or rows, in their order.

    Raises
    ------
    BadRowsError
        At the first bad row, with its line: scores must stay aligned with rows.
    """
    name, rows = _rows(source, "train")
    for line, row in rows:
        try:
            yield _sample(row)
        except DataError as error:
            problem = RowProblem(name, line, str(error))
            # The stream stops at the first bad row: its scores would otherwise shift by a row.
            raise BadRowsError(str(problem), [problem]) from None


def read_comparisons(source: str | Path | Iterable[Row]) -> Preferences:
    """Read unjudged pairs: ``prompt``, ``first`` and ``second`` (or ``chosen`` and ``rejected``).

    Raises
    ------
    BadRowsError
        At the first bad row, with its line: answers must stay aligned with rows.
    """
    name, rows = _rows(source, "train")
    pairs = []
    for line, row in rows:
        try:
            fields = dict(_checked(row))
            for side, alias in (("chosen", "first"), ("rejected", "second")):
                if alias in fields:
                    # The rest of the fields (subset, id, reference) are read as those of judged
                    # pairs.
                    fields[side] = fields[alias]
            pairs.append(_preference(fields))
        except DataError as error:
            problem = RowProblem(name, line, str(error))
            raise BadRowsError(str(problem), [problem]) from None
    return Preferences(tuple(pairs), name)


# Rows ----------------------------------------------------------------------------------------


def _rows(source: str | Path | Iterable[Row], split: str) -> tuple[str, Iterator[tuple[int, Any]]]:
    """Return a name for messages, and numbered rows; a bad JSON line becomes a DataError."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            return str(source), read_jsonl(path)
        # Anything that looks like a path is not sent to a hub, where it would fail much later.
        if path.exists() or path.suffix in {".jsonl", ".json", ".gz"} or _no_hub_id(str(source)):
            raise DataError(f"no such file: {source}")
        return str(source), enumerate(iter(_hub_rows(str(source), split)), start=1)
    return type(source).__name__, enumerate(iter(source), start=1)


def _no_hub_id(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text


def _hub_rows(name: str, split: str) -> Iterable[Row]:
    try:
        # Imported only here: the package is an extra and slow to import.
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"reading the data set {name!r} needs the package `datasets`: "
            "pip install 'ensemble-rm[data]' (or name a JSONL file)"
        ) from error
    rows: Iterable[Row] = datasets.load_dataset(name, split=split)
    return rows


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the numbered rows of a JSONL file, gzipped or not; a bad line as a DataError."""
    with path.open("rb") as probe:
        # By content, not by name: downloads lose their suffix.
        zipped = probe.read(2) == b"\x1f\x8b"
    opener: Any = gzip.open if zipped else open
    with opener(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                # utf-8-sig: files from Windows begin with a byte order mark.
                yield number, json.loads(raw.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield number, DataError(f"not JSON: {error}")


def _checked(row: object) -> Row:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, not {type(row).__name__}")
    return row


def _sample(raw: object) -> Sample:
    row = _checked(raw)
    if "prompt" not in row or "completion" not in row:
        raise DataError(f"needs `prompt` and `completion`; has {sorted(row)}")
    completion = _completion(row["completion"], "completion")
    prompt, reference = as_prompt(row["prompt"]), _reference(row)
    check_unicode(prompt, completion=completion, reference=reference)
    return Sample(prompt, completion, reference)


def _preference(raw: object) -> Preference:
    """Read one row in any of TRL's three shapes: explicit, implicit, conversational."""
    row = _checked(raw)
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise DataError(f"needs `{side}`; has {sorted(row)}")
    # A null prompt counts as none: exports write every column.
    if row.get("prompt") is not None:
        prompt = as_prompt(row["prompt"])
        chosen = _completion(row["chosen"], "chosen")
        rejected = _completion(row["rejected"], "rejected")
    else:
        prompt, chosen, rejected = _implicit(row["chosen"], row["rejected"])
    if not prompt:
        raise DataError("the prompt is empty")
    reference = _reference(row)
    check_unicode(prompt, chosen=chosen, rejected=rejected, reference=reference)
    subset, identity = row.get("subset"), row.get("id")
    votes, ties = _votes(row)
    return Preference(
        prompt,
        chosen,
        rejected,
        margin=_number(row, "margin", 0.0),
        weight=_number(row, "weight", 1.0, positive=True),
        votes=votes,
        tie=_flag(row, "tie"),
        subset=None if subset is None else str(subset),
        id=None if identity is None else str(identity),
        reference=reference,
        tie_votes=ties,
    )


def _reference(row: Row) -> str | None:
    value = row.get("reference")
    if value is not None and not isinstance(value, (str, list, tuple)):
        raise DataError(f"`reference` must be text or one assistant message, not {value!r}")
    return None if value is None else _completion(value, "reference")


def _completion(value: object, field: str) -> str:
    """Read text, or the single assistant turn of the conversational shape."""
    if isinstance(value, str):
        return value
    # Text is a completion as it is; message lists are TRL's conversational shape.
    turns = as_prompt(value, field=field)
    if len(turns) != 1 or not isinstance(turns[0], Message):
        raise DataError(f"`{field}` must be text or one assistant message, not {len(turns)} turns")
    if turns[0].role != "assistant":
        raise DataError(f"`{field}` must be an assistant message, not {turns[0].role!r}")
    return turns[0].content


def _implicit(chosen: object, rejected: object) -> tuple[Prompt, str, str]:
    """Split the prompt off two whole conversations, or two texts that start the same."""
    first, second = as_prompt(chosen, field="chosen"), as_prompt(rejected, field="rejected")
    if isinstance(first, tuple) and isinstance(second, tuple):
        # At least one turn of prompt and one of completion.
        if len(first) < 2 or len(second) < 2 or first[:-1] != second[:-1]:
            raise DataError("chosen and rejected must share every turn but the last")
        if first[-1].role != "assistant" or second[-1].role != "assistant":
            raise DataError("chosen and rejected must end in an assistant message")
        return first[:-1], first[-1].content, second[-1].content
    if not (isinstance(first, str) and isinstance(second, str)):
        raise DataError("chosen and rejected must be of one shape, both text or both messages")
    cut = _shared_prefix(first, second)
    if cut == 0:
        raise DataError("no `prompt`, and chosen and rejected share no beginning to take for it")
    return first[:cut], first[cut:], second[cut:]


def _shared_prefix(first: str, second: str) -> int:
    """Length of the common beginning, cut back to the end of a dialogue marker or a word."""
    if first == second:
        return 0
    cut = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    # Anthropic's HH strings: the prompt ends with the marker of the assistant's turn.
    marker = first.rfind("\n\nAssistant:", 0, cut)
    if marker >= 0:
        return marker + len("\n\nAssistant:")
    # A prefix that ends inside a word would leave half a word on both sides.
    while cut > 0 and not first[cut - 1].isspace():
        cut -= 1
    return cut


def _number(row: Row, key: str, default: float, *, positive: bool = False) -> float:
    value = row.get(key)
    if value is None:
        return default
    # bool is an int in Python, and `true` is no weight.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"`{key}` must be a finite number, not {value!r}")
    if positive and value <= 0:
        raise DataError(f"`{key}` must be above 0, not {value!r}")
    return float(value)


def _flag(row: Row, key: str) -> bool:
    value = row.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise DataError(f"`{key}` must be true or false, not {value!r}")
    return value


def _votes(row: Row) -> tuple[tuple[float, float] | None, float]:
    """Read ``{"chosen": 3, "rejected": 1, "tie": 1}`` or ``[3, 1]``: votes, and ties among them."""
    value = row.get("votes")
    ties = _number(row, "tie_votes", 0.0)
    if isinstance(value, Mapping):
        unknown = set(value) - {"chosen", "rejected", "tie"}
        if unknown:
            raise DataError(f"`votes` has the keys chosen, rejected and tie, not {sorted(unknown)}")
        ties = _number(value, "tie", 0.0)
        # A tie counts half for each side, as in the target ½.
        pair = tuple(_number(value, side, 0.0) + 0.5 * ties for side in ("chosen", "rejected"))
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        numbered = {"chosen": value[0], "rejected": value[1]}
        pair = tuple(_number(numbered, side, 0.0) for side in ("chosen", "rejected"))
    elif value is None:
        if ties:
            raise DataError(f"`tie_votes` {ties!r} needs `votes`, of which they are part")
        return None, 0.0
    else:
        raise DataError(f"`votes` must be an object or two numbers, not {value!r}")
    if min(pair) < 0 or sum(pair) <= 0:
        raise DataError(f"`votes` must be non-negative with at least one vote, not {value!r}")
    if not 0 <= ties <= 2 * min(pair) + 1e-9 * sum(pair):  # sums of weighted votes are rounded
        raise DataError(f"{ties!r} tied votes do not lie in `votes` {value!r}, half on each side")
    return (pair[0], pair[1]), ties
