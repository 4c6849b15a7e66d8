"""The aggregator of a request: every registered rule, described exactly as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, strategies as st
from pydantic import TypeAdapter, ValidationError

from ensemble_rm.aggregation import Coefficient, Rule, make_aggregator, register
from ensemble_rm.aggregation.rule import RULES
from ensemble_rm.evaluation.evaluation import default_aggregators
from ensemble_rm.server.wire.native import AggregatorChoice
from tests.support.server_process import lengths
from tests.support.server_runs import client, one

COEFFICIENTS = sorted({c.name for rule in RULES.values() for c in rule.coefficients})
numbers = st.integers(-2, 2) | st.floats(-2, 2) | st.sampled_from([0, 1, 1e6, 1e6 + 1, 10**400])
values = numbers | st.none() | st.booleans() | st.text(max_size=2) | st.lists(numbers, max_size=1)
choices = st.builds(
    lambda name, rest: name | rest,
    st.fixed_dictionaries({}, optional={"name": st.sampled_from([*RULES, "max"]) | values}),
    st.dictionaries(st.sampled_from([*COEFFICIENTS, "other"]), values, max_size=2),
)


def is_read(value: Any) -> bool:
    try:
        TypeAdapter(AggregatorChoice).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def is_described(value: Any) -> bool:
    schema = TypeAdapter(AggregatorChoice).json_schema()
    return jsonschema_rs.Draft202012Validator(schema).is_valid(value)


@given(choices | values)
def test_the_description_allows_exactly_what_is_read(value: Any) -> None:
    assert is_read(value) == is_described(value)


@given(st.data())
def test_what_a_rule_takes_is_read(data: st.DataObject) -> None:
    # By name: other tests may have registered rules of other domains.
    names = ("mean", "minimum", "median", "uwo", "lcb", "entropic", "quantile", "cvar")
    rule = RULES[data.draw(st.sampled_from(names))]
    inside = {c.name: data.draw(st.floats(0.125, 1)) for c in rule.coefficients}
    assert is_read({"name": rule.name} | inside) and is_described({"name": rule.name} | inside)


@pytest.fixture
def registered() -> Iterator[Rule]:
    share = Coefficient("share", "a number in [0, 1]", lambda x: 0 <= x <= 1)
    yield register(
        Rule("near", lambda s, share: s.lowest() + share * (s.highest() - s.lowest()), (share,))
    )
    del RULES["near"]


def test_a_registered_rule_can_be_asked_for(registered: Rule) -> None:
    with client(lengths()) as opened:
        body = one("Hello") | {"aggregator": {"name": registered.name, "share": 0.25}}
        answer = opened.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["rewards"] == [6.25]
        assert answer.json()["aggregator"] == str(make_aggregator("near", share=0.25))
        body["aggregator"]["share"] = 2
        assert opened.post("/v1/score", json=body).status_code == 422


def test_an_evaluation_compares_registered_rules_without_a_coefficient() -> None:
    register(Rule("highest", lambda s: s.highest()))
    try:
        assert "highest" in {a.name for a in default_aggregators()}
    finally:
        del RULES["highest"]
