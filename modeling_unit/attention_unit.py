"""Exact attention for the short sequences of training on a CPU, with a backward pass of its own.

Shapes: B sequences, H heads, T tokens, d = D / H.

torch's kernel for CPUs never holds the square of attention, and pays for it with many small matrix products: below
some hundred tokens most of its backward pass is their overhead. Here the square is one tensor in the type of the
computation (bfloat16 under autocast), written once forward and once backward [ours, measured]. Longer sequences
stay with the kernel, so memory stays linear in tokens.
"""

import torch

# Up to so many tokens the square of attention is small beside what a block keeps for its backward pass [ours]
SHORT = 256


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scaling, causal, first_head):
        # (B, H, T, d) each; scores and weights (B, H, T, T)
        scores = torch.matmul(query, key.transpose(-1, -2))
        if scaling != 1.0:
            scores.mul_(scaling)
        if causal:
            side = scores.shape[-1]
            later = torch.ones(side, side, dtype=torch.bool, device=scores.device).triu(1)
            scores.masked_fill_(later, float("-inf"))
        first = torch.softmax(scores[:, :1].float(), dim=-1) if first_head else None
        weights = torch.softmax(scores, dim=-1)
        attended = torch.matmul(weights, value)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scaling = scaling
        return attended, first

    @staticmethod
    def backward(ctx, slope, first_slope):
        query, key, value, weights = ctx.saved_tensors
        slope = slope.to(value.dtype)
        to_value = torch.matmul(weights.transpose(-1, -2), slope)
        to_weights = torch.matmul(slope, value.transpose(-1, -2))
        if first_slope is not None:
            to_weights[:, :1] += first_slope.to(to_weights.dtype)
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        if ctx.scaling != 1.0:
            to_scores.mul_(ctx.scaling)
        to_query = torch.matmul(to_scores, key)
        to_key = torch.matmul(to_scores.transpose(-1, -2), query)
        return to_query, to_key, to_value, None, None, None


def short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    causal: bool = False,
    first_head: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(B, H, T, d)` each to `(B, T, H, d)`, and the first head's weights `(B, 1, T, T)` in float32 when wanted.

    Under autocast the products are in its type, as those of torch's own attention are.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        query, key, value = (each.to(narrow) for each in (query, key, value))
    with torch.autocast(device_type=device, enabled=False):
        attended, first = _ShortAttention.apply(query, key, value, scaling, causal, first_head)
    return attended.transpose(1, 2), first


def suits_short_attention(query: torch.Tensor, dropout: float) -> bool:
    """Whether [`short_attention`] is the faster way to train: on a CPU, in bfloat16, without dropout, up to
    [`SHORT`] tokens. `query` `(B, H, T, d)`."""
    if query.device.type != "cpu" or dropout or query.shape[-2] > SHORT:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return kind == torch.bfloat16
