"""Checkpoints are whole or absent; a run goes on from the last whole one as if nothing had happened."""

import errno
import hashlib
import json
import os
import resource
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import STAGE_1, arguments, data, mixture, model_and_teacher, train  # noqa: F401
from transformers import TrainerCallback

from training import checkpoints as module
from training.checkpoints import MANIFEST, CheckpointError, checkpoints, damage, last_whole_checkpoint
from training.freezing import freeze_parts
from training.optimizer_state import leaves
from training.trainer import IntraScaleTrainer

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):  # noqa: F811
    """A run of four steps with checkpoints at 2 and 4 that nothing disturbs."""
    out = tmp_path_factory.mktemp("straight")
    trainer, _ = train(IntraScaleTrainer, out, data, **SAVING)
    return out, trainer


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of it to be spoilt."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    return out


def found_and_said(run) -> tuple[str | None, list[str]]:
    lines: list[str] = []
    found = last_whole_checkpoint(run, lines.append)
    return (found and found.name), lines


# -- what is written -------------------------------------------------------------------------------


def test_a_manifest_holds_the_hash_of_every_file(straight):
    out, _ = straight
    assert sorted(each.name for each in out.iterdir() if "checkpoint" in each.name) == ["checkpoint-2", "checkpoint-4"]
    for folder in checkpoints(out):
        manifest = json.loads((folder / MANIFEST).read_text())
        names = {each.name for each in folder.iterdir()} - {MANIFEST}
        assert set(manifest["files"]) == names
        assert {
            "model.safetensors",
            "optimizer.safetensors",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
        } <= names
        assert {"sampler_state_0.safetensors", "data-state-0.json", "log-state-0.json"} <= names
        for name, facts in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert f"checkpoint-{manifest['step']}" == folder.name
        assert manifest["world_size"] == 1


def test_the_old_ones_stay_until_the_new_one_is_whole(data, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    put = module.put_in_place

    def watched(written, folder):
        assert (written / MANIFEST).is_file()
        seen.append((folder.name, [each.name for each in checkpoints(folder.parent)]))
        put(written, folder)

    monkeypatch.setattr(module, "put_in_place", watched)
    train(IntraScaleTrainer, tmp_path, data, **SAVING | {"save_steps": 1, "save_total_limit": 1})
    before = [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert seen == [(f"checkpoint-{step}", before[step - 1]) for step in (1, 2, 3, 4)]
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_best_checkpoint_is_known_by_its_place(data, tmp_path):  # noqa: F811
    class Best(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.best_global_step = 1

    model, _ = model_and_teacher()
    settings = arguments(tmp_path, **SAVING | {"save_steps": 1, "save_total_limit": 2, "vision_weight": 0.0})
    trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data, length=4), callbacks=[Best()])
    trainer.train()
    assert [each.name for each in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


def test_saving_over_an_earlier_checkpoint_of_that_step(data, run, straight):  # noqa: F811
    resumed, _ = train(IntraScaleTrainer, run, data, resume=str(run / "checkpoint-2"), **SAVING)
    assert [each.name for each in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert damage(run / "checkpoint-4") is None
    for name, tensor in straight[1].model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


# -- what a start finds ----------------------------------------------------------------------------


def test_the_last_whole_one_is_found_and_nothing_is_said(run):
    assert found_and_said(run) == ("checkpoint-4", [])
    assert found_and_said(run / "nowhere") == (None, [])


def cut_off(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def turn_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (cut_off, "optimizer.safetensors has "),
        (turn_a_bit, "model.safetensors is not what was written"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1'), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 9, "files": {}}'), "is of format 9, known is 1"),
    ],
)
def test_a_damaged_one_is_named_and_put_aside(run, spoil, words):
    spoil(run / "checkpoint-4")
    found, lines = found_and_said(run)
    assert found == "checkpoint-2"
    assert len(lines) == 1
    assert words in lines[0]
    assert lines[0].endswith("It is put aside as damaged-checkpoint-4.")
    assert (run / "damaged-checkpoint-4").is_dir()
    assert found_and_said(run) == ("checkpoint-2", [])


def test_a_missing_shard_of_the_weights_is_named(run):
    folder = run / "checkpoint-4"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / MANIFEST).unlink()
    module.write_manifest(folder, {"step": 4})
    assert damage(folder) is None
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert damage(folder) == "model-00002-of-00002.safetensors is missing"
    (folder / MANIFEST).unlink()  # and in the older format
    assert damage(folder) == "model-00002-of-00002.safetensors is missing"


def test_what_was_being_written_is_removed_and_named(run):
    (run / ".checkpoint-6.partial" / "checkpoint-6").mkdir(parents=True)
    (run / ".checkpoint-6.partial" / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    (run / "checkpoint-2").rename(run / ".checkpoint-2.deleted")
    (run / "checkpoint-4").rename(run / ".checkpoint-4.replaced")  # killed between two renames
    found, lines = found_and_said(run)
    assert found == "checkpoint-4"
    assert lines == [f"{run}/.checkpoint-6.partial was not finished: removed."]
    assert [each.name for each in run.iterdir() if "checkpoint" in each.name] == ["checkpoint-4"]


def test_one_of_an_older_format_is_taken_with_a_line(run, straight, data):  # noqa: F811
    """As this package wrote them before there were manifests."""
    shutil.rmtree(run / "checkpoint-4")
    for name in (MANIFEST, "log-state-0.json"):
        (run / "checkpoint-2" / name).unlink()
    shared = run / "checkpoint-2" / "sampler_state_0.safetensors"
    shared.rename(shared.with_name("sampler_state.safetensors"))
    found, lines = found_and_said(run)
    assert found == "checkpoint-2"
    assert len(lines) == 1
    assert "has no manifest.json: it is of an older format" in lines[0]
    resumed, _ = train(IntraScaleTrainer, run, data, resume=str(run / found), **SAVING)
    for name, tensor in straight[1].model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_one_of_an_older_format_that_was_cut_off_is_not_taken(run, name):
    (run / "checkpoint-4" / MANIFEST).unlink()
    path = run / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:200])
    found, lines = found_and_said(run)
    assert found == "checkpoint-2"
    assert name in lines[0]


def test_none_left_is_said(run):
    for folder in checkpoints(run):
        (folder / "scheduler.pt").unlink()
    found, lines = found_and_said(run)
    assert found is None
    assert lines[-1] == f"No whole checkpoint is left in {run}: the run starts anew."


def test_going_on_from_nothing_is_refused(data, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"There is no whole checkpoint in .* to go on from"):
        train(IntraScaleTrainer, tmp_path, data, resume=True, **SAVING)


# -- the log ---------------------------------------------------------------------------------------


def test_lines_of_the_log_that_span_a_checkpoint_are_the_same(data, tmp_path):  # noqa: F811
    """Logged every three steps, saved every two: the mean over three steps holds steps before the checkpoint."""
    settings = SAVING | {"max_steps": 6, "logging_steps": 3, "save_total_limit": 4}
    first, _ = train(IntraScaleTrainer, tmp_path, data, **settings)
    expected = [entry for entry in first.state.log_history if "loss" in entry]
    for step in (2, 4):
        resumed, _ = train(IntraScaleTrainer, tmp_path, data, resume=str(tmp_path / f"checkpoint-{step}"), **settings)
        assert [entry for entry in resumed.state.log_history if "loss" in entry] == expected


def test_how_often_is_saved_and_logged_may_change(data, run):  # noqa: F811
    settings = SAVING | {"save_steps": 1, "logging_steps": 2}
    resumed, _ = train(IntraScaleTrainer, run, data, resume=str(run / "checkpoint-2"), **settings)
    assert [each.name for each in checkpoints(run)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 4]


# -- a recipe that has changed ---------------------------------------------------------------------


class Rates(TrainerCallback):
    """Rate and decay of each part's matrices, as the optimiser takes them, step by step."""

    def __init__(self):
        self.steps: list[dict[str, tuple[float, float]]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        groups = [each for each in optimizer.param_groups if each["weight_decay"]]
        self.steps.append({each["part"]: (each["lr"], each["weight_decay"]) for each in groups})


def gone_on(run, data, freeze=(), **changes):  # noqa: F811
    model, teacher = model_and_teacher()
    freeze_parts(model, freeze)
    settings = arguments(run, **(SAVING | changes))
    rates = Rates()
    trainer = IntraScaleTrainer(
        model=model, args=settings, train_dataset=mixture(data, length=4), teacher=teacher, callbacks=[rates]
    )
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.state.global_step == 4
    return trainer, rates.steps


@pytest.mark.parametrize(
    ("changes", "rate", "slower", "decay"),
    [
        ({}, 1e-3, {}, 0.01),
        ({"learning_rate": 1e-4}, 1e-4, {}, 0.01),
        ({"weight_decay": 0.5}, 1e-3, {}, 0.5),
        ({"part_rates": {"encoder": 0.1}}, 1e-3, {"encoder": 0.1}, 0.01),
        ({"freeze": ["language_decoder"]}, 1e-3, {}, 0.01),
        ({"language_weight": 0.0}, 1e-3, {}, 0.01),
    ],
)
def test_a_run_goes_on_with_the_rates_of_its_recipe_as_it_is_now(data, run, changes, rate, slower, decay):  # noqa: F811
    # half of the cosine's four steps lies behind: a half is left, then (1 + cos(3 pi / 4)) / 2
    trainer, steps = gone_on(run, data, changes.pop("freeze", ()), **changes)
    for found, left in zip(steps, (0.5, (1 - 0.5**0.5) / 2), strict=True):
        assert {"encoder", "vision_decoder"} <= set(found)
        for part, given in found.items():
            assert given == pytest.approx((rate * slower.get(part, 1.0) * left, decay), rel=1e-9)
    assert all("exp_avg" in each for each in trainer.optimizer.state.values())


@pytest.mark.parametrize("optimizers", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimiser_begins_anew_where_the_state_is_not_its_own(data, tmp_path, optimizers, capsys):  # noqa: F811
    train(IntraScaleTrainer, tmp_path, data, optimizer=optimizers[0], **(SAVING | {"lr_scheduler_type": "constant"}))
    matrices = 22
    capsys.readouterr()
    trainer, _ = gone_on(tmp_path, data, optimizer=optimizers[1], lr_scheduler_type="constant")
    told = f"The checkpoint has no optimiser state of {matrices} of the tensors that train: theirs begins anew."
    assert told in capsys.readouterr().out
    for leaf in leaves(trainer.optimizer):
        for group in leaf.param_groups:
            key = "momentum_buffer" if group["muon"] else "exp_avg_sq"
            for each in group["params"]:
                assert key in leaf.state[each]
                if "step" in leaf.state[each]:  # a matrix of AdamW's that Muon had before, or one that it had itself
                    anew = optimizers[0] == "muon" and float(leaf.state[each]["step"]) == 2
                    assert anew or float(leaf.state[each]["step"]) == 4


def test_layers_may_get_rates_of_their_own(data, run):  # noqa: F811
    trainer, _ = gone_on(run, data, layer_decay=0.5, lr_scheduler_type="constant")
    rates = {group["lr"] for group in trainer.optimizer.param_groups if group["part"] == "encoder"}
    assert rates == {1e-3, 0.5e-3, 0.25e-3}  # what stands behind the one block, the block, the embeddings


def test_an_average_goes_on_where_another_part_is_frozen(data, tmp_path, capsys):  # noqa: F811
    settings = SAVING | {"ema_decay": 0.5}
    train(IntraScaleTrainer, tmp_path, data, freeze=["connector"], **settings)
    trainer, _ = gone_on(tmp_path, data, freeze=["language_decoder"], ema_decay=0.5)
    assert "holds no average of 4 of the tensors that train: theirs begins anew" in capsys.readouterr().out
    assert trainer.average.updates == 4


def test_a_checkpoint_without_an_optimiser_is_said(data, tmp_path, capsys):  # noqa: F811
    train(IntraScaleTrainer, tmp_path, data, save_only_model=True, **SAVING)
    gone_on(tmp_path, data)
    assert "checkpoint-2 has no state of the optimiser: it and the learning rate's schedule begin anew." in (
        capsys.readouterr().out
    )


# -- a folder that cannot be written to ------------------------------------------------------------


@contextmanager
def file_limit(limit: int):
    """No file may grow beyond so many bytes: a writer hears of it from the system, as it does of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [10_000, 30_000, 150_000])
def test_a_disk_that_is_full_leaves_the_last_checkpoint(data, tmp_path, straight, limit):  # noqa: F811
    """The limit hits the smaller files, the weights or the optimiser's state."""
    model, teacher = model_and_teacher()
    trainer = IntraScaleTrainer(
        model=model, args=arguments(tmp_path, **SAVING), train_dataset=mixture(data, STAGE_1, 4), teacher=teacher
    )
    save = trainer._save_checkpoint

    def full_from_the_second_on(*args):
        with file_limit(limit) if trainer.state.global_step == 4 else nullcontext():
            save(*args)

    trainer._save_checkpoint = full_from_the_second_on
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    line = str(error.value)
    assert "\n" not in line
    assert f"checkpoint-4 could not be written to {tmp_path}" in line
    assert "checkpoint-2 stays; the same command goes on from there" in line
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-2"]
    resumed, _ = train(IntraScaleTrainer, tmp_path, data, resume=True, **SAVING)
    for name, tensor in straight[1].model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_full_disk_is_called_so(data, tmp_path, monkeypatch):  # noqa: F811
    """torch's writer says only that it failed; how much room there is tells why."""

    def failing(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:860] . PytorchStreamWriter failed writing file data/0"
        )

    monkeypatch.setattr(torch, "save", failing)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC) + r"\. The same command starts anew"):
        train(IntraScaleTrainer, tmp_path, data, **SAVING)


def test_other_errors_stay_what_they_are(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(IntraScaleTrainer, tmp_path, data, **SAVING)


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(data, tmp_path, capsys):  # noqa: F811
    model, teacher = model_and_teacher()
    settings = arguments(tmp_path / "out", max_steps=2)
    trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data, STAGE_1, 2), teacher=teacher)
    trainer.log_path = tmp_path / "log.jsonl"
    trainer.log_path.mkdir()  # a folder in its place
    trainer.train()
    assert trainer.state.global_step == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be written to" in line]
    assert len(said) == 1
