"""The text sets: what is in them, where it may come from, and how they are read."""

import io
import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageFont

from tests.pdf_files import Page, prose, write_pdf
from training.data import heldout, labelled, scans, sources
from training.data.evaluation_sets import build_blocks, build_pages, foreign_ink
from training.data.refusals import Refusals
from training.data.schema import make_row, read_columns, validate_row, write_shards
from training.evaluation.contract import NotMeasured, Options
from training.evaluation.sets import TextSet, default_sets, group_of, measured_sets, named_set, spread
from unit_cli.__main__ import main

PACKAGE = "texlive-humanities-doc"
COLUMNS = ["image", "text", "task", "kind", "source", "license", "split", "words", "char_boxes", "x_height"]
LOW = set("acemnorsuvwxz")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def numbered(lines, seed):
    """Lines that no other seed has, of many different words."""
    return [f"{line} n{seed}x{number}" for number, line in enumerate(lines)]


@pytest.fixture
def package(cache):
    """Three documents of a held-out package: prose with a heading's distance between two blocks; the third a copy of
    the words of the first."""
    tree = cache / "trees" / PACKAGE
    tree.mkdir(parents=True)
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        pages = []
        for number in range(2):
            own = 10 * seed + number
            page = Page().lines(numbered(prose(3, own, 60), own), 60, 100)
            pages.append(page.lines(numbered(prose(9, own + 50, 70), own + 50), 60, 200))
        if name == "c":
            pages[0].text("another file", 60, 700)
        (tree / f"{name}.pdf").write_bytes(write_pdf(pages))
    return tree


def rows_of(folder):
    rows = list(read_columns(folder, COLUMNS))
    for row in rows:
        validate_row(row)
        assert row["split"] == "validation"
    return rows


def picture(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def test_blocks_are_the_same_at_every_x_height_and_rendered_at_it(package, tmp_path):
    build_blocks(tmp_path / "set", 4, packages=[PACKAGE], heights=(7, 14, 4), progress=False)
    rows = rows_of(tmp_path / "set")
    for at in range(0, len(rows), 3):
        item = rows[at : at + 3]
        assert [row["x_height"] for row in item] == [14, 7, 4]
        assert len({row["text"] for row in item}) == len({row["source"] for row in item}) == 1
        for row in item:
            boxes = np.array(row["char_boxes"]).reshape(-1, 4)
            low = [letter in LOW for letter in row["text"]]
            # boxes are whole pixels outwards: up to two more than the letter
            assert row["x_height"] <= np.median((boxes[:, 3] - boxes[:, 1])[low]) <= row["x_height"] + 2
            assert picture(row).min() < 128
        # margins do not grow with the type
        assert picture(item[0]).shape[1] / 14 < picture(item[2]).shape[1] / 4


def test_every_document_gives_its_first_before_one_gives_its_second_and_copies_give_nothing(package, tmp_path):
    report = build_blocks(tmp_path / "set", 9, packages=[PACKAGE], heights=(10,), progress=False)
    found = [group_of(row["source"]).rpartition("/")[2] for row in rows_of(tmp_path / "set")]
    assert len(found) == 4
    assert sorted(found[:2]) == sorted(found[2:]) == sorted({found[0], "b.pdf"})
    assert found[0] in ("a.pdf", "b.pdf", "c.pdf")
    assert report.refusals["item: repeats another"] >= 1


@pytest.mark.parametrize("build", [build_blocks, build_pages])
def test_nothing_with_a_commonplace_of_training_texts_is_built(build, package, tmp_path, monkeypatch):
    build(tmp_path / "all", 9, packages=[PACKAGE], heights=(10,), progress=False)
    texts = [row["text"] for row in rows_of(tmp_path / "all")]
    commonplace = texts[0].split("\n")[1]
    monkeypatch.setitem(heldout.heldout()["documents"], "shared", [commonplace.upper() + "!"])
    report = build(tmp_path / "fewer", 9, packages=[PACKAGE], heights=(10,), progress=False)
    kept = [row["text"] for row in rows_of(tmp_path / "fewer")]
    assert kept
    assert not any(commonplace in text for text in kept)
    assert report.refusals["item: has a line of a training text"] >= 1


def test_pages_are_whole_and_in_reading_order_and_the_same_for_any_number_of_workers(package, tmp_path):
    for workers in (1, 2):
        build_pages(
            tmp_path / f"set{workers}", 2, packages=[PACKAGE], heights=(10, 5), workers=workers, progress=False
        )
    rows = rows_of(tmp_path / "set1")
    assert rows == rows_of(tmp_path / "set2")
    (row, small), other = rows[:2], rows[2:]
    assert len(other) == 2
    assert group_of(other[0]["source"]) != group_of(row["source"])
    document, _, number = row["source"].rpartition("#")
    own = {"a": 10, "b": 20, "c": 10}[document[-5]] + int(number) - 1
    expected = numbered(prose(3, own, 60), own) + numbered(prose(9, own + 50, 70), own + 50)
    lines = row["text"].split("\n")
    assert [line for line in lines if line != "another file"] == expected
    assert small["text"] == row["text"]
    # A4 in points, Helvetica's x-height is 0.523 of 10 points; pdfium measures ink, a little more
    assert picture(row).shape[0] == pytest.approx(10 * 842 / 5.3, rel=0.05)
    assert picture(small).shape[0] == pytest.approx(picture(row).shape[0] / 2, abs=1)


def test_nothing_is_built_from_what_may_have_been_trained_on(tmp_path):
    for builder in (build_blocks, build_pages):
        with pytest.raises(ValueError, match="texlive-science-doc: not held out for validation"):
            builder(tmp_path / "set", packages=["texlive-science-doc", PACKAGE])
    assert not (tmp_path / "set").exists()


def test_made_pages_are_refused_in_any_font_that_is_not_held_out(tmp_path):
    pytest.importorskip("skia")
    from training.data.evaluation_made import build_syn
    from training.data.made_pages import PageResources
    from training.data.pages.corpus import Corpus

    font = tmp_path / "font.ttf"
    font.write_bytes(ImageFont.load_default(10).font_bytes)
    corpus = Corpus(" ".join(prose(200, 3)))
    with pytest.raises(ValueError, match="Aileron: not held out"):
        build_syn("syn-s", tmp_path / "set", 1, resources=PageResources({"Aileron": [str(font)]}, corpus))
    held = PageResources({"Karla": [str(font)]}, corpus)
    build_syn("syn-l", tmp_path / "l", 2, resources=held, progress=False)
    build_syn("syn-s", tmp_path / "s", 4, resources=held, progress=False)
    dense, sparse = rows_of(tmp_path / "l"), rows_of(tmp_path / "s")
    assert (len(dense), len(sparse)) == (2, 4)
    assert all(len(row["text"].split()) > 400 and row["x_height"] <= 8 for row in dense)
    assert all(len(row["text"].split()) <= 100 and row["x_height"] >= 14 for row in sparse)


def test_a_set_comes_in_parts_of_so_many_pixels(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from training.evaluation import sets

    monkeypatch.setattr(sets.TextSet, "_rows", lambda self, limit: ((number, {}) for number in range(5)))
    made = [SimpleNamespace(image=SimpleNamespace(width=10, height=10)) for _ in range(4)] + [
        SimpleNamespace(image=None)
    ]
    monkeypatch.setattr(sets, "_sample", lambda index, *_: made[index])
    text_set = sets.TextSet("made", (tmp_path,))
    assert [len(part) for part in text_set.parts(pixels=150)] == [2, 2, 1]
    assert list(text_set.parts(pixels=1_000)) == [made] == [text_set.samples()]


def test_foreign_ink_is_the_share_outside_of_the_boxes():
    pixels = np.full((40, 40), 255, np.uint8)
    pixels[2:6, 2:6] = 0  # 16 pixels, in a box
    pixels[20:22, 20:22] = 0  # 4 outside
    assert foreign_ink(pixels, np.array([[2, 2, 6, 6]])) == 4 / 20
    assert foreign_ink(np.full((9, 9), 255, np.uint8), np.zeros((0, 4), int)) == 0


def test_blank_sheets_have_no_text_and_are_the_same_every_time(tmp_path):
    pytest.importorskip("skia")
    from training.data.evaluation_made import build_blank

    build_blank(tmp_path / "one", 18)
    build_blank(tmp_path / "two", 18)
    rows = rows_of(tmp_path / "one")
    assert rows == rows_of(tmp_path / "two")
    assert len(rows) == 18
    assert {row["text"] for row in rows} == {""}
    kinds = {row["source"].split("/")[1] for row in rows}
    assert {"white", "grey", "scanner noise", "paper texture", "scan border", "ruled"} < kinds
    assert (picture(rows[0]) == 255).all()


# ------------------------------------------------------------------------------------------------------------- scans


def test_scans_are_cut_along_their_zones(cache):
    folder = cache / "sources" / "tesseract" / "tesseract_5.orig-test" / "testing"
    folder.mkdir(parents=True)
    words = [f"word{number}" for number in range(16)]
    for name in scans.PAGES:
        pixels = np.full((200, 300), 255, np.uint8)
        pixels[20:40, 10:110] = 0
        Image.fromarray(pixels).convert("1").save(folder / f"{name}.tif")
        (folder / f"{name}.uzn").write_text(" 10 20 100 20 Text\n 10 100 60 50 Caption\n")
        (folder / f"{name}.txt").write_text(f"  {' '.join(words)}\nCaf~~ divi-\nded\n\n\n54 ~ T R A V E L  D A Y S\n")
    Image.new("1", (30, 20), 1).save(folder / "phototest.tif")
    (folder / "phototest.gold.txt").write_text("quick\n\nbrown\n")
    pages, blocks = cache / "pages", cache / "blocks"
    scans.build_scans(pages)
    scans.build_scans(blocks, blocks=True)
    texts = [row["text"] for row in rows_of(pages)]
    assert texts[0] == f"{' '.join(words)}\nCaf divi-\nded\n54 TRAVEL DAYS"
    assert texts[2] == "quick\nbrown"
    row, _ = rows_of(blocks)  # one of each page: the caption is short
    assert row["text"] == f"{' '.join(words)}\nCaf divi-\nded"
    expected = np.full((36, 116), 255)
    expected[8:28, 8:108] = 0
    assert (picture(row) == expected).all()


def test_a_text_with_more_parts_than_zones_is_refused(tmp_path):
    (tmp_path / "p.uzn").write_text("1 1 5 5 Text\n")
    (tmp_path / "p.txt").write_text("one\n\n\ntwo\n")
    with pytest.raises(RuntimeError, match="p: 2 parts of the text, but 1 zones"):
        scans.read_zones(tmp_path, "p")


def test_a_source_package_is_fetched_through_lists_of_our_own_and_unpacked_safely(cache, tmp_path, monkeypatch):
    etc = tmp_path / "apt"
    (etc / "sources.list.d").mkdir(parents=True)
    (etc / "sources.list").write_text("# deb of old\ndeb [arch=amd64] http://a.example stable main\n")
    (etc / "sources.list.d" / "b.sources").write_text("Types: deb\nURIs: http://b.example\nSuites: stable\n")
    (etc / "sources.list.d" / "c.list.off").write_text("deb http://c.example stable main\n")
    entries = sources._apt_entries
    monkeypatch.setattr(sources, "_apt_entries", lambda: entries(etc))
    monkeypatch.setattr(sources.shutil, "which", lambda tool: f"/bin/{tool}")
    asked = []

    def apt(command, cwd=None, **_):
        settings = dict(part.split("=", 1) for part in command if "::" in part)
        parts = {
            path.name: path.read_text() for path in sorted(sources.Path(settings["Dir::Etc::SourceParts"]).iterdir())
        }
        asked.append((command[-1], parts, settings["Dir::State::Lists"]))
        if command[-1] == "some-doc":
            with tarfile.open(cwd / "some-doc_1.orig-test.tar.xz", "w:xz") as tar:
                for name in ("some-1/scans/a.txt", "some-1/../../evil", "some-1//evil"):
                    entry = tarfile.TarInfo(name)
                    entry.size = 2
                    tar.addfile(entry, io.BytesIO(b"ok"))
                link = tarfile.TarInfo("some-1/link")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
            (cwd / "some-doc_1.orig-test.tar.xz.asc").write_text("signature")
        return subprocess.CompletedProcess(command, 100 if command[-1] == "update" else 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", apt)
    tree = sources.fetch_deb_source("some-doc")
    assert [path.relative_to(tree).as_posix() for path in tree.rglob("*") if not path.is_dir()] == [
        "some-doc_1.orig-test/scans/a.txt"
    ]
    assert [name for name, _, _ in asked] == ["update", "some-doc"]
    assert asked[0][1] == {
        "b.sources": "Types: deb-src\nURIs: http://b.example\nSuites: stable\n",
        "sources.list": "# deb of old\ndeb-src [arch=amd64] http://a.example stable main\n",
    }
    assert not asked[0][2].startswith("/var")
    assert sources.fetch_deb_source("some-doc") == tree
    assert len(asked) == 2
    with pytest.raises(ValueError, match="is not the name of a Debian package"):
        sources.fetch_deb_source("../etc")


# ---------------------------------------------------------------------------------------------- FUNSD, SROIE and CORD


def save_image(path, size=(200, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 250).save(path)


def funsd(root):
    """The layout of the set's own archive."""
    for part, word in (("testing_data", "Total:"), ("training_data", "learnt")):
        save_image(root / part / "images" / "82092117.png")
        fields = [
            {
                "box": [20, 50, 140, 60],
                "text": f"{word} 12.50",
                "label": "question",
                "words": [{"box": [20, 50, 60, 60], "text": word}, {"box": [100, 51, 140, 61], "text": "12.50"}],
                "linking": [[0, 1]],
                "id": 0,
            },
            {"box": [20, 11, 60, 21], "text": "Date", "label": "other", "linking": [], "id": 1}
            | {"words": [{"box": [20, 11, 60, 21], "text": "Date"}, {"box": [0, 0, 0, 0], "text": ""}]},
        ]
        (root / part / "annotations").mkdir()
        (root / part / "annotations" / "82092117.json").write_text(json.dumps({"form": fields}))
    return "Date\nTotal: 12.50"


def sroie(root):
    save_image(root / "img" / "000.jpg")
    (root / "box").mkdir()
    (root / "box" / "000.csv").write_text(
        "20,50,90,50,90,60,20,60,TOTAL, INCL. 6% GST\n120,50,150,50,150,60,120,60,9.00\n"
        "20,10,80,10,80,20,20,20,CAFÉ,\n",
        encoding="utf-8",
    )
    (root / "key").mkdir()
    (root / "key" / "000.json").write_text("{}")
    return "CAFÉ,\nTOTAL, INCL. 6% GST 9.00"


def sroie_beside(root):
    sroie(root)
    text = (root / "box" / "000.csv").read_text(encoding="utf-8")
    (root / "img" / "000.jpg").rename(root / "X1.jpg")
    (root / "X1.txt").write_text(text, encoding="utf-8")
    shutil.rmtree(root / "box")
    return "CAFÉ,\nTOTAL, INCL. 6% GST 9.00"


def cord(root):
    for part, price in (("test", "5,000"), ("train", "1")):
        save_image(root / part / "image" / "receipt_00000.png")
        quad = {"x1": 60, "y1": 30, "x2": 90, "y2": 30, "x3": 90, "y3": 40, "x4": 60, "y4": 40}
        name = {**quad, "x1": 5, "x2": 40, "x3": 40, "x4": 5}
        line = {"words": [{"quad": quad, "text": price, "is_key": 0}], "category": "total.total_price"}
        other = {"words": [{"quad": name, "text": "TEA", "is_key": 0}], "category": "menu.nm"}
        (root / part / "json").mkdir()
        (root / part / "json" / "receipt_00000.json").write_text(json.dumps({"valid_line": [line, other]}))
    return "TEA 5,000"


def beside(root):
    save_image(root / "deep" / "one.tif")
    (root / "deep" / "one.txt").write_text("\ufeffWhat stands there,\nin two lines\n", encoding="utf-8")
    save_image(root / "unlabelled.png")
    return "What stands there,\nin two lines"


def hub_parquet(root):
    """As a copy of a set has it on the Hub: boxes in thousandths, files named by split."""
    import datasets

    def rows(word):
        content = io.BytesIO()
        Image.new("RGB", (200, 100), "white").save(content, "PNG")
        return datasets.Dataset.from_dict(
            {
                "id": ["0"],
                "tokens": [[word, "Date"]],
                "bboxes": [[[100, 500, 300, 600], [100, 110, 300, 210]]],
                "ner_tags": [[0, 0]],
                "image": [{"bytes": content.getvalue(), "path": None}],
            }
        ).cast_column("image", datasets.Image())

    (root / "data").mkdir(parents=True)
    rows("Total").to_parquet(root / "data" / "test-00000-of-00001.parquet")
    rows("learnt").to_parquet(root / "data" / "train-00000-of-00001.parquet")
    return "Date\nTotal"


def hub_cord(root):
    import datasets

    quad = {"x1": 60, "y1": 30, "x2": 90, "y2": 30, "x3": 90, "y3": 40, "x4": 60, "y4": 40}
    truth = {"gt_parse": {}, "valid_line": [{"words": [{"quad": quad, "text": "9.00"}], "category": "total"}]}
    content = io.BytesIO()
    Image.new("RGB", (200, 100), "white").save(content, "PNG")
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": content.getvalue(), "path": None}], "ground_truth": [json.dumps(truth)]}
    )
    root.mkdir()
    made.cast_column("image", datasets.Image()).to_parquet(root / "test-00000-of-00001-9c20.parquet")
    return "9.00"


LAYOUTS = {
    "funsd": funsd,
    "sroie": sroie,
    "sroie beside": sroie_beside,
    "cord": cord,
    "beside": beside,
    "hub": hub_parquet,
    "cord on the hub": hub_cord,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_test_part_of_a_set_is_read_as_it_is_published(layout, tmp_path):
    expected = LAYOUTS[layout](tmp_path / "set")
    (sample,) = named_set(f"mine={tmp_path / 'set'}").samples()
    assert sample.text == expected
    assert sample.image.size == (200, 100)
    assert not sample.error
    labelled.build_labelled("mine", tmp_path / "built", str(tmp_path / "set"), progress=False)
    (row,) = rows_of(tmp_path / "built")
    assert row["text"] == expected
    assert row["source"].startswith("mine/")
    assert str(tmp_path) not in row["source"]
    (again,) = named_set(f"mine={tmp_path / 'built'}").samples()
    assert (again.text, again.source) == (sample.text, sample.source)


def test_a_training_part_alone_is_never_read(tmp_path):
    cord(tmp_path / "cord")
    (tmp_path / "cord" / "test").rename(tmp_path / "elsewhere")
    hub_parquet(tmp_path / "hub")
    (tmp_path / "hub" / "data" / "test-00000-of-00001.parquet").unlink()
    for name, line in (("cord", "there is a training part"), ("hub", "files of a training split")):
        with pytest.raises(NotMeasured, match=f"mine: .*{line}"):
            named_set(f"mine={tmp_path / name}").samples()


def test_what_is_broken_is_counted_and_not_dropped_in_silence(tmp_path):
    for number in range(3):
        save_image(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "1.png").write_bytes(b"no image")
    found = named_set(f"mine={tmp_path}").samples()
    assert [sample.text for sample in found] == ["text 0", "text 1", "text 2"]
    assert [sample.image is None for sample in found] == [False, True, False]
    assert found[1].error
    assert not found[0].error
    assert [sample.text for sample in named_set(f"mine={tmp_path}").samples(2)] == ["text 0", "text 1"]
    (tmp_path / "2.txt").write_bytes(b"\xff\xfe\x00")
    refusals = Refusals(1.0)
    assert len(list(labelled.rows_of_folder(tmp_path, refusals))) == 2
    assert refusals.refused == 1
    with pytest.raises(NotMeasured, match="text: not UTF-8"):
        named_set(f"mine={tmp_path}").samples()


def test_a_folder_that_is_no_set_says_what_was_looked_for(tmp_path):
    with pytest.raises(NotMeasured, match=r"mine: .*no layout that is known.*img/ and box/ \(sroie\)"):
        named_set(f"mine={tmp_path}").samples()
    with pytest.raises(ValueError, match="say where it is, mine=FOLDER"):
        labelled.build_labelled("mine", tmp_path / "out")
    with pytest.raises(ValueError, match="no folder"):
        labelled.build_labelled("funsd", tmp_path / "out", "not there")


# ---------------------------------------------------------------------------------------------------- sets as a whole


def row(number, height=0.0, content=None, **other):
    settings = {"task": "ocr", "kind": "document", "source": f"p/a.pdf#{number}", "license": "l"}
    settings |= {"split": "validation", **other}
    pixels = np.full((20, 30 + number), 200, np.uint8)
    return make_row(content or pixels, f"text {number}", x_height=height, **settings)


def test_a_limit_takes_the_same_items_at_every_x_height(tmp_path):
    heights = (14.0, 7.0, 3.0)
    write_shards([row(number, height) for number in range(10) for height in heights], tmp_path / "s", 7)
    (tmp_path / "s" / "report.json").write_text(json.dumps({"settings": {"heights": heights}}))
    text_set = TextSet("blocks", (tmp_path / "s",))
    assert text_set.heights == heights
    found = text_set.samples(3)
    by_height = {height: [one.text for one in found if one.x_height == height] for height in heights}
    assert by_height == {key: ["text 0", "text 3", "text 6"] for key in heights}
    assert [one.index for one in found] == sorted(one.index for one in found)
    assert len(text_set.samples()) == 30
    with pytest.raises(ValueError, match="at least 1"):
        text_set.samples(0)


def test_rows_that_are_trained_on_or_are_no_documents_are_left_aside(tmp_path):
    rows = [row(0), row(1, split="train"), row(2, kind="natural", task="caption"), row(3, task="markdown"), row(4)]
    write_shards(rows, tmp_path / "s")
    assert [one.text for one in TextSet("x", (tmp_path / "s",)).samples()] == ["text 0", "text 4"]
    (sample,) = TextSet("x", (tmp_path / "s",), markdown=True).samples()
    assert sample.text == "text 3"
    assert sample.markdown
    write_shards(rows[1:2], tmp_path / "t")
    with pytest.raises(NotMeasured, match=r"no row in .* is a document of the split 'validation'"):
        TextSet("x", (tmp_path / "t",)).samples()


def test_an_image_that_cannot_be_decoded_is_a_sample_with_an_error(tmp_path):
    write_shards([row(0), row(1, content=b"broken")], tmp_path / "s")
    good, bad = TextSet("x", (tmp_path / "s",)).samples()
    assert good.image.mode == "RGB"
    assert good.image.size == (30, 20)
    assert bad.image is None
    assert bad.text == "text 1"
    assert "UnidentifiedImageError" in bad.error


def test_samples_are_grouped_by_the_document_they_are_of():
    assert group_of("texlive-x/usr/share/a.pdf#12") == "texlive-x/usr/share/a.pdf"
    assert group_of("made-markdown/npm/x@1/README.md#3 (Karla)") == "made-markdown/npm/x@1/README.md"
    assert group_of("tesseract/8087_054.3B.tif#2") == "tesseract/8087_054.3B.tif"
    assert group_of("made-pages/paragraphs/7#1 (Karla)") == "made-pages/paragraphs/7#1 (Karla)"
    assert group_of("funsd/82092117.png") == "funsd/82092117.png"


def test_evenly_spread():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 4) == spread(range(3), None) == [0, 1, 2]


def test_the_default_sets_and_what_takes_their_place(tmp_path):
    names = ["blocks", "pages", "syn-l", "syn-s", "md-val", "scans", "scan-blocks", "blank"]
    assert [one.name for one in default_sets(Options())] == names
    more = default_sets(Options(blocks=tmp_path, sets=("funsd", f"md-val={tmp_path}", "cord=/data/cord")))
    assert [one.name for one in more] == [*names, "funsd", "cord"]
    folders = {one.name: one.folders for one in more}
    assert folders["blocks"] == folders["md-val"] == (tmp_path,)
    with pytest.raises(ValueError, match="no text set called 'funds': name one of blocks"):
        default_sets(Options(sets=("funds",)))


def test_what_is_named_is_read_and_nothing_else(tmp_path):
    def names(**options):
        return [one.name for one in measured_sets(Options(**options))]

    everything = [one.name for one in default_sets(Options())]
    assert names() == everything
    assert names(blocks=tmp_path) == ["blocks"]
    assert names(pages=tmp_path, sets=("funsd", "mine=/data/mine")) == ["pages", "funsd", "mine"]
    assert names(sets=("scans",)) == ["scans"]
    assert names(sets=("default", "funsd")) == [*everything, "funsd"]
    assert names(pictures=tmp_path) == everything  # no text
    assert measured_sets(Options(blocks=tmp_path))[0].folders == (tmp_path,)


def test_a_set_that_is_not_there_names_the_command_that_builds_it():
    lines = {"pages": "unit data evaluation-sets pages", "md-val": "unit data make-markdown --split validation"}
    for name, line in lines.items():
        for call in (named_set(name).fingerprint, named_set(name).samples):
            with pytest.raises(NotMeasured, match=f"{name}: no data set in .*{line}"):
                call()
    assert named_set("pages").heights == ()


def test_the_fingerprint_is_that_of_the_data(tmp_path):
    write_shards([row(0)], tmp_path / "s")
    first = TextSet("x", (tmp_path / "s",)).fingerprint()
    assert first == TextSet("x", (tmp_path / "s",)).fingerprint()
    write_shards([row(1)], tmp_path / "s")
    assert first != TextSet("x", (tmp_path / "s",)).fingerprint()
    save_image(tmp_path / "raw" / "a.png")
    (tmp_path / "raw" / "a.txt").write_text("one")
    raw = TextSet("x", (tmp_path / "raw",)).fingerprint()
    (tmp_path / "raw" / "a.txt").write_text("two")
    assert raw != TextSet("x", (tmp_path / "raw",)).fingerprint()


def test_the_command_builds_what_it_can_and_says_what_it_cannot(tmp_path, capsys, monkeypatch):
    pytest.importorskip("skia")
    monkeypatch.setattr(sources.shutil, "which", lambda tool: None)
    assert main(["data", "evaluation-sets", "scans", "blank", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "scans is left out: cannot download the source of tesseract" in said.err
    assert len(rows_of(tmp_path / "out" / "evaluation-blank")) == 64
    for wrong in ("funds", "mine=", "a/b=c", "pages=/somewhere"):
        assert main(["data", "evaluation-sets", wrong, "--out", str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
