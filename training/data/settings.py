"""What a recipe says about data: sources and their weights, groups, shares of kinds and scales, the curriculum.

Two ways to say it. `groups` gives every kind and scale with its own budget, as the shipped recipes do. `data` with
`sources` gives shares, and [`expand_groups`] works out the groups of the stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KINDS = ("natural", "document")
TASKS = ("ocr", "caption", "markdown")
EXCHANGED_DOCUMENTS = "document_x1"  # the group of documents that stage 2 adds


@dataclass
class SourceArguments:
    """Rows in the data schema, or rows of any data set that a mapping brings into it.

    Args:
        path: a folder of parquet shards in the schema, or the name of a data set that `unit data` built in the cache.
        dataset: in place of `path`: any data set and how its columns become ours; see `training/data/mapping.py`.
        weight: share of the group's rows, relative to its other sources.
        max_area: only rows of at most so many pixels, 0 for all.
        max_characters: only rows with at most so many bytes of text, 0 for all.
        kind: `"natural"` or `"document"`; needed below `data`, where the groups are worked out.

    Raises:
        ValueError: neither or both of `path` and `dataset`.
    """

    path: str = ""
    weight: float = 1.0
    max_area: int = 0
    max_characters: int = 0
    kind: str = ""
    dataset: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if bool(self.path) == bool(self.dataset):
            raise ValueError("A source needs `path` or `dataset`, one of the two.")
        if self.dataset:
            self.kind = self.kind or self.dataset.get("kind") or ""

    @property
    def name(self) -> str:
        """What refusals and errors call it."""
        return self.path or str(self.dataset.get("path"))


@dataclass
class GroupArguments:
    """Rows of one kind at one scale in every micro-batch.

    Args:
        kind: `"natural"` or `"document"`. scale: 1 or 4.
        rows: rows in a micro-batch; 0 to fill up to `patches`.
        patches: patches in a micro-batch, padding included; 0 when `rows` is given.
        packed: images of any sizes together, none padded; by default those of one padded grid come together.
        tasks: share of the group's rows by task; by default tasks come as the sources have them.
        sources: where they come from.
    """

    kind: str
    scale: int
    rows: int = 0
    patches: int = 0
    packed: bool = False
    tasks: dict[str, float] = field(default_factory=dict)
    sources: list[SourceArguments] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}_x{self.scale}"


@dataclass
class CurriculumArguments:
    """Short texts and small images first: the longest text and the largest area grow over the first steps [ours].

    The limit grows in `levels` equal stairs from `text[0]` to `text[1]` (and so the area), one stair every
    `steps / levels` optimiser steps; from step `steps` on nothing is left out. It depends on the step alone, so that
    all ranks see the same.

    Args:
        steps: optimiser steps until every row may come; 0 for no curriculum.
        text: first and last limit of the text in tokens, prompt and end included; empty for no limit.
        area: first and last limit of the image in pixels; empty for no limit.
        levels: stairs; 8 [ours].
    """

    steps: int = 0
    text: list[int] = field(default_factory=list)
    area: list[int] = field(default_factory=list)
    levels: int = 8

    def __post_init__(self):
        for name in ("text", "area"):
            given = getattr(self, name)
            if given and (len(given) != 2 or not 0 < given[0] <= given[1]):
                raise ValueError(f"curriculum.{name} must be [first, last] with 0 < first <= last, got {given}.")
        if self.steps < 0 or self.levels < 1:
            raise ValueError("curriculum.steps must not be negative, curriculum.levels must be 1 or more.")
        if self.steps and not (self.text or self.area):
            raise ValueError("The curriculum limits nothing: give `text` or `area`.")

    def level(self, step: int) -> int:
        """Which stair optimiser step `step` is on: 0 ... levels - 1, then `levels`, on which nothing is left out."""
        return min(self.levels, step * self.levels // self.steps) if self.steps else self.levels

    def limits(self, level: int) -> tuple[float, float]:
        """Longest text in tokens and largest area in pixels on a stair."""
        if level >= self.levels:
            return float("inf"), float("inf")
        share = level / max(1, self.levels - 1)
        text, area = (
            given[0] + share * (given[1] - given[0]) if given else float("inf") for given in (self.text, self.area)
        )
        return text, area


@dataclass
class DataArguments:
    """The data of a run as a whole.

    Args:
        sources: where rows come from, each with its `kind`; then `groups` are worked out and must not be given.
        patches: patches in a micro-batch, all groups together, padding included; needed with `sources`.
        kinds: share of the patches by kind; equal shares by default [ours].
        tasks: share of each kind's rows by task, `{ocr: 3, markdown: 1}`; by default as the sources have them.
        exchanged: stage 2: share of each kind's rows that come at the exchanged scale, natural pictures at x4 and
            documents at x1. The paper adds them and states no share; 0.2 [ours].
        exchanged_x_height: which text documents at x1 read: rows whose lower-case x is known to be lower than so many
            pixels once the page is brought to x1 are left out; 0 reads them all. The paper gives x1 pages of large
            letters and no number; 4.5 [ours]: the smallest that unit-tiny's recipe reads at x1 are 4.8 [measured].
        packed: as in a group, for the documents.
        augment_pictures: natural pictures are placed, scaled, mirrored and toned at random [ours]; with `false` each
            comes always the same, as in evaluation: for `training.teacher_cache`.
        curriculum: settings of [`CurriculumArguments`].
        streaming: read shard after shard instead of indexing every row beforehand; see `training/data/streaming.py`.
        shuffle_buffer: streaming: rows of a source that are shuffled together; 500 [ours].
        buckets: streaming: shapes that rows of a group are padded to, at most; 16 [ours]: on the tiny recipe's pages a
            micro-batch then holds 89% of the rows that it holds with all 72 shapes, with 8 shapes 68% [measured].
        buffered: streaming: micro-batches' worth of rows that may wait for their like, in each group; 16 [ours].
        probe: streaming: rows of each source looked at beforehand to learn which shapes there are; 1000 [ours].
        ranks: processes that the micro-batches of one shape are planned for; 0 for as many as there are. A run may
            go on over fewer that divide it.
        streams: streaming: parts that the sources are split into; 0 for one a dataloader worker of each process. A
            run may go on with other workers and processes whose product divides it.
    """

    sources: list[SourceArguments] = field(default_factory=list)
    patches: int = 0
    kinds: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    exchanged: float = 0.2
    exchanged_x_height: float = 4.5
    packed: bool = False
    augment_pictures: bool = True
    curriculum: CurriculumArguments = field(default_factory=CurriculumArguments)
    streaming: bool = False
    shuffle_buffer: int = 500
    buckets: int = 16
    buffered: int = 16
    probe: int = 1000
    ranks: int = 0
    streams: int = 0

    def __post_init__(self):
        self.sources = [SourceArguments(**each) if isinstance(each, Mapping) else each for each in self.sources]
        if isinstance(self.curriculum, Mapping):
            self.curriculum = CurriculumArguments(**self.curriculum)
        for name in ("shuffle_buffer", "buckets", "buffered", "probe"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be 1 or more, got {getattr(self, name)}.")
        for name in ("ranks", "streams", "patches"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must not be negative, got {getattr(self, name)}.")
        if self.exchanged_x_height < 0:
            raise ValueError(f"data.exchanged_x_height must not be negative, got {self.exchanged_x_height}.")
        if not 0.0 < self.exchanged < 1.0:
            raise ValueError(f"data.exchanged must lie between 0 and 1, got {self.exchanged}.")
        check_weights(self.kinds, KINDS, "data.kinds")
        check_weights(self.tasks, TASKS, "data.tasks")
        if self.sources and not self.patches:
            raise ValueError("data.sources needs data.patches, the size of a micro-batch.")
        for source in self.sources:
            if source.kind not in KINDS:
                raise ValueError(f"data.sources: {source.name!r} needs kind: natural or document.")


def check_weights(weights: Mapping[str, float], known: Sequence[str], where: str) -> None:
    """Weights by name: known names, none negative, some above 0.

    Raises:
        ValueError: otherwise.
    """
    if unknown := sorted(set(weights) - set(known)):
        raise ValueError(f"{where} knows {', '.join(known)}, not {', '.join(map(repr, unknown))}.")
    if weights and (any(not 0 <= each < float("inf") for each in weights.values()) or not sum(weights.values())):
        raise ValueError(f"{where}: weights must not be negative, and one must be above 0; got {dict(weights)}.")


def expand_groups(data: DataArguments, stage: str, patches_per_image: Mapping[int, float]) -> list[GroupArguments]:
    """The groups of a stage, from shares.

    Stage 1 has natural pictures at x1 and documents at x4, stage 2 the exchanged scales besides [paper]. Of each kind
    `exchanged` of the rows come at the other scale. Pictures have one size at a scale, so their rows are counted out;
    documents are given patches in proportion, as if each filled its scale's area.

    Args:
        stage: `"intra_scale"` or `"inter_scale"`.
        patches_per_image: patches of a picture by scale.

    Raises:
        ValueError: a kind with a share but no source, or the other way round.
    """
    there = {source.kind for source in data.sources}
    shares = {kind: data.kinds.get(kind, 0.0) if data.kinds else 1.0 for kind in KINDS}
    for kind in KINDS:
        if (shares[kind] > 0) != (kind in there):
            raise ValueError(f"data: {kind} needs a source and a share in data.kinds above 0, both or neither.")
    total = sum(shares.values())
    home = {"natural": 1, "document": 4}
    groups = []
    for kind in KINDS:
        if not shares[kind]:
            continue
        budget = data.patches * shares[kind] / total
        own, other = home[kind], 5 - home[kind]
        parts = {own: 1.0} if stage == "intra_scale" else {own: 1.0 - data.exchanged, other: data.exchanged}
        per_row = sum(part * patches_per_image[scale] for scale, part in parts.items())
        for scale, part in parts.items():
            rows = budget / per_row * part
            size = {"rows": max(1, round(rows))}
            if kind == "document":
                size = {"patches": max(1, round(rows * patches_per_image[scale])), "packed": data.packed}
            sources = [source for source in data.sources if source.kind == kind]
            groups.append(GroupArguments(kind, scale, tasks=_tasks_of(kind, data.tasks), sources=sources, **size))
    return groups


def _tasks_of(kind: str, tasks: Mapping[str, float]) -> dict[str, float]:
    """The tasks that rows of a kind have: pictures are captioned, pages are read."""
    mine = {task: weight for task, weight in tasks.items() if (task == "caption") == (kind == "natural")}
    return mine if sum(mine.values()) else {}


def pool_weights(weights: Sequence[float], tasks: Mapping[str, float], present: np.ndarray) -> np.ndarray:
    """Share of each source and task, `(sources, len(tasks))`, or `(sources, 1)` without tasks; the sum is 1.

    A task's share is split over the sources that have it, by their weights; tasks and sources that are not there leave
    their share to the others.

    Args:
        weights: of the sources. tasks: weights by task. present: `(sources, len(tasks) or 1)`, whether there are rows.
    """
    shares = np.asarray(weights, dtype=np.float64)[:, None] * present
    sums = shares.sum(axis=0)
    by_task = np.asarray(list(tasks.values()) or [1.0], dtype=np.float64) * (sums > 0)
    if not by_task.sum():
        return np.zeros_like(shares)
    return shares / np.where(sums > 0, sums, 1.0) * (by_task / by_task.sum())
