"""A process of its own that writes judgments, to be killed, starved or refused by a test."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from ensemble_rm.errors import EnsembleRMError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from tests.support.judgment_rows import many

SIZE = 400  # judgments a batch, each a transaction


def batch(number: int) -> list[Judgment]:
    return many(SIZE, start=number * SIZE, batch=f"batch {number}")


def write(place: str, first: int, last: int) -> dict[str, Any]:
    """Add these batches one by one, from the first again if need be."""
    with JudgmentStore.create(place) as store:
        batches = [batch(number) for number in range(first, last)]
        added = [store.add(rows) for rows in batches]
    return {"added": sum(found.added for found in added), "already": sum(f.already for f in added)}


def pour(place: str) -> None:
    """Add one batch after the other, until it is killed; say which one begins."""
    with JudgmentStore.create(place) as store:
        for number in range(1_000_000):
            rows = batch(number)
            print(number, flush=True)
            store.add(rows)


def starve(place: str, megabytes: int) -> dict[str, Any]:
    """Write until a file would grow beyond the limit."""
    JudgmentStore.create(place).close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, megabytes << 20))
    return refused(lambda: write(place, 0, 100))


def intrude(place: str, user: int) -> dict[str, Any]:
    """Read and write as somebody who may only read; everything is imported before."""
    with tempfile.TemporaryDirectory() as folder, JudgmentStore.create(f"{folder}/warm.db") as warm:
        warm.add(batch(0))
        list(warm.read())
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    with JudgmentStore.open(place) as store:
        read = [one.id for one in store.read()]
        add = refused(lambda: store.add(batch(7)))
    other = Path(place).parent / "other"
    return {
        "read": read,
        "add": add,
        "create": refused(lambda: JudgmentStore.create(other / "new.db")),
        "beside": refused(lambda: JudgmentStore.create(other.with_suffix(".db"))),
    }


def refused(work: Any) -> dict[str, Any]:
    try:
        work()
    except EnsembleRMError as error:
        return {"error": type(error).__name__, "said": str(error)}
    return {"error": None}


if __name__ == "__main__":
    action, where, *numbers = sys.argv[1:]
    deed = {"write": write, "pour": pour, "starve": starve, "intrude": intrude}[action]
    print(json.dumps(deed(where, *map(int, numbers))))
