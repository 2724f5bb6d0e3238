"""Images of different sizes: packed into one sequence, padded to the largest, and one by one.

    python -m benchmarks.packed [--shape tiny base] [--dtype float32 bfloat16] [--images 32] [--do forward training]
                                [--seconds 3] [--device cpu] [--reading] [--micro-batches 12]

The sizes of the images are spread evenly from x1 to x4, meant as side (the largest has 4 times the side of the
smallest) and as area (twice). Target: packed at least twice as fast as padded to the largest, as side.

`--reading` reads the sample page with chunks packed and padded. `--micro-batches N` takes N different micro-batches of
documents as a recipe's trainer gets them, packed and padded to few shapes, and trains unit-tiny's encoder on them in
bfloat16 autocast: figures are patches of documents, padding left out, a second of the process's time on all its cores
(a CPU) or of the clock (a GPU). It needs a data set of `unit data`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.common import interleave, ratio, synchronise
from benchmarks.encoder import DTYPES, PASSES, PATCH, SHAPES
from modeling_unit import UnitVisionConfig, UnitVisionModel, pack_images
from modeling_unit.packing_unit import packed_method
from training.evaluation.report import machine, markdown_table

BASE = {"tiny": 128, "base": 224}  # side in pixels at x1: unit-tiny's and the paper's
PAGE = Path(__file__).resolve().parents[1] / "spaces_demo" / "samples" / "pages" / "anthology.png"


def spread_sides(base: int, count: int, scale_as: str) -> list[int]:
    """Sides in pixels of square images from x1 to x4, whole patches, evenly spread in side or in area."""
    steps = [step / max(1, count - 1) for step in range(count)]
    factors = [1 + 3 * step if scale_as == "side" else (1 + 3 * step) ** 0.5 for step in steps]
    return [round(base * factor / PATCH) * PATCH for factor in factors]


def make_model(name: str, device: str) -> UnitVisionModel:
    shape = SHAPES[name]
    torch.manual_seed(0)
    config = UnitVisionConfig(
        **shape,
        intermediate_size=4 * shape["hidden_size"],
        patch_size=PATCH,
        image_size=1024,
        cpe_max_size=1024,
        patch_embed_float32=False,
        cpe_crop=False,
        cpe_drop_prob=0.0,
    )
    return UnitVisionModel._from_config(config, attn_implementation="sdpa").to(device)


def measure(
    model, name: str, scale_as: str, do: str, dtype: str, count: int, seconds: float, device: str
) -> list[str]:
    """One row of the table: see ``main`` for its columns."""
    sides = spread_sides(BASE[name], count, scale_as)
    generator = torch.Generator().manual_seed(1)
    # neither sorted nor in runs: the order that a shuffled data set gives
    order = torch.randperm(count, generator=generator).tolist()
    images = [torch.randn(3, sides[place], sides[place], generator=generator).to(device) for place in order]
    largest = max(sides)
    pack = {key: value.to(device) for key, value in pack_images(images, PATCH).items()}
    padded = torch.stack(
        [F.pad(image, (0, largest - image.shape[2], 0, largest - image.shape[1])) for image in images]
    )
    shapes = pack["image_grid_hw"]
    cast = torch.autocast(device, dtype=DTYPES[dtype]) if dtype != "float32" else nullcontext()

    def tokens(way: str):
        if way == "packed":
            return [model(**pack).last_hidden_state]
        if way == "padded":
            return [model(padded, spatial_shapes=shapes).last_hidden_state]
        return [model(image[None]).last_hidden_state for image in images]

    def run(way: str) -> None:
        if do == "forward":
            with torch.inference_mode(), cast:
                model.eval()
                tokens(way)
            return
        model.train().zero_grad(set_to_none=True)
        with cast:
            found = tokens(way)
        sum(each.float().square().sum() for each in found).backward()

    with torch.inference_mode(), cast:
        model.eval()
        output = model(**pack)
        apart = max(
            float((own - model(image[None]).last_hidden_state[0]).abs().max())
            for own, image in zip(output.split(), images, strict=True)
        )
    ways = ("packed", "padded", "one by one")
    times = interleave(
        {way: lambda way=way: run(way) for way in ways}, rounds=3, seconds=seconds, warmup=1, device=device
    )
    model.zero_grad(set_to_none=True)
    kept, all_of_it = int(shapes.prod(dim=1).sum()), count * (largest // PATCH) ** 2
    half = DTYPES[dtype]
    return [
        f"{name} {dtype}",
        do,
        f"{min(sides)}² to {largest}² ({scale_as})",
        f"{100 * kept / all_of_it:.0f}%",
        *(f"{1000 * statistics.median(times[way]):.1f}" for way in ways),
        f"{ratio(times, 'padded', 'packed'):.2f}",
        f"{ratio(times, 'one by one', 'packed'):.2f}",
        packed_method("sdpa", torch.device(device), half, 0.0),
        f"{apart:.1e}",
    ]


def measure_reading(device: str, seconds: float) -> list[list[str]]:
    """Rows of the reading table: `Reader` on the sample page, chunks packed and padded."""
    from modeling_unit import Reader, shipped_checkpoint

    readers = {
        way: Reader.from_pretrained(shipped_checkpoint(), device=device, packed=way == "packed")
        for way in ("packed", "padded")
    }
    texts = {way: reader.read(PAGE).text for way, reader in readers.items()}
    times = interleave(
        {way: lambda reader=reader: reader.read(PAGE) for way, reader in readers.items()},
        rounds=3,
        seconds=seconds,
        warmup=0,
        device=device,
    )
    return [
        [
            PAGE.name,
            *(f"{statistics.median(times[way]):.2f}" for way in ("packed", "padded")),
            f"{ratio(times, 'padded', 'packed'):.2f}",
            "yes" if texts["packed"] == texts["padded"] else "no",
        ]
    ]


def measure_micro_batches(count: int, patches: int, data: str, device: str) -> list[list[str]]:
    """Rows of the training table: different micro-batches of documents through forward and backward, in turns.

    Raises:
        ValueError, OSError: the data set is not there.
    """
    from transformers import AutoProcessor

    from modeling_unit import UnitModel, shipped_checkpoint
    from training.collator import GroupCollator
    from training.data.mixture import GroupArguments, GroupPlan, SourceArguments

    processor = AutoProcessor.from_pretrained(shipped_checkpoint())
    model = UnitModel.from_pretrained(shipped_checkpoint(), dtype=torch.float32).vision_model.to(device).train()
    plans = {}
    for way in ("packed", "padded"):
        packed = way == "packed"
        settings = GroupArguments("document", 4, patches=patches, packed=packed, sources=[SourceArguments(data)])
        plans[way] = GroupPlan(settings, GroupCollator(processor, "document", 4, 0, packed), seed=1)
    warm = 2
    now = time.process_time if device == "cpu" else time.perf_counter
    spent, kept = {way: [] for way in plans}, {way: [] for way in plans}
    for step in tqdm(range(warm + count), desc="micro-batches", unit="step"):
        for way, plan in plans.items():
            batch = plan[step]
            given = {key: batch[key].to(device) for key in ("pixel_values", "image_grid_hw") if key in batch}
            own = plan_patches(plan, step)
            synchronise(device)
            start = now()
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16):
                tokens = model(**given).last_hidden_state
            tokens.float().square().mean().backward()
            synchronise(device)
            if step >= warm:
                spent[way].append(now() - start)
                kept[way].append(own)
    rates = {way: sum(kept[way]) / sum(spent[way]) for way in plans}
    row = [f"{data}, {patches} patches a micro-batch", *(f"{rates[way]:.0f}" for way in ("packed", "padded"))]
    return [[*row, f"{rates['packed'] / rates['padded']:.2f}"]]


def plan_patches(plan, step: int) -> int:
    """Patches of a micro-batch's documents at their own sizes."""
    processor, members = plan.collator.image_processor, plan.batch(step)[1]
    total = 0
    for source, position in members:
        width, height = plan.sources[source].sizes[position]
        rows, cols = processor.grid_for(int(width), int(height), "document", plan.arguments.scale)
        total += rows * cols
    return total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--do", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--scale-as", nargs="+", choices=("side", "area"), default=["side", "area"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row (default: %(default)s)")
    parser.add_argument("--reading", action="store_true", help="the sample page as well")
    parser.add_argument("--micro-batches", type=int, default=0, metavar="N", help="a recipe's micro-batches as well")
    parser.add_argument(
        "--patches", type=int, default=3072, help="in a micro-batch (default: %(default)s, a recipe's)"
    )
    parser.add_argument("--data", default="chunks-train", help="of the micro-batches (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args(argv)
    print(machine(arguments.device))
    cases = [
        (name, dtype, do, scale_as)
        for name in arguments.shape
        for dtype in arguments.dtype
        for do in arguments.do
        for scale_as in arguments.scale_as
    ]
    models = {name: make_model(name, arguments.device) for name in arguments.shape}
    rows = []
    for name, dtype, do, scale_as in tqdm(cases, desc="packed", unit="row"):
        given = (arguments.images, arguments.seconds, arguments.device)
        rows.append(measure(models[name], name, scale_as, do, dtype, *given))
    header = ["shape", "pass", "images", "no padding", "packed ms", "padded ms", "one by one ms"]
    header += ["padded / packed", "one by one / packed", "attention", "from one by one"]
    print("\n" + markdown_table(header, rows))
    if arguments.reading:
        rows = measure_reading(arguments.device, arguments.seconds)
        print("\n" + markdown_table(["page", "packed s", "padded s", "padded / packed", "same text"], rows))
    if arguments.micro_batches:
        try:
            rows = measure_micro_batches(arguments.micro_batches, arguments.patches, arguments.data, arguments.device)
        except (OSError, ValueError) as error:
            print(f"micro-batches: left out: {str(error).splitlines()[0]}")
            return
        print("\n" + markdown_table(["data", "packed patches/s", "padded patches/s", "packed / padded"], rows))


if __name__ == "__main__":
    main()
