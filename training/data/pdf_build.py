"""Users' PDFs -> a data set of whole pages, blocks, lines or chunks, with a report: what `unit data from-pdfs` runs.

Documents are opened, read and rendered in worker processes (`guarded`): one that crashes its worker, hangs or takes
too much memory is refused like one that is damaged, and the run goes on.
"""

from __future__ import annotations

import json
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2 as pdfium

from . import pdf_pages
from .guarded import Failure, run_guarded, why
from .pdf import (
    BLOCK_X_HEIGHT,
    CUT_PAGE_X_HEIGHT,
    MAX_UNMAPPED,
    PAGE_X_HEIGHT,
    Cutout,
    chunks_of_page,
    first_rows,
)
from .pdf_pages import PageRefused
from .pdf_sources import Document, find_documents, open_documents
from .refusals import MAX_SHARE, Refusals
from .schema import make_row, write_shards

UNITS = ("page", "block", "line", "chunk")
X_HEIGHTS = {  # px, drawn per page
    "page": pdf_pages.PAGE_X_HEIGHT,
    "block": BLOCK_X_HEIGHT,
    "line": CUT_PAGE_X_HEIGHT,
    "chunk": PAGE_X_HEIGHT,
}
ROWS_PER_SHARD = {"page": 500, "block": 5000, "line": 5000, "chunk": 5000}
PAGES_PER_TASK = 8
DOCUMENT_SECONDS = 30.0  # to open a document and be ready for its pages. Ours
PAGE_SECONDS = 15.0  # for each page, on average over a task. Ours
# Reasons that say that something is wrong with a page and count towards the share that stops a run; the others only
# say that it is not what was asked for.
FAULTS = ("cannot be loaded", "size", "too many characters", "text layer", "text not on ink")


@dataclass(frozen=True)
class PageSettings:
    """How pages become rows. ``joined`` and ``furniture`` are those of `pdf_pages.page_cutout`."""

    unit: str = "page"
    x_height: tuple[float, float] = X_HEIGHTS["page"]
    joined: bool = False
    furniture: bool = True
    english: bool = True
    max_unmapped: float = MAX_UNMAPPED
    seed: int = 0
    split: str = "train"
    license: str | None = None

    def check(self) -> None:
        """Raise a ValueError for what cannot be meant."""
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, not {self.unit!r}")
        low, high = self.x_height
        if not 2.0 <= low <= high <= 100.0:
            raise ValueError(f"the x-height must lie between 2 and 100 px, got {low:g} to {high:g}")
        if self.unit == "chunk" and not (self.english and self.furniture and not self.joined):
            raise ValueError("chunks are printed lines of English text: choose the unit page or block")
        if self.unit == "line" and (self.joined or not self.furniture):
            raise ValueError("lines are all printed lines of a page, each by itself: choose the unit page or block")


@dataclass(frozen=True)
class PageTask:
    """A few pages of one document, the unit of work."""

    document: Document
    pages: tuple[int, ...]


@dataclass
class BuildReport:
    """What a build did.

    ``left_out`` counts what was passed over by choice (another language, a block that touches its neighbours);
    ``refused`` what is broken, by source and reason.
    """

    rows: int = 0
    documents: int = 0
    copies: int = 0  # documents left out because another one has the same bytes
    pages: int = 0  # looked at
    pages_used: int = 0  # with at least one row
    seconds: float = 0.0
    page_seconds: float = 0.0  # summed over workers
    left_out: Counter = field(default_factory=Counter)
    refused: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, **settings: Any) -> None:
        """Write ``report.json`` beside the shards."""
        content = {"settings": settings, **vars(self), "left_out": dict(self.left_out.most_common())}
        (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows from {self.pages_used} of {self.pages} pages of {self.documents} documents in "
            f"{self.seconds:.0f} s ({1000 * self.page_seconds / max(self.pages, 1):.1f} ms a page, "
            f"{1000 * self.page_seconds / max(self.rows, 1):.1f} ms a row, of one core)"
        ]
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{why} {count}" for why, count in self.left_out.most_common(12)))
        for kind, sources in self.refused.items():
            for source, counts in sources.items():
                reasons = ", ".join(f"{reason} {each['count']}" for reason, each in counts["reasons"].items())
                lines.append(
                    f"{source}: {counts['refused']} of {counts['accepted'] + counts['refused']} {kind} refused"
                    + (f": {reasons}" if reasons else "")
                )
        return "\n".join(lines)


def build_from_pdfs(
    sources: list[str],
    out: str | Path,
    settings: PageSettings,
    *,
    max_pages: int | None = None,
    pages_per_pdf: int | None = None,
    max_rows: int | None = None,
    max_refused: float = MAX_SHARE,
    source_name: str | None = None,
    unwanted: Callable[[str], bool] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> BuildReport:
    """Build a data set from PDFs: shards and ``report.json`` in ``out``.

    Args:
        sources: as for `pdf_sources.find_documents`.
        out: the folder; what was in it stays until the build is done.
        settings: how pages become rows. The same settings give the same rows, whatever ``workers`` is.
        max_pages: look at so many pages, drawn by the seed.
        pages_per_pdf: at most so many pages of a document, drawn by the seed.
        max_rows: stop after so many rows.
        max_refused: the share of documents, and of pages, of a source that may be broken (`Refusals`).
        source_name: what rows are said to come from instead of the name of the file, folder or package.
        unwanted: texts to leave out, e.g. those that the validation data holds.
        workers: processes.
        progress: show bars.

    Raises:
        ValueError: bad settings, a source that is none, no PDF that can be used, or too much refused; nothing is
            written.
        RuntimeError: a Debian package cannot be fetched.
        OSError: the disk is full.
    """
    settings.check()
    if settings.unit == "line":
        from . import line_cuts  # noqa: F401  loads torch: once, before the workers are forked
    begin = time.perf_counter()
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    report = BuildReport()
    broken = {"documents": Refusals(max_refused), "pages": Refusals(max_refused)}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-pdfs-", dir=out.parent) as staging:
        found = find_documents(sources, Path(staging), broken["documents"], source_name=source_name)
        documents, report.copies = open_documents(found, broken["documents"], workers=workers, progress=progress)
        tasks = _plan(documents, settings.seed, max_pages, pages_per_pdf)
        rows = _rows(tasks, settings, unwanted, workers, report, broken["pages"], progress)
        if max_rows is not None:
            rows = first_rows(rows, max_rows)
        first = next(rows, None)
        if first is None:
            counts = ", ".join(f"{reason} {count}" for reason, count in report.left_out.most_common(5))
            raise ValueError(
                f"none of the {report.pages} pages gave a row"
                + (f"; left out: {counts}" if counts else "")
                + (f"; {broken['pages']}" if broken["pages"].refused else "")
            )
        report.rows = write_shards(chain([first], rows), out, ROWS_PER_SHARD[settings.unit])
    report.seconds = time.perf_counter() - begin
    report.refused = {kind: refusals.as_dict() for kind, refusals in broken.items()}
    report.save(
        out,
        sources=sources,
        **asdict(settings),
        max_pages=max_pages,
        pages_per_pdf=pages_per_pdf,
        max_rows=max_rows,
        max_refused=max_refused,
        source_name=source_name,
        held_out_texts_left_out=unwanted is not None,
    )
    return report


def _plan(documents: list[Document], seed: int, max_pages: int | None, pages_per_pdf: int | None) -> list[PageTask]:
    """Pages of all documents in tasks, shuffled by the seed; pages within a task in their order."""
    tasks = []
    for document in documents:
        pages = np.arange(document.pages)
        if pages_per_pdf is not None and pages_per_pdf < document.pages:
            rng = np.random.default_rng([seed, zlib.crc32(document.name.encode())])
            pages = np.sort(rng.permutation(document.pages)[:pages_per_pdf])
        for at in range(0, len(pages), PAGES_PER_TASK):
            tasks.append(PageTask(document, tuple(pages[at : at + PAGES_PER_TASK].tolist())))
    tasks = [tasks[index] for index in np.random.default_rng(seed).permutation(len(tasks))]
    if max_pages is None:
        return tasks
    kept, left = [], max_pages
    for task in tasks:
        if left <= 0:
            break
        kept.append(PageTask(task.document, task.pages[:left]))
        left -= len(kept[-1].pages)
    return kept


@dataclass
class TaskResult:
    """What a worker sends back: rows, and what became of each page."""

    rows: list[dict] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)  # (reason, page)
    pages_used: int = 0
    seconds: float = 0.0


def _rows(
    tasks: list[PageTask],
    settings: PageSettings,
    unwanted: Callable[[str], bool] | None,
    workers: int,
    report: BuildReport,
    broken: Refusals,
    progress: bool,
) -> Iterator[dict]:
    """Rows of all tasks in the order of the tasks. After a task that failed nothing more of its document is taken."""
    from tqdm import tqdm

    failed: set[Path] = set()
    used: set[Path] = set()
    results = run_guarded(
        lambda task: read_task(task, settings, unwanted),
        tasks,
        workers=workers,
        seconds=lambda task: DOCUMENT_SECONDS + PAGE_SECONDS * len(task.pages),
        skip=lambda task: task.document.path in failed,
    )
    try:
        with tqdm(total=sum(len(task.pages) for task in tasks), unit="page", disable=not progress) as bar:
            for task, result in results:
                document = task.document
                used.add(document.path)
                report.documents = len(used)
                report.pages += len(task.pages)
                bar.update(len(task.pages))
                if document.path in failed or isinstance(result, Failure):
                    if document.path not in failed:
                        reason, detail = why(result)
                        where = f"{document.name}#{task.pages[0] + 1}-{task.pages[-1] + 1}"
                        broken.add(document.origin, f"document: {reason}", f"{where}{detail and ': '}{detail}")
                    failed.add(document.path)
                    report.left_out["page: of a document that failed"] += len(task.pages)
                    continue
                report.left_out.update(result.left_out)
                report.pages_used += result.pages_used
                report.page_seconds += result.seconds
                report.rows += len(result.rows)
                for reason, where in result.faults:
                    broken.add(document.origin, f"page: {reason}", where)
                broken.accept(document.origin, len(task.pages) - len(result.faults))
                bar.set_postfix(rows=report.rows, refused=broken.refused, refresh=False)
                yield from result.rows
    finally:
        results.close()


def read_task(task: PageTask, settings: PageSettings, unwanted: Callable[[str], bool] | None = None) -> TaskResult:
    """Rows of a few pages of a document; what is wrong with a page costs that page."""
    result = TaskResult()
    begin = time.perf_counter()
    try:
        document = pdfium.PdfDocument(task.document.path)
    except pdfium.PdfiumError:
        result.faults += [("cannot be loaded", f"{task.document.name}#{number + 1}") for number in task.pages]
        return result
    edges: dict[int, list[pdf_pages.Edge] | None] = {}

    def edges_of(number: int) -> list[pdf_pages.Edge] | None:
        if number not in edges:
            try:
                edges[number] = pdf_pages.page_edges(document[number]) if 0 <= number < task.document.pages else None
            except pdfium.PdfiumError:
                edges[number] = None
        return edges[number]

    for number in task.pages:
        where = f"{task.document.name}#{number + 1}"
        rng = np.random.default_rng([settings.seed, zlib.crc32(task.document.name.encode()), number])
        try:
            page = document[number]
            cutouts = list(
                _cutouts(page, settings, rng, result.left_out, lambda k, n=number: edges_of(n + k), unwanted)
            )
            page.close()
        except PageRefused as refused:
            if str(refused) in FAULTS:
                result.faults.append((str(refused), where))
            else:
                result.left_out[f"page: {refused}"] += 1
            continue
        except pdfium.PdfiumError:
            result.faults.append(("cannot be loaded", where))
            continue
        result.pages_used += bool(cutouts)
        result.rows += [_row(cutout, where, task.document, settings) for cutout in cutouts]
    document.close()
    result.seconds = time.perf_counter() - begin
    return result


def _cutouts(
    page: pdfium.PdfPage,
    settings: PageSettings,
    rng: np.random.Generator,
    left_out: Counter,
    neighbours: Callable[[int], list[pdf_pages.Edge] | None],
    unwanted: Callable[[str], bool] | None,
) -> Iterator[Cutout]:
    """What a page gives.

    Raises:
        PageRefused: nothing, with the reason.
    """
    if settings.unit in ("line", "chunk"):
        if not all(pdf_pages.SIDE[0] <= side <= pdf_pages.SIDE[1] for side in page.get_size()):
            raise PageRefused("size")
        counts: Counter = Counter()
        wishes = {"unwanted": unwanted or (lambda text: False), "x_height": settings.x_height}
        if settings.unit == "chunk":
            yield from chunks_of_page(page, rng, counts, **wishes)
        else:
            from .line_cuts import lines_of_page

            wishes |= {"english": settings.english, "max_unmapped": settings.max_unmapped}
            yield from lines_of_page(page, rng, counts, **wishes)
        reason = next((key for key in counts if key.startswith("page: ")), None)
        if reason:
            raise PageRefused(reason.removeprefix("page: "))
        left_out.update(counts)
        return
    text = pdf_pages.read_page(
        page, neighbours=neighbours, english=settings.english, max_unmapped=settings.max_unmapped
    )
    low, high = settings.x_height
    rendered = pdf_pages.render_page(page, text, low if low == high else float(rng.uniform(low, high)))
    wishes = {"joined": settings.joined, "furniture": settings.furniture}
    if settings.unit == "page":
        cutout = pdf_pages.page_cutout(rendered, text, **wishes)
        if unwanted and unwanted(cutout.text):
            raise PageRefused("held out")
        yield cutout
        return

    def refused(reason: str) -> None:
        left_out[f"block: {reason}"] += 1

    for cutout in pdf_pages.block_cutouts(rendered, text, rng, refused, **wishes):
        if unwanted and unwanted(cutout.text):
            refused("held out")
        else:
            yield cutout


def _row(cutout: Cutout, where: str, document: Document, settings: PageSettings) -> dict:
    return make_row(
        cutout.pixels,
        cutout.text,
        task="ocr",
        kind="document",
        words=pdf_pages.words_with_boxes(cutout.text, cutout.boxes),
        char_boxes=cutout.boxes,
        x_height=cutout.x_height,
        source=where,
        license=settings.license or document.license,
        split=settings.split,
    )
