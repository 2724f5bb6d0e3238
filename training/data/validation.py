"""What a data set holds, and what of it cannot be used: the report of `unit data validate`."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .languages import detect_language, scripts
from .mapping import MappedRows
from .refusals import MAX_SHARE, Refusals, TooManyRefused

QUANTILES = (0, 5, 50, 95, 100)  # per cent
SHEET_ROWS = 15


@dataclass
class Validation:
    """Counts over the rows of one source, as they come; `as_dict` is what `validation.json` holds.

    Args:
        name: of the source.
        refusals: counts what was skipped.
    """

    name: str
    refusals: Refusals
    rows: int = 0
    complete: bool = True  # not cut off by a limit
    counts: dict[str, Counter] = field(default_factory=lambda: {key: Counter() for key in _COUNTED})
    values: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in _MEASURED})
    with_words: int = 0
    with_char_boxes: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=lambda: {"images": 0, "texts": 0})
    duplicate_examples: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._seen: dict[str, dict[bytes, str] | set[bytes]] = {"images": {}, "texts": set()}
        self._rng = np.random.default_rng(0)
        self._languages = True

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of the schema."""
        self.rows += 1
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            width, height = image.size
            self.counts["image formats"][f"{image.format} {image.mode}"] += 1
        text = row["text"]
        self.values["image width"].append(width)
        self.values["image height"].append(height)
        self.values["characters"].append(len(text))
        self.values["words"].append(len(text.split()))
        if row.get("x_height"):
            self.values["x-height"].append(float(row["x_height"]))
        self.counts["tasks"][f"{row['task']}, {row['kind']}"] += 1
        self.counts["splits"][row["split"]] += 1
        self.counts["licences"][row["license"]] += 1
        if self._languages:
            try:
                self.counts["languages"][detect_language(text) if text.strip() else "no text"] += 1
            except ModuleNotFoundError:
                self._languages = False
        self.counts["scripts"].update(scripts(text))
        self.with_words += bool(row.get("words"))
        self.with_char_boxes += bool(row.get("char_boxes"))
        self._look_for_duplicates(row)
        # a fair sample of a stream whose length nobody knows (reservoir sampling)
        if len(self.samples) < SHEET_ROWS:
            self.samples.append(row)
        elif (place := int(self._rng.integers(self.rows))) < SHEET_ROWS:
            self.samples[place] = row

    def _look_for_duplicates(self, row: dict[str, Any]) -> None:
        images, texts = self._seen["images"], self._seen["texts"]
        mark = hashlib.blake2b(row["image"]["bytes"], digest_size=12).digest()
        if mark in images:
            self.duplicates["images"] += 1
            if len(self.duplicate_examples) < 3:
                self.duplicate_examples.append(f"{row['source']} = {images[mark]}")
        else:
            images[mark] = row["source"]
        if row["text"]:
            mark = hashlib.blake2b(row["text"].encode("utf-8", "replace"), digest_size=12).digest()
            self.duplicates["texts"] += mark in texts
            texts.add(mark)

    def judge(self, max_share: float) -> None:
        """Note as `problems` what makes the source unfit: too much refused, our schema violated, nothing left."""
        kept, self.refusals.max_share = self.refusals.max_share, max_share
        try:
            self.refusals.check()
        except TooManyRefused as error:
            self.problems.append(str(error))
        finally:
            self.refusals.max_share = kept
        for source, counts in self.refusals.as_dict().items():
            for reason, each in counts["reasons"].items():
                if reason.startswith("schema:"):
                    examples = "; ".join(each["examples"])
                    self.problems.append(f"{source}: {reason} ({each['count']} times, e.g. {examples})")
        if not self.rows:
            self.problems.append(f"{self.name}: no row can be used")

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.name,
            "valid": not self.problems,
            "problems": self.problems,
            "complete": self.complete,
            "rows": self.rows,
            "refused": self.refusals.as_dict(),
            "counts": {key: dict(counter.most_common()) for key, counter in self.counts.items()},
            "languages detected": self._languages,
            "quantiles": {
                key: {f"{q}%": round(float(value), 1) for q, value in zip(QUANTILES, np.percentile(each, QUANTILES))}  # noqa: B905
                for key, each in self.values.items()
                if each
            },
            "rows with words": self.with_words,
            "rows with char_boxes": self.with_char_boxes,
            "duplicates": {**self.duplicates, "examples": self.duplicate_examples},
        }

    def __str__(self) -> str:
        """A short table."""
        report = self.as_dict()
        lines = [("rows", f"{self.rows:,}" + ("" if self.complete else " (the first ones)"))]
        refused = self.refusals.refused
        lines.append(("refused", f"{refused:,} ({refused / max(1, refused + self.rows):.1%})"))
        for counts in report["refused"].values():
            for reason, each in list(counts["reasons"].items())[:12]:
                example = f", e.g. {each['examples'][0]}" if each["examples"] else ""
                lines.append(("", f"{each['count']:,} {reason}{example}"))
        for key in ("tasks", "splits", "licences", "image formats", "languages"):
            if key == "languages" and not self._languages:
                lines.append((key, "not told apart: py3langid is not installed"))
            elif self.counts[key]:
                lines.append((key, _listed(self.counts[key], self.rows)))
        if self.counts["scripts"]:
            lines.append(("scripts", _listed(self.counts["scripts"], self.counts["scripts"].total())))
        for key, quantiles in report["quantiles"].items():
            low, five, half, most, high = (f"{value:,.6g}" for value in quantiles.values())
            lines.append((key, f"median {half}, 90% in {five} … {most}, all in {low} … {high}"))
        for key, count in (("with words", self.with_words), ("with char_boxes", self.with_char_boxes)):
            lines.append((key, f"{count / max(1, self.rows):.1%}"))
        same = ", ".join(f"{count:,} {what}" for what, count in self.duplicates.items())
        examples = f", e.g. {self.duplicate_examples[0]}" if self.duplicate_examples else ""
        lines.append(("seen before", same + examples))
        for problem in self.problems:
            lines.append(("PROBLEM", problem))
        return "\n".join([self.name, *(f"  {key:<16}{value}" for key, value in lines)])


_COUNTED = ("tasks", "splits", "licences", "image formats", "languages", "scripts")
_MEASURED = ("image width", "image height", "characters", "words", "x-height")


def _listed(counter: Counter, total: int, most: int = 6) -> str:
    shown = ", ".join(f"{key} {count / max(1, total):.1%}" for key, count in counter.most_common(most))
    rest = len(counter) - most
    return shown + (f", and {rest} more" if rest > 0 else "")


def validate_rows(rows: MappedRows, limit: int | None = None, max_share: float = MAX_SHARE) -> Validation:
    """Look at the rows of a source, all or the first ``limit``.

    Args:
        rows: as `mapping.read_source` gives them; their refusals must not stop at a share (`max_share=1`).
        max_share: of rows that may be refused.
    """
    from tqdm import tqdm

    report = Validation(rows.name, rows.refusals)
    for row in tqdm(_first(rows, limit, report), desc=rows.name, unit=" rows", mininterval=1.0, disable=None):
        report.add(row)
    report.judge(max_share)
    return report


def _first(rows: Iterable[dict[str, Any]], limit: int | None, report: Validation):
    for number, row in enumerate(rows):
        if number == limit:
            report.complete = False
            return
        yield row


def write_report(report: Validation, folder: str | Path) -> None:
    """``validation.json`` and, when there are rows, ``contact_sheet.png``."""
    from .contact_sheet import contact_sheet, save_sheet

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if report.samples:
        title = f"{report.name}: {len(report.samples)} of {report.rows:,} rows"
        save_sheet(contact_sheet(report.samples, title), folder / "contact_sheet.png")
    partial = folder / ".validation.json.partial"
    partial.write_text(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / "validation.json")
