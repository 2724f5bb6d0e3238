"""The encoder's blocks compiled: the same run, the same names."""

import pytest
import torch
from safetensors import safe_open
from test_any_vit import PLAIN
from test_trainer import IntraScaleTrainer, data, train  # noqa: F401
from tiny import unit_model
from transformers import CONFIG_MAPPING

from training import compiled
from training.compiled import check_compiler, encoder_blocks


def has_compiler() -> bool:
    try:
        check_compiler(torch.device("cpu"))
    except ValueError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_a_compiled_run_is_the_run(data, tmp_path, changes):  # noqa: F811
    # aot_eager traces forward and backward as inductor does, and takes a tenth of its time
    settings = {"save_strategy": "steps", "save_steps": 3}
    plain, start = train(IntraScaleTrainer, tmp_path / "a", data, **settings)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    other, _ = train(
        IntraScaleTrainer, tmp_path / "b", data, torch_compile=True, torch_compile_backend="aot_eager", **settings,
        **changes,
    )  # fmt: skip
    assert counted["unique_graphs"] >= 1
    losses = [[each["loss"] for each in run.state.log_history if "loss" in each] for run in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    names = []
    for run in "ab":
        with safe_open(tmp_path / run / "checkpoint-3" / "model.safetensors", "pt") as opened:
            names.append(set(opened.keys()))
    assert names[0] == names[1]
    assert not [name for name in names[1] if "_orig_mod" in name]
    for name, each in other.model.named_parameters():
        assert not torch.equal(each, start[name]), name


@needs_compiler
def test_inductor_gives_the_encoder_that_eager_gives():
    torch.manual_seed(0)
    encoder = unit_model().vision_model
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state
    torch._dynamo.reset()
    for block in encoder_blocks(unit_model_of(encoder)):
        block.compile()
    with torch.no_grad():  # half of the compilation
        found = encoder(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def unit_model_of(encoder):
    model = unit_model()
    model.vision_model = encoder
    return model


@pytest.mark.parametrize("name", ["clip_vision_model", "dinov3_vit", "radio", "vit"])
def test_every_encoder_has_its_blocks_and_the_decoder_is_left_alone(name):
    model = unit_model(vision=CONFIG_MAPPING[name](**PLAIN[name][1]))
    inside = {id(each) for each in model.vision_model.modules()}
    blocks = encoder_blocks(model)
    assert len(blocks) == 2
    assert all(id(each) in inside for each in blocks)


def test_without_a_compiler_it_is_refused(data, tmp_path, monkeypatch):  # noqa: F811
    def none(device):
        raise ValueError("training.torch_compile needs a C++ compiler on a CPU, and there is none.")

    monkeypatch.setattr(compiled, "check_compiler", none)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        train(IntraScaleTrainer, tmp_path, data, torch_compile=True)
