"""What the method leaves open, setting by setting: from a recipe's key to the numbers that it changes.

The weights of the loss, C and the crops of the positions have their numbers in test_trainer.py; here is what a recipe
says of sizes. All of them are in the table at the top of training/arguments.py.
"""

import re

import pytest
import torch
import yaml
from tiny import document_row, picture_row, vision_config

import training.arguments
from modeling_unit import UnitVisionModel
from training.arguments import UnitTrainingArguments
from training.data.schema import write_shards
from training.recipe import Recipe, new_model, read_recipe, stage_data

TEXT = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder with patches of 8 pixels; documents of an x-height of 5; pictures."""
    root = tmp_path_factory.mktemp("made")
    UnitVisionModel(vision_config(num_hidden_layers=1)).save_pretrained(root / "encoder")
    sizes = [(40, 8), (64, 16), (100, 8), (130, 24)]
    rows = [document_row(f"row {index}", *sizes[index % 4], seed=index) for index in range(16)]
    write_shards(rows, root / "documents")
    write_shards([picture_row("a dog", seed=index) for index in range(8)], root / "pictures")
    return root


def recipe(made, **changes) -> Recipe:
    """Stage 2, x1 at 32 x 32 pixels; `changes` by their dotted keys, with two underscores for a dot."""
    groups = [{"kind": kind, "scale": scale, "rows": 4} for kind in ("natural", "document") for scale in (1, 4)]
    for group in groups:
        folder = "documents" if group["kind"] == "document" else "pictures"
        group["sources"] = [{"path": str(made / folder)}]
    content = {
        "stage": "inter_scale",
        "teacher": str(made / "encoder"),
        "groups": groups,
        "training": {"max_steps": 2},
    }
    content["model"] = {"text_config": TEXT, "connector_config": {"num_attention_heads": 2, "num_hidden_layers": 1}}
    content["image_processor"] = {"base_size": 32, "max_side": 256}
    path = made / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_recipe(path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def batch_of(given: Recipe, made) -> dict:
    model, processor = new_model(given)
    arguments = UnitTrainingArguments(output_dir=str(made / "out"), use_cpu=True, **given.training)
    return stage_data(given, arguments, processor, model.config)[0]


@pytest.mark.parametrize(("queries", "tokens"), [(None, 256), (7, 7)])
def test_k_is_the_number_of_queries(made, queries, tokens):
    given = {} if queries is None else {"model__connector_config__num_queries": queries}
    model, processor = new_model(recipe(made, **given))
    for rows, cols in ((4, 4), (3, 9)):
        assert processor.num_visual_tokens(rows, cols) == tokens
        features = model.get_image_features(torch.zeros(1, 3, 8 * rows, 8 * cols))
        assert features.visual_tokens.shape == (1, tokens, 32)


@pytest.mark.parametrize(("unshuffle", "tokens"), [(None, (4, 2 * 5)), (1, (16, 27)), (4, (1, 1 * 3))])
def test_unshuffling_folds_squares_of_patches(made, unshuffle, tokens):
    given = {"model__connector_config__connector_type": "mlp"}
    given |= {} if unshuffle is None else {"model__connector_config__unshuffle": unshuffle}
    model, processor = new_model(recipe(made, **given))
    for (rows, cols), expected in zip(((4, 4), (3, 9)), tokens, strict=True):
        assert processor.num_visual_tokens(rows, cols) == expected
        features = model.get_image_features(torch.zeros(1, 3, 8 * rows, 8 * cols))
        assert features.visual_tokens.shape[1] == expected


@pytest.mark.parametrize(("scale_as", "side"), [(None, 128), ("side", 128), ("area", 64)])
def test_x4_multiplies_the_side_or_the_area(made, scale_as, side):
    given = recipe(made, **({} if scale_as is None else {"image_processor__scale_as": scale_as}))
    assert batch_of(given, made)["natural_x4"]["pixel_values"].shape[-2:] == (side, side)


@pytest.mark.parametrize(("teacher_scale", "side"), [(None, 32), (1, 32), ("same", 128)])
def test_the_teacher_sees_large_pictures_at_x1_or_as_they_are(made, teacher_scale, side):
    given = recipe(made, **({} if teacher_scale is None else {"training__teacher_scale": teacher_scale}))
    batch = batch_of(given, made)["natural_x4"]
    assert batch.get("teacher_pixel_values", batch["pixel_values"]).shape[-2:] == (side, side)


@pytest.mark.parametrize(("least", "widths"), [(None, {40, 64, 100}), (5, {40, 64, 100}), (0, {40, 64, 100, 130})])
def test_documents_at_x1_read_what_stays_legible(made, least, widths):
    """Only 130 x 24 pixels are more than the 16 patches of x1, and are shrunk."""
    given = recipe(made, **({} if least is None else {"data__exchanged_x_height": least}))
    model, processor = new_model(given)
    arguments = UnitTrainingArguments(output_dir=str(made / "out"), use_cpu=True, **given.training)
    plans = {each.arguments.name: each for each in stage_data(given, arguments, processor, model.config).groups}

    def drawn(name: str) -> set[int]:
        plan = plans[name]
        return {int(plan.sources[0].sizes[position][0]) for step in range(8) for _, position in plan.batch(step)[1]}

    assert drawn("document_x1") == widths
    assert drawn("document_x4") == {40, 64, 100, 130}


def test_a_negative_height_is_refused(made):
    with pytest.raises(ValueError, match=r"data\.exchanged_x_height must not be negative"):
        recipe(made, data__exchanged_x_height=-1)


def test_the_table_of_settings_names_keys_that_recipes_take(made):
    """Each with its default, as it holds where nothing is given."""
    rows = re.findall(r"^\| [^|]*\| `([a-z_0-9.]+)`[^|]*\| ([^|]+) \|", training.arguments.__doc__, re.M)
    told = dict(rows)
    assert len(told) == 9
    for key in told:
        read_recipe(made / "recipe.yaml", [f"{key}=1"])  # no unknown key
    settings = UnitTrainingArguments(output_dir=str(made / "out"), use_cpu=True)
    for name in ("vision_weight", "vision_l1_weight", "token_sampling_ratio", "teacher_scale"):
        assert float(told[f"training.{name}"]) == getattr(settings, name)
    assert settings.position_crop is None
