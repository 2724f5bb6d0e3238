"""A run that ends by the clock, with a clock that ticks one second a step."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import training.live
import training.llava_data
import training.schedule as schedule
import training.teacher
import training.trainer
from training.arguments import UnitTrainingArguments
from training.optimizer_state import load_schedule
from training.schedule import TimedSchedule, TimeLimit


class Line(nn.Module):
    """One weight under mean squared error."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"loss": (self.weight * x - 1).square().mean()}


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second whenever it is read after the start of training, which is once a step."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=monotonic))
    return now


def train(out, resume=None, **changes) -> TimeLimit:
    settings = {"max_steps": 1000, "learning_rate": 0.5, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 1, "remove_unused_columns": False, "disable_tqdm": True}
    settings |= {"max_minutes": 10 / 60, "save_steps": 4, "dataloader_pin_memory": False}
    data = [{"x": torch.tensor(1.0)}] * 1000
    arguments = UnitTrainingArguments(output_dir=str(out), **(settings | changes))
    trainer = TimeLimit(model=Line(), args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rates(trainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_the_run_ends_in_time_with_the_rate_at_zero(tmp_path, ticking, capsys):
    trainer = train(tmp_path)
    assert trainer.state.global_step == 10  # seconds, one a step, of 1000 steps
    expected = [0.5 * 0.5 * (1 + math.cos(math.pi * second / 10)) for second in range(10)]
    assert rates(trainer) == pytest.approx(expected, abs=1e-9)
    assert max(trainer.lr_scheduler.get_last_lr()) == pytest.approx(0.0, abs=1e-9)
    assert (tmp_path / "checkpoint-10").is_dir()
    assert "minutes are over after 10 steps" in capsys.readouterr().out


def test_a_resumed_run_has_the_time_that_is_left(tmp_path, ticking):
    straight = train(tmp_path / "straight")
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-4"))
    assert resumed.state.global_step == 10
    assert rates(resumed) == pytest.approx(rates(straight), abs=1e-9)
    assert torch.equal(resumed.model.weight, straight.model.weight)


def test_a_changed_limit_holds_for_the_time_that_is_left():
    def at(max_seconds, steps=0, spent=0.0):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
        shape = schedule.TimedSchedule("linear", 0, 1000, max_seconds)
        found = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        shape.spent = spent
        for _ in range(steps):
            optimizer.step()
            found.step()
        return found, shape, optimizer

    before, _, _ = at(10.0, steps=4, spent=8.0)
    found, shape, optimizer = at(40.0)
    load_schedule(found, before.state_dict())
    assert (shape.spent, shape.max_seconds, found.last_epoch) == (8.0, 40.0, 4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 - 8 / 40))


def test_a_fast_run_ends_by_its_steps(tmp_path, ticking):
    trainer = train(tmp_path, max_steps=5, max_minutes=100.0, lr_scheduler_type="linear")
    assert trainer.state.global_step == 5
    assert rates(trainer) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_the_larger_share_counts_and_the_warm_up_is_in_steps():
    timed = TimedSchedule("linear", 4, 10, 100.0)
    assert timed(2) == pytest.approx(0.5 * 0.8)
    timed.spent = 50.0
    assert timed(2) == pytest.approx(0.5 * 0.5)
    assert timed(8) == pytest.approx(0.2)
    timed.spent = 1000.0
    assert timed(8) == 0.0


def test_without_a_limit_the_schedule_is_transformers_own(tmp_path, ticking):
    trainer = train(tmp_path, max_steps=4, max_minutes=0.0, lr_scheduler_type="constant")
    assert rates(trainer) == [0.5] * 4
    assert trainer.timed_schedule is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_minutes": -1.0}, "max_minutes must not be negative"),
        ({"lr_scheduler_type": "constant"}, "max_minutes takes lr_scheduler_type cosine or linear"),
    ],
)
def test_wrong_limits_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, **changes)


@pytest.mark.parametrize("name", ["TeacherTrainer", "LiveTeacherTrainer", "UnitTrainer", "LlavaTrainer"])
def test_the_trainer_of_every_stage_keeps_the_limit(name):
    modules = (training.live, training.teacher, training.trainer, training.llava_data)
    (found,) = {getattr(module, name) for module in modules if hasattr(module, name)}
    assert issubclass(found, TimeLimit)
