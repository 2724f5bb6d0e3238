"""Ablations: what is planned and shared, what goes on and what fails, and the arithmetic of the table."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file as save_numpy
from tiny import document_row, image_processor, picture_row, vision_config

import training.ablations as ablations
from modeling_unit import UnitVisionModel
from training import recipe
from training.ablation_figures import FIGURES, Measure, measured
from training.ablation_table import LEAST, _edge, columns_of, estimate, t_quantile, table
from training.ablations import Training, plan, read_grid, recipe_text, run_grid, train_apart
from training.checkpoints import WholeCheckpoints
from training.data.schema import write_shards
from training.evaluation.contract import Figure
from training.recipe import Recipe, new_model, read_recipe, with_settings
from unit_cli.__main__ import main

ROOT = Path(ablations.__file__).parents[1]
SHIPPED = sorted((ROOT / "training" / "recipes" / "ablations").glob("*.yaml"))
TEXT = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder, documents, pictures, held-out ones of both, and recipes of two stages."""
    root = tmp_path_factory.mktemp("made")
    UnitVisionModel(vision_config(num_hidden_layers=1)).save_pretrained(root / "encoder")
    image_processor().save_pretrained(root / "encoder")
    save_numpy({"weight": np.eye(3, 32, dtype=np.float32)}, root / "encoder" / "visual_projection.safetensors")
    write_shards([document_row(f"row {index}", seed=index) for index in range(12)], root / "documents")
    write_shards(
        [document_row(f"new {index}", 32, 16, seed=90 + index) for index in range(4)], root / "held-documents"
    )
    write_shards([picture_row("a dog", seed=index) for index in range(12)], root / "pictures")
    rows = []
    for number in range(12):  # three kinds by four hands
        kind, hand = "abc"[number % 3], f"hand {number // 3}"
        row = picture_row(f"kind {kind}", seed=50 + number)
        row["image"] = {"bytes": row["image"]["bytes"], "path": f"{kind}-{hand}"}
        rows.append(row | {"concept": kind, "style": hand, "family": hand})
    (root / "held-pictures").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "held-pictures" / "part-00000.parquet")
    (root / "held-pictures" / "concept_names.json").write_text(json.dumps(["a", "b", "c"]))
    embeddings = {"embeddings": np.eye(3, dtype=np.float32)}
    save_numpy(embeddings, root / "held-pictures" / "concept_sentence.safetensors")
    groups = [
        {"kind": kind, "scale": scale, "rows": 2, "sources": [{"path": str(root / folder)}]}
        for kind, folder in (("document", "documents"), ("natural", "pictures"))
        for scale in (4, 1)
    ]
    shared = {"teacher": str(root / "encoder"), "training": {"max_steps": 2, "save_steps": 1, "character_weight": 1.0}}
    first = {"stage": "intra_scale", "groups": [groups[0], groups[3]], "image_processor": {"max_side": 128}} | shared
    first["model"] = {"text_config": TEXT, "connector_config": {"connector_type": "mlp", "unshuffle": 1}}
    (root / "first.yaml").write_text(yaml.safe_dump(first))
    (root / "second.yaml").write_text(yaml.safe_dump({"stage": "inter_scale", "groups": groups} | shared))
    return root


def grid_file(made, folder, **changes) -> Path:
    """Two stages, four variants; `changes` in place of what the file has."""
    content = {
        "stages": [
            {"name": "one", "recipe": str(made / "first.yaml")},
            {"name": "two", "recipe": str(made / "second.yaml"), "set": {"training.max_steps": 1}},
        ],
        "seeds": [1, 2],
        "variants": {
            "base": {"about": "as it is"},
            "no-vision": {"set": {"training.vision_weight": 0}},
            "short": {"drop": ["two"]},
            "lora": {"stages": {"two": {"lora": {"preset": "both"}}}},
        },
        "measure": {"documents": str(made / "held-documents"), "pictures": str(made / "held-pictures"), "rows": 4},
        "figures": ["language_loss", "knn_accuracy"],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


class Worker:
    """In place of trainings and measurements: marks folders as trained; fails or is interrupted where it is told."""

    def __init__(self, fails=(), interrupted_at=None):
        self.trained, self.measured, self.fails, self.interrupted_at = [], [], fails, interrupted_at

    def train(self, training: Training) -> None:
        if len(self.trained) == self.interrupted_at:
            raise KeyboardInterrupt
        if (training.variant, training.seed, training.stage) in self.fails:
            raise ValueError("the loss is no number\nand more")
        self.trained.append((training.variant, training.seed, training.stage))
        training.folder.mkdir(parents=True, exist_ok=True)
        mark = {"key": training.key, "finished": training.key, "seconds": 1800.0}
        (training.folder / ablations.MARK).write_text(json.dumps(mark))

    def measure(self, grid, run) -> list[Figure]:
        self.measured.append((run.variant, run.seed))
        return [Figure("knn_accuracy", 0.5 + 0.1 * run.seed, at={"resolution": 32})]

    def go(self, grid, out, **asked):
        said = []
        results = run_grid(grid, out, say=said.append, train=self.train, measure=self.measure, **asked)
        return results, said


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_variants_share_what_they_have_in_common(made, tmp_path):
    """Stage one of base, short and lora is one training; a seed has 2 of stage one and 3 of stage two."""
    runs = plan(read_grid(grid_file(made, tmp_path)), tmp_path / "out")
    assert [(run.variant, run.seed) for run in runs] == [
        (name, seed) for seed in (1, 2) for name in ("base", "no-vision", "short", "lora")
    ]
    trainings = {training.key: training for run in runs for training in run.trainings}
    assert len(trainings) == 10
    base, bare, short, lora = runs[:4]
    assert base.trainings[0] is short.trainings[0] is lora.trainings[0]
    assert base.trainings[0] is not bare.trainings[0]
    assert len({base.key, bare.key, short.key, lora.key}) == 4
    assert base.trainings[1].recipe["start"] == str(tmp_path / "out" / "base" / "seed-1" / "one")
    assert base.trainings[1].recipe["training"]["seed"] == 1
    assert base.trainings[1].recipe["training"]["max_steps"] == 1


@pytest.mark.parametrize(
    ("setting", "alike"), [("logging_steps", True), ("save_steps", True), ("weight_decay", False)]
)
def test_what_leaves_the_weights_alone_does_not_train_again(made, tmp_path, setting, alike):
    keys = []
    for value in (5, 7):
        stages = [{"name": "one", "recipe": str(made / "first.yaml"), "set": {f"training.{setting}": value}}]
        grid = read_grid(grid_file(made, tmp_path, stages=stages, variants={"base": {}}))
        keys.append(plan(grid, tmp_path / "out")[0].key)
    assert (keys[0] == keys[1]) == alike


def test_another_start_of_the_same_name_trains_again(made, tmp_path):
    grid = read_grid(grid_file(made, tmp_path))
    before = plan(grid, tmp_path / "out")[0].key
    file = made / "encoder" / "config.json"
    content = file.read_text()
    file.write_text(content + "\n")
    try:
        assert plan(grid, tmp_path / "out")[0].key != before
    finally:
        file.write_text(content)


def test_a_training_is_found_again_where_it_is_although_the_file_has_a_new_variant_before_it(made, tmp_path):
    worker = Worker()
    worker.go(read_grid(grid_file(made, tmp_path)), tmp_path / "out", only=["lora"], seeds=[1])
    assert worker.trained == [("base", 1, "one"), ("lora", 1, "two")]
    variants = {"other": {"drop": ["two"]}, "lora": {"stages": {"two": {"lora": {"preset": "both"}}}}}
    again = Worker()
    again.go(read_grid(grid_file(made, tmp_path, variants=variants)), tmp_path / "out", seeds=[1])
    assert again.trained == []


def test_a_folder_with_a_training_of_other_settings_is_refused(made, tmp_path):
    Worker().go(read_grid(grid_file(made, tmp_path)), tmp_path / "out", seeds=[1])
    stages = [{"name": "one", "recipe": str(made / "first.yaml"), "set": {"training.max_steps": 9}}]
    grid = read_grid(grid_file(made, tmp_path, stages=stages, variants={"base": {}}))
    with pytest.raises(ValueError, match=r"seed-1/one holds a training of other settings .* give another --out"):
        plan(grid, tmp_path / "out")


def test_a_variant_that_failed_at_once_may_be_mended_in_place(made, tmp_path):
    """It left a mark, but nothing to go on from."""
    changes = {"variants": {"base": {"set": {"training.warmup_steps": 9}}}}
    wrong = plan(read_grid(grid_file(made, tmp_path, **changes)), tmp_path / "out", seeds=[1])[0].trainings[0]
    with pytest.raises(RuntimeError, match=r"warmup_steps \(9\) is more than"):
        train_apart(wrong)
    right = plan(read_grid(grid_file(made, tmp_path)), tmp_path / "out", seeds=[1])[0].trainings[0]
    assert right.folder == wrong.folder
    assert right.key != wrong.key
    (right.folder / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="holds a training of other settings"):
        plan(read_grid(grid_file(made, tmp_path)), tmp_path / "out", seeds=[1])


VARIANTS = {"base": {"about": "as it is"}, "other": {"set": {"training.vision_weight": 0}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": []}, "has no key 'stage'; did you mean 'stages'?"),
        ({"stages": []}, "must name one or more stages"),
        ({"stages": [{"name": "one"}]}, "a stage lacks the key 'recipe'"),
        ({"variants": {}}, "`variants` is empty"),
        ({"variants": []}, "variants must be a mapping"),
        ({"variants": {"base": {"sets": {}}}}, "variant base has no key 'sets'; did you mean 'set'?"),
        ({"variants": {"base": {"drop": ["three"]}}}, "variant base: there is no stage 'three'; there are one, two"),
        ({"variants": {"base": {"drop": ["one", "two"]}}}, "variant base drops every stage"),
        ({"variants": {"base": {"drop": ["two"], "stages": {"two": {}}}}}, "both drops two and sets something in it"),
        ({"variants": {"base": {"set": {"training.seed": 3}}}}, "training.seed is the command's own"),
        ({"seeds": [1, 1]}, "seeds must be different whole numbers"),
        ({"seeds": ["one"]}, "seeds must be different whole numbers"),
        ({"figures": ["knn_acuracy"]}, "'knn_acuracy' is not known; did you mean 'knn_accuracy'?"),
        ({"measure": {"row": 3}}, "measure has no key 'row'; did you mean 'rows'?"),
        ({"measure": {"rows": 0}}, "measure.rows must be a whole number of at least 1"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(made, tmp_path, changes, words):
    with pytest.raises(ValueError) as raised:
        read_grid(grid_file(made, tmp_path, **changes))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        (VARIANTS | {"same": {"set": {"training.vision_weight": 1.0, "training.logging_steps": 3}}}, None),
        (VARIANTS | {"same": {"set": {"training.logging_steps": 3}}}, "variant same has no effect"),
        (VARIANTS | {"bad": {"set": {"training.vision_wait": 1}}}, "variant bad, one: Unknown key 'vision_wait'"),
        (VARIANTS | {"bad": {"stages": {"two": {"stage": "three"}}}}, "variant bad, two: stage must be one of"),
    ],
)
def test_variants_that_change_nothing_or_what_is_not_there_are_refused(made, tmp_path, variants, words):
    grid = read_grid(grid_file(made, tmp_path, variants=variants))
    if words is None:  # given, where the recipe leaves it to the default: other words in the recipe
        assert len(plan(grid, tmp_path / "out")) == 6
        return
    with pytest.raises(ValueError) as raised:
        plan(grid, tmp_path / "out")
    assert words in str(raised.value)


# -- the work ---------------------------------------------------------------------------------------------------------


def test_nothing_is_trained_or_measured_twice(made, tmp_path, monkeypatch):
    grid, worker = read_grid(grid_file(made, tmp_path)), Worker()
    results, said = worker.go(grid, tmp_path / "out")
    assert len(worker.trained) == len(set(worker.trained)) == 10
    assert [seed for _, seed, _ in worker.trained] == [1] * 5 + [2] * 5  # a cut leaves whole seeds
    assert len(worker.measured) == 8
    assert said[0] == "8 runs (4 variants, 2 seeds) of 10 trainings, 0 of them finished"
    assert said[1] == "[1/10] base, seed 1, one"
    assert said[2] == "[2/10] base, seed 1, two, about 4:30 hours left"  # nine of half an hour
    assert (tmp_path / "out" / "plot.png").is_file()

    def never(*args):
        raise AssertionError("all is done: recipes need not be looked at")

    monkeypatch.setattr(ablations, "plan", never)
    again, _ = (second := Worker()).go(grid, tmp_path / "out")
    assert (second.trained, second.measured) == ([], [])
    assert again["runs"] == results["runs"]


def test_what_was_interrupted_goes_on(made, tmp_path):
    grid = read_grid(grid_file(made, tmp_path))
    first = Worker(interrupted_at=4)
    with pytest.raises(KeyboardInterrupt):
        first.go(grid, tmp_path / "out")
    second = Worker()
    results, said = second.go(grid, tmp_path / "out")
    assert len(first.trained) == 4
    assert len(first.trained + second.trained) == len({*first.trained, *second.trained}) == 10
    assert len(first.measured + second.measured) == 8
    assert said[0].endswith("10 trainings, 4 of them finished")
    assert all("figures" in run for run in results["runs"])


def test_a_failure_is_told_and_the_rest_goes_on(made, tmp_path):
    grid = read_grid(grid_file(made, tmp_path))
    worker = Worker(fails=[("no-vision", 1, "one")])
    results, said = worker.go(grid, tmp_path / "out")
    assert len(worker.trained) == 8  # without both stages of no-vision with seed 1
    failed = [run for run in results["runs"] if "failed" in run]
    assert [(run["variant"], run["seed"]) for run in failed] == [("no-vision", 1)]
    assert failed[0]["failed"] == "no-vision, seed 1, one: the loss is no number"
    assert "failed: no-vision, seed 1, one: the loss is no number" in said
    assert "- no-vision, seed 1: no-vision, seed 1, one: the loss is no number" in (
        (tmp_path / "out" / "table.md").read_text()
    )
    mended = Worker()
    results, _ = mended.go(grid, tmp_path / "out")
    assert mended.trained == [("no-vision", 1, "one"), ("no-vision", 1, "two")]
    assert not any("failed" in run for run in results["runs"])


def test_a_model_that_cannot_be_measured_is_a_failure_too(made, tmp_path):
    grid, worker = read_grid(grid_file(made, tmp_path)), Worker()

    def measure(grid, run):
        raise RuntimeError("no room")

    worker.measure = measure
    results, _ = worker.go(grid, tmp_path / "out", only=["base"], seeds=[2])
    assert [run["failed"] for run in results["runs"]] == ["base, seed 2, measured: no room"]


def test_two_processes_do_not_train_the_same(made, tmp_path):
    """While one is at a training another passes it over and does what does not need it."""
    grid, out = read_grid(grid_file(made, tmp_path)), tmp_path / "out"
    outer, inner = Worker(), Worker()
    once = []

    def train(training):
        if not once:
            once.append(training)
            waits = ablations.WAIT
            try:
                ablations.WAIT = 0.0
                work = ablations._Work(grid, out, plan(grid, out), print, inner.train, inner.measure, "")
                for _ in range(6):
                    work.next()
            finally:
                ablations.WAIT = waits
        outer.train(training)

    run_grid(grid, out, say=lambda line: None, train=train, measure=outer.measure)
    assert once[0].folder == out / "base" / "seed-1" / "one"
    assert ("no-vision", 1, "two") in inner.trained
    assert not {("base", 1, "one"), ("base", 1, "two"), ("lora", 1, "two")} & set(inner.trained)
    assert len(inner.trained + outer.trained) == len({*inner.trained, *outer.trained}) == 10


# -- a real one, and its figures --------------------------------------------------------------------------------------


def test_trainings_are_those_of_unit_train_and_go_on_from_their_checkpoints(made, tmp_path, monkeypatch):
    grid = read_grid(grid_file(made, tmp_path, seeds=[1]))
    (run,) = plan(grid, tmp_path / "out", only=["lora"])
    one, two = run.trainings
    saved = WholeCheckpoints._save_checkpoint

    def interrupted(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        raise KeyboardInterrupt

    one.folder.mkdir(parents=True)
    (one.folder / "recipe.yaml").write_text(recipe_text(one), encoding="utf-8")
    monkeypatch.setattr(WholeCheckpoints, "_save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(one.folder / "recipe.yaml")
    monkeypatch.setattr(WholeCheckpoints, "_save_checkpoint", saved)
    assert not one.finished()
    assert (one.folder / "checkpoint-1").is_dir()
    train_apart(one)
    assert one.finished()
    assert not list(one.folder.glob("checkpoint-*"))
    assert "Going on from" in (one.folder / ablations.OUTPUT).read_text()
    train_apart(two)
    assert read_recipe(two.folder / "recipe.yaml").start == str(one.folder)
    assert (two.folder / "adapter").is_dir()
    figures = measured(grid, two.folder, str(made / "encoder"), bf16=False)
    assert [figure.name for figure in figures] == ["language_loss"] * 4 + ["knn_accuracy"] * 2
    assert {figure.at["resolution"] for figure in figures[4:]} == {32, 64}


def test_figures_of_a_model_that_is_still_its_teacher(made, tmp_path):
    recipe = read_recipe(made / "first.yaml")
    model, processor = new_model(recipe)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    grid = read_grid(grid_file(made, tmp_path, figures=[name for name in FIGURES if name != "word_f1"]))
    figures = measured(grid, tmp_path / "model", str(made / "encoder"), bf16=False)
    values = {(each.name, *sorted(map(str, each.at.values()))): each.value for each in figures}
    assert list(dict.fromkeys(each.name for each in figures)) == [name for name in FIGURES if name != "word_f1"]
    assert values["teacher_cosine", "32"] == pytest.approx(1.0, abs=1e-5)
    assert values["teacher_cka", "32"] == pytest.approx(1.0, abs=1e-5)
    assert values["teacher_cosine", "64"] < 0.9999
    assert 0.0 <= values["character_accuracy", "documents", "x4"] <= 0.2  # a random head over a hundred classes
    # a decoder that knows nothing yet: near ln of its 262 pieces
    for scale in ("x1", "x4"):
        assert values["language_loss", "documents", scale] == pytest.approx(math.log(262), abs=0.5)
    assert all(each.items in (4, 12) for each in figures)


def test_a_set_that_is_not_there_is_told_before_the_work(made, tmp_path):
    measure = {"documents": str(tmp_path / "nowhere"), "pictures": str(made / "held-pictures")}
    grid = read_grid(grid_file(made, tmp_path, measure=measure))
    with pytest.raises(ValueError, match=r"there is no set .*nowhere"):
        run_grid(grid, tmp_path / "out", say=print, train=Worker().train)
    with pytest.raises(ValueError, match=r"word_f1 needs measure: \{read: N\}"):
        run_grid(read_grid(grid_file(made, tmp_path, figures=["word_f1"])), tmp_path / "out", train=Worker().train)
    assert Measure(read=4).read == 4


def test_a_whole_start_takes_the_recipes_image_settings():
    """`scale_as` could not be varied in stage 2 otherwise."""
    before = image_processor(image_mean=[0.1, 0.2, 0.3])
    after = with_settings(before, {"scale_as": "side"})
    assert (before.area(4), after.area(4)) == (64 * 64, 128 * 128)
    assert (after.patch_size, after.image_mean, after.max_side) == (8, [0.1, 0.2, 0.3], 128)
    assert with_settings(before, {}) is before
    with pytest.raises(ValueError, match=r"image_processor\.patch_size is 16, the model's patches are 8"):
        with_settings(before, {"patch_size": 16})


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_of_t_are_those_of_the_printed_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=5e-5)


def test_an_interval_of_three_seeds():
    """1, 2, 3: mean 2, deviation 1, half 4.3027 / sqrt(3)."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.half == pytest.approx(2.4841, abs=1e-4)
    assert not found.clear
    assert estimate([1.0, 2.0]).half is None
    assert not estimate([1.0, 2.0]).clear
    assert estimate([0.5, 0.5, 0.5]).half == 0.0
    assert estimate([0.5, 0.5, 0.5]).clear


def results_of(values: dict[str, dict[int, float]]) -> dict:
    runs = [
        {"variant": name, "seed": seed, "figures": [Figure("knn_accuracy", value, at={"resolution": 32}).to_dict()]}
        for name, seeds in values.items()
        for seed, value in seeds.items()
    ]
    return {"runs": runs}


def test_differences_are_taken_seed_by_seed(made, tmp_path):
    """Base 0.1, 0.2, 0.3; the other 0.20, 0.35, 0.40: differences 0.10, 0.15, 0.10, mean 0.11667, deviation 0.028868,
    half 4.3027 * 0.028868 / sqrt(3) = 0.071713: clear, although the means' own intervals overlap by far."""
    results = results_of({"base": {1: 0.1, 2: 0.2, 3: 0.3}, "lora": {3: 0.40, 1: 0.20, 2: 0.35}, "short": {2: 0.5}})
    (column,) = columns_of(results)
    found = column.difference("lora", "base")
    assert found.mean == pytest.approx(0.116667, abs=1e-6)
    assert found.half == pytest.approx(0.071713, abs=1e-5)
    assert found.clear
    assert column.mean("lora").half > 0.2
    assert column.difference("short", "base").mean == pytest.approx(0.3)
    assert column.difference("no-vision", "base") is None
    told = table(read_grid(grid_file(made, tmp_path)), results)
    assert "### k-NN accuracy (share, higher is better)\n\n| variant | 32 px | difference |" in told
    assert "| base | 0.200 ± 0.248 |  |" in told
    assert "| lora | 0.317 ± 0.259 | **+0.117 ± 0.072** |" in told
    assert "| short | 0.500 (1) | +0.300 (1) |" in told
    assert "- lora: k-NN accuracy, 32 px +0.117\n\nOf 1 difference fewer than one would" in told
    assert "| no-vision |" not in told
    assert f"1 of 3 variants have fewer than {LEAST} seeds so far" in told
    assert told.startswith("7 of 8 runs: 4 variants with 2 seeds each.")


def test_a_panel_ends_where_the_variants_do_but_for_those_far_off():
    assert _edge({"a": 0.03, "b": 0.01, "c": 0.02}) == 0.03
    assert _edge({"a": 0.03, "off": 0.9, "c": 0.02}) == 0.03
    assert _edge({"off": 0.9, "too": 0.5, "a": 0.03, "c": 0.02}) == 0.03
    assert _edge({"only": 0.9}) == 0.9
    assert _edge({"a": 0.0}) == 1.0


def test_a_table_of_nothing_says_so(made, tmp_path):
    assert "Nothing has been measured yet." in table(read_grid(grid_file(made, tmp_path)), {"runs": []})


# -- what ships, and the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_grid_opens_with_its_command_and_its_variants_make_recipes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(path)
    opening = path.read_text(encoding="utf-8").splitlines()
    assert opening[0].startswith(f"# unit ablate {path.relative_to(ROOT)} --out runs/")
    assert len(grid.seeds) >= LEAST
    runs = plan(grid, tmp_path)
    assert len(runs) == len(grid.seeds) * len(grid.variants)
    for run in runs[: len(grid.variants)]:
        for training in run.trainings:
            (tmp_path / "recipe.yaml").write_text(ablations.recipe_text(training))
            assert read_recipe(tmp_path / "recipe.yaml") == Recipe(**training.recipe)


def test_the_tiny_grid_has_what_reviewers_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(ROOT / "training" / "recipes" / "ablations" / "unit-tiny.yaml")
    runs = {run.variant: run for run in plan(grid, tmp_path, seeds=[1])}
    last = {name: run.trainings[-1].recipe for name, run in runs.items()}

    def seen(key):
        return {recipe["training"].get(key, default) for recipe in last.values()}

    default = 1.0
    assert {0.0, 0.1, 1.0, 10.0} <= seen("vision_weight")  # lambda
    assert {0.0, 1.0, 4.0} <= seen("vision_l1_weight")  # mu
    default = 0.5
    assert {0.1, 0.25, 0.5, 1.0} <= seen("token_sampling_ratio")
    default = 1
    assert {1, "same"} <= seen("teacher_scale")
    connectors = [run.trainings[0].recipe["model"]["connector_config"] for run in runs.values()]
    assert {each["num_queries"] for each in connectors if each["connector_type"] == "qformer"} == {16, 64}
    assert any(each["connector_type"] == "mlp" for each in connectors)
    assert any(recipe["lora"] for recipe in last.values())
    assert not all(recipe["lora"] for recipe in last.values())
    assert {recipe["image_processor"].get("scale_as") for recipe in last.values()} >= {None, "side"}
    assert last["stage-1-only"]["stage"] == last["no-exchange"]["stage"] == "intra_scale"
    assert len(runs["stage-1-only"].trainings) == 1
    assert len(runs["no-exchange"].trainings) == 2


def test_the_command_lists_and_refuses(made, tmp_path, capsys):
    file = str(grid_file(made, tmp_path))
    assert main(["ablate", file, "--list"]) == 0
    said = capsys.readouterr().out
    assert "base: as it is\n    one (2 steps) -> two (1 steps)" in said
    assert "lora: \n    one (2 steps, base's) -> two (1 steps)" in said
    assert "8 runs over 2 seeds, 10 trainings in all" in said
    for arguments, words in (
        ([file], "--out DIR is needed"),
        ([file, "--out", str(tmp_path / "out"), "--table"], "nothing has been measured there yet"),
        ([file, "--list", "--only", "lara"], "there is no variant 'lara'; did you mean 'lora'?"),
        ([str(tmp_path / "none.yaml"), "--list"], "no such file"),
        ([file, "--list", "--seeds", "1,1"], "seeds must be different"),
    ):
        assert main(["ablate", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.strip().splitlines()) == 1


def test_the_command_prints_what_is_done_and_says_when_seeds_are_few(made, tmp_path, capsys, monkeypatch):
    worker = Worker(fails=[("lora", 2, "two")])
    monkeypatch.setattr(ablations, "train_apart", worker.train)
    monkeypatch.setattr(ablations, "_measure", worker.measure)
    command = ["ablate", str(grid_file(made, tmp_path)), "--out", str(tmp_path / "out")]
    assert main(command) == 1  # something failed
    said = capsys.readouterr().out
    assert "2 of the 3 seeds that an interval needs: there will be none" in said
    assert "| base | 0.650 (2) |" in said
    worker.fails = ()
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--table"]) == 0
    assert "| lora | 0.650 (2) | 0.000 (2) |" in capsys.readouterr().out  # no difference has no sign
