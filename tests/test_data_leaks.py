"""`unit data check-leaks`: nothing of the shipped samples in each other, and each kind of leak found where planted."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFont

pytest.importorskip("pyarrow")

from training.data import heldout
from training.data.heldout import LeakCheck, find_leaks, font_marks
from training.data.pictures import HeldOut
from training.data.refusals import Refusals
from training.data.schema import make_row, write_shards
from unit_cli.__main__ import main

SAMPLES = Path(__file__).resolve().parents[1] / "spaces_demo" / "samples"
LIST = Path(heldout.__file__).with_name("heldout.yaml")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Whether somebody has built the sets on this machine must not decide a test."""
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))


def row(pixels, text, **changes):
    told = {"task": "ocr", "kind": "document", "source": "a set/row", "license": "CC0-1.0", "split": "train"}
    return make_row(np.asarray(pixels), text, **(told | changes))


def noise(seed, size=(40, 60)):
    return np.random.default_rng(seed).integers(0, 256, size=size, dtype=np.uint8)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """The shipped pages as a set to train on, the shipped pictures as one to validate on, and a page of noise each."""
    folder = tmp_path_factory.mktemp("samples")
    pages, pictures = [row(noise(0), "One line of text that stands in training only")], []
    for path in sorted((SAMPLES / "pages").glob("*.png")):
        with Image.open(path) as page:
            pages.append(row(page.convert("L"), path.with_suffix(".txt").read_text(), source=f"pages/{path.name}"))
    picture = {"task": "caption", "kind": "natural", "split": "validation"}
    for path in sorted((SAMPLES / "pictures").glob("*.jpg")):
        with Image.open(path) as image:
            pictures.append(row(image.convert("RGB"), f"a {path.stem}", source=f"pictures/{path.name}", **picture))
    write_shards(pages, folder / "pages-train")
    write_shards(pictures, folder / "pictures-validation")
    write_shards(
        [row(noise(1), "Another that validation alone has in it", split="validation")], folder / "b-validation"
    )
    return folder


def test_the_shipped_samples_have_nothing_of_each_other(samples, capsys):
    arguments = ["--train", f"{samples}/pages-train", "--validation", f"{samples}/pictures-validation"]
    assert main(["data", "check-leaks", *arguments, f"{samples}/b-validation"]) == 0
    said = capsys.readouterr().out
    assert "no leaks of pictures-validation, b-validation into pages-train" in said
    assert "7  validation rows" in said  # six pictures and a page


def planted():
    """Rows that leak, each with what is to be said of it."""
    dog = Image.open(SAMPLES / "pictures" / "dog.jpg").convert("RGB")
    smaller = dog.resize((dog.width // 2, dog.height // 2), Image.Resampling.BILINEAR)
    jpeg = io.BytesIO()
    smaller.save(jpeg, "JPEG", quality=40)
    held = "Another that validation alone has in it"
    picture = {"task": "caption", "kind": "natural"}
    yield "pixels", row(noise(1), "quite another text"), "the same image as a set/row"
    yield "picture", row(dog, "a German shepherd", **picture), "the same image as pictures/dog.jpg"
    yield "look", row(Image.open(jpeg), "a hound", **picture), "looks like pictures/dog.jpg"
    yield "line", row(noise(2), f"First line\n{held.upper()}!\nlast line"), "shares text with a set/row"
    yield "run", row(noise(3), "see: another that validation alone\nhas in it, and more"), "shares text with a set/row"
    yield "caption", row(noise(4), held, **picture), "shares text with a set/row"
    yield "package", row(noise(5), "a", source="texlive-metapost-doc/a.pdf#3"), "from a held-out package"
    markdown = "made-markdown/npm/express@4.0.0/History.md#1 (Lato)"
    yield "markdown", row(noise(7), "c", source=markdown), "from a held-out package"
    font = "made-pages/letter/0#3 (Lato; Vollkorn SemiBold)"
    yield "font", row(noise(6), "b", source=font), "drawn in a held-out font (Vollkorn SemiBold)"


@pytest.mark.parametrize(("leak", "said"), [pytest.param(*rest, id=name) for name, *rest in planted()])
def test_each_kind_of_leak_is_found(samples, tmp_path, leak, said):
    write_shards([row(noise(9), "nothing wrong here at all, in this row"), leak], tmp_path / "train")
    validation = [samples / "pictures-validation", samples / "b-validation"]
    found = find_leaks([tmp_path / "train"], validation, progress=False)
    assert len(found) == 1
    assert found[0] == f"{leak['source']}: {said}"


def test_a_leak_ends_with_1_and_a_missing_folder_with_2(samples, capsys):
    folder = str(samples / "b-validation")
    assert main(["data", "check-leaks", "--train", folder, "--validation", folder]) == 1
    assert "1 leaks of b-validation into b-validation" in capsys.readouterr().out
    assert main(["data", "check-leaks", "--train", "/no/such", "--validation", folder]) == 2
    assert "/no/such holds no parquet files" in capsys.readouterr().err


def test_another_file_format_of_the_same_pixels_is_the_same_image(tmp_path):
    pixels = noise(7)
    other = row(pixels, "one text")
    webp = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(webp, "WEBP", lossless=True)
    other["image"] = {"bytes": webp.getvalue(), "path": None}
    check = LeakCheck()
    check.hold_out(row(np.stack([pixels] * 3, axis=-1), "another text"))
    assert "the same image" in check.leak_of(other)
    assert check.leak_of(row(255 - pixels, "one text")) is None


def test_blank_canvases_are_alike_and_no_leak():
    check = LeakCheck()
    blank = row(np.full((40, 60), 255, dtype=np.uint8), "")
    check.hold_out(blank)
    assert check.leak_of(blank) is None


def test_texts_of_held_out_packages_that_no_set_has_are_compared_too():
    mark = next(heldout.fingerprints("Set nowhere but in the package itself"))
    assert LeakCheck().leak_of(row(noise(1), "Set nowhere but in the package itself")) is None
    check = LeakCheck(frozenset({mark}))
    assert "with a held-out package" in check.leak_of(row(noise(1), "Set nowhere but in the package itself"))


def test_a_held_out_font_under_another_name_is_found(tmp_path):
    pytest.importorskip("skia")
    letters = ImageFont.load_default(10).font_bytes  # the font that Pillow carries
    (tmp_path / "vollkorn.ttf").write_bytes(letters)
    (tmp_path / "renamed.ttf").write_bytes(letters + b"\0" * 4)  # another file, the same letters
    files, other = [str(tmp_path / name) for name in ("vollkorn.ttf", "renamed.ttf")], None
    assert font_marks(files[0])[0] != font_marks(files[1])[0]
    assert font_marks(files[0])[1] == font_marks(files[1])[1]
    try:
        import matplotlib

        other = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    except ImportError:
        pass
    fonts = {"Vollkorn": [files[0]], "Honest": [files[1]]} | ({"DejaVu Sans": [other]} if other else {})
    check = LeakCheck(fonts=fonts)
    for family in ("Honest", "DejaVu Sans"):
        assert check.leak_of(row(noise(2), "x", source=f"made-pages/list/0#1 ({family})")) is None
    assert check.font_leaks() == ["font Honest (renamed.ttf): the same letters as the held-out Vollkorn"]
    assert LeakCheck(fonts=fonts).font_leaks() == []  # fonts that nobody trained on


def test_a_font_that_validation_rows_use_is_held_out_as_well(tmp_path):
    pytest.importorskip("skia")
    (tmp_path / "a.ttf").write_bytes(ImageFont.load_default(10).font_bytes)
    check = LeakCheck(fonts={"Lato": [str(tmp_path / "a.ttf")], "Latin": [str(tmp_path / "a.ttf")]})
    check.hold_out(row(noise(1), "v", source="made-pages/list/0#1 (Lato)", split="validation"))
    assert check.leak_of(row(noise(2), "t", source="made-pages/list/0#2 (Latin)")) is None
    assert check.font_leaks() == ["font Latin (a.ttf): the same letters as the held-out Lato"]


CHECKED_FROM_THE_HUB = """
import json
from training.data.heldout import find_leaks
print(json.dumps(find_leaks(["alice/dots"], ["alice/dots:validation"], progress=False)))
"""


def test_data_of_any_layout_is_compared_as_a_recipe_describes_it(samples, tmp_path, capsys):
    letters = tmp_path / "letters"
    letters.mkdir()
    for name, text in (("a", "nothing wrong here at all"), ("b", "Another that validation alone has in it")):
        Image.fromarray(noise(ord(name))).save(letters / f"{name}.png")
        (letters / f"{name}.txt").write_text(text)
    (letters / "c.png").write_bytes(b"no picture")
    (letters / "c.txt").write_text("text of no picture")
    described = {"path": str(letters), "layout": "folder", "task": "ocr", "kind": "document"}
    recipe = {"stage": "inter_scale", "data": {"patches": 9, "sources": [{"weight": 2, "dataset": described}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--train", str(tmp_path / "recipe.yaml"), "--validation", f"{samples}/b-validation"]
    assert main(["data", "check-leaks", *arguments]) == 1
    said = capsys.readouterr().out
    assert f"{letters}#b.png: shares text with a set/row" in said
    assert "2  training rows" in said
    assert f"{letters}: 2 rows, 1 refused: image: not an image that can be read 1" in said
    assert "1 leaks of b-validation into letters" in said


def test_a_row_whose_image_is_damaged_is_counted_and_not_the_end(samples, tmp_path):
    damaged = row(noise(8), "damaged")
    damaged["image"]["bytes"] = damaged["image"]["bytes"][:60]
    write_shards([damaged, *(row(noise(9 + n), f"row number {n}") for n in range(3))], tmp_path / "train")
    refusals = Refusals()
    assert find_leaks([tmp_path / "train"], [samples / "b-validation"], progress=False, refusals=refusals) == []
    counts = refusals.as_dict()[str(tmp_path / "train")]
    assert counts["accepted"] == 3
    assert counts["reasons"]["image: cannot be read"]["count"] == 1


def test_sets_on_the_hub_are_streamed(online, tmp_path):
    from huggingface_hub import HfApi

    held = {"split": "validation", "source": "held"}
    write_shards([row(noise(0), "alone"), row(noise(1), "not alone")], tmp_path / "train")
    write_shards([row(noise(1), "in validation", **held)], tmp_path / "validation")
    api = HfApi(endpoint=online.endpoint, token=online.token)
    api.create_repo("alice/dots", repo_type="dataset")
    for split in ("train", "validation"):
        shard, name = tmp_path / split / "part-00000.parquet", f"data/{split}-00000-of-00001.parquet"
        api.upload_file(path_or_fileobj=shard, path_in_repo=name, repo_id="alice/dots", repo_type="dataset")
    root = str(Path(__file__).resolve().parents[1])
    result = online.python(CHECKED_FROM_THE_HUB, cwd=root)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["a set/row: the same image as held"]


def test_one_file_lists_all_that_is_held_out():
    """Packages, fonts and pictures come from `heldout.yaml`, and there is no other list."""
    listed = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    assert sorted(LIST.parent.glob("heldout*.yaml")) == [LIST]
    assert heldout.validation_packages() == listed["documents"]["packages"]
    assert all(heldout.is_heldout_font(family) for family in listed["fonts"]["families"])
    pictures = HeldOut.read()
    assert pictures.words.keys() == {concept["name"] for concept in listed["pictures"]["concepts"]}
    assert pictures.demo == {picture["name"] for picture in listed["pictures"]["demo"]}
    assert LeakCheck().demo.keys() == set(pictures.demo_hashes)
