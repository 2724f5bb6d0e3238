"""Ablations: a grid of recipes, each variant with each seed, from one file by one command.

`unit ablate FILE.yaml --out DIR` reads

    stages:                         # in order; each starts from what the one before it wrote
      - {name: stage1, recipe: ../unit-tiny/2-intra-scale.yaml, set: {training.max_steps: 120}}
      - {name: stage2, recipe: ../unit-tiny/3-inter-scale.yaml}
    seeds: [1, 2, 3]
    variants:                       # the first is the base that the others are compared with
      base: {about: as the recipes say}
      no-vision-decoder: {about: lambda 0, set: {training.vision_weight: 0}}           # in every stage
      lora: {about: adapters in stage 2, stages: {stage2: {lora: {preset: both}}}}     # in one stage
      stage-1-only: {about: half the work, drop: [stage2]}
    measure: {documents: chunks-validation, pictures: pictures-validation, rows: 64}
    figures: [language_loss, knn_accuracy]

trains every variant with every seed as `unit train` would, measures the models at the end
(`training/ablation_figures.py`) and tables the figures (`training/ablation_table.py`). Two variants that share a
stage, alike in its recipe, seed and start, share the training. Seeds come one after the other, all variants of the
first before any of the second, so that what is cut short leaves whole seeds. Whatever is finished is not done again,
what was interrupted goes on from its last checkpoint, what fails is told in the table, and the rest goes on.

Below DIR: `VARIANT/seed-N/STAGE/` for each training, with its `recipe.yaml` (`unit train` takes it) and
`output.txt`, in the folder of the first variant that needs it; `VARIANT/seed-N/figures.json`; of all together
`results.json`, `table.md`, `plot.png`. The command may be started several times on one folder, on several devices for
instance: no two processes train the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training.errors import first_line
from training.evaluation.cache import hash_of, write_whole
from training.recipe_loader import RecipeLoader

MARK = "ablation.json"  # in the folder of a training: what it is, and whether it is finished
OUTPUT = "output.txt"  # beside it: what `unit train` would have shown
ENTRY = "figures.json"  # in the folder of a variant with a seed: the figures, or why there are none
RESULTS = "results.json"
WAIT = 3.0  # seconds until a look at what another process is at
# What the command decides itself, and what leaves the weights as they are
OURS = ("training.output_dir", "training.seed")
IDLE = ("threads", "training.output_dir", "training.disable_tqdm", "training.report_to")
IDLE_BEGINNINGS = ("training.logging_", "training.save_", "training.eval_", "evaluation.")


@dataclass(frozen=True)
class Stage:
    """A stage of the grid: a recipe, and what is laid over it in every variant."""

    name: str
    recipe: Path
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """What a variant changes.

    Args:
        about: one line for the table. set: overrides in all stages. stages: overrides by stage. drop: stages that it
            goes without.
    """

    name: str
    about: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    def overrides(self, stage: Stage) -> dict[str, Any]:
        """All that is laid over the stage's recipe, later ones winning."""
        return {**stage.set, **self.set, **self.stages.get(stage.name, {})}


@dataclass(frozen=True)
class Grid:
    """What a file describes; the first variant is the base."""

    path: Path
    stages: tuple[Stage, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    figures: tuple[str, ...]
    measure: dict[str, Any]

    @property
    def base(self) -> Variant:
        return self.variants[0]


@dataclass(frozen=True)
class Training:
    """One training of the grid.

    Attributes:
        key: hash of its recipe after overrides, its seed and its start. variant: the first that needs it.
        recipe: the whole recipe, as `unit train` reads it. folder: where its model is.
    """

    key: str
    variant: str
    seed: int
    stage: str
    recipe: dict[str, Any]
    folder: Path

    def finished(self) -> bool:
        return _read_json(self.folder / MARK).get("finished") == self.key

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}, {self.stage}"


@dataclass(frozen=True)
class Run:
    """A variant with a seed: trainings one after the other, the last of which gives the model that is measured."""

    variant: str
    seed: int
    trainings: tuple[Training, ...]

    @property
    def key(self) -> str:
        return self.trainings[-1].key


# -- the file ---------------------------------------------------------------------------------------------------------


def read_grid(path: str | Path) -> Grid:
    """Read a file of ablations; recipes are looked at when the work is planned.

    Raises:
        ValueError: a file that is missing or no such file; an unknown key, stage or figure; a name given twice.
    """
    from training.ablation_figures import FIGURES, Measure

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping with the keys stages and variants")
    _known(content, ("stages", "seeds", "variants", "measure", "figures"), str(path))
    stages = []
    for given in _of_type(content.get("stages"), list, "stages"):
        _known(given, ("name", "recipe", "set"), "a stage")
        lacking = {"name", "recipe"} - set(given)
        if lacking:
            raise ValueError(f"a stage lacks the key {min(lacking)!r}")
        overrides = _of_type(given.get("set") or {}, dict, f"stage {given['name']}: set")
        stages.append(Stage(str(given["name"]), path.parent / given["recipe"], overrides))
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) != len(names):
        raise ValueError(f"{path}: `stages` must name one or more stages, each by its own name; got {names}")
    variants = []
    for name, given in _of_type(content.get("variants"), dict, "variants").items():
        where = f"variant {name}"
        given = given or {}
        _known(given, ("about", "set", "stages", "drop"), where)
        by_stage = _of_type(given.get("stages") or {}, dict, f"{where}: stages")
        dropped = _of_type(given.get("drop") or [], list, f"{where}: drop")
        for stage in (*by_stage, *dropped):
            if stage not in names:
                raise ValueError(f"{where}: there is no stage {stage!r}; there are {', '.join(names)}")
        if set(dropped) == set(names):
            raise ValueError(f"{where} drops every stage: nothing would be trained")
        for stage in by_stage:
            if stage in dropped:
                raise ValueError(f"{where} both drops {stage} and sets something in it")
        variant = Variant(
            str(name),
            str(given.get("about") or ""),
            _of_type(given.get("set") or {}, dict, f"{where}: set"),
            {stage: _of_type(each or {}, dict, f"{where}: {stage}") for stage, each in by_stage.items()},
            tuple(dropped),
        )
        for stage in stages:
            if taken := [key for key in variant.overrides(stage) if key in OURS]:
                raise ValueError(f"{where}: {taken[0]} is the command's own: leave it out (seeds: {{seeds: [...]}})")
        variants.append(variant)
    if not variants:
        raise ValueError(f"{path}: `variants` is empty; the first is the base")
    seeds = _of_type(content.get("seeds") or [1, 2, 3], list, "seeds")
    figures = _of_type(content.get("figures") or list(FIGURES), list, "figures")
    for name in figures:
        if name not in FIGURES:
            near = difflib.get_close_matches(str(name), FIGURES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"figures: {name!r} is not known{hint} There are {', '.join(FIGURES)}.")
    measure = _of_type(content.get("measure") or {}, dict, "measure")
    _known(measure, [each.name for each in dataclasses.fields(Measure)], "measure")
    Measure(**measure)
    return Grid(path, tuple(stages), tuple(variants), checked_seeds(seeds), tuple(figures), measure)


def checked_seeds(seeds: Sequence[Any]) -> tuple[int, ...]:
    """Whole numbers of at least 0, each once.

    Raises:
        ValueError: otherwise, or there is none.
    """
    right = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not seeds or not right or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different whole numbers of at least 0, got {list(seeds)}")
    return tuple(seeds)


def _of_type(given: Any, wanted: type, where: str) -> Any:
    if not isinstance(given, wanted):
        raise ValueError(f"{where} must be a {'list' if wanted is list else 'mapping'}, got {given!r}")
    return given


def _known(given: Any, known: Sequence[str], where: str) -> None:
    for key in _of_type(given, dict, where):
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no key {key!r}{hint} It takes {', '.join(known)}.")


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(
    grid: Grid, out: str | Path, seeds: Sequence[int] | None = None, only: Sequence[str] | None = None
) -> list[Run]:
    """All runs, seed after seed. Trainings that several runs share are one and the same object.

    Args:
        out: where the trainings are. seeds: in place of the file's. only: names of variants.

    Raises:
        ValueError: an override that the recipe refuses, a variant that changes nothing, an unknown name; a folder that
            holds a training of other settings.
    """
    out = Path(out)
    seeds = grid.seeds if seeds is None else checked_seeds(seeds)
    names = [variant.name for variant in grid.variants]
    for name in only or ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"there is no variant {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    recipes = {
        (variant.name, stage.name): _recipe_of(variant, stage)
        for variant in grid.variants
        for stage in grid.stages
        if stage.name not in variant.drop
    }
    there = {mark["key"]: file.parent for file in out.glob(f"*/*/*/{MARK}") if "key" in (mark := _read_json(file))}
    trainings: dict[str, Training] = {}
    runs = []
    contents: dict[str, str] = {}
    for seed in seeds:
        for variant in grid.variants:
            chain: list[Training] = []
            for stage in grid.stages:
                if stage.name in variant.drop:
                    continue
                recipe = json.loads(json.dumps(recipes[variant.name, stage.name]))
                recipe["training"]["seed"] = seed
                if chain:
                    recipe["start"] = str(chain[-1].folder)
                key = _key(recipe, chain[-1].key if chain else None, contents)
                if key not in trainings:
                    folder = there.get(key, out / variant.name / f"seed-{seed}" / stage.name)
                    recipe["training"]["output_dir"] = str(folder)
                    trainings[key] = Training(key, variant.name, seed, stage.name, recipe, folder)
                chain.append(trainings[key])
            runs.append(Run(variant.name, seed, tuple(chain)))
        _check_effect(grid, runs)
    runs = [run for run in runs if only is None or run.variant in only]
    for training in {training.key: training for run in runs for training in run.trainings}.values():
        mark = _read_json(training.folder / MARK)
        begun = "finished" in mark or any(training.folder.glob("checkpoint-*"))
        if begun and mark.get("key") != training.key:
            raise ValueError(
                f"{training.folder} holds a training of other settings than {grid.path} now gives: give another "
                "--out, or remove that folder"
            )
    return runs


def _check_effect(grid: Grid, runs: list[Run]) -> None:
    keys = {(run.variant, run.seed): run.key for run in runs}
    for run in runs:
        if run.variant != grid.base.name and run.key == keys[grid.base.name, run.seed]:
            raise ValueError(
                f"variant {run.variant} has no effect: after its overrides it is the same training as "
                f"{grid.base.name}; its figures would be the same"
            )


def _recipe_of(variant: Variant, stage: Stage) -> dict[str, Any]:
    """The stage's recipe with the variant's overrides, as plain data."""
    from training.recipe import read_recipe

    overrides = [f"{key}={json.dumps(value)}" for key, value in variant.overrides(stage).items()]
    try:
        return dataclasses.asdict(read_recipe(stage.recipe, overrides))
    except ValueError as error:
        raise ValueError(f"variant {variant.name}, {stage.name}: {error}") from error


def _key(recipe: dict[str, Any], start: str | None, contents: dict[str, str]) -> str:
    """Hash of what decides a training: its recipe, and what it starts from.

    Args:
        start: key of the training that it starts from; else what `start` and `teacher` name is looked into.
        contents: hashes of folders looked into so far.
    """
    deciding = {
        key: value
        for key, value in _flat(recipe).items()
        if key not in IDLE and not key.startswith(IDLE_BEGINNINGS) and value not in (None, {}, [])
    }
    deciding["start"] = start or recipe.get("start")
    for name in ("start", "teacher", "language_decoder"):
        folder = recipe.get(name)
        if folder and (name != "start" or start is None) and Path(folder).is_dir():
            if folder not in contents:
                files = [file for kind in ("*.safetensors", "*.json") for file in Path(folder).glob(kind)]
                contents[folder] = hash_of(sorted(files))
            deciding[f"{name} content"] = contents[folder]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _flat(given: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def fingerprint(grid: Grid, seeds: Sequence[int], only: Sequence[str] | None) -> str:
    """Hash of the file, its recipes and what was asked for: known without a look into a recipe, and without torch."""
    digest = hashlib.sha256(hash_of([grid.path, *(stage.recipe for stage in grid.stages)]).encode())
    digest.update(json.dumps([list(seeds), sorted(only) if only else None]).encode())
    return digest.hexdigest()


# -- the work ---------------------------------------------------------------------------------------------------------


def run_grid(
    grid: Grid,
    out: str | Path,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    say: Callable[[str], Any] = print,
    train: Callable[[Training], None] | None = None,
    measure: Callable[[Grid, Run], list[Any]] | None = None,
) -> dict[str, Any]:
    """Train what is not trained, measure what is not measured, table it; returns what is in `results.json`.

    Args:
        say: gets a line for each training.
        train, measure: in place of `unit train`'s code path and of `training/ablation_figures.py`.

    Raises:
        ValueError: see [`plan`], and a set that is to be measured on is not there.
    """
    from training.ablation_table import write_table

    out = Path(out)
    seeds = grid.seeds if seeds is None else checked_seeds(seeds)
    asked = fingerprint(grid, seeds, only)
    if asked in read_results(out).get("complete", []):
        return read_results(out)
    runs = plan(grid, out, seeds, only)
    settings = ""
    if measure is None:
        from training.ablation_figures import check_sets, measured_by

        check_sets(grid)
        settings = measured_by(grid)
    out.mkdir(parents=True, exist_ok=True)
    work = _Work(grid, out, runs, say, train or train_apart, measure or _measure, settings)
    while work.pending:
        work.next()
        _write_json(out / RESULTS, _gathered(grid, out))
    results = _gathered(grid, out)
    done = [each for each in results["runs"] if (each["variant"], each["seed"]) in {(r.variant, r.seed) for r in runs}]
    if len(done) == len(runs) and all("figures" in each for each in done):
        results["complete"] = [*results["complete"], asked]
    _write_json(out / RESULTS, results)
    write_table(grid, results, out)
    return results


class _Work:
    """What is left to do, and what failed. Others may work in the same folder: a training or a model that one of them
    is at is passed over, and come back to."""

    def __init__(self, grid, out, runs, say, train, measure, settings):
        self.grid, self.out, self.say, self.train, self.measure = grid, out, say, train, measure
        self.settings = settings  # what the figures depend on beside the model
        self.pending: list[Run] = list(runs)
        self.needed = {training.key: training for run in runs for training in run.trainings}
        self.failures: dict[str, str] = {}
        variants, seeds = ({getattr(run, name) for run in runs} for name in ("variant", "seed"))
        finished = sum(training.finished() for training in self.needed.values())
        say(
            f"{len(runs)} runs ({len(variants)} variants, {len(seeds)} seeds) of {len(self.needed)} trainings, "
            f"{finished} of them finished"
        )

    def next(self) -> None:
        """Bring the first run to its end that nobody else is at; wait a little where there is none."""
        for run in self.pending:
            if self._done(run):
                self.pending.remove(run)
                return
        time.sleep(WAIT)

    def _done(self, run: Run) -> bool:
        """Whether the run is at its end, brought there now or before; False where another process is at it."""
        failed = None
        for training in run.trainings:
            if training.key not in self.failures and not training.finished():
                with _alone(training.folder) as alone:
                    if not alone:
                        return False
                    if not training.finished():
                        self._train(training)
            failed = failed or self.failures.get(training.key)
            if failed:
                break
        with _alone(self.out / run.variant / f"seed-{run.seed}" / ENTRY) as alone:
            if not alone:
                return False
            file = self.out / run.variant / f"seed-{run.seed}" / ENTRY
            entry = _read_json(file)
            if "figures" in entry and (entry["key"], entry["measured_by"]) == (run.key, self.settings) and not failed:
                return True
            _write_json(file, self._entry(run, failed))
        return True

    def _train(self, training: Training) -> None:
        finished = [each for each in self.needed.values() if each.finished()]
        left = [each for each in self.needed.values() if each not in finished]
        self.say(f"[{len(finished) + 1}/{len(self.needed)}] {training}{time_left(finished, left)}")
        try:
            self.train(training)
        except Exception as error:
            self.failures[training.key] = f"{training}: {first_line(error)}"
            self.say(f"failed: {self.failures[training.key]}")

    def _entry(self, run: Run, failed: str | None) -> dict[str, Any]:
        """What `figures.json` of a run holds."""
        entry: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "key": run.key}
        if failed:
            return entry | {"failed": failed}
        entry |= {"trainings": {each.stage: os.path.relpath(each.folder, self.out) for each in run.trainings}}
        try:
            figures = self.measure(self.grid, run)
        except Exception as error:
            failed = f"{run.variant}, seed {run.seed}, measured: {first_line(error)}"
            self.say(f"failed: {failed}")
            return entry | {"failed": failed}
        return entry | {"measured_by": self.settings, "figures": [figure.to_dict() for figure in figures]}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether no other process is at this; nobody begins while the block lasts. What is killed lets go."""
    try:
        import fcntl
    except ImportError:  # not there on Windows
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def time_left(finished: Sequence[Training], left: Sequence[Training]) -> str:
    """`, about 1:20 hours left` by the mean of what is finished of each stage; nothing where nothing is. One process'
    work: several need less."""
    seconds: dict[str, list[float]] = {}
    for training in finished:
        mark = _read_json(training.folder / MARK)
        if "seconds" in mark:
            seconds.setdefault(training.stage, []).append(mark["seconds"])
    every = [value for values in seconds.values() for value in values]
    if not every:
        return ""
    told = sum(sum(values) / len(values) for values in (seconds.get(each.stage, every) for each in left))
    return f", about {int(told) // 3600}:{int(told) % 3600 // 60:02d} hours left"


def _gathered(grid: Grid, out: Path) -> dict[str, Any]:
    """What every run left, in the order of the file, seed after seed."""
    order = [variant.name for variant in grid.variants]
    runs = [entry for file in out.glob(f"*/seed-*/{ENTRY}") if (entry := _read_json(file))]
    runs = sorted((each for each in runs if each["variant"] in order), key=lambda each: order.index(each["variant"]))
    runs.sort(key=lambda each: each["seed"])
    return {"complete": read_results(out).get("complete", []), "runs": runs}


def _measure(grid: Grid, run: Run) -> list[Any]:
    from training.ablation_figures import measured

    last = run.trainings[-1].recipe
    return measured(grid, run.trainings[-1].folder, last["teacher"], bool(last["training"].get("bf16")))


def train_apart(training: Training) -> None:
    """Run `unit train FOLDER/recipe.yaml` in a process of its own, or go on with it.

    Of its own, because a grid is long: what a training leaves in memory goes with it, and one that the system kills is
    a failed run and not the end of all. What it prints is in `output.txt`. Checkpoints are removed once the model is
    there.

    Raises:
        RuntimeError: it failed; the message is the line that it ended with.
    """
    training.folder.mkdir(parents=True, exist_ok=True)
    mark = {"key": training.key, "variant": training.variant, "seed": training.seed, "stage": training.stage}
    if _read_json(training.folder / MARK).get("key") != training.key:
        _write_json(training.folder / MARK, mark)
    file, output = training.folder / "recipe.yaml", training.folder / OUTPUT
    file.write_text(recipe_text(training), encoding="utf-8")
    # the package that runs here, installed or not
    places = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    started = time.monotonic()
    with output.open("a", encoding="utf-8") as printed:
        command = [sys.executable, "-m", "unit_cli", "train", str(file)]
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=environment, check=False
        ).returncode
    if status:
        raise RuntimeError(_reason(status, output))
    for checkpoint in training.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    seconds = round(time.monotonic() - started, 1)
    _write_json(training.folder / MARK, mark | {"finished": training.key, "seconds": seconds})


def _reason(status: int, output: Path) -> str:
    """Why a training ended with another status than 0, in one line."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"exit status {status}")
    return last.removeprefix("unit train: ")


def recipe_text(training: Training) -> str:
    """The recipe of a training as a file that `unit train` takes; what is empty is left out."""
    content = {key: value for key, value in training.recipe.items() if value not in (None, {}, [], "")}
    if content["stage"] != "teacher":
        content.pop("pictures_per_batch", None)
    head = f"# unit train {training.folder / 'recipe.yaml'}\n#\n# {training}; written by `unit ablate`.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def read_results(out: str | Path) -> dict[str, Any]:
    """What `results.json` holds; empty where there is none."""
    return _read_json(Path(out) / RESULTS)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """All of it or nothing: what is interrupted leaves the file as it was."""
    write_whole(file, json.dumps(content, indent=1))
