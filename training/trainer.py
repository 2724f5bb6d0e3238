"""The two stages as `Trainer` subclasses over one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import SequentialSampler

from modeling_unit import UnitForPreTraining, UnitImageProcessor
from modeling_unit.architectures_unit import (
    class_tokens,
    freeze_unread,
    prefix_tokens,
)

from .arguments import UnitTrainingArguments
from .base_trainer import BaseTrainer
from .checkpoints import from_rank_0, last_whole_checkpoint
from .checks import check_teacher
from .collator import normalized_pixels
from .data.mixture import MixtureDataset
from .data.refusals import Refusals
from .data.settings import TASKS
from .data.streaming import StreamDataset, StreamLoader, load_state, write_state
from .freezing import freeze_parts as freeze_parts
from .freezing import set_position_crop, unread_parts
from .freezing import trainable_table as trainable_table
from .losses import Counted, alignment_loss, character_loss, sampled_tokens, slot_weights, token_losses
from .norms import quicken_norms
from .optim import make_optimizer
from .packing import first_tokens, repacked
from .samples import SamplesInTraining
from .teacher_cache import TeacherFeatures
from .terms import TermLog, means

# What the loss is the sum of, and what of a group's batch only the loss takes
TERMS = ("language_loss", "vision_loss", "character_loss", "alignment_loss")
BESIDE = ("labels", "task_ids", "row_seeds", "character_classes", "token_places")
SHOWN_ROWS = 4  # rows that a message names


class UnitTrainer(SamplesInTraining, BaseTrainer):
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
            set_position_crop(encoder, self.args.position_crop)
        teacher = getattr(teacher, "vision_model", teacher)
        if teacher is not None and teacher is encoder:
            raise ValueError("The teacher is the model's own encoder: give a copy of it, model.make_teacher().")
        self.keep_anchor(teacher)
        self.teacher_features: TeacherFeatures | None = None
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        freeze_parts(self.model, unread_parts(self.args, self.teacher is not None))
        if self.teacher is not None:
            check_teacher(self.teacher.config, _unwrapped(self.model).config)
            self.teacher.to(self.args.device)
            groups = getattr(self.train_dataset, "groups", None)
            self.teacher_features = TeacherFeatures(self.teacher, self.args, groups, image_processor)
            self.add_callback(self.teacher_features)
        # the loss is normalised by the step's counts: nothing is left to divide by the number of micro-batches
        self.model_accepts_loss_kwargs = True
        self.image_processor = image_processor
        quicken_norms(self.model)
        # our collator's texts: visual tokens in front, padded behind
        self.text_behind = isinstance(self.train_dataset, (MixtureDataset, StreamDataset))
        self.terms = TermLog()
        self._labels_checked = False
        # of data without `row_seeds`: C is drawn from a generator of its own, so that runs with and without a teacher
        # see the same everything else
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
        """`L_lan + lambda * L_vis` [paper] of one micro-batch of groups, and what early training adds [ours].

        Each term is a sum over counted things (labels, tokens of C, ...), divided by how many the whole optimiser step
        has of them (see [`step_counts`], the Trainer's `num_items_in_batch`; alone, a micro-batch is a step): however
        rows are split over micro-batches and ranks, the gradient is that of one large batch.
        """
        args: UnitTrainingArguments = self.args
        given = kwargs.get("num_items_in_batch")
        counts = self.step_counts([inputs]) if given is None else given
        loss, outputs = 0.0, {}
        for name, group in inputs.items():  # natural_x1, document_x4, in stage 2 natural_x4, document_x1 too
            batch, beside = self.group_inputs(name, group)
            terms: dict[str, tuple[float, Counted]] = {}  # weight, and what it weighs
            # forward: pixels -> encoder -> connector -> language decoder; the encoder's tokens -> vision decoder
            output = model(**batch)
            if return_outputs:
                outputs[name] = output
            if "labels" in beside:  # L_lan: position t predicts label t + 1; what is -100 is left out
                targets = F.pad(beside["labels"][:, 1:], (0, 1), value=-100)  # (B, T)
                targets = targets[:, -output.logits.shape[1] :]  # most visual tokens have no logits
                each = token_losses(output.logits, targets)  # (B, T), nats, 0 where left out
                language = Counted(each.sum(), (targets != -100).sum())
                terms["language_loss"] = args.language_weight * args.group_weights.get(name, 1.0), language
                self.log_tasks(name, beside.get("task_ids"), each, targets != -100)
            if "teacher_features" in batch:  # L_vis = L_cos + mu * L_1 of the vision decoder, over the tokens of C
                sampled = batch["teacher_token_mask"].sum()
                vision = (output.vision_cosine + args.vision_l1_weight * output.vision_l1) * sampled  # means -> sum
                terms["vision_loss"] = args.vision_weight, Counted(vision, sampled)
                self.log_term(name, "vision_cosine", Counted(output.vision_cosine * sampled, sampled))
                self.log_term(name, "vision_l1", Counted(output.vision_l1 * sampled, sampled))
            if "character_classes" in beside:
                head = _unwrapped(model).character_head  # in bf16 under FSDP2, whose weights are so in a step
                named = head(output.image_features.patches.to(head.weight.dtype))
                characters, right = character_loss(named, beside["character_classes"])
                terms["character_loss"] = args.character_weight, characters
                self.log_term(name, "character_accuracy", right)
            if "token_places" in beside:
                alignment, peaks = alignment_loss(output.attentions, beside["token_places"])
                terms["alignment_loss"] = args.alignment_weight, alignment
                self.log_term(name, "alignment_accuracy", peaks)
            for term, (weight, counted) in terms.items():
                loss = loss + weight * counted.total / counts[name, term]
                self.log_term(name, term, counted, weight)
        return (loss, outputs) if return_outputs else loss

    def group_inputs(self, name: str, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What the model takes of a group's batch, pixels normalised and the teacher's features among it; what only
        the loss takes, as far as it is to be learned from.

        Raises:
            ValueError: raw pixels without an image processor; no labels where text is to be learned.
        """
        args: UnitTrainingArguments = self.args
        batch = dict(group)
        for key in ("pixel_values", "teacher_pixel_values"):
            if key in batch and batch[key].dtype == torch.uint8:
                if self.image_processor is None:
                    raise ValueError("The batch holds raw pixels: give the trainer the model's image_processor.")
                batch[key] = normalized_pixels(batch[key], self.image_processor)
        beside = {key: batch.pop(key) for key in BESIDE if batch.get(key) is not None}
        batch = {key: value for key, value in batch.items() if key not in BESIDE}
        teacher_pixels, keys = (
            batch.pop("teacher_pixel_values", batch["pixel_values"]),
            batch.pop("teacher_keys", None),
        )
        grids, mask = batch.pop("teacher_grid", batch.get("image_grid_hw")), batch.pop("teacher_token_mask", None)
        if self.sees_teacher(name):
            if mask is None:  # nobody has counted this micro-batch
                mask = self.sampled_tokens(teacher_pixels, grids, group.get("row_seeds"))
            batch |= self.teacher_targets(teacher_pixels, grids, mask, keys)
            batch |= {"vision_l1_weight": args.vision_l1_weight}
        if args.language_weight <= 0:  # the language decoder is left out
            text = ("input_ids", "attention_mask", "position_ids")
            batch = {key: value for key, value in batch.items() if key not in text}
        elif "labels" not in beside:
            raise ValueError(
                f"The batch of group {name!r} has no labels, but L_lan is to be learned: check the collator."
            )
        else:
            batch["use_cache"] = False  # it would copy every layer's keys and values
            if self.text_behind:
                batch.pop("attention_mask", None)  # what is padded comes last: nothing before it sees it
                # from the last visual token on: behind an empty prompt it predicts the text's first piece
                batch["logits_to_keep"] = beside["labels"].shape[1] - _fewest_visual_tokens(self.model, batch) + 1
        beside = {key: value for key, value in beside.items() if self.learns(name, key)}
        if "token_places" in beside:
            batch["output_attentions"] = True
        return batch, beside

    def sees_teacher(self, name: str) -> bool:
        """Whether a group has an `L_vis`: natural pictures [paper]."""
        return name.startswith("natural") and self.teacher is not None and self.args.vision_weight > 0

    def learns(self, name: str, key: str) -> bool:
        """Whether a group's loss has the term that this key of its batch is for."""
        if key == "character_classes":
            return self.args.character_weight > 0
        if key == "token_places":
            aligned = self.args.language_weight > 0 and self.args.alignment_weight > 0
            return aligned and name.startswith("document")
        return key in ("labels", "task_ids") and self.args.language_weight > 0

    # -- what a step counts -------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, self.step_counts(samples) if samples else None

    def step_counts(self, micro_batches: list[dict[str, dict[str, Any]]]) -> dict[tuple[str, str], torch.Tensor]:
        """How many things each term of each group counts in an optimiser step: a rank's share of the sum over all its
        micro-batches and all ranks. Gradients are averaged over the ranks, so a rank's sums are divided by the mean.

        Draws C for each picture of the micro-batches and leaves it in them, as `teacher_token_mask`.

        Raises:
            ValueError: a group whose labels are all masked, in all of these micro-batches on all ranks.
        """
        names = sorted(self.allowed_groups.union(*micro_batches))
        device = next(batch["pixel_values"].device for each in micro_batches for batch in each.values())
        counts = {(name, term): torch.zeros((), device=device) for name in names for term in TERMS}
        for name, batch in (pair for micro_batch in micro_batches for pair in micro_batch.items()):
            found = {}
            if self.sees_teacher(name):
                if "teacher_token_mask" not in batch:
                    batch["teacher_token_mask"] = self.sampled_tokens(
                        batch.get("teacher_pixel_values", batch["pixel_values"]),
                        batch.get("teacher_grid", batch.get("image_grid_hw")),
                        batch.get("row_seeds"),
                    )
                found["vision_loss"] = batch["teacher_token_mask"].sum()
            if self.learns(name, "labels") and batch.get("labels") is not None:
                found["language_loss"] = (batch["labels"][:, 1:] != -100).sum()
            if self.learns(name, "character_classes") and batch.get("character_classes") is not None:
                found["character_loss"] = slot_weights(batch["character_classes"]).sum()
            if self.learns(name, "token_places") and batch.get("token_places") is not None:
                found["alignment_loss"] = (batch["token_places"][:, 1:] >= 0).sum()
            for term, count in found.items():
                counts[name, term] = counts[name, term] + count
        flat = self.mean_over_ranks(torch.stack(list(counts.values())).to(self.args.device))
        counts = dict(zip(counts, flat.clamp(min=torch.finfo(torch.float32).tiny).unbind(), strict=True))
        if self.args.language_weight > 0:
            self._check_labels(dict(zip(counts, flat.unbind(), strict=True)), micro_batches)
        return counts

    def mean_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        """The one place where ranks tell each other what they count."""
        return counts if self.args.world_size <= 1 else self.accelerator.reduce(counts, "mean")

    def _check_labels(self, counts: dict[tuple[str, str], torch.Tensor], micro_batches) -> None:
        # where a number is read at no cost, and at the first step anywhere; later on at each line of the log
        if self._labels_checked and self.args.device.type != "cpu":
            return
        self._labels_checked = True
        for name in dict.fromkeys(name for micro_batch in micro_batches for name in micro_batch):
            labelled = any(each.get(name, {}).get("labels") is not None for each in micro_batches)
            if labelled and float(counts[name, "language_loss"]) <= 0:
                self._refuse_masked(name, len(micro_batches))

    def _refuse_masked(self, name: str, micro_batches: int = 0) -> None:
        rows = [row for each in self.origins(micro_batches) if isinstance(each, dict) for row in each.get(name, [])]
        where = f" (rows: {'; '.join(rows[:SHOWN_ROWS])}{' ...' if len(rows) > SHOWN_ROWS else ''})" if rows else ""
        raise ValueError(
            f"Step {self.state.global_step + 1}: all labels of group {name!r} are masked{where}: there is nothing to "
            "learn to read from. Check the texts, and the labels that the collator makes of them."
        )

    @torch.no_grad()
    def sampled_tokens(
        self, pixel_values: torch.Tensor, grids: torch.Tensor | None = None, row_seeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The random subset C of the teacher's tokens [paper], `(B, S + M)`, of a pack `(1, sum (S + M_i))`.

        Args:
            pixel_values, grids: what the teacher sees; grids `(B, 2)` of a pack only. row_seeds: `(B,)`, of the
                pictures; without them C is drawn from a generator of this trainer.
        """
        config = self.teacher.config
        prefix, patch = prefix_tokens(config), config.patch_size
        if grids is None:
            patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
            place = torch.arange(prefix + patches, device=pixel_values.device).expand(len(pixel_values), -1)
            seeds = None if row_seeds is None else row_seeds[:, None]
        else:
            own = round((pixel_values.shape[1] / 3) ** 0.5)
            total = prefix * len(grids) + len(pixel_values) * own**2 // patch**2
            first = first_tokens(grids * own // patch, prefix)
            image = torch.zeros(total, dtype=torch.long, device=grids.device).index_fill_(0, first, 1).cumsum(0) - 1
            place = (torch.arange(total, device=grids.device) - first[image])[None]
            seeds = None if row_seeds is None else row_seeds[image][None]
        if self.args.token_sampling_ratio >= 1:  # as in an evaluation, which draws nothing
            mask = torch.ones(place.shape, dtype=torch.bool, device=place.device)
        elif seeds is None:
            mask = torch.rand(place.shape, generator=self._sampler) < self.args.token_sampling_ratio
            mask = mask.to(place.device)
        else:
            mask = sampled_tokens(seeds.to(place.device), place, self.args.token_sampling_ratio)
        # the class token, where there is one, carries recognition: always among them [ours]
        return mask | (place < class_tokens(config))

    @torch.no_grad()
    def teacher_targets(
        self,
        pixel_values: torch.Tensor,
        grids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The teacher's features of what it sees, and its tokens in C [paper]. `grids` `(B, 2)`: of a pack; `keys`
        `(B, 16)`: of the pictures, see `teacher_cache.py`."""
        patch = self.teacher.config.patch_size
        if token_mask is None:
            token_mask = self.sampled_tokens(pixel_values, grids)
        if grids is None:
            features = self.teacher_features(pixel_values, keys)  # (B, S + M, D), of each picture once where kept
            grids = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        else:  # (1, sum (S + M_i), D)
            pixel_values, grids = repacked(pixel_values, grids, patch)
            features = self.teacher_features.packed(pixel_values, grids)
        return {"teacher_features": features, "teacher_grid": grids, "teacher_token_mask": token_mask}

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

    def log_term(self, group: str, name: str, term: Counted, weight: float | None = None) -> None:
        """A term for the next line of the log. weight: in the loss, `None` for what is only told."""
        self.terms.add(f"{group}/{name}", term, weight)

    def log_tasks(self, group: str, tasks: torch.Tensor | None, losses: torch.Tensor, counted: torch.Tensor) -> None:
        """`L_lan` `(B, T)` of each task, by the rows' places in `TASKS`, `(B,)`."""
        if tasks is not None:
            of_task = (tasks == torch.arange(len(TASKS), device=tasks.device)[:, None]).float()  # (tasks, B)
            sums = (of_task @ each.detach().float().sum(dim=1) for each in (losses, counted))
            self.terms.add(f"{group}/language_loss/*", Counted(*sums))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            sums = self.terms.gathered(self.args.world_size)
            for key, (_, count, _) in sums.items():
                if key.endswith("/language_loss") and not count:
                    self._refuse_masked(key.split("/")[0])
            self.terms.clear()
            logs = logs | means(sums)
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

    def restore_log_state(self) -> None:
        super().restore_log_state()
        checkpoint = self._resumed
        # C of the first step is drawn before the Trainer restores its random numbers, so this one is restored here.
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
        return super().log_state() | {"counted_terms": self.terms.state()}

    def load_log_state(self, state: dict[str, Any]) -> None:
        super().load_log_state(state)
        # an older format counted micro-batches: of those the next line of the log misses the terms
        self.terms.load(state.get("counted_terms", {}), self.args.device)

    def forget_terms(self) -> None:
        self.terms.clear()


class IntraScaleTrainer(UnitTrainer):
    """Stage 1 [paper]: natural pictures at x1 with captions, documents at x4: `L_lan(D_I x1 + D_T x4) + lambda
    L_vis(D_I x1)`."""

    required_groups = frozenset({"natural_x1", "document_x4"})
    allowed_groups = required_groups


class InterScaleTrainer(UnitTrainer):
    """Stage 2 [paper]: adds the exchanged scales, natural pictures at x4 and documents at x1."""

    required_groups = frozenset({"natural_x1", "document_x4", "natural_x4", "document_x1"})
    allowed_groups = required_groups


def _fewest_visual_tokens(model: nn.Module, batch: dict[str, Any]) -> int:
    """Positions of each text that hold visual tokens, of the image with the fewest."""
    model = _unwrapped(model)
    if "image_grid_hw" in batch:
        grids = batch["image_grid_hw"].tolist()
    else:
        grids = [[side // model.config.vision_config.patch_size for side in batch["pixel_values"].shape[-2:]]]
    return min(model.connector.num_visual_tokens(*grid) for grid in grids)


def _only_item(items: list[Any]) -> Any:
    """The data set's items are whole micro-batches already."""
    if len(items) != 1:
        raise ValueError("per_device_train_batch_size must be 1: an item of the mixture is a whole micro-batch.")
    return items[0]


def _unwrapped(model: nn.Module) -> UnitForPreTraining:
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
