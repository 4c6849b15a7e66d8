"""`head` members: k small heads over one frozen trunk, each with its own view of it.

The trunk runs once per sample, up to the highest layer that a view reads; the heads are a matrix
product in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import OptionError
from ensemble_rm.file_digests import FileCheck
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.backbone.trunk import Trunk, View, features_in_parts
from ensemble_rm.members.digest import member_digest
from ensemble_rm.members.encoding import count_truncation
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.model_scorer import ModelScorer
from ensemble_rm.members.scorer import MemberScores
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import get

Floats = NDArray[np.float64]


class HeadScorer(ModelScorer):
    """k heads over one trunk.

    Parameters
    ----------
    backbone : Backbone
    options : TrunkOptions
        How the trunk reads text; the same in training and in scoring.
    views : sequence of View
        The view of each head.
    weights : HeadWeights
    names : sequence of str, optional
        One per head; numbered with its view by default.
    cache : FeatureCache, optional
        Used in scoring. None, the default, computes all features: an RL loop sees no text twice.
    trunk : Trunk, optional
        An open trunk; by default one is loaded at the first score.
    """

    kind = "head"

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions,
        views: Sequence[View],
        weights: HeadWeights,
        *,
        names: Sequence[str] | None = None,
        cache: FeatureCache | None = None,
        trunk: Trunk | None = None,
    ) -> None:
        if len(views) != len(weights.bias):
            raise OptionError(f"{len(views)} views for {len(weights.bias)} heads")
        numbered = [f"head{i}@{view}" for i, view in enumerate(views)]
        super().__init__(backbone, options, names or numbered)
        self.views = tuple(views)
        self.weights = weights
        self.cache = cache
        self._trunk = trunk

    @property
    def trunk(self) -> Trunk:
        """The trunk, loaded at first use up to the highest layer that is read."""
        with self._lock:
            if self._trunk is None:
                # Blocks above the highest view are never run, so they are not kept.
                self._trunk = Trunk(self.backbone, self.options, top=self._top, whole=False)
            return self._trunk

    @property
    def _top(self) -> int:
        return max(view.layer for view in self.views)

    def with_cache(self, cache: FeatureCache | None) -> HeadScorer:
        """Return the same heads over the same trunk, with a cache of features or without."""
        return HeadScorer(
            self.backbone,
            self.options,
            self.views,
            self.weights,
            names=self.names,
            cache=cache,
            trunk=self._trunk,
        )

    def _drop_model(self) -> None:
        self._trunk = None

    def score_detailed(
        self, samples: Sequence[Sample], *, features: bool = False, progress: Progress = silent
    ) -> MemberScores:
        """Return the scores, which samples were cut and, if asked, what all views read."""
        # One thread at a time.
        with self._lock:  # the tokenizer and the trunk's hooks keep state
            if (trunk := self._trunk) is None:
                trunk = Trunk(self.backbone, self.options, top=self._top, whole=False)
                self._trunk = trunk
            encoded = trunk.encoder.encode(samples)
            # Heads that share a view share its features.
            distinct = tuple(dict.fromkeys(self.views))
            out = np.empty((len(encoded), len(self.views)))
            kept = None
            if features:
                # Layer and pooling once each, though views of "both" contain the others.
                count = len(dict.fromkeys(part for view in self.views for part in view.parts()))
                kept = np.empty((len(encoded), count * trunk.width))
            parts = features_in_parts(trunk, encoded, distinct, cache=self.cache, progress=progress)
            for rows, read in parts:
                out[rows] = self.apply(read, distinct)
                if kept is not None:
                    kept[rows] = parts_of(read, distinct)
            return MemberScores(out, count_truncation(encoded), kept)

    def apply(self, read: NDArray[np.float32], distinct: Sequence[View]) -> Floats:
        """Run the heads on (n, n_views, width) features of `distinct` views: (n, k)."""
        place = {view: i for i, view in enumerate(distinct)}
        out = np.empty((len(read), len(self.views)))
        for member, view in enumerate(self.views):
            out[:, member] = self.weights(member, read[:, place[view]])
        return out

    def features(self, samples: Sequence[Sample]) -> Floats | None:
        """Return what all views read, (n_samples, n_features): each layer and pooling once."""
        return self.score_detailed(samples, features=True).features

    def _parts(self) -> dict[str, Any]:
        return {
            "views": self.views,
            "weights": self.weights,
            "names": self.names,
            "cache": self.cache,
        }

    @cached_property
    def digest(self) -> str:
        """Equal where the scores of equal samples are."""
        settings = {"views": [str(view) for view in self.views]}
        weights = self.weights.tensors()
        return member_digest(self.kind, self.backbone, self.options, settings, weights)

    def _settings(self) -> dict[str, Any]:
        hidden = 0 if self.weights.inner is None else self.weights.inner.shape[2]
        return {
            "views": [str(view) for view in self.views],
            "names": list(self.names),
            "hidden": hidden,
        }

    def _write(self, folder: Path) -> dict[str, Any]:
        self.weights.save(folder)
        return {}

    @classmethod
    def _read(
        cls,
        folder: Path,
        saved: Mapping[str, Any],
        check: FileCheck,  # noqa: ARG003 - no other model
        trust_remote_code: Sequence[str],  # noqa: ARG003 - no other model
    ) -> dict[str, Any]:
        views = [View.parse(view) for view in get(saved, "views", tuple[str, ...])]
        names = get(saved, "names", tuple[str, ...])
        return {"views": views, "weights": HeadWeights.load(folder), "names": names}


def parts_of(read: NDArray[np.float32], views: Sequence[View]) -> NDArray[np.float32]:
    """Lay what views read side by side, each layer and pooling once.

    Parameters
    ----------
    read : ndarray, shape (n_samples, n_views, width)
        As `features_in_parts` yields it for `views`: twice the trunk's width where one of them
        reads both poolings.
    views : sequence of View

    Returns
    -------
    ndarray, shape (n_samples, n_parts · trunk's width)
        In the order in which the views name their parts.
    """
    width = read.shape[2] // max(len(view.parts()) for view in views)
    columns = {
        part: read[:, i, place * width : (place + 1) * width]
        for i, view in enumerate(views)
        for place, part in enumerate(view.parts())
    }
    return np.concatenate(list(columns.values()), axis=1)
