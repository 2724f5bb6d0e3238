"""Every setting of a run, with its source: [paper] or [ours] where the paper is silent."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class UnitTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with UNIT's own. The defaults are the paper's where it states them.

    Args:
        learning_rate: 5e-5 [paper]. weight_decay: 0.01 [paper]. lr_scheduler_type: cosine [paper].
        vision_weight: lambda, weight of `L_vis`. Not stated; 1 [ours].
        vision_l1_weight: mu, weight of L1 beside the cosine. Not stated; 1 [ours].
        token_sampling_ratio: |C| / N, share of tokens that `L_vis` looks at. Not stated; 0.5 [ours].
        language_weight: weight of `L_lan`, 1 [paper]. 0 leaves the language decoder out of the step: a start of its
            own for an encoder from scratch, which sees characters before anything can read them [ours].
        group_weights: weight of each group's `L_lan`, 1 where not given [ours].
        character_weight: weight of the auxiliary character loss, 0 in the paper's recipes [ours].
        alignment_weight: weight of the auxiliary alignment loss, 0 in the paper's recipes [ours].
        optimizer: `"adamw"` [paper] or `"muon"` (matrices by Muon, the rest by AdamW) [ours].
        muon_learning_rate: for Muon's matrices, as large an update as AdamW's of the same rate [ours].
        part_rates: multiplier of the learning rate by part: encoder, connector, language_decoder, vision_decoder,
            heads.
        freeze: parts that do not train.
        max_minutes: the run ends after so much training, 0 for no limit; the learning rate then falls by the larger
            of the shares of `max_steps` and of this time, and is zero at the end (see `training/schedule.py`) [ours].
        nonfinite: what becomes of a step whose loss or gradients are no finite numbers: `"stop"` ends the run,
            `"skip"` leaves the step out; either saves its micro-batches (see `training/guard.py`) [ours].
        divergence_factor: the run stops when its loss lies above so many times its running median for
            `divergence_steps` steps in a row; 0 for no limit [ours].
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    vision_weight: float = 1.0
    vision_l1_weight: float = 1.0
    token_sampling_ratio: float = 0.5
    language_weight: float = 1.0
    group_weights: dict[str, float] = field(default_factory=dict)
    character_weight: float = 0.0
    alignment_weight: float = 0.0
    optimizer: str = "adamw"
    muon_learning_rate: float = 2e-3
    part_rates: dict[str, float] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    max_minutes: float = 0.0
    nonfinite: str = "stop"
    divergence_factor: float = 4.0
    divergence_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.token_sampling_ratio <= 1.0:
            raise ValueError(f"token_sampling_ratio must lie in (0, 1], got {self.token_sampling_ratio}.")
        weights = ("language_weight", "vision_weight", "vision_l1_weight", "character_weight", "alignment_weight")
        for name in (*weights, "max_minutes", "divergence_factor"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
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
