import pytest
import torch

from configuration_unit import PRESETS, preset
from modeling_unit import UnitVisionModel


@pytest.mark.parametrize(("name", "blocks"), [("unit-600m", 32), ("unit-1b", 50)])
def test_released_sizes_have_the_parameters_of_their_shape(name, blocks):
    with torch.device("meta"):
        model = UnitVisionModel(preset(name))
    width, mlp, side = 1280, 5120, round(2048 / 14)
    block = 4 * width  # two norms
    block += 3 * width * width + 3 * width + width * width + width  # qkv and proj with biases
    block += 2 * width * mlp + mlp + width  # MLP
    rest = 3 * 14 * 14 * width + side * side * width + width + 2 * width  # patches, positions, class token, final norm
    assert sum(parameter.numel() for parameter in model.parameters()) == blocks * block + rest


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unit-600m, unit-1b, unit-tiny"):
        preset("unit-2b")


def test_every_preset_says_where_it_comes_from():
    assert all(source for _, source in PRESETS.values())
