"""LoRA by peft: encoder, language decoder, or both; everything else trains in full or is frozen as the recipe says."""

from __future__ import annotations

from torch import nn

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


def add_lora(model: nn.Module, arguments: LoraArguments) -> nn.Module:
    """Wrap a model with LoRA adapters on the parts named, or return it as it is when there are none.

    Raises:
        ValueError: for a part that takes no adapter.
    """
    if not arguments.parts:
        return model
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
    )
    return get_peft_model(model, config)
