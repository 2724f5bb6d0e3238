"""`unit push`: what is exported, what the clean process catches, the card, the way to a Hub on loopback and back."""

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants, parse_eval_result_entries
from safetensors.torch import load_file, save_file
from tiny import image_processor, processor, unit_model
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor, CLIPVisionModel

from modeling_unit import UnitForPreTraining, UnitImageProcessor, UnitVisionModel
from modeling_unit.image_processing_unit import load_image_processor
from training import card as cards
from training import publish as publishing
from training import recipe as recipes
from training.card_plots import plot_scales, retention
from training.publish import ExportDiffers, PublishError, publish, push_run, take_hub_settings, upload
from unit_cli.__main__ import main
from unit_cli.common import report_push

CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP |= {"intermediate_size": 48, "patch_size": 8, "image_size": 32}
SECRET = "hf_" + "a1B2" * 8  # looks like a token


def figure(name, value, low, high, subject="UNIT", suite="text", evaluator="blocks", **more):
    found = {"name": name, "value": value, "low": low, "high": high, "items": 7, "failed": 0, "unit": "share"}
    found |= {"at": {}, "better": "higher", "suite": suite, "evaluator": evaluator, "subject": subject}
    return found | more


PICTURES = {"suite": "image", "evaluator": "pictures"}
RESULTS = {
    "format": 2,
    "model": "run",
    "command": "unit evaluate run --blocks=/srv/secret-client/blocks",
    "machine": "a machine",
    "versions": {},
    "date": "2026-01-02T03:04:05+00:00",
    "seconds": 3.5,
    "subjects": [
        {"name": "UNIT", "role": "model", "path": str(Path.home() / "run"), "hash": "a"},
        {"name": "teacher", "role": "teacher", "path": "/srv/secret-client/runs/teacher", "hash": "b"},
    ],
    "figures": [
        figure("word_f1", 0.91234, 0.9, 0.93),
        figure("cer", 0.05, 0.04, 0.06, better="lower"),
        figure("word_f1", 0.4, 0.3, 0.5, evaluator="FUNSD", dataset_id="nielsr/funsd"),
        figure("knn_accuracy", 0.5, 0.4, 0.6, at={"feature": "class token"}, **PICTURES),
        figure("zero_shot_top1", 0.2, 0.1, 0.3, at={"way": "vision decoder"}, **PICTURES),
        figure("knn_accuracy", 0.75, 0.7, 0.8, "teacher", at={"feature": "class token"}, **PICTURES),
    ],
    "notes": [{"suite": "text", "evaluator": "pages", "subject": "", "text": "no set in /srv/secret-client/pages"}],
    "measured": [],
}


def shaken(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def _bytes(path):
    return path.read_bytes() if path.is_file() else b""


def full_model(**changes):
    model = shaken(unit_model(num_character_classes=5, **changes))
    model.generation_config.update(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: a random model and the papers beside it."""
    folder = tmp_path_factory.mktemp("run") / "my-run"
    full_model().save_pretrained(folder)
    processor().save_pretrained(folder)
    recipe = {"stage": "intra_scale", "start": str(Path.home() / "runs" / "start"), "seconds": 120, "code": "old code"}
    recipe["teacher"] = "/srv/secret-client/runs/teacher"
    recipe["groups"] = [{"kind": "document", "scale": 4, "sources": [{"path": "chunks-train", "weight": 0.5}]}]
    recipe["training"] = {"max_steps": 30, "learning_rate": 0.0001, "hub_model_id": "alice/unit"}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "log.jsonl").write_text('{"loss": 1.0, "step": 1}\n')
    (folder / "curve.png").write_bytes(b"\x89PNG of a curve")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text(json.dumps(RESULTS))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """What a dry run of the whole and of the encoder leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))
        full = publish(run, "alice/unit-full", dry_run=True)
        encoder = publish(run, "alice/unit-encoder", encoder_only=True, dry_run=True)
    return {"full": full, "encoder": encoder}


@pytest.fixture
def unchecked(monkeypatch):
    """Without the clean process, where something else is looked at."""
    monkeypatch.setattr(publishing, "check_export", lambda *rest: None)


def api(hub, token=None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token or hub.token)


# ------------------------------------------------------------------------------------------------------------- export


def test_a_dry_run_leaves_a_whole_repository(exported):
    done = exported["full"]
    assert done.commit is None
    assert not done.uploaded
    names = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()}
    assert names == set(done.files)
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
    } <= names
    assert {"tokenizer.json", "recipe.json", "data.json", "log.jsonl", "curve.png"} <= names
    assert {
        "evaluation/results.json",
        "evaluation/report.md",
        "evaluation/text.png",
        "evaluation/image.png",
        ".eval_results/unit-nielsr-funsd.yaml",
        "features.png",
        "encoder_unit.py",
        "hub_unit.py",
    } <= names
    assert not [name for name in load_file(done.folder / "model.safetensors") if name.startswith("character_head")]
    maps = json.loads((done.folder / "config.json").read_text())["auto_map"]
    assert set(maps) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForPreTraining"}


def test_an_encoder_repository_is_read_by_our_image_processor_and_by_clips(exported):
    folder = exported["encoder"].folder
    assert type(AutoModel.from_pretrained(folder)) is UnitVisionModel
    ours = image_processor()
    for squares in (CLIPImageProcessor.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)):
        assert type(squares).__name__.startswith("CLIPImageProcessor")  # "...Pil" where torchvision is missing
        assert squares.crop_size["height"] == squares.size["shortest_edge"] == ours.base_size
        assert list(squares.image_mean) == ours.image_mean
        assert list(squares.image_std) == ours.image_std
    assert type(load_image_processor(folder)) is UnitImageProcessor
    assert "tokenizer.json" not in exported["encoder"].files


def test_the_home_folder_and_the_settings_of_the_hub_stay_behind(exported):
    folder = exported["full"].folder
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["start"] == str(Path("~", "runs", "start"))
    assert recipe["training"] == {"max_steps": 30, "learning_rate": 0.0001}
    assert json.loads((folder / "data.json").read_text()) == [
        {"path": "chunks-train", "kind": "document", "scale": 4, "weight": 0.5}
    ]
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert str(Path.home() / "runs").encode() not in path.read_bytes(), path.name
            assert str(Path.home() / "data").encode() not in path.read_bytes(), path.name


def test_a_foreign_encoder_goes_out_as_the_plain_class_that_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = full_model(vision=CLIP)
    model.save_pretrained(tmp_path / "run")
    processor().save_pretrained(tmp_path / "run")
    done = publish(tmp_path / "run", "alice/clip", encoder_only=True, dry_run=True)
    assert not [name for name in done.files if name.endswith(".py")]
    loaded = AutoModel.from_pretrained(done.folder)
    assert type(loaded) is CLIPVisionModel
    picture = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(picture).last_hidden_state
        torch.testing.assert_close(loaded(picture).last_hidden_state, expected, atol=0, rtol=0)
    assert "trust_remote_code" not in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no model there"),
        (lambda folder: (folder.mkdir(), (folder / "adapter_config.json").write_text("{}")), "adapter"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "cannot be loaded"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "bert"}')),
            "'bert'",
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "llava"}')),
            "a LLaVA, which this command does not check",
        ),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, capsys, prepare, said):
    folder = tmp_path / "folder"
    prepare(folder)
    assert main(["push", str(folder), "alice/unit", "--dry-run"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


@pytest.mark.parametrize("name", ["a/b/c", "alice/", "alice/with space", "alice/../unit", "unit"])
def test_what_is_no_name_is_refused_before_anything_is_loaded(tmp_path, capsys, name):
    assert main(["push", str(tmp_path / "missing"), name, "--dry-run"]) == 2
    assert "name" in capsys.readouterr().err


def test_an_evaluation_that_is_none_is_refused(run, tmp_path):
    with pytest.raises(PublishError, match="no evaluation there"):
        publish(run, "alice/unit", dry_run=True, evaluation=tmp_path)
    (tmp_path / "results.json").write_text('{"text": {}}')
    with pytest.raises(PublishError, match="not an evaluation of format 2"):
        publish(run, "alice/unit", dry_run=True, evaluation=tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"subjects": [{"name": "UNIT", "role": []}, 3]}))
    with pytest.raises(PublishError, match="'subjects' has no 'name'"):
        publish(run, "alice/unit", dry_run=True, evaluation=tmp_path)


def test_a_model_that_is_not_finite_is_refused(tmp_path):
    model = full_model()
    with torch.no_grad():
        model.vision_model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    with pytest.raises(PublishError, match="not finite"):
        publish(tmp_path, "alice/unit", dry_run=True)


# ----------------------------------------------------------------------------------------------------- clean process


def tamper(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in names:
        weights[name] = weights[name] + 0.5
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def push_tampered(monkeypatch, run, change) -> str:
    """What a push says whose export was changed between writing and checking."""
    check = publishing.check_export

    def tampered(folder, *rest):
        change(folder)
        check(folder, *rest)

    monkeypatch.setattr(publishing, "check_export", tampered)
    with pytest.raises(ExportDiffers) as caught:
        publish(run, "alice/unit", dry_run=True)
    return str(caught.value)


def test_changed_weights_stop_the_push_and_are_named(monkeypatch, run):
    """One that the outputs show, and one that no output shows."""
    names = ["vision_decoder.fc2.bias", "vision_model.blocks.1.mlp.fc2.bias"]
    said = push_tampered(monkeypatch, run, lambda folder: tamper(folder, *names))
    assert "2 of " in said
    for word in (*names, "tokens:", "by up to"):
        assert word in said
    assert "pixels" not in said


def test_an_export_that_does_not_load_stops_the_push(monkeypatch, run, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise OSError('there is no encoder_unit.py')")
    monkeypatch.setattr(publishing.clean_process, "__file__", str(script))
    said = push_tampered(monkeypatch, run, lambda folder: None)
    assert said == "the export does not load in a clean process: OSError: there is no encoder_unit.py"


def test_what_differs_is_said_once_for_each_kind():
    tensors = {"tokens": torch.zeros(2, 3), "logits": torch.zeros(2), "pixels": torch.zeros(1)}
    found = {"tokens": torch.zeros(2, 3), "logits": torch.zeros(3), "pixels": torch.tensor([0.25])}
    found["tokens"][0, 1] = 2.0
    words = {"weights": {name: name for name in "abcdef"}, "text": "one"}
    said = {"problems": ["AutoModel: missing keys: g"], "weights": {"a": "a", "g": "g"}, "text": "two"}
    lines = list(publishing.compare(tensors, words, found, said))
    assert lines == [
        "AutoModel: missing keys: g",
        "6 of 6 weights (b, c, d and 3 more)",
        "logits: torch.float32 (3,) instead of torch.float32 (2,)",
        "pixels: 1 of 1 values, by up to 0.25",
        "tokens: 1 of 6 values, by up to 2",
        "text: 'two' instead of 'one'",
    ]
    same = words | {"problems": []}
    assert not list(publishing.compare(tensors, words, tensors, same))


# --------------------------------------------------------------------------------------------------------------- card


def test_the_card_says_what_the_run_was(exported):
    text = (exported["full"].folder / "README.md").read_text()
    assert "| chunks-train | document | 4     | 0.5    |" in text
    assert "trained by old code; published by unit-vision" in text
    assert "| .../teacher" in text
    assert not [path for path in exported["full"].folder.rglob("*") if b"secret-client" in _bytes(path)]
    assert "0.912 [0.900, 0.930]" in text
    for word in ("![the curves of the run](curve.png)", "(evaluation/report.md)", "(features.png)", "zhu2024unit"):
        assert word in text
    for way in (
        "AutoImageProcessor",
        "AutoModelForImageTextToText",
        "unit llava alice/unit-full",
        'pipeline("image-text',
    ):
        assert way in text
    assert "\n\n\n" not in text
    assert "{%" not in text


def test_the_code_that_publishes_is_not_called_the_one_that_trained(unchecked, run, tmp_path, monkeypatch, capsys):
    """A run from before the recipe recorded it, and without an evaluation: the card says what it does not know."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluation")
    recipe = json.loads((run / "recipe.json").read_text())
    del recipe["code"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    assert main(["push", str(tmp_path / "run"), "alice/unit", "--dry-run"]) == 0
    assert "the card will have no figures" in capsys.readouterr().err
    (card,) = tmp_path.glob("unit-push-*/export/README.md")
    text = card.read_text()
    assert "Code: which one trained was not recorded; published by unit-vision" in text
    assert "No evaluation lay beside the weights" in text
    assert "model-index" not in text


def test_the_figures_are_in_the_hubs_format(exported):
    data = ModelCard.load(exported["full"].folder / "README.md").data
    assert data.pipeline_tag == "image-text-to-text"
    assert data.license == "apache-2.0"
    found = {(each.dataset_type, each.metric_name): each for each in data.eval_results}
    assert found["unit-heldout-blocks", "word F1"].metric_value == 0.9123
    assert found["unit-heldout-blocks", "word F1"].metric_args["low"] == 0.9
    assert found["nielsr/funsd", "word F1"].metric_value == 0.4
    assert found["unit-heldout-pictures", "zero_shot_top1, vision decoder"].metric_value == 0.2
    assert (
        found["unit-heldout-pictures", "knn_accuracy, class token"].metric_value == 0.5
    )  # its own, not the teacher's


def test_sets_of_the_hub_are_where_the_hub_looks_for_them(exported):
    """One file a set; the encoder's repository does not read, so that it has none."""
    (file,) = (exported["full"].folder / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nielsr/funsd", "word_f1", 0.4)
    assert not (exported["encoder"].folder / ".eval_results").exists()
    assert publishing.OWN_FILES.match(".eval_results/unit-nielsr-funsd.yaml")  # a later push takes it away
    assert not publishing.OWN_FILES.match(".eval_results/somebody-elses.yaml")


def test_scale_and_retention_are_drawn_from_what_the_evaluation_holds(exported):
    """Everything at one scale: no scale plot. A teacher's figure of the same name: a plot of both."""
    folder = exported["full"].folder
    text = (folder / "README.md").read_text()
    assert (folder / "evaluation" / "beside-teacher.png").read_bytes().startswith(b"\x89PNG")
    assert "the model beside its teacher, with 95% intervals](evaluation/beside-teacher.png)" in text
    assert not (folder / "evaluation" / "scales.png").exists()
    assert "no figures at several scales" in text


def test_figures_along_a_scale_make_lines(tmp_path):
    rows = [figure("word_f1", 0.5, 0.4, 0.6, at={"x_height": 7})]
    assert not plot_scales(RESULTS | {"figures": rows}, tmp_path / "one.png")  # a point is no line
    rows.append(figure("word_f1", 0.6, 0.5, 0.7, at={"x_height": 10}))
    assert plot_scales(RESULTS | {"figures": rows}, tmp_path / "text.png")
    rows = [
        figure("knn_accuracy", 0.5, 0.4, 0.6, at={"resolution": side, "feature": "vision decoder"}, **PICTURES)
        for side in (32, 64)
    ]
    assert plot_scales(RESULTS | {"figures": rows}, tmp_path / "pictures.png")
    assert not plot_scales(RESULTS | {"figures": rows}, tmp_path / "encoder.png", full=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures.png", "text.png"]


def test_a_figure_stands_beside_the_teachers_own():
    """Equal ones are paired; what comes through the vision decoder, with what the teacher gives by itself."""
    rows = [
        figure("zero_shot_top1", 0.2, 0, 1, at={"way": "vision decoder"}, **PICTURES),
        figure("knn_accuracy", 0.3, 0, 1, at={"feature": "patch mean"}, **PICTURES),
        figure("zero_shot_top1", 0.4, 0, 1, "teacher", at={"way": "class token"}, **PICTURES),
        figure("knn_accuracy", 0.5, 0, 1, "teacher", at={"feature": "class token"}, **PICTURES),
        figure("knn_accuracy", 0.6, 0, 1, "teacher", evaluator="other pictures", suite="image"),
    ]
    ((title, own, other),) = retention(RESULTS | {"figures": rows})
    assert title == "zero-shot top 1, pictures\nvision decoder"
    assert (own["value"], other["value"]) == (0.2, 0.4)
    assert retention(RESULTS | {"figures": rows}, full=False) == []
    assert retention(RESULTS | {"subjects": RESULTS["subjects"][:1]}) == []


def test_an_encoder_claims_no_reading(exported):
    data = ModelCard.load(exported["encoder"].folder / "README.md").data
    assert data.pipeline_tag == "image-feature-extraction"
    assert {each.metric_name for each in data.eval_results} == {"knn_accuracy, class token"}


def test_the_examples_of_the_card_run(exported, tmp_path, monkeypatch):
    """The Python blocks of both cards, with the repository's name put to the folder."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 32), "white").save("line.png")
    Image.new("RGB", (64, 32), "white").save("picture.jpg")
    for done in exported.values():
        blocks = (done.folder / "README.md").read_text().split("```python\n")[1:]
        assert len(blocks) == (3 if done is exported["full"] else 2)
        for block in blocks:
            code = block.split("```")[0].replace(done.repo_id, str(done.folder))
            exec(compile(code, "card", "exec"), {})


def test_a_pipeline_takes_messages_and_the_plain_prompt(exported):
    from PIL import Image
    from transformers import pipeline

    read = pipeline("image-text-to-text", model=str(exported["full"].folder))
    picture = Image.new("RGB", (64, 32), "white")
    prompt = read.processor.task_prompts["ocr"]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    plain = read(images=picture, text=f"<image>{prompt}", return_tensors=True)
    chat = read(text=[{"role": "user", "content": content}], return_tensors=True)
    assert chat[0]["generated_token_ids"].tolist() == plain[0]["generated_token_ids"].tolist()


def test_a_token_in_a_file_stops_the_push(unchecked, tmp_path):
    copy = tmp_path / "copy"
    full_model().save_pretrained(copy)
    processor().save_pretrained(copy)
    (copy / "log.jsonl").write_text(json.dumps({"note": SECRET}))
    with pytest.raises(PublishError, match=r"log.jsonl holds what looks like a token") as caught:
        publish(copy, "alice/unit", dry_run=True)
    assert SECRET not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ the Hub


def test_pushed_and_loaded_again_by_a_stranger(online, unchecked, run, tmp_path):
    """Push, push again, load by `repo_id` and `revision` in a clean process with a fresh cache."""
    first = publish(run, "alice/unit", api=api(online), private=True)
    assert set(online.files("alice/unit")) == set(first.files) | {".gitattributes"}
    assert first.commit == online.head("alice/unit")
    before = len(online.requests)
    again = publish(run, "alice/unit", api=api(online))
    assert again.uploaded == []
    assert again.commit == first.commit
    assert not [one for one in online.requests[before:] if one.method in ("POST", "PUT")]
    code = (
        "import sys, torch\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('alice/unit', revision=sys.argv[1], trust_remote_code=True)\n"
        "torch.save(model.state_dict(), sys.argv[2])\n"
        "assert 'modeling_unit' not in sys.modules, sys.modules['modeling_unit']\n"
    )
    command = [sys.executable, "-I", "-c", code, first.commit, str(tmp_path / "state.pt")]
    done = online.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = UnitForPreTraining.from_pretrained(run).vision_model.state_dict()
    assert {name.removeprefix("vision_model.") for name in found} == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[f"vision_model.{name}"], tensor), name


@pytest.fixture
def folder(tmp_path):
    """A repository small enough to be uploaded at once."""
    folder = tmp_path / "small"
    folder.mkdir()
    save_file({"a": torch.arange(4000.0)}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# small\n")
    return folder


def test_one_commit_replaces_what_an_earlier_push_left_and_nothing_else(online, folder):
    client = api(online)
    client.create_repo("alice/unit")
    for name in ("model-00001-of-00002.safetensors", "old_unit.py", "my-notes.txt"):
        client.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id="alice/unit")
    commits = len(client.list_repo_commits("alice/unit"))
    done = upload(folder, "alice/unit", client)
    assert len(client.list_repo_commits("alice/unit")) == commits + 1
    assert set(online.files("alice/unit")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "my-notes.txt",
    }
    assert "old_unit.py" in done.uploaded
    (folder / "config.json").write_text('{"changed": 1}')
    assert upload(folder, "alice/unit", client).uploaded == ["config.json"]


def test_a_branch_and_a_pull_request(online, folder):
    client = api(online)
    client.create_repo("alice/unit")
    main_before = online.head("alice/unit")
    on_branch = upload(folder, "alice/unit", client, revision="stage-1")
    assert online.head("alice/unit") == main_before
    assert online.head("alice/unit", "stage-1") == on_branch.commit
    proposed = upload(folder, "alice/unit", client, create_pr=True)
    assert online.head("alice/unit") == main_before
    assert proposed.url.endswith("/discussions/1")
    assert "model.safetensors" in online.files("alice/unit", "refs/pr/1")


def test_a_card_edited_on_the_hub_is_kept_and_said(online, folder, capsys):
    """Ours is replaced by ours; what people wrote stays, until it is said that it shall not."""
    client = api(online)
    readme = folder / "README.md"

    def push(title, **wishes):
        readme.write_text(cards.signed(f"---\nlicense: apache-2.0\n---\n# {title}\n"))
        return upload(folder, "alice/unit", client, **wishes)

    push("first")
    assert push("second").uploaded == ["README.md"]
    edited = online.files("alice/unit")["README.md"].replace(b"second", b"second, with a warning")
    client.upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id="alice/unit")
    done = push("third")
    assert (done.kept, done.uploaded) == (["README.md"], [])
    report_push(done)
    assert "README.md was edited on the Hub and is kept" in capsys.readouterr().out
    assert online.files("alice/unit")["README.md"] == edited
    assert push("third", overwrite_card=True).kept == []
    assert online.files("alice/unit")["README.md"] == readme.read_bytes()


def test_another_kind_of_model_is_not_replaced_in_silence(online, folder, tmp_path):
    client = api(online)
    upload(folder, "alice/unit", client)
    before = online.head("alice/unit")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"b": torch.zeros(3)}, str(adapter / "adapter_model.safetensors"))
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(PublishError, match="holds an encoder alone, which this push would replace by an adapter"):
        upload(adapter, "alice/unit", client)
    assert online.head("alice/unit") == before
    upload(adapter, "alice/unit", client, replace=True)
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(online.files("alice/unit"))
    assert not {"config.json", "model.safetensors"} & set(online.files("alice/unit"))


def test_a_push_that_was_overtaken_is_refused(online, folder, monkeypatch):
    client = api(online)
    client.create_repo("alice/unit")
    tree = client.list_repo_tree

    def overtaken(*words, **more):
        found = list(tree(*words, **more))
        api(online).upload_file(path_or_fileobj=b"other", path_in_repo="other.txt", repo_id="alice/unit")
        return found

    monkeypatch.setattr(client, "list_repo_tree", overtaken)
    with pytest.raises(PublishError, match="moved"), publishing.explained("alice/unit", client):
        upload(folder, "alice/unit", client)
    assert set(online.files("alice/unit")) == {".gitattributes", "other.txt"}


def restart(hub) -> None:
    """Up again, once it has gone down altogether."""
    until = time.monotonic() + 10
    while True:
        try:
            hub.start()
            return
        except OSError:  # its port is not free yet
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


KILLED = [  # every kind of request of a push into a new repository that comes after the first look at it
    ("POST", "repos/create", 0),
    ("GET", "tree", 0),
    ("POST", "preupload", 0),
    ("POST", "batch", 0),
    ("PUT", "parts", 0),
    ("PUT", "parts", 1),  # the second part
    ("POST", "complete", 0),
    ("POST", "verify", 0),
    ("POST", "commit", 0),
]


@pytest.mark.parametrize(("method", "route", "passing"), KILLED)
def test_a_server_that_dies_leaves_the_last_whole_commit_and_a_rerun_completes(online, folder, method, route, passing):
    client = api(online)
    online.part_size = 6000  # of 16 kB: three parts
    online.fail(method=method, route=route, skip=passing, cut_after=0, kill=True)
    with pytest.raises(PublishError, match="no connection to") as caught, publishing.explained("alice/unit", client):
        upload(folder, "alice/unit", client)
    assert "\n" not in str(caught.value)
    assert online.token not in str(caught.value)
    if route != "repos/create":
        assert set(online.files("alice/unit")) == {".gitattributes"}
    restart(online)
    done = upload(folder, "alice/unit", client)
    assert online.head("alice/unit") == done.commit
    assert online.files("alice/unit")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_commit_whose_answer_was_lost_is_found_by_the_rerun(online, folder):
    client = api(online)
    online.fail(method="POST", route="commit", times=-1, drop_answer=True)
    with pytest.raises(PublishError, match="run it again"), publishing.explained("alice/unit", client):
        upload(folder, "alice/unit", client)
    online.faults.clear()
    upload(folder, "alice/unit", client)
    assert {"README.md", "config.json", "model.safetensors"} < set(online.files("alice/unit"))
    assert upload(folder, "alice/unit", client).uploaded == []


LOUD = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
import huggingface_hub, transformers
huggingface_hub.logging.set_verbosity_debug()
transformers.logging.set_verbosity_debug()
from training import publish
from training.publish import PublishError, explained, upload
from pathlib import Path
api = huggingface_hub.HfApi()
try:
    with explained("alice/unit", api):
        publish.check_access(api, "alice/unit")
        upload(Path("small"), "alice/unit", api)
except PublishError as error:
    print(error)
    raise
"""


@pytest.mark.parametrize("fault", [None, {"status": 403}, {"cut_after": 0}])
def test_the_token_is_in_no_output_however_loud(online, folder, tmp_path, fault):
    """Debug logging of every library, curl lines of huggingface_hub, and the traceback of what went wrong."""
    if fault:
        online.fail(method="POST", route="batch", times=-1, **fault)
    environment = {"PYTHONPATH": str(Path(publishing.__file__).parents[1]), "HF_DEBUG": "1"}
    done = online.python(LOUD, cwd=tmp_path, env=environment)
    assert done.returncode == (1 if fault else 0), done.stderr
    assert "DEBUG" in done.stderr
    assert online.token not in done.stdout + done.stderr
    if fault:
        assert len(done.stdout.strip().splitlines()) == 1
    assert not online.leaks()


def refusal(run, client, capsys, **wishes) -> str:
    """What a push says that must fail before anything is exported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "export", lambda *rest: pytest.fail("went on to export"))
        patch.setattr(publishing, "_api", lambda: client)
        arguments = ["push", str(run), wishes.pop("repo_id", "alice/unit"), *wishes.pop("options", [])]
        assert main(arguments) == 2
    said = capsys.readouterr()
    if isinstance(client.token, str):
        assert client.token not in said.out + said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_refusals_are_one_line_and_come_before_the_work(online, run, capsys, monkeypatch):
    from hub_server import ALICE_READ_ONLY, BOB

    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "no token" in refusal(run, HfApi(endpoint=online.endpoint), capsys)
    assert "does not know the token" in refusal(run, api(online, SECRET), capsys)
    assert "may only read" in refusal(run, api(online, ALICE_READ_ONLY), capsys)
    assert "no right to make alice/unit" in refusal(run, api(online, BOB), capsys)
    assert "does not exist yet" in refusal(run, api(online), capsys, options=["--create-pr"])
    api(online).create_repo("alice/unit")
    assert "no right to write" in refusal(run, api(online, BOB), capsys)
    assert "is public" in refusal(run, api(online), capsys, options=["--private"])
    assert "leave out --revision" in refusal(run, api(online), capsys, options=["--create-pr", "--revision", "a"])
    online.stop()
    assert "no connection" in refusal(run, api(online), capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE" in refusal(run, api(online), capsys)


def test_save_pretrained_with_push_to_hub_uploads_the_code_too(online, tmp_path):
    """transformers' own upload, which knows nothing of the code; one commit each beside the Hub's own first."""
    unit_model().save_pretrained(tmp_path / "full")
    processor().save_pretrained(tmp_path / "full")
    code = (
        "import sys\n"
        "from modeling_unit import UnitForPreTraining, UnitProcessor\n"
        "model = UnitForPreTraining.from_pretrained('full')\n"
        "model.save_pretrained('a', push_to_hub=True, repo_id='alice/full')\n"
        "model.vision_model.save_pretrained('b', push_to_hub=True, repo_id='alice/encoder')\n"
        "read = UnitProcessor.from_pretrained('full')\n"
        "read.save_pretrained('c', push_to_hub=True, repo_id='alice/read')\n"
        "read.image_processor.save_pretrained('d', push_to_hub=True, repo_id='alice/images')\n"
    )
    done = online.python(code, cwd=tmp_path, env={"PYTHONPATH": str(Path(publishing.__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    for name in ("full", "encoder", "read", "images"):
        assert {"encoder_unit.py", "modeling_unit.py", "hub_unit.py"} <= set(online.files(f"alice/{name}")), name
        assert len(api(online).list_repo_commits(f"alice/{name}")) == 2, name


# ------------------------------------------------------------------------------------------------------ from a recipe


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"push_to_hub": True}, "hub_model_id"),
        ({"push_to_hub": True, "hub_model_id": "unit"}, "owner"),
        ({"push_to_hub": True, "hub_model_id": "alice/unit", "hub_strategy": "every_save"}, "hub_strategy"),
        ({"hub_token": SECRET}, "HF_TOKEN"),
    ],
)
def test_a_recipe_whose_push_would_fail_is_refused_at_once(tmp_path, settings, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps({"stage": "teacher", "training": {"max_steps": 1, "output_dir": str(tmp_path)} | settings})
    )
    with pytest.raises(ValueError, match=said) as caught:
        recipes.main(path)
    assert SECRET not in str(caught.value)


def test_the_trainer_hears_nothing_of_the_push():
    given = {"max_steps": 3, "push_to_hub": True, "hub_model_id": "alice/unit", "hub_private_repo": True}
    rest, hub = take_hub_settings(given)
    assert rest == {"max_steps": 3}
    assert hub == {"push_to_hub": True, "hub_model_id": "alice/unit", "hub_private_repo": True}


def test_a_run_pushes_itself_by_the_same_path(online, unchecked, run, monkeypatch):
    monkeypatch.setattr(publishing, "_api", lambda: api(online))
    done = push_run(run, {"hub_model_id": "lab/unit", "hub_private_repo": True})
    assert done.commit == online.head("lab/unit")
    assert "README.md" in online.files("lab/unit")
    assert api(online).model_info("lab/unit").private
    online.stop()
    with pytest.raises(PublishError, match=r"model is in .*unit push"):
        push_run(run, {"hub_model_id": "lab/unit"})


def test_a_recipe_pushes_once_at_its_end(tmp_path, monkeypatch):
    """Asked before training, done when model and papers are saved; the Trainer itself uploads nothing."""
    order = []

    class Trainer:
        model = torch.nn.ModuleDict({"vision_model": torch.nn.Linear(2, 2)})
        state = SimpleNamespace(log_history=[])

        def train(self, **_):
            order.append("train")

        def is_world_process_zero(self):
            return True

        def whole_model(self):
            return self.model

    def stage(recipe, arguments):
        assert not arguments.push_to_hub
        assert arguments.hub_model_id is None
        return Trainer(), lambda model, out: (out.mkdir(), order.append("save"))

    monkeypatch.setattr(recipes, "_stage_run", stage)
    monkeypatch.setattr(recipes, "check_destination", lambda hub: order.append("ask"))
    monkeypatch.setattr(
        recipes,
        "push_run",
        lambda out, hub: order.append((out.name, (out / "recipe.json").is_file(), hub["hub_model_id"])),
    )
    training = {"max_steps": 1, "output_dir": str(tmp_path / "out"), "push_to_hub": True, "hub_model_id": "alice/unit"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"stage": "intra_scale", "training": training}))
    recipes.main(tmp_path / "recipe.yaml")
    assert order == ["ask", "train", "save", ("out", True, "alice/unit")]
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["code"].startswith("unit-vision")
