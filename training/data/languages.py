"""Languages and scripts of texts."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

MIN_LETTERS = 20  # ours: shorter texts tell too little
MAX_CHARACTERS = 2000  # of a text that are looked at


@lru_cache(maxsize=1)
def _identifier():
    # Its model (100 languages, 3 MB) is in the package: nothing is fetched.
    from py3langid.langid import classify

    return classify


def detect_language(text: str) -> str:
    """ISO 639-1 code of a text's language, `und` for one with fewer than `MIN_LETTERS` letters.

    Raises:
        ModuleNotFoundError: py3langid is not installed.
    """
    classify = _identifier()
    text = text[:MAX_CHARACTERS]
    if sum(character.isalpha() for character in text) < MIN_LETTERS:
        return "und"
    return str(classify(text)[0])


def scripts(text: str) -> dict[str, int]:
    """Letters of each script, by the first word of their Unicode names: `LATIN`, `GREEK`, `CJK`, …"""
    counts: dict[str, int] = {}
    for character in text:
        if character.isalpha():
            script = _script(character)
            counts[script] = counts.get(script, 0) + 1
    return counts


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split(" ")[0].split("-")[0]
