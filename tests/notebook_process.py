"""Executes a notebook's code cells, in order, in this one process, and writes a copy with what they gave.

    python tests/notebook_process.py docs/train_your_own.ipynb --write    # renews the outputs in the tree
    python tests/notebook_process.py NOTEBOOK --out COPY

The cells work in a temporary folder. No kernel: a cell of ours is plain Python with `display` (no `!` and no `%`), so
that a test of it needs neither Jupyter nor a socket, and runs in a process that it cannot spoil. What was printed and
shown is stored as Jupyter would store it; the temporary folder is left out of paths there. The first cell that fails
ends it with status 1, its error among the outputs.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

WIDEST = 900  # pixels of a picture that is stored
ROOT = Path(__file__).resolve().parents[1]


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_digest(notebook: dict[str, Any]) -> str:
    """SHA-256 of the code of all cells, in order: what `executed` in the notebook's metadata says was run."""
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in code_cells(notebook)).encode()).hexdigest()


class Outputs:
    """What one cell gives: text as it is printed, pictures as they are shown."""

    def __init__(self, hidden: str):
        self.stored: list[dict[str, Any]] = []
        self.hidden = hidden

    def write(self, text: str) -> int:
        if text:
            if not self.stored or self.stored[-1]["output_type"] != "stream":
                self.stored.append({"name": "stdout", "output_type": "stream", "text": ""})
            self.stored[-1]["text"] += text.replace(self.hidden, "")
        return len(text)

    def flush(self) -> None:
        pass

    def display(self, picture) -> None:
        from PIL import Image

        if not isinstance(picture, Image.Image):
            self.write(f"{picture}\n")
            return
        size = picture.size
        if picture.width > WIDEST:
            height = round(picture.height * WIDEST / picture.width)
            picture = picture.resize((WIDEST, height), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.convert("RGB").quantize(64).save(file, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": f"{size[0]} x {size[1]} pixels"}
        self.stored.append({"data": data, "metadata": {}, "output_type": "display_data"})

    def cell_outputs(self) -> list[dict[str, Any]]:
        """Text in lines, as Jupyter stores it."""
        return [
            each | {"text": each["text"].splitlines(keepends=True)} if each["output_type"] == "stream" else each
            for each in self.stored
        ]


def execute(notebook: dict[str, Any], folder: Path) -> bool:
    """Run all code cells in `folder` and lay their outputs into `notebook`; whether none failed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    os.chdir(folder)
    for number, cell in enumerate(code_cells(notebook), start=1):
        outputs = Outputs(f"{folder}{os.sep}")
        namespace["display"] = outputs.display
        cell["execution_count"] = number
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(outputs):
                tree = ast.parse("".join(cell["source"]))
                exec(compile(tree, f"cell {number}", "exec"), namespace)
        except BaseException as error:
            lines = traceback.format_exc().splitlines()
            failure = {"ename": type(error).__name__, "evalue": str(error), "output_type": "error", "traceback": lines}
            cell["outputs"] = [*outputs.cell_outputs(), failure]
            print("\n".join([*(str(each.get("text", "")) for each in outputs.stored), *lines]), file=sys.stderr)
            return False
        cell["outputs"] = outputs.cell_outputs()
        print(f"cell {number}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    notebook["metadata"]["executed"] = code_digest(notebook)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="into the notebook itself")
    parser.add_argument("--out", type=Path, help="into a copy")
    arguments = parser.parse_args()
    notebook = json.loads(arguments.notebook.read_text(encoding="utf-8"))
    out = arguments.notebook if arguments.write else arguments.out
    out = out.resolve() if out else None
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)  # for what the cells start
    with tempfile.TemporaryDirectory(prefix="unit-notebook-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = os.path.join(folder, "tmp")
        os.mkdir(tempfile.tempdir)
        done = execute(notebook, Path(folder).resolve())
        os.chdir(ROOT)
    if out is not None and (done or not arguments.write):
        out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
