"""What was measured once is not measured again: figures by the hash of the model, of the data and of the code.

    cache = Cache()
    key = key_of({"subject": subject.hash(), "evaluator": evaluator.fingerprint(), "code": hash_of_code()})
    found = cache.get(key) or measure()

An entry is two files below ``cache_root()/evaluation``: ``KEY.json`` with the figures and, where there are any,
``KEY.jsonl`` with the items. Both are written beside and renamed, the items first, so that an entry is whole or
absent; runs beside each other write the same and do each other no harm. An entry that cannot be read is absent. To
forget everything, delete the folder.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.data.sources import cache_root
from training.evaluation.contract import Figure

FORMAT = 1  # of an entry; another number is another entry
LARGE = 4 << 20  # bytes; hashes of larger files are remembered: it takes longer to compute one than to look it up
# What shows figures and does not decide them; the rest of this package does.
SHOWING = ("report.py", "plots.py", "run.py", "cache.py", "hub_results.py")
APART = ("lmms",)  # vision-language models, of which no figure is kept here
# Of the rest of training/: how text and Markdown are normalised, pictures composed, classes prompted, rows of other
# layouts and a teacher's projection read.
BESIDE = ("data/text.py", "data/markdown.py", "data/pictures.py", "data/targets.py", "data/labelled.py", "teacher.py")


@dataclass
class Entry:
    """What one evaluator found of one subject.

    Attributes:
        figures: as measured, in order.
        items: one plain dict per item.
        notes: lines for the report.
        seconds: that it took.
        subject: what the one measured was called then; notes name it so.
    """

    figures: list[Figure]
    items: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    subject: str = ""

    def called(self, name: str) -> Entry:
        """The same where the one measured is called ``name`` now: weights are known by their hash, not by a name."""
        if not self.subject or self.subject == name:
            return self
        old = re.compile(rf"(?<!\w){re.escape(self.subject)}(?!\w)")
        return replace(self, notes=[old.sub(lambda _: name, note) for note in self.notes], subject=name)


class Cache:
    """Entries in a folder.

    Args:
        folder: ``cache_root()/evaluation`` by default; made when something is put.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = Path(folder) if folder is not None else cache_root() / "evaluation"

    def get(self, key: str) -> Entry | None:
        """The entry of ``key``; None where there is none, or none that can be read."""
        try:
            found = json.loads(self._path(key, "json").read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["key"] != key:
                return None
            lines = []
            if found["items"]:
                lines = self._path(key, "jsonl").read_text(encoding="utf-8").splitlines()
            if len(lines) != found["items"]:
                return None
            figures = [Figure.from_dict(figure) for figure in found["figures"]]
            items = [json.loads(line) for line in lines]
            notes, subject = [str(note) for note in found["notes"]], str(found.get("subject", ""))
            return Entry(figures, items, notes, float(found["seconds"]), subject)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str, entry: Entry, told: Mapping[str, Any] | None = None) -> None:
        """Keep ``entry`` under ``key``.

        Args:
            told: what the key was made of, for whoever looks into the folder.

        Raises:
            TypeError, ValueError: the items or notes are not JSON data.
        """
        items = "".join(json_line(item) for item in entry.items)
        found = {
            "format": FORMAT,
            "key": key,
            "told": told or {},
            "figures": [figure.to_dict() for figure in entry.figures],
            "notes": entry.notes,
            "seconds": entry.seconds,
            "subject": entry.subject,
            "items": len(entry.items),
        }
        text = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
        if items:
            write_whole(self._path(key, "jsonl"), items)
        write_whole(self._path(key, "json"), text)

    def _path(self, key: str, ending: str) -> Path:
        return self.folder / key[:2] / f"{key}.{ending}"


def key_of(parts: Mapping[str, Any]) -> str:
    """Hex SHA-256 of JSON data, whatever the order of its keys.

    Raises:
        TypeError: it is not JSON data.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def json_line(item: Mapping[str, Any]) -> str:
    """One line of a .jsonl file. Characters that some readers take for a line's end (U+2028 ...) are escaped."""
    line = json.dumps(item, ensure_ascii=False)
    for mark in ("\x85", "\u2028", "\u2029"):
        line = line.replace(mark, f"\\u{ord(mark):04x}")
    return line + "\n"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it: whoever reads it finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@lru_cache(maxsize=1)
def hash_of_code() -> str:
    """Hex SHA-256 of the code that decides figures: the models, the measures, the normalisation of text."""
    here = Path(__file__).parent
    root = here.parent.parent
    measures = [
        file
        for file in here.rglob("*.py")
        if file.relative_to(here).as_posix() not in SHOWING and file.relative_to(here).parts[0] not in APART
    ]
    beside = [here.parent / name for name in BESIDE]
    return hash_of(sorted([*measures, *(root / "modeling_unit").rglob("*.py"), *beside]))


@lru_cache(maxsize=1)
def versions_that_decide() -> dict[str, str]:
    """Versions of the packages that a figure may hang on, Python's too; nothing is imported for it."""
    from training.evaluation.report import versions

    return versions(("torch", "transformers", "numpy", "pillow", "rapidfuzz"))


def hash_of(paths: str | os.PathLike | Iterable[str | os.PathLike], patterns: Iterable[str] = ("*",)) -> str:
    """Hex SHA-256 over names and contents of files.

    Args:
        paths: a file, a folder, or several of either.
        patterns: which files of a folder count, at any depth; hidden ones never do.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    digest = hashlib.sha256()
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    for path in map(Path, several):
        if path.is_file():
            files = [path]
        elif path.is_dir():
            found = {file for pattern in patterns for file in path.rglob(pattern) if file.is_file()}
            files = sorted(
                file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
        for file in files:
            name = file.name if file == path else file.relative_to(path).as_posix()
            digest.update(f"{name}\0".encode())
            digest.update(bytes.fromhex(hash_of_file(file)))
    return digest.hexdigest()


_hashes: dict[tuple[str, int, int], str] = {}  # of this process


def hash_of_file(file: Path) -> str:
    """Hex SHA-256 of a file's content; known again by path, size and time of change, a large file's for good."""
    file = Path(file)
    state = file.stat()
    known = (str(file.resolve()), state.st_size, state.st_mtime_ns)
    if known in _hashes:
        return _hashes[known]
    memo = None
    if state.st_size >= LARGE:
        memo = cache_root() / "evaluation" / "hashes" / key_of({"file": known[0]})
        found = _remembered(memo, known)
        if found is not None:
            _hashes[known] = found
            return found
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    _hashes[known] = digest.hexdigest()
    if memo is not None:
        with suppress(OSError):  # a cache that cannot be written costs time, not figures
            write_whole(memo, json.dumps([*known, _hashes[known]]))
    return _hashes[known]


def _remembered(memo: Path, known: tuple[str, int, int]) -> str | None:
    try:
        *of, found = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    fits = tuple(of) == known and isinstance(found, str) and len(found) == 64
    return found if fits and all(sign in "0123456789abcdef" for sign in found) else None
