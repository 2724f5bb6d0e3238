"""Which code made something: the version of this package and, in a checkout, its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path


def code_version() -> str:
    """Version of this package and, in a checkout, its commit: `0.1.0 (commit 1a2b3c…)`, with a word if files differ
    from it."""
    from importlib.metadata import PackageNotFoundError, version

    root = Path(__file__).resolve().parents[1]
    try:
        stated = f"unit-vision {version('unit-vision')}"
    except PackageNotFoundError:
        stated = "unit-vision"
    if not (root / ".git").exists():
        return stated

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return stated
    return f"{stated}, commit {commit}{', with local changes' if changed else ''}"
