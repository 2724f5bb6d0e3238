"""The terms of the loss between two lines of the log."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from .data.settings import TASKS
from .losses import Counted


class TermLog:
    """Sums of terms by `group/term`, kept where they lie: reading one would make the device wait at every step.

    A `*` in a key stands for the tasks: such a term has `len(TASKS)` numbers, one for each.
    """

    def __init__(self):
        self.terms: dict[str, Counted] = {}
        self.weights: dict[str, float] = {}  # of the terms that the loss is the sum of

    def add(self, key: str, term: Counted, weight: float | None = None) -> None:
        long = _long(term.total.device)
        total, count = term.total.detach().to(long), term.count.detach().to(long)
        if key in self.terms:
            total, count = total + self.terms[key].total, count + self.terms[key].count
        self.terms[key] = Counted(total, count)
        if weight is not None:
            self.weights[key] = weight

    def clear(self) -> None:
        self.terms.clear()
        self.weights.clear()

    def gathered(self, ranks: int = 1) -> dict[str, list[Any]]:
        """[`state`] summed over the ranks, which must all ask."""
        if ranks <= 1:
            return self.state()
        sums: dict[str, list[Any]] = {}
        for state in gather_object([self.state()]):
            for key, (total, count, weight) in state.items():
                before = sums.get(key, [0.0, 0.0])
                sums[key] = [
                    (np.asarray(one) + other).tolist() for one, other in zip((total, count), before[:2], strict=True)
                ]
                sums[key].append(weight)
        return sums

    def state(self) -> dict[str, list[Any]]:
        """Total, count and weight of each term, for JSON."""
        return {
            key: [each.total.tolist(), each.count.tolist(), self.weights.get(key)] for key, each in self.terms.items()
        }

    def load(self, state: dict[str, list[Any]], device: torch.device) -> None:
        for key, (total, count, weight) in state.items():
            total, count = (torch.tensor(each, dtype=_long(device), device=device) for each in (total, count))
            self.add(key, Counted(total, count), weight)


def _long(device: torch.device) -> torch.dtype:
    """For sums over many steps, in which float32 would lose labels; MPS has nothing longer."""
    return torch.float32 if device.type == "mps" else torch.float64


def means(sums: dict[str, list[Any]]) -> dict[str, float]:
    """What is logged of [`TermLog.gathered`]: the mean of each term over all that was counted, and as `loss` the
    weighted sum of those that have a weight; tasks only of groups that have rows of several."""
    told: dict[str, float] = {}
    loss = 0.0
    for key, (total, count, weight) in sums.items():
        if not key.endswith("*"):
            mean = total / count if count else 0.0
            loss += 0.0 if weight is None else weight * mean
            told[key] = round(mean, 5)
        elif sum(each > 0 for each in count) > 1:
            parts = zip(TASKS, total, count, strict=True)
            told |= {key.replace("*", task): round(part / each, 5) for task, part, each in parts if each}
    weighted = any(weight is not None for _, _, weight in sums.values())
    return told | {"loss": loss} if weighted else told
