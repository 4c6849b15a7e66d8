"""Members' scores of one prompt's samples → each arm's gold at every n.

An arm is a way to choose: one head, or an aggregator over an ensemble. Knows arrays of normalised
scores; knows nothing of text or models.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ensemble_rm.aggregation import lcb, mean, minimum, uwo
from ensemble_rm.best_of_n import best_of_n_curve

AGGREGATORS = {"mean": mean(), "minimum": minimum(), "uwo": uwo(0.5), "lcb": lcb(1.0)}
ONES = ("single", "middle_one")
ENSEMBLES = ("heads", "views", "middle", "branch")


def ensembles(members: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return (n_samples, n_members) of each ensemble; `mixed` has the views of both trunks."""
    found = {name: members[name] for name in ENSEMBLES if name in members}
    if "minilm" in members:
        found["mixed"] = np.concatenate([members["views"], members["minilm"]], axis=1)
    return found


def proxies(members: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Return what each arm chooses by; of several, the arm's curve is the mean of their curves.

    `uwo_centred` takes each member's mean over the prompt's samples out beforehand: a
    Bradley–Terry score leaves any function of the prompt open, which the members' variance counts.
    """
    found = {name: [members[name][:, 0]] for name in ONES if name in members}
    for name, scores in ensembles(members).items():
        found[f"{name}_single"] = list(scores.T)
        for how, aggregator in AGGREGATORS.items():
            found[f"{name}_{how}"] = [aggregator(scores)]
        centred = scores - scores.mean(axis=0)
        found[f"{name}_uwo_centred"] = [AGGREGATORS["uwo"](centred)]
    return found


def standardised(gold: np.ndarray) -> np.ndarray:
    """Return gold in standard deviations of one prompt's samples, from their mean."""
    return (gold - gold.mean()) / gold.std()


def curves(
    members: Mapping[str, np.ndarray], gold: np.ndarray, sizes: list[int]
) -> dict[str, np.ndarray]:
    """Return each arm's standardised gold at every n, and the oracle's, which chooses by gold."""
    worth = standardised(gold)
    found = {"oracle": best_of_n_curve(worth, worth, sizes)}
    for arm, by in proxies(members).items():
        golds = np.broadcast_to(worth, (len(by), len(worth)))
        found[arm] = best_of_n_curve(np.stack(by), golds, sizes).mean(axis=0)
    return found


def correlations(members: Mapping[str, np.ndarray], gold: np.ndarray) -> dict[str, float]:
    """Return the correlation of what each arm chooses by with gold, over one prompt's samples."""
    return {
        arm: float(np.mean([np.corrcoef(proxy, gold)[0, 1] for proxy in by]))
        for arm, by in proxies(members).items()
    }
