"""A run that has lost its way stops, and leaves the micro-batches at which it did.

Two things are watched at each optimiser step, when the gradients of all ranks are there and before the weights change:

- the loss or the norm of the gradients is no finite number. `training.nonfinite: stop` (the default) ends the run;
  `skip` leaves the step out, weights and optimiser's state as they were, and ends the run after `SKIPS` in a row;
- the loss diverges [ours]: it lies above `divergence_factor` times its running median, over the last `WINDOW` steps
  that did not, for `divergence_steps` steps in a row. The median is taken as `FLOOR` at least: near zero, a loss may
  well be a multiple of what it was. Nothing is judged before `WARM` steps.

What is saved: `OUTPUT_DIR/offending/step-N/rank-R/` with `micro-batch-I.safetensors` (the tensors as the model got
them), `contact-sheet.png`, and `facts.json` with the loss, the norm, and the rows' sources as far as they are known.

One number for each step is read from the device, instead of the one for each micro-batch that transformers reads to
keep such losses out of its log.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Trainer

from .adapter import replaced
from .checkpoints import checkpoints, first_line, is_writing_error

OFFENDING = "offending"  # folder of a run
WINDOW, WARM, FLOOR = 200, 50, 0.1  # steps, steps, loss [ours]
SKIPS = 10  # steps left out in a row, at most [ours]
SHOWN = 40  # images on a contact sheet


class RunStopped(ValueError):
    """The run must not go on; the message is one line."""


class DivergenceRule:
    """See this module's text.

    Args:
        factor: of the running median; 0 switches the rule off. steps: in a row.
    """

    def __init__(self, factor: float, steps: int):
        self.factor, self.steps = factor, steps
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.above = 0  # steps in a row

    @property
    def limit(self) -> float:
        """The loss above which a step counts."""
        if not self.factor or len(self.losses) < WARM:
            return math.inf
        return self.factor * max(FLOOR, statistics.median(self.losses))

    def broken_by(self, loss: float) -> bool:
        """Take the loss of a step; whether the run has diverged."""
        if loss > self.limit:
            self.above += 1
            return self.above >= self.steps
        self.above = 0
        self.losses.append(loss)
        return False


class LossGuard(Trainer):
    """A `Trainer` that watches its loss and its gradients, by `nonfinite`, `divergence_factor` and `divergence_steps`
    of its arguments.

    Raises:
        RunStopped: in training.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rule = DivergenceRule(self.args.divergence_factor, self.args.divergence_steps)
        self.skipped, self._in_a_row = 0, 0
        self._step_batches: list[Any] = []
        self._step_losses: list[torch.Tensor] = []
        self._first_above: tuple[int, dict[str, Any], list[Any]] | None = None
        if self.args.nonfinite == "stop":
            self.args.logging_nan_inf_filter = False  # nothing of the kind comes as far as the log
        elif self.is_deepspeed_enabled or self.args.fp16:
            raise ValueError("training.nonfinite=skip needs bf16 or float32, and no DeepSpeed, which skips by itself.")

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_batches.append(inputs)
        self._step_losses.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        batches, losses = self._step_batches, self._step_losses
        self._step_batches, self._step_losses = [], []
        if not losses:
            return grad_norm
        loss, norm, finite = self._judged(torch.stack(losses).sum(), grad_norm)
        step = self.state.global_step + 1
        if not finite:
            self._not_finite(step, {"loss": loss, "grad_norm": norm}, batches)
            for parameter in model.parameters():
                parameter.grad = None  # optimisers leave out what has no gradient
            return None
        self._in_a_row = 0
        above = self.rule.above
        diverged = self.rule.broken_by(loss)
        if self.rule.above == 0:
            self._first_above = None
        elif above == 0 or self._first_above is None:
            facts = {"loss": loss, "grad_norm": norm, "limit": self.rule.limit}
            self._first_above = (step, facts | {"rows": self.origins(len(batches))}, batches)
        if diverged:
            where = self._saved(*self._first_above)
            raise RunStopped(
                f"Step {step}: the loss has been above {self.rule.limit:.4g}, {self.rule.factor:g} times its running "
                f"median, for {self.rule.above} steps: the run has diverged and stops. {where}{self._last()} A lower "
                "learning rate may help (--accept-changes), or another training.divergence_factor (0: no limit)."
            )
        return grad_norm

    def _judged(self, loss: torch.Tensor, grad_norm: Any) -> tuple[float, float, bool]:
        """Mean loss over the ranks, this rank's norm, and whether they are finite on all ranks."""
        if grad_norm is None or self.args.fp16:  # there the scaler looks for gradients that overflow
            grad_norm = 0.0
        if hasattr(grad_norm, "full_tensor"):
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=loss.device)
        loss = loss.float()
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        facts = torch.stack([loss, norm, loss, bad.float()])
        if self.args.world_size > 1:
            shared = self.accelerator.reduce(torch.stack([loss.nan_to_num(), bad.float()]), "sum")
            facts = torch.stack([loss, norm, shared[0] / self.args.world_size, shared[1]])
        own, norm, mean, bad = facts.tolist()
        return (own if bad else mean), norm, not bad

    def _not_finite(self, step: int, facts: dict[str, Any], batches: list[Any]) -> None:
        self.skipped += 1
        self._in_a_row += 1
        what = f"Step {step}: the loss is {facts['loss']:.6g}, the norm of the gradients {facts['grad_norm']:.6g}"
        skips = self.args.nonfinite == "skip"
        where = self._saved(step, facts | {"rows": self.origins(len(batches))}, batches)
        if skips and self._in_a_row <= SKIPS:
            if self.is_world_process_zero():
                print(f"{what}: left out. {where}", flush=True)
            self.forget_terms()
            return
        if skips:
            raise RunStopped(
                f"{what}, after {SKIPS} steps in a row that were left out: the run stops. {where}{self._last()}"
            )
        raise RunStopped(
            f"{what}: the run stops before the weights change. {where}{self._last()} It would come to this step "
            "again: training.nonfinite=skip leaves such steps out."
        )

    def _last(self) -> str:
        found = checkpoints(self.args.output_dir)
        return f" The last checkpoint is {found[-1].name}." if found else " There is no checkpoint yet."

    def forget_terms(self) -> None:
        """Drop the terms of the loss that wait to be logged: some of them are no numbers."""

    # -- with the checkpoint ------------------------------------------------------------------------------------------

    def log_state(self) -> dict[str, Any]:
        rule = {"losses": list(self.rule.losses), "above": self.rule.above}
        return super().log_state() | {"guard": rule | {"skipped": self.skipped, "in_a_row": self._in_a_row}}

    def load_log_state(self, state: dict[str, Any]) -> None:
        super().load_log_state(state)
        guard = state["guard"]
        self.rule.losses.extend(guard["losses"])
        self.rule.above, self.skipped, self._in_a_row = guard["above"], guard["skipped"], guard["in_a_row"]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self.skipped:
            logs = logs | {"skipped_steps": self.skipped}
        super().log(logs, *args, **kwargs)

    # -- what is left behind ------------------------------------------------------------------------------------------

    def origins(self, count: int) -> list[Any]:
        """The rows' sources of this step's micro-batches, for JSON; empty where the data set cannot tell."""
        loader = getattr(self, "stream_loader", None)
        if loader is not None:
            return list(loader.origins)[-count:]
        tell = getattr(self.train_dataset, "origins", None)
        if tell is None:
            return []
        world = max(1, self.args.world_size)
        first = self.state.global_step * self.args.gradient_accumulation_steps
        return [tell((first + number) * world + self.args.process_index) for number in range(count)]

    def _saved(self, step: int, facts: dict[str, Any], batches: list[Any]) -> str:
        """Write the micro-batches of a step; says where they are."""
        run = Path(self.args.output_dir) / OFFENDING / f"step-{step}"
        try:
            with replaced(run / f"rank-{self.args.process_index}") as staging:
                write_offending(staging, {"step": step, **facts}, batches, self._tokenizer())
        except Exception as error:
            if not is_writing_error(error):
                raise
            return f"Its micro-batches could not be saved: {first_line(error)}."
        return f"Its micro-batches are in {run}."

    def _tokenizer(self) -> Any:
        collators = [self.data_collator] + [each.collator for each in getattr(self.train_dataset, "groups", [])]
        found = (getattr(getattr(each, "processor", None), "tokenizer", None) for each in collators)
        return next((each for each in found if each is not None), None)


def write_offending(folder: Path, facts: dict[str, Any], batches: list[Any], tokenizer: Any = None) -> None:
    """`facts.json`, `micro-batch-I.safetensors` and `contact-sheet.png` (where there are images) into a folder.

    Args:
        batches: tensors by name, or such by group. tokenizer: writes the labels below the images.
    """
    facts = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in facts.items()
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False))
    drawn = []
    for number, batch in enumerate(batches):
        grouped = all(isinstance(each, dict) for each in batch.values())
        groups = batch if grouped else {"": batch}
        tensors = {}
        for name, group in groups.items():
            for key, value in group.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}/{key}" if name else key] = value.detach().cpu().contiguous().clone()
            drawn += _drawable(name or f"micro-batch {number}", group, tokenizer)
        save_file(tensors, str(folder / f"micro-batch-{number}.safetensors"))
    if drawn:
        from .data.contact_sheet import contact_sheet

        title = f"step {facts['step']}, loss {facts['loss']}" + (
            f", {SHOWN} of {len(drawn)}" if len(drawn) > SHOWN else ""
        )
        contact_sheet(drawn[:SHOWN], title).save(folder / "contact-sheet.png")


def _drawable(name: str, group: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows that a contact sheet can draw."""
    labels = group.get("labels")
    rows = []
    for number, pixels in enumerate(_images(group)):
        text = ""
        if tokenizer is not None and labels is not None and number < len(labels):
            text = tokenizer.decode(
                [token for token in labels[number].tolist() if token >= 0], skip_special_tokens=True
            )
        kind = "document" if name.startswith("document") else "natural"
        rows.append({"image": {"bytes": _png(pixels)}, "text": text, "task": name, "kind": kind})
    return rows


def _images(group: dict[str, Any]) -> list[torch.Tensor]:
    """Images `(C, H, W)` of a micro-batch, as they lie there; of a pack, of their own sizes."""
    pixels, grids = group.get("pixel_values"), group.get("image_grid_hw")
    if not isinstance(pixels, torch.Tensor):
        return []
    if pixels.ndim == 4:
        return list(pixels.cpu())
    if pixels.ndim != 2 or grids is None:
        return []
    from modeling_unit.packing_unit import unpatchify

    sizes = grids.tolist()
    patch = round((pixels.shape[1] / 3) ** 0.5)
    parts = pixels.cpu().split([rows * columns for rows, columns in sizes])
    return [unpatchify(part[None], *size, patch)[0] for part, size in zip(parts, sizes, strict=True)]


def _png(pixels: torch.Tensor) -> bytes:
    """`(C, H, W)` as a PNG: uint8 as it is; normalised pixels between their extremes, what is no number in red."""
    if pixels.dtype != torch.uint8:
        pixels = pixels.float().expand(3, -1, -1)
        wrong = ~torch.isfinite(pixels).all(dim=0)
        values = pixels[torch.isfinite(pixels)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        pixels = ((pixels.nan_to_num(low, high, low) - low) / max(high - low, 1e-6) * 255).round().to(torch.uint8)
        pixels[:, wrong] = torch.tensor([[255], [0], [0]], dtype=torch.uint8)
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
