"""What tesseract's images are best enlarged to: `python -m benchmarks.tesseract_upscale [--pages 16] [--minutes 8]`.

Whole pages of packages that are trained on, drawn and rendered by the code that makes the set `pages` of
`unit data evaluation-sets`: what is chosen here is not chosen on pages that it is measured on. Every page is read as
it is and enlarged to each target, so that the columns of a row are of the same pages. `UPSCALE_TO` of
`training/evaluation/peers/tesseract.py` is what comes out.

`--shrink FILTER` reads pages that were rendered at 14 px and then made smaller, as a scan is, beside those that were
rendered at their size.
"""

from __future__ import annotations

import argparse
import io
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from training.data import evaluation_sets, heldout
from training.data.guarded import Failure
from training.evaluation.contract import TextSample
from training.evaluation.peers.tesseract import Tesseract
from training.evaluation.report import machine, markdown_table
from training.evaluation.text import Counts, count, summarise

PACKAGES = ("texlive-science-doc",)
TARGETS = (10.0, 12.0, 14.0, 16.0, 20.0, 26.0)  # px
RENDERED = 14.0  # px, before `--shrink`


def pages(packages: list[str], heights: list[float], seed: int) -> Iterator[dict[float, TextSample]]:
    """Pages of as many documents, each at every x-height.

    Raises:
        ValueError: a package is held out.
    """
    heldout.refuse_validation_packages(packages)
    for found in evaluation_sets.found_in(packages, evaluation_sets.whole_page, heights, 1, seed=seed):
        for rows in [] if isinstance(found, Failure) else found.items:
            yield {
                row["x_height"]: TextSample(
                    0,
                    Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"),
                    row["text"],
                    row["x_height"],
                    row["source"],
                    layout="page",
                )
                for row in rows
            }


class Way(NamedTuple):
    """How a page is made and read."""

    height: float  # px
    kind: str
    target: str


class Readers:
    """tesseract with each setting, as many as there are threads: one reads one page at a time."""

    def __init__(self):
        self.made: dict[tuple[float | None, str, int], Tesseract] = {}

    def read(self, sample: TextSample, target: float | None, resampling: str) -> tuple[str, float]:
        """Text and seconds."""
        key = target, resampling, threading.get_ident()
        if key not in self.made:
            self.made[key] = Tesseract(target)
            self.made[key].resampling = resampling
        (reading,) = self.made[key].readings([sample])
        return reading.text, reading.seconds

    def release(self) -> None:
        for reader in self.made.values():
            reader.release()


def read_page(page: dict[float, TextSample], heights, readers: Readers, arguments) -> list[tuple[Way, Counts, float]]:
    """Counts and seconds of one page in every way."""
    found = []
    for height in heights:
        images = {"": page[height].image}
        for name in arguments.shrink:
            shrunk = page[RENDERED].image.resize(page[height].image.size, Image.Resampling[name])
            images[f", shrunk by {name}"] = shrunk
        for kind, image in images.items():
            sample = replace(page[height], image=image)
            for way, target in ways_of(sample, arguments):
                for number, resampling in enumerate(arguments.resampling):
                    if target is None and number:
                        continue
                    named = f", {resampling}" if len(arguments.resampling) > 1 else ""
                    text, seconds = readers.read(sample, target, resampling)
                    found.append((Way(height, kind + named, way), count(text, sample.text), seconds))
    return found


def ways_of(sample: TextSample, arguments) -> Iterator[tuple[str, float | None]]:
    """Name and target of each way to read a page; a target that would not enlarge it is left out."""
    yield "as it is", None
    for target in arguments.targets:
        if target > sample.x_height:
            yield f"{target:g} px", target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tesseract_upscale", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="DEB")
    parser.add_argument("--pages", type=int, default=16)
    parser.add_argument("--heights", nargs="+", type=float, default=[10.0, 7.0, 5.0, 4.0, 3.0])
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--resampling", nargs="+", default=["BICUBIC"], help="of PIL: BICUBIC, LANCZOS, …")
    parser.add_argument("--shrink", nargs="+", default=[], metavar="FILTER", help="of PIL: LANCZOS, BICUBIC, BOX, …")
    parser.add_argument("--jobs", type=int, default=1, help="pages read at once; seconds are told of one alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0, help="no further page is begun after so many")
    arguments = parser.parse_args(argv)

    heights = sorted(set(arguments.heights), reverse=True)
    rendered = sorted({*heights, *([RENDERED] if arguments.shrink else [])}, reverse=True)
    counts: dict[Way, list[Counts]] = defaultdict(list)
    seconds: dict[Way, float] = defaultdict(float)
    documents: list[str] = []
    until = time.perf_counter() + 60 * arguments.minutes
    found = pages(arguments.packages, rendered, arguments.seed)
    bar = tqdm(total=arguments.pages, unit="page")
    running: set[Future] = set()
    readers = Readers()
    with bar, ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            while running or len(documents) < arguments.pages:
                while len(running) < arguments.jobs and len(documents) < arguments.pages:
                    page = next(found, None) if time.perf_counter() < until else None
                    if page is None:
                        arguments.pages = len(documents)
                        break
                    documents.append(page[heights[0]].source)
                    running.add(pool.submit(read_page, page, heights, readers, arguments))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    bar.update()
                    for way, added, spent in future.result():
                        counts[way].append(added)
                        seconds[way] += spent
        finally:
            found.close()
            readers.release()
    if not documents:
        raise SystemExit(f"{', '.join(arguments.packages)} gave no page")

    ways = ["as it is", *(f"{target:g} px" for target in arguments.targets)]
    table, times = [], []
    for height, kind in dict.fromkeys((height, kind) for height, kind, _ in counts):
        cells, spent = [], []
        for way in ways:
            here = counts.get((height, kind, way))
            if not here:
                cells.append("")
                spent.append("")
                continue
            figure = next(figure for figure in summarise(here) if figure.name == "word_f1")
            cells.append(f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]")
            spent.append(f"{seconds[height, kind, way] / len(here):.2f}")
        table.append([f"{height:g} px{kind}", *cells])
        times.append([f"{height:g} px{kind}", *spent])
    words = sum(one.true_words for one in next(iter(counts.values())))
    print(
        f"{machine()}\n{len(documents)} pages of as many documents of {', '.join(arguments.packages)}, {words:,} words"
    )
    print("\nword F1, 95% intervals over pages\n\n" + markdown_table(["x-height", *ways], table))
    if arguments.jobs == 1:
        print("\nseconds a page\n\n" + markdown_table(["x-height", *ways], times))


if __name__ == "__main__":
    main()
