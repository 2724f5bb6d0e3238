"""The card's two plots, from what `results.json` of `unit evaluate` holds: figures against scale, and the model beside
its teacher. What is not in the evaluation is not drawn: both return whether they wrote a file.

Read are the `rows` `[name, value, low, high]` of each reader and model, and their `bins`: `{SCALE: pixels or [from,
to], "rows": …}`, with a name of `SCALES` for SCALE. Figures of names that are not known here are left to the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .evaluation.report import COLOURS

SCALES = {  # what a bin may be of -> the axis
    "x_height": "height of a lower-case x, pixels",
    "resolution": "side of the input, pixels",
}
FIGURES = {  # figure -> the axis; the part behind a comma says of which features
    "word_f1": "word F1",
    "knn_accuracy": "k-NN accuracy",
    "knn_accuracy_photographs": "k-NN accuracy, photographs",
    "zero_shot_top1": "zero-shot top 1",
    "zero_shot_top5": "zero-shot top 5",
}
AGAINST_SCALE = ("word_f1", "knn_accuracy", "zero_shot_top1")
MODEL, TEACHER = "UNIT", "teacher"  # as `unit evaluate` calls them
DECODER = "vision decoder"  # not part of an encoder's repository

Row = Sequence[Any]


def plot_scales(results: dict[str, Any], path: Path, full: bool = True) -> bool:
    """Write a PNG: each figure that was measured at several scales, with its 95% interval, a line for each reader or
    model.

    Args:
        full: whether the repository holds the parts beside the encoder.
    """
    panels: dict[tuple[str, str], dict[str, dict[float, Row]]] = {}  # (figure, scale) -> name -> pixels -> row
    for name, bins in _binned(results):
        for one in bins:
            scale = next((key for key in SCALES if key in one), None)
            if scale is None:
                continue
            place = one[scale]
            place = sum(place) / len(place) if isinstance(place, (list, tuple)) else float(place)
            for figure in AGAINST_SCALE:
                row = next((row for row in _shown(one["rows"], full) if _figure(row) == figure), None)
                if row is not None:
                    panels.setdefault((figure, scale), {}).setdefault(name, {})[place] = row
    panels = {key: lines for key, lines in panels.items() if any(len(line) > 1 for line in lines.values())}
    if not panels:
        return False
    figure, axes = _figure_of(len(panels), 4.4, 3.6)
    for one, ((measure, scale), lines) in zip(axes, panels.items(), strict=True):
        for number, (name, line) in enumerate(lines.items()):
            places = sorted(line)
            values, whiskers = _values([line[place] for place in places])
            marked = {"color": COLOURS[number % len(COLOURS)], "label": name, "capsize": 3, "marker": "o"}
            one.errorbar(places, values, yerr=whiskers, **marked)
        one.set_xlabel(SCALES[scale])
        one.set_ylabel(FIGURES[measure])
        one.set_ylim(0.0, 1.02)
        one.set_xticks(sorted({place for line in lines.values() for place in line}))
        one.grid(alpha=0.3)
        one.legend(frameon=False)
    figure.savefig(path)
    return True


def plot_retention(results: dict[str, Any], path: Path, full: bool = True) -> bool:
    """Write a PNG: each figure of recognition of the model beside its teacher's, with 95% intervals.

    Args:
        full: whether the repository holds the parts beside the encoder.
    """
    pairs = retention(results, full)
    if not pairs:
        return False
    figure, (axes,) = _figure_of(1, 6.6, 1.3 + 0.55 * len(pairs))
    places = range(len(pairs))
    for number, (name, shift) in enumerate(((MODEL, -0.14), (TEACHER, 0.14))):
        values, whiskers = _values([pair[1 + number] for pair in pairs])
        style = {"fmt": "os"[number], "color": COLOURS[number], "label": name, "capsize": 3}
        axes.errorbar(values, [place + shift for place in places], xerr=whiskers, **style)
    axes.set_yticks(places, [title for title, _, _ in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("share of pictures, with its 95% interval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path)
    return True


def retention(results: dict[str, Any], full: bool = True) -> list[tuple[str, Row, Row]]:
    """(title, the model's row, the teacher's row) of each figure that both have. What the model gives through its
    vision decoder, which a teacher has not, stands beside what the teacher gives by itself."""
    models = {model["name"]: model["rows"] for model in (results.get("image") or {}).get("models", [])}
    teacher = {row[0]: row for row in models.get(TEACHER, [])}
    pairs = []
    for row in _shown(models.get(MODEL, []), full):
        figure, _, detail = row[0].partition(", ")
        if figure not in FIGURES:
            continue
        other = teacher.get(row[0])
        if other is None and detail in (DECODER, ""):
            other = next((each for each in teacher.values() if _figure(each) == figure), None)
        if other is not None:
            pairs.append((FIGURES[figure] + (f"\n{detail}" if detail else ""), row, other))
    return pairs


def _binned(results: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for reader in (results.get("text") or {}).get("readers", []):
        yield reader["reader"], reader.get("bins") or []
    for model in (results.get("image") or {}).get("models", []):
        yield model["name"], model.get("bins") or []


def _shown(rows: Sequence[Row], full: bool) -> list[Row]:
    return [row for row in rows if full or DECODER not in row[0]]


def _figure(row: Row) -> str:
    return row[0].partition(", ")[0]


def _values(rows: Sequence[Row]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far the intervals reach below and above them."""
    below = [max(0.0, row[1] - row[2]) for row in rows]
    above = [max(0.0, row[3] - row[1]) for row in rows]
    return [row[1] for row in rows], [below, above]


def _figure_of(panels: int, width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panels * width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])
