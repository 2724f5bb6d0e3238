"""What the end models of an ablation are measured by: held-out figures that move early, in seconds a model.

A run of a hundred steps does not read words yet. What it has learned of reading shows in the loss of held-out texts
and in the characters that the auxiliary head names; what it has kept of recognition in its features beside the
teacher's, and in k-NN and zero-shot naming of held-out pictures.

| figure | what | where |
|---|---|---|
| `language_loss` | nats a piece of text, here a byte | documents at x4 and x1, captions at x1 and x4 |
| `word_f1` | of texts decoded greedily; needs `read` | documents at x4 and x1 |
| `character_accuracy` | characters that the head names rightly, of a model that has one | documents at x4 and x1 |
| `vision_cosine` | `L_cos` of all tokens, through the vision decoder | pictures at x1 and at the model's own x4 |
| `teacher_cosine` | class token beside the teacher's of the same picture at x1 | resolutions |
| `teacher_cka` | linear CKA of the class token with the teacher's at x1 | resolutions |
| `knn_accuracy` | k-NN by the class token, over hands that draw | resolutions |
| `zero_shot_top1`, `zero_shot_top5` | kinds named, through the vision decoder and without it | resolutions |

Resolutions are x1 and twice its side for every model, whatever it calls x4.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.evaluation.contract import Figure

# name: unit, which is better; in the order of the table
FIGURES = {
    "language_loss": ("nats", "lower"),
    "word_f1": ("share", "higher"),
    "character_accuracy": ("share", "higher"),
    "vision_cosine": ("", "lower"),
    "teacher_cosine": ("", "higher"),
    "teacher_cka": ("share", "higher"),
    "knn_accuracy": ("share", "higher"),
    "zero_shot_top1": ("share", "higher"),
    "zero_shot_top5": ("share", "higher"),
}
IN_TRAINING = ("language_loss", "word_f1", "character_accuracy", "vision_cosine")  # of the trainer's own evaluation
MANNER = 1  # goes up when a figure is measured otherwise than before


@dataclass(frozen=True)
class Measure:
    """What is measured on. All numbers are [ours].

    Args:
        documents, pictures: folder or name of the held-out sets.
        max_area: documents of at most so many pixels at x4; at x1 of what x1 holds.
        rows: documents and pictures of each scale, for the losses. read: of the documents, those that are read.
        kinds: kinds of pictures, of all there are, for what looks at features; 0 for all.
        batch: pictures at a time.

    Raises:
        ValueError: numbers that make no sense.
    """

    documents: str = "chunks-validation"
    pictures: str = "pictures-validation"
    max_area: int = 65536
    rows: int = 64
    read: int = 0
    kinds: int = 0
    batch: int = 32

    def __post_init__(self):
        for name in ("rows", "batch", "max_area"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"measure.{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not 0 <= self.read <= self.rows or self.kinds < 0:
            raise ValueError("measure needs 0 <= read <= rows and kinds of at least 0")


def _folder(name: str) -> Path:
    from training.data.sources import data_folder

    return Path(name) if Path(name).is_dir() else data_folder(name)


def check_sets(grid: Any) -> None:
    """Before hours of work, not after them.

    Raises:
        ValueError: a set is not there; or figures and settings that do not go together.
    """
    settings = Measure(**grid.measure)
    if "word_f1" in grid.figures and not settings.read:
        raise ValueError("figures: word_f1 needs measure: {read: N}, of how many documents")
    for name in (settings.documents, settings.pictures):
        if not any(_folder(name).glob("*.parquet")):
            raise ValueError(f"measure: there is no set {name!r} ({_folder(name)} has no *.parquet): see docs/data.md")


def measured_by(grid: Any) -> str:
    """Hash of what decides the figures of a model: figures that were measured otherwise are measured again."""
    settings = Measure(**grid.measure)
    facts = [MANNER, sorted(grid.figures), sorted(vars(settings).items())]
    for name in (settings.documents, settings.pictures):
        facts.append(sorted([file.name, file.stat().st_size] for file in _folder(name).glob("*.parquet")))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def measured(grid: Any, model: str | Path, teacher: str, bf16: bool) -> list[Figure]:
    """All figures of a model that the grid asks for and the model can give.

    Args:
        model: folder of a full UNIT model. teacher: folder or Hub id. bf16: compute in bfloat16, as in training.
    """
    settings = Measure(**grid.measure)
    found: list[Figure] = []
    with _silence():
        if set(grid.figures) & set(IN_TRAINING):
            found += _in_training(settings, str(model), teacher, bf16)
        if set(grid.figures) - set(IN_TRAINING):
            found += _of_features(settings, str(model), teacher, bf16)
    order = list(FIGURES)
    return sorted((each for each in found if each.name in grid.figures), key=lambda each: order.index(each.name))


def _figure(name: str, value: float, items: int, at: dict[str, Any], ends: tuple | None = None) -> Figure:
    unit, better = FIGURES[name]
    low, high = ends or (None, None)
    return Figure(name, float(value), low, high, items=items, unit=unit, better=better, at=at)


# -- losses, as a run evaluates itself --------------------------------------------------------------------------------


def _in_training(settings: Measure, model: str, teacher: str, bf16: bool) -> Iterator[Figure]:
    import torch
    from transformers import AutoProcessor

    from modeling_unit import UnitForPreTraining
    from modeling_unit.vision_sources_unit import find_vision_source
    from training.arguments import EvaluationArguments, HeldOutSource, UnitTrainingArguments
    from training.samples import held_out
    from training.trainer import UnitTrainer

    student = UnitForPreTraining.from_pretrained(model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model)
    letters = student.config.num_character_classes > 0
    areas = {4: settings.max_area, 1: int(processor.image_processor.area(1))}
    sources = [HeldOutSource(settings.documents, kind="document", scale=s, max_area=areas[s]) for s in (4, 1)]
    sources += [HeldOutSource(settings.pictures, kind="natural", scale=s) for s in (1, 4)]
    evaluation = EvaluationArguments(sources=sources, rows=settings.rows, read=settings.read, samples=0)
    slots = student.config.character_slots if letters else 0
    with tempfile.TemporaryDirectory() as folder:
        held = held_out(evaluation, processor, student.config, [], slots, say=lambda line: None)
        arguments = UnitTrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            bf16=bf16,
            character_weight=float(letters),
            remove_unused_columns=False,
            per_device_train_batch_size=1,
            max_steps=1,
            disable_tqdm=True,
        )
        trainer = UnitTrainer(
            model=student,
            args=arguments,
            eval_dataset=held,
            teacher=find_vision_source(teacher).load(torch.float32),
            image_processor=processor.image_processor,
        )
        metrics = trainer.evaluate()
    counts = {group.name: len(group.rows) for group in held.groups}
    sets = {"document": "documents", "natural": "pictures"}
    for name in IN_TRAINING:
        for group, rows in counts.items():
            if (value := metrics.get(f"eval_{group}/{name}")) is not None:
                kind, scale = group.split("_")
                yield _figure(name, value, settings.read if name == "word_f1" else rows, _at(sets[kind], scale))


def _at(set_name: str, scale: str) -> dict[str, Any]:
    return {"set": set_name, "scale": scale}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """A trainer prints what it measures, and transformers what it loads."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


# -- features of pictures ---------------------------------------------------------------------------------------------


def _of_features(settings: Measure, model: str, teacher: str, bf16: bool) -> Iterator[Figure]:
    import numpy as np
    import torch

    from training.evaluation.image import (
        bootstrap_interval,
        knn_correct,
        linear_cka,
        read_validation,
        zero_shot_ranks,
    )
    from training.evaluation.subjects import PictureEncoder

    encoder = PictureEncoder(model, _device())
    rows, kinds, families = _kinds(settings.pictures, settings.kinds)
    taught = _teacher_tokens(settings.pictures, settings.kinds, teacher, settings.batch, bf16)
    _, names, class_embeds = read_validation(_folder(settings.pictures))
    labels = [names.index(kind) for kind in kinds]
    count = len(rows)
    for resolution in (encoder.resolution, 2 * encoder.resolution):
        at = {"resolution": resolution}
        tokens = class_tokens(encoder, settings, resolution, bf16)  # (n, D)
        value = tokens.numpy()
        cosines = torch.nn.functional.cosine_similarity(tokens, torch.from_numpy(taught)).numpy()
        yield _figure("teacher_cosine", cosines.mean(), count, at, bootstrap_interval(cosines, kinds))
        yield _figure("teacher_cka", linear_cka(value, taught), count, at)
        correct = knn_correct(value, kinds, families)
        yield _figure("knn_accuracy", correct.mean(), count, at, bootstrap_interval(correct, kinds))
        if encoder.projection is None or not hasattr(encoder.model, "vision_decoder"):
            continue
        with torch.inference_mode():
            decoded = encoder.model.vision_decoder(tokens.to(encoder.device)).float().cpu()
            for way, features in {"vision decoder": decoded, "no vision decoder": tokens}.items():
                embeds = (features @ encoder.projection.float().cpu().T).numpy()
                ranks = zero_shot_ranks(embeds, class_embeds, labels)
                for top in (1, 5):
                    right = np.asarray(ranks < top)
                    ends = bootstrap_interval(right, kinds)
                    yield _figure(f"zero_shot_top{top}", right.mean(), count, at | {"way": way}, ends)


def class_tokens(encoder: Any, settings: Measure, resolution: int, bf16: bool) -> Any:
    """`(n, D)` float32, of all held-out pictures in order."""
    import torch

    found = []
    pictures = _pictures(settings.pictures, settings.kinds, resolution)
    for first in range(0, len(pictures), settings.batch):
        with torch.autocast(encoder.device, dtype=torch.bfloat16, enabled=bf16):
            tokens, _ = encoder.tokens(pictures[first : first + settings.batch], resolution)
        found.append(tokens.float().cpu())
    return torch.cat(found)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=2)
def _teacher_tokens(pictures: str, kinds: int, teacher: str, batch: int, bf16: bool) -> Any:
    from training.evaluation.subjects import PictureEncoder

    encoder = PictureEncoder(teacher, _device())
    settings = Measure(pictures=pictures, kinds=kinds, batch=batch)
    return class_tokens(encoder, settings, encoder.resolution, bf16).numpy()


@lru_cache(maxsize=2)
def _kinds(pictures: str, kinds: int) -> tuple[list[dict], list[str], list[str]]:
    """Rows, their kinds and their families of style; of some kinds only, spread over all."""
    from training.evaluation.image import read_validation

    rows, names, _ = read_validation(_folder(pictures))
    if kinds and kinds < len(names):
        kept = {names[place * len(names) // kinds] for place in range(kinds)}
        rows = [row for row in rows if row["concept"] in kept]
    return rows, [row["concept"] for row in rows], [row["family"] for row in rows]


@lru_cache(maxsize=4)
def _pictures(pictures: str, kinds: int, resolution: int) -> list[Any]:
    """All held-out pictures at a resolution, drawn once: uint8, RGB."""
    from training.evaluation.image import validation_picture

    return [validation_picture(row, resolution) for row in _kinds(pictures, kinds)[0]]
