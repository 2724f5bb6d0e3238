"""The parts that pages are made of: type on lines, rules, boxes and pictures on a sheet, with a box per character.

A `Sheet` collects lines in reading order and draws them at the end, all at once. Everything on one printed baseline is
one line of the text, its parts joined by one blank: table cells, the label and the value of a field, an item and its
price. Lengths are in pixels, y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import skia

from .fonts import Metrics, metrics

INK = 1.0  # tone of full ink; 0 is the paper's


class Style:
    """A font at a size.

    Args:
        path: font file.
        x_height: in pixels; the size is what gives it.
        leading: distance of two baselines as a multiple of the x-height, at least what the letters need.
        tracking: added between characters, pixels.
        tone: how much of the ink, 1 all, 0 none (the paper's tone, to be read on something dark).
        colour: (R, G, B) instead, on sheets that have colours.
    """

    def __init__(
        self,
        path: str,
        x_height: float,
        leading: float = 2.6,
        tracking: float = 0.0,
        tone: float = INK,
        colour: tuple[int, int, int] | None = None,
    ):
        self.path, self.tracking, self.tone, self.colour, self.leading = path, tracking, tone, colour, leading
        self.metrics: Metrics = metrics(path)
        self.size = x_height / self.metrics.x_height  # px of one em
        self.x_height = x_height
        self.ascent, self.descent = self.metrics.ascent * self.size, self.metrics.descent * self.size
        self.pitch = max(leading * x_height, 1.04 * (self.ascent + self.descent))
        self.space = self.measure(" ")

    def at(self, factor: float, tone: float | None = None) -> Style:
        """The same font, ``factor`` times as large."""
        tone = self.tone if tone is None else tone
        return Style(self.path, self.x_height * factor, self.leading, self.tracking * factor, tone, self.colour)

    def font(self) -> skia.Font:
        """For drawing: unhinted, so that ink is where the outlines say."""
        font = skia.Font(self.metrics.face, self.size)
        font.setSubpixel(True)
        font.setLinearMetrics(True)
        font.setEdging(skia.Font.Edging.kAntiAlias)
        font.setHinting(skia.FontHinting.kNone)
        return font

    def advances(self, text: str) -> np.ndarray:
        """(len(text),): how far the pen goes at each character."""
        return self.metrics.advances[self.metrics.find(text)[1]] * self.size + self.tracking

    def measure(self, text: str) -> float:
        """Width of ``text``."""
        return float(self.advances(text).sum())

    def shorten(self, text: str, width: float) -> str:
        """The beginning of ``text`` that is not wider than ``width``, cut at a blank where there is one; or ""."""
        ends = np.cumsum(self.advances(text))
        count = int(np.searchsorted(ends, width, side="right"))
        if count >= len(text):
            return text
        cut = text[: count + 1].rfind(" ")
        return text[: cut if cut > 0 else count].rstrip()


def wrap(words: Sequence[str], style: Style, width: float, most: int) -> tuple[list[str], int]:
    """Break ``words`` into at most ``most`` lines, each as long as fits ``width``.

    A word wider than a whole line is cut. Returns the lines and how many words they took.
    """
    joined = " ".join(words)
    ends_of_all = np.cumsum(style.advances(joined))
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    stops = np.cumsum(lengths + 1) - 1  # index in ``joined`` just after each word
    ends = ends_of_all[stops - 1]
    begins = np.concatenate([[0.0], ends_of_all[stops[:-1]]])
    starts = (stops - lengths).tolist()
    stops = stops.tolist()
    lines, word = [], 0
    while word < len(words) and len(lines) < most:
        after = int(ends.searchsorted(begins[word] + width, side="right"))
        if after <= word:
            cut = style.shorten(words[word], width)
            if not cut:
                break
            lines.append(cut)
            word += 1
        else:
            lines.append(joined[starts[word] : stops[after - 1]])
            word = after
    return lines, word


@dataclass
class Line:
    """A run of characters on a baseline.

    Args:
        stretch: added to each blank, for justified lines.
        joint: what stands between it and the line before it in the text: a line feed or a blank.
    """

    text: str
    style: Style
    x: float
    baseline: float
    stretch: float = 0.0
    joint: str = "\n"


@dataclass
class Mark:
    """A shape that is not text: ``form`` is ``fill`` or ``frame`` (of a rectangle), ``oval``, ``disc``, ``line``."""

    form: str
    box: tuple[float, float, float, float]
    tone: float = INK
    thickness: float = 1.0
    colour: tuple[int, int, int] | None = None


@dataclass
class Sheet:
    """A blank page and what has been put on it so far.

    Args:
        width, height: in pixels.
        colours: RGB, as pages with pictures are; else grey.
    """

    width: int
    height: int
    colours: bool = False
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    pictures: list[tuple[np.ndarray, int, int]] = field(default_factory=list)  # (H, W, 3) uint8, left, top
    licenses: list[str] = field(default_factory=list)  # of the pictures

    def type(self, text: str, style: Style, x: float, baseline: float, stretch: float = 0.0, joint: str = "\n"):
        """Put ``text`` with its pen at (x, baseline); blanks at its ends are dropped, nothing is put for nothing."""
        begin = len(text) - len(text.lstrip())
        if begin:
            x += style.measure(text[:begin])
        text = text.strip()
        if text:
            self.lines.append(Line(text, style, x, float(round(baseline)), stretch, joint))

    def text(self) -> str:
        """All lines in reading order."""
        return "".join(part for line in self.lines for part in (line.joint, line.text))[1:]

    def draw(self, ink: float, paper: float) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (H, W) or (H, W, 3) uint8, and (len(text), 4) float boxes, zeros for white space.

        Args:
            ink, paper: grey levels.
        """
        if self.colours:
            pixels = np.empty((self.height, self.width, 4), dtype=np.uint8)
            pixels[:] = (round(paper),) * 3 + (255,)
            for picture, left, top in self.pictures:
                pixels[top : top + picture.shape[0], left : left + picture.shape[1], :3] = picture
            info = skia.ImageInfo.Make(self.width, self.height, skia.kRGBA_8888_ColorType, skia.kOpaque_AlphaType)
        else:
            pixels = np.zeros((self.height, self.width), dtype=np.uint8)  # how much ink
            info = skia.ImageInfo.MakeA8(self.width, self.height)
        surface = skia.Surface.MakeRasterDirect(info, pixels)
        canvas = surface.getCanvas()
        for mark in self.marks:
            _draw_mark(canvas, mark, self._paint(mark.tone, mark.colour, ink, paper))
        boxes = self._draw_lines(canvas, ink, paper)
        del canvas, surface
        if self.colours:
            return np.ascontiguousarray(pixels[..., :3]), boxes
        table = np.round(paper + (ink - paper) * np.arange(256) / 255).astype(np.uint8)
        return table.take(pixels), boxes

    def _paint(self, tone, colour, ink: float, paper: float) -> skia.Paint:
        if self.colours:
            colour = colour or (round(paper + (ink - paper) * tone),) * 3
            return skia.Paint(AntiAlias=True, Color=skia.Color(*(int(part) for part in colour)))
        if tone > 0:
            return skia.Paint(AntiAlias=True, Color=skia.Color(0, 0, 0, round(255 * tone)))
        return skia.Paint(AntiAlias=True, Color=skia.ColorBLACK, BlendMode=skia.BlendMode.kDstOut)

    def _draw_lines(self, canvas: skia.Canvas, ink: float, paper: float) -> np.ndarray:
        """Draw the lines, those of one style in one go, and return the boxes of the whole text."""
        starts, position = [], -1
        for line in self.lines:
            position += 1  # the joint
            starts.append(position)
            position += len(line.text)
        boxes = np.zeros((max(position, 0), 4))
        by_style: dict[int, list[int]] = {}
        for index, line in enumerate(self.lines):
            by_style.setdefault(id(line.style), []).append(index)
        for indices in by_style.values():
            lines = [self.lines[index] for index in indices]
            style = lines[0].style
            codes, slots = style.metrics.find("".join(line.text for line in lines))
            lengths = [len(line.text) for line in lines]
            first = np.cumsum([0, *lengths[:-1]])
            blank = codes == 32
            advances = style.metrics.advances[slots] * style.size + style.tracking
            if any(line.stretch for line in lines):
                advances[blank] += np.repeat([line.stretch for line in lines], lengths)[blank]
            pens = np.cumsum(advances) - advances
            pens += np.repeat(np.array([line.x for line in lines]) - pens[first], lengths)
            baselines = np.repeat([line.baseline for line in lines], lengths)
            found = style.metrics.bounds[slots] * style.size
            found[:, 0::2] += pens[:, None]
            found[:, 1::2] += baselines[:, None]
            found[blank] = 0
            boxes[np.arange(len(codes)) + np.repeat(np.array([starts[i] for i in indices]) - first, lengths)] = found
            glyphs, pens = style.metrics.glyphs[slots].tolist(), pens.tolist()
            font, builder = style.font(), skia.TextBlobBuilder()
            for line, begin, length in zip(lines, first.tolist(), lengths, strict=True):
                part = slice(begin, begin + length)
                builder.allocRunPosH(font, glyphs[part], pens[part], line.baseline)
            canvas.drawTextBlob(builder.make(), 0, 0, self._paint(style.tone, style.colour, ink, paper))
        return boxes


def _draw_mark(canvas: skia.Canvas, mark: Mark, paint: skia.Paint) -> None:
    x0, y0, x1, y1 = mark.box
    if mark.form == "line":
        paint.setStrokeWidth(mark.thickness)
        canvas.drawLine(x0, y0, x1, y1, paint)
        return
    if mark.form in ("frame", "oval"):
        paint.setStyle(skia.Paint.kStroke_Style)
        paint.setStrokeWidth(mark.thickness)
    draw = canvas.drawOval if mark.form in ("oval", "disc") else canvas.drawRect
    draw(skia.Rect.MakeLTRB(x0, y0, x1, y1), paint)


# -------------------------------------------------------------------------------------------------------------- flow


class Flow:
    """Text that runs down one column and on in the next.

    Args:
        sheet: to put it on.
        columns: (left, top, right, bottom) of each, in reading order.
    """

    def __init__(self, sheet: Sheet, columns: Sequence[tuple[float, float, float, float]]):
        self.sheet, self.columns, self.column = sheet, list(columns), 0
        self.left, self.top, self.right, self.bottom = self.columns[0]
        self.y = self.top

    @property
    def width(self) -> float:
        """Of the column."""
        return self.right - self.left

    @property
    def full(self) -> bool:
        """No column is left."""
        return self.column >= len(self.columns)

    def room(self, style: Style) -> int:
        """How many lines of ``style`` the column still holds."""
        free = self.bottom - self.y - style.ascent - style.descent
        return 0 if self.full or free < 0 else 1 + int(free / style.pitch)

    def next_column(self) -> bool:
        """Go on at the top of the next column; False when there is none."""
        self.column += 1
        if self.full:
            return False
        self.left, self.top, self.right, self.bottom = self.columns[self.column]
        self.y = self.top
        return True

    def gap(self, height: float) -> None:
        """Leave ``height`` free, but not at the top of a column."""
        if self.y > self.top:
            self.y += height

    def reserve(self, style: Style, lines: int = 1) -> bool:
        """Make room for so many lines on end, in the next column if need be; False when the page is full."""
        while not self.full and self.room(style) < lines:
            if self.y == self.top:  # not even in an empty column
                return self.room(style) > 0
            self.next_column()
        return not self.full

    def line(self, parts: Sequence[tuple[str, Style, float]], joint: str = "\n") -> float | None:
        """One printed line of (text, style, x from the column's left); returns its baseline, or None when full."""
        tallest = max((style for _, style, _ in parts), key=lambda style: style.ascent)
        if not self.reserve(tallest):
            return None
        baseline = self.y + max(style.ascent for _, style, _ in parts)
        for text, style, x in parts:
            if text:
                self.sheet.type(text, style, self.left + x, baseline, joint=joint)
                joint = " "
        self.y += max(style.pitch for _, style, _ in parts)
        return baseline

    def paragraph(
        self,
        words: Sequence[str],
        style: Style,
        *,
        align: str = "left",
        indent: float = 0.0,
        inset: float = 0.0,
        right_inset: float = 0.0,
    ) -> int:
        """Wrapped words; returns how many lines were set, over columns if need be.

        Args:
            align: ``left``, ``justify``, ``centre`` or ``right``.
            indent: of the first line.
            inset, right_inset: of all lines.
        """
        words, set_lines, first = list(words), 0, True
        while words:
            if not self.reserve(style):
                break
            width = self.width - inset - right_inset
            if first and indent:
                lines, taken = wrap(words, style, width - indent, 1)
            else:
                lines, taken = wrap(words, style, width, self.room(style))
            if not lines:
                break
            words = words[taken:]
            for number, line in enumerate(lines):
                shift = indent if first and indent else 0.0
                x, stretch = self.left + inset + shift, 0.0
                if align != "left":
                    free = width - shift - style.measure(line)
                    blanks = line.count(" ")
                    last = not words and number == len(lines) - 1
                    if align == "justify" and blanks and not last and free < 0.3 * width:
                        stretch = free / blanks
                    elif align == "centre":
                        x += free / 2
                    elif align == "right":
                        x += free
                self.sheet.type(line, style, x, self.y + style.ascent, stretch)
                self.y += style.pitch
                set_lines += 1
            first = False
        return set_lines
