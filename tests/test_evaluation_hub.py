"""training/evaluation/hub_results.py: what goes to the Hub, read back by huggingface_hub's own parsers."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_evaluation_report import results, row

from training.evaluation.hub_results import eval_result_files, hub_id, model_index, of_encoder, write_hub_results
from training.evaluation.sets import TextSet
from training.evaluation.text_suite import TextEvaluator

FUNSD = {"evaluator": "FUNSD", "items": 50, "failed": 1}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("mp-02/funsd", "mp-02/funsd"),
        ("here/funsd", None),
        ("/data/funsd", None),
        ("data/deep/funsd", None),
        ("funsd", None),
        (None, None),
    ],
)
def test_a_folder_is_no_set_of_the_hub(tmp_path, monkeypatch, source, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "funsd").mkdir(parents=True)
    assert hub_id(source) == found


def test_a_set_of_text_is_known_by_where_it_was_taken_from(tmp_path):
    evaluator = TextEvaluator(TextSet("funsd", (tmp_path,)))
    assert evaluator.dataset_id is None
    (tmp_path / "report.json").write_text(json.dumps({"settings": {"name": "funsd", "source": "mp-02/funsd"}}))
    assert evaluator.dataset_id == "mp-02/funsd"


def on_hub(figure):
    return figure | {"dataset_id": "nielsr/funsd"}


@pytest.fixture
def found():
    return results(
        row("word_f1", 0.912345, 0.9, 0.93, at={"x_height": 14}, items=60),
        on_hub(row("word_f1", 0.4, 0.3, 0.5, **FUNSD)),
        on_hub(row("cer", 0.6, 0.5, 0.7, better="lower", **FUNSD)),
        on_hub(row("word_f1", 0.9, subject="peer", **FUNSD)),
        on_hub(row("knn_accuracy", 0.5, suite="image", evaluator="imagenet", at={"resolution": 224}))
        | {"dataset_id": "ILSVRC/imagenet-1k"},
        row("knn_accuracy", 0.7, suite="image", evaluator="pictures", subject="teacher"),
        row("zero_shot_top1", 0.2, suite="image", evaluator="pictures"),
        row("knn_accuracy", 0.3, suite="image", evaluator="pictures", at={"feature": "vision decoder"}),
        row("cosine", 0.9, suite="retention", evaluator="features"),
        subjects=("UNIT", "teacher", "peer"),
    )


def test_sets_of_the_hub_are_in_its_decentralised_format(found):
    files = eval_result_files(found)
    assert sorted(files) == ["unit-ilsvrc-imagenet-1k.yaml", "unit-nielsr-funsd.yaml"]
    first, second = parse_eval_result_entries(yaml.safe_load(files["unit-nielsr-funsd.yaml"]))
    assert (first.dataset_id, first.task_id, first.value) == ("nielsr/funsd", "word_f1", 0.4)
    assert first.date == "2026-01-02T03:04:05+00:00"
    assert first.notes == "50 items, 1 failed, 95% interval 0.3000 to 0.5000, unit evaluate"
    assert (second.task_id, second.value) == ("cer", 0.6)
    (third,) = parse_eval_result_entries(yaml.safe_load(files["unit-ilsvrc-imagenet-1k.yaml"]))
    assert third.notes == "224 px, unit evaluate"


def test_sets_of_ours_are_in_the_model_index_and_others_figures_are_not(found):
    card = ModelCard(f"---\n{ModelCardData(model_name='m', eval_results=model_index(found)).to_yaml()}\n---\n")
    told = {(each.dataset_type, each.metric_name): each for each in card.data.eval_results}
    assert set(told) == {
        ("unit-heldout-blocks", "word F1, x-height 14 px"),
        ("nielsr/funsd", "word F1"),
        ("nielsr/funsd", "CER"),
        ("ILSVRC/imagenet-1k", "knn_accuracy, 224 px"),
        ("unit-heldout-pictures", "zero_shot_top1"),
        ("unit-heldout-pictures", "knn_accuracy, vision decoder"),
    }
    ours = told["unit-heldout-blocks", "word F1, x-height 14 px"]
    assert (ours.metric_value, ours.task_type, ours.metric_type) == (0.9123, "image-to-text", "f1")
    assert ours.metric_args == {"items": 60, "confidence": 0.95, "low": 0.9, "high": 0.93}
    assert told["nielsr/funsd", "CER"].metric_args["failed"] == 1


def test_an_encoder_alone_has_what_needs_no_decoder(found):
    told = {(each.dataset_type, each.metric_name) for each in model_index(found, full=False)}
    assert told == {("ILSVRC/imagenet-1k", "knn_accuracy, 224 px")}
    assert sorted(eval_result_files(found, full=False)) == ["unit-ilsvrc-imagenet-1k.yaml"]
    assert of_encoder(row("knn_accuracy", 0.5, suite="image", at={"way": "no vision decoder"}))


def test_both_are_written_beside_the_report(found, tmp_path):
    write_hub_results(found, tmp_path)
    index = yaml.safe_load((tmp_path / "model-index.yaml").read_text(encoding="utf-8"))
    name, entries = model_index_to_eval_results(index["model-index"])
    assert name == "my-model"
    assert len(entries) == 6
    assert len(list((tmp_path / "eval_results").iterdir())) == 2


def test_without_sets_of_the_hub_there_is_no_file_of_its_format(tmp_path):
    write_hub_results(results(row("word_f1", 0.5)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model-index.yaml"]
    write_hub_results(results(), tmp_path / "none")  # nothing measured, nothing written
