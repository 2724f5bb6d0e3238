"""A sheet of sample rows: each image with the boxes of its words drawn faintly, and what its target says below."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modeling_unit.image_processing_unit import to_rgb

from .schema import words_from_char_boxes

PAPER, INK, GREY, FRAME = "#ffffff", "#1b1b1f", "#6b7078", "#d5d8dd"
BOX, BOX_FILL = (20, 96, 216), 30  # of words; opacity of 255
BOX_LINE, FINE_BOX_LINE = 120, 45  # opacity around words that are shown 10 pixels tall, and around smaller ones
LEAST_LINE = 6  # px that a word is shown tall to have a line around it: smaller ones it would hide
GAP = 18  # px between cells
# Columns, px of each, and of the tallest picture by its kind.
STRIPS = (3, 372, {"natural": 200, "document": 340})
PAGES = (5, 300, {"natural": 200, "document": 430})
OTHERS = (5, 216, {"natural": 200, "document": 340})
LARGE = 800  # px of the longer side, above which an image is shown as a page
MAX_ZOOM = 2.0  # small images are enlarged so far
TEXT_LINES, LINE_HEIGHT, TEXT_SIZE = 4, 14, 11
LINE_BREAK = "\u21b5"


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib carries DejaVu Sans, which has Greek, Cyrillic and much else that Pillow's own font has not
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def word_boxes(row: dict[str, Any]) -> list[list[int]]:
    """Boxes of a row's words; of sets without the column from those of its characters."""
    words = row.get("words")
    if not words and row.get("char_boxes"):
        words = words_from_char_boxes(row["text"], np.asarray(row["char_boxes"]))
    return [word["box"] for word in words or ()]


def contact_sheet(rows: Sequence[dict[str, Any]], title: str = "") -> Image.Image:
    """Draw rows of the schema as an RGB image: three beside each other where most are strips of text, else five,
    larger where most are whole pages.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows to draw on a contact sheet")
    sizes = [_size(row) for row in rows]
    if np.median([size[0] / size[1] for size in sizes]) > 2:
        columns, width, tallest = STRIPS
    else:
        columns, width, tallest = PAGES if np.median([max(size) for size in sizes]) > LARGE else OTHERS
    font, small = _font(TEXT_SIZE), _font(TEXT_SIZE - 1)
    cells = []
    for row, size in zip(rows, sizes, strict=True):
        facts = f"{size[0]}×{size[1]}  {row['task']}  {row['kind']}"
        if row.get("x_height"):
            facts += f"  x-height {row['x_height']:.1f}"
        lines = [(facts, GREY, small)]
        lines += [(line, INK if row["text"].strip() else GREY, font) for line in _wrapped(row["text"], font, width)]
        cells.append((_picture(row, size, width, tallest[row["kind"]]), lines))
    bands = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    tall = [max(picture.height for picture, _ in band) for band in bands]
    deep = [8 + LINE_HEIGHT * max(len(lines) for _, lines in band) for band in bands]
    top = GAP + (28 if title else 0)
    wide = GAP + min(columns, len(cells)) * (width + GAP)
    heading = _font(15)
    if title:
        wide = max(wide, round(heading.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (wide, top + sum(tall) + sum(deep) + GAP * len(bands)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP - 4), title, fill=INK, font=heading)
    y = top
    for band, height, text_height in zip(bands, tall, deep, strict=True):
        for column, (picture, lines) in enumerate(band):
            x = GAP + column * (width + GAP)
            above = y + height - picture.height  # images of a band stand on one line
            sheet.paste(picture, (x, above))
            pen.rectangle((x - 1, above - 1, x + picture.width, above + picture.height), outline=FRAME)
            for number, (line, colour, face) in enumerate(lines):
                pen.text((x, y + height + 6 + number * LINE_HEIGHT), line, fill=colour, font=face)
        y += height + text_height + GAP
    return sheet


def _size(row: dict[str, Any]) -> tuple[int, int]:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        return image.size


def _picture(row: dict[str, Any], size: tuple[int, int], width: int, height: int) -> Image.Image:
    """The image at the size it is shown, at most (width, height), with the boxes of its words."""
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        picture = to_rgb(image)
    zoom = min(width / size[0], height / size[1], MAX_ZOOM)
    shown = tuple(max(1, round(side * zoom)) for side in size)
    picture = picture.resize(shown, Image.Resampling.LANCZOS)
    boxes = word_boxes(row)
    if boxes:
        faint = Image.new("RGBA", shown, (*BOX, 0))
        pen = ImageDraw.Draw(faint)
        for x0, y0, x1, y1 in boxes:
            if x1 > x0 and y1 > y0:
                corners = (x0 * zoom, y0 * zoom, max(x0 * zoom, x1 * zoom - 1), max(y0 * zoom, y1 * zoom - 1))
                line = BOX_LINE if (y1 - y0) * zoom >= 10 else FINE_BOX_LINE
                outline = (*BOX, line) if (y1 - y0) * zoom >= LEAST_LINE else None
                pen.rectangle(corners, fill=(*BOX, BOX_FILL), outline=outline)
        picture = Image.alpha_composite(picture.convert("RGBA"), faint).convert("RGB")
    return picture


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text's beginning on `TEXT_LINES` lines of `width` pixels, line breaks shown, and how much more there is."""
    if not text.strip():
        return ["(nothing to read)"]
    flat = re.sub(r"\s*\n\s*", f" {LINE_BREAK} ", text.strip())
    flat = re.sub(r"[^\S ]+", " ", flat)
    lines = []
    while flat and len(lines) < TEXT_LINES:
        # as much as fits, found by halving; then back to the last blank, if there is one
        low, high = 1, len(flat)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if font.getlength(flat[:middle]) <= width else (low, middle - 1)
        cut = low
        if cut < len(flat) and " " in flat[1:cut]:
            cut = flat.rindex(" ", 1, cut + 1)
        lines.append(flat[:cut])
        flat = flat[cut:].lstrip(" ")
    if flat:
        more = len(flat) + len(lines[-1])
        lines[-1] = f"… {more:,} more characters"
    return lines


def save_sheet(sheet: Image.Image, path: str | Path, max_bytes: int = 400_000) -> None:
    """Write a sheet as PNG of at most `max_bytes`, with as many colours as that allows and then smaller.

    Raises:
        ValueError: it does not become that small.
    """
    path = Path(path)
    while min(sheet.size) >= 100:
        for colours in (None, 256, 128, 64):
            file = io.BytesIO()
            flat = sheet if colours is None else sheet.quantize(colours, dither=Image.Dither.NONE)
            flat.save(file, "PNG", optimize=True)
            if file.tell() <= max_bytes:
                partial = path.with_name(f".{path.name}.partial")
                partial.write_bytes(file.getvalue())
                partial.replace(path)
                return
        sheet = sheet.resize((round(sheet.width * 0.85), round(sheet.height * 0.85)), Image.Resampling.LANCZOS)
    raise ValueError(f"a contact sheet of at most {max_bytes} bytes cannot be made")
