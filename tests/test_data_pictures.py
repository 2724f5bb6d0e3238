"""Claims about the pictures: what is trained on, what never is, and how they are drawn and named."""

import errno
import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.data import pictures
from training.data.pictures import (
    Emoji,
    HeldOut,
    Picture,
    bare,
    build,
    clipart_caption,
    compose,
    encoded,
    hash_distance,
    mentions,
    perceptual_hash,
    rasterise,
    resources,
    shrunk,
    trimmed,
    with_article,
)

SAMPLES = Path(__file__).parent.parent / "spaces_demo" / "samples" / "pictures"


def disc(colour=(200, 30, 30), size=64, box=(8, 8, 56, 56)):
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse(box, fill=(*colour, 255))
    return image


def random_picture(seed, size=64):
    """A cut-out of eight random rectangles: pictures of different seeds look different."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (size, size), (*map(int, rng.integers(0, 256, 3)), 255))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, w, h = (int(v) for v in rng.integers(0, size // 2, 4))
        draw.rectangle((x, y, x + w, y + h), fill=(*map(int, rng.integers(0, 256, 3)), 255))
    return image


def picture(caption, seed=0, style="openclipart", concept="", name=None, keywords=(), image=None):
    return Picture(
        image or random_picture(seed), caption, style, name or f"{caption}-{seed}.svg", "test", "none", concept,
        "", tuple(keywords),
    )  # fmt: skip


ZEBRA = HeldOut(
    words={"zebra": ("zebra",), "fire engine": ("fire engine", "fire truck")},
    unclear=frozenset({"bad.svg"}),
    demo=frozenset(),
    demo_hashes=(),
    demo_distance=12,
)


# -------------------------------------------------------------------------------------------------------- held out


def test_the_list_is_valid_and_spread():
    held_out = HeldOut.read()
    assert len(held_out.words) - len(held_out.not_evaluated) >= 40
    assert len(held_out.demo) == len(held_out.demo_hashes) == 6
    assert all(mentions(name, words) for name, words in held_out.words.items())


def test_similar_kinds_stay_in_training():
    held_out = HeldOut.read()
    animals = ("horse", "deer", "duck", "eagle", "turtle", "bear", "monkey")
    things = (
        "apple",
        "bread",
        "truck",
        "bus",
        "ship",
        "wrench",
        "violin",
        "hat",
        "house",
        "tulip",
        "soccer ball",
        "bowl",
    )
    for kind in (*animals, *things, "ghost", "cloud", "keyboard"):
        assert held_out.place(picture(with_article(kind), concept=kind))[0] == "train", kind


@pytest.mark.parametrize(
    ("shown", "place"),
    [
        (picture("a zebra"), ("validation", "zebra")),
        (picture("two zebras"), ("validation", "zebra")),
        (picture("a fire truck"), ("validation", "fire engine")),
        (picture("a horse", concept="horse"), ("train", "horse")),
        (picture("zebra crossing, a man and a woman walk over the road"), ("dropped", "zebra: not plainly shown")),
        (picture("a man on a zebra"), ("dropped", "zebra: not plainly shown")),
        (picture("an animal", keywords=["zebra"]), ("dropped", "zebra: only a keyword says so")),
        (picture("an animal", name="africa/zebra_01.svg"), ("dropped", "zebra: only a keyword says so")),
        (picture("a zebra", name="bad.svg"), ("dropped", "zebra: unclear")),
        (picture("a zebra in a fire truck"), ("dropped", "zebra: shows several held-out kinds")),
        # An emoji's tags are associations, its name is exact.
        (picture("a horse", style="google", keywords=["zebra"]), ("train", "")),
        (picture("a zebra", style="google", concept="zebra"), ("validation", "zebra")),
        (picture("a zebra face", style="google", concept="zebra face"), ("dropped", "zebra: not plainly shown")),
    ],
)
def test_where_a_picture_goes(shown, place):
    assert ZEBRA.place(shown) == place


def test_a_demo_picture_is_never_trained_on():
    held_out = replace(ZEBRA, demo=frozenset({"dog.webp"}))
    assert held_out.place(picture("a dog", name="dog.webp")) == ("dropped", "demo picture")


@pytest.mark.parametrize("entry", sorted(HeldOut.read().demo, key=str))
def test_each_demo_picture_is_named_in_sources(entry):
    assert entry in (SAMPLES / "SOURCES.md").read_text()


def test_shipped_demo_pictures_match_the_hashes_that_keep_them_out():
    held_out = HeldOut.read()
    files = sorted(SAMPLES.glob("*.jpg"))
    assert len(files) == 6
    for file in files:
        assert file.stat().st_size <= 60_000
        look = perceptual_hash(Image.open(file))
        assert min(hash_distance(look, known) for known in held_out.demo_hashes) <= 4, file.name


def test_training_never_sees_held_out_words_copies_or_demo_pictures(tmp_path):
    import pyarrow.parquet as pq

    demo = random_picture(50)
    held_out = replace(ZEBRA, demo_hashes=(perceptual_hash(trimmed(demo)),))
    source = [
        picture("a striped animal", 1),  # the first zebra's picture under another name
        picture("a zebra", 1), picture("a zebra", 2, style="stamp"), picture("a horse", 3, concept="horse"),
        picture("a cow", 4), picture("a cow", 4), picture("a thing", image=demo.resize((100, 100))),
        picture("a hen", 5, keywords=["zebra"]),
    ]  # fmt: skip
    report = build(tmp_path, 0, source, held_out)
    train = pq.read_table(tmp_path / "pictures-train" / "part-00000.parquet").to_pylist()
    assert sorted(row["text"] for row in train) == ["a cow", "a horse"]
    assert {row["split"] for row in train} == {"train"}
    validation = pq.read_table(tmp_path / "pictures-validation" / "part-00000.parquet").to_pylist()
    assert [(row["concept"], row["style"], row["split"]) for row in validation] == [
        ("zebra", "openclipart", "validation"),
        ("zebra", "stamp", "validation"),
    ]
    assert json.loads((tmp_path / "pictures-validation" / "concept_names.json").read_text()) == ["zebra"]
    assert report["dropped"] == {
        "exact copy": 1,
        "looks like a demo picture": 1,
        "looks like a validation picture": 1,
        "zebra: only a keyword says so": 1,
    }


def test_the_built_training_set_obeys_the_list():
    """Where the data has been built on this machine, all of it is looked through."""
    from training.data.sources import data_folder
    from training.data.targets import rows

    folder = data_folder("pictures-train")
    if not any(folder.glob("*.parquet")):
        pytest.skip("pictures-train has not been built here")
    held_out = HeldOut.read()
    words = [word for of_one in held_out.words.values() for word in of_one]
    content = list(rows(folder, ("text", "concept", "split", "image.path")))
    told = {f"{row['text']} | {row['concept']}" for row in content}
    assert not [text for text in told if mentions(text, words)]
    assert {row["split"] for row in content} == {"train"}
    assert not [row for row in content if row["image"]["path"].partition("/")[2] in held_out.demo]


def test_a_rescaled_copy_of_a_validation_picture_is_not_trained_on(tmp_path):
    copy = random_picture(1).resize((90, 90))
    report = build(tmp_path, 0, [picture("a zebra", 1), picture("stripes", image=copy), picture("a cow", 4)], ZEBRA)
    assert report["train"]["rows"] == 1
    assert report["dropped"]["looks like a validation picture"] == 1


def test_a_kind_that_is_not_evaluated_is_in_neither_set(tmp_path):
    held_out = replace(ZEBRA, not_evaluated=frozenset({"zebra"}))
    source = [picture("a zebra", 1), picture("stripes", 1), picture("a cow", 4), picture("a fire truck", 5)]
    report = build(tmp_path, 0, source, held_out)
    assert (report["train"]["rows"], report["validation"]["rows"]) == (1, 1)
    assert report["dropped"] == {"held out but not evaluated": 1, "looks like a validation picture": 1}


def test_the_same_seed_gives_the_same_file_and_another_another_order(tmp_path):
    source = [picture(f"a thing {i}", i) for i in range(12)]
    contents = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / folder, seed, source, ZEBRA)
        contents.append((tmp_path / folder / "pictures-train" / "part-00000.parquet").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_a_build_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "pictures-train"
    build(tmp_path, 0, [picture("a cow", 4)], ZEBRA)
    (folder / "00000-of-00001.parquet").write_bytes((folder / "part-00000.parquet").read_bytes())  # an older build's
    (folder / "targets.safetensors").write_bytes(b"")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("pyarrow.parquet.write_table", full)
        with pytest.raises(OSError, match="no space left on the disk"):
            build(tmp_path, 0, [picture("a horse", 3)], ZEBRA)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    build(tmp_path, 0, [picture("a horse", 3)], ZEBRA)
    assert sorted(path.name for path in folder.iterdir()) == ["part-00000.parquet", "report.json"]


def test_rows_have_the_columns_of_the_project_and_load_with_datasets(tmp_path):
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    build(tmp_path / "out", 0, [picture("a cow", 4, concept="cow"), picture("a zebra", 1)], ZEBRA)
    data = load_dataset(
        "parquet", data_files=str(tmp_path / "out/pictures-train/*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert isinstance(data.features["image"], ImageFeature)
    row = data[0]
    assert row["image"].mode == "RGBA"
    assert (row["text"], row["task"], row["kind"], row["char_boxes"], row["x_height"]) == (
        "a cow",
        "caption",
        "natural",
        [],
        0,
    )
    assert (row["concept"], row["style"], row["family"], row["split"]) == (
        "cow",
        "openclipart",
        "openclipart",
        "train",
    )


def test_building_again_removes_targets_made_for_the_old_rows(tmp_path):
    source = [picture("a cow", 4), picture("a zebra", 1)]
    build(tmp_path, 0, source, ZEBRA)
    stale = tmp_path / "pictures-train" / "targets.safetensors"
    stale.write_bytes(b"")
    build(tmp_path, 0, source, ZEBRA)
    assert not stale.exists()


def test_the_report_counts_by_source_and_licence(tmp_path, capsys):
    from training.data.schema import make_row, write_shards
    from unit_cli.__main__ import main as unit

    told = {"task": "caption", "kind": "natural"}
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    for split, sources in (("train", ["deb a", "deb a", "npm b"]), ("validation", ["deb a"])):
        rows = [make_row(pixels, "x", source=name, license=f"of {name}", split=split, **told) for name in sources]
        write_shards(rows, tmp_path / f"pictures-{split}")
    assert unit(["data", "pictures", "--report", "--out", str(tmp_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "| deb a | of deb a | 2 | 1 |" in lines
    assert "| npm b | of npm b | 1 | 0 |" in lines
    assert "| all | | 3 | 1 |" in lines
    assert any(line.startswith("not taken: PyPI scikit-image") for line in lines)


def test_a_list_without_words_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("pictures: {concepts: [{name: zebra}], unclear: [], demo: [], demo_distance: 3, distance: 4}\n")
    with pytest.raises(ValueError, match="needs name and words"):
        HeldOut.read(path)


# ----------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("red apple", "a red apple"), ("orange", "an orange"), ("unicorn", "a unicorn"),
        ("hour", "an hour"), ("umbrella", "an umbrella"), ("bus", "a bus"), ("glass of milk", "a glass of milk"),
        ("scissors", "scissors"), ("bread", "bread"), ("the sun", "the sun"), ("two men", "two men"),
        ("salt and pepper", "salt and pepper"), ("fish", "a fish"), ("", ""),
    ],
)  # fmt: skip
def test_articles(phrase, expected):
    assert with_article(phrase) == expected


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("zebra", ["zebra"], True), ("Two Zebras!", ["zebra"], True), ("tomatoes", ["tomato"], True),
        ("animals/zebra_01.svg", ["zebra"], True), ("aZebra", ["zebra"], True), ("Z\u00e9bra", ["zebra"], True),
        ("fire-engine", ["fire engine"], True), ("bowl", ["owl"], False), ("owlish", ["owl"], False),
        ("engine on fire", ["fire engine"], False),
    ],
)  # fmt: skip
def test_mentions(text, words, expected):
    assert mentions(text, words) is expected


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("lion", "a lion"), ("woman: red hair", "a woman with red hair"), ("glasses", "glasses"),
        ("eight o'clock", "a clock showing eight o'clock"), ("face with tears of joy", "a face with tears of joy"),
    ],
)  # fmt: skip
def test_emoji_captions(name, caption):
    assert Emoji(name, "", ()).caption == caption


def test_code_points_are_compared_without_variation_selectors_and_case():
    assert bare("1f3cc_fe0f-200d-2642-FE0F") == "1F3CC-200D-2642"


@pytest.fixture
def lexicon(monkeypatch):
    """A small dictionary and a few kinds, so that no package is needed."""
    words = {"red", "apple", "horse", "cat", "and", "the", "with", "hat", "blue", "slice", "of", "pizza", "sleeping"}
    monkeypatch.setattr(pictures, "_english", lambda: frozenset(words))
    monkeypatch.setattr(
        pictures, "_things", lambda: {"horse": "horse", "cat": "cat", "bird": "bird", "apple": "red apple"}
    )


@pytest.mark.parametrize(
    ("title", "keywords", "stem", "expected"),
    [
        ("Red_Apple 02", [], "", "a red apple"),
        ("Sleeping Cat (B and W)", [], "", "a sleeping cat"),
        ("cavallo", ["animal", "horse"], "", "a horse"),
        ("cavallo", ["horse", "cat"], "", ""),  # which of the two it shows is unknown
        ("acquila reale", ["bird"], "", ""),  # too vague: might be a held-out kind
        ("Clipart by Nicu Buculei - head1", [], "blue_hat", "a blue hat"),
        ("SVG Road Signs", ["horse"], "horse", ""),
        ("elefante", [], "", "an elephant"),
        ("x1", [], "", ""),
    ],
)
def test_clip_art_captions(lexicon, title, keywords, stem, expected):
    assert clipart_caption(title, keywords, stem) == expected


def test_the_head_noun_names_the_kind(lexicon):
    assert pictures.concept_of("a sleeping cat with a blue hat") == "cat"
    assert pictures.concept_of("two horses") == "horse"
    assert pictures.concept_of("a slice of pizza") == ""


# ---------------------------------------------------------------------------------------------------------- pixels


def test_trimming_keeps_the_drawing_and_makes_a_square():
    image = trimmed(disc(box=(10, 20, 29, 59)))
    assert image.size == (40, 40)
    assert image.mode == "RGBA"
    assert image.getchannel("A").getbbox() == (10, 0, 30, 40)


def test_trimming_shrinks_but_never_enlarges():
    assert trimmed(disc(size=400, box=(0, 0, 399, 399))).size == (160, 160)
    assert trimmed(disc(size=20, box=(0, 0, 19, 19))).size == (20, 20)


def test_shrinking_leaves_no_dark_edge():
    """White on transparent black stays white where it is at all opaque."""
    image = np.asarray(trimmed(disc((255, 255, 255), 500, (3, 3, 470, 470))))
    assert image[image[..., 3] > 30, :3].min() >= 250


def test_a_transparent_picture_is_refused():
    with pytest.raises(ValueError, match="transparent"):
        trimmed(Image.new("RGBA", (9, 9), (0, 0, 0, 0)))


def test_a_photograph_keeps_its_middle():
    image = Image.new("RGB", (900, 300), "white")
    image.paste("red", (300, 0, 600, 300))
    image = shrunk(image)
    assert image.size == (240, 160)
    assert image.getpixel((120, 80)) == (255, 0, 0)
    assert image.getpixel((10, 80)) == (255, 255, 255)


def test_a_cut_out_is_laid_on_the_background_and_a_photograph_fills_the_square():
    image = compose(Image.new("RGBA", (10, 10), (255, 0, 0, 255)), 100, (1, 2, 3), fill=0.5, offset=(0, 1))
    assert image.getpixel((25, 75)) == (255, 0, 0)
    assert image.getpixel((75, 25)) == (1, 2, 3)
    photograph = Image.new("RGB", (200, 100), "blue")
    photograph.paste("green", (0, 0, 100, 100))
    # Not at the seam itself, where the interpolation mixes the halves.
    assert compose(photograph, 50, offset=(0, 0)).crop((0, 0, 48, 50)).getcolors() == [(48 * 50, (0, 128, 0))]
    assert compose(photograph, 50, offset=(1, 0)).crop((2, 0, 50, 50)).getcolors() == [(48 * 50, (0, 0, 255))]


def test_stored_bytes_keep_transparency_or_are_jpeg():
    assert Image.open(io.BytesIO(encoded(disc()))).mode == "RGBA"
    assert Image.open(io.BytesIO(encoded(Image.new("RGB", (9, 9))))).format == "JPEG"


def test_perceptual_hash_survives_scaling_and_jpeg_and_tells_pictures_apart():
    image = random_picture(7, 128).convert("RGB")
    buffer = io.BytesIO()
    image.resize((200, 200)).save(buffer, "JPEG", quality=60)
    look = perceptual_hash(image)
    assert hash_distance(look, perceptual_hash(Image.open(buffer))) <= 4
    others = [hash_distance(look, perceptual_hash(random_picture(seed, 128))) for seed in range(8, 28)]
    assert min(others) > 12


def test_hash_distance_counts_bits():
    assert hash_distance(0b1011, 0b0001) == 2


SQUARE = b'<svg xmlns="http://www.w3.org/2000/svg" %s><rect x="%d" y="10" width="20" height="20" fill="#f00"/></svg>'


@pytest.mark.parametrize(
    "size", [b'width="40" height="40"', b'viewBox="0 0 40 40"', b'width="10mm" viewBox="0 0 40 40"']
)
def test_svg_is_drawn_to_scale(size):
    pytest.importorskip("skia")
    image = rasterise(SQUARE % (size, 10), side=80)
    assert image.size == (80, 80)
    assert image.getchannel("A").getbbox() == (20, 20, 60, 60)
    assert image.getpixel((40, 40)) == (255, 0, 0, 255)


def test_svg_drawn_beside_its_page_is_found():
    pytest.importorskip("skia")
    image = rasterise(SQUARE % (b'width="40" height="40"', 35), side=100, whole=True)
    left, top, right, bottom = image.getchannel("A").getbbox()
    assert right - left > 80
    assert abs((right - left) - (bottom - top)) <= 2  # all of the square, filling the picture
    assert trimmed(image).getpixel((5, 5)) == (255, 0, 0, 255)


@pytest.mark.parametrize(
    ("svg", "message"),
    [
        (b"no picture", "no <svg>"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither a readable size"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='0' height='5'/>", "has a size of 0"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'><g></svg>", "cannot parse"),
    ],
)
def test_bad_svg_is_refused(svg, message):
    pytest.importorskip("skia")
    with pytest.raises(ValueError, match=message):
        rasterise(svg)


# -------------------------------------------------------------------------------------------------------- packages


def qt_resource(files, flags):
    """A Qt resource file (version 3) with one folder "d" and ``files`` in it, from the format's description."""
    names, places = b"", {}
    for name in ["d", *files]:
        places[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, nodes = b"", []
    for name, content in files.items():
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if flags & 1 else content
        nodes.append(struct.pack(">IHHHIQ", places[name], flags, 0, 0, len(data), 0))
        data += struct.pack(">I", len(stored)) + stored
    tree = (
        struct.pack(">IHIIQ", 0, 2, 1, 1, 0)
        + struct.pack(">IHIIQ", places["d"], 2, len(files), 2, 0)
        + b"".join(nodes)
    )
    header = 24
    return (
        b"qres"
        + struct.pack(">5I", 3, header, header + len(tree), header + len(tree) + len(data), 0)
        + tree
        + data
        + names
    )


@pytest.mark.parametrize("flags", [0, 1])
def test_qt_resources_are_unpacked(tmp_path, flags):
    path = tmp_path / "x.rcc"
    files = {"a.webp": b"one" * 40, "README": b"two"}
    path.write_bytes(qt_resource(files, flags))
    assert resources(path) == {"/d/a.webp": b"one" * 40, "/d/README": b"two"}


def test_other_files_are_no_qt_resources(tmp_path):
    path = tmp_path / "x.rcc"
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="not a Qt resource"):
        resources(path)


def test_licences_are_read_from_the_readme_beside_the_picture():
    readme = """Copyright: Ann
License: Public Domain
Source: https://example.org
Files:
dog.webp

Files: owl.webp
License: CC-BY-SA 4.0
Copyright: Bob

Copyright: Nobody
Files:
cat.webp
"""
    assert pictures._credits({"/p/README": readme}) == {
        "/p/dog.webp": ("Ann", "public domain"),
        "/p/owl.webp": ("Bob", "CC-BY-SA-4.0"),
    }


# --------------------------------------------------------------------------------------------------------- targets


def test_targets_of_other_data_are_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    from training.data.targets import fingerprint, read_targets

    build(tmp_path, 0, [picture("a cow", 4), picture("a hen", 5)], ZEBRA)
    folder = tmp_path / "pictures-train"
    with pytest.raises(ValueError, match="does not exist"):
        read_targets(folder)
    save_file({"sentence": torch.eye(2)}, folder / "targets.safetensors", {"fingerprint": fingerprint(folder)})
    assert read_targets(folder)["sentence"].tolist() == [[1, 0], [0, 1]]
    save_file({"sentence": torch.eye(2)}, folder / "targets.safetensors", {"fingerprint": "of other data"})
    with pytest.raises(ValueError, match="made for other data"):
        read_targets(folder)


def test_the_crop_view_shows_the_crop():
    from training.data.targets import views

    image = Image.new("RGB", (100, 100), "white")
    image.paste((255, 0, 0), (50, 50, 100, 100))
    both = views(image, (0.6, 0.6, 0.9, 0.9), 32)
    assert both.shape == (2, 3, 32, 32)
    assert both[0, :, 2, 2].tolist() == [255, 255, 255]
    assert both[1, :, 16, 16].tolist() == [255, 0, 0]
    assert both[1, 1].max() == 0


def test_crop_boxes_lie_inside_and_cover_what_they_say():
    from training.data.targets import crop_box

    for seed in range(50):
        left, top, right, bottom = crop_box(np.random.default_rng(seed))
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert right - left == pytest.approx(bottom - top)
        assert 0.3 <= (right - left) ** 2 <= 0.7
