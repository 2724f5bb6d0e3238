"""Any vision transformer as UNIT's encoder: how each architecture is run at any size, and what else differs.

One table, `ARCHITECTURES`, says for each what differs: how it wants to be called at a size that is not its nominal
one, how images of several sizes share a batch, which of its weights the tokens do not depend on, and what its image
processor is. Everything else in UNIT asks the functions here and names no architecture.

Shapes: B images, H x W pixels, P patch side, rows = H / P, cols = W / P, N = rows * cols patch tokens, S prefix
tokens (class tokens and registers), T = S + N, D width.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat_unit import PreTrainedConfig
from .configuration_unit import CLIP_MEAN, CLIP_STD, PREFIX_TOKENS
from .packing_unit import UnitPackedOutput, check_pack, unpatchify

# Channel statistics that the architectures' own image processors start from (transformers, `image_utils`)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# -- how each architecture is called ------------------------------------------------------------------------------


def _interpolating(encoder: nn.Module, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """Learned positions, resized by the class itself when it is told to; at the nominal size they stay untouched."""
    return encoder(pixel_values, interpolate_pos_encoding=True, return_dict=True, **kwargs)


def _any_size(encoder: nn.Module, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """The class takes any size as it is: it resizes its positions unasked, or has rotary ones."""
    return encoder(pixel_values, return_dict=True, **kwargs)


def _radio(encoder: nn.Module, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    output = encoder(pixel_values, return_dict=True, **kwargs)
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=output.summary,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


def _siglip2(encoder: nn.Module, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """Takes patches, each flattened as row, column, channel, with the grid they came from and a mask."""
    batch, patches = pixel_values.shape[0], _patches_channel_last(pixel_values, encoder.config.patch_size)
    rows, cols = (size // encoder.config.patch_size for size in pixel_values.shape[-2:])
    return encoder(
        pixel_values=patches,
        pixel_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.long),
        spatial_shapes=torch.tensor([[rows, cols]] * batch, device=patches.device),
        return_dict=True,
        **kwargs,
    )


def _patches_channel_last(pixel_values: torch.Tensor, patch: int) -> torch.Tensor:
    """`(B, C, H, W) -> (B, N, P * P * C)`."""
    grid = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, rows, P, cols, P)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


# -- how images of several sizes go through it --------------------------------------------------------------------
# Each takes a list of images `(C, H, W)` and returns a list of outputs, one an image, without the batch axis.


def _size_by_size(encoder: nn.Module, images: list[torch.Tensor], **kwargs) -> list[dict[str, Any]]:
    """One pass for each size: these classes cannot give every image of a batch its own positions."""
    run = architecture(encoder.config).run
    outputs: list[dict[str, Any]] = [{}] * len(images)
    for size in sorted({tuple(image.shape[-2:]) for image in images}):
        members = [index for index, image in enumerate(images) if tuple(image.shape[-2:]) == size]
        output = run(encoder, torch.stack([images[index] for index in members]), **kwargs)
        for place, index in enumerate(members):
            outputs[index] = _of_one_image(output, place, None)
    return outputs


def _siglip2_masked(encoder: nn.Module, images: list[torch.Tensor], **kwargs) -> list[dict[str, Any]]:
    """One pass: patches padded to the longest, masked, each image with positions for its own grid."""
    patch = encoder.config.patch_size
    patches = [_patches_channel_last(image[None], patch)[0] for image in images]
    lengths = [each.shape[0] for each in patches]
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]  # (B, longest)
    output = encoder(
        pixel_values=nn.utils.rnn.pad_sequence(patches, batch_first=True),
        pixel_attention_mask=mask.long().to(patches[0].device),
        spatial_shapes=torch.tensor([[image.shape[1] // patch, image.shape[2] // patch] for image in images]),
        return_dict=True,
        **kwargs,
    )
    return [_of_one_image(output, index, slice(0, length)) for index, length in enumerate(lengths)]


def _radio_packed(encoder: nn.Module, images: list[torch.Tensor], **kwargs) -> list[dict[str, Any]]:
    """One pass over the concatenated patches; RADIO's attention keeps the images apart."""
    patch = encoder.config.patch_size
    grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in images]
    patches = [
        image.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        for image in images  # (C, rows, P, cols, P) -> (N, C * P * P)
    ]
    output = encoder(
        torch.cat(patches),
        image_grid_hw=torch.tensor(grids, device=patches[0].device),
        return_dict=True,
        **kwargs,
    )
    batched = BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state[None],
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )
    outputs, start = [], 0
    for index, (rows, cols) in enumerate(grids):
        stop = start + prefix_tokens(encoder.config) + rows * cols
        outputs.append(_of_one_image(batched, 0, slice(start, stop)) | {"pooler_output": output.summary[index]})
        start = stop
    return outputs


def _of_one_image(output, index: int, tokens: slice | None) -> dict[str, Any]:
    """What belongs to one image of a batch; `tokens` where its tokens are not all of the sequence."""
    tokens = slice(None) if tokens is None else tokens
    kept = {"last_hidden_state": output.last_hidden_state[index, tokens]}
    if output.get("pooler_output") is not None:
        kept["pooler_output"] = output.pooler_output[index]
    if output.get("hidden_states") is not None:
        kept["hidden_states"] = [each[index, tokens] for each in output.hidden_states]
    if output.get("attentions") is not None:
        kept["attentions"] = [each[index][:, tokens, tokens] for each in output.attentions]
    return kept


# -- image processors of transformers, as `preprocessor_config.json` ----------------------------------------------
# Written out rather than made by the classes: those need torchvision, or warn without it. 3 is bicubic, 2 bilinear.


def _processor_json(name: str, resample: int, normalisation: dict[str, Any], **settings) -> dict[str, Any]:
    common = {"image_processor_type": name, "do_convert_rgb": True, "do_resize": True, "resample": resample}
    return common | settings | {"do_rescale": True, "rescale_factor": 1 / 255} | normalisation


def _shortest_edge(name: str):
    def make(config: PreTrainedConfig, side: int, normalisation: dict[str, Any]) -> dict[str, Any]:
        crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
        return _processor_json(name, 3, normalisation, size={"shortest_edge": side}, **crop)

    return make


def _square(name: str, resample: int):
    def make(config: PreTrainedConfig, side: int, normalisation: dict[str, Any]) -> dict[str, Any]:
        return _processor_json(name, resample, normalisation, size={"height": side, "width": side})

    return make


def _most_patches(config: PreTrainedConfig, side: int, normalisation: dict[str, Any]) -> dict[str, Any]:
    most = {"patch_size": config.patch_size, "max_num_patches": config.num_patches}
    return _processor_json("Siglip2ImageProcessor", 2, normalisation, **most)


# -- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What UNIT has to know of a vision transformer.

    Args:
        class_name: its class in transformers, which a saved encoder loads with.
        run: `(encoder, pixels (B, C, H, W), **kwargs)` -> its output with `last_hidden_state` `(B, S + N, D)`, for any
            H and W that are multiples of the patch.
        run_mixed: the same for a list of images of several sizes.
        native_processor: `(config, side in pixels, normalisation)` -> its `preprocessor_config.json`.
        class_tokens: how many of the prefix tokens are class tokens (the others are registers).
        image_mean, image_std: what its own image processor starts from, for pixels in [0, 1].
        do_normalize: False when the model subtracts the mean itself.
        fixed_size: the class, called with no special word, takes only images of `config.image_size`.
        unread: parameters that `last_hidden_state` does not depend on, by the beginning of their names. They are not
            trained, and a checkpoint may lack them.
        saved_prefix: what stands in front of the names of weights in checkpoints of this class that were written by
            transformers 4, and which it expects there; transformers 5 reads both.
        ours: UNIT's own, which checks, casts and masks padding by itself and is saved with its code.
    """

    class_name: str
    run: Callable[..., BaseModelOutputWithPooling]
    native_processor: Callable[[PreTrainedConfig, int, dict[str, Any]], dict[str, Any]]
    run_mixed: Callable[..., list[dict[str, Any]]] = _size_by_size
    class_tokens: Callable[[PreTrainedConfig], int] = lambda config: 1
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    do_normalize: bool = True
    fixed_size: bool = False
    unread: tuple[str, ...] = ()
    saved_prefix: str = ""
    ours: bool = False


_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
_CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}

ARCHITECTURES = {
    "clip_vision_model": Architecture(
        class_name="CLIPVisionModel",
        run=_interpolating,
        native_processor=_shortest_edge("CLIPImageProcessor"),
        fixed_size=True,
        unread=("post_layernorm.",),  # only the pooled output goes through it
        saved_prefix="vision_model.",
        **_CLIP,
    ),
    "siglip_vision_model": Architecture(
        class_name="SiglipVisionModel",
        run=_interpolating,
        native_processor=_square("SiglipImageProcessor", 3),
        class_tokens=lambda config: 0,
        fixed_size=True,
        unread=("head.",),
        saved_prefix="vision_model.",
    ),
    "siglip2_vision_model": Architecture(
        class_name="Siglip2VisionModel",
        run=_siglip2,
        run_mixed=_siglip2_masked,
        native_processor=_most_patches,
        class_tokens=lambda config: 0,
        unread=("head.",),
        saved_prefix="vision_model.",
    ),
    "vit": Architecture(
        class_name="ViTModel",
        run=_interpolating,
        native_processor=_square("ViTImageProcessor", 2),
        fixed_size=True,
        unread=("pooler.", "embeddings.mask_token"),
    ),
    "dinov2": Architecture(
        class_name="Dinov2Model",
        run=_any_size,
        native_processor=_shortest_edge("BitImageProcessor"),
        unread=("embeddings.mask_token",),
        **_IMAGENET,
    ),
    "dinov2_with_registers": Architecture(
        class_name="Dinov2WithRegistersModel",
        run=_any_size,
        native_processor=_shortest_edge("BitImageProcessor"),
        unread=("embeddings.mask_token",),
        **_IMAGENET,
    ),
    "dinov3_vit": Architecture(
        class_name="DINOv3ViTModel",
        run=_any_size,
        # its own processor exists for torchvision alone; this one does the same to a picture and needs only Pillow
        native_processor=_square("ViTImageProcessor", 2),
        unread=("embeddings.mask_token",),
        **_IMAGENET,
    ),
    "radio": Architecture(
        class_name="RadioModel",
        run=_radio,
        run_mixed=_radio_packed,
        native_processor=_shortest_edge("CLIPImageProcessor"),
        class_tokens=lambda config: config.num_cls_tokens,
        do_normalize=False,  # `input_conditioner` does it
        unread=("embeddings.video_patch_projection.",),
        **_CLIP,
    ),
    "unit_vision_model": Architecture(
        class_name="UnitVisionModel",
        run=_any_size,
        native_processor=_shortest_edge("CLIPImageProcessor"),
        ours=True,
        **_CLIP,
    ),
}

# Models with an encoder inside -> how to load it, `None` where the encoder's own class knows. modeling_unit.py adds
# `unit`.
FULL_MODELS: dict[str, Callable[..., nn.Module] | None] = {"clip": None, "siglip": None, "siglip2": None}


def architecture(config: PreTrainedConfig) -> Architecture:
    """The table's entry for an encoder's configuration."""
    return known_architecture(config.model_type)


def known_architecture(model_type: Any, where: str = "") -> Architecture:
    """The table's entry of a `model_type`.

    Raises:
        ValueError: listing the architectures that there are.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{where}{': ' if where else ''}the encoder architecture {model_type!r} is not supported. Supported: "
            f"{', '.join(sorted(ARCHITECTURES))}; an encoder inside one of {', '.join(sorted(FULL_MODELS))}; "
            "OpenCLIP weights (visual.*)."
        )
    return ARCHITECTURES[model_type]


def prefix_tokens(config: PreTrainedConfig) -> int:
    """S, the tokens in front of the patch tokens in an encoder's `last_hidden_state`."""
    return PREFIX_TOKENS[config.model_type](config)


def class_tokens(config: PreTrainedConfig) -> int:
    """How many of the S prefix tokens are class tokens; 0 for SigLIP."""
    return architecture(config).class_tokens(config)


def freeze_unread(encoder: nn.Module) -> list[str]:
    """Stop the gradients of the parameters that the encoder's tokens do not depend on; returns their names.

    They would get no gradient anyway; frozen, they are not counted as trained, and training over several devices need
    not look for parameters that took no part.
    """
    unread = architecture(encoder.config).unread
    frozen = []
    for name, parameter in encoder.named_parameters():
        if unread and name.startswith(unread):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


# -- running ------------------------------------------------------------------------------------------------------


def check_pixels(config: PreTrainedConfig, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None) -> None:
    """Raise `ValueError` for pixels that an encoder, ours or one of transformers, cannot take."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.dim() != 4:
        shape = tuple(pixel_values.shape) if hasattr(pixel_values, "shape") else type(pixel_values).__name__
        packed = isinstance(pixel_values, torch.Tensor) and pixel_values.dim() == 2
        raise ValueError(
            f"pixel_values must be a tensor (batch, {config.num_channels}, height, width), got {shape}."
            + (" Packed patches need image_grid_hw beside them." if packed else "")
        )
    if not pixel_values.shape[0]:
        raise ValueError("pixel_values is empty: give at least one image.")
    channels, height, width = pixel_values.shape[1:]
    if channels != config.num_channels:
        raise ValueError(f"pixel_values has {channels} channels, the model takes {config.num_channels}.")
    patch = config.patch_size
    if height % patch or width % patch or not height or not width:
        raise ValueError(
            f"The image is {height} x {width} pixels; height and width must be multiples of the patch size {patch}. "
            "Use the model's image processor, or resize or pad the image."
        )
    if spatial_shapes is not None:
        rows, cols = height // patch, width // patch
        if tuple(spatial_shapes.shape) != (pixel_values.shape[0], 2):
            raise ValueError(
                f"spatial_shapes must be (batch, 2), rows and columns in patches; got {tuple(spatial_shapes.shape)} "
                f"for a batch of {pixel_values.shape[0]}."
            )
        limit = torch.tensor([rows, cols], device=spatial_shapes.device)
        if bool((spatial_shapes > limit).any() or (spatial_shapes < 1).any()):
            raise ValueError(f"spatial_shapes must lie between 1 and the padded grid {rows} x {cols}.")


def patch_mask(
    config: PreTrainedConfig, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None
) -> torch.Tensor | None:
    """True where a patch token belongs to its image, `(B, N)`; `None` when nothing is padded."""
    if spatial_shapes is None:
        return None
    rows, cols = (size // config.patch_size for size in pixel_values.shape[-2:])
    shapes = spatial_shapes.to(pixel_values.device)
    if bool((shapes == shapes.new_tensor([rows, cols])).all()):
        return None
    row_mask = torch.arange(rows, device=shapes.device)[None, :] < shapes[:, :1]  # (B, rows)
    col_mask = torch.arange(cols, device=shapes.device)[None, :] < shapes[:, 1:]  # (B, cols)
    return (row_mask[:, :, None] & col_mask[:, None, :]).flatten(1)


def run_encoder(
    encoder: nn.Module, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None = None, **kwargs
) -> BaseModelOutputWithPooling:
    """Any supported encoder on images of any size, positions treated as its architecture wants it.

    Args:
        encoder: `UnitVisionModel` or one of transformers' classes in `ARCHITECTURES`.
        pixel_values: `(B, 3, H, W)`, H and W multiples of the patch size.
        spatial_shapes: `(B, 2)`, rows and columns of each image in a batch padded at the bottom and right. Each image
            gets what it would get alone: masked or packed where the architecture knows how to, else one pass a size.
        kwargs: `output_hidden_states` (anything but `None` and `False` means yes), `output_attentions` (computed by
            the eager implementation), and what the class itself takes.

    Returns:
        `last_hidden_state` `(B, S + N, D)`, patch tokens row by row over the padded grid and zero where padded;
        `pooler_output` as the class has it (RADIO: its summary), `None` where it has none; `hidden_states` and
        `attentions` laid out like the tokens.

    Raises:
        ValueError: for pixels of a wrong shape.
    """
    config = encoder.config
    entry = architecture(config)
    if entry.ours:
        return encoder(pixel_values, spatial_shapes=spatial_shapes, **({"return_dict": True} | kwargs))
    check_pixels(config, pixel_values, spatial_shapes)
    if patch_mask(config, pixel_values, spatial_shapes) is None:
        with _asked_for(config, kwargs) as words:
            return entry.run(encoder, pixel_values.to(encoder.dtype), **words)
    patch, shapes = config.patch_size, [tuple(shape) for shape in spatial_shapes.tolist()]
    images = [
        image[:, : rows * patch, : cols * patch] for image, (rows, cols) in zip(pixel_values, shapes, strict=True)
    ]
    grid = tuple(size // patch for size in pixel_values.shape[-2:])
    return _padded(run_images(encoder, images, **kwargs), shapes, grid, prefix_tokens(config))


def run_images(encoder: nn.Module, images: list[torch.Tensor], **kwargs) -> list[dict[str, Any]]:
    """Images `(3, H_i, W_i)` of whole patches through an encoder of transformers, each as it would be alone: masked or
    packed where the architecture knows how to, else one pass a size. Returns for each image `last_hidden_state`
    `(S + N_i, D)`, `pooler_output` `(D,)` where the class has one, and what else was asked for."""
    with _asked_for(encoder.config, kwargs) as words:
        images = [image.to(encoder.dtype) for image in images]
        return architecture(encoder.config).run_mixed(encoder, images, **words)


def run_encoder_packed(
    encoder: nn.Module, pixel_values: torch.Tensor, image_grid_hw: torch.Tensor, **kwargs
) -> UnitPackedOutput:
    """Any supported encoder on a pack of images of different sizes (see `packing_unit`), each as it would be alone.

    Args:
        pixel_values: `(sum N_i, 3 * P * P)`. image_grid_hw: `(B, 2)`, rows and columns in patches.
        kwargs: as for [`run_encoder`].

    Returns:
        `last_hidden_state` `(sum (S + N_i), D)` image after image, `pooler_output` `(B, ...)` where the class has one,
        `hidden_states` laid out like the tokens, `attentions` as in [`UnitPackedOutput`].

    Raises:
        ValueError: for a pack that is none.
    """
    config = encoder.config
    entry = architecture(config)
    if entry.ours:
        return encoder(pixel_values, image_grid_hw=image_grid_hw, **(kwargs | {"return_dict": True}))
    check_pack(pixel_values, image_grid_hw, getattr(config, "num_channels", 3) * config.patch_size**2)
    grids = image_grid_hw.tolist()
    own = pixel_values.split([rows * cols for rows, cols in grids])
    images = [
        unpatchify(patches[None], rows, cols, config.patch_size)[0]
        for patches, (rows, cols) in zip(own, grids, strict=True)
    ]
    outputs = run_images(encoder, images, **kwargs)

    def layers(name: str, together: Callable) -> tuple | None:
        if name not in outputs[0]:
            return None
        return tuple(together(layer) for layer in zip(*(output[name] for output in outputs), strict=True))

    lengths = torch.tensor([len(output["last_hidden_state"]) for output in outputs])
    pooled = [output["pooler_output"] for output in outputs if "pooler_output" in output]
    return UnitPackedOutput(
        last_hidden_state=torch.cat([output["last_hidden_state"] for output in outputs]),
        pooler_output=torch.stack(pooled) if pooled else None,
        hidden_states=layers("hidden_states", torch.cat),
        attentions=layers("attentions", tuple),
        cu_seqlens=nn.functional.pad(lengths.cumsum(0), (1, 0)).to(pixel_values.device, torch.int32),
        image_grid_hw=image_grid_hw,
    )


@contextmanager
def _asked_for(config: PreTrainedConfig, kwargs: dict[str, Any]):
    """The keywords as the classes of transformers take them; with eager attention where its weights are wanted, which
    the other implementations do not return."""
    words = {key: value for key, value in kwargs.items() if value is not None and key != "return_dict"}
    if "output_hidden_states" in words:
        words["output_hidden_states"] = words["output_hidden_states"] is not False
    with eager_attention(config, words.get("output_attentions", False)):
        yield words


@contextmanager
def eager_attention(config: PreTrainedConfig, wanted: bool):
    """Attention whose weights can be looked at, for the time of a pass, when `wanted`."""
    implementation = config._attn_implementation
    if wanted:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = implementation


def _padded(
    outputs: list[dict[str, Any]], shapes: list[tuple[int, int]], grid: tuple[int, int], prefix: int
) -> BaseModelOutputWithPooling:
    """Outputs of single images as one batch over the padded grid, zero where padded."""
    tokens = prefix + grid[0] * grid[1]
    places = []
    for rows, cols in shapes:
        own = torch.arange(grid[0] * grid[1]).view(grid)[:rows, :cols].flatten() + prefix
        places.append(torch.cat([torch.arange(prefix), own]))

    def sequences(values: list[torch.Tensor]) -> torch.Tensor:  # (T', D) each -> (B, T, D)
        spread = [
            value.new_zeros(tokens, value.shape[-1]).index_copy(0, place.to(value.device), value)
            for value, place in zip(values, places, strict=True)
        ]
        return torch.stack(spread)

    def squares(values: list[torch.Tensor]) -> torch.Tensor:  # (heads, T', T') each -> (B, heads, T, T)
        spread = []
        for value, place in zip(values, places, strict=True):
            place = place.to(value.device)
            wide = value.new_zeros(*value.shape[:2], tokens).index_copy(2, place, value)
            spread.append(value.new_zeros(value.shape[0], tokens, tokens).index_copy(1, place, wide))
        return torch.stack(spread)

    def layers(name: str, spread: Callable) -> tuple[torch.Tensor, ...] | None:
        if name not in outputs[0]:
            return None
        return tuple(spread(list(layer)) for layer in zip(*(output[name] for output in outputs), strict=True))

    pooled = [output["pooler_output"] for output in outputs if "pooler_output" in output]
    return BaseModelOutputWithPooling(
        last_hidden_state=sequences([output["last_hidden_state"] for output in outputs]),
        pooler_output=torch.stack(pooled) if pooled else None,
        hidden_states=layers("hidden_states", sequences),
        attentions=layers("attentions", squares),
    )
