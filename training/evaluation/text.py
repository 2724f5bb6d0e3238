"""Reading, measured: how much of a text a reader gets right.

All figures are taken on text as :func:`comparable` gives it: normalised, lines joined, words divided at the end of a
line put together again, on both sides. So a reader that breaks lines elsewhere loses nothing.

| figure | definition | order |
|---|---|---|
| word F1, precision, recall | multisets of words (lower case, runs of letters and digits) | does not count |
| ordered word F1 | the same words, only those in the longest common subsequence count as found | counts |
| CER | Levenshtein distance in characters, case and punctuation included, over the characters of the truth | counts |
| WER | the same over words as white space divides them | counts |
| exact | share of texts read without a single wrong character | counts |
| exact lines | share of the truth's lines without a single wrong character in the alignment of least edits | counts |

A word found counts once: a truth that has "the" twice is not served by one "the", nor does saying it thrice help.
Word F1 and ordered word F1 differ by what was read in another order, columns for instance.

All figures are pooled (sums over sums), not averaged, so a page weighs as much as it holds. Intervals are 95%
percentiles of a bootstrap (1,000 resamples, seeded) over documents: texts of one document stand and fall together.

Distances come from rapidfuzz, which jiwer computes with too; jiwer itself also builds the list of single edits, which
nothing here needs: on a page of 1,200 words 12.1 ms against 2.6 ms [measured]. The tests compare the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from training.data.text import join_lines, normalize_text, words
from training.evaluation.contract import Figure, Value

RESAMPLES = 1000


class Counts(NamedTuple):
    """What one text adds to the pooled figures. All are counts; ``exact`` is 0 or 1."""

    matched_words: int
    predicted_words: int
    true_words: int
    character_edits: int
    true_characters: int
    word_edits: int
    true_tokens: int
    exact: int


class OrderCounts(NamedTuple):
    """What one text adds to the figures in which order counts; see :func:`count_order`."""

    ordered_words: int
    predicted_words: int
    true_words: int
    exact_lines: int
    true_lines: int


FIGURES = ("word_f1", "word_precision", "word_recall", "cer", "wer", "exact")
ORDER_FIGURES = ("ordered_word_f1", "exact_lines")
LOWER = ("cer", "wer")  # where less is better


def comparable(text: str) -> str:
    """``text`` as it is compared: normalised, lines joined, division at the end of a line undone, ends trimmed."""
    return join_lines(normalize_text(text)).strip()


def count(prediction: str, truth: str) -> Counts:
    """The counts of one text. Order matters for edits, not for words.

    >>> count("The cat sat", "the cat sat down")
    Counts(matched_words=3, predicted_words=3, true_words=4, character_edits=6, true_characters=16, word_edits=2, \
true_tokens=4, exact=0)
    """
    prediction, truth = comparable(prediction), comparable(truth)
    predicted_words, true_words = Counter(words(prediction)), Counter(words(truth))
    predicted_tokens, true_tokens = prediction.split(), truth.split()
    return Counts(
        matched_words=(predicted_words & true_words).total(),
        predicted_words=predicted_words.total(),
        true_words=true_words.total(),
        character_edits=Levenshtein.distance(prediction, truth),
        true_characters=len(truth),
        word_edits=Levenshtein.distance(predicted_tokens, true_tokens),
        true_tokens=len(true_tokens),
        exact=int(prediction == truth),
    )


def count_order(prediction: str, truth: str) -> OrderCounts:
    """The counts of one text of the figures in which order counts.

    A line of the truth is exact when the alignment of least edits leaves it whole; where the prediction breaks lines
    does not matter.

    >>> count_order("the cat sit\\ndown", "the cat\\nsat down")
    OrderCounts(ordered_words=3, predicted_words=4, true_words=4, exact_lines=1, true_lines=2)
    """
    said, stands = comparable(prediction), comparable(truth)
    predicted_words, true_words = words(said), words(stands)
    spans = line_spans(truth)
    kept = [(op.dest_start, op.dest_end) for op in Levenshtein.opcodes(said, stands) if op.tag == "equal"]
    starts = np.array([start for start, _ in kept] or [0])
    exact = 0
    for start, end in spans:
        block = int(np.searchsorted(starts, start, side="right")) - 1
        exact += bool(kept) and block >= 0 and kept[block][1] >= end
    return OrderCounts(
        ordered_words=LCSseq.similarity(predicted_words, true_words),
        predicted_words=len(predicted_words),
        true_words=len(true_words),
        exact_lines=exact,
        true_lines=len(spans),
    )


def line_spans(text: str) -> list[tuple[int, int]]:
    """Where each line of ``text`` that holds anything stands in ``comparable(text)``: first character, and one past
    the last.

    >>> line_spans("recog-\\nnised\\n\\ntext")
    [(0, 5), (5, 10), (11, 15)]
    """
    joined, spans, at = comparable(text), [], 0
    for line in normalize_text(text).split("\n"):
        if not line:
            continue
        if joined[at : at + 1] == " ":
            at += 1
        # a division at the end of a line went when lines were joined
        size = len(line) if joined.startswith(line, at) else len(line) - 1
        spans.append((at, at + size))
        at += size
    return spans


def _share(part: np.ndarray, whole: np.ndarray, when_empty: np.ndarray | float) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1.0), when_empty)


def _figures(totals: np.ndarray) -> np.ndarray:
    """(R, 1 + 8) totals, number of texts first -> (R, 6): F1, precision, recall, CER, WER, exact.

    Nothing predicted and nothing to find is a perfect reading: F1, precision and recall are 1, error rates 0.
    """
    number, matched, predicted, true, char_edits, chars, word_edits, tokens, exact = totals.T
    f1 = _share(2.0 * matched, predicted + true, 1.0)
    precision = _share(matched, predicted, (true == 0).astype(float))
    recall = _share(matched, true, (predicted == 0).astype(float))
    # Text invented where there is none is counted in full: the rate over an empty truth is the number of edits.
    cer = _share(char_edits, chars, char_edits)
    wer = _share(word_edits, tokens, word_edits)
    return np.stack([f1, precision, recall, cer, wer, _share(exact, number, 1.0)], axis=1)


def _order_figures(totals: np.ndarray) -> np.ndarray:
    """(R, 1 + 5) totals, number of texts first -> (R, 2): ordered word F1, exact lines."""
    _, ordered, predicted, true, exact, lines = totals.T
    return np.stack([_share(2.0 * ordered, predicted + true, 1.0), _share(exact, lines, 1.0)], axis=1)


def pooled(
    table: np.ndarray,
    figures: Callable[[np.ndarray], np.ndarray],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Figures of pooled counts, with 95% intervals of a bootstrap over groups.

    Args:
        table: (items, C), what each item adds.
        figures: (R, 1 + C) totals, number of items first -> (R, F) figures.
        groups: one an item: items of one group are drawn together. None, or one group for all: each item for itself.
        seed: of the bootstrap; same seed, same interval.
        resamples: how often the groups are drawn anew, with replacement.

    Returns:
        (3, F): values, lower ends, upper ends.

    Raises:
        ValueError: there is no item.
    """
    table = np.asarray(table, dtype=np.float64)
    if len(table) == 0:
        raise ValueError("there is no text to summarise")
    table = np.concatenate([np.ones((len(table), 1)), table.reshape(len(table), -1)], axis=1)
    values = figures(table.sum(axis=0, keepdims=True))[0]
    if groups is not None and len(set(groups)) > 1:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(numbers), table.shape[1]))
        np.add.at(sums, [numbers[group] for group in groups], table)
        table = sums
    generator, number = np.random.default_rng(seed), len(table)
    chances = np.full(number, 1.0 / number)
    totals, left = [], resamples
    while left:  # in parts: 1,000 resamples of 100,000 texts would be 800 MB
        part = min(left, max(1, 4_000_000 // number))
        totals.append(generator.multinomial(number, chances, size=part) @ table)
        left -= part
    low, high = np.percentile(figures(np.concatenate(totals)), [2.5, 97.5], axis=0)
    return np.stack([values, low, high])


def summarise(
    counts: Sequence[Counts] | Sequence[OrderCounts],
    seed: int = 0,
    resamples: int = RESAMPLES,
    *,
    groups: Sequence[Hashable] | None = None,
    failed: int = 0,
    at: Mapping[str, Value] | None = None,
) -> list[Figure]:
    """Pooled figures of ``counts`` with bootstrap intervals, in the order of ``FIGURES`` (``ORDER_FIGURES``).

    Args:
        counts: one per text, at least one.
        seed, resamples, groups: of the bootstrap, see :func:`pooled`.
        failed: at how many of them the reader raised an error.
        at: what they were measured at.

    Raises:
        ValueError: ``counts`` is empty.
    """
    ordered = bool(counts) and isinstance(counts[0], OrderCounts)
    names, figures = (ORDER_FIGURES, _order_figures) if ordered else (FIGURES, _figures)
    found = pooled(np.array(counts, dtype=np.float64), figures, groups, seed, resamples)
    return [
        Figure(name, *row, len(counts), failed, at=dict(at or {}), better="lower" if name in LOWER else "higher")
        for name, row in zip(names, found.T.tolist(), strict=True)
    ]


def word_f1(prediction: str, truth: str) -> float:
    """Multiset word F1 of one text, in [0, 1]; 1 when both are empty.

    >>> word_f1("a a b", "a b c")
    0.6666666666666666
    """
    return f1_of(count(prediction, truth))


def f1_of(counts: Counts) -> float:
    """Multiset word F1 of the counts of one text."""
    return float(_figures(np.array([[1, *counts]], dtype=np.float64))[0, 0])


def cer(prediction: str, truth: str) -> float:
    """Character error rate of one text: 0 is perfect, above 1 is possible.

    >>> cer("cat", "cart")
    0.25
    """
    return cer_of(count(prediction, truth))


def cer_of(counts: Counts) -> float:
    """Character error rate of the counts of one text."""
    return float(_figures(np.array([[1, *counts]], dtype=np.float64))[0, 3])
