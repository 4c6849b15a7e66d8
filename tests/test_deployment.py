"""The deployment files: they parse, and what they name exists."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from server_process import lengths
from server_runs import client, one

from ensemble_rm.cli.main import make_parser

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "deployment"


def understood(command: list[str]) -> None:
    """`ensemble-rm serve …`, as the command line reads it."""
    assert make_parser().parse_args(command).command == "serve"


def test_the_unit_starts_a_command_that_exists() -> None:
    text = (FOLDER / "ensemble-rm.service").read_text().replace("\\\n", " ")
    unit = configparser.RawConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    assert {"Unit", "Service", "Install"} == set(unit.sections())
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("ensemble-rm")
    understood(words)
    args = make_parser().parse_args(words)
    # It is given the time that it asks for before it is killed.
    assert float(unit["Service"]["TimeoutStopSec"]) >= args.drain_seconds + args.stop_seconds


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_verifies_the_unit(tmp_path: Path) -> None:
    text = (FOLDER / "ensemble-rm.service").read_text()
    file = tmp_path / "ensemble-rm.service"
    file.write_text(text.replace("/opt/ensemble-rm/bin/ensemble-rm", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.name not in done.stderr, done.stderr


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
    understood(command)
    assert make_parser().parse_args(command).token_file is not None
    assert not any(word in json.dumps(found).lower() for word in ("password", "secret="))
    code = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2]
    compile(code, "healthcheck", "exec")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint")
def test_hadolint_has_nothing_to_say() -> None:
    subprocess.run(["hadolint", str(FOLDER / "Dockerfile")], check=True)


def test_every_alert_reads_a_figure_that_the_server_writes() -> None:
    said = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    rules = [rule for group in said["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 4
    with client(lengths()) as asking:
        asking.post("/v1/score", json=one("bad"))
        text = asking.get("/metrics").text
    there = {re.split(r"[ {]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    for rule in rules:
        assert {"alert", "expr", "for", "labels", "annotations"} == set(rule)
        for name in re.findall(r"ensemble_rm_\w+", rule["expr"]):
            assert name in there or name == "ensemble_rm_truncated_samples_total", name
        assert rule["expr"].count("(") == rule["expr"].count(")")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")
def test_promtool_takes_the_rules() -> None:
    subprocess.run(["promtool", "check", "rules", str(FOLDER / "alerts.yml")], check=True)


def test_nginx_gives_no_more_than_the_server_takes() -> None:
    text = re.sub(r"#.*", "", (FOLDER / "nginx.conf").read_text())
    assert text.count("{") == text.count("}")
    args = make_parser().parse_args(["serve", "x"])
    (size,) = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(size) * 2**20 <= args.max_body_bytes
    for name, own in (("header", args.header_seconds), ("body", args.body_seconds)):
        (seconds,) = re.findall(rf"client_{name}_timeout (\d+)s;", text)
        assert float(seconds) <= own
    assert "location = /v1/refresh { return 403; }" in text


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx")
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    text = (FOLDER / "nginx.conf").read_text()
    text = text.replace("listen 443 ssl;", "listen 127.0.0.1:8443;")
    text = re.sub(r"\s*ssl_certificate.*;", "", text).replace("/var/log/nginx", str(tmp_path))
    file = tmp_path / "nginx.conf"
    file.write_text(f"pid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/error.log;\n{text}")
    command = ["nginx", "-t", "-c", str(file), "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
