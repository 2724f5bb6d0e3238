"""Lines as the Reader cuts them: each has its own text, its boxes lie on its ink, and what is doubtful is refused."""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

pytest.importorskip("skia")

from modeling_unit import UnitImageProcessor
from modeling_unit.layout_unit import LayoutSettings, analyse_page
from modeling_unit.reading_unit import Reader
from tests.pdf_files import Page, prose, write_pdf
from training.data import heldout, lines, made_chunks, pdf
from training.data.line_cuts import LINES, line_cutouts
from training.data.schema import make_row, read_columns, validate_row, write_shards
from unit_cli.__main__ import main

COLUMNS = ["image", "text", "task", "kind", "words", "char_boxes", "x_height", "source", "license", "split"]
TEXT = ("quickly jogging by the flocks", "a happy vixen hid from zebras", "of them six have gone abroad")
FACE = ImageFont.load_default(20)
RECIPE = Path(__file__).resolve().parents[1] / "training" / "recipes" / "unit-tiny" / "1-characters.yaml"


class Sheet:
    """A page on which each character is drawn by itself, so that text and boxes are known."""

    def __init__(self, rows=TEXT, width=700, pitch=40):
        self.image = Image.new("L", (width, 60 + pitch * len(rows)), 255)
        self.draw = ImageDraw.Draw(self.image)
        self.text, self.boxes = "", []
        for number, row in enumerate(rows):
            self.row(row, 40 + pitch * number)

    def row(self, text, baseline, x=30, known=True):
        """Draw a line; `known`: its characters and their boxes are told."""
        if known and self.text:
            self.tell("\n", (0, 0, 0, 0))
        for character in text:
            if character != " ":
                self.draw.text((x, baseline), character, fill=0, font=FACE, anchor="ls")
            if known:
                box = self.draw.textbbox((x, baseline), character, font=FACE, anchor="ls")
                self.tell(character, (0, 0, 0, 0) if character == " " else box)
            x += round(FACE.getlength(character))
        return x

    def tell(self, character, box):
        self.text += character
        self.boxes.append(box)

    def cut(self, unwanted=lambda text: False, settings=LINES, **wishes):
        """The cuts, and why others are none."""
        refused = Counter()
        layout = analyse_page(self.image, settings)
        boxes = np.array(self.boxes, dtype=np.float64).reshape(-1, 4)
        cuts = list(
            line_cutouts(layout, self.text, boxes, lambda reason: refused.update([reason]), unwanted, **wishes)
        )
        return cuts, dict(refused)


def pixels_of(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


# ----------------------------------------------------------------------------------------------- cuts of a drawn page


def test_every_line_of_a_page_is_a_strip_with_its_text():
    cuts, refused = Sheet().cut()
    assert [cut.text for cut in cuts] == list(TEXT)
    assert refused == {}
    for cut in cuts:
        assert cut.pixels.shape[0] == 16
        assert cut.pixels.shape[1] % 16 == 0
        assert cut.x_height == pytest.approx(7.5, rel=0.01)


def test_the_boxes_of_a_cut_lie_on_its_ink():
    for cut in Sheet().cut()[0]:
        assert cut.boxes.shape == (len(cut.text), 4)
        free = np.full(cut.pixels.shape[1], True)
        for character, (x0, y0, x1, y1) in zip(cut.text, cut.boxes, strict=True):
            if character == " ":
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
                continue
            assert cut.pixels[y0:y1, x0:x1].min() < 150, character
            free[max(0, x0 - 1) : x1 + 1] = False
            if character in "xzvmn":  # 7.5 px that stand on 12.1, whole pixels around them
                assert y0 in (4, 5)
                assert y1 in (12, 13)
        assert cut.pixels[:, free].min() > 180  # and no ink is without a box
        row = make_row(
            cut.pixels,
            cut.text,
            task="ocr",
            kind="document",
            source="x",
            license="",
            split="train",
            char_boxes=cut.boxes,
        )
        validate_row(row)
        assert [word["text"] for word in row["words"]] == cut.text.split()


def test_a_long_line_is_cut_into_parts_of_its_text():
    long = " ".join([*TEXT, *TEXT, *TEXT])
    cuts, refused = Sheet([long], width=3400).cut()
    assert refused == {}
    assert len(cuts) >= 2
    assert " ".join(cut.text for cut in cuts) == long
    assert max(cut.pixels.shape[1] for cut in cuts) <= LINES.max_width


def test_a_cut_over_two_printed_lines_is_refused():
    sheet = Sheet(TEXT[:1])
    at = sheet.text.index(" ")
    sheet.text = sheet.text[:at] + "\n" + sheet.text[at + 1 :]
    assert sheet.cut() == ([], {"two lines": 1})


def test_a_cut_whose_characters_do_not_follow_each_other_is_refused():
    """The text layer reads on in another place amid the line, as it does where columns were missed."""
    sheet = Sheet(TEXT[:2])
    first, second = TEXT[:2]
    at = first.index(" by ")
    order = [*range(at), *range(len(first), len(first) + 1 + len(second)), *range(at, len(first))]
    sheet.text = "".join(sheet.text[index] for index in order).replace("\n", " ")
    sheet.boxes = [sheet.boxes[index] for index in order]
    cuts, refused = sheet.cut()
    assert [cut.text for cut in cuts] == [second]
    assert refused == {"order": 1}


def test_ink_that_no_character_explains_is_refused():
    sheet = Sheet(TEXT[:2])
    x = sheet.row(TEXT[2], 120)
    sheet.row(" and more", 120, x, known=False)
    cuts, refused = sheet.cut()
    assert [cut.text for cut in cuts] == list(TEXT[:2])
    assert refused == {"foreign ink": 1}


def test_characters_that_show_no_ink_are_refused():
    sheet = Sheet(["quickly jogging", TEXT[1]])
    x, baseline = 30 + round(sum(round(FACE.getlength(c)) for c in "quickly")), 40
    at = sheet.text.index(" ")
    sheet.text = sheet.text[:at] + "iii" + sheet.text[at:]  # within the space between the words
    sheet.boxes[at:at] = [(x + index, baseline - 10, x + index + 1, baseline) for index in (2, 3, 4)]
    sheet.draw.rectangle((x + 1, 20, x + 4, 48), fill=255)
    cuts, refused = sheet.cut()
    assert [cut.text for cut in cuts] == [TEXT[1]]
    assert refused == {"bare": 1}


def test_a_line_without_a_text_is_refused():
    sheet = Sheet(TEXT[:2])
    sheet.row(TEXT[2], 120, known=False)
    cuts, refused = sheet.cut()
    assert [cut.text for cut in cuts] == list(TEXT[:2])
    assert refused == {"no characters": 1}


def test_one_symbol_is_read_and_many_are_refused():
    sheet = Sheet()
    first, second, third = TEXT
    sheet.text = "\n".join(
        [first.replace("k", "κ", 1), second.replace("h", "η").replace("a", "α").replace("e", "ε"), third]
    )
    cuts, refused = sheet.cut()
    assert [cut.text for cut in cuts] == [first.replace("k", "κ", 1), third]
    assert refused == {"symbols": 1}


def test_letters_of_every_script_are_read_where_any_is_welcome():
    sheet = Sheet()
    greek = TEXT[1].replace("h", "η").replace("a", "ά").replace("e", "ε")
    arrows = TEXT[2].replace("h", "→").replace("a", "⇒").replace("e", "∈").replace("i", "↑")
    sheet.text = "\n".join([TEXT[0], greek, arrows])
    cuts, refused = sheet.cut(any_script=True)
    assert [cut.text for cut in cuts] == [TEXT[0], greek]
    assert refused == {"symbols": 1}


def test_a_character_without_unicode_is_refused():
    sheet = Sheet(TEXT[:1])
    sheet.text = sheet.text.replace("k", "\ufffd", 1)
    assert sheet.cut() == ([], {"symbols": 1})


def test_held_out_text_is_refused():
    cuts, refused = Sheet().cut(unwanted=lambda text: "vixen" in text)
    assert [cut.text for cut in cuts] == [TEXT[0], TEXT[2]]
    assert refused == {"held out": 1}


def test_a_character_below_the_strip_keeps_its_column_within_the_picture():
    sheet = Sheet(["quickly jogging by the flocks of gypsy pigs"])
    x, baseline = 30 + sum(round(FACE.getlength(c)) for c in "quickly"), 40
    sheet.draw.rectangle((x, baseline + 8, x + 5, baseline + 9), fill=0)  # 0.8 x-heights below the baseline
    at = sheet.text.index(" ")
    sheet.text = sheet.text[:at] + "_" + sheet.text[at + 1 :]
    sheet.boxes[at] = (x, baseline + 8, x + 6, baseline + 10)
    (cut,), refused = sheet.cut()
    assert refused == {}
    assert cut.text == sheet.text
    x0, y0, x1, y1 = cut.boxes[at]
    assert 0 <= x0 < x1 <= cut.pixels.shape[1]
    assert (y0, y1) == (15, 16)


def test_a_page_without_characters_gives_no_cut():
    sheet = Sheet()
    sheet.text, sheet.boxes = "", []
    assert sheet.cut() == ([], {})


@pytest.mark.parametrize(
    "settings", [LayoutSettings(), dataclasses.replace(LINES, analysis_area=40_000, x_height=3.0, min_x_height=2.0)]
)
def test_pages_that_are_not_cut_into_strips_or_are_reduced_are_refused(settings):
    with pytest.raises(ValueError, match="neither turned nor reduced, and cut with a line_height"):
        Sheet().cut(settings=settings)


def test_lines_are_cut_as_the_reader_of_the_recipe_cuts_them():
    processor = UnitImageProcessor(**yaml.safe_load(RECIPE.read_text())["image_processor"])
    settings = Reader._default_settings(processor)
    assert dataclasses.replace(settings, max_lines=LINES.max_lines) == LINES  # a strip has one line, whatever it says


# ----------------------------------------------------------------------------------------------------------- PDF pages


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own with a package of three PDFs, one of them for development; nothing held out."""
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "trees" / "open-doc"
    folder.mkdir(parents=True)
    chosen = (
        name
        for name in (f"{number}.pdf" for number in range(1000))
        if zlib.crc32(f"open-doc/{name}".encode()) % 40 == 0
    )
    for seed, name in enumerate(("a.pdf", "b.pdf", next(chosen))):
        pages = [Page().lines(prose(12, 10 * seed + page), 60, 100, 16.0) for page in range(2)]
        (folder / name).write_bytes(write_pdf(pages))
    monkeypatch.setattr(heldout, "validation_text_filter", lambda: heldout.TextFilter(np.array([], dtype=np.uint64)))
    return tmp_path


def drawn_lines():
    return {line for seed in range(3) for page in range(2) for line in prose(12, 10 * seed + page)}


def build(out, **options):
    settings = {"x_height": (8.0, 8.0), "progress": False}
    return lines.build_lines(["open-doc"], out, **(settings | options))


def test_lines_of_a_pdf_are_read_off_its_text_layer(cache):
    report = build(cache / "out")
    rows = list(read_columns(cache / "out", COLUMNS))
    texts = Counter(row["text"] for row in rows)
    assert set(texts) <= drawn_lines()
    assert max(texts.values()) == 1
    assert len(texts) >= 60  # of 72
    assert (report.rows, report.documents, report.pages) == (len(rows), 3, 6)
    for row in rows:
        validate_row(row)
        assert (row["task"], row["kind"], row["split"]) == ("ocr", "document", "train")
        assert row["source"].startswith("open-doc/")
        assert pixels_of(row).shape[0] == 16


def test_the_same_seed_gives_the_same_lines_for_any_number_of_workers(cache):
    for name, options in {"one": {}, "two": {"workers": 2}, "other": {"seed": 1, "x_height": (4.0, 9.0)}}.items():
        build(cache / name, **options)
    one, two, other = ((cache / name / "part-00000.parquet").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_held_out_lines_and_further_rows_are_left_out(cache):
    wanted = drawn_lines()
    report = build(cache / "out", unwanted=lambda text: "garden" in text)
    texts = {row["text"] for row in read_columns(cache / "out", ["text"])}
    assert texts <= {text for text in wanted if "garden" not in text} != wanted
    assert report.refusals["line: held out"] > 0
    build(cache / "few", max_rows=7)
    assert len(list(read_columns(cache / "few", ["text"]))) == 7


def test_pages_that_cannot_be_read_are_counted(cache):
    folder = cache / "cache" / "trees" / "strange-doc"
    folder.mkdir()
    (folder / "empty.pdf").write_bytes(write_pdf([Page().text("Only this.", 60, 100)]))
    report = lines.build_lines(["strange-doc"], cache / "out", progress=False)
    assert report.rows == 0
    assert report.refusals == {"page: little text": 1}


def test_development_and_training_documents_are_disjoint_and_all(monkeypatch):
    listed = {name: [(f"doc/{number}.pdf", 3) for number in range(1500)] for name in ("one-doc", "other-doc")}
    monkeypatch.setattr(pdf, "list_documents", listed.get)
    packages = list(listed)
    development, training = lines.development_documents(packages), lines.training_documents(packages)
    assert not development & training
    assert development | training == {f"{name}/{document}" for name in packages for document, _ in listed[name]}
    assert 45 < len(development) < 110  # of 3,000 one in 40
    # a document stays where it is, whatever other packages are named
    assert lines.development_documents(packages[:1]) == {name for name in development if name.startswith("one-doc/")}


# ------------------------------------------------------------------------------------------ made pages and blank lines


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    path = tmp_path_factory.mktemp("font") / "aileron.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)  # the font that Pillow carries
    words = prose(3)[0].split()
    return made_chunks.Resources({"Aileron": [str(path)]}, words, ["aardvark", "zygote", "quick", "jumps"])


def test_made_lines_are_lines_of_their_page(resources):
    rows = {index: lines.made_line_rows(0, index, resources) for index in range(30)}
    assert sum(map(len, rows.values())) >= 30
    for index, several in rows.items():
        drawing = made_chunks.draw_dense(np.random.default_rng([0, index, 7]), resources)
        for row in several:
            validate_row(row)
            assert any(row["text"] in line for line in drawing.text.split("\n"))
            assert row["source"] == f"made-lines/0#{index} (Aileron)"
            assert heldout._families(row["source"]) == ["Aileron"]  # so that leaks of fonts are found
            assert pixels_of(row).shape[0] == 16


def test_made_lines_are_a_function_of_seed_and_index(resources):
    assert lines.made_line_rows(5, 17, resources) == lines.made_line_rows(5, 17, resources)
    assert lines.made_line_rows(5, 17, resources) != lines.made_line_rows(5, 18, resources)
    assert lines.made_line_rows(5, 17, resources) != lines.made_line_rows(6, 17, resources)


def row_of(index):
    pixels = np.full((16, 32), 255, np.uint8)
    told = {"task": "ocr", "kind": "document", "license": "", "split": "train"}
    return make_row(pixels, f"row {index}", source=f"made-lines/0#{index} (Aileron)", **told)


def test_pages_are_drawn_until_there_are_lines_enough(resources, tmp_path, monkeypatch):
    drawn = []

    def draw(seed, index, *others):
        drawn.append(index)
        return [row_of(index), row_of(index)] if index in (7, 9) else []

    monkeypatch.setattr(lines, "load_resources", lambda split: resources)
    monkeypatch.setattr(lines, "made_line_rows", draw)
    assert lines.build_made_lines(tmp_path / "three", 3, progress=False).rows == 3
    assert [row["text"] for row in read_columns(tmp_path / "three", ["text"])] == ["row 7", "row 7", "row 9"]
    drawn.clear()
    assert lines.build_made_lines(tmp_path / "six", 6, progress=False).rows == 4
    assert len(drawn) == 60  # and no further, where next to none give lines


def picture(seed):
    """Rows of little shapes, which look like lines of letters to the cutting."""
    image = Image.new("RGB", (200, 160), (230, 240, 220))
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(seed)
    for row in range(5):
        for column in range(12):
            x, y, high = 10 + 15 * column, 10 + 30 * row, int(rng.integers(9, 16))
            draw.ellipse((x, y + 16 - high, x + 9, y + 16), outline=(20, 40, 60), width=3)
    return np.asarray(image)


@pytest.fixture
def pictures(tmp_path):
    told = {"task": "caption", "kind": "natural", "license": "CC0", "split": "train"}
    captions = ["A chain.", "A stop sign.", "The letter A."]
    rows = [make_row(picture(index), text, source=f"drawn/{index}", **told) for index, text in enumerate(captions)]
    write_shards(rows, tmp_path / "pictures")
    return tmp_path / "pictures"


def test_blank_lines_are_strips_with_an_empty_text(pictures):
    rows = list(lines.blank_line_rows(pictures, 30, seed=3))
    assert len(rows) == 30
    for row in rows:
        validate_row(row)
        assert (row["text"], row["char_boxes"], row["words"]) == ("", [], [])
        assert (row["task"], row["kind"], row["split"]) == ("ocr", "document", "train")
        assert pixels_of(row).shape[0] == 16
        assert row["source"].endswith((" of drawn/0", " of made-pages/blank"))  # the others promise something to read
    assert any(row["source"].endswith(" of drawn/0") and row["license"] == "CC0" for row in rows)


def test_the_same_seed_gives_the_same_blank_lines(pictures, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert lines.build_blank_lines(pictures, tmp_path / name, 8, seed).rows == 8
    a, b, c = ([row["image"]["bytes"] for row in read_columns(tmp_path / name, ["image"])] for name in "abc")
    assert a == b != c


def test_pictures_that_give_no_line_are_refused_in_place_of_a_search_without_end(tmp_path, monkeypatch):
    told = {"task": "caption", "kind": "natural", "source": "x", "license": "", "split": "train"}
    plain = np.full((40, 60, 3), 255, np.uint8)
    write_shards([make_row(plain, "Snow.", **told)], tmp_path / "plain")
    write_shards([make_row(plain, "A sign.", **told)], tmp_path / "signs")
    monkeypatch.setattr(lines, "FRUITLESS", 20)
    monkeypatch.setattr(lines, "draw_blank", lambda rng, kind: np.full((30, 80), 255.0, np.float32))
    with pytest.raises(ValueError, match="in 20 pictures and papers nothing looks like a line"):
        list(lines.blank_line_rows(tmp_path / "plain", 1, 0))
    with pytest.raises(ValueError, match="no picture without something to read"):
        list(lines.blank_line_rows(tmp_path / "signs", 1, 0))


# -------------------------------------------------------------------------------------------------------- command line


def unit(*arguments):
    return main(["data", "lines", *map(str, arguments)])


def test_the_command_builds_sets_whose_documents_differ(cache, capsys):
    sets = ["lines-train", "lines-development"]
    assert unit("--only", *reversed(sets), "--packages", "open-doc", "--out", cache / "out") == 0
    said = capsys.readouterr().out.splitlines()
    assert [Path(line.split(":")[0]).name for line in said] == sets
    sources = [
        {row["source"].split("#")[0] for row in read_columns(cache / "out" / name, ["source"])} for name in sets
    ]
    assert sources[0] == {"open-doc/a.pdf", "open-doc/b.pdf"}
    assert len(sources[1]) == 1
    assert not sources[0] & sources[1]


def listing(path, *names):
    path.write_text("# those with the most text\n" + "".join(f"open-doc/{name}\n" for name in names))
    return path


def test_the_command_builds_of_listed_documents_and_so_many_pages(cache):
    development = next((cache / "cache" / "trees" / "open-doc").glob("[0-9]*.pdf")).name
    arguments = ["--packages", "open-doc", "--out", cache / "out", "--pages-per-pdf", 1]
    listed = listing(cache / "list.txt", "b.pdf", development)
    assert unit("--only", "lines-train", "lines-development", *arguments, "--documents", listed) == 0
    sources = [
        {row["source"] for row in read_columns(cache / "out" / name, ["source"])}
        for name in ("lines-train", "lines-development")
    ]
    # one page of either, and the one for development is trained on by nobody, whatever the list says
    assert [{source.split("#")[0] for source in each} for each in sources] == [
        {"open-doc/b.pdf"},
        {f"open-doc/{development}"},
    ]
    assert [len(each) for each in sources] == [1, 1]


def test_a_list_of_documents_that_is_wrong_is_told_in_one_line(cache, capsys):
    development = next((cache / "cache" / "trees" / "open-doc").glob("[0-9]*.pdf")).name
    for file, words in (
        (
            listing(cache / "far.txt", "a.pdf", "z.pdf"),
            "1 documents of the list are not in the packages, open-doc/z.pdf",
        ),
        (listing(cache / "only.txt", development), "lines-train: there is no document for it in open-doc"),
        (listing(cache / "none.txt"), "names no document"),
        (cache / "nowhere.txt", "there is no list of documents"),
    ):
        arguments = ["--only", "lines-train", "--packages", "open-doc", "--out", cache / "out", "--documents", file]
        assert unit(*arguments) == 2
        said = capsys.readouterr().err
        assert words in said.splitlines()[-1]
        assert not (cache / "out").exists()


def test_the_command_draws_made_lines(cache, resources, monkeypatch):
    monkeypatch.setattr(lines, "load_resources", lambda split: resources)
    assert unit("--only", "made-lines-train", "--rows", 4, "--seed", 2, "--out", cache / "out") == 0
    rows = list(read_columns(cache / "out" / "made-lines-train", ["source"]))
    assert len(rows) == 4
    assert all(row["source"].startswith("made-lines/2#") for row in rows)


def test_the_command_makes_blank_lines_without_the_held_out_texts(cache, pictures, monkeypatch):
    def unasked():
        raise AssertionError("pictures have no text to compare")

    monkeypatch.setattr(heldout, "validation_text_filter", unasked)
    (cache / "cache" / "data").mkdir()
    pictures.rename(cache / "cache" / "data" / "pictures-train")
    assert unit("--only", "blank-lines-train", "--rows", 4, "--out", cache / "out") == 0
    assert {row["text"] for row in read_columns(cache / "out" / "blank-lines-train", ["text"])} == {""}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--packages", "texlive-humanities-doc"], "held out for validation"),
        (["--only", "blank-lines-train"], "pictures-train holds no parquet files: build the data set first"),
        (["--only", "made-lines-train", "--documents", "x"], "--documents is for lines-train and lines-development"),
        (["--only", "made-lines-train", "--pages-per-pdf", 2], "--pages-per-pdf is for lines-train"),
        ([], "pictures-train holds no parquet files: build the data set first"),  # before the other sets are begun
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(cache, capsys, arguments, words):
    assert unit(*arguments, "--out", cache / "out") == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (cache / "out").exists()


def test_packages_without_a_document_for_development_are_named(cache, capsys):
    folder = cache / "cache" / "trees" / "small-doc"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(write_pdf([Page().lines(prose(12, 1), 60, 100)]))
    assert unit("--only", "lines-development", "--packages", "small-doc", "--out", cache / "out") == 2
    assert "lines-development: there is no document for it in small-doc" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        unit("--only", "lines-validation")
    assert "invalid choice" in capsys.readouterr().err


def test_leaks_are_looked_for_in_the_development_set_too(cache, capsys):
    told = {"task": "ocr", "kind": "document", "license": ""}
    text = "seven words that stand in both of them"
    for name, split, tone in (("lines-development", "train", 0), ("blocks-validation", "validation", 9)):
        row = make_row(np.full((16, 32), tone, np.uint8), text, source=name, split=split, **told)
        write_shards([row], cache / "cache" / "data" / name)
    assert main(["data", "check-leaks"]) == 1
    assert "lines-development: shares text with blocks-validation" in capsys.readouterr().out
