"""A server's address and bearer token, both checked; the token is never shown.

Knows URLs and tokens; knows nothing of requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias
from urllib.parse import urlsplit

from ensemble_rm.errors import OptionError

Token: TypeAlias = str | Callable[[], str]
"""A bearer token, or a function that returns the current one."""


def check_url(url: str) -> str:
    """Return a server's address without a slash at its end.

    Raises
    ------
    OptionError
        If it is no http or https URL, or carries a user, a password, a query or a fragment: those
        hold secrets, and addresses are saved and shown.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise OptionError(f"the server's address cannot be read: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise OptionError(f"a server's address begins with http:// or https://, not {url[:80]!r}")
    if "@" in parts.netloc:
        raise OptionError(
            f"the address of {host} holds a user or a password, which would be saved and shown; "
            "pass `token` instead"
        )
    if parts.query or parts.fragment:
        raise OptionError(
            f"the address of {host} has a query or a fragment, which may hold a secret; leave it "
            "out, and pass `token`"
        )
    return url.rstrip("/")


def endpoint(url: str, path: str) -> str:
    """Return where to post: the address, and the protocol's path unless it ends so already."""
    return url if urlsplit(url).path.endswith(path) else url + path


def bearer(token: Token | None) -> dict[str, str]:
    """Return the header that a request carries.

    Raises
    ------
    OptionError
        If the token is empty or cannot stand in a header; the message does not show it.
    """
    if token is None:
        return {}
    value: object = token if isinstance(token, str) else token()
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise OptionError("the token is empty, or holds blanks or characters beyond ASCII")
    return {"Authorization": f"Bearer {value}"}
