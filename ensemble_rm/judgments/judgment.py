"""A human judgment, immutable, with an id derived from its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from ensemble_rm.data.samples import Message, Prompt, as_prompt, prompt_json, prompt_key
from ensemble_rm.errors import DataError

Outcome: TypeAlias = Literal["first", "second", "tie"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
RETRACTED = "retracted"  # the outcome of a correction that leaves no verdict
SHARES: dict[str, float] = {
    "first": 1.0,
    "second": 0.0,
    "tie": 0.5,
}  # share of the vote for the first side
LABEL_BYTES = 1000  # two must fit into an index entry of PostgreSQL
OPTIONAL = ("batch", "policy", "subset", "strategy", "corrects")
REQUIRED = ("prompt", "first", "second", "outcome", "annotator", "judged_at", "source")
FIELDS = (*REQUIRED, "external_id", *OPTIONAL, "inclusion")


# A shared encoder: json.dumps with options would create one per text.
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


def text_body(text: Prompt) -> str:
    """Return a prompt or completion as one JSON text, as the store keeps it."""
    return _encode(prompt_json(text))


def digest(*parts: object) -> bytes:
    """Return 16 bytes that identify the parts."""
    return hashlib.sha256(_encode(parts).encode()).digest()[:16]


@dataclass(frozen=True, slots=True)
class Judgment:
    """A human's dated verdict between two completions of one prompt.

    Attributes
    ----------
    prompt : str or tuple of Message
        The prompt.
    first, second : str
        The completions as shown to the annotator; the left or upper one is first.
    outcome : str
        ``"first"``, ``"second"`` or ``"tie"``; ``"retracted"`` in a retraction, which takes back
        the judgment that it corrects and is no verdict itself.
    annotator : str
        Name of the annotator.
    judged_at : datetime
        Time of the judgment, with a time zone; stored in UTC.
    source : str
        Origin of the judgment: a project, a file, a tool.
    external_id : str
        Unique within the source. Default: derived from annotator, time, texts and `corrects`.
    batch : str, optional
        Annotation batch.
    policy : str, optional
        Version of the policy that wrote the completions.
    subset : str, optional
        Slice of the pair, such as a domain.
    strategy : str, optional
        How the pair was selected for judgment; requires `inclusion`.
    inclusion : float, optional
        Selection probability of the pair, in (0, 1].
    corrects : str, optional
        `id` of the judgment that this one replaces.
    id : str
        32 hexadecimal digits that identify all of the above; always computed.

    Raises
    ------
    DataError
        If a field is invalid; the message names it.
    """

    prompt: Prompt
    first: str
    second: str
    outcome: Outcome | Literal["retracted"]
    annotator: str
    judged_at: datetime
    source: str
    external_id: str = ""
    batch: str | None = None
    policy: str | None = None
    subset: str | None = None
    strategy: str | None = None
    inclusion: float | None = None
    corrects: str | None = None
    id: str = field(init=False, compare=False)
    _texts: tuple[bytes, bytes, bytes] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.outcome == RETRACTED:
            if self.corrects is None:
                raise DataError(
                    "`outcome` retracted needs `corrects`, the id of what is taken back"
                )
        elif self.outcome not in OUTCOMES:
            raise DataError(f"`outcome` must be first, second or tie, not {self.outcome!r}")
        _check_labels(self)
        _set(self, "judged_at", as_utc(self.judged_at))
        _set(self, "inclusion", _probability(self.inclusion, self.strategy))
        _set(self, "_texts", tuple(_text_digest(self, n) for n in ("prompt", "first", "second")))
        judged_at = self.judged_at.isoformat()
        texts = [part.hex() for part in self._texts]
        if not self.external_id:
            derived = digest(self.annotator, judged_at, texts, self.corrects).hex()
            _set(self, "external_id", f"derived:{derived}")
        rest = (
            self.outcome,
            self.annotator,
            judged_at,
            self.source,
            self.external_id,
            self.inclusion,
        )
        id_ = digest(texts, rest, [getattr(self, name) for name in OPTIONAL])
        _set(self, "id", id_.hex())

    @property
    def text_digests(self) -> tuple[bytes, bytes, bytes]:
        """Digests of prompt, first and second, 16 bytes each."""
        return self._texts

    @property
    def prompt_digest(self) -> bytes:
        """`prompt_key` as 16 bytes: a text and a single user message with it are one prompt."""
        turns = self.prompt
        if isinstance(turns, str) or len(turns) > 1:
            return self._texts[0]
        return bytes.fromhex(prompt_key(turns))

    @property
    def pair_digest(self) -> bytes:
        """Digest of the pair, independent of the order of its sides, 16 bytes."""
        # Sorted, so that a pair shown in the other order has the same digest.
        sides = sorted(self._texts[1:])
        return hashlib.sha256(b"".join((self.prompt_digest, *sides))).digest()[:16]

    @property
    def identity(self) -> Identity:
        """What a correction of this judgment must keep."""
        return Identity(self.annotator, self.prompt_digest, self.pair_digest, self.judged_at)

    @property
    def is_retraction(self) -> bool:
        """Whether it takes back a judgment and has no verdict itself."""
        return self.outcome == RETRACTED

    def retracted(self, *, judged_at: datetime, **changes: Any) -> Judgment:
        """Return a retraction of this judgment, after which none of its verdicts counts.

        Parameters
        ----------
        judged_at : datetime
            Time of the retraction.
        **changes
            As in `corrected`, which also states the errors.

        Returns
        -------
        Judgment
            Its outcome is ``"retracted"``. It can be corrected in turn, which restores a verdict.
        """
        return self.corrected("retracted", judged_at=judged_at, **changes)

    def corrected(
        self, outcome: Outcome | Literal["retracted"], *, judged_at: datetime, **changes: Any
    ) -> Judgment:
        """Return a new judgment that replaces this one.

        Parameters
        ----------
        outcome : str
            The corrected verdict; ``"retracted"`` for none.
        judged_at : datetime
            Time of the correction.
        **changes
            Other fields that differ; by default the external id is derived.

        Returns
        -------
        Judgment
            Its `corrects` is this one's `id`.

        Raises
        ------
        DataError
            If it has another annotator, prompt or pair, or is dated before this one.
        """
        # Empty: the old external id belongs to the judgment that is corrected.
        changes = {"external_id": "", **changes}
        new = replace(self, outcome=outcome, judged_at=judged_at, corrects=self.id, **changes)
        if (problem := changed_identity(new.identity, self.identity)) is not None:
            raise DataError(f"`corrects` {self.id}: {problem}")
        return new

    def to_json(self) -> dict[str, Any]:
        """Return a row from which `from_json` restores an equal judgment."""
        row = {"id": self.id} | {name: getattr(self, name) for name in FIELDS}
        row["prompt"] = prompt_json(self.prompt)
        row["judged_at"] = self.judged_at.isoformat().replace("+00:00", "Z")
        return {name: value for name, value in row.items() if value is not None}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], *, assume_utc: bool = False) -> Judgment:
        """Read a row of `to_json`, or one without optional fields.

        Parameters
        ----------
        row : mapping
            Field names to values; others are ignored.
        assume_utc : bool
            Read a time without an offset as UTC instead of refusing it.

        Returns
        -------
        Judgment

        Raises
        ------
        DataError
            If a field is missing or invalid, or the row's `id` does not match its content.
        """
        for name in REQUIRED:
            if row.get(name) is None:
                raise DataError(f"needs `{name}`; has {sorted(row)}")
        given = {name: row[name] for name in FIELDS if row.get(name) is not None}
        given["prompt"] = as_prompt(row["prompt"])
        given["judged_at"] = parse_time(row["judged_at"], assume_utc=assume_utc)
        judgment = cls(**given)
        if row.get("id") not in (None, judgment.id):
            raise DataError(
                f"`id` {row['id']!r} does not match this row's content ({judgment.id}): the row "
                "was changed; add a correction with `corrects`, or leave `id` out"
            )
        return judgment


class Identity(NamedTuple):
    """What a correction may not change, and the time that it may not precede.

    Attributes
    ----------
    annotator : str
    prompt, pair : bytes
        Digests, as in `Judgment.prompt_digest` and `Judgment.pair_digest`.
    judged_at : datetime
    """

    annotator: str
    prompt: bytes
    pair: bytes
    judged_at: datetime


def changed_identity(new: Identity, old: Identity) -> str | None:
    """Return what a correction may not change but does, and the remedy; None if it is valid.

    A correction hides the judgment that it names. If it could name another annotator or pair,
    adding it would remove a verdict that its annotator never took back.
    """
    if new.annotator != old.annotator:
        changed = f"the correction is by annotator {new.annotator!r}, the judgment by "
        return f"{changed}{old.annotator!r}; add a judgment of its own without `corrects`"
    for name, mine, theirs in (
        ("prompt", new.prompt, old.prompt),
        ("pair of completions", new.pair, old.pair),
    ):
        if mine != theirs:
            return (
                f"the correction has another {name} than the judgment; add a judgment of its own "
                "without `corrects`"
            )
    if new.judged_at < old.judged_at:
        return (
            f"the correction is dated {new.judged_at.isoformat()}, before the judgment "
            f"({old.judged_at.isoformat()}); date it when the annotator changed the verdict"
        )
    return None


class Verdict(NamedTuple):
    """A judgment without its texts, for counting.

    Attributes
    ----------
    pair, prompt : bytes
        Digests of the pair, independent of the order of its sides, and of its prompt.
    annotator : str
    outcome : str
        For the sides as shown.
    flipped : bool
        Whether the side with the lower digest was shown second.
    equal : bool
        Whether the two completions are the same text.
    """

    pair: bytes
    prompt: bytes
    annotator: str
    outcome: str
    flipped: bool
    equal: bool = False


def _set(judgment: Judgment, name: str, value: object) -> None:
    object.__setattr__(judgment, name, value)


def _check_labels(judgment: Judgment) -> None:
    """Refuse labels that a database could not store or index."""
    for name in ("annotator", "source", "external_id", *OPTIONAL):
        value = getattr(judgment, name)
        if value is None and name in OPTIONAL:
            continue
        if not isinstance(value, str):
            raise DataError(f"`{name}` must be text, not {value!r}")
        if not value and name != "external_id":
            raise DataError(f"`{name}` is empty; give a value, or leave it out if it is optional")
        # NUL: PostgreSQL text cannot contain it.
        if "\0" in value or len(_encoded(name, value)) > LABEL_BYTES:
            raise DataError(
                f"`{name}` has NUL or more than {LABEL_BYTES} bytes: {value[:60]!r}; shorten it"
            )
    corrects = judgment.corrects
    if corrects is not None and not (len(corrects) == 32 and _is_hex(corrects)):
        raise DataError(f"`corrects` must be a judgment's id, 32 hex digits, not {corrects!r}")


def _is_hex(text: str) -> bool:
    return set(text) <= set("0123456789abcdef")


def _encoded(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"`{name}` is not valid Unicode at character {error.start}; replace the lone surrogate"
        ) from None


def _text_digest(judgment: Judgment, name: str) -> bytes:
    text = getattr(judgment, name)
    if name == "prompt":
        if not isinstance(text, (str, tuple)) or not text:
            raise DataError(f"`prompt` must be text or messages, and not empty: {text!r}")
        if isinstance(text, tuple) and not all(isinstance(turn, Message) for turn in text):
            raise DataError("`prompt` must be text or a tuple of Message; see as_prompt")
    elif not isinstance(text, str):
        raise DataError(f"`{name}` must be text, not {type(text).__name__}")
    return hashlib.sha256(_encoded(name, text_body(text))).digest()[:16]


def _probability(value: object, strategy: str | None) -> float | None:
    if value is None:
        if strategy is not None:
            raise DataError(
                f"`strategy` {strategy!r} needs `inclusion`, the probability with which the pair "
                "was selected: without it the judgment would count as drawn at random"
            )
        return None
    # A bool is an int in Python, and True would count as a probability of 1.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise DataError(f"`inclusion` must be in (0, 1], not {value!r}")
    return float(value)


def as_utc(value: object) -> datetime:
    """Return a time in UTC.

    Raises
    ------
    DataError
        If it has no time zone, or is outside the calendar in UTC.
    """
    if not isinstance(value, datetime):
        raise DataError(f"a time must be a datetime, not {value!r}")
    if value.utcoffset() is None:
        raise DataError(
            f"{value.isoformat()!r} has no time zone; state its offset, e.g. …+00:00 or …Z for UTC"
        )
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise DataError(f"{value.isoformat()!r} is outside the calendar in UTC") from None


def parse_time(value: object, *, assume_utc: bool = False) -> datetime:
    """Read ISO 8601 with an offset, or a datetime with a time zone.

    Raises
    ------
    DataError
        If it is neither, or has no offset and `assume_utc` is not set.
    """
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise DataError(
                f"`judged_at` must be ISO 8601, e.g. 2026-11-25T12:00:00Z, not {value!r}"
            ) from None
    if assume_utc and isinstance(value, datetime) and value.utcoffset() is None:
        value = value.replace(tzinfo=UTC)
    return as_utc(value)
