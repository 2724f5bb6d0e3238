"""What the trainers of all stages share: time limit, whole checkpoints, a watched loss, reports."""

from __future__ import annotations

from .checkpoints import WholeCheckpoints
from .guard import LossGuard
from .reporting import ReportingTrainer
from .schedule import TimeLimit


class BaseTrainer(ReportingTrainer, LossGuard, WholeCheckpoints, TimeLimit):
    """transformers' `Trainer` that ends by the clock (`schedule.py`), never loses its run (`checkpoints.py`) and stops
    when its loss is lost (`guard.py`); `reporting.py` tells how it goes."""
