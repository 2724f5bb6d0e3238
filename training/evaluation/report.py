"""Tables, a plot and a Markdown page from the results of an evaluation.

`results` is what `results.json` holds:

    {"model", "machine": one line, "seconds",
     "text":  {"blocks": folder, "readers": [TextResult.to_dict(), …], "notes": [line, …]},
     "image": {"pictures": folder, "models": [{"name", "rows": [[name, value, low, high], …]}, …], "notes": [line, …]}}

with "text" and "image" only where that suite was run.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

# Okabe and Ito's palette (2008): told apart by colour-blind readers and in grey
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")


def with_interval(row: Sequence) -> str:
    """`[name, value, low, high]` -> ``0.912 [0.901, 0.923]``."""
    _, value, low, high = row
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, columns padded so that it also reads well in a terminal."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(cells[0]), line(["-" * width for width in widths]), *map(line, cells[1:])])


def versions() -> dict[str, str]:
    """Versions of what decides a figure, Python first."""
    import torch
    import transformers

    return {"Python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def machine(device: str = "cpu") -> str:
    """One line for tables of figures: processor and threads, or accelerator; versions; date."""
    import torch

    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    stated = ", ".join(f"{what} {version}" for what, version in versions().items())
    return f"{name}; {stated}; {date.today().isoformat()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _bin_name(one: dict) -> str:
    low, high = one["x_height"]
    return f"{low:.0f}-{high:.0f} px"


def text_tables(text: dict) -> str:
    """Two tables: every figure of every reader, and word F1 by x-height."""
    readers = text["readers"]
    rows = []
    for reader in readers:
        figures = {row[0]: row for row in reader["rows"]}
        rows.append(
            [
                reader["reader"],
                reader["blocks"],
                reader["failed"],
                with_interval(figures["word_f1"]),
                f"{figures['word_precision'][1]:.3f}",
                f"{figures['word_recall'][1]:.3f}",
                with_interval(figures["cer"]),
                f"{figures['wer'][1]:.3f}",
                f"{figures['exact'][1]:.3f}",
                f"{reader['seconds'] / max(1, reader['blocks']):.3f}",
            ]
        )
    header = ["reader", "blocks", "failed", "word F1", "precision", "recall", "CER", "WER", "exact", "s/block"]
    parts = [markdown_table(header, rows)]

    names = list(dict.fromkeys(_bin_name(one) for reader in readers for one in reader["bins"]))
    if names:
        rows = []
        for reader in readers:
            f1 = {_bin_name(one): {row[0]: row for row in one["rows"]}["word_f1"] for one in reader["bins"]}
            rows.append([reader["reader"], *(with_interval(f1[name]) if name in f1 else "-" for name in names)])
        counts = {_bin_name(one): one["blocks"] for one in readers[0]["bins"]}
        headings = [f"{name} ({counts[name]} blocks)" if name in counts else name for name in names]
        parts.append("Word F1 by x-height:\n\n" + markdown_table(["reader", *headings], rows))
    return "\n\n".join(parts)


def image_table(image: dict) -> str:
    """One row a figure, one column a model."""
    models = image["models"]
    names = list(dict.fromkeys(row[0] for model in models for row in model["rows"]))
    found = [{row[0]: row for row in model["rows"]} for model in models]
    rows = [[name, *(with_interval(one[name]) if name in one else "-" for one in found)] for name in names]
    return markdown_table(["figure", *(model["name"] for model in models)], rows)


def tables(results: dict) -> str:
    """All tables of ``results`` with a heading each, as Markdown that reads well in a terminal."""
    parts = []
    if "text" in results:
        parts += ["## Reading held-out blocks", text_tables(results["text"])]
        parts += [f"Note: {note}" for note in results["text"]["notes"]]
    if "image" in results:
        parts += ["## Recognising held-out pictures", image_table(results["image"])]
        parts += [f"Note: {note}" for note in results["image"]["notes"]]
    return "\n\n".join(parts)


def plot(results: dict, path: Path) -> None:
    """Write a PNG: word F1 by x-height for each reader, and each picture figure for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    if "text" in results:
        readers = results["text"]["readers"]
        groups = list(dict.fromkeys(_bin_name(one) for reader in readers for one in reader["bins"])) + ["all"]
        series = {}
        for reader in readers:
            rows = {_bin_name(one): one["rows"] for one in reader["bins"]} | {"all": reader["rows"]}
            series[reader["reader"]] = {
                group: next(row for row in rows[group] if row[0] == "word_f1") for group in groups if group in rows
            }
        panels.append(("Word F1 by x-height of the type", groups, series))
    if "image" in results:
        models = results["image"]["models"]
        groups = list(dict.fromkeys(row[0] for model in models for row in model["rows"]))
        series = {model["name"]: {row[0]: row for row in model["rows"]} for model in models}
        panels.append(("Recognition of pictures", groups, series))

    widths = [max(5.0, 1.5 * len(groups)) for _, groups, _ in panels]
    figure = Figure(figsize=(sum(widths), 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)
    for axes, (title, groups, series) in zip(grid[0], panels, strict=True):
        _grouped_bars(axes, groups, series)
        axes.set_title(title, pad=28)
    figure.savefig(path)


def _grouped_bars(axes, groups: list[str], series: dict[str, dict[str, Sequence]]) -> None:
    """Bars of ``series[name][group] = [_, value, low, high]``, one colour a name, with whiskers from low to high."""
    width = 0.8 / max(1, len(series))
    for place, (name, values) in enumerate(series.items()):
        present = [group for group in groups if group in values]
        x = [groups.index(group) + (place - (len(series) - 1) / 2) * width for group in present]
        heights = [values[group][1] for group in present]
        whiskers = [
            [max(0.0, values[group][1] - values[group][2]) for group in present],
            [max(0.0, values[group][3] - values[group][1]) for group in present],
        ]
        axes.bar(x, heights, width * 0.92, yerr=whiskers, label=name, color=COLOURS[place % len(COLOURS)], capsize=2)
    axes.set_xticks(range(len(groups)), [group.replace(", ", "\n") for group in groups])
    axes.set_ylim(0.0, max([1.0, *(row[3] for values in series.values() for row in values.values())]))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series), frameon=False)


def write_report(results: dict, folder: Path) -> None:
    """Write ``report.png`` and ``report.md`` into ``folder``."""
    plot(results, folder / "report.png")
    lines = [
        f"# Evaluation of {results['model']}",
        f"{results['machine']}.",
        "Brackets hold 95% bootstrap intervals.",
        tables(results),
        "![the figures above as bars](report.png)",
    ]
    (folder / "report.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
