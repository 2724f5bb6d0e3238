"""Made pages: time of each step, and of the same pages drawn by Pillow and by weasyprint, in one run, in turns.

    python -m benchmarks.data_made_pages [--size 448 896] [--pages 60] [--fonts packages] [--weasyprint-python PYTHON]

CPU time of one process each, all single-threaded, so that other work on the machine matters little. Dense running
text, about 480 words at 448 (x-height 3.9 px) and 1,200 at 896 (4.9 px), default degradations. Every page's fonts are
loaded before it counts, as a long run has them, but at another size: no page finds its glyphs rasterised.

What is compared is the same work: given words, a page of grey pixels and boxes in them. "Drawn" is therefore laying
out, drawing and a box for each character; choosing and balancing the words, which the others are not asked to do, is a
step of its own, and so is degrading. The whole row is all of it, encoded and in the schema, and compared with the
held-out text where that is known. As in `build_pages` what is loaded is frozen, that is, not garbage-collected.

Pillow gets the words of the same page, its font and its size, wraps them by `getlength`, which also gives each word's
box (not each character's), and draws line by line, with its quicker layout engine. It runs a font's hinting programs
for each glyph, which cannot be switched off, so that its time differs by the font up to tenfold.

weasyprint gets the words as one HTML paragraph, which is quicker for it than several, justified where our page is,
with the font as a `@font-face`; pypdfium2 draws its PDF, and is asked for the text and the box of each character. Its
fonts are kept as well: a `FontConfiguration` for each font file, used before it counts; a new one a page, as its
documentation has it, would cost 6 to 10 ms more. It needs an interpreter that has both (``--weasyprint-python``;
default: this one); without, its rows are left out and a line says so. Neither of the two degrades.
Targets: 12 ms at 448 and 30 ms at 896 with degradations, 3 times as fast as Pillow, 20 times as weasyprint.
"""

from __future__ import annotations

import argparse
import gc
import html
import json
import statistics
import subprocess
import sys
import time
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from training.data import made_pages
from training.data.made_pages import PageSettings
from training.data.pages.corpus import Scalars, TextStream
from training.data.pages.degradations import degrade, draw_degradations, encode_jpeg, jpeg_quality
from training.data.schema import png_bytes
from training.evaluation.report import machine, markdown_table

X_HEIGHTS = {448: 3.9}  # px, of the running text, by side
X_HEIGHT = 4.9  # at other sides
WARM = 1.37  # times as large are the pages that load the fonts
MARGIN = 16  # px

# Reads {"html": …, "font": its file} a line; answers the seconds that the page took.
WEASYPRINT = """
import json, sys, time
import pypdfium2, weasyprint
from weasyprint.text.fonts import FontConfiguration
print("ready", weasyprint.__version__, flush=True)
kept = {}
for line in sys.stdin:
    page = json.loads(line)
    start = time.process_time()
    if page["font"] not in kept:
        kept[page["font"]] = FontConfiguration()
    pdf = weasyprint.HTML(string=page["html"]).write_pdf(font_config=kept[page["font"]])
    document = pypdfium2.PdfDocument(pdf)
    sheet = document[0]
    # 96 CSS pixels an inch, 72 points an inch
    image = sheet.render(scale=96 / 72, grayscale=True).to_pil()
    text = sheet.get_textpage()
    characters = text.get_text_range()
    boxes = [text.get_charbox(index) for index in range(text.count_chars())]
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "size": image.size}), flush=True)
"""


class TimedWords(TextStream):
    """Counts the seconds that choosing words takes."""

    seconds = 0.0

    def words(self, count: int) -> list[str]:
        start = time.process_time()
        found = super().words(count)
        TimedWords.seconds += time.process_time() - start
        return found


def draw_with_pillow(words: list[str], path: str, size: float, side: int) -> tuple[np.ndarray, list]:
    """(side, side) uint8 and a box for each word that fits."""
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(image)
    ascent, descent = font.getmetrics()
    space, x, y, boxes, line = font.getlength(" "), MARGIN, MARGIN, [], []
    for word in words:
        width = font.getlength(word)
        if x + width > side - MARGIN and line:
            pen.text((MARGIN, y), " ".join(line), font=font, fill=20)
            x, y, line = MARGIN, y + 1.05 * (ascent + descent), []
        line.append(word)
        boxes.append((x, y, x + width, y + ascent + descent))
        x += width + space
    pen.text((MARGIN, y), " ".join(line), font=font, fill=20)
    return np.asarray(image), boxes


def page_html(text: str, path: str, size: float, side: int, align: str) -> str:
    """The text as one column."""
    return (
        f"<style>@font-face {{font-family: f; src: url('file://{path}')}} @page {{size: {side}px; margin: {MARGIN}px}}"
        f"body {{margin: 0; font: {size}px/1.25 f; text-align: {align}}} p {{margin: 0}}</style>"
        f"<p>{html.escape(text)}</p>"
    )


class Weasyprint:
    """A process of its own that draws pages; `None` from `start` where it cannot be had."""

    def __init__(self, python: str):
        command = [python, "-c", WEASYPRINT]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.version = self.process.stdout.readline().removeprefix("ready").strip()

    @classmethod
    def start(cls, python: str) -> Weasyprint | None:
        """A process that answered, or None and a line that says why not."""
        try:
            found = cls(python)
        except OSError as error:
            print(f"weasyprint left out: {error}", file=sys.stderr)
            return None
        if found.version:
            return found
        said = found.process.stderr.read().strip().splitlines()
        print(f"weasyprint left out: {said[-1] if said else 'no answer'}", file=sys.stderr)
        return None

    def seconds(self, page: str, font: str) -> float:
        """For one page, set in the font file ``font``."""
        self.process.stdin.write(json.dumps({"html": page, "font": font}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["seconds"]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(side: int, pages: int, resources, weasyprint: Weasyprint | None) -> dict[str, list[float]]:
    """Seconds of each step for each page, and of the others; and ``words``."""
    x_height = X_HEIGHTS.get(side, X_HEIGHT)
    settings, warm = (
        PageSettings(str(side), (height, height), ("paragraphs",), blank_share=0)
        for height in (x_height, WARM * x_height)
    )

    def lay_out(index: int, settings: PageSettings):
        return made_pages.lay_out("paragraphs", Scalars(index), settings, resources)

    for index in range(pages):
        lay_out(index, warm)[0].draw(0, 255)
        made_pages.page_row(index, 0, warm, resources)
    times: dict[str, list[float]] = {}

    def timed(name, function, *arguments):
        start = time.process_time()
        result = function(*arguments)
        times.setdefault(name, []).append(time.process_time() - start)
        return result

    gc.freeze()
    for index in tqdm(range(pages), desc=f"{side}", unit="page"):
        rng = np.random.default_rng([0, index, 0])
        TimedWords.seconds = 0.0
        with patch.object(made_pages, "TextStream", TimedWords):
            sheet, _, x_height = timed("lay out", lay_out, index, settings)
        times["lay out"][-1] -= TimedWords.seconds
        times.setdefault("choose words", []).append(TimedWords.seconds)
        ink, paper = made_pages.ink_and_paper(rng)
        pixels, boxes = timed("draw, with boxes", sheet.draw, ink, paper)
        page = made_pages.Page(pixels, boxes, x_height, round(ink), round(paper))
        chosen = draw_degradations(rng, settings.degradations)
        jpeg = chosen.pop() if chosen and chosen[-1].name == "jpeg" else None
        page = timed("degrade", degrade, page, chosen)
        if jpeg:
            timed("encode", encode_jpeg, page.pixels, jpeg_quality(jpeg.strength))
        else:
            timed("encode", png_bytes, page.pixels, True)
        text = sheet.text()
        timed("held-out text", resources.unwanted or bool, text)
        timed("row", made_pages.page_row, index, 0, settings, resources)
        times.setdefault("words", []).append(len(text.split()))
        style = max((line.style for line in sheet.lines), key=lambda s: sum(ln.style is s for ln in sheet.lines))
        timed("Pillow", draw_with_pillow, text.split(), style.path, style.size, side)
        if weasyprint:
            align = "justify" if any(line.stretch for line in sheet.lines) else "left"
            page = [page_html(part, style.path, style.size, side, align) for part in (text[:100], text)]
            weasyprint.seconds(page[0], style.path)
            times.setdefault("weasyprint", []).append(weasyprint.seconds(page[1], style.path))
    return times


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_made_pages", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", type=int, default=[448, 896])
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--fonts", default="packages", help="see `unit data make-pages`")
    parser.add_argument("--weasyprint-python", default=sys.executable, help="has weasyprint and pypdfium2")
    arguments = parser.parse_args(argv)
    resources = made_pages.load_page_resources(fonts=arguments.fonts)
    weasyprint = Weasyprint.start(arguments.weasyprint_python)
    print(machine("cpu"), f"; weasyprint {weasyprint.version}" if weasyprint else "", sep="")
    rows, ratios = [], []
    for side in arguments.size:
        times = measure(side, arguments.pages, resources, weasyprint)
        drawn = np.add(times["lay out"], times["draw, with boxes"])
        degraded = drawn + times["choose words"] + times["degrade"]
        columns = {
            "choose words": times["choose words"],
            "lay out": times["lay out"],
            "draw, with boxes": times["draw, with boxes"],
            "drawn": drawn,
            "degrade": times["degrade"],
            "words chosen, drawn, degraded": degraded,
            "encode": times["encode"],
            "held-out text": times["held-out text"],
            "whole row": times["row"],
        }
        words = round(statistics.mean(times["words"]))
        for name, values in columns.items():
            mean, median, worst = np.mean(values), np.median(values), np.quantile(values, 0.9)
            rows.append([f"{side}", f"{words}", name, *(f"{1000 * value:.1f}" for value in (mean, median, worst))])
        for other in ("Pillow", "weasyprint"):
            if other in times:
                slow = np.median(times[other])
                ratios.append(
                    [f"{side}", other, f"{1000 * slow:.1f}"]
                    + [f"{slow / np.median(own):.1f}" for own in (drawn, degraded, times["row"])]
                )
    if weasyprint:
        weasyprint.close()
    print(markdown_table(["side, px", "words", "step", "mean, ms", "median, ms", "90%, ms"], rows))
    print()
    header = [
        "side, px",
        "against",
        "its median, ms",
        "ours drawn, times as fast",
        "words chosen, degraded",
        "whole row",
    ]
    print(markdown_table(header, ratios))


if __name__ == "__main__":
    main()
