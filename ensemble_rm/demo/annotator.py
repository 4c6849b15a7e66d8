"""The simulated annotator of the demo: a known utility of text, so that the truth is known.

It is no human and does not claim to be one. It likes answers that take up the prompt's words, speak
to the reader and come to an end; it dislikes repetition and talk of the writer.
"""

from __future__ import annotations

import math
import re

_WORD = re.compile(r"[a-z']+")
_COMMON_WORDS = (
    "a an and are as at be but by do does for from have how i if in is it its me my not of on "
    "or so that the their them they this to was we what when which who why will with you your "
)
_COMMON = frozenset(_COMMON_WORDS.split())
_READER = frozenset({"you", "your", "yours", "you're", "you'll"})
_WRITER = frozenset({"i", "i'm", "i'll", "i've", "me", "my", "mine", "we", "our"})


def utility(prompt: str, completion: str) -> float:
    """Return how much the annotator likes a completion, in logits."""
    words = _WORD.findall(completion.lower())
    if not words:
        return -3.0
    asked = {w for w in _WORD.findall(prompt.lower()) if w not in _COMMON}
    content = [w for w in words if w not in _COMMON]
    taken_up = len(asked & set(content)) / max(len(asked), 1)
    variety = len(set(content)) / max(len(content), 1)
    to_you = sum(w in _READER for w in words) / len(words)
    of_me = sum(w in _WRITER for w in words) / len(words)
    finished = completion.rstrip().endswith((".", "!", "?"))
    return (
        4.0 * taken_up
        + 4.0 * (variety - 0.7)
        + 25.0 * min(to_you, 0.08)
        - 30.0 * min(of_me, 0.08)
        + 0.8 * finished
    )


def true_probability(prompt: str, first: str, second: str) -> float:
    """Return the annotator's true P(first is preferred) = σ(u(first) − u(second))."""
    return 1 / (1 + math.exp(utility(prompt, second) - utility(prompt, first)))
