"""A LLaVA model that answers questions about pictures in batches; nothing here knows lmms-eval.

Shapes: B questions, T tokens, V pieces of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

import modeling_unit  # noqa: F401  LLaVA looks UNIT's tower up in transformers' registry
from modeling_unit.image_processing_unit import to_rgb
from training.errors import first_line
from training.llava_assembly import CHAT_TEMPLATE, FLATTEN, IMAGE_TOKEN
from training.llava_data import IGNORED, ConversationCollator

# What lmms-eval's own models take where a task does not say [lmms-eval 0.7.3, llava_hf]
MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    """A text, and how to get the pictures it is about.

    Attributes:
        text: with `<image>` where a picture belongs, or without: pictures then stand in front.
        load: gives the PIL pictures; called when their turn comes.
        answer: whose loss is asked for; "" where an answer is.
    """

    text: str
    load: Callable[[], Sequence[Any]]
    answer: str = ""


class LlavaAnswerer:
    """A `LlavaForConditionalGeneration` with its processor.

    Args:
        name: folder or Hub id; only safetensors are read, no code of others is run.
        device: name of a torch device.
        dtype: name of a torch dtype; bfloat16 on a GPU and float32 on a CPU unless told otherwise.

    Raises:
        ValueError: no LLaVA there, in one line.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: str | None = None):
        self.device = device
        dtype = dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"there is no dtype {dtype!r}; float32, bfloat16 and float16 are")
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            if kind != "llava":
                raise ValueError(f"a {kind!r} checkpoint, no LLaVA; `unit llava` makes one of a tower")
            self.model = LlavaForConditionalGeneration.from_pretrained(
                name, dtype=getattr(torch, dtype), use_safetensors=True
            )
            self.processor = LlavaProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{name}: {first_line(error)}") from error
        self.model.eval().to(device)
        if self.processor.chat_template is None:
            self.processor.chat_template = FLATTEN + (self.processor.tokenizer.chat_template or CHAT_TEMPLATE)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # answers begin at the same place in every row of a batch
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.positions = getattr(self.model.config.text_config, "max_position_embeddings", None)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], settings: Mapping[str, Any] | None = None) -> list[str]:
        """Answers, in order.

        Args:
            settings: of a task: `max_new_tokens`, `temperature` (0: greedy), `top_p`, `top_k`, `num_beams`, and
                `until`, strings at which an answer ends. Others concern other models.

        Raises:
            ValueError: a text with another number of `<image>` than pictures, or with more tokens than the language
                model has places for; what cannot be opened as a picture.
        """
        settings = dict(settings or {})
        pictures = [_pictures(question) for question in questions]
        prompts = [
            self.processor.apply_chat_template([_asked(question, len(some))], add_generation_prompt=True)
            for question, some in zip(questions, pictures, strict=True)
        ]
        images = [image for some in pictures for image in some]
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=images or None,
            text=prompts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=bos is None or not prompts[0].startswith(bos),
        ).to(self.device)
        length = inputs["input_ids"].shape[1]
        most = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        if self.positions is not None:
            if length >= self.positions:
                raise ValueError(f"{length} tokens asked; the language model has places for {self.positions}")
            most = min(most, self.positions - length)
        temperature = float(settings.get("temperature") or 0)
        drawn = {key: settings[key] for key in ("top_p", "top_k") if settings.get(key) is not None}
        made = self.model.generate(
            **inputs,
            max_new_tokens=most,
            num_beams=int(settings.get("num_beams") or 1),
            pad_token_id=self.processor.tokenizer.pad_token_id,
            **({"do_sample": True, "temperature": temperature, **drawn} if temperature > 0 else {"do_sample": False}),
        )
        texts = self.processor.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        ends = settings.get("until") or []
        return [_until(text, [ends] if isinstance(ends, str) else ends) for text in texts]

    @torch.inference_mode()
    def losses(self, questions: Sequence[Question]) -> list[tuple[float, bool]]:
        """For each question with its answer: mean loss in nats per token of the answer and of the end of its turn, as
        training counts it, and whether greedy decoding gives just that.

        Raises:
            ValueError: as :meth:`answer`.
        """
        items = []
        for question in questions:
            pictures = _pictures(question)
            told = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
            items.append({"messages": [_asked(question, len(pictures)), told], "images": pictures})
        batch = ConversationCollator(self.processor, self.positions)(items)
        labels = batch.pop("labels")[:, 1:].to(self.device)  # (B, T - 1)
        logits = self.model(**{key: value.to(self.device) for key, value in batch.items()}).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )  # (B, V, T - 1), (B, T - 1) -> (B, T - 1)
        counted = labels != IGNORED
        mean = each.sum(1) / counted.sum(1).clamp(min=1)
        greedy = ((logits.argmax(-1) == labels) | ~counted).all(1)
        return list(zip(mean.tolist(), greedy.tolist(), strict=True))


def _pictures(question: Question) -> list[Any]:
    """RGB pictures of a question."""
    found = list(question.load())
    for one in found:
        if not hasattr(one, "convert"):
            raise ValueError(f"a picture was expected, not {type(one).__name__}: no video, no sound")
    return [to_rgb(one) for one in found]


def _asked(question: Question, pictures: int) -> dict[str, Any]:
    """The user's turn, pictures in their places."""
    pieces = question.text.split(IMAGE_TOKEN)
    if len(pieces) == 1:
        pieces = [""] * pictures + pieces
    if len(pieces) - 1 != pictures:
        raise ValueError(f"{pictures} pictures for {len(pieces) - 1} places: {json.dumps(question.text[:80])}")
    content: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        content += [{"type": "image"}] if index else []
        # the templates break the line behind a picture themselves
        piece = piece.removeprefix("\n") if index else piece
        content += [{"type": "text", "text": piece}] if piece else []
    return {"role": "user", "content": content}


def _until(text: str, ends: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    places = [text.find(end) for end in ends if end and end in text]
    return text[: min(places)] if places else text
