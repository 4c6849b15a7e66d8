"""What a file of judgments holds, row by row, whatever tool wrote it.

Knows how verdicts are labelled and where texts stand; knows nothing of tools or the store.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ensemble_rm.data.loading import read_jsonl
from ensemble_rm.data.samples import as_prompt
from ensemble_rm.errors import DataError, OptionError, RowProblem
from ensemble_rm.judgments.judgment import OPTIONAL, OUTCOMES, Judgment

LABELS = {"left": "first", "right": "second", "first": "first", "second": "second", "tie": "tie"}


class Row(NamedTuple):
    """What one verdict of a file became.

    Attributes
    ----------
    line : int
        Its line, or in a JSON array the place of its task or record, from 1.
    content : Judgment, DataError or str
        The judgment; what is wrong with it; or why there is none (skipped, a draft, unlabelled).
    revised_at : datetime, optional
        When the verdict was last changed, where its tool lets annotators change one.
    """

    line: int
    content: Judgment | DataError | str
    revised_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How a file is read; what a format names itself needs no option.

    Attributes
    ----------
    source : str, optional
        The judgments' source. Exports of Label Studio and Argilla need it; JSONL rows that name
        one keep theirs.
    prompt, first, second : str, optional
        Names of the fields that hold the texts. By default ``prompt``, ``answer1``, ``answer2`` in
        Label Studio and ``prompt``, ``first``, ``second`` in Argilla.
    question : str, optional
        The control or question that holds the verdict; needed where there are several, and in
        JSON_MIN where it is not called ``comparison``.
    labels : mapping of str to str
        The outcome that a label means. ``left``, ``right``, ``first``, ``second``, ``tie`` and the
        names of the fields are known.
    empty_is_tie : bool
        Read a submitted annotation without a selection as a tie, which Label Studio's pairwise
        control cannot say otherwise; else it is a bad row.
    judged_at : datetime, optional
        When verdicts were given that name no time: Argilla exports none.
    assume_utc : bool
        Take a time without an offset for UTC instead of refusing it.

    Raises
    ------
    OptionError
        If a label means no outcome.
    """

    source: str | None = field(
        default=None, metadata={"help": "source of judgments that do not name one"}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "field of the prompt in an export", "shown": "prompt"}
    )
    first: str | None = field(
        default=None,
        metadata={
            "help": "field of the first text in an export",
            "shown": "answer1 in Label Studio, first in Argilla",
        },
    )
    second: str | None = field(
        default=None,
        metadata={
            "help": "field of the second text in an export",
            "shown": "answer2 in Label Studio, second in Argilla",
        },
    )
    question: str | None = field(
        default=None,
        metadata={
            "help": "control or question of the verdict in an export",
            "shown": "the only one",
        },
    )
    labels: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": "meaning of a label: first, second or tie; repeated"},
    )
    empty_is_tie: bool = field(
        default=False, metadata={"help": "read a submitted annotation without a selection as a tie"}
    )
    judged_at: datetime | None = field(
        default=None, metadata={"help": "time of verdicts that name no time", "metavar": "TIME"}
    )
    assume_utc: bool = field(
        default=False, metadata={"help": "read times without an offset as UTC"}
    )

    def __post_init__(self) -> None:
        for label, outcome in self.labels.items():
            if outcome not in OUTCOMES:
                raise OptionError(f"label {label!r} must mean first, second or tie: {outcome!r}")


@dataclass
class Imported:
    """What `import_judgments` found.

    Attributes
    ----------
    verdicts : int
        Rows, annotations or responses that were read.
    added : int
        Judgments that are new, `corrections` among them; in a dry run, that would be.
    already : int
        Judgments that were there, or came twice.
    corrections : int
        Verdicts that had changed since an earlier import.
    left_out : dict of str to int
        How many gave no judgment, by reason.
    problems : list of RowProblem
        Every bad row; none but where they were to be skipped.
    """

    verdicts: int = 0
    added: int = 0
    already: int = 0
    corrections: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    problems: list[RowProblem] = field(default_factory=list)


@dataclass(frozen=True)
class Texts:
    """Where prompt and completions stand, and what a label says of them.

    Attributes
    ----------
    prompt, first, second : str
        Names of fields.
    labels : mapping of str to str
        Outcomes by label.
    """

    prompt: str
    first: str
    second: str
    labels: Mapping[str, str]

    @classmethod
    def named(cls, options: ImportOptions, prompt: str, first: str, second: str) -> Texts:
        """Return the names that the options give, these by default."""
        chosen = (options.prompt or prompt, options.first or first, options.second or second)
        fields = {chosen[1]: "first", chosen[2]: "second"}
        return cls(*chosen, {**LABELS, **fields, **options.labels})

    def outcome(self, label: object) -> str:
        """Return what a label means.

        Raises
        ------
        DataError
            If it is not known.
        """
        if not isinstance(label, str) or label not in self.labels:
            raise DataError(
                f"the verdict {label!r} is none of {sorted(self.labels)}; say what it means with "
                "`labels` (--label)"
            )
        return self.labels[label]

    def read(self, fields: Mapping[str, Any], *, turned: bool = False) -> dict[str, Any]:
        """Return prompt, first and second; the two the other way round where `turned`.

        Raises
        ------
        DataError
            If one is missing.
        """
        for name in (self.prompt, self.first, self.second):
            if fields.get(name) is None:
                raise DataError(f"needs the field {name!r}; has {sorted(map(str, fields))}")
        first, second = fields[self.first], fields[self.second]
        if turned:
            first, second = second, first
        return {"prompt": as_prompt(fields[self.prompt]), "first": first, "second": second}


def read_optional(*places: object) -> dict[str, Any]:
    """Return batch, policy, subset, strategy and inclusion from the first place that has each."""
    found: dict[str, Any] = {}
    for name in (*OPTIONAL, "inclusion"):
        given = [place[name] for place in places if isinstance(place, Mapping) and name in place]
        value = next((value for value in given if value is not None), None)
        if name != "inclusion" and isinstance(value, (int, float)):
            value = str(value)
        if value is not None:
            found[name] = value
    return found


def require_source(options: ImportOptions, format_: str) -> str:
    """Return the source asked for.

    Raises
    ------
    OptionError
        If none was.
    """
    if options.source is None:
        raise OptionError(
            f"an export in the format {format_} does not say where it comes from: name it with "
            "`source` (--source), the same each time, so that a repeated import changes nothing"
        )
    return options.source


def numbered(path: Path) -> Iterator[tuple[int, Any]]:
    """Give the objects of a JSON array or of a JSONL file, gzipped or not, numbered.

    An array is held in memory whole, lines one by one.

    Raises
    ------
    DataError
        If an array cannot be read.
    """
    with path.open("rb") as probe:
        zipped = probe.read(2) == b"\x1f\x8b"
    opener: Any = gzip.open if zipped else open
    with opener(path, "rb") as stream:
        if stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
            yield from read_jsonl(path)
            return
        stream.seek(0)
        try:
            rows = json.loads(stream.read().decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
    yield from enumerate(rows, start=1)


def read_own(line: int, row: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read a row of our JSONL: the fields of Judgment."""
    defaults = {"source": options.source, "judged_at": options.judged_at}
    given = {name: value for name, value in defaults.items() if row.get(name) is None}
    yield Row(line, Judgment.from_json({**row, **given}, assume_utc=options.assume_utc))
