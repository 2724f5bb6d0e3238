"""Markdown of a page from its layout and the texts of its lines: what a model that reads line by line cannot say.

    rows in columns (`rows_unit`) -> code (constant advance), tables (cells in common columns), headings (size and
                                     weight), items of lists (a mark, and what hangs below their text), paragraphs
                                  -> Markdown in the dialect of the project's targets (`training/data/markdown.py`)

Emphasis, quotations, formulas, rules and pictures are not told. `u` is the height of a lower-case x. No number here
comes from the UNIT paper; all are ours, set on pages of the training sets only.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .rows_unit import (
    CODE_LIKE,
    Column,
    Measures,
    ReadLine,
    coherence_of,
    in_flow,
    letter_places,
    rise_of,
    weight_of,
    without_furniture,
    word_places,
)

__all__ = ["escape_markdown", "write_markdown"]


def write_markdown(lines: Sequence[ReadLine]) -> str:
    """Markdown of the lines of a page, in whatever order they are; `""` where nothing was read."""
    columns = in_flow([line for line in lines if line.text.strip()])
    if not columns:
        return ""
    page = Measures.of([row for rows in columns for row in rows])
    columns = without_furniture(columns, page)
    parts = [_parts(Column.of(rows), page) for rows in columns]
    return "\n\n".join(_written(_joined_over_columns(parts)))


# --------------------------------------------------------------------------------------------------------------- parts


@dataclass
class _Part:
    """A part of a page.

    Args:
        kind: `heading`, `paragraph`, `code`, `table` or `item`, of a list.
        lines: of code as printed, of tables rows of cells, else one text.
        level: of a heading.
        depth: number of list items that it stands in, itself not counted.
        mark: of an item: `-` or a number with a full stop.
        open: the last line is full, so that the part may go on in the next column.
    """

    kind: str
    lines: list
    level: int = 0
    depth: int = 0
    mark: str = ""
    open: bool = False


_BULLET = re.compile(r"([•◦▪○●■–*·-]) (?=\S)")
_NUMBER = re.compile(r"(\d{1,3})[.)] (?=\S)")


@dataclass
class _Open:
    """An item that later rows may belong to: x of its mark and of its text in px."""

    mark_x: float
    text_x: float


def _parts(column, page):
    """The parts of a column, top to bottom."""
    u = page.x_height
    parts, items = [], []  # items: `_Open`, the innermost last
    rows = column.rows
    at = 0
    while at < len(rows):
        if end := _end_of_code(rows, at):
            x0 = min(row.x0 for row in rows[at:end])
            while items and x0 < items[-1].text_x - 0.1 * u:
                items.pop()
            parts.append(_Part("code", _code_lines(rows[at:end]), depth=len(items)))
            at = end
            continue
        if (table := _table(rows, at, page)) is not None:
            end, lines = table
            parts.append(_Part("table", lines))
            items, at = [], end
            continue
        end = _end_of_paragraph(rows, at, column, page)
        part = _paragraph(rows[at:end], column, page, items, rows[at - 1] if at else None)
        parts.append(part)
        at = end
    return parts


def _end_of_paragraph(rows, at, column, page):
    """The place after the last row of the paragraph, heading or item that begins at `rows[at]`."""
    first = rows[at]
    mark = _mark(first)
    text_x = _text_x(first) if mark else None
    right = _right(rows, at, column)
    end = at + 1
    while end < len(rows):
        above, row = rows[end - 1], rows[end]
        size = first.x_height
        if not 0.8 < row.x_height / above.x_height < 1.25 and not (above.fixed or row.fixed):
            break
        if abs(_row_weight(row) / max(_row_weight(above), 1e-6) - 1) > 0.45 and _is_heading([above], page):
            break
        pitch = (row.baseline - above.baseline) / size
        if pitch > 1.17 * column.pitch + 0.1 or pitch < 0.5 * column.pitch:
            break
        if _mark(row):
            break
        if row.fixed and _end_of_code(rows, end):
            break
        if text_x is not None:
            if row.x0 < text_x - 0.8 * size and _room(above, row, right):
                break
        elif end > at + 1:
            if row.x0 - above.x0 > 0.9 * size and row.x0 > first.x0 - 0.5 * size:  # indented: the next begins
                break
            if above.x0 - row.x0 > 0.9 * size:
                break
        elif row.x0 - above.x0 > 0.9 * size and not _hanging(rows, end, size):
            break
        if _room(above, row, right):
            break
        end += 1
    return end


def _right(rows, at, column):
    """Where the lines from `rows[at]` end: the longest of those at the column's usual distance from each other."""
    right = rows[at].x1
    for above, row in pairwise(rows[at:]):
        if row.fixed or row.baseline - above.baseline > (1.17 * column.pitch + 0.1) * row.x_height:
            break
        right = max(right, row.x1)
    return right


def _hanging(rows, at, size):
    """Whether the row at `at`, which is set in from the one above, has a row flush below it: hanging indentation."""
    return at + 1 < len(rows) and abs(rows[at + 1].x0 - rows[at].x0) < 0.5 * size


def _room(above, row, right):
    """Whether the first word of `row` would have fitted on the line above: then that line's end was meant."""
    _, places = row.words
    return right - above.x1 > (places[0, 1] - places[0, 0]) + 1.2 * row.x_height


def _mark(row):
    """The mark of a list's item that a row begins with, as Markdown has it; `""` where it has none."""
    text = row.text
    if _BULLET.match(text):
        return "-"
    found = _NUMBER.match(text)
    return f"{found[1]}." if found else ""


def _text_x(row):
    """Where the text behind a row's mark begins, px."""
    _, places = row.words
    return float(places[1, 0])


def _row_weight(row):
    return float(np.mean([weight_of(cell) for cell in row.cells]))


def _size(rows, page):
    """Size of the type of some rows over that of running text, by small letters and by tall ones."""
    x_height = float(np.mean([row.x_height for row in rows])) / page.x_height
    rise = float(np.mean([rise_of(cell) for row in rows for cell in row.cells])) / page.rise if page.rise else x_height
    if abs(x_height - 1) < 0.005:  # of too few letters to tell: the layout gave it the page's
        return rise
    # Capitals make the one too large, brackets and formulas the other.
    return min(x_height, rise) if min(x_height, rise) < 1.12 else math.sqrt(x_height * rise)


def _is_heading(rows, page, above=None):
    """Whether rows stand out from running text by their size, or by their weight where they stand alone.

    Args:
        above: the row above them, if there is one.
    """
    text = " ".join(row.text for row in rows)
    known = sum(character.isalnum() or character == "_" for character in text)
    if any(row.fixed for row in rows) or known < max(3, 0.5 * len(text)) or len(rows) > 4:
        return False
    size = _size(rows, page)
    if size > 1.18:
        return True
    weight = np.mean([_row_weight(row) for row in rows]) / max(page.weight, 1e-6)
    if len(rows) > 1 or text[-1] in ".:,;!" or text.startswith("//"):
        return False
    alone = above is None or rows[0].baseline - above.baseline > 3.4 * page.x_height
    return alone and ((size > 1.06 and weight > 1.1) or (size > 0.88 and weight > 1.18))


def _level(rows, page):
    """Level of a heading: the geometric means of HEADING_SIZES of `training/data/markdown_typeset.py` part them, and
    those of LaTeX's sections (1.44, 1.2, 1) as well."""
    size = _size(rows, page)
    return next((level for level, least in ((1, 1.69), (2, 1.37), (3, 1.17)) if size > least), 4)


def _paragraph(rows, column, page, items, above):
    """The part that some rows below the row `above` make; `items` is changed to what is open after it."""
    u = page.x_height
    first = rows[0]
    texts = [_inline(row, page) for row in rows]
    mark = _mark(first)
    if mark != "-" and _is_heading(rows, page, above):
        items.clear()
        return _Part("heading", [_join_lines([row.text for row in rows])], level=_level(rows, page))
    if mark:
        while items and first.x0 < items[-1].mark_x - 0.8 * u:
            items.pop()
        if items and first.x0 < items[-1].text_x - 0.8 * u:
            items.pop()
        depth = len(items)
        items.append(_Open(first.x0, _text_x(first)))
        return _Part("item", [_join_lines(texts).split(" ", 1)[1]], depth=depth, mark=mark)
    left = min(row.x0 for row in rows)
    while items and left < items[-1].text_x - 0.8 * u:
        items.pop()
    is_open = rows[-1].x1 > column.right - 4 * u
    return _Part("paragraph", [_join_lines(texts)], depth=len(items), open=is_open)


_DIVIDED = re.compile(r"(?<=[^\W\d_A-Z])-\n(?=[a-z])")


def _join_lines(texts):
    """Lines to one: a word divided between small letters is joined, every other break becomes a space."""
    text = _DIVIDED.sub("", "\n".join(texts))
    return re.sub(r"\s*\n\s*", " ", re.sub(r"(?<=\w)-\n(?=\w)", "-", text)).strip()


def _joined_over_columns(columns):
    """The parts of all columns; a paragraph that goes on in the next column is one."""
    joined = []
    for parts in columns:
        if joined and parts and _goes_on(joined[-1], parts[0]):
            first, *parts = parts
            joined[-1].lines = [_join_lines([joined[-1].lines[0], first.lines[0]])]
            joined[-1].open = first.open
        joined += parts
    return joined


def _goes_on(above, first):
    alike = above.kind == first.kind == "paragraph" and above.depth == first.depth
    return alike and above.open and first.lines[0][:1].islower()


# ---------------------------------------------------------------------------------------------------------------- code


def _end_of_code(rows, at):
    """The place after the last row of the block of code that begins at `rows[at]`; 0 where none begins there."""
    first = rows[at]
    if not first.fixed:
        return 0
    end, last = at + 1, at + 1
    while end < len(rows):
        row, above = rows[end], rows[end - 1]
        if row.baseline - above.baseline > 9 * first.x_height:
            break
        if row.fixed and abs(row.fixed / first.fixed - 1) < 0.05:
            last = end + 1
        elif row.fixed or len(row.text) > 7:  # what is shorter has too few letters to tell its advance
            break
        end += 1
    # short rows at the end: brackets that close, most often
    while last < end and not any(character.isalnum() for character in rows[last].text):
        last += 1
    return last


def _code_lines(rows):
    """Lines of code with their indentation and their empty lines."""
    advance = float(np.median([row.fixed for row in rows if row.fixed]))
    left = min(row.x0 for row in rows)
    pitches = [lower.baseline - upper.baseline for upper, lower in pairwise(rows)]
    pitch = min(pitches, default=0.0)
    lines = []
    for row, step in zip(rows, [0.0, *pitches], strict=True):
        lines += [""] * max(0, round(step / max(pitch, 1.0)) - 1)
        words, places = row.words
        line = ""
        for word, (x0, _) in zip(words, places, strict=True):
            # The side bearings of letters differ by up to half an advance.
            column = round((x0 - left) / advance - 0.1)
            line += " " * max(column - len(line), 1 if line else 0) + word
        lines.append(line)
    return lines


# -------------------------------------------------------------------------------------------------------------- tables


_LEADERS = re.compile(r"(?:\. ?){4}")


def _table(rows, at, page):
    """`(place after its last row, rows of cells' texts)` of the table that begins at `rows[at]`, or None."""
    u = page.x_height
    least = 1.4 * u  # wider than a space between words, narrower than what parts columns
    gutters = _gaps(rows[at], least)
    size = rows[at].x_height
    if not gutters or size > 1.2 * u or _mark(rows[at]) or _LEADERS.search(rows[at].text):
        return None
    end, multiple = at + 1, 1
    while end < len(rows) and 0 < rows[end].baseline - rows[end - 1].baseline < 6 * u:
        row = rows[end]
        if row.fixed or _mark(row) or _LEADERS.search(row.text) or not 0.8 < row.x_height / size < 1.25:
            break
        common = _common(gutters, _white(row, 0.8 * u), 0.7 * u)
        if not common or (len(common) < len(gutters) and len(_gaps(row, least)) > len(common)):
            break
        gutters = common
        multiple += bool(_gaps(row, least))
        end += 1
    while end > at + 1 and not _gaps(rows[end - 1], least) and rows[end - 1].x0 < gutters[0][0]:
        end -= 1  # a line below it that happens to be short
    if end - at < 2 or multiple < 2:
        return None
    lines = []
    for row in rows[at:end]:
        cells = _cells(row, gutters, page)
        if lines and not cells[0]:
            lines[-1] = [_join_lines([old, new]) if new else old for old, new in zip(lines[-1], cells, strict=True)]
        else:
            lines.append(cells)
    return end, lines


def _gaps(row, least):
    """Gaps between the words of a row that are wider than `least`, (x0, x1) px each."""
    _, places = row.words
    return [(a, b) for a, b in zip(places[:-1, 1], places[1:, 0], strict=True) if b - a > least]


def _white(row, least):
    """The same, and what is white left and right of the row."""
    return [(-np.inf, row.x0), *_gaps(row, least), (row.x1, np.inf)]


def _common(gutters, gaps, least):
    """Parts of `gutters` that are white in a row with `gaps` too, and wider than `least`."""
    found = []
    for a, b in gutters:
        shared = [(max(a, c), min(b, d)) for c, d in gaps if min(b, d) - max(a, c) > least]
        found += sorted(shared, key=lambda gap: gap[0] - gap[1])[:1]  # the widest
    return found


def _cells(row, gutters, page):
    """Texts of a row's cells, one more than there are gutters."""
    middles = [(a + b) / 2 for a, b in gutters]
    cells = [([], []) for _ in range(len(gutters) + 1)]
    for word, coded, (x0, x1) in zip(*_coded_words(row, page), row.words[1], strict=True):
        for kept, value in zip(cells[int(np.searchsorted(middles, (x0 + x1) / 2))], (word, coded), strict=True):
            kept.append(value)
    return [_with_code(*cell).replace("|", "\\|") for cell in cells]


# ------------------------------------------------------------------------------------------------------------- writing

_SPECIAL = re.compile(
    r"[\\`*$]"
    r"|(?<![^\W_])_|_(?![^\W_])"
    r"|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(:])|~(?=~)|(?<=~)~"
)
_AT_START = re.compile(r"(?:#{1,6}(?= |$)|>|[-+](?= |$)|=+ *$|-(?=[- ]*$)|~(?=~~))")
_NUMBERED = re.compile(r"\d{1,9}(?=[.)](?: |$))")


def escape_markdown(text):
    """`text` with a backslash before what would be markup.

    >>> escape_markdown("a*b, snake_case and <b>")
    'a\\\\*b, snake_case and \\\\<b>'
    """
    return _SPECIAL.sub(lambda match: "\\" + match[0], text)


def _at_start(text):
    """An escaped paragraph with a backslash before what would begin another block."""
    if _AT_START.match(text):
        return "\\" + text
    if found := _NUMBERED.match(text):
        return text[: found.end()] + "\\" + text[found.end() :]
    return text


def _inline(row, page):
    """The text of a row, escaped, code in it between backticks."""
    return _with_code(*_coded_words(row, page))


def _coded_words(row, page):
    """Words of a row, and of each whether it is code, see `_is_code`."""
    words, coded = [], []
    for cell in row.cells:
        places, pieces = word_places(cell)
        texts = cell.text.split()
        words += texts
        coded += [_is_code(*word, page) for word in zip(texts, places, pieces, strict=True)]
    return words, coded


_COMMAND = re.compile(r"[(\"']*\\[A-Za-z@]")  # of TeX: nothing else begins with a backslash


def _is_code(word, place, piece, page):
    """Whether one word of a line is set in type of constant advance: None where it is too short to tell."""
    if _COMMAND.match(word):
        return True
    middles = letter_places([piece], 1.2 * max(page.word_advances, default=0.0))
    alike = bool(CODE_LIKE.search(word))
    # Letters of common words stand on a grid by chance, the more often the fewer they are.
    least = 3 if alike else 6
    if len(middles) < least:
        return None
    for advance in page.word_advances:
        excess = (place[1] - place[0]) / advance - len(word)
        near = coherence_of(middles, advance * np.linspace(0.985, 1.015, 7)).max()
        if -0.9 < excess < 0.3 and near > (0.8 if alike else 0.95 if len(middles) < 8 else 0.92):
            return True
    return False


def _with_code(words, coded):
    """Words, escaped, with runs of code between backticks; a word between two of code is code if it cannot be told."""
    text, at = [], 0
    while at < len(words):
        end = at
        while end < len(words) and (coded[end] or (end > at and coded[end] is None)):
            end += 1
        while end > at and not coded[end - 1]:
            end -= 1
        if end == at:
            text.append(escape_markdown(words[at]))
            at += 1
            continue
        before, code, after = _without_punctuation(" ".join(words[at:end]))
        text.append(f"{escape_markdown(before)}{_code_span(code)}{escape_markdown(after)}" if code else before + after)
        at = end
    return " ".join(text)


def _without_punctuation(code):
    """Code with what of the sentence stands around it split off."""
    found = re.fullmatch(r"([(\"']*)(.*?)([.,;:!?)\"']*)", code)
    before, code, after = found.groups()
    # Brackets and quotes that have their partner inside are of the code.
    for left, right in ("()", '""', "''"):
        while after.startswith(right) and (
            code.count(left) > code.count(right) if left != right else code.count(left) % 2
        ):
            code, after = code + right, after[1:]
        if before.endswith(left) and after.startswith(right) and left != "(":
            before, code, after = before[:-1], left + code + right, after[1:]
    return before, code, after


def _code_span(code):
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if code.startswith("`") or code.endswith("`") else ""
    return f"{fence}{pad}{code}{pad}{fence}"


def _written(parts):
    """Blocks of Markdown, one string each; items of one list are one block."""
    blocks = []
    indents = []  # of the open items, what belongs to each is set in by
    previous = None
    for part in parts:
        indents = indents[: part.depth]
        margin = " " * (indents[-1] if indents else 0)
        lines = _lines(part)
        text = "\n".join(margin + line if line else "" for line in lines)
        inside = bool(blocks) and (
            part.depth > 0 or (part.kind == "item" and previous is not None and previous == "item")
        )
        if part.kind == "item":
            indents.append(len(margin) + len(part.mark) + 1)
        if inside:
            blocks[-1] += ("\n" if part.kind == "item" else "\n\n") + text
        else:
            blocks.append(text)
        previous = "item" if part.kind == "item" or part.depth else part.kind
    return blocks


def _lines(part):
    match part.kind:
        case "heading":
            return ["#" * part.level + " " + escape_markdown(part.lines[0])]
        case "code":
            longest = max((len(run) for line in part.lines for run in re.findall(r"^ *(`{3,})", line)), default=2)
            fence = "`" * (longest + 1)
            return [fence, *part.lines, fence]
        case "table":
            head, *body = ("| " + " | ".join(row) + " |" for row in part.lines)
            return [head, "| " + " | ".join("---" for _ in part.lines[0]) + " |", *body]
        case "item":
            return [f"{part.mark} {_at_start(part.lines[0])}"]
    return [_at_start(part.lines[0])]
