"""Results in the Hub's two formats.

* ``.eval_results/*.yaml`` of a model's repository, the Hub's decentralised evaluation results: a list of entries
  ``{dataset: {id, task_id}, value, date, notes}``, one per figure (https://huggingface.co/docs/hub/eval-results). The
  Hub shows them on the model's page and on the leaderboard of the data set, so that only sets which are on the Hub
  under an id can be named there: of the figures here those whose evaluator has a ``dataset_id``. ``task_id`` is the
  figure's name; a leaderboard lists those tasks that the data set's own ``eval.yaml`` names. ``verifyToken`` is for
  evaluations that the Hub itself ran, and ``source`` for logs that are on the web: neither is there.
* ``model-index`` in the front matter of the card, the format before it, which takes any set: ours, held out and
  nowhere on the Hub, are told of there.

`unit evaluate` writes both beside its report, in ``eval_results/`` and ``model-index.yaml``, for whoever wants to put
them somewhere by hand; `unit push` writes them where the Hub reads them. Figures of peers, teachers and stages are not
the model's and stay out. What of a full model's figures needs its decoders is left out for its encoder alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.evaluation.report import at_text, figures_of, subject_of, title

Record = Mapping[str, Any]

FOLDER = "eval_results"  # beside the report; in a repository with a dot in front
PREFIX = "unit-"  # of the files that `unit push` writes: others' stay as they are
# figure -> (task, metric) of model-index, whose names are the Hub's; one a question, for front matter is no report
METRICS = {
    "word_f1": ("image-to-text", "f1"),
    "cer": ("image-to-text", "cer"),
    "knn_accuracy": ("image-classification", "accuracy"),
    "probe_accuracy": ("image-classification", "accuracy"),
    "zero_shot_top1": ("zero-shot-image-classification", "accuracy"),
    "segmentation_miou": ("image-segmentation", "mean_iou"),
}
SUITES = ("text", "image")  # the others compare the model with itself or with others


def hub_id(source: str | None) -> str | None:
    """``source`` itself where it names a data set on the Hub, and not a folder that is there."""
    named = source is not None and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source)
    return source if named and not Path(source).exists() else None


def model_figures(results: Record, full: bool = True) -> list[Record]:
    """The figures of the model itself that a repository of it can be told to have.

    Args:
        full: whether the repository holds the decoders and the projection too; without, reading and naming, and what
            goes through the vision decoder, are not the encoder's.
    """
    model = subject_of(results, "model")
    rows = [row for row in figures_of(results, subject=model) if row["suite"] in SUITES and row["name"] in METRICS]
    return rows if full else [row for row in rows if of_encoder(row)]


def of_encoder(row: Record) -> bool:
    """Whether a figure is the encoder's own, without any part that a full model has beside it."""
    ways = [value for value in row.get("at", {}).values() if isinstance(value, str)]
    decoded = any("vision decoder" in way and not way.startswith("no ") for way in ways)
    return row["suite"] != "text" and not row["name"].startswith("zero_shot") and not decoded


def eval_result_files(results: Record, full: bool = True) -> dict[str, str]:
    """Name -> YAML of the files for ``.eval_results/``, one a data set; {} where no set is on the Hub.

    What tells two figures of one name apart, such as the resolution, stands in ``notes``.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found: dict[str, list[EvalResultEntry]] = {}
    for row in model_figures(results, full):
        if row.get("dataset_id"):
            entry = EvalResultEntry(
                dataset_id=row["dataset_id"],
                task_id=row["name"],
                value=round(row["value"], 4),
                date=results["date"],
                notes=_notes(row),
            )
            found.setdefault(row["dataset_id"], []).append(entry)
    return {
        f"{PREFIX}{_slug(dataset)}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True
        )
        for dataset, entries in found.items()
    }


def model_index(results: Record, full: bool = True) -> list:
    """``huggingface_hub.EvalResult`` of the model's figures, on the Hub's sets and on ours; of those at each x-height
    word F1 and CER alone, for a card's front matter is no report."""
    from huggingface_hub import EvalResult

    found = []
    for row in model_figures(results, full):
        if "x_height" in row.get("at", {}) and row["name"] not in ("word_f1", "cer"):
            continue
        task, metric = METRICS[row["name"]]
        told = ", ".join(at_text(key, value) for key, value in row.get("at", {}).items())
        args = {"items": row.get("items", 0)}
        if row.get("low") is not None and row.get("high") is not None:
            args |= {"confidence": 0.95, "low": round(row["low"], 4), "high": round(row["high"], 4)}
        if row.get("failed"):
            args["failed"] = row["failed"]
        called = title(row["name"]) if row["suite"] == "text" else row["name"]
        found.append(
            EvalResult(
                task_type=task,
                dataset_type=row.get("dataset_id") or f"unit-heldout-{_slug(row['evaluator'])}",
                dataset_name=row["evaluator"] if row.get("dataset_id") else f"held-out: {row['evaluator']}",
                metric_type=metric,
                metric_name=f"{called}, {told}" if told else called,
                metric_value=round(row["value"], 4),
                metric_args=args,
                verified=False,
            )
        )
    return found


def write_hub_results(results: Record, folder: Path) -> None:
    """Write ``model-index.yaml`` and, of sets on the Hub, ``eval_results/*.yaml`` into ``folder``."""
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    files = eval_result_files(results)
    for name, text in files.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / name).write_text(text, encoding="utf-8")
    found = model_index(results)
    if found:
        index = {"model-index": eval_results_to_model_index(Path(results["model"]).name or "model", found)}
        text = yaml.safe_dump(index, sort_keys=False, allow_unicode=True)
        (folder / "model-index.yaml").write_text(text, encoding="utf-8")


def _notes(row: Record) -> str:
    parts = [at_text(key, value) for key, value in row.get("at", {}).items()]
    if row.get("items"):
        parts.append(f"{row['items']} items" + (f", {row['failed']} failed" if row.get("failed") else ""))
    if row.get("low") is not None and row.get("high") is not None:
        parts.append(f"95% interval {row['low']:.4f} to {row['high']:.4f}")
    return ", ".join([*parts, "unit evaluate"])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
