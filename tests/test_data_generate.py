"""`unit data generate`: the same bytes however the work is dealt out and wherever it is broken off."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pytest.importorskip("pyarrow")

import generate_process  # noqa: F401  (registers the kind "dots")
import pyarrow.parquet as pq
from PIL import Image

from training.data import generate as module
from training.data.generate import Plan, begin, finished, make_shards, source_group
from unit_cli.__main__ import main

HERE = Path(__file__).resolve().parent
PROCESS = [sys.executable, str(HERE / "generate_process.py"), "dots"]


def files(folder):
    """What a user has in the folder: shards and manifest."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def start(*arguments, **options):
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*PROCESS, *map(str, arguments)], env=environment, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set of 50 rows in 7 shards, made in one go in this process."""
    out = tmp_path_factory.mktemp("generate") / "whole"
    plan = begin(Plan("dots", 50, 8, seed=3), out)
    make_shards(plan, out)
    return out


def test_the_manifest_says_what_lies_there(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["seed"] == 3
    assert manifest["count"] == manifest["rows"] == 50
    assert manifest["characters"] == 50 * 40  # a SHA-1 each
    assert manifest["sources"] == [{"source": "made-pages", "license": "CC0-1.0", "rows": 50}]
    assert [shard["rows"] for shard in manifest["shards"]] == [8, 8, 8, 8, 8, 8, 2]
    at = 0
    for shard in manifest["shards"]:
        content = (whole / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
        for row in pq.read_table(io.BytesIO(content)).to_pylist():
            assert row["source"] == f"made-pages/dots/3#{at}"
            assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (12, 8)
            at += 1
    assert at == 50


@pytest.mark.parametrize("world_size", [2, 7, 12])
def test_any_number_of_tasks_in_any_order_gives_the_same_bytes(whole, tmp_path, world_size):
    plan = begin(Plan("dots", 50, 8, seed=3), tmp_path)
    for rank in reversed(range(world_size)):
        assert "manifest.json" not in files(tmp_path)
        make_shards(plan, tmp_path, rank, world_size)
    assert files(tmp_path) == files(whole)


def test_the_executor_of_this_machine_gives_the_same_bytes(whole, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["data", "generate", "dots", "--count", "50", "--shard-rows", "8", "--seed", "3", "--out", str(out)]
    process = start(*arguments[3:], "--workers", "2", "--tasks", "3")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "50 rows in 7 shards" in said
    assert files(out) == files(whole)


def test_killed_in_the_middle_and_started_again(whole, tmp_path):
    """kill -9 of the command: its workers go with it, what is whole is kept, the end is that of one go."""
    out, settings = tmp_path / "out", tmp_path / "slow.yaml"
    settings.write_text("kind: dots\nsettings: {slow: 0.03}\n")
    process = [sys.executable, PROCESS[1], str(settings), "--count", "50", "--shard-rows", "8", "--seed", "3"]
    process += ["--workers", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    running = subprocess.Popen(process, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not list(out.glob("part-*")) and time.monotonic() < limit:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    time.sleep(0.3)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 0 < len(kept) < 7
    assert not (out / "manifest.json").exists()
    for path in kept:  # nothing half-written under a shard's name
        assert len(pq.read_table(path)) in (8, 2)
    time.sleep(0.5)
    assert set(out.glob("part-*.parquet")) == set(kept)  # no worker went on alone
    (out / ".generate" / "part-00006.parquet.1.partial").write_bytes(b"half")
    (out / "part-00000.parquet").write_bytes(b"damaged since")
    again = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    found, expected = files(out), files(whole)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name != "manifest.json")
    told, wanted = json.loads(found["manifest.json"]), json.loads(expected["manifest.json"])
    assert told["settings"] == {"slow": 0.03}
    assert told | {"settings": {}} == wanted
    assert not list(out.rglob("*.partial"))
    untouched = [path for path, time_ in kept.items() if path.stat().st_mtime_ns == time_]
    assert set(kept) - set(untouched) <= {out / "part-00000.parquet"}


def test_a_worker_that_is_killed_costs_one_line(whole, tmp_path):
    out, recipe = tmp_path / "out", tmp_path / "die.yaml"
    recipe.write_text(f"kind: dots\nsettings: {{die: {tmp_path / 'died'}}}\n")
    arguments = ["--count", "50", "--shard-rows", "8", "--seed", "3", "--out", str(out)]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [sys.executable, PROCESS[1], str(recipe), *arguments], env=paths, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "a worker was killed; 0 of 7 shards are there, going on" in done.stdout
    assert (out / "part-00000.parquet").read_bytes() == (whole / "part-00000.parquet").read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 4}, "seed: 3 there, 4 now"),
        ({"count": 51}, "count: 50 there, 51 now"),
        ({"settings": {"slow": 0}}, "settings.slow: None there, 0 now"),
        ({"split": "validation"}, "split: 'train' there, 'validation' now"),
    ],
)
def test_other_settings_are_refused_with_the_difference(whole, changed, said):
    before = files(whole)
    with pytest.raises(ValueError, match=said):
        begin(Plan(**{"kind": "dots", "count": 50, "shard_rows": 8, "seed": 3} | changed), whole)
    assert files(whole) == before


def test_other_code_fonts_or_a_foreign_folder_are_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_made_with", lambda: {"skia-python": "1.0"})
    with pytest.raises(ValueError, match=r"made_with.skia-python: .* there, '1.0' now"):
        begin(Plan("dots", 50, 8, seed=3), whole)
    monkeypatch.undo()
    plan = begin(Plan("dots", 50, 8, seed=3), tmp_path / "out")
    plan.resources = "the fonts of another machine"
    with pytest.raises(RuntimeError, match="other fonts, texts or libraries"):
        make_shards(plan, tmp_path / "out")
    (tmp_path / "part-00000.parquet").write_bytes(b"somebody else's")
    with pytest.raises(ValueError, match="did not make"):
        begin(Plan("dots", 50, 8), tmp_path)


def test_a_full_disk_is_one_line_and_no_half_shard(tmp_path, monkeypatch):
    plan = begin(Plan("dots", 20, 8, seed=3), tmp_path)
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:  # a shard, its note, and now the next shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"no room for part-00001.parquet .* \(1 of 3 shards\)") as error:
        make_shards(plan, tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.glob("part-*")] == ["part-00000.parquet"]
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    make_shards(plan, tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["rows"] == 20


def test_rows_that_cannot_be_made_are_counted_up_to_a_share(tmp_path):
    plan = begin(Plan("dots", 300, 300, settings={"bad": 25}), tmp_path / "few")
    make_shards(plan, tmp_path / "few")
    manifest = json.loads((tmp_path / "few" / "manifest.json").read_text())
    assert manifest["rows"] == 300 - 12  # 1, 26, ... 276
    assert (manifest["refused"]["dots"]["accepted"], manifest["refused"]["dots"]["refused"]) == (288, 12)
    assert manifest["refused"]["dots"]["reasons"]["a dot is missing"]["count"] == 12
    plan = begin(Plan("dots", 300, 300, settings={"bad": 10}), tmp_path / "many")
    with pytest.raises(ValueError, match=r"21 of 202 rows were refused.*a dot is missing \(21 times"):
        make_shards(plan, tmp_path / "many")
    assert not list((tmp_path / "many").glob("part-*"))


SBATCH = """#!/bin/sh
# A Slurm of one machine: runs the array's jobs one after another, as the script's #SBATCH lines ask for.
for script; do :; done
cp "$script" "$FAKE_SLURM/$(ls "$FAKE_SLURM" | wc -l).sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for job in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$job SLURM_NODELIST=here bash "$script" >> "$FAKE_SLURM.log" 2>&1 || exit 1
done
echo "Submitted batch job 17"
"""


def test_the_slurm_script_runs_as_an_array_of_jobs(whole, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "jobs").mkdir()
    launch = f'#!/bin/sh\nexec "{sys.executable}" -m datatrove.tools.launch_pickled_pipeline "$@"\n'
    for name, script in {
        "sbatch": SBATCH,
        "srun": '#!/bin/sh\nshift 3\nexec "$@"\n',  # of -l -n 1 COMMAND
        "scontrol": "#!/bin/sh\necho here\n",
        "launch_pickled_pipeline": launch,
        "merge_stats": "#!/bin/sh\n",
    }.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    out = tmp_path / "out"
    arguments = ["--count", "50", "--shard-rows", "8", "--seed", "3", "--out", out, "--executor", "slurm"]
    arguments += ["--partition", "cpu", "--tasks", "2", "--time", "01:00:00", "--sbatch", "account=pages"]
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path / "jobs")}
    said, errors = start(*arguments, env=environment).communicate(timeout=120)
    assert "submitted as job 17" in said, errors + (tmp_path / "jobs.log").read_text()
    assert files(out) == files(whole)
    script = (tmp_path / "jobs" / "0.sh").read_text()
    for line in ("--array=0-1", "--partition=cpu", "--time=01:00:00", "--account=pages", "--cpus-per-task=1"):
        assert line in script


def test_a_dry_run_shows_slurms_script_and_writes_nothing(tmp_path, capsys):
    arguments = ["data", "generate", "dots", "--count", "50", "--shard-rows", "8", "--out", str(tmp_path / "out")]
    slurm = ["--executor", "slurm", "--partition", "cpu", "--workers", "4", "--environment", "source env/bin/activate"]
    assert main([*arguments, *slurm, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-6%4" in script
    assert "source env/bin/activate" in script
    assert f"launch_pickled_pipeline {tmp_path / 'out'}/.generate/logs/executor.pik" in script
    assert main([*arguments, "--dry-run"]) == 0
    assert "50 rows of dots in 7 shards by 1 tasks" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["circles", "--count", "5"], "kind must be one of pages, dense, sparse"),
        (["dots", "--count", "5", "--executor", "slurm"], "needs --partition"),
        (["RECIPE", "--count", "5"], "a recipe has `kind`"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, arguments, said):
    (tmp_path / "recipe.yaml").write_text("kind: dots\nseed: 4\n")
    arguments = [str(tmp_path / "recipe.yaml") if word == "RECIPE" else word for word in arguments]
    assert main(["data", "generate", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_finished_shards_are_not_made_again(whole, monkeypatch):
    monkeypatch.setattr(module, "make_shard", None)
    make_shards(module.read_plan(whole), whole)
    assert len(finished(module.read_plan(whole), whole)) == 7


@pytest.mark.skipif(sys.platform == "darwin", reason="starts a cluster")
def test_ray_gives_the_same_bytes(whole, tmp_path):
    pytest.importorskip("ray")
    arguments = ["--count", "50", "--shard-rows", "8", "--seed", "3", "--out", tmp_path / "out", "--executor", "ray"]
    process = start(*arguments, "--tasks", "3", "--workers", "1", "--memory-gb", "1")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert files(tmp_path / "out") == files(whole)


def test_sources_are_grouped_by_package():
    assert source_group("texlive-science-doc/usr/share/a.pdf#3") == "texlive-science-doc"
    assert source_group("npm @iconify-json/noto@1.2.9") == "npm @iconify-json/noto@1.2.9"
