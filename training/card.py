"""The model card: `card.md.jinja` filled from a run, its figures in the Hub's evaluation-results format as well."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PICTURE, CURVE, LOG, RECIPE, DATA = "features.png", "curve.png", "log.jsonl", "recipe.json", "data.json"
SCALES, RETENTION = "scales.png", "beside-teacher.png"  # in `evaluation/`
APP_SETTINGS = ("sdk", "sdk_version", "python_version", "app_file")  # of a Space's card, which starts by them
# How the Hub begins a new Space: front matter that names its sdk, and at most one line
HUBS_OWN = re.compile(
    r"\A\s*---\n(?:(?!---).*\n)*?sdk: .*\n(?:(?!---).*\n)*---\s*(Check out the configuration reference at \S+\s*)?\Z"
)
SIGNATURE = re.compile(r"\n<!-- written by unit-vision, sha256 ([0-9a-f]{64}) -->\s*\Z")
PARTS = {
    "vision_model": "encoder",
    "connector": "connector",
    "language_model": "language decoder",
    "vision_decoder": "vision decoder",
    "visual_projection": "projection, the teacher's",
}
LIMITS = [
    "What the training data did not hold, the model does not know: other scripts, handwriting, page layouts, kinds of "
    "pictures.",
    "Text that it reads may lack words, hold words twice, or hold words that the page does not: a person should check "
    "what matters.",
    "A page with instructions on it is text like any other; what is read from strangers' pages must not be trusted by "
    "programs.",
]


def data_list(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run was trained on, one entry a data set: `path`, `kind`, `scale`, `weight` as far as the recipe says."""
    found = []
    for group in recipe.get("groups") or []:
        for source in group.get("sources") or []:
            entry = {"path": source.get("path"), "kind": group.get("kind"), "scale": group.get("scale")}
            found.append(entry | {"weight": source.get("weight", 1.0)})
    for key in ("pictures", "conversations", "images"):
        if recipe.get(key):
            found.append({"path": recipe[key], "kind": key})
    return found


def parameter_table(model, full: bool) -> str:
    """Markdown table of the parts and their parameters."""
    from training.evaluation.report import markdown_table

    if not full:
        count = sum(parameter.numel() for parameter in model.parameters())
        return markdown_table(["part", "class", "parameters"], [["encoder", type(model).__name__, f"{count:,}"]])
    rows = []
    for name, part in model.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        rows.append([PARTS.get(name, name), type(part).__name__, f"{count:,}"])
    return markdown_table(["part", "class", "parameters"], rows)


def recipe_table(recipe: dict[str, Any]) -> str:
    """Markdown table of what a reader asks first: stage, starts, steps, rates, time."""
    from training.evaluation.report import markdown_table

    settings = {key: recipe.get(key) for key in ("stage", "start", "teacher", "language_decoder")}
    shown = ("max_steps", "optimizer", "learning_rate", "muon_learning_rate", "weight_decay", "warmup_steps")
    shown += ("lr_scheduler_type", "vision_weight", "vision_l1_weight", "token_sampling_ratio", "bf16", "seed")
    settings |= {key: (recipe.get("training") or {}).get(key) for key in shown}
    settings["lora"] = ", ".join((recipe.get("lora") or {}).get("parts") or []) or None
    settings["minutes"] = round(recipe["seconds"] / 60, 1) if recipe.get("seconds") else None
    return markdown_table(["setting", "value"], [[key, value] for key, value in settings.items() if value is not None])


def results_tables(results: dict[str, Any]) -> str:
    """What a reader asks first of `unit evaluate`, and where the rest is.

    Raises:
        ValueError: these are no results of `unit evaluate`, or of another format.
    """
    from training.evaluation.report import checked, summary

    checked(results)
    about = f"{results['machine']}. Brackets hold 95% bootstrap intervals; ↓ marks what is better low."
    return f"{about}\n\n{summary(results)}\n\nMade by `{results['command']}`."


def make_card(folder: Path, repo_id: str, facts: dict[str, Any]):
    """The `ModelCard` of an exported folder, its metadata checked by huggingface_hub's own classes.

    Args:
        folder: as it will be uploaded; what lies in it decides which sections are filled.
        facts: what only the model in memory knows: `kind` ("full" or "encoder"), `remote`, `clip`, `parts`,
            `patch_size`, `width`, `prefix_tokens`, `dtype`, `model_class`, `tasks`, `prompt`, `code`, `license`.

    Raises:
        ValueError: metadata that huggingface_hub refuses.
    """
    import jinja2  # torch depends on it
    from huggingface_hub import ModelCard, ModelCardData

    from .evaluation.hub_results import model_index

    full, name = facts["kind"] == "full", repo_id.rsplit("/", 1)[-1]
    recipe, results = _json(folder / RECIPE), _json(folder / "evaluation" / "results.json")
    tags = ["unit", "vision", "image-feature-extraction"] + (["ocr", "image-captioning"] if full else [])
    data = ModelCardData(
        license=facts["license"],
        library_name="transformers",
        pipeline_tag="image-text-to-text" if full else "image-feature-extraction",
        tags=tags,
        model_name=name,
        eval_results=(model_index(results, full) or None) if results else None,
    )
    rows = data_list(recipe or {})
    size = facts["patch_size"]
    what = "with the language decoder that reads with it" if full else "alone"
    summary = (
        f"A vision encoder that recognises pictures and reads text, {what}: trained by the method of UNIT (Zhu et "
        "al., NeurIPS 2024, [arXiv 2409.04095](https://arxiv.org/abs/2409.04095))."
    )
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts
        | {
            "card_data": data.to_yaml(),
            "name": name,
            "repo_id": repo_id,
            "summary": summary,
            "remote": ", trust_remote_code=True" if facts["remote"] else "",
            "picture": PICTURE if (folder / PICTURE).is_file() else None,
            "picture_text": "Pictures, and the principal components of this encoder's patch features as colours, at "
            f"two sizes: one square is a patch of {size} pixels",
            "recipe": recipe_table(recipe) if recipe else None,
            "data": _data_table(rows) if rows else None,
            "curve": CURVE if (folder / CURVE).is_file() else None,
            "log": (folder / LOG).is_file(),
            "results": results_tables(results) if results else None,
            "report": "evaluation/report.md" if (folder / "evaluation" / "report.md").is_file() else None,
            "scales": f"evaluation/{SCALES}" if (folder / "evaluation" / SCALES).is_file() else None,
            "scales_text": "Figures on held-out data against the size of the input, with 95% intervals",
            "retention": f"evaluation/{RETENTION}" if (folder / "evaluation" / RETENTION).is_file() else None,
            "retention_text": "Figures of held-out pictures, the model beside its teacher, with 95% intervals",
            "limits": LIMITS,
        }
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", content))  # what the template leaves where a section is empty


def signed(card: str) -> str:
    """A card with the hash of its text in a comment at its end, by which a later push tells whether it was edited."""
    text = SIGNATURE.sub("", card).rstrip() + "\n"
    return f"{text}\n<!-- written by unit-vision, sha256 {_hash(text)} -->\n"


def is_signed(card: str) -> bool:
    """Whether a card is, word for word, as a push wrote it."""
    card = card.replace("\r\n", "\n")
    found = SIGNATURE.search(card)
    return found is not None and found[1] == _hash(card[: found.start()])


def is_untouched(card: str) -> bool:
    """Whether nobody's words are lost with a card: it is as a push wrote it, or as the Hub begins a new repository."""
    return is_signed(card) or HUBS_OWN.match(card.replace("\r\n", "\n")) is not None


def with_app_settings(card: str, ours: str) -> str:
    """A Space's card, edited by hand, with those settings of `ours` without which the app does not start.

    Raises:
        ValueError: the front matter of the edited card cannot be read.
    """
    import yaml
    from huggingface_hub import SpaceCard

    wanted = SpaceCard(ours).data.to_dict()
    try:
        edited = SpaceCard(card)
        there = edited.data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"README.md there was edited and its front matter cannot be read ({str(error).splitlines()[0]}): mend it, "
            "or say --overwrite-card"
        ) from error
    changes = {key: wanted[key] for key in APP_SETTINGS if key in wanted and there.get(key) != wanted[key]}
    if not changes:
        return card
    for key, value in changes.items():
        setattr(edited.data, key, value)
    return str(edited)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _data_table(rows: list[dict[str, Any]]) -> str:
    from training.evaluation.report import markdown_table

    names = ("path", "kind", "scale", "weight")
    return markdown_table(
        ["data set", *names[1:]],
        [["-" if row.get(name) is None else row[name] for name in names] for row in rows],
    )


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object of a file, or None where there is no such file.

    Raises:
        ValueError: the file is there and holds something else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} must hold an object.")
    return found


def draw_picture(model, image_processor, path: Path) -> None:
    """Two sample pictures beside their features as colours; nothing where the samples are not installed."""
    from PIL import Image

    import spaces_demo
    from unit_cli.feature_sheet import draw
    from unit_cli.features import grids

    folder = Path(spaces_demo.__file__).parent / "samples" / "pictures"
    base = image_processor.base_size
    sizes, drawn = [base, 2 * base], []
    for file in sorted(folder.glob("*.jpg"))[2:4]:
        with Image.open(file) as picture:
            drawn.append((file.stem, picture.convert("RGB"), grids(model, image_processor, picture, sizes, -1)))
    if drawn:
        draw(drawn, sizes).save(path, format="PNG", optimize=True)
