"""Light, seeded changes to training images, so that one stored chunk or picture is never seen twice alike [ours].

Every function takes a `numpy.random.Generator` and returns new data; same generator state, same result.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

COARSE_X_HEIGHT = (3.2, 7.0)  # px; below 3 nothing can be read


def augment_document(
    image: Image.Image, boxes: np.ndarray, rng: np.random.Generator, x_height: float = 0.0
) -> tuple[Image.Image, np.ndarray]:
    """Grayscale chunk and `(characters, 4)` boxes in pixels -> changed chunk, boxes scaled with it.

    Size 85-112% each way (x-height 7-13 px stays within what is readable), 30% as if enlarged from small type, 8% as a
    black-and-white scan, tone, blur, noise, specks, 5% inverted.

    Args:
        x_height: of the chunk, in pixels; 0 when not known, then nothing is made coarse.
    """
    width, height = image.size
    scale = rng.uniform(0.85, 1.12)
    new_width = max(8, round(width * scale * rng.uniform(0.94, 1.06)))
    new_height = max(8, round(height * scale))
    if rng.random() < 0.7 and (new_width, new_height) != image.size:
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        boxes = boxes * np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    if x_height > 0 and rng.random() < 0.30:
        image = coarse(image, rng.uniform(*COARSE_X_HEIGHT) / (x_height * image.height / height), rng)
    elif rng.random() < 0.12:
        image = black_and_white(image, rng)
    elif rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = _soiled(image, rng, toned=0.6, darkest=70, lightest=185, noisy=0.3)
    if rng.random() < 0.05:
        pixels = 255.0 - pixels
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), boxes


# What the `Reader` leaves to differ between lines: it whitens paper, scales by a measured x-height and cuts at a
# measured baseline, each a little off [ours].
LINE_SCALE, LINE_STRETCH = (0.93, 1.07), (0.92, 1.08)
BASELINE_ERROR, MOST_BASELINE_ERROR = 0.5, 1.4  # px


def augment_line(
    image: Image.Image, boxes: np.ndarray, rng: np.random.Generator, baseline: float, widest: int | None = None
) -> tuple[Image.Image, np.ndarray]:
    """A line as the `Reader` cuts it and its `(characters, 4)` boxes -> changed ones, of the same height.

    Size 93-107%, width 92-108% beyond it, baseline off by half a pixel, slanted by up to a fifth; a fifth coarser, a
    tenth black and white, a seventh blurred; ink and paper tones, noise, specks.

    Args:
        baseline: px from the top, where its letters stand.
        widest: px that it may be wide; a wider one had to be shrunk, which would move its baseline.
    """
    width, height = image.size
    scale = rng.uniform(*LINE_SCALE)
    across = scale * rng.uniform(*LINE_STRETCH)
    error = float(np.clip(rng.normal(0.0, BASELINE_ERROR), -MOST_BASELINE_ERROR, MOST_BASELINE_ERROR))
    slant = rng.uniform(-0.2, 0.2) if rng.random() < 0.1 else 0.0
    if rng.random() < 0.2:
        image = coarse(image, rng.uniform(0.42, 0.95), rng)
    new_width = max(8, round(width * across))
    if widest:
        new_width = min(new_width, widest)
    # (x, y) is taken from (a x + b y + c, e y + f) of the old image; letters slant about the baseline's new place
    place = baseline + error
    to_old = (width / new_width, slant, -slant * place, 0.0, 1 / scale, baseline - place / scale)
    image = image.transform(
        (new_width, height), Image.Transform.AFFINE, to_old, Image.Resampling.BICUBIC, fillcolor=255
    )
    visible = boxes[:, 2] > boxes[:, 0]
    boxes = boxes.astype(np.float32, copy=True)
    boxes[:, 1::2] = (boxes[:, 1::2] - to_old[5]) * scale
    middles = (boxes[:, 1:2] + boxes[:, 3:4]) / 2
    boxes[:, 0::2] = (boxes[:, 0::2] - slant * (middles - place)) * (new_width / width)
    boxes[~visible] = 0
    if rng.random() < 0.10:
        image = black_and_white(image, rng)
    elif rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = _soiled(image, rng, toned=0.4, darkest=60, lightest=215, noisy=0.25)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), boxes


def _soiled(
    image: Image.Image, rng: np.random.Generator, *, toned: float, darkest: float, lightest: float, noisy: float
) -> np.ndarray:
    """Pixels `(H, W)` float32 with tones of ink (0 to `darkest`) and paper (`lightest` to 255) in a share `toned` of
    the cases, noise in a share `noisy`, specks of dirt in 3%."""
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < toned:
        dark, light = rng.uniform(0, darkest), rng.uniform(lightest, 255)
        pixels = dark + pixels * ((light - dark) / 255.0)
    if rng.random() < noisy:
        pixels = pixels + rng.normal(0.0, rng.uniform(1.0, 10.0), size=pixels.shape).astype(np.float32)
    if rng.random() < 0.03:
        pixels = np.where(rng.random(pixels.shape) < rng.uniform(0.0005, 0.004), pixels.min(), pixels)
    return pixels


def coarse(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """A picture of `factor` times the size, enlarged again: what a `Reader` makes of small type. Same size out."""
    if factor >= 1:
        return image
    small = max(4, round(image.width * factor)), max(4, round(image.height * factor))
    down = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)[int(rng.integers(3))]
    up = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)[int(rng.integers(3))]
    return image.resize(small, down).resize(image.size, up)


def black_and_white(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A bilevel scan at twice the resolution, brought back to grey: strokes as thick as the threshold makes them."""
    large = np.asarray(image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC), dtype=np.float32)
    dark, light = float(large.min()), float(large.max())
    level = dark + (light - dark) * rng.uniform(0.35, 0.75)
    scan = Image.fromarray(np.where(large > level, light, dark).astype(np.uint8))
    return scan.resize(image.size, Image.Resampling.BOX)


def composite_picture(image: Image.Image, rng: np.random.Generator | None, side: int) -> Image.Image:
    """A picture, transparent or not, on a plain background, `side` x `side` RGB.

    With a generator: random background (half of them white), scale 60-115%, place, mirroring, tone. Without: white,
    whole, centred, 92% of the side, as evaluation sees it.
    """
    image = image.convert("RGBA") if image.mode != "RGBA" else image
    if rng is None:
        background, scale, dx, dy = (255, 255, 255), 0.92, 0.5, 0.5
    else:
        background = (255, 255, 255)
        if rng.random() < 0.5:
            background = tuple(int(value) for value in rng.integers(90, 256, size=3))
        scale, dx, dy = rng.uniform(0.6, 1.15), rng.random(), rng.random()
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    factor = side * scale / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    image = image.resize(size, Image.Resampling.BILINEAR)
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    canvas.alpha_composite(
        image.crop((max(0, size[0] - side) // 2, max(0, size[1] - side) // 2, size[0], size[1])).crop(
            (0, 0, min(size[0], side), min(size[1], side))
        ),
        (round(max(0, side - size[0]) * dx), round(max(0, side - size[1]) * dy)),
    )
    rgb = canvas.convert("RGB")
    if rng is None:
        return rgb
    pixels = np.asarray(rgb, dtype=np.float32) * rng.uniform(0.8, 1.15) + rng.uniform(-15, 15)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
