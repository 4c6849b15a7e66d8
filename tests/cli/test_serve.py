"""`ensemble-rm serve`: what it refuses to start with, and a whole life of it."""

from __future__ import annotations

import builtins
import json
import os
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm import RewardEnsemble, Sample
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main, parse
from ensemble_rm.cli.serve import TOKEN_VARIABLE, Serve, read_token
from ensemble_rm.errors import OptionError, RemoteFailureWarning
from ensemble_rm.members import HeadScorer
from ensemble_rm.server import lifecycle
from tests.support.server_runs import Process, one

SERVE = ("-m", "ensemble_rm", "serve", "--port", "0", "--json")
SECRET = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = main(["serve", *map(str, arguments), "--json"])
    said: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["exit_code"] == code != 0
    return said


def test_it_binds_nothing_that_others_reach_without_a_token(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refused(capsys, tmp_path, "--host", "0.0.0.0")
    assert (said["error"], said["exit_code"]) == ("ServerError", 2)
    assert "--token-file" in said["message"]


def test_a_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, f"{SECRET}-of-the-environment")
    found, other = read_token(file), read_token(None)
    assert found is not None and found.secret == SECRET
    assert other is not None and other.secret == f"{SECRET}-of-the-environment"
    with pytest.raises(OptionError, match="cannot be read"):
        read_token(tmp_path / "none")
    file.write_text("short")
    with pytest.raises(OptionError, match="at least 16"):
        read_token(file)


def test_a_taken_address_is_a_named_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused(capsys, tmp_path, "--port", taken.getsockname()[1])
    assert (said["error"], said["exit_code"]) == ("ServerError", 2)


@pytest.mark.parametrize(
    "options",
    [
        ["--policy-template", "chat"],
        ["--max-body-bytes", "0"],
        ["--batch-samples", "0"],
        ["--window-seconds", "5"],
        ["--kappa", "1"],
        ["--port", "99999"],
        ["--port", "-1"],
        *(
            [f"--{name}-seconds", value]
            for name in ("drain", "stop")
            for value in ("nan", "inf", "-5")
        ),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refused(capsys, tmp_path, *options)
    assert (said["error"], said["exit_code"]) == ("OptionError", 2)
    if options[0] in ("--port", "--drain-seconds", "--stop-seconds"):
        assert options[1] in said["message"]


def test_without_the_extra_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("ensemble_rm.server"):
            raise ImportError("No module named 'uvicorn'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    said = refused(capsys, tmp_path)
    assert said["error"] == "MissingExtraError" and "ensemble-rm[server]" in said["message"]


def test_every_option_arrives() -> None:
    words = "serve runs/hh --policy-template <s>{role}\\n{content}<e> --stop </s> --stop <e>"
    words += " --raw-text-members a --raw-text-members b --batch-tokens 7"
    words += " --window-seconds 0.002 --queue-samples 9"
    words += " --max-samples 3 --on-truncation refuse --name mine"
    invocation = parse(words.split())
    assert not isinstance(invocation, int) and isinstance(invocation.command, Serve)
    options = invocation.command.options()
    assert options.raw_text.template is not None
    assert options.raw_text.template.text == "<s>{role}\n{content}<e>"
    assert options.raw_text.stops == ("</s>", "<e>", "<e>")
    assert options.raw_text.raw_text_members == ("a", "b")
    assert (options.batching.batch_tokens, options.batching.window_seconds) == (7, 0.002)
    assert (options.batching.queue_samples, options.limits.max_samples) == (9, 3)
    assert (options.on_truncation, options.name) == ("refuse", "mine")


@pytest.mark.slow
@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
def test_it_serves_a_saved_ensemble_and_logs_no_text(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    folder = ensemble.save_pretrained(tmp_path / "hh")
    token = tmp_path / "token"
    token.write_text(SECRET)
    command = [*SERVE, str(folder), "--device", "cpu"]
    running = Process([*command, "--token-file", str(token), "--access-log"], tmp_path)
    running.headers["Authorization"] = f"Bearer {SECRET}"
    try:
        running.wait(lambda: '"port"' in running.log_text())
        running.port = json.loads(running.log_text().splitlines()[0])["port"]
        running.wait_ready()
        text = "a fox and a dog " * 30
        status, said, headers = running.request("POST", "/v1/score", one(text, "zebra crossing"))
        assert status == 200 and headers["x-ensemble-version"] == said["version"]
        own = ensemble.score([Sample("zebra crossing", text)])
        assert said["rewards"] == pytest.approx(own.reward, rel=1e-5)
        assert said["truncated"] == [True]
        assert running.request("GET", "/v1/models")[1]["data"][0]["id"] == "hh"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=300) == 0
        log = running.log_text()
        assert "/v1/score" in log and "version" in log
        assert not any(word in log for word in ("zebra", "fox", SECRET))
    finally:
        running.process.kill()
        running.process.wait()
        running.log.close()


@pytest.mark.slow
def test_an_ensemble_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    running = Process([*SERVE, str(tmp_path)], tmp_path)
    assert running.process.wait(timeout=300) == 4
    running.log.close()
    assert '"StorageError"' in running.log_text()


def test_failures_of_members_elsewhere_are_figures_and_no_lines_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    def serve(*_: object, **__: object) -> None:
        warnings.warn("1 of 1 samples", RemoteFailureWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="something else"):  # the tests' own filter
            warnings.warn("something else", UserWarning, stacklevel=1)
        served.append("here")

    monkeypatch.setattr(lifecycle, "serve", serve)
    main(["serve", str(tmp_path)])
    assert served == ["here"]


@pytest.mark.parametrize(("finished", "code"), [(True, []), (False, [0])])
def test_a_thread_that_goes_on_does_not_keep_the_process(
    finished: bool, code: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(lifecycle, "serve", lambda *_, **__: finished)
    monkeypatch.setattr(os, "_exit", ended.append)
    main(["serve", str(tmp_path)])
    assert ended == code
