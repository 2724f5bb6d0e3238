"""A few dozen damaged files; `python -m benchmarks.fuzz_readers` reads thousands."""

import os
import signal

import pytest

from benchmarks import fuzz_readers
from benchmarks.fuzz_readers import KINDS, Kind, damaged_file, run


@pytest.mark.parametrize("name", sorted(KINDS))
def test_damaged_files_are_read_or_refused(name, tmp_path):
    kind = KINDS[name]
    count = 50
    outcome = run(kind, count, seed=7, folder=tmp_path, progress=False)
    assert outcome.faults == []
    assert sum(outcome.outcomes.values()) == count
    assert len(outcome.outcomes) >= 3  # read, refused, and something between: the damage is of all sizes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_files_to_start_from_are_good(name, tmp_path):
    kind = KINDS[name]
    said = []
    for number, content in enumerate(kind.seeds()):
        path = tmp_path / f"{number}{kind.suffix}"
        path.write_bytes(content)
        said.append(kind.read(path))
    assert "read" in said
    assert not any(each.startswith("refused") for each in said)


def test_a_number_and_a_seed_make_a_file():
    seeds = KINDS["pdf"].seeds()[:2]
    files = [damaged_file(seeds, number, 0) for number in range(20)]
    assert files == [damaged_file(seeds, number, 0) for number in range(20)]
    assert len(set(files)) > 15
    assert files != [damaged_file(seeds, number, 1) for number in range(20)]


def test_a_reader_that_raises_or_crashes_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_readers, "SECONDS", 5.0)

    def read(path):
        if path.name.startswith("0000001"):
            raise KeyError("boxes")
        if path.name.startswith("0000002"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return "read"

    outcome = run(Kind(lambda: [b"abc"], read, ".bin"), 4, folder=tmp_path, progress=False)
    assert outcome.outcomes == {"read": 2, "FAULT: error": 1, "FAULT: crash": 1}
    assert "file 1 of seed 0: error, KeyError: 'boxes'" in outcome.faults[0]
    assert "SIGSEGV" in outcome.faults[1]
