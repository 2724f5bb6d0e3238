"""Which documents and fonts are held out from training, and whether a text was.

Validation documents come from packages that no training document comes from, but packages share passages (licences,
the same author's boilerplate). So texts are compared by content: a training text is unwanted when it shares a whole
line of 20 characters or more, or any seven words in a row, with any English line of the validation packages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .sources import cache_root
from .text import join_lines, words

LINE_LENGTH = 20  # characters; shorter lines ("Introduction") are shared by everything
RUN_LENGTH = 7  # words; six is where chance agreements of technical prose begin to show


@lru_cache(maxsize=1)
def heldout() -> dict[str, Any]:
    """The content of ``heldout.yaml``: ``documents``, ``fonts``, ``markdown``. Pictures have a file of their own."""
    return yaml.safe_load((Path(__file__).parent / "heldout.yaml").read_text())


def validation_packages() -> list[str]:
    """Debian packages whose PDFs are for validation only."""
    return list(heldout()["documents"]["packages"])


def is_heldout_font(family: str) -> bool:
    """Whether a font family must not be used to make training pages."""
    return any(family.lower().startswith(name.lower()) for name in heldout()["fonts"]["families"])


def is_heldout_markdown(package: str) -> bool:
    """Whether the Markdown files of an npm package, of whatever version, must not be trained on."""
    return _without_version(package) in {_without_version(name) for name in heldout()["markdown"]["packages"]}


def _without_version(package: str) -> str:
    return re.sub(r"(?<=.)@.*", "", package)


def refuse_validation_packages(packages: Iterable[str]) -> None:
    """Raise a ValueError when one of ``packages`` is held out."""
    wrong = sorted(set(packages) & set(validation_packages()))
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: held out for validation (training/data/heldout.yaml), not to train on")


def fingerprints(text: str) -> Iterator[int]:
    """64-bit marks of a text: one for each line of `LINE_LENGTH` characters or more, one for each run of
    `RUN_LENGTH` words, both in lower case without punctuation, line breaks undone for the runs."""
    for line in text.split("\n"):
        plain = " ".join(words(line))
        if len(plain) >= LINE_LENGTH:
            yield _mark(plain)
    run = words(join_lines(text))
    for start in range(len(run) - RUN_LENGTH + 1):
        yield _mark(" ".join(run[start : start + RUN_LENGTH]))


def _mark(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class TextFilter:
    """Callable: whether a text shares a fingerprint with a set of texts."""

    def __init__(self, marks: np.ndarray):
        self.marks = frozenset(marks.tolist())

    def __call__(self, text: str) -> bool:
        return any(mark in self.marks for mark in fingerprints(text))


def validation_text_filter(progress: bool = True) -> TextFilter:
    """The filter that training texts go through: all English lines of the validation packages, made once and cached.

    The first call reads the text layer of every page of the validation packages: about a minute.
    """
    packages = validation_packages()
    tag = hashlib.blake2b(repr((packages, LINE_LENGTH, RUN_LENGTH, 2)).encode(), digest_size=4).hexdigest()
    path = cache_root() / "data" / f"validation-text-{tag}.npy"
    if not path.is_file():
        marks = np.unique(np.fromiter(_marks_of_packages(packages, progress), dtype=np.uint64))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, marks)
        partial.rename(path)
    return TextFilter(np.load(path))


def _marks_of_packages(packages: list[str], progress: bool) -> Iterator[int]:
    import pypdfium2 as pdfium
    from tqdm import tqdm

    from .pdf import chain_lines, find_lines, list_documents, read_glyphs
    from .sources import fetch_deb

    documents = [(package, path) for package in packages for path, _ in list_documents(package)]
    for package, path in tqdm(documents, desc="held-out text", unit="document", disable=not progress):
        document = pdfium.PdfDocument(fetch_deb(package) / path)
        for page in document:
            try:
                lines = find_lines(read_glyphs(page))
            except ValueError:  # a rotated page
                continue
            for chain in chain_lines(lines):
                yield from fingerprints("\n".join(line.text for line in chain))
        document.close()


def find_leaks(train: Iterable[str | Path], validation: Iterable[str | Path], progress: bool = True) -> list[str]:
    """Compare built data sets: what training has that it must not have.

    Four things are looked for: training rows from a held-out package, training rows drawn in a held-out font, images
    that are the same in both, and document texts that share a `fingerprint <fingerprints>` with a validation text.

    Args:
        train: folders of training shards.
        validation: folders of validation shards.
        progress: show a bar.

    Returns:
        One line a finding, naming both rows; empty when all is well.

    Raises:
        ValueError: a folder holds no shards.
    """
    from tqdm import tqdm

    from .schema import read_columns, shard_paths

    train, validation = list(train), list(validation)
    for folder in (*train, *validation):
        shard_paths(folder)  # complain before an hour is spent, not after
    columns = ["image", "text", "kind", "source"]
    images: dict[bytes, str] = {}
    marks: dict[int, str] = {}
    for folder in validation:
        for row in tqdm(read_columns(folder, columns), desc=f"{Path(folder).name}", unit="row", disable=not progress):
            images[_digest(row)] = row["source"]
            if row["kind"] == "document":
                marks.update(dict.fromkeys(fingerprints(row["text"]), row["source"]))
    packages = tuple(f"{package}/" for package in validation_packages())
    leaks = []
    for folder in train:
        for row in tqdm(read_columns(folder, columns), desc=f"{Path(folder).name}", unit="row", disable=not progress):
            source = row["source"]
            font = re.fullmatch(r"made-(?:pages|markdown)/.*\((.+)\)", source)
            npm = re.match(r"made-markdown/npm/(@[^/]+/[^/]+|[^/]+)/", source)
            if source.startswith(packages) or (npm and is_heldout_markdown(npm[1])):
                leaks.append(f"{source}: from a held-out package")
            elif font and is_heldout_font(font[1]):
                leaks.append(f"{source}: drawn in a held-out font")
            elif (same := images.get(_digest(row))) and row["text"]:  # blank canvases are alike
                leaks.append(f"{source}: the same image as {same}")
            elif row["kind"] == "document":
                shared = next((marks[mark] for mark in fingerprints(row["text"]) if mark in marks), None)
                if shared:
                    leaks.append(f"{source}: shares text with {shared}")
    return leaks


def _digest(row: dict[str, Any]) -> bytes:
    return hashlib.blake2b(row["image"]["bytes"], digest_size=16).digest()
