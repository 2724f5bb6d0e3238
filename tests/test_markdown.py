"""Markdown from hand-made layouts: lines with places, and what a person would write for them."""

from __future__ import annotations

import numpy as np
import pytest

from modeling_unit.markdown_unit import escape_markdown, write_markdown
from modeling_unit.rows_unit import ReadLine
from training.data import markdown as dialect

U = 8.0  # px, x-height of the running text
PITCH = 3.0 * U
NARROW = "iljt.,:;'!|"


def line(text, x=40.0, y=100.0, size=1.0, bold=False, advance=0.0):
    """A line set at `x` with its baseline at `y`: each letter as wide as it is among 11 widths, or `advance` px.

    Each letter is one piece of ink, 1.4 u tall if it is a capital or has an ascender, with three (bold: five) tenths
    of its box inked.
    """
    u = size * U
    ink, at = [], x
    for character in text:
        step = advance or u * (0.6 if character in NARROW else 0.8 + ord(character) * 7 % 11 / 12)
        wide = 0.7 * advance if advance else step - 0.2 * u
        if character == " ":
            at += advance or 0.6 * u
            continue
        left = at + (step - wide) / 2
        tall = 1.4 * u if character.isupper() or character in "bdfhklt0123456789" else u
        ink.append((left, y - tall, left + wide, y, (0.5 if bold else 0.3) * wide * tall))
        at += step
    ink = np.array(ink)
    box = (ink[0, 0], y - 1.4 * u, ink[:, 2].max(), y)
    return ReadLine(box, text, u, y, ink)


def below(*texts, y=100.0, pitch=PITCH, **settings):
    return [line(text, y=y + number * pitch, **settings) for number, text in enumerate(texts)]


PROSE = (
    "the lines of a paragraph are set one below the other, and as long as there is room for a word it stands on the "
    "line that is above, so that the last alone is shorter than the column"
)


def prose(y=100.0, x=40.0, width=400.0, indent=0.0, text=PROSE):
    """A paragraph as a typesetter sets it: each line holds as many words as go into the column's width."""
    lines, words = [], text.split()
    while words:
        left = x + (0.0 if lines else indent)
        many = max(n for n in range(1, len(words) + 1) if line(" ".join(words[:n]), left).box[2] <= x + width)
        lines.append(line(" ".join(words[:many]), left, y + len(lines) * PITCH))
        words = words[many:]
    return lines


def test_a_blank_page_is_empty():
    assert write_markdown([]) == ""
    assert write_markdown([ReadLine((1, 1, 9, 9), "  ", 5.0, 9.0)]) == ""


def test_a_line_alone_is_a_paragraph_with_or_without_ink():
    assert write_markdown([line("one line of text and nothing else")]) == "one line of text and nothing else"
    assert write_markdown([ReadLine((10, 10, 200, 22), "one line of text", 8.0, 22.0)]) == "one line of text"


def test_lines_of_a_paragraph_are_joined_and_divided_words_put_together():
    lines = below("the lines of a paragraph are set one be-", "low the other, page after page, in Graz-", "Umgebung")
    assert write_markdown(lines) == (
        "the lines of a paragraph are set one below the other, page after page, in Graz-Umgebung"
    )


@pytest.mark.parametrize(
    ("space", "indent"), [(1.8, 0.0), (1.0, 2.5 * U), (1.0, 0.0)], ids=["space", "indentation", "a short line above"]
)
def test_paragraphs_are_parted_by(space, indent):
    first = prose()
    second = prose(first[-1].baseline + space * PITCH, indent=indent)
    assert len(first) >= 3
    assert write_markdown(first + second) == f"{PROSE}\n\n{PROSE}"


def test_order_is_taken_from_the_page_not_from_the_list():
    assert write_markdown(prose()[::-1]) == PROSE


@pytest.mark.parametrize(("size", "mark"), [(1.9, "#"), (1.5, "##"), (1.25, "###")])
def test_headings_are_larger_and_the_larger_the_higher(size, mark):
    lines = [line("Reading of pages", y=100, size=size, bold=True), *prose(160)]
    assert write_markdown(lines) == f"{mark} Reading of pages\n\n{PROSE}"


def test_a_bold_line_alone_is_a_heading_one_that_ends_in_a_colon_is_not():
    def page(title):
        return [*prose(), line(title, y=100 + 7 * PITCH, bold=True), *prose(100 + 9 * PITCH)]

    assert write_markdown(page("Reading of pages")) == f"{PROSE}\n\n#### Reading of pages\n\n{PROSE}"
    assert "#" not in write_markdown(page("An example of it:"))


def test_lists_nest_by_the_place_of_their_marks():
    lines = [
        line("• one is the first of them", x=40, y=100),
        line("• two", x=40, y=124),
        line("• deeper in", x=40 + 3 * U, y=148),
        line("3. counted", x=40, y=172),
        line("4) and on", x=40, y=196),
    ]
    assert write_markdown(lines) == "- one is the first of them\n- two\n  - deeper in\n3. counted\n4. and on"


def test_an_item_goes_on_below_its_text():
    lines = [
        line("• an item whose text is so long that it is set on more", x=40, y=100),
        line("than one line, which hangs", x=40 + 1.6 * U, y=100 + PITCH),
        line("• another", x=40, y=100 + 2 * PITCH),
        *prose(100 + 3.8 * PITCH),
    ]
    assert write_markdown(lines) == (
        "- an item whose text is so long that it is set on more than one line, which hangs\n- another\n\n" + PROSE
    )


def test_code_keeps_its_lines_indentation_spaces_and_empty_lines():
    code = [
        ("def add(first, second):", 0, 0),
        ("total = first + second", 4, 1),
        ("return total", 4, 3),
        (")", 0, 4),
    ]
    advance = 0.6 * 2.1 * U
    lines = prose()
    lines += [line(text, x=40 + indent * advance, y=300 + row * PITCH, advance=advance) for text, indent, row in code]
    lines += prose(600)
    expected = "```\ndef add(first, second):\n    total = first + second\n\n    return total\n)\n```"
    assert write_markdown(lines) == f"{PROSE}\n\n{expected}\n\n{PROSE}"


def test_words_on_a_grid_are_code_in_a_line():
    words = [
        ("the option", 0),
        ("processor_config", 1),
        ("is read first, then", 0),
        ("image_processor", 1),
        ("too", 0),
    ]
    advance, x, ink = 0.6 * 2.1 * U, 40.0, []
    for text, coded in words:
        part = line(text, x=x, advance=advance * coded)
        ink.append(part.ink)
        x = part.box[2] + 0.6 * U
    ink = np.concatenate(ink)
    text = " ".join(word for word, _ in words)
    read = ReadLine((40.0, 80.0, x, 100.0), text, U, 100.0, ink)
    assert write_markdown([read, *prose(150)]) == (
        f"the option `processor_config` is read first, then `image_processor` too\n\n{PROSE}"
    )


def table(rows, y=100.0, columns=(40.0, 200.0, 420.0)):
    return [
        line(cell, x=x, y=y + number * PITCH)
        for number, row in enumerate(rows)
        for x, cell in zip(columns, row, strict=True)
        if cell
    ]


def test_only_a_table():
    rows = [("name", "meaning", "px"), ("u", "height of an x", "8"), ("a | b", "either", "9")]
    assert write_markdown(table(rows)) == (
        "| name | meaning | px |\n| --- | --- | --- |\n| u | height of an x | 8 |\n| a \\| b | either | 9 |"
    )


def test_a_row_without_a_first_cell_goes_on_the_one_above():
    rows = [("name", "meaning", "px"), ("u", "height of", "8"), ("", "an x", ""), ("v", "width", "")]
    assert write_markdown(table(rows)) == (
        "| name | meaning | px |\n| --- | --- | --- |\n| u | height of an x | 8 |\n| v | width |  |"
    )


def test_a_table_between_paragraphs_takes_none_of_their_lines():
    rows = [("name", "meaning", "px"), ("u", "height of an x", "8")]
    lines = [*prose(), *table(rows, y=260), *prose(360)]
    assert write_markdown(lines) == (
        f"{PROSE}\n\n| name | meaning | px |\n| --- | --- | --- |\n| u | height of an x | 8 |\n\n{PROSE}"
    )


def test_columns_are_read_one_after_the_other_also_where_lists_stand_in_them():
    left = [f"• item {name}" for name in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
    lines = below(*left, pitch=1.13 * PITCH) + prose(107.0, x=260.0, width=160.0)
    expected = "\n".join(text.replace("•", "-") for text in left)
    assert write_markdown(lines) == f"{expected}\n\n{PROSE}"


def test_a_paragraph_goes_on_in_the_next_column():
    lines = prose(width=200.0, text=f"{PROSE} {PROSE}")
    for number, each in enumerate(lines[len(lines) // 2 :]):
        x0, y0, x1, y1 = each.box
        each.ink = each.ink + np.array([260.0, 100 - each.baseline, 260.0, 100 - each.baseline, 0.0])
        each.ink[:, [1, 3]] += number * PITCH
        each.box = (x0 + 260, y0, x1 + 260, y1)
        each.baseline = 100 + number * PITCH
    assert write_markdown(lines) == f"{PROSE} {PROSE}"


def test_page_numbers_and_running_heads_are_left_out():
    lines = [line("12", y=40), line("A book of pages", x=300, y=40), *prose(), line("- 12 -", x=250, y=400)]
    assert write_markdown(lines) == PROSE
    assert write_markdown([*prose(), line("in 1999", y=400)]) == f"{PROSE}\n\nin 1999"


@pytest.mark.parametrize(
    "text",
    [
        "a*b*c and _d_ and <b> and [f](g) &amp; ~~h~~ \\ $i$",
        "# no heading",
        "> no quotation",
        "+ no item",
        "1999. no item",
        "--- no rule",
    ],
)
def test_what_would_be_markup_is_escaped(text):
    (block,) = dialect.parse(write_markdown([line(text)]))
    assert isinstance(block, dialect.Paragraph)
    assert dialect.plain(block.runs) == text


def test_escapes_are_those_of_the_targets():
    text = "a*b, snake_case, _private and x < 3 <b> &lt; [a](b) ~~c~~ \\d $e"
    assert escape_markdown(text) == dialect.escape(text)


def test_any_lines_at_all_are_written_whole():
    generator = np.random.default_rng(0)
    words = [
        "a",
        "and",
        "-",
        "•",
        "word_x",
        "\\cmd",
        "{}",
        "|",
        "*",
        "code()",
        "`o`",
        "```",
        "#",
        ">",
        "...",
        "é",
        "漢",
    ]
    for _ in range(12):
        lines = []
        for _ in range(generator.integers(1, 24)):
            (x, y), (width, height) = generator.integers(0, 500, 2).tolist(), generator.integers(1, 200, 2).tolist()
            left, pieces = x + generator.integers(0, width, 6), np.ones(6)
            ink = np.stack(
                [left, y * pieces, left + generator.integers(1, 9, 6), (y + height) * pieces, 5 * pieces], 1
            )
            text = " ".join(generator.choice(words, generator.integers(0, 9)))
            ink = ink[: generator.integers(0, 7)]
            lines.append(
                ReadLine((x, y, x + width, y + height), text, float(generator.uniform(2, 20)), y + height, ink)
            )
        written = write_markdown(lines)
        read = sorted(c for each in lines for c in each.text if c.isalpha())
        assert sorted(c for c in written if c.isalpha()) == read
        dialect.parse(written)
