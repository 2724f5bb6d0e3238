"""Lines of text as a `Reader` cuts them out of pages: what a model that reads line by line should learn from.

A page is drawn (a page of a PDF at a size of type from hardly legible to large, or made pages in many faces), cut by
the very code that cuts pages for reading (`modeling_unit/layout_unit.py`), and each cut gets the characters that lie
in it. What the cutting does to a page (sizes and baselines measured on the ink, small type enlarged, paper whitened,
other lines painted over) is so in the training data as it will be when the model reads. Cuts of pictures without
letters and of stained paper get an empty text: a model that was never shown such a cut reads letters into it.

Every number here is ours.
"""

from __future__ import annotations

import io
import itertools
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
from PIL import Image

from modeling_unit.layout_unit import LayoutSettings, PageLayout, analyse_page

from .blanks import LEGIBLE
from .guarded import map_in_order
from .made_chunks import Resources, degrade, draw_blank, draw_dense, load_resources
from .pages.degradations import ink_and_paper
from .pdf import Cutout, Report, Task, _mixed, _rows_of, _run, first_rows, list_documents, plan_pages
from .pdf_pages import PageRefused, page_cutout, read_page, render_page
from .pictures import compose
from .schema import make_row, read_columns, write_shards

# A strip of one patch: ascenders of common faces rise to 1.6 x-heights, descenders go to 0.5 below the baseline
LINE_HEIGHT, BASELINE, LINE_X_HEIGHT = 16, 12.1, 7.5  # px
LINES = LayoutSettings(
    x_height=LINE_X_HEIGHT, min_x_height=0.9 * LINE_X_HEIGHT, line_height=LINE_HEIGHT, baseline=BASELINE
)
PAGE_X_HEIGHT = (2.8, 15.0)  # px, drawn per page, log-uniform
MAX_FOREIGN = 0.06  # share of a cut's columns that may show ink where no character is
MAX_BARE = 0.06  # share of its characters that may show no ink
MAX_SYMBOLS = 0.2  # share of characters that no keyboard has
PAGES_PER_LINE = 10  # made pages that are drawn at most for each line that is asked for
SIDE = (96, 640)  # px of the pictures that blank cuts come from
CUTS_PER_PICTURE = 4
FRUITLESS = 2000  # pictures and papers in a row that give no cut: there is none to be had
DEVELOPMENT_SHARE = 40  # one document in so many is for development: never trained on, free to be tuned on


def line_cutouts(
    layout: PageLayout,
    text: str,
    boxes: np.ndarray,
    refuse: Callable[[str], None],
    unwanted: Callable[[str], bool] = lambda text: False,
) -> Iterator[Cutout]:
    """The cuts of a page with what is printed in them.

    Args:
        layout: of the page, upright and not reduced, made with a `line_height`.
        text: of the page in reading order, `\\n` between printed lines.
        boxes: `(len(text), 4)` in pixels of the page, zeros for white space.
        refuse: is told why a cut is left out: `no characters`, `two lines` or `order` (its characters are no run of
            one line), `symbols`, `held out`, `foreign ink`, `bare` (characters without ink).
        unwanted: texts that must not come out.

    Yields:
        one for each cut whose ink is that of its characters; boxes in pixels of the cut.

    Raises:
        ValueError: the page was turned or reduced, or is not cut into strips.
    """
    settings = layout.settings
    if layout.angle or layout.factor != 1 or not settings.line_height:
        raise ValueError("line_cutouts: the page must be neither turned nor reduced, and cut with a line_height")
    visible = np.flatnonzero(boxes[:, 2] > boxes[:, 0])
    if not len(visible):
        return
    middles = (boxes[visible, :2] + boxes[visible, 2:]) / 2
    line_of = np.cumsum([character == "\n" for character in text])[visible]
    for chunk in layout.chunks():
        x0, y0, x1, y1 = chunk.box
        inside = np.flatnonzero(
            (middles[:, 0] > x0 - 0.5)
            & (middles[:, 0] < x1 + 0.5)
            & (middles[:, 1] > y0 - 0.5)
            & (middles[:, 1] < y1 + 0.5)
        )
        if not len(inside):
            refuse("no characters")
            continue
        if line_of[inside[0]] != line_of[inside[-1]]:
            refuse("two lines")
            continue
        if inside[-1] - inside[0] + 1 != len(inside):
            refuse("order")
            continue
        first, last = int(visible[inside[0]]), int(visible[inside[-1]]) + 1
        part = text[first:last]
        if "\ufffd" in part or sum(not " " <= c <= "~" for c in part) > max(1, MAX_SYMBOLS * len(part)):
            refuse("symbols")
            continue
        if unwanted(part):
            refuse("held out")
            continue
        pixels = np.asarray(layout.crop(chunk))
        pad = settings.margin * settings.x_height / chunk.scale
        origin = np.array([x0 - pad, chunk.lines[0].baseline - settings.baseline / chunk.scale] * 2)
        own = boxes[first:last]
        blank = own[:, 2] <= own[:, 0]
        placed = (own - origin) * chunk.scale
        fault = _ink_fault(pixels, placed[~blank])
        if fault:
            refuse(fault)
            continue
        placed[:, :2], placed[:, 2:] = np.floor(placed[:, :2]), np.ceil(placed[:, 2:])
        size = np.array([pixels.shape[1], pixels.shape[0]])
        # a character that lies wholly above or below the strip still has its column
        placed[:, :2] = placed[:, :2].clip(0, size - 1)
        placed[:, 2:] = np.maximum(placed[:, 2:].clip(0, size), placed[:, :2] + 1)
        placed[blank] = 0
        yield Cutout(pixels, part, placed.astype(int), chunk.x_height * chunk.scale)


def _ink_fault(pixels: np.ndarray, boxes: np.ndarray) -> str:
    """Compare the columns of a strip that hold ink with those that hold characters; boxes `(N, 4)` in its pixels."""
    width = pixels.shape[1]
    inked = pixels.min(axis=0) < 150  # (W,)
    covered = np.zeros(width, dtype=bool)
    bare = 0
    for x0, _, x1, _ in boxes:
        left, right = max(0, math.floor(x0)), min(width, math.ceil(x1))
        bare += not (pixels[:, left : max(right, left + 1)] < 200).any()
        covered[max(0, left - 1) : right + 1] = True
    if (inked & ~covered).sum() > max(2, MAX_FOREIGN * covered.sum()):
        return "foreign ink"
    return "bare" if bare > MAX_BARE * len(boxes) else ""


# --------------------------------------------------------------------------------------------------------- PDF pages


def lines_of_page(
    page: pdfium.PdfPage,
    rng: np.random.Generator,
    refusals: Counter,
    *,
    unwanted: Callable[[str], bool] = lambda text: False,
    x_height: tuple[float, float] = PAGE_X_HEIGHT,
    settings: LayoutSettings = LINES,
) -> Iterator[Cutout]:
    """The lines of one page of a PDF, drawn at an x-height from the range `x_height` and cut as for reading.

    Args:
        page: the page.
        rng: draws the x-height.
        refusals: counts why the page (`page: ...`) or lines of it (`line: ...`, see `line_cutouts`) were refused.
        unwanted: texts that must not come out.
        x_height: px, least and most, drawn evenly in its logarithm.
        settings: of the cutting.
    """
    try:
        content = read_page(page)
        size = math.exp(rng.uniform(*map(math.log, x_height)))
        cutout = page_cutout(render_page(page, content, size), content)
    except PageRefused as refused:
        refusals[f"page: {refused}"] += 1
        return
    layout = analyse_page(Image.fromarray(cutout.pixels), settings)
    if layout.angle or layout.factor != 1 or not layout.blocks:
        refusals["page: turned, reduced or blank"] += 1
        return

    def refuse(reason: str) -> None:
        refusals[f"line: {reason}"] += 1

    yield from line_cutouts(layout, cutout.text, cutout.boxes, refuse, unwanted)


_page_settings: tuple[Callable[[str], bool], tuple[float, float]]  # set before the workers are forked


def _page_rows(task: Task) -> tuple[list[dict], Report]:
    unwanted, x_height = _page_settings
    return _rows_of(
        task, lambda page, rng, refusals: lines_of_page(page, rng, refusals, unwanted=unwanted, x_height=x_height)
    )


def development_documents(packages: list[str]) -> frozenset[str]:
    """One document in `DEVELOPMENT_SHARE` of the training packages, as `PACKAGE/PATH`: for choices that must be made
    neither on what was trained on nor on what the figures are measured on."""
    names = (f"{package}/{document}" for package in packages for document, _ in list_documents(package))
    return frozenset(name for name in names if zlib.crc32(name.encode()) % DEVELOPMENT_SHARE == 0)


def training_documents(packages: list[str]) -> frozenset[str]:
    """All documents but those of `development_documents`."""
    names = (f"{package}/{document}" for package in packages for document, _ in list_documents(package))
    return frozenset(names) - development_documents(packages)


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
    x_height: tuple[float, float] = PAGE_X_HEIGHT,
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
