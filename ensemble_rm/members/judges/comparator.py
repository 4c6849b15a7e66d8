r"""A judge model as a comparator: each pair in both orders, as a probability and not a word.

References
----------
.. [1] Zheng et al. 2024, arXiv 2309.03882: what a judge says is a prior of the place times what it
   thinks of the answer; the geometric mean over the orders, normalised, takes the prior out.
.. [2] Wang et al. 2023, arXiv 2305.17926: judges prefer a place; ask in both orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Prompt, as_prompt
from ensemble_rm.errors import OptionError, RemoteError
from ensemble_rm.members.judges.asking import Reply
from ensemble_rm.members.judges.base import RubricJudge
from ensemble_rm.members.judges.replies import Source, Verdict, read_verdict
from ensemble_rm.members.judges.usage import Usage

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class JudgeVerdicts:
    """A judge's verdicts on pairs of completions, in their order.

    Attributes
    ----------
    probability : ndarray, shape (n_pairs,)
        P(first is preferred), a tie counting half; NaN where a judgment failed.
    tie_probability : ndarray, shape (n_pairs,), optional
        P(tie); None where the rubric has no tie.
    orders : ndarray, shape (n_pairs, 2)
        P(first is preferred) where it stood first, and where it stood second.
    sources : tuple of ({"logprobs", "words"} or None)
        What a judgment was read from: words say only 0, ½ or 1.
    errors : mapping of int to Exception
        By row, why there is no judgment.
    usage : Usage
        Requests, tokens, seconds and cost.
    """

    probability: Floats
    tie_probability: Floats | None
    orders: Floats
    sources: tuple[Source | None, ...]
    errors: Mapping[int, Exception]
    usage: Usage

    @property
    def position_bias(self) -> float:
        """Mean over the pairs of P(the completion shown first wins) − ½; NaN without any pair."""
        known = self.orders[np.isfinite(self.orders).all(axis=1)]
        if not len(known):
            return float("nan")
        return float((known[:, 0] + (1.0 - known[:, 1])).mean() / 2 - 0.5)


class JudgeComparator(RubricJudge):
    """Compares completions by asking a judge model.

    Every pair is asked in both orders. Where both replies have log-probabilities, the verdicts'
    probabilities are averaged geometrically and normalised: the mean of the two logits, which
    takes out any preference for a place [1]_. Else the words are averaged: 1 or 0 where the orders
    agree, ½ where they do not [2]_.

    Parameters
    ----------
    url : str
        Of an OpenAI-compatible server, such as ``http://localhost:8000/v1``.
    model : str
        Name of the judge on that server.
    rubric : str, Path, mapping or Rubric, optional
        What is asked: ``"pairwise"`` (default), ``"pairwise_ties"``, a JSON file or its content.
    token : str or callable, optional
        Bearer token, or a function that returns the current one.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.
    **options : Any
        The other fields of `JudgeOptions`.

    Raises
    ------
    OptionError
        If an option or the rubric cannot be used.
    MissingExtraError
        If httpx is not installed.
    """

    wants = "pairwise"

    def compare(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> JudgeVerdicts:
        """Ask which completion is better, in both orders.

        Parameters
        ----------
        prompts : sequence of str or of messages
            One per pair.
        first, second : sequence of str
            The completions.

        Returns
        -------
        JudgeVerdicts

        Raises
        ------
        RemoteUnavailableError
            If the judge could not be reached for any pair.
        RemoteRefusalError
            If it refuses the address, the token or the model.
        """
        if not len(prompts) == len(first) == len(second):
            raise OptionError(
                f"{len(prompts)} prompts, {len(first)} first and {len(second)} second completions"
            )
        questions = []
        for prompt, a, b in zip(map(as_prompt, prompts), first, second, strict=True):
            questions += [self.rubric.ask(prompt, first=a, second=b)]
            questions += [self.rubric.ask(prompt, first=b, second=a)]
        return self._begin(questions, self._verdicts).result()

    def _verdicts(self, answer: tuple[list[Reply], Usage]) -> JudgeVerdicts:
        read = [self._read(reply) for reply in answer[0]]
        return _verdicts(read[::2], read[1::2], answer[1], ties=len(self.rubric.verdicts) == 3)

    def _read(self, reply: Reply) -> Verdict | RemoteError:
        if isinstance(reply, RemoteError):
            return reply
        return read_verdict(reply, self.rubric.verdicts, self.rubric.after)


def _verdicts(
    forward: Sequence[Verdict | RemoteError],
    backward: Sequence[Verdict | RemoteError],
    usage: Usage,
    *,
    ties: bool,
) -> JudgeVerdicts:
    n = len(forward)
    p, tie, orders = np.full(n, np.nan), np.full(n, np.nan), np.full((n, 2), np.nan)
    sources: list[Source | None] = [None] * n
    errors: dict[int, Exception] = {}
    for i, (there, back) in enumerate(zip(forward, backward, strict=True)):
        if isinstance(there, Exception) or isinstance(back, Exception):
            errors[i] = next(side for side in (there, back) if isinstance(side, Exception))
            continue
        sources[i] = "logprobs" if there.source == back.source == "logprobs" else "words"
        both, orders[i] = combine_orders(there, back)
        p[i], tie[i] = both[0] + both[2] / 2, both[2]
    read = sum(isinstance(one, Verdict) for one in (*forward, *backward))
    usage = usage.with_read(read)
    return JudgeVerdicts(p, tie if ties else None, orders, tuple(sources), errors, usage)


def combine_orders(forward: Verdict, backward: Verdict) -> tuple[Floats, Floats]:
    """Return P(first, second, tie) of both orders together, and P(first) of each order.

    Parameters
    ----------
    forward : Verdict
        Where the first completion stood first.
    backward : Verdict
        Where it stood second.

    Returns
    -------
    both : ndarray, shape (3,)
        Normalised geometric mean of the log-probabilities [1]_, or the mean of the words.
    orders : ndarray, shape (2,)
        P(first is preferred), a tie counting half.
    """
    there = np.array([*forward.probabilities, 0.0][:3])  # first, second, tie
    back = np.array([*backward.probabilities, 0.0][:3])[[1, 0, 2]]
    if forward.source == backward.source == "logprobs":
        both = np.sqrt(there * back)
        both /= both.sum()
    else:  # what was chosen in each order
        there, back = (np.eye(3)[int(one.argmax())] for one in (there, back))
        both = (there + back) / 2
    return both, np.array([there[0] + there[2] / 2, back[0] + back[2] / 2])
