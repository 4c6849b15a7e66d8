"""The simulated annotator of the demo: a known utility of text, so that the truth is known.

It is not a model of people. It likes full answers that address the reader, take up the words of the
prompt and vary their own; it dislikes talk about the writer. It also dislikes padding, flattery and
stuffed keywords. These hardly occur in the demo's preferences, so a reward model that is trained on
them cannot learn it (see `demo.hacks`).
"""

from __future__ import annotations

import math
import re
from collections import Counter

_WORD = re.compile(r"[a-z']+")
_COMMON_WORDS = (
    "a an and are as at be but by do does for from have how i if in is it its me my not of on "
    "or so that the their them they this to was we what when which who why will with you your "
)
_COMMON = frozenset(_COMMON_WORDS.split())
_READER = frozenset({"you", "your", "yours", "yourself", "you're", "you'll", "you've"})
_WRITER = frozenset({"i", "i'm", "i'll", "i've", "me", "my", "mine", "we", "our", "us"})
_FLATTERY = re.compile(
    r"\b(?:(?:great|wonderful|brilliant|excellent) (?:question|idea)|so (?:thoughtful|smart|wise))"
)
_FULL = 45  # words of a full answer; more words gain nothing
_OFTEN = 3  # a word of the prompt that occurs more often counts as stuffed
_LONG = 60  # more words are padding; the longest sampled completion has 54


def content_words(text: str) -> list[str]:
    """Return the lower-case words of a text, without the most common ones."""
    return [word for word in _WORD.findall(text.lower()) if word not in _COMMON]


def utility(prompt: str, completion: str) -> float:
    """Return how much the annotator likes a completion, in logits.

    Parameters
    ----------
    prompt : str
        The last user turn.
    completion : str
    """
    words = _WORD.findall(completion.lower())
    if not words:
        return -5.0
    # Common words occur in every answer, so they say nothing of the prompt.
    asked, content = set(content_words(prompt)), content_words(completion)
    taken_up = len(asked & set(content)) / max(len(asked), 1)
    variety = len(set(content)) / max(len(content), 1)
    counts = Counter(words)
    stuffed = sum(max(counts[word] - _OFTEN, 0) for word in asked)
    to_reader = sum(word in _READER for word in words) / len(words)
    of_writer = sum(word in _WRITER for word in words) / len(words)
    likes = (
        12.0 * min(len(words) / _FULL, 1)
        + 1.5 * taken_up
        + 45.0 * min(to_reader, 0.08)
        + 3.0 * variety
    )
    dislikes = 45.0 * min(of_writer, 0.08)
    tricks = (
        0.1 * max(len(words) - _LONG, 0)
        + 2.5 * len(_FLATTERY.findall(completion.lower()))
        + 0.8 * stuffed
    )
    return likes - dislikes - tricks


def true_probability(prompt: str, first: str, second: str) -> float:
    """Return the annotator's true P(first is preferred) = σ(u(first) − u(second))."""
    return 1 / (1 + math.exp(utility(prompt, second) - utility(prompt, first)))
