"""Made pages: ink in its boxes, text in reading order, same seed same bytes, balanced, degraded as stated."""

import argparse
import io
import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFont

pytest.importorskip("skia")

from training.data import heldout, made_pages
from training.data.made_pages import PageResources, PageSettings, Pictures, lay_out, page_row
from training.data.pages import degradations, fonts
from training.data.pages.corpus import WANTED, Corpus, Scalars, TextStream, load_corpus
from training.data.pages.degradations import DEGRADATIONS, Page
from training.data.pages.elements import Sheet, Style, wrap
from training.data.pages.layouts import LAYOUTS
from training.data.schema import make_row, read_columns, validate_row, write_shards
from unit_cli import data as data_command

PROSE = """it was a bright cold day in the middle of the year and all the clocks of the town were striking as the old
man slipped quickly through the glass doors though not quickly enough to prevent a swirl of dust from entering
along with him while the hallway smelt of boiled cabbage and old rag mats and at one end of it a coloured
poster too large for indoor display had been tacked to the wall"""


@pytest.fixture(scope="module")
def font_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fonts")
    (folder / "aileron.ttf").write_bytes(ImageFont.load_default(10).font_bytes)  # the font that Pillow carries
    return folder


@pytest.fixture(scope="module")
def resources(font_folder):
    return PageResources(fonts.load_fonts(font_folder), Corpus(PROSE, ["aardvark", "zygote", "quixotic", "jumble"]))


def rng(seed=0):
    return np.random.default_rng(seed)


def laid_out(layout, seed, resources, **settings):
    return lay_out(layout, Scalars(seed), PageSettings(**settings), resources)[0]


# ------------------------------------------------------------------------------------------------- layouts and boxes


@pytest.mark.parametrize("size", ["64x48", "160", "700x900"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ink_is_in_the_boxes_and_every_box_has_ink(resources, layout, size):
    for seed in range(3):
        sheet = laid_out(layout, seed, resources, size=size)
        text = sheet.text()
        pixels, boxes = sheet.draw(ink=0, paper=255)
        sheet.lines = []
        without, nothing = sheet.draw(ink=0, paper=255)  # rules, plates and pictures alone
        assert len(nothing) == 0
        ink = np.abs(pixels.astype(int) - without).reshape(*pixels.shape[:2], -1).max(axis=2)
        assert text
        assert boxes.shape == (len(text), 4)
        assert boxes[:, :2].min() >= -1
        assert (boxes[:, 2:] <= (sheet.width + 1, sheet.height + 1)).all()
        for character, (x0, y0, x1, y1) in zip(text, made_pages.whole_boxes(boxes, pixels.shape), strict=True):
            if character.isspace():
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
            else:
                assert ink[y0:y1, x0:x1].max(initial=0) > 40, (seed, character)
        for x0, y0, x1, y1 in made_pages.whole_boxes(boxes, pixels.shape):
            ink[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = 0
        assert ink.max() == 0, (seed, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_do_not_overlap_and_stay_on_the_page(resources, layout):
    for seed in range(4):
        row = page_row(
            seed, 2, PageSettings(size="300x420", layouts=(layout,), degradations=(), blank_share=0), resources
        )
        validate_row(row)
        boxes = np.array([word["box"] for word in row["words"]])
        assert [word["text"] for word in row["words"]] == row["text"].split()
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = (high - low).clip(0).prod(axis=2).astype(float)
        np.fill_diagonal(shared, 0)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        assert (shared <= 0.3 * np.minimum(area[:, None], area[None, :])).all(), (layout, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_is_in_reading_order(resources, layout):
    for seed in range(5):
        sheet = laid_out(layout, seed, resources, size="800x600", x_height=(5, 7))
        _, boxes = sheet.draw(0, 255)
        lines, start = [], 0
        for line in sheet.text().split("\n"):
            part = boxes[start : start + len(line)]
            start += len(line) + 1
            words = part[part.any(axis=1)]
            assert (np.diff(words[:, 0]) > -3).all(), line  # left to right; italics lean back a little
            lines.append((words[:, 0].min(), words[:, 1].min(), words[:, 2].max(), words[:, 3].max()))
        for (left, top, right, _), (next_left, next_top, _, next_bottom) in pairwise(lines):
            goes_down = next_bottom > top
            next_column = next_left > right - 0.6 * (right - left) and next_top < top
            if layout != "photo":
                assert goes_down or next_column
        if layout == "photo":
            tops = [line.baseline - line.style.ascent for line in sheet.lines]
            assert min(tops) == tops[0]


def test_columns_are_read_one_after_another(resources):
    seen = set()
    for seed in range(30):
        sheet = laid_out("paragraphs", seed, resources, size="900x300", x_height=(5, 6))
        lefts = [line.x for line in sheet.lines if len(line.text) > 30]
        columns = [x for x, before in zip(lefts[1:], lefts, strict=False) if x > before + 100]
        assert columns == sorted(columns)  # never back to one on the left
        seen.add(1 + len(columns))
    assert seen == {1, 2, 3}


def test_a_table_is_read_row_by_row(resources):
    sheet = laid_out("table", 3, resources, size="448")
    shared = [line for line in sheet.lines if line.joint == " "]
    assert shared
    for line, before in zip(sheet.lines[1:], sheet.lines, strict=False):
        assert (line.baseline == before.baseline) == (line.joint == " ")
        assert line.joint == "\n" or line.x > before.x


def test_lines_are_as_long_as_fits(resources, font_folder):
    style = Style(str(font_folder / "aileron.ttf"), 6.0)
    words = PROSE.split()
    lines, taken = wrap(words, style, 150.0, 1000)
    assert " ".join(lines) == " ".join(words)
    assert taken == len(words)
    for line, after in pairwise(lines):
        assert style.measure(line) <= 150.0 + 1e-6
        assert style.measure(f"{line} {after.split()[0]}") > 150.0
    assert wrap(["incomprehensibilities"], style, 30.0, 5)[0][0] in "incomprehensibilities"  # wider than a line: cut
    assert wrap(words, style, 150.0, 2) == (lines[:2], len(" ".join(lines[:2]).split()))


def test_characters_met_for_the_first_time_are_measured(font_folder):
    path = str(font_folder / "aileron.ttf")
    fonts.metrics.cache_clear()
    accented = Style(path, 8.0).measure("é")  # beyond ASCII, so not known yet
    fonts.metrics.cache_clear()
    style = Style(path, 8.0)
    assert style.measure("née") == pytest.approx(style.measure("n") + accented + style.measure("e"))


def test_x_height_and_size_are_as_asked_for(resources):
    for index in range(12):
        settings = PageSettings(
            size="200-320x150", x_height=(6, 9), layouts=("paragraphs",), degradations=(), blank_share=0
        )
        row = page_row(index, 1, settings, resources)
        width, height = Image.open(io.BytesIO(row["image"]["bytes"])).size
        assert 200 <= width <= 320
        assert height == 150
        assert 6 <= row["x_height"] <= 9


def test_blank_pages_say_so(resources):
    for index in range(5):
        row = page_row(index, 0, PageSettings(size="64", blank_share=1.0), resources)
        validate_row(row)
        assert (row["text"], row["char_boxes"], row["x_height"]) == ("", [], 0.0)


# --------------------------------------------------------------------------------------------------- reproducibility


def test_a_page_is_a_function_of_seed_and_index(resources):
    settings = PageSettings(size="160")
    again = PageSettings.from_dict(json.loads(json.dumps(settings.as_dict())))
    assert page_row(7, 5, settings, resources) == page_row(7, 5, again, resources)
    assert page_row(7, 5, settings, resources) != page_row(8, 5, settings, resources)
    assert page_row(7, 5, settings, resources) != page_row(7, 6, settings, resources)


def test_the_number_of_workers_changes_nothing(resources, tmp_path):
    for workers in (1, 2):
        out = tmp_path / str(workers)
        made_pages.build_pages(out, 24, PageSettings(size="96"), resources, seed=1, workers=workers, progress=False)
    one, two = ((tmp_path / str(workers) / "part-00000.parquet").read_bytes() for workers in (1, 2))
    assert one == two


def test_degradations_change_pixels_and_no_text(resources):
    changed = 0
    for index in range(12):
        one, two = (
            page_row(index, 3, PageSettings(size="128", blank_share=0, **kwargs), resources)
            for kwargs in ({}, {"degradations": ()})
        )
        assert one["text"] == two["text"]
        changed += one["image"] != two["image"]
    assert 5 <= changed <= 12  # a quarter stays clean


def test_unwanted_text_is_drawn_anew(resources):
    settings = PageSettings(size="96", blank_share=0)
    first = page_row(0, 3, settings, resources)["text"]
    picky = PageResources(resources.fonts, resources.corpus, unwanted=lambda text: text == first)
    assert page_row(0, 3, settings, picky)["text"] not in ("", first)
    hopeless = PageResources(resources.fonts, resources.corpus, unwanted=lambda text: True)
    with pytest.raises(RuntimeError, match="page 0 of seed 3 held text of the validation documents"):
        page_row(0, 3, settings, hopeless)


# ----------------------------------------------------------------------------------------------------------- balance


def shares(text, corpus):
    """Counted in the plainest way."""
    characters = [character for character in text if not character.isspace()]
    words = [word.strip("\"'`()[]{}<>.,;:!?*_-+=/\\|~^&%$#@") for word in text.split()]
    rare = [word for word in words if len(word) > 1 and word.isalpha() and word.lower() not in corpus.common]
    return {
        "digits": sum(character.isdigit() for character in characters) / len(characters),
        "capitals": sum(character.isupper() for character in characters) / len(characters),
        "punctuation": sum(not character.isalnum() for character in characters) / len(characters),
        "rare words": len(rare) / len(words),
    }


def test_text_is_balanced_whatever_the_corpus(resources):
    corpus = Corpus(" ".join(["the cat sat on the mat"] * 30), ["aardvark", "zygote", "quixotic"])
    pages = []
    for seed in range(300):
        stream = TextStream(corpus, Scalars(seed))
        pages.append(" ".join(word for _ in range(6) for word in stream.words(40)))
    measured = shares(" ".join(pages), corpus)
    for name, wanted in WANTED.items():
        assert 0.85 * wanted < measured[name] < 1.6 * wanted, name
    digits = [shares(page, corpus)["digits"] for page in pages]
    assert min(digits) < 0.015  # some pages are prose alone
    assert max(digits) > 0.11


def test_the_report_holds_what_was_measured(resources, tmp_path):
    settings = PageSettings(size="200")
    made_pages.build_pages(tmp_path / "set", 30, settings, resources, seed=4, progress=False)
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    rows = list(read_columns(tmp_path / "set", ["text", "source"]))
    expected = shares(" ".join(row["text"] for row in rows), resources.corpus)
    assert report["settings"]["measured_shares"] == pytest.approx(expected, abs=1e-4)
    assert sum(report["settings"]["pages_by_layout"].values()) == report["rows"] == len(rows) == 30
    assert PageSettings.from_dict({"size": report["settings"]["size"]}) == settings


def test_passages_run_on_over_the_end_of_the_text():
    words = [f"w{number}" for number in range(60)]
    corpus = Corpus(" ".join(words))
    for seed in range(20):
        found = corpus.passage(Scalars(seed), 150)
        start = words.index(found[0])
        assert found == [words[(start + step) % 60] for step in range(150)]


def test_words_that_the_font_cannot_draw_are_left_out(resources):
    corpus = Corpus("fine עברית naïve 漢字 " * 30)
    covers = fonts.metrics(resources.fonts[resources.families[0]][0]).covers
    drawn = set(TextStream(corpus, Scalars(1), covers).words(80))
    assert "fine" in drawn
    assert not any(character > "\u0590" for word in drawn for character in word)


# ------------------------------------------------------------------------------------------------------ degradations


def striped(ink=20, paper=230, shape=(60, 90)):
    pixels = np.full(shape, paper, dtype=np.uint8)
    pixels[20:40, 10:80:6] = ink
    pixels[20:40, 11:80:6] = ink
    return Page(pixels, np.array([[10.0, 20, 77, 40], [0, 0, 0, 0]]), 9.0, ink, paper)


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("colours", [False, True])
def test_a_degradation_is_seeded_and_keeps_shape_and_input(name, colours):
    page = striped()
    if colours:
        page.pixels = np.stack([page.pixels, page.pixels // 2, page.pixels], axis=2)
    before, (_, function) = page.pixels.copy(), DEGRADATIONS[name]
    one, same, other = (function(page, 0.8, rng(seed)) for seed in (1, 1, 2))
    assert one.pixels.shape == page.pixels.shape
    assert one.pixels.dtype == np.uint8
    np.testing.assert_array_equal(one.pixels, same.pixels)
    np.testing.assert_array_equal(one.boxes, same.boxes)
    assert not np.array_equal(one.pixels, before)
    np.testing.assert_array_equal(page.pixels, before)
    assert not one.boxes[1].any()  # white space has no place
    if name in degradations.GEOMETRY:
        assert not np.array_equal(one.boxes, other.boxes)
    else:
        np.testing.assert_array_equal(one.boxes, page.boxes)


@pytest.mark.parametrize("name", degradations.GEOMETRY)
def test_the_box_of_a_dot_goes_where_the_dot_goes(name):
    for seed in range(12):
        random = rng(seed)
        dots = random.integers(12, 180, size=(6, 2)).astype(float)
        boxes = np.concatenate([dots - 3, dots + 3], axis=1)
        for place in range(len(dots)):  # one at a time, so that the centre of its darkness is known
            x, y = dots[place].astype(int)
            pixels = np.full((200, 200), 255, dtype=np.uint8)
            pixels[y - 3 : y + 3, x - 3 : x + 3] = 0
            moved = DEGRADATIONS[name][1](Page(pixels, boxes, 8.0), 1.0, rng(seed))
            dark = np.where(moved.pixels < 255, 255.0 - moved.pixels, 0)
            x0, y0, x1, y1 = moved.boxes[place]
            area = dark[max(int(y0) - 4, 0) : int(y1) + 5, max(int(x0) - 4, 0) : int(x1) + 5]
            rows, columns = np.nonzero(area > 100)
            centre = columns.mean() + 0.5 + max(int(x0) - 4, 0), rows.mean() + 0.5 + max(int(y0) - 4, 0)
            assert centre == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.8)
            assert 4.5 <= x1 - x0 <= 8
        assert (moved.boxes[:, :2] >= 0).all()
        assert (moved.boxes[:, 2:] <= 200).all()


def test_a_rotation_is_the_rotation_it_says():
    page = striped(shape=(100, 100))
    matrix = degradations.rotation_matrix(page, 1.0, rng(3))
    angle = np.arctan2(matrix[1, 0], matrix[0, 0])
    assert abs(np.rad2deg(angle)) <= 4
    np.testing.assert_allclose(degradations.apply_homography(matrix, np.array([50.0, 50.0])), [50, 50])
    np.testing.assert_allclose(
        degradations.apply_homography(matrix, np.array([90.0, 50.0])),
        [50 + 40 * np.cos(angle), 50 + 40 * np.sin(angle)],
    )


def test_a_homography_takes_corners_to_corners():
    corners = np.array([[0, 0], [100, 0], [100, 50], [0, 50]], dtype=float)
    moved = np.array([[5, 3], [92, -4], [107, 44], [-6, 58]], dtype=float)
    matrix = degradations.homography(corners, moved)
    np.testing.assert_allclose(degradations.apply_homography(matrix, corners), moved, atol=1e-9)
    # A projective map keeps straight lines: the crossing of the diagonals goes to the crossing of the diagonals.
    middle = degradations.apply_homography(matrix, np.array([50.0, 25.0]))
    (a, c), (b, d) = moved[[0, 2]], moved[[1, 3]]
    t = np.linalg.solve(np.array([c - a, b - d]).T, b - a)
    np.testing.assert_allclose(middle, a + t[0] * (c - a), atol=1e-9)


def test_rotation_and_perspective_together_move_boxes_once():
    pixels = np.full((200, 200), 255, dtype=np.uint8)
    pixels[60:66, 120:126] = 0
    page = Page(pixels, np.array([[120.0, 60, 126, 66], [20, 20, 180, 180]]), 8.0)
    for seed in range(10):
        moved = degradations.degrade(page, [degradations.Chosen(name, 1.0, seed) for name in degradations.GEOMETRY])
        x0, y0, x1, y1 = moved.boxes[0].round().astype(int)
        near = moved.pixels[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] < 128  # the table beyond the edge is dark as well
        rows, columns = np.nonzero(near)
        assert columns.mean() + 0.5 == pytest.approx(moved.boxes[0, [0, 2]].mean() - x0 + 3, abs=0.8)
        assert rows.mean() + 0.5 == pytest.approx(moved.boxes[0, [1, 3]].mean() - y0 + 3, abs=0.8)


def test_strengths_are_what_the_docstrings_say():
    flat = Page(np.full((300, 300), 128, dtype=np.uint8), np.zeros((1, 4)), 10.0)
    for strength in (0.5, 1.0):
        spread = DEGRADATIONS["noise"][1](flat, strength, rng(1)).pixels.astype(float)
        assert spread.std() == pytest.approx(16 * strength, rel=0.04)
        assert spread.mean() == pytest.approx(128, abs=0.3)
        shadow = DEGRADATIONS["shadow"][1](flat, strength, rng(1)).pixels
        assert 128 * (1 - 0.55 * strength) - 2 <= shadow.min() < 126
        stain = DEGRADATIONS["paper_stain"][1](flat, strength, rng(1)).pixels.astype(int) - 128
        assert 4 * strength < np.abs(stain).max() <= 20 * strength + 7
    line = Page(np.full((41, 41), 255, dtype=np.uint8), np.zeros((1, 4)), 20.0)
    line.pixels[:, 20] = 0
    profile = 255.0 - DEGRADATIONS["blur"][1](line, 1.0, rng()).pixels[20]
    offsets = np.arange(41) - 20
    deviation = np.sqrt((profile * offsets**2).sum() / profile.sum())
    assert deviation == pytest.approx(1.2, abs=0.08)  # min(1.2, 0.14 x-heights)
    assert profile.sum() == pytest.approx(255, abs=4)
    assert (degradations.jpeg_quality(1.0), degradations.jpeg_quality(1e-9)) == (25, 90)
    page = striped()
    assert (DEGRADATIONS["ink_bleed"][1](page, 1.0, rng()).pixels <= page.pixels).all()
    assert (DEGRADATIONS["ink_fade"][1](page, 1.0, rng()).pixels + 1 >= page.pixels).all()
    small = Page(striped().pixels, striped().boxes, degradations.LEGIBLE)
    np.testing.assert_array_equal(DEGRADATIONS["low_resolution"][1](small, 1.0, rng()).pixels, small.pixels)


def test_light_ink_on_dark_paper_bleeds_light():
    page = striped(ink=220, paper=30)
    assert (DEGRADATIONS["ink_bleed"][1](page, 1.0, rng()).pixels >= page.pixels).all()


def test_chances_are_kept_and_one_switched_off_changes_no_other():
    every, some = [], []
    for seed in range(3000):
        every.append(degradations.draw_degradations(rng(seed), list(DEGRADATIONS)))
        some.append(degradations.draw_degradations(rng(seed), [name for name in DEGRADATIONS if name != "blur"]))
    for name, (chance, _) in DEGRADATIONS.items():
        share = np.mean([name in [step.name for step in chosen] for chosen in every])
        if name == "jpeg":  # noisy pages always
            chance = 1 - (1 - chance) * (1 - DEGRADATIONS["noise"][0])
        assert share == pytest.approx((1 - degradations.CLEAN_SHARE) * chance, abs=0.03)
    assert [[step for step in chosen if step.name != "blur"] for chosen in every] == some
    assert all(0 < step.strength <= 1 for chosen in every for step in chosen)


def test_ink_and_paper_differ_by_60_levels_and_one_in_ten_is_inverted():
    pairs = [degradations.ink_and_paper(rng(seed)) for seed in range(2000)]
    assert min(abs(ink - paper) for ink, paper in pairs) >= 60
    assert 0.07 < np.mean([ink > paper for ink, paper in pairs]) < 0.13


# --------------------------------------------------------------------------------------------------------- resources


def picture_set(folder, splits):
    def row(split, level):
        return make_row(
            np.full((40, 60, 3), level, dtype=np.uint8),
            "A grey.",
            task="caption",
            kind="natural",
            source=f"test/{split}",
            license=f"licence of {split}",
            split=split,
        )

    write_shards((row(split, 40 + 30 * number) for number, split in enumerate(splits)), folder)


def test_pictures_of_the_other_split_are_never_used(resources, tmp_path):
    picture_set(tmp_path / "set", ["validation", "train", "validation", "train"])
    pictures = Pictures(tmp_path / "set", "train")
    assert sorted(pictures.read(index)[0].getpixel((0, 0))[0] for index in range(len(pictures))) == [70, 130]
    drawn = PageResources(resources.fonts, resources.corpus, pictures)
    row = page_row(0, 0, PageSettings(size="160", layouts=("photo",), blank_share=0), drawn)
    assert row["license"].endswith("picture: licence of train")
    picture_set(tmp_path / "held", ["validation"])
    with pytest.raises(ValueError, match="holds no pictures for train"):
        Pictures(tmp_path / "held", "train")


def test_a_damaged_picture_is_replaced(resources, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    drawn = PageResources(resources.fonts, resources.corpus, Pictures(tmp_path))
    row = page_row(0, 0, PageSettings(size="160", layouts=("captions",), blank_share=0), drawn)
    validate_row(row)
    assert "picture" not in row["license"]


def test_the_digest_tells_other_resources_apart(resources):
    other = PageResources(resources.fonts, Corpus(PROSE + " and more"))
    same = PageResources(resources.fonts, Corpus(PROSE, ["aardvark", "zygote", "quixotic", "jumble"]))
    assert resources.digest() == same.digest() != other.digest()


def test_held_out_families_are_for_validation_alone(font_folder, monkeypatch):
    monkeypatch.setattr(fonts, "is_heldout_font", lambda family: family == "Aileron")
    assert list(fonts.load_fonts(font_folder, "validation")) == ["Aileron"]
    with pytest.raises(ValueError, match=r"no font found .* for train"):
        fonts.load_fonts(font_folder, "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "20"}, "20x20 pixels is too small for text of 5 pixels x-height: 60x32 at least"),
        ({"size": "big"}, "size must look like 448, 448x640"),
        ({"size": "640-320"}, "the lower side first"),
        ({"size": "99999"}, "8192 pixels at most"),
        ({"x_height": (12, 5)}, "x_height must be two numbers of 3 to 200 pixels"),
        ({"x_height": (1, 5)}, "x_height must be two numbers of 3 to 200 pixels"),
        ({"layouts": ("poem",)}, "no layout is called 'poem'; there are paragraphs,"),
        ({"degradations": ("fire",)}, "no degradation is called 'fire'"),
        ({"blank_share": 2}, "blank_share must be between 0 and 1"),
        ({"split": "test"}, "split must be one of train, validation"),
        ({"colour": 1}, "no setting 'colour'"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        PageSettings.from_dict(settings)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ command line


def unit(*arguments):
    parser = argparse.ArgumentParser(prog="unit")
    data_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, arguments)])
    return args.run(args)


@pytest.fixture
def at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    nothing = heldout.TextFilter(np.array([], dtype=np.uint64))
    monkeypatch.setattr(made_pages, "validation_text_filter", lambda: nothing)


@pytest.mark.usefixtures("at_home")
def test_the_command_draws_what_it_is_asked_for(font_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(PROSE)
    options = ["--count", 6, "--size", "120x90", "--x-height", "5-6", "--layouts", "form,table", "--no-degradations"]
    given = ["--fonts", font_folder, "--corpus", tmp_path / "text.txt", "--seed", 2, "--out", tmp_path / "out"]
    assert unit("make-pages", *options, *given) == 0
    output = capsys.readouterr()
    assert "6 rows" in output.out
    assert "no pictures-train in the cache" in output.err
    rows = list(read_columns(tmp_path / "out", ["source", "image"]))
    assert {row["source"].split("/")[1] for row in rows} <= {"form", "table", "blank"}
    assert {Image.open(io.BytesIO(row["image"]["bytes"])).size for row in rows} == {(120, 90)}


@pytest.mark.usefixtures("at_home")
def test_pages_in_large_print_are_a_set_of_the_recipes(font_folder, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(PROSE)
    load = made_pages.load_page_resources
    monkeypatch.setattr(made_pages, "load_page_resources", lambda: load("train", font_folder, [tmp_path / "text.txt"]))
    assert unit("make-pages", "--kind", "large", "--rows", 6, "--out", tmp_path) == 0
    rows = list(read_columns(tmp_path / "sparse-pages-train", ["image", "x_height", "split"]))
    sides = [side for row in rows for side in Image.open(io.BytesIO(row["image"]["bytes"])).size]
    assert len(rows) == 6
    assert 448 <= min(sides) <= max(sides) <= 640
    assert {row["split"] for row in rows} == {"train"}
    assert all(13 <= row["x_height"] <= 27 for row in rows if row["x_height"])


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", 5, "--size", "8"], "too small"),
        (["--count", 5, "--fonts", "nowhere"], "there is no folder nowhere"),
        (["--count", 5, "--corpus", "nowhere.txt", "--fonts", "FONTS"], "cannot read the text file nowhere.txt"),
        (["--count", 5, "--kind", "dense"], "--kind and --rows are for the recipes' sets"),
        (["--size", "448"], "--size is for whole pages: say how many with --count"),
        (["--count", 5, "--pictures", "EMPTY"], "holds no pictures for train"),
        (["--count", 5, "--fonts", "EMPTY"], "no font found in"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, message, font_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    names = {"FONTS": font_folder, "EMPTY": tmp_path / "empty"}
    assert unit("make-pages", *[names.get(part, part) for part in arguments], "--out", tmp_path / "out") == 2
    said = [line for line in capsys.readouterr().err.strip().split("\n") if "drawn scenes" not in line]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "out").exists()


def test_without_the_validation_documents_a_line_says_so(font_folder, tmp_path, monkeypatch):
    def absent():
        raise RuntimeError("the command 'apt-get' is not on this machine")

    monkeypatch.setattr(made_pages, "validation_text_filter", absent)
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(PROSE)
    said = []
    given = {"fonts": font_folder, "corpus": [tmp_path / "text.txt"], "say": said.append}
    assert made_pages.load_page_resources("train", **given).unwanted is None
    assert "cannot be had here: the command 'apt-get' is not on this machine" in said[-1]


def test_a_short_corpus_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("only a few words")
    with pytest.raises(ValueError, match="has 4 words; at least 50"):
        load_corpus([tmp_path / "short.txt"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(ValueError, match=r"cannot read the text file .*latin\.txt"):
        load_corpus([tmp_path / "latin.txt"])


def test_a_sheet_without_lines_has_no_text():
    sheet = Sheet(40, 30)
    pixels, boxes = sheet.draw(0, 255)
    assert (sheet.text(), boxes.shape) == ("", (0, 4))
    assert (pixels == 255).all()
