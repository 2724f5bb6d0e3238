"""A ready LLaVA checkpoint from any vision tower and any causal language model: `unit llava TOWER LLM OUT`.

What comes out is a plain `LlavaForConditionalGeneration` with its `LlavaProcessor`: the projector is fresh, tower and
language model are as they were. Recipes in `training/recipes/llava` train the projector, then all.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from modeling_unit import UnitModel, UnitVisionConfig, UnitVisionModel
from modeling_unit.configuration_unit import PREFIX_TOKENS
from modeling_unit.llava_unit import clip_image_processor, is_unit, processor_settings, tower_size

from .llava_tower import _clip_processor, at_one_size, unit_tower_processor, written_whole

IMAGE_TOKEN = "<image>"
SELECTIONS = ("default", "full")
# transformers' LLaVA shows its tower squares of pixels; this one wants patches with their places
NO_SQUARES = ("siglip2_vision_model",)

# Vicuna's words, as in LLaVA 1.5, for a language model that has no chat template of its own
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}
{%- else -%}{{- message['content'] + ' ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"""

# In front of any template that knows only text: contents that are lists of images and texts become text
FLATTEN = """{%- set flat = namespace(turns=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set flat.text = message['content'] -%}
{%- else -%}{%- set flat.text = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set flat.text = flat.text + 'IMAGE\\n' -%}
{%- else -%}{%- set flat.text = flat.text + part['text'] -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- set flat.turns = flat.turns + [{'role': message['role'], 'content': flat.text}] -%}
{%- endfor -%}
{%- set messages = flat.turns -%}
""".replace("IMAGE", IMAGE_TOKEN)


@dataclass
class Tower:
    """A vision model as LLaVA sees it.

    Args:
        model: called with `(B, 3, S, S)`. image_processor: makes that. size: S. prefix: tokens in front of the patches
            in its hidden states. layer: the hidden state that LLaVA reads unless told otherwise.
    """

    model: PreTrainedModel
    image_processor: Any
    size: int
    prefix: int
    layer: int


def load_tower(source: str, size: int | None = None) -> Tower:
    """A tower from the folder or Hub id of an encoder of UNIT's, a full UNIT model, or any ViT of transformers' own
    (a full CLIP or SigLIP among them).

    Raises:
        ValueError: no model there, an architecture that cannot be a tower, a size that the tower cannot have.
    """
    if not is_unit(source):
        return _native_tower(source, size)
    settings = processor_settings(source)
    config = AutoConfig.from_pretrained(source)
    if isinstance(config, UnitVisionConfig) or isinstance(config.vision_config, UnitVisionConfig):
        encoder = UnitVisionModel.from_pretrained(source, use_safetensors=True)
        size = tower_size(encoder.config, settings, size)
        image_processor = unit_tower_processor(encoder.config, settings, size)
        encoder = at_one_size(encoder, size)
        # The authors found a LayerNorm on the tokens crucial before a language model [code]: with the trained one,
        # layer -1 is what a stranger's projector should see [ours]
        encoder.config.tie_last_hidden_states = encoder.config.use_final_norm
        return Tower(encoder, image_processor, size, 1, -1 if encoder.config.use_final_norm else -2)
    encoder = UnitModel.from_pretrained(source, use_safetensors=True).vision_model
    size = _own_size(source, encoder.config, size)
    return Tower(encoder, _clip_processor(source, size), size, _prefix(source, encoder.config), -2)


def _native_tower(source: str, size: int | None) -> Tower:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no vision model there: {str(error).splitlines()[0]}") from None
    config = getattr(config, "vision_config", config)
    prefix, size = _prefix(source, config), _own_size(source, config, size)
    model = AutoModel._model_mapping[type(config)].from_pretrained(source, use_safetensors=True).eval()
    try:
        image_processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):  # a folder of weights alone
        image_processor = clip_image_processor(size)
    return Tower(model, image_processor, size, prefix, -2)


def _prefix(source: str, config: Any) -> int:
    if config.model_type not in PREFIX_TOKENS or config.model_type in NO_SQUARES:
        known = ", ".join(sorted(set(PREFIX_TOKENS) - set(NO_SQUARES)))
        raise ValueError(f"{source} is a {config.model_type!r}, which cannot be LLaVA's tower. These can: {known}.")
    return PREFIX_TOKENS[config.model_type](config)


def _own_size(source: str, config: Any, size: int | None) -> int:
    own = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    if size not in (None, own):
        raise ValueError(f"{source} takes images of {own} pixels a side; only UNIT's own encoder takes another size.")
    return own


def selection_for(prefix: int, select: str | None) -> str:
    """`"default"` drops one token in front of the patches, `"full"` none.

    Raises:
        ValueError: an unknown selection; more (or fewer) prefix tokens than the selection drops.
    """
    if select not in (None, *SELECTIONS):
        raise ValueError(f"The selection is one of {', '.join(SELECTIONS)}, got {select!r}.")
    if prefix <= 1 and select is None:
        return SELECTIONS[1 - prefix]
    if select != "full" and prefix != 1:
        raise ValueError(
            f'The tower has {prefix} class and register tokens in front of the patches; LLaVA\'s selection "default" '
            'drops exactly one. Keep them all with the selection "full", or take an encoder with one.'
        )
    return select


def add_image_token(model: PreTrainedModel, tokenizer: Any) -> int:
    """Id of `<image>`, with an embedding behind it; new rows are drawn from the mean and spread of the others."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def build_llava(tower: Tower, language_model: PreTrainedModel, image_token: int, select: str, layer: Any):
    """The parts in one `LlavaForConditionalGeneration`, none of them copied; a projector as torch starts it.

    Raises:
        ValueError: a language model whose head LLaVA cannot hold.
    """
    inner = getattr(language_model, language_model.base_model_prefix, None)
    head = language_model.get_output_embeddings()
    if language_model.config.tie_word_embeddings and not hasattr(inner, "embed_tokens"):
        # transformers' LLaVA ties its head to an embedding of this very name (OPT has it one level deeper): two copies
        language_model.config.tie_word_embeddings = False
        head = copy.deepcopy(head)
    config = LlavaConfig(
        vision_config=tower.model.config,
        text_config=language_model.config,
        image_token_index=image_token,
        image_seq_length=(tower.size // tower.model.config.patch_size) ** 2 + tower.prefix - (select == "default"),
        vision_feature_select_strategy=select,
        vision_feature_layer=layer,
        tie_word_embeddings=bool(language_model.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    if type(inner) is not type(model.model.language_model) or not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"{type(language_model).__name__} is not built as LLaVA expects: a model that AutoModel makes, and a "
            "linear head."
        )
    if head.bias is not None:
        raise ValueError(f"{type(language_model).__name__} has a bias in its head, LLaVA's head has none.")
    model.model.vision_tower = tower.model.to(language_model.dtype)
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(language_model.dtype)
    model.model.language_model, model.lm_head = inner, head
    model.generation_config = language_model.generation_config
    return model.eval()


def assemble(
    tower: str,
    language_model: str,
    out: str | Path,
    size: int | None = None,
    select: str | None = None,
    layer: int | list[int] | None = None,
) -> dict[str, Any]:
    """Write a LLaVA checkpoint and check it as a stranger would use it; returns what was found.

    Args:
        tower: see [`load_tower`]. language_model: folder or Hub id of a causal language model, read from safetensors.
        out: a folder that is made; nothing stays of it after an error.
        size: side of the square in pixels (UNIT's own encoder only; see [`tower_size`] for the default).
        select: `"default"` or `"full"`; what fits the tower by default.
        layer: hidden state(s) that the projector sees. -1 for UNIT's own, final norm applied; -2 for others, as LLaVA.

    Raises:
        ValueError: a part that is not there or does not fit, in one line.
    """
    vision = load_tower(str(tower), size)
    select = selection_for(vision.prefix, select)
    layer = vision.layer if layer is None else layer
    if layer == 0 and not isinstance(vision.model, UnitVisionModel):
        layer = [0]  # transformers' own towers take a bare 0 for "no hidden states" (5.23)
    layers = vision.model.config.num_hidden_layers
    for one in layer if isinstance(layer, (list, tuple)) else [layer]:
        if not -layers - 1 <= one <= layers:
            raise ValueError(f"The tower's hidden states are numbered {-layers - 1} to {layers}; there is no {one}.")
    try:
        text = AutoModelForCausalLM.from_pretrained(language_model, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(language_model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{language_model}: no causal language model there: {str(error).splitlines()[0]}") from None
    image_token = add_image_token(text, tokenizer)
    probe = tokenizer("A picture of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = text(probe).logits
    processor = LlavaProcessor(
        image_processor=vision.image_processor,
        tokenizer=tokenizer,
        patch_size=vision.model.config.patch_size,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=vision.prefix,
        image_token=IMAGE_TOKEN,
        chat_template=FLATTEN + (tokenizer.chat_template or CHAT_TEMPLATE),
    )
    model = build_llava(vision, text, image_token, select, layer)
    with written_whole(out) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        return check(staging, probe, alone)


@torch.no_grad()
def check(folder: str | Path, probe: torch.Tensor | None = None, alone: torch.Tensor | None = None) -> dict[str, Any]:
    """Load a LLaVA folder and ask it about a picture; returns the counts that must agree, and the answer.

    Args:
        probe, alone: token ids and what the language model made of them by itself: LLaVA must make the same.

    Raises:
        ValueError: weights missing or left over, the processor's number of image tokens is not the model's, the
            language model is changed by its new home.
    """
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    processor = LlavaProcessor.from_pretrained(folder)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"The folder's weights do not fit: {kind.replace('_', ' ')} {sorted(report[kind])[:3]}.")
    model.eval()
    if alone is not None:
        again = model(input_ids=probe).logits
        if (again - alone).abs().max() > 1e-3 * alone.abs().max() + 1e-6:
            raise ValueError(
                f"{type(model.model.language_model).__name__} does not give inside LLaVA what it gives alone: its "
                "head does more than multiply."
            )
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    if prompt.count(IMAGE_TOKEN) != 1:
        raise ValueError(f"The chat template shows {prompt.count(IMAGE_TOKEN)} images where there is one.")
    picture = Image.new("RGB", (90, 50), (200, 60, 20))
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    image_ids = inputs["input_ids"] == model.config.image_token_id
    features = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    counted, given = int(image_ids.sum()), features.shape[0] * features.shape[1]
    if counted != given:
        raise ValueError(f"The processor makes {counted} image tokens of a picture, the tower {given}.")
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return {
        "image_tokens": counted,
        "image_size": tuple(inputs["pixel_values"].shape[-2:]),
        "select": model.config.vision_feature_select_strategy,
        "layer": model.config.vision_feature_layer,
        "prompt": prompt,
        "new_tokens": made.shape[1] - inputs["input_ids"].shape[1],
        "parameters": {
            "tower": sum(one.numel() for one in model.model.vision_tower.parameters()),
            "projector": sum(one.numel() for one in model.model.multi_modal_projector.parameters()),
            "language model": sum(one.numel() for one in model.model.language_model.parameters()),
        },
    }
