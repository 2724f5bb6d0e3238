"""Plots of an evaluation, one PNG a suite: figures against x-height or resolution as lines with their intervals, all
else as bars.

A plot names in its metadata what it was drawn from; one that shows these figures already is not drawn again, so that
matplotlib is imported only where there is something to draw.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.report import (
    AXES,
    COLOURS,
    SUITE_TITLES,
    axis_of,
    figures_of,
    place_text,
    places_of,
    sensible,
    shared_texts,
    title,
    variant_text,
    variants_of,
)

# What tables hold and plots leave out: it says again what a neighbour says, or says little in a bar.
NOT_DRAWN = frozenset(
    ("word_precision", "word_recall", "wer", "exact", "exact_lines", "ordered_word_f1", "seconds_per_item")
    + ("heading_f1", "list_f1", "code_f1", "formula_f1", "teds_structure", "repetition_stopped", "reader_truncated")
    + ("unread", "truncated", "invented_characters", "zero_shot_top5", "gain_zero_shot_top5", "knn_weighted_accuracy")
    + ("knn_accuracy_photographs", "retrieval_recall1", "retrieval_recall5", "image_to_text_recall5")
    + ("text_to_image_recall1", "text_to_image_recall5", "segmentation_pixel_accuracy", "cka_debiased")
    + ("activation_mean", "activation_p999", "activation_largest", "activation_channels", "patch_norm", "class_norm")
    + ("outlier_tokens", "pages_per_second", "architecture_equal", "disk_size", "parameters_ratio")
    + ("forward_flops_ratio",)
)
STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vP"
PANELS = 18  # a plot has no more
LINES = 4  # that are told apart in one panel
FEWEST_PLACES = 3  # that make a line; fewer are bars
FEWEST_BARS = 5  # for which a panel has room
COLUMNS = 3
PANEL = (4.3, 3.1)  # inches
DPI = 130
STAMP = "unit-figures"  # the metadata's key

Record = Mapping[str, Any]


def plot_suite(results: Record, suite: str, path: Path) -> bool:
    """Write the plot of a suite; whether there was something to draw."""
    rows = [row for row in figures_of(results, suite) if row["name"] not in NOT_DRAWN]
    subjects = [each["name"] for each in results["subjects"]]
    return draw(rows, subjects, path, SUITE_TITLES.get(suite, suite))


def draw(rows: Sequence[Record], subjects: Sequence[str], path: Path, heading: str = "") -> bool:
    """Write a PNG of figures, a panel for each along an axis, a panel for all of one name that stand alone.

    Args:
        rows: of "figures" in results.json.
        subjects: their order, which decides their colours.

    Returns:
        Whether there was something to draw.
    """
    panels = panels_of(rows)[:PANELS]
    if not panels:
        return False
    stamp = _stamp(panels, subjects, heading)
    if _stamped(path) == stamp:
        return True
    _draw(panels, list(subjects), path, heading, stamp)
    return True


def panels_of(rows: Sequence[Record]) -> list[tuple[str | None, list[Record]]]:
    """(axis, figures) of every panel. Figures along an axis have a panel for each evaluator and, where there would be
    too many lines in it, each variant; those that stand alone, and those of two places, are bars: of text in one panel
    with those of the same name of other sets, else each evaluator's in its own."""
    along: list[tuple[str | None, list[Record]]] = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [row for row in rows if row["name"] == name]
        alone: dict[tuple[str, str], list[Record]] = {}
        for evaluator in dict.fromkeys(row["evaluator"] for row in named):
            own = [row for row in named if row["evaluator"] == evaluator]
            axis = axis_of(own)
            if axis is None or len(places_of(own, axis)) < FEWEST_PLACES:
                whole = [row for row in own if axis is not None and axis not in row.get("at", {})]
                key = (own[0].get("unit", "share"), "" if own[0]["suite"] == "text" else evaluator)
                alone.setdefault(key, []).extend(whole or own)
                continue
            own = [row for row in own if axis in row["at"]]
            apart, _ = variants_of(own, axis)
            lines = _lines_of(own, axis, apart)
            own = [row for line in lines.values() if len(line) > 1 for row in line]  # a dot is for the table
            kept = list(dict.fromkeys(variant_text(row, apart) for row in own))
            if sum(len(line) > 1 for line in lines.values()) <= LINES or len({row["subject"] for row in own}) == 1:
                along.append((axis, own))
                continue
            for variant in kept:
                along.append((axis, [row for row in own if variant_text(row, apart) == variant]))
        along += [(None, found) for found in alone.values()]
    panels = [(axis, found) for axis, found in along if any(row["value"] for row in found)]  # zeros alone are no plot
    compared = [(axis, found) for axis, found in panels if len(found) > 1]
    return compared or panels  # a bar beside which there is none says no more than its number


def _lines_of(rows: Sequence[Record], axis: str, apart: Sequence[str]) -> dict[tuple[str, str], list[Record]]:
    lines: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        lines.setdefault((row["subject"], variant_text(row, apart)), []).append(row)
    return lines


def _draw(
    panels: Sequence[tuple[str | None, list[Record]]], subjects: list[str], path: Path, heading: str, stamp: str
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    heights = []
    for line in range(lines):
        bars = [_bars_in(rows) for axis, rows in panels[line * columns : (line + 1) * columns] if axis is None]
        heights.append(max([PANEL[1], *(0.9 + 0.22 * count for count in bars)]))
    figure = Figure(figsize=(max(6.0, columns * PANEL[0]), sum(heights) + 0.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, height_ratios=heights)
    places = [axes for row in grid for axes in row]
    present = {row["subject"] for _, rows in panels for row in rows}
    known = [subject for subject in subjects if subject in present]
    colours = {subject: COLOURS[number % len(COLOURS)] for number, subject in enumerate(known)}
    markers = {subject: MARKERS[number // len(COLOURS) % len(MARKERS)] for number, subject in enumerate(known)}
    for axes, (axis, rows) in zip(places, panels, strict=False):
        if axis is None:
            _bars(axes, rows, known, colours)
        else:
            _lines(axes, axis, rows, known, colours, markers)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], color=colours[name], marker=markers[name], linewidth=2.5, label=_short(name, 40))
        for name in known
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(known), 2 * columns), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={STAMP: stamp, "Title": heading})


def _lines(axes, axis: str, rows: list[Record], known: list[str], colours: dict, markers: dict) -> None:
    """One line a subject and variant, its interval as a band."""
    from matplotlib.lines import Line2D

    apart, shared = variants_of(rows, axis)
    factor, unit = _scale(rows)
    variants = list(dict.fromkeys(variant_text(row, apart) for row in rows))
    shade = 0.15 if len(_lines_of(rows, axis, apart)) < FEWEST_PLACES else 0.07  # more bands lie over one another
    for subject in known:
        for variant in variants:
            line = [row for row in rows if row["subject"] == subject and variant_text(row, apart) == variant]
            line.sort(key=lambda row: row["at"][axis])
            if not line:
                continue
            x = [row["at"][axis] for row in line]
            y = [row["value"] * factor for row in line]
            style = STYLES[variants.index(variant) % len(STYLES)]
            axes.plot(x, y, style, color=colours[subject], marker=markers[subject], markersize=4, linewidth=1.6)
            if all(row.get("low") is not None and row.get("high") is not None for row in line):
                low, high = ([row[end] * factor for row in line] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=colours[subject], alpha=shade, linewidth=0)
    ticks = sorted(places_of(rows, axis))
    if len(ticks) > 2 and ticks[0] > 0 and ticks[-1] / ticks[0] > 4:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [place_text(rows, axis, tick).replace(" (", "\n(") for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(AXES.get(axis, axis.replace("_", " ")))
    axes.set_title(_panel_title(rows, shared, unit), fontsize=10)
    _limits(axes.set_ylim, rows, factor)
    axes.grid(alpha=0.3)
    if len(variants) > 1:
        handles = [
            Line2D([], [], color="0.3", linestyle=STYLES[number % len(STYLES)], label=_short(variant or "own", 30))
            for number, variant in enumerate(variants)
        ]
        axes.legend(handles=handles, fontsize=7, framealpha=0.8, handlelength=3, loc="best")


def _bars(axes, rows: list[Record], known: list[str], colours: dict) -> None:
    """Bars that lie, so that what they are called has room: a group for each evaluator and variant."""
    apart, shared = variants_of(rows, None)
    several = len({row["evaluator"] for row in rows}) > 1
    factor, unit = _scale(rows)
    groups: dict[str, list[Record]] = {}
    for row in rows:
        called = ", ".join(text for text in (row["evaluator"] if several else "", variant_text(row, apart)) if text)
        groups.setdefault(called, []).append(row)
    place, ticks = 0.0, []
    for called, found in groups.items():
        found = sorted(found, key=lambda row: known.index(row["subject"]))
        start = place
        for row in found:
            value = row["value"] * factor
            whisker = None
            if row.get("low") is not None and row.get("high") is not None:
                low, high = row["low"] * factor, row["high"] * factor
                whisker = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.barh(place, value, 0.85, xerr=whisker, color=colours[row["subject"]], capsize=2, ecolor="0.25")
            place += 1.0
        ticks.append(((start + place - 1.0) / 2, called))
        place += 0.6
    named = any(called for _, called in ticks)
    axes.set_yticks(
        [at for at, _ in ticks] if named else [],
        [_wrapped(called or "all sets") for _, called in ticks] if named else [],
    )
    axes.tick_params(axis="y", labelsize=8)
    room = max(0.0, FEWEST_BARS - place) / 2  # a single bar is no wall
    axes.set_ylim(place - 1.1 + room, -0.7 - room)
    axes.set_title(_panel_title(rows, shared, unit, several), fontsize=10)
    _limits(axes.set_xlim, rows, factor)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _bars_in(rows: Sequence[Record]) -> float:
    groups = {(row["evaluator"], json.dumps(row.get("at", {}), sort_keys=True)) for row in rows}
    return len(rows) + 0.6 * len(groups)


def _scale(rows: Sequence[Record]) -> tuple[float, str]:
    """One factor and unit for a panel, fit for its largest value."""
    largest = max(rows, key=lambda row: abs(row["value"]))
    return sensible(largest["value"], largest.get("unit", "share"))


def _panel_title(rows: Sequence[Record], shared: Mapping[str, Any], unit: str, several: bool = False) -> str:
    first = rows[0]
    told = ", ".join(shared_texts(rows, shared))
    head = title(first["name"]) + (f", {unit}" if unit else "") + (" (lower is better)" * (first["better"] == "lower"))
    below = ", ".join(text for text in ("" if several else first["evaluator"], told) if text)
    return f"{_short(head, 48)}\n{_short(below, 46)}" if below else _short(head, 48)


def _limits(limit, rows: Sequence[Record], factor: float) -> None:
    """From zero; shares up to one, unless all of them are small."""
    top = max(max(row["value"], row.get("high") or row["value"]) for row in rows) * factor
    bottom = (
        min(min(row["value"], row["low"] if row.get("low") is not None else row["value"]) for row in rows) * factor
    )
    share = all(row.get("unit", "share") == "share" for row in rows)
    if share and 0.5 < top <= 1.0:
        top = 1.0
    limit(min(0.0, bottom * 1.05), top * 1.05 if top > 0 else 1.0)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 22)[:3])


def _stamp(panels: Sequence[tuple[str | None, list[Record]]], subjects: Sequence[str], heading: str) -> str:
    drawn = ("name", "value", "low", "high", "unit", "at", "better", "evaluator", "subject")
    told = [[axis, [{key: row.get(key) for key in drawn} for row in rows]] for axis, rows in panels]
    here = Path(__file__)
    code = here.read_bytes() + here.with_name("report.py").read_bytes()
    text = json.dumps([told, list(subjects), heading, hashlib.sha256(code).hexdigest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamped(path: Path) -> str | None:
    """What a plot says that it was drawn from; None where there is none."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.info.get(STAMP)
    except (OSError, ValueError, SyntaxError):
        return None
