"""What annotators who do not judge can do to the published temperature, and what the defence costs.

An honest store has 3,000 judgments over 180 days by 20 annotators, whose true temperature is 1.171;
the incumbent's is 1, from 300 judgments. One account always agrees with the reward, always opposes
it, or inverts honest verdicts, with 1, 10 or 100 times an honest account's 150 judgments, all in
the last hour or backdated over the window. The same by three colluders, and by a tenth of the
annotators who invert. The decision is the library's, with its default options.

`shift_one_account`, `shift_three_colluders`, `shift_inverted_tenth`: the largest |log T − log
T_honest| over seeds and kinds of attack, among runs that publish where there is more than one
attacker (`attacked_published` is their share), where T_honest is published from the honest
judgments alone. `shift_undefended` is the first without the defence, and `shift_coins` that of an
account that throws coins, which only the cap bounds. `years_worse`: the share of simulated years
of 300 judgments a month, of which 2 of 20 annotators invert theirs from the first month on, whose
mean held-out NLL exceeds that of the first calibration, never replaced, by more than .001 nats.
`honest_published`: publications from honest stores (20 equal annotators, unequal ones, 30 % noisier
or sharper ones, one, two, months in one batch each, ids missing), relative to those without the
defence; `honest_excluded`: share of their annotators whom the test rejects; `honest_ece_ratio`:
their mean ECE against the truth, relative to that without the defence.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.lifecycle.recalibration_years import OPTIONS, first_calibration
from benchmarks.shared.common import Figures, make_parser
from ensemble_rm import Calibration
from ensemble_rm.aggregation import mean
from ensemble_rm.evidence.dated_margins import DAY, DatedMargins, join_margins
from ensemble_rm.metrics import ece
from ensemble_rm.recalibration.decision import Decision, decide
from ensemble_rm.recalibration.options import DecisionOptions

TRUE = 1.171
ANNOTATORS, EACH, DAYS = 20, 150, 180
SPREAD = 2.0  # of a margin
KINDS = ("agreeing", "opposing", "inverting")
VOLUMES = (1, 10, 100)
FIRST_SEED = 10_000  # the level and the tolerated slopes were chosen on lower ones
DEFENDED = DecisionOptions()
UNDEFENDED = replace(DEFENDED, annotator_share=1.0, day_share=1.0, annotator_level=0.0)
HONEST = ("equal", "unequal", "varied", "one", "two", "monthly batches", "ids missing")
FRESH = np.random.default_rng(77).normal(0, SPREAD, 4000)


def judge(
    rng: np.random.Generator,
    annotators: np.ndarray,
    times: np.ndarray,
    *,
    temperature: float | np.ndarray = TRUE,
    kind: str = "honest",
) -> DatedMargins:
    """Judgments of a prompt each, at times in days."""
    n = len(times)
    x = rng.normal(0, SPREAD, n)
    honest = (rng.random(n) < expit(x / temperature)).astype(float)
    targets = {
        "honest": honest,
        "agreeing": (x > 0).astype(float),
        "opposing": (x < 0).astype(float),
        "inverting": 1 - honest,
        "coins": (rng.random(n) < 0.5).astype(float),
    }[kind]
    return DatedMargins(
        x,
        x[:, None] + rng.normal(0, 0.3, (n, 2)),
        targets,
        np.ones(n),
        rng.integers(0, 2**60, n),
        times * DAY,
        np.full(n, -1, np.int32),
        annotators=annotators.astype(np.int64),
        days=times.astype(np.int64),
    )


def honest_store(rng: np.random.Generator, kind: str = "equal") -> DatedMargins:
    """Return an honest store, of one of the kinds in `HONEST`."""
    n = ANNOTATORS * EACH
    times = np.sort(rng.random(n) * DAYS)
    annotators = rng.permutation(np.repeat(np.arange(ANNOTATORS), EACH))
    temperature: float | np.ndarray = TRUE
    if kind == "unequal":
        shares = 1 / np.arange(1, ANNOTATORS + 1)
        annotators = rng.choice(ANNOTATORS, n, p=shares / shares.sum())
    elif kind == "varied":
        temperature = TRUE * np.exp(rng.normal(0, 0.3, ANNOTATORS))[annotators]
    elif kind in ("one", "two"):
        annotators = annotators % (1 if kind == "one" else 2)
    elif kind == "ids missing":
        annotators = np.full(n, -1)
    data = judge(rng, annotators, times, temperature=temperature)
    # As in a job, the store's first day is exempt from the cap.
    data = replace(data, days=np.where(data.days == 0, -1, data.days))
    if kind == "monthly batches":
        data = replace(data, days=(times // 30).astype(np.int64))
    return data


def attack(
    rng: np.random.Generator, kind: str, accounts: list[int], volume: int, *, backdated: bool
) -> DatedMargins:
    """Judgments of attackers, all in the last hour or over the window."""
    n = EACH * volume * len(accounts)
    drawn = np.sort(rng.random(n))
    times = drawn * DAYS if backdated else DAYS + drawn / 24
    data = judge(rng, rng.permutation(np.repeat(accounts, EACH * volume)), times, kind=kind)
    # All arrive on the last day, whatever their dates.
    return replace(data, days=np.full(n, DAYS))


def incumbent(rng: np.random.Generator, temperature: float = 1.0) -> Calibration:
    """Return the first calibration, of 300 honest judgments."""
    times = np.zeros(300)
    return first_calibration(
        judge(rng, np.arange(300) % ANNOTATORS, times, temperature=temperature)
    )


def in_force(decision: Decision, old: Calibration) -> float:
    new = decision.calibration
    return (old if new is None else new).temperature


def shifts(
    seed: int,
    kinds: tuple[str, ...],
    accounts: list[int],
    volumes: tuple[int, ...],
    options: DecisionOptions = DEFENDED,
    *,
    instead: bool = False,
) -> list[tuple[bool, float]]:
    """Whether each attack's run publishes, and |log T − log T_honest|.

    `instead`: the attackers are accounts of the honest store, and replace their own judgments.
    """
    rng = np.random.default_rng(seed)
    old, data = incumbent(rng), honest_store(rng)
    if instead:
        data = data.take(np.flatnonzero(~np.isin(data.annotators, accounts)))
    honest = in_force(decide(data, mean(), old, options=options), old)
    results = []
    for kind in kinds:
        for volume in volumes:
            for backdated in (False, True):
                bad = attack(rng, kind, accounts, volume, backdated=backdated)
                decision = decide(join_margins([data, bad]), mean(), old, options=options)
                shift = abs(math.log(in_force(decision, old) / honest))
                results.append((decision.calibration is not None, shift))
    return results


def held_out_nll(temperature: float, true: float) -> float:
    p = expit(FRESH / true)
    return float(np.mean(np.logaddexp(0, -FRESH / temperature) + (1 - p) * FRESH / temperature))


def year_excess(seed: int, options: DecisionOptions) -> float:
    """Mean held-out NLL of a year with 2 of 20 annotators inverting, above the frozen one's."""
    rng = np.random.default_rng(seed)
    frozen = current = incumbent(rng)
    months = [judge(rng, np.arange(300) % ANNOTATORS, np.sort(rng.random(300) * 30), temperature=1)]
    excess = []
    for month in range(1, 13):
        excess.append(
            held_out_nll(current.temperature, 1.0) - held_out_nll(frozen.temperature, 1.0)
        )
        times = month * 30 + np.sort(rng.random(300) * 30)
        fresh = judge(rng, np.arange(300) % ANNOTATORS, times, temperature=1.0)
        bad = fresh.annotators < 2
        months.append(replace(fresh, targets=np.where(bad, 1 - fresh.targets, fresh.targets)))
        decision = decide(join_margins(months[-6:]), mean(), current, options=options)
        current = decision.calibration or current
    return float(np.mean(excess))


def add_honest(figures: Figures, seeds: int, first: int) -> None:
    """Add what the defence costs honest stores."""
    counts = {"defended": 0, "undefended": 0}
    errors: dict[str, list[float]] = {"defended": [], "undefended": []}
    excluded = annotators = 0
    truth = expit(FRESH / TRUE)
    for seed in range(first, first + seeds):
        for kind in HONEST:
            rng = np.random.default_rng([seed, HONEST.index(kind)])
            old, data = incumbent(rng), honest_store(rng, kind)
            unknown = replace(data, annotators=np.full(len(data), -1))
            runs = {
                "defended": decide(data, mean(), old, options=DEFENDED),
                "undefended": decide(unknown, mean(), old, options=UNDEFENDED),
            }
            for name, decision in runs.items():
                counts[name] += decision.calibration is not None
                errors[name].append(ece(expit(FRESH / in_force(decision, old)), truth))
            report = runs["defended"].annotators
            assert report is not None
            excluded += len(report.rejected)
            annotators += report.annotators
    stores = seeds * len(HONEST)
    figures.add_value("honest_published", counts["defended"] / counts["undefended"], stores)
    figures.add_value("honest_excluded", excluded / annotators, annotators)
    ratio = float(np.mean(errors["defended"]) / np.mean(errors["undefended"]))
    figures.add_value("honest_ece_ratio", ratio, stores)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--years", type=int, default=120)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.years = 2, 10
    figures, first = Figures(args), args.first_seed
    seeds = range(first, first + args.seeds)
    alone = [s for seed in seeds for s in shifts(seed, KINDS, [ANNOTATORS], VOLUMES)]
    figures.add_value("shift_one_account", max(shift for _, shift in alone), len(alone))
    few = range(first, first + max(args.seeds // 4, 1))
    open_ = [s for seed in few for s in shifts(seed, KINDS, [ANNOTATORS], VOLUMES, UNDEFENDED)]
    figures.add_value("shift_undefended", max(shift for _, shift in open_), len(open_))
    coins = [s for seed in seeds for s in shifts(seed, ("coins",), [ANNOTATORS], VOLUMES)]
    figures.add_value("shift_coins", max(shift for _, shift in coins), len(coins))
    several = {
        "shift_three_colluders": (KINDS, [0, 1, 2], VOLUMES),
        "shift_inverted_tenth": (("inverting",), [0, 1], (1,)),
    }
    published: list[bool] = []
    for name, (kinds, accounts, volumes) in several.items():
        runs = [s for seed in seeds for s in shifts(seed, kinds, accounts, volumes, instead=True)]
        published += [done for done, _ in runs]
        figures.add_value(name, max((shift for done, shift in runs if done), default=0), len(runs))
    figures.add_value("attacked_published", float(np.mean(published)), len(published))
    options = replace(DEFENDED, half_life=OPTIONS.half_life)
    for name, years in (("years_worse", args.years), ("years_worse_undefended", args.years // 4)):
        chosen = (
            options if name == "years_worse" else replace(UNDEFENDED, half_life=options.half_life)
        )
        worse = [year_excess(first + i, chosen) > 0.001 for i in range(years)]
        figures.add_value(name, float(np.mean(worse)), len(worse))
    add_honest(figures, args.seeds, first)
    figures.write()


if __name__ == "__main__":
    main()
