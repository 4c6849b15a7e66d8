"""The reference: one page per public subpackage, from the names that its stub lists.

Pages are written to docs/reference/generated before Sphinx reads the sources. A name that a stub
gains is in the reference at the next build.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import ensemble_rm

PACKAGE = Path(ensemble_rm.__file__).parent
# Modules that are public as a whole.
MODULES = {"ensemble_rm.errors", "ensemble_rm.metrics"}


def public_packages() -> list[str]:
    """Return the public subpackages and modules, sorted."""
    stubs = PACKAGE.rglob("__init__.pyi")
    packages = {
        ".".join(("ensemble_rm", *stub.parent.relative_to(PACKAGE).parts)) for stub in stubs
    }
    return sorted((packages | MODULES) - {"ensemble_rm"})


def public_names(module: str) -> list[str]:
    """Return the names that a package lists or a public module defines, sorted."""
    home = import_module(module)
    if module in MODULES:
        return sorted(
            name
            for name, thing in vars(home).items()
            if not name.startswith("_")
            and (inspect.isclass(thing) or inspect.isfunction(thing))
            and thing.__module__ == module
        )
    packages = {f"{module}.{name}" for name in home.__all__} & set(public_packages())
    return sorted(name for name in home.__all__ if f"{module}.{name}" not in packages)


def home_of(name: str) -> str:
    """Return the subpackage in which a name of the top level is documented."""
    homes = [m for m in public_packages() if m not in MODULES and name in public_names(m)]
    return f"{homes[0]}.{name}"


def page_of(module: str) -> str:
    """Return the reStructuredText of a subpackage's page."""
    names = public_names(module)
    lines = [module, "=" * len(module), "", f".. automodule:: {module}", "   :no-members:", ""]
    lines += [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {name}" for name in names]
    for name in names:
        thing = getattr(import_module(module), name)
        if inspect.isclass(thing):
            lines += ["", f".. autoclass:: {name}", "   :members:"]
        else:
            lines += ["", f".. autofunction:: {name}"]
    return "\n".join(lines) + "\n"


def top_level_table() -> str:
    """Return the table of the names that ``import ensemble_rm`` offers."""
    names = [home_of(name) for name in public_names("ensemble_rm")]
    return "\n".join([".. autosummary::", "   :nosignatures:", "", *(f"   ~{n}" for n in names)])


def write_if_changed(path: Path, text: str) -> None:
    """Write a page; an unchanged one keeps its time, so that Sphinx does not read it again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(app: Sphinx) -> None:
    """Write the pages of the reference, and remove those of packages that are gone."""
    folder = Path(app.srcdir) / "reference" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{module}.rst": page_of(module) for module in public_packages()}
    pages["top_level.txt"] = top_level_table() + "\n"
    for old in folder.iterdir():
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        write_if_changed(folder / name, text)


def find_by_last_part(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Link `FitError` in a docstring to the one documented name that ends in it."""
    if node.get("refdomain") != "py" or node.get("reftype") != "obj":
        return None
    domain: Any = env.get_domain("py")
    target = str(node["reftarget"]).removesuffix("()")
    matches = domain.find_obj(env, None, None, target, None, 1)
    exact = [name for name, _ in matches if name.count(".") == target.count(".") + 2]
    if len(exact) != 1:
        return None
    node["reftarget"], node["reftype"] = exact[0], "obj"
    builder = app.builder
    found: nodes.Element | None = domain.resolve_xref(
        env, node["refdoc"], builder, "obj", exact[0], node, content
    )
    return found


# |x| is an absolute value here, never a substitution; what backticks enclose stays as it is.
LITERAL_OR_BARS = re.compile(r"(`+[^`]*`+)|\|(\S+?)\|")
REFERENCES = re.compile(r"\n\s*References\n\s*-{3,}\n(.*)\Z", re.DOTALL)


def add_cited_references(*event: Any) -> None:
    """Give a docstring those sources of its module that it cites.

    A module lists its sources once, for all its functions; each entry of the reference needs its
    own list. `event` is that of autodoc-process-docstring.
    """
    _app, what, _name, thing, _options, lines = event
    text = LITERAL_OR_BARS.sub(lambda m: m[1] or rf"\|{m[2]}\|", "\n".join(lines))
    lines[:] = text.split("\n")
    if what == "module":
        lines[:] = [*REFERENCES.sub("", text).split("\n"), ""]
        return
    cited = sorted(set(re.findall(r"\[(\d+)\]_", text)), key=int)
    if not cited or REFERENCES.search(text):
        return
    owner = thing.fget if isinstance(thing, property) else thing
    listed = REFERENCES.search(inspect.getdoc(sys.modules[owner.__module__]) or "")
    if listed is None:
        return  # Sphinx warns of the citation that has no entry
    sources = dict(re.findall(r"^\.\. \[(\d+)\] (.*(?:\n   .*)*)", listed[1], re.MULTILINE))
    lines += ["", "References", "----------"]
    lines += [line for i in cited for line in f".. [{i}] {sources[i]}".split("\n")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write_pages)
    # Before numpydoc, which reads the sections.
    app.connect("autodoc-process-docstring", add_cited_references, priority=400)
    app.connect("missing-reference", find_by_last_part)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
