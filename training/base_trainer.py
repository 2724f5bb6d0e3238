"""What the trainers of all stages share: time limit, whole checkpoints, a watched loss, averages of weights, compiled
blocks, reports."""

from __future__ import annotations

from .averaging import WeightAverages
from .checkpoints import WholeCheckpoints
from .compiled import CompiledBlocks
from .guard import LossGuard
from .reporting import ReportingTrainer
from .schedule import TimeLimit


class BaseTrainer(WeightAverages, CompiledBlocks, ReportingTrainer, LossGuard, WholeCheckpoints, TimeLimit):
    """transformers' `Trainer` that ends by the clock (`schedule.py`), never loses its run (`checkpoints.py`), stops
    when its loss is lost (`guard.py`), can end with an average of its weights (`averaging.py`) and compiles the
    encoder's blocks (`compiled.py`); `reporting.py` tells how it goes."""
