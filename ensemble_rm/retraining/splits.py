"""New judgments dealt to training, calibration and gate; no prompt in two of them.

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
    """What becomes of the new judgments.

    Attributes
    ----------
    train, calibration, gate : Preferences
        Votes as soft labels, a pair and design each; the gate's prompts are the newest.
    judgments : dict of str to int
        How many each part has, those on prompts that the members know already (all in training),
        and those left out, since their prompt is in the gate or was before.
    effective : dict of str to float
        Kish's effective number of judgments of each part.
    """

    train: Preferences
    calibration: Preferences
    gate: Preferences
    judgments: dict[str, int]
    effective: dict[str, float]


def part_judgments(
    judgments: Sequence[Judgment],
    old: Preferences,
    *,
    gate_share: float,
    calibration_share: float,
    weighted: bool,
    seed: int = 0,
) -> RetrainingParts:
    """Deal judgments: the newest prompts to the gate, others at random to calibration or training.

    What is judged on a prompt of `old` goes to training: the members know that prompt. A prompt
    goes to calibration by a digest of its own text, so that under one seed it does so each time:
    members that were retrained on older judgments have seen no calibration prompt.

    Parameters
    ----------
    judgments : sequence of Judgment
        Without those that were corrected.
    old : Preferences
        What the members were trained on.
    gate_share, calibration_share : float
        Of the judgments on other prompts; > 0, together below 1.
    weighted : bool
        Whether training counts 1/π, too; calibration and gate always do.
    seed : int
        Deals the prompts between calibration and training; the same for every retraining.

    Returns
    -------
    RetrainingParts

    Raises
    ------
    TooFewJudgmentsError
        If a part would be empty.
    OptionError
        If the shares cannot be used.
    """
    if not (gate_share > 0 and calibration_share > 0 and gate_share + calibration_share < 1):
        raise OptionError(
            f"gate_share={gate_share} and calibration_share={calibration_share} must be > 0 and "
            "leave something to train on"
        )
    known = old.prompt_keys
    knows = np.array([one.prompt_digest.hex() in known for one in judgments], dtype=bool)
    fresh = np.flatnonzero(~knows)
    new = [judgments[int(i)] for i in fresh]
    if len(fresh) < 3:
        raise TooFewJudgmentsError(
            f"{len(fresh)} of {len(judgments)} judgments are on prompts that the members were not "
            "trained on; calibration and gate need such"
        )
    times = np.array([one.judged_at.timestamp() for one in new])
    prompts = np.array([int.from_bytes(one.prompt_digest[:7]) for one in new])
    split = split_by_time(prompts, times, share=gate_share)
    older = fresh[split.fit]
    share = calibration_share / (1 - gate_share)
    held = np.array([_held(new[int(i)], share, seed=seed) for i in split.fit], dtype=bool)
    rows = {
        "train": np.sort(np.concatenate([older[~held], np.flatnonzero(knows)])),
        "calibration": older[held],
        "gate": fresh[split.gate],
    }
    for name, part in rows.items():
        if len(part) == 0:
            raise TooFewJudgmentsError(
                f"{len(judgments)} judgments leave none for {name}; collect more, on more prompts"
            )
    scales = _scales(judgments)
    dealt = {name: [judgments[int(i)] for i in part] for name, part in rows.items()}
    found = {
        name: weighted_votes(some, scales, weighted=weighted or name != "train")
        for name, some in dealt.items()
    }
    counts = {name: len(part) for name, part in rows.items()}
    return RetrainingParts(
        found["train"],
        found["calibration"],
        found["gate"],
        counts | {"known": int(knows.sum()), "left_out": split.left_out},
        {name: _effective(some, scales) for name, some in dealt.items()},
    )


def _held(one: Judgment, share: float, *, seed: int) -> bool:
    """Say whether a prompt's older judgments calibrate: its own name decides, nothing else."""
    mark = hashlib.sha256(f"{seed}|calibration|".encode() + one.prompt_digest).digest()
    return int.from_bytes(mark[:8]) < share * 2**64


Design = tuple[str, str | None, str | None]


def _design(one: Judgment) -> Design:
    return one.source, one.batch, one.strategy


def _scales(judgments: Sequence[Judgment]) -> dict[Design, float]:
    """Return by what 1/π is multiplied in each design: its judgments count 1 on average."""
    designs = [_design(one) for one in judgments]
    inclusion = [one.inclusion for one in judgments]
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
    """Return judgments as votes, a pair and design each.

    Parameters
    ----------
    judgments : iterable of Judgment
    scales : dict
        Of each design's 1/π.
    weighted : bool
        Whether judgments count 1/π, or one each.
    """
    by_design: dict[Design, list[Judgment]] = {}
    for one in judgments:
        plain = one if weighted else replace(one, strategy=None, inclusion=None)
        by_design.setdefault(_design(one), []).append(plain)
    pairs: list[Preference] = []
    for design, some in by_design.items():
        scale = scales[design] if weighted else 1.0
        pairs += [replace(p, weight=scale * p.weight) for p in to_preferences(some)]
    return Preferences(tuple(pairs), NAME)
