"""What LoRA at one scale does to the other: documents at x4 and pictures at x1 alone, against both scales of both.

    python -m benchmarks.lora_scales [--steps 40] [--preset encoder] [--rates 5e-4 2e-3]

From the checkpoint that ships, the two recipes of `training/recipes/lora` are run for a few steps each, on a quarter
of their micro-batches, at the same rates, seed and number of steps: stage 1 shows each kind at one scale, stage 2 at
both. Then every model is shown the same held-out rows at both scales, unchanged by training: `L_lan` of each group,
the cosine distance of pictures to the teacher's features, and how far the patch features of each group have moved from
the start's (one less their mean cosine). Needs the built data sets (`unit data`): lines, chunks and pictures, train
and held out; where they are not, the benchmark says so and leaves itself out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from training.evaluation.report import machine, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "training" / "recipes" / "lora"
START = ROOT / "modeling_unit" / "checkpoints" / "unit-tiny"
TEACHER = ROOT / "modeling_unit" / "checkpoints" / "unit-tiny-teacher"
WAYS = {"one scale": "1-intra-scale.yaml", "mixed": "2-inter-scale.yaml"}
HELD_OUT = {
    "lines-train": "lines-development",
    "chunks-train": "chunks-validation",
    "pictures-train": "pictures-validation",
}
GROUPS = ("document_x4", "document_x1", "natural_x1", "natural_x4")


def train(way: str, preset: str, rate: float, steps: int, folder: Path) -> Path:
    """Run a recipe for a few steps on a quarter of its micro-batch; returns the merged model's folder."""
    from training import recipe

    settings = yaml.safe_load((RECIPES / WAYS[way]).read_text())
    for group in settings["groups"]:
        for key in ("rows", "patches"):
            if key in group:
                group[key] = max(1, group[key] // 4)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    changes = [f"start={START}", f"teacher={TEACHER}", f"lora={preset}", "lora.warn_single_scale=false"]
    changes += [
        f"training.max_steps={steps}",
        f"training.learning_rate={rate}",
        f"training.output_dir={folder / 'out'}",
    ]
    changes += ["training.save_strategy='no'", "training.disable_tqdm=true", "training.warmup_steps=5"]
    return recipe.main(path, changes)


def held_out(batches: int):
    """The same micro-batches of validation rows for every model, pixels normalised."""
    from modeling_unit import UnitConfig, UnitProcessor
    from training.collator import normalized_pixels
    from training.plan_step import scratch_arguments
    from training.recipe import read_recipe, stage_data

    recipe = read_recipe(RECIPES / WAYS["mixed"])
    for group in recipe.groups:
        for source in group["sources"]:
            source["path"] = HELD_OUT[source["path"]]
    arguments = scratch_arguments({"max_steps": batches, "seed": 99})
    processor = UnitProcessor.from_pretrained(START)
    data = stage_data(recipe, arguments, processor, UnitConfig.from_pretrained(START))
    found = []
    for step in range(batches):
        batch = data[step]
        for group in batch.values():
            for key in ("pixel_values", "teacher_pixel_values"):
                if key in group:
                    group[key] = normalized_pixels(group[key], processor.image_processor)
        found.append(batch)
    return found


@torch.no_grad()
def measure(folder: Path, batches: list[dict]) -> dict[str, dict[str, object]]:
    """By group: mean `L_lan`, mean cosine distance of pictures to the teacher, patch features of every micro-batch."""
    from transformers import AutoModelForPreTraining

    from modeling_unit import UnitVisionModel

    model = AutoModelForPreTraining.from_pretrained(folder, dtype=torch.float32).eval()
    teacher = UnitVisionModel.from_pretrained(TEACHER).eval()
    out: dict[str, dict[str, object]] = {name: {"language": 0.0, "cosine": 0.0, "features": []} for name in GROUPS}
    for batch in batches:
        for name, group in batch.items():
            group = dict(group)
            for key in ("character_classes", "token_places"):
                group.pop(key, None)
            small = group.pop("teacher_pixel_values", group["pixel_values"])
            if name.startswith("natural"):
                side = tuple(each // teacher.config.patch_size for each in small.shape[-2:])
                features = teacher(small).last_hidden_state
                group |= {"teacher_features": features, "teacher_grid": side}
                group |= {"teacher_token_mask": torch.ones(features.shape[:2], dtype=torch.bool)}
            made = model(**group)
            out[name]["language"] += float(made.language_loss) / len(batches)
            if made.vision_cosine is not None:
                out[name]["cosine"] += float(made.vision_cosine) / len(batches)
            out[name]["features"].append(made.image_features.patches)
    return out


def drift(found: list[torch.Tensor], start: list[torch.Tensor]) -> float:
    """One less the mean cosine between the patch features of two models."""
    pairs = zip(found, start, strict=True)
    return 1.0 - float(torch.cat([F.cosine_similarity(a, b, dim=-1).flatten() for a, b in pairs]).mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_scales", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--preset", choices=("encoder", "decoder", "both"), default="encoder")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--batches", type=int, default=12, help="held-out micro-batches")
    arguments = parser.parse_args(argv)
    print(machine(), flush=True)
    try:
        batches = held_out(arguments.batches)
    except (OSError, ValueError) as error:
        print(f"lora_scales: left out: {str(error).splitlines()[0]}")
        return
    start = measure(START, batches)
    rows = []
    for rate, way in [(None, "start"), *((rate, way) for rate in arguments.rates for way in WAYS)]:
        with tempfile.TemporaryDirectory() as folder:
            found = start
            if rate is not None:
                found = measure(train(way, arguments.preset, rate, arguments.steps, Path(folder)), batches)
        row = [way, "" if rate is None else f"{rate:g}"]
        for name in GROUPS:
            row.append(f"{found[name]['language']:.3f}")
        row += [f"{found[name]['cosine']:.3f}" for name in GROUPS[2:]]
        row += [f"{drift(found[name]['features'], start[name]['features']):.3f}" for name in GROUPS]
        print(" ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
    header = ["LoRA", "rate", *(f"L_lan {name}" for name in GROUPS), *(f"cosine {name}" for name in GROUPS[2:])]
    print("\n" + markdown_table(header + [f"moved {name}" for name in GROUPS], rows))
    print(
        f"\npreset {arguments.preset}, {arguments.steps} steps each; one scale: documents at x4 and pictures at x1 "
        "alone; less is better, of what moved too where the start was good"
    )


if __name__ == "__main__":
    main()
