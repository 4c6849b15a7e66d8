r"""A judge model as a comparator: asks about each pair in both orders, returns probabilities.

References
----------
.. [1] Zheng et al. 2024, arXiv 2309.03882: a judge's probability is a prior of the position times
   its opinion of the answer; the normalised geometric mean over both orders removes the prior.
.. [2] Wang et al. 2023, arXiv 2305.17926: judges prefer a position; ask in both orders.
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
    """A judge's verdicts on pairs of completions, in the order of the pairs.

    Attributes
    ----------
    probability : ndarray, shape (n_pairs,)
        P(first is preferred), a tie counts half; NaN where there is no verdict.
    tie_probability : ndarray, shape (n_pairs,), optional
        P(tie); None if the rubric has no tie.
    orders : ndarray, shape (n_pairs, 2)
        P(first is preferred) if it is shown first, and if it is shown second.
    sources : tuple of ({"logprobs", "words"} or None)
        Whether a verdict was read from log-probabilities or from words, which allow only 0, ½
        and 1; None where there is no verdict.
    errors : mapping of int to Exception
        By row, why there is no verdict.
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
        """Mean of P(the completion shown first is preferred) − ½; NaN without verdicts."""
        orders = self.orders[np.isfinite(self.orders).all(axis=1)]
        if not len(orders):
            return float("nan")
        return float((orders[:, 0] + (1.0 - orders[:, 1])).mean() / 2 - 0.5)


class JudgeComparator(RubricJudge):
    """Compares completions by asking a judge model.

    The judge is asked about every pair in both orders. If both replies have log-probabilities, the
    verdict is the normalised geometric mean of the two, which is the mean of the two logits: any
    preference for a position cancels [1]_. Otherwise the words are averaged: 1 or 0 if the two
    replies agree, ½ if they do not [2]_.

    Parameters
    ----------
    url : str
        Address of an OpenAI-compatible server, such as ``http://localhost:8000/v1``.
    model : str
        Name of the judge on that server.
    rubric : str, Path, mapping or Rubric, optional
        The question: ``"pairwise"`` (default), ``"pairwise_ties"``, a JSON file or its content.
    logprobs : bool
        Whether to request log-probabilities; if the server refuses them, requests omit them.
    extra : mapping of str to JSON values, optional
        Fields that are added to the request or replace its own; None removes a field.
    price : Price, optional
        Price of the judge's tokens.
    client : ClientOptions, optional
        Attempts, pauses, deadline, concurrency, circuit breaker.
    token : str or callable, optional
        Bearer token, or a function that returns the current one.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.

    Raises
    ------
    OptionError
        If an option or the rubric is invalid.
    MissingExtraError
        If httpx is not installed.
    """

    wants = "pairwise"

    def compare(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> JudgeVerdicts:
        """Ask the judge which completion is better, in both orders.

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
            If the server refuses the address, the token or the model.
        """
        if not len(prompts) == len(first) == len(second):
            raise OptionError(
                f"{len(prompts)} prompts, {len(first)} first and {len(second)} second completions; "
                "their numbers must be equal"
            )
        questions = []
        for prompt, a, b in zip(map(as_prompt, prompts), first, second, strict=True):
            questions += [self.rubric.ask(prompt, first=a, second=b)]
            questions += [self.rubric.ask(prompt, first=b, second=a)]
        return self._begin(questions, self._verdicts).result()

    def _verdicts(self, result: tuple[list[Reply], Usage]) -> JudgeVerdicts:
        replies, usage = result
        verdicts = [self._read(reply) for reply in replies]
        ties = len(self.rubric.verdicts) == 3
        return _verdicts(verdicts[::2], verdicts[1::2], usage, ties=ties)

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
    for i, (a, b) in enumerate(zip(forward, backward, strict=True)):
        if isinstance(a, Exception) or isinstance(b, Exception):
            errors[i] = next(verdict for verdict in (a, b) if isinstance(verdict, Exception))
            continue
        sources[i] = "logprobs" if a.source == b.source == "logprobs" else "words"
        both, orders[i] = combine_orders(a, b)
        p[i], tie[i] = both[0] + both[2] / 2, both[2]
    usage = usage.with_read(sum(isinstance(verdict, Verdict) for verdict in (*forward, *backward)))
    return JudgeVerdicts(p, tie if ties else None, orders, tuple(sources), errors, usage)


def combine_orders(forward: Verdict, backward: Verdict) -> tuple[Floats, Floats]:
    """Return P(first, second, tie) over both orders, and P(first) in each order.

    Parameters
    ----------
    forward : Verdict
        With the first completion shown first.
    backward : Verdict
        With the first completion shown second.

    Returns
    -------
    both : ndarray, shape (3,)
        Normalised geometric mean of the log-probabilities [1]_, or the mean of the words.
    orders : ndarray, shape (2,)
        P(first is preferred), a tie counts half.
    """
    # Both as (first, second, tie); without ties the third is 0.
    p = np.array([*forward.probabilities, 0.0][:3])
    q = np.array([*backward.probabilities, 0.0][:3])[[1, 0, 2]]  # its "first" is our second
    if forward.source == backward.source == "logprobs":
        both = np.sqrt(p * q)
        both /= both.sum()
    else:  # one-hot words, also of the order that has log-probabilities: the two must be alike
        p, q = (np.eye(3)[int(probabilities.argmax())] for probabilities in (p, q))
        both = (p + q) / 2
    return both, np.array([p[0] + p[2] / 2, q[0] + q[2] / 2])
