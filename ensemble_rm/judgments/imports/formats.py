"""Import formats: the interface, the registry, and what all formats share.

A format is a file in this folder with one `ImportFormat`, and one row in ``__init__``. It turns a
row of a file into judgments; it knows neither the store nor the other formats.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ensemble_rm.data.loading import read_jsonl
from ensemble_rm.data.samples import as_prompt
from ensemble_rm.errors import DataError, OptionError, RowProblem
from ensemble_rm.judgments.judgment import OPTIONAL, OUTCOMES, Judgment

LABELS = {"left": "first", "right": "second", "first": "first", "second": "second", "tie": "tie"}


class Row(NamedTuple):
    """One verdict of a file.

    Attributes
    ----------
    line : int
        Its line; in a JSON array, the position of its task or record, from 1.
    content : Judgment, DataError or str
        The judgment; or what is wrong with it; or why there is none ("skipped", "unlabelled").
    revised_at : datetime, optional
        When the verdict was last changed, for tools in which annotators can change one. A row with
        a date may correct an earlier import; see `import_judgments`.
    """

    line: int
    content: Judgment | DataError | str
    revised_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How a file is read.

    Attributes
    ----------
    source : str, optional
        Source of judgments that do not name one. Exports of Label Studio and Argilla require it;
        JSONL rows with a source keep their own.
    prompt, first, second : str, optional
        Names of the fields that contain the texts (default: ``prompt``, ``answer1``, ``answer2``
        for Label Studio; ``prompt``, ``first``, ``second`` for Argilla).
    question : str, optional
        The control or question that contains the verdict; required if there are several, and in
        JSON_MIN if it is not called ``comparison``.
    labels : mapping of str to str
        Outcome per label. ``left``, ``right``, ``first``, ``second``, ``tie`` and the names of the
        fields are built in.
    empty_is_tie : bool
        Read a submitted annotation without a selection as a tie; Label Studio's pairwise control
        has no other way to say so. Otherwise it is a bad row.
    judged_at : datetime, optional
        Time of verdicts without one; Argilla exports none.
    assume_utc : bool
        Read times without an offset as UTC instead of refusing them.

    Raises
    ------
    OptionError
        If a label does not map to an outcome.
    """

    source: str | None = field(
        default=None, metadata={"help": "source of judgments that do not name one"}
    )
    prompt: str | None = field(default=None, metadata={"help": "field of the prompt"})
    first: str | None = field(default=None, metadata={"help": "field of the first completion"})
    second: str | None = field(default=None, metadata={"help": "field of the second completion"})
    question: str | None = field(
        default=None, metadata={"help": "control or question that contains the verdict"}
    )
    labels: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": "outcome of a label, LABEL=first|second|tie; repeatable"},
    )
    empty_is_tie: bool = field(
        default=False, metadata={"help": "read a submitted annotation without a selection as a tie"}
    )
    judged_at: datetime | None = field(
        default=None, metadata={"help": "time of verdicts without one"}
    )
    assume_utc: bool = field(
        default=False, metadata={"help": "read times without an offset as UTC"}
    )

    def __post_init__(self) -> None:
        for label, outcome in self.labels.items():
            if outcome not in OUTCOMES:
                raise OptionError(
                    f"label {label!r} must map to first, second or tie, not {outcome!r}"
                )


@dataclass
class Imported:
    """The result of `import_judgments`.

    Attributes
    ----------
    verdicts : int
        Rows, annotations or responses in the file.
    added : int
        New judgments, corrections included; in a dry run, those that would be added.
    already : int
        Judgments that were in the store already, or twice in the file.
    corrections : int
        Verdicts that changed since an earlier import.
    left_out : dict of str to int
        Number of rows without a judgment, by reason.
    problems : list of RowProblem
        The bad rows; only if they were skipped.
    """

    verdicts: int = 0
    added: int = 0
    already: int = 0
    corrections: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    problems: list[RowProblem] = field(default_factory=list)


@dataclass(frozen=True)
class TextFields:
    """The fields of prompt and completions, and the labels of outcomes.

    Attributes
    ----------
    prompt, first, second : str
        Names of fields.
    labels : mapping of str to str
        Outcome per label.
    """

    prompt: str
    first: str
    second: str
    labels: Mapping[str, str]

    @classmethod
    def from_options(
        cls, options: ImportOptions, prompt: str, first: str, second: str
    ) -> TextFields:
        """Return the fields of the options, with these names as defaults."""
        chosen = (options.prompt or prompt, options.first or first, options.second or second)
        fields = {chosen[1]: "first", chosen[2]: "second"}
        return cls(*chosen, {**LABELS, **fields, **options.labels})

    def outcome(self, label: object) -> str:
        """Return the outcome of a label.

        Raises
        ------
        DataError
            If the label is unknown.
        """
        if not isinstance(label, str) or label not in self.labels:
            raise DataError(
                f"unknown verdict {label!r}; known are {sorted(self.labels)}. Map it to an outcome "
                "with `labels` (--label)"
            )
        return self.labels[label]

    def read(self, fields: Mapping[str, Any], *, swapped: bool = False) -> dict[str, Any]:
        """Return prompt, first and second; the completions swapped if `swapped`.

        Raises
        ------
        DataError
            If a field is missing.
        """
        for name in (self.prompt, self.first, self.second):
            if fields.get(name) is None:
                raise DataError(f"needs the field {name!r}; has {sorted(map(str, fields))}")
        first, second = fields[self.first], fields[self.second]
        if swapped:
            first, second = second, first
        return {"prompt": as_prompt(fields[self.prompt]), "first": first, "second": second}


def read_optional(*mappings: object) -> dict[str, Any]:
    """Return batch, policy, subset, strategy and inclusion, each from the first mapping with it."""
    values: dict[str, Any] = {}
    for name in (*OPTIONAL, "inclusion"):
        given = [row[name] for row in mappings if isinstance(row, Mapping) and name in row]
        value = next((value for value in given if value is not None), None)
        if name != "inclusion" and isinstance(value, (int, float)):
            value = str(value)
        if value is not None:
            values[name] = value
    return values


def require_source(options: ImportOptions, format_: str) -> str:
    """Return the source of the options.

    Raises
    ------
    OptionError
        If there is none.
    """
    if options.source is None:
        raise OptionError(
            f"a file in the format {format_} does not name its source; give it with `source` "
            "(--source), the same every time, so that a repeated import changes nothing"
        )
    return options.source


def read_json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the numbered objects of a JSON array or a JSONL file, gzipped or not.

    A JSON array is loaded as a whole, a JSONL file line by line.

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
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON: {error}") from None
    yield from enumerate(rows, start=1)


# Registry ------------------------------------------------------------------------------------

RowReader: TypeAlias = Callable[[int, Mapping[str, Any], ImportOptions], Iterator[Row]]
FileReader: TypeAlias = Callable[[Path], Iterator[tuple[int, Any]]]


@dataclass(frozen=True)
class ImportFormat:
    """A format that `import_judgments` reads.

    Attributes
    ----------
    name : str
        The value of ``format=`` and ``--format``.
    read_row : callable
        Takes a row's number, the row and `ImportOptions`; yields a `Row` per verdict. It raises
        `DataError`, or yields one as `Row.content`, for what cannot be read.
    read_file : callable
        Takes the path; yields (number, row), lazily. Default: a JSON array or JSONL, gzipped or
        not.
    needs_source : bool
        Whether rows cannot name their source, so that `ImportOptions.source` is required.
    """

    name: str
    read_row: RowReader
    read_file: FileReader = read_json_rows
    needs_source: bool = True


FORMATS: dict[str, ImportFormat] = {}
"""Every registered import format by its name."""


def register_format(format: ImportFormat) -> ImportFormat:  # noqa: A002
    """Make an import format known to `import_judgments`.

    Parameters
    ----------
    format : ImportFormat
        Register it before a file of it is imported.

    Returns
    -------
    ImportFormat
        The same one.

    Raises
    ------
    OptionError
        If another format has the name.
    """
    if FORMATS.setdefault(format.name, format) != format:
        raise OptionError(
            f"an import format {format.name!r} is registered already; use another name"
        )
    return format


def find_format(name: str) -> ImportFormat:
    """Return the import format of a name.

    Raises
    ------
    OptionError
        If there is none.
    """
    if name not in FORMATS:
        raise OptionError(f"no import format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
