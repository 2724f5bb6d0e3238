"""The suite text: what a subject reads of each held-out set.

Of a set whose items are there at several x-heights the figures are per x-height. Of another they are over all items
and, where its type is of several sizes, per step of ``STEPS`` too. Markdown sets are read in up to three ways:
``"Markdown prompt"``, where the subject has a prompt for Markdown, shows it the whole page at once; ``"by layout"``,
where its reader knows the page's layout, is what it reads of any page with the structure that the layout shows
(`Page.markdown`), the way in which a model that reads line by line writes Markdown; ``"plain text"`` is the same
reading measured as if it were Markdown: its lines have no headings or tables but those that it happened to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.evaluation.contract import READ, Evaluator, Figure, NeverMeasured, Options, Subject, Value, Work
from training.evaluation.readings import Reading, read_set
from training.evaluation.sets import TextSet, measured_sets

# Items (at each x-height) of a set, where the command line does not say [ours]. unit-tiny takes 0.28 s of one core for
# a block, 1.1 s for a thousand characters of a page and 0.15 s for blank paper [measured]: some 220 s for all of these
# and what the census reads beside them, less on two.
LIMITS = {"blocks": 50, "pages": 5, "syn-l": 8, "syn-s": 16, "md-val": 12}
LIMIT = 40  # of any other set
TEXT_FREE = ("blank",)  # nothing to read there: what is read of it is the census's business
STEPS = (3.0, 4.0, 5.0, 7.0, 10.0, 14.0, 20.0, 28.0)  # x-heights in px; a sample belongs to the nearest by ratio
FEWEST = 5  # samples that a step must have: an interval of fewer says nothing [ours]
WAY_MARKDOWN, WAY_LAYOUT, WAY_PLAIN = "Markdown prompt", "by layout", "plain text"


@dataclass
class TextEvaluator(Evaluator):
    """Reads one set.

    Args:
        text_set: what is read.
        limit: at most so many items, at each x-height where there are several; None for all.
    """

    text_set: TextSet
    limit: int | None = None
    suite = "text"
    needs = frozenset({READ})

    @property
    def name(self) -> str:
        return self.text_set.name

    @property
    def dataset_id(self) -> str | None:
        return self.text_set.hub_id

    def fingerprint(self) -> Mapping[str, Any]:
        return {"set": dict(self.text_set.fingerprint()), "limit": self.limit, "heights": list(self.text_set.heights)}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        ways = [""]
        if self.text_set.markdown:
            ways = [WAY_LAYOUT, WAY_PLAIN] if getattr(subject, "lays_out_markdown", False) else [WAY_PLAIN]
            if getattr(subject, "writes_markdown", False):
                ways = [WAY_MARKDOWN, *ways]
            else:
                work.notes.append(f"{subject.name} has no prompt for Markdown: its plain text is measured as it is.")
        for way in ways:
            readings = read_set(subject, self.text_set, self.limit, work, markdown=way == WAY_MARKDOWN)
            if way == WAY_LAYOUT:
                readings = tuple(replace(reading, prediction=reading.markdown) for reading in readings)
            if not any(reading.truth.strip() for reading in readings):
                raise NeverMeasured(f"{self.name}: none of its {len(readings)} items says what stands on it")
            measure = _Markdown(readings, way) if self.text_set.markdown else _Plain(readings)
            yield from _by_x_height(measure, self.text_set.heights, work)
            work.items += measure.items()
            _remark(readings, f"{subject.name}, {way}" if way else subject.name, work)
        # what a peer has to say of how it reads, once it has read
        work.notes += [note for note in getattr(subject, "notes", ()) if note not in work.notes]


class _Plain:
    """What the figures of text are taken from, each reading measured once."""

    at: Mapping[str, Value] = {}

    def __init__(self, readings: Sequence[Reading]):
        from training.evaluation.text import count, count_order

        self.readings = readings
        self.counts = [count(each.prediction, each.truth) for each in readings]
        self.orders = [count_order(each.prediction, each.truth) for each in readings]

    def figures(self, chosen: Sequence[int], at: Mapping[str, Value], seed: int) -> Iterator[Figure]:
        import numpy as np

        from training.evaluation.text import pooled, summarise

        readings = [self.readings[place] for place in chosen]
        groups, failed = [each.group for each in readings], sum(bool(each.error) for each in readings)
        at = {**self.at, **at}
        for counts in (self.counts, self.orders):
            yield from summarise([counts[place] for place in chosen], seed, groups=groups, failed=failed, at=at)
        seconds = np.array([[each.seconds] for each in readings])
        mean, low, high = pooled(seconds, lambda sums: sums[:, 1:2] / sums[:, :1], groups, seed)[:, 0].tolist()
        yield Figure("seconds_per_item", mean, low, high, len(readings), failed, "s", at, "lower")

    def items(self) -> list[dict[str, Any]]:
        return [self.item(place) for place in range(len(self.readings))]

    def item(self, place: int) -> dict[str, Any]:
        from training.evaluation.text import cer_of, f1_of

        one, counts = self.readings[place], self.counts[place]
        item = {"index": one.index, "source": one.source, "x_height": round(one.x_height, 2), **self.at}
        item |= {"truth": one.truth, "prediction": one.prediction}
        item |= {"word_f1": round(f1_of(counts), 4), "cer": round(cer_of(counts), 4)}
        item |= {"remarks": list(one.remarks)} if one.remarks else {}
        return item | ({"error": one.error} if one.error else {})


class _Markdown(_Plain):
    """The same of the text without its markup, and structure beside it."""

    def __init__(self, readings: Sequence[Reading], way: str):
        from training.evaluation.markdown_measures import count_markdown, read_page

        self.at = {"way": way}
        true = [read_page(each.truth) for each in readings]
        predicted = [read_page(each.prediction) for each in readings]
        self.structures = [count_markdown(one, other) for one, other in zip(predicted, true, strict=True)]
        bare = [replace(each, truth=page.text) for each, page in zip(readings, true, strict=True)]
        if way != WAY_PLAIN:
            bare = [replace(each, prediction=page.text) for each, page in zip(bare, predicted, strict=True)]
        super().__init__(bare)
        self.readings = readings

    def figures(self, chosen: Sequence[int], at: Mapping[str, Value], seed: int) -> Iterator[Figure]:
        from training.evaluation.markdown_measures import summarise_markdown

        yield from super().figures(chosen, at, seed)
        readings = [self.readings[place] for place in chosen]
        yield from summarise_markdown(
            [self.structures[place] for place in chosen],
            seed,
            groups=[each.group for each in readings],
            failed=[bool(each.error) for each in readings],
            at={**self.at, **at},
        )

    def item(self, place: int) -> dict[str, Any]:
        counts = self.structures[place]
        item = super().item(place) | {"markdown_similarity": round(1 - counts.edits / max(1, counts.length), 4)}
        return item | ({"teds": round(counts.teds / counts.tables, 4)} if counts.tables else {})


def _by_x_height(measure: _Plain, heights: Sequence[float], work: Work) -> Iterator[Figure]:
    """At each of ``heights``; without any, over all and at each step that has enough."""
    x_heights = [reading.x_height for reading in measure.readings]
    steps: dict[float, list[int]] = {}
    for place, x_height in enumerate(x_heights):
        if x_height > 0:
            steps.setdefault(nearest(x_height, heights or STEPS), []).append(place)
    if not heights:
        yield from measure.figures(range(len(x_heights)), {}, work.seed)
        steps = {step: places for step, places in steps.items() if len(places) >= FEWEST}
        if len(steps) < 2:
            return
        shown = ", ".join(f"{step:g}" for step in sorted(steps))
        work.notes.append(f"x-heights are as they come, told to the nearest of {shown} px.")
    for step in sorted(steps, reverse=True):
        yield from measure.figures(steps[step], {"x_height": step}, work.seed)


def nearest(x_height: float, steps: Sequence[float]) -> float:
    """The one of ``steps`` that differs from ``x_height`` by the smallest ratio."""
    return min(steps, key=lambda step: max(step / x_height, x_height / step))


def _remark(readings: Sequence[Reading], who: str, work: Work) -> None:
    failed = [reading.error for reading in readings if reading.error]
    if failed:
        number = f"{len(failed)} of {len(readings)} images"
        work.notes.append(f"{who} failed on {number}; they count as read empty. The first: {failed[0]}")


def limit_of(name: str, options: Options) -> int:
    """How many items of a set are read, at each x-height where it has several."""
    return options.limit if options.limit is not None else LIMITS.get(name, LIMIT)


def evaluators(options: Options) -> list[Evaluator]:
    """One for each set that there is a text in.

    Raises:
        ValueError: ``options.sets`` names a set that nobody knows.
    """
    sets = [one for one in measured_sets(options) if one.name not in TEXT_FREE]
    return [TextEvaluator(one, limit_of(one.name, options)) for one in sets]
