"""Judgments of anchor pairs → votes, as `rater_drift` takes them."""

from __future__ import annotations

from collections.abc import Iterable

from ensemble_rm.drift.raters import AnchorVote
from ensemble_rm.judgments.judgment import SHARES, Judgment


def anchor_votes(judgments: Iterable[Judgment]) -> list[AnchorVote]:
    """Turn judgments of anchor pairs into votes, whichever side stood first.

    Parameters
    ----------
    judgments : iterable of Judgment
        Of anchor pairs alone, without those that were corrected.

    Returns
    -------
    list of AnchorVote
        In their order; months are those of UTC.
    """
    return [
        AnchorVote(
            one.pair_digest.hex(),
            one.annotator,
            f"{one.judged_at:%Y-%m}",
            SHARES[one.outcome],
            swapped=one.text_digests[1] > one.text_digests[2],
        )
        for one in judgments
    ]
