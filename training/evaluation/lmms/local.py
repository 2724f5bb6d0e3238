"""A task of lmms-eval from a file of one's own: pictures, questions, answers.

    {"image": "receipts/0001.jpg", "question": "What is the total?", "answer": "12.50"}
    {"image": "receipts/0002.jpg", "question": "Who sold it?", "answer": ["Miller & Sons", "Miller"]}

One JSON object a line. `image` is a path, relative to the file. `answer` is a text, a number, or a list of them of
which any is right. The question is asked as it stands; what form the answer shall have belongs into it ("Answer with
a single word."). Three measures, each the mean over questions of the best over the right answers:

* `exact_match`: equal but for case and white space [ours];
* `anls`: average normalised Levenshtein similarity, 1 - distance / longer length where that is above 0.5, else 0; case
  and white space aside [Biten et al. 2019, arXiv 1905.13648; DocVQA's measure];
* `relaxed_accuracy`: a number within 5% of the right one, anything else equal but for case [Masry et al. 2022, arXiv
  2203.10244, sec. 5.1; ChartQA's measure].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "tasks" / "_local_file_yaml"
PREFIX = "local_"  # lmms-eval prefers its own task of the same name
COLUMNS = ("image", "question", "answer")


def read_local(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The questions of a file, and notes on those whose picture is not there.

    A question whose picture is missing stays: it will fail, and count as wrong.

    Returns:
        Rows of `image` (absolute path), `question`, `answers` (texts); notes of a line each.

    Raises:
        ValueError: a file that is not there, is empty or not JSON lines; a line without one of the columns, or with
            something else there than text; a file none of whose pictures is there.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    rows, notes = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON object: {error}") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no JSON object, but {type(entry).__name__}")
        for column in COLUMNS:
            if entry.get(column) in (None, "", []):
                raise ValueError(f"{where} has no {column!r}; every line needs {', '.join(COLUMNS)}")
        for column in ("image", "question"):
            if not isinstance(entry[column], str):
                raise ValueError(f"{where}: {column!r} must be text, not {type(entry[column]).__name__}")
        answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
        if not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in answers):
            raise ValueError(f"{where}: 'answer' must be a text, a number, or a list of them")
        if not all(str(one).strip() for one in answers):
            raise ValueError(f"{where}: 'answer' must not be empty")
        image = path.resolve().parent / entry["image"]
        if not image.is_file():
            notes.append(f"{where}: there is no image {entry['image']}; the question counts as wrong.")
        rows.append({"image": str(image), "question": entry["question"], "answers": [str(one) for one in answers]})
    if not rows:
        raise ValueError(f"{path} holds no questions")
    if len(notes) == len(rows):
        raise ValueError(f"{path}: none of its {len(rows)} images is there; paths are relative to {path.parent}")
    return rows, notes


def write_task(name: str, path: str | Path, folder: str | Path) -> tuple[str, list[str]]:
    """Write the task for `lmms_eval --include_path FOLDER`; returns its name there, and the notes of the file.

    Raises:
        ValueError: as :func:`read_local`; a name that is no name.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"{name!r} cannot be the name of a task; letters, digits, - and _ can")
    rows, notes = read_local(path)
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    task, data = f"{PREFIX}{name}", folder / f"{PREFIX}{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # JSON texts are YAML texts
    (folder / f"{task}.yaml").write_text(
        f"task: {json.dumps(task)}\n"
        f"include: {json.dumps(str(TEMPLATE.resolve()))}\n"
        f"dataset_kwargs: {json.dumps({'data_files': {'test': str(data)}, 'cache_dir': str(folder / 'cache')})}\n",
        encoding="utf-8",
    )
    return task, notes


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The picture of a question."""
    from PIL import Image

    with Image.open(doc["image"]) as picture:
        picture.load()
        return [picture]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Marks of the answer to one question."""
    return marks(results[0], doc["answers"])


def marks(said: str, answers: Sequence[str]) -> dict[str, float]:
    """All three measures of one answer; an empty one has none."""
    found = _plain(said)
    return {
        "exact_match": float(any(found == _plain(one) for one in answers)),
        "anls": max(_similarity(found, _plain(one)) for one in answers),
        "relaxed_accuracy": float(any(_relaxed(found, _plain(one)) for one in answers)),
    }


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(said: str, right: str) -> float:
    from rapidfuzz.distance import Levenshtein

    if not said or not right:
        return 0.0
    similarity = Levenshtein.normalized_similarity(said, right)
    return similarity if similarity > 0.5 else 0.0


def _relaxed(said: str, right: str, tolerance: float = 0.05) -> bool:
    said_number, number = _number(said), _number(right)
    if said_number is None or not number:  # a share of nothing is nothing
        return said == right
    return abs(said_number - number) <= tolerance * abs(number)


def _number(text: str) -> float | None:
    """`12`, `1.5e3`, `12%` (0.12)."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
