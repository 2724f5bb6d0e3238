"""Evaluation in training: held-out losses, and what the model reads, printed, drawn and logged.

At each evaluation (`training.eval_strategy: steps`) the rows of `evaluation` in the recipe go through the model as it
is: without augmentation, dropout and random crops of positions, the teacher's features of all tokens in place of the
random subset C. Figures, as they are logged:

| figure | what |
|---|---|
| `eval_GROUP/TERM` | a term of the loss, its mean over all that is counted: labels, tokens, slots, places |
| `eval_loss` | the terms of all groups with the weights that training gives them |
| `eval_word_f1`, `eval_cer`, `eval_exact` | of all documents read (`training/evaluation/text.py`); and of each group |
| `eval_refused` | held-out rows that could not be used |

Texts are decoded greedily, up to a quarter more pieces than the reference has and `SPARE` [ours], so that a model that
does not know where to end costs little; a text that goes on counts as wrong either way.

Below the run's folder, `samples/step-N.png` shows images with what is expected and what was read, and
`samples/step-N.jsonl` holds every text read.

Over several processes each takes its share of the batches, and the figures are the same whatever their number, up to
the rounding of the model's own sums. Where the weights lie in parts (FSDP, ZeRO-3) all processes run the same number
of batches of one kind at the same time, some of them twice, counted once. Nothing that training draws from is touched:
a run with evaluation has the same curve as one without.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer

from modeling_unit import UnitProcessor
from modeling_unit.reading_unit import Reader

from .arguments import EvaluationArguments, UnitTrainingArguments
from .checkpoints import first_line
from .collator import GroupCollator
from .data.mapping import RowRefused
from .data.mixture import BROKEN, TOO_LONG, UNREADABLE, GroupShapes, RowSource, decoded, find_shards, told
from .data.refusals import Refusals
from .data.settings import GroupArguments, SourceArguments
from .sample_sheet import sample_sheet, sample_table
from .terms import TermLog, means

SPARE = 8  # pieces beyond a quarter more than the reference has [ours]
FOLDER = "samples"  # of a run
FIGURES = ("word_f1", "cer", "exact")  # of those in evaluation/text.py
TERMS = ("language_loss", "vision_loss", "vision_cosine", "vision_l1", "character_loss", "character_accuracy")
TERMS += ("alignment_loss", "alignment_accuracy")


@dataclass
class Sample:
    """A row that was read.

    Attributes:
        group: `document_x4`, ... number: of the row within its group. expected, read: texts. source: where it comes
            from, as the row says. image: as stored; there only where it is to be shown.
    """

    group: str
    number: int
    task: str
    expected: str
    read: str
    source: str
    image: Image.Image | None = field(default=None, repr=False)


class HeldOutGroup:
    """The rows of one kind and scale, chosen and put into batches of one grid and one task each.

    Args:
        packed: training packs this group: images keep their own grids, none padded.
        teacher_scale: as training has it, so that `L_vis` is measured against what is taught.
        slots: character targets a patch, 0 for none. positions: of the decoder, 0 for no limit.
    """

    def __init__(
        self,
        kind: str,
        scale: int,
        sources: list[SourceArguments],
        settings: EvaluationArguments,
        processor: UnitProcessor,
        refusals: Refusals,
        *,
        packed: bool = False,
        slots: int = 0,
        positions: int = 0,
        teacher_scale: int | str = 1,
    ):
        arguments = GroupArguments(kind, scale, rows=settings.batch_rows, packed=packed, sources=sources)
        self.name, self.settings = arguments.name, settings
        self.collator = GroupCollator(processor, kind, scale, slots, teacher_scale=teacher_scale)
        self.shapes = GroupShapes(arguments, self.collator, positions)
        self.rows: list[tuple[RowSource, int, tuple[int, int, int], str]] = []  # source, position, shape, task
        share = -(-settings.rows // len(sources))
        for source in sources:
            self._choose(RowSource(source, refusals), share, refusals)
        if not self.rows:
            names = ", ".join(source.name for source in sources)
            raise ValueError(f"evaluation: no row of {names} can be used for {self.name}.")
        # what is read comes first, so that its batches are full
        spread = [step * len(self.rows) // settings.rows for step in range(settings.rows)]
        self.rows = [self.rows[place] for place in dict.fromkeys(spread)]
        count = min(settings.read, len(self.rows))
        read = [step * len(self.rows) // count for step in range(count)]
        self.read = len(read)
        self.rows = [self.rows[place] for place in [*read, *(set(range(len(self.rows))) - set(read))]]
        shown = min(settings.samples, self.read)
        self.shown = {step * self.read // shown for step in range(shown)}

    def _choose(self, source: RowSource, count: int, refusals: Refusals) -> None:
        lengths = self.collator.text_tokens(source.column("text"), source.column("task"))
        positions = [len(source) * step // count for step in range(count)]
        for position in dict.fromkeys(positions):
            shape = self.shapes.of(*source.sizes[position], int(lengths[position]))
            try:
                row = decoded(source[position])
            except (*BROKEN, RowRefused) as error:
                reason, detail = UNREADABLE, told(error)
            else:
                if self.shapes.fits(shape):
                    self.rows.append((source, position, shape, row["task"]))
                    continue
                reason, detail = TOO_LONG, f"{lengths[position]} tokens"
            refusals.accept(source.name, -1)
            refusals.add(source.name, reason, f"row {source.index[position]}: {detail}")

    def batches(self, read: bool) -> list[list[int]]:
        """Numbers of the rows that come together, of those that are read or of all others."""
        alike: dict[tuple, list[int]] = defaultdict(list)
        for number, (_, _, shape, task) in enumerate(self.rows):
            if (number < self.read) == read:
                alike[(*shape[:2], task)].append(number)
        size = self.settings.batch_rows
        return [
            members[start : start + size]
            for _, members in sorted(alike.items())
            for start in range(0, len(members), size)
        ]

    def collated(self, numbers: list[int]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """A batch, and its rows with their images."""
        rows = [decoded(self.rows[number][0][self.rows[number][1]]) for number in numbers]
        shape = tuple(int(side) for side in np.max([self.rows[number][2] for number in numbers], axis=0))
        return self.collator(rows, None, shape), rows


class HeldOut:
    """The held-out rows of a run, the `eval_dataset` of its trainer."""

    def __init__(self, groups: list[HeldOutGroup], settings: EvaluationArguments, refusals: Refusals):
        self.groups, self.settings, self.refusals = groups, settings, refusals

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    @property
    def processor(self) -> UnitProcessor:
        return self.groups[0].collator.processor

    def knows(self, metric: str) -> bool:
        """Whether an evaluation may give such a figure."""
        names = {group.name for group in self.groups}
        group, _, term = metric.removeprefix("eval_").rpartition("/")
        reads = any(name.startswith("document") for name in names) and self.settings.read > 0
        if not group:
            return term == "loss" or (term in FIGURES and reads)
        return group in names and (term in TERMS or (term in FIGURES and reads and group.startswith("document")))


def held_out(
    settings: EvaluationArguments,
    processor: UnitProcessor,
    config: Any,
    training: list[GroupArguments],
    slots: int = 0,
    say: Callable[[str], Any] = print,
    teacher_scale: int | str = 1,
) -> HeldOut:
    """Choose the rows of an evaluation.

    Args:
        training: the groups of the run; a held-out source must not be one of theirs.
        slots: character targets a patch, 0 where they are not trained. say: gets the rows left out.
        teacher_scale: of the run.

    Raises:
        ValueError: no source; one that training reads too; one that is not there or has no row that can be used.
    """
    if not settings.sources:
        raise ValueError("evaluation needs `sources`: held-out rows, each with path (or dataset) and kind.")
    trained = {_identity(source): source.name for group in training for source in group.sources}
    for source in settings.sources:
        if _identity(source) in trained:
            raise ValueError(
                f"evaluation.sources: {source.name} is trained on too ({trained[_identity(source)]}): figures of rows "
                "that were learned say nothing; give a validation set."
            )
    refusals = Refusals(max_share=1.0)  # counted, never the end of a run
    packed = {group.name for group in training if group.packed}
    positions = getattr(config.text_config, "max_position_embeddings", None) or 0
    groups = [
        HeldOutGroup(
            kind,
            scale,
            sources,
            settings,
            processor,
            refusals,
            packed=f"{kind}_x{scale}" in packed,
            slots=slots if kind == "document" else 0,
            positions=positions,
            teacher_scale=teacher_scale,
        )
        for (kind, scale), sources in settings.as_groups().items()
    ]
    if refusals.refused:
        say(f"Held-out rows left out:\n{refusals}")
    return HeldOut(groups, settings, refusals)


def _identity(source: SourceArguments) -> str:
    """Two sources of one identity are the same rows."""
    if source.dataset:
        told = {key: value for key, value in source.dataset.items() if key in ("path", "name", "split", "files")}
        path = Path(str(told.get("path", "")))
        return json.dumps(told | {"split": told.get("split", "train"), "path": str(path.resolve())}, sort_keys=True)
    return str(find_shards(source.path)[0].resolve())


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Random states as they were, and the model in training or not, as it was."""
    training = model.training
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(training)
        random.setstate(states[0])
        np.random.set_state(states[1])


class SamplesInTraining(Trainer):
    """A trainer whose `eval_dataset` may be [`HeldOut`] rows; it needs `compute_loss` and `terms` of [`UnitTrainer`].

    Attributes:
        samples: what the last evaluation read, on rank 0. sheet: the picture of them, where there is one.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.samples: list[Sample] = []
        self.sheet: Image.Image | None = None
        settings: UnitTrainingArguments = self.args
        best = settings.metric_for_best_model
        if isinstance(self.eval_dataset, HeldOut) and best is not None and not self.eval_dataset.knows(best):
            raise ValueError(
                f"training.metric_for_best_model: an evaluation does not give {best!r}; it gives loss, "
                f"{', '.join(FIGURES)} where documents are read, and GROUP/TERM as in the log."
            )
        if settings.early_stopping_patience:
            self.add_callback(
                EarlyStoppingCallback(settings.early_stopping_patience, settings.early_stopping_threshold)
            )

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            self.args.eval_on_start = False  # the run has been looked at where it goes on
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        held = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(held, HeldOut):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self.with_average(), _left_alone(self.model), self._all_tokens():
            figures, samples = self._looked_at(held)
        figures |= {"refused": held.refusals.refused}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in figures.items()}
        self.samples, self.sheet = samples, None
        if self.is_world_process_zero():
            self._show(held, metrics, samples)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextmanager
    def _all_tokens(self) -> Iterator[None]:
        """`L_vis` over all tokens, and what training has gathered so far as it is."""
        kept = self.terms, self.args.token_sampling_ratio
        self.args.token_sampling_ratio = 1.0
        try:
            yield
        finally:
            self.terms, self.args.token_sampling_ratio = kept

    def _looked_at(self, held: HeldOut) -> tuple[dict[str, float], list[Sample]]:
        """Figures by name, the same on all ranks, and on rank 0 all that was read."""
        from .evaluation.text import count, summarise

        found: list[tuple[str, int, dict[str, list[Any]], list[Sample]]] = []
        world, rank = max(1, self.args.world_size), self.args.process_index
        together = world > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        with torch.no_grad(), self.accelerator.autocast():
            reader = Reader(_inner(self.model), held.processor)
            parts = [(group, reads, group.batches(reads)) for group in held.groups for reads in (True, False)]
            hidden = rank > 0 or self.args.disable_tqdm or not sys.stderr.isatty()
            total = sum(-(-len(batches) // world) for *_, batches in parts)
            with tqdm(total=total, desc="held out", delay=2, leave=False, disable=hidden) as bar:
                for group, reads, batches in parts:
                    for first in range(0, len(batches), world):
                        bar.update()
                        number = first + rank
                        if number >= len(batches) and not together:
                            continue  # other ranks have the rest
                        terms, samples = self._batch(group, batches[min(number, len(batches) - 1)], reader, reads)
                        if number < len(batches):
                            found.append((group.name, 2 * number + (not reads), terms, samples))
        if world > 1:
            found = gather_object(found)
        found.sort(key=lambda each: each[:2])  # sums in one order, whoever computed what
        sums: dict[str, list[Any]] = {}
        for _, _, terms, _ in found:
            for key, (total, count_, weight) in terms.items():
                before = sums.get(key, [np.zeros_like(total), np.zeros_like(count_)])
                sums[key] = [before[0] + total, before[1] + count_, weight]
        figures = means(
            {key: [total.tolist(), count_.tolist(), weight] for key, (total, count_, weight) in sums.items()}
        )
        samples = [sample for *_, several in found for sample in several]
        samples.sort(key=lambda sample: (sample.group, sample.number))
        documents = [sample for sample in samples if sample.group.startswith("document")]
        for group in ("", *dict.fromkeys(sample.group for sample in documents)):
            counts = [count(each.read, each.expected) for each in documents if group in ("", each.group)]
            if counts:
                values = {row.name: row.value for row in summarise(counts, resamples=1)}
                figures |= {f"{group}/{name}" if group else name: values[name] for name in FIGURES}
        return {key: round(value, 5) for key, value in figures.items()}, samples

    def _batch(
        self, group: HeldOutGroup, numbers: list[int], reader: Reader, reads: bool
    ) -> tuple[dict[str, list[Any]], list[Sample]]:
        """Total, count and weight of each term of the loss, and what is read."""
        batch, rows = group.collated(numbers)
        self.terms = TermLog()
        alone = defaultdict(lambda: torch.ones((), device=self.args.device))  # no rank asks another how many
        self.compute_loss(self.model, {group.name: self._prepare_inputs(dict(batch))}, num_items_in_batch=alone)
        terms = {
            key: [np.asarray(total), np.asarray(count), weight]
            for key, (total, count, weight) in self.terms.state().items()
        }
        if not reads:
            return terms, []
        samples = []
        for number, row, text in zip(numbers, rows, self._read(group, batch, reader), strict=True):
            image = row["image"] if number in group.shown else None
            where = str(row.get("source") or "")
            samples.append(Sample(group.name, number, row["task"], row["text"], text, where, image))
        return terms, samples

    def _read(self, group: HeldOutGroup, batch: dict[str, torch.Tensor], reader: Reader) -> list[str]:
        labels = batch["labels"]
        prompt = int((labels[0] >= 0).nonzero()[0])  # placeholders and prompt are as long in all rows
        limits = [math.ceil(1.25 * pieces) + SPARE for pieces in (labels >= 0).sum(dim=1).tolist()]
        if group.shapes.max_positions:
            limits = [max(1, min(each, group.shapes.max_positions - prompt)) for each in limits]
        inputs = {"input_ids": batch["input_ids"][:, :prompt], "attention_mask": batch["attention_mask"][:, :prompt]}
        return reader.read_inputs(inputs | {"pixel_values": batch["pixel_values"]}, limits)

    def _show(self, held: HeldOut, metrics: dict[str, float], samples: list[Sample]) -> None:
        """Print the samples, and write all that was read; a disk that is full is no reason to stop."""
        shown = [sample for sample in samples if sample.image is not None]
        if shown:
            table = sample_table(shown, shutil.get_terminal_size((120, 24)).columns)
            tqdm.write(table, file=sys.stdout)  # above the bar of the run
        folder = Path(self.args.output_dir) / FOLDER
        name = f"step-{self.state.global_step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(sample_facts(sample), ensure_ascii=False) for sample in samples]
            (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            if shown:
                title = f"step {self.state.global_step}"
                for figure, label in (("word_f1", "word F1"), ("cer", "CER")):
                    if f"eval_{figure}" in metrics:
                        title += f", {label} {metrics[f'eval_{figure}']:.3f}"
                self.sheet = sample_sheet(shown, title)
                self.sheet.save(folder / f"{name}.png")
        except OSError as error:
            print(f"{folder / name} cannot be written: {first_line(error)}.", flush=True)


def sample_facts(sample: Sample) -> dict[str, Any]:
    """A line of `samples/step-N.jsonl`."""
    from .evaluation.text import cer, word_f1

    facts = {"group": sample.group, "number": sample.number, "task": sample.task, "source": sample.source}
    facts |= {"expected": sample.expected, "read": sample.read}
    if sample.group.startswith("document"):
        facts |= {
            "word_f1": round(word_f1(sample.read, sample.expected), 4),
            "cer": round(cer(sample.read, sample.expected), 4),
        }
    return facts


def _inner(model: nn.Module) -> nn.Module:
    """The model that generates: below DDP's and peft's wrappers, its adapters in place."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
