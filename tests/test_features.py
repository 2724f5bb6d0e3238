"""Features of chosen layers, attention maps, sizes, principal components as colours; `unit features` with them."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_encoder import encoder, pixels
from tiny import image_processor, noise, unit_config, unit_model, vision_config
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
)

import modeling_unit
from modeling_unit import UnitModel, layer_features, nearest_supported_size, principal_colours
from unit_cli.__main__ import main, parser

# -- layers ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_layer_is_the_hidden_state_of_its_number():
    model, batch = encoder(num_cls_tokens=3, register_multiple=4), pixels(2, 3, 16, 24)
    output = model(batch, output_hidden_states=True)
    found = model.layer_features(batch, layers=[1, 0, -1])
    assert [one.layer for one in found] == [1, 0, 2]
    expected = [output.hidden_states[1], output.hidden_states[0], output.last_hidden_state]
    for one, tokens in zip(found, expected, strict=True):
        torch.testing.assert_close(one.tokens, tokens, atol=0, rtol=0)
        torch.testing.assert_close(one.class_token, tokens[:, 0], atol=0, rtol=0)
        torch.testing.assert_close(one.mean, tokens[:, 1:].mean(dim=1), atol=1e-6, rtol=0)
        assert one.spatial.shape == (2, 32, 2, 3)
        for row in range(2):
            for col in range(3):
                torch.testing.assert_close(one.spatial[:, :, row, col], tokens[:, 1 + 3 * row + col], atol=0, rtol=0)
        assert one.attention is None


@torch.no_grad()
def test_the_final_norm_goes_where_it_is_asked_for():
    model, batch = encoder(), pixels(1, 3, 16, 24)
    states = model(batch, output_hidden_states=True).hidden_states
    for one in model.layer_features(batch, layers=[1, 2], final_norm=False):
        torch.testing.assert_close(one.tokens, states[one.layer], atol=0, rtol=0)
    for one in model.layer_features(batch, layers=[1, 2], final_norm=True):
        torch.testing.assert_close(one.tokens, model.norm(states[one.layer]), atol=1e-6, rtol=0)


@torch.no_grad()
def test_layers_of_a_padded_batch_equal_those_of_each_image_alone():
    model, batch = encoder(), torch.full((2, 3, 16, 24), 5.0)
    batch[0], batch[1, :, :8, :16] = pixels(3, 16, 24), pixels(3, 8, 16, seed=1)
    together = model.layer_features(batch, [1, -1], spatial_shapes=torch.tensor([[2, 3], [1, 2]]), attention=True)
    alone = model.layer_features(batch[1:, :, :8, :16], [1, -1], attention=True)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.mean[1], other.mean[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(one.spatial[1, :, :1, :2], other.spatial[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(one.attention[1, :, :1, :2], other.attention[0], atol=1e-5, rtol=0)
        assert (one.spatial[1, :, 1:] == 0).all()
        assert (one.attention[1, :, :, 2:] == 0).all()


@torch.no_grad()
def test_attention_maps_are_the_class_tokens_row_of_the_matrix():
    model, batch = encoder(num_cls_tokens=3, register_multiple=4), pixels(2, 3, 16, 24)
    model.set_attn_implementation("sdpa")
    matrices = model(batch, output_attentions=True).attentions  # (B, heads, 4 + 6, 4 + 6)
    first, second, start = model.layer_features(batch, [1, 2, 0], attention=True)
    torch.testing.assert_close(first.attention.flatten(2), matrices[0][:, :, 0, 4:], atol=1e-6, rtol=0)
    torch.testing.assert_close(second.attention.flatten(2), matrices[1][:, :, 0, 4:], atol=1e-6, rtol=0)
    assert start.attention is None  # nothing has attended yet
    assert model.config._attn_implementation == "sdpa"


def test_nothing_is_left_behind_when_the_forward_fails():
    model = encoder()
    with pytest.raises(ValueError, match="multiples of the patch size"):
        model.layer_features(torch.zeros(1, 3, 17, 16), attention=True)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layers", [[3], [-4], [0, 7], []], ids=str)
def test_layers_that_there_are_not_are_refused(layers):
    with pytest.raises(ValueError, match="the 3 from 0, the input of the first block, to 2"):
        encoder().layer_features(pixels(1, 3, 16, 16), layers)


@torch.no_grad()
def test_a_full_model_gives_its_encoders_layers():
    model, batch = UnitModel(unit_config()).eval(), pixels(1, 3, 16, 24)
    (one,) = model.layer_features(batch, [1])
    (other,) = model.vision_model.layer_features(batch, [1])
    torch.testing.assert_close(one.tokens, other.tokens, atol=0, rtol=0)


def clip(**changes) -> CLIPVisionModel:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return CLIPVisionModel._from_config(CLIPVisionConfig(**settings, patch_size=8, image_size=32), **changes).eval()


@torch.no_grad()
def test_layers_of_an_encoder_of_transformers():
    model, batch = clip(attn_implementation="eager"), pixels(2, 3, 16, 24)  # not its nominal size
    expected = model(batch, output_hidden_states=True, output_attentions=True, interpolate_pos_encoding=True)
    first, last = layer_features(model, batch, [1, -1], attention=True)
    torch.testing.assert_close(first.tokens, expected.hidden_states[1], atol=0, rtol=0)
    torch.testing.assert_close(last.tokens, expected.last_hidden_state, atol=0, rtol=0)
    torch.testing.assert_close(first.attention.flatten(2), expected.attentions[0][:, :, 0, 1:], atol=0, rtol=0)


@torch.no_grad()
def test_attention_maps_of_an_encoder_of_transformers_whatever_its_attention():
    model, batch = clip(attn_implementation="sdpa"), pixels(1, 3, 32, 32)
    (one,) = layer_features(model, batch, [2], attention=True)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    expected = model(batch, output_attentions=True).attentions[1][:, :, 0, 1:]
    torch.testing.assert_close(one.attention.flatten(2), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_of_an_encoder_of_transformers_is_left_out():
    model, small = clip(), pixels(1, 3, 16, 24)
    batch = F.pad(small, (0, 8, 0, 16))
    (one,) = layer_features(model, batch, [1], spatial_shapes=torch.tensor([[2, 3]]))
    (alone,) = layer_features(model, small, [1])
    torch.testing.assert_close(one.mean, alone.mean)
    torch.testing.assert_close(one.spatial[:, :, :2, :3], alone.spatial)
    assert not one.spatial[:, :, 2:].any()
    assert not one.spatial[:, :, :, 3:].any()


@torch.no_grad()
def test_an_encoder_without_a_class_token():
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = Siglip2VisionModel(Siglip2VisionConfig(**settings, patch_size=8, num_patches=16)).eval()
    (one,) = layer_features(model, pixels(1, 3, 16, 24), [1])
    assert one.class_token is None
    assert one.spatial.shape == (1, 32, 2, 3)
    with pytest.raises(ValueError, match="no class token"):
        layer_features(model, pixels(1, 3, 16, 24), attention=True)
    with pytest.raises(ValueError, match="is of UNIT's own encoder"):
        layer_features(model, pixels(1, 3, 16, 24), final_norm=True)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((16, 24), (16, 24)),
        ((19, 21), (16, 24)),  # 2.4 and 2.6 patches of 8
        ((20, 12), (24, 16)),  # halves go up: 2.5 and 1.5
        ((1, 3), (8, 8)),  # one patch at least
        ((64, 64), (64, 64)),  # all that the table covers
        ((65, 64), (64, 64)),
        ((640, 320), (64, 32)),  # beyond it: shrunk, the aspect kept
        ((6400, 3), (64, 8)),
        ((33.2, 60.9), (32, 64)),
    ],
    ids=str,
)
def test_the_nearest_supported_size(given, expected):
    config = vision_config()  # a table of 8 x 8 patches
    assert config.nearest_supported_size(*given) == expected
    assert nearest_supported_size(unit_config(), *given) == expected
    assert encoder().nearest_supported_size(*given) == expected


@torch.no_grad()
def test_the_nearest_supported_size_is_taken_by_the_encoder():
    model = encoder()
    for height, width in ((7, 100), (33, 47), (1000, 999)):
        rows, cols = (side // 8 for side in model.nearest_supported_size(height, width))
        assert model(torch.zeros(1, 3, 8 * rows, 8 * cols)).last_hidden_state.shape[1] == 1 + rows * cols


def test_encoders_of_transformers_have_no_largest_size():
    assert nearest_supported_size(clip().config, 6400, 3) == (6400, 8)


@pytest.mark.parametrize("size", [(0, 8), (8, -1), (8, None), (float("nan"), 8), (8, float("inf")), ("8", 8)], ids=str)
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match=r"(height|width) must be a positive number"):
        vision_config().nearest_supported_size(*size)


def test_the_package_exports_them():
    for name in ("layer_features", "nearest_supported_size", "principal_colours", "UnitLayerFeatures"):
        assert name in modeling_unit.__all__


# -- principal components --------------------------------------------------------------------------


def test_principal_colours_are_the_components_of_all_grids_together():
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    scores = generator.uniform(-1, 1, size=(30, 20, 6)) * [9, 5, 3, 0.1, 0.1, 0.1]
    whole = torch.tensor(scores @ basis.T)
    parts = [whole[:15], whole[15:]]  # as many patches each, so the joint components are those of the whole
    colours = torch.cat(principal_colours(parts)).double()
    assert colours.shape == (30, 20, 3)
    for component in range(3):
        correlation = np.corrcoef(colours[..., component].flatten(), scores[..., component].flatten())[0, 1]
        assert abs(correlation) > 0.98  # the sign is free, and 4% of the values are cut off
    again = torch.cat(principal_colours([one.clone() for one in parts]))
    assert torch.equal(again, colours.to(torch.uint8))


def test_the_same_features_get_the_same_colour_at_every_size():
    values = torch.randn(3, 4, 8)
    small, large = principal_colours([values, values.repeat_interleave(5, 0).repeat_interleave(5, 1)])
    assert torch.equal(small.repeat_interleave(5, 0).repeat_interleave(5, 1), large)


def test_features_that_do_not_vary_are_grey():
    (colours,) = principal_colours([torch.ones(2, 3, 4)])
    assert (colours == 128).all()


# -- on the command line ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = encoder()
    model.save_pretrained("model")
    image_processor().save_pretrained("model")
    noise(48, 32).save("picture.png")
    return tmp_path


def test_layers_and_parts_are_written(folder, capsys):
    layers = ["--layers", "1", "-1", "--parts", "class", "mean", "spatial", "attention"]
    assert main(["features", "picture.png", "--out", "f.safetensors", "--model", "model", *layers]) == 0
    assert capsys.readouterr().out == "f.safetensors: features of 1 picture\n"
    found = load_file("f.safetensors")
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    expected = {"class": (32,), "mean": (32,), "spatial": (3, 5, 32), "attention": (2, 3, 5)}
    assert shapes == {
        f"picture.png/layer{layer}/{part}": shape for layer in (1, 2) for part, shape in expected.items()
    }
    mean = found["picture.png/layer2/spatial"].mean(dim=(0, 1))
    torch.testing.assert_close(found["picture.png/layer2/mean"], mean, atol=1e-5, rtol=0)


def test_without_parts_an_encoder_without_a_class_token_gives_what_it_has(folder):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    vision = SiglipVisionConfig(**shape, image_size=32, patch_size=8)
    unit_model(vision).save_pretrained("siglip")
    image_processor().save_pretrained("siglip")
    given = ["features", "picture.png", "--out", "f.safetensors", "--model", "siglip", "--layers", "-1"]
    assert main(given) == 0
    assert list(load_file("f.safetensors")) == ["picture.png/layer1/spatial"]
    assert main([*given, "--parts", "class"]) == 2


def test_a_sheet_of_principal_components_is_drawn(folder, capsys):
    sizes = ["--sizes", "16", "32"]
    assert main(["features", "picture.png", "--pca", "sheet.png", "--model", "model", *sizes]) == 0
    assert capsys.readouterr().out == "sheet.png: 1 picture at 2 sizes\n"
    sheet = np.asarray(Image.open("sheet.png").convert("RGB"))
    # 32 x 48 pixels of a picture with the area of 32²: 26 x 39, 3 x 5 patches of 8; all cells are 300 pixels wide
    cell = sheet[40 : 40 + 200, 16 + 2 * 316 : 16 + 2 * 316 + 300]
    assert len(np.unique(cell.reshape(-1, 3), axis=0)) == 15
    assert len(np.unique(cell[:60].reshape(-1, 3), axis=0)) == 5  # the first row of patches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to write: give --out FILE.safetensors, --pca FILE.png or both"),
        (["--pca", "sheet.jpg"], "--pca sheet.jpg: the name must end in .png"),
        (["--pca", "gone/sheet.png"], "--pca gone/sheet.png: there is no folder"),
        (["--out", "f.safetensors", "--parts", "mean"], "--parts are written for chosen layers"),
        (["--out", "f.safetensors", "--layers", "3"], "layers must name some of the 3 from 0"),
        (["--out", "f.safetensors", "--layers", "0", "--parts", "attention"], "layer 0 of this encoder has none"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(folder, capsys, arguments, message):
    assert main(["features", "picture.png", "--model", "model", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unit ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == ["model", "picture.png"]


def test_the_pictures_of_the_documentation_are_made_by_the_commands_beside_them():
    root = Path(__file__).resolve().parents[1]
    text = (root / "docs" / "features.md").read_text(encoding="utf-8")
    commands = re.findall(r"^unit (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    parsed = [parser().parse_args(shlex.split(command, comments=True)) for command in commands]
    drawn = [arguments for arguments in parsed if arguments.pca]
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert [arguments.pca for arguments in drawn] == [f"docs/{name}" for name in shown]
    assert all((root / "docs" / name).is_file() for name in shown)
    assert all((root / path).is_file() for arguments in drawn for path in arguments.paths)
    assert all(len(arguments.sizes) == 3 for arguments in drawn)
