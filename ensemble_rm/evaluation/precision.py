"""How a lower precision changes an ensemble's scores.

The same samples are scored by the same members in float32 and in another dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats, finite_or_none
from ensemble_rm.data.samples import Sample, prompt_key
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.checkpoint import torch_dtype
from ensemble_rm.members.scorer import Scorer
from ensemble_rm.progress import Progress, silent

REFERENCE = "float32"


@dataclass(frozen=True, slots=True)
class ScoreDrift:
    """Difference between one column of scores and the same in float32.

    Attributes
    ----------
    name : str
        Name of the member, or of the aggregator for the reward.
    rms, maximum : float
        RMS and maximum of the difference, in standard deviations (ddof 1) of the float32 scores.
    spearman : float
        Rank correlation with the float32 scores; NaN where all scores became equal.
    flips, ties : float
        Among the pairs within a prompt with different float32 scores: the shares whose order is
        reversed, and whose scores are now equal; NaN without such pairs.
    """

    name: str
    rms: float
    maximum: float
    spearman: float
    flips: float
    ties: float

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON; a NaN is null."""
        row: dict[str, Any] = finite_or_none(asdict(self))
        return row


@dataclass(frozen=True)
class PrecisionReport:
    """Comparison of an ensemble in another dtype with itself in float32.

    Attributes
    ----------
    dtype : str
        The other dtype.
    samples, prompts, pairs : int
        Number of samples, of their prompts, and of pairs of samples within a prompt.
    members : tuple of ScoreDrift
        One per member.
    reward : ScoreDrift
        Drift of the aggregated reward.
    unchanged : tuple of str
        Members without a dtype, which were scored the same way twice.
    """

    dtype: str
    samples: int
    prompts: int
    pairs: int
    members: tuple[ScoreDrift, ...]
    reward: ScoreDrift
    unchanged: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON; a NaN is null."""
        rows = [row.to_json() for row in self.members]
        return vars(self) | {"members": rows, "reward": self.reward.to_json()}


def precision_report(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample],
    *,
    dtype: str = "bfloat16",
    progress: Progress = silent,
) -> PrecisionReport:
    """Score the same samples in float32 and in another dtype, and compare.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Of any dtype; it is not changed.
    samples : sequence of Sample
        Several per prompt, so that the order within prompts can be compared.
    dtype : {"bfloat16", "float16", "float32"}
        The other dtype.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    PrecisionReport

    Raises
    ------
    OptionError
        If no member has a dtype, there are fewer than 2 samples, or a column of scores is constant.
    """
    torch_dtype(dtype)
    if len(samples) < 2:
        raise OptionError(f"a precision report needs at least 2 samples, not {len(samples)}")
    # Remote members, judges and rules have no dtype here.
    unchanged = [n for s in ensemble.scorers if s.options is None for n in s.names]
    if len(unchanged) == len(ensemble.names):
        raise OptionError(
            f"none of the members {ensemble.names} has a dtype; "
            "head, branch, LoRA and full members have one"
        )
    exact = _scores_in(ensemble, REFERENCE, samples, progress)
    other = _scores_in(ensemble, dtype, samples, progress)
    groups = _groups(samples)
    return PrecisionReport(
        dtype,
        len(samples),
        len(groups),
        sum(len(rows) * (len(rows) - 1) // 2 for rows in groups),
        tuple(
            measure_drift(name, exact.members[:, i], other.members[:, i], groups)
            for i, name in enumerate(ensemble.names)
        ),
        measure_drift(str(ensemble.aggregator), exact.reward, other.reward, groups),
        tuple(unchanged),
    )


def _scores_in(
    ensemble: RewardEnsemble, dtype: str, samples: Sequence[Sample], progress: Progress
) -> Scores:
    """Score with every member in a dtype; members that have it already are used unchanged."""

    def converted(scorer: Scorer) -> Scorer:
        if scorer.options is None or scorer.options.dtype == dtype:
            return scorer
        return scorer.with_options(replace(scorer.options, dtype=dtype))

    return replace(ensemble, scorers=tuple(map(converted, ensemble.scorers))).score(
        samples, progress=progress
    )


def _groups(samples: Sequence[Sample]) -> list[NDArray[np.int64]]:
    """Return the rows of each prompt."""
    found: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        found.setdefault(prompt_key(sample.prompt), []).append(row)
    return [np.array(rows, dtype=np.int64) for rows in found.values()]


def measure_drift(
    name: str, exact: Floats, other: Floats, groups: Sequence[NDArray[np.int64]]
) -> ScoreDrift:
    """Compare two columns of scores of the same samples.

    Parameters
    ----------
    name : str
    exact, other : ndarray, shape (n_samples,)
        Scores in float32 and in the other dtype.
    groups : sequence of ndarray of int
        Rows of each prompt.
    """
    present = ~np.isnan(exact + other)  # a remote member may have failed
    if present.sum() < 2:
        raise OptionError(f"{name} scores {int(present.sum())} of {len(exact)} samples; it needs 2")
    unit = float(exact[present].std(ddof=1))
    if not unit > 0:
        raise OptionError(f"{name} gives all {len(exact)} samples the same score; use others")
    gap = (other - exact)[present] / unit
    # Row numbers of each prompt, without those that have no score.
    groups = [rows[present[rows]] for rows in groups]
    apart, flipped, tied = 0, 0, 0
    for rows in groups:
        for i, row in enumerate(rows[:-1]):  # row by row keeps memory linear
            # Signs of all later rows of the prompt against this one, shape (n_later,).
            before = np.sign(exact[row] - exact[rows[i + 1 :]])
            after = np.sign(other[row] - other[rows[i + 1 :]])
            apart += int((before != 0).sum())
            # Opposite signs multiply to −1: the order is reversed.
            flipped += int((before * after < 0).sum())
            tied += int(((before != 0) & (after == 0)).sum())
    return ScoreDrift(
        name,
        rms=float(np.sqrt((gap**2).mean())),
        maximum=float(np.abs(gap).max()),
        spearman=_spearman(exact[present], other[present]),
        flips=flipped / apart if apart else float("nan"),
        ties=tied / apart if apart else float("nan"),
    )


def _spearman(a: Floats, b: Floats) -> float:
    from scipy.stats import rankdata

    # Ranks of a constant have no correlation.
    if np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def precision_text(report: PrecisionReport) -> str:
    """Return the report as a table, followed by notes on its columns.

    Parameters
    ----------
    report : PrecisionReport
        Report to show.

    Returns
    -------
    str
        Several lines.
    """
    from ensemble_rm.text_table import table

    def line(drift: ScoreDrift, mark: str) -> list[str]:
        shares = ["—" if np.isnan(v) else f"{v:.2%}" for v in (drift.flips, drift.ties)]
        return [
            mark + drift.name,
            f"{drift.rms:.5f}",
            f"{drift.maximum:.5f}",
            f"{drift.spearman:.6f}",
            *shares,
        ]

    rows = [line(drift, "  ") for drift in report.members] + [line(report.reward, "▸ ")]
    header = (f"{report.dtype} − {REFERENCE}", "RMS", "max", "Spearman", "flips", "ties")
    notes = [
        f"{report.samples} samples of {report.prompts} prompts; {report.pairs} pairs within one.",
        f"RMS and max: of the difference, in standard deviations of the {REFERENCE} scores.",
        f"flips, ties: of the pairs within a prompt with different {REFERENCE} scores, those whose",
        "order reversed, and those that became equal. ▸ is the aggregated reward.",
    ]
    if report.unchanged:
        notes.append(f"without a dtype, scored the same way twice: {', '.join(report.unchanged)}")
    return "\n".join([table(header, rows), "", *notes])
