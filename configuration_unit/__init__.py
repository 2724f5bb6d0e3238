"""Public home of UNIT's configurations, and presets of known sizes.

The classes themselves live in `modeling_unit/configuration_unit.py`: the Hub's remote-code loader copies only files of
one flat folder, so what ships with a checkpoint must lie beside the model code.
"""

from modeling_unit.configuration_unit import (
    UnitConfig,
    UnitConnectorConfig,
    UnitVisionConfig,
    UnitVisionDecoderConfig,
    nearest_supported_size,
)

from .presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "UnitConfig",
    "UnitConnectorConfig",
    "UnitVisionConfig",
    "UnitVisionDecoderConfig",
    "nearest_supported_size",
    "preset",
]
