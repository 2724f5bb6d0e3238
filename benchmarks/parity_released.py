"""Parity with the released format: `UnitVisionModel` beside an independent forward pass, case by case.

    python -m benchmarks.parity_released                       # small encoders of random weights, every case
    python -m benchmarks.parity_released --checkpoint FOLDER   # a released checkpoint, at sizes of daily use

The independent pass is `tests/reference_released.py`: plain torch on the released state dict, no code of ours. Each
small encoder is written to a folder in the released format and loaded from there; its outputs are of order one. Both
run in float32. Target: at most 1e-5 everywhere; the exit status is 1 if a case is above.

The figures are largest differences. The cases: the table of positions covers the nominal size or not (M), one or three
class tokens, registers, `gp`, pixels in [0, 1] or already normalised ("twice": the encoder normalises again), and in
training, given the same random draws.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from modeling_unit import UnitVisionModel
from training.evaluation.report import machine, markdown_table

LIMIT = 1e-5
# patches of 4 pixels, a table of 6 x 6: its own size, smaller, not square, larger, one side larger
IMAGES = [(24, 24), (16, 16), (8, 20), (40, 40), (32, 44), (12, 44)]
DAILY = [(224, 224), (224, 336), (392, 280)]
MODELS = {"≠ nominal": "vit_tiny_patch4_16", "= nominal": "vit_tiny_patch4_24"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def reference() -> ModuleType:
    """`tests/reference_released.py`, which is no part of a package."""
    path = Path(__file__).resolve().parents[1] / "tests" / "reference_released.py"
    spec = importlib.util.spec_from_file_location("reference_released", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(sizes: list[tuple[int, int]], twice: bool) -> list[torch.Tensor]:
    """A batch of two of each size, pixels in [0, 1], or normalised as CLIP's processor does."""
    made = [torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(sum(size))) for size in sizes]
    if twice:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        made = [(image - mean) / std for image in made]
    return made


@torch.no_grad()
def differences(model: UnitVisionModel, state: dict, args: dict, batches: list[torch.Tensor]) -> list[float]:
    """Largest difference of each batch, at evaluation."""
    other = reference()
    return [
        float((model(batch).last_hidden_state - other.forward(state, args, batch)).abs().max()) for batch in batches
    ]


@torch.no_grad()
def training_differences(model: UnitVisionModel, state: dict, args: dict, batches: list[torch.Tensor]) -> list[float]:
    """The same in training, with the same random numbers for crops and drops in both."""
    other, found = reference(), []
    model.train()
    for batch in batches:
        torch.manual_seed(0)
        parts = [torch.rand(2, 1), torch.rand(2, 1), torch.rand(2, 2), torch.rand(2, 1, 1).flatten(1)]
        torch.manual_seed(0)
        output = model(batch).last_hidden_state
        expected = other.forward(state, args, batch, torch.cat(parts, dim=1))
        found.append(float((output - expected).abs().max()))
    model.eval()
    return found


def small_cases() -> list[tuple[list[str], list[float]]]:
    """Every case of the random encoders: the case in words, the difference at each of `IMAGES`."""
    other, rows = reference(), []
    cases = list(itertools.product(MODELS, (1, 3), (0, 8), ("token", "avg")))
    for nominal, classes, registers, gp in tqdm(cases, desc="encoders", unit="encoder"):
        args = {"model": MODELS[nominal], "cpe_max_size": 24, "register_multiple": registers, "gp": gp}
        args |= {"cls_token_per_teacher": classes > 1, "teachers": [{"name": str(i)} for i in range(classes)]}
        state = other.make(args, classes)
        with tempfile.TemporaryDirectory() as folder:
            save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            (Path(folder) / "config.json").write_text(json.dumps({"args": args, "version": "random"}))
            model = UnitVisionModel.from_pretrained(folder)
            case = [nominal, str(classes), str(model.config.num_registers), gp]
            for twice in (False, True):
                found = differences(model, state, args, images(IMAGES, twice))
                rows.append(([*case, "twice" if twice else "once"], found))
            found = training_differences(model, state, args, images(IMAGES, False))
            rows.append(([*case, "once, training"], found))
    return rows


def checkpoint_cases(folder: Path) -> list[tuple[list[str], list[float]]]:
    """A real checkpoint at the sizes of daily use."""
    args = json.loads((folder / "config.json").read_text(encoding="utf-8"))["args"]
    model = UnitVisionModel.from_pretrained(folder, dtype=torch.float32)
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {name: tensor.float() for name, tensor in load_file(file).items()}
    config, rows = model.config, []
    nominal = "= nominal" if config.image_size == config.position_side * config.patch_size else "≠ nominal"
    case = [nominal, str(config.num_cls_tokens), str(config.num_registers), str(args.get("gp"))]
    for twice in tqdm((False, True), desc="checkpoint"):
        found = differences(model, state, args, [batch[:1] for batch in images(DAILY, twice)])
        rows.append(([*case, "twice" if twice else "once"], found))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity_released", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a folder in the released format (default: random encoders)")
    arguments = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    print(machine())
    rows = checkpoint_cases(arguments.checkpoint) if arguments.checkpoint else small_cases()
    sizes = DAILY if arguments.checkpoint else IMAGES
    header = ["M", "class tokens", "registers", "gp", "normalised", *(f"{height}x{width}" for height, width in sizes)]
    print("\n" + markdown_table(header, [[*case, *(f"{value:.1e}" for value in found)] for case, found in rows]))
    worst = max(value for _, found in rows for value in found)
    print(f"\nlargest of all: {worst:.1e}; target: at most {LIMIT:.0e}")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
