"""From a trained run to a folder that anyone can load: weights, code, configuration, processor, provenance."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForPreTraining, AutoProcessor

import modeling_unit
from modeling_unit import (
    UnitForConditionalGeneration,
    UnitForPreTraining,
    UnitImageProcessor,
    UnitModel,
    UnitProcessor,
)

# Files of a run that travel with its weights
PROVENANCE = ("recipe.json", "log.jsonl", "curve.png")


def code_files() -> list[Path]:
    """The flat files of `modeling_unit/` that ship with a checkpoint."""
    return sorted(Path(modeling_unit.__file__).parent.glob("*_unit.py"))


def export_model(
    source: str | Path, destination: str | Path, dtype: torch.dtype = torch.bfloat16, with_code: bool = True
) -> Path:
    """Write a trained UNIT model as a repository folder.

    The auxiliary character head is left out; the vision decoder and the projection stay.

    Args:
        source: folder of a run, as `unit train` saves it. destination: made when missing.
        dtype: of the weights on disk.
        with_code: False leaves out the model code, for a checkpoint that lies inside the package.
    """
    source, destination = Path(source), Path(destination)
    model = AutoModelForPreTraining.from_pretrained(source, num_character_classes=0)
    save_full(model, AutoProcessor.from_pretrained(source), destination, dtype)
    if not with_code:
        for file in code_files():
            (destination / file.name).unlink(missing_ok=True)
    for name in PROVENANCE:
        if (source / name).is_file():
            shutil.copy(source / name, destination / name)
    return destination


def save_full(
    model: UnitForPreTraining, processor: UnitProcessor, destination: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Weights, configuration with `auto_map` for every Auto class, processor, tokenizer, code."""
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(destination)
    processor.save_pretrained(destination)


def save_encoder(
    model: UnitForPreTraining | UnitForConditionalGeneration | UnitModel,
    processor: UnitImageProcessor | UnitProcessor | None,
    destination: str | Path,
) -> Path:
    """The encoder alone. One that transformers has (CLIP, ...) is saved as that plain class, with no code of ours and
    that architecture's own image processor; ours with its code and ours. LoRA adapters are merged in what is saved.

    Args:
        model: may still be wrapped by peft. processor: the one that the model was trained with.

    Raises:
        ValueError: when `destination` is a file.
    """
    return model.save_encoder(destination, getattr(processor, "image_processor", processor))
