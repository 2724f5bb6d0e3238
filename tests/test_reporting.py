"""What a person sees of a run: lines of the terminal, TensorBoard, trackio, speed; also after a kill."""

import json
import os
import signal
import tempfile
from collections import defaultdict

import pytest
import torch
from test_samples import data, recipe, settings, start, trainer_of, written  # noqa: F401
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from training.arguments import UnitTrainingArguments
from training.recipe import main
from training.reporting import (
    BOARD,
    PROJECT,
    SPEED_LOG,
    WIDTH,
    Meter,
    Trackio,
    duration,
    flat,
    log_line,
    part_rates,
    read_speed,
    scalars,
    short,
)

# before trackio is imported, which reads it then
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-"))


# -- lines of the terminal -------------------------------------------------------------------------

LOGS = {"loss": 9.7097, "grad_norm": 40.01, "learning_rate": 6.5e-4, "epoch": 0.1, "data/refused": 3}
LOGS |= {"document_x4/language_loss": 3.87692, "natural_x1/language_loss": 3.32832, "natural_x1/vision_loss": 0.18538}
LOGS |= {"speed/images_per_second": 123.4, "speed/data_wait": 0.031}


def test_a_line_tells_the_terms_in_words():
    line = log_line(LOGS, 40, 1600, left=3725.0, width=300)
    assert line.startswith(
        "step    40/1,600  loss 9.710  1:02:05 left  doc ×4 3.877  pic ×1 3.328  pic ×1 vision 0.185"
    )
    assert "123 images/s  waits 3%  rate 6.5e-04  gradient 40.010  3 rows refused" in line


@pytest.mark.parametrize("width", [60, 80, WIDTH])
def test_a_line_fits_however_many_terms_there_are(width):
    many = {f"{kind}_x{scale}/{term}": 1.0 for kind in ("natural", "document") for scale in (1, 4) for term in TERMS}
    line = log_line(LOGS | many, 40, 1600, left=30.0, width=width)
    assert len(line) <= width
    assert "loss 9.710  0:30 left" in line
    assert "epoch" not in line


TERMS = ("language_loss", "vision_loss", "vision_cosine", "character_loss", "character_accuracy", "alignment_loss")


def test_a_line_of_an_evaluation_has_its_figures_first():
    logs = {"eval_loss": 3.2, "eval_word_f1": 0.512, "eval_cer": 0.31, "eval_document_x4/language_loss": 1.5}
    assert log_line(logs, 100, 100) == "eval 100/100  loss 3.200  word F1 0.512  CER 0.310  doc ×4 1.500"


def test_numbers_and_times_are_short():
    assert [short(each) for each in (0.0, 1e-5, 0.5, 12.345, 123.456, 1234567.0)] == [
        "0.000",
        "1.0e-05",
        "0.500",
        "12.345",
        "123.5",
        "1,234,567",
    ]
    assert [duration(each) for each in (5, 65, 3605, 97200)] == ["0:05", "1:05", "1:00:05", "1 d 03:00"]


def test_without_a_terminal_there_is_one_short_line_a_logging_step(data, tmp_path, capsys):  # noqa: F811
    trainer_of(data, tmp_path, max_steps=4, logging_steps=2, disable_tqdm=False).train()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["step 2/4", "step 4/4"]
    assert lines[-1].startswith("4 steps in ")
    assert max(map(len, lines)) <= WIDTH
    assert "it/s" not in printed.err


# -- speed -----------------------------------------------------------------------------------------


def test_a_meter_counts_images_patches_and_text_without_padding():
    meter = Meter()
    meter.step_begins()
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, 7, -100]])
    padded = {"pixel_values": torch.zeros(2, 1, 16, 24), "labels": labels}
    pack = {"pixel_values": torch.zeros(10, 192), "image_grid_hw": torch.tensor([[2, 2], [2, 3]]), "labels": labels}
    meter.data_is_there([{"document_x4": padded, "natural_x1": pack}, {"document_x4": padded}], patch_size=8)
    meter.step_ends()
    # 2 x 3 patches an image of the padded batches, 10 in the pack; three labels in each
    assert (meter.images, meter.patches, int(meter.tokens), meter.steps) == (6, 34, 9, 1)
    assert 0 <= meter.waited <= meter.busy


def test_speed_is_logged_beside_the_log_and_goes_on_with_the_run(data, tmp_path):  # noqa: F811
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(data, tmp_path, **changes)
    trainer.log_path = tmp_path / "log.jsonl"
    trainer.train()
    again = trainer_of(data, tmp_path, **changes)
    again.log_path = tmp_path / "log.jsonl"
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = read_speed(tmp_path / SPEED_LOG)
    assert [entry["step"] for entry in found] == [1, 2, 3, 4]
    for entry in found:
        # two documents and two pictures a step; pictures have 4 x 4 patches
        rate = entry["speed/images_per_second"] * entry["speed/seconds_per_step"]
        assert rate == pytest.approx(4, rel=2e-3)
        assert entry["speed/patches_per_second"] > entry["speed/images_per_second"]
        assert 0 <= entry["speed/data_wait"] <= 1
        assert entry["speed/memory_gib"] > 0.01
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith("speed")]


def test_rates_of_parts_are_told_where_they_differ():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parts = ("encoder", "connector", "connector")
    groups = [
        {"params": [each], "lr": rate, "part": part, "muon": muon}
        for each, rate, part, muon in zip(parameters, (0.5, 1.0, 4.0), parts, (False, False, True), strict=True)
    ]
    found = part_rates(torch.optim.SGD(groups), first=0.25)  # half of where it began
    assert found == {
        "learning_rate/encoder": 0.25,
        "learning_rate/connector": 0.5,
        "learning_rate/connector_muon": 2.0,
    }
    alike = [{"params": [each], "lr": 1.0, "part": part} for each, part in zip(parameters, parts, strict=True)]
    assert part_rates(torch.optim.SGD(alike), first=1.0) == {}


# -- trackers --------------------------------------------------------------------------------------


class KilledAt(TrainerCallback):
    """`kill -9` of the own process when a step is logged."""

    def __init__(self, step: int):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_and_taken_up(data, folder, report_to: str):  # noqa: F811
    """A run of 6 steps, killed as it logs step 5, that went on from the checkpoint of step 4."""
    looks = settings(data, rows=2, read=1, samples=1)
    changes = {"report_to": [report_to], "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    changes |= {"eval_strategy": "steps", "eval_steps": 3, "optimizer": "muon"}

    def run(resume=None, killed=None):
        trainer = trainer_of(data, folder, looks, **changes)
        trainer.log_path = folder / "log.jsonl"
        trainer.facts = {"recipe": {"stage": "intra_scale", "groups": [{"kind": "document"}], "threads": 2}}
        if killed:
            trainer.add_callback(KilledAt(killed))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    child = os.fork()
    if child == 0:
        try:
            run(killed=5)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    run(resume=str(folder / "checkpoint-4"))
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def expected_points(entries: list[dict], folder) -> dict[str, dict[int, float]]:
    """Points by tag and step, of the log and the speed beside it."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for entry in entries + read_speed(folder / SPEED_LOG):
        for key, value in entry.items():
            if key in ("step", "epoch") or key.startswith(("train_", "total_")):
                continue
            tag = key.replace("eval_", "eval/", 1) if key.startswith("eval_") else f"train/{key}"
            points[tag][entry["step"]] = value
    return points


def test_tensorboard_holds_each_point_of_the_log_once_also_after_a_kill(data, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    entries = killed_and_taken_up(data, tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / BOARD), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    expected = expected_points(entries, tmp_path)
    assert {"train/document_x4/language_loss", "train/speed/images_per_second", "eval/word_f1"} <= set(expected)
    assert "train/learning_rate/encoder_muon" in expected
    tags = board.Tags()
    assert set(tags["scalars"]) - {"train/epoch"} == set(expected)
    for tag, points in expected.items():
        events = board.Scalars(tag)
        assert [event.step for event in events] == sorted(points), tag
        assert [event.value for event in events] == pytest.approx([points[step] for step in sorted(points)]), tag
    assert [event.step for event in board.Images("eval/samples")] == [3, 6]
    text = board.Tensors("eval/samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| document ×4 | ocr |" in text
    assert b"stage: intra_scale" in board.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    assert "_hparams_/experiment" in board.summary_metadata


def test_tensorboard_forgets_a_run_that_was_killed_before_its_first_checkpoint(data, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with SummaryWriter(str(tmp_path / BOARD)) as before:
        for step in range(1, 4):
            before.add_scalar("train/loss", -1.0, step)
    trainer_of(data, tmp_path, max_steps=2, report_to=["tensorboard"]).train()
    board = EventAccumulator(str(tmp_path / BOARD))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert min(event.value for event in board.Scalars("train/loss")) > 0


def test_trackio_holds_each_point_of_the_log_once_also_after_a_kill(data, tmp_path):  # noqa: F811
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    entries = killed_and_taken_up(data, tmp_path, "trackio")
    kept = json.loads((tmp_path / "trackio.json").read_text())
    assert kept["project"] == PROJECT
    logs = SQLiteStorage.get_logs(kept["project"], kept["name"])
    expected = expected_points(entries, tmp_path)
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    media = []
    for entry in logs:
        for key, value in entry.items():
            if key in expected:
                found[key].append((entry["step"], value))
            elif key in ("eval/samples", "eval/texts"):
                media.append((key, entry["step"], value["_type"]))
    for tag, points in expected.items():
        assert sorted(step for step, _ in found[tag]) == sorted(points), tag
        assert dict(found[tag]) == pytest.approx(points), tag
    assert ("eval/samples", 6, "trackio.image") in media
    assert ("eval/texts", 6, "trackio.table") in media
    config = SQLiteStorage.get_run_config(kept["project"], kept["name"])
    assert (config["stage"], config["threads"]) == ("intra_scale", 2)


def test_trackio_is_named_after_its_run_and_again_when_it_goes_on(tmp_path):
    kept = tmp_path / "stage1" / "trackio.json"
    given = UnitTrainingArguments(output_dir=str(tmp_path / "stage1"), use_cpu=True)
    project, name = Trackio._named(given, kept, resumes=False)
    assert (project, name.rpartition("-")[0]) == (PROJECT, "stage1")
    assert Trackio._named(given, kept, resumes=True) == (project, name)
    given = UnitTrainingArguments(output_dir=str(tmp_path), use_cpu=True, project="mine", run_name="first")
    assert Trackio._named(given, tmp_path / "trackio.json", resumes=False) == ("mine", "first")


def test_a_tracker_that_is_not_installed_is_refused_in_one_line(data, start, tmp_path, monkeypatch):  # noqa: F811
    import training.arguments as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    content = recipe(data, tmp_path / "out", **start)
    content["training"] |= {"report_to": "trackio"}
    with pytest.raises(ValueError, match="trackio is not installed: pip install trackio") as error:
        main(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_settings_are_flat_and_points_have_tags():
    given = {"training": {"learning_rate": 0.1, "freeze": ["encoder"], "none": None}, "lora": {}, "stage": "teacher"}
    assert flat(given) == {"training.learning_rate": 0.1, "training.freeze": '["encoder"]', "stage": "teacher"}
    logs = {"eval_loss": 1.0, "eval_document_x4/cer": 0.5, "epoch": 0.5}
    assert scalars(logs) == {"eval/loss": 1.0, "eval/document_x4/cer": 0.5}
    assert scalars({"loss": 1.0, "epoch": 0.5}) == {"train/loss": 1.0, "train/epoch": 0.5}
