"""Drawn chunks: boxes where the ink is, the same bytes for the same seed, limits kept."""

import argparse
import io

import numpy as np
import pytest
from PIL import Image, ImageFont

pytest.importorskip("skia")

from training.data import heldout, made_chunks
from training.data.pages.fonts import PRINTABLE
from training.data.schema import read_columns, validate_row
from unit_cli import data as data_command


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    path = tmp_path_factory.mktemp("font") / "aileron.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)  # the font that Pillow carries
    prose = "It was a bright cold day in April, and the clocks were striking thirteen. Winston Smith slipped in."
    return made_chunks.Resources({"Aileron": [str(path)]}, prose.split(), ["aardvark", "zygote", "quick", "jumps"])


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("draw", [made_chunks.draw_dense, made_chunks.draw_sparse])
def test_all_ink_is_in_the_boxes_and_all_boxes_have_ink(resources, draw):
    for seed in range(30):
        drawing = draw(rng(seed), resources)
        outside = drawing.coverage.copy()
        assert drawing.boxes.shape == (len(drawing.text), 4)
        for character, (x0, y0, x1, y1) in zip(drawing.text, drawing.boxes, strict=True):
            if character.isspace():
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
            else:
                assert drawing.coverage[y0:y1, x0:x1].max() > 0.25, (seed, character)
                outside[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = 0
        rows = (outside > 0.2).sum(axis=1)
        underlined = 0 < (rows > 0).sum() <= 4 and rows.max() > 10
        assert underlined or outside.max() < 0.2, seed


def test_x_height_is_what_it_says(resources):
    for seed in range(40):
        drawing = made_chunks.draw_sparse(rng(seed), resources)
        for character, box in zip(drawing.text, drawing.boxes, strict=True):
            if character in "xzvw":
                # Whole pixels around it, and up to one degree of rotation.
                assert drawing.x_height - 0.1 <= box[3] - box[1] <= drawing.x_height + 2.5


def test_a_row_is_a_function_of_seed_and_index(resources):
    assert made_chunks.made_row(5, 17, resources) == made_chunks.made_row(5, 17, resources)
    assert made_chunks.made_row(5, 17, resources) != made_chunks.made_row(5, 18, resources)
    assert made_chunks.made_row(5, 17, resources) != made_chunks.made_row(6, 17, resources)


def test_the_number_of_workers_changes_nothing(resources, tmp_path):
    for workers in (1, 2):
        made_chunks.build_made(
            tmp_path / str(workers), 70, seed=1, workers=workers, resources=resources, progress=False
        )
    one, two = ((tmp_path / str(workers) / "part-00000.parquet").read_bytes() for workers in (1, 2))
    assert one == two


@pytest.mark.parametrize(("kind", "area", "width"), [("dense", 65536, 1024), ("sparse", 16384, 512)])
def test_rows_are_valid_and_keep_to_the_budget(resources, kind, area, width):
    for index in range(60):
        row = made_chunks.made_row(0, index, resources, kind)
        validate_row(row)
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert image.mode == "L"
        assert image.width * image.height <= area
        assert image.width <= width
        low, high = made_chunks.X_HEIGHT[kind]
        assert row["text"] == "" or low <= row["x_height"] <= high


def test_some_canvases_are_blank_and_say_so(resources, monkeypatch):
    monkeypatch.setattr(made_chunks, "BLANK_SHARE", 1.0)
    for index in range(20):
        row = made_chunks.made_row(0, index, resources)
        validate_row(row)
        assert (row["text"], row["char_boxes"], row["x_height"]) == ("", [], 0.0)


def test_unwanted_text_is_drawn_anew(resources):
    first = made_chunks.made_row(0, 3, resources)["text"]
    assert made_chunks.made_row(0, 3, resources, unwanted=lambda text: text == first)["text"] != first


def test_digits_and_capitals_are_common(resources):
    text = "".join(
        "".join(word for word, _ in zip(made_chunks.random_words(rng(seed), resources), range(10), strict=False))
        for seed in range(2000)
    )
    assert sum(character.isdigit() for character in text) > 0.08 * len(text)
    assert sum(character.isupper() for character in text) > 0.08 * len(text)
    assert set(PRINTABLE) <= set(text)


@pytest.mark.parametrize("function", [function for _, function in made_chunks.DEGRADATIONS])
def test_a_degradation_is_seeded_and_keeps_the_shape(function):
    pixels = np.full((24, 90), 230, dtype=np.float32)
    pixels[8:16, 10:80:4] = 20
    before = pixels.copy()
    one, same, other = (function(pixels, rng(seed)) for seed in (1, 1, 2))
    assert one.shape == pixels.shape
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, before)
    np.testing.assert_array_equal(pixels, before)  # the input is left alone


def test_ink_and_paper_differ_by_60_levels_and_one_in_ten_is_inverted():
    pairs = [made_chunks.ink_and_paper(rng(seed)) for seed in range(2000)]
    assert min(abs(ink - paper) for ink, paper in pairs) >= 60
    assert 0.07 < np.mean([ink > paper for ink, paper in pairs]) < 0.13


def test_wrong_use_is_refused(resources, tmp_path):
    with pytest.raises(ValueError, match="dense or sparse, not 'huge'"):
        made_chunks.made_row(0, 0, resources, "huge")
    with pytest.raises(ValueError, match="count must not be negative"):
        made_chunks.build_made(tmp_path, -1, resources=resources)
    with pytest.raises(ValueError, match="at least one font"):
        made_chunks.Resources({}, ["a"], ["b"])


def test_held_out_fonts_are_told_by_family(resources, tmp_path):
    assert heldout.is_heldout_font("Vollkorn")
    assert heldout.is_heldout_font("Courier Prime Sans")
    assert not heldout.is_heldout_font("DejaVu Sans")
    for name, family in (("a", "Aileron"), ("b", "Karla")):
        drawn = made_chunks.Resources({family: resources.fonts["Aileron"]}, resources.prose, resources.vocabulary)
        made_chunks.build_made(tmp_path / name, 4, seed=ord(name), resources=drawn, progress=False)
    assert heldout.find_leaks([tmp_path / "a"], [tmp_path / "b"], progress=False) == []
    leaks = heldout.find_leaks([tmp_path / "b"], [tmp_path / "a"], progress=False)
    assert len(leaks) == 4
    assert all("held-out font" in leak for leak in leaks)


# ---------------------------------------------------------------------------------------------------- command line


def unit(*arguments):
    parser = argparse.ArgumentParser(prog="unit")
    data_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, arguments)])
    return args.run(args)


def test_the_command_draws_and_checks(resources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(made_chunks, "load_resources", lambda split: resources)
    monkeypatch.setattr(heldout, "validation_text_filter", lambda: heldout.TextFilter(np.array([], dtype=np.uint64)))
    assert unit("make-pages", "--out", tmp_path, "--rows", 5, "--kind", "dense") == 0
    assert len(list(read_columns(tmp_path / "made-train", ["text"]))) == 5
    assert unit("make-pages", "--out", tmp_path / "other", "--rows", 5, "--kind", "dense", "--seed", 1) == 0
    folders = ["--train", tmp_path / "made-train", "--validation"]
    assert unit("check-leaks", *folders, tmp_path / "made-train") == 1
    assert "the same image as" in capsys.readouterr().out


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    assert unit("from-pdfs", "--packages", "texlive-humanities-doc") == 2
    assert unit("check-leaks") == 2
    assert unit("check-leaks", "--train", tmp_path / "a", "--validation", tmp_path / "b") == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert "held out for validation" in lines[0]
    assert "holds no data sets" in lines[1]
    assert "holds no parquet files" in lines[2]
