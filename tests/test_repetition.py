"""Loops end a row of a batch; leaders, rules and tables do not."""

from __future__ import annotations

import pytest
import torch

from modeling_unit.repetition_unit import RepetitionStopper, stutters, trim_repetition

PROMPT = [2] * 70 + [3]  # image placeholders look like a loop, and are not looked at


def codes(text):
    return [10 + byte for byte in text.encode()]


def fired_at(text, **settings):
    """How many pieces were out when a row that goes `text` was stopped, None if it never was."""
    stopper = RepetitionStopper(len(PROMPT), **settings)
    ids = codes(text)
    for length in range(1, len(ids) + 1):
        if stopper(torch.tensor([PROMPT + ids[:length]]))[0]:
            return length
    return None


def test_a_phrase_said_again_and_again_is_stopped():
    phrase = "the cat sat on the mat, "  # 24 pieces
    assert fired_at("Once upon a time " + phrase * 20) == 112  # 16 + 4 * 24: the blank before belongs to it


def test_a_single_letter_without_end_is_stopped():
    assert fired_at("the e" + "e" * 400) in range(160, 172)


@pytest.mark.parametrize(
    "text",
    [
        "1.2 Reading order " + "." * 120 + " 17",
        "Preface " + ". " * 70 + "iii",
        "+" + "-" * 120 + "+",
        "| 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |\n" * 2,
        "yes, yes, yes, yes, yes, he said, and yes again",
        "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    ],
)
def test_leaders_rules_tables_and_prose_are_read_to_their_end(text):
    assert fired_at(text) is None
    assert trim_repetition(codes(text)) == (codes(text), False)


def test_only_the_row_that_loops_is_stopped_and_stays_so():
    stopper = RepetitionStopper(0, min_length=12, leader_length=12, every=1)
    loop, other = [1, 2, 3] * 4, list(range(10, 22))
    assert stopper(torch.tensor([loop[:11], other[:11]])).tolist() == [False, False]
    assert stopper(torch.tensor([loop, other])).tolist() == [True, False]
    # what generate pads a finished row with does not wake it up again
    assert stopper(torch.tensor([[*loop, 0], [*other, 22]])).tolist() == [True, False]
    assert stopper.fired.tolist() == [True, False]


def test_a_loop_needs_its_number_of_copies():
    settings = {"min_length": 8, "min_repeats": 4, "leader_length": 8}
    assert trim_repetition([9, *[1, 2, 3] * 3], **settings) == ([9, *[1, 2, 3] * 3], False)
    assert trim_repetition([9, *[1, 2, 3] * 4], **settings) == ([9, 1, 2, 3], True)


def test_one_copy_of_what_was_repeated_is_kept():
    text = "As he said: " + "never again. " * 12
    kept, looped = trim_repetition(codes(text))
    assert looped
    assert kept == codes("As he said: never again.")


def test_a_loop_broken_off_in_the_middle_is_trimmed_all_the_same():
    kept, looped = trim_repetition(codes("Then " + "round and round " * 9 + "round a"))
    assert looped
    assert kept == codes("Then round and round")


def test_periods_longer_than_the_limit_are_let_be():
    line = "".join(chr(33 + i) for i in range(40))
    assert trim_repetition(codes(line * 6))[1] is False
    assert trim_repetition(codes(line * 6), max_period=40) == (codes(line), True)


def test_nothing_is_trimmed_from_nothing():
    assert trim_repetition([]) == ([], False)


@pytest.mark.parametrize("settings", [{"min_repeats": 1}, {"max_period": 0}, {"min_length": 0}, {"every": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="RepetitionStopper"):
        RepetitionStopper(0, **settings)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("While the file the file was small", True),
        ("the end of the line at the end of the line at the", True),
        ("he had had enough", False),  # a word twice is English
        ("very very very small", True),
        ("1 2 1 2 1 2 1 2", False),  # a table's row
        ("- - - - - - - -", False),
        (". . . . . . . . 17", False),
        ("of the of the", False),  # too short to tell
        ("", False),
    ],
)
def test_a_phrase_twice_in_a_row_is_a_stutter(text, found):
    assert stutters(text) is found
