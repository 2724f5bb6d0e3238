"""What a model reads beside what it should have read: a table for the terminal, a sheet with the images."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein

from modeling_unit.image_processing_unit import to_rgb

from .data.contact_sheet import FRAME, GREY, INK, LINE_BREAK, PAPER

if TYPE_CHECKING:
    from .samples import Sample

MISSED, WRONG = "#f7c9c4", "#ffdf9e"  # behind letters that were not read, and behind those that are not there
GAP, PICTURE, TALLEST, CAPTIONED = 18, 380, 300, 150  # px: between cells, width, height of a page and of a picture
COLUMNS, TEXT_LINES, SIZE, LINE = 62, 9, 13, 17  # letters in a line, lines of a text, px of a letter, of a line
MAX_ZOOM = 2.0
NARROWEST = 24  # columns of a terminal that a text gets at least


def group_title(name: str) -> str:
    """`document_x4` as one writes it: document ×4."""
    match = re.fullmatch(r"(natural|document)_x(\d+)", name)
    if not match:
        return name
    return f"{'picture' if match[1] == 'natural' else 'document'} ×{match[2]}"


def plain(text: str) -> str:
    """A text in one line, without anything that a terminal would obey."""
    flat = re.sub(r"\s*\n\s*", LINE_BREAK, text.strip())
    flat = "".join(" " if letter.isspace() else letter for letter in flat)
    return "".join(
        "\ufffd" if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn") else letter for letter in flat
    )


def columns_of(letter: str) -> int:
    """Columns of a terminal that a letter takes."""
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """A text in exactly so many columns: filled up with blanks, or cut with an ellipsis."""
    if sum(map(columns_of, text)) <= columns:
        return text + " " * (columns - sum(map(columns_of, text)))
    kept, used = "", 0
    for letter in text:
        if used + columns_of(letter) > columns - 1:
            break
        kept, used = kept + letter, used + columns_of(letter)
    return kept + "…" + " " * (columns - 1 - used)


def sample_table(samples: Sequence[Sample], width: int) -> str:
    """Expected and read beside each other, a line a sample, cut at `width` columns."""
    titles = [group_title(sample.group) for sample in samples]
    first = max(map(len, titles))
    each = max(NARROWEST, (width - first - 6) // 2)
    lines = [f"{'':<{first}} │ {cut('expected', each)} │ {cut('read', each)}"]
    for title, sample in zip(titles, samples, strict=True):
        lines.append(f"{title:<{first}} │ {cut(plain(sample.expected), each)} │ {cut(plain(sample.read), each)}")
    return "\n".join(line.rstrip() for line in lines)


def marked(expected: str, read: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts letter by letter, each with whether it differs from the other.

    >>> marked("cat", "cut")
    ([('c', False), ('a', True), ('t', False)], [('c', False), ('u', True), ('t', False)])
    """
    one, other = [[letter, False] for letter in expected], [[letter, False] for letter in read]
    for step in Levenshtein.opcodes(expected, read):
        if step.tag != "equal":
            for letter in one[step.src_start : step.src_end]:
                letter[1] = True
            for letter in other[step.dest_start : step.dest_end]:
                letter[1] = True
    return [(letter, wrong) for letter, wrong in one], [(letter, wrong) for letter, wrong in other]


def _face(name: str, size: int) -> ImageFont.FreeTypeFont:
    # matplotlib carries DejaVu, which has Greek, Cyrillic and much else that Pillow's own font has not
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _text_block(pen, x: int, y: int, letters: list[tuple[str, bool]], colour: str, face, width: float) -> int:
    """Draw letters on a grid, those that differ on `colour`; returns the pixels that they take downwards."""
    shown = letters[: COLUMNS * TEXT_LINES]
    for place, (letter, wrong) in enumerate(shown):
        left, top = x + (place % COLUMNS) * width, y + place // COLUMNS * LINE
        if wrong:
            pen.rectangle((left, top, left + width, top + LINE - 1), fill=colour)
        pen.text((left, top), letter, fill=INK, font=face)
    lines = max(1, -(-len(shown) // COLUMNS))
    if len(letters) > len(shown):
        pen.text((x, y + lines * LINE), f"… {len(letters) - len(shown)} more letters", fill=GREY, font=face)
        lines += 1
    if not shown:
        pen.text((x, y), "(nothing)", fill=GREY, font=face)
    return lines * LINE


def sample_sheet(samples: Sequence[Sample], title: str) -> Image.Image:
    """Images with what is expected and what was read to their right, letters that differ on a colour. RGB.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("there are no samples to draw")
    face, small, large = _face("DejaVuSansMono.ttf", SIZE), _face("DejaVuSans.ttf", 11), _face("DejaVuSans.ttf", 15)
    letter = face.getlength("x")
    rows = []
    for sample in samples:
        picture = to_rgb(sample.image)
        tallest = CAPTIONED if sample.task == "caption" else TALLEST
        zoom = min(PICTURE / picture.width, tallest / picture.height, MAX_ZOOM)
        size = max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom))
        rows.append((sample, picture.resize(size, Image.Resampling.LANCZOS)))
    wide = round(3 * GAP + PICTURE + COLUMNS * letter)
    most = max(TALLEST, 3 * LINE + 2 * (TEXT_LINES + 2) * LINE) + GAP
    sheet = Image.new("RGB", (wide, 2 * GAP + 20 + most * len(rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP - 6), title, fill=INK, font=large)
    legend = (("not read", MISSED), ("not there", WRONG))
    x = wide - GAP - sum(round(small.getlength(text)) + 18 for text, _ in legend)
    for text, colour in legend:
        length = small.getlength(text)
        pen.rectangle((x - 4, GAP - 5, x + length + 4, GAP + 12), fill=colour)
        pen.text((x, GAP - 3), text, fill=INK, font=small)
        x += length + 18
    y = GAP + 26
    for sample, picture in rows:
        sheet.paste(picture, (GAP, y))
        pen.rectangle((GAP - 1, y - 1, GAP + picture.width, y + picture.height), outline=FRAME)
        x, top = 2 * GAP + PICTURE, y
        caption = sample.task == "caption"
        expected, read = plain(sample.expected), plain(sample.read)
        # a caption may say it in other words: nothing is marked
        both = (
            ([(one, False) for one in expected], [(one, False) for one in read]) if caption else marked(expected, read)
        )
        for label, letters, colour in (("expected", both[0], MISSED), ("read", both[1], WRONG)):
            heading = f"{label}  ·  {group_title(sample.group)}, {sample.task}" if label == "expected" else label
            pen.text((x, top), heading, fill=GREY, font=small)
            top += LINE + _text_block(pen, x, top + LINE, letters, colour, face, letter) + 6
        y = max(y + picture.height, top) + GAP
        pen.line((GAP, y - GAP // 2, wide - GAP, y - GAP // 2), fill=FRAME)
    return sheet.crop((0, 0, wide, y))
