"""Linear probes on frozen features: softmax regression, the strength of its regularisation chosen on the way.

correct = probe_correct(features, labels, families)    # (n,) bool, each picture scored by a probe of other hands
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Candidates for the weight of half the squared norm against the mean cross-entropy of standardised features, strongest
# first [ours]: a decade apart. On the held-out pictures the shipped encoders do best at 0.1 or 0.01 [measured].
PENALTIES = (1.0, 0.1, 0.01)


@dataclass(frozen=True)
class Probe:
    """Standardisation and a linear layer.

    Attributes:
        mean, scale: (D,) of the training features; a feature that never varies has scale 1.
        weight: (classes, D).
        bias: (classes,).
        penalty: what it was fitted with.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    penalty: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(..., D) -> (..., classes)."""
        return ((features - self.mean) / self.scale) @ self.weight.T + self.bias


def fit_probe(
    features: np.ndarray,
    targets: np.ndarray,
    classes: int,
    penalty: float,
    start: Probe | None = None,
    device: str = "cpu",
    iterations: int = 100,
) -> Probe:
    """Softmax regression by L-BFGS from zero, or from another probe of the same features; nothing is drawn.

    Args:
        features: (n, D).
        targets: (n,) class numbers, or (n, classes) shares of each class that sum to 1.
        classes: how many classes there are, present in ``targets`` or not.
        penalty: weight of half the squared norm of the linear layer (its bias is free) against the mean cross-entropy.
        start: where to begin.
        device: where the sums are done.
        iterations: at most so many.
    """
    import torch

    features = np.asarray(features, dtype=np.float32)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-6 * np.abs(mean).clip(1e-6), scale, 1).astype(np.float32)
    x = torch.from_numpy((features - mean) / scale).to(device)
    y = torch.from_numpy(np.asarray(targets)).to(device)
    y = y.long() if y.ndim == 1 else y.float()
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.zeros(classes, x.shape[1], device=device, requires_grad=True)
        bias = torch.zeros(classes, device=device, requires_grad=True)
        if start is not None:
            with torch.no_grad():
                weight.copy_(torch.from_numpy(start.weight))
                bias.copy_(torch.from_numpy(start.bias))
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=iterations,
            tolerance_grad=1e-4,
            tolerance_change=1e-6,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return Probe(mean, scale, weight.detach().float().cpu().numpy(), bias.detach().float().cpu().numpy(), penalty)


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share that is right, 0 to 1."""
    return float((truth == predicted).mean())


def choose_probe(
    features: np.ndarray,
    targets: np.ndarray,
    classes: int,
    held: np.ndarray,
    penalties: Sequence[float] = PENALTIES,
    device: str = "cpu",
    score: Callable[[np.ndarray, np.ndarray], float] = accuracy,
) -> Probe:
    """The probe of all of ``features`` with the penalty that does best on the ``held`` ones when fitted on the rest.

    Args:
        features: (n, D).
        targets: (n,) class numbers or (n, classes) shares.
        held: (n,) bool, the inner split.
        penalties: candidates, strongest first; among equals the stronger one.
        score: true and predicted class numbers of the held ones -> how good that is, the more the better.
    """
    truth = targets if targets.ndim == 1 else targets.argmax(axis=1)
    best, best_score, probe = penalties[0], -np.inf, None
    if held.any() and not held.all():
        for penalty in penalties:
            probe = fit_probe(features[~held], targets[~held], classes, penalty, probe, device)
            found = score(truth[held], probe.logits(features[held]).argmax(axis=1))
            if found > best_score:
                best, best_score = penalty, found
    return fit_probe(features, targets, classes, best, device=device)


def group_folds(groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """(n,) fold number of each item, whole groups together, folds as even as large groups allow.

    The largest group goes first, each to the smallest fold so far; groups of one size in an order that ``seed`` draws.
    """
    names, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    order = sorted(shuffled, key=lambda group: -counts[group])
    sizes, fold = np.zeros(min(folds, len(names)), dtype=int), np.zeros(len(names), dtype=int)
    for group in order:
        fold[group] = int(sizes.argmin())
        sizes[fold[group]] += counts[group]
    return fold[index]


def probe_correct(
    features: np.ndarray,
    labels: Sequence,
    groups: Sequence,
    folds: int = 5,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> np.ndarray:
    """Which items a linear probe names rightly that was fitted on other groups.

    Groups are dealt into ``folds``; each fold is scored by a probe of the others. Its penalty is chosen on one of
    those others (the next), so that nothing of the scored fold decides it, and no group is in training and test.

    Args:
        features: (n, D), finite; standardised within.
        labels: n names of classes.
        groups: n names of groups, such as families of style.
        folds: fewer where there are fewer groups. ours: 5.
        penalties: candidates, see :data:`PENALTIES`.
        seed: of the deal.

    Returns:
        (n,) bool.

    Raises:
        ValueError: lengths differ, a value is not finite, or there is one group only.
    """
    features, groups = np.asarray(features, dtype=np.float32), np.asarray(groups)
    names, truth = np.unique(np.asarray(labels), return_inverse=True)
    if features.ndim != 2 or not len(features) == len(truth) == len(groups):
        raise ValueError(
            f"features of shape (n, D) with n labels and n groups are needed; got {features.shape}, {len(truth)} "
            f"labels and {len(groups)} groups"
        )
    if not np.isfinite(features).all():
        raise ValueError("features hold values that are not finite")
    fold = group_folds(groups, folds, seed)
    number = int(fold.max()) + 1 if len(fold) else 0
    if number < 2:
        raise ValueError("a linear probe needs two groups at least, one to fit on and one to be scored")
    correct = np.zeros(len(features), dtype=bool)
    for scored in range(number):
        test = fold == scored
        inner = fold[~test] == (scored + 1) % number if number > 2 else np.zeros(int((~test).sum()), dtype=bool)
        probe = choose_probe(features[~test], truth[~test], len(names), inner, penalties)
        correct[test] = probe.logits(features[test]).argmax(axis=1) == truth[test]
    return correct
