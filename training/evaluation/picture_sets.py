"""Labelled pictures that the picture suites measure on, each set with its own preprocessing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.evaluation.cache import hash_of
from training.evaluation.contract import NotMeasured

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
