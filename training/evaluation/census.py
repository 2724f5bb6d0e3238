"""The failure census: in what ways readings go wrong, over everything that the suite text has read.

Readings are those of :mod:`training.evaluation.readings`, so nothing is read twice; of sets that are there at several
x-heights only those of ``READABLE`` px and more count, for below that type is not misread but too small. Two sets are
read for the census alone: blank paper, and pictures of things with no lettering on them.

A line is a line of the text of at least ``LINE_WORDS`` words and ``LINE_CHARACTERS`` characters, case and typography
left aside; longer ones than ``LINE_MOST`` characters, such as unbroken paragraphs, are cut at words. A line is *found*
when some stretch of the other text, as long as itself, is like it by ``FOUND`` (1 - insertions and deletions over the
characters of both). Thresholds are ours; this one from 354 lines of 12 pages [measured]: in the text of another page
the best stretch is 0.47 alike in the middle and 0.63 at most; with 20% of the letters changed at random 99% of the
lines are found in their own, with 30% 94%, with 40% 68%; and all 354 are taken for invented beside another page.

| figure | of | definition |
|---|---|---|
| unread | images with text | share of which no word at all was read |
| repetition | images with text | share with a loop (:func:`loop_of`) where the truth has none |
| truncated | images with text | share whose reading ends early (:func:`ends_early`) |
| skipped_lines | lines of the truth | share not found anywhere in what was read; unread images left out |
| invented_lines | lines read | share not found anywhere in the truth, not even in pieces (:func:`is_invented`) |
| wrong_order | images | mean share of pairs of found lines that come in the other order (Kendall's distance) |
| empty_share | images without text | share of which nothing was read, not even a dot; an error is no empty reading |
| invented_characters | images without text | mean number of characters read |
| repetition_stopped, reader_truncated | images with text | share at which the reader says so of itself |

An item carries its classes of failure as ``"failure": [...]``; one with none is not listed. Lines count as a failure
of an image from ``SHARE`` of its lines on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from training.evaluation.contract import (
    READ,
    Evaluator,
    Figure,
    NotMeasured,
    Options,
    Subject,
    TextSample,
    Value,
    Work,
)
from training.evaluation.readings import Reading, SampleSet, read_set
from training.evaluation.sets import measured_sets, spread
from training.evaluation.subjects import REPETITION, TRUNCATED
from training.evaluation.text_suite import limit_of

if TYPE_CHECKING:
    from training.evaluation.picture_sets import HeldOutPictures

READABLE = 7.0  # px of x-height; tesseract's word F1 falls below 0.9 under it (the table of peers)
LINE_WORDS, LINE_CHARACTERS, LINE_MOST = 3, 12, 100
FOUND = 0.65
TWINS = 0.75  # a line as like another stretch of its text says nothing of order: either may be meant
PIECE_WORDS, PIECE_FOUND = 4, 0.8  # of a line that is not found as a whole; shorter stretches are alike by chance
SHARE = 0.1
DISORDER = 0.05  # of the pairs of an image's lines
COVERED, SHORTER = 0.75, 0.85  # of the truth's characters, see `ends_early`
FEWEST_LINES = 5  # of an image for `ends_early`
# Of a loop, in characters. As the reader's RepetitionStopper: at least four copies, a total length, and more of it
# where dots or a rule may be meant. Its lengths are of pieces of up to four characters; these are of characters.
PERIOD, COPIES, LOOP, LEADER = 128, 4, 32, 56
PICTURES, PICTURE_SIDE = 48, 256  # how many, and how large
# Kinds of which some pictures bear lettering, as a look at all of them shows.
LETTERED = ("ambulance", "camera", "fire engine", "hammer", "penguin", "robot", "scissors", "tractor")
SHOWN = 5  # lines of each kind in an item


# ------------------------------------------------------------------------------------------------------ one reading


def flat(text: str) -> str:
    """``text`` in one line and lower case."""
    from training.evaluation.text import comparable

    return comparable(text).lower()


def lines_of(text: str) -> list[str]:
    """The lines of ``text`` that are long enough to be known again, in lower case.

    >>> lines_of("Page 3\\nThe quick brown fox")
    ['the quick brown fox']
    """
    import textwrap

    from training.data.text import normalize_text, words

    pieces = []
    for line in normalize_text(text).lower().split("\n"):
        cut = textwrap.wrap(line, LINE_MOST, break_on_hyphens=False) if len(line) > LINE_MOST else [line]
        pieces += [piece for piece in cut if len(piece) >= LINE_CHARACTERS and len(words(piece)) >= LINE_WORDS]
    return pieces


class Found(NamedTuple):
    """Where a line was found: how alike, and the middle of the stretch, in characters."""

    alike: float
    middle: float


def find(line: str, text: str) -> Found:
    """The stretch of ``text``, as long as ``line``, that is most like it."""
    from rapidfuzz import fuzz

    if len(text) <= len(line):  # rapidfuzz would look for the text in the line
        return Found(fuzz.ratio(line, text) / 100.0, len(text) / 2)
    best = fuzz.partial_ratio_alignment(line, text)
    return Found(best.score / 100.0, (best.dest_start + best.dest_end) / 2)


def loop_of(text: str) -> str:
    """What ``text`` says over and over, one copy of it; ``""`` where it does not.

    A loop is a stretch that repeats itself with a period of at most ``PERIOD`` characters, at least ``COPIES`` times
    and over at least ``LOOP`` characters, ``LEADER`` for periods of one and two (dots, rules). The shortest period
    counts.

    >>> loop_of("it is " + "very well " * 5)
    'very well '
    """
    import numpy as np

    said = np.array([ord(character) for character in flat(text)], dtype=np.int64)
    for period in range(1, min(PERIOD, len(said) // 2) + 1):
        same = np.concatenate([[False], said[period:] == said[:-period], [False]])
        ends = np.flatnonzero(same[1:] != same[:-1])  # begin and end of each stretch, in turn
        if len(ends) == 0:
            continue
        starts, sizes = ends[::2], ends[1::2] - ends[::2] + period
        longest = int(sizes.argmax())
        if sizes[longest] >= max(LEADER if period <= 2 else LOOP, COPIES * period):
            start = int(starts[longest])
            copy = "".join(map(chr, said[start : start + period]))
            if period > 2 and len(set(copy)) == 1:
                continue  # a row of dots has every period; whether it is too long is said by its shortest
            if period > 2 and period % 2 == 0 and copy == copy[:2] * (period // 2):
                continue
            return copy
    return ""


def ends_early(found: Sequence[bool], ends: Sequence[float], read: int, true: int) -> bool:
    """Whether a reading breaks off: the last line of the truth that was found ends before ``COVERED`` of the truth's
    characters, two lines at least are missing behind it, and less than ``SHORTER`` of the truth's length was read.

    Args:
        found: for each line of the truth whether it was found. ends: the share of the truth's lines' characters up to
            the end of each. read, true: lengths in characters.
    """
    if len(found) < FEWEST_LINES or not any(found) or read >= SHORTER * true:
        return False
    last = max(place for place, each in enumerate(found) if each)
    return ends[last] < COVERED and len(found) - 1 - last >= 2


def disorder(middles: Sequence[float]) -> tuple[int, int]:
    """Pairs that come in the other order, and pairs; Kendall's distance.

    >>> disorder([10.0, 30.0, 20.0])
    (1, 3)
    """
    pairs = [(one, other) for place, one in enumerate(middles) for other in middles[place + 1 :]]
    return sum(other < one for one, other in pairs), len(pairs)


@dataclass
class Finding:
    """What is wrong with one reading.

    Attributes:
        text: whether there is a text to read.
        failures: classes, see the module's docstring.
        lines, skipped, predicted, invented: lines of the truth, those of them not found; lines read, those not found.
        order: share of pairs of found lines in the other order; None where there is no pair.
        loop: what is said over and over.
        characters: read, where there is nothing to read.
    """

    text: bool
    failures: list[str] = field(default_factory=list)
    lines: int = 0
    skipped: list[str] = field(default_factory=list)
    predicted: int = 0
    invented: list[str] = field(default_factory=list)
    order: float | None = None
    loop: str = ""
    characters: int = 0


def examine(reading: Reading) -> Finding:
    """All that can be said of one reading without its image."""
    from training.data.text import words

    prediction, truth = flat(reading.prediction), flat(reading.truth)
    if not truth:
        finding = Finding(False, characters=len(prediction))
        finding.failures = ["failed"] * bool(reading.error) + ["invented text"] * bool(prediction)
        return finding
    finding = Finding(True)
    if not words(prediction):
        finding.failures = ["failed" if reading.error else "unread"]
        return finding
    lines, predicted = lines_of(reading.truth), lines_of(reading.prediction)
    places = [find(line, prediction) for line in lines]
    found = [place.alike >= FOUND for place in places]
    finding.lines, finding.predicted = len(lines), len(predicted)
    finding.skipped = [line for line, each in zip(lines, found, strict=True) if not each]
    finding.invented = [line for line in predicted if is_invented(line, truth)]
    known = [place.middle for place, each, sure in zip(places, found, alone(lines), strict=True) if each and sure]
    inverted, pairs = disorder(known)
    finding.order = inverted / pairs if pairs else None
    if (loop := loop_of(prediction)) and not loop_of(truth):
        finding.loop = loop
    ends, total = [], 0
    for line in lines:
        total += len(line)
        ends.append(float(total))
    classes = {
        "repetition": bool(finding.loop),
        "truncated": ends_early(found, [end / total for end in ends], len(prediction), len(truth)),
        "skipped": len(finding.skipped) >= max(1, SHARE * len(lines)),
        "invented": len(finding.invented) >= max(1, SHARE * len(predicted)),
        "wrong order": (finding.order or 0.0) > DISORDER,
    }
    classes |= dict.fromkeys(reading.remarks, True)
    finding.failures = [name for name, each in classes.items() if each]
    return finding


def is_invented(line: str, truth: str) -> bool:
    """Whether neither ``line`` nor half of its pieces stand in ``truth``.

    A line read across two columns stands nowhere as a whole, and was not made up for that.
    """
    if find(line, truth).alike >= FOUND:
        return False
    said = line.split()
    pieces = [" ".join(said[start : start + PIECE_WORDS]) for start in range(0, len(said), PIECE_WORDS)]
    pieces = [piece for piece in pieces if len(piece) >= LINE_CHARACTERS]
    known = sum(find(piece, truth).alike >= PIECE_FOUND for piece in pieces)
    return not pieces or known < 0.5 * len(pieces)


def alone(lines: Sequence[str]) -> list[bool]:
    """For each line whether nothing like it stands elsewhere among them: only then its place is known."""
    rests = [" ".join([*lines[:place], *lines[place + 1 :]]) for place in range(len(lines))]
    return [find(line, rest).alike < TWINS for line, rest in zip(lines, rests, strict=True)]


# ----------------------------------------------------------------------------------------------------------- figures


class _Share(NamedTuple):
    """A figure: the sum of one column of :func:`columns` over that of another."""

    name: str
    part: str
    whole: str
    better: str = "lower"
    unit: str = "share"


FIGURES = (
    _Share("unread", "unread", "texts"),
    _Share("repetition", "repetition", "texts"),
    _Share("truncated", "truncated", "texts"),
    _Share("skipped_lines", "skipped", "lines"),
    _Share("invented_lines", "invented", "predicted"),
    _Share("wrong_order", "order", "ordered"),
    _Share("empty_share", "empty", "text_free", better="higher"),
    _Share("invented_characters", "characters", "text_free", unit=""),
    _Share("repetition_stopped", "stopped", "remarked"),
    _Share("reader_truncated", "limited", "remarked"),
)


def columns(finding: Finding, reading: Reading, remarks: bool) -> dict[str, float]:
    """What one reading adds to sums; ``remarks``: whether its reader makes any."""
    text, failures = finding.text, finding.failures
    return {
        "texts": text,
        "unread": text and ("unread" in failures or "failed" in failures),
        "repetition": bool(finding.loop),
        "truncated": "truncated" in failures,
        "lines": finding.lines,
        "skipped": len(finding.skipped),
        "predicted": finding.predicted,
        "invented": len(finding.invented),
        "ordered": finding.order is not None,
        "order": finding.order or 0.0,
        "text_free": not text,
        "empty": not text and not failures,
        "characters": finding.characters,
        "remarked": remarks and text,
        "stopped": REPETITION in failures,
        "limited": TRUNCATED in failures,
    }


def summarise_census(
    readings: Sequence[Reading], findings: Sequence[Finding], remarks: bool, at: Mapping[str, Value], seed: int = 0
) -> Iterator[Figure]:
    """The figures of ``FIGURES`` that there is something for, each over the images that count in it.

    Args:
        readings, findings: one each an image.
        remarks: whether the reader says itself where it stopped; without, its two figures are left out.
        at: what they were measured at.
        seed: of the bootstrap, over documents.
    """
    import numpy as np

    from training.evaluation.text import pooled

    if not readings:
        return
    rows = [columns(finding, reading, remarks) for finding, reading in zip(findings, readings, strict=True)]
    table = np.array([list(row.values()) for row in rows], dtype=np.float64)
    place = {name: column for column, name in enumerate(rows[0])}
    for share in FIGURES:
        own = table[:, [place[share.part], place[share.whole]]]
        has = np.flatnonzero(own[:, 1] > 0)
        if len(has) == 0:
            continue
        groups = [readings[row].group for row in has]
        value, low, high = pooled(own[has], lambda sums: sums[:, 1:2] / sums[:, 2:3], groups, seed)[:, 0].tolist()
        failed = sum(bool(readings[row].error) for row in has)
        yield Figure(share.name, value, low, high, len(has), failed, share.unit, dict(at), share.better)


# --------------------------------------------------------------------------------------------------------- evaluator


@dataclass
class PicturesWithoutText:
    """Held-out pictures as images on which nothing is to be read, on the backgrounds that the suite image has them on.

    Kinds whose pictures may bear lettering (``LETTERED``) are left out.
    """

    pictures: HeldOutPictures
    name: str = "pictures"

    def fingerprint(self) -> Mapping[str, Any]:
        """See :class:`training.evaluation.sets.TextSet`."""
        return {"pictures": self.pictures.fingerprint, "side": PICTURE_SIDE, "without": list(LETTERED)}

    def samples(self, limit: int | None = None) -> list[TextSample]:
        """As those of a text set, with no text."""
        wanted = [place for place, row in enumerate(self.pictures.rows) if row["concept"] not in LETTERED]
        samples = []
        for index in spread(wanted, limit):
            image, error = None, ""
            try:
                image = self.pictures.picture(index, PICTURE_SIDE)
            except Exception as fault:  # decoders of broken data raise what they like
                error = f"{type(fault).__name__}: {fault}"
            samples.append(TextSample(index, image, "", source=self.pictures.rows[index]["concept"], error=error))
        return samples


@dataclass
class Census(Evaluator):
    """Looks through the readings of all sets.

    Args:
        sets: text set, or one that is made like it, and how many of its items are read, at each x-height.
    """

    sets: Sequence[tuple[SampleSet, int | None]]
    suite = "text"
    name = "failure census"
    needs = frozenset({READ})

    def fingerprint(self) -> Mapping[str, Any]:
        found, missing = [], ""
        for one, limit in self.sets:
            try:
                found.append({"set": dict(one.fingerprint()), "limit": limit})
            except NotMeasured as error:
                missing = missing or str(error)
        if not found:
            raise NotMeasured(missing or "there is no set to look through")
        return {"sets": found}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        remarks = bool(getattr(subject, "makes_remarks", False))
        readings: list[Reading] = []
        findings: list[Finding] = []
        for one, limit in self.sets:
            try:
                read = _legible(one, read_set(subject, one, limit, work))
            except NotMeasured as error:
                work.notes.append(str(error))
                continue
            found = [examine(reading) for reading in read]
            yield from summarise_census(read, found, remarks, {"set": one.name}, work.seed)
            readings += [replace(each, source=f"{one.name}: {each.source or each.index}") for each in read]
            findings += found
            work.items += [
                {"set": one.name, **_item(reading, finding)}
                for reading, finding in zip(read, found, strict=True)
                if finding.failures
            ]
        if not readings:
            raise NotMeasured("no set could be read; see the notes of the sets")
        yield from summarise_census(readings, findings, remarks, {}, work.seed)
        counts: dict[str, int] = {}
        for failure in (failure for finding in findings for failure in finding.failures):
            counts[failure] = counts.get(failure, 0) + 1
        ranked = sorted(counts.items(), key=lambda each: -each[1])
        told = ", ".join(f"{name} {number}" for name, number in ranked) or "none"
        work.notes.append(f"Images by class of failure, of {len(findings)}: {told}.")


def _legible(one: SampleSet, readings: Sequence[Reading]) -> list[Reading]:
    """Those that count, the truth of Markdown without its markup."""
    kept = list(readings)
    if getattr(one, "heights", ()):
        kept = [reading for reading in kept if reading.x_height >= READABLE]
    if getattr(one, "markdown", False):
        from training.evaluation.markdown_measures import read_page

        kept = [replace(reading, truth=read_page(reading.truth).text) for reading in kept]
    return kept


def _item(reading: Reading, finding: Finding) -> dict[str, Any]:
    from training.evaluation.text import word_f1

    item: dict[str, Any] = {"failure": finding.failures, "index": reading.index, "source": reading.source}
    item |= {"x_height": round(reading.x_height, 2), "truth": reading.truth, "prediction": reading.prediction}
    item["word_f1"] = round(word_f1(reading.prediction, reading.truth), 4)
    if finding.loop:
        item["loop"] = finding.loop
    for name, lines in (("skipped", finding.skipped), ("invented", finding.invented)):
        if name in finding.failures:
            item[name] = lines[:SHOWN]
    if "wrong order" in finding.failures:
        item["wrong_order"] = round(finding.order or 0.0, 4)
    return item | ({"error": reading.error} if reading.error else {})


def evaluators(options: Options) -> list[Evaluator]:
    """The census over the sets of the suite text; among the default ones blank paper, and with it pictures without
    text.

    Raises:
        ValueError: ``options.sets`` names a set that nobody knows.
    """
    sets: list[tuple[SampleSet, int | None]] = [(one, limit_of(one.name, options)) for one in measured_sets(options)]
    if "blank" not in [one.name for one, _ in sets]:  # only what is named is read: blank paper and pictures are not
        return [Census(sets)]
    try:
        from training.evaluation.picture_sets import HeldOutPictures

        pictures = PicturesWithoutText(HeldOutPictures(options.pictures))
        sets.append((pictures, PICTURES if options.limit is None else options.limit))
    except NotMeasured:
        pass  # its folder was never made
    return [Census(sets)]
