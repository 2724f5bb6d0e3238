"""A whole page of a PDF -> its text in the order a person reads it, and the blocks that white space makes of it.

The path of a page: the text layer's characters (`pdf.read_glyphs`) in runs on one baseline; the rows at the page's
edges that are its header and footer (`_take_furniture`); columns, by the gutters between them (`order_runs`); rows of
runs side by side, so that a table is read along its rows (`_make_rows`); footnotes, which go after the text; blocks of
rows, one a paragraph (`_split_blocks`). A page is refused with a reason (`PageRefused`) where its text layer cannot be
what is printed.

Lengths are PDF points from the top left of the page as it is shown until a name ends in ``_px``.
Every number without a source is ours, chosen by looking at pages of the training packages.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pypdfium2 as pdfium

from .pdf import (
    MAX_UNMAPPED,
    X_HEIGHT_LETTERS,
    Cutout,
    Glyphs,
    Line,
    RenderedPage,
    find_runs,
    has_no_unicode,
    is_english,
    read_glyphs,
    set_text,
)

SIDE = (36.0, 14400.0)  # points: half an inch, and the limit of PDF 1.7 (ISO 32000-1, annex C)
MIN_CHARACTERS = 60
MAX_TURNED = 0.05  # share of characters that are not upright on the page as it is shown
MAX_RIGHT_TO_LEFT = 0.02  # share of characters; pdfium gives them as printed, not as read
MAX_WITHOUT_INK = 0.02  # share of words
MAX_PIXELS = 24_000_000  # of a rendered page
PAGE_X_HEIGHT = (5.0, 10.0)  # px: an A4 page of 11-point type is 900 to 1,800 px tall
EDGE = 0.15  # share of the page's height at the top and at the bottom where headers and footers are looked for
MIN_BLOCK_CHARACTERS = 8

_PAGE_NUMBER = re.compile(
    r"^(page\s*)?[-\u2013\u2014\[(|\s]*(\d{1,4}|[ivxlc]{1,7})[-\u2013\u2014\])|\s]*((/|of)\s*\d{1,4})?$", re.IGNORECASE
)
_BULLET = re.compile(r"^(\u2022|[-*>\u25e6\u25cb\u25a0]|\(?(\d{1,3}|[a-zA-Z]|[ivx]{1,5})[.)]|\[\w{1,9}\])(\s|$)")
_FOOTNOTE = re.compile(r"^([*\u2020\u2021\u00a7\u00b6]{1,3}|\d{1,3})\s?[^\s\d.,):]")


class PageRefused(ValueError):
    """The page's text layer is not what is printed on it, or not what was asked for; the message is the reason."""


@dataclass
class Block:
    """Lines that white space keeps together: a paragraph, a heading, a row of a table, a caption."""

    lines: list[Line]
    role: str = "text"  # "text", "footnote", "header" or "footer"


@dataclass
class PageText:
    """What is printed on a page. ``blocks`` are in reading order: header, text, footnotes, footer."""

    glyphs: Glyphs
    blocks: list[Block]
    x_height: float  # of most characters, points


@dataclass(frozen=True)
class Edge:
    """A row at the top or bottom of a page, as it is compared with its neighbours'."""

    masked: str  # the text, digits as '#'
    y: float  # of its middle
    numbers: tuple[int, ...]  # those it begins and ends with


# ------------------------------------------------------------------------------------------------------------- text


def read_page(
    page: pdfium.PdfPage,
    *,
    neighbours: Callable[[int], list[Edge] | None] = lambda distance: None,
    english: bool = True,
    max_unmapped: float = MAX_UNMAPPED,
) -> PageText:
    """Read a page in the order a person does.

    Args:
        page: the page.
        neighbours: the edges (`page_edges`) of the page so many pages further on, negative for before; None where
            there is no such page. Without them only a page number that stands alone is a header or footer.
        english: refuse text in other languages.
        max_unmapped: the share of characters without Unicode that a page may have; they are U+FFFD in its text.

    Raises:
        PageRefused: with the reason: ``size``, ``too many characters``, ``little text``, ``text layer``,
            ``turned text``, ``right-to-left text`` or ``not English``.
    """
    if not all(SIDE[0] <= side <= SIDE[1] for side in page.get_size()):
        raise PageRefused("size")
    try:
        glyphs = read_glyphs(page)
    except ValueError as error:
        raise PageRefused("too many characters") from error
    count = len(glyphs.codes)
    if count < MIN_CHARACTERS:
        raise PageRefused("little text")
    if sum(map(has_no_unicode, glyphs.codes)) > max_unmapped * count:
        raise PageRefused("text layer")
    if count - sum(glyphs.upright) > MAX_TURNED * count:
        raise PageRefused("turned text")
    if max(glyphs.codes) >= 0x590 and sum(map(_right_to_left, glyphs.codes)) > MAX_RIGHT_TO_LEFT * count:
        raise PageRefused("right-to-left text")
    runs = read_runs(glyphs)
    if english and not is_english(run.text for run in runs):
        raise PageRefused("not English")
    if not runs:
        raise PageRefused("little text")
    lengths = [len(run.text) for run in runs]
    x_height = float(np.median(np.repeat([run.x_height for run in runs], lengths)))
    headers, body, footers = _take_furniture(runs, glyphs, x_height, neighbours)
    text, notes = [], []
    leaves = order_runs(body, x_height)
    for leaf in leaves:
        rows = _make_rows(leaf)
        at = _first_footnote(rows, glyphs, x_height, body)
        text += [Block(lines) for lines in _split_blocks(rows[:at])]
        notes += [Block(lines, "footnote") for lines in _split_footnotes(rows[at:], glyphs)]
    blocks = [Block([row], "header") for row in headers] + text + notes + [Block([row], "footer") for row in footers]
    return PageText(glyphs, blocks, x_height)


def _right_to_left(code: int) -> bool:
    return code >= 0x590 and unicodedata.bidirectional(chr(code)) in ("R", "AL")


def read_runs(glyphs: Glyphs) -> list[Line]:
    """All upright runs of characters of a page with their text, in content order; letters of any script."""
    runs = []
    heights = glyphs.boxes[:, 3] - glyphs.boxes[:, 1]
    letters = np.array([chr(code) in X_HEIGHT_LETTERS for code in glyphs.codes], dtype=bool)
    tall = np.array([chr(code).isupper() or chr(code).isdigit() for code in glyphs.codes], dtype=bool)
    usual = float(np.median(heights[letters])) if letters.any() else 0.0
    for first, last in find_runs(glyphs):
        if not all(glyphs.upright[first:last]):
            continue
        boxes = glyphs.boxes[first:last]
        box = (boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max(), boxes[:, 3].max())
        run = Line(first, last, tuple(map(float, box)), float(np.median(glyphs.baselines[first:last])))
        own = heights[first:last]
        if letters[first:last].sum() >= 2:
            run.x_height = float(np.median(own[letters[first:last]]))
        elif tall[first:last].any():  # 0.66: x-height to capital height of common book faces
            run.x_height = 0.66 * float(np.median(own[tall[first:last]]))
        else:  # signs, or a script without small letters
            run.x_height = 0.66 * float(own.max()) if any(map(_is_letter, glyphs.codes[first:last])) else usual
        run.x_height = max(run.x_height, 0.3)
        set_text(run, glyphs, any_script=True)
        _compose_accents(run)
        run.runs = ((first, last),)
        if run.text:
            runs.append(run)
    return runs


def _is_letter(code: int) -> bool:
    return chr(code).isalpha()


# Spacing accents as old TeX fonts print them over or under a letter (`normalize_character` has made some of them
# plain signs), and the combining ones that they stand for.
_ACCENTS = {
    '"': "\u0308",
    "\u00a8": "\u0308",
    "'": "\u0301",
    "\u02c6": "\u0302",
    "^": "\u0302",
    "~": "\u0303",
    "\u02c7": "\u030c",
    "\u02d8": "\u0306",
    "\u02da": "\u030a",
    "\u02d9": "\u0307",
    "\u00af": "\u0304",
    "\u00b8": "\u0327",
    "\u02db": "\u0328",
}
_DOTLESS = {"\u0131": "i", "\u0237": "j"}


def _compose_accents(run: Line) -> None:
    """Make one character of an accent and the letter that it is printed over, as a reader sees it."""
    if not any(character in _ACCENTS for character in run.text):
        return
    text, boxes = list(run.text), run.boxes.tolist()
    at = 0
    while at < len(text):
        combining = _ACCENTS.get(text[at])
        if combining:
            for other in (at + 1, at - 1):
                if not 0 <= other < len(text):
                    continue
                a, b = boxes[at], boxes[other]
                middle = (a[0] + a[2]) / 2
                # Within the middle of the letter: an apostrophe stands beside it.
                inside = b[0] + 0.15 * (b[2] - b[0]) < middle < b[2] - 0.15 * (b[2] - b[0]) and a[0] < b[2] - 0.3
                made = unicodedata.normalize("NFC", _DOTLESS.get(text[other], text[other]) + combining)
                if inside and text[other].isalpha() and len(made) == 1:
                    text[other] = made
                    boxes[other] = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
                    del text[at], boxes[at]
                    at -= 1
                    break
        at += 1
    run.text = "".join(text)
    run.boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)


# ------------------------------------------------------------------------------------------------ header and footer


def page_edges(page: pdfium.PdfPage) -> list[Edge]:
    """The two highest and the two lowest rows of a page, for its neighbours to compare theirs with."""
    try:
        glyphs = read_glyphs(page)
    except ValueError:
        return []
    runs = read_runs(glyphs)
    return [_edge(row) for top in (True, False) for row in _edge_rows(runs, top)]


def _edge(row: Line) -> Edge:
    found = re.findall(r"^\d{1,4}\b|\b\d{1,4}$", row.text)
    return Edge(re.sub(r"\d+", "#", row.text), (row.box[1] + row.box[3]) / 2, tuple(map(int, found)))


def _edge_rows(runs: list[Line], top: bool, count: int = 2) -> list[Line]:
    """The outermost rows, from the edge inwards."""
    rows, left = [], list(runs)
    while left and len(rows) < count:
        outer = (min if top else max)(left, key=lambda run: run.baseline)
        row = [run for run in left if abs(run.baseline - outer.baseline) < 0.7 * max(run.x_height, outer.x_height)]
        rows.append(_join_runs(row))
        taken = {id(run) for run in row}
        left = [run for run in left if id(run) not in taken]
    return rows


def _take_furniture(runs: list[Line], glyphs: Glyphs, x_height: float, neighbours):
    """Headers (from the top), the runs between, and footers (from the top).

    A row is header or footer when it lies within `EDGE` of the page's height from that edge, set off from what comes
    next by 1.2 x-heights of the page or more, and either is a page number that stands alone, or has, digits aside, the
    same text at the same height on one of the two pages before or after, or begins or ends with a number that
    counts on from there. Two rows at most at each edge.
    """
    taken: set[int] = set()
    found: dict[bool, list[Line]] = {True: [], False: []}
    for top in (True, False):
        rows = _edge_rows(runs, top, 3)
        for row, following in itertools.pairwise(rows):
            middle = (row.box[1] + row.box[3]) / 2
            at_edge = middle < EDGE * glyphs.height if top else middle > (1 - EDGE) * glyphs.height
            gap = following.box[1] - row.box[3] if top else row.box[1] - following.box[3]
            if not at_edge or gap < 1.2 * x_height or not (_is_number(row) or _repeats(_edge(row), neighbours)):
                break
            found[top].append(row)
            taken.update(first for first, _ in row.runs)
    body = [run for run in runs if run.first not in taken]
    return found[True], body, found[False][::-1]


def _is_number(row: Line) -> bool:
    return bool(_PAGE_NUMBER.match(row.text))


def _repeats(edge: Edge, neighbours) -> bool:
    letters = sum(character.isalpha() for character in edge.masked)
    for distance in (-1, 1, -2, 2):
        for other in neighbours(distance) or []:
            if abs(other.y - edge.y) > 4.0:
                continue
            if letters >= 2 and other.masked == edge.masked:
                return True
            if any(number + distance in other.numbers for number in edge.numbers):
                return True
    return False


# ---------------------------------------------------------------------------------------------------------- columns


def order_runs(runs: list[Line], x_height: float, depth: int = 6) -> list[list[Line]]:
    """Cut a page, or part of it, into pieces without columns: each a list of runs, in reading order.

    What crosses a gutter (a heading over both columns, a wide figure's caption) parts the columns above it from those
    below: left above, right above, the crossing piece, left below, right below.
    """
    gutter = _find_gutter(runs, x_height) if depth and len(runs) >= 6 else None
    if gutter is None:
        return [runs] if runs else []
    at, until = gutter
    sides = [_side(run, at, until) for run in runs]
    crossing = sorted((run.box[1] + run.box[3]) / 2 for run, side in zip(runs, sides, strict=True) if not side)
    items = []
    for run, side in zip(runs, sides, strict=True):
        middle = (run.box[1] + run.box[3]) / 2
        if side and crossing:  # beside a crossing run: the same row
            place = bisect_left(crossing, middle)
            near = [y for y in crossing[max(place - 1, 0) : place + 1] if abs(y - middle) < 0.8 * x_height]
            side = 0 if near else side
        items.append((middle, side, run))
    items.sort(key=lambda item: item[0])
    pieces: list[list[Line]] = []
    at_item = 0
    while at_item < len(items):
        end = at_item
        while end < len(items) and (items[end][1] == 0) == (items[at_item][1] == 0):
            end += 1
        part = items[at_item:end]
        at_item = end
        if part[0][1] == 0:
            pieces += order_runs(_in_content_order(run for _, _, run in part), x_height, depth - 1)
            continue
        left = _in_content_order(run for _, side, run in part if side < 0)
        right = _in_content_order(run for _, side, run in part if side > 0)
        if left and right and not _side_by_side(left, right, strict=False):
            pieces.append(_in_content_order([*left, *right]))
        else:
            pieces += order_runs(left, x_height, depth - 1) + order_runs(right, x_height, depth - 1)
    return pieces


def _side(run: Line, left: float, right: float) -> int:
    """-1 for left of a gutter, 1 for right of it, 0 for across; a formula too long for its column stays in it."""
    middle, width = (left + right) / 2, run.box[2] - run.box[0]
    if run.box[2] <= middle or middle - run.box[0] > 0.8 * width:
        return -1
    return 1 if run.box[0] >= middle or run.box[2] - middle > 0.8 * width else 0


def _in_content_order(runs) -> list[Line]:
    return sorted(runs, key=lambda run: run.first)


def _find_gutter(runs: list[Line], x_height: float) -> tuple[float, float] | None:
    """The white strip between two columns as (left, right); None where there is none."""
    boxes = np.array([run.box for run in runs])
    weights = np.array([len(run.text) for run in runs], dtype=np.float64)
    candidates = np.unique(np.round(boxes[:, 2] * 2) / 2)
    left = boxes[None, :, 2] <= candidates[:, None] + 0.5  # (candidates, runs)
    right = boxes[None, :, 0] >= candidates[:, None] + 1.3 * x_height
    least = np.minimum(left @ weights, right @ weights)
    crossing = weights.sum() - left @ weights - right @ weights
    fit = (left.sum(axis=1) >= 3) & (right.sum(axis=1) >= 3) & (crossing <= 0.65 * weights.sum())
    scores = np.where(fit, least - 0.5 * crossing, -np.inf)
    for best in np.argsort(-scores, kind="stable")[:3]:
        if scores[best] == -np.inf:
            break
        one = [run for run, inside in zip(runs, left[best], strict=True) if inside]
        other = [run for run, inside in zip(runs, right[best], strict=True) if inside]
        top, bottom = max(_top(one), _top(other)), min(_bottom(one), _bottom(other))
        shorter = min(_bottom(one) - _top(one), _bottom(other) - _top(other))
        if bottom - top > 0.5 * shorter and _side_by_side(one, other):
            return max(run.box[2] for run in one), min(run.box[0] for run in other)
    return None


def _top(runs: Sequence[Line]) -> float:
    return min(run.box[1] for run in runs)


def _bottom(runs: Sequence[Line]) -> float:
    return max(run.box[3] for run in runs)


def _side_by_side(left: list[Line], right: list[Line], strict: bool = True) -> bool:
    """Whether two sides are columns, to be read one after the other, rather than cells, to be read along the rows.

    They are columns where the document itself gives one side before the other, a change of side being rare, or where
    both are filled with lines of prose.
    """
    order = sorted([(run.first, 0) for run in left] + [(run.first, 1) for run in right])
    changes = sum(one[1] != other[1] for one, other in itertools.pairwise(order))
    if changes <= max(1, 0.25 * min(len(left), len(right))):
        return True
    return _is_prose(left) and _is_prose(right) if strict else _is_prose(left) or _is_prose(right)


def _is_prose(runs: list[Line]) -> bool:
    """Whether most characters stand in lines that fill the column, or one of the columns, that ``runs`` make."""
    lengths = np.array([len(run.text) for run in runs], dtype=np.float64)
    widths = np.array([run.box[2] - run.box[0] for run in runs])
    column = np.quantile(np.repeat(widths, lengths.astype(int)), 0.9)
    full = lengths[widths > 0.75 * column].sum() >= 0.5 * lengths.sum()
    return bool(full and np.average(lengths, weights=lengths) >= 18)


# --------------------------------------------------------------------------------------------------- rows and blocks


def _make_rows(runs: list[Line]) -> list[Line]:
    """Runs side by side to rows, from the top."""
    rows: list[list[Line]] = []
    middles: list[tuple[float, int]] = []  # of the rows, sorted
    for run in sorted(runs, key=lambda run: -(run.box[2] - run.box[0]) * run.x_height):
        middle = run.baseline - 0.5 * run.x_height
        best = None
        for y, index in middles[bisect_left(middles, (middle - 3 * run.x_height - 8, 0)) :]:
            if y > middle + 3 * run.x_height + 8:
                break
            anchor = rows[index][0]
            distance = abs(y - middle)
            on_it = (
                abs(run.baseline - anchor.baseline) < 0.3 * anchor.x_height
                or distance < 0.5 * max(run.x_height, anchor.x_height)
                or (
                    run.x_height < 0.85 * anchor.x_height and distance < 1.1 * anchor.x_height
                )  # sub- and superscripts
            )
            if not on_it or any(_share_x(run, other) for other in rows[index]):
                continue
            if best is None or distance < best[0]:
                best = (distance, index)
        if best is None:
            insort(middles, (middle, len(rows)))
            rows.append([run])
        else:
            rows[best[1]].append(run)
    return sorted((_join_runs(row) for row in rows), key=lambda row: row.baseline)


def _share_x(one: Line, other: Line) -> bool:
    shared = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    return shared > 0.3 * min(one.box[2] - one.box[0], other.box[2] - other.box[0])


def _join_runs(runs: list[Line]) -> Line:
    """One line of runs that stand side by side."""
    if len(runs) == 1:
        return runs[0]
    anchor = max(runs, key=lambda run: (run.box[2] - run.box[0]) * run.x_height)
    runs = sorted(runs, key=lambda run: (run.box[0], run.first))
    text, boxes = runs[0].text, [runs[0].boxes]
    for before, run in itertools.pairwise(runs):
        if run.box[0] - before.box[2] > 0.25 * anchor.x_height:
            text += " "
            boxes.append(np.zeros((1, 4)))
        text += run.text
        boxes.append(run.boxes)
    corners = np.array([run.box for run in runs])
    box = (*corners[:, :2].min(axis=0), *corners[:, 2:].max(axis=0))
    return Line(
        min(run.first for run in runs),
        max(run.last for run in runs),
        tuple(map(float, box)),
        anchor.baseline,
        anchor.x_height,
        text,
        np.concatenate(boxes),
        runs=tuple((run.first, run.last) for run in runs),
    )


def _cells(row: Line, glyphs_gap: float = 2.5) -> int:
    """How many pieces a row falls into at gaps of ``glyphs_gap`` x-heights."""
    inked = row.boxes[row.boxes[:, 2] > row.boxes[:, 0]]
    if len(row.runs) < 2 or not len(inked):
        return 1
    return 1 + int((inked[1:, 0] - np.maximum.accumulate(inked[:, 2])[:-1] > glyphs_gap * row.x_height).sum())


def _split_blocks(rows: list[Line]) -> list[list[Line]]:
    """Rows of a column to paragraphs: cut where the pitch or the size of type changes, and between paragraphs."""
    if not rows:
        return []
    pitches = [
        below.baseline - above.baseline
        for above, below in itertools.pairwise(rows)
        if _alike(above, below) and below.baseline - above.baseline < 5 * below.x_height
    ]
    pitch = float(np.median(pitches)) if pitches else 0.0
    pieces = [[rows[0]]]
    for above, below in itertools.pairwise(rows):
        step = below.baseline - above.baseline
        together = _alike(above, below) and step < 5 * below.x_height and step < 1.25 * pitch
        if not together or _cells(above) > 1 or _cells(below) > 1:
            pieces.append([])
        pieces[-1].append(below)
    return [block for piece in pieces for block in _split_paragraphs(piece)]


def _alike(one: Line, other: Line) -> bool:
    return 0.87 < one.x_height / other.x_height < 1.15


def _split_paragraphs(rows: list[Line]) -> list[list[Line]]:
    """Evenly spaced rows to paragraphs: a new one begins indented, after a line that had room for more, or with a
    bullet or number."""
    right = max(row.box[2] for row in rows)
    left = min(row.box[0] for row in rows)
    blocks = [[rows[0]]]
    for index in range(1, len(rows)):
        above, row = rows[index - 1], rows[index]
        following = rows[index + 1] if index + 1 < len(rows) else None
        step = row.box[0] - above.box[0]
        em = row.x_height
        # The next word would have fitted on the line above: its end was meant.
        room = right - above.box[2] > _first_word(row) + 1.5 * em and right - above.box[2] > 0.1 * (right - left)
        indented = step > 0.8 * em and following is not None and following.box[0] < row.box[0] - 0.8 * em
        bullet = bool(_BULLET.match(row.text)) and (
            step < -0.8 * em or room or bool(_BULLET.match(blocks[-1][0].text))
        )
        outdented = step < -0.8 * em and len(blocks[-1]) > 1
        if room or indented or bullet or outdented:
            blocks.append([])
        blocks[-1].append(row)
    return blocks


def _first_word(row: Line) -> float:
    length = row.text.find(" ") if " " in row.text else len(row.text)
    return float(row.boxes[:length, 2].max() - row.boxes[0, 0])


def _first_footnote(rows: list[Line], glyphs: Glyphs, x_height: float, body: list[Line]) -> int:
    """Where the footnotes begin that a column ends with; ``len(rows)`` when it has none.

    They are the last rows, smaller than the text by 7% or more, in the lower half of the page, with nothing below
    them, and the first of them begins with a raised number or with a mark such as * or a dagger.
    """
    at = len(rows)
    while at and rows[at - 1].x_height <= 0.93 * x_height and rows[at - 1].box[1] > 0.4 * glyphs.height:
        at -= 1
    while at < len(rows) and not _has_mark(rows[at], glyphs):
        at += 1
    if at == len(rows) or (at and rows[at].box[1] - rows[at - 1].box[3] < 0.3 * x_height):
        return len(rows)
    own = {first for row in rows[at:] for first, _ in row.runs}
    left, right = min(row.box[0] for row in rows[at:]), max(row.box[2] for row in rows[at:])
    for run in body:
        below = run.box[1] > rows[at].box[3] and run.first not in own
        if below and run.box[2] > left and run.box[0] < right and run.x_height > 0.93 * x_height:
            return len(rows)
    return at


def _has_mark(row: Line, glyphs: Glyphs) -> bool:
    """Whether a row begins as a footnote does."""
    if not _FOOTNOTE.match(row.text):
        return False
    if not row.text[0].isdigit():
        return True
    first = row.runs[0][0]
    raised = row.baseline - glyphs.baselines[first] > 0.15 * row.x_height
    return raised or glyphs.boxes[first][3] - glyphs.boxes[first][1] < 1.15 * row.x_height  # a digit is 1.5 as tall


def _split_footnotes(rows: list[Line], glyphs: Glyphs) -> Iterator[list[Line]]:
    note: list[Line] = []
    for row in rows:
        if note and _has_mark(row, glyphs):
            yield note
            note = []
        note.append(row)
    if note:
        yield note


# ------------------------------------------------------------------------------------------------- blocks to cut-outs


def block_text(lines: Sequence[Line], joined: bool = False) -> tuple[str, np.ndarray]:
    """Text of a block and a (len(text), 4) box a character in points.

    Args:
        lines: the printed lines.
        joined: undo the line breaks as `text.join_lines` does: a word divided between two small letters is joined,
            another hyphen stays without a space, every other break becomes a space. Else breaks are ``\\n``.
    """
    text, boxes = lines[0].text, [lines[0].boxes]
    for line in lines[1:]:
        before = text[-2:]
        if not joined:
            text += "\n"
        elif len(before) == 2 and before[1] == "-" and before[0].isalnum() and line.text[:1].isalnum():
            if before[0].islower() and line.text[0].islower():
                text = text[:-1]
                boxes[-1] = boxes[-1][:-1]
            text += line.text
            boxes.append(line.boxes)
            continue
        else:
            text += " "
        boxes.append(np.zeros((1, 4)))
        text += line.text
        boxes.append(line.boxes)
    return text, np.concatenate(boxes)


def words_with_boxes(text: str, boxes: np.ndarray) -> list[dict]:
    """Words of ``text`` as ``{"text": …, "box": [x0, y0, x1, y1]}``; a word that was divided at the end of a line is
    two, each where it is printed."""
    found = []
    for match in re.finditer(r"\S+", text):
        own = boxes[match.start() : match.end()]
        starts = [0, *(np.flatnonzero(own[1:, 0] < own[:-1, 0] - (own[1:, 3] - own[1:, 1])) + 1).tolist(), len(own)]
        for start, end in itertools.pairwise(starts):
            part = own[start:end]
            corners = [*part[:, :2].min(axis=0), *part[:, 2:].max(axis=0)]
            found.append({"text": match[0][start:end], "box": [int(value) for value in corners]})
    return found


class InkMap:
    """Tells words that are printed from words that are not, by the contrast in their boxes."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def without_ink(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) int boxes in pixels -> (N,) bool."""
        blank = np.empty(len(boxes), dtype=bool)
        for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            inside = self.pixels[y0:y1, x0:x1]
            blank[index] = inside.size == 0 or int(inside.max()) - int(inside.min()) < 40
        return blank


def render_page(page: pdfium.PdfPage, text: PageText, x_height_px: float) -> RenderedPage:
    """The page at the scale where most of its type has the x-height asked for.

    Raises:
        PageRefused: ``too large at this x-height``: over `MAX_PIXELS`, or a side above 32,767.
    """
    scale = x_height_px / text.x_height
    width, height = text.glyphs.width * scale, text.glyphs.height * scale
    if width * height > MAX_PIXELS or max(width, height) > 32767:
        raise PageRefused("too large at this x-height")
    return RenderedPage(page, text.glyphs, scale)


def page_cutout(rendered: RenderedPage, text: PageText, *, joined: bool = False, furniture: bool = True) -> Cutout:
    """The whole page with its text.

    Args:
        rendered: from `render_page`.
        text: from `read_page`.
        joined: paragraphs without their line breaks, one a line of text; else printed lines, one a line of text.
        furniture: keep header and footer in the text. They stay in the picture either way.

    Raises:
        PageRefused: ``text not on ink``: words where nothing is printed.
    """
    parts, all_boxes = [], []
    for block in text.blocks:
        if not furniture and block.role in ("header", "footer"):
            continue
        part, boxes = block_text(block.lines, joined)
        if parts:
            all_boxes.append(np.zeros((1, 4)))
        parts.append(part)
        all_boxes.append(boxes)
    if not parts:
        raise PageRefused("little text")
    boxes = np.concatenate(all_boxes)
    content = "\n".join(parts)
    height, width = rendered.pixels.shape
    blank = np.array([character.isspace() for character in content])
    boxes = boxes * np.tile(rendered.scale, 2)
    boxes[:, :2] = np.floor(boxes[:, :2])
    boxes[:, 2:] = np.ceil(boxes[:, 2:])
    boxes = boxes.clip(0, (width, height) * 2).astype(int)
    boxes[blank] = 0
    words = np.array([word["box"] for word in words_with_boxes(content, boxes)])
    if InkMap(rendered.pixels).without_ink(words).mean() > MAX_WITHOUT_INK:
        raise PageRefused("text not on ink")
    return Cutout(rendered.pixels, content, boxes, text.x_height * float(rendered.scale[1]))


def block_cutouts(
    rendered: RenderedPage,
    text: PageText,
    rng: np.random.Generator,
    refused: Callable[[str], None],
    *,
    joined: bool = False,
    furniture: bool = True,
) -> Iterator[Cutout]:
    """Each block of a page that can be cut out along white space, in reading order.

    Args:
        rendered: from `render_page`.
        text: from `read_page`.
        rng: draws the margins, 2 to 8 px.
        refused: told the reason for each block that is left out: ``short`` (under `MIN_BLOCK_CHARACTERS` characters),
            ``no unicode``, or what `RenderedPage.cut` says.
        joined: as for `page_cutout`.
        furniture: also headers and footers.
    """
    for block in text.blocks:
        if not furniture and block.role in ("header", "footer"):
            continue
        if sum(len(line.text) for line in block.lines) < MIN_BLOCK_CHARACTERS:
            refused("short")
        elif any("\ufffd" in line.text for line in block.lines):
            refused("no unicode")
        else:
            cutout = rendered.cut(block.lines, rng)
            if isinstance(cutout, str):
                refused(cutout)
                continue
            if joined:
                cutout = _joined(cutout)
            yield cutout


def _joined(cutout: Cutout) -> Cutout:
    lines, at = [], 0
    for text in cutout.text.split("\n"):
        lines.append(Line(0, 0, (0, 0, 0, 0), 0, text=text, boxes=cutout.boxes[at : at + len(text)]))
        at += len(text) + 1
    text, boxes = block_text(lines, joined=True)
    return Cutout(cutout.pixels, text, boxes.astype(int), cutout.x_height)
