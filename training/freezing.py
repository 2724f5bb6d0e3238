"""Which parts of a model train, and how its encoder sees positions meanwhile."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from .arguments import UnitTrainingArguments
from .optim import PARTS, part_of


def freeze_parts(model: nn.Module, parts: list[str]) -> None:
    """Stop the gradients of whole parts (`encoder`, `connector`, `language_decoder`, ...).

    Raises:
        ValueError: for a part that does not exist.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"Unknown parts to freeze: {sorted(unknown)}. Known: {', '.join(PARTS)}.")
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def unread_parts(arguments: UnitTrainingArguments, has_teacher: bool) -> list[str]:
    """Parts that no term of the loss reads. They would get no gradient; frozen, they are not counted as trained, and
    DDP does not wait for their gradients."""
    unread = [] if arguments.language_weight else ["connector", "language_decoder"]
    unread += [] if arguments.vision_weight and has_teacher else ["vision_decoder", "projection"]
    return unread + ([] if arguments.character_weight else ["heads"])


def trainable_table(model: nn.Module) -> str:
    """What trains, part by part: tensors and parameters, trained and frozen."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, parameter in model.named_parameters():
        entry = counts[part_of(name)]
        entry[0] += parameter.numel()
        if parameter.requires_grad:
            entry[1] += parameter.numel()
            entry[2] += 1
    lines = [f"{'part':<18}{'parameters':>14}{'trained':>14}{'tensors':>9}"]
    for part, (total, trained, tensors) in counts.items():
        lines.append(f"{part:<18}{total:>14,}{trained:>14,}{tensors:>9}")
    total, trained, tensors = (sum(entry[index] for entry in counts.values()) for index in range(3))
    lines.append(f"{'all':<18}{total:>14,}{trained:>14,}{tensors:>9}")
    return "\n".join(lines)


def set_position_crop(encoder: nn.Module, crop: bool | None) -> None:
    """Whether an encoder sees random crops of its positions in training, and now and then none: see `cpe_crop` and
    `cpe_drop_prob` of [`UnitVisionConfig`]. `None` leaves both as they are.

    Raises:
        ValueError: crops are asked of an encoder of another architecture.
    """
    config = encoder.config
    if crop and not hasattr(config, "cpe_crop"):
        raise ValueError(
            f"training.position_crop: a {config.model_type} does not crop its positions; only UNIT's own encoder does."
        )
    if crop is not None and hasattr(config, "cpe_crop"):
        config.cpe_crop = crop
        config.cpe_drop_prob = config.cpe_drop_prob if crop else 0.0
