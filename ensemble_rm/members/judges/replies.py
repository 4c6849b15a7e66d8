"""Reads probabilities of the verdicts, or a rating, from a judge's reply.

Log-probabilities are used if the server returns them, else the words.

Pure functions of one choice of a chat completion. A reply without a readable verdict is an error,
never a tie.

References
----------
.. [1] Liu et al. 2023, arXiv 2303.16634 (G-Eval): the expectation over rating tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ensemble_rm.errors import RemoteAnswerError

Source: TypeAlias = Literal["logprobs", "words"]

COVERAGE = 0.5
"""Minimum total probability of the rating tokens for their expectation to be the rating."""

_TRIMMED = " \t\r\n*\"'`.()[]{}:"
_SMALLEST = 1e-9  # a verdict's probability is at least this, so that its logarithm is finite
_LEAST = -700  # log-probabilities are clipped here: exp underflows below


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of one reply on two answers, in the order in which they were shown.

    Attributes
    ----------
    probabilities : tuple of float
        One per verdict of the rubric, summing to 1; from words, 1 for the verdict in the reply.
    source : {"logprobs", "words"}
    """

    probabilities: tuple[float, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class Rating:
    """The rating in one reply.

    Attributes
    ----------
    value : float
        On the rubric's scale.
    source : {"logprobs", "words"}
    """

    value: float
    source: Source


@dataclass(frozen=True, slots=True)
class Position:
    """One token of a reply and its alternatives.

    Attributes
    ----------
    text : str
        Text of the token.
    options : dict of str to float
        Probability of each token that the server lists, including the chosen one.
    """

    text: str
    options: dict[str, float]


def read_verdict(
    choice: Mapping[str, Any], words: Sequence[str], after: str | None
) -> Verdict | RemoteAnswerError:
    """Read a pairwise reply.

    Parameters
    ----------
    choice : mapping
        Choice of a chat completion.
    words : sequence of str
        The rubric's verdicts.
    after : str, optional
        The verdict follows the last occurrence of this text.

    Returns
    -------
    Verdict or RemoteAnswerError
        The error states why there is no verdict.
    """
    text = _text(choice, after)
    if text is None:
        return RemoteAnswerError(f"no verdict after {after!r} in {_shown(choice)}")
    word, rest = _first_word(text)
    if word not in words:
        return RemoteAnswerError(f"the reply {_shown(choice)} is not one of {', '.join(words)}")
    other, _ = _first_word(re.sub(r"^\W+", "", rest))
    if other in words and other != word:
        return RemoteAnswerError(f"the reply {_shown(choice)} names both {word} and {other}")
    for position in _positions(choice, after):
        if _trim(position.text) == word and _probabilities(position, word):
            masses = [_mass(position, verdict) for verdict in words]
            total = sum(masses)
            return Verdict(tuple(mass / total for mass in masses), "logprobs")
        if position.text.strip(_TRIMMED):
            break  # the word has several tokens, or the server does not list its probability
    return Verdict(tuple(float(verdict == word) for verdict in words), "words")


def read_rating(
    choice: Mapping[str, Any], scale: tuple[int, int], after: str | None
) -> Rating | RemoteAnswerError:
    """Read a pointwise reply: the expectation over the ratings' tokens [1]_, else the number.

    Returns
    -------
    Rating or RemoteAnswerError
        The error states why there is no rating.
    """
    text = _text(choice, after)
    if text is None:
        return RemoteAnswerError(f"no rating after {after!r} in {_shown(choice)}")
    # "7", "7.5" or "7/10", and no other word right behind the number, such as "7th".
    match = re.match(r"(\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?(?![\w.]*\w)", text.lstrip(_TRIMMED))
    low, high = scale
    if match is None or (match[2] is not None and float(match[2]) != high):
        return RemoteAnswerError(f"the reply {_shown(choice)} is not a number from {low} to {high}")
    value = float(match[1])
    if not low <= value <= high:
        return RemoteAnswerError(f"the rating {value:g} is not between {low} and {high}")
    expected = _expectation(_positions(choice, after), scale, match[1])
    return Rating(value, "words") if expected is None else Rating(expected, "logprobs")


def _expectation(
    positions: Sequence[Position], scale: tuple[int, int], number: str
) -> float | None:
    """Return Σ v·P(v)/Σ P(v) over the whole numbers of the scale.

    None if their total probability is below `COVERAGE`, if the first token is not the beginning of
    `number`, the rating in the reply, or if `number` has a fraction, which no single token spells.

    If the tokenizer splits 10 into "1" and "0", the probability of the token "1" is that of 1 and
    10 together. The next token's probabilities divide it, if the reply has a "1" there; otherwise
    the next token is unknown, and both are left out.
    """
    at = next((i for i, token in enumerate(positions) if token.text.strip(_TRIMMED)), None)
    if at is None or "." in number:
        return None
    digits = _trim(positions[at].text)
    if not (digits.isdigit() and number.startswith(digits)):
        return None
    position = positions[at]
    low, high = scale
    values = range(low, high + 1)
    mass = {value: sum(_probabilities(position, str(value))) for value in values}
    for value in values:
        longer = [v for v in values if v > 9 and str(v).startswith(str(value)) and v != value]
        if not longer or any(_probabilities(position, str(v)) for v in longer):
            continue  # no number extends this one, or the tokenizer has tokens for those that do
        if _trim(position.text) != str(value) or at + 1 >= len(positions):
            complete = _trim(position.text) == str(value)  # the reply ends with this token
            mass[value] = mass[value] if complete else 0.0
            continue
        following = positions[at + 1]
        for v in longer:
            share = sum(_probabilities(following, str(v)[len(str(value)) :]))
            mass[v] = mass[value] * share
        mass[value] = max(mass[value] - sum(mass[v] for v in longer), 0.0)
    total = sum(mass.values())
    if total < COVERAGE:
        return None
    return min(max(sum(value * p for value, p in mass.items()) / total, low), high)


def _mass(position: Position, word: str) -> float:
    """Return a word's probability; if the server does not list it, an upper bound.

    The server lists the most probable tokens: any other has no more than the least of these, and
    no more than the rest.
    """
    listed = _probabilities(position, word)
    if listed:
        return max(sum(listed), _SMALLEST)
    rest = 1.0 - sum(position.options.values())
    return max(min(rest, *position.options.values()), _SMALLEST)


def _probabilities(position: Position, word: str) -> list[float]:
    """Return the probabilities of all spellings of a word, such as with a space before it."""
    return [p for token, p in position.options.items() if _trim(token) == word]


def _trim(token: str) -> str:
    return token.strip(_TRIMMED)


def _text(choice: Mapping[str, Any], after: str | None) -> str | None:
    """Return the reply's text behind the last `after`; None if `after` is missing."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else None
    text = text if isinstance(text, str) else ""
    if after is None:
        return text
    return text.rpartition(after)[2] if after in text else None


def _first_word(text: str) -> tuple[str, str]:
    """Return the first word and the rest; "" if a sentence begins with the word.

    The word must be followed by punctuation, a line break or the end: "A is better" has no verdict
    as its first word, since "A" may be an article.
    """
    text = text.lstrip(_TRIMMED)
    match = re.match(r"(\w+)(?=$|[^\w\s]|\s*$|\s*\n)", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _positions(choice: Mapping[str, Any], after: str | None) -> list[Position]:
    """Return the tokens after the last `after`; empty without log-probabilities."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list):
        return []
    positions = [_position(entry) for entry in content if isinstance(entry, Mapping)]
    if after is None:
        return positions
    text = "".join(position.text for position in positions)
    start, end = text.rfind(after) + len(after), 0
    for i, position in enumerate(positions):
        end += len(position.text)
        # A token may span the end of `after`; it counts if it has text, not only spaces, behind.
        if after in text and end > start and text[start:end].strip():
            return positions[i:]
    return []


def _position(entry: Mapping[str, Any]) -> Position:
    listed = entry.get("top_logprobs")
    options: dict[str, float] = {}
    for option in [entry, *(listed if isinstance(listed, list) else [])]:
        if not isinstance(option, Mapping):
            continue
        token, logprob = option.get("token"), option.get("logprob")
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            continue
        # Rounding may make a log-probability slightly positive; anything more is not one.
        if isinstance(token, str) and logprob <= 1e-3:
            options[token] = math.exp(max(min(logprob, 0), _LEAST))
    text = entry.get("token")
    return Position(text if isinstance(text, str) else "", options)


def _shown(choice: Mapping[str, Any]) -> str:
    return repr((_text(choice, None) or "")[:80])
