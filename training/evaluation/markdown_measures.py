"""How well a page was turned into Markdown: its text, its structure, its tables.

Both sides are read into the blocks of :mod:`training.data.markdown` and written in that module's one dialect first, so
`*` against `-`, the padding of a table, the numbering of a fence or where a paragraph is broken cost nothing. A
prediction that cannot be parsed has no structure, and its text is what it is.

| figure | definition |
|---|---|
| word F1, CER, … | of the text alone, markup left out, as :mod:`training.evaluation.text` has them |
| Markdown similarity | 1 - Levenshtein distance of the two in the dialect, over the length of the longer one |
| TEDS, TEDS structure | tree edit distance similarity of tables (arXiv 1911.10683), with and without what cells hold |
| heading, list, code, formula F1 | elements aligned in order; a pair adds how alike its two texts are |

TEDS of two tables is ``1 - distance / nodes``: of the tree table, head or body, rows, cells; inserting or deleting a
node costs 1, changing what kind it is 1, changing what a cell holds the share of its characters that are edited; nodes
are those of the larger tree. Of a page: tables are aligned in order so that the sum is largest, and divided by the
number of tables on the side that has more; a table that was missed or invented adds nothing.

In the F1 figures a pair of elements adds ``1 - distance / length`` of its texts (Levenshtein, the longer one's
length), half of that when a heading has another level or an item of a list another depth or kind; below one half it
is no pair [ours]. Pages that have none on either side are left out of a figure, and ``Figure.items`` counts the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from training.data import markdown as dialect
from training.evaluation.contract import Figure, Value
from training.evaluation.text import RESAMPLES, pooled

ALIKE = 0.5  # ours: texts less alike than this are no pair
ELEMENTS = ("heading", "list", "code", "formula")
# LaTeX's own way to mark a formula, which readers of papers write.
_LATEX_BLOCK = re.compile(r"\\\[(.+?)\\\]", re.DOTALL)
_LATEX_LINE = re.compile(r"\\\((.+?)\\\)")


class Element(NamedTuple):
    """A heading, an item of a list, code or a formula: what kind exactly, and its text."""

    kind: str
    text: str


Cells = tuple[tuple[str, ...], ...]  # rows of a table, the header first


@dataclass(frozen=True)
class Page:
    """Markdown taken apart.

    Attributes:
        written: in the one dialect.
        text: without markup, formulas left out.
        tables: of each the rows of its cells' texts, the header first.
        elements: by name of ``ELEMENTS``, in order.
    """

    written: str
    text: str
    tables: tuple[Cells, ...]
    elements: Mapping[str, tuple[Element, ...]]


def read_page(markdown: str) -> Page:
    """Markdown, foreign or our own, taken apart. What cannot be parsed is text without any structure."""
    source = _LATEX_LINE.sub(r"$\1$", _LATEX_BLOCK.sub(lambda found: f"$${found[1].strip()}$$", markdown))
    try:
        blocks = dialect.parse(source)
        written, text = dialect.write(blocks), dialect.visible_text(blocks)
    except Exception:  # a model writes what it likes, and no parser is proof against everything
        return Page(markdown, markdown, (), dict.fromkeys(ELEMENTS, ()))
    tables: list[Cells] = []
    elements: dict[str, list[Element]] = {name: [] for name in ELEMENTS}
    _walk(blocks, 1, tables, elements)
    return Page(written, text, tuple(tables), {name: tuple(found) for name, found in elements.items()})


def _walk(blocks: Sequence[dialect.Block], depth: int, tables: list[Cells], elements: dict[str, list[Element]]):
    for block in blocks:
        match block:
            case dialect.Heading(level, runs):
                elements["heading"].append(Element(f"{level}", dialect.plain(runs)))
                _of_runs(runs, elements)
            case dialect.Paragraph(runs):
                _of_runs(runs, elements)
            case dialect.Code(lines):
                elements["code"].append(Element("block", "\n".join(lines)))
            case dialect.Formula(latex):
                elements["formula"].append(Element("block", latex))
            case dialect.Quote(inner):
                _walk(inner, depth, tables, elements)
            case dialect.Items(ordered, _, items):
                for item in items:
                    own = [part for part in item if not isinstance(part, dialect.Items)]
                    kind = f"{'number' if ordered else 'bullet'} {depth}"
                    elements["list"].append(Element(kind, dialect.visible_text(own, formulas=True)))
                    _walk(item, depth + 1, tables, elements)
            case dialect.Table(header, rows):
                tables.append(tuple(tuple(dialect.plain(cell) for cell in row) for row in (header, *rows)))
                for row in (header, *rows):
                    for cell in row:
                        _of_runs(cell, elements)


def _of_runs(runs: dialect.Runs, elements: dict[str, list[Element]]) -> None:
    for run in runs:
        if run.code:
            elements["code"].append(Element("span", run.text))
        elif run.math:
            elements["formula"].append(Element("span", run.text))


# ---------------------------------------------------------------------------------------------------------- alignment


def align(scores: np.ndarray) -> float:
    """The largest sum of ``scores`` (P, T) over pairs in order: each row and column at most once, no two crossing.

    >>> float(align(np.array([[0.0, 1.0], [1.0, 0.5]])))
    1.0
    """
    best = np.zeros(scores.shape[1] + 1)
    for row in scores:
        paired = best[:-1] + row
        best[1:] = np.maximum.accumulate(np.maximum(paired, best[1:]))
    return float(best[-1])


def element_matches(predicted: Sequence[Element], true: Sequence[Element]) -> float:
    """How much of two lists of elements agrees, in order: a sum over pairs, each in [0, 1]."""
    if not predicted or not true:
        return 0.0
    alike = cdist(
        [element.text for element in predicted],
        [element.text for element in true],
        scorer=Levenshtein.normalized_similarity,
        dtype=np.float64,
    )
    same = np.array([[one.kind == other.kind for other in true] for one in predicted])
    return align(np.where(alike >= ALIKE, alike, 0.0) * np.where(same, 1.0, 0.5))


# ------------------------------------------------------------------------------------------------------------- tables


def teds(predicted: Cells, true: Cells, content: bool = True) -> float:
    """Tree edit distance similarity of two tables, in [0, 1]; see the module's docstring.

    Args:
        predicted, true: rows of cells' texts, the header first.
        content: whether what cells hold counts.

    >>> teds((("a", "b"), ("c", "d")), (("a", "b"), ("c", "x")))  # one of nine nodes wrong
    0.8888888888888888
    """
    one, other = _tree(predicted), _tree(true)
    return 1.0 - _tree_edit_distance(one, other, content) / max(len(one), len(other))


class _Node(NamedTuple):
    kind: str
    text: str
    first: int  # place of its leftmost leaf


def _tree(table: Cells) -> list[_Node]:
    """The nodes of a table in post-order."""
    nodes: list[_Node] = []

    for kind, rows in (("head", table[:1]), ("body", table[1:])):
        section = len(nodes)
        for row in rows:
            start = len(nodes)
            for cell in row:
                nodes.append(_Node("cell", cell, len(nodes)))
            nodes.append(_Node("row", "", start))
        if rows:
            nodes.append(_Node(kind, "", section))
    nodes.append(_Node("table", "", 0))
    return nodes


def _tree_edit_distance(one: Sequence[_Node], other: Sequence[_Node], content: bool) -> float:
    """Zhang and Shasha (SIAM J. Comput. 18, 1989) on nodes in post-order."""
    kinds = np.array([[a.kind != b.kind for b in other] for a in one], dtype=np.float64)
    if content:
        distances = cdist(
            [node.text for node in one],
            [node.text for node in other],
            scorer=Levenshtein.normalized_distance,
            dtype=np.float64,
        )
        change = np.maximum(kinds, distances).tolist()
    else:
        change = kinds.tolist()
    distance = [[0.0] * len(other) for _ in one]

    def keyroots(nodes: Sequence[_Node]) -> list[int]:
        """Of nodes that share their leftmost leaf, the highest."""
        return sorted({node.first: place for place, node in enumerate(nodes)}.values())

    for i in keyroots(one):
        for j in keyroots(other):
            i0, j0 = one[i].first, other[j].first
            width = j - j0 + 2
            above = [float(column) for column in range(width)]
            forest = [above]
            for row in range(1, i - i0 + 2):
                a = i0 + row - 1
                first_a, change_a, distance_a = one[a].first, change[a], distance[a]
                line = [above[0] + 1.0]
                for column in range(1, width):
                    b = j0 + column - 1
                    first_b = other[b].first
                    least = min(above[column], line[column - 1]) + 1.0
                    if first_a == i0 and first_b == j0:
                        least = min(least, above[column - 1] + change_a[b])
                        distance_a[b] = least
                    else:
                        least = min(least, forest[first_a - i0][first_b - j0] + distance_a[b])
                    line.append(least)
                forest.append(line)
                above = line
    return distance[-1][-1]


# ------------------------------------------------------------------------------------------------------------ figures


class MarkdownCounts(NamedTuple):
    """What one page adds to the pooled figures of structure."""

    edits: int  # of the Markdown in the one dialect
    length: int  # of the longer side
    tables: int  # on the side that has more
    teds: float  # sum over aligned tables
    teds_structure: float
    heading_matches: float
    headings: int  # of both sides together, as all below
    list_matches: float
    list_items: int
    code_matches: float
    codes: int
    formula_matches: float
    formulas: int


def count_markdown(predicted: Page, true: Page) -> MarkdownCounts:
    """The counts of one page."""
    teds_sums = [0.0, 0.0]
    if predicted.tables and true.tables:
        for place, content in enumerate((True, False)):
            scores = [[teds(one, other, content) for other in true.tables] for one in predicted.tables]
            teds_sums[place] = align(np.array(scores))
    found: list[float] = []
    for name in ELEMENTS:
        one, other = predicted.elements[name], true.elements[name]
        found += [element_matches(one, other), len(one) + len(other)]
    return MarkdownCounts(
        Levenshtein.distance(predicted.written, true.written),
        max(len(predicted.written), len(true.written)),
        max(len(predicted.tables), len(true.tables)),
        *teds_sums,
        *found,
    )


MARKDOWN_FIGURES = ("markdown_similarity", "teds", "teds_structure", *(f"{name}_f1" for name in ELEMENTS))


def _markdown_figures(totals: np.ndarray) -> np.ndarray:
    """(R, 1 + 13) totals, number of pages first -> (R, 7) in the order of ``MARKDOWN_FIGURES``."""
    _, edits, length, tables, with_text, structure, *elements = totals.T
    shares = [1.0 - edits / np.maximum(length, 1.0)]
    shares += [total / np.maximum(tables, 1.0) for total in (with_text, structure)]
    pairs = zip(elements[::2], elements[1::2], strict=True)
    shares += [2.0 * matches / np.maximum(number, 1.0) for matches, number in pairs]
    return np.stack(shares, axis=1)


def summarise_markdown(
    counts: Sequence[MarkdownCounts],
    seed: int = 0,
    resamples: int = RESAMPLES,
    *,
    groups: Sequence[Hashable] | None = None,
    failed: Sequence[bool] | None = None,
    at: Mapping[str, Value] | None = None,
) -> Iterator[Figure]:
    """The figures of ``MARKDOWN_FIGURES`` that any page has something for, each over the pages that do.

    Args:
        counts: one per page.
        seed, resamples, groups: of the bootstrap, see :func:`training.evaluation.text.pooled`.
        failed: one per page: the subject raised an error there.
        at: what they were measured at.
    """
    table = np.array(counts, dtype=np.float64)
    owners = ("length", "tables", "tables", "headings", "list_items", "codes", "formulas")
    for place, (name, owner) in enumerate(zip(MARKDOWN_FIGURES, owners, strict=True)):
        has = np.flatnonzero(table[:, MarkdownCounts._fields.index(owner)] > 0)
        if len(has) == 0:
            continue
        figures: Callable = lambda totals, place=place: _markdown_figures(totals)[:, place : place + 1]  # noqa: E731
        chosen = None if groups is None else [groups[row] for row in has]
        value, low, high = pooled(table[has], figures, chosen, seed, resamples)[:, 0].tolist()
        wrong = 0 if failed is None else sum(bool(failed[row]) for row in has)
        yield Figure(name, value, low, high, items=len(has), failed=wrong, at=dict(at or {}))
