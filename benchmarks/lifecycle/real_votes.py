"""The recalibration job on real votes that arrive in batches.

Ensembles of five heads with a view each on MiniLM-L6 are trained and calibrated on hh_rlhf's pairs.
Then judgments arrive, a batch a month, sides dealt at random, and `recalibrate` runs after each on
all judgments so far, through the store and the run folder as a user's job would:

- `subsets`: trained on all four subsets; other prompts of them arrive one subset after another,
  three batches each, one crowd worker a pair.
- `questions`: the same ensemble; experts' votes of mtbench_votes.jsonl arrive, ties among them, ten
  questions a batch, of a kind that it was not trained on.
- `contradicted`: trained on harmless-base alone; the subsets arrive as above. It was trained to
reject helpful answers, which recalibration cannot fix.

Each batch is predicted before the job has seen it. Figures, over batches: `nll_…` of the votes
under the temperature of version 1 (`frozen`), under the job's current version (`gated`) and under
one fitted blindly on all earlier votes (`blind`); `gain_gated_…` and `gain_blind_…`, frozen's NLL
less theirs with a 95 % interval over prompts; how often the job published; at which
batch it first raised the drift alarm, 0 for never; T at the end. The order of margins is the same
under any T: what changes are probabilities.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import OVER_PROMPTS, SHARED_DATA, Figures, make_parser
from benchmarks.shared.preference_runs import package_folder
from ensemble_rm import (
    Judgment,
    JudgmentStore,
    Preferences,
    RewardEnsemble,
    TrunkOptions,
    load_preferences,
    recalibrate,
    train,
)
from ensemble_rm.calibration import fit_temperature
from ensemble_rm.data.samples import as_prompt
from ensemble_rm.errors import CalibrationError
from ensemble_rm.judgments.votes import to_preferences
from ensemble_rm.metrics import bootstrap, pair_nll

DATA = SHARED_DATA
CACHE = Path("~/.cache/ensemble_rm").expanduser()
BEGIN = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
SHARES = (0.4, 0.1, 0.1, 0.4)
SUBSETS = ("harmless-base", "helpful-base", "helpful-rejection-sampled", "helpful-online")


def dated(batch: int, place: int) -> datetime:
    return BEGIN + timedelta(days=30 * batch, minutes=place)


def judged(row: dict[str, Any], who: str, vote: str, turned: bool, at: datetime) -> Judgment:
    """Return a vote, the sides dealt at random."""
    sides = [row["chosen"], row["rejected"]]
    outcome = {"chosen": "first", "rejected": "second", "tie": "tie"}[vote]
    if turned:
        sides.reverse()
        outcome = {"first": "second", "second": "first", "tie": "tie"}[outcome]
    prompt, name = as_prompt(row["prompt"]), f"{row['id']}/{who}/{at.isoformat()}"
    return Judgment(prompt, *sides, outcome, who, at, "real-votes", name)


def subsets(pairs: Preferences, size: int) -> Iterator[list[Judgment]]:
    """Give hh_rlhf's subsets one after another, three batches each, whole prompts."""
    rng, number = np.random.default_rng(0), 0
    names, groups = np.array(pairs.subsets), pairs.groups
    for subset in SUBSETS:
        prompts = rng.permutation(np.unique(groups[names == subset]))
        for part in np.array_split(prompts, 3):
            rows = np.flatnonzero((names == subset) & np.isin(groups, part))[:size]
            yield [
                judged(
                    pairs[int(i)].to_json() | {"id": pairs[int(i)].id or f"{number}/{i}"},
                    *("worker", "chosen", bool(rng.random() < 0.5), dated(number, place)),
                )
                for place, i in enumerate(rows)
            ]
            number += 1


def questions(path: Path, count: int) -> Iterator[list[Judgment]]:
    """Give experts' votes, ten questions a batch."""
    rng = np.random.default_rng(1)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = list(dict.fromkeys(json.dumps(row["prompt"]) for row in rows))
    order = [asked[i] for i in rng.permutation(len(asked))]
    for number, part in enumerate(np.array_split(np.arange(len(order)), count)):
        chosen = {order[i] for i in part}
        votes = [
            (row, vote)
            for row in rows
            if json.dumps(row["prompt"]) in chosen
            for vote in row["annotators"]
        ]
        yield [
            judged(row, vote["id"], vote["vote"], bool(rng.random() < 0.5), dated(number, place))
            for place, (row, vote) in enumerate(votes)
        ]


def nll(margins: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    return pair_nll(1 / (1 + np.exp(-margins / temperature)), targets)


def run(
    name: str, folder: Path, batches: Iterator[list[Judgment]], options: dict[str, Any]
) -> dict[str, list[np.ndarray]]:
    """Predict each batch, then let the job see it."""
    first = RewardEnsemble.from_pretrained(folder, **options)
    assert first.calibration is not None
    frozen, blind = first.calibration.temperature, first.calibration.temperature
    now = frozen
    found: dict[str, list[np.ndarray]] = {k: [] for k in ("frozen", "gated", "blind", "w", "g")}
    past: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    verdicts: list[str] = []
    moved: list[bool] = []
    with JudgmentStore.create(folder.parent / f"{folder.name}.db") as store:
        for number, batch in enumerate(batches):
            pairs = to_preferences(batch)
            scored = first.judge(pairs)
            margins = scored.margins(first.aggregator)
            prompts = scored.groups + 100_000 * number  # no prompt is in two batches
            if number:
                for side, t in (("frozen", frozen), ("gated", now), ("blind", blind)):
                    found[side].append(nll(margins, scored.targets, t))
                found["w"].append(scored.weights)
                found["g"].append(prompts)
            past.append((margins, scored.targets, scored.weights, prompts))
            store.add(batch)
            ended = partial(dated, number + 1, 0)
            said = recalibrate(
                folder,
                store,
                clock=ended,
                load=lambda path, **k: RewardEnsemble.from_pretrained(path, **k, **options),
            )
            now = said.temperature_after or now
            joined = [np.concatenate(column) for column in zip(*past, strict=True)]
            try:
                blind = fit_temperature(
                    joined[0], joined[1], weights=joined[2], groups=joined[3]
                ).temperature
            except CalibrationError as error:
                print(f"{name} {number}: blind keeps its T: {error}")
            verdicts.append(said.verdict)
            moved.append(said.version is not None)
            print(f"{name} {number}: {len(batch)} votes, T {now:.3f}, blind {blind:.3f}: {said}")
    alarmed = [verdict == "drift alarm" for verdict in verdicts]
    found["alarmed"] = [np.array([alarmed.index(True) + 1 if any(alarmed) else 0])]
    found["published"] = [np.array(moved)]
    found["T"] = [np.array([frozen, now, blind])]
    return found


def report(name: str, found: dict[str, list[np.ndarray]], figures: Figures) -> None:
    weights, groups = np.concatenate(found["w"]), np.concatenate(found["g"])
    for side in ("frozen", "gated", "blind"):
        each = [np.average(v, weights=w) for v, w in zip(found[side], found["w"], strict=True)]
        whole = np.average(np.concatenate(found[side]), weights=weights)
        figures.add(
            f"nll_{side}_{name}",
            whole,
            min(each),
            max(each),
            len(each),
            interval="range over batches",
        )
    for side in ("gated", "blind"):
        gain = np.concatenate(found["frozen"]) - np.concatenate(found[side])

        def weighted(rows: np.ndarray, gain: np.ndarray = gain) -> float:
            return float(np.average(gain[rows], weights=weights[rows]))

        i = bootstrap(weighted, groups, draws=1000)
        figures.add(
            f"gain_{side}_{name}", i.estimate, i.low, i.high, len(gain), interval=OVER_PROMPTS
        )
    published = found["published"][0]
    share = float(published.mean())
    figures.add_value(f"published_share_{name}", share, len(published))
    when = int(found["alarmed"][0][0])
    figures.add_value(f"alarmed_at_batch_{name}", when, len(published))
    for side, t in zip(("frozen", "gated", "blind"), found["T"][0], strict=True):
        figures.add_value(f"temperature_{side}_{name}", t)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the JSONL files")
    parser.add_argument("--cache-dir", type=Path, default=CACHE)
    parser.add_argument("--fit", type=int, default=900, metavar="PAIRS", help="to train on")
    parser.add_argument(
        "--size", type=int, default=250, help="judgments a batch of hh_rlhf, at most"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    length = 256
    if args.quick:
        args.fit, args.size, length = 120, 40, 48
    figures = Figures(args)
    pairs = load_preferences(args.data / "hh_rlhf.jsonl")
    options = TrunkOptions(max_length=length, dtype="bfloat16", device="cpu")

    def made(own: Preferences) -> tuple[RewardEnsemble, Preferences]:
        """Return an ensemble, and the pairs of prompts that it has not seen."""
        own = own.take(np.random.default_rng(0).permutation(len(own)))  # the file is sorted
        fit, validation, held, rest = own.split(*SHARES, seed=0)
        ensemble = train(
            fit[: args.fit],
            validation[: args.fit // 4],
            backbone=package_folder("minilm"),
            members=5,
            options=options,
            cache_dir=args.cache_dir,
        )
        return ensemble.calibrate(held[: args.fit // 3]), rest

    ensemble, arriving = made(pairs)
    names = np.array(pairs.subsets)
    narrow, rest = made(pairs.take(np.flatnonzero(names == SUBSETS[0])))
    unseen = Preferences((*rest, *pairs.take(np.flatnonzero(names != SUBSETS[0]))), pairs.source)
    votes = questions(args.data / "mtbench_votes.jsonl", 2 if args.quick else 8)
    with tempfile.TemporaryDirectory() as place:
        for name, one, batches in (
            ("subsets", ensemble, subsets(arriving, args.size)),
            ("questions", ensemble, votes),
            ("contradicted", narrow, subsets(unseen, args.size)),
        ):
            folder = one.save_pretrained(Path(place) / name)
            report(name, run(name, folder, batches, {"cache_dir": args.cache_dir}), figures)
    figures.write()


if __name__ == "__main__":
    main()
