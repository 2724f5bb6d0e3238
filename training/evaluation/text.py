"""Reading, measured: how much of the text of held-out blocks a reader gets right.

A *block* is one row of a data set in the schema of ``training/data`` with kind ``document``, task ``ocr`` and split
``validation``: an image, its text, and the x-height of its type in pixels. A *reader* is any function from a list of
blocks to a list of texts of the same length; :func:`reads_images` makes one of a function of images.

All figures are taken on text as :func:`comparable` gives it: normalised, lines joined, words divided at the end of a
line put together again, on both sides. So a reader that breaks lines elsewhere loses nothing.

| figure | definition |
|---|---|
| word F1, precision, recall | multisets of words (lower case, runs of letters and digits), counts pooled over blocks |
| CER | Levenshtein distance in characters, case and punctuation included, over the characters of the truth, pooled |
| WER | the same over words as white space divides them |
| exact | share of blocks read without a single wrong character |

Intervals are 95% percentiles of a bootstrap over blocks (1,000 resamples, seeded).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from training.data.text import join_lines, normalize_text, words

# x-height in pixels; a bin holds its lower end, the last one its upper end too. Unit-tiny is judged on 8 to 14 px.
X_HEIGHT_BINS = ((8.0, 10.0), (10.0, 12.0), (12.0, 14.0))
RESAMPLES = 1000
PEER_X_HEIGHT = 20.0  # px; about 10 pt type at 300 dpi, what tesseract's models were trained on
PEER_TIMEOUT = 60.0  # seconds for one block; a block takes tesseract a fraction of a second


class Row(NamedTuple):
    """One figure with its 95% interval; all three on the scale that ``name`` implies (shares in [0, 1], CER above)."""

    name: str
    value: float
    low: float
    high: float


class PeerMissing(RuntimeError):
    """A peer cannot be run on this machine; the message is one line that says what to install."""


@dataclass(frozen=True)
class Block:
    """One held-out block. ``x_height`` in pixels of ``image``; ``text`` with a line feed between lines."""

    index: int
    image: Image.Image
    text: str
    x_height: float
    source: str = ""


ReadFn = Callable[[list[Block]], list[str]]


def reads_images(read: Callable[[list[Image.Image]], list[str]]) -> ReadFn:
    """A reader of blocks that sees nothing of them but their RGB images."""
    return lambda blocks: read([block.image for block in blocks])


class Counts(NamedTuple):
    """What one block adds to the pooled figures. All are counts; ``exact`` is 0 or 1."""

    matched_words: int
    predicted_words: int
    true_words: int
    character_edits: int
    true_characters: int
    word_edits: int
    true_tokens: int
    exact: int


def comparable(text: str) -> str:
    """``text`` as it is compared: normalised, lines joined, division at the end of a line undone, ends trimmed."""
    return join_lines(normalize_text(text)).strip()


def count(prediction: str, truth: str) -> Counts:
    """The counts of one block. Order matters for edits, not for words.

    >>> count("The cat sat", "the cat sat down")
    Counts(matched_words=3, predicted_words=3, true_words=4, character_edits=6, true_characters=16, word_edits=2, \
true_tokens=4, exact=0)
    """
    prediction, truth = comparable(prediction), comparable(truth)
    predicted_words, true_words = Counter(words(prediction)), Counter(words(truth))
    predicted_tokens, true_tokens = prediction.split(), truth.split()
    return Counts(
        matched_words=(predicted_words & true_words).total(),
        predicted_words=predicted_words.total(),
        true_words=true_words.total(),
        character_edits=Levenshtein.distance(prediction, truth),
        true_characters=len(truth),
        word_edits=Levenshtein.distance(predicted_tokens, true_tokens),
        true_tokens=len(true_tokens),
        exact=int(prediction == truth),
    )


def _figures(totals: np.ndarray, blocks: int) -> np.ndarray:
    """(R, 8) totals over ``blocks`` blocks -> (R, 6): F1, precision, recall, CER, WER, exact.

    Nothing predicted and nothing to find is a perfect reading: F1, precision and recall are 1, error rates 0.
    """
    matched, predicted, true, char_edits, chars, word_edits, tokens, exact = totals.T.astype(np.float64)

    def share(part: np.ndarray, whole: np.ndarray, when_empty: np.ndarray | float) -> np.ndarray:
        return np.where(whole > 0, part / np.maximum(whole, 1.0), when_empty)

    f1 = share(2.0 * matched, predicted + true, 1.0)
    precision = share(matched, predicted, (true == 0).astype(float))
    recall = share(matched, true, (predicted == 0).astype(float))
    # Text invented where there is none is counted in full: the rate over an empty truth is the number of edits.
    cer = share(char_edits, chars, char_edits)
    wer = share(word_edits, tokens, word_edits)
    return np.stack([f1, precision, recall, cer, wer, exact / blocks], axis=1)


FIGURES = ("word_f1", "word_precision", "word_recall", "cer", "wer", "exact")


def summarise(counts: Sequence[Counts], seed: int = 0, resamples: int = RESAMPLES) -> list[Row]:
    """Pooled figures of ``counts`` with bootstrap intervals, in the order of ``FIGURES``.

    Args:
        counts: one per block, at least one.
        seed: of the bootstrap; same seed, same interval.
        resamples: how often the blocks are drawn anew, with replacement.

    Raises:
        ValueError: ``counts`` is empty.
    """
    if not counts:
        raise ValueError("there is no block to summarise")
    table = np.array(counts, dtype=np.int64)  # (blocks, 8)
    number = len(table)
    values = _figures(table.sum(axis=0, keepdims=True), number)[0]
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1.0 / number), size=resamples)
    low, high = np.percentile(_figures(draws @ table, number), [2.5, 97.5], axis=0)
    return [Row(*row) for row in zip(FIGURES, values.tolist(), low.tolist(), high.tolist(), strict=True)]


def word_f1(prediction: str, truth: str) -> float:
    """Multiset word F1 of one text, in [0, 1]; 1 when both are empty.

    >>> word_f1("a a b", "a b c")
    0.6666666666666666
    """
    return summarise([count(prediction, truth)], resamples=1)[0].value


def cer(prediction: str, truth: str) -> float:
    """Character error rate of one text: 0 is perfect, above 1 is possible.

    >>> cer("cat", "cart")
    0.25
    """
    return summarise([count(prediction, truth)], resamples=1)[3].value


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


class Blocks:
    """The held-out blocks in a folder of parquet shards, at most ``limit`` of them, spread evenly over the set.

    Iterating reads one row group at a time, so that a large set does not fill the memory. Order and choice depend on
    the files alone.

    Args:
        folder: searched recursively for ``*.parquet`` with columns ``image, text, task, kind, x_height, split``.
        limit: at most so many blocks; ``None`` for all.

    Raises:
        ValueError: the folder does not exist, holds no shard, lacks a column, or has no held-out block.
    """

    COLUMNS = ("image", "text", "task", "kind", "x_height", "split")

    def __init__(self, folder: str | os.PathLike, limit: int | None = None):
        self.folder = Path(folder)
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; build the held-out blocks with `make data`")
        shards = sorted(self.folder.rglob("*.parquet"))
        if not shards:
            raise ValueError(f"{self.folder}: no .parquet file in it; build the held-out blocks with `make data`")
        places = []  # (shard, row group, row) of every held-out block
        for shard in shards:
            file = pq.ParquetFile(shard)
            missing = [name for name in self.COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{shard}: column {missing[0]!r} is missing; is this a data set that `unit data` made?"
                )
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=["task", "kind", "split"]).to_pylist()
                places += [
                    (shard, group, row)
                    for row, item in enumerate(rows)
                    if item["task"] == "ocr" and item["kind"] == "document" and item["split"] == "validation"
                ]
        if not places:
            raise ValueError(
                f"{self.folder}: none of its rows is a document to read with split 'validation'; "
                "rows of the training split are never evaluated"
            )
        if limit is not None and limit < len(places):
            places = [places[len(places) * step // limit] for step in range(limit)]
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Block]:
        opened, rows = None, None
        for index, (shard, group, row) in enumerate(self.places):
            if opened != (shard, group):
                file = pq.ParquetFile(shard)
                wanted = [name for name in (*self.COLUMNS, "source") if name in file.schema_arrow.names]
                opened, rows = (shard, group), file.read_row_group(group, columns=wanted)
            item = rows.slice(row, 1).to_pylist()[0]
            try:
                with Image.open(io.BytesIO(item["image"]["bytes"])) as picture:
                    image = picture.convert("RGB")
            except (OSError, TypeError) as error:
                raise ValueError(f"{shard}, row {row} of row group {group}: no image that can be decoded") from error
            yield Block(index, image, item["text"], float(item["x_height"]), item.get("source") or "")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TextResult:
    """How one reader did.

    Attributes:
        reader: its name.
        blocks: number of blocks, failed ones included.
        failed: number of blocks at which the reader raised an error; they count as read empty.
        seconds: time spent in the reader, all blocks together.
        rows: the figures over all blocks, see ``FIGURES``.
        bins: ``(low, high, blocks, rows)`` per x-height bin in pixels that holds at least one block.
        items: per block ``{index, source, x_height, truth, prediction, word_f1}``, and ``error`` where it failed.
    """

    reader: str
    blocks: int
    failed: int
    seconds: float
    rows: list[Row]
    bins: list[tuple[float, float, int, list[Row]]]
    items: list[dict] = field(repr=False, default_factory=list)

    def value(self, name: str) -> float:
        """The figure called ``name``, one of ``FIGURES``."""
        return {row.name: row.value for row in self.rows}[name]

    def to_dict(self) -> dict:
        """Plain data for results.json, without the texts."""
        return {
            "reader": self.reader,
            "blocks": self.blocks,
            "failed": self.failed,
            "seconds": round(self.seconds, 3),
            "rows": [list(row) for row in self.rows],
            "bins": [
                {"x_height": [low, high], "blocks": number, "rows": [list(row) for row in rows]}
                for low, high, number, rows in self.bins
            ],
        }

    def write_items(self, path: Path) -> None:
        """One JSON object per line and block, worst first: what to look at when a figure disappoints."""
        items = sorted(self.items, key=lambda item: (item["word_f1"], item["index"]))
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bin_of(x_height: float) -> tuple[float, float] | None:
    for low, high in X_HEIGHT_BINS:
        if low <= x_height < high or x_height == high == X_HEIGHT_BINS[-1][1]:
            return low, high
    return None


def evaluate_text(
    read_fn: ReadFn,
    blocks: Blocks | Sequence[Block] | str | os.PathLike,
    limit: int | None = None,
    *,
    name: str = "reader",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> TextResult:
    """Read every block with ``read_fn`` and compare.

    Args:
        read_fn: list of blocks -> list of texts, one per block, in order.
        blocks: held-out blocks, or a folder of them (see :class:`Blocks`).
        limit: at most so many blocks, spread evenly; only with a folder.
        name: of the reader, in the progress bar and the report.
        batch_size: blocks handed to ``read_fn`` at once.
        seed: of the bootstrap.
        progress: show a progress bar on standard error.

    A batch at which ``read_fn`` raises is tried again block by block; a block at which it raises alone is counted as
    failed and as read empty, and the rest goes on. :class:`PeerMissing` is passed on at once.

    Raises:
        ValueError: there is no block, or ``read_fn`` returned another number of texts than it was given blocks.
        PeerMissing: raised by ``read_fn``.
    """
    if isinstance(blocks, (str, os.PathLike)):
        blocks = Blocks(blocks, limit)
    elif limit is not None:
        raise ValueError("limit needs a folder of blocks; cut the sequence yourself")
    if len(blocks) == 0:
        raise ValueError("there is no block to read")

    failures: dict[int, str] = {}
    seconds = 0.0

    def read(batch: list[Block]) -> list[str]:
        nonlocal seconds
        start = time.perf_counter()
        try:
            texts = read_fn(batch)
        finally:
            seconds += time.perf_counter() - start
        if len(texts) != len(batch):
            raise ValueError(f"{name} returned {len(texts)} texts for {len(batch)} blocks; it must return one each")
        return texts

    def read_one_by_one(batch: list[Block]) -> list[str]:
        texts = []
        for block in batch:
            try:
                texts += read([block])
            except PeerMissing:
                raise
            except Exception as error:
                failures[block.index] = f"{type(error).__name__}: {error}"
                texts.append("")
        return texts

    items, counts, heights = [], [], []
    with tqdm(total=len(blocks), desc=f"reading with {name}", unit="block", disable=not progress) as bar:
        for batch in _batches(blocks, batch_size):
            try:
                texts = read(batch)
            except PeerMissing:
                raise
            except Exception:
                texts = read_one_by_one(batch)
            for block, prediction in zip(batch, texts, strict=True):
                counts.append(count(prediction, block.text))
                heights.append(block.x_height)
                item = {
                    "index": block.index,
                    "source": block.source,
                    "x_height": round(block.x_height, 2),
                    "truth": block.text,
                    "prediction": prediction,
                    "word_f1": round(_figures(np.array(counts[-1:]), 1)[0, 0].item(), 4),
                }
                if block.index in failures:
                    item["error"] = failures[block.index]
                items.append(item)
            bar.update(len(batch))

    bins = []
    for low, high in X_HEIGHT_BINS:
        chosen = [one for one, height in zip(counts, heights, strict=True) if _bin_of(height) == (low, high)]
        if chosen:
            bins.append((low, high, len(chosen), summarise(chosen, seed)))
    return TextResult(name, len(counts), len(failures), seconds, summarise(counts, seed), bins, items)


def _batches(blocks: Blocks | Sequence[Block], size: int) -> Iterator[list[Block]]:
    batch = []
    for block in blocks:
        batch.append(block)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------


class Tesseract:
    """The tesseract program as a reader: one uniform block of English text (``--psm 6``), one process a block.

    Args:
        upscale_to: x-height in pixels to which a smaller block is enlarged (bicubic) before reading; ``None`` reads it
            as it is. Tesseract expects print at 300 dpi, so small type without this would be an unfair comparison.

    Raises:
        PeerMissing: there is no ``tesseract`` on the PATH.
    """

    def __init__(self, upscale_to: float | None = None):
        self.program = shutil.which("tesseract")
        if self.program is None:
            raise PeerMissing(
                "tesseract is not installed (Debian: apt-get install tesseract-ocr); its rows are left out"
            )
        self.upscale_to = upscale_to

    def __call__(self, blocks: list[Block]) -> list[str]:
        return [self.read(block) for block in blocks]

    def read(self, block: Block) -> str:
        """The text of one block. Raises RuntimeError when tesseract fails or takes more than a minute."""
        image = block.image.convert("L")
        if self.upscale_to and 0 < block.x_height < self.upscale_to:
            factor = self.upscale_to / block.x_height
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        command = [self.program, "stdin", "stdout", "-l", "eng", "--psm", "6"]
        # One thread: its own four only wait for each other on small images.
        environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
        try:
            done = subprocess.run(
                command,
                input=buffer.getvalue(),
                capture_output=True,
                timeout=PEER_TIMEOUT,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"tesseract gave no answer within {PEER_TIMEOUT:.0f} s") from error
        if done.returncode != 0:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"tesseract failed with status {done.returncode}: {lines[-1]}")
        return done.stdout.decode("utf-8", "replace").replace("\f", "\n").strip()


def tesseract_peers() -> dict[str, Tesseract]:
    """Name -> reader: as it is, and with the enlargement that suits it best.

    Raises:
        PeerMissing: there is no ``tesseract`` on the PATH.
    """
    return {"tesseract": Tesseract(), f"tesseract, {PEER_X_HEIGHT:.0f} px": Tesseract(upscale_to=PEER_X_HEIGHT)}


PEERS = {"tesseract": tesseract_peers}


def tesseract_version() -> str:
    """Such as ``"tesseract 5.3.0"``; empty when there is none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["tesseract", "--version"], capture_output=True, text=True, timeout=20, check=False)
        return (done.stdout or done.stderr).splitlines()[0]
    return ""
