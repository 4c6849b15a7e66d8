"""Scoring more samples than fit in memory: chunk by chunk, in their order.

A chunk ends where the prompt changes, so that the completions of one prompt are scored together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ensemble_rm.data.samples import Sample
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import OptionError
from ensemble_rm.progress import Progress, silent

DEFAULT_CHUNK = 4096


def stream_scores(
    ensemble: RewardEnsemble,
    samples: Iterable[Sample],
    *,
    chunk: int = DEFAULT_CHUNK,
    progress: Progress = silent,
) -> Iterator[Scores]:
    """Score samples chunk by chunk, with one chunk in memory at a time.

    Parameters
    ----------
    ensemble : RewardEnsemble
    samples : iterable of Sample
        Read lazily, at most one chunk and one sample ahead of what was returned.
    chunk : int
        Maximum number of samples scored at once; batches within it are formed by length.
    progress : callable
        Called with ("scoring", done, 0): the total is unknown.

    Yields
    ------
    Scores
        Of the next samples, in their order.

    Raises
    ------
    OptionError
        If `chunk` is not positive.
    """
    # Checked here, since a generator's body runs only at the first `next`.
    if chunk < 1:
        raise OptionError(f"chunk must be at least 1 sample, not {chunk}")
    return _stream(ensemble, samples, chunk, progress)


def _stream(
    ensemble: RewardEnsemble, samples: Iterable[Sample], chunk: int, progress: Progress
) -> Iterator[Scores]:
    passes = len(ensemble.scorers)
    done = 0
    for part in chunks(samples, chunk):
        counter = _Counter(done, len(part), passes, progress)
        scores = ensemble.score(part, progress=counter)
        done += len(part)
        # The total is unknown in a stream; 0 says so.
        progress("scoring", done, 0)
        yield scores


def chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Cut samples into lists of at most `size`, at the end of a prompt where possible.

    Parameters
    ----------
    samples : iterable of Sample
        Read lazily, at most one sample ahead of a full list.
    size : int
        Maximum length of a list.

    Yields
    ------
    list of Sample
        The next ones; never empty.
    """
    held: list[Sample] = []
    for sample in samples:
        held.append(sample)
        # One sample more than fits shows whether a prompt ends at the cut.
        if len(held) > size:
            # Samples of one prompt share its prefix, which a cut between them would compute twice.
            end = _last_change(held) or size
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _last_change(samples: list[Sample]) -> int:
    """Return where the last prompt begins; 0 where there is only one."""
    last = samples[-1].prompt
    return next((i for i in range(len(samples) - 1, 0, -1) if samples[i - 1].prompt != last), 0)


class _Counter:
    """Turns the progress of a chunk's passes, one per scorer, into a count of all samples."""

    def __init__(self, before: int, samples: int, passes: int, progress: Progress) -> None:
        self._before, self._samples, self._passes = before, samples, passes
        self._progress = progress
        self._finished = 0

    def __call__(self, _stage: str, done: int, total: int) -> None:
        """Take one scorer's progress: a Progress."""
        share = (self._finished + done / max(total, 1)) / self._passes
        # Every scorer reads every sample: samples are counted by the share of passes done.
        self._progress("scoring", self._before + int(min(share, 1.0) * self._samples), 0)
        self._finished += done == total
