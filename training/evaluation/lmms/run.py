"""lmms-eval on a LLaVA with UNIT's tower, and its figures in the format of `unit evaluate`: `unit lmms`.

lmms-eval runs as it would by hand, in its own process and, where needed, its own environment:

    LMMS_EVAL_PLUGINS=training.evaluation.lmms python -m lmms_eval --model unit_llava \\
        --model_args pretrained=my-llava --tasks docvqa_val --batch_size 8 --output_path OUT --log_samples

What it writes lies in ``OUT/lmms-eval``; from that come figures with intervals bootstrapped over questions, those
about one picture standing and falling together where the task's samples say which picture it was.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.evaluation import report
from training.evaluation.contract import Figure
from training.evaluation.image import bootstrap_interval
from training.evaluation.lmms import MODEL, environment
from training.evaluation.lmms.local import PREFIX, write_task
from training.evaluation.subjects import ModelSubject

SUITE = "vision-language"
SUBJECT = "LLaVA"
ROOT = Path(__file__).resolve().parents[3]  # where `training` is found


@dataclass(frozen=True)
class Settings:
    """What is handed on to lmms-eval.

    Attributes:
        limit: questions of each task, its first ones; None for all.
        batch_size: questions at once.
        device, dtype: of the model; None for a GPU if there is one, and for bfloat16 there and float32 on a CPU.
        seed: of Python, NumPy and torch, where a task draws.
        gen_kwargs: generation settings over those of the tasks, as lmms-eval takes them: ``max_new_tokens=128``.
        python: interpreter that has lmms-eval; None to find one.
    """

    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    gen_kwargs: str = ""
    python: str | None = None


@dataclass
class Outcome:
    """Of one task: its figures, what is to be said, and lmms-eval's file of its samples."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: str | None = None
    seconds: float = 0.0


def evaluate(
    model: str,
    tasks: Sequence[str],
    out: str | Path,
    settings: Settings | None = None,
    *,
    progress: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Run ``tasks`` on ``model`` and write ``results.json`` and ``report.md`` into ``out``.

    Args:
        model: folder or Hub id of a LLaVA.
        tasks: names of lmms-eval's tasks, or ``NAME=FILE.jsonl`` (see :mod:`training.evaluation.lmms.local`).
        out: folder; made when missing.
        progress: show lmms-eval's progress on standard error.
        command: what the report says it was made by.

    Returns:
        What was written to ``results.json``. A task that could not be run is a note there, the others go on.

    Raises:
        ValueError: no tasks, no model, something else than a LLaVA, a local file that is not as it should be, a
            setting out of range.
        NotMeasured: lmms-eval is not installed.
    """
    began = time.perf_counter()
    settings = settings or Settings()
    if not tasks:
        raise ValueError("no tasks; name some, such as docvqa_val, or a file of your own as NAME=FILE.jsonl")
    for what, value in (("--limit", settings.limit), ("--batch-size", settings.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    subject = ModelSubject(model, name=SUBJECT)
    kind = subject.config.get("model_type")
    if kind != "llava":
        raise ValueError(f"{model}: a {kind!r} checkpoint, no LLaVA; `unit llava` makes one of a tower and an LLM")
    out = Path(out).resolve()
    work = out / "lmms-eval"
    for path in (subject.folder, work):
        if set(str(path)) & set(",='\""):
            raise ValueError(f"{path}: lmms-eval takes no path with a comma, an equals sign or quotes in it")
    python = environment.python(settings.python)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    names: dict[str, str] = {}  # lmms-eval's -> ours
    outcomes: dict[str, Outcome] = {}
    for task in tasks:
        name, equals, file = task.partition("=")
        theirs, notes = write_task(name, file, work / "tasks") if equals else (name, [])
        if theirs in names:
            raise ValueError(f"two tasks are called {name!r}")
        names[theirs] = name
        outcomes[theirs] = Outcome(notes=notes)
    runner = _Runner(python, subject.folder, work, settings, progress)
    error = runner.run(list(names))  # together, so that the model is loaded once
    if error and len(names) == 1:
        outcomes[theirs].notes.append(error)
    elif error:  # one of them stops all: each by itself
        for name in names:
            error = runner.run([name])
            outcomes[name].notes += [error] if error else []
    _read(work, outcomes, settings.seed)
    results = _results(model, subject, names, outcomes, settings, command)
    results["versions"] = {**report.versions(), "lmms-eval": environment.version_of(python)}
    results["seconds"] = round(time.perf_counter() - began, 1)
    _write(results, names, out)
    return results


class _Runner:
    """Starts lmms-eval."""

    def __init__(self, python: str, model: Path, work: Path, settings: Settings, progress: bool):
        self.python, self.model, self.work, self.settings, self.progress = python, model, work, settings, progress

    def command(self, tasks: Sequence[str]) -> list[str]:
        """What is run."""
        settings = self.settings
        arguments = {"pretrained": self.model.resolve(), "failures": self.work / "failures.jsonl"}
        arguments |= {"dtype": settings.dtype} if settings.dtype else {}
        words = [self.python, "-m", "lmms_eval", "--model", MODEL, "--tasks", ",".join(tasks)]
        words += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
        words += ["--batch_size", str(settings.batch_size), "--seed", str(settings.seed)]
        words += ["--output_path", str(self.work / "results"), "--log_samples", "--timezone", "UTC"]
        if (self.work / "tasks").is_dir():
            words += ["--include_path", str(self.work / "tasks")]
        for option, value in (("limit", settings.limit), ("device", settings.device)):
            words += [f"--{option}", str(value)] if value is not None else []
        return words + (["--gen_kwargs", settings.gen_kwargs] if settings.gen_kwargs else [])

    def run(self, tasks: Sequence[str]) -> str:
        """Run some tasks together; "" or, in one line, why there are no results."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        plugins = [__package__, *filter(None, [os.environ.get("LMMS_EVAL_PLUGINS")])]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LMMS_EVAL_PLUGINS": ",".join(plugins)}
        variables |= {
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONIOENCODING": "utf-8",
        }
        if all(name.startswith(PREFIX) for name in tasks):
            variables["HF_HUB_OFFLINE"] = "1"  # model and questions are here: nothing to ask the Hub for
        before = set(_result_files(self.work))
        log = self.work / "log.txt"
        start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(tasks), stdout=file, stderr=subprocess.PIPE, env=variables, cwd=self.work
            )
            try:
                while said := process.stderr.read1(4096):
                    file.write(said)
                    file.flush()
                    if self.progress and b"\r" in said:  # a bar; the rest is for the log
                        sys.stderr.buffer.write(said)
                        sys.stderr.flush()
            finally:
                process.stderr.close()
                if process.poll() is None:
                    process.terminate()
                status = process.wait()
        # lmms-eval ends with 0 also after an error
        if set(_result_files(self.work)) - before:
            return ""
        with log.open("rb") as file:
            file.seek(start)
            said = file.read().decode("utf-8", "replace")
        return f"lmms-eval gave no results: {_reason(said, status)} ({report.shown(log)} has it all)"


def _result_files(work: Path) -> list[Path]:
    return sorted((work / "results").rglob("*_results.json"))


def _reason(said: str, status: int) -> str:
    """Why it failed, from what lmms-eval said last."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said).replace("\r", "\n")  # bars end with the one, errors with the other
    raised = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt)): (.+)$", plain, re.MULTILINE)
    # that something was tried five times says less than what was tried
    telling = [f"{kind}: {text.strip()}" for kind, text in raised if kind != "RetryError"]
    return telling[-1][:300] if telling else f"exit status {status}"


def _read(work: Path, outcomes: dict[str, Outcome], seed: int) -> None:
    """Figures from lmms-eval's files into the outcomes of their tasks; groups bring their members along."""
    failures = _lines(work / "failures.jsonl")
    for file in _result_files(work):
        found = json.loads(file.read_text(encoding="utf-8"))
        share = found.get("total_evaluation_time_seconds")
        for task, row in found["results"].items():
            outcome = outcomes.setdefault(task, Outcome())
            samples = next(iter(file.parent.glob(f"*_samples_{task}.jsonl")), None)
            outcome.samples = str(samples.relative_to(work.parent)) if samples else None
            failed = {line["doc_id"]: line["error"] for line in failures if line["task"] == task}
            figures, notes = figures_of(
                row, found.get("higher_is_better", {}).get(task) or {}, _lines(samples), len(failed), seed
            )
            outcome.figures, outcome.seconds = figures, float(share or 0) / len(found["results"])
            outcome.notes += notes
            if failed:
                example = next(iter(failed.values()))
                outcome.notes.append(f"{len(failed)} questions failed and count as wrong; the first: {example}")


def figures_of(
    row: Mapping[str, Any],
    higher: Mapping[str, bool],
    samples: Sequence[Mapping[str, Any]],
    failed: int = 0,
    seed: int = 0,
) -> tuple[list[Figure], list[str]]:
    """Figures of one task, and notes on what is no figure.

    Args:
        row: lmms-eval's results of the task: ``{"anls,none": 0.5, "anls_stderr,none": 0.01, ...}``.
        higher: measure -> whether more is better.
        samples: one dict a question, the measures among its keys.
        failed: how many questions failed.
        seed: of the bootstrap.

    The interval is a bootstrap over questions where the measure is the mean of a number that each has; else it is
    1.96 standard errors either way where lmms-eval has one; else there is none.
    """
    figures, notes = [], []
    pictures = [sample.get("input_media") for sample in samples]
    groups = [str(one) for one in pictures] if all(pictures) else None
    for key, value in row.items():
        measure, comma, used = key.partition(",")
        if not comma or "_stderr" in measure:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            if value not in (None, [], "N/A", ""):
                notes.append(f"{measure} is no number; it stands in lmms-eval's own results.")
            continue
        each = [sample.get(measure) for sample in samples]
        numbers = bool(each) and all(isinstance(one, (int, float)) and math.isfinite(one) for one in each)
        low = high = None
        error = row.get(f"{measure}_stderr,{used}")
        if numbers and math.isclose(sum(each) / len(each), value, rel_tol=1e-6, abs_tol=1e-9):
            low, high = bootstrap_interval(each, groups, seed=seed)
        elif isinstance(error, (int, float)) and math.isfinite(error):
            low, high = value - 1.96 * error, value + 1.96 * error
        inside = all(0 <= one <= 1 for one in ([*each, value] if numbers else [value]))
        figures.append(
            Figure(
                name=re.sub(r"[^a-z0-9]+", "_", measure.lower()).strip("_"),
                value=float(value),
                low=low,
                high=high,
                items=len(samples),
                failed=failed,
                unit="share" if inside else "",
                at={} if used == "none" else {"filter": used},
                better={True: "higher", False: "lower"}.get(higher.get(measure), ""),
            )
        )
    return figures, notes


def _lines(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _results(
    model: str,
    subject: ModelSubject,
    names: Mapping[str, str],
    outcomes: Mapping[str, Outcome],
    settings: Settings,
    command: str | None,
) -> dict[str, Any]:
    """What goes to results.json, all but versions and the time it took."""
    device = settings.device or "cpu"
    if settings.device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = [{"suite": SUITE, "evaluator": names.get(task, task), "subject": SUBJECT} for task in outcomes]
    asked = list(zip(where, outcomes.values(), strict=True))
    return {
        "format": report.FORMAT,
        "model": report.shown(model),
        "command": report.shown(command or f"unit lmms {shlex.quote(model)}"),
        "machine": report.machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "subjects": [{"name": SUBJECT, "role": "model", "path": report.shown(model), "hash": subject.hash()}],
        "figures": [figure.to_dict() | at for at, outcome in asked for figure in outcome.figures],
        "notes": [at | {"text": report.shown(text)} for at, outcome in asked for text in outcome.notes],
        "measured": [
            at | {"seconds": round(outcome.seconds, 1), "cached": False, "items": outcome.samples}
            for at, outcome in asked
            if outcome.figures
        ],
    }


def tables(results: Mapping[str, Any], level: int = 2) -> str:
    """A heading and a table for each task, and its notes."""
    parts = []
    for task in dict.fromkeys(row["evaluator"] for row in [*results["figures"], *results["notes"]]):
        parts.append(f"{'#' * level} {task}")
        rows = [row for row in results["figures"] if row["evaluator"] == task]
        parts += report.evaluator_tables(rows, [SUBJECT]) if rows else []
        notes = dict.fromkeys(note["text"] for note in results["notes"] if note["evaluator"] == task)
        parts += ["\n".join(f"* {note}" for note in notes)] if notes else []
    return "\n\n".join(parts)


def _write(results: Mapping[str, Any], names: Iterable[str], out: Path) -> None:
    """results.json and report.md."""
    page = [
        f"# {results['model']} in lmms-eval",
        "Brackets hold 95% bootstrap intervals over questions; ↓ marks what is better low.",
        tables(results),
        "## How it was measured",
        f"```sh\n{results['command']}\n```",
        f"{results['machine']}; lmms-eval {results['versions']['lmms-eval']}; {report.clock(results['seconds'])}.",
        "Questions, answers and marks one by one are in `lmms-eval/results/`.",
    ]
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
