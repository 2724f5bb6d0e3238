"""Micro-batches from sources that are read shard after shard, from a folder or from the Hub, never whole.

What is promised, as for the map-style plan of `mixture.py`:

- Item i of the run is the same whatever number of processes and dataloader workers draws it: the sources are split
  into `streams`, item i is made by stream i mod `streams`, and a stream belongs to one worker of one rank.
- Items `n * ranks ... (n + 1) * ranks - 1` have one shape. The sequence of shapes is drawn from a seed and from a
  probe of the sources' first rows, the same on every rank without a word between them; each stream fills it from its
  own rows. Where it has too few of a size, smaller rows are padded up to it, and then rows are drawn again; where too
  many wait, the oldest are dropped until they come again in the next epoch. No rank ever waits for a row, or stops
  first.
- A source never ends: the next epoch begins, with shards and rows in another order.
- The state of a stream names the rows that wait in it by where they were read. It is a few kilobytes, sent along with
  each micro-batch; a run that goes on from it reads those rows again and sees exactly the items it would have seen.

Memory holds, for each stream, `shuffle_buffer` rows of each source and `buffered` micro-batches of each group,
however many rows there are.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..collator import GroupCollator
from .mixture import (
    BROKEN,
    TOO_LONG,
    UNREADABLE,
    GroupShapes,
    Shape,
    decoded,
    find_shards,
    image_size,
    row_seed,
    told,
)
from .refusals import Refusals, TooManyRefused
from .settings import EXCHANGED_DOCUMENTS, DataArguments, GroupArguments, SourceArguments, pool_weights

NO_SHARD = "a shard cannot be read"
# The golden ratio: multiples of it, modulo 1, fill [0, 1) more evenly than random numbers do
GOLDEN = (5**0.5 - 1) / 2
PROBED_SHARDS = 16  # the probe looks into so many shards of a source, evenly spread [ours]
DRAWS = 16  # rows read for each row of a micro-batch, at most, before others take their place [ours]
READ = 64  # rows asked of `datasets` at once: five times as fast as one by one [measured]
SPARES = 4  # rows of the probe kept for each shape


class ShardedRows:
    """One source as shards, each a sequence of rows that can be read from any row on.

    Raises:
        ValueError: it is not there, or lacks columns of the schema.
    """

    def __init__(self, arguments: SourceArguments, refusals: Refusals):
        self.arguments, self.name, self.mapped = arguments, arguments.name, None
        if arguments.dataset:
            from .mapping import read_source

            self.mapped = read_source(arguments, streaming=True, refusals=refusals, verify=False)
            self.rows, self.num_shards = self.mapped.dataset, self.mapped.dataset.num_shards
            return
        self.rows = _open_stream(arguments)
        columns = self.rows.column_names
        if columns is not None and (missing := {"image", "text", "task", "kind"} - set(columns)):
            raise ValueError(f"{self.name} lacks the columns {sorted(missing)}; see training/data/schema.py.")
        self.num_shards = self.rows.num_shards

    def read(self, shard: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """Rows `start`, `start + 1`, ... of a shard, as they lie there."""
        rows = self.rows.shard(num_shards=self.num_shards, index=shard)
        # by batches, which a dataloader worker does not split once more among the workers; they begin at the same
        # rows from wherever a shard is read, so that one that breaks off loses the same rows
        skipped = start // READ * READ
        if skipped:
            rows = rows.skip(skipped)
        for batch in rows.iter(batch_size=READ):
            columns, count = list(batch), len(next(iter(batch.values())))
            for place in range(max(0, start - skipped), count):
                yield {name: batch[name][place] for name in columns}
            start, skipped = max(start, skipped + count), skipped + count

    def row(self, raw: dict[str, Any], where: str, refusals: Refusals) -> dict[str, Any] | None:
        """A row in the schema; none for one that is not wanted, or refused."""
        if self.mapped is None:
            return raw
        from .mapping import RowRefused

        try:
            return self.mapped.row(raw)
        except RowRefused as refused:
            refusals.add(self.name, refused.reason, f"{self.mapped.where(raw) or where}: {refused.detail}")
            return None


def _open_stream(arguments: SourceArguments):
    """A `datasets.IterableDataset` of rows of the schema, images as bytes."""
    from datasets import Image, load_dataset

    _, files = find_shards(arguments.path)
    try:
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
        return rows.cast_column("image", Image(decode=False)) if "image" in rows.column_names else rows
    except Exception as error:
        raise ValueError(f"{arguments.path}: its first shard cannot be read: {told(error)}") from error


# Where a row was read: source, block, place in the block
Coordinate = tuple[int, int, int]


class RowStream:
    """One stream's part of one source, epoch after epoch, shuffled in blocks of `block_rows`.

    The shards of an epoch are shuffled alike for all streams and dealt out; where there are fewer shards than streams,
    those that share one take its rows in turn. Within a block, rows are shuffled.

    Args:
        number: of the source in its group. stream, streams: which part this is, of how many.

    Raises:
        ValueError: in reading, when there is no row at all.
    """

    def __init__(
        self,
        source: ShardedRows,
        number: int,
        stream: int,
        streams: int,
        seed: int,
        block_rows: int,
        refusals: Refusals,
    ):
        self.source, self.number, self.stream, self.streams = source, number, stream, streams
        self.seed, self.block_rows, self.refusals = seed, block_rows, refusals
        # the next row: its epoch, shard of the epoch, row of the shard
        self.epoch, self.ordinal, self.offset = 0, 0, 0
        self.whole = False  # a source so small that this stream's part of it is empty is read whole
        self.block_number, self.emitted = -1, 0
        self.block: list[dict[str, Any] | None] = []
        self.order: np.ndarray = np.zeros(0, dtype=np.int64)
        # of each block: its first row, as above, and how many rows
        self.starts: dict[int, tuple[int, int, int, bool, int]] = {}
        self._iterator: Iterator[tuple[int, dict[str, Any]]] | None = None

    def shards(self, epoch: int) -> list[tuple[int, int, int]]:
        """The shards of an epoch: number of the shard, and which of how many parts of it."""
        order = np.random.default_rng([self.seed, self.number, epoch]).permutation(self.source.num_shards).tolist()
        if self.whole:
            return [(shard, 0, 1) for shard in order]
        if len(order) >= self.streams:
            return [(shard, 0, 1) for shard in order[self.stream :: self.streams]]
        mine = self.stream % len(order)
        sharing = range(mine, self.streams, len(order))
        return [(order[mine], sharing.index(self.stream), len(sharing))]

    def next(self) -> tuple[Coordinate, dict[str, Any]]:
        if self.emitted == len(self.block):
            self._next_block()
        place = int(self.order[self.emitted])
        self.emitted += 1
        row, self.block[place] = self.block[place], None
        return (self.number, self.block_number, place), row

    def _next_block(self) -> None:
        empty = 0
        while True:
            start = (self.epoch, self.ordinal, self.offset, self.whole)
            rows = self._read(self.block_rows)
            if rows:
                break
            if start[1:3] != (0, 0):
                continue  # the last block had ended with the epoch
            empty, self.whole = empty + 1, True
            if empty > 2:
                raise ValueError(f"{self.source.name} has no row that can be read: nothing came of a whole epoch.")
        self.block_number += 1
        self.starts[self.block_number] = (*start, len(rows))
        self._shuffle(rows)

    def _shuffle(self, rows: list[dict[str, Any]]) -> None:
        self.block, self.emitted = rows, 0
        seed = [self.seed, self.number, self.stream, self.block_number, 1]
        self.order = np.random.default_rng(seed).permutation(len(rows))

    def _read(self, count: int) -> list[dict[str, Any]]:
        """Up to `count` rows, fewer at the end of an epoch only, with the cursor behind them."""
        rows: list[dict[str, Any]] = []
        shards = self.shards(self.epoch)
        while len(rows) < count and self.ordinal < len(shards):
            if self._iterator is None:
                self._iterator = self._rows_of(*shards[self.ordinal], self.offset)
            for behind, row in self._iterator:
                self.offset = behind
                rows.append(row)
                if len(rows) == count:
                    return rows
            self._iterator = None
            self.ordinal, self.offset = self.ordinal + 1, 0
        if self.ordinal == len(shards):
            self.epoch, self.ordinal, self.offset = self.epoch + 1, 0, 0
        return rows

    def _rows_of(self, shard: int, part: int, parts: int, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of a part of a shard from row `start` on, each with the row to go on from behind it."""
        try:
            for row_number, raw in enumerate(self.source.read(shard, start), start):
                if row_number % parts == part:
                    row = self.source.row(raw, f"shard {shard}, row {row_number}", self.refusals)
                    if row is not None:
                        yield row_number + 1, row
        except TooManyRefused:
            raise
        except Exception as error:  # whatever a file system, an archive or a server comes up with
            self.refusals.add(self.source.name, NO_SHARD, f"shard {shard}: {type(error).__name__}: {error}")

    def state(self, waiting: set[int]) -> dict[str, Any]:
        """Where this stream is. `waiting`: blocks of which rows still wait somewhere."""
        self.starts = {block: self.starts[block] for block in self.starts if block in waiting | {self.block_number}}
        return {
            "block": self.block_number,
            "emitted": self.emitted,
            "next": [self.epoch, self.ordinal, self.offset, self.whole],
            "starts": {str(block): list(start) for block, start in self.starts.items()},
        }

    def restore(self, state: dict[str, Any], waiting: Sequence[Coordinate]) -> dict[Coordinate, dict[str, Any]]:
        """Go to a state; returns the rows that wait, read again."""
        self.starts = {int(block): tuple(start) for block, start in state["starts"].items()}
        found: dict[Coordinate, dict[str, Any]] = {}
        refusals, self.refusals = self.refusals, Refusals(max_share=1.0)  # counted when first read
        # the current block comes last and leaves the file open where the stream goes on
        for block in sorted(self.starts, key=lambda each: (each == state["block"], each)):
            *start, count = self.starts[block]
            self._go_to(start)
            rows = self._read(count)
            if len(rows) != count:
                raise ValueError(
                    f"{self.source.name} has changed: {count} rows were read where there are {len(rows)} now. "
                    "Put its shards back, or start the run anew."
                )
            found |= {each: rows[each[2]] for each in waiting if each[1] == block}
            if block == state["block"]:
                self.block_number = block
                self._shuffle(rows)
                self.emitted = state["emitted"]
                for place in self.order[: self.emitted]:
                    self.block[int(place)] = None
        if [self.epoch, self.ordinal, self.offset, self.whole] != state["next"]:
            self._go_to(state["next"])
        self.refusals = refusals
        return found

    def _go_to(self, place: Sequence[int]) -> None:
        self.epoch, self.ordinal, self.offset, self.whole = place
        self._iterator = None


@dataclass
class Entry:
    """A row that waits for its like."""

    coordinate: Coordinate
    row: dict[str, Any]
    tokens: int
    area: int
    shape: Shape


@dataclass
class ShapeSequence:
    """The shapes of a group on one stair of the curriculum, and which comes when.

    Args:
        shapes: from the smallest to the largest. shares: of the micro-batches. spares: rows of the probe that fit.
    """

    shapes: list[Shape]
    shares: np.ndarray
    spares: list[list[dict[str, Any]]]
    seed: int

    def at(self, slot: int, cycle: int) -> int:
        """Number of the shape of the `cycle`-th micro-batch of a slot; in any stretch each has nearly its share."""
        begin = np.random.default_rng([self.seed, slot]).random()
        place = (begin + cycle * GOLDEN) % 1.0
        return min(int(np.searchsorted(np.cumsum(self.shares), place, side="right")), len(self.shapes) - 1)

    def bucket(self, shape: Shape) -> int | None:
        """The smallest shape that holds a row, none for a row larger than all."""
        for number, each in enumerate(self.shapes):
            if all(side <= most for side, most in zip(shape, each, strict=True)):
                return number
        return None


def merge_shapes(counts: dict[Shape, float], most: int) -> dict[Shape, float]:
    """At most so many shapes that hold all rows, merged where that adds the fewest tokens of padding."""
    counts = dict(counts)

    def size(shape: Shape) -> int:
        return shape[0] * shape[1] + shape[2]

    while len(counts) > most:
        best = None
        for one, other in itertools.combinations(counts, 2):
            both = tuple(max(pair) for pair in zip(one, other, strict=True))
            added = counts[one] * (size(both) - size(one)) + counts[other] * (size(both) - size(other))
            if best is None or added < best[0]:
                best = (added, one, other, both)
        _, one, other, both = best
        rows = counts.pop(one) + counts.pop(other)
        counts[both] = counts.get(both, 0.0) + rows
    return counts


class StreamGroup:
    """What all streams of a group share: its sources and the sequences of shapes, the same on every rank.

    Raises:
        ValueError: weights that make no sense, no row that may come.
    """

    def __init__(
        self,
        arguments: GroupArguments,
        collator: GroupCollator,
        data: DataArguments,
        seed: int,
        max_positions: int = 0,
        refusals: Refusals | None = None,
    ):
        self.arguments, self.collator, self.data, self.seed = arguments, collator, data, seed
        self.refusals = Refusals() if refusals is None else refusals
        least = data.exchanged_x_height if arguments.name == EXCHANGED_DOCUMENTS else 0.0
        self.measure = GroupShapes(arguments, collator, max_positions, least)
        weights = np.array([source.weight for source in arguments.sources], dtype=np.float64)
        if not len(weights) or (weights < 0).any() or not weights.sum():
            raise ValueError(f"Group {arguments.name}: needs at least one source, weights must not be negative.")
        self.weights = weights
        self.sources = [ShardedRows(source, self.refusals) for source in arguments.sources]
        probed = [self._probe(source) for source in self.sources]
        self.tasks = list(arguments.tasks)
        present = np.zeros((len(self.sources), len(self.tasks) or 1), dtype=bool)
        for index, entries in enumerate(probed):
            there = {entry.row["task"] for entry in entries}
            present[index] = [task in there for task in self.tasks] if self.tasks else bool(entries)
        self.shares = pool_weights(weights, arguments.tasks, present)
        if not self.shares.sum():
            raise ValueError(
                f"Group {arguments.name}: no row of {', '.join(source.name for source in self.sources)} may come"
                + (f" with the tasks {', '.join(self.tasks)}." if self.tasks else ": look at its limits and sizes.")
            )
        self.levels = {
            level: self._sequence(probed, level)
            for level in range(data.curriculum.level(0), data.curriculum.levels + 1)
        }

    def measured(self, number: int, coordinate: Coordinate, row: dict[str, Any]) -> Entry | None:
        """The row with its size, none for a row that is left out by its source's limits, or refused."""
        source = self.sources[number]
        limits = source.arguments
        where = row.get("source") or f"block {coordinate[1]}, row {coordinate[2]}"
        try:
            width, height = image_size(row["image"]["bytes"])
            if limits.max_area and width * height > limits.max_area:
                return None
            if limits.max_characters and len(row["text"].encode()) > limits.max_characters:
                return None
            if not self.measure.legible(width, height, row.get("x_height") or 0.0):
                return None
            tokens = int(self.collator.text_tokens([row["text"]], [row["task"]])[0])
            shape = self.measure.of(width, height, tokens)
        except (*BROKEN, KeyError, AttributeError, ZeroDivisionError) as error:
            reason = UNREADABLE if isinstance(error, OSError) else "the row is not of the schema"
            self.refusals.add(source.name, reason, f"{where}: {told(error)}")
            return None
        if not self.measure.fits(shape):
            self.refusals.add(source.name, TOO_LONG, f"{where}: {tokens} tokens of text")
            return None
        return Entry(coordinate, row, tokens, width * height, shape)

    def allowed(self, entry: Entry, level: int) -> bool:
        text, area = self.data.curriculum.limits(level)
        return entry.tokens <= text and entry.area <= area

    def _probe(self, source: ShardedRows) -> list[Entry]:
        """The first rows of shards spread over the source."""
        number = self.sources.index(source)
        shards = np.unique(np.linspace(0, source.num_shards - 1, min(source.num_shards, PROBED_SHARDS)).round())
        each, entries, error = -(-self.data.probe // len(shards)), [], None
        for shard in shards.astype(int).tolist():
            try:
                for place, raw in enumerate(itertools.islice(source.read(shard), each)):
                    row = source.row(raw, f"shard {shard}, row {place}", self.refusals)
                    entry = None if row is None else self.measured(number, (number, -1, place), row)
                    if entry is not None:
                        entries.append(entry)
                        self.refusals.accept(source.name)
            except TooManyRefused:
                raise
            except Exception as problem:
                error = problem
                self.refusals.add(source.name, NO_SHARD, f"shard {shard}: {type(problem).__name__}: {problem}")
        if not entries:
            raise ValueError(
                f"{source.name} has no row that may come (of the first {each} of {len(shards)} shards)"
                + (f"; {' '.join(str(error).split())}" if error else "")
                + (f"; refused: {self.refusals}" if self.refusals.refused else "")
            )
        return entries

    def _sequence(self, probed: list[list[Entry]], level: int) -> ShapeSequence:
        by_task = [
            [
                [entry for entry in entries if not self.tasks or entry.row["task"] == task]
                for task in self.tasks or [""]
            ]
            for entries in probed
        ]
        counts: Counter = Counter()
        allowed = []
        for index, task in itertools.product(range(len(probed)), range(len(self.tasks) or 1)):
            there = by_task[index][task]
            mine = [entry for entry in there if self.allowed(entry, level)]
            allowed += mine
            for entry in mine:
                # the share of the pool falls on the rows that may come, however few these are
                counts[entry.shape] += self.shares[index, task] / len(mine)
        if not counts:
            text, area = self.data.curriculum.limits(level)
            raise ValueError(
                f"Group {self.arguments.name}: no row of {', '.join(source.name for source in self.sources)} is left "
                f"by the curriculum's first limits (text of at most {text:g} tokens and {area:g} pixels)."
            )
        merged = merge_shapes(counts, self.data.buckets)
        shapes = sorted(merged, key=lambda shape: (shape[0] * shape[1] + shape[2], shape))
        shares = np.array([merged[shape] / self.measure.rows_in(shape) for shape in shapes])
        sequence = ShapeSequence(shapes, shares / shares.sum(), [[] for _ in shapes], self.seed + level)
        for entry in allowed:
            spares = sequence.spares[sequence.bucket(entry.shape)]
            if len(spares) < SPARES:
                try:
                    spares.append(decoded(entry.row) | {"image": entry.row["image"]})
                except BROKEN:
                    continue
        return sequence


class StreamFiller:
    """One stream of one group: reads rows, lets them wait for their like, and gives micro-batches."""

    def __init__(self, group: StreamGroup, stream: int, streams: int):
        self.group, self.stream = group, stream
        data = group.data
        self.streams = [
            RowStream(source, number, stream, streams, group.seed, data.shuffle_buffer, group.refusals)
            for number, source in enumerate(group.sources)
        ]
        self.drawn = 0  # rows drawn so far: decides which pool comes next
        self.level: int | None = None  # stair of the curriculum
        self.waiting: list[Entry] = []
        # rows of another task than the one asked for, by source and task
        self.aside: dict[tuple[int, str], deque[Entry]] = {}
        self.counts = Counter(rows=0, repeated=0, dropped=0, padded_up=0)

    @property
    def most(self) -> float:
        """How much may wait: rows, or patches."""
        arguments = self.group.arguments
        return self.group.data.buffered * (arguments.rows or arguments.patches)

    def _size(self, entries: Sequence[Entry]) -> int:
        if self.group.arguments.rows:
            return len(entries)
        return sum(entry.shape[0] * entry.shape[1] for entry in entries)

    def draw(self, level: int) -> Entry:
        """The next row of the pool whose turn it is that may come."""
        shares = self.group.shares.reshape(-1)
        place = (np.random.default_rng([self.group.seed, 5, self.stream]).random() + self.drawn * GOLDEN) % 1.0
        self.drawn += 1
        pool = min(int(np.searchsorted(np.cumsum(shares), place, side="right")), len(shares) - 1)
        while not shares[pool]:  # rounding at the end of the sum
            pool -= 1
        number, column = divmod(pool, self.group.shares.shape[1])
        task = self.group.tasks[column] if self.group.tasks else None
        epoch, others = self.streams[number].epoch, 0
        while True:
            aside = self.aside.get((number, task))
            if aside:
                entry = aside.popleft()
            else:
                coordinate, row = self.streams[number].next()
                entry = self.group.measured(number, coordinate, row)
            if entry is not None and task is not None and entry.row["task"] != task:
                if entry.row["task"] in self.group.tasks:
                    queue = self.aside.setdefault((number, entry.row["task"]), deque())
                    queue.append(entry)
                    if len(queue) > self.group.data.shuffle_buffer:
                        queue.popleft()
                        self.counts["dropped"] += 1
                others += 1
                entry = None
            if entry is not None and self.group.allowed(entry, level):
                return entry
            if self.streams[number].epoch > epoch + 2:
                number = self._other(number, task, epoch)
                epoch = self.streams[number].epoch

    def _other(self, number: int, task: str | None, epoch: int) -> int:
        """Another source, when nothing of this one may come on this stair."""
        candidates = [each for each in np.flatnonzero(self.group.shares.sum(axis=1)) if each != number]
        limits = self.group.data.curriculum
        if not candidates or not limits.steps:
            raise ValueError(
                f"{self.group.sources[number].name}: no row"
                + (f" of the task {task}" if task else "")
                + f" may come in stream {self.stream}, though the probe found some: look at its limits."
            )
        return int(candidates[self.drawn % len(candidates)])

    def fill(self, sequence: ShapeSequence, number: int, level: int) -> tuple[Shape, list[tuple[int, dict[str, Any]]]]:
        """Rows of a micro-batch of shape `number` of the sequence, each with its source."""
        if self.group.arguments.packed:
            return self._pack(level)
        if self.level not in (level, None):  # what no shape of the new stair holds goes
            kept = [entry for entry in self.waiting if sequence.bucket(entry.shape) is not None]
            self.counts["dropped"] += len(self.waiting) - len(kept)
            self.waiting = kept
        self.level = level
        shape = sequence.shapes[number]
        count = self.group.measure.rows_in(shape)
        fitting = {
            smaller
            for smaller in range(number)
            if all(a <= b for a, b in zip(sequence.shapes[smaller], shape, strict=True))
        }
        buckets = [sequence.bucket(entry.shape) for entry in self.waiting]
        mine, size = buckets.count(number), self._size(self.waiting)
        last = self.drawn + DRAWS * count
        while mine < count and self.drawn < last:
            if size >= self.most:
                if mine + sum(bucket in fitting for bucket in buckets) >= count:
                    break  # smaller rows are padded up to it
                self._make_room(buckets, number)
                buckets = [sequence.bucket(entry.shape) for entry in self.waiting]
                size = self._size(self.waiting)
            entry = self.draw(level)
            bucket = sequence.bucket(entry.shape)
            if bucket is None:  # larger than every row of the probe
                self.counts["dropped"] += 1
                continue
            self.waiting.append(entry)
            buckets.append(bucket)
            mine += bucket == number
            size += self._size([entry])
        chosen = [place for place, bucket in enumerate(buckets) if bucket == number][:count]
        # smaller rows, the nearest in size first
        for smaller in sorted(fitting, reverse=True):
            borrowed = [place for place, bucket in enumerate(buckets) if bucket == smaller]
            borrowed = borrowed[: count - len(chosen)]
            self.counts["padded_up"] += len(borrowed)
            chosen += borrowed
        rows = [self._drawn(self.waiting[place]) for place in chosen]
        taken = set(chosen)
        self.waiting = [entry for place, entry in enumerate(self.waiting) if place not in taken]
        self.counts["rows"] += count
        self.counts["repeated"] += count - len(rows)
        again = rows or [
            (-1, row | self._seed(-1, number, place)) for place, row in enumerate(sequence.spares[number])
        ]
        rng = np.random.default_rng([self.group.seed, 6, self.stream, self.drawn])
        rows = rows + [again[int(rng.integers(len(again)))] for _ in range(count - len(rows))]
        return shape, rows

    def _make_room(self, buckets: list[int], number: int) -> None:
        """Of what waits, the size of which there is most, other than `number`, gives up its oldest rows until an
        eighth is free. They come again in the next epoch."""
        sizes = Counter()
        for entry, bucket in zip(self.waiting, buckets, strict=True):
            sizes[bucket] += self._size([entry])
        del sizes[number]
        excess = self._size(self.waiting) - 0.875 * self.most
        while excess > 0 and sizes:
            fullest = max(sizes, key=lambda bucket: (sizes[bucket], -bucket))
            half = max(sizes[fullest] / 2, 1)  # the next fullest may be fuller then
            kept, kept_buckets = [], []
            for entry, bucket in zip(self.waiting, buckets, strict=True):
                size = self._size([entry])
                if bucket == fullest and excess > 0 and half > 0:
                    excess, half = excess - size, half - size
                    sizes[fullest] -= size
                    self.counts["dropped"] += 1
                else:
                    kept.append(entry)
                    kept_buckets.append(bucket)
            self.waiting, buckets = kept, kept_buckets
            sizes = Counter({bucket: size for bucket, size in sizes.items() if size > 0})

    def _pack(self, level: int) -> tuple[Shape, list[tuple[int, dict[str, Any]]]]:
        rows, patches = [], 0
        arguments = self.group.arguments
        while True:
            entry = self.waiting.pop(0) if self.waiting else self.draw(level)
            size = entry.shape[0] * entry.shape[1]
            if rows and (len(rows) == arguments.rows if arguments.rows else patches + size > arguments.patches):
                self.waiting.insert(0, entry)
                self.counts["rows"] += len(rows)
                return (0, 0, 0), rows
            rows.append(self._drawn(entry))
            patches += size

    def _drawn(self, entry: Entry) -> tuple[int, dict[str, Any]]:
        """Source and row; a row is drawn where it was read, so its seed is of that."""
        return entry.coordinate[0], entry.row | self._seed(*entry.coordinate)

    def _seed(self, *coordinate: int) -> dict[str, int]:
        group = self.group
        return {"row_seed": row_seed(group.seed, group.arguments.scale, self.stream, *coordinate)}

    def state(self) -> dict[str, Any]:
        aside = [entry for queue in self.aside.values() for entry in queue]
        blocks: dict[int, set[int]] = {}
        for entry in self.waiting + aside:
            blocks.setdefault(entry.coordinate[0], set()).add(entry.coordinate[1])
        return {
            "drawn": self.drawn,
            "level": self.level,
            "counts": dict(self.counts),
            "waiting": np.array([entry.coordinate for entry in self.waiting], dtype=np.int64).reshape(-1, 3),
            "aside": np.array([entry.coordinate for entry in aside], dtype=np.int64).reshape(-1, 3),
            "sources": [each.state(blocks.get(each.number, set())) for each in self.streams],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn, self.level, self.counts = state["drawn"], state["level"], Counter(state["counts"])
        waiting, aside = ([tuple(int(part) for part in each) for each in state[name]] for name in ("waiting", "aside"))
        rows: dict[Coordinate, dict[str, Any]] = {}
        for stream, theirs in zip(self.streams, state["sources"], strict=True):
            rows |= stream.restore(theirs, [each for each in waiting + aside if each[0] == stream.number])
        refusals, self.group.refusals = self.group.refusals, Refusals(max_share=1.0)  # counted when first read
        try:
            self.waiting = [self.group.measured(each[0], each, rows[each]) for each in waiting]
            again = [self.group.measured(each[0], each, rows[each]) for each in aside]
        finally:
            self.group.refusals = refusals
        self.aside = {}
        for entry in again:
            self.aside.setdefault((entry.coordinate[0], entry.row["task"]), deque()).append(entry)


class StreamDataset(IterableDataset):
    """The items of one rank, `{group name: collated group}`, in the order of the run; see the module's text.

    Args:
        groups: one for each kind and scale.
        length: micro-batches of the run, of all ranks together.
        rank, world: this process, of how many.
        workers: dataloader workers of each process, 0 for none.
        batches_per_step: micro-batches of all ranks in an optimiser step, for the curriculum.

    Raises:
        ValueError: processes and workers that do not divide `data.ranks` and `data.streams`.
    """

    def __init__(
        self,
        groups: Sequence[StreamGroup],
        data: DataArguments,
        length: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        batches_per_step: int = 1,
        refusals: Refusals | None = None,
    ):
        names = [group.arguments.name for group in groups]
        if len(set(names)) != len(names):
            raise ValueError(f"Each kind and scale may be given once, got {names}.")
        self.groups, self.data, self.length, self.seed = list(groups), data, length, seed
        self.rank, self.world, self.workers, self.batches_per_step = rank, world, max(1, workers), batches_per_step
        self.ranks = data.ranks or world
        self.streams = data.streams or self.ranks * self.workers
        if self.ranks % world or self.streams % self.ranks or self.streams % (world * self.workers):
            raise ValueError(
                f"data.ranks={self.ranks} and data.streams={self.streams} do not suit {world} processes with "
                f"{self.workers} dataloader workers: processes must divide ranks, and ranks and the product of "
                "processes and workers must divide streams."
            )
        self.refusals = Refusals() if refusals is None else refusals
        for group in self.groups:
            group.refusals = self.refusals
        self.start = 0  # first item, of all ranks together
        self.states: dict[int, dict[str, Any]] = {}
        self._origins: dict[str, list[str]] = {}  # of the item made last

    def __len__(self) -> int:
        return self.length // self.world

    # -- making items -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Items as (their micro-batch, the state of their stream behind them); see [`StreamLoader`]."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if workers != self.workers:
            raise ValueError(f"{workers} dataloader workers, but the streams are laid out for {self.workers}.")
        fillers: dict[int, list[StreamFiller]] = {}
        if info:
            fsspec.asyn.reset_lock()  # a lock held at the fork would never be let go
        first = self.start // self.world
        for step in range(first + worker, self.length // self.world, workers):
            item = step * self.world + self.rank
            stream = item % self.streams
            try:
                if stream not in fillers:
                    fillers[stream] = self._fillers(stream)
                batch = self._item(item, fillers[stream])
            except ValueError as error:  # told in one line by the process that prints
                yield {"error": str(error)}
                return
            yield {
                "batch": batch,
                "stream": stream,
                "state": [filler.state() for filler in fillers[stream]],
                "refusals": (worker, self.refusals.as_dict()),
                "origins": self._origins,
            }

    def _fillers(self, stream: int) -> list[StreamFiller]:
        fillers = [StreamFiller(group, stream, self.streams) for group in self.groups]
        if stream in self.states:
            for filler, state in zip(fillers, self.states[stream], strict=True):
                filler.restore(state)
        return fillers

    def level(self, item: int) -> int:
        return self.data.curriculum.level(item // self.batches_per_step)

    def _item(self, item: int, fillers: list[StreamFiller]) -> dict[str, Any]:
        level = self.level(item)
        batch, self._origins = {}, {}
        for filler in fillers:
            group = filler.group
            sequence = group.levels[level]
            # micro-batches of the ranks in a step are neighbours: `cycle` and `slot` are the same for all of them
            slots = self.streams // self.ranks
            cycle, slot = divmod(item // self.ranks, slots)
            shape, rows = filler.fill(sequence, sequence.at(slot, cycle), level)
            batch[group.arguments.name] = self._collated(group, item, shape, rows, sequence)
        return batch

    def _collated(self, group: StreamGroup, item: int, shape: Shape, rows, sequence: ShapeSequence) -> dict[str, Any]:
        good, failed = [], 0
        for number, row in rows:
            try:
                good.append(decoded(row))
            except BROKEN as error:
                failed += 1
                self.refusals.add(group.sources[number].name, UNREADABLE, f"{row.get('source', '')}: {told(error)}")
                continue
            if number >= 0:
                self.refusals.accept(group.sources[number].name)
        self._origins[group.arguments.name] = [str(row.get("source", "")) for row in good]
        rng = np.random.default_rng([self.seed, 2, item])
        spares = good or [
            decoded(row) | {"row_seed": row_seed(self.seed, group.arguments.scale, -1, item)}
            for row in sequence.spares[sequence.shapes.index(shape)] or sequence.spares[0]
        ]
        good = good + [spares[int(rng.integers(len(spares)))] for _ in range(failed)]
        return group.collator(good, np.random.default_rng([self.seed, 1, item]), shape)


class StreamLoader:
    """Iterates a [`StreamDataset`] with dataloader workers, and knows the state behind the last micro-batch taken.

    Args:
        dataset: of this rank. kwargs: of `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: StreamDataset, **kwargs):
        self.dataset = dataset
        workers = dataset.workers if kwargs.pop("num_workers", 0) else 0
        # a generator of its own: the workers' seeds would be drawn from the one that a checkpoint restores
        kwargs |= {"generator": torch.Generator(), "num_workers": workers}
        self.loader = DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, **kwargs)
        self.taken = dataset.start // dataset.world  # micro-batches of this rank
        self.states = dict(dataset.states)
        self.refusals: dict[int, dict[str, Any]] = {}
        # the rows' sources of the last micro-batches taken, by group: a step has no more of them
        self.origins: deque[dict[str, list[str]]] = deque(maxlen=max(1, dataset.batches_per_step))

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for each in self.loader:
            if "error" in each:
                raise ValueError(each["error"])
            self.taken += 1
            self.states[each["stream"]] = each["state"]
            worker, counts = each["refusals"]
            self.refusals[worker] = counts
            self.origins.append(each["origins"])
            yield each["batch"]

    def counts(self) -> dict[str, int]:
        """Rows given so far by this rank's streams, and of them repeated, padded up; dropped and refused ones."""
        total: Counter = Counter(rows=0, repeated=0, dropped=0, padded_up=0)
        for state in self.states.values():
            for each in state:
                total.update(each["counts"])
        return dict(total) | {"refused": self.all_refusals().refused}

    def all_refusals(self) -> Refusals:
        """What the workers of this process have skipped so far in this run."""
        total = Refusals(max_share=1.0)
        for counts in self.refusals.values():
            each = Refusals(max_share=1.0)
            each.load_dict(counts)
            total.merge(each)
        return total

    def save(self, folder: str | Path) -> None:
        """Write `data-state-RANK.json` into a checkpoint."""
        dataset = self.dataset
        mine = {str(stream): _plain(state) for stream, state in self.states.items() if stream in self._own()}
        content = {"item": self.taken * dataset.world, "ranks": dataset.ranks, "streams": dataset.streams}
        content["batches_per_step"] = dataset.batches_per_step
        write_state(folder, dataset.rank, content | {"states": mine})

    def _own(self) -> set[int]:
        dataset = self.dataset
        return {stream for stream in range(dataset.streams) if stream % dataset.world == dataset.rank}


def write_state(folder: str | Path, rank: int, content: dict[str, Any]) -> None:
    """`data-state-RANK.json`, whole or not at all."""
    path = Path(folder) / f"data-state-{rank}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content))
    beside.rename(path)


def _as_it_is(item: dict[str, Any]) -> dict[str, Any]:
    return item


def _plain(state: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in each.items()}
        for each in state
    ]


def layout_of(folder: str | Path) -> dict[str, int]:
    """What the run of a checkpoint was planned for: `ranks`, `streams` (streaming only), and `batches_per_step`, the
    micro-batches of all ranks in an optimiser step; empty when unknown."""
    for file in sorted(Path(folder).glob("data-state-*.json")):
        content = json.loads(file.read_text())
        return {key: content[key] for key in ("ranks", "streams", "batches_per_step") if key in content}
    return {}


def load_state(dataset: StreamDataset, folder: str | Path) -> None:
    """Let a dataset go on where the checkpoint in `folder` was, over any processes and workers that divide its own.

    Raises:
        ValueError: no state there, not all of it, or of a run that was laid out otherwise.
    """
    files = sorted(Path(folder).glob("data-state-*.json"))
    contents = [json.loads(file.read_text()) for file in files]
    if not contents or any("streams" not in content for content in contents):
        raise ValueError(f"{folder} was not made by a streaming run: start anew, or set data.streaming: false.")
    items = {content["item"] for content in contents}
    ranks, streams = contents[0]["ranks"], contents[0]["streams"]
    if len(items) > 1:
        raise ValueError(f"{folder}: its data-state files disagree; they are of several checkpoints.")
    if (dataset.ranks, dataset.streams) != (ranks, streams):
        raise ValueError(
            f"{folder} is of a run with data.ranks={ranks} and data.streams={streams}, this one has "
            f"{dataset.ranks} and {dataset.streams}: set both to the checkpoint's."
        )
    states = {int(stream): state for content in contents for stream, state in content["states"].items()}
    item = items.pop()
    if absent := sorted(set(range(min(item, streams))) - set(states)):
        raise ValueError(f"{folder} lacks the state of the streams {absent}: copy the data-state files of all ranks.")
    if item % dataset.world:
        raise ValueError(f"{item} micro-batches cannot be gone on from by {dataset.world} processes.")
    dataset.start, dataset.states = item, states
