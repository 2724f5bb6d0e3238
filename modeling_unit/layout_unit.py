"""Cut the picture of a page into text lines, paragraphs and chunks small enough to read, by its white space.

The encoder of a small UNIT reads a few lines at a time. This file finds them without any learned part, with
numpy and PIL only.

    page, PIL image -> paper made white, ink dark, page made upright
                    -> connected ink (glyphs); rules, frames and pictures dropped
                    -> columns, left to right, wherever a vertical gutter of white runs between running text
                    -> rows of glyphs, top to bottom, by recursive cuts along white space (an XY-cut on glyph boxes)
                    -> `TextLine`s -> paragraphs, `TextBlock`s -> `Chunk`s of a few lines within the reader's budget

Every box is `(x0, y0, x1, y1)` in pixels with `x1`, `y1` exclusive. `u` in comments is the height of a lower-case x in
pixels; all distances are multiples of it, so nothing depends on the resolution. No number here comes from the UNIT
paper, which reads whole pages; all of them are ours, set on rendered pages of the training packages only.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from PIL import Image

from .ink_unit import Ink, dilate, ink_mask, normalise_page, runs_of_mask, skew_of

__all__ = ["Chunk", "LayoutSettings", "PageLayout", "TextBlock", "TextLine", "analyse_page", "find_blocks"]


@dataclass(frozen=True)
class LayoutSettings:
    """What may be set about the cutting of a page."""

    x_height: float = 9.5  # x-height that each chunk is rescaled to
    min_x_height: float = 7.6  # smallest that lines are shrunk to for a long line to fit whole
    document_area: int = 65536  # most pixels of one chunk, after padding to whole patches
    max_width: int = 1024  # widest chunk in pixels
    patch_size: int = 16  # chunks are padded to a multiple of this
    max_lines: int = 3  # most lines in a chunk
    line_height: int = 0  # px; above 0 each line is read alone, in a strip this high with its baseline at `baseline`
    baseline: float = 12.1  # px from the top of such a strip
    margin: float = 0.5  # paper left around the ink of a chunk, in x-heights
    max_scale: float = 4.0  # most that small print is enlarged
    analysis_area: int = 6_000_000  # pages of more pixels are looked at reduced, as long as their letters allow it
    deskew: bool = True  # turn a page whose lines lean by up to 3 degrees

    def __post_init__(self):
        if self.min_x_height > self.x_height:
            raise ValueError(f"LayoutSettings.min_x_height ({self.min_x_height}) is above x_height ({self.x_height}).")
        for name, value in vars(self).items():
            if name not in ("margin", "deskew", "line_height") and not value > 0:
                raise ValueError(f"LayoutSettings.{name} must be above 0, got {value!r}.")
        whole = isinstance(self.line_height, int) and self.line_height >= 0
        if not whole or self.line_height % self.patch_size:
            raise ValueError(
                f"LayoutSettings.line_height must be a multiple of the patch's side {self.patch_size} or 0, "
                f"got {self.line_height!r}."
            )
        if self.line_height and not self.x_height <= self.baseline < self.line_height:
            raise ValueError(
                f"LayoutSettings.baseline ({self.baseline}) must lie within line_height ({self.line_height}), with "
                f"room above it for x_height ({self.x_height})."
            )
        if self.margin < 0:
            raise ValueError(f"LayoutSettings.margin must be at least 0, got {self.margin!r}.")
        if self.max_width < 4 * self.patch_size or self.document_area < 4 * self.patch_size**2:
            raise ValueError("LayoutSettings: max_width and document_area must hold at least four patches.")


@dataclass
class TextLine:
    """One line of text, or one cell of a table's row."""

    box: tuple  # (x0, y0, x1, y1) around the ink, pixels of `PageLayout.image`
    x_height: float  # pixels of `PageLayout.image`
    row: int = 0  # lines of one block with the same row stand side by side
    baseline: float = 0.0  # y of the line that its letters stand on, pixels of `PageLayout.image`
    glyphs: np.ndarray = field(default=None, repr=False, compare=False)  # indices of its connected pieces of ink


@dataclass
class TextBlock:
    """A paragraph: lines of one column and one size, close together."""

    box: tuple
    lines: list


@dataclass
class Chunk:
    """What is read at once: one to `max_lines` lines of one block, or a part of a line that is too wide."""

    box: tuple  # around the ink, pixels of `PageLayout.image`
    lines: list
    block_index: int
    x_height: float = 0.0  # median of its lines
    scale: float = 1.0  # factor that brings `x_height` to the canonical one, less where the chunk would not fit
    glyphs: np.ndarray = field(default=None, repr=False, compare=False)
    part: int = 0  # number of the part, where one line was cut into several


def find_blocks(image, settings=None):
    """The paragraphs of `image` in reading order, `[]` for a blank page: the `blocks` of [`analyse_page`]."""
    return analyse_page(image, settings).blocks


def analyse_page(image, settings=None):
    """Cut a page.

    Args:
        image: `PIL.Image`, any mode, dark text on light paper or the reverse, from a single line to a whole page.
        settings (`LayoutSettings`, *optional*).

    Returns:
        `PageLayout`, with no blocks if the page is blank.
    """
    settings = settings or LayoutSettings()
    if not isinstance(image, Image.Image):
        raise ValueError(f"analyse_page takes a PIL image, got {type(image).__name__}; use open_image for files")
    gray = image if image.mode == "L" else image.convert("L")
    factor = max(1, math.ceil(math.sqrt(gray.width * gray.height / settings.analysis_area)))
    layout = _analyse(gray if factor == 1 else gray.reduce(factor), settings, factor, image.size)
    # Reduced letters must stay larger than those the model wants, or detail would be lost before it is asked for.
    if factor > 1 and layout.unit and layout.unit < 1.1 * settings.x_height:
        layout = _analyse(gray, settings, 1, image.size)
    return layout


class PageLayout:
    """A page that was cut.

    Attributes:
        image: `PIL.Image` of mode L, the page made upright with dark ink on white paper. Boxes of lines, blocks and
            chunks are in its pixels.
        blocks: `list[TextBlock]` in reading order.
        angle: degrees by which lines of the given picture fell to the right, 0 where that was too little to matter.
        factor: how many times the given picture was reduced to get `image`.
        size: width and height of the given picture.
        unit: typical x-height in pixels of `image`, 0 for a blank page.
    """

    def __init__(self, image, blocks, ink, angle, factor, size, unit, settings):
        self.image, self.blocks, self.angle, self.factor, self.size = image, blocks, angle, factor, size
        self.unit, self.settings, self._ink = unit, settings, ink

    @property
    def lines(self):
        return [line for block in self.blocks for line in block.lines]

    def to_original(self, box):
        """A box of this layout as a box of integers in the picture that was given, kept inside it."""
        x0, y0, x1, y1 = box
        if self.angle:
            # PIL turned it about the centre; the corners are turned back, and the new box is put around the four.
            cx, cy = self.image.width / 2, self.image.height / 2
            cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
            points = [(x - cx, y - cy) for x in (x0, x1) for y in (y0, y1)]
            xs = [cx + x * cos - y * sin for x, y in points]
            ys = [cy + x * sin + y * cos for x, y in points]
            x0, y0, x1, y1 = min(xs), min(ys), max(xs), max(ys)
        width, height = self.size
        x0, x1 = (min(max(v * self.factor, 0), width) for v in (x0, x1))
        y0, y1 = (min(max(v * self.factor, 0), height) for v in (y0, y1))
        return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)

    def ink_of(self, line):
        """The connected pieces of ink of a line: (N, 5) of `x0, y0, x1, y1` and the number of pixels."""
        ink, own = self._ink, line.glyphs
        return np.stack([ink.x0[own], ink.y0[own], ink.x1[own], ink.y1[own], ink.area[own]], axis=1)

    def chunks(self):
        """All chunks of the page in reading order: `list[Chunk]`, each within the settings' area and width."""
        chunks = []
        for index, block in enumerate(self.blocks):
            rows = {}
            for line in block.lines:
                rows.setdefault(line.row, []).append(line)
            pending = []
            for row in rows.values():
                if len(row) == 1 and pending and self._fits(pending + row):
                    pending += row
                    continue
                if pending:
                    chunks.append(self._chunk(pending, index))
                pending = []
                if len(row) == 1 and self._fits(row):
                    pending = list(row)
                else:  # cells side by side, or a line too wide, are read one by one
                    for line in row:
                        chunks.extend(self._split(line, index))
            if pending:
                chunks.append(self._chunk(pending, index))
        return chunks

    def crop(self, chunk):
        """The picture of a chunk: `PIL.Image` of mode L at its scale, padded with white to whole patches.

        Ink of other lines that reaches into the box is painted white. With `line_height` the baseline of its line is
        always at the same height: what an encoder of whole patches needs not learn for each offset anew.
        """
        s, (x0, y0, x1, y1) = self.settings, chunk.box
        pad = s.margin * s.x_height / chunk.scale  # page pixels
        if s.line_height:
            top = chunk.lines[0].baseline - s.baseline / chunk.scale
            y0, y1 = top + pad, top + s.line_height / chunk.scale - pad
        left, top = math.floor(x0 - pad), math.floor(y0 - pad)
        right, bottom = math.ceil(x1 + pad), math.ceil(y1 + pad)
        canvas = np.full((bottom - top, right - left), 255, np.uint8)
        inside = max(left, 0), max(top, 0), min(right, self.image.width), min(bottom, self.image.height)
        window = np.array(self.image.crop(inside))
        own, other = self._ink.windows(inside, chunk.glyphs)
        if other.any():
            # The soft edge of a stroke lies outside the thresholded ink, about a tenth of the x-height far.
            reach = max(1, round(chunk.x_height / 8))
            window[dilate(other, reach) & ~dilate(own, reach)] = 255
        canvas[inside[1] - top : inside[3] - top, inside[0] - left : inside[2] - left] = window
        pieces = Image.fromarray(canvas)
        width, height = self._pixels(chunk.box, chunk.scale)
        area = (x0 - pad - left, y0 - pad - top, x1 + pad - left, y1 + pad - top)
        area = (max(area[0], 0), max(area[1], 0), min(area[2], pieces.width), min(area[3], pieces.height))
        pieces = pieces.resize((width, height), Image.Resampling.LANCZOS, box=area)
        padded = Image.new("L", (_round_up(width, s.patch_size), _round_up(height, s.patch_size)), 255)
        padded.paste(pieces, (0, 0))
        return padded

    def _pixels(self, box, scale):
        """Width and height of the crop of `box` at `scale`, margins included, before padding to whole patches."""
        margin = 2 * self.settings.margin * self.settings.x_height
        width, height = (box[2] - box[0]) * scale + margin, (box[3] - box[1]) * scale + margin
        return max(1, round(width)), self.settings.line_height or max(1, round(height))

    def _scale(self, lines):
        """The canonical scale of lines, or a little less where that makes the widest of them fit."""
        s = self.settings
        canonical = min(s.x_height / float(np.median([line.x_height for line in lines])), s.max_scale)
        box = _union([line.box for line in lines])
        widest = s.max_width // s.patch_size * s.patch_size - 2 * s.margin * s.x_height - 1
        fitting = widest / (box[2] - box[0])
        return fitting if canonical * s.min_x_height / s.x_height <= fitting < canonical else canonical

    def _fits(self, lines):
        if len(lines) > (1 if self.settings.line_height else self.settings.max_lines):
            return False
        return self._box_fits(_union([line.box for line in lines]), self._scale(lines))

    def _box_fits(self, box, scale):
        s = self.settings
        width, height = (_round_up(v, s.patch_size) for v in self._pixels(box, scale))
        return width <= s.max_width and width * height <= s.document_area

    def _chunk(self, lines, index):
        glyphs = np.concatenate([line.glyphs for line in lines])
        x_height = float(np.median([line.x_height for line in lines]))
        return Chunk(_union([line.box for line in lines]), list(lines), index, x_height, self._scale(lines), glyphs)

    def _split(self, line, index):
        """Chunks of one line, cut at gaps between words where it is too wide to be read at once."""
        scale = self._scale([line])
        if self._box_fits(line.box, scale):
            return [self._chunk([line], index)]
        s, ink = self.settings, self._ink
        height = _round_up(self._pixels(line.box, scale)[1], s.patch_size)
        widest = min(s.max_width, s.document_area // height) // s.patch_size * s.patch_size - 2 * s.margin * s.x_height
        if widest < 4 * s.x_height:  # not a line that can be cut: a very tall one; read it smaller
            chunk = self._chunk([line], index)
            return [replace(chunk, scale=self._fitting_scale(line.box, scale))]
        widest /= scale  # page pixels
        glyphs = line.glyphs[np.argsort(ink.x0[line.glyphs], kind="stable")]
        chunks, start = [], 0
        reach = np.maximum.accumulate(ink.x1[glyphs])
        while start < len(glyphs):
            left, end = ink.x0[glyphs[start]], line.box[2]
            stop = len(glyphs)
            if end - left > widest:
                even = (end - left) / math.ceil((end - left) / widest)  # parts of like length: no crumb at the end
                cuts = np.arange(start + 1, len(glyphs))
                gaps = ink.x0[glyphs[cuts]] - reach[cuts - 1]
                place = reach[cuts - 1] - left
                for low, high in ((0.75 * even, min(widest, 1.25 * even)), (0, widest)):
                    usable = (gaps > 0) & (place >= low) & (place <= high)
                    if usable.any():
                        stop = int(cuts[usable][np.argmax(gaps[usable])])
                        break
                else:  # joined-up writing: up to the next gap, read smaller
                    later = cuts[gaps > 0]
                    stop = int(later[0]) if len(later) else len(glyphs)
            part = glyphs[start:stop]
            box = (int(ink.x0[part].min()), line.box[1], int(ink.x1[part].max()), line.box[3])
            fitting = self._fitting_scale(box, scale)
            chunks.append(Chunk(box, [line], index, line.x_height, fitting, part, part=len(chunks)))
            start = stop
        return chunks

    def _fitting_scale(self, box, scale):
        while not self._box_fits(box, scale) and scale > 1e-3:
            scale *= 0.95
        return scale


def _analyse(gray, settings, factor, size):
    page, mask = normalise_page(gray)
    if mask is None:
        return PageLayout(page, [], None, 0.0, factor, size, 0.0, settings)
    ink = Ink(mask)
    unit = ink.typical_height()
    angle = 0.0
    if settings.deskew and unit:
        angle = skew_of(ink, unit, page.width)
        if angle:
            page = page.rotate(angle, Image.Resampling.BICUBIC, fillcolor=255)
            mask = ink_mask(page)
            ink = Ink(np.zeros((page.height, page.width), np.bool_) if mask is None else mask)
            unit = ink.typical_height()
    if not unit:
        return PageLayout(page, [], ink, 0.0, factor, size, 0.0, settings)
    glyphs = ink.glyphs(unit)
    columns = _columns(ink, glyphs, unit)
    rows = [_rows(ink, column, unit) for column in columns]
    rows = _measured(ink, rows, unit)
    blocks = [block for column in rows for block in _blocks(column)]
    unit = float(np.median([line.x_height for block in blocks for line in block.lines])) if blocks else 0.0
    return PageLayout(page, blocks, ink, angle, factor, size, unit, settings)


def _columns(ink, glyphs, unit, depth=0):
    """Parts of a page in reading order, each one column of text: `list` of index arrays.

    A gutter is a rectangle of white, at least 1.5 u wide, with running text of several lines on both sides. What
    stands above and below it (titles, figures across the page) is cut off and looked at again.
    """
    if len(glyphs) < 40 or depth > 12:
        return [glyphs] if len(glyphs) else []
    x0, y0, x1, y1 = ink.x0[glyphs], ink.y0[glyphs], ink.x1[glyphs], ink.y1[glyphs]
    cell = unit / 2
    left, top = x0.min(), y0.min()
    cols, rows = int((x1.max() - left) / cell) + 1, int((y1.max() - top) / cell) + 1
    if cols < 50:  # 25 u: no room for two columns
        return [glyphs]
    a, b = ((x0 - left) / cell).astype(int), np.ceil((x1 - left) / cell).astype(int)
    c, d = ((y0 - top) / cell).astype(int), np.ceil((y1 - top) / cell).astype(int)
    corners = np.zeros((rows + 2, cols + 2), np.int32)
    np.add.at(corners, (c, a), 1)
    np.add.at(corners, (d, b), 1)
    np.add.at(corners, (c, b), -1)
    np.add.at(corners, (d, a), -1)
    inked = (corners.cumsum(0).cumsum(1) > 0)[:rows, :cols]
    wide = inked[:, :-2] | inked[:, 1:-1] | inked[:, 2:]  # white for three cells, 1.5 u
    col, begin, end = runs_of_mask(~wide.T)
    # 14 cells are 7 u: at least three lines; 22 are 11 u of text on both sides.
    tall = (end - begin >= 14) & (col >= 22) & (col < cols - 24)
    candidates = sorted(zip((end - begin)[tall], col[tall], begin[tall], end[tall], strict=True), reverse=True)
    tried = []
    for _, column, first, last in candidates:
        if any(abs(column - t[0]) < 6 and first >= t[1] - 4 and last <= t[2] + 4 for t in tried):
            continue
        tried.append((column, first, last))
        if len(tried) > 24:
            break
        if not _is_gutter(inked, column, first, last):
            continue
        middle = (y0 + y1) / 2
        # Ink that ends the gutter belongs to a line across it; the half u more keeps that line's commas with it.
        upper = top + first * cell + (0.5 * unit if first > 0 else 0)
        lower = top + last * cell - (0.5 * unit if last < rows else 0) + (unit if last >= rows else 0)
        lower = max(lower, upper)
        above, below = middle < upper, middle > lower
        at_left = ~above & ~below & ((x0 + x1) / 2 < left + (column + 1.5) * cell)
        at_right = ~above & ~below & ~at_left
        if not at_left.any() or not at_right.any():
            continue
        parts = [glyphs[which] for which in (above, at_left, at_right, below)]
        return [column for part in parts for column in _columns(ink, part, unit, depth + 1)]
    return [glyphs]


def _is_gutter(inked, column, first, last):
    """Whether text of a column's look stands on both sides of a white strip of the grid of half-u cells."""
    fills, tops, bottoms, lines = [], [], [], []
    sides = inked[first:last, :column], inked[first:last, column + 3 :]
    if not sides[0].any() or not sides[1].any():
        return False
    used = [np.flatnonzero(side.any(0)) for side in sides]
    white = 3 + column - 1 - used[0][-1] + used[1][0]
    for side, cells in zip(sides, used, strict=True):
        side = side[:, cells[0] : cells[-1] + 1]
        if side.shape[1] < 22:
            return False
        filled = side.any(1)
        starts = np.flatnonzero(np.diff(np.concatenate([[0], filled.astype(int)])) == 1)
        lines.append(max(len(starts), filled.sum() // 5))  # a line and the white below it take about five cells
        reach = side[filled]
        extent = side.shape[1] - reach.argmax(1) - reach[:, ::-1].argmax(1)
        fills.append(min(float(extent.mean() / side.shape[1]), float(reach.mean() / 0.5)))
        tops.append(np.flatnonzero(filled)[0])
        bottoms.append(np.flatnonzero(filled)[-1])
    if min(lines) < (
        3 if white >= 5 else 5
    ):  # rivers through two or three lines are common, through five they are not
        return False
    return min(fills) >= 0.55 and min(bottoms) - max(tops) >= 10


def _rows(ink, glyphs, unit, depth=0):
    """Rows of one column, top to bottom; a row is a `list` of index arrays, its cells from left to right."""
    if not len(glyphs):
        return []
    order = glyphs[np.argsort(ink.y0[glyphs], kind="stable")]
    reach = np.maximum.accumulate(ink.y1[order])
    cuts = np.flatnonzero(ink.y0[order][1:] >= reach[:-1]) + 1
    strips = _with_their_dots(ink, np.split(order, cuts), unit)
    rows = []
    for strip in strips:
        rows += _rows_of_strip(ink, strip, unit, depth)
    return rows


def _with_their_dots(ink, strips, unit):
    """Joins strips that hold only the dots, accents or low strokes of the line beside them to that line."""
    spans = [(ink.y0[s].min(), ink.y1[s].max()) for s in strips]
    heights = [b - a for a, b in spans]
    target = list(range(len(strips)))
    for i, (a, b) in enumerate(spans):
        best = None
        for j in (i + 1, i - 1):
            if 0 <= j < len(strips) and heights[i] < 0.4 * heights[j] and heights[j] >= 0.7 * unit:
                gap = spans[j][0] - b if j > i else a - spans[j][1]
                if gap <= 0.35 * heights[j] and (best is None or gap < best[0]):
                    best = (gap, j)
        if best:
            target[i] = best[1]
    joined = {}
    for i, strip in enumerate(strips):
        joined.setdefault(target[i] if target[target[i]] == target[i] else i, []).append(strip)
    return [np.concatenate(joined[key]) for key in sorted(joined)]


def _rows_of_strip(ink, strip, unit, depth):
    """Rows of a strip that no white row crosses: one, or cells with rows of their own, or rows that touch."""
    top, bottom = ink.y0[strip].min(), ink.y1[strip].max()
    heights = ink.height[strip]
    tall = heights[heights > 0.5 * unit]
    local = float(np.quantile(tall, 0.3)) if len(tall) else unit  # letters without tails and tops are that common
    gap = 4.0 * max(unit, min(local, 3 * unit))
    if bottom - top > 2.7 * local and len(strip) > 3 and depth < 20:
        cells = _cells(ink, strip, 1.5 * unit)
        if len(cells) > 1:
            parts = [_rows(ink, cell, unit, depth + 1) for cell in cells]
            if any(len(part) > 1 for part in parts):
                return [row for part in parts for row in part]
        lines = _touching_lines(ink, strip, local)
        if len(lines) > 1:
            return [_cells(ink, line, gap) for line in lines]
    return [_cells(ink, strip, gap)]


def _cells(ink, glyphs, gap):
    """Groups of glyphs from left to right, parted by white wider than `gap`."""
    order = glyphs[np.argsort(ink.x0[glyphs], kind="stable")]
    reach = np.maximum.accumulate(ink.x1[order])
    cuts = np.flatnonzero(ink.x0[order][1:] - reach[:-1] > gap) + 1
    return np.split(order, cuts)


def _touching_lines(ink, strip, local):
    """Lines that overlap in height (tight leading, tall brackets), parted where least ink lies between bands."""
    top, bottom = int(ink.y0[strip].min()), int(ink.y1[strip].max())
    usual = strip[ink.height[strip] <= 2.3 * local]
    if len(usual) < 4:
        return [strip]
    change = np.zeros(bottom - top + 1)
    width = np.minimum(ink.width[usual], 6 * local)
    # The middle of each letter: tails and tops, where neighbouring lines meet, count less.
    quarter = ink.height[usual] // 5
    np.add.at(change, ink.y0[usual] + quarter - top, width)
    np.add.at(change, ink.y1[usual] - quarter - top, -width)
    profile = np.cumsum(change)[:-1]
    size = max(1, int(local / 3))
    profile = np.convolve(profile, np.ones(size) / size, "same")
    high = profile > 0.35 * profile.max()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], high.astype(int), [0]])))
    bands = [(a, b) for a, b in zip(edges[0::2], edges[1::2], strict=True) if b - a >= 0.35 * local]
    if len(bands) < 2:
        return [strip]
    borders = []
    for (_, a), (b, _) in pairwise(bands):
        if b > a:
            between = profile[a:b]
            if between.min() < 0.3 * profile.max():
                low = np.flatnonzero(between <= between.min() + 1e-9)
                borders.append(top + a + int(low[len(low) // 2]))
    if not borders:
        return [strip]
    cuts = [
        (piece, y)
        for y in reversed(borders)
        for piece in strip[ink.height[strip] > 1.9 * local]
        if y - ink.y0[piece] > 0.6 * local and ink.y1[piece] - y > 0.6 * local
    ]
    pieces = np.concatenate([strip, np.array(ink.split(cuts), strip.dtype)])
    middle = (ink.y0[pieces] + ink.y1[pieces]) / 2
    place = np.searchsorted(borders, middle, "right")
    lines = [pieces[place == i] for i in range(len(borders) + 1)]
    return [line for line in lines if len(line)]


def _measured(ink, columns, unit):
    """Rows of glyphs to rows of `TextLine`s with their x-height; what is not text is dropped.

    The x-height is the height of the band between the outermost rows of pixels that hold half as much ink as the band
    does, to a fraction of a pixel. Lines of capitals or figures, which have no band of their own, take the page's
    usual size, and so do those whose leader dots outweigh their letters.
    """
    cells = [cell for rows in columns for row in rows for cell in row]
    if not cells:
        return [[] for _ in columns]
    line_of = np.full(len(ink.x0), -1)
    for index, cell in enumerate(cells):
        line_of[cell] = index
    tops = np.array([ink.y0[cell].min() for cell in cells])
    heights = np.array([ink.y1[cell].max() for cell in cells]) - tops
    offsets = np.concatenate([[0], np.cumsum(heights)])
    line = line_of[ink.label]
    used = line >= 0
    place = offsets[line[used]] + ink.row[used] - tops[line[used]]
    profile = np.bincount(place, (ink.stop - ink.start)[used], offsets[-1])

    bands, flat = np.zeros((len(cells), 2)), np.zeros(len(cells), np.bool_)
    for index in range(len(cells)):
        low, high = _band(profile[offsets[index] : offsets[index + 1]])
        bands[index] = low, high
        size = high - low
        flat[index] = low < 0.22 * size and heights[index] - high < 0.22 * size
    sizes = bands[:, 1] - bands[:, 0]
    counts = np.array([len(cell) for cell in cells])
    sure = ~flat & (counts >= 5)
    spiky = heights > 3.2 * sizes  # as high as letters with tops and tails are not: dots, or tall brackets
    dotted = spiky & (sizes < 0.5 * _typical(sizes, counts, sure & ~spiky))
    usual = _typical(sizes, counts, sure & ~dotted)

    result, row_number = [], 0
    position = 0
    for rows in columns:
        lines = []
        for row in rows:
            kept = []
            for cell in row:
                index, position = position, position + 1
                box = (ink.x0[cell].min(), ink.y0[cell].min(), ink.x1[cell].max(), ink.y1[cell].max())
                box = tuple(int(v) for v in box)
                if not _is_text(ink, cell, box, sizes[index], usual or unit):
                    continue
                x_height = sizes[index]
                if counts[index] < 5 or flat[index]:
                    x_height = _borrowed(x_height, flat[index], usual)
                elif dotted[index]:
                    x_height = usual
                baseline = tops[index] + bands[index, 1]
                kept.append((TextLine(box, float(x_height), row_number, float(baseline), cell), baseline))
            if kept:
                lines.append(kept)
                row_number += 1
        result.append(lines)
    return result


def _typical(sizes, counts, which):
    """Median x-height of the lines `which`, each counted as often as it has glyphs; 0 where there is none."""
    return float(np.median(np.repeat(sizes[which], counts[which]))) if which.any() else 0.0


def _band(profile):
    """Upper and lower border, in fractions of pixels, of the band of small letters in the ink per row of one line."""
    peak = profile.max()
    level = 0.5 * profile[profile >= 0.5 * peak].mean()
    above = np.flatnonzero(profile >= level)
    first, last = int(above[0]), int(above[-1])
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    # Row i covers [i, i + 1). A border row of half ink moves the border by half a pixel, as antialiasing of the
    # band's edge does.
    low = first + (1.0 - min(1.0, profile[first] / (2 * level))) - min(1.0, before / (2 * level)) * 0.5
    high = last + 1 - (1.0 - min(1.0, profile[last] / (2 * level))) + min(1.0, after / (2 * level)) * 0.5
    return low, max(high, low + 1.0)


def _borrowed(size, flat, usual):
    """x-height of a line too short or too even to tell: capitals and figures are 1.3 to 1.7 times as tall as an x."""
    if usual and 0.75 * usual <= size <= 1.75 * usual:
        return usual
    return 0.7 * size if flat else size


def _is_text(ink, cell, box, size, usual):
    """Whether a row of ink looks like letters: not dirt, not a stroke of a drawing, not the texture of a picture."""
    w, h = ink.width[cell], ink.height[cell]
    width, height = box[2] - box[0], box[3] - box[1]
    tallest = h.max()
    if tallest < 0.45 * usual or tallest < 4:
        return False
    if height > 14 * usual:
        return False
    density = ink.area[cell].sum() / (width * height)
    letters = (h > 0.4 * tallest) & (w < 4 * np.maximum(h, 0.4 * usual) + 6 * usual)
    if len(cell) <= 2:
        lone = width / height
        if tallest > 2.6 * usual or (lone > 8 and len(cell) == 1 and density > 0.6):
            return False
        if len(cell) == 1 and ((density > 0.85 and lone > 0.45) or density < 0.12):
            return False
        return lone < 25
    if density > 0.75 or not letters.any():
        return False
    if tallest > 5 * usual and letters.sum() < 3:
        return False
    # Dirt and dither: far more crumbs than letters.
    return letters.sum() >= 0.08 * len(cell)


def _blocks(rows):
    """Paragraphs of one column: rows of one size, close below each other, broken where a first line is indented."""
    blocks, current = [], []
    pitches = []
    for upper, lower in pairwise(rows):
        pitch = lower[0][1] - upper[0][1]
        size = upper[0][0].x_height
        if 1.6 * size < pitch < 4.2 * size:
            pitches.append(pitch / size)
    usual = float(np.median(pitches)) if pitches else 2.9
    margin_left = min((cell.box[0] for row in rows for cell, _ in row), default=0)
    margin_right = max((cell.box[2] for row in rows for cell, _ in row), default=0)
    for row in rows:
        if current and _begins_block(current, row, usual, margin_left, margin_right):
            blocks.append(current)
            current = []
        current.append(row)
    if current:
        blocks.append(current)
    result = []
    for block in blocks:
        lines = [cell for row in block for cell, _ in row]
        result.append(TextBlock(_union([line.box for line in lines]), lines))
    return result


def _begins_block(block, row, usual, margin_left, margin_right):
    size = np.median([cell.x_height for cell, _ in block[-1]])
    new = np.median([cell.x_height for cell, _ in row])
    if not 0.77 < new / size < 1.3:
        return True
    pitch = (row[0][1] - block[-1][0][1]) / size
    if pitch > max(1.35 * usual, usual + 0.7) or pitch < 0.5:
        return True
    before, after = _union([c.box for c, _ in block[-1]]), _union([c.box for c, _ in row])
    if before[2] <= after[0] or after[2] <= before[0]:  # not below each other
        return True
    # A first line set in by 1 to 5 u under a line that began at the margin. Both in running text: code is set in too.
    indent = after[0] - before[0]
    full = margin_right - margin_left
    if size < indent < 5 * size and after[2] > margin_right - 0.1 * full and full > 20 * size:
        return abs(before[0] - margin_left) < 0.8 * size and after[2] - after[0] > 0.7 * full
    return False


def _union(boxes):
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _round_up(value, step):
    return -(-int(value) // step) * step
