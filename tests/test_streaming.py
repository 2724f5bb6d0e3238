"""Streamed micro-batches: the same items however they are drawn, equal shapes over ranks, endless, exact to resume."""

import io
import random
import tarfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from tiny import document_row, noise, picture_row, png, processor

from training.collator import GroupCollator
from training.data.mixture import image_size
from training.data.refusals import Refusals, TooManyRefused
from training.data.schema import write_shards
from training.data.settings import CurriculumArguments, DataArguments, GroupArguments, SourceArguments
from training.data.streaming import (
    NO_SHARD,
    RowStream,
    ShardedRows,
    StreamDataset,
    StreamFiller,
    StreamGroup,
    StreamLoader,
    load_state,
    merge_shapes,
)

SIZES = [(40, 8), (64, 16), (100, 8), (130, 24)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """`chunks` in four sizes and two text lengths, 10 shards; `made`, 1 shard; `pictures`, 3 shards; `mixed` tasks."""
    root = tmp_path_factory.mktemp("streams")
    chunks = [document_row(f"row {index}" + "x" * 70 * (index % 3 == 0), *SIZES[index % 4]) for index in range(60)]
    write_shards(chunks, root / "chunks", rows_per_shard=6)
    write_shards([document_row(f"made {index}", 64, 16) for index in range(12)], root / "made")
    pictures = [picture_row(f"picture {index}", seed=index) for index in range(20)]
    write_shards(pictures, root / "pictures", rows_per_shard=7)
    mixed = [document_row(f"mixed {index}", 64, 16) | {"task": ("ocr", "markdown")[index % 2]} for index in range(40)]
    write_shards(mixed, root / "mixed", rows_per_shard=10)
    return root


def settings(**given) -> DataArguments:
    return DataArguments(**({"streaming": True, "shuffle_buffer": 8, "buckets": 3, "probe": 60} | given))


def group(shards, kind="document", names=("chunks",), weights=(1.0,), data=None, positions=0, refusals=None, **given):
    sources = [SourceArguments(str(shards / name), weight) for name, weight in zip(names, weights, strict=True)]
    size = {"patches": 64} if kind == "document" else {"rows": 3}
    scale = given.pop("scale", 4 if kind == "document" else 1)
    arguments = GroupArguments(kind, scale, sources=sources, **(size | given))
    collator = GroupCollator(processor(), kind, arguments.scale, packed=arguments.packed)
    return StreamGroup(arguments, collator, data or settings(), 3, positions, refusals)


def dataset(shards, length=24, data=None, refusals=None, **given) -> StreamDataset:
    data = data or settings()
    refusals = refusals or Refusals()
    groups = [
        group(shards, data=data, refusals=refusals),
        group(shards, "natural", ("pictures",), data=data, refusals=refusals),
    ]
    return StreamDataset(groups, data, length, seed=3, refusals=refusals, **given)


def items(make, world=1, workers=0, begin=0) -> dict[int, dict]:
    """Every item of the run by its number, drawn by `world` ranks one after another."""
    found = {}
    for rank in range(world):
        loader = StreamLoader(make(rank=rank, world=world, workers=workers), num_workers=workers)
        for step, item in enumerate(loader, begin // world):
            found[step * world + rank] = item
    return found


def assert_equal(first: dict, second: dict, where="") -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].keys() == second[name].keys()
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), (where, name, key)


def stream(shards, name="chunks", number=0, streams=1, which=0, seed=1, block=8, refusals=None) -> RowStream:
    refusals = refusals or Refusals()
    source = ShardedRows(SourceArguments(str(shards / name)), refusals)
    return RowStream(source, number, which, streams, seed, block, refusals)


def texts(stream: RowStream, count: int) -> list[str]:
    return [stream.next()[1]["text"] for _ in range(count)]


# -- one source ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chunks", "made"])  # more shards than streams, and fewer
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_streams_share_the_rows_of_an_epoch_among_them(shards, name, streams):
    rows = {"chunks": 60, "made": 12}[name]
    for epoch in range(2):
        together = []
        for which in range(streams):
            one = stream(shards, name, streams=streams, which=which)
            while True:
                text = texts(one, 1)[0]
                read_in = one.starts[one.block_number][0]
                if read_in > epoch:
                    break
                if read_in == epoch:
                    together.append(text)
        assert len(together) == rows
        assert len(set(together)) == rows


def test_epochs_differ_in_order_and_seeds_too(shards):
    one = stream(shards)
    first, second = texts(one, 60), texts(one, 60)
    assert sorted(first) == sorted(second)
    assert first != second
    assert texts(stream(shards), 60) == first
    assert texts(stream(shards, seed=2), 60) != first


def test_a_stream_restored_anywhere_goes_on_alike_and_reads_again_what_waits(shards):
    generator = random.Random(0)
    for _ in range(6):
        steps = generator.randrange(1, 150)
        straight = stream(shards)
        seen = [straight.next() for _ in range(steps)]
        kept = generator.sample(seen, min(3, steps))
        state = straight.state({coordinate[1] for coordinate, _ in kept} | {coordinate[1] for coordinate, _ in seen})
        resumed = stream(shards)
        found = resumed.restore(state, [coordinate for coordinate, _ in kept])
        assert {coordinate: row["text"] for coordinate, row in kept} == {
            coordinate: row["text"] for coordinate, row in found.items()
        }
        assert texts(resumed, 70) == texts(straight, 70)


def test_a_source_that_has_changed_since_the_checkpoint_is_not_taken_for_the_same(shards, tmp_path):
    rows = [document_row(f"row {index}") for index in range(20)]
    write_shards(rows, tmp_path / "some", rows_per_shard=5)
    one = stream(tmp_path, "some", block=20)
    texts(one, 3)
    state = one.state(set())
    write_shards(rows[:9], tmp_path / "some", rows_per_shard=5)
    with pytest.raises(ValueError, match="has changed: 20 rows were read"):
        stream(tmp_path, "some", block=20).restore(state, [])


# -- items -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_items_are_the_same_over_any_processes_and_workers(shards, world, workers):
    data = settings(ranks=4, streams=4)

    def make(**given):
        return dataset(shards, 12, data, **given)

    straight, other = items(make), items(make, world, workers)
    assert sorted(straight) == sorted(other) == list(range(12))
    for number in straight:
        assert_equal(straight[number], other[number], number)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_all_ranks_have_one_shape_in_each_step(shards, world, workers):
    data = settings(streams=world * max(1, workers))
    drawn = items(lambda **given: dataset(shards, 30 * world, data, **given), world, workers)
    seen = set()
    for step in range(30):
        shapes = [
            {
                name: {key: tuple(tensor.shape) for key, tensor in batch.items()}
                for name, batch in drawn[number].items()
            }
            for number in range(step * world, (step + 1) * world)
        ]
        assert all(each == shapes[0] for each in shapes)
        seen.add(shapes[0]["document_x4"]["pixel_values"] + shapes[0]["document_x4"]["input_ids"])
    assert len(seen) > 1  # there are several


def test_ranks_see_different_rows(shards):
    drawn = items(lambda **given: dataset(shards, 12, settings(), **given), 2)
    for step in range(6):
        first, second = (drawn[2 * step + rank]["natural_x1"]["input_ids"] for rank in range(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("world", "workers", "then_world", "then_workers"), [(1, 0, 1, 0), (2, 2, 2, 2), (2, 2, 1, 4)]
)
def test_a_resumed_run_goes_on_exactly(shards, tmp_path, world, workers, then_world, then_workers):
    data = settings(ranks=2, streams=4)
    length, stop = 40, 12 + 2 * random.Random(world + workers).randrange(6)

    def make(**given):
        return dataset(shards, length, data, **given)

    straight = items(make)
    for rank in range(world):
        loader = StreamLoader(make(rank=rank, world=world, workers=workers), num_workers=workers)
        taken = iter(loader)
        for _ in range(stop // world):
            next(taken)
        loader.save(tmp_path)
        del taken

    def resumed(**given):
        again = make(**given)
        load_state(again, tmp_path)
        return again

    rest = items(resumed, then_world, then_workers, begin=stop)
    assert sorted(rest) == list(range(stop, length))
    for number in rest:
        assert_equal(rest[number], straight[number], number)


def test_resuming_over_the_border_of_a_stair_is_exact(shards, tmp_path):
    data = settings(curriculum={"steps": 8, "text": [12, 100], "levels": 4})

    def make(**given):
        return dataset(shards, 16, data, **given)

    straight = items(make)
    for stop in (2, 5, 8):
        loader = StreamLoader(make())
        taken = iter(loader)
        for _ in range(stop):
            next(taken)
        loader.save(tmp_path)
        again = make()
        load_state(again, tmp_path)
        for number, item in enumerate(StreamLoader(again), stop):
            assert_equal(item, straight[number], number)


def test_a_state_of_another_layout_is_refused_with_what_to_set(shards, tmp_path):
    loader = StreamLoader(dataset(shards, 8, settings(streams=2)))
    next(iter(loader))
    loader.save(tmp_path)
    with pytest.raises(ValueError, match=r"data\.ranks=1 and data\.streams=2, this one has 1 and 3"):
        load_state(dataset(shards, 8, settings(streams=3)), tmp_path)
    with pytest.raises(ValueError, match="not made by a streaming run"):
        load_state(dataset(shards, 8), tmp_path / "nowhere")


def test_a_state_with_a_ranks_file_missing_is_refused(shards, tmp_path):
    for rank in range(2):
        loader = StreamLoader(dataset(shards, 8, rank=rank, world=2))
        next(iter(loader))
        loader.save(tmp_path)
    (tmp_path / "data-state-1.json").unlink()
    with pytest.raises(ValueError, match=r"lacks the state of the streams \[1\]"):
        load_state(dataset(shards, 8, world=2), tmp_path)


@pytest.mark.parametrize("given", [{"world": 2, "workers": 3}, {"world": 3}])
def test_processes_that_do_not_divide_the_plan_are_refused(shards, given):
    with pytest.raises(ValueError, match=r"data.ranks=4 and data.streams=4 do not suit"):
        dataset(shards, 8, settings(ranks=4, streams=4), **given)


def test_a_run_is_longer_than_its_sources(shards):
    """12 pictures' worth of many epochs: no item lacks a row, and none waits."""
    drawn = items(lambda **given: dataset(shards, 90, settings(), **given), 3)
    assert {len(item["natural_x1"]["input_ids"]) for item in drawn.values()} == {3}
    assert len(drawn) == 90


# -- what a group draws ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_sources_come_by_their_weights(shards, weights):
    filler = StreamFiller(group(shards, names=("chunks", "made"), weights=weights), 0, 1)
    counts = Counter(filler.draw(8).coordinate[0] for _ in range(400))
    share = weights[0] / sum(weights)
    # multiples of the golden ratio: off by the logarithm of the number at most, not by its root
    assert abs(counts[0] - 400 * share) <= 4


def test_tasks_come_by_their_weights(shards):
    one = group(shards, names=("mixed", "made"), weights=(1.0, 1.0), tasks={"ocr": 1.0, "markdown": 3.0})
    filler = StreamFiller(one, 0, 1)
    drawn = [filler.draw(8) for _ in range(400)]
    counts = Counter((entry.coordinate[0], entry.row["task"]) for entry in drawn)
    # markdown is in `mixed` alone; ocr is shared by both sources
    for pool, expected in {(0, "markdown"): 300, (0, "ocr"): 50, (1, "ocr"): 50}.items():
        assert abs(counts[pool] - expected) <= 4


def test_rows_set_aside_for_another_task_are_part_of_the_state(shards, tmp_path):
    data = settings()

    def make():
        one = group(shards, names=("mixed",), data=data, tasks={"ocr": 1.0, "markdown": 3.0})
        return StreamDataset([one], data, 12, seed=3)

    straight = list(StreamLoader(make()))
    loader = StreamLoader(make())
    taken = iter(loader)
    for _ in range(5):
        next(taken)
    loader.save(tmp_path)
    again = make()
    load_state(again, tmp_path)
    for number, item in enumerate(StreamLoader(again), 5):
        assert_equal(item, straight[number], number)


def test_every_drawing_of_a_picture_has_a_seed_of_its_own(shards):
    """That the seeds are the same over ranks and workers and after a resume is part of the items' equality."""
    seeds = [
        seed for item in items(partial(dataset, shards)).values() for seed in item["natural_x1"]["row_seeds"].tolist()
    ]
    assert len(seeds) == 72  # of 20 pictures, each several times
    assert len(set(seeds)) == 72


def test_streamed_documents_at_x1_are_those_whose_letters_stay_legible(shards):
    """As in test_mixture.py: of the four sizes only 130 x 24 is shrunk below its x-height of 5 pixels."""

    def sizes(least) -> set[tuple[int, int]]:
        made = group(shards, data=settings(exchanged_x_height=least), scale=1)
        filler = StreamFiller(made, 0, 1)
        return {image_size(filler.draw(8).row["image"]["bytes"]) for _ in range(60)}

    assert sizes(0.0) == set(SIZES)
    assert sizes(5.0) == set(SIZES[:3])


def test_what_waits_is_bounded_and_few_rows_are_lost(shards):
    one = group(shards, data=settings(buffered=4))
    filler = StreamFiller(one, 0, 1)
    sequence = one.levels[8]
    for cycle in range(300):
        shape, rows = filler.fill(sequence, sequence.at(0, cycle), 8)
        assert len(rows) == one.measure.rows_in(shape)
        assert sum(entry.shape[0] * entry.shape[1] for entry in filler.waiting) <= 4 * 64
    assert filler.counts["dropped"] < 0.05 * filler.counts["rows"]
    assert filler.counts["repeated"] < 0.05 * filler.counts["rows"]


def test_shapes_come_by_their_shares(shards):
    sequence = group(shards).levels[8]
    for slot in (0, 1):
        counts = Counter(sequence.at(slot, cycle) for cycle in range(500))
        for number, share in enumerate(sequence.shares):
            assert abs(counts[number] - 500 * share) <= 5


def test_a_stream_without_a_size_that_the_probe_saw_never_stops(tmp_path):
    """The shards of one stream hold large rows alone, of the other small ones: both give every shape."""
    small = [document_row(f"s {index}", 40, 8) for index in range(12)]
    large = [document_row(f"l {index}", 120, 40) for index in range(12)]
    write_shards(small + large, tmp_path / "halves", rows_per_shard=12)
    data = settings(streams=2, ranks=2)
    for rank in range(2):
        one = group(tmp_path, names=("halves",), data=data, patches=96)
        given = list(StreamLoader(StreamDataset([one], data, 40, rank=rank, world=2)))
        assert len(given) == 20


def test_merged_shapes_hold_every_row_and_cost_least():
    counts = {(1, 16, 64): 10.0, (2, 16, 64): 10.0, (8, 32, 64): 1.0, (8, 32, 128): 1.0}
    # (8, 32, 64) with (8, 32, 128) adds 64 tokens to one row; any other pair adds more
    assert merge_shapes(counts, 3) == {(1, 16, 64): 10.0, (2, 16, 64): 10.0, (8, 32, 128): 2.0}
    # then the two strips: 10 rows get 16 patches more
    assert merge_shapes(counts, 2) == {(2, 16, 64): 20.0, (8, 32, 128): 2.0}


def test_packs_keep_within_their_patches(shards):
    one = group(shards, packed=True, patches=80)
    given = list(StreamLoader(StreamDataset([one], settings(), 10)))
    grids = [item["document_x4"]["image_grid_hw"] for item in given]
    assert all(int(each.prod(dim=1).sum()) <= 80 for each in grids)
    assert np.mean([int(each.prod(dim=1).sum()) for each in grids]) > 40


# -- the curriculum --------------------------------------------------------------------------------


def test_texts_grow_by_the_schedule_on_every_rank(shards):
    data = settings(curriculum={"steps": 6, "text": [20, 90], "levels": 3})
    drawn = items(lambda **given: dataset(shards, 40, data, batches_per_step=4, **given), 2)
    # 2 ranks, 2 micro-batches a step: items 0-3 are step 0. Two steps a stair: 20, 55, 90 tokens, then no limit.
    longest = {number: int((item["document_x4"]["labels"] != -100).sum(dim=1).max()) for number, item in drawn.items()}
    for number, tokens in longest.items():
        level = min(3, number // 4 * 3 // 6)
        assert tokens + 1 <= (20, 55, 90, 1000)[level]  # the prompt has no label
    assert max(longest.values()) > 55


def test_a_curriculum_that_leaves_nothing_is_refused(shards):
    data = settings(curriculum={"steps": 6, "text": [3, 90]})
    with pytest.raises(ValueError, match="left by the curriculum's first limits"):
        group(shards, data=data)


def test_stairs_by_hand():
    stairs = CurriculumArguments(steps=100, text=[50, 150], area=[1000, 4000], levels=3)
    assert [stairs.level(step) for step in (0, 33, 34, 66, 67, 99, 100, 5000)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [stairs.limits(level) for level in range(3)] == [(50, 1000), (100, 2500), (150, 4000)]
    assert stairs.limits(3) == (float("inf"), float("inf"))
    assert CurriculumArguments().level(0) == CurriculumArguments().levels


# -- bad input -------------------------------------------------------------------------------------


def broken(rows: list[dict], which, how) -> list[dict]:
    for index in which:
        rows[index] = rows[index] | {"image": {"bytes": how(rows[index]["image"]["bytes"]), "path": None}}
    return rows


@pytest.mark.parametrize("how", [lambda png: png[: len(png) // 2], lambda png: b"no image", lambda png: b"GIF89a"])
def test_corrupt_images_are_skipped_and_counted(tmp_path, how):
    rows = [picture_row(f"picture {index}", seed=index) for index in range(80)]
    write_shards(broken(rows, (3, 17), how), tmp_path / "pictures", rows_per_shard=10)
    refusals = Refusals()
    one = group(tmp_path, "natural", ("pictures",), refusals=refusals)
    loader = StreamLoader(StreamDataset([one], settings(), 90, refusals=refusals))
    assert {len(item["natural_x1"]["input_ids"]) for item in loader} == {3}
    counts = refusals.as_dict()[str(tmp_path / "pictures")]
    assert counts["refused"] >= 2
    assert "0x" not in str(counts)  # no addresses of objects
    assert loader.counts()["refused"] == counts["refused"]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images_stop_the_run_with_one_line(tmp_path, workers):
    rows = [picture_row(f"picture {index}", seed=index) for index in range(40)]
    write_shards(broken(rows, range(0, 40, 4), lambda png: png[: len(png) // 2]), tmp_path / "pictures")
    refusals = Refusals()
    one = group(tmp_path, "natural", ("pictures",), data=settings(probe=4), refusals=refusals)
    dataset = StreamDataset([one], settings(), 2000, workers=workers, refusals=refusals)
    with pytest.raises(ValueError, match="rows were refused, more than the 5%") as error:
        list(StreamLoader(dataset, num_workers=workers))
    assert "\n" not in str(error.value)


def test_a_shard_that_vanishes_or_breaks_is_skipped(shards, tmp_path):
    write_shards([document_row(f"row {index}") for index in range(50)], tmp_path / "some", rows_per_shard=10)
    refusals = Refusals()
    one = stream(tmp_path, "some", refusals=refusals)
    (tmp_path / "some" / "part-00002.parquet").unlink()
    (tmp_path / "some" / "part-00003.parquet").write_bytes(b"PAR1 and no more")
    seen = texts(one, 30)
    assert sorted(seen) == sorted(f"row {index}" for index in range(50) if not 20 <= index < 40)
    texts(one, 1)  # into the next epoch
    assert refusals.as_dict()[str(tmp_path / "some")]["reasons"][NO_SHARD]["count"] >= 2


def test_when_every_shard_is_gone_the_run_stops_and_says_so(tmp_path):
    write_shards([document_row(f"row {index}") for index in range(20)], tmp_path / "some", rows_per_shard=10)
    one = stream(tmp_path, "some", block=5)
    for path in (tmp_path / "some").glob("*.parquet"):
        path.unlink()
    with pytest.raises(ValueError, match="has no row that can be read"):
        texts(one, 50)


def test_rows_longer_than_the_decoder_are_left_out_and_counted(shards):
    refusals = Refusals(max_share=1.0)
    # 48 patches (3 x 16) and 32 text tokens fit; the longer texts, a third, have 96 tokens and do not
    one = group(shards, positions=96, refusals=refusals)
    assert all(shape[0] * shape[1] + shape[2] <= 96 for shape in one.levels[8].shapes)
    reasons = refusals.as_dict()[str(shards / "chunks")]["reasons"]
    assert list(reasons) == ["longer than the decoder's positions"]


def test_empty_and_missing_sources_are_refused_in_one_line(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="No parquet shards in") as error:
        group(tmp_path, names=("nothing",))
    assert "\n" not in str(error.value)
    write_shards([document_row("a")], tmp_path / "tiny")
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "tiny" / "part-00000.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "tiny" / "part-00000.parquet")
    with pytest.raises(ValueError, match="has no row that may come") as error:
        group(tmp_path, names=("tiny",))
    assert "\n" not in str(error.value)


def test_one_row_is_enough(tmp_path):
    write_shards([document_row("alone")], tmp_path / "one")
    data = settings(streams=4)
    one = group(tmp_path, names=("one",), data=data, patches=16)
    assert len(list(StreamLoader(StreamDataset([one], data, 8, workers=0)))) == 8


def test_too_many_refused_is_not_taken_for_a_broken_shard(tmp_path):
    class Source:
        name, num_shards = "some", 1

        def read(self, shard, start=0):
            raise TooManyRefused("some: 9 of 10 rows were refused")
            yield

    with pytest.raises(TooManyRefused):
        RowStream(Source(), 0, 0, 1, 1, 4, Refusals()).next()


# -- mapped sources --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Captioned pictures as WebDataset tars: four of six, one without its text, one no image."""
    root = tmp_path_factory.mktemp("tars")
    for shard in range(4):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for index in range(6 * shard, 6 * shard + 6):
                image = png(noise(20, 20, index)) if index != 3 else b"no image"
                for suffix, content in (("png", image), ("txt", f"picture {index}".encode() if index != 8 else b" ")):
                    member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


def mapped(tars) -> SourceArguments:
    return SourceArguments(dataset={"path": str(tars), "layout": "caption-pairs", "license": "CC0-1.0"})


@pytest.mark.parametrize("streams", [1, 2, 6])
def test_tars_stream_shard_by_shard(tars, streams):
    refusals, together = Refusals(), []
    for which in range(streams):
        source = ShardedRows(mapped(tars), refusals)
        assert source.num_shards == 4
        one = RowStream(source, 0, which, streams, 1, 8, refusals)
        text = texts(one, 1)[0]
        while one.starts[one.block_number][0] == 0:
            together.append(text)
            text = texts(one, 1)[0]
    assert sorted(together) == sorted(f"picture {index}" for index in range(24) if index not in (3, 8))
    assert len(refusals.as_dict()[str(tars)]["reasons"]) == 2


def test_mapped_rows_make_the_same_items_resumed(tars, tmp_path):
    def make():
        arguments = GroupArguments("natural", 1, rows=3, sources=[mapped(tars)])
        collator = GroupCollator(processor(), "natural", 1)
        data = settings()
        return StreamDataset([StreamGroup(arguments, collator, data, 3)], data, 20, refusals=Refusals(max_share=1.0))

    straight = list(StreamLoader(make()))
    loader = StreamLoader(make())
    taken = iter(loader)
    for _ in range(11):
        next(taken)
    loader.save(tmp_path)
    again = make()
    load_state(again, tmp_path)
    for number, item in enumerate(StreamLoader(again), 11):
        assert_equal(item, straight[number], number)


def test_mapped_rows_are_indexed_for_the_map_style_plan_too(tars):
    from training.data.mixture import RowSource

    refusals = Refusals()
    source = RowSource(mapped(tars), refusals)
    assert sorted(source.column("text")) == sorted(f"picture {index}" for index in range(24) if index not in (3, 8))
    assert {tuple(size) for size in source.sizes} == {(20, 20)}
    assert refusals.refused == 2


def test_a_source_is_named_in_one_way():
    for given in ({}, {"path": "x", "dataset": {"path": "y"}}):
        with pytest.raises(ValueError, match="needs `path` or `dataset`"):
            SourceArguments(**given)
