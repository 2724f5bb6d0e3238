"""The suite "scale": recognition and reading against the size of the input, and what changes between two sizes.

x1 and x4 are the model's own (:class:`modeling_unit.UnitImageProcessor`): x1 its nominal square, x4 four times that as
the side or as the area. A ``resolution`` here is the side in pixels of a square with as many patches. Pictures at x4
and documents at x1 are what stage 2 of the paper adds, "exchanged" scales; the evaluators below measure both kinds of
input at both, and between.

| evaluator | what |
|---|---|
| pictures against resolution | k-NN, zero-shot naming and the linear probe, the same pictures at each resolution |
| reading in one go | word F1 and CER of the same documents with as many patches as x1, x4 and between |
| pictures at two scales, documents at two scales | how alike features of one input at x1 and x4 are |
| activations | how large features are: see :mod:`training.evaluation.activations` |
| gain over the stage before | the model less the last of `--stages`, on the same items |
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.evaluation.contract import (
    ENCODE,
    READ,
    At,
    Evaluator,
    Figure,
    NeverMeasured,
    NotMeasured,
    Options,
    Subject,
    TextSample,
    Work,
)
from training.evaluation.features import (
    CLASS_TOKEN,
    FEATURES,
    PATCH_MEAN,
    as_array,
    picture_features,
    precision,
    whole_patches,
)
from training.evaluation.picture_sets import HeldOutPictures
from training.evaluation.readings import Reading, read_samples
from training.evaluation.sets import TextSet, default_sets, spread

if TYPE_CHECKING:
    from PIL import Image

# Sides as multiples of x1's: below what was trained, both readings of x4 (2 as the area, 4 as the side) and between
MULTIPLES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
# Of 476: a picture of 4 times the side costs more than 16 small ones, and each is taken at every size.  [ours]
PICTURES = 130
DOCUMENTS = 40  # of each of three sets, two of them at every size  [ours]
SIZES = 4  # of documents, from x1 to x4  [ours]
DESCRIBED = 48  # inputs of a kind whose activations are described  [ours]
BUILD = "unit data from-pdfs --split validation"
KNN = 5  # as the suite "image"


def evaluators(options: Options) -> list[Evaluator]:
    """All of the suite."""
    return [
        PicturesByResolution(options),
        ReadingInOneGo(options),
        AlikePictures(options),
        AlikeDocuments(options),
        Activations(options),
        StageGain(options),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Sets
# ---------------------------------------------------------------------------------------------------------------------


class SomeKinds:
    """A part of a set of labelled pictures: some of its kinds, evenly spread, each with all of its pictures.

    Whole kinds, because a picture is known by its neighbours: of a part with two pictures a kind nothing could be
    told. Zero-shot names are still chosen among all kinds.

    Args:
        whole: the set.
        limit: kinds are taken until there are so many pictures; all for None.
    """

    def __init__(self, whole: HeldOutPictures, limit: int | None):
        self._whole = whole
        self._limit = limit
        self._indices: np.ndarray | None = None
        self.name = "held-out pictures"

    @property
    def fingerprint(self) -> str:
        """Of the whole and of the number; the whole's own where nothing is left out."""
        if self._limit is None:
            return self._whole.fingerprint
        return hashlib.sha256(f"{self._whole.fingerprint} some kinds {self._limit}".encode()).hexdigest()

    @property
    def indices(self) -> np.ndarray:
        """(n,) places in the whole."""
        if self._indices is None:
            kinds, counts = np.unique(self._whole.kinds, return_counts=True)
            taken = len(kinds)
            if self._limit is not None and self._limit < len(self._whole):
                taken = next(
                    n for n in range(1, len(kinds) + 1) if counts[_places(len(kinds), n)].sum() >= self._limit
                )
            self._indices = np.flatnonzero(np.isin(self._whole.kinds, kinds[_places(len(kinds), taken)]))
        return self._indices

    def __len__(self) -> int:
        return len(self.indices)

    def picture(self, index: int, side: int) -> Image.Image:
        return self._whole.picture(int(self.indices[index]), side)

    @property
    def kinds(self) -> np.ndarray:
        return self._whole.kinds[self.indices]

    @property
    def labels(self) -> np.ndarray:
        return self._whole.labels[self.indices]

    @property
    def families(self) -> np.ndarray:
        return self._whole.families[self.indices]

    @property
    def names(self) -> list[str]:
        return self._whole.names

    @property
    def class_embeddings(self) -> np.ndarray:
        return self._whole.class_embeddings


def _places(number: int, taken: int) -> list[int]:
    return spread(range(number), taken)


class HeldOutDocuments:
    """Chunks and blocks of held-out documents, for models that take a few lines at a time or a page.

    Args:
        chunks: ``chunks-validation``, chunks of one to three lines at an x-height of 6 to 20 px; None for where
            `unit data` puts it.
        blocks: ``blocks-validation``, paragraphs; likewise. Only looked at where there are too few chunks.
        sparse: pages with few words in large print; None for none.
    """

    def __init__(self, chunks: Path | None = None, blocks: Path | None = None, sparse: TextSet | None = None):
        from training.data.sources import data_folder

        self._sparse = sparse

        self._sets = [
            TextSet("chunks", (Path(chunks or data_folder("chunks-validation")),), build=BUILD),
            TextSet("blocks", (Path(blocks or data_folder("blocks-validation")),), build=BUILD),
        ]
        self._read: dict[int, list[TextSample]] = {}

    @classmethod
    def of(cls, options: Options) -> HeldOutDocuments:
        """Those that the command line names, and the set ``syn-s``."""
        named = {one.name: one for one in default_sets(options)}
        return cls(options.chunks, options.blocks, named.get("syn-s"))

    def fingerprint(self) -> dict[str, Any]:
        """Of the chunks, and of the blocks and the pages in large print where they are there.

        Raises:
            NotMeasured: there are no chunks.
        """
        found: dict[str, Any] = {"chunks": self._sets[0].fingerprint()}
        for name, one in (("blocks", self._sets[1]), ("sparse", self._sparse)):
            try:
                found[name] = one.fingerprint() if one else None
            except NotMeasured:
                found[name] = None
        return found

    def sparse(self, limit: int) -> list[TextSample]:
        """At most ``limit`` pages in large print; none where the set is not there."""
        try:
            found = self._sparse.samples(limit) if self._sparse else []
        except NotMeasured:
            return []
        return [one for one in found if one.image is not None]

    def choose(self, processor: Any, least: int, most: int, limit: int) -> list[TextSample]:
        """At most ``limit`` documents whose own size takes more than ``least`` and at most ``most`` patches, spread.

        Raises:
            NotMeasured: no chunk or block is of such a size.
        """
        chosen: list[TextSample] = []
        for place in range(len(self._sets)):
            if len(chosen) >= limit:
                break
            samples = [one for one in self._samples(place) if least < patches_of(one, processor) <= most]
            chosen += spread(samples, limit - len(chosen))
        if not chosen:
            raise NeverMeasured(
                f"no held-out document takes more than {least} and at most {most} patches of {processor.patch_size} px"
            )
        return chosen

    def _samples(self, place: int) -> list[TextSample]:
        if place not in self._read:
            try:
                self._read[place] = [one for one in self._sets[place].samples() if one.image is not None and one.text]
            except NotMeasured:
                if place == 0:
                    raise
                self._read[place] = []
        return self._read[place]


def patches_of(sample: TextSample, processor: Any) -> int:
    """Whole patches that a document covers at its own size; beyond any budget where a side is longer than allowed."""
    patch = processor.patch_size
    if max(sample.image.size) > processor.max_side:
        return np.iinfo(np.int64).max
    return math.ceil(sample.image.width / patch) * math.ceil(sample.image.height / patch)


def budget(processor: Any, side: int) -> int:
    """Patches of a square."""
    return (side // processor.patch_size) ** 2


def _processor(subject: Subject) -> Any:
    """The image processor of a subject's encoder.

    Raises:
        NotMeasured: it is one that cannot make inputs of other sizes.
    """
    processor = subject.encoder().processor
    if not hasattr(processor, "document_area"):
        raise NeverMeasured(f"{subject.name} has a {type(processor).__name__}, which makes one size only")
    return processor


def scales(subject: Subject) -> tuple[int, int]:
    """Sides of x1 and x4 in whole patches of a subject.

    Raises:
        NotMeasured: its positions do not reach x4.
    """
    from training.evaluation.tokens import x4_side

    processor, encoder = _processor(subject), subject.encoder()
    x4 = whole_patches(encoder, x4_side(processor))
    if x4 > processor.max_side:
        raise NeverMeasured(f"{subject.name} takes at most {processor.max_side} px a side, and x4 is {x4} px")
    return encoder.resolution, x4


# ---------------------------------------------------------------------------------------------------------------------
# Recognition against resolution
# ---------------------------------------------------------------------------------------------------------------------


class _OnPictures(Evaluator):
    suite = "scale"
    needs = frozenset({ENCODE})

    def __init__(self, options: Options):
        self._pictures = SomeKinds(HeldOutPictures(options.pictures), options.limit or PICTURES)
        self._text_tower = options.text_tower

    def fingerprint(self) -> Mapping[str, Any]:
        from training.evaluation.image_suite import tower_fingerprint

        return {"pictures": self._pictures.fingerprint, "text tower": tower_fingerprint(self._text_tower)}


class PicturesByResolution(_OnPictures):
    """k-NN, zero-shot naming and a linear probe of the class token, of the same pictures at each resolution.

    ``knn_accuracy``, ``probe_accuracy``, ``zero_shot_top1``, ``zero_shot_top5`` as in the suite "image", at
    ``resolution``. A picture is drawn anew at each, from a file of at least 64 px: above that it is enlarged, and says
    how the encoder stands more patches, not more detail.
    """

    name = "pictures against resolution"

    def __init__(self, options: Options):
        super().__init__(options)
        self._resolutions = options.resolutions

    def fingerprint(self) -> Mapping[str, Any]:
        resolutions = list(self._resolutions) if self._resolutions else list(MULTIPLES)
        return {**super().fingerprint(), "resolutions": resolutions, "k": KNN}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        for side in resolutions(subject, self._resolutions):
            for name, correct, at in recognised(subject, self._pictures, side, work, self._text_tower):
                yield share(
                    name, correct, self._pictures.kinds, at, work.seed, _failed(subject, self._pictures, side, work)
                )
        kinds = len(set(self._pictures.kinds.tolist()))
        work.notes.append(
            f"{subject.name}: the same {len(self._pictures)} pictures of {kinds} kinds at every resolution."
        )


def resolutions(subject: Subject, wanted: Sequence[int] | None) -> list[int]:
    """Sides in whole patches, ascending: those wanted, or multiples of x1 as far as the positions reach."""
    encoder = subject.encoder()
    sides = wanted or [multiple * encoder.resolution for multiple in MULTIPLES]
    most = getattr(encoder.processor, "max_side", math.inf)
    found = sorted({whole_patches(encoder, side) for side in sides})
    return [side for side in found if side <= most]


def recognised(
    subject: Subject, pictures: Any, side: int, work: Work, text_tower: str | None = None
) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """(figure, (n,) bool which pictures are right, at) of k-NN, the linear probe and zero-shot naming at a side.

    Pictures that failed are wrong, and nobody's neighbours.

    Args:
        pictures: with ``kinds``, ``labels``, ``families``, ``names`` and ``class_embeddings``, as :class:`SomeKinds`.
        text_tower: as of the options.

    Raises:
        NotMeasured: there are too few pictures for k-NN.
    """
    from training.data.targets import PROMPTS
    from training.evaluation.image import knn_correct, zero_shot_ranks
    from training.evaluation.image_suite import find_tower, naming_ways
    from training.evaluation.probe import probe_correct
    from training.evaluation.text_tower import class_vectors

    found = picture_features(subject, pictures, side, work)
    fine = ~found.failed
    kinds, families = pictures.kinds[fine], pictures.families[fine]

    def whole(correct: np.ndarray) -> np.ndarray:
        every = np.zeros(len(fine), dtype=bool)
        every[fine] = correct
        return every

    for feature in FEATURES:
        at = {"resolution": side, "feature": feature}
        try:
            yield "knn_accuracy", whole(knn_correct(found[feature][fine], kinds, families, KNN)), at
            if feature == CLASS_TOKEN:
                yield "probe_accuracy", whole(probe_correct(found[feature][fine], kinds, families)), at
        except ValueError as error:
            raise NeverMeasured(f"{len(pictures)} pictures are too few: {error}") from error
    try:
        tower = find_tower(subject, text_tower)
        names = class_vectors(tower.embed, pictures.names, PROMPTS) if tower else pictures.class_embeddings
        ways, failed, _ = naming_ways(subject, pictures, side, work, tower, names.shape[1])
    except NotMeasured:
        return  # a subject that cannot name: the suite "image" says why
    fine = ~failed
    for way, embeddings in ways.items():
        ranks = zero_shot_ranks(embeddings[fine], names, pictures.labels[fine])
        for top in (1, 5):
            yield f"zero_shot_top{top}", whole(ranks < top), {"resolution": side, "way": way}


def _failed(subject: Subject, pictures: Any, side: int, work: Work) -> int:
    return int(picture_features(subject, pictures, side, work).failed.sum())


def share(
    name: str,
    values: np.ndarray,
    groups: Sequence,
    at: At,
    seed: int,
    failed: int = 0,
    items: int | None = None,
) -> Figure:
    """Mean of values, with an interval bootstrapped over groups.

    Args:
        items: how many there are, where those that failed are not among the values.
    """
    from training.evaluation.image import bootstrap_interval

    interval = bootstrap_interval(values, groups, seed=seed)
    items = len(values) if items is None else items
    return Figure(name, float(np.mean(values)), *interval, items=items, failed=failed, at=dict(at))


# ---------------------------------------------------------------------------------------------------------------------
# Reading against the number of patches
# ---------------------------------------------------------------------------------------------------------------------


class ReadingInOneGo(Evaluator):
    """Word F1 and CER of documents read in one go, without the Reader's cutting, by how many patches they may have.

    Three sets of held-out documents, the first two for each model by its own x1 and x4:

    * ``long``: more patches than x1 holds, as many as x4 holds at most. At x4 the model sees them at their own size;
      with fewer patches they are shrunk, to x1 by up to half (x4 as area) or a quarter (as side). The same texts at
      each ``resolution``.
    * ``short``: as many as x1 holds at most, so they are seen at their own size: what stage 2 trains as documents at
      x1 (``max_area`` of its recipe). At x1 only: more patches would change nothing.
    * ``sparse``: whole made pages with few words in large print (the set ``syn-s``), shrunk to each size: what the
      paper reads at x1, though with more words than small models learn there. Left out where the set is not there.
    """

    suite = "scale"
    name = "reading in one go"
    needs = frozenset({READ, ENCODE})
    roles = frozenset({"model", "teacher", "start", "stage"})  # peers have no x1

    def __init__(self, options: Options):
        self._documents = HeldOutDocuments.of(options)
        self._limit = options.limit or DOCUMENTS

    def fingerprint(self) -> Mapping[str, Any]:
        return {"documents": self._documents.fingerprint(), "limit": self._limit, "sizes": SIZES}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.text import count, f1_of, summarise

        x1, x4 = scales(subject)
        sides = document_sides(subject)
        for kind, samples in document_sets(subject, self._documents, self._limit).items():
            for side in [x1] if kind == "short" else sides:
                found = read_at(subject, samples, side, work)
                at = {"resolution": side, "set": kind}
                counts = [count(each.prediction, each.truth) for each in found]
                groups = [each.group for each in found]
                failed = sum(bool(each.error) for each in found)
                for figure in summarise(counts, work.seed, groups=groups, failed=failed, at=at):
                    if figure.name in ("word_f1", "cer"):
                        yield figure
                for each, own in zip(found, counts, strict=True):
                    told = {"index": each.index, "source": each.source, "truth": each.truth}
                    told |= {"prediction": each.prediction, "word_f1": round(f1_of(own), 4)}
                    work.items.append({**at, **told, **({"error": each.error} if each.error else {})})
        work.notes.append(f"{subject.name}: x1 is {x1} px, x4 is {x4} px; short documents fit x1, long ones x4 alone.")


def document_sides(subject: Subject) -> list[int]:
    """Sides from x1 to x4 in whole patches, evenly spaced in logarithm."""
    x1, x4 = scales(subject)
    return sorted({whole_patches(subject.encoder(), side) for side in np.geomspace(x1, x4, SIZES)})


def document_sets(subject: Subject, documents: HeldOutDocuments, limit: int) -> dict[str, list[TextSample]]:
    """``{"long": …, "short": …, "sparse": …}``, see :class:`ReadingInOneGo`; a set that nothing fits is left out.

    Raises:
        NotMeasured: neither long nor short ones are there.
    """
    processor = _processor(subject)
    small, large = (budget(processor, side) for side in scales(subject))
    found: dict[str, list[TextSample]] = {}
    reason: NotMeasured | None = None
    for kind, least, most in (("long", small, large), ("short", 0, small)):
        try:
            found[kind] = documents.choose(processor, least, most, limit)
        except NotMeasured as error:
            reason = error
    if not found:
        raise reason or NotMeasured("there are no documents")
    if sparse := documents.sparse(limit):
        found["sparse"] = sparse
    return found


_kept: dict[tuple, tuple[Reading, ...]] = {}  # what was read once in this process: a few kB each


def read_at(subject: Subject, samples: Sequence[TextSample], side: int, work: Work) -> tuple[Reading, ...]:
    """Documents read with at most as many patches each as a square of ``side`` has.

    Args:
        subject: a :class:`~training.evaluation.subjects.ModelSubject` that can READ.
    """
    content = hashlib.sha256("\0".join(f"{one.index} {one.source} {one.text}" for one in samples).encode()).hexdigest()
    key = (subject.hash(), subject.device, content, side)
    if key not in _kept:
        what = f"{subject.name}: reading with the patches of {side} px"
        _kept[key] = read_samples(_InOneGo(subject, side), samples, work, what)
    return _kept[key]


class _InOneGo:
    """A model as a reader of documents that are not cut."""

    def __init__(self, subject: Subject, side: int):
        from training.evaluation.tokens import sized

        self.name, self._reader = subject.name, subject.reader()
        self._processor = copy.copy(self._reader.processor)
        self._processor.image_processor = sized(self._reader.processor.image_processor, side)
        self._packed = {"return_packed": True} if self._reader.packed else {}

    def read(self, samples: Sequence[TextSample]) -> list[str]:
        images = [sample.image for sample in samples]
        settings = {"task": "ocr", "kind": "document", "scale": 1, "return_tensors": "pt", **self._packed}
        return self._reader.read_inputs(self._processor(images, **settings), [most_pieces(one) for one in samples])


def most_pieces(sample: TextSample) -> int:
    """Pieces that a document can hold at most, by its size and its x-height: the same however far it is shrunk."""
    x_height = sample.x_height or 10.0
    # 0.6 x-heights a character is narrower than any text face, as the Reader has it; lines stand 2 or more apart
    lines = math.ceil(sample.image.height / (2 * x_height))
    return math.ceil(lines * (sample.image.width / (0.6 * x_height) + 2)) + 8


# ---------------------------------------------------------------------------------------------------------------------
# Features of one input at two scales
# ---------------------------------------------------------------------------------------------------------------------


def alike(
    one: np.ndarray, other: np.ndarray, groups: Sequence, at: At, seed: int, failed: int = 0
) -> Iterator[Figure]:
    """``cka``, ``cka_debiased``, ``mutual_neighbours`` and ``cosine`` of pooled features of the same items.

    ``cosine`` only where both are of one width. See :mod:`training.evaluation.similarity`.

    Args:
        one, other: (n, D) and (n, E).
        groups: one an item, that stands and falls together.
    """
    from training.evaluation.similarity import NEIGHBOURS, cka_interval, cosines, mutual_neighbours

    items = len(one) + failed
    try:
        for debiased in (False, True):
            found = cka_interval(one, other, groups, debiased)
            name = "cka_debiased" if debiased else "cka"
            yield Figure(name, found.value, found.low, found.high, items, failed, at=dict(at))
        if len(one) > NEIGHBOURS:
            shares = mutual_neighbours(one, other)
            yield share("mutual_neighbours", shares, groups, at, seed, failed, items)
    except ValueError as error:
        raise NeverMeasured(f"{len(one)} items: {error}") from error
    if one.shape == other.shape:
        yield share("cosine", cosines(one, other), groups, at, seed, failed, items)


def alike_patches(
    one: np.ndarray, other: np.ndarray, owners: Sequence, at: At, seed: int, items: int, failed: int = 0
) -> Iterator[Figure]:
    """``cka`` of patches, a row each, and ``cosine``, of all rows.

    Linear CKA in its plain form: there are far more patches than channels, and patches of one input are not drawn
    independently, which is what the debiased form supposes.

    Args:
        one, other: (T, D) and (T, E), place by place.
        owners: (T,) what a patch stands and falls with.
    """
    from training.evaluation.similarity import cka_interval, cosines

    found = cka_interval(one, other, owners)
    yield Figure("cka", found.value, found.low, found.high, items, failed, at=dict(at))
    if one.shape == other.shape:
        mean = share("cosine", cosines(one, other), owners, at, seed, failed)
        yield Figure("cosine", mean.value, mean.low, mean.high, items, failed, at=dict(at))


class AlikePictures(_OnPictures):
    """How alike the features of a picture at x1 and at other resolutions are.

    Class token and patch mean of x1 against those of every resolution, ``at`` its ``resolution``: a fall is what RADIO
    calls mode switching. Patch tokens of x1 against those of x4, pooled to x1's grid, ``at`` x4's.
    """

    name = "pictures at two scales"

    def __init__(self, options: Options):
        super().__init__(options)
        self._resolutions = options.resolutions

    def fingerprint(self) -> Mapping[str, Any]:
        return {**super().fingerprint(), "resolutions": list(self._resolutions or MULTIPLES)}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.tokens import picture_tokens

        x1, x4 = scales(subject)
        kinds = self._pictures.kinds
        base = picture_features(subject, self._pictures, x1, work)
        for side in sorted({*resolutions(subject, self._resolutions), x4}):
            if side == x1:
                continue
            other = picture_features(subject, self._pictures, side, work)
            fine = ~(base.failed | other.failed)
            for feature in FEATURES:
                at = {"resolution": side, "feature": feature} | ({"scale": "x4"} if side == x4 else {})
                yield from alike(
                    base[feature][fine], other[feature][fine], kinds[fine], at, work.seed, int((~fine).sum())
                )
        grid = (x1 // subject.encoder().patch_size,) * 2
        small, large = (picture_tokens(subject, self._pictures, side, grid, work) for side in (x1, x4))
        fine = ~(small.failed | large.failed)
        owners = np.repeat(kinds[fine], grid[0] * grid[1])
        width = small.patches.shape[-1]
        yield from alike_patches(
            small.patches[fine].reshape(-1, width),
            large.patches[fine].reshape(-1, width),
            owners,
            {"resolution": x4, "feature": "patches", "scale": "x4"},
            work.seed,
            len(fine),
            int((~fine).sum()),
        )


class AlikeDocuments(Evaluator):
    """How alike the features of a document at x1 and at x4 are: ``long`` ones, see :class:`ReadingInOneGo`.

    Shrunk to x1 their type is hard to read, so this is no measure with a best value of 1: what was seen differs too.
    """

    suite = "scale"
    name = "documents at two scales"
    needs = frozenset({ENCODE})

    def __init__(self, options: Options):
        self._documents = HeldOutDocuments.of(options)
        self._limit = options.limit or DOCUMENTS

    def fingerprint(self) -> Mapping[str, Any]:
        return {"documents": self._documents.fingerprint(), "limit": self._limit}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.tokens import common_grids, document_tokens

        samples = document_sets(subject, self._documents, self._limit).get("long")
        if samples is None:
            raise NeverMeasured(f"{subject.name}: no held-out document is larger than x1 and fits x4")
        x1, x4 = scales(subject)
        images = [sample.image for sample in samples]
        small, large = (document_tokens(subject, images, side, work) for side in (x1, x4))
        fine = np.flatnonzero(~(small.failed | large.failed))
        failed = len(samples) - len(fine)
        sources = np.array([samples[index].source for index in fine])
        patches = [[tokens.patches[index] for index in fine] for tokens in (small, large)]
        means = [np.stack([each.mean(axis=(0, 1)) for each in some]) for some in patches]
        pair = small.classes[fine], large.classes[fine]
        yield from alike(*pair, sources, {"feature": CLASS_TOKEN}, work.seed, failed)
        yield from alike(*means, sources, {"feature": PATCH_MEAN}, work.seed, failed)
        one, other, owners = common_grids(*patches)
        at = {"feature": "patches"}
        yield from alike_patches(one, other, sources[owners], at, work.seed, len(samples), failed)


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


class Activations(Evaluator):
    """How large features are, of pictures and documents at x1 and x4, in the last layer and in the one before."""

    suite = "scale"
    name = "activations"
    needs = frozenset({ENCODE})
    LAYERS: Mapping[str, int] = {"last": -1, "second last": -2}

    def __init__(self, options: Options):
        self._whole = HeldOutPictures(options.pictures)
        self._documents = HeldOutDocuments.of(options)
        self._limit = options.limit or DESCRIBED

    def fingerprint(self) -> Mapping[str, Any]:
        found = {"pictures": self._whole.fingerprint, "limit": self._limit, "layers": list(self.LAYERS)}
        try:
            return {**found, "documents": self._documents.fingerprint()}
        except NotMeasured:
            return {**found, "documents": None}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.activations import remark

        sides = dict(zip(("x1", "x4"), scales(subject), strict=True))
        chosen = spread(range(len(self._whole)), self._limit)
        inputs: dict[str, tuple[list[Any], list[Any]]] = {
            "pictures": (chosen, [str(self._whole.kinds[index]) for index in chosen])
        }
        try:
            documents = document_sets(subject, self._documents, self._limit).get("long", [])
            inputs["documents"] = ([one.image for one in documents], [one.source for one in documents])
        except NotMeasured as missing:
            work.notes.append(f"{subject.name}: activations of pictures only; {missing}")
        for kind, (items, groups) in inputs.items():
            for scale, side in sides.items():
                for layer, figures in self._described(subject, kind, items, groups, side, work):
                    for figure in figures:
                        yield Figure.from_dict(
                            {**figure.to_dict(), "at": {"kind": kind, "scale": scale, "layer": layer}}
                        )
                        if figure.name == "activation_rms" and layer == "last" and scale == "x1":
                            work.notes.append(remark(subject.name, figure.value, kind))

    def _described(self, subject: Subject, kind: str, items: list, groups: list, side: int, work: Work):
        """(layer, its figures) of pictures, by their places in the set, or of images of documents."""
        from training.evaluation.activations import ActivationStatistics
        from training.evaluation.tokens import sized, tower, tried

        encoder = subject.encoder()
        processor = sized(encoder.processor, side)

        def batch_of(places: Sequence[int]):
            if kind == "pictures":
                return encoder.pixels([self._whole.picture(items[place], side) for place in places], side), None
            made = processor([items[place] for place in places], kind="document", scale=1, return_tensors="pt")
            return made["pixel_values"].to(encoder.device), made["spatial_shapes"]

        def encode(places: Sequence[int]):
            from modeling_unit import layer_features

            pixels, shapes = batch_of(places)
            with precision(subject):
                layers = layer_features(tower(encoder), pixels, list(self.LAYERS.values()), shapes)
            found = []
            for place in range(len(places)):
                rows, cols = shapes[place].tolist() if shapes is not None else layers[0].spatial.shape[2:]
                found.append(
                    [
                        (
                            as_array(layer.spatial[place, :, :rows, :cols].flatten(1).T),
                            None if layer.class_token is None else as_array(layer.class_token[place]),
                        )
                        for layer in layers
                    ]
                )
            return found

        statistics = {layer: ActivationStatistics(work.seed) for layer in self.LAYERS}
        kept: list[Any] = []
        reason = ""
        bar = work.bar(len(items), f"{subject.name}: activations of {kind} at {side} px")
        for start in range(0, len(items), work.batch_size):
            batch = list(range(start, min(start + work.batch_size, len(items))))
            for places, outcome in tried(encode, batch):
                if isinstance(outcome, Exception):
                    reason = reason or f"{type(outcome).__name__}: {outcome}".splitlines()[0]
                    continue
                for place, layers in zip(places, outcome, strict=True):
                    kept.append(groups[place])
                    for collected, (patches, class_token) in zip(statistics.values(), layers, strict=True):
                        collected.add(patches, class_token)
            bar.update(len(batch))
        bar.close()
        if not kept:
            raise NotMeasured(f"{subject.name} fails at all {len(items)} {kind}: {reason or 'there are none'}")
        for layer, collected in statistics.items():
            yield layer, collected.figures({}, kept, len(items) - len(kept))


# ---------------------------------------------------------------------------------------------------------------------
# What a stage adds
# ---------------------------------------------------------------------------------------------------------------------


class StageGain(_OnPictures):
    """The model less the stage before it on the same items: what stage 2 adds, if stage 1 is the last of `--stages`.

    ``gain_word_f1``, ``gain_cer`` of documents and ``gain_knn_accuracy``, ``gain_probe_accuracy``,
    ``gain_zero_shot_top1`` of pictures, at both scales: documents at x1 and pictures at x4 are the scales that stage 2
    adds. Differences of the figures of the other evaluators, each interval a paired bootstrap: both models on the same
    draws of documents or kinds.
    """

    name = "gain over the stage before"
    roles = frozenset({"model"})
    against = "stage"

    def __init__(self, options: Options):
        super().__init__(options)
        self._documents = HeldOutDocuments.of(options)
        self._limit = options.limit or DOCUMENTS

    def fingerprint(self) -> Mapping[str, Any]:
        found = {**super().fingerprint(), "limit": self._limit, "k": KNN}
        try:
            return {**found, "documents": self._documents.fingerprint()}
        except NotMeasured:
            return {**found, "documents": None}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        before = work.subjects.get("stage")
        if before is None:
            raise NotMeasured("no earlier stage to compare with; name one with --stages NAME=MODEL")
        sides = dict(zip(("x1", "x4"), scales(subject), strict=True))
        if scales(before) != scales(subject):
            raise NeverMeasured(f"{before.name} has other scales than {subject.name}")
        if READ in subject.can and READ in before.can:
            try:
                yield from self._read(subject, before, sides, work)
            except NotMeasured as missing:
                work.notes.append(f"{subject.name} less {before.name}: pictures only; {missing}")
        for scale, side in sides.items():
            now, then = (
                {
                    (name, at.get("feature", ""), at.get("way", "")): correct
                    for name, correct, at in recognised(one, self._pictures, side, work, self._text_tower)
                }
                for one in (subject, before)
            )
            failed = max(_failed(one, self._pictures, side, work) for one in (subject, before))
            for key, correct in now.items():
                name, feature, way = key
                if key not in then or name == "zero_shot_top5":
                    continue
                at = {"over": before.name, "scale": scale}
                at |= {key: value for key, value in (("feature", feature), ("way", way)) if value}
                difference = correct.astype(float) - then[name, feature, way]
                yield share(f"gain_{name}", difference, self._pictures.kinds, at, work.seed, failed)

    def _read(self, subject: Subject, before: Subject, sides: Mapping[str, int], work: Work) -> Iterator[Figure]:
        from training.evaluation.text import count

        for kind, samples in document_sets(subject, self._documents, self._limit).items():
            for scale, side in [("x1", sides["x1"])] if kind == "short" else sides.items():
                both = [read_at(one, samples, side, work) for one in (subject, before)]
                counts = [[count(each.prediction, each.truth) for each in found] for found in both]
                failed = sum(bool(now.error or then.error) for now, then in zip(*both, strict=True))
                at = {"over": before.name, "scale": scale, "set": kind}
                for name, ends in text_gain(*counts, [each.group for each in both[0]], work.seed).items():
                    better = "lower" if name == "cer" else "higher"
                    yield Figure(f"gain_{name}", *ends, len(samples), failed, at=at, better=better)


def text_gain(now: Sequence, then: Sequence, groups: Sequence, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """``{"word_f1": (difference, low, high), "cer": …}`` of two readings of the same texts, counts pooled.

    Args:
        now, then: :class:`training.evaluation.text.Counts` of each text.
        groups: the document of each text; the bootstrap draws documents, the same for both.
    """
    from training.evaluation.text import FIGURES, _figures, pooled

    table = np.concatenate([np.asarray(now, dtype=np.float64), np.asarray(then, dtype=np.float64)], axis=1)
    half = table.shape[1] // 2

    def figures(totals: np.ndarray) -> np.ndarray:
        number = totals[:, :1]
        both = [np.concatenate([number, part], axis=1) for part in (totals[:, 1 : 1 + half], totals[:, 1 + half :])]
        return _figures(both[0]) - _figures(both[1])

    found = pooled(table, figures, groups, seed)
    return {name: tuple(found[:, FIGURES.index(name)].tolist()) for name in ("word_f1", "cer")}
