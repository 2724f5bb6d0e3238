"""Memory of a push: random weights of `--size` bytes to a Hub on loopback, a server in a process of its own.

    python -m benchmarks.push [--size 2.5e9] [--shard 5e9] [--folder FOLDER]

The weights of an encoder of unit-1b's width, as deep as the size asks for, are written a file at a time. A process of
its own pushes them as `unit push` does, twice. For each step its largest resident set since the step before is noted,
mapped files included (Linux counts it anew when asked to), and that of the process that checks the export. Pages of
mapped files go back whenever anything else wants the memory, so "anonymous" says what is really held (asked every
10 ms). "imports" is what Python, torch and transformers take before anything is loaded. Target: at most 1.5 times the
largest file of the export, and nothing uploaded the second time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from configuration_unit import PRESETS, UnitVisionConfig
from modeling_unit.released_unit import tensor_names
from training.evaluation.report import machine, markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE_SHARD = 250_000_000  # bytes; of the weights that are pushed, before the export shards them anew
TARGET = 1.5

# Pushes FOLDER to REPO_ID with files of at most SHARD bytes; prints one JSON object.
PUSH = """
import json, os, re, resource, sys, threading, time
from pathlib import Path
import transformers
from benchmarks.common import peak_memory
from training import publish as publishing
transformers.logging.disable_progress_bar()
folder, repo_id, shard = sys.argv[1:]
publishing.MAX_SHARD_SIZE = int(shard)
steps, current = {}, "imports"
started = time.perf_counter()
anonymous = {"own": 0, "child": 0}
def anonymous_of(pid):
    try:
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    except (OSError, TypeError):  # it has just ended
        return 0
def sample():
    while True:
        anonymous["own"] = max(anonymous["own"], anonymous_of("self"))
        for task in list(Path("/proc/self/task").iterdir()):
            try:
                children = (task / "children").read_text().split()
            except OSError:
                continue
            anonymous["child"] = max([anonymous["child"], *map(anonymous_of, children)])
        time.sleep(0.01)
threading.Thread(target=sample, daemon=True).start()
def mark(line):
    global current, started
    if line.split()[0][-3:] not in ("ing", "end"):
        return  # a remark, not a step
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
    steps[current] = {"peak": peak, "anonymous": anonymous["own"], "seconds": time.perf_counter() - started}
    anonymous["own"] = 0
    Path("/proc/self/clear_refs").write_text("5")
    current, started = line.split()[0], time.perf_counter()
mark("loading")
done = publishing.publish(folder, repo_id, say=mark)
mark("end")
files = [size for name, size in done.files.items() if name.endswith(".safetensors")]
child = peak_memory(resource.getrusage(resource.RUSAGE_CHILDREN))
child = {"peak": child, "anonymous": anonymous["child"]}
print(json.dumps({"steps": steps, "child": child, "files": files, "uploaded": len(done.uploaded)}))
"""


def config_of(size: float) -> UnitVisionConfig:
    """An encoder of unit-1b's width with about `size` bytes of float32."""

    def weigh(layers: int) -> int:
        config = UnitVisionConfig(**(PRESETS["unit-1b"][0] | {"num_hidden_layers": layers}))
        return 4 * sum(int(torch.Size(shape).numel()) for _, shape in tensor_names(config).values())

    one, two = weigh(1), weigh(2)
    layers = max(1, round((size - one) / (two - one)) + 1)
    return UnitVisionConfig(**(PRESETS["unit-1b"][0] | {"num_hidden_layers": layers}))


def write_model(folder: Path, size: float) -> None:
    """A model of random weights, with a file in memory at a time."""
    config = config_of(size)
    config.architectures, config.dtype = ["UnitVisionModel"], torch.float32
    (folder / "config.json").write_text(config.to_json_string())
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in tensor_names(config).values():
        count = 4 * int(torch.Size(shape).numel())
        if groups[-1] and held + count > SOURCE_SHARD:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += count
    generator, index = torch.Generator().manual_seed(0), {}
    for number, group in enumerate(tqdm(groups, desc="writing", unit="file"), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        made = {name: torch.empty(shape).uniform_(0.01, 0.05, generator=generator) for name, shape in group.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def push(folder: Path, environment: dict[str, str], shard: int) -> dict:
    """One push in a process of its own: what it printed.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", PUSH, str(folder), "alice/large", str(shard)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the push ended with status {done.returncode}:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.push", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=2.5e9, help="bytes of weights (default: %(default)g)")
    parser.add_argument(
        "--shard", type=float, default=5e9, help="bytes in a file of the export (default: %(default)g)"
    )
    parser.add_argument(
        "--folder", help="where four times the size is written for the time being (default: as tempfile)"
    )
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("benchmarks.push needs Linux: the peak memory of each step is asked of /proc")

    print(machine())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root = Path(temporary)
        (root / "model").mkdir()
        # In a process of its own: see benchmarks/load.py
        writing = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(root / "model", arguments.size)
        )
        writing.start()
        writing.join()
        if writing.exitcode != 0:
            raise SystemExit(f"the weights could not be written (status {writing.exitcode})")
        server = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "hub_server.py"), str(root / "hub")],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            settings = dict(server.stdout.readline().strip().split("=", 1) for _ in range(3))
            environment = os.environ | settings | {"HF_HOME": str(root / "home"), "TMPDIR": str(root)}
            environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            environment.pop("HF_HUB_OFFLINE", None)
            pushes = [push(root / "model", environment, int(arguments.shard)) for _ in range(2)]
        finally:
            server.terminate()
            server.wait()
    first, second = pushes
    total, largest = sum(first["files"]), max(first["files"])
    print(f"\n{total / 1e9:.2f} GB in {len(first['files'])} files, the largest {largest / 1e9:.2f} GB\n")
    rows = []
    for number, each in enumerate(pushes, start=1):
        steps = each["steps"] | {"the clean process": each["child"] | {"seconds": None}}
        for name, step in steps.items():
            seconds = "" if step["seconds"] is None else f"{step['seconds']:.1f}"
            without = step["peak"] - first["steps"]["imports"]["peak"]
            figures = [f"{step['peak'] / 1e9:.2f}", f"{step['peak'] / largest:.2f}", f"{without / largest:.2f}"]
            held = step["anonymous"] - first["steps"]["imports"]["anonymous"]
            figures += [f"{step['anonymous'] / 1e9:.2f}", f"{held / largest:.2f}"]
            rows.append([str(number), name, seconds, *figures])
    header = ["push", "step", "s", "peak GB", "over the largest file", "without imports"]
    print(markdown_table([*header, "anonymous GB", "over the largest file, without imports"], rows))
    for what in ("peak", "anonymous"):
        most = max(step[what] for step in first["steps"].values())
        most_without = most - first["steps"]["imports"][what]
        named = "resident" if what == "peak" else what
        print(f"\npushing process, {named}: {most / largest:.2f} times the largest file (target {TARGET}),")
        print(f"{most_without / largest:.2f} without imports")
    print(f"uploaded: {first['uploaded']} files at first, {second['uploaded']} the second time (target 0)")


if __name__ == "__main__":
    main()
