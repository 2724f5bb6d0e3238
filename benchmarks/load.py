"""Loading a large encoder: `from_pretrained` (meta device, mapped safetensors) beside a plain read of the same files.

    python -m benchmarks.load [--preset unit-1b] [--dtype float32 bfloat16] [--format ours released] [--runs 3]

Random weights of the preset's shape are written to a temporary folder, in files of at most `--shard` bytes, and loaded
in a process of its own each time; processes that only read the files, through one small buffer, come in turns with
those that load. "Warm": the files are in the page cache. "Cold": they were dropped from it before each process, and
the disk decides. Mapped weights are in memory only once something reads them: "loaded" is when the model is there,
"read" when a byte of every page of its weights has been read besides.

Peak memory is the process's largest resident set, mapped files included, over the size of the files; "without imports"
leaves out what Python, torch and transformers took before loading began. Targets: peak memory at most 1.2 times the
files, and at most 1.2 times a plain read where the disk decides; warm, the time is transformers' own for each weight,
a few tenths of a second whatever the size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.common import peak_memory
from configuration_unit import PRESETS, preset
from modeling_unit.released_unit import MEAN, STD, released_from_config, tensor_names
from training.evaluation.report import machine, markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Each runs in a process of its own and prints one JSON object; FOLDER is its only argument.
LOAD = """
import json, resource, sys, time
import torch
import transformers
from modeling_unit import UnitVisionModel
from benchmarks.common import peak_memory
transformers.logging.disable_progress_bar()
before = peak_memory(resource.getrusage(resource.RUSAGE_SELF))
start = time.perf_counter()
model = UnitVisionModel.from_pretrained(sys.argv[1])
loaded = time.perf_counter() - start
for parameter in model.parameters():
    parameter.detach().view(torch.uint8).flatten()[::4096].sum()
read = time.perf_counter() - start
assert all(parameter.device.type == "cpu" for parameter in model.parameters())
print(json.dumps({"before": before, "loaded": loaded, "read": read}))
"""
READ = """
import json, sys, time
from pathlib import Path
buffer = bytearray(1 << 24)
start = time.perf_counter()
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
print(json.dumps({"read": time.perf_counter() - start}))
"""


def write_checkpoint(folder: Path, name: str, dtype: str, released: bool, shard: int) -> None:
    """A checkpoint of random weights in files of at most `shard` bytes."""
    config = preset(name)
    config.architectures, config.dtype = ["UnitVisionModel"], DTYPES[dtype]
    tensors = dict(tensor_names(config).values())
    if released:
        tensors = {key: shape for key, (_, shape) in tensor_names(config).items()}
        tensors |= dict.fromkeys((MEAN, STD), (3, 1, 1))
        said = json.loads(released_from_config(config, "{}"))
        text = json.dumps({"args": said["args"], "version": said["version"]})
    else:
        text = config.to_json_string()
    (folder / "config.json").write_text(text)
    width = DTYPES[dtype].itemsize
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for key, shape in tensors.items():
        count = width * int(torch.Size(shape).numel())
        if groups[-1] and held + count > shard:
            groups.append({})
            held = 0
        groups[-1][key] = shape
        held += count
    generator, index = torch.Generator().manual_seed(0), {}
    for number, group in enumerate(tqdm(groups, desc=f"writing {name} {dtype}", unit="file"), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        made = {key: torch.empty(shape).uniform_(0.01, 0.05, generator=generator) for key, shape in group.items()}
        save_file(
            {key: tensor.to(DTYPES[dtype]) for key, tensor in made.items()}, folder / file, metadata={"format": "pt"}
        )
        index |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def run_once(code: str, folder: Path) -> tuple[dict, int]:
    """What the process printed, and its peak memory in bytes.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-c", code, str(folder)]
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=REPOSITORY, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            trouble = errors.read().decode("utf-8", "replace").strip()
            raise RuntimeError(f"the process ended with status {process.returncode}:\n{trouble}")
        return json.loads(output.read().decode().splitlines()[-1]), peak_memory(usage)


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages, which are on the disk already."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, size: int, runs: int, cold: bool) -> list[str]:
    """The figures of one row of the table: see ``main`` for its columns."""
    run_once(READ, folder)  # into the page cache
    plain, loads, peaks = [], [], []
    for run in tqdm(range(runs), desc="loading " + ("cold" if cold else "warm"), unit="run"):
        # Each goes first in turn: the machine behind a virtual disk remembers what was read before
        for code in (READ, LOAD) if run % 2 == 0 else (LOAD, READ):
            if cold:
                drop_from_cache(folder)
            found, peak = run_once(code, folder)
            if code == READ:
                plain.append(found["read"])
            else:
                loads.append(found)
                peaks.append(peak)
    floor = statistics.median(plain)
    loaded, read = (statistics.median(found[key] for found in loads) for key in ("loaded", "read"))
    before = statistics.median(found["before"] for found in loads)
    peak = max(peaks)
    return [
        f"{size / 1e9:.2f}",
        f"{floor:.2f}",
        f"{loaded:.2f}",
        f"{read:.2f}",
        f"{read / floor:.2f}",
        f"{peak / 1e9:.2f}",
        f"{peak / size:.2f}",
        f"{(peak - before) / size:.2f}",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="unit-1b")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--format", nargs="+", choices=("ours", "released"), default=["ours", "released"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shard", type=int, default=10**9, help="bytes of weights in a file (default: %(default)s)")
    parser.add_argument("--folder", help="where the weights are written for the time being (default: as tempfile)")
    arguments = parser.parse_args(argv)

    print(machine())
    rows = []
    for dtype in arguments.dtype:
        for kind in arguments.format:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                what = (Path(folder), arguments.preset, dtype, kind == "released", arguments.shard)
                # In a process of its own: Linux counts the memory of the process that starts another as that one's
                # peak, so this one has to stay small
                writing = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=what)
                writing.start()
                writing.join()
                if writing.exitcode != 0:
                    raise SystemExit(f"the weights could not be written (status {writing.exitcode})")
                size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
                for cold in (False, True) if hasattr(os, "posix_fadvise") else (False,):
                    figures = measure(Path(folder), size, arguments.runs, cold)
                    rows.append([f"{arguments.preset} {dtype}", kind, "cold" if cold else "warm", *figures])
    header = ["weights", "format", "cache", "GB", "plain read s", "loaded s", "read s", "over plain read"]
    header += ["peak GB", "over the files", "without imports"]
    print("\n" + markdown_table(header, rows))


if __name__ == "__main__":
    main()
