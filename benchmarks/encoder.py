"""The encoder beside transformers' `CLIPVisionModel`, `RadioModel` and `Dinov2Model` of the same shape, all with SDPA.

    python -m benchmarks.encoder [--shape tiny base] [--dtype float32 bfloat16] [--side 224 448 896] [--batch 1 8 32]
                                 [--do forward training] [--seconds 3] [--device cpu] [--largest 400]

All have the same width, depth, heads, MLP and patch, one prefix token, and see the same pixels, each with its
positions fitted to the size in its own way. They run in turns in one process; times are medians. "training" is forward
and backward, without the random crops of positions that the others do not have. Target: a ratio of at most 1.0 to the
fastest of the three.

"of the floor" is the share of the time that the encoder's matrix products would need at the machine's own best rate,
measured in the same run: 100% would be an encoder that does nothing but multiply at full speed. On a CPU, rows of more
than `--largest` GFLOP a pass are left out, and named.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, RadioConfig, RadioModel

from benchmarks.common import encoder_flops, interleave, matmul_rate, ratio, training_flops
from modeling_unit.configuration_unit import UnitVisionConfig
from modeling_unit.encoder_unit import UnitVisionModel
from training.evaluation.report import machine, markdown_table

# unit-tiny's shape and ViT-B/16's
SHAPES = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
PATCH = 16
NOMINAL = 224  # side in pixels that the others' tables of positions are made for
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "training")


def make_models(name: str, device: str) -> dict[str, nn.Module]:
    """Encoders of the shape ``name`` with random weights: ours first."""
    shape = SHAPES[name]
    width = shape["hidden_size"]
    common = shape | {"patch_size": PATCH, "image_size": NOMINAL}
    clip = CLIPVisionConfig(**common, intermediate_size=4 * width, hidden_act="gelu")
    radio = RadioConfig(**common, mlp_ratio=4.0, max_img_size=2 * NOMINAL, num_cls_tokens=1, num_registers=0)
    radio.summary_idxs = [0]
    # The patch embedding is computed in the dtype of the rest, as the others do and unit-tiny too.
    besides = {"cpe_max_size": 2 * NOMINAL, "patch_embed_float32": False, "cpe_crop": False, "cpe_drop_prob": 0.0}
    ours = UnitVisionConfig(**common, **besides, intermediate_size=4 * width)
    models = {
        "unit": (UnitVisionModel, ours),
        "clip": (CLIPVisionModel, clip),
        "radio": (RadioModel, radio),
        "dinov2": (Dinov2Model, Dinov2Config(**common, mlp_ratio=4)),
    }
    torch.manual_seed(0)
    return {
        key: kind._from_config(config, attn_implementation="sdpa").to(device) for key, (kind, config) in models.items()
    }


def make_pass(key: str, model: nn.Module, pixels: torch.Tensor, do: str, dtype: str) -> Callable[[], None]:
    """One forward pass, or a forward and a backward pass."""
    given = {"interpolate_pos_encoding": pixels.shape[-1] != NOMINAL} if key == "clip" else {}
    cast = torch.autocast(pixels.device.type, dtype=DTYPES[dtype]) if dtype != "float32" else nullcontext()

    def forward() -> None:
        with torch.inference_mode(), cast:
            model.eval()(pixels, **given)

    def training() -> None:
        model.train().zero_grad(set_to_none=True)
        with cast:
            tokens = model(pixels, **given).last_hidden_state
        tokens.float().square().mean().backward()

    return training if do == "training" else forward


def flops(models: dict[str, nn.Module], side: int, batch: int, do: str) -> int:
    forward = batch * encoder_flops(models["unit"].config, side // PATCH, side // PATCH)
    return training_flops(forward) if do == "training" else forward


def measure(
    models: dict[str, nn.Module], dtype: str, do: str, side: int, batch: int, rate: float, seconds: float, device: str
) -> tuple[list[str], float]:
    """Figures of one row of the table, see ``main`` for its columns, and the ratio to the fastest."""
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    passes = {key: make_pass(key, model, pixels, do, dtype) for key, model in models.items()}
    times = interleave(passes, rounds=5, seconds=seconds, device=device)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    median = {key: statistics.median(taken) for key, taken in times.items()}
    fastest = min((key for key in median if key != "unit"), key=median.__getitem__)
    found = ratio(times, "unit", fastest)
    floor = flops(models, side, batch, do) / rate
    return [
        *(f"{1000 * median[key]:.2f}" for key in models),
        f"{found:.3f} ({fastest})",
        f"{batch / median['unit']:.1f}",
        f"{100 * floor / median['unit']:.0f}%",
    ], found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--side", nargs="+", type=int, default=[224, 448, 896])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--do", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row (default: %(default)s)")
    parser.add_argument("--largest", type=float, default=400, help="GFLOP of a pass on a CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args(argv)
    if any(side < PATCH or side % PATCH for side in arguments.side):
        parser.error(f"--side must be multiples of the patch size {PATCH}")

    print(machine(arguments.device))
    rates = {dtype: matmul_rate(DTYPES[dtype], device=arguments.device) for dtype in arguments.dtype}
    for dtype, rate in rates.items():
        print(f"matrix products in {dtype}: {rate / 1e9:.0f} GFLOP/s")
    cases = [
        (dtype, do, side, batch)
        for dtype in arguments.dtype
        for do in arguments.do
        for side in arguments.side
        for batch in arguments.batch
    ]
    rows, ratios, left_out = [], [], []
    with tqdm(total=len(cases) * len(arguments.shape), desc="encoder", unit="row") as progress:
        for name in arguments.shape:
            models = make_models(name, arguments.device)
            for dtype, do, side, batch in cases:
                label = [f"{name} {dtype}", do, f"{side}²", str(batch)]
                if arguments.device == "cpu" and flops(models, side, batch, do) > 1e9 * arguments.largest:
                    left_out.append(" ".join(label))
                else:
                    try:
                        figures, found = measure(
                            models, dtype, do, side, batch, rates[dtype], arguments.seconds, arguments.device
                        )
                        rows.append(label + figures)
                        ratios.append(found)
                    except torch.OutOfMemoryError:
                        left_out.append(" ".join(label) + " (out of memory)")
                progress.update()
    header = ["shape", "pass", "image", "batch", "UNIT ms", "CLIP ms", "Radio ms", "DINOv2 ms"]
    print("\n" + markdown_table([*header, "ratio to the fastest", "images/s", "of the floor"], rows))
    if ratios:
        within = sum(found <= 1.0 for found in ratios)
        print(f"\nat most 1.0: {within} of {len(ratios)} rows; median {statistics.median(ratios):.3f}")
    if left_out:
        print(f"left out as too large (--largest): {'; '.join(left_out)}")


if __name__ == "__main__":
    main()
