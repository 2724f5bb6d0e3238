"""training/evaluation/cache.py: what is known again, and what is measured anew."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from training.evaluation import cache as caching
from training.evaluation.cache import Cache, Entry, hash_of, hash_of_code, hash_of_file, json_line, key_of, write_whole
from training.evaluation.contract import Figure

FIGURE = Figure("word_f1", 0.5, 0.4, 0.6, items=7, failed=1, at={"x_height": 7})
ENTRY = Entry([FIGURE], [{"index": 0, "text": "two lines\u2028in one"}], ["a note"], 1.5)


def test_an_entry_comes_back_as_it_was(tmp_path):
    Cache(tmp_path).put("ab12", ENTRY, {"subject": "x"})
    assert Cache(tmp_path).get("ab12") == ENTRY
    assert Cache(tmp_path).get("ab13") is None


@pytest.mark.parametrize(
    ("ending", "damage"), [("json", ""), ("json", "{"), ("json", '{"format": 1}\n'), ("jsonl", ""), ("jsonl", "\xff")]
)
def test_a_damaged_entry_is_no_entry(tmp_path, ending, damage):
    Cache(tmp_path).put("ab12", ENTRY)
    (path,) = tmp_path.rglob(f"*.{ending}")
    path.write_bytes(damage.encode("latin-1"))
    assert Cache(tmp_path).get("ab12") is None
    Cache(tmp_path).put("ab12", ENTRY)
    assert Cache(tmp_path).get("ab12") == ENTRY


def test_an_entry_of_another_format_is_no_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "FORMAT", 0)
    Cache(tmp_path).put("ab12", ENTRY)
    monkeypatch.undo()
    assert Cache(tmp_path).get("ab12") is None


def test_runs_beside_each_other_leave_a_whole_entry_and_nothing_else(tmp_path):
    entries = [Entry([FIGURE], [{"index": n}] * 300) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: Cache(tmp_path).put("ab12", entry), entries * 4))
    assert len(Cache(tmp_path).get("ab12").items) == 300
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["ab12.json", "ab12.jsonl"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("results.json", "old")]


def test_a_key_does_not_depend_on_the_order_but_on_everything():
    assert key_of({"a": 1, "b": [2, 3]}) == key_of({"b": [2, 3], "a": 1})
    assert len({key_of(parts) for parts in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"})}) == 4


def test_an_item_is_one_line_for_every_reader():
    line = json_line({"text": "a\u2028b\x85c\nd"})
    assert line.splitlines() == [line[:-1]]
    assert json.loads(line) == {"text": "a\u2028b\x85c\nd"}


def test_a_hash_is_over_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = hash_of(tmp_path)
    (tmp_path / ".hidden").write_text("1")
    assert hash_of(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert hash_of(tmp_path) != first
    assert hash_of_file(tmp_path / "b") == hashlib.sha256(b"1").hexdigest()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        hash_of(tmp_path / "gone")


def test_a_large_file_is_hashed_once_as_long_as_it_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(caching, "LARGE", 4)
    file = tmp_path / "weights"
    file.write_bytes(b"12345")
    os.utime(file, ns=(1, 1))
    assert hash_of_file(file) == hashlib.sha256(b"12345").hexdigest()
    monkeypatch.setattr(caching, "_hashes", {})  # another process
    file.write_bytes(b"54321")
    os.utime(file, ns=(1, 1))  # same size and time: what it is known by
    assert hash_of_file(file) == hashlib.sha256(b"12345").hexdigest()
    os.utime(file, ns=(2, 2))
    assert hash_of_file(file) == hashlib.sha256(b"54321").hexdigest()
    for memo in (tmp_path / "cache" / "evaluation" / "hashes").iterdir():
        memo.write_text("damaged")
    monkeypatch.setattr(caching, "_hashes", {})
    assert hash_of_file(file) == hashlib.sha256(b"54321").hexdigest()


def test_what_only_shows_figures_does_not_decide_them(monkeypatch):
    seen = []
    monkeypatch.setattr(caching, "hash_of", lambda files: seen.extend(files) or "hash")
    hash_of_code.__wrapped__()
    names = {"/".join(path.parts[-2:]) for path in seen}
    assert {"evaluation/text.py", "evaluation/subjects.py", "modeling_unit/reading_unit.py", "data/text.py"} <= names
    assert not names & {"evaluation/report.py", "evaluation/plots.py", "evaluation/run.py"}
    assert {"data/markdown.py", "data/pictures.py", "data/targets.py", "training/teacher.py"} <= names
    assert not [path for path in seen if "lmms" in path.parts]


def test_notes_name_whoever_the_weights_are_called_now():
    entry = Entry([], notes=["UNIT: x4 is 256 px, as UNITED says."], subject="UNIT")
    assert entry.called("stage 2").notes == ["stage 2: x4 is 256 px, as UNITED says."]
    assert entry.called("UNIT") is entry
