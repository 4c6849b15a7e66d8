"""The deployment files: they parse, and what they name exists."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_rm import FunctionScorer, RewardEnsemble
from ensemble_rm.aggregation import make_aggregator
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import parse
from ensemble_rm.cli.serve import Serve
from ensemble_rm.server.lifecycle import _ANSWERING
from tests.support import CHECKOUT
from tests.support.server_process import length, lengths
from tests.support.server_runs import client, one, server

FOLDER = CHECKOUT / "docs" / "deployment"


def tool(name: str) -> str | None:
    """Where a program lies: on the path, beside this Python, or where only root's path looks."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", "/sbin"]
    return shutil.which(name, path=os.pathsep.join(places))


def read_command(words: list[str]) -> Serve:
    """`ensemble-rm serve …`, as the command line reads it."""
    invocation = parse(words)
    assert not isinstance(invocation, int) and isinstance(invocation.command, Serve)
    return invocation.command


def test_the_unit_starts_a_command_that_exists() -> None:
    text = (FOLDER / "ensemble-rm.service").read_text().replace("\\\n", " ")
    unit = configparser.RawConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    assert {"Unit", "Service", "Install"} == set(unit.sections())
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("ensemble-rm")
    network = read_command(words).network
    # It is given the time that it asks for before it is killed.
    assert float(unit["Service"]["TimeoutStopSec"]) >= network.drain_seconds + network.stop_seconds


@pytest.mark.skipif(tool("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_verifies_the_unit(tmp_path: Path) -> None:
    text = (FOLDER / "ensemble-rm.service").read_text()
    file = tmp_path / "ensemble-rm.service"
    file.write_text(text.replace("/opt/ensemble-rm/bin/ensemble-rm", "/bin/true"))
    command = [str(tool("systemd-analyze")), "verify", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.name not in done.stderr, done.stderr


DOCKER_STOPS = 10  # seconds from `docker stop` to its SIGKILL, unless it is told otherwise


def dockerfile() -> list[tuple[str, str]]:
    """The instructions, with their arguments."""
    text = (FOLDER / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def test_the_image_is_what_it_should_be() -> None:
    found = dockerfile()
    known = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "STOPSIGNAL"}
    known |= {"HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in found} <= known and found[0][0] == "FROM"
    assert all(":" in rest and "latest" not in rest for word, rest in found if word == "FROM")
    last = dict(found)
    assert last["USER"] not in ("0", "root")
    command = json.loads(last["ENTRYPOINT"])[1:] + json.loads(last["CMD"])
    serve = read_command(command)
    assert not any(word in json.dumps(found).lower() for word in ("password", "secret="))
    assert serve.token_file is not None
    assert serve.network.drain_seconds + serve.network.stop_seconds + _ANSWERING < DOCKER_STOPS
    code = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2]
    compile(code, "healthcheck", "exec")


def test_the_image_has_what_a_served_ensemble_may_need() -> None:
    """Members of every kind: those on other servers are asked with an extra of their own."""
    (installed,) = [rest for word, rest in dockerfile() if word == "RUN" and "pip install" in rest]
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', installed)
    assert {"server", "remote"} <= set(extras.split(","))
    declared = configparser.ConfigParser()
    declared.read(FOLDER.parent.parent / "setup.cfg")
    assert set(extras.split(",")) <= set(declared["options.extras_require"])


@pytest.mark.skipif(tool("hadolint") is None, reason="no hadolint")
def test_hadolint_has_nothing_to_say() -> None:
    subprocess.run([str(tool("hadolint")), str(FOLDER / "Dockerfile")], check=True)


def test_every_alert_reads_a_figure_that_the_server_writes() -> None:
    said = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    rules = [rule for group in said["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 4
    with client(lengths()) as asking:
        asking.post("/v1/score", json=one("bad"))
        text = asking.get("/metrics").text
    members = (FunctionScorer("near", lambda sample: 1.0), FunctionScorer("far", length))
    omit = make_aggregator("mean", nan="omit")
    with client(RewardEnsemble(members, Normaliser.identity(2), omit)) as asking:
        asking.post("/v1/score", json=one("bad"))
        text += asking.get("/metrics").text
    there = {re.split(r"[ {]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    for rule in rules:
        assert {"alert", "expr", "for", "labels", "annotations"} == set(rule)
        for name in re.findall(r"ensemble_rm_\w+", rule["expr"]):
            assert name in there or name == "ensemble_rm_truncated_samples_total", name
        assert rule["expr"].count("(") == rule["expr"].count(")")


@pytest.mark.skipif(tool("promtool") is None, reason="no promtool")
def test_promtool_takes_the_rules() -> None:
    subprocess.run(
        [str(tool("promtool")), "check", "rules", str(FOLDER / "alerts.yml")], check=True
    )


def test_nginx_gives_no_more_than_the_server_takes() -> None:
    text = re.sub(r"#.*", "", (FOLDER / "nginx.conf").read_text())
    assert text.count("{") == text.count("}")
    limits = read_command(["serve", "x"]).server.limits
    (size,) = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(size) * 2**20 <= limits.max_body_bytes
    for name, own in (("header", limits.header_seconds), ("body", limits.body_seconds)):
        (seconds,) = re.findall(rf"client_{name}_timeout (\d+)s;", text)
        assert float(seconds) <= own
    assert "location = /v1/refresh { return 403; }" in text


# nginx itself ------------------------------------------------------------------------------------

needs_nginx = pytest.mark.skipif(tool("nginx") is None, reason="no nginx")


def nginx_command(folder: Path, *, listen: int = 8443, replicas: tuple[int, ...] = ()) -> list[str]:
    """Write the shipped file for this machine, without TLS; return what starts nginx on it."""
    text = (FOLDER / "nginx.conf").read_text()
    text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{listen};")
    text = re.sub(r"\s*ssl_certificate.*;", "", text).replace("/var/log/nginx", str(folder))
    for host, port in zip(("10.0.0.11:8000", "10.0.0.12:8000"), replicas, strict=False):
        assert host in text
        text = text.replace(host, f"127.0.0.1:{port}")
    kept = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {\n", "http {\n" + kept, 1)
    file = folder / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""
    file.write_text(f"{user}pid {folder}/nginx.pid;\nerror_log {folder}/error.log;\n{text}")
    return [str(tool("nginx")), "-c", str(file), "-p", str(folder), "-e", f"{folder}/error.log"]


@needs_nginx
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    command = [*nginx_command(tmp_path), "-t"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def balancer(folder: Path, replicas: tuple[int, ...]) -> Iterator[int]:
    """nginx before these replicas, until the end; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = nginx_command(folder, listen=port, replicas=replicas)
    running = subprocess.Popen([*command, "-g", "daemon off;"])
    try:
        until = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 60):
                break
            assert running.poll() is None, (folder / "error.log").read_text()
            assert time.monotonic() < until, "nginx never listened"
            time.sleep(0.02)
        yield port
    finally:
        running.terminate()
        running.wait()


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {} if body is None else {"Content-Type": "application/json"}
        said = None if body is None else json.dumps(body)
        connection.request(method, path, said, headers)
        answer = connection.getresponse()
        text = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else {}
    finally:
        connection.close()


@needs_nginx
@pytest.mark.slow
def test_a_replica_that_is_killed_behind_nginx_costs_no_answer(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "nginx")]
    for folder in folders:
        folder.mkdir()
    wrong: list[Any] = []
    options = ("--slow-seconds", 0.01, "--rows", 4)
    with (
        server(folders[0], *options) as first,
        server(folders[1], *options) as second,
        balancer(folders[2], (first.port, second.port)) as port,
    ):
        for path in ("/v1/refresh", "/metrics"):
            assert ask(port, "POST" if path == "/v1/refresh" else "GET", path)[0] == 403

        def load(client: int) -> None:
            for i in range(25):
                text = "slow" + "x" * (25 * client + i)
                try:
                    status, said = ask(port, "POST", "/v1/score", one(text))
                except (OSError, HTTPException) as error:
                    wrong.append(error)
                    continue
                if status != 200 or said["raw"][0][0] != len(text):
                    wrong.append((status, said))

        clients = [threading.Thread(target=load, args=(i,)) for i in range(8)]
        for client_ in clients:
            client_.start()
        first.wait(lambda: first.metric("requests_total") > 15)
        second.wait(lambda: second.metric("requests_total") > 15)
        second.process.kill()
        for client_ in clients:
            client_.join()
        assert first.process.poll() is None and second.process.wait() != 0
    assert not wrong
