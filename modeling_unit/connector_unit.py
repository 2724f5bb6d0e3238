"""Connectors: from the encoder's tokens to visual tokens of the language decoder's width.

Shapes: B images, N = rows * cols patch tokens, D the encoder's width, E the decoder's, K visual tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from .configuration_unit import UnitConfig
from .packing_unit import neighbours, padded


def embedding_width(config: UnitConfig) -> int:
    """Width E of the decoder's token embeddings, which visual tokens stand in for; OPT-350M's is not its hidden
    size."""
    return getattr(config.text_config, "word_embed_proj_dim", None) or config.text_config.hidden_size


class UnitQFormerConnector(nn.Module):
    """Q-Former [paper]: K learned queries attend to all encoder tokens. K visual tokens whatever the image's size."""

    def __init__(self, config: UnitConfig):
        super().__init__()
        connector = config.connector_config
        width = connector.hidden_size or config.text_config.hidden_size
        self.num_queries = connector.num_queries
        self.queries = nn.Parameter(torch.zeros(1, connector.num_queries, width))
        qformer_config = Blip2QFormerConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=connector.num_hidden_layers,
            num_attention_heads=connector.num_attention_heads,
            cross_attention_frequency=connector.cross_attention_frequency,
            encoder_hidden_size=config.vision_config.hidden_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        if width % connector.num_attention_heads:
            raise ValueError(
                f"The Q-Former's width ({width}) must be a multiple of its num_attention_heads "
                f"({connector.num_attention_heads})."
            )
        self.qformer = Blip2QFormerModel(qformer_config)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embedding_width(config))

    def num_visual_tokens(self, rows: int, cols: int) -> int:
        return self.num_queries

    def forward(
        self, prefix: torch.Tensor, patches: torch.Tensor, rows: int, cols: int, patch_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, S, D), (B, N, D), mask (B, N) or None -> (B, K, E), (B, K) True`."""
        tokens = torch.cat([prefix, patches], dim=1)
        mask = None
        if patch_mask is not None:
            mask = torch.cat([patch_mask.new_ones(prefix.shape[:2]), patch_mask], dim=1).long()
        attended = self.qformer(
            query_embeds=self.queries.expand(tokens.shape[0], -1, -1),
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask,
            return_dict=True,
        ).last_hidden_state
        visual = self.proj(self.norm(attended.to(self.norm.weight.dtype)))
        return visual, visual.new_ones(visual.shape[:2], dtype=torch.bool)

    def forward_packed(
        self, prefix: torch.Tensor, patches: torch.Tensor, grids: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, S, D), (sum N_i, D) -> (1, B * K, E), (1, B * K) True`.

        Keys and values are padded to the longest image here: transformers' Q-Former takes no packs. What the encoder
        did, the larger part by far, was not.
        """
        own, mask = padded(patches, [rows * cols for rows, cols in grids])
        visual, visual_mask = self(prefix, own, 0, 0, mask)
        return visual.flatten(0, 1)[None], visual_mask.flatten()[None]


class UnitMLPConnector(nn.Module):
    """Pixel-unshuffle and a two-layer MLP [ours]: u x u neighbouring patch tokens become one visual token, row by row.

    Grids that are not multiples of u are padded with zeros at the bottom and right. The encoder's prefix tokens are
    not passed on.
    """

    def __init__(self, config: UnitConfig):
        super().__init__()
        self.unshuffle = config.connector_config.unshuffle
        width = embedding_width(config)
        self.fc1 = nn.Linear(config.vision_config.hidden_size * self.unshuffle**2, width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width, width)

    def num_visual_tokens(self, rows: int, cols: int) -> int:
        return math.ceil(rows / self.unshuffle) * math.ceil(cols / self.unshuffle)

    def forward(
        self, prefix: torch.Tensor, patches: torch.Tensor, rows: int, cols: int, patch_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, S, D), (B, N, D), mask (B, N) or None -> (B, K, E), (B, K)`, True where a token belongs to its
        image."""
        batch, _, width = patches.shape
        unshuffle = self.unshuffle
        if patch_mask is None:
            patch_mask = patches.new_ones(batch, rows * cols, dtype=torch.bool)
        if unshuffle > 1:
            grid = patches.reshape(batch, rows, cols, width)
            mask = patch_mask.reshape(batch, rows, cols)
            pad_rows, pad_cols = -rows % unshuffle, -cols % unshuffle
            grid = F.pad(grid, (0, 0, 0, pad_cols, 0, pad_rows))
            mask = F.pad(mask, (0, pad_cols, 0, pad_rows))
            out_rows, out_cols = (rows + pad_rows) // unshuffle, (cols + pad_cols) // unshuffle
            # (B, rows', u, cols', u, D) -> (B, rows' * cols', u * u * D)
            grid = grid.reshape(batch, out_rows, unshuffle, out_cols, unshuffle, width).permute(0, 1, 3, 2, 4, 5)
            patches = grid.reshape(batch, out_rows * out_cols, unshuffle * unshuffle * width)
            mask = mask.reshape(batch, out_rows, unshuffle, out_cols, unshuffle).any(dim=4).any(dim=2)
            patch_mask = mask.flatten(1)
        return self.fc2(self.act(self.fc1(patches))), patch_mask

    def forward_packed(
        self, prefix: torch.Tensor, patches: torch.Tensor, grids: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, S, D), (sum N_i, D) -> (1, sum K_i, E), (1, sum K_i) True`."""
        if self.unshuffle > 1:
            places = neighbours(grids, self.unshuffle).to(patches.device)  # (sum K_i, u * u)
            patches = torch.cat([patches, patches.new_zeros(1, patches.shape[1])])  # the last one stands for padding
            patches = patches[places].flatten(1)
        visual = self.fc2(self.act(self.fc1(patches)))[None]
        return visual, visual.new_ones(visual.shape[:2], dtype=torch.bool)


CONNECTORS = {"qformer": UnitQFormerConnector, "mlp": UnitMLPConnector}
