"""benchmarks/common.py: operation counts against torch's own counter, timing in turns."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, OPTConfig, Qwen3Config

from benchmarks.common import decoder_flops, encoder_flops, interleave, matmul_rate, ratio, training_flops
from benchmarks.encoder import make_models, make_pass
from benchmarks.memory import fit_line, measure_point
from benchmarks.packed import spread_sides
from benchmarks.training_step import count, group_flops
from modeling_unit import UnitConfig, UnitForPreTraining, UnitVisionConfig, UnitVisionModel, pack_images


def counted(function) -> int:
    """FLOPs of ``function()`` as torch counts them operator by operator; it knows no fused attention on a CPU."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def tiny_encoder():
    config = UnitVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=4,
        image_size=16,
        cpe_max_size=32,
    )
    return UnitVisionModel._from_config(config, attn_implementation="eager").eval()


def test_encoder_flops_of_a_shape_worked_out_by_hand():
    config = UnitVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=2, image_size=4
    )
    # 4 patches and 1 class token. Embedding 2*4*(3*2*2)*8 = 768. Projections 2*5*4*8*8 = 2560.
    # Attention 2*(2*5*5*8) = 800. MLP 2*5*(2*8*16) = 2560.
    assert encoder_flops(config, 2, 2) == 768 + 2560 + 800 + 2560


def test_encoder_flops_agree_with_torch():
    model = tiny_encoder()
    with torch.inference_mode():
        assert counted(lambda: model(torch.zeros(1, 3, 12, 20))) == encoder_flops(model.config, 3, 5)


def test_training_an_encoder_costs_three_forward_passes_less_the_gradient_of_the_pixels():
    model = tiny_encoder().train()
    forward = encoder_flops(model.config, 4, 4)
    embedding = 2 * 16 * (3 * 4 * 4) * 32  # no gradient goes back to the pixels
    done = counted(lambda: model(torch.zeros(1, 3, 16, 16)).last_hidden_state.sum().backward())
    assert done == training_flops(forward) - embedding


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=50,
        ),
        OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=50,
            max_position_embeddings=64,
        ),
    ],
    ids=["qwen3", "opt"],
)
def test_decoder_flops_agree_with_torch_but_for_causal_attention(config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = 21
    with torch.inference_mode():
        done = counted(lambda: model(input_ids=torch.zeros(1, tokens, dtype=torch.long)))
    # torch counts the full square of attention, a causal kernel needs (tokens + 1) / 2 of each row
    square, causal = 2 * tokens * 2 * tokens, 2 * tokens * (tokens + 1)
    done -= config.num_hidden_layers * 32 * (square - causal)
    # some versions of transformers make the angles of rotary positions by a product, (head_dim / 2, 1) x (1, tokens)
    angles = 2 * tokens * getattr(config, "head_dim", 0) // 2
    assert done - decoder_flops(config, tokens) in (0, angles)


def test_logits_are_counted_where_they_are_made():
    config = OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, vocab_size=50)
    assert decoder_flops(config, 10) - decoder_flops(config, 10, labelled=4) == 6 * 2 * 32 * 50


def tiny_model() -> UnitForPreTraining:
    config = UnitConfig(
        vision_config=tiny_encoder().config,
        connector_config={"connector_type": "mlp", "unshuffle": 2},
        text_config={
            "model_type": "opt",
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 50,
            "max_position_embeddings": 64,
        },
        image_token_id=50,
        num_character_classes=7,
        character_slots=3,
    )
    return UnitForPreTraining._from_config(config, attn_implementation="eager").eval()


def group(images: int, rows: int, cols: int) -> dict[str, torch.Tensor]:
    """A group as the collator makes it, 2 x 2 patches a visual token, with ten tokens of text."""
    visual = -(-rows // 2) * -(-cols // 2)
    ids = torch.tensor([[50] * visual + [1] * 10]).repeat(images, 1)
    return {"pixel_values": torch.zeros(images, 3, 4 * rows, 4 * cols), "input_ids": ids, "labels": ids % 50}


def test_a_group_of_documents_costs_three_forward_passes_of_all_that_sees_it():
    model, batch = tiny_model(), group(2, 2, 5)

    def forward():
        features = model(**batch, logits_to_keep=10).image_features  # as the trainer asks: of the text alone
        model.character_head(features.patches)

    with torch.inference_mode():
        done = counted(forward)
    tokens = batch["input_ids"].shape[1]
    not_causal = 2 * 2 * 24 * (4 * tokens * tokens - 2 * tokens * (tokens + 1))  # images, layers, width
    assert group_flops(model, "document_x4", batch | {"character_classes": None}) == 3 * (done - not_causal)


def test_a_group_of_pictures_costs_the_teacher_and_the_vision_decoder_besides():
    model, batch = tiny_model(), group(2, 4, 4)
    teacher = {"teacher_pixel_values": torch.zeros(2, 3, 8, 8)}  # 2 x 2 patches of 4 pixels
    as_document = group_flops(model, "document_x4", batch)
    with torch.inference_mode():
        sees = counted(lambda: model.vision_model(teacher["teacher_pixel_values"]))
        decodes = counted(lambda: model.vision_decoder(torch.zeros(2, 5, 32)))
    assert group_flops(model, "natural_x4", batch | teacher) == as_document + sees + 3 * decodes


def test_a_packed_group_costs_what_its_images_cost_one_by_one():
    model = tiny_model()
    grids = [(2, 5), (4, 4), (3, 1)]
    tokens = 20
    alone = [group(1, rows, cols) | {"input_ids": torch.zeros(1, tokens, dtype=torch.long)} for rows, cols in grids]
    packed = pack_images([one["pixel_values"][0] for one in alone], 4)
    packed |= {"input_ids": torch.zeros(3, tokens, dtype=torch.long)}
    for name in ("document_x4", "natural_x1"):
        assert group_flops(model, name, packed) == sum(group_flops(model, name, one) for one in alone)
    assert count(model, {"document_x4": packed}, True)[1:] == (3, 10 + 16 + 3)


def test_sides_are_spread_from_x1_to_x4():
    assert spread_sides(128, 4, "side") == [128, 256, 384, 512]
    assert spread_sides(128, 4, "area") == [128, 176, 224, 256]  # 181, 221.7 at roots of 2 and 3, to whole patches
    assert spread_sides(224, 1, "side") == [224]


def test_the_line_through_points_by_hand():
    slope, intercept, share, worst = fit_line(np.array([1.0, 2.0, 3.0]), np.array([3.0, 5.0, 7.0]))
    assert (slope, intercept, share) == (pytest.approx(2.0), pytest.approx(1.0), pytest.approx(1.0))
    assert worst == pytest.approx(0.0, abs=1e-9)
    *_, share, worst = fit_line(np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.0, 3.0]))  # line 1.5 x - 0.5
    assert share == pytest.approx(1 - 1.5 / 6)
    assert worst == pytest.approx(1.0 / 3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize("do", ["forward", "training"])
def test_a_point_of_the_memory_curve_needs_more_than_nothing(do):
    point = measure_point("tiny", "float32", do, 12, "cpu")
    assert point["tokens"] == 145
    assert point["bytes"] >= 0
    assert any("flash_attention" in name for name in point["attention"])  # not the square of it


def test_encoders_of_the_benchmark_have_one_shape():
    models = make_models("tiny", "cpu")
    pixels = torch.zeros(1, 3, 32, 48)
    for key, model in models.items():
        make_pass(key, model, pixels, "training", "float32")()
        tokens = model.eval()(pixels, **({"interpolate_pos_encoding": True} if key == "clip" else {}))
        assert tokens.last_hidden_state.shape == (1, 1 + 6, 256)
    blocks = {
        "unit": models["unit"].blocks,
        "clip": models["clip"].encoder.layers,
        "radio": models["radio"].encoder.layer,
        "dinov2": models["dinov2"].encoder.layer,
    }
    matrices = {key: sum(p.numel() for p in block.parameters() if p.dim() == 2) for key, block in blocks.items()}
    assert set(matrices.values()) == {6 * 12 * 256 * 256}


def test_functions_are_timed_in_turns():
    calls = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, seconds=0, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_ratio_is_of_medians():
    assert ratio({"a": [1.0, 2.0, 90.0], "b": [4.0, 4.0, 4.0]}, "a", "b") == 0.5


def test_matmul_rate_is_a_positive_rate():
    assert matmul_rate(sides=(64,), seconds=0) > 1e6


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py")), ids=lambda path: path.stem
)
def test_every_benchmark_can_be_imported(path):
    """What one takes from another is still there; what a benchmark needs beyond the suite's environment is skipped."""
    try:
        module = importlib.import_module(f"benchmarks.{path.stem}" if path.stem != "__init__" else "benchmarks")
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in ("benchmarks", "modeling_unit", "training", "unit_cli"):
            raise
        pytest.skip(f"{error.name} is not installed")
    assert module.__doc__ or path.stem == "__init__"


def test_what_tesseract_is_enlarged_to_is_not_chosen_on_held_out_pages():
    from benchmarks.tesseract_upscale import pages

    with pytest.raises(ValueError, match="texlive-metapost-doc"):
        next(pages(["texlive-science-doc", "texlive-metapost-doc"], [5.0], 0))
