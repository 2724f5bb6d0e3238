"""What was measured once is not measured again: figures by the hash of the model, of the data and of the code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


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


def hash_of_file(file: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
