"""Made pages to be measured on: dense small type, sparse large type, and paper with nothing to read on it.

SYN-L and SYN-S of the paper are made documents with much small and with little large type; sizes and numbers are ours.
The fonts are the held-out families, the words paragraphs of the validation packages: no made page of a training set
has either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2 as pdfium
from PIL import Image

from . import heldout
from .guarded import map_in_order
from .made_pages import LICENSE, PageResources, PageSettings, page_row
from .pages.corpus import Corpus
from .pages.degradations import encode_jpeg, field, gaussian_blur
from .pages.fonts import load_fonts
from .pdf import STOP_WORDS, Report, chain_lines, find_lines, list_documents, read_glyphs, split_paragraphs
from .schema import make_row, png_bytes, write_shards
from .sources import cache_root, fetch_deb
from .text import join_lines, words

SEED = 7_000_000  # far from the seeds that made pages for training start at
SYN = {
    "syn-l": PageSettings("896x1152", (6.0, 8.0), ("paragraphs",), (), 0.0, "validation"),
    "syn-s": PageSettings("448-640x448-640", (14.0, 26.0), ("paragraphs", "headings", "large"), (), 0.0, "validation"),
}
SYN_WORDS = {"syn-l": (500, 2000), "syn-s": (5, 100)}  # over 500: UNIT, arXiv 2409.04095
SYN_COUNT = {"syn-l": 48, "syn-s": 96}
BLANK_COUNT = 64
BLANK_SIDE = (256, 897)  # px, from ... to
PROSE_PAGES = 8  # of a document


# ----------------------------------------------------------------------------------------------------- SYN-L, SYN-S


def build_syn(
    name: str,
    out: str | Path,
    count: int | None = None,
    *,
    resources: PageResources | None = None,
    seed: int = SEED,
    workers: int = 1,
    progress: bool = True,
) -> Report:
    """``count`` drawn pages of ``syn-l`` or ``syn-s`` in ``out``; pages with another number of words, or with a
    commonplace of training texts, are passed over.

    Raises:
        ValueError: another name, or ``resources`` with a font that is not held out.
        RuntimeError: packages cannot be fetched, or too few pages have the number of words.
    """
    from tqdm import tqdm

    if name not in SYN:
        raise ValueError(f"made sets are {', '.join(SYN)}, not {name!r}")
    begin = time.perf_counter()
    settings, (least, most) = SYN[name], SYN_WORDS[name]
    resources = resources or heldout_resources(progress)
    refuse_training_fonts(resources)
    count = count or SYN_COUNT[name]
    tried = 0
    shared = heldout.shared_text_filter()

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal tried
        kept = 0
        drawn = map_in_order(
            lambda index: page_row(index, seed, settings, resources), range(4 * count), workers=workers, batch=8
        )
        for row in drawn:
            tried += 1
            if least < len(words(row["text"])) <= most and not shared(row["text"]):
                kept += 1
                yield row
            if kept == count:
                return
        raise RuntimeError(f"{name}: only {kept} of {tried} pages have {least} to {most} words")

    bar = tqdm(rows(), total=count, unit="page", desc=name, disable=not progress)
    report = Report(rows=write_shards(bar, out, rows_per_shard=500))
    report.seconds = time.perf_counter() - begin
    report.save(
        Path(out), seed=seed, **settings.as_dict(), words=[least, most], drawn=tried, families=resources.families
    )
    return report


def refuse_training_fonts(resources: PageResources) -> None:
    """Raise a ValueError when pages would be drawn in a font that made pages for training are drawn in."""
    wrong = [family for family in resources.families if not heldout.is_heldout_font(family)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not held out for validation (training/data/heldout.yaml)")


def heldout_resources(progress: bool = True) -> PageResources:
    """The held-out fonts, and the prose of the validation packages."""
    return PageResources(load_fonts("packages", "validation"), Corpus(heldout_prose(progress)))


def heldout_prose(progress: bool = True) -> str:
    """Paragraphs of the validation packages without their line breaks, each once; kept in the cache."""
    from tqdm import tqdm

    packages = heldout.validation_packages()
    kept = cache_root() / "trees" / f"prose-{'-'.join(packages)}.txt"
    if not kept.is_file():
        documents = [(package, path, pages) for package in packages for path, pages in list_documents(package)]
        found: dict[str, None] = {}
        for package, path, pages in tqdm(documents, desc="held-out prose", unit="document", disable=not progress):
            document = pdfium.PdfDocument(fetch_deb(package) / path)
            for number in np.linspace(0, pages - 1, min(pages, PROSE_PAGES)).astype(int).tolist():
                found.update(dict.fromkeys(_paragraphs(document[number])))
            document.close()
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_text("\n".join(found), encoding="utf-8")
        partial.rename(kept)
    return kept.read_text(encoding="utf-8")


def _paragraphs(page) -> Iterator[str]:
    try:
        lines = find_lines(read_glyphs(page))
    except ValueError:
        return
    for chain in chain_lines(lines):
        for paragraph in split_paragraphs(chain):
            text = join_lines("\n".join(line.text for line in paragraph))
            found = words(text)
            if len(found) >= 15 and sum(word in STOP_WORDS["en"] for word in found) >= 0.2 * len(found):
                yield text


# ------------------------------------------------------------------------------------------------------------- blank


def build_blank(out: str | Path, count: int = BLANK_COUNT, seed: int = SEED) -> Report:
    """``count`` sheets of every kind of `BLANKS` in turn: rows whose text is empty.

    Other kinds of paper than those trained on, which are plain, ruled with a line or three, blotched or specked, and
    strips of pictures.
    """
    begin = time.perf_counter()
    report = Report(rows=write_shards((blank_row(index, seed) for index in range(count)), out))
    report.seconds = time.perf_counter() - begin
    report.save(Path(out), seed=seed, kinds=list(BLANKS), split="validation")
    return report


def blank_row(index: int, seed: int = SEED) -> dict[str, Any]:
    """Row ``index``: a function of its arguments and nothing else."""
    kind = list(BLANKS)[index % len(BLANKS)]
    rng = np.random.default_rng([seed, index])
    height, width = (int(side) for side in rng.integers(*BLANK_SIDE, size=2))
    pixels = BLANKS[kind](rng, height, width).clip(0, 255).round().astype(np.uint8)
    return make_row(
        encode_jpeg(pixels, 85) if kind in NOISY else png_bytes(pixels),
        "",
        task="ocr",
        kind="document",
        source=f"made-blank/{kind}/{seed}#{index}",
        license=LICENSE,
        split="validation",
    )


def _sheet(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) float64: paper of one shade of near-white."""
    return np.full((height, width), rng.uniform(225, 255))


def _white(rng, height, width):
    return np.full((height, width), 255.0)


def _grey(rng, height, width):
    """One grey, or one that grows lighter to a side."""
    down, across = rng.uniform(-40, 40, size=2)
    slope = down * np.linspace(0, 1, height)[:, None] + across * np.linspace(0, 1, width)[None, :]
    return rng.uniform(60, 215) + slope


def _scanner_noise(rng, height, width):
    """Grain, faint bands along the way of the scanning head, and specks of dust."""
    pixels = _sheet(rng, height, width) + rng.normal(0, rng.uniform(3, 12), (height, width))
    pixels += gaussian_row(rng, width, 6.0)[None, :]
    dust = rng.random((height, width)) < 2e-5
    soft = gaussian_blur((255 * dust).astype(np.uint8), 1.2).astype(np.float64)
    return pixels - 3.0 * soft


def gaussian_row(rng: np.random.Generator, count: int, most: float) -> np.ndarray:
    """(count,): smooth random values of ``most`` at most."""
    steps = np.cumsum(rng.normal(0, 1, count))
    return most * (steps - steps.mean()) / max(np.abs(steps - steps.mean()).max(), 1e-6)


def _paper_texture(rng, height, width):
    """Fibres and unevenness on two scales."""
    coarse = field(rng, (height, width), rng.uniform(40, 160)).astype(np.float64) - 127.5
    fine = field(rng, (height, width), rng.uniform(2, 5)).astype(np.float64) - 127.5
    return rng.uniform(190, 240) + rng.uniform(0.05, 0.2) * coarse + rng.uniform(0.05, 0.15) * fine


def _scan_border(rng, height, width):
    """A sheet that does not fill the glass: dark beyond its edges, which are not quite straight."""
    pixels = _sheet(rng, height, width) + rng.normal(0, 2.0, (height, width))
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    left, right = rng.uniform(0, 0.08, size=2) * width
    top, bottom = rng.uniform(0, 0.08, size=2) * height
    lean = rng.uniform(-0.02, 0.02)
    outside = (columns < left + lean * rows) | (columns > width - right + lean * rows)
    outside |= (rows < top + lean * columns) | (rows > height - bottom + lean * columns)
    pixels[outside] = rng.uniform(0, 60)
    return pixels


def _frame(rng, height, width):
    """One or two ruled frames, as around a certificate."""
    pixels, ink = _sheet(rng, height, width), rng.uniform(0, 90)
    inset = int(rng.uniform(0.03, 0.1) * min(height, width))
    for number in range(int(rng.integers(1, 3))):
        at, thick = inset + 10 * number, int(rng.integers(1, 5))
        for part in (
            np.s_[at : at + thick, at : width - at],
            np.s_[height - at - thick : height - at, at : width - at],
        ):
            pixels[part] = ink
        for part in (
            np.s_[at : height - at, at : at + thick],
            np.s_[at : height - at, width - at - thick : width - at],
        ):
            pixels[part] = ink
    return pixels


def _ruled(rng, height, width):
    """A sheet of a notebook: lines all the way down, and often a margin."""
    pixels, ink = _sheet(rng, height, width), rng.uniform(110, 200)
    pitch = int(rng.integers(18, 44))
    for y in range(int(rng.integers(pitch, 3 * pitch)), height, pitch):
        pixels[y : y + int(rng.integers(1, 3))] = ink
    if rng.random() < 0.6:
        at = int(rng.uniform(0.08, 0.2) * width)
        pixels[:, at : at + 2] = ink
    return pixels


def _squared(rng, height, width):
    """Squared paper, or an empty table."""
    pixels, ink = _sheet(rng, height, width), rng.uniform(60, 200)
    down = int(rng.integers(14, 60))
    across = down if rng.random() < 0.5 else int(rng.integers(60, 160))
    pixels[int(rng.integers(1, down)) :: down] = ink
    pixels[:, int(rng.integers(1, across)) :: across] = ink
    return pixels


def _punched(rng, height, width):
    """Two to four holes down the left, a fold across, both with their shadow."""
    pixels = _sheet(rng, height, width)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    radius = rng.uniform(0.012, 0.025) * height
    for y in np.linspace(0.15, 0.85, int(rng.integers(2, 5))) * height:
        pixels[(rows - y) ** 2 + (columns - 3 * radius) ** 2 < radius**2] = rng.uniform(20, 90)
    fold = rng.uniform(0.3, 0.7) * height
    pixels -= rng.uniform(15, 45) * np.exp(-(((rows - fold) / rng.uniform(2, 8)) ** 2))
    smooth = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return np.asarray(smooth.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)


BLANKS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "white": _white,
    "grey": _grey,
    "scanner noise": _scanner_noise,
    "paper texture": _paper_texture,
    "scan border": _scan_border,
    "frame": _frame,
    "ruled": _ruled,
    "squared": _squared,
    "punched and folded": _punched,
}
NOISY = ("scanner noise", "paper texture", "scan border")
