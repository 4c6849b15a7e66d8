"""Simulated years under three policies: no recalibration, blind monthly refits, the gated job.

300 judgments a month with known probabilities; ECE is that of the published temperature against the
truth, not against labels, on 4,000 fresh pairs a month, the mean of the year's twelve months. The
first calibration has 300 judgments; blind refits and the gated job look at the same 180 days with
the same half-life of 60. Drift sets in with the fifth month: scale (T × 1.25, 1.5, 2, 0.5, or a
ramp to 2), an offset of the log-odds of the first side, a bias for length; a control has none. In a
corrupted year the ninth month's verdicts are coins (`inverted`: the other side's).

The job's gate and its drift test are the library's. `ece_*` are medians over seeds of the mean over
all drifts, control included; `ece_POLICY_DRIFT` are those of one drift. `delay_months_DRIFT`: from
the onset until the test of a calibration that is never replaced alarms (13 where it does not within
the year; `detected_` is the share of years in which it does); `delay_months` is that of T doubled.
`followed_months_DRIFT`: until the gated job has gone half the way. `healthy_years_alarmed_upper` is
the 95 % Clopper–Pearson upper bound of the share of control years in which the gated job raised an
alarm; `_stated` is what its test promises a life.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import beta

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.lifecycle.recalibration_years import (
    CORRUPTED,
    DRIFTS,
    MONTHS,
    ONSET,
    Year,
    simulate,
)
from benchmarks.shared.common import RESULTS, Figures, make_parser
from ensemble_rm.calibration.methods.temperature import TemperatureFit
from ensemble_rm.drift import DriftTest

POLICIES = ("none", "blind", "gated")
STATED = DriftTest.start(TemperatureFit(1.0, 0.9, 1.1, 0.05, 0.6, 300, 300)).promise
NEVER = MONTHS + 1
FIRST_SEED = 200  # options were chosen while looking at lower ones
PICTURE = RESULTS / "recalibration.png"


def upper_bound(events: int, n: int, level: float = 0.95) -> float:
    """Clopper & Pearson's (1934) one-sided upper bound of a share."""
    return 1.0 if events == n else float(beta.ppf(level, events + 1, n - events))


def add_errors(figures: Figures, years: dict[str, dict[str, list[Year]]], seeds: int) -> None:
    """ECE of each policy in healthy and corrupted years."""
    for corrupted, by_drift in years.items():
        suffix = f"_{corrupted}" if corrupted else ""
        means = {
            policy: [
                float(np.mean([runs[seed].errors[policy] for runs in by_drift.values()]))
                for seed in range(seeds)
            ]
            for policy in POLICIES
        }
        for policy, whole in means.items():
            figures.add_repeats(f"ece_{policy}{suffix}", whole)
        ratios = [g / b for g, b in zip(means["gated"], means["blind"], strict=True)]
        figures.add_repeats(f"gated_over_blind{suffix}", ratios)
        for drift, runs in by_drift.items():
            for policy in POLICIES:
                errors = [float(np.mean(run.errors[policy])) for run in runs]
                figures.add_repeats(f"ece_{policy}_{drift}{suffix}", errors)


def add_delays(figures: Figures, drift: str, years: list[Year]) -> None:
    """Months until the alarm, and until the gated job has gone half the way."""
    alarms = [
        NEVER if y.frozen_alarm is None or y.frozen_alarm < ONSET else y.frozen_alarm - ONSET + 1
        for y in years
    ]
    figures.add_repeats(f"delay_months_{drift}", [float(a) for a in alarms])
    figures.add_repeats(f"detected_{drift}", [float(np.mean([a < NEVER for a in alarms]))])
    if drift == "scale_2":
        figures.add_repeats("delay_months", [float(a) for a in alarms])
    if not drift.startswith("scale"):
        return
    half = math.log(float(drift.split("_")[1])) / 2
    followed = []
    for y in years:
        gone = [
            m - ONSET
            for m in range(ONSET + 1, MONTHS)
            if math.log(y.temperatures[m]) * np.sign(half) >= abs(half)
        ]
        followed.append(float(gone[0] if gone else NEVER))
    figures.add_repeats(f"followed_months_{drift}", followed)


def add_control(figures: Figures, years: int) -> None:
    """How often control years raise an alarm: the job's, and that of one life of twelve months."""
    runs = [simulate(DRIFTS["control"], seed=10_000 + i, curves=False) for i in range(years)]
    for name, events in (
        ("healthy_years_alarmed", sum(bool(run.alarmed) for run in runs)),
        ("healthy_lives_alarmed", sum(run.frozen_alarm is not None for run in runs)),
    ):
        share, upper = events / years, upper_bound(events, years)
        figures.add(
            name, share, 0.0, upper, years, interval="0 to the 95 % Clopper–Pearson upper bound"
        )
        figures.add_value(f"{name}_upper", upper, years)
    figures.add_value("healthy_years_alarmed_stated", STATED, years)
    figures.add_repeats("publications_a_healthy_year", [float(len(run.published)) for run in runs])


def draw(years: dict[str, dict[str, list[Year]]]) -> None:
    """Write the picture: each policy's ECE by month, a panel a kind of year."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("no drift", "", "control"),
        ("no drift, a corrupted month", "corrupted", "control"),
        ("T doubles", "", "scale_2"),
        ("T doubles, a corrupted month", "corrupted", "scale_2"),
        ("length bias", "", "length_0.8"),
        ("length bias, a corrupted month", "corrupted", "length_0.8"),
    ]
    figure, axes = plt.subplots(3, 2, figsize=(9, 9), sharex=True, sharey="row")
    colours = {"none": "#7f7f7f", "blind": "#d95f02", "gated": "#1b6ca8"}
    names = {"none": "no recalibration", "blind": "blind refits", "gated": "gated job"}
    for axis, (title, corrupted, drift) in zip(axes.flat, panels, strict=True):
        for policy in POLICIES:
            curves = np.array([run.errors[policy] for run in years[corrupted][drift]])
            middle, low, high = np.quantile(curves, [0.5, 0.1, 0.9], axis=0)
            months = np.arange(1, MONTHS + 1)
            axis.plot(months, middle, color=colours[policy], label=names[policy])
            axis.fill_between(months, low, high, color=colours[policy], alpha=0.15, lw=0)
        if drift != "control":
            axis.axvline(ONSET + 1, color="black", lw=0.8, ls=":")
        if corrupted:
            axis.axvspan(CORRUPTED + 1, CORRUPTED + 2, color="#d95f02", alpha=0.1, lw=0)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("month")
    for axis in axes[:, 0]:
        axis.set_ylabel("ECE against the truth")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle("Medians of the seeds, and their central 80 %", fontsize=10)
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--delay-seeds", type=int, default=50, help="years a drift, for delays")
    parser.add_argument("--control-years", type=int, default=1000)
    parser.add_argument("--picture", action="store_true", help=f"write {PICTURE.name}, too")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.delay_seeds, args.control_years = 2, 5, 30
    figures = Figures(args)
    years: dict[str, dict[str, list[Year]]] = {}
    for suffix, how in (("", ""), ("corrupted", "coins"), ("inverted", "inverted")):
        years[suffix] = {
            name: [
                simulate(drift, seed=FIRST_SEED + seed, corrupted=how) for seed in range(args.seeds)
            ]
            for name, drift in DRIFTS.items()
        }
    add_errors(figures, years, args.seeds)
    for name, drift in DRIFTS.items():
        if name != "control":
            runs = [
                simulate(drift, seed=1000 + seed, curves=False) for seed in range(args.delay_seeds)
            ]
            add_delays(figures, name, runs)
    add_control(figures, args.control_years)
    if args.picture:
        draw(years)
    figures.write()


if __name__ == "__main__":
    main()
