"""Pages of PDF documents -> lines of text with a box per character -> chunks to learn from, blocks to be tested on.

The path of a page: `read_glyphs` (what the text layer says is printed where), `find_lines` (characters to lines, each
line either usable or refused with a reason), `chain_lines` (lines to paragraphs), then a cut-out of one to three lines
(`build_chunks`) or of a whole paragraph (`build_blocks`). A cut-out is kept only when the rendered ink agrees with the
text layer: ink where characters should be, none elsewhere.

Lengths are in PDF points with the origin at the top left of the page until a name ends in ``_px``.
Every number without a source is ours, chosen by looking at the pages it kept and refused.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from .guarded import Failure, run_guarded
from .schema import make_row, write_shards
from .sources import cache_root, fetch_deb
from .text import normalize_character, words

log = logging.getLogger(__name__)

X_HEIGHT_LETTERS = frozenset("acemnorsuvwxz")
SOFT_HYPHENS = frozenset((0x02, 0xAD, 0xFFFE))  # what pdfium reports for a hyphen that divides a word at a line's end
# Beyond printable ASCII; one in thirty characters of a line at most.
ALLOWED_OTHERS = frozenset("àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿßœÀÁÂÄÅÇÈÉÊÖØÜŠšŽžčćřłő•§©®°±×€£¶µ¿¡")
_ENGLISH = """
the of and to a in is that it for as with be by this are on or an not which from can if you will at have we has but was
one when all used there may use more other these its their than into also so only they any should some been i your
between each such no first using then does how
"""
_OTHERS = """
der die das und ist nicht mit auf den von ein eine werden wird zu für dem als auch le la les des et est une un que pour
dans qui sur avec par pas du el los las una por con para del se lo il che di non per sono della het een van en dat niet
met voor zijn de os um uma não com
"""
STOP_WORDS = {"en": frozenset(_ENGLISH.split()), "other": frozenset(_OTHERS.split())}
SYMBOL_FONTS = re.compile(
    r"(^|\+)(CM(B?SY|EX)|LMMath(Symbols|Extension)|MSAM|MSBM|stmary|wasy|[tp]xsy|[tp]xex|EUF|rsfs|bbding|fdsymbol)"
    r"|dingbats|awesome|marvosym|wingding|webding|MathDesign-.*-(Symbol|Extension)|^([A-Z]{6}\+)?Symbol",
    re.IGNORECASE,
)
# Of the letters of TeX's symbol encoding (The TeXbook, appendix F, figure 5) those that look like something on a
# keyboard; the capitals are calligraphic ones.
_SYMBOL_LETTERS = {ord(code): ord(shown) for code, shown in zip("fghijn", "{}<>|\\", strict=True)}
_SYMBOL_LETTERS |= {code: code for code in (*range(ord("A"), ord("Z") + 1), *map(ord, "{}|\\"))}
_SYMBOL_SUSPECTS = frozenset(map(ord, "fghijknJK79"))
PAGE_LICENSE = "as its TeX Live package (LPPL or another free licence)"

MAX_CHARACTERS = 200_000  # of a page; a dense one of a newspaper has 30,000
MAX_UNMAPPED = 0.02  # share of a page's characters without Unicode; 2% of TeX Live's pages have more
MAX_AREA = 65536  # pixels of a chunk: the x4 budget of unit-tiny, 256x256
MAX_WIDTH = 1024
PAGE_X_HEIGHT = (7.0, 13.0)  # px, drawn per page of chunks
CUT_PAGE_X_HEIGHT = (2.8, 15.0)  # px, drawn per page that is cut into lines as for reading, log-uniform
BLOCK_X_HEIGHT = (8.0, 14.0)  # px, drawn per block: the range the figures are asked for
LINE_X_HEIGHT = (6.0, 20.0)  # px; lines outside are dropped
LINES_PER_CHUNK = (0.45, 0.30, 0.25)  # share of chunks with 1, 2, 3 lines
PAGES_PER_PDF = 15
PAGES_PER_TASK = 3


# ------------------------------------------------------------------------------------------------ glyphs of a page


@dataclass
class Glyphs:
    """The visible characters of a page, in content order. N characters, points from the top left."""

    codes: list[int]  # unicode code points, N
    boxes: np.ndarray  # (N, 4) x0, y0, x1, y1 of the ink
    baselines: np.ndarray  # (N,)
    spaced: list[bool]  # N, whether the text layer has white space before the character
    upright: list[bool]  # N
    width: float
    height: float


def read_glyphs(page: pdfium.PdfPage, most: int = MAX_CHARACTERS) -> Glyphs:
    """Read the text layer of ``page`` character by character, as the page is shown: turned by its ``/Rotate``, and
    placed in the part of its boxes (its own or inherited) that is rendered.

    Raises:
        ValueError: the page holds more than ``most`` characters.
    """
    textpage = page.get_textpage()
    raw = textpage.raw
    x0, x1, y0, y1, ox, oy = (ctypes.c_double() for _ in range(6))
    p0, p1, q0, q1, po, qo = (ctypes.byref(value) for value in (x0, x1, y0, y1, ox, oy))
    get_code, get_box = pdfium_c.FPDFText_GetUnicode, pdfium_c.FPDFText_GetCharBox
    get_origin, get_angle = pdfium_c.FPDFText_GetCharOrigin, pdfium_c.FPDFText_GetCharAngle
    fonts = _FontNames(raw)
    codes, boxes, origins, spaced, upright = [], [], [], [], []
    turned = math.radians(page.get_rotation())
    space = True
    angle_ok = True
    count = pdfium_c.FPDFText_CountChars(raw)
    if count > most:
        textpage.close()
        raise ValueError(f"more than {most} characters")
    for index in range(count):
        code = get_code(raw, index)
        if code in (32, 10, 13, 9, 0xA0):
            space = True
            continue
        if 0xDC00 <= code <= 0xDFFF and codes and 0xD800 <= codes[-1] <= 0xDBFF:  # pdfium speaks UTF-16
            codes[-1] = 0x10000 + ((codes[-1] - 0xD800) << 10) + code - 0xDC00
            continue
        get_box(raw, index, p0, p1, q0, q1)
        get_origin(raw, index, po, qo)
        if space or not angle_ok:  # the angle is asked once a word: it cannot change within
            angle_ok = abs(math.sin((get_angle(raw, index) + turned) / 2)) < 5e-4
        # Symbol fonts without a ToUnicode table pass as letters. Asking for every font would double the time.
        if (space or code in _SYMBOL_SUSPECTS) and code < 128 and fonts.is_symbols(index):
            code = _SYMBOL_LETTERS.get(code, 0xFFFD)
        codes.append(code)
        boxes.append((x0.value, y0.value, x1.value, y1.value))
        origins.append((ox.value, oy.value))
        spaced.append(space)
        upright.append(angle_ok)
        space = False
    textpage.close()
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 2)
    corners = _as_shown(corners, page).reshape(-1, 2, 2)
    shown = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    baselines = _as_shown(np.array(origins, dtype=np.float64).reshape(-1, 2), page)[:, 1].copy()
    glyphs = Glyphs(codes, shown, baselines, spaced, upright, *page.get_size())
    return _on_the_page(glyphs)


def _on_the_page(glyphs: Glyphs) -> Glyphs:
    """Without the characters whose middle is cropped away; what follows one of them begins a word."""
    middle = (glyphs.boxes[:, :2] + glyphs.boxes[:, 2:]) / 2
    inside = ((middle >= 0) & (middle <= (glyphs.width, glyphs.height))).all(axis=1)
    if inside.all():
        return glyphs
    kept = np.flatnonzero(inside).tolist()
    after_a_gap = [index > 0 and not inside[index - 1] for index in kept]
    return Glyphs(
        [glyphs.codes[index] for index in kept],
        glyphs.boxes[inside],
        glyphs.baselines[inside],
        [glyphs.spaced[index] or gap for index, gap in zip(kept, after_a_gap, strict=True)],
        [glyphs.upright[index] for index in kept],
        glyphs.width,
        glyphs.height,
    )


def _as_shown(points: np.ndarray, page: pdfium.PdfPage) -> np.ndarray:
    """(N, 2) points of user space to points from the top left of the page as it is rendered."""
    # Not get_cropbox(), which does not know the boxes that a page inherits.
    left, bottom, right, top = page.get_bbox()
    x, y = points.T
    quarter = page.get_rotation() // 90 % 4  # clockwise
    turned = ((x - left, top - y), (y - bottom, x - left), (right - x, y - bottom), (top - y, right - x))
    return np.stack(turned[quarter], axis=1)


class _FontNames:
    """Tells which characters of a text page are set in a font of symbols, by the font's name."""

    def __init__(self, textpage):
        self.textpage = textpage
        self.buffer = ctypes.create_string_buffer(128)
        self.flags = ctypes.c_int()
        self.known: dict[bytes, bool] = {}

    def is_symbols(self, index: int) -> bool:
        pdfium_c.FPDFText_GetFontInfo(self.textpage, index, self.buffer, 128, ctypes.byref(self.flags))
        name = self.buffer.value
        if name not in self.known:
            self.known[name] = bool(SYMBOL_FONTS.search(name.decode("latin-1")))
        return self.known[name]


# ------------------------------------------------------------------------------------------------- glyphs to lines


@dataclass
class Line:
    """A run of characters on one baseline with no wide gap in it."""

    first: int  # glyphs first … last - 1 of the page
    last: int
    box: tuple[float, float, float, float]
    baseline: float
    x_height: float = 0.0
    text: str = ""
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # (len(text), 4), zeros for spaces
    refused: str = ""  # why the line is not used; empty for a good one
    runs: tuple[tuple[int, int], ...] = ()  # all its runs of glyphs where it has several: cells, what a column cut off


def find_lines(glyphs: Glyphs) -> list[Line]:
    """Cut the characters of a page into lines, in content order; a line that is not fit for use says why."""
    if not glyphs.codes:
        return []
    lines = [_make_line(glyphs, start, end) for start, end in find_runs(glyphs)]
    _refuse_fragments(lines)
    return lines


def find_runs(glyphs: Glyphs) -> list[tuple[int, int]]:
    """Cut the characters of a page into runs on one baseline with no wide gap: (first, last + 1), in content order."""
    page_x_height = _page_x_height(glyphs)
    boxes, baselines = glyphs.boxes.tolist(), glyphs.baselines.tolist()
    runs = []
    start = 0
    for index in range(1, len(boxes) + 1):
        if index == len(boxes) or not _continues(boxes, baselines, start, index, page_x_height):
            runs.append((start, index))
            start = index
    return runs


def _page_x_height(glyphs: Glyphs) -> float:
    """Median ink height of the letters that have x-height, in points; 0.6 of all heights when there are none."""
    heights = glyphs.boxes[:, 3] - glyphs.boxes[:, 1]
    letters = [chr(code) in X_HEIGHT_LETTERS for code in glyphs.codes]
    if sum(letters) >= 5:
        return float(max(np.median(heights[letters]), 0.5))
    return float(max(0.6 * np.median(heights), 0.5))


def _continues(boxes: list[list[float]], baselines: list[float], start: int, index: int, page_x_height: float) -> bool:
    """Whether glyph ``index`` belongs to the line that began at ``start`` and holds glyph ``index - 1``."""
    box, before = boxes[index], boxes[index - 1]
    scale = max(page_x_height, 0.45 * (before[3] - before[1]))
    if box[0] < before[0] - 0.3 * scale or box[0] - before[2] > 3.0 * scale:
        return False
    # Superscripts rise by 0.8 x-heights; the baseline of the line is that of most of its last characters.
    recent = sorted(baselines[max(start, index - 7) : index])
    middle = (recent[len(recent) // 2] + recent[(len(recent) - 1) // 2]) / 2
    return abs(baselines[index] - middle) <= 1.05 * scale


def _make_line(glyphs: Glyphs, first: int, last: int) -> Line:
    boxes = glyphs.boxes[first:last]
    box = (boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max(), boxes[:, 3].max())
    line = Line(first, last, tuple(map(float, box)), float(np.median(glyphs.baselines[first:last])))
    heights = boxes[:, 3] - boxes[:, 1]
    characters = [chr(code) for code in glyphs.codes[first:last]]
    low = [character in X_HEIGHT_LETTERS for character in characters]
    tall = [character.isupper() or character.isdigit() for character in characters]
    if sum(low) >= 3:
        line.x_height = float(np.median(heights[low]))
    elif any(tall):
        line.x_height = 0.66 * float(np.median(heights[tall]))  # x-height to capital height of common book faces
    if line.x_height <= 0.2:
        line.refused = "no letters"
        return line
    if not all(glyphs.upright[first:last]):
        line.refused = "not upright"
        return line
    set_text(line, glyphs)
    if not line.refused:
        line.refused = _text_fault(line, glyphs)
    return line


def set_text(line: Line, glyphs: Glyphs, *, any_script: bool = False) -> None:
    """Fill ``text`` and ``boxes``: one entry a normalised character, spaces put where the page shows them.

    With ``any_script`` no line is refused: letters of all scripts pass, and what has no Unicode becomes U+FFFD.
    """
    # Slanted letters overhang: in a page read whole, next to nothing must be seen of a space.
    least_gap = (0.05 if any_script else 0.25) * line.x_height
    text: list[str] = []
    boxes: list[tuple[float, float, float, float]] = []
    others = 0
    ink = glyphs.boxes[line.first : line.last].tolist()
    index = line.first
    while index < line.last:
        # A ligature may come as several characters that share one box.
        box = ink[index - line.first]
        end = index + 1
        while end < line.last and not glyphs.spaced[end] and ink[end - line.first] == box:
            end += 1
        new = ""
        for code in glyphs.codes[index:end]:
            if code in SOFT_HYPHENS:
                new += "-"
            elif has_no_unicode(code):
                if not any_script:
                    line.refused = "no unicode"
                    return
                new += "\ufffd"
            else:
                new += normalize_character(chr(code))
        if any_script:
            new = new.replace(" ", "")  # what NFKC makes of a few spacing accents
        for character in new:
            if not (" " < character <= "~"):
                if character not in ALLOWED_OTHERS and not any_script:
                    line.refused = "symbols"
                    return
                others += 1
        if not new:
            index = end
            continue
        x0, y0, x1, y1 = box
        if text:
            gap = x0 - ink[index - 1 - line.first][2]
            # A gap of 1.2 x-heights is a space even when the text layer has none; in a fixed-width font narrower
            # ones need not be. A space where nothing can be seen is letter-spacing or kerning.
            if gap > 1.2 * line.x_height or (glyphs.spaced[index] and gap > least_gap):
                text.append(" ")
                boxes.append((0.0, 0.0, 0.0, 0.0))
        for part in range(len(new)):
            text.append(new[part])
            boxes.append((x0 + (x1 - x0) * part / len(new), y0, x0 + (x1 - x0) * (part + 1) / len(new), y1))
        index = end
    line.text = "".join(text)
    line.boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    if others > max(1, len(text) * 0.03) and not any_script:
        line.refused = "symbols"


def has_no_unicode(code: int) -> bool:
    """Whether a code point of a text layer names no character: control, private use, surrogate, U+FFFD, U+FFFF."""
    return (
        (code < 32 and code not in SOFT_HYPHENS)
        or 0xD800 <= code <= 0xF8FF
        or code in (0xFFFD, 0xFFFF)
        or code >= 0xF0000
    )


def _text_fault(line: Line, glyphs: Glyphs) -> str:
    """Why a line with readable characters is still no line of text; empty when it is one."""
    visible = line.text.replace(" ", "")
    letters = sum(character.isalpha() for character in visible)
    if len(visible) < 2 or letters < 2:
        return "no letters"
    if letters < 0.3 * len(visible) or sum(character.isalnum() for character in visible) < 0.55 * len(visible):
        return "few letters"
    tokens = line.text.split(" ")
    if len(tokens) >= 4 and sum(len(token) == 1 for token in tokens) > 0.4 * len(tokens):
        return "single letters"  # formulas, letter-spaced words, leader dots
    if ". . ." in line.text or "......" in line.text:
        return "leader dots"
    boxes = glyphs.boxes[line.first : line.last]
    shifted = np.abs(glyphs.baselines[line.first : line.last] - line.baseline) > 0.3 * line.x_height
    if shifted.sum() > max(2, 0.08 * len(shifted)):
        return "baselines"
    widths = np.maximum(np.minimum(boxes[1:, 2] - boxes[1:, 0], boxes[:-1, 2] - boxes[:-1, 0]), 1e-3)
    overlap = boxes[:-1, 2] - boxes[1:, 0]
    shared = (boxes[1:] == boxes[:-1]).all(axis=1)
    # The A of the LaTeX logo lies to 0.65 within its L; an accent set over a letter lies wholly in it.
    if ((overlap / widths > 0.75) & ~shared).any():
        return "overprinted"
    if (boxes[:, 3] - boxes[:, 1]).max() > 4.5 * line.x_height:
        return "tall glyph"
    return ""


def _refuse_fragments(lines: list[Line]) -> None:
    """Refuse lines that go on, beyond a gap too small to be a column's, in another run of characters."""
    for one in lines:
        for other in lines:
            if one is other or one.refused:
                continue
            reach = 1.5 * max(one.x_height, 1e-3)
            middle = one.baseline - 0.5 * one.x_height
            beside = other.box[1] < middle + 0.5 * one.x_height and other.box[3] > middle - 0.5 * one.x_height
            near = other.box[0] < one.box[2] + reach and other.box[2] > one.box[0] - reach
            if beside and near:
                one.refused = "fragment"


def chain_lines(lines: list[Line]) -> list[list[Line]]:
    """Good lines to paragraphs: runs of lines one below the other, alike in size, evenly spaced, overlapping in x.

    Every good line is in exactly one chain; a line on its own is a chain of one.
    """
    following: dict[int, int] = {}
    for i, one in enumerate(lines):
        nearest = min(
            (
                j
                for j, other in enumerate(lines)
                if other.baseline > one.baseline + one.x_height and _overlaps(one, other)
            ),
            key=lambda j: lines[j].baseline,
            default=None,
        )
        if nearest is None or one.refused or lines[nearest].refused:
            continue
        other = lines[nearest]
        pitch = other.baseline - one.baseline
        alike = 0.9 < other.x_height / one.x_height < 1.11
        if alike and pitch < 4.5 * one.x_height and nearest not in following.values():
            following[i] = nearest
    chains = []
    for i, line in enumerate(lines):
        if line.refused or i in following.values():
            continue
        chain = [line]
        pitch = 0.0
        while i in following:
            step = lines[following[i]].baseline - lines[i].baseline
            i = following[i]
            if pitch and abs(step - pitch) > 0.08 * pitch:
                chains.append(chain)
                chain, pitch = [], 0.0
            else:
                pitch = pitch or step
            chain.append(lines[i])
        chains.append(chain)
    return chains


def _overlaps(one: Line, other: Line) -> bool:
    shared = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    return shared > 0.5 * min(one.box[2] - one.box[0], other.box[2] - other.box[0])


def is_english(lines: Iterable[str]) -> bool:
    """Whether the words of ``lines`` are mostly English: common words frequent, and more so than other languages'."""
    found = [word for line in lines for word in words(line) if word.isalpha()]
    if len(found) < 20:
        return False
    english = sum(word in STOP_WORDS["en"] for word in found) / len(found)
    other = sum(word in STOP_WORDS["other"] for word in found) / len(found)
    return english >= 0.12 and english > 1.5 * other


# ----------------------------------------------------------------------------------------------- lines to cut-outs


@dataclass
class Cutout:
    """A piece of a rendered page with its text."""

    pixels: np.ndarray  # (H, W) uint8
    text: str
    boxes: np.ndarray  # (len(text), 4) int, pixels of the cut-out; zeros for white space
    x_height: float  # px


class RenderedPage:
    """A page as pixels, and the boxes of everything printed on it in those pixels."""

    def __init__(self, page: pdfium.PdfPage, glyphs: Glyphs, scale: float):
        bitmap = page.render(scale=scale, grayscale=True, draw_annots=False)
        self.pixels = bitmap.to_numpy().reshape(bitmap.height, bitmap.width).copy()  # (H, W)
        self.scale = np.array([bitmap.width / glyphs.width, bitmap.height / glyphs.height])
        self.glyph_boxes = glyphs.boxes * np.tile(self.scale, 2)

    def cut(
        self, lines: list[Line], rng: np.random.Generator, *, rule_share: float = 0.3, check_ink: bool = True
    ) -> Cutout | str:
        """Cut out ``lines`` with random margins of 2 to 8 px, or say why that cannot be done cleanly.

        Args:
            lines: one or more lines of one chain, from the top; with `part_of_line` also a piece of one.
            rng: draws the margins, and whether a cut-out with a rule in it is kept.
            rule_share: the share of cut-outs kept among those whose only foreign ink is a horizontal rule.
            check_ink: refuse a cut-out whose ink does not agree with the text layer.

        Returns:
            The cut-out, or the reason it was refused as one word or two.
        """
        scale = np.tile(self.scale, 2)
        spaces = np.concatenate([[c == " " for c in line.text] for line in lines])
        boxes = np.concatenate([line.boxes for line in lines]) * scale
        x0, y0 = boxes[~spaces, :2].min(axis=0)
        x1, y1 = boxes[~spaces, 2:].max(axis=0)
        margins = rng.uniform(2.0, 8.0, size=4)
        crop = np.array([x0, y0, x1, y1]) + margins * (-1, -1, 1, 1)
        crop = self._clear_of_neighbours(crop, (x0, y0, x1, y1), lines)
        if crop is None:
            return "neighbour"
        height, width = self.pixels.shape
        left, top = int(np.ceil(max(crop[0], 0))), int(np.ceil(max(crop[1], 0)))
        right, bottom = int(np.floor(min(crop[2], width))), int(np.floor(min(crop[3], height)))
        if left > x0 or top > y0 or right < x1 or bottom < y1:
            return "neighbour"
        pixels = self.pixels[top:bottom, left:right].copy()
        boxes[:, :2] = np.floor(boxes[:, :2])
        boxes[:, 2:] = np.ceil(boxes[:, 2:])
        boxes -= (left, top, left, top)
        boxes = boxes.clip(0, (right - left, bottom - top) * 2)
        boxes[spaces] = 0
        fault = ink_fault(pixels, boxes[~spaces].astype(int)) if check_ink else ""
        if fault and not (fault == "rule" and rng.random() < rule_share):
            return fault
        text, with_breaks, at = [], [], 0
        for line in lines:
            if text:
                with_breaks.append(np.zeros((1, 4)))
            text.append(line.text)
            with_breaks.append(boxes[at : at + len(line.text)])
            at += len(line.text)
        x_height = float(np.mean([line.x_height for line in lines]) * self.scale[1])
        return Cutout(pixels, "\n".join(text), np.concatenate(with_breaks).astype(int), x_height)

    def _clear_of_neighbours(self, crop, ink, lines: list[Line]):
        """Shrink ``crop`` to half the gap to everything printed that is not of ``lines``; None where they touch."""
        x0, y0, x1, y1 = ink
        others = np.ones(len(self.glyph_boxes), dtype=bool)
        for line in lines:
            for first, last in line.runs or ((line.first, line.last),):
                others[first:last] = False
        near = self.glyph_boxes[others]
        grown = crop + (-2, -2, 2, 2)
        near = near[
            (near[:, 0] < grown[2]) & (near[:, 2] > grown[0]) & (near[:, 1] < grown[3]) & (near[:, 3] > grown[1])
        ]
        crop = crop.copy()
        for nx0, ny0, nx1, ny1 in near:
            if ny1 < y0 - 0.5:
                crop[1] = max(crop[1], (ny1 + y0) / 2)
            elif ny0 > y1 + 0.5:
                crop[3] = min(crop[3], (ny0 + y1) / 2)
            elif nx1 < x0 - 0.5:
                crop[0] = max(crop[0], (nx1 + x0) / 2)
            elif nx0 > x1 + 0.5:
                crop[2] = min(crop[2], (nx0 + x1) / 2)
            else:
                return None
        return crop


def part_of_line(line: Line, start: int, end: int, glyphs: Glyphs) -> Line:
    """The words of ``line.text[start:end]`` as a line of its own; both ends must be word boundaries."""
    boxes = line.boxes[start:end]
    visible = np.array([character != " " for character in line.text[start:end]])
    box = (*boxes[visible, :2].min(axis=0), *boxes[visible, 2:].max(axis=0))
    inside = [
        index
        for index in range(line.first, line.last)
        if box[0] - 1e-6 <= glyphs.boxes[index][0] and glyphs.boxes[index][2] <= box[2] + 1e-6
    ]
    return Line(
        inside[0], inside[-1] + 1, tuple(map(float, box)), line.baseline, line.x_height, line.text[start:end], boxes
    )


def ink_fault(pixels: np.ndarray, boxes: np.ndarray) -> str:
    """Compare the ink of a cut-out with the boxes of its characters.

    Args:
        pixels: (H, W) uint8; the most frequent grey is taken for the paper.
        boxes: (N, 4) int, pixel boxes of the visible characters.

    Returns:
        Empty when all is well, ``"rule"`` when the only foreign ink is a thin horizontal line, else the reason.
    """
    paper = int(np.bincount(pixels.reshape(-1), minlength=256).argmax())
    difference = np.abs(pixels.astype(np.int16) - paper)
    outside = difference > 48
    contrast = np.empty(len(boxes))
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        contrast[index] = difference[y0:y1, x0:x1].max(initial=0)
        # Anti-aliasing, hinting and rounded corners reach a pixel beyond the outline.
        outside[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False
    typical = np.median(contrast)
    if typical < 80:
        return "faint"
    if (contrast < 0.35 * typical).mean() > 0.02:
        return "missing ink"
    count = int(outside.sum())
    if count <= 3:
        return ""
    rows = outside.sum(axis=1)
    rows = rows[rows > 0]
    if len(rows) <= 4 and rows.max() > 0.3 * pixels.shape[1]:
        return "rule"
    return "foreign ink"


def chunks_of_page(
    page: pdfium.PdfPage,
    rng: np.random.Generator,
    refusals: Counter,
    *,
    unwanted: Callable[[str], bool] = lambda text: False,
    x_height: tuple[float, float] = PAGE_X_HEIGHT,
) -> Iterator[Cutout]:
    """Cut one page into chunks of one to three lines, each line used at most once.

    Args:
        page: the page.
        rng: draws the scale, the lines per chunk and the margins.
        refusals: counts why pages (``page: …``), lines (``line: …``) and chunks (``chunk: …``) were refused.
        unwanted: texts that must not come out, e.g. those that the validation data holds.
        x_height: the range that the page's own is drawn from, in pixels.
    """
    prepared = _prepare_page(page, refusals)
    if prepared is None:
        return
    glyphs, lines = prepared
    good = [line for line in lines if not line.refused]
    median = float(np.median(np.repeat([line.x_height for line in good], [len(line.text) for line in good])))
    rendered = RenderedPage(page, glyphs, rng.uniform(*x_height) / median)
    per_point = rendered.scale

    def fits(some: list[Line]) -> bool:
        width = (max(line.box[2] for line in some) - min(line.box[0] for line in some)) * per_point[0] + 16
        height = (max(line.box[3] for line in some) - min(line.box[1] for line in some)) * per_point[1] + 16
        return width <= MAX_WIDTH and width * height <= MAX_AREA

    for chain in chain_lines(lines):
        at = 0
        while at < len(chain):
            count = min(1 + int(rng.choice(3, p=LINES_PER_CHUNK)), len(chain) - at)
            while count > 1 and not fits(chain[at : at + count]):
                count -= 1
            some = chain[at : at + count]
            at += count
            if not all(LINE_X_HEIGHT[0] <= line.x_height * per_point[1] <= LINE_X_HEIGHT[1] for line in some):
                refusals["chunk: size of type"] += 1
                continue
            if unwanted("\n".join(line.text for line in some)):
                refusals["chunk: held out"] += 1
                continue
            # One line in seven is cut short at a space, so that a chunk does not always end where a column does.
            if count == 1 and (not fits(some) or rng.random() < 0.15):
                some = _random_part(some[0], fits, rng, glyphs)
                if some is None:
                    refusals["chunk: too large"] += 1
                    continue
                if unwanted(some[0].text):  # a part of a line may be a line elsewhere
                    refusals["chunk: held out"] += 1
                    continue
            cutout = rendered.cut(some, rng)
            if isinstance(cutout, str):
                refusals[f"chunk: {cutout}"] += 1
            else:
                yield cutout


def blocks_of_page(
    page: pdfium.PdfPage, rng: np.random.Generator, refusals: Counter, *, most: int = 3
) -> Iterator[Cutout]:
    """Cut whole paragraphs out of a page: 2 to 12 lines, at least 15 words, x-height drawn from 8 to 14 px for each.

    Args:
        page: the page.
        rng: draws which paragraphs (at most ``most``), their scale and the margins.
        refusals: counts why pages, lines and blocks (``block: …``) were refused.
        most: how many to take from a page.
    """
    prepared = _prepare_page(page, refusals)
    if prepared is None:
        return
    glyphs, lines = prepared
    paragraphs = [lines for chain in chain_lines(lines) for lines in split_paragraphs(chain)]
    taken = 0
    for index in rng.permutation(len(paragraphs)):
        paragraph = paragraphs[index]
        found = words("\n".join(line.text for line in paragraph))
        if not 2 <= len(paragraph) <= 12 or len(found) < 15:
            refusals["block: size"] += 1
            continue
        if sum(word in STOP_WORDS["en"] for word in found) < 0.1 * len(found):
            refusals["block: not prose"] += 1
            continue
        x_height = float(np.median([line.x_height for line in paragraph]))
        cutout = RenderedPage(page, glyphs, rng.uniform(*BLOCK_X_HEIGHT) / x_height).cut(paragraph, rng, rule_share=0)
        if isinstance(cutout, str):
            refusals[f"block: {cutout}"] += 1
            continue
        yield cutout
        taken += 1
        if taken == most:
            return


def split_paragraphs(chain: list[Line]) -> list[list[Line]]:
    """Cut a chain of lines before each indented line and after each line that ends well short of the others."""
    left = float(np.median([line.box[0] for line in chain]))
    right = max(line.box[2] for line in chain)
    paragraphs = [[chain[0]]]
    for before, line in pairwise(chain):
        indented = line.box[0] - left > line.x_height and line.box[0] - before.box[0] > line.x_height
        short = right - before.box[2] > 0.3 * (right - left)
        if indented or short:
            paragraphs.append([])
        paragraphs[-1].append(line)
    return paragraphs


def _prepare_page(page: pdfium.PdfPage, refusals: Counter) -> tuple[Glyphs, list[Line]] | None:
    """Glyphs and lines of a page of English text; None (and a count of the reason) for any other page."""
    try:
        glyphs = read_glyphs(page)
    except ValueError:
        refusals["page: too many characters"] += 1
        return None
    if len(glyphs.codes) < 60:
        refusals["page: little text"] += 1
        return None
    if sum(map(has_no_unicode, glyphs.codes)) > MAX_UNMAPPED * len(glyphs.codes):
        refusals["page: text layer"] += 1
        return None
    lines = find_lines(glyphs)
    good = [line for line in lines if not line.refused]
    refusals.update(f"line: {line.refused}" for line in lines if line.refused)
    if not good or not is_english(line.text for line in good):
        refusals["page: not English"] += 1
        return None
    return glyphs, lines


def _random_part(line: Line, fits, rng: np.random.Generator, glyphs: Glyphs) -> list[Line] | None:
    """A random run of whole words of ``line`` that fits; None when there is none."""
    starts = [0] + [index + 1 for index, character in enumerate(line.text) if character == " "]
    ends = [start - 1 for start in starts[1:]] + [len(line.text)]
    first = int(rng.integers(len(starts)))
    count = int(rng.integers(min(3, len(starts)), len(starts) + 1))
    first = min(first, len(starts) - count)
    for last in range(first + count - 1, first - 1, -1):
        part = [part_of_line(line, starts[first], ends[last], glyphs)]
        if fits(part):
            return part
    return None


# ------------------------------------------------------------------------------------------- packages to data sets


@dataclass
class Report:
    """What a build did: counts, seconds and the reasons of refusal."""

    rows: int = 0
    pages: int = 0  # looked at
    pages_used: int = 0  # with at least one row
    documents: int = 0
    seconds: float = 0.0
    page_seconds: float = 0.0  # summed over workers
    refusals: Counter = field(default_factory=Counter)

    def save(self, folder: Path, **settings: Any) -> None:
        """Write ``report.json`` beside the shards."""
        content = {"settings": settings, **vars(self), "refusals": dict(self.refusals.most_common())}
        (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")

    def __str__(self) -> str:
        if not self.pages:
            return f"{self.rows} rows in {self.seconds:.0f} s ({1000 * self.seconds / max(self.rows, 1):.1f} ms a row)"
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.refusals.most_common(12))
        return (
            f"{self.rows} rows from {self.pages_used} of {self.pages} pages of {self.documents} documents in "
            f"{self.seconds:.0f} s ({1000 * self.page_seconds / max(self.pages, 1):.0f} ms a page, "
            f"{1000 * self.page_seconds / max(self.rows, 1):.1f} ms a row). Refused: {reasons}"
        )


def list_documents(package: str) -> list[tuple[str, int]]:
    """The PDFs of a package as (path below the package's tree, pages); kept in the cache after the first time.

    Files that pdfium cannot open (damaged, encrypted) are left out, files of equal content counted once.
    """
    tree = fetch_deb(package)
    index = cache_root() / "trees" / f"{package}.pdfs.json"
    if index.is_file():
        return [tuple(entry) for entry in json.loads(index.read_text())]
    found, seen = [], set()
    for path in sorted(tree.rglob("*.pdf")):
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        key = (len(content), zlib.crc32(content))
        if key in seen:
            continue
        seen.add(key)
        try:
            document = pdfium.PdfDocument(content)
            found.append((path.relative_to(tree).as_posix(), len(document)))
            document.close()
        except pdfium.PdfiumError:
            continue
    index.write_text(json.dumps(found))
    return found


@dataclass(frozen=True)
class Task:
    """A few pages of one document, the unit of work."""

    package: str
    document: str
    pages: tuple[int, ...]
    seed: int
    split: str


def read_document_list(path: str | Path) -> frozenset[str]:
    """Documents named in a text file, ``PACKAGE/PATH/IN/IT.pdf`` on each line; empty lines and ``#`` comments pass.

    Raises:
        ValueError: there is no such file, it is no text, or it names nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no list of documents at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file in UTF-8 ({error})") from error
    documents = frozenset(line for line in (line.split("#")[0].strip() for line in text.splitlines()) if line)
    if not documents:
        raise ValueError(f"{path} names no document")
    return documents


def choose_documents(packages: list[str], listed: frozenset[str] | None = None) -> frozenset[str]:
    """The documents of packages, or those `listed`, each as ``PACKAGE/PATH``.

    Raises:
        ValueError: a document of the list is in none of the packages.
    """
    there = frozenset(f"{package}/{document}" for package in packages for document, _ in list_documents(package))
    if listed is None:
        return there
    missing = sorted(listed - there)
    if missing:
        raise ValueError(f"{len(missing)} documents of the list are not in the packages, {missing[0]} among them")
    return listed


def plan_pages(
    packages: list[str],
    seed: int,
    max_pages: int | None,
    pages_per_pdf: int,
    split: str,
    documents: frozenset[str] | None = None,
) -> list[Task]:
    """Choose pages of all documents (or of those in ``documents``), at most ``pages_per_pdf`` of each, and shuffle
    them: the same for a seed.

    Raises:
        ValueError: a document of the list is in none of the packages.
    """
    tasks = []
    chosen_documents = choose_documents(packages, documents)
    for package in packages:
        for document, pages in list_documents(package):
            if f"{package}/{document}" not in chosen_documents:
                continue
            rng = np.random.default_rng([seed, zlib.crc32(f"{package}/{document}".encode())])
            chosen = rng.permutation(pages)[:pages_per_pdf].tolist()
            for at in range(0, len(chosen), PAGES_PER_TASK):
                tasks.append(Task(package, document, tuple(chosen[at : at + PAGES_PER_TASK]), seed, split))
    order = np.random.default_rng(seed).permutation(len(tasks))
    tasks = [tasks[index] for index in order]
    if max_pages is None:
        return tasks
    kept, total = [], 0
    for task in tasks:
        if total >= max_pages:
            break
        kept.append(task)
        total += len(task.pages)
    return kept


_unwanted: Callable[[str], bool]  # set before the workers are forked


def _set_unwanted(unwanted: Callable[[str], bool] | None) -> None:
    global _unwanted
    _unwanted = unwanted or (lambda text: False)


def _chunk_rows(task: Task) -> tuple[list[dict], Report]:
    return _rows_of(task, lambda page, rng, refusals: chunks_of_page(page, rng, refusals, unwanted=_unwanted))


def _block_rows(task: Task) -> tuple[list[dict], Report]:
    return _rows_of(task, blocks_of_page)


def _rows_of(task: Task, cut) -> tuple[list[dict], Report]:
    report = Report(documents=0)
    rows: list[dict] = []
    begin = time.perf_counter()
    try:
        document = pdfium.PdfDocument(fetch_deb(task.package) / task.document)
    except pdfium.PdfiumError:
        report.refusals["document: cannot be opened"] += 1
        return rows, report
    for number in task.pages:
        report.pages += 1
        rng = np.random.default_rng([task.seed, zlib.crc32(f"{task.package}/{task.document}".encode()), number])
        before = len(rows)
        try:
            page = document[number]
            for cutout in cut(page, rng, report.refusals):
                rows.append(
                    make_row(
                        cutout.pixels,
                        cutout.text,
                        task="ocr",
                        kind="document",
                        char_boxes=cutout.boxes,
                        x_height=cutout.x_height,
                        source=f"{task.package}/{task.document}#{number + 1}",
                        license=PAGE_LICENSE,
                        split=task.split,
                    )
                )
            page.close()
        except pdfium.PdfiumError:
            report.refusals["page: cannot be rendered"] += 1
        report.pages_used += len(rows) > before
    document.close()
    report.page_seconds = time.perf_counter() - begin
    report.rows = len(rows)
    return rows, report


def _run(tasks: list[Task], work, workers: int, report: Report, unwanted, progress: bool) -> Iterator[dict]:
    """Rows of all tasks in the order of the tasks, whatever the number of workers."""
    from tqdm import tqdm

    documents = set()
    with tqdm(total=sum(len(task.pages) for task in tasks), unit="page", disable=not progress) as bar:
        _set_unwanted(unwanted)
        results = run_guarded(work, tasks, workers=workers, ahead=8)
        try:
            for task, result in results:
                bar.update(len(task.pages))
                if isinstance(result, Failure):
                    report.refusals[f"document: {result.reason}"] += 1
                    log.warning("%s/%s: left out, %s", task.package, task.document, result.detail)
                    continue
                rows, part = result
                documents.add((task.package, task.document))
                report.pages += part.pages
                report.pages_used += part.pages_used
                report.page_seconds += part.page_seconds
                report.rows += len(rows)
                report.refusals.update(part.refusals)
                report.documents = len(documents)
                bar.set_postfix(rows=report.rows, refresh=False)
                yield from rows
        finally:
            results.close()


def _mixed(rows: Iterable[dict], seed: int, size: int) -> Iterator[dict]:
    """Shuffle rows within groups of ``size``, so that the lines of a page do not follow each other."""
    rng = np.random.default_rng(seed)
    group: list[dict] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield from (group[index] for index in rng.permutation(size))
            group = []
    yield from (group[index] for index in rng.permutation(len(group)))


def build_chunks(
    packages: list[str],
    out: str | Path,
    seed: int = 0,
    max_pages: int | None = None,
    split: str = "train",
    *,
    max_rows: int | None = None,
    workers: int = 1,
    pages_per_pdf: int = PAGES_PER_PDF,
    documents: frozenset[str] | None = None,
    unwanted: Callable[[str], bool] | None = None,
    progress: bool = True,
) -> Report:
    """Build a data set of chunks of one to three lines from Debian packages of PDF documentation.

    Args:
        packages: names of Debian packages.
        out: folder for the shards and ``report.json``.
        seed: the same seed gives the same rows, whatever ``workers`` is.
        max_pages: look at so many pages; None for all.
        split: ``train`` or ``validation``.
        max_rows: stop after so many rows.
        workers: processes.
        pages_per_pdf: at most so many pages of a document, so that no manual of 1,500 pages drowns the others.
        documents: only these, each as ``PACKAGE/PATH``; None for all.
        unwanted: texts to leave out.
        progress: show a bar.
    """
    begin = time.perf_counter()
    out = Path(out)
    tasks = plan_pages(packages, seed, max_pages, pages_per_pdf, split, documents)
    report = Report()
    rows = _run(tasks, _chunk_rows, workers, report, unwanted, progress)
    if max_rows is not None:
        rows = first_rows(rows, max_rows)
    report.rows = write_shards(_mixed(rows, seed, 5000), out)
    report.seconds = time.perf_counter() - begin
    report.save(out, packages=packages, seed=seed, max_pages=max_pages, pages_per_pdf=pages_per_pdf, split=split)
    return report


def build_blocks(
    packages: list[str],
    out: str | Path,
    seed: int = 0,
    max_pages: int | None = None,
    split: str = "validation",
    *,
    max_rows: int | None = None,
    workers: int = 1,
    pages_per_pdf: int = PAGES_PER_PDF,
    documents: frozenset[str] | None = None,
    progress: bool = True,
) -> Report:
    """Build a data set of whole paragraphs to measure reading on: `blocks_of_page` for each page.

    Arguments as for `build_chunks`. There is no ``unwanted``: it is training data that makes way.
    """
    begin = time.perf_counter()
    out = Path(out)
    tasks = plan_pages(packages, seed, max_pages, pages_per_pdf, split, documents)
    report = Report()
    rows = _run(tasks, _block_rows, workers, report, None, progress)
    if max_rows is not None:
        rows = first_rows(rows, max_rows)
    report.rows = write_shards(rows, out)
    report.seconds = time.perf_counter() - begin
    report.save(out, packages=packages, seed=seed, max_pages=max_pages, pages_per_pdf=pages_per_pdf, split=split)
    return report


def first_rows(rows: Iterator[dict], count: int) -> Iterator[dict]:
    """Rows up to ``count``."""
    for index, row in enumerate(rows):
        if index >= count:
            break
        yield row
