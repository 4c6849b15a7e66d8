"""An evaluation as a table for a terminal."""

from __future__ import annotations

from ensemble_rm.evaluation.evaluation import Evaluation
from ensemble_rm.evaluation.measures import Row, SubsetRow
from ensemble_rm.metrics import Interval
from ensemble_rm.text_table import table


def _figure(found: dict[str, Interval], name: str) -> str:
    if name not in found:
        return "—"
    i = found[name]
    return f"{i.estimate:.3f} [{i.low:.3f}, {i.high:.3f}]"


def _short(found: dict[str, Interval], name: str) -> str:
    return f"{found[name].estimate:.3f}" if name in found else "—"


def _line(row: Row, chosen: str) -> list[str]:
    return [
        ("▸ " if row.name == chosen else "  ") + row.name,
        _figure(row.before, "accuracy"),
        _short(row.before, "nll"),
        _figure(row.after, "nll"),
        _short(row.before, "ece"),
        _short(row.after, "ece"),
        "—" if row.null_after is None else f"≤ {row.null_after.upper95:.3f}",
        _short(row.after, "brier"),
        "—" if row.temperature is None else f"{row.temperature.temperature:.2f}",
    ]


def _subset_line(row: SubsetRow) -> list[str]:
    return [
        "  " + row.name,
        str(row.pairs),
        _figure(row.metrics, "accuracy"),
        _figure(row.metrics, "nll"),
        _short(row.metrics, "ece"),
        f"≤ {row.null.upper95:.3f}",
        "—" if row.temperature is None else f"{row.temperature:.2f}",
    ]


def evaluation_text(evaluation: Evaluation) -> str:
    """Return the evaluation as a table, with what its columns mean below.

    Parameters
    ----------
    evaluation : Evaluation
        To be shown.

    Returns
    -------
    str
        Several lines.
    """
    header = ("", "accuracy", "NLL raw", "NLL", "ECE raw", "ECE", "by chance", "Brier", "T")
    parts = [table(header, [_line(row, evaluation.chosen) for row in evaluation.rows])]
    if evaluation.subsets:
        columns = ("▸ by subset", "pairs", "accuracy", "NLL", "ECE", "by chance", "T")
        parts += ["", table(columns, [_subset_line(row) for row in evaluation.subsets])]
    notes = [
        f"{evaluation.pairs} pairs of {evaluation.prompts} prompts; brackets: 95 % over prompts.",
        "raw: σ(Δ) of normalised scores; others: σ(Δ/T), T fitted on the calibration's judgments.",
        "by chance: 95 % of perfectly calibrated models of these probabilities stay below.",
        "▸ is the ensemble's own aggregator, with all that its calibration says.",
        "accuracy, NLL and Brier count the pairs' weights; the ECE counts each pair once.",
    ]
    if evaluation.pooling_gain is not None:
        gain = evaluation.pooling_gain
        notes.append(
            f"pooling gain: {gain.estimate:.4f} [{gain.low:.4f}, {gain.high:.4f}] nats, the mean "
            "member's NLL − the ensemble's, each at its own T"
        )
    for name, area in evaluation.error_auroc.items():
        notes.append(
            f"AUROC of errors by {name}: {area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]"
        )
    if evaluation.margin_correlation is not None:
        notes.append(f"mean correlation of members' margins: {evaluation.margin_correlation:.2f}")
    if evaluation.longer_first_auroc is not None:
        notes.append(f"AUROC of length alone: {evaluation.longer_first_auroc:.3f}")
    if evaluation.unrewarded:
        notes.append(f"{evaluation.unrewarded} pairs more have no reward: too few members scored")
    notes += [
        f"{row.name} scored {evaluation.pairs - row.missing} of the pairs, and is measured on those"
        for row in evaluation.rows
        if row.missing
    ]
    refused = {row.refusal for row in evaluation.rows if row.refusal}
    notes += [f"not calibrated: {reason}" for reason in sorted(refused)]
    return "\n".join([*parts, "", *notes])
