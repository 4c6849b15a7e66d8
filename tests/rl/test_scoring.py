"""Rewards for loops: what fails fails alone, what is pinned stays, what is measured is right."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ensemble_rm import FunctionScorer, Message, RewardEnsemble, Sample
from ensemble_rm.aggregation import mean, minimum
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import (
    BaselineError,
    DataError,
    NonFiniteScoreError,
    OneMemberError,
    OptionError,
    PinnedVersionError,
    RemoteNotAllowedError,
    RemoteRefusalError,
    StorageError,
)
from ensemble_rm.members import HeadScorer, RemoteScorer
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.rl.chat import read_completion, to_samples
from ensemble_rm.rl.monitor.measures import (
    disagreement,
    length_slope,
    outside_range,
    within_correlation,
    within_prompts,
)
from ensemble_rm.rl.pinned import PinnedEnsemble
from ensemble_rm.rl.scoring import score_for_loop
from tests.support.wire_doubles import serving

NAN = float("nan")


def length(sample: Sample) -> float:
    return NAN if "bad" in sample.completion else float(len(sample.completion))


@pytest.fixture
def ensemble() -> RewardEnsemble:
    members = (
        FunctionScorer("length", length),
        FunctionScorer("a", lambda s: s.completion.count("a")),
    )
    return RewardEnsemble(members, Normaliser.identity(2), mean())


@given(st.lists(st.booleans(), min_size=1, max_size=17).filter(lambda bad: not all(bad)))
def test_a_failed_sample_fails_alone(bad: list[bool]) -> None:
    members = (FunctionScorer("length", length),)
    ensemble = RewardEnsemble(members, Normaliser.identity(1), mean())
    samples = [Sample("p", "bad" if b else "x" * (i + 1)) for i, b in enumerate(bad)]
    found = score_for_loop(ensemble, samples)
    assert found.listed() == [None if b else float(i + 1) for i, b in enumerate(bad)]
    assert [reason is not None for reason in found.failures] == bad
    assert all("NonFiniteScoreError" in reason for reason in found.failures if reason)


def test_what_a_template_refuses_fails_alone(
    two_heads: Callable[..., HeadScorer], small_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(small_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    heads = two_heads()
    strict = HeadScorer(locate(folder), heads.trunk.options, heads.views, heads.weights)
    ensemble = RewardEnsemble((strict,), Normaliser.identity(2), mean())
    asked = Message("user", "Hi")
    found = score_for_loop(
        ensemble,
        [
            Sample("Hi", "a fox"),
            Sample((Message("system", "Be brief."), asked), "a fox"),
            Sample((asked,), "a fox"),
            Sample("Hi", "half \ud800"),
        ],
    )
    first, refused, same, half = found.listed()
    assert first is not None and first == pytest.approx(same, abs=1e-6)
    assert refused is None and half is None
    assert "TemplateError" in str(found.failures[1]) and "System role" in str(found.failures[1])
    assert "DataError" in str(found.failures[3])


def test_a_broken_reward_ends_the_run(ensemble: RewardEnsemble) -> None:
    with pytest.raises(NonFiniteScoreError):
        score_for_loop(ensemble, [Sample("p", "bad"), Sample("p", "bad too")])
    with pytest.raises(NonFiniteScoreError):
        score_for_loop(ensemble, [Sample("p", "bad"), Sample("p", "fine")], on_failure="raise")
    with pytest.raises(OptionError, match="'zero'"):
        score_for_loop(ensemble, [Sample("p", "fine")], on_failure="zero")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        score_for_loop(ensemble, [DataError("unread")])
    assert len(score_for_loop(ensemble, [])) == 0


def test_a_bug_in_a_member_is_not_a_failed_sample() -> None:
    def broken(sample: Sample) -> float:
        raise KeyError(sample.completion)

    ensemble = RewardEnsemble((FunctionScorer("broken", broken),), Normaliser.identity(1), mean())
    with pytest.raises(KeyError):
        score_for_loop(ensemble, [Sample("p", "a"), Sample("p", "b")])


def test_a_missing_member_is_the_aggregators_business(ensemble: RewardEnsemble) -> None:
    omits = type(ensemble.aggregator)("mean", nan="omit")
    found = score_for_loop(ensemble.with_aggregator(omits), [Sample("p", "bad a")])
    assert found.listed() == [2.0]


def test_references_are_scored_once_and_keep_apart(ensemble: RewardEnsemble) -> None:
    asked: list[str] = []

    def count(sample: Sample) -> float:
        asked.append(sample.completion)
        return float(len(sample.completion))

    one = RewardEnsemble((FunctionScorer("count", count),), Normaliser.identity(1), mean())
    samples = [
        Sample("p", "aa", "r"),
        Sample("p", "aaa", "r"),
        Sample("q", "a"),
        Sample("q", "b", "bad"),
    ]
    found = score_for_loop(one, samples, with_references=True)
    assert asked == ["aa", "aaa", "a", "b", "r", "bad"]
    np.testing.assert_array_equal(found.reference_reward, [1, 1, NAN, 3])
    # A reference that fails takes nothing from the sample.
    found = score_for_loop(ensemble, samples, with_references=True)
    assert found.failures == (None,) * 4
    np.testing.assert_array_equal(np.isnan(found.reference_reward), [False, False, True, True])


def test_a_baseline_without_reference_fails_by_name(ensemble: RewardEnsemble) -> None:
    above = RewardEnsemble(ensemble.scorers, Normaliser((0.0, 0.0), (1.0, 1.0), True), mean())
    found = score_for_loop(above, [Sample("p", "aaa", "a"), Sample("p", "aaaa")])
    assert found.listed() == [2.0, None]
    with pytest.raises(BaselineError):
        score_for_loop(above, [Sample("p", "aaaa")])
    # What is above a reference by nothing is the reference itself.
    found = score_for_loop(above, [Sample("p", "aaa", "a")], with_references=True)
    assert found.reference_reward.tolist() == [0.0]


USER = {"role": "user", "content": "Hi"}


def answer(text: object) -> dict[str, object]:
    return {"role": "assistant", "content": text}


def test_plain_and_conversational_data_are_read() -> None:
    assert read_completion("Hi", "Yes") == ("Hi", "Yes")
    assert read_completion([USER], [answer("Yes")]) == ((Message("user", "Hi"),), "Yes")
    tool = {"role": "tool", "content": "42"}
    prompt, text = read_completion([USER], [answer("I look."), tool, answer("It is 42.")])
    assert text == "It is 42."
    assert prompt == (
        Message("user", "Hi"),
        Message("assistant", "I look."),
        Message("tool", "42"),
    )


@pytest.mark.parametrize(
    "completion", [[], 3, None, [answer(None)], [USER], ["text"], [answer([])]]
)
def test_what_cannot_be_read_is_an_error_in_its_place(completion: object) -> None:
    first, second = to_samples(["p", "p"], [completion, "fine"])
    assert isinstance(first, DataError) and second == Sample("p", "fine")


def test_lists_of_unlike_lengths_are_named() -> None:
    with pytest.raises(OptionError, match="2 prompts, 1 completions"):
        to_samples(["p", "q"], ["a"])


@pytest.fixture
def folder(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    return ensemble.save_pretrained(tmp_path / "saved")


def test_a_folder_is_loaded_late_and_crosses_by_its_name(folder: Path) -> None:
    pinned = PinnedEnsemble(folder, aggregator=minimum(), device="cpu")
    assert pinned._ensemble is None
    before = pickle.dumps(pinned)
    live = pinned.ensemble
    assert live is pinned.ensemble and live.aggregator == minimum()
    assert len(pickle.dumps(pinned)) == len(before)  # a loaded one carries no weights
    samples = [Sample("Hello", "you"), Sample("Hello", "there")]
    other = pickle.loads(before)
    assert other.version == pinned.version and other._ensemble is other.ensemble
    np.testing.assert_array_equal(other.ensemble.score(samples).raw, live.score(samples).raw)


def test_a_version_is_pinned(folder: Path, two_heads: Callable[..., HeadScorer]) -> None:
    pinned = PinnedEnsemble(folder, device="cpu")
    crossed = pickle.dumps(pinned)
    old = pinned.ensemble
    changed = RewardEnsemble((two_heads(seed=1),), Normaliser.identity(2), mean())
    changed.save_pretrained(folder)
    assert pinned.ensemble is old
    with pytest.raises(PinnedVersionError, match="has changed since"):
        _ = pickle.loads(crossed).ensemble
    assert PinnedEnsemble(folder, device="cpu").version != pinned.version


def test_a_missing_score_asks_no_member_again() -> None:
    asked: list[int] = []

    class Dear(FunctionScorer):  # such as a judge, of whom each question costs
        def score(self, samples: Sequence[Sample]) -> np.ndarray:
            asked.append(len(samples))
            return super().score(samples)

    members = (FunctionScorer("near", lambda _: 1.0), Dear("dear", length))
    ensemble = RewardEnsemble(members, Normaliser.identity(2), mean())
    texts = ["good", "bad", "fine", "bad too", "x"]
    rewards = score_for_loop(ensemble, [Sample("p", text) for text in texts])
    assert asked == [5]
    assert rewards.listed() == [2.5, None, 2.5, None, 1.0]
    assert isinstance(rewards.failed[1], NonFiniteScoreError)


def test_members_on_other_servers_get_tokens_that_no_folder_holds(tmp_path: Path) -> None:
    seen: list[str | None] = []

    async def get_reward(request: Request) -> JSONResponse:
        seen.append(request.headers.get("authorization"))
        if seen[-1] != "Bearer let-me-in-please":
            return JSONResponse({}, status_code=401)
        queries = (await request.json())["query"]
        return JSONResponse({"rewards": [len(query) / 7 for query in queries]})

    app = Starlette(routes=[Route("/get_reward", get_reward, methods=["POST"])])
    with serving(app) as url:
        far = RemoteScorer(
            url, protocol="openrlhf", name="far", template="plain", raw_logit_check="off"
        )
        one = RewardEnsemble((far,), Normaliser.identity(1), mean())
        place = one.save_pretrained(tmp_path / "far")
        pinned = PinnedEnsemble(
            place,
            device="cpu",
            allow_remote=["127.0.0.1"],
            tokens={"127.0.0.1": "let-me-in-please"},
        )
        assert all(b"let-me-in" not in f.read_bytes() for f in place.rglob("*") if f.is_file())
        crossed = pickle.loads(pickle.dumps(pinned)).ensemble
        assert crossed.score([Sample("Hi", "you")]).reward[0] == pytest.approx(5 / 7)
        assert set(seen) == {"Bearer let-me-in-please"}
        with pytest.raises(RemoteRefusalError, match="401"):
            PinnedEnsemble(place, device="cpu", allow_remote="127.0.0.1").ensemble.score(
                [Sample("Hi", "you")]
            )
        with pytest.raises(RemoteNotAllowedError, match=r"127\.0\.0\.1"):
            _ = PinnedEnsemble(place, device="cpu").ensemble
        with pytest.raises(OptionError, match=rf"'fra'.*{url}"):
            one.with_tokens({"fra": "x" * 20})
    with pytest.raises(OptionError, match="tokens is for a saved"):
        PinnedEnsemble(one, tokens={"far": "x"})


def test_a_named_version_is_the_provenances(ensemble: RewardEnsemble) -> None:
    named = RewardEnsemble(ensemble.scorers, ensemble.normaliser, mean(), provenance={"version": 7})
    assert PinnedEnsemble(named).version == "7"
    digests = {PinnedEnsemble(e).version for e in (ensemble, ensemble.with_aggregator(minimum()))}
    assert len(digests) == 2


def test_what_cannot_be_pinned_is_named(ensemble: RewardEnsemble, folder: Path) -> None:
    with pytest.raises(OptionError, match="device="):
        PinnedEnsemble(folder)
    with pytest.raises(OptionError, match="device is for a saved"):
        PinnedEnsemble(ensemble, device="cpu")
    with pytest.raises(OptionError, match="save_pretrained"):
        pickle.dumps(PinnedEnsemble(ensemble))
    with pytest.raises(StorageError, match="no ensemble"):
        PinnedEnsemble(folder / "members", device="cpu")


def test_disagreement_counts_the_outvoted() -> None:
    groups = np.array([0, 0, 0])
    ordered = np.array([[0.0, 1, 2], [1, 2, 3], [2, 3, 4]])
    assert disagreement(ordered, groups) == 0
    split = np.array([[0.0, 1, 0], [1, 0, 1]])
    assert disagreement(split, np.array([5, 5]) * 0) == pytest.approx(1 / 3)
    assert np.isnan(disagreement(ordered, np.array([0, 1, 2])))
    tied = np.array([[0.0, 0], [0, 1]])
    assert disagreement(tied, np.array([0, 0])) == pytest.approx(0.25)


@given(st.integers(0, 2**32), st.integers(2, 5), st.integers(2, 20))
def test_measures_ignore_a_prompts_offset_and_the_rows_order(seed: int, k: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    members, groups = rng.normal(size=(n, k)), np.sort(rng.integers(0, 3, n))
    groups = np.unique(groups, return_inverse=True)[1]
    moved = members + rng.normal(size=(3, k))[groups]
    order = rng.permutation(n)
    for measure in (disagreement, within_correlation):
        value = measure(members, groups)
        np.testing.assert_allclose(measure(moved, groups), value, atol=1e-9)
        np.testing.assert_allclose(measure(members[order], groups[order]), value, atol=1e-9)
    assert 0 <= np.nan_to_num(disagreement(members, groups)) <= 0.5
    means = [within_prompts(members, groups)[groups == g].mean() for g in set(groups)]
    np.testing.assert_allclose(means, 0, atol=1e-12)


def test_correlation_and_slope_recover_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 8)
    x = rng.normal(size=400) + rng.normal(0, 9, 50)[groups]
    offset = rng.normal(0, 9, 50)[groups]
    assert length_slope(0.7 * x + offset, x, groups) == pytest.approx(0.7)
    assert np.isnan(length_slope(x, np.ones(400), groups))
    shared = rng.normal(size=(400, 1))
    members = shared + rng.normal(size=(400, 3)) + offset[:, None]
    assert within_correlation(members, groups) == pytest.approx(0.5, abs=0.1)
    assert np.isnan(within_correlation(np.ones((400, 2)), groups))
    with pytest.raises(OneMemberError):
        within_correlation(members[:, :1], groups)


def test_outside_is_beyond_either_end() -> None:
    span = np.array([[-1.0, 0.0], [1.0, 2.0]])
    found = outside_range(np.array([[-2.0, 0.0], [0.0, 3.0]]), span)
    assert found.tolist() == [[True, False], [False, True]]
