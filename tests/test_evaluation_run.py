"""training/evaluation/run.py and report.py: both suites on tiny models, what is written, what bad input gets."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from modeling_unit import (
    UnitConfig,
    UnitForPreTraining,
    UnitImageProcessor,
    UnitProcessor,
    UnitVisionConfig,
    UnitVisionModel,
)
from training.evaluation import run, subjects
from training.evaluation.report import image_table, markdown_table, text_tables, with_interval, write_report
from training.evaluation.text import FIGURES, PEERS, PeerMissing
from training.teacher import PROJECTION_FILE
from training.tokenizer import byte_tokenizer

WIDTH = 16
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 64,
    "cpe_max_size": 64,
}
TEXT = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def image_processor() -> UnitImageProcessor:
    return UnitImageProcessor(patch_size=8, base_size=16, scale_as="area", max_side=64)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An encoder with its projection beside it, as training stage zero leaves it."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    UnitVisionModel(UnitVisionConfig(**VISION)).save_pretrained(folder)
    save_file({"weight": torch.randn(384, WIDTH)}, str(folder / PROJECTION_FILE))
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    """A full model whose encoder is the teacher's, before any training; its vision decoder knows nothing yet."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    config = UnitConfig(
        vision_config=UnitVisionConfig(**VISION),
        connector_config={"connector_type": "mlp", "unshuffle": 1},
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=384,
    )
    model = UnitForPreTraining(config)
    model.vision_model.load_state_dict(UnitVisionModel.from_pretrained(teacher).state_dict())
    projection = subjects.PictureEncoder(str(teacher)).projection
    with torch.no_grad():
        model.visual_projection.weight.copy_(projection)
    model.save_pretrained(folder)
    UnitProcessor(image_processor(), tokenizer, unshuffle=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine pictures: three kinds (red, green, blue) by three hands."""
    folder = tmp_path_factory.mktemp("pictures-validation")
    rows = []
    for kind, colour in (("blue", (0, 0, 255)), ("green", (0, 255, 0)), ("red", (255, 0, 0))):
        for hand in ("one", "two", "three"):
            buffer = io.BytesIO()
            Image.new("RGB", (12, 12), colour).save(buffer, "PNG")
            image = {"bytes": buffer.getvalue(), "path": f"{kind}-{hand}"}
            rows.append({"image": image, "text": kind, "concept": kind, "style": hand, "family": hand})
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000-of-00001.parquet")
    (folder / "concept_names.json").write_text(json.dumps(["blue", "green", "red"]))
    embeddings = np.random.default_rng(0).normal(size=(3, 384)).astype(np.float32)
    save_numpy({"embeddings": embeddings}, str(folder / "concept_sentence.safetensors"))
    return folder


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks-validation")
    rows = []
    for number in range(6):
        buffer = io.BytesIO()
        Image.new("L", (40 + number, 16), 255).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        row = {"image": image, "text": f"line {number}", "task": "ocr", "kind": "document", "x_height": 8.0 + number}
        rows.append({**row, "source": "p.pdf#1", "split": "validation"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000-of-00001.parquet")
    return folder


@pytest.fixture
def reads_by_width(monkeypatch):
    """A stand-in for the model: it knows block `n` by its width of 40 + n pixels."""
    monkeypatch.setattr(
        run, "page_reader", lambda model, device: lambda images: [f"line {image.width - 40}" for image in images]
    )


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_distinct_kinds_are_found_and_both_ways_of_naming_reported(student, pictures):
    encoder = subjects.PictureEncoder(str(student))
    rows = {name: figures for name, *figures in run.picture_rows(encoder, pictures, 4)}
    assert set(rows) == {
        "knn_accuracy, class token",
        "knn_accuracy, patch mean",
        "zero_shot_top1",
        "zero_shot_top5",
        "zero_shot_top1, no vision decoder",
        "zero_shot_top5, no vision decoder",
    }
    # Pictures of one kind are equal, but k = 5 neighbours hold the two equal ones and three strangers: two of one
    # other kind at least, so the sum of cosines decides between equal votes, and the equal pictures win it.
    assert rows["knn_accuracy, patch mean"][0] == 1.0
    assert rows["zero_shot_top5"][0] == 1.0  # there are but three kinds
    assert all(0.0 <= low <= value <= high <= 1.0 for value, low, high in rows.values())


def test_a_student_that_has_not_moved_scores_as_its_teacher(student, teacher, pictures):
    before = {row[0]: row[1:] for row in run.picture_rows(subjects.PictureEncoder(str(teacher)), pictures, 4)}
    after = {row[0]: row[1:] for row in run.picture_rows(subjects.PictureEncoder(str(student)), pictures, 4)}
    assert len(before) == 4
    for name, figures in before.items():
        # its vision decoder knows nothing yet, so the student names as the teacher does only without it
        assert after[f"{name}, no vision decoder" if name.startswith("zero_shot") else name] == figures


def test_patch_tokens_are_measured_as_they_pass(teacher):
    encoder = subjects.PictureEncoder(str(teacher))
    assert encoder.root_mean_square == 0.0
    _, patches = encoder.tokens([Image.new("RGB", (16, 16), "red")])
    assert patches.shape == (1, 4, WIDTH)
    assert encoder.largest == pytest.approx(patches.abs().max().item())
    assert encoder.root_mean_square == pytest.approx(patches.square().mean().sqrt().item())


# -------------------------------------------------------------------------------------------------------------- report


def test_both_suites_write_a_report_with_their_figures(tmp_path, student, teacher, blocks, pictures, reads_by_width):
    out = tmp_path / "new" / "folder"
    results = run.evaluate(
        str(student), out=out, blocks=blocks, pictures=pictures, teacher=str(teacher), progress=False
    )
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    (reader,) = results["text"]["readers"]
    assert (reader["reader"], reader["blocks"], reader["failed"]) == ("UNIT", 6, 0)
    assert reader["rows"][0] == ["word_f1", 1.0, 1.0, 1.0]
    assert [model["name"] for model in results["image"]["models"]] == ["UNIT", "teacher"]
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "1.000 [1.000, 1.000]" in page
    assert "knn_accuracy, class token" in page
    assert "(report.png)" in page
    with Image.open(out / "report.png") as plot:
        assert plot.format == "PNG"
        assert plot.width > plot.height
    assert len((out / "text-unit.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_one_suite_leaves_the_other_out(tmp_path, student, blocks, reads_by_width):
    results = run.evaluate(str(student), ["text"], tmp_path, blocks=blocks, limit=2, progress=False)
    assert "image" not in results
    assert results["text"]["readers"][0]["blocks"] == 2
    assert "pictures" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_missing_peer_leaves_a_note_and_the_rest(tmp_path, student, blocks, reads_by_width, monkeypatch, capsys):
    def absent():
        raise PeerMissing("tesseract is not installed")

    monkeypatch.setitem(PEERS, "tesseract", absent)
    results = run.evaluate(str(student), ["text"], tmp_path, blocks=blocks, peers=["tesseract"], progress=False)
    assert [reader["reader"] for reader in results["text"]["readers"]] == ["UNIT"]
    assert results["text"]["notes"] == ["tesseract is not installed"]
    assert "Note: tesseract is not installed" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().err == "tesseract is not installed\n"


def test_a_peer_is_a_further_row(tmp_path, student, blocks, reads_by_width, monkeypatch):
    monkeypatch.setitem(PEERS, "tesseract", lambda: {"other": lambda batch: [""] * len(batch)})
    results = run.evaluate(str(student), ["text"], tmp_path, blocks=blocks, peers=["tesseract"], progress=False)
    word_f1 = {one["reader"]: one["rows"][0][1] for one in results["text"]["readers"]}
    assert word_f1 == {"UNIT": 1.0, "other": 0.0}
    assert (tmp_path / "text-other.jsonl").is_file()


def test_an_interval_is_written_to_three_places():
    assert with_interval(["cer", 0.12345, 0.1, 1.25]) == "0.123 [0.100, 1.250]"


def test_tables_line_up():
    assert markdown_table(["a", "long name"], [["x", 1], ["yyyy", 22]]) == (
        "| a    | long name |\n| ---- | --------- |\n| x    | 1         |\n| yyyy | 22        |"
    )


def test_a_figure_that_one_model_lacks_is_a_dash():
    table = image_table({"models": [{"name": "A", "rows": [["one", 0.5, 0.4, 0.6]]}, {"name": "B", "rows": []}]})
    assert table.splitlines()[2].split("|")[1:4] == [" one    ", " 0.500 [0.400, 0.600] ", " -   "]


def test_bins_of_x_height_are_columns_with_their_number_of_blocks():
    def reader(name, bins):
        rows = [[figure, 0.5, 0.5, 0.5] for figure in FIGURES]
        return {
            "reader": name,
            "blocks": 7,
            "failed": 1,
            "seconds": 14.0,
            "rows": rows,
            "bins": [{"x_height": bin, "blocks": 7, "rows": rows} for bin in bins],
        }

    text = text_tables({"readers": [reader("UNIT", [[8.0, 10.0]]), reader("peer", [[8.0, 10.0]])]})
    assert "8-10 px (7 blocks)" in text
    assert "| 2.000" in text  # 14 s over 7 blocks


def test_an_error_rate_above_one_stays_inside_the_plot(tmp_path):
    models = [{"name": "A", "rows": [["figure", 1.5, 1.4, 1.6]]}]
    write_report({"model": "m", "machine": "here", "image": {"models": models, "notes": []}}, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 0


# ----------------------------------------------------------------------------------------------------------- bad input


def fails(capsys, *arguments) -> str:
    """The last line on standard error, below any progress bar, of a command that must end with status 2."""
    assert run.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("unit evaluate: ") == 1
    last = error.splitlines()[-1]
    assert last.startswith("unit evaluate: ")
    return last


def test_bad_input_is_one_clear_line(tmp_path, capsys, teacher, student, blocks, pictures, reads_by_width):
    there = ["--out", tmp_path / "out"]
    assert "unknown suite 'txt'; known: text, image" in fails(capsys, student, "--suite", "txt", *there)
    assert "unknown peer 'abbyy'; known: tesseract" in fails(capsys, student, "--peers", "abbyy", *there)
    assert "limit must be at least 1" in fails(capsys, student, "--limit", "0", *there)
    assert "no such folder" in fails(capsys, student, "--suite", "text", "--blocks", tmp_path / "no", *there)
    assert "concept_names.json does not exist" in fails(
        capsys, student, "--suite", "image", "--pictures", tmp_path, *there
    )
    assert "no model there" in fails(capsys, tmp_path / "no-model", "--suite", "image", "--pictures", pictures, *there)


def test_an_encoder_cannot_read(tmp_path, capsys, teacher, blocks):
    line = fails(capsys, teacher, "--suite", "text", "--blocks", blocks, "--out", tmp_path)
    assert "is a 'unit_vision_model' checkpoint, which cannot read" in line
