"""normalize_text, join_lines and words, against examples worked out by hand."""

import pytest

from training.data.text import join_lines, normalize_character, normalize_text, words


@pytest.mark.parametrize(
    ("printed", "wanted"),
    [
        ("e\ufb03cient \ufb02ow", "efficient flow"),  # ligatures
        ("\u201cquoted\u201d \u2018so\u2019", "\"quoted\" 'so'"),
        ("1914\u20131918 \u2014 \u22125", "1914-1918 - -5"),
        ("and so on\u2026", "and so on..."),
        ("a\u00a0b   c\t d", "a b c d"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("\u27e8name\u27e9", "<name>"),
        ("e\u0301", "\u00e9"),  # a letter and its accent become one character
        ("\uff21\uff11", "A1"),  # full-width forms
        ("5\u2032 and 6\u2033", "5' and 6\""),
        ("x\u00b2", "x2"),
        ("one \r\n two\rthree\n", "one\ntwo\nthree"),
        ("", ""),
    ],
)
def test_normalize_text_spells_alike_what_looks_alike(printed, wanted):
    assert normalize_text(printed) == wanted


def test_normalising_twice_changes_nothing():
    text = normalize_text("\u00bdx \u2126 \u00b4 \u02dc \ufb01 \u2026 \u2013 \u00a8 \u2122")
    assert normalize_text(text) == text


def test_characters_keep_their_spaces():
    assert normalize_character("\u00a0") == " "
    assert normalize_character("\ufb03") == "ffi"


@pytest.mark.parametrize(
    ("lines", "joined"),
    [
        ("recog-\nnises", "recognises"),
        ("a break\nbetween words", "a break between words"),
        ("in TeX-\nLive", "in TeX-Live"),  # a capital follows: a compound
        ("pages 3-\n5", "pages 3-5"),
        ("a dash -\nthen more", "a dash - then more"),
        ("ends -", "ends -"),
    ],
)
def test_join_lines_undoes_line_breaks(lines, joined):
    assert join_lines(lines) == joined


def test_words_are_lower_case_runs_of_letters_and_digits():
    assert words("The 2nd e-mail: Ab_c!") == ["the", "2nd", "e", "mail", "ab", "c"]
    assert words("Fran\u00e7ois") == ["fran\u00e7ois"]
    assert words(" -- ") == []
