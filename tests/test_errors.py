"""training/errors.py: what is told of an error is one line, never none."""

from training.errors import first_line


def test_the_first_line_of_a_message_is_told_and_without_a_message_the_type():
    assert first_line(ValueError("  no such set \nTraceback ...")) == "no such set"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
