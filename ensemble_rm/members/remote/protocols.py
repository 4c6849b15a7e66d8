"""Requests to and responses of each kind of server: pure functions, one `Wire` per protocol.

Written from the released sources: vLLM 0.33 (``entrypoints/pooling``), SGLang 0.5.23
(``srt/entrypoints/http_server.py``), text-embeddings-inference (``router/src/http``), OpenRLHF
0.11.2 (``cli/serve_rm.py``). Where a server applies an activation by default, the request turns it
off, since a sigmoid or softmax cannot be undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ensemble_rm.data.samples import prompt_json
from ensemble_rm.errors import OptionError, RemoteAnswerError
from ensemble_rm.members.remote.request_text import Rendered

Body: TypeAlias = dict[str, Any]
Scored: TypeAlias = float | RemoteAnswerError
"""A score, or the reason why there is none."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The fields of a request other than its texts.

    Attributes
    ----------
    model : str, optional
        Name of the model on the server (default: its only model).
    special_tokens : bool
        Whether the server adds special tokens to a text.
    truncate : bool
        Whether the server may silently cut a text that is too long; otherwise it rejects the text.
    """

    model: str | None = None
    special_tokens: bool = True
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class Wire:
    """One protocol.

    Attributes
    ----------
    path : str
        Path of the URL.
    forms : tuple of str
        Accepted forms of a sample: ``"text"``, ``"pair"``, ``"messages"``, ``"sample"``.
    request : callable
        (rendered samples of one form, options) → body of the request.
    answer : callable
        (response's JSON, number of samples) → a score or an error per sample, in order.
        Raises `RemoteAnswerError` if the response as a whole cannot be read.
    batch : int
        Default number of samples per request.
    adds_special_tokens : bool
        Whether the server always adds special tokens to a text.
    truncates : bool
        Whether the server supports `RequestOptions.truncate`.
    names_model : bool
        Whether the server supports `RequestOptions.model`.
    """

    path: str
    forms: tuple[str, ...]
    request: Callable[[Sequence[Rendered], RequestOptions], Body]
    answer: Callable[[Any, int], list[Scored]]
    batch: int = 64
    adds_special_tokens: bool = False
    truncates: bool = False
    names_model: bool = False


def read_number(value: object) -> Scored:
    """Return a finite number as a float; for anything else, the error that says why not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return RemoteAnswerError(f"the score is {value!r}, not a number"[:200])
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else RemoteAnswerError(f"the score is {number}")


def _only(values: object, what: str) -> Scored:
    """Return the only number of a list: a reward model has one output."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return RemoteAnswerError(f"{what} is {type(values).__name__}, not a list of numbers")
    if len(values) != 1:
        return RemoteAnswerError(f"{what} has {len(values)} numbers; a reward model has one output")
    return read_number(values[0])


def _listed(value: object, n: int, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise RemoteAnswerError(f"{what} in the response is {type(value).__name__}, not a list")
    if len(value) != n:
        raise RemoteAnswerError(f"{what} in the response has {len(value)} of {n} scores")
    return value


def _field(answer: object, name: str) -> Any:
    if not isinstance(answer, Mapping) or name not in answer:
        has = sorted(map(str, answer)) if isinstance(answer, Mapping) else type(answer).__name__
        raise RemoteAnswerError(f"the response has no {name!r}, only {has}"[:300])
    return answer[name]


# vLLM --------------------------------------------------------------------------------------------


def _vllm_request(items: Sequence[Rendered], options: RequestOptions) -> Body:
    # Without use_activation=false, vLLM applies a sigmoid to a single logit.
    body: Body = {"use_activation": False}
    if items[0].messages is not None:  # vLLM takes one conversation per request
        body["messages"] = items[0].messages
    else:
        body["input"] = [item.text for item in items]
        body["add_special_tokens"] = options.special_tokens
    if options.model is not None:
        body["model"] = options.model
    if options.truncate:
        body["truncate_prompt_tokens"] = -1  # up to the model's own limit
    return body


def _pooling_request(items: Sequence[Rendered], options: RequestOptions) -> Body:
    return _vllm_request(items, options) | {"encoding_format": "float"}


def _by_index(answer: Any, n: int) -> list[Mapping[str, Any]]:
    """Return the entries of `data` in the order of their `index`."""
    entries = _listed(_field(answer, "data"), n, "'data'")
    ordered: list[Any] = [None] * n
    for entry in entries:
        index = _field(entry, "index")
        if not isinstance(index, int) or not 0 <= index < n or ordered[index] is not None:
            raise RemoteAnswerError(f"index {index!r} in the response is repeated or not below {n}")
        ordered[index] = entry
    return ordered


def _classify_answer(answer: Any, n: int) -> list[Scored]:
    return [_only(_field(entry, "probs"), "'probs'") for entry in _by_index(answer, n)]


def _pooling_answer(answer: Any, n: int) -> list[Scored]:
    return [_pooled(_field(entry, "data")) for entry in _by_index(answer, n)]


def _pooled(data: object) -> Scored:
    """Return the logit; for a model that scores every token, that of the last token."""
    if isinstance(data, list) and data and isinstance(data[-1], list):
        return _only(data[-1], "the last token's 'data'")
    return _only(data, "'data'")


# SGLang ------------------------------------------------------------------------------------------


def _sglang_request(items: Sequence[Rendered], _: RequestOptions) -> Body:
    # Not /v1/classify, which applies a softmax: over one logit that is always 1.
    return {"text": [item.text for item in items]}


def _sglang_answer(answer: Any, n: int) -> list[Scored]:
    entries = _listed(answer, n, "the list")
    return [_only(_field(entry, "embedding"), "'embedding'") for entry in entries]


# text-embeddings-inference -----------------------------------------------------------------------


def _tei_request(items: Sequence[Rendered], options: RequestOptions) -> Body:
    # Each text is a list of its own, since the server reads a flat list of two texts as one pair.
    inputs = [list(item.pair) if item.pair is not None else [item.text] for item in items]
    return {"inputs": inputs, "raw_scores": True, "truncate": options.truncate}


def _tei_answer(answer: Any, n: int) -> list[Scored]:
    scores: list[Scored] = []
    for labels in _listed(answer, n, "the list"):
        if not isinstance(labels, list) or len(labels) != 1:
            text = f"{labels!r} is not the score of one label; a reward model has one"
            scores.append(RemoteAnswerError(text[:200]))
        else:
            scores.append(read_number(_field(labels[0], "score")))
    return scores


# OpenRLHF ----------------------------------------------------------------------------------------


def _openrlhf_request(items: Sequence[Rendered], _: RequestOptions) -> Body:
    prompts = [item.prompt_text for item in items]
    return {"query": [item.text for item in items], "prompts": prompts, "labels": [""] * len(items)}


def _openrlhf_answer(answer: Any, n: int) -> list[Scored]:
    rewards = _field(answer, "rewards")
    if n == 1 and not isinstance(rewards, list):
        rewards = [rewards]
    return [
        _only(value, "a reward") if isinstance(value, list) else read_number(value)
        for value in _listed(rewards, n, "'rewards'")
    ]


# This library ------------------------------------------------------------------------------------


def _own_request(items: Sequence[Rendered], _: RequestOptions) -> Body:
    samples: list[Body] = []
    for item in items:
        assert item.sample is not None
        row: Body = {
            "prompt": prompt_json(item.sample.prompt),
            "completion": item.sample.completion,
        }
        if item.sample.reference is not None:
            row["reference"] = item.sample.reference
        samples.append(row)
    # partial: a sample that the server cannot score does not fail the others.
    return {"samples": samples, "partial": True}


def _own_answer(answer: Any, n: int) -> list[Scored]:
    rewards = _listed(_field(answer, "rewards"), n, "'rewards'")
    errors = answer.get("errors") or [None] * n
    return [
        RemoteAnswerError(f"the server's own error: {error}"[:200])
        if value is None and error
        else read_number(value)
        for value, error in zip(rewards, _listed(errors, n, "'errors'"), strict=True)
    ]


def _vllm(path: str, request: Callable[..., Body], answer: Callable[..., list[Scored]]) -> Wire:
    return Wire(path, ("text", "messages"), request, answer, truncates=True, names_model=True)


WIRES: dict[str, Wire] = {
    "vllm-classify": _vllm("/classify", _vllm_request, _classify_answer),
    "vllm-pooling": _vllm("/pooling", _pooling_request, _pooling_answer),
    "sglang": Wire(
        "/classify", ("text",), _sglang_request, _sglang_answer, adds_special_tokens=True
    ),
    "tei": Wire(
        "/predict",
        ("text", "pair"),
        _tei_request,
        _tei_answer,
        batch=32,  # the server's default --max-client-batch-size
        adds_special_tokens=True,
        truncates=True,
    ),
    "openrlhf": Wire("/get_reward", ("text",), _openrlhf_request, _openrlhf_answer),
    "ensemble-rm": Wire("/v1/score", ("sample",), _own_request, _own_answer),
}
"""The protocols by name."""


def find_wire(protocol: str) -> Wire:
    """Return the protocol of a name.

    Raises
    ------
    OptionError
        If the name is unknown.
    """
    if protocol not in WIRES:
        raise OptionError(f"protocol must be one of {', '.join(WIRES)}, not {protocol!r}")
    return WIRES[protocol]
