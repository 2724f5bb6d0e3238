"""What docs/evaluation.md says is so: its example runs, and the figures that it names are figures of the code."""

import re

import pytest
from notebook_process import ROOT
from PIL import Image, ImageDraw

from training.evaluation.contract import SUITES, NotMeasured, Work
from training.evaluation.sets import DEFAULT_SETS, NAMED_SETS
from training.evaluation.subjects import ModelSubject
from training.evaluation.text_suite import LIMITS

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_example_of_an_evaluator_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"__name__": "example"}
    exec(compile(code, "docs/evaluation.md", "exec"), names)
    name, *printed = capsys.readouterr().out.split()
    value, low, high = map(float, printed)
    assert name == "mirror_cosine"
    assert low <= value <= high <= 1
    # a picture that is its own mirror image twice, and a file that is none
    for colour in ("red", "white"):
        picture = Image.new("RGB", (64, 64), colour)
        ImageDraw.Draw(picture).rectangle((20, 10, 43, 50), fill="black")  # columns 20 to 43 of 0 to 63
        picture.save(tmp_path / f"{colour}.jpg", quality=100, subsampling=0)
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    evaluator, work = names["Mirrored"](tmp_path), Work()
    subject = ModelSubject(str(ROOT / "modeling_unit" / "checkpoints" / "unit-tiny"))
    (figure,) = evaluator.figures(subject, work)
    assert (figure.items, figure.failed) == (3, 1)
    assert figure.value == pytest.approx(2 / 3, abs=1e-3)
    assert [item["file"] for item in work.items] == ["torn.jpg"]
    first = evaluator.fingerprint()
    (tmp_path / "torn.jpg").unlink()
    assert names["Mirrored"](tmp_path).fingerprint() != first
    with pytest.raises(NotMeasured, match=r"there are no \.jpg files"):
        names["Mirrored"](tmp_path / "empty").fingerprint()


def figures_named() -> list[str]:
    """What stands in backticks in the first column of tables headed `figure`, and in the tables of scale and cost."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        header, _, *rows = table.splitlines()
        columns = [cell.strip() for cell in header.strip("|").split("|")]
        for word, place in (("figure", 0), ("measure", 0), ("figures", 1)):
            if place < len(columns) and columns[place] == word:
                found += [name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row.split("|")[1 + place])]
    return sorted(set(found))


def test_the_figures_of_the_page_are_those_of_the_code():
    sources = [*(ROOT / "training" / "evaluation").rglob("*.py"), *(ROOT / "training" / "evaluation").rglob("*_yaml")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in sources)
    written = set(re.findall(r'f?"([a-z_0-9{}]+)"', code)) | set(re.findall(r"metric: ([a-z_]+)", code))
    # names with a part that is filled in: f"zero_shot_top{top}", f"gain_{name}"
    patterns = [re.compile(re.sub(r"\\{[a-z_]+\\}", "[a-z_0-9]+", re.escape(one))) for one in written]
    patterns = [one for one in patterns if len(re.sub(r"\[.*?\]\+", "", one.pattern)) > 2]
    named = figures_named()
    assert len(named) > 70
    assert [name for name in named if not any(pattern.fullmatch(name) for pattern in patterns)] == []
    assert not any(pattern.fullmatch("word_f2") or pattern.fullmatch("mean_cosine") for pattern in patterns)


def test_every_suite_has_its_section():
    for suite in SUITES:
        assert re.search(rf"^## {suite.capitalize()}$", PAGE, re.MULTILINE), suite


def test_the_sets_of_the_page_are_those_that_are_read_with_their_numbers():
    for name in (*DEFAULT_SETS, *NAMED_SETS):
        assert re.search(rf"^\|[^|]*`{name}`", PAGE, re.MULTILINE), name
    for name, limit in LIMITS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
        assert re.search(rf"[ |]{limit}( read)? \|$", row), f"{name}: {limit} are read"
