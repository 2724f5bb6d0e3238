"""What an evaluation is made of: subjects are measured, evaluators measure, figures come out.

    for figure in evaluator.figures(subject, Work()):
        print(figure.name, figure.value, figure.low, figure.high)

A *subject* is a checkpoint or a peer, known by its hash. An *evaluator* measures one thing on one set and owns all
preprocessing; it yields *figures*, each with its interval. What `unit evaluate` runs, caches, tables and plots is
nothing but this. An evaluator never imports torch before `figures` is called: a run whose figures are all in the
cache must not pay for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

# What a subject can do; an evaluator names what it needs.
READ = "read"  # images -> texts
ENCODE = "encode"  # images -> tokens
NAME = "name"  # images -> embeddings in the space of a text encoder
DESCRIBE = "describe"  # images -> captions

SUITES = ("text", "image", "scale", "cost", "retention")

Value = float | int | str
At = Mapping[str, Value]


class NotMeasured(Exception):
    """An evaluator cannot measure this subject: the data is not there, a label is missing, a peer is not installed.

    The message is one line that says what is wrong and what to do; it becomes a note of the report and the rest of
    the evaluation goes on.
    """


class NeverMeasured(NotMeasured):
    """Weights, data and settings alone decide that there is nothing to measure: it would be the same the next time.

    Kept as figures are, so that a run that is known does not load the weights to find it out again.
    """


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        name: such as ``"word_f1"``; lower case, the same wherever the same thing is measured.
        value: in ``unit``.
        low, high: ends of the 95% interval, bootstrapped over items (or groups of items that stand and fall together);
            None for what is exact, such as a number of parameters.
        items: how many items it was taken over, failed ones included; 0 where there are none.
        failed: at how many of them the subject raised an error; they count as wrong, never as absent.
        unit: ``"share"`` (of 1), ``"s"``, ``"ms"``, ``"MB"``, ``"GFLOP"``, ``""`` for a plain number.
        at: what it was measured at: ``{"x_height": 7}``, ``{"resolution": 256}``, ``{"feature": "class token"}``.
            A number is a place on an axis and is plotted; a text tells variants apart.
        better: ``"higher"``, ``"lower"``, or ``""`` where neither is better.
        of: role of the subject whose figure it is, where that is another than the one measured, such as the start
            that was timed in turns with it; ``""`` else.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    items: int = 0
    failed: int = 0
    unit: str = "share"
    at: At = field(default_factory=dict)
    better: str = "higher"
    of: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"at": dict(self.at)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figure:
        """What :meth:`to_dict` gave; keys of the report that are not a figure's are left aside."""
        return cls(**{key: data[key] for key in cls.__dataclass_fields__ if key in data})


class Subject(Protocol):
    """A checkpoint or a peer. Weights are loaded by the first call that needs them, and kept until :meth:`release`.

    Attributes:
        name: as the report calls it: ``"UNIT"``, ``"teacher"``, ``"stage 1"``, ``"tesseract, upscaled"``.
        role: ``"model"``, ``"teacher"``, ``"start"``, ``"stage"`` or ``"peer"``.
        path: folder or Hub id; what a command line would name.
        can: which of READ, ENCODE, NAME, DESCRIBE; known without loading weights.
        device: ``"cpu"`` or ``"cuda"``.
    """

    name: str
    role: str
    path: str
    can: frozenset[str]
    device: str

    def hash(self) -> str:
        """Hex digest of all that decides what it answers: weights and settings, or a program and its version."""

    def read(self, samples: Sequence[TextSample]) -> list[str]:
        """READ: the texts of samples, in order."""

    def encoder(self) -> Any:
        """ENCODE, NAME: a :class:`~training.evaluation.subjects.PictureEncoder`."""

    def describe(self, images: Sequence[Any]) -> list[str]:
        """DESCRIBE: a caption of each image, in order."""

    def release(self) -> None:
        """Let go of weights and processes."""


@dataclass(frozen=True)
class TextSample:
    """One image to be read, and what stands there.

    Attributes:
        index: its place in the set.
        image: RGB PIL image; None where the file cannot be read, which counts as a failed item.
        text: the truth, a line feed between lines; ``""`` where there is nothing to read.
        x_height: median height of a lower-case x in pixels of ``image``; 0 where unknown.
        source: where it comes from; also the group that stands and falls together in a bootstrap.
        markdown: whether ``text`` is Markdown.
        error: why ``image`` is None; ``""`` otherwise.
        layout: ``"block"``, text of one column and nothing else, or ``"page"``, whose parts a reader has to find.
    """

    index: int
    image: Any
    text: str
    x_height: float = 0.0
    source: str = ""
    markdown: bool = False
    error: str = ""
    layout: str = "block"


class Progress(Protocol):
    """What a progress bar must be able to do (tqdm can)."""

    def update(self, n: int = 1) -> Any: ...
    def close(self) -> None: ...


@dataclass
class Work:
    """What an evaluator is handed beside the subject, and where it leaves what is not a figure.

    Attributes:
        batch_size: of reading and of encoding.
        progress: show progress bars on standard error.
        seed: of bootstraps and of whatever else is drawn.
        subjects: every subject of this evaluation by role, for what is measured against the teacher or the start.
        items: one plain dict per item, for whoever wants to look: written to ``items/*.jsonl``, and cached.
        notes: lines for the report.
        cache: a :class:`training.evaluation.cache.Cache` with what earlier runs read; None to read everything anew.
    """

    batch_size: int = 16
    progress: bool = True
    seed: int = 0
    subjects: Mapping[str, Subject] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cache: Any = None

    def bar(self, total: int, what: str, unit: str = "item") -> Progress:
        """A progress bar of ``total`` items called ``what``, gone when it is done; none where nobody watches."""
        from tqdm import tqdm

        hidden = None if self.progress else True  # None: tqdm shows it in a terminal and not in a file
        return tqdm(total=total, desc=what, unit=f" {unit}", disable=hidden, leave=False, mininterval=0.5)


@dataclass(frozen=True)
class Options:
    """What the command line decides for all evaluators; each takes what concerns it.

    Attributes:
        limit: at most so many items of a set, spread evenly over it; None for each evaluator's own number.
        blocks, pages, pictures: folders of held-out data; None where `unit data` puts them.
        sets: further text sets, by name or as ``name=folder``.
        imagenet: folder or Hub id of a labelled picture set.
        segmentation: folder or Hub id of a segmentation set.
        text_tower: folder or Hub id of the text encoder that names classes; None for the model's own.
        peers: names of other readers.
        resolutions: sides in pixels at which pictures are measured; None for multiples of the model's own.
        chunks: folder of held-out chunks of a few lines; None where `unit data` puts them.
    """

    limit: int | None = None
    blocks: Path | None = None
    pages: Path | None = None
    pictures: Path | None = None
    sets: tuple[str, ...] = ()
    imagenet: str | None = None
    segmentation: str | None = None
    text_tower: str | None = None
    peers: tuple[str, ...] = ()
    resolutions: tuple[int, ...] | None = None
    chunks: Path | None = None


class Evaluator(ABC):
    """Measures one thing on one set.

    Attributes:
        suite: one of ``SUITES``.
        name: unique within the suite; the report's heading, such as ``"blocks"`` or ``"FUNSD"``.
        needs: what a subject must be able to do; others are passed over with a note.
        roles: whom it measures, None for all that can.
        against: role of another subject whose hash decides the figures too: ``"teacher"`` for retention, None else.
        beside: the same of a subject that need not be there.
        dataset_id: Hub id of the set, where it is one of the Hub's as it is published there, such as
            ``"nielsr/funsd"``; None for sets of ours and for strangers' folders. What the Hub's own format of
            evaluation results is written from.
    """

    suite: ClassVar[str]
    name: str
    needs: ClassVar[frozenset[str]] = frozenset()
    roles: ClassVar[frozenset[str] | None] = None
    against: ClassVar[str | None] = None
    beside: ClassVar[str | None] = None
    dataset_id: str | None = None

    @abstractmethod
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON data: hash of the set, and every setting that decides a figure. Cheap, and without torch.

        Raises:
            NotMeasured: the set is not there, or is not what it should be.
        """

    def check(self) -> None:  # noqa: B027  most have nothing more to look at
        """What the fingerprint is too cheap to look at; called before anything is measured, where something is.

        Raises:
            NotMeasured: the set has no labels, a model cannot be used.
        """

    @abstractmethod
    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        """Measure. Items go to ``work.items``, remarks to ``work.notes``.

        Raises:
            NotMeasured: this subject cannot be measured on this set.
        """


def sorted_batches(samples: Sequence[Any], size: int, area=lambda sample: sample.image.size) -> Iterable[list[int]]:
    """Indices of ``samples`` in batches of at most ``size``, alike in size together, the largest first.

    Largest first, so that a batch that does not fit in memory fails at once, and the last seconds are quick.

    Args:
        area: sample -> (width, height) in pixels.
    """

    def key(index: int):
        width, height = area(samples[index])
        return -width * height, index

    order = sorted(range(len(samples)), key=key)
    return [order[start : start + size] for start in range(0, len(order), size)]
