"""How time and memory are measured, here and by `benchmarks/`: in turns, and in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# glibc's malloc keeps what is freed, in steps that depend on history; told to give back what is over 64 kB at once, it
# leaves resident memory to what lives
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(what: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` is now, ``VmHWM`` the peak since it was reset. Linux alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {what}")


def begin_peak(device: str) -> int:
    """Start a peak anew; returns the bytes that are held now, of torch's allocator on a GPU, else resident."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def read_peak(device: str) -> int:
    """Bytes held at most since :func:`begin_peak`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def in_a_process(module: str, function: str, *arguments: Any) -> Any:
    """What a function gives in a fresh process, as JSON carries it.

    Args:
        module: where it is, such as ``"training.evaluation.cost"``. arguments: of types that ``repr`` writes out.

    Raises:
        RuntimeError: it failed; the last line says why.
    """
    call = f"{function}({', '.join(map(repr, arguments))})"
    code = f"import json; from {module} import {function}; print(json.dumps({call}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = {"PYTHONPATH": os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)}
    done = subprocess.run(command, env=os.environ | GIVE_BACK | found, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def synchronise(device: Any) -> None:
    """Wait until ``device`` has done what it was told; nothing to wait for on a CPU."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 3.0,
    warmup: int = 2,
    device: Any = "cpu",
) -> dict[str, list[float]]:
    """Times of ``functions`` in seconds, taken in turns (A B A B ...), so that a drift of the machine hits all alike.

    Args:
        rounds: at least so many rounds are measured.
        seconds: go on until so much time has been spent, all functions together.
        warmup: calls of each before the first that counts.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    synchronise(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    until = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < until:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
        done += 1
    return times
