"""Font files by family, and what is to be known of a font to set type with it.

Held-out families (``heldout.yaml``) are for ``validation`` and nothing else is, wherever fonts come from.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import skia

from ..heldout import is_heldout_font
from ..sources import cache_root, fetch_deb

# Debian packages of fonts with Latin letters: 78 families, 55 MB, free licences (mostly OFL).
_CHUNK_PACKAGES = """
fonts-adf-accanthis fonts-adf-baskervald fonts-adf-gillius fonts-adf-universalis fonts-anonymous-pro fonts-cabin
fonts-cantarell fonts-comic-neue fonts-courier-prime fonts-crosextra-caladea fonts-crosextra-carlito fonts-dejavu-core
fonts-dosis fonts-ebgaramond fonts-fanwood fonts-firacode fonts-freefont-ttf fonts-goudybookletter fonts-hack
fonts-inconsolata fonts-jetbrains-mono fonts-junicode fonts-jura fonts-karla fonts-lato fonts-league-spartan
fonts-liberation2 fonts-linuxlibertine fonts-mononoki fonts-oldstandard fonts-open-sans fonts-play fonts-prociono
fonts-quicksand fonts-roboto-unhinted fonts-sil-charis fonts-sil-gentium fonts-texgyre fonts-urw-base35 fonts-vollkorn
fonts-yanone-kaffeesatz
"""
CHUNK_PACKAGES = _CHUNK_PACKAGES.split()
# What whole pages are set in besides.
_MORE_PACKAGES = """
fonts-adf-berenis fonts-adf-ikarius fonts-adf-irianis fonts-adf-libris fonts-adf-mekanus fonts-adf-oldania
fonts-adf-romande fonts-adf-solothurn fonts-adf-switzera fonts-adf-tribun fonts-adf-verana fonts-agave fonts-allerta
fonts-apropal fonts-arapey fonts-arkpandora fonts-averia-gwf fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-b612
fonts-bebas-neue fonts-beteckna fonts-breip fonts-bwht fonts-cardo fonts-century-catalogue fonts-clear-sans fonts-cmu
fonts-comfortaa fonts-compagnon fonts-croscore fonts-dancingscript fonts-dkg-handwriting fonts-dustin
fonts-ecolier-court fonts-engadget fonts-essays1743 fonts-eurofurence fonts-fantasque-sans fonts-femkeklaver
fonts-georgewilliams fonts-gfs-artemisia fonts-gfs-didot fonts-gfs-neohellenic fonts-gnutypewriter fonts-go
fonts-hermit fonts-hosny-amiri fonts-humor-sans fonts-inter fonts-isabella fonts-johnsmith-induni fonts-junction
fonts-kaushanscript fonts-kristi fonts-league-mono fonts-lemonada fonts-levien-museum fonts-levien-typoscript
fonts-lindenhill fonts-linex fonts-lmodern fonts-lobster fonts-lobstertwo fonts-manrope fonts-millimetre fonts-monofur
fonts-monoid fonts-national-park fonts-ocr-a fonts-ocr-b fonts-okolaks fonts-opendin
fonts-opendyslexic fonts-osifont fonts-oxygen fonts-paratype fonts-quattrocento fonts-roadgeek fonts-roboto-slab
fonts-routed-gothic fonts-rufscript fonts-sil-andika fonts-sil-doulos fonts-sil-galatia fonts-sil-gentium-basic
fonts-sil-gentiumplus fonts-sjfonts fonts-sora fonts-stix fonts-summersby fonts-tiresias fonts-tlwg-garuda-otf
fonts-tlwg-kinnari-otf fonts-tlwg-laksaman-otf fonts-tlwg-loma-otf fonts-tlwg-mono-otf fonts-tlwg-norasi-otf
fonts-tlwg-purisa-otf fonts-tlwg-sawasdee-otf fonts-tlwg-typewriter-otf fonts-tlwg-typist-otf fonts-tlwg-typo-otf
fonts-tlwg-umpush-otf fonts-tlwg-waree-otf fonts-tomsontalks fonts-tuffy fonts-ubuntu-title fonts-yrsa-rasa
"""
PAGE_PACKAGES = CHUNK_PACKAGES + _MORE_PACKAGES.split()
NO_LETTERS = re.compile("D050000L|Symbols|Keyboard")  # families with something else where the letters should be
MONOSPACED = re.compile("mono|code|courier|cursor|typewriter|typist|consol|hack|agave|hermit|anonymous", re.IGNORECASE)
PRINTABLE = "".join(chr(code) for code in range(33, 127))
SYSTEM_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts")

# Scripts that are set one character after another, left to right: Latin, Greek, Cyrillic, signs. Others would need a
# shaping engine, so their words are left out.
LAST_CODE = 0x2C00
UNIT = 1000.0  # px; the size that metrics are taken at


# ------------------------------------------------------------------------------------------------------------- files


def load_fonts(source: str | Path = "packages", split: str = "train") -> dict[str, list[str]]:
    """Font files by family.

    Args:
        source: ``packages`` (Debian's, by `PAGE_PACKAGES`), ``system`` (matplotlib's and the machine's own), or a
            folder that is searched for ``.ttf`` and ``.otf`` files.
        split: ``train`` is every family but the held-out ones, ``validation`` those only.

    Raises:
        ValueError: no usable font was found.
        RuntimeError: the packages cannot be fetched.
    """
    if source == "packages":
        found = package_fonts(PAGE_PACKAGES, lower_case=True)
    else:
        folders = _system_folders() if source == "system" else [Path(source).expanduser()]
        if source != "system" and not folders[0].is_dir():
            raise ValueError(f"--fonts is 'packages', 'system' or a folder; there is no folder {source}")
        files = sorted(path for folder in folders for path in folder.rglob("*"))
        found = find_fonts(files, lower_case=True)
    fonts = {family: files for family, files in found.items() if is_heldout_font(family) == (split == "validation")}
    if not fonts:
        which = "held-out families only (training/data/heldout.yaml)" if split == "validation" else "not held out"
        raise ValueError(
            f"no font found in {source} that has all printable ASCII characters and is for {split} ({which}): "
            f"give --fonts a folder with .ttf or .otf files, or 'packages'"
        )
    return fonts


def _system_folders() -> list[Path]:
    folders = [Path(name).expanduser() for name in SYSTEM_FOLDERS]
    try:
        import matplotlib

        folders.insert(0, Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    except ImportError:
        pass
    return [folder for folder in folders if folder.is_dir()]


def package_fonts(packages: list[str], lower_case: bool = False) -> dict[str, list[str]]:
    """Font files of Debian packages by family, held-out ones included; the listing is kept in the cache."""
    trees = cache_root() / "trees"
    tag = zlib.crc32(" ".join([*packages, *(["lower case"] if lower_case else [])]).encode())
    listing = trees / f"fonts-{tag:08x}.json"  # paths below the trees, so that a cache can be moved
    if not listing.is_file():
        files = [path for package in packages for path in sorted(fetch_deb(package).rglob("*"))]
        found = find_fonts(files, lower_case)
        below = {
            family: [Path(file).relative_to(trees).as_posix() for file in files] for family, files in found.items()
        }
        partial = listing.with_suffix(".partial")
        partial.write_text(json.dumps(below))
        partial.rename(listing)
    return {family: [str(trees / file) for file in files] for family, files in json.loads(listing.read_text()).items()}


def find_fonts(files: Iterable[Path], lower_case: bool = False) -> dict[str, list[str]]:
    """Those of ``files`` that hold every printable ASCII character and have ink for it, by family.

    Args:
        files: any files; what is not ``.ttf`` or ``.otf`` is passed over.
        lower_case: leave out fonts whose lower case is drawn as capitals, where a reader cannot tell the case.
    """
    found: dict[str, list[str]] = {}
    for path in files:
        if path.suffix.lower() not in (".ttf", ".otf") or path.is_symlink() or not path.is_file():
            continue
        face = skia.Typeface.MakeFromFile(str(path))
        if face is None:
            continue
        font = skia.Font(face, 100.0)
        glyphs = font.unicharsToGlyphs([ord(character) for character in PRINTABLE])
        if 0 in glyphs or any(box.isEmpty() for box in font.getBounds(glyphs)):
            continue
        if NO_LETTERS.search(face.getFamilyName()) or (lower_case and not _has_lower_case(font)):
            continue
        found.setdefault(face.getFamilyName(), []).append(str(path))
    return found


def _has_lower_case(font: skia.Font) -> bool:
    """Whether p, q and y descend below the line, which no capital of theirs does."""
    p, q, y, x, capital = font.getBounds(font.textToGlyphs("pqyxX"))
    return min(p.bottom(), q.bottom(), y.bottom()) > 0.08 * capital.height() and x.height() < 0.93 * capital.height()


# ----------------------------------------------------------------------------------------------------------- metrics


@lru_cache(maxsize=2048)
def typeface(path: str) -> skia.Typeface:
    """The font file at ``path``.

    Raises:
        ValueError: skia cannot read it.
    """
    face = skia.Typeface.MakeFromFile(path)
    if face is None:
        raise ValueError(f"{path} is not a font that skia can read")
    return face


class Metrics:
    """Glyphs, advances and ink boxes of a font by character code, at a size of one pixel; filled as codes are met.

    Attributes:
        x_height: height of the ink of ``x``.
        ascent, descent: how far printable ASCII reaches above and below the baseline, both positive.
    """

    def __init__(self, path: str):
        self.face = typeface(path)
        self.font = skia.Font(self.face, UNIT)
        self.font.setLinearMetrics(True)
        self.font.setHinting(skia.FontHinting.kNone)
        self.slots = np.zeros(LAST_CODE, dtype=np.uint16)  # 0: not met yet
        self.glyphs = np.zeros(1, dtype=np.uint16)
        self.advances = np.zeros(1)
        self.bounds = np.zeros((1, 4))  # left, top, right, bottom from the pen; y grows downwards
        self._meet(np.arange(32, 127))
        ink = self.bounds[2:]  # 0 is nothing, 1 the space
        x = self.bounds[self.slots[ord("x")]]
        self.x_height = max(float(x[3] - x[1]), 0.05)
        self.ascent, self.descent = float(-ink[:, 1].min()), float(ink[:, 3].max())

    def _meet(self, codes: np.ndarray) -> None:
        glyphs = self.font.unicharsToGlyphs(codes.tolist())
        self.slots[codes] = len(self.glyphs) + np.arange(len(codes))
        boxes = [[box.left(), box.top(), box.right(), box.bottom()] for box in self.font.getBounds(glyphs)]
        self.glyphs = np.concatenate([self.glyphs, np.array(glyphs, dtype=np.uint16)])
        self.advances = np.concatenate([self.advances, np.array(self.font.getWidths(glyphs)) / UNIT])
        self.bounds = np.concatenate([self.bounds, np.array(boxes) / UNIT])

    def find(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Character codes of ``text`` and the rows in ``glyphs``, ``advances`` and ``bounds`` that describe them."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        slots = self.slots.take(codes, mode="clip")
        if len(slots) and not slots.all():
            self._meet(np.unique(codes[slots == 0].clip(0, LAST_CODE - 1)))
            slots = self.slots.take(codes, mode="clip")
        return codes, slots

    def covers(self, text: str) -> bool:
        """Whether every character can be set in this font, one after another."""
        if text.isascii():
            return text.isprintable()
        codes, slots = self.find(text)
        combining = (codes >= 0x300) & (codes < 0x370)
        right_to_left = (codes >= 0x530) & (codes < 0x1E00)  # and the scripts that need shaping
        return bool((codes < LAST_CODE).all() and self.glyphs[slots].all() and not (combining | right_to_left).any())


@lru_cache(maxsize=2048)
def metrics(path: str) -> Metrics:
    """The `Metrics` of the font file at ``path``, kept."""
    return Metrics(path)
