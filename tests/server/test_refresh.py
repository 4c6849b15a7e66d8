"""New versions enter while requests are served: none is dropped, and each answer names its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import RewardEnsemble, Sample, Versions
from ensemble_rm.aggregation import uwo
from ensemble_rm.calibration import Normaliser
from ensemble_rm.calibration.calibration import fit_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.members import HeadScorer
from ensemble_rm.server.service import name_version
from ensemble_rm.versions.version import Version
from tests.support.server_process import lengths
from tests.support.server_runs import client, one

UWO = uwo(lam=0.5)


def publish(versions: Versions, t: float) -> Version:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 300, 2))
    y = rng.random(300) < 1 / (1 + np.exp(-(UWO(first) - UWO(second)) / t))
    pairs = ScoredPairs(first, second, y.astype(float), np.ones(300), np.arange(300))
    return versions.publish_calibration(
        fit_calibration(pairs, UWO, digest="0"), provenance={"why": "a test"}
    )


@pytest.fixture
def run(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    return RewardEnsemble((two_heads(),), Normaliser.identity(2), UWO).save_pretrained(
        tmp_path / "hh"
    )


def test_a_new_calibration_and_new_members_are_served_when_told(
    run: Path, two_heads: Callable[..., HeadScorer]
) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    pair = {"pairs": [{"prompt": "Hi", "first": "A fox", "second": "A dog and a fox"}]}
    with client(lambda: RewardEnsemble.from_pretrained(run, device="cpu")) as asking:
        before = asking.post("/v1/compare", json=pair).json()
        reward = asking.post("/v1/score", json=one("A fox")).json()
        assert before["version"] == reward["version"] == "2"
        assert asking.post("/v1/refresh", json={}).json() == {"version": "2", "changed": False}

        publish(versions, 0.3)
        assert asking.post("/v1/compare", json=pair).json() == before  # not before it is told
        told = asking.post("/v1/refresh", json={})
        assert told.json() == {"version": "3", "changed": True}
        assert told.headers["x-ensemble-version"] == "3"
        after = asking.post("/v1/compare", json=pair).json()
        assert after["version"] == "3" and after["probability"] != before["probability"]
        # A calibration moves no reward.
        again = asking.post("/v1/score", json=one("A fox")).json()
        assert again["rewards"] == reward["rewards"] and again["version"] == "3"

        other = RewardEnsemble((two_heads(seed=5),), Normaliser.identity(2), UWO)
        versions.publish_ensemble(other.save_pretrained, provenance={"why": "retrained"})
        assert asking.post("/v1/refresh", json={}).json() == {"version": "4", "changed": True}
        new = asking.post("/v1/score", json=one("A fox")).json()
        own = other.score([Sample("Hi", "A fox")])
        assert new["rewards"] == pytest.approx(own.reward, rel=1e-5)
        assert 'version_info{version="4"} 1.0' in asking.get("/metrics").text


def test_a_version_that_cannot_be_read_leaves_the_old_one(run: Path) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    with client(lambda: RewardEnsemble.from_pretrained(run, device="cpu")) as asking:
        broken = publish(versions, 0.3)
        for file in (run / "versions" / f"{broken.number:04}").rglob("*.json"):
            file.write_text("{")
        answer = asking.post("/v1/refresh", json={})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "StorageError"
        assert asking.post("/v1/score", json=one("A fox")).json()["version"] == "2"


class Moving(RewardEnsemble):
    """An ensemble whose every refresh is a version that scores 1000 higher."""

    def refresh(self) -> RewardEnsemble:  # type: ignore[override]
        number = int(self.provenance["version"]) + 1
        normaliser = Normaliser((-1000.0 * number,) * 2, (1.0, 1.0))
        return replace(self, normaliser=normaliser, provenance={"version": number})


def test_every_answer_is_of_the_version_that_it_names() -> None:
    plain = lengths(0.001)
    moving = Moving(plain.scorers, plain.normaliser, plain.aggregator, None, {"version": 0})
    with client(moving) as asking, ThreadPoolExecutor(8) as pool:
        asked = []
        for i in range(120):
            body = {"samples": [{"prompt": "Hi", "completion": "slow" + "x" * (i % 7)}] * 3}
            asked.append(pool.submit(asking.post, "/v1/score", json=body))
            if i % 10 == 5:
                asked.append(pool.submit(asking.post, "/v1/refresh", json={}))
        answers = [f.result() for f in asked]
    assert all(answer.status_code == 200 for answer in answers)
    scored = [answer.json() for answer in answers if "rewards" in answer.json()]
    assert len(scored) == 120 and len({said["version"] for said in scored}) > 1
    for said in scored:
        lengths_seen = [reward - 1000 * int(said["version"]) for reward in said["rewards"]]
        assert all(0 < length < 50 for length in lengths_seen), said


def test_a_versions_name_is_its_number_or_what_it_is_made_of(run: Path) -> None:
    plain = RewardEnsemble.from_pretrained(run, device="cpu")
    named = name_version(plain)
    assert len(named) == 12 and named == name_version(RewardEnsemble.from_pretrained(run))
    assert name_version(replace(plain, origin=None, provenance={"version": "v7"})) == "v7"
    publish(Versions(run), 2.0)
    assert name_version(plain.refresh()) == "2"
