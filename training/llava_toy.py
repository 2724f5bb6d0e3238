"""A LLaVA model from nothing in a few minutes on a CPU, to see the whole way work:

    python -m training.llava_toy OUT

Twenty made pictures (five colours, four shapes) with two questions each; a Llama of two layers with random weights and
bytes for pieces; unit-tiny as the tower. `unit llava` assembles them, the recipes train the projector and then all,
and the model is asked every question. The loss should fall from ln(262) = 5.6 to below 0.05 and all 40 answers be
right: an overfit on purpose, which shows that data, template, labels, projector and gradients fit together, and
nothing about new pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor, set_seed

from modeling_unit import shipped_checkpoint

from . import recipe
from .llava_assembly import assemble
from .llava_data import Conversations
from .tokenizer import byte_tokenizer

RECIPES = Path(__file__).parent / "recipes" / "llava"
COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (230, 200, 40),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUESTIONS = ("What colour is it?", "What shape is it?")


def draw(colour: str, shape: str, side: int = 96) -> Image.Image:
    """A coloured shape on light grey."""
    picture = Image.new("RGB", (side, side), (232, 232, 228))
    pen, ink = ImageDraw.Draw(picture), COLOURS[colour]
    low, middle, high = side // 6, side // 2, side - side // 6
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=ink)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=ink)
    elif shape == "triangle":
        pen.polygon([(middle, low), (high, high), (low, high)], fill=ink)
    else:
        pen.line((low, low, high, high), fill=ink, width=side // 7)
        pen.line((low, high, high, low), fill=ink, width=side // 7)
    return picture


def make_data(folder: Path, colours=tuple(COLOURS), shapes=SHAPES) -> Path:
    """Pictures and `conversations.json` in LLaVA's format; returns the file."""
    folder.mkdir(parents=True)
    entries = []
    for colour in colours:
        for shape in shapes:
            name = f"{colour}-{shape}.png"
            draw(colour, shape).save(folder / name)
            for question, answer in zip(QUESTIONS, (colour, shape), strict=True):
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                entries.append({"image": name, "conversations": turns})
    path = folder / "conversations.json"
    path.write_text(json.dumps(entries, indent=1))
    return path


def make_language_model(folder: Path, hidden_size: int = 128) -> Path:
    """A Llama of two layers with random weights and the byte tokenizer."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def ask(folder: str | Path, data: Conversations) -> list[tuple[str, str, str]]:
    """Question, right answer and the model's, for every conversation of one question."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    answers = []
    for item in (data[index] for index in range(len(data))):
        question, right = item["messages"]
        prompt = processor.apply_chat_template([question], add_generation_prompt=True)
        inputs = processor(images=item["images"], text=prompt, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        said = processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append((question["content"].split("\n")[-1], right["content"], said))
    return answers


def run(
    out: str | Path,
    tower: str | Path | None = None,
    size: int = 128,
    steps: tuple[int, int] = (60, 140),
    batch: int = 10,
    hidden_size: int = 128,
    rates: tuple[float, float] = (1e-3, 2e-3),
    pictures: dict | None = None,
) -> dict:
    """The whole way in `out`; returns the losses of both stages and the answers."""
    out = Path(out)
    set_seed(0)
    file = make_data(out / "data", **(pictures or {}))
    language_model = make_language_model(out / "language-model", hidden_size)
    assemble(str(tower or shipped_checkpoint()), str(language_model), out / "assembled", size=size)
    overrides = [f"conversations={file}", f"training.per_device_train_batch_size={batch}"]
    overrides += ["training.gradient_accumulation_steps=1", "training.bf16=false", "training.save_strategy='no'"]
    overrides += ["training.gradient_checkpointing=false", "training.warmup_steps=10"]
    losses = {}
    start = out / "assembled"
    # an untrained language model needs a higher rate than the recipe's, which is for a trained one
    for name, most, rate in zip(("1-projector", "2-all"), steps, rates, strict=True):
        stage = [f"start={start}", f"training.output_dir={out / name}", f"training.max_steps={most}"]
        stage += [f"training.learning_rate={rate}", f"training.logging_steps={max(1, most // 20)}"]
        start = recipe.main(RECIPES / f"{name}.yaml", overrides + stage)
        log = [json.loads(line) for line in (start / "log.jsonl").read_text().splitlines()]
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
    return {"losses": losses, "answers": ask(start, Conversations(file))}


def main() -> None:
    parser = argparse.ArgumentParser(description="A toy LLaVA from nothing.")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    found = run(parser.parse_args().out)
    for name, losses in found["losses"].items():
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.4f}")
    right = sum(said == wanted for _, wanted, said in found["answers"])
    for question, wanted, said in found["answers"][::7]:
        print(f"  {question} {said!r} (right: {wanted!r})")
    print(f"{right} of {len(found['answers'])} answers right")


if __name__ == "__main__":
    main()
