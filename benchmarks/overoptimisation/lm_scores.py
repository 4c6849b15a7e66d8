"""Gold's and every proxy's scores of every sample, for `overoptimisation_lm.py`.

Each trunk runs once a sample, whatever the number of heads: what the views read is kept in a file a
prompt, and heads are matrix products on it. The branches of all seeds and cases hang on one trunk.
Scores are kept in a file a prompt and name, so that a run that was cut goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ensemble_rm import RewardEnsemble, Sample
from ensemble_rm.members.backbone.trunk import Trunk, View, features
from ensemble_rm.members.branches.scorer import BranchScorer
from ensemble_rm.members.heads.scorer import HeadScorer
from ensemble_rm.members.heads.weights import HeadWeights


class HeadReader:
    """All head ensembles of one trunk.

    Parameters
    ----------
    ensembles : mapping of str to RewardEnsemble
        Each of one `HeadScorer`, on one backbone under one set of options.
    """

    def __init__(self, ensembles: Mapping[str, RewardEnsemble]) -> None:
        self.ensembles = ensembles
        self.scorers: dict[str, HeadScorer] = {}
        for name, ensemble in ensembles.items():
            (scorer,) = ensemble.scorers
            assert isinstance(scorer, HeadScorer)
            self.scorers[name] = scorer
        self.views: list[View] = list(
            dict.fromkeys(view for scorer in self.scorers.values() for view in scorer.views)
        )

    @cached_property
    def trunk(self) -> Trunk:
        first = next(iter(self.scorers.values()))
        top = max(view.layer for view in self.views)
        return Trunk(first.backbone, first.options, top=top).forget_rest()

    def read(self, samples: Sequence[Sample], file: Path) -> np.ndarray:
        """Return (n_samples, n_views, width) features, from `file` or read now."""
        if not file.exists():
            found = features(self.trunk, self.trunk.encoder.encode(samples), self.views)
            write(file, found)
        found = np.load(file)
        assert found.shape[:2] == (len(samples), len(self.views)), f"delete {file}"
        return found

    def score(self, samples: Sequence[Sample], file: Path) -> dict[str, np.ndarray]:
        """Return normalised scores by ensemble, (n_samples, n_members) each."""
        read = self.read(samples, file)
        found = {}
        for name, scorer in self.scorers.items():
            width = scorer.weights.offset.shape[1]
            raw = scorer.apply(read[:, :, :width], self.views)
            found[name] = self.ensembles[name].normaliser(raw)
        return found


def together(ensembles: Mapping[str, RewardEnsemble]) -> BranchScorer:
    """Return one scorer with the branches of all ensembles, in their order."""
    scorers = []
    for ensemble in ensembles.values():
        (scorer,) = ensemble.scorers
        assert isinstance(scorer, BranchScorer)
        scorers.append(scorer)
    arrays = [scorer.heads.tensors() for scorer in scorers]
    heads = HeadWeights(**{k: np.concatenate([own[k] for own in arrays]) for k in arrays[0]})
    return BranchScorer(
        scorers[0].backbone,
        scorers[0].options,
        [view for scorer in scorers for view in scorer.views],
        heads,
        [own for scorer in scorers for own in scorer.tensors],
        blocks=scorers[0].blocks,
    )


def apart(raw: np.ndarray, ensembles: Mapping[str, RewardEnsemble]) -> dict[str, np.ndarray]:
    """Undo `together`: each ensemble's own columns, normalised."""
    found, start = {}, 0
    for name, ensemble in ensembles.items():
        end = start + len(ensemble.names)
        found[name] = ensemble.normaliser(raw[:, start:end])
        start = end
    assert start == raw.shape[1]
    return found


def write(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".new.npy")
    np.save(scratch, array)
    scratch.replace(file)
