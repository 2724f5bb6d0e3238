"""The encoder at one size, for stacks that know only transformers' own classes: `unit llava TOWER OUT --tower-only`.

LLaVA shows its tower squares of one size, so the table of positions is cut (or stretched, as the encoder's rule says)
to that grid once. What the encoder is written as:

| architecture | class | against the encoder at that size |
|---|---|---|
| `unit` | `UnitVisionModel`, code beside it | the same |
| `vit` | `ViTModel` | the same function, weights renamed: all hidden states, `last_hidden_state`, `pooler_output` |
| `clip` | `CLIPVisionModel` | the same up to what every LayerNorm takes away, see [`to_clip`] |

Shapes: D width, A heads, S the side in pixels, P patch side, R = S / P.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from modeling_unit import UnitModel, UnitVisionConfig, UnitVisionModel
from modeling_unit.configuration_unit import CLIP_MEAN, CLIP_STD
from modeling_unit.llava_unit import clip_image_processor, is_unit, processor_settings, tower_size
from modeling_unit.vision_sources_unit import _put_prefix

ARCHITECTURES = ("unit", "vit", "clip")
# How much larger than a token's own square norm the ballast's is, see `to_clip` [ours]: a token's scale is then off by
# a part in 2e5 at most, while float32, which loses its bits beside the ballast, keeps a token to about as much
BALLAST = 1e5


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes the name at the end, and vanishes after an error.

    Raises:
        ValueError: `folder` exists and is no empty folder.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; choose another name or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@torch.no_grad()
def at_one_size(encoder: UnitVisionModel, size: int) -> UnitVisionModel:
    """A copy whose table of positions is the grid of `size` pixels a side, nothing random in training: equal outputs
    at that size, and a configuration whose `image_size` is the truth.

    Raises:
        ValueError: `size` is no positive multiple of the patch size.
    """
    size = tower_size(encoder.config, {}, size)
    side = size // encoder.config.patch_size
    settings = encoder.config.to_dict()
    settings |= {"image_size": size, "cpe_max_size": size, "cpe_crop": False, "cpe_drop_prob": 0.0}
    copied = UnitVisionModel(UnitVisionConfig(**settings)).to(encoder.dtype)
    weights = encoder.state_dict()
    weights["embeddings.position_embedding"] = encoder.embeddings.positions(side, side).unsqueeze(0)
    copied.load_state_dict(weights)
    return copied.eval()


def one_prefix_token(config: UnitVisionConfig, architecture: str) -> None:
    """
    Raises:
        ValueError: the encoder holds more prefix tokens than the class that it is to become.
    """
    if config.num_prefix_tokens != 1:
        raise ValueError(
            f"The encoder has {config.num_prefix_tokens} class and register tokens, {architecture} has one, and "
            "LLaVA's selection drops one: only our own class keeps the others inside. Write it as `unit`."
        )


def folded_embedding(encoder: UnitVisionModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch embedding `(D, 3, P, P)` and bias `(D,)` as float64, with the normalisation inside the encoder, if it has
    one, folded in."""
    config = encoder.config
    weight = encoder.embeddings.projection.weight.double()
    weight = weight.reshape(config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    if not config.normalize_pixels:
        return weight, weight.new_zeros(config.hidden_size)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (config.image_mean, config.image_std))
    weight = weight / std.view(1, -1, 1, 1)
    return weight, -(weight * mean.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))


def _put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.zero_()
    parameter[tuple(slice(0, length) for length in value.shape)] = value.to(parameter.dtype)


def _qkv(attention, width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weight `(D, D)` and bias `(D,)` of query, key, value, as float64."""
    weight = attention.qkv.weight.double()
    bias = weight.new_zeros(3 * width) if attention.qkv.bias is None else attention.qkv.bias.double()
    yield from zip(weight.split(width), bias.split(width), strict=True)


@torch.no_grad()
def to_vit(encoder: UnitVisionModel) -> ViTModel:
    """The encoder at its own size as a `ViTModel`: the same pre-norm blocks under other names.

    The pooler is the identity, so `pooler_output` is the class token behind the final norm, as ours is (under
    transformers 4, whose ViT has a fixed activation there, its tanh; LLaVA reads none of it).

    Raises:
        ValueError: more than one prefix token; no final norm; pooling other than the class token.
    """
    config = encoder.config
    one_prefix_token(config, "ViTModel")
    if not config.use_final_norm or config.pooling != "cls" or config.tie_last_hidden_states:
        raise ValueError(
            "ViTModel has a final LayerNorm that its hidden states do not see, and pools by the class token: an "
            "encoder with use_final_norm=False, pooling='mean' or tie_last_hidden_states=True is none."
        )
    model = ViTModel(
        ViTConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            attention_probs_dropout_prob=config.attention_dropout,
            layer_norm_eps=config.layer_norm_eps,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            qkv_bias=config.qkv_bias,
            pooler_act="linear",
        )
    ).to(encoder.dtype)
    weight, bias = folded_embedding(encoder)
    embeddings = model.embeddings
    _put(embeddings.patch_embeddings.projection.weight, weight)
    _put(embeddings.patch_embeddings.projection.bias, bias)
    _put(embeddings.cls_token, encoder.embeddings.prefix_tokens[None])
    embeddings.position_embeddings.zero_()
    embeddings.position_embeddings[:, 1:] = encoder.embeddings.position_embedding
    for block, layer in zip(encoder.blocks, model.layers, strict=True):
        layer.layernorm_before.load_state_dict(block.norm1.state_dict())
        layer.layernorm_after.load_state_dict(block.norm2.state_dict())
        attention = layer.attention
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        for linear, (weight, bias) in zip(parts, _qkv(block.attn, config.hidden_size), strict=True):
            _put(linear.weight, weight)
            if linear.bias is not None:
                _put(linear.bias, bias)
        attention.o_proj.load_state_dict(block.attn.proj.state_dict())
        layer.mlp.fc1.load_state_dict(block.mlp.fc1.state_dict())
        layer.mlp.fc2.load_state_dict(block.mlp.fc2.state_dict())
    model.layernorm.load_state_dict(encoder.norm.state_dict())
    torch.nn.init.eye_(model.pooler.dense.weight)
    model.pooler.dense.bias.zero_()
    return model.eval()


@torch.no_grad()
def to_clip(encoder: UnitVisionModel) -> CLIPVisionModel:
    """The encoder at its own size as a `CLIPVisionModel`.

    CLIP normalises its tokens before the first block and ours does not, so at equal width no weights can make the two
    equal: what leaves that LayerNorm is bounded whatever the picture, our embedding is linear in it. With eight
    channels more for each head it can be done:

    * the new channels hold a large number, half of them its negative, at the LayerNorm's input and nothing behind it:
      ballast. The LayerNorm's mean is then zero and its standard deviation the same for every token, to a part in
      hundred thousands, and its weight multiplies that back;
    * the stream is kept centred: every block's LayerNorm removes a token's mean over the channels, so we remove it
      from all that is added to the stream, and empty channels then change a variance only by the known factor
      D / width, which weights and eps take up;
    * a head's new channels are empty, the change of CLIP's 1 / sqrt(width / A) is in the query's weights.

    So `hidden_states[i][..., :D]` equals ours less each token's mean over its channels, the other channels are 0, and
    `pooler_output[..., :D]` equals ours behind the final norm (class token): to about one part in 1e5 in float32, and
    within what bfloat16 and float16 resolve.

    Raises:
        ValueError: more than one prefix token; hidden states that see the final norm.
    """
    config = encoder.config
    one_prefix_token(config, "CLIPVisionModel")
    if config.tie_last_hidden_states:
        raise ValueError("CLIPVisionModel's hidden states do not see its last LayerNorm: tie_last_hidden_states=True.")
    width, heads = config.hidden_size, config.num_attention_heads
    wide = width + 8 * heads
    share = width / wide  # what empty channels leave of a variance
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=wide,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            intermediate_size=config.intermediate_size,
            projection_dim=wide,
            hidden_act=config.hidden_act,
            attention_dropout=config.attention_dropout,
            layer_norm_eps=config.layer_norm_eps * share,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
        )
    ).to(encoder.dtype)

    def centred(value: torch.Tensor) -> torch.Tensor:
        """Without the mean over the channels, which are the first dimension."""
        return value - value.mean(dim=0, keepdim=True)

    def spread(value: torch.Tensor, dim: int) -> torch.Tensor:
        """Channels of the heads to their places in wider heads."""
        value = value.unflatten(dim, (heads, width // heads)).movedim(dim + 1, -1)
        return torch.nn.functional.pad(value, (0, 8)).movedim(-1, dim + 1).flatten(dim, dim + 1)

    def norm(source, target) -> None:
        _put(target.weight, source.weight.double() * share**0.5)
        _put(target.bias, source.bias.double())

    weight, bias = folded_embedding(encoder)
    embeddings = model.embeddings
    _put(embeddings.patch_embedding.weight, centred(weight))
    _put(embeddings.class_embedding, centred(encoder.embeddings.prefix_tokens[0].double()))
    positions = encoder.embeddings.position_embedding[0].double() + bias  # (R * R, D)
    positions = torch.cat([positions.new_zeros(1, width), centred(positions.T).T])
    _put(embeddings.position_embedding.weight, positions)
    # A patch of noise, or of one colour at two deviations, with the position that is largest
    size = positions.square().sum(dim=1).max() + 4 * centred(weight).sum(dim=(2, 3)).square().sum()
    size = torch.maximum(size, embeddings.class_embedding.double().square().sum()) + centred(weight).square().sum()
    # a power of two, which every dtype holds exactly, and which float16 can hold at all
    ballast = 2.0 ** min(15, round(math.log2(math.sqrt(BALLAST * float(size) / (8 * heads)) + 1e-30)))
    signs = torch.tensor([1.0, -1.0]).repeat(4 * heads)
    embeddings.position_embedding.weight[:, width:] = ballast * signs.to(encoder.dtype)
    still = ballast * (1 - share) ** 0.5  # standard deviation of a token with its ballast
    _put(model.pre_layrnorm.weight, torch.full((width,), still, dtype=torch.float64))
    model.pre_layrnorm.bias.zero_()
    for block, layer in zip(encoder.blocks, model.encoder.layers, strict=True):
        norm(block.norm1, layer.layer_norm1)
        norm(block.norm2, layer.layer_norm2)
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        for linear, (weight, bias) in zip(parts, _qkv(block.attn, width), strict=True):
            factor = share**-0.5 if linear is attention.q_proj else 1.0
            _put(linear.weight, spread(weight, 0) * factor)
            _put(linear.bias, spread(bias, 0) * factor)
        _put(attention.out_proj.weight, spread(centred(block.attn.proj.weight.double()), 1))
        _put(attention.out_proj.bias, centred(block.attn.proj.bias.double()))
        _put(layer.mlp.fc1.weight, block.mlp.fc1.weight)
        _put(layer.mlp.fc1.bias, block.mlp.fc1.bias)
        _put(layer.mlp.fc2.weight, centred(block.mlp.fc2.weight.double()))
        _put(layer.mlp.fc2.bias, centred(block.mlp.fc2.bias.double()))
    if config.use_final_norm:
        norm(encoder.norm, model.post_layernorm)
    return model.eval()


def export_tower(
    source: str | Path | UnitVisionModel,
    folder: str | Path,
    architecture: str = "unit",
    size: int | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Write the encoder at one size as a tower folder with transformers' own `CLIPImageProcessor`; returns the model.

    Args:
        source: an encoder, or the folder or Hub id of one or of a full UNIT repository; for `"clip"` also that of a
            `CLIPVisionModel` (or of a full CLIP), which is written as it is, under the names that LLaVA's
            transformers reads.
        folder: made; nothing stays of it after an error. architecture: `"unit"`, `"vit"` or `"clip"`.
        size: S in pixels; see [`tower_size`] for the default. dtype: of the weights on disk, the source's by default.

    Raises:
        ValueError: an unknown architecture, a source that is no encoder of UNIT's, a size that the patches do not
            divide, an encoder that the architecture cannot hold, a folder that exists.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"A tower is written as {', '.join(ARCHITECTURES)}; got {architecture!r}.")
    if isinstance(source, UnitVisionModel):
        encoder, settings = source, {}
    elif is_unit(str(source)):
        settings = processor_settings(str(source))
        encoder = _encoder_of(str(source))
    else:
        settings = {}
        encoder = _clip_of(str(source)) if architecture == "clip" else None
    if isinstance(encoder, CLIPVisionModel):
        if architecture != "clip":
            raise ValueError(f"{source} holds a CLIPVisionModel, which is written as `clip`, not as `{architecture}`.")
        if size not in (None, encoder.config.image_size):
            raise ValueError(f"A CLIPVisionModel has one size, {encoder.config.image_size}; {size} was asked for.")
        model = encoder
        processor = _clip_processor(source, encoder.config.image_size)
    elif isinstance(encoder, UnitVisionModel):
        size = tower_size(encoder.config, settings, size)
        encoder = at_one_size(encoder if dtype is None else encoder.to(dtype), size)
        model = {"unit": lambda model: model, "vit": to_vit, "clip": to_clip}[architecture](encoder)
        processor = unit_tower_processor(encoder.config, settings, size)
    else:
        raise ValueError(
            f"{source} is no encoder of UNIT's. An encoder of transformers' own is a tower as it is; only a "
            "CLIPVisionModel may need its weights' older names (`clip`)."
        )
    with written_whole(folder) as staging:
        (model if dtype is None else model.to(dtype)).save_pretrained(staging)
        if isinstance(model, CLIPVisionModel):
            _put_prefix(staging, "vision_model.")  # where LLaVA's transformers looks for the weights
        processor.save_pretrained(staging)
    return model


def unit_tower_processor(config: UnitVisionConfig, settings: dict, size: int) -> CLIPImageProcessor:
    """What shows a UNIT encoder squares of `size` pixels, normalised as its own image processor (`settings`) does."""
    return clip_image_processor(
        size,
        settings.get("image_mean", config.image_mean),
        settings.get("image_std", config.image_std),
        settings.get("do_normalize", not config.normalize_pixels),
    )


def _encoder_of(source: str) -> PreTrainedModel | None:
    """The encoder of a UNIT repository; `None` if it is neither UNIT's own nor CLIP's."""
    config = AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)
    if isinstance(config, UnitVisionConfig):
        return UnitVisionModel.from_pretrained(source, use_safetensors=True)
    if isinstance(config, CLIPVisionConfig):
        return UnitModel.from_pretrained(source, use_safetensors=True).vision_model
    return None


def _clip_of(source: str) -> CLIPVisionModel | None:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no model there ({str(error).splitlines()[0]})") from None
    if isinstance(getattr(config, "vision_config", config), CLIPVisionConfig):
        return CLIPVisionModel.from_pretrained(source, use_safetensors=True)
    return None


def _clip_processor(source: str | Path, size: int) -> CLIPImageProcessor:
    settings = processor_settings(str(source))
    if "crop_size" in settings:
        return CLIPImageProcessor.from_pretrained(source)
    return clip_image_processor(
        size,
        settings.get("image_mean", CLIP_MEAN),
        settings.get("image_std", CLIP_STD),
        settings.get("do_normalize", True),
    )
