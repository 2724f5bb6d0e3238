"""Read the sample pages and name the sample pictures with the shipped checkpoint; an annotated PNG of each.

    python -m spaces_demo.sample_run [--model FOLDER_OR_ID] [--out demo_output]

Needs nothing but the package: no network, no GPU. Prints what was read, the confidence, the time, and the word F1
against the page's true text.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

SAMPLES = Path(__file__).parent / "samples"
# What the sample pictures show, and as many things that they do not.
LABELS = (
    "a dog",
    "a duck",
    "a panda",
    "a baseball",
    "a screwdriver",
    "a windmill",
    "a cat",
    "a horse",
    "an orange",
    "a key",
    "a house",
    "a car",
)

PAPER, INK, GREY, LINE = "#ffffff", "#1b1b1f", "#6b7078", "#d9dce1"
BAR, CHOSEN = "#b9c4d6", "#2f6fde"
# Confidence from 0.5 and below to 1: red, amber, green.
SCALE = ((0.5, (200, 55, 45)), (0.8, (222, 150, 20)), (1.0, (25, 140, 75)))
PAGE_WIDTH = 760  # px of either half of an annotated page
MARGIN, TITLE = 24, 64
X_HEIGHT = 0.52  # of the font that comes with Pillow, as a share of its size


def word_f1(read: str, truth: str) -> float:
    """Multiset F1 of lower-case words, 1 when both are empty: the measure of `unit evaluate`, without its packages."""
    from training.data.text import join_lines, normalize_text, words

    one, other = (Counter(words(join_lines(normalize_text(text)))) for text in (read, truth))
    total = sum(one.values()) + sum(other.values())
    return 2 * sum((one & other).values()) / total if total else 1.0


def load(model: str | None):
    """A [`Reader`] of the shipped checkpoint, or of another; and its name."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if model is None or Path(model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from modeling_unit import Reader, shipped_checkpoint

    transformers.logging.disable_progress_bar()
    source = str(shipped_checkpoint() if model is None else model)
    # float32: on a CPU a bfloat16 kernel is compiled for every new shape, which costs a page more than it gains
    weights = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    return Reader(weights, AutoProcessor.from_pretrained(source)), Path(source).name


def run(reader, name: str, out: Path, samples: Path | None = None) -> list[Path]:
    """Read, name, print, draw.

    Args:
        reader: [`modeling_unit.Reader`].
        name: of the model, for the pictures.
        out: folder for the annotated PNGs, made when missing; one is called as its sample.
        samples: folder with `pages/` (a PNG and its text in a `.txt` each) and `pictures/`; by default, ours.

    Raises:
        ValueError: there are no samples.
    """
    samples = SAMPLES if samples is None else samples
    pages = sorted((samples / "pages").glob("*.png"))
    pictures = sorted((samples / "pictures").glob("*.jpg"))
    if not pages and not pictures:
        raise ValueError(f"{samples}: no samples there (pages/*.png, pictures/*.jpg)")
    out.mkdir(parents=True, exist_ok=True)
    written, summary = [], []

    for path in pages:
        image = Image.open(path).convert("RGB")
        page = reader.read(image)
        truth = path.with_suffix(".txt").read_text(encoding="utf-8")
        f1 = word_f1(page.text, truth)
        print(f"\n=== {path.name}\n\n{page.text}\n")
        summary.append((path.name, f"{len(page.text.split())} words", page.confidence, page.seconds, f"{f1:.2f}"))
        written.append(out / f"{path.stem}.png")
        facts = f"{page.seconds:.1f} s on the CPU   ·   confidence {page.confidence:.2f}   ·   word F1 {f1:.2f}"
        draw_page(image, page, path.name, f"read by {name} in {facts}").save(written[-1], optimize=True)

    for path in pictures:
        image = Image.open(path).convert("RGB")
        start = time.perf_counter()
        (caption,) = reader.describe([image])
        ranking = [(one.label, one.likelihood) for one in reader.rank_labels(image, LABELS)]
        seconds = time.perf_counter() - start
        print(f"{path.name}: {caption.text}   (likeliest of {len(LABELS)} labels: {ranking[0][0]})")
        summary.append((path.name, caption.text, caption.confidence, seconds, ""))
        written.append(out / f"{path.stem}.png")
        facts = f"{seconds:.1f} s on the CPU   ·   confidence {caption.confidence:.2f}"
        card = draw_picture(image, caption.text, ranking, path.name, f"named by {name} in {facts}")
        card.save(written[-1], optimize=True)

    print(f"\n{'sample':<18}{'read or named as':<30}{'confidence':>11}{'seconds':>9}{'word F1':>9}")
    for sample, found, confidence, seconds, f1 in summary:
        print(f"{sample:<18}{textwrap.shorten(found, 28):<30}{confidence:>11.2f}{seconds:>9.1f}{f1:>9}")
    print(f"\n{len(written)} annotated pictures are in {out}/")
    return written


# ---------------------------------------------------------------------------------------------------------- drawing


def draw_page(image: Image.Image, page, title: str, facts: str) -> Image.Image:
    """The page with its blocks framed, coloured by confidence; beside it what was read, set where it was found."""
    scale = PAGE_WIDTH / image.width
    height = round(image.height * scale)
    sheet = _sheet(2 * PAGE_WIDTH + 3 * MARGIN, height + TITLE + MARGIN, title, facts)
    _draw_scale(ImageDraw.Draw(sheet), sheet.width - MARGIN - 210, 22)
    original = draw_blocks(image, page.blocks, PAGE_WIDTH)
    draw = ImageDraw.Draw(sheet)
    for x, half in ((MARGIN, original), (PAGE_WIDTH + 2 * MARGIN, _set_page(page, scale, (PAGE_WIDTH, height)))):
        sheet.paste(half, (x, TITLE))
        draw.rectangle((x - 1, TITLE - 1, x + PAGE_WIDTH, TITLE + height), outline=LINE)
    return sheet


def draw_blocks(image: Image.Image, blocks: Sequence, width: int, waiting: Sequence[tuple] = ()) -> Image.Image:
    """The page, `width` pixels wide, with its blocks framed and tinted by confidence.

    Args:
        blocks: [`modeling_unit.reading_unit.Block`].
        waiting: boxes of blocks that were not read yet, framed in grey.
    """
    scale = width / image.width
    page = image.convert("RGB").resize((width, max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    tint = Image.new("RGB", page.size, "white")  # a layer of its own, so that the print stays black
    for block in blocks:
        light = tuple(round(255 - (255 - value) * 0.1) for value in confidence_colour(block.confidence))
        ImageDraw.Draw(tint).rectangle(_scaled(block.box, scale, 3), fill=light)
    page = ImageChops.multiply(page, tint)
    draw = ImageDraw.Draw(page)
    for box in waiting:
        draw.rectangle(_scaled(box, scale, 3), outline=GREY, width=1)
    for block in blocks:
        draw.rectangle(_scaled(block.box, scale, 3), outline=confidence_colour(block.confidence), width=2)
    return page


def _set_page(page, scale: float, size: tuple[int, int]) -> Image.Image:
    """What was read, on a page of its own. Set at three times the size: small type is spaced badly otherwise."""
    fine = 3 * scale
    sheet = Image.new("RGB", (3 * size[0], 3 * size[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for block in page.blocks:
        x0, y0, _, y1 = _scaled(block.box, fine)
        draw.rectangle((x0 - 27, y0, x0 - 21, y1), fill=confidence_colour(block.confidence))
        lines, size_of_type = set_block(block, lambda text, x_height: _font(x_height / X_HEIGHT).getlength(text))
        for text, box in lines:
            x, top, _, bottom = _scaled(box, fine)
            font = _font(size_of_type * fine / X_HEIGHT)
            draw.text((x, (top + bottom) / 2), text, fill=INK, font=font, anchor="lm")
    if not page.blocks:
        draw.text((90, 90), "nothing was found to read", fill=GREY, font=_font(54))
    return sheet.resize(size, Image.Resampling.LANCZOS)


def set_block(block, width: Callable[[str, float], float]) -> tuple[list[tuple[str, tuple]], float]:
    """Lines of a block with the boxes to set them in, in pixels of the page; and the x-height to set them at.

    Where as many lines were read as there are on the page, each goes where it was found. Otherwise the words flow
    through the lines of the page. Type is as large as the print was, smaller where it would not fit.

    Args:
        block: [`modeling_unit.reading_unit.Block`].
        width: of a text at an x-height, in pixels.
    """
    rows: list[tuple] = []
    for x0, y0, x1, y1 in block.lines or [block.box]:
        last = rows[-1] if rows else None
        if last and y0 < (last[1] + last[3]) / 2 < y1:  # side by side: cells, parts of a long line
            rows[-1] = (min(x0, last[0]), min(y0, last[1]), max(x1, last[2]), max(y1, last[3]))
        else:
            rows.append((x0, y0, x1, y1))
    texts = block.text.split("\n")
    most = block.x_height or 0.4 * (rows[0][3] - rows[0][1])
    size = most
    while size > 0.4 * most:
        if len(texts) == len(rows):
            # some faces are narrower than ours: a line may stand a little over its end
            if all(width(text, size) <= 1.04 * (row[2] - row[0]) for text, row in zip(texts, rows, strict=True)):
                break
        elif (flown := _flow(texts, rows, lambda text, size=size: width(text, size))) is not None:
            return list(zip(flown, rows, strict=True)), size
        size *= 0.95
    else:
        if len(texts) != len(rows):
            return [(" ".join(texts), rows[0])], size
    return list(zip(texts, rows, strict=True)), size


def _flow(texts: Sequence[str], rows: Sequence[tuple], width: Callable[[str], float]) -> list[str] | None:
    """The words of `texts`, as many in each row as fit; `None` when some are left over."""
    from training.data.text import join_lines

    words = join_lines("\n".join(texts)).split()
    lines = []
    for x0, _, x1, _ in rows:
        line = ""
        while words and width(f"{line} {words[0]}".strip()) <= x1 - x0:
            line = f"{line} {words.pop(0)}".strip()
        lines.append(line)
    return None if words else lines


def draw_picture(
    image: Image.Image, caption: str, ranking: Sequence[tuple[str, float]], title: str, facts: str
) -> Image.Image:
    """The picture, its caption, and the labels by likelihood."""
    side, column = 420, 460
    sheet = _sheet(side + column + 3 * MARGIN, side + TITLE + MARGIN, title, facts)
    draw = ImageDraw.Draw(sheet)
    shown = image.copy()
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    sheet.paste(shown, (MARGIN + (side - shown.width) // 2, TITLE + (side - shown.height) // 2))
    x, y = side + 2 * MARGIN, TITLE
    lines = textwrap.wrap(caption, 30)[:3] or ["(nothing)"]
    for line in lines:
        draw.text((x, y), line, fill=INK, font=_font(28))
        y += 36
    y += 14
    draw.text((x, y), "labels, by the decoder's likelihood", fill=GREY, font=_font(13))
    y += 26
    room = TITLE + side - y
    step = min(30.0, room / max(1, len(ranking)))
    names, bars = 140, column - 140 - 50
    for place, (label, score) in enumerate(ranking):
        top = y + place * step
        draw.text((x + names - 10, top + step / 2), label, fill=INK, font=_font(14), anchor="rm")
        length = max(2, bars * score)
        fill = CHOSEN if place == 0 else BAR
        draw.rounded_rectangle((x + names, top + 4, x + names + length, top + step - 4), radius=3, fill=fill)
        draw.text((x + names + length + 8, top + step / 2), f"{score:.2f}", fill=GREY, font=_font(12), anchor="lm")
    return sheet


def confidence_colour(confidence: float) -> tuple[int, int, int]:
    """Red at 0.5 and below, amber at 0.8, green at 1."""
    confidence = min(max(confidence, SCALE[0][0]), SCALE[-1][0])
    for (low, one), (high, other) in pairwise(SCALE):
        if confidence <= high:
            share = (confidence - low) / (high - low)
            return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return SCALE[-1][1]


def _sheet(width: int, height: int, title: str, facts: str) -> Image.Image:
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 10), title, fill=INK, font=_font(20))
    draw.text((MARGIN, 36), facts, fill=GREY, font=_font(14))
    return sheet


def _draw_scale(draw: ImageDraw.ImageDraw, x: int, y: int, width: int = 210) -> None:
    low, high = SCALE[0][0], SCALE[-1][0]
    for i in range(width):
        draw.line((x + i, y, x + i, y + 8), fill=confidence_colour(low + (high - low) * i / (width - 1)))
    for value, anchor in ((low, "la"), (high, "ra")):
        at = x if value == low else x + width
        draw.text((at, y + 11), f"{value:g}", fill=GREY, font=_font(12), anchor=anchor)
    draw.text((x + width / 2, y + 11), "confidence", fill=GREY, font=_font(12), anchor="ma")


def _scaled(box: Sequence[float], scale: float, margin: int = 0) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (value * scale for value in box)
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


def _font(size: float) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow."""
    return _font_of_size(max(4.0, round(2 * size) / 2))


@cache
def _font_of_size(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spaces_demo.sample_run", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or Hub id (default: the shipped checkpoint)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder to write to (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        reader, name = load(arguments.model)
        run(reader, name, arguments.out)
    except (OSError, ValueError) as error:  # a FileNotFoundError among them when no checkpoint ships
        print(f"sample_run: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
