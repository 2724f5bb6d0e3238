"""Features of pictures, taken once: what the suites image, scale and retention all work on.

pictures = HeldOutPictures(folder)                     # of training.evaluation.picture_sets
features = picture_features(subject, pictures, resolution=256, work=work)
features["class token"], features["patch mean"]        # (n, D) each, float32
features.embeddings[""]                                # (n, 384): the subject's own way of naming
features.failed                                        # (n,) bool: rows of zeros, to be counted as wrong
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from training.evaluation.contract import NotMeasured, Subject, Work

if TYPE_CHECKING:
    from PIL import Image

CLASS_TOKEN, PATCH_MEAN = "class token", "patch mean"
FEATURES = (CLASS_TOKEN, PATCH_MEAN)
KEPT = 64  # sets of features held in memory, the oldest let go first; 476 pictures of width 256 are 2 MB  [ours]


class PictureSet(Protocol):
    """Pictures in a fixed order.

    Attributes:
        name: as a progress bar calls it.
        fingerprint: hash of the content and of the choice made from it.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def picture(self, index: int, side: int) -> Image.Image:
        """RGB picture of ``side`` by ``side`` pixels; any exception means that it cannot be read."""


@dataclass(frozen=True)
class Features:
    """What a subject makes of a set of pictures; ``features["class token"]`` is (n, D).

    Attributes:
        arrays: ``"class token"`` and ``"patch mean"`` -> (n, D) float32.
        embeddings: way of naming, as ``PictureEncoder.naming`` has it -> (n, width) float32.
        failed: (n,) bool, pictures that could not be read or that the subject raised an error at; rows of zeros.
        resolution: side in pixels that the pictures were seen at.
        root_mean_square, largest: of all values of all patch tokens, and the largest magnitude among them.
        reason: the first error in one line, ``""`` without one.
    """

    arrays: Mapping[str, np.ndarray]
    embeddings: Mapping[str, np.ndarray]
    failed: np.ndarray
    resolution: int
    root_mean_square: float
    largest: float
    reason: str = ""

    def __getitem__(self, feature: str) -> np.ndarray:
        return self.arrays[feature]


_memory: dict[tuple, Features] = {}


def picture_features(
    subject: Subject, pictures: PictureSet, resolution: int | None = None, work: Work | None = None
) -> Features:
    """Class token, mean of the patch tokens and embeddings of every picture, in float32.

    Held in memory by the hashes of subject and pictures and by the resolution: whoever asks again gets the same
    arrays, which are read-only.

    Args:
        subject: one that can ENCODE.
        pictures: the set.
        resolution: side in pixels at which the subject sees the pictures, made whole patches; None for its own.
        work: batch size and progress bar.

    Raises:
        NotMeasured: the subject fails at every picture, or the set is empty.
    """
    work = work or Work(progress=False)
    encoder = subject.encoder()
    side = whole_patches(encoder, resolution)
    key = (subject.hash(), subject.device, pictures.fingerprint, side)
    if key in _memory:
        return _memory[key]
    tokens: dict[str, np.ndarray] = {}
    embeddings: dict[str, np.ndarray] = {}
    failed = np.ones(len(pictures), dtype=bool)
    squares = values = largest = 0.0
    reason = ""
    for indices, found in encoded(subject, pictures, side, work, lambda images: _features(subject, images, side)):
        if isinstance(found, str):
            reason = reason or found
            continue
        for store, parts in ((tokens, found[0]), (embeddings, found[1])):
            for name, part in parts.items():
                if name not in store:
                    store[name] = np.zeros((len(pictures), part.shape[1]), dtype=np.float32)
                store[name][indices] = part
        failed[indices] = False
        squares, values, largest = squares + found[2], values + found[3], max(largest, found[4])
    if failed.all():
        raise NotMeasured(f"{subject.name} fails at all {len(pictures)} of {pictures.name}: {reason or 'no pictures'}")
    for array in (*tokens.values(), *embeddings.values(), failed):
        array.flags.writeable = False
    features = Features(tokens, embeddings, failed, side, (squares / max(1, values)) ** 0.5, largest, reason)
    while len(_memory) >= KEPT:
        del _memory[next(iter(_memory))]
    _memory[key] = features
    return features


def whole_patches(encoder: Any, resolution: int | None) -> int:
    """The side in pixels that an encoder makes of a wanted one: whole patches, one at least; None for its own."""
    if resolution is None or resolution == encoder.resolution:
        return encoder.resolution
    return max(1, round(resolution / encoder.patch_size)) * encoder.patch_size


def encoded(
    subject: Subject, pictures: PictureSet, side: int, work: Work, encode: Callable[[list[Image.Image]], Any]
) -> Iterator[tuple[list[int], Any]]:
    """(indices, what ``encode`` made of these pictures), batch by batch, in order.

    A batch that fails is tried picture by picture; what fails alone comes as ([index], the reason in one line, a str).
    """
    bar = work.bar(len(pictures), f"{subject.name}: {pictures.name} at {side} px", "picture")
    try:
        for start in range(0, len(pictures), work.batch_size):
            indices, images = [], []
            for index in range(start, min(start + work.batch_size, len(pictures))):
                try:
                    images.append(pictures.picture(index, side))
                    indices.append(index)
                except Exception as error:  # whatever a broken file makes a decoder raise
                    yield [index], _line(error)
            try:
                if images:
                    yield indices, encode(images)
            except Exception as error:
                if len(images) == 1:
                    yield indices, _line(error)
                else:
                    for index, image in zip(indices, images, strict=True):
                        try:
                            yield [index], encode([image])
                        except Exception as alone:
                            yield [index], _line(alone)
            bar.update(min(work.batch_size, len(pictures) - start))
    finally:
        bar.close()


def _features(subject: Subject, images: list[Image.Image], side: int):
    """Tokens, embeddings, and the sum of squares, number and largest magnitude of the patch tokens' values."""
    encoder = subject.encoder()
    with precision(subject):
        prefix, patches = encoder.tokens(images, side)
        embeddings = {way: as_array(name(prefix)) for way, name in encoder.naming.items()}
    tokens = {CLASS_TOKEN: as_array(prefix), PATCH_MEAN: as_array(patches.mean(dim=1))}  # in the model's own precision
    patches = patches.float()
    for array in (*tokens.values(), *embeddings.values()):
        if not np.isfinite(array).all():
            raise ValueError("the features hold values that are not finite")
    return tokens, embeddings, float(patches.square().sum()), patches.numel(), float(patches.abs().max())


@contextlib.contextmanager
def precision(subject: Subject):
    """bfloat16 where the matrix products run on a GPU, and no gradients anywhere."""
    import torch

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=subject.device.startswith("cuda")):
        yield


def as_array(tensor: Any) -> np.ndarray:
    """A tensor of any device and precision as float32."""
    return tensor.detach().float().cpu().numpy()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
