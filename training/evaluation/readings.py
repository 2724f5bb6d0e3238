"""What a subject reads of a set, read once: the figures of reading and the census of failures look at the same texts.

Readings are kept in memory while the command runs and, where the evaluation has a cache, there too: by the hash of the
subject, of the set and of the code that reads, so that a new measure does not read anything anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from training.evaluation.cache import BESIDE, Entry, hash_of, key_of, versions_that_decide
from training.evaluation.contract import NotMeasured, Subject, TextSample, Work, sorted_batches
from training.evaluation.report import processor
from training.evaluation.subjects import ReadText

LARGE = 512 * 512  # pixels; of larger images a quarter of a batch at once, so that the progress bar moves [ours]


@dataclass(frozen=True)
class Reading:
    """One image as it was read.

    Attributes:
        index, source, x_height, truth: of the sample, see :class:`~training.evaluation.contract.TextSample`.
        prediction: what was read; ``""`` where the subject failed.
        seconds: spent on it; an even share where a batch was read at once.
        error: why it failed, on one line; ``""`` where it did not.
        remarks: what the reader itself says of it, see :class:`~training.evaluation.subjects.ReadText`.
        markdown: what the reader makes of text and layout, likewise; ``""`` where it makes nothing of them.
    """

    index: int
    source: str
    x_height: float
    truth: str
    prediction: str
    seconds: float = 0.0
    error: str = ""
    remarks: tuple[str, ...] = ()
    markdown: str = ""

    @property
    def group(self) -> str | int:
        """What stands and falls together in a bootstrap."""
        return self.source or self.index


class SampleSet(Protocol):
    """What of a :class:`training.evaluation.sets.TextSet` is needed to read it."""

    name: str

    def fingerprint(self) -> Mapping[str, Any]: ...
    def samples(self, limit: int | None = None) -> list[TextSample]: ...


_kept: WeakKeyDictionary[Any, dict[str, tuple[Reading, ...]]] = WeakKeyDictionary()  # by subject, then by key


def read_set(
    subject: Subject, text_set: SampleSet, limit: int | None, work: Work, *, markdown: bool = False
) -> tuple[Reading, ...]:
    """The readings of at most ``limit`` items of a set, in its order.

    Args:
        markdown: ask for Markdown, not for plain text.

    A batch at which the subject raises is read again item by item; what fails alone counts as failed and as read
    empty, and so does an image that cannot be decoded.

    Raises:
        NotMeasured: the set is not there or has no label, or the subject cannot read at all.
    """
    told = {
        "readings": dict(text_set.fingerprint()),
        "limit": limit,
        "subject": subject.hash(),
        "device": subject.device,
        "markdown": markdown,
        "batch_size": work.batch_size,
        "code": _hash_of_reading_code(),
        "versions": versions_that_decide(),
        "processor": processor(subject.device),  # seconds are this machine's
    }
    key = key_of(told)
    try:
        kept = _kept.setdefault(subject, {})
    except TypeError:  # a subject that cannot be a key is asked again
        kept = {}
    if key not in kept and work.cache is not None and (entry := work.cache.get(key)) is not None:
        kept[key] = tuple(Reading(**{**item, "remarks": tuple(item["remarks"])}) for item in entry.items)
    if key not in kept:
        found: tuple[Reading, ...] = ()
        # part by part where the set has parts, so that the images of a large one are not all in memory at once
        parts = text_set.parts(limit) if hasattr(text_set, "parts") else [text_set.samples(limit)]
        for part in parts:
            samples = [replace(sample, markdown=markdown) for sample in part]
            found += read_samples(subject, samples, work, f"{subject.name} reads {text_set.name}")
        if not found:
            raise NotMeasured(f"{text_set.name}: there is no item to read")
        kept[key] = found
        # what a peer could not read today it may read when it is whole again
        if work.cache is not None and not any(item.error for item in found):
            with suppress(OSError):  # a cache that cannot be written costs time, not figures
                work.cache.put(key, Entry([], [asdict(item) for item in found]), told)
    return kept[key]


def read_samples(subject: Subject, samples: Sequence[TextSample], work: Work, what: str) -> tuple[Reading, ...]:
    """Read ``samples`` in batches of like size, the largest first; readings in the order of ``samples``."""
    found: dict[int, ReadText] = {}

    def read(places: Sequence[int]) -> None:
        batch = [samples[place] for place in places]
        if hasattr(subject, "readings"):
            texts = subject.readings(batch)
        else:
            start = time.perf_counter()
            read = subject.read(batch)
            seconds = (time.perf_counter() - start) / len(batch)
            texts = [ReadText(text, seconds) for text in read]
        if len(texts) != len(batch):
            raise ValueError(f"{subject.name} returned {len(texts)} texts for {len(batch)} images")
        found.update(zip(places, texts, strict=True))

    def read_alone(place: int) -> None:
        start = time.perf_counter()
        try:
            read([place])
        except NotMeasured:
            raise
        except Exception as error:
            found[place] = ReadText("", time.perf_counter() - start, f"{type(error).__name__}: {error}")

    whole = []
    for place, sample in enumerate(samples):
        if sample.image is None:
            found[place] = ReadText("", error=sample.error or "the image cannot be decoded")
        else:
            whole.append(place)
    bar = work.bar(len(samples), what, "image")
    bar.update(len(samples) - len(whole))
    try:
        for members in _batches([samples[place].image.size for place in whole], work.batch_size):
            places = [whole[member] for member in members]
            try:
                read(places)
            except NotMeasured:
                raise
            except Exception:  # whatever the subject raises: one image is wrong, the others go on
                for place in places:
                    read_alone(place)
            bar.update(len(places))
    finally:
        bar.close()
    return tuple(_reading(sample, found[place]) for place, sample in enumerate(samples))


def _reading(sample: TextSample, found: ReadText) -> Reading:
    error = " ".join(found.error.split())
    prediction = "" if error else found.text
    remarks = tuple(getattr(found, "remarks", ()))  # a peer makes none
    markdown = "" if error else getattr(found, "markdown", "")
    where = (sample.index, sample.source, float(sample.x_height))
    return Reading(*where, sample.text, prediction, round(found.seconds, 4), error, remarks, markdown)


def _batches(sizes: Sequence[tuple[int, int]], size: int) -> Iterable[list[int]]:
    """:func:`sorted_batches`, those of large images in quarters."""
    for batch in sorted_batches(sizes, size, area=lambda each: each):
        width, height = sizes[batch[0]]
        step = max(1, size // 4) if width * height > LARGE else size
        for start in range(0, len(batch), step):
            yield batch[start : start + step]


@lru_cache(maxsize=1)
def _hash_of_reading_code() -> str:
    """Of what decides an image, its truth and its reading; how that is measured does not."""
    here = Path(__file__).parent
    models = (here.parent.parent / "modeling_unit").glob("*.py")
    peers = (here / "peers").rglob("*.py")
    samples = [here / name for name in ("subjects.py", "readings.py", "sets.py", "picture_sets.py", "image.py")]
    return hash_of([*sorted(models), *sorted(peers), *samples, *(here.parent / name for name in BESIDE)])
