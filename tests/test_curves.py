"""The curves of runs: which terms share a panel, what smoothing does, reading a log that is being written."""

import json

import numpy as np
import pytest
from PIL import Image

from training.curves import compare_curves, draw_curves, read_log, series_of, smoothed
from training.evaluation.report import COLOURS
from unit_cli.__main__ import main

ENTRY = {"loss": 3.0, "grad_norm": 2.0, "learning_rate": 1e-3, "epoch": 0.5, "data/refused": 0}
ENTRY |= {"document_x4/language_loss": 1.0, "natural_x1/language_loss": 2.0, "natural_x1/vision_loss": 0.5}
ENTRY |= {"natural_x1/vision_l1": 0.2, "document_x4/character_accuracy": 0.7, "document_x4/alignment_loss": 0.6}
LOOKED = {"eval_loss": 3.5, "eval_word_f1": 0.4, "eval_document_x4/word_f1": 0.4, "eval_natural_x1/vision_loss": 0.6}


def log(steps: int, **changes) -> list[dict]:
    entries = []
    for step in range(10, 10 * steps + 1, 10):
        entries.append({key: value * (1 + 1 / step) for key, value in ENTRY.items()} | {"step": step} | changes)
        if step % 50 == 0:
            entries.append(LOOKED | {"step": step})
    return [*entries, {"train_runtime": 3.0, "train_loss": 1.0, "step": 10 * steps}]


def written(folder, entries, end="") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)
    return str(folder)


def colours_of(path) -> set[str]:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.int64)
    return {f"#{colour:06X}" for colour in np.unique(pixels @ [1 << 16, 1 << 8, 1])}


def test_terms_that_belong_together_share_a_panel():
    panels: dict[str, list[tuple[str, bool]]] = {}
    for one in series_of(log(10)):
        panels.setdefault(one.panel, []).append((one.label, one.held_out))
    assert panels == {
        "loss": [("training", False), ("training", True)],
        "language_loss": [("document ×4", False), ("picture ×1", False)],
        "vision_loss": [("picture ×1", False), ("picture ×1", True)],
        "vision_parts": [("picture ×1, L1", False)],
        "reading": [("word F1", True), ("word F1, document ×4", True)],
        "auxiliary": [("document ×4, alignment", False)],
        "accuracy": [("document ×4, character", False)],
        "learning_rate": [("first part", False)],
        "grad_norm": [("", False)],
    }


def test_terms_of_stage_zero_and_tasks_have_their_places():
    history = [{"step": 1, "loss": 1.0, "sentence_cosine": 0.5, "document_x4/language_loss/markdown": 2.0}]
    found = {one.panel: one.label for one in series_of(history)}
    assert found == {"loss": "training", "terms": "sentence cosine", "language_loss": "document ×4, markdown"}


def test_smoothing_keeps_constants_lines_and_short_curves():
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    line = np.arange(200.0)
    assert smoothed(line)[50:150] == pytest.approx(line[50:150])
    assert smoothed([1.0, 9.0, 1.0]) == pytest.approx([1.0, 9.0, 1.0])
    noisy = np.tile([0.0, 2.0], 100)
    assert smoothed(noisy)[20:180] == pytest.approx(1.0, abs=0.05)
    holed = np.ones(100)
    holed[40] = np.nan
    assert smoothed(holed) == pytest.approx([1.0] * 100)


@pytest.mark.parametrize("steps", [1, 60])
def test_a_run_is_drawn_with_a_panel_for_each_kind_of_term(tmp_path, steps):
    draw_curves(log(steps), tmp_path / "curve.png", "a run")
    picture = Image.open(tmp_path / "curve.png")
    assert picture.width > 1200
    assert picture.height > 800  # three rows
    colours = colours_of(tmp_path / "curve.png")
    assert COLOURS[0] in colours


def test_without_anything_to_draw_there_is_no_picture(tmp_path):
    draw_curves([], tmp_path / "curve.png")
    draw_curves([{"train_runtime": 3.0, "step": 3}], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_values_that_are_no_numbers_and_rates_of_zero_are_drawn_over(tmp_path, monkeypatch):
    monkeypatch.setattr("training.curves.DPI", 50)
    history = log(40, grad_norm=0.0)
    history[3] |= {"loss": float("nan"), "learning_rate": 0.0}
    draw_curves(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_runs_are_compared_with_a_colour_for_each(tmp_path):
    compare_curves({"one": log(30), "two": log(20), "three": log(3)}, tmp_path / "curve.png")
    colours = colours_of(tmp_path / "curve.png")
    assert set(COLOURS[:3]) <= colours


def test_a_log_that_is_being_written_is_read_as_far_as_it_goes(tmp_path):
    run = written(tmp_path / "run", log(3)[:-1], end='{"loss": 1.0, "st')
    (tmp_path / "run" / "speed.jsonl").write_text('{"speed/images_per_second": 5.0, "step": 10}\n{"spe')
    entries = read_log(run)
    assert [entry["step"] for entry in entries if "loss" in entry] == [10, 20, 30]
    assert [one.values for one in series_of(entries) if one.panel == "speed"] == [[5.0]]


def test_the_command_draws_one_run_or_several(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.curves.DPI", 50)
    one, two = written(tmp_path / "lower-rate", log(3)), written(tmp_path / "stage1", log(5))
    assert main(["curve", two]) == 0
    assert (tmp_path / "curve.png").is_file()
    assert "stage1: 50 steps" in capsys.readouterr().out
    assert main(["curve", two, one + "/log.jsonl", "--out", "both.png"]) == 0
    assert (tmp_path / "both.png").is_file()


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (["nowhere"], "nowhere: no log.jsonl there; a run writes it from its first logging step on."),
        (["empty"], "nothing in it that can be drawn"),
        (["good", "good/log.jsonl"], "a run is given twice"),
        (["good", "--out", "good"], "--out good: is a folder, give a file"),
        (["good", "--out", "lost/curve.png"], "--out lost/curve.png: there is no folder lost"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, monkeypatch, capsys, runs, words):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "empty", [])
    written(tmp_path / "good", log(2))
    assert main(["curve", *runs]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
