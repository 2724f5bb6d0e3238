"""Where data comes from: Debian and npm packages, fetched by name into a cache outside the repository.

Nothing is installed and no maintainer script runs: packages are downloaded and unpacked, that is all. What was
fetched once is not fetched again; to refresh a package delete its folder under ``cache_root()/trees`` or ``/npm``.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

DEB_NAME = re.compile(r"^[a-z0-9][a-z0-9+.-]+$")  # Debian policy 5.6.1
NPM_NAME = re.compile(r"^(@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*(@[\w.^~-]+)?$")


def cache_root() -> Path:
    """The folder for everything downloaded or built: ``$UNIT_CACHE``, else ``~/.cache/unit``. Created when missing."""
    root = Path(os.environ.get("UNIT_CACHE") or Path.home() / ".cache" / "unit").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    return root


def data_folder(name: str) -> Path:
    """Where the built data set ``name`` lives: ``cache_root()/data/name`` (not created)."""
    return cache_root() / "data" / name


def fetch_deb(name: str) -> Path:
    """Download the Debian package ``name`` (as ``apt-get download`` finds it) and unpack it.

    Args:
        name: a package name such as ``"texlive-science-doc"``.

    Returns:
        The root of the unpacked tree, which holds ``usr/…``.

    Raises:
        ValueError: ``name`` is no package name.
        RuntimeError: the tools are absent, the package is unknown, or the archive is damaged.
    """
    if not DEB_NAME.match(name):
        raise ValueError(f"{name!r} is not the name of a Debian package")
    tree = cache_root() / "trees" / name
    if tree.is_dir():
        return tree
    archive = _downloaded_deb(name)
    _need("dpkg-deb", f"unpack {archive.name}", "Install it with your system's package manager (Debian: dpkg).")
    with _staging(tree) as staging:
        _call(["dpkg-deb", "-x", str(archive), str(staging)], f"unpack {archive}; delete it to have it fetched again")
    return tree


def fetch_npm(name: str) -> Path:
    """Download the npm package ``name`` with ``npm pack`` and unpack it; no script of the package runs.

    Args:
        name: a package name, with an optional version: ``"openmoji"``, ``"@iconify-json/noto@1.2.0"``.

    Returns:
        The folder that holds the package's ``package.json``.

    Raises:
        ValueError: ``name`` is no package name.
        RuntimeError: npm is absent, the package is unknown, or the archive is damaged.
    """
    if not NPM_NAME.match(name):
        raise ValueError(f"{name!r} is not the name of an npm package")
    tree = cache_root() / "npm" / name.replace("/", "__")
    if tree.is_dir():
        return tree
    _need("npm", f"download the npm package {name}", "Install Node.js, which brings npm.")
    with _staging(tree) as staging:
        download = staging / ".download"
        download.mkdir()
        _call(["npm", "pack", "--silent", "--ignore-scripts", name], f"download the npm package {name}", cwd=download)
        archives = list(download.glob("*.tgz"))
        if len(archives) != 1:
            raise RuntimeError(f"npm pack {name} gave {len(archives)} archives where one was expected")
        _unpack(archives[0], staging / ".unpacked", f"the archive of the npm package {name}")
        for entry in (staging / ".unpacked").iterdir():
            entry.rename(staging / entry.name)
        (staging / ".unpacked").rmdir()
        shutil.rmtree(download)
    return tree


def fetch_deb_source(name: str) -> Path:
    """Download the source of the Debian package ``name`` and unpack its archives; nothing of it is run or patched.

    apt finds and verifies it as it does any package. Where the machine's own lists have no sources, as is usual, the
    configured archives are asked for theirs in lists of our own, so that nothing of the machine's is changed.

    Args:
        name: the name of a source package such as ``"tesseract"``.

    Returns:
        A folder with one folder for each archive, named after it: ``tesseract_5.3.0.orig-test`` holds what
        ``tesseract_5.3.0.orig-test.tar.gz`` has below its first folder.

    Raises:
        ValueError: ``name`` is no package name.
        RuntimeError: the tools are absent, the package is unknown, or an archive is damaged.
    """
    if not DEB_NAME.match(name):
        raise ValueError(f"{name!r} is not the name of a Debian package")
    tree = cache_root() / "sources" / name
    if tree.is_dir():
        return tree
    _need("apt-get", f"download the source of {name}", "Run this step on Debian or Ubuntu.")
    with _staging(tree) as staging, tempfile.TemporaryDirectory() as scratch:
        options = _source_lists(Path(scratch))
        download = staging / ".download"
        download.mkdir()
        # A third party's archive without sources must not stop it: whether the package is there shows below.
        subprocess.run(["apt-get", *options, "-q", "update"], capture_output=True, check=False)
        _call(
            ["apt-get", *options, "-q", "source", "--download-only", name],
            f"download the source of the Debian package {name}",
            cwd=download,
        )
        archives = sorted(download.glob("*.tar.*"))
        for archive in archives:
            if archive.suffix == ".asc":  # a signature
                continue
            target = staging / archive.name[: archive.name.index(".tar.")]
            _unpack(archive, target, f"the source archive {archive.name}")
        shutil.rmtree(download)
    return tree


def _source_lists(folder: Path) -> list[str]:
    """Options that make apt look for sources in the archives that it is configured for, with lists in ``folder``."""
    parts = folder / "parts"
    parts.mkdir()
    (folder / "lists" / "partial").mkdir(parents=True)
    for entry in _apt_entries():
        text = entry.read_text(encoding="utf-8", errors="replace")
        if entry.suffix == ".sources":
            text = re.sub(r"(?im)^Types:.*$", "Types: deb-src", text)
        else:
            text = re.sub(r"(?m)^\s*deb(?=[\s\[])", "deb-src", text)
        (parts / entry.name).write_text(text, encoding="utf-8")
    settings = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": parts,
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
    }
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def _apt_entries(etc: Path = Path("/etc/apt")) -> list[Path]:
    """The files that name this machine's package archives."""
    parts = [path for path in (etc / "sources.list.d").glob("*") if path.suffix in (".list", ".sources")]
    return [path for path in (etc / "sources.list", *sorted(parts)) if path.is_file()]


def _unpack(archive: Path, target: Path, what: str) -> None:
    """The files of a tar archive below its first folder; links, devices and what would leave ``target`` stay out."""
    target.mkdir()
    try:
        with tarfile.open(archive) as tar:
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # absent before 3.10.12
            tar.extractall(target, members=_below_first_folder(tar), **safely)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise RuntimeError(f"{what} is damaged: {error}") from error


def _below_first_folder(tar: tarfile.TarFile):
    """Files of an archive, below its first folder (npm: ``package/`` by custom, but not always)."""
    for member in tar.getmembers():
        _, _, below = member.name.partition("/")
        if below and member.isfile() and ".." not in below.split("/") and not below.startswith("/"):
            member.name = below
            yield member


def _downloaded_deb(name: str) -> Path:
    """The archive of package ``name`` in ``cache_root()/debs``, downloaded when it is not there."""
    folder = cache_root() / "debs"
    folder.mkdir(exist_ok=True)
    archives = sorted(folder.glob(f"{name}_*.deb"))
    if archives:
        return archives[-1]
    _need(
        "apt-get", f"download the Debian package {name}", "Run this step on Debian or Ubuntu, or put the .deb there."
    )
    # The download goes to a folder of its own, so that an interrupted one is never taken for the package.
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        _call(
            ["apt-get", "download", "-q", name],
            f"download the Debian package {name} (does `apt-cache policy {name}` know it? `apt-get update` may help)",
            cwd=staging,
        )
        (archive,) = Path(staging).glob("*.deb")
        archive.rename(folder / archive.name)
    return folder / archive.name


class _staging:
    """A folder that becomes ``target`` when the block succeeds and vanishes when it does not."""

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=self.target.parent))
        self.folder.chmod(0o755)
        return self.folder

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None and not self.target.exists():
            self.folder.rename(self.target)
        else:  # failed, or another process was first
            shutil.rmtree(self.folder, ignore_errors=True)


def _need(tool: str, purpose: str, remedy: str) -> None:
    if shutil.which(tool) is None:
        raise RuntimeError(f"cannot {purpose}: the command {tool!r} is not on this machine. {remedy}")


def _call(command: list[str], purpose: str, cwd: str | Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"could not {purpose}: {said[-1] if said else 'exit status ' + str(done.returncode)}")
