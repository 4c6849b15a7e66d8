"""Kept scores: the same with and without, one digest a member, bounded, two processes at once."""

from __future__ import annotations

import copy
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_rm import FunctionScorer, Message, RewardEnsemble, Sample, TrunkOptions, View
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.members import BranchScorer, FullScorer, HeadScorer
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.vector_store import VectorStore
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.scorer import MemberScores, Truncation
from ensemble_rm.scoring import ScoreCache

SAMPLES = [Sample(f"prompt {i % 4}", "fox dog " * (1 + i * 5 % 37)) for i in range(40)]


def ensemble_of(*scorers: Any) -> RewardEnsemble:
    k = sum(len(scorer.names) for scorer in scorers)
    return RewardEnsemble(scorers, Normaliser.identity(k), mean())


def refuse(*_args: Any, **_options: Any) -> Any:
    pytest.fail("scored, though every score was kept")


def test_scores_are_identical_with_and_without_and_models_stay_unloaded(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    length = FunctionScorer("length", lambda s: float(len(s.completion)))
    plain = ensemble_of(two_heads(), length).score(SAMPLES)
    cold = ensemble_of(two_heads(), length).with_score_cache(ScoreCache(tmp_path)).score(SAMPLES)
    heads: Any = two_heads()
    heads.score_detailed = refuse
    kept = ensemble_of(heads, length).with_score_cache(ScoreCache(tmp_path))
    order = np.random.default_rng(0).permutation(len(SAMPLES))
    warm = kept.score([SAMPLES[i] for i in order])
    np.testing.assert_array_equal(cold.raw, plain.raw)
    np.testing.assert_array_equal(warm.raw, plain.raw[order])
    assert 0 < plain.truncation.completions_cut < len(SAMPLES)
    np.testing.assert_array_equal(warm.truncation.prompts, plain.truncation.prompts[order])
    np.testing.assert_array_equal(cold.truncation.completions, plain.truncation.completions)
    np.testing.assert_array_equal(warm.truncation.completions, plain.truncation.completions[order])
    assert heads._trunk is None
    assert len(ScoreCache(tmp_path)) == len(SAMPLES)
    unread = ensemble_of(two_heads()).with_score_cache(ScoreCache(tmp_path))
    assert unread.score([]).raw.shape == (0, 2)


def test_equal_samples_are_scored_once_and_others_are_not_mixed_up(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    asked: list[int] = []

    def compute(samples: Sequence[Sample]) -> MemberScores:
        asked.append(len(samples))
        scores = np.arange(float(len(samples)))[:, None]
        return MemberScores(scores, Truncation.none(len(samples)))

    turn = (Message("user", "a"),)
    samples = [Sample("a", "b"), Sample("a", "b", "reference"), Sample("ab", ""), Sample(turn, "b")]
    found = cache.scores("x", samples, compute)
    assert found.scores[:, 0].tolist() == [0, 0, 1, 2] and asked == [3]
    cache.scores("x", samples[::-1], compute)
    assert asked == [3]
    cache.scores("y", samples, compute)
    assert asked == [3, 3]


def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    answers = [np.array([[np.nan], [1.0]]), np.array([[2.0]])]

    def compute(samples: Sequence[Sample]) -> MemberScores:
        scores = answers.pop(0)
        reasons = {0: ValueError("no score")} if np.isnan(scores[0, 0]) else {}
        return MemberScores(scores, Truncation.none(len(samples)), errors=reasons)

    cache, samples = ScoreCache(tmp_path), [Sample("p", "a"), Sample("p", "b")]
    first = cache.scores("x", [*samples, samples[0]], compute)
    assert np.isnan(first.scores[[0, 2], 0]).all()
    assert sorted(first.errors) == [0, 2]  # each row knows why
    again = cache.scores("x", samples, compute)
    assert again.scores[:, 0].tolist() == [2.0, 1.0] and not again.errors


def test_a_changed_head_never_reads_old_scores(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    heads = two_heads()
    renamed = copy.copy(heads)
    renamed.names = ("a", "b")
    assert two_heads().digest == renamed.digest == two_heads(token_budget=64).digest
    others = [
        two_heads(seed=1),
        two_heads(max_length=32),
        two_heads(dtype="bfloat16"),
        two_heads(template="plain"),
        HeadScorer(heads.backbone, heads.options, heads.views[::-1], heads.weights),
        HeadScorer(replace(heads.backbone, digest="0"), heads.options, heads.views, heads.weights),
    ]
    assert len({heads.digest, *(other.digest for other in others)}) == 7
    cache = ScoreCache(tmp_path)
    for scorer in (heads, others[0]):
        plain = ensemble_of(scorer).score(SAMPLES)
        kept = ensemble_of(scorer).with_score_cache(cache).score(SAMPLES)
        np.testing.assert_array_equal(kept.raw, plain.raw)


def test_a_changed_tokenizer_never_reads_old_scores(minilm_folder: Path, tmp_path: Path) -> None:
    for file in minilm_folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    options = TrunkOptions(device="cpu")
    one = FullScorer(locate(tmp_path), options).digest
    assert FullScorer(locate(minilm_folder), options, name="x").digest == one
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said | {"do_lower_case": False}))
    assert FullScorer(locate(tmp_path), options).digest != one
    assert FullScorer(locate(minilm_folder), options, pooling="attended").digest != one


def test_a_branchs_weights_are_in_its_digest(small_folder: Path) -> None:
    found = locate(small_folder)
    heads = HeadWeights(np.zeros((1, 16)), np.ones((1, 16)), np.ones((1, 16)), np.zeros(1))

    def make(weight: torch.Tensor, dtype: str = "float32") -> str:
        options = TrunkOptions(device="cpu", dtype=dtype)
        tensors = [{"0.w": weight}]
        return BranchScorer(found, options, [View(4, "last")], heads, tensors, blocks=1).digest

    one = torch.arange(6.0).reshape(2, 3)
    assert make(one) == make(one.clone()) != make(one + 1)
    assert make(one) != make(one.reshape(3, 2)) and make(one, "bfloat16") != make(one)


def test_a_full_cache_forgets_the_oldest_of_any_width(tmp_path: Path) -> None:
    store = VectorStore(tmp_path, name="s", dtype="<f8", max_bytes=1000, overhead=20)
    wide, narrow = np.ones((9, 10)), np.zeros((30, 1))
    store.put([b"w%d" % i for i in range(9)], wide)  # 100 bytes each
    assert len(store) == 9
    store.put([b"n%d" % i for i in range(30)], narrow)  # 28 bytes each
    assert set(store.get([b"w%d" % i for i in range(9)])) == {b"w8"}
    store.put([b"n%d" % i for i in range(30)], narrow + 1)  # they are there already
    assert len(store) == 31 and not store.get([b"n3"])[b"n3"].any()
    for i in range(40):
        store.put([b"m%d" % i], narrow[:1])
    assert len(VectorStore(tmp_path, name="s", dtype="<f8", max_bytes=1000, overhead=20)) == 35


def test_an_older_file_is_measured_when_it_is_opened(tmp_path: Path) -> None:
    store = VectorStore(tmp_path, name="s", dtype="<f8", max_bytes=1000)
    store.put([b"%d" % i for i in range(9)], np.ones((9, 5)))
    with store._open() as db:
        db.execute("DROP TABLE held")
    again = VectorStore(tmp_path, name="s", dtype="<f8", max_bytes=80)
    again.put([b"x"], np.ones((1, 5)))
    assert set(again.get([b"%d" % i for i in range(9)])) == {b"8"} and len(again) == 2


def test_who_makes_the_file_at_the_same_time_is_waited_for(tmp_path: Path) -> None:
    """SQLite itself does not, where the journal's mode is set."""
    other = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(VectorStore, tmp_path, name="s", dtype="<f8", max_bytes=1000)
        with pytest.raises(TimeoutError):
            opening.result(0.3)
        other.execute("ROLLBACK")
        assert len(opening.result()) == 0
    other.close()


WRITER = """
import sys
import numpy as np
from pathlib import Path
from ensemble_rm.members.backbone.vector_store import VectorStore
store = VectorStore(Path(sys.argv[1]), name="scores", dtype="<f8", max_bytes=200 * 24)
seed = int(sys.argv[2])
seen = 0
for turn in range(60):
    numbers = np.random.default_rng((seed, turn)).integers(0, 500, 20)
    keys = [b"%d" % n for n in numbers]
    for key, vector in store.get(keys).items():
        assert vector.tolist() == [float(key), -float(key), 0.5], (key, vector)
        seen += 1
    store.put(keys, np.stack([numbers, -numbers, np.full(20, 0.5)], axis=1).astype(float))
print(seen)
"""


def test_two_processes_write_and_read_at_once(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    for process in started:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert int(out) > 0
    store = VectorStore(tmp_path, name="scores", dtype="<f8", max_bytes=200 * 24)
    assert len(store) == 200  # full to the brim, and no further
    with store._open() as db:
        (held,) = db.execute("SELECT bytes FROM held").fetchone()
    assert held == 200 * 24


def test_the_command_keeps_scores(
    two_heads: Callable[..., HeadScorer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = ensemble_of(two_heads()).save_pretrained(tmp_path / "run")
    data = tmp_path / "samples.jsonl"
    rows = [{"prompt": s.prompt, "completion": s.completion} for s in SAMPLES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", str(run), f"--data={data}", "--device=cpu", "--chunk=16"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    kept = [*command, f"--score-cache={tmp_path / 'scores'}"]
    assert main(kept) == 0
    assert capsys.readouterr().out == plain
    monkeypatch.setattr(HeadScorer, "score_detailed", refuse)
    assert main(kept) == 0
    assert capsys.readouterr().out == plain
    (tmp_path / "scores" / "scores.sqlite").write_bytes(b"no database" * 100)
    assert main(kept) == 4
    assert "delete it" in capsys.readouterr().err
