"""At most n models in memory: the law over every model that is made, the scores, threads."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_rm import (
    FunctionScorer,
    RewardEnsemble,
    Sample,
    TrunkOptions,
    combine,
    load_preferences,
    stream_scores,
)
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.demo.data import FILE
from ensemble_rm.errors import OptionError
from ensemble_rm.evaluation import precision_report
from ensemble_rm.members import FullScorer, HeadScorer
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.trunk import Trunk, View
from ensemble_rm.members.branches.scorer import BranchScorer
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.scoring.model_pool import ModelPool

OPTIONS = TrunkOptions(max_length=48, device="cpu", token_budget=512)
SAMPLES = [Sample(f"prompt {i % 4}", "fox dog " * (1 + i * 5 % 7)) for i in range(24)]
LENGTH = FunctionScorer("length", lambda s: float(len(s.completion)))


@pytest.fixture(scope="module")
def models(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three reward models of a few thousand weights, each with a head of its own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folders = [tmp_path_factory.mktemp("models") / f"rm{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(small_folder, num_labels=1)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(small_folder).save_pretrained(folder)
    return folders


class Loads:
    """Counts the models that were made, and the most that were alive at once."""

    def __init__(self) -> None:
        self.made, self.most = 0, 0
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()

    def counting(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            model = load(*args, **options)
            with self._lock:
                self._alive.add(model)
                self.made += 1
                self.most = max(self.most, len(self._alive))
            return model

        return counted

    def forget(self) -> None:
        self.made = self.most = 0


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    found = Loads()
    for name in ("load_classifier", "load_trunk"):
        monkeypatch.setattr(bb, name, found.counting(getattr(bb, name)))
    return found


def of(*scorers: Any) -> RewardEnsemble:
    k = sum(len(scorer.names) for scorer in scorers)
    return RewardEnsemble(scorers, Normaliser.identity(k), mean())


def branches(folder: Path) -> BranchScorer:
    trunk = Trunk(bb.locate(folder), OPTIONS, top=3)
    rng = np.random.default_rng(0)
    weights = HeadWeights(np.zeros((2, 16)), np.ones((2, 16)), rng.normal(size=(2, 16)), np.ones(2))
    tensors = [dict(trunk.rest.state_dict())] * 2
    return BranchScorer(trunk.backbone, OPTIONS, [View(4, "mean")] * 2, weights, tensors, blocks=1)


@pytest.fixture
def every_kind(
    two_heads: Callable[..., HeadScorer], small_folder: Path, models: list[Path]
) -> Callable[[], RewardEnsemble]:
    """Make three whole models, two heads, two branches and a rule, none of them loaded."""

    def make() -> RewardEnsemble:
        whole = [FullScorer(bb.locate(folder), OPTIONS) for folder in models]
        return of(whole[0], two_heads(), *whole[1:], LENGTH, branches(small_folder))

    return make


@pytest.mark.parametrize("n", [1, 3])
def test_never_more_than_n_are_in_memory_and_scores_are_the_same(
    n: int, every_kind: Callable[[], RewardEnsemble], loads: Loads
) -> None:
    plain = every_kind()
    wanted = plain.score(SAMPLES)
    assert loads.most >= 5
    few = plain.with_max_loaded_models(n)
    del plain
    loads.forget()
    for turn in range(2):
        found = few.score(SAMPLES)
        np.testing.assert_array_equal(found.raw, wanted.raw)
        np.testing.assert_array_equal(found.truncation.prompts, wanted.truncation.prompts)
        # Those in memory score first, so that only the others are loaded.
        assert loads.made == 5 + turn * (5 - n)
    assert loads.most == n


def test_a_chunk_is_the_unit_of_a_stream(
    every_kind: Callable[[], RewardEnsemble], loads: Loads
) -> None:
    few = every_kind().with_max_loaded_models(1)
    loads.forget()
    whole = few.score(SAMPLES).raw
    made = {}
    for chunk in (12, 24):
        loads.forget()
        parts = stream_scores(few, SAMPLES, chunk=chunk)
        raw = np.concatenate([part.raw for part in parts])
        np.testing.assert_allclose(raw, whole, rtol=1e-4, atol=1e-5)
        made[chunk] = loads.made
    assert made == {12: 2 * 4, 24: 4}
    assert loads.most == 1


@pytest.mark.parametrize("n", [2, None])
def test_threads_share_the_room_and_disturb_no_score(
    n: int | None, every_kind: Callable[[], RewardEnsemble], loads: Loads
) -> None:
    few = every_kind().with_max_loaded_models(n)
    loads.forget()
    wanted = few.score(SAMPLES).raw
    other = few.with_aggregator(mean())  # made from it, and so bound by it
    parts = [SAMPLES[i::4] for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(
            threads.map(lambda i: (few if i % 2 else other).score(parts[i % 4]).raw, range(12))
        )
    for i, raw in enumerate(found):
        np.testing.assert_allclose(raw, wanted[i % 4 :: 4], rtol=1e-4, atol=1e-5)
    assert loads.most <= (n or 5)


def test_who_finds_no_room_waits_for_an_idle_model() -> None:
    class Held(FunctionScorer):
        has_model = True

        def __init__(self) -> None:
            super().__init__("held", lambda _: 0.0)
            self.unloads = 0

        def unload(self) -> None:
            self.unloads += 1

    pool, one, two = ModelPool(1), Held(), Held()
    entered = threading.Event()

    def second() -> None:
        with pool.using(two):
            entered.set()

    with pool.using(one), pool.using(one):  # used twice, held once
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.05) and not one.unloads
    waiting.join()
    assert entered.is_set() and (one.unloads, two.unloads) == (1, 0)
    assert pool.holds(two) and not pool.holds(one)
    with pytest.raises(ZeroDivisionError), pool.using(two):
        _ = 1 / 0
    with pool.using(one):
        pass
    assert (one.unloads, two.unloads) == (1, 1)  # a failure leaves no one in the way


def test_combining_and_precision_keep_to_it(
    models: list[Path], loads: Loads, tmp_path: Path
) -> None:
    pairs = load_preferences(FILE)[:40]
    members = {folder.name: folder for folder in models}
    ensemble = combine(members, pairs, options=OPTIONS, max_loaded_models=1)
    assert loads.most == 1
    plain = combine(members, pairs, options=OPTIONS)
    assert ensemble.normaliser == plain.normaliser and loads.most == 4
    saved = plain.save_pretrained(tmp_path / "run")
    del plain
    loads.forget()
    again = RewardEnsemble.from_pretrained(saved, device="cpu", max_loaded_models=1)
    np.testing.assert_array_equal(again.score(SAMPLES).raw, ensemble.score(SAMPLES).raw)
    assert loads.most == 2  # one of each ensemble
    del ensemble
    loads.forget()
    precision_report(again, SAMPLES)
    assert loads.most == 1
    again = again.with_max_loaded_models(None)
    loads.forget()
    again.score(SAMPLES)
    assert loads.most == 3
    with pytest.raises(OptionError, match="at least 1, not 0"):
        again.with_max_loaded_models(0)


def test_the_commands_keep_to_it(
    models: list[Path], loads: Loads, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = load_preferences(FILE)[:80].shuffled_sides(seed=0)
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in pairs))
    rows = tmp_path / "samples.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": s.prompt, "completion": s.completion}) + "\n" for s in SAMPLES
        )
    )
    one = ["--max-loaded-models=1", "--device=cpu", "--json"]
    members = [f"--member={folder}" for folder in models]
    assert main(["combine", *members, f"--data={data}", f"--out={run}", *one]) == 0
    assert loads.most == 1
    loads.forget()
    assert main(["score", str(run), f"--data={rows}", "--chunk=12", *one]) == 0
    assert loads.made == 3 + 2 and loads.most == 1
    for command in (["calibrate"], ["evaluate", "--draws=2"], ["compare"]):
        loads.forget()
        assert main([*command, str(run), f"--data={data}", *one]) in (0, 5)
        assert loads.made == 3 or command == ["compare"]  # which asks for a calibration first
        assert loads.most <= 1
    assert main(["score", str(run), f"--data={rows}", *one, "--max-loaded-models=0"]) == 2
    assert "at least 1" in capsys.readouterr().err
