"""Runs in a process of its own, for `test_any_vit.py`: loads saved encoders with transformers alone and writes what
they give, in a process where UNIT's packages cannot be imported.

    python -I plain_process.py JOB.json
"""

import importlib.util
import json
import sys
from pathlib import Path

# hides our packages, and refuses to go on where one can be imported all the same
_spec = importlib.util.spec_from_file_location("hub_process", Path(__file__).with_name("hub_process.py"))
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoImageProcessor, AutoModel  # noqa: E402


@torch.no_grad()
def main(job: dict) -> None:
    picture = Image.open(job["picture"])
    tensors, names = {}, {}
    for name, entry in job["encoders"].items():
        remote = {"trust_remote_code": True} if entry["ours"] else {}
        model, report = AutoModel.from_pretrained(entry["folder"], output_loading_info=True, **remote)
        assert not report["missing_keys"], report
        assert not report["unexpected_keys"], report
        inputs = {key.partition("/")[2]: value for key, value in load_file(entry["inputs"]).items()}
        inputs = {key: value if value.is_floating_point() else value.long() for key, value in inputs.items()}
        output = model(**inputs, **entry["words"])
        tensors[f"{name}/tokens"] = output.last_hidden_state
        pooled = output.get("pooler_output", output.get("summary"))
        if pooled is not None:
            tensors[f"{name}/pooled"] = pooled
        processor = AutoImageProcessor.from_pretrained(entry["folder"], **remote)
        made = processor(images=picture, return_tensors="pt")
        tensors[f"{name}/pixels"] = made["pixel_values"]
        # what the processor makes is what the model takes, with no further word
        tensors[f"{name}/picture"] = model(**made).last_hidden_state
        names[name] = [type(model).__name__, type(processor).__name__, str(model.dtype)]
    save_file({key: value.contiguous() for key, value in tensors.items()}, job["out"] + "/plain.safetensors")
    Path(job["out"], "names.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
