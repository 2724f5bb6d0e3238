"""One process of test_ranks.py: trains a tiny model on its share of the data and writes down what it saw."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from test_trainer import arguments, model_and_teacher
from tiny import processor

from training.collator import GroupCollator
from training.data.mixture import GroupPlan, MixtureDataset
from training.data.settings import DataArguments, GroupArguments, SourceArguments
from training.data.streaming import StreamDataset, StreamGroup
from training.trainer import IntraScaleTrainer

FOLDER = Path(sys.argv[1])
RANK = int(os.environ["RANK"])


def seen(way: str, resume: str | None = None, spoil=None) -> list[tuple[str, str]]:
    """Shapes and rows of this rank's micro-batches of a run of 4 steps, 2 micro-batches each."""
    settings = arguments(
        FOLDER / way,
        max_steps=4,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        ema_decay=0.9,
    )
    torch.manual_seed(0)
    model, teacher = model_and_teacher()
    groups = []
    for kind, scale, size in (("natural", 1, {"rows": 2}), ("document", 4, {"patches": 64})):
        group = GroupArguments(kind, scale, sources=[SourceArguments(str(FOLDER / kind))], **size)
        groups.append((group, GroupCollator(processor(), kind, scale)))
    if way == "stream":
        data = DataArguments(streaming=True, shuffle_buffer=6)
        dataset = StreamDataset([StreamGroup(*each, data, 0) for each in groups], data, 16, rank=RANK, world=2)
    else:
        dataset = MixtureDataset([GroupPlan(*each, seed=0, window=4, ranks=2) for each in groups], 16)
    trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=dataset, teacher=teacher)
    lines = []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        shapes = [f"{name} {key} {tuple(each.shape)}" for name in inputs for key, each in inputs[name].items()]
        rows = hashlib.sha256(b"".join(each["input_ids"].numpy().tobytes() for each in inputs.values())).hexdigest()
        lines.append(("; ".join(sorted(shapes)), rows))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watched
    if spoil is not None:
        spoil(trainer)
    trainer.train(resume_from_checkpoint=resume)
    shadow = b"".join(each.numpy().tobytes() for each in trainer.average.shadow.values())
    averages.append(hashlib.sha256(shadow).hexdigest())
    return lines


torch.set_num_threads(1)
averages: list[str] = []  # of the weights, at the end of each run
found = {}
for way in ("map", "stream"):
    straight = seen(way)
    found[way] = {"straight": straight, "resumed": seen(way, str(FOLDER / way / "checkpoint-2"))}

found["averages"] = averages


def full(trainer) -> None:
    """Rank 1 has no room for its part of a checkpoint."""

    def failing(output_dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if RANK == 1:
        trainer._save_rng_state = failing


def lost(trainer) -> None:
    """Rank 1 has a loss that is no number."""
    compute_loss = trainer.compute_loss
    if RANK == 1:
        trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * float("nan")


for name, spoil in (("full", full), ("lost", lost)):
    try:
        seen(name, spoil=spoil)
    except ValueError as error:
        found[name] = str(error)
(FOLDER / f"seen-{RANK}.json").write_text(json.dumps(found))
