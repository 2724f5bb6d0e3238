"""`unit evaluate`: measure a checkpoint on held-out data, write the report.

    unit evaluate MODEL --suite text,image,scale,cost,retention --peers tesseract --out evaluation

writes into ``--out``:

| file | what |
|---|---|
| ``results.json`` | every figure with its interval, format 2; after each evaluator, so that nothing measured is lost |
| ``report.md`` and ``SUITE.png`` | tables and plots |
| ``items/*.jsonl`` | what was found of each item, worst first |
| ``model-index.yaml``, ``eval_results/*.yaml`` | the same in the Hub's formats; see :mod:`.hub_results` |
| ``errors.log`` | tracebacks of what went wrong, if anything did |

Subjects are the model, its teacher, its stages, the encoder it started from, and peers; evaluators come from the
suites' modules. What was measured before, of the same weights, data and code, comes from :mod:`.cache`. One subject
after another is loaded, measured by all evaluators, and released. Held-out data is looked for where `unit data` puts
it, unless named.

Exit status: 0 if anything was measured, 1 if nothing could be, 2 for bad input, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.errors import first_line
from training.evaluation import report
from training.evaluation.cache import (
    Cache,
    Entry,
    hash_of_code,
    json_line,
    key_of,
    versions_that_decide,
    write_whole,
)
from training.evaluation.contract import (
    DESCRIBE,
    ENCODE,
    NAME,
    READ,
    SUITES,
    Evaluator,
    NeverMeasured,
    NotMeasured,
    Options,
    Subject,
    Work,
)
from training.evaluation.subjects import ModelSubject, looks_like_folder

# suite -> modules of this package, each with `evaluators(options)`
MODULES = {
    "text": ("text_suite", "census"),
    "image": ("image_suite",),
    "scale": ("scale_suite",),
    "cost": ("cost",),
    "retention": ("retention",),
}
LACKS = {
    READ: "has no language decoder and cannot read",
    DESCRIBE: "has no language decoder and cannot describe pictures",
    NAME: "has no projection to the space of a text encoder and cannot name pictures",
    ENCODE: "gives no features of pictures",
}
HOW_TO_NAME = {  # a role that figures are measured against -> how to name who plays it
    "teacher": "no teacher is known: --teacher MODEL names the encoder as it was before training",
    "start": "no start is known: --start MODEL names the encoder that training began with",
    "stage": "no earlier stage is known: --stages NAME=MODEL names one",
}
OURS = ("unit", "unit_vision_model")


@dataclass
class _Measure:
    """One evaluator on one subject: what it is known by, and what came of it."""

    evaluator: Evaluator
    subject: Subject
    place: tuple[int, int]  # in the report: of the evaluator, of the subject
    key: str = ""
    told: dict[str, Any] = field(default_factory=dict)
    entry: Entry | None = None
    cached: bool = False
    whole: bool = False  # measured in this run, without a fault
    written: bool = False  # its items


def evaluate(
    model: str,
    suites: Sequence[str] = SUITES,
    out: str | Path = "evaluation",
    *,
    options: Options | None = None,
    teacher: str | None = None,
    start: str | None = None,
    stages: Mapping[str, str] | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    seed: int = 0,
    use_cache: bool = True,
    progress: bool = True,
    command: str | None = None,
) -> dict:
    """Run ``suites`` on ``model`` and whoever it is compared with, and write the report into ``out``.

    Args:
        model: a folder or Hub id of a UNIT checkpoint or of an encoder.
        suites: any of ``SUITES``.
        out: folder for the report; made when missing.
        options: limits, data and peers; see :class:`~training.evaluation.contract.Options`.
        teacher: folder or Hub id of the encoder before training. By default the shipped checkpoint's own, or the
            folder that the checkpoint's ``recipe.json`` records, if it is there.
        start: folder or Hub id of the encoder that training began with, where that is not the teacher.
        stages: name -> folder or Hub id of the checkpoints on the way.
        batch_size: of reading and of encoding.
        device: where the models run, ``"cpu"`` or ``"cuda"``.
        seed: of bootstraps and of whatever else is drawn.
        use_cache: take what was measured before; without, everything is measured anew (and kept).
        progress: show what is being done.
        command: what the report says it was made by.

    Returns:
        What was written to ``results.json``; see :mod:`training.evaluation.report`.

    Raises:
        ValueError: an unknown suite or peer, a limit or batch size below 1, no model, no such device.
        KeyboardInterrupt: as it came; what is done is in the cache and in ``results.json``.
    """
    began = time.perf_counter()
    options = options or Options()
    _check(suites, options, batch_size)
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    subjects, notes = _subjects(model, teacher, start, stages or {}, options, device)
    evaluators, more = _evaluators(suites, options)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "errors.log").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: nothing can be written there ({error.strerror or error})") from error
    run = _Run(out, subjects, notes + more, seed, batch_size, device, progress)
    run.head = {
        "format": report.FORMAT,
        "model": report.shown(model),
        "command": command or f"unit evaluate {report.shown(model)} --suite {','.join(suites)}",
        "machine": report.machine(device),
        "versions": report.versions(),
    }
    run.plan(evaluators, Cache() if use_cache else None)
    run.measure(Cache(), began)
    results = run.write(began)
    report.write_report(results, out)
    _write_hub_results(results, out)
    return results


def _write_hub_results(results: dict, out: Path) -> None:
    from training.evaluation.hub_results import write_hub_results

    write_hub_results(results, out)


class _Run:
    """The measures of one command, and what is written of them."""

    def __init__(
        self,
        out: Path,
        subjects: Sequence[Subject],
        notes: list[dict[str, str]],
        seed: int,
        batch_size: int,
        device: str,
        progress: bool,
    ):
        self.out, self.subjects, self.notes = out, list(subjects), notes
        self.seed, self.batch_size, self.device, self.progress = seed, batch_size, device, progress
        self.measures: list[_Measure] = []
        self.hashes: dict[int, str] = {}
        self.head: dict[str, Any] = {}
        self.roles: dict[str, Subject] = {}
        self.known: Cache | None = None  # what earlier runs found; None where nothing of it is to be used
        for subject in subjects:
            self.roles[subject.role] = subject  # of several stages the last: the one before the model
        if "teacher" in self.roles:  # the paper's start and teacher are one and the same
            self.roles.setdefault("start", self.roles["teacher"])

    # ------------------------------------------------------------------------------------------------------------ plan

    def plan(self, evaluators: Sequence[Evaluator], cache: Cache | None) -> None:
        """Who is measured by what, and what of it is known already."""
        self.known = cache
        subjects = []
        for subject in self.subjects:
            try:
                self.hashes[id(subject)] = subject.hash()
                subjects.append(subject)
            except Exception as error:  # a peer that is there in part, a file that went away
                self.went_wrong(None, subject, error)
        found: list[_Measure] = []
        for number, evaluator in enumerate(evaluators):
            measured = self._measured_by(evaluator, subjects)
            if not measured:
                continue
            if evaluator.against is not None and evaluator.against not in self.roles:
                against = evaluator.against
                self.note(evaluator, None, HOW_TO_NAME.get(against, f"nobody here is the {against}"))
                continue
            try:
                fingerprint = evaluator.fingerprint()
                for subject in measured:
                    one = _Measure(evaluator, subject, (number, self.subjects.index(subject)))
                    one.told = self._told(evaluator, fingerprint, subject)
                    one.key = key_of(one.told)
                    found.append(one)
            except Exception as error:
                self.went_wrong(evaluator, None, error)
        for one in found:
            known = cache.get(one.key) if cache is not None else None
            one.entry = known.called(one.subject.name) if known is not None else None
            one.cached = one.entry is not None
            if one.cached and not one.entry.figures:  # why there is nothing is said again
                for text in one.entry.notes:
                    print(report.note_line(_where(one) | {"text": _line(text)}), file=sys.stderr)
        self.measures = found

    def _measured_by(self, evaluator: Evaluator, subjects: Sequence[Subject]) -> list[Subject]:
        able = []
        for subject in subjects:
            if evaluator.roles is not None and subject.role not in evaluator.roles:
                continue
            lacking = sorted(evaluator.needs - subject.can)
            if not lacking:
                able.append(subject)
            # of a teacher or a peer nobody expects that it can do everything
            elif subject.role in ("model", "stage"):
                note = {"suite": evaluator.suite, "evaluator": "", "subject": subject.name}
                note["text"] = f"{subject.name} {LACKS[lacking[0]]}"
                if note not in self.notes:
                    self.say_note(note)
        return able

    def _told(self, evaluator: Evaluator, fingerprint: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
        """All that decides the figures: what the cache knows them by."""
        against = self.roles.get(evaluator.against or evaluator.beside or "")
        # figures over another name it, as notes do
        compared = None if against is None else [self.hashes.get(id(against)), against.name]
        return {
            "subject": self.hashes[id(subject)],
            "against": compared,
            "suite": evaluator.suite,
            "evaluator": evaluator.name,
            "fingerprint": dict(fingerprint),
            "code": hash_of_code(),
            "versions": versions_that_decide(),
            "processor": report.processor(self.device),  # seconds are this machine's
            "device": self.device,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    # --------------------------------------------------------------------------------------------------------- measure

    def measure(self, cache: Cache, began: float) -> None:
        """Everything that is not known yet: subjects outer, so that weights are loaded once."""
        todo = sorted((one for one in self.measures if not one.cached), key=lambda one: one.place[::-1])
        if todo:
            _check_device(self.device)
            self._check_subjects(todo)
            todo = self._checked(todo)
        self.write(began)
        try:
            for number, one in enumerate(todo):
                alike = [each for each in todo[:number] if each.key == one.key and each.whole]
                if alike:  # the same weights by another name: a teacher that is the start, too
                    one.entry, one.cached = alike[0].entry.called(one.subject.name), True
                    continue
                if self.progress:
                    known = len(self.measures) - len(todo)
                    where = f"[{known + number + 1}/{len(self.measures)}] {report.clock(time.perf_counter() - began)}"
                    print(f"{where}  {one.evaluator.suite}: {one.evaluator.name}, {one.subject.name}", file=sys.stderr)
                self._one(one, cache)
                self.write(began)
                self._release(one.subject, todo[number + 1 :])
        finally:
            for subject in self.subjects:
                subject.release()

    def _check_subjects(self, todo: Sequence[_Measure]) -> None:
        """That all who are to be measured, or measured against, can be loaded, as far as their files tell.

        Raises:
            ValueError: one cannot; one line.
        """
        wanted = {id(one.subject) for one in todo}
        for one in todo:
            wanted.add(id(self.roles.get(one.evaluator.against or "")))
        for subject in self.subjects:
            if id(subject) in wanted and isinstance(subject, ModelSubject):
                subject.check()

    def _checked(self, todo: Sequence[_Measure]) -> list[_Measure]:
        """Those whose evaluator has what it needs; what the others lack is said before anything is measured."""
        lacking: set[int] = set()
        for evaluator in {id(one.evaluator): one.evaluator for one in todo}.values():
            try:
                evaluator.check()
            except Exception as error:
                lacking.add(id(evaluator))
                self.went_wrong(evaluator, None, error)
        self.measures = [one for one in self.measures if one.cached or id(one.evaluator) not in lacking]
        return [one for one in todo if id(one.evaluator) not in lacking]

    def _one(self, one: _Measure, cache: Cache) -> None:
        work = Work(self.batch_size, self.progress, self.seed, self.roles, cache=self.known)
        entry = one.entry = Entry([], work.items, work.notes, subject=one.subject.name)
        start = time.perf_counter()
        try:
            for figure in one.evaluator.figures(one.subject, work):
                if not math.isfinite(figure.value):
                    raise ValueError(f"{figure.name} came out as {figure.value}")
                entry.figures.append(figure)
        except NeverMeasured as error:
            entry.notes.append(str(error))
            print(report.note_line(_where(one) | {"text": _line(str(error))}), file=sys.stderr)
        except Exception as error:
            self.went_wrong(one.evaluator, one.subject, error)
            return
        finally:
            entry.seconds = round(time.perf_counter() - start, 3)
        # A peer fails where its program is gone or was killed, which says nothing of the peer: tried again next time.
        if one.subject.role == "peer" and any(figure.failed for figure in entry.figures):
            return
        try:
            one.whole = True
            cache.put(one.key, entry, one.told)
        except OSError as error:
            self.note(one.evaluator, one.subject, f"not kept for the next time: {error}")

    def _release(self, subject: Subject, rest: Sequence[_Measure]) -> None:
        """Let go of whoever has had its turn, and of those that figures were measured against, for the last time."""
        if any(one.subject is subject for one in rest):
            return
        for each in self.subjects:
            used = any(one.subject is each or self.roles.get(one.evaluator.against or "") is each for one in rest)
            if not used:
                each.release()

    # ----------------------------------------------------------------------------------------------------------- notes

    def note(self, evaluator: Evaluator | None, subject: Subject | None, text: str) -> None:
        """A line of the report, shown at once."""
        suite, name = (evaluator.suite, evaluator.name) if evaluator is not None else ("", "")
        line = _line(text)
        self.say_note({"suite": suite, "evaluator": name, "subject": subject.name if subject else "", "text": line})

    def say_note(self, note: dict[str, str]) -> None:
        self.notes.append(note)
        print(report.note_line(note), file=sys.stderr)

    def went_wrong(self, evaluator: Evaluator | None, subject: Subject | None, error: Exception) -> None:
        """One line for the report; of what nobody foresaw, the traceback in errors.log."""
        if isinstance(error, NotMeasured):
            self.note(evaluator, subject, str(error))
            return
        line = (str(error).strip().splitlines() or ["no message"])[0]
        self.note(evaluator, subject, f"{type(error).__name__}: {line} (traceback in errors.log)")
        with (self.out / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{report.note_line(self.notes[-1])}\n")
            log.write("".join(traceback.format_exception(type(error), error, error.__traceback__)) + "\n")

    # ----------------------------------------------------------------------------------------------------------- write

    def write(self, began: float) -> dict:
        """results.json and the items, as far as they are known."""
        done = sorted((one for one in self.measures if one.entry is not None), key=lambda one: one.place)
        figures, measured, notes = [], [], list(self.notes)
        for one in done:
            where = _where(one)
            set_id = {"dataset_id": one.evaluator.dataset_id} if one.evaluator.dataset_id else {}
            for figure in one.entry.figures:
                owner = {"subject": self.roles[figure.of].name} if figure.of in self.roles else {}
                figures.append(figure.to_dict() | where | set_id | owner)
            notes += [where | {"text": _line(text)} for text in one.entry.notes]
            items = self._write_items(one)
            measured.append(where | {"seconds": one.entry.seconds, "cached": one.cached, "items": items})
        counted: dict[str, int] = {}
        for each in figures:
            if each["name"] == "parameters":  # of the encoder, and of the whole
                counted[each["subject"]] = max(counted.get(each["subject"], 0), int(each["value"]))
        subjects = []
        for subject in self.subjects:
            known = {"name": subject.name, "role": subject.role, "path": report.shown(subject.path)}
            known["hash"] = self.hashes.get(id(subject), "")
            if subject.name in counted:
                known["parameters"] = counted[subject.name]
            subjects.append(known)
        results = self.head | {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - began, 1),
            "subjects": subjects,
            "figures": figures,
            "notes": notes,
            "measured": measured,
        }
        write_whole(self.out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        return results

    def _write_items(self, one: _Measure) -> str | None:
        """The items' file below ``out``, worst first; written once."""
        if not one.entry.items:
            return None
        names = (one.evaluator.suite, one.evaluator.name, one.subject.name)
        path = Path("items") / (
            "-".join(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names) + ".jsonl"
        )
        if not one.written:
            write_whole(self.out / path, "".join(map(json_line, sorted(one.entry.items, key=_badness))))
            one.written = True
        return path.as_posix()


def _where(one: _Measure) -> dict[str, str]:
    return {"suite": one.evaluator.suite, "evaluator": one.evaluator.name, "subject": one.subject.name}


def _line(text: str) -> str:
    """One line, without anybody's home folder."""
    return report.shown(" ".join(text.split()))


def _badness(item: Mapping[str, Any]) -> float:
    """Sorts the worst first: what failed, then what was read or named worst; the rest stays as it is."""
    if item.get("error"):
        return -1.0
    for key in ("word_f1", "correct"):
        if isinstance(item.get(key), (int, float)):
            return float(item[key])
    return 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Who is measured, and by what
# ---------------------------------------------------------------------------------------------------------------------


def _check(suites: Sequence[str], options: Options, batch_size: int) -> None:
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    if not suites:
        raise ValueError(f"no suite is named; known: {', '.join(SUITES)}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit must be at least 1, got {options.limit}")
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if options.resolutions is not None and (not options.resolutions or min(options.resolutions) < 1):
        raise ValueError("resolutions are sides in pixels, each at least 1")
    for name in ("blocks", "pages", "pictures", "chunks"):
        folder = getattr(options, name)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"--{name} {folder}: no such folder")
    for name in ("imagenet", "segmentation", "text_tower"):
        source = getattr(options, name)
        if source is not None and looks_like_folder(source) and not Path(source).is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {source}: no such folder")
    tower = options.text_tower
    if tower is not None and Path(tower).is_dir() and not (Path(tower) / "config.json").is_file():
        raise ValueError(f"--text-tower {tower}: no text encoder there: it has no config.json")
    for entry in options.sets:
        folder = entry.partition("=")[2]
        if folder and not Path(folder).expanduser().is_dir():
            raise ValueError(f"--sets {entry}: no such folder")


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        line = first_line(error)
        raise ValueError(f"--device {device}: torch cannot use it here ({line})") from error


def _evaluators(suites: Iterable[str], options: Options) -> tuple[list[Evaluator], list[dict[str, str]]]:
    """The evaluators of ``suites`` in the order of ``SUITES``, and notes on suites that have none."""
    found: list[Evaluator] = []
    notes: list[dict[str, str]] = []
    for suite in [suite for suite in SUITES if suite in set(suites)]:
        for name in MODULES[suite]:
            try:
                found += import_module(f"training.evaluation.{name}").evaluators(options)
            except NotMeasured as error:
                notes.append({"suite": suite, "evaluator": "", "subject": "", "text": _line(str(error))})
                print(report.note_line(notes[-1]), file=sys.stderr)
    return found, notes


def _subjects(
    model: str, teacher: str | None, start: str | None, stages: Mapping[str, str], options: Options, device: str
) -> tuple[list[Subject], list[dict[str, str]]]:
    """The model first, then teacher, start, stages and peers; notes on peers that are not there."""
    subject = ModelSubject(model, role="model", device=device)
    if subject.config.get("model_type") not in OURS:
        subject.name = Path(model).name
    found: list[Subject] = [subject]
    teacher = teacher or teacher_of(model)
    if teacher is not None:
        found.append(ModelSubject(teacher, "teacher", "teacher", device))
    if start is not None:
        found.append(ModelSubject(start, "start", "start", device))
    for name, path in stages.items():
        found.append(ModelSubject(path, name, "stage", device))
    notes: list[dict[str, str]] = []
    if options.peers:
        from training.evaluation.peers import subjects as peer_subjects

        peers, missing = peer_subjects(options.peers, device)
        found += peers
        for line in missing:
            notes.append({"suite": "", "evaluator": "", "subject": "", "text": _line(line)})
            print(report.note_line(notes[-1]), file=sys.stderr)
    names = [subject.name for subject in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two of those measured are called {name!r}; give each stage and peer once, by another name"
            )
    return found, notes


def teacher_of(model: str) -> str | None:
    """Where the teacher of a checkpoint is, as far as that is known: beside the shipped one; or the folder that
    ``recipe.json`` records. None where there is none."""
    folder = Path(model)
    package = find_spec("modeling_unit")
    if package is not None and package.origin is not None:  # modeling_unit.shipped_checkpoint() would import torch
        shipped = Path(package.origin).parent / "checkpoints" / "unit-tiny"
        if folder.is_dir() and shipped.is_dir() and folder.resolve() == shipped.resolve():
            near = folder if folder.name == shipped.name else shipped
            return str(near.with_name(f"{shipped.name}-teacher"))
    try:
        recorded = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["teacher"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    there = isinstance(recorded, str) and (Path(recorded) / "config.json").is_file()
    return recorded if there else None


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `unit evaluate`; :func:`run` takes what they parse to."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of a UNIT checkpoint or of an encoder")
    add("--suite", default=",".join(SUITES), help="comma-separated, some of %(default)s (default: all)")
    add("--peers", default="", help="comma-separated other readers: tesseract, rapidocr, hf:MODEL (default: none)")
    add("--out", type=Path, default=Path("evaluation"), help="folder to write to (default: %(default)s)")
    add("--teacher", metavar="MODEL", help="the encoder before training (default: the one that is recorded)")
    add("--start", metavar="MODEL", help="the encoder that training began with")
    add("--stages", nargs="+", default=[], metavar="NAME=MODEL", help="checkpoints on the way, by name")
    add("--limit", type=int, help="at most so many items of each set, spread evenly")
    add("--blocks", type=Path, help="folder of held-out blocks: of text, only the sets that are named are read")
    add("--pages", type=Path, help="folder of held-out pages: likewise")
    add(
        "--sets",
        default="",
        help="comma-separated sets of text that are read in place of the default ones, by name or as NAME=FOLDER: "
        "funsd, sroie, cord, scans, ...; `default` among them keeps those too",
    )
    add("--pictures", type=Path, help="folder of held-out pictures (default: as `unit data` builds them)")
    add("--chunks", type=Path, help="folder of held-out chunks of a few lines (default: likewise)")
    add("--imagenet", metavar="FOLDER_OR_ID", help="a labelled set of pictures, such as ImageNet-1k")
    add("--segmentation", metavar="FOLDER_OR_ID", help="a set for the segmentation probe, such as ADE20K")
    add("--text-tower", metavar="MODEL", help="text encoder that names classes (default: the model's own)")
    add("--resolutions", help="comma-separated sides in pixels at which pictures are measured")
    add("--batch-size", type=int, default=16, help="of reading and of encoding (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--seed", type=int, default=0, help="of bootstraps and of what else is drawn (default: %(default)s)")
    add("--no-cache", action="store_true", help="measure everything anew")
    add("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; see the top of this file for the exit status."""
    try:
        results = evaluate(
            arguments.model,
            _listed(arguments.suite),
            arguments.out,
            options=options_of(arguments),
            teacher=arguments.teacher,
            start=arguments.start,
            stages=_stages(arguments.stages),
            batch_size=arguments.batch_size,
            device=arguments.device,
            seed=arguments.seed,
            use_cache=not arguments.no_cache,
            progress=not arguments.quiet,
            command=arguments.command_line,
        )
    except ValueError as error:
        print(f"unit evaluate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"unit evaluate: --out {arguments.out}: cannot write there: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "what was measured is kept, and the same command goes on from there"
        print(f"\nunit evaluate: interrupted; {kept}", file=sys.stderr)
        return 130
    if not results["figures"]:
        print("unit evaluate: nothing could be measured; the lines above say why", file=sys.stderr)
        return 1
    print(report.summary(results))
    known = sum(one["cached"] for one in results["measured"])
    told = f"{known} of {len(results['measured'])} measures from the cache, {report.clock(results['seconds'])} in all"
    print(f"\n{told}; written to {arguments.out}/: report.md, results.json")
    return 0


def options_of(arguments: argparse.Namespace) -> Options:
    """What the suites are told.

    Raises:
        ValueError: a resolution that is no number.
    """
    resolutions = None
    if arguments.resolutions is not None:
        try:
            resolutions = tuple(int(side) for side in _listed(arguments.resolutions))
        except ValueError:
            raise ValueError(f"--resolutions {arguments.resolutions}: sides in pixels, such as 128,256") from None
    return Options(
        limit=arguments.limit,
        blocks=arguments.blocks,
        pages=arguments.pages,
        pictures=arguments.pictures,
        sets=tuple(_listed(arguments.sets)),
        imagenet=arguments.imagenet,
        segmentation=arguments.segmentation,
        text_tower=arguments.text_tower,
        peers=tuple(_listed(arguments.peers)),
        resolutions=resolutions,
        chunks=arguments.chunks,
    )


def _stages(given: Sequence[str]) -> dict[str, str]:
    stages = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--stages {one}: NAME=MODEL, such as 'stage 1=runs/stage1'")
        if name in stages:
            raise ValueError(f"--stages: two are called {name!r}")
        stages[name] = path
    return stages


class _Parser(argparse.ArgumentParser):
    """One line says what is wrong."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells what there is\n")


def main(argv: Sequence[str] | None = None) -> int:
    """`unit evaluate` on its own: ``python -m training.evaluation.run``."""
    parser = _Parser(prog="unit evaluate", description=__doc__.splitlines()[0].partition(": ")[2].capitalize())
    add_arguments(parser)
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    arguments.command_line = " ".join(["unit", "evaluate", *map(_quoted, map(report.shown, given))])
    return run(arguments)


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./~-]+", word) else shlex.quote(word)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
