"""The server's own wire format: rewards with member scores, comparisons with their uncertainty.

Pure: bodies to samples, outcomes to answers. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from pydantic_core import PydanticCustomError

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.data.samples import Message, Prompt, Sample
from ensemble_rm.ensemble.results import Comparison
from ensemble_rm.errors import EnsembleRMError, UnprocessableError
from ensemble_rm.server.scheduling.outcomes import (
    Outcome,
    SampleError,
    Scored,
    first_error,
    say_error,
)

_MOST_FIELDS = 32


class Body(BaseModel):
    """A request's body; unknown fields are refused, since a misspelt option would do nothing."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, body: object) -> object:
        """Refuse at once what would be a fault a field."""
        if isinstance(body, dict) and len(body) > _MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "more fields than there are")
        return body


Text = Annotated[str, Field(pattern=r"\S")]  # more than white space


class Turn(Body):
    """One message."""

    role: str = Field(pattern=r"^[a-z_]{1,32}$", description="user, assistant, system, …")
    content: str


Asked = Annotated[
    Text | Annotated[list[Turn], Field(min_length=1, fail_fast=True)],
    Field(description="what the policy was asked"),
]


class ScoredSample(Body):
    """A prompt and one answer to it."""

    prompt: Asked
    completion: str
    reference: str | None = Field(
        None, description="the prompt's reference completion, where the ensemble has a baseline"
    )


Strength = Annotated[FiniteFloat, Field(ge=0, le=1e6)]  # so that no ordinary spread overflows


class PlainAggregator(Body):
    """An aggregator without a coefficient."""

    name: Literal["mean", "minimum", "median"]


class UWO(Body):
    """Mean less λ times the members' variance."""

    name: Literal["uwo"]
    lam: Strength


class LCB(Body):
    """Mean less κ times the members' standard deviation."""

    name: Literal["lcb"]
    kappa: Strength


class Entropic(Body):
    """A soft minimum."""

    name: Literal["entropic"]
    beta: FiniteFloat = Field(gt=0)


class Quantile(Body):
    """A quantile of the members."""

    name: Literal["quantile"]
    q: FiniteFloat = Field(ge=0, le=1)


class CVaR(Body):
    """The mean of the lowest share α."""

    name: Literal["cvar"]
    alpha: FiniteFloat = Field(gt=0, le=1)


AggregatorChoice: TypeAlias = PlainAggregator | UWO | LCB | Entropic | Quantile | CVaR


class ScoreRequest(Body):
    """Samples to score."""

    samples: list[ScoredSample] = Field(min_length=1, fail_fast=True)
    aggregator: Annotated[AggregatorChoice, Field(discriminator="name")] | None = Field(
        None, description="of these rewards, in normalised units; else the ensemble's own"
    )
    partial: bool = Field(
        default=False,
        description="answer where samples fail, too: their reward is null and `errors` says why",
    )


class ScoreAnswer(BaseModel):
    """Rewards, in the order of the samples."""

    version: str
    aggregator: str
    names: list[str]
    rewards: list[float | None] = Field(description="in normalised units")
    std: list[float | None] | None = Field(
        description="members' spread (ddof 1); null of one member, and where it is beyond a float"
    )
    members: list[list[float | None] | None] = Field(
        description="normalised scores, a row a sample"
    )
    raw: list[list[float | None] | None] = Field(description="scores in the members' own units")
    truncated: list[bool] = Field(description="whether a member read less than the whole sample")
    errors: list[str | None] = Field(description="why a sample has no reward")


class Pair(Body):
    """Two answers to one prompt."""

    prompt: Asked
    first: str
    second: str
    reference: str | None = None
    subset: str | None = Field(
        None, description="its slice's temperature is used where there is one"
    )


class CompareRequest(Body):
    """Pairs to compare."""

    pairs: list[Pair] = Field(min_length=1, fail_fast=True)


class CompareAnswer(BaseModel):
    """Calibrated comparisons, in the order of the pairs."""

    version: str
    probability: list[float] = Field(description="P(a human prefers the first)")
    margin: list[float] = Field(description="reward of the first minus that of the second")
    epistemic: list[float | None] | None = Field(
        description="nats; null for one member, and where fewer than two scored a pair"
    )
    aleatoric: list[float | None] | None = Field(description="nats; null where epistemic is")
    tie_probability: list[float] | None = Field(description="null without a model of ties")


class RefreshAnswer(BaseModel):
    """Which version serves now."""

    version: str
    changed: bool


# Bodies to samples -----------------------------------------------------------------------------


def read_prompt(asked: str | list[Turn]) -> Prompt:
    """Return the prompt of a body."""
    if isinstance(asked, str):
        return asked
    return tuple(Message(turn.role, turn.content) for turn in asked)


def read_samples(request: ScoreRequest) -> list[Sample]:
    """Return the samples of a request."""
    return [Sample(read_prompt(s.prompt), s.completion, s.reference) for s in request.samples]


def read_pairs(request: CompareRequest) -> tuple[list[Sample], list[str | None]]:
    """Return both sides of each pair, side by side, and the pairs' slices."""
    samples = []
    for pair in request.pairs:
        prompt = read_prompt(pair.prompt)
        samples += [Sample(prompt, text, pair.reference) for text in (pair.first, pair.second)]
    return samples, [pair.subset for pair in request.pairs]


def read_aggregator(choice: AggregatorChoice | None, own: Aggregator) -> Aggregator | None:
    """Return the rule that a request asks for, with the weights and the NaN policy of `own`."""
    if choice is None:
        return None
    given = choice.model_dump(exclude={"name"})
    return own.with_rule(choice.name, **given)


# Outcomes to answers ---------------------------------------------------------------------------


def numbers(row: Floats) -> list[float | None]:
    """Return a row with null where a member is missing; JSON has no NaN."""
    return [float(x) if np.isfinite(x) else None for x in row]


def aggregate(
    outcomes: Sequence[Outcome], aggregator: Aggregator | None
) -> list[float | Exception]:
    """Return the rewards, by another aggregator where one is given; failures in their places.

    What that aggregator cannot do is the request's fault: an `UnprocessableError` by its cause.
    """
    found: list[float | Exception] = []
    for one in outcomes:
        if isinstance(one, Exception) or aggregator is None:
            found.append(one if isinstance(one, Exception) else one.reward)
            continue
        try:
            found.append(float(aggregator(one.members[None, :])[0]))
        except EnsembleRMError as error:
            refused = UnprocessableError(f"the aggregator asked for: {say_error(error)}")
            refused.__cause__ = error
            found.append(refused)
    return found


def require_rewards(rewards: Sequence[float | Exception]) -> None:
    """Raise `SampleError` where one of the rewards is an error."""
    failed = first_error(rewards)
    if failed is not None:
        raise SampleError(*failed)


def score_answer(
    outcomes: Sequence[Outcome],
    rewards: Sequence[float | Exception],
    *,
    names: Sequence[str],
    version: str,
    aggregator: str,
) -> dict[str, Any]:
    """Return the answer to a `ScoreRequest`."""
    scored = [one if isinstance(one, Scored) else None for one in outcomes]
    return {
        "version": version,
        "aggregator": aggregator,
        "names": list(names),
        "rewards": [None if isinstance(value, Exception) else value for value in rewards],
        "std": None if len(names) == 1 else [None if s is None else s.std for s in scored],
        "members": [None if s is None else numbers(s.members) for s in scored],
        "raw": [None if s is None else numbers(s.raw) for s in scored],
        "truncated": [s is not None and (s.prompt_cut or s.completion_cut) for s in scored],
        "errors": [_name(r) if isinstance(r, Exception) else None for r in rewards],
    }


def _name(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, UnprocessableError) else None
    return type(error if cause is None else cause).__name__


def compare_answer(comparison: Comparison, *, version: str) -> dict[str, Any]:
    """Return the answer to a `CompareRequest`."""
    several = comparison.member_margins.shape[1] > 1
    ties = comparison.tie_probability
    return {
        "version": version,
        "probability": comparison.probability.tolist(),
        "margin": comparison.margin.tolist(),
        "epistemic": numbers(comparison.epistemic) if several else None,
        "aleatoric": numbers(comparison.aleatoric) if several else None,
        "tie_probability": None if ties is None else ties.tolist(),
    }
