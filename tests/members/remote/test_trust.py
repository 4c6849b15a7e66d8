"""A saved ensemble names servers; the operator states which are used and which token goes where."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, strategies as st

from ensemble_rm import RewardEnsemble, Sample, Versions
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.cli.tokens import variable_of
from ensemble_rm.errors import OptionError, RemoteNotAllowedError, RemoteRefusalError
from ensemble_rm.members import JudgeScorer, RemoteScorer
from ensemble_rm.members.remote.address import Host, check_url, is_allowed, token_for
from tests.support import wire_doubles as doubles
from tests.support.saved_files import record_digests
from tests.support.server_runs import client, one

SECRET = "wJalrXUtnFEMI"
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9\-]{0,6}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
PORTS = st.none() | st.integers(1, 65535)


def far(url: str, **options: Any) -> RemoteScorer:
    options = {"name": "far", "template": "plain", "raw_logit_check": "off"} | options
    return RemoteScorer(url, protocol="openrlhf", **options)


def saved(url: str, folder: Path) -> Path:
    ensemble = RewardEnsemble((far(url),), Normaliser.identity(1), mean())
    return ensemble.save_pretrained(folder)


class Seen:
    """A server that keeps the token of each request."""

    def __init__(self) -> None:
        self.tokens: list[str | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        self.tokens.append(headers.get(b"authorization", b"").decode() or None)
        app = doubles.openrlhf()
        await app(scope, receive, send)


# The operator's list -----------------------------------------------------------------------------


@given(NAMES, NAMES, PORTS, PORTS, st.sampled_from(["http", "https"]))
def test_only_a_named_host_is_allowed(
    name: str, other: str, port: int | None, other_port: int | None, scheme: str
) -> None:
    def address(host: str, number: int | None) -> str:
        return check_url(f"{scheme}://{host}{'' if number is None else f':{number}'}/v1")

    url = address(name, port)
    number = port or (443 if scheme == "https" else 80)
    for entry in (name, name.upper(), f"{name}:{number}", f"{scheme}://{name}:{number}"):
        assert is_allowed(url, [other, entry])
    assert is_allowed(address(other, port), [name]) == (other == name)
    assert not is_allowed(url, [f"{'http' if scheme == 'https' else 'https'}://{name}"])
    assert not is_allowed(url, [f"{name}:{number % 65535 + 1}"])
    assert not is_allowed(address(f"{name}.{other}x", port), [name])
    assert not is_allowed(address(f"x{name}", other_port), [name])
    assert not is_allowed(url, [])


@pytest.mark.parametrize(
    "text", ["", "*", "a b", "ftp://x", "http://", "x/path", "u@x", "x:y", "x:99999", "x?y", "[::1"]
)
def test_what_is_no_host_is_an_error(text: str) -> None:
    with pytest.raises(OptionError, match="HOST"):
        Host.parse(text)


@pytest.mark.parametrize(
    "url",
    ["http://gpu7\\.evil.test", "http://gpu7\t.evil.test", "http://gpu７", "http://evil.test\n"],
)
def test_an_address_that_parsers_read_differently_is_an_error(url: str) -> None:
    with pytest.raises(OptionError, match="ASCII"):
        check_url(url)


@given(NAMES, NAMES)
def test_no_two_hosts_share_a_variable(one_name: str, other: str) -> None:
    first, second = variable_of(Host(one_name)), variable_of(Host(other))
    assert (first == second) == (one_name == other)
    assert variable_of(Host("gpu_7")) is None and variable_of(Host("::1")) is None


@given(NAMES, NAMES, PORTS)
def test_a_token_goes_to_its_host_alone_and_never_in_the_clear(
    name: str, other: str, port: int | None
) -> None:
    where = name if port is None else f"{name}:{port}"
    tokens = {name: SECRET}
    assert token_for(f"https://{where}/v1", tokens) == SECRET
    with pytest.raises(OptionError, match="encryption"):
        token_for(f"http://{where}/v1", tokens)
    assert token_for(f"http://{where}/v1", tokens | {f"http://{where}": "named"}) == "named"
    assert token_for(f"http://{where}/v1", {f"https://{where}": SECRET}) is None
    if other != name:
        assert token_for(f"https://{other}", tokens) is None


# Loading -----------------------------------------------------------------------------------------


def test_a_member_elsewhere_is_an_error_unless_its_server_is_allowed(tmp_path: Path) -> None:
    folder = saved("https://rm.test:8000/x", tmp_path / "far")
    for hosts in ((), ["other.test"], ["rm.test:8001"], ["http://rm.test"]):
        with pytest.raises(RemoteNotAllowedError, match=r"--allow-remote https://rm\.test:8000"):
            RewardEnsemble.from_pretrained(folder, allow_remote=hosts)
    tokens = {"rm.test": SECRET, "other.test": "x"}
    ensemble = RewardEnsemble.from_pretrained(folder, allow_remote=["rm.test"], tokens=tokens)
    assert ensemble.scorers[0].token == SECRET
    assert SECRET not in repr(ensemble)
    with pytest.raises(OptionError, match="True"):
        RewardEnsemble.from_pretrained(folder, allow_remote=True)  # type: ignore[arg-type]


def test_a_stranger_cannot_name_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A member.json with an address and ``AWS_SECRET_ACCESS_KEY`` used to send that secret."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    app = Seen()
    with doubles.serving(app) as url:
        folder = saved(url, tmp_path / "far")
        file = folder / "members/0/member.json"
        member = json.loads(file.read_text())
        assert "token_variable" not in member
        file.write_text(json.dumps(member | {"token_variable": "AWS_SECRET_ACCESS_KEY"}))
        record_digests(folder)  # a stranger can write these as well
        (tmp_path / "samples.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
        command = ["score", str(folder), f"--data={tmp_path / 'samples.jsonl'}"]
        command += [f"--out={tmp_path / 'out.jsonl'}"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main(command) == 2
        assert app.tokens == []
        assert "--allow-remote" in capsys.readouterr().err
        with pytest.warns(UserWarning, match="is ignored"):
            assert main([*command, f"--allow-remote={url}"]) == 0
    assert set(app.tokens) == {None}


def test_a_judge_names_none_either(tmp_path: Path) -> None:
    judge = JudgeScorer("http://127.0.0.1:9/v1", model="m", name="j")
    judge.save(tmp_path)
    stored = json.loads((tmp_path / "member.json").read_text())
    assert "token_variable" not in json.dumps(stored)
    stored["judge"]["token_variable"] = "HOME"
    (tmp_path / "member.json").write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match="--token HOST=ENV"):
        assert JudgeScorer.load(tmp_path).describe() == judge.describe()


def test_a_token_does_not_follow_a_redirect(tmp_path: Path) -> None:
    app = Seen()
    with doubles.serving(app) as other:

        async def moved(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                target = [(b"location", f"{other}/get_reward".encode())]
                await send({"type": "http.response.start", "status": 307, "headers": target})
                await send({"type": "http.response.body", "body": b""})

        with doubles.serving(moved) as url:
            folder = saved(url, tmp_path / "far")
            ensemble = RewardEnsemble.from_pretrained(
                folder, allow_remote=[url, other], tokens={url: SECRET}
            )
            with pytest.raises(RemoteRefusalError, match="307"):
                ensemble.score([Sample("q", "a")])
    assert app.tokens == []


# Versions ----------------------------------------------------------------------------------------


def test_a_version_that_adds_an_address_is_refused(tmp_path: Path) -> None:
    run = saved("http://127.0.0.1:9", tmp_path / "run")
    versions = Versions(run)
    near = RewardEnsemble.from_pretrained(run, allow_remote=["127.0.0.1"])
    versions.publish_ensemble(near.save_pretrained, provenance={"why": "the same server"})
    known = near.refresh()
    assert known.origin is not None and known.origin.version == 2
    # On an allowed host, but another server: nobody has allowed it where the version was loaded.
    other = RewardEnsemble((far("http://127.0.0.1:10"),), Normaliser.identity(1), mean())
    versions.publish_ensemble(other.save_pretrained, provenance={"why": "a stranger's"})
    with pytest.raises(RemoteNotAllowedError, match=r"127\.0\.0\.1:10"):
        known.refresh()
    elsewhere = RewardEnsemble((far("http://evil.test"),), Normaliser.identity(1), mean())
    versions.publish_ensemble(elsewhere.save_pretrained, provenance={"why": "a stranger's"})
    with pytest.raises(RemoteNotAllowedError, match=r"evil\.test"):
        known.refresh()


def test_a_server_and_a_job_refuse_such_a_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with doubles.serving(doubles.openrlhf()) as url:
        run = saved(url, tmp_path / "run")
        versions = Versions(run)

        def load() -> RewardEnsemble:
            return RewardEnsemble.from_pretrained(run, allow_remote=[url])

        versions.publish_ensemble(load().save_pretrained, provenance={"why": "the same"})
        with client(load) as asking:
            assert asking.post("/v1/score", json=one("A fox")).json()["version"] == "2"
            evil = RewardEnsemble((far("http://evil.test"),), Normaliser.identity(1), mean())
            versions.publish_ensemble(evil.save_pretrained, provenance={"why": "a stranger's"})
            answer = asking.post("/v1/refresh", json={})
            assert answer.status_code == 409
            assert answer.json()["error"]["type"] == "RemoteNotAllowedError"
            assert asking.post("/v1/score", json=one("A fox")).json()["version"] == "2"
    assert main(["verify", str(run), f"--allow-remote={url}"]) != 0
    assert "evil.test" in capsys.readouterr().err


def test_options_of_a_file_allow_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"loading:\n  trust_remote_code: ['a/b@{'0' * 64}']\n")
    assert main(["score", "runs/hh", "--data=x.jsonl", f"--config={file}"]) == 2
    assert "command line alone" in capsys.readouterr().err


def test_the_real_client_sends_the_token_to_its_server(tmp_path: Path) -> None:
    seen: list[str | None] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200, json={"rewards": [1.0]})

    transport = httpx.MockTransport(handle)
    two = (
        far("https://a.test", name="a", transport=transport),
        far("https://b.test", name="b", transport=transport),
    )
    ensemble = RewardEnsemble(two, Normaliser.identity(2), mean()).with_tokens({"a.test": SECRET})
    ensemble.score([Sample("q", "a")])
    assert sorted(seen, key=str) == [f"Bearer {SECRET}", None]
