"""What the sub-commands share: loading a model quietly, progress on stderr, errors of one line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROGRESS_AFTER = 2.0  # seconds of work before a bar shows itself
ENCODER_ALONE = "an encoder alone, without the language decoder that this command needs; `unit features` takes it"


class CommandError(Exception):
    """The command cannot go on; the message is the one line that the user sees."""


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_ID",
        help="a folder or an id on the Hugging Face Hub (default: the shipped unit-tiny)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")


def positive(text: str) -> int:
    """An argument that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def quiet(model: str | None) -> None:
    """Before transformers is imported: no warnings of libraries, and no network for a model that is a folder."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if model is None or Path(model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def missing_folder(name: str) -> None:
    """Raise `CommandError` for what can only be a path, no Hub id, and is not there."""
    if not Path(name).exists() and (name.startswith((".", "~")) or name.count("/") > 1 or Path(name).is_absolute()):
        raise CommandError(f"{name}: no such folder")


def load(
    model: str | None, device: str, auto_model: str, auto_processor: str | None = "AutoProcessor"
) -> tuple[Any, Any, str]:
    """A model for inference, its processor and where it came from.

    Args:
        model: folder, Hub id, or `None` for the checkpoint that ships.
        device: name of a torch device.
        auto_model, auto_processor: names of transformers' Auto classes; no processor for `None`.

    Raises:
        CommandError: there is no such model, it is not of the kind asked for, its weights are a pickle, or keys lack
            or have another shape than its configuration says.
    """
    quiet(model)
    import torch
    import transformers

    from modeling_unit import shipped_checkpoint
    from modeling_unit.image_processing_unit import load_image_processor
    from modeling_unit.released_unit import released_folder
    from modeling_unit.vision_sources_unit import require_safetensors

    transformers.logging.disable_progress_bar()
    try:
        name = str(shipped_checkpoint()) if model is None else model
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise CommandError(f"{name}: no model there (the folder has no config.json)")
    missing_folder(name)
    if Path(name).is_dir() and released_folder(name) is not None:
        if auto_model != "AutoModel":
            raise CommandError(f"{name}: {ENCODER_ALONE}")
        raise CommandError(f"{name}: in the released format; convert it first: unit convert {name} FOLDER")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {device}: {first_line(error)}") from error
    try:
        # A CPU compiles a bfloat16 kernel for every new shape, which costs a page more than it gains.
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        if (
            auto_model != "AutoModel"
            and transformers.AutoConfig.from_pretrained(name).model_type == "unit_vision_model"
        ):
            raise CommandError(f"{name}: {ENCODER_ALONE}")
        require_safetensors(name)
        loaded, report = getattr(transformers, auto_model).from_pretrained(
            name, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
        _check_weights(loaded, report)
        loaded = loaded.eval().to(device)
        if auto_processor == "AutoImageProcessor":
            processor = load_image_processor(name)
        else:
            processor = auto_processor and getattr(transformers, auto_processor).from_pretrained(name)
    except CommandError:
        raise
    except Exception as error:  # what a strange configuration makes transformers raise has no common type
        raise CommandError(f"{name}: cannot be loaded as a model for this command: {first_line(error)}") from error
    return loaded, processor, name


def _check_weights(model: Any, report: dict[str, Any]) -> None:
    """Raise `ValueError` where transformers would go on with random weights in place of those that lack or do not
    fit."""
    from modeling_unit.architectures_unit import ARCHITECTURES

    wrong = sorted(report["mismatched_keys"])
    if wrong:
        key, found, expected = wrong[0]
        raise ValueError(f"{key} has the shape {tuple(found)}, its configuration says {tuple(expected)}")
    config = getattr(model.config, "vision_config", model.config)
    unread = ARCHITECTURES[config.model_type].unread if config.model_type in ARCHITECTURES else ()
    lacking = sorted(
        key for key in report["missing_keys"] if not unread or not key.removeprefix("vision_model.").startswith(unread)
    )
    if lacking:
        more = ", ..." if len(lacking) > 3 else ""
        raise ValueError(f"the weights lack {len(lacking)} keys: {', '.join(lacking[:3])}{more}")


def add_upload_options(
    parser: argparse.ArgumentParser, what: str = "repository", revision: str = "", card: str = "a card on the Hub"
) -> None:
    """The options of whatever uploads; see [`upload_options`].

    Args:
        what: is made private. revision: what is to be known of ``--revision`` besides. card: what may have been
            edited.
    """
    parser.add_argument("--private", action="store_true", help=f"make the {what} private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    told = f"branch to commit to, made when it does not exist{revision and '; '}{revision}"
    parser.add_argument("--revision", metavar="BRANCH", help=told)
    parser.add_argument("--overwrite-card", action="store_true", help=f"replace {card} that was edited by hand")
    parser.add_argument("--dry-run", action="store_true", help="do all but upload; no network, the folder is left")


def upload_options(args: argparse.Namespace) -> dict[str, Any]:
    """What [`add_upload_options`] took, as the arguments of the `training.publish*` functions.

    Raises:
        CommandError: they do not go together.
    """
    if args.create_pr and args.revision is not None:
        raise CommandError("--create-pr opens its request on the default branch: leave out --revision")
    return {name: getattr(args, name) for name in ("private", "create_pr", "revision", "overwrite_card", "dry_run")}


def report_push(done: Any) -> None:
    """Print what a push (a `training.publish.Published`) did."""
    if done.folder is not None:
        for name, size in done.files.items():
            print(f"{size:>13,}  {name}")
        print(f"checked; nothing was uploaded. What would go to {done.repo_id} is in {done.folder}")
        return
    for name in done.kept:
        but = ", but for the settings that start the app" if name in done.uploaded else ""
        print(
            f"{done.repo_id}: {name} was edited on the Hub and is kept as it is there{but}; --overwrite-card replaces "
            "it"
        )
    if not done.uploaded:
        print(f"{done.repo_id}: nothing to upload, it holds all of this already (commit {done.commit})")
    else:
        print(f"{done.repo_id}: {len(done.uploaded)} of {len(done.files)} files changed; {done.url}")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with the second where it ends in a colon; its type where there is
    none."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


class Progress:
    """A bar on stderr that shows itself once the work has taken a while; for `Reader`'s `progress`."""

    shown: Progress | None = None  # the one that has the terminal's last line

    def __init__(self, what: str, unit: str):
        from tqdm import tqdm

        self.bar = tqdm(desc=what, unit=unit, delay=PROGRESS_AFTER, file=sys.stderr, leave=False, dynamic_ncols=True)
        self.before = 0
        self.start = time.monotonic()

    def __enter__(self) -> Progress:
        Progress.shown = self
        return self

    def __exit__(self, *_) -> None:
        Progress.shown = None
        self.bar.close()

    def visible(self) -> bool:
        return time.monotonic() - self.start >= PROGRESS_AFTER

    def add(self, total: int) -> None:
        """More to do."""
        self.before = self.bar.n
        self.bar.total = (self.bar.total or 0) + total

    def __call__(self, done: int, total: int) -> None:
        """`done` of the `total` that the current call of the reader has."""
        if done == 0:
            self.add(total)
        self.bar.update(self.before + done - self.bar.n)


def groups(items: Iterable, size: int) -> Iterable[list]:
    """Lists of up to `size` items, in order, made as they are asked for."""
    group: list = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def complain(command: str, message: str) -> None:
    """One line on stderr, above a bar that may be there."""
    line = f"unit {command}: {' '.join(message.split())}"
    if Progress.shown is not None and Progress.shown.visible():
        Progress.shown.bar.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
