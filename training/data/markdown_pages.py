"""Markdown files typeset into page images whose target is their Markdown, in the dialect of `markdown`.

The files come from npm packages (`markdown_sources.yaml`; those whose licence is permissive), from folders, or are
named one by one. A task takes a document, a random style (fonts, sizes, one or two columns, looks of tables, code and
quotations) and sets a few pages of it; rows are a function of (seed, task) and the files alone, so the same seed gives
the same bytes whatever the number of workers. A row is kept only when reading its target gives exactly the blocks that
stand on the page. For pages of real PDFs see `markdown_latex`.

All shares and ranges are ours.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from . import markdown
from .guarded import Failure, run_guarded, why
from .heldout import fingerprints, heldout, is_heldout_markdown
from .markdown_typeset import Family, Page, draw, draw_style, find_families, lay_out, paginate
from .pdf import Report
from .refusals import Refusals
from .schema import make_row, write_shards
from .sources import NPM_NAME, fetch_npm
from .text import words

PAGES_PER_TASK = 4
LEAST_WORDS = 30  # of a page
MOST_BYTES = 1_000_000  # of a file; larger ones are data
LEAST_PATIENCE = 64  # tasks in a row without a page before a run gives up
TASK_SECONDS = 60.0  # of a task, which takes a tenth of one most often: a guard, not a sieve
# Licences that let a copy be shown with its name; of alternatives one must be among them.
PERMISSIVE = frozenset(
    (
        "MIT", "MIT-0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "CC0-1.0", "Unlicense",
        "BlueOak-1.0.0", "Zlib", "WTFPL",
    )
)  # fmt: skip
DAMAGED = ("file: cannot be read", "file: not UTF-8", "file: not text", "file: over a megabyte")


@dataclass(frozen=True)
class Document:
    """A Markdown file to be typeset."""

    path: str
    name: str  # in the rows' ``source``, e.g. ``npm/undici@7.30.2/docs/docs/api/Client.md``
    license: str
    package: str  # packages are drawn before files, so that one with 1,300 files counts not much more than others


def default_packages(split: str) -> list[str]:
    """npm packages of a split: those of ``markdown_sources.yaml``, or the held-out ones."""
    if split == "validation":
        return list(heldout()["markdown"]["packages"])
    return list(yaml.safe_load((Path(__file__).parent / "markdown_sources.yaml").read_text())["npm"])


def find_documents(
    sources: Iterable[str],
    split: str = "train",
    *,
    license: str = "unknown",
    any_license: bool = False,
    skipped: Callable[[str], None] = lambda reason: None,
) -> list[Document]:
    """The ``.md`` files of ``sources``, sorted, each content once.

    Args:
        sources: folders, files, or npm packages as ``npm:NAME`` or ``npm:NAME@VERSION``.
        split: for ``train`` a held-out package is refused, for ``validation`` any other npm package.
        license: of folders and files; npm packages state their own in ``package.json``.
        any_license: keep npm packages under other than permissive licences too.
        skipped: called with one line for each package that is left out, with the reason.

    Raises:
        ValueError: a source does not exist or is not of the split, or there is no file in any.
    """
    found: list[Document] = []
    for source in sources:
        if source.startswith("npm:"):
            name = source[4:]
            if not NPM_NAME.match(name):
                raise ValueError(f"{name!r} is not the name of an npm package")
            if is_heldout_markdown(name) != (split == "validation"):
                which = "held out for validation" if split == "train" else "not one of the held-out packages"
                raise ValueError(f"{name}: {which} (training/data/heldout.yaml), so not a source for {split}")
            tree = fetch_npm(name)
            stated = npm_license(tree)
            if not (any_license or is_permissive(stated)):
                skipped(f"{name}: left out, its licence ({stated}) is not permissive")
                continue
            found.extend(_documents_below(tree, f"npm/{name}", stated, name))
        elif Path(source).is_dir():
            folder = Path(source).resolve()
            found.extend(_documents_below(folder, folder.name, license, folder.name))
        elif Path(source).is_file():
            path = Path(source).resolve()
            found.append(Document(str(path), path.name, license, path.name))
        else:
            raise ValueError(f"{source}: no such folder or file (npm packages are named as npm:NAME)")
    if not found:
        raise ValueError("no .md file in any of the sources")
    return found


def _documents_below(folder: Path, name: str, license: str, package: str) -> Iterator[Document]:
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.suffix.lower() in (".md", ".markdown") and path.is_file() and "node_modules" not in below.parts:
            yield Document(str(path), f"{name}/{below.as_posix()}", license, package)


def npm_license(tree: Path) -> str:
    """What ``package.json`` says, as an SPDX expression; ``unknown`` when it says nothing."""
    try:
        content = json.loads((tree / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    license = content.get("license") or content.get("licenses") or "unknown"
    if isinstance(license, list):  # as before npm 2.10
        license = " OR ".join(entry.get("type", "") for entry in license if isinstance(entry, dict))
    return license.get("type", "unknown") if isinstance(license, dict) else str(license)


def is_permissive(license: str) -> bool:
    """Whether an SPDX expression allows redistribution under permissive terms alone.

    >>> is_permissive("(BSD-3-Clause OR GPL-2.0)"), is_permissive("MIT AND GPL-3.0"), is_permissive("unknown")
    (True, False, False)
    """
    alternatives = re.split(r"\s+OR\s+", license.strip().strip("()"))
    return any(
        all(part.strip("() ") in PERMISSIVE for part in re.split(r"\s+AND\s+", alternative))
        for alternative in alternatives
    )


@lru_cache(maxsize=512)
def read_document(path: str) -> tuple[tuple[markdown.Block, ...], Counter]:
    """Blocks of a file and why others were left out.

    Raises:
        ValueError: in a few words, why the file is of no use: the reason that is counted.
    """
    try:
        content = Path(path).read_bytes()
    except OSError:
        raise ValueError("file: cannot be read") from None
    if len(content) > MOST_BYTES:
        raise ValueError("file: over a megabyte")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("file: not UTF-8") from None
    if "\0" in text:
        raise ValueError("file: not text")
    left_out: Counter = Counter()
    blocks = markdown.parse(text, foreign=True, skipped=lambda reason: left_out.update([reason]))
    seen = markdown.visible_text(blocks)
    if len(words(seen)) < LEAST_WORDS:
        raise ValueError("file: little text")
    letters = [character for character in seen if character.isalpha()]
    if sum(character < "\u0250" for character in letters) < 0.9 * len(letters):
        raise ValueError("file: not in Latin letters")
    return blocks, left_out


def marks_of(documents: Iterable[Document]) -> frozenset[int]:
    """`heldout.fingerprints` of ``documents``: of each block, which may stand on a page of its own, and of the whole,
    as it is seen and as it is written.

    A line that stands in many packages (a licence's) is theirs as much as ours and yet may not be trained on.
    """
    marks: set[int] = set()
    for document in documents:
        try:
            blocks, _ = read_document(document.path)
        except ValueError:
            continue
        for part in (*((block,) for block in blocks), blocks):
            marks.update(fingerprints(markdown.visible_text(part)))
            marks.update(fingerprints(markdown.write(part)))
    return frozenset(marks)


# ------------------------------------------------------------------------------------------------------------ rows


@lru_cache(maxsize=512)
def _wanted_blocks(path: str, unwanted: Callable[[str], bool]) -> tuple[markdown.Block, ...]:
    return tuple(block for block in read_document(path)[0] if not unwanted(markdown.visible_text([block])))


@dataclass(frozen=True)
class Plan:
    """What the rows are a function of, besides the number of the task."""

    documents: tuple[tuple[Document, ...], ...]  # by package
    shares: tuple[float, ...]  # of the packages
    families: tuple[Family, ...]
    size: int
    seed: int
    split: str
    unwanted: Callable[[str], bool]


def make_plan(
    documents: Sequence[Document],
    fonts: dict[str, list[str]],
    size: int,
    seed: int,
    split: str,
    unwanted: Callable[[str], bool] = lambda text: False,
) -> Plan:
    """Group ``documents`` by package; a package's share grows with the square root of its files."""
    packages: dict[str, list[Document]] = {}
    for document in documents:
        packages.setdefault(document.package, []).append(document)
    weights = np.array([len(members) ** 0.5 for members in packages.values()])
    return Plan(
        tuple(map(tuple, packages.values())),
        tuple((weights / weights.sum()).tolist()),
        tuple(find_families(fonts)),
        size,
        seed,
        split,
        unwanted,
    )


def _draw_document(plan: Plan, task: int) -> tuple[Document, np.random.Generator]:
    """The document of a task, and the generator from which all else of it is drawn."""
    rng = np.random.default_rng([plan.seed, task])
    members = plan.documents[int(rng.choice(len(plan.documents), p=plan.shares))]
    return members[int(rng.integers(len(members)))], rng


def rows_of_task(plan: Plan, task: int) -> tuple[list[dict], Report, str]:
    """Rows of one task, up to `PAGES_PER_TASK` consecutive pages of one document in one style; what was refused; the
    document's name."""
    begin = time.perf_counter()
    report = Report(documents=1)
    document, rng = _draw_document(plan, task)
    rows: list[dict] = []
    try:
        blocks, left_out = read_document(document.path)
    except ValueError as reason:
        report.refusals[str(reason)] += 1
        return rows, report, document.name
    report.refusals.update(left_out)
    kept = _wanted_blocks(document.path, plan.unwanted)
    report.refusals["block: shares text with held-out documents"] += len(blocks) - len(kept)
    style = draw_style(rng, plan.families, plan.size)
    strips = lay_out(kept, style, lambda reason: report.refusals.update([reason]))
    pages = paginate(strips, style)
    first = int(rng.integers(max(1, len(pages) - PAGES_PER_TASK + 1)))
    for number, page in enumerate(pages[first : first + PAGES_PER_TASK], first + 1):
        report.pages += 1
        row = _row_of_page(plan, page, f"made-markdown/{document.name}#{task}.{number}", document.license, rng)
        if isinstance(row, str):
            report.refusals[row] += 1
        else:
            rows.append(row)
    report.pages_used = report.rows = len(rows)
    report.refusals = +report.refusals
    report.page_seconds = time.perf_counter() - begin
    return rows, report, document.name


def _row_of_page(plan: Plan, page: Page, source: str, license: str, rng: np.random.Generator) -> dict | str:
    """The row of a page, or the reason why it is refused."""
    dark, light = int(rng.integers(0, 60)), int(rng.integers(225, 256))
    blocks = page.blocks()
    target = markdown.write(blocks)
    seen = markdown.visible_text(blocks)
    if len(words(seen)) < LEAST_WORDS:
        return "page: little text"
    if markdown.parse(target) != blocks:
        return "page: reading the target gives other blocks"
    if plan.unwanted(seen) or plan.unwanted(target):
        return "page: shares text with held-out documents"
    pixels, boxes = draw(page, dark, light)
    return make_row(
        pixels,
        target,
        task="markdown",
        kind="document",
        words=boxes,
        x_height=page.style.x_height,
        source=f"{source} ({page.style.text.name})",
        license=license,
        split=plan.split,
    )


def build_pages(
    documents: Sequence[Document],
    out: str | Path,
    count: int,
    *,
    fonts: dict[str, list[str]],
    size: int = 896,
    seed: int = 0,
    split: str = "train",
    workers: int = 1,
    unwanted: Callable[[str], bool] = lambda text: False,
    progress: bool = True,
) -> Report:
    """Typeset ``count`` pages into ``out``.

    Args:
        documents: what to typeset; each comes again and again, in other styles, as long as pages are wanted.
        out: folder for the shards and ``report.json``.
        count: rows.
        fonts: files by family, as of `pages.fonts.load_fonts`.
        size: longer side of a page in pixels.
        seed: the same seed gives the same bytes, whatever ``workers`` is.
        split: written into the rows; which documents and fonts belong to it is the caller's choice.
        workers: processes.
        unwanted: blocks and pages to leave out, by their visible text.
        progress: show a bar.

    Raises:
        ValueError: a negative count, fonts or a size that will not do, or no page comes of the documents.
        TooManyRefused: over a twentieth of the files, of 200 or more that were drawn, are damaged or overrun
            `TASK_SECONDS`.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, is {count}")
    begin = time.perf_counter()
    plan = make_plan(documents, fonts, size, seed, split, unwanted)
    draw_style(np.random.default_rng(0), plan.families, size)  # complain before a worker does
    report, damaged = Report(), Refusals()
    report.rows = write_shards(_rows(plan, count, workers, report, damaged, progress), out)
    report.seconds = time.perf_counter() - begin
    report.save(
        Path(out), seed=seed, size=size, split=split, files=len(documents), packages=len(plan.documents),
        families=len(plan.families), damaged=damaged.as_dict(),
    )  # fmt: skip
    return report


def _rows(plan: Plan, count: int, workers: int, report: Report, damaged: Refusals, progress: bool) -> Iterator[dict]:
    from tqdm import tqdm

    if count == 0:
        return
    fruitless = 0
    # Every document has had its chance several times over before this gives up.
    patience = max(LEAST_PATIENCE, 4 * sum(map(len, plan.documents)))
    results = run_guarded(
        lambda task: rows_of_task(plan, task),
        itertools.count(),
        workers=workers,
        seconds=lambda task: TASK_SECONDS,
    )
    with tqdm(total=count, unit="page", disable=not progress) as bar, closing(results):
        for task, result in results:
            if isinstance(result, Failure):
                why_not, detail = why(result)
                rows, part, name = [], Report(documents=1), f"{_draw_document(plan, task)[0].name}: {detail}"
                part.refusals[reason := f"file: {why_not}"] += 1
            else:
                rows, part, name = result
                reason = next((reason for reason in DAMAGED if part.refusals[reason]), None)
            report.pages += part.pages
            report.pages_used += part.pages_used
            report.documents += part.documents
            report.page_seconds += part.page_seconds
            report.refusals.update(part.refusals)
            damaged.add("Markdown files", reason, name) if reason else damaged.accept("Markdown files")
            fruitless = 0 if rows else fruitless + 1
            rows = rows[: count - report.rows]
            report.rows += len(rows)
            bar.update(len(rows))
            yield from rows
            if report.rows >= count:
                return
            if fruitless >= patience:
                raise ValueError(
                    f"{fruitless} attempts in a row gave no page; the last was refused for: {dict(part.refusals)}"
                )
