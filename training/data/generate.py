"""Made data by the million: rows that are a function of (seed, index), in parquet shards, by datatrove's executors.

    generate(Plan("pages", count=2_000_000, seed=1), "/data/pages", executor="slurm", tasks=200, options={...})

Shard `k` holds the rows `k * shard_rows` and on, whoever writes it: the bytes of every file are the same for any
number of tasks, workers and machines, and after any number of interruptions. A shard is written beside and renamed;
what it holds and its SHA-256 then go to a note in ``.generate/``. A run goes through its shards, keeps those whose
bytes hash to their note, and makes the others. When all are there, ``manifest.json`` lists them with seed, settings,
code and counts.

A folder knows what it was begun with (``.generate/plan.json``): settings, seed, the code and the libraries that draw,
the fonts and texts that are drawn from. A run that differs in any of these would mix two data sets, and is refused.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

EXECUTORS = ("local", "slurm", "ray")
STATE, PLAN, MANIFEST = ".generate", "plan.json", "manifest.json"
ROW_GROUP = 250  # rows held in memory at once, and read at once by whoever streams the shard
RESTARTS = 3  # [ours] after workers that were killed, without a whole shard in between
LIBRARIES = ("numpy", "pillow", "pyarrow", "skia-python")  # their versions decide bytes


@dataclass
class Plan:
    """What a folder of shards is to hold.

    Args:
        kind: one of `KINDS`. count: rows. shard_rows: rows of a shard; the last holds the rest.
        seed: with the row's index, decides the row. split: "train" or "validation", which decides fonts and texts.
        settings: more arguments of the kind.
        made_with, resources: set by `complete`: versions of what draws, a digest of what is drawn from.
        code: version and commit, for the manifest; not compared, since `made_with` holds a digest of the sources.
    """

    kind: str
    count: int
    shard_rows: int = 5000
    seed: int = 0
    split: str = "train"
    settings: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    resources: str = ""
    code: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.count < 1 or self.shard_rows < 1:
            raise ValueError(f"count and shard_rows must be 1 or more, not {self.count} and {self.shard_rows}")
        if self.split not in ("train", "validation"):
            raise ValueError(f"split must be train or validation, not {self.split!r}")
        self.settings = json.loads(json.dumps(self.settings))  # as it comes back from plan.json

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.count))

    def name_of(self, shard: int) -> str:
        return f"part-{shard:0{max(5, len(str(self.shards - 1)))}d}.parquet"

    def complete(self) -> Plan:
        """The plan with what only this machine knows; loads, and so fetches, what rows are drawn from."""
        return dataclasses.replace(self, made_with=_made_with(), resources=KINDS[self.kind](self).digest)

    def differences(self, other: Plan) -> Iterator[str]:
        """What another plan has otherwise, one line each."""
        one, two = dataclasses.asdict(self), dataclasses.asdict(other)
        for name in one.keys() - {"code"}:
            if isinstance(one[name], dict):
                for key in sorted(one[name].keys() | two[name].keys()):
                    if one[name].get(key) != two[name].get(key):
                        yield f"{name}.{key}: {one[name].get(key)!r} there, {two[name].get(key)!r} now"
            elif one[name] != two[name]:
                yield f"{name}: {one[name]!r} there, {two[name]!r} now"


@dataclass
class Maker:
    """What makes the rows of a kind in one process: `row(index)`, and a digest of what it draws from."""

    row: Callable[[int], dict[str, Any]]
    digest: str


def _chunks(plan: Plan) -> Maker:
    from .heldout import validation_text_filter
    from .made_chunks import load_resources, made_row

    if plan.settings:
        raise ValueError(f"{plan.kind} has no settings, not even {', '.join(sorted(plan.settings))}")
    resources = load_resources(plan.split)
    unwanted = validation_text_filter() if plan.split == "train" else lambda text: False
    return Maker(
        lambda index: made_row(plan.seed, index, resources, plan.kind, plan.split, unwanted), _digest(resources)
    )


def _pages(plan: Plan) -> Maker:
    """Settings of `made_pages.PageSettings`, and `fonts`, `corpus` and `pictures` of `load_page_resources`."""
    from .made_pages import PageSettings, load_page_resources, page_row

    settings = dict(plan.settings)
    sources = {name: settings.pop(name) for name in ("fonts", "corpus", "pictures") if name in settings}
    if "split" in settings:
        raise ValueError("the split is --split, not a setting")
    chosen = PageSettings.from_dict(settings | {"split": plan.split})
    resources = load_page_resources(plan.split, **sources)
    return Maker(lambda index: page_row(index, plan.seed, chosen, resources), resources.digest())


KINDS: dict[str, Callable[[Plan], Maker]] = {"pages": _pages, "dense": _chunks, "sparse": _chunks}
"""Name -> what loads the resources of a plan and gives its `Maker`; a function that other processes can import."""


def _digest(resources: Any) -> str:
    """Digest of fonts (their files' bytes, by family) and texts."""
    digest = hashlib.blake2b(digest_size=16)
    for family in sorted(resources.fonts):
        digest.update(family.encode())
        for path in resources.fonts[family]:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    for words in (resources.prose, resources.vocabulary):
        digest.update("\n".join(words).encode())
    return digest.hexdigest()


def _made_with() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    sources = hashlib.blake2b(digest_size=16)
    folder = Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]):
        sources.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found | {"sources of training.data": sources.hexdigest()}


# ---------------------------------------------------------------------------------------------------------- a folder


def begin(plan: Plan, out: Path) -> Plan:
    """The completed plan, noted in the folder; what was begun there before must be the same.

    Raises:
        ValueError: it is not, or the folder holds parquet files of another origin.
    """
    from ..version import code_version

    note = out / STATE / PLAN
    if not note.is_file() and any(out.glob("*.parquet")):
        raise ValueError(f"{out} holds parquet files that this command did not make: name another folder")
    plan = dataclasses.replace(plan.complete(), code=code_version())
    if not note.is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        _write(note, dataclasses.asdict(plan))
    there = read_plan(out)
    if differences := sorted(there.differences(plan)):
        raise ValueError(
            f"{out} was begun otherwise, and two data sets would be mixed; {'; '.join(differences)}. Give the command "
            "that began it, or another folder"
        )
    return there


def read_plan(out: Path) -> Plan:
    """The plan that a folder was begun with."""
    return Plan(**json.loads((out / STATE / PLAN).read_text(encoding="utf-8")))


def finished(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Notes of the shards that are written, in order; their bytes are not looked at."""
    notes = [out / STATE / f"{plan.name_of(shard)}.json" for shard in range(plan.shards)]
    return [json.loads(note.read_text(encoding="utf-8")) for note in notes if note.is_file()]


def make_shards(plan: Plan, out: Path, rank: int = 0, world_size: int = 1, make: Any = None) -> None:
    """Make every `world_size`-th shard, from the `rank`-th on, that is not there whole; then the manifest, if all are.

    Raises:
        RuntimeError: this machine draws from other fonts or texts than the folder was begun with; the disk is full.
        ValueError: more of a shard's rows cannot be made than `refusals` allows.
    """
    wanted = [shard for shard in range(rank, plan.shards, world_size) if not is_whole(plan, out, shard)]
    if wanted:
        maker = (make or KINDS[plan.kind])(plan)
        if maker.digest != plan.resources or _made_with() != plan.made_with:
            raise RuntimeError(f"this machine has other fonts, texts or libraries than {out} was begun with")
        gc.freeze()  # the maker stays; see `made_pages.build_pages`
        try:
            for shard in wanted:
                try:
                    make_shard(plan, out, shard, maker.row)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    raise RuntimeError(
                        f"{out}: no room for {plan.name_of(shard)} ({os.strerror(error.errno)}). What is written is "
                        f"whole ({len(finished(plan, out))} of {plan.shards} shards): make room and give the same "
                        "command again"
                    ) from None
        finally:
            gc.unfreeze()
    write_manifest(plan, out)


def is_whole(plan: Plan, out: Path, shard: int) -> bool:
    """Whether a shard lies there with the bytes that its note promises."""
    path, note = out / plan.name_of(shard), out / STATE / f"{plan.name_of(shard)}.json"
    if not path.is_file() or not note.is_file():
        return False
    promised = json.loads(note.read_text(encoding="utf-8"))
    return path.stat().st_size == promised["bytes"] and _sha256(path) == promised["sha256"]


def make_shard(plan: Plan, out: Path, shard: int, row: Callable[[int], dict[str, Any]]) -> None:
    """Write one shard and its note, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .refusals import Refusals
    from .schema import features, validate_row

    name = plan.name_of(shard)
    for stale in (out / STATE).glob(f"{name}.*.partial"):
        stale.unlink(missing_ok=True)
    partial = out / STATE / f"{name}.{os.getpid()}.partial"
    counts: dict[str, Counter] = {"tasks": Counter(), "sources": Counter()}
    refusals = Refusals()
    rows = characters = blank = 0
    group: list[dict[str, Any]] = []
    schema = features().arrow_schema
    try:
        with partial.open("wb") as file:
            with pq.ParquetWriter(file, schema) as writer:
                for index in plan.rows_of(shard):
                    try:
                        made = row(index)
                        validate_row(made, decode=False)
                    except (ValueError, RuntimeError) as error:
                        reason = re.sub(r"\d+", "…", str(error).splitlines()[0])
                        refusals.add(plan.kind, reason, f"row {index}: {error}")
                        continue
                    refusals.accept(plan.kind)
                    rows += 1
                    characters += len(made["text"])
                    blank += not made["text"]
                    counts["tasks"][made["task"]] += 1
                    counts["sources"][f"{source_group(made['source'])}\t{made['license']}"] += 1
                    group.append(made)
                    if len(group) == ROW_GROUP:
                        writer.write_table(pa.Table.from_pylist(group, schema=schema))
                        group = []
                if group:
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        note = {"file": name, "rows": rows, "bytes": partial.stat().st_size, "sha256": _sha256(partial)}
        note |= {"characters": characters, "blank": blank, **{key: dict(value) for key, value in counts.items()}}
        note["refused"] = refusals.as_dict()
        (out / STATE / f"{name}.json").unlink(missing_ok=True)  # of a shard that did not hash to it
        partial.rename(out / name)
        _write(out / STATE / f"{name}.json", note)
    finally:
        partial.unlink(missing_ok=True)


def source_group(source: str) -> str:
    """What rows of one origin share: the package or builder that a ``source`` begins with.

    >>> source_group("made-pages/dense/0#12 (Lato)"), source_group("npm @iconify-json/noto@1.2.9")
    ('made-pages', 'npm @iconify-json/noto@1.2.9')
    """
    return source if source.startswith(("npm ", "deb ", "pypi ")) else source.split("/")[0].split("#")[0]


def write_manifest(plan: Plan, out: Path) -> dict[str, Any] | None:
    """Write ``manifest.json`` when every shard has its note; None, and nothing written, when one has not."""
    from .refusals import Refusals

    notes = finished(plan, out)
    if len(notes) < plan.shards:
        return None
    manifest: dict[str, Any] = dataclasses.asdict(plan)
    for name in ("rows", "bytes", "characters", "blank"):
        manifest[name] = sum(note[name] for note in notes)
    for name in ("tasks", "sources"):
        total: Counter = Counter()
        for note in notes:
            total.update(note[name])
        manifest[name] = dict(sorted(total.items()))
    refusals = Refusals(max_share=1.0)  # what is written was minded shard by shard
    for note in notes:
        one = Refusals()
        one.load_dict(note["refused"])
        refusals.merge(one)
    manifest["refused"] = refusals.as_dict()
    manifest["sources"] = [
        {"source": key.split("\t")[0], "license": key.split("\t")[1], "rows": count}
        for key, count in manifest["sources"].items()
    ]
    manifest["shards"] = [{key: note[key] for key in ("file", "rows", "bytes", "sha256")} for note in notes]
    _write(out / MANIFEST, manifest)
    return manifest


def _write(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- executors


@dataclass
class ShardTask:
    """The one step of a datatrove pipeline: called with (data, rank, world_size). Pickled to wherever it runs."""

    plan: Plan
    out: Path
    make: Callable[[Plan], Maker]

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        make_shards(self.plan, self.out, rank, world_size, self.make)

    def __repr__(self) -> str:
        return f"{self.plan.shards} shards of {self.plan.kind} to {self.out}"


def generate(
    plan: Plan,
    out: str | Path,
    *,
    executor: str = "local",
    tasks: int | None = None,
    workers: int = 1,
    options: dict[str, Any] | None = None,
    dry_run: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Make a folder of shards, or what is missing in it.

    Args:
        plan: what the folder is to hold. out: the folder; for Slurm and Ray on a file system that all machines share.
        executor: "local" (processes of this machine), "slurm" (an array of jobs, submitted and not waited for) or
            "ray" (the cluster that `RAY_ADDRESS` names, else this machine).
        tasks: parts that the shards are dealt to; by default one per worker, for Slurm one per shard up to 1,000.
        workers: tasks that run at once.
        options: more arguments of datatrove's `SlurmPipelineExecutor` or `RayPipelineExecutor`.
        dry_run: submit and write nothing; Slurm's script goes to `say`.
        progress: show a bar. say: is told what happens, a line at a time.

    Returns:
        The manifest; None when the work is only submitted, or dry.

    Raises:
        ValueError: settings that the folder was not begun with, or no such executor.
        RuntimeError: datatrove or Ray is not installed; the disk is full; workers that are killed again and again.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, not {executor!r}")
    out = Path(out).expanduser().resolve()
    tasks = min(tasks or (1000 if executor == "slurm" else workers), plan.shards)
    if dry_run and executor != "slurm":
        say(
            f"{plan.count:,} rows of {plan.kind} in {plan.shards} shards by {tasks} tasks, {workers} at once, to {out}"
        )
        return None
    if not dry_run:
        plan = begin(plan, out)
    arguments: dict[str, Any] = {"pipeline": [ShardTask(plan, out, KINDS[plan.kind])], "tasks": tasks}
    # datatrove's own marks of completion say nothing of bytes and know one number of tasks: the shards' notes decide.
    arguments |= {"workers": workers, "skip_completed": False, **(options or {})}
    arguments["logging_dir"] = str(out / STATE / "logs")
    if executor == "slurm":
        _submit(arguments, dry_run, say)
        return None
    with _progress_bar(plan, out, progress):
        if executor == "local":
            _run_local(arguments, plan, out, say)
        else:
            _run_ray(arguments)
    manifest = write_manifest(plan, out)
    if manifest is None:
        left = plan.shards - len(finished(plan, out))
        raise RuntimeError(f"{left} of {plan.shards} shards are missing; why is in {out / STATE / 'logs'}")
    return manifest


def _executor(name: str) -> Any:
    try:
        import datatrove.executor as executors
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed: pip install 'unit-vision[scale]'") from None
    return getattr(executors, name)


def _run_local(arguments: dict[str, Any], plan: Plan, out: Path, say: Callable[[str], None]) -> None:
    """datatrove's local executor, its ranks in processes whose death is noticed (a `multiprocess.Pool` waits for ever
    for a worker that the kernel killed)."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    executor = _executor("LocalPipelineExecutor")(**arguments)
    tries, whole = 0, -1
    while True:
        context = multiprocessing.get_context("forkserver")
        pool = ProcessPoolExecutor(executor.workers, mp_context=context, initializer=_start_worker)
        try:
            for done in as_completed([pool.submit(executor._run_for_rank, rank, 1) for rank in range(executor.tasks)]):
                done.result()
            return
        except BrokenProcessPool:
            count = len(finished(plan, out))
            tries, whole = (1 if count > whole else tries + 1), count
            if tries > RESTARTS:
                raise RuntimeError(
                    "workers are killed again and again, for want of memory perhaps. What is written is whole "
                    f"({count} of {plan.shards} shards): give the same command with fewer --workers"
                ) from None
            say(f"a worker was killed; {count} of {plan.shards} shards are there, going on")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Quiet, and gone when the process that started it is."""
    import multiprocessing
    from multiprocessing.connection import wait

    from loguru import logger

    logger.disable("datatrove")  # its log of an error is a page; the command says it in a line
    parent = multiprocessing.parent_process()

    def watch():
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_ray(arguments: dict[str, Any]) -> None:
    executor = _executor("RayPipelineExecutor")
    try:
        import ray
    except ModuleNotFoundError:
        raise RuntimeError("ray is not installed: pip install 'ray[default]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    executor(**arguments).run()


def _submit(arguments: dict[str, Any], dry_run: bool, say: Callable[[str], None]) -> None:
    import shutil
    import tempfile

    kind = _executor("SlurmPipelineExecutor")
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            arguments["logging_dir"], real = folder, arguments["logging_dir"]
            executor = kind(**arguments)
            script = executor.get_launch_file_contents(
                executor.get_sbatch_args(min(executor.tasks, executor.max_array_size)),
                f"srun -l -n 1 launch_pickled_pipeline {folder}/executor.pik",
            )
            say(script.replace(folder, real))
        return
    if shutil.which("sbatch") is None:
        raise RuntimeError("the command sbatch is not on this machine: --executor slurm is for a Slurm login node")
    executor = kind(**arguments)
    executor.launch_job()
    say(
        f"submitted as job {executor.job_id}; the last task writes {MANIFEST}. Logs and the script are in "
        f"{arguments['logging_dir']}"
    )


class _progress_bar:
    """A bar of the rows that lie on disk, from the shards' notes."""

    def __init__(self, plan: Plan, out: Path, show: bool):
        self.plan, self.out, self.show, self.over = plan, out, show, threading.Event()

    def __enter__(self):
        from tqdm import tqdm

        self.bar = tqdm(total=self.plan.count, unit=" rows", disable=not self.show, file=sys.stderr)
        self.bar.update(self._rows())
        self.bar.start_t, self.bar.initial = time.time(), self.bar.n
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _rows(self) -> int:
        return min(len(list((self.out / STATE).glob("part-*.json"))) * self.plan.shard_rows, self.plan.count)

    def _watch(self):
        while not self.over.wait(1.0):
            self.bar.update(self._rows() - self.bar.n)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.bar.update(self._rows() - self.bar.n)
        self.bar.close()
