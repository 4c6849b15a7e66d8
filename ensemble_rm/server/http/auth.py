"""The bearer token of a server, and which addresses need one."""

from __future__ import annotations

import hmac
import ipaddress
from base64 import b64decode
from dataclasses import dataclass, field

from ensemble_rm.errors import OptionError, ServerError, UnauthorisedError

_MIN_LENGTH = 16


@dataclass(frozen=True)
class Token:
    """The secret that requests must carry.

    As ``Authorization: Bearer SECRET``; or as the password of ``Basic``, for clients that take only
    an address: ``http://any:SECRET@host:8000/get_reward``.

    Parameters
    ----------
    secret : str
        At least 16 printable ASCII characters, without spaces.

    Raises
    ------
    OptionError
        If it is shorter, or has other characters.
    """

    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        # A header cannot carry other characters.
        valid = self.secret.isascii() and self.secret.isprintable() and " " not in self.secret
        if not valid or len(self.secret) < _MIN_LENGTH:
            raise OptionError(
                f"a token needs at least {_MIN_LENGTH} printable ASCII characters and no spaces; "
                "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )

    def check(self, header: bytes | None) -> None:
        """Check the Authorization header of a request, in constant time.

        Raises
        ------
        UnauthorisedError
            If there is no header, or it has another token.
        """
        if header is None:
            raise UnauthorisedError("no token; send the header Authorization: Bearer TOKEN")
        # Constant time: how long a comparison takes must not tell how much was right.
        if not hmac.compare_digest(_credential(header), self.secret.encode()):
            raise UnauthorisedError("wrong token")


def _credential(header: bytes) -> bytes:
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            # Basic: the token is the password, any user name passes.
            return b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address, which only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, token: Token | None) -> None:
    """Raise `ServerError` if other machines reach `host` and there is no token."""
    # A server that others reach without a token would answer anyone.
    if token is None and not is_loopback(host):
        raise ServerError(
            f"{host!r} is reached from other machines and there is no token; give one by "
            "--token-file FILE or in ENSEMBLE_RM_TOKEN, or bind 127.0.0.1"
        )
