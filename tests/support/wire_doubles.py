"""Servers that answer as the released ones do, over a function in the place of the model.

Each answer was read from the released source, its traps included:

- vLLM 0.33.0: ``vllm/entrypoints/pooling/classify/{protocol,serving}.py``, ``pooling/{protocol,
  serving}.py``, ``base/protocol.py``; the activation of one logit is a sigmoid
  (``model_executor/layers/pooler/activations.py``, PoolerClassify). Held against the server itself
  in ``test_remote_vllm.py``.
- SGLang 0.5.23: ``sglang/srt/entrypoints/http_server.py`` (classify_request), ``managers/
  tokenizer_manager.py`` (the dict of a request); ``/v1/classify`` is a softmax
  (``entrypoints/openai/serving_classify.py``).
- text-embeddings-inference: ``router/src/http/{types,server}.rs`` (PredictInput, predict),
  ``router/src/lib.rs`` (ErrorResponse).
- OpenRLHF 0.11.2: ``openrlhf/cli/serve_rm.py``.

Run as a program, it serves one of them in a process that can be killed:
``python wire_doubles.py NAME PORT``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Logit = Callable[[str], float]
LONGEST = 4000  # characters that a double's "model" takes


def logit_of(text: str) -> float:
    """A raw score in (−6, 6), another for each text, as float32."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return float(np.float32(12 * number / 2**32 - 6))


def sigmoid(x: float) -> float:
    return float(np.float32(1 / (1 + math.exp(-x))))


# vLLM --------------------------------------------------------------------------------------------


def vllm(
    logit: Logit = logit_of,
    *,
    tokens: bool = False,
    count: Callable[[str], int] = len,
    longest: int = LONGEST,
) -> Starlette:
    """``/classify`` and ``/pooling``; with `tokens`, of a model that scores every token.

    A text has `count` tokens, of which the model takes the `longest`.
    """

    async def classify(request: Request) -> Response:
        body = await request.json()
        refused = _vllm_refusal(body, count, longest)
        if tokens:
            message = "The model does not support Classification API"
            return _vllm_error(message, "NotImplementedError", 501)
        try:
            return refused or JSONResponse(_vllm_answer(body, logit, sizes, _class, "classify"))
        except ValueError:  # a NaN; Python 3.12 would name it
            return _vllm_error("Out of range float values are not JSON compliant")

    async def pooling(request: Request) -> Response:
        body = await request.json()
        item = partial(_pooled, tokens=tokens)
        # orjson, which makes null of what is not finite.
        return _vllm_refusal(body, count, longest) or JSONResponse(
            _null(_vllm_answer(body, logit, sizes, item, "pooling"))
        )

    def sizes(text: str) -> int:
        return min(count(text), longest)

    return _app({"/classify": classify, "/pooling": pooling})


def _class(index: int, value: float) -> dict[str, Any]:
    return {"index": index, "label": "LABEL_0", "probs": [value], "num_classes": 1}


def _pooled(index: int, value: float, *, tokens: bool) -> dict[str, Any]:
    data = [[value - 1.0], [value]] if tokens else [value]
    return {"index": index, "object": "pooling", "data": data}


def _null(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _null(one) for key, one in value.items()}
    return [_null(one) for one in value] if isinstance(value, list) else value


def _vllm_texts(body: dict[str, Any]) -> list[str]:
    if "messages" in body:
        return ["".join(f"<|{m['role']}|>{m['content']}" for m in body["messages"])]
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("this double reads texts")
    return texts


def _vllm_refusal(
    body: dict[str, Any], count: Callable[[str], int], longest: int
) -> Response | None:
    try:
        texts = _vllm_texts(body)
    except TypeError as error:  # pydantic's own words, there
        return _vllm_error(str(error), "Bad Request", param="body.input")
    if "normalize" in body:
        message = "Parameter `normalize` was removed; use `use_activation` instead."
        return _vllm_error(f"{message} (parameter=normalize)", param="normalize")
    if body.get("task") == "score":
        message = "`score` task was removed; use `classify` instead. (parameter=task)"
        return _vllm_error(message, param="task")
    if body.get("model", "reward") != "reward":
        message = f"The model `{body['model']}` does not exist."
        return _vllm_error(message, "NotFoundError", 404)
    if not texts:
        return _vllm_error("You must pass at least one prompt")
    if body.get("truncate_prompt_tokens") is None and max(map(count, texts)) > longest:
        # Its tokenizer stops one token beyond what the model takes.
        return _vllm_error(
            f"This model's maximum context length is {longest} tokens. However, your prompt "
            f"contains at least {longest + 1} input tokens, which exceeds this limit even without "
            "any output tokens. Please reduce the length of the input prompt. "
            f"(parameter=input_tokens, value={longest + 1})",
            param="input_tokens",
        )
    if "" in texts and not body.get("add_special_tokens", "messages" not in body):
        return _vllm_error("The decoder prompt cannot be empty")
    return None


def _vllm_answer(
    body: dict[str, Any],
    logit: Logit,
    count: Callable[[str], int],
    item: Callable[[int, float], dict[str, Any]],
    prefix: str,
) -> dict[str, Any]:
    texts = _vllm_texts(body)
    values = [logit(text) for text in texts]
    if body.get("use_activation") is not False:  # the default activates
        values = [sigmoid(value) for value in values]
    used = sum(map(count, texts))
    usage = {"prompt_tokens": used, "total_tokens": used, "completion_tokens": 0}
    return {
        "id": f"{prefix}-{uuid4().hex[:16]}",
        "object": "list",
        "created": int(time.time()),
        "model": "reward",
        "data": [item(i, value) for i, value in enumerate(values)],
        "usage": usage | {"prompt_tokens_details": None, "completion_tokens_details": None},
    }


def _vllm_error(
    message: str, kind: str = "BadRequestError", code: int = 400, param: str | None = None
) -> Response:
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=code)


# SGLang ------------------------------------------------------------------------------------------


def sglang(logit: Logit = logit_of) -> Starlette:
    """``/classify``, and ``/v1/classify``, whose softmax of one logit is 1."""

    async def classify(request: Request) -> Response:
        text = (await request.json())["text"]
        texts = [text] if isinstance(text, str) else text
        for one in texts:
            if len(one) >= LONGEST:
                message = f"The input ({len(one)} tokens) is longer than the "
                message += f"model's context length ({LONGEST} tokens)."
                return JSONResponse({"error": {"message": message}}, status_code=400)
        found = [_embedding(logit, one) for one in texts]
        # Not its orjson route: a NaN is an error inside, 500, in plain text.
        return JSONResponse(found[0] if isinstance(text, str) else found)

    async def softmax(request: Request) -> Response:
        given = (await request.json())["input"]
        texts = [given] if isinstance(given, str) else given
        used = sum(map(len, texts))
        usage = {"prompt_tokens": used, "total_tokens": used, "completion_tokens": 0}
        usage |= {"prompt_tokens_details": None, "reasoning_tokens": 0}
        content = {
            "id": f"classify-{uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": "reward",
            "data": [_class(i, 1.0) for i in range(len(texts))],
            "usage": usage | {"completion_tokens_details": None},
        }
        return JSONResponse(content)

    return _app({"/classify": classify, "/v1/classify": softmax})


def _embedding(logit: Logit, text: str) -> dict[str, Any]:
    meta = {"id": uuid4().hex, "finish_reason": {"type": "length", "length": 0}}
    meta |= {"prompt_tokens": len(text), "weight_version": "default"}
    meta |= {"num_retractions": 0, "e2e_latency": 0.01}
    return {"embedding": [logit(text)], "meta_info": meta}


# text-embeddings-inference -----------------------------------------------------------------------


def tei(logit: Logit = logit_of, *, largest: int = 32) -> Starlette:
    """``/predict``, where a flat list of two texts is one pair."""

    async def predict(request: Request) -> Response:
        body = await request.json()
        try:
            batch, inputs = _sequences(body["inputs"])
        except ValueError as error:  # axum's rejection of a body that does not deserialise
            return Response(f"Failed to deserialize the JSON body: {error}", status_code=422)
        if len(inputs) > largest:
            message = f"batch size {len(inputs)} > maximum allowed batch size {largest}"
            return _tei_error(message, "Validation", 413)
        if not body.get("truncate", False) and any(len(s) > LONGEST for s in inputs):
            return _tei_error(f"`inputs` must have less than {LONGEST} tokens", "Validation", 413)
        values = [logit(text) for text in inputs]
        if any(math.isnan(value) for value in values):
            return _tei_error("score is NaN", "Backend", 424)
        if not body.get("raw_scores", False):
            values = [sigmoid(value) for value in values]
        found = [[{"score": _f32(value), "label": "LABEL_0"}] for value in values]
        said = json.dumps(found if batch else found[0], separators=(",", ":"))
        return Response(said, media_type="application/json")

    return _app({"/predict": predict})


def _sequences(inputs: Any) -> tuple[bool, list[str]]:
    """Read PredictInput; a pair is joined, which the model's separator does there."""

    def sequence(value: Any) -> str:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError("expected a sequence of strings")
        if len(value) not in (1, 2):
            raise ValueError(f"invalid length {len(value)}")
        return "[SEP]".join(value)

    if isinstance(inputs, str):
        return False, [inputs]
    if not isinstance(inputs, list) or not inputs:
        raise ValueError("invalid length 0")
    if isinstance(inputs[0], str):
        return False, [sequence(inputs)]
    return True, [sequence(value) for value in inputs]


def _f32(value: float) -> float:
    return float(str(np.float32(value)))  # serde writes the shortest text of a float32


def _tei_error(message: str, kind: str, code: int) -> Response:
    return JSONResponse({"error": message, "error_type": kind}, status_code=code)


# OpenRLHF ----------------------------------------------------------------------------------------


def openrlhf(logit: Logit = logit_of) -> Starlette:
    """``/get_reward``."""

    async def get_reward(request: Request) -> Response:
        data = await request.json()
        rewards = [logit(query) for query in data.get("query")]
        extra = {"dummy_scores": rewards}
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": extra})

    return _app({"/get_reward": get_reward})


# Serving -----------------------------------------------------------------------------------------

APPS: dict[str, Callable[..., Starlette]] = {
    "vllm": vllm,
    "sglang": sglang,
    "tei": tei,
    "openrlhf": openrlhf,
}


def _app(routes: dict[str, Callable[..., Any]]) -> Starlette:
    return Starlette(routes=[Route(path, f, methods=["POST"]) for path, f in routes.items()])


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an app at a free port of this machine, in a thread; yields its address."""
    import uvicorn

    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the double did not start")
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def main(arguments: Sequence[str]) -> None:
    """Serve a double at a port until the process ends; a text is scored in some milliseconds."""
    import uvicorn

    def slowly(text: str) -> float:
        time.sleep(0.002)
        return logit_of(text)

    name, port = arguments
    uvicorn.run(APPS[name](slowly), port=int(port), log_level="critical", ws="none")


if __name__ == "__main__":
    main(sys.argv[1:])
