"""Read a default from a function's source without importing its module.

Modules that score or train import torch, which takes seconds; ``--help`` shows their defaults, and
must not wait for that.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def default_of(module: str, function: str, parameter: str) -> Any:
    """Return the default of a function's or method's parameter.

    Parameters
    ----------
    module : str
    function : str
        ``"name"``, or ``"Class.name"``.
    parameter : str

    Raises
    ------
    LookupError
        If the parameter does not exist, or its default is neither a literal nor a module's
        constant.
    """
    body: list[ast.stmt] = _tree(module).body
    for name in function.split("."):
        node = next(
            (x for x in body if isinstance(x, ast.ClassDef | ast.FunctionDef) and x.name == name),
            None,
        )
        if node is None:
            raise LookupError(f"{module} has no {function}")
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    given = node.args
    # `ast` aligns positional defaults with the last parameters.
    positional = [*given.posonlyargs, *given.args]
    defaults = dict(
        zip(
            [a.arg for a in positional[len(positional) - len(given.defaults) :]],
            given.defaults,
            strict=True,
        )
    )
    keyword = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    defaults |= {a.arg: value for a, value in keyword if value is not None}
    if parameter not in defaults:
        raise LookupError(f"{module}.{function} has no default of {parameter!r}")
    return _value(module, defaults[parameter])


def constant_of(module: str, name: str) -> Any:
    """Return a module's constant.

    Raises
    ------
    LookupError
        If the module has no such constant, or it is not a literal.
    """
    return _value(module, ast.Name(name))


@cache
def _tree(module: str) -> ast.Module:
    package = module.partition(".")[0]
    spec = find_spec(package)  # of the package alone: finding a submodule imports its parents
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"no package {package}")
    root = Path(next(iter(spec.submodule_search_locations)))
    file = root.joinpath(*module.split(".")[1:])
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _value(module: str, node: ast.expr) -> Any:
    if not isinstance(node, ast.Name):
        # Literals only: evaluating an expression would need the module's imports.
        return ast.literal_eval(node)
    for statement in _tree(module).body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for name in statement.names:
                if (name.asname or name.name) == node.id:
                    return _value(statement.module, ast.Name(name.name))
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        if any(isinstance(target, ast.Name) and target.id == node.id for target in targets):
            value: ast.expr = statement.value  # type: ignore[attr-defined]
            return _value(module, value)
    raise LookupError(f"{module} has no constant {node.id}")
