"""Words to draw: prose, rare words, numbers and codes; and the rule by which a page's text is balanced.

Prose alone has one digit in 150 characters and one capital in 44 (counted), so that a reader trained on it guesses
words instead of looking. Each page therefore wants a share of its own of each class, drawn evenly between nothing and
twice the class's number in `WANTED`; see `TextStream`.
"""

from __future__ import annotations

import gzip
import html
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..sources import cache_root, fetch_deb
from ..text import normalize_text
from .fonts import PRINTABLE

TEXT_PACKAGES = ("anarchism", "fortunes", "fortunes-min", "dict-jargon", "miscfiles")
# Mean share of a page's characters (white space not counted), and for rare words of its words.
WANTED = {"digits": 0.07, "capitals": 0.08, "punctuation": 0.08, "rare words": 0.12}
COMMON_SHARE = 0.85  # common are the most frequent words that make up so much of the running text; others are rare
MAX_WORD = 24  # characters; longer words are cut
MIN_WORDS = 50  # that a corpus must have


# ------------------------------------------------------------------------------------------------------------ corpora


def read_package_prose() -> Iterator[str]:
    """Paragraphs of English from `TEXT_PACKAGES`, printable ASCII only."""
    for path in sorted((fetch_deb("anarchism") / "usr/share/doc/anarchism/html").glob("*.html")):
        page = path.read_text(encoding="utf-8", errors="replace")
        for paragraph in re.findall(r"<p>(.*?)(?=<p>|</p>|<blockquote>|<h\d)", page, re.DOTALL | re.IGNORECASE):
            yield from _plain(html.unescape(re.sub(r"<[^>]*>", " ", paragraph)))
    for package in ("fortunes", "fortunes-min"):
        for path in sorted((fetch_deb(package) / "usr/share/games/fortunes").iterdir()):
            if path.is_file() and not path.suffix:
                for saying in path.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
                    yield from _plain(saying)
    dictionary = fetch_deb("dict-jargon") / "usr/share/dictd/jargon.dict.dz"
    yield from _plain(gzip.decompress(dictionary.read_bytes()).decode("utf-8", errors="replace"))


def _plain(text: str) -> Iterator[str]:
    text = " ".join(normalize_text(text).split())
    if len(text) >= 40:
        yield re.sub(r"\S*[^ -~]\S*", " ", text)


def package_prose() -> str:
    """The text of `read_package_prose`, kept in the cache."""
    tag = f"{zlib.crc32(' '.join(TEXT_PACKAGES).encode()):08x}"
    kept = cache_root() / "trees" / f"prose-{tag}.txt"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_text("\n".join(read_package_prose()))
        partial.rename(kept)
    return kept.read_text()


def package_vocabulary() -> list[str]:
    """235,000 English words without order (web2)."""
    return (fetch_deb("miscfiles") / "usr/share/dict/web2").read_text().split()


class Corpus:
    """Running text and rare words.

    Args:
        prose: any text; it is normalised as targets are.
        vocabulary: words beside the rare ones of the prose.

    Raises:
        ValueError: fewer than `MIN_WORDS` words.
    """

    def __init__(self, prose: str, vocabulary: Sequence[str] = ()):
        words = (prose if _is_plain(prose) else normalize_text(prose)).split()
        if len(words) < MIN_WORDS:
            raise ValueError(f"the text to draw has {len(words)} words; at least {MIN_WORDS} are needed")
        self.prose = " ".join(words)
        self.common = _common(words)
        forms = dict.fromkeys(words)
        self._rare_forms = frozenset(form[:MAX_WORD] for form in forms if self.is_rare(form[:MAX_WORD]))
        rare = dict.fromkeys(word for word in map(bare, forms) if word and word not in self.common)
        vocabulary = dict.fromkeys(word for word in vocabulary if word.lower() not in self.common)
        self.rare = [*rare, *vocabulary] or sorted(self.common)

    def passage(self, rng: random.Random, count: int) -> list[str]:
        """``count`` words in running order from a random place, starting over at the end of the text."""
        start = self.prose.find(" ", int(rng.random() * len(self.prose))) + 1  # 0 after the last blank
        found: list[str] = []
        while len(found) < count:
            wanted = 8 * (count - len(found)) + 64  # characters; a word is on average shorter
            piece = self.prose[start : start + wanted]
            cut = start + wanted < len(self.prose)
            words = piece.split(" ")
            found += words[:-1] if cut and len(words) > 1 else words
            start = start + piece.rfind(" ") + 1 if cut and len(words) > 1 else 0
        return [word[:MAX_WORD] for word in found[:count]]

    def is_rare(self, word: str) -> bool:
        """Whether ``word``, without its punctuation, is none of the common words; numbers and codes are not words."""
        plain = bare(word)
        return len(plain) > 1 and plain.isalpha() and plain not in self.common

    def count_rare(self, words: Iterable[str]) -> int:
        """How many of ``words`` of the prose are rare."""
        return sum(map(self._rare_forms.__contains__, words))


def _is_plain(text: str) -> bool:
    return text.isascii()  # the packages' prose: normal already, and 15 MB


def _common(words: list[str]) -> frozenset[str]:
    counts = Counter(bare(word) for word in words)
    counts.pop("", None)
    budget, common = COMMON_SHARE * sum(counts.values()), []
    for word, count in counts.most_common():
        if budget <= 0:
            break
        common.append(word)
        budget -= count
    return frozenset(common)


def bare(word: str) -> str:
    """``word`` in lower case without the punctuation around it."""
    return word.strip("\"'`()[]{}<>.,;:!?*_-+=/\\|~^&%$#@").lower()


def load_corpus(files: Sequence[str | Path] | None = None) -> Corpus:
    """The corpus of the packages, or that of UTF-8 text ``files``.

    Raises:
        ValueError: a file is not there, is no UTF-8 text, or all together are too short.
    """
    if not files:
        return Corpus(package_prose(), package_vocabulary())
    texts = []
    for file in files:
        try:
            texts.append(Path(file).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the text file {file}: {error}") from error
    return Corpus("\n".join(texts))


# -------------------------------------------------------------------------------------------------- numbers and codes


class Scalars(random.Random):
    """`random.Random` with the scalar draws of ``numpy.random.Generator``, which takes 20 times as long for one."""

    def integers(self, low: int, high: int | None = None) -> int:
        """A whole number from ``low`` up to but not including ``high``, or from 0 up to ``low``."""
        if high is None:
            low, high = 0, low
        return low + int(self.random() * (high - low))


def pick(rng, items):
    """One of ``items``; ``rng`` is a `Scalars` or a ``numpy.random.Generator``."""
    return items[int(rng.integers(len(items)))]


def number(rng) -> str:
    """Something made of digits: a count, a price, a date, a time, a share, a telephone number …"""
    n = lambda low, high: int(rng.integers(low, high))  # noqa: E731
    forms = (
        lambda: str(n(0, 10 ** n(1, 7))),
        lambda: f"{n(0, 10000)}.{n(0, 100):02d}",
        lambda: f"{n(1, 1000)},{n(0, 1000):03d}",
        lambda: f"{pick(rng, '$#')}{n(1, 5000)}",
        lambda: f"{n(1, 32)}/{n(1, 13)}/{n(1900, 2040)}",
        lambda: f"{n(1900, 2040)}-{n(1, 13):02d}-{n(1, 32):02d}",
        lambda: f"{n(0, 24):02d}:{n(0, 60):02d}",
        lambda: f"{n(0, 101)}%",
        lambda: f"+{n(1, 99)} {n(100, 1000)} {n(1000, 10000)}",
        lambda: f"({n(1, 200)})",
        lambda: f"[{n(1, 200)}]",
        lambda: f"{n(1, 30)}.{n(1, 20)}",
        lambda: f"-{n(1, 500)}",
        lambda: f"{n(1, 100)}{pick(rng, '+-*/=<>')}{n(1, 100)}",
        lambda: f"{n(1, 50)}{pick(rng, ['st', 'nd', 'rd', 'th', 'px', 'kg', 'cm', 'pt', 'A', 'B'])}",
    )
    return forms[n(0, len(forms))]()


def code(rng, vocabulary: Sequence[str]) -> str:
    """An address, a path, an identifier, a command, or plain random characters."""
    n = lambda low, high: int(rng.integers(low, high))  # noqa: E731
    word = lambda: pick(rng, vocabulary).lower()[:10]  # noqa: E731
    random = lambda pool, low, high: "".join(pick(rng, pool) for _ in range(n(low, high)))  # noqa: E731
    capitals = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    forms = (
        lambda: f"{word()}@{word()}.{pick(rng, ['org', 'com', 'net', 'de', 'edu'])}",
        lambda: f"{pick(rng, ['http://', 'https://', 'www.'])}{word()}.org/",
        lambda: f"/{word()}/{word()}.{pick(rng, ['tex', 'pdf', 'txt', 'py', 'c'])}",
        lambda: f"\\{word()}{{{word()}}}",
        lambda: f"{word()}_{word()}",
        lambda: f"{word()}({word()})",
        lambda: f"--{word()}={n(0, 100)}",
        lambda: f"<{word()}>",
        lambda: f"{random(capitals, 2, 5)}-{n(0, 10000)}",
        lambda: random(PRINTABLE, 1, 9),
        lambda: random(capitals + "0123456789", 3, 10),
        lambda: random("0123456789abcdef", 4, 13),
        lambda: word().upper(),
        lambda: f'"{word()}"',
        lambda: f"{word()[:4]}{pick(rng, '&|~^*+;:?!')}",
    )
    return forms[n(0, len(forms))]()


# --------------------------------------------------------------------------------------------------------- balancing


_CLASS = np.full(128, 3, dtype=np.uint8)  # 0 digits, 1 capitals, 2 punctuation, 3 letters, 4 white space
_CLASS[[ord(c) for c in "0123456789"]] = 0
_CLASS[[ord(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = 1
_CLASS[[ord(c) for c in PRINTABLE if not c.isalnum()]] = 2
_CLASS[[ord(c) for c in " \t\n\r"]] = 4


def count_classes(text: str) -> np.ndarray:
    """How many digits, capitals, punctuation marks and others ``text`` has, white space left out: (4,) int."""
    if not text.isascii():
        text = "".join(_ascii_of_its_class(character) for character in text)
    return np.bincount(_CLASS[np.frombuffer(text.encode(), dtype=np.uint8)], minlength=5)[:4]


def _ascii_of_its_class(character: str) -> str:
    if character.isascii():
        return character
    if character.isalpha():
        return "A" if character.isupper() else "a"
    return "0" if character.isdigit() else " " if character.isspace() else "."


class TextStream:
    """The words of one page, drawn passage by passage and balanced.

    The rule: the page wants a share of digits, of capitals, of punctuation (of its characters) and of rare words (of
    its words), each drawn evenly between 0 and twice the number in `WANTED`. After each passage of prose what the page
    lacks so far is made up within the passage: words at random places become numbers (digits), codes, addresses and
    quoted words (punctuation), rare words, or words in capitals; at most two thirds of the words of a passage.
    So a page is prose alone or full of codes and everything between, and the mean over pages is about
    what `WANTED` says, or more, whatever the corpus. Numbers that a layout needs (prices, dates) count as well.

    Args:
        corpus: where prose and rare words are from.
        rng: all draws come from it.
        covers: tells the words that the page's font can draw; others are left out.
    """

    def __init__(self, corpus: Corpus, rng: Scalars, covers=lambda text: True):
        self.corpus, self.rng, self.covers = corpus, rng, covers
        self.wanted = [2 * share * rng.random() for share in WANTED.values()]
        self.counts = np.zeros(4)
        self.words_drawn = self.rare_drawn = 0

    def note(self, text: str) -> str:
        """Count ``text``, which a layout draws by itself, and return it."""
        self.counts += count_classes(text)
        return text

    def words(self, count: int) -> list[str]:
        """At least one and up to ``count`` words in running order."""
        rng, corpus = self.rng, self.corpus
        words = corpus.passage(rng, max(count, 1))
        joined = " ".join(words)
        if not joined.isascii():
            words = [word for word in words if self.covers(word)] or [str(rng.integers(100, 10000))]
            joined = " ".join(words)
        count, total = len(words), len(joined) - len(words) + 1
        digits, capitals, punctuation, _ = self.counts + count_classes(joined)
        letters = total + self.counts.sum()
        rare = self.rare_drawn + corpus.count_rare(words)
        want_digits, want_capitals, want_punctuation, want_rare = self.wanted
        # A number holds about 3.3 digits, a code 2.4 marks (counted), a word in capitals as many as it has letters.
        lacking = [
            (want_rare * (self.words_drawn + count) - rare, self._rare),
            ((want_punctuation * letters - punctuation) / 2.4, self._code),
            ((want_digits * letters - digits) / 3.3, self._number),
            ((want_capitals * letters - capitals) * count / total, str.upper),
        ]
        plan = [(int(lack + rng.random()) if lack > 0 else 0, make) for lack, make in lacking]
        places = rng.sample(range(count), min(2 * count // 3, sum(whole for whole, _ in plan)))
        for whole, make in plan:
            for place in places[:whole]:
                rare -= corpus.count_rare(words[place : place + 1])
                words[place] = make(words[place])[:MAX_WORD]
                rare += corpus.is_rare(words[place])
            places = places[whole:]
        self.counts += count_classes(" ".join(words))
        self.words_drawn += count
        self.rare_drawn = rare
        return words

    def phrase(self, low: int, high: int) -> str:
        """From ``low`` to ``high`` words, as one string."""
        return " ".join(self.words(self.rng.integers(low, high + 1)))

    def number(self) -> str:
        """A number of any form, without blanks."""
        return self.note(self._number("").replace(" ", "-"))

    def _number(self, _: str) -> str:
        return number(self.rng).replace(" ", "-")

    def _code(self, word: str) -> str:
        form = self.rng.random()
        if form < 0.35:
            made = code(self.rng, self.corpus.rare)
            return made if self.covers(made) else self._number("")
        if form < 0.65:
            return word.strip(",.;:") + pick(self.rng, (",", ".", ";", ":", "!", "?", "...", "-", "/"))
        left, right = pick(self.rng, ("()", "[]", '""', "''", "{}", "**", "__", "<>", "//"))
        return left + word[: MAX_WORD - 2] + right

    def _rare(self, _: str) -> str:
        for _ in range(8):
            word = pick(self.rng, self.corpus.rare)
            if self.covers(word):
                return word
        return self._number("")


def measure(texts: Iterable[str], corpus: Corpus) -> dict[str, float]:
    """Shares of digits, capitals and punctuation among the characters of ``texts``, of rare ones among the words."""
    counts, rare, words = np.zeros(4), 0, 0
    for text in texts:
        counts += count_classes(text)
        split = text.split()
        words += len(split)
        rare += sum(map(corpus.is_rare, split))
    characters = max(counts.sum(), 1)
    shares = {name: round(float(counts[index] / characters), 4) for index, name in enumerate(list(WANTED)[:3])}
    return {**shares, "rare words": round(rare / max(words, 1), 4)}
