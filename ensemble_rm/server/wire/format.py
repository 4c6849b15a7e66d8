"""A wire format: the routes of one kind of client, from which OpenAPI is generated.

Each built-in format is a module in this folder. `register` adds one from outside the package.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel

if TYPE_CHECKING:
    from ensemble_rm.server.service import RequestContext

Handler: TypeAlias = "Callable[[Any, RequestContext], Awaitable[object]]"


@dataclass(frozen=True, kw_only=True)
class Route:
    """One path of a wire format.

    Attributes
    ----------
    path : str
        Begins with a slash.
    handler : callable
        ``await handler(request, context)`` returns the response: an instance of `response`, or a
        value that serialises to its JSON. Exceptions become error responses.
    request, response : type of pydantic.BaseModel
    examples : mapping of str to JSON
        Example requests by name, for the OpenAPI description.
    keys : tuple of str
        Keys that only this request has, where several requests share a path: a body has exactly one
        key of all these requests.
    methods : tuple of str
    listed : bool
        Whether the response is an object, or a list of them.
    list_per_sample : bool
        Whether each list at the top of a body has an entry per sample, so that one that is longer
        than a request may be is refused before it is read.
    """

    path: str
    handler: Handler
    request: type[BaseModel]
    response: type[BaseModel]
    examples: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("POST",)
    listed: bool = False
    list_per_sample: bool = True


@dataclass(frozen=True)
class WireFormat:
    """The shape of requests and responses that one kind of client uses.

    Attributes
    ----------
    name : str
    routes : tuple of Route
    """

    name: str
    routes: tuple[Route, ...]
