"""Peak memory of a training step of the whole model at x4 with gradient checkpointing, against its number of tokens.

    python -m benchmarks.training_memory [--width 192] [--patches 16 24 32 40 48 56 64] [--no-checkpointing]
                                         [--device cuda]

Each point is one step (encoder, connector, language decoder, losses, backward, clipped gradients, AdamW; bfloat16
autocast) on one document of that many patches a side, its text as long as it has visual tokens (a quarter of the
patches), in a process of its own. The peak is what the step needs beyond the model, its optimiser's state and the
libraries: of resident memory on a CPU (Linux), of torch's allocator on a GPU. Tokens are the encoder's. Target:
linear; the square of the largest point's attention, held in full in one layer, is printed beside it.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
from tqdm import tqdm

from benchmarks.memory import fit_line, in_a_process
from training.evaluation.measuring import begin_peak, read_peak

SIDES = (16, 24, 32, 40, 48, 56, 64)  # patches: 256 to 4,096
PATCH = 16


def measure_point(width: int, side: int, checkpointing: bool, device: str) -> dict[str, int]:
    """Encoder's tokens and peak bytes of one step on a document of ``side`` x ``side`` patches."""
    import torch

    from benchmarks.training_step import Steps
    from modeling_unit import UnitConfig, UnitForPreTraining, UnitImageProcessor, UnitVisionConfig
    from training.arguments import UnitTrainingArguments
    from training.trainer import UnitTrainer

    torch.manual_seed(0)
    largest = PATCH * max(side, 16)
    vision = {"hidden_size": width, "num_hidden_layers": 6, "num_attention_heads": width // 64, "patch_size": PATCH}
    vision |= {"intermediate_size": 4 * width, "image_size": largest, "cpe_max_size": largest, "cpe_crop": False}
    text = {"model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    text |= {"num_hidden_layers": 4, "num_attention_heads": width // 64, "vocab_size": 300, "dropout": 0.0}
    text |= {"max_position_embeddings": 4096}
    shape = {"connector_type": "mlp", "unshuffle": 2}
    model = UnitForPreTraining(
        UnitConfig(
            vision_config=UnitVisionConfig(**vision), text_config=text, connector_config=shape, image_token_id=299
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "max_steps": 10, "bf16": True, "use_cpu": device == "cpu"}
        settings |= {"gradient_checkpointing": checkpointing, "report_to": "none", "remove_unused_columns": False}
        arguments = UnitTrainingArguments(**settings)
    images = UnitImageProcessor(patch_size=PATCH, base_size=largest // 2, scale_as="side")
    trainer = UnitTrainer(model=model, args=arguments, image_processor=images, train_dataset=[0])
    trainer.text_behind = True
    if checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    steps = Steps(trainer)

    def batch(patches: int) -> dict[str, dict[str, torch.Tensor]]:
        visual = (patches // 2) ** 2
        ids = torch.randint(0, 256, (1, 2 * visual))
        labels = ids.clone()
        ids[:, :visual], labels[:, : visual + 1] = 299, -100
        pixels = torch.randint(0, 256, (1, 1, PATCH * patches, PATCH * patches), dtype=torch.uint8)
        return {"document_x4": {"pixel_values": pixels, "input_ids": ids, "labels": labels}}

    for _ in range(2):  # libraries' buffers, the optimiser's state
        steps.loss(batch(4))
        steps.update()
    given = batch(side)
    before = begin_peak(device)
    steps.loss(given)
    steps.update()
    peak = read_peak(device)
    return {"tokens": side * side + 1, "bytes": peak - before}


def main(argv: list[str] | None = None) -> None:
    from training.evaluation.report import machine, markdown_table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=192, help="of encoder and decoder, a multiple of 64")
    parser.add_argument("--patches", nargs="+", type=int, default=list(SIDES), help="of a side, even, a point each")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args(argv)
    if len(set(arguments.patches)) < 3 or any(side % 2 for side in arguments.patches):
        parser.error("--patches: a line needs at least three different points, each even")
    if arguments.width % 64 or arguments.width < 64:
        parser.error("--width must be a multiple of 64")
    print(machine(arguments.device), flush=True)
    checkpointing = not arguments.no_checkpointing
    points = [
        in_a_process("training_memory", arguments.width, side, checkpointing, arguments.device)
        for side in tqdm(sorted(set(arguments.patches)), desc="training memory", unit="point")
    ]
    tokens = np.array([point["tokens"] for point in points])
    peaks = np.array([point["bytes"] for point in points]) / 1e6
    slope, intercept, share, worst = fit_line(tokens, peaks)
    heads = arguments.width // 64
    rows = [
        [count, f"{peak:.1f}", f"{slope * count + intercept:.1f}", f"{heads * count**2 * 2 / 1e6:.0f}"]
        for count, peak in zip(tokens, peaks, strict=True)
    ]
    header = ["tokens", "peak MB", "line MB", "one layer's square would be, MB"]
    print("\n" + markdown_table(header, rows))
    print(
        f"\n{'with' if checkpointing else 'without'} gradient checkpointing: {1000 * slope:.2f} kB a token + "
        f"{intercept:.1f} MB, R² {share:.5f}, largest residual {100 * worst:.1f}% of the largest peak"
    )


if __name__ == "__main__":
    main()
