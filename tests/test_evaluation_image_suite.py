"""The suite `image`: weighted k-NN, probes, retrieval, naming by text towers, segmentation, ImageNet, bad input."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import tiny
from training.evaluation import features as features_module
from training.evaluation import picture_sets
from training.evaluation.contract import ENCODE, NAME, NotMeasured, Options, Work
from training.evaluation.features import picture_features
from training.evaluation.image import average_precision, knn_weighted_correct, recalled, retrieval, weighted_vote
from training.evaluation.image_suite import Classes, Naming, Recognition, Segmentation, evaluators
from training.evaluation.picture_sets import (
    ClassFolder,
    HeldOutPictures,
    HubClasses,
    centre_crop,
    image_columns,
)
from training.evaluation.probe import fit_probe, group_folds, probe_correct
from training.evaluation.segmentation import (
    GROUPS,
    HubMasks,
    MadeScenes,
    MaskFolder,
    confusion,
    mean_iou,
    patch_shares,
    pixel_accuracy,
    segmentation_figures,
    upsampled_labels,
)
from training.evaluation.text_tower import PHOTO_PROMPTS, TextTower, class_vectors

# ------------------------------------------------------------------------------------------------- k-NN, retrieval


def test_a_weighted_vote_by_hand():
    # Cosines 0.9 for "a", 0.8 and 0.8 for "b". At temperature 1: e^0.9 = 2.46 < 2 e^0.8 = 4.45, two far ones win. At
    # 0.07: e^(0.1 / 0.07) = 4.17 > 2, the near one wins.
    similarity = np.array([[0.9, 0.8, 0.8]])
    labels = np.array([0, 1, 1])
    assert weighted_vote(similarity, labels, 2, k=3, temperature=1.0).tolist() == [1]
    assert weighted_vote(similarity, labels, 2, k=3, temperature=0.07).tolist() == [0]
    assert weighted_vote(similarity, labels, 2, k=1, temperature=1.0).tolist() == [0]  # the others have no vote


def test_weighted_neighbours_are_of_other_styles():
    features = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    labels = ["a", "a", "b", "b"]
    assert knn_weighted_correct(features, labels, ["ink", "oil", "ink", "oil"]).tolist() == [True] * 4
    assert knn_weighted_correct(features, labels, ["ink", "ink", "oil", "oil"]).tolist() == [False] * 4
    with pytest.raises(ValueError, match="no picture of another style"):
        knn_weighted_correct(features, labels, ["ink"] * 4)


def test_average_precision_by_hand():
    similarity = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]])
    relevant = np.array([[True, False, True, False], [False, False, False, True], [False] * 4])
    found = average_precision(similarity, relevant)
    assert found[:2] == pytest.approx([(1 / 1 + 2 / 3) / 2, 1 / 4])
    assert np.isnan(found[2])


def test_items_outside_of_the_gallery_and_ties_do_not_help():
    similarity = np.array([[-np.inf, 0.5, 0.5]])
    assert average_precision(similarity, np.array([[True, True, False]])) == pytest.approx([1 / 2])
    assert recalled(similarity, np.array([[True, True, False]]), 1).tolist() == [False]
    assert recalled(similarity, np.array([[True, True, False]]), 2).tolist() == [True]
    assert recalled(similarity, np.array([[True, False, False]]), 3).tolist() == [False]


def test_a_kind_that_only_one_hand_drew_is_not_asked_for():
    found = retrieval([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], ["a", "a", "b"], ["ink", "oil", "ink"])
    assert found["map"][:2].tolist() == [1.0, 1.0]
    assert found["recall1"][:2].tolist() == [1.0, 1.0]
    assert np.isnan(found["map"][2])
    assert np.isnan(found["recall5"][2])


# ---------------------------------------------------------------------------------------------------------- probes


def separable(count=60, classes=3, width=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, width)).astype(np.float32) * 0.1
    features[np.arange(count), labels] += 3
    return features * [1, 100, 0.01, 1, 1] + [0, 5, 0, 1e3, 0], labels, np.arange(count) // classes % 4


def test_a_probe_separates_what_is_separable_at_any_scale_of_the_features():
    features, labels, groups = separable()
    assert probe_correct(features, labels, groups).all()


def test_a_probe_of_shuffled_labels_is_near_chance():
    features, labels, groups = separable(count=300)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert probe_correct(features, shuffled, groups).mean() == pytest.approx(1 / 3, abs=0.12)


def test_a_probe_learns_nothing_from_the_group_it_is_scored_on():
    # In each group the two directions mean the opposite of what they mean in the other one.
    features = np.array([[1.0, 0.0], [0.0, 1.0]] * 20)
    groups = np.arange(40) // 20
    labels = np.where(groups == 0, np.arange(40) % 2, 1 - np.arange(40) % 2)
    assert not probe_correct(features, labels, groups).any()


def test_softmax_regression_reaches_the_optimum():
    # Two points at -1 and 1: by symmetry weights are (-w, w), and the gradient of mean cross-entropy plus
    # penalty / 2 * 2 w^2 vanishes at 2 * sigmoid(-2w) = 2 * penalty * w, for each of the two weights half of it.
    probe = fit_probe(np.array([[-1.0], [1.0]]), np.array([0, 1]), 2, penalty=0.1)
    weight = float(probe.weight[1, 0])
    assert 1 / (1 + np.exp(2 * weight)) == pytest.approx(0.1 * weight, abs=1e-3)
    assert probe.weight[0, 0] == pytest.approx(-weight, abs=1e-3)


def test_soft_targets_are_reproduced_where_there_is_one_point():
    probe = fit_probe(np.zeros((1, 2)), np.array([[0.7, 0.2, 0.1]]), 3, penalty=0.1)
    logits = probe.logits(np.zeros((1, 2)))[0]
    assert np.exp(logits) / np.exp(logits).sum() == pytest.approx([0.7, 0.2, 0.1], abs=1e-2)


def test_groups_stay_whole_and_folds_even():
    groups = np.array(list("aaaaaabbbccd"))  # 6 | 3 + 2 + 1
    fold = group_folds(groups, 2)
    assert {tuple(sorted(set(groups[fold == f]))) for f in (0, 1)} == {("a",), ("b", "c", "d")}
    assert len(set(group_folds(groups, 9))) == 4


@pytest.mark.parametrize(
    ("labels", "groups", "message"), [([0], [0, 1], "1 labels"), ([0, 1], [0, 0], "two groups at least")]
)
def test_a_probe_refuses_what_it_cannot_score(labels, groups, message):
    with pytest.raises(ValueError, match=message):
        probe_correct([[1.0], [0.0]], labels, groups)


# ---------------------------------------------------------------------------------------------------- segmentation


def test_mean_iou_and_pixel_accuracy_by_hand():
    truth = np.array([[1, 1, 2], [2, 0, 255]], dtype=np.uint8)
    predicted = np.array([[1, 2, 2], [2, 1, 2]])
    matrix = confusion(truth, predicted, 3)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    # Class 1: 1 of 2; class 2: 2 of 3; class 3 is nowhere and does not count.
    assert mean_iou(matrix) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert pixel_accuracy(matrix) == pytest.approx(3 / 4)


def test_a_scene_without_an_answer_is_wrong_everywhere():
    matrix = confusion(np.array([[1, 2]], dtype=np.uint8), None, 2)
    assert matrix.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert mean_iou(matrix) == 0.0
    assert pixel_accuracy(matrix) == 0.0


def test_shares_of_a_patch_leave_out_what_is_not_scored():
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[:2, :2] = 3
    mask[:2, 2] = 1
    mask[:2, 3] = 2
    mask[2:, :2] = [[0, 5], [255, 5]]
    shares = patch_shares(mask, 2, 2)  # four patches of 2 x 2 pixels
    assert shares[0, 3] == 1.0
    assert shares[1, [1, 2]].tolist() == [0.5, 0.5]
    assert shares[2, 5] == 1.0
    assert shares[3].sum() == 0.0


def test_upsampled_labels_follow_the_larger_logit():
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # left column class 1, right column class 2
    assert upsampled_labels(logits, 2, 2, 4).tolist() == [[1, 1, 2, 2]] * 4


def test_every_kind_that_is_evaluated_has_a_group():
    from importlib.resources import files

    import yaml

    text = files("training.data").joinpath("heldout.yaml").read_text(encoding="utf-8")
    concepts = yaml.safe_load(text)["pictures"]["concepts"]
    kinds = [kind for kinds in GROUPS.values() for kind in kinds]
    assert len(kinds) == len(set(kinds))
    assert set(kinds) == {each["name"] for each in concepts if not each.get("not_evaluated")}


# --------------------------------------------------------------------------------- a tiny set and what looks at it

KINDS = {"zebra": (255, 0, 0), "carrot": (0, 200, 0), "tractor": (0, 0, 255)}
STYLES = ("ink", "oil", "chalk", "gcompris-photo")


class ColourEncoder:
    """Tokens that hold the mean colour of every patch: all that these sets need."""

    resolution, patch_size, projection, naming = 32, 8, None, {}

    def __init__(self, breaks_at=None):
        self.calls, self.breaks_at = 0, breaks_at

    def tokens(self, pictures, resolution=None):
        side = resolution or self.resolution
        assert {picture.size for picture in pictures} == {(side, side)}
        assert {picture.mode for picture in pictures} == {"RGB"}
        self.calls += 1
        pixels = torch.stack([torch.from_numpy(np.asarray(picture, dtype=np.float32)) for picture in pictures]) / 255
        grid = side // self.patch_size
        patches = pixels.reshape(len(pictures), grid, self.patch_size, grid, self.patch_size, 3).mean(dim=(2, 4))
        patches = patches.flatten(1, 2) - 0.5
        mean = patches.mean(dim=1)
        if self.breaks_at is not None and self.breaks_at(mean).any():
            raise RuntimeError("out of luck")
        return mean - mean.mean(dim=1, keepdim=True), patches


class Fake:
    """A subject around an encoder."""

    name, role, path, device, can = "fake", "model", "fake", "cpu", frozenset({ENCODE})
    number = 0

    def __init__(self, encoder=None):
        Fake.number += 1
        self._encoder, self._hash = encoder or ColourEncoder(), f"fake {Fake.number}"
        self._encoder.model = torch.nn.Identity()
        self._encoder.model.config = type("Config", (), {"hidden_size": 3})()

    def hash(self):
        return self._hash

    def encoder(self):
        return self._encoder


def quiet(**changes) -> Work:
    return Work(progress=False, **changes)


def write_held_out(folder, broken=None, width=3):
    """Three kinds in four styles that differ in transparency; ``broken`` (kind, style) is no picture at all."""
    from training.data.pictures import write_pictures

    rows = []
    for kind, colour in KINDS.items():
        for alpha, style in zip((255, 235, 215, 195), STYLES, strict=True):
            content = tiny.png(Image.new("RGBA", (20, 20), (*colour, alpha)))
            if (kind, style) == broken:
                content = content[:40]
            rows.append(
                {
                    "image": {"bytes": content, "path": f"{style}/{kind}.png"}, "text": f"a {kind}",
                    "task": "caption", "kind": "natural", "char_boxes": [], "x_height": 0.0, "source": "test",
                    "license": "none", "split": "validation", "concept": kind, "group": "", "style": style,
                    "family": style, "keywords": [], "author": "",
                }
            )  # fmt: skip
    write_pictures(rows, folder)
    (folder / "concept_names.json").write_text(json.dumps(sorted(KINDS)))  # carrot, tractor, zebra
    of = {"carrot": 1, "tractor": 2, "zebra": 0}
    names = torch.stack([torch.eye(width)[of[kind]] for kind in sorted(KINDS)])
    order = [row["concept"] for row in HeldOutRows(folder)]
    sentence = torch.stack([torch.eye(width)[of[kind]] for kind in order]).half()
    save_file({"embeddings": names, "sentence": sentence}, folder / "concept_sentence.safetensors")
    return folder


def HeldOutRows(folder):
    from training.data.targets import rows

    return list(rows(folder, ["concept"]))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_held_out(tmp_path_factory.mktemp("pictures"))


def by_name(figures):
    return {(figure.name, *figure.at.values()): figure for figure in figures}


def test_a_perfect_encoder_is_perfect_in_every_figure(held_out):
    work = quiet()
    found = by_name(Recognition(HeldOutPictures(held_out)).figures(Fake(), work))
    names = ["knn_accuracy", "knn_accuracy_photographs", "knn_weighted_accuracy", "probe_accuracy"]
    names += ["retrieval_map", "retrieval_recall1", "retrieval_recall5"]
    assert set(found) == {(name, feature) for name in names for feature in ("class token", "patch mean")}
    assert {figure.value for (_, feature), figure in found.items() if feature == "class token"} == {1.0}
    assert found["knn_accuracy", "class token"].items == 12
    assert found["knn_accuracy_photographs", "class token"].items == 3
    assert len(work.items) == 12
    assert work.items[0]["knn_accuracy, class token"] is True


def test_a_broken_picture_and_one_the_encoder_chokes_on_count_as_wrong(tmp_path):
    folder = write_held_out(tmp_path, broken=("zebra", "oil"))
    subject = Fake(ColourEncoder(breaks_at=lambda mean: (mean[:, 2] > 0.25) & (mean[:, 0] < -0.3)))
    work = quiet(batch_size=5)
    pictures = HeldOutPictures(folder)
    features = picture_features(subject, pictures, None, work)
    broken = {row["image"]["path"] for row, failed in zip(pictures.rows, features.failed, strict=True) if failed}
    assert "oil/zebra.png" in broken
    assert broken - {"oil/zebra.png"}
    assert all("tractor" in path for path in broken - {"oil/zebra.png"})
    found = by_name(Recognition(pictures).figures(subject, work))
    figure = found["knn_weighted_accuracy", "class token"]
    assert (figure.items, figure.failed) == (12, len(broken))
    assert figure.value <= (12 - len(broken)) / 12
    assert any("count as wrong" in note for note in work.notes)


def test_features_are_taken_once_for_the_same_subject_pictures_and_resolution(held_out):
    subject, pictures = Fake(), HeldOutPictures(held_out)
    one = picture_features(subject, pictures, None, quiet())
    calls = subject.encoder().calls
    assert picture_features(subject, HeldOutPictures(held_out), 32, quiet()) is one
    assert subject.encoder().calls == calls
    other = picture_features(subject, pictures, 50, quiet())  # in whole patches of 8
    assert (other.resolution, subject.encoder().calls > calls) == (48, True)
    assert picture_features(Fake(), pictures, None, quiet()) is not one
    with pytest.raises(ValueError, match="read-only"):
        one["class token"][0] = 0


def test_memory_of_features_is_bounded(held_out, monkeypatch):
    monkeypatch.setattr(features_module, "KEPT", 2)
    monkeypatch.setattr(features_module, "_memory", {})
    for _ in range(3):
        picture_features(Fake(), HeldOutPictures(held_out), None, quiet())
    assert len(features_module._memory) == 2


def test_an_encoder_that_always_fails_is_one_line(held_out):
    subject = Fake(ColourEncoder(breaks_at=lambda mean: mean[:, 0] < 9))
    with pytest.raises(NotMeasured, match=r"fails at all 12 of held-out pictures: RuntimeError: out of luck"):
        list(Recognition(HeldOutPictures(held_out)).figures(subject, quiet()))


def test_pictures_that_are_not_there_name_the_command(tmp_path):
    with pytest.raises(NotMeasured, match="`unit data pictures`"):
        Recognition(HeldOutPictures(tmp_path / "nowhere")).fingerprint()


def test_fingerprints_need_no_torch(held_out):
    code = (
        "import sys; from pathlib import Path\n"
        "from training.evaluation.contract import Options\n"
        "from training.evaluation.image_suite import evaluators\n"
        f"[each.fingerprint() for each in evaluators(Options(pictures=Path({str(held_out)!r})))]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_suite_and_what_its_options_decide(held_out):
    names = [each.name for each in evaluators(Options(pictures=held_out))]
    assert names == ["held-out pictures", "held-out pictures by their names", "segmentation of made scenes"]
    named = evaluators(Options(pictures=held_out, imagenet="ILSVRC/imagenet-1k", segmentation="some/ade"))
    assert [each.name for each in named[2:]] == ["segmentation of ade", "classes of imagenet-1k"]
    plain, large = (Recognition(HeldOutPictures(held_out), sides) for sides in ((None,), (64,)))
    assert plain.fingerprint() != large.fingerprint()
    figures = list(large.figures(Fake(), quiet()))
    assert {figure.at["resolution"] for figure in figures} == {64}


# ---------------------------------------------------------------------------------------------------------- naming


class Named(Fake):
    """A subject whose class token is its embedding in the space of the names."""

    can = frozenset({ENCODE, NAME})

    def __init__(self, width=3):
        super().__init__()
        encoder = self._encoder
        encoder.projection = torch.eye(width, 3)
        encoder.naming = {"": lambda tokens: tokens @ encoder.projection.T}


def test_names_and_captions_in_the_models_own_space(held_out):
    found = by_name(Naming(HeldOutPictures(held_out)).figures(Named(), quiet()))
    assert {figure.value for figure in found.values()} == {1.0}
    assert found["zero_shot_top1", "class token"].items == 12
    assert found["text_to_image_recall1", "class token"].items == 3  # distinct captions
    assert set(found) == {
        (f"{name}{k}", "class token")
        for name in ("zero_shot_top", "image_to_text_recall", "text_to_image_recall")
        for k in (1, 5)
    }


def test_a_model_without_a_projection_says_what_would_help(held_out):
    with pytest.raises(NotMeasured, match="--text-tower"):
        list(Naming(HeldOutPictures(held_out)).figures(Fake(), quiet()))


def test_a_projection_of_another_width_is_refused_with_both_widths(held_out):
    with pytest.raises(NotMeasured, match=r"vectors of 5, .* have 3"):
        list(Naming(HeldOutPictures(held_out)).figures(Named(width=5), quiet()))


def word_tokenizer(folder, **special):
    """A tokenizer of whole words beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", "[UNK]", "a", "the", "of", "photo", "picture", "zebra", "carrot", "tractor"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {**SMALL, "vocab_size": 11, "max_position_embeddings": 16, "bos_token_id": 3, "eos_token_id": 1}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=WORDS, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    word_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    text = WORDS | {"projection_size": 16}
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    word_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_a_dual_encoder_names_as_transformers_own_model_does(model, request, held_out):
    from transformers import AutoModel

    from training.evaluation.image_suite import find_tower, naming_ways
    from training.evaluation.subjects import ModelSubject

    folder = request.getfixturevalue(model)
    subject, pictures = ModelSubject(folder), HeldOutPictures(held_out)
    tower = find_tower(subject, None)  # its own text half
    ways, failed, side = naming_ways(subject, pictures, None, quiet(), tower, tower.width)
    assert (list(ways), failed.any(), side) == ([{"clip": "class token", "siglip": "patch tokens"}[model]], False, 32)
    pixels = subject.encoder().pixels([pictures.picture(i, 32) for i in range(len(pictures))])
    with torch.no_grad():
        found = AutoModel.from_pretrained(folder).get_image_features(pixels)
    expected = getattr(found, "pooler_output", found).numpy()
    assert next(iter(ways.values())) == pytest.approx(expected, abs=1e-5)
    figures = list(Naming(pictures, text_tower=folder).figures(subject, quiet()))
    assert [figure.name for figure in figures[:2]] == ["zero_shot_top1", "zero_shot_top5"]


def test_a_full_model_started_from_clip_is_named_through_its_vision_decoder_and_without(clip, held_out, tmp_path):
    from transformers import CLIPModel

    from modeling_unit import UnitForPreTraining
    from training.evaluation.image_suite import naming_ways
    from training.evaluation.subjects import ModelSubject

    torch.manual_seed(3)
    vision = {"model_type": "clip_vision_model", **SMALL, "image_size": 32, "patch_size": 8}
    tiny.unit_model(vision=vision).save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    subject, pictures, tower = ModelSubject(tmp_path), HeldOutPictures(held_out), TextTower(clip)
    ways, failed, _ = naming_ways(subject, pictures, None, quiet(), tower, tower.width)
    model, whole = UnitForPreTraining.from_pretrained(tmp_path), CLIPModel.from_pretrained(clip)
    pixels = subject.encoder().pixels([pictures.picture(i, 32) for i in range(len(pictures))])
    with torch.no_grad():
        token = model.vision_model(pixels).last_hidden_state[:, 0]
        expected = {
            way: whole.visual_projection(whole.vision_model.post_layernorm(each)).numpy()
            for way, each in (("class token", token), ("vision decoder", model.vision_decoder(token)))
        }
    assert set(ways) == set(expected)
    assert not failed.any()
    for way, found in ways.items():
        assert found == pytest.approx(expected[way], abs=1e-5)


def test_captions_without_embeddings_are_a_note(tmp_path):
    write_held_out(tmp_path)
    path = tmp_path / "concept_sentence.safetensors"
    save_file({"embeddings": torch.eye(3)[[1, 2, 0]]}, path)
    work = quiet()
    found = by_name(Naming(HeldOutPictures(tmp_path)).figures(Named(), work))
    assert set(found) == {("zero_shot_top1", "class token"), ("zero_shot_top5", "class token")}
    assert any("`unit data targets`" in note for note in work.notes)


def test_text_vectors_are_those_of_the_model(clip):
    from transformers import AutoTokenizer, CLIPModel

    tower = TextTower(clip)
    assert (tower.width, tower.image_width) == (12, 16)
    sentences = ["a zebra", "the photo of a carrot"]
    tokens = AutoTokenizer.from_pretrained(clip)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        words = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        found = CLIPModel.from_pretrained(clip).get_text_features(**words)
    expected = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
    assert tower.embed(sentences) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_a_sentence_encoder_pools_as_its_folder_says(tmp_path, first):
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    BertModel(BertConfig(**{**SMALL, "vocab_size": 11})).save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    if first:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    tower = TextTower(str(tmp_path))
    assert (tower.width, tower.image_width) == (16, None)
    tokens = AutoTokenizer.from_pretrained(tmp_path)(["a photo of a zebra"], return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path)(tokens["input_ids"]).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden[0] if first else hidden.mean(dim=0), dim=-1).numpy()
    assert tower.embed(["a photo of a zebra", "a zebra"])[0] == pytest.approx(expected, abs=1e-5)


def test_a_tower_that_fits_nothing_says_what_would(clip, held_out):
    with pytest.raises(NotMeasured, match=r"vectors of 12 and projects tokens of 16; fake .* has tokens of 3"):
        list(Naming(HeldOutPictures(held_out), text_tower=clip).figures(Fake(), quiet()))


def test_a_tower_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(NotMeasured, match="no text encoder can be loaded") as caught:
        TextTower(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_name_is_the_mean_of_its_prompts():
    def embed(sentences):
        return np.array([[1.0, 0.0] if sentence.startswith("a ") else [0.0, 1.0] for sentence in sentences])

    half = np.sqrt(0.5)
    assert class_vectors(embed, ["cat", "dog"], ["a {}", "the {}"]) == pytest.approx(np.full((2, 2), half))


def test_prompts_for_photographs_are_eighty_and_differ():
    assert len(set(PHOTO_PROMPTS)) == 80
    assert all(prompt.count("{}") == 1 for prompt in PHOTO_PROMPTS)


# ------------------------------------------------------------------------------------------ scenes and masked sets


def test_made_scenes_are_the_same_every_time_and_at_every_size(held_out):
    (train, test), (other_train, other_test) = MadeScenes(HeldOutPictures(held_out), 4).folds
    assert (train, test) == (other_test, other_train)
    again = MadeScenes(HeldOutPictures(held_out), 4).folds[0][0]
    assert train.picture(2, 64).tobytes() == again.picture(2, 64).tobytes()
    small = train.masks[2]
    train.picture(2, 128)
    assert small.shape == train.masks[2].shape == (128, 128)
    assert (small != train.masks[2]).mean() < 0.1
    assert set(np.unique(small)) <= {1, 2, 3, 4}  # ground, animal, food, vehicle
    assert len(set(np.unique(small))) > 1
    assert train.picture(2, 64).tobytes() != test.picture(2, 64).tobytes()
    assert (
        MadeScenes(HeldOutPictures(held_out), 4, seed=1).fingerprint
        != MadeScenes(HeldOutPictures(held_out), 4).fingerprint
    )


def test_a_probe_on_colours_finds_objects_of_three_colours_and_a_blind_one_only_the_ground(held_out):
    class Blind(ColourEncoder):
        def tokens(self, pictures, resolution=None):
            return tuple(torch.ones_like(tokens) for tokens in super().tokens(pictures, resolution))

    scenes = MadeScenes(HeldOutPictures(held_out), 30)
    seeing, blind = (
        by_name(segmentation_figures(subject, scenes, 64, quiet())) for subject in (Fake(), Fake(Blind()))
    )
    accuracy, iou = seeing["segmentation_pixel_accuracy", 64], seeing["segmentation_miou", 64]
    assert blind["segmentation_miou", 64].value < 0.25  # of four labels, the ground alone
    assert iou.value > 0.4
    assert accuracy.value > blind["segmentation_pixel_accuracy", 64].value + 0.1
    assert accuracy.items == 60
    assert iou.low <= iou.value <= iou.high


def write_ade(folder, count=6, labels=(1, 2)):
    """Left half one colour and label, right half the other."""
    for part, number in (("training", count), ("validation", count)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(number):
            pixels, mask = halves(index, labels)
            Image.fromarray(pixels).save(folder / "images" / part / f"{index}.jpg", quality=95)
            Image.fromarray(mask).save(folder / "annotations" / part / f"{index}.png")
    return folder


def halves(index, labels=(1, 2)):
    pixels, mask = np.zeros((32, 48, 3), dtype=np.uint8), np.zeros((32, 48), dtype=np.uint8)
    edge = (16, 24, 32)[index % 3]
    pixels[:, :edge], pixels[:, edge:] = (200, 30, 30), (30, 30, 200)
    mask[:, :edge], mask[:, edge:] = labels
    return pixels, mask


def test_a_folder_like_ade20k(tmp_path):
    write_ade(tmp_path)
    evaluator = Segmentation(HeldOutPictures(tmp_path), source=str(tmp_path))
    found = by_name(evaluator.figures(Fake(), quiet()))
    assert found["segmentation_pixel_accuracy",].value > 0.9
    assert found["segmentation_miou",].value > 0.8
    assert found["segmentation_miou",].items == 6
    assert len(MaskFolder(tmp_path, limit=2).folds[0][1]) == 2


def test_a_broken_picture_of_a_masked_set_is_wrong_and_a_broken_mask_is_told(tmp_path):
    write_ade(tmp_path)
    work = quiet()
    (tmp_path / "images" / "validation" / "1.jpg").write_bytes(b"no picture")
    (tmp_path / "annotations" / "validation" / "2.png").write_bytes(b"no mask")
    found = by_name(Segmentation(HeldOutPictures(tmp_path), source=str(tmp_path)).figures(Fake(), work))
    figure = found["segmentation_pixel_accuracy",]
    assert figure.items == 6
    assert figure.failed == 2
    assert figure.value < 0.85  # one of the five masks that can be read has no answer
    assert any("could not be read" in note for note in work.notes)


def test_masks_without_labels_are_one_line(tmp_path):
    write_ade(tmp_path, labels=(0, 255))
    with pytest.raises(NotMeasured, match="no labels"):
        list(Segmentation(HeldOutPictures(tmp_path), source=str(tmp_path)).figures(Fake(), quiet()))
    for mask in (tmp_path / "annotations").rglob("*.png"):
        mask.unlink()
    with pytest.raises(NotMeasured, match="no labels"):
        MaskFolder(tmp_path)


def parquet(folder, split, columns, class_names=None):
    """A parquet file as a data set of the Hub holds it, features in its metadata."""
    import datasets

    kinds = {name: datasets.Image() for name in columns if name != "label" or class_names is None}
    if class_names is not None:
        kinds["label"] = datasets.ClassLabel(names=class_names)
    data = {
        name: [{"bytes": v, "path": None} if isinstance(v, bytes) else v for v in vs] for name, vs in columns.items()
    }
    (folder / "data").mkdir(exist_ok=True)
    table = pa.table(data, schema=datasets.Features({name: kinds[name] for name in columns}).arrow_schema)
    pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")


def test_a_masked_set_in_parquet(tmp_path):
    for split in ("train", "validation"):
        pairs = [halves(index) for index in range(6)]
        columns = {"image": [tiny.png(Image.fromarray(p)) for p, _ in pairs]}
        columns["annotation"] = [tiny.png(Image.fromarray(m)) for _, m in pairs]
        parquet(tmp_path, split, columns)
    evaluator = Segmentation(HeldOutPictures(tmp_path), source=str(tmp_path), limit=5)
    assert isinstance(evaluator.scenes, HubMasks)
    found = by_name(evaluator.figures(Fake(), quiet()))
    assert found["segmentation_pixel_accuracy",].value > 0.9
    assert found["segmentation_pixel_accuracy",].items == 5


def test_columns_that_hold_no_masks_are_one_line():
    import datasets

    picture = datasets.Image()
    assert image_columns({"seg": picture, "img": picture, "id": datasets.Value("int64")}, "x") == ("img", "seg")
    assert image_columns({"image": picture, "depth": picture, "labels": picture}, "x") == ("image", "labels")
    with pytest.raises(NotMeasured, match="no labels"):
        image_columns({"image": picture}, "x")


# -------------------------------------------------------------------------------------------------------- ImageNet

COLOURS = {"n01": (220, 20, 20), "n02": (20, 220, 20)}


def coloured(colour, index):
    return Image.new("RGB", (40 + index, 60), tuple(max(0, part - 5 * index) for part in colour))


@pytest.fixture
def classes(tmp_path):
    for split in ("val", "train"):
        for name, colour in zip(("n01440764", "n01443537"), COLOURS.values(), strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                coloured(colour, index).save(tmp_path / split / name / f"{index}.JPEG")
    return tmp_path


def test_a_folder_like_imagenet(classes):
    (classes / "val" / "n01440764" / "0.JPEG").write_bytes(b"no picture")
    work = quiet()
    found = by_name(Classes(str(classes)).figures(Fake(), work))
    assert found["knn_weighted_accuracy", "class token"].value == pytest.approx(5 / 6)
    assert found["probe_accuracy", "patch mean"].value == pytest.approx(5 / 6)
    assert (found["probe_accuracy", "class token"].items, found["probe_accuracy", "class token"].failed) == (6, 1)
    assert not any(name.startswith("zero_shot") for name, *_ in found)
    assert any("classes.txt" in note for note in work.notes)


def test_names_of_classes(classes, tmp_path):
    assert ClassFolder(classes).names is None  # WordNet ids
    (classes / "classes.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert ClassFolder(classes).names == ["tench", "goldfish"]
    (classes / "classes.txt").write_text("n01440764 tench\n")
    with pytest.raises(NotMeasured, match="the first of them n01443537"):
        _ = ClassFolder(classes).names


def test_imagenet_without_a_train_part_is_named_only(classes, clip):
    import shutil

    from training.evaluation.subjects import ModelSubject

    shutil.rmtree(classes / "train")
    (classes / "classes.txt").write_text("n01440764 zebra\nn01443537 carrot\n")
    work = quiet()
    found = by_name(Classes(str(classes), limit=4).figures(ModelSubject(clip), work))
    assert set(found) == {("zero_shot_top1", "class token"), ("zero_shot_top5", "class token")}
    assert found["zero_shot_top5", "class token"].value == 1.0  # two classes
    assert found["zero_shot_top5", "class token"].items == 4
    assert any("no train part" in note for note in work.notes)


def test_imagenet_in_parquet(tmp_path):
    for split in ("train", "validation"):
        images = [tiny.png(coloured(colour, index)) for index in range(4) for colour in COLOURS.values()]
        parquet(tmp_path, split, {"image": images, "label": [0, 1] * 4}, ["tench, Tinca tinca", "gold_fish"])
    evaluator = Classes(str(tmp_path), limit=5)
    assert isinstance(evaluator.set, HubClasses)
    assert evaluator.set.names == ["tench", "gold fish"]
    found = by_name(evaluator.figures(Fake(), quiet()))
    assert found["knn_weighted_accuracy", "class token"].value == 1.0
    assert found["knn_weighted_accuracy", "class token"].items == 5


def test_a_train_part_is_cut_to_so_many_of_each_class(classes, monkeypatch):
    monkeypatch.setattr(picture_sets, "TRAIN_PER_CLASS", 2)
    assert ClassFolder(classes).train.labels.tolist() == [0, 0, 1, 1]


def test_sets_without_labels_or_not_there_are_one_line(tmp_path):
    with pytest.raises(NotMeasured, match="there is no val/"):
        ClassFolder(tmp_path)
    (tmp_path / "val").mkdir()
    coloured((1, 2, 3), 0).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(NotMeasured, match="no labels"):
        ClassFolder(tmp_path)
    with pytest.raises(NotMeasured, match="there is no such folder"):
        Classes(str(tmp_path / "nowhere")).fingerprint()
    with pytest.raises(NotMeasured, match="neither images/ and annotations/ nor parquet"):
        Segmentation(HeldOutPictures(tmp_path), source=str(tmp_path)).fingerprint()


def test_a_gated_set_says_what_to_do(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' is a gated dataset on the Hub.\nLog in.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(NotMeasured, match="accept its terms") as caught:
        _ = HubClasses("x/y").test
    assert "\n" not in str(caught.value)


def test_the_middle_square_is_kept():
    picture = Image.new("RGB", (30, 10), (255, 0, 0))
    picture.paste((0, 255, 0), (10, 0, 20, 10))
    assert np.asarray(centre_crop(picture, 10))[:, 2:8].reshape(-1, 3).tolist() == [[0, 255, 0]] * 60
