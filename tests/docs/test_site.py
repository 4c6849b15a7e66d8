"""The documentation site: it builds without a warning, is complete, and needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support import CHECKOUT
from tests.test_public_names import PUBLIC, ROOMS

pytest.importorskip("sphinx")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings are errors: a broken reference, a page in no table of contents."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    command = [
        sys.executable,
        "-m",
        "sphinx",
        *options,
        str(CHECKOUT / "docs"),
        str(folder / "html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Page(HTMLParser):
    """The ids of a page, its links, and what a browser loads to show it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(str(values["id"]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        elif tag == "link" and values.get("href"):
            self.assets.append(str(values["href"]))
        elif values.get("src"):
            self.assets.append(str(values["src"]))


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html") if "_static" not in file.parts}


def documented(site: Path) -> set[str]:
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as stream:
        inventory = InventoryFile.load(stream, "", lambda _, name: name)
    return {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    names = documented(site)
    leaves = {name.rpartition(".")[2] for name in names}
    rooms = {name for name in PUBLIC if name.rpartition(".")[0] in ROOMS}
    assert len(rooms) > 100
    assert rooms <= names
    # The top level's names have their entries in their subpackages, which its table links to.
    assert {name.rpartition(".")[2] for name in PUBLIC} <= leaves


def test_links_inside_the_site_lead_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.exists() or (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in (pages[target].ids)
            ):
                broken.append((file.name, link))
    assert not broken


def test_the_site_loads_nothing_from_a_network(site: Path, pages: dict[Path, Page]) -> None:
    remote = re.compile(r"^(https?:)?//")
    for file, page in pages.items():
        assert not [asset for asset in page.assets if remote.match(asset)], file
    for style in site.rglob("*.css"):
        loaded = re.findall(r"url\(\s*['\"]?([^)'\"]+)", style.read_text(encoding="utf-8"))
        assert not [url for url in loaded if remote.match(url)], style
