"""Recipes: what is refused before anything starts, and a toy run from nothing to a reader."""

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import document_row, picture_row

import training.recipe as recipes
from modeling_unit import UnitForConditionalGeneration, UnitForPreTraining, UnitModel, UnitProcessor, UnitVisionModel
from training.checkpoints import checkpoints, damage
from training.data.schema import write_shards
from training.recipe import Recipe, main, read_recipe
from training.resume import differences, facts_of
from training.trainer import InterScaleTrainer, IntraScaleTrainer

# files below ablations/ are grids of recipes: test_ablations.py
SHIPPED = [
    path
    for path in sorted((Path(recipes.__file__).parent / "recipes").glob("**/*.yaml"))
    if path.parent.name != "ablations"
]


def written(folder, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_reads_and_opens_with_its_command(path):
    recipe = read_recipe(path)
    assert recipe.stage in ("teacher", "intra_scale", "inter_scale", "llava")
    assert recipe.training["max_steps"] > 0
    where = path.relative_to(Path(recipes.__file__).parents[1])
    assert path.read_text().splitlines()[0] == f"# unit train {where}"


def test_recipes_are_shipped():
    assert len(SHIPPED) >= 3
    stages = [read_recipe(path).stage for path in SHIPPED]
    assert {"teacher", "intra_scale", "inter_scale"} <= set(stages)


def test_each_shipped_recipe_starts_from_what_one_before_it_wrote():
    for folder in {path.parent for path in SHIPPED}:
        outputs = set()
        for path in sorted(folder.glob("*.yaml")):
            recipe = read_recipe(path)
            for source in (recipe.start, recipe.teacher):
                assert source is None or source in outputs or not source.startswith("runs/"), path
            outputs.add(recipe.training["output_dir"])


def test_overrides_lie_over_the_file(tmp_path):
    path = written(tmp_path, "stage: teacher\ntraining: {max_steps: 5, seed: 1}\n")
    recipe = read_recipe(
        path,
        [
            "training.max_steps=7",
            "training.bf16=true",
            "model.vision_config.hidden_size=64",
            "pictures=other",
            "lora.parts=[encoder]",
        ],
    )
    assert recipe.training == {"max_steps": 7, "seed": 1, "bf16": True}
    assert recipe.model == {"vision_config": {"hidden_size": 64}}
    assert recipe.pictures == "other"
    assert recipe.lora == {"parts": ["encoder"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E-5", 5e-5), ("1.0e-3", 1e-3), ("-2e+3", -2000.0), ("0.01", 0.01), (".5e1", 5.0)],
)
def test_rates_are_numbers_with_or_without_a_dot(tmp_path, text, value):
    path = written(tmp_path, f"stage: teacher\ntraining: {{learning_rate: {text}}}\n")
    assert read_recipe(path).training["learning_rate"] == value
    assert read_recipe(path, [f"training.weight_decay={text}"]).training["weight_decay"] == value


def test_words_that_begin_like_numbers_stay_words(tmp_path):
    path = written(tmp_path, "stage: teacher\npictures: 1e-4-pictures\nteacher: runs/2e5x\n")
    recipe = read_recipe(path)
    assert (recipe.pictures, recipe.teacher) == ("1e-4-pictures", "runs/2e5x")


def test_empty_sections_are_as_good_as_none(tmp_path):
    recipe = read_recipe(written(tmp_path, "stage: teacher\ntraining:\nlora:\ngroups:\nmodel:\n"), ["training.seed=3"])
    assert (recipe.training, recipe.lora, recipe.groups, recipe.model) == ({"seed": 3}, {}, [], {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage: [intra_scale\n", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("training: {}\n", "the recipe lacks the key 'stage'"),
        ("stage: warmup\n", "stage must be one of teacher, intra_scale, inter_scale, llava, got 'warmup'"),
        ("stage: teacher\ntrainin: {}\n", "Unknown key 'trainin' in the recipe. Did you mean 'training'?"),
        ("stage: teacher\ntraining: {max_step: 4}\n", "Did you mean 'max_steps'?"),
        ("stage: teacher\ntraining: {vision_wieght: 4}\n", "Did you mean 'vision_weight'?"),
        ("stage: teacher\nlora: {part: [encoder]}\n", "Did you mean 'parts'?"),
        ("stage: teacher\ntraining: 5\n", "`training` must be a mapping, got 5"),
        ("stage: teacher\ngroups: {kind: document}\n", "`groups` must be a list"),
        ("stage: teacher\ngroups: [document]\n", "a group must be a mapping"),
        (
            "stage: teacher\ngroups: [{kindd: document, scale: 4}]\n",
            "Unknown key 'kindd' in a group. Did you mean 'kind'?",
        ),
        ("stage: teacher\ngroups: [{kind: document}]\n", "a group lacks the key 'scale'"),
        (
            "stage: teacher\ngroups: [{kind: document, scale: 4, sources: [{weight: 1}]}]\n",
            "a source lacks the key 'path'",
        ),
        ("stage: teacher\ngroups: [{kind: document, scale: 4, sources: x}]\n", "`sources` must be a list"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        read_recipe(written(tmp_path, text))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps", "must look like key=value"),
        ("training.max_step=4", "Did you mean 'max_steps'?"),
        ("stage.name=4", "leads into 'stage', which is no mapping"),
        ("training.seed=[1", "is not valid YAML"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path, override, words):
    with pytest.raises(ValueError) as error:
        read_recipe(written(tmp_path, "stage: teacher\n"), [override])
    assert words in str(error.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no recipe at .*nowhere\.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_a_run_without_an_end_is_refused(tmp_path):
    path = written(tmp_path, f"stage: teacher\ntraining: {{output_dir: {tmp_path}/out}}\n")
    with pytest.raises(ValueError, match=r"needs training\.max_steps"):
        main(path)


@pytest.mark.parametrize(
    ("extra", "words"),
    [("", "A new model needs `teacher`"), ("start: {full}\n", "`teacher` is missing: L_vis needs the frozen teacher")],
)
def test_a_stage_without_its_teacher_is_refused(tmp_path, extra, words):
    if extra:
        from tiny import processor, unit_model

        unit_model().save_pretrained(tmp_path / "full")
        processor().save_pretrained(tmp_path / "full")
        extra = extra.format(full=tmp_path / "full")
    text = f"stage: intra_scale\n{extra}training: {{max_steps: 1, output_dir: {tmp_path}/out}}\n"
    with pytest.raises(ValueError, match=words):
        main(written(tmp_path, text))


# -- a toy run -------------------------------------------------------------------------------------


TRAINING = {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1, "disable_tqdm": True}
TRAINING |= {"optimizer": "muon"}
PROCESSOR = {"patch_size": 8, "base_size": 32, "scale_as": "area", "max_side": 128}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Stage zero, one and two of two steps each, each from its recipe; where each of them wrote."""
    root = tmp_path_factory.mktemp("toy")
    documents = [document_row(f"line {index}", 48, 16, seed=index) for index in range(8)]
    write_shards(documents, root / "documents")
    write_shards([picture_row(f"thing {index}", seed=index) for index in range(8)], root / "pictures")
    generator = torch.Generator().manual_seed(0)
    targets = {
        "sentence": torch.randn(8, 384, generator=generator),
        "efficientnet_features": torch.randn(8, 1280, generator=generator),
    }
    save_file(targets, str(root / "pictures" / "targets.safetensors"))

    def group(kind, scale):
        folder = "documents" if kind == "document" else "pictures"
        return {"kind": kind, "scale": scale, "rows": 2, "sources": [{"path": str(root / folder)}]}

    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    vision |= {"patch_size": 8, "image_size": 64, "cpe_max_size": 64}
    text = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    text |= {"tie_word_embeddings": True}
    teacher, first, second = str(root / "teacher"), str(root / "stage1"), str(root / "stage2")
    steps = {
        "teacher": {
            "stage": "teacher",
            "pictures": str(root / "pictures"),
            "pictures_per_batch": 4,
            "model": {"vision_config": vision},
            "image_processor": PROCESSOR,
            "training": TRAINING | {"output_dir": teacher},
        },
        "stage1": {
            "stage": "intra_scale",
            "teacher": teacher,
            "model": {"connector_config": {"connector_type": "mlp", "unshuffle": 1}, "text_config": text},
            "image_processor": PROCESSOR,
            "groups": [group("document", 4), group("natural", 1)],
            "training": TRAINING | {"output_dir": first, "character_weight": 1.0, "alignment_weight": 0.5},
        },
        "stage2": {
            "stage": "inter_scale",
            "start": first,
            "teacher": teacher,
            "groups": [group("document", 4), group("document", 1), group("natural", 1), group("natural", 4)],
            "training": TRAINING | {"output_dir": second},
        },
    }
    for name, recipe in steps.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert main(root / f"{name}.yaml") == root / name
    return root


def test_the_teacher_is_an_encoder_repository_with_its_projection(toy):
    encoder = UnitVisionModel.from_pretrained(toy / "teacher")
    assert encoder.config.hidden_size == 32
    assert load_file(toy / "teacher" / "visual_projection.safetensors")["weight"].shape == (384, 32)


def test_stage_one_starts_from_the_teacher_and_keeps_its_projection(toy):
    model = UnitForPreTraining.from_pretrained(toy / "stage1")
    teacher = UnitVisionModel.from_pretrained(toy / "teacher")
    projection = load_file(toy / "teacher" / "visual_projection.safetensors")["weight"]
    assert torch.equal(model.visual_projection.weight, projection)  # frozen
    for name, tensor in teacher.state_dict().items():
        trained = model.vision_model.state_dict()[name]
        assert not torch.equal(trained, tensor), name
        assert float((trained - tensor).abs().max()) < 0.05, name  # two small steps away from it
    assert model.character_head.weight.shape[0] == 3 * 96


def test_stage_two_goes_on_without_the_auxiliary_head(toy):
    model = UnitForPreTraining.from_pretrained(toy / "stage2")
    assert model.config.num_character_classes == 0
    assert not hasattr(model, "character_head")
    first = UnitForPreTraining.from_pretrained(toy / "stage1").state_dict()
    for name, tensor in model.state_dict().items():
        distance = float((tensor - first[name]).abs().max())
        assert (distance == 0) == name.startswith("visual_projection"), name
        assert distance < 0.05, name


@torch.no_grad()
def test_the_trained_model_reads(toy):
    model = UnitForConditionalGeneration.from_pretrained(toy / "stage2").eval()
    processor = UnitProcessor.from_pretrained(toy / "stage2")
    inputs = processor(images=np.full((20, 30), 255, dtype=np.uint8), task="ocr")
    ids = model.generate(**inputs, max_new_tokens=4)
    assert len(processor.decode_new(ids, inputs)) == 1
    assert model.generation_config.eos_token_id == 1
    assert type(UnitModel.from_pretrained(toy / "stage2").vision_model) is UnitVisionModel


@pytest.mark.parametrize("name", ["teacher", "stage1", "stage2"])
def test_a_run_leaves_its_recipe_its_log_and_its_curve(toy, name):
    recipe = json.loads((toy / name / "recipe.json").read_text())
    assert recipe["training"]["max_steps"] == 2
    assert recipe["seconds"] >= 0
    entries = [json.loads(line) for line in (toy / name / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]
    if name == "stage1":
        logged = set().union(*entries)
        assert {"document_x4/character_loss", "document_x4/alignment_loss", "natural_x1/vision_loss"} <= logged
    if name == "stage2":
        assert {"natural_x4/vision_loss", "document_x1/language_loss"} <= set().union(*entries)
    assert (toy / name / "curve.png").is_file()


def test_the_same_command_goes_on_from_the_last_checkpoint(toy, capsys, tmp_path):
    out = tmp_path / "stage2"
    shutil.copytree(toy / "stage2", out)
    before = load_file(out / "model.safetensors")
    # two steps more: the schedule had come to its end, so that the third is of no size
    main(toy / "stage2.yaml", [f"training.output_dir={out}", "training.max_steps=4"], accept_changes=True)
    assert f"Going on from {out / 'checkpoint-2'}" in capsys.readouterr().out
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    after = load_file(out / "model.safetensors")
    assert not torch.equal(after["vision_decoder.fc1.weight"], before["vision_decoder.fc1.weight"])


def test_what_trains_is_printed_first(toy, capsys):
    main(toy / "teacher.yaml")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["part", "parameters", "trained", "tensors"]
    assert {line.split()[0] for line in lines[1:5]} == {"encoder", "projection", "heads", "all"}


def test_lora_is_merged_when_the_run_ends(toy, tmp_path):
    out = main(
        toy / "stage2.yaml",
        [
            f"training.output_dir={tmp_path / 'lora'}",
            "lora.parts=[encoder, language_decoder]",
            "lora.r=2",
            "training.save_steps=2",
        ],
    )
    model, report = UnitForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert damage(out / "checkpoint-2") is None
    manifest = json.loads((out / "checkpoint-2" / "manifest.json").read_text())
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(manifest["files"])
    first = UnitForPreTraining.from_pretrained(toy / "stage1").state_dict()
    position = "vision_model.embeddings.position_embedding"
    assert torch.equal(model.state_dict()[position], first[position])
    assert not torch.equal(
        model.state_dict()["vision_model.blocks.0.attn.qkv.weight"], first["vision_model.blocks.0.attn.qkv.weight"]
    )


# -- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "stage1", "stage2"])
def test_every_stage_leaves_whole_checkpoints_with_their_recipe(toy, name):
    assert [each.name for each in checkpoints(toy / name)] == ["checkpoint-1", "checkpoint-2"]
    for folder in checkpoints(toy / name):
        assert damage(folder) is None
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["recipe"]["stage"] == read_recipe(toy / f"{name}.yaml").stage
        assert manifest["batches_per_step"] == 1


@pytest.mark.parametrize("name", ["teacher", "stage1", "stage2"])
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(toy, tmp_path, name, capsys):
    """From the one before it to the same weights and the same log."""
    out = tmp_path / name
    shutil.copytree(toy / name, out)
    (out / "checkpoint-2" / "model.safetensors").unlink()
    (out / "model.safetensors").unlink()
    (out / "log.jsonl").write_text("")
    main(toy / f"{name}.yaml", [f"training.output_dir={out}"])
    said = capsys.readouterr().out
    assert f"{out}/checkpoint-2 is damaged: model.safetensors is missing." in said
    assert f"Going on from {out}/checkpoint-1" in said
    before, after = (load_file(folder / "model.safetensors") for folder in (toy / name, out))
    assert all(torch.equal(after[key], before[key]) for key in before)
    logs = [
        [line for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]
        for folder in (toy / name, out)
    ]
    assert logs[0] == logs[1]


def test_the_log_is_written_line_by_line(toy, tmp_path, monkeypatch):
    """What was logged is there when a run is stopped, and once only when it has gone on."""
    out = tmp_path / "out"
    train = IntraScaleTrainer.training_step
    calls = iter(range(9))

    def stopped(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    changes = [f"training.output_dir={out}", "training.max_steps=4", "training.save_steps=2"]
    monkeypatch.setattr(IntraScaleTrainer, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(toy / "stage1.yaml", changes)
    log = out / "log.jsonl"
    first = log.read_text().splitlines()
    assert [json.loads(line)["step"] for line in first] == [1, 2, 3]
    with log.open("a") as opened:
        opened.write('{"loss": 1.')  # and the line that a kill has cut off
    monkeypatch.undo()
    main(toy / "stage1.yaml", changes)
    lines = [line for line in log.read_text().splitlines() if '"loss"' in line]
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:3] == first


def test_another_recipe_in_the_same_folder_is_refused_key_by_key(toy, tmp_path, capsys):
    out = tmp_path / "stage2"
    shutil.copytree(toy / "stage2", out)
    changes = [f"training.output_dir={out}", "training.learning_rate=5e-4", "training.max_steps=3"]
    changes += ["training.gradient_accumulation_steps=2"]
    with pytest.raises(ValueError) as error:
        main(toy / "stage2.yaml", changes)
    assert str(error.value) == (
        f"{out} holds a run of another recipe (training.learning_rate: 0.001 -> 0.0005; training.max_steps: 2 -> 3; "
        "micro-batches of a step: 1 -> 2): give another training.output_dir, or --accept-changes to go on with it all "
        "the same."
    )
    assert [each.name for each in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    main(toy / "stage2.yaml", changes, accept_changes=True)
    assert (
        "The recipe has changed: training.learning_rate: 0.001 -> 0.0005; training.max_steps: 2 -> 3;"
        in capsys.readouterr().out
    )
    assert [each.name for each in checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]


def test_a_finished_model_without_checkpoints_is_not_written_over(toy, tmp_path):
    out = tmp_path / "stage2"
    shutil.copytree(toy / "stage2", out, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(ValueError, match=r"training\.weight_decay: 0\.01 -> 0\.2"):
        main(toy / "stage2.yaml", [f"training.output_dir={out}", "training.weight_decay=0.2"])


def test_what_leaves_the_curve_as_it_is_may_change(toy, tmp_path):
    out = tmp_path / "stage1"
    shutil.copytree(toy / "stage1", out)
    changes = ["training.logging_steps=2", "training.save_steps=3", "training.dataloader_num_workers=1", "threads=1"]
    changes += ["training.nonfinite=skip", "training.weight_decay=0.01"]  # the last is what holds without it
    main(toy / "stage1.yaml", [f"training.output_dir={out}", *changes])


@pytest.mark.parametrize(
    ("training", "refused"),
    [
        ({"lr_scheduler_type": "constant"}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, True),  # of all steps
        ({"lr_scheduler_type": "cosine"}, True),
        ({}, True),
    ],
)
def test_more_steps_are_free_where_the_rate_does_not_look_at_them(training, refused):
    before, now = (
        facts_of(Recipe("teacher", training=training | {"max_steps": steps, "learning_rate": 0.1}), 2)
        for steps in (4, 8)
    )
    assert differences(before, now) == ({"training.max_steps": (4, 8)} if refused else {})


def test_differences_by_hand():
    before = facts_of(Recipe("intra_scale", start="a", groups=[{"kind": "document", "rows": 2}]), 4)
    now = facts_of(Recipe("intra_scale", start="b", groups=[{"kind": "document", "rows": 3}], lora={"r": 16}), 4)
    assert differences(before, before) == {}
    assert differences(before, now) == {"start": ("a", "b"), "groups.0.rows": (2, 3)}  # r is 16 without it
    assert differences({}, now) == {}  # nothing is known of what was before


def test_the_rows_of_a_streamed_step_are_named_when_it_stops(toy, tmp_path, monkeypatch):
    path = written(tmp_path, yaml.safe_dump(shared_recipe(toy, tmp_path / "out", streaming=True, shuffle_buffer=4)))
    compute_loss = InterScaleTrainer.compute_loss
    monkeypatch.setattr(
        InterScaleTrainer, "compute_loss", lambda *args, **kwargs: compute_loss(*args, **kwargs) * float("nan")
    )
    with pytest.raises(ValueError, match="Step 1: the loss is nan"):
        main(path)
    facts = json.loads((tmp_path / "out" / "offending" / "step-1" / "rank-0" / "facts.json").read_text())
    assert len(facts["rows"]) == 1
    for name, rows in facts["rows"][0].items():
        assert name in ("natural_x1", "natural_x4", "document_x1", "document_x4")
        assert rows
        assert all(row.startswith("test/") for row in rows)


# -- kill -9 ---------------------------------------------------------------------------------------


def test_kill_9_and_the_same_command_goes_on(toy, tmp_path):
    """Once between two checkpoints, once while one is written: the same log and the same weights, bit by bit."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["training.recipe"])
    recipe = shared_recipe(toy, tmp_path / "straight")
    recipe["training"] |= {"max_steps": 8, "save_steps": 2, "use_cpu": True}
    recipe["threads"] = 1
    path = written(tmp_path, yaml.safe_dump(recipe))
    out = tmp_path / "killed"
    log = out / "log.jsonl"

    def run(folder, until=None) -> int:
        process = processes.Process(target=main, args=(path, [f"training.output_dir={folder}"]))
        process.start()
        end = time.monotonic() + 100
        while process.is_alive() and time.monotonic() < end:
            if until is not None and until():
                process.kill()
                break
            time.sleep(0.001)
        process.join(100)
        return process.exitcode

    def steps() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    assert run(tmp_path / "straight") == 0
    assert run(out, lambda: steps() == 3) == -signal.SIGKILL
    assert run(out, lambda: any(out.glob(".checkpoint-6.partial/checkpoint-6/*"))) == -signal.SIGKILL
    assert all(damage(folder) is None for folder in checkpoints(out))
    assert run(out) == 0
    lines = [
        [line for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]
        for folder in (tmp_path / "straight", out)
    ]
    assert len(lines[0]) == 8
    assert lines[0] == lines[1]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()


# -- streaming, curriculum, shares -----------------------------------------------------------------


def shared_recipe(toy, out, **data) -> dict:
    """Stage 2 from shares instead of groups."""
    recipe = yaml.safe_load((toy / "stage2.yaml").read_text())
    del recipe["groups"]
    recipe["data"] = {
        "patches": 120,
        "exchanged": 0.3,
        "sources": [
            {"path": str(toy / "documents"), "kind": "document"},
            {"path": str(toy / "pictures"), "kind": "natural"},
        ],
    } | data
    recipe["training"] |= {"output_dir": str(out), "max_steps": 4, "save_steps": 2}
    return recipe


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_from_shares_resumes_at_the_same_weights(toy, tmp_path, workers):
    curriculum = {"steps": 2, "text": [9, 12], "levels": 2}
    recipe = shared_recipe(toy, tmp_path / "straight", streaming=True, shuffle_buffer=4, curriculum=curriculum)
    recipe["training"]["dataloader_num_workers"] = workers
    path = written(tmp_path, yaml.safe_dump(recipe))
    straight = load_file(main(path) / "model.safetensors")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", again / "checkpoint-2")
    resumed = load_file(main(path, [f"training.output_dir={again}"]) / "model.safetensors")
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
    entries = [json.loads(line) for line in (again / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert entries[2]["data/rows"] > 0
    assert {"natural_x4/vision_loss", "document_x1/language_loss"} <= set().union(*entries)


def test_a_run_goes_on_with_the_plan_it_was_laid_out_for(toy, tmp_path):
    """Two ranks' plan on one: nothing needs to be set again."""
    recipe = shared_recipe(toy, tmp_path / "out", streaming=True, shuffle_buffer=4)
    path = written(tmp_path, yaml.safe_dump(recipe))
    main(path, ["data.ranks=2", "data.streams=4", "training.max_steps=2"])
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "data-state-0.json").read_text())
    assert (state["item"], state["ranks"], state["streams"]) == (2, 2, 4)
    main(path, accept_changes=True)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "data-state-0.json").read_text())
    assert (state["item"], state["ranks"], state["streams"]) == (4, 2, 4)


def test_an_indexed_run_from_shares_trains(toy, tmp_path, capsys):
    path = written(tmp_path, yaml.safe_dump(shared_recipe(toy, tmp_path / "out", tasks={"ocr": 1})))
    out = main(path, ["training.max_steps=2"])
    assert json.loads((out / "checkpoint-2" / "data-state-0.json").read_text()) == {
        "ranks": 1,
        "batches_per_step": 1,
    }
    main(path, ["training.max_steps=3", "training.gradient_accumulation_steps=2"], accept_changes=True)
    assert "took 1 micro-batches a step and this run takes 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {stream: true}\n", "Unknown key 'stream' in `data`. Did you mean 'streams'?"),
        ("data: {curriculum: {step: 3}}\n", "Did you mean 'steps'?"),
        ("data: {sources: [{weight: 1}]}\n", "a source lacks the key 'path'"),
        (
            "groups: [{kind: document, scale: 4}]\ndata: {patches: 9, sources: [{path: a, kind: document}]}\n",
            "`groups` and `data.sources` say the same",
        ),
        ("data: {exchanged: 2}\n", "data.exchanged must lie between 0 and 1"),
    ],
)
def test_wrong_data_settings_are_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        read_recipe(written(tmp_path, "stage: inter_scale\n" + text))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_no_is_a_word_where_yaml_takes_it_for_false(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stage: intra_scale\ntraining:\n  {name}: no\n")
    assert read_recipe(path).training == {name: "no"}
    assert read_recipe(path, [f"training.{name}=no"]).training == {name: "no"}
    assert read_recipe(path, ["training.bf16=no"]).training["bf16"] is False
