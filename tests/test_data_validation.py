"""`unit data validate`: what it counts, what it refuses, its exit status, and the sheet it draws."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import languages
from training.data.contact_sheet import contact_sheet, save_sheet
from training.data.schema import make_row, write_shards
from unit_cli.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path_factory.mktemp("unit")))


@pytest.fixture
def _language_by_first_letter(monkeypatch):
    """In place of py3langid, which a test of counting does not need."""
    package, module = types.ModuleType("py3langid"), types.ModuleType("py3langid.langid")
    module.classify = lambda text: ("en" if text[0] == "e" else "de", 0.0)
    monkeypatch.setitem(sys.modules, "py3langid", package)
    monkeypatch.setitem(sys.modules, "py3langid.langid", module)
    languages._identifier.cache_clear()
    yield
    languages._identifier.cache_clear()


def a_row(text, seed=0, width=30, height=10, boxes=False, **changes):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    where = (
        np.array([[0, 0, 0, 0] if c.isspace() else [i, 0, i + 1, 9] for i, c in enumerate(text)]) if boxes else None
    )
    settings = {"task": "ocr", "kind": "document", "source": f"set#{seed}", "license": "CC0-1.0", "split": "train"}
    return make_row(pixels, text, char_boxes=where, **{**settings, **changes})


@pytest.mark.usefixtures("_language_by_first_letter")
def test_the_report_counts_what_the_set_holds(tmp_path, capsys):
    rows = [
        a_row("e" * 40, 1, width=10, boxes=False),
        a_row("d" * 39 + "ж", 2, width=20),
        a_row("e w", 3, width=30, boxes=True),
        a_row("", 3, width=30, license="MIT"),  # the picture of the row before
        a_row("e w", 5, width=1000, task="markdown"),
    ]
    write_shards(rows, tmp_path / "set")
    assert main(["data", "validate", str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert (report["rows"], report["valid"], report["complete"], report["problems"]) == (5, True, True, [])
    assert report["counts"]["tasks"] == {"ocr, document": 4, "markdown, document": 1}
    assert report["counts"]["licences"] == {"CC0-1.0": 4, "MIT": 1}
    assert report["counts"]["languages"] == {"und": 2, "en": 1, "de": 1, "no text": 1}
    assert report["counts"]["scripts"] == {"LATIN": 40 + 39 + 2 + 2, "CYRILLIC": 1}
    assert report["quantiles"]["image width"]["0%"] == 10
    assert report["quantiles"]["image width"]["50%"] == 30
    assert report["quantiles"]["characters"]["100%"] == 40
    assert (report["rows with words"], report["rows with char_boxes"]) == (1, 1)
    assert report["duplicates"] == {"images": 1, "texts": 1, "examples": ["set#3 = set#3"]}
    table = capsys.readouterr().out
    assert "languages       und 40.0%, en 20.0%, de 20.0%, no text 20.0%" in table
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 500


def test_a_share_of_bad_rows_is_reported_and_fails_when_it_is_too_large(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (9, 9)).save(folder / f"{number}.png")
        if number:
            (folder / f"{number}.txt").write_text("fine")
    command = ["data", "validate", str(folder), "--layout", "folder", "--task", "ocr", "--kind", "document"]
    assert main([*command, "--out", str(tmp_path / "a"), "--max-refused", "0.1"]) == 0
    assert main([*command, "--out", str(tmp_path / "b")]) == 1
    table = capsys.readouterr().out
    assert "1 of 10 rows were refused, more than the 5% that may be" in table
    report = json.loads((tmp_path / "b" / "validation.json").read_text())
    assert not report["valid"]
    assert report["refused"][str(folder)]["reasons"] == {
        "text: no .txt beside the image": {"count": 1, "examples": ["0.png: 0.txt"]}
    }


def test_one_row_that_violates_our_schema_fails(tmp_path, capsys):
    rows = [a_row("fine", seed) for seed in range(40)]
    rows[7]["words"] = [{"text": "far", "box": [0, 0, 500, 5]}]
    write_shards(rows, tmp_path / "set")
    assert main(["data", "validate", str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 1
    assert "schema: words reach beyond the image (1 times, e.g. set#7" in capsys.readouterr().out


def test_a_limit_looks_at_the_first_rows(tmp_path, capsys):
    write_shards([a_row(str(seed), seed) for seed in range(40)], tmp_path / "set")
    assert main(["data", "validate", str(tmp_path / "set"), "--limit", "9", "--out", str(tmp_path / "out")]) == 0
    assert "9 (the first ones)" in capsys.readouterr().out


def test_a_training_recipes_sources_are_all_looked_at(tmp_path, capsys):
    for name in ("one", "two"):
        write_shards([a_row(name)], tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(f"""
stage: intra_scale
groups:
  - kind: document
    sources:
      - {{path: {tmp_path}/one, weight: 2}}
      - dataset: {{path: {tmp_path}/two, layout: schema}}
  - kind: natural
    sources: [{{path: {tmp_path}/one}}]
""")
    assert main(["data", "validate", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.parent.name for path in tmp_path.glob("out/*/validation.json")) == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name a data set, or a --recipe that does"),
        (["no/such/set"], "there is no folder or file no/such/set"),
        (["x", "--layout", "fundsd"], "dataset.layout must be one of"),
        (["--recipe", "none.yaml"], "there is no recipe at none.yaml"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "validate", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_samples_are_valid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    recipe = "docs/data/samples.yaml"
    assert main(["data", "validate", "--recipe", recipe, "--out", str(tmp_path)]) == 0
    pages, pictures = (json.loads((tmp_path / name / "validation.json").read_text()) for name in ("pages", "pictures"))
    assert (pages["rows"], pages["counts"]["tasks"]) == (4, {"ocr, document": 4})
    assert (pictures["rows"], pictures["counts"]["splits"]) == (6, {"validation": 6})
    assert set(pictures["counts"]["licences"]) == {"public domain", "CC0-1.0"}


def test_the_sheet_shows_the_boxes_of_words_where_they_are():
    page = np.full((100, 100), 255, np.uint8)
    words = [{"text": "x", "box": [20, 40, 60, 80]}]
    row = make_row(page, "x", task="ocr", kind="document", source="s", license="l", split="train", words=words)
    plain = make_row(page, "x", task="ocr", kind="document", source="s", license="l", split="train")
    with_box, without = (np.asarray(contact_sheet([each])).astype(int) for each in (row, plain))
    changed = np.argwhere((with_box != without).any(axis=-1))
    # twice as large on the sheet (the frame begins at 18 px); a box of 40 x 40 px, its last line of pixels within
    (top, left), (bottom, right) = changed.min(axis=0) - 18, changed.max(axis=0) - 18
    assert (left, right) == (40, 119)
    assert (top, bottom) == (80, 159)
    # tinted, not covered
    assert with_box[18 + 120, 18 + 80].min() > 200


def test_a_sheet_is_as_small_as_asked_for(tmp_path):
    rows = [a_row("noise " * 40, seed, 200, 200) for seed in range(15)]
    save_sheet(contact_sheet(rows, "noise"), tmp_path / "sheet.png", max_bytes=150_000)
    assert (tmp_path / "sheet.png").stat().st_size <= 150_000
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet([])
