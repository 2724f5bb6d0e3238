"""The row format: what the validator refuses, and that shards come back as they went in."""

import errno
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.data.schema import (
    COLUMNS,
    OPTIONAL,
    REQUIRED,
    features,
    make_row,
    read_columns,
    read_dataset,
    validate_row,
    words_from_char_boxes,
    write_shards,
)

PIXELS = np.full((12, 40), 255, dtype=np.uint8)
PIXELS[3:9, 4:36] = 0


def a_row(**changes):
    row = make_row(
        PIXELS,
        "a b",
        task="ocr",
        kind="document",
        source="by hand",
        license="CC0-1.0",
        split="train",
        char_boxes=np.array([[4, 3, 9, 9], [0, 0, 0, 0], [12, 3, 18, 9]]),
        x_height=6.0,
    )
    return row | changes


def test_a_row_holds_the_documented_columns_and_is_valid():
    assert tuple(a_row()) == COLUMNS == tuple(features())
    assert a_row()["char_boxes"] == [4, 3, 9, 9, 0, 0, 0, 0, 12, 3, 18, 9]
    validate_row(a_row())


def test_a_picture_needs_no_boxes_and_may_have_more_columns():
    row = make_row(
        np.zeros((8, 8, 3), np.uint8), "A dog.", task="caption", kind="natural", source="s", license="l", split="train"
    )
    validate_row(row | {"concept": "dog"})


def test_words_come_from_the_boxes_of_their_characters():
    assert a_row()["words"] == [{"text": "a", "box": [4, 3, 9, 9]}, {"text": "b", "box": [12, 3, 18, 9]}]
    none = [0, 0, 0, 0]
    #                       " H                i              \n    ?     y             o               .
    boxes = np.array([none, [5, 2, 9, 10], [9, 1, 11, 10], none, none, none, [3, 14, 6, 20], [6, 13, 9, 18], none])
    assert words_from_char_boxes(" Hi\n? yo.", boxes) == [
        {"text": "Hi", "box": [5, 1, 11, 10]},  # around both
        {"text": "yo.", "box": [3, 13, 9, 20]},  # the full stop has no place of its own; "?" has none at all
    ]
    assert words_from_char_boxes("", np.zeros((0, 4))) == words_from_char_boxes(" \n", np.zeros((2, 4))) == []
    with pytest.raises(ValueError, match="one box for each of the 2 characters, not 1"):
        words_from_char_boxes("ab", np.zeros((1, 4)))


def test_words_given_are_kept():
    words = [{"text": "a  b", "box": (0, 0, 40, 12)}]
    row = make_row(
        PIXELS, "a b", task="ocr", kind="document", source="s", license="l", split="train", words=words,
        char_boxes=np.array([[4, 3, 9, 9], [0, 0, 0, 0], [12, 3, 18, 9]]),
    )  # fmt: skip
    assert row["words"] == [{"text": "a  b", "box": [0, 0, 40, 12]}]
    validate_row(row)


def test_boxes_that_16_bits_do_not_hold_are_refused_and_not_wrapped():
    with pytest.raises(ValueError, match="within 32767 pixels, got 40000"):
        make_row(
            PIXELS, "a", task="ocr", kind="document", source="s", license="l", split="train",
            char_boxes=np.array([[0, 0, 40000, 9]]),
        )  # fmt: skip


def test_a_row_of_the_required_columns_alone_is_valid():
    validate_row({column: a_row()[column] for column in REQUIRED})
    validate_row(a_row() | dict.fromkeys(OPTIONAL))  # null, as parquet has it


@pytest.mark.parametrize(("name", "good"), [("PNG", True), ("JPEG", True), ("WEBP", True), ("GIF", False)])
def test_image_files_are_kept_as_they_are(name, good):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, name)
    row = make_row(file.getvalue(), "", task="ocr", kind="document", source="s", license="l", split="train")
    assert row["image"] == {"bytes": file.getvalue(), "path": None}
    if good:
        validate_row(row)
    else:
        with pytest.raises(ValueError, match="cannot be opened as PNG, JPEG or WebP"):
            validate_row(row)


def test_a_truncated_image_is_refused():
    whole = a_row()["image"]["bytes"]
    with pytest.raises(ValueError, match=r"by hand.*cannot be opened"):
        validate_row(a_row(image={"bytes": whole[: len(whole) * 2 // 3], "path": None}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "translate"}, "task must be one of ocr, caption, markdown, not 'translate'"),
        ({"kind": "page"}, "kind must be one of"),
        ({"split": "test"}, "split must be one of"),
        ({"text": None}, "text must be a string, not NoneType"),
        ({"image": {"bytes": b"", "path": None}}, "image must be a dictionary with the PNG, JPEG or WebP file"),
        ({"image": {"bytes": b"not a picture", "path": None}}, "cannot be opened"),
        ({"x_height": -1.0}, "x_height must be 0 or more"),
        ({"x_height": float("nan")}, "x_height must be 0 or more"),
        ({"char_boxes": [0, 0, 1, 1]}, "4 numbers for each of the 3 characters, not 4"),
        ({"char_boxes": [9, 3, 4, 9, 0, 0, 0, 0, 12, 3, 18, 9]}, "x0 <= x1"),
        ({"char_boxes": [4, 3, 9, 9, 1, 1, 2, 2, 12, 3, 18, 9]}, "white space"),
        ({"char_boxes": [4, 3, 9, 9, 0, 0, 0, 0, 12, 3, 41, 9]}, "char_boxes reach beyond the image of 40x12"),
        ({"char_boxes": "4 3 9 9"}, "char_boxes must be a list of whole numbers"),
        ({"words": [{"text": "a", "box": [4, 3, 9, 13]}]}, "words reach beyond the image of 40x12"),
        ({"words": [{"text": "a", "box": [9, 3, 4, 9]}]}, "words must hold boxes [x0, y0, x1, y1] with 0 <= x0"),
        ({"words": [{"text": "a", "box": [-1, 3, 4, 9]}]}, "words must hold boxes"),
        ({"words": [{"text": "a", "box": [4, 3, 9]}]}, "words must be a list of {'text': string, 'box': 4 whole"),
        ({"words": [{"text": "a", "box": []}]}, "words must be a list of"),
        ({"words": [{"text": "a", "box": [0.1, 0.2, 0.3, 0.4]}]}, "words must be a list of"),
        ({"words": [{"text": "a", "box": [1, 2, 3, 4]}, {"text": "b", "box": [1]}]}, "words must be a list of"),
        ({"words": ["a", "b"]}, "words must be a list of"),
        ({"words": 3}, "words must be a list of"),
        ({"words": [{"text": " ", "box": [4, 3, 9, 9]}]}, "words must hold a string that is not empty"),
    ],
)
def test_a_wrong_row_is_refused_by_name(changes, complaint):
    with pytest.raises(ValueError, match="by hand") as refusal:
        validate_row(a_row(**changes))
    assert complaint in str(refusal.value)


def test_a_missing_column_is_named():
    row = a_row()
    del row["license"], row["split"]
    with pytest.raises(ValueError, match="missing: license, split"):
        validate_row(row)


def test_shards_come_back_as_they_went_in(tmp_path):
    rows = [a_row(text=letter * 3, char_boxes=[]) for letter in "abcdefg"]
    assert write_shards(iter(rows), tmp_path / "set", rows_per_shard=3) == 7
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    assert list(read_columns(tmp_path / "set", list(COLUMNS))) == rows
    dataset = read_dataset(tmp_path / "set")
    assert dataset["text"][:] == [letter * 3 for letter in "abcdefg"]
    np.testing.assert_array_equal(np.asarray(dataset[0]["image"]), PIXELS)


def test_a_set_from_before_there_were_words_is_read(tmp_path):
    write_shards([a_row()], tmp_path / "set")
    (shard,) = (tmp_path / "set").iterdir()
    pq.write_table(pq.read_table(shard).drop_columns(["words", "x_height"]), shard)
    (row,) = read_columns(tmp_path / "set", ["text", "words", "x_height"])
    assert row == {"text": "a b", "words": None, "x_height": None}
    row = read_dataset(tmp_path / "set")[0]
    assert "words" not in row
    (row,) = read_columns(tmp_path / "set", list(COLUMNS))
    validate_row(row)


def test_a_full_disk_is_one_clear_line_and_nothing_is_left(tmp_path, monkeypatch):
    write_shards([a_row(text="old", char_boxes=[])], tmp_path / "set")
    write, calls = pq.write_table, []

    def fills_up(table, path, **settings):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")
        write(table, path, **settings)

    monkeypatch.setattr(pq, "write_table", fills_up)
    with pytest.raises(OSError, match="no space left on the disk after 2 rows") as full:
        write_shards([a_row()] * 5, tmp_path / "set", rows_per_shard=2)
    assert full.value.errno == errno.ENOSPC
    assert str(tmp_path / "set") in str(full.value)
    assert "\n" not in str(full.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert [row["text"] for row in read_columns(tmp_path / "set", ["text"])] == ["old"]


def test_a_build_that_breaks_off_leaves_the_old_shards(tmp_path):
    write_shards([a_row()] * 5, tmp_path / "set", rows_per_shard=2)

    def breaks_off():
        yield a_row(text="new", char_boxes=[])
        yield a_row(text="new", char_boxes=[])
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_shards(breaks_off(), tmp_path / "set", rows_per_shard=2)
    assert [row["text"] for row in read_columns(tmp_path / "set", ["text"])] == ["a b"] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    write_shards([a_row()], tmp_path / "set", rows_per_shard=2)
    assert len(list(read_columns(tmp_path / "set", ["text"]))) == 1  # surplus shards are gone


def test_wrong_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task must be"):
        write_shards([a_row(task="x")], tmp_path / "set")
    with pytest.raises(ValueError, match="rows_per_shard"):
        write_shards([], tmp_path / "set", rows_per_shard=0)
    with pytest.raises(ValueError, match="holds no parquet files"):
        read_dataset(tmp_path / "nothing")
