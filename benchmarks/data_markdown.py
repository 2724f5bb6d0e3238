"""Markdown pages: `python -m benchmarks.data_markdown [--size 448 896] [--tasks 60] [--documents 60]`.

Made pages: CPU milliseconds of one core for a page typeset from a `.md` file, from the file to the row, with what
drawing it and encoding it as PNG take of that, and the share of the laid-out pages that is kept. The same tasks at
each size; files are read when a task first draws them, as in a run.

Pages of PDFs with their LaTeX beside them: CPU milliseconds for a page that is looked at, whether it is kept or not,
and for a page that is kept, of whole documents by a seeded draw, with what reading the source, reading the text layer
and laying one against the other take of that, and pypdfium2's rendering of the kept pages: the floor. Why pages were
refused stands below.

Text that is held out is not looked for: a look into a set for each line. All in one process, rounds in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from tqdm import tqdm

from training.data import markdown_latex, markdown_pages
from training.data.pages.fonts import load_fonts
from training.data.sources import fetch_deb
from training.evaluation.report import machine, markdown_table

PACKAGES = ("texlive-science-doc",)


class Stopwatch:
    """CPU seconds by name, of functions that are called while it is in place."""

    def __init__(self):
        self.seconds: Counter = Counter()

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.process_time() - begin

        return timed

    @contextmanager
    def on(self, module, **names: str):
        """Time the functions of ``module``, each a keyword with the name it is counted under."""
        timed = {function: self.around(name, getattr(module, function)) for function, name in names.items()}
        with mock.patch.multiple(module, **timed):
            yield self


def measure_made(plan: markdown_pages.Plan, tasks: range) -> tuple[int, int, Counter]:
    """Pages laid out, rows, and seconds: ``all``, ``draw``, ``row`` (PNG and the schema's checks)."""
    watch, pages, rows = Stopwatch(), 0, 0
    with watch.on(markdown_pages, rows_of_task="all", draw="draw", make_row="row"):
        for task in tqdm(tasks, desc=f"made, {plan.size} px", unit="task"):
            found, report, _ = markdown_pages.rows_of_task(plan, task)
            pages, rows = pages + report.pages, rows + len(found)
    return pages, rows, watch.seconds


def measure_pdf(pairs: list[tuple[Path, Path]], size: int, most_pages: int) -> tuple[int, int, Counter, Counter]:
    """Pages looked at, pages kept, seconds by part, and why pages and documents were refused."""
    watch, pages, kept, refusals = Stopwatch(), 0, 0, Counter()
    with watch.on(markdown_latex, read_source="source", read_page="text layer", Aligned="alignment", render="render"):
        for pdf, tex in tqdm(pairs, desc=f"PDF, {size} px", unit="document"):
            begin, mine = time.process_time(), Counter()
            found = list(markdown_latex.pages_of_document(pdf, tex, size, most_pages, mine))
            for page in found:
                markdown_latex.make_row(
                    page.pixels,
                    markdown_latex.markdown.write(page.blocks),
                    task="markdown",
                    kind="document",
                    source=pdf.name,
                    license=markdown_latex.PAGE_LICENSE,
                    split="train",
                )
            watch.seconds["all"] += time.process_time() - begin
            kept += len(found)
            pages += len(found) + sum(count for reason, count in mine.items() if reason.startswith("page:"))
            refusals.update(mine)
    return pages, kept, watch.seconds, refusals


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_markdown", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[448, 896], help="longer side, pixels")
    parser.add_argument("--tasks", type=int, default=60, help="of made pages, up to 4 pages each; 0: none")
    parser.add_argument("--documents", type=int, default=60, help="PDFs; 0: none")
    parser.add_argument("--sources", nargs="+", help="of Markdown files; default: the training packages of npm")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="DEB")
    parser.add_argument("--fonts", default="packages", help="as `unit data make-markdown --fonts`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(machine())
    if arguments.tasks:
        sources = arguments.sources or [f"npm:{name}" for name in markdown_pages.default_packages("train")]
        documents, fonts = markdown_pages.find_documents(sources), load_fonts(arguments.fonts, "train")
        plans = {
            size: markdown_pages.make_plan(documents, fonts, size, arguments.seed, "train") for size in arguments.size
        }
        table, counts, spent = [], {}, {size: [] for size in plans}
        for _ in range(arguments.rounds):
            for size, plan in plans.items():
                markdown_pages.read_document.cache_clear()
                markdown_pages._wanted_blocks.cache_clear()
                *counts[size], seconds = measure_made(plan, range(arguments.tasks))
                spent[size].append(seconds)
        for size, (pages, rows) in counts.items():
            per_page = {
                name: 1000 * statistics.median(each[name] for each in spent[size]) / max(rows, 1)
                for name in ("all", "draw", "row")
            }
            table.append(
                [size, pages, f"{rows / max(pages, 1):.1%}", *(f"{value:.1f}" for value in per_page.values())]
            )
        print(
            f"\nMade pages: {arguments.tasks} tasks, {len(documents)} files, {len(plans[size].families)} font "
            f"families; median of {arguments.rounds} rounds, one core\n"
        )
        print(
            markdown_table(
                ["longer side, px", "pages", "kept", "ms a page kept", "of it drawing", "of it the row"], table
            )
        )
    if arguments.documents:
        pairs = [pair for name in arguments.packages for pair in markdown_latex.find_pairs(fetch_deb(name))]
        chosen = np.random.default_rng(arguments.seed).permutation(len(pairs))[: arguments.documents]
        pairs = [pairs[index] for index in chosen]
        most_pages, table, reasons = 12, [], Counter()
        for size in arguments.size:
            rounds = [measure_pdf(pairs, size, most_pages) for _ in range(arguments.rounds)]
            pages, kept, _, refusals = rounds[0]
            reasons = refusals if size == max(arguments.size) else reasons
            total = {
                name: 1000 * statistics.median(each[2][name] for each in rounds)
                for name in ("all", "source", "text layer", "alignment", "render")
            }
            table.append(
                [
                    size,
                    pages,
                    f"{kept / max(pages, 1):.1%}",
                    f"{total['all'] / max(pages, 1):.1f}",
                    *(f"{total[name] / max(pages, 1):.1f}" for name in ("source", "text layer", "alignment")),
                    f"{total['all'] / max(kept, 1):.1f}",
                    f"{total['render'] / max(kept, 1):.1f}",
                ]
            )
        print(
            f"\nPages of PDFs: {len(pairs)} documents of {', '.join(arguments.packages)}, at most {most_pages} pages "
            f"kept of each; median of {arguments.rounds} rounds, one core\n"
        )
        heads = ["longer side, px", "pages looked at", "kept", "ms a page looked at", "of it the source"]
        heads += ["of it the text layer", "of it the alignment", "ms a page kept", "of it rendering"]
        print(markdown_table(heads, table))
        print(
            f"\nRefused at {max(arguments.size)} px: " + ", ".join(f"{why} {n}" for why, n in reasons.most_common(8))
        )


if __name__ == "__main__":
    main()
