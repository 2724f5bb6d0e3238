"""Read whole pages with a model that reads a few lines at a time, and name pictures; each text with a confidence.

Shapes: B chunks of a batch, T new pieces, V vocabulary. Confidences are the geometric mean of the probabilities that
the decoder gave to the pieces it chose, in (0, 1]: exp(mean log-probability). They rank texts of one model; they are
not shares of right words.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .image_input_unit import open_image
from .layout_unit import LayoutSettings, PageLayout, analyse_page
from .markdown_unit import write_markdown
from .processing_unit import UnitProcessor
from .repetition_unit import RepetitionStopper, stutters, trim_repetition
from .rows_unit import ReadLine

# Confidence from which one look at a line is enough, and how it is looked at again: moved by so many patches, and
# stretched. On ten pages of development documents a unit-tiny read with a word F1 of .913 at one look, .927 at two,
# .939 at four and .943 at six at an x-height of 10 px; at 4 px .848, .871, .885, .895. A vote, of lines or of words,
# was no better than the surest reading. [ours, measured]
SURE = 0.99
LOOKS = ((0.5, 1.0), (0.0, 0.94), (0.0, 1.06), (0.25, 0.97), (0.75, 1.03))


@dataclass
class Block:
    """A paragraph as it was read.

    Args:
        box: `(x0, y0, x1, y1)` pixels of the given picture, x1 and y1 exclusive.
        text: its lines, joined by newlines.
        confidence: mean of its chunks' confidences, weighted by their number of pieces.
        lines: boxes of its lines, as `box`.
        x_height: height of its small letters in pixels of the given picture.
        repetition_stopped: the decoder went round in circles in it; the text is what came before.
        truncated: the decoder had not come to an end when as much was read as the box can hold.
        read: its lines one by one with what the layout knows of them, from which [`Page.markdown`] is made; not in
            `to_dict`.
    """

    box: tuple[int, int, int, int]
    text: str
    confidence: float
    lines: list[tuple[int, int, int, int]] = field(default_factory=list)
    x_height: float = 0.0
    repetition_stopped: bool = False
    truncated: bool = False
    read: list[ReadLine] = field(default_factory=list, repr=False, compare=False)

    @property
    def evidence(self) -> float:
        """How much speaks for there being text at all: its letters and digits, times the odds that one is right.

        A stroke of a drawing may be taken for a "1" with a confidence of 0.9, which are 9; a word of five letters with
        one of 0.99 has 495. [ours]
        """
        letters = sum(character.isalnum() for character in self.text)
        return letters * self.confidence / max(1.0 - self.confidence, 1e-6)

    def to_dict(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "read"}


@dataclass
class Page:
    """A page as it was read: blocks in reading order, none if it is blank. `size`: width and height in pixels."""

    blocks: list[Block]
    size: tuple[int, int]
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The blocks' texts, a blank line between them."""
        return "\n\n".join(block.text for block in self.blocks if block.text)

    @property
    def markdown(self) -> str:
        """The text as Markdown: headings, lists, code and tables as the layout shows them, see `markdown_unit`."""
        return write_markdown([line for block in self.blocks for line in block.read])

    @property
    def confidence(self) -> float:
        """Mean over the blocks by their length; 0 for a blank page."""
        weights = [len(block.text) for block in self.blocks]
        total = sum(weights)
        return (
            sum(w * block.confidence for w, block in zip(weights, self.blocks, strict=True)) / total if total else 0.0
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "width": self.size[0],
            "height": self.size[1],
            "seconds": round(self.seconds, 3),
            "confidence": self.confidence,
            "text": self.text,
            "blocks": [block.to_dict() for block in self.blocks],
        }


@dataclass
class PartialPage:
    """A page while it is being read, by [`Reader.stream`].

    Args:
        page: the blocks of which something was read, in reading order; the last of them may still grow.
        waiting: boxes of the blocks of which nothing was read yet, as `Block.box`.
        done, total: chunks read, and all chunks.
    """

    page: Page
    waiting: list[tuple[int, int, int, int]]
    done: int
    total: int


@dataclass
class Caption:
    """What a picture is said to show."""

    text: str
    confidence: float
    seconds: float = 0.0


@dataclass
class RankedLabel:
    """A label and how likely the decoder finds it: the geometric mean of its pieces' probabilities, end included."""

    label: str
    likelihood: float


@dataclass
class _Decoded:
    text: str
    confidence: float
    pieces: int
    repetition_stopped: bool
    truncated: bool

    @property
    def cut_short(self) -> bool:
        return self.repetition_stopped or self.truncated

    @property
    def stutters(self) -> bool:
        return stutters(self.text)

    @property
    def doubtful(self) -> bool:
        return self.cut_short or (bool(self.text.strip()) and self.confidence < SURE) or self.stutters

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Of two readings of one line the one of higher rank stays."""
        return not self.cut_short, not self.stutters, self.confidence


class _ChosenProbability(LogitsProcessor):
    """Notes the log-probability of the likeliest piece at each step: the chosen one, as decoding is greedy."""

    def __init__(self):
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        self.steps.append(torch.log_softmax(scores.float(), dim=-1).amax(dim=-1))  # (B,)
        return scores


class _OwnLength(StoppingCriteria):
    """Ends each row at its own number of new pieces: (B,)."""

    def __init__(self, prompt_length: int, limits: Sequence[int]):
        self.prompt_length, self.limits = prompt_length, limits

    def __call__(self, input_ids, scores, **kwargs):
        limits = torch.as_tensor(self.limits, device=input_ids.device)
        return input_ids.shape[1] - self.prompt_length >= limits


def _read_lines(layout: PageLayout, members: Sequence[tuple[Any, _Decoded]]) -> list[ReadLine]:
    """The lines of a block from its chunks and what was read of them."""
    found: list[ReadLine] = []
    before = None
    for chunk, read in members:
        lines, texts = chunk.lines, [text.strip() for text in read.text.strip().split("\n")]
        if lines[0] is before:  # a further part of a line that was too wide to be read at once
            found[-1].text = f"{found[-1].text} {' '.join(texts)}".strip()
        else:
            if len(texts) != len(lines):  # nobody can tell which line a text is of: all of it stands on the first
                texts = [" ".join(texts)] + [""] * (len(lines) - 1)
            for line, text in zip(lines, texts, strict=True):
                found.append(ReadLine(line.box, text, line.x_height, line.baseline, layout.ink_of(line)))
        before = lines[-1]
    return found


class Reader:
    """Reads pages and describes pictures with a UNIT model.

    Pages are cut on white space (`layout_unit`), the chunks of all pages rescaled to one x-height and read in batches
    of like size, greedily.

    Args:
        model: `UnitForConditionalGeneration`, or any model whose `generate` takes what `processor` makes.
        processor: `UnitProcessor`.
        batch_size: most chunks read at once.
        settings (`LayoutSettings`, *optional*): by default budget and patches of the processor; a model that takes
            larger documents than unit-tiny gets proportionally more lines at once.
        repetition: settings of [`RepetitionStopper`] other than the defaults.
        looks: how often at most a line is looked at while no reading of it is sure, 1 to 6: each further time a little
            shifted, narrower or wider, so that other patches hold its letters; what is read with the most confidence
            stays. By default what the model was saved with (`reading_looks` of its image processor), else 1. For
            models that read line by line; others look once.
        evidence: a page whose blocks have less evidence than this together ([`Block`]) is taken for a picture or for
            stained paper, and nothing is read on it. By default what the model was saved with (`reading_evidence` of
            its image processor), else 0: none is. For crops of single short words that are hardly legible, set 0.
        packed: encode the chunks of a batch without padding them to one size. By default where model and processor
            know how to: a page takes a tenth less time on a CPU, and reads the same [ours, measured].

    Example:

    ```python
    >>> reader = Reader(model, processor)
    >>> page = reader.read("page.png")
    >>> print(page.text)
    ```
    """

    def __init__(
        self,
        model,
        processor,
        batch_size: int = 16,
        settings: LayoutSettings | None = None,
        repetition: dict[str, int] | None = None,
        packed: bool | None = None,
        looks: int | None = None,
        evidence: float | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if looks is None:
            looks = getattr(processor.image_processor, "reading_looks", None) or 1
        if not 1 <= looks <= 1 + len(LOOKS):
            raise ValueError(f"looks must lie between 1 and {1 + len(LOOKS)}, got {looks}.")
        if evidence is None:
            evidence = getattr(processor.image_processor, "reading_evidence", None) or 0.0
        if not evidence >= 0:
            raise ValueError(f"evidence must be at least 0, got {evidence}.")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.settings = settings or self._default_settings(processor.image_processor)
        self.looks = looks if self.settings.line_height else 1
        self.evidence = evidence
        self.repetition = dict(repetition or {})
        if packed is None:
            packed = isinstance(processor, UnitProcessor) and hasattr(model, "encode_packed")
        self.packed = packed
        # A placeholder for an image among the pieces read would ask the model for an image that is not there.
        placeholder = getattr(processor, "image_token_id", None)
        self._never = None if placeholder is None else [placeholder]

    @classmethod
    def from_pretrained(cls, name_or_folder, device: Any = None, **kwargs) -> "Reader":
        """Load model and processor of one checkpoint, from a folder or the Hub; `kwargs` as for the class.

        On a CPU the weights are held in float32: a bfloat16 kernel is compiled for every new shape there, which costs
        a page more than it gains.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if device.type == "cpu" else "auto"
        model = AutoModelForImageTextToText.from_pretrained(name_or_folder, dtype=dtype, use_safetensors=True)
        model = model.to(device).eval()
        return cls(model, AutoProcessor.from_pretrained(name_or_folder), **kwargs)

    @staticmethod
    def _default_settings(image_processor) -> LayoutSettings:
        base = LayoutSettings()
        area = int(getattr(image_processor, "document_area", base.document_area))
        x_height = getattr(image_processor, "reading_x_height", None) or base.x_height
        return LayoutSettings(
            document_area=area,
            max_width=int(getattr(image_processor, "max_width", base.max_width)),
            patch_size=int(getattr(image_processor, "patch_size", base.patch_size)),
            x_height=x_height,
            min_x_height=min(base.min_x_height, 0.9 * x_height),
            line_height=getattr(image_processor, "reading_line_height", None) or 0,
            baseline=getattr(image_processor, "reading_baseline", None) or base.baseline,
            max_lines=getattr(image_processor, "reading_lines", None)
            or max(base.max_lines, base.max_lines * area // base.document_area),
        )

    # ------------------------------------------------------------------------------------------ pages

    def read(self, image: Any) -> Page:
        """Read one page: a PIL image, a path or the bytes of a file.

        Raises:
            UnreadableInput: it cannot be opened.
        """
        return self.read_many([image])[0]

    def read_many(self, images: Sequence[Any], progress: Callable[[int, int], None] | None = None) -> list[Page]:
        """Read several pages, their chunks in common batches.

        Args:
            images: as for [`read`].
            progress: called with the number of chunks done and of all chunks, first with 0 done.

        Raises:
            UnreadableInput: one cannot be opened; nothing is read then.
        """
        images = [open_image(image) for image in images]
        layouts: list[PageLayout] = []
        owners: list[int] = []
        chunks, crops = [], []
        seconds = [0.0] * len(images)
        for index, image in enumerate(images):
            start = time.perf_counter()
            layout = analyse_page(image, self.settings)
            for chunk in layout.chunks():
                owners.append(index)
                chunks.append(chunk)
                crops.append(layout.crop(chunk))
            layouts.append(layout)
            seconds[index] += time.perf_counter() - start
        decoded: list[_Decoded | None] = [None] * len(chunks)
        # Like sizes together: the least padding, and rows of a batch that end at about the same step.
        order = sorted(range(len(chunks)), key=lambda i: (crops[i].width * crops[i].height, crops[i].width))
        if progress:
            progress(0, len(chunks))
        for first in range(0, len(order), self.batch_size):
            members = order[first : first + self.batch_size]
            start = time.perf_counter()
            texts = self._read_crops([crops[i] for i in members], [len(chunks[i].lines) for i in members])
            for i, text in zip(members, texts, strict=True):
                decoded[i] = text
            spent = (time.perf_counter() - start) / len(members)
            for i in members:
                seconds[owners[i]] += spent
            if progress:
                progress(first + len(members), len(chunks))
        pages = []
        for index, (image, layout) in enumerate(zip(images, layouts, strict=True)):
            own = [i for i, owner in enumerate(owners) if owner == index]
            blocks = self._blocks(layout, [chunks[i] for i in own], [decoded[i] for i in own])
            pages.append(Page(blocks, image.size, seconds[index]))
        return pages

    def stream(self, image: Any) -> Iterator[PartialPage]:
        """Read one page in reading order; after each batch comes what there is of it, the first before any was read.

        The batches grow from a quarter of `batch_size` to all of it, so that the first text is there soon. The last
        page that comes is the one that [`read`] returns, but for what rounding does in batches of other sizes.

        Raises:
            UnreadableInput: it cannot be opened.
        """
        image = open_image(image)
        start = time.perf_counter()
        layout = analyse_page(image, self.settings)
        chunks = layout.chunks()
        decoded: list[_Decoded] = []
        size = max(1, self.batch_size // 4)
        while True:
            blocks = self._blocks(layout, chunks[: len(decoded)], decoded)
            begun = {chunk.block_index for chunk in chunks[: len(decoded)]}
            waiting = [layout.to_original(one.box) for i, one in enumerate(layout.blocks) if i not in begun]
            page = Page(blocks, image.size, time.perf_counter() - start)
            yield PartialPage(page, waiting, len(decoded), len(chunks))
            members = chunks[len(decoded) : len(decoded) + size]
            if not members:
                return
            decoded += self._read_crops(
                [layout.crop(chunk) for chunk in members], [len(chunk.lines) for chunk in members]
            )
            size = min(2 * size, self.batch_size)

    def _read_crops(self, crops: list[Image.Image], lines: Sequence[int]) -> list[_Decoded]:
        """Texts of a batch of crops, each of so many lines; those in doubt are looked at again."""
        texts = self._read_once(crops, lines)
        for look in LOOKS[: self.looks - 1]:
            unsure = [i for i, text in enumerate(texts) if text.doubtful]
            if not unsure:
                break
            again = self._read_once([self._looked_at(crops[i], *look) for i in unsure], [lines[i] for i in unsure])
            for i, text in zip(unsure, again, strict=True):
                texts[i] = max(texts[i], text, key=lambda each: each.rank)
        return texts

    def _read_once(self, crops: list[Image.Image], lines: Sequence[int]) -> list[_Decoded]:
        limits = [self._most_pieces(crop, count) for crop, count in zip(crops, lines, strict=True)]
        return self._generate(crops, "ocr", limits)

    def _looked_at(self, crop: Image.Image, shift: float, stretch: float) -> Image.Image:
        """A strip moved to the right by so many patches and stretched, padded with white to whole patches."""
        patch, widest = self.settings.patch_size, self.settings.max_width // self.settings.patch_size
        left, width = round(shift * patch), max(1, round(stretch * crop.width))
        columns = -(-(left + width) // patch)
        if columns > widest:
            columns, width = widest, widest * patch - left
        canvas = Image.new("L", (columns * patch, crop.height), 255)
        canvas.paste(crop.resize((width, crop.height), Image.Resampling.LANCZOS), (left, 0))
        return canvas

    def _most_pieces(self, crop: Image.Image, lines: int) -> int:
        """Pieces that a chunk can hold: its narrowest print, two bytes for some letters, a newline a line."""
        # 0.6 x-heights a character all along is narrower than any text face: Times has 1.0 on average.
        return math.ceil(lines * (crop.width / (0.6 * self.settings.x_height) + 2)) + 8

    def _blocks(self, layout: PageLayout, chunks: list, decoded: list[_Decoded]) -> list[Block]:
        found: dict[int, list[tuple[Any, _Decoded]]] = {}
        for chunk, text in zip(chunks, decoded, strict=True):
            found.setdefault(chunk.block_index, []).append((chunk, text))
        blocks = []
        for index, members in sorted(found.items()):
            source = layout.blocks[index]
            text, row = "", None
            for chunk, read in members:
                # Parts of one line, and cells side by side, stand on one line of the text.
                same = chunk.lines[0].row == row
                piece = read.text.strip()
                if piece:
                    text += (" " if same else "\n") + piece if text else piece
                row = chunk.lines[-1].row
            if not text:
                continue
            weights = [max(1, read.pieces) for _, read in members]
            confidence = sum(w * read.confidence for w, (_, read) in zip(weights, members, strict=True)) / sum(weights)
            x_height = sorted(line.x_height for line in source.lines)[len(source.lines) // 2] * layout.factor
            blocks.append(
                Block(
                    box=layout.to_original(source.box),
                    text=text,
                    confidence=confidence,
                    lines=[layout.to_original(line.box) for line in source.lines],
                    x_height=round(x_height, 2),
                    repetition_stopped=any(read.repetition_stopped for _, read in members),
                    truncated=any(read.truncated for _, read in members),
                    read=_read_lines(layout, members),
                )
            )
        return blocks if sum(block.evidence for block in blocks) >= self.evidence else []

    # ------------------------------------------------------------------------------------------ pictures

    def describe(
        self,
        images: Sequence[Any],
        max_new_tokens: int = 96,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Caption]:
        """Say what pictures show, a [`Caption`] each.

        Raises:
            UnreadableInput: one cannot be opened.
        """
        images = [open_image(image) for image in images]
        captions = []
        for first in range(0, len(images), self.batch_size):
            if progress:
                progress(first, len(images))
            batch = images[first : first + self.batch_size]
            start = time.perf_counter()
            decoded = self._generate(batch, "caption", [max_new_tokens] * len(batch))
            spent = (time.perf_counter() - start) / len(batch)
            captions += [Caption(" ".join(read.text.split()), read.confidence, spent) for read in decoded]
        if progress:
            progress(len(images), len(images))
        return captions

    @torch.inference_mode()
    def rank_labels(self, image: Any, labels: Sequence[str]) -> list[RankedLabel]:
        """Labels by how likely the decoder finds each as the picture's caption, the likeliest first.

        Longer labels are not at a disadvantage: the measure is the mean log-probability of a label's pieces and of
        the end.

        Raises:
            ValueError: no label, or an empty one.
            UnreadableInput: the picture cannot be opened.
        """
        labels = [label.strip() for label in labels]
        if not labels or not all(labels):
            raise ValueError("rank_labels needs at least one label, and none of them empty.")
        image = open_image(image)
        tokenizer = self.processor.tokenizer
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # letters that look like a special token are letters here
        encoded = [tokenizer(label, add_special_tokens=False, split_special_tokens=True) for label in labels]
        targets = [each["input_ids"] + end for each in encoded]
        ranked = []
        for first in range(0, len(labels), self.batch_size):
            part = targets[first : first + self.batch_size]
            inputs = self._to_device(self.processor(images=[image] * len(part), task="caption", return_tensors="pt"))
            longest = max(len(ids) for ids in part)
            pad = tokenizer.pad_token_id or 0
            device = inputs["input_ids"].device
            added = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in part], device=device)  # (B, L)
            real = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in part], device=device)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real], dim=1)
            logits = self.model(**inputs).logits[:, -longest - 1 : -1].float()  # position t predicts piece t + 1
            chosen = torch.log_softmax(logits, dim=-1).gather(-1, added.unsqueeze(-1)).squeeze(-1)  # (B, L)
            means = (chosen * real).sum(dim=1) / real.sum(dim=1)
            names = labels[first : first + self.batch_size]
            ranked += [RankedLabel(label, math.exp(mean)) for label, mean in zip(names, means.tolist(), strict=True)]
        return sorted(ranked, key=lambda entry: -entry.likelihood)

    # ------------------------------------------------------------------------------------------ decoding

    def _to_device(self, inputs):
        device, dtype = getattr(self.model, "device", "cpu"), getattr(self.model, "dtype", torch.float32)
        moved = {key: value.to(device) for key, value in inputs.items()}
        moved["pixel_values"] = moved["pixel_values"].to(dtype)
        return moved

    def _generate(self, images: list[Image.Image], task: str, limits: Sequence[int]) -> list[_Decoded]:
        """Greedy texts of a batch, each at most its own limit of pieces long."""
        packed = {"return_packed": True} if self.packed else {}
        return self._decode(self.processor(images=images, task=task, return_tensors="pt", **packed), limits)

    def read_resized(self, image: Image.Image, task: str, max_new_tokens: int = 96) -> str:
        """What the model says of one picture at exactly the size that it has, whatever size it would be brought to.

        Args:
            image: RGB; both sides whole patches.
            task: of the processor's prompts: `"ocr"`, `"caption"`, ...
        """
        patch = self.processor.image_processor.patch_size
        rows, cols = image.height // patch, image.width // patch
        visual = [self.processor.image_token_id] * self.processor.num_visual_tokens(rows, cols)
        ids = torch.tensor([visual + list(self.processor.prompt_ids(task))])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.from_numpy(self.processor.image_processor.normalize(image))[None],
            "spatial_shapes": torch.tensor([[rows, cols]]),
        }
        return self._decode(inputs, [max_new_tokens])[0].text

    def read_inputs(self, inputs: dict[str, torch.Tensor], limits: Sequence[int]) -> list[str]:
        """Greedy texts of a batch that is made already, each at most its own limit of pieces long.

        Args:
            inputs: what `generate` takes: `input_ids` (B, T) that end with the prompt, no padding on the right;
                `attention_mask`, `pixel_values`, and `spatial_shapes` or `image_grid_hw` where there is padding or a
                pack.
        """
        return [each.text for each in self._decode(inputs, limits)]

    @torch.inference_mode()
    def _decode(self, inputs, limits: Sequence[int]) -> list[_Decoded]:
        inputs = self._to_device(inputs)
        prompt = inputs["input_ids"].shape[1]
        stopper = RepetitionStopper(prompt, **self.repetition)
        chosen = _ChosenProbability()
        ids = self.model.generate(
            **inputs,
            max_new_tokens=max(limits),
            do_sample=False,
            num_beams=1,
            suppress_tokens=self._never,
            logits_processor=LogitsProcessorList([chosen]),
            stopping_criteria=StoppingCriteriaList([stopper, _OwnLength(prompt, limits)]),
        )[:, prompt:]  # (B, T)
        steps = torch.stack(chosen.steps, dim=1).cpu() if chosen.steps else torch.zeros(len(limits), 0)
        ends = self._end_ids()
        results = []
        for row, logs, limit in zip(ids.tolist(), steps.tolist(), limits, strict=True):
            stop = next((t for t, piece in enumerate(row) if piece in ends), None)
            ended = stop is not None and stop < limit
            kept = row[: stop if ended else limit]
            if not ended:
                # A row that a criterion ended is padded up to the longest row.
                pad = self.processor.tokenizer.pad_token_id
                while kept and kept[-1] == pad:
                    kept.pop()
            kept, looped = (kept, False) if ended else trim_repetition(kept, **self._trimming(len(kept) >= limit))
            scored = logs[: len(kept) + 1] if ended else logs[: len(kept)]  # the end itself was a choice too
            confidence = math.exp(sum(scored) / len(scored)) if scored else 0.0
            text = self.processor.batch_decode([kept], skip_special_tokens=True)[0]
            results.append(_Decoded(text, confidence, len(kept), looped, not ended and not looped))
        return results

    def _trimming(self, at_limit: bool) -> dict[str, int]:
        """Settings of `trim_repetition`. A text that filled all the room there was is suspect: a shorter loop will
        do."""
        settings = {key: value for key, value in self.repetition.items() if key != "every"}
        return settings or ({"min_repeats": 3, "min_length": 32, "leader_length": 56} if at_limit else {})

    def _end_ids(self) -> set[int]:
        config = getattr(self.model, "generation_config", None)
        end = getattr(config, "eos_token_id", None)
        if end is None:
            end = self.processor.tokenizer.eos_token_id
        if end is None:
            return set()
        return set(end) if isinstance(end, (list, tuple)) else {int(end)}
