"""The unbiased best-of-n estimator against the plain loop over binomials, in turn, one thread.

N = 12,600 samples of each of 1,000 prompts; n = 1, 2, 4, … to 12,500. The loop is written as kindly
as a loop can be: exact binomials once for each n and not for each prompt, golds sorted by numpy, a
generator that multiplies and `sum`. `loop_ratio` is its time over ours, sorting included on both
sides; `loop_ratio_kept` leaves out its time for binomials, as if they lay ready. `gap` is the
largest difference among all prompts and sizes. In float64 golds are standard normal.
"""

from __future__ import annotations

import sys
from math import comb
from pathlib import Path
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser
from ensemble_rm.best_of_n import best_of_n_curve


def binomials(samples: int, n: int) -> list[float]:
    """C(i − 1, n − 1)/C(N, n) for i = n … N, each rounded once."""
    every = comb(samples, n)
    return [comb(i - 1, n - 1) / every for i in range(n, samples + 1)]


def loop(proxy: np.ndarray, gold: np.ndarray, weights: list[list[float]]) -> list[list[float]]:
    found = []
    for row, worth in zip(proxy, gold, strict=True):
        ascending = worth[np.argsort(row)].tolist()
        found.append(
            [
                sum(w * g for w, g in zip(each, ascending[-len(each) :], strict=True))
                for each in weights
            ]
        )
    return found


def main() -> None:
    args = make_parser(__doc__).parse_args()
    figures = Figures(args)
    samples, prompts, last = (1000, 100, 900) if args.quick else (12_600, 1000, 12_500)
    sizes = [2**i for i in range(14) if 2**i < last] + [last]
    began = perf_counter()
    weights = [binomials(samples, n) for n in sizes]
    binomial_time = perf_counter() - began
    print(f"exact binomials: {binomial_time:.1f} s", flush=True)
    ratios, kept, gaps = [], [], []
    for repeat in range(3):
        proxy, gold = np.random.default_rng(repeat).normal(size=(2, prompts, samples))
        began = perf_counter()
        theirs = loop(proxy, gold, weights)
        middle = perf_counter()
        ours = best_of_n_curve(proxy, gold, sizes)
        end = perf_counter()
        ratios.append((middle - began + binomial_time) / (end - middle))
        kept.append((middle - began) / (end - middle))
        gaps.append(float(np.abs(ours - np.array(theirs)).max()))
        print(f"loop {middle - began:.1f} s, ours {end - middle:.2f} s", flush=True)
    figures.add_repeats("loop_ratio", ratios)
    figures.add_repeats("loop_ratio_kept", kept)
    figures.add_repeats("gap", gaps)
    figures.write()
    if max(gaps) > 1e-10:
        raise SystemExit(f"the two differ by {max(gaps):.1e}")


if __name__ == "__main__":
    main()
