"""Tables and a Markdown page from the results of an evaluation.

What `results.json` holds, format 2:

    {"format": 2, "model", "command", "machine": one line, "versions": {name: version}, "date", "seconds",
     "subjects": [{"name", "role", "path", "hash", "parameters"?}, …],
     "figures": [Figure.to_dict() | {"suite", "evaluator", "subject", "dataset_id"?}, …],
     "notes": [{"suite", "evaluator", "subject", "text"}, …],
     "measured": [{"suite", "evaluator", "subject", "seconds", "cached", "items": path or null}, …]}

"seconds" is how long this command took; those of "measured" how long each measure took when it was taken, in this run
or, where "cached", in an earlier one. Figures stand in the order of the report. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

FORMAT = 2
# Okabe and Ito's palette (2008): told apart by colour-blind readers and in grey
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
SUITE_TITLES = {  # in the order of the claim: reads text, keeps recognising images, at every scale, at no cost
    "text": "Reading",
    "image": "Recognising pictures",
    "retention": "Kept from the teacher",
    "scale": "Across scales",
    "cost": "Cost",
}
SUITE_ABOUT = {
    "text": "How much of a held-out text is read rightly, at which size of type, and in what ways reading fails.",
    "image": "What the features know of pictures whose kinds no training has seen.",
    "retention": "How near the model's features of pictures still are to those of its teacher, the encoder as it was "
    "before training, and how much of what the teacher recognises is recognised still.",
    "scale": "What changes with the number of pixels of an input; x1 is the model's nominal square, x4 four times it.",
    "cost": "What the encoder takes beside the encoder that training began with, and what reading a page takes.",
}
SECTIONS = {  # a suite's heading in docs/evaluation.md, where its figures are defined
    "text": "Text",
    "image": "Image",
    "retention": "Retention",
    "scale": "Scale",
    "cost": "Cost",
}
DEFINITIONS = Path("docs") / "evaluation.md"
ABOUT = {  # evaluator -> what it measures
    ("text", "blocks"): "Paragraphs of held-out manuals, the same ones rendered at each size of type.",
    ("text", "pages"): "Whole pages of held-out manuals, the same ones rendered at each size of type.",
    ("text", "syn-l"): "Drawn pages of dense small type.",
    ("text", "syn-s"): "Drawn pages of sparse large type.",
    ("text", "md-val"): "Pages with headings, lists and code, whose truth is Markdown; measured as asked for in "
    "Markdown, and as the plain text that is read of any page.",
    ("text", "scans"): "Real scans at 300 dpi: two magazine pages and a test page.",
    ("text", "scan-blocks"): "The paragraphs of the same scans, each by itself.",
    ("text", "funsd"): "Scanned forms: FUNSD's test part.",
    ("text", "sroie"): "Scanned receipts: SROIE's test part.",
    ("text", "cord"): "Photographed receipts: CORD's test part.",
    ("text", "failure census"): "How reading fails: shares of images, of lines or of pairs of lines; and what is read "
    "where nothing stands, on blank paper and on pictures without lettering.",
    ("image", "held-out pictures"): "Neighbours, a linear probe and retrieval on frozen features; a picture is never "
    "compared with one by the same hand.",
    ("image", "held-out pictures by their names"): "Pictures named, and found by a caption, through a text encoder.",
    ("image", "segmentation of made scenes"): "A linear layer on frozen patch tokens names what each stands on.",
    ("retention", "features of the teacher"): "The same pictures' features, student against teacher: 1 is alike.",
    ("retention", "recognition of the teacher"): "The student's figure less the teacher's on the same pictures: below "
    "0 something was forgotten.",
    ("scale", "pictures against resolution"): "The same pictures, each made a square of so many pixels a side.",
    ("scale", "reading in one go"): "The same documents in so many pixels, without the reader's cutting into strips.",
    ("scale", "pictures at two scales"): "Features of a picture at x1 against those of the same picture at another "
    "size: 1 is alike.",
    ("scale", "documents at two scales"): "Features of a document at x1 against those of the same document at x4.",
    ("scale", "activations"): "How large features are: a tower with a root mean square above 10 spoils LLaVA unless a "
    "LayerNorm stands behind it.",
    ("cost", "encoder"): "Each encoder by itself, one image a pass. Times of two models are minutes apart here; to "
    "compare them, take the ratios below.",
    ("cost", "encoder against its start"): "Both in turns on the same pixels: 1 is as much as the start takes.",
    ("cost", "reading a page"): "From the file to the text, each reader in a process of its own.",
}
WORDS = {  # of a figure's name, as a heading says them
    "knn": "k-NN",
    "zero shot": "zero-shot",
    "f1": "F1",
    "cer": "CER",
    "wer": "WER",
    "cka": "CKA",
    "miou": "mIoU",
    "map": "mAP",
    "rms": "RMS",
    "flops": "FLOPs",
    "teds": "TEDS",
    "p999": "99.9% quantile",
    "markdown": "Markdown",
}
AXES = {  # what a figure may be measured at -> the axis
    "x_height": "height of a lower-case x, px",
    "resolution": "side of the input, px",
}
LARGEST_FIRST = ("x_height",)  # its columns run from what is easy to what is hard
TYPE = {"x_height": (10, 5)}  # px: what print is at 150 dpi, and small type
WIDEST = 9  # columns of figures that a page has room for
SUBJECTS_ACROSS = 6  # columns of subjects, likewise
# The handful that a reader looks for first: suite, figure, which evaluators (None: the first that has it), and at
# which places, a row each of those that were measured
SUMMARY: tuple[tuple[str, str, tuple[str, ...] | None, Mapping[str, tuple]], ...] = (
    ("text", "word_f1", ("blocks", "pages"), TYPE),
    ("text", "cer", ("blocks", "pages"), TYPE),
    ("image", "knn_accuracy", None, {}),
    ("image", "probe_accuracy", None, {}),
    ("image", "zero_shot_top1", None, {}),
    ("image", "segmentation_miou", None, {}),
    ("retention", "gain_knn_accuracy", None, {}),
    ("retention", "cosine", None, {}),
    ("retention", "cka", None, {}),
    ("scale", "cka", ("pictures at two scales",), {"scale": ("x4",)}),
    ("scale", "activation_rms", None, {}),
    ("cost", "parameters", None, {}),
    ("cost", "forward_flops", None, {}),
    ("cost", "latency_ratio", None, {}),
    ("cost", "seconds_per_page", None, {}),
    ("cost", "peak_memory", ("reading a page",), {}),
)
TOLD = {  # evaluators, as a line of the summary says them; others by their name
    "held-out pictures by their names": "held-out pictures",
    "segmentation of made scenes": "made scenes",
    "features of the teacher": "features of pictures, to the teacher's",
    "recognition of the teacher": "over the teacher",
    "pictures at two scales": "features of pictures at x1, to those at",
    "activations": "",
    "encoder": "",
    "encoder against its start": "encoder over its start",
    "reading a page": "reading a page",
}

Record = Mapping[str, Any]  # one of "figures"


# ---------------------------------------------------------------------------------------------------------------------
# Reading results
# ---------------------------------------------------------------------------------------------------------------------


def load_results(path: str | os.PathLike) -> dict[str, Any]:
    """The results in a ``results.json`` or in a folder that has one.

    Raises:
        ValueError: there is none, it is no JSON, or it is of another format; one line.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: no evaluation there ({error.strerror or error}); unit evaluate writes one"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    return checked(found, str(path))


def checked(found: Any, where: str = "results.json") -> dict[str, Any]:
    """``found`` itself, if it is what format 2 says.

    Raises:
        ValueError: it is not; one line.
    """
    told = found.get("format") if isinstance(found, dict) else None
    if told != FORMAT:
        has = f"it is of format {told}" if told is not None else "it names no format"
        raise ValueError(f"{where}: not an evaluation of format {FORMAT}: {has}; run unit evaluate again")
    needed = {"subjects": ("name", "role"), "figures": ("name", "value", "suite", "evaluator", "subject")}
    for key, names in (needed | {"notes": ("text",)}).items():
        rows = found.get(key)
        if not isinstance(rows, list):
            raise ValueError(f"{where}: {key!r} is missing; run unit evaluate again")
        for row in rows:
            missing = [name for name in names if not isinstance(row, dict) or name not in row]
            if missing:
                raise ValueError(f"{where}: one of {key!r} has no {missing[0]!r}; run unit evaluate again")
    for row in found["figures"]:
        if not isinstance(row["value"], (int, float)):
            raise ValueError(f"{where}: {row['name']} is no number: {row['value']!r}")
    return found


def figures_of(
    results: Record, suite: str | None = None, name: str | None = None, subject: str | None = None
) -> list[Record]:
    """The figures of a suite, of a name, of a subject; all where nothing is said."""
    wanted = {"suite": suite, "name": name, "subject": subject}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    return [row for row in results["figures"] if all(row[key] == value for key, value in wanted.items())]


def subject_of(results: Record, role: str) -> str | None:
    """Name of the first subject with this role."""
    return next((each["name"] for each in results["subjects"] if each["role"] == role), None)


# ---------------------------------------------------------------------------------------------------------------------
# Values and cells
# ---------------------------------------------------------------------------------------------------------------------


def title(name: str) -> str:
    """A figure's name as a heading says it.

    >>> title("zero_shot_top1")
    'zero-shot top 1'
    """
    text = re.sub(r"\b(top|recall)(\d+)\b", lambda found: f"{found[1]} {found[2]}", name.replace("_", " "))
    for word, said in WORDS.items():
        text = re.sub(rf"\b{word}\b", said, text)
    return text


def sensible(value: float, unit: str) -> tuple[float, str]:
    """What to multiply values like this one by, and the unit they are then in: 0.004 s are 4 ms.

    >>> sensible(0.004, "s")
    (1000.0, 'ms')
    """
    size = abs(value)
    if unit == "ms":
        factor, unit = sensible(value / 1e3, "s")
        return factor / 1e3, unit
    if unit == "s":
        if 0 < size < 1:
            return 1e3, "ms"
        return (1.0, "s") if size < 120 else (1 / 60, "min")
    if unit == "MB":
        return (1e-3, "GB") if size >= 1000 else (1.0, "MB")
    if unit == "GFLOP":
        if size >= 1000:
            return 1e-3, "TFLOP"
        return (1e3, "MFLOP") if 0 < size < 0.1 else (1.0, "GFLOP")
    if unit == "" and size >= 1e6:
        return (1e-9, "G") if size >= 1e9 else (1e-6, "M")
    return 1.0, "" if unit == "share" else unit


def digits(value: float, unit: str) -> str:
    """``value`` as far as it means something: shares to three places, else three figures, in four places."""
    if unit == "share":
        return f"{value:.3f}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if unit == "" and float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    places = min(4, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{places}f}"


def cell(row: Record, beside: Sequence[Record] = ()) -> str:
    """A figure with its interval and, where there are any, its failures: ``0.912 [0.901, 0.923]``. An interval without
    width is left out: it says only that all items were alike.

    Args:
        beside: figures that this one is to be compared with, and is therefore told in one unit with.
    """
    unit = row.get("unit", "share")
    factor, called = sensible(row["value"], unit)
    largest = max((each["value"] for each in beside if each.get("unit", "share") == unit), key=abs, default=0.0)
    shared, shared_called = sensible(largest, unit)
    if beside and abs(row["value"] * shared) >= 0.05:
        factor, called = shared, shared_called
    text = digits(row["value"] * factor, unit) + (f" {called}" if called else "")
    low, high = row.get("low"), row.get("high")
    if low is not None and high is not None and not low == high == row["value"]:
        text += f" [{digits(low * factor, unit)}, {digits(high * factor, unit)}]"
    return text + (f" ({row['failed']} failed)" if row.get("failed") else "")


def clock(seconds: float) -> str:
    """``3.2 s``, ``4 min 05 s``, ``1 h 02 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, columns padded so that it also reads well in a terminal."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(cells[0]), line(["-" * width for width in widths]), *map(line, cells[1:])])


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def at_text(key: str, value: Any) -> str:
    """One thing that a figure was measured at: ``x-height 7 px``, ``patch mean``, ``k 5``."""
    if isinstance(value, str):
        return f"over {value}" if key == "over" else value or "own"
    plain = f"{value:g}"
    named = {"x_height": f"x-height {plain} px", "resolution": f"{plain} px"}
    return named.get(key, f"{key.replace('_', ' ')} {plain}")


def axis_of(rows: Sequence[Record]) -> str | None:
    """The number that these figures, all of one name, were measured against; None where they are at one place."""
    keys = dict.fromkeys([*AXES, *(key for row in rows for key in row.get("at", {}))])
    for key in keys:
        places = {row["at"][key] for row in rows if _is_number(row.get("at", {}).get(key))}
        if len(places) > 1:
            return key
    return None


def places_of(rows: Sequence[Record], axis: str) -> list[float]:
    """Where on ``axis`` there are figures, in the order of the columns."""
    places = {row["at"][axis] for row in rows if _is_number(row["at"].get(axis))}
    return sorted(places, reverse=axis in LARGEST_FIRST)


def variants_of(rows: Sequence[Record], axis: str | None) -> tuple[list[str], dict[str, Any]]:
    """Keys of ``at`` beside the axis that tell these figures apart, and those, with their value, that all share."""
    keys = dict.fromkeys(key for row in rows for key in row.get("at", {}) if key != axis)
    keys = [key for key in keys if not _goes_with(rows, axis, key)]
    apart = [key for key in keys if len({row.get("at", {}).get(key) for row in rows}) > 1]
    return apart, {key: rows[0]["at"][key] for key in keys if key not in apart}


def _goes_with(rows: Sequence[Record], axis: str | None, key: str) -> bool:
    """Whether ``key`` says again where on the axis a figure is, as "x4" does at 256 px."""
    found: dict[Any, set[Any]] = {}
    for row in rows:
        found.setdefault(row.get("at", {}).get(axis), set()).add(row.get("at", {}).get(key))
    several = len(set().union(*found.values())) > 1
    return axis is not None and several and all(len(values) == 1 for values in found.values())


def place_text(rows: Sequence[Record], axis: str, place: float) -> str:
    """A place on an axis, and what goes with it: ``256 (x4)``."""
    here = next(row["at"] for row in rows if row["at"].get(axis) == place)
    beside = [at_text(key, here[key]) for key in here if key != axis and _goes_with(rows, axis, key)]
    return f"{place:g} ({', '.join(beside)})" if beside else f"{place:g}"


def variant_text(row: Record, apart: Sequence[str]) -> str:
    """What tells a figure from its likes, in words."""
    at = row.get("at", {})
    return ", ".join(at_text(key, at[key]) for key in apart if key in at)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _heading(row: Record) -> str:
    return title(row["name"]) + (" ↓" if row.get("better") == "lower" else "")


def evaluator_tables(rows: Sequence[Record], subjects: Sequence[str]) -> list[str]:
    """The figures of one evaluator as Markdown: a table of those along each axis, and tables of those that stand alone
    in the order they were measured in. Figures that were measured in the same places, or in some of them, share
    a table; shares that are zero everywhere have a line below instead."""
    groups: list[tuple[str | None, set[Any], list[Record]]] = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [row for row in rows if row["name"] == name]
        axis = axis_of(named)
        places = {json.dumps(row.get("at", {}), sort_keys=True) for row in named} if axis is None else set()
        for kind, known, found in groups:
            if kind == axis and (axis is not None or known <= places or places <= known):
                known |= places
                found += named
                break
        else:
            groups.append((axis, places, named))
    return [text for axis, _, found in groups for text in _tables(found, axis, subjects)]


def _tables(rows: Sequence[Record], axis: str | None, subjects: Sequence[str]) -> list[str]:
    names = dict.fromkeys(row["name"] for row in rows)
    shares = {
        name: not any(row["value"] or row.get("failed") for row in rows if row["name"] == name)
        and all(row.get("unit", "share") == "share" for row in rows if row["name"] == name)
        for name in names
    }
    zeros = [name for name in names if shares[name]]
    if len(zeros) == len(names):
        zeros = []
    kept = [row for row in rows if row["name"] not in zeros]
    parts = [_table_along(kept, axis, subjects) if axis is not None else _table_alone(kept, subjects)]
    if zeros:
        parts.append(f"0 throughout: {', '.join(map(title, zeros))}.")
    return parts


def _about(rows: Sequence[Record], shared: Mapping[str, Any], axis: str | None = None) -> str:
    """Who, along what, how many items, and what all were measured at: ``UNIT, k 5, 60 items``."""
    counts = sorted({row["items"] for row in rows if row.get("items")})
    who = {row["subject"]: None for row in rows}
    parts = list(who) if len(who) == 1 else []
    if axis is not None:
        parts.append(f"by {AXES.get(axis, axis.replace('_', ' '))}")
    parts += shared_texts(rows, shared)
    if counts:
        less = f"{counts[0]:,} to " if len(counts) > 1 else ""
        parts.append(f"{less}{counts[-1]:,} item{'s' * (counts[-1] != 1)}")
    text = ", ".join(parts)
    return f"{text if who and parts[:1] == list(who) else text[:1].upper() + text[1:]}:" if text else ""


def shared_texts(rows: Sequence[Record], shared: Mapping[str, Any]) -> list[str]:
    """What all of these figures were measured at, but for what their evaluator's name says already."""
    named = rows[0]["evaluator"]
    return [at_text(key, value) for key, value in shared.items() if not (isinstance(value, str) and value in named)]


def _table_along(rows: Sequence[Record], axis: str, subjects: Sequence[str]) -> str:
    """A row for each figure, subject and variant; a column for each place on the axis, before them one for what was
    measured over all places. A single subject has no column but is said above."""
    apart, shared = variants_of(rows, axis)
    several = len({row["subject"] for row in rows}) > 1
    places: list[float | None] = list(places_of(rows, axis))
    if any(axis not in row["at"] for row in rows):
        places.insert(0, None)
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [row for row in rows if row["name"] == name]
        found: dict[tuple[str, str], dict[Any, str]] = {}
        for row in named:
            found.setdefault((row["subject"], variant_text(row, apart)), {})[row["at"].get(axis)] = cell(row, named)
        for (subject, variant), cells in _by_subject(found, subjects):
            table.append(
                [
                    _heading(named[0]),
                    *([subject] if several else []),
                    *([variant] if apart else []),
                    *(cells.get(each, "-") for each in places),
                ]
            )
    header = [
        "",
        *([""] if several else []),
        *([""] if apart else []),
        *("all" if place is None else place_text(rows, axis, place) for place in places),
    ]
    return f"{_about(rows, shared, axis)}\n\n{markdown_table(header, table)}"


def _table_alone(rows: Sequence[Record], subjects: Sequence[str]) -> str:
    """A row for each subject and variant and a column for each figure; where that is wider than a page, a row for each
    figure, and a column for each subject and variant or, where those are many, for each subject."""
    apart, shared = variants_of(rows, None)
    names = list(dict.fromkeys(row["name"] for row in rows))
    headings = {row["name"]: _heading(row) for row in rows}
    several = len({row["subject"] for row in rows}) > 1
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        beside = [each for each in rows if each["name"] == row["name"]]
        found.setdefault((row["subject"], variant_text(row, apart)), {})[row["name"]] = cell(row, beside)
    lines = _by_subject(found, subjects)
    about = _about(rows, shared)
    if len(names) <= WIDEST:
        header = [*([""] if several else []), *([""] if apart else []), *headings.values()]
        table = [
            [
                *([subject] if several else []),
                *([variant or "all"] if apart else []),
                *(cells.get(name, "-") for name in names),
            ]
            for (subject, variant), cells in lines
        ]
    elif len(lines) <= SUBJECTS_ACROSS:
        called = [
            ", ".join([*([who] if several else []), *([at or "all"] if apart else [])]) for (who, at), _ in lines
        ]
        header = ["", *(text or lines[0][0][0] for text in called)]
        table = [[headings[name], *(cells.get(name, "-") for _, cells in lines)] for name in names]
    else:
        present = [subject for subject in subjects if any(subject == who for (who, _), _ in lines)]
        variants = list(dict.fromkeys(variant for (_, variant), _ in lines))
        header = ["", *([""] if apart else []), *present]
        table = [
            [
                headings[name],
                *([variant or "all"] if apart else []),
                *(found.get((subject, variant), {}).get(name, "-") for subject in present),
            ]
            for name in names
            for variant in variants
            if any(name in found.get((subject, variant), {}) for subject in present)
        ]
    return (f"{about}\n\n" if about else "") + markdown_table(header, table)


def _by_subject(found: dict[tuple[str, str], Any], subjects: Sequence[str]) -> list[tuple[tuple[str, str], Any]]:
    order = {subject: number for number, subject in enumerate(subjects)}
    return sorted(found.items(), key=lambda one: order.get(one[0][0], len(order)))


def summary(results: Record) -> str:
    """A table of the handful of figures that a reader looks for first, of those that were measured; one column a
    subject. Of a figure along an axis there are the places that ``SUMMARY`` names; where it names none, or none of
    them was measured, the figure over everything or else one place: the largest type; twice the side, x4, of
    pictures."""
    subjects = [each["name"] for each in results["subjects"]]
    lines: list[tuple[str, dict[str, str]]] = []
    for suite, name, evaluators, places in SUMMARY:
        named = figures_of(results, suite, name)
        for evaluator in evaluators or [row["evaluator"] for row in named[:1]]:
            every = [row for row in named if row["evaluator"] == evaluator]
            chosen = [
                [row for row in every if row.get("at", {}).get(key) == value]
                for key, values in places.items()
                for value in values
            ]
            for rows in [rows for rows in chosen if rows] or [every] * bool(every):
                at = _shown_at(rows, results)
                told = [at_text(key, value) for key, value in at.items() if not (key == "over" and value in evaluator)]
                where = TOLD.get(evaluator, evaluator)
                if where.endswith(" at") and told:  # the place is what it is compared with
                    told = [f"{where} {told[0]}", *told[1:]]
                elif where:
                    told = [where, *told]
                lines.append((", ".join([_heading(rows[0]), *told]), _row_of_summary(rows, at)))
    present = [subject for subject in subjects if any(subject in cells for _, cells in lines)]
    if not lines:
        return "No figures."
    table = [[heading, *(cells.get(subject, "-") for subject in present)] for heading, cells in lines]
    return markdown_table(["", *present], table)


def _row_of_summary(rows: Sequence[Record], at: Mapping[str, Any]) -> dict[str, str]:
    """Subject -> its figure at this place; of one that goes another way there, such as a teacher, which has no vision
    decoder, the figure of its own way, which is said."""
    beside = [row for row in rows if row.get("at", {}) == at]
    found = {row["subject"]: cell(row, beside) for row in beside}
    elsewhere = {key: value for key, value in at.items() if key != "way"}
    for row in rows:
        here = row.get("at", {})
        if row["subject"] not in found and {key: here[key] for key in here if key != "way"} == elsewhere:
            found[row["subject"]] = f"{cell(row)} ({at_text('way', here.get('way', ''))})"
    return found


def _shown_at(rows: Sequence[Record], results: Record) -> dict[str, Any]:
    axis = axis_of(rows)
    if axis is None or any(axis not in row.get("at", {}) for row in rows):
        rows = [row for row in rows if axis is None or axis not in row.get("at", {})]
        return dict(rows[0].get("at", {}))
    places = places_of(rows, axis)
    place = places[0]
    if axis == "resolution" and rows[0]["suite"] == "scale":
        x4 = [row["at"].get(axis) for row in results["figures"] if row.get("at", {}).get("scale") == "x4"]
        place = next((each for each in places if each in x4), place)
    return dict(next(row["at"] for row in rows if row["at"][axis] == place))


def note_line(note: Record) -> str:
    """``text, blocks, UNIT: what is to be said``."""
    said = [key for key in ("suite", "evaluator", "subject") if note.get(key)]
    if said[-1:] == ["subject"] and note["text"].startswith(note["subject"]):
        said.pop()
    where = ", ".join(note[key] for key in said)
    return f"{where}: {note['text']}" if where else note["text"]


def sections(results: Record, suites: Iterable[str] | None = None, level: int = 2) -> str:
    """Everything measured, a heading a suite and a heading an evaluator.

    Args:
        suites: which; all by default.
        level: of the suites' headings.
    """
    subjects = [each["name"] for each in results["subjects"]]
    wanted = SUITE_TITLES if suites is None else [suite for suite in SUITE_TITLES if suite in set(suites)]
    parts = []
    for suite in wanted:
        rows = figures_of(results, suite)
        notes = [note for note in results["notes"] if note.get("suite") == suite]
        if not rows and not notes:
            continue
        parts.append(f"{'#' * level} {SUITE_TITLES[suite]}")
        parts.append(f"{SUITE_ABOUT[suite]} {_definitions(suite, results.get('definitions'))}")
        if rows and (picture := results.get("plots", {}).get(suite)):
            parts.append(f"![the figures of this section, drawn]({picture})")
        for evaluator in dict.fromkeys(row["evaluator"] for row in rows):
            parts.append(f"{'#' * (level + 1)} {evaluator}")
            parts += [ABOUT[suite, evaluator]] if (suite, evaluator) in ABOUT else []
            parts += evaluator_tables([row for row in rows if row["evaluator"] == evaluator], subjects)
            parts += _notes([note for note in notes if note.get("evaluator") == evaluator])
        measured = {row["evaluator"] for row in rows}
        rest = [note for note in notes if note.get("evaluator") not in measured]
        parts += _notes([{**note, "text": note_line({**note, "suite": ""}), "subject": ""} for note in rest])
    return "\n\n".join(parts)


def _definitions(suite: str, link: str | None) -> str:
    """Where the figures of a suite are defined."""
    section = SECTIONS[suite]
    where = f"[{DEFINITIONS.as_posix()}]({link}#{section.lower()})" if link else f"`{DEFINITIONS.as_posix()}`"
    return f"Every figure is defined in {where}, section {section}."


def _notes(notes: Sequence[Record]) -> list[str]:
    """What is said of several subjects alike is said once."""
    said: dict[str, list[str]] = {}
    for note in notes:
        who = note.get("subject", "")
        text = note["text"].removeprefix(f"{who}: ") if who else note["text"]
        said.setdefault(text, []).extend([who] if who and not text.startswith(who) else [])
    lines = []
    for text, who in said.items():
        names = ", ".join(dict.fromkeys(who))
        lines.append(f"* {names}: {text}" if names else f"* {text}")
    return ["\n".join(lines)] if lines else []


def subject_table(results: Record) -> str:
    """Who was measured."""
    rows = []
    for each in results["subjects"]:
        count = f"{each['parameters']:,}" if each.get("parameters") else "-"
        rows.append([each["name"], each["role"], f"`{each.get('path', '')}`", count, each.get("hash", "")[:12]])
    return markdown_table(["", "role", "what", "parameters", "hash"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write ``report.md`` and the suites' plots into ``folder``; a plot that shows these figures already is left."""
    from training.evaluation.plots import plot_suite

    plots = {}
    for suite in SUITE_TITLES:
        name = f"{suite}.png"
        if plot_suite(results, suite, folder / name):
            plots[suite] = name
    text = report_text(results | {"plots": plots, "definitions": _link_to_definitions(folder)})
    (folder / "report.md").write_text(text, encoding="utf-8")


def _link_to_definitions(folder: Path) -> str | None:
    """From a report in this repository, such as those under ``docs/``, to the definitions; None from elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if root not in folder.resolve().parents or not (root / DEFINITIONS).is_file():
        return None
    return Path(os.path.relpath(root / DEFINITIONS, folder.resolve())).as_posix()


def report_text(results: Record) -> str:
    """The page: what matters most first, then everything."""
    measured = results.get("measured", [])
    taken = sum(one["seconds"] for one in measured)
    fresh = sum(not one["cached"] for one in measured)
    number = f"{len(measured)} measure{'s' * (len(measured) != 1)}"
    if fresh == len(measured):
        told = f"{number} in {clock(results['seconds'])}"
    else:
        last = f"{fresh or 'none'} of them in the last run, the rest in earlier ones"
        told = f"{number}, which took {clock(taken)}; {last}"
    lines = [
        f"# Evaluation of {results['model']}",
        "Brackets hold 95% bootstrap intervals, over items of the same kind and not over other trainings; a figure "
        "without is exact, or the same for every item. ↓ marks what is better low.",
        summary(results),
        "## How it was measured",
        f"```sh\n{results['command']}\n```",
        f"{results['machine']}. {told}.",
        subject_table(results),
    ]
    lines += _notes([note for note in results["notes"] if not note.get("suite")])
    lines.append(sections(results))
    if any(one.get("items") for one in measured):
        lines.append("What was found of each item, worst first, is in `items/`.")
    return "\n\n".join(line for line in lines if line) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache
def versions(packages: tuple[str, ...] = ("torch", "transformers")) -> dict[str, str]:
    """Python's version and those of packages. Nothing is imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def machine(device: str = "cpu") -> str:
    """One line for tables of figures: processor and threads, or accelerator; versions; date."""
    stated = ", ".join(f"{what} {version}" for what, version in versions().items())
    return f"{processor(device)}; {stated}; {date.today().isoformat()}"


def processor(device: str = "cpu") -> str:
    """The accelerator's name; or the processor's, and how many threads torch uses."""
    name = str(device)
    if name.startswith("cuda"):
        return _accelerator(int(name.partition(":")[2] or 0))
    count = threads()
    return f"{_processor()}, {count} thread{'s' * (count != 1)}"


def threads() -> int:
    """What torch uses on a CPU: as it says where it is loaded, else what it would take from the environment."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 0:
            return int(os.environ[name])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache
def _accelerator(number: int) -> str:
    """Name of a CUDA device, asked of the driver, so that torch need not be loaded for it."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.get_device_name(number)
    asked = ["nvidia-smi", f"--id={number}", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"cuda:{number}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def shown(path: str | os.PathLike) -> str:
    """A path, or words with paths among them, as a report names them: nobody's home folder is the writer's.

    With ``/home/me`` at home ``/home/me/runs/a`` is ``~/runs/a``.
    """
    text, home = str(path), str(Path.home())
    if len(home) < 2:
        return text
    return re.sub(rf"(?<![\w.~/\\]){re.escape(home)}(?=[/\\\s'\",;:)]|$)", "~", text)
