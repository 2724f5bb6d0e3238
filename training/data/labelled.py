"""Scanned documents with their text, as others publish them -> rows of the schema, split ``validation``.

Five layouts are read from a folder, told apart by what is in it (`layout_of`):

==========  =========================================================================================================
funsd       ``testing_data/images/*.png`` and ``testing_data/annotations/*.json``: ``form[].words[]`` with ``text`` and
            ``box``, 4 pixels
sroie       ``img/*.jpg`` and ``box/*.csv`` (or .txt), a line of text a line: 8 pixels of the corners, then the text,
            commas and all
cord        ``image/*.png`` and ``json/*.json``: ``valid_line[].words[]`` with ``text`` and ``quad``
beside      images, each with a ``.txt`` of the same name
parquet     ours, or the columns that these sets have on the Hub
==========  =========================================================================================================

A folder that has a test part (``test``, ``testing_data``) is read there and nowhere else. Words are put into lines by
their boxes (`mapping.in_lines`): those sets list them by field of the form.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .mapping import (
    HUB_ID,
    IMAGE_SUFFIXES,
    LAYOUTS,
    DatasetArguments,
    RowRefused,
    checked_image,
    in_lines,
    lines_of_words,
    placed_words,
    read_source,
)
from .pdf import Report
from .refusals import Refusals
from .schema import REQUIRED, make_row, write_shards

# On the Hub, with parquet files and no code of their own; the layout is `mapping.LAYOUTS`'.
HUB = {"funsd": "mp-02/funsd", "sroie": "mp-02/sroie", "cord": "naver-clova-ix/cord-v2"}
LICENSES = {
    "funsd": "FUNSD: non-commercial, research and education",
    "sroie": "ICDAR 2019 SROIE: CC BY 4.0",
    "cord": "CORD: CC BY 4.0",
}
TEST_FOLDERS = ("testing_data", "dataset/testing_data", "test")
TRAIN_FOLDERS = ("training_data", "dataset/training_data", "train")
BOX_LINE = re.compile(r"\s*((?:-?\d+\s*,\s*){8})(.*\S)\s*$")
ANY_SIZE = (1 << 20, 1 << 20)  # of an image that cannot be decoded
MAX_REFUSED = 0.05


@dataclass(frozen=True)
class _Found:
    """An image file and where its text is."""

    image: Path
    truth: Path


def build_labelled(name: str, out: str | Path, source: str | None = None, progress: bool = True) -> Report:
    """The test part of a labelled set as rows of ours in ``out``.

    Args:
        name: ``funsd``, ``sroie`` or ``cord``, or any other for a folder of one's own.
        out: folder for the shards and ``report.json``.
        source: a folder in one of the layouts above, or the id of a set on the Hub with parquet files; None for the
            one in `HUB`.

    Raises:
        ValueError: no such source, no layout that is known, no row, or more than `MAX_REFUSED` of them broken.
    """
    from tqdm import tqdm

    if source is None and name not in HUB:
        raise ValueError(f"{name}: say where it is, {name}=FOLDER or {name}=OWNER/NAME on the Hub")
    source = source or HUB[name]
    begin = time.perf_counter()
    refusals = Refusals(MAX_REFUSED)
    folder = Path(source).expanduser()
    if folder.is_dir():
        rows = rows_of_folder(folder, refusals, name)
    elif HUB_ID.match(source) and "/" in source:
        rows = rows_of_hub(name, source, refusals)
    else:
        raise ValueError(f"{name}: there is no folder {source}, and that is no data set's id on the Hub")
    rows = tqdm(rows, unit="page", desc=name, disable=not progress)
    report = Report(rows=write_shards(_checked(rows, name, source, refusals), out, rows_per_shard=200))
    report.seconds = time.perf_counter() - begin
    report.save(Path(out), name=name, source=source, split="validation", refused=refusals.as_dict())
    return report


def _checked(rows, name: str, source: str, refusals: Refusals) -> Iterator[dict[str, Any]]:
    found = 0
    for row in rows:
        found += 1
        yield row
    refusals.check()
    if not found:
        raise ValueError(f"{name}: {source} gave no page. {refusals}".strip())


def rows_of_hub(name: str, source: str, refusals: Refusals) -> Iterator[dict[str, Any]]:
    """The test split of a set on the Hub; no code of its repository is run."""
    yield from _mapped({"path": source, "split": "test"}, name, name if name in HUB else "auto", refusals)


def rows_of_folder(
    folder: Path, refusals: Refusals, name: str = "", limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a folder in one of the layouts of this module. An image that cannot be decoded is kept as it is: whoever
    reads the row finds out; a truth that cannot be read is counted in ``refusals``.

    Args:
        folder: the set, or its test part.
        refusals: counts what is skipped.
        name: begins the rows' sources; that of the folder when empty.
        limit: at most so many files, spread evenly.

    Raises:
        ValueError: it is in no layout that is known, or has no test part.
    """
    layout, root = layout_of(folder)
    name = name or folder.name
    if layout == "parquet":
        yield from _rows_of_parquet(root, refusals, name)
        return
    files = list(_files(layout, root))
    if limit is not None and limit < len(files):
        files = [files[len(files) * step // limit] for step in range(limit)]
    for found in files:
        where = f"{name}/{found.image.name}"
        content, size = _image(found.image)
        try:
            text, boxes = _READERS[layout](found.truth, size)
        except RowRefused as refused:
            refusals.add(name, refused.reason, f"{where}: {refused.detail}")
            continue
        refusals.accept(name)
        yield make_row(
            content,
            text,
            task="ocr",
            kind="document",
            words=boxes if size else None,
            source=where,
            license=LICENSES.get(layout, "as the folder"),
            split="validation",
        )


def layout_of(folder: Path) -> tuple[str, Path]:
    """Name of the layout of ``folder``, and the folder that holds its test part.

    Raises:
        ValueError: it is none that is known (the line says what was looked for), or only the training part is there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    tests = [folder / part for part in TEST_FOLDERS if (folder / part).is_dir()]
    if not tests and any((folder / part).is_dir() for part in TRAIN_FOLDERS):
        raise ValueError(f"{folder}: there is a training part, but none of {', '.join(TEST_FOLDERS)}")
    for root in tests or [folder]:
        for layout, (images, truths, suffixes) in _FOLDERS.items():
            there = (root / images).is_dir() and (root / truths).is_dir()
            if there and any(path.suffix.lower() in suffixes for path in (root / truths).iterdir()):
                return layout, root
        if _parquet_files(root):
            return "parquet", root
        if next(_files("beside", root), None):
            return "beside", root
    known = "; ".join(f"{images}/ and {truths}/ ({layout})" for layout, (images, truths, _) in _FOLDERS.items())
    raise ValueError(f"{folder}: no layout that is known: {known}; images beside .txt files; *.parquet")


# layout -> folder of images, folder of truths, suffixes of the latter
_FOLDERS = {
    "funsd": ("images", "annotations", (".json",)),
    "sroie": ("img", "box", (".csv", ".txt")),
    "cord": ("image", "json", (".json",)),
}


def _parquet_files(root: Path) -> list[Path]:
    return sorted((*root.glob("*.parquet"), *root.glob("data/*.parquet")))


def _files(layout: str, root: Path) -> Iterator[_Found]:
    """Images that have a truth, in the order of their names."""
    if layout == "beside":
        for image in sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
            if image.with_suffix(".txt").is_file():
                yield _Found(image, image.with_suffix(".txt"))
        return
    images, truths, suffixes = _FOLDERS[layout]
    by_stem = {path.stem: path for path in sorted((root / truths).iterdir()) if path.suffix.lower() in suffixes}
    for image in sorted((root / images).iterdir()):
        if image.suffix.lower() in IMAGE_SUFFIXES and image.stem in by_stem:
            yield _Found(image, by_stem[image.stem])


def _image(path: Path) -> tuple[bytes, tuple[int, int] | None]:
    """An image file in a format of the schema and its size; None for the size of what cannot be decoded."""
    content = path.read_bytes()
    try:
        return checked_image(content)
    except RowRefused:
        return content or b"\0", None  # a row must hold something


def _truth(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RowRefused("text: not UTF-8", path.name) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_truth(path))
    except (ValueError, RecursionError) as error:
        raise RowRefused("text: not valid JSON", f"{path.name}: {error}"[:80]) from None


Placed = tuple[str, list[dict[str, Any]]]  # the text, and its words with their boxes


def _in_order(words: list[dict[str, Any]], size: tuple[int, int] | None) -> Placed:
    placed = in_lines(placed_words(words, "pixels", size or ANY_SIZE))
    return lines_of_words(placed), placed


def _read_funsd(path: Path, size: tuple[int, int] | None) -> Placed:
    try:
        words = [
            {"text": word["text"], "box": word["box"]} for field in _json(path)["form"] for word in field["words"]
        ]
    except (KeyError, TypeError):
        raise RowRefused("words: not as FUNSD has them", "needs form[].words[] with text and box") from None
    return _in_order(words, size)


def _read_cord(path: Path, size: tuple[int, int] | None) -> Placed:
    arguments = DatasetArguments(path=str(path), layout="cord", box_unit="pixels", order="lines")
    return LAYOUTS["cord"].read({"truth": _json(path)}, {"text": "truth"}, arguments, size or ANY_SIZE)


def _read_sroie(path: Path, size: tuple[int, int] | None) -> Placed:
    """Lines of a receipt; the text of a line begins after the eighth comma and may hold some itself."""
    words = []
    for number, line in enumerate(_truth(path).splitlines(), 1):
        if not line.strip():
            continue
        found = BOX_LINE.match(line)
        if not found:
            raise RowRefused("words: not as SROIE has them", f"{path.name}:{number}: {line[:40]}")
        corners = [int(corner) for corner in found[1].split(",")[:8]]
        x, y = corners[0::2], corners[1::2]
        words.append({"text": found[2], "box": [min(x), min(y), max(x), max(y)]})
    return _in_order(words, size)


def _read_beside(path: Path, size: tuple[int, int] | None) -> Placed:
    text = _truth(path).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and all(map(BOX_LINE.match, lines)):  # SROIE as its organisers give it
        return _read_sroie(path, size)
    return text, []


_READERS = {"funsd": _read_funsd, "sroie": _read_sroie, "cord": _read_cord, "beside": _read_beside}


def _rows_of_parquet(root: Path, refusals: Refusals, name: str) -> Iterator[dict[str, Any]]:
    """Parquet files of our schema, or of the Hub's copy of a set; of several splits the test one."""
    import pyarrow.parquet as pq

    files = _parquet_files(root)
    tests = [path for path in files if re.match(r"(?i)test", path.name)]
    if not tests and any(re.match(r"(?i)train", path.name) for path in files):
        raise ValueError(f"{root}: there are files of a training split, but none whose name begins with 'test'")
    files = tests or files
    names = set(pq.read_schema(files[0]).names)
    layout = "auto"
    if not set(REQUIRED) <= names:
        layout = (
            name if name in HUB else "cord" if "ground_truth" in names else "funsd" if "bboxes" in names else layout
        )
    patterns = [path.relative_to(root).as_posix() for path in files]
    yield from _mapped({"path": str(root), "data_files": patterns, "split": "test"}, name, layout, refusals)


def _mapped(source: dict[str, Any], name: str, layout: str, refusals: Refusals) -> Iterator[dict[str, Any]]:
    settings = {**source, "layout": layout}
    if layout in LICENSES:
        settings["license"] = LICENSES[layout]
    rows = read_source(settings, streaming=True, refusals=refusals)
    for number, row in enumerate(rows):
        if row["split"] != "validation":
            continue
        if rows.layout != "schema":
            row["source"] = f"{name}/{row['source'].rpartition('#')[2] or number}"
        yield row
