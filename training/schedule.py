"""A run that ends by the clock: the learning rate falls with the share of the time that is spent [ours].

On a borrowed machine the time is known and the speed is not. `training.max_minutes` ends a run when its time is over,
with the learning rate at zero by then, whatever number of steps came of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from transformers import Trainer, TrainerCallback

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "linear": lambda share: 1.0 - share,
}


class TimedSchedule:
    """Factor of the learning rates, a function of the step for `LambdaLR`: warm-up by steps, then `cosine` or
    `linear` down to 0 over the larger of two shares, of the steps and of the seconds.

    `LambdaLR` saves the attributes of such an object with a checkpoint, so that a resumed run has only the time that
    is left. `spent` is the time of training so far, s; who owns the clock adds to it.
    """

    def __init__(self, shape: str, warmup_steps: int, max_steps: int, max_seconds: float):
        self.shape, self.warmup_steps, self.max_steps, self.max_seconds = shape, warmup_steps, max_steps, max_seconds
        self.spent = 0.0

    def share(self, step: int) -> float:
        """How much of the run lies behind, 0 to 1."""
        return min(1.0, max(step / self.max_steps, self.spent / self.max_seconds))

    def __call__(self, step: int) -> float:
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * SHAPES[self.shape](self.share(step))


class _Clock(TrainerCallback):
    """Adds what the clock says to `schedule.spent`, and ends the run when its time is over."""

    def __init__(self, trainer: TimeLimit):
        self.trainer = trainer
        self.last = 0.0

    def _read(self) -> TimedSchedule | None:
        now = time.monotonic()
        schedule = self.trainer.timed_schedule
        if schedule is not None:
            schedule.spent += now - self.last
        self.last = now
        return schedule

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()  # making the data ready and loading a checkpoint are no training

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._read()  # right before the scheduler asks

    def on_step_end(self, args, state, control, **kwargs):
        schedule = self.trainer.timed_schedule
        if schedule is not None and schedule.spent >= schedule.max_seconds:
            print(f"{args.max_minutes:g} minutes are over after {state.global_step} steps", flush=True)
            control.should_training_stop = True
            control.should_log = True
            control.should_save = args.save_strategy != "no"
        return control


class TimeLimit(Trainer):
    """A `Trainer` that keeps `max_minutes` of its arguments, 0 for no limit.

    Raises:
        ValueError: a limit with a `lr_scheduler_type` other than cosine and linear, or over several processes, whose
            clocks would disagree.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.timed_schedule: TimedSchedule | None = None
        if self.args.max_minutes > 0:
            if str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)) not in SHAPES:
                raise ValueError(f"max_minutes takes lr_scheduler_type {' or '.join(SHAPES)}.")
            if self.args.world_size > 1:
                raise ValueError("max_minutes works in one process only: give max_steps instead.")
            self.add_callback(_Clock(self))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.args.max_minutes <= 0 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        kind = self.args.lr_scheduler_type
        self.timed_schedule = TimedSchedule(
            str(getattr(kind, "value", kind)),
            self.args.get_warmup_steps(num_training_steps),
            num_training_steps,
            60.0 * self.args.max_minutes,
        )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.timed_schedule)
        self._created_lr_scheduler = True
        return self.lr_scheduler
