"""What is skipped is counted, and too much of it stops the run."""

import json
import logging

import pytest

from training.data.refusals import Refusals, TooManyRefused


def test_counts_by_source_and_reason_with_few_examples():
    refusals = Refusals(examples=2)
    refusals.accept("scans", 7)
    for number in range(3):
        refusals.add("scans", "image: truncated", f"page {number}")
    refusals.add("scans", "text: empty")
    refusals.accept("memes")
    expected = {
        "scans": {
            "accepted": 7,
            "refused": 4,
            "reasons": {
                "image: truncated": {"count": 3, "examples": ["page 0", "page 1"]},
                "text: empty": {"count": 1, "examples": []},
            },
        },
        "memes": {"accepted": 1, "refused": 0, "reasons": {}},
    }
    assert refusals.as_dict() == json.loads(json.dumps(expected))
    assert (refusals.accepted, refusals.refused) == (8, 4)
    assert str(refusals).splitlines() == [
        "scans: 7 rows, 4 refused: image: truncated 3, text: empty 1",
        "memes: 1 rows, 0 refused",
    ]


def test_the_run_stops_above_the_share_and_names_the_worst():
    refusals = Refusals(max_share=0.05, min_rows=200)
    refusals.accept("good", 1000)
    refusals.accept("bad", 189)
    for number in range(10):  # 10 of 199: above the share, too few to tell
        refusals.add("bad", "image: truncated", f"bad/{number}.png")
    with pytest.raises(TooManyRefused) as stop:
        refusals.add("bad", "text: empty", "bad/11.png")
    assert isinstance(stop.value, ValueError)
    assert str(stop.value) == (
        "bad: 11 of 200 rows were refused, more than the 5% that may be. "
        "Worst: image: truncated (10 times, e.g. bad/0.png); text: empty (1 times, e.g. bad/11.png)"
    )


def test_exactly_the_share_goes_on():
    refusals = Refusals(max_share=0.05, min_rows=20)
    refusals.accept("s", 19)
    refusals.add("s", "r")
    refusals.check()
    with pytest.raises(TooManyRefused):
        refusals.add("s", "r")


def test_the_end_of_a_small_source_is_checked_on_request():
    refusals = Refusals()
    refusals.accept("s", 3)
    refusals.add("s", "r")
    with pytest.raises(TooManyRefused, match="1 of 4 rows"):
        refusals.check()


def test_each_reason_is_logged_once(caplog):
    refusals = Refusals()
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            refusals.add("scans", "image: truncated", f"page {number}")
    assert [record.message for record in caplog.records] == [
        "scans: skipped, image: truncated: page 0 (further ones are counted)"
    ]


def test_examples_are_one_short_line():
    refusals = Refusals()
    refusals.add("s", "r", "a\nb " + "x" * 1000)
    (example,) = refusals.as_dict()["s"]["reasons"]["r"]["examples"]
    assert example.startswith("a b xxx")
    assert len(example) == 200


def test_workers_counts_are_added_up_and_a_run_goes_on_from_its_state():
    one, two = Refusals(max_share=0.5, examples=2), Refusals(max_share=0.5, examples=2)
    one.add("s", "r", "first")
    two.accept("s", 4)
    two.add("s", "r", "second")
    two.add("s", "r", "third")
    one.merge(two)
    assert one.as_dict()["s"] == {
        "accepted": 4, "refused": 3, "reasons": {"r": {"count": 3, "examples": ["first", "second"]}}
    }  # fmt: skip
    resumed = Refusals(max_share=0.5, min_rows=9)
    resumed.load_dict(json.loads(json.dumps(one.as_dict())))
    assert resumed.as_dict() == one.as_dict()
    resumed.add("s", "q")  # 4 of 8
    with pytest.raises(TooManyRefused, match="5 of 9"):
        resumed.add("s", "q")


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 5"):
        Refusals(max_share=5)
