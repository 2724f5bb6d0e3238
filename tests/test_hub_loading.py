"""What a stranger loads: exported repositories through the Auto classes, in a process without our packages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import QWEN3, image_processor, noise, processor, unit_model, vision_config
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPVisionModel

from modeling_unit import UnitForPreTraining, UnitImageProcessor, UnitModel, UnitVisionModel
from training.export import code_files, export_model, save_encoder, save_full

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def shaken(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def lay_hub_cache(cache: Path, name: str, folder: Path) -> None:
    """The folder as `huggingface_hub` keeps a downloaded repository `stranger/NAME`."""
    repository = cache / f"models--stranger--{name}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A random model, its two exports, and what another process makes of them from folders and from a Hub cache."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    # statistics inside the model: buffers that no file holds; registers: more inside than comes out
    vision = vision_config(num_cls_tokens=2, register_multiple=4, normalize_pixels=True, image_mean=[0.4, 0.5, 0.6])
    model = shaken(unit_model(vision=vision, text=QWEN3, projection_dim=4))
    model.generation_config.update(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    read = processor(do_normalize=False)
    save_full(model, read, root / "full")
    save_encoder(model, read.image_processor, root / "encoder")
    model.vision_decoder.save_pretrained(root / "decoder")
    for name in ("full", "encoder"):
        lay_hub_cache(root / "cache", name, root / name)
    picture = noise(50, 22)
    picture.save(root / "picture.png")
    inputs = dict(read(images=[picture, noise(20, 30, 1)], task="ocr"))
    rows, cols = (size // 8 for size in inputs["pixel_values"].shape[-2:])
    inputs["teacher_features"] = torch.randn(2, 1 + rows * cols, 32)
    save_file(inputs, str(root / "inputs.safetensors"))
    sources = {
        "folder": [str(root / "full"), str(root / "encoder")],
        "cache": ["stranger/full", "stranger/encoder"],
    }
    job = {
        "inputs": str(root / "inputs.safetensors"),
        "picture": str(root / "picture.png"),
        "sources": sources,
        "decoder": str(root / "decoder"),
    }
    job["out"] = str(root)
    (root / "job.json").write_text(json.dumps(job))
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "home"),
        "HF_HUB_CACHE": str(root / "cache"),
        "HF_MODULES_CACHE": str(root / "modules"),
    }
    script = Path(__file__).with_name("hub_process.py")
    process = subprocess.run(
        [sys.executable, "-I", str(script), str(root / "job.json")],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    names = json.loads((root / "names.json").read_text())
    assert names.pop("decoder") == "UnitVisionDecoder"
    results = {where: (load_file(root / f"{where}.safetensors"), names[where]) for where in names}
    return {"model": model, "processor": read, "inputs": inputs, "picture": picture, "results": results, "root": root}


@pytest.fixture(params=["folder", "cache", "saved again"])
def loaded(request, exported):
    return exported["results"][request.param]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("repository", ["full", "encoder"])
@torch.no_grad()
def test_automodel_gives_the_encoder_from_both_repositories(exported, loaded, repository):
    tensors, names = loaded
    model, inputs = exported["model"], exported["inputs"]
    expected = model.vision_model(
        inputs["pixel_values"], spatial_shapes=inputs["spatial_shapes"], output_hidden_states=True
    )
    close(tensors[f"{repository}/tokens"], expected.last_hidden_state)
    close(tensors[f"{repository}/pooled"], expected.pooler_output)
    close(tensors[f"{repository}/hidden"], expected.hidden_states[1])
    assert names[f"{repository}/AutoModel"] == {"full": "UnitModel", "encoder": "UnitVisionModel"}[repository]
    assert names[f"{repository}/config"] == {"full": "UnitConfig", "encoder": "UnitVisionConfig"}[repository]


@pytest.mark.parametrize("repository", ["full", "encoder"])
def test_the_image_processor_loads_from_both_repositories(exported, loaded, repository):
    tensors, names = loaded
    expected = exported["processor"].image_processor([exported["picture"]], kind="document")["pixel_values"]
    close(tensors[f"{repository}/pixels"], expected)
    assert names[f"{repository}/AutoImageProcessor"] == "UnitImageProcessor"


@torch.no_grad()
def test_the_reader_reads_as_it_did(exported, loaded):
    tensors, names = loaded
    model, inputs = exported["model"], dict(exported["inputs"])
    inputs.pop("teacher_features")
    close(tensors["logits"], model(**inputs).logits)
    assert tensors["generated"].tolist() == model.generate(**inputs).tolist()
    assert names["AutoModelForImageTextToText"] == "UnitForConditionalGeneration"


@torch.no_grad()
def test_pretraining_goes_on_with_the_same_losses(exported, loaded):
    tensors, names = loaded
    inputs = exported["inputs"]
    output = exported["model"](**inputs, labels=inputs["input_ids"])
    close(tensors["loss"], output.loss)
    close(tensors["vision_loss"], output.vision_loss)
    assert names["AutoModelForPreTraining"] == "UnitForPreTraining"


@torch.no_grad()
def test_the_vision_decoder_loads_on_its_own(exported):
    decoded = load_file(exported["root"] / "decoded.safetensors")["decoded"]
    close(decoded, exported["model"].vision_decoder(exported["inputs"]["teacher_features"]))


def test_the_processor_asks_as_it_was_trained(exported, loaded):
    tensors, names = loaded
    expected = exported["processor"](images=[exported["picture"]], task="ocr")
    assert {key.partition("/")[2] for key in tensors if key.startswith("processor/")} == set(expected)
    for key, value in expected.items():
        close(tensors[f"processor/{key}"], value)
    assert names["AutoProcessor"] == "UnitProcessor"
    assert names["prompt"] == "<ocr>"
    assert names["AutoTokenizer"] == exported["processor"].tokenizer.decode(exported["inputs"]["input_ids"][0])


@pytest.mark.parametrize("repository", ["full", "encoder"])
@torch.no_grad()
def test_the_feature_pipeline_gives_the_tokens(exported, loaded, repository):
    pixels = exported["processor"].image_processor(exported["picture"])  # the pipeline asks for no kind: natural
    expected = exported["model"].vision_model(**pixels).last_hidden_state
    close(loaded[0][f"{repository}/pipeline"], expected)


@torch.no_grad()
def test_the_text_pipeline_reads(exported, loaded):
    model, read = exported["model"], exported["processor"]
    expected = []
    for task in ("ocr", "caption"):
        inputs = read(images=[exported["picture"]], task=task, kind="document")
        expected += read.decode_new(model.generate(**inputs), inputs)
    assert loaded[1]["pipeline"] == expected[0]
    assert loaded[1]["pipeline, batch"] == expected


# -- what is in the folder -------------------------------------------------------------------------


def test_a_repository_holds_all_the_code_and_no_weights_but_safetensors(exported):
    names = {file.name for file in (exported["root"] / "full").iterdir()}
    assert {file.name for file in code_files()} <= names
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_code_has_only_imports_that_the_hub_loader_follows():
    """Flat siblings by one dot; no other packages of ours; nothing beyond what every user of transformers has."""
    allowed = {"torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors"} | set(sys.stdlib_module_names)
    siblings = {file.stem for file in code_files()}
    for file in code_files():
        for line in file.read_text().splitlines():
            words = line.split()
            if len(words) < 2 or words[0] not in ("import", "from") or (words[0] == "from" and "import" not in words):
                continue
            module = words[1].rstrip(",")
            if module.startswith("."):
                assert module[1:] in siblings, f"{file.name}: {line}"
            else:
                assert module.partition(".")[0] in allowed, f"{file.name}: {line}"


def test_installed_users_need_no_remote_code(exported):
    folder = exported["root"]
    assert type(AutoModel.from_pretrained(folder / "full")) is UnitModel
    assert type(AutoModel.from_pretrained(folder / "encoder")) is UnitVisionModel
    assert type(AutoImageProcessor.from_pretrained(folder / "encoder")) is UnitImageProcessor
    assert AutoProcessor.from_pretrained(folder / "full").task_prompts["caption"] == "<caption>"


def test_a_foreign_encoder_is_exported_as_what_it_is(tmp_path):
    clip = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip |= {"intermediate_size": 48, "patch_size": 8, "image_size": 32}
    model = shaken(unit_model(vision=clip))
    save_encoder(model, image_processor(), tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if file.suffix == ".py"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is CLIPVisionModel
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(loaded(image).last_hidden_state[:, 1:], model.encode(image)[1])


def test_exporting_a_run_drops_the_auxiliary_head_and_keeps_its_papers(tmp_path):
    model = shaken(unit_model(num_character_classes=5, projection_dim=3))
    run, out = tmp_path / "run", tmp_path / "out"
    model.save_pretrained(run)
    processor().save_pretrained(run)
    (run / "recipe.json").write_text("{}")
    export_model(run, out, dtype=torch.bfloat16)
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not [name for name in weights if name.startswith("character_head")]
    assert [name for name in weights if name.startswith("vision_decoder")]
    assert "visual_projection.weight" in weights
    assert (out / "recipe.json").is_file()
    loaded = UnitForPreTraining.from_pretrained(out)
    assert loaded.config.num_character_classes == 0
    close(
        loaded.vision_decoder.fc1.weight.float(), model.vision_decoder.fc1.weight.detach().to(torch.bfloat16).float()
    )


def test_exporting_without_code_leaves_the_code_out(tmp_path):
    save_full(unit_model(), processor(), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", with_code=False)
    assert list((tmp_path / "run").glob("*.py"))
    assert not list((tmp_path / "out").glob("*.py"))
