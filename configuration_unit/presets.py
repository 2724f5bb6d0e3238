"""Encoders of known sizes.

`unit-600m` and `unit-1b` are the shapes of the released checkpoints; `unit-tiny` is the one that ships with this
package.
"""

from __future__ import annotations

from typing import Any

from modeling_unit.configuration_unit import UnitVisionConfig

_VIT_HUGE = {
    "hidden_size": 1280,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "patch_size": 14,
    "image_size": 224,
}

# name -> (settings of UnitVisionConfig, where they come from)
PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "unit-600m": (_VIT_HUGE | {"num_hidden_layers": 32}, "released inference code, vit_huge_patch14_224"),
    "unit-1b": (_VIT_HUGE | {"num_hidden_layers": 50}, "released inference code, vit_huge_patch14_224_1B"),
    "unit-tiny": (
        {
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "patch_size": 16,
            "image_size": 1024,
            "cpe_max_size": 1024,
            "cpe_crop": False,
            "cpe_drop_prob": 0.0,
            "patch_embed_float32": False,
        },
        "ours: training/recipes/unit-tiny",
    ),
}


def preset(name: str) -> UnitVisionConfig:
    """The encoder configuration of a known size.

    Raises:
        ValueError: naming the presets there are.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
    return UnitVisionConfig(**PRESETS[name][0])
