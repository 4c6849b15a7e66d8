"""A judge's reply → probabilities of its verdicts, or a rating; from log-probabilities, or words.

Pure functions over one choice of a chat completion. A reply in which no verdict can be read is a
reason, never a tie.

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
"""The least mass of the rating tokens at which their expectation is taken for the rating."""

_TRIMMED = " \t\r\n*\"'`.()[]{}:"
_SMALLEST = 1e-9
_LEAST = -700  # a log-probability below which exp is nought for all purposes


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one reply says of two answers, in the order in which they stood.

    Attributes
    ----------
    probabilities : tuple of float
        Of the rubric's verdicts, summing to 1; from words, 1 for the one that was said.
    source : {"logprobs", "words"}
    """

    probabilities: tuple[float, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class Rating:
    """What one reply says of one answer.

    Attributes
    ----------
    value : float
        On the rubric's scale.
    source : {"logprobs", "words"}
    """

    value: float
    source: Source


@dataclass(frozen=True, slots=True)
class Place:
    """One token of a reply: what else could have stood there.

    Attributes
    ----------
    text : str
        The token's.
    options : dict of str to float
        Probability of each token that the server names, the chosen one among them.
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
        Of a chat completion.
    words : sequence of str
        The rubric's verdicts.
    after : str, optional
        The verdict stands behind the last of these.

    Returns
    -------
    Verdict or RemoteAnswerError
        The error says why there is none.
    """
    said = _said(choice, after)
    if said is None:
        return RemoteAnswerError(f"no verdict behind {after!r} in {_shown(choice)}")
    word, rest = _first_word(said)
    if word not in words:
        return RemoteAnswerError(f"the reply {_shown(choice)} is none of {', '.join(words)}")
    other, _ = _first_word(re.sub(r"^\W+", "", rest))
    if other in words and other != word:
        return RemoteAnswerError(f"the reply {_shown(choice)} names both {word} and {other}")
    for place in _places(choice, after):
        if _trim(place.text) == word and _of(place, word):
            masses = [_mass(place, one) for one in words]
            total = sum(masses)
            return Verdict(tuple(mass / total for mass in masses), "logprobs")
        if place.text.strip(_TRIMMED):
            break  # the word is spelt in several tokens, or its own probability is not named
    return Verdict(tuple(float(one == word) for one in words), "words")


def read_rating(
    choice: Mapping[str, Any], scale: tuple[int, int], after: str | None
) -> Rating | RemoteAnswerError:
    """Read a pointwise reply: the expectation over the ratings' tokens [1]_, else the number.

    Returns
    -------
    Rating or RemoteAnswerError
        The error says why there is none.
    """
    said = _said(choice, after)
    if said is None:
        return RemoteAnswerError(f"no rating behind {after!r} in {_shown(choice)}")
    found = re.match(r"(\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?(?![\w.]*\w)", said.lstrip(_TRIMMED))
    low, high = scale
    if found is None or (found[2] is not None and float(found[2]) != high):
        return RemoteAnswerError(f"the reply {_shown(choice)} is no number from {low} to {high}")
    value = float(found[1])
    if not low <= value <= high:
        return RemoteAnswerError(f"the rating {value:g} does not lie from {low} to {high}")
    expected = _expectation(_places(choice, after), scale, found[1])
    return Rating(value, "words") if expected is None else Rating(expected, "logprobs")


def _expectation(places: Sequence[Place], scale: tuple[int, int], said: str) -> float | None:
    """Return Σ v·P(v)/Σ P(v) over whole numbers; None where too little mass is on them.

    None, too, where the first digits are not those of the number that was `said`, or it has a
    fraction, which is on no whole number's token.

    Where a tokenizer spells 10 as 1 and 0, the mass of "1" is that of 1 and of 10: what follows
    the "1" that was chosen parts the two, and where another token was chosen it is left out.
    """
    at = next((i for i, place in enumerate(places) if place.text.strip(_TRIMMED)), None)
    if at is None or "." in said:
        return None
    digits = _trim(places[at].text)
    if not (digits.isdigit() and said.startswith(digits)):
        return None
    place = places[at]
    low, high = scale
    values = range(low, high + 1)
    mass = {value: sum(_of(place, str(value))) for value in values}
    for value in values:
        longer = [v for v in values if v > 9 and str(v).startswith(str(value)) and v != value]
        if not longer or any(_of(place, str(v)) for v in longer):
            continue  # none is longer, or the tokenizer knows the longer ones as tokens
        if _trim(place.text) != str(value) or at + 1 >= len(places):
            chosen = _trim(place.text) == str(value)  # and the reply ends behind it
            mass[value] = mass[value] if chosen else 0.0
            continue
        follows = places[at + 1]
        for v in longer:
            share = sum(_of(follows, str(v)[len(str(value)) :]))
            mass[v] = mass[value] * share
        mass[value] = max(mass[value] - sum(mass[v] for v in longer), 0.0)
    total = sum(mass.values())
    if total < COVERAGE:
        return None
    return min(max(sum(value * p for value, p in mass.items()) / total, low), high)


def _mass(place: Place, word: str) -> float:
    """Return a word's probability; one that the server does not name has less than any it does."""
    found = _of(place, word)
    if found:
        return max(sum(found), _SMALLEST)
    rest = 1.0 - sum(place.options.values())
    return max(min(rest, *place.options.values()), _SMALLEST)


def _of(place: Place, word: str) -> list[float]:
    return [p for token, p in place.options.items() if _trim(token) == word]


def _trim(token: str) -> str:
    return token.strip(_TRIMMED)


def _said(choice: Mapping[str, Any], after: str | None) -> str | None:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else None
    text = text if isinstance(text, str) else ""
    if after is None:
        return text
    return text.rpartition(after)[2] if after in text else None


def _first_word(text: str) -> tuple[str, str]:
    """Return what a reply begins with, where it is one word or ends behind it, and the rest."""
    text = text.lstrip(_TRIMMED)
    found = re.match(r"(\w+)(?=$|[^\w\s]|\s*$|\s*\n)", text)
    return (found[1], text[found.end() :]) if found else ("", text)


def _places(choice: Mapping[str, Any], after: str | None) -> list[Place]:
    """Return the reply's tokens, from the last `after` on; none without log-probabilities."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list):
        return []
    places = [_place(entry) for entry in content if isinstance(entry, Mapping)]
    if after is None:
        return places
    text = "".join(place.text for place in places)
    start, seen = text.rfind(after) + len(after), 0
    for i, place in enumerate(places):
        seen += len(place.text)
        # A token may begin with the blank that `after` ends in; it counts by what is behind it.
        if after in text and seen > start and text[start:seen].strip():
            return places[i:]
    return []


def _place(entry: Mapping[str, Any]) -> Place:
    named = entry.get("top_logprobs")
    options: dict[str, float] = {}
    for one in [entry, *(named if isinstance(named, list) else [])]:
        if not isinstance(one, Mapping):
            continue
        token, logprob = one.get("token"), one.get("logprob")
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            continue
        if isinstance(token, str) and logprob <= 1e-3:
            options[token] = math.exp(max(min(logprob, 0), _LEAST))
    text = entry.get("token")
    return Place(text if isinstance(text, str) else "", options)


def _shown(choice: Mapping[str, Any]) -> str:
    return repr((_said(choice, None) or "")[:80])
