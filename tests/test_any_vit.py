"""Any vision transformer as the start: run as its own architecture wants it, trained, saved as the plain class again.

Every architecture at a size of two layers of width 32, with random weights.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tiny import (
    IMAGE_TOKEN,
    OPT,
    PATCH,
    byte_ids,
    document_row,
    image_processor,
    noise,
    picture_row,
    processor,
    unit_model,
    vision_config,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import training.recipe as training_recipe
from modeling_unit import (
    UnitForConditionalGeneration,
    UnitForPreTraining,
    UnitImageProcessor,
    UnitModel,
    UnitProcessor,
)
from modeling_unit.architectures_unit import ARCHITECTURES, class_tokens, freeze_unread, prefix_tokens, run_encoder
from modeling_unit.configuration_unit import CLIP_MEAN, CLIP_STD, PREFIX_TOKENS
from modeling_unit.vision_sources_unit import _put_prefix, find_vision_source, image_settings, openclip_to_clip
from training.arguments import LoraArguments
from training.data.schema import write_shards
from training.evaluation.subjects import PictureEncoder
from training.export import save_encoder
from training.lora import add_lora
from training.recipe import main as run_recipe
from unit_cli.__main__ import main as unit

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH}
MLP = {"intermediate_size": 48}
TEXT = SHAPE | MLP | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
TEXT.pop("patch_size")
# name of the start -> class of transformers, configuration, prefix tokens read off the architecture's own code
PLAIN = {
    "clip_vision_model": ("CLIPVisionModel", SHAPE | MLP | {"image_size": 32}, 1),
    "siglip_vision_model": ("SiglipVisionModel", SHAPE | MLP | {"image_size": 32}, 0),
    "siglip2_vision_model": ("Siglip2VisionModel", SHAPE | MLP | {"num_patches": 16}, 0),
    "dinov2": ("Dinov2Model", SHAPE | {"mlp_ratio": 2, "image_size": 32}, 1),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        SHAPE | {"mlp_ratio": 2, "image_size": 32, "num_register_tokens": 4},
        5,
    ),
    "dinov3_vit": ("DINOv3ViTModel", SHAPE | MLP | {"image_size": 32, "num_register_tokens": 4}, 5),
    "vit": ("ViTModel", SHAPE | MLP | {"image_size": 32}, 1),
    "radio": ("RadioModel", SHAPE | {"mlp_ratio": 2.0, "image_size": 32, "max_img_size": 64}, 10),
    "clip": ("CLIPModel", SHAPE | MLP | {"image_size": 32}, 1),
    "siglip": ("SiglipModel", SHAPE | MLP | {"image_size": 32}, 0),
    "siglip2": ("Siglip2Model", SHAPE | MLP | {"num_patches": 16}, 0),
    "unit_vision_model": ("UnitVisionModel", {}, 1),
    "unit": ("UnitForPreTraining", {}, 1),
    "unit around clip": ("UnitForPreTraining", {"model_type": "clip_vision_model"}, 1),
    "unit around radio": ("UnitForPreTraining", {"model_type": "radio"}, 10),
    "openclip": ("CLIPVisionModel", {}, 1),
}
NAMES = list(PLAIN)
SIZES = [(4, 4), (3, 5), (7, 2)]  # rows and columns: the nominal grid, and others, one beyond it
MIXED = [(4, 4), (2, 6), (4, 4), (1, 2), (5, 3)]


def shaken(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Weights large enough that the outputs differ from image to image and token to token."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def openclip_tensors(
    width=32, layers=2, patch=PATCH, side=4, hidden=48, embed=16, scale=0.15
) -> dict[str, torch.Tensor]:
    """Random weights in the layout of OpenCLIP's vision transformer, and a little of its text tower."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator) * scale

    tensors = {
        "visual.conv1.weight": random(width, 3, patch, patch),
        "visual.class_embedding": random(width),
        "visual.positional_embedding": random(side * side + 1, width),
        "visual.proj": random(width, embed),
        "positional_embedding": random(8, width),
        "token_embedding.weight": random(20, width),
        "logit_scale": random(),
    }
    for norm in ("ln_pre", "ln_post"):
        tensors |= {f"visual.{norm}.weight": 1 + random(width), f"visual.{norm}.bias": random(width)}
    for layer in range(layers):
        block = f"visual.transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            tensors |= {f"{block}{norm}.weight": 1 + random(width), f"{block}{norm}.bias": random(width)}
        tensors |= {
            f"{block}attn.in_proj_weight": random(3 * width, width),
            f"{block}attn.in_proj_bias": random(3 * width),
            f"{block}attn.out_proj.weight": random(width, width),
            f"{block}attn.out_proj.bias": random(width),
            f"{block}mlp.c_fc.weight": random(hidden, width),
            f"{block}mlp.c_fc.bias": random(hidden),
            f"{block}mlp.c_proj.weight": random(width, hidden),
            f"{block}mlp.c_proj.bias": random(width),
        }
    return tensors


class OpenClipVisionTransformer(nn.Module):
    """OpenCLIP's vision transformer by its layout, with torch's own attention; shares nothing with what is tested."""

    class Block(nn.Module):
        def __init__(self, width, heads, hidden, activation):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})
            self.activation = activation

        def forward(self, x):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False)[0]
            return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))

    def __init__(self, tensors, heads, quick_gelu=False):
        super().__init__()
        tensors = {name[len("visual.") :]: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
        width, _, self.patch, _ = tensors["conv1.weight"].shape
        layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer.resblocks"))
        hidden = tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        activation = (lambda x: x * torch.sigmoid(1.702 * x)) if quick_gelu else F.gelu
        self.conv1 = nn.Conv2d(3, width, self.patch, self.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros_like(tensors["positional_embedding"]))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = nn.ModuleList([self.Block(width, heads, hidden, activation) for _ in range(layers)])
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.proj = nn.Parameter(torch.zeros_like(tensors["proj"]))
        self.load_state_dict(tensors)

    def forward(self, pixels):
        """Tokens after the last block, and the normed class token."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return x, self.ln_post(x[:, 0])


def encoder_of(name: str, model: nn.Module) -> nn.Module:
    return model.vision_model if name in ("clip", "siglip", "siglip2") or name.startswith("unit ") else model


def write_start(name: str, folder: Path) -> tuple[Path, nn.Module]:
    """A checkpoint as somebody else left it, and the encoder in it as the plain class."""
    class_name, settings, _ = PLAIN[name]
    if name == "openclip":
        tensors = openclip_tensors()
        folder.mkdir()
        save_file(tensors, str(folder / "open_clip_model.safetensors"))
        config = {
            "model_cfg": {"vision_cfg": {"head_width": 16}},
            "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        clip = CLIPVisionModel(CLIPVisionConfig(**SHAPE, **MLP, image_size=32, hidden_act="gelu"))
        visual = {key[len("visual.") :]: value for key, value in tensors.items() if key.startswith("visual.")}
        clip.load_state_dict(openclip_to_clip(visual))
        return folder, clip.eval()
    if name == "unit_vision_model":
        model = shaken(transformers.AutoModel.from_config(vision_config(cpe_crop=False, cpe_drop_prob=0.0)))
        image_processor().save_pretrained(folder)
    elif name.startswith("unit"):
        inner = settings.get("model_type")
        vision = {"model_type": inner} | PLAIN[inner][1] if inner else vision_config()
        model = shaken(unit_model(vision=vision))
    elif name in ("clip", "siglip", "siglip2"):
        config = getattr(transformers, class_name.replace("Model", "Config"))
        model = shaken(getattr(transformers, class_name)(config(vision_config=settings, text_config=TEXT)))
    else:
        config = transformers.CONFIG_MAPPING[name](**settings)
        model = shaken(getattr(transformers, class_name)(config))
    model.save_pretrained(folder)
    return folder, model.vision_model if hasattr(model, "vision_model") else model


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """name -> (folder, plain encoder), made when first asked for."""
    root, made = tmp_path_factory.mktemp("starts"), {}

    def start(name: str) -> tuple[Path, nn.Module]:
        if name not in made:
            torch.manual_seed(0)
            made[name] = write_start(name, root / name.replace(" ", "-"))
        return made[name]

    return start


def new_model(source, model_class=UnitForPreTraining, **settings):
    connector = {"connector_type": "mlp", "unshuffle": 1}
    settings = {"text_config": OPT, "connector_config": connector, "image_token_id": IMAGE_TOKEN} | settings
    return model_class.from_vision_pretrained(source, **settings)


def plain_forward(encoder: nn.Module, pixels: torch.Tensor, **kwargs):
    """The class called by hand, as the documentation of its architecture has it."""
    name = encoder.config.model_type
    if name in ("clip_vision_model", "siglip_vision_model", "vit"):
        return encoder(pixels, interpolate_pos_encoding=True, **kwargs)
    if name != "siglip2_vision_model":
        return encoder(pixels, **kwargs)
    batch, _, height, width = pixels.shape
    patches = [
        pixels[:, :, top : top + PATCH, left : left + PATCH].permute(0, 2, 3, 1).reshape(batch, -1)
        for top in range(0, height, PATCH)
        for left in range(0, width, PATCH)
    ]
    return encoder(
        pixel_values=torch.stack(patches, dim=1),
        pixel_attention_mask=torch.ones(batch, len(patches), dtype=torch.long),
        spatial_shapes=torch.tensor([[height // PATCH, width // PATCH]] * batch),
        **kwargs,
    )


def image(rows: int, cols: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, rows * PATCH, cols * PATCH)


def mixed_batch() -> torch.Tensor:
    """Images of `MIXED` sizes; the padding is loud, so that it is heard where it is not masked."""
    rows, cols = (max(shape[axis] for shape in MIXED) for axis in (0, 1))
    batch = torch.full((len(MIXED), 3, rows * PATCH, cols * PATCH), 5.0)
    for index, shape in enumerate(MIXED):
        batch[index, :, : shape[0] * PATCH, : shape[1] * PATCH] = image(*shape)[0]
    return batch


def training_batch(model) -> dict:
    """Two pictures of another than the nominal size with a caption, and what the teacher sees in them."""
    pixels = image(3, 4, batch=2)
    text = [*byte_ids("a cat"), 1]
    row = [IMAGE_TOKEN] * 12 + [4, *text]
    labels = [-100] * 13 + text
    features = run_encoder(model.make_teacher(), pixels).last_hidden_state.detach()
    return {
        "pixel_values": pixels,
        "input_ids": torch.tensor([row, row]),
        "labels": torch.tensor([labels, labels]),
        "teacher_features": features,
    }


@pytest.mark.parametrize("name", NAMES)
class TestAnyViT:
    @torch.no_grad()
    def test_the_start_is_taken_over_exactly(self, name, starts):
        folder, plain = starts(name)
        model = new_model(folder)
        assert type(model.vision_model) is type(plain)
        assert model.config.vision_config is model.vision_model.config
        weights = plain.state_dict()
        assert model.vision_model.state_dict().keys() == weights.keys()
        for key, tensor in model.vision_model.state_dict().items():
            assert torch.equal(tensor, weights[key]), key
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not model.training

    @torch.no_grad()
    @pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
    def test_any_size_gives_what_the_plain_class_gives(self, name, size, starts):
        folder, plain = starts(name)
        model, prefix = new_model(folder, UnitModel), PLAIN[name][2]
        pixels = image(*size, batch=2)
        expected = plain_forward(plain, pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, expected)
        before, patches, mask, grid = model.encode(pixels)
        assert before.shape == (2, prefix, 32)
        assert patches.shape == (2, size[0] * size[1], 32)
        assert (mask, grid) == (None, size)
        assert torch.equal(torch.cat([before, patches], dim=1), expected)

    @torch.no_grad()
    def test_the_tokens_stand_where_their_patches_are(self, name, starts):
        """Change one patch: of all tokens, that of its row and column changes most."""
        model = new_model(starts(name)[0], UnitModel)
        pixels = image(3, 5)
        changed = pixels.clone()
        changed[:, :, PATCH : 2 * PATCH, 3 * PATCH : 4 * PATCH] += 3 * torch.randn(3, PATCH, PATCH)
        difference = (model.encode(pixels)[1] - model.encode(changed)[1]).norm(dim=-1)[0].view(3, 5)
        assert divmod(int(difference.argmax()), 5) == (1, 3)

    @torch.no_grad()
    def test_a_batch_of_mixed_sizes_equals_one_by_one(self, name, starts):
        folder, plain = starts(name)
        model, prefix = new_model(folder, UnitModel), PLAIN[name][2]
        batch, shapes = mixed_batch(), torch.tensor(MIXED)
        together = model(batch, spatial_shapes=shapes, output_hidden_states=True, output_attentions=True)
        before, patches, mask, (rows, cols) = model.encode(batch, shapes)
        assert torch.equal(torch.cat([before, patches], dim=1), model(batch, shapes).last_hidden_state)
        for index, (own_rows, own_cols) in enumerate(MIXED):
            pixels = batch[index : index + 1, :, : own_rows * PATCH, : own_cols * PATCH]
            inside = torch.zeros(rows, cols, dtype=torch.bool)
            inside[:own_rows, :own_cols] = True
            assert torch.equal(mask[index], inside.flatten())
            own = torch.cat([torch.ones(prefix, dtype=torch.bool), inside.flatten()])
            alone = plain_forward(plain, pixels, output_hidden_states=True)
            torch.testing.assert_close(
                together.last_hidden_state[index, own], alone.last_hidden_state[0], atol=1e-5, rtol=0
            )
            assert not together.last_hidden_state[index, ~own].any()
            pooled = alone.get("pooler_output", alone.get("summary"))
            torch.testing.assert_close(together.pooler_output[index], pooled[0], atol=1e-5, rtol=0)
            assert len(together.hidden_states) == len(alone.hidden_states)
            for layer, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(layer[index, own], expected[0], atol=1e-5, rtol=0)
            for layer in together.attentions:
                shares = layer[index][:, own][:, :, own].sum(dim=-1)  # each token looks at its own image alone
                torch.testing.assert_close(shares, torch.ones_like(shares), atol=1e-5, rtol=0)

    def test_a_few_steps_move_the_encoder_lower_the_loss_and_leave_the_teacher(self, name, starts):
        folder, plain = starts(name)
        model = new_model(folder)
        teacher, batch = model.make_teacher(), training_batch(model)
        with torch.no_grad():
            seen = run_encoder(teacher, batch["pixel_values"]).last_hidden_state
            assert torch.equal(seen, run_encoder(model.vision_model, batch["pixel_values"]).last_hidden_state)
            first = float(model(**batch).loss)
        assert not [parameter for parameter in teacher.parameters() if parameter.requires_grad]
        unread = set(freeze_unread(model.vision_model))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-3)
        for _ in range(4):
            model.train()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            assert float(model.eval()(**batch).loss) < first - 0.05
        weights = plain.state_dict()
        for key, parameter in model.vision_model.named_parameters():
            still = key in unread or key == "position_embedding"
            assert torch.equal(parameter, weights[key]) == still, key
        for key, tensor in teacher.state_dict().items():
            assert torch.equal(tensor, weights[key]), key
        with torch.no_grad():
            assert torch.equal(run_encoder(teacher, batch["pixel_values"]).last_hidden_state, seen)

    def test_what_is_not_trained_is_what_the_tokens_do_not_depend_on(self, name, starts):
        encoder = copy.deepcopy(starts(name)[1])
        unread = set(freeze_unread(encoder))
        for parameter in encoder.parameters():
            parameter.requires_grad_(True)
        run_encoder(encoder, image(3, 4)).last_hidden_state.square().sum().backward()
        without = {key for key, parameter in encoder.named_parameters() if parameter.grad is None}
        assert without == unread

    def test_the_image_processor_suits_it(self, name, starts):
        folder, plain = starts(name)
        processor = UnitImageProcessor.from_vision_pretrained(folder, max_side=64)
        nominal = 64 if name == "unit" else 32  # of the others either the configuration or what was saved says 32
        assert (processor.patch_size, processor.base_size, processor.max_side) == (PATCH, nominal, 64)
        kind = plain.config.model_type
        if kind in ("siglip_vision_model", "siglip2_vision_model", "vit"):
            mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        elif kind.startswith("dino"):
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        else:
            mean, std = CLIP_MEAN, CLIP_STD
        assert processor.image_mean == pytest.approx(mean)
        assert processor.image_std == pytest.approx(std)
        assert processor.do_normalize == (kind != "radio")  # RADIO subtracts the mean itself
        with torch.no_grad():
            made = processor([noise(40, 24), noise(20, 30)])
            assert new_model(folder, UnitModel)(**made).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", ["clip", "openclip", "unit around clip"])
@torch.no_grad()
def test_a_name_on_the_hub_is_as_good_as_a_folder(name, starts, tmp_path):
    """From the cache that a download leaves; what the repository does not have is not missed."""
    folder, plain = starts(name)
    repository, commit = tmp_path / "models--somebody--encoder", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    model, pixels = new_model("somebody/encoder", UnitModel, hub=hub), image(3, 5)
    assert torch.equal(model(pixels).last_hidden_state, plain_forward(plain, pixels).last_hidden_state)
    assert UnitImageProcessor.from_vision_pretrained("somebody/encoder", hub).patch_size == PATCH
    with pytest.raises(ValueError, match=r"somebody/nothing: neither config\.json nor OpenCLIP weights"):
        new_model("somebody/nothing", hub=hub)


# -- saved as the plain class ----------------------------------------------------------------------


SAVED = ["clip_vision_model", "clip", "openclip", "siglip_vision_model", "siglip2_vision_model", "dinov2"]
SAVED += ["dinov2_with_registers", "dinov3_vit", "vit", "radio", "unit_vision_model", "unit around clip"]
VARIANTS = ["clip, bf16", "dinov3_vit, bf16", "clip, lora"]
PROCESSORS = {  # without torchvision transformers has the same class with Pil at its end
    "CLIPVisionModel": "CLIPImageProcessor",
    "SiglipVisionModel": "SiglipImageProcessor",
    "Siglip2VisionModel": "Siglip2ImageProcessor",
    "Dinov2Model": "BitImageProcessor",
    "Dinov2WithRegistersModel": "BitImageProcessor",
    "DINOv3ViTModel": "ViTImageProcessor",
    "ViTModel": "ViTImageProcessor",
    "RadioModel": "CLIPImageProcessor",
    "UnitVisionModel": "UnitImageProcessor",
}


def one_step(model) -> None:
    batch = training_batch(model)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    model.train()(**batch).loss.backward()
    optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def saved(starts, tmp_path_factory):
    """Every encoder trained and saved: where, the encoder, its inputs, and what a clean process made of the folder."""
    root = tmp_path_factory.mktemp("saved")
    noise(50, 36).save(root / "picture.png")
    models, jobs = {}, {}
    for name in [*SAVED, *VARIANTS]:
        start, _, variant = name.partition(", ")
        torch.manual_seed(1)
        folder = starts(start)[0]
        model = new_model(folder, dtype=torch.bfloat16 if variant == "bf16" else torch.float32)
        if variant == "lora":
            model = add_lora(model, LoraArguments(parts=["encoder"], r=2, dropout=0.0))
            for key, parameter in model.named_parameters():
                if "lora_B" in key:  # zero at the start: adapters that do nothing could be lost unseen
                    nn.init.normal_(parameter, std=0.2)
        one_step(model)
        out = root / name.replace(", ", "-").replace(" ", "-")
        save_encoder(model, UnitImageProcessor.from_vision_pretrained(folder), out)
        pixels = image(3, 5, batch=2).to(next(model.parameters()).dtype)
        inputs, words = {"pixel_values": pixels}, {}
        kind = model.config.vision_config.model_type
        if kind in ("clip_vision_model", "siglip_vision_model", "vit"):
            words = {"interpolate_pos_encoding": True}
        if kind == "siglip2_vision_model":
            patches = F.unfold(pixels, PATCH, stride=PATCH).unflatten(1, (3, PATCH * PATCH))  # (B, C, P * P, N)
            inputs = {
                "pixel_values": patches.permute(0, 3, 2, 1).flatten(2),
                "pixel_attention_mask": torch.ones(2, 15, dtype=torch.int32),
                "spatial_shapes": torch.tensor([[3, 5], [3, 5]], dtype=torch.int32),
            }
        file = f"{root}/{name}-inputs.safetensors"
        save_file({f"in/{key}": value.contiguous() for key, value in inputs.items()}, file)
        models[name] = (model, pixels, out)
        jobs[name] = {"folder": str(out), "inputs": file, "words": words, "ours": kind == "unit_vision_model"}
    job = {"encoders": jobs, "picture": str(root / "picture.png"), "out": str(root)}
    (root / "job.json").write_text(json.dumps(job))
    (root / "elsewhere").mkdir()
    process = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("plain_process.py")), str(root / "job.json")],
        cwd=root / "elsewhere",
        env=os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return models, load_file(root / "plain.safetensors"), json.loads((root / "names.json").read_text())


@pytest.mark.parametrize("name", [*SAVED, *VARIANTS])
class TestSaved:
    @torch.no_grad()
    def test_a_clean_process_gets_exactly_equal_outputs(self, name, saved):
        models, tensors, names = saved
        model, pixels, _ = models[name]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        output = run_encoder(base.vision_model, pixels)
        tokens = tensors[f"{name}/tokens"]
        assert tokens.dtype == output.last_hidden_state.dtype
        if name == "clip, lora":  # merged weights are one matrix, adapters two: equal up to rounding
            torch.testing.assert_close(tokens, output.last_hidden_state, atol=1e-3, rtol=0)
            output = run_encoder(copy.deepcopy(model).merge_and_unload().vision_model, pixels)
        assert torch.equal(tokens, output.last_hidden_state)
        assert torch.equal(tensors[f"{name}/pooled"], output.pooler_output)
        kind = names[name][0]
        assert kind == ARCHITECTURES[base.config.vision_config.model_type].class_name
        assert names[name][2] == str(output.last_hidden_state.dtype)

    def test_the_image_processor_is_the_architectures_own(self, name, saved):
        _, tensors, names = saved
        kind, processor, _ = names[name]
        assert processor.removesuffix("Pil") == PROCESSORS[kind]
        made = tensors[f"{name}/pixels"]
        if kind == "Siglip2VisionModel":
            assert made.shape == (1, 16, 3 * PATCH * PATCH)
        elif kind != "UnitVisionModel":
            assert made.shape == (1, 3, 32, 32)
            low = {"CLIPVisionModel": -1.8, "RadioModel": 0.0}.get(kind, -2.2 if "dino" in kind.lower() else -1.0)
            assert made.min() >= low - 0.4
            assert (made.min() < 0) == (kind != "RadioModel")
        assert tensors[f"{name}/picture"].isfinite().all()

    def test_the_folder_holds_no_code_of_ours(self, name, saved):
        folder = saved[0][name][2]
        settings = json.loads((folder / "config.json").read_text())
        ours = settings["model_type"] == "unit_vision_model"
        assert bool(list(folder.glob("*.py"))) == ours
        assert ("auto_map" in settings) == ours
        assert not [file for file in folder.parent.iterdir() if file.name.startswith(".")]
        keys = set(load_file(folder / "model.safetensors"))
        if settings["model_type"] in ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model"):
            # as transformers 4 names them, and with it LLaVA's repositories
            assert all(key.startswith("vision_model.") for key in keys)
        assert not [key for key in keys if "lora" in key or "base_layer" in key]


def test_saving_with_adapters_leaves_the_training_model_as_it_was(starts, tmp_path):
    model = add_lora(new_model(starts("dinov2")[0]), LoraArguments(parts=["encoder"], r=2))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_encoder(model, None, tmp_path / "out")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_encoder_replaces_an_earlier_one_and_other_files_stay(starts, tmp_path):
    model = new_model(starts("vit")[0])
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an earlier one")
    model.save_encoder(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.glob("model*")) == ["model.safetensors"]
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.state_dict()["layernorm.weight"], model.vision_model.state_dict()["layernorm.weight"])


def test_weights_in_several_files_get_their_prefix_too(starts, tmp_path):
    plain = starts("clip_vision_model")[1]
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _put_prefix(tmp_path, "vision_model.")
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name.startswith("vision_model.") for name in names)
    loaded, report = CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key


def test_a_save_that_fails_leaves_nothing(starts, tmp_path, monkeypatch):
    model = new_model(starts("vit")[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("of an earlier one")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("modeling_unit.vision_sources_unit.native_processor", full)
    with pytest.raises(OSError, match="no space"):
        model.save_encoder(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "of an earlier one"
    with pytest.raises(ValueError, match="is a file; name a folder"):
        model.save_encoder(tmp_path / "out" / "config.json")


@pytest.mark.parametrize("name", ["clip", "siglip2_vision_model", "radio", "dinov3_vit"])
def test_it_is_evaluated_as_a_teacher(name, starts):
    folder, plain = starts(name)
    encoder = PictureEncoder(str(folder))
    assert encoder.resolution == 32
    picture = noise(32, 32)
    first, patches = encoder.tokens([picture, noise(32, 32, 1)])
    assert patches.shape == (2, 16, 32)
    pixels = torch.from_numpy(encoder.processor.normalize(picture))[None]
    tokens = plain_forward(plain, pixels).last_hidden_state
    prefix = PLAIN[name][2]
    torch.testing.assert_close(patches[0], tokens[0, prefix:], atol=1e-5, rtol=0)
    torch.testing.assert_close(first[0], tokens[0, 0] if prefix else tokens[0].mean(dim=0), atol=1e-5, rtol=0)


def test_the_parity_table_measures_what_it_says():
    from benchmarks.parity_architectures import MOST, SHAPES, SIZES, measure

    found = measure("vit", SHAPES["tiny"], torch.float32)
    assert len(found) == len(SIZES)
    assert all(saved == 0 and mixed <= MOST["float32"] for saved, mixed in found)


# -- OpenCLIP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [False, True])
@torch.no_grad()
def test_openclip_weights_give_what_their_layout_says(quick_gelu, tmp_path):
    tensors = openclip_tensors(width=128, hidden=200, scale=0.08)
    save_file(tensors, str(tmp_path / "weights.safetensors"))
    hidden_act = "quick_gelu" if quick_gelu else None
    encoder = find_vision_source(tmp_path / "weights.safetensors", hidden_act=hidden_act).load(torch.float32)
    assert encoder.config.num_attention_heads == 2  # heads of 64
    reference = OpenClipVisionTransformer(tensors, heads=2, quick_gelu=quick_gelu).eval()
    pixels = image(4, 4, batch=2)
    output, (tokens, pooled) = encoder(pixels), reference(pixels)
    torch.testing.assert_close(output.last_hidden_state, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pooler_output, pooled, atol=1e-5, rtol=0)
    other = OpenClipVisionTransformer(tensors, heads=2, quick_gelu=not quick_gelu).eval()
    assert (output.last_hidden_state - other(pixels)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layout", "width", "layers", "patch", "side", "hidden", "heads"),
    # OpenCLIP's model_configs: ViT-B-16, ViT-L-14, ViT-H-14
    [
        ("B/16", 768, 12, 16, 14, 3072, 12),
        ("L/14", 1024, 24, 14, 16, 4096, 16),
        ("L/14 at 336", 1024, 24, 14, 24, 4096, 16),
        ("H/14", 1280, 32, 14, 16, 5120, 16),
    ],
)
def test_sizes_are_read_off_the_tensors(layout, width, layers, patch, side, hidden, heads):
    from modeling_unit.vision_sources_unit import openclip_vision_config

    with torch.device("meta"):
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                patch_size=patch,
                image_size=side * patch,
                intermediate_size=hidden,
                num_attention_heads=heads,
            )
        )
    block = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    block |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    block |= {"mlp.c_fc.weight": (hidden, width), "mlp.c_fc.bias": (hidden,)}
    block |= {"mlp.c_proj.weight": (width, hidden), "mlp.c_proj.bias": (width,)}
    block |= {f"{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    shapes = {"conv1.weight": (width, 3, patch, patch), "class_embedding": (width,), "proj": (width, 512)}
    shapes |= {"positional_embedding": (side * side + 1, width)}
    shapes |= {f"{norm}.{kind}": (width,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    for layer in range(layers):
        shapes |= {f"transformer.resblocks.{layer}.{key}": shape for key, shape in block.items()}
    config = openclip_vision_config(shapes)
    assert (config.num_attention_heads, config.image_size, config.num_hidden_layers) == (heads, side * patch, layers)
    converted = openclip_to_clip({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in clip.state_dict().items()
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("visual.ln_pre.weight"), r"missing: ln_pre\.weight; not known: none"),
        (
            lambda tensors: tensors.update({"visual.trunk.blocks.0.ls1": torch.zeros(2)}),
            r"not known: trunk\.blocks\.0\.ls1",
        ),
        (
            lambda tensors: tensors.update({"visual.transformer.resblocks.1.attn.in_proj_bias": torch.zeros(7)}),
            r"visual\.transformer\.resblocks\.1\.attn\.in_proj_bias has the shape \(7,\), expected was \(96,\)",
        ),
        (
            lambda tensors: tensors.update({"visual.positional_embedding": torch.zeros(16, 32)}),
            r"visual\.positional_embedding has the shape \(16, 32\)",
        ),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("visual.")],
            r"none of its keys begins with visual\.",
        ),
    ],
)
def test_strange_keys_in_openclip_weights_are_named(change, words, tmp_path):
    tensors = openclip_tensors()
    change(tensors)
    save_file(tensors, str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match=words):
        new_model(tmp_path / "weights.safetensors")


def test_heads_that_do_not_divide_the_width_are_refused(starts, tmp_path):
    with pytest.raises(ValueError, match=r"hidden_size \(32\) must be a multiple of num_attention_heads \(3\)"):
        new_model(starts("openclip")[0], num_attention_heads=3)


# -- what is refused -------------------------------------------------------------------------------


def test_an_unknown_architecture_is_answered_with_those_that_are_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnext"}))
    with pytest.raises(ValueError, match="'convnext' is not supported") as error:
        new_model(tmp_path)
    for known in ("clip_vision_model", "siglip2_vision_model", "dinov3_vit", "radio", "unit", "OpenCLIP"):
        assert known in str(error.value)


@pytest.mark.parametrize("name", ["vit", "siglip_vision_model", "clip_vision_model", "clip", "unit_vision_model"])
def test_a_width_that_its_heads_do_not_divide_is_refused(name, starts, tmp_path):
    folder = shutil.copytree(starts(name)[0], tmp_path / "wrong")
    settings = json.loads((folder / "config.json").read_text())
    settings.get("vision_config", settings)["num_attention_heads"] = 5
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"hidden_size \(32\) must be a multiple of num_attention_heads \(5\)"):
        new_model(folder)


@pytest.mark.parametrize("name", ["siglip2_vision_model", "vit", "clip_vision_model", "radio", "unit_vision_model"])
def test_a_size_that_the_patch_does_not_divide_is_refused(name, starts):
    model = new_model(starts(name)[0], UnitModel)
    with pytest.raises(ValueError, match="30 x 32 pixels; height and width must be multiples of the patch size 8"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="give at least one image"):
        model.encode(torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match="spatial_shapes must lie between 1 and the padded grid 4 x 4"):
        model(torch.zeros(1, 3, 32, 32), spatial_shapes=torch.tensor([[5, 1]]))


def test_weights_that_lack_keys_are_named(starts, tmp_path):
    folder = shutil.copytree(starts("dinov2")[0], tmp_path / "wrong")
    weights = load_file(folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of the keys of Dinov2Model: layernorm\.weight"):
        new_model(folder)
    weights["layernorm.weight"] = torch.zeros(7)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layernorm\.weight: \(7,\), expected was \(32,\)"):
        new_model(folder)


def test_a_pooler_that_the_weights_lack_is_no_fault(starts, tmp_path):
    folder = shutil.copytree(starts("vit")[0], tmp_path / "without")
    weights = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if not key.startswith("pooler")}
    assert len(kept) < len(weights)
    save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})
    assert type(new_model(folder).vision_model).__name__ == "ViTModel"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(name, starts, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} is a pickle.* is refused.*safetensors"):
            new_model(source)
    shutil.copy(starts("vit")[0] / "config.json", tmp_path)
    with pytest.raises(ValueError, match="is a pickle"):
        new_model(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "neither config.json nor OpenCLIP weights"),
        ({"config.json": "{}"}, "config.json has no model_type"),
        ({"config.json": "{"}, "config.json is not valid JSON"),
        ({"config.json": json.dumps({"args": {}, "version": "1"})}, "convert it first"),
        ({"config.json": json.dumps({"model_type": "vit"})}, "there are no weights"),
        (
            {"config.json": json.dumps({"model_type": "vit", "patch_size": [8, 4]})},
            "patch_size must be one whole number",
        ),
        ({"open_clip_model.safetensors": "no tensors"}, "is no safetensors file"),
    ],
)
def test_folders_without_an_encoder_are_refused_in_one_line(files, words, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        new_model(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_of_openclip_do_not_fit_others(starts):
    with pytest.raises(ValueError, match="hidden_act and num_attention_heads are for OpenCLIP weights"):
        new_model(starts("vit")[0], hidden_act="gelu")
    with pytest.raises(ValueError, match=r"There is no file .*nowhere\.safetensors"):
        new_model("nowhere.safetensors")


# -- preprocessing ---------------------------------------------------------------------------------


def test_the_saved_image_processor_goes_before_the_defaults(starts, tmp_path):
    folder = shutil.copytree(starts("dinov2")[0], tmp_path / "start")
    saved = {"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    saved |= {"size": {"shortest_edge": 60}, "crop_size": {"height": 44, "width": 44}}
    (folder / "preprocessor_config.json").write_text(json.dumps(saved))
    processor = UnitImageProcessor.from_vision_pretrained(folder)
    assert (processor.image_mean, processor.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor.base_size == 40  # 44 in whole patches
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": saved | {"do_center_crop": False}}))
    assert UnitImageProcessor.from_vision_pretrained(folder).base_size == 56


@pytest.mark.parametrize(
    ("saved", "of_black", "of_white"),
    [
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, -1.0, 1.0),
        ({"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3}, -2.0, 3.1),
        ({"do_rescale": False, "do_normalize": False}, 0.0, 255.0),
        ({"do_normalize": False}, 0.0, 1.0),
        ({}, -1.0, 1.0),
    ],
)
def test_any_rescaling_is_folded_into_mean_and_deviation(saved, of_black, of_white):
    config = transformers.ViTConfig(**SHAPE, **MLP, image_size=32)
    processor = UnitImageProcessor(**image_settings(config, saved))
    from PIL import Image

    for level, expected in ((0, of_black), (255, of_white)):
        pixels = processor(Image.new("RGB", (32, 32), (level,) * 3))["pixel_values"]
        torch.testing.assert_close(pixels, torch.full_like(pixels, expected), atol=1e-4, rtol=1e-5)


def test_class_tokens_are_told_from_registers():
    assert set(PREFIX_TOKENS) == set(ARCHITECTURES)
    counts = {}
    for name, (_, settings, prefix) in PLAIN.items():
        if name in transformers.CONFIG_MAPPING and name in ARCHITECTURES and name != "unit_vision_model":
            config = transformers.CONFIG_MAPPING[name](**settings)
            assert prefix_tokens(config) == prefix
            counts[name] = class_tokens(config)
    assert counts == {
        "clip_vision_model": 1,
        "siglip_vision_model": 0,
        "siglip2_vision_model": 0,
        "dinov2": 1,
        "dinov2_with_registers": 1,
        "dinov3_vit": 1,
        "vit": 1,
        "radio": 3,
    }


# -- a pretrained language decoder -----------------------------------------------------------------


def word_tokenizer(**specials) -> PreTrainedTokenizerFast:
    """As of a decoder that somebody trained: bytes, one token to end with, nothing to pad or to stand for images."""
    pieces = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def write_decoder(folder: Path, **specials) -> OPTForCausalLM:
    """A causal language model with its tokenizer, as somebody trained it."""
    tokenizer = word_tokenizer(**(specials or {"eos_token": "</s>"}))
    settings = {key: value for key, value in OPT.items() if key != "model_type"} | {"vocab_size": len(tokenizer)}
    decoder = shaken(OPTForCausalLM(OPTConfig(**settings | {"pad_token_id": None, "eos_token_id": 0})))
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return decoder


@pytest.mark.parametrize("model_class", [UnitForPreTraining, UnitForConditionalGeneration])
def test_a_pretrained_decoder_is_taken_over_too(model_class, starts, tmp_path):
    decoder = write_decoder(tmp_path)
    model = new_model(starts("siglip_vision_model")[0], model_class, text_config=None, language_decoder=tmp_path)
    for key, tensor in model.language_model.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[key]), key
    assert model.config.text_config.model_type == "opt"
    embedding = model.get_input_embeddings().weight
    assert embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()  # still tied
    model.save_pretrained(tmp_path / "all")
    loaded, report = model_class.from_pretrained(tmp_path / "all", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels, tokens = image(2, 2), torch.tensor([[IMAGE_TOKEN] * 4 + [4, 9]])
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=pixels).logits
        assert torch.equal(loaded(input_ids=tokens, pixel_values=pixels).logits, logits)


def test_a_decoder_that_cannot_be_used_is_refused(starts, tmp_path):
    folder = starts("vit")[0]
    with pytest.raises(ValueError, match="language_decoder or text_config, not both"):
        new_model(folder, language_decoder=tmp_path)
    with pytest.raises(ValueError, match="no causal language model with safetensors"):
        new_model(folder, text_config=None, language_decoder=tmp_path)


def test_new_parts_are_drawn_and_given_parts_are_not(starts):
    """The connector is initialised as in a model from scratch, beside an encoder that keeps its weights."""
    model = new_model(starts("dinov2")[0], connector_config={"connector_type": "qformer", "num_attention_heads": 2})
    assert float(model.connector.queries.std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.vision_decoder.fc1.weight.std()) == pytest.approx(0.02, rel=0.2)
    assert math.isclose(float(model.connector.norm.weight.mean()), 1.0)


# -- recipes ---------------------------------------------------------------------------------------


STAGE_1 = [("document", 4), ("natural", 1)]
STAGE_2 = [("document", 4), ("document", 1), ("natural", 1), ("natural", 4)]


class Recipes:
    """Writes recipes of two steps over eight rows of each kind."""

    def __init__(self, root: Path):
        self.root = root
        write_shards([document_row(f"line {index}", 48, 16, seed=index) for index in range(8)], root / "document")
        write_shards([picture_row(f"thing {index}", seed=index) for index in range(8)], root / "natural")

    def write(self, name: str, groups, **settings) -> str:
        training = {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2, "disable_tqdm": True}
        training["output_dir"] = str(self.root / name)
        recipe = {"stage": "intra_scale" if groups is STAGE_1 else "inter_scale", "training": training}
        recipe["groups"] = [
            {"kind": kind, "scale": scale, "rows": 2, "sources": [{"path": str(self.root / kind)}]}
            for kind, scale in groups
        ]
        (self.root / f"{name}.yaml").write_text(yaml.safe_dump(recipe | settings))
        return str(self.root / f"{name}.yaml")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    return Recipes(tmp_path_factory.mktemp("recipes"))


SMALL = {"connector_config": {"connector_type": "mlp", "unshuffle": 2}}


def test_a_clip_checkpoint_goes_through_both_stages(recipes, starts, tmp_path, capsys):
    """Pictures at CLIP's own size, pages at twice it; a decoder that reads already; two commands; CLIP at the end."""
    clip, plain = starts("clip")
    decoder = write_decoder(tmp_path / "decoder")
    settings = {"language_decoder": str(tmp_path / "decoder"), "model": SMALL, "image_processor": {"scale_as": "area"}}
    assert unit(["train", recipes.write("clip-1", STAGE_1, start=str(clip), **settings)]) == 0
    first = recipes.root / "clip-1"
    assert unit(["train", recipes.write("clip-2", STAGE_2, start=str(first), teacher=str(clip))]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^part +parameters +trained", printed, re.MULTILINE)) == 2
    weights, before = plain.state_dict(), decoder.state_dict()
    for folder in (first, recipes.root / "clip-2"):
        model = UnitForPreTraining.from_pretrained(folder)
        assert type(model.vision_model) is CLIPVisionModel
        for key, tensor in model.vision_model.state_dict().items():
            distance = float((tensor - weights[key]).abs().max())
            assert (distance == 0) == key.startswith("post_layernorm"), key
            assert distance < 0.02, key
        for key, tensor in model.language_model.state_dict().items():
            assert float((tensor - before[key]).abs().max()) < 0.02, key
        saved = UnitProcessor.from_pretrained(folder)
        assert saved.image_processor.base_size == 32
        assert saved.image_processor.image_mean == pytest.approx(CLIP_MEAN)
        assert saved.task_prompts["ocr"] == "Read the text:"
        assert (saved.unshuffle, saved.image_token_id) == (2, 257)
        logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert {"natural_x1/vision_loss", "document_x4/language_loss"} <= set().union(*logged)
    inputs = saved(images=[noise(24, 24), noise(60, 30)], task="ocr")
    ids = model.eval().generate(**inputs, max_new_tokens=3)
    assert len(saved.decode_new(ids, inputs)) == 2
    save_encoder(model, saved, tmp_path / "encoder")
    again = CLIPVisionModel.from_pretrained(tmp_path / "encoder").eval()
    pixels = image(4, 4)
    with torch.no_grad():
        assert torch.equal(again(pixels).last_hidden_state, run_encoder(model.vision_model, pixels).last_hidden_state)


@pytest.fixture
def teachers(monkeypatch):
    """The teachers of stage 1 that recipes make, each with its weights before training and after."""
    made = []

    class Watched(training_recipe.IntraScaleTrainer):
        def train(self, *args, **kwargs):
            before = copy.deepcopy(self.teacher.state_dict())
            result = super().train(*args, **kwargs)
            made.append((self.teacher, before, copy.deepcopy(self.teacher.state_dict())))
            return result

    monkeypatch.setattr(training_recipe, "IntraScaleTrainer", Watched)
    return made


FROM_SCRATCH = {"text_config": {key: value for key, value in OPT.items() if key not in ("vocab_size", "pad_token_id")}}


def test_the_teacher_is_the_start_when_none_is_named(recipes, starts, teachers):
    folder, plain = starts("siglip2_vision_model")
    path = recipes.write("siglip2", STAGE_1, start=str(folder), model=SMALL | FROM_SCRATCH)
    out = run_recipe(path, ["lora.parts=[encoder]", "lora.r=2"])
    ((_, at_first, at_last),) = teachers
    for key, tensor in at_last.items():
        assert torch.equal(tensor, at_first[key]), key
        assert torch.equal(tensor, plain.state_dict()[key]), key
    model = UnitForPreTraining.from_pretrained(out)
    fc1 = "encoder.layers.0.mlp.fc1.weight"  # merged
    assert not torch.equal(model.vision_model.state_dict()[fc1], at_first[fc1])


def test_a_whole_model_can_be_the_teacher(recipes, tmp_path, teachers):
    full = unit_model().train()
    full.save_pretrained(tmp_path / "full")
    processor().save_pretrained(tmp_path / "full")
    path = recipes.write("from-full", STAGE_1, start=str(tmp_path / "full"), teacher=str(tmp_path / "full"))
    assert (run_recipe(path) / "model.safetensors").is_file()
    ((teacher, _, _),) = teachers
    for key, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, full.vision_model.state_dict()[key]), key


def test_a_start_without_a_character_head_gets_a_new_one(recipes, tmp_path, capsys):
    """As the shipped checkpoint: what is exported has lost the head of the auxiliary loss."""
    full = unit_model()
    assert not full.config.num_character_classes
    full.save_pretrained(tmp_path / "full")
    processor().save_pretrained(tmp_path / "full")
    path = recipes.write("headless", STAGE_1, start=str(tmp_path / "full"), teacher=str(tmp_path / "full"))
    out = run_recipe(path, ["training.character_weight=1.0"])
    assert "has no character head" in capsys.readouterr().out
    assert any(key.startswith("character_head.") for key in load_file(out / "model.safetensors"))
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["document_x4/character_loss"]) for line in logged if "loss" in line)


def test_openclip_weights_start_a_recipe(recipes, starts, teachers):
    quick, source = {"hidden_act": "quick_gelu"}, str(starts("openclip")[0])
    path = recipes.write("openclip", STAGE_1, start=source, start_settings=quick, model=SMALL | FROM_SCRATCH)
    out = run_recipe(path)
    config = json.loads((out / "config.json").read_text())["vision_config"]
    assert (config["model_type"], config["hidden_act"]) == ("clip_vision_model", "quick_gelu")
    path = recipes.write("openclip-again", STAGE_1, start=str(out), teacher=source, teacher_settings=quick)
    run_recipe(path)
    assert [teacher.config.hidden_act for teacher, _, _ in teachers] == ["quick_gelu", "quick_gelu"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": "{vit}", "teacher": "{narrow}"}, "The teacher's width is 16, the vision decoder gives 32"),
        ({"start": "{vit}", "teacher": "{siglip}"}, "The teacher puts 0 class and register tokens .* the encoder 1"),
        ({"start": "{vit}", "image_processor": {"patch_size": 16}}, "patch_size is 16, the encoder's patches are 8"),
        (
            {"start": "{vit}", "language_decoder": "{vit}", "model": SMALL},
            "its tokenizer cannot be loaded|no end-of-text token",
        ),
        ({"start": "{vit}", "language_decoder": "{mute}", "model": SMALL}, "no end-of-text token"),
        ({"start": "{vit}", "language_decoder": "{mute}", "model": {"text_config": OPT}}, "leave out one of the two"),
        ({"start": "{vit}", "model": {"vision_config": {}}}, "is for stage zero"),
        ({"start": "{full}", "teacher": "{vit}", "language_decoder": "{mute}"}, "is a whole UNIT model"),
        ({"start": "{vit}", "start_settings": {"hidden": 1}}, "Unknown key 'hidden' in `start_settings`"),
        ({"start": "{nowhere}"}, "neither config.json nor OpenCLIP weights"),
    ],
)
def test_recipes_that_cannot_be_run_are_refused_in_one_line(settings, words, recipes, starts, tmp_path, capsys):
    folders = {"vit": starts("vit")[0], "siglip": starts("siglip")[0], "nowhere": tmp_path / "nowhere"}
    folders |= {"full": starts("unit")[0], "mute": tmp_path / "mute", "narrow": tmp_path / "narrow"}
    folders["nowhere"].mkdir()
    if "narrow" in str(settings):
        transformers.ViTModel(transformers.ViTConfig(**SHAPE | MLP | {"hidden_size": 16})).save_pretrained(
            folders["narrow"]
        )
    if "mute" in str(settings):
        write_decoder(folders["mute"], unk_token="</s>")
    settings = {key: value.format(**folders) if isinstance(value, str) else value for key, value in settings.items()}
    if "language_decoder" not in settings and "model" not in settings and "full" not in settings["start"]:
        settings["model"] = SMALL | FROM_SCRATCH
    path = recipes.write("refused", STAGE_1, **settings)
    assert unit(["train", path]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()  # behind the bars of what was loaded
    assert re.search(f"^unit train: .*({words})", error), error
    assert not (recipes.root / "refused").exists()
