"""What the documentation says is so: its commands parse, what they name is there, recipes open as they should, and the
notebook's outputs are those of its code."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from notebook_process import ROOT, code_cells, code_digest

from training.evaluation import run as evaluation
from training.recipe import read_recipe
from unit_cli.__main__ import parser

# the changelog tells of what was
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
)
# files below ablations/ are grids of recipes: test_ablations.py
RECIPES = [
    path for path in sorted((ROOT / "training" / "recipes").glob("**/*.yaml")) if path.parent.name != "ablations"
]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
# folders of the repository: what a command names below them must be there, unless the command makes it
OURS = ("training/", "docs/", "spaces_demo/", "modeling_unit/", "benchmarks/", "tests/")
MADE = ("--out", "--pca")


def commands(text: str) -> tuple[list[str], list[str]]:
    """The commands of a page: those on lines of their own, whole; those in running text, which may leave parts out."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^\s*(?:\$ )?(unit [a-z-]+ .+)$", joined, re.MULTILINE)
    whole = [re.sub(r"\s+#\s.*", "", line) for line in lines if "`" not in line]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return whole, [" ".join(code.split()) for code in re.findall(r"`(unit [^`]+)`", prose)]


def tried(command: str) -> list[str]:
    """The arguments of a command as a reader would fill them in: nothing for what is optional, a number for a capital
    letter."""
    plain = re.sub(r"\[[^\]]*\]", "", command).replace("…", "")
    return ["8" if re.fullmatch("[A-Z]", word) else word for word in shlex.split(plain)[1:]]


def accepted(arguments: list[str], monkeypatch) -> bool:
    """Whether the command line takes them; nothing is run."""
    if arguments[:1] == ["evaluate"]:
        monkeypatch.setattr(evaluation, "run", lambda given: 0)
        try:
            return evaluation.main(arguments[1:]) == 0
        except SystemExit as stop:
            return stop.code == 0
    try:
        parser().parse_args(arguments)
    except SystemExit as stop:
        return stop.code == 0
    return True


def help_of(command: str, monkeypatch, capsys) -> str:
    words = re.findall(r"[a-z][a-z-]*", command.partition(" --")[0])[1:]
    capsys.readouterr()
    accepted([*words[: 2 if words[:1] == ["data"] else 1], "--help"], monkeypatch)
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_documentation_parse(page, monkeypatch, capsys):
    whole, named = commands(page.read_text(encoding="utf-8"))
    for command in whole:
        assert accepted(tried(command), monkeypatch), f"{command}\n{capsys.readouterr().err}"
    for command in [*whole, *named]:  # what is optional, too
        for option in re.findall(r"(?<=[\[ |(])--[a-z][a-z-]+", command):
            assert option in help_of(command, monkeypatch, capsys), f"{command}: no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_commands_of_the_documentation_name_is_there(page):
    whole, _ = commands(page.read_text(encoding="utf-8"))
    for command in whole:
        words = tried(command)
        for before, word in zip(["", *words], words, strict=False):
            if word.startswith(OURS) and before not in MADE:
                assert (ROOT / word).exists(), f"{command}: no {word}"
        if words[0] in ("train", "plan") and words[1].startswith(OURS):
            read_recipe(ROOT / words[1], [word for word in words if re.match(r"[a-z_.]+=", word)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_documentation_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", link):
            assert (page.parent / link).exists(), link


def test_commands_that_are_wrong_are_seen(monkeypatch, capsys):
    page = "```\nunit train a.yaml \\\n  --acept-changes  # why\n```\n`unit data make-pages --sise S` and `unit demo`."
    (whole,), named = commands(page)
    assert (whole, named) == ("unit train a.yaml --acept-changes", ["unit data make-pages --sise S", "unit demo"])
    assert not accepted(tried(whole), monkeypatch)
    assert accepted(tried("unit data make-pages --count N [--sise S] --out DIR"), monkeypatch)
    assert tried("unit data make-pages --count N [--sise S]") == ["data", "make-pages", "--count", "8"]
    given = help_of("unit data make-pages --sise S", monkeypatch, capsys)
    assert "--sise" not in given
    assert "--size" in given
    assert "--peers" in help_of("unit evaluate MODEL --peers tesseract", monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_targets_of_the_documentation_are_there(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for module in re.findall(r"python -m ((?:benchmarks|training|spaces_demo|unit_cli)[a-z_.]*)", text):
        place = ROOT / module.rstrip(".").replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), module
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_opens_with_its_command_its_source_and_its_plan_or_what_it_ends_at(path):
    text = path.read_text(encoding="utf-8")
    opening = re.match(r"(?:#.*\n)+", text)[0]
    assert opening.startswith(f"# unit train {path.relative_to(ROOT)}\n")
    assert re.search(r"^# Source: \S", opening, re.MULTILINE)
    assert re.search(r"^# (Its plan|Ends at)\b", opening, re.MULTILINE)
    for command in re.findall(r"^# unit plan (\S+) --hardware", opening, re.MULTILINE):
        assert command == str(path.relative_to(ROOT))
    for log in re.findall(r"docs/training/[\w-]+", opening):
        assert (ROOT / log).is_dir(), log
    assert read_recipe(path).training["max_steps"] > 0


# -- the notebook ---------------------------------------------------------------------------------------------------


def outputs(notebook: dict) -> list[list[dict]]:
    return [cell["outputs"] for cell in code_cells(notebook)]


def shown(given: list[list[dict]]) -> list[int]:
    """How many pictures each cell shows."""
    return [sum("image/png" in output.get("data", {}) for output in cell) for cell in given]


def printed(given: list[list[dict]]) -> str:
    return "".join("".join(output.get("text", "")) for cell in given for output in cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_what_its_code_gave(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["executed"] == code_digest(notebook), (
        f"its code has changed since it was run: python tests/notebook_process.py {path.relative_to(ROOT)} --write"
    )
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert sum(shown(outputs(notebook))) >= 3
    assert path.stat().st_size < 1_500_000
    assert not re.search(r"/(root|home|work|tmp)/", printed(outputs(notebook)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    """In a process of its own, offline, in a folder that goes with it."""
    command = [sys.executable, str(ROOT / "tests" / "notebook_process.py"), str(path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    before, now = (outputs(json.loads(file.read_text(encoding="utf-8"))) for file in (path, tmp_path / "run"))
    assert shown(now) == shown(before)
    text = printed(now)
    uninterrupted, gone_on = re.search(r"last loss: (\S+) uninterrupted, (\S+) gone on", text).groups()
    assert uninterrupted == gone_on
    for words in ("Going on from stage1/checkpoint-3", "0 of 3 documents refused", "checked; nothing was uploaded"):
        assert words in text
    # it reads a page that it has not seen: the checkpoint that it starts from can, and a few small steps leave it so
    words = ("quay", "market", "spring", "loaves", "church", "baskets", "nets", "storm")
    assert sum(word in text for word in words) >= 5
