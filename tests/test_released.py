"""Released checkpoints: parity with an independent forward pass, and conversion both ways without a loss."""

import dataclasses
import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import reference_released as reference
import torch
from safetensors.torch import load_file, save_file
from tiny import noise, vision_config
from transformers import AutoImageProcessor, AutoModel

from configuration_unit import preset
from modeling_unit import UnitForPreTraining, UnitVisionConfig, UnitVisionModel
from modeling_unit.released_unit import (
    NAMES,
    PREFIX,
    CheckpointError,
    TensorEntry,
    config_from_released,
    is_released,
    read_config,
    read_released,
    tensor_names,
)
from unit_cli import convert as command
from unit_cli.__main__ import main
from unit_cli.convert import convert

# Nominal 16 pixels or 24, a table of 6 x 6 patches of 4 that covers 24: M differs from the nominal size, or equals it
DIFFERENT, EQUAL = "vit_tiny_patch4_16", "vit_tiny_patch4_24"
# in pixels: the table's size, smaller, not square, larger, one side larger and one smaller, one patch
IMAGES = [(24, 24), (16, 16), (8, 20), (28, 40), (12, 44), (44, 12), (4, 4)]


def arguments(model=DIFFERENT, gp="token", registers=0, classes=1, **more) -> dict:
    args = {"model": model, "cpe_max_size": 24, "gp": gp, "register_multiple": registers}
    args |= {"cls_token_per_teacher": classes > 1, "teachers": [{"name": f"teacher{i}"} for i in range(classes)]}
    # what means nothing to us; keys that configurations of transformers treat in ways of their own among them
    args |= {"lr": 1e-3, "dist_bn": None, "opt_betas": [0.9, 0.95], "dtype": "bfloat16", "amp": {"_commit_hash": "x"}}
    return args | {"input_size": [3, 16, 16], "name": "größer", "num_classes": 0} | more


def write(folder: Path, args: dict, state: dict, shards: int = 1, **config) -> Path:
    """A folder as the authors publish it."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"version": "1.0", "args": args, "torch_dtype": "float32", "_name_or_path": "somewhere"} | config
    (folder / "config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    names, index = sorted(state), {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: state[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        said = {"metadata": {"total_size": 0}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(said))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


@cache
def random_state(model: str, gp: str, registers: int, classes: int) -> dict:
    return reference.make(arguments(model, gp, registers), classes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint with all there is: three class tokens, registers."""
    args = arguments(registers=8, classes=3)
    return write(tmp_path_factory.mktemp("checkpoint") / "released", args, random_state(DIFFERENT, "token", 8, 3))


@pytest.fixture
def released(checkpoint, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "released"))


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def clip_normalised(values: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    return (values - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


# -- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [DIFFERENT, EQUAL], ids=["M differs", "M nominal"])
@pytest.mark.parametrize("gp", ["token", "avg"])
@pytest.mark.parametrize("registers", [0, 8], ids=["no registers", "registers"])
@pytest.mark.parametrize("classes", [1, 3])
@torch.no_grad()
def test_outputs_equal_the_reference_at_every_size(tmp_path, model, gp, registers, classes):
    args, state = arguments(model, gp, registers, classes), random_state(model, gp, registers, classes)
    loaded = UnitVisionModel.from_pretrained(write(tmp_path / "released", args, state))
    assert loaded.config.num_prefix_tokens == {(1, 0): 1, (3, 0): 3, (1, 8): 8, (3, 8): 8}[classes, registers]
    for height, width in IMAGES:
        image = pixels(1, 3, height, width)
        image = torch.cat([image, clip_normalised(image)])  # the second is normalised twice
        expected = reference.forward(state, args, image)
        output = loaded(image)
        torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.pooler_output, expected[:, 0], atol=1e-5, rtol=0)
        assert float((expected[0] - expected[1]).abs().max()) > 0.1  # twice is not once
        assert float(expected.std()) > 0.5  # of order one: a difference would show


@torch.no_grad()
def test_outputs_equal_the_reference_with_the_table_of_the_released_sizes(tmp_path):
    """146 x 146 positions, patches of 14: what a resize loses to rounding must be lost in the same way."""
    args = arguments("vit_tiny_patch14_224", cpe_max_size=2048)
    state = reference.make(args, 1)
    loaded = UnitVisionModel.from_pretrained(write(tmp_path / "released", args, state))
    assert loaded.config.position_side == 146
    for height, width in ((224, 224), (112, 168)):
        image = pixels(1, 3, height, width)
        expected = reference.forward(state, args, image)
        torch.testing.assert_close(loaded(image).last_hidden_state, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_part_of_the_format_changes_the_output(tmp_path):
    """The parity above means something: the reference depends on each tensor and argument that it should."""
    args, state, image = arguments(gp="token"), random_state(DIFFERENT, "token", 0, 3), pixels(1, 3, 16, 20)
    expected = reference.forward(state, args, image)
    for name in state:
        if "blocks" in name and ".7." not in name:
            continue
        bent = state | {name: state[name] + 0.1 * torch.randn(state[name].shape)}
        difference = (reference.forward(bent, args, image) - expected).abs().max()
        # softmax does not see what a bias adds to every key; the query's and value's share of it shows
        assert float(difference) > 1e-3, name
    assert not torch.allclose(reference.forward(state, args | {"model": EQUAL}, image), expected, atol=1e-2)


@torch.no_grad()
def test_the_norm_called_fc_norm_is_kept_and_not_applied(tmp_path):
    args, state = arguments(gp="avg"), random_state(DIFFERENT, "avg", 0, 1)
    loaded = UnitVisionModel.from_pretrained(write(tmp_path / "one", args, state))
    bent = {name: tensor + 1 if "fc_norm" in name else tensor for name, tensor in state.items()}
    other = UnitVisionModel.from_pretrained(write(tmp_path / "other", args, bent))
    image = pixels(1, 3, 16, 20)
    torch.testing.assert_close(loaded(image).last_hidden_state, other(image).last_hidden_state, atol=0, rtol=0)
    assert torch.equal(other.fc_norm.weight, bent["unit_model.model.fc_norm.weight"])
    assert not [name for name, _ in other.named_parameters() if "fc_norm" in name]  # nothing trains it


# -- in training -----------------------------------------------------------------------------------


def draws(count: int) -> torch.Tensor:
    """The random numbers that an encoder in training takes next, `(B, 5)`: scale, aspect, top, left, drop."""
    parts = [torch.rand(count, 1), torch.rand(count, 1), torch.rand(count, 2), torch.rand(count, 1, 1).flatten(1)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_in_training_the_same_draws_give_the_same_positions_and_outputs(tmp_path):
    args, state = arguments(registers=8, classes=3), random_state(DIFFERENT, "token", 8, 3)
    loaded = UnitVisionModel.from_pretrained(write(tmp_path / "released", args, state)).train()
    table = state[PREFIX + "model.patch_generator.pos_embed"]
    for rows, cols in ((4, 4), (3, 7), (8, 2), (1, 1)):
        torch.manual_seed(4)
        taken = draws(12)
        assert 0 < int((taken[:, 4] < 0.1).sum()) < 12  # some are dropped, some not
        image = pixels(12, 3, 4 * rows, 4 * cols)
        torch.manual_seed(4)
        tokens = loaded.embeddings(image, None)[:, 8:]
        fed = clip_normalised(image)
        plain = loaded.embeddings.patchify(fed) @ state[PREFIX + "model.patch_generator.embedder.weight"].T
        expected = reference.training_positions(table, rows, cols, taken)
        torch.testing.assert_close(tokens - plain, expected, atol=1e-5, rtol=0)
        torch.manual_seed(4)
        output = loaded(image).last_hidden_state
        torch.testing.assert_close(output, reference.forward(state, args, image, taken), atol=1e-5, rtol=0)


@torch.no_grad()
def test_training_crops_and_drops_have_the_stated_statistics(tmp_path):
    """Measured from outside: the table's entries are their own row and column, so a token tells where it was taken."""
    args, state = arguments(), dict(random_state(DIFFERENT, "token", 0, 1))
    line = torch.linspace(0, 1, 6)
    table = torch.zeros(6, 6, 192)
    table[..., 0], table[..., 1], table[..., 2] = line[:, None], line[None, :], 1.0
    state[PREFIX + "model.patch_generator.pos_embed"] = table.reshape(1, 36, 192)
    state[PREFIX + "model.patch_generator.embedder.weight"] = torch.zeros(192, 48)
    embeddings = UnitVisionModel.from_pretrained(write(tmp_path / "released", args, state)).train().embeddings
    count = 6000
    grid = embeddings(torch.zeros(count, 3, 12, 20), None)[:, 1:].reshape(count, 3, 5, 192)
    kept = grid[:, 0, 0, 2] > 0.5
    assert abs(float(kept.float().mean()) - 0.9) < 0.015  # four standard deviations
    assert float(grid[~kept].abs().max()) == 0.0
    grid = grid[kept]
    height, width = grid[:, 2, 0, 0] - grid[:, 0, 0, 0], grid[:, 0, 4, 1] - grid[:, 0, 0, 1]
    whole = (height < 0.999) & (width < 0.999)  # no side cut short at the table's end
    area, aspect = height * width, width / height
    assert 0.0999 < float(area.min()) < 0.104  # scale from the root of a tenth
    assert float(area.max()) > 0.9
    assert 0.7499 < float(aspect[whole].min()) < 0.76
    assert 1.32 < float(aspect[whole].max()) < 1.3334


# -- conversion ------------------------------------------------------------------------------------

MIXED = {"norm": torch.float32, "blocks": torch.bfloat16, "patch_generator": torch.float16}


def cast(state: dict, dtypes: dict) -> dict:
    chosen = {name: next((dtypes[part] for part in dtypes if part in name), torch.float32) for name in state}
    return {name: tensor.to(chosen[name]) for name, tensor in state.items()}


@pytest.mark.parametrize("gp", ["token", "avg"])
@pytest.mark.parametrize(
    ("dtypes", "shards"),
    [
        ({}, 1),
        ({"": torch.bfloat16}, 3),
        ({"input_conditioner": torch.bfloat16} | MIXED, 1),
        ({"input_conditioner": torch.float64} | MIXED, 2),
        ({"input_conditioner": torch.float16} | MIXED, 1),
    ],
    ids=["float32", "bfloat16 in 3 files", "mixed", "mixed in 2 files, float64", "mixed, float16"],
)
def test_there_and_back_is_bitwise_the_same(tmp_path, dtypes, shards, gp):
    args, state = arguments(gp=gp, registers=8, classes=3), cast(random_state(DIFFERENT, gp, 8, 3), dtypes)
    source = write(tmp_path / "released", args, state, shards)
    there = convert(source, tmp_path / "ours")
    back = convert(tmp_path / "ours", tmp_path / "back")
    same_bits(tensors(tmp_path / "back"), state)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (there.tensors, back.tensors) == (len(state) - 2, len(state))
    assert (there.files, back.files) == (shards, shards)
    ours = tensors(tmp_path / "ours")
    named = tensor_names(UnitVisionConfig.from_pretrained(tmp_path / "ours"))
    same_bits(ours, {ours_name: state[theirs] for theirs, (ours_name, _) in named.items()})
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {path.name for path in source.iterdir()}


def test_single_files_come_back_byte_for_byte(released, tmp_path):
    convert(released, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (released / name).read_bytes()


@torch.no_grad()
def test_a_converted_folder_loads_like_the_released_one(released, tmp_path):
    convert(released, tmp_path / "ours")
    ours, report = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(ours) is UnitVisionModel
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    directly = UnitVisionModel.from_pretrained(released)
    image = pixels(2, 3, 12, 32)
    torch.testing.assert_close(ours(image).last_hidden_state, directly(image).last_hidden_state, atol=0, rtol=0)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert written["auto_map"]["AutoModel"] == "encoder_unit.UnitVisionModel"
    assert (tmp_path / "ours" / "encoder_unit.py").is_file()  # loads with trust_remote_code where we are not installed


def test_a_loaded_checkpoint_is_saved_as_ours_and_still_finds_its_way_back(released, tmp_path):
    state = tensors(released)
    UnitVisionModel.from_pretrained(released).save_pretrained(tmp_path / "saved")
    assert "embeddings.projection.weight" in tensors(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back")
    same_bits(tensors(tmp_path / "back"), state)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (released / "config.json").read_text()
    )


def test_shards_are_made_to_the_size_asked_for(released, tmp_path, monkeypatch):
    report = convert(released, tmp_path / "ours", max_shard_size=2_000_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) == report.files > 5
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 2_000_000 for file in files)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "ours").values())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    UnitVisionModel.from_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", max_shard_size=10**12)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (released / "model.safetensors").read_bytes()


OURS = [
    {},
    {"num_cls_tokens": 3, "register_multiple": 4, "pooling": "mean", "cpe_crop": False},
    {"use_final_norm": False, "keep_fc_norm": True, "cpe_drop_prob": 0.5, "patch_embed_float32": False},
    {"normalize_pixels": True, "image_mean": [0.5, 0.4, 0.1], "image_std": [0.25, 0.5, 0.3]},
]


@pytest.mark.parametrize("settings", OURS, ids=str)
@torch.no_grad()
def test_an_encoder_of_ours_goes_out_and_comes_home(tmp_path, settings):
    shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    model = UnitVisionModel(vision_config(**shape, image_size=32, **settings)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "released")
    convert(tmp_path / "released", tmp_path / "home")
    same_bits(tensors(tmp_path / "home"), tensors(tmp_path / "ours"))
    assert (tmp_path / "home" / "config.json").read_bytes() == (tmp_path / "ours" / "config.json").read_bytes()
    said = json.loads((tmp_path / "released" / "config.json").read_text())
    assert is_released(said)
    assert said["args"]["model"] == "vit_tiny_patch8_32"
    image = pixels(1, 3, 24, 80)
    expected = reference.forward(
        tensors(tmp_path / "released"), said["args"], image
    )  # readers of the format see it so
    torch.testing.assert_close(model(image).last_hidden_state, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_training_changed_in_the_configuration_is_not_lost(released, tmp_path):
    model = UnitVisionModel.from_pretrained(released, cpe_drop_prob=0.0, pooling="mean")
    assert (model.config.cpe_drop_prob, model.config.pooling) == (0.0, "mean")
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    said, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", released))
    assert said.pop("unit")
    assert said == before
    convert(tmp_path / "back", tmp_path / "home")
    assert (tmp_path / "home" / "config.json").read_bytes() == (tmp_path / "ours" / "config.json").read_bytes()


@pytest.mark.parametrize(("option", "double"), [((), True), (("--pixels", "unit-range"), False)])
@torch.no_grad()
def test_the_image_processor_normalises_a_second_time_or_not(released, tmp_path, option, double):
    assert main(["convert", str(released), str(tmp_path / "ours"), *option]) == 0
    image = AutoImageProcessor.from_pretrained(tmp_path / "ours")(noise(40, 24))["pixel_values"]
    bare = AutoImageProcessor.from_pretrained(tmp_path / "ours", do_normalize=False)(noise(40, 24))["pixel_values"]
    torch.testing.assert_close(image, clip_normalised(bare) if double else bare, atol=1e-5, rtol=0)
    assert image.shape[-2] % 4 == 0
    output = UnitVisionModel.from_pretrained(tmp_path / "ours")(image).last_hidden_state
    expected = reference.forward(tensors(released), json.loads((released / "config.json").read_text())["args"], image)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_class_tokens_are_counted_by_the_tokens_where_args_do_not_say(tmp_path):
    for registers, classes, expected in ((0, 3, 3), (8, 1, 1), (8, 3, 1), (4, 4, 4)):
        args = arguments(registers=registers)
        del args["teachers"], args["cls_token_per_teacher"]
        folder = write(tmp_path / f"{registers}-{classes}", args, random_state(DIFFERENT, "token", registers, classes))
        config, *_ = read_released(folder)
        assert config.num_cls_tokens == expected
        assert config.num_prefix_tokens == reference.prefix_count(classes, registers)


def test_the_help_lists_every_name_of_the_mapping(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for theirs, ours in NAMES.items():
        assert any(row[:2] == [theirs.removeprefix(PREFIX), ours] for row in rows), theirs
    assert ["input_conditioner.norm_mean,", "norm_std"] in [row[:2] for row in rows]


def test_the_command_says_what_it_did_and_what_it_left(released, tmp_path, capsys):
    (released / "modeling_theirs.py").write_text("raise SystemExit")
    (released / "README.md").write_text("theirs")
    assert main(["convert", str(released), str(tmp_path / "ours")]) == 0
    # 12 blocks of 12 tensors, patches, positions, prefix, two of the norm
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'ours'}: 149 tensors in 1 file, released format to ours",
        "not taken along: README.md, modeling_theirs.py",
    ]
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-size", "10MB"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'back'}: 151 tensors in 3 files, ours to the released format",
        "not taken along: preprocessor_config.json",
    ]


@torch.no_grad()
def test_a_repository_on_the_hub_loads_directly(released, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--yeeaa--UNIT"
    shutil.copytree(released, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = UnitVisionModel.from_pretrained("yeeaa/UNIT", cache_dir=tmp_path / "cache", local_files_only=True)
    image = pixels(1, 3, 8, 8)
    expected = UnitVisionModel.from_pretrained(released)(image).last_hidden_state
    torch.testing.assert_close(loaded(image).last_hidden_state, expected, atol=0, rtol=0)
    assert loaded.config.name_or_path == "yeeaa/UNIT"


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "blocks"),
    [("unit-600m", "vit_huge_patch14_224", 32), ("unit-1b", "vit_huge_patch14_224_1B", 50)],
)
def test_released_sizes_have_the_parameters_of_their_table(name, model, blocks):
    args = {"model": model, "cpe_max_size": 2048, "gp": "token", "register_multiple": 0}
    token = TensorEntry("F32", (1, 1280), Path(), 0, 0)
    statistics = ([0.5, 0.5, 0.5], [0.2, 0.2, 0.2], "F32")
    key = PREFIX + "model.patch_generator.cls_token.token"
    config = config_from_released({"args": args, "version": "1"}, "{}", {key: token}, statistics)
    with torch.device("meta"):
        model = UnitVisionModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    # by the table: M = round(2048 / 14) * 14 = 2044, R = 146
    patches, positions, cls, norm = 1280 * 3 * 14 * 14, 146 * 146 * 1280, 1280, 2 * 1280
    qkv, proj = 3 * 1280 * 1280 + 3 * 1280, 1280 * 1280 + 1280
    mlp = 1280 * 5120 + 5120 + 5120 * 1280 + 1280
    block = 2 * 2 * 1280 + qkv + proj + mlp
    assert count == patches + positions + cls + norm + blocks * block
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    shape += ("image_size", "cpe_max_size", "num_cls_tokens", "use_final_norm")
    assert [getattr(config, field) for field in shape] == [getattr(preset(name), field) for field in shape]
    with torch.device("meta"):
        parameters = dict(model.named_parameters())
    assert {ours: tuple(shape) for ours, shape in tensor_names(config).values()} == {
        key: tuple(parameter.shape) for key, parameter in parameters.items()
    }


# -- bad input -------------------------------------------------------------------------------------


def edit(folder: Path, change) -> None:
    """Change the tensors of a folder with one file of weights."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def edit_config(folder: Path, **args) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["args"] |= args
    (folder / "config.json").write_text(json.dumps(config))


def break_missing(folder):
    edit(folder, lambda state: [state.pop(PREFIX + f"model.blocks.{i}.attn.qkv.bias") for i in (3, 4)])
    return "2 missing keys: unit_model.model.blocks.3.attn.qkv.bias, unit_model.model.blocks.4.attn.qkv.bias."


def break_unknown(folder):
    edit(folder, lambda state: state.update({PREFIX + "model.head.weight": torch.zeros(3, 192)}))
    return "1 unknown key: unit_model.model.head.weight."


def break_prefix(folder):
    edit(folder, lambda state: state.update({"model.norm.weight": state.pop(PREFIX + "model.norm.weight")}))
    return "1 missing key: unit_model.model.norm.weight; 1 unknown key: model.norm.weight."


def break_shape(folder):
    edit(folder, lambda state: state.update({PREFIX + "model.blocks.0.mlp.fc1.weight": torch.zeros(700, 192)}))
    return "1 wrong shape: unit_model.model.blocks.0.mlp.fc1.weight is (700, 192) and should be (768, 192)."


def break_table(folder):
    edit_config(folder, cpe_max_size=32)
    return "1 wrong shape: unit_model.model.patch_generator.pos_embed is (1, 36, 192) and should be (1, 64, 192)."


def break_prefix_count(folder):
    edit_config(folder, register_multiple=5)
    return "unit_model.model.patch_generator.cls_token.token is (8, 192) and should be (5, 192)."


def break_norm_name(folder):
    edit_config(folder, gp="avg")
    return (
        "2 missing keys: unit_model.model.fc_norm.bias, unit_model.model.fc_norm.weight; "
        "2 unknown keys: unit_model.model.norm.bias, unit_model.model.norm.weight."
    )


def break_statistics(folder):
    edit(folder, lambda state: state.pop(PREFIX + "input_conditioner.norm_std"))
    return "1 missing key: unit_model.input_conditioner.norm_std;"


def break_statistics_values(folder):
    edit(folder, lambda state: state[PREFIX + "input_conditioner.norm_std"].zero_())
    return "must be finite, the second above 0, got"


def break_statistics_shape(folder):
    edit(folder, lambda state: state.update({PREFIX + "input_conditioner.norm_mean": torch.zeros(3)}))
    return "unit_model.input_conditioner.norm_mean must be floats of shape (3, 1, 1), got F32 (3,)."


def break_model(folder):
    edit_config(folder, model="vit_giant_patch14_224")
    return "args.model 'vit_giant_patch14_224' is unknown. Known are vit_huge_patch14_224 (UNIT-600M), "


def break_model_absent(folder):
    edit_config(folder, model=None)
    return "args.model None is unknown."


def break_cpe(folder):
    edit_config(folder, cpe_max_size=None)
    return "args.cpe_max_size must be a positive whole number, got None."


def break_registers(folder):
    edit_config(folder, register_multiple="8")
    return "args.register_multiple must be a positive whole number, got '8'."


def break_pooling(folder):
    edit_config(folder, gp="map")
    return 'args.gp must be "token" or "avg", got \'map\'.'


def break_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    return "model.safetensors: damaged, download or write it again"


def break_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    return "model-00001-of-00002.safetensors is missing, which the index names; download it again."


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../model.safetensors"}}')
    return "names '../../model.safetensors', which is no safetensors file of this folder."


def break_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin: a pickle, which can run code when it is read, is not opened; write it as safetensors"


def break_weights(folder):
    (folder / "model.safetensors").unlink()
    return "no weights there (no model.safetensors, no model.safetensors.index.json)."


def break_unit(folder):
    config = json.loads((folder / "config.json").read_text())
    config["unit"] = {"config": json.dumps({"model_type": "unit_vision_model", "hidden_size": 64})}
    (folder / "config.json").write_text(json.dumps(config))
    return "the entry `unit` disagrees with the rest about hidden_size, "


def break_unit_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"unit": {"config": '{"hidden_size": "wide"}'}}))
    return "the entry `unit` is damaged; remove it"


BREAKS = [break_missing, break_unknown, break_prefix, break_shape, break_table, break_prefix_count, break_norm_name]
BREAKS += [break_statistics, break_statistics_values, break_statistics_shape, break_model, break_model_absent]
BREAKS += [break_cpe, break_registers, break_pooling, break_file, break_shard, break_index, break_pickle]
BREAKS += [break_weights, break_unit, break_unit_type]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("damage", BREAKS)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_nothing_is_written(released, tmp_path, capsys, damage):
    words = damage(released)
    before = listing(tmp_path)
    assert main(["convert", str(released), str(tmp_path / "ours")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"unit convert: {released}")
    assert words in line
    assert listing(tmp_path) == before
    with pytest.raises(CheckpointError) as error:  # loading it directly says the same
        UnitVisionModel.from_pretrained(released)
    assert str(error.value) == line.removeprefix("unit convert: ")


def ours_folder(tmp_path, capsys, **settings) -> Path:
    shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    UnitVisionModel(vision_config(**(shape | settings))).save_pretrained(tmp_path / "ours")
    capsys.readouterr()  # bars of transformers
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 48, "intermediate_size": 64}, "The released format has no name for an encoder of width 48, "),
        ({"hidden_act": "relu"}, "The released format cannot say hidden_act='relu'; it assumes 'gelu'."),
        ({"layer_norm_eps": 1e-5}, "cannot say layer_norm_eps=1e-05"),
        ({"qkv_bias": False}, "cannot say qkv_bias=False"),
        (
            {"use_final_norm": False},
            "exactly one of norm (use_final_norm) and fc_norm (keep_fc_norm), and this encoder",
        ),
    ],
    ids=str,
)
def test_what_the_released_format_cannot_say_is_refused(tmp_path, capsys, settings, words):
    folder = ours_folder(tmp_path, capsys, **settings)
    before = listing(tmp_path)
    assert main(["convert", str(folder), str(tmp_path / "released")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size (192) must be a multiple of num_attention_heads (5)."),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 13}, "has no name for an encoder of width 192, 13 layers"),
        ({"cpe_max_size": 32}, "1 wrong shape: embeddings.position_embedding is (1, 64, 192)"),
        ({"model_type": "clip_vision_model"}, "not a UNIT encoder (config.json has model_type 'clip_vision_model')"),
        ({"model_type": "unit"}, "a whole UNIT model, and the released format holds an encoder alone"),
        ({"released": {"config": "{"}}, "the released configuration kept under `released` is damaged; remove it"),
    ],
    ids=str,
)
def test_a_configuration_of_ours_that_makes_no_sense_is_refused(tmp_path, capsys, change, words):
    folder = ours_folder(tmp_path, capsys)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    before = listing(tmp_path)
    assert main(["convert", str(folder), str(tmp_path / "released")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"unit convert: {folder}: ")
    assert words in line
    assert listing(tmp_path) == before


def test_arguments_that_no_longer_fit_are_not_written(released, tmp_path, capsys):
    convert(released, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"image_size": 24}))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back")]) == 2
    assert "config.json: image_size changed since this encoder came from a released" in capsys.readouterr().err
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"image_size": 24, "released": None}))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["args"]["model"] == EQUAL


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "nowhere: no such folder."),
        ("weights.pt", "weights.pt: a pickle, which can run code when it is read, is not opened"),
        ("page.txt", "page.txt: is a file; name the folder that holds config.json and the weights."),
        ("empty", "empty: no checkpoint there (no config.json)."),
        ("torn", "torn/config.json: cannot be read as JSON"),
        ("list", "list/config.json: must hold a JSON object, got list."),
        ("bare", "bare: not a UNIT encoder (config.json has neither args nor model_type); convert takes"),
        ("nobody/nothing", "nobody/nothing: no such folder here, and on the Hub no checkpoint in the released format"),
    ],
)
def test_a_source_that_is_no_checkpoint_is_named(tmp_path, monkeypatch, capsys, source, words):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty", None), ("torn", "{"), ("list", "[1]"), ("bare", "{}")):
        Path(name).mkdir()
        if text:
            (Path(name) / "config.json").write_text(text)
    for name in ("weights.pt", "page.txt"):
        Path(name).write_bytes(b"\x80\x02.")
    before = listing(tmp_path)
    assert main(["convert", source, "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert listing(tmp_path) == before


def test_a_destination_that_is_taken_is_left_as_it_is(released, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    for destination, words in (("taken", "is already there; remove it or name another."), ("no/way", "is no folder")):
        assert main(["convert", str(released), str(tmp_path / destination)]) == 2
        assert words in capsys.readouterr().err
    assert listing(tmp_path / "taken") == ["thesis.tex"]
    assert main(["convert", str(released), str(released)]) == 2
    (tmp_path / "free").mkdir()
    assert main(["convert", str(released), str(tmp_path / "free")]) == 0


@pytest.mark.parametrize("trouble", [OSError("disk full"), KeyboardInterrupt()])
def test_a_conversion_that_is_interrupted_leaves_nothing_behind(released, tmp_path, capsys, monkeypatch, trouble):
    before, seen = listing(tmp_path), []

    def progress(self, done, total):
        if done > total / 2:
            seen.extend(path for path in tmp_path.iterdir() if path != released)
            raise trouble

    monkeypatch.setattr(command.Progress, "__call__", progress)
    assert main(["convert", str(released), str(tmp_path / "ours")]) in (2, 130)
    assert len(capsys.readouterr().err.splitlines()) in (1, 2)
    assert seen  # it had begun to write, beside
    assert tmp_path / "ours" not in seen
    assert listing(tmp_path) == before


def test_a_full_disk_is_seen_before_anything_is_written(released, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert main(["convert", str(released), str(tmp_path / "ours")]) == 2
    assert "GB are free; make room." in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["released"]


def test_where_an_encoder_alone_will_not_do_the_way_is_shown(released, tmp_path, capsys):
    with pytest.raises(ValueError, match="holds an encoder alone; load it with UnitVisionModel") as error:
        UnitForPreTraining.from_pretrained(released)
    assert f"unit convert {released} FOLDER" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert main(["features", "x.png", "--model", str(released), "--out", str(tmp_path / "f.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"unit features: {released}: in the released format; convert it first: unit convert {released} FOLDER"
    )


@pytest.mark.parametrize("verb", ["read", "describe"])
def test_an_encoder_alone_is_not_sent_to_convert_by_what_needs_a_decoder(released, tmp_path, capsys, verb):
    convert(released, tmp_path / "ours")
    for folder in (released, tmp_path / "ours"):
        assert main([verb, "x.png", "--model", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"unit {verb}: {folder}: an encoder alone, without the language decoder")


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(released):
    with pytest.raises(ValueError, match="18 x 16 pixels; height and width must be multiples of the patch size 4"):
        UnitVisionModel.from_pretrained(released)(torch.zeros(1, 3, 18, 16))


def test_a_configuration_of_another_shape_is_refused_when_loading(released):
    config = UnitVisionModel.from_pretrained(released).config
    with pytest.raises(CheckpointError, match=r"12 missing keys: unit_model\.model\.blocks\.12\.attn"):
        UnitVisionModel.from_pretrained(
            released, config=UnitVisionConfig.from_dict(config.to_dict() | {"num_hidden_layers": 13})
        )


@pytest.mark.parametrize("text", ["0", "5XB", "MB", "many"])
def test_shard_sizes_are_sizes(text, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--max-shard-size", text])
    assert "must be a size such as 5GB or 500MB" in capsys.readouterr().err


def test_tensors_are_copied_and_not_loaded(released, tmp_path, monkeypatch):
    """Memory: whatever the size of the weights, no more than `CHUNK` bytes of them at a time."""
    monkeypatch.setattr(command, "CHUNK", 1000)
    lengths = []
    write_safetensors = command.write_safetensors

    def watched(path, pieces):
        for count in write_safetensors(path, pieces):
            lengths.append(count)
            yield count

    monkeypatch.setattr(command, "write_safetensors", watched)
    convert(released, tmp_path / "ours")
    assert max(lengths) == 1000
    assert all(dataclasses.asdict(piece)["data"] == b"" for piece in command.from_released(released, "", {}, True)[0])


def test_a_configuration_of_no_format_is_refused(released):
    (released / "config.json").write_text(json.dumps({"args": "no dict", "version": "1"}))
    with pytest.raises(ValueError, match=r"neither UNIT's .* nor the released one"):
        UnitVisionModel.from_pretrained(released)


def test_a_configuration_too_deep_to_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(tmp_path)
