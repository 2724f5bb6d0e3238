"""UNIT: one vision encoder that recognises pictures and reads text.

This folder is what the Hub gets beside the weights: flat files, relative imports. Importing it registers UNIT's
classes with transformers' Auto classes, so that `AutoModel.from_pretrained` needs no `trust_remote_code` where the
package is installed.

Beside transformers 4.37 to 4.57, which LLaVA's own repositories need, only the encoder and its tower are here.
"""

from pathlib import Path

from .compat_unit import OLD_TRANSFORMERS
from .configuration_unit import (
    UnitConfig,
    UnitConnectorConfig,
    UnitVisionConfig,
    UnitVisionDecoderConfig,
    nearest_supported_size,
)
from .encoder_unit import UnitVisionModel
from .features_unit import UnitLayerFeatures, layer_features, principal_colours
from .llava_unit import UnitVisionTower, register_llava
from .packing_unit import UnitPackedOutput, pack_images, split_packed

if not OLD_TRANSFORMERS:
    from .image_processing_unit import UnitImageProcessor
    from .modeling_unit import (
        UnitCausalLMOutput,
        UnitForConditionalGeneration,
        UnitForPreTraining,
        UnitForPreTrainingOutput,
        UnitImageFeatures,
        UnitModel,
        UnitVisionDecoder,
    )
    from .processing_unit import UnitProcessor
    from .reading_unit import Reader

__all__ = [
    "Reader",
    "UnitCausalLMOutput",
    "UnitConfig",
    "UnitConnectorConfig",
    "UnitForConditionalGeneration",
    "UnitForPreTraining",
    "UnitForPreTrainingOutput",
    "UnitImageFeatures",
    "UnitImageProcessor",
    "UnitLayerFeatures",
    "UnitModel",
    "UnitPackedOutput",
    "UnitProcessor",
    "UnitVisionConfig",
    "UnitVisionDecoder",
    "UnitVisionDecoderConfig",
    "UnitVisionModel",
    "UnitVisionTower",
    "layer_features",
    "nearest_supported_size",
    "pack_images",
    "principal_colours",
    "register_llava",
    "shipped_checkpoint",
    "split_packed",
]


def shipped_checkpoint(name: str = "unit-tiny") -> Path:
    """Folder of a checkpoint that ships with the package.

    Raises:
        FileNotFoundError: naming those that ship.
    """
    root = Path(__file__).parent / "checkpoints"
    folder = root / name
    if not (folder / "config.json").is_file():
        shipped = sorted(path.parent.name for path in root.glob("*/config.json"))
        raise FileNotFoundError(
            f"No checkpoint {name!r} ships with this package; there are: {', '.join(shipped) or 'none'}."
        )
    return folder


def _register() -> None:
    from transformers import AutoConfig, AutoModel

    AutoConfig.register(UnitVisionConfig.model_type, UnitVisionConfig, exist_ok=True)
    AutoModel.register(UnitVisionConfig, UnitVisionModel, exist_ok=True)
    if OLD_TRANSFORMERS:
        return
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor

    for config in (UnitConfig, UnitVisionDecoderConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(UnitConfig, UnitModel, exist_ok=True)
    AutoModel.register(UnitVisionDecoderConfig, UnitVisionDecoder, exist_ok=True)
    AutoModelForImageTextToText.register(UnitConfig, UnitForConditionalGeneration, exist_ok=True)
    AutoModelForPreTraining.register(UnitConfig, UnitForPreTraining, exist_ok=True)
    AutoImageProcessor.register(UnitConfig, slow_image_processor_class=UnitImageProcessor, exist_ok=True)
    AutoImageProcessor.register(UnitVisionConfig, slow_image_processor_class=UnitImageProcessor, exist_ok=True)
    AutoProcessor.register(UnitConfig, UnitProcessor, exist_ok=True)


_register()
