"""Text drawn with skia: chunks in many fonts and conditions, each with a box per character because we place them.

A row is a function of (seed, index) and the resources alone: the same seed gives the same bytes whatever the number of
workers. Two kinds of canvas: ``dense`` ones like the chunks of `pdf` (1 to 3 lines, x-height 7 to 13 px, area up to
65,536 px), and ``sparse`` ones for the small scale (1 to 4 words, x-height 10 to 24 px, area up to 16,384 px).

Lengths are in pixels. All shares and ranges are ours.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import skia
from PIL import Image

from .guarded import map_in_order
from .heldout import is_heldout_font
from .pages.corpus import code, number, package_prose, package_vocabulary, pick
from .pages.degradations import encode_jpeg, gaussian_blur, ink_and_paper, resample
from .pages.fonts import CHUNK_PACKAGES, package_fonts, typeface
from .pdf import Report
from .schema import make_row, write_shards

MAX_AREA = {"dense": 65536, "sparse": 16384}
X_HEIGHT = {"dense": (7.0, 13.0), "sparse": (10.0, 24.0)}
MAX_WIDTH = {"dense": 1024, "sparse": 512}
BLANK_SHARE = 0.01

# ------------------------------------------------------------------------------------------------------- resources


@dataclass
class Resources:
    """What rows are drawn from.

    Args:
        fonts: font files by family; the draw is by family first, so that one with 40 files counts once.
        prose: English words in running order, as one list.
        vocabulary: words without order.
    """

    fonts: dict[str, list[str]]
    prose: list[str]
    vocabulary: list[str]
    families: list[str] = field(init=False)

    def __post_init__(self):
        if not self.fonts or not self.prose or not self.vocabulary:
            raise ValueError("made pages need at least one font, some prose and some words")
        self.families = sorted(self.fonts)


def load_resources(split: str = "train") -> Resources:
    """Fonts and text from Debian packages; fonts of held-out families only for ``validation``, and only those."""
    fonts = {
        family: files
        for family, files in package_fonts(CHUNK_PACKAGES).items()
        if is_heldout_font(family) == (split == "validation")
    }
    return Resources(fonts, package_prose().split(), package_vocabulary())


# ------------------------------------------------------------------------------------------------------------ text


def random_words(rng: np.random.Generator, resources: Resources) -> Iterator[str]:
    """An endless stream of words: prose, shuffled words, numbers, codes and addresses, in changing proportion.

    Prose has one digit in 150 characters and one capital in 44 (counted). Here both are one in 11, every printable
    character occurs, and not every word can be guessed from the one before.
    """
    kind = rng.choice(5, p=(0.50, 0.17, 0.13, 0.10, 0.10))
    position = int(rng.integers(len(resources.prose)))
    upper = rng.random() < 0.08
    titled = rng.random() < 0.06
    while True:
        if kind == 0 or (kind == 4 and rng.random() < 0.7):
            word = resources.prose[position % len(resources.prose)]
            position += 1
        elif kind == 1:
            word = pick(rng, resources.vocabulary)
            word += "" if rng.random() < 0.8 else pick(rng, list(",.;:!?"))
        elif kind == 2:
            word = number(rng)
        else:
            word = code(rng, resources.vocabulary)
        if len(word) > 24:
            word = word[:24]
        yield word.upper() if upper else word[:1].upper() + word[1:] if titled else word


# --------------------------------------------------------------------------------------------------------- drawing


@dataclass
class Drawing:
    """Dark text on white before colours and degradations."""

    coverage: np.ndarray  # (H, W) float32 in [0, 1], how much ink
    text: str
    boxes: np.ndarray  # (len(text), 4) int; zeros for white space
    x_height: float
    family: str  # of the font


class Face:
    """A random font at a size that gives it the x-height asked for, with the boxes of its outlines."""

    def __init__(self, resources: Resources, x_height: float, rng: np.random.Generator):
        self.family = pick(rng, resources.families)
        path = pick(rng, resources.fonts[self.family])
        face = typeface(path)
        self.unit = skia.Font(face, 1000.0)  # no hinting to speak of: boxes of the outlines
        self.unit.setLinearMetrics(True)
        x_box = self.unit.getBounds(self.unit.textToGlyphs("x"))[0]
        self.scale = x_height / max(x_box.height(), 1.0)
        self.font = skia.Font(face, 1000.0 * self.scale)
        self.font.setSubpixel(True)
        self.font.setLinearMetrics(True)
        self.font.setEdging(skia.Font.Edging.kAntiAlias)
        self.font.setHinting((skia.FontHinting.kNone, skia.FontHinting.kSlight)[int(rng.integers(2))])
        self.font.setEmbolden(bool(rng.random() < 0.04))

    def place(self, text: str, tracking: float, word_space: float) -> tuple[np.ndarray, list[int], np.ndarray]:
        """Pen positions (len(text) + 1,), glyphs, and ink boxes (len(text), 4) relative to the origin of the line."""
        glyphs = self.unit.textToGlyphs(text)
        advances = np.array(self.unit.getWidths(glyphs)) * self.scale + tracking
        advances[[character == " " for character in text]] *= word_space
        pen = np.concatenate([[0.0], np.cumsum(advances)])
        bounds = np.array([[b.left(), b.top(), b.right(), b.bottom()] for b in self.unit.getBounds(glyphs)])
        bounds = bounds * self.scale
        bounds[:, 0::2] += pen[:-1, None]
        return pen, glyphs, bounds


def draw_dense(rng: np.random.Generator, resources: Resources) -> Drawing:
    """1 to 3 lines of running text, as a page cut on white space gives them."""
    x_height = rng.uniform(*X_HEIGHT["dense"])
    face = Face(resources, x_height, rng)
    count = 1 + int(rng.choice(3, p=(0.45, 0.30, 0.25)))
    pitch = x_height * rng.uniform(2.4, 3.6)
    margins = rng.uniform(2.0, 8.0, size=4)  # left, top, right, bottom
    height = count * pitch + margins[1] + margins[3] + 0.5 * x_height
    widest = min(MAX_WIDTH["dense"], MAX_AREA["dense"] / height) - margins[0] - margins[2] - x_height
    width = rng.uniform(min(12 * x_height, widest), widest)
    tracking = x_height * rng.uniform(-0.03, 0.15) if rng.random() < 0.15 else 0.0
    word_space = rng.uniform(0.85, 1.8)
    words = random_words(rng, resources)
    lines = []
    word = next(words)
    for _ in range(count):
        line = word
        while (longer := f"{line} {(word := next(words))}") and len(longer) < 400:
            if face.place(longer, tracking, word_space)[0][-1] > width:
                break
            line = longer
        while len(line) > 1 and face.place(line, tracking, word_space)[0][-1] > width:
            line = line[:-1]
        if rng.random() < 0.05:  # as at a paragraph's end
            line = " ".join(line.split(" ")[: max(1, int(rng.integers(1, 4)))])
        lines.append(line.strip())
    lines = [line for line in lines if line]
    align = rng.choice(3, p=(0.85, 0.1, 0.05))  # left, centred, right
    indent = rng.uniform(0, 4) * x_height if count > 1 and rng.random() < 0.15 else 0.0
    return _draw(face, lines, rng, x_height, pitch, margins, tracking, word_space, int(align), indent)


def draw_sparse(rng: np.random.Generator, resources: Resources) -> Drawing:
    """1 to 4 large words somewhere on a small canvas."""
    x_height = rng.uniform(*X_HEIGHT["sparse"])
    face = Face(resources, x_height, rng)
    square = rng.random() < 0.4
    width = 128.0 if square else rng.uniform(64, min(MAX_WIDTH["sparse"], MAX_AREA["sparse"] / (3.5 * x_height)))
    height = 128.0 if square else rng.uniform(3 * x_height, MAX_AREA["sparse"] / width)
    stream = random_words(rng, resources)
    lines: list[str] = []
    pitch = x_height * rng.uniform(2.5, 3.3)
    for _ in range(int(rng.integers(1, 5))):
        word = next(stream)[:14].strip()
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and face.place(joined, 0.0, 1.0)[0][-1] < width - 6:
            lines[-1] = joined
        elif (len(lines) + 1) * pitch < height and face.place(word, 0.0, 1.0)[0][-1] < width - 6:
            lines.append(word)
    if not lines:
        word = next(stream)
        while len(word) > 1 and face.place(word, 0.0, 1.0)[0][-1] > width - 6:
            word = word[:-1]
        lines = [word]
    size = (int(width), int(height))
    return _draw(face, lines, rng, x_height, pitch, np.full(4, 2.0), 0.0, 1.0, int(rng.integers(2)), 0.0, size)


def _draw(face, lines, rng, x_height, pitch, margins, tracking, word_space, align, indent, canvas=None) -> Drawing:
    """Draw ``lines`` on a canvas fitted around their ink, or placed at random on one of ``canvas`` (width, height)."""
    placed = [face.place(line, tracking, word_space) for line in lines]
    longest = max(pen[-1] for pen, _, _ in placed)
    origins = []
    for index, (pen, _, _) in enumerate(placed):
        x = (0.0, (longest - pen[-1]) / 2, longest - pen[-1])[align] + (indent if index == 0 else 0.0)
        origins.append((x, index * pitch))
    boxes = [box + np.tile(origin, 2) for (_, _, box), origin in zip(placed, origins, strict=True)]
    ink = np.concatenate([box[[c != " " for c in line]] for box, line in zip(boxes, lines, strict=True)])
    angle = float(np.clip(rng.normal(0, 0.4), -1, 1)) if rng.random() < 0.2 else 0.0  # degrees
    x0, y0, x1, y1 = ink[:, 0].min(), ink[:, 1].min(), ink[:, 2].max(), ink[:, 3].max()
    turn = skia.Matrix()
    turn.setRotate(angle, (x0 + x1) / 2, (y0 + y1) / 2)
    boxes = [_turned(box, turn) for box in boxes]
    ink = _turned(ink, turn)
    x0, y0, x1, y1 = ink[:, 0].min(), ink[:, 1].min(), ink[:, 2].max(), ink[:, 3].max()
    width, height = int(np.ceil(x1 - x0 + margins[0] + margins[2])), int(np.ceil(y1 - y0 + margins[1] + margins[3]))
    left, top = margins[0] - x0, margins[1] - y0
    if canvas is not None:
        left += rng.uniform(0, max(canvas[0] - width, 0))
        top += rng.uniform(0, max(canvas[1] - height, 0))
        width, height = max(canvas[0], width), max(canvas[1], height)
    pixels = np.zeros((height, width), dtype=np.uint8)
    surface = skia.Surface.MakeRasterDirect(skia.ImageInfo.MakeA8(width, height), pixels)
    paint = skia.Paint(AntiAlias=True, Color=skia.ColorBLACK)
    with surface as to:
        to.translate(left, top)
        to.concat(turn)
        for (pen, glyphs, _), origin in zip(placed, origins, strict=True):
            builder = skia.TextBlobBuilder()
            builder.allocRunPosH(face.font, glyphs, [float(x) for x in pen[:-1] + origin[0]], float(origin[1]))
            to.drawTextBlob(builder.make(), 0, 0, paint)
        if rng.random() < 0.02:  # underlined
            thickness = max(1.0, 0.12 * x_height)
            y = origins[-1][1] + 0.3 * x_height
            to.drawRect(skia.Rect(origins[-1][0], y, origins[-1][0] + placed[-1][0][-1], y + thickness), paint)
    text, rows = "\n".join(lines), []
    for index, (box, line) in enumerate(zip(boxes, lines, strict=True)):
        if index:
            rows.append(np.zeros((1, 4)))
        box = box + np.tile((left, top), 2)
        box[:, :2], box[:, 2:] = np.floor(box[:, :2]), np.ceil(box[:, 2:])
        box = box.clip(0, (width, height) * 2)
        box[[c == " " for c in line]] = 0
        rows.append(box)
    return Drawing(pixels.astype(np.float32) / 255, text, np.concatenate(rows).astype(int), x_height, face.family)


def _turned(boxes: np.ndarray, turn: skia.Matrix) -> np.ndarray:
    """Upright boxes around ``boxes`` (N, 4) after the rotation."""
    a, b, c, d, e, f = (turn[index] for index in range(6))
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    x = a * corners[..., 0] + b * corners[..., 1] + c
    y = d * corners[..., 0] + e * corners[..., 1] + f
    return np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], axis=1)


# ---------------------------------------------------------------------------------------------------- degradations
# Each takes (H, W) float32 pixels in [0, 255] and a generator and returns the same shape; `degrade` mixes them. They
# and their order decide the bytes of the sets that the recipes name; those of whole pages are in `pages.degradations`.


def paper_tint(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slow unevenness of the paper: a field of random greys at every 16th pixel or so, up to 9 levels strong."""
    height, width = pixels.shape
    cell = rng.uniform(6, 32)
    coarse = rng.normal(0, 1, size=(int(height / cell) + 2, int(width / cell) + 2)).astype(np.float32)
    stained = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return pixels + np.asarray(stained) * rng.uniform(2, 9)


def brightness_gradient(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A shade across the canvas in a random direction, multiplying by 0.7 at the darkest."""
    height, width = pixels.shape
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    across = (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2)
    return pixels * (1 - rng.uniform(0.05, 0.3) * (across + 1) / 2).astype(np.float32)


def blur(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian, radius 0.3 to 1.0 px."""
    return gaussian_blur(_whole(pixels), rng.uniform(0.3, 1.0)).astype(np.float32)


def coarse_scan(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scaled down to 60-90% and up again, as a scan at too few dots an inch."""
    return resample(_whole(pixels), rng.uniform(0.6, 0.9)).astype(np.float32)


def noise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise with a standard deviation of 2 to 18 grey levels."""
    return pixels + rng.normal(0, rng.uniform(2, 18), size=pixels.shape).astype(np.float32)


def jpeg(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Through JPEG at quality 20 to 80."""
    quality = int(rng.integers(20, 81))
    return np.asarray(Image.open(io.BytesIO(encode_jpeg(_whole(pixels), quality))), dtype=np.float32)


def _whole(pixels: np.ndarray) -> np.ndarray:
    return pixels.clip(0, 255).round().astype(np.uint8)


DEGRADATIONS: tuple[tuple[float, Callable[[np.ndarray, np.random.Generator], np.ndarray]], ...] = (
    (0.20, paper_tint),
    (0.20, brightness_gradient),
    (0.25, blur),
    (0.12, coarse_scan),
    (0.25, noise),
    (0.20, jpeg),
)


def degrade(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each degradation with its own chance, in the order above; 35% of canvases stay clean."""
    if rng.random() < 0.35:
        return pixels
    for chance, function in DEGRADATIONS:
        if rng.random() < chance:
            pixels = function(pixels, rng)
    return pixels


def draw_blank(rng: np.random.Generator, kind: str) -> np.ndarray:
    """(H, W) float32: paper with nothing to read on it; plain, or with rules, blobs or scratches; degraded later."""
    width = int(rng.integers(48, 600 if kind == "dense" else 200))
    height = int(rng.integers(20, max(21, min(200, MAX_AREA[kind] // width))))
    ink, paper = ink_and_paper(rng)
    pixels = np.full((height, width), paper, dtype=np.float32)
    form = int(rng.integers(5))  # 0 and 1: nothing
    if form == 2:  # rules
        for _ in range(int(rng.integers(1, 4))):
            y = int(rng.integers(height))
            pixels[y : y + int(rng.integers(1, 3))] = ink
    elif form == 3:  # blobs, too soft to be letters
        field = rng.normal(0, 1, size=(height // 12 + 2, width // 12 + 2)).astype(np.float32)
        grown = np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))
        pixels += (ink - paper) * grown.clip(0, 1) * rng.uniform(0.2, 0.9)
    elif form == 4:  # specks
        specks = rng.random(pixels.shape) < rng.uniform(0.001, 0.02)
        pixels[specks] = ink
    return pixels


# ------------------------------------------------------------------------------------------------------------ rows


def made_row(
    seed: int, index: int, resources: Resources, kind: str = "dense", split: str = "train", unwanted=lambda text: False
) -> dict:
    """Row ``index`` of the data set that ``seed`` makes: a function of its arguments and nothing else.

    Raises:
        ValueError: ``kind`` is neither ``dense`` nor ``sparse``.
    """
    if kind not in MAX_AREA:
        raise ValueError(f"kind must be dense or sparse, not {kind!r}")
    for attempt in range(20):
        rng = np.random.default_rng([seed, index, attempt, kind == "sparse"])
        if rng.random() < BLANK_SHARE:
            pixels, text, boxes, x_height, family = draw_blank(rng, kind), "", None, 0.0, ""
        else:
            drawing = draw_dense(rng, resources) if kind == "dense" else draw_sparse(rng, resources)
            height, width = drawing.coverage.shape
            if width * height > MAX_AREA[kind] or width > MAX_WIDTH[kind] or unwanted(drawing.text):
                continue
            ink, paper = ink_and_paper(rng)
            pixels = paper + (ink - paper) * drawing.coverage
            text, boxes, x_height, family = drawing.text, drawing.boxes, drawing.x_height, drawing.family
        pixels = degrade(pixels, rng).clip(0, 255).round().astype(np.uint8)
        return make_row(
            pixels,
            text,
            task="ocr",
            kind="document",
            char_boxes=boxes,
            x_height=x_height,
            source=f"made-pages/{kind}/{seed}#{index}" + (f" ({family})" if family else ""),
            license="Apache-2.0 (drawn by this project)",
            split=split,
        )
    raise RuntimeError(f"row {index} of seed {seed} did not fit in 20 attempts: are the fonts legible?")


def build_made(
    out: str | Path,
    count: int,
    seed: int = 0,
    *,
    kind: str = "dense",
    split: str = "train",
    workers: int = 1,
    resources: Resources | None = None,
    unwanted: Callable[[str], bool] = lambda text: False,
    progress: bool = True,
) -> Report:
    """Draw ``count`` rows into ``out``.

    Args:
        out: folder for the shards and ``report.json``.
        count: rows.
        seed: the same seed gives the same bytes, whatever ``workers`` is.
        kind: ``dense`` or ``sparse``.
        split: ``train`` draws from all fonts but the held-out ones, ``validation`` from those only.
        workers: processes.
        resources: fonts and words; by default those of `load_resources`.
        unwanted: texts to draw anew.
        progress: show a bar.

    Raises:
        ValueError: a negative count or an unknown kind.
    """
    from tqdm import tqdm

    if count < 0:
        raise ValueError(f"count must not be negative, is {count}")
    begin = time.perf_counter()
    resources = resources or load_resources(split)
    lengths: Counter = Counter()

    def counted(rows):
        for row in tqdm(rows, total=count, unit="row", disable=not progress):
            lengths["rows"] += 1
            lengths["blank"] += not row["text"]
            yield row

    drawn = map_in_order(
        lambda index: made_row(seed, index, resources, kind, split, unwanted), range(count), workers=workers, batch=64
    )
    written = write_shards(counted(drawn), out)
    seconds = time.perf_counter() - begin
    report = Report(rows=written, seconds=seconds)
    report.save(Path(out), seed=seed, kind=kind, split=split, families=len(resources.families), blank=lengths["blank"])
    return report
