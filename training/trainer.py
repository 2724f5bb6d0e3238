"""The two stages as `Trainer` subclasses over one base."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler

from modeling_unit import UnitForPreTraining, UnitForPreTrainingOutput, UnitImageProcessor
from modeling_unit.architectures_unit import class_tokens, freeze_unread, run_encoder_packed

from .arguments import UnitTrainingArguments
from .base_trainer import BaseTrainer
from .checkpoints import from_rank_0, last_whole_checkpoint
from .collator import normalized_pixels
from .data.mixture import MixtureDataset
from .data.refusals import Refusals
from .data.streaming import StreamDataset, StreamLoader, load_state, write_state
from .losses import alignment_loss, character_loss
from .optim import PARTS, make_optimizer, part_of
from .packing import first_tokens, repacked
from .teacher_cache import TeacherFeatures


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


class UnitTrainer(BaseTrainer):
    """Joint training `L_lan + lambda * L_vis` [paper] on micro-batches of groups (see `training/data/mixture.py`).

    Args:
        teacher: the encoder as it was before training, frozen [paper]; without it there is no `L_vis`. Any supported
            encoder (`model.make_teacher()`), or a whole UNIT model, of which only the encoder is used.
        image_processor: normalises the pixels of a raw [`GroupCollator`] on the device; not needed for others.
    """

    # groups that a stage must and may have
    required_groups: frozenset[str] = frozenset()
    allowed_groups: frozenset[str] = frozenset({"natural_x1", "natural_x4", "document_x1", "document_x4"})

    def __init__(
        self,
        *args,
        teacher: nn.Module | None = None,
        image_processor: UnitImageProcessor | None = None,
        **kwargs,
    ):
        kwargs.setdefault("data_collator", _only_item)
        super().__init__(*args, **kwargs)
        encoder = getattr(_unwrapped(self.model), "vision_model", None)
        if encoder is not None:
            freeze_unread(encoder)
        teacher = getattr(teacher, "vision_model", teacher)
        self.keep_anchor(teacher)
        self.teacher_features: TeacherFeatures | None = None
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        if self.teacher is not None:
            self.teacher.to(self.args.device)
            groups = getattr(self.train_dataset, "groups", None)
            self.teacher_features = TeacherFeatures(self.teacher, self.args, groups, image_processor)
            self.add_callback(self.teacher_features)
        self.model_accepts_loss_kwargs = False  # each micro-batch normalises its own loss
        self.image_processor = image_processor
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        # C is drawn from a generator of its own, so that runs with and without a teacher see the same everything else
        self._sampler = torch.Generator().manual_seed(self.args.seed)
        self._check_groups()
        self.stream_loader: StreamLoader | None = None
        if isinstance(self.train_dataset, StreamDataset):
            self.args.ignore_data_skip = True  # the streams go on from their own state

    def _check_groups(self) -> None:
        plan = getattr(self.train_dataset, "groups", None)
        if plan is None:
            return
        names = {group.arguments.name for group in plan}
        missing, extra = self.required_groups - names, names - self.allowed_groups
        if missing or extra:
            raise ValueError(
                f"{type(self).__name__} needs the groups {sorted(self.required_groups)} and takes "
                f"{sorted(self.allowed_groups)}; "
                f"missing: {sorted(missing) or 'none'}, not taken: {sorted(extra) or 'none'}."
            )

    # -- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs: dict[str, dict[str, Any]], return_outputs: bool = False, **kwargs):
        """Sum over the groups of `L_lan`, and of `lambda * L_vis` for natural pictures, plus what the recipe adds."""
        total, outputs = 0.0, {}
        for name, batch in inputs.items():
            loss, outputs[name] = self.group_loss(model, name, dict(batch))
            total = total + loss
        return (total, outputs) if return_outputs else total

    def group_loss(self, model, name: str, batch: dict[str, Any]) -> tuple[torch.Tensor, UnitForPreTrainingOutput]:
        args: UnitTrainingArguments = self.args
        for key in ("pixel_values", "teacher_pixel_values"):
            if key in batch and batch[key].dtype == torch.uint8:
                if self.image_processor is None:
                    raise ValueError("The batch holds raw pixels: give the trainer the model's image_processor.")
                batch[key] = normalized_pixels(batch[key], self.image_processor)
        classes = batch.pop("character_classes", None)
        places = batch.pop("token_places", None)
        teacher_pixels, teacher_grids = batch.pop("teacher_pixel_values", None), batch.pop("teacher_grid", None)
        keys = batch.pop("teacher_keys", None)
        reads = args.language_weight > 0
        if reads and batch.get("labels") is None:
            raise ValueError(
                f"The batch of group {name!r} has no labels, but L_lan is to be learned: check the collator."
            )
        if not reads:
            batch = {key: batch[key] for key in ("pixel_values", "spatial_shapes", "image_grid_hw") if key in batch}
        aligned = reads and args.alignment_weight > 0 and places is not None and name.startswith("document")
        if name.startswith("natural") and self.teacher is not None and args.vision_weight > 0:
            grids = batch.get("image_grid_hw") if teacher_grids is None else teacher_grids
            pictures = batch["pixel_values"] if teacher_pixels is None else teacher_pixels
            batch |= self.teacher_targets(pictures, grids, keys)
        # forward: pixels -> encoder -> connector -> decoder; labels are shifted inside, -100 is masked
        output = model(
            **batch,
            vision_weight=args.vision_weight,
            vision_l1_weight=args.vision_l1_weight,
            **({"output_attentions": True} if aligned else {}),
        )
        loss = 0.0
        if reads:
            loss = args.language_weight * args.group_weights.get(name, 1.0) * output.language_loss
            self._log(name, language_loss=output.language_loss)
        if output.vision_loss is not None:
            loss = loss + args.vision_weight * output.vision_loss
            self._log(
                name, vision_loss=output.vision_loss, vision_cosine=output.vision_cosine, vision_l1=output.vision_l1
            )
        if classes is not None and args.character_weight > 0:
            head = _unwrapped(model).character_head
            characters, right = character_loss(head(output.image_features.patches), classes)
            loss = loss + args.character_weight * characters
            self._log(name, character_loss=characters, character_accuracy=right)
        if aligned:
            alignment, peaks = alignment_loss(output.attentions, places)
            loss = loss + args.alignment_weight * alignment
            self._log(name, alignment_loss=alignment, alignment_accuracy=peaks)
        return loss, output

    @torch.no_grad()
    def teacher_targets(
        self, pixel_values: torch.Tensor, grids: torch.Tensor | None = None, keys: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """The teacher's features of pictures at x1 and the random subset C of its tokens [paper]. `grids` `(B, 2)`:
        of a pack. `keys` `(B, 16)`: of the pictures, see `teacher_cache.py`."""
        patch = self.teacher.config.patch_size
        if grids is None:
            features = self.teacher_features(
                pixel_values, keys
            )  # (B, S + M, D), each picture once where they are kept
        else:  # (1, sum (S + M_i), D)
            pixel_values, grids = repacked(pixel_values, grids, patch)
            features = run_encoder_packed(self.teacher, pixel_values, grids).last_hidden_state[None]
        draw = torch.rand(features.shape[:2], generator=self._sampler)
        mask = (draw < self.args.token_sampling_ratio).to(features.device)
        # the class token, where there is one, carries recognition: always among them [ours]
        kept = class_tokens(self.teacher.config)
        if grids is None:
            mask[:, :kept] = True
        else:
            first = first_tokens(grids, features.shape[1])
            mask[:, (first[:, None] + torch.arange(kept, device=first.device)).flatten()] = True
            return {"teacher_features": features, "teacher_grid": grids, "teacher_token_mask": mask}
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        return {"teacher_features": features, "teacher_grid": grid, "teacher_token_mask": mask}

    # -- what Trainer needs to know
    # ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, **kwargs):
        if isinstance(self.train_dataset, StreamDataset) and resume_from_checkpoint:
            if resume_from_checkpoint is True:
                found = from_rank_0(self.args, lambda: last_whole_checkpoint(self.args.output_dir))
                if found is None:
                    raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to go on from.")
                resume_from_checkpoint = str(found)
            load_state(self.train_dataset, resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, StreamDataset):
            return super().get_train_dataloader()
        # not prepared by accelerate, which would have one process read for all, or all read everything
        args = self.args
        settings = {"num_workers": args.dataloader_num_workers, "pin_memory": args.dataloader_pin_memory}
        if args.dataloader_num_workers:
            settings["prefetch_factor"] = args.dataloader_prefetch_factor
            settings["multiprocessing_context"] = args.dataloader_multiprocessing_context
        self.stream_loader = StreamLoader(self.train_dataset, **settings)
        return self.stream_loader

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)  # the plan is shuffled already, and resumes exactly

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.args)
        return self.optimizer

    # -- logging
    # --------------------------------------------------------------------------------------------------------

    def _log(self, group: str, **values: torch.Tensor) -> None:
        for key, value in values.items():
            if value is not None:
                # summed where it lies: reading it would make the device wait at every step
                name, value = f"{group}/{key}", value.detach().float()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] += 1

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._sums:
            logs = logs | {key: round(float(self._sums[key]) / self._counts[key], 5) for key in self._sums}
            self._sums.clear()
            self._counts.clear()
        if "loss" in logs and self.stream_loader is not None:
            logs = logs | {f"data/{key}": value for key, value in self.stream_loader.counts().items()}
        elif "loss" in logs and isinstance(self.train_dataset, MixtureDataset):
            logs = logs | {"data/refused": self.train_dataset.all_refusals().refused}
        super().log(logs, *args, **kwargs)

    def refusals(self) -> Refusals | None:
        """What this process has left out of the data so far; None where the data is no mixture."""
        if isinstance(self.train_dataset, MixtureDataset):
            return self.train_dataset.all_refusals()
        return self.stream_loader.all_refusals() if self.stream_loader is not None else None

    # -- saving
    # -----------------------------------------------------------------------------------------------------------

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        # another number of ranks before: rank 0's; the last, of all ranks, is of an older format
        names = [f"sampler_state_{rank}.safetensors" for rank in (self.args.process_index, 0)]
        for name in (*names, "sampler_state.safetensors"):
            state = Path(checkpoint or "") / name
            if state.is_file():
                from safetensors.torch import load_file

                self._sampler.set_state(load_file(state)["sampler"])
                break

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        from safetensors.torch import save_file

        name = f"sampler_state_{self.args.process_index}.safetensors"
        save_file({"sampler": self._sampler.get_state()}, str(Path(output_dir) / name))
        if self.stream_loader is not None:
            self.stream_loader.save(output_dir)
        elif isinstance(self.train_dataset, MixtureDataset) and self.is_world_process_zero():
            batches = self.args.gradient_accumulation_steps * max(1, self.args.world_size)
            write_state(output_dir, 0, {"ranks": self.train_dataset.ranks, "batches_per_step": batches})

    def rank_files(self, rank: int) -> list[str]:
        files = [*super().rank_files(rank), f"sampler_state_{rank}.safetensors"]
        return files if self.stream_loader is None else [*files, f"data-state-{rank}.json"]

    def log_state(self) -> dict[str, Any]:
        terms = {key: [float(value), self._counts[key]] for key, value in self._sums.items()}
        return super().log_state() | {"terms": terms}

    def load_log_state(self, state: dict[str, Any]) -> None:
        super().load_log_state(state)
        for key, (value, count) in state["terms"].items():
            self._sums[key] = torch.tensor(value, device=self.args.device)
            self._counts[key] = count

    def forget_terms(self) -> None:
        self._sums.clear()
        self._counts.clear()


class IntraScaleTrainer(UnitTrainer):
    """Stage 1 [paper]: natural pictures at x1 with captions, documents at x4: `L_lan(D_I x1 + D_T x4) + lambda
    L_vis(D_I x1)`."""

    required_groups = frozenset({"natural_x1", "document_x4"})
    allowed_groups = required_groups


class InterScaleTrainer(UnitTrainer):
    """Stage 2 [paper]: adds the exchanged scales, natural pictures at x4 and documents at x1."""

    required_groups = frozenset({"natural_x1", "document_x4", "natural_x4", "document_x1"})
    allowed_groups = required_groups


def _only_item(items: list[Any]) -> Any:
    """The data set's items are whole micro-batches already."""
    if len(items) != 1:
        raise ValueError("per_device_train_batch_size must be 1: an item of the mixture is a whole micro-batch.")
    return items[0]


def _unwrapped(model: nn.Module) -> UnitForPreTraining:
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
