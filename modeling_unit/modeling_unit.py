"""UNIT's task models: encoder, connector, language decoder, vision decoder, and the joint losses.

Shapes: B images, N patch tokens, D the encoder's width, T text positions, V vocabulary, K visual tokens, S prefix
tokens of the encoder's output (1 for UNIT and CLIP).
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .architectures_unit import FULL_MODELS, architecture, patch_mask, prefix_tokens, run_encoder, run_encoder_packed
from .configuration_unit import UnitConfig, UnitVisionDecoderConfig
from .connector_unit import CONNECTORS, UnitQFormerConnector
from .encoder_unit import UnitEncoderFeatures, UnitPreTrainedModel, UnitVisionModel
from .hub_unit import FULL_AUTO_MAP, VISION_DECODER_AUTO_MAP
from .vision_sources_unit import VisionSource, find_vision_source, save_encoder


@dataclass
class UnitImageFeatures(ModelOutput):
    """What the encoder and the connector make of a batch of images.

    Args:
        prefix: `(B, S, D)`, class and register tokens in the encoder's output.
        patches: `(B, N, D)`, patch tokens row by row, zero where padded.
        patch_mask: `(B, N)`, True where a patch belongs to its image.
        grid: `(rows, cols)` of the padded batch.
        visual_tokens: `(B, K, E)`, prefix for the language decoder.
        visual_mask: `(B, K)`, True where a visual token belongs to its image.
        image_grid_hw: `(B, 2)`, rows and columns of each image of a pack. `patches` is then `(1, sum N_i, D)`, image
            after image, `visual_tokens` `(1, sum K_i, E)`, and there is no common `grid`.
    """

    prefix: torch.FloatTensor | None = None
    patches: torch.FloatTensor | None = None
    patch_mask: torch.BoolTensor | None = None
    grid: tuple[int, int] | None = None
    visual_tokens: torch.FloatTensor | None = None
    visual_mask: torch.BoolTensor | None = None
    image_grid_hw: torch.LongTensor | None = None


@dataclass
class UnitCausalLMOutput(ModelOutput):
    """Output of [`UnitForConditionalGeneration`].

    Args:
        loss: `L_lan`, mean cross-entropy in nats over the labelled positions, when labels are given.
        logits: `(B, T, V)`.
        past_key_values: the decoder's cache.
        hidden_states, attentions: the decoder's, on request.
        image_features: [`UnitImageFeatures`], when images were encoded in this call.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    image_features: UnitImageFeatures | None = None


@dataclass
class UnitForPreTrainingOutput(UnitCausalLMOutput):
    """Output of [`UnitForPreTraining`].

    Args:
        loss: `L_lan + vision_weight * L_vis`, whichever of the two could be computed.
        language_loss: `L_lan`.
        vision_loss: `L_vis`, mean over the sampled tokens of `L_cos + mu * L_1`.
        vision_cosine, vision_l1: its two parts before weighting, for the log.
    """

    language_loss: torch.FloatTensor | None = None
    vision_loss: torch.FloatTensor | None = None
    vision_cosine: torch.FloatTensor | None = None
    vision_l1: torch.FloatTensor | None = None


class UnitVisionDecoder(UnitPreTrainedModel):
    """The vision decoder `f_pi` [paper]: a two-layer MLP with GELU from the encoder's tokens to the teacher's
    features."""

    config_class = UnitVisionDecoderConfig
    base_model_prefix = "vision_decoder"
    main_input_name = "hidden_states"
    hub_auto_map = VISION_DECODER_AUTO_MAP

    def __init__(self, config: UnitVisionDecoderConfig):
        super().__init__(config)
        self.fc1 = nn.Linear(config.input_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(..., D) -> (..., teacher's width)`."""
        return self.fc2(self.act(self.fc1(hidden_states)))


def vision_reconstruction_loss(
    predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None, l1_weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`L_vis = L_cos + mu * L_1` averaged over the tokens in `mask` [paper: the sum over C; the mean is ours, so that
    the weight does not depend on the size of C].

    Args:
        predicted, target: `(B, M, D)`; the target carries no gradient.
        mask: `(B, M)`, True for the tokens of the random subset C; all when `None`.
        l1_weight: mu. The paper does not state it.

    Returns:
        `L_vis`, its cosine part `mean(1 - cos)`, its L1 part (mean absolute difference over tokens and channels).
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"The vision decoder gives {tuple(predicted.shape)} and the teacher {tuple(target.shape)}: the teacher's "
            "width and grid must match."
        )
    predicted, target = predicted.float(), target.detach().float()
    cosine = 1.0 - F.cosine_similarity(predicted, target, dim=-1)  # (B, M)
    l1 = (predicted - target).abs().mean(dim=-1)  # (B, M)
    if mask is None:
        cosine, l1 = cosine.mean(), l1.mean()
    else:
        weights = mask.to(cosine.dtype)
        count = weights.sum().clamp(min=1.0)
        cosine, l1 = (cosine * weights).sum() / count, (l1 * weights).sum() / count
    return cosine + l1_weight * l1, cosine, l1


def language_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """`L_lan` in nats: position t predicts label t + 1; mean over the labels that are not `ignore_index`.

    Args:
        logits: `(B, T, V)`. labels: `(B, T)`.

    Raises:
        ValueError: when no label is left, or the shapes differ.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"labels must be {tuple(logits.shape[:2])} as the logits, got {tuple(labels.shape)}.")
    targets = labels[:, 1:]
    if not bool((targets != ignore_index).any()):
        raise ValueError(
            "All labels are masked: there is nothing to learn from in this batch. Check the label column."
        )
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten().to(logits.device), ignore_index=ignore_index
    )


class UnitComposedModel(UnitPreTrainedModel):
    """Base of the models that a [`UnitConfig`] describes: holds the encoder and knows how to run any supported one."""

    config_class = UnitConfig
    base_model_prefix = ""
    hub_auto_map = FULL_AUTO_MAP
    _no_split_modules = None

    def post_init(self):
        """`_no_split_modules`: of those that the parts name, the classes that this encoder and decoder are made of."""
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, UnitQFormerConnector):
            init.normal_(module.queries, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_vision_pretrained(
        cls,
        source: str | Path | VisionSource,
        language_decoder: str | Path | None = None,
        hidden_act: str | None = None,
        num_attention_heads: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        hub: dict[str, Any] | None = None,
        **settings,
    ) -> "UnitComposedModel":
        """A new model around a vision transformer that somebody trained: its weights are the start, and the teacher
        (see [`make_teacher`]).

        Args:
            source: folder, file or Hub id of the encoder: see [`find_vision_source`] for all that it can be.
            language_decoder: folder or Hub id of a pretrained causal language model with safetensors; without it,
                `text_config` describes one from scratch, OPT-125M in shape by default [paper].
            hidden_act, num_attention_heads: of OpenCLIP weights, which do not tell: `"quick_gelu"` for OpenAI's.
            dtype: of the weights; float32, for training. `None` keeps the dtype that each checkpoint has, and
                makes the new parts of the encoder's.
            hub: `revision`, `token`, `cache_dir`, `local_files_only` of the encoder's repository.
            settings: `connector_config`, `text_config`, `image_token_id`, ... of [`UnitConfig`].

        The image processor that suits it is `UnitImageProcessor.from_vision_pretrained(source)`.

        Raises:
            ValueError: nothing there, an architecture that UNIT does not know, keys that lack, weights only as a
                pickle.
        """
        encoder = find_vision_source(source, hidden_act, num_attention_heads, **(hub or {})).load(dtype)
        parts = {"vision_model": encoder}
        if language_decoder is not None:
            if settings.get("text_config") is not None:
                raise ValueError("Give language_decoder or text_config, not both: a pretrained decoder has its own.")
            parts["language_model"] = _load_language_decoder(language_decoder, dtype)
            settings["text_config"] = parts["language_model"].config
        for part in parts.values():
            # or `post_init` of the whole would draw their weights anew
            for each in (*part.modules(), *part.parameters(), *part.buffers()):
                each._is_hf_initialized = True
        # the whole's `__init__` hands its own choice, none yet, down to the configurations of its parts
        attention = {name: part.config._attn_implementation for name, part in parts.items()}
        model = cls(UnitConfig(vision_config=encoder.config, **settings), parts=parts)
        for name, part in parts.items():
            part.set_attn_implementation(attention[name])
        for name, child in model.named_children():
            if name not in parts:  # those were loaded in it, and keep in float32 what their class keeps so
                child.to(dtype or encoder.dtype)
        return model.eval()

    def make_teacher(self) -> nn.Module:
        """A frozen copy of the encoder as it is now, in evaluation mode: the teacher, when called before training
        [paper]."""
        return copy.deepcopy(self.vision_model).requires_grad_(False).eval()

    def save_encoder(self, save_directory: str | Path, image_processor: Any = None) -> Path:
        """Write the encoder alone, as the plain class of transformers that it is; see [`save_encoder`] of
        `vision_sources_unit`."""
        return save_encoder(self.vision_model, save_directory, image_processor)

    def _make_vision_model(self, config: UnitConfig, parts: dict[str, nn.Module] | None = None) -> nn.Module:
        if parts and "vision_model" in parts:
            return parts["vision_model"]
        if architecture(config.vision_config).ours:
            return UnitVisionModel._from_config(config.vision_config)
        return AutoModel.from_config(config.vision_config)

    def encode(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None = None):
        """Run the encoder: prefix tokens `(B, S, D)`, patch tokens `(B, N, D)`, patch mask `(B, N)` or `None`, the
        grid. Padded batches give what each image gives alone, whatever the encoder: see [`run_encoder`].
        """
        config = self.config.vision_config
        tokens = run_encoder(self.vision_model, pixel_values, spatial_shapes, return_dict=True).last_hidden_state
        rows, cols = (size // config.patch_size for size in pixel_values.shape[-2:])
        prefix = prefix_tokens(config)
        return tokens[:, :prefix], tokens[:, prefix:], patch_mask(config, pixel_values, spatial_shapes), (rows, cols)

    def encode_packed(
        self, pixel_values: torch.Tensor, image_grid_hw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the encoder on a pack (see `packing_unit`): prefix tokens `(B, S, D)`, patch tokens `(sum N_i, D)`."""
        images = run_encoder_packed(self.vision_model, pixel_values, image_grid_hw).split()
        prefix = prefix_tokens(self.config.vision_config)
        return torch.stack([each[:prefix] for each in images]), torch.cat([each[prefix:] for each in images])


def _load_language_decoder(source: str | Path, dtype: torch.dtype | None) -> nn.Module:
    try:
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{source}: no causal language model with safetensors can be loaded from there: {line}"
        ) from error


class UnitModel(UnitEncoderFeatures, UnitComposedModel):
    """The encoder of a full UNIT repository, with the encoder's own outputs: what `AutoModel` loads there."""

    _keys_to_ignore_on_load_unexpected = [
        r"^(connector|language_model|vision_decoder|visual_projection|character_head)\."
    ]

    def __init__(self, config: UnitConfig, parts: dict[str, nn.Module] | None = None):
        super().__init__(config)
        self.vision_model = self._make_vision_model(config, parts)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def forward(
        self,
        pixel_values: torch.Tensor,
        spatial_shapes: torch.Tensor | None = None,
        image_grid_hw: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """As [`UnitVisionModel.forward`], whichever encoder it is: any size, padded batches and packs, hidden states
        and attention maps on request. See [`run_encoder`] and [`run_encoder_packed`]."""
        if image_grid_hw is not None:
            output = run_encoder_packed(self.vision_model, pixel_values, image_grid_hw, **kwargs)
        else:
            output = run_encoder(self.vision_model, pixel_values, spatial_shapes, return_dict=True, **kwargs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def _encoder_of_unit(source: str, dtype: torch.dtype | None, **hub) -> nn.Module:
    return UnitModel.from_pretrained(source, dtype=dtype or "auto", use_safetensors=True, **hub).vision_model


FULL_MODELS["unit"] = _encoder_of_unit


class UnitForConditionalGeneration(UnitComposedModel, GenerationMixin):
    """Encoder, connector and language decoder: reads and captions with `generate`.

    `input_ids` hold as many image placeholders (`config.image_token_id`) as the image has visual tokens, then the
    prompt
    of the task: [`UnitProcessor`] makes them.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(vision_decoder|visual_projection|character_head)\."]
    main_input_name = "input_ids"
    input_modalities = ("image", "text")

    def __init__(self, config: UnitConfig, parts: dict[str, nn.Module] | None = None):
        """`parts`: `vision_model` and `language_model` made already, as [`from_vision_pretrained`] gives them."""
        super().__init__(config)
        self.vision_model = self._make_vision_model(config, parts)
        self.connector = CONNECTORS[config.connector_config.connector_type](config)
        if parts and "language_model" in parts:
            self.language_model = parts["language_model"]
        else:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self._add_training_parts(config)
        self.post_init()

    def _add_training_parts(self, config: UnitConfig) -> None:
        """Parts that only pre-training has; made before `post_init` so that they are initialised and loaded alike."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        spatial_shapes: torch.Tensor | None = None,
        image_grid_hw: torch.Tensor | None = None,
    ) -> UnitImageFeatures:
        """Encode images and map them to visual tokens of the language decoder's width."""
        if image_grid_hw is not None:
            prefix, patches = self.encode_packed(pixel_values, image_grid_hw)
            grids = [(rows, cols) for rows, cols in image_grid_hw.tolist()]
            visual, visual_mask = self.connector.forward_packed(prefix, patches, grids)
            return UnitImageFeatures(
                prefix=prefix,
                patches=patches[None],
                patch_mask=patches.new_ones(1, len(patches), dtype=torch.bool),
                visual_tokens=visual,
                visual_mask=visual_mask,
                image_grid_hw=image_grid_hw,
            )
        prefix, patches, patch_mask, (rows, cols) = self.encode(pixel_values, spatial_shapes)
        visual, visual_mask = self.connector(prefix, patches, rows, cols, patch_mask)
        if patch_mask is None:
            patch_mask = patches.new_ones(patches.shape[:2], dtype=torch.bool)
        return UnitImageFeatures(
            prefix=prefix,
            patches=patches,
            patch_mask=patch_mask,
            grid=(rows, cols),
            visual_tokens=visual,
            visual_mask=visual_mask,
        )

    def _embed(self, input_ids: torch.Tensor, features: UnitImageFeatures | None) -> torch.Tensor:
        """Token embeddings `(B, T, E)` with the placeholders replaced by visual tokens, image by image in order."""
        placeholder = input_ids == self.config.image_token_id
        # the placeholder's id may lie outside of the vocabulary: look up token 0 there, it is overwritten
        embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholder, 0))
        if features is None:
            if bool(placeholder.any()):
                raise ValueError("input_ids hold image placeholders but no pixel_values were given.")
            return embeds
        wanted, given = int(placeholder.sum()), int(features.visual_mask.sum())
        if wanted != given:
            raise ValueError(
                f"input_ids hold {wanted} image placeholders but the images have {given} visual tokens. Make both "
                "with UnitProcessor, from the same configuration."
            )
        visual = features.visual_tokens[features.visual_mask].to(embeds.dtype)
        return embeds.masked_scatter(placeholder.unsqueeze(-1), visual)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        **kwargs,
    ) -> UnitCausalLMOutput | tuple:
        """
        Args:
            input_ids: `(B, T)`, placeholders, prompt, text.
            pixel_values: `(B, 3, H, W)`; spatial_shapes: `(B, 2)` rows and columns of each image when padded.
                With image_grid_hw `(B, 2)`, a pack: `(sum N_i, 3 * P * P)`, see `packing_unit`.
            attention_mask: `(B, T)`, 0 where `input_ids` are padding.
            labels: `(B, T)`, -100 where nothing is to be learned (placeholders, prompt, padding). Position t predicts
                label t + 1; the shift is done here.
            logits_to_keep: only the last so many positions get logits; 0 is all.

        Raises:
            ValueError: placeholders and visual tokens differ in number; all labels are masked.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        features = None
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, spatial_shapes, image_grid_hw)
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        result = self._make_output(outputs, features, labels)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _make_output(self, outputs, features, labels) -> UnitCausalLMOutput:
        return UnitCausalLMOutput(
            loss=None if labels is None else language_loss(outputs.logits, labels),
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_features=features,
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, pixel_values=None, **kwargs):
        """Images go in with the first step only; later steps find them in the cache."""
        spatial_shapes, image_grid_hw = (kwargs.pop(name, None) for name in ("spatial_shapes", "image_grid_hw"))
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["pixel_values"] = pixel_values
            inputs["spatial_shapes"] = spatial_shapes
            inputs["image_grid_hw"] = image_grid_hw
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Several texts for each image (beams): a pack is repeated image by image, not patch by patch."""
        packed, grids = None, kwargs.get("image_grid_hw")
        if expand_size > 1 and grids is not None:
            own = kwargs.pop("pixel_values").split(grids.prod(dim=1).tolist())
            packed = torch.cat([each for each in own for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if packed is None else kwargs | {"pixel_values": packed}


class UnitForPreTraining(UnitForConditionalGeneration):
    """Everything that pre-training moves: [`UnitForConditionalGeneration`] with the vision decoder and the losses.

    The teacher is not a part of the model: its features are an input. With `projection_dim`, the teacher's frozen
    projection to a text tower's space sits behind the vision decoder. With `num_character_classes`, an auxiliary head
    names the characters in each patch in early training [ours; off in the paper's recipes].
    """

    _keys_to_ignore_on_load_unexpected = None

    def _add_training_parts(self, config: UnitConfig) -> None:
        self.vision_decoder = UnitVisionDecoder._from_config(config.vision_decoder_config)
        if config.projection_dim:
            teacher_width = config.vision_decoder_config.output_size
            self.visual_projection = nn.Linear(teacher_width, config.projection_dim, bias=False)
        if config.num_character_classes:
            slots = config.character_slots * config.num_character_classes
            self.character_head = nn.Linear(config.vision_config.hidden_size, slots)

    def reconstruct(
        self, features: UnitImageFeatures, grid: tuple[int, int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """The teacher's features as the vision decoder sees them, `(B, S + M, teacher's width)`; for a pack
        `(1, sum (S + M_i), teacher's width)`, image after image.

        `grid`: the teacher's rows and columns, for a pack `(B, 2)`; a finer grid of the student is area-pooled to it
        [ours: a teacher trained at x1 is unreliable at x4, so its target for a x4 image is what it sees at x1].
        """
        patches = features.patches
        if features.image_grid_hw is not None:
            own = features.image_grid_hw.tolist()
            wanted = own if grid is None else torch.as_tensor(grid).tolist()
            tokens = []
            for place, image in enumerate(patches[0].split([rows * cols for rows, cols in own])):
                if own[place] != wanted[place]:
                    image = image.transpose(0, 1).unflatten(1, own[place]).float()  # (D, rows, cols)
                    image = F.adaptive_avg_pool2d(image, wanted[place]).flatten(1).transpose(0, 1).to(patches.dtype)
                tokens += [features.prefix[place], image]
            return self.vision_decoder(torch.cat(tokens)[None])
        if grid is not None and tuple(grid) != tuple(features.grid):
            rows, cols = features.grid
            pooled = F.adaptive_avg_pool2d(
                patches.transpose(1, 2).unflatten(2, (rows, cols)).float(), tuple(grid)
            )  # (B, D, rows', cols')
            patches = pooled.flatten(2).transpose(1, 2).to(patches.dtype)
        return self.vision_decoder(torch.cat([features.prefix, patches], dim=1))

    def get_projected_image_features(
        self,
        pixel_values: torch.Tensor,
        spatial_shapes: torch.Tensor | None = None,
        image_grid_hw: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Image embeddings in the text tower's space, `(B, projection_dim)`, of unit length.

        Raises:
            ValueError: when the model was trained without a text tower (`projection_dim` is 0).
        """
        if not self.config.projection_dim:
            raise ValueError("This model has no projection to a text tower (config.projection_dim is 0).")
        if image_grid_hw is not None:
            prefix, _ = self.encode_packed(pixel_values, image_grid_hw)
        else:
            prefix, _, _, _ = self.encode(pixel_values, spatial_shapes)
        if not prefix.shape[1]:
            raise ValueError(f"{type(self.vision_model).__name__} has no class token to project.")
        return F.normalize(self.visual_projection(self.vision_decoder(prefix[:, 0])).float(), dim=-1)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        teacher_features: torch.FloatTensor | None = None,
        teacher_grid: tuple[int, int] | torch.LongTensor | None = None,
        teacher_token_mask: torch.BoolTensor | None = None,
        vision_weight: float = 1.0,
        vision_l1_weight: float = 1.0,
        return_dict: bool | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        **kwargs,
    ) -> UnitForPreTrainingOutput | tuple:
        """
        As [`UnitForConditionalGeneration.forward`]; without `input_ids` the language decoder is not run. And:

        Args:
            teacher_features: `(B, S + M, D')`, the frozen teacher's output for the same images. Without it, no
                `L_vis`.
            teacher_grid: `(rows, cols)` with rows * cols = M, when the teacher saw the images at another scale.
            teacher_token_mask: `(B, S + M)`, True for the random subset C of tokens [paper]; all by default.
                For a pack the three are `(1, sum (S + M_i), D')`, `(B, 2)` and `(1, sum (S + M_i))`.
            vision_weight: lambda. vision_l1_weight: mu. The paper states neither.
        """
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            # no text: only the encoder's side is wanted
            features = self.get_image_features(pixel_values, spatial_shapes, image_grid_hw)
            values = {"image_features": features}
        else:
            output = super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                spatial_shapes=spatial_shapes,
                attention_mask=attention_mask,
                labels=labels,
                return_dict=True,
                image_grid_hw=image_grid_hw,
                **kwargs,
            )
            values = dict(output) | {"language_loss": output.loss}
        if teacher_features is not None:
            predicted = self.reconstruct(values["image_features"], teacher_grid)
            loss, cosine, l1 = vision_reconstruction_loss(
                predicted, teacher_features, teacher_token_mask, vision_l1_weight
            )
            values |= {"vision_loss": loss, "vision_cosine": cosine, "vision_l1": l1}
            language = values.get("loss")
            values["loss"] = vision_weight * loss if language is None else language + vision_weight * loss
        # made in one go: in older versions of transformers a field set later is no key of the output, and accelerate,
        # which
        # rebuilds outputs from their keys under mixed precision, would lose it
        result = UnitForPreTrainingOutput(**values)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()
