"""The report: the three kinds apart, in JSON, in text, in a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from ensemble_rm import Scores
from ensemble_rm.calibration import TemperatureFit
from ensemble_rm.drift import (
    AnchorVote,
    DriftReport,
    DriftTest,
    Reference,
    draw_drift,
    drift_text,
    rater_drift,
    unlabelled_drift,
)
from ensemble_rm.errors import DataError, StorageError
from ensemble_rm.members.scorer import Truncation

FIT = TemperatureFit(1.0, 0.82, 1.22, 0.1, 0.5, 300, 300)


def scores(rng: np.random.Generator, shift: float = 0.0) -> Scores:
    members = shift + rng.normal(0, 1, (120, 1)) + rng.normal(0, 0.5, (120, 3))
    cut = Truncation.none(120)
    return Scores(("a", "b", "c"), members, members, members.mean(axis=1), cut)


def votes(month: int, *, careless: bool) -> list[AnchorVote]:
    rng = np.random.default_rng(month)
    wrong = rng.random((2, 40)) < (0.5 if careless else 0.05)
    return [
        AnchorVote(f"p{i}", f"rater {a}", f"2026-{month:02d}", float((i % 2 == 0) != wrong[a, i]))
        for a in range(2)
        for i in range(40)
    ]


def reports(kind: str = "") -> list[DriftReport]:
    """Six months, one kind of drift from the fourth on."""
    rng = np.random.default_rng(0)
    test, reference = DriftTest.start(FIT), Reference.of(scores(rng), np.arange(120) // 2)
    found, judged = [], []
    for month in range(1, 7):
        late = month > 3
        at = f"2026-{month:02d}"
        x = rng.normal(0, 2, 300)
        y = rng.random(300) < expit(x / (4.0 if late and kind == "labelled" else 1.0))
        test = test.update(x, y, prompts=range(300 * month, 300 * month + 300), at=at)
        now = scores(rng, 1.0 if late and kind == "unlabelled" else 0.0)
        shift = unlabelled_drift(reference, now, np.arange(120) // 2, checks=6)
        judged += votes(month, careless=late and kind == "raters")
        found.append(DriftReport(at, test.result(), shift, rater_drift(judged, checks=6)))
    return found


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "raters"])
def test_each_kind_alarms_alone(kind: str) -> None:
    found = reports(kind)
    assert not any(report.alarms for report in found[:3])
    assert any(kind in report.alarms for report in found[3:])
    assert all(set(report.alarms) <= {kind} for report in found)
    text = drift_text(found[-1])
    for name in ("labelled", "unlabelled", "raters"):
        mark = "ALARM" if name in found[-1].alarms else "no alarm"
        assert f"▸ {name}: {mark}" in text


def test_no_drift_no_alarm() -> None:
    found = reports()
    assert not any(report.alarms for report in found)
    assert drift_text(found[-1]).startswith("drift at 2026-06: no alarm")


def test_reports_are_read_back_as_they_were() -> None:
    for report in (reports("labelled")[-1], DriftReport("now", unavailable={"raters": "none"})):
        assert DriftReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_what_is_missing_is_named() -> None:
    report = DriftReport("now", unavailable={"labelled": "no judgment since publication"})
    text = drift_text(report)
    assert "▸ labelled: unavailable\n  no judgment since publication" in text
    assert "▸ raters: unavailable\n  not requested" in text
    assert "Scorer.features" in drift_text(reports()[-1])
    assert report.alarms == ()


def test_the_picture(tmp_path: Path) -> None:
    """PNGs that differ where the reports do; the order in which reports come says nothing."""
    found = reports("labelled")
    path = draw_drift(found, tmp_path / "new" / "drift.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    turned = draw_drift(found[::-1], tmp_path / "turned.png")
    assert turned.read_bytes() == path.read_bytes()
    other = draw_drift(reports(), tmp_path / "other.png")
    assert other.read_bytes() != path.read_bytes()
    draw_drift([DriftReport("now")], tmp_path / "empty.png")
    with pytest.raises(DataError):
        draw_drift([], tmp_path / "none.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        draw_drift(found, tmp_path / "file" / "drift.png")


def test_a_report_of_the_first_format_is_read() -> None:
    """It called the number of checks `looks`."""
    report = reports()[-1]
    row = json.loads(json.dumps(report.to_json()))
    for kind in ("unlabelled", "raters"):
        row[kind]["looks"] = row[kind].pop("checks")
    assert DriftReport.from_json(row) == report
