"""OpenRLHF's ``/get_reward``, as its ``cli/serve_rm.py`` answers (openrlhf 0.11).

Lists, for one sample, too: its trainer makes a tensor of each. Pure: knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, JsonValue

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import BadRequestError, NonFiniteScoreError, UnprocessableError
from ensemble_rm.server.http.limits import parse_json
from ensemble_rm.server.scheduling.outcomes import SampleError, Scored
from ensemble_rm.server.wire.native import Text
from ensemble_rm.server.wire.raw_text import RawText


class OpenRLHFRequest(BaseModel):
    """Texts in the policy's template; the messages travel in `labels`, as JSON."""

    query: list[Text] = Field(min_length=1, fail_fast=True)
    prompts: list[str] | None = Field(None, fail_fast=True)
    labels: list[JsonValue] | None = Field(None, fail_fast=True)


class OpenRLHFAnswer(BaseModel):
    """One number a query; `scores` drive dynamic filtering."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def read_openrlhf(
    request: OpenRLHFRequest, raw_text: RawText, names: Sequence[str]
) -> list[Sample]:
    """Return the samples of a request.

    Raises
    ------
    UnprocessableError
        If the lists differ in length, or a query cannot be scored as it stands.
    """
    n = len(request.query)
    prompts: Sequence[str | None] = request.prompts or [None] * n
    labels: Sequence[Any] = request.labels or [None] * n
    if not n == len(prompts) == len(labels):
        raise UnprocessableError(
            f"{n} queries, {len(prompts)} prompts and {len(labels)} labels; send one of each"
        )
    rows = zip(request.query, prompts, labels, strict=True)
    return [raw_text.split(query, prompt, _label(label), names) for query, prompt, label in rows]


def _label(label: object) -> object:
    """Return what a label holds; one that is no JSON, such as a right answer, holds no messages."""
    if not isinstance(label, str):
        return label
    try:
        said = parse_json(label.encode())
    except BadRequestError:
        return None
    return None if isinstance(said, str) else said  # text in text is not read again


def openrlhf_answer(found: Sequence[Scored], *, spread: bool) -> dict[str, Any]:
    """Return the answer to an `OpenRLHFRequest`.

    Parameters
    ----------
    found : sequence of Scored
    spread : bool
        Whether ``extra_logs`` hold ``member_std``: for every request of an ensemble, or for none.

    Raises
    ------
    SampleError
        If one of the logs is beyond a float: its client makes tensors of them, without a null.
    """
    rewards = [one.reward for one in found]
    with np.errstate(over="ignore"):
        logs = {"member_mean": _finite([float(np.nanmean(one.members)) for one in found])}
    if spread:
        logs["member_std"] = _finite([one.std for one in found])
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


def _finite(values: Sequence[float | None]) -> list[float]:
    found = []
    for i, value in enumerate(values):
        if value is None or not np.isfinite(value):
            raise SampleError(i, NonFiniteScoreError("the members' mean or std is beyond a float"))
        found.append(value)
    return found
