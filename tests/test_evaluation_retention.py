"""The suite "retention": a student that has not moved keeps everything; what has moved is measured by hand."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from tiny import image_processor, processor, unit_model, vision_config

from modeling_unit import UnitVisionModel
from training.evaluation import retention
from training.evaluation.contract import ENCODE, NotMeasured, Options, Work
from training.evaluation.subjects import ModelSubject
from training.teacher import PROJECTION_FILE

WIDTH = 32


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An encoder with its projection beside it."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    UnitVisionModel(vision_config()).eval().save_pretrained(folder)
    save_file({"weight": torch.randn(384, WIDTH)}, str(folder / PROJECTION_FILE))
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    """A full model whose encoder is the teacher's, before any training."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(2)
    model = unit_model(projection_dim=384)
    model.vision_model.load_state_dict(UnitVisionModel.from_pretrained(teacher).state_dict())
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory):
    """Another encoder of width 48, with nothing to name by."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(3)
    UnitVisionModel(vision_config(hidden_size=48)).eval().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Four kinds of noise, three pictures by each of three hands."""
    folder = tmp_path_factory.mktemp("pictures-validation")
    rng, rows = np.random.default_rng(0), []
    for kind, most in (("dark", 60), ("dim", 120), ("light", 200), ("loud", 255)):
        for hand in ("one", "two", "three"):
            for number in range(3):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, most, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
                image = {"bytes": buffer.getvalue(), "path": f"{kind}-{hand}-{number}"}
                rows.append({"image": image, "text": kind, "concept": kind, "style": hand, "family": hand})
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000-of-00001.parquet")
    (folder / "concept_names.json").write_text(json.dumps(["dark", "dim", "light", "loud"]))
    embeddings = np.random.default_rng(0).normal(size=(4, 384)).astype(np.float32)
    save_numpy({"embeddings": embeddings}, str(folder / "concept_sentence.safetensors"))
    return Options(pictures=folder)


def measured(evaluator, student, teacher):
    subjects = {"model": ModelSubject(student), "teacher": ModelSubject(teacher, "teacher", "teacher")}
    work = Work(progress=False, batch_size=8, subjects=subjects)
    return list(evaluator.figures(subjects["model"], work))


def at(figures, **where):
    return {f.name: f for f in figures if all(f.at.get(key) == value for key, value in where.items())}


def test_an_encoder_that_has_not_moved_keeps_every_feature(student, teacher, options):
    figures = measured(retention.FeaturesKept(options), student, teacher)
    for feature in ("class token", "patch mean", "patches"):
        kept = at(figures, scale="x1", way="encoder", feature=feature)
        assert kept["cosine"].value == pytest.approx(1, abs=1e-6)
        assert kept["cosine"].high - kept["cosine"].low < 1e-6
        assert kept["cka"].value == pytest.approx(1, abs=1e-6)
    assert at(figures, scale="x1", way="encoder", feature="class token")["mutual_neighbours"].value == 1
    # at x4 it sees other pixels; its vision decoder has learned nothing
    assert at(figures, scale="x4", way="encoder", feature="patches")["cosine"].value < 0.9999
    assert at(figures, scale="x1", way="vision decoder", feature="class token")["cosine"].value < 0.9
    assert {figure.items for figure in figures} == {36}


def test_an_encoder_that_has_not_moved_keeps_all_recognition(student, teacher, options):
    figures = measured(retention.RecognitionKept(options), student, teacher)
    kept = [f for f in figures if f.at["scale"] == "x1" and f.at.get("way") != "vision decoder"]
    gains = [f for f in kept if f.name in ("gain_knn_accuracy", "gain_probe_accuracy")]
    assert len(gains) == 3  # k-NN of either feature, a probe of the class token
    assert all((f.value, f.low, f.high) == (0, 0, 0) for f in gains)
    assert [(f.value, f.low, f.high) for f in kept if f.name == "knn_agreement"] == [(1, 1, 1)] * 2
    assert {f.name for f in figures} >= {"gain_zero_shot_top1", "gain_zero_shot_top5"}
    assert {f.at["over"] for f in figures} == {"teacher"}


def test_an_encoder_that_has_not_moved_names_as_its_teacher(student, teacher, options, tmp_path):
    """With the teacher's projection on its class token; the vision decoder in between has learned nothing."""
    import shutil

    from safetensors.torch import load_file

    twin = shutil.copytree(student, tmp_path / "twin")
    weights = load_file(twin / "model.safetensors")
    (key,) = [key for key in weights if key.endswith("visual_projection.weight")]
    weights[key] = load_file(teacher / PROJECTION_FILE)["weight"]
    save_file(weights, str(twin / "model.safetensors"), metadata={"format": "pt"})
    figures = measured(retention.RecognitionKept(options), twin, teacher)
    kept = at(figures, scale="x1", way="class token")
    for name in ("gain_zero_shot_top1", "gain_zero_shot_top5"):
        assert (kept[name].value, kept[name].low, kept[name].high) == (0, 0, 0)


def test_patches_at_x4_are_pooled_to_the_teachers_before_they_are_compared(student, teacher, options):
    figures = measured(retention.FeaturesKept(options), student, teacher)
    found = at(figures, scale="x4", way="vision decoder", feature="patches")["cosine"].value
    model, encoder = ModelSubject(student).encoder(), ModelSubject(teacher).encoder()
    pictures = retention.HeldOutPictures(options.pictures)
    cosines = []
    for index in range(len(pictures)):
        small, large = pictures.picture(index, 32), pictures.picture(index, 64)
        with torch.inference_mode():
            target = encoder.model(encoder.pixels([small])).last_hidden_state[:, 1:]
            seen = model.model.get_image_features(model.pixels([large], 64))
            predicted = model.model.reconstruct(seen, grid=(4, 4))[:, 1:]  # as training makes it
        cosines.append(torch.nn.functional.cosine_similarity(predicted, target, dim=-1).mean().item())
    assert found == pytest.approx(np.mean(cosines), abs=1e-5)


def test_teachers_of_another_width_have_cka_but_no_cosine(student, wide_teacher, options):
    figures = measured(retention.FeaturesKept(options), student, wide_teacher)
    found = at(figures, scale="x1", way="encoder", feature="class token")
    assert set(found) == {"cka", "cka_debiased", "mutual_neighbours"}
    assert 0 <= found["cka"].low <= found["cka"].value <= found["cka"].high <= 1


def test_a_teacher_that_cannot_name_is_compared_in_the_rest(student, wide_teacher, options):
    names = {figure.name for figure in measured(retention.RecognitionKept(options), student, wide_teacher)}
    assert names == {"gain_knn_accuracy", "gain_probe_accuracy", "knn_agreement"}


def test_without_a_teacher_there_is_one_line(student, options):
    subject = ModelSubject(student)
    for evaluator in retention.evaluators(options):
        assert (evaluator.suite, evaluator.against) == ("retention", "teacher")
        assert ENCODE in evaluator.needs
        with pytest.raises(NotMeasured, match="--teacher"):
            list(evaluator.figures(subject, Work(progress=False, subjects={"model": subject})))


def test_agreement_counts_what_both_name_alike_rightly_or_wrongly(monkeypatch):
    monkeypatch.setattr(retention, "KNN", 1)
    kinds, families = np.array(["a", "a", "b", "b"]), np.array(["x", "y", "x", "y"])
    east, north = [1.0, 0.0], [0.0, 1.0]

    class Features(SimpleNamespace):
        def __getitem__(self, name):
            return self.rows

    right = Features(rows=np.array([east, east, north, north]), failed=np.zeros(4, dtype=bool))
    wrong = Features(rows=np.array([east, north, north, east]), failed=np.zeros(4, dtype=bool))  # finds the other kind
    half = Features(rows=np.array([east, [1.0, 0.1], [0.9, 0.5], [0.0, 1.0]]), failed=np.zeros(4, dtype=bool))
    assert retention.named_alike(right, right, "f", kinds, families).all()
    assert retention.named_alike(wrong, wrong, "f", kinds, families).all()  # wrong in the same way
    assert not retention.named_alike(right, wrong, "f", kinds, families).any()
    # of half: 0 finds 1 (a), 1 finds 0 (a), 2 finds 1 (a), 3 finds 2 (b)
    assert retention.named_alike(right, half, "f", kinds, families).tolist() == [True, True, False, True]
