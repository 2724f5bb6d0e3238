"""Ranks and accumulation over one map-style plan: one shape a step, every row as often as planned, exact to resume."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from test_mixture import plan, shards  # noqa: F401  the fixture
from tiny import document_row, picture_row
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from two_processes import run_two_processes

from training.checkpoints import damage
from training.data.mixture import TOO_LONG, UNREADABLE, MixtureDataset
from training.data.refusals import Refusals, TooManyRefused
from training.data.schema import write_shards
from training.data.settings import DataArguments, SourceArguments, expand_groups, pool_weights

ROOT = Path(__file__).resolve().parents[1]


def shares_of(length: int, world: int) -> list[list[int]]:
    """The items that each rank draws, by accelerate's own sharding of the trainer's sampler."""
    sampler = BatchSampler(SequentialSampler(range(length)), batch_size=1, drop_last=False)
    return [[item for (item,) in BatchSamplerShard(sampler, world, rank)] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_all_ranks_have_one_shape_in_each_step(shards, world, accumulation):  # noqa: F811
    groups = [
        plan(shards, ranks=world, patches=48),
        plan(shards, kind="natural", names=("pictures", "made"), weights=(1.0, 1.0), ranks=world),
    ]
    length = 10 * accumulation * world
    drawn = shares_of(length, world)
    assert sorted(item for items in drawn for item in items) == list(range(length))
    data = MixtureDataset(groups, length)
    for micro_batches in zip(*drawn, strict=True):
        shapes = [
            {name: {key: tuple(tensor.shape) for key, tensor in batch.items()} for name, batch in data[item].items()}
            for item in micro_batches
        ]
        assert all(each == shapes[0] for each in shapes)


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_draw_every_row_once_an_epoch_too(shards, world):  # noqa: F811
    group = plan(shards, kind="natural", names=("pictures",), ranks=world)  # 20 pictures, 5 a batch, 4 batches a rank
    for window in range(2):
        rows = [row for step in range(4 * world) for row in group.batch(4 * world * window + step)[1]]
        assert set(Counter(rows).values()) == {world}  # 20 x world rows are so many epochs


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_plan_for_four_ranks_is_the_same_over_fewer(shards, world):  # noqa: F811
    """Four micro-batches a step, however many devices share them: the same rows in each optimiser step."""
    group = plan(shards, ranks=4)
    drawn = shares_of(32, world)
    steps = [
        {item for rank in drawn for item in rank[step * 4 // world : (step + 1) * 4 // world]} for step in range(8)
    ]
    assert steps == [set(range(4 * step, 4 * step + 4)) for step in range(8)]
    assert all(len({group.batch(item)[0] for item in step}) == 1 for step in steps)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_run_resumes_exactly_at_any_step(shards, workers):  # noqa: F811
    from accelerate import skip_first_batches

    data = MixtureDataset([plan(shards), plan(shards, kind="natural", names=("pictures",))], 20)
    again = MixtureDataset([plan(shards), plan(shards, kind="natural", names=("pictures",))], 20)
    stop = random.Random(workers).randrange(3, 17)
    loader = DataLoader(again, batch_size=1, num_workers=workers, collate_fn=lambda items: items[0])
    for number, item in enumerate(skip_first_batches(loader, stop), stop):
        for name, batch in data[number].items():
            assert all(torch.equal(batch[key], item[name][key]) for key in batch)
    assert number == 19


# -- shares ----------------------------------------------------------------------------------------


def test_tasks_come_by_their_weights_whatever_the_sources_hold(tmp_path):
    tasks = ["ocr"] * 30 + ["markdown"] * 10
    write_shards([document_row(f"a {n}", 64, 16) | {"task": task} for n, task in enumerate(tasks)], tmp_path / "a")
    write_shards([document_row(f"b {n}", 64, 16) for n in range(20)], tmp_path / "b")
    group = plan(tmp_path, names=("a", "b"), weights=(1.0, 1.0), window=10, rows=4, tasks={"ocr": 1, "markdown": 3})
    drawn = [row for step in range(100) for row in group.batch(step)[1]]
    counts = Counter((source, group._tasks[source][position]) for source, position in drawn)
    # of 400 rows three quarters are Markdown, all from `a`; the rest is split evenly; each window of 40 rounds by one
    for pool, expected in {(0, "markdown"): 300, (0, "ocr"): 50, (1, "ocr"): 50}.items():
        assert abs(counts[pool] - expected) <= 10 * 0.5
    assert max(Counter(row for row in drawn if row[0] == 0 and row[1] >= 30).values()) == 30  # 300 draws of 10 rows


def test_shares_of_sources_and_tasks_by_hand():
    present = np.array([[True, True], [True, False], [False, False]])
    shares = pool_weights([1.0, 3.0, 5.0], {"ocr": 1.0, "markdown": 1.0}, present)
    assert shares == pytest.approx(np.array([[0.125, 0.5], [0.375, 0.0], [0.0, 0.0]]))
    assert pool_weights([1.0, 3.0], {}, np.ones((2, 1), bool)) == pytest.approx(np.array([[0.25], [0.75]]))
    # a task that nobody has leaves its share to the others
    missing = pool_weights([1.0], {"ocr": 1.0, "markdown": 1.0}, np.array([[True, False]]))
    assert missing == pytest.approx(np.array([[1.0, 0.0]]))


def data_arguments(**given) -> DataArguments:
    sources = [{"path": "pages", "kind": "document"}, {"path": "pictures", "kind": "natural"}]
    return DataArguments(**({"sources": sources, "patches": 1000} | given))


def test_stage_one_has_pictures_at_x1_and_documents_at_x4():
    groups = expand_groups(data_arguments(kinds={"natural": 1, "document": 4}), "intra_scale", {1: 10, 4: 40})
    assert [(each.name, each.rows, each.patches) for each in groups] == [
        ("natural_x1", 20, 0),
        ("document_x4", 0, 800),
    ]


def test_stage_two_exchanges_the_share_of_the_rows_that_was_asked_for():
    data = data_arguments(exchanged=0.25, kinds={"natural": 1, "document": 1})
    groups = {each.name: each for each in expand_groups(data, "inter_scale", {1: 10, 4: 40})}
    # pictures: n rows with 3/4 of 10 and 1/4 of 40 patches, 17.5 each: 500 / 17.5 = 28.6 rows, 21.4 and 7.1
    assert (groups["natural_x1"].rows, groups["natural_x4"].rows) == (21, 7)
    # documents: 3/4 of 40 and 1/4 of 10, 32.5 each: 15.4 rows, 461.5 and 38.5 patches
    assert (groups["document_x4"].patches, groups["document_x1"].patches) == (462, 38)


def test_captions_are_of_pictures_and_the_other_tasks_of_documents():
    data = data_arguments(tasks={"ocr": 2, "markdown": 1, "caption": 5})
    groups = {each.name: each.tasks for each in expand_groups(data, "intra_scale", {1: 10, 4: 40})}
    assert groups == {"natural_x1": {"caption": 5}, "document_x4": {"ocr": 2, "markdown": 1}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kinds": {"natural": 1, "documents": 1}}, "data.kinds knows natural, document, not 'documents'"),
        ({"kinds": {"natural": -1}}, "data.kinds: weights must not be negative"),
        ({"tasks": {"ocr": 0}}, "data.tasks: weights must not be negative, and one must be above 0"),
        ({"exchanged": 1.0}, "data.exchanged must lie between 0 and 1"),
        ({"patches": 0}, "needs data.patches"),
        ({"sources": [{"path": "x"}]}, "'x' needs kind: natural or document"),
        ({"buckets": 0}, "data.buckets must be 1 or more"),
        ({"curriculum": {"steps": 5}}, "The curriculum limits nothing"),
        ({"curriculum": {"steps": 5, "text": [9, 3]}}, r"curriculum.text must be \[first, last\]"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(given, words):
    with pytest.raises(ValueError, match=words) as error:
        data_arguments(**given)
    assert "\n" not in str(error.value)


def test_a_kind_without_a_source_is_refused():
    data = DataArguments([SourceArguments("pages", kind="document")], 100, kinds={"natural": 1, "document": 1})
    with pytest.raises(ValueError, match="natural needs a source and a share"):
        expand_groups(data, "intra_scale", {1: 1, 4: 4})


# -- curriculum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_texts_grow_by_the_schedule(tmp_path, world):
    write_shards([document_row("x" * (n + 1), 64, 16) for n in range(60)], tmp_path / "texts")
    from training.data.settings import CurriculumArguments

    stairs = CurriculumArguments(steps=24, text=[20, 50], levels=4)
    group = plan(
        tmp_path, names=("texts",), window=2, rows=4, ranks=world, curriculum=stairs, batches_per_step=2 * world
    )
    # 2 micro-batches a step and rank, a window is one step; six steps a stair: 20, 30, 40, 50 tokens, then all
    for step in range(40):
        limit = (20, 30, 40, 50, 62)[min(4, step // 6)]
        rows = [row for each in range(2 * world) for row in group.batch(2 * world * step + each)[1]]
        assert max(group.tokens[0][position] for _, position in rows) <= limit
    later = Counter(row for step in range(48 * world, 78 * world) for row in group.batch(step)[1])
    assert len(later) == 60  # 120 rows a rank from step 24 on: so many whole epochs of all
    assert set(later.values()) == {2 * world}


def test_a_curriculum_that_leaves_nothing_is_refused(shards):  # noqa: F811
    from training.data.settings import CurriculumArguments

    with pytest.raises(ValueError, match=r"no row of .*chunks is left \(text of at most 3 tokens"):
        plan(shards, curriculum=CurriculumArguments(steps=5, text=[3, 9]))


# -- bad rows --------------------------------------------------------------------------------------


def test_corrupt_images_are_left_out_counted_and_never_the_end(tmp_path):
    rows = [picture_row(f"picture {index}", seed=index) for index in range(100)]
    whole = rows[7]["image"]["bytes"]
    rows[7] = rows[7] | {"image": {"bytes": whole[: len(whole) // 2], "path": None}}  # its header can be read
    rows[9] = rows[9] | {"image": {"bytes": b"no image", "path": None}}
    write_shards(rows, tmp_path / "pictures")
    refusals = Refusals()
    group = plan(tmp_path, kind="natural", names=("pictures",), refusals=refusals)
    assert len(group.sources[0]) == 99
    for step in range(20):
        assert len(group[step]["pixel_values"]) == 5
    counts = refusals.as_dict()[str(tmp_path / "pictures")]
    assert counts["reasons"][UNREADABLE]["count"] == 2  # each once, however often it was drawn
    assert counts["accepted"] == 98


@pytest.mark.parametrize("workers", [0, 2])
def test_what_dataloader_workers_find_broken_is_counted_by_the_process_that_trains(tmp_path, workers):
    rows = [picture_row(f"picture {index}", seed=index) for index in range(100)]
    for index in (7, 31):
        whole = rows[index]["image"]["bytes"]
        rows[index] = rows[index] | {"image": {"bytes": whole[: len(whole) // 2], "path": None}}
    write_shards(rows, tmp_path / "pictures")
    data = MixtureDataset([plan(tmp_path, kind="natural", names=("pictures",), refusals=Refusals())], 60)
    assert data.all_refusals().refused == 0
    for _ in DataLoader(data, batch_size=None, num_workers=workers):
        pass
    for _ in range(2):
        counts = data.all_refusals().as_dict()[str(tmp_path / "pictures")]
        assert (counts["accepted"], counts["refused"]) == (98, 2)
    assert {each.split(":")[0] for each in counts["reasons"][UNREADABLE]["examples"]} == {"row 7", "row 31"}


def test_a_source_of_which_too_much_turns_out_broken_stops_the_run(tmp_path):
    rows = [picture_row(f"picture {index}", seed=index) for index in range(220)]
    for index in range(0, 220, 10):
        whole = rows[index]["image"]["bytes"]
        rows[index] = rows[index] | {"image": {"bytes": whole[: len(whole) // 2], "path": None}}
    write_shards(rows, tmp_path / "pictures")
    data = MixtureDataset([plan(tmp_path, kind="natural", names=("pictures",), refusals=Refusals())], 60)
    with pytest.raises(TooManyRefused, match="of 220 rows were refused"):
        for _ in DataLoader(data, batch_size=None, num_workers=2):
            pass


def test_rows_longer_than_the_decoder_are_left_out_and_counted(shards):  # noqa: F811
    refusals = Refusals()
    group = plan(shards, max_positions=130, refusals=refusals)
    # one text of 100 characters is padded to 128 tokens beside 16 patches
    assert refusals.as_dict()[str(shards / "chunks")]["reasons"][TOO_LONG]["count"] == 1
    assert all((0, 0) not in group.batch(step)[1] for step in range(40))


# -- processes -------------------------------------------------------------------------------------


def test_two_processes_train_on_one_shape_a_step_and_resume(tmp_path):
    """gloo on loopback; each process writes down the shapes and rows of its micro-batches, map-style and streamed."""
    write_shards([document_row(f"row {n}", 40 + 8 * (n % 4) * n, 16) for n in range(30)], tmp_path / "document", 8)
    write_shards([picture_row(f"picture {n}", seed=n) for n in range(12)], tmp_path / "natural", 4)
    run_two_processes("rank_process.py", tmp_path)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    for way in ("map", "stream"):
        first, second = (each[way] for each in seen)
        assert len(first["straight"]) == len(second["straight"]) == 8  # 4 steps of 2 micro-batches
        shapes = [[shape for shape, _ in each["straight"]] for each in (first, second)]
        assert shapes[0] == shapes[1]
        assert [rows for _, rows in first["straight"]] != [rows for _, rows in second["straight"]]
        for each in (first, second):
            assert each["resumed"] == each["straight"][4:]
        checkpoint = tmp_path / way / "checkpoint-2"
        assert damage(checkpoint) is None
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["world_size"] == 2
        for rank in range(2):
            assert "ema.safetensors" in manifest["files"]
            files = {f"rng_state_{rank}.pth", f"log-state-{rank}.json", f"sampler_state_{rank}.safetensors"}
            assert files | ({f"data-state-{rank}.json"} if way == "stream" else set()) <= set(manifest["files"])
    # the moving average: one on both ranks, and after going on the one that it would have been
    straight_map, resumed_map, straight_stream, resumed_stream = seen[0]["averages"]
    assert seen[0]["averages"] == seen[1]["averages"]
    assert (straight_map, straight_stream) == (resumed_map, resumed_stream)
    assert straight_map != straight_stream
    # a rank that cannot write, and a loss that is no number on one rank alone, are known to both
    for each in seen:
        assert "checkpoint-2 could not be written" in each["full"]
        assert each["full"] == seen[0]["full"]
        assert each["lost"].startswith("Step 1: the loss is")
    assert not [each.name for each in (tmp_path / "full").iterdir() if "checkpoint" in each.name]
    for rank in range(2):
        assert (tmp_path / "lost" / "offending" / "step-1" / f"rank-{rank}" / "facts.json").is_file()
