"""The commands `remote` and `route`, against servers on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ensemble_rm import RewardEnsemble
from ensemble_rm.cli.main import main
from ensemble_rm.errors import RemoteFailureWarning
from tests.support import wire_doubles as doubles
from tests.support.judge_doubles import app_of, judge, quality

N = 120
LOCAL = ("--allow-remote", "127.0.0.1")


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def noisy(seed: int) -> doubles.Logit:
    def logit(text: str) -> float:
        completion = text.rsplit("|", maxsplit=1)[-1]
        rng = np.random.default_rng([seed, *completion.encode()])
        return 2 * quality(completion) + float(rng.normal(0, 2.0))

    return logit


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    with (
        doubles.serving(doubles.openrlhf(noisy(0))) as first,
        doubles.serving(doubles.tei(noisy(1))) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verdicts drawn from what the judge thinks."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(N):
        a, b = f"answer {i}", f"other {i}"
        if rng.random() > 1 / (1 + np.exp(-3 * (quality(a) - quality(b)))):
            a, b = b, a
        rows.append({"prompt": f"q{i}|", "chosen": a, "rejected": b, "id": f"p{i}"})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def ensemble(
    servers: tuple[str, str], pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two remote members, combined and calibrated on the command line."""
    folder = tmp_path_factory.mktemp("runs")
    plain = ("--template", "plain")
    assert run("remote", servers[0], "--protocol", "openrlhf", *plain, "--out", folder / "a") == 0
    assert run("remote", servers[1], "--protocol", "tei", *plain, "--out", folder / "b") == 0
    members = ("--member", f"a={folder / 'a'}", "--member", f"b={folder / 'b'}")
    out = folder / "both"
    assert run("combine", *members, "--data", pairs, "--out", out, *LOCAL) == 0
    assert run("calibrate", out, "--data", pairs, *LOCAL) == 0
    return out


def test_members_of_two_servers_make_an_ensemble(ensemble: Path) -> None:
    found = RewardEnsemble.from_pretrained(ensemble, allow_remote=["127.0.0.1"])
    assert found.names == ("a/openrlhf", "b/tei")
    assert found.calibration is not None
    assert found.provenance["members"]["a"].endswith("/a")


def test_remote_says_what_the_probes_score(
    servers: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("remote", servers[0], "--protocol", "openrlhf", "--template", "plain")
    out = tmp_path / "x"
    assert run(*words, "--name", "far", "--out", out, "--json", "--dry-run") == 0
    found = said(capsys)
    assert found["name"] == "far" and len(found["probes"]) == 8 and found["problems"] == []
    assert not out.exists()


def test_a_sigmoid_is_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def squashed(text: str) -> float:
        return doubles.sigmoid(doubles.logit_of(text))

    with doubles.serving(doubles.openrlhf(squashed)) as url:
        words = ("remote", url, "--protocol", "openrlhf", "--template", "plain")
        out = tmp_path / "x"
        assert run(*words, "--out", out, "--json") == 7
        assert said(capsys)["error"] == "RemoteActivationError" and not out.exists()
        assert run(*words, "--out", out, "--raw-logit-check", "warn") == 0
        assert "sigmoid" in capsys.readouterr().out and out.exists()


def test_a_token_comes_from_the_environment_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str | None] = []

    async def score(request: Request) -> Response:
        seen.append(request.headers.get("Authorization"))
        if seen[-1] != "Bearer s3cret":
            return JSONResponse({"error": "no"}, status_code=401)
        texts = (await request.json())["query"]
        return JSONResponse({"rewards": [doubles.logit_of(text) for text in texts]})

    app = Starlette(routes=[Route("/get_reward", score, methods=["POST"])])
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    out = tmp_path / "x"
    with doubles.serving(app) as url:
        words = ("remote", url, "--protocol", "openrlhf", "--template", "plain", "--out", out)
        assert run(*words, "--json") == 7
        assert said(capsys)["error"] == "RemoteRefusalError"
        bound = ("--token", "127.0.0.1=RM_TOKEN")
        assert run(*words, *bound) == 2  # not set
        monkeypatch.setenv("RM_TOKEN", "s3cret")
        assert run(*words, "--token", "gpu7=RM_TOKEN") == 2  # of another server
        assert run(*words, *bound) == 0
        score = ("score", out, "--data", samples, "--out", tmp_path / "scores.jsonl")
        assert run(*score, *bound) == 2  # not allowed
        assert run(*score, *LOCAL, *bound) == 0
        monkeypatch.delenv("RM_TOKEN")
        assert run(*score, *LOCAL, *bound) == 2
        monkeypatch.setenv("ENSEMBLE_RM_TOKEN_127_0_0_1", "s3cret")
        seen.clear()
        assert run(*score, *LOCAL) == 0
        assert run(*words) == 0
    assert set(seen) == {"Bearer s3cret"}
    for path in out.rglob("*"):
        assert path.is_dir() or b"s3cret" not in path.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ("http://localhost:1", "--protocol", "tei"),
        ("http://u:p@localhost:1", "--protocol", "tei", "--template", "plain"),
        ("http://localhost:1", "--protocol", "judge"),
        ("http://localhost:1", "--protocol", "tei", "--template", "chat"),
    ],
)
def test_what_cannot_be_a_member_exits_with_2(words: tuple[str, ...], tmp_path: Path) -> None:
    assert run("remote", *words, "--out", tmp_path / "x") == 2
    assert not (tmp_path / "x").exists()


def test_nobody_there_exits_with_7(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--protocol", "openrlhf", "--template", "plain", "--deadline", "0.2")
    assert run("remote", "http://127.0.0.1:9", *words, "--out", tmp_path / "x", "--json") == 7
    assert said(capsys)["error"] == "RemoteUnavailableError"


def test_a_judge_can_be_a_member(tmp_path: Path) -> None:
    def rate(request: httpx.Request) -> httpx.Response:
        from tests.support.judge_doubles import completion, entry, read_texts

        text = read_texts(json.loads(request.content)["messages"])["answer"]
        high = 1 / (1 + np.exp(-quality(text)))
        return httpx.Response(200, json=completion("9", [entry({"9": high, "2": 1 - high})]))

    with doubles.serving(app_of(httpx.MockTransport(rate))) as url:
        words = ("--protocol", "judge", "--model", "judge", "--name", "j")
        assert run("remote", f"{url}/v1", *words, "--out", tmp_path / "j") == 0
        saved = RewardEnsemble.from_pretrained(tmp_path / "j", allow_remote="127.0.0.1")
        assert saved.names == ("j",)


# Route -------------------------------------------------------------------------------------------


def test_route_asks_about_a_share_and_writes_all(
    ensemble: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []
    out, pool = tmp_path / "verdicts.jsonl", tmp_path / "pool.jsonl"
    with doubles.serving(app_of(judge(seen=seen))) as url:
        asked = ("--judge-url", f"{url}/v1", "--model", "judge", "--price", "2", "8")
        words = ("route", ensemble, *LOCAL, "--data", pairs, "--share", "0.25", *asked)
        assert run(*words, "--dry-run", "--json") == 0
        dry = said(capsys)
        assert dry["would_ask"] == N // 4 and dry["judged"] == 0 and seen == []
        assert run(*words, "--out", out, "--pool", pool, "--json") == 0
        found = said(capsys)
        assert run(*words, "--out", out, "--pool", pool, "--format", "label-studio") == 0
        assert "25.0%" in capsys.readouterr().out
    assert (found["judged"], found["failed"]) == (N // 4, 0)
    assert found["usage"]["calls"] == N // 2 and found["usage_of_all"]["calls"] == 2 * N
    assert found["usage"]["cost"] == pytest.approx(found["usage_of_all"]["cost"] / 4)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == N
    assert sum(row["route"] == "judge" for row in rows) == N // 4
    for row in rows:
        judged = row["route"] == "judge"
        assert row["probability"] == row["judge_probability" if judged else "ensemble_probability"]
    tasks = json.loads(pool.read_text())
    assert len(tasks) == found["pool"] and tasks[0]["data"]["strategy"] == "route-epistemic"


def test_humans_answers_to_the_pool_come_back(
    ensemble: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, store = tmp_path / "pool.jsonl", tmp_path / "judgments.db"
    words = ("route", ensemble, *LOCAL, "--data", pairs, "--threshold", "0.05", "--pool", pool)
    assert run(*words, "--out", tmp_path / "v.jsonl", "--json") == 0
    found = said(capsys)
    assert found["judged"] == 0 and found["pool"] >= found["uncertain"] > 0
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    answer = {"outcome": "first", "annotator": "ann", "judged_at": "2026-11-25T12:00:00Z"}
    answered = tmp_path / "answered.jsonl"
    answered.write_text("".join(json.dumps(row | answer) + "\n" for row in rows))
    words = ("judgments", "import", store, answered, "--format", "jsonl", "--source", "humans")
    assert run(*words, "--json") == 0
    assert said(capsys)["added"] == len(rows)


@pytest.mark.parametrize(
    "words",
    [
        ("--share", "0.1", "--model", "x"),
        ("--share", "0.1", "--judge-url", "http://localhost:1"),
        ("--share", "1.1"),
        ("--threshold", "-1"),
        ("--share", "0.1", "--judge-url", "http://u:p@x", "--model", "x"),
    ],
)
def test_what_cannot_be_routed_exits_with_2(
    words: tuple[str, ...], ensemble: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.jsonl"
    assert run("route", ensemble, *LOCAL, "--data", pairs, *words, "--out", out) == 2
    assert not out.exists()


@pytest.mark.parametrize("option", ["--out", "--pool"])
def test_what_cannot_be_written_is_found_before_the_judge_is_paid(
    option: str, ensemble: Path, pairs: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    fine = ("--pool", tmp_path / "new" / "pool.jsonl")
    if option == "--pool":
        fine = ("--out", tmp_path / "new" / "out.jsonl")
    with doubles.serving(app_of(judge(seen=seen))) as url:
        words = ("route", ensemble, *LOCAL, "--data", pairs, "--share", "0.1")
        words += ("--judge-url", f"{url}/v1", "--model", "judge", *fine)
        assert run(*words, option, tmp_path / "file" / "v.jsonl") == 4
        assert run(*words, option, tmp_path / "folder") == 2
        assert run(*words, option, fine[1]) == 2
        assert seen == [] and not list(tmp_path.glob("**/*.partial"))
        assert run(*words, option, tmp_path / "other" / "v.jsonl") == 0
        assert seen and (tmp_path / "other" / "v.jsonl").exists() and Path(fine[1]).exists()


def test_one_object_and_all_verdicts_do_not_share_an_output(
    ensemble: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("route", ensemble, *LOCAL, "--data", pairs, "--share", "0.1")
    assert run(*words, "--json") == 2
    assert said(capsys)["error"] == "OptionError"
    assert run(*words) == 0
    assert len(capsys.readouterr().out.splitlines()) == N
    assert run(*words, "--dry-run", "--json") == 0 and said(capsys)["dry_run"]


def test_a_member_that_fails_is_left_out_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(text: str) -> float:
        return float("nan") if "bad" in text else doubles.logit_of(text)

    rows = [{"prompt": f"q{i}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(8)]
    pairs, samples = tmp_path / "pairs.jsonl", tmp_path / "samples.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"prompt": "q", "completion": text} for text in ("fine", "bad")]
    samples.write_text("".join(json.dumps(row) + "\n" for row in texts))
    out = tmp_path / "both"
    with (
        doubles.serving(doubles.sglang(picky)) as first,
        doubles.serving(doubles.sglang()) as second,
    ):
        words = ("--protocol", "sglang", "--template", "plain")
        for name, url in (("a", first), ("b", second)):
            assert run("remote", url, *words, "--out", tmp_path / name) == 0
        members = ("--member", f"a={tmp_path / 'a'}", "--member", f"b={tmp_path / 'b'}")
        assert run("combine", *members, "--data", pairs, "--out", out, *LOCAL) == 0
        score = ("score", out, "--data", samples, "--out", tmp_path / "scores.jsonl", *LOCAL)
        with pytest.warns(RemoteFailureWarning, match="1 of 2"):
            assert run(*score) == 6
        omit = ("--aggregator", "mean", "--nan", "omit")
        with pytest.warns(RemoteFailureWarning):
            assert run(*score, *omit) == 0
        with pytest.warns(RemoteFailureWarning):
            assert run(*score, *omit, "--min-members", "2") == 6
        assert run(*score, "--nan", "omit") == 2
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    fine, bad = (line["members"] for line in lines)
    assert bad["a/sglang"] is None and lines[1]["reward"] == bad["b/sglang"]
    assert lines[0]["reward"] == pytest.approx(sum(fine.values()) / 2)
    capsys.readouterr()
