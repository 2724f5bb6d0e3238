"""Cold start to text: `python -m unit_cli read` on one sample page, in a process of its own.

    python -m benchmarks.read_page [PATH] [--runs 5] [--model FOLDER]

Wall time and peak resident memory of the whole process, imports and loading of the model included; the median of the
runs, and the slowest. (The files are in the page cache from the second run on.) Targets, on two cores: under 10 s and
under 1.5 GB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import peak_memory
from training.evaluation.report import machine, markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = REPOSITORY / "spaces_demo" / "samples"
PAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".pdf"}


def sample_page() -> Path:
    """The first sample page that ships, by name.

    Raises:
        ValueError: there is none.
    """
    folder = SAMPLES / "pages" if (SAMPLES / "pages").is_dir() else SAMPLES
    pages = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PAGE_SUFFIXES)
    if not pages:
        raise ValueError(f"{folder}: no sample page; name one: python -m benchmarks.read_page PATH")
    return pages[0]


def run_once(page: Path, model: str | None) -> tuple[float, int, str]:
    """Wall time in seconds, peak memory in bytes and the text of one cold reading.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "unit_cli", "read", str(page), "--format", "text"]
    if model:
        command += ["--model", model]
    # What it prints goes to files: a full pipe would stall the process that is being timed.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, cwd=REPOSITORY)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        text, trouble = output.read().decode("utf-8", "replace"), errors.read().decode("utf-8", "replace")
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{trouble.strip()}")
    return wall, peak_memory(usage), text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.read_page", description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="?", type=Path, help="an image or PDF (default: the first sample page)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", help="a folder or Hub id (default: the shipped checkpoint)")
    arguments = parser.parse_args(argv)
    page = arguments.page.resolve() if arguments.page else sample_page()

    print(machine())
    results = [run_once(page, arguments.model) for _ in tqdm(range(arguments.runs), desc="reading", unit="run")]
    walls = [wall for wall, _, _ in results]
    memory = max(peak for _, peak, _ in results)
    words = len(results[0][2].split())
    row = [
        page.name,
        words,
        f"{statistics.median(walls):.2f}",
        f"{max(walls):.2f}",
        f"{memory / 1e6:.0f}",
    ]
    print("\n" + markdown_table(["page", "words read", "median s", "slowest s", "peak MB"], [row]))


if __name__ == "__main__":
    main()
