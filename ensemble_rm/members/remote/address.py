"""Addresses of servers: which the operator allows, and to which a bearer token may be sent.

No error message shows a token, and no address may contain one. A saved ensemble names addresses,
and may be a stranger's: so the operator states which are used, and which token goes where.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias
from urllib.parse import SplitResult, urlsplit

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
    # What all parsers of URLs read alike: the host that is checked is the host that is asked.
    if not re.fullmatch(r"[!-\[\]-~]+", url):
        raise OptionError(
            "a server's address has printable ASCII characters without spaces and backslashes "
            f"(xn--… for other letters), got {url[:80]!r}"
        )
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


@dataclass(frozen=True, slots=True)
class Host:
    """A server as the operator names it: ``[SCHEME://]HOST[:PORT]``.

    Attributes
    ----------
    name : str
        Host name or IP address, in lower case.
    scheme : str, optional
        ``"http"`` or ``"https"``; None where the operator names none.
    port : int, optional
        None where the operator names none: every port of that host.
    """

    name: str
    scheme: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what the operator wrote.

        Raises
        ------
        OptionError
            If it is not ``[SCHEME://]HOST[:PORT]``.
        """
        scheme, separator, rest = str(text).rpartition("://")
        try:
            if (separator and scheme not in ("http", "https")) or not re.fullmatch(
                r"[\w.\-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", rest, re.ASCII
            ):
                raise ValueError
            parts = urlsplit(f"//{rest}")
            return cls(_name(parts), scheme or None, parts.port)
        except ValueError:
            raise OptionError(
                f"a server is named as [http://|https://]HOST[:PORT], such as gpu7 or "
                f"https://judge.example.com:8000, not {text!r}"
            ) from None

    def covers(self, url: str) -> bool:
        """Return whether an address has this host, and its scheme and port if it names them."""
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return (
            _name(parts) == self.name
            and self.scheme in (None, parts.scheme)
            and self.port in (None, port)
        )


def _name(parts: SplitResult) -> str:
    return (parts.hostname or "").rstrip(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def as_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Return the operator's list of servers, of which a single one may be given as text.

    Raises
    ------
    OptionError
        If an entry is not ``[SCHEME://]HOST[:PORT]``.
    """
    given: object = hosts
    if isinstance(given, bool):
        raise OptionError(f"allow_remote names servers, such as ['gpu7:8000'], not {given}")
    entries = (given,) if isinstance(given, str) else tuple(hosts)
    for entry in entries:
        Host.parse(entry)
    return entries


def is_allowed(url: str, hosts: Iterable[str]) -> bool:
    """Return whether the operator's list of servers has an address.

    Parameters
    ----------
    url : str
    hosts : iterable of str
        Each as `Host.parse` reads it.
    """
    return any(Host.parse(host).covers(url) for host in hosts)


def origin_of(url: str) -> str:
    """Return the scheme, host and port of an address."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def token_for(url: str, tokens: Mapping[str, Token]) -> Token | None:
    """Return the token that the operator has bound to an address; None without one.

    Parameters
    ----------
    url : str
    tokens : mapping of str to str or callable
        By server, as `Host.parse` reads it; one that names port or scheme goes before one that
        does not.

    Raises
    ------
    OptionError
        If the address is plain http to another machine, and the operator has not named http.
    """
    bound = [(Host.parse(text), text) for text in tokens]
    matching = [(host, text) for host, text in bound if host.covers(url)]
    if not matching:
        return None
    host, text = max(
        matching, key=lambda match: (match[0].port is not None, match[0].scheme is not None)
    )
    if host.scheme is None and urlsplit(url).scheme == "http" and not _is_loopback(host.name):
        raise OptionError(
            f"the token of {text} would be sent to {origin_of(url)} without encryption; bind it to "
            f"{origin_of(url)} if that is meant, or use https"
        )
    return tokens[text]


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
