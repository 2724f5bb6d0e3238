"""Stop reading that goes round in circles, and keep what was read before it did.

Decoders that read pages fall into loops where they lose their place (Nougat, GOT and others report it on up to a
tenth of real pages). A loop is a suffix of period p that has come at least `min_repeats` times and is long in all.
Leaders and rules (".....", "- - - -") are loops by that measure too, and rightly so on a page: periods of one and two
pieces need to be longer than a line of dots is.

Lengths count pieces of the tokenizer. The thresholds are ours, for a tokenizer of single bytes and chunks of up to
three lines.
"""

from collections.abc import Sequence

import torch
from transformers import StoppingCriteria


class RepetitionStopper(StoppingCriteria):
    """Ends each row of a batch that has begun to repeat itself, for `generate(stopping_criteria=[...])`.

    Args:
        prompt_length: leading positions of `input_ids` that were given, not generated; they are never looked at.
        max_period: longest period looked for.
        min_repeats: fewest copies of the period, the first among them.
        min_length: fewest pieces in all copies together.
        leader_length: the same for periods of one and two pieces: dots of a table of contents, rules.
        every: the check is made at every so many new pieces; a loop is found that much later at most.

    Attributes:
        fired: `(B,)` bool, True for the rows it ended; `None` before the first step.
    """

    def __init__(
        self,
        prompt_length: int,
        max_period: int = 32,
        min_repeats: int = 4,
        min_length: int = 96,
        leader_length: int = 160,
        every: int = 4,
    ):
        if min(max_period, min_length, leader_length, every) < 1 or min_repeats < 2 or prompt_length < 0:
            raise ValueError(
                "RepetitionStopper: max_period, min_length, leader_length and every must be at least 1, min_repeats "
                f"at least 2 and prompt_length at least 0; got {max_period}, {min_length}, {leader_length}, {every}, "
                f"{min_repeats}, {prompt_length}."
            )
        self.prompt_length = prompt_length
        self.max_period = max_period
        self.min_repeats = min_repeats
        self.min_length = min_length
        self.leader_length = leader_length
        self.every = every
        self.fired: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores=None, **kwargs) -> torch.BoolTensor:
        """`input_ids`: `(B, T)`. Returns `(B,)`, True for rows that are to end."""
        if self.fired is None or self.fired.shape[0] != input_ids.shape[0]:
            self.fired = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        new = input_ids.shape[1] - self.prompt_length
        if new < min(self.min_length, self.leader_length) or new % self.every:
            return self.fired
        tail = input_ids[:, self.prompt_length :]
        for period in range(1, self.max_period + 1):
            needed = self.needed(period)
            if needed > new:
                continue
            last = tail[:, -needed:]
            loops = _repeats(last, period)
            if period > 2:  # a line of dots has every period: what it may be long is said by its shortest
                loops = loops & ~_repeats(last, 1) & ~_repeats(last, 2)
            self.fired = self.fired | loops
        return self.fired

    def needed(self, period: int) -> int:
        """Pieces that a suffix of this period must have to count as a loop."""
        return max(self.leader_length if period <= 2 else self.min_length, self.min_repeats * period)


def _repeats(ids: torch.Tensor, period: int) -> torch.Tensor:
    """`(B, T) -> (B,)`: whether a row is copies of its first `period` pieces all along."""
    return (ids[:, period:] == ids[:, :-period]).all(dim=1)


def trim_repetition(
    ids: Sequence[int], max_period: int = 32, min_repeats: int = 4, min_length: int = 96, leader_length: int = 160
) -> tuple[list[int], bool]:
    """What was read before a loop at the end of `ids`, with one copy of what was repeated, and whether there was a
    loop.

    The arguments are those of [`RepetitionStopper`].

    ```python
    >>> trim_repetition([5, 6, 7] + [1, 2, 3] * 4, min_length=12)
    ([5, 6, 7, 1, 2, 3], True)
    ```
    """
    ids = list(ids)
    stopper = RepetitionStopper(0, max_period, min_repeats, min_length, leader_length)
    for period in range(1, max_period + 1):
        start = len(ids) - period
        while start > 0 and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        needed = stopper.needed(period)
        if start < 0 or len(ids) - start < needed:
            continue
        last = torch.tensor([ids[-needed:]])
        if period <= 2 or not (_repeats(last, 1) | _repeats(last, 2)).item():
            return ids[: start + period], True
    return ids, False


def stutters(text: str) -> bool:
    """Whether a phrase comes twice in a row: two to six words of six letters or more, or a word three times.

    A reader that has lost its place for a moment says "the file the file was", and is as sure of it as of anything.
    Some lines are printed so; the answer is a reason to look again, not to throw away. [ours]
    """
    words = text.split()
    for size in range(1, 7):
        copies = 3 if size == 1 else 2
        for start in range(len(words) - copies * size + 1):
            phrase = words[start : start + size]
            if sum(map(str.isalpha, "".join(phrase))) < (2 if size == 1 else 6):
                continue
            if all(words[start + k * size : start + (k + 1) * size] == phrase for k in range(1, copies)):
                return True
    return False
