"""What a stranger gets: the wheel's contents, the pins, the commands, and a README that leaves nothing out."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else ""
CHECKPOINTS = ROOT / "modeling_unit" / "checkpoints"


@pytest.fixture(scope="module")
def distribution():
    """setup.py as setuptools sees it, nothing built."""
    from distutils.core import run_setup  # setuptools provides it where Python no longer does

    here, arguments = os.getcwd(), sys.argv
    os.chdir(ROOT)
    try:
        yield run_setup("setup.py", stop_after="init")
    finally:
        os.chdir(here)
        sys.argv = arguments


@pytest.fixture(scope="module")
def wheel_files(distribution) -> set[Path]:
    """Every file that the wheel would hold, relative to the repository."""
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    modules = {Path(path) for _, _, path in command.find_all_modules()}
    data = {Path(source) / name for _, source, _, names in command.data_files for name in names}
    return {path.relative_to(ROOT) if path.is_absolute() else path for path in modules | data}


def requirements(distribution) -> dict[str, list[Requirement]]:
    """By name: every requirement of the base and of the extras."""
    found: dict[str, list[Requirement]] = {}
    for line in [
        *distribution.install_requires,
        *(line for lines in distribution.extras_require.values() for line in lines),
    ]:
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def make(*arguments: str) -> subprocess.CompletedProcess:
    """`make` as typed by hand, also where the suite itself runs under `make test`."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def tracked_folders() -> list[str]:
    """Top-level folders that belong to the project, hidden ones and what the tools leave behind aside."""
    ignored = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    names = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    return sorted(name for name in names if name not in ignored and not name.endswith(".egg-info"))


# --------------------------------------------------------------------------------------------------------------- wheel


def test_the_wheel_holds_every_module(wheel_files):
    packages = ("modeling_unit", "configuration_unit", "training", "unit_cli", "spaces_demo")
    written = {
        path.relative_to(ROOT)
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if CHECKPOINTS not in path.parents
    }
    assert written
    assert written - wheel_files == set()


def test_the_wheel_holds_nothing_of_the_repository_but_its_packages(wheel_files):
    assert {path.parts[0] for path in wheel_files} == {
        "modeling_unit",
        "configuration_unit",
        "training",
        "unit_cli",
        "spaces_demo",
    }


def test_the_wheel_holds_every_file_of_the_shipped_checkpoint(wheel_files):
    folder = CHECKPOINTS / "unit-tiny"
    shipped = {
        path.relative_to(ROOT) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert folder.relative_to(ROOT) / "config.json" in shipped
    assert any(path.suffix == ".safetensors" for path in shipped)
    assert shipped - wheel_files == set()


def test_the_shipped_checkpoint_is_small_and_holds_no_pickle():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 30e6
    assert [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")] == []


def test_the_wheel_holds_samples_recipes_and_lists(wheel_files):
    wanted = [path for path in (ROOT / "spaces_demo" / "samples").rglob("*") if path.is_file()]
    wanted += list((ROOT / "training" / "recipes").rglob("*.yaml"))
    wanted += list((ROOT / "training" / "data").glob("*.yaml"))
    assert len(wanted) > 6
    assert {path.relative_to(ROOT) for path in wanted} - wheel_files == set()


def test_the_command_unit_is_importable(distribution):
    (script,) = distribution.entry_points["console_scripts"]
    name, target = (part.strip() for part in script.split("="))
    module, function = target.split(":")
    assert name == "unit"
    assert callable(getattr(import_module(module), function))


# -------------------------------------------------------------------------------------------------------- requirements


def test_every_requirement_has_a_minimum_with_a_reason(distribution):
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name, wanted in requirements(distribution).items():
        for requirement in wanted:
            assert [one.operator for one in requirement.specifier] == [">="], f"{name}: a minimum and nothing else"
            line = next(line for line in source.splitlines() if f'"{requirement}"' in line)
            assert re.search(r",  # \S", line), f"no reason beside {requirement}"


def test_every_requirement_is_pinned_to_a_version_that_it_allows(distribution):
    pinned: dict[str, list[Requirement]] = {}
    for pin in pins():
        pinned.setdefault(canonicalize_name(pin.name), []).append(pin)
    for name, wanted in requirements(distribution).items():
        assert name in pinned, f"{name} is missing from constraints.txt"
        for pin in pinned[name]:
            (only,) = pin.specifier
            assert only.operator == "=="
            assert all(requirement.specifier.contains(Version(only.version)) for requirement in wanted), str(pin)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_each_python_has_at_most_one_pin_of_each_package(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    names = [canonicalize_name(pin.name) for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    assert sorted(names) == sorted(set(names))
    assert "torch" in names


def test_torch_is_pinned_to_the_tested_release():
    assert [str(pin) for pin in pins() if pin.name == "torch"] == ["torch==2.13.0"]


def test_no_file_for_installation_names_a_package_index():
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "MANIFEST.in"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|index-url|find-links|pypi\.|pythonhosted", text), name


# ------------------------------------------------------------------------------------------------------------ commands


def test_make_help_lists_every_target():
    source = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", source, re.MULTILINE).group(1).split()
    printed = make("help").stdout
    assert [line.split()[1] for line in printed.splitlines()] == phony


def test_make_says_which_python_it_needs_when_it_gets_an_older_one(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make("test", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert f"UNIT needs Python 3.10 or newer, and {old} is Python 3.9.1." in done.stderr
    assert "make test PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_exactly_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if "make" in line and line[0] != "#"]
    assert commands == ["exec make test </dev/null"]


@pytest.mark.skipif(shutil.which("git") is None, reason="asks git which files it would take")
def test_git_takes_the_evaluation_package_and_leaves_its_reports():
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0

    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode != 0:
        pytest.skip("not a git checkout")
    assert not ignored("training/evaluation/text.py")
    assert not ignored("modeling_unit/checkpoints/unit-tiny/model.safetensors")
    assert ignored("evaluation/report.md")
    assert ignored("demo_output/page.png")


# -------------------------------------------------------------------------------------------------------------- README


def test_the_readme_names_every_top_level_folder():
    missing = [name for name in tracked_folders() if f"{name}/" not in README]
    assert missing == []


def test_the_readme_names_every_recipe():
    recipes = sorted(path.name for path in (ROOT / "training" / "recipes").rglob("*.yaml"))
    assert recipes
    assert [name for name in recipes if name not in README] == []


def test_the_readme_opens_with_the_two_commands():
    opening = README[:3000]
    assert "make demo" in opening
    assert "make test" in opening


def test_files_that_a_reader_of_the_readme_can_open_exist():
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", README)
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (ROOT / target).exists()] == []
