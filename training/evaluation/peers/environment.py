"""Where peers that have to be installed live: folders of their own in the cache, which our environment does not see.

`unit peers install NAME` makes one; a folder is there whole or not at all, and deleting it uninstalls the peer.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from training.data.sources import cache_root, fetch_deb

RECORD = "peer.json"  # what is in a folder: packages and versions
RAPIDOCR = "rapidocr-3.10.0"
# The versions that were measured [ours]; those for Python 3.10 are the last that it has.
RAPIDOCR_PACKAGES = (
    "rapidocr==3.10.0",
    "onnxruntime==1.32.0; python_version >= '3.11'",
    "onnxruntime==1.23.2; python_version < '3.11'",
    "numpy==2.4.6; python_version >= '3.11'",
    "numpy==2.2.6; python_version < '3.11'",
    "pillow==13.0.0; python_version >= '3.11'",
    "pillow==12.3.0; python_version < '3.11'",
    "shapely==2.2.0; python_version >= '3.11'",
    "shapely==2.1.2; python_version < '3.11'",
    "opencv-python-headless==5.0.0.93",
    "pyclipper==1.4.0",
    "omegaconf==2.4.0",
)


def folder_of(name: str) -> Path:
    """Where a peer's environment is or would be: ``cache_root()/peers/NAME``; not created."""
    return cache_root() / "peers" / name


def record_of(name: str) -> dict | None:
    """What was installed there; None where nothing was."""
    try:
        return json.loads((folder_of(name) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def python_of(name: str) -> Path:
    """The interpreter of a virtual environment that :func:`install_packages` made."""
    return folder_of(name) / "bin" / "python"


def install_packages(
    name: str, packages: Sequence[str], progress: bool = True, alone: Sequence[str] = (), inherit: bool = False
) -> Path:
    """Make a virtual environment with ``packages`` from the index that pip is set to, nothing of ours inside.

    Args:
        name: of the folder; the Python version is added by the caller where it matters.
        packages: requirements with versions; only wheels, so that no package runs code while it is installed.
        progress: what pip does at the moment, on standard error.
        alone: requirements to install without their dependencies, before the others.
        inherit: the packages of this environment are seen there, behind its own; only what lacks is installed.

    Returns:
        The folder. What is there already is left alone.

    Raises:
        RuntimeError: no wheel for this machine, no network, no `venv`; one line. Nothing is left behind.
    """
    target = folder_of(name)
    if record_of(name) is not None:
        return target
    staging = _staging(target)
    try:
        if subprocess.run([sys.executable, "-I", "-m", "venv", str(staging)], capture_output=True).returncode:
            raise RuntimeError(
                f"no virtual environment can be made for {name}: this Python has no venv (Debian: apt-get install "
                "python3-venv)"
            )
        python = staging / "bin" / "python"
        site = staging / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        if inherit:
            ours = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
            site.mkdir(parents=True, exist_ok=True)
            (site / "inherited.pth").write_text("".join(f"{folder}\n" for folder in ours), encoding="utf-8")
        pip = [str(python), "-I", "-m", "pip"]
        wanted = ["install", "--disable-pip-version-check", "--no-input", "--only-binary", ":all:"]
        if alone:
            _pip([*pip, *wanted, "--no-deps", *alone], f"installing {name}", progress)
        _pip([*pip, *wanted, *packages], f"installing {name}", progress)
        listed = subprocess.run(
            [*pip, "freeze", "--disable-pip-version-check", "--path", str(site)],
            capture_output=True,
            text=True,
        )
        record = {"python": platform.python_version(), "packages": sorted(listed.stdout.splitlines())}
        _finish(staging, target, record)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _pip(command: list[str], what: str, progress: bool) -> None:
    """Run pip with a line on standard error that says where it is."""
    from tqdm import tqdm

    # pip finds its index where it is configured; an environment of ours that is active must not be written to.
    variables = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PIP_TARGET", "PIP_USER")
    }
    last: deque[str] = deque(maxlen=40)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    bar = tqdm(desc=what, unit=" package", disable=not progress, bar_format="{desc}: {n} packages, {elapsed}{postfix}")
    try:
        with bar:
            for line in process.stdout:
                last.append(line.strip())
                if line.startswith(("Collecting ", "Installing ")):
                    bar.update(line.startswith("Collecting "))
                    bar.set_postfix_str(line.strip()[:60])
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if status:
        errors = [line.removeprefix("ERROR: ") for line in last if line.startswith("ERROR")]
        said = errors[0] if errors else next((line for line in reversed(last) if line), f"exit status {status}")
        raise RuntimeError(f"{what} failed: {said[:300]}")


# -- tesseract, from Debian's packages, without being root ---------------------------------------------------------

TESSERACT = "tesseract"
TESSERACT_PACKAGES = ("tesseract-ocr", "tesseract-ocr-eng")


def install_tesseract(progress: bool = True) -> Path:
    """Download tesseract, its English model and the libraries that this machine lacks, and unpack them in the cache.

    Needs `apt-get` and `dpkg-deb`, but no rights; nothing is installed in the system.

    Returns:
        The folder whose :func:`record_of` says how to start it.

    Raises:
        RuntimeError: not a Debian system, packages that cannot be had, or a program that does not start; one line.
    """
    from tqdm import tqdm

    target = folder_of(TESSERACT)
    if record_of(TESSERACT) is not None:
        return target
    packages = _lacking_packages()
    trees = []
    for package in tqdm(packages, desc="installing tesseract", unit=" package", disable=not progress):
        trees.append(fetch_deb(package))
    programs = [tree / "usr" / "bin" / "tesseract" for tree in trees if (tree / "usr" / "bin" / "tesseract").is_file()]
    models = sorted(found for tree in trees for found in tree.glob("usr/share/tesseract-ocr/*/tessdata"))
    models = [folder for folder in models if (folder / "eng.traineddata").is_file()]
    if not programs or not models:
        raise RuntimeError(f"the packages {', '.join(TESSERACT_PACKAGES)} hold no program or no English model")
    libraries = sorted({str(file.parent) for tree in trees for file in tree.glob("usr/lib/**/*.so*")})
    variables = {"LD_LIBRARY_PATH": ":".join(libraries), "TESSDATA_PREFIX": str(models[0])}
    tried = subprocess.run(
        [str(programs[0]), "--list-langs"], capture_output=True, text=True, env={**os.environ, **variables}
    )
    if tried.returncode or "eng" not in (tried.stdout + tried.stderr).split():
        lines = (tried.stderr or tried.stdout).strip().splitlines() or [f"exit status {tried.returncode}"]
        raise RuntimeError(f"tesseract was unpacked but does not start: {lines[-1]}")
    staging = _staging(target)
    try:
        _finish(staging, target, {"program": str(programs[0]), "environment": variables, "packages": packages})
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _lacking_packages() -> list[str]:
    """Packages that tesseract needs: its own, and those of its libraries that are not installed here."""
    if shutil.which("apt-cache") is None or shutil.which("apt-get") is None:
        raise RuntimeError(
            "tesseract is fetched from Debian's packages, and this system has no apt: install it as its makers say, "
            "and have it on the PATH"
        )
    silent = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    asked = subprocess.run(
        ["apt-cache", "depends", "--recurse", *silent, *TESSERACT_PACKAGES], capture_output=True, text=True
    )
    # Names of packages begin their line. Of alternatives all are there, so only tesseract's own are taken from it;
    # what else is needed, a simulated installation tells.
    closure = {line.split(":")[0] for line in asked.stdout.splitlines() if line and line[0] not in " <|"}
    if asked.returncode or not set(TESSERACT_PACKAGES) <= closure:
        raise RuntimeError("apt knows no package tesseract-ocr; `apt-get update` may help")
    own = {name for name in closure if name.startswith(("tesseract-ocr", "libtesseract", "libleptonica", "liblept"))}
    simulated = subprocess.run(
        ["apt-get", "install", "--simulate", "--no-install-recommends", "-q", "-y", *TESSERACT_PACKAGES],
        capture_output=True,
        text=True,
    )
    if simulated.returncode:
        lines = simulated.stderr.strip().splitlines() or [f"exit status {simulated.returncode}"]
        raise RuntimeError(f"apt cannot tell what tesseract needs: {lines[-1]}")
    lacking = {line.split()[1] for line in simulated.stdout.splitlines() if line.startswith("Inst ")}
    return sorted(own | lacking)


def _staging(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".installing-", dir=target.parent))


def _finish(staging: Path, target: Path, record: dict) -> None:
    """Write the record and put the folder where it belongs; another process may have been first."""
    (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if target.is_dir() and not (target / RECORD).is_file():
        shutil.rmtree(target)  # a folder without its record is of no use to anybody
    if not target.is_dir():
        staging.rename(target)
