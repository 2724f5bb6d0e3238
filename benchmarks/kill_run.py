"""`kill -9` at random moments: does the same command go on, and does the loss curve equal the uninterrupted one?

Makes a few pages and pictures, runs `unit train` on them in a process of its own (CPU, one thread), kills it again and
again, starts it again with the same command until it is done, and compares log and weights with those of a run that
nobody disturbed: every line of the log that has a loss, bit by bit, and the SHA-256 of the weights.

Every third kill comes while a checkpoint is being written (the folder `.checkpoint-N.partial` is there), every third
at a random step of the log, every third at a random time after the start, wherever the process then is. After a kill
each checkpoint is looked at as the next start would look at it: none may be there in part.

    python -m benchmarks.kill_run --kills 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from modeling_unit import UnitVisionConfig, UnitVisionModel
from training.checkpoints import checkpoints, damage, sha256
from training.data.schema import make_row, write_shards

ROOT = Path(__file__).resolve().parents[1]
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
VISION |= {"patch_size": 8, "image_size": 64, "cpe_max_size": 64}
TEXT = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
TEXT |= {"tie_word_embeddings": True}


def make_toy(folder: Path, steps: int, save_steps: int, streaming: bool) -> Path:
    """Data, a teacher and a recipe of stage 1; returns the recipe."""
    rng = np.random.default_rng(0)

    def row(kind: str, number: int) -> dict:
        document = kind == "document"
        shape = (16, 48) if document else (20, 20, 3)
        return make_row(
            rng.integers(0, 256, size=shape, dtype=np.uint8),
            f"line {number}",
            task="ocr" if document else "caption",
            kind=kind,
            source=f"toy/{number}",
            license="CC0-1.0",
            split="train",
        )

    for kind in ("document", "natural"):
        write_shards([row(kind, number) for number in range(24)], folder / kind, 8)
    torch.manual_seed(0)
    UnitVisionModel(UnitVisionConfig(**VISION)).save_pretrained(folder / "teacher")
    recipe = {
        "stage": "intra_scale",
        "teacher": str(folder / "teacher"),
        "model": {"connector_config": {"connector_type": "mlp", "unshuffle": 1}, "text_config": TEXT},
        "image_processor": {"patch_size": 8, "base_size": 32, "scale_as": "area", "max_side": 128},
        "data": {
            "patches": 120,
            "streaming": streaming,
            "shuffle_buffer": 8,
            "sources": [{"path": str(folder / kind), "kind": kind} for kind in ("document", "natural")],
        },
        "threads": 1,
        "training": {"max_steps": steps, "save_steps": save_steps, "logging_steps": 1, "learning_rate": 1e-3}
        | {"gradient_accumulation_steps": 2, "optimizer": "muon", "disable_tqdm": True, "use_cpu": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def started(recipe: Path, out: Path) -> subprocess.Popen:
    """`unit train` as a process, its words in `out` beside the run."""
    command = [sys.executable, "-m", "unit_cli", "train", str(recipe), f"training.output_dir={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with out.with_suffix(".txt").open("a") as words:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=words, stderr=words)


def lines_of(out: Path) -> list[str]:
    """Lines of the log that have a loss, as they stand there; none while there is no log."""
    try:
        text = (out / "log.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if '"loss"' in line and line.endswith("}")]


def partial(out: Path) -> str:
    return next((each.name for each in out.glob(".checkpoint-*.partial")), "")


def wait(process: subprocess.Popen, until, seconds: float = 600.0) -> bool:
    """Until `until()` or the end of the process; whether it is still there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        if until():
            return True
        time.sleep(0.001)
    raise TimeoutError("the run does not get on")


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_again_and_again(recipe: Path, out: Path, kills: int, steps: int, seed: int, startup: float) -> list[list]:
    """Kill and start again; rows of the table."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < kills:
        way = ("while saving", "at a step", "at a time")[len(rows) % 3]
        before, whole = len(lines_of(out)), {each.name for each in checkpoints(out)}
        begin = time.monotonic()
        process = started(recipe, out)
        if way == "at a time":
            moment = begin + rng.uniform(0.0, 1.3 * startup)
            alive = wait(process, lambda moment=moment: time.monotonic() >= moment)
        else:
            # so that the run lasts for all kills
            last = int(max(whole, key=_step, default="checkpoint-0").split("-")[1])
            share = max(2, round(2 * (steps - last) / (kills - len(rows) + 2)))
            target = last + rng.randint(1, share)
            written = (out / "log.jsonl").stat().st_mtime_ns if (out / "log.jsonl").exists() else 0

            def reached(written=written, target=target) -> bool:
                log = out / "log.jsonl"
                return log.exists() and log.stat().st_mtime_ns > written and len(lines_of(out)) >= target

            alive = wait(process, reached)
            if alive and way == "while saving":
                alive = wait(process, lambda: bool(partial(out)))
                time.sleep(rng.uniform(0.0, 0.06))
        if not alive:
            break
        kill(process)
        damaged = [each.name for each in checkpoints(out) if damage(each)]
        found = max((each.name for each in checkpoints(out)), key=_step, default="none")
        rows.append([len(rows) + 1, way, f"{time.monotonic() - begin:.2f}", f"{before} → {len(lines_of(out))}"])
        rows[-1] += [partial(out) or "–", found, ", ".join(damaged) or "none"]
        print("| " + " | ".join(str(each) for each in rows[-1]) + " |", flush=True)
    return rows


def _step(name: str) -> int:
    return int(name.split("-")[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streaming", action="store_true", help="the data streamed, not indexed")
    parser.add_argument("--keep", metavar="FOLDER", help="work there, and leave what was made")
    arguments = parser.parse_args()
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="kill-run-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _compare(folder, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _compare(folder: Path, arguments: argparse.Namespace) -> int:
    recipe = make_toy(folder, arguments.steps, arguments.save_steps, arguments.streaming)
    straight, killed = folder / "straight", folder / "killed"
    begin = time.monotonic()
    process = started(recipe, straight)
    wait(process, lambda: bool(lines_of(straight)))
    startup = time.monotonic() - begin
    if process.wait() != 0:
        print(straight.with_suffix(".txt").read_text()[-2000:], file=sys.stderr)
        return 1
    print(f"Undisturbed: {len(lines_of(straight))} steps, {startup:.1f} s to the first, ", end="")
    print(f"{time.monotonic() - begin:.1f} s in all; a checkpoint every {arguments.save_steps} steps.\n")
    print("| kill | when | s after the start | steps logged | being written | last checkpoint | in part |")
    print("|---|---|---|---|---|---|---|")
    rows = kill_again_and_again(recipe, killed, arguments.kills, arguments.steps, arguments.seed, startup)
    while (process := started(recipe, killed)).wait() != 0:
        print(killed.with_suffix(".txt").read_text()[-2000:], file=sys.stderr)
        return 1
    one, other = lines_of(straight), lines_of(killed)
    same = one == other
    weights = [sha256(out / "model.safetensors") for out in (straight, killed)]
    saving = sum(row[4] != "–" for row in rows)
    print(f"\n{len(rows)} kills, {saving} of them while a checkpoint was being written.")
    alike = weights[0] == weights[1]
    print(
        f"Lines of the log with a loss: {len(one)} and {len(other)}, {'the same bit by bit' if same else 'DIFFERENT'}."
    )
    print(f"Weights: SHA-256 {weights[0][:16]} and {weights[1][:16]}, {'the same' if alike else 'DIFFERENT'}.")
    last = json.loads(one[-1])
    print(f"Last loss: {last['loss']!r} at step {last['step']}.")
    words = [line for line in killed.with_suffix(".txt").read_text().splitlines() if "was not finished" in line]
    print(f"Unfinished checkpoints named and removed at the next start: {len(words)}.")
    whole = all(row[6] == "none" for row in rows)
    return 0 if same and alike and whole and len(rows) == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
