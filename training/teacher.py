"""Stage zero of unit-tiny: an encoder that recognises pictures and nothing else, to be the teacher of the two stages
[ours].

The paper starts from OpenCLIP ViT-H/14. A small encoder on a laptop starts from nothing: its class token learns to
predict a real ImageNet classifier's features (EfficientNet-Lite0) and a frozen sentence encoder's embedding (MiniLM)
of the caption.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, SequentialSampler

from modeling_unit import UnitImageProcessor, UnitVisionConfig, UnitVisionModel

from .base_trainer import BaseTrainer
from .collator import _open
from .data.augment import composite_picture
from .data.mixture import RowSource, SourceArguments, _endless_permutation
from .optim import MuonWithAdamW, parameter_groups
from .trainer import _only_item

PROJECTION_FILE = "visual_projection.safetensors"


class TeacherModel(nn.Module):
    """Encoder with the two heads that teach it.

    `visual_projection` maps the class token to the sentence encoder's space and is kept (zero-shot naming);
    `imagenet_head` maps it to the classifier's features and is thrown away.
    """

    def __init__(self, config: UnitVisionConfig, sentence_width: int = 384, imagenet_width: int = 1280):
        super().__init__()
        self.config = config
        self.vision_model = UnitVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, sentence_width, bias=False)
        self.imagenet_head = nn.Linear(config.hidden_size, imagenet_width)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))  # temperature exp(-3) = 0.05 at the start
        for head in (self.visual_projection, self.imagenet_head):
            nn.init.trunc_normal_(head.weight, std=0.02)

    def forward(self, pixel_values, sentence, imagenet_features, imagenet_weight: float = 1.0):
        """Pixels `(B, 3, H, W)`, sentence embeddings `(B, 384)` of unit length, classifier features `(B, 1280)` ->
        losses."""
        pooled = self.vision_model(pixel_values, return_dict=True).pooler_output
        embeds = F.normalize(self.visual_projection(pooled).float(), dim=-1)
        # Pictures whose captions mean the same are no negatives of each other: their targets are shared
        alike = sentence @ sentence.T  # (B, B)
        targets = (alike > 0.95).float()
        targets = targets / targets.sum(dim=1, keepdim=True)
        logits = embeds @ sentence.T * self.logit_scale.exp().clamp(max=50.0)
        contrast = 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
        sentence_cosine = (1 - F.cosine_similarity(embeds, sentence)).mean()
        centred = imagenet_features - imagenet_features.mean(dim=0, keepdim=True)
        predicted = self.imagenet_head(pooled).float()
        distill = (1 - F.cosine_similarity(predicted, centred)).mean()
        return {
            "loss": contrast + sentence_cosine + imagenet_weight * distill,
            "contrast": contrast,
            "sentence_cosine": sentence_cosine,
            "distill": distill,
        }


class PictureTargets(Dataset):
    """Item i: micro-batch i of captioned pictures with their cached targets, drawn from a seed.

    Args:
        folder: as `unit data pictures` builds it, with `targets.safetensors` row by row beside the shards.
    """

    def __init__(self, folder: str, processor: UnitImageProcessor, batch_size: int, length: int, seed: int):
        self.source = RowSource(SourceArguments(path=folder))
        path = self.source.folder / "targets.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing: build the pictures with their targets first (`unit data pictures`).")
        self.targets = load_file(path)
        if len(self.targets["sentence"]) != len(self.source):
            raise ValueError(f"{path} has {len(self.targets['sentence'])} rows, the shards {len(self.source)}.")
        # the classifier's features share a large mean: without it cosine sees what differs
        self.mean = self.targets["efficientnet_features"].float().mean(dim=0)
        self.processor, self.batch_size, self.length, self.seed = processor, batch_size, length, seed

    def __len__(self) -> int:
        return self.length

    def origins(self, step: int) -> dict[str, list[str]]:
        """Where the rows of a micro-batch come from."""
        positions = _endless_permutation(len(self.source), self.seed, step * self.batch_size, self.batch_size)
        return {"pictures": [self.source.origin(int(position)) for position in positions]}

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        if not 0 <= step < self.length:
            raise IndexError(step)
        rng = np.random.default_rng([self.seed, 1, step])
        positions = _endless_permutation(len(self.source), self.seed, step * self.batch_size, self.batch_size)
        side = self.processor.base_size
        pixels = [
            self.processor.normalize(composite_picture(_open(self.source[int(position)]), rng, side))
            for position in positions
        ]
        index = torch.from_numpy(positions.astype(np.int64))
        return {
            "pixel_values": torch.from_numpy(np.stack(pixels)),
            "sentence": F.normalize(self.targets["sentence"][index].float(), dim=-1),
            "imagenet_features": self.targets["efficientnet_features"][index].float() - self.mean,
        }


class TeacherTrainer(BaseTrainer):
    """Trains a [`TeacherModel`]; `save_teacher` writes the encoder as a plain UNIT encoder repository."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("data_collator", _only_item)
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        output = model(**inputs)
        for key, value in output.items():
            if key != "loss":
                self._sums[key].append(
                    value.detach().float()
                )  # a number only when logged: float() waits for the device
        return (output["loss"], output) if return_outputs else output["loss"]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._sums:
            logs = logs | {key: round(float(torch.stack(values).mean()), 5) for key, values in self._sums.items()}
            self._sums.clear()
        super().log(logs, *args, **kwargs)

    def log_state(self) -> dict[str, Any]:
        return super().log_state() | {
            "terms": {key: [float(each) for each in values] for key, values in self._sums.items()}
        }

    def load_log_state(self, state: dict[str, Any]) -> None:
        super().load_log_state(state)
        for key, values in state["terms"].items():
            self._sums[key] = list(torch.tensor(values, device=self.args.device))

    def forget_terms(self) -> None:
        self._sums.clear()

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            settings = self.args
            muon = settings.muon_learning_rate if settings.optimizer == "muon" else None
            decays = {"encoder": settings.layer_decay}
            groups = parameter_groups(self.model, settings.learning_rate, settings.weight_decay, {}, muon, decays)
            self.optimizer = MuonWithAdamW(groups) if muon else torch.optim.AdamW(groups)
        return self.optimizer


def save_teacher(model: TeacherModel, folder: str | Path) -> None:
    """The encoder as `AutoModel` loads it, and its projection to the sentence encoder's space beside it."""
    model.vision_model.save_pretrained(folder)
    save_file({"weight": model.visual_projection.weight.detach().contiguous()}, str(Path(folder) / PROJECTION_FILE))


def load_projection(folder: str | Path) -> torch.Tensor | None:
    """`(sentence width, D)`, or `None` when the teacher has no projection."""
    path = Path(folder) / PROJECTION_FILE
    return load_file(str(path))["weight"] if path.is_file() else None
