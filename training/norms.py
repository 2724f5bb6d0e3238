"""RMSNorm of a language decoder in fewer passes over memory, for training on a CPU.

transformers writes it out as seven operators, each of which reads and writes the whole tensor, and autograd writes
out its derivative likewise; on a CPU these passes cost a small decoder more than its matrix products do. Here the
same formula is one operator with a derivative of its own.
"""

from __future__ import annotations

import types

import torch
from torch import nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, eps, dtype):
        # hidden (..., D), weight (D,); y = weight * x / sqrt(mean(x^2) + eps)
        wide = hidden.float()
        width = wide.shape[-1]
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, slope):
        hidden, weight, scale = ctx.saved_tensors
        width = hidden.shape[-1]
        normed = hidden.float() * scale
        product = normed * slope
        to_weight = product.reshape(-1, width).sum(dim=0) if ctx.needs_input_grad[1] else None
        shared = torch.mv(product.reshape(-1, width), weight).div_(width).view_as(scale)
        to_hidden = (slope * weight).addcmul_(normed, shared, value=-1).mul_(scale)
        return to_hidden.to(hidden.dtype), to_weight, None, None


def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    narrow = torch.is_autocast_enabled("cpu")
    if (
        hidden_states.device.type != "cpu"
        or not self.training
        or torch.compiler.is_compiling()
        or weight.dtype != torch.float32
        or not (narrow or hidden_states.dtype == torch.float32)
    ):
        return type(self).forward(self, hidden_states)
    # what a float32 stream is normed for are matrix products, which autocast would narrow one by one; the norms of
    # queries and keys, narrow already, are widened by the weight as in transformers
    wide = not narrow or hidden_states.dtype != torch.float32
    dtype = torch.float32 if wide else torch.get_autocast_dtype("cpu")
    return _RMSNorm.apply(hidden_states, weight, self.variance_epsilon, dtype)


def quicken_norms(model: nn.Module) -> int:
    """Let the RMSNorms of a Llama or Qwen kind, `weight * x / rms(x)`, train by the operator above, in place; returns
    how many. On another device than a CPU, and in evaluation, they run as they did."""
    count = 0
    for module in model.modules():
        plain = type(module).__name__.endswith("RMSNorm") and type(module).__module__.startswith("transformers.")
        # others (Gemma's, which adds 1 to its weight) name their epsilon otherwise
        if plain and hasattr(module, "variance_epsilon") and set(module._parameters) == {"weight"}:
            module.forward = types.MethodType(_forward, module)
            count += 1
    return count
