"""A reward model on another server, as one member.

Batches are sent concurrently. A sample that the server cannot score is NaN, and the aggregator's
policy for missing members applies. A server that cannot be reached is an error, unless `on_outage`
is ``"nan"``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import (
    OptionError,
    RemoteActivationError,
    RemoteActivationWarning,
    RemoteAnswerError,
    RemoteError,
    RemoteFailureWarning,
    RemoteUnavailableError,
)
from ensemble_rm.members.remote.address import Token, bearer, check_url, endpoint
from ensemble_rm.members.remote.client import ClientOptions, RejectedError, RemoteClient
from ensemble_rm.members.remote.failures import count_failures
from ensemble_rm.members.remote.loop_thread import LoopThread, Pending, work_through
from ensemble_rm.members.remote.protocols import Asked, Wire, find_wire
from ensemble_rm.members.remote.raw_logit_check import (
    PROBES,
    RAW_LOGIT_CHECKS,
    RawLogitCheck,
    RawLogitReport,
    compare_orders,
)
from ensemble_rm.members.remote.request_text import Rendered, Renderer, TextTemplate
from ensemble_rm.members.remote.storage import StoredElsewhere
from ensemble_rm.members.scorer import MemberScores, Truncation
from ensemble_rm.progress import Progress, silent

T = TypeVar("T")
Outage: TypeAlias = Literal["raise", "nan"]
_Found: TypeAlias = float | RemoteError
_Orders: TypeAlias = tuple[list[_Found], list[_Found]]

_SPLIT_ATTEMPTS = 2  # tries of a part of a batch that failed as a whole


class RemoteScorer(StoredElsewhere):
    """A reward model behind HTTP as one member.

    Parameters
    ----------
    url : str
        Address of the server, without user, password or query; saved with the ensemble.
    protocol : str
        ``"vllm-classify"``, ``"vllm-pooling"``, ``"sglang"``, ``"tei"``, ``"openrlhf"`` or
        ``"ensemble-rm"``, this library's own server.
    name : str
        Name of the column.
    template : str or callable
        How a sample is rendered for the server: ``"chat"``, the chat template of `tokenizer`;
        ``"plain"``, prompt and completion in a row; ``"pair"``, the two segments of an encoder
        (TEI); ``"messages"``, which the server renders (vLLM); ``"sample"`` (ensemble-rm); or a
        function from a sample to a text, which cannot be saved. No default: only the
        model's author knows what it was trained with.
    tokenizer : str or Path, optional
        Folder or Hub id, for ``"chat"``.
    model : str, optional
        Name of the model on a vLLM server (default: its only one).
    token : str or callable, optional
        Bearer token, or a function that returns the current one. Never saved, never shown.
    token_variable : str, optional
        The environment variable in which the command line finds the token; saved. The library
        itself never reads it.
    batch_size : int, optional
        Samples per request (default: the protocol's; 1 with ``"messages"``).
    special_tokens : bool, optional
        Whether vLLM adds special tokens to a text (default: only with ``"plain"``).
    truncate : bool
        Whether the server (vLLM, TEI) may silently cut a text that is too long; otherwise such a
        sample has no score.
    raw_logit_check : {"warn", "error", "off"}
        What happens if the scores are not raw logits; a few probes are sent before the first score.
    on_outage : {"raise", "nan"}
        What happens if the server cannot be reached for any sample of a call.
    client : ClientOptions, optional
        Attempts, pauses, deadline, concurrency, circuit breaker.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network: a proxy, own certificates, a test.

    Raises
    ------
    OptionError
        If an option cannot be used.
    MissingExtraError
        If httpx is not installed.
    """

    kind = "remote"

    def __init__(
        self,
        url: str,
        *,
        protocol: str,
        name: str,
        template: TextTemplate,
        tokenizer: str | Path | None = None,
        model: str | None = None,
        token: Token | None = None,
        token_variable: str | None = None,
        batch_size: int | None = None,
        special_tokens: bool | None = None,
        truncate: bool = False,
        raw_logit_check: RawLogitCheck = "warn",
        on_outage: Outage = "raise",
        client: ClientOptions | None = None,
        transport: Any = None,
    ) -> None:
        self.url, self.protocol, self.names = check_url(url), protocol, (name,)
        self.client = client or ClientOptions()
        self._wire = find_wire(protocol)
        self._renderer = Renderer(
            template, tokenizer=tokenizer, strips_bos=self._wire.adds_special_tokens
        )
        self._check(model, batch_size, truncate, raw_logit_check, on_outage)
        if special_tokens is None:
            special_tokens = template == "plain"
        self._asked = Asked(model, special_tokens, truncate)
        single = self._renderer.form == "messages"
        self.batch_size = 1 if single else batch_size or self._wire.batch
        self.raw_logit_check_mode, self.on_outage = raw_logit_check, on_outage
        self._token_variable = token_variable
        self._transport = transport
        self._endpoint = endpoint(self.url, self._wire.path)
        self._connect(token)

    def _check(
        self,
        model: str | None,
        batch_size: int | None,
        truncate: bool,
        raw_logit_check: str,
        outage: str,
    ) -> None:
        form, wire = self._renderer.form, self._wire
        if form not in wire.forms:
            raise OptionError(
                f"{self.protocol} takes {' or '.join(wire.forms)}, and template "
                f"{self._renderer.template!r} makes {form}"
            )
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise OptionError(f"batch_size must be a whole number ≥ 1, not {batch_size!r}")
        if truncate and not wire.truncates:
            raise OptionError(f"{self.protocol} cannot be asked to truncate; leave it out")
        if model is not None and not wire.names_model:
            raise OptionError(
                f"{self.protocol} serves one model, and cannot be asked for {model!r}"
            )
        if raw_logit_check not in RAW_LOGIT_CHECKS:
            raise OptionError(
                f"raw_logit_check must be one of {RAW_LOGIT_CHECKS}, not {raw_logit_check!r}"
            )
        if outage not in ("raise", "nan"):
            raise OptionError(f"on_outage must be 'raise' or 'nan', not {outage!r}")

    def _connect(self, token: Token | None) -> None:
        if isinstance(token, str):
            bearer(token)  # refused before the first request
        self._token = token
        self._client = RemoteClient(self.client, token=token, transport=self._transport)
        self._thread = LoopThread(self._client.aclose)
        self._tested = self.raw_logit_check_mode == "off"

    def __repr__(self) -> str:
        return f"RemoteScorer({self.url!r}, protocol={self.protocol!r}, name={self.names[0]!r})"

    @property
    def address(self) -> str:
        """URL of the server."""
        return self.url

    @property
    def token(self) -> Token | None:
        """The bearer token, or a function that returns the current one."""
        return self._token

    @property
    def token_variable(self) -> str | None:
        """Environment variable in which the command line finds the token."""
        return self._token_variable

    # Scoring -----------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, 1) raw logits; NaN where the server has no score, with a warning.

        The warning counts failures and names the first one's kind, and quotes no server, which may
        quote a sample; `score_detailed` returns the errors.

        Raises
        ------
        RemoteUnavailableError
            If the server could not be reached for any sample, and `on_outage` is ``"raise"``.
        RemoteRefusalError
            If the server refuses the address, the token or the model.
        RemoteActivationError
            If the self-test fails, and is an error.
        """
        return self.begin(samples).result().scores

    def begin(self, samples: Sequence[Sample]) -> Pending[MemberScores]:
        """Send the requests without waiting; the result raises and warns as `score` does."""
        return self._begin(samples, self._warned)

    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,  # noqa: ARG002 - a server sends none
        progress: Progress = silent,  # noqa: ARG002
    ) -> MemberScores:
        """Score as `score` does; what failed is in `errors`, by row, and not in a warning."""
        return self._begin(samples, lambda answer: answer).result()

    def raw_logit_check(self) -> RawLogitReport:
        """Send the probes; warn or raise if the answers cannot be raw logits.

        Raises
        ------
        RemoteActivationError
            Under ``"error"``.
        """
        call, probes = self._call(), self._renderer.render(PROBES)
        return self._thread.begin(call.both_orders(probes, self.batch_size), self._tell).result()

    def _begin(self, samples: Sequence[Sample], read: Callable[[MemberScores], T]) -> Pending[T]:
        """Send the samples, after the probes where these were never answered."""
        call = self._call()
        tests = not self._tested and len(samples) > 0
        probes = self._renderer.render(PROBES) if tests else []
        items = self._renderer.render(samples)

        async def ask() -> tuple[_Orders, list[_Found]]:
            orders = await call.both_orders(probes, self.batch_size)
            return orders, await call.score(items, self.batch_size)

        def finish(answers: tuple[_Orders, list[_Found]]) -> T:
            if tests and not self._tested:
                self._tell(answers[0])
            return read(self._scores(answers[1]))

        return self._thread.begin(ask(), finish)

    def _call(self) -> _Call:
        return _Call(self._client, self._wire, self._asked, self._endpoint)

    def _scores(self, answers: Sequence[_Found]) -> MemberScores:
        away = [answer for answer in answers if isinstance(answer, RemoteUnavailableError)]
        if self.on_outage == "raise" and answers and len(away) == len(answers):
            raise away[0]
        scores = [np.nan if isinstance(answer, Exception) else answer for answer in answers]
        return MemberScores(
            np.array(scores, dtype=np.float64).reshape(-1, 1),
            Truncation.none(len(scores)),
            errors={row: e for row, e in enumerate(answers) if isinstance(e, Exception)},
        )

    def _warned(self, answer: MemberScores) -> MemberScores:
        if answer.errors:
            where = f"{self.names[0]!r} at {self.url}"
            text = count_failures(
                answer.errors.values(),
                len(answer.scores),
                what="score",
                where=where,
                unreadable="an answer that is no score",
            )
            warnings.warn(text, RemoteFailureWarning, stacklevel=4)
        return answer

    def _tell(self, orders: _Orders) -> RawLogitReport:
        """Report what the probes show; without an answer, they are sent again next time."""
        report = compare_orders(*(self._scores(answers).scores[:, 0] for answers in orders))
        if np.isnan(report.scores).all():
            return report
        if report.problems:
            text = f"{self.names[0]!r} at {self.url}: " + "; ".join(report.problems)
            if self.raw_logit_check_mode == "error":
                raise RemoteActivationError(
                    f"{text}. Serve the model's raw logit, or pass raw_logit_check='warn'"
                )
            if self.raw_logit_check_mode == "warn":
                warnings.warn(text, RemoteActivationWarning, stacklevel=4)
        self._tested = True
        return report

    def close(self) -> None:
        """Close the connections; the next score opens new ones."""
        self._thread.close()

    def with_token(self, token: Token | None) -> Self:
        """Return the same member with another token."""
        twin = copy.copy(self)
        twin._connect(token)
        return twin

    # Storage -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return what is saved and reported, without the token."""
        template = self._renderer.template
        tokenizer = self._renderer.tokenizer
        return {
            "kind": self.kind,
            "url": self.url,
            "protocol": self.protocol,
            "name": self.names[0],
            "template": template if isinstance(template, str) else repr(template),
            "tokenizer": None if tokenizer is None else str(tokenizer),
            "model": self._asked.model,
            "token_variable": self._token_variable,
            "batch_size": self.batch_size,
            "special_tokens": self._asked.special_tokens,
            "truncate": self._asked.truncate,
            "raw_logit_check": self.raw_logit_check_mode,
            "on_outage": self.on_outage,
            "client": asdict(self.client),
        }

    def _python(self) -> str | None:
        if not isinstance(self._renderer.template, str):
            return "a template"
        return None if self._transport is None else "a transport"

    @classmethod
    def _of(cls, stored: Mapping[str, Any]) -> Self:
        options = {name: value for name, value in stored.items() if name not in ("kind", "url")}
        if "self_test" in options:  # as it was named before version 0.2
            options["raw_logit_check"] = options.pop("self_test")
        return cls(stored["url"], **options | {"client": ClientOptions(**stored["client"])})


class _Call:
    """One call's batches: asked concurrently, each in its own place."""

    def __init__(self, client: RemoteClient, wire: Wire, asked: Asked, url: str) -> None:
        self._client, self._wire, self._asked, self._url = client, wire, asked, url
        self._outage: RemoteUnavailableError | None = None

    async def both_orders(self, probes: Sequence[Rendered], size: int) -> _Orders:
        """Ask in their order and in reverse; both answers in their order."""
        forward = await self.score(probes, size)
        return forward, (await self.score(probes[::-1], size))[::-1]

    async def score(self, items: Sequence[Rendered], size: int) -> list[_Found]:
        found: list[_Found] = [np.nan] * len(items)

        async def ask(start: int) -> None:
            found[start : start + size] = await self._batch(items[start : start + size])

        starts = range(0, len(items), size)
        await work_through(starts, ask, places=self._client.options.concurrency)
        return found

    async def _batch(
        self, items: Sequence[Rendered], *, attempts: int | None = None
    ) -> list[_Found]:
        """Ask for a batch; one that fails as a whole is halved until the culprits stand alone."""
        if self._outage is not None:  # who waited for the whole deadline waited for all
            return [self._outage] * len(items)
        try:
            body = self._wire.request(items, self._asked)
            answer = await self._client.post(self._url, body, attempts=attempts)
            return [*self._wire.answer(answer, len(items))]
        except RemoteUnavailableError as error:
            self._outage = error
            return [error] * len(items)
        except (RejectedError, RemoteAnswerError) as error:
            if len(items) == 1:
                return [error] * len(items)
            middle = len(items) // 2
            left = await self._batch(items[:middle], attempts=_SPLIT_ATTEMPTS)
            return left + await self._batch(items[middle:], attempts=_SPLIT_ATTEMPTS)
