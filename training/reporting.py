"""What a person sees of a run while it goes: the terminal, TensorBoard, trackio, and how fast it is.

Terminal. A bar with what is left of the time where there is a terminal, and one line of at most `WIDTH` columns for
each logging step and each evaluation; into a file or a CI log the lines alone.

TensorBoard (`training.report_to: tensorboard`) writes below `OUTPUT_DIR/tensorboard`; trackio (`trackio`) into its
local database, `TRACKIO_DIR` or `~/.cache/huggingface/trackio`: no Space is made, nothing leaves the machine and no
token is asked for, unless the recipe names a Space (`training.trackio_space_id`) or the environment does
(`TRACKIO_SPACE_ID`, `TRACKIO_SERVER_URL`). Tags are `train/GROUP/TERM`, `train/learning_rate/PART`, `train/speed/...`
and `eval/...`; samples come with each evaluation, the recipe as text and as hyperparameters.

A run that goes on from a checkpoint goes on in the same place: points after the checkpoint, which the run had logged
before it was lost, are dropped, and those that a kill kept from the database are filled in from the checkpoint's log.

Speed is measured between two lines of the log, without what evaluations and checkpoints take, and counted from the
shapes of the batches; text tokens, of which padding is no part, are summed up on the device and read with the line, so
that no step waits for the device. It is kept in `speed.jsonl`: `log.jsonl` beside it holds what is the same whenever a
run is repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .checkpoints import write_log_lines
from .sample_sheet import group_title

WIDTH = 120  # columns of a line, at most
SPEED = "speed"  # what their names begin with
SPEED_LOG = "speed.jsonl"  # beside log.jsonl
BOARD = "tensorboard"  # folder of a run
TRACKIO_RUN = "trackio.json"  # file of a run: its project and name
PROJECT = "unit"  # trackio's, where the recipe names none
NO_PROJECT = "huggingface"  # transformers' default
ONCE = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


# -- speed --------------------------------------------------------------------------------------------------------


class Meter:
    """Counts what goes through the model between two lines of the log."""

    def __init__(self) -> None:
        self.clear()
        self.began = 0.0

    def clear(self) -> None:
        self.images, self.patches, self.steps = 0, 0, 0
        self.tokens: torch.Tensor | int = 0
        self.busy, self.waited = 0.0, 0.0  # seconds

    def step_begins(self) -> None:
        self.began = time.perf_counter()

    def data_is_there(self, batches: list[Any], patch_size: int) -> None:
        self.waited += time.perf_counter() - self.began
        for batch in batches:
            for group in _groups(batch):
                self._count(group, patch_size)

    def step_ends(self) -> None:
        self.busy += time.perf_counter() - self.began
        self.steps += 1

    def _count(self, group: dict[str, Any], patch_size: int) -> None:
        pixels, grids = group.get("pixel_values"), group.get("image_grid_hw")
        positions = group.get("positions")  # pictures that lie on the device
        if isinstance(pixels, torch.Tensor):
            self.images += len(pixels) if grids is None else len(grids)
            self.patches += len(pixels) if grids is not None else pixels[:, 0].numel() // patch_size**2
        elif positions is not None:
            self.images += len(positions)
        labels = group.get("labels")
        if isinstance(labels, torch.Tensor):
            self.tokens = self.tokens + (labels >= 0).sum()  # stays on the device


def _groups(batch: Any) -> list[dict[str, Any]]:
    if not isinstance(batch, dict):
        return []
    values = list(batch.values())
    return values if values and all(isinstance(each, dict) for each in values) else [batch]


class ReportingTrainer(Trainer):
    """A `Trainer` that reports as this module's text says.

    Attributes:
        facts: `recipe` of it is reported (see [`WholeCheckpoints`]). last_speed: of the last line of the log that had
            a loss, by names that begin with `speed/`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = Meter()
        self.last_speed: dict[str, float] = {}
        for kind, ours in ((TensorBoardCallback, Board), (TrackioCallback, Trackio), (ProgressCallback, Terminal)):
            if self.pop_callback(kind) is not None:
                self.add_callback(ours(self))
        if self.pop_callback(PrinterCallback) is not None:
            self.add_callback(Terminal(self))
        self.add_callback(_Stopwatch(self))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self.meter.step_begins()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.meter.data_is_there(found[0], _patch_size(self.model))
        return found

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            self.last_speed = {f"{SPEED}/{key}": value for key, value in self.speed().items()}
            self.meter.clear()
            if "learning_rate" in logs:
                logs = logs | part_rates(self.optimizer, logs["learning_rate"])
        super().log(logs, *args, **kwargs)

    def speed(self) -> dict[str, float]:
        """Of all ranks together, since the last line of the log; of the time, the share spent waiting for data."""
        meter = self.meter
        if not meter.steps:
            return {}
        counts = torch.tensor([meter.images, meter.patches, 0, meter.busy, meter.waited], dtype=torch.float64)
        counts[2] = float(meter.tokens)
        world = max(1, self.args.world_size)
        if world > 1:
            on_device = counts.float().to(self.args.device)
            counts = self.accelerator.reduce(on_device, "sum").cpu().double()
        images, patches, tokens, busy, waited = counts.tolist()
        seconds = max(busy / world, 1e-9)
        found = {"images_per_second": images / seconds, "patches_per_second": patches / seconds}
        found |= {"text_tokens_per_second": tokens / seconds, "seconds_per_step": seconds / meter.steps}
        found |= {"data_wait": waited / max(busy, 1e-9), "memory_gib": memory(self.args.device)}
        return {key: float(f"{value:.4g}") for key, value in found.items() if value or key == "data_wait"}


class _Stopwatch(TrainerCallback):
    """Keeps `speed.jsonl`, which goes on from a checkpoint as the log does."""

    def __init__(self, trainer: ReportingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.meter.clear()
        path = speed_path(self.trainer)
        if path is not None and state.is_world_process_zero:
            before = [entry for entry in read_speed(path) if entry["step"] <= state.global_step]
            with contextlib.suppress(OSError):  # the log itself says so
                write_log_lines(path, before)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.meter.step_ends()

    def on_log(self, args, state, control, logs=None, **kwargs):
        path = speed_path(self.trainer)
        if path is None or not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        if self.trainer.last_speed:
            with contextlib.suppress(OSError), path.open("a") as opened:
                opened.write(json.dumps(self.trainer.last_speed | {"step": state.global_step}) + "\n")


def speed_path(trainer: Any) -> Path | None:
    """Where a run's speed is kept: where its log is."""
    log = getattr(trainer, "log_path", None)
    return None if log is None else Path(log).with_name(SPEED_LOG)


def read_speed(path: Path) -> list[dict[str, Any]]:
    """The lines of `speed.jsonl`; none where there is no such file."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # the line that a kill or a look at a running run has cut off
            entry = json.loads(line)
            if isinstance(entry, dict) and "step" in entry:
                entries.append(entry)
    return entries


def _patch_size(model: Any) -> int:
    while hasattr(model, "module"):
        model = model.module
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", config)
    return int(getattr(vision, "patch_size", 0) or 1)


def memory(device: torch.device) -> float:
    """The most memory that this process had at once, GiB: of the GPU where the model is on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return most / (2**30 if sys.platform == "darwin" else 2**20)


def part_rates(optimizer: Any, first: float) -> dict[str, float]:
    """Learning rate of each part and kind of optimiser, where they are not all one; of several rates within a part
    the largest.

    Args:
        first: the rate of the first group. All move together.
    """
    groups = getattr(optimizer, "param_groups", None) or []
    initial = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if len(set(initial)) < 2 or not initial[0]:
        return {}
    found: dict[str, float] = {}
    for group, rate in zip(groups, initial, strict=True):
        if "part" in group:
            name = f"learning_rate/{group['part']}" + ("_muon" if group.get("muon") else "")
            found[name] = max(found.get(name, 0.0), first * rate / initial[0])
    return found


# -- terminal -----------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """A number in few characters: `3.877`, `0.0123`, `6.5e-04`, `1,234`."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 100 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """`0:42`, `3:05:00`, `2 d 03:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def log_line(logs: dict[str, Any], step: int, steps: int, left: float | None = None, width: int = WIDTH) -> str:
    """A line of the log in at most `width` columns, the most telling first; what does not fit is left out.

    Args:
        left: seconds to the end of the run. width: columns.
    """
    evaluates = any(key.startswith("eval_") for key in logs)
    terms = {key.removeprefix("eval_"): value for key, value in logs.items() if isinstance(value, int | float)}
    head = f"{'eval' if evaluates else 'step'} {step:>{len(f'{steps:,}')},}/{steps:,}"
    parts = []
    for key, label in (("loss", "loss"), ("word_f1", "word F1"), ("cer", "CER"), ("exact", "exact")):
        if key in terms:
            parts.append(f"{label} {short(terms[key])}")
    if left is not None and not evaluates:
        parts.append(f"{duration(left)} left")
    parts += [f"{label} {short(value)}" for label, value in _told_terms(terms)]
    for key, label in (("images_per_second", "images/s"), ("data_wait", "waits")):
        value = terms.get(f"{SPEED}/{key}")
        if value is not None:
            parts.append(f"waits {value:.0%}" if key == "data_wait" else f"{value:,.3g} {label}")
    for key, label in (("learning_rate", "rate"), ("grad_norm", "gradient"), ("skipped_steps", "skipped")):
        if key in terms:
            parts.append(f"{label} {short(terms[key])}")
    if terms.get("data/refused") or terms.get("refused"):
        parts.append(f"{terms.get('data/refused') or terms.get('refused'):,.0f} rows refused")
    line = head
    for part in parts:
        longer = f"{line}  {part}"
        if len(longer) <= width:
            line = longer
    return line


def _told_terms(terms: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Losses by group, the reader's first; then what has no group (stage zero's)."""
    names = {"language_loss": "", "vision_loss": " vision", "character_accuracy": " letters"}
    for term, label in names.items():
        for key, value in terms.items():
            group, _, name = key.rpartition("/")
            if group and name == term:
                title = group_title(group).replace("document", "doc").replace("picture", "pic")
                yield f"{title}{label}", value
    known = {"loss", "grad_norm", "learning_rate", "epoch", "step", "skipped_steps", "refused", *ONCE}
    known |= {"word_f1", "cer", "exact"}
    for key, value in terms.items():
        if "/" not in key and key not in known:
            yield key.replace("_", " "), value


class Terminal(TrainerCallback):
    """One line a logging step, below a bar where there is a terminal (and no `disable_tqdm`)."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.bar: tqdm | None = None
        self.began, self.first = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            done = state.global_step - self.first
            self._say(f"{done:,} steps in {duration(logs['train_runtime'])}, mean loss {short(logs['train_loss'])}")
            return
        width = WIDTH if self.bar is None else min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns - 1)
        told = logs | (self.trainer.last_speed if "loss" in logs else {})
        self._say(log_line(told, state.global_step, state.max_steps, self._left(state), width))
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(f" loss {short(logs['loss'])}", refresh=False)

    def _left(self, state: Any) -> float | None:
        done = state.global_step - self.first
        by_steps = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step) if done else None
        schedule = getattr(self.trainer, "timed_schedule", None)
        if schedule is None or by_steps is None:
            return by_steps
        return max(0.0, min(by_steps, schedule.max_seconds - schedule.spent))

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# -- what both trackers share -------------------------------------------------------------------------------------


def recipe_of(trainer: Trainer) -> dict[str, Any]:
    """The recipe of a run, empty for a trainer without one."""
    return dict((getattr(trainer, "facts", None) or {}).get("recipe") or {})


def flat(given: Any, above: str = "") -> dict[str, Any]:
    """Settings by their dotted keys, for tables of hyperparameters; lists as text."""
    if isinstance(given, dict):
        found: dict[str, Any] = {}
        for key, value in given.items():
            found |= flat(value, f"{above}.{key}" if above else str(key))
        return found
    if given is None or given == []:
        return {}
    return {above: given if isinstance(given, bool | int | float | str) else json.dumps(given)}


def with_speed(trainer: Trainer, logs: dict[str, Any]) -> dict[str, Any]:
    """A line of the log with the speed that belongs to it."""
    return logs | trainer.last_speed if "loss" in logs else logs


def scalars(logs: dict[str, Any]) -> dict[str, float]:
    """Tags and values of a line of the log."""
    kept = {key: value for key, value in logs.items() if key not in ONCE and isinstance(value, int | float)}
    if "loss" not in logs:
        kept.pop("epoch", None)  # once for a step is enough
    return rewrite_logs(kept)


def sample_rows(trainer: Trainer) -> list[dict[str, str]]:
    """The shown samples of the last evaluation, for a table."""
    return [
        {"group": group_title(each.group), "task": each.task, "expected": each.expected, "read": each.read}
        for each in getattr(trainer, "samples", [])
        if each.image is not None
    ]


class _Safely:
    """A tracker that fails says so once, and the run goes on."""

    complained = False

    def attempt(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except Exception as error:
            if not self.complained:
                print(f"{type(self).__name__.lower()}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            self.complained = True


# -- TensorBoard --------------------------------------------------------------------------------------------------


class Board(TensorBoardCallback, _Safely):
    """TensorBoard, in one folder however often a run is taken up."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = self.logging_dir or str(Path(args.output_dir) / BOARD)
        step = state.global_step
        # readers drop what an earlier process has logged from this step on
        self.tb_writer = self._SummaryWriter(log_dir=folder, purge_step=step + 1 if step else 0)
        recipe = recipe_of(self.trainer)
        if step or not recipe:
            return
        import yaml
        from torch.utils.tensorboard.summary import hparams

        text = yaml.safe_dump({key: value for key, value in recipe.items() if value}, sort_keys=False)
        self.tb_writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()), 0)
        for summary in hparams(flat(recipe), {}):
            self.tb_writer.file_writer.add_summary(summary, 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.tb_writer is not None and logs:
            self.attempt(lambda: self._add(scalars(with_speed(self.trainer, logs)), state.global_step))

    def _add(self, points: dict[str, float], step: int) -> None:
        for tag, value in points.items():
            self.tb_writer.add_scalar(tag, value, step)
        self.tb_writer.flush()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.tb_writer is not None and getattr(self.trainer, "sheet", None) is not None:
            self.attempt(lambda: self._add_samples(state.global_step))

    def _add_samples(self, step: int) -> None:
        self.tb_writer.add_image("eval/samples", np.asarray(self.trainer.sheet), step, dataformats="HWC")
        lines = ["| group | task | expected | read |", "|---|---|---|---|"]
        for row in sample_rows(self.trainer):
            lines.append("| " + " | ".join(_cell(value) for value in row.values()) + " |")
        self.tb_writer.add_text("eval/samples", "\n".join(lines), step)
        self.tb_writer.flush()


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table, nothing of it taken for a mark."""
    flat_text = " ".join(text.split()) or " "
    return "".join(f"&#{ord(letter)};" if letter in "|<>&`*_\\[]!" else letter for letter in flat_text)


# -- trackio ------------------------------------------------------------------------------------------------------


class Trackio(TrackioCallback, _Safely):
    """trackio, in one run however often it is taken up; local unless a Space is named."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer

    def setup(self, args, state, model, **kwargs):
        self._initialized = True
        if not state.is_world_process_zero:
            return
        kept = Path(args.output_dir) / TRACKIO_RUN
        project, name = self._named(args, kept, state.global_step > 0)
        resumes = state.global_step > 0
        if resumes:
            self.attempt(lambda: _forget_after(project, name, state.global_step))
        with contextlib.nullcontext() if _named_elsewhere(args) else _offline():
            self._trackio.init(
                project=project,
                name=name,
                space_id=args.trackio_space_id,
                resume="allow" if resumes else "never",
                private=args.hub_private_repo,
                bucket_id=args.trackio_bucket_id,
                config=flat(recipe_of(self.trainer)),
                embed=False,
            )
        self._space_id = self._trackio.context_vars.current_space_id.get()
        if resumes:
            self.attempt(lambda: self._fill_in(project, name, state.log_history))

    @staticmethod
    def _named(args: Any, kept: Path, resumes: bool) -> tuple[str, str]:
        """Project and name of the run; kept beside its checkpoints, so that it finds itself again."""
        if resumes:
            try:
                found = json.loads(kept.read_text())
                return found["project"], found["name"]
            except (OSError, ValueError, KeyError):
                pass  # not logged with trackio before
        project = args.project if args.project and args.project != NO_PROJECT else PROJECT
        name = args.run_name or f"{Path(args.output_dir).name}-{secrets.token_hex(3)}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"project": project, "name": name}))
        return project, name

    def _fill_in(self, project: str, name: str, history: list[dict[str, Any]]) -> None:
        """Log the points of the checkpoint's log that the database has not: it is written to with a delay."""
        if self._trackio.context_vars.current_server.get() is not None:
            return  # a Space or a server has been sent what there was
        from trackio.sqlite_storage import SQLiteStorage

        there = {
            (entry.get("step"), key) for entry in SQLiteStorage.get_logs(project, name) for key in entry if "/" in key
        }
        kept = speed_path(self.trainer)
        last = max((entry.get("step", 0) for entry in history), default=0)
        speeds = [] if kept is None else [entry for entry in read_speed(kept) if entry["step"] <= last]
        for entry in [*history, *speeds]:
            step = entry.get("step", 0)
            points = scalars({key: value for key, value in entry.items() if key != "step"})
            lost = {tag: value for tag, value in points.items() if (step, tag) not in there}
            if lost:
                self._trackio.log(lost, step=step)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            self.setup(args, state, model)
        points = scalars(with_speed(self.trainer, logs or {}))
        if state.is_world_process_zero and points:
            self.attempt(lambda: self._trackio.log(points, step=state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        sheet = getattr(self.trainer, "sheet", None)
        if state.is_world_process_zero and sheet is not None:
            self.attempt(lambda: self._log_samples(sheet, state.global_step))

    def _log_samples(self, sheet: Any, step: int) -> None:
        table = self._trackio.Table(data=sample_rows(self.trainer))
        picture = self._trackio.Image(sheet, caption=f"step {step}")
        self._trackio.log({"eval/samples": picture, "eval/texts": table}, step=step)

    def on_push_begin(self, args, state, control, model, **kwargs):
        if args.trackio_space_id or args.trackio_static_space_id:  # otherwise it would make a Space by itself
            super().on_push_begin(args, state, control, model, **kwargs)


def _named_elsewhere(args: Any) -> bool:
    """Whether a Space or a server is named to log to."""
    return bool(args.trackio_space_id) or any(os.environ.get(f"TRACKIO_{name}") for name in ("SPACE_ID", "SERVER_URL"))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing asks the Hub: trackio wants to know who is logged in, also where nothing leaves the machine."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def quiet_without_terminal() -> None:
    """Into a file or a CI log go lines: bars of libraries, for saving and for reading data, are left out."""
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _forget_after(project: str, name: str, step: int) -> None:
    """Drop the points of a local run after `step`."""
    from trackio.sqlite_storage import SQLiteStorage

    path = SQLiteStorage.get_project_db_path(project)
    found = SQLiteStorage.get_latest_run_record_by_name(project, name) if path.exists() else None
    if found is None:
        return
    with SQLiteStorage._get_process_lock(project), SQLiteStorage._get_connection(path) as connection:
        connection.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (found["id"], step))
        connection.commit()
