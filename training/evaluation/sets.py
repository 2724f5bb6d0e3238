"""The sets of text on which reading is measured: all held out, each by name.

    for text_set in default_sets(Options()):
        for sample in text_set.samples(limit=8):
            print(text_set.name, sample.x_height, sample.image.size, sample.text[:40])

`unit data evaluation-sets` builds them into the cache; nothing here fetches or draws anything, so that evaluating
needs neither network nor time for it. A set whose rows were made at several x-heights (``heights``) holds the same
items at each of them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from training.data.schema import REQUIRED
from training.data.sources import data_folder

from .cache import hash_of
from .contract import NotMeasured, Options, TextSample

BUILD = "unit data evaluation-sets"
# name -> folders in the cache. Those that are measured unless something else is said.
DEFAULT_SETS = {
    "blocks": ("evaluation-blocks",),
    "pages": ("evaluation-pages",),
    "syn-l": ("evaluation-syn-l",),
    "syn-s": ("evaluation-syn-s",),
    "md-val": ("markdown-made-validation", "markdown-pdf-validation"),
    "scans": ("evaluation-scans",),
    "scan-blocks": ("evaluation-scan-blocks",),
    "blank": ("evaluation-blank",),
}
DEFAULT = "default"  # among the sets that are named: all of DEFAULT_SETS too
# From the Hub or a folder, when they are named.
NAMED_SETS = {name: (f"evaluation-{name}",) for name in ("funsd", "sroie", "cord")}
_PAGE_OF = re.compile(r"(?i)(.+\.(?:pdf|md|markdown|tiff?))#")
BUILD_MARKDOWN = "unit data make-markdown --split validation"
PART = 1 << 27  # pixels of images that are in memory at once, 400 MB; the default suite's sets are one part [ours]


@dataclass(frozen=True)
class TextSet:
    """Held-out images with what stands on them: folders of parquet shards of the schema of ``training/data``, or one
    folder in a layout of ``training.data.labelled``.

    Attributes:
        name: as the report calls it.
        folders: where it is.
        markdown: whether the truth is Markdown.
        build: the command that builds it.
    """

    name: str
    folders: tuple[Path, ...]
    markdown: bool = False
    build: str = BUILD

    @property
    def heights(self) -> tuple[float, ...]:
        """x-heights in pixels at which every item is there, the largest first; () where sizes are as they come.

        Read from ``report.json``, so () also where the set is not there.
        """
        found: list[float] = []
        for folder in self.folders:
            try:
                settings = json.loads((folder / "report.json").read_text(encoding="utf-8"))["settings"]
                found += [float(height) for height in settings["heights"]]
            except (OSError, ValueError, KeyError, TypeError):
                return ()
        return tuple(sorted(set(found), reverse=True))

    @property
    def hub_id(self) -> str | None:
        """Of a set that was taken from the Hub, its id there; read from ``report.json``."""
        from .hub_results import hub_id

        try:
            (folder,) = self.folders
            source = json.loads((folder / "report.json").read_text(encoding="utf-8"))["settings"]["source"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return hub_id(source) if isinstance(source, str) else None

    def fingerprint(self) -> Mapping[str, Any]:
        """Name, kind of truth and hash of the shards.

        Raises:
            NotMeasured: the set is not there; the line says what builds it.
        """
        if self._as_published():
            return {"set": self.name, "markdown": False, "data": hash_of(self.folders[0])}
        return {"set": self.name, "markdown": self.markdown, "data": hash_of(self._shards())}

    @property
    def layout(self) -> str:
        """As :class:`TextSample` has it: all but the blocks are pages, receipts and forms among them."""
        return "block" if self.name == "blocks" else "page"

    def samples(self, limit: int | None = None) -> list[TextSample]:
        """The items, in the order of the files; the same call gives the same items.

        Args:
            limit: at most so many, spread evenly over the set; of a set with ``heights`` so many at each, and the same
                items at each. None for all.

        A file that cannot be decoded is a sample too: its ``image`` is None and ``error`` says why, for it counts as
        read wrong.

        Raises:
            ValueError: ``limit`` is below 1.
            NotMeasured: the set is not there or has no row to read.
        """
        return [sample for part in self.parts(limit) for sample in part]

    def parts(self, limit: int | None = None, pixels: int = PART) -> Iterator[list[TextSample]]:
        """The same samples, so many at a time that their images have some ``pixels`` together: a decoded page is many
        times its file."""
        part: list[TextSample] = []
        held = 0
        for index, row in self._rows(limit):
            part.append(sample := _sample(index, row, self.markdown, self.layout))
            held += sample.image.width * sample.image.height if sample.image is not None else 0
            if held >= pixels:
                yield part
                part, held = [], 0
        if part:
            yield part

    def _rows(self, limit: int | None) -> Iterable[tuple[int, dict[str, Any]]]:
        """Index and row of each item."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if self._as_published():
            return enumerate(self._published_rows(limit))
        rows = self._places()
        heights = self.heights
        groups: dict[float, list[int]] = {}
        for index, place in enumerate(rows):
            groups.setdefault(place.x_height if heights else 0.0, []).append(index)
        return _read(rows, sorted(index for group in groups.values() for index in spread(group, limit)))

    def _as_published(self) -> bool:
        """Whether the folder is in a layout of ``training.data.labelled`` rather than in our schema."""
        if len(self.folders) > 1 or not self.folders[0].is_dir():
            return False
        shards = sorted(self.folders[0].rglob("*.parquet"))
        if not shards:
            return True
        import pyarrow.parquet as pq

        return not set(REQUIRED) <= set(pq.read_schema(shards[0]).names)

    def _published_rows(self, limit: int | None) -> list[dict[str, Any]]:
        from training.data.labelled import MAX_REFUSED, rows_of_folder
        from training.data.refusals import Refusals

        refusals = Refusals(MAX_REFUSED)
        try:
            rows = list(rows_of_folder(self.folders[0], refusals, self.name, limit))
            refusals.check()
        except (ValueError, OSError) as error:
            raise NotMeasured(f"{self.name}: {error}") from error
        if not rows:
            raise NotMeasured(f"{self.name}: {self.folders[0]} gave no page to read. {refusals}".strip())
        return spread(rows, limit)

    def _shards(self) -> list[Path]:
        shards = []
        for folder in self.folders:
            found = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
            if not found:
                raise NotMeasured(f"{self.name}: no data set in {folder}; `{self.build}` builds it")
            shards += found
        return shards

    def _places(self) -> list[_Place]:
        import pyarrow.parquet as pq

        task, places = "markdown" if self.markdown else "ocr", []
        for shard in self._shards():
            file = pq.ParquetFile(shard)
            missing = [name for name in REQUIRED if name not in file.schema_arrow.names]
            if missing:
                raise NotMeasured(
                    f"{self.name}: {shard} has no column {missing[0]!r}; is it a set that `{BUILD}` made?"
                )
            columns = [name for name in ("task", "kind", "split", "x_height") if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                for row, item in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                    # rows of the training split are never evaluated
                    if item["task"] == task and item["kind"] == "document" and item["split"] == "validation":
                        places.append(_Place(shard, group, row, round(float(item.get("x_height") or 0.0), 3)))
        if not places:
            raise NotMeasured(
                f"{self.name}: no row in {', '.join(map(str, self.folders))} is a document of the split 'validation' "
                f"with the task {task!r}"
            )
        return places


@dataclass(frozen=True)
class _Place:
    shard: Path
    group: int
    row: int
    x_height: float


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` of ``items``, evenly spaced, the first among them; all for None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[len(items) * step // limit] for step in range(limit)]


def _read(places: Sequence[_Place], wanted: Iterable[int]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Index and row of the wanted places, one row group at a time."""
    import pyarrow.parquet as pq

    opened, rows = None, None
    for index in wanted:
        place = places[index]
        if opened != (place.shard, place.group):
            file = pq.ParquetFile(place.shard)
            columns = [name for name in ("image", "text", "source", "x_height") if name in file.schema_arrow.names]
            opened, rows = (place.shard, place.group), file.read_row_group(place.group, columns=columns)
        yield index, rows.slice(place.row, 1).to_pylist()[0]


def _sample(index: int, row: Mapping[str, Any], markdown: bool, layout: str) -> TextSample:
    from modeling_unit.image_processing_unit import to_rgb

    image, error = None, ""
    try:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            image = to_rgb(picture)
    except Exception as fault:  # decoders of broken data raise what they like
        error = f"{type(fault).__name__}: {fault}"
    x_height, source = float(row.get("x_height") or 0.0), group_of(row["source"])
    return TextSample(index, image, row["text"], x_height, source, markdown, error, layout)


def group_of(source: str) -> str:
    """The document that a row's source names: ``package/a.pdf#12`` and ``package/a.pdf#13`` are of one document."""
    found = _PAGE_OF.match(source)
    return found[1] if found else source


def default_sets(options: Options) -> list[TextSet]:
    """The sets that are measured by default, then those that ``options.sets`` names.

    ``options.blocks`` and ``options.pages`` are folders that take the place of those two; ``name=folder`` in
    ``options.sets`` takes the place of the set of that name.

    Raises:
        ValueError: ``options.sets`` names a set that nobody knows.
    """
    sets = []
    for name, folders in DEFAULT_SETS.items():
        given = {"blocks": options.blocks, "pages": options.pages}.get(name)
        if given is not None:
            sets.append(TextSet(name, (Path(given),)))
        else:
            sets.append(_known(name, folders))
    for entry in options.sets:
        if entry == DEFAULT:
            continue
        named = named_set(entry)
        sets = [named if one.name == named.name else one for one in sets]
        if named not in sets:
            sets.append(named)
    return sets


def measured_sets(options: Options) -> list[TextSet]:
    """What the suite text reads: the sets that ``options.blocks``, ``options.pages`` and ``options.sets`` name, and
    nothing else; the default ones where none is named, and with them where ``"default"`` is among ``options.sets``.

    Raises:
        ValueError: as :func:`default_sets`.
    """
    sets = default_sets(options)
    named = {"blocks"} if options.blocks is not None else set()
    named |= {"pages"} if options.pages is not None else set()
    named |= {entry.partition("=")[0] for entry in options.sets}
    if not named or DEFAULT in named:
        return sets
    return [one for one in sets if one.name in named]


def _known(name: str, folders: Sequence[str]) -> TextSet:
    markdown = name == "md-val"
    build = BUILD_MARKDOWN if markdown else f"{BUILD} {name}"
    return TextSet(name, tuple(map(data_folder, folders)), markdown, build)


def named_set(entry: str) -> TextSet:
    """A set by name, or one in a folder as ``name=folder``.

    Raises:
        ValueError: it is neither.
    """
    name, _, folder = entry.partition("=")
    known = {**DEFAULT_SETS, **NAMED_SETS}
    if folder and name:
        return TextSet(name, (Path(folder).expanduser(),), build=f"{BUILD} {entry}")
    if entry in known:
        return _known(entry, known[entry])
    listed = ", ".join([*known, DEFAULT])
    raise ValueError(f"there is no text set called {entry!r}: name one of {listed}, or say name=folder")
