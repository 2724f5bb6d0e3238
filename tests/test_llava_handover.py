"""From a run of the two stages to a trained LLaVA, each step by its command: the tower goes over unchanged."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

import modeling_unit  # noqa: F401 (LLaVA looks the tower's class up in a registry)
from modeling_unit import UnitForPreTraining
from training.data.schema import write_shards
from training.llava_toy import RECIPES, make_data, make_language_model
from unit_cli.__main__ import main

TRAINING = {"max_steps": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant", "disable_tqdm": True}
TRAINING |= {"save_strategy": "no", "use_cpu": True}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Encoders, a language model, rows and conversations; and what runs a command that must succeed."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("handover")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=tiny.PATCH, **shape)).save_pretrained(root / "clip")
    tiny.unit_model(text=tiny.QWEN3).save_pretrained(root / "unit")
    tiny.processor().save_pretrained(root / "unit")
    write_shards([tiny.document_row(f"line {index}", seed=index) for index in range(4)], root / "documents")
    write_shards([tiny.picture_row(f"thing {index}", seed=index) for index in range(4)], root / "pictures")
    make_language_model(root / "llama", hidden_size=32)
    file = make_data(root / "toys", colours=("red", "blue"), shapes=("circle", "cross"))
    return SimpleNamespace(root=root, file=file)


def stage_recipe(parts, name) -> dict:
    """Stage 1 around CLIP with adapters that are merged, or stage 2 with packs in full."""
    root = parts.root

    def group(kind, scale, **more):
        folder = "documents" if kind == "document" else "pictures"
        return {"kind": kind, "scale": scale, "rows": 2, "sources": [{"path": str(root / folder)}]} | more

    if name == "clip, adapters merged":
        return {
            "stage": "intra_scale",
            "start": str(root / "clip"),
            "model": {"connector_config": {"connector_type": "mlp", "unshuffle": 1}, "text_config": dict(tiny.QWEN3)},
            "image_processor": {"patch_size": tiny.PATCH, "base_size": 32, "scale_as": "area", "max_side": 128},
            "groups": [group("document", 4), group("natural", 1)],
            "lora": "both",
        }
    packed = [group("document", scale, packed=True) for scale in (4, 1)]
    unit = str(root / "unit")
    groups = [*packed, group("natural", 1), group("natural", 4)]
    return {"stage": "inter_scale", "start": unit, "teacher": unit, "groups": groups}


def weights(folder) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


def moved(before, after) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def of_part(names, part: str) -> set[str]:
    return {name for name in names if f".{part}." in name or (part == "language_model" and name.startswith("lm_head"))}


@pytest.mark.parametrize("name", ["clip, adapters merged", "unit, packed"])
def test_the_tower_of_a_run_goes_into_llava_and_learns_on(name, parts, tmp_path, capsys):
    recipe = stage_recipe(parts, name)
    recipe["training"] = TRAINING | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(recipe))
    assembled, projector, everything, adapted = (tmp_path / each for each in ("llava", "1", "2", "2-lora"))
    size = ["--size", "32"] if name == "unit, packed" else []
    data = [f"conversations={parts.file}", "training.per_device_train_batch_size=2", "training.bf16=false"]
    data += ["training.gradient_accumulation_steps=1", "training.max_steps=2", "training.warmup_steps=0"]
    data += ["training.save_strategy='no'", "training.disable_tqdm=true", "training.learning_rate=0.01"]

    def command(*arguments):
        assert main([str(each) for each in arguments]) == 0, capsys.readouterr().err

    command("train", tmp_path / "stage.yaml")
    command("llava", tmp_path / "run", parts.root / "llama", assembled, *size)
    first, second = (RECIPES / f"{each}.yaml" for each in ("1-projector", "2-all"))
    command("train", first, f"start={assembled}", f"training.output_dir={projector}", *data)
    command("train", second, f"start={projector}", f"training.output_dir={everything}", *data)
    lora = ["lora=both", "lora.r=2", "lora.alpha=4", "training.bf16=true"]  # the base in bfloat16 then
    command("train", second, f"start={projector}", f"training.output_dir={adapted}", *data, *lora)

    # the tower is the run's, tensor by tensor
    run, start = UnitForPreTraining.from_pretrained(tmp_path / "run").vision_model.state_dict(), weights(assembled)
    tower = {key.partition("vision_tower.")[2]: tensor for key, tensor in start.items() if "vision_tower." in key}
    assert tower.keys() == run.keys()
    for key, tensor in tower.items():
        if tensor.shape == run[key].shape:  # a table of positions may have been cut to the size
            assert torch.equal(tensor, run[key]), key
    # first the projector alone
    before = weights(projector)
    assert moved(start, before) == of_part(start, "multi_modal_projector")
    # then all that the chosen layer is made of: of CLIP the one before the last, of UNIT the last
    last = ("layers.1.", "post_layernorm") if name.startswith("clip") else ()
    unread = {key for key in of_part(before, "vision_tower") if any(each in key for each in last)}
    assert moved(before, weights(everything)) == before.keys() - unread
    # adapters: the matrices of tower and language model, and the projector in full
    changed = moved(before, weights(adapted))
    matrices = {
        key
        for key, tensor in before.items()
        if tensor.ndim == 2 and key.endswith(".weight") and "embed" not in key and not key.startswith("lm_head")
    }
    assert changed == (matrices - unread) | of_part(before, "multi_modal_projector")
    assert json.loads((adapted / "adapter" / "adapter_config.json").read_text())["r"] == 2
