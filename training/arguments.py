"""Every setting of a run, with its source: [paper] or [ours] where the paper is silent.

What the method leaves open, each one setting of a recipe:

| what | setting | default | source |
|---|---|---|---|
| lambda, weight of `L_vis` | `training.vision_weight` | 1 | [ours], not stated |
| mu, weight of L1 beside the cosine | `training.vision_l1_weight` | 1 | [ours], not stated |
| the share of tokens in C | `training.token_sampling_ratio` | 0.5 | [ours], not stated |
| K, tokens of the connector | `model.connector_config.num_queries` (`qformer`) | 256 | [ours], not stated |
| | `model.connector_config.unshuffle` (`mlp`): a square of patches a token | 2 | [ours] |
| the teacher's resolution for a picture at x4 | `training.teacher_scale` | 1 | [ours], not stated |
| what x4 multiplies, side or area | `image_processor.scale_as` | `side` | [ours], the paper can be read both ways |
| which text documents at x1 read | `data.exchanged_x_height` | 4.5 pixels | [ours]; the paper: pages of large print |
| random crops of the positions | `training.position_crop` | as the encoder has it: on for UNIT's | [code] |

All the loss's weights are in `UnitTrainingArguments`; `UnitTrainer.compute_loss` has every term on one page.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .data.settings import KINDS, SourceArguments

# of the metrics of an evaluation that do not end in `loss`, those that are better when they are lower
LOWER_IS_BETTER = ("cer", "vision_cosine", "vision_l1")
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio"}  # of `report_to`: the package to install


@dataclass
class UnitTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with UNIT's own. The defaults are the paper's where it states them.

    Args:
        learning_rate: 5e-5 [paper]. weight_decay: 0.01 [paper]. lr_scheduler_type: cosine [paper].
        vision_weight: lambda, weight of `L_vis`. Not stated; 1 [ours].
        vision_l1_weight: mu, weight of L1 beside the cosine. Not stated; 1 [ours].
        token_sampling_ratio: |C| / N, share of tokens that `L_vis` looks at. Not stated; 0.5 [ours]. A class token is
            always among them [ours].
        teacher_scale: what the teacher sees of a picture at x4: 1, the picture at x1, and the student's grid is
            area-pooled to the teacher's (a teacher trained at x1 is unreliable at x4); or `"same"`, the picture at
            x4 itself, token by token. Not stated; 1 [ours].
        position_crop: random crops of the encoder's positions in training, and none at all for one picture in ten
            [code]; `None` as the encoder's own configuration says. Crops are drawn batch by batch from torch's
            generator: only without them do other splits of a step into micro-batches give the same numbers.
        language_weight: weight of `L_lan`, 1 [paper]. 0 leaves the language decoder out of the step: a start of its
            own for an encoder from scratch, which sees characters before anything can read them [ours].
        group_weights: weight of each group's `L_lan`, 1 where not given [ours].
        character_weight: weight of the auxiliary character loss, 0 in the paper's recipes [ours].
        alignment_weight: weight of the auxiliary alignment loss, 0 in the paper's recipes [ours].
        optimizer: `"adamw"` [paper] or `"muon"` (matrices by Muon, the rest by AdamW) [ours].
        muon_learning_rate: for Muon's matrices, as large an update as AdamW's of the same rate [ours].
        part_rates: multiplier of the learning rate by part: encoder, connector, language_decoder, vision_decoder,
            heads.
        layer_decay: the encoder's learning rates fall by this factor from layer to layer towards its embeddings, 1 for
            one rate (see `training/optim.py`) [ours; 0.65-0.9 is usual where a trained encoder is to be kept].
        language_layer_decay: the same for the language decoder [ours].
        ema_decay: decay of a moving average of the weights, 0 for none: what is evaluated and saved at the end is then
            the average (see `training/averaging.py`) [ours].
        teacher_interpolation: alpha: at the end the encoder is (1 - alpha) of what was trained and alpha of the
            teacher, which must be of its shape; 0 for none [ours].
        teacher_dtype: what the teacher computes in: `"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 in a run with
            `bf16` [ours].
        teacher_cache: a folder where the teacher's features of pictures are kept, `true` for
            `OUTPUT_DIR/teacher-cache`: each picture goes through the teacher once. Needs
            `data.augment_pictures: false` (see `training/teacher_cache.py`) [ours].
        teacher_cache_gigabytes: the most that the folder may hold; 20 [ours].
        freeze: parts that do not train.
        max_minutes: the run ends after so much training, 0 for no limit; the learning rate then falls by the larger
            of the shares of `max_steps` and of this time, and is zero at the end (see `training/schedule.py`) [ours].
        nonfinite: what becomes of a step whose loss or gradients are no finite numbers: `"stop"` ends the run,
            `"skip"` leaves the step out; either saves its micro-batches (see `training/guard.py`) [ours].
        divergence_factor: the run stops when its loss lies above so many times its running median for
            `divergence_steps` steps in a row; 0 for no limit [ours].
        early_stopping_patience: the run ends after so many evaluations in a row that bring `metric_for_best_model` no
            further, by `early_stopping_threshold` at least; 0 for never [ours].
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    vision_weight: float = 1.0
    vision_l1_weight: float = 1.0
    token_sampling_ratio: float = 0.5
    teacher_scale: int | str = 1
    position_crop: bool | None = None
    language_weight: float = 1.0
    group_weights: dict[str, float] = field(default_factory=dict)
    character_weight: float = 0.0
    alignment_weight: float = 0.0
    optimizer: str = "adamw"
    muon_learning_rate: float = 2e-3
    part_rates: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    language_layer_decay: float = 1.0
    ema_decay: float = 0.0
    teacher_interpolation: float = 0.0
    teacher_dtype: str = "auto"
    teacher_cache: str | bool = False
    teacher_cache_gigabytes: float = 20.0
    freeze: list[str] = field(default_factory=list)
    max_minutes: float = 0.0
    nonfinite: str = "stop"
    divergence_factor: float = 4.0
    divergence_steps: int = 20
    early_stopping_patience: int = 0
    early_stopping_threshold: float = 0.0

    @property
    def n_gpu(self) -> int:
        """One GPU a process, for groups cannot be scattered by rows: `accelerate launch` runs a process for each."""
        return min(1, super().n_gpu)

    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False  # transformers knows losses only
        super().__post_init__()
        for name, package in TRACKERS.items():
            if name in self.report_to and importlib.util.find_spec(package) is None:
                raise ValueError(f"training.report_to: {name} is not installed: pip install {package}")
        if self.early_stopping_patience < 0 or self.early_stopping_threshold < 0:
            raise ValueError("early_stopping_patience and early_stopping_threshold must not be negative.")
        if self.early_stopping_patience and (self.eval_strategy == "no" or self.metric_for_best_model is None):
            raise ValueError("early_stopping_patience needs eval_strategy: steps and metric_for_best_model.")
        if not 0.0 < self.token_sampling_ratio <= 1.0:
            raise ValueError(f"token_sampling_ratio must lie in (0, 1], got {self.token_sampling_ratio}.")
        if self.teacher_scale not in (1, "same"):
            raise ValueError(f'teacher_scale must be 1 or "same", got {self.teacher_scale!r}.')
        weights = ("language_weight", "vision_weight", "vision_l1_weight", "character_weight", "alignment_weight")
        for name in (*weights, "max_minutes", "divergence_factor"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("layer_decay", "language_layer_decay"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}.")
        if not 0.0 <= self.teacher_interpolation < 1.0:
            raise ValueError(f"teacher_interpolation must lie in [0, 1), got {self.teacher_interpolation}.")
        if self.teacher_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f'teacher_dtype must be "auto", "float32" or "bfloat16", got {self.teacher_dtype!r}.')
        if self.teacher_cache_gigabytes <= 0:
            raise ValueError(f"teacher_cache_gigabytes must be positive, got {self.teacher_cache_gigabytes}.")
        if (self.ema_decay or self.teacher_interpolation) and self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end takes a checkpoint's own weights, not their average: leave it out with "
                "ema_decay and teacher_interpolation."
            )
        checkpointing = (
            self.gradient_checkpointing_kwargs or {},
            getattr(self, "activation_checkpointing_kwargs", 0) or {},
        )
        if any(each.get("use_reentrant") for each in checkpointing):
            raise ValueError(
                "gradient_checkpointing_kwargs.use_reentrant=true loses the gradients behind what is frozen (adapters "
                "above frozen embeddings): leave it out."
            )
        if self.divergence_steps < 1:
            raise ValueError(f"divergence_steps must be 1 or more, got {self.divergence_steps}.")
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f'nonfinite must be "stop" or "skip", got {self.nonfinite!r}.')
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f'optimizer must be "adamw" or "muon", got {self.optimizer!r}.')


# Starts of adapters that leave the model as it is and need no data; others of peft's change the base (pissa, olora) or
# look at data first (eva, corda)
LORA_STARTS = (True, "gaussian", "orthogonal")


@dataclass
class LoraArguments:
    """LoRA by peft. Without `preset`, `parts` and `adapter` a run trains in full.

    Args:
        preset: `"encoder"`, `"decoder"` or `"both"`: values for what is not given, see `PRESETS` in
            `training/lora.py`. In a recipe the name alone will do: `lora: both`.
        parts: `"encoder"`, `"language_decoder"` or both. r, alpha, dropout: as in peft.
        use_rslora: adapters are scaled by alpha / sqrt(r) in place of alpha / r. use_dora: weights are split into
            length and direction, and adapters turn the direction. Both as in peft.
        init: how the matrices start: `true` (A at random, B zero), `"gaussian"` (the same, A normal) or
            `"orthogonal"` (both at random, their product zero; r even).
        adapter: folder or Hub id of an adapter to go on with, trained on `start`; its shape is its own, so that of the
            settings above none may be given.
        base_dtype: `"bfloat16"` keeps the frozen matrices in two bytes a weight, `"auto"` does so where it can:
            with `training.bf16`, on one device or DDP. A step with `training.bf16` rounds them to that anyway; a
            teacher with the same weights shares them and rounds likewise; the merged model is made from the base in
            float32 [ours].
        warn_single_scale: one line before a run that shows the encoder's adapters a kind of image at one scale only.

    Raises:
        ValueError: values that make no sense, or not with each other.
    """

    preset: str = ""
    parts: list[str] = field(default_factory=list)
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    use_rslora: bool = False
    use_dora: bool = False
    init: bool | str = True
    adapter: str = ""
    base_dtype: str = "float32"
    warn_single_scale: bool = True

    def __post_init__(self):
        if self.r < 1 or self.alpha <= 0:
            raise ValueError(f"lora.r must be 1 or more and lora.alpha above 0, got {self.r} and {self.alpha}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout must lie in [0, 1), got {self.dropout}.")
        if self.init not in LORA_STARTS:
            raise ValueError(
                f"lora.init must be true, gaussian or orthogonal, got {self.init!r}: others change the base or need "
                "data."
            )
        if self.init == "orthogonal" and self.r % 2:
            raise ValueError(f"lora.init orthogonal needs an even lora.r, got {self.r}.")
        if self.base_dtype not in ("float32", "bfloat16", "auto"):
            raise ValueError(f"lora.base_dtype must be float32, bfloat16 or auto, got {self.base_dtype!r}.")
        own = (self.preset, self.parts, self.use_dora, self.use_rslora, self.init is not True)
        if self.adapter and any(own):
            raise ValueError("lora.adapter has its own shape: leave out preset, parts, use_dora, use_rslora and init.")
        if self.base_dtype == "bfloat16" and not self.adapts:
            raise ValueError("lora.base_dtype is for what adapters leave frozen: give lora.preset or lora.parts.")

    @property
    def adapts(self) -> bool:
        """Whether there are adapters at all."""
        return bool(self.parts or self.adapter)


@dataclass
class HeldOutSource(SourceArguments):
    """A source of an evaluation; as [`SourceArguments`], with a `kind`.

    Args:
        scale: 1 or 4; 0 for the kind's own, natural pictures at x1 and documents at x4 [paper].
    """

    scale: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"evaluation.sources: {self.name!r} needs kind: natural or document.")
        self.scale = self.scale or {"natural": 1, "document": 4}[self.kind]
        if self.scale not in (1, 4):
            raise ValueError(f"evaluation.sources: scale must be 1 or 4, got {self.scale}.")


@dataclass
class EvaluationArguments:
    """What a run looks at beside its training (see `training/samples.py`). All numbers are [ours].

    Args:
        sources: held-out rows; of one kind and scale they make a group, as in training.
        rows: of each group, spread evenly over its sources, for the losses.
        read: of these, rows that are read (documents) or captioned (pictures) by generation; 0 for none.
        samples: of these, rows of each group that are shown.
        batch_rows: rows that go through the model at once.
    """

    sources: list[HeldOutSource] = field(default_factory=list)
    rows: int = 64
    read: int = 16
    samples: int = 6
    batch_rows: int = 8

    def __post_init__(self):
        self.sources = [HeldOutSource(**each) if isinstance(each, Mapping) else each for each in self.sources]
        if self.rows < 1 or self.batch_rows < 1:
            raise ValueError("evaluation.rows and evaluation.batch_rows must be 1 or more.")
        if not 0 <= self.samples <= self.read <= self.rows:
            raise ValueError(
                f"evaluation needs 0 <= samples <= read <= rows, got {self.samples}, {self.read} and {self.rows}."
            )

    def as_groups(self) -> dict[tuple[str, int], list[SourceArguments]]:
        """Sources by kind and scale."""
        found: dict[tuple[str, int], list[Any]] = {}
        for source in self.sources:
            found.setdefault((source.kind, source.scale), []).append(source)
        return found
