"""Configurations: what is refused, and what survives saving."""

import json

import pytest
from tiny import OPT, QWEN3, unit_config, vision_config
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, OPTConfig

from modeling_unit import UnitConfig, UnitConnectorConfig, UnitVisionConfig, UnitVisionDecoderConfig

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 100}

FOREIGN = {
    "clip_vision_model": {"intermediate_size": 48},
    "siglip_vision_model": {"intermediate_size": 48},
    "siglip2_vision_model": {"intermediate_size": 48, "num_patches": 16},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {"intermediate_size": 48, "num_register_tokens": 3},
    "vit": {"intermediate_size": 48},
    "radio": {"intermediate_size": 48},
}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("hidden_size", 0, "positive whole number"),
        ("hidden_size", "64", "positive whole number"),
        ("hidden_size", 33, "multiple of num_attention_heads"),
        ("num_hidden_layers", -1, "positive whole number"),
        ("num_attention_heads", True, "positive whole number"),
        ("patch_size", 7.5, "positive whole number"),
        ("image_size", None, "positive whole number"),
        ("cpe_max_size", 0, "positive whole number"),
        ("num_cls_tokens", 0, "positive whole number"),
        ("register_multiple", 0, "positive whole number"),
        ("pooling", "max", '"cls" or "mean"'),
        ("cpe_drop_prob", 1.5, "between 0 and 1"),
        ("cpe_drop_prob", "often", "between 0 and 1"),
        ("cpe_min_scale", 0.0, "cpe_min_scale"),
        ("cpe_aspect", (2.0, 1.0), "smallest, largest"),
        ("cpe_aspect", (1.0,), "smallest, largest"),
        ("cpe_aspect", None, "smallest, largest"),
        ("image_mean", [0.5], "each of the 3 channels"),
        ("image_mean", None, "each of the 3 channels"),
        ("image_std", [0.5, 0.0, 0.5], "positive"),
        ("num_channels", 4, "each of the 4 channels"),
        ("hidden_act", "golu", "golu"),
        ("layer_norm_eps", -1.0, "layer_norm_eps"),
        ("attention_dropout", 1.5, "attention_dropout"),
    ],
)
def test_bad_encoder_values_are_refused(name, value, words):
    with pytest.raises(ValueError, match=words) as error:
        vision_config(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connector_type", "linear"),
        ("num_queries", 0),
        ("unshuffle", 0),
        ("num_attention_heads", -2),
        ("hidden_size", 0),
    ],
)
def test_bad_connector_values_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        UnitConnectorConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vision_config", 5, "dict or a configuration"),
        ("vision_config", {"model_type": "bert"}, "'bert' is not supported"),
        ("vision_config", {"model_type": "clip"}, "'clip' is not supported"),
        ("text_config", {"model_type": "no_such_model"}, "no_such_model"),
        ("vision_decoder_config", {"input_size": 7}, "must be the encoder's hidden_size"),
        ("projection_dim", -1, "projection_dim"),
        ("num_character_classes", -1, "num_character_classes"),
        ("character_slots", 0, "character_slots"),
        ("image_token_id", -5, "image_token_id"),
    ],
)
def test_bad_values_of_the_whole_are_refused(name, value, words):
    with pytest.raises(ValueError, match=words) as error:
        UnitConfig(**({"vision_config": vision_config()} | {name: value}))
    assert "\n" not in str(error.value)


def test_widths_of_the_vision_decoder_follow_the_encoder():
    assert (
        unit_config().vision_decoder_config.to_dict().items()
        >= {
            "input_size": 32,
            "hidden_size": 32,
            "output_size": 32,
        }.items()
    )
    config = unit_config(vision_decoder_config={"output_size": 12})
    assert (config.vision_decoder_config.input_size, config.vision_decoder_config.output_size) == (32, 12)
    alone = UnitVisionDecoderConfig(input_size=6)
    assert (alone.hidden_size, alone.output_size) == (6, 6)


def test_the_default_decoder_is_opt_125m():
    text = UnitConfig(vision_config=vision_config()).text_config
    assert isinstance(text, OPTConfig)
    # UNIT, arXiv 2409.04095: OPT-125M, width 768
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.ffn_dim) == (768, 12, 12, 3072)


def test_the_default_encoder_has_the_papers_shape():
    config = UnitVisionConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size, config.image_size) == (1280, 32, 14, 224)


@pytest.mark.parametrize(
    ("cls_tokens", "multiple", "registers"),
    # m - (num_cls mod m) when m > 0, else 0
    [(1, None, 0), (1, 8, 7), (3, 8, 5), (8, 8, 8), (9, 8, 7), (3, 16, 13)],
)
def test_registers_fill_up_to_the_multiple(cls_tokens, multiple, registers):
    config = vision_config(num_cls_tokens=cls_tokens, register_multiple=multiple)
    assert config.num_registers == registers
    assert config.num_prefix_tokens == cls_tokens + registers


@pytest.mark.parametrize(("size", "patch", "side"), [(2048, 14, 146), (64, 8, 8), (70, 16, 4), (3, 8, 1)])
def test_side_of_the_position_table(size, patch, side):
    # M = round(cpe_max_size / P) * P, R = ceil(M / P): 2048 / 14 = 146.3, 70 / 16 = 4.4
    assert vision_config(cpe_max_size=size, patch_size=patch).position_side == side


def test_encoder_configuration_survives_saving(tmp_path):
    config = vision_config(num_cls_tokens=3, register_multiple=8, pooling="mean", cpe_aspect=(0.5, 2.0))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is UnitVisionConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.num_cls_tokens, loaded.num_registers, loaded.pooling) == (3, 5, "mean")
    assert loaded.cpe_aspect == [0.5, 2.0]


@pytest.mark.parametrize("text", [OPT, QWEN3, LLAMA], ids=lambda text: text["model_type"])
@pytest.mark.parametrize("vision", ["unit_vision_model", *FOREIGN])
def test_whole_configuration_survives_saving(tmp_path, vision, text):
    given = SHAPE | FOREIGN.get(vision, {"intermediate_size": 48}) | {"model_type": vision}
    config = UnitConfig(
        vision_config=given,
        text_config=text,
        connector_config={"connector_type": "mlp", "unshuffle": 3},
        projection_dim=6,
        num_character_classes=4,
    )
    config.save_pretrained(tmp_path)
    for loaded in (AutoConfig.from_pretrained(tmp_path), UnitConfig.from_pretrained(tmp_path)):
        assert type(loaded) is UnitConfig
        assert loaded.vision_config.model_type == vision
        assert type(loaded.vision_config) is type(config.vision_config)
        assert type(loaded.text_config) is type(config.text_config)
        for name, value in given.items():
            assert getattr(loaded.vision_config, name) == value
        for name, value in text.items():
            assert getattr(loaded.text_config, name) == value
        assert (loaded.connector_config.connector_type, loaded.connector_config.unshuffle) == ("mlp", 3)
        assert (loaded.projection_dim, loaded.num_character_classes) == (6, 4)
        assert loaded.num_prefix_tokens == config.num_prefix_tokens


@pytest.mark.parametrize(
    ("vision", "prefix"),
    # read off the architectures: SigLIP has no class token; DINO's registers stand behind the class token; RADIO's
    # default is three class tokens (one a teacher) and seven registers
    [
        ("clip_vision_model", 1),
        ("siglip_vision_model", 0),
        ("siglip2_vision_model", 0),
        ("vit", 1),
        ("dinov2", 1),
        ("dinov2_with_registers", 4),
        ("dinov3_vit", 4),
        ("unit_vision_model", 1),
    ],
)
def test_prefix_tokens_of_each_architecture(vision, prefix):
    given = SHAPE | FOREIGN.get(vision, {"intermediate_size": 48}) | {"model_type": vision}
    assert UnitConfig(vision_config=given, text_config=OPT).num_prefix_tokens == prefix


def test_configurations_and_dicts_are_taken_alike():
    clip = CLIPVisionConfig(**SHAPE, intermediate_size=48)
    text = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    by_object = UnitConfig(vision_config=clip, text_config=text, connector_config=UnitConnectorConfig(unshuffle=4))
    by_dict = UnitConfig(vision_config=clip.to_dict(), text_config=LLAMA, connector_config={"unshuffle": 4})
    for name in ("hidden_size", "patch_size", "model_type"):
        assert getattr(by_object.vision_config, name) == getattr(by_dict.vision_config, name)
    assert by_object.connector_config.unshuffle == by_dict.connector_config.unshuffle == 4
    assert by_object.text_config.vocab_size == by_dict.text_config.vocab_size == 100


def test_dicts_given_are_not_changed():
    text, vision = dict(OPT), SHAPE | {"model_type": "vit"}
    before = json.dumps([text, vision])
    UnitConfig(vision_config=vision, text_config=text)
    assert json.dumps([text, vision]) == before


def test_a_saved_configuration_needs_only_what_differs(tmp_path):
    """An old `config.json` with fewer fields takes the defaults of the others."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unit", "vision_config": {"model_type": "unit_vision_model", "hidden_size": 32}})
    )
    config = UnitConfig.from_pretrained(tmp_path)
    assert (config.vision_config.hidden_size, config.vision_config.patch_size) == (32, 14)
    assert config.connector_config.connector_type == "qformer"
