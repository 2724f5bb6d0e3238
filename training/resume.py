"""Whether a run may go on from what another one left in its folder: the recipes, key by key.

Free to change are keys that leave the curve as it is [ours]: where and how often is logged, saved and evaluated, how
many processes and dataloader workers do the work (`gradient_accumulation_steps` as long as the micro-batches of a
step, of all processes, stay as many), threads, gradient checkpointing, compiled blocks, where the teacher's features
are kept, what a run does when its loss is lost, the push to the Hub; a preset of LoRA, whose values are keys of their
own; and `max_steps` where the learning rate does not depend on it
(`constant`, `constant_with_warmup` with warm-up in steps, no `max_minutes`). Numbers of processes and threads and
compiled blocks change the rounding of sums, not what is learnt.

`data.ranks` and `data.streams` are the checkpoint's where a recipe does not give them (see `data/streaming.py`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .arguments import LoraArguments, UnitTrainingArguments
from .checkpoints import read_manifest
from .data.settings import DataArguments
from .live import LiveArguments

FREE = {
    "threads",
    "data.ranks",
    "data.streams",
    "training.output_dir",
    "training.report_to",
    "training.run_name",
    "training.project",
    "training.disable_tqdm",
    "training.log_level",
    "training.log_level_replica",
    "training.log_on_each_node",
    "training.gradient_accumulation_steps",  # counted as micro-batches of a step
    "training.gradient_checkpointing",
    "training.gradient_checkpointing_kwargs",
    "training.teacher_cache",
    "training.teacher_cache_gigabytes",
    "training.use_cpu",
    "training.nonfinite",
    "training.divergence_factor",
    "training.divergence_steps",
    "training.push_to_hub",
    "training.load_best_model_at_end",
    "training.metric_for_best_model",
    "training.greater_is_better",
    "lora.preset",
    "lora.warn_single_scale",
}
FREE_BEGINNINGS = ("training.logging_", "training.save_", "training.eval_", "training.dataloader_", "training.hub_")
FREE_BEGINNINGS += ("training.trackio", "training.ddp_", "training.early_stopping_", "training.torch_compile")
FREE_BEGINNINGS += ("evaluation.",)
SETTINGS = {"training": UnitTrainingArguments, "lora": LoraArguments, "live": LiveArguments, "data": DataArguments}
STEP = "micro-batches of a step"


def facts_of(recipe: Any, batches_per_step: int) -> dict[str, Any]:
    """What a checkpoint keeps of its recipe, see `manifest.json`."""
    return {"recipe": json.loads(json.dumps(dataclasses.asdict(recipe))), "batches_per_step": batches_per_step}


def facts_left(run: str | Path, checkpoint: str | Path | None) -> dict[str, Any]:
    """[`facts_of`] the run that left `checkpoint`, or else a finished model with its `recipe.json`; empty when
    unknown."""
    manifest = (read_manifest(checkpoint) if checkpoint is not None else None) or {}
    if "recipe" in manifest:
        return {key: manifest[key] for key in ("recipe", "batches_per_step")}
    try:
        return {"recipe": json.loads((Path(run) / "recipe.json").read_text())}
    except (OSError, ValueError):
        return {}


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys in which two runs differ so that their curves do, each with both values; `None` for one not given."""
    if "recipe" not in before:
        return {}
    old, new = _flat(before["recipe"]), _flat(now["recipe"])
    found = {}
    for key in dict.fromkeys([*old, *new]):
        one, other = (each[key] if key in each else _default(key) for each in (old, new))
        if one != other and not _is_free(key, old, new):
            found[key] = (one, other)
    steps = before.get("batches_per_step"), now["batches_per_step"]
    if steps[0] is not None and steps[0] != steps[1]:
        found[STEP] = steps
    return found


def told_differences(found: dict[str, tuple[Any, Any]]) -> str:
    """`key: before -> now`, in one line."""
    return "; ".join(f"{key}: {_told(one)} -> {_told(other)}" for key, (one, other) in found.items())


def _told(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


def _is_free(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    known = key.split(".")[0] in {each.name for each in _recipe_fields()}
    if not known or key in FREE or key.startswith(FREE_BEGINNINGS):
        return True  # recipe.json holds more than the recipe
    return key == "training.max_steps" and all(_is_open_ended(each) for each in (old, new))


def _is_open_ended(recipe: dict[str, Any]) -> bool:
    """Whether the learning rate of a step is the same however many steps there are."""
    warm = recipe.get("training.warmup_steps", 0) or 0
    kind, minutes = (recipe.get(key, _default(key)) for key in ("training.lr_scheduler_type", "training.max_minutes"))
    steady = kind == "constant" or (kind == "constant_with_warmup" and warm >= 1)
    return steady and not minutes and not recipe.get("training.warmup_ratio")


def _recipe_fields() -> tuple[dataclasses.Field, ...]:
    from .recipe import Recipe

    return dataclasses.fields(Recipe)


def _default(key: str) -> Any:
    """What holds where a recipe does not give a key, `None` when unknown."""
    part, _, name = key.partition(".")
    for each in dataclasses.fields(SETTINGS[part]) if part in SETTINGS else _recipe_fields():
        if each.name == (name if part in SETTINGS else key):
            if each.default is not dataclasses.MISSING:
                return each.default
            return each.default_factory() if each.default_factory is not dataclasses.MISSING else None
    return None


def _flat(given: Any, above: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by their dotted keys; what is empty is not given."""
    if isinstance(given, dict | list):
        pairs = given.items() if isinstance(given, dict) else enumerate(given)
        found: dict[str, Any] = {}
        for key, value in pairs:
            found |= _flat(value, f"{above}.{key}" if above else str(key))
        return found
    return {} if given is None else {above: given}
