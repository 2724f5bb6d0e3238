"""Checkpoints that are whole or absent, and a run that goes on from the last whole one.

A checkpoint is written beside its place, in `.checkpoint-N.partial/`, by all ranks; when every rank is done, rank 0
writes `manifest.json` (size and SHA-256 of each file, the recipe), brings all of it to the disk and renames the folder
to `checkpoint-N`. Older ones are deleted only then, so that a disk needs room for `save_total_limit` + 1 of them. The
folder of a run must be one that all ranks share (or each node's own, with `save_on_each_node`).

What a start finds in the folder of a run:

- `.checkpoint-N.partial`: its writing was interrupted. Removed, and named.
- `checkpoint-N` with a manifest that does not hold (a file missing, cut off, changed): damaged. Renamed to
  `damaged-checkpoint-N`, and named; the one before it is tried next.
- `checkpoint-N` without a manifest: of an older version of this package, or of plain transformers. Taken with a line
  that says so, if its weights can be opened and its state be read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from .devices import ManyDevices, load_parts, names_in_adapter, whole_state
from .optimizer_state import FILE as OPTIMIZER_FILE
from .optimizer_state import load_schedule, load_state, save_state

SCHEDULER_FILE = "scheduler.pt"
MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = re.compile(r"\.checkpoint-(\d+)\.partial")
REPLACED, DELETED = ".replaced", ".deleted"  # of a checkpoint that is on its way out
CHUNK = 1 << 20  # bytes read at once for a hash
FULL = 1 << 20  # bytes free, below which a disk counts as full when writing has failed [ours]


class CheckpointError(ValueError):
    """A checkpoint could not be written; the message is one line that says what is left and what to do."""


# -- folders ------------------------------------------------------------------------------------------------------


def checkpoints(run: str | Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, by their steps."""
    found = [(int(match[1]), each) for each in Path(run).glob("checkpoint-*") if (match := NAME.fullmatch(each.name))]
    return [each for _, each in sorted(found) if each.is_dir()]


def partial_folder(run: Path, step: int) -> Path:
    """Where `checkpoint-N` lies while it is written."""
    return run / f".checkpoint-{step}.partial"


def sha256(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file. sync: the file is brought to the disk first."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Bring the files of a checkpoint to the disk and write down what they are; `facts` come along."""
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    listed = {
        each.relative_to(folder).as_posix(): {"bytes": each.stat().st_size, "sha256": sha256(each, sync=True)}
        for each in files
    }
    with (folder / MANIFEST).open("w") as opened:
        json.dump({"format": FORMAT, **facts, "files": listed}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    for each in {file.parent for file in files} | {folder}:
        _sync_folder(each)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, `None` where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {manifest.get('format')}, known is {FORMAT}")
    return manifest


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; `None` for a whole one."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if manifest is None:
        return _damage_of_older(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, {facts['bytes']:,} were written"
        if sha256(path) != facts["sha256"]:
            return f"{name} is not what was written: its SHA-256 differs"
    return None


def _damage_of_older(folder: Path) -> str | None:
    """Without hashes: whether the state can be read, and weights be opened."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "trainer_state.json is missing or cannot be read"
    names = {each.name for each in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names |= set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return f"{index.name} cannot be read"
    for name in sorted(names):
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{name} cannot be opened"
    return None


def clear_unfinished(run: Path) -> list[str]:
    """Remove what an interrupted writing or deletion has left; returns the lines that name it."""
    lines = []
    for left in sorted(run.glob(".checkpoint-*")):
        if PARTIAL.fullmatch(left.name):
            lines.append(f"{left} was not finished: removed.")
        elif left.name.endswith(REPLACED):
            earlier = run / left.name.removesuffix(REPLACED).removeprefix(".")
            if not earlier.exists():  # interrupted between two renames
                left.rename(earlier)
                continue
        elif not left.name.endswith(DELETED):
            continue
        shutil.rmtree(left, ignore_errors=True)
    return lines


def last_whole_checkpoint(run: str | Path, say: Callable[[str], Any] = print) -> Path | None:
    """The checkpoint that a run goes on from, `None` where there is none. What is unfinished is removed, what is
    damaged is put aside, by the rules in this module's text; `say` gets a line for each.

    Every file of the checkpoint is read once, for its hash.
    """
    run = Path(run)
    if not run.is_dir():
        return None
    for line in clear_unfinished(run):
        say(line)
    found = checkpoints(run)
    for folder in reversed(found):
        wrong = damage(folder)
        if wrong is None:
            if not (folder / MANIFEST).is_file():
                say(f"{folder} has no {MANIFEST}: it is of an older format, and is taken without a check of hashes.")
            return folder
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        say(f"{folder} is damaged: {wrong}. It is put aside as {aside.name}.")
    if found:
        say(f"No whole checkpoint is left in {run}: the run starts anew.")
    return None


def put_in_place(written: Path, folder: Path) -> None:
    """Rename a checkpoint that is whole to its name, in the place of an earlier one of that step."""
    earlier = folder.with_name(f".{folder.name}{REPLACED}")
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    written.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def rotate(run: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete all but the `limit` youngest checkpoints of a run, none of `keep`; each is renamed first, so that none is
    ever there in part."""
    if not limit or limit <= 0:
        return
    kept = {each.name for each in keep}
    found = [Path(each) for each in sort_checkpoints(str(run), use_mtime=True)]
    for folder in [each for each in found if each.name not in kept][: max(0, len(found) - max(limit, len(kept)))]:
        gone = folder.with_name(f".{folder.name}{DELETED}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- ranks --------------------------------------------------------------------------------------------------------


def from_rank_0(arguments: TrainingArguments, function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank."""
    if arguments.world_size <= 1:
        return function()
    found = [function() if arguments.process_index == 0 else None]
    return broadcast_object_list(found)[0]


def _say_nothing(line: str) -> None:
    pass


# -- the trainer --------------------------------------------------------------------------------------------------


class WholeCheckpoints(ManyDevices):
    """A `Trainer` whose checkpoints are whole or absent, and whose log goes on as if nothing had happened.

    They are the same of one process, DDP and FSDP2, over any number of processes: the weights (or the adapter) and the
    optimiser's state (see `optimizer_state.py`) are whole. DeepSpeed writes its own.

    `facts` go into each manifest; `log_path` is where the log is written line by line, none by default.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.facts: dict[str, Any] = {}
        self.log_path: Path | None = None
        self._staging: Path | None = None
        self._resumed: Path | None = None
        self._problem: Exception | None = None  # of this process, while others wait for its parts of tensors
        self.add_callback(_LogKeeper(self))

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is True:
            found = from_rank_0(self.args, lambda: last_whole_checkpoint(self.args.output_dir))
            if found is None:
                raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to go on from.")
            resume_from_checkpoint = str(found)
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = partial_folder(run, self.state.global_step)
        problem: Exception | None = None
        if self.args.should_save:
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            except OSError as error:
                problem = error
        self._agree(problem, staging)  # no rank writes before the folder is clean
        self._staging, self._problem = staging, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_writing_error(error):
                raise
            problem = error
        finally:
            self._staging = None
        # DeepSpeed's other processes wait within a collective then: the launcher ends them
        self._agree(problem, staging, alone=self.is_deepspeed_enabled)
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = best = str(run / Path(best).name)
        if self.args.should_save:
            try:
                self._finish(staging / name, run / name)
            except OSError as error:
                problem = error
        self._agree(problem, staging)
        if self.args.should_save:
            staging.rmdir()
            rotate(run, self.args.save_total_limit, [run / name] + ([Path(best)] if best else []))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        names = set(names_in_adapter(self.model).values()) if isinstance(self.model, PeftModel) else None
        tensors = whole_state(self.model, self.args.should_save, names)
        try:
            self._save(output_dir or self.args.output_dir, state_dict=tensors)
        except Exception as error:
            if not is_writing_error(error) or self._staging is None:
                raise
            self._problem = error  # the optimiser's state is yet to be gathered

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        writes = self.args.should_save and self._problem is None
        problem = save_state(self.model, self.optimizer, Path(output_dir) / OPTIMIZER_FILE if writes else None)
        if problem := self._problem or problem:
            raise problem
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_parts(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()
        load_parts(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = Path(checkpoint) / SCHEDULER_FILE
        say = print if self.is_world_process_zero() else _say_nothing
        if scheduler.is_file() and load_state(self.model, self.optimizer, checkpoint, say):
            load_schedule(self.lr_scheduler, torch.load(scheduler, weights_only=True))
        else:
            say(f"{checkpoint} has no state of the optimiser: it and the learning rate's schedule begin anew.")

    def _finish(self, written: Path, folder: Path) -> None:
        """Rank 0, when every rank has written."""
        # the best checkpoint is known by the place it is going to have
        self.state.save_to_json(str(written / "trainer_state.json"))
        if not self.args.save_only_model and not self.args.save_on_each_node:
            for rank in range(max(1, self.args.world_size)):
                for name in self.rank_files(rank):
                    if not (written / name).is_file():
                        raise FileNotFoundError(
                            f"{name} of rank {rank} is not there: training.output_dir must be one folder for all "
                            "nodes (or set training.save_on_each_node)"
                        )
        step, world = self.state.global_step, max(1, self.args.world_size)
        write_manifest(written, {"step": step, "world_size": world, **self.facts})
        put_in_place(written, folder)

    def _agree(self, problem: Exception | None, staging: Path, alone: bool = False) -> None:
        """All ranks go on, or all stop. alone: a rank with a problem does not wait for the others.

        Raises:
            CheckpointError: one of them could not write.
        """
        found = [None if problem is None else first_line(problem)]
        if self.args.world_size > 1 and not (alone and problem is not None):
            found = gather_object(found)
        reasons = [each for each in found if each is not None]
        if not reasons:
            return
        run = staging.parent
        free = shutil.disk_usage(run).free if run.is_dir() else 0
        reason = os.strerror(errno.ENOSPC) if free < FULL else reasons[0]
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        left = checkpoints(run)
        kept = (
            f"{left[-1].name} stays; the same command goes on from there" if left else "The same command starts anew"
        )
        raise CheckpointError(
            f"checkpoint-{self.state.global_step} could not be written to {run}: {reason}. "
            f"{kept} once the folder can be written to."
        ) from problem

    def rank_files(self, rank: int) -> list[str]:
        """The files that a rank adds to a checkpoint."""
        alone = self.args.world_size <= 1
        return ["rng_state.pth" if alone else f"rng_state_{rank}.pth", f"log-state-{rank}.json"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        own = self.rank_files(self.args.process_index)[0]
        if checkpoint is not None and not (Path(checkpoint) / own).is_file():
            self.seed_rank()  # another number of processes before
        else:
            super()._load_rng_state(checkpoint)

    # -- what is between two lines of the log -------------------------------------------------------------------------

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        state = {"loss": float(getattr(self, "_tr_loss", 0.0)), "logged": self._globalstep_last_logged}
        path = Path(output_dir) / f"log-state-{self.args.process_index}.json"
        path.write_text(json.dumps(state | self.log_state()))

    def log_state(self) -> dict[str, Any]:
        """What the next line of the log needs of the steps before this checkpoint, for JSON."""
        return {}

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Take up what [`log_state`] gave."""

    def restore_log_state(self) -> None:
        """From the checkpoint that this run goes on from; of one of an older format the next line misses steps."""
        if self._resumed is None:
            return
        paths = [self._resumed / f"log-state-{rank}.json" for rank in (self.args.process_index, 0)]
        path = next((each for each in paths if each.is_file()), None)
        if path is None:
            return
        state = json.loads(path.read_text())
        if hasattr(self, "_tr_loss"):
            self._tr_loss += state["loss"]
            self._globalstep_last_logged = state["logged"]
        self.load_log_state(state)


class _LogKeeper(TrainerCallback):
    """Restores what lies between two lines of the log, and writes each line when it comes."""

    def __init__(self, trainer: WholeCheckpoints):
        self.trainer = trainer
        self.complained = False

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # as this run wants them; transformers keeps the checkpoint's
        self.trainer.restore_log_state()
        if self.trainer.log_path is not None and state.is_world_process_zero:
            self._write(lambda: write_log_lines(self.trainer.log_path, state.log_history))

    def on_step_end(self, args, state, control, **kwargs):
        if args.ignore_data_skip and state.max_steps > 0:
            # transformers counts the epoch's share from the step that a run goes on from
            state.epoch = state.global_step / state.max_steps

    def on_log(self, args, state, control, **kwargs):
        if self.trainer.log_path is not None and state.is_world_process_zero and state.log_history:
            self._write(lambda: self._append(state.log_history[-1]))

    def _append(self, entry: dict[str, Any]) -> None:
        with self.trainer.log_path.open("a") as opened:
            opened.write(json.dumps(entry, sort_keys=True) + "\n")

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:  # no reason to stop: each checkpoint holds the whole log
            if not self.complained:
                print(f"{self.trainer.log_path} cannot be written to: {first_line(error)}.", flush=True)
            self.complained = True


def write_log_lines(path: Path, history: list[dict[str, Any]]) -> None:
    """`log.jsonl`, one line an entry, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history))
    beside.replace(path)


def is_writing_error(error: Exception) -> bool:
    """Whether a file system gave up: a full disk, a quota, a folder that is gone."""
    torch_writer = isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    )
    return isinstance(error, OSError | SafetensorError) or torch_writer


def first_line(error: Exception) -> str:
    """What an error says, in one line without a full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = next((each.strip() for each in str(error).splitlines() if each.strip()), type(error).__name__)
    return line.rstrip(".")
