"""The teacher's features: their precision, and a store of them that gives back every bit and survives what it must."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import (  # noqa: F401
    STAGE_2,
    InterScaleTrainer,
    IntraScaleTrainer,
    UnitTrainer,
    arguments,
    data,
    mixture,
    model_and_teacher,
)

from training.teacher_cache import HEADER, FeatureStore, TeacherFeatures, picture_key, teacher_name

KEYS = [bytes([number]) * 16 for number in range(8)]


def features(seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- the store -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_by_bit_also_to_another_process(tmp_path, dtype):
    store = FeatureStore(tmp_path, 5, 4, dtype, 1e6)
    for number in range(3):
        assert store.put(KEYS[number], features(number, dtype))
    assert not store.put(KEYS[0], features(9, dtype))  # the first one stays
    other = FeatureStore(tmp_path, 5, 4, dtype, 1e6)
    for each in (store, other):
        assert len(each) == 3
        assert all(torch.equal(each.get(KEYS[number]), features(number, dtype)) for number in range(3))
        assert each.get(KEYS[5]) is None
    assert (tmp_path / "segment-0.bin").stat().st_size == 3 * (HEADER + 5 * 4 * dtype.itemsize)


def test_two_writers_have_a_segment_each_and_see_each_other(tmp_path):
    one, two = (FeatureStore(tmp_path, 5, 4, torch.float32, 1e6) for _ in range(2))
    one.put(KEYS[0], features(0))
    two.put(KEYS[1], features(1))
    assert {each.name for each in tmp_path.iterdir()} == {"segment-0.bin", "segment-1.bin"}
    one.refresh()
    assert torch.equal(one.get(KEYS[1]), features(1))
    one.close()
    three = FeatureStore(tmp_path, 5, 4, torch.float32, 1e6)  # takes up the segment that was let go of
    three.put(KEYS[2], features(2))
    assert {each.name for each in tmp_path.iterdir()} == {"segment-0.bin", "segment-1.bin"}
    assert all(torch.equal(three.get(KEYS[number]), features(number)) for number in range(3))


@pytest.mark.parametrize("cut", [1, 40, 111])
def test_a_record_cut_off_is_written_anew(tmp_path, cut):
    store = FeatureStore(tmp_path, 5, 4, torch.float32, 1e6)
    for number in range(2):
        store.put(KEYS[number], features(number))
    store.close()
    path = tmp_path / "segment-0.bin"
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size - cut)
    store = FeatureStore(tmp_path, 5, 4, torch.float32, 1e6)
    assert len(store) == 1
    assert store.get(KEYS[1]) is None
    assert store.put(KEYS[1], features(1))
    again = FeatureStore(tmp_path, 5, 4, torch.float32, 1e6)
    assert all(torch.equal(again.get(KEYS[number]), features(number)) for number in range(2))


def test_a_record_that_is_not_what_was_written_is_not_taken(tmp_path):
    store = FeatureStore(tmp_path, 5, 4, torch.float32, 1e6)
    for number in range(2):
        store.put(KEYS[number], features(number))
    with (tmp_path / "segment-0.bin").open("r+b") as opened:
        opened.seek(HEADER + 7)
        opened.write(b"\xff")
    assert store.get(KEYS[0]) is None
    assert store.put(KEYS[0], features(0))
    assert torch.equal(store.get(KEYS[0]), features(0))
    assert torch.equal(store.get(KEYS[1]), features(1))


def test_the_store_stays_within_its_limit(tmp_path):
    record = HEADER + 80
    store = FeatureStore(tmp_path, 5, 4, torch.float32, 3 * record + 10)
    assert [store.put(KEYS[number], features(number)) for number in range(5)] == [True] * 3 + [False] * 2
    assert "teacher_cache_gigabytes" in store.full
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) == 3 * record


def test_a_disk_without_room_ends_the_keeping_and_not_the_run(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path, 5, 4, torch.float32, 1e6)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert not store.put(KEYS[0], features(0))
    assert store.full == "No space left on device"
    assert store.get(KEYS[0]) is None


WRITER = """
import sys, torch
from training.teacher_cache import FeatureStore
store = FeatureStore(sys.argv[1], 50, 40, torch.float32, 1e9)
print("ready", flush=True)
for number in range(10**6):
    store.put(number.to_bytes(16, "big"), torch.full((50, 40), float(number)))
"""


def test_kill_9_leaves_whole_records(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    process.stdout.readline()
    while sum(each.stat().st_size for each in tmp_path.iterdir()) < 200_000:
        assert process.poll() is None
    process.kill()
    process.wait()
    store = FeatureStore(tmp_path, 50, 40, torch.float32, 1e9)
    assert len(store) >= 20
    for key in list(store.places):
        assert torch.equal(store.get(key), torch.full((50, 40), float(int.from_bytes(key, "big"))))
    assert store.put(b"another key ....", torch.zeros(50, 40))


# -- names and keys --------------------------------------------------------------------------------


def test_keys_tell_pixels_and_shapes_apart():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    other = pixels.copy()
    other[0, 0, 0] += 1
    keys = {picture_key(each).tobytes() for each in (pixels, other, pixels.reshape(2, 8, 3), pixels.astype(np.int8))}
    assert len(keys) == 4
    assert np.array_equal(picture_key(pixels), picture_key(pixels.copy()))
    assert picture_key(pixels).shape == (16,)


def test_another_teacher_precision_or_normalisation_has_another_name():
    from tiny import image_processor

    _, teacher = model_and_teacher()
    names = [teacher_name(teacher), teacher_name(teacher, image_processor())]
    names.append(teacher_name(teacher, image_processor(image_mean=[0.5, 0.5, 0.5])))
    assert teacher_name(teacher) == names[0]
    with torch.no_grad():
        teacher.norm.weight[0] += 1e-3
    names += [teacher_name(teacher), teacher_name(teacher.to(torch.bfloat16))]
    assert len(set(names)) == 5


# -- in a run --------------------------------------------------------------------------------------


def keyed(dataset, augment=False, raw=False):
    for group in dataset.groups:
        group.collator.keyed, group.collator.augment_pictures, group.collator.raw = True, augment, raw
    return dataset


def run(out, data, cache, stage=InterScaleTrainer, names=STAGE_2, augment=False, steps=8, **changes):  # noqa: F811
    """8 steps of 2 pictures a group over 12 pictures: the second epoch begins in step 7."""
    model, teacher = model_and_teacher()
    settings = arguments(out, max_steps=steps, teacher_cache=cache, **changes)
    dataset = keyed(mixture(data, names, steps), augment)
    trainer = stage(model=model, args=settings, train_dataset=dataset, teacher=teacher)
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return trainer, losses


@pytest.mark.parametrize("changes", [{}, {"bf16": True}])
def test_a_run_with_a_cache_is_the_run_without(data, tmp_path, changes, capsys):  # noqa: F811
    plain, losses = run(tmp_path / "plain", data, False, **changes)
    for attempt in range(2):
        cached, found = run(tmp_path / "cached", data, str(tmp_path / "store"), **changes)
        assert found == losses
        for one, other in zip(plain.model.parameters(), cached.model.parameters(), strict=True):
            assert torch.equal(one, other)
        told = capsys.readouterr().out
        pictures = 2 * 8 * 2  # natural rows of the run, at two scales
        read = pictures if attempt else pictures - 24  # 12 pictures, each at two scales, are computed once
        assert f"teacher_cache: {read} pictures read" in told, told
        assert f"{pictures - read} computed" in told
    dtype = torch.bfloat16 if changes else torch.float32
    record = HEADER + 17 * 32 * dtype.itemsize  # 4 x 4 patches and the class token
    segment = next((tmp_path / "store").glob("*/17-32/segment-0.bin"))
    assert segment.stat().st_size == 24 * record
    assert f"{record:,} bytes a picture" in told


def test_pictures_changed_at_random_are_not_kept_and_it_is_said(data, tmp_path, capsys):  # noqa: F811
    trainer, _ = run(tmp_path, data, True, augment=True, steps=2)
    assert trainer.teacher_features.folder is None
    assert "teacher_cache: not used: pictures are changed at random" in capsys.readouterr().out
    assert not (tmp_path / "teacher-cache").exists()


def test_pictures_left_alone_come_twice_alike_and_else_do_not(data):  # noqa: F811
    for augment, alike in ((False, True), (True, False)):
        dataset = keyed(mixture(data, ("natural_x1",), 12), augment, raw=True)
        keys = [{each.numpy().tobytes() for each in dataset[step]["natural_x1"]["teacher_keys"]} for step in range(12)]
        first, second = set().union(*keys[:6]), set().union(*keys[6:])  # two epochs of 12 pictures
        assert (first == second) is alike
        assert not first & second or alike


def test_the_key_is_of_what_the_teacher_sees(data):  # noqa: F811
    batch = keyed(mixture(data, ("natural_x4",), 1), raw=True)[0]["natural_x4"]
    assert batch["teacher_keys"].shape == (2, 16)
    assert batch["teacher_keys"].dtype == torch.uint8
    assert "teacher_pixel_values" in batch
    for other in (mixture(data, ("natural_x4",), 1), keyed(mixture(data, ("natural_x4",), 1))):
        assert "teacher_keys" not in other[0]["natural_x4"]  # normalised already, by whatever collator: not by these


def test_the_teacher_computes_in_its_own_precision_whatever_the_student_does(tmp_path):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for asked in ("float32", "bfloat16"):
        settings = arguments(tmp_path, teacher_cache=str(tmp_path / asked), teacher_dtype=asked)
        expected = TeacherFeatures(model_and_teacher()[1].eval(), settings)(pixels)
        again = TeacherFeatures(model_and_teacher()[1].eval(), arguments(tmp_path, teacher_dtype=asked))
        with torch.autocast("cpu", torch.bfloat16):
            found = again(pixels)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_the_name_is_of_the_weights_that_compute(tmp_path):
    """`share_frozen` changes a teacher when its trainer has been made."""
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = arguments(tmp_path, teacher_cache=str(tmp_path / "store"))
    features = []
    for _ in range(2):
        teacher = model_and_teacher()[1].eval()
        asked = TeacherFeatures(teacher, settings)
        if features:
            with torch.no_grad():
                teacher.blocks[0].mlp.fc1.weight.copy_(teacher.blocks[0].mlp.fc1.weight.bfloat16())
        features.append(asked(pixels))
        assert asked.computed == 1
        assert asked.folder.name == teacher_name(teacher)
    assert not torch.equal(*features)


def test_the_limit_is_of_the_whole_folder(tmp_path):
    one = FeatureStore(tmp_path / "a", 2, 4, torch.float32, 3 * (HEADER + 32), tmp_path)
    other = FeatureStore(tmp_path / "b", 2, 4, torch.float32, 3 * (HEADER + 32), tmp_path)
    assert [one.put(bytes([number]) * 16, torch.ones(2, 4)) for number in range(2)] == [True, True]
    assert [other.put(bytes([number]) * 16, torch.ones(2, 4)) for number in range(2)] == [True, False]


def test_without_keys_the_pixels_are_hashed(data, tmp_path):  # noqa: F811
    _, teacher = model_and_teacher()
    settings = arguments(tmp_path, teacher_cache=True)
    asked = TeacherFeatures(teacher.eval(), settings)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = asked(pixels), asked(pixels)
    assert torch.equal(first, second)
    assert (asked.computed, asked.read) == (3, 3)
    swapped = asked(pixels[[2, 0]])
    assert torch.equal(swapped, first[[2, 0]])
    assert asked.computed == 3


def test_the_teacher_follows_the_runs_precision(data, tmp_path):  # noqa: F811
    expected = {("auto", True): torch.bfloat16, ("auto", False): torch.float32, ("float32", True): torch.float32}
    for (asked, bf16), dtype in (expected | {("bfloat16", False): torch.bfloat16}).items():
        model, teacher = model_and_teacher()
        settings = arguments(tmp_path, teacher_dtype=asked, bf16=bf16)
        trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data), teacher=teacher)
        assert trainer.teacher.dtype == dtype
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        given = trainer.teacher_targets(pixels)["teacher_features"]
        assert given.dtype == dtype
        exact = model_and_teacher()[1].eval()(pixels).last_hidden_state
        assert float((given.float() - exact).detach().abs().mean() / exact.detach().abs().mean()) < 0.02
        assert {each.dtype for each in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("workers", [0, 2])
def test_raw_pixels_are_keyed_in_the_workers(data, tmp_path, workers, capsys):  # noqa: F811
    from tiny import processor

    found = []
    for cache in (False, str(tmp_path / "store"), str(tmp_path / "store")):
        model, teacher = model_and_teacher()
        settings = arguments(tmp_path, max_steps=7, teacher_cache=cache, dataloader_num_workers=workers)
        dataset = keyed(mixture(data, length=7))
        for group in dataset.groups:
            group.collator.raw = True
        images = processor().image_processor
        trainer = IntraScaleTrainer(
            model=model, args=settings, train_dataset=dataset, teacher=teacher, image_processor=images
        )
        trainer.train()
        found.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
    assert found[0] == found[1] == found[2]
    assert "14 pictures read" in capsys.readouterr().out
