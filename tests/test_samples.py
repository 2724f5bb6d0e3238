"""Evaluation in training: figures against independent ones, a curve that stays as it is, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from test_trainer import STAGE_1, arguments, mixture, model_and_teacher
from tiny import byte_ids, document_row, picture_row, processor
from two_processes import run_two_processes

from modeling_unit.architectures_unit import run_encoder
from modeling_unit.modeling_unit import language_loss, vision_reconstruction_loss
from modeling_unit.reading_unit import Reader
from training.arguments import EvaluationArguments, LoraArguments, UnitTrainingArguments
from training.checkpoints import checkpoints
from training.collator import GroupCollator
from training.data.mixture import GroupPlan, MixtureDataset
from training.data.schema import write_shards
from training.data.settings import GroupArguments, SourceArguments
from training.lora import add_lora
from training.recipe import main, read_recipe
from training.sample_sheet import cut, marked, plain, sample_sheet, sample_table
from training.samples import HeldOut, Sample, held_out
from training.trainer import IntraScaleTrainer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["one", "two words", "three\nlines of", "4", "five 5", "six six six", "seven", "eight, 8", "nine", "ten"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows to train on, and other rows, one of them broken, to look at."""
    root = tmp_path_factory.mktemp("held-out")
    write_shards([document_row(f"page {n}\nof it", seed=n) for n in range(12)], root / "documents")
    write_shards([picture_row(f"thing {n}", seed=n) for n in range(12)], root / "pictures")
    rows = [document_row(text, 32 + 16 * (n % 3), 16, seed=50 + n) for n, text in enumerate(TEXTS)]
    whole = rows[4]["image"]["bytes"]
    rows[4] = rows[4] | {"image": {"bytes": whole[: len(whole) // 2], "path": None}}
    write_shards(rows, root / "held-documents")
    write_shards([picture_row(f"held {n}", seed=70 + n) for n in range(6)], root / "held-pictures")
    return root


def settings(data, **changes) -> EvaluationArguments:
    sources = [{"path": str(data / "held-documents"), "kind": "document"}]
    sources += [{"path": str(data / "held-pictures"), "kind": "natural"}]
    return EvaluationArguments(
        **({"sources": sources, "rows": 10, "read": 4, "samples": 2, "batch_rows": 3} | changes)
    )


def trainer_of(data, out, evaluation=None, train=None, lora=None, model_changes=None, **changes) -> IntraScaleTrainer:
    model, teacher = model_and_teacher(**(model_changes or {}))
    model.language_model.config.attention_dropout = 0.2  # training draws random numbers
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    groups = [] if train is None else [group.arguments for group in train.groups]
    held = None if evaluation is None else held_out(evaluation, processor(), model.config, groups)
    given = arguments(out, **changes)
    return IntraScaleTrainer(
        model=add_lora(model, lora or LoraArguments()),
        args=given,
        train_dataset=train or mixture(data, STAGE_1, given.max_steps),
        eval_dataset=held,
        teacher=teacher,
    )


def losses(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def evaluations(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def packed_groups(data) -> MixtureDataset:
    plans = []
    for kind, scale, size in (("natural", 1, {"rows": 3}), ("document", 4, {"patches": 64})):
        folder = data / ("documents" if kind == "document" else "pictures")
        group = GroupArguments(kind, scale, packed=True, sources=[SourceArguments(str(folder))], **size)
        plans.append(GroupPlan(group, GroupCollator(processor(), kind, scale, packed=True), seed=0, window=2))
    return MixtureDataset(plans, 4)


# -- nothing that training sees changes ------------------------------------------------------------


@pytest.mark.parametrize("way", ["padded", "packed", "lora"])
def test_a_run_with_evaluation_has_the_same_curve_bit_by_bit(data, tmp_path, way):
    def run(name, **changes):
        trainer = trainer_of(
            data,
            tmp_path / name,
            train=packed_groups(data) if way == "packed" else None,
            lora=LoraArguments(parts=["encoder", "language_decoder"], r=2) if way == "lora" else None,
            max_steps=2,
            **changes,
        )
        trainer.train()
        return trainer

    without = run("without")
    looks = settings(data, rows=4, read=2, samples=1)
    with_it = run("with", evaluation=looks, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert losses(with_it) == losses(without)
    for name, tensor in with_it.model.state_dict().items():
        assert torch.equal(tensor, without.model.state_dict()[name]), name
    assert [entry["step"] for entry in evaluations(with_it)] == [0, 1, 2]
    assert evaluations(with_it)[-1]["eval_loss"] < evaluations(with_it)[0]["eval_loss"]
    assert with_it.model.training
    assert with_it.args.token_sampling_ratio == 0.5


def test_a_run_that_goes_on_is_not_looked_at_twice(data, tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    looks = settings(data, rows=2, read=0, samples=0)
    first = trainer_of(data, tmp_path, looks, eval_on_start=True, **changes)
    first.train()
    again = trainer_of(data, tmp_path, looks, eval_on_start=True, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in evaluations(again)] == [0, 2, 4]
    assert evaluations(again) == evaluations(first)


# -- figures ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_held_out_losses_are_those_of_each_row_alone_weighed_by_what_they_count(data, tmp_path):
    trainer = trainer_of(data, tmp_path, settings(data, read=0, samples=0), vision_l1_weight=0.5)
    found = trainer.evaluate()
    model, teacher = trainer.model.eval(), trainer.teacher
    total, labels = 0.0, 0
    collator = GroupCollator(processor(), "document", 4)
    for number, text in enumerate(TEXTS):
        if number == 4:
            continue
        row = document_row(text, 32 + 16 * (number % 3), 16, seed=50 + number)
        # the paper that training fills up with to one of few grids is part of the image
        source, position, shape, _ = next(
            each for each in trainer.eval_dataset.groups[0].rows if each[0][each[1]]["text"] == text
        )
        assert source[position]["source"] == row["source"]
        batch = collator([row], None, shape)
        logits = model(**{key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask")}).logits
        count = len(byte_ids(text)) + 1  # and the end
        total += float(language_loss(logits, batch["labels"])) * count
        labels += count
    assert found["eval_document_x4/language_loss"] == pytest.approx(total / labels, abs=2e-5)
    each = []
    for number in range(6):
        pixels = GroupCollator(processor(), "natural", 1)([picture_row("", seed=70 + number)], None)["pixel_values"]
        wanted = run_encoder(teacher, pixels).last_hidden_state
        out = model(pixel_values=pixels, teacher_features=wanted, teacher_grid=(4, 4), vision_l1_weight=0.5)
        predicted = model.vision_decoder(run_encoder(model.vision_model, pixels).last_hidden_state)
        each.append(vision_reconstruction_loss(predicted, wanted, None, 0.5)[0])
        assert float(out.vision_loss) == pytest.approx(float(each[-1]), abs=1e-5)
    assert found["eval_natural_x1/vision_loss"] == pytest.approx(float(torch.stack(each).mean()), abs=2e-5)
    terms = ("document_x4/language_loss", "natural_x1/language_loss", "natural_x1/vision_loss")
    assert found["eval_loss"] == pytest.approx(sum(found[f"eval_{term}"] for term in terms), abs=3e-5)
    # however many rows go through the model at once
    other = trainer_of(data, tmp_path, settings(data, read=0, samples=0, batch_rows=1), vision_l1_weight=0.5)
    assert other.evaluate() == pytest.approx(found, abs=3e-5)


def test_what_is_read_is_measured_as_the_evaluator_does(data, tmp_path, monkeypatch, capsys):
    """Read: `one` right, `two words` without its second word, the rest as nothing."""

    def read_inputs(self, inputs, limits):
        assert not self.model.training
        assert inputs["input_ids"].shape[1] == inputs["attention_mask"].sum(dim=1).max()
        return ["one", "two"][: len(limits)] + [""] * (len(limits) - 2)

    monkeypatch.setattr(Reader, "read_inputs", read_inputs)
    trainer = trainer_of(data, tmp_path, settings(data, rows=2, read=2, samples=2))
    monkeypatch.setattr(trainer.eval_dataset.groups[0], "batches", lambda read: [[0, 1]] if read else [])
    group = trainer.eval_dataset.groups[0]
    group.rows = [each for each in group.rows for _ in (0, 1)]
    expected = group.rows[0][0][group.rows[0][1]]["text"]
    assert expected == "one"
    found = trainer.evaluate()
    # twice `one`: read as `one` and as `two`; one word of two is right on both sides, 3 of 6 letters are wrong
    assert (found["eval_word_f1"], found["eval_cer"], found["eval_exact"]) == (0.5, 0.5, 0.5)
    assert found["eval_document_x4/word_f1"] == 0.5
    told = capsys.readouterr().out
    assert "document ×4 │ one" in told
    lines = [json.loads(line) for line in (tmp_path / "samples" / "step-0.jsonl").read_text().splitlines()]
    documents = [line for line in lines if line["group"] == "document_x4"]
    assert [(line["read"], line["word_f1"], line["cer"]) for line in documents] == [("one", 1, 0), ("two", 0, 1)]
    assert Image.open(tmp_path / "samples" / "step-0.png").width > 500


def test_a_learned_page_is_read_from_its_image(data, tmp_path):
    """One page, learned by heart, is what an evaluation reads from it: prompt, placeholders and end are right."""
    write_shards([document_row("moss", 32, 16, seed=1)], tmp_path / "page")
    held = EvaluationArguments([{"path": str(tmp_path / "page"), "kind": "document"}], rows=1, read=1, samples=1)
    model, _ = model_and_teacher()
    model.train()
    batch = GroupCollator(processor(), "document", 4)([document_row("moss", 32, 16, seed=1)], None)
    batch.pop("token_places")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer = IntraScaleTrainer(
        model=model,
        args=arguments(tmp_path, vision_weight=0.0),
        train_dataset=mixture(data),
        eval_dataset=held_out(held, processor(), model.config, []),
    )
    found = trainer.evaluate()
    assert found["eval_exact"] == 1.0
    assert trainer.samples[0].read == "moss"


def test_rows_that_cannot_be_used_are_counted_and_not_the_end(data, tmp_path):
    trainer = trainer_of(data, tmp_path, settings(data))
    assert trainer.evaluate()["eval_refused"] == 1
    assert [len(group.rows) for group in trainer.eval_dataset.groups] == [9, 6]


# -- best model, early stopping --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("word_f1", [0.1, 0.5, 0.3, 0.2, 0.9], 2), ("eval_cer", [0.9, 0.8, 0.3, 0.35, 0.4], 3)],
)
def test_the_best_checkpoint_is_kept_and_loaded_and_the_run_stops(data, tmp_path, monkeypatch, metric, values, best):
    """Evaluated and saved at each step; two evaluations without a better one end the run."""
    trainer = trainer_of(
        data,
        tmp_path,
        settings(data),
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        early_stopping_patience=2,
    )
    given, behind = iter(values), {}
    name = metric.removeprefix("eval_")

    def looked_at(held):
        behind[trainer.state.global_step] = {key: each.clone() for key, each in trainer.model.state_dict().items()}
        return {"loss": 1.0, name: next(given)}, []

    monkeypatch.setattr(trainer, "_looked_at", looked_at)
    trainer.train()
    assert trainer.state.global_step == best + 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert [each.name for each in checkpoints(tmp_path)] == [f"checkpoint-{best}", f"checkpoint-{best + 2}"]
    for key, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, behind[best][key]), key


def test_a_metric_that_no_evaluation_gives_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="an evaluation does not give 'word_f2'") as error:
        trainer_of(data, tmp_path, settings(data), metric_for_best_model="word_f2")
    assert "\n" not in str(error.value)
    held = trainer_of(data, tmp_path, settings(data)).eval_dataset
    assert isinstance(held, HeldOut)
    assert all(held.knows(name) for name in ("loss", "eval_cer", "document_x4/word_f1", "natural_x1/vision_loss"))
    assert not any(held.knows(name) for name in ("natural_x1/word_f1", "document_x1/cer", "eval_speed"))


# -- several processes -----------------------------------------------------------------------------


def test_two_processes_share_an_evaluation_and_give_its_figures(data, tmp_path):
    run_two_processes("evaluation_process.py", data, tmp_path)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert seen[0]["figures"] == seen[1]["figures"]
    assert sum(each["batches"] for each in seen) == seen[0]["all"]
    assert min(each["batches"] for each in seen) > 0
    trainer = trainer_of(data, tmp_path / "alone", settings(data))
    assert trainer.evaluate() == pytest.approx(seen[0]["figures"], abs=2e-5)
    alone = (tmp_path / "alone" / "samples" / "step-0.jsonl").read_text()
    assert (tmp_path / "shared" / "samples" / "step-0.jsonl").read_text() == alone


# -- recipes ---------------------------------------------------------------------------------------


def recipe(data, out, **changes) -> dict:
    groups = [
        {"kind": "document", "scale": 4, "rows": 2, "sources": [{"path": str(data / "documents")}]},
        {"kind": "natural", "scale": 1, "rows": 2, "sources": [{"path": str(data / "pictures")}]},
    ]
    training = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "output_dir": str(out), "logging_steps": 1}
    training |= {"save_strategy": "no", "use_cpu": True}
    evaluation = {"sources": [{"path": str(data / "held-documents"), "kind": "document"}], "rows": 4, "read": 2}
    found = {"stage": "intra_scale", "groups": groups, "training": training, "evaluation": evaluation | {"samples": 1}}
    return found | changes


def written(folder, content: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    model, teacher = model_and_teacher()
    model.save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    teacher.save_pretrained(folder / "teacher")
    return {"start": str(folder / "model"), "teacher": str(folder / "teacher")}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_evaluates_and_leaves_its_samples(data, start, tmp_path, streaming, capsys):
    content = recipe(data, tmp_path / "out", **start)
    content["data"] = {"streaming": streaming, "shuffle_buffer": 6}
    main(written(tmp_path, content))
    out = tmp_path / "out"
    assert sorted(each.name for each in (out / "samples").iterdir()) == [
        "step-1.jsonl",
        "step-1.png",
        "step-2.jsonl",
        "step-2.png",
    ]
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "eval_word_f1" in entry] == [1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("eval")]) == 2
    assert json.loads((out / "recipe.json").read_text())["evaluation"]["rows"] == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluation": {}}, "training.eval_strategy: give held-out rows to look at"),
        ({"stage": "teacher"}, "the stage teacher has nothing to evaluate"),
        ({"stage": "llava"}, "the stage llava has nothing to evaluate"),
        ({"training": {"max_steps": 2, "output_dir": "out"}}, "`evaluation` is given: say when"),
        ({"evaluation": {"row": 4}}, "Unknown key 'row' in `evaluation`. Did you mean 'rows'"),
        ({"evaluation": {"sources": [{"path": "x"}]}}, "'x' needs kind: natural or document"),
        ({"evaluation": {"sources": [{"path": "x", "kind": "document", "scale": 3}]}}, "scale must be 1 or 4"),
        ({"evaluation": {"read": 4, "rows": 2}}, "needs 0 <= samples <= read <= rows, got 6, 4 and 2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(data, tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as error:
        main(written(tmp_path, recipe(data, tmp_path / "out", **change)))
    assert "\n" not in str(error.value)


def test_a_source_that_is_trained_on_is_refused_by_whatever_name(data, tmp_path):
    twice = EvaluationArguments([{"path": str(data / "documents" / ".." / "documents"), "kind": "document"}])
    trained = [GroupArguments("document", 4, rows=1, sources=[SourceArguments(str(data / "documents"))])]
    model, _ = model_and_teacher()
    with pytest.raises(ValueError, match="is trained on too") as error:
        held_out(twice, processor(), model.config, trained)
    assert "\n" not in str(error.value)


def test_evaluation_may_change_when_a_run_goes_on():
    from training.resume import differences

    one = {"recipe": {"stage": "intra_scale", "evaluation": {"rows": 4}, "training": {"max_steps": 3}}}
    other = {"recipe": {"stage": "intra_scale", "training": {"max_steps": 3, "early_stopping_patience": 2}}}
    assert differences(one | {"batches_per_step": 1}, other | {"batches_per_step": 1}) == {}


def test_what_leaves_the_curve_as_it_is_may_change_when_a_run_goes_on():
    from training.resume import differences

    preset = {"lora": {"preset": "both", "parts": ["encoder"], "warn_single_scale": False}}
    one = {"recipe": preset | {"training": {"torch_compile": True, "torch_compile_mode": "default"}}}
    other = {"recipe": {"lora": {"parts": ["encoder"]}, "training": {}}}
    assert differences(one | {"batches_per_step": 1}, other | {"batches_per_step": 1}) == {}


@pytest.mark.parametrize("scale", [1, "same"])
def test_held_out_pictures_are_for_the_teacher_as_those_of_training(data, scale):
    sources = [{"path": str(data / "held-pictures"), "kind": "natural", "scale": 4}]
    model, _ = model_and_teacher()
    held = held_out(settings(data, sources=sources), processor(), model.config, [], teacher_scale=scale)
    batch, _ = held.groups[0].collated([0, 1])
    assert batch["pixel_values"].shape[-1] == 64
    assert ("teacher_pixel_values" in batch) is (scale == 1)


def test_lower_error_rates_are_better(tmp_path):
    for metric, greater in (("eval_cer", False), ("word_f1", True), ("natural_x1/vision_cosine", False)):
        given = UnitTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True)
        assert given.greater_is_better is greater
    with pytest.raises(ValueError, match="early_stopping_patience needs"):
        UnitTrainingArguments(output_dir=str(tmp_path), early_stopping_patience=2, use_cpu=True)


def test_recipes_without_evaluation_read_as_before(data, tmp_path):
    content = recipe(data, tmp_path)
    del content["evaluation"]
    assert read_recipe(written(tmp_path, content)).evaluation == {}


# -- what is shown ---------------------------------------------------------------------------------


def test_differences_are_marked_on_both_sides():
    expected, read = marked("the cat", "he cart")
    assert [letter for letter, wrong in expected if wrong] == ["t"]
    assert [letter for letter, wrong in read if wrong] == ["r"]


def test_texts_are_cut_by_what_a_terminal_shows():
    assert cut("abcdef", 4) == "abc…"
    assert cut("ab", 4) == "ab  "
    assert cut("字字字", 5) == "字字…"
    assert cut("字字字", 4) == "字… "  # half a letter cannot be shown
    assert plain("a\n b\tc\x1b[31m") == "a↵b c\ufffd[31m"


def test_the_table_fits_the_terminal():
    samples = [Sample("document_x4", 0, "ocr", "x" * 300, "y", ""), Sample("natural_x1", 0, "caption", "a", "b", "")]
    lines = sample_table(samples, 100).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 100
    assert len({line.index("│") for line in lines}) == 1
    assert lines[1].startswith("document ×4 │ xxxx")


def test_a_sheet_shows_long_and_empty_texts():
    page = Image.new("L", (900, 500), 255)
    samples = [Sample("document_x4", 0, "ocr", "long " * 400, "", "", page)]
    sheet = sample_sheet(samples, "step 3")
    assert sheet.mode == "RGB"
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert (0xF7, 0xC9, 0xC4) in colours  # behind what was not read
    with pytest.raises(ValueError, match="no samples"):
        sample_sheet([], "")
