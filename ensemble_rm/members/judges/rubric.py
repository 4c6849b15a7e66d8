"""Rubrics: the question to a judge as a JSON file with placeholders for the texts.

Texts are untrusted and may try to give the judge instructions. Each text is fenced by lines that
contain a digest of all texts of the question, so a text cannot forge the end of its fence: it would
have to contain a digest of itself. Control tokens of chat templates are broken up, since a server
would parse them. Must not know servers or scores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ensemble_rm.data.samples import Prompt
from ensemble_rm.errors import OptionError, SchemaError
from ensemble_rm.members.encoding import flatten
from ensemble_rm.saved_json import from_row, parse_json

RubricKind: TypeAlias = Literal["pairwise", "pointwise"]

FOLDER = Path(__file__).with_name("rubrics")
SHIPPED = ("pairwise", "pairwise_ties", "pointwise")
"""Names of the rubrics of this library."""

_FORMAT = 1
_PLACEHOLDER = re.compile(r"\{(prompt|first|second|completion|nonce)\}")
_TEXTS = {"pairwise": ("prompt", "first", "second"), "pointwise": ("prompt", "completion")}
_TITLES = {"prompt": "request", "first": "answer A", "second": "answer B", "completion": "answer"}
# Control tokens of ChatML, Llama, Mistral, Gemma, DeepSeek, Phi and related templates.
_CONTROL = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|</?s>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]"
    r"|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|</?think>"
)


@dataclass(frozen=True)
class Rubric:
    """A question to a judge.

    Attributes
    ----------
    name : str
        Name in reports and provenance.
    kind : {"pairwise", "pointwise"}
        Whether the judge compares two answers or rates one.
    system, user : str
        The two messages. `user` contains the placeholders ``{prompt}``, ``{first}`` and
        ``{second}``, or ``{prompt}`` and ``{completion}``, each once. Both messages may contain
        ``{nonce}``, the digest in the fence of each text.
    verdicts : tuple of str
        Pairwise: the words for first, second and, if ties are allowed, tie.
    scale : tuple of int
        Pointwise: the lowest and the highest rating.
    after : str, optional
        The verdict follows the last occurrence of this text, for judges that reason first.
    max_tokens : int
        Maximum tokens of a reply.

    Raises
    ------
    OptionError
        If a placeholder is missing or repeated, or another field is invalid.
    """

    name: str
    kind: RubricKind
    system: str
    user: str
    verdicts: tuple[str, ...] = ()
    scale: tuple[int, int] = (1, 10)
    after: str | None = None
    max_tokens: int = 8

    def __post_init__(self) -> None:
        if self.kind not in _TEXTS:
            raise OptionError(f"a rubric's kind must be pairwise or pointwise, not {self.kind!r}")
        placeholders = [m for m in _PLACEHOLDER.findall(self.user) if m != "nonce"]
        if sorted(placeholders) != sorted(_TEXTS[self.kind]):
            raise OptionError(
                f"rubric {self.name!r}: `user` must contain each of the placeholders "
                f"{_TEXTS[self.kind]} once, in braces; it contains {placeholders}"
            )
        if set(_PLACEHOLDER.findall(self.system)) - {"nonce"}:
            raise OptionError(
                f"rubric {self.name!r}: placeholders of texts belong in `user`, not in `system`"
            )
        if self.kind == "pairwise" and not (
            len(self.verdicts) in (2, 3)
            and len(set(self.verdicts)) == len(self.verdicts)
            and all(re.fullmatch(r"\w+", word) for word in self.verdicts)
        ):
            raise OptionError(
                f"rubric {self.name!r}: verdicts must be two or three different words without "
                f"spaces, not {self.verdicts}"
            )
        low, high = self.scale
        if not 0 <= low < high:
            raise OptionError(
                f"rubric {self.name!r}: scale must be (low, high) with 0 ≤ low < high, not "
                f"{self.scale}"
            )
        after: object = self.after  # a file may contain any type
        if after is not None and (not isinstance(after, str) or after == ""):
            raise OptionError(
                f"rubric {self.name!r}: `after` must be a nonempty text, not {after!r}; "
                "leave it out if the verdict comes first"
            )
        if self.max_tokens < 1:
            raise OptionError(
                f"rubric {self.name!r}: max_tokens must be at least 1, not {self.max_tokens}"
            )

    def ask(self, prompt: Prompt, **texts: str) -> list[dict[str, str]]:
        """Return the messages for one question.

        Parameters
        ----------
        prompt : str or tuple of Message
        **texts : str
            ``first`` and ``second``, or ``completion``.
        """
        filled = {"prompt": flatten(prompt, cue=False)} | texts
        filled = {name: _CONTROL.sub(_broken, text) for name, text in filled.items()}
        nonce = _nonce(filled)
        values = {name: _fenced(_TITLES[name], text, nonce) for name, text in filled.items()}
        values["nonce"] = nonce
        # In one pass, so that a placeholder inside a text is not filled.
        fill = lambda match: values[match.group(1)]  # noqa: E731
        return [
            {"role": "system", "content": _PLACEHOLDER.sub(fill, self.system)},
            {"role": "user", "content": _PLACEHOLDER.sub(fill, self.user)},
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the rubric as JSON values; `read_rubric` reads them."""
        stored: dict[str, Any] = {"format": _FORMAT, "name": self.name, "kind": self.kind}
        stored |= {"system": self.system, "user": self.user}
        if self.kind == "pairwise":
            names = ("first", "second", "tie")[: len(self.verdicts)]
            stored["verdicts"] = dict(zip(names, self.verdicts, strict=True))
        else:
            stored["scale"] = list(self.scale)
        return stored | {"after": self.after, "max_tokens": self.max_tokens}


def read_rubric(source: str | Path | Mapping[str, Any] | Rubric) -> Rubric:
    """Read a rubric.

    Parameters
    ----------
    source : str, Path, mapping or Rubric
        Name of a rubric of this library, a JSON file, or its content.

    Returns
    -------
    Rubric

    Raises
    ------
    OptionError
        If there is no such rubric, or it is invalid.
    """
    if isinstance(source, Rubric):
        return source
    if isinstance(source, Mapping):
        return _from_json(source, "the rubric")
    path = FOLDER / f"{source}.json" if source in SHIPPED else Path(source).expanduser()
    try:
        stored = parse_json(path.read_bytes())
    except OSError as error:
        raise OptionError(
            f"no rubric {str(source)!r} ({error.strerror}); name a JSON file or one of "
            f"{', '.join(SHIPPED)}"
        ) from error
    except SchemaError as error:
        raise OptionError(f"{path} is not a rubric: {error}") from error
    return _from_json(stored, str(path))


def _from_json(stored: object, source: str) -> Rubric:
    if not isinstance(stored, Mapping) or stored.get("format") != _FORMAT:
        raise OptionError(f'{source} is not a rubric: "format" must be {_FORMAT}')
    try:
        row = from_row(_RubricRow, stored)
        if (row.kind == "pairwise") != (row.verdicts is not None):
            raise SchemaError("belongs to every pairwise rubric, and to no other", field="verdicts")
        options: dict[str, Any] = {} if row.scale is None else {"scale": row.scale}
        if row.verdicts is not None:
            words = (row.verdicts.first, row.verdicts.second, row.verdicts.tie)
            options["verdicts"] = tuple(word for word in words if word is not None)
        return Rubric(
            name=row.name,
            kind=row.kind,
            system=row.system,
            user=row.user,
            after=row.after,
            max_tokens=row.max_tokens,
            **options,
        )
    except SchemaError as error:
        raise OptionError(f"{source} is not a valid rubric: {error}") from error


@dataclass(frozen=True, slots=True)
class _Verdicts:
    first: str
    second: str
    tie: str | None = None  # null: the judge must decide


@dataclass(frozen=True, slots=True)
class _RubricRow:
    """A rubric as JSON."""

    format: int
    name: str
    kind: RubricKind
    system: str
    user: str
    verdicts: _Verdicts | None = None
    scale: tuple[int, int] | None = None
    after: str | None = None
    max_tokens: int = 8


def _broken(match: re.Match[str]) -> str:
    """Put a space behind a control token's first character: readable, but no longer a token."""
    return f"{match.group(0)[0]} {match.group(0)[1:]}"


def _fenced(title: str, text: str, nonce: str) -> str:
    return f"<<<begin {title} {nonce}>>>\n{text}\n<<<end {title} {nonce}>>>"


def _nonce(texts: Mapping[str, str]) -> str:
    """Return a digest of the texts that none of them contains.

    It does not depend on their order, so that the two questions about a pair differ in nothing
    else.
    """
    whole = json.dumps(sorted(texts.values())).encode()
    for salt in range(2**16):
        nonce = hashlib.sha256(salt.to_bytes(2, "big") + whole).hexdigest()[:16]
        if not any(nonce in text for text in texts.values()):
            return nonce
    raise AssertionError("every digest tried is contained in a text")
