"""LoRA adapters as folders: what a run leaves, what peft makes of it, what `unit merge` gives back."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_unit import UnitForConditionalGeneration, UnitForPreTraining
from modeling_unit.llava_unit import clip_image_processor
from training import adapter as adapter_module
from training.adapter import base_of, export_adapter, merge_adapter, save_adapter
from training.arguments import LoraArguments
from training.data.schema import write_shards
from training.export import export_model
from training.lora import PRESETS, add_lora, lower_frozen, share_frozen, single_scale
from training.recipe import main as run_recipe
from training.recipe import read_recipe
from training.tokenizer import byte_tokenizer
from training.trainer import trainable_table
from unit_cli.__main__ import main

CLOSE = {"atol": 1e-5, "rtol": 0}  # one matrix in place of two rounds otherwise
BOTH = ["encoder", "language_decoder"]


@torch.no_grad()
def outputs(model) -> dict[str, torch.Tensor]:
    """What a model says of a picture: logits, patch features, what the vision decoder makes of them."""
    model = model.eval()
    made = model(**tiny.processor()(images=tiny.noise(40, 30), task="ocr"))
    found = {"logits": made.logits, "patches": made.image_features.patches}
    if hasattr(model, "vision_decoder"):
        found["teacher"] = model.reconstruct(made.image_features)
    return found


def same(model, expected, **tolerance) -> None:
    found = outputs(model)
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **(tolerance or CLOSE), msg=name)


def differ(one: dict, other: dict) -> bool:
    return all(float((one[name] - other[name]).abs().max()) > 1e-2 for name in one)


def adapted(model, parts=BOTH, **settings):
    """The model with adapters that do something, and parts in full that have moved."""
    wrapped = add_lora(model, LoraArguments(**({"parts": parts, "r": 2, "alpha": 4, "dropout": 0.0} | settings)))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return wrapped.eval()


def saved_base(folder, model=None, **settings):
    model = tiny.unit_model(text=tiny.QWEN3, **settings) if model is None else model
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return model


def of_base(folder, auto=AutoModelForPreTraining, adapter=None):
    base = auto.from_pretrained(folder)
    return base if adapter is None else PeftModel.from_pretrained(base, adapter)


def tree(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Data for stage 1 with its auxiliary loss, and what runs a recipe on it: (name, changes) -> folder."""
    root = tmp_path_factory.mktemp("adapter")
    write_shards([tiny.document_row(f"line {index}", seed=index) for index in range(4)], root / "documents")
    write_shards([tiny.picture_row(f"thing {index}", seed=index) for index in range(4)], root / "pictures")
    groups = [
        {"kind": kind, "scale": scale, "rows": 2, "sources": [{"path": str(root / folder)}]}
        for kind, scale, folder in (("document", 4, "documents"), ("natural", 1, "pictures"))
    ]

    def run(name, lora, **changes):
        training = {"max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "disable_tqdm": True}
        training |= {"logging_steps": 1, "save_steps": 1, "character_weight": 1.0, "output_dir": str(root / name)}
        recipe = {
            "stage": "intra_scale",
            "groups": groups,
            "training": training,
            "lora": lora if "adapter" in lora else {"r": 2} | lora,
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe | changes))
        return run_recipe(root / f"{name}.yaml")

    return SimpleNamespace(root=root, run=run)


@pytest.fixture(scope="module")
def run(recipes):
    """A run that started from a whole UNIT model with the auxiliary head: the model's folder, the run's."""
    torch.manual_seed(0)
    start = recipes.root / "start"
    saved_base(start, num_character_classes=96, projection_dim=8)
    (start / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A model\n")
    return start, recipes.run("whole", {"parts": BOTH}, start=str(start), teacher=str(start))


def test_a_run_leaves_its_adapter_beside_the_merged_weights(run):
    start, out = run
    assert sorted(tree(out / "adapter")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    ]
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (str(start.resolve()), None)
    assert settings["modules_to_save"] == ["connector", "vision_decoder", "character_head"]
    assert not (out / "base").exists()  # what it started from is where it was
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert not (out / "adapter_config.json").exists()  # or transformers would take the run for an adapter


def test_the_adapter_on_its_base_is_the_runs_model(run):
    start, out = run
    expected = outputs(of_base(out))
    assert differ(outputs(of_base(start)), expected)
    same(of_base(start, adapter=out / "adapter"), expected)
    same(of_base(start, AutoModelForImageTextToText, out / "adapter"), expected)


def test_the_auxiliary_head_trains_in_full_and_goes_with_the_adapter(run):
    start, out = run
    before, after = (of_base(folder).character_head.weight for folder in (start, out))
    assert float((after - before).detach().abs().max()) > 0.01
    wrapped = of_base(start, adapter=out / "adapter")
    assert torch.equal(wrapped.character_head.modules_to_save["default"].weight, after)


def test_merging_gives_what_an_export_of_the_run_is(run, tmp_path, capsys):
    start, out = run
    assert main(["merge", str(out / "adapter"), str(tmp_path / "merged")]) == 0
    said, exported = capsys.readouterr().out.splitlines(), export_model(out, tmp_path / "exported", torch.float32)
    # a block of the encoder has four layers that take one, a layer of this decoder seven; two of each
    assert said == [
        f"{tmp_path / 'merged'}: UnitForPreTraining in float32, adapter of 22 layers merged into {start.resolve()}",
        "trained in full and taken from the adapter: connector, vision_decoder",
    ]
    merged, exported = tree(tmp_path / "merged"), tree(exported)
    assert merged.keys() == exported.keys()
    for name in merged.keys() - {"model.safetensors"}:
        assert merged[name] == exported[name], name
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exported"))
    assert one.keys() == other.keys()
    assert not [name for name in one if "character_head" in name or "lora" in name or "base_layer" in name]
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **CLOSE, msg=name)
    same(of_base(tmp_path / "merged"), outputs(of_base(start, adapter=out / "adapter")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "merged"]


def test_what_is_written_is_exactly_what_was_merged(run, tmp_path):
    start, out = run
    expected = of_base(start, adapter=out / "adapter").merge_and_unload()
    merge_adapter(out / "adapter", tmp_path / "merged")
    loaded, report = UnitForPreTraining.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    same(loaded, outputs(expected), atol=0, rtol=0)


IN_A_CLEAN_PROCESS = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForPreTraining
start, adapter, merged, inputs, out = sys.argv[1:]
assert "modeling_unit" not in sys.modules
load = lambda folder: AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
inputs = load_file(inputs)
with torch.no_grad():
    found = {"adapter": PeftModel.from_pretrained(load(start), adapter).eval()(**inputs).logits}
    found["merged"] = load(merged).eval()(**inputs).logits
assert "modeling_unit" not in sys.modules
save_file(found, out)
"""


def test_adapter_and_merged_model_load_without_our_packages(run, tmp_path):
    start, out = run
    merge_adapter(out / "adapter", tmp_path / "merged")
    inputs = dict(tiny.processor()(images=tiny.noise(40, 30), task="ocr"))
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, tmp_path / "inputs.safetensors")
    (tmp_path / "elsewhere").mkdir()
    folders = [start, out / "adapter", tmp_path / "merged", tmp_path / "inputs.safetensors", tmp_path / "found"]
    process = subprocess.run(
        [sys.executable, "-I", "-c", IN_A_CLEAN_PROCESS, *map(str, folders)],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    expected, found = outputs(of_base(out))["logits"], load_file(tmp_path / "found")
    for name in ("adapter", "merged"):
        torch.testing.assert_close(found[name], expected, **CLOSE, msg=name)


def test_a_new_model_is_saved_as_its_adapters_base(recipes):
    """Around an encoder alone, with the rest drawn at random: the base is nowhere else."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    encoder = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=tiny.PATCH, **shape))
    encoder.save_pretrained(recipes.root / "clip")
    text = {key: value for key, value in tiny.QWEN3.items() if key not in ("vocab_size", "pad_token_id")}
    out = recipes.run(
        "around",
        {"parts": ["encoder"]},
        start=str(recipes.root / "clip"),
        model={"connector_config": {"connector_type": "mlp", "unshuffle": 1}, "text_config": text},
        image_processor={"patch_size": tiny.PATCH, "base_size": 32, "scale_as": "area", "max_side": 128},
    )
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((out / "base").resolve())
    base, report = UnitForPreTraining.from_pretrained(out / "base", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(base.vision_model.state_dict()[name], tensor), name
    merged = of_base(out)
    for name, tensor in merged.language_model.state_dict().items():
        assert torch.equal(base.language_model.state_dict()[name], tensor), name
    assert AutoProcessor.from_pretrained(out / "base").to_dict() == AutoProcessor.from_pretrained(out).to_dict()
    expected = outputs(merged)
    assert differ(outputs(base), expected)
    same(of_base(out / "base", adapter=out / "adapter"), expected)
    merge_adapter(out / "adapter", recipes.root / "around-merged")
    same(of_base(recipes.root / "around-merged"), expected)


def test_a_base_in_bfloat16_is_trained_in_float32(recipes, run, tmp_path):
    """As exports are by default: small steps must not be rounded away, neither in adapters nor in what is merged."""
    base = export_model(run[0], tmp_path / "base")
    training = {"max_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    training |= {"lr_scheduler_type": "constant", "output_dir": str(tmp_path / "out")}
    out = recipes.run("bfloat16", {"parts": BOTH}, start=str(base), teacher=str(base), training=training)
    for file in (out / "model.safetensors", out / "adapter" / "adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    expected = outputs(of_base(out))
    assert float((outputs(of_base(base))["logits"] - expected["logits"]).abs().max()) > 1e-4
    wide = AutoModelForPreTraining.from_pretrained(base, dtype=torch.float32)
    same(PeftModel.from_pretrained(wide, out / "adapter"), expected)
    merge_adapter(out / "adapter", tmp_path / "merged", dtype=torch.float32)
    same(of_base(tmp_path / "merged"), expected)
    # as the base is by default: bfloat16's 8 bits on numbers of about 1, through a few layers
    narrow = outputs(of_base(base, adapter=out / "adapter"))
    for name, tensor in narrow.items():
        torch.testing.assert_close(tensor.float(), expected[name], atol=0.1, rtol=0, msg=name)


def test_a_run_without_adapters_leaves_none(recipes, run):
    training = {"max_steps": 1, "disable_tqdm": True, "save_strategy": "no", "output_dir": str(recipes.root / "full")}
    out = recipes.run("full", {"parts": []}, start=str(run[0]), teacher=str(run[0]), training=training)
    assert not [path for path in out.iterdir() if path.is_dir()]


# -- presets, going on, memory ---------------------------------------------------------------------


def steps_of(out) -> list[str]:
    return [line for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize(
    ("name", "parts", "rank"),
    [("encoder", ["encoder"], 32), ("decoder", ["language_decoder"], 16), ("both", BOTH, 32)],
)
def test_a_presets_name_is_enough(name, parts, rank, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"lora: {name}\n")
    recipe = read_recipe(path)
    common = {"dropout": 0.0, "base_dtype": "auto"}
    assert recipe.lora == {"preset": name, "parts": parts, "r": rank, "alpha": 2 * rank} | common
    assert recipe.training == {"learning_rate": 5e-4}
    assert recipe.stage == "inter_scale"  # both scales of each kind, unless it says otherwise
    changed = read_recipe(path, ["lora.r=4", "lora.use_dora=true", "training.learning_rate=1e-4", "stage=intra_scale"])
    assert changed.lora == recipe.lora | {"r": 4, "use_dora": True}
    assert changed.training == {"learning_rate": 1e-4}
    assert changed.stage == "intra_scale"
    path.write_text(f"stage: llava\nlora: {{preset: {name}, alpha: 8}}\n")
    assert read_recipe(path).lora == recipe.lora | {"alpha": 8}
    assert read_recipe(path, ["lora=encoder"]).lora["preset"] == "encoder"


def test_every_preset_adapts_every_linear_layer_of_its_parts_and_no_other():
    for name, preset in PRESETS.items():
        model = tiny.unit_model(text=tiny.QWEN3)
        inside = {
            part: [
                key
                for key, module in model.named_modules()
                if isinstance(module, nn.Linear) and pattern.match(key) and not key.endswith("embeddings.projection")
            ]
            for part, pattern in (
                ("encoder", re.compile(r"vision_model\.blocks")),
                ("language_decoder", re.compile(r"language_model\.model")),
            )
        }
        wrapped = add_lora(model, LoraArguments(**preset | {"r": 2}))
        adapters = {key.split(".lora_A")[0] for key, _ in wrapped.named_modules() if key.endswith(".lora_A")}
        expected = {f"base_model.model.{key}" for part in preset["parts"] for key in inside[part]}
        assert adapters == expected, name
        trained = {key for key, parameter in wrapped.named_parameters() if parameter.requires_grad}
        full = {key for key in trained if ".lora_" not in key}
        assert {key.split(".")[2] for key in full} == {"connector", "vision_decoder"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "lora.r must be 1 or more"),
        ({"dropout": 1.0}, "lora.dropout must lie in"),
        ({"init": "pissa"}, "lora.init must be true, gaussian or orthogonal, got 'pissa': others change the base"),
        ({"init": "orthogonal", "r": 3}, "needs an even lora.r"),
        ({"base_dtype": "float16", "parts": BOTH}, "lora.base_dtype must be float32, bfloat16 or auto"),
        ({"base_dtype": "bfloat16"}, "is for what adapters leave frozen"),
        ({"adapter": "somewhere", "parts": BOTH}, "lora.adapter has its own shape"),
    ],
)
def test_settings_of_adapters_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        LoraArguments(**settings)


def test_an_unknown_preset_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lora: encoders\n")
    with pytest.raises(ValueError, match=r"got 'encoders'\. Did you mean 'encoder'\?"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_every_start_leaves_the_model_as_it_is(init):
    model = tiny.unit_model(text=tiny.QWEN3)
    expected = outputs(model)
    wrapped = add_lora(model, LoraArguments(parts=BOTH, r=4, init=init))
    same(wrapped, expected)
    first = next(tensor for name, tensor in wrapped.state_dict().items() if "lora_A" in name)
    assert float(first.abs().max()) > 0


def test_one_scale_alone_is_told_once_and_only_of_the_encoder():
    both = [("document", 4), ("document", 1), ("natural", 1), ("natural", 4)]
    one = [("document", 4), ("natural", 1)]
    told = single_scale(one, {"encoder"})
    assert "document images at x4 and natural images at x1 only" in told
    assert "document images at x1 and natural images at x4 may be spoiled" in told
    assert "\n" not in told
    assert "natural images at x1 may be" in single_scale([*both[:2], ("natural", 4)], {"encoder", "language_decoder"})
    assert single_scale(both, {"encoder"}) is None
    assert single_scale(one, {"language_decoder"}) is None


def test_the_line_is_printed_by_a_run_and_can_be_left_out(recipes, run, tmp_path, capsys):
    settings = {"max_steps": 1, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.01}
    for words, lora in ((1, {}), (0, {"warn_single_scale": False})):
        training = settings | {"output_dir": str(tmp_path / f"out{words}")}
        recipes.run("told", {"parts": ["encoder"]} | lora, start=str(run[0]), teacher=str(run[0]), training=training)
        assert capsys.readouterr().out.count("may be spoiled") == words


def test_the_table_tells_adapters_from_what_trains_in_full():
    wrapped = add_lora(tiny.unit_model(text=tiny.QWEN3), LoraArguments(parts=["language_decoder"], r=2))
    head, *lines = [line.split() for line in trainable_table(wrapped).splitlines()]
    assert head == ["part", "parameters", "trained", "tensors", "adapters"]
    table = {line[0]: [int(each.replace(",", "")) for each in line[1:]] for line in lines}
    # r (in + out) of q, k, v, o, gate, up, down of width 32 and 48, of two layers; A and B of each
    count = 2 * 2 * (4 * (32 + 32) + 3 * (32 + 48))
    assert table["language_decoder"][1:] == [count, 2 * 7 * 2, count]
    assert table["encoder"][1:] == [0, 0, 0]
    own = sum(parameter.numel() for parameter in tiny.unit_model(text=tiny.QWEN3).connector.parameters())
    assert table["connector"][:2] == [own, own]  # not counted twice
    assert table["all"][1] == sum(each.numel() for each in wrapped.parameters() if each.requires_grad)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"use_rslora": True}, {"base_dtype": "bfloat16", "init": "gaussian"}]
)
def test_a_run_with_adapters_resumes_bit_by_bit(lora, recipes, run, tmp_path):
    training = {"max_steps": 4, "learning_rate": 0.01, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
    training |= {"output_dir": str(tmp_path / "out"), "bf16": "base_dtype" in lora, "use_cpu": True}
    settings = {"preset": "both", "r": 2, "dropout": 0.1} | lora
    sources = {"start": str(run[0]), "teacher": str(run[0]), "training": training}
    out = recipes.run("again", settings, **sources)
    log, weights = steps_of(out), load_file(out / "model.safetensors")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    recipes.run("again", settings, **sources)
    assert steps_of(out) == log
    assert len(log) == 4
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    for name, tensor in load_file(out / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, adapter[name]), name


def test_a_base_in_bfloat16_changes_no_bit_of_a_run(recipes, run, tmp_path):
    """Autocast rounds the same matrices to the same numbers; the merged model is made of the whole ones. (A teacher
    that shares them rounds too: left out.)"""
    training = {"max_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "disable_tqdm": True, "bf16": True}
    training |= {"vision_weight": 0.0}
    training |= {"save_strategy": "no", "use_cpu": True}
    found = {}
    for dtype in ("float32", "bfloat16"):
        training |= {"output_dir": str(tmp_path / dtype)}
        settings = {"preset": "both", "r": 2, "base_dtype": dtype}
        out = recipes.run("narrow", settings, start=str(run[0]), teacher=str(run[0]), training=dict(training))
        found[dtype] = steps_of(out), load_file(out / "model.safetensors")
    assert found["bfloat16"][0] == found["float32"][0]
    assert found["bfloat16"][1].keys() == found["float32"][1].keys()
    for name, tensor in found["float32"][1].items():
        assert torch.equal(found["bfloat16"][1][name], tensor), name


@pytest.mark.parametrize("name", ["unit_vision_model", "clip_vision_model", "siglip_vision_model", "dinov2", "vit"])
def test_a_base_in_bfloat16_keeps_what_is_not_a_frozen_matrix(name):
    vision = None if name == "unit_vision_model" else {"model_type": name} | ENCODER | FOREIGN[name]
    model = add_lora(tiny.unit_model(vision=vision, text=tiny.QWEN3), LoraArguments(parts=["encoder"], r=2)).eval()
    inputs = tiny.processor()(images=tiny.noise(40, 30), task="ocr")

    @torch.no_grad()
    def said():
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).logits

    expected, before = said(), {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    saved = lower_frozen(model)
    lowered = {key for key, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert saved == 2 * sum(before[key].numel() for key in lowered)
    assert any("language_model" in key for key in lowered)  # frozen as well
    assert any("base_layer" in key for key in lowered)
    for key, parameter in model.named_parameters():
        if key in lowered:
            assert not parameter.requires_grad
            assert "embed" not in key
            assert "lm_head" not in key
        else:
            assert torch.equal(parameter, before[key])
    assert torch.equal(said(), expected)
    with torch.no_grad():  # where nothing casts, as in an evaluation
        alone = model(**inputs).logits
    torch.testing.assert_close(alone, expected.float(), atol=0.1, rtol=0)


@pytest.mark.parametrize("lowered", [False, True])
def test_a_teacher_shares_what_is_frozen_and_the_same(lowered):
    model = tiny.unit_model(text=tiny.QWEN3)
    teacher = model.make_teacher()
    with torch.no_grad():
        teacher.blocks[0].mlp.fc1.weight.add_(1.0)  # this one is another
    pixels = torch.randn(1, 3, 32, 32)
    expected = teacher(pixels).last_hidden_state
    total = sum(parameter.numel() for parameter in teacher.parameters())
    wrapped = add_lora(model, LoraArguments(parts=["encoder"], r=2))
    if lowered:
        lower_frozen(wrapped)
    other = teacher.blocks[0].mlp.fc1
    kept = {id(other.weight)} | ({id(other.bias)} if lowered else set())  # one layer computes in one dtype
    own = sum(parameter.numel() for parameter in teacher.parameters() if id(parameter) in kept)
    assert share_frozen(teacher, wrapped) == 4 * (total - own)
    places = {parameter.data_ptr() for parameter in wrapped.parameters()}
    assert all((parameter.data_ptr() in places) == (id(parameter) not in kept) for parameter in teacher.parameters())
    # of numbers about 1, through two layers, at 8 bits
    torch.testing.assert_close(teacher(pixels).last_hidden_state, expected, atol=0.1 if lowered else 0, rtol=0)
    assert not torch.equal(teacher(pixels).last_hidden_state, expected) or not lowered
    assert share_frozen(model.make_teacher(), tiny.unit_model(text=tiny.QWEN3)) == 0  # of a model that trains in full


def test_a_teacher_in_bfloat16_stays_so_beside_weights_that_bfloat16_holds():
    model = tiny.unit_model(text=tiny.QWEN3).to(torch.bfloat16).float()  # as an exported model is loaded
    teacher = model.make_teacher().to(torch.bfloat16)
    pixels = torch.randn(1, 3, 32, 32)
    expected = teacher(pixels).last_hidden_state
    model.vision_model.requires_grad_(False)
    assert share_frozen(teacher, model) == 0
    assert {each.dtype for each in teacher.parameters()} == {torch.bfloat16}
    assert torch.equal(teacher(pixels).last_hidden_state, expected)


def test_a_run_goes_on_with_a_published_adapter(recipes, run, tmp_path, capsys):
    start, first = run
    training = {"max_steps": 1, "learning_rate": 1e-30, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    training |= {"weight_decay": 0.0}
    sources = {"start": str(start), "teacher": str(start)}

    def go_on(name, rate):
        settings = training | {"learning_rate": rate, "output_dir": str(tmp_path / name)}
        lora = {"adapter": str(first / "adapter")}
        return recipes.run(name, lora, **sources, training=settings)

    # what it begins with is what the first run ended with; the auxiliary head is not asked for any more
    expected = outputs(of_base(first))
    same(of_base(go_on("still", 1e-30)), expected)
    out = go_on("moved", 0.05)
    assert differ(outputs(of_base(out)), expected)
    settings, before = (
        json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (out, first)
    )
    assert settings["base_model_name_or_path"] == str(start.resolve())
    assert {key: settings[key] for key in ("r", "lora_alpha")} == {key: before[key] for key in ("r", "lora_alpha")}
    same(of_base(start, adapter=out / "adapter"), outputs(of_base(out)))
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    moved = [
        not torch.equal(tensor, load_file(first / "adapter" / "adapter_model.safetensors")[name])
        for name, tensor in tensors.items()
    ]
    assert all(moved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start": "other"}, "was trained on other weights than"),
        ({"lora": {"adapter": "gone/adapter/there"}}, "no such folder"),
        ({"start": "wide"}, "was trained on other weights than"),
    ],
)
def test_an_adapter_that_cannot_be_gone_on_with_is_refused(change, words, recipes, run, tmp_path):
    torch.manual_seed(1)
    saved_base(tmp_path / "other")
    saved_base(tmp_path / "wide", tiny.unit_model(vision=tiny.vision_config(hidden_size=48), text=tiny.QWEN3))
    start = str(tmp_path / change["start"]) if "start" in change else str(run[0])
    training = {"max_steps": 1, "output_dir": str(tmp_path / "out"), "disable_tqdm": True}
    lora = {"adapter": str(run[1] / "adapter")} | change.get("lora", {})
    with pytest.raises(ValueError, match=words):
        recipes.run("refused", lora, start=start, teacher=start, training=training)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["clip_vision_model", "siglip2_vision_model", "dinov3_vit"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_adapters_on_foreign_encoders_learn_in_bfloat16_and_merge(name, settings, tmp_path):
    """A step under autocast: every adapter gets gradients, what it becomes merges to 1e-5 in float32."""
    model = tiny.unit_model(vision={"model_type": name} | ENCODER | FOREIGN[name], text=tiny.QWEN3)
    wrapped = add_lora(model, LoraArguments(parts=BOTH, r=2, alpha=4, dropout=0.0, **settings)).train()
    lower_frozen(wrapped)
    inputs = tiny.processor()(images=tiny.noise(40, 30), task="ocr")
    trained = {key: parameter for key, parameter in wrapped.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    before = {key: parameter.detach().clone() for key, parameter in trained.items()}
    for _ in range(2):  # B is zero at first, so that A has no gradient
        with torch.autocast("cpu", torch.bfloat16):
            output = wrapped(**inputs, labels=inputs["input_ids"])
            features = output.image_features.patches.float()
            loss = output.language_loss + model.reconstruct(output.image_features).float().square().mean()
        (loss + features.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [key for key, parameter in trained.items() if torch.equal(parameter, before[key])]
    assert not still
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    wide = wrapped.float().eval()
    with torch.no_grad():
        expected = wide(**inputs).logits
        merged = wide.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(merged, expected, **CLOSE)


# -- architectures and bases -----------------------------------------------------------------------


ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": tiny.PATCH}
ENCODER |= {"image_size": 32}
FOREIGN = {
    "clip_vision_model": {"intermediate_size": 48},
    "siglip_vision_model": {"intermediate_size": 48},
    "siglip2_vision_model": {"intermediate_size": 48, "num_patches": 16},
    "dinov2": {"mlp_ratio": 2},
    "dinov3_vit": {"intermediate_size": 48},
    "vit": {"intermediate_size": 48},
}


@pytest.mark.parametrize("name", [*FOREIGN, "unit_vision_model", "opt, qformer"])
def test_adapter_and_merged_model_agree(name, tmp_path):
    """Encoders of every architecture, both languages decoders, both connectors."""
    if name in FOREIGN:
        model = tiny.unit_model(vision={"model_type": name} | ENCODER | FOREIGN[name], text=tiny.QWEN3)
    else:
        model = tiny.unit_model(text=tiny.QWEN3)
    processor = tiny.processor()
    if name == "opt, qformer":
        model, processor = tiny.unit_model(connector="qformer"), tiny.processor("qformer")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wrapped = adapted(model)
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    inputs = processor(images=tiny.noise(40, 30), task="ocr")

    @torch.no_grad()
    def said(model):
        return model.eval()(**inputs).logits

    expected = said(wrapped)
    for auto in (AutoModelForPreTraining, AutoModelForImageTextToText):
        torch.testing.assert_close(said(of_base(tmp_path / "base", auto, tmp_path / "adapter")), expected, **CLOSE)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = of_base(tmp_path / "merged")
    assert type(merged) is UnitForPreTraining
    assert {key: tensor.shape for key, tensor in merged.state_dict().items()} == {
        key: tensor.shape for key, tensor in before.items()
    }
    torch.testing.assert_close(said(merged), expected, **CLOSE)
    features = AutoModel.from_pretrained(tmp_path / "merged")
    for key, tensor in features.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[key]), key


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_merged_weights_are_those_of_the_formula(settings, tmp_path):
    saved_base(tmp_path / "base")
    model = of_base(tmp_path / "base")
    wrapped = adapted(model, r=4, alpha=6, **settings)
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scale = 6 / 4**0.5 if "use_rslora" in settings else 6 / 4
    layers = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    assert len(layers) == 22
    for key in layers:
        name = f"{key.removeprefix('base_model.model.')}.weight"
        expected = base[name] + scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        if "use_dora" in settings:  # Liu et al., DoRA: magnitude times the direction of each output's weights
            length = tensors[f"{key}.lora_magnitude_vector"]
            expected = length[:, None] * expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(merged[name], expected, **CLOSE, msg=name)
    whole = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items() if ".lora_" not in key}
    assert {name.partition(".")[0] for name in whole} == {"connector", "vision_decoder"}
    for name in base.keys() - {f"{key.removeprefix('base_model.model.')}.weight" for key in layers}:
        assert torch.equal(merged[name], whole.get(name, base[name])), name


def test_a_base_without_the_vision_decoder_gets_the_adapters(tmp_path):
    """A run from such a base makes the vision decoder anew; the adapter brings it."""
    saved_base(tmp_path / "base", tiny.unit_model(text=tiny.QWEN3, model_class=UnitForConditionalGeneration))
    model = of_base(tmp_path / "base")
    wrapped = adapted(model)
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").model_class == "UnitForPreTraining"
    same(of_base(tmp_path / "merged"), outputs(wrapped))
    same(of_base(tmp_path / "base", AutoModelForImageTextToText, tmp_path / "adapter"), outputs(wrapped))


def test_an_adapter_of_a_model_without_vision_decoder_leaves_the_bases(tmp_path):
    saved_base(tmp_path / "base")
    model = of_base(tmp_path / "base", AutoModelForImageTextToText)
    wrapped = adapted(model)
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").model_class == "UnitForPreTraining"
    merged, expected = of_base(tmp_path / "merged"), outputs(wrapped)
    for name, tensor in of_base(tmp_path / "base").vision_decoder.state_dict().items():
        assert torch.equal(merged.vision_decoder.state_dict()[name], tensor), name
    found = outputs(merged)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=name)


def test_an_exported_base_serves_an_adapter_that_has_the_auxiliary_head(run, tmp_path):
    start, out = run
    exported = export_model(start, tmp_path / "base", torch.float32)  # it leaves the head out
    same(of_base(exported, adapter=out / "adapter"), outputs(of_base(out)))
    merge_adapter(out / "adapter", tmp_path / "merged", exported)
    same(of_base(tmp_path / "merged"), outputs(of_base(out)))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_dtype_is_the_bases_or_what_is_asked_for(dtype, tmp_path):
    saved_base(tmp_path / "base", tiny.unit_model(text=tiny.QWEN3).to(torch.bfloat16))
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wrapped = adapted(model)
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    expected = wrapped.merge_and_unload().state_dict()  # in float32
    asked = [] if dtype is None else ["--dtype", dtype]
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), *asked]) == 0
    wanted = torch.bfloat16 if dtype is None else torch.float32
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == wanted
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, expected[name].to(wanted)), name  # rounded once


def test_a_llava_models_adapter_is_merged_too(tmp_path):
    vision = CLIPVisionConfig(**{"image_size": 32, "patch_size": tiny.PATCH, "intermediate_size": 48} | ENCODER)
    config = LlavaConfig(vision_config=vision, text_config=dict(tiny.QWEN3), image_token_id=tiny.IMAGE_TOKEN)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    images = clip_image_processor(32, [0.5] * 3, [0.5] * 3)
    processor = LlavaProcessor(images, byte_tokenizer(), tiny.PATCH, "default", num_additional_image_tokens=1)
    processor.save_pretrained(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    wrapped = adapted(model)
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    inputs = {"input_ids": torch.tensor([[2] * 16 + [7, 8]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        expected = wrapped(**inputs).logits
    assert "AutoModelForImageTextToText" in (tmp_path / "adapter" / "README.md").read_text()
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").full_parts == ["multi_modal_projector"]
    for folder, adapter in (("merged", None), ("base", tmp_path / "adapter")):
        with torch.no_grad():
            found = of_base(tmp_path / folder, AutoModelForImageTextToText, adapter).eval()(**inputs).logits
        torch.testing.assert_close(found, expected, **CLOSE)


# -- for the Hub -----------------------------------------------------------------------------------


def cached(root, repo_id, folder, commit="0123456789abcdef0123456789abcdef01234567"):
    """A repository as a download leaves it in the cache."""
    repository = root / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def front_matter(folder) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_an_exported_adapter_has_a_card_and_its_runs_recipe(run, tmp_path):
    _, out = run
    folder = export_adapter(out, tmp_path / "repo", base="somebody/base")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "base.json"]
    names += ["curve.png", "log.jsonl", "recipe.json"]
    assert sorted(tree(folder)) == names
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("somebody/base", None)
    card = front_matter(folder)
    assert (card["base_model"], card["base_model_relation"]) == ("somebody/base", "adapter")
    assert (card["library_name"], card["license"]) == ("peft", "cc-by-4.0")  # what the base's card says
    assert front_matter(export_adapter(out, tmp_path / "mit", "somebody/base", license="mit"))["license"] == "mit"
    for name in ("README.md", "adapter_config.json"):
        assert str(out) not in (folder / name).read_text()
        assert str(run[0]) not in (folder / name).read_text()
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (out / "adapter" / weights).read_bytes()


def test_a_base_that_only_this_machine_has_is_not_published(run, tmp_path):
    with pytest.raises(ValueError, match="which others do not have: publish that one first"):
        export_adapter(run[1], tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_base_and_adapter_come_from_the_hub_at_their_commits(run, tmp_path, hub):
    start, _ = run
    commit = cached(hub, "somebody/base", start)
    model = AutoModelForPreTraining.from_pretrained("somebody/base")
    assert base_of("somebody/base") == ("somebody/base", commit)
    wrapped = adapted(model)
    save_adapter(wrapped, tmp_path / "adapter", *base_of("somebody/base"))
    card = front_matter(tmp_path / "adapter")
    assert (card["base_model"], card["license"]) == ("somebody/base", "cc-by-4.0")
    assert commit in (tmp_path / "adapter" / "README.md").read_text()
    exported = export_adapter(tmp_path / "adapter", tmp_path / "repo")
    assert json.loads((exported / "adapter_config.json").read_text())["revision"] == commit
    cached(hub, "somebody/adapter", exported)
    assert merge_adapter("somebody/adapter", tmp_path / "merged").base == "somebody/base"
    same(of_base(tmp_path / "merged"), outputs(wrapped))
    assert main(["merge", "somebody/gone", str(tmp_path / "none")]) == 2


def test_a_pickle_on_the_hub_is_not_fetched(run, tmp_path, hub):
    folder = tmp_path / "pickle"
    shutil.copytree(run[1] / "adapter", folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    cached(hub, "somebody/pickle", folder)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        merge_adapter("somebody/pickle", tmp_path / "merged")


# -- what is refused -------------------------------------------------------------------------------


def changed_settings(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def as_pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without_a_tensor(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.vision_model.blocks.0.attn.qkv.lora_A.weight"]
    save_file(tensors, path)


def not_a_number(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.vision_model.blocks.0.attn.qkv.lora_A.weight"].fill_(float("nan"))
    save_file(tensors, path)


def torn(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter there (the folder has no adapter_conf"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "its weights are missing"),
        (as_pickle, "its weights are a pickle (adapter_model.bin), which can run code and is never opened"),
        (torn, "adapter_model.safetensors is damaged"),
        (without_a_tensor, "the adapter has no weights for vision_model.blocks.0.attn.qkv.lora_A.default.weight."),
        (not_a_number, "NaNs detected"),
        (changed_settings(peft_type="IA3"), "a LoRA adapter is needed, peft_type is 'IA3'"),
        (changed_settings(megatron_config={"a": 1}), "megatron_config names a module to import, which is refused"),
        (changed_settings(base_model_name_or_path=None), "names no base model"),
        (changed_settings(base_model_name_or_path="/gone/base"), "/gone/base: the base model is not there (any more)"),
        (changed_settings(base_model_name_or_path="somebody/gone"), "somebody/gone: the base model cannot be found"),
        (changed_settings(target_modules="nothing"), "does not fit the base"),
    ],
)
def test_damaged_adapters_are_refused_in_one_line(change, words, run, tmp_path, capsys):
    shutil.copytree(run[1] / "adapter", tmp_path / "adapter")
    change(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("unit merge: ")]
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vision": tiny.vision_config(hidden_size=48)}, "size mismatch"),
        ({"vision": tiny.vision_config(num_hidden_layers=1)}, "the base has no vision_model.blocks.1."),
        ({"vision": tiny.vision_config(num_hidden_layers=3)}, "the adapter has no weights for vision_model.blocks.2."),
        ({"connector": "qformer"}, "connector."),
        ({"text": tiny.OPT}, "does not fit the base"),
    ],
    ids=["wider", "shallower", "deeper", "other connector", "other decoder"],
)
def test_a_base_of_another_shape_is_refused(settings, words, run, tmp_path, capsys):
    saved_base(tmp_path / "base", tiny.unit_model(**({"text": tiny.QWEN3} | settings)))
    arguments = ["merge", str(run[1] / "adapter"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unit merge: ")]
    assert f"does not fit the base {tmp_path / 'base'}: " in line
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_other_mistakes_are_named(run, tmp_path, capsys):
    adapter, out = str(run[1] / "adapter"), tmp_path / "merged"
    CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, **ENCODER)).save_pretrained(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for arguments, words in (
        ([str(run[1]), str(out)], f"did you mean {adapter}?"),
        ([str(tmp_path / "gone"), str(out)], "no such folder"),
        ([adapter, str(tmp_path / "full")], f"{tmp_path / 'full'} exists already"),
        ([adapter, str(out), "--base", str(tmp_path / "clip")], "the base must be a UNIT or LLaVA model, it is 'clip"),
        ([adapter, str(out), "--base", str(tmp_path / "empty")], "the base model cannot be found"),
    ):
        assert main(["merge", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unit merge: ")]
        assert words in line
    assert not out.exists()
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "empty", "full"]


def test_an_interrupted_save_leaves_the_earlier_adapter(tmp_path, monkeypatch):
    saved_base(tmp_path / "base")
    model = of_base(tmp_path / "base")
    wrapped = adapted(model)
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    before = tree(tmp_path / "adapter")
    nn.init.ones_(next(parameter for parameter in wrapped.parameters() if parameter.requires_grad))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(adapter_module, "write_card", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    assert tree(tmp_path / "adapter") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    save_adapter(wrapped, tmp_path / "adapter", *base_of(tmp_path / "base"))
    assert tree(tmp_path / "adapter") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
