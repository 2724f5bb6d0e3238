"""The task models: placeholders, losses, generation, foreign encoders, and one checkpoint for all of them."""

import math

import pytest
import torch
from tiny import IMAGE_TOKEN, OPT, PATCH, QWEN3, draw_page, noise, processor, unit_config, unit_model, vision_config
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining, CLIPVisionModel

from modeling_unit import (
    UnitForConditionalGeneration,
    UnitForPreTraining,
    UnitModel,
    UnitVisionDecoder,
    UnitVisionModel,
)
from modeling_unit.modeling_unit import language_loss, vision_reconstruction_loss

# name -> settings beside width 32, two layers, two heads, patches of 8
FOREIGN = {
    "clip_vision_model": {"intermediate_size": 48, "image_size": 32},
    "siglip_vision_model": {"intermediate_size": 48, "image_size": 32},
    "siglip2_vision_model": {"intermediate_size": 48, "num_patches": 16},
    "dinov2": {"mlp_ratio": 2, "image_size": 32},
    "dinov2_with_registers": {"mlp_ratio": 2, "image_size": 32, "num_register_tokens": 3},
    "dinov3_vit": {"intermediate_size": 48, "image_size": 32, "num_register_tokens": 3},
    "vit": {"intermediate_size": 48, "image_size": 32},
    "radio": {"intermediate_size": 48, "image_size": 32},
}


def foreign(name: str) -> dict:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH}
    return {"model_type": name} | shape | FOREIGN[name]


def shaken(model):
    """Weights large enough that the outputs differ from image to image and token to token."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


# -- placeholders ----------------------------------------------------------------------------------


@torch.no_grad()
def test_visual_tokens_take_the_places_of_the_placeholders():
    model = shaken(unit_model())
    features = model.get_image_features(torch.randn(2, 3, 8, 16))  # two visual tokens each
    embeds = model._embed(ids([7, 2, 2, 9], [2, 8, 2, 9]), features)
    table = model.get_input_embeddings().weight
    visual = features.visual_tokens
    expected = [[table[7], visual[0, 0], visual[0, 1], table[9]], [visual[1, 0], table[8], visual[1, 1], table[9]]]
    torch.testing.assert_close(embeds, torch.stack([torch.stack(row) for row in expected]), atol=0, rtol=0)


@torch.no_grad()
def test_the_placeholder_may_lie_outside_of_the_vocabulary():
    model = shaken(unit_model(image_token_id=262))
    output = model(input_ids=ids([262, 262, 9]), pixel_values=torch.randn(1, 3, 8, 16))
    assert output.logits.shape == (1, 3, 262)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_placeholders_is_refused(count):
    with pytest.raises(ValueError, match=f"hold {count} image placeholders but the images have 2 visual tokens"):
        unit_model()(input_ids=ids([2] * count + [9]), pixel_values=torch.randn(1, 3, 8, 16))


@torch.no_grad()
def test_placeholders_without_an_image_are_refused():
    with pytest.raises(ValueError, match="no pixel_values were given"):
        unit_model()(input_ids=ids([2, 9]))


@torch.no_grad()
def test_text_alone_is_the_language_decoder():
    model = shaken(unit_model())
    tokens = ids([7, 8, 9])
    expected = model.language_model(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_ids_and_embeddings_exclude_each_other():
    model = UnitForConditionalGeneration(unit_config()).eval()
    for both in ({"input_ids": ids([7]), "inputs_embeds": torch.zeros(1, 1, 32)}, {}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**both)


@pytest.mark.parametrize("connector", ["mlp", "qformer"])
@torch.no_grad()
def test_a_padded_batch_of_images_equals_one_by_one(connector):
    model = shaken(unit_model(connector=connector, unshuffle=2))
    shapes = [(4, 6), (3, 3), (1, 5)]
    batch = torch.full((3, 3, 32, 48), 3.0)
    for index, (rows, cols) in enumerate(shapes):
        batch[index, :, : rows * 8, : cols * 8] = torch.randn(3, rows * 8, cols * 8)
    together = model.get_image_features(batch, torch.tensor(shapes))
    for index, (rows, cols) in enumerate(shapes):
        alone = model.get_image_features(batch[index : index + 1, :, : rows * 8, : cols * 8])
        own = together.visual_tokens[index][together.visual_mask[index]]
        torch.testing.assert_close(own, alone.visual_tokens[0], atol=1e-5, rtol=0)
        assert len(own) == (5 if connector == "qformer" else math.ceil(rows / 2) * math.ceil(cols / 2))


# -- losses ----------------------------------------------------------------------------------------


def test_position_t_predicts_label_t_plus_1():
    # softmax of (0, ln 3) is (1/4, 3/4); of (0, 0) it is (1/2, 1/2); the last position predicts nothing
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [50.0, -50.0]]])
    loss = language_loss(logits, torch.tensor([[0, 1, 0]]))
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    first_is_never_a_target = language_loss(logits, torch.tensor([[1, 1, 0]]))
    assert float(first_is_never_a_target) == pytest.approx(float(loss))


def test_masked_labels_do_not_count():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, 9.0]], [[0.0, 0.0], [0.0, math.log(7)], [0.0, 0.0]]])
    labels = torch.tensor([[-100, 0, -100], [-100, -100, 1]])
    # 1/4 in the first row, 7/8 in the second
    assert float(language_loss(logits, labels)) == pytest.approx((math.log(4) + math.log(8 / 7)) / 2)


@pytest.mark.parametrize("labels", [[[-100, -100, -100]], [[5, -100, -100]]])
def test_nothing_but_masked_labels_is_refused(labels):
    with pytest.raises(ValueError, match="All labels are masked"):
        language_loss(torch.zeros(1, 3, 8), torch.tensor(labels))


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must be \(1, 3\)"):
        language_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2]]))


def test_vision_loss_by_hand():
    predicted = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    target = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    # at right angles: 1 - cos = 1, mean |difference| = (1 + 1) / 2; parallel: 0 and (0 + 1) / 2
    loss, cosine, l1 = vision_reconstruction_loss(predicted, target, l1_weight=2.0)
    assert (float(cosine), float(l1), float(loss)) == pytest.approx((0.5, 0.75, 0.5 + 2 * 0.75))
    mask = torch.tensor([[True, False]])
    loss, cosine, l1 = vision_reconstruction_loss(predicted, target, mask, l1_weight=3.0)
    assert (float(cosine), float(l1), float(loss)) == pytest.approx((1.0, 1.0, 4.0))


def test_vision_loss_with_nothing_sampled_is_zero():
    loss, _, _ = vision_reconstruction_loss(torch.ones(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=bool))
    assert float(loss) == 0.0


def test_the_teacher_gets_no_gradient():
    predicted, target = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    vision_reconstruction_loss(predicted, target)[0].backward()
    assert predicted.grad is not None
    assert target.grad is None


def test_features_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="width and grid must match"):
        vision_reconstruction_loss(torch.zeros(1, 5, 8), torch.zeros(1, 4, 8))


def joint_batch(model) -> dict:
    labels = ids([-100] * 4 + [-100, 7, 8, 1])
    tokens = ids([IMAGE_TOKEN] * 4 + [3, 7, 8, 1])
    return {"input_ids": tokens, "labels": labels, "pixel_values": torch.randn(1, 3, 16, 16)}


@torch.no_grad()
def test_the_joint_loss_is_the_weighted_sum_of_its_terms():
    model = shaken(unit_model())
    batch, target = joint_batch(model), torch.randn(1, 5, 32)
    mask = torch.tensor([[True, False, True, False, True]])
    output = model(**batch, teacher_features=target, teacher_token_mask=mask, vision_weight=0.7, vision_l1_weight=0.2)
    alone = UnitForConditionalGeneration.forward(model, **batch)
    features = model.vision_model(batch["pixel_values"]).last_hidden_state
    predicted = model.vision_decoder(features)[mask]
    cosine = (1 - torch.cosine_similarity(predicted, target[mask], dim=-1)).mean()
    l1 = (predicted - target[mask]).abs().mean()
    torch.testing.assert_close(output.language_loss, alone.loss)
    torch.testing.assert_close(output.vision_cosine, cosine)
    torch.testing.assert_close(output.vision_l1, l1)
    torch.testing.assert_close(output.vision_loss, cosine + 0.2 * l1)
    torch.testing.assert_close(output.loss, alone.loss + 0.7 * (cosine + 0.2 * l1))
    expected = language_loss(output.logits, batch["labels"])
    torch.testing.assert_close(output.language_loss, expected)


@torch.no_grad()
def test_terms_survive_what_rebuilds_outputs_from_their_keys():
    """accelerate does under mixed precision; a term that is an attribute but no key would silently be lost."""
    model = shaken(unit_model())
    output = model(**joint_batch(model), teacher_features=torch.randn(1, 5, 32))
    assert {"loss", "language_loss", "vision_loss", "vision_cosine", "vision_l1"} <= set(output.keys())
    rebuilt = type(output)(dict(output.items()))
    torch.testing.assert_close(rebuilt.vision_loss, output.vision_loss)


@torch.no_grad()
def test_terms_that_cannot_be_computed_are_left_out():
    model = shaken(unit_model())
    batch = joint_batch(model)
    without_teacher = model(**batch)
    assert without_teacher.vision_loss is None
    torch.testing.assert_close(without_teacher.loss, without_teacher.language_loss)
    labels = batch.pop("labels")
    without_labels = model(**batch, teacher_features=torch.randn(1, 5, 32), vision_weight=0.5)
    assert without_labels.language_loss is None
    torch.testing.assert_close(without_labels.loss, 0.5 * without_labels.vision_loss)
    assert model(**batch).loss is None
    assert labels is not None


@torch.no_grad()
def test_a_finer_grid_is_area_pooled_to_the_teachers():
    model = unit_model()
    model.vision_decoder.fc1 = model.vision_decoder.act = model.vision_decoder.fc2 = torch.nn.Identity()
    features = model.get_image_features(torch.randn(1, 3, 32, 48))  # 4 x 6
    pooled = model.reconstruct(features, (2, 3))
    grid = features.patches.reshape(1, 4, 6, 32)
    expected = []
    for row in range(2):
        for col in range(3):
            expected.append(grid[0, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].mean(dim=(0, 1)))
    torch.testing.assert_close(pooled[0, 1:], torch.stack(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(pooled[:, :1], features.prefix, atol=0, rtol=0)
    assert model.reconstruct(features).shape == (1, 25, 32)


@torch.no_grad()
def test_the_vision_decoder_is_two_layers_with_exact_gelu():
    decoder = UnitVisionDecoder(unit_config().vision_decoder_config)
    tokens = torch.randn(2, 5, 32)
    hidden = tokens @ decoder.fc1.weight.T + decoder.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(decoder(tokens), hidden @ decoder.fc2.weight.T + decoder.fc2.bias)


@torch.no_grad()
def test_projected_features_are_the_class_token_through_vision_decoder_and_projection():
    model = shaken(unit_model(projection_dim=6, vision_decoder_config={"output_size": 20}))
    image = torch.randn(2, 3, 16, 16)
    class_token = model.vision_model(image).pooler_output
    expected = model.vision_decoder(class_token) @ model.visual_projection.weight.T
    projected = model.get_projected_image_features(image)
    torch.testing.assert_close(projected, expected / expected.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(projected.norm(dim=-1), torch.ones(2))


def test_projecting_without_a_projection_is_refused():
    with pytest.raises(ValueError, match="no projection to a text tower"):
        unit_model().get_projected_image_features(torch.zeros(1, 3, 8, 8))


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [OPT, QWEN3], ids=["opt", "qwen3"])
@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_a_batch_over_different_sizes_reads_as_one_by_one(text, connector):
    model = shaken(unit_model(text=text, connector=connector, unshuffle=1))
    read = processor(connector)
    pages = [draw_page("ab", 48, 16), draw_page("xy\nz", 24, 40), noise(70, 9)]
    batch = read(images=pages, task="ocr")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    assert together.shape == (3, 6)
    for page, row in zip(pages, together, strict=True):
        single = read(images=[page], task="ocr")
        alone = model.generate(**single, **settings)[:, single["input_ids"].shape[1] :]
        assert alone[0].tolist() == row.tolist()
    assert len({tuple(row.tolist()) for row in together}) > 1  # the images matter


@pytest.mark.parametrize("text", [OPT, QWEN3], ids=["opt", "qwen3"])
@torch.no_grad()
def test_greedy_generation_is_the_forward_pass_repeated(text):
    """The cache, and the image going in with the first step only, change nothing."""
    model = shaken(unit_model(text=text))
    inputs = processor()(images=[noise(24, 16)], task="caption")
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    tokens = inputs["input_ids"]
    for _ in range(5):
        logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert made.tolist() == tokens.tolist()


def test_generation_stops_at_the_end_token():
    model = shaken(unit_model())
    inputs = processor()(images=[noise(24, 16)], task="caption")
    start = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, start:]
    stopped = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=int(free[1]))[0, start:]
    first = free.tolist().index(int(free[1]))
    assert stopped.tolist() == free.tolist()[: first + 1]


def test_beams_and_several_sequences_share_their_image():
    model = shaken(unit_model(text=QWEN3))
    inputs = processor()(images=[noise(24, 16), noise(40, 24)], task="caption")
    made = model.generate(**inputs, max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False)
    assert made.shape[0] == 4


@torch.no_grad()
def test_logits_to_keep_limits_the_logits():
    model = shaken(unit_model())
    inputs = processor()(images=[noise(24, 16)], task="caption")
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_left_padding_changes_no_logits():
    model = shaken(unit_model(text=QWEN3))
    inputs = processor()(images=[noise(24, 16)], task="caption")
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (4, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (4, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    count = inputs["input_ids"].shape[1]
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**padded).logits[:, -count:], model(**inputs).logits, atol=1e-5, rtol=0)


# -- foreign encoders ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOREIGN)
@torch.no_grad()
def test_encoders_of_transformers_take_pages_of_any_size(name, tmp_path):
    model = shaken(unit_model(vision=foreign(name), unshuffle=2))
    prefix = model.config.num_prefix_tokens
    for rows, cols in ((4, 4), (2, 6)):
        tokens = [IMAGE_TOKEN] * (math.ceil(rows / 2) * math.ceil(cols / 2)) + [3, 9, 1]
        image = torch.randn(1, 3, rows * PATCH, cols * PATCH)
        output = model(input_ids=ids(tokens), pixel_values=image, labels=ids([-100] * (len(tokens) - 2) + [9, 1]))
        assert output.image_features.prefix.shape == (1, prefix, 32)
        assert output.image_features.patches.shape == (1, rows * cols, 32)
        assert output.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded, report = UnitForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded.vision_model) is type(model.vision_model)
    logits = loaded(input_ids=ids(tokens), pixel_values=image).logits
    torch.testing.assert_close(logits, output.logits, atol=1e-6, rtol=0)
    features = UnitModel.from_pretrained(tmp_path)
    torch.testing.assert_close(features.encode(image)[1], output.image_features.patches, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FOREIGN)
@torch.no_grad()
def test_foreign_encoders_run_padded_batches_as_one_by_one(name):
    model = shaken(unit_model(vision=foreign(name), model_class=UnitModel))
    shapes = [(4, 4), (2, 6), (4, 4), (1, 2)]
    batch = torch.full((4, 3, 32, 48), 5.0)
    for index, (rows, cols) in enumerate(shapes):
        batch[index, :, : rows * PATCH, : cols * PATCH] = torch.randn(3, rows * PATCH, cols * PATCH)
    prefix, patches, mask, grid = model.encode(batch, torch.tensor(shapes))
    assert grid == (4, 6)
    for index, (rows, cols) in enumerate(shapes):
        alone = model.encode(batch[index : index + 1, :, : rows * PATCH, : cols * PATCH])
        torch.testing.assert_close(prefix[index], alone[0][0], atol=1e-5, rtol=0)
        own = patches[index].unflatten(0, grid)
        torch.testing.assert_close(own[:rows, :cols].flatten(0, 1), alone[1][0], atol=1e-5, rtol=0)
        assert (own[rows:] == 0).all()
        expected = torch.zeros(4, 6, dtype=torch.bool)
        expected[:rows, :cols] = True
        assert torch.equal(mask[index], expected.flatten())


@pytest.mark.parametrize("name", FOREIGN)
@torch.no_grad()
def test_patch_order_is_row_by_row_in_every_architecture(name):
    """Change the pixels of one patch: among all tokens, that of its row and column changes most."""
    model = shaken(unit_model(vision=foreign(name), model_class=UnitModel))
    image = torch.randn(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, 8:16, 16:24] += 3 * torch.randn(3, 8, 8)  # row 1, column 2 of a grid of 4 x 4
    difference = (model.encode(image)[1] - model.encode(changed)[1]).norm(dim=-1)[0]
    assert int(difference.argmax()) == 1 * 4 + 2


@torch.no_grad()
def test_siglip2_gets_patches_flattened_as_row_column_channel():
    model = shaken(unit_model(vision=foreign("siglip2_vision_model"), model_class=UnitModel))
    image = torch.randn(1, 3, 16, 24)
    patches = []
    for top in (0, 8):
        for left in (0, 8, 16):
            values = [image[0, :, top + y, left + x] for y in range(8) for x in range(8)]
            patches.append(torch.cat(values))
    expected = model.vision_model(
        pixel_values=torch.stack(patches)[None],
        pixel_attention_mask=torch.ones(1, 6, dtype=torch.long),
        spatial_shapes=torch.tensor([[2, 3]]),
    ).last_hidden_state
    torch.testing.assert_close(model.encode(image)[1], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_clip_encoder_saved_alone_is_a_clip_checkpoint(tmp_path):
    model = shaken(unit_model(vision=foreign("clip_vision_model")))
    model.vision_model.save_pretrained(tmp_path)
    clip = CLIPVisionModel.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 32, 32)
    expected = model.encode(image)
    torch.testing.assert_close(clip(image).last_hidden_state[:, 1:], expected[1], atol=1e-6, rtol=0)


# -- one checkpoint, several classes ---------------------------------------------------------------


@pytest.mark.parametrize("text", [OPT, QWEN3], ids=["opt", "qwen3"])
@torch.no_grad()
def test_every_class_reads_the_full_checkpoint(text, tmp_path):
    model = shaken(unit_model(text=text, projection_dim=4, num_character_classes=7))
    model.save_pretrained(tmp_path)
    image, tokens = torch.randn(1, 3, 16, 24), ids([IMAGE_TOKEN] * 6 + [3, 9])
    features = model.vision_model(image)
    logits = model(input_ids=tokens, pixel_values=image).logits
    for model_class in (UnitModel, UnitVisionModel, AutoModel):
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"], model_class
        assert not report["unexpected_keys"], model_class
        output = loaded(image)
        torch.testing.assert_close(output.last_hidden_state, features.last_hidden_state, atol=0, rtol=0)
        torch.testing.assert_close(output.pooler_output, features.pooler_output, atol=0, rtol=0)
    for model_class in (
        UnitForConditionalGeneration,
        UnitForPreTraining,
        AutoModelForImageTextToText,
        AutoModelForPreTraining,
    ):
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"], model_class
        assert not report["unexpected_keys"], model_class
        torch.testing.assert_close(loaded(input_ids=tokens, pixel_values=image).logits, logits, atol=0, rtol=0)


@torch.no_grad()
def test_unit_model_takes_what_the_encoder_takes():
    model = shaken(unit_model(model_class=UnitModel))
    image = torch.randn(2, 3, 16, 24)
    given = {"spatial_shapes": torch.tensor([[2, 3], [1, 2]]), "output_hidden_states": 0, "output_attentions": True}
    output, expected = model(image, **given), model.vision_model(image, **given)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=0, rtol=0)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2


@torch.no_grad()
def test_a_full_checkpoint_starts_from_an_encoder_alone(tmp_path):
    encoder = shaken(UnitVisionModel(vision_config()).eval())
    encoder.save_pretrained(tmp_path)
    model = unit_model(model_class=UnitModel)
    model.vision_model.load_state_dict(UnitVisionModel.from_pretrained(tmp_path).state_dict())
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(model(image).last_hidden_state, encoder(image).last_hidden_state, atol=0, rtol=0)


def test_dropping_the_auxiliary_head_leaves_the_rest(tmp_path):
    model = unit_model(num_character_classes=7)
    model.save_pretrained(tmp_path)
    loaded = UnitForPreTraining.from_pretrained(tmp_path, num_character_classes=0)
    assert not hasattr(loaded, "character_head")
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("character_head")}
    assert loaded.state_dict().keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_tied_embeddings_stay_tied_through_saving(tmp_path):
    model = unit_model(text=QWEN3)
    model.save_pretrained(tmp_path)
    loaded = UnitForPreTraining.from_pretrained(tmp_path)
    for each in (model, loaded):
        assert each.get_input_embeddings().weight.data_ptr() == each.get_output_embeddings().weight.data_ptr()


# -- training switches -----------------------------------------------------------------------------


@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_every_parameter_of_pretraining_gets_a_gradient(connector):
    model = unit_model(connector=connector).train()
    visual = [IMAGE_TOKEN] * (5 if connector == "qformer" else 4)
    tokens = ids([*visual, 3, 7, 1])
    labels = ids([-100] * (len(visual) + 1) + [7, 1])
    model(
        input_ids=tokens,
        pixel_values=torch.randn(1, 3, 16, 16),
        labels=labels,
        teacher_features=torch.randn(1, 5, 32),
    ).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_gradient_checkpointing_reaches_every_part():
    model = unit_model().train()
    batch, teacher = joint_batch(model), torch.randn(1, 5, 32)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch, teacher_features=teacher).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert model.vision_model.blocks[0].gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_the_attention_implementation_of_every_part_can_be_set():
    model = unit_model()
    model.set_attn_implementation("eager")
    assert model.vision_model.config._attn_implementation == "eager"
    assert model.language_model.config._attn_implementation == "eager"


@torch.no_grad()
def test_bf16_runs_from_pixels_to_text():
    model = shaken(unit_model(text=QWEN3)).to(torch.bfloat16)
    inputs = processor()(images=[noise(24, 16), noise(40, 24)], task="caption")
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[0] == 2
    assert model(**inputs).logits.dtype == torch.bfloat16
