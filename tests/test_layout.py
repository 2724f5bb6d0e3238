"""Pages drawn here, line by line, so that what ought to be found is known by construction."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from modeling_unit.layout_unit import LayoutSettings, analyse_page, find_blocks

SENTENCE = (
    "the quick brown fox jumps over a lazy dog while seven wizards boil early garlic jam for every pious king who may "
    "ask how vexing quartz dazzles his brave old judge by moonlight"
)
WORDS = SENTENCE.split()


def font(size):
    return ImageFont.load_default(size)


def x_height(size):
    _, top, _, bottom = font(size).getbbox("x")
    return bottom - top


def sentence(start, count):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


class Sheet:
    """A page to draw on; remembers the ink box of every line drawn."""

    def __init__(self, width=900, height=1000, paper=255, ink=0):
        self.image = Image.new("L", (width, height), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.ink, self.boxes = ink, []

    def line(self, x, y, text, size=20, ink=None):
        self.draw.text((x, y), text, font=font(size), fill=self.ink if ink is None else ink)
        self.boxes.append(self.draw.textbbox((x, y), text, font=font(size)))

    def paragraph(self, x, y, lines, words=9, size=20, leading=1.35):
        for i in range(lines):
            self.line(x, y + round(i * size * leading), sentence(5 * i, words), size)
        return y + round(lines * size * leading)


def assert_same_boxes(found, drawn, tolerance=3):
    assert len(found) == len(drawn)
    for one, other in zip(found, drawn, strict=True):
        assert np.abs(np.subtract(one, other)).max() <= tolerance, (one, other)


@pytest.fixture(scope="module")
def letter():
    """A heading and three paragraphs of four, three and five lines."""
    sheet = Sheet()
    sheet.line(100, 60, "On foxes and dogs", 34)
    y = sheet.paragraph(100, 140, 4)
    y = sheet.paragraph(100, y + 30, 3)
    sheet.paragraph(100, y + 30, 5)
    return sheet


@pytest.fixture(scope="module")
def journal():
    """A title across the page, two columns of 12 lines, a line across the foot."""
    sheet = Sheet(1000, 800)
    sheet.line(80, 40, sentence(0, 11), 34)
    sheet.paragraph(80, 120, 12, words=7)
    sheet.paragraph(540, 127, 12, words=7)  # off by a third of a line: columns need not share lines
    sheet.line(80, 560, sentence(3, 17), 20)
    return sheet


# ------------------------------------------------------------------------------------------------------- nothing there


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (640, 480)])
@pytest.mark.parametrize("tone", [0, 128, 255])
def test_an_even_page_of_any_tone_has_no_blocks(size, tone):
    assert find_blocks(Image.new("L", size, tone)) == []


def test_the_grain_of_a_scan_is_not_text():
    grain = np.random.default_rng(0).normal(240, 5, (600, 400)).clip(0, 255).astype(np.uint8)
    assert find_blocks(Image.fromarray(grain)) == []


def test_rules_frames_and_photographs_are_dropped():
    sheet = Sheet()
    sheet.draw.line((50, 100, 850, 100), fill=0, width=3)
    sheet.draw.rectangle((50, 150, 850, 400), outline=0, width=2)
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 200, (12, 16), dtype=np.uint8))
    sheet.image.paste(smooth.resize((480, 360), Image.Resampling.BICUBIC), (200, 500))
    assert find_blocks(sheet.image) == []


def test_only_a_pil_image_is_taken():
    with pytest.raises(ValueError, match="PIL image, got ndarray"):
        analyse_page(np.zeros((10, 10)))


# --------------------------------------------------------------------------------------------------------------- lines


def test_a_single_line_in_a_tight_picture_is_one_line():
    sheet = Sheet(420, 30)
    sheet.line(4, 2, sentence(0, 8), 18)
    (block,) = find_blocks(sheet.image)
    assert_same_boxes([line.box for line in block.lines], sheet.boxes, 2)


def test_lines_of_paragraphs_are_found_where_they_were_drawn(letter):
    layout = analyse_page(letter.image)
    assert_same_boxes([line.box for line in layout.lines], letter.boxes)


def test_paragraphs_are_blocks_from_top_to_bottom(letter):
    assert [len(block.lines) for block in find_blocks(letter.image)] == [1, 4, 3, 5]


@pytest.mark.parametrize("size", [11, 14, 20, 32])
def test_the_x_height_is_that_of_the_font(size):
    sheet = Sheet(60 * size, 8 * size)
    sheet.paragraph(size, size, 3, words=8, size=size)
    for line in analyse_page(sheet.image).lines:
        assert line.x_height == pytest.approx(x_height(size), abs=max(1.0, 0.1 * x_height(size)))


def test_a_line_of_capitals_takes_the_x_height_of_its_neighbours():
    sheet = Sheet(700, 200)
    sheet.line(20, 20, sentence(0, 9), 22)
    sheet.line(20, 60, "WE ALL KNOW THAT THIS IS SHOUTING", 22)
    sheet.line(20, 100, sentence(9, 9), 22)
    first, capitals, last = analyse_page(sheet.image).lines
    assert capitals.x_height == pytest.approx((first.x_height + last.x_height) / 2, rel=0.06)


def test_a_line_of_leader_dots_takes_the_x_height_of_its_neighbours():
    sheet = Sheet(900, 400)
    sheet.paragraph(20, 20, 4, words=11)
    for row, title in enumerate(("Foxes", "Dolls", "Oxen")):
        sheet.line(20, 150 + 30 * row, f"{title} {'. ' * 60} {219 + row}")
    lines = analyse_page(sheet.image, STRIPS).lines
    assert_same_boxes([line.box for line in lines], sheet.boxes, 4)
    for line, box in zip(lines[4:], sheet.boxes[4:], strict=True):
        assert line.x_height == pytest.approx(x_height(20), abs=1.0)
        assert line.baseline == pytest.approx(box[3], abs=1.5)  # figures and dots stand on it


def test_small_print_keeps_its_own_x_height():
    sheet = Sheet(900, 400)
    sheet.paragraph(20, 20, 4, words=8, size=30)
    sheet.line(20, 250, sentence(0, 12), 11)
    *large, small = analyse_page(sheet.image).lines
    assert small.x_height < 0.5 * large[0].x_height
    assert small.x_height == pytest.approx(x_height(11), abs=1.0)


def test_a_first_line_set_in_begins_a_block():
    sheet = Sheet(760, 400)
    sheet.paragraph(60, 30, 3, words=12)
    sheet.line(90, 111, sentence(2, 11))
    sheet.paragraph(60, 138, 3, words=12)
    assert [len(block.lines) for block in find_blocks(sheet.image)] == [3, 4]


def test_a_table_is_read_row_by_row():
    sheet = Sheet(900, 300)
    for row in range(4):
        for column, text in enumerate(("apples", "12", "red")):
            sheet.line(60 + 260 * column, 40 + 30 * row, f"{text} {row}", 20)
    lines = analyse_page(sheet.image).lines
    assert_same_boxes([line.box for line in lines], sheet.boxes)
    assert [line.row for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


# ------------------------------------------------------------------------------------------------------------- columns


def test_columns_are_read_one_after_the_other(journal):
    layout = analyse_page(journal.image)
    assert_same_boxes([line.box for line in layout.lines], journal.boxes)


def test_rivers_of_white_in_a_paragraph_are_not_gutters():
    sheet = Sheet(1000, 300)
    for row in range(4):
        sheet.line(60, 40 + 27 * row, "the quick brown fox jumps over")
        sheet.line(sheet.boxes[-1][2] + 18, 40 + 27 * row, "a lazy dog while wizards ponder")  # three word spaces
    lines = analyse_page(sheet.image).lines
    assert len(lines) == 4


# ------------------------------------------------------------------------------------------------------- hard pictures


def test_white_on_black_is_read_as_black_on_white(letter):
    inverted = letter.image.point([255 - v for v in range(256)])
    assert_same_boxes([line.box for line in analyse_page(inverted).lines], letter.boxes)


def test_uneven_light_and_faint_ink_change_nothing(letter):
    shade = np.linspace(1.0, 0.55, letter.image.width)[None, :]
    faint = 110 + np.asarray(letter.image) * (145 / 255)
    page = Image.fromarray((faint * shade).astype(np.uint8))
    assert_same_boxes([line.box for line in analyse_page(page).lines], letter.boxes, 4)


@pytest.mark.parametrize("degrees", [-1.0, 0.7, 2.0])
def test_leaning_lines_are_found_and_boxes_lead_back_to_the_picture(letter, degrees):
    turned = letter.image.rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=255)
    layout = analyse_page(turned)
    assert layout.angle == pytest.approx(degrees, abs=0.1)
    assert len(layout.lines) == len(letter.boxes)
    ink = np.asarray(turned) < 128
    for line in layout.lines:
        x0, y0, x1, y1 = layout.to_original(line.box)
        middle = (line.box[0] + line.box[2]) / 2 - turned.width / 2
        rise = abs(np.tan(np.radians(degrees)) * (line.box[2] - line.box[0]))
        assert y1 - y0 == pytest.approx(line.box[3] - line.box[1] + rise, abs=4)
        assert ink[y0:y1, x0:x1].any()
        assert abs((x0 + x1) / 2 - turned.width / 2 - middle) < 20


def test_white_letters_on_a_dark_panel_are_found():
    sheet = Sheet(700, 300)
    sheet.paragraph(40, 20, 3)
    sheet.draw.rectangle((30, 140, 670, 200), fill=30)
    sheet.line(60, 155, sentence(4, 7), 22, ink=255)
    lines = analyse_page(sheet.image).lines
    assert_same_boxes([line.box for line in lines], sheet.boxes)


def test_letters_that_touch_a_frame_are_found():
    sheet = Sheet(700, 200)
    sheet.line(40, 60, sentence(0, 8), 24)
    x0, y0, x1, y1 = sheet.boxes[0]
    sheet.draw.rectangle(
        (x0 + 1, y0 - 60, x1 + 30, y1 - 1), outline=0, width=2
    )  # cuts through feet and the first letter
    (line,) = analyse_page(sheet.image).lines
    assert line.box[0] == pytest.approx(x0, abs=4)
    assert line.box[2] == pytest.approx(x1, abs=4)


def test_lines_whose_tails_touch_are_parted():
    sheet = Sheet(600, 200)
    sheet.line(20, 20, "gypsy jogging by quay, happy puppy", 24)
    sheet.line(20, 39, "hobbled kites flock below the hill", 24)  # a third of a line too near
    lines = analyse_page(sheet.image).lines
    assert [round(line.box[1], -1) for line in lines] == [round(box[1], -1) for box in sheet.boxes]


@pytest.mark.parametrize(("area", "factor"), [(1_000_000, 4), (500_000, 1)])
def test_a_large_page_is_looked_at_reduced_as_far_as_its_letters_allow(letter, area, factor):
    large = letter.image.resize((3600, 4000), Image.Resampling.BICUBIC)
    layout = analyse_page(large, LayoutSettings(analysis_area=area))
    # Letters of 44 pixels: a quarter is more than the 9.5 that the model wants, a sixth is less.
    assert layout.factor == factor
    boxes = [layout.to_original(line.box) for line in layout.lines]
    assert_same_boxes(boxes, [tuple(4 * v for v in box) for box in letter.boxes], 12)


# -------------------------------------------------------------------------------------------------------------- chunks


def test_chunks_hold_every_line_once_and_keep_to_the_budget(letter):
    settings = LayoutSettings(document_area=40_000, max_width=800)
    layout = analyse_page(letter.image, settings)
    chunks = layout.chunks()
    assert [line.box for chunk in chunks for line in chunk.lines] == [line.box for line in layout.lines]
    for chunk in chunks:
        crop = layout.crop(chunk)
        assert len(chunk.lines) <= 3
        assert (crop.width % 16, crop.height % 16) == (0, 0)
        assert crop.width <= 800
        assert crop.width * crop.height <= 40_000


def test_chunks_of_paragraphs_are_of_three_lines():
    sheet = Sheet(700, 400)
    sheet.paragraph(30, 30, 7, words=8)
    assert [len(chunk.lines) for chunk in analyse_page(sheet.image).chunks()] == [3, 3, 1]


def test_chunks_have_the_canonical_x_height():
    sheet = Sheet(1200, 400)
    sheet.paragraph(30, 30, 3, words=8, size=32)
    layout = analyse_page(sheet.image, LayoutSettings(x_height=10.0))
    (chunk,) = layout.chunks()
    (line, *_) = analyse_page(layout.crop(chunk)).lines
    assert line.x_height == pytest.approx(10.0, rel=0.1)


def test_a_line_too_long_is_cut_between_words():
    sheet = Sheet(3000, 80)
    sheet.line(20, 20, sentence(0, 50), 28)
    layout = analyse_page(sheet.image)
    (line,) = layout.lines
    chunks = layout.chunks()
    assert len(chunks) >= 2
    assert [chunk.part for chunk in chunks] == list(range(len(chunks)))
    assert sorted(np.concatenate([chunk.glyphs for chunk in chunks])) == sorted(line.glyphs)
    columns = (np.asarray(sheet.image) < 128).any(axis=0)
    space = font(28).getlength(" ")
    for one, other in pairwise(chunks):
        assert not columns[one.box[2] + 1 : other.box[0] - 1].any()
        assert other.box[0] - one.box[2] >= 0.7 * space  # a gap between words, not between letters


def test_a_line_a_little_too_long_is_shrunk_rather_than_cut():
    sheet = Sheet(1500, 80)
    sheet.line(20, 20, sentence(0, 21), 20)
    width = sheet.boxes[0][2] - sheet.boxes[0][0]
    ratio = LayoutSettings().x_height / x_height(20)
    settings = LayoutSettings(max_width=int(0.95 * width * ratio) // 16 * 16)
    (chunk,) = analyse_page(sheet.image, settings).chunks()
    assert 0.8 * ratio < chunk.scale < ratio


def test_ink_of_other_lines_is_painted_over():
    lines = ["gypsy jogging by a quay, happy puppy", "hopping along, kindly philosophy", "big quaggy kelp by jetty"]
    sheet, alone = Sheet(560, 150), Sheet(560, 150)
    for row, text in enumerate(lines):
        sheet.line(20, 20 + 27 * row, text, 26)
    alone.line(20, 47, lines[1], 26)
    settings = LayoutSettings(max_lines=1, x_height=13.0, margin=0.9)
    layout = analyse_page(sheet.image, settings)
    got = np.asarray(layout.crop(layout.chunks()[1]), np.int16)
    only = analyse_page(alone.image, settings)
    wanted = np.asarray(only.crop(only.chunks()[0]), np.int16)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).mean() < 4


def test_a_drop_of_ink_as_high_as_the_page_does_not_break_the_budget():
    sheet = Sheet(300, 2000)
    for row in range(30):
        sheet.line(40, 20 + 60 * row, "a", 40)
    layout = analyse_page(sheet.image)
    for chunk in layout.chunks():
        crop = layout.crop(chunk)
        assert crop.width * crop.height <= 65536


# -------------------------------------------------------------------------------------------------------------- strips

STRIPS = LayoutSettings(x_height=7.5, min_x_height=6.75, line_height=16, baseline=12.1)


def written(sheet, x, baseline, text, size):
    """Draw text that stands on `baseline`, the y of the first row of pixels below its letters."""
    sheet.draw.text((x, baseline), text, font=font(size), fill=sheet.ink, anchor="ls")


def strips(layout):
    return [np.asarray(layout.crop(chunk), np.float64) for chunk in layout.chunks()]


def foot(strip, width):
    """Where stems end that the last `width` columns of ink hold: y of their lower border, to a fraction of a pixel."""
    ink = 255 - strip
    end = np.flatnonzero(ink.max(axis=0) > 100)[-1] + 1
    rows = ink[:, end - width : end].sum(axis=1)
    return 10 + rows[10:].sum() / rows[8:10].mean()  # rows 8 and 9 are amid an x-height of 7.5 above 12.1


@pytest.mark.parametrize("size", [14, 20, 32, 47])
def test_a_strip_has_its_letters_on_the_same_baseline_whatever_their_size(size):
    sheet = Sheet(40 * size, 9 * size)
    tail = "hnhnhnhn"  # stems alone reach down to the baseline
    for row, words in enumerate(("quickly jogging by", "above the flocks", "of kept oxen, happy")):
        written(sheet, size, round((2 + 2.2 * row) * size), f"{words} {tail}", size)
    layout = analyse_page(sheet.image, STRIPS)
    chunks = layout.chunks()
    assert len(chunks) == 3
    for chunk, strip in zip(chunks, strips(layout), strict=True):
        assert strip.shape[0] == 16
        assert strip.shape[1] % 16 == 0
        width = 0.9 * font(size).getlength(tail) * chunk.scale
        assert foot(strip, int(width)) == pytest.approx(12.1, abs=0.5)
        assert chunk.scale * x_height(size) == pytest.approx(7.5, rel=0.13)


def test_the_baseline_is_where_it_was_set():
    sheet = Sheet(700, 100)
    written(sheet, 20, 50, "quickly jogging by hnhnhnhn", 24)
    feet = []
    for baseline in (11.0, 12.5):
        layout = analyse_page(
            sheet.image, LayoutSettings(x_height=7.5, line_height=16, min_x_height=6, baseline=baseline)
        )
        feet.append(foot(strips(layout)[0], 20))
    assert feet[1] - feet[0] == pytest.approx(1.5, abs=0.2)


def test_every_line_has_a_strip_of_its_own():
    sheet = Sheet(700, 400)
    sheet.paragraph(30, 30, 7, words=8)
    assert [len(chunk.lines) for chunk in analyse_page(sheet.image, STRIPS).chunks()] == [1] * 7


def test_other_lines_are_painted_out_of_a_strip():
    lines = ["gypsy jogging by a quay, happy puppy", "hopping along, kindly philosophy", "big quaggy kelp by jetty"]
    sheet, alone = Sheet(560, 150), Sheet(560, 150)
    for row, text in enumerate(lines):
        written(sheet, 20, 40 + 27 * row, text, 26)
    written(alone, 20, 67, lines[1], 26)
    # 27 of the page's pixels are two x-heights: the strip reaches over the lines above and below
    settings = LayoutSettings(x_height=7.5, min_x_height=6.75, line_height=48, baseline=26.0)
    layout, only = analyse_page(sheet.image, settings), analyse_page(alone.image, settings)
    got, wanted = strips(layout)[1], strips(only)[0]
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).mean() < 2
    assert got[:12].min() > 200
    assert got[-12:].min() > 200


def test_the_parts_of_a_long_line_keep_its_baseline():
    sheet = Sheet(3000, 80)
    written(sheet, 20, 50, sentence(0, 50), 28)
    layout = analyse_page(sheet.image, STRIPS)
    parts = strips(layout)
    assert len(parts) >= 2
    assert all(part.shape[0] == 16 and part.shape[1] <= STRIPS.max_width for part in parts)
    for part in parts:
        ink = (255 - part).sum(axis=1)
        middle = ink[8:11].mean()
        assert ink[11] > 0.5 * middle  # the last row above the baseline, at 12.1
        assert ink[13] < 0.4 * middle  # tails alone


def test_a_strip_at_the_edge_of_the_page_is_filled_up_with_paper():
    sheet = Sheet(420, 24)
    written(sheet, 4, 20, "moon over the bay hnhnhnhn", 20)
    strip = strips(analyse_page(sheet.image, STRIPS))[0]
    assert strip.shape[0] == 16
    assert foot(strip, 20) == pytest.approx(12.1, abs=0.5)
    assert strip[15].min() > 200


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["x_height", "document_area", "max_width", "patch_size", "max_lines", "max_scale"])
def test_settings_below_zero_are_refused(name):
    with pytest.raises(ValueError, match=name):
        LayoutSettings(**{name: -1})


def test_a_budget_of_less_than_four_patches_is_refused():
    with pytest.raises(ValueError, match="four patches"):
        LayoutSettings(document_area=512)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"line_height": -16}, "line_height must be a multiple of the patch's side 16"),
        ({"line_height": 24}, "line_height must be a multiple of the patch's side 16"),
        ({"line_height": 16.0}, "line_height must be a multiple of the patch's side 16"),
        ({"line_height": 16, "baseline": 16.0}, "baseline .* must lie within line_height"),
        ({"line_height": 16, "baseline": 5.0}, "room above it for x_height"),
    ],
)
def test_strips_that_cannot_be_are_refused_in_one_line(settings, named):
    with pytest.raises(ValueError, match=named) as error:
        LayoutSettings(**settings)
    assert "\n" not in str(error.value)
