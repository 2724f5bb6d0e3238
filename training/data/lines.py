"""Data sets of lines of text as a `Reader` cuts them out of pages (`line_cuts`): what `unit data lines` builds.

The pages are those of Debian packages of PDFs, drawn from hardly legible to large, and made ones in many faces. Cuts
of pictures without letters and of stained paper get an empty text: a model that was never shown such a cut reads
letters into it.

Every number here is ours.
"""

from __future__ import annotations

import io
import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_unit.layout_unit import analyse_page

from .blanks import LEGIBLE
from .guarded import map_in_order
from .line_cuts import LINES, line_cutouts, lines_of_page
from .made_chunks import Resources, degrade, draw_blank, draw_dense, load_resources
from .pages.degradations import ink_and_paper
from .pdf import CUT_PAGE_X_HEIGHT, Report, Task, _mixed, _rows_of, _run, choose_documents, first_rows, plan_pages
from .pictures import compose
from .schema import make_row, read_columns, write_shards

PAGES_PER_LINE = 10  # made pages that are drawn at most for each line that is asked for
SIDE = (96, 640)  # px of the pictures that blank cuts come from
CUTS_PER_PICTURE = 4
FRUITLESS = 2000  # pictures and papers in a row that give no cut: there is none to be had
DEVELOPMENT_SHARE = 40  # one document in so many is for development: never trained on, free to be tuned on


# --------------------------------------------------------------------------------------------------------- PDF pages


_page_settings: tuple[Callable[[str], bool], tuple[float, float]]  # set before the workers are forked


def _page_rows(task: Task) -> tuple[list[dict], Report]:
    unwanted, x_height = _page_settings
    return _rows_of(
        task, lambda page, rng, refusals: lines_of_page(page, rng, refusals, unwanted=unwanted, x_height=x_height)
    )


def development_documents(packages: list[str], listed: frozenset[str] | None = None) -> frozenset[str]:
    """One document in `DEVELOPMENT_SHARE` of the training packages, or of those `listed`, as `PACKAGE/PATH`: for
    choices that must be made neither on what was trained on nor on what the figures are measured on.

    Raises:
        ValueError: a document of the list is in none of the packages.
    """
    names = choose_documents(packages, listed)
    return frozenset(name for name in names if zlib.crc32(name.encode()) % DEVELOPMENT_SHARE == 0)


def training_documents(packages: list[str], listed: frozenset[str] | None = None) -> frozenset[str]:
    """All documents, or all that are `listed`, but those of `development_documents`."""
    return choose_documents(packages, listed) - development_documents(packages, listed)


def build_lines(
    packages: list[str],
    out: str | Path,
    seed: int = 0,
    *,
    max_pages: int | None = None,
    max_rows: int | None = None,
    pages_per_pdf: int = 15,
    documents: frozenset[str] | None = None,
    split: str = "train",
    x_height: tuple[float, float] = CUT_PAGE_X_HEIGHT,
    unwanted: Callable[[str], bool] = lambda text: False,
    workers: int = 1,
    progress: bool = True,
) -> Report:
    """Build a data set of lines from Debian packages of PDF documentation; arguments as for `pdf.build_chunks`.

    Args:
        x_height: px, range that the x-height of each page is drawn from, evenly in its logarithm.

    Raises:
        ValueError: there is no page to cut.
    """
    global _page_settings
    begin = time.perf_counter()
    _page_settings = unwanted, x_height
    tasks = plan_pages(packages, seed, max_pages, pages_per_pdf, split, documents)
    if not tasks:
        raise ValueError(f"{Path(out).name}: there is no document for it in {', '.join(packages)}")
    report = Report()
    rows = _run(tasks, _page_rows, workers, report, unwanted, progress)
    if max_rows is not None:
        rows = first_rows(rows, max_rows)
    report.rows = write_shards(_mixed(rows, seed, 5000), Path(out))
    report.seconds = time.perf_counter() - begin
    settings = {"packages": packages, "max_pages": max_pages, "pages_per_pdf": pages_per_pdf, "split": split}
    report.save(Path(out), seed=seed, x_height=list(x_height), **settings)
    return report


# -------------------------------------------------------------------------------------------------------- made pages


def made_line_rows(
    seed: int,
    index: int,
    resources: Resources,
    split: str = "train",
    unwanted: Callable[[str], bool] = lambda text: False,
) -> list[dict]:
    """The lines of page `index` that `seed` draws: one to three in a face of its own, as printed, copied and scanned.

    At random half of the pages are shrunk, to an x-height from 3 px on.
    """
    rng = np.random.default_rng([seed, index, 7])
    drawing = draw_dense(rng, resources)
    ink, paper = ink_and_paper(rng)
    pixels = paper + (ink - paper) * drawing.coverage
    boxes = drawing.boxes.astype(np.float64)
    if rng.random() < 0.5:
        factor = math.exp(rng.uniform(math.log(3.0), math.log(drawing.x_height))) / drawing.x_height
        height, width = (max(8, round(side * factor)) for side in pixels.shape)
        how = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)[int(rng.integers(3))]
        boxes *= np.array([width / pixels.shape[1], height / pixels.shape[0]] * 2)
        pixels = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize((width, height), how))
    if rng.random() < 0.6:
        pixels = degrade(pixels, rng)
    page = np.pad(pixels.clip(0, 255).round().astype(np.uint8), 6, mode="edge")
    boxes[boxes[:, 2] > boxes[:, 0]] += 6
    layout = analyse_page(Image.fromarray(page), LINES)
    if layout.angle or layout.factor != 1 or not layout.blocks:
        return []
    return [
        make_row(
            cut.pixels,
            cut.text,
            task="ocr",
            kind="document",
            char_boxes=cut.boxes,
            x_height=cut.x_height,
            source=f"made-lines/{seed}#{index} ({drawing.family})",
            license="Apache-2.0 (drawn by this project)",
            split=split,
        )
        for cut in line_cutouts(layout, drawing.text, boxes, lambda reason: None, unwanted)
    ]


def build_made_lines(
    out: str | Path,
    count: int,
    seed: int = 0,
    *,
    split: str = "train",
    workers: int = 1,
    unwanted: Callable[[str], bool] = lambda text: False,
    progress: bool = True,
) -> Report:
    """Draw pages until `count` lines are there; the same seed gives the same rows, whatever `workers` is.

    Of pages that give next to no lines, as where most of their text is unwanted, no more than `PAGES_PER_LINE` a line
    are drawn.
    """
    from tqdm import tqdm

    begin = time.perf_counter()
    resources = load_resources(split)
    drawn = map_in_order(
        lambda index: made_line_rows(seed, index, resources, split, unwanted),
        range(PAGES_PER_LINE * count),
        workers=workers,
        batch=64,
    )
    rows = first_rows(itertools.chain.from_iterable(drawn), count)
    rows = tqdm(rows, total=count, unit=" rows", disable=not progress)
    report = Report(rows=write_shards(rows, Path(out)))
    report.seconds = time.perf_counter() - begin
    report.save(Path(out), seed=seed, split=split, families=len(resources.families))
    return report


# ------------------------------------------------------------------------------------------------------- blank cuts


def blank_line_rows(pictures: str | Path, count: int, seed: int) -> Iterator[dict]:
    """Rows with empty text: cuts of pictures without anything to read and of stained, textured or ruled paper.

    Raises:
        ValueError: no picture is left after those with something to read in them, or none of them can be cut.
    """
    rng = np.random.default_rng(seed)
    every = read_columns(pictures, ["image", "text", "source", "license"])
    rows = [row for row in every if not LEGIBLE.search(row["text"])]
    if not rows:
        raise ValueError(f"{pictures} has no picture without something to read in it")
    made = fruitless = 0
    while made < count:
        if rng.random() < 0.25:
            page = draw_blank(rng, "dense").clip(0, 255).round().astype(np.uint8)
            source, license = "made-pages/blank", "Apache-2.0 (drawn by this project)"
        else:
            row = rows[int(rng.integers(len(rows)))]
            picture = Image.open(io.BytesIO(row["image"]["bytes"]))
            page = np.asarray(compose(picture, int(rng.integers(*SIDE))).convert("L"))
            source, license = row["source"], row["license"]
        layout = analyse_page(Image.fromarray(page), LINES)
        chunks = layout.chunks()
        fruitless = 0 if chunks else fruitless + 1
        if fruitless == FRUITLESS:
            raise ValueError(f"{pictures}: in {FRUITLESS} pictures and papers nothing looks like a line")
        for chunk in [chunks[k] for k in rng.permutation(len(chunks))[:CUTS_PER_PICTURE]]:
            yield make_row(
                np.asarray(layout.crop(chunk)),
                "",
                task="ocr",
                kind="document",
                x_height=chunk.x_height * chunk.scale,
                source=f"blank-lines/{seed}#{made} of {source}",
                license=license,
                split="train",
            )
            made += 1
            if made == count:
                return


def build_blank_lines(pictures: str | Path, out: str | Path, count: int, seed: int = 0) -> Report:
    """Write `count` rows of `blank_line_rows` to `out`: the same seed and pictures give the same rows."""
    begin = time.perf_counter()
    report = Report(rows=write_shards(blank_line_rows(pictures, count, seed), Path(out)))
    report.seconds = time.perf_counter() - begin
    report.save(Path(out), pictures=Path(pictures).name, count=count, seed=seed)
    return report
