"""What a page holds and where. A layout puts elements on a `Draft`'s sheet in reading order, until the sheet is full.

The order of the text, layout by layout; in all of them what is printed on one baseline of one block is one line:

==============  ====================================================================================================
paragraphs      running head, title, then one to three columns from left to right, each from top to bottom, headings
                where they stand; the page number last
headings        top to bottom: numbered headings of three levels, a few lines of text under each
lists           top to bottom: a heading, a sentence, then items, bullet or number first
table           title, then row by row from the head down, cells from left to right; text around it where it stands
form            title, then field by field from left to right, row by row: the label, then the value
receipt         top to bottom: shop, address, date, each item with its price, sums, farewell
letter          sender, date, recipient, subject, salutation, paragraphs, closing, name
code            top to bottom; indents are not part of the text, printed line numbers are
captions        top to bottom: text where it stands, a picture's caption after it; nothing for the picture
large           top to bottom
photo           words on a picture, group by group by their upper edge, from the top
==============  ====================================================================================================

All shares and ranges are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import skia

from .corpus import Scalars, TextStream, pick
from .elements import Flow, Line, Mark, Sheet, Style, wrap

_MONTHS = """January February March April May June July August September October November December
"""
MONTHS = _MONTHS.split()


@dataclass
class Draft:
    """A page being laid out.

    Args:
        sheet: where things go.
        text: the words.
        rng: of all draws.
        body: running text.
        heading: the font that headings are set in, at the size of the body.
        mono: a monospaced font at about the size of the body, or the body's where there is none.
        picture: ``picture(width, height)`` gives (height, width, 3) uint8 pixels and their licence.
    """

    sheet: Sheet
    text: TextStream
    rng: Scalars
    body: Style
    heading: Style
    mono: Style
    picture: Callable[[int, int], tuple[np.ndarray, str]]
    frame: tuple[float, float, float, float] = field(init=False)

    def __post_init__(self):
        width, height = self.sheet.width, self.sheet.height
        margins = [max(3.0, self.rng.uniform(0.02, 0.08) * side) for side in (width, height, width, height)]
        self.frame = (margins[0], margins[1], width - margins[2], height - margins[3])

    @property
    def x(self) -> float:
        """x-height of the running text."""
        return self.body.x_height

    def level(self, level: int) -> Style:
        """The style of a heading: 0 a title, 1 to 3 smaller and smaller."""
        factor = (1.9, 1.5, 1.25, 1.05)[level]
        room = (self.frame[2] - self.frame[0]) / (8 * self.x)  # not larger than leaves eight letters a line
        return self.heading.at(max(1.0, min(factor, room)))

    def flow(self, columns: int = 1, top: float | None = None, bottom: float | None = None) -> Flow:
        """Columns of equal width in the frame, from ``top`` to ``bottom``."""
        left, frame_top, right, frame_bottom = self.frame
        top, bottom = frame_top if top is None else top, frame_bottom if bottom is None else bottom
        gutter = self.x * self.rng.uniform(2.0, 4.0)
        width = (right - left - gutter * (columns - 1)) / columns
        return Flow(
            self.sheet,
            [(left + i * (width + gutter), top, left + i * (width + gutter) + width, bottom) for i in range(columns)],
        )

    def capitalised(self, low: int, high: int) -> str:
        """A phrase that begins with a capital."""
        phrase = self.text.phrase(low, high).strip(",;:-")
        return phrase[:1].upper() + phrase[1:]

    def name(self) -> str:
        """A capitalised word without signs, as names are."""
        for _ in range(6):
            word = pick(self.rng, self.text.corpus.rare)
            if word.isalpha() and 2 < len(word) < 12 and self.text.covers(word):
                return self.text.note(word[:1].upper() + word[1:].lower())
        return self.text.note("Anna")

    def number(self, form: str) -> str:
        """A number as a layout needs it: ``price``, ``date``, ``count``, ``share``, ``time``, ``phone``, ``code``."""
        n = self.rng.integers
        made = {
            "price": lambda: f"{n(0, pick(self.rng, (10, 100, 1000)))}.{n(0, 100):02d}",
            "date": lambda: pick(
                self.rng,
                (
                    f"{n(1, 29)}/{n(1, 13)}/{n(1960, 2040)}",
                    f"{n(1960, 2040)}-{n(1, 13):02d}-{n(1, 29):02d}",
                    f"{n(1, 29)} {MONTHS[n(12)]} {n(1960, 2040)}",
                    f"{MONTHS[n(12)]} {n(1, 29)}, {n(1960, 2040)}",
                ),
            ),
            "count": lambda: str(n(0, 10 ** n(1, 6))),
            "share": lambda: f"{n(0, 100)}.{n(0, 10)}%",
            "time": lambda: f"{n(0, 24):02d}:{n(0, 60):02d}",
            "phone": lambda: f"+{n(1, 99)} {n(100, 1000)} {n(1000, 10000)}",
            "code": lambda: f"{chr(65 + n(26))}{chr(65 + n(26))}-{n(0, 100000):05d}",
        }
        return self.text.note(made[form]())


# ------------------------------------------------------------------------------------------------------- running text


def paragraphs(draft: Draft) -> None:
    """Running text in one to three columns, with a title, headings, a running head and a page number at times."""
    rng, width = draft.rng, draft.frame[2] - draft.frame[0]
    left, top, right, bottom = draft.frame
    most = max(1, min(3, int(width / (26 * draft.x))))
    columns = 1 + min(rng.integers(3), most - 1)
    small = draft.body.at(0.9)
    tall = bottom - top > 14 * draft.body.pitch
    number = tall and rng.random() < 0.3
    if tall and rng.random() < 0.2:
        head = draft.flow(top=top, bottom=top + small.pitch)
        head.paragraph(draft.text.words(rng.integers(2, 6)), small, align=pick(rng, ("left", "centre", "right")))
        line = top + small.pitch
        if rng.random() < 0.5:
            draft.sheet.marks.append(Mark("line", (left, line, right, line)))
        top = line + draft.x
    if number:
        bottom -= 1.5 * small.pitch
    if tall and rng.random() < 0.3:
        title = draft.flow(top=top, bottom=top + 3 * draft.level(0).pitch)
        title.paragraph(
            draft.capitalised(2, 9).split(), draft.level(0), align="centre" if rng.random() < 0.6 else "left"
        )
        top = title.y + draft.x
    flow = draft.flow(columns, top, bottom)
    running_text(draft, flow)
    if number:
        text = draft.text.note(pick(rng, ("{}", "- {} -", "Page {}", "{} / 320")).format(rng.integers(1, 400)))
        at = pick(rng, (left, (left + right - small.measure(text)) / 2, right - small.measure(text)))
        draft.sheet.type(text, small, at, draft.frame[3] - small.descent)


def running_text(draft: Draft, flow: Flow, headings: bool = True, most: int | None = None) -> None:
    """Paragraphs, with headings between some of them, until ``flow`` is full or ``most`` paragraphs are set."""
    rng, body = draft.rng, draft.body
    align = "justify" if rng.random() < 0.6 else "left"
    indented = rng.random() < 0.5
    indent, gap = (rng.uniform(1.5, 4) * draft.x, 0.0) if indented else (0.0, rng.uniform(0.5, 1.5) * draft.x)
    headings = headings and rng.random() < 0.6
    done = 0
    while not flow.full and (most is None or done < most):
        if headings and rng.random() < 0.25 and flow.room(body) > 5:
            flow.gap(draft.x)
            flow.paragraph(draft.capitalised(1, 5).split(), draft.level(2))
            flow.gap(0.4 * draft.x)
        if not flow.paragraph(draft.text.words(rng.integers(15, 110)), body, align=align, indent=indent):
            break
        flow.gap(gap)
        done += 1


def headings(draft: Draft) -> None:
    """Numbered headings of three levels with a few lines each, or a table of contents with page numbers."""
    rng = draft.rng
    flow = draft.flow()
    counters = [0, 0, 0]
    contents = rng.random() < 0.35
    styles = [draft.level(level) for level in (1, 2, 3)]
    while not flow.full:
        level = 0 if not counters[0] else min(rng.integers(3), 1 + (counters[1] > 0))
        counters[level] += 1
        counters[level + 1 :] = [0] * (2 - level)
        number = draft.text.note(".".join(str(part) for part in counters[: level + 1]))
        if contents:
            style = draft.body if level else draft.heading
            page = draft.text.note(str(rng.integers(1, 600)))
            x, end = 1.5 * draft.x * level, flow.width - style.measure(page)
            entry = style.shorten(f"{number} {draft.capitalised(1, 6)}", end - x - 2 * style.space)
            if flow.line([(entry, style, x), (page, style, end)]) is None:
                return
        else:
            flow.gap(1.2 * draft.x)
            if not flow.paragraph([number, *draft.capitalised(1, 6).split()], styles[level]):
                return
            flow.gap(0.4 * draft.x)
            if rng.random() < 0.7:
                running_text(draft, flow, headings=False, most=rng.integers(1, 3))


def lists(draft: Draft) -> None:
    """Items after bullets, dashes, numbers or letters, some with items below them."""
    rng, body = draft.rng, draft.body
    flow = draft.flow(2 if draft.frame[2] - draft.frame[0] > 60 * draft.x and rng.random() < 0.4 else 1)
    bullets = [mark for mark in "•-*+>" if draft.text.covers(mark)]
    while not flow.full:
        if rng.random() < 0.7:
            flow.paragraph(draft.capitalised(1, 6).split(), draft.level(pick(rng, (1, 2, 2))))
            flow.gap(0.4 * draft.x)
        if rng.random() < 0.5:
            flow.paragraph(draft.text.words(rng.integers(6, 24)), body)
        numbered, bullet = rng.random() < 0.5, pick(rng, bullets)
        form = pick(rng, ("{}.", "{})", "({})"))
        gap = rng.uniform(0, 1) * draft.x
        for item in range(rng.integers(3, 9)):
            mark = form.format(item + 1) if numbered else bullet
            if not _item(draft, flow, mark, 0.0):
                return
            if rng.random() < 0.15:
                for below in range(rng.integers(1, 4)):
                    mark = form.format("abc"[below]) if numbered else pick(rng, bullets)
                    if not _item(draft, flow, mark, 3 * draft.x):
                        return
            flow.gap(gap)
        flow.gap(1.5 * draft.x)


def _item(draft: Draft, flow: Flow, mark: str, inset: float) -> bool:
    body = draft.body
    draft.text.note(mark)
    hang = inset + body.measure(mark) + 1.2 * draft.x
    if not flow.reserve(body) or flow.width - hang < 4 * draft.x:
        return False
    before, lines = flow.left + inset, draft.sheet.lines
    draft.sheet.type(mark, body, before, flow.y + body.ascent)
    count = len(lines)
    if not flow.paragraph(draft.text.words(draft.rng.integers(2, 22)), body, inset=hang):
        return False
    lines[count].joint = " "
    return True


# ------------------------------------------------------------------------------------------------------------- tables


def table(draft: Draft) -> None:
    """One table or several, ruled in several ways, with a title and text between them."""
    rng = draft.rng
    flow = draft.flow()
    while not flow.full:
        if rng.random() < 0.5:
            title = draft.text.note(f"Table {rng.integers(1, 30)}: ") + draft.capitalised(2, 8)
            flow.paragraph(title.split(), draft.body)
            flow.gap(0.5 * draft.x)
        _table(draft, flow)
        flow.gap(1.5 * draft.x)
        if flow.full or flow.room(draft.body) < 3:
            return
        if rng.random() < 0.5:
            running_text(draft, flow, headings=False, most=1)
            flow.gap(draft.x)


def _table(draft: Draft, flow: Flow) -> None:
    rng, body, sheet = draft.rng, draft.body, draft.sheet
    columns = max(1, min(rng.integers(2, 8), int(flow.width / (9 * draft.x))))
    pad = rng.uniform(0.5, 1.2) * draft.x
    kinds = ["words", *(pick(rng, ("words", "count", "price", "share", "date", "code")) for _ in range(columns - 1))]
    shares = [1.6 if kind == "words" else 1.0 for kind in kinds]
    width = flow.width if rng.random() < 0.6 else flow.width * rng.uniform(0.7, 1)
    edges = np.cumsum([0.0, *(share * width / sum(shares) for share in shares)])
    ruling = pick(rng, ("grid", "rows", "book", "none", "zebra"))
    dark_head = ruling in ("grid", "zebra") and rng.random() < 0.4
    head = draft.heading.at(1.0, tone=0.0 if dark_head else 1.0)
    row_height = max(body.pitch, head.pitch) + rng.uniform(0.0, 1.2) * draft.x
    rows = rng.integers(3, 26)
    if flow.bottom - flow.y < 2 * row_height:
        flow.next_column()
    left, tops = flow.left, []
    for row in range(rows):
        if flow.full or flow.y + row_height > flow.bottom:
            break
        style = head if row == 0 else body
        tops.append(flow.y)
        lead = (row_height - style.ascent - style.descent) / 2
        if row == 0 and dark_head:
            sheet.marks.append(Mark("fill", (left, flow.y, left + width, flow.y + row_height), tone=0.85))
        elif ruling == "zebra" and row % 2:
            sheet.marks.append(Mark("fill", (left, flow.y, left + width, flow.y + row_height), tone=0.12))
        joint = "\n"
        for kind, begin, end in zip(kinds, edges, edges[1:], strict=False):
            numeric = kind != "words"
            cell = draft.capitalised(1, 2) if row == 0 else draft.number(kind) if numeric else draft.text.phrase(1, 3)
            cell = style.shorten(cell, end - begin - 2 * pad)
            if not cell:
                continue
            free = end - begin - 2 * pad - style.measure(cell)
            x = begin + pad + (free if numeric and kind not in ("date", "code") else 0.0)
            sheet.type(cell, style, left + x, flow.y + lead + style.ascent, joint=joint)
            joint = " "
        flow.y += row_height
    if not tops:
        return
    tops.append(flow.y)
    rule = lambda y, thickness=1.0: Mark("line", (left, y, left + width, y), thickness=thickness)  # noqa: E731
    lines = {"grid": tops, "rows": tops[1:-1], "zebra": (), "none": ()}.get(ruling)
    if lines is None:  # as books set them: above, below the head, below
        lines = [tops[0], tops[1], tops[-1]]
    sheet.marks += [rule(round(y) + 0.5) for y in lines]
    if ruling == "grid":
        for edge in edges:
            x = round(left + edge) + 0.5
            sheet.marks.append(Mark("line", (x, tops[0], x, tops[-1])))


FORM_LABELS = """Name|First name|Surname|Date of birth|Address|City|Postal code|Country|Telephone|E-mail|Account no.|
Reference|Department|Signature|Date|Amount|Total|Order no.|Customer|Position|Company|Tax ID|Subject|Comments|Status|
Policy no.|Vehicle|Quantity|Unit price|Place|Occupation|Height|Weight|Passport no.|Nationality|Room|From|To""".replace(
    "\n", ""
).split("|")


def form(draft: Draft) -> None:
    """Labelled fields in one or two columns: on a line, in a box or after a colon; ticks in boxes."""
    rng, body, sheet = draft.rng, draft.body, draft.sheet
    flow = draft.flow()
    flow.paragraph(draft.capitalised(2, 6).split(), draft.level(1), align=pick(rng, ("left", "centre")))
    flow.gap(draft.x)
    columns = 2 if flow.width > 40 * draft.x and rng.random() < 0.6 else 1
    frame = pick(rng, ("line", "box", "none"))
    value_style = draft.mono if rng.random() < 0.3 else body
    label_style = draft.heading.at(1.0) if rng.random() < 0.4 else body
    row_height = max(style.pitch for style in (body, value_style, label_style)) + rng.uniform(0.4, 2.0) * draft.x
    width = flow.width / columns
    while flow.y + row_height <= flow.bottom:
        baseline = flow.y + row_height - max(value_style.descent, label_style.descent) - 0.3 * draft.x
        joint = "\n"
        if rng.random() < 0.12:  # a question with boxes to tick
            x = 0.0
            for _ in range(rng.integers(2, 5)):
                side = 1.4 * draft.x
                label = body.shorten(draft.capitalised(1, 2), flow.width - x - 2.5 * side)
                if not label:
                    break
                left = flow.left + x
                box = (left, baseline - side, left + side, baseline)
                sheet.marks.append(Mark("frame", box))
                if rng.random() < 0.4:
                    sheet.marks.append(Mark("line", box, thickness=1.5))
                    sheet.marks.append(Mark("line", (box[0], box[3], box[2], box[1]), thickness=1.5))
                sheet.type(label, body, left + 1.5 * side, baseline, joint=joint)
                joint, x = " ", x + 2.5 * side + body.measure(label)
            flow.y += row_height
            continue
        for column in range(columns):
            left, right = flow.left + column * width, flow.left + (column + 1) * width - 1.5 * draft.x
            label = pick(rng, FORM_LABELS) if rng.random() < 0.6 else draft.capitalised(1, 3)
            label = label_style.shorten(label.rstrip(":") + ":", 0.55 * (right - left)) or label[:1]
            draft.text.note(label)
            sheet.type(label, label_style, left, baseline, joint=joint)
            joint = " "
            start = left + label_style.measure(label) + draft.x
            filled = rng.random() < 0.85
            if filled:
                kind = pick(rng, ("words", "words", "name", "date", "count", "code", "phone", "price"))
                value = (
                    draft.text.phrase(1, 4)
                    if kind == "words"
                    else f"{draft.name()} {draft.name()}"
                    if kind == "name"
                    else draft.number(kind)
                )
                value = value_style.shorten(value, right - start - draft.x)
                sheet.type(value, value_style, start + 0.5 * draft.x, baseline, joint=joint)
            bottom = baseline + max(value_style.descent, 0.4 * draft.x)
            if frame == "line":
                sheet.marks.append(Mark("line", (start, bottom, right, bottom)))
            elif frame == "box":
                top = max(baseline - value_style.ascent - 0.2 * draft.x, flow.y + 1)
                sheet.marks.append(Mark("frame", (start, top, right, bottom)))
        flow.y += row_height
        flow.gap(0.3 * draft.x)


def receipt(draft: Draft) -> None:
    """A narrow slip: shop, items with prices, sums, a farewell and bars."""
    rng = draft.rng
    style = draft.mono if rng.random() < 0.7 else draft.body
    large = style.at(min(1.5, max(1.0, (draft.frame[2] - draft.frame[0]) / (10 * style.x_height))))
    left, top, right, bottom = draft.frame
    width = min(right - left, rng.uniform(30, 44) * style.x_height)
    left += (right - left - width) * rng.random()
    flow = Flow(draft.sheet, [(left, top, left + width, bottom)])
    flow.paragraph(draft.capitalised(1, 3).upper().split(), large, align="centre")
    for _ in range(rng.integers(1, 4)):
        line = pick(rng, (draft.number("phone"), f"{rng.integers(1, 300)} {draft.name()} St", draft.capitalised(1, 3)))
        flow.paragraph(line.split(), style, align="centre")
    flow.gap(0.8 * draft.x)
    pairs = lambda one, other, face=style: _pair(flow, one, other, face)  # noqa: E731
    pairs(draft.number("date"), draft.number("time"))
    dashes = draft.text.note(pick(rng, "-=*") * max(3, int(0.95 * width / style.measure("-="[:1]))))
    ruled = rng.random() < 0.5
    _rule(draft, flow, style, None if ruled else dashes)
    total, currency = 0, pick(rng, ("", "", "$", "EUR "))
    while flow.room(style) > 8 or not total:
        cents = rng.integers(20, pick(rng, (500, 3000, 20000)))
        count = rng.integers(1, 10) if rng.random() < 0.3 else 1
        name = draft.capitalised(1, 3)
        if count > 1:
            name = draft.text.note(f"{count} x ") + name
        total += count * cents
        price = draft.text.note(f"{count * cents / 100:.2f}")
        if not pairs(name, price) or (rng.random() < 0.04 and flow.room(style) < 20):
            break
    _rule(draft, flow, style, None if ruled else dashes)
    tax = rng.integers(5, 25)
    pairs("Subtotal", draft.text.note(f"{total / 100:.2f}"))
    pairs(f"Tax {tax}%", draft.text.note(f"{total * tax / 10000:.2f}"))
    pairs("TOTAL", draft.text.note(f"{currency}{total * (100 + tax) / 10000:.2f}"), large)
    pairs(pick(rng, ("Cash", "Card", "VISA", "Debit")), f"****{rng.integers(1000, 10000)}")
    flow.gap(draft.x)
    farewell = pick(rng, ("Thank you!", "THANK YOU", "Please come again", "Goodbye"))
    flow.paragraph(farewell.split(), style, align="centre")
    high = 3 * draft.x
    if not flow.full and flow.y + high < flow.bottom and rng.random() < 0.5:
        x = left + 0.15 * width
        while x < left + 0.85 * width:
            bar = rng.integers(1, 4)
            draft.sheet.marks.append(Mark("fill", (round(x), flow.y, round(x) + bar, flow.y + high)))
            x += bar + rng.integers(1, 4)


def _pair(flow: Flow, one: str, other: str, style: Style) -> bool:
    """``one`` at the left and ``other`` at the right end of a line; a left part that is too long is cut."""
    other = style.shorten(other, flow.width)
    end = flow.width - style.measure(other)
    one = style.shorten(one, end - 2 * style.space)
    return flow.line([(one, style, 0.0), (other, style, end)]) is not None


def _rule(draft: Draft, flow: Flow, style: Style, dashes: str | None) -> None:
    if dashes:
        flow.line([(style.shorten(dashes, flow.width), style, 0.0)])
    elif not flow.full:
        y = flow.y + 0.5 * draft.x
        draft.sheet.marks.append(Mark("line", (flow.left, y, flow.right, y)))
        flow.gap(draft.x)


# --------------------------------------------------------------------------------------------------- letters and code


def letter(draft: Draft) -> None:
    """A letter, as long as the sheet."""
    rng, body = draft.rng, draft.body
    flow = draft.flow()
    address = lambda: [  # noqa: E731
        f"{draft.name()} {draft.name()}",
        f"{draft.text.note(str(rng.integers(1, 400)))} {draft.name()} {pick(rng, ('Street', 'Road', 'Lane', 'Ave.'))}",
        f"{draft.text.note(str(rng.integers(10000, 99999)))} {draft.name()}",
    ]
    align = pick(rng, ("left", "right", "right"))
    lines = int((flow.bottom - flow.top) / body.pitch)
    if lines > 14:
        for line in address():
            flow.paragraph(line.split(), body, align=align)
        flow.gap(1.5 * draft.x)
    if lines > 8:
        flow.paragraph(draft.number("date").split(), body, align=align)
        flow.gap(1.5 * draft.x)
    if lines > 18:
        for line in address():
            flow.paragraph(line.split(), body)
        flow.gap(2 * draft.x)
    if lines > 10 and rng.random() < 0.6:
        flow.paragraph(["Re:", *draft.text.words(rng.integers(2, 7))], draft.heading)
        flow.gap(draft.x)
    name = draft.name()
    salutation = pick(rng, (f"Dear {name},", f"Dear Ms {name},", f"Dear Mr. {name}:", "To whom it may concern,"))
    flow.paragraph(salutation.split(), body)
    flow.gap(draft.x)
    indent = pick(rng, (0.0, 3 * draft.x))
    while flow.room(body) > 6:
        words = draft.text.words(rng.integers(20, 70))
        letters, _ = wrap(words, body, flow.width, flow.room(body) - 5)
        flow.paragraph(" ".join(letters).split(), body, indent=indent)
        flow.gap(draft.x)
    flow.paragraph(pick(rng, ("Yours sincerely,", "Kind regards,", "Best wishes,", "Yours faithfully,")).split(), body)
    flow.gap(rng.uniform(0.5, 2) * draft.x)
    flow.paragraph(f"{draft.name()} {draft.name()}".split(), body)


def code(draft: Draft) -> None:
    """A program listing in a monospaced font, with line numbers at times."""
    rng, style = draft.rng, draft.mono
    flow = draft.flow()
    numbered = rng.random() < 0.3 and flow.width > 30 * draft.x
    first, step = rng.integers(1, 300), 2 + 2 * rng.integers(2)
    gutter = style.measure("0000 ") if numbered else 0.0
    c_like = rng.random() < 0.5
    if rng.random() < 0.3:
        top, bottom = max(flow.top - 0.8 * draft.x, 0), min(flow.bottom + 0.8 * draft.x, draft.sheet.height)
        box = (flow.left - 0.5 * draft.x, top, flow.right, bottom)
        draft.sheet.marks.append(Mark(pick(rng, ("frame", "fill")), box, tone=0.1))
    depth, number = 0, first
    while not flow.full:
        text, opens = _statement(draft, c_like, depth)
        x = gutter + style.space * step * depth
        if x > 0.6 * flow.width:
            depth, x = 0, gutter
        text = style.shorten(draft.text.note(text), flow.width - x)
        parts = [(draft.text.note(str(number)), style, 0.0)] if numbered else []
        if text and flow.line([*parts, (text, style, x)]) is None:
            return
        number += 1
        if opens:
            depth += 1
        elif depth and rng.random() < 0.3:
            depth -= 1
            if c_like:
                parts = [(draft.text.note(str(number)), style, 0.0)] if numbered else []
                if flow.line([*parts, ("}", style, gutter + style.space * step * depth)]) is None:
                    return
                number += 1


def _statement(draft: Draft, c_like: bool, depth: int) -> tuple[str, bool]:
    """A line of a program, and whether it opens a block."""
    rng = draft.rng

    def word() -> str:
        for _ in range(4):
            found = pick(rng, draft.text.corpus.rare).lower()
            if found.isalpha() and found.isascii():
                return found[:8]
        return "value"

    n = lambda: str(rng.integers(0, 10 ** rng.integers(1, 5)))  # noqa: E731
    operand = lambda: pick(rng, (word, n, lambda: f"{word()}[{n()}]", lambda: f"{word()}.{word()}"))()  # noqa: E731
    operator = pick(rng, ("+", "-", "*", "/", "%", "&", "|", "<<", "^"))
    compare = pick(rng, ("==", "!=", "<", ">", "<=", ">="))
    end, start, left, right = (";", " {", "(", ")") if c_like else ("", ":", "", "")
    blocks = (
        lambda: f"int {word()}({word()}, {word()})" if c_like else f"def {word()}({word()}, {word()}={n()})",
        lambda: f"if {left}{operand()} {compare} {operand()}{right}".replace("if (", "if ("),
        lambda: f"while {left}{operand()} {compare} {n()}{right}",
        lambda: f"for (i = 0; i < {n()}; i++)" if c_like else f"for {word()} in range({n()})",
        lambda: f"struct {word().title()}" if c_like else f"class {word().title()}({word().title()})",
    )
    plain = (
        lambda: f"{word()} = {operand()} {operator} {operand()}{end}",
        lambda: f"{word()}_{word()} = {operand()}{end}",
        lambda: f"{word()}.{word()}({operand()}, '{word()}'){end}",
        lambda: f'{word()}["{word()}"] {operator}= {n()}{end}',
        lambda: f"return {operand()}{end}",
        lambda: f"{'//' if c_like else '#'} {' '.join(draft.text.words(rng.integers(2, 8)))}",
        lambda: f'#include "{word()}.h"' if c_like else f"from {word()} import {word()}, {word()}",
        lambda: f'print{"f" if c_like else ""}("{word()} {word()}: {n()}"){end}',
        lambda: f"0x{rng.integers(0, 2**24):06X}{end}",
    )
    if depth < 4 and rng.random() < 0.25:
        return pick(rng, blocks)() + start, True
    return pick(rng, plain)(), False


# ------------------------------------------------------------------------------------------------ pictures, large type


def captions(draft: Draft) -> None:
    """Pictures with captions below, running text before, between and after them."""
    rng = draft.rng
    flow = draft.flow(2 if draft.frame[2] - draft.frame[0] > 52 * draft.x and rng.random() < 0.4 else 1)
    number = rng.integers(1, 30)
    placed = 0
    while not flow.full:
        free = flow.bottom - flow.y
        caption_room = 3.5 * draft.body.pitch
        if free > 8 * draft.x + caption_room:
            width = int(flow.width * rng.uniform(0.5, 1.0))
            height = int(min(free - caption_room, width * rng.uniform(0.45, 1.0), 0.6 * (flow.bottom - flow.top)))
            if min(width, height) >= 8:
                left, top = int(flow.left + (flow.width - width) * pick(rng, (0, 0.5, 0.5, 1))), int(flow.y)
                _put_picture(draft, left, top, width, height)
                flow.y = top + height + 0.5 * draft.x
                label = pick(rng, (f"Figure {number}:", f"Fig. {number}.", f"({chr(97 + number % 26)})", "Photo:"))
                words = [draft.text.note(label), *draft.text.words(rng.integers(3, 16))]
                style = draft.body if rng.random() < 0.5 else draft.body.at(0.9)
                lines, _ = wrap(words, style, flow.width, 3)
                flow.paragraph(" ".join(lines).split(), style, align=pick(rng, ("left", "centre")))
                number, placed = number + 1, placed + 1
                flow.gap(1.5 * draft.x)
        running_text(draft, flow, headings=False, most=rng.integers(1, 4))
        if flow.room(draft.body) < 2 and not flow.full:
            flow.next_column()


def _put_picture(draft: Draft, left: int, top: int, width: int, height: int) -> None:
    pixels, license = draft.picture(width, height)
    draft.sheet.pictures.append((pixels, left, top))
    if license and license not in draft.sheet.licenses:
        draft.sheet.licenses.append(license)


def large(draft: Draft) -> None:
    """A few words as large as the sheet allows, as on posters, slides and signs."""
    rng = draft.rng
    left, top, right, bottom = draft.frame
    lines = rng.integers(1, 6)
    words = draft.text.words(rng.integers(lines, 2 * lines + 2))
    if rng.random() < 0.3:
        words = [word.upper() for word in words]
    start = rng.uniform(0.5, 1.0) * (bottom - top) / (lines * draft.heading.pitch)
    factor = max(1.0, start)
    align = pick(rng, ("left", "centre", "right"))
    for _ in range(12):  # smaller until all words are whole and on the sheet
        style = draft.heading.at(factor)
        widest = max(map(style.measure, words))
        room = int((bottom - top - style.ascent - style.descent) / style.pitch) + 1
        if factor <= 1.0 or (widest <= right - left and wrap(words, style, right - left, room)[1] == len(words)):
            break
        factor = max(1.0, 0.85 * factor)
    flow = draft.flow()
    flow.paragraph(words, style, align=align)
    free = flow.bottom - flow.y
    if free > 2 * style.pitch and rng.random() < 0.6:  # in the middle
        shift = round(free * rng.uniform(0.2, 0.5))
        for line in draft.sheet.lines:
            line.baseline += shift
        flow.y += shift
    small = draft.body.at(max(1.0, min(0.35 * factor, 3.0)))
    flow.gap(small.x_height)
    if flow.room(small) > 0 and rng.random() < 0.6:
        lines, _ = wrap(draft.text.words(rng.integers(3, 20)), small, flow.width, flow.room(small))
        flow.paragraph(" ".join(lines).split(), small, align=align)


COLOURS = ((255, 255, 255), (0, 0, 0), (255, 230, 60), (200, 20, 30), (20, 40, 140), (250, 250, 235), (30, 30, 30))


def photo(draft: Draft) -> None:
    """A picture all over the sheet and one to eight groups of words on it, light on dark or dark on light, some on a
    plate."""
    rng, sheet = draft.rng, draft.sheet
    width, height = sheet.width, sheet.height
    _put_picture(draft, 0, 0, width, height)
    light = sheet.pictures[0][0].mean(axis=2)
    taken: list[tuple[float, float, float, float]] = []
    groups: list[tuple[float, list[Line]]] = []
    for attempt in range(3 * rng.integers(1, 9)):
        factor = rng.uniform(1.0, max(1.0, min(6.0, height / (10 * draft.x), width / (14 * draft.x))))
        style = (draft.heading if rng.random() < 0.5 else draft.body).at(factor)
        words = draft.text.words(rng.integers(1, 5))
        most = width - 2 * style.x_height - 4
        lines, _ = wrap(words, style, rng.uniform(0.4, 1.0) * most, 3)
        if not lines and not groups:
            lines, _ = wrap(words, style, most, 3)
        if not lines:
            continue
        wide = max(map(style.measure, lines))
        high = style.pitch * (len(lines) - 1) + style.ascent + style.descent
        pad = 0.5 * style.x_height
        if high + 2 * pad > height - 2 or wide + 2 * pad > width - 2:
            if attempt or groups:
                continue
            style, lines, pad = draft.body, [draft.body.shorten(words[0], width - 4) or words[0][:1]], 1.0
            wide, high = style.measure(lines[0]), style.ascent + style.descent
        x = 1 + pad + rng.random() * max(width - 2 - wide - 2 * pad, 0)
        y = 1 + pad + rng.random() * max(height - 2 - high - 2 * pad, 0)
        box = (x - pad, y - pad, x + wide + pad, y + high + pad)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        part = light[max(int(box[1]), 0) : int(box[3]) + 1, max(int(box[0]), 0) : int(box[2]) + 1]
        level, spread = float(part.mean()), float(part.std())
        plate = rng.random() < 0.25 or spread > 45
        style.colour = max((pick(rng, COLOURS) for _ in range(6)), key=lambda colour: abs(_grey(colour) - level))
        if plate:
            fill = (255, 255, 255) if _grey(style.colour) < 128 else (15, 15, 20)
            sheet.marks.append(Mark("fill", box, colour=fill))
        align = rng.random() < 0.5
        group = []
        for number, line in enumerate(lines):
            shift = (wide - style.measure(line)) / 2 if align else 0.0
            group.append(Line(line, style, x + shift, float(round(y + style.ascent + number * style.pitch))))
        groups.append((y, group))
    for _, group in sorted(groups, key=lambda entry: entry[0]):
        sheet.lines += group


def _grey(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def scene(rng: Scalars, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: a drawn stand-in for a photograph, a sky, hills and round things."""
    pixels = np.zeros((height, width, 4), dtype=np.uint8)
    info = skia.ImageInfo.Make(width, height, skia.kRGBA_8888_ColorType, skia.kOpaque_AlphaType)
    surface = skia.Surface.MakeRasterDirect(info, pixels)
    canvas = surface.getCanvas()
    colour = lambda low, high: skia.Color(*(rng.integers(low, high) for _ in range(3)))  # noqa: E731
    sky = skia.GradientShader.MakeLinear([(0, 0), (0, height)], [colour(60, 200), colour(120, 256)])
    canvas.drawPaint(skia.Paint(Shader=sky))
    for hill in range(rng.integers(2, 6)):
        path = skia.Path()
        base = height * (0.35 + 0.12 * hill)
        path.moveTo(0, height)
        path.lineTo(0, base)
        for step in range(1, 5):
            x = width * step / 4
            path.quadTo(x - width / 8, base + height * rng.uniform(-0.25, 0.25), x, base)
        path.lineTo(width, height)
        canvas.drawPath(path, skia.Paint(AntiAlias=True, Color=colour(20, 180)))
    for _ in range(rng.integers(1, 9)):
        radius = rng.uniform(0.02, 0.15) * min(width, height)
        canvas.drawCircle(
            rng.random() * width, rng.random() * height, radius, skia.Paint(AntiAlias=True, Color=colour(0, 256))
        )
    del canvas, surface
    return np.ascontiguousarray(pixels[..., :3])


# Name: (weight among the pages, function); the sum of the weights is 1.
LAYOUTS: dict[str, tuple[float, Callable[[Draft], None]]] = {
    "paragraphs": (0.34, paragraphs),
    "headings": (0.06, headings),
    "lists": (0.09, lists),
    "table": (0.10, table),
    "form": (0.07, form),
    "receipt": (0.06, receipt),
    "letter": (0.06, letter),
    "code": (0.06, code),
    "captions": (0.06, captions),
    "large": (0.05, large),
    "photo": (0.05, photo),
}
WITH_PICTURES = ("captions", "photo")
