"""The suite "retention": what is left of the teacher, the encoder as it was before training.

The teacher sees pictures at x1. The student sees them at x1 and at x4, and its finer grid is area-pooled to the
teacher's, as in training. Two ways to look at a student: its ``encoder`` as it is, whose features need not stay where
they were, and its ``vision decoder`` behind it, which is what the paper trains towards the teacher's features
(cosine and L1, L_vis of arXiv 2409.04095).

    cosine = mean over pictures of the cosine of student's and teacher's class tokens; of patches, over all patches
    gain_knn_accuracy = accuracy of the student less the teacher's on the same pictures; below 0: forgotten
    knn_agreement = share of pictures that the k nearest neighbours of either name alike, rightly or wrongly

Intervals are bootstrapped over kinds, of differences in pairs; those of CKA are a jackknife over kinds, see
:mod:`training.evaluation.similarity`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from training.evaluation.contract import (
    ENCODE,
    Evaluator,
    Figure,
    NeverMeasured,
    NotMeasured,
    Options,
    Subject,
    Work,
)
from training.evaluation.features import CLASS_TOKEN, FEATURES, PATCH_MEAN, picture_features
from training.evaluation.picture_sets import HeldOutPictures
from training.evaluation.scale_suite import KNN, SomeKinds, alike, alike_patches, recognised, scales, share

ENCODER, DECODER = "encoder", "vision decoder"


def evaluators(options: Options) -> list[Evaluator]:
    """All of the suite."""
    return [FeaturesKept(options), RecognitionKept(options)]


class _AgainstTeacher(Evaluator):
    suite = "retention"
    needs = frozenset({ENCODE})
    roles = frozenset({"model", "stage"})
    against = "teacher"

    def __init__(self, options: Options):
        self._pictures = SomeKinds(HeldOutPictures(options.pictures), options.limit)
        self._text_tower = options.text_tower

    def fingerprint(self) -> Mapping[str, Any]:
        return {"pictures": self._pictures.fingerprint, "k": KNN}


class FeaturesKept(_AgainstTeacher):
    """``cosine``, ``cka``, ``cka_debiased`` and ``mutual_neighbours`` of student and teacher on the same pictures.

    ``at`` names the student's ``scale``, the ``feature`` (class token, patch mean, patches) and the ``way``:
    ``encoder`` or ``vision decoder``. Cosines only where both are of one width.
    """

    name = "features of the teacher"

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.tokens import picture_tokens

        teacher, kinds = teacher_of(work), self._pictures.kinds
        x1 = teacher.encoder().resolution
        sides = dict(zip(("x1", "x4"), scales(subject), strict=True))
        grid = min(x1 // teacher.encoder().patch_size, sides["x1"] // subject.encoder().patch_size)
        known = picture_tokens(teacher, self._pictures, x1, (grid, grid), work)
        for scale, side in sides.items():
            found = picture_tokens(subject, self._pictures, side, (grid, grid), work)
            fine = ~(known.failed | found.failed)
            failed = int((~fine).sum())
            own = (found.classes[fine], found.patches[fine])
            ways = {ENCODER: own}
            decoder = getattr(subject.encoder().model, "vision_decoder", None)
            if decoder is not None:  # first, for it is what was trained to keep the teacher's features
                ways = {DECODER: tuple(decoded(decoder, part) for part in own), **ways}
            target_class, target = known.classes[fine], known.patches[fine]
            for way, (classes, patches) in ways.items():
                at = {"scale": scale, "way": way}
                pooled = {
                    CLASS_TOKEN: (classes, target_class),
                    PATCH_MEAN: (patches.mean(axis=1), target.mean(axis=1)),
                }
                for feature, pair in pooled.items():
                    yield from alike(*pair, kinds[fine], {**at, "feature": feature}, work.seed, failed)
                rows = (patches.reshape(-1, patches.shape[-1]), target.reshape(-1, target.shape[-1]))
                owners = np.repeat(kinds[fine], grid * grid)
                at = {**at, "feature": "patches"}
                yield from alike_patches(*rows, owners, at, work.seed, len(fine), failed)


def decoded(decoder: Any, tokens: np.ndarray) -> np.ndarray:
    """(..., D) tokens -> (..., teacher's width) as a vision decoder makes them, float32."""
    import torch

    weight = next(decoder.parameters())
    with torch.inference_mode():
        return decoder(torch.from_numpy(tokens).to(weight.device, weight.dtype)).float().cpu().numpy()


class RecognitionKept(_AgainstTeacher):
    """What of the teacher's recognition is left: differences to it, and how often both decide alike.

    ``gain_knn_accuracy``, ``gain_probe_accuracy``, ``gain_zero_shot_top1``, ``gain_zero_shot_top5`` are the student's
    figure at its ``scale`` less the teacher's at x1; ``knn_agreement`` the share of pictures that the neighbours of
    both name alike. Naming has several ways in a full model (``at["way"]``), each compared with the teacher's class
    token.
    """

    name = "recognition of the teacher"

    def fingerprint(self) -> Mapping[str, Any]:
        from training.evaluation.image_suite import tower_fingerprint

        return {**super().fingerprint(), "text tower": tower_fingerprint(self._text_tower)}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        teacher, pictures, kinds = teacher_of(work), self._pictures, self._pictures.kinds
        x1 = teacher.encoder().resolution
        known = {
            (name, at.get("feature", "")): correct
            for name, correct, at in recognised(teacher, pictures, x1, work, self._text_tower)
        }
        base = picture_features(teacher, pictures, x1, work)
        for scale, side in zip(("x1", "x4"), scales(subject), strict=True):
            found = picture_features(subject, pictures, side, work)
            failed = int((found.failed | base.failed).sum())
            for name, correct, at in recognised(subject, pictures, side, work, self._text_tower):
                before = known.get((name, at.get("feature", "")))
                if before is not None:
                    place = {"over": teacher.name, "scale": scale}
                    place |= {key: at[key] for key in ("feature", "way") if key in at}
                    difference = correct.astype(float) - before
                    yield share(f"gain_{name}", difference, kinds, place, work.seed, failed)
            for feature in FEATURES:
                alike_named = named_alike(found, base, feature, kinds, pictures.families)
                place = {"over": teacher.name, "scale": scale, "feature": feature}
                yield share("knn_agreement", alike_named, kinds, place, work.seed, failed)


def named_alike(one: Any, other: Any, feature: str, kinds: np.ndarray, families: np.ndarray) -> np.ndarray:
    """(n,) bool, which pictures the k nearest neighbours of two sets of features name alike; a failed one is not.

    Args:
        one, other: :class:`~training.evaluation.features.Features` of the same n pictures.

    Raises:
        NotMeasured: too few pictures are left for k neighbours.
    """
    from training.evaluation.image import knn_names

    fine = ~(one.failed | other.failed)
    same = np.zeros(len(fine), dtype=bool)
    try:
        names = [knn_names(each[feature][fine], kinds[fine], families[fine], KNN) for each in (one, other)]
    except ValueError as error:
        raise NeverMeasured(f"{int(fine.sum())} pictures are too few: {error}") from error
    same[fine] = names[0] == names[1]
    return same


def teacher_of(work: Work) -> Subject:
    """The teacher of an evaluation.

    Raises:
        NotMeasured: there is none.
    """
    teacher = work.subjects.get("teacher")
    if teacher is None:
        raise NotMeasured("no teacher to compare with; name the encoder before training with --teacher")
    return teacher
