"""The suite "scale": CKA, neighbours, pooled grids and activations by hand, its evaluators on tiny models."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from tiny import image_processor, processor, unit_model

from training.evaluation import features, scale_suite, tokens
from training.evaluation.activations import ActivationStatistics, remark
from training.evaluation.contract import ENCODE, NotMeasured, Options, TextSample, Work
from training.evaluation.image import linear_cka
from training.evaluation.scale_suite import HeldOutDocuments, SomeKinds, text_gain
from training.evaluation.similarity import cka_interval, cosines, debiased_cka, mutual_neighbours, pool_grid
from training.evaluation.subjects import ModelSubject
from training.evaluation.text import count

# ---------------------------------------------------------------------------------------------------------------- CKA


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def hsic(one, other):
    """The unbiased estimator as Song et al. write it, of two (n, n) kernels."""
    n, ones = len(one), np.ones(len(one))
    k, m = one - np.diag(np.diag(one)), other - np.diag(np.diag(other))
    sums = ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + sums - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_debiased_cka_is_the_ratio_of_unbiased_hsics(shift):
    x = normal(20, 3) + shift
    y = np.concatenate([x[:, :1] ** 2, normal(20, 4, seed=1)], axis=1)
    centred = x - x.mean(axis=0)
    k, m = centred @ centred.T, y @ y.T
    assert debiased_cka(x, y) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), abs=1e-9)


def test_rotated_shifted_and_scaled_features_are_the_same_to_cka():
    x = normal(30, 6)
    rotation, _ = np.linalg.qr(normal(6, 6, seed=1))
    for debiased in (False, True):
        found = cka_interval(x, 3 * x @ rotation + 5, debiased=debiased)
        assert found.value == pytest.approx(1, abs=1e-12)
        assert (found.low, found.high) == (found.value, found.value)


def test_unrelated_features_are_near_zero_only_when_debiased():
    pairs = [(normal(100, 50, seed=2 * i), normal(100, 50, seed=2 * i + 1)) for i in range(20)]
    debiased = np.array([debiased_cka(*pair) for pair in pairs])
    assert abs(debiased.mean()) < 4 * debiased.std() / np.sqrt(20)
    assert debiased.std() < 0.05
    assert min(linear_cka(*pair) for pair in pairs) > 0.25


@pytest.mark.parametrize("debiased", [False, True])
def test_the_interval_of_cka_leaves_out_one_group_at_a_time(debiased):
    x, y = normal(24, 3), normal(24, 5, seed=1)
    y[:, 0] += 2 * x[:, 0]
    groups = np.arange(24) // 4
    measure = debiased_cka if debiased else linear_cka
    found = cka_interval(x, y, groups, debiased)
    assert found.value == pytest.approx(measure(x, y), abs=1e-12)
    left = np.arctanh([measure(x[groups != group], y[groups != group]) for group in range(6)])
    deviation = np.sqrt(5 / 6 * ((left - left.mean()) ** 2).sum())
    assert found.low == pytest.approx(np.tanh(np.arctanh(found.value) - 1.96 * deviation), abs=1e-9)
    assert found.high == pytest.approx(np.tanh(np.arctanh(found.value) + 1.96 * deviation), abs=1e-9)


def test_the_interval_of_cka_holds_what_is_true_about_as_often_as_it_says():
    # x and y share one of two channels of equal variance: HSIC(x, y) = 1, HSIC(x, x) = HSIC(y, y) = 2
    held = 0
    for seed in range(100):
        z = normal(150, 3, seed=seed)
        found = cka_interval(z[:, :2], z[:, 1:], debiased=True)
        held += found.low <= 0.5 <= found.high
    assert 86 <= held <= 100


@pytest.mark.parametrize(
    ("one", "other", "groups", "message"),
    [
        (np.ones((8, 2)), normal(8, 2), None, "constant"),
        (normal(8, 2), normal(7, 2), None, "a row per item"),
        (normal(3, 2), normal(3, 2), None, "at least 4"),
        (normal(8, 2), normal(8, 2), ["a"] * 8, "two groups"),
        (normal(8, 2), normal(8, 2), ["a", "b"], "8 items with 2 groups"),
        (np.full((8, 2), np.nan), normal(8, 2), None, "not finite"),
    ],
)
def test_cka_refuses_what_has_none(one, other, groups, message):
    with pytest.raises(ValueError, match=message):
        cka_interval(one, other, groups)


# ----------------------------------------------------------------------------------------------- neighbours and grids


def test_neighbours_that_both_agree_on():
    angles = np.radians([0, 10, 30, 60])
    one = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # nearest two: 0 -> 1 2, 1 -> 0 2, 2 -> 1 0|3, 3 -> 2 1
    angles = np.radians([0, 10, 60, 30])
    other = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # 0 -> 1 3, 1 -> 0 3, 2 -> 3 1, 3 -> 1 0|2
    # item 2 of one: 1 at 20 degrees, 0 and 3 both at 30, the earlier counts; item 3 of other likewise: 1, then 0
    assert mutual_neighbours(one, other, k=2).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert mutual_neighbours(one, 7 * one, k=2).tolist() == [1, 1, 1, 1]
    assert mutual_neighbours(one, other, k=3).tolist() == [1, 1, 1, 1]  # all others


def test_chance_agreement_of_neighbours_is_k_of_all_others():
    found = mutual_neighbours(normal(400, 8), normal(400, 8, seed=1), k=10)
    assert found.mean() == pytest.approx(10 / 399, abs=0.008)


@pytest.mark.parametrize("k", [0, 4])
def test_neighbours_need_more_items_than_k(k):
    with pytest.raises(ValueError, match="between 1 and 3"):
        mutual_neighbours(normal(4, 2), normal(4, 2), k)


def test_cosines_ignore_length_and_refuse_other_widths():
    assert cosines([[1, 0], [1, 1], [0, 0]], [[9, 0], [0, 2], [1, 0]]) == pytest.approx([1, 0.5**0.5, 0])
    with pytest.raises(ValueError, match="one shape"):
        cosines(normal(3, 2), normal(3, 4))


def test_a_finer_grid_is_the_mean_of_what_a_coarse_patch_covers():
    fine = np.arange(16, dtype=np.float32).reshape(1, 16, 1)
    assert pool_grid(fine, (4, 4), (2, 2)).ravel().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_grid(np.array([[[1.0], [5.0], [9.0]]]), (1, 3), (1, 2)).ravel().tolist() == [3, 7]  # the middle, twice
    assert pool_grid(fine, (4, 4), (4, 4)) is fine
    with pytest.raises(ValueError, match="cannot be pooled"):
        pool_grid(fine, (4, 4), (5, 1))
    with pytest.raises(ValueError, match="not of a grid"):
        pool_grid(fine, (4, 5), (2, 2))


def test_grids_are_pooled_as_the_vision_decoder_pools_them():
    fine = torch.from_numpy(normal(2, 35, 3))
    expected = torch.nn.functional.adaptive_avg_pool2d(fine.transpose(1, 2).unflatten(2, (5, 7)), (3, 2))
    np.testing.assert_allclose(pool_grid(fine.numpy(), (5, 7), (3, 2)), expected.flatten(2).transpose(1, 2).numpy())


def test_documents_of_two_scales_meet_on_the_coarser_grid():
    one = [np.array([[[1.0], [3.0]]]), np.array([[[5.0]], [[7.0]]])]  # 1 x 2, 2 x 1
    other = [np.arange(8.0).reshape(2, 4, 1), np.arange(2.0).reshape(1, 2, 1)]  # 2 x 4, 1 x 2
    first, second, owners = tokens.common_grids(one, other)
    assert first.ravel().tolist() == [1, 3, 6]
    assert owners.tolist() == [0, 0, 1]
    assert second.ravel().tolist() == [(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4, 0.5]


# -------------------------------------------------------------------------------------------------------- activations


def described(items, classes=None, groups=None):
    statistics = ActivationStatistics()
    for place, item in enumerate(items):
        statistics.add(np.array(item), None if classes is None else np.array(classes[place]))
    return {figure.name: figure for figure in statistics.figures({"layer": "last"}, groups)}


def test_activations_of_constructed_tokens():
    # one token of length 5, one of 13: squares sum to 194 in 4 values
    found = described([[[3.0, 4.0]], [[5.0, -12.0]]], classes=[[6.0, 8.0], [0.0, 2.0]])
    assert found["activation_rms"].value == pytest.approx((194 / 4) ** 0.5)
    assert found["activation_mean"].value == pytest.approx(0.0)
    assert found["activation_largest"].value == 12.0
    assert found["activation_largest"].low is None
    assert found["patch_norm"].value == pytest.approx(9.0)
    assert found["class_norm"].value == pytest.approx(6.0)
    assert (found["patch_norm"].low, found["patch_norm"].high) == (5.0, 13.0)
    assert found["activation_p999"].value == pytest.approx(12 - 0.003 * 7)  # linear between 5 and 12 of 3, 4, 5, 12
    assert found["patch_norm"].at == {"layer": "last"}
    assert found["patch_norm"].items == 2


def test_one_massive_channel_and_one_long_token_are_seen():
    item = np.ones((10, 20))
    item[:, 4] = 15.0  # every token is about as long
    found = described([item])
    assert found["activation_channels"].value == pytest.approx(1 / 20)
    assert found["outlier_tokens"].value == 0.0
    item = np.ones((10, 20))
    item[7] *= 4
    found = described([item])
    assert found["outlier_tokens"].value == pytest.approx(1 / 10)
    assert found["activation_channels"].value == 0.0


def test_items_of_different_lengths_weigh_by_their_tokens():
    found = described([np.full((3, 2), 2.0), np.full((1, 2), -2.0)])
    assert found["activation_mean"].value == pytest.approx(1.0)  # (3 * 2 - 2) / 4
    assert "class_norm" not in found


def test_a_large_tower_is_warned_of():
    assert "LayerNorm" in remark("x", 30.0, "pictures")
    assert "LayerNorm" not in remark("x", 1.2, "pictures")


# ------------------------------------------------------------------------------------------------ sets and tiny models


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four kinds, a colour each, three pictures by each of three hands: noise about the colour."""
    folder = tmp_path_factory.mktemp("pictures-validation")
    rng, rows = np.random.default_rng(0), []
    for kind, colour in (("blue", (0, 0, 200)), ("green", (0, 200, 0)), ("red", (200, 0, 0)), ("grey", (90, 90, 90))):
        for hand in ("one", "two", "three"):
            for number in range(3):
                pixels = np.clip(np.array(colour) + rng.integers(0, 55, (24, 24, 3)), 0, 255).astype(np.uint8)
                image = {"bytes": png(Image.fromarray(pixels)), "path": f"{kind}-{hand}-{number}"}
                rows.append({"image": image, "text": kind, "concept": kind, "style": hand, "family": hand})
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000-of-00001.parquet")
    (folder / "concept_names.json").write_text(json.dumps(["blue", "green", "grey", "red"]))
    embeddings = np.random.default_rng(0).normal(size=(4, 384)).astype(np.float32)
    save_file({"embeddings": embeddings}, str(folder / "concept_sentence.safetensors"))
    return folder


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Eight documents of 80 x 16 px, 20 patches, and four of 24 x 8, 3 patches; patches of 8 px."""
    folder = tmp_path_factory.mktemp("chunks-validation")
    rng, rows = np.random.default_rng(1), []
    for number in range(12):
        width, height = (80, 16) if number < 8 else (24, 8)
        image = Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8))
        row = {"image": {"bytes": png(image), "path": None}, "text": f"words of line {number}", "x_height": 8.0}
        row |= {"task": "ocr", "kind": "document", "license": "own", "split": "validation"}
        rows.append({**row, "source": f"{number % 3}.pdf#{number}", "char_boxes": []})
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """x1 is 32 px, 16 patches; x4 is 64 px, 64 patches, which is all that its positions cover twice."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    unit_model(projection_dim=384).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture
def subject(model):
    return ModelSubject(model, "tiny")


@pytest.fixture
def options(pictures, chunks):
    nothing = chunks / "nothing"
    return Options(pictures=pictures, chunks=chunks, blocks=nothing, sets=(f"syn-s={nothing}",))


def measured(evaluator, subject, **others):
    work = Work(progress=False, batch_size=4, subjects={"model": subject, **others})
    return list(evaluator.figures(subject, work)), work


def by_place(figures):
    # the resolution of x4 says so beside; what is measured at a scale alone has it for its place
    at = [[value for key, value in one.at.items() if key != "scale" or "resolution" not in one.at] for one in figures]
    return {(figure.name, *place): figure for figure, place in zip(figures, at, strict=True)}


def test_a_part_of_the_pictures_is_whole_kinds(pictures):
    whole = scale_suite.HeldOutPictures(pictures)
    some = SomeKinds(whole, 10)
    assert len(some) == 18
    assert len(set(some.kinds)) == 2
    assert SomeKinds(whole, None).fingerprint == whole.fingerprint != some.fingerprint
    assert len(SomeKinds(whole, 1000)) == 36
    assert some.picture(0, 16).size == (16, 16)
    assert [some.names[label] for label in some.labels] == some.kinds.tolist()


def test_documents_are_chosen_by_the_patches_that_they_cover(chunks):
    documents = HeldOutDocuments(chunks, chunks.parent / "nothing")
    assert {one.image.size for one in documents.choose(image_processor(), 16, 64, 100)} == {(80, 16)}
    assert [one.index for one in documents.choose(image_processor(), 0, 16, 2)] == [8, 10]  # spread
    with pytest.raises(NotMeasured, match="more than 64"):
        documents.choose(image_processor(), 64, 900, 10)
    with pytest.raises(NotMeasured, match="from-pdfs"):
        HeldOutDocuments(chunks.parent / "nothing", chunks).fingerprint()


def test_resolutions_are_whole_patches_as_far_as_positions_reach(subject):
    assert scale_suite.resolutions(subject, None) == [16, 24, 32, 48, 64, 96, 128]
    assert scale_suite.resolutions(subject, (30, 33, 50, 500)) == [32, 48]
    assert scale_suite.scales(subject) == (32, 64)


def test_pictures_are_recognised_at_every_resolution(subject, options):
    figures, work = measured(scale_suite.PicturesByResolution(options), subject)
    found = by_place(figures)
    for side in (16, 24, 32, 48, 64, 96, 128):
        # noise about a colour: whatever a random encoder does, kinds stay apart
        assert found["knn_accuracy", side, "patch mean"].value == 1.0
        assert found["probe_accuracy", side, "class token"].items == 36
        assert (
            0
            <= found["zero_shot_top1", side, "vision decoder"].value
            <= found["zero_shot_top5", side, "vision decoder"].value
        )
    assert found["zero_shot_top5", 32, "class token"].value == 1.0  # there are but four kinds
    assert "36 pictures of 4 kinds" in work.notes[0]


def test_a_picture_that_cannot_be_read_is_wrong_at_every_resolution(subject, options, monkeypatch):
    whole = scale_suite.HeldOutPictures.picture

    def picture(self, index, side):
        if index == 5:
            raise OSError("truncated")
        return whole(self, index, side)

    monkeypatch.setattr(scale_suite.HeldOutPictures, "picture", picture)
    monkeypatch.setattr(features, "_memory", {})
    figures, _ = measured(
        scale_suite.PicturesByResolution(Options(options.limit, pictures=options.pictures, resolutions=(32,))), subject
    )
    found = by_place(figures)["knn_accuracy", 32, "patch mean"]
    assert (found.failed, found.items, found.value) == (1, 36, pytest.approx(35 / 36))


def test_features_of_an_encoder_blind_to_scale_are_alike(subject, options, monkeypatch):
    # every picture of one colour is the same at any size: an encoder that sees the mean colour alone
    encoder = subject.encoder()

    def tokens_of(pictures, resolution=None):
        colour = torch.from_numpy(np.stack([np.asarray(one.resize((24, 24))).mean(axis=(0, 1)) for one in pictures]))
        noise = torch.from_numpy(normal(3, 32))
        classes = (colour / 255) @ noise
        return classes, classes[:, None].expand(-1, ((resolution or 32) // 8) ** 2, -1)

    monkeypatch.setattr(encoder, "tokens", tokens_of)
    monkeypatch.setattr(encoder, "naming", {})
    monkeypatch.setattr(features, "_memory", {})
    figures, _ = measured(scale_suite.AlikePictures(options), subject)
    found = by_place(figures)
    assert found["cosine", 64, "class token"].value > 0.999
    assert found["cka", 64, "patches"].value > 0.99
    assert found["cka", 64, "patches"].items == 36
    assert {figure.at["resolution"] for figure in figures} == {16, 24, 48, 64, 96, 128}
    assert found["mutual_neighbours", 128, "class token"].value > 0.5
    features._memory.clear()


def test_documents_at_two_scales(subject, options):
    figures, _ = measured(scale_suite.AlikeDocuments(options), subject)
    found = by_place(figures)
    assert {name for name, *_ in found} == {"cka", "cka_debiased", "cosine"}  # eight documents have not ten neighbours
    assert found["cka", "patches"].items == 8
    assert all(-1 <= figure.low <= figure.value <= figure.high <= 1.0 + 1e-9 for figure in figures)


def test_a_padded_batch_of_documents_gives_what_each_gives_alone(subject):
    images = [
        Image.fromarray((normal(height, width, seed=3) * 60 + 128).clip(0, 255).astype(np.uint8))
        for height, width in ((16, 80), (8, 24), (24, 24))
    ]
    together = tokens.document_tokens(subject, images, 64, Work(progress=False))
    assert [each.shape[:2] for each in together.patches] == [(2, 10), (1, 3), (3, 3)]
    for place, image in enumerate(images):
        alone = tokens.document_tokens(subject, [image], 64, Work(progress=False))
        np.testing.assert_allclose(together.classes[place], alone.classes[0], atol=1e-5)
        np.testing.assert_allclose(together.patches[place], alone.patches[0], atol=1e-5)


def test_a_document_has_at_most_the_patches_of_the_square(subject):
    settings = {"kind": "document", "scale": 1, "return_tensors": None}
    for side in (16, 32, 40, 64):
        made = tokens.sized(image_processor(), side)([Image.new("L", (80, 16))], **settings)
        rows, cols = made["spatial_shapes"][0]
        assert rows * cols <= (side // 8) ** 2
    assert (rows, cols) == (2, 10)  # its own size: never enlarged
    assert image_processor().base_size == 32
    assert tokens.x4_side(image_processor()) == 64
    assert tokens.x4_side(image_processor(scale_as="side")) == 128


class Reader:
    """Reads a document as its size in pixels where it is whole, as nothing where it was shrunk; one it cannot read."""

    packed = False

    def __init__(self):
        self.processor = processor()

    def read_inputs(self, inputs, limits):
        assert len(limits) == len(inputs["pixel_values"])
        shapes = inputs["spatial_shapes"].tolist()
        if len(shapes) > 1 and [1, 3] in shapes:
            raise RuntimeError("too much at once")
        return ["words of line" if shape in ([2, 10], [1, 3]) else "" for shape in shapes]


def test_documents_are_read_whole_at_x4_and_shrunk_at_x1(subject, options, monkeypatch):
    monkeypatch.setattr(subject, "_reader", Reader())
    monkeypatch.setattr(scale_suite, "_kept", {})
    figures, work = measured(scale_suite.ReadingInOneGo(options), subject)
    found = by_place(figures)
    # three of the four words of a line, none invented: 2 * 3 / (3 + 4)
    assert found["word_f1", 64, "long"].value == pytest.approx(6 / 7)
    assert found["word_f1", 32, "long"].value == 0.0
    assert found["cer", 32, "long"].value == 1.0
    assert [figure.at["resolution"] for figure in figures if figure.at["set"] == "long"][::2] == [32, 40, 48, 64]
    assert found["word_f1", 32, "short"].value == pytest.approx(6 / 7)
    assert found["word_f1", 32, "short"].failed == 0  # what fails together is read alone
    assert found["cer", 32, "long"].better == "lower"
    assert len(work.items) == 4 * 8 + 4
    assert work.items[0]["truth"] == "words of line 0"


def test_pages_in_large_print_are_read_at_every_size_where_they_are_there(subject, options, chunks, monkeypatch):
    monkeypatch.setattr(subject, "_reader", Reader())
    monkeypatch.setattr(scale_suite, "_kept", {})
    large = replace(options, sets=(f"syn-s={chunks}",))  # any set will do
    figures, _ = measured(scale_suite.ReadingInOneGo(large), subject)
    found = by_place(figures)
    assert found["word_f1", 64, "sparse"].items == 12
    assert found["word_f1", 64, "sparse"].value == pytest.approx(6 / 7)  # all at their own size
    assert found["word_f1", 32, "sparse"].value == pytest.approx(2 * 3 * 4 / (3 * 4 + 4 * 12))  # only four of them
    without = scale_suite.ReadingInOneGo(options).fingerprint()
    assert scale_suite.ReadingInOneGo(large).fingerprint() != without


def test_room_for_a_text_does_not_depend_on_the_scale():
    sample = TextSample(0, Image.new("L", (120, 16)), "x", x_height=8.0)
    assert scale_suite.most_pieces(sample) == 1 * (25 + 2) + 8  # a line, 120 / 4.8 characters, a newline


def test_activations_are_described_for_both_kinds_scales_and_layers(subject, options):
    figures, work = measured(scale_suite.Activations(options), subject)
    found = {(figure.name, figure.at["kind"], figure.at["scale"], figure.at["layer"]) for figure in figures}
    assert len(found) == len(figures) == 8 * 2 * 2 * 2
    assert len(work.notes) == 2
    # the last layer is behind a LayerNorm that was never trained: root mean square 1
    rms = [f.value for f in figures if f.name == "activation_rms" and f.at["layer"] == "last"]
    assert rms == pytest.approx([1.0] * 4, abs=0.02)


def test_activations_of_pictures_alone_where_there_are_no_documents(subject, pictures):
    nothing = pictures / "nothing"
    evaluator = scale_suite.Activations(
        Options(pictures=pictures, chunks=nothing, blocks=nothing, sets=(f"syn-s={nothing}",))
    )
    figures, work = measured(evaluator, subject)
    assert {figure.at["kind"] for figure in figures} == {"pictures"}
    assert "pictures only" in work.notes[0]


# --------------------------------------------------------------------------------------------------------------- gain


def test_the_gain_of_a_reading_is_the_difference_of_pooled_figures():
    now = [count("a b c d", "a b c d"), count("a", "a b")]
    then = [count("a b", "a b c d"), count("a", "a b")]
    value, low, high = text_gain(now, then, ["x", "y"])["word_f1"]
    assert value == pytest.approx(2 * 5 / (5 + 6) - 2 * 3 / (3 + 6))
    # draws of documents: both x, both y or one each
    assert (low, high) == (pytest.approx(0.0), pytest.approx(1 - 2 * 2 / (2 + 4)))


def test_the_same_gain_everywhere_has_no_width():
    now, then = [count("a b", "a b")] * 6, [count("a", "a b")] * 6
    found = text_gain(now, then, list("uvwxyz"))
    assert found["word_f1"] == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert found["cer"] == pytest.approx((-2 / 3,) * 3)


def test_a_model_gains_nothing_over_itself(subject, options, model, monkeypatch):
    monkeypatch.setattr(scale_suite, "_kept", {})
    before = ModelSubject(model, "stage 1", "stage")
    for one in (subject, before):
        monkeypatch.setattr(one, "_reader", Reader())
    figures, _ = measured(scale_suite.StageGain(options), subject, stage=before)
    assert {figure.name for figure in figures} == {
        "gain_word_f1",
        "gain_cer",
        "gain_knn_accuracy",
        "gain_probe_accuracy",
        "gain_zero_shot_top1",
    }
    assert all((figure.value, figure.low, figure.high) == (0, 0, 0) for figure in figures)
    assert {figure.at["over"] for figure in figures} == {"stage 1"}
    assert {figure.at["scale"] for figure in figures} == {"x1", "x4"}


def test_without_an_earlier_stage_there_is_no_gain(subject, options):
    with pytest.raises(NotMeasured, match="--stages"):
        measured(scale_suite.StageGain(options), subject)


def test_every_evaluator_is_known_by_its_data_and_settings(options):
    for evaluator in scale_suite.evaluators(options):
        assert evaluator.suite == "scale"
        assert ENCODE in evaluator.needs
        other = type(evaluator)(replace(options, limit=2))
        assert json.dumps(evaluator.fingerprint()) == json.dumps(evaluator.fingerprint())
        assert evaluator.fingerprint() != other.fingerprint()
    names = [evaluator.name for evaluator in scale_suite.evaluators(options)]
    assert len(names) == len(set(names))
