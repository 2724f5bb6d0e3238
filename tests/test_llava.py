"""The encoder as a vision tower: of transformers' LLaVA and LLaVA-NeXT, of the original repositories, and as a class
that they know. The table in docs/llava.md names a test of this file for each attribute of the contract.
"""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from llava_fakes import FLAVOURS, OwnTower, install, model_arguments, process_images
from PIL import Image
from safetensors.torch import load_file
from tiny import image_processor, noise, processor, unit_model, vision_config
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    ViTModel,
)

import modeling_unit
from modeling_unit import UnitVisionModel, UnitVisionTower, encoder_unit, pack_images, register_llava
from modeling_unit.llava_unit import is_unit, tower_size
from training.export import save_encoder, save_full
from training.llava_tower import at_one_size, export_tower

ROOT = Path(__file__).resolve().parents[1]
IMAGE, PATCHES, LAYERS = 15, 16, 3  # id of <image>; 32 x 32 pixels in patches of 8; layers of the towers here


def settings(**changes) -> dict:
    return {"num_hidden_layers": LAYERS, "image_size": 32, "cpe_max_size": 32} | changes


def shaken(model, by=0.1):
    """Random enough that positions, attention and the final norm matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return model


def encoder(**changes) -> UnitVisionModel:
    return shaken(UnitVisionModel(vision_config(**settings(**changes)))).eval()


def llava(next_: bool = False, strategy="default", layer=-2, vision=None, **changes):
    config_class, model_class = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration) if next_ else (LlavaConfig, LlavaForConditionalGeneration)
    )
    text = LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=256,
    )
    if next_:
        changes = {"image_grid_pinpoints": [[32, 64], [64, 32]]} | changes
    config = config_class(
        vision_config=vision_config(**settings()) if vision is None else vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
        **changes,
    )
    return shaken(model_class(config)).eval()


def question(images: int, tokens: int, batch: int = 2) -> dict:
    row = [1] + [IMAGE] * tokens * images + [4, 5, 6]
    ids = torch.tensor([row] * batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens_of(strategy: str) -> int:
    return PATCHES + (strategy == "full")


# -- transformers' LLaVA ---------------------------------------------------------------------------

STRATEGIES = ["default", "full"]
CHOSEN = [-2, -1, 0, [-2, -1], [0, 1, 3]]
PREFIXES = [{}, {"num_cls_tokens": 3}, {"num_cls_tokens": 2, "register_multiple": 4}]


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
@pytest.mark.parametrize("layer", CHOSEN, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_llava_gets_the_chosen_layers_tokens(strategy, layer, prefix):
    """However many prefix tokens the encoder holds, one comes out: what "default" drops."""
    model = llava(strategy=strategy, layer=layer, vision=vision_config(**settings(**prefix)))
    pixels = torch.randn(2, 3, 32, 32)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = torch.cat([states[one] for one in (layer if isinstance(layer, list) else [layer])], dim=-1)
    chosen = chosen[:, 1:] if strategy == "default" else chosen
    assert chosen.shape[1] == tokens_of(strategy)
    projector = model.model.multi_modal_projector
    expected = projector.linear_2(F.gelu(projector.linear_1(chosen)))
    given = torch.stack(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    logits = model(**question(1, tokens_of(strategy)), pixel_values=pixels).logits
    other = model(**question(1, tokens_of(strategy)), pixel_values=pixels.flip(0)).logits
    torch.testing.assert_close(logits, other.flip(0), atol=1e-5, rtol=0)
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-4  # the picture reaches the answer


@pytest.mark.parametrize("layer", [-2, -1, 0, [-2, -1]], ids=str)
@torch.no_grad()
def test_llava_next_gets_the_tokens_of_every_tile(layer):
    """A tall picture: the whole of it at 32 x 32 and two tiles of 32 x 32 with a line break behind each row."""
    model = llava(next_=True, layer=layer)
    pixels = torch.randn(1, 3, 3, 32, 32)  # (B, tiles, 3, H, W)
    (given,) = model.get_image_features(pixels, image_sizes=torch.tensor([[64, 32]])).pooler_output
    rows = 8
    assert given.shape == (PATCHES + rows * (4 + 1), 24)
    states = model.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states
    states = torch.cat([states[one][:, 1:] for one in (layer if isinstance(layer, list) else [layer])], dim=-1)
    expected = model.model.multi_modal_projector(states)
    torch.testing.assert_close(given[:PATCHES], expected[0], atol=1e-6, rtol=0)
    tiles = given[PATCHES:].view(rows, 5, 24)
    torch.testing.assert_close(tiles[:, :4].reshape(2, PATCHES, 24), expected[1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(tiles[:, 4], model.model.image_newline.expand(rows, -1), atol=0, rtol=0)


@pytest.mark.parametrize("tower", ["unit", "clip"])
def test_llava_next_takes_no_class_token_between_tiles_from_anyone(tower):
    """transformers lays the tiles out as squares: "full" selection fails there with CLIP just as with our encoder."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    clip = CLIPVisionConfig(**shape, patch_size=8, image_size=32)
    model = llava(next_=True, strategy="full", layer=-1, vision=clip if tower == "clip" else None)
    with pytest.raises(RuntimeError, match="invalid for input"):
        model.get_image_features(torch.randn(1, 3, 3, 32, 32), image_sizes=torch.tensor([[64, 32]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("next_", [False, True])
@torch.no_grad()
def test_llava_takes_float_pixels_in_half_precision(dtype, next_):
    model = llava(next_=next_)
    pixels = torch.randn(1, 3, 3, 32, 32) if next_ else torch.randn(1, 3, 32, 32)
    extra = {"image_sizes": torch.tensor([[64, 32]])} if next_ else {}
    ids = question(1, PATCHES + 40 if next_ else PATCHES, batch=1)
    wanted = model(**ids, pixel_values=pixels, **extra).logits
    given = model.to(dtype)(**ids, pixel_values=pixels, **extra).logits
    assert given.dtype == dtype
    error = (given.float() - wanted).abs().max() / wanted.abs().max()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("next_", [False, True])
@torch.no_grad()
def test_llava_generates(next_):
    model = llava(next_=next_)
    pixels = torch.randn(2, 3, 3, 32, 32) if next_ else torch.randn(2, 3, 32, 32)
    extra = {"image_sizes": torch.tensor([[64, 32]] * 2)} if next_ else {}
    ids = question(1, PATCHES + 40 if next_ else PATCHES)
    made = model.generate(**ids, pixel_values=pixels, **extra, max_new_tokens=4, do_sample=False, pad_token_id=0)
    length = ids["input_ids"].shape[1]
    assert made.shape[1] > length
    # the first step by hand, then one more with what was made
    first = model(**ids, pixel_values=pixels, **extra).logits[:, -1].argmax(dim=-1)
    assert made[:, length].tolist() == first.tolist()
    longer = torch.cat([ids["input_ids"], first[:, None]], dim=1)
    second = model(input_ids=longer, pixel_values=pixels, **extra).logits[:, -1].argmax(dim=-1)
    assert made[:, length + 1].tolist() == second.tolist()


def moved(model, **inputs) -> set[str]:
    """Names of the tower's parameters that got a gradient other than zero."""
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    tower = model.model.vision_tower.named_parameters()
    return {name for name, parameter in tower if parameter.grad is not None and parameter.grad.abs().max() > 0}


def seen_by(layer: int, model) -> set[str]:
    """Names of the tower's parameters that stand before hidden state `layer` (0: input of the first block)."""
    names = [name for name, _ in model.model.vision_tower.named_parameters()]
    return {
        name
        for name in names
        if name.startswith("embeddings.") or (name.startswith("blocks.") and int(name.split(".")[1]) < layer)
    }


@pytest.mark.parametrize(("layer", "depth"), [(-2, 2), (-1, 3), (0, 0), ([0, -2], 2)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_unfrozen_tower_gets_gradients_up_to_the_chosen_layer(layer, depth, strategy):
    model = llava(strategy=strategy, layer=layer).train()
    model.model.vision_tower.config.cpe_drop_prob = 0.0
    expected = seen_by(depth, model)
    if depth == 0 and strategy == "default":
        expected -= {"embeddings.prefix_tokens"}  # dropped before anything has looked at it
    assert moved(model, **question(1, tokens_of(strategy)), pixel_values=torch.randn(2, 3, 32, 32)) == expected


@pytest.mark.parametrize("next_", [False, True])
def test_a_frozen_tower_gets_none_and_the_projector_all(next_):
    model = llava(next_=next_).train()
    model.model.vision_tower.requires_grad_(False)
    pixels = torch.randn(2, 3, 3, 32, 32) if next_ else torch.randn(2, 3, 32, 32)
    extra = {"image_sizes": torch.tensor([[64, 32]] * 2)} if next_ else {}
    ids = question(1, PATCHES + 40 if next_ else PATCHES)
    before = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    assert moved(model, **ids, pixel_values=pixels, **extra) == set()
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad.abs().max() > 0
    optimiser.step()
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_llava_is_saved_and_loaded_with_our_tower(tmp_path):
    model = llava(vision=vision_config(**settings(normalize_pixels=True, image_mean=[0.4, 0.5, 0.6])))
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(again.model.vision_tower) is UnitVisionModel
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        given = again(**question(1, PATCHES), pixel_values=pixels).logits
        torch.testing.assert_close(given, model(**question(1, PATCHES), pixel_values=pixels).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_last_hidden_state_can_be_the_normed_one():
    """`tie_last_hidden_states`: LLaVA's layer -1 then carries the trained final norm."""
    model, pixels = encoder(tie_last_hidden_states=True), torch.randn(2, 3, 32, 32)
    plain = encoder()
    plain.load_state_dict(model.state_dict())
    output = model(pixels, output_hidden_states=True)
    expected = plain(pixels, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], expected.last_hidden_state)
    for one, other in zip(output.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.equal(one, other)
    packed = model(**pack_images([pixels[0], pixels[1, :, :16]], 8), output_hidden_states=True)
    assert torch.equal(packed.hidden_states[-1], packed.last_hidden_state)


# -- the original repositories ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same encoder as an encoder repository and inside a full one; its processor's x1 is 32 x 32."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    model = shaken(unit_model(vision=vision_config(**settings(image_size=64, cpe_max_size=64))))
    save_encoder(model, image_processor(image_mean=[0.4, 0.5, 0.6]), root / "encoder")
    save_full(model, processor(image_mean=[0.4, 0.5, 0.6]), root / "full")
    return SimpleNamespace(encoder=root / "encoder", full=root / "full", model=model.vision_model.eval())


@pytest.fixture(params=FLAVOURS)
def repository(request, monkeypatch):
    """A fake of one of the repositories, before the one line."""
    return install(monkeypatch.setitem, request.param)


def tower(folder, delay_load=False, **changes) -> UnitVisionTower:
    return UnitVisionTower(str(folder), model_arguments(folder, **changes), delay_load=delay_load)


@pytest.mark.parametrize("name", ["encoder", "full"])
@torch.no_grad()
def test_the_tower_gives_the_chosen_layers_patches(folders, name):
    made, pixels = tower(getattr(folders, name)), torch.randn(2, 3, 64, 64)
    states = folders.model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(made(pixels), states[-2][:, 1:], atol=1e-6, rtol=0)
    made = tower(getattr(folders, name), mm_vision_select_layer=0, mm_vision_select_feature="cls_patch")
    torch.testing.assert_close(made(pixels), states[0], atol=1e-6, rtol=0)


def test_the_constructor_is_llavas(folders):
    parameters = inspect.signature(UnitVisionTower.__init__).parameters
    assert list(parameters) == ["self", "vision_tower", "args", "delay_load"]
    assert parameters["delay_load"].default is False
    assert isinstance(tower(folders.encoder), torch.nn.Module)


def test_loading_can_wait_and_happens_once(folders, capsys):
    made = tower(folders.encoder, delay_load=True)
    assert made.is_loaded is False
    assert not list(made.parameters())
    assert made.hidden_size == 32  # known before the weights are
    made.load_model(device_map=None)
    loaded = made.vision_tower
    made.load_model()
    assert made.is_loaded is True
    assert made.vision_tower is loaded
    assert "already loaded" in capsys.readouterr().out


def test_an_unfrozen_tower_does_not_wait(folders):
    made = tower(folders.encoder, delay_load=True, unfreeze_mm_vision_tower=True)
    assert made.is_loaded
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_the_image_processor_is_what_llava_reads(folders):
    made = tower(folders.encoder, delay_load=True).image_processor
    assert isinstance(made, CLIPImageProcessor)
    assert made.size["shortest_edge"] == 64
    assert made.crop_size["height"] == made.crop_size["width"] == 64
    assert list(made.image_mean) == [0.4, 0.5, 0.6]
    pixels = made.preprocess(noise(30, 50), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    grey = made.preprocess(Image.new("RGB", (64, 64), (102, 128, 153)), return_tensors="pt")["pixel_values"]
    assert grey.abs().max() < 0.01  # 0.4, 0.5, 0.6 of 255: the mean itself


def test_numbers_of_patches_and_sizes_agree_with_the_features(folders):
    for feature, more in (("patch", 0), ("cls_patch", 1)):
        made = tower(folders.encoder, mm_vision_select_feature=feature)
        features = made(torch.randn(1, 3, made.image_size, made.image_size))
        assert made.image_size == made.config.image_size == 64
        assert made.config.patch_size == 8
        assert made.num_patches_per_side == made.config.image_size // made.config.patch_size == 8
        assert features.shape == (1, made.num_patches, made.hidden_size) == (1, 64 + more, 32)


@pytest.mark.parametrize(("wanted", "given"), [(None, 64), (32, 32), (128, 128)])
@torch.no_grad()
def test_the_size_is_a_setting(folders, wanted, given):
    made = tower(folders.encoder, mm_vision_image_size=wanted)
    assert made.image_size == given
    pixels = torch.randn(1, 3, given, given)
    expected = folders.model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(made(pixels), expected, atol=1e-6, rtol=0)  # positions are looked up as ever


def test_dtype_device_and_the_dummy_feature(folders):
    made = tower(folders.encoder)
    assert made.dtype == torch.float32
    assert made.device == torch.device("cpu")
    assert made.dummy_feature.shape == (1, 32)
    made = made.to(torch.bfloat16)
    assert made.dtype == made.dummy_feature.dtype == torch.bfloat16


@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_features_come_in_the_images_dtype(folders, weights, images):
    made, pixels = tower(folders.encoder), torch.randn(2, 3, 32, 32)
    expected = made(pixels)
    features = made.to(weights)(pixels.to(images))
    assert features.dtype == images
    assert (features.float() - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_a_list_of_images_gives_a_list(folders):
    made = tower(folders.encoder)
    images = [torch.randn(3, 64, 64), torch.randn(3, 32, 48)]
    features = made(images)
    assert [feature.shape for feature in features] == [(1, 64, 32), (1, 24, 32)]
    for image, feature in zip(images, features, strict=True):
        assert torch.equal(feature, made(image.unsqueeze(0)))


def test_gradients_only_where_the_tower_is_unfrozen(folders):
    pixels = torch.randn(1, 3, 32, 32)
    frozen, trained = tower(folders.encoder), tower(folders.encoder, unfreeze_mm_vision_tower=True)
    assert not frozen(pixels).requires_grad
    trained(pixels).sum().backward()
    without = {name for name, parameter in trained.vision_tower.named_parameters() if parameter.grad is None}
    assert without == {
        name for name, _ in trained.vision_tower.named_parameters() if name.startswith(("blocks.2.", "norm."))
    }
    frozen.vision_tower.requires_grad_(True)  # as LLaVA-NeXT's `mm_tunable_parts` does it
    frozen(pixels).sum().backward()
    assert frozen.vision_tower.embeddings.projection.weight.grad.abs().max() > 0


def test_a_frozen_tower_sees_the_same_in_training(folders):
    """The encoder crops and drops positions at random in training; a tower that does not learn must not."""
    made, pixels = tower(folders.encoder), torch.randn(1, 3, 32, 32)
    expected = made.eval()(pixels)
    made.train()
    assert torch.equal(made(pixels), expected)
    assert tower(folders.encoder, unfreeze_mm_vision_tower=True).train().vision_tower.training


def test_adapters_find_the_names_that_llava_asks_for(folders):
    """PEFT matches module names by their ends; LLaVA lists those of its linear layers outside of the tower."""
    made = tower(folders.encoder)
    names = {name.split(".")[-1] for name, module in made.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == {"projection", "qkv", "proj", "fc1", "fc2"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_vision_select_feature": "slicefour_patch"}, "must be one of patch, cls_patch, got 'slicefour_patch'"),
        ({"mm_vision_select_layer": -5}, "between -4 and 3, got -5"),
        ({"mm_vision_select_layer": 4}, "between -4 and 3, got 4"),
        ({"mm_vision_image_size": 60}, "positive multiple of the patch size 8, got 60"),
        ({"mm_vision_image_size": 0}, "positive multiple of the patch size 8, got 0"),
        ({"s2": True}, "S2 is not for this tower"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(folders, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        tower(folders.encoder, delay_load=True, **changes)
    assert "\n" not in str(error.value)


def test_pickles_are_not_read(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders.encoder / "config.json").read_text())
    torch.save(folders.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        tower(tmp_path)


def test_one_line_makes_either_repository_build_our_tower(folders, repository):
    with pytest.raises(ValueError, match="Unknown vision tower"):
        repository.builder.build_vision_tower(model_arguments(folders.encoder))
    register_llava()
    for module in (repository.builder, repository.arch):  # the one that took the function by name as well
        for folder in (folders.encoder, folders.full):
            made = module.build_vision_tower(model_arguments(folder), delay_load=True)
            assert isinstance(made, UnitVisionTower)
            assert not made.is_loaded
        own = module.build_vision_tower(model_arguments("openai/clip-vit-large-patch14"), delay_load=True)
        assert isinstance(own, OwnTower)
        assert own.delay_load is True
        with pytest.raises(ValueError, match="Unknown vision tower"):
            module.build_vision_tower(model_arguments("somebody/something"))


def test_registering_twice_changes_nothing_more(repository):
    register_llava()
    first = repository.builder.build_vision_tower
    register_llava()
    assert repository.builder.build_vision_tower is repository.arch.build_vision_tower is first


def test_registering_without_the_repository_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "llava", raising=False)
    with pytest.raises(ImportError, match="llava"):
        register_llava("llava_that_is_not_there")


def test_only_our_folders_are_taken_for_ours(folders, tmp_path):
    assert is_unit(str(folders.encoder))
    assert is_unit(str(folders.full))
    assert not is_unit(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    assert not is_unit(str(tmp_path))
    assert not is_unit("somebody/not-in-the-cache")


def test_a_repository_trains_with_our_tower_and_loads_what_it_saved(folders, repository):
    register_llava()
    model = repository.arch.LlavaMetaModel(SimpleNamespace())
    model.initialize_vision_modules(model_arguments(folders.full))
    pixels = process_images([noise(40, 20), noise(9, 33, 1)], model.vision_tower.image_processor)
    model.train()
    assert model.pooled_by_two(pixels).shape == (2, 16, 6)
    model.encode_images(pixels).square().sum().backward()
    assert model.mm_projector.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
    again = repository.arch.LlavaMetaModel(model.config)
    again.vision_tower.load_model()
    assert torch.equal(again.vision_tower(pixels), model.vision_tower(pixels))


# -- beside an older transformers ------------------------------------------------------------------

# What these files may take from transformers: all of it is in 4.37.2
IN_4_37 = {
    "transformers": {"CONFIG_MAPPING", "CLIPImageProcessor", "PretrainedConfig"},
    "transformers.activations": {"ACT2FN"},
    "transformers.modeling_outputs": {"BaseModelOutputWithPooling"},
    "transformers.modeling_utils": {"PreTrainedModel"},
    "transformers.utils": {"ModelOutput", "cached_file"},
    "transformers.utils.hub": {"get_checkpoint_shard_files"},
}
TOWER_FILES = ("compat_unit", "configuration_unit", "encoder_unit", "hub_unit", "llava_unit")
TOWER_FILES += ("architectures_unit", "attention_unit", "features_unit", "packing_unit", "released_unit")


@pytest.mark.parametrize("name", TOWER_FILES)
def test_the_towers_files_import_only_what_transformers_4_37_has(name):
    tree = ast.parse((ROOT / "modeling_unit" / f"{name}.py").read_text(encoding="utf-8"))
    newer = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "not OLD_TRANSFORMERS"
        for body in branch.body
        for node in ast.walk(body)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(
                one.name.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names} for one in node.names
            )
        if not isinstance(node, ast.ImportFrom) or id(node) in newer:
            continue
        if node.level:
            assert node.module in TOWER_FILES, f"{name} needs {node.module}, which older transformers cannot load"
        elif node.module.split(".")[0] == "transformers":
            names = {one.name for one in node.names}
            assert names <= IN_4_37.get(node.module, set()), f"{name}: {names} of {node.module}"


def siblings(name: str) -> set[str]:
    """Files beside it that a file of ours imports, at the top or inside."""
    tree = ast.parse((ROOT / "modeling_unit" / f"{name}.py").read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}


def test_the_encoder_names_every_file_it_needs_itself():
    """With `trust_remote_code`, transformers 4 copies what the file of the model imports, and goes no deeper."""
    named = siblings("encoder_unit")
    needed = set().union(*(siblings(name) for name in named))
    assert needed - named - {"encoder_unit"} == set()


@pytest.fixture
def stand_ins(monkeypatch):
    """`compat_unit` as it is beside transformers 4.37."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.37.2")
    spec = importlib.util.spec_from_file_location("old_compat", ROOT / "modeling_unit" / "compat_unit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.OLD_TRANSFORMERS
    return module


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_the_stand_ins_for_older_versions_compute_the_same(stand_ins, monkeypatch, implementation):
    model = encoder(num_cls_tokens=2)
    model.set_attn_implementation(implementation)
    pixels, shapes = torch.randn(2, 3, 32, 32), torch.tensor([[4, 4], [2, 3]])
    expected = model(pixels, spatial_shapes=shapes).last_hidden_state
    for name in ("ALL_ATTENTION_FUNCTIONS", "create_bidirectional_mask"):
        monkeypatch.setattr(encoder_unit, name, getattr(stand_ins, name))
    torch.testing.assert_close(model(pixels, spatial_shapes=shapes).last_hidden_state, expected, atol=1e-6, rtol=0)


def test_the_stand_in_for_checkpointing_recomputes(stand_ins):
    class Layer(stand_ins.GradientCheckpointingLayer):
        runs = 0

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, x, scale=1.0):
            self.runs += 1
            return self.linear(x) * scale

    layer, x = Layer().train(), torch.ones(1, 2)
    layer(x, scale=2.0).sum().backward()
    assert layer.runs == 1
    expected = layer.linear.weight.grad.clone()
    layer.zero_grad()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)
    layer(x, scale=2.0).sum().backward()
    assert layer.runs == 3  # forward, and again in the backward pass
    torch.testing.assert_close(layer.linear.weight.grad, expected)


# -- as a class that others know -------------------------------------------------------------------

EXPORTS = [{}, {"image_size": 64, "cpe_max_size": 64}, {"image_size": 16, "cpe_max_size": 64}]
EXPORTS += [{"normalize_pixels": True, "image_mean": [0.4, 0.5, 0.6]}, {"qkv_bias": False}]


def exported(model, folder, architecture, **changes):
    export_tower(model, folder, architecture, 32, **changes)
    return AutoModel.from_pretrained(folder, dtype=changes.get("dtype", torch.float32)).eval()


@pytest.mark.parametrize("changes", EXPORTS, ids=str)
@torch.no_grad()
def test_as_vit_every_output_is_the_encoders(tmp_path, changes):
    model, pixels = encoder(**changes), torch.rand(2, 3, 32, 32)
    made = exported(model, tmp_path / "vit", "vit")
    assert type(made) is ViTModel
    given, wanted = (one(pixels, output_hidden_states=True) for one in (made, model))
    for one, other in zip(given.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(given.last_hidden_state, wanted.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(given.pooler_output, wanted.pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", EXPORTS, ids=str)
@torch.no_grad()
def test_as_clip_the_tokens_are_the_encoders_less_their_mean(tmp_path, changes):
    model, pixels = encoder(**changes), torch.rand(2, 3, 32, 32)
    made = exported(model, tmp_path / "clip", "clip")
    assert type(made) is CLIPVisionModel
    given, wanted = (one(pixels, output_hidden_states=True) for one in (made, model))
    for one, other in zip(given.hidden_states, wanted.hidden_states, strict=True):
        centred = other - other.mean(dim=-1, keepdim=True)
        difference = (one[..., :32] - centred).abs().max() / centred.abs().max()
        assert difference < 1e-4, difference
        assert (one[..., 32:] == 0).all()
        assert one.shape[-1] == made.config.hidden_size == 48
    torch.testing.assert_close(given.pooler_output[:, :32], wanted.pooler_output, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_as_clip_half_precision_is_as_close_as_the_encoders_own(tmp_path, dtype):
    model, pixels = encoder(), torch.rand(2, 3, 32, 32)
    wanted = model(pixels, output_hidden_states=True).hidden_states[-2]
    own = model.to(dtype)(pixels, output_hidden_states=True).hidden_states[-2].float()
    made = exported(model, tmp_path / "clip", "clip", dtype=dtype)
    given = made(pixels.to(dtype), output_hidden_states=True).hidden_states[-2].float()[..., :32]
    error = (given - (wanted - wanted.mean(dim=-1, keepdim=True))).abs().max()
    assert error < 4 * (own - wanted).abs().max()


@torch.no_grad()
def test_no_clip_of_the_same_width_could_be_equal():
    """CLIP's first LayerNorm bounds what enters its blocks; the encoder's tokens grow with the pixels."""
    model, pixels = encoder(), torch.rand(1, 3, 32, 32)
    sizes = [model(pixels * scale, output_hidden_states=True).hidden_states[0][:, 1:].norm() for scale in (1, 1000)]
    assert sizes[1] > 100 * sizes[0]


@torch.no_grad()
def test_the_clip_folder_needs_no_line_in_the_original_repositories(folders, tmp_path):
    """What their own CLIP tower does with a folder."""
    export_tower(folders.full, tmp_path / "clip", "clip", 32)
    # transformers 4 finds weights only under these names; 5 reads them too, but writes others
    assert all(name.startswith("vision_model.") for name in load_file(tmp_path / "clip" / "model.safetensors"))
    made, report = CLIPVisionModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    images = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    assert images.crop_size["height"] == images.size["shortest_edge"] == 32
    assert list(images.image_mean) == [0.4, 0.5, 0.6]
    pixels = process_images([noise(40, 20)], images)
    features = made.eval()(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = tower(folders.full, mm_vision_image_size=32)(pixels)
    centred = ours - ours.mean(dim=-1, keepdim=True)
    assert (features[..., :32] - centred).abs().max() < 1e-4 * centred.abs().max()
    assert features.shape[1] == (made.config.image_size // made.config.patch_size) ** 2


@torch.no_grad()
def test_a_clip_encoder_is_written_as_older_versions_read_it(tmp_path):
    clip = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip |= {"intermediate_size": 48, "patch_size": 8, "image_size": 32}
    model = shaken(unit_model(vision=clip))
    save_encoder(model, image_processor(), tmp_path / "five")
    save_full(model, processor(), tmp_path / "full")
    pixels = torch.randn(1, 3, 32, 32)
    wanted = model.vision_model(pixels).last_hidden_state
    for architecture in ("unit", "vit"):
        with pytest.raises(ValueError, match=r"CLIPVisionModel, which is written as `clip`|no encoder of UNIT's"):
            export_tower(tmp_path / "full", tmp_path / architecture, architecture)
        assert not (tmp_path / architecture).exists()
    # not a UNIT encoder of random weights
    with pytest.raises(ValueError, match=r"The encoder is a 'clip_vision_model'.* save_encoder"):
        tower(tmp_path / "full")
    with pytest.raises(ValueError, match="The encoder is a 'clip_vision_model'"):
        UnitVisionModel.from_pretrained(tmp_path / "five")
    for source in ("five", "full"):
        export_tower(tmp_path / source, tmp_path / f"{source}-four", "clip")
        made, report = CLIPVisionModel.from_pretrained(tmp_path / f"{source}-four", output_loading_info=True)
        assert not report["missing_keys"]
        assert torch.equal(made.eval()(pixels).last_hidden_state, wanted)


@torch.no_grad()
def test_at_one_size_nothing_changes_but_the_table():
    model, pixels = encoder(image_size=16, cpe_max_size=64), torch.randn(2, 3, 48, 48)
    cut = at_one_size(model, 48)
    assert cut.config.image_size == cut.config.cpe_max_size == 48
    assert cut.embeddings.position_embedding.shape == (1, 36, 32)
    assert torch.equal(cut(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert torch.equal(cut.train()(pixels).last_hidden_state, cut.eval()(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "architecture", "size", "words"),
    [
        ({"num_cls_tokens": 3}, "vit", 32, "3 class and register tokens, ViTModel has one, and LLaVA's selection"),
        ({"num_cls_tokens": 3}, "clip", 32, "3 class and register tokens, CLIPVisionModel has one"),
        ({"register_multiple": 4}, "clip", 32, "4 class and register tokens"),
        ({"use_final_norm": False}, "vit", 32, "final LayerNorm"),
        ({"tie_last_hidden_states": True}, "clip", 32, "tie_last_hidden_states"),
        ({}, "clip", 30, "multiple of the patch size 8, got 30"),
        ({}, "siglip", 32, "written as unit, vit, clip; got 'siglip'"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path, changes, architecture, size, words):
    with pytest.raises(ValueError, match=words):
        export_tower(encoder(**changes), tmp_path / "out", architecture, size)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_tower(encoder(), tmp_path, "unit", 32)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_the_size_of_a_tower():
    config = vision_config(image_size=1000)
    assert tower_size(config, {}) == 1000
    assert tower_size(config, {"base_size": 30}) == 56  # twice, in whole patches
    assert tower_size(config, {"base_size": 30}, 24) == 24


# -- the page ---------------------------------------------------------------------------------------


def test_the_contract_table_names_tests_that_exist():
    page = (ROOT / "docs" / "llava.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    existing = {
        name
        for file in ("test_llava.py", "test_llava_assembly.py")
        for name in re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M)
    }
    assert named
    assert named - existing == set()
    public = {name for name, value in vars(UnitVisionTower).items() if isinstance(value, property)}
    assert {name for name in public if f"`{name}`" not in page} == set()
    assert modeling_unit.UnitVisionTower is UnitVisionTower
