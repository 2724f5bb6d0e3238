"""Whole pages drawn with skia: text in many layouts and fonts, degraded, with a box per character.

A page is a function of (seed, index), its settings and its resources: the same seed gives the same bytes, whatever the
number of workers and whichever pages are asked for. `page_row` makes one, `build_pages` a data set of them; what pages
are put together from is in `training.data.pages`, the order of the text in `training.data.pages.layouts`.

Lengths are in pixels. All shares and ranges are ours.
"""

from __future__ import annotations

import gc
import hashlib
import io
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .guarded import map_in_order
from .heldout import validation_text_filter
from .pages.corpus import WANTED, Corpus, Scalars, TextStream, load_corpus, measure, pick
from .pages.degradations import (
    DEGRADATIONS,
    Page,
    degrade,
    draw_degradations,
    encode_jpeg,
    ink_and_paper,
    jpeg_quality,
)
from .pages.elements import Sheet, Style
from .pages.fonts import MONOSPACED, load_fonts, metrics
from .pages.layouts import LAYOUTS, WITH_PICTURES, Draft, scene
from .pdf import Report
from .schema import SPLITS, make_row, png_bytes, shard_paths, write_shards
from .sources import data_folder

LICENSE = "Apache-2.0 (drawn by this project)"
BLANK_SHARE = 0.01
SIZE = re.compile(r"(\d+)(?:-(\d+))?(?:x(\d+)(?:-(\d+))?)?")
# The smallest page, in x-heights: a line of eight letters and its margins.
MIN_WIDTH, MIN_HEIGHT = 12, 6
MIN_SIDE, MAX_SIDE = 32, 8192  # px
MAX_PICTURES = 20_000
ATTEMPTS = 20


# ----------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class PageSettings:
    """What pages are to be like; made from a dictionary by ``PageSettings(**dictionary)`` or `from_dict`.

    Args:
        size: ``448``, ``448x640`` (width x height), ``256-896`` (squares of any side between) or
            ``300-600x400-900`` (each side for itself), pixels.
        x_height: least and greatest of the running text, pixels; drawn evenly on a logarithmic scale. Headings, large
            type and words on pictures are larger.
        layouts: names out of `LAYOUTS`; all with their weights when empty, else those alone.
        degradations: names out of `DEGRADATIONS`; empty for none.
        blank_share: of pages with nothing to read on them.
        split: ``train`` or ``validation``; it decides which fonts the resources hold, see `load_page_resources`.

    Raises:
        ValueError: in one line, which of them is wrong and how.
    """

    size: str = "448"
    x_height: tuple[float, float] = (5.0, 12.0)
    layouts: tuple[str, ...] = ()
    degradations: tuple[str, ...] = tuple(DEGRADATIONS)
    blank_share: float = BLANK_SHARE
    split: str = "train"

    def __post_init__(self):
        object.__setattr__(self, "size", str(self.size))
        for name in ("layouts", "degradations", "x_height"):  # lists, as JSON has them
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for what, names, known in (
            ("layout", self.layouts, LAYOUTS),
            ("degradation", self.degradations, DEGRADATIONS),
        ):
            wrong = [name for name in names if name not in known]
            if wrong:
                raise ValueError(f"no {what} is called {wrong[0]!r}; there are {', '.join(known)}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if not 0 <= self.blank_share <= 1:
            raise ValueError(f"blank_share must be between 0 and 1, not {self.blank_share}")
        if len(self.x_height) != 2 or not 3 <= self.x_height[0] <= self.x_height[1] <= 200:
            raise ValueError(f"x_height must be two numbers of 3 to 200 pixels, the lower first, not {self.x_height}")
        (width, _), (height, _), _ = self.ranges
        least = max(MIN_SIDE, int(np.ceil(MIN_WIDTH * self.x_height[0])))
        lowest = max(MIN_SIDE, int(np.ceil(MIN_HEIGHT * self.x_height[0])))
        if width < least or height < lowest:
            raise ValueError(
                f"a page of {width}x{height} pixels is too small for text of {self.x_height[0]:g} pixels x-height: "
                f"{least}x{lowest} at least"
            )

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int], bool]:
        """(least, greatest) of the width, of the height, and whether pages are squares."""
        found = SIZE.fullmatch(self.size)
        if not found:
            raise ValueError(f"size must look like 448, 448x640, 256-896 or 300-600x400-900, not {self.size!r}")
        a, b, c, d = (int(part) if part else None for part in found.groups())
        width = (a, b or a)
        height = width if c is None else (c, d or c)
        if width[0] > width[1] or height[0] > height[1] or max(width[1], height[1]) > MAX_SIDE:
            raise ValueError(f"size {self.size!r}: the lower side first, and {MAX_SIDE} pixels at most")
        return width, height, c is None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PageSettings:
        """Settings from a recipe or a manifest.

        Raises:
            ValueError: an unknown name or a wrong value.
        """
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"made pages have no setting {unknown[0]!r}; there are {', '.join(known)}")
        return cls(**settings)

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` takes, in types that JSON has."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# ---------------------------------------------------------------------------------------------------------- resources


class Pictures:
    """Pictures to set words on and captions below: a data set in the schema, or a folder of image files.

    Args:
        folder: with ``*.parquet``, or with ``.png``, ``.jpg``, ``.jpeg`` and ``.webp`` files at any depth. Of a data
            set the rows of ``split`` with kind ``natural`` are taken, at most `MAX_PICTURES`; rows of the other split
            never.

    Raises:
        ValueError: it holds none.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder = Path(folder).expanduser()
        self.files: list[Path] = []
        self.table = None
        if any(self.folder.glob("*.parquet")):
            self.table = self._read(split)
        elif self.folder.is_dir():
            endings = (".png", ".jpg", ".jpeg", ".webp")
            self.files = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in endings)
        if not len(self):
            raise ValueError(f"{folder} holds no pictures for {split}: neither parquet shards nor image files")

    def _read(self, split: str):
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        parts, count = [], 0
        for path in shard_paths(self.folder):
            part = pq.read_table(path, columns=["image", "kind", "license", "split"])
            wanted = pc.and_(pc.equal(part["split"], split), pc.equal(part["kind"], "natural"))
            part = part.filter(wanted).select(["image", "license"])[: MAX_PICTURES - count]
            parts.append(part)
            count += len(part)
            if count >= MAX_PICTURES:
                break
        return pa.concat_tables(parts)

    def __len__(self) -> int:
        return len(self.files) if self.table is None else len(self.table)

    def content(self, index: int) -> bytes:
        """The image file."""
        if self.table is None:
            return self.files[index].read_bytes()
        return self.table["image"][index]["bytes"].as_py()

    def read(self, index: int) -> tuple[Image.Image, str]:
        """A picture, RGB, on white where it is transparent, and its licence.

        Raises:
            OSError: it cannot be decoded.
        """
        license = "as the pictures given" if self.table is None else self.table["license"][index].as_py()
        with Image.open(io.BytesIO(self.content(index))) as image:
            image.load()
        if image.mode in ("RGBA", "LA", "P", "PA"):
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        return image.convert("RGB"), license


@dataclass
class PageResources:
    """What pages are drawn from; not changed by drawing.

    Args:
        fonts: font files by family; the draw is by family first, so that one with 40 files counts once.
        corpus: the words.
        pictures: for captions and photo pages; drawn scenes where there are none.
        unwanted: whether a text is to be drawn anew, see `heldout.validation_text_filter`.
    """

    fonts: dict[str, list[str]]
    corpus: Corpus
    pictures: Pictures | None = None
    unwanted: Callable[[str], bool] | None = None
    families: list[str] = field(init=False)
    monospaced: list[str] = field(init=False)

    def __post_init__(self):
        if not self.fonts:
            raise ValueError("made pages need at least one font")
        self.families = sorted(self.fonts)
        self.monospaced = [family for family in self.families if MONOSPACED.search(family)] or self.families

    def digest(self) -> str:
        """Of the bytes of all fonts, of the words and of the pictures: what pages depend on beside their settings."""
        digest = hashlib.blake2b(digest_size=16)
        for family in self.families:
            digest.update(family.encode())
            for path in self.fonts[family]:
                digest.update(hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest())
        digest.update(self.corpus.prose.encode())
        digest.update("\n".join(self.corpus.rare).encode())
        for index in range(len(self.pictures or ())):
            digest.update(self.pictures.content(index))
        return digest.hexdigest()


def load_page_resources(
    split: str = "train",
    fonts: str | Path = "packages",
    corpus: Sequence[str | Path] | None = None,
    pictures: str | Path | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> PageResources:
    """Fonts, words and pictures.

    Args:
        split: for ``train`` no held-out font and no text of the validation packages; for ``validation`` the held-out
            fonts only.
        fonts: see `pages.fonts.load_fonts`.
        corpus: text files; the packages' prose when ``None``.
        pictures: a folder, see `Pictures`; ``pictures-train`` or ``pictures-validation`` of the cache when ``None``,
            and drawn scenes where that is not built.
        say: is told what is missing.

    Raises:
        ValueError: no font, no text, or no picture where they were asked for.
        RuntimeError: packages cannot be fetched.
    """
    if pictures is not None:
        found = Pictures(pictures, split)
    elif any(data_folder(f"pictures-{split}").glob("*.parquet")):
        found = Pictures(data_folder(f"pictures-{split}"), split)
    else:
        found = None
        say(f"made pages: no pictures-{split} in the cache (`unit data pictures` builds it): drawn scenes instead")
    words, files = load_corpus(corpus), load_fonts(fonts, split)
    unwanted = None
    if split == "train":
        try:
            unwanted = validation_text_filter()
        except RuntimeError as error:
            say(f"made pages: not compared with the validation documents, which cannot be had here: {error}")
    return PageResources(files, words, found, unwanted)


# --------------------------------------------------------------------------------------------------------------- rows


def page_row(index: int, seed: int, settings: PageSettings, resources: PageResources) -> dict[str, Any]:
    """Row ``index`` of the data set that ``seed`` makes: a function of its arguments and nothing else.

    Raises:
        RuntimeError: no text was found that may be drawn, in `ATTEMPTS` attempts.
    """
    for attempt in range(ATTEMPTS):
        page, text, layout, family, licenses, quality = draw_page(index, seed, settings, resources, attempt)
        if text and resources.unwanted is not None and resources.unwanted(text):
            continue
        boxes = whole_boxes(page.boxes, page.pixels.shape) if text else None
        return make_row(
            png_bytes(page.pixels, quick=True) if quality is None else encode_jpeg(page.pixels, quality),
            text,
            task="ocr",
            kind="document",
            char_boxes=boxes,
            x_height=page.x_height if text else 0.0,
            source=f"made-pages/{layout}/{seed}#{index}" + (f" ({family})" if text else ""),
            license="; ".join([LICENSE, *(f"picture: {license}" for license in licenses)]),
            split=settings.split,
        )
    raise RuntimeError(
        f"page {index} of seed {seed} held text of the validation documents in each of {ATTEMPTS} attempts: "
        "the corpus shares too much with them"
    )


def draw_page(
    index: int, seed: int, settings: PageSettings, resources: PageResources, attempt: int = 0
) -> tuple[Page, str, str, str, list[str], int | None]:
    """The page, its text, layout, font families, its pictures' licences, and the quality of a last JPEG that is still
    to be done (None for none)."""
    rng = np.random.default_rng([seed, index, attempt])
    scalars = Scalars(int(rng.integers(2**62)))
    layout = _layout(scalars, settings)
    sheet, families, x_height = lay_out(layout, scalars, settings, resources)
    ink, paper = ink_and_paper(rng)
    pixels, boxes = sheet.draw(ink, paper)
    page = Page(pixels, boxes, x_height, round(ink), round(paper))
    chosen = draw_degradations(rng, settings.degradations)
    quality = None
    if chosen and chosen[-1].name == "jpeg":  # the file itself is the last degradation
        quality = jpeg_quality(chosen.pop().strength)
    page = degrade(page, chosen)
    return page, sheet.text(), layout, families, sheet.licenses, quality


def _layout(rng: Scalars, settings: PageSettings) -> str:
    dice = rng.random()
    if rng.random() < settings.blank_share:
        return "blank"
    names = settings.layouts or tuple(LAYOUTS)
    total = sum(LAYOUTS[name][0] for name in names)
    for name in names:
        dice -= LAYOUTS[name][0] / total
        if dice < 0:
            return name
    return names[-1]


def lay_out(layout: str, rng: Scalars, settings: PageSettings, resources: PageResources) -> tuple[Sheet, str, float]:
    """A sheet with ``layout`` on it, the families of its fonts, and the x-height of its running text."""
    (least, most), (lowest, highest), square = settings.ranges
    width = rng.integers(least, most + 1)
    height = width if square else rng.integers(lowest, highest + 1)
    low, high = settings.x_height
    high = max(low, min(high, width / MIN_WIDTH, height / MIN_HEIGHT))
    x_height = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    sheet = Sheet(width, height, colours=layout in WITH_PICTURES)
    if layout == "blank":
        return sheet, "", x_height
    family = pick(rng, resources.families)
    path = pick(rng, resources.fonts[family])
    heading_family = family if rng.random() < 0.6 else pick(rng, resources.families)
    heading_path = pick(rng, resources.fonts[heading_family])
    used = [family, heading_family]
    mono_path = path
    if layout in ("code", "receipt", "form"):
        used.append(pick(rng, resources.monospaced))
        mono_path = pick(rng, resources.fonts[used[-1]])
    leading = rng.uniform(2.2, 3.3)
    tracking = x_height * rng.uniform(-0.02, 0.12) if rng.random() < 0.15 else 0.0
    paths = {path, heading_path, mono_path}

    def covers(text: str) -> bool:
        return all(metrics(path).covers(text) for path in paths)

    def picture(width: int, height: int) -> tuple[np.ndarray, str]:
        return _picture(rng, resources.pictures, width, height)

    draft = Draft(
        sheet,
        TextStream(resources.corpus, rng, covers),
        rng,
        Style(path, x_height, leading, tracking),
        Style(heading_path, x_height, leading),
        Style(mono_path, x_height, leading),
        picture,
    )
    LAYOUTS[layout][1](draft)
    return sheet, "; ".join(dict.fromkeys(used)), x_height


def _picture(rng: Scalars, pictures: Pictures | None, width: int, height: int) -> tuple[np.ndarray, str]:
    """A random part of a random picture, enlarged or shrunk to (height, width, 3), and its licence."""
    for _ in range(5 if pictures else 0):
        try:
            image, license = pictures.read(rng.integers(len(pictures)))
        except OSError:  # a damaged file among them
            continue
        factor = rng.uniform(0.6, 1.0) * min(image.width / width, image.height / height)
        wide, high = max(width * factor, 1.0), max(height * factor, 1.0)
        left, top = rng.random() * max(image.width - wide, 0), rng.random() * max(image.height - high, 0)
        box = (left, top, min(left + wide, image.width), min(top + high, image.height))
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=2.0)), license
    return scene(rng, width, height), ""


def whole_boxes(boxes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(N, 4) int: boxes outwards to whole pixels, kept on the page of ``shape`` (H, W, ...)."""
    whole = np.empty(boxes.shape, dtype=np.int64)
    whole[:, :2], whole[:, 2:] = np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])
    return whole.clip(0, (shape[1], shape[0]) * 2)


# ------------------------------------------------------------------------------------------------------------ data set


def build_pages(
    out: str | Path,
    count: int,
    settings: PageSettings,
    resources: PageResources,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Report:
    """Draw ``count`` pages into ``out``: shards and ``report.json`` with the settings, the pages by layout and the
    measured shares of digits, capitals, punctuation and rare words.

    Raises:
        ValueError: a count below 1 or no worker.
    """
    from tqdm import tqdm

    if count < 1 or workers < 1:
        raise ValueError(f"{count} pages by {workers} workers: both must be 1 or more")
    begin = time.perf_counter()
    layouts: Counter = Counter()
    texts: list[str] = []

    def watched(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in tqdm(rows, total=count, unit="page", disable=not progress):
            layouts[row["source"].split("/")[1]] += 1
            if len(texts) < 5000:
                texts.append(row["text"])
            yield row

    gc.freeze()  # what is loaded stays; to look through it at each collection costs a third of the time [measured]
    try:
        rows = map_in_order(
            lambda index: page_row(index, seed, settings, resources), range(count), workers=workers, batch=16
        )
        written = write_shards(watched(rows), out)
    finally:
        gc.unfreeze()
    report = Report(rows=written, seconds=time.perf_counter() - begin)
    report.save(
        Path(out),
        seed=seed,
        **settings.as_dict(),
        families=len(resources.families),
        pages_by_layout=dict(layouts.most_common()),
        wanted_shares=WANTED,
        measured_shares=measure(texts, resources.corpus),
    )
    return report
