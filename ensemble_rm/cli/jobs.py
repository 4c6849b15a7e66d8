"""What the jobs on a run folder share: recalibrate, retrain, drift."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import RUN, STORE, Loading
from ensemble_rm.cli.options import argument, nested, option, read_days

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console, Progress
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
    from ensemble_rm.judgments.store import JudgmentStore

CODES = {"published": 0, "kept": 10, "too few": 11, "drift alarm": 12}
DAYS = {"parse": read_days, "metavar": "DAYS"}
TIME = {"metavar": "TIME"}


@dataclass(frozen=True, kw_only=True)
class Job(Command):
    """A job on a run folder that reads a judgment store."""

    run_folder: Path = argument(RUN, metavar="RUN")
    judgments: str = option(STORE, metavar="STORE")
    loading: Loading = nested(Loading, panel="Loading", max_loaded_models=None)

    @contextmanager
    def opened(self, console: Console) -> Iterator[tuple[JudgmentStore, Progress]]:
        """Open the store and a progress callback."""
        from ensemble_rm.judgments.store import JudgmentStore

        # Once for writing, which migrates a store of an earlier release.
        JudgmentStore.open(self.judgments).close()
        store = JudgmentStore.open(self.judgments, read_only=True)
        with store, console.progress() as progress:
            yield store, progress

    def load(self, folder: Path, *, version: int | None = None) -> RewardEnsemble:
        """Load the ensemble; called only if pairs have to be scored."""
        return self.loading.open(folder, version=version)

    def report(self, console: Console, outcome: Any, *, dry_run: bool) -> int:
        """Print a job's outcome; return its exit code."""
        code = CODES[outcome.verdict]
        console.result(outcome.to_json() | {"exit_code": code}, str(outcome))
        if outcome.verdict == "published" and not dry_run:
            console.save(self.run_folder)
        console.next(self.next_command(outcome.verdict))
        return code

    @abstractmethod
    def next_command(self, verdict: str) -> str:
        """Return the command that follows a verdict."""
