"""What `make demo` does: reads the samples, names the pictures, writes a drawing of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from modeling_unit.reading_unit import Block, Page
from spaces_demo import sample_run
from spaces_demo.sample_run import LABELS, confidence_colour, draw_page, draw_picture, main, set_block, word_f1
from training.evaluation.text import word_f1 as measured_f1

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "spaces_demo" / "samples" / "pages").glob("*.png"))
PICTURES = sorted((ROOT / "spaces_demo" / "samples" / "pictures").glob("*.jpg"))


def ten_a_letter(text, x_height):
    """A typewriter: each letter as wide as the x-height."""
    return len(text) * x_height


def block(text, lines, x_height=10.0, confidence=0.9):
    x0, y0, x1, y1 = zip(*lines, strict=True)
    return Block((min(x0), min(y0), max(x1), max(y1)), text, confidence, list(lines), x_height)


# ------------------------------------------------------------------------------------------------------------- samples


def test_there_are_three_pages_and_three_pictures_at_least():
    assert len(PAGES) >= 3
    assert len(PICTURES) >= 3


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_small_and_grey_and_its_text_is_beside_it(path):
    assert path.stat().st_size < 150_000
    with Image.open(path) as image:
        assert image.mode == "L"
        assert min(image.size) > 1200  # 150 dpi of A4 or letter paper
    text = path.with_suffix(".txt").read_text(encoding="utf-8")
    assert len(text.split()) > 200
    assert "\ufffe" not in text
    assert "\r" not in text


@pytest.mark.parametrize("folder", ["pages", "pictures"])
def test_every_sample_has_its_source_and_licence(folder):
    listed = (ROOT / "spaces_demo" / "samples" / folder / "SOURCES.md").read_text(encoding="utf-8")
    for path in PAGES if folder == "pages" else PICTURES:
        (row,) = [line for line in listed.splitlines() if line.startswith(f"| {path.name} |")]
        assert any(licence in row for licence in ("LPPL", "CC0", "public domain"))


def test_the_pages_come_from_packages_that_are_never_trained_on():
    from training.data.heldout import validation_packages

    rows = [
        line for line in (PAGES[0].parent / "SOURCES.md").read_text(encoding="utf-8").splitlines() if ".png" in line
    ]
    assert len(rows) == len(PAGES)
    assert all(any(package in row for package in validation_packages()) for row in rows)


def test_what_the_pictures_show_is_among_the_labels():
    assert {f"a {path.stem}" for path in PICTURES} <= set(LABELS)
    assert len(LABELS) >= 2 * len(PICTURES)


# ------------------------------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize(
    ("read", "truth", "expected"),
    [
        ("The cat", "the CAT.", 1.0),
        ("a a b", "a b c", 2 / 3),
        ("recog-\nnise", "recognise", 1.0),
        ("", "word", 0.0),
        ("", "", 1.0),
    ],
)
def test_word_f1_is_that_of_the_evaluation(read, truth, expected):
    assert word_f1(read, truth) == pytest.approx(expected)
    assert measured_f1(read, truth) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------- drawing


def test_colours_go_from_red_over_amber_to_green():
    assert confidence_colour(0.1) == confidence_colour(0.5) == (200, 55, 45)
    assert confidence_colour(0.8) == (222, 150, 20)
    assert confidence_colour(1.0) == (25, 140, 75)


def test_as_many_lines_as_there_are_on_the_page_stand_where_they_were():
    rows = [(10, 10, 110, 20), (10, 30, 110, 40)]
    lines, x_height = set_block(block("one two\nthree", rows), ten_a_letter)
    assert lines == [("one two", rows[0]), ("three", rows[1])]
    assert x_height == 10


def test_boxes_side_by_side_are_one_line():
    lines, _ = set_block(block("left right", [(10, 10, 60, 20), (80, 11, 140, 21)]), ten_a_letter)
    assert lines == [("left right", (10, 10, 140, 21))]


def test_a_line_too_long_makes_the_block_smaller():
    lines, x_height = set_block(block("twelve chars", [(0, 0, 100, 20)]), ten_a_letter)
    assert lines == [("twelve chars", (0, 0, 100, 20))]
    assert 100 / 12 - 0.5 < x_height <= 104 / 12


def test_other_lines_than_those_of_the_page_flow_through_it():
    rows = [(0, 0, 100, 20), (0, 30, 100, 50), (0, 60, 100, 80)]
    lines, x_height = set_block(block("one two three di-\nvided", rows), ten_a_letter)
    assert lines == [("one two", rows[0]), ("three", rows[1]), ("divided", rows[2])]
    assert x_height == 10


def test_far_too_much_text_is_set_all_the_same():
    lines, _ = set_block(block("\n".join(["words"] * 50), [(0, 0, 100, 20), (0, 30, 100, 50)]), ten_a_letter)
    assert [text for text, _ in lines] == [" ".join(["words"] * 50)]


def test_a_page_and_its_text_stand_side_by_side():
    page = Page([block("Some text", [(40, 40, 360, 60)], confidence=1.0)], (400, 200), 1.0)
    sheet = draw_page(Image.new("RGB", (400, 200), "white"), page, "a.png", "facts")
    assert sheet.width > 2 * sample_run.PAGE_WIDTH
    colours = {colour for _, colour in sheet.getcolors(maxcolors=1 << 24)}
    assert confidence_colour(1.0) in colours
    # the frame: 40 pixels of 400 in, 3 further out
    scale = sample_run.PAGE_WIDTH / 400
    x, y = sample_run.MARGIN + 40 * scale - 3, sample_run.TITLE + 50 * scale
    assert sheet.getpixel((round(x), round(y))) == confidence_colour(1.0)


def test_a_blank_page_can_be_drawn():
    sheet = draw_page(Image.new("RGB", (300, 400), "white"), Page([], (300, 400)), "blank.png", "facts")
    assert sheet.height > 400


def test_bars_are_as_long_as_labels_are_likely():
    ranking = [("a dog", 0.8), ("a cat", 0.4)]
    sheet = draw_picture(tiny.noise(30, 20), "a dog", ranking, "a.jpg", "facts")
    pixels = np.asarray(sheet)
    lengths = []
    for colour in ((0x2F, 0x6F, 0xDE), (0xB9, 0xC4, 0xD6)):
        columns = np.flatnonzero((pixels[:, 480:] == colour).all(axis=2).any(axis=0))
        lengths.append(columns.max() - columns.min() + 1)
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=3)


# ----------------------------------------------------------------------------------------------------------------- run


@pytest.fixture
def samples(tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pictures").mkdir()
    tiny.draw_page("moss", 70, 30, 16).save(tmp_path / "pages" / "moss.png")
    (tmp_path / "pages" / "moss.txt").write_text("moss\n")
    tiny.noise(40, 30).save(tmp_path / "pictures" / "dog.jpg")
    return tmp_path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    model = tiny.unit_model(text=tiny.QWEN3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.generation_config.max_new_tokens = 4
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def test_every_sample_is_printed_and_drawn(samples, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample_run, "SAMPLES", samples)
    assert main(["--model", str(model), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dog.png", "moss.png"]
    printed = capsys.readouterr().out
    assert "=== moss.png" in printed
    assert "dog.jpg: " in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("moss.png ")]
    assert 0 <= float(row.split()[-1]) <= 1
    with Image.open(tmp_path / "out" / "moss.png") as image:
        assert image.width > 2 * sample_run.PAGE_WIDTH


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["--model", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sample_run: ")
    assert not (tmp_path / "out").exists()


def test_it_needs_nothing_but_the_base_packages():
    """The demo is installed without the extra `train`: importing and measuring must not ask for what is in it."""
    code = (
        "import sys, json; from spaces_demo.sample_run import word_f1; word_f1('a', 'b');"
        "extra = {'rapidfuzz', 'pyarrow', 'datasets', 'matplotlib', 'skia', 'peft'};"
        "print(json.dumps(sorted(extra & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
