"""What an error says, for lines that a person reads."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of its message; its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
