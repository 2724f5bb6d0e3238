"""Parameter groups and the two optimisers behind one interface."""

import io
import re

import pytest
import torch
from test_any_vit import PLAIN
from tiny import QWEN3, unit_model
from torch import nn
from transformers import CONFIG_MAPPING

from training.arguments import LoraArguments, UnitTrainingArguments
from training.lora import add_lora
from training.optim import (
    PARTS,
    BatchedMuon,
    MuonWithAdamW,
    is_matrix,
    make_optimizer,
    parameter_groups,
    part_of,
    rate_table,
)


def full_model():
    return unit_model(text=QWEN3, projection_dim=4, num_character_classes=5)


def any_encoder(name: str):
    """A model around an encoder of two layers, ours or one of transformers'."""
    if name == "unit_vision_model":
        return unit_model()
    return unit_model(vision=CONFIG_MAPPING[name](**PLAIN[name][1]))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vision_model.blocks.0.attn.qkv.weight", "encoder"),
        ("vision_model.embeddings.projection.weight", "encoder"),
        ("connector.fc1.weight", "connector"),
        ("language_model.model.decoder.layers.0.fc1.weight", "language_decoder"),
        ("vision_decoder.fc2.bias", "vision_decoder"),
        ("visual_projection.weight", "projection"),
        ("character_head.weight", "heads"),
        ("imagenet_head.bias", "heads"),
        ("logit_scale", "heads"),
        ("base_model.model.vision_model.blocks.0.attn.qkv.lora_A.default.weight", "encoder"),
        ("base_model.model.connector.modules_to_save.default.fc1.weight", "connector"),
        ("base_model.model.language_model.lm_head.weight", "language_decoder"),
    ],
)
def test_every_name_has_its_part(name, part):
    assert part_of(name) == part


def test_a_name_of_no_part_is_refused():
    with pytest.raises(ValueError, match=r"'mystery\.weight' belongs to no known part"):
        part_of("mystery.weight")


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = full_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("visual_projection"))
    groups = parameter_groups(model, 1e-3, 0.1, muon_learning_rate=2e-3)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    by_name = dict(model.named_parameters())
    for group in groups:
        assert [id(by_name[name]) for name in group["names"]] == [id(parameter) for parameter in group["params"]]
        assert {part_of(name) for name in group["names"]} == {group["part"]}


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    model = full_model()
    groups = parameter_groups(model, 1e-3, 0.1, muon_learning_rate=2e-3)
    taken = {name for group in groups if group["muon"] for name in group["names"]}
    encoder = {f"vision_model.blocks.{layer}.{name}.weight" for layer in (0, 1) for name in
               ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    gated = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    decoder = {f"language_model.model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in attention + gated}
    others = {"connector.fc1.weight", "connector.fc2.weight", "vision_decoder.fc1.weight", "vision_decoder.fc2.weight"}
    assert taken == encoder | decoder | others


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.embeddings.projection.weight",  # the patch embedding
        "visual_projection.weight",
        "character_head.weight",
        "language_model.lm_head.weight",
        "language_model.model.decoder.embed_tokens.weight",
        "language_model.model.decoder.embed_positions.weight",
    ],
)
def test_embeddings_and_heads_are_no_matrices_for_muon(name):
    assert not is_matrix(name, nn.Parameter(torch.zeros(4, 4)))


def test_vectors_and_tables_are_not_decayed():
    groups = parameter_groups(full_model(), 1e-3, 0.1, muon_learning_rate=2e-3)
    free = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    decayed = {name for group in groups if group["weight_decay"] == 0.1 for name in group["names"]}
    assert "vision_model.embeddings.position_embedding" in free
    assert "vision_model.embeddings.prefix_tokens" in free
    assert "vision_model.norm.weight" in free
    assert "vision_model.blocks.0.attn.qkv.bias" in free
    assert "language_model.model.norm.weight" in free
    assert "vision_model.embeddings.projection.weight" in decayed
    assert "language_model.model.embed_tokens.weight" in decayed
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name]


def test_rates_follow_part_and_optimiser():
    groups = parameter_groups(full_model(), 1e-3, 0.1, {"encoder": 0.5, "connector": 2.0}, 4e-3)
    rates = {(group["part"], group["muon"]): group["lr"] for group in groups}
    assert rates["encoder", True] == pytest.approx(2e-3)
    assert rates["encoder", False] == pytest.approx(5e-4)
    assert rates["connector", True] == pytest.approx(8e-3)
    assert rates["language_decoder", False] == pytest.approx(1e-3)
    assert not any(group["muon"] for group in parameter_groups(full_model(), 1e-3, 0.1))


@pytest.mark.parametrize(
    ("rates", "words"),
    [({"decoder": 1.0}, r"Unknown parts in part_rates: \['decoder'\]"), ({"encoder": 0}, "positive")],
)
def test_wrong_rates_are_refused(rates, words):
    with pytest.raises(ValueError, match=words):
        parameter_groups(full_model(), 1e-3, 0.1, rates)


def test_parts_cover_the_model():
    assert {part_of(name) for name, _ in full_model().named_parameters()} == set(PARTS)


# -- Muon beside AdamW -----------------------------------------------------------------------------


class Toy(nn.Module):
    """Names that `part_of` knows: two matrices, a bias, an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.connector = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        self.vision_model = nn.ParameterDict({"prefix_tokens": nn.Parameter(torch.randn(1, 6))})

    def forward(self, x):
        return self.connector(x + self.vision_model["prefix_tokens"])


def toy_groups(model) -> list[dict]:
    return parameter_groups(model, 1e-2, 0.1, muon_learning_rate=2e-2)


def step(model, optimizer, seed: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_it_is_torchs_muon_and_torchs_adamw():
    together, apart = Toy(), Toy()
    both = MuonWithAdamW(toy_groups(together), betas=(0.9, 0.95))
    matrices = [apart.connector[0].weight, apart.connector[1].weight]
    muon = torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    vectors = [apart.connector[0].bias, apart.connector[1].bias, apart.vision_model["prefix_tokens"]]
    adamw = torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95))
    for seed in range(4):
        step(together, both, seed)
        apart(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(first, second)
    assert all(parameter.grad is None for parameter in together.parameters())


def test_batched_muon_is_torchs_up_to_rounding():
    torch.manual_seed(3)
    shapes = [(16, 8), (8, 16), (16, 8), (12, 12), (16, 8), (8, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    torchs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    unused = nn.Parameter(torch.ones(4, 4))  # without a gradient: left as it is
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    batched, single = BatchedMuon([*ours, unused], **settings), torch.optim.Muon(torchs, **settings)
    start = [parameter.detach().clone() for parameter in ours]
    for _ in range(3):
        for first, second in zip(ours, torchs, strict=True):
            first.grad = torch.randn(first.shape)
            second.grad = first.grad.clone()
        batched.step()
        single.step()
    for first, second, before in zip(ours, torchs, start, strict=True):
        assert (
            float((first - second).detach().norm() / (second - before).detach().norm()) < 0.02
        )  # bfloat16 has 8 bits
        buffers = batched.state[first]["momentum_buffer"], single.state[second]["momentum_buffer"]
        assert torch.allclose(*buffers)
    assert torch.equal(unused, torch.ones(4, 4))
    single.load_state_dict(batched.state_dict() | {"param_groups": single.state_dict()["param_groups"]})


def test_a_schedule_reaches_both():
    model = Toy()
    optimizer = MuonWithAdamW(toy_groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1.0 if count == 0 else 0.0)
    step(model, optimizer, 0)
    schedule.step()
    before = [parameter.clone() for parameter in model.parameters()]
    step(model, optimizer, 1)  # at a rate of zero
    for first, second in zip(before, model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_saved_state_goes_on_identically():
    straight = Toy()
    optimizer = MuonWithAdamW(toy_groups(straight))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.8**count)
    for seed in range(3):
        step(straight, optimizer, seed)
        schedule.step()
    file = io.BytesIO()
    torch.save(
        {"model": straight.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file
    )
    for seed in range(3, 6):
        step(straight, optimizer, seed)
        schedule.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)  # nothing in it needs pickle's power
    resumed = Toy()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    resumed.load_state_dict(saved["model"])
    optimizer = MuonWithAdamW(toy_groups(resumed))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.8**count)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    for seed in range(3, 6):
        step(resumed, optimizer, seed)
        schedule.step()
    for first, second in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_state_of_other_parts_is_refused():
    optimizer = MuonWithAdamW(toy_groups(Toy()))
    only_adamw = MuonWithAdamW([group for group in toy_groups(Toy()) if not group["muon"]])
    with pytest.raises(ValueError, match="the recipe changed between runs"):
        optimizer.load_state_dict(only_adamw.state_dict())


def test_without_matrices_it_is_adamw_alone():
    model = Toy()
    for parameter in model.connector.parameters():
        parameter.requires_grad_(False)
    optimizer = MuonWithAdamW(toy_groups(model))
    assert len(optimizer.inner) == 1
    before = model.vision_model["prefix_tokens"].clone()
    step(model, optimizer, 0)
    assert not torch.equal(before, model.vision_model["prefix_tokens"])


def test_a_closure_is_called_with_gradients():
    model = Toy()
    optimizer = MuonWithAdamW(toy_groups(model))

    def closure():
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) > 0


# -- rates by depth --------------------------------------------------------------------------------


def settings(tmp_path, **changes) -> UnitTrainingArguments:
    return UnitTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)


def rates_by_name(groups) -> dict[str, float]:
    return {name: group["lr"] for group in groups for name in group["names"]}


def test_rates_fall_towards_the_embeddings_by_hand():
    # two blocks: embeddings, block 0, block 1, norm are layers 0, 1, 2, 3 of L = 3
    rates = rates_by_name(parameter_groups(full_model(), 1e-3, 0.1, layer_decays={"encoder": 0.5}))
    assert rates["vision_model.embeddings.projection.weight"] == pytest.approx(0.125e-3)
    assert rates["vision_model.embeddings.position_embedding"] == pytest.approx(0.125e-3)
    assert rates["vision_model.embeddings.prefix_tokens"] == pytest.approx(0.125e-3)
    assert rates["vision_model.blocks.0.attn.qkv.weight"] == pytest.approx(0.25e-3)
    assert rates["vision_model.blocks.1.mlp.fc2.bias"] == pytest.approx(0.5e-3)
    assert rates["vision_model.norm.weight"] == pytest.approx(1e-3)
    others = {rate for name, rate in rates.items() if not name.startswith("vision_model.")}
    assert others == {1e-3}


def test_the_decoders_rates_fall_too_when_asked_to():
    rates = rates_by_name(parameter_groups(full_model(), 1e-3, 0.1, layer_decays={"language_decoder": 0.5}))
    assert rates["language_model.model.embed_tokens.weight"] == pytest.approx(0.125e-3)
    assert rates["language_model.model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.25e-3)
    assert rates["language_model.model.layers.1.input_layernorm.weight"] == pytest.approx(0.5e-3)
    assert rates["language_model.model.norm.weight"] == pytest.approx(1e-3)
    assert rates["vision_model.blocks.0.attn.qkv.weight"] == pytest.approx(1e-3)


# the first and the last parameter of an encoder's way, and one inside of block 1, as its class calls them
DEPTHS = {
    "clip_vision_model": {
        "pre_layrnorm.weight": 0,
        "embeddings.class_embedding": 0,
        "encoder.layers.1.mlp.fc1.weight": 2,
        "post_layernorm.bias": 3,
    },
    "siglip_vision_model": {
        "embeddings.patch_embedding.bias": 0,
        "encoder.layers.1.layer_norm1.bias": 2,
        "post_layernorm.weight": 3,
    },
    "siglip2_vision_model": {
        "embeddings.position_embedding.weight": 0,
        "encoder.layers.1.layer_norm1.bias": 2,
        "post_layernorm.weight": 3,
    },
    "vit": {"embeddings.cls_token": 0, "layers.1.attention.q_proj.weight": 2, "layernorm.weight": 3},
    "dinov2": {
        "embeddings.patch_embeddings.projection.weight": 0,
        "encoder.layer.1.layer_scale2.lambda1": 2,
        "layernorm.bias": 3,
    },
    "dinov2_with_registers": {
        "embeddings.register_tokens": 0,
        "encoder.layer.1.mlp.fc2.weight": 2,
        "layernorm.bias": 3,
    },
    "dinov3_vit": {
        "embeddings.register_tokens": 0,
        "model.layer.1.mlp.up_proj.bias": 2,
        "norm.weight": 3,
    },
    "radio": {
        "embeddings.cls_register_token": 0,
        "embeddings.patch_projection.weight": 0,
        "encoder.layer.1.attention.o_proj.bias": 2,
    },
    "unit_vision_model": {"embeddings.prefix_tokens": 0, "blocks.1.norm2.bias": 2, "norm.weight": 3},
}


@pytest.mark.parametrize("name", DEPTHS)
def test_every_encoder_has_its_depths(name):
    model = any_encoder(name)
    rates = rates_by_name(parameter_groups(model, 1.0, 0.0, layer_decays={"encoder": 0.1}))
    for parameter, layer in DEPTHS[name].items():
        assert rates[f"vision_model.{parameter}"] == pytest.approx(0.1 ** (3 - layer)), parameter
    # nothing but the embeddings is as slow, nothing in a block as fast as what comes after them
    encoder = {key: round(rate, 6) for key, rate in rates.items() if key.startswith("vision_model.")}
    for key, rate in encoder.items():
        found = re.search(r"\.([01])\.", key)
        assert rate == pytest.approx(0.1 ** (2 - int(found[1]))) if found else rate in (0.001, 1.0), key
    assert sum(rate == 0.001 for rate in encoder.values()) >= 2


def test_adapters_have_the_depth_of_their_layer():
    model = add_lora(any_encoder("clip_vision_model"), LoraArguments(parts=["encoder"], use_dora=True))
    rates = rates_by_name(parameter_groups(model, 1.0, 0.0, layer_decays={"encoder": 0.5}))
    in_front = "base_model.model.vision_model.encoder.layers"
    assert rates[f"{in_front}.0.mlp.fc1.lora_A.default.weight"] == pytest.approx(0.25)
    assert rates[f"{in_front}.1.mlp.fc1.lora_B.default.weight"] == pytest.approx(0.5)
    assert rates[f"{in_front}.1.mlp.fc1.lora_magnitude_vector.default.weight"] == pytest.approx(0.5)


def test_depth_part_and_muon_multiply(tmp_path):
    asked = settings(
        tmp_path, learning_rate=1e-3, optimizer="muon", muon_learning_rate=4e-3, layer_decay=0.5,
        part_rates={"encoder": 0.1},
    )  # fmt: skip
    optimizer = make_optimizer(full_model(), asked)
    rates = {(group["part"], group["muon"], group["lr"]) for group in optimizer.param_groups}
    muon = {rate for part, muon, rate in rates if part == "encoder" and muon}
    assert sorted(muon) == pytest.approx([1e-4, 2e-4])  # blocks 0 and 1: 4e-3 * 0.1 * 0.25 and * 0.5
    adamw = sorted(rate for part, muon, rate in rates if part == "encoder" and not muon)
    assert adamw == pytest.approx([1.25e-5, 2.5e-5, 5e-5, 1e-4])


def test_without_decay_there_is_one_group_for_each_part_and_kind(tmp_path):
    plain = parameter_groups(full_model(), 1e-3, 0.1)
    asked = parameter_groups(full_model(), 1e-3, 0.1, layer_decays={"encoder": 1.0})
    assert [group["names"] for group in plain] == [group["names"] for group in asked]


def test_the_table_shows_the_rates(tmp_path):
    asked = settings(tmp_path, learning_rate=1e-3, optimizer="muon", layer_decay=0.5, part_rates={"connector": 2.0})
    model = full_model()
    lines = {line.split()[0]: line.split()[1:] for line in rate_table(model, asked).splitlines()}
    assert lines["encoder"] == ["0.000125", "...", "0.001", "0.0005", "...", "0.001"]  # Muon: 2e-3
    assert lines["connector"] == ["0.002", "0.004"]
    assert lines["heads"] == ["0.001", "-"]


@pytest.mark.parametrize("name", ["layer_decay", "language_layer_decay"])
@pytest.mark.parametrize("value", [0.0, 1.2, -0.5])
def test_decays_outside_of_their_range_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must lie in \(0, 1\]"):
        settings(tmp_path, **{name: value})
