"""Read whole pages and name pictures with a UNIT model.

    page -> `layout_unit`: blocks, then chunks that fit the document size -> batches of alike size -> `generate` with the
    repetition stopper -> text and confidence of each chunk -> blocks in reading order -> `Page`
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteriaList

from .image_processing_unit import to_rgb
from .layout_unit import LayoutSettings, analyse_page
from .repetition_unit import RepetitionStopper, trim_repetition


Box = tuple[int, int, int, int]


@dataclass
class Block:
    """A paragraph as it was read.

    Args:
        box: `(x0, y0, x1, y1)` in pixels of the given image, x1 and y1 exclusive.
        text: lines separated by newlines.
        confidence: geometric mean of the probabilities of the pieces, 0 to 1, weighted by length over the chunks.
        repetition_stopped: reading went round in circles somewhere in this block and was cut off there.
        lines: boxes of its lines.
    """

    box: Box
    text: str
    confidence: float
    repetition_stopped: bool = False
    lines: list[Box] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "box": list(self.box),
            "text": self.text,
            "confidence": round(self.confidence, 4),
            "repetition_stopped": self.repetition_stopped,
        }


@dataclass
class Page:
    """A page as it was read: blocks in reading order, the image's `(width, height)`, seconds it took (its share of a batch)."""

    blocks: list[Block]
    size: tuple[int, int]
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The blocks' texts, separated by blank lines; empty for a blank page."""
        return "\n\n".join(block.text for block in self.blocks if block.text)

    @property
    def confidence(self) -> float:
        """Mean of the blocks' confidences weighted by their length; 1 for a blank page, nothing being in doubt."""
        total = sum(len(block.text) for block in self.blocks)
        if not total:
            return 1.0
        return sum(block.confidence * len(block.text) for block in self.blocks) / total

    def to_dict(self) -> dict[str, Any]:
        return {
            "size": list(self.size),
            "seconds": round(self.seconds, 3),
            "confidence": round(self.confidence, 4),
            "blocks": [block.to_dict() for block in self.blocks],
        }


@dataclass
class Caption:
    """What a picture shows: text and confidence (geometric mean of the pieces' probabilities)."""

    text: str
    confidence: float


@dataclass
class _Reading:
    """What was read of one chunk."""

    text: str
    log_probability: float  # mean over the pieces
    pieces: int
    stopped: bool


class Reader:
    """Reads pages of any size and names pictures.

    Args:
        model: [`UnitForConditionalGeneration`]. processor: [`UnitProcessor`], of the same checkpoint.
        batch_size: chunks read at once.
        x_height: height in pixels of a lower-case x that text is brought to. unit-tiny learned from 7 to 13.
        max_lines: most lines in a chunk. unit-tiny learned from one to three.

    Example:

    ```python
    >>> reader = Reader.from_pretrained("path/to/unit-tiny")
    >>> print(reader.read(Image.open("page.png")).text)
    ```
    """

    def __init__(self, model, processor, batch_size: int = 16, x_height: float = 9.5, max_lines: int = 3):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        images = processor.image_processor
        self.layout_settings = LayoutSettings(
            x_height=x_height,
            document_area=images.document_area,
            max_width=images.max_width,
            patch_size=images.patch_size,
            max_lines=max_lines,
        )

    @classmethod
    def from_pretrained(cls, name_or_folder, device: str | torch.device | None = None, **kwargs) -> "Reader":
        """Load model and processor from a folder or the Hub. On a CPU the weights are computed in float32: it compiles
        a bfloat16 kernel for every new shape, which costs more than it gains on a page.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if device.type == "cpu" else "auto"
        model = AutoModelForImageTextToText.from_pretrained(name_or_folder, dtype=dtype).to(device)
        return cls(model, AutoProcessor.from_pretrained(name_or_folder), **kwargs)

    def read(self, image: Any) -> Page:
        """Read one page: a PIL image, an array or a tensor."""
        return self.read_many([image])[0]

    def read_many(self, images: Sequence[Any], progress: Callable[[int, int], None] | None = None) -> list[Page]:
        """Read several pages; their chunks share batches.

        Args:
            progress: called with (chunks read, chunks in all) after every batch.
        """
        started = time.perf_counter()
        layouts = [analyse_page(to_rgb(image), self.layout_settings) for image in images]
        chunks = [(page, chunk) for page, layout in enumerate(layouts) for chunk in layout.chunks()]
        crops = [layouts[page].crop(chunk) for page, chunk in chunks]
        readings = self._read_chunks(crops, [len(chunk.lines) for _, chunk in chunks], progress)
        pages = []
        for number, layout in enumerate(layouts):
            blocks = []
            for index, block in enumerate(layout.blocks):
                own = [
                    (chunk, reading)
                    for (page, chunk), reading in zip(chunks, readings)
                    if page == number and chunk.block_index == index
                ]
                text = _join([(chunk.part > 0, reading.text) for chunk, reading in own])
                if not text:
                    continue
                pieces = sum(reading.pieces for _, reading in own)
                mean = sum(reading.log_probability * reading.pieces for _, reading in own) / max(pieces, 1)
                blocks.append(
                    Block(
                        box=layout.to_original(block.box),
                        text=text,
                        confidence=math.exp(mean),
                        repetition_stopped=any(reading.stopped for _, reading in own),
                        lines=[layout.to_original(line.box) for line in block.lines],
                    )
                )
            pages.append(Page(blocks=blocks, size=layout.size))
        share = (time.perf_counter() - started) / max(1, len(pages))
        for page in pages:
            page.seconds = share
        return pages

    def _read_chunks(
        self, crops: list[Image.Image], lines: list[int], progress: Callable[[int, int], None] | None
    ) -> list[_Reading]:
        # those that take equally many steps come together, so that few rows of a batch wait for the longest
        order = sorted(range(len(crops)), key=lambda index: (crops[index].width * lines[index], crops[index].size))
        readings: list[_Reading | None] = [None] * len(crops)
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            longest = max(crops[index].width * lines[index] for index in members)
            # no typeface sets more than a character every third of its x-height, and a line's end is one more
            limit = int(3 * longest / self.layout_settings.x_height) + 16
            for index, reading in zip(members, self._generate([crops[index] for index in members], "ocr", limit)):
                readings[index] = reading
            if progress is not None:
                progress(min(start + self.batch_size, len(order)), len(order))
        return readings

    @torch.inference_mode()
    def _generate(self, images: list[Any], task: str, max_new_tokens: int) -> list[_Reading]:
        inputs = self.processor(images=images, task=task, return_tensors="pt").to(self.model.device)
        prompt = inputs["input_ids"].shape[1]
        stopper = RepetitionStopper(prompt_length=prompt)
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([stopper]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = output.sequences[:, prompt:]
        # (steps, B, V) -> log-probability of the piece that was taken, (B, steps)
        steps = [torch.log_softmax(logits.float(), dim=-1) for logits in output.logits]
        taken = torch.stack([step.gather(1, new[:, [place]])[:, 0] for place, step in enumerate(steps)], dim=1)
        end, pad = self.processor.tokenizer.eos_token_id, self.processor.tokenizer.pad_token_id
        readings = []
        for ids, scores in zip(new.tolist(), taken.tolist()):
            length = next((place for place, piece in enumerate(ids) if piece in (end, pad)), len(ids))
            counted = scores[: length + 1]  # the end is a piece that was read, too
            kept, stopped = trim_repetition(ids[:length])
            text = self.processor.decode(kept, skip_special_tokens=True)
            readings.append(_Reading(text.strip(), sum(counted) / max(1, len(counted)), len(counted), stopped))
        return readings

    def describe(self, images: Sequence[Any]) -> list[Caption]:
        """A caption for each picture."""
        captions = []
        for start in range(0, len(images), self.batch_size):
            batch = [to_rgb(image) for image in images[start : start + self.batch_size]]
            for reading in self._generate(batch, "caption", 160):
                captions.append(Caption(reading.text, math.exp(reading.log_probability)))
        return captions

    @torch.inference_mode()
    def rank_labels(self, image: Any, labels: Sequence[str]) -> list[tuple[str, float]]:
        """Labels with probabilities, most likely first, by how likely the decoder finds each as the picture's caption.

        The score of a label is its mean log-probability a piece, so that long names are not at a disadvantage; the
        probabilities are a softmax over scores times the labels' mean length.

        Raises:
            ValueError: for no label or an empty one.
        """
        labels = [label.strip() for label in labels]
        if not labels or not all(labels):
            raise ValueError("Give at least one label, and no empty ones.")
        tokenizer = self.processor.tokenizer
        inputs = self.processor(images=[to_rgb(image)], task="caption", return_tensors="pt")
        prompt = inputs["input_ids"][0].tolist()
        targets = [tokenizer(label, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for label in labels]
        longest = max(len(target) for target in targets)
        scores, device = [], self.model.device
        for start in range(0, len(labels), self.batch_size):
            batch = targets[start : start + self.batch_size]
            ids = torch.tensor([prompt + each + [tokenizer.pad_token_id] * (longest - len(each)) for each in batch])
            mask = torch.tensor([[1] * (len(prompt) + len(each)) + [0] * (longest - len(each)) for each in batch])
            output = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pixel_values=inputs["pixel_values"].expand(len(batch), -1, -1, -1).to(device),
                spatial_shapes=inputs["spatial_shapes"].expand(len(batch), -1).to(device),
                return_dict=True,
            )
            logits = torch.log_softmax(output.logits[:, len(prompt) - 1 : -1].float(), dim=-1)  # (B, longest, V)
            for row, target in zip(logits, batch):
                chosen = row[torch.arange(len(target)), torch.tensor(target, device=row.device)]
                scores.append(float(chosen.mean()))
        mean_length = sum(len(target) for target in targets) / len(targets)
        weights = torch.softmax(torch.tensor(scores) * mean_length, dim=0).tolist()
        return sorted(zip(labels, weights), key=lambda pair: -pair[1])


def _join(parts: list[tuple[bool, str]]) -> str:
    """Chunks of a block to its text: a new line each, but the further parts of a line that was cut go on behind a space."""
    text = ""
    for continues, part in parts:
        if part:
            text += ("" if not text else " " if continues else "\n") + part
    return text
