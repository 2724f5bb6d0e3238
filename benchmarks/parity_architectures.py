"""Any ViT as the start: what the trained encoder gives, beside what the plain class of transformers gives.

    python -m benchmarks.parity_architectures [--architecture clip_vision_model ...] [--dtype float32] [--shape small]

For every architecture a random checkpoint is written, taken as the start (`from_vision_pretrained`), trained for a
step and saved (`save_encoder`). The saved folder is loaded by `AutoModel` as the plain class and called as its own
documentation says. Two largest differences over all tokens are printed for each size:

- "saved": the trained encoder inside UNIT against the plain class that loads the saved folder. Must be 0.
- "mixed": the same image in a padded batch of all sizes against the image alone, as a share of the largest value.
  Must be at most 1e-5 in float32.

The exit status is 1 when either fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel

from modeling_unit import UnitForPreTraining, UnitVisionConfig, UnitVisionModel
from modeling_unit.architectures_unit import ARCHITECTURES, freeze_unread, run_encoder
from training.evaluation.report import machine, markdown_table

SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
PATCH, SIDE = 16, 224
SIZES = [(224, 224), (112, 336), (448, 448), (336, 560)]  # height, width in pixels; the first is the nominal one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST = {"float32": 1e-5, "bfloat16": 5e-2}  # of "mixed"; ours: bfloat16 keeps 8 bits of a sum of hundreds


def plain_model(name: str, shape: dict) -> PreTrainedModel:
    """A random encoder of the architecture, as its own class."""
    size = {"siglip2_vision_model": {"num_patches": (SIDE // PATCH) ** 2}}.get(name, {"image_size": SIDE})
    mlp = {"mlp_ratio": 4.0} if name == "radio" else {"mlp_ratio": 4}
    if not name.startswith(("dinov2", "radio")):
        mlp = {"intermediate_size": 4 * shape["hidden_size"]}
    settings = shape | mlp | size | {"patch_size": PATCH}
    if name == "unit_vision_model":
        # no random crops of the positions: a training step is to be the only thing that is drawn
        return UnitVisionModel._from_config(UnitVisionConfig(**settings, cpe_max_size=448, cpe_crop=False))
    config = transformers.CONFIG_MAPPING[name](**settings)
    return getattr(transformers, ARCHITECTURES[name].class_name)._from_config(config)


def call_plain(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """`last_hidden_state` of the class called by hand at any size."""
    name = model.config.model_type
    if name in ("clip_vision_model", "siglip_vision_model", "vit"):
        return model(pixels, interpolate_pos_encoding=True).last_hidden_state
    if name != "siglip2_vision_model":
        return model(pixels).last_hidden_state
    batch, _, height, width = pixels.shape
    patches = torch.nn.functional.unfold(pixels.float(), PATCH, stride=PATCH).unflatten(1, (3, PATCH * PATCH))
    return model(
        pixel_values=patches.permute(0, 3, 2, 1).flatten(2).to(pixels.dtype),
        pixel_attention_mask=torch.ones(batch, patches.shape[-1], dtype=torch.long),
        spatial_shapes=torch.tensor([[height // PATCH, width // PATCH]] * batch),
    ).last_hidden_state


def train_a_step(model: UnitForPreTraining, pixels: torch.Tensor) -> None:
    target = torch.randn_like(run_encoder(model.make_teacher(), pixels).last_hidden_state)
    freeze_unread(model.vision_model)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()(pixel_values=pixels, teacher_features=target).loss.backward()
    optimizer.step()
    model.eval()


def measure(name: str, shape: dict, dtype: torch.dtype) -> list[tuple[float, float]]:
    """For each size, the differences "saved" and "mixed"."""
    torch.manual_seed(0)
    images = [torch.randn(1, 3, *size, dtype=dtype) for size in SIZES]
    decoder = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "vocab_size": 8}
    decoder |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        start, saved = Path(folder, "start"), Path(folder, "saved")
        plain_model(name, shape).save_pretrained(start)
        model = UnitForPreTraining.from_vision_pretrained(
            start, text_config=decoder, connector_config={"connector_type": "mlp"}, image_token_id=8, dtype=dtype
        )
        train_a_step(model, images[0])
        model.save_encoder(saved)
        plain = AutoModel.from_pretrained(saved, dtype="auto").eval()
        height, width = (max(size[axis] for size in SIZES) for axis in (0, 1))
        batch = torch.zeros(len(SIZES), 3, height, width, dtype=dtype)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[2], : image.shape[3]] = image[0]
        shapes = torch.tensor([[size[0] // PATCH, size[1] // PATCH] for size in SIZES])
        rows = []
        with torch.no_grad():
            prefix, patches, mask, _ = model.encode(batch, shapes)
            for index, image in enumerate(images):
                alone = run_encoder(model.vision_model, image).last_hidden_state
                exact = (alone - call_plain(plain, image)).abs().max().item()
                together = torch.cat([prefix[index], patches[index][mask[index]]])
                mixed = ((together - alone[0]).abs().max() / alone.abs().max()).item()
                rows.append((exact, mixed))
    return rows


def shown(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.1e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity_architectures", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    arguments = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()

    print(machine("cpu"))
    shape = SHAPES[arguments.shape]
    print(f"width {shape['hidden_size']}, {shape['num_hidden_layers']} layers, patch {PATCH}, random weights\n")
    cases = [(name, dtype) for dtype in arguments.dtype for name in arguments.architecture]
    rows, good = [], True
    for name, dtype in tqdm(cases, desc="parity", unit="architecture"):
        found = measure(name, shape, DTYPES[dtype])
        good = good and all(exact == 0 and mixed <= MOST[dtype] for exact, mixed in found)
        cells = [f"{shown(exact)} / {shown(mixed)}" for exact, mixed in found]
        rows.append([name, ARCHITECTURES[name].class_name, dtype, *cells])
    sizes = [f"{height} x {width}: saved / mixed" for height, width in SIZES]
    print(markdown_table(["architecture", "saved as", "dtype", *sizes], rows))
    print(f"\nall exact, all mixed batches within {MOST}" if good else "\nFAILED: see the table")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
