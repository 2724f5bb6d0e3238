"""PDF files written by hand, byte by byte: what stands where is what the test says, not what a library made of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

LETTER = (612.0, 792.0)
A4 = (595.0, 842.0)


@dataclass
class Page:
    """Text in Helvetica, placed from the top left of the page as it is shown; content order is the order of calls."""

    size: tuple[float, float] = A4  # of the media box, before it is turned
    media_origin: tuple[float, float] = (0.0, 0.0)
    crop: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1 in user space
    rotate: int = 0
    inherit: bool = False  # the boxes and the rotation stand in the page tree, not with the page
    operators: list[str] = field(default_factory=list)

    def text(self, text: str, x: float, y: float, size: float = 10.0, mode: int = 0) -> Page:
        """``text`` with its baseline's left end ``x``, ``y`` points from the top left of the page as it is shown."""
        left, bottom, right, top = self.crop or (
            *self.media_origin,
            self.media_origin[0] + self.size[0],
            self.media_origin[1] + self.size[1],
        )
        # Where the point lies before the page is turned clockwise, and which way the baseline goes there.
        place = {
            0: (left + x, top - y, "1 0 0 1"),
            90: (left + y, bottom + x, "0 1 -1 0"),
            180: (right - x, bottom + y, "-1 0 0 -1"),
            270: (right - y, top - x, "0 -1 1 0"),
        }[self.rotate]
        escaped = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        self.operators.append(
            f"BT /F1 {size} Tf {mode} Tr {place[2]} {place[0]:.3f} {place[1]:.3f} Tm ({escaped}) Tj ET"
        )
        return self

    def lines(self, lines, x: float, y: float, pitch: float = 12.0, size: float = 10.0) -> Page:
        for number, line in enumerate(lines):
            self.text(line, x, y + pitch * number, size)
        return self


def write_pdf(pages: list[Page], *, encrypted: bool = False) -> bytes:
    """A PDF 1.4 file of ``pages``."""
    objects = [b"", b""]  # the catalogue and the page tree, filled in below
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"
    objects.append(font)
    numbers = []
    shared = ""
    for page in pages:
        stream = "\n".join(page.operators).encode("cp1252")
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
        x, y = page.media_origin
        boxes = f"/MediaBox[{x} {y} {x + page.size[0]} {y + page.size[1]}]/Rotate {page.rotate}"
        if page.crop:
            boxes += "/CropBox[{} {} {} {}]".format(*page.crop)
        if page.inherit:
            shared, boxes = boxes, ""
        objects.append(
            f"<</Type/Page/Parent 2 0 R{boxes}/Contents {len(objects)} 0 R/Resources<</Font<</F1 3 0 R>>>>>>".encode()
        )
        numbers.append(len(objects))
    objects[0] = b"<</Type/Catalog/Pages 2 0 R>>"
    kids = " ".join(f"{number} 0 R" for number in numbers)
    objects[1] = f"<</Type/Pages/Kids[{kids}]/Count {len(numbers)}{shared}>>".encode()
    trailer = f"/Size {len(objects) + 1}/Root 1 0 R"
    if encrypted:  # a password that nobody has: the check value below belongs to none
        trailer += (
            f"/ID[<{'00' * 16}><{'00' * 16}>]/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{'41' * 32}>/U<{'42' * 32}>>>"
        )
    out = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return out + f"trailer<<{trailer}>>\nstartxref\n{start}\n%%EOF\n".encode()


_WORDS = (
    "the of and to in is that it for as with be by this are on or not which from can if you will at have has but was",
    "one page river mountain garden letter number winter summer kitchen window bridge engine paper silver morning",
)
# Helvetica, thousandths of the size (Adobe's metrics of the 14 standard fonts).
_WIDTHS = {**dict.fromkeys("ijl", 222), **dict.fromkeys("ft ", 278), "r": 333, **dict.fromkeys("cksvxyz", 500)}
_WIDTHS |= {"m": 833, "w": 722}


def prose(count: int, seed: int = 0, characters: int = 40) -> list[str]:
    """``count`` different full lines of English-looking words, of about so many characters at 10 points: each as long
    as it can be without the first word of the next one."""
    rng = random.Random(seed)
    words = " ".join(_WORDS).split()
    room = characters * 4.7
    lines = [""]
    while True:
        word = rng.choice(words)
        longer = f"{lines[-1]} {word}".strip()
        if sum(_WIDTHS.get(letter, 556) for letter in longer) / 100 <= room:
            lines[-1] = longer
        elif len(lines) == count:
            return lines
        else:
            lines.append(word)
