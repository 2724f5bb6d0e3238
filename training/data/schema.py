"""The one row format of the training data, its validator, and the parquet shards it is kept in.

A row, whatever made it, has

============  ==============  ======================================================================================
column        type            meaning
============  ==============  ======================================================================================
image         bytes, path     a PNG, JPEG or WebP file (``datasets.Image``); mode L suffices for documents
text          string          the target; ``\\n`` between printed lines; empty for a blank canvas
task          string          ``ocr``, ``caption`` or ``markdown``
kind          string          ``natural`` or ``document``
source        string          where it comes from, e.g. ``texlive-science-doc/…/siunits.pdf#12``
license       string          licence of the source as far as known
split         string          ``train`` or ``validation``
============  ==============  ======================================================================================

and may have (a set without the column, null and an empty list all say "not known")

============  ==============  ======================================================================================
words         list of struct  words in reading order: ``text`` (string), and ``box`` (list of 4 int32), which is
                              ``[x0, y0, x1, y1]`` in pixels of the image, x1 and y1 exclusive
char_boxes    list of int16   ``[x0, y0, x1, y1]`` for each character of ``text``, end to end, in pixels of the
                              image, x1 and y1 exclusive; four zeros for white space
x_height      float32         height of a lower-case x in pixels; 0 for pictures and where it is not known
============  ==============  ======================================================================================

Further columns are carried by nobody and minded by nobody. ``docs/data.md`` shows an example row.
"""

from __future__ import annotations

import errno
import io
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TASKS = ("ocr", "caption", "markdown")
KINDS = ("natural", "document")
SPLITS = ("train", "validation")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
REQUIRED = ("image", "text", "task", "kind", "source", "license", "split")
OPTIONAL = ("words", "char_boxes", "x_height")
COLUMNS = REQUIRED + OPTIONAL


def features():
    """The columns as ``datasets.Features``."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    return Features(
        {
            "image": ImageFeature(),
            "text": Value("string"),
            "task": Value("string"),
            "kind": Value("string"),
            "source": Value("string"),
            "license": Value("string"),
            "split": Value("string"),
            "words": List({"text": Value("string"), "box": List(Value("int32"))}),
            "char_boxes": List(Value("int16")),
            "x_height": Value("float32"),
        }
    )


def png_bytes(pixels: np.ndarray, quick: bool = False) -> bytes:
    """PNG file of an (H, W) or (H, W, 3) uint8 array.

    Args:
        quick: about half of the time; files of clean pages a fifth larger, of noisy ones smaller.
    """
    buffer = io.BytesIO()
    # Two thirds of the time of Pillow's default 6, files 9% larger (measured on 400 chunks).
    how = {"compress_level": 1, "compress_type": zlib.Z_RLE} if quick else {"compress_level": 3}
    Image.fromarray(pixels).save(buffer, "PNG", **how)
    return buffer.getvalue()


def make_row(
    image: np.ndarray | bytes,
    text: str,
    *,
    task: str,
    kind: str,
    source: str,
    license: str,
    split: str,
    words: Sequence[dict[str, Any]] | None = None,
    char_boxes: np.ndarray | None = None,
    x_height: float = 0.0,
) -> dict[str, Any]:
    """A row of the schema with all its columns.

    Args:
        image: (H, W[, 3]) uint8 pixels, kept as PNG, or the bytes of a PNG, JPEG or WebP file, kept as they are.
        words: ``{"text": …, "box": (x0, y0, x1, y1)}`` in reading order; by default made from ``char_boxes``.
        char_boxes: (len(text), 4) in pixels, zeros for white space.

    Raises:
        ValueError: boxes that are not (len(text), 4), or that 16 bits do not hold.
    """
    boxes = np.zeros((0, 4), dtype=np.int64) if char_boxes is None else np.asarray(char_boxes).reshape(-1, 4)
    if boxes.size and not np.abs(boxes).max() <= np.iinfo(np.int16).max:
        raise ValueError(f"char_boxes must lie within {np.iinfo(np.int16).max} pixels, got {np.abs(boxes).max()}")
    if words is None:
        words = words_from_char_boxes(text, boxes) if len(boxes) else []
    return {
        "image": {"bytes": image if isinstance(image, bytes) else png_bytes(image), "path": None},
        "text": text,
        "task": task,
        "kind": kind,
        "source": source,
        "license": license,
        "split": split,
        "words": [{"text": word["text"], "box": [int(edge) for edge in word["box"]]} for word in words],
        "char_boxes": boxes.astype(np.int16).reshape(-1).tolist(),
        "x_height": float(x_height),
    }


def words_from_char_boxes(text: str, boxes: np.ndarray) -> list[dict[str, Any]]:
    """Words of ``text``, split at white space, each with the box around those of its characters.

    Args:
        boxes: (len(text), 4); a box without area says that the place of its character is not known, and a word of
            such characters alone is left out.

    Raises:
        ValueError: not one box a character.
    """
    boxes = np.asarray(boxes, dtype=np.int64).reshape(-1, 4)
    if len(boxes) != len(text):
        raise ValueError(f"char_boxes must hold one box for each of the {len(text)} characters, not {len(boxes)}")
    found = list(re.finditer(r"\S+", text))
    if not found:
        return []
    known = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    far = np.iinfo(np.int64).max
    # what follows a word until the next is white space, without a place, so that it changes no minimum or maximum
    starts = [match.start() for match in found]
    low = np.minimum.reduceat(np.where(known[:, None], boxes[:, :2], far), starts)
    high = np.maximum.reduceat(np.where(known[:, None], boxes[:, 2:], -1), starts)
    return [
        {"text": match[0], "box": box}
        for match, box in zip(found, np.concatenate([low, high], axis=1).tolist(), strict=True)
        if box[2] >= 0
    ]


def validate_row(row: dict[str, Any], *, decode: bool = True) -> None:
    """Check one row against the tables above; further columns are nobody's business.

    Args:
        row: a row as `make_row` returns it, or as read from parquet without decoding the image.
        decode: also decode the image, to its last pixel, and check the boxes against its size.

    Raises:
        ValueError: in one line, what is wrong and with which row (its ``source``).
    """
    missing = [column for column in REQUIRED if column not in row]
    if missing:
        raise ValueError(f"a row needs the columns {', '.join(REQUIRED)}; missing: {', '.join(missing)}")

    def refuse(problem: str) -> None:
        raise ValueError(f"row from {row['source']!r}: {problem}")

    for column in ("text", "source", "license"):
        if not isinstance(row[column], str):
            refuse(f"{column} must be a string, not {type(row[column]).__name__}")
    for column, allowed in (("task", TASKS), ("kind", KINDS), ("split", SPLITS)):
        if row[column] not in allowed:
            refuse(f"{column} must be one of {', '.join(allowed)}, not {row[column]!r}")
    image = row["image"]
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes) or not image["bytes"]:
        refuse("image must be a dictionary with the PNG, JPEG or WebP file under 'bytes'")
    x_height = row.get("x_height")
    if not float(0.0 if x_height is None else x_height) >= 0:
        refuse(f"x_height must be 0 or more pixels, not {x_height!r}")
    columns = {"words": _word_boxes(row.get("words"), refuse), "char_boxes": _char_boxes(row, refuse)}
    for column, boxes in columns.items():
        if (boxes < 0).any() or (boxes[:, 2] < boxes[:, 0]).any() or (boxes[:, 3] < boxes[:, 1]).any():
            refuse(f"{column} must hold boxes [x0, y0, x1, y1] with 0 <= x0 <= x1 and 0 <= y0 <= y1")
    if decode:
        try:
            with Image.open(io.BytesIO(image["bytes"]), formats=IMAGE_FORMATS) as picture:
                width, height = picture.size
                picture.load()
        except Exception as error:  # decoders of broken data raise what they like
            refuse(f"the image cannot be opened as PNG, JPEG or WebP: {error}")
        for column, boxes in columns.items():
            if boxes.size and (boxes[:, 2].max() > width or boxes[:, 3].max() > height):
                refuse(f"{column} reach beyond the image of {width}x{height} pixels")


def _word_boxes(words: Any, refuse: Callable[[str], None]) -> np.ndarray:
    """(words, 4) int64"""
    if words is None or (isinstance(words, (list, tuple)) and not words):
        return np.zeros((0, 4), dtype=np.int64)
    try:
        texts = [word["text"] for word in words]
        boxes = np.array([word["box"] for word in words]).reshape(len(texts), -1)
        good = boxes.shape[1] == 4 and boxes.dtype.kind in "iu"
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        refuse("words must be a list of {'text': string, 'box': 4 whole numbers}")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        refuse("words must hold a string that is not empty under 'text'")
    return boxes.astype(np.int64)


def _char_boxes(row: dict[str, Any], refuse: Callable[[str], None]) -> np.ndarray:
    """(characters, 4) int64, or (0, 4) where none are known."""
    given = row.get("char_boxes")
    try:
        boxes = np.asarray([] if given is None else given, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        refuse("char_boxes must be a list of whole numbers")
    if boxes.size and boxes.size != 4 * len(row["text"]):
        refuse(f"char_boxes must hold 4 numbers for each of the {len(row['text'])} characters, not {boxes.size}")
    boxes = boxes.reshape(-1, 4)
    if boxes.size:
        blank = np.array([character.isspace() for character in row["text"]])
        if (boxes[blank] != 0).any():
            refuse("char_boxes must be four zeros where the character is white space")
    return boxes


def write_shards(
    rows: Iterable[dict[str, Any]],
    folder: str | Path,
    rows_per_shard: int = 5000,
    more: dict[str, Any] | None = None,
) -> int:
    """Write rows to ``folder/part-00000.parquet`` and so on.

    The shards are written beside the folder and take the place of those in it when the last is done: a build that
    breaks off, or that another one overtakes, leaves the data set as it was.

    Args:
        rows: rows of the schema, consumed as they come; each is validated (without decoding its image).
        folder: created when missing.
        rows_per_shard: rows a file holds; the last holds the rest.
        more: further columns, as `datasets.Features` has them.

    Returns:
        How many rows were written.

    Raises:
        ValueError: a row is not of the schema, or ``rows_per_shard`` is below 1.
        OSError: the disk is full (``errno.ENOSPC``), in one line that says so; ``folder`` is as it was.
    """
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be 1 or more, not {rows_per_shard}")
    from datasets import Features

    folder = Path(folder).absolute()
    columns = Features({**features(), **(more or {})}).arrow_schema
    written = 0
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
            for shard in _groups(rows, rows_per_shard):
                _write_shard(shard, Path(staging) / f"part-{written // rows_per_shard:05d}.parquet", columns)
                written += len(shard)
            folder.mkdir(exist_ok=True)
            new = sorted(Path(staging).iterdir())
            for path in new:
                path.replace(folder / path.name)
            for old in folder.glob("part-*.parquet"):
                if old.name not in {path.name for path in new}:
                    old.unlink()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left on the disk after {written} rows, nothing was kept of them: free some and start again, "
            "or write to another disk",
            str(folder),
        ) from error
    return written


def _groups(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    group = []
    for row in rows:
        validate_row(row, decode=False)
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _write_shard(rows: list[dict[str, Any]], path: Path, columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, schema=columns), path, row_group_size=500)


def shard_paths(folder: str | Path) -> list[Path]:
    """The parquet files of a data set, in order.

    Raises:
        ValueError: the folder holds none.
    """
    paths = sorted(Path(folder).glob("*.parquet"))
    if not paths:
        raise ValueError(f"{folder} holds no parquet files: build the data set first (`unit data --help`)")
    return paths


def read_dataset(folder: str | Path):
    """The data set in ``folder`` as a ``datasets.Dataset``, images decoded when a row is looked at."""
    from datasets import load_dataset

    files = [str(path) for path in shard_paths(folder)]
    return load_dataset("parquet", data_files=files, split="train")


def read_columns(folder: str | Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of ``folder`` with only ``columns`` read from disk: for statistics and leak checks.

    An optional column of the schema that the set does not have is None.
    """
    import pyarrow.parquet as pq

    for path in shard_paths(folder):
        with pq.ParquetFile(path) as shard:
            absent = [column for column in columns if column in OPTIONAL and column not in shard.schema_arrow.names]
            present = [column for column in columns if column not in absent]
            for batch in shard.iter_batches(batch_size=256, columns=present):
                for row in batch.to_pylist():
                    yield row | dict.fromkeys(absent)
