"""Split new judgments into training, calibration and gate, with no prompt in two of them.

Knows judgments and the prompts that members were trained on; knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemble_rm.data.samples import Preference, Preferences
from ensemble_rm.data.weights import effective_sample_size, inclusion_weights
from ensemble_rm.errors import OptionError, TooFewJudgmentsError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.votes import to_preferences
from ensemble_rm.recalibration.split import split_by_time

NAME = "new judgments"


@dataclass(frozen=True)
class RetrainingParts:
    """The new judgments, split.

    Attributes
    ----------
    train, calibration, gate : Preferences
        Votes as soft labels, per pair and design; the gate has the newest prompts.
    judgments : dict of str to int
        Number per part; ``"known"``: on prompts that the members were trained on (all in training);
        ``"left_out"``: on prompts that belong to the other side of the cut in time.
    effective : dict of str to float
        Kish's effective number of judgments per part.
    """

    train: Preferences
    calibration: Preferences
    gate: Preferences
    judgments: dict[str, int]
    effective: dict[str, float]


def split_judgments(
    judgments: Sequence[Judgment],
    old: Preferences,
    *,
    gate_share: float,
    calibration_share: float,
    weighted: bool,
    seed: int = 0,
) -> RetrainingParts:
    """Assign the newest prompts to the gate, the others at random to calibration or training.

    Judgments on a prompt of `old` go to training, because the members were trained on that prompt.
    Whether a prompt goes to calibration depends only on its own digest and the seed, so that it is
    the same every time: members retrained on older judgments have seen no calibration prompt.

    Parameters
    ----------
    judgments : sequence of Judgment
        Without corrected ones.
    old : Preferences
        The members' training pairs.
    gate_share, calibration_share : float
        Shares of the judgments on other prompts; > 0, together below 1.
    weighted : bool
        Weight judgments by 1/π in training as well; calibration and gate always do.
    seed : int
        Of the split into calibration and training; keep it for every retraining.

    Returns
    -------
    RetrainingParts

    Raises
    ------
    TooFewJudgmentsError
        If a part would be empty.
    OptionError
        If the shares are out of range.
    """
    if not (gate_share > 0 and calibration_share > 0 and gate_share + calibration_share < 1):
        raise OptionError(
            f"gate_share={gate_share} and calibration_share={calibration_share} must be > 0 and "
            "add up to less than 1, so that judgments are left for training"
        )
    trained_on = old.prompt_keys
    known = np.array([j.prompt_digest.hex() in trained_on for j in judgments], dtype=bool)
    fresh = np.flatnonzero(~known)
    new = [judgments[int(i)] for i in fresh]
    if len(fresh) < 3:
        raise TooFewJudgmentsError(
            f"{len(fresh)} of {len(judgments)} judgments are on prompts that the members were not "
            "trained on; calibration and gate need at least 3"
        )
    times = np.array([judgment.judged_at.timestamp() for judgment in new])
    # 7 bytes: 8 could exceed the int64 that `split_by_time` takes.
    prompts = np.array([int.from_bytes(judgment.prompt_digest[:7]) for judgment in new])
    split = split_by_time(prompts, times, share=gate_share)
    older = fresh[split.fit]
    # Of the judgments that the gate leaves.
    share = calibration_share / (1 - gate_share)
    held = np.array([_is_held(new[int(i)], share, seed=seed) for i in split.fit], dtype=bool)
    rows = {
        "train": np.sort(np.concatenate([older[~held], np.flatnonzero(known)])),
        "calibration": older[held],
        "gate": fresh[split.gate],
    }
    for name, part in rows.items():
        if len(part) == 0:
            raise TooFewJudgmentsError(
                f"{len(judgments)} judgments leave none for {name}; collect more, on more prompts"
            )
    scales = _scales(judgments)
    split_rows = {name: [judgments[int(i)] for i in part] for name, part in rows.items()}
    votes = {
        name: weighted_votes(part, scales, weighted=weighted or name != "train")
        for name, part in split_rows.items()
    }
    counts = {name: len(part) for name, part in rows.items()}
    return RetrainingParts(
        votes["train"],
        votes["calibration"],
        votes["gate"],
        counts | {"known": int(known.sum()), "left_out": split.left_out},
        {name: _effective(part, scales) for name, part in split_rows.items()},
    )


def _is_held(judgment: Judgment, share: float, *, seed: int) -> bool:
    """Return whether a prompt's older judgments calibrate; it depends on its digest alone."""
    mark = hashlib.sha256(f"{seed}|calibration|".encode() + judgment.prompt_digest).digest()
    return int.from_bytes(mark[:8]) < share * 2**64


Design = tuple[str, str | None, str | None]


def _design(judgment: Judgment) -> Design:
    return judgment.source, judgment.batch, judgment.strategy


def _scales(judgments: Sequence[Judgment]) -> dict[Design, float]:
    """Return the factor of 1/π per design that makes the mean weight of its judgments 1."""
    designs = [_design(judgment) for judgment in judgments]
    inclusion = [judgment.inclusion for judgment in judgments]
    weights = inclusion_weights(inclusion, designs).weights
    return {
        design: float(w) * (1.0 if pi is None else pi)
        for design, w, pi in zip(designs, weights, inclusion, strict=True)
    }


def _effective(judgments: Iterable[Judgment], scales: dict[Design, float]) -> float:
    weights = [scales[_design(one)] / (one.inclusion or 1.0) for one in judgments]
    return effective_sample_size(weights)


def weighted_votes(
    judgments: Iterable[Judgment], scales: dict[Design, float], *, weighted: bool
) -> Preferences:
    """Return judgments as votes, per pair and design.

    Parameters
    ----------
    judgments : iterable of Judgment
    scales : dict
        Factor of 1/π per design.
    weighted : bool
        Weight judgments by 1/π instead of equally.
    """
    by_design: dict[Design, list[Judgment]] = {}
    for judgment in judgments:
        # Without an inclusion probability, judgments count equally.
        plain = judgment if weighted else replace(judgment, strategy=None, inclusion=None)
        by_design.setdefault(_design(judgment), []).append(plain)
    pairs: list[Preference] = []
    for design, part in by_design.items():
        scale = scales[design] if weighted else 1.0
        pairs += [replace(pair, weight=scale * pair.weight) for pair in to_preferences(part)]
    return Preferences(tuple(pairs), NAME)
