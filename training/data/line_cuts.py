"""Pages -> lines of text as a `Reader` cuts them: what a model that reads line by line should learn from.

A page is cut by the very code that cuts pages for reading (`modeling_unit/layout_unit.py`), and each cut gets the
characters that lie in it. What the cutting does to a page (sizes and baselines measured on the ink, small type
enlarged, paper whitened, other lines painted over) is so in the training data as it will be when the model reads.

Every number here is ours.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pypdfium2 as pdfium
from PIL import Image

from modeling_unit.layout_unit import LayoutSettings, PageLayout, analyse_page

from .pdf import CUT_PAGE_X_HEIGHT, MAX_UNMAPPED, Cutout
from .pdf_pages import PageRefused, page_cutout, read_page, render_page

# A strip of one patch: ascenders of common faces rise to 1.6 x-heights, descenders go to 0.5 below the baseline
LINE_HEIGHT, BASELINE, LINE_X_HEIGHT = 16, 12.1, 7.5  # px
LINES = LayoutSettings(
    x_height=LINE_X_HEIGHT, min_x_height=0.9 * LINE_X_HEIGHT, line_height=LINE_HEIGHT, baseline=BASELINE
)
MAX_FOREIGN = 0.06  # share of a cut's columns that may show ink where no character is
MAX_BARE = 0.06  # share of its characters that may show no ink
MAX_SYMBOLS = 0.2  # share of characters that no keyboard has


def line_cutouts(
    layout: PageLayout,
    text: str,
    boxes: np.ndarray,
    refuse: Callable[[str], None],
    unwanted: Callable[[str], bool] = lambda text: False,
    any_script: bool = False,
) -> Iterator[Cutout]:
    """The cuts of a page with what is printed in them.

    Args:
        layout: of the page, upright and not reduced, made with a `line_height`.
        text: of the page in reading order, `\\n` between printed lines.
        boxes: `(len(text), 4)` in pixels of the page, zeros for white space.
        refuse: is told why a cut is left out: `no characters`, `two lines` or `order` (its characters are no run of
            one line), `symbols`, `held out`, `foreign ink`, `bare` (characters without ink).
        unwanted: texts that must not come out.
        any_script: letters and digits of every script are no symbols; else only those of an English keyboard.

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
        symbols = sum(not (" " <= c <= "~" or (any_script and _of_a_word(c))) for c in part)
        if "\ufffd" in part or symbols > max(1, MAX_SYMBOLS * len(part)):
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


def _of_a_word(character: str) -> bool:
    """Whether it is a letter, an accent or vowel sign set beside one, or a digit, of any script."""
    return unicodedata.category(character)[0] in "LMN"


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


def lines_of_page(
    page: pdfium.PdfPage,
    rng: np.random.Generator,
    refusals: Counter,
    *,
    unwanted: Callable[[str], bool] = lambda text: False,
    x_height: tuple[float, float] = CUT_PAGE_X_HEIGHT,
    english: bool = True,
    max_unmapped: float = MAX_UNMAPPED,
    settings: LayoutSettings = LINES,
) -> Iterator[Cutout]:
    """The lines of one page of a PDF, drawn at an x-height from the range `x_height` and cut as for reading.

    Args:
        page: the page.
        rng: draws the x-height.
        refusals: counts why the page (`page: ...`) or lines of it (`line: ...`, see `line_cutouts`) were refused.
        unwanted: texts that must not come out.
        x_height: px, least and most, drawn evenly in its logarithm.
        english: refuse pages in other languages, and lines that are mostly letters of other scripts.
        max_unmapped: the share of characters without Unicode that a page may have; no line with one comes out.
        settings: of the cutting.
    """
    try:
        content = read_page(page, english=english, max_unmapped=max_unmapped)
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

    yield from line_cutouts(layout, cutout.text, cutout.boxes, refuse, unwanted, any_script=not english)
