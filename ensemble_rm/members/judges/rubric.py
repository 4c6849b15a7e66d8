"""What a judge is asked, as data: a JSON file with places for the texts.

A text cannot end its own place: the lines around it bear a digest of all texts of the question,
which a text would have to contain, and so to know, itself. What looks like a chat template's
control token is broken up, since a server would take it for one. Knows texts; knows nothing of
servers or of scores.
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
from ensemble_rm.errors import OptionError
from ensemble_rm.members.encoding import flatten

RubricKind: TypeAlias = Literal["pairwise", "pointwise"]

FOLDER = Path(__file__).with_name("rubrics")
SHIPPED = ("pairwise", "pairwise_ties", "pointwise")
"""Names of the rubrics that come with the library."""

_FORMAT = 1
_PLACE = re.compile(r"\{(prompt|first|second|completion|nonce)\}")
_TEXTS = {"pairwise": ("prompt", "first", "second"), "pointwise": ("prompt", "completion")}
_TITLES = {"prompt": "request", "first": "answer A", "second": "answer B", "completion": "answer"}
# Of ChatML, Llama, Mistral, Gemma, DeepSeek, Phi and their relatives.
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
        For provenance.
    kind : {"pairwise", "pointwise"}
        Whether two answers are compared or one is rated.
    system, user : str
        The two messages, with the places ``{prompt}``, ``{first}`` and ``{second}``, or
        ``{prompt}`` and ``{completion}``, each once in `user`, and ``{nonce}``, the digest in the
        lines around each text, wherever it helps.
    verdicts : tuple of str
        Pairwise: the words for the first, for the second and, where a tie may be stored, for it.
    scale : tuple of int
        Pointwise: the lowest and the highest rating.
    after : str, optional
        The verdict stands behind the last of these, for judges that reason first.
    max_tokens : int
        Most tokens of a reply.

    Raises
    ------
    OptionError
        If a place is missing or repeated, or another part cannot be used.
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
        places = [m for m in _PLACE.findall(self.user) if m != "nonce"]
        if sorted(places) != sorted(_TEXTS[self.kind]):
            raise OptionError(
                f"rubric {self.name!r}: `user` must hold each of {_TEXTS[self.kind]} once, in "
                f"braces, and holds {places}"
            )
        if set(_PLACE.findall(self.system)) - {"nonce"}:
            raise OptionError(f"rubric {self.name!r}: texts stand in `user`, not in `system`")
        if self.kind == "pairwise" and not (
            len(self.verdicts) in (2, 3)
            and len(set(self.verdicts)) == len(self.verdicts)
            and all(re.fullmatch(r"\w+", word) for word in self.verdicts)
        ):
            raise OptionError(
                f"rubric {self.name!r}: verdicts must be two or three different words without "
                f"blanks, not {self.verdicts}"
            )
        low, high = self.scale
        if not 0 <= low < high:
            raise OptionError(f"rubric {self.name!r}: scale must rise from 0 or more: {self.scale}")
        after: object = self.after  # a file may hold anything
        if after is not None and (not isinstance(after, str) or after == ""):
            raise OptionError(
                f"rubric {self.name!r}: `after` must be a text that is not empty, not "
                f"{after!r}; leave it out where the verdict stands first"
            )
        if self.max_tokens < 1:
            raise OptionError(f"rubric {self.name!r}: max_tokens must be at least 1")

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
        places = {name: _fenced(_TITLES[name], text, nonce) for name, text in filled.items()}
        places["nonce"] = nonce
        # One pass: what stands in a text is never taken for a place.
        fill = lambda match: places[match.group(1)]  # noqa: E731
        return [
            {"role": "system", "content": _PLACE.sub(fill, self.system)},
            {"role": "user", "content": _PLACE.sub(fill, self.user)},
        ]

    def to_json(self) -> dict[str, Any]:
        """Return what `read_rubric` reads."""
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
        The name of a shipped one, a JSON file, or its content.

    Returns
    -------
    Rubric

    Raises
    ------
    OptionError
        If there is none, or it cannot be used.
    """
    if isinstance(source, Rubric):
        return source
    if isinstance(source, Mapping):
        return _from_json(source, "the rubric")
    path = FOLDER / f"{source}.json" if source in SHIPPED else Path(source).expanduser()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(
            f"no rubric {str(source)!r} ({error.strerror}): name a JSON file or one of "
            f"{', '.join(SHIPPED)}"
        ) from error
    except ValueError as error:
        raise OptionError(f"{path} is no JSON: {error}") from error
    return _from_json(stored, str(path))


def _from_json(stored: object, source: str) -> Rubric:
    if not isinstance(stored, Mapping) or stored.get("format") != _FORMAT:
        raise OptionError(f"{source} is no rubric of format {_FORMAT}")
    try:
        options: dict[str, Any] = {}
        if stored["kind"] == "pairwise":
            verdicts = stored["verdicts"]
            words = [verdicts["first"], verdicts["second"]]
            if None in words:
                raise OptionError(
                    f"{source}: of the verdicts only `tie` may be null, and first and second are "
                    f"{words}"
                )
            if verdicts.get("tie") is not None:
                words.append(verdicts["tie"])
            options["verdicts"] = tuple(map(str, words))
        else:
            low, high = stored["scale"]
            options["scale"] = (int(low), int(high))
        return Rubric(
            name=str(stored["name"]),
            kind=stored["kind"],
            system=str(stored["system"]),
            user=str(stored["user"]),
            after=stored.get("after"),
            max_tokens=int(stored.get("max_tokens", 8)),
            **options,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{source} is no rubric: {error!r}") from error


def _broken(match: re.Match[str]) -> str:
    """Put a blank behind a control token's first character: it can be read, and is no token."""
    return f"{match.group(0)[0]} {match.group(0)[1:]}"


def _fenced(title: str, text: str, nonce: str) -> str:
    return f"<<<begin {title} {nonce}>>>\n{text}\n<<<end {title} {nonce}>>>"


def _nonce(texts: Mapping[str, str]) -> str:
    """Digest the texts, whichever side they stand on, so that both orders ask alike."""
    whole = json.dumps(sorted(texts.values())).encode()
    for salt in range(2**16):
        nonce = hashlib.sha256(salt.to_bytes(2, "big") + whole).hexdigest()[:16]
        if not any(nonce in text for text in texts.values()):
            return nonce
    raise AssertionError("no digest that the texts do not contain")
