"""Blocks of Markdown set in type with skia: pages, each with the blocks that stand on it and a box for each word.

`lay_out` turns blocks into strips that no page break divides, `paginate` puts strips into columns and pages, `draw`
makes pixels. What a page break does to the target:

- A paragraph is divided between lines; each part is a paragraph of its page. Through two columns of a page it is one.
- A list is divided between its outermost items, never within one; numbers go on as shown. A table is divided between
  rows and its header is drawn, and written, again; a block of code between lines: each part is a table or block of
  code of its own, in columns too, because both are seen to begin anew.
- A heading stays with what follows it.
- What cannot be set is left out before anything is placed, so no target holds it, and counted with its reason: a
  character the font has not, a formula that `matplotlib.mathtext` does not know, a line of code or a table too wide
  for the column, a list item or formula taller than it.

Lengths are in pixels. Sizes, shares and ranges are ours, chosen by looking at pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
import skia

from .markdown import (
    Block,
    Code,
    Formula,
    Heading,
    Items,
    Paragraph,
    Quote,
    Rule,
    Run,
    Runs,
    Table,
    join_words,
    split_words,
)

HEADING_SIZES = (1.9, 1.5, 1.25, 1.1, 1.0, 0.9)  # of the text's size; the last two are slanted as well
SMALLEST_CODE = 0.66  # of the text's size; a wider line of code is refused
MATH_FONTS = ("cm", "stix", "stixsans", "dejavusans", "dejavuserif")


class Unfit(ValueError):
    """A block cannot be set in this style; the message is the reason that is counted."""


# ----------------------------------------------------------------------------------------------------------- fonts


@dataclass(frozen=True)
class Family:
    """Files of one family; a style without a file is made from the upright one, bolder or slanted."""

    name: str
    regular: str
    bold: str | None = None
    italic: str | None = None
    bold_italic: str | None = None
    fixed_pitch: bool = False


def find_families(fonts: dict[str, list[str]]) -> list[Family]:
    """Families that have an upright text weight, by name; ``fonts`` as of `pages.fonts.load_fonts`."""
    found = []
    for name in sorted(fonts):
        styles: dict[tuple[bool, bool], str] = {}
        distance: dict[tuple[bool, bool], int] = {}
        for path in sorted(fonts[name]):
            face = _typeface(path)
            if face is None or face.fontStyle().width() != skia.FontStyle.kNormal_Width:
                continue
            style = face.fontStyle()
            key = (style.weight() >= 600, style.slant() != skia.FontStyle.kUpright_Slant)
            far = abs(style.weight() - (700 if key[0] else 400))
            if far <= 100 and far < distance.get(key, 101):
                styles[key], distance[key] = path, far
        if (False, False) in styles:
            # The flag of the file is not to be trusted: Courier Prime has it not.
            upright = skia.Font(_typeface(styles[False, False]), 100.0)
            narrow, wide = upright.measureText("i"), upright.measureText("W")
            fixed = abs(narrow - wide) < 1.0
            found.append(
                Family(
                    name,
                    styles[False, False],
                    styles.get((True, False)),
                    styles.get((False, True)),
                    styles.get((True, True)),
                    fixed,
                )
            )
    return found


@lru_cache(maxsize=1024)
def _typeface(path: str) -> skia.Typeface | None:
    return skia.Typeface.MakeFromFile(path)


class Face:
    """One font at one size, with its measures remembered."""

    def __init__(self, path: str, size: float, embolden: bool = False, slant: bool = False):
        self.font = skia.Font(_typeface(path), size)
        self.font.setSubpixel(True)
        self.font.setLinearMetrics(True)
        self.font.setEdging(skia.Font.Edging.kAntiAlias)
        self.font.setHinting(skia.FontHinting.kNone)
        self.font.setEmbolden(embolden)
        self.font.setSkewX(-0.22 if slant else 0.0)
        self.size = size
        metrics = self.font.getMetrics()
        self.ascent, self.descent = -metrics.fAscent, metrics.fDescent
        self._widths: dict[str, float] = {}
        self._ink: dict[str, tuple[float, float]] = {}
        self._known: dict[str, bool] = {}

    def width(self, text: str) -> float:
        known = self._widths.get(text)
        if known is None:
            known = self._widths[text] = self.font.measureText(text)
        return known

    def ink(self, text: str) -> tuple[float, float]:
        """Top and bottom of the ink, from the baseline, downwards positive."""
        known = self._ink.get(text)
        if known is None:
            boxes = self.font.getBounds(self.font.textToGlyphs(text))
            boxes = [box for box in boxes if not box.isEmpty()] or [skia.Rect(0, 0, 0, 0)]
            known = self._ink[text] = (min(box.top() for box in boxes), max(box.bottom() for box in boxes))
        return known

    def check(self, text: str) -> None:
        """Raise `Unfit` when the font lacks a character of ``text``."""
        for character in text:
            known = self._known.get(character)
            if known is None:
                known = self._known[character] = self.font.unicharToGlyph(ord(character)) != 0
            if not known:
                raise Unfit("block: characters that the font lacks")


# -------------------------------------------------------------------------------------------------------- formulas


@dataclass(frozen=True)
class MathBox:
    """A formula at 100 px to the em: glyphs and rules from the left end of its baseline, y downwards."""

    width: float
    ascent: float
    descent: float
    glyphs: tuple[tuple[str, float, int, float, float], ...]  # font file, size, glyph, x, y
    rules: tuple[tuple[float, float, float, float], ...]  # x0, y0, x1, y1


@lru_cache(maxsize=1)
def _math_parser():
    from matplotlib.mathtext import MathTextParser

    return MathTextParser("path")


@lru_cache(maxsize=20000)
def set_formula(latex: str, fontset: str, display: bool = False) -> MathBox | None:
    """Set ``latex`` with matplotlib's mathtext; None when that does not know some command in it.

    On a line of its own (``display``) fractions are as large as what stands beside them.
    """
    from matplotlib.font_manager import FontProperties

    if "$" in latex or len(latex) > 400:
        return None
    # Commands that are another's twin, or say only how the formula is placed.
    known = re.sub(r"\\(?:limits|nolimits|nonumber|displaystyle|textstyle|label\{[^}]*\})(?![A-Za-z])", "", latex)
    known = re.sub(r"\\(?:tfrac)(?![A-Za-z])", r"\\frac", known).replace(r"\lvert", "|").replace(r"\rvert", "|")
    known = re.sub(r"\\text(?:rm|normal)?(?![A-Za-z])", r"\\mathrm", known) if r"\text{" not in known else known
    if display:
        known = re.sub(r"\\frac(?![A-Za-z])", r"\\dfrac", known)
    try:
        parsed = _math_parser().parse(f"${known}$", 72, FontProperties(size=100, math_fontfamily=fontset))
    except (ValueError, RuntimeError, RecursionError):  # mathtext raises ValueError; FreeType RuntimeError
        return None
    glyphs = []
    for glyph in parsed.glyphs:
        font, size, code, x, y = glyph[0], glyph[1], glyph[2], glyph[-2], glyph[-1]
        index = glyph[3] if len(glyph) == 6 else font.get_char_index(code)  # matplotlib 3.11 says which glyph
        if index == 0:
            return None
        glyphs.append((font.fname, float(size), int(index), float(x), -float(y)))
    rules = tuple((float(x), -float(y + h), float(x + w), -float(y)) for x, y, w, h in parsed.rects)
    # The ink decides: mathtext's depth is rounded and shared by the whole line.
    tops = [-parsed.height + parsed.depth, *(y0 for _, y0, _, _ in rules)]
    shift = float(parsed.depth)  # mathtext's y is 0 at the bottom of the box
    return MathBox(
        float(parsed.width),
        float(max(-min(tops), parsed.height - parsed.depth)),
        shift,
        tuple((file, size, index, x, y + shift) for file, size, index, x, y in glyphs),
        tuple((x0, y0 + shift, x1, y1 + shift) for x0, y0, x1, y1 in rules),
    )


# ---------------------------------------------------------------------------------------------------------- styles


@dataclass(frozen=True)
class Style:
    """How a document looks. Lengths in pixels; greys from 0 (ink) to 1 (paper)."""

    width: int
    height: int
    text: Family
    headings: Family
    code: Family
    size: float  # of the text, em
    x_height: float
    columns: int = 1
    gap: float = 0.0  # between columns
    margins: tuple[float, float, float, float] = (0, 0, 0, 0)  # left, top, right, bottom
    leading: float = 1.35
    paragraph_gap: float = 0.6  # em
    justified: bool = False
    curly: bool = False
    bullet: str = "•"
    number_mark: str = "."
    table: str = "grid"  # grid, rows, book, zebra
    code_box: str = "fill"  # fill, frame, plain
    code_fill: float = 0.93
    code_span: bool = False  # a grey box behind code within a line
    quote: str = "bar"  # bar, indent
    heading_rule: bool = False
    centred_title: bool = False
    math: str = "stix"


def draw_style(rng: np.random.Generator, families: Sequence[Family], size: int) -> Style:
    """A random style for pages whose longer side is ``size`` pixels.

    Raises:
        ValueError: no family of fixed pitch, or none of other pitch, or ``size`` below 128.
    """
    if size < 128:
        raise ValueError(f"a page of Markdown needs a side of 128 pixels or more, not {size}")
    texts = [family for family in families if not family.fixed_pitch]
    codes = [family for family in families if family.fixed_pitch]
    if not texts or not codes:
        raise ValueError("Markdown pages need a family of fixed pitch and one of other pitch among the fonts")
    pick = lambda items: items[int(rng.integers(len(items)))]  # noqa: E731
    ratio = (0.707, 0.773, 1.0)[int(rng.choice(3, p=(0.4, 0.2, 0.4)))]
    width, height = round(size * ratio), size
    text = pick(texts)
    x_height = rng.uniform(5.0, 6.0 + size / 256)
    unit = Face(text.regular, 1000.0)
    em = x_height / max(-unit.ink("x")[0], 300.0) * 1000.0
    columns = 2 if width > 42 * em and rng.random() < 0.3 else 1
    margin = width * rng.uniform(0.03, 0.10)
    return Style(
        width,
        height,
        text,
        text if rng.random() < 0.6 else pick(texts),
        pick(codes),
        em,
        x_height,
        columns,
        gap=rng.uniform(1.5, 2.5) * em,
        margins=(margin, height * rng.uniform(0.03, 0.08), margin, height * rng.uniform(0.03, 0.08)),
        leading=rng.uniform(1.2, 1.55),
        paragraph_gap=rng.uniform(0.4, 0.9),
        justified=bool(rng.random() < 0.35),
        curly=bool(rng.random() < 0.5),
        bullet=pick(["•", "•", "–", "*", "-"]),
        number_mark=pick([".", ".", ")"]),
        table=pick(["grid", "rows", "book", "zebra"]),
        code_box=pick(["fill", "fill", "frame", "plain"]),
        code_fill=rng.uniform(0.88, 0.96),
        code_span=bool(rng.random() < 0.4),
        quote=pick(["bar", "bar", "indent"]),
        heading_rule=bool(rng.random() < 0.3),
        centred_title=bool(rng.random() < 0.15),
        math=pick(MATH_FONTS),
    )


# ---------------------------------------------------------------------------------------------------------- strips


@dataclass
class Glyphs:
    """Text in one face; ``word`` numbers the words of a strip, so that fragments of one word share a box."""

    x: float
    y: float  # baseline
    text: str
    face: Face
    word: int
    struck: bool = False


@dataclass
class MathGlyphs:
    x: float
    y: float
    box: MathBox
    scale: float
    latex: str
    word: int


@dataclass
class Bar:
    """A filled rectangle, or an outline when ``outline``."""

    x0: float
    y0: float
    x1: float
    y1: float
    grey: float
    outline: bool = False


@dataclass
class Strip:
    """A part of the page that no page break divides; places from its top left corner."""

    height: float
    marks: list[Glyphs | MathGlyphs | Bar]
    part: Block  # what of the document it shows
    key: tuple[int, ...]  # the block it is part of, and within quotations the block in it
    before: float = 0.0  # space above, except at the top of a column
    stays: bool = False  # with the strip that follows
    header: Strip | None = None  # drawn again above it at the top of a column


def lay_out(
    blocks: Iterable[Block], style: Style, skipped: Callable[[str], None] = lambda reason: None
) -> list[Strip]:
    """Blocks to strips, those that cannot be set left out and reported with the reason."""
    setter = _Setter(style)
    width = (style.width - style.margins[0] - style.margins[2] - (style.columns - 1) * style.gap) / style.columns
    tallest = style.height - style.margins[1] - style.margins[3]
    strips: list[Strip] = []
    for number, block in enumerate(blocks):
        try:
            new = setter.block(block, width, (number,))
            if any(strip.height + (strip.header.height if strip.header else 0) > tallest for strip in new):
                raise Unfit("block: taller than the page")
        except Unfit as reason:
            skipped(str(reason))
            continue
        strips.extend(new)
    return strips


@dataclass
class _Word:
    fragments: list[tuple[float, Run, Face | MathBox]]  # x within the word
    width: float
    ascent: float
    descent: float


class _Setter:
    """Sets blocks in one style; faces are made once."""

    def __init__(self, style: Style):
        self.style = style
        self.faces: dict[tuple, Face] = {}
        self.words = 0

    def face(self, family: Family, size: float, bold: bool = False, italic: bool = False) -> Face:
        key = (family.name, round(size, 3), bold, italic)
        if key not in self.faces:
            exact = {
                (False, False): family.regular,
                (True, False): family.bold,
                (False, True): family.italic,
                (True, True): family.bold_italic,
            }[bold, italic]
            if exact is not None:
                self.faces[key] = Face(exact, size)
            else:
                nearest = family.bold if bold and family.bold else family.italic if italic else None
                nearest = nearest or family.regular
                self.faces[key] = Face(
                    nearest, size, bold and nearest != family.bold, italic and nearest != family.italic
                )
        return self.faces[key]

    # -- lines of words

    def word(self, runs: list[Run], family: Family, size: float, bold: bool, italic: bool) -> _Word:
        x, fragments, ascent, descent = 0.0, [], 0.7 * size, 0.2 * size
        for run in runs:
            if run.math:
                box = set_formula(run.text, self.style.math)
                if box is None:
                    raise Unfit("formula: beyond mathtext")
                scale = size / 100
                fragments.append((x, run, box))
                x += box.width * scale
                ascent, descent = max(ascent, box.ascent * scale), max(descent, box.descent * scale)
                continue
            if run.code:
                face = self.face(self.style.code, 0.9 * size, bold or run.bold, italic or run.italic)
            else:
                face = self.face(family, size, bold or run.bold, italic or run.italic)
            text = self.curl(run.text) if not run.code else run.text
            face.check(text)
            fragments.append((x, replace(run, text=text), face))
            x += face.width(text)
        return _Word(fragments, x, ascent, descent)

    def curl(self, text: str) -> str:
        """Straight quotes as a typesetter prints them, when the style has it so; as many characters as before."""
        if not self.style.curly or ("'" not in text and '"' not in text):
            return text
        text = re.sub(r'(^|[(\[{<-])"', "\\1“", text).replace('"', "”")
        return re.sub(r"(^|[(\[{“<-])'(?=\w)", "\\1‘", text).replace("'", "’")

    def lines(
        self,
        runs: Runs,
        width: float,
        family: Family,
        size: float,
        bold: bool = False,
        italic: bool = False,
        justified: bool = False,
        centred: bool = False,
    ) -> list[tuple[float, list, Runs]]:
        """Lines of running text as (height, marks, runs of the line)."""
        pending = split_words(runs)
        space = self.face(family, size, bold, italic).width(" ")
        rows: list[tuple[list[_Word], list[list[Run]], float]] = []
        row: list[_Word] = []
        source: list[list[Run]] = []
        used = 0.0
        while pending:
            runs_of_word = pending.pop(0)
            word = self.word(runs_of_word, family, size, bold, italic)
            if row and used + space + word.width > width:
                rows.append((row, source, used))
                row, source, used = [], [], 0.0
            if word.width > width:
                # An address wider than the column: it could be divided anywhere, and the parts would read as words.
                raise Unfit("block: a word wider than the column")
            used += word.width + (space if row else 0.0)
            row.append(word)
            source.append(runs_of_word)
        if row:
            rows.append((row, source, used))
        result = []
        for index, (row, source, used) in enumerate(rows):
            ascent = max(word.ascent for word in row)
            descent = max(word.descent for word in row)
            height = max(self.style.leading * size, 1.1 * (ascent + descent))
            baseline = ascent + (height - ascent - descent) / 2
            slack = width - used
            stretch = 0.0
            if justified and index < len(rows) - 1 and len(row) > 1:
                # Wider gaps than this read as columns.
                stretch = min(slack / (len(row) - 1), 1.2 * space)
            x = slack / 2 if centred else 0.0
            marks: list = []
            for word in row:
                self.words += 1
                for offset, run, face in word.fragments:
                    if isinstance(face, MathBox):
                        marks.append(MathGlyphs(x + offset, baseline, face, size / 100, run.text, self.words))
                        continue
                    if run.code and self.style.code_span:
                        wide = face.width(run.text)
                        marks.insert(
                            0,
                            Bar(x + offset - 0.1 * size, baseline - 0.8 * size, x + offset + wide + 0.1 * size,
                                baseline + 0.25 * size, self.style.code_fill),
                        )  # fmt: skip
                    marks.append(Glyphs(x + offset, baseline, run.text, face, self.words, run.struck))
                x += word.width + space + stretch
            result.append((height, marks, join_words(source)))
        return result

    # -- blocks

    def block(self, block: Block, width: float, key: tuple[int, ...]) -> list[Strip]:
        style, size = self.style, self.style.size
        gap = style.paragraph_gap * size
        match block:
            case Paragraph(runs):
                lines = self.lines(runs, width, style.text, size, justified=style.justified)
                strips = [Strip(height, marks, Paragraph(part), key) for height, marks, part in lines]
                strips[0].before = gap
                return strips
            case Heading(level, runs):
                return [self.heading(level, runs, width, key)]
            case Code(code):
                return self.code(code, width, key)
            case Formula(latex):
                return [self.formula(latex, width, key)]
            case Rule():
                y = 0.5 * size
                return [Strip(size, [Bar(0, y, width, y + max(1.0, 0.06 * size), 0.5)], block, key, gap)]
            case Quote(inner):
                return self.quote(inner, width, key)
            case Items(ordered, start, items):
                return [
                    self.item(ordered, start + index, item, width, key, gap if index == 0 else 0.25 * gap)
                    for index, item in enumerate(items)
                ]
            case Table():
                return self.table(block, width, key)
        raise TypeError(f"{type(block).__name__} is no block of Markdown")

    def heading(self, level: int, runs: Runs, width: float, key) -> Strip:
        style = self.style
        size = HEADING_SIZES[level - 1] * style.size
        centred = style.centred_title and level == 1
        lines = self.lines(runs, width, style.headings, size, bold=True, italic=level >= 5, centred=centred)
        y, marks = 0.0, []
        for height, line, _ in lines:
            marks.extend(_moved(line, 0.0, y))
            y += 0.92 * height
        if style.heading_rule and level <= 2:
            y += 0.15 * size
            marks.append(Bar(0, y, width, y + max(1.0, 0.05 * style.size), 0.75))
            y += 0.1 * size
        return Strip(y, marks, Heading(level, runs), key, (0.9 + 0.25 * (3 - min(level, 3))) * style.size, stays=True)

    def code(self, code: Sequence[str], width: float, key) -> list[Strip]:
        style, size = self.style, self.style.size
        pad = 0.0 if style.code_box == "plain" else 0.5 * size
        indent = 1.5 * size if style.code_box == "plain" else pad
        unit = self.face(style.code, size)
        widest = max(unit.width(line) for line in code)
        scale = min(0.9, (width - 2 * indent) / max(widest, 1.0))
        if scale < SMALLEST_CODE:
            raise Unfit("block: code wider than the column")
        face = self.face(style.code, scale * size)
        height = 1.3 * scale * size
        baseline = (height + face.ascent - face.descent) / 2
        strips = []
        for index, line in enumerate(code):
            face.check(line)
            first, last = index == 0, index == len(code) - 1
            top, bottom = pad if first else 0.0, pad if last else 0.0
            marks: list = []
            if style.code_box == "fill":
                marks.append(Bar(0, 0, width, top + height + bottom, style.code_fill))
            elif style.code_box == "frame":
                thick = max(1.0, 0.05 * size)
                for x in (0.0, width - thick):
                    marks.append(Bar(x, 0, x + thick, top + height + bottom, 0.6))
                for show, y in ((first, 0.0), (last, top + height + bottom - thick)):
                    marks.extend([Bar(0, y, width, y + thick, 0.6)] if show else [])
            for word in re.finditer(r"\S+", line):
                self.words += 1
                x = indent + face.width(line[: word.start()] + "|") - face.width("|")  # trailing spaces count so
                marks.append(Glyphs(x, top + baseline, word[0], face, self.words))
            strips.append(Strip(top + height + bottom, marks, Code((line,)), key))
        strips[0].before = style.paragraph_gap * size
        return strips

    def formula(self, latex: str, width: float, key) -> Strip:
        size = self.style.size
        box = set_formula(latex, self.style.math, display=True)
        if box is None:
            raise Unfit("formula: beyond mathtext")
        scale = min(1.1, 100 * width / (box.width * size)) * size / 100
        if scale < 0.8 * size / 100:
            raise Unfit("formula: wider than the column")
        self.words += 1
        x = (width - box.width * scale) / 2
        marks = [MathGlyphs(x, 0.2 * size + box.ascent * scale, box, scale, latex, self.words)]
        height = (box.ascent + box.descent) * scale + 0.4 * size
        return Strip(height, marks, Formula(latex), key, self.style.paragraph_gap * size)

    def quote(self, inner: Sequence[Block], width: float, key) -> list[Strip]:
        size = self.style.size
        indent = 1.4 * size
        strips = [
            strip for number, block in enumerate(inner) for strip in self.block(block, width - indent, (number,))
        ]
        gap = strips[0].before
        strips[0].before = 0.0
        return [self.in_quote(strip, indent, key, gap if index == 0 else 0.0) for index, strip in enumerate(strips)]

    def in_quote(self, strip: Strip, indent: float, key, before: float) -> Strip:
        marks = _moved(strip.marks, indent, strip.before)
        height = strip.before + strip.height
        if self.style.quote == "bar":
            marks.insert(0, Bar(0.25 * indent, 0, 0.4 * indent, height, 0.7))
        header = strip.header and self.in_quote(strip.header, indent, key, 0.0)
        return Strip(height, marks, Quote((strip.part,)), key + strip.key, before, strip.stays, header)

    def item(self, ordered: bool, number: int, item: Sequence[Block], width: float, key, before: float) -> Strip:
        style, size = self.style, self.style.size
        face = self.face(style.text, size)
        marker = f"{number}{style.number_mark}" if ordered else style.bullet
        face.check(marker)
        indent = max(1.6 * size, face.width(marker) + 0.5 * size)
        y, marks = 0.0, []
        first = True
        for index, block in enumerate(item):
            for strip in self.block(block, width - indent, (index,)):
                y += strip.before * (0.4 if isinstance(block, Items) else 1.0) if not first else 0.0
                if first:
                    lowest = [mark.y for mark in strip.marks if isinstance(mark, Glyphs | MathGlyphs)]
                    baseline = lowest[0] if lowest else size
                    self.words += 1
                    marks.append(Glyphs(indent - 0.45 * size - face.width(marker), baseline, marker, face, self.words))
                marks.extend(_moved(strip.marks, indent, y))
                y += strip.height
                first = False
        return Strip(y, marks, Items(ordered, number if ordered else 0, (tuple(item),)), key, before)

    def table(self, table: Table, width: float, key) -> list[Strip]:
        style = self.style
        columns = len(table.header)
        for scale in (0.95, 0.8):
            size = scale * style.size
            pad = 0.45 * size
            room = width - 2 * pad * columns
            natural, least = np.zeros(columns), np.zeros(columns)
            for number, row in enumerate((table.header, *table.rows)):
                for column, cell in enumerate(row):
                    words = [self.word(runs, style.text, size, number == 0, False).width for runs in split_words(cell)]
                    space = self.face(style.text, size, number == 0).width(" ")
                    natural[column] = max(natural[column], sum(words) + space * max(len(words) - 1, 0))
                    least[column] = max(least[column], max(words, default=0.0))
            natural += 1.0
            least += 1.0
            if natural.sum() <= room or least.sum() <= room:
                break
        else:
            raise Unfit("block: table wider than the column")
        if natural.sum() <= room:
            widths = natural * (min(room / natural.sum(), 1.25) if style.table in ("rows", "zebra") else 1.0)
        else:
            spare = natural - least
            widths = least + spare * ((room - least.sum()) / max(spare.sum(), 1e-6))
        strips = []
        for number, row in enumerate((table.header, *table.rows)):
            strips.append(self.table_row(table, number, row, widths, size, pad, key))
        header, *rows = strips
        header.before = style.paragraph_gap * style.size
        if rows:
            header.stays = True
            for row in rows:
                row.header = header
        return strips

    def table_row(self, table: Table, number: int, row, widths, size: float, pad: float, key) -> Strip:
        style = self.style
        cells = [
            self.lines(cell, width, style.text, size, bold=number == 0)
            for cell, width in zip(row, widths, strict=True)
        ]
        height = max((sum(line[0] for line in lines) for lines in cells), default=0.0)
        height = max(height, style.leading * size) + 0.6 * pad
        whole = float(widths.sum()) + 2 * pad * len(widths)
        thick, marks = max(1.0, 0.05 * size), []
        last = number == len(table.rows)
        if style.table == "zebra" and number % 2:
            marks.append(Bar(0, 0, whole, height, 0.94))
        if style.table == "grid":
            marks.append(Bar(0, 0, whole, thick, 0.4))
            if last or number == 0:
                marks.append(Bar(0, height - thick, whole, height, 0.4))
            edges = np.concatenate([[0.0], np.cumsum(widths + 2 * pad)])
            marks.extend(Bar(x, 0, x + thick, height, 0.4) for x in np.minimum(edges, whole - thick))
        elif number == 0:
            if style.table == "book":
                marks.append(Bar(0, 0, whole, 1.6 * thick, 0.0))
            marks.append(Bar(0, height - thick, whole, height, 0.2))
        elif style.table == "rows" or (style.table == "book" and last):
            marks.append(Bar(0, height - thick, whole, height, 0.0 if style.table == "book" else 0.7))
        x = 0.0
        for lines, width in zip(cells, widths, strict=True):
            y = 0.3 * pad
            for line_height, line, _ in lines:
                marks.extend(_moved(line, x + pad, y))
                y += line_height
            x += float(width) + 2 * pad
        part = Table(table.header, ()) if number == 0 else Table(table.header, (row,))
        return Strip(height, marks, part, key)


def _moved(marks: Iterable, dx: float, dy: float) -> list:
    return [
        replace(mark, x0=mark.x0 + dx, y0=mark.y0 + dy, x1=mark.x1 + dx, y1=mark.y1 + dy)
        if isinstance(mark, Bar)
        else replace(mark, x=mark.x + dx, y=mark.y + dy)
        for mark in marks
    ]


# ----------------------------------------------------------------------------------------------------------- pages


@dataclass
class Page:
    """Strips with their places: (x, y, column, strip)."""

    style: Style
    placed: list[tuple[float, float, int, Strip]] = field(default_factory=list)

    def blocks(self) -> tuple[Block, ...]:
        """What stands on the page."""
        return assemble([(column, strip.key, strip.part) for _, _, column, strip in self.placed])


def paginate(strips: Sequence[Strip], style: Style) -> list[Page]:
    """Fill columns and pages in order."""
    left, top, right, bottom = style.margins
    pitch = (style.width - left - right + style.gap) / style.columns
    pages: list[Page] = []
    column, y = style.columns, 0.0  # a column that does not exist: the first strip opens a page
    floor = style.height - bottom
    for index, strip in enumerate(strips):
        needed = strip.before + strip.height
        for before, after in zip(strips[index:], strips[index + 1 : index + 5], strict=False):
            if not before.stays:
                break
            needed += after.before + after.height
        if y == top:  # the top of a column is as high as it gets
            needed = 0.0
        if column >= style.columns or y + needed > floor or y + strip.height > floor:
            column += 1
            if column >= style.columns:
                pages.append(Page(style))
                column = 0
            y = top
            if strip.header is not None:
                pages[-1].placed.append((left + column * pitch, y, column, strip.header))
                y += strip.header.height
        else:
            y += strip.before if y > top else 0.0
        pages[-1].placed.append((left + column * pitch, y, column, strip))
        y += strip.height
    return pages


def assemble(parts: Sequence[tuple[int, tuple[int, ...], Block]]) -> tuple[Block, ...]:
    """Parts, each with its column and its key, to the blocks they are of."""
    blocks: list[Block] = []
    divided = (Table, Code)  # seen to begin anew in each column
    group_of = lambda part: (part[1][0], part[0] if isinstance(part[2], divided) else -1)  # noqa: E731
    for _, group in groupby(parts, key=group_of):
        members = list(group)
        first = members[0][2]
        match first:
            case Paragraph():
                words = [word for _, _, part in members for word in split_words(part.runs)]
                blocks.append(Paragraph(join_words(words)))
            case Items():
                blocks.append(replace(first, items=tuple(item for _, _, part in members for item in part.items)))
            case Table():
                blocks.append(replace(first, rows=tuple(row for _, _, part in members for row in part.rows)))
            case Code():
                lines = [line for _, _, part in members for line in part.lines]
                seen = [index for index, line in enumerate(lines) if line]  # empty ones at the ends cannot be
                blocks.extend([Code(tuple(lines[seen[0] : seen[-1] + 1]))] if seen else [])
            case Quote():
                inner = [(column, key[1:], part.blocks[0]) for column, key, part in members]
                blocks.append(Quote(assemble(inner)))
            case _:
                blocks.append(first)
    return tuple(blocks)


def draw(page: Page, ink: int = 0, paper: int = 255) -> tuple[np.ndarray, list[dict]]:
    """Pixels (H, W) uint8 of a page, and its words in the order of the text: ``{"text", "box": [x0, y0, x1, y1]}``.

    A formula is one word, its LaTeX between dollars; list markers are words as printed.
    """
    style = page.style
    pixels = np.full((style.height, style.width), paper, dtype=np.uint8)
    info = skia.ImageInfo.Make(style.width, style.height, skia.ColorType.kGray_8_ColorType, skia.kOpaque_AlphaType)
    surface = skia.Surface.MakeRasterDirect(info, pixels)
    black, grey = skia.Paint(AntiAlias=True), skia.Paint(AntiAlias=True)
    black.setColor(skia.ColorSetRGB(ink, ink, ink))
    words: dict[int, tuple[list[str], list[float]]] = {}
    with surface as canvas:
        for left, top, column, strip in page.placed:
            for mark in strip.marks:
                if isinstance(mark, Bar):
                    level = round(ink + (paper - ink) * mark.grey)
                    grey.setColor(skia.ColorSetRGB(level, level, level))
                    # Whole pixels, so that thin rules are alike and boxes of code show no seams.
                    x0, y0 = round(left + mark.x0), round(top + mark.y0)
                    x1, y1 = max(round(left + mark.x1), x0 + 1), max(round(top + mark.y1), y0 + 1)
                    canvas.drawRect(skia.Rect(x0, y0, x1, y1), grey)
                    continue
                x, y = left + mark.x, top + mark.y
                if isinstance(mark, Glyphs):
                    canvas.drawString(mark.text, x, y, mark.face.font, black)
                    above, below = mark.face.ink(mark.text)
                    box = [x, y + above, x + mark.face.width(mark.text), y + below]
                    text = mark.text
                    if mark.struck:
                        middle = y - 0.27 * mark.face.size
                        canvas.drawRect(skia.Rect(x, middle, box[2], middle + max(1.0, 0.06 * mark.face.size)), black)
                else:
                    _draw_formula(canvas, mark, x, y, black)
                    scale = mark.scale
                    box = [x, y - mark.box.ascent * scale, x + mark.box.width * scale, y + mark.box.descent * scale]
                    text = f"${mark.latex}$"
                # A strip drawn twice (a table's header) has its words twice.
                texts, known = words.setdefault((mark.word, column, round(top)), ([], box))
                texts.append(text)
                known[:] = [min(known[0], box[0]), min(known[1], box[1]), max(known[2], box[2]), max(known[3], box[3])]
    surface.flushAndSubmit()
    size = (style.width, style.height)
    return pixels, [{"text": _straight("".join(texts)), "box": _whole(box, size)} for texts, box in words.values()]


def _straight(text: str) -> str:
    return text.translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})


def _whole(box: Sequence[float], size: tuple[int, int]) -> list[int]:
    x0, y0, x1, y1 = box
    x0, y0 = (int(min(max(np.floor(value), 0), most - 1)) for value, most in zip((x0, y0), size, strict=True))
    x1, y1 = (int(min(np.ceil(value), most)) for value, most in zip((x1, y1), size, strict=True))
    return [x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)]


@lru_cache(maxsize=512)
def _math_font(path: str, size: float) -> skia.Font:
    font = skia.Font(_typeface(path), size)
    font.setSubpixel(True)
    font.setHinting(skia.FontHinting.kNone)
    font.setEdging(skia.Font.Edging.kAntiAlias)
    return font


def _draw_formula(canvas, mark: MathGlyphs, x: float, y: float, paint) -> None:
    canvas.save()
    canvas.translate(x, y)
    canvas.scale(mark.scale, mark.scale)
    for (path, size), glyphs in groupby(mark.box.glyphs, key=lambda glyph: glyph[:2]):
        members = list(glyphs)
        builder = skia.TextBlobBuilder()
        builder.allocRunPos(
            _math_font(path, size),
            [glyph[2] for glyph in members],
            [skia.Point(glyph[3], glyph[4]) for glyph in members],
        )
        canvas.drawTextBlob(builder.make(), 0, 0, paint)
    for x0, y0, x1, y1 in mark.box.rules:
        canvas.drawRect(skia.Rect(x0, y0, x1, max(y1, y0 + 0.9 / mark.scale)), paint)
    canvas.restore()
