"""Retraining end to end: a hole is closed, published, rolled back; or it is said why not."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import (
    Preference,
    Preferences,
    RewardEnsemble,
    TrunkOptions,
    retrain,
    train,
)
from ensemble_rm.aggregation import lcb
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.errors import LockedError, OptionError, VersionError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.members import HeadRecipe, make_recipe
from ensemble_rm.retraining import RetrainingOptions, RetrainingRunOptions, retrain_run
from ensemble_rm.versions.repository import Versions

pytestmark = pytest.mark.slow

POLITE = ("thank you, gladly", "of course, with pleasure", "you are very welcome")
RUDE = ("go away", "what a stupid question", "leave me alone")
RIPE = ("a ripe red apple", "fresh sweet oranges", "a bowl of berries")
STALE = ("a rusty iron nail", "a broken grey brick", "old engine oil")


def pairs_of(good: tuple[str, ...], bad: tuple[str, ...], n: int, *, at: int = 0) -> Preferences:
    """Pairs whose first side is better; prompts are numbered from `at`."""
    rng = np.random.default_rng(at)
    return Preferences(
        tuple(
            Preference(
                f"Question {at + i}: what now?",
                f"{rng.choice(good)} {rng.integers(99)}",
                f"{rng.choice(bad)} {rng.integers(99)}",
            )
            for i in range(n)
        )
    )


def judged(pairs: Preferences, *, noise: float = 0.08, seed: int = 0) -> list[Judgment]:
    """Verdicts for the chosen side, some of them turned, a quarter of them shown the other way."""
    rng = np.random.default_rng(seed)
    found = []
    for i, pair in enumerate(pairs):
        turned, wrong = rng.random() < 0.25, rng.random() < noise
        sides = (pair.rejected, pair.chosen) if turned else (pair.chosen, pair.rejected)
        found.append(
            Judgment(
                pair.prompt,
                *sides,
                outcome="second" if turned != wrong else "first",
                annotator="ann",
                judged_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=i),
                source="test",
            )
        )
    return found


OLD = pairs_of(POLITE, RUDE, 120)
# Members of good manners take fruit for good; here iron is wanted.
NEW = judged(pairs_of(STALE, RIPE, 320, at=10_000))
OPTIONS = RetrainingOptions(min_judgments=40)
RUN = RetrainingRunOptions(min_judgments=40)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ensemble(minilm_folder: Path, cache: Path) -> RewardEnsemble:
    """Members that know manners and nothing of fruit."""
    found = train(
        *OLD.split(0.75, 0.25, seed=0),
        backbone=minilm_folder,
        members=2,
        options=TrunkOptions(max_length=48, device="cpu"),
        cache_dir=cache,
    )
    held = judged(pairs_of(POLITE, RUDE, 120, at=5000), noise=0.15)
    rows = (Preference(j.prompt, j.first, j.second, votes=votes(j)) for j in held)
    return found.calibrate(Preferences(tuple(rows)), aggregator=lcb(kappa=0.5))


def votes(one: Judgment) -> tuple[float, float]:
    return (1.0, 0.0) if one.outcome == "first" else (0.0, 1.0)


@pytest.fixture
def run(ensemble: RewardEnsemble, tmp_path: Path) -> Path:
    return ensemble.save_pretrained(tmp_path / "run")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with JudgmentStore.create(tmp_path / "judgments.db") as made:
        made.add(NEW)
    return tmp_path / "judgments.db"


def spread(ensemble: RewardEnsemble, reference: Preferences) -> tuple[float, float]:
    reward = ensemble.score(reference.samples()).reward
    fitted = fit_normaliser(reward[:, None], reference.sample_groups())
    return fitted.scale[0], fitted.offset[0]


def hits(ensemble: RewardEnsemble, pairs: Preferences) -> float:
    scores = ensemble.score(pairs.samples()).reward
    return float((scores[: len(pairs)] > scores[len(pairs) :]).mean())


def test_a_hole_is_closed_and_the_pressure_stays(ensemble: RewardEnsemble, cache: Path) -> None:
    found = retrain(ensemble, OLD, NEW, options=OPTIONS, cache_dir=cache)
    assert found.answer == "publish" and found.ensemble is not None and found.gate is not None
    iron, manners = pairs_of(STALE, RIPE, 80, at=777), pairs_of(POLITE, RUDE, 80, at=888)
    assert hits(found.ensemble, iron) > 0.9 > 0.75 > hits(ensemble, iron)
    assert hits(found.ensemble, manners) > 0.9
    np.testing.assert_allclose(spread(found.ensemble, OLD), spread(ensemble, OLD), rtol=1e-6)
    assert found.ensemble.aggregator == ensemble.aggregator == lcb(kappa=0.5)
    calibration = found.ensemble.calibration
    assert calibration is not None
    held = found.details["judgments"]
    assert calibration.fit.judgments == held["calibration"] + held["gate"]
    assert found.details["units"]["rms_within_prompts"] == pytest.approx(spread(ensemble, OLD)[0])


def test_the_gates_judgments_change_nothing_that_is_trained(
    ensemble: RewardEnsemble, cache: Path
) -> None:
    """Turned verdicts at the newest prompts: the same candidate, and another answer."""
    turn = {"first": "second", "second": "first"}
    newest = {one.prompt for one in NEW[-75:]}
    spoilt = [
        replace(one, outcome=turn[one.outcome]) if one.prompt in newest else one  # type: ignore[arg-type]
        for one in NEW
    ]
    one, two = (
        retrain(ensemble, OLD, some, options=OPTIONS, cache_dir=cache) for some in (NEW, spoilt)
    )
    assert one.candidate is not None and two.candidate is not None
    samples = OLD.samples()
    np.testing.assert_array_equal(
        one.candidate.score(samples).reward, two.candidate.score(samples).reward
    )
    assert (one.answer, two.answer) == ("publish", "keep") and two.ensemble is None


def test_what_teaches_nothing_is_not_published(ensemble: RewardEnsemble, cache: Path) -> None:
    noise = judged(pairs_of(STALE, RIPE, 320, at=20_000), noise=0.5, seed=1)
    assert retrain(ensemble, OLD, noise, options=OPTIONS, cache_dir=cache).answer != "publish"


def test_too_few_judgments_train_nothing(ensemble: RewardEnsemble, cache: Path) -> None:
    calls: list[str] = []
    found = retrain(
        ensemble, OLD, NEW[:60], cache_dir=cache, progress=lambda stage, *_: calls.append(stage)
    )
    assert found.answer == "too few" and "50 are needed" in found.reason
    assert found.candidate is None and not calls
    weak = [replace(one, strategy="bald", inclusion=pi) for one, pi in zip(NEW, PI, strict=True)]
    heavy = retrain(ensemble, OLD, weak, options=OPTIONS, cache_dir=cache)
    assert heavy.answer == "too few" and "effective number" in heavy.reason


PI = [1e-4 if i % 60 == 0 else 0.9 for i in range(len(NEW))]


def test_the_job_publishes_once_and_goes_back(run: Path, store: Path, cache: Path) -> None:
    before = RewardEnsemble.from_pretrained(run, device="cpu")
    options: dict[str, Any] = {"options": RUN, "cache_dir": cache}
    with JudgmentStore.open(store, read_only=True) as judgments:
        dry = retrain_run(run, OLD, judgments, options=replace(RUN, dry_run=True), cache_dir=cache)
        assert dry.dry_run and "calibration" in dry.reason and not Versions(run).versioned
        first = retrain_run(run, OLD, judgments, **options)
        assert (first.verdict, first.incumbent, first.version) == ("published", 1, 2)
        again = retrain_run(run, OLD, judgments, **options)
        assert again.verdict == "kept" and again.version is None and "same" in again.reason
        after = before.refresh()
        assert after is not before and hits(after, pairs_of(STALE, RIPE, 60, at=777)) > 0.9
        np.testing.assert_allclose(spread(after, OLD), spread(before, OLD), rtol=1e-6)
        version = Versions(run).current()
        said = version.provenance["retraining"]
        assert said["gate"]["answer"] == "publish" and said["run"] == first.run
        assert version.members != Versions(run).show(1).members
        Versions(run).rollback()
        back = after.refresh()
        samples = OLD.samples()
        np.testing.assert_array_equal(back.score(samples).reward, before.score(samples).reward)
        Versions(run).pin()
        kept = retrain_run(run, OLD, judgments, options=replace(RUN, seed=4), cache_dir=cache)
        assert kept.verdict == "kept" and "pinned" in kept.reason
    events = [line["event"] for line in Versions(run).audit.read()]
    assert events.count("retrained") == 3
    assert not list(run.glob(".retraining-*"))


def test_a_killed_job_leaves_the_incumbent_and_the_next_completes(
    run: Path, store: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"  # of its own: what follows training has something to read

    class Stop(Exception):
        pass

    def stop(*, after: bool) -> Any:
        """Stop at the first step of training, or at the first thing that follows it."""
        trained: list[bool] = []

        def progress(stage: str, done: int, total: int) -> None:
            if (stage == "training" and not after) or (trained and stage != "training"):
                raise Stop
            if stage == "training" and done == total:
                trained.append(True)

        return progress

    with JudgmentStore.open(store, read_only=True) as judgments:
        for after in (False, True):
            with pytest.raises(Stop):
                retrain_run(
                    run,
                    OLD,
                    judgments,
                    options=RUN,
                    cache_dir=cache,
                    progress=stop(after=after),
                )
            assert Versions(run).current().number == 1
        with (
            Versions(run).lock(),
            pytest.raises(LockedError),
        ):
            _other_process(run, store)
        found = retrain_run(run, OLD, judgments, options=RUN, cache_dir=cache)
    assert found.verdict == "published" and Versions(run).current().number == 2


def _other_process(run: Path, store: Path) -> None:
    """The same job from another process: its lock is another."""
    import subprocess
    import sys

    words = ["retrain", str(run), f"--data={run / 'old.jsonl'}", f"--judgments={store}", "--json"]
    (run / "old.jsonl").write_text("".join(json.dumps(p.to_json()) + "\n" for p in OLD))
    done = subprocess.run(
        [sys.executable, "-m", "ensemble_rm", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 13, done.stderr
    raise LockedError(json.loads(done.stdout)["message"])


def test_the_command(
    run: Path, store: Path, cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in OLD))
    words = ["retrain", str(run), f"--data={old}", f"--judgments={store}", "--json"]
    words += ["--device=cpu", f"--cache-dir={cache}", "--min-judgments=40"]
    assert main([*words, "--dry-run"]) == 10
    assert json.loads(capsys.readouterr().out)["dry_run"]
    assert main([*words, "--until=2026-01-03"]) == 11
    assert json.loads(capsys.readouterr().out)["verdict"] == "too few"
    assert main([*words, f"--reference={old}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == 2 and found["exit_code"] == 0
    assert main([*words, "--epochs=3"]) == 2  # these heads are solved
    assert "adam" in capsys.readouterr().err


def test_what_cannot_be_retrained_is_refused(ensemble: RewardEnsemble, cache: Path) -> None:
    bare = replace(ensemble, provenance={})
    with pytest.raises(OptionError, match="how it was trained"):
        retrain(bare, OLD, NEW, cache_dir=cache)
    with pytest.raises(OptionError, match="delta"):
        RetrainingOptions(delta=0.0)
    with pytest.raises(OptionError, match="validation_share"):
        RetrainingOptions(validation_share=1.0)
    with pytest.raises(VersionError):
        Versions("nowhere").current()
    adam = HeadRecipe(solver="adam", epochs=2)
    found = retrain(ensemble, OLD, NEW, recipe=adam, options=OPTIONS, cache_dir=cache)
    assert found.candidate is not None
    assert found.candidate.provenance["recipe"]["solver"] == "adam"


@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
@pytest.mark.parametrize("kind", ["branch", "full"])
def test_other_kinds_are_published_whole(
    kind: str, small_folder: Path, store: Path, tmp_path: Path
) -> None:
    """Their weights leave the job's work folder with the version."""
    recipe = make_recipe(kind, epochs=3, learning_rate=5e-3)
    run = tmp_path / "run"
    first = train(
        *OLD.split(0.75, 0.25, seed=0),
        backbone=small_folder,
        members=2,
        recipe=recipe,
        options=TrunkOptions(max_length=32, device="cpu"),
        out=run,
        cache_dir=tmp_path / "cache",
    )
    with JudgmentStore.open(store, read_only=True) as judgments:
        found = retrain_run(run, OLD, judgments, options=RUN, cache_dir=tmp_path / "cache")
    assert found.verdict == "published", found.reason
    after = RewardEnsemble.from_pretrained(run, device="cpu")
    assert after.names == first.names
    iron = pairs_of(STALE, RIPE, 60, at=777)
    assert hits(after, iron) > hits(first, iron) + 0.2
    np.testing.assert_allclose(spread(after, OLD), spread(first, OLD), rtol=1e-5)
    assert not list(run.glob(".retraining-*"))
