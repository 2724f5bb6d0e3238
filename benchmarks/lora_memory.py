"""Peak memory of a training step with a x4 document: full training against LoRA's presets, at three sizes.

    python -m benchmarks.lora_memory [--sizes small base large] [--variants full encoder ...] [--no-checkpointing]

Each point is a run of two steps of `unit train`'s own `main` in a process of its own, AdamW in float32 with its
states, bf16 autocast, the teacher beside the model (the start's encoder, as in stage 1). Memory is the peak of
resident memory while it trains (Linux: VmHWM) above what the process holds before the model is loaded; a small run
goes first, so that libraries are loaded, and glibc is told to give back what is freed. Weights, gradients, optimiser,
teacher, activations and batch are all in it. Target of the presets: at most 60% of full training.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.memory import in_a_process
from training.evaluation.measuring import resident
from training.evaluation.report import machine, markdown_table

MB = 1e6
# Width and depth of the encoder and of the decoder; `large` is a quarter of CLIP ViT-L with half of OPT-125M
SIZES = {"small": (192, 6, 192, 4), "base": (768, 6, 768, 4), "large": (1024, 6, 768, 6)}
VARIANTS = {
    "full": {},
    "encoder": {"preset": "encoder"},
    "decoder": {"preset": "decoder"},
    "both": {"preset": "both"},
    "both, DoRA": {"preset": "both", "use_dora": True},
    "both, base in float32": {"preset": "both", "base_dtype": "float32"},
}
TARGET = 0.6


def write_run(folder: Path, size: tuple[int, int, int, int], variant: str, checkpointing: bool) -> Path:
    """Start, rows and recipe of a run of two steps; returns the recipe's path."""
    from modeling_unit import UnitConfig, UnitForPreTraining, UnitImageProcessor, UnitProcessor, UnitVisionConfig
    from training.data.schema import make_row, write_shards
    from training.tokenizer import TASK_TOKENS, byte_tokenizer

    torch.manual_seed(0)
    width, depth, text_width, text_depth = size
    vision = UnitVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        patch_size=14,
        image_size=448,
        cpe_max_size=448,
    )
    tokenizer = byte_tokenizer()
    text = {"model_type": "opt", "hidden_size": text_width, "word_embed_proj_dim": text_width}
    text |= {"ffn_dim": 4 * text_width, "num_hidden_layers": text_depth, "num_attention_heads": text_width // 64}
    text |= {"max_position_embeddings": 1024, "vocab_size": len(tokenizer), "dropout": 0.0, "bos_token_id": None}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    processor = UnitProcessor(
        UnitImageProcessor(patch_size=14, base_size=224, scale_as="area"), tokenizer, task_prompts=TASK_TOKENS
    )
    config = UnitConfig(
        vision_config=vision,
        text_config=text,
        connector_config={"connector_type": "mlp", "unshuffle": 2},
        image_token_id=processor.image_token_id,
    )
    UnitForPreTraining(config).save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    rng = np.random.default_rng(0)

    def row(kind: str, side: int, characters: int, number: int) -> dict:
        channels = () if kind == "document" else (3,)
        pixels = rng.integers(0, 256, size=(side, side, *channels), dtype=np.uint8)
        origin = {"source": f"made/{number}", "license": "CC0-1.0", "split": "train"}
        task = "ocr" if kind == "document" else "caption"
        return make_row(pixels, "".join(rng.choice(list("abcd "), size=characters)), task=task, kind=kind, **origin)

    write_shards([row("document", 448, 500, number) for number in range(4)], folder / "documents")
    write_shards([row("natural", 224, 50, number) for number in range(4)], folder / "pictures")
    recipe = {
        "stage": "intra_scale",
        "start": str(folder / "start"),
        "teacher": str(folder / "start"),
        "groups": [
            {"kind": "document", "scale": 4, "rows": 1, "sources": [{"path": str(folder / "documents")}]},
            {"kind": "natural", "scale": 1, "rows": 2, "sources": [{"path": str(folder / "pictures")}]},
        ],
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 2,
            "bf16": True,
            "gradient_checkpointing": checkpointing,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "lora": VARIANTS[variant] | ({"warn_single_scale": False} if VARIANTS[variant] else {}),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def measure_point(size: str, variant: str, checkpointing: bool) -> dict[str, int]:
    """In a process of its own: peak bytes of a run's training above those before its model, trained parameters."""
    from training import recipe
    from training.trainer import UnitTrainer

    seen: dict[str, int] = {}
    train = UnitTrainer.train

    def watched(trainer, **kwargs):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        out = train(trainer, **kwargs)
        seen["peak"] = resident("VmHWM")
        seen["trained"] = sum(each.numel() for each in trainer.model.parameters() if each.requires_grad)
        return out

    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as name:
        recipe.main(write_run(Path(small), (64, 1, 64, 1), variant, checkpointing))
        path = write_run(Path(name), SIZES[size], variant, checkpointing)
        gc.collect()
        before = resident("VmRSS")
        with patch.object(UnitTrainer, "train", watched):
            recipe.main(path)
    return {"bytes": seen["peak"] - before, "trained": seen["trained"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="full comes always")
    parser.add_argument("--no-checkpointing", action="store_true", help="only runs without gradient checkpointing")
    arguments = parser.parse_args(argv)
    variants = ["full", *(name for name in VARIANTS if name in arguments.variants and name != "full")]
    ways = (False,) if arguments.no_checkpointing else (False, True)
    print(machine(), flush=True)
    rows, missed = [], []
    with tqdm(total=len(arguments.sizes) * len(ways) * len(variants), desc="lora_memory", unit="run") as progress:
        for size in arguments.sizes:
            for checkpointing in ways:
                full = 0
                for variant in variants:
                    found = in_a_process("lora_memory", size, variant, checkpointing)
                    full = full or found["bytes"]
                    share = found["bytes"] / full
                    way = "yes" if checkpointing else "no"
                    if variant != "full" and share > TARGET:  # also of what is no preset
                        missed.append(f"{size} {variant}{' with checkpointing' * checkpointing} {100 * share:.0f}%")
                    numbers = [f"{found['trained'] / 1e6:.1f}", f"{found['bytes'] / MB:.0f}", f"{100 * share:.0f}%"]
                    rows.append([size, way, variant, *numbers])
                    progress.update()
    header = ["size", "checkpointing", "what trains", "M parameters trained", "peak MB", "of full"]
    print("\n" + markdown_table(header, rows))
    print(
        f"\ntarget at most {TARGET:.0%} of full training: " + ("met" if not missed else f"missed: {'; '.join(missed)}")
    )


if __name__ == "__main__":
    main()
