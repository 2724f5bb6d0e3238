"""The row format: what the validator refuses, and that shards come back as they went in."""

import numpy as np
import pytest

from training.data.schema import COLUMNS, make_row, read_columns, read_dataset, validate_row, write_shards

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
    assert tuple(a_row()) == COLUMNS
    assert a_row()["char_boxes"] == [4, 3, 9, 9, 0, 0, 0, 0, 12, 3, 18, 9]
    validate_row(a_row())


def test_a_picture_needs_no_boxes_and_may_have_more_columns():
    row = make_row(
        np.zeros((8, 8, 3), np.uint8), "A dog.", task="caption", kind="natural", source="s", license="l", split="train"
    )
    validate_row(row | {"concept": "dog"})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "translate"}, "task must be one of ocr, caption, markdown, not 'translate'"),
        ({"kind": "page"}, "kind must be one of"),
        ({"split": "test"}, "split must be one of"),
        ({"text": None}, "text must be a string, not NoneType"),
        ({"image": {"bytes": b"", "path": None}}, "image must be a dictionary with the PNG file"),
        ({"image": {"bytes": b"not a picture", "path": None}}, "cannot be opened"),
        ({"x_height": -1.0}, "x_height must be 0 or more"),
        ({"x_height": float("nan")}, "x_height must be 0 or more"),
        ({"char_boxes": [0, 0, 1, 1]}, "4 numbers for each of the 3 characters, not 4"),
        ({"char_boxes": [9, 3, 4, 9, 0, 0, 0, 0, 12, 3, 18, 9]}, "x0 <= x1"),
        ({"char_boxes": [4, 3, 9, 9, 1, 1, 2, 2, 12, 3, 18, 9]}, "white space"),
        ({"char_boxes": [4, 3, 9, 9, 0, 0, 0, 0, 12, 3, 41, 9]}, "beyond the image of 40x12"),
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
