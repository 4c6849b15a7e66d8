"""What to ask next: the pairs that are picked, and the tasks that come back as judgments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import (
    FunctionScorer,
    Preference,
    Preferences,
    RewardEnsemble,
    Sample,
    select_pairs,
)
from ensemble_rm.active_learning import SelectedPairs, to_tasks
from ensemble_rm.active_learning.acquisition import PoolMargins, score_pool, utility
from ensemble_rm.active_learning.tasks import FORMATS, label_studio_config
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.data import inclusion_weights
from ensemble_rm.data.loading import read_comparisons
from ensemble_rm.data.samples import as_prompt
from ensemble_rm.errors import (
    DataError,
    NotCalibratedError,
    OneMemberError,
    OptionError,
)
from ensemble_rm.judgments.imports.formats import ImportOptions
from ensemble_rm.judgments.imports.importing import import_judgments
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.uncertainty.disagreement import member_std, split_uncertainty


def length(sample: Sample) -> float:
    return len(sample.completion) / 10


def vowels(sample: Sample) -> float:
    return sum(map(sample.completion.count, "aeiou"))


def made_pool(n: int = 120, *, prompts: int = 60, seed: int = 0) -> Preferences:
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        one, two = ("".join(rng.choice(list("abcdei "), rng.integers(3, 40))) for _ in range(2))
        name = None if i % 2 else f"pair-{i}"
        pairs.append(Preference(f"prompt {i % prompts}", f"{one} {i}", two, subset="s", id=name))
    return Preferences(tuple(pairs), "pool.jsonl")


@pytest.fixture(scope="module")
def ensemble() -> RewardEnsemble:
    """Two rules, calibrated on verdicts of a third."""
    rng = np.random.default_rng(1)
    members = (FunctionScorer("length", length), FunctionScorer("vowels", vowels))
    plain = RewardEnsemble(members, Normaliser((0.0, 0.0), (1.0, 2.0)), mean())
    rows = []
    for pair in made_pool(400, prompts=400, seed=9):
        longer = len(pair.chosen) + rng.logistic(scale=9.0) > len(pair.rejected)
        rows.append(pair if longer else pair.swap())
    return plain.calibrate(Preferences(tuple(rows)))


def test_utilities_are_those_of_their_formulas(ensemble: RewardEnsemble) -> None:
    pool = made_pool()
    found = score_pool(ensemble, pool, chunk=7)
    verdict = ensemble.compare(
        [p.prompt for p in pool], [p.chosen for p in pool], [p.rejected for p in pool]
    )
    np.testing.assert_array_equal(found.margin, verdict.margin)
    np.testing.assert_array_equal(found.member_margins, verdict.member_margins)
    np.testing.assert_array_equal(utility(found, "bald"), verdict.epistemic)
    np.testing.assert_array_equal(utility(found, "disagreement"), member_std(found.member_margins))
    assert utility(found, "random") is None
    small = utility(found, "margin")
    assert small is not None
    order = np.argsort(-np.abs(verdict.probability - 0.5), kind="stable")
    assert (np.diff(small[order]) >= -1e-12).all()


def test_no_utility_depends_on_which_side_stands_first(ensemble: RewardEnsemble) -> None:
    pool = made_pool()
    turned = Preferences(tuple(pair.swap() for pair in pool))
    for strategy in ("bald", "margin", "disagreement"):
        one, two = (utility(score_pool(ensemble, p), strategy) for p in (pool, turned))
        assert one is not None and two is not None
        np.testing.assert_allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("strategy", ["bald", "margin", "disagreement"])
def test_the_picked_are_worth_more(ensemble: RewardEnsemble, strategy: str) -> None:
    pool = made_pool(400, prompts=400)
    value = utility(score_pool(ensemble, pool), strategy)
    assert value is not None
    place = {(p.prompt, *sorted((p.chosen, p.rejected))): i for i, p in enumerate(pool)}
    found = select_pairs(ensemble, pool, budget=60, strategy=strategy, seed=4)
    rows = [place[(p.prompt, *sorted((p.first, p.second)))] for p in found.pairs]
    ranks = np.argsort(np.argsort(value)) / len(value)
    assert ranks[rows].mean() > 0.6
    inclusion = np.array([p.inclusion for p in found.pairs])
    assert np.corrcoef(ranks[rows], inclusion)[0, 1] > 0.5


def test_the_weighted_pool_is_the_pool(ensemble: RewardEnsemble) -> None:
    """Over many seeds, what the selected say of the pool by their weights is right."""
    pool = made_pool(150, prompts=60)
    y = {frozenset((p.chosen, p.rejected)): float(len(p.chosen)) for p in pool}
    found = []
    for seed in range(400):
        picked = select_pairs(ensemble, pool, budget=30, strategy="disagreement", seed=seed).pairs
        found.append(sum(y[frozenset((p.first, p.second))] / p.inclusion for p in picked) / 150)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - np.mean(list(y.values()))) < 4 * error


def test_sides_are_fair_coins_and_seeds_repeat(ensemble: RewardEnsemble) -> None:
    pool = made_pool(900, prompts=900)
    options: dict[str, Any] = {"budget": 600, "strategy": "margin"}
    one = select_pairs(ensemble, pool, seed=1, **options)
    assert one == select_pairs(ensemble, pool, seed=1, **options)
    assert one.pairs != select_pairs(ensemble, pool, seed=2, **options).pairs
    firsts = {(p.prompt, p.chosen) for p in pool}
    kept = sum((p.prompt, p.first) in firsts for p in one.pairs)
    assert abs(kept - 300) < 4.5 * np.sqrt(150)


def test_prompts_have_their_limit(ensemble: RewardEnsemble) -> None:
    pool = made_pool(120, prompts=10)
    for most, budget in ((1, 10), (2, 17), (5, 40)):
        found = select_pairs(ensemble, pool, budget=budget, max_per_prompt=most, seed=3)
        counts = np.unique([p.prompt for p in found.pairs], return_counts=True)[1]
        assert len(found) == budget and counts.max() <= most


def test_what_needs_no_judgment_is_left_out_and_counted() -> None:
    pairs = list(made_pool(20))
    again = Preference(pairs[3].prompt, pairs[3].rejected, pairs[3].chosen)
    same = Preference("prompt", "alike", "alike")
    found = select_pairs(
        None, Preferences((*pairs, again, same)), budget=20, strategy="random", max_per_prompt=None
    )
    assert (found.pool, found.repeated, found.equal_sides) == (20, 1, 1)
    assert len({p.external_id for p in found.pairs}) == 20
    named = {p.external_id for p in found.pairs if p.external_id.startswith("pair-")}
    assert named == {f"pair-{i}" for i in range(0, 20, 2)}


def test_what_cannot_be_selected_is_refused(ensemble: RewardEnsemble) -> None:
    pool = made_pool(20)
    single = RewardEnsemble(ensemble.scorers[:1], Normaliser.identity(1), mean())
    plain = RewardEnsemble(ensemble.scorers, ensemble.normaliser, mean())
    with pytest.raises(NotCalibratedError, match="calibrate"):
        select_pairs(plain, pool, budget=5)
    with pytest.raises(OneMemberError):
        select_pairs(single, pool, budget=5, strategy="disagreement")
    with pytest.raises(OptionError, match="needs an ensemble"):
        select_pairs(None, pool, budget=5)
    with pytest.raises(OptionError, match="strategy"):
        select_pairs(ensemble, pool, budget=5, strategy="best")
    with pytest.raises(OptionError, match="strategy"):
        utility(PoolMargins(np.zeros(1), np.zeros((1, 2))), "best")
    with pytest.raises(OptionError, match="budget"):
        select_pairs(ensemble, pool, budget=21, max_per_prompt=None)
    with pytest.raises(DataError):
        select_pairs(None, Preferences(()), budget=1, strategy="random")
    double = Preferences((Preference("a", "b", "c", id="x"), Preference("a", "b", "d", id="x")))
    with pytest.raises(DataError, match="'x'"):
        select_pairs(None, double, budget=1, strategy="random")


def test_bald_needs_what_it_says() -> None:
    margins = PoolMargins(np.zeros(2), np.array([[1.0, -1.0], [1.0, 1.0]]), 0.7)
    wanted = split_uncertainty(margins.member_margins, mixture_temperature=0.7).epistemic
    np.testing.assert_array_equal(utility(margins, "bald"), wanted)


# The tools, and back --------------------------------------------------------------------------


def answered(form: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the tool exports after one annotator always took the left, or the first."""
    told = "2026-11-01T10:00:00Z"
    if form == "jsonl":
        return [row | {"outcome": "first", "annotator": "ann", "judged_at": told} for row in rows]
    if form == "argilla":
        response = [{"value": "first", "user_id": "ann"}]
        return [row | {"responses": {"better": response}, "status": "completed"} for row in rows]
    result = {"from_name": "comparison", "to_name": "answer1,answer2", "type": "pairwise"}
    return [
        {"id": i, "data": row["data"]}
        | {
            "annotations": [
                {
                    "id": 100 + i,
                    "completed_by": 7,
                    "was_cancelled": False,
                    "result": [result | {"value": {"selected": "left"}}],
                    "created_at": told,
                    "updated_at": told,
                }
            ]
        }
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def selected(ensemble: RewardEnsemble) -> SelectedPairs:
    turns = as_prompt([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    pool = Preferences((*made_pool(40, prompts=40), Preference(turns, "one thing", "no")))
    return select_pairs(ensemble, pool, budget=41, max_per_prompt=None, strategy="bald", seed=1)


@pytest.mark.parametrize("form", FORMATS)
def test_answers_come_back_with_their_probability(
    form: str, selected: SelectedPairs, tmp_path: Path
) -> None:
    from datetime import UTC, datetime

    rows = answered(form, to_tasks(selected, form, batch="november", policy="p7"))
    file = tmp_path / "answers.json"
    many = "\n".join(json.dumps(row) for row in rows) if form == "jsonl" else json.dumps(rows)
    file.write_text(many)
    options = ImportOptions(source="project", judged_at=datetime(2026, 11, 1, tzinfo=UTC))
    with JudgmentStore.create(tmp_path / "store.db") as store:
        found = import_judgments(store, file, format=form, options=options)
        assert found.added == len(selected) and not found.problems
        assert import_judgments(store, file, format=form, options=options).added == 0
        stored = list(store.read())
    wanted = {(p.prompt, p.first, p.second): p for p in selected.pairs}
    for one in stored:
        pair = wanted.pop((one.prompt, one.first, one.second))
        assert (one.strategy, one.inclusion) == ("bald", pair.inclusion)
        assert (one.batch, one.policy, one.subset) == ("november", "p7", pair.subset)
        assert one.outcome == "first"
        if form == "argilla":
            assert one.external_id == f"{pair.external_id}:ann"
        elif form == "jsonl":
            assert one.external_id.startswith("derived:")
    assert not wanted
    weights = inclusion_weights([one.inclusion for one in stored], [one.batch for one in stored])
    assert weights.effective == pytest.approx(selected.weights.effective)


def test_the_labelling_interface_names_the_fields(selected: SelectedPairs) -> None:
    from xml.etree import ElementTree

    for messages in (False, True):
        tree = ElementTree.fromstring(label_studio_config(messages=messages))
        shown = {node.get("value", "").removeprefix("$") for node in tree.iter()} - {""}
        (task, *_) = to_tasks(selected, "label-studio")
        assert shown <= set(task["data"]) and len(shown) == 3
        (control,) = tree.iter("Pairwise")
        assert control.get("toName") == "answer1,answer2"
    with pytest.raises(OptionError, match="format"):
        to_tasks(selected, "csv")


# The command ----------------------------------------------------------------------------------


@pytest.fixture
def pool_file(tmp_path: Path) -> Path:
    file = tmp_path / "pool.jsonl"
    rows = [
        {"prompt": p.prompt, "first": p.chosen, "second": p.rejected, "id": f"n{i}"}
        for i, p in enumerate(made_pool(30))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_command_writes_what_the_tools_read(
    pool_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--pool={pool_file}", "--budget=10", "--strategy=random", "--seed=2"]
    for form in FORMATS:
        out = tmp_path / form / "out"
        words = ["select", "never-opened", *options, f"--format={form}", f"--out={out}", "--json"]
        assert main([*words, "--dry-run"]) == 0
        dry = json.loads(capsys.readouterr().out)
        assert dry["dry_run"] and not out.exists()
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == dry | {"dry_run": False}
        text = out.read_text()
        rows = [json.loads(line) for line in text.splitlines()] if form == "jsonl" else None
        rows = json.loads(text) if rows is None else rows
        wanted = select_pairs(
            None, read_comparisons(pool_file), budget=10, strategy="random", seed=2
        )
        assert rows == to_tasks(wanted, form)
        assert dry["selected"] == 10 and dry["pool"] == 30 and dry["effective"] == pytest.approx(10)


def test_the_command_scores_with_the_ensemble(
    pool_file: Path, tmp_path: Path, two_heads: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    RewardEnsemble((two_heads(),), Normaliser.identity(2), mean()).save_pretrained(run)
    words = ["select", str(run), f"--pool={pool_file}", "--budget=5", "--json"]
    assert main([*words, "--strategy=disagreement"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 5 and {row["strategy"] for row in rows} == {"disagreement"}
    assert main(words) == 5  # BALD, and no calibration
    assert "NotCalibratedError" in capsys.readouterr().out
    assert main([*words, "--budget=99", "--strategy=margin"]) == 2
    assert "budget" in capsys.readouterr().err
