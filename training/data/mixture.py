"""The plan of a run: which rows make which micro-batch, drawn from a seed.

A map-style dataset whose item i is the whole micro-batch i: the Trainer's own resume, which skips items without
loading them, then restores the exact order in mid-epoch, and ranks draw different items of one plan.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..collator import TEXT_STEP, GroupCollator
from .sources import data_folder

# Grid rows, grid columns, text tokens
Shape = tuple[int, int, int]


@dataclass
class SourceArguments:
    """One folder of parquet shards in the data schema.

    Args:
        path: a folder, or the name of a data set that `unit data` built in the cache.
        weight: share of the group's rows, relative to its other sources.
        max_area: only rows of at most so many pixels, 0 for all.
        max_characters: only rows with at most so many characters, 0 for all.
    """

    path: str
    weight: float = 1.0
    max_area: int = 0
    max_characters: int = 0


@dataclass
class GroupArguments:
    """Rows of one kind at one scale in every micro-batch.

    Args:
        kind: `"natural"` or `"document"`. scale: 1 or 4.
        rows: rows in a micro-batch; 0 to fill up to `patches`.
        patches: patches in a micro-batch, padding included; 0 when `rows` is given.
        packed: images of any sizes together, none padded; by default those of one padded grid come together.
        sources: where they come from.
    """

    kind: str
    scale: int
    rows: int = 0
    patches: int = 0
    packed: bool = False
    sources: list[SourceArguments] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}_x{self.scale}"


class RowSource:
    """The rows of one source, memory-mapped, with their sizes known beforehand."""

    def __init__(self, arguments: SourceArguments):
        from datasets import Dataset as ArrowDataset
        from datasets import Image as ImageFeature

        folder = Path(arguments.path)
        if not folder.is_dir():
            folder = data_folder(arguments.path)
        files = sorted(str(file) for file in folder.glob("*.parquet"))
        if not files:
            raise ValueError(
                f"No parquet shards in {arguments.path!r} (looked in {folder}). Build the data first: "
                "`unit data --help`."
            )
        rows = ArrowDataset.from_parquet(files, cache_dir=str(folder / ".arrow"))
        missing = {"image", "text", "task", "kind"} - set(rows.column_names)
        if missing:
            raise ValueError(f"{folder} lacks the columns {sorted(missing)}; see training/data/schema.py.")
        self.folder = folder
        self.rows = rows.cast_column("image", ImageFeature(decode=False))
        sizes = np.array([_image_size(value["bytes"]) for value in self._column("image")], dtype=np.int64)
        lengths = np.array([len(text.encode()) for text in self._column("text")], dtype=np.int64)
        keep = np.ones(len(sizes), dtype=bool)
        if arguments.max_area:
            keep &= sizes.prod(axis=1) <= arguments.max_area
        if arguments.max_characters:
            keep &= lengths <= arguments.max_characters
        self.index = np.flatnonzero(keep)
        if not len(self.index):
            raise ValueError(f"No row of {folder} passes max_area and max_characters.")
        self.sizes, self.lengths = sizes[self.index], lengths[self.index]

    def _column(self, name: str):
        for batch in self.rows.select_columns([name]).iter(batch_size=1000):
            yield from batch[name]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.rows[int(self.index[position])]


def _image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header, without decoding."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return struct.unpack(">II", data[16:24])
    return Image.open(io.BytesIO(data)).size


# Grids and text lengths are rounded up to few sizes: oneDNN compiles a kernel for each shape of a matrix product, so a
# run on a CPU that never repeats a shape spends its time compiling, and `torch.compile` and CUDA graphs want the same.
COLUMN_STEP = 16


def rounded_grid(rows: int, cols: int) -> tuple[int, int]:
    """The grid that an image of rows x cols patches is padded to."""
    row_step = 1 if rows <= 6 else 2 if rows <= 12 else 4
    return -(-rows // row_step) * row_step, -(-cols // COLUMN_STEP) * COLUMN_STEP


class GroupPlan:
    """Which rows of a group's sources make its part of each micro-batch.

    Rows are drawn without replacement, epoch after epoch, each source by its weight. Within a window of rows, those of
    one padded grid and text length come together (documents); the batches of a window are then shuffled. A batch that
    a window cannot fill is filled up with rows of the same size drawn again.

    Args:
        window: micro-batches whose rows are grouped together.
    """

    def __init__(self, arguments: GroupArguments, collator: GroupCollator, seed: int, window: int = 64):
        if bool(arguments.rows) == bool(arguments.patches):
            raise ValueError(f"Group {arguments.name}: give either rows or patches.")
        self.arguments, self.collator, self.seed, self.window = arguments, collator, seed, window
        self.sources = [RowSource(source) for source in arguments.sources]
        weights = np.array([source.weight for source in arguments.sources], dtype=np.float64)
        if not len(weights) or (weights < 0).any() or not weights.sum():
            raise ValueError(f"Group {arguments.name}: needs at least one source, weights must not be negative.")
        self.weights = weights / weights.sum()
        self._windows: dict[int, list[tuple[Shape, list[tuple[int, int]]]]] = {}
        self.shapes = [self._shapes(source) for source in self.sources]  # each (rows, 3): grid rows, columns, text
        if arguments.patches:
            per_row = sum(
                weight * np.mean(shapes[:, 0] * shapes[:, 1])
                for weight, shapes in zip(self.weights, self.shapes, strict=True)
            )
            # a tenth more than fills the window, so that it rarely falls short
            self.rows_in_window = max(1, int(1.1 * window * arguments.patches / per_row))
        else:
            self.rows_in_window = window * arguments.rows

    def _shapes(self, source: RowSource) -> np.ndarray:
        processor = self.collator.image_processor
        text = -(-(source.lengths + 2) // TEXT_STEP) * TEXT_STEP  # the prompt's token and the end
        if self.arguments.kind == "natural":
            grids = np.zeros((len(source), 2), dtype=np.int64)
        else:
            own = [
                processor.grid_for(int(width), int(height), "document", self.arguments.scale)
                for width, height in source.sizes
            ]
            grids = np.array(own if self.arguments.packed else [rounded_grid(*grid) for grid in own])
        return np.concatenate([grids, text[:, None]], axis=1)

    def batch(self, step: int) -> tuple[Shape, list[tuple[int, int]]]:
        """Padded shape, and (source, position) of the rows, of micro-batch `step`."""
        number, offset = divmod(step, self.window)
        if number not in self._windows:
            self._windows = {number: self._plan_window(number)}
        batches = self._windows[number]
        return batches[offset % len(batches)]

    def _plan_window(self, number: int) -> list[tuple[Shape, list[tuple[int, int]]]]:
        rng = np.random.default_rng([self.seed, number])
        rows: list[tuple[Shape, tuple[int, int]]] = []
        for index, source in enumerate(self.sources):
            # the window's share of an endless sequence of permutations
            begin, end = (
                round(each * self.rows_in_window * float(self.weights[index])) for each in (number, number + 1)
            )
            for position in _endless_permutation(len(source), self.seed + 7919 * index, begin, end - begin):
                rows.append((tuple(int(size) for size in self.shapes[index][position]), (index, int(position))))
        order = rng.permutation(len(rows))
        if self.arguments.packed:
            return self._packs([rows[place] for place in order], rng)
        by_shape: dict[Shape, list[tuple[int, int]]] = {}
        for place in order:
            shape, row = rows[place]
            if self.arguments.rows:
                shape = (0, 0, 0)  # natural pictures share one grid: any come together
            by_shape.setdefault(shape, []).append(row)
        batches = []
        for shape, members in sorted(by_shape.items()):
            count = self.arguments.rows or max(1, self.arguments.patches // (shape[0] * shape[1]))
            for start in range(0, len(members), count):
                batch = members[start : start + count]
                while len(batch) < count:
                    batch.append(members[int(rng.integers(len(members)))])
                batches.append((shape, batch))
        return [batches[place] for place in rng.permutation(len(batches))]

    def _packs(self, rows: list[tuple[Shape, tuple[int, int]]], rng: np.random.Generator):
        """Rows as they come, as many to a pack as fit; the last one is filled up with rows drawn again."""
        packs: list[tuple[Shape, list[tuple[int, int]]]] = []
        members: list[tuple[int, int]] = []
        patches = 0
        more = (rows[int(rng.integers(len(rows)))] for _ in iter(int, 1))  # without end
        for shape, row in itertools.chain(rows, more):
            size = shape[0] * shape[1]
            rows_given, budget = self.arguments.rows, self.arguments.patches
            if members and (len(members) == rows_given if rows_given else patches + size > budget):
                packs.append(((0, 0, 0), members))
                members, patches = [], 0
                if sum(len(pack) for _, pack in packs) >= len(rows):
                    return packs
            members.append(row)
            patches += size
        raise AssertionError("the rows have no end")

    def __getitem__(self, step: int) -> dict[str, Any]:
        shape, members = self.batch(step)
        rows = [self.sources[source][position] for source, position in members]
        return self.collator(rows, np.random.default_rng([self.seed, 1, step]), shape)


def _endless_permutation(length: int, seed: int, begin: int, count: int) -> np.ndarray:
    """Positions begin ... begin + count of permutation after permutation of `range(length)`."""
    out: list[np.ndarray] = []
    while count > 0:
        epoch, start = divmod(begin, length)
        part = np.random.default_rng([seed, epoch]).permutation(length)[start : start + count]
        out.append(part)
        begin, count = begin + len(part), count - len(part)
    return np.concatenate(out) if out else np.zeros(0, dtype=np.int64)


class MixtureDataset(Dataset):
    """Item i: micro-batch i, `{group name: collated group}`."""

    def __init__(self, groups: Sequence[GroupPlan], length: int):
        names = [group.arguments.name for group in groups]
        if len(set(names)) != len(names):
            raise ValueError(f"Each kind and scale may be given once, got {names}.")
        self.groups, self.length = list(groups), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> dict[str, dict[str, Any]]:
        if not 0 <= step < self.length:
            raise IndexError(step)
        return {group.arguments.name: group[step] for group in self.groups}
