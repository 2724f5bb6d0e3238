"""training/evaluation/markdown_measures.py: canonical form, alignment, tree edit distance, all by hand."""

import functools

import numpy as np
import pytest

from training.data import markdown as dialect
from training.evaluation.markdown_measures import (
    MARKDOWN_FIGURES,
    Element,
    align,
    count_markdown,
    element_matches,
    read_page,
    summarise_markdown,
    teds,
)

PAGE = """# Title

Some *text* with `code` and $x^2$.

- one
- two

| a | b |
| --- | --- |
| 1 | 2 |
"""


def figures(prediction: str, truth: str) -> dict[str, float]:
    counts = [count_markdown(read_page(prediction), read_page(truth))]
    return {figure.name: figure.value for figure in summarise_markdown(counts)}


# ------------------------------------------------------------------------------------------------------ canonical form


@pytest.mark.parametrize(
    "prediction",
    [
        PAGE,
        PAGE.replace("- one", "* one").replace("- two", "* two"),  # other bullets
        PAGE.replace("| a | b |", "|a   |  b|").replace("| --- | --- |", "|:--|--:|"),  # padding and alignment
        PAGE.replace("# Title", "Title\n====="),
        PAGE.replace("*text*", "_text_").replace("Some ", "Some\n"),
        PAGE.replace("$x^2$", r"\(x^2\)"),  # as readers of papers write a formula
    ],
)
def test_two_ways_to_write_one_page_are_alike(prediction):
    assert figures(prediction, PAGE) == dict.fromkeys(MARKDOWN_FIGURES, 1.0)


def test_a_page_is_taken_apart():
    page = read_page(PAGE)
    assert page.tables == ((("a", "b"), ("1", "2")),)
    assert page.elements["heading"] == (Element("1", "Title"),)
    assert page.elements["list"] == (Element("bullet 1", "one"), Element("bullet 1", "two"))
    assert page.elements["code"] == (Element("span", "code"),)
    assert page.elements["formula"] == (Element("span", "x^2"),)
    assert page.text.split() == ["Title", "Some", "text", "with", "code", "and", ".", "one", "two", "a", "b", "1", "2"]


def test_an_item_within_an_item_is_deeper_and_not_part_of_its_parents_text():
    page = read_page("1. one\n   - inner\n2. two")
    assert page.elements["list"] == (
        Element("number 1", "one"),
        Element("bullet 2", "inner"),
        Element("number 1", "two"),
    )


def test_what_cannot_be_parsed_has_no_structure(monkeypatch):
    def broken(text):
        raise RecursionError("too deep")

    truth = read_page(PAGE)
    monkeypatch.setattr(dialect, "parse", broken)
    page = read_page("# Title")
    assert (page.text, page.tables, page.elements["heading"]) == ("# Title", (), ())
    assert count_markdown(page, truth).heading_matches == 0.0


def test_similarity_is_edits_over_the_longer_side():
    # "abcd" to "abxd12": one changed, two put in, of six
    assert figures("abcd", "abxd12")["markdown_similarity"] == pytest.approx(1 - 3 / 6)


# ----------------------------------------------------------------------------------------------------------- alignment


def test_pairs_do_not_cross():
    assert align(np.array([[0.0, 1.0], [1.0, 0.0]])) == 1.0
    assert align(np.array([[1.0, 0.0], [0.0, 1.0]])) == 2.0
    assert align(np.array([[0.9, 1.0], [0.0, 0.8]])) == pytest.approx(1.7)  # better than 1.0 alone


def test_elements_count_as_far_as_their_texts_are_alike():
    true = [Element("1", "abcdefghij"), Element("2", "second")]
    assert element_matches(true, true) == 2.0
    assert element_matches([Element("1", "abcdefghiX")], true) == pytest.approx(0.9)
    assert element_matches([Element("3", "abcdefghij")], true) == pytest.approx(0.5)  # another level
    assert element_matches([Element("1", "abcdeXXXXXX")], true) == 0.0  # 6 edits of 11: no pair
    assert element_matches([], true) == 0.0


def test_heading_f1_of_a_page():
    # one of two found, nothing invented: 2 * 1 / (1 + 2); a heading that is made up lowers it to 2 * 1 / (2 + 2)
    truth = "# One\n\ntext\n\n## Another"
    assert figures("# One", truth)["heading_f1"] == pytest.approx(2 / 3)
    assert figures("# One\n\n# Zzzzzzzzzz", truth)["heading_f1"] == pytest.approx(2 / 4)


# --------------------------------------------------------------------------------------------------------------- TEDS


def test_teds_of_tables_worked_out_by_hand():
    table = (("a", "b"), ("c", "d"))  # table, head, body, two rows, four cells: nine nodes
    assert teds(table, table) == 1.0
    assert teds((("a", "b"), ("c", "xy")), table) == pytest.approx(8 / 9)  # a cell of other content
    assert teds((("a", "b"), ("c", "xy")), table, content=False) == 1.0
    assert teds((("a", "b"), ("c", "dx")), table) == pytest.approx(1 - 0.5 / 9)  # half of a cell's content
    assert teds((("a", "b"),), table) == pytest.approx(1 - 4 / 9)  # a body with a row of two cells is missing
    assert teds((*table, ("e", "f")), table) == pytest.approx(1 - 3 / 12)  # a row with two cells is too much


def test_a_missing_column_costs_its_cells():
    wide = (("a", "b", "c"), ("1", "2", "3"))  # eleven nodes
    assert teds((("a", "c"), ("1", "3")), wide) == pytest.approx(1 - 2 / 11)


def forest_distance(one, other, cost):
    """Tree edit distance straight from its recursive definition; a tree is (kind, text, children)."""

    @functools.cache
    def distance(left, right):
        if not left and not right:
            return 0.0
        if not left:
            return distance((), right[:-1] + right[-1][2]) + 1
        if not right:
            return distance(left[:-1] + left[-1][2], ()) + 1
        a, b = left[-1], right[-1]
        return min(
            distance(left[:-1] + a[2], right) + 1,
            distance(left, right[:-1] + b[2]) + 1,
            distance(left[:-1], right[:-1]) + distance(a[2], b[2]) + cost(a, b),
        )

    return distance((one,), (other,))


def tree(table):
    def rows(part):
        return tuple(("row", "", tuple(("cell", cell, ()) for cell in row)) for row in part)

    sections = [("head", "", rows(table[:1]))] + ([("body", "", rows(table[1:]))] if table[1:] else [])
    return ("table", "", tuple(sections))


def test_teds_is_the_recursive_definition_on_random_tables():
    generator = np.random.default_rng(5)

    def cost(a, b):
        if a[0] != b[0]:
            return 1.0
        return float(a[1] != b[1])  # cells hold one letter

    for _ in range(25):
        tables = []
        for _ in range(2):
            rows, columns = generator.integers(1, 4), generator.integers(1, 4)
            tables.append(tuple(tuple("xyz"[generator.integers(3)] for _ in range(columns)) for _ in range(rows)))
        one, other = tables
        nodes = max(1 + (2 if len(t) > 1 else 1) + len(t) * (1 + len(t[0])) for t in tables)
        expected = 1 - forest_distance(tree(one), tree(other), cost) / nodes
        assert teds(one, other) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ figures


def test_a_page_without_tables_on_either_side_is_left_out_of_table_figures():
    table = "| a |\n| --- |\n| b |"
    pairs = [("text", "text"), (table, table), ("text", table), (table, "text")]
    counts = [count_markdown(read_page(one), read_page(other)) for one, other in pairs]
    found = {figure.name: figure for figure in summarise_markdown(counts, failed=[False, False, True, False])}
    assert found["teds"].items == 3  # a table that was missed and one that was invented count in full
    assert found["teds"].value == pytest.approx(1 / 3)
    assert (found["teds"].failed, found["markdown_similarity"].items) == (1, 4)
    assert "heading_f1" not in found  # no heading anywhere


def test_two_tables_are_aligned_in_order_and_a_missed_one_counts():
    one, two = "| a | b |\n| --- | --- |\n| c | d |", "| q |\n| --- |\n| r |\n| s |"
    assert figures(two, f"{one}\n\nand\n\n{two}")["teds"] == pytest.approx(1 / 2)


def test_markdown_figures_have_their_intervals_over_documents():
    right, wrong = [count_markdown(read_page(text), read_page("# abcd")) for text in ("# abcd", "")]
    counts = ([right] * 5 + [wrong] * 5) * 4
    alone = next(iter(summarise_markdown(counts)))
    together = next(iter(summarise_markdown(counts, groups=[n // 5 for n in range(40)])))
    assert alone.value == together.value == pytest.approx(0.5)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
