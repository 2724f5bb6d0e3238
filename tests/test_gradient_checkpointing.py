"""Gradient checkpointing: blocks are run twice, and every gradient is what it is without."""

import pytest
import torch
from test_any_vit import PLAIN
from test_trainer import IntraScaleTrainer, arguments, data, mixture, model_and_teacher, train  # noqa: F401
from tiny import IMAGE_TOKEN, OPT, PATCH, QWEN3, unit_model, vision_config
from transformers import CONFIG_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer

from training.arguments import LoraArguments
from training.lora import add_lora
from training.losses import alignment_loss

LLAMA = {key: value for key, value in QWEN3.items() if key != "model_type"} | {"model_type": "llama"}
ENCODERS = [name for name in PLAIN if name in CONFIG_MAPPING and name not in ("clip", "siglip", "siglip2", "unit")]


def model_of(encoder="unit_vision_model", text=OPT, **changes):
    torch.manual_seed(0)
    if encoder == "unit_vision_model":
        vision = vision_config(cpe_crop=False, cpe_drop_prob=0.0)
    else:
        vision = CONFIG_MAPPING[encoder](**PLAIN[encoder][1])
    return unit_model(vision=vision, text=text, **changes).train()


def batch(form: str, tokens: int) -> dict[str, torch.Tensor]:
    """Two images of 4 x 4 and 2 x 4 patches, padded to one grid or in a pack, with texts that differ in length."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=draw)
    grids = torch.tensor([[4, 4], [2, 4]])
    if form == "packed":
        patches = []
        for image, (rows, cols) in zip(pixels, grids.tolist(), strict=True):
            cut = image[:, : rows * PATCH, : cols * PATCH].unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))
            patches.append(cut.permute(1, 3, 0, 2, 4).reshape(rows * cols, -1))
        given, visual = {"pixel_values": torch.cat(patches), "image_grid_hw": grids}, (16, 8)
    elif form == "padded":
        given, visual = {"pixel_values": pixels, "spatial_shapes": grids}, (16, 8)
    else:
        given, visual = {"pixel_values": pixels}, (16, 16)
    visual = [tokens or each for each in visual]
    text = torch.randint(6, 200, (2, 7), generator=draw)
    rows = [torch.cat([torch.full((count,), IMAGE_TOKEN), row]) for count, row in zip(visual, text, strict=True)]
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    labels = torch.full((2, longest), -100)
    for place, (row, count) in enumerate(zip(rows, visual, strict=True)):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
        labels[place, count + 1 : len(row)] = row[count + 1 :]
    return given | {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, given, aligned=False) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)  # DINOv3 stretches its positions at random in training
    output = model(**given, **({"output_attentions": True} if aligned else {}))
    loss = output.loss
    if aligned:
        places = torch.full(given["labels"].shape, -1)
        places[:, -4:] = torch.tensor([3, 1, 0, 2])
        loss = loss + alignment_loss(output.attentions, places)[0].mean
    loss.backward()
    return float(loss.detach()), {
        name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
    }


def runs_of(kind: type, model) -> dict[str, int]:
    """How often each checkpointed layer's `forward` is run, by its name; counted as they run."""
    counts: dict[str, int] = {}

    def count(name):
        def hook(*_):
            counts[name] = counts.get(name, 0) + 1

        return hook

    for name, module in model.named_modules():
        if isinstance(module, kind):
            inner = next(each for each in module.modules() if not list(each.children()))
            inner.register_forward_hook(count(name))
    return counts


def check_equal(model, given, aligned=False) -> dict[str, int]:
    """Gradients with checkpointing are those without; returns how often each layer was run with it."""
    loss, plain = gradients(model, given, aligned)
    model.activation_checkpointing_enable()
    counts = runs_of(GradientCheckpointingLayer, model)
    checkpointed_loss, checkpointed = gradients(model, given, aligned)
    assert loss == pytest.approx(checkpointed_loss, rel=1e-6)
    assert set(plain) == set(checkpointed)
    for name, each in plain.items():
        assert torch.allclose(each, checkpointed[name], rtol=1e-4, atol=1e-6 * float(each.abs().max()) + 1e-9), name
    assert any(float(each.abs().max()) > 0 for name, each in plain.items() if "vision_model" in name)
    return counts


@pytest.mark.parametrize("form", ["square", "padded", "packed"])
@pytest.mark.parametrize("encoder", [*ENCODERS])
def test_every_encoder(encoder, form):
    model = model_of(encoder)
    counts = check_equal(model, batch(form, 0))
    encoders = {name: count for name, count in counts.items() if name.startswith("vision_model.")}
    # both blocks again in the backward pass, or so often as there are sizes and again
    assert len(encoders) == 2, counts
    assert all(count >= 2 and count % 2 == 0 for count in encoders.values()), counts


@pytest.mark.parametrize("form", ["square", "padded", "packed"])
@pytest.mark.parametrize("text", [OPT, LLAMA, QWEN3], ids=["opt", "llama", "qwen3"])
@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_every_decoder_and_connector(connector, text, form):
    model = model_of(text=text, connector=connector)
    counts = check_equal(model, batch(form, 5 if connector == "qformer" else 0))
    parts = {"vision_model", "language_model"} | ({"connector"} if connector == "qformer" else set())
    assert {name.split(".")[0] for name in counts} == parts
    assert all(count == 2 for count in counts.values()), counts


@pytest.mark.parametrize("form", ["square", "packed"])
@pytest.mark.parametrize("encoder", ["unit_vision_model", "clip_vision_model"])
@pytest.mark.parametrize("parts", [["encoder"], ["encoder", "language_decoder"]])
def test_with_adapters_above_frozen_weights(parts, encoder, form):
    model = add_lora(model_of(encoder), LoraArguments(parts=parts, dropout=0.0)).train()
    for name, each in model.named_parameters():
        if "lora_B" in name:  # zero at the start: A would get no gradient
            torch.nn.init.normal_(each, std=0.1, generator=torch.Generator().manual_seed(0))
    given = batch(form, 0)
    check_equal(model, given)
    lora = [each for name, each in model.named_parameters() if "lora_" in name]
    assert lora
    assert all(float(each.grad.abs().max()) > 0 for each in lora)


@pytest.mark.parametrize("text", [OPT, QWEN3, LLAMA], ids=["opt", "qwen3", "llama"])
def test_with_the_attention_that_the_alignment_loss_reads(text):
    model = model_of(text=text)
    model.language_model.set_attn_implementation("eager")
    counts = check_equal(model, batch("square", 0), aligned=True)
    assert all(count == 2 for count in counts.values())


@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_run_with_it_is_the_run_without(auxiliary, data, tmp_path):  # noqa: F811
    changes = {"alignment_weight": 0.3} if auxiliary else {"bf16": True}
    plain, start = train(IntraScaleTrainer, tmp_path / "a", data, **changes)
    twice, _ = train(IntraScaleTrainer, tmp_path / "b", data, gradient_checkpointing=True, **changes)
    assert twice.model.vision_model.blocks[0].gradient_checkpointing
    assert twice.model.language_model.model.layers[0].gradient_checkpointing
    losses = [[each["loss"] for each in trainer.state.log_history if "loss" in each] for trainer in (plain, twice)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, each in twice.model.named_parameters():
        assert not torch.equal(each, start[name]), name


def test_the_form_that_loses_gradients_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant=true loses the gradients"):
        arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
