"""The wire formats of a server, by name."""

from __future__ import annotations

from itertools import groupby

from ensemble_rm.errors import OptionError
from ensemble_rm.server.wire import llamafactory, native, openrlhf, sglang, vllm
from ensemble_rm.server.wire.format import Route, WireFormat

WIRE_FORMATS: dict[str, WireFormat] = {
    row.name: row
    for row in (native.FORMAT, openrlhf.FORMAT, vllm.FORMAT, sglang.FORMAT, llamafactory.FORMAT)
}


def register_wire_format(row: WireFormat) -> None:
    """Add a wire format to every application that is made afterwards.

    Parameters
    ----------
    row : WireFormat

    Raises
    ------
    OptionError
        If there is a format of that name, or one of its paths is taken and the requests cannot be
        told apart by `Route.keys`.
    """
    if row.name in WIRE_FORMATS:
        raise OptionError(f"there is a wire format {row.name!r} already; choose another name")
    group_routes([*WIRE_FORMATS.values(), row])
    WIRE_FORMATS[row.name] = row


def group_routes(formats: list[WireFormat]) -> dict[str, list[Route]]:
    """Return the routes of all formats by path.

    Raises
    ------
    OptionError
        If several share a path, and have the same keys, none, or other methods.
    """
    routes = [route for row in formats for route in row.routes]
    by_path = sorted(routes, key=lambda route: route.path)
    grouped = {path: list(same) for path, same in groupby(by_path, lambda route: route.path)}
    for path, same in grouped.items():
        if not path.startswith("/"):
            raise OptionError(f"a path begins with '/', not {path!r}")
        keys = [key for route in same for key in route.keys]
        distinct = len(set(keys)) == len(keys) and all(route.keys for route in same)
        if len(same) > 1 and not (distinct and len({route.methods for route in same}) == 1):
            raise OptionError(
                f"several wire formats have the path {path}; give each a key of its own in "
                "Route.keys, and the same methods"
            )
    return grouped
