"""The order in which a page is read: pages composed by hand, expectations from how they were composed."""

import numpy as np
import pypdfium2 as pdfium
import pytest

from tests.pdf_files import Page, prose, write_pdf
from training.data import pdf, pdf_pages
from training.data.text import join_lines


def open_pages(pages):
    return pdfium.PdfDocument(write_pdf(pages))


def read(*pages, number=0, **options):
    document = open_pages(list(pages))

    def neighbours(distance):
        other = number + distance
        return pdf_pages.page_edges(document[other]) if 0 <= other < len(document) else None

    return pdf_pages.read_page(document[number], neighbours=neighbours, **options)


def lines_of(text, *roles):
    return [line.text for block in text.blocks if not roles or block.role in roles for line in block.lines]


# ------------------------------------------------------------------------------------------------- where things are


@pytest.mark.parametrize("inherit", [False, True])
@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize(
    ("origin", "crop"),
    [((0, 0), None), ((0, 0), (30, 50, 480, 660)), ((-20, 100), None), ((100, 7), (110, 20, 590, 690))],
)
def test_boxes_lie_on_the_ink_of_turned_cropped_and_inherited_pages(inherit, rotate, origin, crop):
    page = Page((500, 700), media_origin=origin, crop=crop, rotate=rotate, inherit=inherit)
    lines = prose(6)
    document = open_pages([page.lines(lines, 60, 80)])
    glyphs = pdf.read_glyphs(document[0])
    box = crop or (0, 0, 500, 700)
    size = (box[2] - box[0], box[3] - box[1])
    assert (glyphs.width, glyphs.height) == (size if rotate in (0, 180) else size[::-1])
    found = pdf.find_lines(glyphs)
    assert [line.text for line in found] == lines
    assert [line.baseline for line in found] == pytest.approx([80 + 12 * n for n in range(6)], abs=0.01)
    assert found[0].box[0] == pytest.approx(60, abs=1)
    rendered = pdf.RenderedPage(document[0], glyphs, 2.0)
    boxes = np.concatenate([line.boxes for line in found]) * 2
    boxes = boxes[boxes[:, 2] > 0]
    boxes[:, :2], boxes[:, 2:] = np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])
    assert pdf.ink_fault(rendered.pixels, boxes.astype(int)) == ""  # ink in every box, none elsewhere


def test_what_is_cropped_away_is_not_read():
    page = Page((500, 700), crop=(0, 0, 500, 600)).lines(prose(6), 60, 80)
    page.crop = None
    page.text("above the crop", 60, 40)  # 660 points up, above the box that is shown
    page.crop = (0, 0, 500, 600)
    assert "above the crop" not in lines_of(read(page))
    assert len(lines_of(read(page))) == 6


# ------------------------------------------------------------------------------------------------------------ order


def columns(count, lines=20, width=24, along_rows=False):
    """A page of columns, given one after the other or along the rows, and its lines in reading order."""
    texts = [prose(lines, seed=10 + n, characters=width) for n in range(count)]
    lefts = [50 + n * 500 / count for n in range(count)]
    page = Page()
    if along_rows:
        for row in range(lines):
            for column in range(count):
                page.text(texts[column][row], lefts[column], 120 + 12 * row)
    else:
        for column in range(count):
            page.lines(texts[column], lefts[column], 120)
    return page, [line for text in texts for line in text]


@pytest.mark.parametrize(("count", "width"), [(2, 40), (3, 26)])
@pytest.mark.parametrize("along_rows", [False, True])
def test_columns_are_read_one_after_the_other(count, width, along_rows):
    page, expected = columns(count, width=width, along_rows=along_rows)
    assert lines_of(read(page)) == expected


def test_a_heading_over_both_columns_comes_first_and_a_line_between_parts_them():
    left, right = prose(16, 1, 40), prose(16, 2, 40)
    page = Page()
    page.lines(left[:8], 50, 140).lines(left[8:], 50, 300).lines(right[:8], 310, 140).lines(right[8:], 310, 300)
    page.text("A heading that stands over both of the columns of this page", 110, 110, size=14)
    page.text("Figure 1: a caption of what stands over both columns of the page, in the middle of them", 80, 262)
    expected = [
        "A heading that stands over both of the columns of this page",
        *left[:8],
        *right[:8],
        "Figure 1: a caption of what stands over both columns of the page, in the middle of them",
        *left[8:],
        *right[8:],
    ]
    assert lines_of(read(page)) == expected


def test_columns_of_unequal_length_with_a_short_line_in_the_middle():
    left, right = prose(18, 3, 40), prose(7, 4, 40)
    left[9] = "an end."
    assert lines_of(read(Page().lines(left, 50, 140).lines(right, 310, 140))) == left + right


def test_a_table_is_read_along_its_rows():
    rows = [
        ("apples", "12", "3.50"),
        ("pears", "7", "2.10"),
        ("plums and cherries", "30", "9.95"),
        ("figs", "1", "0.40"),
    ]
    above, below = prose(5, 5, 80), prose(5, 6, 80)
    page = Page().lines(above, 60, 100)
    for number, row in enumerate(rows):
        for cell, x in zip(row, (60, 260, 420), strict=True):
            page.text(cell, x, 190 + 14 * number)
    page.lines(below, 60, 270)
    text = read(page)
    assert lines_of(text) == above + [" ".join(row) for row in rows] + below
    blocks = [[line.text for line in block.lines] for block in text.blocks]
    assert all([" ".join(row)] in blocks for row in rows)  # each row a block: joined paragraphs keep them apart


def test_a_caption_under_a_picture_stays_with_its_column():
    left, right = prose(20, 7, 40), prose(20, 8, 40)
    page = Page().lines(left[:6], 50, 140)
    page.operators.append("0.5 g 60 500 180 100 re f 0 g")  # the picture
    page.text("Figure 2. A grey picture of nothing", 60, 360).lines(left[6:], 50, 400).lines(right, 310, 140)
    assert lines_of(read(page)) == left[:6] + ["Figure 2. A grey picture of nothing"] + left[6:] + right


def test_footnotes_come_after_the_text_of_all_columns():
    left, right = prose(30, 11, 40), prose(34, 12, 40)
    page = Page().lines(left, 50, 100)
    page.text("1", 50, 697, size=5).text("See the letter of the garden in winter,", 52.8, 700, size=7.5)
    page.text("and the other one in the summer.", 50, 709, size=7.5)
    page.text("2", 50, 715, size=5).text("This is not the end of it.", 52.8, 718, size=7.5)
    page.lines(right, 310, 100)
    text = read(page)
    assert lines_of(text, "text") == left + right
    notes = [
        "1See the letter of the garden in winter,",
        "and the other one in the summer.",
        "2This is not the end of it.",
    ]
    assert lines_of(text, "footnote") == notes
    assert lines_of(text) == left + right + notes
    assert [len(block.lines) for block in text.blocks if block.role == "footnote"] == [2, 1]


def test_small_type_at_the_end_without_a_mark_is_text():
    page = Page().lines(prose(30, 13, 80), 60, 100).lines(prose(3, 14, 80), 60, 700, pitch=9, size=7.5)
    assert not lines_of(read(page), "footnote")


def running_page(number, chapter, header=True):
    page = Page().lines(prose(40, 20 + number, 80), 60, 110)
    if header:
        page.text(f"Chapter {chapter}", 60, 60).text(str(number), 520, 60)
    page.text("The Journal of Silver Bridges", 200, 800, size=9)
    return page


def test_running_headers_and_footers_are_told_by_the_pages_beside():
    pages = [running_page(number, chapter=2) for number in (8, 9, 10)]
    for number in range(3):
        text = read(*pages, number=number)
        assert lines_of(text, "header") == [f"Chapter 2 {8 + number}"]
        assert lines_of(text, "footer") == ["The Journal of Silver Bridges"]
        assert lines_of(text)[0] == f"Chapter 2 {8 + number}"
        assert lines_of(text)[-1] == "The Journal of Silver Bridges"
        assert lines_of(text, "text") == prose(40, 28 + number, 80)


def test_a_header_whose_words_change_is_told_by_its_page_number():
    pages = [running_page(8, "two"), running_page(9, "three")]
    assert lines_of(read(*pages), "header") == ["Chapter two 8"]
    # The same number on both pages counts nothing.
    pages = [
        running_page(8, "two"),
        Page().lines(prose(40, 99, 80), 60, 110).text("Chapter three", 60, 60).text("8", 520, 60),
    ]
    assert lines_of(read(*pages), "header") == []


@pytest.mark.parametrize("shown", ["17", "- 17 -", "Page 3 of 12", "xiv"])
def test_a_page_number_alone_is_a_footer_without_neighbours(shown):
    assert lines_of(read(Page().lines(prose(30, 30, 80), 60, 100).text(shown, 290, 800)), "footer") == [shown]


def test_a_heading_or_a_last_line_is_no_header_or_footer():
    one = Page().text("Introduction", 60, 80, size=14).lines(prose(50, 31, 80), 60, 110)
    two = Page().lines(prose(54, 32, 80), 60, 80)
    for number in (0, 1):
        assert not lines_of(read(one, two, number=number), "header", "footer")


# ------------------------------------------------------------------------------------------------------ blocks, text


def test_paragraphs_are_told_by_space_indentation_and_short_ends():
    one, two, three, four = (prose(4, seed, 80) for seed in range(40, 44))
    two[-1] = "the end of it."
    page = Page().lines(one, 60, 100).lines(two, 60, 160)  # 12 more than the pitch
    page.lines(three, 60, 208)
    page.text(four[0], 75, 256).lines(four[1:], 60, 268)
    text = read(page)
    assert [[line.text for line in block.lines] for block in text.blocks] == [one, two, three, four]


def test_joined_text_undoes_line_breaks_and_keeps_a_box_for_each_character():
    lines = [
        "It was the winter of the kitchen and recog-",
        "nised by the window, as it is done in TeX-",
        "Live or the river of it",
    ]
    assert join_lines("\n".join(lines)) == (
        "It was the winter of the kitchen and recognised by the window, as it is done in TeX-Live or the river of it"
    )
    document = open_pages([Page().lines(lines, 60, 100)])
    text = pdf_pages.read_page(document[0], english=False)
    rendered = pdf_pages.render_page(document[0], text, 8.0)
    printed = pdf_pages.page_cutout(rendered, text)
    assert printed.text == "\n".join(lines)
    joined = pdf_pages.page_cutout(rendered, text, joined=True)
    assert joined.text == join_lines("\n".join(lines))
    assert len(joined.boxes) == len(joined.text)
    at = joined.text.index("recognised")
    assert joined.boxes[at][1] < joined.boxes[at + 5][1]  # "recog" a line above "nised"
    words = pdf_pages.words_with_boxes(joined.text, joined.boxes)
    assert [word["text"] for word in words][8:11] == ["recog", "nised", "by"]
    assert words[8]["box"][3] < words[9]["box"][3]


def test_headers_stay_in_the_text_unless_they_are_not_wanted():
    document = open_pages([Page().lines(prose(30, 50, 80), 60, 100).text("17", 290, 800)])
    text = pdf_pages.read_page(document[0])
    rendered = pdf_pages.render_page(document[0], text, 6.0)
    assert pdf_pages.page_cutout(rendered, text).text == "\n".join([*prose(30, 50, 80), "17"])
    assert pdf_pages.page_cutout(rendered, text, furniture=False).text == "\n".join(prose(30, 50, 80))


def test_the_picture_of_a_page_has_the_x_height_asked_for():
    document = open_pages([Page().lines(prose(30, 51, 80), 60, 100)])
    text = pdf_pages.read_page(document[0])
    cutout = pdf_pages.page_cutout(pdf_pages.render_page(document[0], text, 9.0), text)
    assert cutout.x_height == pytest.approx(9.0, rel=0.01)
    x = cutout.boxes[[i for i, c in enumerate(cutout.text) if c in "xvwz"]]
    assert np.median(x[:, 3] - x[:, 1]) == pytest.approx(9.5, abs=1.5)  # boxes are rounded outwards


def test_blocks_are_cut_out_whole_and_in_order():
    one, two = prose(4, 52, 80), prose(3, 53, 80)
    document = open_pages([Page().lines(one, 60, 100).lines(two, 60, 180).text("no", 60, 300)])
    text = pdf_pages.read_page(document[0])
    reasons = []
    rendered = pdf_pages.render_page(document[0], text, 8.0)
    blocks = list(pdf_pages.block_cutouts(rendered, text, np.random.default_rng(0), reasons.append))
    assert [block.text for block in blocks] == ["\n".join(one), "\n".join(two)]
    assert reasons == ["short"]
    for block in blocks:
        visible = np.array([not character.isspace() for character in block.text])
        assert pdf.ink_fault(block.pixels, block.boxes[visible]) == ""


def test_an_accent_printed_over_its_letter_becomes_one_character():
    # Old TeX fonts: the accent is a character of its own, moved back over the letter.
    page = Page().lines(prose(10, 54, 80), 60, 100)
    # "Schr" is 20.56 points wide, the accent 3.33, the o 5.56.
    page.operators.append("BT /F1 10 Tf 60 600 Td [(Schr) -111 (\\250) 444 (odinger)] TJ ET")
    assert lines_of(read(page))[-1] == "Schr\u00f6dinger"


# -------------------------------------------------------------------------------------------------------- refusals


def refusal(page, **options):
    with pytest.raises(pdf_pages.PageRefused) as error:
        read(page, **options)
    return str(error.value)


def test_pages_that_cannot_be_used_are_refused_with_a_reason():
    full = prose(20, 60, 80)
    assert refusal(Page().text("Nearly empty", 60, 100)) == "little text"
    assert refusal(Page((20, 700)).lines(full, 0, 100)) == "size"
    assert refusal(Page((15000, 700)).lines(full, 60, 100)) == "size"
    german = ["Das ist nicht die Art mit der eine Seite auf den Tisch gelegt wird und nicht von der Hand"] * 4
    assert refusal(Page().lines(german, 60, 100)) == "not English"
    assert lines_of(read(Page().lines(german, 60, 100), english=False)) == german
    sideways = Page(rotate=90).lines(full, 60, 100)
    sideways.rotate = 0
    assert refusal(sideways) == "turned text"


def test_text_that_is_not_printed_is_refused():
    page = Page().lines(prose(20, 61, 80), 60, 100)
    for number, line in enumerate(prose(4, 62, 80)):
        page.text(line, 60, 500 + 12 * number, mode=3)  # invisible
    document = open_pages([page])
    text = pdf_pages.read_page(document[0])
    with pytest.raises(pdf_pages.PageRefused, match="text not on ink"):
        pdf_pages.page_cutout(pdf_pages.render_page(document[0], text, 6.0), text)


def test_a_page_too_large_for_the_x_height_is_refused():
    document = open_pages([Page((5000, 5000)).lines(prose(20, 63, 80), 60, 100)])
    text = pdf_pages.read_page(document[0])
    with pytest.raises(pdf_pages.PageRefused, match="too large"):
        pdf_pages.render_page(document[0], text, 9.0)


@pytest.mark.parametrize(
    ("code", "nameless"),
    [(0xE000, True), (0xFFFD, True), (0x01, True), (0xF0001, True), (0x02, False), (0x41, False), (0x1D458, False)],
)
def test_which_code_points_name_no_character(code, nameless):
    assert pdf.has_no_unicode(code) is nameless
