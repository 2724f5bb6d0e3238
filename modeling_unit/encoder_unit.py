"""UNIT's encoder: a pre-norm vision transformer with cropped position embeddings (CPE) for any height and width.

Shapes: B images, H x W pixels, P patch side, rows = H / P, cols = W / P, N = rows * cols patch tokens, D width,
S = prefix tokens (class tokens and registers) inside the encoder. The output holds one prefix token: the first.
"""

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _global_forward_hooks
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .architectures_unit import check_pixels, eager_attention, patch_mask
from .attention_unit import short_attention, suits_short_attention
from .compat_unit import (
    ALL_ATTENTION_FUNCTIONS,
    GradientCheckpointingLayer,
    create_bidirectional_mask,
    init,
    is_torchdynamo_exporting,
)
from .configuration_unit import UnitVisionConfig, nearest_supported_size
from .features_unit import layer_features
from .hub_unit import ENCODER_AUTO_MAP, CodeUploaded, write_code
from .packing_unit import PackedLayout, UnitPackedOutput, check_pack, packed_attention, patchify
from .released_unit import (
    HUB_ARGUMENTS,
    KEY_MAPPING,
    check_format,
    check_index,
    check_released,
    read_entries,
    read_released,
    released_folder,
    weight_files,
)

# Numbers in the middle of an MLP that are made at once on a CPU at inference: 8 MB in float32. As fast as all of them
# for short sequences and up to a tenth faster for long ones, whose tensors malloc would give fresh pages each time;
# and the MLP's width leaves the peak of memory [ours, measured].
MLP_CHUNK = 2**21


def sincos_positions(side: int, width: int) -> torch.Tensor:
    """Two-dimensional sine-cosine table, `(1, side * side, width)`: the start of the learned positions [ours].

    The first half of the width encodes the row, the second the column, so a grid larger than those seen in training
    still gets distinct positions.
    """
    quarter = max(1, width // 4)
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * frequencies[None, :]  # (side, quarter)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows = line[:, None, :].expand(side, side, -1)
    cols = line[None, :, :].expand(side, side, -1)
    table = torch.cat([rows, cols], dim=-1).reshape(1, side * side, -1)
    return F.pad(table, (0, width - table.shape[-1]))


class UnitPatchEmbeddings(nn.Module):
    """Pixels to tokens: linear patch embedding, cropped positions, prefix tokens in front."""

    def __init__(self, config: UnitVisionConfig):
        super().__init__()
        self.config = config
        side = config.position_side
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, side * side, config.hidden_size))
        self.prefix_tokens = nn.Parameter(torch.zeros(config.num_prefix_tokens, config.hidden_size))
        # Refilled in `_init_weights`: buffers made here do not survive loading on the meta device. transformers 4 does
        # not call that for a module whose parameters are all in the file, but keeps what is made here.
        self.register_buffer("pixel_mean", torch.tensor(config.image_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.image_std).view(-1, 1, 1), persistent=False)

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W) -> (B, rows * cols, C * P * P)`, each patch flattened as channel, row, column [code]."""
        return patchify(pixel_values, self.config.patch_size)

    def positions(self, rows: int, cols: int) -> torch.Tensor:
        """Positions of a grid at evaluation, `(rows * cols, D)` [code].

        The table itself when the grid has its size. Otherwise, if the nominal input size is not the size that the
        table covers, the table is resized to the longer side squared and its top-left corner taken; if it is, the
        corner is taken as it is and resized only where the grid outgrows the table.
        """
        if is_torchdynamo_exporting():
            return self.gathered_positions(rows, cols)
        side, width = self.config.position_side, self.config.hidden_size
        table = self.position_embedding
        if rows == cols == side:
            return table[0]
        grid = table.reshape(1, side, side, width).permute(0, 3, 1, 2)  # (1, D, side, side)
        covers = side * self.config.patch_size
        if self.config.image_size != covers:
            longer = max(rows, cols)
            grid = self._resize(grid, longer, longer)[..., :rows, :cols]
        else:
            grid = grid[..., :rows, :cols]
            if grid.shape[-2:] != (rows, cols):
                grid = self._resize(grid, rows, cols)
        return grid.permute(0, 2, 3, 1).reshape(rows * cols, width)

    def gathered_positions(self, rows: int, cols: int) -> torch.Tensor:
        """[`positions`] by one formula for every grid, `(rows * cols, D)`: what an export traces, where rows and
        columns are symbols and no decision may depend on them. Equal up to rounding, and slower."""
        side, width = self.config.position_side, self.config.hidden_size
        absolute = self.config.image_size == side * self.config.patch_size
        table = self.position_embedding.reshape(side * side, width)

        def places(size, other):
            """Of `size` rows (columns): entry of the table below, entry above, share of the latter."""
            # from `used` entries of the table, corner on corner, to `target` of which the first `size` are taken
            used, target = (torch.sym_min(size, side), size) if absolute else (side, torch.sym_max(size, other))
            place = torch.arange(size, device=table.device).float() * ((used - 1) / torch.sym_max(target - 1, 1))
            below = place.floor()
            return below.long(), (below.long() + 1).clamp(max=side - 1), place - below

        top, bottom, down = places(rows, cols)
        left, right, along = places(cols, rows)
        down, along = down[:, None, None], along[None, :, None]

        def entries(y, x):
            return F.embedding(y[:, None] * side + x[None, :], table).float()  # (rows, cols, D)

        upper = entries(top, left) * (1 - along) + entries(top, right) * along
        lower = entries(bottom, left) * (1 - along) + entries(bottom, right) * along
        return (upper * (1 - down) + lower * down).reshape(rows * cols, width).to(table.dtype)

    @staticmethod
    def _resize(grid: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        resized = F.interpolate(grid.float(), size=(rows, cols), mode="bilinear", align_corners=True)
        return resized.to(grid.dtype)

    def cropped_positions(self, shapes: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """Positions in training, `(B, rows * cols, D)`: a random crop of the table stretched over each image's grid
        [code].

        `shapes` `(B, 2)`: each image's own rows and columns inside the padded grid. The crop's scale, the root of its
        area share, is drawn from `cpe_min_scale` to 1 and its aspect, width over height, from `cpe_aspect`, uniform in
        the logarithm; no side is longer than the table. Random numbers come from torch's global generator, which the
        Trainer seeds, in this order, one an image each: scale, aspect, then the top and the left end.
        """
        start, step = self._draw_crops(shapes)
        device, batch = start.device, shapes.shape[0]
        y = start[:, :1] + step[:, :1] * torch.arange(rows, device=device)  # (B, rows)
        x = start[:, 1:] + step[:, 1:] * torch.arange(cols, device=device)  # (B, cols)
        points = torch.stack(
            [x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, cols)], dim=-1
        )  # (B, rows, cols, 2)
        return self._sample(points.reshape(1, batch, rows * cols, 2))

    def packed_cropped_positions(self, grids: torch.Tensor) -> torch.Tensor:
        """As [`cropped_positions`], `(sum N_i, D)` for a pack of grids `(B, 2)`: from one seed the same crops."""
        start, step = self._draw_crops(grids)
        counts = grids.prod(dim=1)
        image = torch.repeat_interleave(torch.arange(len(grids)), counts)
        place = torch.arange(len(image)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        cols = grids[:, 1][image]
        place = torch.stack([place // cols, place % cols], dim=1).to(start.device)  # (sum N_i, 2): row, column
        image = image.to(start.device)
        points = (start[image] + step[image] * place).flip(1)  # x, y
        return self._sample(points[None, None])[0]

    def _draw_crops(self, shapes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A random crop for each grid: its upper left corner and the step from patch to patch, both `(B, 2)`, along
        rows and columns, in shares of the table."""
        config = self.config
        device, batch = self.position_embedding.device, shapes.shape[0]
        scale = torch.empty(batch, 1, device=device).uniform_(config.cpe_min_scale, 1.0)
        low, high = (math.log(value) for value in config.cpe_aspect)
        aspect = torch.empty(batch, 1, device=device).uniform_(low, high).exp()
        # An aspect is width over height: each side takes its root, so that their ratio is the aspect and their product
        # stays scale squared. The whole of it on both sides would stretch crops to between 9/16 and 16/9.
        extent = torch.cat([scale / aspect.sqrt(), scale * aspect.sqrt()], dim=1).clamp(max=1.0)  # (B, 2): of y, x
        start = torch.rand(batch, 2, device=device) * (1.0 - extent)
        return start, extent / (shapes.to(device) - 1).clamp(min=1)

    def _sample(self, points: torch.Tensor) -> torch.Tensor:
        """The table at points `(1, Y, X, 2)`, x and y in shares of its sides: `(Y, X, D)`, zero outside."""
        side, width = self.config.position_side, self.config.hidden_size
        grid = self.position_embedding.reshape(1, side, side, width).permute(0, 3, 1, 2).float()
        sampled = F.grid_sample(grid, points * 2 - 1, mode="bilinear", padding_mode="zeros", align_corners=True)
        return sampled[0].permute(1, 2, 0).to(self.position_embedding.dtype)

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None) -> torch.Tensor:
        """`(B, C, H, W) -> (B, S + N, D)`. `spatial_shapes` `(B, 2)`: rows and columns of each image in a padded
        batch."""
        config = self.config
        batch, _, height, width = pixel_values.shape
        rows, cols = height // config.patch_size, width // config.patch_size
        if config.normalize_pixels:
            pixel_values = (pixel_values - self.pixel_mean.to(pixel_values)) / self.pixel_std.to(pixel_values)
        tokens = self._project(self.patchify(pixel_values))

        if self.training and config.cpe_crop:
            shapes = spatial_shapes if spatial_shapes is not None else torch.tensor([[rows, cols]]).expand(batch, 2)
            positions = self.cropped_positions(shapes, rows, cols)
        elif spatial_shapes is None:
            positions = self.positions(rows, cols)
        else:
            positions = self._positions_of_padded(spatial_shapes, rows, cols)
        if self.training and config.cpe_drop_prob > 0:
            keep = torch.rand(batch, 1, 1, device=tokens.device) >= config.cpe_drop_prob
            positions = positions * keep.to(positions.dtype)
        tokens = tokens + positions
        prefix = self.prefix_tokens.to(tokens.dtype).unsqueeze(0).expand(batch, -1, -1)
        return torch.cat([prefix, tokens], dim=1)

    def forward_packed(self, patches: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """`(sum N_i, C * P * P) -> (1, sum (S + N_i), D)`, in the order of `layout`."""
        config = self.config
        if config.normalize_pixels:
            channels, patch = config.num_channels, config.patch_size
            mean, std = (
                each.to(patches).expand(channels, patch, patch).flatten() for each in (self.pixel_mean, self.pixel_std)
            )
            patches = (patches - mean) / std
        tokens = self._project(patches)
        if self.training and config.cpe_crop:
            positions = self.packed_cropped_positions(torch.tensor(layout.grids))
        else:
            known = {grid: self.positions(*grid) for grid in set(layout.grids)}
            positions = torch.cat([known[grid] for grid in layout.grids])
        if self.training and config.cpe_drop_prob > 0:
            keep = torch.rand(len(layout.grids), 1, 1, device=tokens.device) >= config.cpe_drop_prob
            counts = torch.tensor(layout.patch_counts, device=tokens.device)
            positions = positions * torch.repeat_interleave(keep[:, :, 0], counts, dim=0).to(positions.dtype)
        tokens = tokens + positions
        return layout.sequence(tokens, self.prefix_tokens.to(tokens.dtype))

    def _project(self, patches: torch.Tensor) -> torch.Tensor:
        """`(..., C * P * P) -> (..., D)`, in float32 where the configuration asks for it."""
        weight = self.projection.weight
        if self.config.patch_embed_float32:
            with torch.autocast(device_type=patches.device.type, enabled=False):
                return F.linear(patches.float(), weight.float()).to(weight.dtype)
        return self.projection(patches.to(weight.dtype))

    def _positions_of_padded(self, spatial_shapes: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """Each image's own positions in the top-left corner of the padded grid, `(B, rows * cols, D)`."""
        shapes = [tuple(shape) for shape in spatial_shapes.tolist()]
        absolute = self.config.image_size == self.config.position_side * self.config.patch_size
        if absolute and max(rows, cols) <= self.config.position_side:
            return self.positions(rows, cols)  # a crop: the same for every image, padding or not
        known = {}
        for own_rows, own_cols in set(shapes):
            grid = self.positions(own_rows, own_cols).reshape(own_rows, own_cols, -1)
            known[own_rows, own_cols] = F.pad(grid, (0, 0, 0, cols - own_cols, 0, rows - own_rows)).flatten(0, 1)
        return torch.stack([known[shape] for shape in shapes])


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention that can return its weights; the form that transformers' attention interface asks for."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights


def _short_or(attend, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """[`short_attention`] where it is faster, else `attend`; but for the first argument, both have the form of
    transformers' attention interface."""
    if attention_mask is None and suits_short_attention(query, dropout):
        return short_attention(query, key, value, scaling)
    return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


class UnitAttention(nn.Module):
    """Multi-head self-attention over all tokens; `qkv` and `proj` are the names that LoRA presets look for."""

    is_causal = False

    def __init__(self, config: UnitVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, layout: PackedLayout | None = None, **kwargs):
        batch, tokens, width = hidden_states.shape
        # chunks, not a third axis: their gradients then come together again in one copy
        query, key, value = (
            each.unflatten(-1, (self.num_heads, self.head_dim)) for each in self.qkv(hidden_states).chunk(3, dim=-1)
        )  # each (B, T, heads, D / heads)
        # transformers looks for this very call in the source before it lets `set_attn_implementation` do anything
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if self.training and self.config._attn_implementation == "sdpa":
            attend = partial(_short_or, attend)
        if layout is not None:
            attended, weights = packed_attention(
                self,
                attend,
                *(each[0] for each in (query, key, value)),
                layout,
                self.config._attn_implementation,
                self.config.attention_dropout if self.training else 0.0,
            )
            return self.proj(attended.reshape(batch, tokens, width)), weights
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # each (B, heads, T, D / heads)
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return self.proj(attended.reshape(batch, tokens, width)), weights


def may_overwrite(*modules: nn.Module) -> bool:
    """Whether what these modules have just returned can be overwritten: no gradient wants it, no hook has seen it, and
    nothing is being traced. At inference it saves the encoder a tenth of its time at most: large fresh tensors cost
    page faults and cache [ours, measured]."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (_global_forward_hooks or any(module._forward_hooks for module in modules))


def add_branch(residual: torch.Tensor, branch: torch.Tensor, *modules: nn.Module) -> torch.Tensor:
    """`residual + branch`, in the branch's memory where that may be overwritten; `modules` made the branch. Under
    autocast the branch is narrower than the residual, and the sum is not its type."""
    if branch.dtype == residual.dtype and may_overwrite(*modules):
        return branch.add_(residual)
    return residual + branch


class UnitMLP(nn.Module):
    def __init__(self, config: UnitVisionConfig):
        super().__init__()
        self.exact_gelu = config.hidden_act == "gelu"
        self.width = config.intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        if not (self.exact_gelu and may_overwrite(self.fc1, self.act, self.fc2)):
            return self.fc2(self.act(self.fc1(hidden_states)))
        tokens = hidden_states.flatten(0, -2)
        if tokens.device.type != "cpu" or len(tokens) * self.width <= MLP_CHUNK:
            return self.fc2(torch.ops.aten.gelu_(self.fc1(hidden_states)))
        out, step = None, max(1, MLP_CHUNK // self.width)
        for start in range(0, len(tokens), step):
            part = self.fc2(torch.ops.aten.gelu_(self.fc1(tokens[start : start + step])))
            out = part.new_empty(len(tokens), part.shape[-1]) if out is None else out
            out[start : start + step] = part
        return out.view_as(hidden_states)


class UnitBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block, no layer scale [code]."""

    def __init__(self, config: UnitVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = UnitAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = UnitMLP(config)

    def forward(self, hidden_states, attention_mask=None, layout: PackedLayout | None = None):
        attended, weights = self.attn(self.norm1(hidden_states), attention_mask, layout)
        hidden_states = add_branch(hidden_states, attended, self.attn, self.attn.proj)
        return add_branch(hidden_states, self.mlp(self.norm2(hidden_states)), self.mlp, self.mlp.fc2), weights


class UnitUnappliedNorm(nn.Module):
    """The `fc_norm` of a released checkpoint, which the forward pass does not apply [code]: buffers, so that nothing
    trains them and the way back to the released format has them."""

    def __init__(self, config: UnitVisionConfig):
        super().__init__()
        self.register_buffer("weight", torch.ones(config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.hidden_size))


class UnitPreTrainedModel(CodeUploaded, PreTrainedModel):
    """What all UNIT models share: initialisation, attention back ends, gradient checkpointing."""

    config_class = UnitVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["UnitBlock"]
    hub_auto_map = ENCODER_AUTO_MAP

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but pickles are refused: weights are safetensors.

        Raises:
            ValueError: for a folder in the released format, which holds an encoder alone, unless the class is one.
        """
        kwargs.setdefault("use_safetensors", True)
        name = str(pretrained_model_name_or_path)
        if cls.config_class is not UnitVisionConfig and Path(name).is_dir() and released_folder(name) is not None:
            raise ValueError(
                f"{name}: a checkpoint in the released format, which holds an encoder alone; load it with "
                f"UnitVisionModel.from_pretrained, or convert it: unit convert {name} FOLDER."
            )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers, and the code beside the weights: the folder loads with `trust_remote_code=True` where
        this package is not installed.
        """
        self.config.auto_map = dict(self.hub_auto_map)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_code(save_directory)

    @torch.no_grad()
    def _init_weights(self, module):
        """Linear: truncated normal 0.02, bias 0. LayerNorm: 1 and 0. Positions: sine-cosine. Prefix tokens: normal
        0.02."""
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, UnitUnappliedNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, UnitPatchEmbeddings):
            config = module.config
            # Loading comes here for the buffers below: a table of 146 x 146 positions is not made to be thrown away
            if not getattr(module.position_embedding, "_is_hf_initialized", False):
                table = sincos_positions(config.position_side, config.hidden_size) * std
                init.copy_(module.position_embedding, table.to(module.position_embedding.dtype))
            init.normal_(module.prefix_tokens, mean=0.0, std=std)
            init.copy_(module.pixel_mean, torch.tensor(config.image_mean).view(-1, 1, 1))
            init.copy_(module.pixel_std, torch.tensor(config.image_std).view(-1, 1, 1))


class UnitEncoderFeatures:
    """What can be asked of a model whose `config` describes an encoder, or has one: its layers and its sizes."""

    def layer_features(self, pixel_values: torch.Tensor, layers=(-1,), **kwargs) -> list:
        """Features of chosen layers: tokens, class token, mean, grid, attention maps; see
        [`features_unit.layer_features`]."""
        return layer_features(self, pixel_values, layers, **kwargs)

    def nearest_supported_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of whole patches nearest to an image's; see
        [`configuration_unit.nearest_supported_size`]."""
        return nearest_supported_size(self.config, height, width)


class UnitVisionModel(UnitEncoderFeatures, UnitPreTrainedModel):
    """UNIT's encoder: features of a picture or a page at any size.

    Example:

    ```python
    >>> model = AutoModel.from_pretrained("path/to/encoder", trust_remote_code=True)
    >>> features = model(pixel_values).last_hidden_state  # (B, 1 + rows * cols, D)
    ```
    """

    config_class = UnitVisionConfig
    # so that `UnitVisionModel.from_pretrained` also finds the encoder inside a full checkpoint
    base_model_prefix = "vision_model"
    _keys_to_ignore_on_load_unexpected = [
        r"^(connector|language_model|vision_decoder|visual_projection|character_head)\.",
        r"^unit_model\.input_conditioner\.norm_(mean|std)$",  # of a released checkpoint: read into the configuration
    ]

    def __init__(self, config: UnitVisionConfig):
        super().__init__(config)
        self.embeddings = UnitPatchEmbeddings(config)
        self.blocks = nn.ModuleList([UnitBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_final_norm else nn.Identity()
        )
        if config.keep_fc_norm:
            self.fc_norm = UnitUnappliedNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers; a checkpoint in the released format (`config.json` with `args`) is loaded as it is, and
        saved again in ours. `unit convert` turns one into the other without loading it.

        Raises:
            ValueError: a checkpoint in the released format whose keys, shapes or arguments are not as they should be.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if pretrained_model_name_or_path is None or kwargs.get("state_dict") is not None:
            folder = None
        else:
            folder = released_folder(pretrained_model_name_or_path, **hub)
        if folder is None:
            if config is None and Path(pretrained_model_name_or_path or "").is_dir():
                check_format(Path(pretrained_model_name_or_path) / hub.get("subfolder", ""))
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        if config is None:
            config, *_ = read_released(folder)
            changes = {name: kwargs.pop(name) for name in list(kwargs) if name in UnitVisionConfig.__annotations__}
            config = UnitVisionConfig.from_dict(config.to_dict() | changes) if changes else config
        elif isinstance(config, UnitVisionConfig):
            check_released(config, read_entries(weight_files(folder)), folder)
        check_index(folder)
        kwargs = {name: value for name, value in kwargs.items() if name not in hub}
        loaded = super().from_pretrained(folder, *model_args, config=config, key_mapping=KEY_MAPPING, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        model._weight_conversions = None  # else `save_pretrained` would write the released names beside our config
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def forward(
        self,
        pixel_values: torch.Tensor,
        spatial_shapes: torch.Tensor | None = None,
        output_hidden_states: bool | int | list | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        image_grid_hw: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling | UnitPackedOutput | tuple:
        """
        Args:
            pixel_values: `(B, 3, H, W)`, normalised as the image processor does (or in [0, 1] with
                `normalize_pixels`). Cast to the model's dtype here. H and W are multiples of the patch size. With
                `image_grid_hw`: `(sum N_i, 3 * P * P)`, the patches of images of any sizes, image after image.
            spatial_shapes: `(B, 2)`, rows and columns in patches of each image, for a batch padded at the bottom and
                right to one size; the padding is masked out, and its tokens in the output are zero.
            output_hidden_states: anything but `None` and `False` (transformers' LLaVA passes a layer's number or a
                list) returns the input of the first block and the output of every block, before the final norm; with
                `config.tie_last_hidden_states` the last of them is `last_hidden_state`.
            output_attentions: returns the attention weights `(B, heads, S + N, S + N)` of every block, registers
                included; the attention is then computed by the eager implementation.
            image_grid_hw: `(B, 2)`, rows and columns in patches of each image of a pack; see `packing_unit`. Nothing
                is padded, no image sees another, and each gets what it would get alone.

        Returns:
            `last_hidden_state` `(B, 1 + N, D)`: class token, then patch tokens row by row, after the final norm;
            `pooler_output` `(B, D)`. For a pack a [`UnitPackedOutput`], its tokens `(sum (1 + N_i), D)`.

        Raises:
            ValueError: for pixels of a wrong shape, or grids that do not fit them.
        """
        if image_grid_hw is None:
            check_pixels(self.config, pixel_values, spatial_shapes)
        else:
            if spatial_shapes is not None:
                raise ValueError("Give spatial_shapes for a padded batch or image_grid_hw for a pack, not both.")
            check_pack(pixel_values, image_grid_hw, self.config.num_channels * self.config.patch_size**2)
        config = self.config
        wants_hidden = output_hidden_states if output_hidden_states is not None else config.output_hidden_states
        wants_hidden = wants_hidden is not None and wants_hidden is not False
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        return_dict = config.return_dict if return_dict is None else return_dict
        with eager_attention(config, wants_attentions):
            layout = None
            if image_grid_hw is None:
                hidden_states = self.embeddings(pixel_values.to(self.dtype), spatial_shapes)
            else:
                grids = [(rows, cols) for rows, cols in image_grid_hw.tolist()]
                layout = PackedLayout(grids, config.num_prefix_tokens, pixel_values.device)
                hidden_states = self.embeddings.forward_packed(pixel_values.to(self.dtype), layout)
            mask = patch_mask(config, pixel_values, spatial_shapes)  # (B, N) or None
            attention_mask = None
            if mask is not None:
                ones = mask.new_ones(mask.shape[0], config.num_prefix_tokens)
                attention_mask = torch.cat([ones, mask], dim=1)  # (B, T)
                if config._attn_implementation == "sdpa":
                    # one row for all queries: the square that transformers makes of it costs T * T for each image
                    attention_mask = attention_mask[:, None, None, :]
                else:
                    attention_mask = create_bidirectional_mask(
                        config=config, inputs_embeds=hidden_states, attention_mask=attention_mask
                    )
            all_hidden, all_attentions = [], []
            for block in self.blocks:
                if wants_hidden:
                    all_hidden.append(self._output_tokens(hidden_states, layout))
                hidden_states, weights = block(hidden_states, attention_mask, layout)
                if wants_attentions:
                    all_attentions.append(weights)
        output = self._output_tokens(hidden_states, layout)
        if wants_hidden:
            all_hidden.append(output)
        output = self.norm(output)
        if wants_hidden and config.tie_last_hidden_states:
            all_hidden[-1] = output
        if layout is not None:
            result = UnitPackedOutput(
                last_hidden_state=output,
                pooler_output=self._pool_packed(output, layout),
                hidden_states=tuple(all_hidden) if wants_hidden else None,
                attentions=tuple(all_attentions) if wants_attentions else None,
                cu_seqlens=layout.output_seqlens(),
                image_grid_hw=image_grid_hw,
            )
            return result if return_dict else result.to_tuple()
        if mask is not None:
            output = torch.cat([output[:, :1], output[:, 1:] * mask.unsqueeze(-1).to(output.dtype)], dim=1)
        result = BaseModelOutputWithPooling(
            last_hidden_state=output,
            pooler_output=self._pool(output, mask),
            hidden_states=tuple(all_hidden) if wants_hidden else None,
            attentions=tuple(all_attentions) if wants_attentions else None,
        )
        return result if return_dict else result.to_tuple()

    def _output_tokens(self, hidden_states: torch.Tensor, layout: PackedLayout | None = None) -> torch.Tensor:
        """`(B, S + N, D) -> (B, 1 + N, D)`: the first class token and the patch tokens [code]; for a pack
        `(1, sum (S + N_i), D) -> (sum (1 + N_i), D)`."""
        if layout is not None:
            return layout.output(hidden_states)
        prefix = self.config.num_prefix_tokens
        if prefix == 1:
            return hidden_states
        return torch.cat([hidden_states[:, :1], hidden_states[:, prefix:]], dim=1)

    def _pool(self, output: torch.Tensor, patch_mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.pooling == "cls":
            return output[:, 0]
        if patch_mask is None:
            return output[:, 1:].mean(dim=1)
        counts = patch_mask.sum(dim=1, keepdim=True).to(output.dtype)
        return output[:, 1:].sum(dim=1) / counts

    def _pool_packed(self, output: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """`(sum (1 + N_i), D) -> (B, D)`."""
        images = output.split([count + 1 for count in layout.patch_counts])
        if self.config.pooling == "cls":
            return torch.stack([image[0] for image in images])
        return torch.stack([image[1:].mean(dim=0) for image in images])
