"""Images of different sizes in one pack: each gets what it would get alone, and nothing is padded."""

import pytest
import torch
from tiny import image_processor, noise, processor, unit_model, vision_config

from modeling_unit import UnitVisionModel
from modeling_unit.packing_unit import (
    PackedLayout,
    flex_block_mask,
    pack_images,
    packed_method,
    patchify,
    split_packed,
    unpatchify,
)

GRIDS = [(4, 6), (2, 3), (1, 1), (3, 8), (6, 4), (1, 9), (2, 3)]  # three of 24 patches, two of 6: runs of equal length
SETTINGS = [
    {},
    {"image_size": 32},  # positions are resized to each image
    {"cpe_max_size": 24, "image_size": 24},  # a table of 3 x 3 that most of the images outgrow
    {"num_cls_tokens": 3, "register_multiple": 8},
    {"pooling": "mean", "use_final_norm": False},
    {"normalize_pixels": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
]


def shaken(model):
    """Random weights large enough that positions and attention matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def encoder(**changes) -> UnitVisionModel:
    return shaken(UnitVisionModel(vision_config(**changes)))


def images(grids=GRIDS) -> list[torch.Tensor]:
    return [
        torch.randn(3, rows * 8, cols * 8, generator=torch.Generator().manual_seed(index))
        for index, (rows, cols) in enumerate(grids)
    ]


def close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# -- the same as one by one ------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_a_pack_equals_one_by_one(settings, implementation):
    model = encoder(**settings)
    model.set_attn_implementation(implementation)
    output = model(**pack_images(images(), 8), output_hidden_states=True)
    assert output.last_hidden_state.shape == (sum(1 + rows * cols for rows, cols in GRIDS), 32)
    assert output.cu_seqlens.tolist() == [0, 25, 32, 34, 59, 84, 94, 101]
    hidden = [output.split(state) for state in output.hidden_states]
    for index, (image, own) in enumerate(zip(images(), output.split(), strict=True)):
        alone = model(image[None], output_hidden_states=True)
        close(own, alone.last_hidden_state[0])
        close(output.pooler_output[index], alone.pooler_output[0])
        assert len(hidden) == len(alone.hidden_states) == 3
        for layer, state in enumerate(alone.hidden_states):
            close(hidden[layer][index], state[0])


@torch.no_grad()
def test_one_image_is_a_pack_too():
    model, (image,) = encoder(), images([(3, 5)])
    output = model(**pack_images([image], 8))
    close(output.last_hidden_state, model(image[None]).last_hidden_state[0])
    assert output.pooler_output.shape == (1, 32)


@torch.no_grad()
def test_equal_sizes_are_one_run_and_equal_the_batch():
    model, batch = encoder(), torch.stack(images([(3, 5)] * 4))
    output = model(**pack_images(list(batch), 8))
    close(output.last_hidden_state.view(4, 16, 32), model(batch).last_hidden_state)
    assert PackedLayout([(3, 5)] * 4, 1, torch.device("cpu")).runs == [(4, 16)]


@torch.no_grad()
def test_an_image_does_not_change_with_its_neighbours():
    model = encoder()
    first, second, other = images([(4, 6), (2, 3), (4, 6)])
    one = model(**pack_images([first, second], 8)).split()[0]
    two = model(**pack_images([other, first], 8)).split()[1]
    close(one, two)


@torch.no_grad()
def test_images_come_back_in_the_order_given():
    model = encoder(num_cls_tokens=2)
    given, grids = images(), list(GRIDS)
    forwards = model(**pack_images(given, 8)).split()
    backwards = model(**pack_images(given[::-1], 8)).split()
    for one, other, (rows, cols) in zip(forwards, backwards[::-1], grids, strict=True):
        assert one.shape == (1 + rows * cols, 32)
        close(one, other)


@torch.no_grad()
def test_patch_tokens_come_back_as_maps():
    model = encoder()
    output = model(**pack_images(images(), 8))
    maps = output.spatial()
    assert [tuple(each.shape) for each in maps] == [(*grid, 32) for grid in GRIDS]
    close(maps[3][2, 5], model(images()[3][None]).last_hidden_state[0, 1 + 2 * 8 + 5])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_attentions_are_those_of_each_image_alone(implementation):
    model = encoder(num_cls_tokens=3, register_multiple=4)
    model.set_attn_implementation(implementation)
    output = model(**pack_images(images(), 8), output_attentions=True)
    assert len(output.attentions) == 2
    for index, image in enumerate(images()):
        alone = model(image[None], output_attentions=True)
        for layer in range(2):
            close(output.attentions[layer][index], alone.attentions[layer][0])


@torch.no_grad()
def test_tuples_hold_the_same_as_named_outputs():
    model, pack = encoder(), pack_images(images(), 8)
    tokens, pooled, *_ = model(**pack, return_dict=False)
    close(tokens, model(**pack).last_hidden_state, atol=0)
    close(pooled, model(**pack).pooler_output, atol=0)


# -- training --------------------------------------------------------------------------------------


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_gradients_are_the_sum_of_those_one_by_one(settings):
    model = encoder(**settings)  # in evaluation mode: no random crops
    pack = pack_images(images(), 8)
    together = gradients(model, lambda: model(**pack).last_hidden_state.pow(3).sum())
    alone = gradients(model, lambda: sum(model(each[None]).last_hidden_state.pow(3).sum() for each in images()))
    for name, gradient in alone.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(together[name], gradient, atol=1e-3, rtol=1e-4, msg=name)


def test_in_training_a_seed_gives_each_image_the_crop_that_it_gets_in_a_padded_batch():
    model = encoder(cpe_drop_prob=0.5).train()
    padded = torch.zeros(len(GRIDS), 3, 48, 72)
    for row, image in zip(padded, images(), strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    torch.manual_seed(5)
    together = model(padded, spatial_shapes=torch.tensor(GRIDS)).last_hidden_state
    torch.manual_seed(5)
    output = model(**pack_images(images(), 8))
    for own, row, (rows, cols) in zip(output.split(), together, GRIDS, strict=True):
        close(own[0], row[0])
        close(own[1:].unflatten(0, (rows, cols)), row[1:].unflatten(0, (6, 9))[:rows, :cols])


@torch.no_grad()
def test_crops_of_a_pack_differ_by_image_and_follow_the_seed():
    model, pack = encoder(cpe_drop_prob=0.0).train(), pack_images([images()[0]] * 3, 8)
    torch.manual_seed(1)
    first = model(**pack).last_hidden_state
    torch.manual_seed(1)
    close(model(**pack).last_hidden_state, first, atol=0)
    assert float((model(**pack).last_hidden_state - first).abs().max()) > 1e-3  # the next draw
    one, other, _ = split_packed(first, torch.tensor([0, 25, 50, 75]))
    assert float((one - other).abs().max()) > 1e-3


def test_gradient_checkpointing_gives_equal_gradients():
    model, pack = encoder().train(), pack_images(images(), 8)

    def loss():
        torch.manual_seed(3)  # the same crops of the positions
        return model(**pack).last_hidden_state.square().sum()

    plain = gradients(model, loss)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@torch.no_grad()
def test_bf16_stays_close():
    model, pack = encoder(), pack_images(images(), 8)
    expected = model(**pack).last_hidden_state
    half = model.to(torch.bfloat16)(**pack).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert float((half.float() - expected).abs().mean()) < 0.05  # outputs have a spread of 1 behind the norm


@torch.no_grad()
def test_autocast_keeps_the_output_usable():
    model, pack = encoder(), pack_images(images(), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**pack)
    assert output.last_hidden_state.isfinite().all()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "grids", "words"),
    [
        (torch.zeros(6, 192), [[2, 4]], "holds 6 patches, but image_grid_hw describes 8"),
        (torch.zeros(6, 192), [[2, 2]], "holds 6 patches, but image_grid_hw describes 4"),
        (torch.zeros(6, 191), [[2, 3]], "holds 191 values, the model takes 192"),
        (torch.zeros(0, 192), [[2, 3]], "The pack is empty"),
        (torch.zeros(6, 192), torch.zeros(0, 2, dtype=torch.long), "The pack is empty"),
        (torch.zeros(6, 192), [[2, 3], [0, 1]], "at least 1 row"),
        (torch.zeros(6, 192), [[-2, -3]], "at least 1 row"),
        (torch.zeros(6, 192), [2, 3], r"whole numbers \(images, 2\)"),
        (torch.zeros(6, 192), [[1, 2, 3]], r"whole numbers \(images, 2\)"),
        (torch.zeros(6, 192), [[2.0, 3.0]], r"whole numbers \(images, 2\)"),
        (torch.zeros(1, 3, 16, 24), [[2, 3]], r"packed patches \(total_patches, 192\), got \(1, 3, 16, 24\)"),
        (None, [[2, 3]], "packed patches"),
    ],
)
def test_packs_that_are_none_are_refused(patches, grids, words):
    with pytest.raises(ValueError, match=words) as error:
        encoder()(patches, image_grid_hw=torch.as_tensor(grids))
    assert "\n" not in str(error.value)


def test_packed_patches_without_their_grids_are_refused():
    with pytest.raises(ValueError, match="Packed patches need image_grid_hw"):
        encoder()(torch.zeros(6, 192))


def test_a_batch_cannot_be_padded_and_packed():
    with pytest.raises(ValueError, match="not both"):
        encoder()(torch.zeros(6, 192), torch.tensor([[2, 3]]), image_grid_hw=torch.tensor([[2, 3]]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "The pack is empty"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 17, 16)], "Image 1 of the pack is 17 x 16 pixels"),
        ([torch.zeros(3, 0, 16)], "0 x 16"),
        ([torch.zeros(1, 3, 16, 16)], r"must be a tensor \(channels, height, width\)"),
        ([torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)], "same number of channels"),
    ],
)
def test_images_that_cannot_be_packed_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        pack_images(given, 8)


# -- parts -----------------------------------------------------------------------------------------


def test_patches_become_pixels_again():
    image = torch.randn(2, 3, 16, 24)
    close(unpatchify(patchify(image, 8), 2, 3, 8), image, atol=0)


@pytest.mark.parametrize("lengths", [[5, 7, 12], [130, 3, 3, 260], [128, 128], [1], [40] * 20], ids=str)
def test_the_block_mask_holds_what_each_sequence_needs(lengths):
    """Seen through its blocks, and through the rule inside them, the mask is block-diagonal by sequence."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total, block = sum(lengths), 16
    mask = flex_block_mask(bounds, block)
    owner = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)])
    expected = owner[:, None] == owner[None, :]
    places = torch.arange(total)
    by_rule = mask.mask_mod(0, 0, places[:, None], places[None, :])
    by_blocks = mask.to_dense()[0, 0].bool().repeat_interleave(block, 0).repeat_interleave(block, 1)[:total, :total]
    assert torch.equal(by_rule & by_blocks, expected)
    counted = expected.new_zeros(-(-total // block) * block, -(-total // block) * block)
    counted[:total, :total] = expected
    wanted = counted.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), wanted)  # and no block that nobody needs


def test_what_a_pack_is_attended_with():
    cpu = torch.device("cpu")
    assert packed_method("sdpa", cpu, torch.float32, 0.0) == "runs"
    assert packed_method("eager", cpu, torch.float32, 0.0) == "runs"
    assert packed_method("flex_attention", cpu, torch.float32, 0.0) == "runs"
    assert packed_method("flash_attention_2", cpu, torch.bfloat16, 0.0) == "flash"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_pack_equals_one_by_one_on_a_gpu(dtype):
    model = encoder(num_cls_tokens=3, register_multiple=4).to("cuda", dtype)
    pack = {key: value.cuda() for key, value in pack_images(images(), 8).items()}
    for own, image in zip(model(**pack).split(), images(), strict=True):
        expected = model(image[None].cuda()).last_hidden_state[0]
        close(own.float(), expected.float(), atol=1e-4 if dtype == torch.float32 else 0.1)
