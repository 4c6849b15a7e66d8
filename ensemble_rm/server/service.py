"""The reward server without HTTP: the served ensemble, its batches, and the request context.

Knows samples and scores; knows nothing of wire formats or sockets.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from ensemble_rm.calibration.calibration import require_calibration
from ensemble_rm.data.samples import Prompt, Sample
from ensemble_rm.ensemble.results import Comparison, Scores, compare_scored
from ensemble_rm.errors import (
    NonFiniteScoreError,
    NotReadyError,
    TooLargeError,
    UnprocessableError,
)
from ensemble_rm.rl.pinned import folder_digest, live_digest
from ensemble_rm.server.failures import SampleError
from ensemble_rm.server.metrics import Metrics
from ensemble_rm.server.options import Limits, ServerOptions
from ensemble_rm.server.scheduling import Batcher, CallThread, ScoringThread

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

_WARM_UP = [Sample("How are you?", answer, "Well.") for answer in ("Fine, thank you.", "Fine.")]
_DIGEST_LENGTH = 12
_BYTES_PER_TOKEN = 4
TOKENS_PER_TURN = 4  # tokens that a chat template adds around a turn
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ServedEnsemble:
    """An ensemble and the name of its version, which every response carries.

    Attributes
    ----------
    ensemble : RewardEnsemble
    version : str
        Its number in a folder of versions; else the version in its provenance; else the first
        characters of its digest.
    """

    ensemble: RewardEnsemble
    version: str


def name_version(ensemble: RewardEnsemble) -> str:
    """Return the name of an ensemble's version."""
    origin = ensemble.origin
    if origin is not None and origin.version is not None:
        return str(origin.version)
    named = ensemble.provenance.get("version")
    if named is not None:
        return str(named)
    digest = live_digest(ensemble) if origin is None else folder_digest(origin.folder)
    # Without a version number the contents name it.
    return digest[:_DIGEST_LENGTH]


class RewardService:
    """Scores requests in common batches.

    Parameters
    ----------
    load : callable
        Returns the ensemble; called once, in a thread.
    options : ServerOptions
    on_loaded : callable
        Called in the same thread after an ensemble has been loaded and warmed up.

    Attributes
    ----------
    metrics : Metrics
    draining : bool
        Whether the server is shutting down.
    """

    def __init__(
        self,
        load: Callable[[], RewardEnsemble],
        options: ServerOptions,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.options, self.metrics = options, Metrics()
        self._load, self._on_loaded = load, on_loaded
        self._served: ServedEnsemble | None = None
        self._changing = asyncio.Lock()
        self._loading = CallThread("loading")
        self._scoring = ScoringThread()
        self.batcher: Batcher[ServedEnsemble, Sample, Scores] = Batcher(
            lambda served, samples: self._scoring(served.ensemble, samples),
            join=Scores.join,
            group=lambda sample: sample.prompt,
            cost=estimate_tokens,
            options=options.batching,
            on_batch=self._count_batch,
        )
        self.draining = False
        self.began = int(time.time())
        self._follow()

    def _follow(self) -> None:
        """Register the metrics whose values are read at each scrape."""
        queue, counts = self.batcher.queue, self.batcher.counts
        follow = partial(self.metrics.follow, counter=True)
        self.metrics.follow("ready", "1 if requests are served.", lambda: float(self.ready))
        self.metrics.follow("queue_samples", "Queued samples.", lambda: queue.samples)
        self.metrics.follow("queue_tokens", "Queued tokens, estimated.", lambda: queue.tokens)
        follow("samples", "Scored samples.", lambda: counts.samples)
        follow("batches", "Scored batches.", lambda: counts.batches)
        follow("dropped_requests", "Requests whose client left.", lambda: counts.dropped)
        follow("refused_requests", "Requests refused by a full queue.", lambda: counts.refused)
        follow("scoring_seconds", "Time spent scoring.", lambda: self._scoring.seconds)

    def _count_batch(self, rows: int, seconds: float) -> None:
        self.metrics.batch_rows.observe(rows)
        self.metrics.batch_seconds.observe(seconds)

    # Life ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(
        self, on_failure: Callable[[BaseException], None] | None = None
    ) -> AsyncIterator[None]:
        """Load the ensemble and score; at the end, finish accepted requests.

        Parameters
        ----------
        on_failure : callable, optional
            Called with the error if the ensemble cannot be loaded; loading then runs in the
            background. Without it the ensemble is loaded first, and the error is raised.
        """
        if on_failure is None:
            await self.load()
            yield
            await self.close()
            return

        async def load() -> None:
            try:
                await self.load()
            except Exception as error:  # noqa: BLE001 - the server ends with it, whatever it is
                on_failure(error)

        task = asyncio.get_running_loop().create_task(load())
        yield
        # Still loading at shutdown: there is nothing to finish.
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await self.close()

    async def load(self) -> None:
        """Load the ensemble, warm it up, and begin to score."""
        # One change at a time: two refreshes would load twice.
        async with self._changing:
            served = await self._loading.run(partial(_warmed_up, self._load, None, self._on_loaded))
            self._served = served
        self.options.raw_text.check(served.ensemble.names)
        self.metrics.serve(served.version)
        self.batcher.start()
        _log.info("serving version %s", served.version)

    async def refresh(self) -> tuple[str, bool]:
        """Serve the version that is current in the ensemble's folder now.

        It is loaded and warmed up while the old version serves. Requests are scored by the version
        under which they were accepted.

        Returns
        -------
        version : str
        changed : bool
            Whether it is another version than before.

        Raises
        ------
        NotReadyError
            If no ensemble is loaded yet, or the server is shutting down.
        StorageError
            If the current version cannot be read; the old one continues to serve.
        """
        if self.draining:
            raise NotReadyError("the server is shutting down")
        async with self._changing:
            old = self.served
            load = partial(_warmed_up, old.ensemble.refresh, old, self._on_loaded)
            new = self._served = await self._loading.run(load)
        if new is not old:
            self.metrics.serve(new.version)
            _log.info("serving version %s", new.version)
        return new.version, new is not old

    async def close(self) -> None:
        """Finish accepted requests, and stop the threads."""
        self.draining = True
        await self.batcher.close()
        self._scoring.close()
        self._loading.close()

    def abandon(self) -> None:
        """Fail all pending requests, even those that are being scored."""
        self.draining = True
        self.batcher.abandon()

    @property
    def ready(self) -> bool:
        """Whether requests are served: loaded, warmed up and not shutting down."""
        return self._served is not None and self.batcher.serving and not self.draining

    @property
    def busy(self) -> bool:
        """Whether a thread is scoring or loading."""
        return self._scoring.busy or self._loading.busy

    @property
    def served(self) -> ServedEnsemble:
        """The ensemble that is served now.

        Raises
        ------
        NotReadyError
            If none is loaded yet.
        """
        if self._served is None:
            raise NotReadyError("the ensemble is being loaded")
        return self._served

    # Scoring -------------------------------------------------------------------------------------

    async def score(self, served: ServedEnsemble, samples: Sequence[Sample]) -> Scores:
        """Score a request's samples in common batches; failures are in `failed`, their rows NaN.

        Raises
        ------
        RequestError
            If the samples exceed a limit, or the queue is full.
        """
        check_samples(samples, self.options.limits)
        scores = await self.batcher.submit(served, samples)
        errors = dict(scores.failed)
        # An infinite reward is no reward either, though no member failed.
        for row in np.flatnonzero(~np.isfinite(scores.reward)).tolist():
            errors.setdefault(row, NonFiniteScoreError("a reward is NaN or infinite"))
        scored = np.ones(len(samples), dtype=np.bool_)
        scored[list(errors)] = False
        cut = scored & (scores.truncation.prompts | scores.truncation.completions)
        # Members that are missing where a reward exists: the aggregator omits them.
        missing = np.isnan(scores.raw[scored]).sum(axis=0)
        for error in errors.values():
            self.metrics.failed.labels(type(error).__name__).inc()
        for member in np.flatnonzero(missing):
            self.metrics.missing.labels(scores.names[member]).inc(int(missing[member]))
        if cut.any():
            self.metrics.truncated.inc(int(cut.sum()))
            if self.options.on_truncation == "refuse":
                for row in np.flatnonzero(cut).tolist():
                    errors[row] = TooLargeError("sample is longer than a member reads")
        return scores if len(errors) == len(scores.failed) else _failed(scores, errors)


def _failed(scores: Scores, errors: dict[int, Exception]) -> Scores:
    """Return scores in which the rows of all errors are NaN."""
    rows = list(errors)
    reward, members = scores.reward.copy(), scores.members.copy()
    reward[rows], members[rows] = np.nan, np.nan
    recorded = {**scores.errors} | {(row, None): error for row, error in errors.items()}
    return replace(scores, reward=reward, members=members, errors=recorded)


def _warmed_up(
    load: Callable[[], RewardEnsemble], old: ServedEnsemble | None, on_loaded: Callable[[], None]
) -> ServedEnsemble:
    """Load an ensemble and score once, so that the first request is not slow."""
    ensemble = load()
    if old is not None and ensemble is old.ensemble:
        return old
    # Members that already serve are warm, and must score in the scoring thread only.
    # The tuple is the same object when only the calibration changed.
    if old is None or ensemble.scorers is not old.ensemble.scorers:
        ensemble.score(_WARM_UP)
    on_loaded()
    return ServedEnsemble(ensemble, name_version(ensemble))


# Requests -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RequestContext:
    """The interface for handlers of wire formats: scoring by the version that serves this request.

    Attributes
    ----------
    service : RewardService
    served : ServedEnsemble
        The version under which the request was accepted; it stays the same if another is loaded
        meanwhile.
    """

    service: RewardService
    served: ServedEnsemble = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "served", self.service.served)

    @property
    def ensemble(self) -> RewardEnsemble:
        """The ensemble that scores this request."""
        return self.served.ensemble

    @property
    def version(self) -> str:
        """Name of its version."""
        return self.served.version

    @property
    def model_name(self) -> str:
        """Name of the model in responses."""
        return self.service.options.name

    def read_texts(
        self,
        texts: str | Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        labels: Sequence[object] | None = None,
    ) -> list[Sample]:
        """Return the samples of texts in the policy's chat template.

        Parameters
        ----------
        texts : str or sequence of str
            Prompt and completion together.
        prompts : sequence of str, optional
            The prompt of each, in the same template.
        labels : sequence, optional
            Messages of each prompt, or None; see `openrlhf_reward`.

        Raises
        ------
        TooLargeError
            If a text is longer than a sample may be.
        UnprocessableError
            If a text cannot be split into turns and a member does not read it as it is, a text
            does not begin with its prompt, or the lists differ in length.
        """
        check_texts(texts, self.service.options.limits)
        raw_text, names = self.service.options.raw_text, self.ensemble.names
        texts = [texts] if isinstance(texts, str) else texts
        sent: Sequence[str | None] = prompts or [None] * len(texts)
        messages: Sequence[object] = labels or [None] * len(texts)
        if not len(texts) == len(sent) == len(messages):
            raise UnprocessableError(
                f"{len(texts)} texts, {len(sent)} prompts and {len(messages)} labels; send one of "
                "each per sample"
            )
        rows = zip(texts, sent, messages, strict=True)
        return [raw_text.split(text, prompt, label, names) for text, prompt, label in rows]

    async def score(
        self, samples: Sequence[Sample], *, on_error: Literal["raise", "record"] = "raise"
    ) -> Scores:
        """Score samples, in batches with those of other requests.

        Parameters
        ----------
        samples : sequence of Sample
        on_error : {"raise", "record"}
            Whether a sample that cannot be scored makes the request an error, or is in the
            scores' `failed`, its row NaN.

        Returns
        -------
        Scores
            In the order of the samples.

        Raises
        ------
        RequestError
            If the samples exceed a limit, or the queue is full.
        SampleError
            If a sample cannot be scored, under ``"raise"``.
        """
        scores = await self.service.score(self.served, samples)
        if on_error == "raise" and scores.failed:
            # The first failed row, so that the answer does not depend on chance.
            raise SampleError(*min(scores.failed.items()))
        return scores

    async def compare(self, samples: Sequence[Sample], subsets: Sequence[str | None]) -> Comparison:
        """Compare pairs: samples 2i and 2i + 1 are the sides of pair i.

        Raises
        ------
        NotCalibratedError, AggregatorMismatchError
            If there is no calibration, or it belongs to another aggregator.
        SampleError
            If a side cannot be scored, or a margin is too large for a float.
        """
        ensemble = self.ensemble
        calibration = require_calibration(ensemble.calibration, ensemble.aggregator)
        scores = await self.score(samples)
        columns = np.column_stack([scores.reward, scores.members])
        with np.errstate(over="ignore"):
            # Margins of finite scores may overflow.
            infinite = np.isinf(columns[::2] - columns[1::2]).any(axis=1)
        if infinite.any():
            cause = NonFiniteScoreError("the margin of a pair is too large for a float")
            raise SampleError(2 * int(np.argmax(infinite)), cause)
        return compare_scored(
            calibration, scores.reward, scores.members, scores.truncation, subsets=subsets
        )


# Limits -------------------------------------------------------------------------------------------


def check_texts(texts: str | Sequence[str], limits: Limits) -> None:
    """Raise `TooLargeError` if a text that is not split yet is longer than a sample may be."""
    for i, text in enumerate([texts] if isinstance(texts, str) else texts):
        if len(text) > limits.max_characters:
            raise TooLargeError(
                f"text {i} has {len(text)} characters, maximum {limits.max_characters}"
            )


def check_samples(samples: Sequence[Sample], limits: Limits) -> None:
    """Check the number and the length of a request's samples.

    Raises
    ------
    UnprocessableError
        If `samples` is empty.
    TooLargeError
        If there are too many, or one of them or all together are too long.
    """
    if not samples:
        raise UnprocessableError("request has no samples")
    if len(samples) > limits.max_samples:
        raise TooLargeError(
            f"{len(samples)} samples in one request, maximum {limits.max_samples}; send several "
            "requests"
        )
    for i, sample in enumerate(samples):
        size = _prompt_characters(sample.prompt) + len(sample.completion)
        size += len(sample.reference or "")
        if size > limits.max_characters:
            raise TooLargeError(
                f"sample {i} has {size} characters, maximum {limits.max_characters}"
            )
    tokens = sum(sum(estimate_tokens(sample)) for sample in samples)
    if tokens > limits.max_tokens:
        raise TooLargeError(
            f"about {tokens} tokens in one request, maximum {limits.max_tokens}; send several "
            "requests"
        )


def _prompt_characters(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def estimate_tokens(sample: Sample) -> tuple[int, int]:
    """Estimate the tokens of a sample's prompt and of its completion: a quarter of the bytes.

    Used for queues and limits, which cannot wait for a tokenizer.
    """
    prompt = sample.prompt
    turns = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    # Bytes, not characters: CJK text has about a token per character, of three bytes.
    shared = sum(TOKENS_PER_TURN + len(text.encode()) // _BYTES_PER_TOKEN for text in turns)
    return shared, TOKENS_PER_TURN + len(sample.completion.encode()) // _BYTES_PER_TOKEN
