"""How large an encoder's features are, and how unevenly: what decides whether they suit a language model.

A tower with activations of a standard deviation in the many tens, where one is usual, scored below CLIP in LLaVA
until a LayerNorm was put behind it (NVlabs/RADIO, issue 15). LLaVA-1.5 reads the second last layer, before any final
norm, so that layer is measured beside the last.

| figure | of the patch tokens x of all items, T tokens of D channels |
|---|---|
| activation_rms, activation_mean | root mean square and mean of all values |
| activation_largest, activation_p999 | largest magnitude; the 99.9th percentile of magnitudes |
| activation_channels | share of channels whose root mean square is above 10 times the median channel's [ours] |
| patch_norm, class_norm | mean length of a patch token and of a class token |
| outlier_tokens | share of patch tokens longer than 3 times the median token |

Outlier tokens are the artefacts that registers take up (arXiv 2309.16588, which cuts at a fixed length for each model;
the cut here is ours).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from training.evaluation.contract import Figure, Value

CHANNEL_CUT, TOKEN_CUT = 10.0, 3.0
SAMPLE = 65_536  # values of an item that the percentile is taken over, drawn at random where there are more  [ours]
LARGE = 10.0  # root mean square above which a note warns: between the usual one and RADIO's tens  [ours]


class ActivationStatistics:
    """Collects the figures item by item, so that no set of tokens need be in memory whole.

    Args:
        seed: of the values drawn for the percentile, and of the bootstraps.
    """

    def __init__(self, seed: int = 0):
        self._generator = np.random.default_rng(seed)
        self._seed = seed
        self._channels: np.ndarray | float = 0.0
        self._items: list[tuple[float, float, int]] = []  # sum of squares, sum, values
        self._norms: list[np.ndarray] = []
        self._classes: list[float] = []
        self._sample: list[np.ndarray] = []
        self._largest = 0.0

    def add(self, patches: np.ndarray, class_token: np.ndarray | None = None) -> None:
        """One item: patch tokens (N, D), and its class token (D,) where there is one."""
        values = np.asarray(patches, dtype=np.float64)
        squares = values**2
        self._channels = self._channels + squares.sum(axis=0)
        self._items.append((float(squares.sum()), float(values.sum()), values.size))
        self._norms.append(np.sqrt(squares.sum(axis=1)))
        magnitudes = np.abs(values).ravel()
        self._largest = max(self._largest, float(magnitudes.max()))
        drawn = magnitudes.size > SAMPLE
        self._sample.append(self._generator.choice(magnitudes, SAMPLE, replace=False) if drawn else magnitudes)
        if class_token is not None:
            self._classes.append(float(np.linalg.norm(np.asarray(class_token, dtype=np.float64))))

    def figures(self, at: Mapping[str, Value], groups: Sequence | None = None, failed: int = 0) -> Iterator[Figure]:
        """All figures of what was added.

        Args:
            at: what they were measured at.
            groups: one an item added, for the bootstrap; the extremes and the percentile have no interval.
            failed: items that could not be encoded; they are not among these.

        Raises:
            ValueError: nothing was added.
        """
        if not self._items:
            raise ValueError("there are no activations to describe")
        from training.evaluation.image import bootstrap_interval
        from training.evaluation.text import pooled

        items = np.array(self._items)  # (n, 3)
        number = items[:, 2].sum()
        common = {"items": len(items) + failed, "failed": failed, "at": dict(at), "better": ""}

        def ratio(sums: np.ndarray, counts: np.ndarray) -> list[float]:
            table = np.stack([sums, counts], axis=1)
            found = pooled(table, lambda totals: totals[:, 1:2] / totals[:, 2:3], groups, self._seed)
            return found[:, 0].tolist()

        square = ratio(items[:, 0], items[:, 2])
        yield Figure("activation_rms", *(max(0.0, end) ** 0.5 for end in square), unit="", **common)
        yield Figure("activation_mean", *ratio(items[:, 1], items[:, 2]), unit="", **common)
        yield Figure("activation_largest", self._largest, unit="", **common)
        sample = np.concatenate(self._sample)
        yield Figure("activation_p999", float(np.quantile(sample, 0.999)), unit="", **common)
        channels = np.sqrt(np.asarray(self._channels) / (number / np.size(self._channels)))
        large = channels > CHANNEL_CUT * np.median(channels)
        yield Figure("activation_channels", float(large.mean()), unit="share", **common)
        tokens = np.array([len(norms) for norms in self._norms])
        norms = np.concatenate(self._norms)
        lengths = np.array([each.sum() for each in self._norms])
        yield Figure("patch_norm", *ratio(lengths, tokens), unit="", **common)
        outliers = np.array([(each > TOKEN_CUT * np.median(norms)).sum() for each in self._norms])
        yield Figure("outlier_tokens", *ratio(outliers, tokens), unit="share", **common)
        if self._classes:
            interval = bootstrap_interval(self._classes, groups, seed=self._seed)
            yield Figure("class_norm", float(np.mean(self._classes)), *interval, unit="", **common)


def remark(name: str, rms: float, what: str) -> str:
    """One line about a root mean square, with what is known to be too large."""
    said = f"{name}: patch tokens of {what} have a root mean square of {rms:.2f}"
    if rms < LARGE:
        return said + "."
    return (
        said
        + "; about 1 is usual and tens have spoilt LLaVA (NVlabs/RADIO issue 15): put a LayerNorm behind the tower."
    )
