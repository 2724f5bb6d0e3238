"""Dense features: how well a linear layer on the patch tokens says what every pixel shows.

The set at hand is made: cut-outs of held-out pictures on plain and patterned grounds, every pixel labelled by the
group of its picture's kind (animal, food, ...) or as ground. Scenes to fit on and scenes to be scored hold pictures of
different hands. ADE20K, or any pictures with masks, are taken from the Hub or from a folder.

    for figure in segmentation_figures(subject, MadeScenes(HeldOutPictures()), None, Work()):
        print(figure.name, figure.value)                  # segmentation_miou, segmentation_pixel_accuracy
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from training.evaluation.cache import hash_of
from training.evaluation.contract import Figure, NeverMeasured, NotMeasured, Subject, Work
from training.evaluation.features import as_array, encoded, precision, whole_patches

if TYPE_CHECKING:
    from training.evaluation.picture_sets import HeldOutPictures

# Groups of the kinds of training/data/heldout.yaml, as its comments order them.
GROUPS = {
    "animal": (
        "zebra", "giraffe", "kangaroo", "penguin", "octopus", "flamingo", "hedgehog", "owl", "snail", "crocodile",
    ),
    "food": ("pineapple", "watermelon", "carrot", "hamburger", "croissant", "doughnut", "pretzel", "broccoli"),
    "vehicle": ("helicopter", "tractor", "fire engine", "sailboat", "ambulance"),
    "tool or household thing": (
        "hammer", "scissors", "umbrella", "candle", "microscope", "magnet", "camera", "light bulb", "chair",
    ),
    "sport or music": ("basketball", "guitar", "trumpet", "skateboard", "kite"),
    "clothing": ("necktie", "socks", "crown"),
    "building or place": ("castle", "ferris wheel"),
    "plant": ("cactus", "sunflower", "mushroom"),
    "fancy or weather": ("unicorn", "robot", "snowman", "rainbow"),
}  # fmt: skip
GROUND = 1  # label of the ground; the groups follow. 0 and 255 are not scored, as in ADE20K
UNSCORED = (0, 255)
SCENES = 150  # of either half of the hands [ours]: a few seconds of encoding, intervals some hundredths wide
OBJECTS = (2, 4)  # least and most in a scene
SPAN = (0.3, 0.6)  # of an object, as a share of the scene's side
PATCHES = 200_000  # at most so many patches are fitted on, drawn evenly from all pictures  [ours]
TRAIN, TEST = 2000, 2000  # pictures of a large set that are fitted on and scored without --limit; ADE20K scores 2,000
# Of the linear layer, weaker than for whole pictures: patches are many, and strong ones leave nothing but the ground.
PENALTIES = (0.01, 0.001, 0.0001)
CELLS = 8  # a patch's shares of the classes are counted on so many by so many pixels


class Scenes:
    """Square pictures with masks, as a :class:`~training.evaluation.features.PictureSet`.

    Args:
        name, fingerprint: as for every set of pictures.
        count: how many there are.
        load: index, side of the picture -> its mask as an integer PIL image of any size, and a function that gives the
            RGB picture.
        mask_side: side in pixels at which the mask is scored, whatever the picture's.

    Attributes:
        masks: index -> (mask_side, mask_side) uint8 of what :meth:`picture` has made.
    """

    def __init__(self, name: str, fingerprint: str, count: int, load: Callable, mask_side: int):
        self.name, self.fingerprint, self.count, self.load, self.mask_side = name, fingerprint, count, load, mask_side
        self.masks: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int, side: int) -> Image.Image:
        """RGB; the mask is kept in :attr:`masks` and stays there when the picture cannot be read."""
        mask, picture = self.load(index, side)
        labels = np.asarray(mask.resize((self.mask_side,) * 2, Image.Resampling.NEAREST))
        if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"a mask must hold one whole number a pixel; this one is of mode {mask.mode}")
        if labels.max(initial=0) > 255:
            raise ValueError(f"labels of masks must be 0 to 255; this one has {labels.max()}")
        self.masks[index] = labels.astype(np.uint8)
        return picture()


class MadeScenes:
    """Scenes composed of held-out cut-outs, the same for the same seed and pictures; drawn anew at every size.

    Args:
        pictures: the cut-outs; photographs are left aside, for nothing says where their subject ends.
        count: scenes of either half of the hands.
        seed: of the scenes.

    Attributes:
        names: of the labels from :data:`GROUND` on.
    """

    name = "made scenes"

    def __init__(self, pictures: HeldOutPictures, count: int = SCENES, seed: int = 0):
        self.pictures, self.count, self.seed = pictures, count, seed
        self.names = ("ground", *GROUPS)

    @property
    def fingerprint(self) -> str:
        """Hash of the pictures, with what decides the scenes."""
        return f"{self.pictures.fingerprint} {self.count} {self.seed} {SPAN} {OBJECTS} 1"

    @functools.cached_property
    def folds(self) -> list[tuple[Scenes, Scenes]]:
        """Twice (scenes to fit on, scenes to be scored), the halves of the hands taking turns."""
        from training.evaluation.probe import group_folds

        groups = {kind: GROUND + 1 + place for place, kinds in enumerate(GROUPS.values()) for kind in kinds}
        half = group_folds(self.pictures.families, 2)
        if not len(half) or half.max() == 0:
            raise NeverMeasured("the made scenes need held-out pictures of two families of style at least")
        halves = []
        for number in (0, 1):
            found: dict[int, list[int]] = {}
            for index in np.flatnonzero(half == number):
                row = self.pictures.rows[index]
                if row["concept"] in groups and row["image"]["bytes"][:4] == b"\x89PNG":  # cut-outs are stored as PNG
                    found.setdefault(groups[row["concept"]], []).append(int(index))
            if len(found) < 2:
                raise NeverMeasured("the made scenes need cut-outs of two groups of kinds at least, in either half")
            load = functools.partial(self._scene, found, number)
            halves.append(Scenes(self.name, f"{self.fingerprint} {number}", self.count, load, 128))
        return [(halves[0], halves[1]), (halves[1], halves[0])]

    def _scene(self, found: dict[int, list[int]], half: int, index: int, side: int) -> tuple[Image.Image, Callable]:
        rng = np.random.default_rng([self.seed, half, index])
        scene = ground(rng, side)
        mask = Image.new("L", scene.size, GROUND)
        for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
            label = int(rng.choice(sorted(found)))
            row = self.pictures.rows[int(rng.choice(found[label]))]
            span, across, down = rng.uniform(*SPAN), rng.uniform(), rng.uniform()
            length = max(1, round(span * side))
            cut = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")
            cut = cut.convert("RGBa").resize((length, length), Image.Resampling.BICUBIC).convert("RGBA")
            place = (round(across * (side - length)), round(down * (side - length)))
            scene.paste(cut, place, cut)
            mask.paste(label, place, cut.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0))
        return mask, lambda: scene


def ground(rng: np.random.Generator, side: int) -> Image.Image:
    """A plain, shaded, striped or cloudy RGB ground; one generator state gives the same ground at every size."""
    kind, one, other = rng.integers(4), rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    angle, waves, clouds = rng.uniform(0, np.pi), rng.uniform(3, 9), rng.uniform(0, 1, (6, 6))
    other = one + (other - one) * 0.4  # not so loud that the ground is what a network sees
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    if kind == 0:
        share = np.zeros((side, side))
    elif kind == 1:
        share = x * abs(np.cos(angle)) / 1.5 + y * abs(np.sin(angle)) / 1.5
    elif kind == 2:
        share = (np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle))) > 0).astype(float)
    else:
        grid = Image.fromarray(clouds.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        share = np.asarray(grid).clip(0, 1)
    pixels = one + share[..., None] * (other - one)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class MaskFolder:
    """Pictures with masks of a folder as ADE20K has it: ``images/`` and ``annotations/``.

    Either holds ``training/`` and ``validation/`` (or ``train``, ``val``); a mask is a PNG of its picture's name, one
    label a pixel, 0 and 255 not scored.

    Args:
        folder: that folder.
        limit: at most so many pictures to be scored, spread evenly; :data:`TEST` by default.

    Raises:
        NotMeasured: a folder is missing, or a part has no picture with a mask.
    """

    mask_side = 256

    def __init__(self, folder: Path, limit: int | None = None):
        from training.evaluation.picture_sets import SUFFIXES
        from training.evaluation.sets import spread

        self.folder, self.name = Path(folder), Path(folder).name
        parts = []
        for names, most in ((("training", "train"), TRAIN), (("validation", "val"), limit or TEST)):
            places = [name for name in names if (self.folder / "images" / name).is_dir()]
            if not places:
                raise NotMeasured(
                    f"--segmentation {folder}: there is no images/{names[0]}; it should hold images/ and annotations/"
                    ", each with training/ and validation/, a PNG mask for each picture"
                )
            pictures = sorted(
                path for path in (self.folder / "images" / places[0]).rglob("*") if path.suffix.lower() in SUFFIXES
            )
            masks = [
                self.folder / "annotations" / path.relative_to(self.folder / "images").with_suffix(".png")
                for path in pictures
            ]
            pairs = [pair for pair in zip(pictures, masks, strict=True) if pair[1].is_file()]
            if not pairs:
                raise NotMeasured(
                    f"--segmentation {folder}: no labels: none of the {len(pictures)} pictures of images/{places[0]} "
                    f"has a PNG mask of its name in annotations/{places[0]}"
                )
            parts.append(spread(pairs, most))
        self.parts = parts

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the chosen pictures and masks."""
        return hash_of([path for part in self.parts for pair in part for path in pair])

    @property
    def folds(self) -> list[tuple[Scenes, Scenes]]:
        """Once (pictures to fit on, pictures to be scored)."""

        def load(pairs, index: int, side: int):
            picture, mask = pairs[index]
            return Image.open(mask), lambda: squeezed(Image.open(picture), side)

        train, test = (
            Scenes(self.name, f"{self.fingerprint} {i}", len(part), functools.partial(load, part), self.mask_side)
            for i, part in enumerate(self.parts)
        )
        return [(train, test)]


class HubMasks:
    """Pictures with masks of a data set in parquet, on the Hub or in a folder: two columns of images.

    One of them is called image, img, rgb or pixel_values; the other one, or of several the one called annotation,
    label, mask, segmentation or seg, holds the masks. Rows are streamed, the first of each split.

    Args:
        source: Hub id, such as ``"sezer12138/ADE20k_Segementation"``, or a folder.
        limit: at most so many pictures to be scored; :data:`TEST` by default.
    """

    mask_side = 256

    def __init__(self, source: str, limit: int | None = None):
        self.source, self.limit, self.name = source, limit, source.rstrip("/").rsplit("/", 1)[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash or commit of the data set, and how much of it."""
        from training.evaluation.picture_sets import hub_fingerprint

        return f"{hub_fingerprint(self.source)} {self.limit or TEST} {TRAIN}"

    @functools.cached_property
    def folds(self) -> list[tuple[Scenes, Scenes]]:
        """Once (pictures to fit on, pictures to be scored)."""
        from training.evaluation.picture_sets import HubRows, image_columns, opened

        splits = HubRows.splits(self.source, "--segmentation")
        missing = [split for split in ("train", "validation") if split not in splits]
        if missing:
            raise NotMeasured(f"--segmentation {self.source}: there is no {missing[0]} split, only {sorted(splits)}")
        scenes = []
        for split, most in (("train", TRAIN), ("validation", self.limit or TEST)):
            picture, mask = image_columns(splits[split].features or {}, self.source)
            rows = HubRows(self.source, splits[split], (picture, mask), most)

            def load(index: int, side: int, rows=rows, picture=picture, mask=mask):
                row = rows[index]
                return opened(row[mask]), lambda: squeezed(opened(row[picture]), side)

            scenes.append(Scenes(self.name, f"{self.fingerprint} {split}", len(rows), load, self.mask_side))
        return [(scenes[0], scenes[1])]


def squeezed(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture, RGB, made square: nothing that the mask shows is cut off [ours]."""
    return picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def confusion(truth: np.ndarray, predicted: np.ndarray | None, classes: int) -> np.ndarray:
    """(classes, classes + 1) pixels by true and predicted label; the last column is for no answer at all.

    Args:
        truth: labels 1 to ``classes``; 0, 255 and what is beyond them is not scored.
        predicted: labels of the same shape, None when there is no answer.
        classes: how many labels there are.
    """
    scored = (truth >= 1) & (truth <= classes) & (truth != UNSCORED[1])
    rows = truth[scored].astype(np.int64) - 1
    columns = np.full_like(rows, classes) if predicted is None else predicted[scored].astype(np.int64) - 1
    return np.bincount(rows * (classes + 1) + columns, minlength=classes * (classes + 1)).reshape(classes, -1)


def mean_iou(matrix: np.ndarray) -> np.ndarray:
    """Mean over classes of intersection over union, 0 to 1; classes that are neither there nor predicted do not count.

    Args:
        matrix: (..., classes, classes + 1) as :func:`confusion` counts, summed over pictures.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    classes = matrix.shape[-2]
    right = np.diagonal(matrix[..., :classes], axis1=-2, axis2=-1)
    union = matrix.sum(axis=-1) + matrix[..., :classes].sum(axis=-2) - right
    shares = np.where(union > 0, right / np.maximum(union, 1), np.nan)
    return np.nanmean(shares, axis=-1)


def pixel_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Share of scored pixels whose label is right, 0 to 1; ``matrix`` as for :func:`mean_iou`."""
    matrix = np.asarray(matrix, dtype=np.float64)
    right = np.diagonal(matrix[..., : matrix.shape[-2]], axis1=-2, axis2=-1).sum(axis=-1)
    return right / np.maximum(matrix.sum(axis=(-2, -1)), 1)


def bootstrapped(
    matrices: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of ``statistic`` of the sum of (n, classes, classes + 1), pictures drawn anew."""
    draws = np.random.default_rng(seed).multinomial(len(matrices), np.full(len(matrices), 1 / len(matrices)), samples)
    flat = draws.astype(np.float64) @ matrices.reshape(len(matrices), -1)
    low, high = np.quantile(statistic(flat.reshape(samples, *matrices.shape[1:])), [0.025, 0.975])
    return float(low), float(high)


def patch_shares(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows * columns, 256) how much of a patch each label covers, over all that is scored; zeros where nothing is.

    Args:
        mask: (H, W) labels; each patch is looked at on :data:`CELLS` by CELLS of its pixels.
    """
    sized = Image.fromarray(mask).resize((columns * CELLS, rows * CELLS), Image.Resampling.NEAREST)
    cells = np.asarray(sized).reshape(rows, CELLS, columns, CELLS).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    offsets = np.arange(rows * columns)[:, None] * 256
    counts = np.bincount((cells + offsets).ravel(), minlength=rows * columns * 256).reshape(-1, 256).astype(np.float32)
    counts[:, UNSCORED] = 0
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def upsampled_labels(logits: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    """(rows * columns, classes) logits of patches -> (side, side) labels from 1, bilinear between patches' centres."""
    import torch

    grid = torch.from_numpy(np.ascontiguousarray(logits.T)).reshape(1, -1, rows, columns).float()
    full = torch.nn.functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return full[0].argmax(dim=0).numpy() + 1


def segmentation_figures(subject: Subject, scenes: Any, resolution: int | None, work: Work) -> Iterator[Figure]:
    """``segmentation_miou`` and ``segmentation_pixel_accuracy`` of a linear layer on frozen patch tokens.

    Softmax regression on standardised tokens of the last layer, fitted to each patch's shares of the labels; its
    logits are made as large as the mask bilinearly. Intervals are bootstrapped over the scored pictures.

    Args:
        subject: one that can ENCODE.
        scenes: :class:`MadeScenes`, :class:`MaskFolder` or :class:`HubMasks`.
        resolution: side in pixels at which the subject sees the pictures; None for its own.

    Raises:
        NotMeasured: no picture could be fitted on, or no pixel has a label.
    """
    from training.evaluation.probe import choose_probe

    encoder = subject.encoder()
    side = whole_patches(encoder, resolution)
    grid = side // encoder.patch_size
    matrices, failed, unlabelled, reason = [], 0, 0, ""
    seen: dict[int, list] = {}  # the made scenes' halves are fitted on and scored in turn

    def tokens(part: Scenes) -> Iterator[tuple[int, np.ndarray | str, np.ndarray | None]]:
        if id(part) in seen:
            yield from seen[id(part)]
            return
        kept = seen.setdefault(id(part), []) if len(scenes.folds) > 1 else None
        for item in _tokens(subject, part, side, work):
            if kept is not None:
                kept.append(item)
            yield item

    for train, test in scenes.folds:
        rng = np.random.default_rng(work.seed)
        most = max(1, PATCHES // max(1, len(train)))
        features, shares, owner = [], [], []
        for index, found, mask in tokens(train):
            if mask is None or isinstance(found, str):
                reason = reason or str(found)
                continue
            covered = patch_shares(mask, grid, grid)
            labelled = np.flatnonzero(covered.sum(axis=1) > 0)
            chosen = labelled if len(labelled) <= most else np.sort(rng.choice(labelled, most, replace=False))
            features.append(found[chosen])
            shares.append(covered[chosen])
            owner.append(np.full(len(chosen), index))
        if not features:
            raise NotMeasured(f"{subject.name} fails at all {len(train)} pictures of {scenes.name}: {reason}")
        classes = int(np.flatnonzero(sum(part.sum(axis=0) for part in shares)).max(initial=0))
        if not classes:
            raise NeverMeasured(f"{scenes.name}: no labels: every mask to fit on holds 0 and 255 only")
        x, y = np.concatenate(features), np.concatenate(shares)[:, 1 : classes + 1]
        held = np.concatenate(owner) % 5 == 4  # a fifth of the pictures, for the penalty

        def score(truth: np.ndarray, predicted: np.ndarray, classes=classes) -> float:
            return float(mean_iou(confusion(truth + 1, predicted + 1, classes)))

        probe = choose_probe(x, y, classes, held, PENALTIES, subject.device, score)
        for _, found, mask in tokens(test):
            if isinstance(found, str):
                failed, reason = failed + 1, reason or found
            if mask is None:
                unlabelled += 1
                continue
            labels = None
            if not isinstance(found, str):
                labels = upsampled_labels(probe.logits(found), grid, grid, len(mask))
            matrices.append(confusion(mask, labels, classes))
    if not matrices or not sum(matrix.sum() for matrix in matrices):
        raise NeverMeasured(f"{scenes.name}: no labels: no mask to be scored has a label that was fitted on")
    if failed:
        work.notes.append(f"{subject.name} failed on {failed} pictures of {scenes.name} ({reason}); they are wrong.")
    if unlabelled:
        work.notes.append(f"{unlabelled} masks of {scenes.name} could not be read and have no pixels to be counted.")
    size = max(matrix.shape[0] for matrix in matrices)
    stacked = np.stack([_grown(matrix, size) for matrix in matrices])
    total, count = stacked.sum(axis=0), len(stacked) + unlabelled
    for name, statistic in (("segmentation_miou", mean_iou), ("segmentation_pixel_accuracy", pixel_accuracy)):
        low, high = bootstrapped(stacked, statistic, seed=work.seed)
        at = {} if resolution is None else {"resolution": side}
        yield Figure(name, float(statistic(total)), low, high, items=count, failed=failed, at=at)


def _grown(matrix: np.ndarray, size: int) -> np.ndarray:
    """A confusion matrix with as many classes as the largest of the folds."""
    classes = matrix.shape[0]
    grown = np.zeros((size, size + 1), dtype=matrix.dtype)
    grown[:classes, :classes], grown[:classes, -1] = matrix[:, :classes], matrix[:, -1]
    return grown


def _tokens(subject: Subject, part: Scenes, side: int, work: Work):
    """(index, (N, D) patch tokens or the reason why not, mask or None) of every picture, in order."""

    def encode(images: list[Image.Image]) -> np.ndarray:
        with precision(subject):
            found = as_array(subject.encoder().tokens(images, side)[1])
        if not np.isfinite(found).all():
            raise ValueError("the features hold values that are not finite")
        return found

    for indices, found in encoded(subject, part, side, work, encode):
        for place, index in enumerate(indices):
            yield index, found if isinstance(found, str) else found[place], part.masks.pop(index, None)
