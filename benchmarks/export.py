"""Exported encoder: ONNX Runtime beside torch on the CPU, batch 1, several sizes.

    python -m benchmarks.export [--shape tiny base] [--batch 1] [--seconds 4]

The encoder is exported as `unit export` does it, then both run the same pixels in turns in one process, float32, with
as many threads each; times are medians. ONNX Runtime's threads sleep between runs here, lest they take torch's time.
Target: a ratio of at most 1.0. Needs the extra `export`.

"of the floor" is the share of the time that the encoder's matrix products would need at torch's best rate on this
machine; more than 100% means that ONNX Runtime multiplies faster than torch does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common import encoder_flops, interleave, matmul_rate, ratio
from benchmarks.encoder import PATCH, make_models
from training.evaluation.report import machine, markdown_table
from training.onnx_export import check_packages, export_onnx, session

# Height and width in pixels: the nominal size, x4 as area, a line of text; for the small one also x4 as side.
SIZES = {
    "tiny": [(128, 128), (256, 256), (512, 512), (32, 1024)],
    "base": [(224, 224), (448, 448), (32, 1024)],
}


def measure(name: str, encoder, runtime, size: tuple[int, int], batch: int, rate: float, seconds: float) -> list[str]:
    """One row of the table: see ``main`` for its columns."""
    pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    array, patch = pixels.numpy(), PATCH
    with torch.inference_mode():
        expected = encoder(pixels).last_hidden_state.numpy()
        difference = abs(runtime.run(["last_hidden_state"], {"pixel_values": array})[0] - expected).max()
        times = interleave(
            {"torch": lambda: encoder(pixels), "onnx": lambda: runtime.run(None, {"pixel_values": array})},
            rounds=5,
            warmup=1,
            seconds=seconds,
        )
    floor = batch * encoder_flops(encoder.config, size[0] // patch, size[1] // patch) / rate
    return [
        name,
        f"{size[0]} x {size[1]}",
        str(batch),
        f"{1000 * statistics.median(times['torch']):.2f}",
        f"{1000 * statistics.median(times['onnx']):.2f}",
        f"{ratio(times, 'onnx', 'torch'):.3f}",
        f"{100 * floor / statistics.median(times['torch']):.0f}%",
        f"{100 * floor / statistics.median(times['onnx']):.0f}%",
        f"{difference:.1e}",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row (default: %(default)s)")
    arguments = parser.parse_args(argv)
    check_packages()
    import onnxruntime

    print(f"{machine('cpu')}; onnxruntime {onnxruntime.__version__}")
    rate = matmul_rate(torch.float32)
    print(f"matrix products of torch in float32: {rate / 1e9:.0f} GFLOP/s")
    cases = [(name, size, batch) for name in arguments.shape for size in SIZES[name] for batch in arguments.batch]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        encoders, runtimes = {}, {}
        for name in tqdm(arguments.shape, desc="exporting", unit="shape"):
            encoders[name] = make_models(name, "cpu")["unit"].eval()
            path = Path(folder) / f"{name}.onnx"
            export_onnx(encoders[name], path)
            runtimes[name] = session(path, spinning=False)
        for name, size, batch in tqdm(cases, desc="export", unit="row"):
            rows.append(measure(name, encoders[name], runtimes[name], size, batch, rate, arguments.seconds))
    header = ["shape", "image", "batch", "torch ms", "ONNX Runtime ms", "ratio"]
    header += ["torch of the floor", "ONNX Runtime of the floor", "difference"]
    print("\n" + markdown_table(header, rows))


if __name__ == "__main__":
    main()
