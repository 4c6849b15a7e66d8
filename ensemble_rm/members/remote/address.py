"""Validation of a server's address and bearer token.

No error message shows a token, and no address may contain one.
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
    """Return a server's address without a trailing slash.

    Raises
    ------
    OptionError
        If it is not an http or https URL, or contains a user, a password, a query or a fragment:
        these may be secrets, and addresses are saved and shown.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port validates it
    except ValueError as error:
        raise OptionError(f"invalid server address: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise OptionError(
            f"a server's address must start with http:// or https://, got {url[:80]!r}"
        )
    if "@" in parts.netloc:
        raise OptionError(
            f"the address of {host} contains a user or a password, which would be saved and shown; "
            "pass `token` instead"
        )
    if parts.query or parts.fragment:
        raise OptionError(
            f"the address of {host} contains a query or a fragment, which may be a secret; "
            "remove it, and pass `token`"
        )
    return url.rstrip("/")


def endpoint(url: str, path: str) -> str:
    """Return the URL to post to: the address with the protocol's path, added if missing."""
    return url if urlsplit(url).path.endswith(path) else url + path


def bearer(token: Token | None) -> dict[str, str]:
    """Return the authorization header of a request; empty without a token.

    Raises
    ------
    OptionError
        If the token is empty or not valid in a header; the message does not show it.
    """
    if token is None:
        return {}
    value: object = token if isinstance(token, str) else token()
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise OptionError("the token is empty, or contains spaces or non-ASCII characters")
    return {"Authorization": f"Bearer {value}"}
