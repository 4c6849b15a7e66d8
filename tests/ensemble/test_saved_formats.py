"""What version 0.1.0 saved loads, scores and goes on as it did there.

``tests/fixtures/make_saved_0_1.py`` says how the files were made.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest

from ensemble_rm import (
    JudgmentStore,
    Preferences,
    RewardEnsemble,
    Versions,
    load_preferences,
    recalibrate,
)
from ensemble_rm.aggregation import minimum
from ensemble_rm.drift import DriftCheckOptions, check_drift, past_checks
from ensemble_rm.members import (
    BranchScorer,
    FullScorer,
    HeadScorer,
    ImplicitScorer,
    JudgeScorer,
    LoraScorer,
    RemoteScorer,
)
from ensemble_rm.recalibration import RecalibrationOptions
from ensemble_rm.training import TrainingRequest, plan, train_request

# Version 0.1.0 recorded no digests; that it is said, `tests/versions/test_integrity.py` holds.
pytestmark = pytest.mark.filterwarnings("ignore::ensemble_rm.errors.UnverifiedWarning")

SAVED = Path(__file__).resolve().parent.parent / "fixtures" / "saved_0_1"
CALIBRATED_HEADS = ("head-rao-kupper", "head-power", "head-isotonic", "head-histogram", "head-bbq")
TRAINED = {
    "head": HeadScorer,
    "head-adam": HeadScorer,
    "branch": BranchScorer,
    "lora": LoraScorer,
    "full": FullScorer,
}
MODELS: dict[str, type] = {
    **TRAINED,
    **dict.fromkeys(CALIBRATED_HEADS, HeadScorer),
    "published": FullScorer,
    "implicit": ImplicitScorer,
    "combined": HeadScorer,
}


@pytest.fixture(autouse=True)
def beside_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files name their backbones relative to their folder."""
    monkeypatch.chdir(SAVED)


def probes() -> Preferences:
    return load_preferences(SAVED / "probes.jsonl")


def stored_scores(name: str) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((SAVED / f"{name}.scores.json").read_text())
    return rows


def close(new: Any, old: Any) -> None:
    np.testing.assert_allclose(np.asarray(new), np.asarray(old), rtol=1e-6, atol=1e-6)


def check_scores(name: str, ensemble: RewardEnsemble) -> None:
    """Everything that version 0.1.0 said of the probes is said again."""
    old, pairs = stored_scores(name), probes()
    scores = ensemble.score(pairs.samples())
    assert list(ensemble.names) == old["names"]
    close(scores.raw, old["raw"])
    close(scores.members, old["members"])
    close(scores.reward, old["reward"])
    if "distance" in old:
        close(ensemble.distance(pairs.samples()), old["distance"])
    else:
        assert ensemble.feature_space is None
    if "probability" not in old:
        assert ensemble.calibration is None
        return
    compared = ensemble.compare(
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        subsets=[pair.subset for pair in pairs],
        references=[pair.reference for pair in pairs],
    )
    close(compared.probability, old["probability"])
    if "outcomes" in old:
        close(compared.outcomes, old["outcomes"])
    else:
        assert compared.outcomes is None
    refit = ensemble.recalibrate(minimum())  # on the judgments' scores that were saved
    assert refit.calibration is not None
    assert refit.calibration.temperature == pytest.approx(old["refit_temperature"], rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_an_ensemble_scores_as_before_and_after_saving_again(name: str, tmp_path: Path) -> None:
    ensemble = RewardEnsemble.from_pretrained(name, device="cpu", cache_dir=tmp_path / "cache")
    assert isinstance(ensemble.scorers[0], MODELS[name])
    check_scores(name, ensemble)
    again = ensemble.save_pretrained(tmp_path / "again")
    check_scores(name, RewardEnsemble.from_pretrained(again, device="cpu"))


def test_every_kind_and_every_older_name_is_among_the_files() -> None:
    kinds, keys = set(), set()
    for file in SAVED.glob("*/ensemble.json"):
        manifest = json.loads(file.read_text())
        kinds |= {member["kind"] for member in manifest["members"]}
        keys |= {"flat recipe"} if "views" in manifest["provenance"] else set()
    assert kinds == {"head", "branch", "lora", "classifier", "implicit", "remote", "judge"}
    assert keys == {"flat recipe"}
    assert "self_test" in json.loads((SAVED / "remote/members/0/member.json").read_text())
    report = json.loads((SAVED / "versions/drift/looks.jsonl").read_text().splitlines()[0])
    assert "looks" in report["unlabelled"]
    assert "looks" in report["raters"]


def test_a_backbone_that_moved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SAVED / "bert", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for name in ("head", "lora"):
        folder = tmp_path / "elsewhere"
        ensemble = RewardEnsemble.from_pretrained(SAVED / name, backbone=folder, device="cpu")
        check_scores(name, ensemble)


def test_the_old_kind_classifier_is_full(tmp_path: Path) -> None:
    for name in ("full", "published"):
        ensemble = RewardEnsemble.from_pretrained(name, device="cpu")
        manifest = json.loads(
            (ensemble.save_pretrained(tmp_path / name) / "ensemble.json").read_text()
        )
        assert {member["kind"] for member in manifest["members"]} == {"full"}


# Members on servers ----------------------------------------------------------------------------


class _Answers(BaseHTTPRequestHandler):
    """Answers by the length of the text, as the script's server did."""

    tokens: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.tokens.append(self.headers["Authorization"])
        if self.path == "/get_reward":
            said: dict[str, Any] = {"rewards": [len(text) / 7 - 9 for text in asked["query"]]}
        else:
            rating = str(1 + len(asked["messages"][-1]["content"]) % 7)
            message = {"role": "assistant", "content": rating}
            said = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


@contextmanager
def answering() -> Iterator[str]:
    """A server on a free port; yields its host and port."""
    _Answers.tokens.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("name", "kind"), [("remote", RemoteScorer), ("judge", JudgeScorer)])
def test_a_member_on_a_server_asks_and_reads_as_before(
    name: str, kind: type, tmp_path: Path
) -> None:
    folder = shutil.copytree(SAVED / name, tmp_path / name)
    with answering() as address:
        file = folder / "members/0/member.json"
        file.write_text(file.read_text().replace("127.0.0.1:9", address))
        # Files of that version name a variable for the token; it is ignored, whatever it is.
        with pytest.warns(UserWarning, match="--token HOST=ENV"):
            ensemble = RewardEnsemble.from_pretrained(folder, allow_remote=[address])
        (scorer,) = ensemble.scorers
        assert isinstance(scorer, kind)
        secret = ensemble.with_tokens({address: "s3cret"})
        close(secret.score(probes().samples()).raw, stored_scores(name)["raw"])
        assert set(_Answers.tokens) == {"Bearer s3cret"}
        if isinstance(scorer, RemoteScorer):
            assert scorer.raw_logit_check_mode == "error"  # it was `self_test`
        saved = ensemble.save_pretrained(tmp_path / "again")
        again = RewardEnsemble.from_pretrained(saved, allow_remote=[address])
        close(again.score(probes().samples()).raw, stored_scores(name)["raw"])


# Training that goes on -------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_what_was_trained_says_how_and_can_be_trained_further(name: str, tmp_path: Path) -> None:
    ensemble = RewardEnsemble.from_pretrained(name, device="cpu")
    request = replace(TrainingRequest.of(ensemble), cache_dir=None)
    old = ensemble.provenance
    flat = {**old["recipe"], **old}
    for key, value in request.recipe.to_json().items():
        if key in flat:
            assert json.loads(json.dumps(value)) in (flat[key], [flat[key]], *_alone(flat[key]))
    assert request.kind == old["kind"]
    assert request.members == old["members"] == len(ensemble.names)
    assert request.baseline == (name == "head-adam")
    with judgments(tmp_path) as store:
        pairs = store.preferences()
    if name == "head-adam":  # its prompts need a reference
        pairs = Preferences(tuple(replace(pair, reference="the fox") for pair in pairs))
    fit, validation = pairs.split(0.7, 0.3, seed=0)
    # Views, blocks and adapters of the start are those of the request, or `plan` refuses it.
    planned = plan(fit, validation, request)
    assert (planned["kind"], planned["members"]) == (request.kind, request.members)
    assert planned["recipe"] == request.recipe.to_json()
    if name.startswith("head"):  # the quickest to train
        further = train_request(fit, validation, request)
        assert further.names == ensemble.names
        assert further.provenance["start"]
        assert TrainingRequest.of(further).recipe == request.recipe
        assert np.isfinite(further.score(probes().samples()).raw).all()


def _alone(value: Any) -> tuple[Any, ...]:
    """A list of one weight decay is now that number."""
    return tuple(value) if isinstance(value, list) and len(value) == 1 else ()


# Versions and judgments ------------------------------------------------------------------------


def unpack(source: Path, target: Path) -> Path:
    target.write_bytes(gzip.decompress(source.read_bytes()))
    return target


@contextmanager
def judgments(folder: Path) -> Iterator[JudgmentStore]:
    place = folder / "judgments.db"
    if not place.exists():
        unpack(SAVED / "judgments.db.gz", place)
    with JudgmentStore.open(place) as store:
        yield store


def versions_record() -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((SAVED / "versions.json").read_text())
    return rows


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A copy of the run folder, its scores' database as it was."""
    folder = shutil.copytree(SAVED / "versions", tmp_path / "hh")
    (packed,) = (folder / "scores").glob("*.gz")
    unpack(packed, packed.with_suffix(""))
    packed.unlink()
    return folder


def day(number: float) -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=number)


def refuse(*_: Any, **__: Any) -> RewardEnsemble:
    raise AssertionError("every pair has stored scores, and an ensemble was loaded")


def test_a_database_of_judgments_reads_as_before(tmp_path: Path) -> None:
    old = versions_record()
    with judgments(tmp_path) as store:
        assert store.count() == old["count"]
        assert store.digest() == old["digest"]
        newest = store.newest()
        assert newest is not None
        assert newest.isoformat() == old["newest"]
        rows = [judgment.to_json() for judgment in store.read()]
        assert rows[: len(old["judgments"])] == old["judgments"]
        assert len(rows) == old["count"]
        # Opened a second time it takes new judgments, and knows the old ones.
        assert store.add(list(store.read())[:5]).added == 0
        fresh = replace(next(iter(store.read())), annotator="new", external_id="", corrects=None)
        assert store.add([fresh]).added == 1


def test_a_run_folder_lists_and_loads_its_versions(run_folder: Path) -> None:
    old, versions = versions_record(), Versions(run_folder)
    assert [version.kind for version in versions.all()] == ["ensemble", "calibration"]
    assert versions.current().number == 2
    for version, temperature in zip(versions.all(), old["temperatures"], strict=True):
        calibration = version.read_calibration()
        assert calibration is not None
        assert calibration.temperature == pytest.approx(temperature, rel=1e-6)
        ensemble = RewardEnsemble.from_pretrained(run_folder, version=version.number, device="cpu")
        assert ensemble.calibration is not None
        assert ensemble.calibration.temperature == pytest.approx(temperature, rel=1e-6)
        close(ensemble.score(probes().samples()).reward, stored_scores("head")["reward"])
        refit = ensemble.recalibrate(minimum())
        assert refit.calibration is not None
    current = RewardEnsemble.from_pretrained(run_folder, device="cpu")
    assert current.refresh() is current
    versions.rollback(1)
    refreshed = current.refresh().calibration
    assert refreshed is not None
    assert refreshed.temperature == pytest.approx(old["temperatures"][0], rel=1e-6)
    assert [line["event"] for line in versions.audit.read()][-1] == "rolled back"


def test_a_run_folder_takes_a_recalibration(run_folder: Path, tmp_path: Path) -> None:
    old = versions_record()["recalibration"]
    running = RewardEnsemble.from_pretrained(run_folder, device="cpu")
    options = RecalibrationOptions(gate_share=0.3, annotator_share=1.0, day_share=1.0)
    with judgments(tmp_path) as store:
        result = recalibrate(
            run_folder, store, options=options, load=refuse, clock=lambda: day(231)
        )
        again = recalibrate(run_folder, store, options=options, load=refuse, clock=lambda: day(231))
    # Intervals by annotator, which 0.1 did not have, change the estimates a little.
    assert result.verdict == old["verdict"]
    assert (result.incumbent, result.version) == (old["incumbent"], old["version"])
    assert result.temperature_before == pytest.approx(old["temperature_before"], rel=1e-6)
    assert result.temperature_after == pytest.approx(old["temperature_after"], rel=0.05)
    assert result.alarm is not None
    assert result.alarm["direction"] == old["alarm"]["direction"]
    assert result.alarm["log_e"] == pytest.approx(old["alarm"]["log_e"], rel=1e-6)
    for key in ("sizes", "members"):
        assert result.details[key] == old["details"][key]
    for key, value in old["details"]["metrics"].items():
        assert result.details["metrics"][key] == pytest.approx(value, rel=0.1)
    assert again.verdict == "kept"
    refreshed = running.refresh().calibration
    assert refreshed is not None
    assert refreshed.temperature == result.temperature_after


def test_a_run_folder_keeps_its_drift_state_and_reports(run_folder: Path, tmp_path: Path) -> None:
    old = versions_record()["report"]
    (report,) = past_checks(run_folder)
    assert json.loads(json.dumps(report.to_json())) == _renamed(old)
    options = DriftCheckOptions(anchors=("anchors",))
    with judgments(tmp_path) as store:
        fresh = check_drift(
            run_folder, store, options=options, load=refuse, clock=lambda: day(230)
        ).to_json()
    assert len(past_checks(run_folder)) == 2
    # The state has taken all these judgments already: none counts twice.
    assert fresh["labelled"]["prompts"] == old["labelled"]["prompts"]
    assert fresh["labelled"]["log_e"] == pytest.approx(old["labelled"]["log_e"], rel=1e-6)
    for kind, part in (("unlabelled", "shifts"), ("raters", "tests")):
        for row, before in zip(fresh[kind][part], old[kind][part], strict=True):
            assert row["now"] == pytest.approx(before["now"], rel=1e-6)
            assert row["p"] == pytest.approx(before["p"], rel=1e-6)


def _renamed(report: dict[str, Any]) -> dict[str, Any]:
    """The report under today's names."""
    for kind in ("unlabelled", "raters"):
        report[kind]["checks"] = report[kind].pop("looks")
    return report
