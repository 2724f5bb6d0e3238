"""What the trainers of all stages share: time limit, whole checkpoints, a watched loss, averages of weights."""

from __future__ import annotations

from .averaging import WeightAverages
from .checkpoints import WholeCheckpoints
from .guard import LossGuard
from .schedule import TimeLimit


class BaseTrainer(WeightAverages, LossGuard, WholeCheckpoints, TimeLimit):
    """transformers' `Trainer` that ends by the clock (`schedule.py`), never loses its run (`checkpoints.py`), stops
    when its loss is lost (`guard.py`) and can end with an average of its weights (`averaging.py`)."""
