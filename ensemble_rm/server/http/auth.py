"""Who may ask: a bearer token, compared in constant time, and no address that others reach without.

Knows header values and host names; knows nothing of HTTP servers. Reads no file and no environment:
the command line does.
"""

from __future__ import annotations

import hmac
import ipaddress
from base64 import b64decode
from dataclasses import dataclass, field

from ensemble_rm.errors import OptionError, ServerError, UnauthorisedError

LEAST = 16
"""Characters of a token."""


@dataclass(frozen=True)
class Token:
    """The secret that requests carry.

    ``Authorization: Bearer SECRET``, or the password of ``Basic``, which is how clients that send
    no headers of their own do it: ``http://any:SECRET@host:8000/get_reward``.

    Parameters
    ----------
    secret : str
        At least 16 printable ASCII characters, without spaces.

    Raises
    ------
    OptionError
        If it is shorter, or holds something else.
    """

    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        fine = self.secret.isascii() and self.secret.isprintable() and " " not in self.secret
        if not fine or len(self.secret) < LEAST:
            raise OptionError(
                f"a token has at least {LEAST} printable ASCII characters and no spaces; make one "
                "with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )

    def check(self, header: bytes | None) -> None:
        """Let a request pass, by its Authorization header.

        Raises
        ------
        UnauthorisedError
            If there is no header, or it holds something else.
        """
        if header is None:
            raise UnauthorisedError("this server asks for a token: Authorization: Bearer TOKEN")
        if not hmac.compare_digest(_credential(header), self.secret.encode()):
            raise UnauthorisedError("the token is not this server's")


def _credential(header: bytes) -> bytes:
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that binds `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, token: Token | None) -> None:
    """Raise `ServerError` where `host` is reached from other machines and no token is asked for."""
    if token is None and not is_loopback(host):
        raise ServerError(
            f"{host!r} is reached from other machines, and there is no token: give one by "
            "--token-file FILE or in ENSEMBLE_RM_TOKEN, or bind 127.0.0.1"
        )
