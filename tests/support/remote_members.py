"""Remote members over functions, in the place of the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx

from ensemble_rm import Sample
from ensemble_rm.members import ClientOptions, RemoteScorer

CALM = ClientOptions(backoff=1e-4, deadline=120, reset_after=0.01)
QUICK = replace(CALM, deadline=0.5)  # for servers that never answer: a busy machine takes longer
SECRET = "s3cret-tok3n"


def openrlhf(score: Callable[[str], Any], *, status: int = 200) -> httpx.MockTransport:
    """An OpenRLHF server over any function, in the place of the network."""

    async def handle(request: httpx.Request) -> httpx.Response:
        queries = json.loads(request.content)["query"]
        values = [score(query) for query in queries]
        return httpx.Response(status, content=json.dumps({"rewards": values}))

    return httpx.MockTransport(handle)


def member(transport: Any = None, **options: Any) -> RemoteScorer:
    given: dict[str, Any] = {"template": "plain", "raw_logit_check": "off", "name": "far"}
    given |= {"protocol": "openrlhf", "client": CALM, "transport": transport} | options
    return RemoteScorer("http://far.test", **given)


def samples(n: int) -> list[Sample]:
    return [Sample("", str(i)) for i in range(n)]
