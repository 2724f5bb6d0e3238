"""Lines that were read -> rows and columns as a person sees them, and what type they are set in.

    lines with their places -> columns, in reading order, also where lists, headings or code stand in them
                            -> rows, the cells of a table's row side by side
                            -> what is usual on the page: size, weight, and the advance of type that has but one

All of it comes from the connected pieces of ink that the layout found, and from how many characters and words were
read in each line. `u` in comments is the height of a lower-case x. All numbers are ours, set on pages of the training
sets only.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

__all__ = ["Column", "Measures", "ReadLine", "Row", "in_flow", "without_furniture"]


@dataclass
class ReadLine:
    """One line of text, or one cell of a table's row, as layout and decoder have it.

    Args:
        box: `(x0, y0, x1, y1)` around the ink, pixels of the page made upright.
        text: what was read, without line breaks.
        x_height: px.
        baseline: px from the top of the page.
        ink: (N, 5) its connected pieces of ink: `x0, y0, x1, y1` and the number of pixels.
    """

    box: tuple[float, float, float, float]
    text: str
    x_height: float
    baseline: float
    ink: np.ndarray = field(default_factory=lambda: np.zeros((0, 5)), repr=False, compare=False)


# ------------------------------------------------------------------------------------------------------ rows and words


@dataclass
class Row:
    """Lines side by side: one, or the cells of a table's row."""

    cells: list  # `ReadLine`s from left to right
    fixed: float = 0.0  # px, the advance if it is set in type of constant advance, else 0

    @property
    def text(self):
        return " ".join(cell.text for cell in self.cells)

    @property
    def x0(self):
        return min(cell.box[0] for cell in self.cells)

    @property
    def x1(self):
        return max(cell.box[2] for cell in self.cells)

    @property
    def baseline(self):
        return self.cells[0].baseline

    @property
    def x_height(self):
        return float(np.median([cell.x_height for cell in self.cells]))

    @property
    def words(self):
        """Texts of its words and, as (N, 2), where each begins and ends in px."""
        pairs = [word_places(cell) for cell in self.cells]
        texts = [word for cell in self.cells for word in cell.text.split()]
        return texts, np.concatenate([places for places, _ in pairs])


def in_flow(lines, depth=0):
    """Lines in the order of columns: lists of rows, each a column or what stands above and below columns.

    The layout parts columns of running text alone, as the lines are needed before anything is read. Here columns of
    lists, headings and code are parted as well, and the columns of a table, however full, are not.
    """
    lines = sorted(lines, key=lambda line: line.baseline)
    parted = _parted(lines) if depth < 8 and len(lines) >= 10 else None
    if parted is None:
        return [_rows(lines)] if lines else []
    return [rows for part in parted for rows in in_flow(part, depth + 1)]


def _parted(lines):
    """`(above, left, right, below)` of the tallest gutter between columns, or None."""
    u = float(np.median([line.x_height for line in lines]))
    x0, _, x1, _ = np.array([line.box for line in lines], float).T
    y = np.array([line.baseline for line in lines])
    candidates = []
    for x in _apart(x0 - 0.75 * u, 0.25 * u):
        crossing = np.flatnonzero((x0 < x + 0.7 * u) & (x1 > x - 0.7 * u))
        for first, last in pairwise([-1, *crossing.tolist(), len(lines)]):
            if last - first <= 10:
                continue
            inside = np.arange(first + 1, last)
            left, right = inside[x1[inside] < x], inside[x0[inside] > x]
            if len(left) >= 5 and len(right) >= 5:
                both = min(y[left[-1]], y[right[-1]]) - max(y[left[0]], y[right[0]])
                candidates.append((float(both), x, first, last, left, right))
    for both, _, first, last, left, right in sorted(candidates, key=lambda one: -one[0]):
        if both < 12 * u:
            break
        if _are_columns([lines[i] for i in left], [lines[i] for i in right], u):
            # a line level with the first or last of the columns, across them, is not of them
            return lines[: first + 1], [lines[i] for i in left], [lines[i] for i in right], lines[last:]
    return None


def _apart(values, least):
    """Of numbers as close as that the smallest."""
    kept = []
    for value in sorted(values.tolist()):
        if not kept or value >= kept[-1] + least:
            kept.append(value)
    return kept


def _are_columns(left, right, u):
    """Whether lines on both sides of a gutter are two columns, not the cells of a table.

    The rows of a table stand on common baselines, those of columns by chance alone, or where both are running text:
    that fills its lines.
    """
    alike, full = [], []
    for own, other in ((left, right), (right, left)):
        baselines = np.array([line.baseline for line in other])
        own_extent = [line for line in own if baselines.min() - u < line.baseline < baselines.max() + u]
        alike.append(np.mean([np.abs(baselines - line.baseline).min() < 0.3 * u for line in own_extent or own]))
        x0, x1 = min(line.box[0] for line in own), max(line.box[2] for line in own)
        if x1 - x0 < 8 * u:
            return False
        full.append(np.mean([line.box[2] - line.box[0] > 0.8 * (x1 - x0) for line in own]))
    return max(alike) < 0.6 or min(full) > 0.6


def _rows(lines):
    """Rows of lines from top to bottom, those of one baseline side by side."""
    rows = []
    for line in lines:
        cells = rows[-1].cells if rows else []
        if cells and line.baseline - cells[0].baseline < 0.5 * line.x_height and _beside(line, cells):
            cells.append(line)
        else:
            rows.append(Row([line]))
    for row in rows:
        row.cells.sort(key=lambda cell: cell.box[0])
    return rows


def _beside(line, cells):
    return all(line.box[0] >= cell.box[2] or line.box[2] <= cell.box[0] for cell in cells)


def word_places(line):
    """Places of a line's words, (N, 2) px, and the ink of each: `N` words are parted by the `N - 1` widest gaps.

    Where there is not so much white, by their share of the characters, and the ink is empty.
    """
    lengths = [len(word) for word in line.text.split()]
    count = len(lengths)
    if len(line.ink):
        ink = line.ink[np.argsort(line.ink[:, 0], kind="stable")]
        reach = np.maximum.accumulate(ink[:, 2])
        gaps = ink[1:, 0] - reach[:-1]
        cuts = np.sort(np.argsort(-gaps, kind="stable")[: count - 1])
        if len(cuts) == count - 1 and (gaps[cuts] > 0).all():
            pieces = np.split(ink, cuts + 1)
            return np.array([[piece[0, 0], piece[:, 2].max()] for piece in pieces], float), pieces
    ends = np.cumsum([length + 1 for length in lengths]) - 1
    scale = (line.box[2] - line.box[0]) / ends[-1]
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = line.box[0] + scale * np.stack([starts, ends], axis=1)
    return places, [np.zeros((0, 5))] * count


# --------------------------------------------------------------------------------------------------- constant advance

# Words that no sentence holds: a name with a dot, a bracket or a capital within, a command, an option.
CODE_LIKE = re.compile(r"\w[._:/=(\[{<>]\w|\w[(\[{]|[a-z][A-Z]|[\\@_$#=<>{}\[\]|]|^--?\w|^/|^['\"].*['\"]\W?$|^\.\w")


def letter_places(pieces, widest):
    """Middles of the letters in the ink of words, (N,) px: an i and its dot are one; what is wider touches another."""
    middles = []
    for piece in pieces:
        current = None
        for x0, _, x1, _, _ in piece:
            if current and x0 < current[1] - 0.3 * min(x1 - x0, current[1] - current[0]):
                current[1] = max(current[1], x1)
                continue
            current = [x0, x1]
            middles.append(current)
    middles = np.array(middles, float).reshape(-1, 2)
    return middles[middles[:, 1] - middles[:, 0] < widest].mean(axis=1)


def coherence_of(middles, advances):
    """How well letters stand on a grid of each advance: |mean of exp(2 pi i x / advance)|, 1 on the grid, (A,)."""
    return np.abs(np.exp(2j * np.pi * middles / np.asarray(advances)[:, None]).mean(axis=1))


def advance_of(line):
    """`(advance in px, coherence, letters)` of the grid that the letters of a line fit best."""
    words = line.text.split()
    places, pieces = word_places(line)
    lengths = np.array([len(word) for word in words])
    starts = np.cumsum(lengths + 1) - lengths - 1
    if len(words) > 2:
        guess = (places[-1, 0] - places[0, 0]) / starts[-1]
    else:
        longest = int(lengths.argmax())
        guess = (places[longest, 1] - places[longest, 0]) / (lengths[longest] - 0.25)
    middles = letter_places(pieces, 1.2 * guess)
    if guess <= 1 or len(middles) < 3:
        return 0.0, 0.0, 0
    advances = guess * np.linspace(0.82, 1.18, 145)  # a text misread is too long or too short
    coherence = coherence_of(middles, advances)
    best = int(coherence.argmax())
    return float(advances[best]), float(coherence[best]), len(middles)


def _is_fixed(advance, coherence, letters, known):
    """Whether a line is set in type of constant advance. `known` are the advances of lines that surely are.

    Of lines of code 95 in 100 have a coherence of 0.76 or more, of lines of prose with 15 letters or more one in 100
    has 0.65 [ours, measured on markdown-made-train]; a short line may be on a grid by chance.
    """
    if any(abs(advance / one - 1) < 0.03 for one in known):
        return coherence > (0.72 if letters >= 8 else 0.85)
    return coherence > 0.8 if letters >= 15 else coherence > 0.9 and letters >= 10


# ----------------------------------------------------------------------------------------------------- the whole page


@dataclass
class Measures:
    """What is usual on a page."""

    x_height: float  # px, of running text
    rise: float  # px, of its tall letters
    weight: float  # of its ink, see `weight_of`
    word_advances: list  # px, of words in type of constant advance in running text

    @classmethod
    def of(cls, rows):
        measured = [[advance_of(cell) for cell in row.cells] for row in rows]
        sure = [one[0] for row in measured for one in row if one[2] >= 20 and one[1] > 0.85]
        for row, found in zip(rows, measured, strict=True):
            good = [one[0] for one in found if _is_fixed(*one, sure)]
            row.fixed = good[0] if len(good) == len(found) and not row.text.startswith("•") else 0.0
        prose = [cell for row in rows if not row.fixed for cell in row.cells] or [c for row in rows for c in row.cells]
        lengths = [len(cell.text) for cell in prose]
        x_height = float(np.median(np.repeat([cell.x_height for cell in prose], lengths)))
        weight = float(np.median(np.repeat([weight_of(cell) for cell in prose], lengths)))
        rise = float(np.median(np.repeat([rise_of(cell) for cell in prose], lengths)))
        for row in rows:  # a heading in type of constant advance; code is smaller than the text most often
            row.fixed = 0.0 if row.x_height > 1.3 * x_height else row.fixed
        return cls(x_height, rise, weight, _advances_of_words(prose, sure))


def _advances_of_words(lines, sure):
    """Advances of code in running text, px: what most long words in lines agree on, and the largest of code's lines,
    `sure`."""
    found = []
    for line in lines:
        places, pieces = word_places(line)
        for word, (x0, x1), piece in zip(line.text.split(), places, pieces, strict=True):
            word = word.strip(".,;:()")
            if len(word) >= (5 if CODE_LIKE.search(word) else 8) and len(piece):
                guess = (x1 - x0) / (len(word) - 0.3)
                middles = letter_places([piece], 1.2 * guess)
                advances = guess * np.linspace(0.92, 1.08, 33)
                coherence = coherence_of(middles, advances) if len(middles) >= 5 else np.zeros(1)
                if coherence.max() > 0.94:
                    found.append(float(advances[coherence.argmax()]))
    agreeing = [sum(abs(one / other - 1) < 0.015 for other in found) for one in found]
    best = [found[int(np.argmax(agreeing))]] if agreeing and max(agreeing) >= 2 else []
    return best + [one for one in [max(sure, default=0.0)] if one and not (best and abs(one / best[0] - 1) < 0.015)]


def rise_of(line):
    """How far the tall letters of a line stand above its baseline, px."""
    return float(line.baseline - np.quantile(line.ink[:, 1], 0.1)) if len(line.ink) else 0.0


def weight_of(line):
    """Ink in a row of pixels of a letter, over the x-height: tells bold type from a lighter one of the same page."""
    if not len(line.ink):
        return 0.0
    heights = (line.ink[:, 3] - line.ink[:, 1]).sum()
    return float(line.ink[:, 4].sum() / (heights * line.x_height))


_PAGE_NUMBER = re.compile(
    r"[-(\[|\s]*(?:page\s*)?(?:\d{1,4}|[ivxl]{1,6})[-)\]|\s]*(?:(?:/|of)\s*\d{1,4})?", re.IGNORECASE
)


def without_furniture(columns, page):
    """Without page numbers, and running heads with one, at the top and the bottom: they are not of the text."""
    rows = [row for column in columns for row in column]
    baselines = np.sort([row.baseline for row in rows])
    kept = []
    for column in columns:
        kept.append([])
        for row in column:
            others = baselines[np.abs(baselines - row.baseline) > 0.5 * page.x_height]
            nearest = np.abs(others - row.baseline).min() if len(others) else 0.0
            outer = not len(others) or row.baseline < others[0] or row.baseline > others[-1]
            texts = [row.text] if len(row.cells) == 1 else [row.text, row.cells[0].text, row.cells[-1].text]
            numbered = any(_PAGE_NUMBER.fullmatch(text.strip()) for text in texts)
            if not (outer and numbered and nearest > 3.5 * page.x_height):
                kept[-1].append(row)
    return [column for column in kept if column]


@dataclass
class Column:
    """Rows below each other."""

    rows: list
    right: float  # px, where its longest row ends
    pitch: float  # usual distance of baselines, in x-heights

    @classmethod
    def of(cls, rows):
        left, right = min(row.x0 for row in rows), max(row.x1 for row in rows)
        pairs = [
            ((lower.baseline - upper.baseline) / lower.x_height, upper.x1 > right - 0.1 * (right - left))
            for upper, lower in pairwise(rows)
            if not (upper.fixed or lower.fixed) and 0.85 < upper.x_height / lower.x_height < 1.18
        ]
        pairs = [pair for pair in pairs if 1.5 < pair[0] < 4.5]
        # The lines of paragraphs are the closest rows, and what follows a full line is of its paragraph most often.
        full = [pitch for pitch, after_full in pairs if after_full]
        chosen, share = (full, 0.4) if len(full) >= 3 else ([pitch for pitch, _ in pairs], 0.25)
        return cls(rows, right, float(np.quantile(chosen, share)) if chosen else 2.9)
