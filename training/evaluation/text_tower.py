"""Text encoders that name pictures: a sentence encoder, or the text half of CLIP or SigLIP with its image projection.

tower = TextTower("openai/clip-vit-base-patch32")
tower.embed(["a photo of a zebra"])            # (1, 512), of length 1
tower.image_width                              # 768: class tokens of this width it can project
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import first_line
from training.evaluation.contract import NotMeasured

DUAL = ("clip", "siglip", "siglip2")  # models that have both halves
LONGEST = 128  # tokens of a sentence that are read by a sentence encoder; names and captions have a few dozen at most


class TextTower:
    """Sentences to vectors of length 1, and, of a dual encoder, tokens of pictures to the same space.

    Args:
        path: folder or Hub id of a CLIP or SigLIP model, of CLIP's text model with its projection, or of an encoder of
            sentences that takes the mean of its tokens or the first (as its ``1_Pooling/config.json`` says; without
            that file, the mean). Weights in safetensors only, and no code of the repository is run.
        device: where it runs.

    Attributes:
        width: of the vectors.
        image_width: width of the encoder's tokens that :meth:`embed_tokens` takes; None without an image half.

    Raises:
        NotMeasured: there is no such model, or none that can be used; one line.
    """

    def __init__(self, path: str, device: str = "cpu"):
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection

        self.path, self.device = path, device
        try:
            config = AutoConfig.from_pretrained(path)
            self.kind = "dual" if config.model_type in DUAL else "text"
            if config.model_type == "clip_text_model":
                self.kind, load = "clip text", CLIPTextModelWithProjection.from_pretrained
            else:
                load = AutoModel.from_pretrained
            self.model = load(path, dtype=torch.float32, use_safetensors=True).eval().to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # of the network, the configuration, the weights, the tokenizer: a class each
            line = first_line(error)
            raise NotMeasured(f"--text-tower {path}: no text encoder can be loaded from there ({line})") from error
        self.model_type, self.first_token = config.model_type, False
        self.image_width: int | None = None
        if self.kind == "dual":
            self.width = self.embed(["a"]).shape[1]
            if config.model_type == "clip" or getattr(config.vision_config, "vision_use_head", True):
                self.image_width = config.vision_config.hidden_size
        elif self.kind == "clip text":
            self.width = config.projection_dim
        else:
            self.first_token = self._pooling()
            self.width = config.hidden_size

    def embed(self, sentences: Sequence[str], batch: int = 64) -> np.ndarray:
        """(len(sentences), width) float32, of length 1."""
        import torch

        # SigLIP was trained on texts padded to its full length and reads others worse
        padding: dict[str, Any] = {"padding": True, "max_length": LONGEST}
        if self.kind != "text":
            text = self.model.config.text_config if self.kind == "dual" else self.model.config
            padding = {"padding": True, "max_length": text.max_position_embeddings}
            if self.model_type != "clip" and self.kind == "dual":
                padding["padding"] = "max_length"
        parts = []
        with torch.inference_mode():
            for start in range(0, len(sentences), batch):
                tokens = self.tokenizer(
                    list(sentences[start : start + batch]), truncation=True, return_tensors="pt", **padding
                ).to(self.device)
                if self.kind == "dual":
                    words = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
                    found = self.model.get_text_features(**words)
                    found = getattr(found, "pooler_output", found)  # transformers 5 returns an output, 4 a tensor
                elif self.kind == "clip text":
                    found = self.model(tokens["input_ids"], tokens["attention_mask"]).text_embeds
                else:
                    hidden = self.model(**tokens).last_hidden_state  # (B, T, width)
                    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                    found = hidden[:, 0] if self.first_token else (hidden * mask).sum(1) / mask.sum(1)
                parts.append(torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)

    def embed_tokens(self, class_token: Any, patches: Any) -> np.ndarray:
        """Tokens of the image half's width, as its last layer leaves them, to (B, width): what the image half itself
        does after its last layer.

        Args:
            class_token: (B, image_width), read by CLIP.
            patches: (B, N, image_width), read by SigLIP.
        """
        import torch

        vision = self.model.vision_model
        with torch.inference_mode():
            if self.model_type == "clip":
                found = self.model.visual_projection(vision.post_layernorm(class_token.float()))
            else:
                found = vision.head(patches.float())
        return found.float().cpu().numpy()

    def _pooling(self) -> bool:
        """Whether a sentence encoder takes its first token, and not the mean."""
        if _beside(self.path, "2_Dense/config.json") is not None:
            raise NotMeasured(
                f"--text-tower {self.path} has a further layer after its pooling, which is not applied here; name a "
                "sentence encoder without one"
            )
        pooling = _beside(self.path, "1_Pooling/config.json") or {}
        if pooling.get("pooling_mode_cls_token") or pooling.get("pooling_mode") == "cls":
            return True
        wanted = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
        if wanted not in ([], ["pooling_mode_mean_tokens"]) or pooling.get("pooling_mode", "mean") != "mean":
            raise NotMeasured(f"--text-tower {self.path} pools its tokens neither by the mean nor by the first one")
        return False


def _beside(path: str, name: str) -> dict | None:
    """A JSON file of a model's folder or repository, None where there is none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # a Hub that cannot be asked: the weights came from its cache
        return None
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def class_vectors(embed: Any, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """(classes, width) of length 1: the mean over ``prompts`` of each name's vectors, a "{}" standing for the name."""
    vectors = embed([prompt.format(name) for name in names for prompt in prompts])
    vectors = vectors.reshape(len(names), len(prompts), -1).mean(axis=1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Prompts for names of classes of photographs, 80 of them like the ensemble customary on ImageNet, in words of our own
# [ours]: every view with every ending.
_VIEWS = (
    "a photo of a {}", "a picture of the {}", "a close photo of a {}", "a photo of a {} from afar",
    "a sharp photo of a {}", "a blurred photo of the {}", "a dark photo of a {}", "a bright photo of the {}",
    "a small picture of a {}", "a photo of a large {}", "a photo of a small {}", "a photo of part of a {}",
    "a black and white photo of a {}", "a colour photo of the {}", "a drawing of a {}", "a painting of the {}",
    "a snapshot of my {}", "a photo of some {}", "an old photo of a {}", "a rendering of a {}",
)  # fmt: skip
_ENDINGS = ("", ".", ", seen indoors", ", seen outdoors")
PHOTO_PROMPTS = tuple(view + ending for view in _VIEWS for ending in _ENDINGS)
