"""Streams: one chunk in memory, the input's order, the scores of one call, no half-written file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ensemble_rm import (
    FunctionScorer,
    RewardEnsemble,
    Sample,
    combine,
    load_preferences,
    stream_scores,
)
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.data.loading import read_samples
from ensemble_rm.demo.data import FILE
from ensemble_rm.ensemble.streaming import chunks
from ensemble_rm.errors import BadRowsError, OptionError
from ensemble_rm.members.heads.scorer import HeadScorer

LENGTH = FunctionScorer("length", lambda s: float(len(s.completion)))
WORDS = FunctionScorer("words", lambda s: float(len(s.completion.split())))
RULES = RewardEnsemble((LENGTH, WORDS), Normaliser.identity(2), mean())


def answers(n: int, per_prompt: int = 3) -> list[Sample]:
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "den", "warm", "quick", "over", "lazy"]
    return [
        Sample(f"prompt {i // per_prompt}", " ".join(rng.choice(words, rng.integers(1, 30))))
        for i in range(n)
    ]


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 12))
def test_chunks_keep_the_order_and_part_no_prompt_that_fits(sizes: list[int], size: int) -> None:
    samples = [Sample(f"p{i}", str(j)) for i, n in enumerate(sizes) for j in range(n)]
    parts = list(chunks(iter(samples), size))
    assert [s for part in parts for s in part] == samples
    assert all(1 <= len(part) <= size for part in parts)
    for i, n in enumerate(sizes):
        holding = sum(any(s.prompt == f"p{i}" for s in part) for part in parts)
        if n <= size:
            assert holding == 1


def test_the_source_is_at_most_a_chunk_ahead_of_the_writer() -> None:
    read, written, ahead = 0, 0, []

    def source() -> Iterator[Sample]:
        nonlocal read
        while True:  # read eagerly, it would never end
            read += 1
            ahead.append(read - written)
            yield Sample(f"p{read // 3}", "x" * (read % 7))

    for scores in stream_scores(RULES, source(), chunk=50):
        written += len(scores.reward)
        if written > 5000:
            break
    assert max(ahead) <= 51


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    code = """
import re, resource
from pathlib import Path
from ensemble_rm import FunctionScorer, RewardEnsemble, Sample, stream_scores
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
rules = [FunctionScorer(n, lambda s: float(len(s.completion))) for n in "ab"]
ensemble = RewardEnsemble(rules, Normaliser.identity(2), mean())
def peak(n):
    samples = (Sample(f"p{i}", "x" * 2000 + str(i)) for i in range(n))
    for _ in stream_scores(ensemble, samples, chunk=500): pass
    status = Path("/proc/self/status")  # ru_maxrss begins with what the parent had when it forked
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
few = peak(2_000)
print(peak(50_000) / few)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.05  # all 50,000 texts would be 100 MB


def test_a_stream_scores_as_one_call_does(two_heads: Callable[..., HeadScorer]) -> None:
    reference = load_preferences(FILE)[:60]
    ensemble = combine({"a": two_heads(), "b": LENGTH}, reference)
    samples = answers(100)
    whole = ensemble.score(samples)
    counts: list[tuple[str, int, int]] = []
    parts = list(
        stream_scores(ensemble, samples, chunk=17, progress=lambda *said: counts.append(said))
    )
    found = np.concatenate([part.reward for part in parts])
    assert np.abs(found - whole.reward).max() < 1e-4 * whole.reward.std()
    members = np.concatenate([part.members for part in parts])
    assert np.abs(members - whole.members).max() < 1e-4
    assert sum(part.truncation.samples for part in parts) == 100
    done = [count for _, count, _ in counts]
    assert done == sorted(done) and done[-1] == 100
    assert {total for *_, total in counts} == {0}


def test_no_samples_and_no_chunk() -> None:
    assert list(stream_scores(RULES, [])) == []
    with pytest.raises(OptionError, match="not 0"):
        stream_scores(RULES, [], chunk=0)


@pytest.fixture
def saved(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    reference = load_preferences(FILE)[:60]
    return combine({"a": two_heads()}, reference).save_pretrained(tmp_path / "run")


def write(path: Path, samples: list[Sample], bad: int | None = None) -> Path:
    rows = [json.dumps({"prompt": s.prompt, "completion": s.completion}) for s in samples]
    if bad is not None:
        rows[bad] = "nonsense"
    path.write_text("".join(row + "\n" for row in rows))
    return path


def test_the_command_streams(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = answers(60)
    data, out = write(tmp_path / "samples.jsonl", samples), tmp_path / "scores.jsonl"
    command = ["score", str(saved), f"--data={data}", "--device=cpu"]
    assert main([*command, f"--out={out}", "--chunk=7", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["samples"] == 60 and said["completions_cut"] == 0
    whole = RewardEnsemble.from_pretrained(saved, device="cpu").score(samples)
    rewards = [json.loads(line)["reward"] for line in out.read_text().splitlines()]
    np.testing.assert_allclose(rewards, whole.reward, atol=1e-4)
    assert main([*command, "--chunk=25"]) == 0
    rewards = [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(rewards, whole.reward, atol=1e-4)
    write(data, [])
    assert main([*command, f"--out={out}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 0 and out.read_text() == ""
    assert main([*command, "--chunk=0"]) == 2


def test_a_failure_in_mid_file_leaves_no_finished_file(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "samples.jsonl", answers(40), bad=30)
    out = tmp_path / "scores.jsonl"
    command = ["score", str(saved), f"--data={data}", f"--out={out}", "--device=cpu"]
    assert main([*command, "--chunk=9"]) == 3
    assert ":31: not JSON" in capsys.readouterr().err
    assert not out.exists()
    rows = (tmp_path / "scores.jsonl.partial").read_text().splitlines()
    assert len(rows) == 27  # the chunks that were done
    write(data, answers(40))
    assert main([*command, "--chunk=9"]) == 0
    assert len(out.read_text().splitlines()) == 40
    assert not (tmp_path / "scores.jsonl.partial").exists()


def test_bad_rows_come_when_they_are_reached() -> None:
    samples = read_samples([{"prompt": "p", "completion": "x"}, {"prompt": "p"}])
    with pytest.raises(BadRowsError, match=":2:"):
        list(stream_scores(RULES, samples, chunk=1))
