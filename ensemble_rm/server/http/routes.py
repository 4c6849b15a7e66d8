"""The handlers: each reads a body in its wire format, scores, and answers in that format.

Knows requests and the wire formats; knows nothing of models, files or sockets.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import NotReadyError, UnprocessableError
from ensemble_rm.rl.openrlhf import logs_spread
from ensemble_rm.server.http.bodies import json_answer, read_json, unless_gone
from ensemble_rm.server.http.limits import check_entries, check_lists, check_texts, read_model
from ensemble_rm.server.service import RewardService
from ensemble_rm.server.wire import llamafactory, native, openrlhf, sglang, vllm

if TYPE_CHECKING:
    from ensemble_rm.server.holder import Held
    from ensemble_rm.server.scheduling.outcomes import Scored

M = TypeVar("M", bound=BaseModel)


class Routes:
    """The handlers of one service."""

    def __init__(self, service: RewardService) -> None:
        self.service = service
        self.options = service.options
        self.began = int(time.time())

    # Its own format --------------------------------------------------------------------------

    async def score(self, request: Request) -> Response:
        """Score samples: rewards with the members' scores and their spread."""
        held = self.service.current
        asked = self._read(native.ScoreRequest, await self._body(request))
        other = native.read_aggregator(asked.aggregator, held.ensemble.aggregator)
        samples = native.read_samples(asked)
        outcomes = await unless_gone(request, self.service.outcomes(held, samples))
        rewards = native.aggregate(outcomes, other)
        if not asked.partial:
            native.require_rewards(rewards)
        said = native.score_answer(
            outcomes,
            rewards,
            names=held.ensemble.names,
            version=held.version,
            aggregator=str(other or held.ensemble.aggregator),
        )
        return json_answer(said, version=held.version)

    async def compare(self, request: Request) -> Response:
        """Compare pairs: the calibrated probability that a human prefers the first."""
        held = self.service.current
        asked = self._read(native.CompareRequest, await self._body(request))
        samples, subsets = native.read_pairs(asked)
        found = await unless_gone(request, self.service.compare(held, samples, subsets))
        said = native.compare_answer(found, version=held.version)
        return json_answer(said, version=held.version)

    async def refresh(self, request: Request) -> Response:  # noqa: ARG002
        """Serve the version that is current in the ensemble's folder now."""
        held, changed = await self.service.refresh()
        return json_answer({"version": held.version, "changed": changed}, version=held.version)

    # Others' formats -------------------------------------------------------------------------

    async def get_reward(self, request: Request) -> Response:
        """OpenRLHF: rewards of texts in the policy's template, messages beside them as labels."""
        held = self.service.current
        asked = self._read(openrlhf.OpenRLHFRequest, await self._body(request))
        check_texts(asked.query, self.options.limits)
        samples = openrlhf.read_openrlhf(asked, self.options.raw_text, held.ensemble.names)
        found = await self._scores(request, held, samples)
        said = openrlhf.openrlhf_answer(found, spread=logs_spread(held.ensemble))
        return json_answer(said, version=held.version)

    async def classify(self, request: Request) -> Response:
        """VLLM's body has `input` or `messages`, SGLang's `text`; each gets its own answer."""
        held = self.service.current
        body = await self._body(request)
        keys = set(body) if isinstance(body, dict) else set()
        if len(keys & {"input", "messages", "text", "input_ids"}) != 1:
            raise UnprocessableError(
                "a body of /classify has one of `input` or `messages`, as vLLM's, and `text`, as "
                "SGLang's"
            )
        if "text" in keys or "input_ids" in keys:
            return await self._sglang(request, held, self._read(sglang.SGLangText, body))
        asked: vllm.ClassifyChat | vllm.ClassifyText
        if "messages" in keys:
            asked = read_model(vllm.ClassifyChat, body)
        else:
            asked = self._read(vllm.ClassifyText, body)
            check_texts(asked.input, self.options.limits)
        samples = vllm.read_classify(asked, self.options.raw_text, held.ensemble.names)
        found = await self._scores(request, held, samples)
        said = vllm.classify_answer(
            found,
            samples,
            activation=asked.use_activation,
            name=self.options.name,
            answer_id=uuid4().hex,
            created=int(time.time()),
        )
        return json_answer(said, version=held.version)

    async def _sglang(self, request: Request, held: Held, asked: sglang.SGLangText) -> Response:
        samples = self._each(held, asked.text)
        found = await self._scores(request, held, samples)
        alone = isinstance(asked.text, str)
        said = sglang.sglang_answer(
            found, samples, alone=alone, version=held.version, answer_id=uuid4().hex
        )
        return json_answer(said, version=held.version)

    async def embeddings(self, request: Request) -> Response:
        """SGLang's: the embedding of a text is its reward."""
        held = self.service.current
        asked = self._read(sglang.EmbeddingsRequest, await self._body(request))
        samples = self._each(held, asked.input)
        found = await self._scores(request, held, samples)
        said = sglang.embeddings_answer(
            found, samples, encoding=asked.encoding_format, name=self.options.name
        )
        return json_answer(said, version=held.version)

    async def evaluation(self, request: Request) -> Response:
        """LLaMA-Factory: scores of texts in the policy's template."""
        held = self.service.current
        asked = self._read(llamafactory.ScoreEvaluationRequest, await self._body(request))
        samples = self._each(held, asked.messages)
        found = await self._scores(request, held, samples)
        said = llamafactory.evaluation_answer(found, model=asked.model, answer_id=uuid4().hex)
        return json_answer(said, version=held.version)

    # Beside scoring --------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        """Name the ensemble, as OpenAI's clients ask for it."""
        held = self.service.current
        card = {"id": self.options.name, "object": "model", "created": self.began}
        card |= {"owned_by": "ensemble_rm", "root": self.options.name, "parent": None}
        said = {"object": "list", "data": [card | {"version": held.version}]}
        return json_answer(said, version=held.version)

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        """Say that the process lives."""
        return json_answer({"status": "alive"})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        """Say whether requests are served: loaded, warmed up, not shutting down."""
        if self.service.draining:
            raise NotReadyError("the server shuts down")
        version = self.service.current.version
        if not self.service.ready:
            raise NotReadyError("the server scores no more; start it again")
        return json_answer({"status": "ready", "version": version}, version=version)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        """Figures for Prometheus."""
        return Response(self.service.metrics.text(), media_type=self.service.metrics.content_type)

    # -----------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> object:
        body: object = await read_json(request, self.options.limits)
        check_entries(body, self.options.limits)
        return body

    def _read(self, kind: type[M], body: object) -> M:
        check_lists(body, self.options.limits)
        return read_model(kind, body)

    def _each(self, held: Held, texts: str | list[str]) -> list[Sample]:
        check_texts(texts, self.options.limits)
        return self.options.raw_text.each(texts, held.ensemble.names)

    async def _scores(self, request: Request, held: Held, samples: list[Sample]) -> list[Scored]:
        return await unless_gone(request, self.service.scores(held, samples))
