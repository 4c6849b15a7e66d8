"""The temperature fit against netcal's, on 100,000 judgments, in turn and in one process.

netcal is given float64 (its float32 default does not converge here). `netcal_ratio` is theirs/ours
in time; `nll_gap` is ours − theirs in nats a judgment, negative where ours is lower.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser, seconds
from ensemble_rm.calibration import fit_temperature
from ensemble_rm.calibration.methods.temperature import margin_nll


def main() -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    import torch
    from netcal.scaling import TemperatureScaling

    torch.set_num_threads(1)
    figures = Figures(args)
    n, repeats = (20_000, 3) if args.quick else (100_000, 9)
    ratios, gaps = [], []
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        x = rng.normal(0, 4, n)
        y = (rng.random(n) < 1 / (1 + np.exp(-x / 2.5))).astype(np.float64)
        p = np.clip(1 / (1 + np.exp(-x)), 1e-12, 1 - 1e-12)
        ours: list[float] = []
        theirs: list[float] = []

        def fit_ours(x: np.ndarray = x, y: np.ndarray = y, out: list[float] = ours) -> None:
            out.append(1 / fit_temperature(x, y).temperature)

        def fit_theirs(
            x: np.ndarray = x, p: np.ndarray = p, y: np.ndarray = y, out: list[float] = theirs
        ) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = TemperatureScaling(method="mle")
                model.fit(p, y)
            q = np.clip(np.asarray(model.transform(p[:100]), dtype=np.float64).ravel(), 1e-15, 1)
            logits = np.log(q) - np.log1p(-q)
            usable = np.abs(x[:100]) > 0.5
            out.append(float(np.median(logits[usable] / x[:100][usable])))

        first, second = (fit_ours, fit_theirs) if repeat % 2 else (fit_theirs, fit_ours)
        took = {first: seconds(first), second: seconds(second)}
        ratios.append(took[fit_theirs] / took[fit_ours])
        one = np.ones(n)
        gaps.append(margin_nll(x, y, one, ours[0]) - margin_nll(x, y, one, theirs[0]))
    figures.add_repeats("netcal_ratio", ratios)
    figures.add_repeats("nll_gap", gaps)
    figures.write()


if __name__ == "__main__":
    main()
