"""What the tests of judgments share: judgments made by rule, and what hypothesis draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ensemble_rm.data.samples import Message
from ensemble_rm.judgments.judgment import OUTCOMES, Judgment

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
CHAT = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Sing."))


def judged(i: int = 0, **fields: Any) -> Judgment:
    """The i-th judgment: three to a pair, two pairs to a prompt, an hour apart."""
    given: dict[str, Any] = {
        "prompt": f"prompt {i // 6}",
        "first": f"good answer {i // 3}",
        "second": f"bad answer {i // 3}",
        "outcome": OUTCOMES[i % 5 % 3],
        "annotator": f"annotator {i % 3}",
        "judged_at": NEW_YEAR + timedelta(hours=i),
        "source": "test",
    }
    return Judgment(**{**given, **fields})


def many(n: int, *, start: int = 0, **fields: Any) -> list[Judgment]:
    return [judged(i, **fields) for i in range(start, start + n)]


def write(path: Path, rows: list[Any], *, array: bool = False) -> Path:
    """Write rows as JSONL, or as one JSON array."""
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


texts = st.text(st.characters(codec="utf-8"), max_size=12)
labels = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
roles = st.sampled_from(["user", "assistant", "system"])
turns = st.lists(st.builds(Message, roles, texts), min_size=1, max_size=3).map(tuple)
times = st.datetimes(
    min_value=datetime(1970, 1, 2), max_value=datetime(2200, 1, 1), timezones=st.timezones()
)
judgments = st.builds(
    Judgment,
    prompt=st.one_of(texts.filter(bool), turns),
    first=texts,
    second=texts,
    outcome=st.sampled_from(OUTCOMES),
    annotator=labels,
    judged_at=times,
    source=labels,
    external_id=st.one_of(st.just(""), labels),
    batch=st.none() | labels,
    policy=st.none() | labels,
    subset=st.none() | labels,
    strategy=st.just("random"),
    inclusion=st.floats(0, 1, exclude_min=True),
)


def raters(
    n: int, *, k: int, seed: int, agree: float, tie: float, first: float = 0.5
) -> Iterator[Judgment]:
    """`n` pairs, a random side first for each of `k` annotators who follow the truth now and then.

    An annotator says a tie with probability `tie`, else follows the truth with probability `agree`,
    else picks the first side with probability `first`.
    """
    rng = np.random.default_rng(seed)
    for i in range(n):
        for who in range(k):
            sides = [f"better {i}", f"worse {i}"]
            flipped = bool(rng.random() < 0.5)
            if rng.random() < tie:
                outcome = "tie"
            elif rng.random() < agree:
                outcome = "second" if flipped else "first"
            else:
                outcome = "first" if rng.random() < first else "second"
            yield judged(
                prompt=f"prompt {i // 2}",
                first=sides[flipped],
                second=sides[not flipped],
                outcome=outcome,
                annotator=f"annotator {who}",
                judged_at=NEW_YEAR + timedelta(minutes=i * k + who),
            )
