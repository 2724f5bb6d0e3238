"""Our training step beside transformers' own way: a `VisionEncoderDecoderModel` in a plain `Trainer`.

    python -m benchmarks.training_peers [--width 256] [--layers 6] [--rounds 7] [--stage 1 2]

Both have an encoder of one shape (ViT and UNIT), a decoder of one shape (GPT-2's blocks, which know cross-attention,
and OPT's; width, layers, heads, MLP and vocabulary alike), the same pictures and texts, AdamW and bfloat16 autocast.
Theirs reads the encoder's tokens by cross-attention, ours takes them as a prefix. Ours does more: the teacher's pass,
the vision decoder and its loss. All steps (forward, backward, clipped gradients, optimiser) are taken in turns in one
process, and the table is of medians.

Stage 1: documents at x4 and pictures at x1, two passes and one sum of losses for both.
Stage 2: documents and pictures at sizes from x1 to x4. Theirs takes them as such a model takes mixed sizes, padded
to the largest, texts to the longest; ours takes packs (`packed: true`), and padded like theirs for comparison.

Targets: stage 1 no slower per document (ratio at most 1), stage 2 at least 1.5 times as fast as padding.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from benchmarks.common import interleave
from training.evaluation.report import machine, markdown_table

PATCH, BASE = 16, 224  # pixels; x4 by area is 448
# rows of a step, characters of their texts (a page, a caption)
DOCUMENTS, PICTURES, PAGE, CAPTION = 4, 8, 500, 50


def our_model(width: int, layers: int):
    """Model, frozen teacher, processor."""
    from modeling_unit import UnitConfig, UnitForPreTraining, UnitImageProcessor, UnitProcessor, UnitVisionConfig
    from training.tokenizer import TASK_TOKENS, byte_tokenizer

    tokenizer = byte_tokenizer()
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    vision |= {"intermediate_size": 4 * width, "patch_size": PATCH, "image_size": 2 * BASE, "cpe_max_size": 2 * BASE}
    text = {"model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    text |= {"num_hidden_layers": layers, "num_attention_heads": width // 64, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": 2048, "dropout": 0.0}
    images = UnitImageProcessor(patch_size=PATCH, base_size=BASE, scale_as="area")
    processor = UnitProcessor(images, tokenizer, task_prompts=TASK_TOKENS)
    processor.unshuffle, processor.num_queries = 2, None
    config = UnitConfig(
        image_token_id=processor.image_token_id,
        vision_config=UnitVisionConfig(**vision),
        text_config=text,
        connector_config={"connector_type": "mlp", "unshuffle": 2},
    )
    model = UnitForPreTraining(config)
    return model, model.make_teacher(), processor


def their_model(width: int, layers: int, vocabulary: int) -> VisionEncoderDecoderModel:
    shape = {"num_hidden_layers": layers, "num_attention_heads": width // 64, "hidden_size": width}
    encoder = ViTModel(
        ViTConfig(
            **shape,
            intermediate_size=4 * width,
            image_size=2 * BASE,
            patch_size=PATCH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=2048,
            n_embd=width,
            n_layer=layers,
            n_head=width // 64,
            n_inner=4 * width,
            activation_function="relu",  # OPT's
            add_cross_attention=True,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model


class PlainTrainer(Trainer):
    """`Trainer` with its own loss, summed over the batches that a step consists of."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        total = 0.0
        for batch in inputs.values():
            total = total + model(**batch, interpolate_pos_encoding=True).loss
        return total


def rows_of(kind: str, sides: list[int], characters: int, rng) -> list[dict[str, Any]]:
    """Rows of the data schema: square images of random pixels with random text."""
    from training.data.schema import make_row

    rows = []
    for number, side in enumerate(sides):
        text = "".join(rng.choice(list("abcdefghij klmnop"), size=characters))
        channels = () if kind == "document" else (3,)
        pixels = rng.integers(0, 256, size=(side, side, *channels), dtype=np.uint8)
        task = "ocr" if kind == "document" else "caption"
        origin = {"source": f"made/{number}", "license": "CC0-1.0", "split": "train"}
        rows.append(make_row(pixels, text, task=task, kind=kind, **origin))
    return rows


def their_batch(ours: dict[str, torch.Tensor], processor, grid: tuple[int, int] | None = None) -> dict[str, Any]:
    """The same images and the same labels, without the visual prefix; padded to `grid` where one is given."""
    from training.collator import normalized_pixels

    pixels = ours["pixel_values"]
    if pixels.dtype == torch.uint8:
        pixels = normalized_pixels(pixels, processor.image_processor)
    if grid is not None:
        rows, cols = (side * PATCH for side in grid)
        pixels = nn.functional.pad(pixels, (0, cols - pixels.shape[-1], 0, rows - pixels.shape[-2]))
    first = int((ours["labels"] != -100).any(dim=0).int().argmax())
    return {"pixel_values": pixels.contiguous(), "labels": ours["labels"][:, first:].contiguous()}


def padded_together(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches of texts of several lengths as one, padded with -100."""
    longest = max(batch["labels"].shape[1] for batch in batches)
    labels = [
        nn.functional.pad(each["labels"], (0, longest - each["labels"].shape[1]), value=-100) for each in batches
    ]
    return {"pixel_values": torch.cat([each["pixel_values"] for each in batches]), "labels": torch.cat(labels)}


def make_step(trainer: Trainer, batch: dict[str, dict[str, torch.Tensor]]):
    """One optimiser step as the Trainer takes it: `training_step`, clipped gradients, optimiser, gradients away."""
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model)
    optimizer = trainer.accelerator.prepare_optimizer(trainer.optimizer)

    def step() -> float:
        model.train()
        loss = trainer.training_step(model, {name: dict(group) for name, group in batch.items()})
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        return float(loss)

    return step


def arguments(kind, folder: str, **more):
    return kind(
        output_dir=folder,
        max_steps=1000,
        per_device_train_batch_size=1,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        remove_unused_columns=False,
        save_strategy="no",
        learning_rate=5e-5,
        **more,
    )


def stage_1(width: int, layers: int, folder: str) -> tuple[dict[str, Any], int]:
    """Steps by name, and rows of a step."""
    from training.arguments import UnitTrainingArguments
    from training.collator import GroupCollator
    from training.trainer import IntraScaleTrainer

    model, teacher, processor = our_model(width, layers)
    rng = np.random.default_rng(0)
    page = GroupCollator(processor, "document", 4, raw=True)
    picture = GroupCollator(processor, "natural", 1, raw=True)
    batch = {
        "document_x4": page(rows_of("document", [2 * BASE] * DOCUMENTS, PAGE, rng), None),
        "natural_x1": picture(rows_of("natural", [BASE] * PICTURES, CAPTION, rng), None),
    }
    ours = IntraScaleTrainer(
        model=model,
        args=arguments(UnitTrainingArguments, folder),
        teacher=teacher,
        image_processor=processor.image_processor,
        train_dataset=[0],
    )
    ours.text_behind = True  # the batches are our collator's
    plain = PlainTrainer(
        model=their_model(width, layers, model.config.text_config.vocab_size),
        args=arguments(TrainingArguments, folder),
        train_dataset=[0],
    )
    theirs = {name: their_batch(group, processor) for name, group in batch.items()}
    steps = {
        "VisionEncoderDecoderModel + Trainer": make_step(plain, theirs),
        "UNIT stage 1, teacher and L_vis": make_step(ours, batch),
    }
    return steps, DOCUMENTS + PICTURES


def stage_2(width: int, layers: int, folder: str) -> tuple[dict[str, Any], int]:
    """Sizes spread evenly from x1 to x4 by side, documents and pictures of both scales."""
    from training.arguments import UnitTrainingArguments
    from training.collator import GroupCollator
    from training.trainer import InterScaleTrainer

    model, teacher, processor = our_model(width, layers)
    rng = np.random.default_rng(1)
    large = [int(side) // PATCH * PATCH for side in np.linspace(BASE, 2 * BASE, 2 * DOCUMENTS)]
    small = [int(side) // PATCH * PATCH for side in np.linspace(BASE / 2, BASE, DOCUMENTS)]
    rows = {
        "document_x4": [row for side in large for row in rows_of("document", [side], PAGE * side**2 // 448**2, rng)],
        "document_x1": [row for side in small for row in rows_of("document", [side], PAGE * side**2 // 448**2, rng)],
        "natural_x1": rows_of("natural", [BASE] * PICTURES, CAPTION, rng),
        "natural_x4": rows_of("natural", [2 * BASE] * (PICTURES // 4), CAPTION, rng),
    }
    packed, padded = {}, {}
    side = 2 * BASE // PATCH
    for name, members in rows.items():
        kind, scale = name.split("_x")
        packs = kind == "document"
        collator = GroupCollator(processor, kind, int(scale), raw=not packs, packed=packs)
        packed[name] = collator(members, None)
        padded[name] = GroupCollator(processor, kind, int(scale), raw=True)(members, None)
    together = padded_together([their_batch(group, processor, (side, side)) for group in padded.values()])
    settings = {"teacher": teacher, "image_processor": processor.image_processor, "train_dataset": [0]}
    ours = InterScaleTrainer(model=model, args=arguments(UnitTrainingArguments, folder), **settings)
    like_theirs = InterScaleTrainer(
        model=our_model(width, layers)[0], args=arguments(UnitTrainingArguments, folder), **settings
    )
    ours.text_behind = like_theirs.text_behind = True
    plain = PlainTrainer(
        model=their_model(width, layers, model.config.text_config.vocab_size),
        args=arguments(TrainingArguments, folder),
        train_dataset=[0],
    )
    steps = {
        "VisionEncoderDecoderModel + Trainer, padded": make_step(plain, {"all": together}),
        "UNIT stage 2, each group padded": make_step(like_theirs, padded),
        "UNIT stage 2, documents packed": make_step(ours, packed),
    }
    return steps, sum(len(members) for members in rows.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_peers", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="of encoder and decoder, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6, help="of encoder and decoder each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stage", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    options = parser.parse_args(argv)
    if options.width % 64 or options.width < 64:
        parser.error("--width must be a multiple of 64")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine(device), flush=True)
    rows = []
    for stage in options.stage:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            steps, images = {1: stage_1, 2: stage_2}[stage](options.width, options.layers, folder)
            times = interleave(steps, rounds=options.rounds, seconds=0.0, device=device)
        first = statistics.median(next(iter(times.values())))
        for name, taken in times.items():
            middle = statistics.median(taken)
            row = [stage, name, f"{middle:.3f}", f"{min(taken):.3f}", f"{1000 * middle / images:.0f}"]
            rows.append([*row, f"{middle / first:.2f}", f"{first / middle:.2f}"])
    header = ["stage", "step", "median s", "least s", "ms an image", "time, first is 1", "speed, first is 1"]
    print("\n" + markdown_table(header, rows))


if __name__ == "__main__":
    main()
