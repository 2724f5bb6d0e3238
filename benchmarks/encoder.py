"""Encoder forward: `UnitVisionModel` beside transformers' `CLIPVisionModel` of the same shape, both with SDPA.

    python -m benchmarks.encoder [--shape tiny base] [--dtype float32 bfloat16] [--seconds 3] [--device cpu]

Both have the same width, depth, heads and MLP and see the same pixels (CLIP with its positions interpolated where the
image is not its nominal one). They run in turns in one process; times are medians. Target: a ratio of at most 1.0.

"of the floor" is the share of the time that the encoder's matrix products would need at the machine's own best rate,
measured in the same run: 100% would be an encoder that does nothing but multiply at full speed.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from functools import partial

import torch
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.common import encoder_flops, interleave, matmul_rate, ratio
from modeling_unit.configuration_unit import UnitVisionConfig
from modeling_unit.encoder_unit import UnitVisionModel
from training.evaluation.report import machine, markdown_table

# name -> shape of both encoders, patch, side in pixels at x1, ours besides. x4 is meant as area, twice the side.
# The patch embedding is computed in the dtype of the rest, as CLIP does and unit-tiny too.
SHAPES = {
    "tiny": (
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
        16,
        128,
        {"image_size": 1024, "cpe_max_size": 1024, "patch_embed_float32": False},  # as unit-tiny's recipe has them
    ),
    "base": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        16,
        224,
        {"image_size": 224, "cpe_max_size": 448, "patch_embed_float32": False},
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_pair(name: str, device: str) -> tuple[UnitVisionModel, CLIPVisionModel]:
    """Two encoders of the shape ``name`` with random weights, in evaluation mode."""
    shape, patch, side, besides = SHAPES[name]
    torch.manual_seed(0)
    config = UnitVisionConfig(**shape, **besides, patch_size=patch)
    ours = UnitVisionModel._from_config(config, attn_implementation="sdpa")
    config = CLIPVisionConfig(**shape, patch_size=patch, image_size=side, hidden_act="gelu")
    theirs = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
    return ours.eval().to(device), theirs.eval().to(device)


def measure(
    name: str, dtype: str, batch: int, scale: int, rate: float, seconds: float, device: str, pair
) -> list[str]:
    """One row of the table: see ``main`` for its columns."""
    ours, theirs = pair
    _, patch, nominal, _ = SHAPES[name]
    side = nominal * (2 if scale == 4 else 1)
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    cast = torch.autocast(device, dtype=DTYPES[dtype]) if dtype != "float32" else nullcontext()
    with torch.inference_mode(), cast:
        times = interleave(
            {
                "unit": partial(ours, pixels),
                "clip": partial(theirs, pixels, interpolate_pos_encoding=side != nominal),
            },
            seconds=seconds,
            device=device,
        )
    median = statistics.median(times["unit"])
    floor = batch * encoder_flops(ours.config, side // patch, side // patch) / rate
    return [
        f"{name} {dtype}",
        f"x{scale} ({side}²)",
        str(batch),
        f"{1000 * median:.2f}",
        f"{1000 * statistics.median(times['clip']):.2f}",
        f"{ratio(times, 'unit', 'clip'):.3f}",
        f"{batch / median:.1f}",
        f"{100 * floor / median:.0f}%",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args(argv)

    print(machine(arguments.device))
    rates = {dtype: matmul_rate(DTYPES[dtype], device=arguments.device) for dtype in arguments.dtype}
    for dtype, rate in rates.items():
        print(f"matrix products in {dtype}: {rate / 1e9:.0f} GFLOP/s")
    cases = [
        (name, dtype, batch, scale)
        for name in arguments.shape
        for dtype in arguments.dtype
        for scale in (1, 4)
        for batch in arguments.batch
    ]
    pairs = {name: make_pair(name, arguments.device) for name in arguments.shape}
    rows = []
    for name, dtype, batch, scale in tqdm(cases, desc="encoder", unit="row"):
        rows.append(measure(name, dtype, batch, scale, rates[dtype], arguments.seconds, arguments.device, pairs[name]))
    header = ["shape", "image", "batch", "UNIT ms", "CLIP ms", "ratio", "images/s", "of the floor"]
    print("\n" + markdown_table(header, rows))


if __name__ == "__main__":
    main()
