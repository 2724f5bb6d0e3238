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

LEAST = 3  # seeds that an interval needs: of two, t is 12.7 [ours]
TABLE, PLOT = "table.md", "plot.png"


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
        return f"{self.name.replace('_', ' ')}, {self.place}"

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
    """Markdown: what the variants are, what is clear, a table for each figure, what failed."""
    columns = columns_of(results, grid.figures)
    base = grid.base.name
    there = [variant for variant in grid.variants if any(variant.name in column.values for column in columns)]
    others = [variant.name for variant in there if variant.name != base]
    lines = ["| variant | what |", "|---|---|"]
    lines += [f"| {variant.name} | {variant.about} |" for variant in there or grid.variants]
    if not columns:
        lines += ["", "Nothing has been measured yet."]
    else:
        lines += ["", "Means over seeds ± half of the 95% t-interval; beside each the difference to "]
        lines[-1] += f"{base}, taken seed by seed, bold where its interval leaves out zero."
        lines += _clear(columns, others, base)
    for name in dict.fromkeys(column.name for column in columns):
        places = [column for column in columns if column.name == name]
        better = f"{places[0].better} is better" if places[0].better else ""
        told = ", ".join(each for each in (places[0].unit, better) if each)
        lines += ["", f"### {name.replace('_', ' ').capitalize()} ({told})", ""]
        lines += [f"| variant | {' | '.join(f'{column.place} | difference' for column in places)} |"]
        lines += ["|---|" + "---:|---:|" * len(places)]
        for variant in there:
            cells = []
            for column in places:
                cells.append(_cell(column.mean(variant.name)))
                change = None if variant.name == base else column.difference(variant.name, base)
                cells.append("" if variant.name == base else _cell(change, signed=True))
            lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    fewest = min((len(values) for column in columns for values in column.values.values()), default=LEAST)
    if fewest < LEAST:
        told = f"{fewest} seed{'s' if fewest > 1 else ''}"
        lines += ["", f"Some variants have {told} only, in brackets: an interval needs {LEAST}."]
    failed = [run for run in results.get("runs", []) if run.get("failed")]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {run['variant']}, seed {run['seed']}: {run['failed']}" for run in failed]
    return "\n".join(lines) + "\n"


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
    chance = max(1, round(0.05 * count))
    return [*lines, "", f"Of {count} differences about {chance} would leave out zero by chance alone."]


def _cell(given: Estimate | None, signed: bool = False) -> str:
    if given is None:
        return "–"
    told = f"{given.mean:+.3f}" if signed else f"{given.mean:.3f}"
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
    """A panel for each figure: the difference of each variant to the base, with its interval, and single seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

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
        for place, name in enumerate(names):
            found = column.difference(name, base)
            if found is None:
                continue
            better = found.mean > 0 if column.better == "higher" else found.mean < 0
            colour = "#777777" if not found.clear else "#2a7f3f" if better else "#b3362b"
            axis.errorbar(found.mean, place, xerr=found.half or 0.0, fmt="o", color=colour, markersize=4.5, capsize=2)
            both = set(column.values[name]) & set(column.values[base])
            singles = [column.values[name][seed] - column.values[base][seed] for seed in both]
            axis.plot(singles, [place] * len(singles), "|", color="#999999", markersize=6, zorder=0)
        axis.axvline(0.0, color="#222222", linewidth=0.8)
        axis.set_title(f"{column.title}\n{base} {column.mean(base).mean:.3f}, {column.better} is better", fontsize=7.5)
        axis.set_yticks(range(len(names)), names, fontsize=7.5)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes[0, 0].invert_yaxis()
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_visible(False)
    sheet.suptitle(f"Difference to {base}, seed by seed, with 95% intervals over seeds", fontsize=9)
    sheet.savefig(path)
