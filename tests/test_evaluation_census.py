"""training/evaluation/census.py: every class of failure on readings written by hand."""

from dataclasses import dataclass, replace

import pytest
from PIL import Image

from training.evaluation.census import (
    Census,
    PicturesWithoutText,
    alone,
    disorder,
    ends_early,
    examine,
    find,
    is_invented,
    lines_of,
    loop_of,
    summarise_census,
)
from training.evaluation.contract import NotMeasured, TextSample, Work
from training.evaluation.readings import Reading
from training.evaluation.subjects import REPETITION, ReadText

LINES = [
    "The quick brown fox jumps",
    "over a lazy sleeping dog",
    "while seven wizards mix",
    "their boiling purple potions",
    "behind the village church",
    "until midnight bells ring",
]
TEXT = "\n".join(LINES)


def reading(prediction: str, truth: str = TEXT, index: int = 0, **more) -> Reading:
    return Reading(index, more.pop("source", ""), 10.0, truth, prediction, **more)


def failures(prediction: str, truth: str = TEXT, **more) -> list[str]:
    return examine(reading(prediction, truth, **more)).failures


def values(*readings: Reading, remarks: bool = False) -> dict[str, float]:
    figures = summarise_census(readings, [examine(one) for one in readings], remarks, {})
    return {figure.name: figure.value for figure in figures}


# -------------------------------------------------------------------------------------------------------------- lines


def test_a_good_reading_has_no_failure():
    assert failures(TEXT) == []
    assert failures(TEXT.replace("\n", " ").upper()) == []  # neither case nor where lines are broken
    assert failures(TEXT.replace("quick", "qu1ck").replace("e", "c")) == []  # garbled is not skipped
    assert values(reading(TEXT)) == {
        "unread": 0.0,
        "repetition": 0.0,
        "truncated": 0.0,
        "skipped_lines": 0.0,
        "invented_lines": 0.0,
        "wrong_order": 0.0,
    }


def test_short_lines_are_not_looked_for_and_long_ones_are_cut():
    assert lines_of("Page 3\n1 2 3 4\nThe quick brown fox") == ["the quick brown fox"]
    long = "one two three four five " * 10
    assert [len(piece) <= 100 for piece in lines_of(long)] == [True] * 3
    assert " ".join(lines_of(long)) == long.strip()


def test_a_text_shorter_than_the_line_is_no_proof_of_the_line():
    assert find("the quick brown fox", "the").alike < 0.5
    assert find("quick brown", "the quick brown fox") == (1.0, 9.5)


def test_a_skipped_block_is_counted_line_by_line():
    without = "\n".join(LINES[:2] + LINES[4:])
    assert failures(without) == ["skipped"]
    finding = examine(reading(without))
    assert finding.skipped == [line.lower() for line in LINES[2:4]]
    assert values(reading(without))["skipped_lines"] == pytest.approx(2 / 6)
    assert values(reading(without))["invented_lines"] == 0.0


def test_lines_that_stand_nowhere_are_invented():
    prediction = TEXT + "\nCopyright holders grant nothing\nAll rights are reserved forever"
    assert failures(prediction) == ["invented"]
    assert values(reading(prediction))["invented_lines"] == pytest.approx(2 / 8)
    assert values(reading(prediction))["skipped_lines"] == 0.0


def test_shares_of_lines_are_pooled_over_images():
    half = "\n".join(LINES[:2])
    pooled = values(reading(half, half), reading("\n".join(LINES[:5])))
    assert pooled["skipped_lines"] == pytest.approx(1 / 8)


def test_columns_read_across_are_in_the_wrong_order():
    # one column of three lines beside another: 1 4 2 5 3 6 has three of fifteen pairs the other way round
    across = "\n".join(LINES[n] for n in (0, 3, 1, 4, 2, 5))
    assert failures(across) == ["wrong order"]
    assert values(reading(across))["wrong_order"] == pytest.approx(3 / 15)


def test_lines_read_across_two_columns_are_not_invented():
    across = "\n".join(f"{LINES[n]} {LINES[n + 3]}" for n in range(3))
    assert failures(across) == ["wrong order"]
    assert is_invented("the quick brown fox and nothing else that stands anywhere", TEXT.lower())  # a third of it is


def test_order_is_the_mean_of_images_that_have_pairs():
    one_line = reading(LINES[0], LINES[0])
    reverse = reading("\n".join(reversed(LINES)))
    assert values(one_line, reverse, reading(TEXT))["wrong_order"] == pytest.approx((1 + 0) / 2)


def test_disorder_is_kendalls_distance():
    assert disorder([1, 2, 3, 4]) == (0, 6)
    assert disorder([4, 3, 2, 1]) == (6, 6)
    assert disorder([1, 1, 2]) == (0, 3)  # at one place is no other order
    assert disorder([5]) == (0, 0)


def test_a_sentence_repeated_across_lines_says_nothing_of_order():
    # as a test page of scanners has it: each line begins elsewhere in the same sentence
    words = ["pack", "my", "box", "with", "five", "dozen", "liquor", "jugs", "now", "and"]
    lines = [" ".join((words * 2)[start : start + 7]) for start in (0, 7, 4, 1)]
    assert sum(alone(lines)) == 0
    assert alone(LINES) == [True] * 6


def test_lines_that_are_nearly_the_same_say_nothing_of_order():
    truth = "Total amount paid in 2019\nThe quick brown fox\nTotal amount paid in 2018"
    prediction = "Total amount paid in 2018\nThe quick brown fox\nTotal amount paid in 2019"
    assert examine(reading(prediction, truth)).order is None


# --------------------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("it is " + "very well " * 5 + "here", "very well "),
        ("very well " * 3, ""),  # thrice is not four times
        ("no no no no no", ""),  # four times, and too short to be sure
        ("." * 60, "."),
        ("." * 50, ""),  # a row of dots in a table of contents
        (". " * 20, ""),
        (". " * 30, ". "),
        ("abcdefghij klmnop qrstuv wxyz", ""),
        ("", ""),
    ],
)
def test_a_loop_is_four_copies_and_long_in_all(text, loop):
    found = loop_of(text)
    assert sorted(found) == sorted(loop)  # wherever the cut between copies is made


def test_a_loop_that_the_truth_has_too_is_read_and_not_a_failure():
    looping = TEXT + "\n" + "all work and no play " * 6
    assert "repetition" in failures(looping)
    assert "repetition" not in failures(looping, looping)
    assert values(reading(looping), reading(TEXT))["repetition"] == 0.5


def test_what_the_reader_says_of_itself_is_counted_for_readers_that_say_it():
    told = values(reading(TEXT, remarks=(REPETITION,)), reading(TEXT), remarks=True)
    assert (told["repetition_stopped"], told["reader_truncated"]) == (0.5, 0.0)
    assert "repetition_stopped" not in values(reading(TEXT))


# ---------------------------------------------------------------------------------------------------- early and never


def test_a_reading_that_breaks_off_is_truncated():
    assert failures("\n".join(LINES[:3])) == ["truncated", "skipped"]
    assert "truncated" not in failures("\n".join(LINES[3:]))  # the beginning is missing
    assert values(reading("\n".join(LINES[:3])), reading(TEXT))["truncated"] == 0.5


def test_what_ends_early():
    ends = [0.2, 0.4, 0.6, 0.8, 1.0]
    assert ends_early([True, True, True, False, False], ends, read=60, true=100)
    assert not ends_early([True, True, True, True, False], ends, read=80, true=100)  # one line at most is missing
    assert not ends_early([True, True, True, False, False], ends, read=95, true=100)  # something else was read instead
    assert not ends_early([False] * 5, ends, read=10, true=100)  # nothing was found at all
    assert not ends_early([True, False, False, False], [0.2, 0.4, 0.7, 1.0], read=20, true=100)  # too few lines to say


def test_no_word_at_all_is_unread_and_not_skipped_line_by_line():
    assert failures("") == failures("- .") == ["unread"]
    assert failures("", error="RuntimeError: no") == ["failed"]
    told = values(reading(""), reading(TEXT), reading("", error="RuntimeError: no"))
    assert told["unread"] == pytest.approx(2 / 3)
    assert told["skipped_lines"] == 0.0


# ------------------------------------------------------------------------------------------------------------ no text


def test_any_mark_on_blank_paper_is_invented():
    assert failures("", "") == failures(" \n", "") == []
    assert failures(".", "") == ["invented text"]
    told = values(
        reading("", ""), reading("Hello you", ""), reading("", "", error="RuntimeError: no"), reading("", "")
    )
    assert told == {"empty_share": 0.5, "invented_characters": 9 / 4}


# ---------------------------------------------------------------------------------------------------------- evaluator


@dataclass
class Set:
    content: list[TextSample]
    name: str = "made"
    heights: tuple[float, ...] = ()
    markdown: bool = False
    missing: str = ""

    def fingerprint(self):
        if self.missing:
            raise NotMeasured(self.missing)
        return {"set": self.name}

    def samples(self, limit=None):
        return self.content[:limit]


class Subject:
    """Reads what it is told by the text that stands there."""

    name, role, path, device = "reader", "model", "reader", "cpu"
    makes_remarks = True

    def __init__(self, answers):
        self.answers, self.calls = answers, 0

    def hash(self):
        return "reader"

    def readings(self, samples):
        self.calls += 1
        return [ReadText(self.answers.get(one.text, one.text)) for one in samples]


def samples(*texts: str, x_height: float = 10.0) -> list[TextSample]:
    image = Image.new("RGB", (8, 8))
    return [TextSample(n, image, text, x_height, f"source {n}") for n, text in enumerate(texts)]


def test_figures_are_per_set_and_over_all_and_items_say_their_failures():
    blank, blocks = Set(samples("", ""), "blank"), Set(samples(TEXT, LINES[0]), "blocks")
    work = Work(progress=False)
    figures = list(Census([(blocks, None), (blank, None)]).figures(Subject({"": "boo", TEXT: ""}), work))
    found = {(figure.name, figure.at.get("set")): figure.value for figure in figures}
    assert found["unread", "blocks"] == 0.5 == found["unread", None]
    assert found["empty_share", "blank"] == 0.0
    assert ("empty_share", "blocks") not in found
    assert [(item["set"], item["failure"]) for item in work.items] == [
        ("blocks", ["unread"]),
        ("blank", ["invented text"]),
        ("blank", ["invented text"]),
    ]
    assert work.notes == ["Images by class of failure, of 4: invented text 2, unread 1."]


def test_type_too_small_to_read_is_left_out_where_the_same_is_there_in_larger_type():
    small, large = samples(TEXT, x_height=4.0)[0], samples(TEXT, x_height=7.0)[0]
    work, reader = Work(progress=False), Subject({TEXT: ""})
    figures = {f.name: f for f in Census([(Set([small, large], heights=(7.0, 4.0)), None)]).figures(reader, work)}
    assert figures["unread"].items == 1
    alone = {f.name: f for f in Census([(Set([small, large], "other"), None)]).figures(reader, work)}
    assert alone["unread"].items == 2  # of type as it comes all counts


def test_markdown_counts_without_its_markup():
    page = Set(samples("# The quick brown fox\n\n- over a *lazy* sleeping dog"), markdown=True)
    reader = Subject({page.content[0].text: "The quick brown fox\nover a lazy sleeping dog"})
    work = Work(progress=False)
    list(Census([(page, None)]).figures(reader, work))
    assert work.items == []


def test_a_set_that_is_not_there_is_a_note_and_none_at_all_is_not_measured():
    gone = Set([], "gone", missing="gone: no data set; `make data` builds it")
    census = Census([(gone, None), (Set(samples(TEXT)), None)])
    work = Work(progress=False)
    assert census.fingerprint() == {"sets": [{"set": {"set": "made"}, "limit": None}]}
    assert list(census.figures(Subject({}), work))
    assert work.notes[0] == "gone: no data set; `make data` builds it"
    with pytest.raises(NotMeasured, match="gone: no data set"):
        Census([(gone, None)]).fingerprint()


def test_pictures_without_text_leave_lettered_kinds_out():
    class Pictures:
        fingerprint = "abc"
        rows = [{"concept": kind} for kind in ("owl", "ambulance", "castle", "zebra")]

        def picture(self, index, side):
            if index == 3:
                raise OSError("truncated file")
            return Image.new("RGB", (side, side))

    found = PicturesWithoutText(Pictures()).samples()
    assert [(one.index, one.text, one.source) for one in found] == [
        (0, "", "owl"),
        (2, "", "castle"),
        (3, "", "zebra"),
    ]
    assert (found[2].image, found[2].error) == (None, "OSError: truncated file")
    assert [one.index for one in PicturesWithoutText(Pictures()).samples(1)] == [0]


def test_a_reading_is_not_changed_by_being_looked_at():
    one = reading("\n".join(LINES[:3]))
    examine(one)
    assert one == replace(one)
