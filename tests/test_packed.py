"""Images of different sizes in one pack: each gets what it would get alone, and nothing is padded."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    IMAGE_TOKEN,
    QWEN3,
    document_row,
    draw_page,
    image_processor,
    noise,
    picture_row,
    processor,
    unit_model,
    vision_config,
)
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_unit import Reader, UnitForConditionalGeneration, UnitModel, UnitVisionModel, packing_unit
from modeling_unit.layout_unit import LayoutSettings
from modeling_unit.packing_unit import (
    PackedLayout,
    flex_block_mask,
    neighbours,
    pack_images,
    packed_method,
    patchify,
    split_packed,
    unpatchify,
)
from training.collator import NUM_CHARACTER_CLASSES, GroupCollator
from training.data.mixture import GroupArguments, GroupPlan, MixtureDataset, SourceArguments
from training.data.schema import write_shards
from training.packing import repacked
from training.trainer import IntraScaleTrainer

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


def by_sequence(query, key, value, bounds):
    """Attention within each sequence, `(T, heads, d)`, written out."""
    out = torch.empty_like(query)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = [each[start:stop].transpose(0, 1) for each in (query, key, value)]  # (heads, L, d)
        scores = own[0] @ own[1].transpose(1, 2) / query.shape[-1] ** 0.5
        out[start:stop] = (scores.softmax(dim=-1) @ own[2]).transpose(0, 1)
    return out


@pytest.mark.parametrize("method", ["varlen", "flash", "flex"])
@torch.no_grad()
def test_kernels_for_packs_are_given_what_they_need(method, monkeypatch):
    """Each kernel that needs a GPU stood in for by the same in plain torch, behind the arguments that it takes."""
    model, pack = encoder(num_cls_tokens=3, register_multiple=4), pack_images(images(), 8)
    expected = model(**pack).last_hidden_state
    longest = 4 + max(rows * cols for rows, cols in GRIDS)

    def varlen(query, key, value, bounds, same, most, also):
        assert bounds is same
        assert bounds.dtype == torch.int32
        assert most == also == longest
        return by_sequence(query, key, value, bounds)

    def attend(module, query, key, value, mask, scaling, dropout, is_causal, **given):
        tokens = [each[0].transpose(0, 1) for each in (query, key, value)]
        if method == "flash":
            assert mask is None
            assert given["max_length_q"] == given["max_length_k"] == longest
            return by_sequence(*tokens, given["cu_seq_lens_q"])[None], None
        places = torch.arange(query.shape[2])
        seen = mask.mask_mod(0, 0, places[:, None], places[None, :])
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
        return (scores.softmax(dim=-1) @ value).transpose(1, 2), None

    monkeypatch.setattr(packing_unit, "packed_method", lambda *_: method)
    monkeypatch.setattr(packing_unit, "varlen_attn", varlen)
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend)
    close(model(**pack).last_hidden_state, expected)


def test_what_a_pack_is_attended_with():
    cpu = torch.device("cpu")
    assert packed_method("sdpa", cpu, torch.float32, 64) == "runs"
    assert packed_method("eager", cpu, torch.float32, 64) == "runs"
    assert packed_method("flex_attention", cpu, torch.float32, 64) == "runs"
    assert packed_method("flash_attention_2", cpu, torch.bfloat16, 64) == "flash"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_pack_equals_one_by_one_on_a_gpu(dtype):
    model = encoder(num_cls_tokens=3, register_multiple=4).to("cuda", dtype)
    pack = {key: value.cuda() for key, value in pack_images(images(), 8).items()}
    for own, image in zip(model(**pack).split(), images(), strict=True):
        expected = model(image[None].cuda()).last_hidden_state[0]
        close(own.float(), expected.float(), atol=1e-4 if dtype == torch.float32 else 0.1)


# -- from pictures to packs ------------------------------------------------------------------------


PICTURES = [(50, 22), (20, 30), (64, 64), (9, 70)]  # width and height


@pytest.mark.parametrize("kind", ["natural", "document"])
def test_the_image_processor_packs_the_pixels_that_it_would_pad(kind):
    pictures = [noise(*size, seed=index) for index, size in enumerate(PICTURES)]
    read = image_processor()
    padded, packed = (read(pictures, kind=kind, return_packed=each) for each in (False, True))
    assert set(packed) == {"pixel_values", "image_grid_hw"}
    assert torch.equal(packed["image_grid_hw"], padded["spatial_shapes"])
    assert packed["pixel_values"].dtype == torch.float32
    counts = packed["image_grid_hw"].prod(dim=1).tolist()
    for row, patches, (rows, cols) in zip(
        padded["pixel_values"], packed["pixel_values"].split(counts), packed["image_grid_hw"].tolist(), strict=True
    ):
        assert torch.equal(unpatchify(patches[None], rows, cols, 8)[0], row[:, : rows * 8, : cols * 8])


def test_a_pack_from_the_image_processor_is_the_one_of_the_tensors():
    pictures = [noise(*size, seed=index) for index, size in enumerate(PICTURES)]
    read = image_processor()
    packed = read(pictures, return_packed=True)
    single = [read(picture)["pixel_values"][0] for picture in pictures]
    for name, value in pack_images(single, 8).items():
        assert torch.equal(packed[name], value)


# -- connectors, language decoder, vision decoder --------------------------------------------------


def pages(processor, packed: bool, task="ocr"):
    pictures = [noise(*size, seed=index) for index, size in enumerate(PICTURES)]
    return processor(images=pictures, task=task, return_packed=packed)


def test_neighbouring_patches_by_hand():
    # 2 x 3 patches numbered 0 to 5, then 1 x 1, number 6; 7 stands for padding
    assert neighbours([(2, 3), (1, 1)], 2).tolist() == [[0, 1, 3, 4], [2, 7, 5, 7], [6, 7, 7, 7]]


@pytest.mark.parametrize(("connector", "unshuffle"), [("mlp", 1), ("mlp", 2), ("mlp", 3), ("qformer", 1)])
@torch.no_grad()
def test_a_pack_is_read_as_the_padded_batch_is(connector, unshuffle):
    model = shaken(unit_model(connector=connector, unshuffle=unshuffle))
    read = processor(connector=connector, unshuffle=unshuffle)
    padded, packed = pages(read, False), pages(read, True)
    assert torch.equal(padded["input_ids"], packed["input_ids"])
    one, other = model(**padded), model(**packed)
    real = padded["attention_mask"].bool()
    close(other.logits[real], one.logits[real], atol=1e-4)
    features = other.image_features
    close(
        features.visual_tokens[features.visual_mask], one.image_features.visual_tokens[one.image_features.visual_mask]
    )
    close(features.patches[0], one.image_features.patches[one.image_features.patch_mask])
    close(features.prefix, one.image_features.prefix)


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams"],
)
@torch.no_grad()
def test_generation_from_a_pack_is_that_from_the_padded_batch(settings):
    model = shaken(unit_model(text=QWEN3)).double()
    read = processor()
    texts = [model.generate(**pages(read, packed), max_new_tokens=6, **settings) for packed in (False, True)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["clip_vision_model", "dinov2_with_registers", "siglip2_vision_model"])
@torch.no_grad()
def test_encoders_of_transformers_take_packs_too(name):
    vision = {"model_type": name, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    vision |= {"intermediate_size": 48, "image_size": 32}
    vision |= {"num_patches": 16} if name == "siglip2_vision_model" else {}
    model = shaken(unit_model(vision=vision))
    prefix, patches = model.encode_packed(**pack_images(images(), 8))
    alone = UnitModel(model.config).eval()
    alone.vision_model.load_state_dict(model.vision_model.state_dict())
    output = alone(**pack_images(images(), 8))
    for index, (own, image, (rows, cols)) in enumerate(zip(output.split(), images(), GRIDS, strict=True)):
        one_prefix, one_patches, _, _ = model.encode(image[None])
        close(prefix[index], one_prefix[0])
        close(own, torch.cat([one_prefix[0], one_patches[0]]))
        close(output.spatial()[index], one_patches[0].unflatten(0, (rows, cols)))
    close(patches, torch.cat([model.encode(image[None])[1][0] for image in images()]))


@torch.no_grad()
def test_a_full_checkpoints_encoder_takes_packs():
    model = shaken(UnitModel(unit_model().config))
    output = model(**pack_images(images(), 8))
    close(output.split()[3], model(images()[3][None]).last_hidden_state[0])


@pytest.mark.parametrize("finer", [False, True])
def test_the_vision_loss_of_a_pack_is_the_mean_over_all_tokens(finer):
    """By hand from the images one by one; `finer`: the teacher saw them at half the side."""
    model = shaken(unit_model())
    grids = [(4, 6), (2, 2), (4, 6)]
    seen = [(rows // 2, cols // 2) if finer else (rows, cols) for rows, cols in grids]
    targets = [torch.randn(1 + rows * cols, 32) for rows, cols in seen]
    sums, count = torch.zeros(3), 0
    for image, target, grid in zip(images(grids), targets, seen, strict=True):
        output = model(pixel_values=image[None], teacher_features=target[None], teacher_grid=grid)
        terms = torch.stack([output.vision_loss, output.vision_cosine, output.vision_l1])
        sums, count = sums + terms * len(target), count + len(target)
    packed = model(
        **pack_images(images(grids), 8),
        teacher_features=torch.cat(targets)[None],
        teacher_grid=torch.tensor(seen),
    )
    close(torch.stack([packed.vision_loss, packed.vision_cosine, packed.vision_l1]), sums / count)


# -- reading ---------------------------------------------------------------------------------------


def test_a_page_reads_alike_packed_and_padded():
    model = unit_model(text=QWEN3, model_class=UnitForConditionalGeneration).double()
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    settings = LayoutSettings(
        document_area=4096, max_width=128, patch_size=8, max_lines=1, x_height=6.0, min_x_height=5.0
    )
    page = Image.new("L", (160, 120), 245)
    for top, text in ((4, "a quiet stone"), (40, "moss"), (80, "under the leaning fir")):
        page.paste(draw_page(text, 150, 20, 12), (4, top))
    found = []
    for packed in (False, True):
        reader = Reader(model, processor(), settings=settings, packed=packed)
        found.append((reader.read(page), reader.describe([noise(50, 22), noise(20, 30)], max_new_tokens=5)))
    assert len(found[0][0].blocks) > 1
    for (page, captions), (other, others) in [found]:
        assert page.text == other.text
        assert page.confidence == pytest.approx(other.confidence, rel=1e-5)
        assert [caption.text for caption in captions] == [caption.text for caption in others]


def test_reading_packs_unless_told_otherwise():
    model = unit_model(text=QWEN3, model_class=UnitForConditionalGeneration)
    assert Reader(model, processor()).packed
    assert not Reader(model, processor(), packed=False).packed
    assert not Reader(object(), processor()).packed  # a model that knows nothing of packs


# -- training --------------------------------------------------------------------------------------


ROWS = [document_row("one\ntwo", 48, 16, 0), document_row("much longer", 90, 30, 1), document_row("x", 10, 8, 2)]


def test_a_pack_of_rows_holds_what_each_row_alone_holds():
    read = processor()
    alone = [GroupCollator(read, "document", 4, 2)([row], None) for row in ROWS]
    pack = GroupCollator(read, "document", 4, 2, packed=True)(ROWS, None)
    assert pack["image_grid_hw"].tolist() == [[2, 6], [4, 12], [1, 2]]
    counts = pack["image_grid_hw"].prod(dim=1).tolist()
    patches, classes = pack["pixel_values"].split(counts), pack["character_classes"][0].split(counts)
    assert pack["input_ids"].shape[1] % 32 == 0
    for index, one in enumerate(alone):
        assert torch.equal(patches[index], patchify(one["pixel_values"], 8)[0])
        assert torch.equal(classes[index], one["character_classes"][0])
        used = int(one["attention_mask"].sum())
        fills = {"input_ids": 0, "labels": -100, "attention_mask": 0, "token_places": -1}
        for name, fill in fills.items():
            assert torch.equal(pack[name][index, :used], one[name][0, :used]), name
            assert (pack[name][index, used:] == fill).all(), name
        assert int((pack["input_ids"][index] == IMAGE_TOKEN).sum()) == counts[index]


def test_pictures_at_x4_bring_their_pack_at_x1():
    pack = GroupCollator(processor(), "natural", 4, packed=True)([picture_row("a", seed=1), picture_row("b")], None)
    assert pack["image_grid_hw"].tolist() == [[8, 8]] * 2
    assert pack["teacher_grid"].tolist() == [[4, 4]] * 2
    assert pack["teacher_pixel_values"].shape == (32, 192)


def test_the_language_loss_of_a_pack_is_the_mean_over_all_labels():
    model, read = shaken(unit_model(text=QWEN3)), processor()
    total = count = 0.0
    for row in ROWS:
        batch = GroupCollator(read, "document", 4)([row], None)
        batch.pop("token_places")
        labels = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).language_loss.item() * labels, count + labels
    pack = GroupCollator(read, "document", 4, packed=True)(ROWS, None)
    pack.pop("token_places")
    assert model(**pack).language_loss.item() == pytest.approx(total / count, rel=1e-4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("packs")
    sizes = [(40, 8), (64, 16), (100, 8), (130, 24)]
    documents = [document_row(f"row {index}", *sizes[index % 4], seed=index) for index in range(40)]
    write_shards(documents, root / "document")
    write_shards([picture_row(f"thing {index}", seed=index) for index in range(12)], root / "natural")
    return root


def plan(shards, kind="document", seed=3, slots=0, **given) -> GroupPlan:
    settings = given or {"patches": 64}
    arguments = GroupArguments(
        kind, 4 if kind == "document" else 1, packed=True, sources=[SourceArguments(str(shards / kind))], **settings
    )
    return GroupPlan(arguments, GroupCollator(processor(), kind, arguments.scale, slots, packed=True), seed, window=4)


def test_packs_mix_sizes_and_keep_within_their_patches(shards):
    group = plan(shards)
    grids = [group[step]["image_grid_hw"] for step in range(12)]
    assert all(int(each.prod(dim=1).sum()) <= 64 for each in grids)
    assert any(len({tuple(grid) for grid in each.tolist()}) > 1 for each in grids)
    assert np.mean([int(each.prod(dim=1).sum()) for each in grids]) > 40
    assert [group.batch(step) for step in range(12)] == [plan(shards).batch(step) for step in range(12)]


def test_packs_of_a_given_number_of_rows(shards):
    group = plan(shards, rows=3)
    assert {len(group[step]["image_grid_hw"]) for step in range(8)} == {3}


def test_every_tensor_moves_when_both_groups_are_packs(shards, tmp_path):
    from test_trainer import arguments, model_and_teacher, moved

    changes = {"num_character_classes": NUM_CHARACTER_CLASSES, "character_slots": 2}
    model, teacher = model_and_teacher(**changes)
    model.language_model.set_attn_implementation("eager")
    data = MixtureDataset([plan(shards, "natural", rows=3), plan(shards, slots=2)], 3)
    settings = arguments(tmp_path, character_weight=1.0, alignment_weight=1.0)
    trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=data, teacher=teacher)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    assert moved(model, before) == set(before)
    logged = set().union(*trainer.state.log_history)
    wanted = {"natural_x1/vision_loss", "document_x4/character_loss", "document_x4/alignment_loss"}
    assert wanted <= logged


def test_the_class_token_of_each_picture_is_always_among_the_sampled(shards, tmp_path):
    from test_trainer import arguments, model_and_teacher

    model, teacher = model_and_teacher()
    data = MixtureDataset([plan(shards, "natural", rows=3), plan(shards)], 3)
    settings = arguments(tmp_path, token_sampling_ratio=1e-9)
    trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=data, teacher=teacher)
    pack = pack_images(images(), 8)
    targets = trainer.teacher_targets(pack["pixel_values"], pack["image_grid_hw"])
    assert targets["teacher_token_mask"][0].nonzero().flatten().tolist() == [0, 25, 32, 34, 59, 84, 94]
    close(targets["teacher_features"][0], teacher(**pack).last_hidden_state, atol=0)


def test_a_pack_reaches_a_teacher_with_other_patches():
    sizes = [(2, 4), (6, 2)]
    pack = pack_images([torch.rand(3, rows * 8, cols * 8) for rows, cols in sizes], 8)
    images = [
        unpatchify(each[None], *size, 8) for each, size in zip(pack["pixel_values"].split([8, 12]), sizes, strict=True)
    ]
    patches, grids = repacked(pack["pixel_values"], pack["image_grid_hw"], 16)
    assert grids.tolist() == [[1, 2], [3, 1]]
    assert torch.equal(patches, torch.cat([patchify(image, 16)[0] for image in images]))
    assert repacked(patches, grids, 16)[0] is patches
    with pytest.raises(ValueError, match="must be multiples of the patch size 24"):
        repacked(patches, grids, 24)
