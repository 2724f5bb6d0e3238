"""Which documents, fonts and pictures are held out from training, and whether a data set obeys.

Validation documents come from packages that no training document comes from, but packages share passages (licences,
the same author's boilerplate). So texts are compared by content: a training text is unwanted when it shares a whole
line of 20 characters or more, or any seven words in a row, with any text of the validation packages.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from .refusals import Refusals
from .sources import cache_root
from .text import join_lines, words

LINE_LENGTH = 20  # characters; shorter lines ("Introduction") are shared by everything
RUN_LENGTH = 7  # words; six is where chance agreements of technical prose begin to show


@lru_cache(maxsize=1)
def heldout() -> dict[str, Any]:
    """The content of ``heldout.yaml``: ``documents``, ``fonts``, ``markdown`` and ``pictures``."""
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


def shared_text_filter() -> TextFilter:
    """Whether a text holds a commonplace that some training text has too, of those that ``heldout.yaml`` lists.

    Nothing that reading is measured on may hold one.
    """
    marks = [mark for text in heldout()["documents"]["shared"] for mark in fingerprints(text)]
    return TextFilter(np.array(marks, dtype=np.uint64))


def validation_text_filter(progress: bool = True) -> TextFilter:
    """The filter that training texts of every kind go through, made once and cached: all lines of the validation
    packages, their pages' Markdown, and the held-out Markdown files.

    The first call reads every page of the validation packages twice over: some two minutes.

    Raises:
        RuntimeError: a package cannot be fetched.
    """
    path = validation_text_path()
    if not path.is_file():
        marks = chain(_marks_of_packages(validation_packages(), progress), _marks_of_markdown(progress))
        marks = np.unique(np.fromiter(marks, dtype=np.uint64))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, marks)
        partial.rename(path)
    return TextFilter(np.load(path))


def validation_text_path() -> Path:
    """Where the marks of `validation_text_filter` lie once they are made."""
    packages = validation_packages(), heldout()["markdown"]["packages"]
    tag = hashlib.blake2b(repr((packages, LINE_LENGTH, RUN_LENGTH, 4)).encode(), digest_size=4)
    return cache_root() / "data" / f"validation-text-{tag.hexdigest()}.npy"


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
            except ValueError:  # no page that any set is made of
                continue
            for joined in chain_lines(lines):
                yield from fingerprints("\n".join(line.text for line in joined))
        document.close()


def _marks_of_markdown(progress: bool) -> Iterator[int]:
    """Fingerprints of what the validation sets with Markdown can hold: a page's text there is joined otherwise than
    its lines are, and has formulas and code from the source."""
    from tqdm import tqdm

    from . import markdown
    from .markdown_latex import find_pairs, pages_of_document
    from .markdown_pages import find_documents, marks_of
    from .sources import fetch_deb

    npm = [f"npm:{name}" for name in heldout()["markdown"]["packages"]]
    if npm:
        yield from marks_of(find_documents(npm, "validation"))
    pairs = [pair for package in validation_packages() for pair in find_pairs(fetch_deb(package))]
    for pdf, tex in tqdm(pairs, desc="held-out Markdown", unit="document", disable=not progress):
        # whatever the size of a page is to be
        for page in pages_of_document(pdf, tex, 64, 1_000_000, Counter(), least_x_height=0.0):
            yield from fingerprints(markdown.write(page.blocks))
            yield from fingerprints(markdown.visible_text(page.blocks))


@dataclass
class LeakCheck:
    """What validation rows hold, and whether a training row holds any of it. Rows pass through; only marks are kept.

    Five things are looked for in a training row: a source that is held out (a package, or a page drawn in a held-out
    font), the pixels of a validation image, a picture that looks like one of validation or of the demo (perceptual
    hash), text that shares a `fingerprint <fingerprints>` with a validation text. Fonts are compared by `font_leaks`
    when all rows have passed.

    Args:
        marks: fingerprints of held-out texts beyond those of the rows, or none.
        fonts: font files by family, of all families that either side is drawn in.
    """

    marks: frozenset[int] = frozenset()
    fonts: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)  # what was compared
    texts: dict[int, str] = field(default_factory=dict, repr=False)  # fingerprint -> source
    images: dict[bytes, str] = field(default_factory=dict, repr=False)  # digest of pixels -> source
    sizes: set[tuple] = field(default_factory=set, repr=False)  # mode and size of those images
    looks: dict[int, str] = field(default_factory=dict, repr=False)  # perceptual hash -> source
    families: dict[str, set[str]] = field(default_factory=lambda: {"train": set(), "validation": set()})

    def __post_init__(self):
        pictures = heldout()["pictures"]
        self.packages = tuple(f"{package}/" for package in validation_packages())
        self.distance, self.demo_distance = int(pictures["distance"]), int(pictures["demo_distance"])
        self.demo = {int(picture["phash"], 16): picture["file"] for picture in pictures["demo"]}

    def hold_out(self, row: dict[str, Any]) -> None:
        """Remember a validation row: the columns image (not decoded), text, kind and source."""
        source = row["source"]
        self.counts["validation rows"] += 1
        self.sizes.add(_mode_and_size(row))
        self.images[_pixels(row)] = source
        self.families["validation"].update(_families(source))
        if row["kind"] == "natural":
            self.looks[_look(row)] = source
        fresh = dict.fromkeys(fingerprints(row["text"]), source)
        self.counts["validation lines and runs of words"] += len(fresh)
        self.texts.update(fresh)

    def leak_of(self, row: dict[str, Any]) -> str | None:
        """What a training row has that it must not have, in one line that names both rows; None when all is well."""
        source, text = row["source"], row["text"]
        self.counts["training rows"] += 1
        npm = re.match(r"made-markdown/npm/(@[^/]+/[^/]+|[^/]+)/", source)
        if source.startswith(self.packages) or (npm and is_heldout_markdown(npm[1])):
            return f"{source}: from a held-out package"
        families = _families(source)
        self.families["train"].update(families)
        if wrong := [family for family in families if is_heldout_font(family)]:
            return f"{source}: drawn in a held-out font ({', '.join(wrong)})"
        # Blank canvases are alike. Only what can be the same need be decoded.
        if text and _mode_and_size(row) in self.sizes and (same := self.images.get(_pixels(row))):
            return f"{source}: the same image as {same}"
        if row["kind"] == "natural":
            self.counts["training pictures by their look"] += 1
            look = _look(row)
            for looks, distance in ((self.looks, self.distance), (self.demo, self.demo_distance)):
                near = min(looks, key=lambda other: (look ^ other).bit_count(), default=None)
                if near is not None and (look ^ near).bit_count() <= distance:
                    return f"{source}: looks like {looks[near]}"
        found = list(fingerprints(text))
        self.counts["training lines and runs of words"] += len(found)
        for mark in found:
            if mark in self.texts:
                return f"{source}: shares text with {self.texts[mark]}"
            if mark in self.marks:
                return f"{source}: shares text with a held-out package"
        return None

    def font_leaks(self) -> list[str]:
        """Families seen in training whose files, or whose letters, are those of a held-out family of another name."""
        held: dict[bytes, str] = {}
        for family in sorted(self.fonts):
            if is_heldout_font(family) or family in self.families["validation"]:
                for path in self.fonts[family]:
                    held.update(dict.fromkeys(font_marks(path), family))
        leaks = []
        for family in sorted(self.families["train"] & self.fonts.keys()):
            for path in self.fonts[family]:
                self.counts["training font files"] += 1
                if same := next((held[mark] for mark in font_marks(path) if mark in held), None):
                    leaks.append(f"font {family} ({Path(path).name}): the same letters as the held-out {same}")
        return leaks


def _families(source: str) -> list[str]:
    """Font families that a made row names at the end of its source, ``… (One; Another)``."""
    found = re.fullmatch(r"made-[a-z]+/.* \((.+)\)", source)
    return [family.strip() for family in found[1].split(";")] if found else []


def font_marks(path: str | Path) -> tuple[bytes, bytes]:
    """Two digests of a font file: of its bytes, and of its printable ASCII letters (advances and boxes of the outlines
    at 1000 units), which a renamed or repacked copy keeps."""
    import skia

    font = skia.Font(skia.Typeface.MakeFromFile(str(path)), 1000.0)
    font.setLinearMetrics(True)
    glyphs = font.unicharsToGlyphs(range(33, 127))
    boxes = [
        round(side) for box in font.getBounds(glyphs) for side in (box.left(), box.top(), box.right(), box.bottom())
    ]
    letters = np.array([*boxes, *map(round, font.getWidths(glyphs))], dtype=np.int32)
    return (
        hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest(),
        hashlib.blake2b(letters.tobytes(), digest_size=16).digest(),
    )


def cached_fonts() -> dict[str, list[str]]:
    """Font files by family, as far as the made pages' listings in the cache name them; nothing is fetched."""
    trees, fonts = cache_root() / "trees", {}
    for listing in sorted(trees.glob("fonts-*.json")):
        for family, files in json.loads(listing.read_text(encoding="utf-8")).items():
            fonts[family] = sorted({*fonts.get(family, ()), *(str(trees / file) for file in files)})
    return {family: files for family, files in fonts.items() if all(Path(file).is_file() for file in files)}


def find_leaks(
    train: Iterable[str | Path | dict[str, Any]],
    validation: Iterable[str | Path | dict[str, Any]],
    progress: bool = True,
    check: LeakCheck | None = None,
    refusals: Refusals | None = None,
) -> list[str]:
    """Compare data sets: what training has that it must not have.

    Args:
        train: sources of training rows: folders of shards, data sets on the Hub (``owner/name[:split]``), which are
            streamed, or what the key `dataset` of a recipe says, in any layout that `mapping` knows.
        validation: sources of validation rows.
        progress: show a bar.
        check: looks for what `LeakCheck` says; one of your own has more texts and fonts to compare, and keeps counts.
        refusals: counts rows that cannot be used, and so are not compared.

    Returns:
        One line a finding, naming both rows; empty when all is well.

    Raises:
        ValueError: a source holds no rows.
    """
    from tqdm import tqdm

    check, refusals = check or LeakCheck(), Refusals() if refusals is None else refusals
    sides = {"validation": list(validation), "train": list(train)}
    opened = {side: [_rows(source, side, refusals) for source in sources] for side, sources in sides.items()}
    leaks = []
    for side in ("validation", "train"):
        for name, rows in opened[side]:
            for row in tqdm(rows, desc=Path(name).name, unit=" rows", disable=not progress, mininterval=2.0):
                try:
                    leak = check.hold_out(row) if side == "validation" else check.leak_of(row)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    refusals.accept(name, -1)
                    refusals.add(name, "image: cannot be read", f"{row['source']}: {error}")
                    continue
                if leak:
                    leaks.append(leak)
    return leaks + check.font_leaks()


def _rows(source: str | Path | dict[str, Any], side: str, refusals: Refusals) -> tuple[str, Iterable[dict[str, Any]]]:
    """Name of a source, and its rows with what is compared; what is wrong with it is said before the first is read."""
    from .mapping import read_source
    from .schema import REQUIRED, read_columns, shard_paths

    if not isinstance(source, dict):
        hub = None if Path(source).is_dir() else re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", str(source))
        if not hub:
            import pyarrow.parquet as pq

            if set(REQUIRED) <= set(pq.read_schema(shard_paths(source)[0]).names):  # decoded once, not twice
                rows = read_columns(source, ["image", "text", "kind", "source"])
                return str(source), _counted(rows, str(source), refusals)
            source = {"path": str(source)}
        else:
            source = {"path": hub[1], "split": hub[2] or side}
    rows = read_source(source, streaming=True, refusals=refusals)
    return rows.name, rows


def _counted(rows: Iterable[dict[str, Any]], name: str, refusals: Refusals) -> Iterator[dict[str, Any]]:
    for row in rows:
        refusals.accept(name)
        yield row


def _mode_and_size(row: dict[str, Any]) -> tuple:
    """Of an image, which is not decoded for it."""
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        return image.mode, image.size


def _pixels(row: dict[str, Any]) -> bytes:
    """Digest of an image's pixels: another file format or compression of the same picture has the same."""
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
        digest.update(image.tobytes())
    return digest.digest()


def _look(row: dict[str, Any]) -> int:
    from .pictures import perceptual_hash

    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        return perceptual_hash(image)
