"""Connectors: from patch tokens to visual tokens of the decoder's width."""

import pytest
import torch
from tiny import OPT, unit_config
from torch import nn

from modeling_unit.connector_unit import CONNECTORS, UnitMLPConnector, UnitQFormerConnector


def bare_mlp(unshuffle: int) -> UnitMLPConnector:
    """The MLP connector with its layers taken out: what remains is where the tokens go."""
    connector = UnitMLPConnector(unit_config(unshuffle=unshuffle))
    connector.fc1 = connector.act = connector.fc2 = nn.Identity()
    return connector


def qformer(**changes) -> UnitQFormerConnector:
    connector = UnitQFormerConnector(unit_config(connector="qformer", **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return connector


def numbered(rows: int, cols: int) -> torch.Tensor:
    """Patch tokens of width 1 whose value is 10 * row + column."""
    return (10.0 * torch.arange(1, rows + 1)[:, None] + torch.arange(1, cols + 1)).reshape(1, rows * cols, 1)


def test_unshuffle_folds_squares_row_by_row():
    visual, mask = bare_mlp(2)(torch.zeros(1, 1, 1), numbered(2, 4), 2, 4, None)
    assert visual[0].tolist() == [[11, 12, 21, 22], [13, 14, 23, 24]]
    assert mask.tolist() == [[True, True]]


def test_unshuffle_pads_odd_grids_with_zeros_at_the_bottom_and_right():
    connector = bare_mlp(2)
    visual, mask = connector(torch.zeros(1, 1, 1), numbered(3, 3), 3, 3, None)
    assert visual[0].tolist() == [[11, 12, 21, 22], [13, 0, 23, 0], [31, 32, 0, 0], [33, 0, 0, 0]]
    assert mask.tolist() == [[True] * 4]
    assert connector.num_visual_tokens(3, 3) == 4


def test_unshuffle_keeps_the_channels_of_a_patch_together():
    patches = torch.tensor([[[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [4.0, -4.0]]])  # a 2 x 2 grid of width 2
    visual, _ = bare_mlp(2)(torch.zeros(1, 1, 2), patches, 2, 2, None)
    assert visual[0].tolist() == [[1, -1, 2, -2, 3, -3, 4, -4]]


def test_unshuffle_of_one_keeps_every_token():
    patches = numbered(2, 3)
    visual, mask = bare_mlp(1)(torch.zeros(1, 1, 1), patches, 2, 3, None)
    assert torch.equal(visual, patches)
    assert mask.all()


def test_a_folded_token_belongs_to_the_image_if_any_of_its_patches_does():
    grid = torch.zeros(1, 4, 4, dtype=torch.bool)
    grid[:, :3, :1] = True  # an image of 3 x 1 patches in a padded batch of 4 x 4
    _, mask = bare_mlp(2)(torch.zeros(1, 1, 1), numbered(4, 4), 4, 4, grid.flatten(1))
    assert mask.tolist() == [[True, False, True, False]]  # (rows / 2, cols / 2) = (2, 1): one column of two


def test_mlp_is_two_layers_with_gelu():
    connector = UnitMLPConnector(unit_config(unshuffle=1))
    patches = torch.randn(2, 6, 32)
    visual, _ = connector(torch.zeros(2, 1, 32), patches, 2, 3, None)
    expected = connector.fc2(nn.functional.gelu(connector.fc1(patches)))
    torch.testing.assert_close(visual, expected)
    assert visual.shape == (2, 6, 32)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (8, 2)])
@torch.no_grad()
def test_qformer_gives_its_queries_whatever_the_size(rows, cols):
    connector = qformer()
    visual, mask = connector(torch.randn(2, 1, 32), torch.randn(2, rows * cols, 32), rows, cols, None)
    assert visual.shape == (2, 5, 32)
    assert mask.shape == (2, 5)
    assert mask.all()
    assert connector.num_visual_tokens(rows, cols) == 5


@torch.no_grad()
def test_qformer_does_not_look_at_padding():
    connector = qformer()
    prefix, patches = torch.randn(1, 1, 32), torch.randn(1, 6, 32)
    mask = torch.tensor([[True, True, False, True, True, False]])  # 2 x 2 in a grid of 2 x 3
    visual, _ = connector(prefix, patches, 2, 3, mask)
    changed = patches.masked_fill(~mask.unsqueeze(-1), 50.0)
    torch.testing.assert_close(connector(prefix, changed, 2, 3, mask)[0], visual, atol=1e-5, rtol=0)
    alone, _ = connector(prefix, patches[:, mask[0]], 2, 2, None)
    torch.testing.assert_close(alone, visual, atol=1e-5, rtol=0)


@torch.no_grad()
def test_qformer_looks_at_the_prefix_and_at_every_patch():
    connector = qformer()
    prefix, patches = torch.randn(1, 1, 32), torch.randn(1, 4, 32)
    visual, _ = connector(prefix, patches, 2, 2, None)
    assert not torch.allclose(connector(prefix + 1, patches, 2, 2, None)[0], visual, atol=1e-3)
    for index in range(4):
        changed = patches.clone()
        changed[:, index] += 1
        assert not torch.allclose(connector(prefix, changed, 2, 2, None)[0], visual, atol=1e-4)


@torch.no_grad()
def test_queries_differ_from_each_other():
    visual, _ = qformer()(torch.randn(1, 1, 32), torch.randn(1, 4, 32), 2, 2, None)
    distances = torch.cdist(visual[0], visual[0]) + 9 * torch.eye(5)
    assert float(distances.min()) > 0.01


@pytest.mark.parametrize("kind", sorted(CONNECTORS))
def test_every_weight_gets_a_gradient(kind):
    connector = CONNECTORS[kind](unit_config(connector=kind, unshuffle=2))
    if kind == "qformer":
        nn.init.normal_(connector.queries)
    visual, _ = connector(torch.randn(1, 1, 32), torch.randn(1, 6, 32), 2, 3, None)
    (visual * torch.randn(visual.shape)).sum().backward()
    still = [name for name, parameter in connector.named_parameters() if parameter.grad is None]
    assert not still


def test_qformer_of_a_width_its_heads_do_not_divide_is_refused():
    config = unit_config(connector="qformer")
    config.connector_config.num_attention_heads = 3
    with pytest.raises(ValueError, match=r"width \(32\) must be a multiple of its num_attention_heads \(3\)"):
        UnitQFormerConnector(config)


@pytest.mark.parametrize("kind", sorted(CONNECTORS))
@torch.no_grad()
def test_visual_tokens_have_the_width_of_the_decoders_embeddings(kind):
    """OPT-350M embeds 512 channels and works with 1024: visual tokens stand in for embeddings."""
    config = unit_config(connector=kind, text=OPT | {"word_embed_proj_dim": 24})
    connector = CONNECTORS[kind](config)
    visual, _ = connector(torch.randn(1, 1, 32), torch.randn(1, 4, 32), 2, 2, None)
    assert visual.shape[-1] == 24
