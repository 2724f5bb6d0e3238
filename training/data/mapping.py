"""Anything that ``datasets`` reads, on the Hub or on disk, as rows of the schema.

A source of a recipe names a data set and how its columns map onto ours:

    sources:
      - dataset: {path: mp-02/funsd, layout: funsd, license: "research only"}
        weight: 1
      - dataset:
          path: /data/receipts             # a folder, a file, files by a pattern, a set in the cache, or a Hub id
          columns: {image: scan, text: transcript}
          task: ocr
          kind: document
          filter: {min_side: 64, max_characters: 2000, columns: {quality: {in: [good, fair]}}}

`DatasetArguments` lists the keys and `LAYOUTS` the layouts; ``docs/data.md`` shows a recipe for each. Nothing of a
data set is ever executed: no dataset scripts, no pickles, no expressions in recipes. A token for a private repository
comes from ``hf auth login`` or ``HF_TOKEN``, never from a recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_unit.image_input_unit import MAX_PIXELS, UnreadableInput, open_image

from .refusals import Refusals
from .schema import IMAGE_FORMATS, KINDS, REQUIRED, TASKS, make_row, png_bytes, validate_row
from .sources import data_folder

FORMATS = ("auto", "parquet", "arrow", "json", "csv", "tsv", "imagefolder", "webdataset")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
BOX_UNITS = {"pixels": None, "thousandths": 1000.0, "unit": 1.0}
ORDERS = ("given", "lines")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
SPLIT_NAME = re.compile(r"^(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_OUR_JSON = ("report.json", "validation.json", "manifest.json")


class RowRefused(ValueError):
    """A row that is skipped. `reason` is a short phrase that many rows share; the message also has the particulars."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class FilterArguments:
    """Which rows of a data set are wanted; 0 and empty say "any". The others are left out, which is no refusal.

    Args:
        min_side, max_side: of the image's shorter and longer side, pixels.
        min_characters, max_characters: of the text.
        language: ISO 639-1 codes of the text's language (needs py3langid), e.g. `[en, de]`.
        columns: column of the data set -> one test or several, all of which must hold: `equals: value`,
            `in: [values]`, `regex: pattern` (found anywhere in the value), `min: number`, `max: number`.
    """

    min_side: int = 0
    max_side: int = 0
    min_characters: int = 0
    max_characters: int = 0
    language: list[str] = field(default_factory=list)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        for name, tests in self.columns.items():
            if not isinstance(tests, dict) or not tests or set(tests) - set(_COLUMN_TESTS):
                raise ValueError(f"filter.columns.{name} needs tests of {', '.join(_COLUMN_TESTS)}; got {tests!r}")
            if "regex" in tests:
                try:
                    re.compile(tests["regex"])
                except (re.error, TypeError) as error:
                    raise ValueError(f"filter.columns.{name}: {tests['regex']!r} is no regex: {error}") from None
        if isinstance(self.language, str):
            self.language = [self.language]

    def wants_columns(self, raw: dict[str, Any]) -> bool:
        for name, tests in self.columns.items():
            if name not in raw:
                raise RowRefused(f"columns: no {name}", f"there are {', '.join(raw)}")
            for test, wanted in tests.items():
                try:
                    if not _COLUMN_TESTS[test](raw[name], wanted):
                        return False
                except TypeError:
                    return False  # null, or text where a number is meant
        return True

    def wants(self, size: tuple[int, int], text: str) -> bool:
        if min(size) < self.min_side or (self.max_side and max(size) > self.max_side):
            return False
        if len(text) < self.min_characters or (self.max_characters and len(text) > self.max_characters):
            return False
        if self.language:
            from .languages import detect_language

            return detect_language(text) in self.language
        return True


_COLUMN_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "equals": lambda value, wanted: value == wanted,
    "in": lambda value, wanted: value in wanted,
    "regex": lambda value, wanted: re.search(wanted, str(value)) is not None,
    "min": lambda value, wanted: value >= wanted,
    "max": lambda value, wanted: value <= wanted,
}


@dataclass
class DatasetArguments:
    """A data set and how it maps onto the schema: the key `dataset` of a source in a recipe.

    Args:
        path: a folder, a file, a pattern of files (`/data/*.tar`), the name of a set in the cache, or a Hub id.
        name: configuration of a Hub data set.
        data_files: files or patterns within `path`.
        format: `auto` goes by the files; or parquet, arrow (of `save_to_disk`), json (also .jsonl), csv, tsv,
            imagefolder, webdataset.
        split: of the data set. Rows of a split whose name begins with `train` are for training, all others are
            `validation`, but for rows that have our own column `split`.
        revision: of a Hub data set: a branch, tag or commit.
        layout: one of `LAYOUTS`; `auto` is `schema` where the columns are ours, else `columns`.
        columns: our name -> theirs, for `image`, `text`, `words` (list of strings), `boxes` (list of 4 numbers each),
            `license`, `id`.
        column_names: of a .tsv file without a first line that names them.
        task, kind, license: of every row. The layout knows a task and a kind; `columns` needs them here.
        images: folder that paths of images are relative to; by default the folder of the files.
        turn: which answer of a dialogue is the text, 0 for the first.
        box_unit: of boxes: `pixels`, `thousandths` of the image's sides, or `unit` for shares of them.
        order: of words: `given`, or `lines`: put into lines by their boxes, read from top to bottom and each from left
            to right. The text is then these lines.
        filter: settings of `FilterArguments`.

    Raises:
        ValueError: an unknown key, format, layout, task, kind, unit or order; a pickle.
    """

    path: str
    name: str | None = None
    data_files: Any = None
    format: str = "auto"
    split: str = "train"
    revision: str | None = None
    layout: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    column_names: list[str] = field(default_factory=list)
    task: str | None = None
    kind: str | None = None
    license: str | None = None
    images: str | None = None
    turn: int = 0
    box_unit: str | None = None
    order: str | None = None
    filter: FilterArguments | dict[str, Any] = field(default_factory=FilterArguments)

    def __post_init__(self):
        for key, allowed in (
            ("format", FORMATS),
            ("layout", ("auto", *LAYOUTS)),
            ("task", (None, *TASKS)),
            ("kind", (None, *KINDS)),
            ("box_unit", (None, *BOX_UNITS)),
            ("order", (None, *ORDERS)),
        ):
            if getattr(self, key) not in allowed:
                names = ", ".join(name for name in allowed if name)
                raise ValueError(f"dataset.{key} must be one of {names}; got {getattr(self, key)!r}")
        unknown = set(self.columns) - set(_ROLES)
        if unknown:
            raise ValueError(f"dataset.columns maps {', '.join(_ROLES)}; not {', '.join(sorted(unknown))}")
        if isinstance(self.filter, dict):
            self.filter = _from_mapping(FilterArguments, self.filter, "dataset.filter")
        files = self.data_files if isinstance(self.data_files, list) else [self.data_files or ""]
        for file in (self.path, *files):
            if str(file).lower().endswith((".pkl", ".pickle", ".pt", ".pth")):
                raise ValueError(f"{file} is a pickle, which could run any code: save the data as parquet instead")

    @classmethod
    def of(cls, source: Any) -> DatasetArguments:
        """From a mapping, a path, or a source of a recipe: an object with a mapping under `dataset`, or a `path`."""
        if isinstance(source, cls):
            return source
        if isinstance(source, (str, Path)):
            return cls(path=str(source))
        if not isinstance(source, dict):
            given = getattr(source, "dataset", None)
            return cls.of(given if given else source.path)
        if "token" in source or "trust_remote_code" in source:
            raise ValueError(
                "a recipe holds no token (use `hf auth login` or HF_TOKEN) and runs no code of a data set's repository"
            )
        return _from_mapping(cls, source, "dataset")


_ROLES = ("image", "text", "words", "boxes", "license", "id")


def _from_mapping(target: type, given: dict[str, Any], where: str) -> Any:
    known = [each.name for each in dataclasses.fields(target)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"Unknown key {key!r} in {where}. " + (f"Did you mean {near[0]!r}?" if near else f"Known: {known}")
            )
    if target is DatasetArguments and not isinstance(given.get("path"), str):
        raise ValueError(f"{where} lacks the key 'path'.")
    return target(**given)


@dataclass(frozen=True)
class Layout:
    """How the columns of a kind of data set become a text with words.

    Args:
        columns: where a role is looked for, best first, when the recipe does not say.
        read: (raw row, columns found, arguments, image size) -> (text, words).
    """

    columns: dict[str, tuple[str, ...]]
    read: Callable[[dict[str, Any], dict[str, str], DatasetArguments, tuple[int, int]], tuple[Any, list[dict]]]
    task: str | None = None
    kind: str | None = None
    box_unit: str = "pixels"
    order: str = "given"


_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_path", "file_name", "filepath", "path")
_TEXT_NAMES = ("text", "caption", "txt", "ground_truth", "markdown")
_COMMON = {"license": ("license", "licence"), "id": ("id", "__key__", "uid")}


def _read_columns(raw, columns, arguments, size):
    words = _words(raw, columns, arguments, size) if {"words", "boxes"} <= set(columns) else []
    if "text" in columns:
        return raw[columns["text"]], words
    if not words:
        raise RowRefused("columns: neither text nor words with boxes", f"there are {', '.join(raw)}")
    return lines_of_words(words), words


def _read_caption(raw, columns, arguments, size):
    text = raw[columns["text"]]
    if isinstance(text, bytes):
        text = _utf8(text)
    if columns["text"] == "json":
        if isinstance(text, str):
            text = _json(text)
        if isinstance(text, dict):
            text = next((text[name] for name in ("caption", "text", "captions") if name in text), None)
    if isinstance(text, (list, tuple)) and text:
        text = text[0]  # several captions of one picture: the first
    return text, []


def _read_dialogue(raw, columns, arguments, size):
    turns = raw[columns["text"]]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        raise RowRefused("text: no dialogue", "needs a list of {'from': …, 'value': …}")
    answers = [turn.get("value") for turn in turns if turn["from"] in ("gpt", "assistant")]
    if len(answers) <= arguments.turn:
        raise RowRefused("text: the dialogue has no such answer", f"{len(answers)} answers, turn is {arguments.turn}")
    return answers[arguments.turn], []


def _read_words(raw, columns, arguments, size):
    words = _words(raw, columns, arguments, size)
    return lines_of_words(words), words


def _read_cord(raw, columns, arguments, size):
    """CORD: JSON with `valid_line`: [{`words`: [{`quad`: {x1, y1, … x4, y4}, `text`}]}], in pixels."""
    truth = raw[columns["text"]]
    truth = _json(truth) if isinstance(truth, str) else truth
    try:
        given = [word for line in truth["valid_line"] for word in line["words"]]
        words = [
            {
                "text": word["text"],
                "box": [
                    pick(word["quad"][f"{axis}{corner}"] for corner in range(1, 5))
                    for pick, axis in ((min, "x"), (min, "y"), (max, "x"), (max, "y"))
                ],
            }
            for word in given
        ]
    except (KeyError, TypeError):
        raise RowRefused("words: not as CORD has them", "needs valid_line[].words[] with quad and text") from None
    words = placed_words(words, arguments.box_unit or "pixels", size)
    words = in_lines(words) if arguments.order == "lines" else words
    return lines_of_words(words), words


def _read_beside(raw, columns, arguments, size):
    path = Path(raw[columns["text"]])
    try:
        return path.read_bytes().decode("utf-8-sig"), []
    except FileNotFoundError:
        raise RowRefused("text: no .txt beside the image", path.name) from None
    except UnicodeDecodeError:
        raise RowRefused("text: not UTF-8", path.name) from None


LAYOUTS: dict[str, Layout | None] = {
    # our own columns, as they are
    "schema": None,
    "columns": Layout(
        {
            "image": _IMAGE_NAMES,
            "text": _TEXT_NAMES,
            "words": ("words", "tokens"),
            "boxes": ("bboxes", "boxes", "bbox"),
        },
        _read_columns,
    ),
    "caption-pairs": Layout(
        {"image": _IMAGE_NAMES[1:5] + _IMAGE_NAMES, "text": ("txt", "caption", "text", "captions", "json")},
        _read_caption,
        "caption",
        "natural",
    ),
    "sharegpt4v": Layout(
        {"image": _IMAGE_NAMES, "text": ("conversations", "messages")}, _read_dialogue, "caption", "natural"
    ),
    # On the Hub both have their boxes in thousandths, for LayoutLM; words come in the order of form fields.
    **{
        name: Layout(
            {"image": _IMAGE_NAMES, "words": ("words", "tokens"), "boxes": ("bboxes", "boxes", "bbox")},
            _read_words,
            "ocr",
            "document",
            "thousandths",
            "lines",
        )
        for name in ("funsd", "sroie")
    },
    "cord": Layout(
        {"image": _IMAGE_NAMES, "text": ("ground_truth",)}, _read_cord, "ocr", "document", "pixels", "lines"
    ),
    "folder": Layout({"image": _IMAGE_NAMES, "text": ("text_path", *_TEXT_NAMES)}, _read_columns),
}


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RowRefused("text: not UTF-8") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowRefused("text: not valid JSON", str(error)[:80]) from None


def _words(raw, columns, arguments, size) -> list[dict[str, Any]]:
    texts, boxes = raw[columns["words"]], raw[columns["boxes"]]
    if not isinstance(texts, (list, tuple)) or not isinstance(boxes, (list, tuple)):
        raise RowRefused("words: not lists", f"{type(texts).__name__} and {type(boxes).__name__}")
    if len(texts) != len(boxes):
        raise RowRefused("words: not one box each", f"{len(texts)} words, {len(boxes)} boxes")
    words = [{"text": text, "box": box} for text, box in zip(texts, boxes, strict=True)]
    words = placed_words(words, arguments.box_unit or "pixels", size)
    return in_lines(words) if arguments.order == "lines" else words


def placed_words(words: list[dict[str, Any]], unit: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Words with boxes in whole pixels, cut at the image's edges; without those that have no letter."""
    scale = BOX_UNITS[unit]
    width, height = size
    factor = (1.0, 1.0, 1.0, 1.0) if scale is None else tuple(side / scale for side in (width, height) * 2)
    out = []
    for word in words:
        text, box = word["text"], word["box"]
        if not isinstance(text, str):
            raise RowRefused("words: not strings", type(text).__name__)
        try:
            x0, y0, x1, y1 = (float(edge) * part for edge, part in zip(box, factor, strict=True))
        except (TypeError, ValueError):
            raise RowRefused("words: a box is not 4 numbers", repr(box)[:60]) from None
        if not (x0 <= x1 and y0 <= y1):  # not a number, too
            raise RowRefused("words: a box is inside out", repr(box)[:60])
        # a pixel or two of rounding is common; further out, the unit is wrong
        slack = 2 + 0.01 * max(size)
        if min(x0, y0) < -slack or x1 > width + slack or y1 > height + slack:
            raise RowRefused("words: a box lies beyond the image", f"{list(box)!r:.60} in {width}x{height} ({unit})")
        if text.strip():
            low = (min(max(int(x0), 0), width), min(max(int(y0), 0), height))
            high = (min(int(np.ceil(x1)), width), min(int(np.ceil(y1)), height))
            out.append({"text": text.strip(), "box": [*low, max(high[0], low[0]), max(high[1], low[1])]})
    return out


def in_lines(words: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Words in reading order by their boxes: lines from top to bottom, each from left to right.

    A word goes on the line whose last word is nearest in height, if their middles are at most half of the smaller
    word's height apart: lines of a tilted scan stay whole. Columns of text are not looked for: forms and receipts are
    read across.
    """
    lines: list[list[dict[str, Any]]] = []
    for word in sorted(words, key=lambda word: (word["box"][0], word["box"][1])):
        x0, y0, _, y1 = word["box"]
        best, least = None, None
        for line in lines:
            _, top, right, bottom = line[-1]["box"]
            apart = abs((y0 + y1) - (top + bottom)) / 2
            if (
                apart * 2 <= min(y1 - y0, bottom - top)
                and right <= x0 + (y1 - y0)
                and (least is None or apart < least)
            ):
                best, least = line, apart
        if best is None:
            lines.append([word])
        else:
            best.append(word)
    lines.sort(key=lambda line: np.mean([word["box"][1] + word["box"][3] for word in line]))
    for number, line in enumerate(lines):
        for word in line:
            word["line"] = number
    return [word for line in lines for word in line]


def lines_of_words(words: list[dict[str, Any]]) -> str:
    """The text of words: a blank between two, a new line where `in_lines` begins one."""
    text, last = [], 0
    for place, word in enumerate(words):
        line = word.get("line", 0)
        text.append(("" if not place else "\n" if line != last else " ") + word["text"])
        last = line
    return "".join(text)


class MappedRows:
    """Rows of the schema, made as they are asked for from the rows of a data set.

    Iterating counts what is skipped in `refusals`. For sharding, shuffling and resuming, work on `dataset` (a
    `datasets.Dataset` or `IterableDataset` whose images are not decoded) and pass it, or any iterable of its rows, to
    `over`; or map one row with `row`.

    Args:
        verify: decode every image once, so that damage is found here. Without, only its header is read.
        text_fits: whether the language decoder has positions enough for a text.
    """

    def __init__(
        self,
        dataset,
        arguments: DatasetArguments,
        refusals: Refusals | None = None,
        verify: bool = True,
        text_fits: Callable[[str], bool] | None = None,
        base: Path | None = None,
    ):
        self.refusals = Refusals() if refusals is None else refusals
        self.verify, self.text_fits = verify, text_fits
        self.name = arguments.path
        self.split = "train" if arguments.split.lower().startswith("train") else "validation"
        self.base = Path(arguments.images) if arguments.images else base
        dataset, names = _undecoded(dataset)
        self.dataset = dataset
        layout = arguments.layout
        if layout == "auto":
            ours = set(REQUIRED) <= set(names) and not arguments.columns
            layout = "schema" if ours else "folder" if "text_path" in names else "columns"
        self.layout = layout
        found = LAYOUTS[layout]
        if found is None:
            missing = set(REQUIRED) - set(names)
            if missing:
                raise ValueError(
                    f"{self.name}: not in the schema, it lacks {', '.join(sorted(missing))}. {_advice(names)}"
                )
            self.columns = {}
        else:
            wanted = {**_COMMON, **found.columns}
            self.columns = {
                role: next(name for name in candidates if name in names)
                for role, candidates in wanted.items()
                if any(name in names for name in candidates)
            }
            for role, name in arguments.columns.items():
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"{self.name}: no column {name!r} ({role}); there are {', '.join(names)}.{hint}")
                self.columns[role] = name
            needed = set(found.columns) - ({"text", "words", "boxes"} if found.read is _read_columns else set())
            if found.read is _read_columns and not ("text" in self.columns or {"words", "boxes"} <= set(self.columns)):
                needed |= {"text"}
            lacking = needed - set(self.columns)
            if lacking:
                raise ValueError(
                    f"{self.name}: the layout {layout!r} needs {' and '.join(sorted(lacking))}. {_advice(names)}"
                )
            arguments = dataclasses.replace(
                arguments,
                task=arguments.task or found.task,
                kind=arguments.kind or found.kind,
                box_unit=arguments.box_unit or found.box_unit,
                order=arguments.order or found.order,
            )
            if arguments.task is None or arguments.kind is None:
                raise ValueError(
                    f"{self.name}: say what its rows are: task ({', '.join(TASKS)}) and kind ({', '.join(KINDS)})"
                )
        self.arguments = arguments

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.over(self.dataset)

    def over(self, raws) -> Iterator[dict[str, Any]]:
        """Rows of the schema from rows of the data set; what cannot be used is counted and skipped.

        A file of a streamed data set that cannot be read is counted as one refusal; reading goes on with the next.
        """
        from datasets import IterableDataset

        shards = raws.num_shards if isinstance(raws, IterableDataset) else 0
        for part in [raws] if shards < 2 else (raws.shard(shards, index, contiguous=True) for index in range(shards)):
            rows = iter(part)
            while True:
                try:
                    raw = next(rows)
                except StopIteration:
                    break
                except (OSError, ValueError, EOFError) as error:
                    if shards < 1:
                        raise
                    first = str(error).strip().splitlines() or [type(error).__name__]
                    self.refusals.add(self.name, "shard: cannot be read to its end", first[0])
                    break
                try:
                    row = self.row(raw)
                except RowRefused as refused:
                    where = self.where(raw)
                    self.refusals.add(
                        self.name, refused.reason, f"{where}: {refused.detail}" if where else refused.detail
                    )
                    continue
                if row is not None:
                    self.refusals.accept(self.name)
                    yield row

    def row(self, raw: dict[str, Any]) -> dict[str, Any] | None:
        """One row of the schema, or None when the filter does not want it.

        Raises:
            RowRefused: it cannot be used, and why.
        """
        arguments = self.arguments
        if not arguments.filter.wants_columns(raw):
            return None
        if self.layout == "schema":
            return self._own(raw)
        content = _image_bytes(raw[self.columns["image"]], self.base)
        content, size = checked_image(content, self.verify)
        text, words = (LAYOUTS[self.layout].read if "text_path" not in raw else _read_beside)(
            raw, self.columns, arguments, size
        )
        self._check_text(text, arguments.task, blank=False)
        text = text.strip()
        if not arguments.filter.wants(size, text):
            return None
        license = raw.get(self.columns.get("license", ""))
        row = make_row(
            content,
            text,
            task=arguments.task,
            kind=arguments.kind,
            source=f"{self.name}#{self.where(raw) or hashlib.blake2b(content, digest_size=6).hexdigest()}",
            license=arguments.license or (license if isinstance(license, str) and license else "unknown"),
            split=self.split,
            words=words,
        )
        try:
            validate_row(row, decode=False)
        except ValueError as error:
            raise RowRefused("schema: violated", str(error)) from None
        return row

    def _own(self, raw: dict[str, Any]) -> dict[str, Any] | None:
        image = raw["image"]
        if isinstance(image, dict) and not image.get("bytes") and image.get("path"):
            raw = raw | {"image": {"bytes": _image_bytes(image, self.base), "path": None}}
        try:
            validate_row(raw, decode=False)
        except ValueError as error:
            # the problem without the row's own name, so that rows of one problem are counted together
            message = str(error)
            start = f"row from {raw.get('source')!r}: "
            problem = message[len(start) :] if message.startswith(start) else message
            raise RowRefused(f"schema: {problem.split(',')[0].split(' not ')[0][:80]}", problem) from None
        content, size = checked_image(raw["image"]["bytes"], self.verify)
        if content is not raw["image"]["bytes"]:
            raw = raw | {"image": {"bytes": content, "path": None}}
        for word in raw.get("words") or ():
            if word["box"][2] > size[0] or word["box"][3] > size[1]:
                raise RowRefused("schema: words reach beyond the image", f"{word['box']} in {size[0]}x{size[1]}")
        boxes = np.asarray(raw.get("char_boxes") or [], dtype=np.int64).reshape(-1, 4)
        if boxes.size and (boxes[:, 2].max() > size[0] or boxes[:, 3].max() > size[1]):
            raise RowRefused("schema: char_boxes reach beyond the image", f"{size[0]}x{size[1]}")
        self._check_text(raw["text"], raw["task"], blank=raw["task"] == "ocr")
        return raw if self.arguments.filter.wants(size, raw["text"]) else None

    def _check_text(self, text: Any, task: str, blank: bool) -> None:
        if not isinstance(text, str):
            raise RowRefused("text: not a string", type(text).__name__)
        if not text.strip() and not blank:
            raise RowRefused("text: empty", f"{task} needs one")
        if self.text_fits is not None and not self.text_fits(text):
            raise RowRefused("text: longer than the decoder's positions", f"{len(text)} characters")

    def where(self, raw: dict[str, Any]) -> str:
        """What names a row: its id, the name of its image, or its source."""
        for name in (self.columns.get("id", "source"), "image_path"):
            if isinstance(raw.get(name), (str, int)) and str(raw[name]):
                return str(raw[name])
        image = raw.get(self.columns.get("image", "image"))
        path = image.get("path") if isinstance(image, dict) else image
        return Path(path).name if isinstance(path, str) else ""


def _advice(names: list[str]) -> str:
    return (
        f"Its columns are {', '.join(names)}: name those to use as columns: {{image: …, text: …}}, "
        "or give a layout (docs/data.md)"
    )


def _image_bytes(image: Any, base: Path | None) -> bytes:
    """The file of an image given as ``{bytes, path}``, bytes, or a path below ``base``."""
    if isinstance(image, Image.Image):
        return png_bytes(np.asarray(image.convert("RGB")))
    if isinstance(image, dict):
        if image.get("bytes"):
            return image["bytes"]
        path = image.get("path")
        if isinstance(path, str) and path:
            from datasets.utils.file_utils import xopen

            try:  # named by `datasets` itself: a file it found, perhaps inside an archive or on the Hub
                with xopen(path, "rb") as file:
                    return file.read()
            except OSError as error:
                raise RowRefused("image: cannot be read", str(error)) from None
        raise RowRefused("image: missing")
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if image is None or image == "":
        raise RowRefused("image: missing")
    if not isinstance(image, str):
        raise RowRefused("image: neither a file nor a path", type(image).__name__)
    if "://" in image:
        raise RowRefused("image: an address, not a file", "fetch the pictures first, for example with img2dataset")
    if base is None:
        raise RowRefused("image: a path, and no folder", "say in the recipe which with `images`")
    root = base.resolve()
    path = (root / image).resolve()
    if not path.is_relative_to(root):
        raise RowRefused("image: outside its folder", image)
    try:
        return path.read_bytes()
    except OSError as error:
        raise RowRefused("image: missing" if not path.exists() else "image: cannot be read", str(error)) from None


def checked_image(content: bytes, verify: bool = True) -> tuple[bytes, tuple[int, int]]:
    """An image's file as the schema wants it and its (width, height).

    PNG, JPEG and WebP that stand upright are kept byte for byte; other formats, CMYK, and images with an EXIF rotation
    become PNG. With ``verify`` the image is decoded to its end.

    Raises:
        RowRefused: no image, truncated, damaged, or of more than `MAX_PIXELS`.
    """
    if not content:
        raise RowRefused("image: empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is MAX_PIXELS
            picture = Image.open(io.BytesIO(content))
            with picture:
                size = picture.size
                if size[0] * size[1] > MAX_PIXELS:
                    raise RowRefused("image: too many pixels", f"{size[0]}x{size[1]}")
                upright = picture.getexif().get(0x0112, 1) == 1
                usable = picture.format in IMAGE_FORMATS and picture.mode not in ("CMYK", "YCCK", "I;16", "I")
                if usable and upright and getattr(picture, "n_frames", 1) == 1:
                    if verify:
                        # an eighth of the size: all of the file is read, for a fraction of the time
                        if picture.format == "JPEG":
                            picture.draft(picture.mode, (max(1, size[0] // 8), max(1, size[1] // 8)))
                        picture.load()
                    return content, size
        whole = open_image(content, MAX_PIXELS, "image")
        return png_bytes(np.asarray(whole)), whole.size
    except RowRefused:
        raise
    except Image.DecompressionBombError as error:
        raise RowRefused("image: too many pixels", str(error)) from None
    except Image.UnidentifiedImageError:
        raise RowRefused("image: not an image that can be read", f"begins with {content[:8]!r}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of broken data raise what they like
        text = str(error) or type(error).__name__
        cut = "truncated" in text or isinstance(error, EOFError)
        detail = text if not isinstance(error, UnreadableInput) else text.partition(": ")[2]
        raise RowRefused("image: truncated" if cut else "image: damaged", detail) from None


def _undecoded(dataset):
    """The data set with the files of its images in place of pixels, and its columns' names."""
    from datasets import Image as ImageFeature
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset) and dataset.features is None:
        dataset = dataset._resolve_features()
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset, list(dataset.column_names or [])


def read_source(
    source: Any,
    *,
    streaming: bool = False,
    refusals: Refusals | None = None,
    verify: bool = True,
    text_fits: Callable[[str], bool] | None = None,
) -> MappedRows:
    """The rows of a source in the schema.

    Args:
        source: `DatasetArguments`; a mapping of its keys; a source of a recipe (an object with such a mapping under
            `dataset`, or with a `path`); or a path alone.
        streaming: read as it comes, nothing is written to disk; else `datasets` prepares it in its cache first.
        refusals: counts what is skipped, under the source's path.
        verify, text_fits: see `MappedRows`.

    Raises:
        ValueError: no such data set, split or column; a format that is not read; settings out of range.
    """
    arguments = DatasetArguments.of(source)
    refusals = Refusals() if refusals is None else refusals
    dataset, base = _load(arguments, streaming, refusals)
    return MappedRows(dataset, arguments, refusals, verify, text_fits, base)


def _load(arguments: DatasetArguments, streaming: bool, refusals: Refusals):
    path = Path(arguments.path).expanduser()
    if not path.exists() and not glob.has_magic(arguments.path) and data_folder(arguments.path).is_dir():
        path = data_folder(arguments.path)
    if path.is_dir():
        if arguments.data_files:
            given = arguments.data_files if isinstance(arguments.data_files, list) else [arguments.data_files]
            files = [file for pattern in given for file in sorted(path.glob(str(pattern)))]
        else:
            files = None
        return _load_folder(path, files, arguments, streaming, refusals), path
    if path.is_file():
        return _load_files([path], arguments, streaming, refusals), path.parent
    if glob.has_magic(arguments.path):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise ValueError(f"no file matches {arguments.path}")
        return _load_files(files, arguments, streaming, refusals), files[0].parent
    if not HUB_ID.match(arguments.path):
        raise ValueError(f"there is no folder or file {arguments.path}, no such set in the cache, and it is no Hub id")
    return _load_hub(arguments, streaming), None


def _load_folder(folder: Path, files: list[Path] | None, arguments: DatasetArguments, streaming: bool, refusals):
    if files is not None:
        if not files:
            raise ValueError(f"no file of {folder} matches data_files {arguments.data_files!r}")
        return _load_files(files, arguments, streaming, refusals)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        from datasets import load_from_disk

        dataset = load_from_disk(str(folder))
        return dataset.to_iterable_dataset(num_shards=len(list(folder.glob("*.arrow"))) or 1) if streaming else dataset
    if arguments.layout != "folder" and arguments.format != "imagefolder":
        for suffixes in ((".parquet",), (".tar",), (".jsonl", ".json"), (".csv", ".tsv")):
            found = [
                file
                for file in sorted(folder.iterdir())
                if file.suffix in suffixes
                and file.name not in _OUR_JSON
                and not file.name.startswith((".", "metadata."))
            ]
            if found:
                return _load_files(found, arguments, streaming, refusals)
    if (folder / arguments.split).is_dir():
        folder = folder / arguments.split
    if any((folder / f"metadata.{suffix}").is_file() for suffix in ("csv", "jsonl", "parquet")):
        # by its files, or a folder without splits in its names would be all `train`
        settings = {"data_files": {arguments.split: [f"{folder}/**"]}}
        return _call_datasets("imagefolder", settings, arguments, streaming)
    images = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if images:
        from datasets import Dataset

        names = [image.relative_to(folder).as_posix() for image in images]
        texts = [str(image.with_suffix(".txt")) for image in images]
        dataset = Dataset.from_dict({"image_path": names, "text_path": texts})
        return dataset.to_iterable_dataset(num_shards=min(64, len(names))) if streaming else dataset
    return _call_datasets(str(folder), {"name": arguments.name}, arguments, streaming)


_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_BUILDERS |= {".tsv": "tsv", ".arrow": "arrow"}


def _load_files(files: list[Path], arguments: DatasetArguments, streaming: bool, refusals: Refusals):
    named = {file: SPLIT_NAME.match(file.name) for file in files}
    if all(named.values()) and len({_split_of(match[1]) for match in named.values()}) > 1:
        wanted = _split_of(arguments.split)
        chosen = [file for file, match in named.items() if _split_of(match[1]) == wanted]
        if not chosen:
            raise ValueError(
                f"{arguments.path} has no split {arguments.split!r}: {', '.join(f.name for f in files[:6])}"
            )
        files = chosen
    builder = arguments.format
    if builder == "auto":
        builders = {_BUILDERS.get(file.suffix.lower()) for file in files}
        if len(builders) != 1 or None in builders:
            names = ", ".join(file.name for file in files[:6])
            raise ValueError(f"{arguments.path}: cannot tell the format of {names}: give one of {', '.join(FORMATS)}")
        (builder,) = builders
    if builder == "parquet":
        files = whole_parquet(files, arguments.path, refusals)
    settings: dict[str, Any] = {"data_files": {arguments.split: [str(file) for file in files]}}
    if builder == "tsv":
        return _tsv(files, arguments, streaming, refusals)
    return _call_datasets(builder, settings, arguments, streaming)


def _split_of(name: str) -> str:
    name = name.lower()
    return "validation" if name in ("valid", "val", "dev") else name


def whole_parquet(files: list[Path], name: str, refusals: Refusals) -> list[Path]:
    """The files of the set `name` whose end is there, so that one broken shard is not the end of all.

    Raises:
        ValueError: there is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = []
    for file in files:
        try:
            pq.ParquetFile(file).close()
            whole.append(file)
        except (pa.ArrowException, OSError) as error:
            refusals.add(name, "shard: cannot be read", f"{file.name}: {error}")
    if not whole:
        raise ValueError(f"{name}: none of its {len(files)} parquet files can be read")
    return whole


def _tsv(files: list[Path], arguments: DatasetArguments, streaming: bool, refusals: Refusals):
    """Lines of fields between tabs, nothing quoted: a quotation mark in a caption is one."""
    from datasets import Dataset, Features, IterableDataset, Value

    names = list(arguments.column_names)
    with files[0].open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().rstrip("\r\n").split("\t")
    if not names:
        names = header
        if not set(names) & {*_IMAGE_NAMES, *_TEXT_NAMES, *arguments.columns.values()}:
            raise ValueError(f"{files[0]}: its first line names no columns; give column_names: [caption, image]")
    settings = {
        "features": Features(dict.fromkeys(names, Value("string"))),
        "gen_kwargs": {
            "files": [str(file) for file in files],
            "names": tuple(names),
            # a changed file is another data set to the cache of `datasets`
            "versions": tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files),
        },
    }
    return (IterableDataset if streaming else Dataset).from_generator(_tsv_rows, **settings)


def _tsv_rows(files, names, versions):
    for path in files:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file):
                fields = line.rstrip("\r\n").split("\t")
                if tuple(fields) == tuple(names) and number == 0:
                    continue
                # a line with fields missing has nulls, which are refused by name where they are needed
                yield dict(zip(names, [*fields, *[None] * len(names)][: len(names)], strict=True))


def _load_hub(arguments: DatasetArguments, streaming: bool):
    settings: dict[str, Any] = {"name": arguments.name, "revision": arguments.revision}
    builder = arguments.path
    if arguments.data_files:
        settings["data_files"] = {arguments.split: arguments.data_files}
    if arguments.format not in ("auto", "tsv"):
        at = f"@{arguments.revision}" if arguments.revision else ""
        files = arguments.data_files if isinstance(arguments.data_files, list) else [arguments.data_files or "**"]
        settings = {"data_files": {arguments.split: [f"hf://datasets/{builder}{at}/{file}" for file in files]}}
        builder = arguments.format
    return _call_datasets(builder, settings, arguments, streaming)


def _call_datasets(builder: str, settings: dict[str, Any], arguments: DatasetArguments, streaming: bool):
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        kind = type(load_dataset_builder(builder, **settings)).__module__
        if kind.rpartition(".")[2] not in ("parquet", "arrow", "json", "csv", "imagefolder", "webdataset"):
            raise ValueError(f"{arguments.path}: its format {kind.rpartition('.')[2]!r} is not read here")
        return load_dataset(builder, split=arguments.split, streaming=streaming, **settings)
    except DatasetNotFoundError as error:
        raise ValueError(
            f"there is no folder {arguments.path}, no such set in the cache, and the Hub has none: {error}"
        ) from None
    except DatasetGenerationError as error:
        raise ValueError(f"{arguments.path}: cannot be read as {builder}: {error.__cause__ or error}") from error
