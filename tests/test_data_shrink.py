"""A small copy of a picture data set has the same rows, smaller pictures, and its captions' embeddings."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import noise, picture_row, png

from training.data.schema import write_shards
from training.data.shrink import read_sentences, shrink, webp_bytes
from unit_cli.__main__ import main


def decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_a_cut_out_keeps_its_transparency_and_is_scaled_down():
    picture = Image.new("RGBA", (100, 50), (200, 30, 30, 255))
    picture.paste((0, 255, 0, 0), (0, 0, 50, 50))  # green, but not to be seen
    small = decoded(webp_bytes(png(picture), 32, 90))
    assert (small.format, small.mode, small.size) == ("WEBP", "RGBA", (32, 16))
    pixels = np.asarray(small).astype(int)
    assert pixels[:, :14, 3].max() <= 8
    assert np.abs(pixels[:, 18:] - (200, 30, 30, 255)).max() <= 12


def test_a_small_photograph_keeps_its_size():
    small = decoded(webp_bytes(png(noise(20, 30)), 256, 80))
    assert (small.mode, small.size) == ("RGB", (20, 30))


@pytest.fixture
def source(tmp_path):
    words = ["one", "two", "one", "three"]
    write_shards([picture_row(word, side=40, seed=index) for index, word in enumerate(words)], tmp_path / "src", 3)
    embeddings = torch.stack([torch.full((384,), float(len(word))) for word in words]).half()
    save_file(
        {"sentence": embeddings, "efficientnet_features": torch.zeros(4, 8)}, tmp_path / "src/targets.safetensors"
    )
    return tmp_path / "src"


def test_rows_stay_as_they_are_and_embeddings_travel_once_a_caption(source, tmp_path, capsys):
    assert main(["data", "shrink", str(source), str(tmp_path / "out"), "--max-side", "16", "--quality", "50"]) == 0
    assert "4 pictures" in capsys.readouterr().out
    shards = sorted(path.name for path in source.glob("*.parquet"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*shards, "sentences.safetensors"]
    for name in shards:
        before, after = pq.read_table(source / name), pq.read_table(tmp_path / "out" / name)
        assert after.schema.equals(before.schema, check_metadata=True)
        assert after.drop(["image"]).equals(before.drop(["image"]))
        assert all(decoded(image["bytes"]).size == (16, 16) for image in after["image"].to_pylist())
    assert torch.equal(read_sentences(tmp_path / "out"), read_sentences(source))
    again = tmp_path / "again"  # a copy of a copy
    assert shrink(tmp_path / "out", again)["rows"] == 4
    assert torch.equal(read_sentences(again), read_sentences(source))


def test_a_copy_takes_no_place_of_a_model(source, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("mine")
    with pytest.raises(ValueError, match="holds more than a data set"):
        shrink(source, model)
    assert sorted(each.name for each in model.iterdir()) == ["config.json", "model.safetensors"]


def test_tables_of_something_else_are_refused(tmp_path):
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "tables" / "train-00000.parquet")
    with pytest.raises(ValueError, match="no columns image and text"):
        shrink(tmp_path / "tables", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["tables"]


def test_a_copy_takes_no_folder_of_anything_else(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds more than a data set"):
        shrink(source, tmp_path / "full")
    with pytest.raises(ValueError, match="is the source itself"):
        shrink(source, source)
    with pytest.raises(ValueError, match="quality must be 1 to 100"):
        shrink(source, tmp_path / "out", quality=101)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "src"]


def test_a_missing_source_is_one_line(tmp_path, capsys):
    assert main(["data", "shrink", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "no parquet files" in capsys.readouterr().err
