"""How well an encoder knows pictures of kinds it was never trained on: k-NN, zero-shot naming, retrieval, linear CKA.

The pictures are ``pictures-validation`` of :mod:`training.data.pictures`: some fifty kinds, each drawn by several
hands. Two of them by one hand look alike for the hand's sake, so a picture finds its neighbours among other families
of style only. The chance level of a figure is about 1 / kinds.

These are the measures, on arrays; :mod:`training.evaluation.image_suite` runs them on subjects.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.pictures import compose
from training.evaluation.similarity import unit_length

BACKGROUNDS = ((255, 255, 255), (245, 245, 245), (230, 230, 230))  # white and two light greys, one fixed for a picture


def knn_names(features: np.ndarray, labels: Sequence, styles: Sequence, k: int = 5) -> np.ndarray:
    """What their ``k`` nearest neighbours of other styles name pictures.

    Args:
        features: (n, D), any scale; nearness is the cosine.
        labels: n kinds.
        styles: n families of style; a picture never finds a neighbour of its own.
        k: neighbours that vote. The most votes win; among equals, the larger sum of cosines.

    Returns:
        (n,) kinds.

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
    similarity = _across_styles(features, styles)
    if (np.isfinite(similarity).sum(axis=1) < k).any():
        raise ValueError(f"some pictures have fewer than k = {k} pictures of other styles to be compared with")
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    named = np.empty(len(features), dtype=labels.dtype)
    for i, neighbours in enumerate(nearest):
        kinds, votes = np.unique(labels[neighbours], return_inverse=True)
        count = np.bincount(votes)
        closeness = np.bincount(votes, weights=similarity[i, neighbours])
        named[i] = kinds[max(range(len(kinds)), key=lambda j: (count[j], closeness[j]))]
    return named


def knn_correct(features: np.ndarray, labels: Sequence, styles: Sequence, k: int = 5) -> np.ndarray:
    """(n,) bool, which pictures their neighbours name rightly. Arguments and errors as for :func:`knn_names`."""
    return knn_names(features, labels, styles, k) == np.asarray(labels)


def knn_weighted_correct(
    features: np.ndarray, labels: Sequence, styles: Sequence, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """Which pictures the weighted vote of their ``k`` nearest neighbours of other styles names rightly.

    A neighbour's vote weighs ``exp(cosine / temperature)``; k and temperature are those usual on ImageNet (Wu et al.,
    arXiv 1805.01978; DINO, arXiv 2104.14294).

    Args:
        features, labels, styles: as for :func:`knn_correct`.
        k: neighbours that vote; all of other styles where there are fewer.
        temperature: greater than 0; the smaller, the more the nearest decide.

    Returns:
        (n,) bool.

    Raises:
        ValueError: lengths differ, a value is not finite, or a picture has no picture of another style.
    """
    names, truth = np.unique(np.asarray(labels), return_inverse=True)
    similarity = _across_styles(features, styles)
    if len(similarity) != len(truth):
        raise ValueError(f"{len(similarity)} features with {len(truth)} labels")
    if not np.isfinite(similarity).any(axis=1).all():
        raise ValueError("some pictures have no picture of another style to be compared with")
    return weighted_vote(similarity, truth, len(names), k, temperature) == truth


def weighted_vote(
    similarity: np.ndarray, labels: np.ndarray, classes: int, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """(n,) the class that the ``k`` nearest of each row vote for, each by ``exp(cosine / temperature)``.

    Args:
        similarity: (n, m) cosines; ``-inf`` has no vote.
        labels: (m,) class numbers.
        classes: how many there are; among equals the lowest number wins.
    """
    k = min(k, similarity.shape[1])
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) / temperature)
    votes = np.zeros((len(similarity), classes))
    np.add.at(votes, (np.arange(len(similarity))[:, None], labels[nearest]), weights)
    return votes.argmax(axis=1)


def average_precision(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(n,) mean over a query's relevant items of the precision at the place of each, 0 to 1.

    Args:
        similarity: (n, m) of each query to each item; ``-inf`` is not in the query's gallery. Among equals what is not
            relevant stands first, so that constant features score little.
        relevant: (n, m) bool; NaN for a query without a relevant item in its gallery.
    """
    inside = np.isfinite(similarity)
    relevant = np.asarray(relevant, dtype=bool) & inside
    order = np.lexsort((relevant, -similarity), axis=1)  # by similarity, then False before True
    hits = np.take_along_axis(relevant, order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    count = hits.sum(axis=1)
    return np.where(count > 0, (precision * hits).sum(axis=1) / np.maximum(count, 1), np.nan)


def recalled(similarity: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """(n,) bool, whether a relevant item is among the ``k`` most similar of each query.

    Arguments as for :func:`average_precision`; an item as similar as the relevant one counts as more similar.
    """
    relevant = np.asarray(relevant, dtype=bool) & np.isfinite(similarity)
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    before = ((similarity >= best) & ~relevant).sum(axis=1)
    return relevant.any(axis=1) & (before < k)


def _across_styles(features: np.ndarray, styles: Sequence) -> np.ndarray:
    """(n, n) cosines, ``-inf`` between pictures of one style."""
    features, styles = np.asarray(features, dtype=np.float64), np.asarray(styles)
    if features.ndim != 2 or len(features) != len(styles):
        raise ValueError(f"features of shape (n, D) with n styles are needed; got {features.shape}, {len(styles)}")
    unit = _finite_unit_length(features, "features")
    similarity = unit @ unit.T  # (n, n)
    similarity[styles[:, None] == styles[None, :]] = -np.inf
    return similarity


def retrieval(features: np.ndarray, labels: Sequence, styles: Sequence) -> dict[str, np.ndarray]:
    """Each picture as a query for pictures of its kind among those of other styles.

    Args:
        features, labels, styles: as for :func:`knn_correct`.

    Returns:
        ``"map"`` (n,) average precisions, ``"recall1"`` and ``"recall5"`` (n,) whether one of its kind is among the 1
        and the 5 nearest; NaN where no picture of another style is of its kind.
    """
    similarity = _across_styles(features, styles)
    labels = np.asarray(labels)
    relevant = (labels[:, None] == labels[None, :]) & np.isfinite(similarity)
    found = {"map": average_precision(similarity, relevant)}
    for k in (1, 5):
        found[f"recall{k}"] = np.where(relevant.any(axis=1), recalled(similarity, relevant, k), np.nan)
    return found


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
    images = _finite_unit_length(images, "image embeddings")
    similarity = images @ _finite_unit_length(classes, "text embeddings").T  # (n, classes)
    right = similarity[np.arange(len(labels)), labels]
    return (similarity >= right[:, None]).sum(axis=1) - 1  # its own >= itself is taken off


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


def _finite_unit_length(vectors: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise ValueError(f"{what} hold values that are not finite")
    return unit_length(vectors)
