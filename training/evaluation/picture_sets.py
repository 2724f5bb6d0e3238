"""Labelled pictures that the picture suites measure on, each set with its own preprocessing."""

from __future__ import annotations

import functools
import hashlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.errors import first_line
from training.evaluation.cache import hash_of
from training.evaluation.contract import NotMeasured
from training.evaluation.sets import spread

if TYPE_CHECKING:
    from PIL import Image


class HeldOutPictures:
    """``pictures-validation``: kinds that nobody trains on, each drawn by several hands, on fixed backgrounds.

    Nothing is read before it is asked for; always the whole set, for a picture needs the others as neighbours.

    Args:
        folder: as `unit data` builds it; None for where it puts it.

    Raises:
        NotMeasured: there is no such folder, or (from what reads it) it is not whole.
    """

    name = "held-out pictures"

    def __init__(self, folder: Path | None = None):
        if folder is None:
            from training.data.sources import data_folder

            folder = data_folder("pictures-validation")
        self.folder = Path(folder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the folder's content."""
        try:
            return hash_of(self.folder)
        except FileNotFoundError:
            raise NotMeasured(
                f"{self.folder} does not exist: build the held-out pictures with `unit data pictures` and "
                "`unit data targets`, or name their folder with --pictures"
            ) from None

    @functools.cached_property
    def _content(self) -> tuple[list[dict], list[str], np.ndarray]:
        from training.evaluation.image import read_validation

        try:
            return read_validation(self.folder)
        except ValueError as error:
            raise NotMeasured(str(error)) from error

    @property
    def rows(self) -> list[dict]:
        """Rows of the parquet shards: image, text, concept, style, family."""
        return self._content[0]

    @property
    def names(self) -> list[str]:
        """The kinds, sorted."""
        return self._content[1]

    @property
    def class_embeddings(self) -> np.ndarray:
        """(kinds, 384) MiniLM embeddings of the names, of length 1, row by row with :attr:`names`."""
        return self._content[2]

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """(n,) str, the kind of each picture."""
        return np.array([row["concept"] for row in self.rows])

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """(n,) int, the kind of each picture as a place in :attr:`names`."""
        place = {name: i for i, name in enumerate(self.names)}
        return np.array([place[kind] for kind in self.kinds])

    @functools.cached_property
    def families(self) -> np.ndarray:
        """(n,) str, the family of style of each picture: what may not be a neighbour, nor in training and test."""
        return np.array([row["family"] for row in self.rows])

    @functools.cached_property
    def styles(self) -> np.ndarray:
        """(n,) str, the style of each picture, finer than its family."""
        return np.array([row["style"] for row in self.rows])

    @property
    def captions(self) -> list[str]:
        """The caption of each picture."""
        return [row["text"] for row in self.rows]

    @functools.cached_property
    def caption_embeddings(self) -> np.ndarray:
        """(n, 384) float32 MiniLM embeddings of the captions, of length 1."""
        from safetensors.numpy import load_file

        tensors = load_file(self.folder / "concept_sentence.safetensors")
        if "sentence" not in tensors or len(tensors["sentence"]) != len(self):
            raise NotMeasured(f"{self.folder} has no embeddings of its captions; make them with `unit data targets`")
        return tensors["sentence"].astype(np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, index: int, side: int) -> Image.Image:
        """RGB, square, on the background that its path decides."""
        from training.evaluation.image import validation_picture

        return validation_picture(self.rows[index], side)


# -------------------------------------------------------------------------------------------- labelled photographs

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
TRAIN_PER_CLASS = 50  # pictures of a class that k-NN and the probe of a large set know  [ours]
IMAGE_NAMES = ("image", "img", "rgb", "pixel_values")
MASK_NAMES = ("annotation", "label", "mask", "segmentation", "seg")
TEST_SPLITS = ("validation", "val", "valid", "test")


def centre_crop(picture: Image.Image, side: int) -> Image.Image:
    """RGB, the shorter side resized to ``side`` and the middle square kept, as is customary on ImageNet."""
    from PIL import Image

    picture.draft("RGB", (side, side))  # a JPEG is read at a fraction of its size where that is still larger
    picture = picture.convert("RGB")
    scale = side / min(picture.size)
    size = (max(side, round(picture.width * scale)), max(side, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return picture.crop((left, top, left + side, top + side))


class LabelledPictures:
    """A part of a labelled set: what to score, or what k-NN and a probe know.

    Attributes:
        name, fingerprint: as for every set of pictures.
        labels: (n,) class numbers.
    """

    def __init__(self, name: str, fingerprint: str, labels: np.ndarray, load):
        self.name, self.fingerprint, self.labels, self._load = name, fingerprint, labels, load

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int, side: int) -> Image.Image:
        """RGB, the middle square."""
        return centre_crop(self._load(index), side)


class ClassFolder:
    """A labelled set in a folder as ImageNet is unpacked: ``val/CLASS/*.JPEG``, and ``train/CLASS/*.JPEG`` if there.

    Classes are called as their folders, underscores read as blanks, or as ``classes.txt`` says, a line
    ``FOLDER name, other name`` each. Folders named like WordNet ids (n01440764) have no name without it.

    Args:
        folder: that folder.
        limit: at most so many pictures to be scored, spread evenly; all by default.

    Raises:
        NotMeasured: there is no val/, or it has no folders of classes.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.name = Path(folder), Path(folder).name
        places = [name for name in ("val", "validation") if (self.folder / name).is_dir()]
        if not places:
            raise NotMeasured(f"--imagenet {folder}: there is no val/ there, which holds a folder for each class")
        found = self._files(self.folder / places[0])
        self.classes = sorted({path.parent.name for path in found})
        if not found:
            raise NotMeasured(
                f"--imagenet {folder}: no labels: {places[0]}/ has no pictures in folders, one for each class"
            )
        self._test = spread(found, limit)
        train = self._files(self.folder / "train") if (self.folder / "train").is_dir() else []
        by_class: dict[str, list[Path]] = {name: [] for name in self.classes}
        for path in train:
            if path.parent.name in by_class:
                by_class[path.parent.name].append(path)
        self._train = [path for files in by_class.values() for path in spread(files, TRAIN_PER_CLASS)]

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the pictures that are used, of their classes and of the names."""
        beside = [path for path in [self.folder / "classes.txt"] if path.is_file()]
        classes = " ".join(path.parent.name for path in (*self._test, *self._train))
        return f"{hash_of([*self._test, *self._train, *beside])} {hashlib.sha256(classes.encode()).hexdigest()}"

    @property
    def names(self) -> list[str] | None:
        """The classes' names, None where nothing tells them."""
        table = self.folder / "classes.txt"
        if table.is_file():
            lines = [line.split(maxsplit=1) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            known = {parts[0]: parts[1].split(",")[0].strip() for parts in lines if len(parts) == 2}
            missing = [name for name in self.classes if name not in known]
            if missing:
                raise NotMeasured(
                    f"{table} does not name {len(missing)} of the classes, the first of them {missing[0]}"
                )
            return [known[name] for name in self.classes]
        if any(re.fullmatch(r"n\d{8}", name) for name in self.classes):
            return None
        return [name.replace("_", " ") for name in self.classes]

    @property
    def test(self) -> LabelledPictures:
        """What is scored."""
        return self._part(self._test, "validation")

    @property
    def train(self) -> LabelledPictures | None:
        """What k-NN and the probe know, None where there is no ``train/``."""
        return self._part(self._train, "train") if self._train else None

    def _part(self, files: list[Path], split: str) -> LabelledPictures:
        from PIL import Image

        place = {name: i for i, name in enumerate(self.classes)}
        labels = np.array([place[path.parent.name] for path in files])
        name = f"{self.name}, {split}"
        return LabelledPictures(name, f"{self.fingerprint} {split}", labels, lambda index: Image.open(files[index]))


class HubClasses:
    """A labelled set in parquet, on the Hub or in a folder: a column of images and a column of class labels.

    Rows are streamed. What is scored are the first rows of the validation split; k-NN and the probe know the first
    :data:`TRAIN_PER_CLASS` of each class among as many rows of the train split as would hold twice as many.

    Args:
        source: Hub id, such as ``"ILSVRC/imagenet-1k"`` (gated: accept its terms and log in), or a folder.
        limit: at most so many pictures to be scored; all by default.

    Raises:
        NotMeasured: (from what reads it) it cannot be reached, or has no labels.
    """

    def __init__(self, source: str, limit: int | None = None):
        self.source, self.limit, self.name = source, limit, source.rstrip("/").rsplit("/", 1)[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash or commit of the data set, and how much of it."""
        return f"{hub_fingerprint(self.source)} {self.limit} {TRAIN_PER_CLASS}"

    @functools.cached_property
    def _splits(self) -> dict:
        return HubRows.splits(self.source, "--imagenet")

    @functools.cached_property
    def _columns(self) -> tuple[str, str]:
        """Names of the columns of images and of labels."""
        if "validation" not in self._splits:
            raise NotMeasured(f"--imagenet {self.source}: there is no validation split, only {sorted(self._splits)}")
        features = self._splits["validation"].features or {}
        images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        labels = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
        if not images or not labels:
            raise NotMeasured(
                f"--imagenet {self.source}: no labels: a column of images and one of class labels are needed; it has "
                f"{', '.join(features)}"
            )
        return images[0], labels[0]

    def check(self) -> None:
        """That there are columns of images and of labels; ``NotMeasured`` where not."""
        assert self._columns

    @property
    def names(self) -> list[str] | None:
        """The classes' names."""
        return [
            name.split(",")[0].replace("_", " ")
            for name in self._splits["validation"].features[self._columns[1]].names
        ]

    @property
    def test(self) -> LabelledPictures:
        """What is scored."""
        label = self._columns[1]
        labels = HubRows.column(self.source, self._splits["validation"], label, self.limit)
        return self._part("validation", np.arange(len(labels)), labels)

    @property
    def train(self) -> LabelledPictures | None:
        """What k-NN and the probe know, None without a train split."""
        if "train" not in self._splits:
            return None
        label = self._columns[1]
        classes = len(self._splits["validation"].features[label].names)
        labels = HubRows.column(self.source, self._splits["train"], label, 2 * TRAIN_PER_CLASS * classes)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:TRAIN_PER_CLASS] for c in range(classes)]))
        return self._part("train", chosen, labels[chosen]) if len(chosen) else None

    def _part(self, split: str, chosen: np.ndarray, labels: np.ndarray) -> LabelledPictures:
        if (labels < 0).any():
            raise NotMeasured(f"--imagenet {self.source}: no labels: its {split} split is not labelled")
        image, _ = self._columns
        most = int(chosen[-1]) + 1 if len(chosen) else 0
        rows = HubRows(self.source, self._splits[split], (image,), most, known=True)
        name = f"{self.name}, {split}"

        def load(index: int) -> Image.Image:
            return opened(rows[int(chosen[index])][image])

        return LabelledPictures(name, f"{self.fingerprint} {split}", labels, load)


class HubRows:
    """Rows of a streamed data set, read on in order; going back starts the stream anew.

    Args:
        source: as messages call it.
        stream: the split.
        columns: of images, whose content comes as bytes.
        most: at most so many rows.
        known: the split has at least ``most`` rows; else they are counted first.
    """

    def __init__(self, source: str, stream, columns: tuple[str, ...], most: int, known: bool = False):
        import datasets

        self.source, self.columns, self._next, self._rows = source, columns, 0, iter(())
        self._stream = stream.select_columns(list(columns))
        for column in columns:
            self._stream = self._stream.cast_column(
                column, datasets.Image(decode=False)
            )  # broken ones are ours to count
        stated = (stream.info.splits or {}).get(str(stream.split))
        if known:
            self._count = most
        elif stated is not None and stated.num_examples:
            self._count = min(most, stated.num_examples)
        else:
            self._count = sum(1 for _ in self._stream.take(most))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        """A row; :func:`opened` makes an image of what it holds."""
        if index < self._next:
            self._rows, self._next = iter(self._stream), 0
        elif self._next == 0:
            self._rows = iter(self._stream)
        row = None
        while self._next <= index:
            row, self._next = next(self._rows), self._next + 1
        return row

    @staticmethod
    def splits(source: str, option: str) -> dict:
        """Streams by split, the one to be scored called "validation".

        Raises:
            NotMeasured: it cannot be reached, is gated, or is not there.
        """
        import datasets

        try:
            found = dict(datasets.load_dataset(source, streaming=True))
        except Exception as error:  # of the network, the Hub, the format: each library has its own
            line = first_line(error)
            hint = (
                "; accept its terms on the Hub and log in with `hf auth login`"
                if "gated" in str(error).lower()
                else ""
            )
            raise NotMeasured(f"{option} {source}: it cannot be opened{hint} ({line})") from error
        for name in TEST_SPLITS:
            if name in found and "validation" not in found:
                found["validation"] = found[name]
        return found

    @staticmethod
    def column(source: str, stream, name: str, most: int | None) -> np.ndarray:
        """(n,) whole numbers of a column of the first ``most`` rows of a split; -1 where there is none."""
        import datasets

        try:  # a parquet file gives one column without the pictures beside it
            narrow = datasets.load_dataset(source, split=str(stream.split), streaming=True, columns=[name])
        except (TypeError, ValueError):  # other formats know no such word
            narrow = stream.select_columns([name])
        narrow = narrow if most is None else narrow.take(most)
        return np.array([-1 if row[name] is None else row[name] for row in narrow], dtype=np.int64)


def opened(value: dict | None) -> Image.Image:
    """The PIL image of ``{"bytes", "path"}``."""
    from PIL import Image

    if value is None:
        raise ValueError("a row has no image")
    return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])


def image_columns(features: dict, source: str) -> tuple[str, str]:
    """Names of the columns of pictures and of masks.

    Raises:
        NotMeasured: they cannot be told.
    """
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    pictures = [name for name in images if name.lower() in IMAGE_NAMES]
    others = [name for name in images if name not in pictures]
    masks = others if len(others) == 1 else [name for name in others if name.lower().rstrip("s") in MASK_NAMES]
    if len(pictures) != 1 or len(masks) != 1:
        raise NotMeasured(
            f"--segmentation {source}: no labels: two columns of images are needed, the pictures' called image and "
            f"the masks' called annotation; it has {', '.join(features) or 'no columns that are known'}"
        )
    return pictures[0], masks[0]


def hub_fingerprint(source: str, kind: str = "dataset") -> str:
    """What names the content of a folder, or of a repository on the Hub: a hash, or its commit.

    Raises:
        NotMeasured: it is neither a folder nor a repository that can be reached.
    """
    if Path(source).is_dir():
        return hash_of(source)
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().repo_info(source, repo_type=kind, timeout=20).sha)
    except Exception as error:  # the client of the network decides which, and it is not always an OSError
        line = first_line(error)
    try:  # a copy in the cache bears its commit as its name
        return Path(huggingface_hub.snapshot_download(source, repo_type=kind, local_files_only=True)).name
    except Exception:
        raise NotMeasured(f"{source}: neither a folder nor a {kind} on the Hub that can be reached ({line})") from None
