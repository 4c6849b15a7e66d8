"""An ensemble of `full` or of `branch` members → an ensemble of one member: the mean of weights.

It scores at a single model's price and knows no uncertainty; what asks for one is refused by name.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ensemble_rm.aggregation.rules.mean import mean
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.combining import normalised
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import ModelError
from ensemble_rm.members.model_scorer import ModelScorer
from ensemble_rm.members.scorer import Scorer
from ensemble_rm.progress import Progress, silent


def average_weights(
    ensemble: RewardEnsemble,
    reference: Preferences,
    *,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> RewardEnsemble:
    """Average the members' weights [1]_.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Of kind ``"full"`` or ``"branch"``.
    reference : Preferences
        Pairs whose completions set the new member's offset and scale; their verdicts are not used.
    out : str or Path, optional
        Where the result is saved; full members need it.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RewardEnsemble
        Of one member, normalised and not calibrated; with a baseline where `ensemble` has one.

    Raises
    ------
    ModelError
        If the members are of another kind, or do not share their starting weights, shapes, pooling
        or the heads' standardisation.
    DataError
        If there is no reference pair.
    OptionError
        If full members are merged and `out` is not given.

    References
    ----------
    .. [1] Ramé et al. 2024 (WARM), arXiv 2401.12187.
    """
    require_pairs(reference, "fitting the normaliser")
    kind = type(ensemble.scorers[0])
    # Weights have a mean only where parameters correspond one to one.
    if not issubclass(kind, ModelScorer) or {type(s) for s in ensemble.scorers} != {kind}:
        names = sorted({type(scorer).__name__ for scorer in ensemble.scorers})
        raise ModelError(f"only members of one kind, 'full' or 'branch', have a mean, not {names}")
    members: Any = ensemble.scorers
    with tempfile.TemporaryDirectory(prefix="ensemble_rm.") as scratch:
        model = Path(scratch) / "model"
        scorer = kind.average(members, None if out is None else model)
        merged = _finish(ensemble, scorer, reference, progress)
        if out is None:
            return merged
        merged.save_pretrained(out)
        if not model.exists():
            return merged
    # The averaged model lies in the scratch folder, which is gone now: load the saved copy.
    return RewardEnsemble.from_pretrained(out, device=scorer.options.device)


def _finish(
    ensemble: RewardEnsemble, scorer: Scorer, reference: Preferences, progress: Progress
) -> RewardEnsemble:
    """Fit the new member's normaliser, and say where it comes from."""
    merged = {"members": list(ensemble.names), "provenance": ensemble.provenance}
    return normalised(
        (scorer,),
        reference,
        aggregator=mean(),
        baseline=ensemble.normaliser.baseline,
        provenance={"merged": merged},
        progress=progress,
    )
