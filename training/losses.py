"""Auxiliary losses of early training from scratch [ours]; the method's own two losses live beside the models.

Both are options of a recipe, off in the paper's recipes: a PDF and a renderer know where each character stands, which
teaches a small encoder to see characters, and a small decoder where to look, within minutes on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def character_loss(logits: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the characters in each patch.

    Args:
        logits: `(B, N, slots * classes)` from the character head. classes: `(B, N, slots)`, 0 for no character.

    Returns:
        the loss, in which empty slots weigh a tenth of filled ones (most slots are empty);
        the share of filled slots named right.
    """
    batch, patches, slots = classes.shape
    logits = logits.reshape(batch, patches, slots, -1).float()
    filled = classes > 0
    each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").reshape(classes.shape)
    weights = torch.where(filled, 1.0, 0.1)
    loss = (each * weights).sum() / weights.sum()
    with torch.no_grad():
        right = ((logits.argmax(dim=-1) == classes) & filled).sum() / filled.sum().clamp(min=1)
    return loss, right


def alignment_loss(
    attentions: tuple[torch.Tensor, ...], token_places: torch.Tensor, first_layer: int = 1, head: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Teach one attention head of each decoder layer to look at the visual token that holds the next character.

    Args:
        attentions: for each layer `(B, heads, T, T)`, rows sum to 1; visual tokens are positions 0 ... K - 1.
        token_places: `(B, T)`, index of the visual token that the label at each position shows, -1 for none.
        first_layer: layers before it are left alone: they gather what was read so far.

    Returns:
        mean negative log of the attention on the right visual token, over layers and positions; the share of positions
        whose attention peaks there in the last layer.
    """
    if len(attentions) <= first_layer:
        raise ValueError(
            f"The alignment loss teaches decoder layers from {first_layer} on: it needs at least {first_layer + 1} "
            f"layers, got {len(attentions)}. Set alignment_weight to 0 or give the decoder more layers."
        )
    wanted = token_places[:, 1:]  # position t predicts label t + 1
    valid = wanted >= 0
    count = valid.sum().clamp(min=1)
    gather = wanted.clamp(min=0).unsqueeze(-1)
    total = 0.0
    for attention in attentions[first_layer:]:
        weights = attention[:, head, :-1]  # (B, T - 1, T)
        hit = weights.gather(2, gather).squeeze(-1).float().clamp(min=1e-6)
        total = total - (hit.log() * valid).sum() / count
    with torch.no_grad():
        peaks = (weights.argmax(dim=-1) == wanted) & valid
    return total / (len(attentions) - first_layer), peaks.sum() / count
