"""The curves of runs, from their `log.jsonl`: at the end of a run, and at any time by `unit curve`.

Terms that belong together share a panel: a colour for each kind and scale, what was logged faint with a smoothed line
over it, what was held out dashed with points. Several runs are drawn with a panel for each term and a colour for each
run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import write_log_lines
from .evaluation.report import COLOURS
from .publish import code_version
from .reporting import SPEED_LOG, read_speed
from .sample_sheet import group_title

LOG = "log.jsonl"
GROUPS = ("document_x4", "natural_x1", "document_x1", "natural_x4")  # in the order of the colours
SMOOTHED = 24  # points from which on a curve is smoothed
WINDOW = 1 / 50  # of a curve's length: the standard deviation of the smoothing
ENDS = (1.0, 99.0)  # percentiles of what was logged that are inside of a panel, at least
COLUMNS, PANEL, DPI = 3, (4.5, 2.9), 110  # panels beside each other, inches of one, pixels an inch

DECADES = 1e-4  # of its largest value, below which a logarithmic panel ends: a rate falls to nothing in a step

# In their order: title, y axis, logarithmic.
PANELS = {
    "loss": ("Loss, all terms", "weighted sum", False),
    "language_loss": ("Language loss", "nats per token", False),
    "vision_loss": ("Vision loss", "cosine + μ·L1", False),
    "vision_parts": ("Vision loss, its parts", "distance", False),
    "reading": ("Reading held-out documents", "share", False),
    "auxiliary": ("Auxiliary losses", "nats", False),
    "accuracy": ("Accuracy of the auxiliary tasks", "share", False),
    "terms": ("Terms of the loss", "loss", False),
    "learning_rate": ("Learning rate", "rate", True),
    "grad_norm": ("Norm of the gradients", "norm", True),
    "speed": ("Speed", "images per second", False),
}
SHORTER = {"reading": "Held out", "auxiliary": "Loss", "accuracy": "Accuracy", "terms": "Loss"}
PARTS = {"vision_cosine": "cosine", "vision_l1": "L1"}
FIGURES = {"word_f1": "word F1", "cer": "CER", "exact": "exact"}
NOT_DRAWN = {"epoch", "step", "skipped_steps", "refused", "total_flos", "num_input_tokens_seen"}


@dataclasses.dataclass
class Series:
    """A term of one run.

    Attributes:
        panel: key of `PANELS`, or a term that has no place there. label: within its panel. group: of a kind and
            scale, or empty. steps, values: as logged. held_out: by an evaluation.
    """

    panel: str
    label: str
    group: str
    held_out: bool
    steps: list[int] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)

    @property
    def title(self) -> str:
        """Of a panel that shows nothing else."""
        start = PANELS[self.panel][0] if self.panel in PANELS else self.panel.replace("_", " ")
        start = SHORTER.get(self.panel, start)
        return start if self.label in ("", "training", "first part") else f"{start}: {self.label}"


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The entries of a run that is over or still goes on, given as its folder or as the file.

    Raises:
        ValueError: there is no log yet, or nothing in it that can be drawn.
    """
    path = Path(run)
    path = path / LOG if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{run}: no {LOG} there; a run writes it from its first logging step on.")
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that is being written
        if isinstance(entry, dict):
            entries.append(entry)
    if not series_of(entries):
        raise ValueError(f"{path}: nothing in it that can be drawn.")
    return entries + read_speed(path.with_name(SPEED_LOG))


def series_of(history: Sequence[Mapping[str, Any]]) -> list[Series]:
    """All that can be drawn of a log, in the order of the panels and colours."""
    found: dict[tuple[str, str, bool], Series] = {}
    for entry in history:
        if "train_runtime" in entry:
            continue
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            place = _place(name)
            if place is None or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            held_out = key != name
            one = found.setdefault((*place[:2], held_out), Series(*place, held_out))
            one.steps.append(int(entry.get("step", 0)))
            one.values.append(float(value))
    order = {panel: place for place, panel in enumerate(PANELS)}
    groups = {group: place for place, group in enumerate(("", *GROUPS))}
    return sorted(
        found.values(),
        key=lambda one: (order.get(one.panel, len(order)), groups.get(one.group, len(groups)), one.held_out),
    )


def _place(name: str) -> tuple[str, str, str] | None:
    """Panel, label and group of a term; `None` for what is not drawn."""
    group, _, term = name.rpartition("/")
    if group.endswith("/language_loss"):  # of a task
        group = group.removesuffix("/language_loss")
        return "language_loss", f"{group_title(group)}, {term}", group
    title = group_title(group)
    if name in NOT_DRAWN or group == "data":
        return None
    if group == "speed":
        return ("speed", "", "") if term == "images_per_second" else None
    if group == "learning_rate":
        return "learning_rate", term.replace("_muon", ", Muon").replace("_", " "), ""
    if name == "learning_rate":
        return "learning_rate", "first part", ""
    if name in ("loss", "grad_norm"):
        return name, "training" if name == "loss" else "", ""
    if term in FIGURES:
        return "reading", ", ".join(each for each in (FIGURES[term], title) if each), group
    if term in ("language_loss", "vision_loss"):
        return term, title, group
    if term in PARTS:
        return "vision_parts", f"{title}, {PARTS[term]}", group
    for ending, panel in (("_loss", "auxiliary"), ("_accuracy", "accuracy")):
        if group and term.endswith(ending):
            return panel, f"{title}, {term.removesuffix(ending)}", group
    if not group:
        return "terms", term.replace("_", " "), ""
    return term, title, group


def smoothed(values: Sequence[float]) -> np.ndarray:
    """A Gaussian mean over the points around each, `WINDOW` of all wide; of short curves the values as they are."""
    given = np.asarray(values, dtype=np.float64)
    if len(given) < SMOOTHED:
        return given
    width = max(1.0, WINDOW * len(given))
    reach = int(4 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = np.isfinite(given)
    total = np.convolve(np.where(known, given, 0.0), kernel)[reach : reach + len(given)]
    weight = np.convolve(known.astype(float), kernel)[reach : reach + len(given)]
    return np.where(weight > 0, total / np.maximum(weight, 1e-12), np.nan)


def draw_curves(history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw one run as a PNG; without anything to draw, there is no file."""
    series = _without_doubles(series_of(history))
    if not series:
        return
    panels: dict[str, list[Series]] = {}
    for one in series:
        panels.setdefault(one.panel, []).append(one)
    figure, axes = _figure(len(panels))
    last = max(max(one.steps) for one in series)
    for axis, (name, members) in zip(axes, panels.items(), strict=False):
        known = PANELS.get(name, (name.replace("_", " "), "", False))
        labels = list(dict.fromkeys(one.label for one in members))
        colours = _colours(members, labels)
        for one in members:
            several = len(labels) > 1 or any(each.held_out for each in members)
            _draw(axis, one, colours[one.label], _legend(one, members) if several else None)
        _dress(axis, *known, members)
        axis.set_xlim(-0.04 * last, 1.04 * last)
    _finish(figure, axes, len(panels), path, title, any(one.held_out for one in series))


def compare_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str = "") -> None:
    """Draw several runs, name -> log, as a PNG: a panel for each term, a colour for each run."""
    panels: dict[str, list[tuple[int, Series]]] = {}
    for number, history in enumerate(runs.values()):
        for one in _without_doubles(series_of(history)):
            if one.panel in ("vision_parts", "learning_rate") and one.label != "first part":
                continue  # there would be too many
            panels.setdefault(f"{one.panel}/{one.label}", []).append((number, one))
    order = {panel: place for place, panel in enumerate(PANELS)}
    names = sorted(panels, key=lambda name: order.get(name.split("/")[0], len(order)))
    last = max(max(one.steps) for members in panels.values() for _, one in members)
    figure, axes = _figure(len(panels))
    for axis, name in zip(axes, names, strict=False):
        members = panels[name]
        for number, one in members:
            _draw(axis, one, COLOURS[number % len(COLOURS)], None)
        one = members[0][1]
        _, label, logarithmic = PANELS.get(one.panel, ("", "", False))
        _dress(axis, one.title, label, logarithmic, [each for _, each in members])
        axis.set_xlim(-0.04 * last, 1.04 * last)  # so that lengths are seen
    handles = [_line(COLOURS[number % len(COLOURS)]) for number in range(len(runs))]
    held_out = any(one.held_out for members in panels.values() for _, one in members)
    _finish(figure, axes, len(panels), path, title, held_out, (handles, list(runs)))


def _without_doubles(series: list[Series]) -> list[Series]:
    """Leave out what another curve shows: figures of the only group, the first part's rate where parts are named,
    rates that are equal."""
    groups = {one.group for one in series if one.panel == "reading" and one.group}
    rates = {one.label for one in series if one.panel == "learning_rate"}
    kept, alike = [], {}
    for one in series:
        if one.panel == "reading" and one.group and len(groups) == 1:
            continue
        if one.panel == "learning_rate":
            if one.label == "first part" and len(rates) > 1:
                continue
            same = alike.setdefault(tuple(one.values), [])
            same.append(one.label)
            if len(same) > 1:
                continue
        kept.append(one)
    for one in kept:
        others = len(alike.get(tuple(one.values), ())) - 1 if one.panel == "learning_rate" else 0
        if others > 0:
            one.label += f" and {others} more"
    return kept


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, panels)
    if panels == 4:
        columns = 2
    rows = -(-panels // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _colours(members: list[Series], labels: list[str]) -> dict[str, str]:
    """A colour for each label: that of its group where each has one of its own, else in order."""
    groups = {one.label: one.group for one in members}
    if len(set(groups.values())) == len(labels) and all(group in GROUPS for group in groups.values()):
        return {label: COLOURS[GROUPS.index(group)] for label, group in groups.items()}
    return {label: COLOURS[place % len(COLOURS)] for place, label in enumerate(labels)}


def _legend(one: Series, members: list[Series]) -> str | None:
    """One entry a colour; where there is a single one, training and what is held out apart."""
    labels = {each.label for each in members}
    if len(labels) == 1:
        return "held out" if one.held_out else "training"
    trained = any(each.label == one.label and not each.held_out for each in members)
    return None if one.held_out and trained else one.label


def _line(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linewidth=1.8)


def _curve(one: Series) -> np.ndarray:
    """The line of a term: a rate is exact, and what spans decades has a mean of its logarithms."""
    if one.panel == "learning_rate":
        return np.asarray(one.values)
    if PANELS.get(one.panel, ("", "", False))[2]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.exp(smoothed(np.log(one.values)))
    return smoothed(one.values)


def _draw(axis: Any, one: Series, colour: str, label: str | None) -> None:
    if one.held_out:
        dots = {"marker": "o", "markersize": 3.5, "markeredgecolor": "white", "markeredgewidth": 0.5}
        axis.plot(one.steps, one.values, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), label=label, **dots)
        return
    curve = _curve(one)
    if len(one.values) >= SMOOTHED and one.panel != "learning_rate":
        axis.plot(one.steps, one.values, color=colour, linewidth=0.8, alpha=0.3)
    axis.plot(one.steps, curve, color=colour, linewidth=1.6, label=label)
    if len(one.values) == 1:
        axis.plot(one.steps, one.values, "o", color=colour, markersize=4)


def _dress(axis: Any, title: str, label: str, logarithmic: bool, members: list[Series]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = [np.asarray(one.values) for one in members]
    positive = all((value[np.isfinite(value)] > 0).any() for value in values)
    if logarithmic and positive:
        axis.set_yscale("log", nonpositive="mask")
        largest = max(float(value[np.isfinite(value)].max()) for value in values)
        least = min(float(value[np.isfinite(value) & (value > 0)].min()) for value in values)
        axis.set_ylim(max(least / 1.3, DECADES * largest), largest * 1.3)
        if largest / least < 1e3:  # few powers of ten to be named
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif label == "share":
        finite = np.concatenate([value[np.isfinite(value)] for value in values])
        axis.set_ylim(-0.02, max(1.02, min(1.5, 1.05 * float(finite.max(initial=0.0)))))
    else:
        _limit(axis, members)
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_ylabel(label, fontsize=9)
    axis.set_xlabel("step", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = 1 if len(labels) < 3 else 2
        # room of its own above the curves, in the axis' own measure
        room = 0.09 * -(-len(labels) // columns) / (1 - 0.09 * -(-len(labels) // columns))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** room if axis.get_yscale() == "log" else high + room * (high - low))
        axis.legend(handles, labels, fontsize=7.5, ncols=columns, loc="upper right", frameon=False, borderpad=0.1)


def _limit(axis: Any, members: list[Series]) -> None:
    """A panel holds all smoothed and held-out values and nearly all that was logged: one spike does not flatten it."""
    low, high = [], []
    for one in members:
        given = np.asarray(one.values)[np.isfinite(one.values)]
        if not len(given):
            continue
        curve = given if one.held_out else smoothed(given)
        ends = np.percentile(given, ENDS)
        low.append(min(float(curve.min()), ends[0]))
        high.append(max(float(curve.max()), ends[1]))
    if low:
        room = 0.06 * (max(high) - min(low)) or 0.1 * abs(max(high)) or 1.0
        axis.set_ylim(min(low) - room, max(high) + room)


def _finish(
    figure: Any, axes: list[Any], used: int, path: str | Path, title: str, held_out: bool, legend: Any = None
) -> None:
    for axis in axes[used:]:
        axis.axis("off")
    says = "faint: as logged; lines: smoothed" + ("; dashed, with points: held out" if held_out else "")
    figure.suptitle(f"{title}   " if title else "", fontsize=13, x=0.01, ha="left")
    figure.supxlabel(says, fontsize=8, color="#6b7078", x=0.99, ha="right")
    if legend is not None:
        figure.legend(*legend, loc="outside upper right", ncols=min(4, len(legend[1])), frameon=False, fontsize=9)
    figure.savefig(path)


def write_log(out: Path, recipe: Any, history: list[dict[str, Any]], seconds: float) -> None:
    """`recipe.json` (with the version of the code), `log.jsonl` (one line a logging step) and `curve.png` beside the
    weights."""
    content = dataclasses.asdict(recipe) | {"seconds": round(seconds), "code": code_version()}
    (out / "recipe.json").write_text(json.dumps(content, indent=1))
    write_log_lines(out / LOG, history)
    draw_curves(history + read_speed(out / SPEED_LOG), out / "curve.png", out.name)
