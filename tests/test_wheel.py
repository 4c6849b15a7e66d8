"""A wheel holds every file of the package: the stubs that names are read from, and the data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import CHECKOUT
from tests.test_public_names import PACKAGE, PUBLIC

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel that was built from a copy of the sources, as on an import path."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(PACKAGE, source / "ensemble_rm", ignore=unwanted)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", build, str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_every_file_of_the_package(installed: Path) -> None:
    wanted = {
        file.relative_to(PACKAGE)
        for file in PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    package = installed / "ensemble_rm"
    there = {file.relative_to(package) for file in package.rglob("*")}
    assert wanted <= there
    assert any(file.name == "__init__.pyi" for file in wanted)


def test_every_public_name_is_imported_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom importlib import import_module\nfrom pathlib import Path\n"
        "import ensemble_rm\n"
        "assert Path(ensemble_rm.__file__).is_relative_to(sys.argv[1]), ensemble_rm.__file__\n"
        "for name in sys.argv[2:]:\n"
        "    module, _, leaf = name.rpartition('.')\n"
        "    getattr(import_module(module), leaf)\n"
    )
    command = [sys.executable, "-c", code, str(installed), *PUBLIC]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
