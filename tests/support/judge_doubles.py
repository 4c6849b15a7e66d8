"""A chat server with a judge in it whose mind is known, and what it does wrong on request.

Answers have the fields of vLLM 0.33's ``entrypoints/openai/chat_completion/protocol.py``
(ChatCompletionResponse, ChatCompletionLogProbs).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Texts = dict[str, str]


def quality(text: str) -> float:
    """What the judge thinks of a text, in logits: another for each, in (−2, 2)."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return 4 * number / 2**32 - 2


def read_texts(messages: list[dict[str, str]]) -> Texts:
    """The texts between the lines; each begins and ends once, under one digest."""
    whole = messages[-1]["content"]
    match = re.match(r"<<<begin request ([0-9a-f]{16})>>>\n", whole)
    assert match
    nonce = match[1]
    found = {}
    for title in re.findall(rf"<<<begin ([\w ]+) {nonce}>>>", whole):
        assert whole.count(f"<<<begin {title} {nonce}>>>") == 1
        assert whole.count(f"<<<end {title} {nonce}>>>") == 1
        begin, end = f"<<<begin {title} {nonce}>>>\n", f"\n<<<end {title} {nonce}>>>"
        found[title] = whole.split(begin)[1].split(end)[0]
    return found


def entry(options: Mapping[str, float], chosen: str | None = None) -> dict[str, Any]:
    """One token of a reply, with the log-probability of each option, the likeliest first."""
    ranked = sorted(options.items(), key=lambda item: -item[1])
    named = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in ranked]
    token = ranked[0][0] if chosen is None else chosen
    own = next((one for one in named if one["token"] == token), {"token": token, "logprob": -20.0})
    return own | {"top_logprobs": named}


def completion(
    text: str, tokens: list[dict[str, Any]] | None, usage: dict[str, int] | None = None
) -> dict[str, Any]:
    """A chat completion."""
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None if tokens is None else {"content": tokens},
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": usage or {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }


def two_way(texts: Texts, *, bias: float, tie: float = 0.0) -> dict[str, float]:
    """P(A), P(B), P(C) of a judge that prefers the first place by `bias` logits."""
    margin = quality(texts["answer A"]) - quality(texts["answer B"]) + bias
    p = 1 / (1 + math.exp(-margin))
    found = {"A": p * (1 - tie), "B": (1 - p) * (1 - tie)}
    return found | ({"C": tie} if tie else {})


def judge(
    *,
    bias: float = 0.0,
    tie: float = 0.0,
    offers: str = "logprobs",
    seen: list[dict[str, Any]] | None = None,
    spoil: Callable[[Texts], bool] = lambda texts: False,
) -> httpx.MockTransport:
    """A judge of pairs.

    `offers`: ``"logprobs"``, ``"nothing"`` (silently), or ``"refuses"`` (a 400 where they are
    asked for). `spoil`: of which questions it answers nonsense.
    """

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if seen is not None:
            seen.append(body | {"authorization": request.headers.get("Authorization")})
        if offers == "refuses" and body.get("logprobs"):
            error = {
                "message": "logprobs are not supported",
                "type": "BadRequestError",
                "code": 400,
            }
            return httpx.Response(400, json={"error": error})
        texts = read_texts(body["messages"])
        if spoil(texts):
            return httpx.Response(200, json=completion("Well, it depends.", None))
        options = two_way(texts, bias=bias, tie=tie)
        word = max(options, key=options.__getitem__)
        tokens = [entry({**options, "The": 1e-6}, word)] if body.get("logprobs") else None
        if offers == "nothing":
            tokens = None
        return httpx.Response(200, json=completion(word, tokens))

    return httpx.MockTransport(handle)


def app_of(transport: httpx.MockTransport) -> Starlette:
    """The same server behind real HTTP."""

    async def answer(request: Request) -> Response:
        asked = httpx.Request(
            request.method,
            str(request.url),
            content=await request.body(),
            headers=dict(request.headers),
        )
        found = transport.handler(asked)
        assert isinstance(found, httpx.Response)
        return Response(found.content, found.status_code, media_type="application/json")

    return Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
