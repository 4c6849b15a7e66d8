"""What checking costs: a million judgments read with every row and the chain checked, and without.

The peer is the way in which the first release read them, with the same rows and columns, and no
check. Both read the same SQLite file in turns, in one process, and each repetition is a pair. The
job's own reading follows: its window as arrays, of all judgments.

`read_cost` is the median ratio of the processor's time. `chain_seconds` is the part of the chain.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

import numpy as np
from sqlalchemy import select

from benchmarks.shared.common import Figures, make_parser
from benchmarks.speed.judgments import rows
from ensemble_rm.evidence.window import read_window
from ensemble_rm.judgments.database.queries import ROWS_AT_ONCE
from ensemble_rm.judgments.database.tables import judgments
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import SHARES, Judgment
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import silent


class OldObservation(NamedTuple):
    id: bytes
    pair: bytes
    prompt: bytes
    judged_at: datetime
    share: float
    inclusion: float | None
    subset: str | None
    batch: str | None


class Unchecked:
    """A store that is read as the first release did."""

    def __init__(self, store: JudgmentStore) -> None:
        self._database = store._database

    def observations(self, where: JudgmentFilter) -> Iterator[OldObservation]:
        assert where == JudgmentFilter()  # all judgments
        c, newer = judgments.c, judgments.alias("newer")
        names = ("id", "pair_key", "prompt_key", "judged_at", "outcome", "first", "second")
        query = (
            select(*(c[name] for name in names), c.inclusion, c.subset, c.batch)
            .where(~select(newer.c.id).where(newer.c.corrects == c.id).exists())
            .order_by(c.judged_at, c.id)
        )
        options = {"yield_per": ROWS_AT_ONCE}

        with (
            self._database.reading() as connection,
            connection.execute(query, execution_options=options) as result,
        ):
            for row in result:
                id_, pair, prompt, at, outcome, first, second, inclusion, subset, batch = row
                share = SHARES[outcome]
                if first > second:
                    share = 1.0 - share
                yield OldObservation(id_, pair, prompt, at, share, inclusion, subset, batch)


def cpu(step: Callable[[], Any]) -> float:
    begun = process_time()
    step()
    return process_time() - begun


def run(args: argparse.Namespace) -> None:
    n, repeats = (20_000, 5) if args.quick else (1_000_000, 5)
    figures, where = Figures(args), JudgmentFilter()
    with tempfile.TemporaryDirectory() as name, JudgmentStore.create(Path(name) / "s.db") as store:
        store.add(Judgment.from_json(row) for row in rows(n))
        old: Any = Unchecked(store)
        steps: dict[str, Callable[[], Any]] = {
            "unchecked": lambda: sum(1 for _ in old.observations(where)),
            "checked": lambda: sum(1 for _ in store.observations(where)),
            "unchecked_window": lambda: read_window(old, where, progress=silent),
            "checked_window": lambda: read_window(store, where, progress=silent),
            "chain": store.chain,
            "digest": store.digest,
            "read": lambda: sum(1 for _ in store.read()),
        }
        times: dict[str, list[float]] = {step: [] for step in steps}
        for step in steps.values():
            step()  # the file into memory, and the code compiled
        for _ in range(repeats):
            for step, work in steps.items():
                times[step].append(cpu(work))
    for step, seconds in times.items():
        figures.add_value(f"{step}_seconds", float(np.median(seconds)))
    for kind, suffix in (("read", ""), ("window", "_window")):
        ratios = np.array(times[f"checked{suffix}"]) / np.array(times[f"unchecked{suffix}"])
        figures.add_value(f"{kind}_cost", float(np.median(ratios)))
        figures.add_value(f"{kind}_cost_highest", float(ratios.max()))
    figures.add_value("judgments", n)
    figures.write()


if __name__ == "__main__":
    run(make_parser(__doc__).parse_args())
