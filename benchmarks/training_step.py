"""A recipe's training step: images a second, share of the machine's bf16 rate, share of time spent waiting for data.

    python -m benchmarks.training_step [RECIPE] [key=value ...] [--steps 20]

Runs the recipe's own trainer on the recipe's own data for a few steps and saves nothing. The data and the teacher must
be there (`make data`, and the recipe's stage before); where they are not, the benchmark says so and leaves itself out.

A step's operations are counted from the shapes of its batch, padding included: three forward passes for what trains
(forward, and twice that backward), one for the teacher. What a recipe freezes is counted as if it trained. Waiting for
data is the time between the end of a step and the start of the next. Target: under 5%.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from benchmarks.common import decoder_flops, encoder_flops, matmul_rate, peak_memory, training_flops
from training.evaluation.report import machine, markdown_table

RECIPE = Path(__file__).resolve().parents[1] / "training" / "recipes" / "unit-tiny" / "2-intra-scale.yaml"
WARMUP = 3


def group_flops(model, name: str, batch: dict, reads: bool = True) -> int:
    """FLOPs of training on one group of a micro-batch.

    Args:
        name: of the group, such as ``"natural_x1"``: pictures have the teacher and the vision decoder besides.
        batch: the group's tensors, see training/collator.py.
        reads: the connector and the language decoder take part (`language_weight` is above 0).
    """
    config = model.config
    patch = config.vision_config.patch_size
    if "image_grid_hw" in batch:
        return sum(group_flops(model, name, alone, reads) for alone in unpacked(batch, patch))
    images, _, height, width = batch["pixel_values"].shape
    rows, cols = height // patch, width // patch
    forward = encoder_flops(config.vision_config, rows, cols)
    if reads:
        forward += decoder_flops(config.text_config, batch["input_ids"].shape[1])
        # every weight of the connector meets every visual token once
        unshuffle = config.connector_config.unshuffle
        visual = math.ceil(rows / unshuffle) * math.ceil(cols / unshuffle)
        if config.connector_config.connector_type == "qformer":
            visual = config.connector_config.num_queries
        forward += 2 * visual * sum(weight.numel() for weight in model.connector.parameters() if weight.dim() == 2)
    if "character_classes" in batch:
        forward += 2 * rows * cols * model.character_head.weight.numel()
    total = training_flops(forward)
    if name.startswith("natural"):
        seen = batch.get("teacher_pixel_values", batch["pixel_values"])
        teacher_rows, teacher_cols = (side // patch for side in seen.shape[-2:])
        tokens = teacher_rows * teacher_cols + 1
        weights = model.vision_decoder.fc1.weight.numel() + model.vision_decoder.fc2.weight.numel()
        total += training_flops(2 * tokens * weights)
        total += encoder_flops(config.vision_config, teacher_rows, teacher_cols)
    return images * total


def unpacked(batch: dict, patch: int) -> Iterator[dict]:
    """The images of a packed group as groups of one image each, pixels as shapes without content."""
    for index, grid in enumerate(batch["image_grid_hw"].tolist()):
        alone = {key: batch[key][index : index + 1] for key in ("input_ids",) if key in batch}
        alone["pixel_values"] = torch.empty(1, 3, *(patch * side for side in grid), device="meta")
        if "character_classes" in batch:
            alone["character_classes"] = None
        if "teacher_grid" in batch:
            seen = batch["teacher_grid"][index].tolist()
            alone["teacher_pixel_values"] = torch.empty(1, 3, *(patch * side for side in seen), device="meta")
        yield alone


class Stopwatch(TrainerCallback):
    """Times of each step in seconds: ``work`` from its start to its end, ``wait`` from the end before to its start."""

    def __init__(self):
        self.work: list[float] = []
        self.wait: list[float] = []
        self._last: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self._last is not None:
            self.wait.append(now - self._last)
        self._last = now

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.work.append(now - self._last)
        self._last = now


def measure(recipe_path: Path, overrides: list[str], steps: int, folder: str):
    """Run ``steps`` steps after a warm-up; returns their times, and FLOPs, images and patches of each micro-batch.

    `unit train` itself is run, its trainer's `train` wrapped to hang a stopwatch and a counter on the trainer.

    Raises:
        ValueError: the recipe cannot run here, as a rule because its data or teacher is not there yet.
    """
    from training import recipe
    from training.trainer import UnitTrainer

    bounds = [f"training.max_steps={WARMUP + steps}", f"training.output_dir={folder}", "training.save_strategy='no'"]
    overrides = [*overrides, *bounds]
    if recipe.read_recipe(recipe_path, overrides).stage == "teacher":
        raise ValueError(f"{recipe_path} trains a teacher; this benchmark measures the two stages")
    stopwatch, counted = Stopwatch(), []
    train = UnitTrainer.train

    def measured_train(trainer, **kwargs):
        compute_loss = trainer.compute_loss

        def count_and_compute_loss(model, inputs, **more):
            if trainer.state.global_step >= WARMUP:
                reads = trainer.args.language_weight > 0
                counted.append(count(trainer.accelerator.unwrap_model(model), inputs, reads))
            return compute_loss(model, inputs, **more)

        trainer.add_callback(stopwatch)
        trainer.compute_loss = count_and_compute_loss
        return train(trainer, **kwargs)

    with patch.object(UnitTrainer, "train", measured_train):
        recipe.main(recipe_path, overrides)
    return stopwatch.work[WARMUP:], stopwatch.wait[WARMUP - 1 :], counted


def count(model, inputs: dict[str, dict], reads: bool) -> tuple[int, int, int]:
    """FLOPs, images and patches (padding included) of a micro-batch of groups."""
    patch_size = model.config.vision_config.patch_size
    images = patches = 0
    for group in inputs.values():
        pixels = group["pixel_values"]
        if "image_grid_hw" in group:
            images, patches = images + len(group["image_grid_hw"]), patches + len(pixels)
        else:
            images += len(pixels)
            patches += pixels.shape[0] * pixels.shape[2] * pixels.shape[3] // patch_size**2
    return sum(group_flops(model, name, group, reads) for name, group in inputs.items()), images, patches


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `unit train`")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args(argv)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        try:
            work, wait, counted = measure(arguments.recipe, arguments.overrides, arguments.steps, folder)
        except (OSError, ValueError) as error:
            print(f"training_step: left out: {str(error).splitlines()[0]}")
            return
    rate = matmul_rate(torch.bfloat16)
    print(f"matrix products in bfloat16: {rate / 1e9:.0f} GFLOP/s")
    flops, images, patches = (sum(column) for column in zip(*counted, strict=True))
    total = sum(work) + sum(wait)
    row = [
        arguments.recipe.name,
        f"{statistics.median(work):.3f}",
        f"{images / total:.1f}",
        f"{patches / total:.0f}",
        f"{flops / len(work) / 1e9:.0f}",
        f"{100 * flops / total / rate:.0f}%",
        f"{100 * sum(wait) / total:.1f}%",
        f"{peak_memory(resource.getrusage(resource.RUSAGE_SELF)) / 1e6:.0f}",
    ]
    header = ["recipe", "step s", "images/s", "patches/s", "GFLOP/step", "of bf16 rate", "waiting for data", "peak MB"]
    print("\n" + markdown_table(header, [row]))


if __name__ == "__main__":
    main()
