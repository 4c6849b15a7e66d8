"""A reward model on another server, as one member.

Batches are sent concurrently. A sample that the server cannot score is NaN, and the aggregator's
policy for missing members applies. An unreachable server is an error, unless `on_outage` is
``"nan"``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
    RemoteUnavailableError,
)
from ensemble_rm.members.remote.address import Token, bearer, check_url, endpoint
from ensemble_rm.members.remote.client import ClientOptions, RejectedError, RemoteClient
from ensemble_rm.members.remote.loop_thread import LoopThread, Pending, work_through
from ensemble_rm.members.remote.protocols import RequestOptions, Wire, find_wire
from ensemble_rm.members.remote.raw_logit_check import (
    PROBES,
    RAW_LOGIT_CHECKS,
    RawLogitCheck,
    RawLogitReport,
    compare_orders,
)
from ensemble_rm.members.remote.request_text import Rendered, Renderer, TextTemplate
from ensemble_rm.members.remote.server_scorer import ServerScorer
from ensemble_rm.members.scorer import MemberScores, Truncation
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import from_row

T = TypeVar("T")
Outage: TypeAlias = Literal["raise", "nan"]
_Score: TypeAlias = float | RemoteError
_Orders: TypeAlias = tuple[list[_Score], list[_Score]]

_SPLIT_ATTEMPTS = 2  # for each half of a failed batch: the whole has used up `attempts` already


class RemoteScorer(ServerScorer):
    """A reward model on an HTTP server as one member.

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
        ``"plain"``, prompt, then completion; ``"pair"``, the two segments of an encoder
        (TEI); ``"messages"``, rendered by the server (vLLM); ``"sample"`` (ensemble-rm); or a
        function from a sample to a text, which cannot be saved. There is no
        default, since the template must be the one that the model was trained with.
    tokenizer : str or Path, optional
        Folder or Hub id, for ``"chat"``.
    model : str, optional
        Name of the model on a vLLM server (default: its only model).
    token : str or callable, optional
        Bearer token, or a function that returns the current one. Never saved, never shown.
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
        If an option is invalid.
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
        self._request_options = RequestOptions(model, special_tokens, truncate)
        single = self._renderer.form == "messages"  # one conversation per request
        self.batch_size = 1 if single else batch_size or self._wire.batch
        self.raw_logit_check_mode, self.on_outage = raw_logit_check, on_outage
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
                f"{self.protocol} accepts {' or '.join(wire.forms)}, but template "
                f"{self._renderer.template!r} produces {form}"
            )
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise OptionError(f"batch_size must be a whole number ≥ 1, not {batch_size!r}")
        if truncate and not wire.truncates:
            raise OptionError(f"{self.protocol} does not support truncate=True; leave it out")
        if model is not None and not wire.names_model:
            raise OptionError(f"{self.protocol} serves one model; leave out model={model!r}")
        if raw_logit_check not in RAW_LOGIT_CHECKS:
            raise OptionError(
                f"raw_logit_check must be one of {RAW_LOGIT_CHECKS}, not {raw_logit_check!r}"
            )
        if outage not in ("raise", "nan"):
            raise OptionError(f"on_outage must be 'raise' or 'nan', not {outage!r}")

    def _connect(self, token: Token | None) -> None:
        if isinstance(token, str):
            bearer(token)  # an invalid token fails here, not at the first request
        self._token = token
        self._client = RemoteClient(self.client, token=token, transport=self._transport)
        self._thread = LoopThread(self._client.aclose)
        self._checked = self.raw_logit_check_mode == "off"

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

    # Scoring -----------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, 1) raw logits; NaN where the server has no score, with a warning.

        The warning states the number of failures and the kind of the first; `score_detailed`
        returns the errors.

        Raises
        ------
        RemoteUnavailableError
            If the server could not be reached for any sample, and `on_outage` is ``"raise"``.
        RemoteRefusalError
            If the server refuses the address, the token or the model.
        RemoteActivationError
            If the check for raw logits fails under ``"error"``.
        """
        return self.begin(samples).result().scores

    def begin(self, samples: Sequence[Sample]) -> Pending[MemberScores]:
        """Send the requests without waiting; the result raises and warns as `score` does."""
        return self._begin(samples, self._warned)

    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,  # noqa: ARG002 - servers return no features
        progress: Progress = silent,  # noqa: ARG002
    ) -> MemberScores:
        """Score as `score` does; failures are in `errors`, by row, without a warning."""
        return self._begin(samples, lambda result: result).result()

    def raw_logit_check(self) -> RawLogitReport:
        """Send the probes; warn or raise if the scores cannot be raw logits.

        Raises
        ------
        RemoteActivationError
            Under ``"error"``.
        """
        call, probes = self._call(), self._renderer.render(PROBES)
        return self._thread.begin(call.both_orders(probes, self.batch_size), self._report).result()

    def _begin(self, samples: Sequence[Sample], read: Callable[[MemberScores], T]) -> Pending[T]:
        """Send the samples; before the first, send the probes, too."""
        call = self._call()
        checks = not self._checked and len(samples) > 0
        probes = self._renderer.render(PROBES) if checks else []
        items = self._renderer.render(samples)

        async def send() -> tuple[_Orders, list[_Score]]:
            orders = await call.both_orders(probes, self.batch_size)
            return orders, await call.score(items, self.batch_size)

        def finish(results: tuple[_Orders, list[_Score]]) -> T:
            orders, scores = results
            if checks and not self._checked:  # another thread may have reported in the meantime
                self._report(orders)
            return read(self._scores(scores))

        return self._thread.begin(send(), finish)

    def _call(self) -> _Call:
        return _Call(self._client, self._wire, self._request_options, self._endpoint)

    def _scores(self, scores: Sequence[_Score]) -> MemberScores:
        """Separate scores from errors; raise if the server was unreachable for all samples."""
        outages = [score for score in scores if isinstance(score, RemoteUnavailableError)]
        if self.on_outage == "raise" and scores and len(outages) == len(scores):
            raise outages[0]
        values = [np.nan if isinstance(score, Exception) else score for score in scores]
        return MemberScores(
            np.array(values, dtype=np.float64).reshape(-1, 1),
            Truncation.none(len(values)),
            errors={row: e for row, e in enumerate(scores) if isinstance(e, Exception)},
        )

    def _warned(self, result: MemberScores) -> MemberScores:
        self._warn_of_failures(result, what="score", unreadable="a response that is not a score")
        return result

    def _report(self, orders: _Orders) -> RawLogitReport:
        """Warn or raise by the probes' scores; if no probe was scored, check again next time."""
        report = compare_orders(*(self._scores(scores).scores[:, 0] for scores in orders))
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
        self._checked = True
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
            "model": self._request_options.model,
            "batch_size": self.batch_size,
            "special_tokens": self._request_options.special_tokens,
            "truncate": self._request_options.truncate,
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
        # `self_test`: the name before version 0.2.
        row = from_row(_RemoteRow, stored, former={"self_test": "raw_logit_check"})
        options = {field.name: getattr(row, field.name) for field in fields(row)}
        return cls(options.pop("url"), **{k: v for k, v in options.items() if k != "kind"})


@dataclass(frozen=True, slots=True)
class _RemoteRow:
    """A member as JSON; what the values may be, `RemoteScorer` checks."""

    kind: str
    url: str
    protocol: str
    name: str
    template: str
    client: ClientOptions
    raw_logit_check: RawLogitCheck
    on_outage: Outage
    tokenizer: str | None = None
    model: str | None = None
    batch_size: int | None = None
    special_tokens: bool | None = None
    truncate: bool = False


class _Call:
    """The batches of one call, sent concurrently."""

    def __init__(self, client: RemoteClient, wire: Wire, options: RequestOptions, url: str) -> None:
        self._client, self._wire, self._options, self._url = client, wire, options, url
        self._outage: RemoteUnavailableError | None = None

    async def both_orders(self, probes: Sequence[Rendered], size: int) -> _Orders:
        """Score probes in order and in reverse order; return both in order."""
        forward = await self.score(probes, size)
        return forward, (await self.score(probes[::-1], size))[::-1]

    async def score(self, items: Sequence[Rendered], size: int) -> list[_Score]:
        """Return a score or an error per sample, in order."""
        scores: list[_Score] = [np.nan] * len(items)

        async def send(start: int) -> None:
            scores[start : start + size] = await self._batch(items[start : start + size])

        starts = range(0, len(items), size)
        await work_through(starts, send, places=self._client.options.concurrency)
        return scores

    async def _batch(
        self, items: Sequence[Rendered], *, attempts: int | None = None
    ) -> list[_Score]:
        """Score a batch; if it fails as a whole, halve it until only bad samples fail."""
        # After one batch has waited for the whole deadline, the others do not wait again.
        if self._outage is not None:
            return [self._outage] * len(items)
        try:
            body = self._wire.request(items, self._options)
            response = await self._client.post(self._url, body, attempts=attempts)
            return [*self._wire.answer(response, len(items))]
        except RemoteUnavailableError as error:
            self._outage = error
            return [error] * len(items)
        except (RejectedError, RemoteAnswerError) as error:
            if len(items) == 1:
                return [error] * len(items)
            middle = len(items) // 2
            left = await self._batch(items[:middle], attempts=_SPLIT_ATTEMPTS)
            return left + await self._batch(items[middle:], attempts=_SPLIT_ATTEMPTS)
