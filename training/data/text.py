"""Text as the model is taught to write it, and as the metrics compare it."""

from __future__ import annotations

import re
import unicodedata

# What NFKC leaves alone but a reader of print would type differently.
_PLAIN = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u02b9\u00b4\u0060\u2035\u02cb", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb\u02dd", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u00ad\ufe58\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2022\u2219\u22c5\u00b7\u25cf\u25aa\u2023", "\u2022"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u27e8\u2329\u3008\u2039", "<"),
    **dict.fromkeys("\u27e9\u232a\u3009\u203a", ">"),
    **dict.fromkeys("\u2217", "*"),
    **dict.fromkeys("\u223c\u02dc", "~"),
    **dict.fromkeys("\u2223", "|"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
}
# NFKC turns these into a space and a combining mark; take the spacing sign as it was typed instead.
_BEFORE_NFKC = str.maketrans(
    {"\u00b4": "'", "\u02dd": '"', "\u02dc": "~", "\u00a8": '"', "\u2033": '"', "\u2036": '"'}
)
_AFTER_NFKC = str.maketrans(_PLAIN)
_SPACES = re.compile(r"[^\S\n]+")
_HYPHEN_BREAK = re.compile(r"(?<=[a-z])-\n(?=[a-z])")
_WORD = re.compile(r"[^\W_]+")


def normalize_text(text: str) -> str:
    """The one spelling of ``text`` that data, targets and metrics use.

    NFKC (which splits ligatures and turns full-width forms and no-break spaces into plain ones), then curly quotes to
    ``'`` and ``"``, dashes and minus to ``-``, ellipsis to ``...``, bullets to one bullet, zero-width characters
    removed, and runs of spaces to one space. Line feeds stay; spaces beside them and at both ends go.

    >>> normalize_text("\\u201cef\\ufb01cient\\u201d \\u2013  it\\u2019s\\u2026")
    '"efficient" - it\\'s...'
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_BEFORE_NFKC)
    text = unicodedata.normalize("NFKC", text).translate(_AFTER_NFKC)
    return "\n".join(_SPACES.sub(" ", line).strip() for line in text.split("\n")).strip("\n")


def normalize_character(character: str) -> str:
    """What one printed character becomes, spaces kept: for walking along a line without losing its boxes."""
    return unicodedata.normalize("NFKC", character.translate(_BEFORE_NFKC)).translate(_AFTER_NFKC)


def join_lines(text: str) -> str:
    """Undo line breaks: a word divided at the end of a line is joined, every other break becomes a space.

    A hyphen between two lower-case letters over a line break is taken for a division. That is wrong for the rare
    compound divided at its own hyphen ("well-\\nknown"), which no rule without a dictionary can tell apart.

    >>> join_lines("recog-\\nnises text\\nin TeX-\\nLive")
    'recognises text in TeX-Live'
    """
    text = _HYPHEN_BREAK.sub("", text)
    text = re.sub(r"(?<=\w)-\n(?=\w)", "-", text)
    return re.sub(r"\s*\n\s*", " ", text)


def words(text: str) -> list[str]:
    """Runs of letters and digits in ``text``, lower case, in order: the unit of word F1.

    >>> words("The 2nd e-mail: Ab_c!")
    ['the', '2nd', 'e', 'mail', 'ab', 'c']
    """
    return _WORD.findall(text.lower())
