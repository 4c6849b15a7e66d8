"""The wire formats of a server."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from ensemble_rm.errors import OptionError
from ensemble_rm.server.wire import llamafactory, native, openrlhf, sglang, vllm
from ensemble_rm.server.wire.format import Route, WireFormat

_FORMATS: dict[str, WireFormat] = {
    row.name: row
    for row in (native.FORMAT, openrlhf.FORMAT, vllm.FORMAT, sglang.FORMAT, llamafactory.FORMAT)
}


def register(row: WireFormat) -> None:
    """Add a wire format to every application that is made afterwards.

    Parameters
    ----------
    row : WireFormat

    Raises
    ------
    OptionError
        If the name is taken, or a path is taken and `Route.keys` does not distinguish the requests.
    """
    if row.name in _FORMATS:
        raise OptionError(f"there is a wire format {row.name!r} already; choose another name")
    group_routes([*_FORMATS.values(), row])
    _FORMATS[row.name] = row


def routes_by_path() -> dict[str, list[Route]]:
    """Return the routes of all registered formats."""
    return group_routes(_FORMATS.values())


def group_routes(formats: Iterable[WireFormat]) -> dict[str, list[Route]]:
    """Return the routes of formats by path.

    Raises
    ------
    OptionError
        If a path does not begin with a slash, or several routes share one and have the same keys,
        none, or other methods.
    """
    routes = [route for row in formats for route in row.routes]
    by_path = sorted(routes, key=lambda route: route.path)
    grouped = {path: list(same) for path, same in groupby(by_path, lambda route: route.path)}
    for path, same in grouped.items():
        if not path.startswith("/"):
            raise OptionError(f"path must begin with '/', not {path!r}")
        keys = [key for route in same for key in route.keys]
        distinct = len(set(keys)) == len(keys) and all(route.keys for route in same)
        if len(same) > 1 and not (distinct and len({route.methods for route in same}) == 1):
            raise OptionError(
                f"several routes have the path {path}; give each keys of its own in Route.keys, "
                "and the same methods"
            )
    return grouped
