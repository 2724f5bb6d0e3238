"""Packages by name: what is unpacked, and what is said when it cannot be had."""

import io
import subprocess
import tarfile

import pytest

from training.data import sources


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_the_environment_says(cache):
    assert sources.cache_root() == cache
    assert cache.is_dir()
    assert sources.data_folder("chunks-train") == cache / "data" / "chunks-train"


@pytest.mark.parametrize("name", ["", "../etc", "Upper", "a b", "-rf", "a;b"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="is not the name of a Debian package"):
        sources.fetch_deb(name)
    if name != "Upper":
        with pytest.raises(ValueError, match="is not the name of an npm package"):
            sources.fetch_npm(f"{name}/../x")


def test_without_the_tools_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match=r"'apt-get' is not on this machine.*Debian or Ubuntu"):
        sources.fetch_deb("some-doc")
    with pytest.raises(RuntimeError, match=r"'npm' is not on this machine.*Node.js"):
        sources.fetch_npm("some-package")


def test_an_unpacked_package_is_not_fetched_again(cache, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda tool: None)
    for folder in ("trees/some-doc", "npm/@scope__name"):
        (cache / folder).mkdir(parents=True)
    assert sources.fetch_deb("some-doc") == cache / "trees/some-doc"
    assert sources.fetch_npm("@scope/name") == cache / "npm/@scope__name"


def test_a_damaged_archive_leaves_no_tree_behind(cache, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(
        sources.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 2, "", "x\nnot a Debian archive"),
    )
    (cache / "debs").mkdir(parents=True)
    (cache / "debs" / "some-doc_1.0_all.deb").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"could not unpack .*some-doc_1\.0_all\.deb.*not a Debian archive"):
        sources.fetch_deb("some-doc")
    assert list((cache / "trees").iterdir()) == []


def test_an_npm_package_is_unpacked_without_its_first_folder_and_nothing_outside(cache, monkeypatch):
    def pack(command, cwd, **_):
        with tarfile.open(cwd / "name-1.0.tgz", "w:gz") as tar:
            for name in ("package/package.json", "package/icons/a.svg", "package/../../../evil"):
                entry = tarfile.TarInfo(name)
                entry.size = 2
                tar.addfile(entry, io.BytesIO(b"{}"))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(sources.subprocess, "run", pack)
    tree = sources.fetch_npm("name")
    assert sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()) == [
        "icons/a.svg",
        "package.json",
    ]
    assert not list(cache.rglob("evil"))
