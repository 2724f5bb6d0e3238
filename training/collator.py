"""Rows of the data schema to model inputs.

One micro-batch holds groups, each of one kind of image at one scale: `{"document_x4": {...}, "natural_x1": {...}}`.
Within a
group all images share one grid, so that no attention mask is needed: documents are padded with their paper, which
teaches margins too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_unit.image_processing_unit import UnitImageProcessor
from modeling_unit.processing_unit import UnitProcessor

from .data.augment import augment_document, augment_line, composite_picture
from .data.settings import TASKS
from .packing import pack_rows
from .teacher_cache import picture_key
from .tokenizer import TASK_TOKENS, byte_tokenizer

# Characters that the auxiliary head names: printable ASCII; 0 is "no character", the last class any other character
CHARACTERS = "".join(chr(code) for code in range(33, 127))
NO_CHARACTER, OTHER_CHARACTER = 0, len(CHARACTERS) + 1
NUM_CHARACTER_CLASSES = len(CHARACTERS) + 2
TEXT_STEP = 32  # text is padded to a multiple of it
_CLASS_OF = {character: index + 1 for index, character in enumerate(CHARACTERS)}


def character_targets(
    text: str, boxes: np.ndarray, rows: int, cols: int, patch: int, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the characters are.

    Args:
        text: the target text. boxes: `(len(text), 4)` in pixels, zero area for white space.
        rows, cols, patch: the grid. slots: characters named in each patch.

    Returns:
        classes `(rows * cols, slots)`: class ids of the characters whose centres lie in each patch, in text order, 0
            where
        there is none (a patch with more characters than slots keeps the first ones);
        places `(len(text),)`: index of the patch of each character, -1 for white space.
    """
    classes = np.zeros((rows * cols, slots), dtype=np.int64)
    places = np.full(len(text), -1, dtype=np.int64)
    if len(boxes) != len(text):
        return classes, places
    used = np.zeros(rows * cols, dtype=np.int64)
    # The column comes from the character's own middle, the row from its line's: a comma belongs to its line
    middles = (boxes[:, 1] + boxes[:, 3]) / 2
    start = 0
    for line in text.split("\n"):
        stop = start + len(line)
        inside = boxes[start:stop, 2] > boxes[start:stop, 0]
        if inside.any():
            row = int(np.median(middles[start:stop][inside]) // patch)
            row = min(max(row, 0), rows - 1)
            columns = ((boxes[start:stop, 0] + boxes[start:stop, 2]) / 2 // patch).astype(np.int64).clip(0, cols - 1)
            for offset in np.flatnonzero(inside):
                place = row * cols + int(columns[offset])
                places[start + offset] = place
                if used[place] < slots:
                    classes[place, used[place]] = _CLASS_OF.get(line[offset], OTHER_CHARACTER)
                    used[place] += 1
        start = stop + 1
    return classes, places


def normalized_pixels(pixels: torch.Tensor, processor: UnitImageProcessor) -> torch.Tensor:
    """Raw pixels `(B, 1 or 3, H, W)` uint8 -> `(B, 3, H, W)` float32 as `processor` would give them."""
    pixels = pixels.float() / 255.0
    if not processor.do_normalize:
        return pixels.expand(-1, 3, -1, -1)
    mean = torch.tensor(processor.image_mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels - mean) / std


@dataclass
class GroupCollator:
    """Collates one group.

    Keys in: rows of the schema (`image` as bytes, `text`, `task`, `kind`, `char_boxes`), and the `row_seed` that the
    data set drew a row with, where it tells.
    Keys out: `pixel_values` (B, 3, H, W), `input_ids`, `labels`, `attention_mask` (B, T) padded on the right;
    `task_ids` (B,), places in `TASKS`, -1 for others; of natural pictures `row_seeds` (B,) where they are told;
    documents with boxes also `character_classes` (B, N, slots) and `token_places` (B, T), the visual token each label
    should look at, -1 for none; natural pictures at x4 also `teacher_pixel_values` (B, 3, h, w), the same pictures at
    x1.

    Documents as high as the image processor's `reading_line_height` are lines as the `Reader` cuts them: they stay as
    high, and at the top of their grid, so that their baseline is where it is to be.

    Worked example: a chunk "Hi" on a 1 x 2 grid, one visual token a patch, prompt `<ocr>` gives
    input_ids `[img, img, <ocr>, H, i, <eos>]`, labels `[-100, -100, -100, H, i, <eos>]`.

    Args:
        processor: its prompts, tokenizer and image processor are the model's.
        kind: `"natural"` or `"document"`. scale: 1 or 4.
        character_slots: 0 for no character targets.
        raw: pixels as uint8, documents with one channel, for [`normalized_pixels`] on the device: a twelfth of the
            bytes on their way there, and a worker is done in half the time.
        packed: each image keeps its own grid, and all come in one pack (see `packing.pack_rows` for the keys).
        augment_pictures: natural pictures are changed at random; else each comes always the same.
        keyed: natural pictures also get `teacher_keys` (B, 16), the hash of what the teacher sees, where it is raw
            (the normalisation of others is not the trainer's: it hashes what it gets).
        teacher_scale: 1 for the small copies for the teacher, `"same"` for none: see `arguments.py`.
    """

    processor: UnitProcessor
    kind: str
    scale: int
    character_slots: int = 0
    raw: bool = False
    packed: bool = False
    augment_pictures: bool = True
    keyed: bool = False
    teacher_scale: int | str = 1

    @property
    def image_processor(self) -> UnitImageProcessor:
        return self.processor.image_processor

    def __call__(
        self,
        rows: Sequence[dict[str, Any]],
        rng: np.random.Generator | None,
        shape: tuple[int, int, int] = (0, 0, 0),
    ) -> dict[str, torch.Tensor]:
        """`rng` changes the images, `None` leaves them. `shape`: rows, columns and text tokens to pad to, 0 for as
        needed."""
        if self.packed:
            alone = [self._alone(row, rng) for row in rows]
            return pack_rows(alone, self.image_processor.patch_size, self.processor.tokenizer.pad_token_id, TEXT_STEP)
        return self._collated(rows, rng, shape)

    def _collated(self, rows, rng, shape):
        tasks = [TASKS.index(row["task"]) if row["task"] in TASKS else -1 for row in rows]
        out = {"task_ids": torch.tensor(tasks)}
        if self.kind == "natural" and all("row_seed" in row for row in rows):
            out["row_seeds"] = torch.tensor([row["row_seed"] for row in rows])
        return self._images_and_texts(rows, rng, shape) | out

    def _images_and_texts(self, rows, rng, shape):
        if self.kind == "natural":
            return self._natural(rows, rng, shape[2])
        return self._documents(rows, rng, shape)

    @cached_property
    def reads_bytes(self) -> bool:
        """Whether a text has as many tokens as bytes, and one for its prompt."""
        return self.processor.tokenizer.get_vocab() == byte_tokenizer().get_vocab() and all(
            len(self.processor.prompt_ids(task)) == 1 for task in TASK_TOKENS
        )

    def text_tokens(self, texts: Sequence[str], tasks: Sequence[str]) -> np.ndarray:
        """How many tokens prompt, text and end of each row are, `(len(texts),)`."""
        prompts = {task: len(self.processor.prompt_ids(task)) + 1 for task in set(tasks)}
        if self.reads_bytes:
            lengths = [len(text.encode()) for text in texts]
        else:
            tokenizer = self.processor.tokenizer
            lengths = [
                len(ids)
                for begin in range(0, len(texts), 1000)
                for ids in tokenizer(
                    list(texts[begin : begin + 1000]), add_special_tokens=False, split_special_tokens=True
                )["input_ids"]
            ]
        return np.array([length + prompts[task] for length, task in zip(lengths, tasks, strict=True)], dtype=np.int64)

    def _alone(self, row, rng):
        """A batch of one row, its grid the one that its image has before it is changed: packs stay in their budget."""
        shape = (0, 0, 0)
        if self.kind == "document":
            shape = (*self.image_processor.grid_for(*_open(row).size, "document", self.scale), 0)
        return self._collated([row], rng, shape)

    def _natural(self, rows, rng, text_tokens: int = 0):
        processor = self.image_processor
        side = round(processor.area(self.scale) ** 0.5)
        batch: dict[str, list] = {"pixels": [], "small": []}
        for row in rows:
            picture = composite_picture(_open(row), rng if self.augment_pictures else None, side)
            batch["pixels"].append(np.asarray(processor.resize(picture, "natural", self.scale)))
            if self.scale != 1 and self.teacher_scale == 1:
                batch["small"].append(np.asarray(processor.resize(picture, "natural", 1)))
        out = {"pixel_values": self._pixels(batch["pixels"])}
        if batch["small"]:
            out["teacher_pixel_values"] = self._pixels(batch["small"])
        if self.keyed and self.raw and not self.packed:
            keys = [picture_key(each) for each in batch["small"] or batch["pixels"]]
            out["teacher_keys"] = torch.from_numpy(np.stack(keys))
        rows_, cols = (size // processor.patch_size for size in out["pixel_values"].shape[-2:])
        texts = [(row["text"], row["task"], None) for row in rows]
        return out | self._texts(texts, rows_, cols, text_tokens)

    def _documents(self, rows, rng, shape):
        processor = self.image_processor
        patch = processor.patch_size
        images, boxes, lines = [], [], []
        for row in rows:
            image = _open(row).convert("L")
            boxes_given = row.get("char_boxes")  # a set need not have the column
            box = np.asarray([] if boxes_given is None else boxes_given, dtype=np.float32).reshape(-1, 4)
            line = image.height == processor.reading_line_height  # cut as the `Reader` of this model cuts
            if rng is not None and line:
                widest = self._widest(image, shape[1])
                image, box = augment_line(image, box, rng, processor.reading_baseline, widest)
            elif rng is not None:
                image, box = augment_document(image, box, rng, row.get("x_height") or 0.0)
            width, height = processor._document_size(image.width, image.height, self.scale)
            if shape[0]:
                fit = min(1.0, shape[1] * patch / width, shape[0] * patch / height)
                width, height = int(width * fit), int(height * fit)
            if (width, height) != image.size:
                box = box * np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
                image = image.resize((width, height), Image.Resampling.LANCZOS)
            images.append(image)
            boxes.append(box)
            lines.append(line)
        grid_rows = shape[0] or max(-(-image.height // patch) for image in images)
        grid_cols = shape[1] or max(-(-image.width // patch) for image in images)
        pixels, classes, texts = [], [], []
        for row, image, box, line in zip(rows, images, boxes, lines, strict=True):
            array = np.asarray(image)
            paper = int(np.median(np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])))
            spare_y, spare_x = grid_rows * patch - image.height, grid_cols * patch - image.width
            if line:
                spare_y = 0  # its baseline is where it is to be
            # a chunk may stand anywhere in its spare paper, or the model learns that text starts at the corner
            top = int(rng.integers(0, min(spare_y, patch) + 1)) if rng is not None else 0
            left = int(rng.integers(0, min(spare_x, patch) + 1)) if rng is not None else 0
            canvas = np.full((grid_rows * patch, grid_cols * patch), paper, dtype=np.uint8)
            canvas[top : top + image.height, left : left + image.width] = array
            box = np.where(box[:, 2:3] > box[:, 0:1], box + np.array([left, top, left, top], np.float32), 0)
            named, places = character_targets(
                row["text"], box, grid_rows, grid_cols, patch, max(1, self.character_slots)
            )
            classes.append(named)
            texts.append((row["text"], row["task"], places if len(box) else None))
            pixels.append(canvas)
        out = {"pixel_values": self._pixels([canvas[..., None] for canvas in pixels])}
        if self.character_slots:
            out["character_classes"] = torch.from_numpy(np.stack(classes))
        return out | self._texts(texts, grid_rows, grid_cols, shape[2])

    def _widest(self, line: Image.Image, cols: int) -> int:
        """Pixels that a line can grow to in a grid of `cols` columns, 0 for any, before it would be shrunk."""
        processor, patch = self.image_processor, self.image_processor.patch_size
        most = min(processor.max_side // patch, processor.area(self.scale) // patch**2 // (line.height // patch))
        return max(line.width, min(cols or most, most) * patch)

    def _pixels(self, images: list[np.ndarray]) -> torch.Tensor:
        """Images `(H, W, C)` of one size -> `(B, C, H, W)` uint8 when `raw`, else `(B, 3, H, W)` as the model takes
        them."""
        pixels = torch.from_numpy(np.stack([np.ascontiguousarray(image.transpose(2, 0, 1)) for image in images]))
        return pixels if self.raw else normalized_pixels(pixels, self.image_processor)

    def _texts(self, texts, rows: int, cols: int, text_tokens: int = 0) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        visual = self.processor.num_visual_tokens(rows, cols)
        one_to_one = self.processor.num_queries is None and self.processor.unshuffle == 1
        sequences = []
        for text, task, places in texts:
            prompt = self.processor.prompt_ids(task)
            # a page may well show the letters "<image>": they are text, not the token
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            target = encoded["input_ids"] + [tokenizer.eos_token_id]
            looks = np.full(len(target), -1, dtype=np.int64)
            if places is not None and one_to_one:
                starts = np.array([begin for begin, _ in encoded["offset_mapping"]], dtype=np.int64)
                looks[: len(starts)] = places[starts] if len(starts) else -1
            head = [self.processor.image_token_id] * visual + list(prompt)
            sequences.append((head, target, looks))
        longest = max(len(head) + len(target) for head, target, _ in sequences)
        # few lengths, for the reason given in data/mixture.py
        text_tokens = max(text_tokens, longest - visual)
        longest = visual + -(-text_tokens // TEXT_STEP) * TEXT_STEP
        shape = (len(sequences), longest)
        input_ids = np.full(shape, tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full(shape, -100, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        looks_at = np.full(shape, -1, dtype=np.int64)
        for index, (head, target, looks) in enumerate(sequences):
            start, stop = len(head), len(head) + len(target)
            input_ids[index, :start] = head
            input_ids[index, start:stop] = target
            labels[index, start:stop] = target
            looks_at[index, start:stop] = looks
            mask[index, :stop] = 1
        out = {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "token_places": looks_at}
        return {key: torch.from_numpy(value) for key, value in out.items()}


def _open(row: dict[str, Any]) -> Image.Image:
    image = row["image"]
    return Image.open(io.BytesIO(image["bytes"])) if isinstance(image, dict) else image
