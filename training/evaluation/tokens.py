"""Tokens of pictures and documents at any scale: what the suites scale and retention look at beside pooled features.

A *side* is how large an input an encoder is given: a picture is that many pixels on a side; a document gets as many
patches as a square of that side, is shrunk where it needs more and never enlarged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from training.evaluation.contract import NeverMeasured, NotMeasured, Subject, Work, sorted_batches
from training.evaluation.features import as_array, encoded, precision
from training.evaluation.similarity import pool_grid

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Tokens:
    """Tokens of n items.

    Attributes:
        classes: (n, D) float32 class tokens, the patches' mean where there is none.
        patches: (n, rows * cols, D) float32 on one grid for all; or a list of n arrays (rows_i, cols_i, D).
        failed: (n,) bool, items at which the subject raised an error; rows of zeros, in a list None.
    """

    classes: np.ndarray
    patches: Any
    failed: np.ndarray


def x4_side(processor: Any) -> int:
    """Side in pixels of a square at x4: 4 times x1's as the side, twice as the area [paper: ambiguous]."""
    return math.isqrt(processor.area(processor.scale_factor))


def sized(processor: Any, side: int) -> Any:
    """The same image processor with another x1, so that ``scale=1`` means ``side``."""
    other = copy.copy(processor)
    other.base_size = side
    return other


def picture_tokens(subject: Subject, pictures: Any, side: int, grid: tuple[int, int], work: Work) -> Tokens:
    """Class tokens of a picture set and its patch tokens, pooled to ``grid`` where theirs is finer.

    Args:
        pictures: a :class:`~training.evaluation.features.PictureSet`.
        side: pixels, in whole patches of the encoder.
        grid: rows and columns wanted.

    Raises:
        NotMeasured: the encoder's grid is coarser, or it fails at every picture.
    """
    encoder = subject.encoder()
    own = side // encoder.patch_size
    if own < max(grid):
        raise NeverMeasured(f"{subject.name} has {own} x {own} patches at {side} px, fewer than {grid[0]} x {grid[1]}")

    def encode(images: list[Image.Image]) -> list[tuple[np.ndarray, np.ndarray]]:
        with precision(subject):
            classes, patches = encoder.tokens(images, side)
        return list(zip(as_array(classes), pool_grid(as_array(patches), (own, own), grid), strict=True))

    found: list[Any] = [None] * len(pictures)
    reason = ""
    for indices, outcome in encoded(subject, pictures, side, work, encode):
        if isinstance(outcome, str):
            reason = reason or outcome
            continue
        for index, pair in zip(indices, outcome, strict=True):
            found[index] = pair
    failed = np.array([pair is None for pair in found])
    if failed.all():
        raise NotMeasured(f"{subject.name} fails at all {len(found)} of {pictures.name}: {reason or 'no pictures'}")
    first = found[int(np.flatnonzero(~failed)[0])]
    classes, patches = (np.zeros((len(found), *part.shape), dtype=np.float32) for part in first)
    for index in np.flatnonzero(~failed):
        classes[index], patches[index] = found[index]
    return Tokens(classes, patches, failed)


def document_tokens(subject: Subject, images: Sequence[Image.Image], side: int, work: Work) -> Tokens:
    """Class tokens of documents and their patch tokens, each on its own grid; padding within a batch left out.

    Raises:
        NotMeasured: the encoder fails at every one.
    """
    encoder = subject.encoder()
    processor = sized(encoder.processor, side)

    def encode(indices: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        inputs = processor([images[index] for index in indices], kind="document", scale=1, return_tensors="pt")
        pixels, shapes = inputs["pixel_values"].to(encoder.device), inputs["spatial_shapes"]
        with precision(subject):
            classes, patches = padded_tokens(encoder, pixels, shapes)
        cols = pixels.shape[-1] // encoder.patch_size
        grids = as_array(patches).reshape(len(indices), -1, cols, patches.shape[-1])
        cut = [grid[:height, :width] for grid, (height, width) in zip(grids, shapes.tolist(), strict=True)]
        if classes is None:
            return [(each.mean(axis=(0, 1)), each) for each in cut]
        return list(zip(as_array(classes), cut, strict=True))

    found: list[Any] = [None] * len(images)
    reason = ""
    bar = work.bar(len(images), f"{subject.name}: documents at {side} px", "document")
    try:
        for batch in sorted_batches(images, work.batch_size, area=lambda image: image.size):
            for indices, outcome in tried(encode, batch):
                if isinstance(outcome, Exception):
                    reason = reason or f"{type(outcome).__name__}: {outcome}".splitlines()[0]
                    continue
                for index, pair in zip(indices, outcome, strict=True):
                    found[index] = pair
            bar.update(len(batch))
    finally:
        bar.close()
    failed = np.array([pair is None for pair in found])
    if failed.all():
        raise NotMeasured(f"{subject.name} fails at all {len(found)} documents: {reason or 'there are none'}")
    width = found[int(np.flatnonzero(~failed)[0])][0].shape
    classes = np.stack([np.zeros(width, np.float32) if pair is None else pair[0] for pair in found])
    return Tokens(classes, [None if pair is None else pair[1] for pair in found], failed)


def padded_tokens(encoder: Any, pixels: Any, shapes: Any) -> tuple[Any, Any]:
    """Class tokens (B, D), None where there are none, and patch tokens (B, N, D) of a padded batch."""
    from modeling_unit.architectures_unit import prefix_tokens, run_encoder

    model = tower(encoder)
    prefix = prefix_tokens(model.config)
    tokens = run_encoder(model, pixels, shapes).last_hidden_state
    return (tokens[:, 0] if prefix else None), tokens[:, prefix:]


def tower(encoder: Any) -> Any:
    """The vision model inside a full model, or the encoder's model itself."""
    return encoder.model.vision_model if hasattr(encoder.model, "encode") else encoder.model


def common_grids(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches of the same documents on grids of two scales, pooled to one: of either axis the coarser.

    Documents are padded to whole patches at each scale anew, so places agree to within a patch, not exactly.

    Args:
        one, other: n arrays (rows, cols, D) each.

    Returns:
        (T, D), (T, E), and (T,) the document of each row.
    """
    rows: list[tuple[np.ndarray, np.ndarray, int]] = []
    for index, (first, second) in enumerate(zip(one, other, strict=True)):
        grid = tuple(min(first.shape[axis], second.shape[axis]) for axis in (0, 1))
        pooled = [pool_grid(each.reshape(1, -1, each.shape[2]), each.shape[:2], grid)[0] for each in (first, second)]
        rows.append((*pooled, index))
    documents = np.concatenate([np.full(len(first), index) for first, _, index in rows])
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows]), documents


def tried(function: Callable, batch: Sequence[int]) -> Iterator[tuple[Sequence[int], Any]]:
    """(indices, what ``function`` makes of them): the whole batch, or one by one where that fails, errors included."""
    try:
        yield batch, function(batch)
        return
    except Exception as error:  # whatever a model raises at an odd input
        if len(batch) == 1:
            yield batch, error
            return
    for index in batch:
        try:
            yield [index], function([index])
        except Exception as error:
            yield [index], error
