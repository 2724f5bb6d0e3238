"""UNIT as LLaVA's own repositories meet it: beside transformers 4.37 to 4.57. Not part of the suite; run by hand:

    python -m venv old && old/bin/pip install torch transformers==4.37.2 pillow 'numpy<2'
    old/bin/python tests/llava_old_transformers.py

It needs nothing else, and passes with transformers 5 as well. To compare what transformers 5 exports with what an
older one reads from it, write with the one and read with the other:

    python tests/llava_old_transformers.py --write FOLDER
    old/bin/python tests/llava_old_transformers.py --read FOLDER

With LLaVA's own package in place of a fake, and what was written as the tower that needs no line:

    old/bin/pip install accelerate==0.21.0 sentencepiece einops requests && old/bin/pip install --no-deps llava-torch
    old/bin/python tests/llava_old_transformers.py --llava FOLDER
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from llava_fakes import FLAVOURS, OwnTower, install, model_arguments, process_images  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from modeling_unit import (  # noqa: E402
    UnitVisionConfig,
    UnitVisionModel,
    UnitVisionTower,
    register_llava,
    shipped_checkpoint,
)

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SHAPE |= {"patch_size": 8, "image_size": 32, "cpe_max_size": 64}
SETTINGS = [
    {},
    {"image_size": 64},
    {"num_cls_tokens": 3, "register_multiple": 4, "normalize_pixels": True, "image_mean": [0.4, 0.5, 0.6]},
    {"use_final_norm": False, "qkv_bias": False, "pooling": "mean"},
]


def reference(weights: dict, config, pixels: torch.Tensor) -> list:
    """Hidden states by plain torch from the weights of a file, for one square size: input of the first block, outputs
    of all, the class token first."""
    patch, width, heads = config.patch_size, config.hidden_size, config.num_attention_heads
    if config.normalize_pixels:
        pixels = (pixels - torch.tensor(config.image_mean)[:, None, None]) / torch.tensor(config.image_std)[
            :, None, None
        ]
    rows = pixels.shape[-1] // patch
    tokens = F.unfold(pixels, patch, stride=patch).transpose(1, 2) @ weights["embeddings.projection.weight"].T
    side = config.cpe_max_size // patch
    table = weights["embeddings.position_embedding"].reshape(side, side, width)
    if rows != side and config.image_size != config.cpe_max_size:
        grid = table.permute(2, 0, 1)[None]
        table = F.interpolate(grid, size=(rows, rows), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    tokens = tokens + table[:rows, :rows].reshape(1, -1, width)
    prefix = weights["embeddings.prefix_tokens"]
    x = torch.cat([prefix[None].expand(len(tokens), -1, -1), tokens], dim=1)

    def norm(name, x):
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    states = [x]
    for index in range(config.num_hidden_layers):
        block = f"blocks.{index}"
        query, key, value = (
            linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
            .unflatten(-1, (3, heads, width // heads))
            .permute(2, 0, 3, 1, 4)
        )
        seen = (query @ key.transpose(-1, -2) * (width // heads) ** -0.5).softmax(dim=-1) @ value
        x = x + linear(f"{block}.attn.proj", seen.transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
        states.append(x)
    return [torch.cat([state[:, :1], state[:, len(prefix) :]], dim=1) for state in states]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def made_encoder(**changes) -> UnitVisionModel:
    torch.manual_seed(0)
    model = UnitVisionModel(UnitVisionConfig(**(SHAPE | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def check_encoder(folder: Path, settings: dict) -> None:
    """Saved, loaded, equal to plain torch, also padded, and with gradient checkpointing."""
    made_encoder(**settings).save_pretrained(folder, safe_serialization=True)
    model = UnitVisionModel.from_pretrained(folder).eval()
    weights = load_file(folder / "model.safetensors")
    pixels = torch.rand(2, 3, 32, 32)
    expected = reference(weights, model.config, pixels)
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        for state, wanted in zip(output.hidden_states, expected, strict=True):
            close(state, wanted)
        padded = torch.rand(1, 3, 48, 40)
        padded[..., :32, :32] = pixels[:1]
        close(
            model(padded, spatial_shapes=torch.tensor([[4, 4]])).pooler_output, model(pixels[:1]).pooler_output, 1e-5
        )
        attentions = model(pixels, output_attentions=True).attentions
        close(attentions[0].sum(dim=-1), torch.ones_like(attentions[0][..., 0]))
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.train()
        model.config.cpe_crop, model.config.cpe_drop_prob = False, 0.0
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(pixels).last_hidden_state.square().sum().backward()
        gradients.append(model.embeddings.projection.weight.grad.clone())
    close(gradients[1], gradients[0], 1e-4)


def check_tower(source: Path, flavour: str) -> None:
    """Through the one line, from training to a saved model that is loaded again."""
    modules = install(lambda mapping, key, value: mapping.__setitem__(key, value), flavour)
    register_llava()
    register_llava()
    assert isinstance(modules.arch.build_vision_tower(model_arguments("openai/clip-vit-large-patch14")), OwnTower)
    model = modules.arch.LlavaMetaModel(argparse.Namespace())
    model.initialize_vision_modules(model_arguments(source))
    tower = model.vision_tower
    assert isinstance(tower, UnitVisionTower)
    assert tower.is_loaded
    pictures = [Image.new("RGB", (30, 20), (200, 100, 0)), Image.new("RGB", (9, 50), (0, 0, 0))]
    pixels = process_images(pictures, tower.image_processor)
    assert pixels.shape == (2, 3, tower.image_size, tower.image_size)
    features = tower(pixels)
    assert features.shape == (2, tower.num_patches, tower.hidden_size)
    assert not features.requires_grad
    model.train()
    model.encode_images(pixels).sum().backward()
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert model.pooled_by_two(pixels).shape == (2, tower.num_patches // 4, 6)
    tower.requires_grad_(True)
    model.encode_images(pixels).sum().backward()
    assert tower.vision_tower.embeddings.projection.weight.grad.abs().sum() > 0
    again = modules.arch.LlavaMetaModel(model.config)
    again.vision_tower.load_model()
    again.vision_tower.eval()
    tower.eval()
    close(again.vision_tower(pixels), tower(pixels), 0)
    half = again.vision_tower.to(torch.float16)(pixels.to(torch.float16))
    assert half.dtype == torch.float16
    assert half.isfinite().all()


def write(folder: Path) -> None:
    """What transformers 5 exports, and the features that it must give."""
    from training.llava_tower import export_tower

    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 4 - 2
    expected = {"pixels": pixels}
    source = str(shipped_checkpoint())
    tower = UnitVisionTower(source, model_arguments(source, mm_vision_image_size=128)).eval()
    with torch.no_grad():
        expected["features"] = tower(pixels).contiguous()
    for architecture in ("unit", "vit", "clip"):
        export_tower(source, folder / architecture, architecture, 128, dtype=torch.float32)
    save_file(expected, str(folder / "expected.safetensors"))
    print(f"written: {folder}")


def read(folder: Path) -> None:
    """The exported folders as LLaVA's CLIP tower, as `AutoModel` and as ours read them."""
    from transformers import AutoModel, CLIPImageProcessor, CLIPVisionModel

    expected = load_file(folder / "expected.safetensors")
    pixels, wanted = expected["pixels"], expected["features"]
    width = wanted.shape[-1]
    tower = UnitVisionTower(str(folder / "unit"), model_arguments(folder / "unit")).eval()
    with torch.no_grad():
        ours = tower(pixels)
        vit = AutoModel.from_pretrained(folder / "vit").eval()(pixels, output_hidden_states=True).hidden_states[-2]
        model, report = CLIPVisionModel.from_pretrained(folder / "clip", output_loading_info=True)
        assert not report["missing_keys"], report
        assert not report["unexpected_keys"], report
        clip = model.eval()(pixels, output_hidden_states=True).hidden_states[-2]
    assert CLIPImageProcessor.from_pretrained(folder / "clip").crop_size["height"] == 128
    scale = wanted.abs().max()
    rows = {
        "unit": (ours - wanted).abs().max() / scale,
        "vit": (vit[:, 1:] - wanted).abs().max() / scale,
        "clip": (clip[:, 1:, :width] - (wanted - wanted.mean(dim=-1, keepdim=True))).abs().max() / scale,
    }
    print(f"largest difference, of the largest feature ({float(scale):.1f}), layer -2, float32:")
    for name, difference in rows.items():
        print(f"  {name:<5} {float(difference):.1e}")
        assert difference < 5e-5, name
    assert clip[..., width:].abs().max() == 0
    # LLaVA-NeXT's `hf:` towers: the code from the folder itself, in a process without this package
    stranger = """if True:
        import sys, torch
        from safetensors.torch import load_file
        from transformers import AutoImageProcessor, AutoModel
        folder, expected = sys.argv[1], load_file(sys.argv[2])
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        assert AutoImageProcessor.from_pretrained(folder).crop_size["height"] == 128
        with torch.no_grad():
            given = model.float()(expected["pixels"], output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(given, expected["features"], atol=1e-5, rtol=0)
    """
    with tempfile.TemporaryDirectory() as modules:
        subprocess.run(
            [sys.executable, "-I", "-c", stranger, str(folder / "unit"), str(folder / "expected.safetensors")],
            env=os.environ | {"HF_MODULES_CACHE": modules},
            check=True,
        )
    print("  unit  with trust_remote_code, where this package is not installed: equal")


def real(folder: Path) -> None:
    """LLaVA's own package: built, trained for a step, asked, saved and loaded, with both kinds of tower."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images as llavas_process_images
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    transformers.logging.set_verbosity_error()  # LLaVA loads a frozen tower from its own folder, and says so at length
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": 64, "max_position_embeddings": 512}
    for name, source in (("CLIPVisionTower", folder / "clip"), ("UnitVisionTower", shipped_checkpoint())):
        if name == "UnitVisionTower":
            register_llava()
        torch.manual_seed(0)
        model = LlavaLlamaForCausalLM(LlavaConfig(**shape))
        arguments = model_arguments(
            source,
            pretrain_mm_mlp_adapter=None,
            mm_projector_type="mlp2x_gelu",
            mm_patch_merge_type="flat",
            mm_vision_image_size=128,
        )
        model.get_model().initialize_vision_modules(arguments)
        model.config.mm_vision_image_size = 128  # what is not LLaVA's own, its configuration carries only if told
        tower = model.get_vision_tower()
        assert type(tower).__name__ == name, type(tower)
        model.config.image_aspect_ratio = "pad"
        pictures = [Image.new("RGB", (30, 20), (200, 100, 0)), Image.new("RGB", (9, 50), (0, 0, 0))]
        images = llavas_process_images(pictures, tower.image_processor, model.config)
        assert images.shape == (2, 3, 128, 128)
        ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 6, 7]] * 2)
        labels = torch.where(ids == IMAGE_TOKEN_INDEX, -100, ids)
        model.train()
        output = model(input_ids=ids, labels=labels, images=images)
        assert output.logits.shape[1] == ids.shape[1] - 1 + tower.num_patches
        output.loss.backward()
        assert all(parameter.grad is None for parameter in tower.parameters())
        assert model.get_model().mm_projector[0].weight.grad.abs().max() > 0
        model.eval()
        with torch.no_grad():
            wanted = model(input_ids=ids, images=images).logits
            made = model.generate(ids[:1], images=images[:1], max_new_tokens=3, do_sample=False)
            assert made.shape[1] >= 1
            with tempfile.TemporaryDirectory() as saved:
                model.save_pretrained(saved)
                again = LlavaLlamaForCausalLM.from_pretrained(saved).eval()
                assert not again.get_vision_tower().is_loaded
                again.get_vision_tower().load_model()
                close(again(input_ids=ids, images=images).logits, wanted)
        if name == "UnitVisionTower":  # LLaVA's own tower never learns: it records no gradients
            # one that has learned comes back from LLaVA's checkpoint
            model.config.unfreeze_mm_vision_tower = True
            tower.requires_grad_(True)
            model(input_ids=ids, labels=labels, images=images).loss.backward()
            with torch.no_grad(), tempfile.TemporaryDirectory() as saved:
                for parameter in tower.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad.sign() * 1e-2)
                model.save_pretrained(saved)
                again = LlavaLlamaForCausalLM.from_pretrained(saved).eval()
                assert again.get_vision_tower().is_loaded
                changed = model(input_ids=ids, images=images).logits
                assert (changed - wanted).abs().max() > 1e-6
                close(again(input_ids=ids, images=images).logits, changed)
        print(f"LLaVA's own package, {name} from {source.name}: built, trained, asked, saved, loaded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--read", type=Path, metavar="FOLDER")
    parser.add_argument("--llava", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    if arguments.write:
        return write(arguments.write)
    if arguments.read:
        return read(arguments.read)
    if arguments.llava:
        return real(arguments.llava)
    with tempfile.TemporaryDirectory() as folder:
        for index, settings in enumerate(SETTINGS):
            check_encoder(Path(folder) / str(index), settings)
            print(f"encoder {json.dumps(settings)}: equal to plain torch")
        for flavour in FLAVOURS:
            for source in (Path(folder) / "0", shipped_checkpoint(), shipped_checkpoint("unit-tiny-teacher")):
                check_tower(source, flavour)
                print(f"{flavour}, {source.name if source.parent != Path(folder) else 'made encoder'}: tower works")
    return None


if __name__ == "__main__":
    main()
