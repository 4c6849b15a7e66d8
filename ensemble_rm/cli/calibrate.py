"""``ensemble-rm calibrate``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import (
    ENSEMBLE,
    AggregatorOptions,
    Loading,
    aggregator_options,
    read_pairs,
)
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import constant_of, default_of

if TYPE_CHECKING:
    from ensemble_rm.calibration.calibration import Calibration
    from ensemble_rm.cli.console import Console

_CALIBRATE = ("ensemble_rm.ensemble.reward_ensemble", "RewardEnsemble.calibrate")


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Fit the preference probability of a reward difference, on held-out human judgments.

    No member may have been trained on the judgments. The temperature is fitted under every method.
    Isotonic regression, histograms and BBQ can give different margins the same probability; these
    ties are counted. The reward is the same under every method.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(
        "judged pairs: JSON lines (.gz too) or a Hub data set", metavar="FILE_OR_HUB_ID"
    )
    skip_bad: bool = option("leave bad rows out, and list them", default=False)
    out: Path | None = option(
        "folder of the calibrated ensemble", default=None, metavar="FOLDER", shown="ENSEMBLE"
    )
    method: str = option(
        "method from margin to probability",
        default=default_of(*_CALIBRATE, "method"),
        choices=("temperature", "power", "isotonic", "histogram", "bbq"),
    )
    slices: bool = option(
        "one temperature per subset, shrunk to the global one",
        default=default_of(*_CALIBRATE, "slices"),
    )
    ties: str | None = option(
        "model of ties as an outcome",
        default=default_of(*_CALIBRATE, "ties"),
        choices=constant_of("ensemble_rm.calibration.ties", "TIE_MODELS"),
    )
    min_judgments: int = option(
        "minimum number of effective judgments",
        default=default_of(*_CALIBRATE, "min_judgments"),
        metavar="N",
    )
    dry_run: bool = option("fit and report, and save nothing", default=False)
    loading: Loading = nested(Loading, panel="Loading")
    aggregator: AggregatorOptions = aggregator_options()

    example: ClassVar[str] = (
        "  ensemble-rm calibrate runs/hh --data judgments.jsonl --aggregator lcb --kappa 1.0"
    )

    def run(self, console: Console) -> None:
        """Fit the calibration."""
        from ensemble_rm.data.weights import sample_weights
        from ensemble_rm.ensemble.storage import check_target

        out = self.out or self.ensemble
        if not self.dry_run:
            # Before scoring, which may take hours: a folder that is no ensemble is refused first.
            check_target(out)
        aggregator = self.aggregator.make()
        judgments = read_pairs(console, self.data, skip_bad=self.skip_bad)
        with console.progress() as progress:
            ensemble = self.loading.open(self.ensemble).calibrate(
                judgments,
                aggregator=aggregator,
                method=self.method,
                slices=self.slices,
                ties=self.ties,
                min_judgments=self.min_judgments,
                progress=progress,
            )
        calibration = ensemble.calibration
        assert calibration is not None
        fit = calibration.fit
        if not self.dry_run:
            ensemble.save_pretrained(out)
            console.save(out)
            console.next(f"ensemble-rm evaluate {out} --data {_test_pairs(self.data)}")
        weights = sample_weights(judgments.weights)
        tie_model = calibration.tie_model
        data = {
            "aggregator": str(ensemble.aggregator),
            "effective_judgments": weights.effective,
            "fit": asdict(fit),
            "dry_run": self.dry_run,
            "mixture_temperature": calibration.mixture_temperature,
            "out": str(out),
            "method": calibration.method,
            "ties": calibration.ties,
            "tie_model": None if tie_model is None else tie_model.to_json(),
            "slices": [part.to_json() for part in calibration.slices],
        }
        line = (
            f"{ensemble.aggregator}: T = {fit.temperature:.3f} [{fit.low:.3f}, {fit.high:.3f}] "
            f"from {fit.judgments} judgments of {fit.prompts} prompts, NLL {fit.nll:.4f}"
        ) + ("; nothing saved (--dry-run)" if self.dry_run else "")
        if weights.effective < len(judgments) - 0.05:
            line += f"\n  {weights.remark}"
        console.result(data, "\n".join([line, *_details(calibration)]))


def _test_pairs(judgments: str) -> str:
    """Return the test part that `train` wrote next to these judgments, or a placeholder."""
    path = Path(judgments)
    test = path.with_name("test.jsonl")
    return str(test) if path.name == "calibration.jsonl" and test.is_file() else "TEST.jsonl"


def _details(calibration: Calibration) -> list[str]:
    lines = []
    if calibration.method != "temperature":
        lines.append(
            f"  probabilities by {calibration.method}; it makes {calibration.ties} ties among the "
            "judgments' margins" + (": not for an RL reward" if calibration.ties else "")
        )
    if (ties := calibration.tie_model) is not None:
        lines.append(
            f"  ties by {ties.model}: ν = {ties.nu:.3f} [{ties.nu_low:.3f}, {ties.nu_high:.3f}], "
            f"T = {ties.temperature:.3f}; {ties.tie_share:.1%} of the judgments are ties"
        )
    for part in calibration.slices:
        own = f"no fit of its own: {part.refusal}"
        if part.own is not None:
            own = f"own {part.own.temperature:.3f} of {part.own.judgments}, weight {part.share:.0%}"
        lines.append(f"  {part.name}: T = {part.temperature:.3f} ({own})")
    return lines
