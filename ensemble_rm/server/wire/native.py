"""The server's own wire format: rewards with member scores, comparisons with their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, core_schema

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.rule import RULES, Rule
from ensemble_rm.arrays import Floats, finite_or_none
from ensemble_rm.data.samples import Message, Prompt, Sample
from ensemble_rm.errors import EnsembleRMError, OptionError, UnprocessableError
from ensemble_rm.server.failures import SampleError, describe_error
from ensemble_rm.server.wire.format import Route, WireFormat
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.ensemble.results import Scores
    from ensemble_rm.server.service import RequestContext

_MOST_FIELDS = 32
_LARGEST = 1e6  # size of a coefficient: a larger one could overflow an aggregate of usual scores


class Body(BaseModel):
    """A request's body; unknown fields are refused, since a misspelt one would have no effect."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, body: object) -> object:
        """Refuse a body with too many fields, instead of reporting an error per field."""
        if isinstance(body, dict) and len(body) > _MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "too many fields")
        return body


Text = Annotated[str, Field(pattern=r"\S")]  # more than white space


class Turn(Body):
    """One message."""

    role: str = Field(pattern=r"^[a-z_]{1,32}$", description="user, assistant, system, …")
    content: str


PromptField = Annotated[
    Text | Annotated[list[Turn], Field(min_length=1, fail_fast=True)],
    Field(description="text or messages"),
]


class ScoredSample(Body):
    """A prompt and a completion."""

    prompt: PromptField
    completion: str
    reference: str | None = Field(
        None,
        description="reference completion of the prompt, needed if the ensemble has a baseline",
    )


@dataclass(frozen=True)
class AggregatorChoice:
    """A registered aggregation rule and its coefficients, as a request names them.

    Attributes
    ----------
    name : str
    coefficients : mapping of str to float
    """

    name: str
    coefficients: Mapping[str, float]

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        """Return how pydantic reads it: by the registry, which may grow after the import."""
        return core_schema.no_info_plain_validator_function(_read_choice)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: Any, _handler: Any) -> dict[str, Any]:
        """Return the description: one alternative per rule, each with its own constant name."""
        choices = [_describe_rule(rule) for rule in RULES.values()]
        return {"oneOf": choices, "discriminator": {"propertyName": "name"}}


def _describe_rule(rule: Rule) -> dict[str, Any]:
    coefficients = {
        each.name: {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST}
        | dict(each.bounds)
        | {"description": f"{each.help or each.name}; {each.domain}"}
        for each in rule.coefficients
    }
    return {
        "title": rule.name,
        "type": "object",
        "properties": {"name": {"type": "string", "const": rule.name}, **coefficients},
        "required": ["name", *coefficients],
        "additionalProperties": False,
    }


def _read_choice(value: object) -> AggregatorChoice:
    if not isinstance(value, dict):
        raise PydanticCustomError("aggregator", "must be an object with a name")
    name = value.get("name")
    rule = RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise PydanticCustomError("aggregator", "unknown name")
    given = {}
    for each in rule.coefficients:
        wrong = PydanticCustomError(
            "aggregator",
            "{name} must be {domain}, at most {largest} in size",
            {"name": each.name, "domain": each.domain, "largest": f"{_LARGEST:g}"},
        )
        number = value.get(each.name)
        # Compared before it becomes a float: a whole number of JSON may be too large for one.
        if not isinstance(number, int | float) or not abs(number) <= _LARGEST:
            raise wrong
        try:
            given[each.name] = each.check(rule.name, number)
        except OptionError:  # its message quotes the value
            raise wrong from None
    if len(value) > 1 + len(given):
        raise PydanticCustomError("aggregator", "unknown field")
    return AggregatorChoice(rule.name, given)


class ScoreRequest(Body):
    """Samples to score."""

    samples: list[ScoredSample] = Field(min_length=1, fail_fast=True)
    aggregator: AggregatorChoice | None = Field(
        None,
        description="aggregator for this request, in normalised units (default: the ensemble's)",
    )
    partial: bool = Field(
        default=False,
        description="if a sample fails, answer with reward null and the reason in `errors`",
    )


class ScoreAnswer(BaseModel):
    """Rewards, in the order of the samples."""

    version: str
    aggregator: str
    names: list[str]
    rewards: list[float | None] = Field(description="in normalised units")
    std: list[float | None] | None = Field(
        description="standard deviation over members (ddof 1); null if there is one member or it "
        "is too large for a float"
    )
    members: list[list[float | None] | None] = Field(
        description="normalised scores, one row per sample"
    )
    raw: list[list[float | None] | None] = Field(description="scores in the members' own units")
    truncated: list[bool] = Field(description="whether a member truncated the sample")
    errors: list[str | None] = Field(description="why a sample has no reward")


class Pair(Body):
    """Two completions of one prompt."""

    prompt: PromptField
    first: str
    second: str
    reference: str | None = None
    subset: str | None = Field(
        None, description="slice; its temperature is used if the calibration has one"
    )


class CompareRequest(Body):
    """Pairs to compare."""

    pairs: list[Pair] = Field(min_length=1, fail_fast=True)


class CompareAnswer(BaseModel):
    """Calibrated comparisons, in the order of the pairs."""

    version: str
    probability: list[float] = Field(description="P(the first is preferred)")
    margin: list[float] = Field(description="reward of the first minus reward of the second")
    epistemic: list[float | None] | None = Field(
        description="nats; null if fewer than two members scored the pair"
    )
    aleatoric: list[float | None] | None = Field(description="nats; null where `epistemic` is")
    tie_probability: list[float] | None = Field(
        description="null if the calibration models no ties"
    )


# Handlers ----------------------------------------------------------------------------------------


async def score(request: ScoreRequest, context: RequestContext) -> dict[str, Any]:
    """Score samples: rewards, the members' scores and their standard deviation."""
    ensemble = context.ensemble
    aggregator = read_aggregator(request.aggregator, ensemble.aggregator)
    samples = [Sample(read_prompt(s.prompt), s.completion, s.reference) for s in request.samples]
    scores = await context.score(samples, on_error="record")
    reward, errors = scores.reward, scores.failed
    if aggregator is not None:
        reward, errors = aggregate_again(aggregator, scores)
    if errors and not request.partial:
        raise SampleError(*min(errors.items()))
    with np.errstate(over="ignore", invalid="ignore"):
        std = member_std(scores.members, nan="omit") if len(scores.names) > 1 else None
    truncated = scores.truncation.prompts | scores.truncation.completions
    rows = range(len(samples))
    failed = [row in scores.failed for row in rows]
    return {
        "version": context.version,
        "aggregator": str(aggregator or ensemble.aggregator),
        "names": list(scores.names),
        "rewards": [None if row in errors else float(reward[row]) for row in rows],
        "std": None if std is None else finite_or_none(std),
        "members": [None if failed[row] else finite_or_none(scores.members[row]) for row in rows],
        "raw": [None if failed[row] else finite_or_none(scores.raw[row]) for row in rows],
        "truncated": [bool(truncated[row]) and not failed[row] for row in rows],
        "errors": [_error_name(errors[row]) if row in errors else None for row in rows],
    }


async def compare(request: CompareRequest, context: RequestContext) -> dict[str, Any]:
    """Compare pairs: the calibrated probability that a human prefers the first completion."""
    samples = []
    for pair in request.pairs:
        prompt = read_prompt(pair.prompt)
        samples += [Sample(prompt, text, pair.reference) for text in (pair.first, pair.second)]
    comparison = await context.compare(samples, [pair.subset for pair in request.pairs])
    several = comparison.member_margins.shape[1] > 1
    ties = comparison.tie_probability
    return {
        "version": context.version,
        "probability": comparison.probability.tolist(),
        "margin": comparison.margin.tolist(),
        "epistemic": finite_or_none(comparison.epistemic) if several else None,
        "aleatoric": finite_or_none(comparison.aleatoric) if several else None,
        "tie_probability": None if ties is None else ties.tolist(),
    }


def read_prompt(prompt: str | list[Turn]) -> Prompt:
    """Return the prompt of a body."""
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(turn.role, turn.content) for turn in prompt)


def read_aggregator(choice: AggregatorChoice | None, own: Aggregator) -> Aggregator | None:
    """Return the aggregator that a request chooses, with the weights and NaN policy of `own`."""
    if choice is None:
        return None
    return own.with_rule(choice.name, **choice.coefficients)


def aggregate_again(
    aggregator: Aggregator, scores: Scores
) -> tuple[Floats, Mapping[int, Exception]]:
    """Return the rewards by another aggregator, and the errors of the rows that have none.

    Errors of the requested aggregator are errors of the request: `UnprocessableError`.
    """
    errors = dict(scores.failed)
    reward = np.full(len(scores.reward), np.nan)
    for row in range(len(reward)):
        if row in errors:
            continue
        try:
            reward[row] = aggregator(scores.members[row : row + 1])[0]
        except EnsembleRMError as error:
            errors[row] = UnprocessableError(f"the requested aggregator: {describe_error(error)}")
            errors[row].__cause__ = error
    return reward, errors


def _error_name(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, UnprocessableError) else None
    return type(error if cause is None else cause).__name__


_TURNS = [{"role": "user", "content": "How are you?"}]
FORMAT = WireFormat(
    "native",
    (
        Route(
            path="/v1/score",
            handler=score,
            request=ScoreRequest,
            response=ScoreAnswer,
            examples={
                "text": {"samples": [{"prompt": "How are you?", "completion": "Fine, thank you."}]},
                "messages": {
                    "samples": [{"prompt": _TURNS, "completion": "Fine, thank you."}],
                    "aggregator": {"name": "lcb", "kappa": 1.0},
                },
            },
        ),
        Route(
            path="/v1/compare",
            handler=compare,
            request=CompareRequest,
            response=CompareAnswer,
            examples={
                "pair": {
                    "pairs": [{"prompt": _TURNS, "first": "Fine, thank you.", "second": "So so."}]
                }
            },
        ),
    ),
)
