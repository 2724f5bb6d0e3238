"""Real PDFs to rows: `python -m benchmarks.data_pdf [--packages texlive-science-doc ...] [--pages 100]`.

Milliseconds of one core for a block with its boxes, and for a whole page, beside the floor, which is what pypdfium2
takes to open a page, render it at the same scale and close it again, with no text read and no file written. All in
turns, page by page, in one process. Target: a block with boxes in at most 15 ms. A row's time holds everything: the
text layer, the order of reading, its neighbours' headers, rendering, cutting, checking ink, PNG.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import numpy as np
import pypdfium2 as pdfium
from tqdm import tqdm

from benchmarks.common import shuffled_documents
from training.data import pdf_pages
from training.data.pdf_build import X_HEIGHTS, PageSettings, PageTask, read_task
from training.data.pdf_sources import Document
from training.evaluation.report import machine, markdown_table

PACKAGES = ("texlive-science-doc",)


def sample_tasks(packages: list[str], count: int, seed: int = 0, pages: int = 8) -> list[PageTask]:
    """Runs of ``pages`` consecutive pages, as a build has them, one of a document, by a seeded draw.

    Raises:
        ValueError: a package cannot be had.
    """
    rng, found = random.Random(seed), []
    for path, document in shuffled_documents(packages, rng):
        start = rng.randrange(max(len(document) - pages, 0) + 1)
        chosen = tuple(range(start, min(start + pages, len(document))))
        found.append(PageTask(Document("benchmark", path.name, path, len(document)), chosen))
        document.close()
        count -= len(chosen)
        if count <= 0:
            break
    return found


def scales(task: PageTask, x_height: float) -> dict[int, float]:
    """Pixels a point at which each page that is used has the x-height; pages that are refused are not there."""
    document = pdfium.PdfDocument(task.document.path)
    found = {}
    for number in task.pages:
        try:
            found[number] = x_height / pdf_pages.read_page(document[number]).x_height
        except (pdf_pages.PageRefused, pdfium.PdfiumError):
            continue
    document.close()
    return found


def render_alone(task: PageTask, at: dict[int, float]) -> float:
    """Seconds to open the document and render its pages, and nothing else."""
    begin = time.perf_counter()
    document = pdfium.PdfDocument(task.document.path)
    for number in task.pages:
        page = document[number]
        if number in at:
            page.render(scale=at[number], grayscale=True, draw_annots=False).to_numpy()
        page.close()
    document.close()
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_pdf", description=__doc__.splitlines()[0])
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="DEB")
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    tasks = sample_tasks(arguments.packages, arguments.pages, arguments.seed)
    units = {unit: float(np.mean(X_HEIGHTS[unit])) for unit in ("block", "page", "chunk")}
    seconds: dict[str, list[float]] = {name: [] for unit in units for name in (unit, f"floor of {unit}")}
    rows = dict.fromkeys(units, 0)
    at = {unit: [scales(task, x_height) for task in tasks] for unit, x_height in units.items()}
    for _ in tqdm(range(arguments.rounds), unit="round"):
        spent = dict.fromkeys(seconds, 0.0)
        rows = dict.fromkeys(units, 0)
        for index, task in enumerate(tasks):
            for unit, x_height in units.items():
                spent[f"floor of {unit}"] += render_alone(task, at[unit][index])
                result = read_task(task, PageSettings(unit=unit, x_height=(x_height, x_height)))
                spent[unit] += result.seconds
                rows[unit] += len(result.rows)
        for name, value in spent.items():
            seconds[name].append(value)
    pages = sum(len(task.pages) for task in tasks)
    used = {unit: sum(map(len, at[unit])) for unit in units}
    print(machine())
    print(
        f"\n{pages} pages of {len(tasks)} documents of {', '.join(arguments.packages)}, {used['page']} of them "
        f"English with a sound text layer; median of {arguments.rounds} rounds, one core\n"
    )
    table = []
    for unit, x_height in units.items():
        mine, floor = (statistics.median(seconds[name]) for name in (unit, f"floor of {unit}"))
        table.append(
            [
                unit,
                f"{x_height:g}",
                rows[unit],
                f"{1000 * mine / max(rows[unit], 1):.1f}",
                f"{1000 * mine / pages:.1f}",
                f"{pages / mine:.1f}",
                f"{1000 * floor / pages:.1f}",
                f"{mine / floor:.1f}",
            ]
        )
    heads = ["unit", "x-height, px", "rows", "ms a row", "ms a page", "pages/s", "render alone, ms a page", "times it"]
    print(markdown_table(heads, table))


if __name__ == "__main__":
    main()
