"""Runs of every kind of member on one part of the pairs, for `kinds.py`.

A run is one way to train k members, under one seed, which deals the pairs too. What is kept of it
are the members' raw scores, so that ensembles of any members can be measured afterwards; a run that
was cut goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble_rm import Preferences, TrunkOptions
from ensemble_rm.members import HeadRecipe, make_recipe
from ensemble_rm.members.backbone.checkpoint import Backbone
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.backbone.token_states import TokenStates, states_path, token_states
from ensemble_rm.members.backbone.trunk import Trunk, View, default_views, features, first_output
from ensemble_rm.members.branches.gradient_training import branch_scores
from ensemble_rm.members.branches.module import PairStates
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.branches.training import BranchedRun, train_copies
from ensemble_rm.members.forward.batching import batches
from ensemble_rm.members.heads.training import fit_heads
from ensemble_rm.members.heads.weights import HeadWeights, PairFeatures
from ensemble_rm.members.learning.dropout import set_dropout
from ensemble_rm.members.learning.job import Job
from ensemble_rm.members.learning.seeds import member_seeds
from ensemble_rm.members.lora.training import train_adapters

BLOCKS = {"minilm": (1, 2, 4), "smollm2": (1, 2, 4, 8)}
PARTS = ("validation", "calibration", "test", "unlike")


@dataclass(frozen=True)
class Way:
    """One way to train members.

    Attributes
    ----------
    name : str
    kind : {"head", "branch", "lora", "full"}
    blocks : int
        That a branch copies; 0 of the other kinds.
    views : {"last", "spread"}
        Heads on the last layer, or a view each.
    recipe : mapping
        What differs from the kind's own recipe.
    warm_start : bool
        Of adapters.
    """

    name: str
    kind: str
    blocks: int = 0
    views: str = "last"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    warm_start: bool = False


@dataclass(frozen=True)
class Sizes:
    """How much is read and trained.

    Attributes
    ----------
    fit, validation, calibration : int
        Pairs; the rest is tested.
    unlike : int
        Pairs unlike the training data.
    members, epochs, max_length : int
    """

    fit: int
    validation: int
    calibration: int
    unlike: int
    members: int
    epochs: int
    max_length: int


class Study:
    """One backbone's runs."""

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        pairs: Preferences,
        unlike: Preferences,
        sizes: Sizes,
        *,
        work: Path,
        cache_dir: Path,
    ) -> None:
        self.name, self.backbone, self.sizes = name, backbone, sizes
        self.pairs, self.unlike = pairs, unlike
        self.options = TrunkOptions(max_length=sizes.max_length, dtype="bfloat16", device="cpu")
        said = f"{pairs.digest}|{unlike.digest}|{backbone.digest}|{sizes}"
        self.work = work / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
        self.cache_dir = cache_dir
        self._states: dict[int, TokenStates] = {}

    def rows(self, seed: int) -> dict[str, np.ndarray]:
        """Deal the prompts: which pairs each part has."""
        groups = self.pairs.groups
        labels = np.unique(groups)
        place = np.empty(int(labels.max()) + 1, dtype=np.int64)
        place[labels] = np.random.default_rng(seed).permutation(len(labels))
        order = np.argsort(place[groups], kind="stable")
        s = self.sizes
        ends = np.cumsum([s.fit, s.validation, s.calibration])
        # Prompts are whole: an end moves to where the next prompt begins.
        starts = np.flatnonzero(np.diff(place[groups][order], prepend=-1))
        moved = [int(starts[np.searchsorted(starts, end)]) for end in ends]
        dealt = np.split(order, moved)
        return dict(zip(("fit", *PARTS[:3]), dealt, strict=True)) | {
            "unlike": len(self.pairs) + np.arange(len(self.unlike))
        }

    @property
    def all(self) -> Preferences:
        """Every pair, those unlike the training data behind the others."""
        return Preferences((*self.pairs, *self.unlike))

    def data(self, rows: np.ndarray) -> Preferences:
        return self.all.take(rows)

    def sides(self, rows: np.ndarray) -> np.ndarray:
        """Return where both samples of the pairs stand among all samples."""
        n = len(self.pairs) + len(self.unlike)
        return np.concatenate([rows, n + rows])

    def file(self, way: Way, seed: int) -> Path:
        return self.work / f"{way.name}-{seed}.npz"

    def run(self, way: Way, seed: int) -> dict[str, np.ndarray]:
        """Return a run's raw scores by part, from the work folder or made now."""
        file = self.file(way, seed)
        if not file.exists():
            began = time.process_time()
            scores, said = self._train(way, seed)
            scores["seconds"] = np.array(time.process_time() - began)
            self.work.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(".new.npz")
            np.savez(scratch, **scores, said=json.dumps(said, default=str))
            scratch.replace(file)
            print(
                f"{self.name} {way.name} {seed}: {scores['seconds']:.0f} CPU s {said}", flush=True
            )
        return dict(np.load(file))

    def _train(self, way: Way, seed: int) -> tuple[dict[str, np.ndarray], Any]:
        rows = self.rows(seed)
        if way.kind == "head":
            return self._heads(way, rows, seed)
        if way.kind == "full":
            return self._full(way, rows, seed)
        return self._branched(way, rows, seed)

    @property
    def tops(self) -> list[int]:
        """Blocks that the branches of this backbone start from."""
        return [self.trunk.depth - blocks for blocks in BLOCKS[self.name]]

    # Heads -------------------------------------------------------------------------------------

    @cached_property
    def trunk(self) -> Trunk:
        return Trunk(self.backbone, self.options)

    @cached_property
    def views(self) -> list[View]:
        depth = self.trunk.depth
        return list(
            dict.fromkeys(v for k in (self.sizes.members, 5) for v in default_views(depth, k))
        )

    @cached_property
    def read(self) -> np.ndarray:
        encoded = self.trunk.encoder.encode(self.all.samples())
        cache = FeatureCache(self.cache_dir, max_bytes=32 * 2**30)
        return features(self.trunk, encoded, self.views, cache=cache)

    def _features(self, rows: np.ndarray) -> PairFeatures:
        pairs = self.data(rows)
        x = self.read[self.sides(rows)]
        return PairFeatures(x, pairs.targets, pairs.weights, pairs.margins, pairs.groups)

    def _heads(
        self, way: Way, rows: dict[str, np.ndarray], seed: int
    ) -> tuple[dict[str, np.ndarray], Any]:
        depth = self.trunk.depth
        k = 5 if way.name.endswith("5") else self.sizes.members
        spread = way.views == "spread"
        chosen = default_views(depth, k) if spread else (View(depth, "both"),) * k
        recipe = HeadRecipe(**way.recipe)
        if not spread and not recipe.bootstrap and recipe.subspace == 1:
            recipe = replace(recipe, solver="adam")  # solved, they would be one head
        result = fit_heads(
            self._features(rows["fit"]),
            self._features(rows["validation"]),
            view_of=[self.views.index(view) for view in chosen],
            recipe=recipe,
            seeds=member_seeds(seed, k),
            device=self.trunk.device,
        )
        places = [self.views.index(view) for view in chosen]
        scores = {part: self._apply(result.weights, places, rows[part]) for part in PARTS}
        return scores, {"validation": result.validation_nll}

    def _apply(self, weights: HeadWeights, places: list[int], rows: np.ndarray) -> np.ndarray:
        x = self._features(rows).features
        return np.stack([weights(i, x[:, place]) for i, place in enumerate(places)], axis=1)

    # Branches and adapters ---------------------------------------------------------------------

    def _job(self, way: Way, rows: dict[str, np.ndarray], seed: int, depth: int) -> Job[Any]:
        k = self.sizes.members
        given: dict[str, Any] = {"epochs": self.sizes.epochs, "patience": 1} | way.recipe
        if way.kind != "full":
            given["blocks"] = way.blocks or depth
        if way.kind == "lora":
            given["warm_start"] = way.warm_start
        return Job(
            self.data(rows["fit"]),
            self.data(rows["validation"]),
            self.backbone,
            member_seeds(seed, k),
            self.options,
            make_recipe(way.kind, **given).resolve(self.backbone, k),
            f"{self.work.name}-{way.name}-{seed}",
            self.work / f"{way.name}-{seed}.training",
            self.cache_dir,
        )

    def _branched(
        self, way: Way, rows: dict[str, np.ndarray], seed: int
    ) -> tuple[dict[str, np.ndarray], Any]:
        depth = self.trunk.depth
        job = self._job(way, rows, seed, depth)
        self.read_states(self.tops)
        trunk = Trunk(self.backbone, self.options, top=depth - job.recipe.blocks)
        set_dropout(trunk.rest, job.recipe.dropout)
        if trunk.top not in self._states:
            encoded = trunk.encoder.encode(self.all.samples())
            self._states[trunk.top] = token_states(
                trunk, encoded, self.cache_dir, max_bytes=64 * 2**30
            )
        states = self._states[trunk.top]

        def side(part: str) -> PairStates:
            return PairStates(states.take(self.sides(rows[part])), self.data(rows[part]))

        found = BranchedRun(job, Branching(trunk), side("fit"), side("validation"))
        if way.kind == "branch":
            _, result = train_copies(found)
        else:
            _, result, _ = train_adapters(found)
        scores = {
            part: np.stack(
                [branch_scores(found.branching, b, side(part).states) for b in result.branches],
                axis=1,
            )
            for part in PARTS
        }
        shutil.rmtree(self.work / f"{way.name}-{seed}.training", ignore_errors=True)
        return scores, {"validation": result.validation_nll, "history": result.history}

    def read_states(self, tops: list[int]) -> None:
        """Read the token states after several blocks in one pass, as `token_states` keeps them."""
        encoded = self.trunk.encoder.encode(self.all.samples())
        paths = {t: states_path(self.trunk, encoded, self.cache_dir, top=t) for t in tops if t}
        missing = {top: path for top, path in paths.items() if not path.exists()}
        if not missing:
            return
        lengths = np.array([len(e.ids) for e in encoded])
        begins = np.cumsum(lengths) - lengths
        width, trunk = self.trunk.width, self.trunk
        flat = {}
        for top, path in missing.items():
            scratch, size = str(path.with_suffix(".new")), int(lengths.sum()) * width
            flat[top] = torch.from_file(scratch, shared=True, size=size, dtype=torch.bfloat16)
        seen: dict[int, torch.Tensor] = {}
        for top in missing:
            trunk.blocks[top - 1].register_forward_hook(
                lambda _m, _i, out, top=top: seen.__setitem__(top, first_output(out))
            )
        budget, device = trunk.token_budget, trunk.device
        for n, batch in enumerate(batches(encoded, token_budget=budget, device=device)):
            with torch.inference_mode():
                trunk.model(**trunk.inputs(batch))
            for i, row in enumerate(batch.rows):
                begin, length = int(begins[row]), int(lengths[row])
                for top, states in seen.items():
                    place = flat[top][begin * width : (begin + length) * width]
                    place.copy_(states[i, :length].reshape(-1))
            if n % 20 == 0:
                print(f"{self.name}: token states, batch {n}", flush=True)
        for path in missing.values():
            path.with_suffix(".new").replace(path)

    # Whole models ------------------------------------------------------------------------------

    def _full(
        self, way: Way, rows: dict[str, np.ndarray], seed: int
    ) -> tuple[dict[str, np.ndarray], Any]:
        from ensemble_rm.members.full.training import train_full

        job = self._job(way, rows, seed, self.trunk.depth)
        trained = train_full(job)
        scores = {}
        for part in PARTS:
            samples = self.data(rows[part]).samples()
            scores[part] = np.concatenate([s.score(samples) for s in trained.scorers], axis=1)
        assert job.checkpoint is not None
        shutil.rmtree(job.checkpoint, ignore_errors=True)
        return scores, trained.record
