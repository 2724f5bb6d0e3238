"""`unit describe PATH...`: captions of pictures, and rankings of labels."""

from __future__ import annotations

import argparse
import json
import sys

from .common import CommandError, Progress, add_model_argument, complain, first_line, groups, load, positive
from .inputs import open_inputs


def add_parser(subparsers) -> None:
    """Add `describe` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "describe",
        help="say what pictures show",
        description="Caption pictures. With --labels, rank them too: by the decoder's likelihood, which needs nothing "
        "more, or by similarity in the space of a text tower.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="picture")
    parser.add_argument("--labels", metavar="A,B,C", help="labels to rank, separated by commas")
    parser.add_argument(
        "--text-tower",
        metavar="FOLDER_OR_ID",
        help="sentence encoder to rank labels with, the one that the model was aligned with",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--batch-size", type=positive, default=16, help="pictures at once (default: 16)")
    add_model_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Describe, print, and return 2 if any input was refused."""
    labels = [label.strip() for label in (args.labels or "").split(",") if label.strip()]
    if args.labels is not None and not labels:
        raise CommandError("--labels names no label; give some, separated by commas")
    if args.text_tower and not labels:
        raise CommandError("--text-tower ranks labels: give --labels too")
    auto = "AutoModelForPreTraining" if args.text_tower else "AutoModelForImageTextToText"
    model, processor, name = load(args.model, args.device, auto)
    from modeling_unit.reading_unit import Reader

    if not hasattr(model, "generate"):
        raise CommandError(f"{name}: this model cannot describe: it has no language decoder")
    reader = Reader(model, processor, batch_size=args.batch_size)
    tower = _TextTower(args.text_tower, labels, model, processor, name) if args.text_tower else None
    status, results = 0, []
    with Progress("describing", "picture") as progress:
        for group in groups(open_inputs(args.paths), args.batch_size):
            images = [item.image for item in group if item.image is not None]
            captions = iter(reader.describe(images, progress=progress))
            for item in group:
                if item.error:
                    complain("describe", item.error)
                    status = 2
                    results.append({"file": item.path, "page": item.page, "error": item.error})
                    continue
                if item.note:
                    complain("describe", f"{item.name}: {item.note}")
                caption = next(captions)
                entry = {"file": item.path, "page": item.page}
                entry |= {"caption": caption.text, "confidence": caption.confidence}
                entry["seconds"] = round(caption.seconds, 3)
                if tower:
                    entry["labels"] = tower.rank(item.image)
                elif labels:
                    ranked = reader.rank_labels(item.image, labels)
                    entry["labels"] = [{"label": one.label, "score": one.likelihood} for one in ranked]
                results.append(entry)
                if args.format == "text":
                    print(f"{item.name}: {caption.text}  ({caption.confidence:.2f})", flush=True)
                    for one in entry.get("labels", ()):
                        print(f"  {one['score']:.3f}  {one['label']}", flush=True)
    if args.format == "json":
        json.dump({"model": name, "pictures": results}, sys.stdout, ensure_ascii=False, indent=1)
        print()
    return status


class _TextTower:
    """Labels and pictures in one space: cosine similarities.

    Raises:
        CommandError: the model has no projection, or the tower's width is another.
    """

    def __init__(self, tower: str, labels: list[str], model, processor, name: str):
        import torch
        from transformers import AutoModel, AutoTokenizer

        width = getattr(model.config, "projection_dim", 0)
        if not width:
            raise CommandError(
                f"{name}: this model has no projection to a text tower, so --text-tower cannot be used; without it, "
                "labels are ranked by the decoder"
            )
        try:
            tokenizer, encoder = AutoTokenizer.from_pretrained(tower), AutoModel.from_pretrained(tower).eval()
        except (OSError, ValueError, KeyError) as error:
            raise CommandError(f"{tower}: cannot be loaded as a text tower: {first_line(error)}") from error
        with torch.inference_mode():
            inputs = tokenizer(labels, padding=True, truncation=True, return_tensors="pt")
            hidden = encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            # Sentence encoders of this family take the mean over the words.
            means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        if means.shape[1] != width:
            raise CommandError(
                f"{tower}: gives {means.shape[1]} numbers a text and {name} was aligned with a tower of {width}; "
                "name the sentence encoder that its model card names"
            )
        self.labels, self.model, self.processor = labels, model, processor
        self.texts = torch.nn.functional.normalize(means.float(), dim=-1)  # (labels, width)

    def rank(self, image) -> list[dict]:
        import torch

        inputs = self.processor.image_processor(image, kind="natural", return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            picture = self.model.get_projected_image_features(**inputs)[0].float().cpu()
        scores = (self.texts @ picture).tolist()
        ranked = sorted(zip(self.labels, scores, strict=True), key=lambda pair: -pair[1])
        return [{"label": label, "score": score} for label, score in ranked]
