"""Strips of pictures with nothing to read on them."""

import io

import numpy as np
import pytest
from PIL import Image

from training.data.blanks import LEGIBLE, blank_rows, build_blanks
from training.data.schema import make_row, read_columns, validate_row, write_shards


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        make_row(
            rng.integers(0, 256, (40, 60, 3), dtype=np.uint8),
            text,
            task="caption",
            kind="natural",
            source=f"made/{index}",
            license="CC0",
            split="train",
        )
        for index, text in enumerate(["A dog.", "A stop sign.", "The letter A."])
    ]
    write_shards(rows, tmp_path / "pictures")
    return tmp_path / "pictures"


def test_rows_are_documents_without_text_of_pictures_without_letters(pictures):
    rows = list(blank_rows(pictures, 12, seed=3))
    assert len(rows) == 12
    for row in rows:
        validate_row(row)
        assert (row["text"], row["task"], row["kind"], row["split"]) == ("", "ocr", "document", "train")
        assert row["source"].endswith(" of made/0")  # the others promise something to read
        assert np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).std() > 4


def test_the_same_seed_gives_the_same_rows(pictures, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        report = build_blanks(pictures, tmp_path / name, 5, seed)
        assert report.rows == 5
    a, b, c = ([row["image"]["bytes"] for row in read_columns(tmp_path / name, ["image"])] for name in "abc")
    assert a == b != c


def test_pictures_of_letters_only_are_refused(tmp_path):
    assert LEGIBLE.search("A Sign.")
    assert not LEGIBLE.search("a signal designer")
    row = make_row(
        np.zeros((8, 8, 3), np.uint8), "A sign.", task="caption", kind="natural", source="x", license="", split="train"
    )
    write_shards([row], tmp_path / "signs")
    with pytest.raises(ValueError, match="no picture"):
        list(blank_rows(tmp_path / "signs", 1, 0))
