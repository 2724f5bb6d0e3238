"""What an ablation shows: means over seeds, differences to the base seed by seed, both with 95% intervals.

An interval is Student's t over the seeds: of n values it is mean ± t(0.975, n - 1) s / sqrt(n). Variants and base
share seeds, and with them the order of the data and the start, so that a difference is taken seed by seed: what a seed
does to both falls out. Under three seeds there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.evaluation.contract import Figure
from training.evaluation.report import COLOURS, title

LEAST = 3  # seeds that an interval needs: of two, t is 12.7 [ours]
TABLE, PLOT = "table.md", "plot.png"
OFF = (
    4.0  # times as far as the others: such a variant is told at the edge of a panel, for it would flatten them [ours]
)
MOST_OFF = 3  # variants of a panel


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """Two-sided quantile of Student's t: `P(|T| <= t) = level`.

    Args:
        degrees: of freedom, 1 or more.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be 1 or more, got {degrees}")
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < level else (low, middle)
    return high


def _t_within(t: float, degrees: int) -> float:
    """`P(|T| <= t)`: the finite series for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd and degrees > 1 else 0.0 if odd else 1.0
    for each in range(2 if odd else 1, degrees - 2, 2):
        term *= each / (each + 1) * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `half` of its interval, None where there are too few."""

    mean: float
    half: float | None
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t-interval of one value a seed."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < LEAST:
        return Estimate(mean, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, t_quantile(count - 1) * deviation / math.sqrt(count), count)


@dataclass
class Column:
    """One figure at one place, of all variants.

    Attributes:
        values: by variant and seed.
    """

    name: str
    at: dict[str, Any]
    unit: str
    better: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def place(self) -> str:
        told = [f"{value} px" if key == "resolution" else str(value) for key, value in self.at.items()]
        return ", ".join(told) or "all"

    @property
    def title(self) -> str:
        return f"{title(self.name)}, {self.place}"

    def mean(self, variant: str) -> Estimate | None:
        values = self.values.get(variant)
        return estimate([values[seed] for seed in sorted(values)]) if values else None

    def difference(self, variant: str, base: str) -> Estimate | None:
        """Of the seeds that both have."""
        one, other = self.values.get(variant, {}), self.values.get(base, {})
        both = sorted(set(one) & set(other))
        return estimate([one[seed] - other[seed] for seed in both]) if both else None


def columns_of(results: dict[str, Any], figures: Iterable[str] | None = None) -> list[Column]:
    """Figures of all runs, put together: in the order of `figures` and of the first run that has them."""
    found: dict[tuple, Column] = {}
    for run in results.get("runs", []):
        for given in run.get("figures", []):
            figure = Figure.from_dict(given)
            key = (figure.name, *sorted((name, str(value)) for name, value in figure.at.items()))
            column = found.setdefault(key, Column(figure.name, dict(figure.at), figure.unit, figure.better))
            column.values.setdefault(run["variant"], {})[run["seed"]] = figure.value
    order = list(figures) if figures is not None else list(dict.fromkeys(column.name for column in found.values()))
    kept = [column for column in found.values() if column.name in order]
    return sorted(kept, key=lambda column: order.index(column.name))


def table(grid: Any, results: dict[str, Any]) -> str:
    """Markdown: how much there is, what the variants are, what is clear, a table for each figure, what failed."""
    columns = columns_of(results, grid.figures)
    base = grid.base.name
    runs = results.get("runs", [])
    measured = sum(bool(run.get("figures")) for run in runs)
    there = [variant for variant in grid.variants if any(variant.name in column.values for column in columns)]
    others = [variant.name for variant in there if variant.name != base]
    lines = [f"{measured} of {len(grid.variants) * len(grid.seeds)} runs: {len(grid.variants)} variants"]
    lines[0] += (
        f" with {len(grid.seeds)} seeds each. How to read this, and what it cannot show: docs/ablations/README.md."
    )
    lines += ["", "| variant | what |", "|---|---|"]
    lines += [f"| {variant.name} | {variant.about} |" for variant in there or grid.variants]
    if not columns:
        lines += ["", "Nothing has been measured yet."]
    else:
        lines += ["", "Means over seeds ± half of the 95% t-interval; beside each the difference to "]
        lines[-1] += f"{base}, taken over the seeds that both have, bold where its interval leaves out zero."
        lines += _clear(columns, others, base)
    for name in dict.fromkeys(column.name for column in columns):
        places = [column for column in columns if column.name == name]
        better = f"{places[0].better} is better" if places[0].better else ""
        called = title(name) if title(name)[1:2] == "-" else title(name)[:1].upper() + title(name)[1:]
        told = ", ".join(each for each in (places[0].unit, better) if each)
        lines += ["", f"### {called} ({told})", ""]
        lines += [f"| variant | {' | '.join(f'{column.place} | difference' for column in places)} |"]
        lines += ["|---|" + "---:|---:|" * len(places)]
        for variant in there:
            cells = []
            for column in places:
                cells.append(_cell(column.mean(variant.name)))
                change = None if variant.name == base else column.difference(variant.name, base)
                cells.append("" if variant.name == base else _cell(change, signed=True))
            lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    few = [variant.name for variant in there if min(map(len, _seeds(columns, variant.name))) < LEAST]
    if few:
        which = "All variants" if len(few) == len(there) else f"{len(few)} of {len(there)} variants"
        lines += [
            "",
            f"{which} have fewer than {LEAST} seeds so far: how many is in brackets, and there is no interval;",
        ]
        lines[-1] += " such a difference may be chance."
    failed = [run for run in results.get("runs", []) if run.get("failed")]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {run['variant']}, seed {run['seed']}: {run['failed']}" for run in failed]
    return "\n".join(lines) + "\n"


def _seeds(columns: list[Column], variant: str) -> list[dict[int, float]]:
    return [column.values[variant] for column in columns if variant in column.values]


def _clear(columns: list[Column], variants: list[str], base: str) -> list[str]:
    """Lines on the differences whose interval leaves out zero, variant by variant, and how many chance would give."""
    lines, count = ["", "Differences that the intervals bear out:", ""], 0
    for variant in variants:
        found = [(column, column.difference(variant, base)) for column in columns]
        found = [(column, each) for column, each in found if each is not None and each.half is not None]
        count += len(found)
        told = [f"{column.title} {each.mean:+.3f}" for column, each in found if each.clear]
        if found:
            lines.append(f"- {variant}: {'; '.join(told) if told else 'none'}")
    if not count:
        return []
    chance = 0.05 * count
    told = f"about {round(chance)}" if chance >= 1 else "fewer than one"
    return [*lines, "", f"Of {count} difference{'s' * (count != 1)} {told} would leave out zero by chance alone."]


def _cell(given: Estimate | None, signed: bool = False) -> str:
    if given is None:
        return "–"
    told = f"{given.mean:+.3f}" if signed else f"{given.mean:.3f}"
    told = "0.000" if told in ("+0.000", "-0.000") else told
    if given.half is not None:
        told += f" ± {given.half:.3f}"
    if given.seeds < LEAST:
        told += f" ({given.seeds})"
    return f"**{told}**" if signed and given.clear else told


def write_table(grid: Any, results: dict[str, Any], out: Path) -> None:
    """`table.md`, and `plot.png` once there is something to compare."""
    (out / TABLE).write_text(table(grid, results), encoding="utf-8")
    draw(grid, results, out / PLOT)


def draw(grid: Any, results: dict[str, Any], path: Path) -> None:
    """A panel for each figure: the difference of each variant to the base, with its interval, and single seeds. Hollow
    where there are too few seeds for an interval; a variant far off all others is an arrow with its number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet
    from matplotlib.ticker import MaxNLocator

    base = grid.base.name
    columns = [column for column in columns_of(results, grid.figures) if base in column.values]
    names = [v.name for v in grid.variants if v.name != base and any(v.name in each.values for each in columns)]
    if not columns or not names:
        return
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    sheet = Sheet(figsize=(2.2 + 2.7 * across, down * (1.0 + 0.2 * len(names))), dpi=110, layout="constrained")
    FigureCanvasAgg(sheet)
    axes = sheet.subplots(down, across, squeeze=False, sharey=True)
    for axis, column in zip(axes.flat, columns, strict=False):
        found = {name: column.difference(name, base) for name in names}
        drawn = {name: each for name, each in found.items() if each is not None}
        singles = {
            name: [value - column.values[base][seed] for seed, value in column.values[name].items() if seed in shared]
            for name in drawn
            for shared in [set(column.values[name]) & set(column.values[base])]
        }
        edge = _edge({name: _reach(drawn[name], singles[name]) for name in drawn})
        for name, each in drawn.items():
            place = names.index(name)
            better = each.mean > 0 if column.better == "higher" else each.mean < 0
            colour = "#777777" if not each.clear else COLOURS[0] if better else COLOURS[5]
            if _reach(each, singles[name]) > edge:
                right = each.mean > 0
                axis.plot(edge if right else -edge, place, ">" if right else "<", color=colour, markersize=5)
                at = 0.93 * edge if right else -0.93 * edge
                told = f"{each.mean:+.2f}" + (f" ± {each.half:.2f}" if each.half is not None else "")
                side = "right" if right else "left"
                axis.text(at, place, told, ha=side, va="center", fontsize=6.5, color=colour)
                continue
            face = "white" if each.half is None else colour
            axis.errorbar(
                each.mean, place, xerr=each.half, fmt="o", color=colour, mfc=face, markersize=4.5, capsize=2, zorder=3
            )
            axis.plot(singles[name], [place] * len(singles[name]), "|", color="#999999", markersize=6, zorder=2)
        axis.set_xlim(-1.08 * edge, 1.08 * edge)
        axis.axvline(0.0, color="#222222", linewidth=0.8, zorder=1)
        axis.set_title(f"{column.title}\n{base} {column.mean(base).mean:.3f}, {column.better} is better", fontsize=7.5)
        axis.set_yticks(range(len(names)), names, fontsize=7.5)
        axis.tick_params(axis="x", labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes[0, 0].invert_yaxis()
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_visible(False)
    sheet.suptitle(
        f"Difference to {base}, seed by seed, with 95% intervals over seeds: blue better, red worse, grey not clear, "
        f"hollow under {LEAST} seeds",
        fontsize=9,
    )
    sheet.savefig(path)


def _reach(given: Estimate, singles: Sequence[float]) -> float:
    """How far from zero a variant is drawn: its interval and its seeds."""
    return max(abs(given.mean) + (given.half or 0.0), *map(abs, singles))


def _edge(reaches: dict[str, float]) -> float:
    """Where a panel ends: at the farthest variant, but for a few that are far off all others."""
    ordered = sorted(reaches.values(), reverse=True)
    for off in range(1, min(MOST_OFF, len(ordered) - 1) + 1):
        if ordered[off] > 0 and ordered[off - 1] > OFF * ordered[off]:
            return ordered[off]
    return ordered[0] if ordered and ordered[0] > 0 else 1.0
