"""training/evaluation/text.py: figures worked out by hand, against jiwer, and their intervals."""

import random

import numpy as np
import pytest

from training.evaluation.text import (
    FIGURES,
    ORDER_FIGURES,
    cer,
    comparable,
    count,
    count_order,
    line_spans,
    pooled,
    summarise,
    word_f1,
)

# ------------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("THE CAT, sat!", "the cat sat", 1.0),  # case and punctuation do not count
        ("sat cat the", "the cat sat", 1.0),  # nor does order
        ("a a b", "a b c", 4 / 6),  # a and b match once each: 2 * 2 / (3 + 3)
        ("the the the", "the", 0.5),  # 2 * 1 / (3 + 1): saying it again does not help
        ("", "the cat", 0.0),
        ("the cat", "", 0.0),
        ("", "", 1.0),
        ("... !", "---", 1.0),  # no word on either side
        ("x1 y2", "x1", 2 / 3),  # digits belong to words
        ("é", "e\u0301", 1.0),  # one letter, composed or not
    ],
)
def test_word_f1_is_the_f1_of_two_multisets(prediction, truth, expected):
    assert word_f1(prediction, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("cat", "cat", 0.0),
        ("cat", "cart", 1 / 4),  # one letter missing of four
        ("Cat", "cat", 1 / 3),  # case counts
        ("cat.", "cat", 1 / 3),  # punctuation counts
        ("kitten", "sitting", 3 / 7),
        ("", "cat", 1.0),
        ("catcatcat", "cat", 2.0),  # six letters too many: above 1 is possible
        ("cat", "", 3.0),  # text invented where there is none is counted in full
        ("", "", 0.0),
    ],
)
def test_cer_is_edits_over_characters_of_the_truth(prediction, truth, expected):
    assert cer(prediction, truth) == pytest.approx(expected)


def test_breaking_lines_elsewhere_costs_nothing():
    truth = "The recog-\nnition of\ntext"
    assert comparable(truth) == "The recognition of text"
    assert comparable("The recognition\nof text\n") == comparable(truth)
    assert cer("The recogni-\ntion of text", truth) == 0.0


def test_typographic_spelling_costs_nothing():
    assert cer("“eﬀect” – it’s…", '"effect" - it\'s...') == 0.0


def test_figures_are_pooled_over_blocks_and_not_averaged():
    # block 1: 1 of 1 word right; block 2: 0 of 3 right. Averaging would give 0.5; pooling gives 2*1 / (4 + 4).
    rows = {line.name: line.value for line in summarise([count("a", "a"), count("x y z", "b c d")])}
    assert rows["word_f1"] == pytest.approx(0.25)
    assert rows["word_precision"] == pytest.approx(0.25)
    assert rows["word_recall"] == pytest.approx(0.25)
    assert rows["cer"] == pytest.approx(3 / 6)  # "b c d" has five characters, three of them wrong; "a" one, right
    assert rows["wer"] == pytest.approx(3 / 4)
    assert rows["exact"] == pytest.approx(0.5)


def test_precision_and_recall_are_not_swapped():
    rows = {line.name: line.value for line in summarise([count("a b c d", "a b")])}
    assert rows["word_precision"] == pytest.approx(2 / 4)
    assert rows["word_recall"] == pytest.approx(1.0)


def test_rows_come_in_the_documented_order_and_hold_their_interval():
    rows = summarise([count("a b", "a b"), count("a x", "a b"), count("", "a b c")])
    assert tuple(line.name for line in rows) == FIGURES
    assert all(line.low <= line.value <= line.high for line in rows)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    counts = [count("a " * n, "a " * 7) for n in range(8)]
    assert summarise(counts, seed=3) == summarise(counts, seed=3)
    assert summarise(counts, seed=3) != summarise(counts, seed=4)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    # 100 blocks, half of them exact: standard error 0.05, so about 0.40 to 0.60
    rows = summarise([count("a", "a")] * 50 + [count("b", "a")] * 50)
    exact = rows[FIGURES.index("exact")]
    assert exact.value == 0.5
    assert exact.low == pytest.approx(0.40, abs=0.02)
    assert exact.high == pytest.approx(0.60, abs=0.02)


def test_the_interval_narrows_to_a_point_when_all_blocks_are_alike():
    f1 = summarise([count("a b", "a c")] * 20)[0]
    assert (f1.value, f1.low, f1.high) == (0.5, 0.5, 0.5)


def test_no_text_at_all_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        summarise([])


def test_counts_do_not_overflow_on_long_texts():
    long = "word " * 20000
    assert np.isclose(word_f1(long, long), 1.0)


def test_figures_say_what_they_were_measured_at_and_which_way_is_better():
    rows = summarise([count("a", "a"), count("", "b")], failed=1, at={"x_height": 7.0})
    assert {(line.items, line.failed, line.at["x_height"]) for line in rows} == {(2, 1, 7.0)}
    assert [line.name for line in rows if line.better == "lower"] == ["cer", "wer"]


# ------------------------------------------------------------------------------------------------------------- jiwer


def garbled(generator: random.Random, words: list[str]) -> list[str]:
    """Words left out, changed, put in and said twice."""
    result = []
    for word in words:
        way = generator.random()
        if way < 0.1:
            continue
        result.append(word[::-1] + "x" if way < 0.25 else word)
        if way > 0.9:
            result.append(generator.choice(words))
    return result


def test_error_rates_are_those_of_jiwer():
    jiwer = pytest.importorskip("jiwer")
    generator = random.Random(7)
    vocabulary = ["the", "cat", "sat", "on", "A", "mat,", "2nd", "e-mail", "(and)", "slept."]
    for size in (1, 2, 5, 40, 300):
        truth = [generator.choice(vocabulary) for _ in range(size)]
        said, stands = " ".join(garbled(generator, truth)), " ".join(truth)
        rates = {line.name: line.value for line in summarise([count(said, stands)], resamples=1)}
        assert rates["wer"] == pytest.approx(jiwer.wer(stands, said))
        assert rates["cer"] == pytest.approx(jiwer.cer(stands, said))


def test_rates_over_several_texts_are_pooled_as_jiwer_pools_them():
    jiwer = pytest.importorskip("jiwer")
    truths, predictions = ["the cat sat", "on", "the mat and slept"], ["the hat sat", "an old", "mat and sleep"]
    rates = {line.name: line.value for line in summarise(list(map(count, predictions, truths)))}
    assert rates["wer"] == pytest.approx(jiwer.wer(truths, predictions))
    assert rates["cer"] == pytest.approx(jiwer.cer(truths, predictions))


# ------------------------------------------------------------------------------------------------------------- order


def ordered(prediction: str, truth: str) -> dict[str, float]:
    return {line.name: line.value for line in summarise([count_order(prediction, truth)])}


def test_two_columns_read_across_cost_ordered_words_and_no_words():
    truth, across = "a b\nc d\ne f\ng h", "a b\ne f\nc d\ng h"
    assert word_f1(across, truth) == 1.0
    assert ordered(across, truth)["ordered_word_f1"] == pytest.approx(6 / 8)  # a b, one of c d and e f, g h


@pytest.mark.parametrize(
    ("prediction", "lines"),
    [
        ("the cat\nsat down", 2),
        ("the cat sat down", 2),  # where a reader breaks lines does not matter
        ("the cat\nsit down", 1),
        ("The cat\nsat down.", 1),  # case counts, and so does what is put in within a line
        ("xx the cat\nsat down", 2),  # but not what stands before it
        ("", 0),
    ],
)
def test_exact_lines_are_those_that_the_alignment_leaves_whole(prediction, lines):
    found = count_order(prediction, "the cat\nsat down")
    assert found.true_lines == 2
    # "sat down." has all of "sat down" and a full stop behind it
    assert found.exact_lines == lines


def test_a_word_divided_at_the_end_of_a_line_belongs_to_both_lines():
    assert comparable("a recog-\nnised\n\ntext") == "a recognised text"
    assert line_spans("a recog-\nnised\n\ntext") == [(0, 7), (7, 12), (13, 17)]
    assert line_spans("well-\nKnown") == [(0, 5), (5, 10)]  # that hyphen stays
    assert count_order("a recognized text", "a recog-\nnised\ntext").exact_lines == 2


def test_nothing_to_read_and_nothing_read_is_in_order():
    rows = summarise([count_order("", "")])
    assert tuple(line.name for line in rows) == ORDER_FIGURES
    assert [line.value for line in rows] == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------- documents


def test_texts_of_one_document_stand_and_fall_together():
    # 20 documents of 10 texts, each document all right or all wrong: the interval is that of 20, not of 200
    counts = [count("a" if document % 2 else "b", "a") for document in range(20) for _ in range(10)]
    groups = [document for document in range(20) for _ in range(10)]
    alone = summarise(counts)[FIGURES.index("exact")]
    together = summarise(counts, groups=groups)[FIGURES.index("exact")]
    assert alone.value == together.value == 0.5
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, abs=0.03)
    assert together.high - together.low == pytest.approx(2 * 1.96 * 0.5 / 20**0.5, abs=0.06)


def test_one_document_alone_is_drawn_text_by_text():
    counts = [count("a", "a")] * 10 + [count("b", "a")] * 10
    assert summarise(counts, groups=["one"] * 20) == summarise(counts)


def test_a_large_set_is_drawn_in_parts_to_the_same_end():
    table = np.repeat([[1.0], [0.0]], 5000, axis=0)
    value, low, high = pooled(table, lambda sums: sums[:, 1:] / sums[:, :1], resamples=900)[:, 0]
    assert value == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10000**0.5, rel=0.1)
