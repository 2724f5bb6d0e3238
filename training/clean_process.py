"""What a model gives for one small picture, measured twice: in memory, and in a process of its own that is a
stranger's machine, where only the exported folder and transformers are there.

    python -I clean_process.py JOB.json     # run by `training/publish.py`

The job names the `folder`, a `picture`, what is in the folder (`kind`: "full" or "encoder"), whether its code is to be
run (`remote`), the `threads` to compute with and the folder to write to (`out`): `measured.safetensors`,
`measured.json`. For an adapter (`kind` "adapter") it names its `base`, a folder, and `inputs`, tensors, besides.
"""

import hashlib
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

OURS = ("modeling_unit", "configuration_unit", "training", "unit_cli", "spaces_demo", "benchmarks")
NEW_TOKENS = 16  # of the text that is compared [ours]


def fingerprints(model) -> dict:
    """Name of each tensor of the model's state -> hash of its bytes, type and shape."""
    import torch

    found = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found


def inputs_of(images, picture, dtype) -> dict:
    """An image processor's tensors for a picture, pixels in the model's dtype."""
    inputs = dict(images(images=picture, return_tensors="pt"))
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def read(model, processor, picture) -> tuple:
    """`({"logits", "generated"}, text)` of a picture, greedily, with the prompt of the first task."""
    task = "ocr" if "ocr" in processor.task_prompts else min(processor.task_prompts)
    inputs = processor(images=[picture], task=task)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"logits": logits, "generated": ids}, processor.decode_new(ids, inputs)[0]


def adapted(model, inputs) -> dict:
    """What a model with an adapter, UNIT or LLaVA, gives: logits, image features, the teacher's features."""
    made = model(**inputs)
    found = {"logits": made.logits}
    if getattr(made, "image_features", None) is not None:
        found["patches"] = made.image_features.patches
        if hasattr(model, "vision_decoder"):
            found["teacher features"] = model.reconstruct(made.image_features)
    return found


class _NotInstalled(MetaPathFinder):
    """Our packages may be installed, in place even: hide them, and whatever lies inside them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden while an export is checked)", name=name)


def _loaded(auto_class, job: dict, problems: list):
    """A model by its Auto class; weights that lack or that nothing asks for are problems, but those that another Auto
    class of the same folder reads are not reported by the model itself."""
    model, report = auto_class.from_pretrained(
        job["folder"], dtype="auto", output_loading_info=True, trust_remote_code=job["remote"]
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            problems.append(f"{auto_class.__name__}: {what.replace('_', ' ')}: {', '.join(map(str, report[what]))}")
    return model.eval()


def _measure_adapter(job: dict) -> dict:
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    torch.set_num_threads(job["threads"])
    auto = getattr(transformers, job["auto_class"])
    with torch.no_grad():
        base = auto.from_pretrained(job["base"], dtype=torch.float32, trust_remote_code=job["remote"])
        model = PeftModel.from_pretrained(base, job["folder"]).eval()
        return adapted(model, load_file(job["inputs"]))


def main(job: dict) -> None:
    """Load the folder as a stranger does and write what it gives."""
    sys.meta_path.insert(0, _NotInstalled())
    if job["kind"] == "adapter":
        _write(job, _measure_adapter(job), {})
        return
    import torch
    from PIL import Image
    from transformers import (
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForPreTraining,
        AutoProcessor,
        CLIPImageProcessor,
    )

    torch.set_num_threads(job["threads"])  # another number adds up in another order
    folder, remote = job["folder"], {"trust_remote_code": job["remote"]}
    tensors, words = {}, {"problems": []}
    with torch.no_grad(), Image.open(job["picture"]) as picture:
        model = _loaded(AutoModel, job, words["problems"])
        inputs = inputs_of(AutoImageProcessor.from_pretrained(folder, **remote), picture, model.dtype)
        tensors["pixels"], tensors["tokens"] = inputs["pixel_values"], model(**inputs).last_hidden_state
        if job["clip"]:
            inputs = inputs_of(CLIPImageProcessor.from_pretrained(folder), picture, model.dtype)
            tensors["tokens, CLIPImageProcessor"] = model(**inputs).last_hidden_state
            untrusted = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            if not torch.equal(inputs_of(untrusted, picture, model.dtype)["pixel_values"], inputs["pixel_values"]):
                words["problems"].append("AutoImageProcessor without remote code gives other pixels than CLIP's")
        if job["kind"] == "full":
            model = None  # one at a time in memory
            model = _loaded(AutoModelForImageTextToText, job, words["problems"])
            found, words["text"] = read(model, AutoProcessor.from_pretrained(folder, **remote), picture)
            tensors |= found
            model = None
            model = _loaded(AutoModelForPreTraining, job, words["problems"])
        words["weights"] = fingerprints(model)
    _write(job, tensors, words)


def _write(job: dict, tensors: dict, words: dict) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, str(Path(job["out"]) / "measured.safetensors"))
    (Path(job["out"]) / "measured.json").write_text(json.dumps(words), encoding="utf-8")
    present = [name for name in sys.modules if name.partition(".")[0] in OURS]
    if present:
        raise SystemExit(f"{present[0]} was imported: this process proves nothing")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
