"""Is a run over several processes the same run? Loss curves and weights of one process, DDP and FSDP2, and of runs
that go on over another number of processes; or the throughput of two processes against one.

Makes a few pages and pictures and a recipe of stage 1 (a tiny model, float32, the auxiliary character loss too, tied
embeddings, six micro-batches a step) and runs `accelerate launch --config_file training/accelerate/... -m unit_cli
train` on the CPU, over gloo, with the configurations that are shipped. One process takes six micro-batches a step, two
take three each, three take two each: the same rows in each step.

Random positions of the encoder in training are off (`cpe_crop`, `cpe_drop_prob`): they are drawn by each process.

    python -m benchmarks.devices               # loss curves and moves, about five minutes on two cores
    python -m benchmarks.devices --speed       # throughput, on a quiet machine
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from modeling_unit import UnitVisionConfig, UnitVisionModel
from training.data.schema import make_row, write_shards

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS = ROOT / "training" / "accelerate"
MICRO_BATCHES = 6  # of a step, of all processes
TOLERANCE = 1e-5  # relative difference of the loss of a step [ours]: sums in another order, 50 steps of AdamW long
PATCH = 8
TEXT = {"model_type": "qwen3", "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
TEXT |= {"max_position_embeddings": 512}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6}  # for throughput: unit-tiny's encoder
# name -> processes, configuration (none: no launcher)
WAYS = {"one process": (1, None), "DDP, 2": (2, "ddp-cpu"), "DDP, 3": (3, "ddp-cpu"), "FSDP2, 2": (2, "fsdp2-cpu")}
WAYS |= {"FSDP2, 3": (3, "fsdp2-cpu")}
MOVES = [("one process", "DDP, 2"), ("DDP, 2", "one process"), ("DDP, 2", "DDP, 3"), ("DDP, 2", "FSDP2, 2")]
MOVES += [("FSDP2, 2", "DDP, 2"), ("FSDP2, 2", "one process"), ("one process", "FSDP2, 3")]


def make_toy(folder: Path, steps: int, shape: dict, side: int = 16, letters: int = 6, patches: int = 120) -> Path:
    """Data, a teacher and a recipe of stage 1; returns the recipe."""
    rng = np.random.default_rng(0)

    def row(kind: str, number: int) -> dict:
        document = kind == "document"
        text = f"line-{number}" + "".join(chr(97 + (number + place) % 26) for place in range(letters * (number % 4)))
        boxes = {"char_boxes": np.array([[2 * at, 0, 2 * at + 2, 8] for at in range(len(text))], np.int16)}
        return make_row(
            rng.integers(0, 256, size=(side, 3 * side) if document else (20, 20, 3), dtype=np.uint8),
            text,
            task="ocr" if document else "caption",
            kind=kind,
            source=f"toy/{number}",
            license="CC0-1.0",
            split="train",
            **(boxes | {"x_height": 5.0} if document else {}),
        )

    for kind in ("document", "natural"):
        write_shards([row(kind, number) for number in range(24)], folder / kind, 8)
    torch.manual_seed(0)
    settings = shape | {"num_attention_heads": 2, "patch_size": PATCH, "image_size": 64, "cpe_max_size": 64}
    config = UnitVisionConfig(**settings, cpe_crop=False, cpe_drop_prob=0.0)
    UnitVisionModel(config).save_pretrained(folder / "teacher")
    text = TEXT | shape | {"head_dim": shape["hidden_size"] // 2, "num_hidden_layers": 2}
    recipe = {
        "stage": "intra_scale",
        "teacher": str(folder / "teacher"),
        "model": {"connector_config": {"connector_type": "mlp", "unshuffle": 1}, "text_config": text},
        "image_processor": {"patch_size": PATCH, "base_size": 32, "scale_as": "area", "max_side": 512},
        "data": {
            "patches": patches,
            "ranks": MICRO_BATCHES,
            "sources": [{"path": str(folder / kind), "kind": kind} for kind in ("document", "natural")],
        },
        "training": {"max_steps": steps, "save_steps": steps // 2, "logging_steps": 1, "learning_rate": 1e-3}
        | {"character_weight": 0.5, "disable_tqdm": True, "use_cpu": True, "save_total_limit": 5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def command_of(recipe: Path, out: Path, way: str, micro_batches: int = MICRO_BATCHES) -> list[str]:
    """What starts a run over the processes of a way."""
    processes, configuration = WAYS[way]
    command = [sys.executable, "-m"]
    if configuration:
        command += ["accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / f"{configuration}.yaml")]
        command += ["--num_processes", str(processes), "-m"]
    command += ["unit_cli", "train", str(recipe), f"training.output_dir={out}"]
    return [*command, f"training.gradient_accumulation_steps={micro_batches // processes}"]


def run(command: list[str], threads: int = 1) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it has failed, with the end of what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")


def losses_of(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def differences(out: Path, reference: Path, first: int = 1) -> tuple[float, float, float]:
    """Largest difference of the loss of a step from `first` on, the largest relative one, the largest of a weight."""
    own, other = losses_of(out), losses_of(reference)
    if own.keys() != other.keys():
        raise RuntimeError(f"{out}: the log has {len(own)} steps, that of one process {len(other)}.")
    steps = [step for step in own if step >= first]
    absolute = max(abs(own[step] - other[step]) for step in steps)
    relative = max(abs(own[step] - other[step]) / abs(other[step]) for step in steps)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, reference))
    if weights.keys() != expected.keys():
        raise RuntimeError(f"{out}: the final model has other tensors than that of one process.")
    return absolute, relative, max(float((weights[name] - expected[name]).abs().max()) for name in expected)


def compare(folder: Path, steps: int) -> bool:
    """The two tables of equality; whether all is within the tolerance."""
    recipe = make_toy(folder, steps, TINY)
    out = {way: folder / way.replace(", ", "-").replace(" ", "-") for way in WAYS}
    print(f"{steps} steps of {MICRO_BATCHES} micro-batches, float32, CPU. Against one process:\n")
    print("| processes | largest difference of a step's loss | relative | of a final weight | loss, first and last |")
    print("|---|---|---|---|---|")
    well = True
    for way in WAYS:
        run(command_of(recipe, out[way], way))
        absolute, relative, weight = differences(out[way], out["one process"])
        curve = losses_of(out[way])
        well &= relative <= TOLERANCE
        cells = f"{absolute:.2e} | {relative:.2e} | {weight:.2e} | {curve[1]:.5f}, {curve[steps]:.5f}"
        print(f"| {way} | {cells} |", flush=True)
    print(f"\nGoing on from step {steps // 2} over other processes, to step {steps}; against one process:\n")
    print("| from | to | largest difference of a step's loss | relative | of a final weight |")
    print("|---|---|---|---|---|")
    for number, (source, target) in enumerate(MOVES):
        moved = folder / f"move-{number}"
        shutil.copytree(out[source] / f"checkpoint-{steps // 2}", moved / f"checkpoint-{steps // 2}")
        run(command_of(recipe, moved, target))
        absolute, relative, weight = differences(moved, out["one process"], steps // 2 + 1)
        well &= relative <= TOLERANCE
        print(f"| {source} | {target} | {absolute:.2e} | {relative:.2e} | {weight:.2e} |", flush=True)
    print(f"\nTolerance: {TOLERANCE:g}, relative, of a step's loss. {'All within.' if well else 'NOT all within.'}")
    return well


def speed(folder: Path, steps: int, rounds: int) -> None:
    """Documents a second of two processes with a thread each, against one process with two threads, in turns."""
    recipe = make_toy(folder, steps, SMALL, side=128, letters=20, patches=3000)
    times: dict[str, list[float]] = {"one process": [], "DDP, 2": [], "FSDP2, 2": []}
    for number in range(rounds):
        for way, found in times.items():
            out = folder / f"speed-{number}-{len(found)}-{way.replace(', ', '-').replace(' ', '-')}"
            command = command_of(recipe, out, way, micro_batches=2)
            run([*command, "data.ranks=2", "training.save_strategy='no'"], threads=2 // WAYS[way][0])
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            found.append(next(line["train_runtime"] for line in lines if "train_runtime" in line))
            shutil.rmtree(out)
    print(f"Throughput on two cores, {steps} steps of 2 micro-batches, median of {rounds} runs taken in turns:\n")
    print("| processes | threads each | s a step | of one process's throughput |")
    print("|---|---|---|---|")
    base = statistics.median(times["one process"])
    for way, found in times.items():
        middle = statistics.median(found)
        print(f"| {way} | {2 // WAYS[way][0]} | {middle / steps:.3f} | {base / middle:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speed", action="store_true", help="measure throughput instead")
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput")
    parser.add_argument("--keep", metavar="FOLDER", help="work there, and leave what was made")
    arguments = parser.parse_args()
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="devices-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.speed:
            speed(folder, arguments.steps if arguments.steps != 50 else 12, arguments.rounds)
            return 0
        return 0 if compare(folder, arguments.steps) else 1
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
