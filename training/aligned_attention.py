"""The decoder's attention where one head's weights are wanted: for the alignment loss (`training/losses.py`).

The loss looks at the first head of each layer. transformers' eager attention would return all heads' weights, hold
them in float32 and carry gradients of zeros through them; this returns the first head's alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from modeling_unit.attention_unit import short_attention
from modeling_unit.encoder_unit import eager_attention_forward

ALIGNED = "unit_aligned"  # the implementation's name


def aligned_attention(module, query, key, value, attention_mask, scaling, dropout: float = 0.0, **kwargs):
    """In the form of transformers' attention interface: `(B, T, H, d)` and the first head's weights `(B, 1, T, T)`.

    `attention_mask`: `None` for causal attention over a whole sequence, else `(B, 1, T, keys)`, True where to look.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    if attention_mask is None and not dropout and query.shape[2] == key.shape[2]:
        return short_attention(query, key, value, scaling, causal=True, first_head=True)
    if attention_mask is None:  # of a step with a cache, whose queries are the last keys
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
    # the least number and not minus infinity: a row in which nothing may be seen stays a number
    bias = torch.zeros_like(attention_mask, dtype=torch.float32).masked_fill(
        ~attention_mask, torch.finfo(torch.float32).min
    )
    attended, weights = eager_attention_forward(module, query, key, value, bias, scaling, dropout)
    return attended, weights[:, :1]


AttentionInterface.register(ALIGNED, aligned_attention)
AttentionMaskInterface.register(ALIGNED, sdpa_mask)


def return_first_head(language_model: nn.Module) -> None:
    """Let a decoder return the attention weights that the alignment loss reads."""
    language_model.set_attn_implementation(ALIGNED)
