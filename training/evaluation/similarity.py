"""How alike two sets of features of the same items are: CKA, its debiased form, common neighbours, cosines.

Nothing here knows models: (n, D) and (n, E) arrays in, numbers out.

| measure | range | equal up to | source |
|---|---|---|---|
| linear CKA | 0 to 1 | rotation, shift, one scale | Kornblith et al., arXiv 1905.00414 |
| debiased linear CKA | about 0 to 1 | the same | unbiased HSIC, Song et al., JMLR 2012; arXiv 2010.15327 |
| mutual nearest neighbours | 0 to 1 | whatever keeps cosines in order | Huh et al., arXiv 2405.07987 |
| cosine | -1 to 1 | length alone | |

Linear CKA of n items of width D is above 0 for unrelated features, by about D / n where n is not far above D; the
debiased form is not. A bootstrap is no way to an interval of either: a drawn set holds items twice, and an item is
more like itself than any two are. Both get a jackknife over groups instead, see :func:`cka_interval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

NEIGHBOURS = 10  # arXiv 2405.07987, sec. 2.2


@dataclass
class _Moments:
    """Sums over items that both forms of CKA are functions of; those of two sets of items add up.

    With x (D,) and y (E,) the features of one item.
    """

    n: np.ndarray  # ()
    x: np.ndarray  # (D,)
    y: np.ndarray  # (E,)
    xx: np.ndarray  # (D, D)
    yy: np.ndarray  # (E, E)
    xy: np.ndarray  # (D, E)
    x_by_xx: np.ndarray  # (D,) sum of x |x|^2
    y_by_yy: np.ndarray  # (E,)
    x_by_yy: np.ndarray  # (D,) sum of x |y|^2
    y_by_xx: np.ndarray  # (E,)
    xx_xx: np.ndarray  # () sum of |x|^4
    yy_yy: np.ndarray  # ()
    xx_yy: np.ndarray  # () sum of |x|^2 |y|^2

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> _Moments:
        p, q = (x * x).sum(axis=1), (y * y).sum(axis=1)
        sums = (
            x.sum(axis=0),
            y.sum(axis=0),
            x.T @ x,
            y.T @ y,
            x.T @ y,
            p @ x,
            q @ y,
            q @ x,
            p @ y,
            p @ p,
            q @ q,
            p @ q,
        )
        return cls(np.array(float(len(x))), *map(np.asarray, sums))

    def less(self, other: _Moments) -> _Moments:
        return _Moments(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def cka(self) -> float:
        if self.n < 2:
            raise ValueError("CKA needs two items at least beside each group")
        x_xx = self.xx - np.outer(self.x, self.x) / self.n
        y_yy = self.yy - np.outer(self.y, self.y) / self.n
        x_y = self.xy - np.outer(self.x, self.y) / self.n
        return _ratio((x_y**2).sum(), (x_xx**2).sum(), (y_yy**2).sum())

    def debiased_cka(self) -> float:
        if self.n < 4:
            raise ValueError("debiased CKA needs four items at least beside each group")
        one = (self.x, self.x_by_xx, np.trace(self.xx))
        other = (self.y, self.y_by_yy, np.trace(self.yy))
        hsic_xy = _hsic(self.n, self.xy, self.xx_yy, one, other, self.x_by_yy, self.y_by_xx)
        hsic_xx = _hsic(self.n, self.xx, self.xx_xx, one, one, self.x_by_xx, self.x_by_xx)
        hsic_yy = _hsic(self.n, self.yy, self.yy_yy, other, other, self.y_by_yy, self.y_by_yy)
        return _ratio(hsic_xy, hsic_xx, hsic_yy)


def _hsic(n, cross, squares, one, other, x_by_qq, y_by_pp) -> float:
    """Unbiased HSIC of linear kernels K = X X' and L = Y Y' with their diagonals struck out, up to the factor
    1 / (n (n - 3)) that a ratio of three does not see:

        tr(K L) + 1'K1 1'L1 / ((n - 1) (n - 2)) - 2 / (n - 2) 1'KL1
    """
    x, _, p = one
    y, _, q = other
    trace = (cross**2).sum() - squares
    sums = (x @ x - p) * (y @ y - q)
    rows = x @ cross @ y - x @ x_by_qq - y @ y_by_pp + squares
    return trace + sums / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)


def _ratio(cross: float, one: float, other: float) -> float:
    if one <= 0 or other <= 0:
        raise ValueError("CKA of constant features is not defined")
    return float(cross / np.sqrt(one * other))


def _pair(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, centred and of one size, which no CKA sees and which rounding does."""
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"two matrices with a row per item are needed; got {x.shape} and {y.shape}")
    if len(x) < 4:
        raise ValueError(f"CKA needs at least 4 items, got {len(x)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the features hold values that are not finite")
    pair = []
    for values in (x, y):
        values = values - values.mean(axis=0)
        size = np.sqrt((values**2).mean())
        if size <= 1e-12 * max(1.0, np.abs(values).max()):
            raise ValueError("CKA of constant features is not defined")
        pair.append(values / size)
    return pair[0], pair[1]


def debiased_cka(one: np.ndarray, other: np.ndarray) -> float:
    """Linear CKA from the unbiased estimator of HSIC: about 0 for unrelated features whatever their width.

    Args:
        one: (n, D).
        other: (n, E).

    Returns:
        At most about 1; below 0 by chance where nothing is shared.

    Raises:
        ValueError: the numbers of rows differ, are below 4, or either set is constant.
    """
    return _Moments.of(*_pair(one, other)).debiased_cka()


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def cka_interval(
    one: np.ndarray, other: np.ndarray, groups: Sequence | None = None, debiased: bool = False
) -> Interval:
    """Linear CKA with the 95% interval of a jackknife that leaves out one group at a time.

    With c_g the CKA without group g, z = artanh c and G groups, the variance of z is (G - 1) / G times the sum of
    (z_g - mean z)^2, and the interval tanh(z -+ 1.96 deviations). No item is ever in a set twice.

    Args:
        one: (n, D).
        other: (n, E).
        groups: n names; items of one group stand and fall together. Without it, each item for itself.
        debiased: the form of :func:`debiased_cka`.

    Raises:
        ValueError: as :func:`debiased_cka`, lengths differ, or there are fewer than two groups.
    """
    x, y = _pair(one, other)
    names = np.arange(len(x)) if groups is None else np.asarray(groups)
    if len(names) != len(x):
        raise ValueError(f"{len(x)} items with {len(names)} groups")
    kinds, index = np.unique(names, return_inverse=True)
    if len(kinds) < 2:
        raise ValueError("an interval needs at least two groups")
    measure = _Moments.debiased_cka if debiased else _Moments.cka
    whole = _Moments.of(x, y)
    order = np.argsort(index, kind="stable")
    left = []
    for rows in np.split(order, np.cumsum(np.bincount(index))[:-1]):
        left.append(measure(whole.less(_Moments.of(x[rows], y[rows]))))
    value = measure(whole)
    bound = 1 - 1e-12  # equal features have CKA 1, and artanh 1 is not finite
    z = np.arctanh(np.clip([value, *left], -bound, bound))
    deviation = np.sqrt((len(left) - 1) / len(left) * ((z[1:] - z[1:].mean()) ** 2).sum())
    if deviation < 1e-9:  # the same without any group, up to rounding
        return Interval(value, value, value)
    low, high = np.tanh(z[0] - 1.96 * deviation), np.tanh(z[0] + 1.96 * deviation)
    return Interval(value, min(value, float(low)), max(value, float(high)))


def mutual_neighbours(one: np.ndarray, other: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """(n,) share of the ``k`` nearest neighbours of each item, by cosine, that both sets of features agree on.

    Its mean is the mutual k-NN alignment of arXiv 2405.07987. By chance it is k / (n - 1). Among equals the earlier
    item is nearer, so that features all the same agree with themselves.

    Args:
        one: (n, D).
        other: (n, E).

    Raises:
        ValueError: the numbers of rows differ, or there are not more than ``k`` items.
    """
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"two matrices with a row per item are needed; got {x.shape} and {y.shape}")
    if not 1 <= k < len(x):
        raise ValueError(f"k must lie between 1 and {len(x) - 1}, the other items, not {k}")
    found = []
    for features in (x, y):
        unit = unit_length(features)
        similarity = unit @ unit.T  # (n, n)
        np.fill_diagonal(similarity, -np.inf)
        member = np.zeros(similarity.shape, dtype=bool)
        np.put_along_axis(member, np.argsort(-similarity, axis=1, kind="stable")[:, :k], True, axis=1)
        found.append(member)
    return (found[0] & found[1]).sum(axis=1) / k


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(...) cosine of each vector with its counterpart; 0 where either is zero.

    Args:
        one, other: (..., D) each.

    Raises:
        ValueError: the shapes differ.
    """
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"cosines need features of one shape, got {x.shape} and {y.shape}")
    return (unit_length(x) * unit_length(y)).sum(axis=-1)


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors along the last axis made of length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


def pool_grid(tokens: np.ndarray, grid: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """Patch tokens on a coarser grid: the mean over what each coarse patch covers, as the vision decoder pools a finer
    grid to its teacher's (``UnitForPreTraining.reconstruct``).

    Where the finer grid is not a multiple, coarse patch i of n covers the fine ones from floor(i N / n) to
    ceil((i + 1) N / n), so neighbours share one.

    Args:
        tokens: (n, rows * cols, D), row by row.
        grid: rows and columns of ``tokens``.
        to: rows and columns wanted, at most those of ``grid``.

    Returns:
        (n, rows' * cols', D).

    Raises:
        ValueError: the tokens are not of ``grid``, or ``to`` is finer.
    """
    (rows, cols), (fewer_rows, fewer_cols) = grid, to
    if tokens.ndim != 3 or tokens.shape[1] != rows * cols:
        raise ValueError(f"tokens of shape {tokens.shape} are not of a grid of {rows} x {cols}")
    if not (1 <= fewer_rows <= rows and 1 <= fewer_cols <= cols):
        raise ValueError(f"a grid of {rows} x {cols} cannot be pooled to {fewer_rows} x {fewer_cols}")
    if tuple(grid) == tuple(to):
        return tokens
    dense = tokens.reshape(len(tokens), rows, cols, -1)
    pooled = np.einsum("ar,bc,nrcd->nabd", _means(rows, fewer_rows), _means(cols, fewer_cols), dense, optimize=True)
    return pooled.reshape(len(tokens), fewer_rows * fewer_cols, -1).astype(tokens.dtype, copy=False)


def _means(fine: int, coarse: int) -> np.ndarray:
    """(coarse, fine): what each coarse place takes of the fine ones."""
    weights = np.zeros((coarse, fine))
    for place in range(coarse):
        first, end = place * fine // coarse, -(-(place + 1) * fine // coarse)
        weights[place, first:end] = 1 / (end - first)
    return weights
