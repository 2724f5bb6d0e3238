"""A recipe's training step: images a second, share of the machine's bf16 rate, share of time spent waiting for data.

    python -m benchmarks.training_step [RECIPE] [key=value ...] [--steps 20]
    python -m benchmarks.training_step RECIPE --synthetic [--device cuda]
    python -m benchmarks.training_step [RECIPE] [key=value ...] --ways

Runs the recipe's own trainer on the recipe's own data for a few steps and saves nothing. The data and the teacher must
be there (`make data`, and the recipe's stage before); where they are not, the benchmark says so and leaves itself out.

A step's operations are counted from the shapes of its batch, padding included: three forward passes for what trains
(forward, and twice that backward), one for the teacher. What a recipe freezes is counted as if it trained. Waiting for
data is the time between the end of a step and the start of the next. Target: under 5%.

Two shares are printed. Of the bf16 rate: the step's operations over what the machine's best matrix product would do in
the same time, all else (attention's softmax, norms, optimiser, data) counted as loss. Of its shapes: the time that the
step's own largest matrix products take one by one, as measured here, over the time of the step. Targets: 60% of the
rate at x4 on a CPU, 45% of peak on a GPU.

`--synthetic` needs no data and no weights: the recipe's model with random weights on made-up micro-batches of the
shapes that `unit plan` assumes, on a GPU where there is one (`training_step training/recipes/vit-h/1-intra-scale.yaml
--synthetic`).

`--ways` takes the recipe's first micro-batches with each of the faster ways through a step put back in turn
(`attention_unit.py`, `aligned_attention.py`, `norms.py`, logits of the text alone), in turns in one process, with the
loss of each from the same random numbers: what each is worth, and that the loss stays.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModel, TrainerCallback

from benchmarks.common import decoder_flops, encoder_flops, matmul_rate, peak_memory, synchronise, training_flops
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
        length = batch["input_ids"].shape[1]
        # every weight of the connector meets every visual token once
        unshuffle = config.connector_config.unshuffle
        visual = math.ceil(rows / unshuffle) * math.ceil(cols / unshuffle)
        if config.connector_config.connector_type == "qformer":
            visual = config.connector_config.num_queries
        forward += decoder_flops(config.text_config, length, labelled=length - visual)
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


def captured(recipe_path: Path, overrides: list[str], folder: str):
    """The trainer that `unit train` would set off, with its model, teacher and data, before its first step."""
    from training import recipe
    from training.trainer import UnitTrainer

    class Ready(Exception):
        pass

    found = []

    def stop(trainer, **kwargs):
        found.append(trainer)
        raise Ready

    bounds = ["training.max_steps=100", f"training.output_dir={folder}", "training.save_strategy='no'"]
    with patch.object(UnitTrainer, "train", stop), contextlib.suppress(Ready):
        recipe.main(recipe_path, [*overrides, *bounds])
    if not found:
        raise ValueError(f"{recipe_path} is no recipe of the two stages")
    return found[0]


def synthetic(recipe_path: Path, overrides: list[str], folder: str, device: str):
    """A recipe's trainer with random weights, and a micro-batch of the shapes that its plan assumes."""
    from modeling_unit import UnitForPreTraining, UnitVisionModel
    from modeling_unit.architectures_unit import architecture
    from training.aligned_attention import return_first_head
    from training.arguments import UnitTrainingArguments
    from training.plan import Assumed, assumed_batch, describe
    from training.plan_step import _inputs
    from training.publish import take_hub_settings
    from training.recipe import read_recipe
    from training.trainer import InterScaleTrainer, IntraScaleTrainer, freeze_parts

    recipe = read_recipe(recipe_path, overrides)
    if recipe.stage not in ("intra_scale", "inter_scale"):
        raise ValueError(f"{recipe_path} is no recipe of the two stages")
    settings = take_hub_settings(recipe.training)[0] | {"output_dir": folder, "report_to": "none", "max_steps": 100}
    settings |= {"per_device_train_batch_size": 1, "remove_unused_columns": False, "use_cpu": device == "cpu"}
    if recipe.threads and device == "cpu":
        torch.set_num_threads(recipe.threads)
    arguments = UnitTrainingArguments(**settings)
    described = describe(recipe, recipe_path)
    model = UnitForPreTraining(described.config)
    if arguments.alignment_weight:
        return_first_head(model.language_model)
    freeze_parts(model, arguments.freeze)
    teacher = None
    if described.teacher is not None:
        ours = architecture(described.teacher).ours
        teacher = (UnitVisionModel._from_config if ours else AutoModel.from_config)(described.teacher)
    stage = IntraScaleTrainer if recipe.stage == "intra_scale" else InterScaleTrainer
    trainer = stage(model=model, args=arguments, teacher=teacher, image_processor=described.images, train_dataset=[0])
    trainer.text_behind = True
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    batch = {}
    generator = torch.Generator().manual_seed(0)
    for shape in assumed_batch(recipe, described, Assumed()):
        group = _inputs(model, shape, arguments)
        length = group["input_ids"].shape[1]
        ids = torch.randint(6, 200, (shape.rows, length), generator=generator)
        visual = length - shape.text
        labels = ids.clone()
        ids[:, :visual], labels[:, : visual + 1] = described.config.image_token_id, -100
        group |= {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        group["token_places"] = torch.where(labels >= 0, ids % visual, -1)
        for name in ("pixel_values", "teacher_pixel_values"):
            if name in group:
                group[name] = torch.randint(0, 256, group[name].shape, generator=generator, dtype=torch.uint8)
        batch[shape.name] = group
    return trainer, [batch]


class Steps:
    """A trainer's step taken by hand: `training_step`, clipped gradients, optimiser."""

    def __init__(self, trainer):
        trainer.create_optimizer_and_scheduler(100)
        trainer.current_gradient_accumulation_steps = 1
        self.trainer = trainer
        self.model = trainer.accelerator.prepare_model(trainer.model)
        self.optimizer = trainer.accelerator.prepare_optimizer(trainer.optimizer)
        self.model.train()

    def loss(self, batch: dict[str, dict]) -> float:
        """Forward and backward pass; the gradients are left."""
        return float(self.trainer.training_step(self.model, {name: dict(group) for name, group in batch.items()}))

    def update(self) -> None:
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()


def products_seconds(step, device: str, most: int = 40, seconds: float = 0.1) -> tuple[float, float]:
    """Seconds that the matrix products and attention of a rehearsed step take one by one on this machine, its `most`
    largest measured and the rest at their mean rate; and the share of FLOPs measured."""
    from training.plan import _median_time, _stand_in

    heavy = sorted(step.operators.items(), key=lambda item: -item[1][1])[:most]
    done, taken = 0, 0.0
    with torch.device(device):
        for key, (calls, flops, _) in heavy:
            work = _stand_in(key)
            if work is None or not flops:
                continue

            def finished(work=work):
                work()
                synchronise(device)

            done, taken = done + flops, taken + calls * _median_time(finished, seconds)
    return taken * step.flops / max(done, 1), done / max(step.flops, 1)


def rehearsed(recipe_path: Path, overrides: list[str], batch: dict[str, dict], gpu: bool):
    """The operators of one micro-batch, from its shapes (see `training/plan_step.py`)."""
    from training.plan import describe, empty_models
    from training.plan_step import GroupShape, rehearse, scratch_arguments
    from training.publish import take_hub_settings
    from training.recipe import read_recipe

    recipe = read_recipe(recipe_path, overrides)
    arguments = scratch_arguments(take_hub_settings(recipe.training)[0])
    described = describe(recipe, recipe_path)
    patch_size = described.config.vision_config.patch_size
    connector = described.config.connector_config
    shapes = []
    for name, group in batch.items():
        if "image_grid_hw" in group:
            raise ValueError("packs have no shapes to rehearse")
        grid = tuple(side // patch_size for side in group["pixel_values"].shape[-2:])
        visual = connector.num_queries
        if connector.connector_type == "mlp":
            visual = math.prod(math.ceil(side / connector.unshuffle) for side in grid)
        small = group.get("teacher_pixel_values")
        small = None if small is None else tuple(side // patch_size for side in small.shape[-2:])
        shapes.append(GroupShape(name, len(group["pixel_values"]), grid, group["input_ids"].shape[1] - visual, small))
    model, teacher = empty_models(described, recipe, arguments)
    return rehearse(model, teacher, arguments, described.images, shapes, like_gpu=gpu)


def measure_synthetic(options, folder: str, device: str) -> None:
    trainer, batches = synthetic(options.recipe, options.overrides, folder, device)
    steps, work, optimiser = Steps(trainer), [], []
    for turn in range(WARMUP + options.steps):
        synchronise(device)
        begin = time.perf_counter()
        steps.loss(batches[0])
        synchronise(device)
        middle = time.perf_counter()
        steps.update()
        synchronise(device)
        if turn >= WARMUP:
            work.append(middle - begin)
            optimiser.append(time.perf_counter() - middle)
    reads = trainer.args.language_weight > 0
    flops, images, _ = count(trainer.accelerator.unwrap_model(steps.model), batches[0], reads)
    rate = matmul_rate(
        torch.bfloat16, device=device, sides=(2048, 4096, 8192) if device == "cuda" else (512, 1024, 2048)
    )
    accumulated = trainer.args.gradient_accumulation_steps
    taken = statistics.median(work) + statistics.median(optimiser) / accumulated
    alone, share = products_seconds(rehearsed(options.recipe, options.overrides, batches[0], device == "cuda"), device)
    row = [options.recipe.parent.name + "/" + options.recipe.name, f"{statistics.median(work):.3f}"]
    row += [f"{statistics.median(optimiser):.3f}", f"{images / taken:.1f}", f"{flops / 1e9:.0f}"]
    row += [f"{rate / 1e9:.0f}", f"{100 * flops / taken / rate:.0f}%", f"{100 * alone / taken:.0f}%"]
    header = ["recipe", "micro-batch s", "optimiser s", "images/s", "GFLOP", "GFLOP/s of bf16", "of bf16 rate"]
    print("\n" + markdown_table([*header, f"of its shapes ({100 * share:.0f}% measured)"], [row]))


def ways(trainer) -> dict[str, contextlib.AbstractContextManager]:
    """The step as it is, with each faster way put back, and with all of them."""
    from training.aligned_attention import ALIGNED
    from training.trainer import UnitTrainer, _unwrapped

    model = _unwrapped(trainer.model)

    @contextlib.contextmanager
    def eager():
        decoder = model.language_model
        if decoder.config._attn_implementation != ALIGNED:
            yield
            return
        decoder.set_attn_implementation("eager")
        try:
            yield
        finally:
            decoder.set_attn_implementation(ALIGNED)

    @contextlib.contextmanager
    def plain_norms():
        quick = [module for module in model.modules() if "forward" in vars(module) and "RMSNorm" in str(type(module))]
        kept = [module.__dict__.pop("forward") for module in quick]
        try:
            yield
        finally:
            for module, forward in zip(quick, kept, strict=True):
                module.forward = forward

    @contextlib.contextmanager
    def all_logits():
        trainer.text_behind = False
        try:
            yield
        finally:
            trainer.text_behind = True

    def kernel():
        return patch("modeling_unit.encoder_unit.suits_short_attention", lambda *_: False)

    @contextlib.contextmanager
    def every():
        with contextlib.ExitStack() as stack:
            for each in (eager, plain_norms, all_logits, kernel):
                stack.enter_context(each())
            yield

    assert isinstance(trainer, UnitTrainer)
    return {
        "as it is": contextlib.nullcontext,
        "encoder: torch's attention": kernel,
        "decoder: eager attention": eager,
        "norms as transformers": plain_norms,
        "mask, logits of all positions": all_logits,
        "all of these": every,
    }


def compare_ways(options, folder: str) -> None:
    """Print the table of `--ways`: CPU seconds too, for a machine that others use."""
    trainer = captured(options.recipe, options.overrides, folder)
    batches = [trainer.train_dataset[index] for index in range(4)]
    steps = Steps(trainer)
    wall: dict[str, list[float]] = {}
    spent: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    for turn in range(1 + options.rounds):
        for name, way in ways(trainer).items():
            torch.manual_seed(0)
            trainer._sampler.manual_seed(0)
            total, begin, used = 0.0, time.perf_counter(), time.process_time()
            with way():
                for batch in batches:
                    total += steps.loss(batch)
                    steps.model.zero_grad()
            if turn:
                wall.setdefault(name, []).append(time.perf_counter() - begin)
                spent.setdefault(name, []).append(time.process_time() - used)
            losses[name] = total / len(batches)
    now = statistics.median(wall["as it is"])
    rows = []
    for name in wall:
        one = statistics.median(wall[name])
        row = [name, f"{one / len(batches):.3f}", f"{min(wall[name]) / len(batches):.3f}", f"{one / now:.2f}"]
        rows.append([*row, f"{min(spent[name]) / min(spent['as it is']):.2f}", f"{losses[name]:.5f}"])
    header = ["put back", "median s", "least s", "median, as it is = 1", "least CPU time, as it is = 1", "loss"]
    print("\n" + markdown_table(header, rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `unit train`")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--synthetic", action="store_true", help="random weights, made-up micro-batches of its shapes")
    parser.add_argument("--ways", action="store_true", help="each faster way put back in turn")
    parser.add_argument("--rounds", type=int, default=5, help="of --ways")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_intermixed_args(argv)
    print(machine(arguments.device), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if arguments.synthetic:
                measure_synthetic(arguments, folder, arguments.device)
                return
            if arguments.ways:
                compare_ways(arguments, folder)
                return
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
