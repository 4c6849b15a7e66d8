"""The circuit by itself: its states, and whose report moves it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from ensemble_rm.members.remote.breaker import Breaker


class Model:
    """What a circuit is, in other words, under a clock of its own."""

    def __init__(self, open_after: int) -> None:
        self.now, self.open_after = 0.0, open_after
        self.row, self.opened, self.probe = 0, math.inf, ""

    @property
    def state(self) -> str:
        if self.opened == math.inf:
            return "closed"
        return "half-open" if self.now >= self.opened + 5.0 else "open"

    def admits(self, who: str) -> bool:
        free = self.state == "half-open" and not self.probe
        self.probe = who if free else self.probe
        return free or self.state == "closed"

    def hears(self, report: str, who: str) -> None:
        if report == "succeeded":
            self.row, self.opened, self.probe = 0, math.inf, ""
            return
        if report == "failed":
            self.row += 1
            opens = self.state == "closed" and self.row >= self.open_after
            self.opened = self.now if opens or who == self.probe else self.opened
        self.probe = "" if who == self.probe else self.probe


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["wait", "admit", "succeeded", "failed", "abandoned"]),
            st.sampled_from("abc"),
        ),
        max_size=60,
    ),
    st.integers(1, 4),
)
def test_the_circuit_keeps_its_states(events: list[tuple[str, str]], open_after: int) -> None:
    """One probe at a time: what others report, who began before, changes nothing of it."""
    model = Model(open_after)
    breaker = Breaker(open_after, 5.0, clock=lambda: model.now)
    for event, who in events:
        if event == "wait":
            model.now += 3.0
        elif event == "admit":
            before, wait = model.state, breaker.admit(who)
            assert (wait == 0) == model.admits(who)
            if before == "open":
                assert wait == pytest.approx(model.opened + 5.0 - model.now)
        elif event == "succeeded":
            breaker.succeeded()
            model.hears(event, who)
        else:
            getattr(breaker, event)(who)
            model.hears(event, who)
        assert breaker.state == model.state


def test_an_error_inside_is_no_answer_to_the_probe() -> None:
    breaker, now, probe = opened_breaker()
    now[0] = 2.0
    assert breaker.admit(probe) == 0
    breaker.broken(object())
    assert breaker.state == "half-open" and breaker.admit(object()) > 0
    breaker.broken(probe)
    assert breaker.state == "open"


def opened_breaker() -> tuple[Breaker, list[float], object]:
    now = [0.0]
    breaker = Breaker(1, 1.0, clock=lambda: now[0])
    breaker.failed(object())
    return breaker, now, object()


def test_a_cancelled_probe_leaves_the_circuit_to_the_next() -> None:
    breaker, now, probe = opened_breaker()
    now[0] = 2.0
    assert breaker.admit(probe) == 0 and breaker.admit(object()) > 0
    breaker.abandoned(object())
    assert breaker.admit(object()) > 0
    breaker.abandoned(probe)
    assert breaker.admit(object()) == 0
