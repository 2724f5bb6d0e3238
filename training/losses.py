"""What the losses of the two stages count, and the auxiliary losses of early training from scratch [ours].

The method's own two losses are put together in `UnitTrainer.compute_loss`. The auxiliary ones are options of a recipe,
off in the paper's recipes: a PDF and a renderer know where each character stands, which teaches a small encoder to see
characters, and a small decoder where to look, within minutes on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

EMPTY_SLOT = 0.1  # weight of a slot without a character beside one with: most are empty [ours]
# SplitMix64 (Steele, Lea and Flood, 2014): the step of its counter and the two multipliers of its mixer, as int64
_STEP, _MIX_1, _MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass
class Counted:
    """A term of a loss as the sum over counted things and how many these are; where they weigh differently, the sum of
    their weights. Both `()`, or both of one shape for several terms."""

    total: torch.Tensor
    count: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """0 where nothing was counted."""
        return self.total / self.count.clamp(min=torch.finfo(torch.float32).tiny)


def sampled_tokens(row_seeds: torch.Tensor, tokens: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which tokens are in the random subset C [paper]: a function of a picture's seed and the token's number alone, so
    that a picture has the same C in whatever micro-batch, on whatever device and rank it comes.

    Args:
        row_seeds, tokens: int64 of shapes that broadcast. ratio: share of the tokens, in steps of 2^-24.
    """
    bits = row_seeds + (tokens + 1) * _STEP  # SplitMix64; int64 wraps as uint64 does
    bits = (bits ^ _right(bits, 30)) * _MIX_1
    bits = (bits ^ _right(bits, 27)) * _MIX_2
    return _right(bits ^ _right(bits, 31), 40) < round(ratio * 2**24)


def _right(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Shift right, zeros coming in: int64 would bring in its sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, `(B, T)`, of logits `(B, T, V)` and targets `(B, T)`; 0 where a target is -100."""
    targets = targets.to(logits.device)
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return each.view_as(targets)


def slot_weights(classes: torch.Tensor) -> torch.Tensor:
    """What each slot counts for the character loss: 1 with a character, `EMPTY_SLOT` without."""
    return torch.where(classes > 0, 1.0, EMPTY_SLOT)


def character_loss(logits: torch.Tensor, classes: torch.Tensor) -> tuple[Counted, Counted]:
    """Cross-entropy of the characters in each patch.

    Args:
        logits: `(B, N, slots * classes)` from the character head. classes: `(B, N, slots)`, 0 for no character.

    Returns:
        the loss over slots by their [`slot_weights`]; filled slots named right, over filled slots.
    """
    batch, patches, slots = classes.shape
    logits = logits.reshape(batch, patches, slots, -1).float()
    filled = classes > 0
    each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").reshape(classes.shape)
    weights = slot_weights(classes)
    with torch.no_grad():
        right = ((logits.argmax(dim=-1) == classes) & filled).sum()
    return Counted((each * weights).sum(), weights.sum()), Counted(right, filled.sum())


def alignment_loss(
    attentions: tuple[torch.Tensor, ...], token_places: torch.Tensor, first_layer: int = 1, head: int = 0
) -> tuple[Counted, Counted]:
    """Teach one attention head of each decoder layer to look at the visual token that holds the next character.

    Args:
        attentions: for each layer `(B, heads, T, T)`, rows sum to 1; visual tokens are positions 0 ... K - 1.
        token_places: `(B, T)`, index of the visual token that the label at each position shows, -1 for none.
        first_layer: layers before it are left alone: they gather what was read so far.

    Returns:
        negative log of the attention on the right visual token, mean over layers, over positions; positions whose
        attention peaks there in the last layer, over positions.
    """
    if len(attentions) <= first_layer:
        raise ValueError(
            f"The alignment loss teaches decoder layers from {first_layer} on: it needs at least {first_layer + 1} "
            f"layers, got {len(attentions)}. Set alignment_weight to 0 or give the decoder more layers."
        )
    wanted = token_places[:, 1:]  # position t predicts label t + 1
    valid = wanted >= 0
    count = valid.sum()
    gather = wanted.clamp(min=0).unsqueeze(-1)
    total = 0.0
    for attention in attentions[first_layer:]:
        weights = attention[:, head, :-1]  # (B, T - 1, T)
        hit = weights.gather(2, gather).squeeze(-1).float().clamp(min=1e-6)
        total = total - (hit.log() * valid).sum()
    with torch.no_grad():
        peaks = (weights.argmax(dim=-1) == wanted) & valid
    return Counted(total / (len(attentions) - first_layer), count), Counted(peaks.sum(), count)
