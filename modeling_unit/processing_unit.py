"""Images and task prompts to model inputs: the image processor and the tokenizer in one."""

import math

from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from .hub_unit import IMAGE_PROCESSOR_AUTO_MAP, PROCESSOR_AUTO_MAP, CodeUploaded, write_code

# Which kind of image a task reads, unless said otherwise
TASK_KINDS = {"ocr": "document", "markdown": "document", "caption": "natural"}
DEFAULT_PROMPTS = {"ocr": "Read the text:", "caption": "Describe the picture:", "markdown": "Write as Markdown:"}
# One message with an image and a prompt, as `apply_chat_template` and pipelines give it, to the prompt of `text`. The
# model reads; it was not trained to talk.
CHAT_TEMPLATE = """{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}
{{- raise_exception('UNIT takes one message of the user: an image, and a prompt as text.') -}}
{%- endif -%}
{%- set content = messages[0]['content'] -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}{%- endif -%}"""


class UnitProcessor(CodeUploaded, ProcessorMixin):
    """Makes `input_ids`, `attention_mask`, `pixel_values` and `spatial_shapes` for [`UnitForConditionalGeneration`].

    Args:
        image_processor: [`UnitImageProcessor`].
        tokenizer: the language decoder's tokenizer; `image_token` is added to it when it is missing.
        task_prompts: text behind the visual tokens for each task, saved with the model, so that a model is asked as it
            was trained.
        image_token: placeholder, one for each visual token.
        unshuffle: patches on a side of one visual token (MLP connector).
        num_queries: visual tokens of a Q-Former connector, whatever the image's size; `None` for the MLP connector.
        chat_template: Jinja, from messages to a prompt; by default of one message with an image and a text.

    Example:

    ```python
    >>> inputs = processor(images=[page], task="ocr")
    >>> ids = model.generate(**inputs)
    >>> processor.decode_new(ids, inputs)
    ```
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        task_prompts=None,
        image_token="<image>",
        unshuffle=2,
        num_queries=None,
        chat_template=None,
    ):
        self.task_prompts = dict(DEFAULT_PROMPTS if task_prompts is None else task_prompts)
        self.image_token = image_token
        self.unshuffle = unshuffle
        self.num_queries = num_queries
        if tokenizer is not None:
            if image_token not in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})
            tokenizer.padding_side = "left"
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.replace("IMAGE", image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, and the code beside it, for `trust_remote_code=True`."""
        self.auto_map = dict(PROCESSOR_AUTO_MAP)
        self.image_processor.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)
        saved = super().save_pretrained(save_directory, **kwargs)
        write_code(save_directory)
        return saved

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def num_visual_tokens(self, rows: int, cols: int) -> int:
        """Visual tokens of an image of rows x cols patches."""
        if self.num_queries is not None:
            return self.num_queries
        return math.ceil(rows / self.unshuffle) * math.ceil(cols / self.unshuffle)

    def prompt_ids(self, task: str) -> list[int]:
        """Token ids of a task's prompt.

        Raises:
            ValueError: for a task that the model does not know.
        """
        if task not in self.task_prompts:
            raise ValueError(f"Unknown task {task!r}. This model knows: {', '.join(sorted(self.task_prompts))}.")
        return self.tokenizer(self.task_prompts[task], add_special_tokens=False)["input_ids"]

    def __call__(
        self,
        images=None,
        text=None,
        task: str | None = None,
        kind: str | None = None,
        scale: int | None = None,
        return_tensors: str | None = "pt",
        return_packed: bool = False,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: one image or a list; of `apply_chat_template`, a list of one image for each conversation.
            text: a prompt or one for each image, in place of `task`. A missing `image_token` is put in front.
            task: `"ocr"`, `"caption"` or `"markdown"`: the prompt that the model was trained with.
            kind: `"natural"` or `"document"`; follows from the task by default (free text: natural).
            scale: 1 or 4; by default natural pictures at 1, documents at 4.
            return_packed: images of different sizes one after another instead of padded to one size.

        Returns:
            `input_ids`, `attention_mask` `(B, T)` padded on the left; `pixel_values`, `spatial_shapes` (packed,
            `image_grid_hw`).
        """
        if images is None:
            if text is None:
                raise ValueError("Give images, and a task or a text.")
            return BatchFeature(
                dict(self.tokenizer(text, add_special_tokens=False, padding=True)), tensor_type=return_tensors
            )
        batched = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
        images = list(images) if batched else [images]
        if not images:
            raise ValueError("No image was given.")
        if isinstance(images[0], (list, tuple)):
            images = [_only_image(each) for each in images]
        if (text is None) == (task is None):
            raise ValueError("Give exactly one of task and text.")
        if text is not None:
            texts = [text] * len(images) if isinstance(text, str) else list(text)
            if len(texts) != len(images):
                raise ValueError(f"{len(images)} images but {len(texts)} texts: give one text, or one for each image.")
            kind = kind or self._kind_of_prompt(texts[0])
            prompts = [
                self.tokenizer(each.replace(self.image_token, ""), add_special_tokens=False)["input_ids"]
                for each in texts
            ]
        else:
            prompts = [self.prompt_ids(task)] * len(images)
            kind = kind or TASK_KINDS.get(task, "natural")
        # said only where it is wanted: an image processor of another library need not know of packs
        packed = {"return_packed": True} if return_packed else {}
        pixels = self.image_processor(images, kind=kind, scale=scale, return_tensors=None, **packed)
        rows = [
            [self.image_token_id] * self.num_visual_tokens(int(shape[0]), int(shape[1])) + list(prompt)
            for shape, prompt in zip(
                pixels["image_grid_hw" if return_packed else "spatial_shapes"], prompts, strict=True
            )
        ]
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        data = {
            "input_ids": [[pad] * (longest - len(row)) + row for row in rows],
            "attention_mask": [[0] * (longest - len(row)) + [1] * len(row) for row in rows],
            **pixels,
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _kind_of_prompt(self, text: str) -> str:
        bare = text.replace(self.image_token, "").strip()
        for task, prompt in self.task_prompts.items():
            if bare == prompt.strip():
                return TASK_KINDS.get(task, "natural")
        return "natural"

    def decode_new(self, ids, inputs) -> list[str]:
        """Texts of what `generate` added behind the prompt of `inputs`."""
        start = inputs["input_ids"].shape[1]
        return self.batch_decode(ids[:, start:], skip_special_tokens=True)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        return self.tokenizer.decode(*args, **kwargs)


def _only_image(images):
    """The image of a conversation, loaded where its message gave a path or an address, as transformers' own
    processors do.

    Raises:
        ValueError: none or several.
    """
    if len(images) != 1:
        raise ValueError(f"Each prompt takes exactly one image, got {len(images)}.")
    return load_image(images[0]) if isinstance(images[0], str) else images[0]
