"""Conversations about pictures, in LLaVA's JSON or our own schema, and what a LLaVA model learns from them.

Two sources:

* LLaVA's format: a JSON list (or JSON lines) of `{"image": "name.jpg", "conversations": [{"from": "human", "value":
  "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]}` and a folder that the images' names lie in. Without
  `image` it is text alone; `image` may be a list, with as many `<image>` in the texts.
* a data set of our own schema (`training/data/schema.py`): each row becomes one question by its task, and its text.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from modeling_unit.image_processing_unit import to_rgb

from .base_trainer import BaseTrainer
from .data.schema import read_dataset
from .optim import make_optimizer

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_TOKEN = "<image>"
# What a row of our schema is asked [ours]
QUESTIONS = {
    "ocr": "Read the text.",
    "caption": "Describe the picture in one sentence.",
    "markdown": "Write the page as Markdown.",
}
IGNORED = -100


def read_conversations(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a file in LLaVA's format, checked.

    Raises:
        ValueError: in one line, what is wrong and with which entry.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        entries = (
            [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of conversations.")
    for index, entry in enumerate(entries):
        _check_entry(entry, f"{path}, entry {index}")
    return entries


def _check_entry(entry: Any, where: str) -> None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: `conversations` must be a list of turns.")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: a turn needs `from` ({', '.join(ROLES)}) and a `value` of text; got {turn!r}.")
    if not any(ROLES[turn["from"]] == "assistant" for turn in turns):
        raise ValueError(f"{where}: no turn of the assistant, so nothing to learn.")
    images, asked = len(_images(entry)), sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if asked not in (images, 0) or (asked == 0 and images > 1):
        raise ValueError(f"{where}: {images} images, but {IMAGE_TOKEN} stands {asked} times in the turns.")


def _images(entry: dict[str, Any]) -> list[str]:
    image = entry.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def messages_of(entry: dict[str, Any]) -> list[dict[str, str]]:
    """Turns as `{"role", "content"}`, with `<image>` in the first question if the picture has no place yet."""
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in entry["conversations"]]
    if _images(entry) and not any(IMAGE_TOKEN in message["content"] for message in messages):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = f"{IMAGE_TOKEN}\n{first['content']}"
    return messages


class Conversations(Dataset):
    """Item i: `{"messages": turns, "images": RGB pictures}`.

    Args:
        path: a `.json` or `.jsonl` file in LLaVA's format, or a folder of our parquet schema.
        images: folder that the names in the file are relative to; beside the file by default.

    Raises:
        ValueError: what is wrong with the file, or an image that is missing (all names are looked up at once).
    """

    def __init__(self, path: str | Path, images: str | Path | None = None):
        path = Path(path)
        self.rows = read_dataset(path) if path.is_dir() else None
        self.entries = [] if path.is_dir() else read_conversations(path)
        self.folder = Path(images) if images is not None else path.parent
        for index, entry in enumerate(self.entries):
            for name in _images(entry):
                if not (self.folder / name).is_file():
                    raise ValueError(f"{path}, entry {index}: there is no image {self.folder / name}.")

    def __len__(self) -> int:
        return len(self.entries) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.rows is None:
            entry = self.entries[index]
            pictures = []
            for name in _images(entry):
                with Image.open(self.folder / name) as picture:
                    pictures.append(to_rgb(picture))
            return {"messages": messages_of(entry), "images": pictures}
        row = self.rows[index]
        picture = row["image"]
        if isinstance(picture, dict):
            picture = Image.open(io.BytesIO(picture["bytes"]))
        messages = [
            {"role": "user", "content": f"{IMAGE_TOKEN}\n{QUESTIONS[row['task']]}"},
            {"role": "assistant", "content": row["text"]},
        ]
        return {"messages": messages, "images": [to_rgb(picture)]}


class ConversationCollator:
    """Items of [`Conversations`] to a batch of a LLaVA model.

    Keys out: `input_ids`, `attention_mask`, `labels` `(B, T)`, padded on the right, and `pixel_values` of all pictures
    in order when there are any. Labels are the assistant's words and what the template puts behind them (the end of
    the turn); everything else, pictures and padding among it, is -100.

    Raises:
        ValueError: a chat template that rewrites earlier turns when later ones come, a slow tokenizer, a conversation
            longer than `max_tokens`.
    """

    def __init__(self, processor: LlavaProcessor, max_tokens: int | None = None):
        self.processor, self.max_tokens = processor, max_tokens
        if not processor.tokenizer.is_fast:
            raise ValueError("A fast tokenizer is needed: labels are found by the places of characters.")

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [image for item in items for image in item["images"]]
        batch, counts = {}, []
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            counts = [self._tokens(pixels) for pixels in batch["pixel_values"]]
        rows, seen = [], 0
        for item in items:
            rows.append(self.row(item["messages"], counts[seen : seen + len(item["images"])]))
            seen += len(item["images"])
        length = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        batch["input_ids"] = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        batch["labels"] = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows])
        batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
        return batch

    def _tokens(self, pixels: torch.Tensor) -> int:
        processor = self.processor
        height, width = (side // processor.patch_size for side in pixels.shape[-2:])
        dropped = processor.vision_feature_select_strategy == "default"
        return height * width + processor.num_additional_image_tokens - dropped

    def row(self, messages: list[dict[str, str]], image_tokens: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation, each image `image_tokens` long."""
        text, spans = self._rendered(messages)
        pieces = text.split(IMAGE_TOKEN)
        if len(pieces) - 1 != len(image_tokens):
            raise ValueError(f"{len(image_tokens)} images for {len(pieces) - 1} places: {text[:80]!r} ...")
        shifted, place = list(spans), 0  # spans in the text with each image written out
        for piece, count in zip(pieces, image_tokens, strict=False):
            place += len(piece)
            more = len(IMAGE_TOKEN) * (count - 1)
            shifted = [(a + more, b + more) if a > place else (a, b) for a, b in shifted]
            place += len(IMAGE_TOKEN) * count
        text = "".join(piece + IMAGE_TOKEN * count for piece, count in zip(pieces, [*image_tokens, 0], strict=True))
        tokenizer = self.processor.tokenizer
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoded = tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        labels = [
            token if end > start and any(a <= start and end <= b for a, b in shifted) else IGNORED
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise ValueError(
                f"A conversation is {len(ids)} tokens long, the language model takes {self.max_tokens}: "
                f"{text.replace(IMAGE_TOKEN, '')[:80]!r} ..."
            )
        return ids, labels

    def _rendered(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation in the template's words, and where the assistant speaks in it."""
        spans, text = [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.processor.apply_chat_template(messages[:index], add_generation_prompt=True)
            text = self.processor.apply_chat_template(messages[: index + 1])
            if not text.startswith(before):
                raise ValueError(
                    "The chat template writes a turn differently once it is answered; labels cannot be placed."
                )
            spans.append((len(before), len(text)))
        return text, spans


class LlavaTrainer(BaseTrainer):
    """`Trainer` with the parts' own learning rates; the loss is LLaVA's."""

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.args)
        return self.optimizer
