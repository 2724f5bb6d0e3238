"""Which rows make which micro-batch: drawn from a seed, by weight, in few shapes, the same however one gets there."""

from collections import Counter

import numpy as np
import pytest
import torch
from tiny import document_row, picture_row, processor

from training.collator import GroupCollator
from training.data.mixture import (
    GroupArguments,
    GroupPlan,
    MixtureDataset,
    RowSource,
    SourceArguments,
    _endless_permutation,
    image_size,
    rounded_grid,
)
from training.data.refusals import Refusals
from training.data.schema import write_shards

PLAN = ("ranks", "curriculum", "batches_per_step", "max_positions", "refusals")  # settings of a GroupPlan


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Folders of rows: `chunks` in four sizes, `made` in one, `pictures`."""
    root = tmp_path_factory.mktemp("data")
    sizes = [(40, 8), (64, 16), (100, 8), (130, 24)]
    chunks = [document_row(f"row {index}", *sizes[index % 4], seed=index) for index in range(40)]
    chunks[0]["text"] = "x" * 100
    chunks[0]["char_boxes"] = []
    write_shards(chunks, root / "chunks", rows_per_shard=16)  # several shards
    write_shards([document_row(f"made {index}", 64, 16, seed=100 + index) for index in range(12)], root / "made")
    write_shards([picture_row(f"picture {index}", seed=index) for index in range(20)], root / "pictures")
    return root


def plan(shards, kind="document", seed=3, window=4, names=("chunks",), weights=(1.0,), **given) -> GroupPlan:
    more = {name: given.pop(name) for name in PLAN if name in given}
    sources = [SourceArguments(str(shards / name), weight) for name, weight in zip(names, weights, strict=True)]
    settings = {"patches": 64} if kind == "document" else {"rows": 5}
    given = given if given.keys() & {"rows", "patches"} else settings | given
    arguments = GroupArguments(kind, 4 if kind == "document" else 1, sources=sources, **given)
    return GroupPlan(arguments, GroupCollator(processor(), kind, arguments.scale), seed, window, **more)


def rows_of(group: GroupPlan, steps) -> list[tuple[int, int]]:
    return [row for step in steps for row in group.batch(step)[1]]


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# -- sequence --------------------------------------------------------------------------------------


def test_same_seed_same_batches(shards):
    first, second, other = plan(shards), plan(shards), plan(shards, seed=4)
    assert [first.batch(step) for step in range(12)] == [second.batch(step) for step in range(12)]
    assert [first.batch(step) for step in range(12)] != [other.batch(step) for step in range(12)]
    assert equal(first[5], second[5])


def test_a_resumed_run_gets_the_batches_it_would_have_had(shards):
    """Item i depends on i alone, not on what was looked at before."""
    groups = [plan(shards), plan(shards, kind="natural", names=("pictures",))]
    straight = MixtureDataset(groups, 11)
    items = [straight[step] for step in range(11)]
    resumed = MixtureDataset([plan(shards), plan(shards, kind="natural", names=("pictures",))], 11)
    for step in (9, 2, 10, 3, 4):  # over the borders of the windows of 4, back and forth
        assert resumed[step].keys() == {"document_x4", "natural_x1"}
        for name, batch in resumed[step].items():
            assert equal(batch, items[step][name]), (step, name)


def test_every_row_comes_once_before_any_comes_again(shards):
    group = plan(shards, kind="natural", names=("pictures",))  # 20 pictures, 5 in a batch, windows of 4 batches
    for epoch in range(3):
        rows = rows_of(group, range(4 * epoch, 4 * epoch + 4))
        assert sorted(position for _, position in rows) == list(range(20))
    assert rows_of(group, range(4)) != rows_of(group, range(4, 8))


def test_endless_permutations_by_hand():
    drawn = _endless_permutation(5, seed=1, begin=0, count=15)
    for epoch in range(3):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert _endless_permutation(5, 1, 3, 9).tolist() == drawn[3:12].tolist()  # any stretch of the same sequence
    assert _endless_permutation(5, 1, 4, 0).tolist() == []


def test_windows_take_up_where_the_one_before_left_off(shards):
    """Over the border of two windows no row of the sequence is drawn twice."""
    group = plan(shards, kind="natural", names=("pictures",), window=3)  # 15 rows a window, 20 rows an epoch
    rows = [position for _, position in rows_of(group, range(12))]  # four windows are three epochs
    assert set(Counter(rows).values()) == {3}


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (1.0, 0.0)])
def test_weights_are_the_shares_of_the_rows(shards, weights):
    group = plan(shards, kind="natural", names=("pictures", "made"), weights=weights, window=8)  # 40 rows a window
    counts = Counter(source for source, _ in rows_of(group, range(32)))
    first = weights[0] / sum(weights)
    assert counts[0] == pytest.approx(160 * first, abs=1)
    assert counts[1] == pytest.approx(160 * (1 - first), abs=1)


def test_weights_hold_for_documents_of_different_sizes_too(shards):
    group = plan(shards, names=("chunks", "made"), weights=(0.5, 0.5), window=64, patches=48)
    counts = Counter(source for source, _ in rows_of(group, range(64 * 4)))
    assert counts[0] / sum(counts.values()) == pytest.approx(0.5, abs=0.07)


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "expected"),
    # columns of one row to multiples of 8, of more to multiples of 16; rows as they are up to 6, to even numbers up to
    # 12, then to multiples of 4
    [
        ((1, 1), (1, 8)),
        ((1, 17), (1, 24)),
        ((2, 17), (2, 32)),
        ((6, 16), (6, 16)),
        ((7, 17), (8, 32)),
        ((12, 33), (12, 48)),
        ((13, 5), (16, 16)),
    ],
)
def test_grids_are_rounded_to_few(grid, expected):
    assert rounded_grid(*grid) == expected


def test_the_rows_of_a_batch_fit_its_shape(shards):
    group = plan(shards)
    seen = set()
    for step in range(16):
        (rows, cols, text), members = group.batch(step)
        shapes = np.array([group.shapes[source][position] for source, position in members])
        assert (shapes[:, 0] == rows).all()  # lines of one height together
        assert tuple(shapes.max(axis=0)) == (rows, cols, text)  # and no larger than its largest
        assert len(members) == max(1, 64 // (rows * cols))
        batch = group[step]
        assert batch["pixel_values"].shape == (len(members), 3, rows * 8, cols * 8)
        assert batch["input_ids"].shape == (len(members), rows * cols + text)
        seen.add((rows, cols, text))
    # 40 x 8 pixels: 1 row of 8 columns; 64 x 16: 2 rows of 16; 100 x 8: 1 row of 16; 130 x 24 shrinks to 128: 3 of 16
    assert {shape[:2] for shape in seen} <= {(1, 8), (2, 16), (1, 16), (3, 16)}
    assert {shape[0] for shape in seen} == {1, 2, 3}
    assert {shape[2] for shape in seen} <= {32, 128}  # few bytes, and once 100 of them, with a prompt and an end


def test_rows_that_fill_no_batch_go_with_larger_ones(tmp_path):
    """Drawn again until they fill one, a row alone would be a whole micro-batch: a step in a direction of its own."""
    widths = [40] * 37 + [100] * 3  # pixels: 8 to a batch of 1 x 8 patches, 4 to one of 1 x 16
    write_shards([document_row(f"row {i}", width, 8, seed=i) for i, width in enumerate(widths)], tmp_path / "lines")
    group = plan(tmp_path, names=("lines",), window=6)
    batches = [group.batch(step) for step in range(6)]  # of the first window
    for shape, members in batches:
        assert len(set(members)) >= (0.5 if shape[1] == 8 else 0.75) * len(members)
    mixed = [shape for shape, members in batches if len({group.shapes[s][p][1] for s, p in members}) > 1]
    assert mixed in ([], [(1, 16, 32)])  # no more than one of both lengths


def test_long_texts_lengthen_one_batch_of_short_ones_at_most(shards):
    group = plan(shards)
    for window in range(4):
        lengthened = 0
        for step in range(4 * window, 4 * window + 4):
            (_, _, text), members = group.batch(step)
            long = [group.sources[source].lengths[position] > 30 for source, position in members]
            assert any(long) == (text > 32)
            lengthened += any(long) and not all(long)
        assert lengthened <= 1


def test_batches_hold_as_many_patches_as_asked(shards):
    for step in range(8):
        (rows, cols, _), members = plan(shards, patches=96).batch(step)
        assert len(members) * rows * cols <= 96
        assert (len(members) + 1) * rows * cols > 96


def test_sizes_are_read_off_the_header():
    row = document_row("a", 37, 11)
    assert image_size(row["image"]["bytes"]) == (37, 11)


# -- sources ---------------------------------------------------------------------------------------


def test_rows_can_be_limited_by_area_and_length(shards):
    small = RowSource(SourceArguments(str(shards / "chunks"), max_area=64 * 16))
    assert {tuple(size) for size in small.sizes} == {(40, 8), (64, 16), (100, 8)}
    assert len(small) == 30
    short = RowSource(SourceArguments(str(shards / "chunks"), max_characters=50))
    assert len(short) == 39
    for position in range(len(small)):
        assert small[position]["text"].startswith(("row", "xxx"))
        assert image_size(small[position]["image"]["bytes"]) == tuple(small.sizes[position])


def test_limits_that_leave_nothing_are_refused(shards):
    with pytest.raises(ValueError, match="No row"):
        RowSource(SourceArguments(str(shards / "chunks"), max_area=10))


def test_missing_data_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"No parquet shards in 'no-such-data'.*unit data"):
        RowSource(SourceArguments("no-such-data"))


def test_missing_columns_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b""], "text": ["a"]}), tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"lacks the columns \['kind', 'task'\]"):
        RowSource(SourceArguments(str(tmp_path)))


def test_a_broken_shard_and_a_missing_text_cost_themselves_alone(tmp_path):
    import pyarrow.parquet as pq

    write_shards([document_row(f"row {index}", 40, 8) for index in range(6)], tmp_path / "set", rows_per_shard=2)
    (tmp_path / "set" / "part-00001.parquet").write_bytes(b"PAR1")
    last = pq.read_table(tmp_path / "set" / "part-00002.parquet")
    place = last.column_names.index("text")
    pq.write_table(last.set_column(place, "text", [[None, "row 5"]]), tmp_path / "set" / "part-00002.parquet")
    refusals = Refusals()
    source = RowSource(SourceArguments(str(tmp_path / "set")), refusals)
    assert [source[position]["text"] for position in range(len(source))] == ["row 0", "row 1", "row 5"]
    counts = refusals.as_dict()[str(tmp_path / "set")]
    assert {reason: each["count"] for reason, each in counts["reasons"].items()} == {
        "shard: cannot be read": 1,
        "text: missing": 1,
    }
    assert counts["accepted"] == 3


def test_columns_of_a_wrong_type_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = document_row("a", 40, 8)
    numbers = {"image": [row["image"]], "text": [1], "task": ["ocr"], "kind": ["document"]}
    pq.write_table(pa.table(numbers), tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"text must be strings"):
        RowSource(SourceArguments(str(tmp_path)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": 2, "patches": 64}, "either rows or patches"),
        ({"rows": 0, "patches": 0}, "either rows or patches"),
    ],
)
def test_a_group_is_sized_one_way(shards, given, words):
    with pytest.raises(ValueError, match=words):
        plan(shards, **given)


@pytest.mark.parametrize(("names", "weights"), [((), ()), (("chunks",), (0.0,)), (("chunks", "made"), (2.0, -1.0))])
def test_weights_must_make_sense(shards, names, weights):
    with pytest.raises(ValueError, match="at least one source, weights must not be negative"):
        plan(shards, names=names, weights=weights)


def test_each_kind_and_scale_is_given_once(shards):
    with pytest.raises(ValueError, match="may be given once"):
        MixtureDataset([plan(shards), plan(shards)], 3)


def test_items_end_where_the_run_does(shards):
    data = MixtureDataset([plan(shards)], 3)
    assert len(data) == 3
    for outside in (3, -1):
        with pytest.raises(IndexError):
            data[outside]


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_have_the_seed_of_their_drawing_however_they_are_batched(shards, packed):
    """40 drawings of 20 pictures: in micro-batches of 5, 2 and 1, in windows of 10 rows each, and over two ranks."""
    found = []
    for rows, window, ranks in ((5, 2, 1), (2, 5, 1), (1, 10, 1), (1, 5, 2)):
        names = {"kind": "natural", "names": ("pictures",), "packed": packed}
        group = plan(shards, rows=rows, window=window, ranks=ranks, **names)
        drawn = {}
        for step in range(40 // rows):
            batch = group[step]
            assert batch["row_seeds"].dtype == torch.int64
            for row, seed in zip(group.batch(step)[1], batch["row_seeds"].tolist(), strict=True):
                drawn.setdefault(row, set()).add(seed)
        assert all(len(seeds) == 2 for seeds in drawn.values())  # another one in the second epoch
        assert len(set().union(*drawn.values())) == 40
        found.append(drawn)
    assert all(each == found[0] for each in found)
    assert plan(shards, seed=4, **names)[0]["row_seeds"].tolist() != plan(shards, **names)[0]["row_seeds"].tolist()
    assert "row_seeds" not in plan(shards)[0]  # the teacher does not look at documents


def test_documents_at_x1_are_those_whose_letters_stay_legible(shards):
    """x1 is 32 x 32 pixels, 16 patches: rows of 40 x 8 (5 patches) stay, and of 64 x 16 (16); 100 x 8 (13) stays;
    130 x 24 is shrunk to less than its x-height of 5 pixels."""

    def drawn(least) -> set[int]:
        arguments = GroupArguments("document", 1, rows=4, sources=[SourceArguments(str(shards / "chunks"))])
        group = GroupPlan(arguments, GroupCollator(processor(), "document", 1), 3, 4, min_x_height=least)
        return {position % 4 for _, position in rows_of(group, range(40))}

    assert drawn(0.0) == {0, 1, 2, 3}
    assert drawn(5.0) == {0, 1, 2}
    with pytest.raises(ValueError, match="an x-height of 6 pixels at this scale"):
        drawn(6.0)


def test_augmentation_differs_from_step_to_step_but_not_from_run_to_run(shards):
    """The same row drawn again looks different; the same step looks the same."""
    one = plan(shards, kind="natural", names=("pictures",), window=1, rows=20)  # every picture in every batch
    by_row = [dict(zip(one.batch(step)[1], one[step]["pixel_values"], strict=True)) for step in (0, 1)]
    assert by_row[0].keys() == by_row[1].keys()
    different = [row for row in by_row[0] if not torch.equal(by_row[0][row], by_row[1][row])]
    assert len(different) == 20
    assert np.isfinite(one[0]["pixel_values"].numpy()).all()
