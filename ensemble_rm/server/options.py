"""The options of a server: network, limits of a request, batching.

Each field's metadata has its help text; the command line derives its options from these
dataclasses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from ensemble_rm.errors import OptionError
from ensemble_rm.server.wire.raw_text import RawText

OnTruncation: TypeAlias = Literal["report", "refuse"]
_LAST_PORT = 2**16 - 1


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Address and shutdown of a server.

    Attributes
    ----------
    host : str
        Address to bind. Any other than the loopback address needs a token.
    port : int
        Port to bind; 0 picks a free one.
    drain_seconds : float
        Time from SIGTERM until no new connections are accepted; ``/ready`` is false meanwhile, so
        that load balancers take the server out.
    stop_seconds : float
        Time from then on for accepted requests to finish; the rest are answered 503.
    access_log : bool
        Log address, path and status of each request, never its text.

    Raises
    ------
    OptionError
        If the port is out of range, or a time is negative, infinite or NaN.
    """

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "address to bind; any other than 127.0.0.1 needs a token"},
    )
    port: int = field(default=8000, metadata={"help": "port to bind; 0 picks a free one"})
    drain_seconds: float = field(
        default=0.0,
        metadata={
            "help": "seconds after SIGTERM in which /ready is false and requests are still accepted"
        },
    )
    stop_seconds: float = field(
        default=300.0, metadata={"help": "seconds after draining for accepted requests to finish"}
    )
    access_log: bool = field(
        default=False,
        metadata={"help": "log address, path and status of each request, without its text"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _LAST_PORT:
            raise OptionError(f"port must be between 0 and {_LAST_PORT}, not {self.port}")
        for name in ("drain_seconds", "stop_seconds"):
            value = getattr(self, name)
            # With an infinite or NaN deadline, the server would never stop.
            if not 0 <= value < math.inf:
                raise OptionError(f"{name} must be a finite number of seconds >= 0, not {value:g}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request; one that exceeds them is refused before it costs more.

    Attributes
    ----------
    max_body_bytes : int
        Bytes of a request's body.
    max_samples : int
        Samples of a request; a pair has two.
    max_characters : int
        Characters of a sample: prompt, completion and reference together.
    max_tokens : int
        Tokens of a request, estimated as a quarter of its UTF-8 bytes.
    header_seconds, body_seconds : float
        Time for a request's headers, and for its body, to arrive.
    max_connections : int
        Open connections.
    max_connections_per_address : int
        Open connections of one client's address; connections from this machine are exempt, since a
        proxy here brings all clients under one address.

    Raises
    ------
    OptionError
        If a limit is not positive.
    """

    max_body_bytes: int = field(
        default=8 * 2**20, metadata={"help": "maximum bytes of a request's body"}
    )
    max_samples: int = field(
        default=1024, metadata={"help": "maximum samples of a request; a pair has two"}
    )
    max_characters: int = field(
        default=200_000, metadata={"help": "maximum characters of a sample"}
    )
    max_tokens: int = field(
        default=262_144, metadata={"help": "maximum estimated tokens of a request"}
    )
    max_connections: int = field(default=1024, metadata={"help": "maximum open connections"})
    max_connections_per_address: int = field(
        default=512,
        metadata={"help": "maximum open connections of one address other than this machine's"},
    )
    header_seconds: float = field(
        default=10.0, metadata={"help": "seconds for a request's headers to arrive"}
    )
    body_seconds: float = field(
        default=15.0, metadata={"help": "seconds for a request's body to arrive"}
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not value > 0:
                raise OptionError(f"{each.name} must be > 0, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How concurrent requests are batched.

    Attributes
    ----------
    batch_tokens : int
        Estimated tokens of a batch; a prompt that several samples share counts once.
    batch_samples : int
        Samples of a batch.
    window_seconds : float
        How long an idle worker waits for more requests. After a batch of several requests it waits
        2 % of that batch's time where this is longer; after 0.1 s without work it waits as long as
        requests keep coming within the window of one another. Never over 0.1 s.
    queue_samples, queue_tokens : int
        Size of the queue; a request that does not fit is answered 429 with a time to retry.

    Raises
    ------
    OptionError
        If a size is below 1, or the window is not in [0, 1] s.
    """

    batch_tokens: int = field(
        default=8192,
        metadata={"help": "maximum estimated tokens of a batch; a shared prompt counts once"},
    )
    batch_samples: int = field(default=256, metadata={"help": "maximum samples of a batch"})
    window_seconds: float = field(
        default=0.005,
        metadata={
            "help": "seconds that an idle worker waits for more requests, up to 0.1 in a burst"
        },
    )
    queue_samples: int = field(
        default=4096, metadata={"help": "maximum queued samples; further requests are answered 429"}
    )
    queue_tokens: int = field(
        default=1 << 20,
        metadata={
            "help": "maximum estimated tokens of queued samples; further requests are answered 429"
        },
    )

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "batch_samples", "queue_samples", "queue_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.window_seconds <= 1:
            raise OptionError(f"window_seconds must be in [0, 1], not {self.window_seconds}")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the application, wherever it runs.

    Attributes
    ----------
    name : str
        Name of the model in responses.
    on_truncation : {"report", "refuse"}
        Whether a sample that a member truncated is scored and reported as such, or is an error.
    limits : Limits
    batching : BatchOptions
    raw_text : RawText
        How text in the policy's chat template is read.

    Raises
    ------
    OptionError
        If `on_truncation` is neither of the two.
    """

    name: str = field(default="ensemble", metadata={"help": "name of the model in responses"})
    on_truncation: OnTruncation = field(
        default="report",
        metadata={"help": "whether a sample that a member truncated is scored, or refused"},
    )
    limits: Limits = field(default_factory=Limits)
    batching: BatchOptions = field(default_factory=BatchOptions)
    raw_text: RawText = field(default_factory=RawText)

    def __post_init__(self) -> None:
        if self.on_truncation not in ("report", "refuse"):
            raise OptionError(
                f"on_truncation must be 'report' or 'refuse', not {self.on_truncation!r}"
            )
