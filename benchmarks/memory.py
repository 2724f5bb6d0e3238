"""The encoder's peak memory against its number of tokens, from 256 to 16,384, with a linear fit and a curve.

    python -m benchmarks.memory [--shape tiny] [--dtype float32] [--do forward training] [--patches 16 32 48 ...]
                                [--picture docs/memory.png] [--device cpu]

Each point is one square image of that many patches a side in a process of its own, and the peak is what the pass needs
beyond the model, the pixels and the libraries: of resident memory on a CPU (Linux), of torch's allocator on a GPU. The
attention that torch chose is noted from the operators that ran. Target: linear; the square of attention, held in full,
would be heads x tokens squared numbers in each layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.evaluation.measuring import begin_peak, read_peak
from training.evaluation.measuring import in_a_process as fresh

SIDES = (16, 32, 48, 64, 80, 96, 112, 128)  # patches: 256 to 16,384 tokens


def measure_point(shape: str, dtype: str, do: str, side: int, device: str) -> dict:
    """Peak bytes of one pass over an image of ``side`` x ``side`` patches, and the attention operators that ran."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from benchmarks.encoder import DTYPES, PATCH
    from benchmarks.packed import make_model

    class Names(TorchDispatchMode):
        """Notes which attention runs."""

        def __init__(self):
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            if "scaled_dot_product" in name:
                self.seen.add(name)
            return func(*args, **(kwargs or {}))

    model = make_model(shape, device).to(DTYPES[dtype])
    model.train(do == "training").requires_grad_(do == "training")

    def run(pixels: torch.Tensor) -> None:
        with torch.set_grad_enabled(do == "training"):
            tokens = model(pixels).last_hidden_state
            if do == "training":
                tokens.float().square().mean().backward()

    run(torch.zeros(1, 3, PATCH, PATCH, device=device, dtype=DTYPES[dtype]))  # libraries' buffers, gradients
    pixels = torch.randn(1, 3, side * PATCH, side * PATCH, device=device, dtype=DTYPES[dtype])
    before = begin_peak(device)
    with Names() as names:
        run(pixels)
    peak = read_peak(device)
    return {"tokens": side * side + 1, "bytes": peak - before, "attention": sorted(names.seen)}


def in_a_process(module: str, *arguments) -> dict:
    """What `measure_point` of a benchmark gives in a fresh process.

    Args:
        module: its name below `benchmarks`. arguments: of `measure_point`, of types that `repr` writes out.

    Raises:
        RuntimeError: it failed; the last line says why.
    """
    return fresh(f"benchmarks.{module}", "measure_point", *arguments)


def fit_line(tokens: np.ndarray, peaks: np.ndarray) -> tuple[float, float, float, float]:
    """Slope and intercept of the least-squares line, R squared, and the largest residual over the largest value."""
    slope, intercept = np.polyfit(tokens, peaks, 1)
    residuals = peaks - (slope * tokens + intercept)
    total = ((peaks - peaks.mean()) ** 2).sum()
    share = 1.0 - (residuals**2).sum() / total if total else 1.0
    return float(slope), float(intercept), float(share), float(np.abs(residuals).max() / peaks.max())


def draw(points: dict[str, list[dict]], path: Path, title: str) -> None:
    """Peaks in MB against tokens, with their lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from training.evaluation.report import COLOURS

    figure, axes = pyplot.subplots(1, len(points), figsize=(5 * len(points), 3.4), squeeze=False)
    for axis, (do, found), colour in zip(axes[0], points.items(), COLOURS, strict=False):
        tokens = np.array([point["tokens"] for point in found])
        peaks = np.array([point["bytes"] for point in found]) / 1e6
        slope, intercept, share, _ = fit_line(tokens, peaks)
        axis.plot(tokens, slope * tokens + intercept, color="0.6", linewidth=1, label=f"line, R² {share:.4f}")
        axis.plot(tokens, peaks, "o", color=colour, label=f"{do}: {1000 * slope:.1f} kB a token")
        axis.set_xlabel("tokens")
        axis.set_ylabel("peak MB")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    from benchmarks.encoder import DTYPES, PASSES, SHAPES
    from training.evaluation.report import machine, markdown_table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--do", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--patches", nargs="+", type=int, default=list(SIDES), help="of a side, a point each")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the curve there")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args(argv)
    if len(set(arguments.patches)) < 3:
        parser.error("--patches: a line needs at least three different points")
    print(machine(arguments.device))
    points: dict[str, list[dict]] = {do: [] for do in arguments.do}
    with tqdm(total=len(arguments.do) * len(arguments.patches), desc="memory", unit="point") as progress:
        for do in arguments.do:
            for side in sorted(set(arguments.patches)):
                points[do].append(in_a_process("memory", arguments.shape, arguments.dtype, do, side, arguments.device))
                progress.update()
    heads, size = SHAPES[arguments.shape]["num_attention_heads"], DTYPES[arguments.dtype].itemsize
    for do, found in points.items():
        tokens = np.array([point["tokens"] for point in found])
        peaks = np.array([point["bytes"] for point in found]) / 1e6
        slope, intercept, share, worst = fit_line(tokens, peaks)
        rows = [
            [
                count,
                f"{peak:.1f}",
                f"{slope * count + intercept:.1f}",
                f"{heads * count**2 * size / 1e6:.0f}",
                ", ".join(name.strip("_") for name in point["attention"] if "backward" not in name),
            ]
            for count, peak, point in zip(tokens, peaks, found, strict=True)
        ]
        header = ["tokens", "peak MB", "line MB", "one layer's square would be, MB", "attention"]
        print(f"\n{arguments.shape} {arguments.dtype}, {do}\n\n" + markdown_table(header, rows))
        print(
            f"\nline: {1000 * slope:.2f} kB a token + {intercept:.1f} MB, R² {share:.5f}, largest residual "
            f"{100 * worst:.1f}% of the largest peak"
        )
    if arguments.picture:
        title = f"{arguments.shape} {arguments.dtype} encoder, batch 1, {machine(arguments.device).split(';')[0]}"
        draw(points, arguments.picture, title)
        print(f"\ncurve: {arguments.picture}")


if __name__ == "__main__":
    main()
