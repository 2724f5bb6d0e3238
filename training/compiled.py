"""`training.torch_compile`: the encoder's blocks, compiled one by one.

All blocks of an encoder run the same code on the same shapes, so one compilation serves them all, and takes a block's
time rather than the model's; text lengths, image sizes and losses stay outside. Blocks are compiled in place: names of
weights, checkpoints and saved models are what they are without. Packs are left alone, for every pack would be a
compilation of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from .optim import PARTS, part_of


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model's encoder, whichever it is."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and _is_encoders(f"{name}.")
    ]


def _is_encoders(name: str) -> bool:
    try:
        return part_of(name) == next(iter(PARTS))
    except ValueError:
        return False


def check_compiler(device: torch.device) -> None:
    """Raise `ValueError` where inductor would find nothing to compile with."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise ValueError("training.torch_compile needs a C++ compiler on a CPU, and there is none.") from error
    elif device.type == "cuda" and not torch.utils._triton.has_triton():
        raise ValueError("training.torch_compile needs Triton on a GPU, and it is not installed.")


class CompiledBlocks(Trainer):
    """A `Trainer` whose `torch_compile` compiles the encoder's blocks, with `torch_compile_backend` and
    `torch_compile_mode`, in place of the whole model.

    Raises:
        ValueError: there is no compiler.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.args.torch_compile:
            return
        groups = getattr(self.train_dataset, "groups", None) or []
        if any(getattr(each.collator, "packed", False) for each in groups):
            if self.is_world_process_zero():
                print(
                    "torch_compile: not used: images come in packs, each of which would be compiled anew.", flush=True
                )
            return
        if self.args.torch_compile_backend == "inductor":
            check_compiler(self.args.device)
        for block in encoder_blocks(self.model):
            block.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        settings = super()._build_accelerator_args(**kwargs)
        settings.pop("dynamo_plugin", None)  # it would compile the whole model, whose shapes change with every batch
        return settings
