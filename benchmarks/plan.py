"""`unit plan` against real runs on this CPU: peak memory and step time at three sizes.

    python -m benchmarks.plan [--widths 192 256 384] [--steps 6] [--float32] [--checkpointing]

For each width a recipe of stage 1 is written with random weights and made-up rows, planned with `--hardware cpu`, and
run by `unit train`'s own `main` in a process of its own. Memory is that process's peak above what it has when training
begins (Linux: VmHWM and VmRSS), plus the weights and the teacher, which are there by then; time is the median of the
steps after the first two. A run of width 64 goes first in the same process, so that libraries are loaded, and glibc is
told to give back what is freed (MALLOC_MMAP_THRESHOLD_), so that its own keeping is not counted; that
slows it, and the time is of another run. The plan measures the
machine before and after the run and the mean is taken, so that a busy machine hits both alike. Targets: memory within
15%, time within 30%.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from training.evaluation.measuring import GIVE_BACK
from training.evaluation.report import machine, markdown_table

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 2
MB = 1e6


def write_run(folder: Path, width: int, steps: int, bf16: bool = True, checkpointing: bool = False) -> Path:
    """Teacher, rows and recipe of a run in `folder`; returns the recipe's path."""
    from modeling_unit import UnitImageProcessor, UnitVisionConfig, UnitVisionModel
    from training.data.schema import make_row, write_shards

    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": 6, "num_attention_heads": width // 64}
    shape |= {"intermediate_size": 4 * width, "patch_size": 16, "image_size": 448, "cpe_max_size": 448}
    UnitVisionModel(UnitVisionConfig(**shape)).save_pretrained(folder / "teacher")
    UnitImageProcessor(patch_size=16, base_size=224, scale_as="area").save_pretrained(folder / "teacher")
    rng = np.random.default_rng(0)

    def row(kind: str, side: int, characters: int, number: int) -> dict:
        text = "".join(rng.choice(list("abcdefghij klmnop"), size=characters))
        channels = () if kind == "document" else (3,)
        pixels = rng.integers(0, 256, size=(side, side, *channels), dtype=np.uint8)
        task = "ocr" if kind == "document" else "caption"
        origin = {"source": f"made/{number}", "license": "CC0-1.0", "split": "train"}
        return make_row(pixels, text, task=task, kind=kind, **origin)

    write_shards([row("document", 448, 500, number) for number in range(16)], folder / "documents")
    write_shards([row("natural", 224, 50, number) for number in range(16)], folder / "pictures")
    text = {"model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    text |= {
        "num_hidden_layers": 4,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 1024,
        "dropout": 0.0,
    }
    recipe = {
        "stage": "intra_scale",
        "teacher": str(folder / "teacher"),
        "model": {"connector_config": {"connector_type": "mlp", "unshuffle": 2}, "text_config": text},
        "image_processor": {"patch_size": 16, "base_size": 224, "scale_as": "area"},
        "groups": [
            {"kind": "document", "scale": 4, "rows": 4, "sources": [{"path": str(folder / "documents")}]},
            {"kind": "natural", "scale": 1, "rows": 8, "sources": [{"path": str(folder / "pictures")}]},
        ],
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": steps + WARMUP,
            "bf16": bf16,
            "gradient_checkpointing": checkpointing,
            "save_strategy": "no",
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def run_measured(path: Path) -> dict[str, float]:
    """In a process of its own: run a recipe; peak bytes above those when training begins, seconds of a step."""
    from benchmarks.training_step import Stopwatch
    from training import recipe
    from training.evaluation.measuring import resident
    from training.trainer import UnitTrainer

    with tempfile.TemporaryDirectory() as name:  # a small run first: what is loaded at first use is there then
        recipe.main(write_run(Path(name), 64, 1))
    watch, seen = Stopwatch(), {}
    train = UnitTrainer.train

    def watched(trainer, **kwargs):
        trainer.add_callback(watch)
        seen["before"] = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        out = train(trainer, **kwargs)
        seen["peak"] = resident("VmHWM")
        return out

    with patch.object(UnitTrainer, "train", watched):
        recipe.main(path)
    return {"memory": seen["peak"] - seen["before"], "seconds": statistics.median(watch.work[WARMUP:])}


def compare(width: int, steps: int, bf16: bool, checkpointing: bool) -> tuple[list[str], float, float]:
    """A row of the table, and plan over measured of memory and time."""
    from training.plan import make_plan

    with tempfile.TemporaryDirectory() as name:
        path = write_run(Path(name), width, steps, bf16, checkpointing)
        first = make_plan(path, "cpu")
        command = [sys.executable, "-m", "benchmarks.plan", "--run", str(path)]
        runs = []
        for environment in (os.environ, os.environ | GIVE_BACK):  # one for the time, one for the memory
            made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(made.stderr[-2000:])
            runs.append(json.loads(made.stdout.strip().splitlines()[-1]))
        real = {"seconds": runs[0]["seconds"], "memory": runs[1]["memory"]}
        second = make_plan(path, "cpu")
    seconds = (first.step_seconds + second.step_seconds) / 2
    real["memory"] += first.memory["weights"] + first.memory["teacher"]
    memory_ratio, time_ratio = first.needed / real["memory"], seconds / real["seconds"]
    parameters = sum(part.parameters for part in first.parts if part.name != "teacher")
    row = [str(width), f"{parameters / 1e6:.1f}", f"{first.flops_per_step / 1e9:.0f}", f"{first.needed / MB:.0f}"]
    row += [f"{real['memory'] / MB:.0f}", f"{100 * (memory_ratio - 1):+.0f}%", f"{seconds:.2f}"]
    row += [f"{real['seconds']:.2f}", f"{100 * (time_ratio - 1):+.0f}%"]
    return row, memory_ratio, time_ratio


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 256, 384])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run:
        print(json.dumps(run_measured(arguments.run)))
        return
    print(machine(), flush=True)
    rows = []
    for width in arguments.widths:
        row, _, _ = compare(width, arguments.steps, not arguments.float32, arguments.checkpointing)
        print(" ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
    header = ["width", "M parameters", "GFLOP/step", "plan MB", "measured MB", "", "plan s", "measured s", ""]
    print("\n" + markdown_table(header, rows))


if __name__ == "__main__":
    main()
