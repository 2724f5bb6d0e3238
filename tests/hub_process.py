"""Runs in a process of its own, for `test_hub_loading.py`: a stranger's machine, where UNIT's packages do not exist.

Loads exported repositories from folders and from a Hub cache through the Auto classes, and writes what they give.

    python -I hub_process.py JOB.json
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

OURS = ("modeling_unit", "configuration_unit", "training", "unit_cli", "spaces_demo", "benchmarks", "tests", "tiny")


class NotInstalled(MetaPathFinder):
    """Our packages may be installed, in place even (`pip install -e .`): hide them, and whatever lies inside them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden for this test)", name=name)


sys.meta_path.insert(0, NotInstalled())
for package in OURS:
    try:
        __import__(package)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{package} can be imported: this process proves nothing")

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

REMOTE = {"trust_remote_code": True}


@torch.no_grad()
def check(full: str, encoder: str, inputs: dict, picture: Image.Image) -> tuple[dict, dict]:
    """Outputs of both repositories, and the names of the classes that gave them."""
    tensors, names = {}, {}
    pixels, shapes = inputs["pixel_values"], inputs["spatial_shapes"]
    for key, source in (("full", full), ("encoder", encoder)):
        names[f"{key}/config"] = type(AutoConfig.from_pretrained(source, **REMOTE)).__name__
        model, report = AutoModel.from_pretrained(source, output_loading_info=True, **REMOTE)
        assert not report["missing_keys"], report
        assert not report["unexpected_keys"], report
        names[f"{key}/AutoModel"] = type(model).__name__
        output = model(pixels, spatial_shapes=shapes, output_hidden_states=True)
        tensors[f"{key}/tokens"], tensors[f"{key}/pooled"] = output.last_hidden_state, output.pooler_output
        tensors[f"{key}/hidden"] = output.hidden_states[1]
        images = AutoImageProcessor.from_pretrained(source, **REMOTE)
        names[f"{key}/AutoImageProcessor"] = type(images).__name__
        tensors[f"{key}/pixels"] = images([picture], kind="document")["pixel_values"]
        features = pipeline("image-feature-extraction", model=source, **REMOTE)(picture)
        tensors[f"{key}/pipeline"] = torch.tensor(features)
    reader, report = AutoModelForImageTextToText.from_pretrained(full, output_loading_info=True, **REMOTE)
    assert not report["missing_keys"], report
    names["AutoModelForImageTextToText"] = type(reader).__name__
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    tensors["logits"] = reader(**text, pixel_values=pixels, spatial_shapes=shapes).logits
    tensors["generated"] = reader.generate(**text, pixel_values=pixels, spatial_shapes=shapes)
    trainee = AutoModelForPreTraining.from_pretrained(full, **REMOTE)
    names["AutoModelForPreTraining"] = type(trainee).__name__
    trained = trainee(
        **text,
        pixel_values=pixels,
        spatial_shapes=shapes,
        labels=inputs["input_ids"],
        teacher_features=inputs["teacher_features"],
    )
    tensors["loss"], tensors["vision_loss"] = trained.loss, trained.vision_loss
    processor = AutoProcessor.from_pretrained(full, **REMOTE)
    names["AutoProcessor"] = type(processor).__name__
    tensors |= {f"processor/{key}": value for key, value in processor(images=[picture], task="ocr").items()}
    names["prompt"] = processor.task_prompts["ocr"]
    names["AutoTokenizer"] = AutoTokenizer.from_pretrained(full, **REMOTE).decode(inputs["input_ids"][0])
    read = pipeline("image-text-to-text", model=full, **REMOTE)
    names["pipeline"] = read(images=picture, text="<image><ocr>", return_full_text=False)[0]["generated_text"]
    many = read(images=[picture, picture], text=["<image><ocr>", "<caption>"], return_full_text=False)
    names["pipeline, batch"] = [made["generated_text"] for made in many]
    return tensors, names


def main(job: dict) -> None:
    inputs = load_file(job["inputs"])
    picture = Image.open(job["picture"])
    again = str(Path(job["out"]) / "again")  # a stranger's fine-tuned model must load as the first one did
    full = job["sources"]["cache"][0]
    AutoModelForPreTraining.from_pretrained(full, **REMOTE).save_pretrained(again)
    AutoProcessor.from_pretrained(full, **REMOTE).save_pretrained(again)
    job["sources"]["saved again"] = [again, job["sources"]["folder"][1]]
    names = {}
    for where, (full, encoder) in job["sources"].items():
        tensors, names[where] = check(full, encoder, inputs, picture)
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, str(Path(job["out"]) / f"{where}.safetensors"))
    with torch.no_grad():
        decoder = AutoModel.from_pretrained(job["decoder"], **REMOTE)
        names["decoder"] = type(decoder).__name__
        made = {"decoded": decoder(inputs["teacher_features"]).contiguous()}
    save_file(made, str(Path(job["out"]) / "decoded.safetensors"))
    (Path(job["out"]) / "names.json").write_text(json.dumps(names))
    assert not [name for name in sys.modules if name.partition(".")[0] in OURS]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
