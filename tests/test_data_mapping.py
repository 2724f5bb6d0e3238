"""Data sets of others as rows of the schema: fixtures have the columns that the data sets document."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from training.data import mapping
from training.data.mapping import DatasetArguments, RowRefused, checked_image, in_lines, lines_of_words, read_source
from training.data.refusals import Refusals, TooManyRefused
from training.data.schema import make_row, validate_row, write_shards

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path_factory.mktemp("unit")))


def picture(name="PNG", width=100, height=50, seed=0, **settings):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name, **settings)
    return file.getvalue()


def parquet(folder, rows, images=("image",)):
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for name in images:
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def rows_of(source, streaming=True, **settings):
    rows = list(read_source(source, streaming=streaming, **settings))
    for row in rows:
        validate_row(row)
    return rows


def image_of(data):
    return {"bytes": data, "path": None}


@pytest.mark.parametrize("streaming", [True, False])
def test_columns_are_mapped_and_the_file_is_kept(tmp_path, streaming):
    scans = [picture(seed=seed) for seed in range(3)]
    folder = parquet(
        tmp_path / "scans", [{"scan": image_of(scan), "said": f"text {i} "} for i, scan in enumerate(scans)], ["scan"]
    )
    source = {
        "path": str(folder),
        "columns": {"image": "scan", "text": "said"},
        "task": "ocr",
        "kind": "document",
        "license": "CC0-1.0",
    }
    rows = rows_of(source, streaming)
    assert [row["image"]["bytes"] for row in rows] == scans
    assert [row["text"] for row in rows] == ["text 0", "text 1", "text 2"]
    assert {(row["task"], row["kind"], row["license"], row["split"]) for row in rows} == {
        ("ocr", "document", "CC0-1.0", "train")
    }
    assert len({row["source"] for row in rows}) == 3


def test_our_own_sets_need_no_recipe(tmp_path):
    ours = make_row(
        np.zeros((9, 9), np.uint8), "x", task="ocr", kind="document", source="s#1", license="l", split="validation",
        char_boxes=np.array([[1, 1, 4, 4]]),
    )  # fmt: skip
    write_shards([ours], tmp_path / "set")
    (tmp_path / "set" / "report.json").write_text("{}")
    assert rows_of(str(tmp_path / "set")) == [ours]


def funsd_like(tmp_path, **more):
    # 200 x 100 pixels, boxes in thousandths; the words of the second line come first, as form entities do
    return parquet(
        tmp_path / "funsd",
        [
            {
                "id": "0",
                "tokens": ["Total:", "12.50", "TAX", "Date", " "],
                "bboxes": [[100, 500, 300, 600], [500, 510, 700, 610], [400, 100, 600, 200], [100, 110, 300, 210]]
                + [[0, 0, 0, 0]],
                "ner_tags": [1, 2, 3, 4, 0],
                "image": image_of(picture(width=200, height=100)),
                **more,
            }
        ],
    )


@pytest.mark.parametrize("layout", ["funsd", "sroie"])
def test_forms_come_with_words_in_pixels_read_line_by_line(tmp_path, layout):
    (row,) = rows_of({"path": str(funsd_like(tmp_path)), "layout": layout})
    assert row["text"] == "Date TAX\nTotal: 12.50"
    assert row["words"] == [
        {"text": "Date", "box": [20, 11, 60, 21]},
        {"text": "TAX", "box": [80, 10, 120, 20]},
        {"text": "Total:", "box": [20, 50, 60, 60]},
        {"text": "12.50", "box": [100, 51, 140, 61]},
    ]
    assert (row["task"], row["kind"], row["license"]) == ("ocr", "document", "unknown")
    assert row["source"].endswith("funsd#0")


def test_the_order_given_can_be_kept(tmp_path):
    (row,) = rows_of({"path": str(funsd_like(tmp_path)), "layout": "funsd", "order": "given"})
    assert row["text"] == "Total: 12.50 TAX Date"


def test_boxes_in_a_wrong_unit_are_refused(tmp_path):
    refusals = Refusals()
    source = {"path": str(funsd_like(tmp_path)), "layout": "funsd", "box_unit": "pixels"}
    assert rows_of(source, refusals=refusals) == []
    (counts,) = refusals.as_dict().values()
    (reason,) = counts["reasons"]
    assert reason == "words: a box lies beyond the image"


def test_cord_is_read_from_its_json(tmp_path):
    def word(text, x0, y0, x1, y1):
        corners = {"x1": x0, "y1": y0, "x2": x1, "y2": y0 + 1, "x3": x1, "y3": y1, "x4": x0, "y4": y1 - 1}
        return {"text": text, "quad": corners, "is_key": 0, "row_id": 7}

    truth = {
        "gt_parse": {"menu": {"nm": "TEA"}},
        "meta": {"image_size": {"width": 100, "height": 50}},
        "valid_line": [
            {"category": "total.total_price", "group_id": 3, "words": [word("5,000", 60, 30, 90, 40)]},
            {"category": "menu.nm", "group_id": 1, "words": [word("2x", 5, 10, 15, 20), word("TEA", 20, 10, 50, 20)]},
            {"category": "menu.price", "group_id": 1, "words": [word("2,500", 60, 11, 90, 21)]},
        ],
    }
    folder = parquet(tmp_path / "cord", [{"image": image_of(picture()), "ground_truth": json.dumps(truth)}])
    (row,) = rows_of({"path": str(folder), "layout": "cord", "license": "CC-BY-4.0"})
    assert row["text"] == "2x TEA 2,500\n5,000"
    assert row["words"][0] == {"text": "2x", "box": [5, 10, 15, 20]}
    assert row["words"][3] == {"text": "5,000", "box": [60, 30, 90, 40]}


def test_lines_of_a_tilted_receipt_stay_whole():
    # falls by 2 pixels a word, lines 12 apart, words 10 high: the last of a line is level with the next line's first
    words = [
        {"text": f"{line}{place}", "box": [x := place * 30, y := line * 12 + place * 2, x + 25, y + 10]}
        for place in (3, 0, 5, 1, 4, 2)
        for line in (1, 0)
    ]  # fmt: skip
    assert lines_of_words(in_lines(words)) == "00 01 02 03 04 05\n10 11 12 13 14 15"


def tar(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("text", ["txt", "json"])
@pytest.mark.parametrize("streaming", [True, False])
def test_webdataset_tars_of_captions(tmp_path, text, streaming):
    for shard in range(2):
        samples = []
        for number in range(3):
            caption = f"caption {shard}{number}"
            samples.append((f"{shard}{number}.jpg", picture("JPEG", seed=number)))
            content = caption if text == "txt" else json.dumps({"caption": caption, "width": 100})
            samples.append((f"{shard}{number}.{text}", content.encode()))
        tar(tmp_path / f"{shard:05d}.tar", samples)
    rows = rows_of({"path": str(tmp_path), "layout": "caption-pairs"}, streaming)
    assert [row["text"] for row in rows] == [f"caption {shard}{number}" for shard in (0, 1) for number in (0, 1, 2)]
    assert rows[4]["source"].endswith("#11")
    assert {(row["task"], row["kind"]) for row in rows} == {("caption", "natural")}
    assert rows[0]["image"]["bytes"] == picture("JPEG", seed=0)


@pytest.mark.parametrize("streaming", [True, False])
def test_tsv_of_captions_and_paths(tmp_path, streaming):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "train.tsv").write_text(
        'a "quoted\tpictures/a.png\nfrom the web\thttps://example.org/b.jpg\ngone\tpictures/none.png\n'
        "one field\nout\t../secret.png\n"
    )
    refusals = Refusals(max_share=1)
    source = {
        "path": str(tmp_path / "train.tsv"),
        "layout": "caption-pairs",
        "column_names": ["caption", "image"],
    }
    (row,) = rows_of(source, streaming, refusals=refusals)
    assert row["text"] == 'a "quoted'
    reasons = refusals.as_dict()[source["path"]]["reasons"]
    assert {reason: each["count"] for reason, each in reasons.items()} == {
        "image: an address, not a file": 1,
        "image: missing": 2,
        "image: outside its folder": 1,
    }


def test_a_dialogues_answer_becomes_the_caption(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_bytes(picture("JPEG"))
    entries = [
        {
            "id": "000001",
            "image": "coco/1.jpg",
            "conversations": [
                {"from": "human", "value": "What do you see?\n<image>"},
                {"from": "gpt", "value": "Noise in all colours."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        {"id": "000002", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "Hello?"}]},
    ]
    (tmp_path / "dialogues.json").write_text(json.dumps(entries))
    refusals = Refusals()
    source = {"path": str(tmp_path / "dialogues.json"), "layout": "sharegpt4v"}
    (row,) = rows_of(source, refusals=refusals)
    assert (row["text"], row["task"], row["kind"]) == ("Noise in all colours.", "caption", "natural")
    assert row["source"].endswith("#000001")
    assert list(refusals.as_dict()[source["path"]]["reasons"]) == ["text: the dialogue has no such answer"]
    assert [row["text"] for row in rows_of({**source, "turn": 1})] == ["Yes."]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_with_texts_beside(tmp_path, streaming):
    for name in ("b/one", "two", "three"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture())
    (tmp_path / "b" / "one.txt").write_text("\ufeffFirst line\nsecond\n", encoding="utf-8")
    (tmp_path / "two.txt").write_bytes(b"\xff\xfe\x00")
    refusals = Refusals(max_share=1)
    source = {"path": str(tmp_path), "layout": "folder", "task": "ocr", "kind": "document"}
    (row,) = rows_of(source, streaming, refusals=refusals)
    assert row["text"] == "First line\nsecond"
    assert row["source"].endswith("#b/one.png")
    assert set(refusals.as_dict()[str(tmp_path)]["reasons"]) == {"text: not UTF-8", "text: no .txt beside the image"}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_with_metadata(tmp_path, streaming):
    (tmp_path / "1.png").write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "one"}) + "\n")
    (row,) = rows_of({"path": str(tmp_path), "layout": "folder", "task": "caption", "kind": "natural"}, streaming)
    assert row["text"] == "one"
    assert row["image"]["bytes"] == picture()


def test_the_filter_leaves_out_what_is_not_wanted_and_refuses_nothing(tmp_path):
    def row(text, width=100, height=50, quality="good", score=0.5):
        return {
            "image": image_of(picture(width=width, height=height)), "text": text, "quality": quality, "score": score
        }  # fmt: skip

    folder = parquet(
        tmp_path / "set",
        [
            row("wanted"),
            row("a"),
            row("far too long a text"),
            row("narrow", width=20),
            row("wide", width=300),
            row("bad quality", quality="bad"),
            row("weak", score=0.1),
            row("no score", score=None),
            row("re:jected"),
        ],
    )
    refusals = Refusals()
    source = {
        "path": str(folder),
        "task": "ocr",
        "kind": "document",
        "filter": {
            "min_side": 40,
            "max_side": 200,
            "min_characters": 2,
            "max_characters": 12,
            "columns": {
                "quality": {"in": ["good", "fair"]},
                "score": {"min": 0.2, "max": 1},
                "text": {"regex": "^[^:]*$"},
            },
        },
    }
    assert [row["text"] for row in rows_of(source, refusals=refusals)] == ["wanted"]
    assert refusals.refused == 0


def test_languages_are_told_apart(tmp_path):
    pytest.importorskip("py3langid")
    texts = ["Der schnelle braune Fuchs springt über den faulen Hund.", "The quick brown fox jumps over the lazy dog."]
    folder = parquet(tmp_path / "set", [{"image": image_of(picture()), "text": text} for text in texts])
    source = {"path": str(folder), "task": "ocr", "kind": "document", "filter": {"language": "de"}}
    assert [row["text"] for row in rows_of(source)] == texts[:1]


def whole(name, **settings):
    return picture(name, 64, 64, **settings)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image: empty file"),
        (b"<html>404</html>", "image: not an image that can be read"),
        (whole("PNG")[:3000], "image: truncated"),
        (whole("JPEG", quality=95)[:3000], "image: truncated"),
        (whole("WEBP", quality=95)[:2000], "image: "),
        (whole("PNG")[:30] + b"\xff" * 30 + whole("PNG")[60:], "image: "),
    ],
)
def test_broken_images_are_refused_by_reason(content, reason):
    with pytest.raises(RowRefused) as refused:
        checked_image(content)
    assert refused.value.reason.startswith(reason)


def test_a_decompression_bomb_is_refused_by_its_header():
    bomb = bytearray(whole("PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(RowRefused) as refused:
        checked_image(bytes(bomb))
    assert refused.value.reason == "image: too many pixels"


def test_other_formats_and_turned_pictures_become_upright_png():
    tiff = picture("TIFF", 8, 4)
    content, size = checked_image(tiff)
    assert size == (8, 4)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(tiff))))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    content, size = checked_image(picture("JPEG", 8, 4, exif=exif))
    assert size == (4, 8)
    assert Image.open(io.BytesIO(content)).size == (4, 8)


def test_bad_rows_are_skipped_counted_and_named(tmp_path):
    rows = [{"id": str(number), "image": image_of(picture()), "text": "fine"} for number in range(30)]
    rows[3]["text"] = "  "
    rows[5]["image"] = image_of(picture()[:500])
    rows[7]["text"] = "x" * 2001
    rows[9]["text"] = None
    folder = parquet(tmp_path / "set", rows)
    refusals = Refusals(max_share=1)
    source = {"path": str(folder), "task": "caption", "kind": "natural"}
    kept = rows_of(source, refusals=refusals, text_fits=lambda text: len(text) <= 2000)
    assert len(kept) == 26
    reasons = refusals.as_dict()[str(folder)]["reasons"]
    assert {reason: each["examples"] for reason, each in reasons.items()} == {
        "text: empty": ["3: caption needs one"],
        "image: truncated": [reasons["image: truncated"]["examples"][0]],
        "text: longer than the decoder's positions": ["7: 2001 characters"],
        "text: not a string": ["9: NoneType"],
    }
    assert reasons["image: truncated"]["examples"][0].startswith("5: ")
    with pytest.raises(TooManyRefused, match="4 of 10"):
        rows_of(source, refusals=Refusals(min_rows=10), text_fits=lambda text: len(text) <= 2000)


def test_a_broken_shard_is_counted_and_the_others_are_read(tmp_path):
    row = make_row(
        np.zeros((9, 9), np.uint8), "x", task="ocr", kind="document", source="s", license="l", split="train"
    )
    write_shards([row] * 30, tmp_path / "set", rows_per_shard=10)
    # the tail is whole, the middle is not: found only while reading
    middle = tmp_path / "set" / "part-00001.parquet"
    data = bytearray(middle.read_bytes())
    data[4:200] = b"\0" * 196
    middle.write_bytes(data)
    refusals = Refusals()
    assert len(rows_of(str(tmp_path / "set"), refusals=refusals)) == 20
    assert refusals.refused == 1
    # the tail is missing: found at the start
    middle.write_bytes(bytes(data[: len(data) // 2]))
    refusals = Refusals()
    assert len(rows_of(str(tmp_path / "set"), refusals=refusals)) == 20
    assert "part-00001.parquet" in json.dumps(refusals.as_dict())


def test_rows_of_our_schema_are_checked_too(tmp_path):
    row = make_row(
        np.zeros((9, 9), np.uint8), "x", task="ocr", kind="document", source="s", license="l", split="train",
        words=[{"text": "x", "box": [0, 0, 30, 9]}],
    )  # fmt: skip
    write_shards([row], tmp_path / "set")
    refusals = Refusals()
    assert rows_of(str(tmp_path / "set"), refusals=refusals) == []
    assert list(refusals.as_dict()[str(tmp_path / "set")]["reasons"]) == ["schema: words reach beyond the image"]


def test_the_data_set_can_be_sharded_and_its_rows_mapped_after(tmp_path):
    for shard in range(4):
        tar(
            tmp_path / f"{shard}.tar",
            [(f"{shard}.png", picture(seed=shard)), (f"{shard}.txt", f"caption {shard}".encode())],
        )
    rows = read_source({"path": str(tmp_path), "layout": "caption-pairs"}, streaming=True)
    assert rows.dataset.num_shards == 4
    halves = [rows.over(rows.dataset.shard(2, index)) for index in range(2)]
    assert sorted(row["text"] for half in halves for row in half) == [f"caption {number}" for number in range(4)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layout": "fundsd"}, "dataset.layout must be one of auto, schema, columns"),
        ({"colums": {}}, "Unknown key 'colums' in dataset. Did you mean 'columns'?"),
        ({"columns": {"picture": "x"}}, "dataset.columns maps image, text"),
        ({"columns": {"image": "imagee"}}, "no column 'imagee' (image); there are image, text. Did you mean 'image'?"),
        ({}, "say what its rows are: task (ocr, caption, markdown) and kind (natural, document)"),
        ({"layout": "schema"}, "not in the schema, it lacks "),
        ({"layout": "cord"}, "the layout 'cord' needs text. Its columns are image, text"),
        ({"token": "hf_x"}, "a recipe holds no token"),
        ({"trust_remote_code": True}, "runs no code"),
        ({"data_files": "x.pkl"}, "x.pkl is a pickle"),
        ({"data_files": "*.json"}, "no file of"),
        ({"format": "pickle"}, "dataset.format must be one of"),
        ({"task": "translate"}, "dataset.task must be one of"),
        ({"filter": {"columns": {"text": {"eval": "1"}}}}, "filter.columns.text needs tests of equals, in, regex"),
        ({"filter": {"columns": {"text": {"regex": "("}}}}, "is no regex"),
        ({"filter": {"min_size": 3}}, "Unknown key 'min_size' in dataset.filter. Did you mean 'min_side'?"),
        ({"path": "no/such/place"}, "there is no folder or file no/such/place"),
        ({"path": "/none/*.tar"}, "no file matches"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path, changes, complaint):
    folder = parquet(tmp_path / "set", [{"image": image_of(picture()), "text": "x"}])
    with pytest.raises(ValueError) as refused:
        read_source({"path": str(folder), **changes}, streaming=True)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_splits_are_told_by_the_files_names(tmp_path):
    for split, text in (("train", "seen"), ("validation", "unseen")):
        folder = parquet(tmp_path / "set", [{"image": image_of(picture()), "text": text}])
        (folder / "train-00000-of-00001.parquet").rename(folder / f"{split}-0.parquet")
    source = {"path": str(folder), "task": "ocr", "kind": "document"}
    for split, text in (("train", "seen"), ("validation", "unseen")):
        (row,) = rows_of({**source, "split": split})
        assert (row["text"], row["split"]) == (text, split)
    with pytest.raises(ValueError, match="no split 'test'"):
        rows_of({**source, "split": "test"})


def test_a_source_of_a_recipe_is_understood():
    class Source:
        path = "made-train"
        dataset = None

    assert DatasetArguments.of(Source()).path == "made-train"
    Source.dataset = {"path": "a/b", "layout": "cord"}
    assert DatasetArguments.of(Source()).layout == "cord"
    assert set(mapping.LAYOUTS) == {
        "schema", "columns", "caption-pairs", "sharegpt4v", "funsd", "sroie", "cord", "folder"
    }  # fmt: skip
