"""The plan of a run: which rows make which micro-batch, drawn from a seed.

A map-style dataset whose item i is the whole micro-batch i: the Trainer's own resume, which skips items without
loading them, then restores the exact order in mid-epoch, and ranks draw different items of one plan. Items
`n * ranks ... (n + 1) * ranks - 1` have one shape, so that no rank waits for another's larger batch.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..collator import TEXT_STEP, GroupCollator
from .refusals import Refusals
from .settings import CurriculumArguments, GroupArguments, SourceArguments, pool_weights
from .sources import data_folder

# Grid rows, grid columns, text tokens
Shape = tuple[int, int, int]
# A row as it is drawn: source, position, seed (see `row_seed`)
Drawn = tuple[int, int, int]
# What Pillow raises for a file that is no image, or half of one, or a bomb
BROKEN = (OSError, ValueError, TypeError, SyntaxError, struct.error, Image.DecompressionBombError)
UNREADABLE, TOO_LONG = "the image cannot be read", "longer than the decoder's positions"


class RowSource:
    """The rows of one source, memory-mapped, with their sizes known beforehand.

    Rows whose image has no readable header are left out and counted in `refusals`. Of the others, `broken` says which
    failed when they were drawn; dataloader workers write it and all processes see it.
    """

    def __init__(self, arguments: SourceArguments, refusals: Refusals | None = None):
        from datasets import Dataset as ArrowDataset
        from datasets import Image as ImageFeature
        from datasets.exceptions import DatasetGenerationError

        from .mapping import whole_parquet

        refusals = Refusals() if refusals is None else refusals
        self.name, self.mapped = arguments.name, None
        if arguments.dataset:
            self._map(arguments, refusals)
            return
        self.folder, files = find_shards(arguments.path)
        files = [str(file) for file in whole_parquet([Path(file) for file in files], self.name, refusals)]
        try:
            rows = ArrowDataset.from_parquet(files, cache_dir=str(self.folder / ".arrow"))
        except DatasetGenerationError as error:
            why = told(error.__cause__ or error)
            raise ValueError(
                f"{self.folder}: a shard is damaged, or has other columns than the first ({why}). "
                f"`unit data validate {arguments.path}` says which; data.streaming: true reads what is whole."
            ) from error
        missing = {"image", "text", "task", "kind"} - set(rows.column_names)
        if missing:
            raise ValueError(f"{self.folder} lacks the columns {sorted(missing)}; see training/data/schema.py.")
        wrong = [name for name in ("text", "task", "kind") if "string" not in str(rows.features[name].dtype)]
        if wrong:
            raise ValueError(f"{self.folder}: {', '.join(wrong)} must be strings; see training/data/schema.py.")
        self.rows = rows.cast_column("image", ImageFeature(decode=False))
        sizes = np.zeros((len(self.rows), 2), dtype=np.int64)
        keep = np.ones(len(sizes), dtype=bool)
        for place, value in enumerate(self._column("image")):
            try:
                sizes[place] = image_size(value["bytes"])
            except BROKEN as error:
                keep[place] = False
                refusals.add(self.name, UNREADABLE, f"row {place}: {told(error)}")
                continue
            refusals.accept(self.name)
        x_heights = np.zeros(len(sizes))
        if "x_height" in rows.column_names:
            x_heights[:] = [value or 0.0 for value in self._column("x_height")]
        lengths = np.zeros(len(sizes), dtype=np.int64)
        for place, text in enumerate(self._column("text")):
            if text is not None:
                lengths[place] = len(text.encode())
            elif keep[place]:
                keep[place] = False
                refusals.accept(self.name, -1)
                refusals.add(self.name, "text: missing", f"row {place}")
        self._limit(arguments, keep, sizes, lengths, x_heights)

    def _map(self, arguments: SourceArguments, refusals: Refusals) -> None:
        """Index the rows of a data set that is mapped: each is mapped once now, and again when it is drawn."""
        from .mapping import RowRefused, read_source

        self.mapped = read_source(arguments, refusals=refusals, verify=False)
        self.folder, self.rows = Path(self.name), self.mapped.dataset
        sizes = np.zeros((len(self.rows), 2), dtype=np.int64)
        lengths, keep = np.zeros(len(sizes), dtype=np.int64), np.zeros(len(sizes), dtype=bool)
        x_heights = np.zeros(len(sizes))
        for place in range(len(sizes)):
            try:
                row = self.mapped.row(self.rows[place])
            except RowRefused as refused:
                where = self.mapped.where(self.rows[place]) or f"row {place}"
                refusals.add(self.name, refused.reason, f"{where}: {refused.detail}")
                continue
            refusals.accept(self.name)
            if row is not None:
                keep[place] = True
                sizes[place], lengths[place] = image_size(row["image"]["bytes"]), len(row["text"].encode())
                x_heights[place] = row.get("x_height") or 0.0
        self._limit(arguments, keep, sizes, lengths, x_heights)

    def _limit(
        self,
        arguments: SourceArguments,
        keep: np.ndarray,
        sizes: np.ndarray,
        lengths: np.ndarray,
        x_heights: np.ndarray,
    ) -> None:
        if not keep.any():
            raise ValueError(f"{self.name} has no row that can be read ({len(keep)} rows).")
        if arguments.max_area:
            keep &= sizes.prod(axis=1) <= arguments.max_area
        if arguments.max_characters:
            keep &= lengths <= arguments.max_characters
        self.index = np.flatnonzero(keep)
        if not len(self.index):
            raise ValueError(f"No row of {self.name} passes max_area and max_characters.")
        self.sizes, self.lengths, self.x_heights = sizes[self.index], lengths[self.index], x_heights[self.index]
        self.broken = torch.zeros(len(self.index), dtype=torch.bool).share_memory_()

    def _column(self, name: str):
        for batch in self.rows.select_columns([name]).iter(batch_size=1000):
            yield from batch[name]

    def column(self, name: str) -> list:
        """A column's values, of the rows that are drawn from."""
        if self.mapped is not None:
            return [self[position][name] for position in range(len(self))]
        values = list(self._column(name))
        return [values[place] for place in self.index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.rows[int(self.index[position])]
        return row if self.mapped is None else self.mapped.row(row)

    def origin(self, position: int) -> str:
        """Where a row comes from: what it says itself, and its place here."""
        place, said = int(self.index[position]), ""
        if "source" in self.rows.column_names:
            said = self.rows.select_columns(["source"])[place]["source"]
        return f"{self.name}, row {place}" + (f": {said}" if said else "")


def find_shards(path: str) -> tuple[Path, list[str]]:
    """The folder and the parquet shards of a data set, given as a folder or by its name in the cache.

    Raises:
        ValueError: there are none.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = data_folder(path)
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    if not files:
        raise ValueError(
            f"No parquet shards in {path!r} (looked in {folder}). Build the data first: `unit data --help`."
        )
    return folder, files


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header, without decoding."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return struct.unpack(">II", data[16:24])
    return Image.open(io.BytesIO(data)).size


def told(error: Exception) -> str:
    """An error in one line, without the address that Pillow puts into it."""
    return " ".join(str(error).split(" <_io")[0].split())


def row_seed(*numbers: int) -> int:
    """The seed, in 0 ... 2^63 - 1, of one row as it is drawn: of what is random about it and must not depend on the
    micro-batch that it comes in, the number of processes or where a run was taken up (`row_seeds` of a batch).

    Args:
        numbers: the seed of the run, and what tells this drawing from all others.
    """
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def decoded(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its image decoded.

    Raises:
        OSError, ValueError, SyntaxError: it is truncated or no image.
    """
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    image.load()
    return row | {"image": image}


# Grids and text lengths are rounded up to few sizes: oneDNN compiles a kernel for each shape of a matrix product, so a
# run on a CPU that never repeats a shape spends its time compiling, and `torch.compile` and CUDA graphs want the same.
COLUMN_STEP, LINE_COLUMN_STEP = 16, 8


def rounded_grid(rows: int, cols: int) -> tuple[int, int]:
    """The grid that an image of rows x cols patches is padded to."""
    row_step = 1 if rows <= 6 else 2 if rows <= 12 else 4
    # lines of one row of patches differ in nothing but their length, and half of it could be padding
    column_step = LINE_COLUMN_STEP if rows == 1 else COLUMN_STEP
    return -(-rows // row_step) * row_step, -(-cols // column_step) * column_step


class GroupShapes:
    """What a row of a group is padded to.

    Args:
        max_positions: positions of the language decoder, 0 for no limit.
        min_x_height: of documents at this scale, in pixels; see `DataArguments.exchanged_x_height`.
    """

    def __init__(
        self, arguments: GroupArguments, collator: GroupCollator, max_positions: int = 0, min_x_height: float = 0.0
    ):
        if bool(arguments.rows) == bool(arguments.patches):
            raise ValueError(f"Group {arguments.name}: give either rows or patches.")
        self.arguments, self.collator, self.max_positions = arguments, collator, max_positions
        self.min_x_height = min_x_height if arguments.kind == "document" else 0.0
        processor = collator.image_processor
        side = round(processor.area(arguments.scale) ** 0.5)
        self.picture_grid = processor.grid_for(side, side, "natural", arguments.scale)

    def of(self, width: int, height: int, tokens: int) -> Shape:
        """Grid and text tokens of a row; natural pictures all have the grid of their scale."""
        text = -(-int(tokens) // TEXT_STEP) * TEXT_STEP
        if self.arguments.kind == "natural":
            return (*self.picture_grid, text)
        grid = self.collator.image_processor.grid_for(int(width), int(height), "document", self.arguments.scale)
        return (*(grid if self.arguments.packed else rounded_grid(*grid)), text)

    def legible(self, width: int, height: int, x_height: float) -> bool:
        """Whether letters keep `min_x_height` when the image is brought to this scale; of 0, not known, they do."""
        if not self.min_x_height or not x_height:
            return True
        _, new_height = self.collator.image_processor._document_size(int(width), int(height), self.arguments.scale)
        return x_height * new_height / height >= self.min_x_height

    def fits(self, shape: Shape) -> bool:
        """Whether the decoder has positions for the visual tokens and the padded text."""
        if not self.max_positions:
            return True
        return self.collator.processor.num_visual_tokens(*shape[:2]) + shape[2] <= self.max_positions

    def rows_in(self, shape: Shape) -> int:
        """Rows of a micro-batch of this shape."""
        return self.arguments.rows or max(1, self.arguments.patches // (shape[0] * shape[1]))


class GroupPlan:
    """Which rows of a group's sources make its part of each micro-batch.

    Rows are drawn without replacement, epoch after epoch, each source by its weight. Within a window of rows, those of
    one padded grid and text length come together (documents); the batches of a window are then shuffled. A batch that
    a window cannot fill is filled up with rows of the same size drawn again. Under a curriculum the sequence begins
    anew on each stair, over the rows that its limits let in; a window has the limits of its first micro-batch.

    Args:
        window: micro-batches of each rank whose rows are grouped together.
        ranks: so many micro-batches in a row have one shape; packs only have one budget.
        curriculum: with the micro-batches of all ranks in an optimiser step, `batches_per_step`.
        max_positions: of the decoder; rows that are longer are left out and counted in `refusals`.
        min_x_height: as of [`GroupShapes`]; rows below it are left out.
    """

    def __init__(
        self,
        arguments: GroupArguments,
        collator: GroupCollator,
        seed: int,
        window: int = 64,
        *,
        ranks: int = 1,
        curriculum: CurriculumArguments | None = None,
        batches_per_step: int = 1,
        max_positions: int = 0,
        min_x_height: float = 0.0,
        refusals: Refusals | None = None,
    ):
        self.arguments, self.collator, self.seed = arguments, collator, seed
        self.window, self.ranks = window * ranks, ranks
        self.curriculum, self.batches_per_step = curriculum or CurriculumArguments(), batches_per_step
        self.refusals = Refusals() if refusals is None else refusals
        self.measure = GroupShapes(arguments, collator, max_positions, min_x_height)
        self.sources = [RowSource(source, self.refusals) for source in arguments.sources]
        self._counted = [np.zeros(len(source), dtype=bool) for source in self.sources]  # of `broken`
        weights = np.array([source.weight for source in arguments.sources], dtype=np.float64)
        if not len(weights) or (weights < 0).any() or not weights.sum():
            raise ValueError(f"Group {arguments.name}: needs at least one source, weights must not be negative.")
        self.weights = weights
        self._windows: dict[int, list[tuple[Shape, list[Drawn]]]] = {}
        self.tokens = [self._tokens(source) for source in self.sources]
        self.shapes = [  # each (rows, 3): grid rows, columns, text
            np.array([self.measure.of(*size, length) for size, length in zip(source.sizes, tokens, strict=True)])
            for source, tokens in zip(self.sources, self.tokens, strict=True)
        ]
        self.usable = [self._usable(source, shapes) for source, shapes in zip(self.sources, self.shapes, strict=True)]
        self._tasks = [np.array(source.column("task")) if arguments.tasks else None for source in self.sources]
        self._levels: dict[int, tuple[list[tuple[int, np.ndarray, float]], int]] = {}
        for level in range(self.curriculum.level(0), self.curriculum.levels + 1):
            self._pools(level)  # what leaves nothing is to be known now

    def _tokens(self, source: RowSource) -> np.ndarray:
        """Tokens of each row's prompt, text and end."""
        if self.collator.reads_bytes:
            return source.lengths + 2  # the prompt's token and the end
        return self.collator.text_tokens(source.column("text"), source.column("task"))

    def _usable(self, source: RowSource, shapes: np.ndarray) -> np.ndarray:
        different, which = np.unique(shapes, axis=0, return_inverse=True)
        usable = np.array([self.measure.fits(tuple(shape)) for shape in different.tolist()])[which.reshape(-1)]
        for place in np.flatnonzero(~usable):
            self._refuse(source, TOO_LONG, f"row {source.index[place]}: {source.lengths[place]} bytes of text")
        if not self.measure.min_x_height:
            return usable
        rows = zip(source.sizes.tolist(), source.x_heights.tolist(), strict=True)
        return usable & np.array([self.measure.legible(*size, x_height) for size, x_height in rows])

    def _refuse(self, source: RowSource, reason: str, example: str) -> None:
        """Count a row as refused that was counted as accepted when it was indexed."""
        self.refusals.accept(source.name, -1)
        self.refusals.add(source.name, reason, example)

    def count_broken(self) -> None:
        """Count the rows that turned out to be broken, whichever worker drew them, each once.

        Raises:
            TooManyRefused: as `Refusals.add`.
        """
        for source, counted in zip(self.sources, self._counted, strict=True):
            for position in np.flatnonzero(source.broken.numpy() & ~counted):
                counted[position] = True
                try:
                    decoded(source[position])
                    problem = "read at last"
                except BROKEN as error:
                    problem = told(error)
                self._refuse(source, UNREADABLE, f"row {source.index[position]}: {problem}")

    def _pools(self, level: int) -> tuple[list[tuple[int, np.ndarray, float]], int]:
        """Source, positions and share of what is drawn from on a stair, and the rows of a window."""
        if level in self._levels:
            return self._levels[level]
        text, area = self.curriculum.limits(level)
        tasks = self.arguments.tasks
        pools, present = [], np.zeros((len(self.sources), len(tasks) or 1), dtype=bool)
        for index, source in enumerate(self.sources):
            eligible = self.usable[index] & (self.tokens[index] <= text) & (source.sizes.prod(axis=1) <= area)
            for column, task in enumerate(tasks or [None]):
                positions = np.flatnonzero(eligible if task is None else eligible & (self._tasks[index] == task))
                present[index, column] = len(positions) > 0
                pools.append((index, positions))
        shares = pool_weights(self.weights, tasks, present)
        if not shares.sum():
            limits = f"text of at most {text:g} tokens and {area:g} pixels, " if level < self.curriculum.levels else ""
            asked = f"tasks {', '.join(tasks)}, " if tasks else ""
            if self.measure.min_x_height:
                asked += f"an x-height of {self.measure.min_x_height:g} pixels at this scale, "
            raise ValueError(
                f"Group {self.arguments.name}: no row of {', '.join(each.name for each in self.sources)} is left "
                f"({limits}{asked}{self.measure.max_positions or 'any number of'} positions)."
            )
        drawn = [
            (*pool, float(share)) for pool, share in zip(pools, shares.reshape(-1).tolist(), strict=True) if share > 0
        ]
        if self.arguments.patches:
            per_row = sum(
                share * np.mean(self.shapes[index][positions, :2].prod(axis=1)) for index, positions, share in drawn
            )
            # a tenth more than fills the window, so that it rarely falls short
            count = max(1, int(1.1 * self.window * self.arguments.patches / per_row))
        else:
            count = self.window * self.arguments.rows
        self._levels[level] = drawn, count
        return self._levels[level]

    def batch(self, step: int) -> tuple[Shape, list[tuple[int, int]]]:
        """Padded shape, and (source, position) of the rows, of micro-batch `step`."""
        shape, members = self._batch(step)
        return shape, [(source, position) for source, position, _ in members]

    def _batch(self, step: int) -> tuple[Shape, list[Drawn]]:
        number, offset = divmod(step, self.window)
        if number not in self._windows:
            self._windows = {number: self._plan_window(number)}
        batches = self._windows[number]
        return batches[offset % len(batches)]

    def _level(self, window: int) -> int:
        return self.curriculum.level(window * self.window // self.batches_per_step)

    def _plan_window(self, number: int) -> list[tuple[Shape, list[Drawn]]]:
        rng = np.random.default_rng([self.seed, number])
        level = self._level(number)
        first = number
        while first and self._level(first - 1) == level and level < self.curriculum.levels:
            first -= 1
        if level == self.curriculum.levels and self.curriculum.steps:
            first = -(-self.curriculum.steps * self.batches_per_step // self.window)
        elif level == self.curriculum.levels:
            first = 0
        pools, count = self._pools(level)
        rows: list[tuple[Shape, Drawn]] = []
        for pool, (index, positions, share) in enumerate(pools):
            # the window's share of an endless sequence of permutations
            begin, end = (round(each * count * share) for each in (number - first, number - first + 1))
            seed = self.seed + 7919 * pool + 1_000_003 * (self.curriculum.levels - level)
            places = _endless_permutation(len(positions), seed, begin, end - begin)
            for draw, place in enumerate(places, begin):
                position = int(positions[place])
                drawn = (index, position, row_seed(seed, self.arguments.scale, draw))
                rows.append((tuple(int(size) for size in self.shapes[index][position]), drawn))
        order = rng.permutation(len(rows))
        if self.arguments.packed:
            return self._packs([rows[place] for place in order], rng)
        by_shape: dict[Shape, list[tuple[Shape, Drawn]]] = {}
        for place in order:
            # rows that are counted out come together as they are drawn
            by_shape.setdefault((0, 0, 0) if self.arguments.rows else rows[place][0], []).append(rows[place])
        units = []  # one micro-batch for each rank, of one shape
        rest: dict[int, list[tuple[Shape, Drawn]]] = {}  # grid rows -> what fills no micro-batch of its own shape
        for shape, members in sorted(by_shape.items()):
            count = self.measure.rows_in(shape) * self.ranks
            whole = len(members) // count * count
            units += [members[start : start + count] for start in range(0, whole, count)]
            rest.setdefault(shape[0], []).extend(members[whole:])
        # Rows drawn again in their place would be a micro-batch of one row, hundreds of times: a step in a random
        # direction. They go with larger ones, padded, and only the last of them is filled up.
        for members in rest.values():
            members.sort(key=lambda row: row[0][1:], reverse=True)
            while members:
                count = self.measure.rows_in(members[0][0]) * self.ranks
                unit, members = members[:count], members[count:]
                given = len(unit)
                while len(unit) < count:
                    unit.append(unit[int(rng.integers(given))])
                units.append(unit)
        units = [self._split_unit(unit) for unit in units]
        return [batch for place in rng.permutation(len(units)) for batch in units[place]]

    def _split_unit(self, unit: list[tuple[Shape, Drawn]]) -> list[tuple[Shape, list[Drawn]]]:
        """Rows that come together, to a micro-batch of each rank with what they are padded to."""
        largest = tuple(int(side) for side in np.max([each for each, _ in unit], axis=0))
        rows, count = [row for _, row in unit], len(unit) // self.ranks
        return [(largest, rows[begin : begin + count]) for begin in range(0, len(rows), count)]

    def _packs(self, rows: list[tuple[Shape, Drawn]], rng: np.random.Generator):
        """Rows as they come, as many to a pack as fit; the last one is filled up with rows drawn again."""
        packs: list[tuple[Shape, list[Drawn]]] = []
        members: list[Drawn] = []
        patches = 0
        more = (rows[int(rng.integers(len(rows)))] for _ in iter(int, 1))  # without end
        for shape, row in itertools.chain(rows, more):
            size = shape[0] * shape[1]
            rows_given, budget = self.arguments.rows, self.arguments.patches
            if members and (len(members) == rows_given if rows_given else patches + size > budget):
                packs.append(((0, 0, 0), members))
                members, patches = [], 0
                if sum(len(pack) for _, pack in packs) >= len(rows) and len(packs) % self.ranks == 0:
                    return packs
            members.append(row)
            patches += size
        raise AssertionError("the rows have no end")

    def __getitem__(self, step: int) -> dict[str, Any]:
        shape, members = self._batch(step)
        rows = []
        for source, position, seed in members:
            try:
                rows.append(decoded(self.sources[source][position]) | {"row_seed": seed})
            except BROKEN:
                self.sources[source].broken[position] = True
        if len(rows) < len(members):
            self.count_broken()
        if not rows:
            rows = [self._spare(step, shape) | {"row_seed": row_seed(self.seed, self.arguments.scale, -1, step)}]
        rng = np.random.default_rng([self.seed, 2, step])
        rows += [rows[int(rng.integers(len(rows)))] for _ in range(len(members) - len(rows))]
        return self.collator(rows, np.random.default_rng([self.seed, 1, step]), shape)

    def _spare(self, step: int, shape: Shape) -> dict[str, Any]:
        """A row that can be read and is no larger than `shape`, in place of a micro-batch of which none can."""
        rng = np.random.default_rng([self.seed, 3, step])
        for index, positions, _ in self._pools(self.curriculum.levels)[0]:
            small = (
                positions if shape == (0, 0, 0) else positions[(self.shapes[index][positions] <= shape).all(axis=1)]
            )
            for position in rng.permutation(small)[:100]:
                try:
                    return decoded(self.sources[index][int(position)])
                except BROKEN:
                    continue
        raise ValueError(f"Group {self.arguments.name}: no image of micro-batch {step} can be read.")


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

    def all_refusals(self) -> Refusals:
        """What was left out so far, by whichever worker of this process.

        Raises:
            TooManyRefused: too much of a source.
        """
        total = Refusals(max_share=1.0)
        for refusals in {id(group.refusals): group.refusals for group in self.groups}.values():
            for group in self.groups:
                if group.refusals is refusals:
                    group.count_broken()
            total.merge(refusals)
        return total

    @property
    def ranks(self) -> int:
        """Micro-batches in a row that have one shape."""
        return min((group.ranks for group in self.groups), default=1)

    def __len__(self) -> int:
        return self.length

    def origins(self, step: int) -> dict[str, list[str]]:
        """Where the rows of item `step` come from, group by group."""
        return {
            group.arguments.name: [group.sources[source].origin(place) for source, place in group.batch(step)[1]]
            for group in self.groups
        }

    def __getitem__(self, step: int) -> dict[str, dict[str, Any]]:
        if not 0 <= step < self.length:
            raise IndexError(step)
        return {group.arguments.name: group[step] for group in self.groups}
