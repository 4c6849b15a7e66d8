"""Tokens of servers that members and judges are on: read from the environment, never saved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from ensemble_rm.errors import OptionError
from ensemble_rm.members.remote.address import Host, Token, origin_of, token_for

PREFIX = "ENSEMBLE_RM_TOKEN_"


def variable_of(host: Host) -> str | None:
    """Return the environment variable that binds a token to a host; None if it has none.

    No two hosts have one variable: a stranger's ``a-b.com`` must not get the token of ``a.b.com``.
    So a dot becomes ``_`` and a hyphen ``__``; other hosts, such as IPv6 addresses, need --token.
    """
    if not re.fullmatch(r"[a-z0-9.\-]+", host.name):
        return None
    return PREFIX + host.name.upper().replace("-", "__").replace(".", "_")


def read_tokens(bound: Mapping[str, str], hosts: Sequence[str]) -> dict[str, Token]:
    """Return the bearer tokens of servers, by server.

    Parameters
    ----------
    bound : mapping of str to str
        By server, the environment variable that holds its token, as ``--token`` states it.
    hosts : sequence of str
        Other servers that may be used; those whose own variable is set have a token, too.

    Raises
    ------
    OptionError
        If a server is not ``[SCHEME://]HOST[:PORT]``, or a variable of `bound` is not set.
    """
    tokens: dict[str, Token] = {}
    for text in hosts:
        variable = variable_of(Host.parse(text))
        if variable is not None and (token := os.environ.get(variable)):
            tokens[text] = token
    for text, variable in bound.items():
        Host.parse(text)
        if not (token := os.environ.get(variable)):
            raise OptionError(f"the environment variable {variable}, named by --token, is not set")
        tokens[text] = token
    return tokens


def read_token(url: str, bound: Mapping[str, str]) -> Token | None:
    """Return the token of an address that the operator typed; None without one.

    Parameters
    ----------
    url : str
    bound : mapping of str to str
        As for `read_tokens`.

    Raises
    ------
    OptionError
        As `read_tokens`; or the tokens are of other servers.
    """
    tokens = read_tokens(bound, [origin_of(url)])
    if (token := token_for(url, tokens)) is None and bound:
        raise OptionError(f"--token names {', '.join(bound)}, but the server is {origin_of(url)}")
    return token
