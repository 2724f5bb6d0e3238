"""LoRA by peft: encoder, language decoder, or both; everything else trains in full or is frozen as the recipe says.

| preset | adapters on | beside them, in full | frozen |
|---|---|---|---|
| `encoder` | every linear layer of the encoder's blocks | connector, vision decoder | language decoder |
| `decoder` | every linear layer of the language decoder's | connector, vision decoder | encoder |
| `both` | both | connector, vision decoder | embeddings, norms |

With `decoder` the encoder stays as it is, so that `L_vis` teaches the vision decoder alone: training.vision_weight=0
saves the teacher.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .arguments import LoraArguments

# Module names inside each part, matched with the part's prefix so that adapters do not leak from one part to another
TARGETS = {
    # names of UNIT's own, then of transformers' encoders; SigLIP's pooling head and ViT's pooler are left alone,
    # for nothing here reads what they give
    "encoder": r"vision_(model|tower)\.(?!(.*\.)?(head|pooler)\.).*\.(qkv|proj|fc1|fc2|q_proj|k_proj|v_proj|out_proj"
    r"|o_proj|gate_proj|up_proj|down_proj|weights_in|weights_out|query|key|value|dense)",
    "language_decoder": r"language_model\..*\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj"
    r"|down_proj)",
}
# Trained in full beside the adapters, and saved with them: they start from nothing. So does the auxiliary head [ours],
# which is there only when its loss is
FULL_PARTS = ["connector", "vision_decoder", "multi_modal_projector", "character_head"]


# All [ours]. Every linear layer, for adapters on attention alone learn less. Rank 32 where the encoder has to learn to
# read, 16 where a language decoder that knows its language follows. alpha = 2 r: one rate for all ranks. No dropout: a
# run sees a page few times, and dropout keeps a copy of every layer's input. The rate is ten times the paper's 5e-5
# for full training, for adapters start from nothing and have few directions to go; it is what a recipe gets that
# states none. The base in bfloat16 where the run computes in it.
COMMON = {"dropout": 0.0, "base_dtype": "auto"}
PRESETS: dict[str, dict[str, Any]] = {
    "encoder": {"parts": ["encoder"], "r": 32, "alpha": 64} | COMMON,
    "decoder": {"parts": ["language_decoder"], "r": 16, "alpha": 32} | COMMON,
    "both": {"parts": ["encoder", "language_decoder"], "r": 32, "alpha": 64} | COMMON,
}
PRESET_RATE = 5e-4


def expand_preset(recipe: dict[str, Any]) -> None:
    """Write a preset out where a recipe names one: `lora` becomes a mapping with all that the preset says, and
    `training.learning_rate` its rate unless the recipe states one. A recipe with adapters and no `stage` mixes the
    scales.

    Raises:
        ValueError: an unknown preset.
    """
    lora = recipe.get("lora")
    if isinstance(lora, str):
        lora = recipe["lora"] = {"preset": lora}
    if not lora or not isinstance(lora, dict):
        return
    lora = recipe["lora"] = {key: value for key, value in lora.items() if value is not None}
    recipe.setdefault("stage", "inter_scale")
    name = lora.get("preset")
    if not name:
        return
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"lora.preset must be one of {', '.join(PRESETS)}, got {name!r}.{hint}")
    recipe["lora"] = PRESETS[name] | lora
    training = recipe.get("training")
    if training is None:
        training = recipe["training"] = {}
    if isinstance(training, dict):
        training.setdefault("learning_rate", PRESET_RATE)


def add_lora(model: nn.Module, arguments: LoraArguments) -> nn.Module:
    """Wrap a model with LoRA adapters on the parts named, or return it as it is when there are none.

    Raises:
        ValueError: for a part that takes no adapter, an adapter that does not fit.
    """
    if not arguments.adapts:
        return model
    if arguments.adapter:
        from .adapter import go_on_with

        return go_on_with(model, arguments.adapter)
    unknown = set(arguments.parts) - set(TARGETS)
    if unknown:
        raise ValueError(f"LoRA takes the parts {', '.join(TARGETS)}; unknown: {sorted(unknown)}.")
    from peft import LoraConfig, get_peft_model

    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    pattern = "|".join(TARGETS[part] for part in arguments.parts)
    config = LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        target_modules=rf"(model\.)?({pattern})",  # LLaVA's parts lie inside its `model`
        # of those, what there is: peft asks an adapter for weights of all that it lists and the base has
        modules_to_save=[name for name in FULL_PARTS if name in present],
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        init_lora_weights=arguments.init,
    )
    return get_peft_model(model, config)


def adapted_parts(arguments: LoraArguments, model: nn.Module) -> set[str]:
    """Parts of the model that have adapters, by what it holds."""
    from .optim import part_of

    return {part_of(name) for name, _ in model.named_parameters() if ".lora_" in name} if arguments.adapts else set()


def single_scale(groups: Iterable[tuple[str, int]], adapted: Iterable[str]) -> str | None:
    """One line about what a run may spoil whose adapters of the encoder see a kind of image at one scale only; `None`
    where they see it at both.

    Args:
        groups: kind and scale of each. adapted: parts with adapters.
    """
    if "encoder" not in adapted:
        return None  # the encoder gives what it gave
    seen: dict[str, set[int]] = defaultdict(set)
    for kind, scale in groups:
        seen[kind].add(scale)
    alone = {kind: scales for kind, scales in seen.items() if len(scales) == 1}
    if not alone:
        return None
    only = " and ".join(f"{kind} images at x{scale}" for kind, (scale,) in sorted(alone.items()))
    other = " and ".join(f"{kind} images at x{5 - scale}" for kind, (scale,) in sorted(alone.items()))
    return (
        f"LoRA on the encoder sees {only} only: what it makes of {other} may be spoiled. stage: inter_scale mixes the "
        "scales; lora.warn_single_scale=false leaves this line out."
    )


def is_sharded(arguments: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed divide the weights, which want one dtype and move them about."""
    return bool(arguments.fsdp or arguments.deepspeed or os.environ.get("ACCELERATE_USE_FSDP"))


def is_lowered(lora: LoraArguments, arguments: TrainingArguments) -> bool:
    """Whether the frozen matrices of a run come in bfloat16.

    Raises:
        ValueError: they are asked to and cannot.
    """
    if lora.base_dtype == "float32" or not lora.adapts:
        return False
    able = arguments.bf16 and not is_sharded(arguments)
    if lora.base_dtype == "bfloat16" and not able:
        raise ValueError(
            "lora.base_dtype: bfloat16 needs training.bf16: true, with which products are in bfloat16."
            if not arguments.bf16
            else "lora.base_dtype: bfloat16 is for one device or DDP: FSDP and DeepSpeed want one dtype."
        )
    return able


# -- memory -------------------------------------------------------------------------------------------------------


def lower_frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Keep the frozen matrices of the layers that could take adapters in a shorter dtype, in place; returns the bytes
    saved.

    Under autocast such a layer rounds its weight, bias and input to bfloat16 anyway, so that a step computes the same;
    and autocast makes a new copy of a frozen weight in every forward pass, which the backward pass keeps. Outside of
    autocast these layers round their inputs themselves. Embeddings, of patches too, and norms stay.
    """
    pattern = re.compile(r"(.*\.)?(" + "|".join(TARGETS.values()) + ")")
    saved = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not pattern.fullmatch(name.removesuffix(".base_layer")):
            continue
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        for parameter in module.parameters(recurse=False):
            before = parameter.element_size()
            parameter.data = parameter.data.to(dtype)
            saved += (before - parameter.element_size()) * parameter.numel()
        module.register_forward_pre_hook(_round_input)
    return saved


def _round_input(module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].to(module.weight.dtype), *inputs[1:])


def share_frozen(teacher: nn.Module, model: nn.Module) -> int:
    """Let a frozen teacher use the model's weights where those are frozen and the same, as the base below adapters is
    that began as the teacher; returns the bytes that are no longer held twice.

    What [`lower_frozen`] has rounded is shared too: then the teacher rounds as the student does, to bfloat16's
    8 bits.
    """
    own: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "vision_model." in name:
            own[name.rpartition("vision_model.")[2].replace(".base_layer.", ".")] = parameter.data
    saved = 0
    for module_name, module in teacher.named_modules():
        pairs = []
        for name, parameter in module.named_parameters(recurse=False):
            theirs = own.get(f"{module_name}.{name}" if module_name else name)
            if theirs is None or type(theirs) is not type(parameter.data) or theirs.device != parameter.device:
                continue
            if theirs.element_size() > parameter.element_size():
                continue  # a teacher in bfloat16 stays so
            if theirs.shape == parameter.shape and torch.equal(theirs, parameter.data.to(theirs.dtype)):
                pairs.append((parameter, theirs))
        lowered = any(theirs.dtype != parameter.dtype for parameter, theirs in pairs)
        if lowered and (
            not isinstance(module, nn.Linear) or len(pairs) != len(list(module.parameters(recurse=False)))
        ):
            continue  # weight and bias go together
        for parameter, theirs in pairs:
            saved += parameter.numel() * parameter.element_size()
            parameter.data = theirs
        if lowered:
            module.register_forward_pre_hook(_round_input)
    return saved
