"""Images without text, to be answered with nothing: strips cut out of pictures [ours].

A model that has only seen text reads text into a photograph's grass; these rows are what it must stay silent at. The
other blanks, empty and smudged paper, are among the made pages (:mod:`training.data.made_chunks`).
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .pdf import Report
from .pictures import compose
from .schema import make_row, read_columns, write_shards

# Pictures whose captions promise something to read
LEGIBLE = re.compile(
    r"\b(letters?|text|words?|signs?|numbers?|digits?|keycap|button|input|alphabet|abc|clock|calendar|keyboard|book|"
    r"newspaper|logo|label|poster|card|coin|banknote|stamp|map|latin|japanese|o'clock|symbol|mark|ok|new|free|cool|sos|"
    r"id|atm|up|end|soon|back|top|on|type|font|note|menu|list|page|document|chart)\b",
    re.IGNORECASE,
)
SIDE = (160, 513)  # px of the composed picture, from ... to
HEIGHT, WIDTH = (16, 96), (48, 481)  # px of a strip


def blank_rows(folder: str | Path, count: int, seed: int) -> Iterator[dict]:
    """Rows with empty text, as many as `count`, drawn from the captioned pictures in `folder`.

    Raises:
        ValueError: no picture is left after those with something to read in them.
    """
    rng = np.random.default_rng(seed)
    rows = [
        row for row in read_columns(folder, ["image", "text", "source", "license"]) if not LEGIBLE.search(row["text"])
    ]
    if not rows:
        raise ValueError(f"{folder} has no picture without something to read in it")
    for index in range(count):
        row = rows[int(rng.integers(len(rows)))]
        side = int(rng.integers(*SIDE))
        picture = compose(Image.open(io.BytesIO(row["image"]["bytes"])), side).convert("L")
        for _ in range(10):
            height = int(rng.integers(*HEIGHT))
            width = int(rng.integers(WIDTH[0], min(WIDTH[1], side)))
            left, top = int(rng.integers(0, side - width)), int(rng.integers(0, side - height))
            strip = np.asarray(picture)[top : top + height, left : left + width]
            if strip.std() > 4:  # plain paper is among the made pages
                break
        yield make_row(
            strip,
            "",
            task="ocr",
            kind="document",
            source=f"blank/{seed}#{index} of {row['source']}",
            license=row["license"],
            split="train",
        )


def build_blanks(pictures: str | Path, out: str | Path, count: int, seed: int = 0) -> Report:
    """Write `count` rows of `blank_rows` to `out`: the same seed and pictures give the same rows."""
    begin = time.perf_counter()
    report = Report(rows=write_shards(blank_rows(pictures, count, seed), out))
    report.seconds = time.perf_counter() - begin
    report.save(Path(out), pictures=Path(pictures).name, count=count, seed=seed)
    return report
