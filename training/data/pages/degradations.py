"""What print, paper, cameras and files do to a page: separate functions, each seeded, each with a stated strength.

Each takes a `Page`, a strength in (0, 1] and a generator and returns a new `Page` of the same size; the page given is
left alone. What 1 means is said in each docstring; all ranges are ours. `rotation` and `perspective` move the boxes
with the pixels. Limits keep the text legible: nothing makes an x-height smaller than `LEGIBLE` pixels.

Pixels are whole numbers throughout, (H, W) or (H, W, 3) uint8, and so is the arithmetic: at 448 x 448 grey the mean
page costs two milliseconds.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageFilter

LEGIBLE = 3.5  # px of x-height
INVERTED_SHARE = 0.10


@dataclass
class Page:
    """A drawn page.

    Args:
        pixels: (H, W) or (H, W, 3) uint8.
        boxes: (N, 4) float, left, top, right, bottom of each character in pixels; four zeros for white space.
        x_height: of the running text, pixels.
        ink, paper: their grey levels.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    x_height: float
    ink: int = 0
    paper: int = 255


def ink_and_paper(rng: np.random.Generator) -> tuple[float, float]:
    """Grey levels of ink and paper: near-black on near-white, 15% low in contrast (60-110 levels), 10% inverted."""
    if rng.random() < 0.15:
        dark = rng.uniform(20, 140)
        light = dark + rng.uniform(60, 110)
    else:
        dark, light = rng.uniform(0, 80), rng.uniform(195, 255)
    return (light, dark) if rng.random() < INVERTED_SHARE else (dark, light)


# ------------------------------------------------------------------------------------------------------------ kernels


def gaussian_blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Pillow's Gaussian blur of uint8 pixels."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def resample(pixels: np.ndarray, factor: float) -> np.ndarray:
    """uint8 pixels scaled down to ``factor`` of their size and up again."""
    height, width = pixels.shape[:2]
    small = (max(1, int(width * factor)), max(1, int(height * factor)))
    image = Image.fromarray(pixels).resize(small, Image.Resampling.BILINEAR)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """A JPEG file of uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def field(rng: np.random.Generator, shape: tuple[int, ...], cell: float) -> np.ndarray:
    """(H, W) uint8: a smooth field of random values, one drawn every ``cell`` pixels, evenly from 0 to 255."""
    height, width = shape[:2]
    coarse = rng.integers(0, 256, size=(int(height / cell) + 2, int(width / cell) + 2), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def shifted(pixels: np.ndarray, change: np.ndarray) -> np.ndarray:
    """``pixels`` plus ``change`` (int16, (H, W) or the pixels' shape), kept within 0 to 255."""
    if change.ndim < pixels.ndim:
        change = change[..., None]
    total = pixels + change
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


def _over(small: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return small[..., None] if pixels.ndim == 3 else small


# ------------------------------------------------------------------------------------------------- ink, paper, light


def ink_bleed(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """Ink that spreads: each pixel goes up to 70% of the way to the inkiest of itself and its four neighbours."""
    inkier = np.minimum if page.ink < page.paper else np.maximum
    pixels, spread = page.pixels, page.pixels.copy()
    for out, source in ((np.s_[1:], np.s_[:-1]), (np.s_[:-1], np.s_[1:])):
        inkier(spread[out], pixels[source], out=spread[out])
        inkier(spread[:, out], pixels[:, source], out=spread[:, out])
    return replace(page, pixels=_mixed(pixels, spread, int(180 * strength)))


def ink_fade(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """Ink that wore off in places: up to 55% of the way to the paper, by a field of cells of 1 to 8 x-heights."""
    worn = field(rng, page.pixels.shape, max(page.x_height, 4) * rng.uniform(1, 8))
    amount = (worn.astype(np.uint16) * int(140 * strength)) >> 8  # of 256
    paper = np.uint16(page.paper)
    pixels = page.pixels.astype(np.uint16)
    pixels *= _over(256 - amount, pixels)
    pixels += _over(amount * paper, pixels)
    pixels >>= 8
    return replace(page, pixels=pixels.astype(np.uint8))


def paper_stain(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """Uneven paper: a smooth field up to 20 levels up or down in cells of 6 to 64 px, and fibres of up to 5 levels."""
    stain = field(rng, page.pixels.shape, rng.uniform(6, 64)).astype(np.int16) - 128
    stain *= int(40 * strength) + 1
    stain >>= 8
    height, width = page.pixels.shape[:2]
    rows = rng.integers(-128, 128, size=(height, 1), dtype=np.int16) * int(5 * strength + 0.5)
    columns = rng.integers(-128, 128, size=(1, width), dtype=np.int16) * int(5 * strength + 0.5)
    stain += rows >> 8
    stain += columns >> 8
    return replace(page, pixels=shifted(page.pixels, stain))


def show_through(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """The back of the sheet: the page mirrored, moved and smoothed, with up to 18% of its ink."""
    back = np.roll(page.pixels[:, ::-1], rng.integers(3, 3 + max(page.pixels.shape[0] // 2, 1)), axis=0)
    back = np.asarray(Image.fromarray(np.ascontiguousarray(back)).reduce(2).resize(back.shape[1::-1]))
    change = back.astype(np.int16) - np.int16(page.paper)
    change *= int(46 * strength) + 1
    change >>= 8
    return replace(page, pixels=shifted(page.pixels, change))


def shadow(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """A hand's or a fold's shadow: light falls off across the page to 45% of itself at the darkest, softly."""
    height, width = page.pixels.shape[:2]
    angle, turn = rng.uniform(0, 2 * np.pi), rng.uniform(2.0, 8.0)
    y, x = np.ogrid[-1:1:17j, -1:1:17j]
    across = x * np.cos(angle) + y * np.sin(angle) + 0.15 * rng.standard_normal((17, 17)).cumsum(0) / 4
    dark = 1 / (1 + np.exp(-turn * (across - rng.uniform(-0.6, 0.6))))
    light = Image.fromarray((255 * (1 - 0.55 * strength * dark)).astype(np.uint8))
    light = np.asarray(light.resize((width, height), Image.Resampling.BICUBIC)).astype(np.uint16)
    return replace(page, pixels=((page.pixels * _over(light + 1, page.pixels)) >> 8).astype(np.uint8))


def _mixed(pixels: np.ndarray, other: np.ndarray, amount: int) -> np.ndarray:
    """``amount`` of 256 parts of ``other``, the rest ``pixels``."""
    return ((pixels.astype(np.uint16) * (256 - amount) + other.astype(np.uint16) * amount) >> 8).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- geometry


def rotation(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """A page laid askew: up to 4 degrees either way about the middle, made smaller where ink would leave the sheet."""
    return warped(page, rotation_matrix(page, strength, rng), rng)


def perspective(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """A page seen from the side: each corner up to 8% of the sides off its place, ink kept on the sheet."""
    return warped(page, perspective_matrix(page, strength, rng), rng)


def rotation_matrix(page: Page, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(3, 3): where `rotation` puts a point (x, y, 1)."""
    height, width = page.pixels.shape[:2]
    angle = np.deg2rad(rng.uniform(-4, 4) * strength)
    cosine, sine = np.cos(angle), np.sin(angle)
    middle = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return middle @ turn @ np.linalg.inv(middle)


def perspective_matrix(page: Page, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(3, 3): where `perspective` puts a point (x, y, 1), up to the common factor of the result."""
    height, width = page.pixels.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=float)
    moved = corners + rng.uniform(-0.08, 0.08, size=(4, 2)) * strength * (width, height)
    return homography(corners, moved)


def homography(corners: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """(3, 3): the projective map that takes four ``corners`` (4, 2) to ``moved`` (4, 2)."""
    rows = []
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return np.append(np.linalg.solve(np.array(rows), np.asarray(moved, dtype=float).reshape(-1)), 1.0).reshape(3, 3)


def apply_homography(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(..., 2) points -> (..., 2)."""
    mapped = points.reshape(-1, 2) @ matrix[:, :2].T + matrix[:, 2]  # as one matrix: many small products are slow
    return (mapped[:, :2] / mapped[:, 2:]).reshape(points.shape)


def warped(page: Page, matrix: np.ndarray, rng: np.random.Generator) -> Page:
    """The page under ``matrix``, shrunk and moved by as much as keeps all boxes on the sheet, boxes likewise.

    Beyond the sheet's edge is paper, or in two of five pages a dark table.
    """
    height, width = page.pixels.shape[:2]
    inked = page.boxes.any(axis=1)
    boxes = np.zeros_like(page.boxes, dtype=float)
    scale = 1.0
    if inked.any():
        given = page.boxes[inked]
        mapped = apply_homography(matrix, np.stack([given[:, at] for at in ([0, 1], [2, 1], [2, 3], [0, 3])]))
        near, far = mapped.min(axis=0), mapped.max(axis=0)
        low, high = near.min(axis=0), far.max(axis=0)
        room = np.array([width, height]) - 2.0
        scale = min(1.0, *(room / (high - low)))
        start = np.clip(low * scale + (1 - scale) * np.array([width, height]) / 2, 1, None)
        start = np.minimum(start, 1 + room - (high - low) * scale)
        shift = start - low * scale
        boxes[inked] = np.concatenate([near * scale + shift, far * scale + shift], axis=1)
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]]) @ matrix
    back = np.linalg.inv(matrix)
    back /= back[2, 2]
    fill = page.paper if rng.random() < 0.6 else int(rng.integers(0, 90))
    image = Image.fromarray(page.pixels)
    image = image.transform(
        (width, height),
        Image.Transform.PERSPECTIVE,
        back.reshape(-1)[:8].tolist(),
        Image.Resampling.BILINEAR,
        fillcolor=fill if page.pixels.ndim == 2 else (fill,) * 3,
    )
    return replace(page, pixels=np.asarray(image), boxes=boxes, x_height=page.x_height * scale)


# ----------------------------------------------------------------------------------------------------- camera and file


def blur(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """Out of focus: Gaussian with a standard deviation of up to 1.2 px, at most 0.14 x-heights."""
    deviation = strength * min(1.2, 0.14 * page.x_height)
    return replace(page, pixels=_smoothed(page.pixels, deviation))


def _smoothed(pixels: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur in whole numbers, kernel of 256 parts and up to seven taps, the edge repeated."""
    reach = 3 if deviation > 0.8 else 2 if deviation > 0.4 else 1
    taps = np.exp(-0.5 * (np.arange(reach + 1) / max(deviation, 1e-3)) ** 2)
    taps = np.round(256 * taps / (taps[0] + 2 * taps[1:].sum())).astype(np.uint16)
    taps[0] = 256 - 2 * taps[1:].sum()
    for axis in (0, 1):
        size = pixels.shape[axis]
        pad = [(reach, reach) if dimension == axis else (0, 0) for dimension in range(pixels.ndim)]
        wide = np.pad(pixels, pad, mode="edge").astype(np.uint16)
        at = [wide[k : k + size] if axis == 0 else wide[:, k : k + size] for k in range(2 * reach + 1)]
        total = at[reach] * taps[0]
        for offset in range(1, reach + 1):
            total += (at[reach + offset] + at[reach - offset]) * taps[offset]
        total += 128
        total >>= 8
        pixels = total.astype(np.uint8)
    return pixels


def low_resolution(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """A scan at too few dots an inch: scaled down to half the size and up again, x-height kept above `LEGIBLE`."""
    factor = max(1 - 0.5 * strength, min(LEGIBLE / max(page.x_height, 1), 1.0))
    return replace(page, pixels=resample(page.pixels, factor)) if factor < 1 else page


# What a random byte stands for: 256 values of equal chance of the normal distribution.
_NORMAL = np.array([NormalDist().inv_cdf((level + 0.5) / 256) for level in range(256)])


def noise(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """White noise with a standard deviation of up to 16 grey levels."""
    table = np.round(16 * strength * _NORMAL).astype(np.int16)
    random = np.frombuffer(rng.bytes(page.pixels.size), dtype=np.uint8).reshape(page.pixels.shape)
    return replace(page, pixels=shifted(page.pixels, table.take(random)))


def jpeg(page: Page, strength: float, rng: np.random.Generator) -> Page:
    """Through JPEG at a quality of 90 down to 25."""
    return replace(page, pixels=np.asarray(Image.open(io.BytesIO(encode_jpeg(page.pixels, jpeg_quality(strength))))))


def jpeg_quality(strength: float) -> int:
    """The quality that `jpeg` has at ``strength``."""
    return round(90 - 65 * strength)


# Name: (chance, function), in the order in which they happen to a page.
DEGRADATIONS: dict[str, tuple[float, Callable[[Page, float, np.random.Generator], Page]]] = {
    "ink_bleed": (0.15, ink_bleed),
    "ink_fade": (0.15, ink_fade),
    "show_through": (0.07, show_through),
    "paper_stain": (0.25, paper_stain),
    "rotation": (0.15, rotation),
    "perspective": (0.12, perspective),
    "shadow": (0.15, shadow),
    "blur": (0.25, blur),
    "low_resolution": (0.12, low_resolution),
    "noise": (0.25, noise),
    "jpeg": (0.40, jpeg),
}
GEOMETRY = {"rotation": rotation_matrix, "perspective": perspective_matrix}
CLEAN_SHARE = 0.25


@dataclass(frozen=True)
class Chosen:
    """A degradation that happens to a page: its name, how strongly, and the seed of its own draws."""

    name: str
    strength: float
    seed: int

    def rng(self) -> np.random.Generator:
        """For the degradation's draws."""
        return np.random.default_rng(self.seed)


def draw_degradations(rng: np.random.Generator, names: Collection[str]) -> list[Chosen]:
    """Which of ``names`` happen to a page, in order: each by its own chance, its strength even in (0, 1].

    A quarter of the pages stay clean (`CLEAN_SHARE`). One that is switched off changes nothing about the others, but
    for this: noise is what cameras and scanners leave in JPEG files, so that a noisy page goes through JPEG as well.
    """
    dice = rng.random((len(DEGRADATIONS), 2))
    seeds = rng.integers(2**62, size=len(DEGRADATIONS))
    if rng.random() < CLEAN_SHARE:
        return []
    chosen: list[Chosen] = []
    for (name, (chance, _)), (drawn, strength), seed in zip(DEGRADATIONS.items(), dice, seeds, strict=True):
        noisy = name == "jpeg" and any(step.name == "noise" for step in chosen)
        if name in names and (drawn < chance or noisy):
            chosen.append(Chosen(name, 1.0 - float(strength), int(seed)))
    return chosen


def degrade(page: Page, chosen: list[Chosen]) -> Page:
    """``page`` after what `draw_degradations` chose; rotation and perspective together are one resampling."""
    matrix = np.eye(3)
    geometry = [step for step in chosen if step.name in GEOMETRY]
    for step in chosen:
        if step.name not in GEOMETRY:
            page = DEGRADATIONS[step.name][1](page, step.strength, step.rng())
            continue
        rng = step.rng()
        matrix = GEOMETRY[step.name](page, step.strength, rng) @ matrix
        if step is geometry[-1]:
            page = warped(page, matrix, rng)
    return page
