"""The parts that pages are made of: type on lines, rules, boxes and pictures on a sheet, with a box per character.

A `Sheet` collects lines in reading order and draws them at the end, all at once. Everything on one printed baseline is
one line of the text, its parts joined by one blank: table cells, the label and the value of a field, an item and its
price. Lengths are in pixels, y grows downwards.
"""

from __future__ import annotations

from bisect import bisect_right
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
        _, slots = self.metrics.find(text)  # may have to learn a character, which replaces the arrays
        return self.metrics.advances.take(slots) * self.size + self.tracking

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


class Measured:
    """Words in running order, measured once, to be broken into lines of any widths.

    Args:
        words: at least one.
        style: that they are set in.
    """

    def __init__(self, words: Sequence[str], style: Style):
        self.words, self.style, self.joined = words, style, " ".join(words)
        pens = style.advances(self.joined).cumsum()
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        stops = (lengths + 1).cumsum() - 1  # index in ``joined`` just after each word
        self.ends = pens[stops - 1].tolist()
        self.begins = [0.0, *pens[stops[:-1]].tolist()]
        self.starts, self.stops = (stops - lengths).tolist(), stops.tolist()

    def lines(self, word: int, width: float, most: int) -> tuple[list[str], list[float], int]:
        """At most ``most`` lines from ``word`` on, each as long as fits ``width``; a wider word is cut.

        Returns the lines, the width of each, and the first word that is not on them.
        """
        lines, widths = [], []
        while word < len(self.words) and len(lines) < most:
            after = bisect_right(self.ends, self.begins[word] + width, word)
            if after > word:
                lines.append(self.joined[self.starts[word] : self.stops[after - 1]])
                widths.append(self.ends[after - 1] - self.begins[word])
                word = after
                continue
            cut = self.style.shorten(self.words[word], width)
            if not cut:
                break
            lines.append(cut)
            widths.append(self.style.measure(cut))
            word += 1
        return lines, widths, word


def wrap(words: Sequence[str], style: Style, width: float, most: int) -> tuple[list[str], int]:
    """Break ``words`` into at most ``most`` lines, each as long as fits ``width``.

    A word wider than a whole line is cut. Returns the lines and how many words they took.
    """
    lines, _, taken = Measured(words, style).lines(0, width, most)
    return lines, taken


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
        if text[:1].isspace():
            x += style.measure(text[: len(text) - len(text.lstrip())])
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
            inked = bytearray(self.height * self.width)  # how much ink
            pixels = np.frombuffer(inked, dtype=np.uint8).reshape(self.height, self.width)
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
        return np.frombuffer(inked.translate(table.tobytes()), dtype=np.uint8).reshape(pixels.shape), boxes

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
            of_line = np.arange(len(lines)).repeat(lengths)
            first = np.cumsum([0, *lengths[:-1]])
            blank = (codes == 32).nonzero()[0]
            advances = (style.metrics.advances * style.size + style.tracking).take(slots)
            advances[blank] += np.array([line.stretch for line in lines]).take(of_line[blank])
            pens = advances.cumsum() - advances
            pens += (np.array([line.x for line in lines]) - pens[first]).take(of_line)
            baselines = np.array([line.baseline for line in lines]).take(of_line)
            found = (style.metrics.bounds * style.size).take(slots, axis=0)
            found += np.stack([pens, baselines, pens, baselines], axis=1)
            found[blank] = 0
            starts_here = np.array([starts[index] for index in indices])
            boxes[np.arange(len(codes)) + (starts_here - first).take(of_line)] = found
            black = (codes != 32).nonzero()[0]
            glyphs, pens = style.metrics.glyphs.take(slots[black]).tolist(), pens.take(black).tolist()
            stops = black.searchsorted(np.cumsum(lengths)).tolist()
            font, builder = style.font(), skia.TextBlobBuilder()
            for line, begin, stop in zip(lines, [0, *stops], stops, strict=False):
                builder.allocRunPosH(font, glyphs[begin:stop], pens[begin:stop], line.baseline)
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
        if not words:
            return 0
        measured, word, set_lines = Measured(words, style), 0, 0
        shift = indent
        while word < len(words) and self.reserve(style):
            width = self.width - inset - right_inset - shift
            most = 1 if shift else self.room(style)
            lines, widths, word = measured.lines(word, width, most)
            if not lines:
                break
            last = len(lines) - 1 if word == len(words) else -1
            for number, (line, wide) in enumerate(zip(lines, widths, strict=True)):
                x, stretch = self.left + inset + shift, 0.0
                free = width - wide
                if align == "justify":
                    if number != last and free < 0.3 * (width + shift) and (blanks := line.count(" ")):
                        stretch = free / blanks
                elif align == "centre":
                    x += free / 2
                elif align == "right":
                    x += free
                self.sheet.type(line, style, x, self.y + style.ascent, stretch)
                self.y += style.pitch
            set_lines += len(lines)
            shift = 0.0
        return set_lines
