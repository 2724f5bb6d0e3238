"""What `save_pretrained` writes beside the weights, so that a folder loads where this package is not installed.

`config.auto_map` names a class for every Auto class, and the flat code files lie in the folder itself:
`AutoModel.from_pretrained(folder, trust_remote_code=True)` then needs nothing else.
"""

import shutil
from pathlib import Path

# Auto class -> file and class, for a full repository, for an encoder alone, for processors
FULL_AUTO_MAP = {
    "AutoConfig": "configuration_unit.UnitConfig",
    "AutoModel": "modeling_unit.UnitModel",
    "AutoModelForImageTextToText": "modeling_unit.UnitForConditionalGeneration",
    "AutoModelForPreTraining": "modeling_unit.UnitForPreTraining",
}
ENCODER_AUTO_MAP = {
    "AutoConfig": "configuration_unit.UnitVisionConfig",
    "AutoModel": "encoder_unit.UnitVisionModel",
}
VISION_DECODER_AUTO_MAP = {
    "AutoConfig": "configuration_unit.UnitVisionDecoderConfig",
    "AutoModel": "modeling_unit.UnitVisionDecoder",
}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_unit.UnitImageProcessor"}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_unit.UnitProcessor"} | IMAGE_PROCESSOR_AUTO_MAP


class CodeUploaded:
    """Mixin before transformers' classes, whose `save_pretrained` with `push_to_hub=True` uploads what it wrote itself
    before the code would lie beside it: this lays the code there first, so that it goes up in the same commit.
    """

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        write_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def write_code(folder) -> list:
    """Copy the flat code files that this one lies among into a folder; returns their names."""
    here, folder = Path(__file__).resolve().parent, Path(folder)
    written = []
    for file in sorted(here.glob("*_unit.py")):
        target = folder / file.name
        if target.resolve() != file:
            shutil.copyfile(file, target)
        written.append(file.name)
    return written
