"""Captioned pictures from Debian and npm packages: emoji in six styles, clip art, stamps and photographs.

``python -m training.data.pictures --out ~/.cache/unit/data`` writes

- ``pictures-train/*.parquet``: pictures to train on, in a shuffled order that the seed fixes;
- ``pictures-validation/*.parquet``: pictures of kinds that are never trained on (``heldout.yaml``);
- ``pictures-validation/concept_names.json``: the validation kinds, sorted;
- ``report.json`` in either folder: counts per source, and what was thrown away and why.

Columns are the project's schema (image, text, task, kind, char_boxes, x_height, source, license, split) and, for
pictures only: ``concept`` (an emoji name such as "zebra", or "" when unknown), ``group`` (emoji subgroup or folder),
``style`` (one hand's drawing style), ``family`` (styles drawn after one another share it: the evaluation must not take
a copy for a neighbour) and ``keywords``. A cut-out is a square RGBA PNG, its transparent margin trimmed, so that
training can lay it on any background; a photograph is an RGB JPEG. :func:`compose` makes pixels of either.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import re
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.schema import read_columns, write_shards
from training.data.sources import cache_root, fetch_deb, fetch_npm
from training.data.text import normalize_text

SIDE = 160  # px, longest side of a stored cut-out; photographs have this as their shorter side. ours: x1 is 128
MAX_WORDS = 29  # the paper takes captions of under 30 words (arXiv 2409.04095)
ROWS_PER_SHARD = 4096

# Versions are pinned so that the same seed gives the same data next year.
NPM = {
    "openmoji": "openmoji@17.0.0",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "emojibase": "emojibase-data@17.0.0",
}
# One design drawn twice (a vector drawing and its rendering) is one family.
FAMILIES = {"google": "noto", "noto": "noto", "fluent-3d": "fluent", "fluent": "fluent"}
LICENSES = {
    "openmoji": "CC-BY-SA-4.0",
    "fluent-3d": "MIT",
    "fluent": "MIT",
    "google": "Apache-2.0",
    "noto": "Apache-2.0",
    "twitter": "CC-BY-4.0",
    "tuxpaint": "GPL-2.0",
    "openclipart": "public domain",
}

# Packages with pictures that could be had and are not taken.
UNUSED = {
    "npm @tabler/icons, lucide-static": "line icons of interfaces: tags say what a button does, not what is seen",
    "deb mate-, lomiri-, plasma-workspace-wallpapers": "some 70 photographs without words; file names name moods",
    "PyPI scikit-image": "a handful of test pictures without words; most are fetched from elsewhere when asked for",
}


@dataclass(frozen=True)
class Picture:
    """One picture with its words, before it becomes a row.

    Attributes:
        image: RGBA cut-out or RGB photograph, any size.
        caption: a short English phrase.
        style: whose drawing style, e.g. ``"twitter"``.
        name: path inside the package; with ``source`` it names the picture for good.
        source: the package, e.g. ``"npm openmoji@17.0.0"``.
        license: SPDX id or ``"public domain"``.
        concept: emoji name or "".
        group: emoji subgroup or folder, or "".
        keywords: other words for it.
    """

    image: Image.Image
    caption: str
    style: str
    name: str
    source: str
    license: str
    concept: str = ""
    group: str = ""
    keywords: tuple[str, ...] = ()
    author: str = ""


# ---------------------------------------------------------------------------------------------------------- pixels


def trimmed(image: Image.Image, side: int = SIDE) -> Image.Image:
    """Cut the transparent margin off an RGBA picture, fit it into ``side`` px and centre it on a square.

    A picture is never enlarged. Fully transparent pictures raise ``ValueError``.
    """
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise ValueError("the picture is wholly transparent")
    image = image.crop(box)
    scale = min(1.0, side / max(image.size))
    if scale < 1:
        # Premultiplied alpha, or the colour hidden under transparent pixels bleeds into the edge.
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGBA")
    square = Image.new("RGBA", (max(image.size),) * 2, (0, 0, 0, 0))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square


def shrunk(image: Image.Image, side: int = SIDE) -> Image.Image:
    """An RGB photograph, cropped to 3:2 at most about its middle, its shorter side at most ``side`` px."""
    image = image.convert("RGB")
    short = min(image.size)
    width, height = min(image.width, short * 3 // 2), min(image.height, short * 3 // 2)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    scale = min(1.0, side / short)
    return image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS, reducing_gap=3.0)


def compose(
    image: Image.Image,
    size: int,
    background: tuple[int, int, int] = (245, 245, 245),
    fill: float = 0.9,
    offset: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """Make a square RGB picture of a stored one: a cut-out is laid on a background, a photograph is cropped.

    Args:
        image: RGBA cut-out or a picture of any other mode, taken as a photograph.
        size: side of the result, px.
        background: colour under a cut-out, 0 to 255.
        fill: the cut-out's longer side as a share of ``size``, in (0, 1]; photographs always fill the square.
        offset: where in the free room a cut-out lies, and which part of a long photograph is kept: (x, y) in [0, 1].

    Returns:
        RGB picture of ``size`` by ``size``.
    """
    if image.mode == "RGBA":
        canvas = Image.new("RGB", (size, size), background)
        scale = size * fill / max(image.size)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.convert("RGBa").resize(inner, Image.Resampling.BICUBIC).convert("RGBA")
        canvas.paste(image, (round((size - inner[0]) * offset[0]), round((size - inner[1]) * offset[1])), image)
        return canvas
    image = image.convert("RGB")
    short = min(image.size)
    left, top = round((image.width - short) * offset[0]), round((image.height - short) * offset[1])
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))


def perceptual_hash(image: Image.Image) -> int:
    """A 64-bit hash that survives rescaling and recompression.

    The signs, against their median, of the 8x8 lowest frequencies of the cosine transform of the picture on white,
    grey, 32x32 px (the widely used "pHash"). Compare with :func:`hash_distance`.
    """
    grey = np.asarray(compose(image, 32, (255, 255, 255), fill=1.0).convert("L"), dtype=np.float64)
    n = np.arange(32)
    basis = np.cos(np.pi * (2 * n[None, :] + 1) * np.arange(8)[:, None] / 64)  # (8, 32)
    low = (basis @ grey @ basis.T).flatten()
    bits = low > np.median(low[1:])
    return int("".join("1" if bit else "0" for bit in bits), 2)


def hash_distance(one: int, other: int) -> int:
    """Bits in which two perceptual hashes differ, 0 to 64."""
    return (one ^ other).bit_count()


def encoded(image: Image.Image) -> bytes:
    """PNG bytes of a cut-out (RGBA), JPEG bytes of a photograph (RGB)."""
    buffer = io.BytesIO()
    if image.mode == "RGBA":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


UNITS = {b"": 1.0, b"px": 1.0, b"pt": 4 / 3, b"pc": 16.0, b"mm": 96 / 25.4, b"cm": 96 / 2.54, b"in": 96.0}  # CSS


def rasterise(svg: bytes, side: int = 2 * SIDE, whole: bool = False) -> Image.Image:
    """Draw an SVG with skia on transparent ground, its longer side ``side`` px.

    Args:
        svg: the file's bytes.
        side: longer side of the result, px.
        whole: take the drawing's own extent instead of the page's (clip art is often drawn beside its page).

    Returns:
        RGBA picture.

    Raises:
        ValueError: skia cannot read it, it has neither size nor viewBox, or it draws nothing.
    """
    root = re.search(rb"<(?:\w+:)?svg\b[^>]*>", svg, re.S)
    if root is None:
        raise ValueError("no <svg> element")
    attributes = {key: value for key, _, value in re.findall(rb"""\s([\w:]+)\s*=\s*(["'])(.*?)\2""", root[0], re.S)}
    try:
        if b"viewBox" in attributes:
            left, top, width, height = (float(v) for v in re.split(rb"[\s,]+", attributes[b"viewBox"].strip()))
        else:
            left, top = 0.0, 0.0
            sizes = [re.fullmatch(rb"\s*([\d.]+)\s*([a-z]*)\s*", attributes[key]) for key in (b"width", b"height")]
            width, height = (float(m[1]) * UNITS[m[2]] for m in sizes)
    except (KeyError, TypeError, ValueError):
        raise ValueError("the SVG has neither a readable size nor a viewBox") from None
    if not (width > 0 and height > 0):
        raise ValueError(f"the SVG has a size of {width} x {height}")
    if whole:
        box = (left - width, top - height, 3 * width, 3 * height)
        found = _drawn(svg, root, box, 256).getchannel("A").getbbox()
        if found is None:
            raise ValueError("the SVG draws nothing")
        step = max(box[2:]) / 256  # one pixel of margin on every side, for what the coarse pass rounded away
        left, top = box[0] + (found[0] - 1) * step, box[1] + (found[1] - 1) * step
        width, height = (found[2] - found[0] + 2) * step, (found[3] - found[1] + 2) * step
    if max(width, height) / min(width, height) > 20:
        raise ValueError(f"the SVG has a size of {width} x {height}")
    return _drawn(svg, root, (left, top, width, height), side)


def _drawn(svg: bytes, root: re.Match, box: tuple[float, float, float, float], side: int) -> Image.Image:
    """The part ``box`` (left, top, width, height in user units) of an SVG, longer side ``side`` px, RGBA."""
    import skia  # needed to build the data, not to train on it

    scale = side / max(box[2:])
    columns, rows = max(1, round(box[2] * scale)), max(1, round(box[3] * scale))
    # skia-python gives no access to the root element, so its size is written into the text.
    tag = re.sub(rb"""\s(width|height|viewBox)\s*=\s*(["']).*?\2""", b"", root[0], flags=re.S)
    size = f' width="{columns}" height="{rows}" viewBox="{" ".join(map(str, box))}"'.encode()
    end = -2 if tag.endswith(b"/>") else -1
    resized = svg[: root.start()] + tag[:end] + size + tag[end:] + svg[root.end() :]
    document = skia.SVGDOM.MakeFromStream(skia.MemoryStream(resized, True))  # True: copies, and so outlives the bytes
    if document is None:
        raise ValueError("skia cannot parse the SVG")
    pixels = np.zeros((rows, columns, 4), dtype=np.uint8)
    info = skia.ImageInfo.Make(columns, rows, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType)
    surface = skia.Surface.MakeRasterDirect(info, pixels)
    document.setContainerSize(skia.Size.Make(columns, rows))
    document.render(surface.getCanvas())
    surface.flushAndSubmit()
    return Image.frombuffer("RGBa", (columns, rows), pixels.tobytes(), "raw", "RGBa", 0, 1).convert("RGBA")


# ----------------------------------------------------------------------------------------------------------- words

_MASS_WORDS = """
    bread rice money water milk honey butter salt broccoli garlic ginger sushi corn spaghetti bacon tea coffee beer
    wine sake ice snow rain fire fog lightning grass jewelry luggage clothing popcorn chocolate cheese tofu ramen
    falafel lipstick mahjong origami soap yarn thread bubbles dna sand seaweed lettuce celery parsley basil wheat
    meat paper leather wood furniture smoke art music judo pantyhose candy karate wrestling fencing surfing skiing
    fishing tennis golf cricket badminton lacrosse hockey rugby softball
"""
_MASS = frozenset(_MASS_WORDS.split())
_NO_ARTICLE = re.compile(
    r"^(a|an|another|the|some|two|three|four|five|six|seven|eight|nine|ten|several|many|my|your|his|her|our|their|no|one"
    r"|\d+|women|men|people|children|mice|geese|feet|teeth|sheep|fish|deer|hands|eyes)\b"
)


def with_article(phrase: str) -> str:
    """Put "a", "an" or nothing before a noun phrase, by its spelling.

    >>> with_article("red apple"), with_article("orange"), with_article("scissors"), with_article("loaf of bread")
    ('a red apple', 'an orange', 'scissors', 'a loaf of bread')
    """
    if not phrase or (_NO_ARTICLE.match(phrase) and phrase not in {"fish", "sheep", "deer"}):
        return phrase
    head = re.split(r" (?:of|with|in|on|at|for|from|by|behind|under|over|and|without|to)\b", phrase)[0].split()[-1]
    plural = head == "skis" or (head.endswith("s") and not head.endswith(("ss", "us", "is", "gas", "lens", "canvas")))
    if plural or head in _MASS or (" and " in phrase and " with " not in phrase):
        return phrase
    vowel = re.match(r"[aeiou]", phrase) and not re.match(r"(uni|eu|us[ae]|one\b|uk|ur|ute)", phrase)
    return ("an " if vowel or re.match(r"(hour|x-ray)", phrase) else "a ") + phrase


def mentions(text: str, words: Iterable[str]) -> bool:
    """Does ``text`` contain one of ``words``, whole, singular or plural, case and separators aside?

    >>> mentions("Two_Zebras.svg", ["zebra"]), mentions("bowl", ["owl"]), mentions("fire-engine", ["fire engine"])
    (True, False, True)
    """
    plain = _plain(text)
    return any(_word_pattern(word).search(plain) for word in words)


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)  # camelCase file names
    return " " + re.sub(r"[^a-z]+", " ", text.lower()).strip() + " "


@functools.cache
def _word_pattern(word: str) -> re.Pattern:
    return re.compile(rf" {re.escape(word)}(s|es)? ")


# ------------------------------------------------------------------------------------------------------------ emoji


@dataclass(frozen=True)
class Emoji:
    """What is known of an emoji by its code points: English name, subgroup and keywords (emojibase-data)."""

    name: str
    group: str
    keywords: tuple[str, ...]

    @property
    def caption(self) -> str:
        name = self.name
        if match := re.fullmatch(r"(.+): (.+)", name):  # "woman: red hair"
            name = f"{match[1]} with {match[2]}"
        if re.search(r"(o’clock|o'clock|-thirty)$", name):
            name = f"clock showing {name}"
        return with_article(name.replace("’", "'").replace("“", '"').replace("”", '"').lower())


# Flags and signs say nothing about how things look; families and couples are one drawing in dozens of versions.
_EMOJI_GROUPS = {
    "smileys-emotion",
    "people-body",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
}
_EMOJI_SKIP = re.compile(
    r"^(family|couple with heart:|kiss:|regional|men holding|women holding|woman and man holding)|:.*skin|facing right"
    r"|button$|o’clock$|-thirty$"
)


@functools.lru_cache(maxsize=1)
def emoji_by_code() -> dict[str, Emoji]:
    """Emoji by code points as :func:`bare` spells them. Skin tones, flags and signs are left out."""
    folder = fetch_npm(NPM["emojibase"])
    entries = json.loads((folder / "en" / "data.json").read_text())
    meta = json.loads((folder / "meta" / "groups.json").read_text())
    found = {}
    for entry in entries:  # skin tones sit under entry["skins"] and are never visited
        if "group" not in entry or meta["groups"][str(entry["group"])] not in _EMOJI_GROUPS:
            continue
        if _EMOJI_SKIP.search(entry["label"]):
            continue
        found[bare(entry["hexcode"])] = Emoji(
            entry["label"].lower(), meta["subgroups"][str(entry["subgroup"])], tuple(entry.get("tags", ()))
        )
    return found


def bare(code: str) -> str:
    """Code points in upper-case hexadecimal joined by "-", without U+FE0F: ``"1F3CC-200D-2642"``."""
    return "-".join(part for part in code.upper().replace("_", "-").split("-") if part not in {"FE0F", ""})


def _emoji_picture(image: Image.Image, emoji: Emoji, style: str, name: str) -> Picture:
    source = f"npm {NPM[style]}"
    return Picture(image, emoji.caption, style, name, source, LICENSES[style], emoji.name, emoji.group, emoji.keywords)


def emoji_files(style: str, folder: str, pattern: str) -> Iterator[Picture]:
    """Emoji of a package that holds one file per code point sequence."""
    root = fetch_npm(NPM[style])
    known = emoji_by_code()
    for path in sorted((root / folder).glob(pattern)):
        emoji = known.get(bare(path.stem))
        if emoji is None:
            continue
        if path.suffix == ".svg":
            image = rasterise(path.read_bytes())
        else:
            image = Image.open(path).convert("RGBA")
        yield _emoji_picture(image, emoji, style, path.relative_to(root).as_posix())


def openmoji_extras() -> Iterator[Picture]:
    """OpenMoji's own pictures beyond Unicode, of the groups that show things."""
    root = fetch_npm(NPM["openmoji"])
    showing = re.compile(r"animals|food|nature|objects|people|travel|household|gardening|healthcare|climate|emergency")
    for entry in json.loads((root / "data" / "openmoji.json").read_text()):
        if not entry["group"].startswith("extras-openmoji") or entry["skintone"]:
            continue
        if not showing.search(entry["subgroups"]):
            continue
        path = root / "color" / "svg" / f"{entry['hexcode']}.svg"
        if path.exists():
            tags = tuple(t.strip() for t in (entry["tags"] + "," + entry["openmoji_tags"]).split(",") if t.strip())
            emoji = Emoji(entry["annotation"].lower(), entry["subgroups"], tags)
            picture = _emoji_picture(
                rasterise(path.read_bytes()), emoji, "openmoji", path.relative_to(root).as_posix()
            )
            yield replace(picture, concept="")


def iconify(style: str) -> Iterator[Picture]:
    """Emoji of an Iconify package, whose keys are English names with hyphens."""
    root = fetch_npm(NPM[style])
    data = json.loads((root / "icons.json").read_text())
    names = {_key(emoji.name): emoji for emoji in emoji_by_code().values()}
    codes = root / "chars.json"
    by_key = {}
    if codes.exists():
        for code, key in json.loads(codes.read_text()).items():
            if bare(code) in emoji_by_code():
                by_key.setdefault(key, emoji_by_code()[bare(code)])
    for key in sorted(data["icons"]):
        emoji = by_key.get(key) or names.get(key)
        if emoji is None:
            continue
        icon = data["icons"][key]
        width, height = icon.get("width", data["width"]), icon.get("height", data["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        yield _emoji_picture(rasterise(svg.encode()), emoji, style, f"icons.json#{key}")


def _key(name: str) -> str:
    """An emoji's name as Iconify spells it in keys: "person: beard" is "person-beard"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’'.!“”]", "", unicodedata.normalize("NFKD", name)).lower()).strip("-")


@functools.lru_cache(maxsize=1)
def _things() -> dict[str, str]:
    """Words that name an emoji of a thing -> the emoji's name, for recognising the kind in a free caption."""
    things = {}
    skip = re.compile(r"^(face|smil|cat-face|monkey-face|heart|emotion|hand|body|person|family|time)")
    for emoji in emoji_by_code().values():
        if not skip.match(emoji.group):
            things.setdefault(_plain(emoji.name).strip(), emoji.name)
    for alias, name in _caption_tables()["aliases"].items():
        if name in things.values():
            things[alias] = name
    # Plain kinds that no emoji is named after in one word.
    for kind in ("drop", "fire", "ring", "door", "window", "map", "key", "star", "bricks", "rock", "wood"):
        things.setdefault(kind, kind)
    return things


def concept_of(caption: str) -> str:
    """The emoji name that the head noun of ``caption`` matches, or "".

    >>> concept_of("a male black rhino"), concept_of("a horse in a stable"), concept_of("an idea")
    ('rhinoceros', 'horse', '')
    """
    phrase = re.sub(r"^(a|an|another|the|some|two|three|four|five) ", "", _plain(caption).strip())
    phrase = re.split(r" (?:of|with|in|on|at|for|from|by|behind|under|over|and|without|to|from) ", phrase)[0]
    words = phrase.split()
    for start in range(len(words)):
        tail = " ".join(words[start:])
        for form in (tail, tail[:-1] if tail.endswith("s") else tail, tail[:-2] if tail.endswith("es") else tail):
            if form in _things():
                return _things()[form]
    return ""


# --------------------------------------------------------------------------------------------------- other sources


def stamps() -> Iterator[Picture]:
    """Tux Paint's stamps, each with the sentence beside it. Letters, digits, coins, flags and road signs left out."""
    root = fetch_deb("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    skip = re.compile(r"^(symbols|town/flags|town/roadsigns)")
    for text in sorted(root.rglob("*.txt")):
        name = text.relative_to(root).as_posix()
        if skip.match(name):
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines or not lines[0].strip():
            continue
        caption = _sentence(lines[0])
        group = text.parent.relative_to(root).as_posix()
        for suffix in (".png", ".svg"):
            path = text.with_suffix(suffix)
            if path.exists():
                try:
                    image = (
                        Image.open(path).convert("RGBA")
                        if suffix == ".png"
                        else rasterise(path.read_bytes(), whole=True)
                    )
                except ValueError:  # an SVG that skia cannot draw
                    break
                # Drawings and cut-out photographs by many hands: one style each, told apart by their folder.
                style = "stamp-cartoon" if "cartoon" in group or suffix == ".svg" else "stamp"
                yield Picture(
                    image, caption, style, path.relative_to(root).as_posix(), "deb tuxpaint-stamps-default",
                    LICENSES["tuxpaint"], concept_of(caption), group, (text.stem.replace("_", " "),),
                )  # fmt: skip
                break


def _sentence(line: str) -> str:
    line = re.split(r"(?<=[.!?]) ", normalize_text(line))[0].rstrip(".!")
    first, space, rest = line.partition(" ")
    if first.lower() in {"a", "an", "the", "some", "two", "three", "four", "five"}:
        return first.lower() + space + rest
    return line[0].lower() + line[1:] if line[1:2].islower() else line


_CLIPART_SKIP = re.compile(
    r"^(shapes|signs_and_symbols|computer/icons|computer/buttons|computer/folders|computer/diagrams|special|geography|logos"
    r"|buttons|decorations|transportation/aiga-symbols|transportation/roadsigns|recreation/games/cards|unsorted/duplicates"
    r"|education/books/creation|people/stickmen|computer/bb_|recreation/party/cone\d_bw)"
)
_FOREIGN = re.compile(
    r"\b(di|del|della|dei|il|con|al|da|una|uno|un|gatto|cane|per|rosso|nero|bianco|le|la|les|et|el|los|y|de|du|des|der|die"
    r"|das|und|architetto|francesco|rollandin|benji|park|gerald|ganson|lumen|design|studio|v\d|ver|version|remix|dw|ccd|svg)\b"
)


@functools.lru_cache(maxsize=1)
def _english() -> frozenset[str]:
    """Words of American English in lower case (Debian wamerican), names left out."""
    words = (fetch_deb("wamerican") / "usr/share/dict/american-english").read_text(encoding="utf-8").split()
    return frozenset(w for w in words if w.islower() and w.isascii() and "'" not in w and (len(w) > 2 or w in
                     {"a", "an", "of", "in", "on", "at", "to", "by", "ox", "up", "my"}))  # fmt: skip


def clipart() -> Iterator[Picture]:
    """Open Clip Art drawings whose title is a short English phrase, or whose keywords name one kind of thing."""
    root = fetch_deb("openclipart-svg") / "usr/share/openclipart/svg"
    for path in sorted(root.rglob("*.svg")):
        name = path.relative_to(root).as_posix()
        if _CLIPART_SKIP.match(name):
            continue
        svg = path.read_bytes()
        title, keywords, author = _metadata(svg)
        caption = clipart_caption(title, keywords, path.stem)
        if not caption:
            continue
        try:
            image = rasterise(svg, whole=True)
        except ValueError:
            continue
        group = path.parent.relative_to(root).as_posix()
        yield Picture(
            image, caption, "openclipart", name, "deb openclipart-svg", LICENSES["openclipart"],
            concept_of(caption), group, (*keywords, title, path.stem.replace("_", " ")), author,
        )  # fmt: skip


def _metadata(svg: bytes) -> tuple[str, tuple[str, ...], str]:
    """Title, keywords and author that an Open Clip Art SVG says of itself; empty where it does not."""
    dc = "{http://purl.org/dc/elements/1.1/}"
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    try:
        tree = ElementTree.fromstring(svg)
    except ElementTree.ParseError:
        return "", (), ""
    parents = {child: parent for parent in tree.iter() for child in parent}
    title = author = ""
    keywords: list[str] = []
    for element in tree.iter(f"{dc}title"):
        text = (element.text or "").strip()
        if parents[element].tag.endswith("Agent"):
            author = author or text
        else:
            title = title or text
    for element in tree.iter(f"{dc}subject"):
        keywords += [(li.text or "").strip().lower() for li in element.iter(f"{rdf}li")]
    return title, tuple(k for k in keywords if k and k != "unsorted"), author


_GENERIC_TITLE = re.compile(
    r"clipart by|various clipart|sibmission|iconset|etiquette icons|theme$|flat.*collection|^homes clipart|untitled",
    re.I,
)
_ALSO_ENGLISH_WORDS = """
    christmas halloween easter thanksgiving valentine lcd cd dvd tv pc usb orca dino japanese italian french english
    american egyptian swiss hummer ipod colour colours coloured grey armour smiley african asian chinese mexican
"""
_ALSO_ENGLISH = frozenset(_ALSO_ENGLISH_WORDS.split())


def clipart_caption(title: str, keywords: Iterable[str], stem: str = "") -> str:
    """A caption from an Open Clip Art title, the file's name or the keywords, or "" when none is plain English.

    >>> clipart_caption("Red_Apple 02", []), clipart_caption("cavallo", ["animal", "horse"]), clipart_caption("x1", [])
    ('a red apple', 'a horse', '')
    """
    # Some titles name the collection, or were copied from another file; then the file's name is the better witness.
    if "road signs" in title.lower():  # a sign with a tram on it is no tram
        return ""
    told = [stem] if _GENERIC_TITLE.search(title) or not title else [title]
    for text in told:
        text = re.sub(r"\([^)]*\)|&#?\w+;", " ", text)
        words = re.sub(r"[^a-z' -]+", " ", re.sub(r"[_\-]+", " ", text.lower())).split()
        words = [w.removesuffix("'s") for w in words if w not in _FILLER]
        while words and words[-1] in {"and", "of", "with", "in", "on", "at", "for", "by", "the", "a", "an", "to"}:
            words.pop()
        phrase = " ".join(words)
        english = all(w in _english() or w in _ALSO_ENGLISH for w in words)
        if phrase in {"people", "head", "dino"}:
            phrase = {"people": "person", "head": "person", "dino": "dinosaur"}[phrase]
        if words and len(words) <= 8 and english and not _FOREIGN.search(phrase):
            return with_article(phrase)
        if caption := _caption_tables()["foreign"].get(re.sub(r"[^a-z]+", " ", text.lower()).strip()):
            return caption
    # "bird" for a title in a language unknown may hide a held-out kind, and says little.
    kinds = {concept_of(k) for k in keywords if k in _things() and k in _english()} - {"", *_VAGUE}
    return with_article(kinds.pop()) if len(kinds) == 1 else ""


_VAGUE = frozenset(
    (
        "bird",
        "fish",
        "bug",
        "flower",
        "tree",
        "fruit",
        "rose",
        "cherry blossom",
        "person",
        "computer",
        "desktop computer",
    )
)
_FILLER_WORDS = "b w bw icon clipart clip svg alt ii iii iv r v colour color simple basic hash contour"
_FILLER = frozenset(_FILLER_WORDS.split())


def resources(path: Path) -> dict[str, bytes]:
    """Files inside a Qt binary resource (``.rcc``), by path. Compressed entries (zlib) are inflated.

    The format (Qt's rcc tool, versions 1 to 3): magic ``qres``, version, offsets of tree, data and names, all
    big-endian; a tree node is 14 bytes, or 22 with a time stamp from version 2 on.

    Raises:
        ValueError: not such a file, or an entry is compressed with zstd.
    """
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file")
    version, tree, data, names = struct.unpack_from(">4I", blob, 4)
    node = 14 if version < 2 else 22
    found = {}
    pending = [(0, "")]
    while pending:
        index, prefix = pending.pop()
        name_at, flags = struct.unpack_from(">IH", blob, tree + index * node)
        (length,) = struct.unpack_from(">H", blob, names + name_at)
        name = blob[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be") if index else ""
        here = f"{prefix}/{name}" if name else prefix
        if flags & 2:  # a folder: number of children, index of the first
            count, first = struct.unpack_from(">II", blob, tree + index * node + 6)
            pending += [(first + i, here) for i in range(count)]
            continue
        (at,) = struct.unpack_from(">I", blob, tree + index * node + 10)
        (size,) = struct.unpack_from(">I", blob, data + at)
        content = blob[data + at + 4 : data + at + 4 + size]
        if flags & 4:
            raise ValueError(f"{path}: {here} is compressed with zstd, which is not supported")
        found[here] = zlib.decompress(content[4:]) if flags & 1 else content
    return found


@functools.lru_cache(maxsize=1)
def _caption_tables() -> dict[str, dict]:
    """What ``captions_pictures.yaml`` says."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("captions_pictures.yaml").read_text(encoding="utf-8"))


def gcompris() -> Iterator[Picture]:
    """Photographs and drawings of GCompris that show one plain thing; licence and author from the READMEs there."""
    root = fetch_deb("gcompris-qt-data") / "usr/share/gcompris-qt/rcc"
    opened: dict[str, dict[str, bytes]] = {}
    for folder, captions in _caption_tables()["gcompris"].items():
        package = folder.partition("/")[0]
        if package not in opened:
            opened = {package: resources(root / f"{package}.rcc")}
        base = f"/gcompris/src/activities/{folder}/"
        credits = _credits({p: c.decode(errors="replace") for p, c in opened[package].items() if p.endswith("README")})
        for path in sorted(p for p in opened[package] if p.startswith(base) and p.endswith(".webp")):
            stem = Path(path).stem
            match = [c for key, c in captions.items() if re.fullmatch(key.replace("*", r"\d*"), stem)]
            if not match:
                continue
            image = Image.open(io.BytesIO(opened[package][path]))
            cut_out = image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 128
            author, license = credits.get(path, ("", "GPL-3.0-or-later"))  # the package's own licence
            yield Picture(
                image.convert("RGBA" if cut_out else "RGB"), match[0],
                "gcompris-drawing" if folder.startswith("lang") else "gcompris-photo",
                path.removeprefix("/gcompris/src/activities/"), "deb gcompris-qt-data", license,
                concept_of(match[0]), folder.replace("/resource", "").removesuffix("/animals"), (stem,), author,
            )  # fmt: skip


_SPDX = {"public domain": "public domain", "cc-by-sa 4.0": "CC-BY-SA-4.0", "gplv2+": "GPL-2.0-or-later"}


def _credits(readmes: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Path -> (author, licence) from GCompris READMEs: paragraphs of ``Copyright:``, ``License:``, ``Files:``."""
    found = {}
    for readme, text in readmes.items():
        base = readme.rpartition("/")[0]
        for paragraph in re.split(r"\n\s*\n", text):
            author = re.search(r"^Copyright: *(.+)$", paragraph, re.M)
            license = re.search(r"^License: *(.+)$", paragraph, re.M)
            if not license:
                continue
            for file in re.findall(r"^(?:Files: *)?([\w./-]+\.webp) *$", paragraph, re.M):
                words = _SPDX.get(license[1].strip().lower(), license[1].strip())
                found[f"{base}/{file}"] = (author[1].strip() if author else "", words)
    return found


def all_pictures() -> Iterator[Picture]:
    """Every picture of every source, in a fixed order."""
    yield from emoji_files("openmoji", "color/svg", "*.svg")
    yield from openmoji_extras()
    yield from emoji_files("fluent-3d", "assets", "*.webp")
    yield from emoji_files("google", "img/google/64", "*.png")
    yield from emoji_files("twitter", "img/twitter/64", "*.png")
    yield from iconify("noto")
    yield from iconify("fluent")
    yield from stamps()
    yield from clipart()
    yield from gcompris()


# --------------------------------------------------------------------------------------------------------- held out


@dataclass(frozen=True)
class HeldOut:
    """What ``heldout.yaml`` says of pictures.

    Attributes:
        words: held-out concept -> words that betray it.
        unclear: names of pictures that do not show the kind they mention.
        demo: names of the shipped photographs.
        demo_hashes: their perceptual hashes.
        demo_distance: pictures within so many bits of a demo picture are not trained on.
        not_evaluated: concepts of ``words`` that validation leaves out.
        distance: pictures within so many bits of a validation picture are not trained on.
    """

    words: dict[str, tuple[str, ...]]
    unclear: frozenset[str]
    demo: frozenset[str]
    demo_hashes: tuple[int, ...]
    demo_distance: int
    not_evaluated: frozenset[str] = frozenset()
    distance: int = 4

    @classmethod
    def read(cls, path: Path | None = None) -> HeldOut:
        import yaml

        path = path or Path(__file__).with_name("heldout.yaml")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))["pictures"]
            return cls(
                {c["name"]: tuple(c["words"]) for c in content["concepts"]},
                frozenset(content["unclear"]),
                frozenset(d["name"] for d in content["demo"]),
                tuple(int(d["phash"], 16) for d in content["demo"]),
                int(content["demo_distance"]),
                frozenset(c["name"] for c in content["concepts"] if c.get("not_evaluated")),
                int(content["distance"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: each concept needs name and words, each demo picture name and phash") from error

    def place(self, picture: Picture) -> tuple[str, str]:
        """Where a picture belongs, by its words: ``("train" | "validation" | "dropped", concept or reason)``."""
        if picture.name in self.demo:
            return "dropped", "demo picture"
        told = [n for n, words in self.words.items() if mentions(f"{picture.caption} | {picture.concept}", words)]
        if not told:
            if picture.style in _EMOJI_STYLES:  # their names are exact, their tags mere associations
                return "train", picture.concept
            hints = " | ".join((*picture.keywords, picture.name))
            hinted = [n for n, words in self.words.items() if mentions(hints, words)]
            return ("dropped", f"{hinted[0]}: only a keyword says so") if hinted else ("train", picture.concept)
        if picture.name in self.unclear:
            return "dropped", f"{told[0]}: unclear"
        if len(told) > 1:
            return "dropped", f"{told[0]}: shows several held-out kinds"
        plain = picture.concept == told[0] or (
            picture.style not in _EMOJI_STYLES
            and len(picture.caption.split()) <= 5
            and mentions(_head(picture.caption), self.words[told[0]])
        )
        return ("validation", told[0]) if plain else ("dropped", f"{told[0]}: not plainly shown")


_EMOJI_STYLES = frozenset(NPM) - {"emojibase"}


def _head(caption: str) -> str:
    return re.split(r" (?:of|with|in|on|at|for|from|by|behind|under|over|and|without|to)\b", caption)[0]


# ------------------------------------------------------------------------------------------------------------ build


def build(
    out: Path, seed: int = 0, pictures: Iterable[Picture] | None = None, held_out: HeldOut | None = None
) -> dict:
    """Write ``out/pictures-train`` and ``out/pictures-validation``.

    Args:
        out: parent folder; the two folders in it are replaced.
        seed: fixes the order of the training rows.
        pictures: instead of :func:`all_pictures`, for tests.
        held_out: instead of ``heldout.yaml``, for tests.

    Returns:
        The report: rows per split and style, licences, and what was dropped and why.
    """
    held_out = held_out or HeldOut.read()
    rows: dict[str, list[dict]] = {"train": [], "validation": []}
    hashes: dict[str, list[int]] = {"train": [], "validation": []}
    dropped: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for picture in tqdm(pictures or all_pictures(), desc="pictures", unit=" pictures", mininterval=2.0):
        place, why = held_out.place(picture)
        if place == "dropped":
            dropped[why] += 1
            continue
        if len(picture.caption.split()) > MAX_WORDS:
            dropped["caption too long"] += 1
            continue
        try:
            image = trimmed(picture.image) if picture.image.mode == "RGBA" else shrunk(picture.image)
        except ValueError:
            dropped["nothing drawn"] += 1
            continue
        if min(image.size) < 24 or (image.mode == "RGBA" and _coverage(image) < 0.04):
            dropped["hardly anything drawn"] += 1
            continue
        content = encoded(image)
        digest = hashlib.sha256(content).hexdigest()
        if (place, digest) in seen:  # a copy in the other split is met below, by its look
            dropped["exact copy"] += 1
            continue
        seen.add((place, digest))
        look = perceptual_hash(image)
        if any(hash_distance(look, demo) <= held_out.demo_distance for demo in held_out.demo_hashes):
            dropped["looks like a demo picture"] += 1
            continue
        rows[place].append(_row(picture, content, place, why if place == "validation" else picture.concept))
        hashes[place].append(look)
    rows["train"], copies = _without_copies(rows["train"], hashes["train"], hashes["validation"], held_out.distance)
    dropped["looks like a validation picture"] += copies
    evaluated = [row for row in rows["validation"] if row["concept"] not in held_out.not_evaluated]
    dropped["held out but not evaluated"] += len(rows["validation"]) - len(evaluated)
    rows["validation"] = evaluated
    order = np.random.default_rng(seed).permutation(len(rows["train"]))
    rows["train"] = [rows["train"][i] for i in order]
    rows["validation"].sort(key=lambda row: (row["concept"], row["style"], row["image"]["path"]))
    report = {"seed": seed, "dropped": {why: count for why, count in sorted(dropped.items()) if count}}
    for split, content in rows.items():
        folder = Path(out) / f"pictures-{split}"
        write_pictures(content, folder)
        report[split] = {
            "rows": len(content),
            "styles": dict(sorted(Counter(row["style"] for row in content).items())),
            "licenses": dict(sorted(Counter(row["license"] for row in content).items())),
            "concepts": len({row["concept"] for row in content if row["concept"]}),
        }
    names = sorted({row["concept"] for row in rows["validation"]})
    (Path(out) / "pictures-validation" / "concept_names.json").write_text(json.dumps(names, indent=1) + "\n")
    for split in rows:
        (Path(out) / f"pictures-{split}" / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def counts_by_source(folders: Iterable[Path]) -> dict[tuple[str, str], Counter]:
    """Rows of built sets by (source, licence): rows of each split, the most first."""
    found: dict[tuple[str, str], Counter] = {}
    for folder in folders:
        for row in read_columns(folder, ["source", "license", "split"]):
            found.setdefault((row["source"], row["license"]), Counter())[row["split"]] += 1
    return dict(sorted(found.items(), key=lambda each: (-each[1].total(), each[0])))


def _coverage(image: Image.Image) -> float:
    """Share of a cut-out's square that is not transparent."""
    return float((np.asarray(image.getchannel("A")) > 8).mean())


def _without_copies(rows: list[dict], looks: list[int], held: list[int], distance: int) -> tuple[list[dict], int]:
    """Training rows that look like no validation picture (hash distance over ``distance`` bits), and how many did."""
    if not held or not rows:
        return rows, 0
    bits = np.unpackbits(np.array(looks, dtype=">u8").view(np.uint8).reshape(-1, 8), axis=1).astype(np.int16)
    held_bits = np.unpackbits(np.array(held, dtype=">u8").view(np.uint8).reshape(-1, 8), axis=1).astype(np.int16)
    apart = bits.sum(1)[:, None] + held_bits.sum(1)[None] - 2 * bits @ held_bits.T  # (train, validation)
    keep = apart.min(axis=1) > distance
    return [row for row, good in zip(rows, keep, strict=True) if good], int((~keep).sum())


def _row(picture: Picture, content: bytes, split: str, concept: str) -> dict:
    return {
        "image": {"bytes": content, "path": f"{picture.style}/{picture.name}"},
        "text": picture.caption,
        "task": "caption",
        "kind": "natural",
        "char_boxes": [],
        "x_height": 0.0,
        "source": picture.source,
        "license": picture.license,
        "split": split,
        "concept": concept,
        "group": picture.group,
        "style": picture.style,
        "family": FAMILIES.get(picture.style, picture.style),
        "keywords": list(picture.keywords),
        "author": picture.author,
    }


def write_pictures(rows: list[dict], folder: Path) -> None:
    """Replace the shards in ``folder``, and what was computed for the rows of those."""
    from datasets import List, Value

    more = dict.fromkeys(("concept", "group", "style", "family", "author"), Value("string"))
    write_shards(rows, folder, ROWS_PER_SHARD, {**more, "keywords": List(Value("string"))})
    # an older build's shards, which were named otherwise, and targets, which are aligned with the rows
    for stale in [*folder.glob("[0-9]*-of-[0-9]*.parquet"), *folder.glob("*.safetensors")]:
        stale.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=cache_root() / "data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(build(args.out, args.seed), indent=1))


if __name__ == "__main__":
    main()
