"""A loss that is no number, or runs away: what stops, what goes on, and what is left behind."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_trainer import arguments, data, mixture, model_and_teacher  # noqa: F401
from transformers import TrainerCallback

from modeling_unit.packing_unit import pack_images
from training import guard
from training.guard import FLOOR, WARM, DivergenceRule, RunStopped, write_offending
from training.trainer import IntraScaleTrainer

CONSTANT = {"lr_scheduler_type": "constant", "logging_steps": 1}


class Weights(TrainerCallback):
    """The weights behind each step."""

    def __init__(self):
        self.behind = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.behind.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def spoilt(data, out, factors, **changes):  # noqa: F811
    """A trainer whose loss is multiplied by `factors[i]` in micro-batch i, and the weights behind each step."""
    model, teacher = model_and_teacher()
    settings = arguments(out, **CONSTANT | changes)
    length = settings.max_steps * settings.gradient_accumulation_steps
    weights = Weights()
    trainer = IntraScaleTrainer(
        model=model, args=settings, train_dataset=mixture(data, length=length), teacher=teacher, callbacks=[weights]
    )
    compute_loss, calls = trainer.compute_loss, iter(range(length))

    def changed(*args, **kwargs):
        return compute_loss(*args, **kwargs) * factors.get(next(calls), 1.0)

    trainer.compute_loss = changed
    return trainer, weights.behind


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_change(data, tmp_path, value):  # noqa: F811
    trainer, behind = spoilt(data, tmp_path, {5: value}, max_steps=4, gradient_accumulation_steps=2)
    with pytest.raises(RunStopped) as error:
        trainer.train()
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"Step 3: the loss is {value}")
    assert f"Its micro-batches are in {tmp_path}/offending/step-3." in line
    assert len(behind) == 2
    assert same(trainer.model.state_dict(), behind[1])
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2]


def test_the_offending_micro_batches_are_saved_as_the_model_got_them(data, tmp_path):  # noqa: F811
    trainer, _ = spoilt(data, tmp_path, {5: math.nan}, max_steps=4, gradient_accumulation_steps=2)
    with pytest.raises(RunStopped):
        trainer.train()
    folder = tmp_path / "offending" / "step-3" / "rank-0"
    names = {"facts.json", "contact-sheet.png", "micro-batch-0.safetensors", "micro-batch-1.safetensors"}
    assert {each.name for each in folder.iterdir()} == names
    fresh = mixture(data, length=8)
    for number in range(2):
        saved = load_file(folder / f"micro-batch-{number}.safetensors")
        item = fresh[4 + number]
        given = {f"{name}/{key}" for name in item for key in item[name]}
        assert set(saved) == given | {"natural_x1/teacher_token_mask"}  # the trainer's, of the tokens in C
        for name, group in item.items():
            for key, tensor in group.items():
                assert torch.equal(saved[f"{name}/{key}"], tensor), key
    facts = json.loads((folder / "facts.json").read_text())
    assert (facts["step"], facts["loss"], facts["grad_norm"]) == (3, "nan", "nan")
    for number, rows in enumerate(facts["rows"]):
        for group in fresh.groups:
            expected = [f"row {position}: test/{position}" for _, position in group.batch(4 + number)[1]]
            assert [row.split(", ")[1] for row in rows[group.arguments.name]] == expected
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.width > 200


def test_gradients_that_are_no_numbers_stop_the_run_too(data, tmp_path):  # noqa: F811
    trainer, behind = spoilt(data, tmp_path, {}, max_steps=2, max_grad_norm=0.0)
    trainer.model.connector.fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunStopped, match=r"Step 1: the loss is \d+\.\d+, the norm of the gradients (nan|inf)"):
        trainer.train()
    assert behind == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_may_be_left_out(data, tmp_path, optimizer, capsys):  # noqa: F811
    settings = {"max_steps": 4, "nonfinite": "skip", "optimizer": optimizer}
    trainer, behind = spoilt(data, tmp_path, {2: math.nan}, **settings)
    trainer.train()
    assert same(behind[2], behind[1])  # no decay and no momentum either
    assert not same(behind[3], behind[2])
    assert "Step 3: the loss is nan, the norm of the gradients nan: left out." in capsys.readouterr().out
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in logs] == [None, None, 1, 1]
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert (tmp_path / "offending" / "step-3").is_dir()


def test_too_many_in_a_row_are_not_left_out(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(guard, "SKIPS", 2)
    factors = dict.fromkeys([0, 1, 3, 4, 5, 6], math.nan)
    trainer, behind = spoilt(data, tmp_path, factors, max_steps=8, nonfinite="skip")
    with pytest.raises(RunStopped, match=r"Step 6: .* after 2 steps in a row that were left out"):
        trainer.train()
    assert same(behind[-1], behind[2])


def test_a_loss_that_runs_away_stops_the_run_and_its_first_step_is_kept(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(guard, "WARM", 4)
    factors = dict.fromkeys(range(6, 11), 100.0)
    changes = {"max_steps": 12, "divergence_factor": 10.0, "divergence_steps": 3, "learning_rate": 1e-6}
    trainer, _ = spoilt(data, tmp_path, factors, **changes)
    with pytest.raises(RunStopped, match=r"Step 9: the loss has been above .* for 3 steps"):
        trainer.train()
    facts = json.loads((tmp_path / "offending" / "step-7" / "rank-0" / "facts.json").read_text())
    assert facts["loss"] > facts["limit"] > 0


# -- the rule --------------------------------------------------------------------------------------


def test_the_rule_by_hand():
    rule = DivergenceRule(4.0, 3)
    assert not any(rule.broken_by(1000.0 if step == 7 else 2.0) for step in range(WARM))  # too early to judge
    assert rule.limit == 8.0
    assert [rule.broken_by(loss) for loss in (8.1, 8.1, 8.0, 9.0, 9.0, 9.0)] == [False] * 5 + [True]
    assert rule.limit == 8.0  # what lies above it does not move it


def test_near_zero_the_floor_counts():
    rule = DivergenceRule(4.0, 1)
    assert not any(rule.broken_by(0.001) for _ in range(WARM))
    assert rule.limit == 4.0 * FLOOR


def test_without_a_factor_there_is_no_limit():
    rule = DivergenceRule(0.0, 1)
    assert not any(rule.broken_by(10.0**step) for step in range(WARM + 20))


def test_the_rule_goes_on_with_the_run(data, tmp_path):  # noqa: F811
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight, _ = spoilt(data, tmp_path, {}, **settings)
    straight.train()
    resumed, _ = spoilt(data, tmp_path, {}, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(straight.rule.losses) == 4
    assert resumed.rule.losses == straight.rule.losses


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nonfinite": "ignore"}, 'nonfinite must be "stop" or "skip"'),
        ({"divergence_factor": -1.0}, "divergence_factor must not be negative"),
        ({"divergence_steps": 0}, "divergence_steps must be 1 or more"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **changes)


# -- what is drawn ---------------------------------------------------------------------------------


def test_packs_are_drawn_image_by_image(tmp_path):
    pack = pack_images([torch.rand(3, 16, 24), torch.rand(3, 8, 8)], 8)
    write_offending(tmp_path, {"step": 1, "loss": math.inf}, [{"document_x4": pack}])
    assert set(load_file(tmp_path / "micro-batch-0.safetensors")) == {f"document_x4/{key}" for key in pack}
    assert (tmp_path / "contact-sheet.png").is_file()


def test_pixels_that_are_no_numbers_are_red(tmp_path):
    from training.guard import _png

    pixels = torch.zeros(3, 4, 4)
    pixels[:, 0, 0] = 1.0
    pixels[1, 2, 3] = math.nan
    (tmp_path / "a.png").write_bytes(_png(pixels))
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((3, 2)) == (255, 0, 0)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((1, 1)) == (0, 0, 0)


def test_a_batch_without_images_is_saved_without_a_sheet(tmp_path):
    write_offending(tmp_path, {"step": 1, "loss": 1.0}, [{"step": torch.tensor(3), "positions": torch.arange(4)}])
    assert {each.name for each in tmp_path.iterdir()} == {"facts.json", "micro-batch-0.safetensors"}
