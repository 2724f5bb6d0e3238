"""What an encoder knows of an image: chosen layers as tokens, means, grids and attention maps.

Shapes: B images, rows x cols patches, D width, S prefix tokens in the encoder's output.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .architectures_unit import eager_attention, known_architecture, patch_mask, prefix_tokens, run_encoder


@dataclass
class UnitLayerFeatures(ModelOutput):
    """What one layer knows of a batch of images.

    Args:
        layer: its number: 0 is the input of the first block, k the output of block k.
        tokens: `(B, S + rows * cols, D)`, as in `hidden_states`, zero where padded.
        class_token: `(B, D)`, `None` for an encoder that has none.
        mean: `(B, D)`, mean over the patches of each image.
        spatial: `(B, D, rows, cols)`, zero where padded.
        attention: `(B, heads, rows, cols)`, how much of the class token's attention goes to each patch in the block
            whose output the layer is; what is missing to a sum of 1 goes to the prefix tokens. Only on request.
    """

    layer: int | None = None
    tokens: torch.FloatTensor | None = None
    class_token: torch.FloatTensor | None = None
    mean: torch.FloatTensor | None = None
    spatial: torch.FloatTensor | None = None
    attention: torch.FloatTensor | None = None


def layer_features(
    model,
    pixel_values: torch.Tensor,
    layers: Sequence[int] = (-1,),
    spatial_shapes: torch.Tensor | None = None,
    final_norm: bool | None = None,
    attention: bool = False,
) -> list[UnitLayerFeatures]:
    """Features of chosen layers of an encoder; the other layers are not kept.

    Args:
        model: `UnitVisionModel`, `UnitModel`, or a vision transformer of transformers in `ARCHITECTURES`.
        pixel_values: `(B, 3, H, W)`, as the model takes them.
        layers: numbers of layers, 0 the input of the first block and n the output of the n-th and last; negative ones
            count from the end, -1 the last.
        spatial_shapes: `(B, 2)`, rows and columns of each image of a padded batch.
        final_norm: `None` leaves all layers as they are but the last, which is the model's `last_hidden_state`; True
            applies the final LayerNorm to every layer, False to none. Our encoder only, unless `None`.
        attention: also the class token's attention maps, computed eagerly, whatever implementation the encoder is set
            to, at the price of a matrix of weights for each block.

    Raises:
        ValueError: a layer that there is not, or something that an encoder of transformers cannot give; the message
            says what to do.
    """
    encoder = getattr(model, "vision_model", model)
    kind = encoder.config.model_type
    known_architecture(kind)
    count = encoder.config.num_hidden_layers
    wrong = [layer for layer in layers if not -count - 1 <= layer <= count]
    if wrong or not layers:
        raise ValueError(
            f"layers must name some of the {count + 1} from 0, the input of the first block, to {count}, or negative "
            f"ones from the end, got {list(layers)}."
        )
    chosen = [layer % (count + 1) for layer in layers]
    if kind == "unit_vision_model":
        found = _ours(encoder, pixel_values, chosen, spatial_shapes, final_norm, attention)
    else:
        found = _theirs(encoder, pixel_values, chosen, spatial_shapes, final_norm, attention)
    mask = patch_mask(encoder.config, pixel_values, spatial_shapes)
    rows, cols = (side // encoder.config.patch_size for side in pixel_values.shape[-2:])
    return [_views(encoder.config, layer, *found[layer], rows, cols, mask) for layer in chosen]


def _views(config, layer, tokens, weights, rows, cols, mask) -> UnitLayerFeatures:
    """`tokens` `(B, S + N, D)`; `weights` `(B, heads, N)` or `None`; `mask` `(B, N)` or `None`."""
    prefix = prefix_tokens(config)
    patches = tokens[:, prefix:]
    if mask is None:
        mean = patches.mean(dim=1)
    else:
        patches = patches * mask.unsqueeze(-1).to(patches.dtype)
        tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
        mean = patches.sum(dim=1) / mask.sum(dim=1, keepdim=True).to(patches.dtype)
    return UnitLayerFeatures(
        layer=layer,
        tokens=tokens,
        class_token=tokens[:, 0] if prefix else None,
        mean=mean,
        spatial=patches.transpose(1, 2).unflatten(2, (rows, cols)),
        attention=None if weights is None else weights.unflatten(2, (rows, cols)),
    )


def _ours(encoder, pixel_values, chosen, spatial_shapes, final_norm, attention) -> dict:
    """Layer -> tokens, attention of the class token: caught as they leave each block."""
    found, prefix = {}, encoder.config.num_prefix_tokens

    def catch(layer):
        def hook(module, args, output):
            tokens, weights = output if isinstance(output, tuple) else (output, None)
            kept = None if weights is None or not attention else weights[:, :, 0, prefix:]
            found[layer] = (encoder._output_tokens(tokens), kept)

        return hook

    modules = [encoder.embeddings, *encoder.blocks]
    hooks = [modules[layer].register_forward_hook(catch(layer)) for layer in set(chosen)]
    try:
        with eager_attention(encoder.config, attention):
            encoder(pixel_values, spatial_shapes=spatial_shapes)
    finally:
        for hook in hooks:
            hook.remove()
    last = encoder.config.num_hidden_layers
    for layer, (tokens, weights) in found.items():
        if final_norm or (final_norm is None and layer == last):
            found[layer] = (encoder.norm(tokens), weights)
    return found


def any_size(encoder) -> dict:
    """Arguments that make an encoder's forward a function of the pixels alone, at any size.

    Raises:
        ValueError: the architecture takes something else than pixels.
    """
    takes = inspect.signature(encoder.forward).parameters.values()
    needs = [one.name for one in takes if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if needs not in (["pixel_values"], []):
        raise ValueError(
            f"an encoder of the architecture {encoder.config.model_type} is a function of {', '.join(needs)}, not of "
            "the pixels alone"
        )
    named = {one.name for one in takes}
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in named else {}


def _theirs(encoder, pixel_values, chosen, spatial_shapes, final_norm, attention) -> dict:
    """The same of an encoder of transformers, which returns all layers or none."""
    kind = encoder.config.model_type
    if final_norm is not None:
        raise ValueError(f"final_norm is of UNIT's own encoder; this is {kind!r}.")
    prefix = prefix_tokens(encoder.config)
    if attention and not prefix:
        raise ValueError(f"{kind!r} has no class token whose attention could be mapped.")
    wanted = {"output_hidden_states": True, "output_attentions": True if attention else None}
    output = run_encoder(encoder, pixel_values, spatial_shapes, **wanted)
    last, found = encoder.config.num_hidden_layers, {}
    for layer in set(chosen):
        weights = output.attentions[layer - 1][:, :, 0, prefix:] if attention and layer else None
        found[layer] = (output.last_hidden_state if layer == last else output.hidden_states[layer], weights)
    return found


def principal_colours(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first three principal components of several grids of features as colours that compare: one basis and one
    scale for all.

    Every grid counts alike, however many patches it has. Each component runs from the lowest of the grids' 2%
    quantiles to the highest of their 98% quantiles [ours].

    Args:
        features: grids `(rows, cols, D)` of one D.

    Returns:
        uint8 `(rows, cols, 3)` each; components that do not vary are grey.
    """
    flat = [grid.flatten(0, 1).double() for grid in features]
    centre = torch.stack([one.mean(dim=0) for one in flat]).mean(dim=0)
    spread = torch.stack([(one - centre).T @ (one - centre) / len(one) for one in flat]).mean(dim=0)
    _, vectors = torch.linalg.eigh(spread)
    basis = vectors[:, -3:].flip(1)  # (D, 3), largest first
    # the sign of a component is arbitrary: its largest entry is made positive, so that a rerun gives the same colours
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    scores = [(one - centre) @ basis for one in flat]  # (N, 3)
    share = torch.tensor([0.02, 0.98], dtype=torch.float64)
    quantiles = torch.stack([torch.quantile(one, share, dim=0) for one in scores])  # (grids, 2, 3)
    low, high = quantiles[:, 0].amin(dim=0), quantiles[:, 1].amax(dim=0)
    width = high - low
    colours = []
    for grid, one in zip(features, scores, strict=True):
        value = torch.where(width > 1e-12, (one - low) / width.clamp(min=1e-12), 0.5).clamp(0, 1)
        colours.append((value * 255).round().to(torch.uint8).unflatten(0, grid.shape[:2]))
    return colours
