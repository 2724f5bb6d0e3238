"""Images of different sizes in one sequence, without padding.

Shapes: B images, image i of rows_i x cols_i = N_i patches; C channels, P patch side, D width; S prefix tokens of an
image inside the encoder. A pack is `pixel_values` `(sum N_i, C * P * P)`, the patches of all images one image after
the other, each image row by row, each patch flattened as channel, row, column [code], with `image_grid_hw` `(B, 2)`,
the rows and columns: the form and the names of transformers' Radio.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

try:  # torch's own flash attention over packed sequences; older versions lack it
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

FLEX_BLOCK = 128  # side of a block of flex attention's sparse mask, its default


@dataclass
class UnitPackedOutput(BaseModelOutputWithPooling):
    """Output of the encoder for a pack; of one of transformers with all its S prefix tokens, S + N_i an image.

    Args:
        last_hidden_state: `(sum (1 + N_i), D)`: image after image its class token, then its patch tokens row by row,
            after the final norm.
        pooler_output: `(B, D)`.
        hidden_states: on request, as `last_hidden_state`, before the final norm.
        attentions: on request, for every block a tuple of one `(heads, S + N_i, S + N_i)` for each image.
        cu_seqlens: `(B + 1,)` int32, where each image's tokens begin and end.
        image_grid_hw: `(B, 2)`, as given.
    """

    cu_seqlens: torch.IntTensor | None = None
    image_grid_hw: torch.LongTensor | None = None

    def split(self, tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """`(1 + N_i, D)` for each image, views of `last_hidden_state` or of `tokens` laid out like it."""
        tokens = self.last_hidden_state if tokens is None else tokens
        return split_packed(tokens, self.cu_seqlens)

    def spatial(self, tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The patch tokens of each image as a map, `(rows_i, cols_i, D)`."""
        images = zip(self.split(tokens), self.image_grid_hw.tolist(), strict=True)
        return tuple(own[len(own) - rows * cols :].unflatten(0, (rows, cols)) for own, (rows, cols) in images)


def split_packed(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`(sum L_i, ...)` to `(L_i, ...)` for each image; `cu_seqlens` `(B + 1,)` as an encoder returns it."""
    return tokens.split((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """`(B, C, H, W) -> (B, rows * cols, C * P * P)`, each patch flattened as channel, row, column [code]."""
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(patches: torch.Tensor, rows: int, cols: int, patch: int) -> torch.Tensor:
    """`(B, rows * cols, C * P * P) -> (B, C, H, W)`, the inverse of [`patchify`]."""
    grid = patches.reshape(patches.shape[0], rows, cols, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, rows * patch, cols * patch)


def pack_images(images: Sequence[torch.Tensor], patch_size: int) -> dict[str, torch.Tensor]:
    """Normalised images `(C, H_i, W_i)` to the pack that the encoder takes: `pixel_values` and `image_grid_hw`.

    Raises:
        ValueError: no image, one that is not `(C, H, W)`, or one whose sides are no multiples of `patch_size`.
    """
    if not len(images):
        raise ValueError("The pack is empty: give at least one image.")
    patches, grids = [], []
    for index, image in enumerate(images):
        if not isinstance(image, torch.Tensor) or image.dim() != 3:
            shape = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
            raise ValueError(f"Image {index} of the pack must be a tensor (channels, height, width), got {shape}.")
        height, width = image.shape[-2:]
        if height % patch_size or width % patch_size or not height or not width:
            raise ValueError(
                f"Image {index} of the pack is {height} x {width} pixels; height and width must be multiples of the "
                f"patch size {patch_size}. Use the model's image processor, or resize or pad the image."
            )
        patches.append(patchify(image[None], patch_size)[0])
        grids.append([height // patch_size, width // patch_size])
    if len({each.shape[1] for each in patches}) > 1:
        raise ValueError("The images of a pack must all have the same number of channels.")
    return {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(grids)}


def padded(tokens: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(sum L_i, D)` to `(B, longest, D)`, zero behind each sequence, and its mask `(B, longest)`."""
    rows = torch.nn.utils.rnn.pad_sequence(tokens.split(list(lengths)), batch_first=True)
    lengths = torch.tensor(list(lengths), device=tokens.device)
    return rows, torch.arange(rows.shape[1], device=tokens.device)[None, :] < lengths[:, None]


def neighbours(grids: Sequence[tuple[int, int]], unshuffle: int) -> torch.Tensor:
    """Which patches of a pack come together in u x u squares, `(sum K_i, u * u)`: row by row, in each square too.

    Squares that reach over the bottom or the right hold the number behind the last patch, sum N_i, there.
    """
    total = sum(rows * cols for rows, cols in grids)
    known, places, start = {}, [], 0
    for rows, cols in grids:
        if (rows, cols) not in known:
            own = torch.arange(rows * cols).view(rows, cols)
            own = F.pad(own, (0, -cols % unshuffle, 0, -rows % unshuffle), value=-1)
            own = own.unflatten(1, (-1, unshuffle)).unflatten(0, (-1, unshuffle))  # (rows', u, cols', u)
            known[rows, cols] = own.transpose(1, 2).reshape(-1, unshuffle * unshuffle)
        own = known[rows, cols]
        places.append(torch.where(own < 0, total, own + start))
        start += rows * cols
    return torch.cat(places)


def check_pack(pixel_values: torch.Tensor, image_grid_hw: torch.Tensor, patch_values: int) -> None:
    """Raise `ValueError` for a pack that is none.

    Args:
        patch_values: numbers in a patch, C * P * P.
    """
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.dim() != 2:
        shape = tuple(pixel_values.shape) if hasattr(pixel_values, "shape") else type(pixel_values).__name__
        raise ValueError(
            f"With image_grid_hw, pixel_values must be packed patches (total_patches, {patch_values}), got {shape}. "
            "Make both with the image processor's return_packed=True."
        )
    if (
        not isinstance(image_grid_hw, torch.Tensor)
        or image_grid_hw.dim() != 2
        or image_grid_hw.shape[1] != 2
        or image_grid_hw.is_floating_point()
    ):
        shape = tuple(image_grid_hw.shape) if hasattr(image_grid_hw, "shape") else type(image_grid_hw).__name__
        raise ValueError(f"image_grid_hw must be whole numbers (images, 2), rows and columns in patches; got {shape}.")
    if not len(image_grid_hw) or not len(pixel_values):
        raise ValueError("The pack is empty: give at least one image.")
    if pixel_values.shape[1] != patch_values:
        raise ValueError(
            f"Each patch of the pack holds {pixel_values.shape[1]} values, the model takes {patch_values}: channels x "
            "patch rows x patch columns."
        )
    if bool((image_grid_hw < 1).any()):
        raise ValueError("image_grid_hw must hold at least 1 row and 1 column for each image.")
    described = int(image_grid_hw.prod(dim=1).sum())
    if described != len(pixel_values):
        raise ValueError(
            f"pixel_values holds {len(pixel_values)} patches, but image_grid_hw describes {described}: each image has "
            "rows x columns of them."
        )


@dataclass
class PackedLayout:
    """Where the images of a pack stand in the encoder's sequence.

    Inside, images of equal length stand side by side, so that each such run is one dense batch for the attention; the
    output is back in the given order.

    Args:
        grids: rows and columns of each image, in the given order.
        prefix: S, tokens in front of each image's patches.
        device: of the tokens.
    """

    grids: list[tuple[int, int]]
    prefix: int
    device: torch.device
    order: list[int] = field(init=False)  # place in the sequence -> image
    runs: list[tuple[int, int]] = field(init=False)  # neighbours of one length: how many, and their tokens each
    cu_seqlens: torch.Tensor = field(init=False)  # (B + 1,) int32, of the inner sequence
    block_mask: object = None  # flex attention's, made when first asked for

    def __post_init__(self):
        lengths = [rows * cols + self.prefix for rows, cols in self.grids]
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__)  # stable
        self.lengths = [lengths[image] for image in self.order]
        self.runs = []
        for length in self.lengths:
            if self.runs and self.runs[-1][1] == length:
                self.runs[-1] = (self.runs[-1][0] + 1, length)
            else:
                self.runs.append((1, length))
        self.max_seqlen = self.lengths[-1]
        self.cu_seqlens = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(self.device, torch.int32)

    @property
    def patch_counts(self) -> list[int]:
        """N_i, in the given order."""
        return [rows * cols for rows, cols in self.grids]

    def sequence(self, patches: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Patch tokens `(sum N_i, D)` and prefix tokens `(S, D)` to `(1, sum (S + N_i), D)`."""
        own = patches.split(self.patch_counts)
        return torch.cat([each for image in self.order for each in (prefix, own[image])]).unsqueeze(0)

    def output(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(1, sum (S + N_i), D) -> (sum (1 + N_i), D)`: the first prefix token and the patches, in the given
        order."""
        tokens = tokens[0]
        in_order = all(place == image for place, image in enumerate(self.order))
        if in_order and self.prefix == 1:
            return tokens
        own = dict(zip(self.order, tokens.split(self.lengths), strict=True))
        pieces = []
        for image in range(len(self.grids)):
            pieces += [own[image]] if self.prefix == 1 else [own[image][:1], own[image][self.prefix :]]
        return torch.cat(pieces)

    def output_seqlens(self) -> torch.Tensor:
        """`(B + 1,)` int32 of the output, 1 + N_i tokens an image."""
        lengths = torch.tensor([count + 1 for count in self.patch_counts])
        return F.pad(lengths.cumsum(0), (1, 0)).to(self.device, torch.int32)

    def flex_mask(self):
        """Flex attention's block mask, each image to itself; built from the boundaries, never as a square mask."""
        if self.block_mask is None:
            self.block_mask = flex_block_mask(self.cu_seqlens)
        return self.block_mask


def flex_block_mask(cu_seqlens: torch.Tensor, block: int = FLEX_BLOCK):
    """Sparse mask of flex attention in which each sequence of a pack sees itself alone.

    Memory: (tokens / block) squared entries, not tokens squared.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, total = cu_seqlens.device, int(cu_seqlens[-1])
    owner = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1, device=device), cu_seqlens.diff().long())
    count = -(-total // block)
    firsts = torch.arange(count, device=device) * block
    lasts = (firsts + block - 1).clamp(max=total - 1)
    # the sequences that a block of queries touches lie side by side, and so do the blocks of their keys
    begin = cu_seqlens[owner[firsts]].long() // block
    end = (cu_seqlens[owner[lasts] + 1].long() - 1) // block
    steps = torch.arange(count, device=device)
    number = (end - begin + 1).to(torch.int32)
    indices = (begin[:, None] + steps[None, :]).clamp(max=count - 1).to(torch.int32)
    return BlockMask.from_kv_blocks(
        number[None, None],
        indices[None, None],
        BLOCK_SIZE=block,
        mask_mod=lambda batch, head, query, key: owner[query] == owner[key],
        seq_lengths=(total, total),
    )


def packed_method(
    implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float = 0.0
) -> str:
    """How a pack is attended to: `"flash"` (the flash-attention package's varlen kernel, when it is the model's
    attention implementation), `"flex"`, `"varlen"` (torch's own varlen kernel) or `"runs"` (a dense call for each run
    of images of equal length).

    On a CPU runs won against jagged nested tensors, which fall back to the full square of attention there: 8 to 14 ms
    against 150 to 190 ms for 32 images of 64 to 256 tokens [ours, measured].
    """
    if "flash" in implementation:
        return "flash"
    if device.type == "cuda":
        if implementation == "flex_attention" and dropout == 0.0:
            return "flex"
        if (
            implementation == "sdpa"
            and varlen_attn is not None
            and dropout == 0.0
            and dtype in (torch.float16, torch.bfloat16)
            and head_dim % 8 == 0
            and head_dim <= 256
            and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (8, 0)
        ):
            return "varlen"
    return "runs"


def packed_attention(module, attend, query, key, value, layout: PackedLayout, implementation: str, dropout: float):
    """Attention within each image of a pack.

    Args:
        attend: the implementation's function, in the form of transformers' attention interface.
        query, key, value: `(T, heads, D / heads)`, T = sum (S + N_i) tokens in the order of `layout`.

    Returns:
        `(1, T, heads, D / heads)`, and the weights of each image in the given order where `attend` returns any.
    """
    settings = {"scaling": module.scaling, "dropout": dropout, "is_causal": False}
    method = packed_method(implementation, query.device, query.dtype, query.shape[-1], dropout)
    if method == "varlen":
        bounds = (layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
        return varlen_attn(query, key, value, *bounds)[None], None  # its scale is ours, 1 / sqrt(D / heads)
    if method in ("flash", "flex"):
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))  # (1, heads, T, D / heads)
        if method == "flex":
            return attend(module, query, key, value, layout.flex_mask(), **settings)
        settings |= {"cu_seq_lens_q": layout.cu_seqlens, "cu_seq_lens_k": layout.cu_seqlens}
        settings |= {"max_length_q": layout.max_seqlen, "max_length_k": layout.max_seqlen}
        return attend(module, query, key, value, None, **settings)
    outputs, weights, start = [], [], 0
    for images, length in layout.runs:
        stop = start + images * length
        run = [each[start:stop].unflatten(0, (images, length)).transpose(1, 2) for each in (query, key, value)]
        attended, own = attend(module, *run, None, **settings)  # (images, length, heads, D / heads)
        outputs.append(attended.flatten(0, 1))
        weights += [None] * images if own is None else own.unbind(0)
        start = stop
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if weights[0] is None:
        return attended[None], None
    by_image = dict(zip(layout.order, weights, strict=True))
    return attended[None], tuple(by_image[image] for image in range(len(by_image)))
