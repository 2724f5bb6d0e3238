"""Real scans with their text: the pages of the ISRI test data that the Debian source package tesseract carries.

Two pages of magazines at 300 dpi (University of Nevada, Las Vegas), with the text of each and the zones that it was
taken from, in order. ``phototest``, nine lines in one size of type, comes with them. Left out are the "grey" scan of
one of the pages, which has two values and the same pixels, and ``eurotext``, which mixes six languages.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .pdf import Report
from .schema import make_row, write_shards
from .sources import fetch_deb_source
from .text import normalize_text, words

PACKAGE = "tesseract"
LICENSE = "ISRI test data, as in the Debian source package tesseract (Apache-2.0)"
PAGES = ("8071_093.3B", "8087_054.3B")
PHOTOTEST = "phototest"
SPACED = re.compile(r"(?<!\S)\S(?: \S){3,}(?!\S)")
ZONE_WORDS = 15  # that a zone must have to be a block
MARGIN = 8  # px of paper put around a zone: the next may begin where it ends


@dataclass(frozen=True)
class Zone:
    """A part of a page that is read by itself: pixels of the scan, and its text."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1
    text: str


def build_scans(out: str | Path, blocks: bool = False) -> Report:
    """Whole pages, or with ``blocks`` their zones of `ZONE_WORDS` words or more, as rows in ``out``.

    Raises:
        RuntimeError: the package cannot be fetched, or is not what it was.
    """
    begin = time.perf_counter()
    folder = test_data()
    report = Report(rows=write_shards(_blocks(folder) if blocks else _pages(folder), out))
    report.seconds = time.perf_counter() - begin
    report.save(Path(out), package=PACKAGE, unit="zone" if blocks else "page", split="validation")
    return report


def test_data() -> Path:
    """The folder ``testing`` of the package."""
    found = sorted(fetch_deb_source(PACKAGE).glob("*orig-test/testing"))
    if not found:
        raise RuntimeError(f"the source of the Debian package {PACKAGE} has no test data any more")
    return found[0]


def _pages(folder: Path) -> Iterator[dict[str, Any]]:
    for name in PAGES:
        text = "\n".join(zone.text for zone in read_zones(folder, name))
        yield _row(read_scan(folder / f"{name}.tif"), text, f"{name}.tif#1")
    text = clean_text((folder / f"{PHOTOTEST}.gold.txt").read_text(encoding="utf-8"))
    yield _row(read_scan(folder / f"{PHOTOTEST}.tif"), text, f"{PHOTOTEST}.tif#1")


def _blocks(folder: Path) -> Iterator[dict[str, Any]]:
    for name in PAGES:
        pixels = read_scan(folder / f"{name}.tif")
        for number, zone in enumerate(read_zones(folder, name), 1):
            if len(words(zone.text)) >= ZONE_WORDS:
                x0, y0, x1, y1 = zone.box
                part = np.pad(pixels[y0:y1, x0:x1], MARGIN, constant_values=255)
                yield _row(part, zone.text, f"{name}.tif#{number}")


def _row(pixels: np.ndarray, text: str, source: str) -> dict[str, Any]:
    return make_row(
        pixels,
        text,
        task="ocr",
        kind="document",
        source=f"{PACKAGE}/{source}",
        license=LICENSE,
        split="validation",
    )


def read_scan(path: Path) -> np.ndarray:
    """(H, W) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def read_zones(folder: Path, name: str) -> list[Zone]:
    """The zones of a page in the order of its text, which parts them by two empty lines.

    Raises:
        RuntimeError: there are not as many parts of the text as zones.
    """
    text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    parts = [part for part in re.split(r"\n\s*\n\s*\n", text) if part.strip()]
    lines = [line.split() for line in (folder / f"{name}.uzn").read_text(encoding="utf-8").splitlines()]
    boxes = [tuple(map(int, line[:4])) for line in lines if line]
    if len(parts) != len(boxes):
        raise RuntimeError(f"{name}: {len(parts)} parts of the text, but {len(boxes)} zones")
    return [
        Zone((x, y, x + width, y + height), clean_text(part))
        for part, (x, y, width, height) in zip(parts, boxes, strict=True)
    ]


def clean_text(text: str) -> str:
    """The text as it is compared: without the ``~`` that stand for a sign that could not be typed, and with words that
    are typed letter by letter as they are spaced on the page put together.

    >>> clean_text("54 ~ T R A V E L  G U I D E\n\nCaf~~")
    '54 TRAVEL GUIDE\nCaf'
    """
    text = SPACED.sub(lambda word: word[0].replace(" ", ""), text.replace("~", ""))
    lines = normalize_text(text).split("\n")
    return "\n".join(line for line in lines if line)
