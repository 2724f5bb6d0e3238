"""One process, DDP and FSDP2 are the same run; checkpoints move between them, and the final model is whole."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.dataclasses import get_module_class_from_name
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_any_vit import PLAIN
from tiny import QWEN3, unit_model, vision_config
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, TrainingArguments

from benchmarks.devices import TINY, differences, make_toy
from modeling_unit.architectures_unit import ARCHITECTURES
from training.devices import check_launch, empty_copy, layer_classes
from training.optim import MuonWithAdamW, parameter_groups
from training.optimizer_state import FILE, OLDER_FILE, leaves, load_state, save_state

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))
STEPS, HALF, MICRO_BATCHES = 3, 2, 6
TOLERANCE = 1e-5  # relative, of a loss; sums in another order are some 1e-8 apart after these steps
LORA = ["lora.parts=[encoder, language_decoder]", "lora.dropout=0.0", "lora.use_dora=true"]


def job(recipe: Path, name: str, processes: int, overrides=(), fsdp=False, start: str | None = None, **more) -> dict:
    """A run into the folder `name` beside the recipe, from the checkpoint of the run `start`."""
    out = recipe.parent / name
    given = [
        f"training.output_dir={out}",
        f"training.save_steps={HALF}",
        f"training.gradient_accumulation_steps={MICRO_BATCHES // processes}",
    ]
    found = {"recipe": str(recipe), "overrides": [*given, *overrides], "fsdp": fsdp, **more}
    if start:
        found["copy"] = [str(each / f"checkpoint-{HALF}") for each in (recipe.parent / start, out)]
    return found


def launched(stages: list[tuple[int, list[dict]]], folder: Path) -> None:
    """Run jobs one after another, each in so many processes."""
    free = [socket.socket() for _ in stages]
    for each in free:
        each.bind(("127.0.0.1", 0))
    listed = [(count, each.getsockname()[1], jobs) for (count, jobs), each in zip(stages, free, strict=True)]
    for each in free:
        each.close()
    (folder / "jobs.json").write_text(json.dumps(listed))
    command = [sys.executable, str(ROOT / "tests" / "devices_process.py"), str(folder / "jobs.json")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with all runs of this module, each named after how it was run."""
    folder = tmp_path_factory.mktemp("devices")
    recipe = make_toy(folder, STEPS, TINY)
    reader = ["training.language_weight=0", "training.vision_weight=0"]  # most of the model is not read
    old = {"environment": {"FSDP_VERSION": "1"}, "error": str(folder / "fsdp1.txt")}
    first = [job(recipe, "one", 1), job(recipe, "lora", 1, LORA), job(recipe, "muon", 1, ["training.optimizer=muon"])]
    two = [
        job(recipe, "ddp", 2),
        job(recipe, "fsdp", 2, fsdp=True),
        job(recipe, "one-ddp", 2, start="one"),
        job(recipe, "ddp-fsdp", 2, fsdp=True, start="ddp"),
        job(recipe, "fsdp-ddp", 2, start="fsdp"),
        job(recipe, "lora-fsdp", 2, LORA, fsdp=True, start="lora"),
        job(recipe, "muon-fsdp", 2, ["training.optimizer=muon"], fsdp=True),
        job(recipe, "characters-ddp", 2, [*reader, "training.max_steps=2"]),
        job(recipe, "fsdp1", 2, fsdp=True, **old),
    ]
    three = [job(recipe, "ddp-three", 3, start="ddp")]
    last = [job(recipe, "ddp-one", 1, start="ddp"), job(recipe, "fsdp-one", 1, start="fsdp")]
    launched([(1, first), (2, two), (3, three), (1, last)], folder)
    return folder


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_give_the_loss_curve_and_weights_of_one(runs, way):
    _, relative, weight = differences(runs / way, runs / "one")
    assert relative < TOLERANCE
    assert weight < 1e-4  # a tenth of a step of AdamW at the rate of 1e-3


@pytest.mark.parametrize("move", ["one-ddp", "ddp-one", "ddp-three", "ddp-fsdp", "fsdp-ddp", "fsdp-one"])
def test_checkpoints_move_between_numbers_of_processes_and_ways(runs, move):
    _, relative, weight = differences(runs / move, runs / "one", HALF + 1)
    assert relative < TOLERANCE
    assert weight < 1e-4


def test_a_checkpoint_is_the_same_however_it_was_written(runs):
    one, ddp, fsdp = (runs / way / f"checkpoint-{HALF}" for way in ("one", "ddp", "fsdp"))
    for name in ("model.safetensors", FILE):
        expected = load_file(one / name)
        for folder in (ddp, fsdp):
            found = load_file(folder / name)
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.allclose(found[key], tensor, rtol=1e-3, atol=1e-5), key


def test_the_final_model_is_whole_and_loads(runs):
    one, fsdp = (AutoModelForPreTraining.from_pretrained(runs / way) for way in ("one", "fsdp"))
    assert type(fsdp) is type(one)
    assert fsdp.config.architectures == ["UnitForPreTraining"]
    assert fsdp.language_model.lm_head.weight is fsdp.language_model.model.embed_tokens.weight
    assert AutoModel.from_pretrained(runs / "fsdp").vision_model is not None
    for name, tensor in one.state_dict().items():
        assert torch.allclose(fsdp.state_dict()[name], tensor, atol=1e-4), name


def test_adapters_under_fsdp_go_on_and_are_saved_merged_and_alone(runs):
    _, relative, weight = differences(runs / "lora-fsdp", runs / "lora", HALF + 1)
    assert relative < TOLERANCE
    assert weight < 1e-4
    merged = AutoModelForPreTraining.from_pretrained(runs / "lora-fsdp")
    base = AutoModelForPreTraining.from_pretrained(runs / "lora-fsdp" / "base")
    adapted = PeftModel.from_pretrained(base, runs / "lora-fsdp" / "adapter").merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(adapted.state_dict()[name], tensor, atol=1e-5), name


def test_muon_takes_whole_matrices_under_fsdp(runs):
    _, relative, weight = differences(runs / "muon-fsdp", runs / "muon")
    assert relative < 1e-4  # its iterations are in bfloat16
    assert weight < 2e-3  # the largest update of an element in one step is some 1e-3


def test_a_start_that_leaves_out_most_of_the_model_runs_under_ddp(runs):
    assert (runs / "characters-ddp" / "model.safetensors").is_file()  # DDP stops where a gradient does not come


def test_other_launches_are_refused_in_one_line(runs, tmp_path, monkeypatch):
    assert (runs / "fsdp1.txt").read_text().startswith("FSDP version 1 is not supported")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(arguments)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="leaves the teacher of all processes but one empty"):
        check_launch(arguments)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments.optimizer = "muon"
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        check_launch(arguments)


# -- the optimiser's state -------------------------------------------------------------------------


class Named(nn.Module):
    """A matrix, a vector and a table, with the names of a model's parts."""

    def __init__(self):
        super().__init__()
        self.vision_model = nn.ModuleDict({"fc1": nn.Linear(4, 3)})
        self.connector = nn.ModuleDict({"fc2": nn.Linear(3, 2)})

    def step(self, optimizer) -> None:
        self.connector["fc2"](self.vision_model["fc1"](torch.ones(5, 4))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def stepped(muon: float | None, steps: int = 2, parts=("vision_model", "connector")):
    torch.manual_seed(0)
    model = Named()
    groups = parameter_groups(model, 0.1, 0.01, None, muon)
    groups = [group for group in groups if any(name.startswith(parts) for name in group["names"])]
    optimizer = MuonWithAdamW(groups) if muon else torch.optim.AdamW(groups)
    for _ in range(steps):
        model.step(optimizer)
    return model, optimizer


@pytest.mark.parametrize("muon", [None, 0.1])
@pytest.mark.parametrize("file", [FILE, OLDER_FILE])
def test_an_optimiser_goes_on_bit_by_bit(tmp_path, muon, file):
    model, optimizer = stepped(muon)
    optimizer.param_groups[0]["lr"] = 0.037
    if file == FILE:
        assert save_state(model, optimizer, tmp_path / file) is None
    else:
        torch.save(optimizer.state_dict(), tmp_path / file)
    other, fresh = stepped(muon, 0)
    other.load_state_dict(model.state_dict())
    assert load_state(other, fresh, tmp_path, pytest.fail)
    assert fresh.param_groups[0]["lr"] == 0.037
    for each in (group for leaf in leaves(fresh) for group in leaf.param_groups if "betas" in group):
        assert isinstance(each["betas"], tuple)
    for _ in range(3):
        model.step(optimizer)
        other.step(fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert not load_state(other, fresh, tmp_path / "nowhere")


def test_parameters_that_began_to_train_begin_without_a_state(tmp_path):
    model, optimizer = stepped(None, parts=("connector",))
    save_state(model, optimizer, tmp_path / FILE)
    assert set(load_file(tmp_path / FILE)) == {
        f"connector.fc2.{name}/{key}" for name in ("weight", "bias") for key in ("exp_avg", "exp_avg_sq", "step")
    }
    other, fresh = stepped(None, 0)
    said = []
    load_state(other, fresh, tmp_path, said.append)
    assert said == ["The checkpoint has no optimiser state of 2 of the tensors that train: theirs begins anew."]
    assert set(fresh.state) == set(other.connector.parameters())


def test_the_file_is_as_safetensors_itself_writes_it(tmp_path):
    model, optimizer = stepped(None)
    save_state(model, optimizer, tmp_path / FILE)
    found = load_file(tmp_path / FILE)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(found[f"{name}/{key}"], value)
    save_file(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").stat().st_size == pytest.approx((tmp_path / FILE).stat().st_size, abs=1500)


# -- models ----------------------------------------------------------------------------------------


def test_an_empty_copy_has_no_memory_and_the_same_ties():
    model = unit_model(text=QWEN3)
    empty = empty_copy(model)
    assert all(each.is_meta for each in empty.parameters())
    assert empty.language_model.lm_head.weight is empty.language_model.model.embed_tokens.weight
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not any(each.is_meta for each in model.parameters())


@pytest.mark.parametrize("encoder", sorted(ARCHITECTURES))
def test_layers_are_found_whatever_the_encoder_and_the_decoder(encoder):
    for text in (None, QWEN3):
        settings = {"model_type": encoder, **PLAIN[encoder][1]}
        model = unit_model(vision_config() if encoder == "unit_vision_model" else settings, text)
        layers = layer_classes(model)
        assert any(type(each).__name__ in layers for each in model.vision_model.modules())
        assert ("OPTDecoderLayer" if text is None else "Qwen3DecoderLayer") in layers
        assert layers <= model._no_split_modules | {"Blip2QFormerLayer"}
        for name in model._no_split_modules:  # else accelerate refuses to divide the model
            assert get_module_class_from_name(model, name) is not None


# -- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_open_with_their_command_and_are_known_to_accelerate(path):
    text = path.read_text()
    assert (
        f"accelerate launch --config_file training/accelerate/{path.name} -m unit_cli train" in text.split("\ncomp")[0]
    )
    config = load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for part, prefix in (("fsdp_config", "fsdp_"), ("deepspeed_config", "")):
        for key in getattr(config, part):
            assert prefix + key.removeprefix(prefix) in known, key
    assert config.mixed_precision == "no"
    assert yaml.safe_load(text)["num_processes"] == (2 if "cpu" in path.stem else 8)
