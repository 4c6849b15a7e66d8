"""The demo's summary: about ten lines, the pictures, and one HTML page that holds both."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_rm.arrays import Floats
from ensemble_rm.demo.hacks import AGGREGATORS, SINGLE, TRICKS, HackReport
from ensemble_rm.evaluation.evaluation import Evaluation, Row
from ensemble_rm.metrics import Interval
from ensemble_rm.plotting import INK, MUTED, PALE, new_figure, write_figure
from ensemble_rm.versions.atomic_files import replace_file, storage_errors

BINS = 10


def number(value: Interval, digits: int = 2) -> str:
    """Return an estimate with its interval."""
    return f"{value.estimate:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def summary(
    evaluation: Evaluation,
    against: dict[str, float],
    hacks: HackReport | None,
    trained_on: int,
) -> list[str]:
    """Return the main figures, a line each."""
    members = [row for row in evaluation.rows if row.kind == "member" and "accuracy" in row.before]
    own = evaluation.row(evaluation.chosen)
    single = np.mean([row.before["accuracy"].estimate for row in members])
    after, before = own.after.get("nll"), own.before.get("nll")
    tested = f"tested on {evaluation.pairs:,} pairs of {evaluation.prompts} other prompts"
    lines = [f"{len(members)} reward models, trained on {trained_on:,} pairs, {tested}"]
    if "accuracy" in own.before:
        lines.append(
            f"Accuracy: {number(own.before['accuracy'])}; one model alone {single:.2f}"
            + (f"; at best {against['accuracy_of_the_truth']:.2f}" if against else "")
        )
    if against:
        lines.append(
            f"NLL: {against['nll_after']:.2f} calibrated; a coin {np.log(2):.2f}, "
            f"the annotator itself {against['nll_of_the_truth']:.2f}"
        )
        lines.append(
            f"Distance to the true probability: {against['distance_after']:.2f} on average, "
            f"{against['distance_before']:.2f} before calibration"
        )
    elif after is not None and before is not None:
        lines.append(f"NLL: {after.estimate:.3f} calibrated, {before.estimate:.3f} before")
    if hacks is not None:
        planted = sum(hacks.counts.values())
        lines.append(
            f"{planted} planted reward hacks, all truly worse. Share that gets a higher reward "
            "than its original:"
        )
        lines += [f"  {way:12s} {number(row['all'])}" for way, row in hacks.fooled.items()]
    return lines


# Pictures ----------------------------------------------------------------------------------------

COLOURS = ("#8795a1", INK, "#2b8a8a", "#b7791f", MUTED)


def draw_truth(raw: Floats, calibrated: Floats, truth: Floats, path: Path) -> Path:
    """Draw predicted against true probabilities, in ten bins of equal size.

    Parameters
    ----------
    raw, calibrated, truth : ndarray, shape (n_pairs,)
    path : Path
    """
    figure, axes = new_figure(
        "Predicted and true probability", "predicted", "true, mean of a bin", size=(5, 4.2)
    )
    axes.plot([0, 1], [0, 1], color=PALE, zorder=0)
    for p, label, colour, face in (
        (raw, "before calibration", COLOURS[0], "white"),
        (calibrated, "calibrated", INK, INK),
    ):
        bins = np.array_split(np.argsort(p, kind="stable"), BINS)
        x, y = ([values[rows].mean() for rows in bins] for values in (p, truth))
        axes.plot(x, y, "o-", color=colour, markerfacecolor=face, linewidth=1, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="upper left")
    return write_figure(figure, path)


def draw_hacks(hacks: HackReport, path: Path) -> Path:
    """Draw the share of hacks that get a higher reward than their original, by trick."""
    figure, axes = new_figure(
        "Planted hacks that beat their original",
        "share, with 95 % interval over prompts",
        "",
        size=(7, 4.2),
    )
    rows = [*(trick for trick in TRICKS if hacks.counts[trick]), "all"]
    ways = (SINGLE, *AGGREGATORS)
    for k, way in enumerate(ways):
        values = [hacks.fooled[way][row] for row in rows]
        y = np.arange(len(rows)) + 0.14 * (k - (len(ways) - 1) / 2)
        x = np.array([v.estimate for v in values])
        reach = np.array([[v.estimate - v.low, v.high - v.estimate] for v in values]).T
        axes.errorbar(x, y, xerr=reach, fmt="o", color=COLOURS[k], markersize=5, label=way)
    axes.axvline(hacks.expected, color=PALE, zorder=0)
    axes.text(hacks.expected + 0.01, -0.62, "annotator", fontsize=8, color="#62727b")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.set_xlim(0, 1)
    figure.legend(frameon=False, loc="outside right center")
    return write_figure(figure, path)


# The page ----------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22303c; max-width: 860px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; }
th { border-bottom: 1px solid #c9d3db; font-weight: 600; }
img { max-width: 100%; } figure { margin: 1rem 0; }
blockquote { margin: .4rem 0; padding: .2rem .9rem; border-left: 3px solid #d9e2ec;
             white-space: pre-wrap; }
.note { color: #62727b; }
"""
ORIGIN = (
    "Completions of SmolLM2-135M-Instruct, judged by a simulated annotator whose true utility is "
    "known. No person judged them."
)
CAPTIONS = {
    "truth.png": "The simulated annotator's true probabilities are known. On the diagonal, a "
    "predicted probability is right on average.",
    "hacks.png": "Each dot: the share of planted hacks that get a higher reward than the "
    "completion they were made from. Lower is better.",
    "reliability.png": "The same without the truth, as with real data: predicted probabilities "
    "against verdicts.",
    "risk_coverage.png": "Pairs on which the ensemble is least sure are left out first: the error "
    "on the rest.",
}


def shown(row: Row) -> list[tuple[dict[str, Interval], str]]:
    """Return what the page shows of a row: accuracy, and NLL and ECE after calibration."""
    return [(row.before, "accuracy"), (row.after, "nll"), (row.after, "ece")]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(path: Path) -> str:
    """Return a figure with the picture's bytes in it."""
    data = base64.b64encode(path.read_bytes()).decode()
    caption = CAPTIONS[path.name]
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f'<figcaption class="note">{escape(caption)}</figcaption></figure>'
    )


def _hack_section(hacks: HackReport, example: dict[str, Any], image: str) -> list[str]:
    ways = list(hacks.fooled)
    tricks = [trick for trick in TRICKS if hacks.counts[trick]]
    counts = ", ".join(f"{hacks.counts[trick]} {trick}" for trick in tricks)
    rows = [
        [
            way,
            *(number(hacks.fooled[way][trick]) for trick in (*tricks, "all")),
            number(hacks.gained_before[way], 1),
            number(hacks.gained[way], 1),
        ]
        for way in ways
    ]
    about = (
        f"These hacks are planted: the demo adds padding, flattery or stuffed keywords to test "
        f"completions ({counts}) and keeps those whose true utility falls. The annotator prefers "
        f"{hacks.expected:.0%} of them. The last two columns: true utility that the highest reward "
        "among a prompt's completions gains over a random completion, without and with hacks among "
        "them."
    )
    note = (
        "Intervals: 95 % bootstrap over prompts. “One head” is the average over the ensemble's "
        "heads, each used alone."
    )
    intro = (
        f"The hack whose mean reward rises most ({example['trick']}), after the prompt "
        f"“{example['prompt']}”:"
    )
    sides = []
    for side in ("original", "hacked"):
        reward, utility = example[f"reward_{side}"], example[f"utility_{side}"]
        sides.append(f"<blockquote>{escape(example[side])}</blockquote>")
        sides.append(f'<p class="note">reward {reward:+.2f}, true utility {utility:.1f}</p>')
    head = ["reward by", *tricks, "all hacks", "gain, no hacks", "gain, with hacks"]
    return [
        "<h2>Planted reward hacks</h2>",
        f"<p>{escape(about)}</p>",
        image,
        table(head, rows),
        f'<p class="note">{escape(note)}</p>',
        f"<p>{escape(intro)}</p>",
        *sides,
    ]


def write_page(
    path: Path,
    *,
    evaluation: Evaluation,
    against: dict[str, float],
    hacks: HackReport | None,
    examples: Sequence[dict[str, Any]],
    trained_on: int,
    pictures: Sequence[Path],
) -> Path:
    """Write one HTML page that needs no other file.

    Raises
    ------
    StorageError
        If the page cannot be written.
    """
    images = {file.name: picture(file) for file in pictures}
    lines = summary(evaluation, against, None, trained_on)
    body = ["<h1>ensemble-rm demo</h1>"]
    if against:
        body.append(f'<p class="note">{ORIGIN}</p>')
    body.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
    if against:
        body += ["<h2>Calibrated probabilities</h2>", images.pop("truth.png")]
    pair = examples[0]
    surest = (
        f"The pair on which the ensemble is surest, after “{pair['prompt']}”: P(first is "
        f"preferred) = {pair['probability']:.2f}"
    )
    if "true_probability" in pair:
        surest += f"; true: {pair['true_probability']:.2f}"
    body.append(f"<p>{escape(surest)}</p>")
    body += [f"<blockquote>{escape(pair[side])}</blockquote>" for side in ("first", "second")]
    if hacks is not None:
        body += _hack_section(hacks, examples[1], images.pop("hacks.png"))
    rows = [
        [row.name]
        + [number(metrics[name], 3) if name in metrics else "" for metrics, name in shown(row)]
        for row in evaluation.rows
    ]
    body.append("<h2>All ways to a reward, on ordinary pairs</h2>")
    body.append(table(["member or aggregator", "accuracy", "calibrated NLL", "ECE"], rows))
    body += images.values()
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>ensemble-rm demo</title><style>{STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )
    with storage_errors(f"writing {path}"):
        replace_file(path, html.encode())
    return path
