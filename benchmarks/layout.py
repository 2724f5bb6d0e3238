"""Lines of real pages found by `analyse_page`, against the text layer: `python -m benchmarks.layout`.

    python -m benchmarks.layout [--packages texlive-publishers-doc ...] [--pages 100] [--dpi 72 100 150 200]

A line counts as found when at least 95% of its characters lie in exactly one line that the layout found, all in one
row, and no character of another line lies there with it. The numbers of the layout were set on the training packages;
the validation packages tell how it does on what it has never seen.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter

import numpy as np
import pypdfium2 as pdfium
from tqdm import tqdm

from benchmarks.common import shuffled_documents
from modeling_unit.layout_unit import PageLayout, analyse_page
from training.data.pdf import Line, find_lines, read_glyphs
from training.evaluation.report import machine, markdown_table

PACKAGES = ("texlive-humanities-doc", "texlive-metapost-doc")
MIN_LINES = 8  # usable lines that a page must have to take part


def sample_pages(packages: list[str], count: int, seed: int = 0) -> list[tuple[pdfium.PdfDocument, int, list[Line]]]:
    """Pages with at least `MIN_LINES` usable lines, two of a document at most, by a seeded draw.

    Raises:
        ValueError: a package cannot be had.
    """
    rng, found = random.Random(seed), []
    for _, document in shuffled_documents(packages, rng):
        taken = 0
        for index in rng.sample(range(len(document)), min(4, len(document))):
            try:
                glyphs = read_glyphs(document[index])
                lines = [line for line in find_lines(glyphs) if not line.refused]
            except (ValueError, pdfium.PdfiumError):
                continue
            if len(lines) >= MIN_LINES:
                found.append((document, index, lines))
                taken += 1
            if taken == 2 or len(found) == count:
                break
        if len(found) == count:
            break
    return found


def judge(lines: list[Line], layout: PageLayout, scale: float) -> Counter:
    """How many lines were `found`, `missed`, found `twice`, `split` over rows or `merged` with another line."""
    boxes = np.array([layout.to_original(line.box) for line in layout.lines], float).reshape(-1, 4)
    rows = np.array([line.row for line in layout.lines])
    homes, middles = [], []
    for line in lines:
        inked = line.boxes[line.boxes[:, 2] > line.boxes[:, 0]] * scale
        x, y = (inked[:, :1] + inked[:, 2:3]) / 2, (inked[:, 1:2] + inked[:, 3:4]) / 2  # (characters, 1) each
        homes.append((x > boxes[:, 0] - 1) & (x < boxes[:, 2] + 1) & (y > boxes[:, 1] - 1) & (y < boxes[:, 3] + 1))
        middles.append((line.baseline - line.x_height / 2) * scale)
    verdicts: Counter = Counter()
    for index, (line, inside) in enumerate(zip(lines, homes, strict=True)):
        times = inside.sum(axis=1)
        own = inside.any(axis=0)
        others = [
            other
            for other, there in enumerate(homes)
            if other != index
            and abs(middles[other] - middles[index]) > line.x_height * scale
            and (there[:, own].any(axis=1)).mean() > 0.1
        ]
        if (times == 0).mean() > 0.05:
            verdicts["missed"] += 1
        elif (times > 1).mean() > 0.05:
            verdicts["twice"] += 1
        elif len(set(rows[own])) > 1:
            verdicts["split"] += 1
        elif others:
            verdicts["merged"] += 1
        else:
            verdicts["found"] += 1
    return verdicts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout", description=__doc__.splitlines()[0])
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="DEB")
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--dpi", nargs="+", type=float, default=[72, 100, 150, 200])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    pages = sample_pages(arguments.packages, arguments.pages, arguments.seed)
    table = []
    for dpi in arguments.dpi:
        total, seconds = Counter(), []
        for document, index, lines in tqdm(pages, desc=f"{dpi:g} dpi", unit="page", delay=2, leave=False):
            image = document[index].render(scale=dpi / 72, grayscale=True).to_pil()
            start = time.process_time()
            layout = analyse_page(image)
            seconds.append(time.process_time() - start)
            total += judge(lines, layout, dpi / 72)
        count = sum(total.values())
        shares = [f"{100 * total[name] / count:.2f}" for name in ("found", "missed", "twice", "split", "merged")]
        table.append(
            [f"{dpi:g}", count, *shares, f"{1000 * statistics.mean(seconds):.0f}", f"{1000 * max(seconds):.0f}"]
        )
    print(machine())
    print(f"{len(pages)} pages of {', '.join(arguments.packages)}\n")
    head = ["dpi", "lines", "found %", "missed %", "twice %", "split %", "merged %", "CPU ms a page", "slowest ms"]
    print(markdown_table(head, table))


if __name__ == "__main__":
    main()
