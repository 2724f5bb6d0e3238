"""Light, seeded changes to training images, so that one stored chunk or picture is never seen twice alike [ours].

Every function takes a `numpy.random.Generator` and returns new data; same generator state, same result.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter


def augment_document(
    image: Image.Image, boxes: np.ndarray, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """Grayscale chunk and `(characters, 4)` boxes in pixels -> changed chunk, boxes scaled with it.

    Size 85-112% each way (x-height 7-13 px stays within what is readable), tone, blur, noise, 5% inverted.
    """
    width, height = image.size
    scale = rng.uniform(0.85, 1.12)
    new_width = max(8, round(width * scale * rng.uniform(0.94, 1.06)))
    new_height = max(8, round(height * scale))
    if rng.random() < 0.7 and (new_width, new_height) != image.size:
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        boxes = boxes * np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.6:
        dark, light = rng.uniform(0, 70), rng.uniform(185, 255)  # ink and paper tones
        pixels = dark + pixels * ((light - dark) / 255.0)
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0.0, rng.uniform(1.0, 10.0), size=pixels.shape).astype(np.float32)
    if rng.random() < 0.05:
        pixels = 255.0 - pixels
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), boxes


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
