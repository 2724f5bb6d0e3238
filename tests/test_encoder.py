"""The encoder: any size, positions as the released code looks them up, outputs that towers and probes rely on."""

import math

import numpy as np
import pytest
import torch
from tiny import vision_config
from torch import nn

from modeling_unit import UnitVisionModel, encoder_unit
from modeling_unit.encoder_unit import UnitPatchEmbeddings, sincos_positions


def encoder(**changes) -> UnitVisionModel:
    """Random weights large enough that positions and attention matter."""
    model = UnitVisionModel(vision_config(**changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 64), (16, 72), (72, 16), (8, 128), (96, 96)])
@torch.no_grad()
def test_any_multiple_of_the_patch_is_taken(height, width):
    output = encoder()(pixels(2, 3, height, width))
    assert output.last_hidden_state.shape == (2, 1 + height // 8 * width // 8, 32)
    assert output.pooler_output.shape == (2, 32)
    assert output.last_hidden_state.isfinite().all()


PADDED_SETTINGS = [
    {},
    {"image_size": 32},  # positions are resized to each image
    {"cpe_max_size": 24, "image_size": 24},  # a table of 3 x 3 that some of the images outgrow
    {"num_cls_tokens": 3, "register_multiple": 4},
    {"pooling": "mean", "use_final_norm": False},
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", PADDED_SETTINGS, ids=str)
@torch.no_grad()
def test_a_padded_batch_equals_one_by_one(settings, implementation):
    model = encoder(**settings)
    model.set_attn_implementation(implementation)
    shapes = [(4, 6), (2, 3), (1, 1), (3, 6), (4, 1)]
    batch = torch.full((len(shapes), 3, 32, 48), 7.0)  # what stands in the padding must not matter
    for index, (rows, cols) in enumerate(shapes):
        batch[index, :, : rows * 8, : cols * 8] = pixels(3, rows * 8, cols * 8, seed=index)
    together = model(batch, spatial_shapes=torch.tensor(shapes))
    for index, (rows, cols) in enumerate(shapes):
        alone = model(batch[index : index + 1, :, : rows * 8, : cols * 8])
        grid = together.last_hidden_state[index, 1:].unflatten(0, (4, 6))
        torch.testing.assert_close(grid[:rows, :cols].flatten(0, 1), alone.last_hidden_state[0, 1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            together.last_hidden_state[index, 0], alone.last_hidden_state[0, 0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(together.pooler_output[index], alone.pooler_output[0], atol=1e-5, rtol=0)
        assert (grid[rows:] == 0).all()
        assert (grid[:, cols:] == 0).all()


@torch.no_grad()
def test_full_spatial_shapes_change_nothing():
    model, batch = encoder(), pixels(2, 3, 16, 24)
    plain = model(batch).last_hidden_state
    shaped = model(batch, spatial_shapes=torch.tensor([[2, 3], [2, 3]])).last_hidden_state
    torch.testing.assert_close(plain, shaped, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(3, 16, 16), r"\(batch, 3, height, width\), got \(3, 16, 16\)"),
        (torch.zeros(1, 1, 3, 16, 16), "got"),
        (torch.zeros(1, 4, 16, 16), "has 4 channels, the model takes 3"),
        (torch.zeros(1, 16, 16, 3), "has 16 channels"),
        (torch.zeros(1, 3, 17, 16), "17 x 16 pixels; height and width must be multiples of the patch size 8"),
        (torch.zeros(1, 3, 16, 12), "16 x 12"),
        (torch.zeros(1, 3, 0, 16), "0 x 16"),
        (np.zeros((1, 3, 16, 16)), "must be a tensor"),
        (None, "must be a tensor"),
    ],
)
def test_wrong_pixels_are_refused(given, words):
    with pytest.raises(ValueError, match=words) as error:
        encoder()(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shapes", [[[2, 3]], [[2, 3], [3, 2]], [[2, 3], [0, 2]], [2, 3], [[2, 3, 1], [2, 3, 1]]])
def test_wrong_spatial_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="spatial_shapes must"):
        encoder()(torch.zeros(2, 3, 16, 24), spatial_shapes=torch.tensor(shapes))


# -- patches and positions -------------------------------------------------------------------------


def test_patches_are_flattened_channel_row_column():
    embeddings = encoder(patch_size=4, image_size=32, cpe_max_size=32).embeddings
    image = torch.arange(3 * 8 * 12).reshape(1, 3, 8, 12)
    expected = []
    for row in range(2):
        for col in range(3):
            values = []
            for channel in range(3):
                for y in range(4):
                    for x in range(4):
                        values.append(int(image[0, channel, 4 * row + y, 4 * col + x]))
            expected.append(values)
    assert embeddings.patchify(image)[0].tolist() == expected


def stretch_line(length: int, size: int) -> list[tuple[int, int, float]]:
    """For each of `size` points over `length` entries, ends on ends: entry below, entry above, share of the latter."""
    out = []
    for index in range(size):
        place = index * (length - 1) / (size - 1) if size > 1 else 0.0
        below = min(math.floor(place), length - 1)
        out.append((below, min(below + 1, length - 1), place - below))
    return out


def stretch(table: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Bilinear, corners on corners: `(R, C, D) -> (rows, cols, D)`."""
    out = np.zeros((rows, cols, table.shape[2]))
    for y, (top, bottom, down) in enumerate(stretch_line(table.shape[0], rows)):
        for x, (left, right, along) in enumerate(stretch_line(table.shape[1], cols)):
            upper = (1 - along) * table[top, left] + along * table[top, right]
            lower = (1 - along) * table[bottom, left] + along * table[bottom, right]
            out[y, x] = (1 - down) * upper + down * lower
    return out


def positions_by_the_rule(table: np.ndarray, rows: int, cols: int, nominal: int, patch: int) -> np.ndarray:
    """The evaluation rule as it is worded: grid = table: the table. Nominal size not the covered one: stretch to the
    longer side squared, keep the top left. Else: cut off, and stretch only what the cut cannot cover."""
    side = table.shape[0]
    if rows == side and cols == side:
        return table
    if nominal != side * patch:
        longest = max(rows, cols)
        return stretch(table, longest, longest)[:rows, :cols]
    cut = table[: min(rows, side), : min(cols, side)]
    if cut.shape[:2] == (rows, cols):
        return cut
    return stretch(cut, rows, cols)


@pytest.mark.parametrize("nominal", [40, 24], ids=["covers", "smaller"])
@pytest.mark.parametrize(
    ("rows", "cols"), [(5, 5), (3, 3), (9, 9), (2, 5), (5, 2), (3, 4), (4, 9), (9, 4), (7, 6), (1, 1), (1, 12)]
)
@torch.no_grad()
def test_positions_at_evaluation_follow_the_rule(rows, cols, nominal):
    model = encoder(cpe_max_size=40, image_size=nominal)
    table = model.embeddings.position_embedding[0].reshape(5, 5, 32).double().numpy()
    expected = positions_by_the_rule(table, rows, cols, nominal, 8).reshape(rows * cols, 32)
    np.testing.assert_allclose(model.embeddings.positions(rows, cols).numpy(), expected, atol=1e-6)


@torch.no_grad()
def test_tokens_are_projected_patches_plus_positions_behind_the_prefix():
    model = encoder(num_cls_tokens=2, register_multiple=4)
    embeddings = model.embeddings
    image = pixels(1, 3, 16, 24)
    tokens = embeddings(image, None)
    expected = embeddings.patchify(image) @ embeddings.projection.weight.T + embeddings.positions(2, 3)
    torch.testing.assert_close(tokens[:, 4:], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[0, :4], embeddings.prefix_tokens, atol=0, rtol=0)  # no positions on the prefix


def coordinate_embeddings(batch_side: int = 8, **settings) -> UnitPatchEmbeddings:
    """A table whose first two channels are the entry's own row and column, from 0 to 1.

    What a sample returns is then where it was taken, for bilinear sampling of a linear function is exact.
    """
    model = UnitVisionModel(vision_config(**settings)).train()
    line = torch.linspace(0, 1, batch_side)
    with torch.no_grad():
        table = model.embeddings.position_embedding.zero_().view(batch_side, batch_side, 32)
        table[..., 0], table[..., 1] = line[:, None], line[None, :]
    return model.embeddings


@torch.no_grad()
def test_training_crops_have_the_stated_statistics():
    count = 4000
    embeddings = coordinate_embeddings()
    grid = embeddings.cropped_positions(torch.tensor([[3, 5]]).expand(count, 2), 3, 5).view(count, 3, 5, 32)
    y, x = grid[..., 0], grid[..., 1]
    assert float(grid[..., :2].min()) >= -1e-5
    assert float(grid[..., :2].max()) <= 1 + 1e-5  # no crop reaches outside, so nothing is zero-padded
    # evenly spaced over the crop, rows along y only, columns along x only
    torch.testing.assert_close(y[:, 1, 0], (y[:, 0, 0] + y[:, 2, 0]) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, 0, 2], (x[:, 0, 0] + x[:, 0, 4]) / 2, atol=1e-5, rtol=0)
    assert torch.allclose(y[:, :, 0], y[:, :, 4], atol=1e-6)
    assert torch.allclose(x[:, 0], x[:, 2], atol=1e-6)
    height, width = y[:, 2, 0] - y[:, 0, 0], x[:, 0, 4] - x[:, 0, 0]
    whole = (height < 0.999) & (width < 0.999)  # those that no side was cut short of
    # the scale is the root of the crop's area, the aspect its width over its height
    scale, aspect = (height * width).sqrt(), width / height
    assert float(scale.min()) >= math.sqrt(0.1) * 0.99
    assert 0.74 < float(aspect[whole].min()) < 0.76
    assert 1.32 < float(aspect[whole].max()) < 1.34
    # below a scale of sqrt(3/4) no side can be cut short: up to 3/4 uniform from sqrt(0.1) = 0.316, mean 0.533
    small = scale < 0.749
    assert abs(float(small.float().mean()) - (0.749 - 0.316) / (1 - 0.316)) < 0.03
    assert abs(float(scale[small].mean()) - 0.533) < 0.01
    assert abs(float(aspect[small].log().mean())) < 0.02  # uniform in the logarithm
    assert abs(float(aspect[small].log().std()) - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    place = y[:, 0, 0][whole] / (1 - height[whole])  # anywhere it fits
    assert abs(float(place.mean()) - 0.5) < 0.02
    assert abs(float(place.std()) - 1 / math.sqrt(12)) < 0.02


@torch.no_grad()
def test_in_training_each_padded_image_gets_a_crop_over_its_own_grid():
    embeddings = coordinate_embeddings(cpe_min_scale=1.0, cpe_aspect=(1.0, 1.0))  # the crop is the whole table
    shapes = torch.tensor([[4, 6], [2, 3]])
    grid = embeddings.cropped_positions(shapes, 4, 6).view(2, 4, 6, 32)
    torch.testing.assert_close(grid[0, :, 0, 0], torch.tensor([0, 1 / 3, 2 / 3, 1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(grid[1, :2, 0, 0], torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(grid[1, 0, :3, 1], torch.tensor([0.0, 0.5, 1.0]), atol=1e-5, rtol=0)
    assert (grid[1, 2:] == 0).all()  # zero padding outside of the table


@torch.no_grad()
def test_training_drops_positions_of_whole_images():
    embeddings = coordinate_embeddings(cpe_drop_prob=0.3, cpe_crop=False)
    embeddings.position_embedding.fill_(1.0)
    tokens = embeddings(torch.zeros(3000, 3, 16, 16), None)[:, 1:]
    kept = tokens.sum(dim=(1, 2)) > 0
    assert abs(float(kept.float().mean()) - 0.7) < 0.03
    assert (tokens[kept] == 1).all()
    assert (tokens[~kept] == 0).all()


@torch.no_grad()
def test_nothing_is_random_at_evaluation():
    model, batch = encoder(cpe_drop_prob=0.9), pixels(2, 3, 16, 24)
    torch.testing.assert_close(model(batch).last_hidden_state, model(batch).last_hidden_state, atol=0, rtol=0)


def test_starting_positions_tell_all_places_apart():
    table = sincos_positions(20, 32)[0]
    distances = torch.cdist(table, table) + 9 * torch.eye(400)
    assert float(distances.min()) > 0.1
    assert sincos_positions(3, 30).shape == (1, 9, 30)  # widths that are no multiple of 4 are filled with zeros


# -- normalisation inside --------------------------------------------------------------------------


@torch.no_grad()
def test_pixels_are_normalised_inside_when_asked(tmp_path):
    inside = encoder(normalize_pixels=True, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    outside = UnitVisionModel(vision_config()).eval()
    outside.load_state_dict(inside.state_dict())
    image = pixels(1, 3, 16, 16).sigmoid()
    normalised = torch.stack([(image[:, c] - 0.1 * (c + 1)) / (0.5 + 0.1 * c) for c in range(3)], dim=1)
    expected = outside(normalised).last_hidden_state
    torch.testing.assert_close(inside(image).last_hidden_state, expected, atol=1e-5, rtol=0)
    inside.save_pretrained(tmp_path)  # the statistics are buffers that no file holds
    loaded = UnitVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(image).last_hidden_state, expected, atol=1e-5, rtol=0)


# -- outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, 0, 1, -2, [0, 1], []], ids=str)
@torch.no_grad()
def test_hidden_states_are_returned_for_anything_but_none_and_false(asked):
    """LLaVA in transformers asks with the number of a layer, 0 among them, or with a list."""
    model, batch = encoder(num_cls_tokens=3, register_multiple=8), pixels(2, 3, 16, 24)
    output = model(batch, output_hidden_states=asked)
    assert len(output.hidden_states) == 3  # the input of the first block and the output of both
    assert all(state.shape == (2, 1 + 6, 32) for state in output.hidden_states)
    first = model.embeddings(batch, None)
    torch.testing.assert_close(output.hidden_states[0][:, 1:], first[:, 8:], atol=0, rtol=0)
    torch.testing.assert_close(model.norm(output.hidden_states[-1]), output.last_hidden_state, atol=1e-6, rtol=0)


@torch.no_grad()
def test_hidden_states_are_not_returned_unasked():
    model, batch = encoder(), pixels(1, 3, 16, 16)
    assert model(batch).hidden_states is None
    assert model(batch, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(batch).hidden_states) == 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_attentions_are_distributions_over_all_tokens(implementation):
    model = encoder(num_cls_tokens=3, register_multiple=4)  # 4 prefix tokens
    model.set_attn_implementation(implementation)
    batch = pixels(2, 3, 16, 24)
    output = model(batch, output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 2, 4 + 6, 4 + 6)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 10), atol=1e-5, rtol=0)
        assert (weights >= 0).all()
    assert model.config._attn_implementation == implementation  # asking changes nothing for the next call
    torch.testing.assert_close(output.last_hidden_state, model(batch).last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_gets_no_attention():
    model = encoder()
    shapes = torch.tensor([[2, 2], [1, 1]])
    attentions = model(pixels(2, 3, 16, 16), spatial_shapes=shapes, output_attentions=True).attentions
    assert float(attentions[0][1, :, :, 2:].abs().max()) == 0.0
    torch.testing.assert_close(attentions[0][1, :, :, :2].sum(-1), torch.ones(2, 5), atol=1e-5, rtol=0)


@torch.no_grad()
def test_sdpa_equals_eager():
    model, batch = encoder(), pixels(2, 3, 32, 24)
    shapes = torch.tensor([[4, 3], [2, 2]])
    outputs = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs[implementation] = model(batch, spatial_shapes=shapes).last_hidden_state
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_exactly_one_prefix_token_comes_out():
    """Towers drop one token: with more class tokens and registers inside, still only the first is in the output."""
    model, batch = encoder(num_cls_tokens=3, register_multiple=8), pixels(1, 3, 16, 24)
    assert model.config.num_prefix_tokens == 8
    output = model(batch)
    assert output.last_hidden_state.shape == (1, 1 + 6, 32)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0], atol=0, rtol=0)
    tokens = model.embeddings(batch, None)
    for block in model.blocks:
        tokens, _ = block(tokens)
    tokens = model.norm(tokens)
    torch.testing.assert_close(output.last_hidden_state[:, 0], tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.last_hidden_state[:, 1:], tokens[:, 8:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_mean_pooling_is_over_the_patches():
    output = encoder(pooling="mean")(pixels(2, 3, 16, 24))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 1:].mean(dim=1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_final_norm_can_be_absent():
    model = encoder(use_final_norm=False)
    assert not any(name.startswith("norm.") for name in model.state_dict())
    output = model(pixels(1, 3, 16, 16), output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, output.hidden_states[-1], atol=0, rtol=0)


@torch.no_grad()
def test_tuples_hold_the_same_as_named_outputs():
    model, batch = encoder(), pixels(1, 3, 16, 16)
    tokens, pooled = model(batch, return_dict=False)
    torch.testing.assert_close(tokens, model(batch).last_hidden_state, atol=0, rtol=0)
    torch.testing.assert_close(pooled, model(batch).pooler_output, atol=0, rtol=0)


# -- one block against transformers' own layers by hand --------------------------------------------


@torch.no_grad()
def test_a_block_is_pre_norm_attention_and_mlp():
    block = encoder().blocks[0]
    tokens = pixels(1, 5, 32)
    qkv = block.attn.qkv(block.norm1(tokens))[0]
    mixed = []
    for head in range(2):
        query, key, value = (qkv[:, part * 32 + head * 16 : part * 32 + head * 16 + 16] for part in range(3))
        mixed.append((query @ key.T / 4.0).softmax(dim=-1) @ value)  # sqrt(16) = 4
    after = tokens + block.attn.proj(torch.cat(mixed, dim=-1))
    expected = after + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(after))))  # exact GELU
    torch.testing.assert_close(block(tokens)[0], expected, atol=1e-5, rtol=0)
    assert block.norm1.eps == 1e-6


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "quick_gelu"}], ids=str)
def test_what_inference_overwrites_changes_no_output(settings):
    model, batch = encoder(**settings), pixels(2, 3, 16, 24)
    expected = model(batch, output_hidden_states=True)
    with torch.no_grad():
        output = model(batch, output_hidden_states=True)
    for one, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_a_large_mlp_is_computed_in_parts(monkeypatch):
    model, batch = encoder(), pixels(2, 3, 32, 40)
    expected = model(batch).last_hidden_state
    monkeypatch.setattr(encoder_unit, "MLP_CHUNK", 48 * 9)  # parts of 9 of the 42 tokens
    rows = []
    monkeypatch.setattr(
        type(model.blocks[0].mlp.fc2),
        "forward",
        lambda self, given: rows.append(given.shape[-2]) or nn.functional.linear(given, self.weight, self.bias),
    )
    with torch.no_grad():
        output = model(batch).last_hidden_state
    in_parts = [each for length in (9, 9, 9, 9, 6) for each in (length, length)]  # fc1 and fc2 in turns
    assert [count for count in rows if count in (9, 6)] == in_parts * 2
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_hooks_keep_what_they_saw():
    model, batch = encoder(), pixels(1, 3, 16, 24)
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, given, out, name=name: seen.setdefault(name, []).append(out))
    model(batch)
    with torch.no_grad():
        model(batch)
    for name in ("blocks.0.attn.proj", "blocks.0.mlp", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"):
        torch.testing.assert_close(*seen[name], atol=0, rtol=0)


def test_autocast_sums_in_the_type_of_the_residual():
    model, batch = encoder(), pixels(1, 3, 16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(batch).last_hidden_state
        with torch.no_grad():
            output = model(batch).last_hidden_state
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


# -- training and dtypes ---------------------------------------------------------------------------


def test_gradient_checkpointing_gives_equal_gradients():
    model, batch = encoder(), pixels(2, 3, 16, 24)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.blocks)
        model.zero_grad()
        torch.manual_seed(3)  # the same crops of the positions
        model(batch).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_bf16_takes_float_pixels_and_stays_close():
    model, batch = encoder(), pixels(2, 3, 16, 24)
    expected = model(batch).last_hidden_state
    half = model.to(torch.bfloat16)(batch).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert float((half.float() - expected).abs().mean()) < 0.05  # outputs have a spread of 1 behind the norm
    assert float(expected.std()) > 0.5


@torch.no_grad()
def test_the_patch_embedding_is_computed_in_float32():
    """Large means in the pixels cancel in the embedding: bf16 products would lose what is left."""
    batch = 100 + pixels(1, 3, 8, 8).to(torch.bfloat16).float() * 0  # all the same, exactly representable
    model = encoder().to(torch.bfloat16)
    weight = model.embeddings.projection.weight
    expected = (batch.flatten() @ weight.float().T).to(torch.bfloat16)
    tokens = model.embeddings(batch.to(torch.bfloat16), None)[0, 1] - model.embeddings.positions(1, 1)[0]
    torch.testing.assert_close(tokens, expected, atol=0.13, rtol=0.01)
    single = encoder().embeddings
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast does not reach it either
        tokens = single(batch, None)[0, 1]
    torch.testing.assert_close(tokens, batch.flatten() @ single.projection.weight.T + single.positions(1, 1)[0])


@torch.no_grad()
def test_autocast_keeps_the_output_usable():
    model, batch = encoder(), pixels(1, 3, 16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch, spatial_shapes=torch.tensor([[2, 2]]))
    assert output.last_hidden_state.isfinite().all()


# -- saving ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_saving_and_loading_gives_equal_outputs(tmp_path):
    model, batch = encoder(num_cls_tokens=2, register_multiple=4), pixels(1, 3, 16, 72)
    model.save_pretrained(tmp_path)
    loaded, report = UnitVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded(batch).last_hidden_state, model(batch).last_hidden_state, atol=0, rtol=0)


def test_initial_weights_are_as_documented():
    model = UnitVisionModel(vision_config(hidden_size=64, intermediate_size=256, initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.ndim == 2 and "prefix" not in name:
            assert abs(float(parameter.detach().std()) - 0.02) < 0.003, name
    expected = sincos_positions(8, 64) * 0.02
    torch.testing.assert_close(model.embeddings.position_embedding.data, expected, atol=0, rtol=0)


@torch.no_grad()
def test_padding_is_masked_without_a_square():
    """Memory linear in the tokens, for padded batches too; the eager square gives the same."""
    model = UnitVisionModel(vision_config()).eval()
    batch, shapes, seen = torch.randn(2, 3, 16, 32), torch.tensor([[2, 4], [1, 3]]), []
    model.blocks[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1].shape))
    linear = model(batch, spatial_shapes=shapes).last_hidden_state
    tokens = model.config.num_prefix_tokens + 2 * 4
    assert seen == [(2, 1, 1, tokens)]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(batch, spatial_shapes=shapes).last_hidden_state, linear, atol=1e-5, rtol=0)
