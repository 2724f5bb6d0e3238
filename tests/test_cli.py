"""The command `unit`, with tiny models of random weights in a temporary folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from unit_cli import common
from unit_cli.__main__ import COMMANDS, main

PROJECTION = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, `plain` without a projection; two text towers, one too wide; a page, a blank one, a picture."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    for name, width in (("model", PROJECTION), ("plain", 0)):
        model = tiny.unit_model(text=tiny.QWEN3, projection_dim=width)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
        model.save_pretrained(root / name)
        tiny.processor().save_pretrained(root / name)
    for name, width in (("tower", PROJECTION), ("wide-tower", 2 * PROJECTION)):
        (root / name).mkdir()
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "house"]
        (root / name / "vocab.txt").write_text("\n".join(words))
        shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": len(words)}
        BertModel(BertConfig(hidden_size=width, **shape)).save_pretrained(root / name)
        BertTokenizer(str(root / name / "vocab.txt")).save_pretrained(root / name)
    tiny.draw_page("moss", 70, 30, 16).save(root / "page.png")
    Image.new("L", (40, 30), 255).save(root / "blank.png")
    tiny.noise(40, 30).save(root / "picture.png")
    (root / "empty.png").touch()
    return root


@pytest.fixture
def unit(folder, monkeypatch, capsys):
    """Runs `unit` in the folder: (exit status, standard output, lines of standard error)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(common, "PROGRESS_AFTER", 1e9)  # a busy machine must not add a bar to what is compared

    def run(*arguments):
        capsys.readouterr()
        status = main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err.splitlines()

    return run


# ---------------------------------------------------------------------------------------------------------------- unit


def test_help_needs_none_of_the_heavy_libraries():
    code = (
        "import sys, unit_cli.__main__ as m; m.parser(); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_command_is_there(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    names = ("read", "describe", "features", "convert", "export", "llava", "train", "merge", "data", "evaluate")
    assert all(f"\n    {name} " in shown for name in names)


@pytest.mark.parametrize("arguments", [[], ["write"], ["read"], ["read", "x.png", "--batch-size", "0"]])
def test_arguments_that_make_no_sense_end_with_status_two(arguments):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2


@pytest.mark.parametrize(
    "command", [["read", "page.png"], ["describe", "page.png"], ["features", "page.png", "--out", "f.safetensors"]]
)
def test_a_folder_without_a_model_is_named(unit, folder, command):
    (folder / "nothing").mkdir(exist_ok=True)
    status, out, errors = unit(*command, "--model", "nothing")
    assert (status, out) == (2, "")
    assert errors == [f"unit {command[0]}: nothing: no model there (the folder has no config.json)"]


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "runs/nowhere/final"])
def test_a_path_that_is_not_there_is_no_hub_id(unit, path):
    for command in (["read", "page.png", "--model", path], ["llava", path, "llm", "out"]):
        status, out, errors = unit(*command)
        assert (status, out, errors) == (2, "", [f"unit {command[0]}: {path}: no such folder"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_files_that_help_names_are_there(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    named = re.findall(r"(?:modeling_unit|training)/[\w./-]*\w", capsys.readouterr().out)
    assert named or command not in ("train", "llava")
    for path in named:
        assert (Path(__file__).parents[1] / path).exists(), path


def test_damaged_weights_are_named(unit, folder):
    shutil.copytree(folder / "model", folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, errors = unit("read", "page.png", "--model", "torn")
    assert status == 2
    assert len(errors) == 1
    assert errors[0].startswith("unit read: torn: cannot be loaded as a model for this command: ")


def test_weights_that_do_not_suit_the_configuration_are_named(unit, folder):
    """transformers would go on with random ones where keys lack, and reads pickles."""
    wrong = shutil.copytree(folder / "model", folder / "wrong")
    weights = load_file(wrong / "model.safetensors")
    norm = weights.pop("vision_model.norm.weight")
    narrow = {"vision_model.norm.weight": norm.new_zeros(7)}
    for more, words in (({}, "lack 1 keys: vision_model.norm.weight"), (narrow, "has the shape (7,)")):
        save_file(weights | more, str(wrong / "model.safetensors"), metadata={"format": "pt"})
        status, _, errors = unit("features", "page.png", "--out", "f.safetensors", "--model", "wrong")
        assert (status, len(errors)) == (2, 1)
        assert words in errors[0]
    (wrong / "model.safetensors").rename(wrong / "pytorch_model.bin")
    status, _, errors = unit("read", "page.png", "--model", "wrong")
    assert (status, len(errors)) == (2, 1)
    assert "pytorch_model.bin is a pickle" in errors[0]


def test_a_device_that_is_not_there_is_named(unit):
    status, _, errors = unit("read", "page.png", "--model", "model", "--device", "abacus")
    assert status == 2
    assert len(errors) == 1
    assert errors[0].startswith("unit read: --device abacus: ")


# ---------------------------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--looks", "7", "looks must lie between 1 and 6, got 7"), ("--evidence", "-1", "evidence must be at least 0")],
)
def test_readings_that_there_are_not_are_refused_in_one_line(unit, option, value, words):
    status, _, errors = unit("read", "page.png", "--model", "model", option, value)
    assert (status, len(errors)) == (2, 1)
    assert words in errors[0]


def test_what_little_speaks_for_is_left_out(unit):
    _, everything, _ = unit("read", "page.png", "--model", "model", "--evidence", "0")
    _, nothing, _ = unit("read", "page.png", "--model", "model", "--evidence", "1e12")
    assert everything.strip()
    assert not nothing.strip()


def test_one_page_is_printed_bare_and_several_under_their_names(unit):
    status, one, errors = unit("read", "page.png", "--model", "model")
    assert (status, errors) == (0, [])
    status, two, _ = unit("read", "page.png", "blank.png", "--model", "model")
    assert status == 0
    assert two == f"==> page.png <==\n{one}\n==> blank.png <==\n\n\n"


def test_a_blank_page_is_read_as_nothing(unit):
    assert unit("read", "blank.png", "--model", "model") == (0, "\n", [])


def test_markdown_of_several_pages_has_their_names_in_comments(unit):
    status, one, errors = unit("read", "page.png", "--format", "markdown", "--model", "model")
    assert (status, errors) == (0, [])
    status, two, _ = unit("read", "page.png", "blank.png", "--format", "markdown", "--model", "model")
    assert (status, two) == (0, f"<!-- page.png -->\n\n{one}\n<!-- blank.png -->\n\n\n\n")


def test_json_has_a_box_a_text_and_a_confidence_of_each_block(unit):
    status, out, _ = unit("read", "page.png", "--format", "json", "--model", "model")
    assert status == 0
    found = json.loads(out)
    assert found["model"] == "model"
    (page,) = found["pages"]
    assert (page["file"], page["page"], page["width"], page["height"]) == ("page.png", None, 70, 30)
    for block in page["blocks"]:
        x0, y0, x1, y1 = block["box"]
        assert 0 <= x0 < x1 <= 70
        assert 0 <= y0 < y1 <= 30
        assert 0 < block["confidence"] <= 1
        assert isinstance(block["text"], str)


def test_bad_inputs_are_told_one_by_one_and_the_others_are_read(unit):
    paths = ["gone.png", "blank.png", "empty.png", "."]
    status, out, errors = unit("read", *paths, "--format", "json", "--model", "model")
    assert status == 2
    assert errors == [
        "unit read: gone.png: no such file",
        "unit read: empty.png: the file is empty",
        "unit read: .: is a folder; name the files in it, for example ./*",
    ]
    pages = json.loads(out)["pages"]
    assert [page["file"] for page in pages] == paths
    assert ["error" in page for page in pages] == [True, False, True, True]


def test_the_text_goes_to_a_file_when_one_is_named(unit, folder):
    status, out, _ = unit("read", "page.png", "--model", "model")
    assert unit("read", "page.png", "--model", "model", "--out", "text.txt") == (0, "", [])
    assert (folder / "text.txt").read_text(encoding="utf-8") == out
    status, _, errors = unit("read", "page.png", "--model", "model", "--out", "nowhere/text.txt")
    assert status == 2
    assert errors == ["unit read: nowhere/text.txt: cannot be written (No such file or directory)"]


# ------------------------------------------------------------------------------------------------------------ describe


def test_a_caption_and_a_ranking_are_printed(unit):
    status, out, errors = unit("describe", "picture.png", "--labels", "dog, cat,house", "--model", "model")
    assert (status, errors) == (0, [])
    caption, *labels = out.splitlines()
    assert caption.startswith("picture.png: ")
    assert sorted(line.split()[1] for line in labels) == ["cat", "dog", "house"]
    scores = [float(line.split()[0]) for line in labels]
    assert scores == sorted(scores, reverse=True)


def test_a_text_tower_ranks_by_cosine(unit):
    arguments = ("--labels", "a dog,a cat", "--text-tower", "tower", "--format", "json", "--model", "model")
    status, out, errors = unit("describe", "picture.png", "gone.png", *arguments)
    assert status == 2
    assert errors == ["unit describe: gone.png: no such file"]
    good, bad = json.loads(out)["pictures"]
    assert bad == {"file": "gone.png", "page": None, "error": "gone.png: no such file"}
    assert {entry["label"] for entry in good["labels"]} == {"a dog", "a cat"}
    assert all(-1 <= entry["score"] <= 1 for entry in good["labels"])


def test_a_text_tower_needs_a_projection_of_its_width(unit):
    arguments = ("describe", "picture.png", "--labels", "dog")
    status, _, errors = unit(*arguments, "--text-tower", "tower", "--model", "plain")
    assert status == 2
    assert errors[0].startswith("unit describe: plain: this model has no projection to a text tower")
    status, _, errors = unit(*arguments, "--text-tower", "wide-tower", "--model", "model")
    assert status == 2
    assert errors[0].startswith(
        "unit describe: wide-tower: gives 48 numbers a text and model was aligned with a tower of 24"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--labels", " , "], "--labels names no label"), (["--text-tower", "tower"], "--text-tower ranks labels")],
)
def test_labels_must_be_named(unit, arguments, message):
    status, _, errors = unit("describe", "picture.png", "--model", "model", *arguments)
    assert status == 2
    assert errors[0].startswith(f"unit describe: {message}")


# ------------------------------------------------------------------------------------------------------------ features


def test_features_are_pooled_and_spatial(unit, folder):
    status, out, _ = unit("features", "picture.png", "blank.png", "--out", "f.safetensors", "--model", "model")
    assert status == 0
    assert out == "f.safetensors: features of 2 pictures\n"
    with safe_open(folder / "f.safetensors", "pt") as file:
        found = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118  (no iterator)
        assert json.loads(file.metadata()["unit"]) == {"model": "model", "kind": "natural", "scale": 1}
    # 40 x 30 pixels at the area of 32 x 32, in patches of 8: 3 rows of 5
    shapes = {"pooled": (32,), "spatial": (3, 5, 32)}
    assert found == {f"{name}/{key}": shape for name in ("picture.png", "blank.png") for key, shape in shapes.items()}


def test_features_are_taken_at_the_scale_asked_for(unit, folder):
    arguments = ("features", "picture.png", "--out", "four.safetensors", "--model", "model")
    assert unit(*arguments, "--scale", "4")[0] == 0
    with safe_open(folder / "four.safetensors", "pt") as file:
        # 40 x 30 pixels at the area of 64 x 64: the ideal is 9.2 by 6.9 patches
        assert file.get_tensor("picture.png/spatial").shape == (7, 9, 32)
    assert unit(*arguments, "--kind", "document")[0] == 0
    with safe_open(folder / "four.safetensors", "pt") as file:
        assert file.get_tensor("picture.png/spatial").shape == (4, 5, 32)  # as it is, padded to whole patches
    status, _, errors = unit(*arguments, "--scale", "3")
    assert status == 2
    assert errors == ["unit features: --scale must be 1 or 4 with model, got 3"]


def test_features_do_not_depend_on_what_is_encoded_beside_them(unit, folder):
    paths = ("page.png", "picture.png", "blank.png")  # 4 x 9, 4 x 5 and 4 x 5 patches
    for size in ("1", "2", "3"):
        out = f"by{size}.safetensors"
        arguments = ("--out", out, "--model", "model", "--kind", "document", "--batch-size", size)
        assert unit("features", *paths, *arguments)[0] == 0
    found = [load_file(folder / f"by{size}.safetensors") for size in (1, 2, 3)]
    assert found[0]["page.png/spatial"].shape == (4, 9, 32)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in other.items():
            torch.testing.assert_close(value, found[0][key], atol=1e-5, rtol=0, msg=key)


@torch.no_grad()
def test_features_of_nothing_are_not_written(unit, folder):
    status, _, errors = unit("features", "gone.png", "--out", "none.safetensors", "--model", "model")
    assert status == 2
    assert errors == [
        "unit features: gone.png: no such file",
        "unit features: no input could be read; nothing was written",
    ]
    assert not (folder / "none.safetensors").exists()


@pytest.mark.parametrize(
    ("out", "message"), [("f.npz", "must end in .safetensors"), ("no/f.safetensors", "there is no folder")]
)
def test_features_go_to_a_safetensors_file(unit, out, message):
    status, _, errors = unit("features", "picture.png", "--out", out, "--model", "model")
    assert status == 2
    assert message in errors[0]


# -------------------------------------------------------------------------------------------------- train and evaluate


def test_training_gets_the_recipe_and_its_changes(unit, folder, monkeypatch):
    from training import recipe

    (folder / "r.yaml").write_text("stage: teacher\n")
    seen = []
    monkeypatch.setattr(recipe, "main", lambda *given: seen.append(given) or Path("runs/r"))
    status, out, _ = unit("train", "r.yaml", "training.max_steps=3", "lora.r=4")
    assert (status, out) == (0, "the model is in runs/r\n")
    assert unit("train", "r.yaml", "--accept-changes")[0] == 0
    assert seen == [("r.yaml", ["training.max_steps=3", "lora.r=4"], False), ("r.yaml", [], True)]


def test_a_recipe_that_cannot_be_followed_is_refused_in_one_line(unit, folder, monkeypatch):
    from training import recipe

    def refuse(path, overrides, accept_changes):
        raise ValueError("Unknown key 'stag'.\nDid you mean 'stage'?")

    (folder / "r.yaml").write_text("stag: teacher\n")
    monkeypatch.setattr(recipe, "main", refuse)
    assert unit("train", "r.yaml") == (2, "", ["unit train: Unknown key 'stag'."])
    assert unit("train", "none.yaml") == (2, "", ["unit train: none.yaml: no such recipe"])
    assert unit("train", "r.yaml", "faster") == (2, "", ["unit train: 'faster' is not of the form key=value"])


def test_evaluation_gets_its_arguments_as_they_are(unit, monkeypatch):
    from training.evaluation import run

    seen = []
    monkeypatch.setattr(run, "main", lambda arguments: seen.append(arguments) or 0)
    status, _, _ = unit("evaluate", "model", "--suite", "text,image", "--limit", "3", "--help")
    assert status == 0
    assert seen == [["model", "--suite", "text,image", "--limit", "3", "--help"]]
