"""Damaged files through the readers of `unit data`: `python -m benchmarks.fuzz_readers --kind pdf --count 2500`.

Each file is a good one with some of it changed (bits flipped, bytes overwritten, cut out, doubled, numbers made huge,
keywords swapped, two files spliced), by a seed: file number n of a seed is the same on every machine. Whatever comes
out of it is well; what is counted against the reader is an exception that it does not turn into a refusal, a crash
or a hang of the worker process that reads, and memory above the bound. The status is 1 when any was seen.

A kind of file is an entry of `KINDS`: good files to start from, the reader, and words of the format to swap.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import peak_memory
from training.data.guarded import Failure, run_guarded
from training.evaluation.report import machine, markdown_table

SECONDS = 20.0  # a file may take
MEMORY = 2 << 30  # bytes that the reading process may add


@dataclass(frozen=True)
class Kind:
    """A kind of file to damage.

    ``seeds`` gives good files (their bytes); ``read`` takes the path of one and returns in a few words what came of
    it (``"read"``, ``"refused: corrupt"``), raising nothing on any input; ``words`` are keywords worth swapping.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], str]
    suffix: str
    words: tuple[bytes, ...] = ()


@dataclass
class Outcome:
    """Counts of what became of the files."""

    outcomes: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # crashes, hangs, memory, exceptions: file and detail
    slowest: float = 0.0  # s
    peak: int = 0  # bytes, of the reading processes
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------------- mutations


def mutate(content: bytes, other: bytes, rng: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """Between one and eight changes to ``content``; ``other`` is a second file to splice from."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        if not data:
            break
        at = rng.randrange(len(data))
        length = min(rng.choice((1, 2, 4, 16, 64, 512, 4096)), len(data) - at)
        change = rng.randrange(9)
        if change == 0:  # bits
            for _ in range(rng.choice((1, 4, 32))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at : at + length] = rng.randbytes(length)
        elif change == 2:
            del data[at : at + length]
        elif change == 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 2, 50))
        elif change == 4:
            del data[at:]
        elif change == 5:
            start = rng.randrange(len(other))
            data[at:] = other[start:]
        elif change == 6:
            data[at : at + length] = bytes([rng.choice((0, 0x20, 0xFF))]) * length
        elif change == 7:
            numbers = list(re.finditer(rb"-?\d+", data))
            if numbers:
                found = rng.choice(numbers)
                worst = (b"0", b"-1", b"1", b"65535", b"2147483647", b"-2147483648", b"99999999999999999999", b"1e38")
                data[found.start() : found.end()] = rng.choice(worst)
        elif words:
            places = list(re.finditer(b"|".join(map(re.escape, words)), data))
            if places:
                found = rng.choice(places)
                data[found.start() : found.end()] = rng.choice(words)
    return bytes(data)


def damaged_file(seeds: list[bytes], number: int, seed: int, words: tuple[bytes, ...] = ()) -> bytes:
    """File ``number`` of a run with ``seed``."""
    rng = random.Random(f"{seed}:{number}")
    return mutate(rng.choice(seeds), rng.choice(seeds), rng, words)


# ----------------------------------------------------------------------------------------------------------- kinds


def pdf_seeds() -> list[bytes]:
    """Small PDFs with what readers stumble over: plain and compressed streams, an object stream of none, fonts within
    the file, several pages, inherited and turned boxes, pictures, paths, a form."""
    import io
    import zlib

    from PIL import Image, ImageDraw, ImageFont

    def pdf(objects: list[bytes], trailer: bytes = b"") -> bytes:
        out, offsets = b"%PDF-1.7\n", []
        for number, body in enumerate(objects, 1):
            offsets.append(len(out))
            out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
        table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
        size = len(objects) + 1
        return b"%sxref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (
            out, size, table, size, trailer, len(out)
        )  # fmt: skip

    lines = [f"The {word} of this page is to be read as it is for all of them, and not by one" for word in "abcdefgh"]
    text = "BT /F1 10 Tf 50 700 Td 12 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    plain = text.encode()
    packed = zlib.compress(plain)
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/ToUnicode 7 0 R>>"
    unicode_map = b"/CIDInit/ProcSet findresource begin begincmap 1 begincodespacerange <00> <FF> endcodespacerange "
    unicode_map += b"1 beginbfrange <20> <7E> <0020> endbfrange endcmap end"
    drawing = b"q 100 0 0 80 60 300 cm /X Do Q 1 0 0 RG 50 200 m 300 250 l S 60 100 90 40 re f " + plain
    picture = zlib.compress(bytes(range(256)) * 12)
    resources = b"/Resources<</Font<</F1 4 0 R>>/XObject<</X 8 0 R>>>>"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R 5 0 R]/Count 2/MediaBox[0 0 595 842]/Rotate 90>>",
        b"<</Type/Page/Parent 2 0 R/Rotate 0/Contents 6 0 R" + resources + b">>",
        font,
        b"<</Type/Page/Parent 2 0 R/CropBox[20 20 500 800]/Contents 9 0 R" + resources + b">>",
        b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(packed), packed),
        b"<</Length %d>>stream\n%s\nendstream" % (len(unicode_map), unicode_map),
        b"<</Type/XObject/Subtype/Image/Width 32/Height 32/ColorSpace/DeviceRGB/BitsPerComponent 8"
        b"/Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (len(picture), picture),
        b"<</Length %d>>stream\n%s\nendstream" % (len(drawing), drawing),
    ]
    made = [pdf(objects), pdf(objects[:3] + [b"<</Type/Font/Subtype/Type1/BaseFont/Times-Roman>>"] + objects[4:])]
    scan = Image.new("L", (300, 400), 255)
    ImageDraw.Draw(scan).text((20, 20), "\n".join(lines[:4]), fill=0)
    buffer = io.BytesIO()
    scan.save(buffer, "PDF")
    made.append(buffer.getvalue())
    try:
        import skia

        with tempfile.NamedTemporaryFile(suffix=".ttf") as font_file:
            font_file.write(ImageFont.load_default(10).font_bytes)  # the font that Pillow carries
            font_file.flush()
            face = skia.Typeface.MakeFromFile(font_file.name)
        stream = skia.DynamicMemoryWStream()
        with skia.PDF.MakeDocument(stream) as document:  # with a font inside, and compressed
            for _ in range(2):
                with document.page(400, 500) as canvas:
                    for number, line in enumerate(lines):
                        canvas.drawString(line, 30, 60 + 14 * number, skia.Font(face, 9), skia.Paint())
        made.append(bytes(stream.detachAsData()))
    except ImportError:  # the fewer kinds of files, the rest is as good
        pass
    return made


def read_pdf(path: Path) -> str:
    """Open a PDF and make rows of its first pages, as whole pages, blocks and chunks."""
    from training.data.pdf_build import PageSettings, PageTask, read_task
    from training.data.pdf_sources import Document, check_document

    document = Document("fuzz", path.name, path)
    checked = check_document(document)
    if isinstance(checked, Failure):
        return f"refused: {checked.detail}"
    pages = tuple(range(min(checked[1], 3)))
    rows, reasons = 0, Counter()
    for unit in ("page", "block", "chunk"):
        settings = PageSettings(unit=unit, x_height=(6.0, 6.0), english=unit == "chunk")
        result = read_task(PageTask(Document("fuzz", path.name, path, checked[1]), pages), settings)
        rows += len(result.rows)
        reasons.update(reason for reason, _ in result.faults)
        reasons.update(reason for reason in result.left_out if reason.startswith("page: "))
    if rows:
        return "read"
    return f"no rows: {reasons.most_common(1)[0][0]}" if reasons else "no rows"


def image_seeds() -> list[bytes]:
    """Small pictures in the formats that data sets come in, in the variants that decoders have code of their own for:
    palettes, transparency, 16 bits, CMYK, interlaced, progressive, tiled, compressed, animated, turned by EXIF."""
    import io

    import numpy as np
    from PIL import Image, ImageDraw

    rows, columns = np.mgrid[0:48, 0:72]
    pixels = np.stack([columns * 3, rows * 5, (rows // 6 + columns // 6) % 2 * 200], axis=-1).astype(np.uint8)
    colour = Image.fromarray(pixels)
    ImageDraw.Draw(colour).text((6, 16), "a page", fill="white")
    clear = colour.copy()
    clear.putalpha(Image.fromarray((columns * 3).astype(np.uint8)))
    grey, palette, bilevel = colour.convert("L"), colour.convert("P"), colour.convert("1")
    deep = Image.fromarray((rows * 1200).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010E] = "turned"
    found = []

    def save(image: Image.Image, format: str, **options) -> None:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        found.append(buffer.getvalue())

    for image in (colour, clear, grey, palette, bilevel, deep):
        save(image, "PNG")
    save(colour, "PNG", exif=turned, dpi=(300, 300))
    save(palette, "PNG", transparency=3)
    save(colour, "PNG", save_all=True, append_images=[colour.rotate(90)], duration=80)
    for options in ({}, {"progressive": True}, {"subsampling": 0, "exif": turned}, {"quality": 20, "optimize": True}):
        save(colour, "JPEG", **options)
    save(grey, "JPEG")
    save(colour.convert("CMYK"), "JPEG")
    save(colour, "WEBP", quality=60)
    save(clear, "WEBP", lossless=True, exif=turned)
    save(colour, "WEBP", save_all=True, append_images=[colour.rotate(180)], duration=80)
    save(palette, "GIF")
    save(palette, "GIF", save_all=True, append_images=[palette.rotate(180), palette.rotate(90)], duration=80, loop=0)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        save(colour, "TIFF", compression=compression)
    save(bilevel, "TIFF", compression="tiff_lzw")  # the fax decoders complain of each line on stderr
    save(deep, "TIFF")
    save(colour.convert("CMYK"), "TIFF")
    save(grey, "TIFF", save_all=True, append_images=[grey.rotate(180)])
    for image in (colour, clear, palette, bilevel):
        save(image, "BMP")
    return found


def read_image(path: Path) -> str:
    """Open a picture as `unit` and as the data sets' mapping do; what the mapping lets into a row can be decoded."""
    import numpy as np

    from modeling_unit.image_input_unit import UnreadableInput, open_image
    from training.data.mapping import RowRefused, checked_image
    from training.data.pictures import perceptual_hash
    from training.data.schema import make_row, validate_row

    said = ""
    for source in (path, path.read_bytes()):
        try:
            image = open_image(source)
            if image.mode != "RGB" or np.asarray(image).shape != (image.height, image.width, 3):
                raise AssertionError(f"{image.mode} of {image.size}")
        except UnreadableInput as error:
            said = re.sub(r"[\d.]+", "…", re.sub(r"\(.*\)", "", str(error).partition(": ")[2])).strip()
    try:
        content, _ = checked_image(path.read_bytes())
    except RowRefused as error:
        return f"refused: {error.reason}"
    facts = {"task": "caption", "kind": "natural", "source": "fuzz", "license": "", "split": "train"}
    validate_row(make_row(content, "a caption", **facts))
    if said:
        return f"by mapping alone; elsewhere {said}"
    perceptual_hash(open_image(content))
    return "read"


_PDF_WORDS = tuple(
    b"/Type /Pages /Page /Kids /Count /MediaBox /CropBox /Rotate /Contents /Length /Filter /FlateDecode /LZWDecode "
    b"/ASCII85Decode /DCTDecode /JPXDecode /Resources /Font /XObject /Image /Form /Width /Height /BitsPerComponent "
    b"/ToUnicode /Encoding /Parent /Root /Size /Prev /Encrypt endobj endstream stream xref trailer Tj Tf Td Tm cm Do "
    b"BT ET".split()
)

_IMAGE_WORDS = (
    *b"IHDR PLTE IDAT IEND tRNS gAMA eXIf acTL fcTL fdAT RIFF WEBP VP8X ANIM ANMF EXIF GIF87a GIF89a JFIF".split(),
    *(b"II*\0", b"MM\0*", b"BM"),
    *(bytes([0xFF, marker]) for marker in (0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE)),
)

KINDS: dict[str, Kind] = {
    "pdf": Kind(pdf_seeds, read_pdf, ".pdf", _PDF_WORDS),
    "image": Kind(image_seeds, read_image, ".image", _IMAGE_WORDS),
}


# ------------------------------------------------------------------------------------------------------------ runs


def _read_one(number: int, kind: Kind, seeds: list[bytes], seed: int, folder: Path) -> tuple[str, float, int]:
    """In a worker: what came of file ``number``, in what time, and the process's peak of memory so far."""
    path = folder / f"{number:07d}{kind.suffix}"
    path.write_bytes(damaged_file(seeds, number, seed, kind.words))
    begin = time.perf_counter()
    said = kind.read(path)
    seconds = time.perf_counter() - begin
    path.unlink()
    return said, seconds, peak_memory(resource.getrusage(resource.RUSAGE_SELF))


def run(kind: Kind, count: int, *, seed: int = 0, workers: int = 1, folder: Path, progress: bool = True) -> Outcome:
    """Read ``count`` damaged files. A file that was a fault stays in ``folder``."""
    seeds = kind.seeds()
    outcome = Outcome()
    begin = time.perf_counter()
    results: Iterator = run_guarded(
        functools.partial(_read_one, kind=kind, seeds=seeds, seed=seed, folder=folder),
        range(count),
        workers=workers,
        seconds=lambda number: SECONDS,
        memory=MEMORY,
    )
    for number, result in tqdm(results, total=count, unit="file", disable=not progress):
        if isinstance(result, Failure):
            outcome.outcomes[f"FAULT: {result.reason}"] += 1
            outcome.faults.append(f"file {number} of seed {seed}: {result.reason}, {result.detail}")
            continue
        said, seconds, peak = result
        outcome.outcomes[said] += 1
        outcome.slowest = max(outcome.slowest, seconds)
        outcome.peak = max(outcome.peak, peak)
    outcome.seconds = time.perf_counter() - begin
    return outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_readers", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    parser.add_argument("--count", type=int, default=2500, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the files that were faults")
    arguments = parser.parse_args(argv)
    print(machine())
    faults = []
    for name in arguments.kind:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            outcome = run(KINDS[name], arguments.count, seed=arguments.seed, workers=arguments.workers, folder=folder)
        faults += outcome.faults
        rows = [[said, count] for said, count in outcome.outcomes.most_common()]
        print(f"\n{name}: {arguments.count} files, seed {arguments.seed}, {outcome.seconds:.0f} s; ", end="")
        print(
            f"slowest {outcome.slowest:.2f} s, peak memory {outcome.peak / 1e6:.0f} MB, {len(outcome.faults)} faults\n"
        )
        print(markdown_table(["what came of it", "files"], rows))
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
