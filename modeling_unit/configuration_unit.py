"""Configurations of UNIT: encoder, connector, vision decoder, and the whole.

Sources of the numbers: [paper] is UNIT (Zhu et al., NeurIPS 2024, arXiv 2409.04095), [code] the inference code its
authors released, [ours] a choice of this project where both are silent.
"""

import math
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN

from .compat_unit import PreTrainedConfig

# OpenAI CLIP's channel statistics, for pixels in [0, 1]; the released encoders use them [code]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Tokens in front of the patch tokens in `last_hidden_state`, for the vision transformers of transformers that can be
# the encoder. A callable where the number depends on the configuration.
PREFIX_TOKENS = {
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,
    "siglip2_vision_model": lambda config: 0,
    "vit": lambda config: 1,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "dinov3_vit": lambda config: 1 + config.num_register_tokens,
    "radio": lambda config: config.num_cls_tokens + config.num_registers,
    "unit_vision_model": lambda config: 1,  # further class tokens and registers stay inside the encoder
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive_int(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
        _require(ok, f"{type(config).__name__}.{name} must be a positive whole number, got {value!r}.")


def _whole_number(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        _require(ok, f"{type(config).__name__}.{name} must be a whole number, 0 or more, got {value!r}.")


def _numbers(values: Any) -> bool:
    """Whether this is a sequence of numbers."""
    return isinstance(values, (list, tuple)) and all(_number(value) for value in values)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _known_activation(config: PreTrainedConfig) -> None:
    known = config.hidden_act in ACT2FN
    _require(known, f"{type(config).__name__}.hidden_act {config.hidden_act!r} is no activation of transformers.")


def nearest_supported_size(config: PreTrainedConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of the patch size, that are nearest to those of an image.

    Each side is rounded to whole patches, at least one, halves up. An image that is longer than the side that our
    encoder's table of positions covers (`position_side` patches) is first shrunk to it, its aspect kept: beyond, the
    encoder still works, but on positions stretched over the grid. Vision transformers of transformers, whose positions
    are always stretched, have no such limit here.

    Args:
        config: of an encoder in `PREFIX_TOKENS`, or a [`UnitConfig`].
        height, width: in pixels, positive.

    Raises:
        ValueError: a side that is not positive, or a configuration without a patch size.
    """
    config = getattr(config, "vision_config", config)
    patch = getattr(config, "patch_size", None)
    _require(isinstance(patch, int), f"The configuration {config.model_type!r} has no patch_size that is a number.")
    for name, value in (("height", height), ("width", width)):
        _require(_number(value) and 0 < value < float("inf"), f"{name} must be a positive number, got {value!r}.")
    rows, cols = height / patch, width / patch
    most = getattr(config, "position_side", None)
    if most is not None and max(rows, cols) > most:
        shrink = most / max(rows, cols)
        rows, cols = rows * shrink, cols * shrink
    return tuple(max(1, math.floor(side + 0.5)) * patch for side in (rows, cols))


class UnitVisionConfig(PreTrainedConfig):
    """Configuration of [`UnitVisionModel`]. The defaults are the paper's encoder, OpenCLIP ViT-H/14 in shape.

    Args:
        hidden_size (`int`): width D of the tokens. 1280 [paper].
        num_hidden_layers (`int`): 32 [paper].
        num_attention_heads (`int`): must divide `hidden_size`. 16 [code].
        intermediate_size (`int`): width of the MLP. 4 x 1280 [code].
        patch_size (`int`): side of a patch in pixels. 14 [paper].
        image_size (`int`): nominal input side in pixels. It decides only how positions are looked up (see
            `cpe_max_size`); any height and width that are multiples of `patch_size` are accepted.
        cpe_max_size (`int`): side in pixels that the table of positions covers; the table has
            `R = round(cpe_max_size / patch_size)` rows and columns [code]. When the nominal `image_size` equals the
            covered side, positions are absolute (the table is cropped, not resized, unless the grid outgrows it).
        cpe_crop (`bool`): in training, a random crop of the table is stretched over the grid of each image, its area
            share drawn from `cpe_min_scale` (a share of the side) to 1, its aspect from `cpe_aspect` [code].
        cpe_min_scale (`float`): smallest side share of the crop, sqrt(0.1) [code].
        cpe_aspect (`tuple[float, float]`): range of the crop's aspect, width over height, 3/4 to 4/3 [code].
        cpe_drop_prob (`float`): probability that an image gets no positions in training, 0.1 [code].
        num_cls_tokens (`int`): class tokens in front. The first one is the pooled output.
        register_multiple (`int` or `None`): registers are added until prefix tokens are a multiple of it, at least
            one: `m - num_cls_tokens % m` [code].
        use_final_norm (`bool`): LayerNorm on the output tokens. The authors found it crucial before a language model;
            a released checkpoint may lack it (its `fc_norm` is not applied in the forward pass) [code].
        keep_fc_norm (`bool`): hold that `fc_norm` of a released checkpoint, as buffers that nothing reads, so that the
            way back to the released format loses nothing.
        tie_last_hidden_states (`bool`): the last of the hidden states is `last_hidden_state`, final norm applied;
            LLaVA, which reads hidden states, then gets normed tokens from layer -1. transformers' own name for it.
        pooling (`str`): `"cls"` (first class token) or `"mean"` (mean of the patch tokens) for `pooler_output`.
        normalize_pixels (`bool`): subtract `image_mean` and divide by `image_std` inside the model, for pixels in [0,
            1]. False when the image processor has done it [code: the released checkpoints carry the statistics
                inside].
        patch_embed_float32 (`bool`): compute the patch embedding in float32 whatever the dtype of the model [code].
        attention_dropout (`float`): dropout on attention weights in training.
        released (`dict` or `None`): of an encoder that came from a released checkpoint: `config`, the text of that
            checkpoint's `config.json`, and `statistics_dtype`, the dtype of its mean and standard deviation. Read by
            nothing but the way back to the released format.
    """

    model_type = "unit_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1280
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    intermediate_size: int = 5120
    patch_size: int = 14
    num_channels: int = 3
    image_size: int = 224
    cpe_max_size: int = 2048
    cpe_crop: bool = True
    cpe_min_scale: float = 0.31622776601683794
    cpe_aspect: list[float] | tuple[float, float] = (0.75, 4 / 3)
    cpe_drop_prob: float = 0.1
    num_cls_tokens: int = 1
    register_multiple: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_final_norm: bool = True
    keep_fc_norm: bool = False
    tie_last_hidden_states: bool = False
    pooling: str = "cls"
    normalize_pixels: bool = False
    image_mean: list[float] | tuple[float, ...] = CLIP_MEAN
    image_std: list[float] | tuple[float, ...] = CLIP_STD
    patch_embed_float32: bool = True
    released: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _positive_int(self, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        _positive_int(self, "patch_size", "num_channels", "image_size", "cpe_max_size", "num_cls_tokens")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
            f"({self.num_attention_heads}).",
        )
        if self.register_multiple is not None:
            _positive_int(self, "register_multiple")
        _require(self.pooling in ("cls", "mean"), f'pooling must be "cls" or "mean", got {self.pooling!r}.')
        _known_activation(self)
        for name in ("cpe_drop_prob", "attention_dropout"):
            value = getattr(self, name)
            _require(_number(value) and 0.0 <= value <= 1.0, f"{name} must lie between 0 and 1, got {value!r}.")
        _require(
            _number(self.cpe_min_scale) and 0.0 < self.cpe_min_scale <= 1.0,
            f"cpe_min_scale must lie in (0, 1], got {self.cpe_min_scale!r}.",
        )
        _require(
            _number(self.layer_norm_eps) and self.layer_norm_eps > 0,
            f"layer_norm_eps must be positive, got {self.layer_norm_eps!r}.",
        )
        aspect = self.cpe_aspect
        _require(
            _numbers(aspect) and len(aspect) == 2 and 0 < aspect[0] <= aspect[1],
            f"cpe_aspect must be (smallest, largest), both positive, got {aspect}.",
        )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            _require(
                _numbers(values) and len(values) == self.num_channels,
                f"{name} needs one value for each of the {self.num_channels} channels, got {values}.",
            )
            _require(name == "image_mean" or min(values) > 0, f"image_std must be positive, got {values}.")
            setattr(self, name, list(values))
        self.cpe_aspect = list(self.cpe_aspect)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, which goes on after a warning with what another architecture's configuration says.

        Raises:
            ValueError: for such a configuration: an encoder made from it would have random weights.
        """
        said = config_dict.get("model_type", cls.model_type)
        if said != cls.model_type:
            raise ValueError(
                f"The encoder is a {said!r}, and UnitVisionModel holds a {cls.model_type!r}. Load it with AutoModel; "
                "out of a whole UNIT model, save_encoder writes it as its own class."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_registers(self) -> int:
        """Register tokens behind the class tokens."""
        if not self.register_multiple:
            return 0
        return self.register_multiple - self.num_cls_tokens % self.register_multiple

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens in front of the patch tokens inside the encoder; only the first is in the
        output."""
        return self.num_cls_tokens + self.num_registers

    @property
    def position_side(self) -> int:
        """Rows (and columns) R of the table of positions."""
        return max(1, round(self.cpe_max_size / self.patch_size))

    def nearest_supported_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of whole patches nearest to an image's; see [`nearest_supported_size`]."""
        return nearest_supported_size(self, height, width)


class UnitConnectorConfig(PreTrainedConfig):
    """Configuration of the connector between the encoder and the language decoder.

    Args:
        connector_type (`str`): `"qformer"` [paper] or `"mlp"` (pixel-unshuffle, then a two-layer MLP) [ours].
        num_queries (`int`): learned queries K of the Q-Former. The paper does not state K; 256, because the 32 of
            BLIP-2 cannot carry the 500 words of a dense page [ours].
        num_hidden_layers (`int`), num_attention_heads (`int`), cross_attention_frequency (`int`): shape of the
            Q-Former, as BLIP-2's Q-Former but 6 layers [ours].
        hidden_size (`int` or `None`): width of the Q-Former; `None` takes the language decoder's.
        unshuffle (`int`): side of the square of patch tokens that the MLP folds into one visual token, 2 by default: a
            quarter of the tokens [ours]. 1 keeps every patch token.
    """

    model_type = "unit_connector"
    base_config_key = "connector_config"

    connector_type: str = "qformer"
    num_queries: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    cross_attention_frequency: int = 2
    hidden_size: int | None = None
    unshuffle: int = 2
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _require(
            self.connector_type in ("qformer", "mlp"),
            f'connector_type must be "qformer" or "mlp", got {self.connector_type!r}.',
        )
        _positive_int(self, "num_queries", "num_hidden_layers", "num_attention_heads", "cross_attention_frequency")
        _positive_int(self, "unshuffle", *([] if self.hidden_size is None else ["hidden_size"]))


class UnitVisionDecoderConfig(PreTrainedConfig):
    """Configuration of [`UnitVisionDecoder`]: a two-layer MLP with GELU, token by token, to the teacher's features
    [paper].

    Args:
        input_size (`int`): width of the encoder's tokens.
        hidden_size (`int` or `None`): width of the layer in between; `None` takes `input_size` [ours].
        output_size (`int` or `None`): width of the teacher's tokens; `None` takes `input_size`.
    """

    model_type = "unit_vision_decoder"
    base_config_key = "vision_decoder_config"

    input_size: int = 1280
    hidden_size: int | None = None
    output_size: int | None = None
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size is None:
            self.hidden_size = self.input_size
        if self.output_size is None:
            self.output_size = self.input_size
        _positive_int(self, "input_size", "hidden_size", "output_size")
        _known_activation(self)


# OPT-125M in shape, the paper's language decoder [paper]
_OPT_125M = {
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
}


class UnitConfig(PreTrainedConfig):
    """Configuration of the whole: encoder, connector, language decoder, vision decoder.

    Args:
        vision_config (`dict` or config): `unit_vision_model`, or any vision transformer listed in `PREFIX_TOKENS`
            (`clip_vision_model`, `siglip_vision_model`, `dinov2`, `dinov3_vit`, `vit`, ...), told by its `model_type`.
        connector_config (`dict` or [`UnitConnectorConfig`]).
        text_config (`dict` or config): any causal language model of transformers, told by its `model_type`; OPT-125M
            by default [paper].
        vision_decoder_config (`dict` or [`UnitVisionDecoderConfig`]): its widths follow the encoder unless given.
        image_token_id (`int`): id of the placeholder that visual tokens replace in `input_ids`. It may lie outside of
            the decoder's vocabulary: it is never embedded.
        projection_dim (`int`): width of the shared space with a text tower, 0 when the model has none. The teacher's
            projection is kept behind the vision decoder, so that zero-shot naming survives training [ours].
        num_character_classes (`int`), character_slots (`int`): size of the auxiliary head that names the characters in
            each patch in early training; 0 turns it off, as in the paper's recipes [ours].
    """

    model_type = "unit"

    vision_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_decoder_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 50272
    projection_dim: int = 0
    num_character_classes: int = 0
    character_slots: int = 3
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = self._sub_config("vision_config", self.vision_config, UnitVisionConfig, {})
        _require(
            self.vision_config.model_type in PREFIX_TOKENS,
            f"The encoder architecture {self.vision_config.model_type!r} is not supported. Supported: "
            f"{', '.join(sorted(PREFIX_TOKENS))}.",
        )
        _require(
            isinstance(self.vision_config.patch_size, int),
            f"vision_config.patch_size must be one whole number, got {self.vision_config.patch_size}.",
        )
        width, heads = self.vision_config.hidden_size, self.vision_config.num_attention_heads
        _require(
            heads > 0 and width % heads == 0,
            f"vision_config.hidden_size ({width}) must be a multiple of num_attention_heads ({heads}).",
        )
        self.connector_config = self._sub_config("connector_config", self.connector_config, UnitConnectorConfig, {})
        self.text_config = self._sub_config("text_config", self.text_config, None, _OPT_125M)
        if not isinstance(self.vision_decoder_config, PreTrainedConfig):
            given = dict(self.vision_decoder_config or {})
            given.setdefault("input_size", self.vision_config.hidden_size)
            given.setdefault("output_size", self.vision_config.hidden_size)
            self.vision_decoder_config = given
        self.vision_decoder_config = self._sub_config(
            "vision_decoder_config", self.vision_decoder_config, UnitVisionDecoderConfig, {}
        )
        super().__post_init__(**kwargs)
        _require(
            self.vision_decoder_config.input_size == self.vision_config.hidden_size,
            f"vision_decoder_config.input_size ({self.vision_decoder_config.input_size}) must be the encoder's "
            f"hidden_size ({self.vision_config.hidden_size}).",
        )
        _whole_number(self, "image_token_id", "projection_dim", "num_character_classes")
        _positive_int(self, "character_slots")

    @staticmethod
    def _sub_config(name: str, given: Any, default_class: Any, defaults: dict) -> PreTrainedConfig:
        if isinstance(given, PreTrainedConfig):
            return given
        if given is None:
            given = dict(defaults)
        if not isinstance(given, dict):
            raise ValueError(f"{name} must be a dict or a configuration, got {type(given).__name__}.")
        model_type = given.get("model_type", defaults.get("model_type"))
        if default_class is not None and model_type in (None, default_class.model_type):
            return default_class(**{key: value for key, value in given.items() if key != "model_type"})
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{name} has the model_type {model_type!r}, which this version of transformers lacks.")
        return CONFIG_MAPPING[model_type](**{key: value for key, value in given.items() if key != "model_type"})

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patch tokens in the encoder's `last_hidden_state`."""
        return PREFIX_TOKENS[self.vision_config.model_type](self.vision_config)


# `from_pretrained` and `to_dict` walk the parts through this table
UnitConfig.sub_configs = {
    "vision_config": PreTrainedConfig,
    "connector_config": UnitConnectorConfig,
    "text_config": PreTrainedConfig,
    "vision_decoder_config": UnitVisionDecoderConfig,
}
