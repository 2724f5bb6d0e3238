"""training/evaluation/text.py: figures worked out by hand, blocks in parquet, the peer, failures."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

from training.evaluation.text import (
    FIGURES,
    Block,
    Blocks,
    PeerMissing,
    Tesseract,
    cer,
    comparable,
    count,
    evaluate_text,
    reads_images,
    summarise,
    word_f1,
)


def png(width: int = 16, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 255).save(buffer, "PNG")
    return buffer.getvalue()


def row(text: str, x_height: float = 9.0, *, width: int = 16, task="ocr", kind="document", split="validation") -> dict:
    return {
        "image": {"bytes": png(width), "path": None},
        "text": text,
        "task": task,
        "kind": kind,
        "char_boxes": [],
        "x_height": x_height,
        "source": "a-package/a.pdf#1",
        "license": "LPPL",
        "split": split,
    }


def write(folder, rows, name="part-0.parquet", row_group_size=2):
    pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=row_group_size)
    return folder


def blocks(*texts: str, x_height: float = 9.0) -> list[Block]:
    return [Block(index, Image.new("RGB", (16, 16)), text, x_height) for index, text in enumerate(texts)]


def figures(result) -> dict[str, float]:
    return {line.name: line.value for line in result.rows}


# ------------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("THE CAT, sat!", "the cat sat", 1.0),  # case and punctuation do not count
        ("sat cat the", "the cat sat", 1.0),  # nor does order
        ("a a b", "a b c", 4 / 6),  # a and b match once each: 2 * 2 / (3 + 3)
        ("the the the", "the", 0.5),  # 2 * 1 / (3 + 1): saying it again does not help
        ("", "the cat", 0.0),
        ("the cat", "", 0.0),
        ("", "", 1.0),
        ("... !", "---", 1.0),  # no word on either side
        ("x1 y2", "x1", 2 / 3),  # digits belong to words
        ("é", "e\u0301", 1.0),  # one letter, composed or not
    ],
)
def test_word_f1_is_the_f1_of_two_multisets(prediction, truth, expected):
    assert word_f1(prediction, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("cat", "cat", 0.0),
        ("cat", "cart", 1 / 4),  # one letter missing of four
        ("Cat", "cat", 1 / 3),  # case counts
        ("cat.", "cat", 1 / 3),  # punctuation counts
        ("kitten", "sitting", 3 / 7),
        ("", "cat", 1.0),
        ("catcatcat", "cat", 2.0),  # six letters too many: above 1 is possible
        ("cat", "", 3.0),  # text invented where there is none is counted in full
        ("", "", 0.0),
    ],
)
def test_cer_is_edits_over_characters_of_the_truth(prediction, truth, expected):
    assert cer(prediction, truth) == pytest.approx(expected)


def test_breaking_lines_elsewhere_costs_nothing():
    truth = "The recog-\nnition of\ntext"
    assert comparable(truth) == "The recognition of text"
    assert comparable("The recognition\nof text\n") == comparable(truth)
    assert cer("The recogni-\ntion of text", truth) == 0.0


def test_typographic_spelling_costs_nothing():
    assert cer("“eﬀect” – it’s…", '"effect" - it\'s...') == 0.0


def test_figures_are_pooled_over_blocks_and_not_averaged():
    # block 1: 1 of 1 word right; block 2: 0 of 3 right. Averaging would give 0.5; pooling gives 2*1 / (4 + 4).
    rows = {line.name: line.value for line in summarise([count("a", "a"), count("x y z", "b c d")])}
    assert rows["word_f1"] == pytest.approx(0.25)
    assert rows["word_precision"] == pytest.approx(0.25)
    assert rows["word_recall"] == pytest.approx(0.25)
    assert rows["cer"] == pytest.approx(3 / 6)  # "b c d" has five characters, three of them wrong; "a" one, right
    assert rows["wer"] == pytest.approx(3 / 4)
    assert rows["exact"] == pytest.approx(0.5)


def test_precision_and_recall_are_not_swapped():
    rows = {line.name: line.value for line in summarise([count("a b c d", "a b")])}
    assert rows["word_precision"] == pytest.approx(2 / 4)
    assert rows["word_recall"] == pytest.approx(1.0)


def test_rows_come_in_the_documented_order_and_hold_their_interval():
    rows = summarise([count("a b", "a b"), count("a x", "a b"), count("", "a b c")])
    assert tuple(line.name for line in rows) == FIGURES
    assert all(line.low <= line.value <= line.high for line in rows)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    counts = [count("a " * n, "a " * 7) for n in range(8)]
    assert summarise(counts, seed=3) == summarise(counts, seed=3)
    assert summarise(counts, seed=3) != summarise(counts, seed=4)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    # 100 blocks, half of them exact: standard error 0.05, so about 0.40 to 0.60
    rows = summarise([count("a", "a")] * 50 + [count("b", "a")] * 50)
    exact = rows[FIGURES.index("exact")]
    assert exact.value == 0.5
    assert exact.low == pytest.approx(0.40, abs=0.02)
    assert exact.high == pytest.approx(0.60, abs=0.02)


def test_the_interval_narrows_to_a_point_when_all_blocks_are_alike():
    f1 = summarise([count("a b", "a c")] * 20)[0]
    assert (f1.value, f1.low, f1.high) == (0.5, 0.5, 0.5)


def test_no_block_at_all_is_an_error():
    with pytest.raises(ValueError, match="no block"):
        summarise([])


# ------------------------------------------------------------------------------------------------------------- blocks


def test_only_held_out_documents_are_read(tmp_path):
    rows = [
        row("kept"),
        row("trained on", split="train"),
        row("a picture", kind="natural", task="caption"),
        row("# md", task="markdown"),
        row("kept too"),
    ]
    assert [block.text for block in Blocks(write(tmp_path, rows))] == ["kept", "kept too"]


def test_blocks_of_several_shards_come_in_order_with_their_image(tmp_path):
    write(tmp_path, [row(f"b{n}", width=20 + n) for n in range(3)], "part-1.parquet")
    write(tmp_path, [row(f"a{n}", width=10 + n, x_height=8.5) for n in range(5)], "part-0.parquet")
    read = list(Blocks(tmp_path))
    assert [block.text for block in read] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    assert [block.image.width for block in read] == [10, 11, 12, 13, 14, 20, 21, 22]
    assert {block.image.mode for block in read} == {"RGB"}
    assert [block.index for block in read] == list(range(8))
    assert read[0].x_height == 8.5


def test_a_limit_is_spread_evenly_over_the_set(tmp_path):
    write(tmp_path, [row(str(n)) for n in range(10)], row_group_size=4)
    assert [block.text for block in Blocks(tmp_path, limit=5)] == ["0", "2", "4", "6", "8"]
    assert len(Blocks(tmp_path, limit=3)) == 3
    assert len(Blocks(tmp_path, limit=99)) == 10


def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Blocks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \.parquet file"):
        Blocks(tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Blocks(tmp_path, limit=0)
    write(tmp_path, [row("a", split="train")])
    with pytest.raises(ValueError, match="training split are never evaluated"):
        Blocks(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": png()}, "task": "ocr"}]), tmp_path / "part-1.parquet")
    with pytest.raises(ValueError, match=r"part-1\.parquet: column 'text' is missing"):
        Blocks(tmp_path)


def test_a_row_without_a_decodable_image_names_its_file(tmp_path):
    broken = row("a")
    broken["image"] = {"bytes": b"not a picture", "path": None}
    with pytest.raises(ValueError, match=r"part-0\.parquet, row 0 of row group 0: no image"):
        list(Blocks(write(tmp_path, [broken])))


# --------------------------------------------------------------------------------------------------------- evaluation


def test_a_perfect_reader_gets_perfect_figures(tmp_path):
    write(tmp_path, [row(f"word {n}", x_height=8 + n / 2) for n in range(13)])
    truths = [block.text for block in Blocks(tmp_path)]
    result = evaluate_text(lambda batch: [block.text for block in batch], tmp_path, batch_size=4, progress=False)
    assert figures(result) == {
        "word_f1": 1.0,
        "word_precision": 1.0,
        "word_recall": 1.0,
        "cer": 0.0,
        "wer": 0.0,
        "exact": 1.0,
    }
    assert (result.blocks, result.failed) == (13, 0)
    assert [item["prediction"] for item in result.items] == truths
    # 8 to 9.5 | 10 to 11.5 | 12 to 14, its upper end included
    assert [(low, high, number) for low, high, number, _ in result.bins] == [(8, 10, 4), (10, 12, 4), (12, 14, 5)]


def test_bins_hold_the_figures_of_their_own_blocks_only():
    small, large = blocks("a b", x_height=8.0)[0], Block(1, Image.new("RGB", (8, 8)), "c d", 13.0)
    outside = Block(2, Image.new("RGB", (8, 8)), "e f", 20.0)
    result = evaluate_text(lambda batch: ["a b", "c x", "no no"], [small, large, outside], progress=False)
    assert [(low, high, number, rows[0].value) for low, high, number, rows in result.bins] == [
        (8.0, 10.0, 1, 1.0),
        (12.0, 14.0, 1, 0.5),
    ]
    assert result.value("word_f1") == pytest.approx(3 / 6)


def test_a_failing_block_is_counted_as_read_empty_and_the_others_go_on():
    def read(batch):
        if any(block.text == "bad" for block in batch):
            raise RuntimeError("cannot read this")
        return [block.text for block in batch]

    result = evaluate_text(read, blocks("one", "bad", "two"), batch_size=3, progress=False)
    assert (result.blocks, result.failed) == (3, 1)
    assert [item["prediction"] for item in result.items] == ["one", "", "two"]
    assert result.items[1]["error"] == "RuntimeError: cannot read this"
    assert result.value("word_recall") == pytest.approx(2 / 3)


def test_a_reader_that_drops_an_answer_fails_loudly_for_every_block():
    result = evaluate_text(lambda batch: [], blocks("one", "two"), progress=False)
    assert result.failed == 2
    assert result.items[0]["error"] == "ValueError: reader returned 0 texts for 1 blocks; it must return one each"


def test_a_reader_of_images_sees_images():
    sizes = []
    read = reads_images(lambda images: [sizes.append(image.size) or "one" for image in images])
    assert evaluate_text(read, blocks("one"), progress=False).value("exact") == 1.0
    assert sizes == [(16, 16)]


def test_a_missing_peer_is_passed_on_and_not_counted_as_failures():
    def read(batch):
        raise PeerMissing("not here")

    with pytest.raises(PeerMissing, match="not here"):
        evaluate_text(read, blocks("one"), progress=False)


def test_items_are_written_worst_first(tmp_path):
    result = evaluate_text(lambda batch: ["right", "x", "half x"], blocks("right", "wrong", "half y"), progress=False)
    result.write_items(tmp_path / "items.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["truth"] for line in lines] == ["wrong", "half y", "right"]
    assert lines[0]["word_f1"] == 0.0


def test_results_become_plain_json():
    result = evaluate_text(lambda batch: ["a"] * len(batch), blocks("a", "b"), progress=False)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["reader"] == "reader"
    assert data["blocks"] == 2
    assert data["rows"][0][0] == "word_f1"
    assert data["bins"][0]["x_height"] == [8.0, 10.0]
    assert "items" not in data


# --------------------------------------------------------------------------------------------------------------- peer


def test_without_tesseract_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PeerMissing, match="tesseract is not installed") as caught:
        Tesseract()
    assert "\n" not in str(caught.value)


def fake_tesseract(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "tesseract"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))


def test_tesseract_gets_small_type_enlarged_and_large_type_as_it_is(tmp_path, monkeypatch):
    fake_tesseract(tmp_path, monkeypatch, f'cat > "{tmp_path}/seen.png"; printf "some text\\n\\f"')
    block = Block(0, Image.new("RGB", (30, 10), "white"), "some text", 8.0)

    def seen(reader, block):
        assert reader.read(block) == "some text"
        with Image.open(tmp_path / "seen.png") as image:
            return image.size

    assert seen(Tesseract(), block) == (30, 10)
    assert seen(Tesseract(upscale_to=20.0), block) == (75, 25)  # 20 / 8 = 2.5 times
    assert seen(Tesseract(upscale_to=20.0), Block(0, block.image, "", 25.0)) == (30, 10)


def test_tesseract_that_fails_says_its_last_line(tmp_path, monkeypatch):
    fake_tesseract(tmp_path, monkeypatch, 'cat > /dev/null; echo "first" >&2; echo "out of luck" >&2; exit 3')
    with pytest.raises(RuntimeError, match="status 3: out of luck"):
        Tesseract().read(blocks("a")[0])


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="a peer for comparison, not a dependency")
def test_tesseract_reads_large_print():
    image = Image.new("RGB", (420, 80), "white")
    ImageDraw.Draw(image).text((20, 15), "Held out pages", fill="black", font=ImageFont.load_default(40))
    assert Tesseract().read(Block(0, image, "Held out pages", 20.0)) == "Held out pages"


def test_counts_do_not_overflow_on_long_texts():
    long = "word " * 20000
    assert np.isclose(word_f1(long, long), 1.0)
