"""How well an encoder knows pictures of kinds it was never trained on: k-NN, zero-shot naming, linear CKA.

The pictures are ``pictures-validation`` of :mod:`training.data.pictures`: some fifty kinds, each drawn by several
hands. Two of them by one hand look alike for the hand's sake, so a picture finds its neighbours among other families
of style only. The chance level of a figure is about 1 / kinds.

    for name, value, low, high in evaluate_images(encode, None, folder, resolution=128):
        print(f"{name} {value:.3f} [{low:.3f}, {high:.3f}]")
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.pictures import compose

BACKGROUNDS = ((255, 255, 255), (245, 245, 245), (230, 230, 230))  # white and two light greys, one fixed for a picture


def knn_correct(features: np.ndarray, labels: Sequence, styles: Sequence, k: int = 5) -> np.ndarray:
    """Which pictures their ``k`` nearest neighbours of other styles name rightly.

    Args:
        features: (n, D), any scale; nearness is the cosine.
        labels: n kinds.
        styles: n families of style; a picture never finds a neighbour of its own.
        k: neighbours that vote. The most votes win; among equals, the larger sum of cosines.

    Returns:
        (n,) bool.

    Raises:
        ValueError: lengths differ, a value is not finite, or a picture has fewer than ``k`` pictures of other styles.
    """
    features = np.asarray(features, dtype=np.float64)
    labels, styles = np.asarray(labels), np.asarray(styles)
    if features.ndim != 2 or not len(features) == len(labels) == len(styles):
        raise ValueError(
            f"features of shape (n, D) with n labels and n styles are needed; got {features.shape}, {len(labels)} "
            f"labels and {len(styles)} styles"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    unit = _unit(features, "features")
    similarity = unit @ unit.T  # (n, n)
    similarity[styles[:, None] == styles[None, :]] = -np.inf
    if (np.isfinite(similarity).sum(axis=1) < k).any():
        raise ValueError(f"some pictures have fewer than k = {k} pictures of other styles to be compared with")
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    correct = np.zeros(len(features), dtype=bool)
    for i, neighbours in enumerate(nearest):
        kinds, votes = np.unique(labels[neighbours], return_inverse=True)
        count = np.bincount(votes)
        closeness = np.bincount(votes, weights=similarity[i, neighbours])
        best = max(range(len(kinds)), key=lambda j: (count[j], closeness[j]))
        correct[i] = kinds[best] == labels[i]
    return correct


def knn_accuracy(features: np.ndarray, labels: Sequence, styles: Sequence, k: int = 5) -> float:
    """Share of pictures that leave-one-style-out k-NN names rightly, 0 to 1. See :func:`knn_correct`."""
    return float(knn_correct(features, labels, styles, k).mean())


def zero_shot_ranks(image_embeds: np.ndarray, class_text_embeds: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """(n,) the place, from 0, of the right class when classes are ordered by cosine with the picture.

    A class as near as the right one counts as nearer, so that constant embeddings score nothing.

    Args:
        image_embeds: (n, D).
        class_text_embeds: (classes, D), a row for every class.
        labels: n row numbers of ``class_text_embeds``.

    Raises:
        ValueError: shapes do not fit, or a label names no row.
    """
    images, classes = np.asarray(image_embeds, dtype=np.float64), np.asarray(class_text_embeds, dtype=np.float64)
    labels = np.asarray(labels)
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1] or len(images) != len(labels):
        raise ValueError(
            f"(n, D) pictures, (classes, D) texts and n labels are needed; got {images.shape}, {classes.shape} and "
            f"{len(labels)} labels"
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(classes)):
        raise ValueError(f"labels must lie in [0, {len(classes)}), but go from {labels.min()} to {labels.max()}")
    similarity = _unit(images, "image embeddings") @ _unit(classes, "text embeddings").T  # (n, classes)
    right = similarity[np.arange(len(labels)), labels]
    return (similarity >= right[:, None]).sum(axis=1) - 1  # its own >= itself is taken off


def zero_shot_accuracy(
    image_embeds: np.ndarray, class_text_embeds: np.ndarray, labels: Sequence[int]
) -> dict[str, float]:
    """``{"top1": share, "top5": share}`` of pictures whose right class is among the 1 and the 5 nearest texts."""
    ranks = zero_shot_ranks(image_embeds, class_text_embeds, labels)
    return {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}


def linear_cka(one: np.ndarray, other: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of features of the same pictures (Kornblith et al., 1905.00414).

    Args:
        one: (n, D).
        other: (n, E).

    Returns:
        0 (unrelated) to 1 (equal up to rotation, shift and scale).

    Raises:
        ValueError: the numbers of rows differ, or either set is constant.
    """
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"two matrices with a row per picture are needed; got {x.shape} and {y.shape}")
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    if scale == 0:
        raise ValueError("CKA of constant features is not defined")
    return float(np.linalg.norm(x.T @ y) ** 2 / scale)


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: n numbers or booleans.
        groups: n group names; whole groups are drawn, because pictures of one kind succeed and fail together. Without
            it single values are drawn, which is right only when they are independent.
        level: share of the distribution between the ends.
        samples: draws.
        seed: of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: nothing to draw from, or lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError("at least one value is needed for an interval")
    names = np.arange(len(values)) if groups is None else np.asarray(groups)
    if len(names) != len(values):
        raise ValueError(f"{len(values)} values with {len(names)} groups")
    _, index = np.unique(names, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    draws = np.random.default_rng(seed).integers(0, len(sums), (samples, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def read_validation(folder: Path) -> tuple[list[dict], list[str], np.ndarray]:
    """Rows, class names and class text embeddings (classes, 384) of a ``pictures-validation`` folder.

    Raises:
        ValueError: a file is missing; the message says which command makes it.
    """
    from safetensors.numpy import load_file

    from training.data.targets import rows

    folder = Path(folder)
    for file, command in (
        ("concept_names.json", "unit data pictures"),
        ("concept_sentence.safetensors", "unit data targets"),
    ):
        if not (folder / file).exists():
            raise ValueError(
                f"{folder / file} does not exist: the image suite needs what `{command}` builds, pictures of kinds "
                "that nobody trains on, each drawn by several hands; for other pictures leave the suite out"
            )
    names = json.loads((folder / "concept_names.json").read_text(encoding="utf-8"))
    embeddings = load_file(folder / "concept_sentence.safetensors")["embeddings"]
    return list(rows(folder, ["image", "text", "concept", "style", "family"])), names, embeddings


def validation_picture(row: dict, resolution: int) -> Image.Image:
    """The RGB picture of a row, square, on the background that its path decides."""
    background = BACKGROUNDS[zlib.crc32(row["image"]["path"].encode()) % len(BACKGROUNDS)]
    return compose(Image.open(io.BytesIO(row["image"]["bytes"])), resolution, background)


def evaluate_images(
    encode_fn: Callable[[list[Image.Image]], np.ndarray],
    zero_shot_fn: Callable[[list[Image.Image]], np.ndarray] | None,
    folder: Path,
    resolution: int,
    batch: int = 64,
    k: int = 5,
) -> Iterator[tuple[str, float, float, float]]:
    """Score an encoder on the held-out kinds.

    Args:
        encode_fn: RGB pictures of ``resolution`` squared -> (n, D) features, array or tensor.
        zero_shot_fn: RGB pictures -> (n, 384) embeddings in the space of the sentence encoder; None leaves zero-shot
            naming out.
        folder: ``pictures-validation``.
        resolution: side of the pictures, px.
        batch: pictures at a time.
        k: neighbours that vote.

    Yields:
        (name, value, low, high): ``knn_accuracy``, ``knn_accuracy_photographs`` (those queries that are photographs),
        ``zero_shot_top1``, ``zero_shot_top5``, each from 0 to 1 with a 95% interval bootstrapped over kinds.
    """
    content, names, class_embeds = read_validation(folder)
    kinds = [row["concept"] for row in content]
    features, embeds = [], []
    for start in tqdm(range(0, len(content), batch), desc="held-out pictures", unit=" batches", mininterval=2.0):
        pictures = [validation_picture(row, resolution) for row in content[start : start + batch]]
        features.append(_array(encode_fn(pictures)))
        if zero_shot_fn is not None:
            embeds.append(_array(zero_shot_fn(pictures)))
    correct = knn_correct(np.concatenate(features), kinds, [row["family"] for row in content], k)
    yield ("knn_accuracy", float(correct.mean()), *bootstrap_interval(correct, kinds))
    photographs = np.array([row["style"] == "gcompris-photo" for row in content])
    if photographs.any():
        some = correct[photographs]
        interval = bootstrap_interval(some, np.array(kinds)[photographs])
        yield ("knn_accuracy_photographs", float(some.mean()), *interval)
    if zero_shot_fn is not None:
        ranks = zero_shot_ranks(np.concatenate(embeds), class_embeds, [names.index(kind) for kind in kinds])
        for top in (1, 5):
            yield (f"zero_shot_top{top}", float((ranks < top).mean()), *bootstrap_interval(ranks < top, kinds))


def _array(features) -> np.ndarray:
    """A numpy float32 array of an array or a tensor (bfloat16 included)."""
    if hasattr(features, "detach"):
        features = features.detach().float().cpu().numpy()
    return np.asarray(features, dtype=np.float32)


def _unit(vectors: np.ndarray, what: str) -> np.ndarray:
    """Rows made of length 1; a zero row stays zero."""
    if not np.isfinite(vectors).all():
        raise ValueError(f"{what} hold values that are not finite")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)
