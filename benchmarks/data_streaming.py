"""Streamed data: resident memory over 10,000 to 1,000,000 rows, rows a second, a trainer's time spent waiting for it.

    python -m benchmarks.data_streaming [--rows 10000 ...] [--picture docs/data/streaming-memory.png] [--skip-trainer]

Memory and speed: small pages in parquet shards of 10,000 rows (one shard, linked as often as needed, so that a million
rows need no disk) are streamed once through a stream's shuffle buffer and its buckets of sizes, without decoding, each
number of rows in a process of its own. Beside it, in the same run, the rate with decoding, augmentation and collation.
Target: flat, the peak over a million rows at most 1.1 times that over ten thousand [ours].

Waiting: the tiny recipe's own trainer (`benchmarks/training_step.py`), its data indexed beforehand and streamed. Its
data and teacher must be there (`make data`, and the recipe's stage before). Target: under 3%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.evaluation.measuring import resident
from training.evaluation.report import COLOURS, machine, markdown_table

ROWS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SHARD = 10_000
ROOT = Path(__file__).resolve().parents[1]


def make_shards(folder: Path, rows: int, seed: int = 0) -> None:
    """`rows` rows in shards of `SHARD`, all of them links to one: lines of noise in some sizes."""
    from training.data.schema import make_row, write_shards

    def lines():
        rng = np.random.default_rng(seed)
        for number in range(SHARD):
            height, width = 16 * int(rng.integers(1, 4)), 16 * int(rng.integers(2, 16))
            pixels = np.full((height, width), 255, dtype=np.uint8)
            pixels[4:12, 4:-4] = rng.integers(0, 256, width - 8, dtype=np.uint8)
            text = "word " * (width // 40) + str(number)
            yield make_row(
                pixels, text, task="ocr", kind="document", source=f"noise/{number}", license="CC0-1.0", split="train"
            )

    first = folder / "part-00000.parquet"
    if not first.is_file():
        write_shards(lines(), folder, rows_per_shard=SHARD)
    for shard in range(len(list(folder.glob("*.parquet"))), rows // SHARD):
        os.link(first, folder / f"part-{shard:05d}.parquet")


def stream_rows(folder: str, rows: int, decode: bool) -> dict:
    """Stream so many rows; rows a second, and resident memory in bytes along the way and at its peak."""
    import torch

    from modeling_unit import UnitImageProcessor, UnitProcessor
    from training.collator import GroupCollator
    from training.data.settings import DataArguments, GroupArguments, SourceArguments
    from training.data.streaming import StreamDataset, StreamFiller, StreamGroup, StreamLoader
    from training.tokenizer import TASK_TOKENS, byte_tokenizer

    torch.set_num_threads(1)
    images = UnitImageProcessor(patch_size=16, base_size=128, scale_as="area", max_side=1024)
    processor = UnitProcessor(images, byte_tokenizer(), task_prompts=TASK_TOKENS)
    arguments = GroupArguments("document", 4, patches=3072, sources=[SourceArguments(folder)])
    data = DataArguments(streaming=True)
    group = StreamGroup(arguments, GroupCollator(processor, "document", 4, 2, raw=True), data, seed=0)
    filler = StreamFiller(group, 0, 1)
    sequence = group.levels[data.curriculum.levels]
    loader = iter(StreamLoader(StreamDataset([group], data, 10**9)))
    along, done, cycle, started = [], 0, 0, time.perf_counter()
    while done < rows:
        if decode:
            done += len(next(loader)["document_x4"]["pixel_values"])
        else:
            _, members = filler.fill(sequence, sequence.at(0, cycle), data.curriculum.levels)
            done, cycle = done + len(members), cycle + 1
        if len(along) < 50 * done / rows:
            along.append((done, resident("VmRSS")))
    seconds = time.perf_counter() - started
    found = {"rows": done, "rate": done / seconds, "peak": resident("VmHWM"), "along": along}
    return found | {"counts": dict(filler.counts)}


def in_a_process(folder: Path, rows: int, decode: bool) -> dict:
    """``stream_rows`` in a fresh process.

    Raises:
        RuntimeError: it failed; the last line says why.
    """
    call = f"stream_rows({str(folder)!r}, {rows}, {decode})"
    code = f"import json; from benchmarks.data_streaming import stream_rows; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def draw(points: list[dict], path: Path) -> None:
    """Peak and resident memory in MB against rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    rows = [point["rows"] for point in points]
    axes[0].semilogx(rows, [point["peak"] / 1e6 for point in points], "o-", color=COLOURS[0])
    axes[0].set_xlabel("rows streamed")
    axes[0].set_ylabel("peak resident MB")
    along = np.array(points[-1]["along"])
    axes[1].plot(along[:, 0], along[:, 1] / 1e6, color=COLOURS[1])
    axes[1].set_xlabel(f"rows of the run over {points[-1]['rows']:,}")
    axes[1].set_ylabel("resident MB")
    for axis in axes:
        axis.set_ylim(0, 1.2 * points[-1]["peak"] / 1e6)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def waiting_table(steps: int, overrides: list[str]) -> str:
    """The tiny recipe's trainer on indexed and on streamed data, in one run."""
    from benchmarks.training_step import RECIPE, measure

    rows = []
    for name, more in (("indexed", []), ("streamed", ["data.streaming=true"])):
        with tempfile.TemporaryDirectory() as folder:
            work, wait, counted = measure(RECIPE, [*overrides, *more], steps, folder)
        total = sum(work) + sum(wait)
        images = sum(each[1] for each in counted)
        rows.append([name, f"{np.median(work):.3f}", f"{images / total:.1f}", f"{100 * sum(wait) / total:.1f}%"])
    return markdown_table(["data", "step s", "images/s", "waiting for data"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_streaming", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, as for `unit train`")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--picture", type=Path, help="where to draw the curve")
    parser.add_argument("--steps", type=int, default=20, help="of the trainer, after its warm-up")
    parser.add_argument("--skip-trainer", action="store_true")
    arguments = parser.parse_args(argv)
    print(machine())
    points = []
    with tempfile.TemporaryDirectory() as root:
        for rows in tqdm(sorted(arguments.rows), unit="point", disable=None):
            folder = Path(root) / "rows"
            make_shards(folder, rows)
            points.append(in_a_process(folder, rows, decode=False))
        whole = in_a_process(folder, min(rows, 20_000), decode=True)
    table = [
        [
            f"{point['rows']:,}",
            f"{point['rate']:,.0f}",
            f"{point['peak'] / 1e6:.0f}",
            f"{point['peak'] / points[0]['peak']:.2f}",
            f"{100 * point['counts']['repeated'] / point['rows']:.1f}%",
            f"{100 * point['counts']['padded_up'] / point['rows']:.1f}%",
            f"{100 * point['counts']['dropped'] / point['rows']:.1f}%",
        ]
        for point in points
    ]
    header = ["rows", "rows/s", "peak MB", "of the first", "drawn again", "padded up", "dropped"]
    print("\n" + markdown_table(header, table))
    print(
        f"\nDecoded, augmented and collated, one core: {whole['rate']:,.0f} rows/s, peak {whole['peak'] / 1e6:.0f} MB"
    )
    if arguments.picture:
        draw(points, arguments.picture)
    if not arguments.skip_trainer:
        try:
            print("\n" + waiting_table(arguments.steps, arguments.overrides))
        except (OSError, ValueError) as error:
            print(f"data_streaming: trainer left out: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
