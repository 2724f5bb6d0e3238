"""The sets that reading is measured on, built from held-out sources: what `unit data evaluation-sets` runs.

==========  =========================================================================================================
blocks      paragraphs of the validation packages' PDFs, each rendered at every x-height of `HEIGHTS`
pages       whole pages of them likewise, English, of 150 words or more, one of a document
syn-l       drawn pages of dense small type, over 500 words (SYN-L-val of the paper)
syn-s       drawn pages of sparse large type (SYN-S-val of the paper)
scans       scanned pages with their text, of the Debian source package tesseract, and in ``scan-blocks`` their parts
blank       paper with nothing to read on it
==========  =========================================================================================================

The first two are here, the others in `evaluation_made` and `scans`, those that others label in `labelled`; `build`
makes any of them by name.

Rows are of the schema, split ``validation``. Type at another x-height is rendered anew from the PDF, never shrunk from
a larger picture, so that small type is as sharp as a renderer makes it. All numbers without a source are ours.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2 as pdfium

from . import heldout
from .guarded import Failure, run_guarded
from .pdf import (
    PAGE_LICENSE,
    STOP_WORDS,
    Cutout,
    Line,
    RenderedPage,
    Report,
    chain_lines,
    find_lines,
    is_english,
    list_documents,
    read_glyphs,
    split_paragraphs,
)
from .pdf_pages import PageRefused, page_cutout, page_edges, read_page, render_page, words_with_boxes
from .schema import make_row, write_shards
from .sources import data_folder, fetch_deb
from .text import words

HEIGHTS = (14.0, 10.0, 7.0, 5.0, 4.0, 3.0)  # px, the steps of the table of peers
BLOCKS, BLOCKS_PER_DOCUMENT = 320, 3
PAGES, PAGES_PER_DOCUMENT = 48, 1
BLOCK_LINES, BLOCK_WORDS = (2, 12), 15  # as `pdf.blocks_of_page`
PAGE_WORDS = (150, 900)
SETS = ("blocks", "pages", "syn-l", "syn-s", "scans", "scan-blocks", "blank")
LOOKED_AT = 10  # pages of a document, drawn by the seed, until it has given what is wanted of it
MIN_ENGLISH = 0.12  # share of `STOP_WORDS["en"]` among a page's different words: neither listings nor Lorem ipsum
MIN_DIFFERENT = {"block": 0.45, "page": 0.28}  # share of different words: no text that is there to fill space
MOST_SHARED = 0.3  # of an item's fingerprints (`heldout.fingerprints`) that an earlier item may have: examples repeat
MOST_FOREIGN_INK = 0.01  # of a page's ink: what is printed and not in the truth. Rules and underlines remain
DOCUMENT_SECONDS = 180.0  # for one document, at every x-height


@dataclass
class DocumentTask:
    """A document and the pages of it to look at, in this order, until it has given ``most`` items."""

    package: str
    document: str
    pages: tuple[int, ...]
    most: int
    seed: int


@dataclass
class Found:
    """What a document gave: for each item its rows, one an x-height."""

    items: list[list[dict[str, Any]]] = field(default_factory=list)
    refusals: Counter = field(default_factory=Counter)
    pages: int = 0
    pages_used: int = 0
    seconds: float = 0.0


def refuse_all_but_validation(packages: Sequence[str]) -> None:
    """Raise a ValueError when one of ``packages`` may have been trained on."""
    wrong = sorted(set(packages) - set(heldout.validation_packages()))
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not held out for validation (training/data/heldout.yaml)")


def build(name: str, out: str | Path | None = None, *, workers: int = 1, progress: bool = True) -> Report:
    """The set ``name``, one of `SETS`, in ``out``; ``evaluation-NAME`` of the cache when None.

    Raises:
        ValueError: no such set.
        RuntimeError: packages cannot be fetched.
    """
    from . import evaluation_made, scans

    out = Path(out) if out else data_folder(f"evaluation-{name}")
    if name in ("blocks", "pages"):
        return (build_blocks if name == "blocks" else build_pages)(out, workers=workers, progress=progress)
    if name in evaluation_made.SYN:
        return evaluation_made.build_syn(name, out, workers=workers, progress=progress)
    if name in ("scans", "scan-blocks"):
        return scans.build_scans(out, blocks=name == "scan-blocks")
    if name == "blank":
        return evaluation_made.build_blank(out)
    raise ValueError(f"there is no set called {name!r} to build: {', '.join(SETS)}")


def build_blocks(out: str | Path, count: int = BLOCKS, **settings: Any) -> Report:
    """``count`` paragraphs of the validation packages at every x-height; see `build_at_heights`.

    A paragraph has 2 to 12 lines and 15 words or more, ink where its text layer says and none elsewhere at the largest
    x-height. Its margins, 2 to 8 px but at most half the way to what is printed next to it, are drawn once.
    """
    return build_at_heights(out, _blocks_of_page, count, BLOCKS_PER_DOCUMENT, **settings)


def build_pages(out: str | Path, count: int = PAGES, **settings: Any) -> Report:
    """``count`` whole pages of the validation packages at every x-height; see `build_at_heights`.

    A page is English, has `PAGE_WORDS` words, no character without Unicode and next to no ink that is not its text's.
    Its text is in reading order with header and footer, one printed line a line.
    """
    return build_at_heights(out, whole_page, count, PAGES_PER_DOCUMENT, **settings)


def build_at_heights(
    out: str | Path,
    cut: Callable[..., Iterator[list[Cutout]]],
    count: int,
    per_document: int,
    *,
    packages: Sequence[str] | None = None,
    heights: Sequence[float] = HEIGHTS,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Report:
    """Items of PDFs, each at every x-height, into ``out``.

    Every document gives its first item before one gives its second, so that few items are of many documents.

    Args:
        out: folder for the shards and ``report.json``, whose settings name the ``heights``.
        cut: (page, its number, heights, rng, refusals, edges of the neighbours) -> items, each a cut-out a height.
        count: items; fewer when the packages do not hold so many.
        per_document: at most so many of a document.
        packages: Debian packages; those held out for validation, of which alone they may be.
        heights: x-heights in pixels, the largest first.
        seed: the same gives the same rows, whatever ``workers`` is.

    Raises:
        ValueError: a package that is not held out, no height, or no item at all.
        RuntimeError: a package cannot be fetched.
    """
    from tqdm import tqdm

    packages = list(packages or heldout.validation_packages())
    refuse_all_but_validation(packages)
    heights = sorted(map(float, heights), reverse=True)
    if not heights or heights[-1] < 2:
        raise ValueError("x-heights must be numbers of 2 pixels or more")
    begin = time.perf_counter()
    report = Report()
    found: list[list[list[dict[str, Any]]]] = []  # by document: items: rows
    seen: set[int] = set()
    shared = heldout.shared_text_filter()
    results = found_in(packages, cut, heights, per_document, seed=seed, workers=workers)
    try:
        with tqdm(total=count, unit="item", desc=Path(out).name, disable=not progress) as bar:
            for result in results:
                if isinstance(result, Failure):
                    report.refusals[f"document: {result.reason}"] += 1
                    continue
                report.refusals.update(result.refusals)
                report.pages += result.pages
                report.pages_used += result.pages_used
                report.page_seconds += result.seconds
                own = [item for item in result.items if not shared(item[0]["text"])]
                if len(own) < len(result.items):
                    report.refusals["item: has a line of a training text"] += len(result.items) - len(own)
                fresh = [item for item in own if _is_new(item[0]["text"], seen)]
                report.refusals["item: repeats another"] += len(own) - len(fresh)
                if fresh:
                    found.append(fresh)
                    bar.update(min(len(fresh), count - bar.n))
                # every document is asked for one; when these do, nobody is asked for a second
                if len(found) >= count:
                    break
    finally:
        results.close()
    items = [document[place] for place in range(per_document) for document in found if place < len(document)][:count]
    if not items:
        raise ValueError(f"none of the {report.pages} pages gave anything: {dict(report.refusals.most_common(5))}")
    report.documents = len({item[0]["source"].rsplit("#", 1)[0] for item in items})
    report.rows = write_shards((row for item in items for row in item), out, rows_per_shard=500)
    report.seconds = time.perf_counter() - begin
    report.save(Path(out), packages=packages, heights=heights, items=len(items), seed=seed, split="validation")
    return report


def found_in(
    packages: Sequence[str],
    cut: Callable[..., Iterator[list[Cutout]]],
    heights: Sequence[float],
    per_document: int,
    *,
    seed: int = 0,
    workers: int = 1,
) -> Iterator[Found | Failure]:
    """What each document of any packages gives, in an order drawn by the seed; nothing is written.

    A set to be measured on is `build_at_heights`, which takes held-out packages alone. Close the iterator to stop.
    """
    results = run_guarded(
        lambda task: _items_of(task, cut, heights),
        _plan(packages, seed, per_document),
        workers=workers,
        seconds=lambda task: DOCUMENT_SECONDS,
    )
    try:
        for _, result in results:
            yield result
    finally:
        results.close()


def _is_new(text: str, seen: set[int]) -> bool:
    """Whether at most `MOST_SHARED` of a text was there before; what is new is noted in ``seen``."""
    marks = set(heldout.fingerprints(text))
    if len(marks & seen) > MOST_SHARED * len(marks):
        return False
    seen |= marks
    return True


def _plan(packages: Sequence[str], seed: int, most: int) -> list[DocumentTask]:
    """All documents of the packages in an order drawn by the seed, with pages drawn likewise."""
    tasks = []
    for package in packages:
        for document, pages in list_documents(package):
            rng = np.random.default_rng([seed, zlib.crc32(f"{package}/{document}".encode())])
            chosen = rng.permutation(pages)[:LOOKED_AT].tolist()
            tasks.append(DocumentTask(package, document, tuple(chosen), most, seed))
    return [tasks[index] for index in np.random.default_rng(seed).permutation(len(tasks))]


def _items_of(task: DocumentTask, cut, heights: Sequence[float]) -> Found:
    """To be called in a worker."""
    found, begin = Found(), time.perf_counter()
    try:
        document = pdfium.PdfDocument(fetch_deb(task.package) / task.document)
    except pdfium.PdfiumError:
        found.refusals["document: cannot be opened"] += 1
        return found

    def edges(number: int):
        try:
            return page_edges(document[number]) if 0 <= number < len(document) else None
        except pdfium.PdfiumError:
            return None

    for number in task.pages:
        if len(found.items) >= task.most:
            break
        found.pages += 1
        rng = np.random.default_rng([task.seed, zlib.crc32(f"{task.package}/{task.document}".encode()), number])
        try:
            page = document[number]
            cutouts = next(cut(page, heights, rng, found.refusals, lambda k, n=number: edges(n + k)), None)
            page.close()
        except PageRefused as refused:
            found.refusals[f"page: {refused}"] += 1
            continue
        except pdfium.PdfiumError:
            found.refusals["page: cannot be rendered"] += 1
            continue
        if cutouts is None:
            continue
        found.pages_used += 1
        source = f"{task.package}/{task.document}#{number + 1}"
        found.items.append([_row(cutout, height, source) for cutout, height in zip(cutouts, heights, strict=True)])
    document.close()
    found.seconds = time.perf_counter() - begin
    return found


def _row(cutout: Cutout, height: float, source: str) -> dict[str, Any]:
    return make_row(
        cutout.pixels,
        cutout.text,
        task="ocr",
        kind="document",
        words=words_with_boxes(cutout.text, cutout.boxes),
        char_boxes=cutout.boxes,
        x_height=height,
        source=source,
        license=PAGE_LICENSE,
        split="validation",
    )


def _blocks_of_page(page, heights, rng, refusals: Counter, neighbours) -> Iterator[list[Cutout]]:
    """Paragraphs that can be cut out along white space at every x-height; the first is taken."""
    try:
        glyphs = read_glyphs(page)
    except ValueError:
        raise PageRefused("too many characters") from None
    lines = find_lines(glyphs)
    if not is_english(line.text for line in lines if not line.refused):
        raise PageRefused("not English")
    paragraphs = [part for chain in chain_lines(lines) for part in split_paragraphs(chain)]
    for index in rng.permutation(len(paragraphs)):
        paragraph = paragraphs[index]
        margins = int(rng.integers(2**32))
        found = words("\n".join(line.text for line in paragraph))
        if not BLOCK_LINES[0] <= len(paragraph) <= BLOCK_LINES[1] or len(found) < BLOCK_WORDS:
            refusals["block: size"] += 1
            continue
        if sum(word in STOP_WORDS["en"] for word in found) < 0.1 * len(found):
            refusals["block: not prose"] += 1
            continue
        if len(set(found)) < MIN_DIFFERENT["block"] * len(found):
            refusals["block: repeats itself"] += 1
            continue
        cutouts = _block_at_heights(page, glyphs, paragraph, heights, margins)
        if isinstance(cutouts, str):
            refusals[f"block: {cutouts}"] += 1
        else:
            yield cutouts


def _block_at_heights(page, glyphs, lines: list[Line], heights: Sequence[float], margins: int) -> list[Cutout] | str:
    """The same lines at each x-height with the same margins, or why that cannot be."""
    x_height = float(np.median([line.x_height for line in lines]))
    cutouts = []
    for number, height in enumerate(heights):
        rendered = RenderedPage(page, glyphs, height / x_height)
        # What ink shows at the largest is so at all; thin strokes of small type would pass for missing ones.
        cutout = rendered.cut(lines, np.random.default_rng(margins), rule_share=0, check_ink=number == 0)
        if isinstance(cutout, str):
            return cutout
        cutouts.append(cutout)
    return cutouts


def whole_page(page, heights, rng, refusals: Counter, neighbours) -> Iterator[list[Cutout]]:
    """A page at every x-height, for `build_at_heights`."""
    text = read_page(page, neighbours=neighbours, max_unmapped=0.0)
    found = words("\n".join(line.text for block in text.blocks for line in block.lines))
    if len(found) < PAGE_WORDS[0]:
        raise PageRefused("few words")
    different = {word for word in found if word.isalpha()}
    if len(different & STOP_WORDS["en"]) < MIN_ENGLISH * len(different):
        raise PageRefused("not prose")
    if len(set(found)) < MIN_DIFFERENT["page"] * len(found):
        raise PageRefused("repeats itself")
    if len(found) > PAGE_WORDS[1]:
        raise PageRefused("many words")
    cutouts = []
    for number, height in enumerate(heights):
        cutout = page_cutout(render_page(page, text, height), text)
        if number == 0:
            if "\ufffd" in cutout.text:
                raise PageRefused("text layer")
            visible = np.array([not character.isspace() for character in cutout.text])
            if foreign_ink(cutout.pixels, cutout.boxes[visible]) > MOST_FOREIGN_INK:
                raise PageRefused("foreign ink")
        cutouts.append(cutout)
    yield cutouts


def foreign_ink(pixels: np.ndarray, boxes: np.ndarray) -> float:
    """Share of a page's ink that lies in no character's box, a pixel around each left aside.

    Args:
        pixels: (H, W) uint8; the most frequent grey is taken for the paper.
        boxes: (N, 4) int, pixel boxes of the visible characters.
    """
    paper = int(np.bincount(pixels.reshape(-1), minlength=256).argmax())
    ink = np.abs(pixels.astype(np.int16) - paper) > 48
    total = int(ink.sum())
    for x0, y0, x1, y1 in boxes.tolist():
        ink[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False
    return int(ink.sum()) / max(total, 1)
