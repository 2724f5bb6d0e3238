"""What the commands of `unit data` have in common: names of options, what --out means, bad values in one line."""

import pytest

from unit_cli.__main__ import main


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("command", ["from-pdfs", "make-markdown"])
def test_a_set_of_ones_own_never_takes_the_place_of_a_recipes_set(tmp_path, capsys, command):
    (tmp_path / "mine").mkdir()
    assert main(["data", command, str(tmp_path / "mine")]) == 2
    assert "--out FOLDER is needed with SOURCE" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_markdown_of_two_kinds_takes_two_commands(tmp_path, capsys):
    assert main(["data", "make-markdown", "deb:some-doc", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "make two data sets" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["from-pdfs"], ["make-pages", "--count", "1"]])
@pytest.mark.parametrize("value", ["tall", "6-", "-8", "6-8-10"])
def test_x_heights_are_said_alike_everywhere(capsys, command, value):
    with pytest.raises(SystemExit):
        main(["data", *command, f"--x-height={value}"])
    assert "must be a number such as 8 or a range such as 6-12" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["from-pdfs", "validate"])
@pytest.mark.parametrize("value", ["2", "-0.1"])
def test_shares_are_said_alike_everywhere(capsys, command, value):
    with pytest.raises(SystemExit):
        main(["data", command, "x", f"--max-refused={value}"])
    assert f"must lie in 0 ... 1, not {value}" in capsys.readouterr().err
