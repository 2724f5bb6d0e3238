"""The card's two plots, from what `results.json` of `unit evaluate` holds: figures against scale, and the model beside
its teacher. What is not in the evaluation is not drawn: both return whether they wrote a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evaluation.hub_results import of_encoder
from .evaluation.plots import NOT_DRAWN, draw
from .evaluation.report import AXES, COLOURS, at_text, axis_of, figures_of, subject_of, title

AGAINST_SCALE = ("word_f1", "knn_accuracy", "zero_shot_top1", "probe_accuracy", "segmentation_miou")
SUITES = ("text", "image", "scale")
PAIRS = 14  # a plot of retention has no more
DECODER = "vision decoder"

Record = Mapping[str, Any]


def plot_scales(results: dict[str, Any], path: Path, full: bool = True) -> bool:
    """Write a PNG: each figure that was measured at several x-heights or resolutions, with its 95% interval, a line
    for each reader or model.

    Args:
        full: whether the repository holds the parts beside the encoder.
    """
    rows = [row for row in results["figures"] if row["suite"] in SUITES and row["name"] in AGAINST_SCALE]
    rows = [row for row in rows if full or of_encoder(row)]
    kinds: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        kinds.setdefault((row["name"], row["evaluator"]), []).append(row)
    along = [row for kind in kinds.values() if axis_of(kind) in AXES for row in kind]
    return draw(along, [each["name"] for each in results["subjects"]], path)


def plot_retention(results: dict[str, Any], path: Path, full: bool = True) -> bool:
    """Write a PNG: each figure of pictures of the model beside its teacher's, with 95% intervals.

    Args:
        full: whether the repository holds the parts beside the encoder.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [pair for pair in retention(results, full) if pair[1]["name"] not in NOT_DRAWN][:PAIRS]
    if not pairs:
        return False
    figure = Figure(figsize=(6.6, 1.3 + 0.55 * len(pairs)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(pairs))
    for number, (role, shift) in enumerate((("model", -0.14), ("teacher", 0.14))):
        found = [pair[1 + number] for pair in pairs]
        values = [row["value"] for row in found]
        whiskers = [
            [max(0.0, value - _end(row, "low")) for value, row in zip(values, found, strict=True)],
            [max(0.0, _end(row, "high") - value) for value, row in zip(values, found, strict=True)],
        ]
        style = {"fmt": "os"[number], "color": COLOURS[number], "label": subject_of(results, role), "capsize": 3}
        axes.errorbar(values, [place + shift for place in places], xerr=whiskers, **style)
    axes.set_yticks(places, [called for called, _, _ in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("share, with its 95% interval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path)
    return True


def retention(results: dict[str, Any], full: bool = True) -> list[tuple[str, Record, Record]]:
    """(title, the model's figure, the teacher's) of each share of pictures that both have. What the model gives
    through its vision decoder, which a teacher has not, stands beside what the teacher gives by itself."""
    model, teacher = subject_of(results, "model"), subject_of(results, "teacher")
    if model is None or teacher is None:
        return []
    others = [row for row in figures_of(results, "image", subject=teacher) if row.get("unit", "share") == "share"]
    pairs = []
    for row in figures_of(results, "image", subject=model):
        if not (full or of_encoder(row)):
            continue
        alike = [each for each in others if (each["name"], each["evaluator"]) == (row["name"], row["evaluator"])]
        other = next((each for each in alike if each.get("at", {}) == row.get("at", {})), None)
        if other is None and any(DECODER in str(value) for value in row.get("at", {}).values()):
            other = next((each for each in alike if _numbers(each) == _numbers(row)), None)
        if other is not None:
            told = ", ".join(at_text(key, value) for key, value in row.get("at", {}).items())
            pairs.append((f"{title(row['name'])}, {row['evaluator']}" + (f"\n{told}" if told else ""), row, other))
    return pairs


def _numbers(row: Record) -> dict[str, Any]:
    return {key: value for key, value in row.get("at", {}).items() if not isinstance(value, str)}


def _end(row: Record, end: str) -> float:
    return row["value"] if row.get(end) is None else row[end]
