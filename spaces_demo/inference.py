"""What the Space does, without its interface: open what strangers send, read, name, compare scales, look inside.

Everything that is refused raises [`Refused`], whose message is one line for the visitor. Shapes: rows x cols patches,
D width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from modeling_unit import Reader, layer_features, nearest_supported_size, principal_colours, shipped_checkpoint
from modeling_unit.image_input_unit import UnreadableInput, open_image
from modeling_unit.reading_unit import PartialPage, RankedLabel
from unit_cli.inputs import is_pdf, open_pdf, render_page

from .limits import (
    MAX_FILE_BYTES,
    MAX_LABEL_LENGTH,
    MAX_LABELS,
    MAX_LABELS_LENGTH,
    MAX_NEW_TOKENS,
    MAX_PDF_PAGES,
    MAX_PIXELS,
)

SHOWN = 512  # longer side in pixels of the pictures that are returned
# Sides of the compared pictures, as shares of the side that the model calls x1: 1 and 2 are x1 and x4 by area.
PICTURE_FACTORS = (0.5, 1.0, 2.0, 3.0)
# Heights of the compared lines of text, as shares of the height that the reader brings lines to.
TEXT_FACTORS = (0.4, 0.6, 1.0, 1.5)
KINDS = ("picture", "text")
SHIPPED_NOTE = (
    "a small model for demonstration, trained for two hours and twenty minutes on two CPU cores: it reads English "
    "print; photographs it mostly names wrongly"
)


class Refused(ValueError):
    """An input that is not dealt with. The message is one line that says why, for the visitor."""


# ------------------------------------------------------------------------------------------------------------- opening


def open_page(path: str | os.PathLike | None, number: int | float | None = 1) -> tuple[Image.Image, int]:
    """A picture, or one page of a PDF, and how many pages the file has.

    Args:
        path: of the file.
        number: of the page, from 1; pictures have one page.

    Raises:
        Refused: no file, too large, neither picture nor PDF, encrypted, damaged, or no such page.
    """
    if not path:
        raise Refused("Choose a file first: a picture or a PDF.")
    path = Path(path)
    number = _page_number(number)
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise Refused("The file has gone; send it again.") from error
    if size > MAX_FILE_BYTES:
        raise Refused(f"The file has {size / 1e6:.0f} MB; the limit here is {MAX_FILE_BYTES / 1e6:.0f} MB.")
    try:
        if not is_pdf(path):
            if number != 1:
                raise Refused(f"A picture has one page; there is no page {number}.")
            return open_image(path, max_pixels=MAX_PIXELS, name=path.name), 1
        with open_pdf(path) as document:
            pages = len(document)
            if pages > MAX_PDF_PAGES:
                raise Refused(f"The PDF has {pages} pages; the limit here is {MAX_PDF_PAGES}.")
            if number > pages:
                raise Refused(f"The PDF has {pages} page{'s' * (pages != 1)}; there is no page {number}.")
            return render_page(document, path, number), pages
    except UnreadableInput as error:
        # Messages name the file by its path here, which is nobody's business.
        raise Refused(str(error).replace(str(path), path.name)) from error


def _page_number(number) -> int:
    try:
        whole = int(1 if number is None else number)
    except (TypeError, ValueError, OverflowError):
        whole = 0
    if whole < 1:
        raise Refused("The page must be a whole number of at least 1.")
    return whole


def parse_labels(text: str | None) -> list[str]:
    """Labels of a text, one a line or separated by commas; repeated ones once.

    Raises:
        Refused: none, too many, or too long.
    """
    text = text or ""
    if len(text) > MAX_LABELS_LENGTH:
        raise Refused(f"The labels have {len(text)} characters; the limit here is {MAX_LABELS_LENGTH}.")
    labels = list(dict.fromkeys(" ".join(one.split()) for line in text.splitlines() for one in line.split(",")))
    labels = [label for label in labels if label]
    if not labels:
        raise Refused("Type at least one label, for example: a dog, a duck.")
    if len(labels) > MAX_LABELS:
        raise Refused(f"{len(labels)} labels; the limit here is {MAX_LABELS}.")
    if longest := [label for label in labels if len(label) > MAX_LABEL_LENGTH]:
        raise Refused(f"A label has {len(longest[0])} characters; the limit here is {MAX_LABEL_LENGTH}.")
    return labels


# ------------------------------------------------------------------------------------------------------------- results


@dataclass
class Named:
    """What a picture is said to show, and the labels, likeliest first."""

    caption: str
    confidence: float
    ranking: list[RankedLabel]
    seconds: float

    def to_dict(self) -> dict:
        return {
            "caption": self.caption,
            "confidence": round(self.confidence, 4),
            "labels": {one.label: round(one.likelihood, 4) for one in self.ranking},
            "seconds": round(self.seconds, 3),
        }


@dataclass
class Scale:
    """One input at one resolution.

    Args:
        factor: side, or height of the line, as a share of the usual one.
        size: width and height in pixels that the encoder got.
        grid: rows and columns of patches.
        text: what was read, or the caption.
        likeness: mean cosine between its patch features and those of the usual resolution, both averaged over the
            coarser grid's patches; in [-1, 1], 1 for the usual one.
        teacher_likeness: the same of the teacher's features; `None` without a teacher.
        picture: the input at this resolution.
        colours: principal components of the patches, one basis for all resolutions; as large as `picture`.
    """

    factor: float
    size: tuple[int, int]
    grid: tuple[int, int]
    text: str
    likeness: float
    teacher_likeness: float | None
    picture: Image.Image = field(repr=False)
    colours: Image.Image = field(repr=False)

    def to_dict(self) -> dict:
        return {
            "factor": self.factor,
            "width": self.size[0],
            "height": self.size[1],
            "rows": self.grid[0],
            "columns": self.grid[1],
            "text": self.text,
            "likeness": round(self.likeness, 4),
            "teacher_likeness": None if self.teacher_likeness is None else round(self.teacher_likeness, 4),
        }


@dataclass
class Inside:
    """Patch features of a picture as colours over it.

    Args:
        layer: whose features `own` shows, from 1; the last one is the encoder's output.
        grid: rows and columns of patches.
        own: colours of that layer.
        decoded, teacher: colours of the vision decoder's output and of the teacher's features, in one basis, so that
            they compare; `None` where the model has no vision decoder, or there is no teacher.
        likeness: mean cosine between these two over the patches, what training the vision decoder maximises; `None`
            likewise.
    """

    layer: int
    grid: tuple[int, int]
    own: Image.Image = field(repr=False)
    decoded: Image.Image | None = field(repr=False)
    teacher: Image.Image | None = field(repr=False)
    likeness: float | None

    def to_dict(self) -> dict:
        return {
            "layer": self.layer,
            "rows": self.grid[0],
            "columns": self.grid[1],
            "likeness_to_teacher": None if self.likeness is None else round(self.likeness, 4),
        }


# ------------------------------------------------------------------------------------------------------------ session


class Demo:
    """A model with what the views need of it. One call at a time: the callers see to that.

    Args:
        reader: [`modeling_unit.Reader`].
        name: of the model, for people.
        teacher: encoder that the model was trained to agree with, on the same pixels; `None` without.
        vision_decoder: whether the model's vision decoder is a trained one.
        note: what a visitor should know of the model.
    """

    def __init__(
        self,
        reader: Reader,
        name: str,
        teacher: torch.nn.Module | None = None,
        vision_decoder: bool = True,
        note: str = "",
    ):
        self.reader, self.name, self.teacher, self.note = reader, name, teacher, note
        self.model, self.image_processor = reader.model, reader.processor.image_processor
        self.vision_decoder = vision_decoder and hasattr(self.model, "vision_decoder")
        self.layers = int(self.model.config.vision_config.num_hidden_layers)

    @classmethod
    def load(cls, model: str | None = None, teacher: str | None = None) -> Demo:
        """Load a model on the CPU, in float32.

        Args:
            model: folder or Hub id of a UNIT model; by default the environment's `UNIT_MODEL_ID`, else the shipped
                checkpoint.
            teacher: folder or Hub id of its teacher; by default `UNIT_TEACHER_ID`, else the shipped one beside the
                shipped checkpoint.

        Raises:
            OSError, ValueError: they cannot be loaded.
        """
        model = model or os.environ.get("UNIT_MODEL_ID") or None
        teacher = teacher or os.environ.get("UNIT_TEACHER_ID") or None
        if teacher is None and model is None:
            teacher = str(shipped_checkpoint("unit-tiny-teacher"))
        from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor

        source = str(shipped_checkpoint() if model is None else model)
        safely = {"dtype": torch.float32, "use_safetensors": True}  # a pickle runs what its author likes
        loaded, info = AutoModelForPreTraining.from_pretrained(source, output_loading_info=True, **safely)
        lacking = any(key.startswith("vision_decoder.") for key in info["missing_keys"])
        if not hasattr(loaded, "generate"):
            raise ValueError(f"{source}: this model cannot read: it has no language decoder")
        reader = Reader(loaded.eval(), AutoProcessor.from_pretrained(source))
        guide = None
        if teacher is not None:
            guide = AutoModel.from_pretrained(teacher, **safely).eval()
            guide = getattr(guide, "vision_model", guide)
        name = source.rstrip("/").rsplit("/", 1)[-1]
        return cls(reader, name, guide, not lacking, SHIPPED_NOTE if model is None else "")

    def warm_up(self) -> None:
        """Do once what is slow the first time."""
        strip = Image.new("RGB", (320, 32), "white")
        self.reader.read_resized(strip, "ocr", max_new_tokens=2)
        self.reader.describe([strip], max_new_tokens=2)

    # ------------------------------------------------------------------------------------------ views

    def read(self, path, number: int | float | None = 1) -> Iterator[tuple[Image.Image, PartialPage, int]]:
        """Read a page; after each batch the page itself, what there is of its text, and how many pages the file has.

        Raises:
            Refused: see [`open_page`].
        """
        image, pages = open_page(path, number)
        for partial in self.reader.stream(image):
            yield image, partial, pages

    def name_picture(self, path, labels: str | None) -> Named:
        """Caption and ranking of labels.

        Raises:
            Refused: see [`open_page`] and [`parse_labels`].
        """
        wanted = parse_labels(labels)
        image, _ = open_page(path)
        start = time.perf_counter()
        (caption,) = self.reader.describe([image], max_new_tokens=MAX_NEW_TOKENS)
        ranking = self.reader.rank_labels(image, wanted)
        return Named(caption.text, caption.confidence, ranking, time.perf_counter() - start)

    def scales(self, path, kind: str = "picture") -> list[Scale]:
        """One input at several resolutions.

        Args:
            kind: `"picture"`: all of it, captioned; `"text"`: its widest line of text, read.

        Raises:
            Refused: see [`open_page`]; an unknown kind; no text where text is wanted.
        """
        if kind not in KINDS:
            raise Refused(f"The kind must be one of {', '.join(KINDS)}.")
        image, _ = open_page(path)
        if kind == "text":
            image, factors, task = self._line(image), TEXT_FACTORS, "ocr"
            usual = image.size
        else:
            factors, task = PICTURE_FACTORS, "caption"
            shrink = self.image_processor.base_size / (image.width * image.height) ** 0.5
            usual = image.width * shrink, image.height * shrink
        pictures, texts, own, theirs = [], [], [], []
        for factor in factors:
            picture = self._at(image, usual[0] * factor, usual[1] * factor)
            pictures.append(picture)
            texts.append(" ".join(self.reader.read_resized(picture, task, MAX_NEW_TOKENS).split()))
            own.append(self._patches(self.model, picture))
            if self.teacher is not None:
                theirs.append(self._patches(self.teacher, picture))
        place = factors.index(1.0)
        colours = principal_colours(own)
        return [
            Scale(
                factor=factor,
                size=picture.size,
                grid=tuple(own[i].shape[:2]),
                text=texts[i],
                likeness=likeness(own[i], own[place]),
                teacher_likeness=likeness(theirs[i], theirs[place]) if theirs else None,
                picture=picture,
                colours=_shown(colours[i], image.size),
            )
            for i, (factor, picture) in enumerate(zip(factors, pictures, strict=True))
        ]

    def look_inside(self, path, layer: int | float | None = None, strength: float = 0.6) -> Inside:
        """Patch features as colours, laid over the picture.

        Args:
            layer: 1 to `layers`; by default the last.
            strength: of the colours over the picture, in [0, 1].

        Raises:
            Refused: see [`open_page`]; a layer that there is not.
        """
        layer = self.layers if layer is None else layer
        if layer not in range(1, self.layers + 1):
            raise Refused(f"The layer must be a whole number from 1 to {self.layers}.")
        if not 0 <= strength <= 1:
            raise Refused("The strength must be from 0 to 1.")
        layer = int(layer)
        image, _ = open_page(path)
        # x4 by area or by side, whichever the model means: the finest grid that it was trained on
        side = self.image_processor.area(self.image_processor.scale_factor) ** 0.5
        shrink = side / (image.width * image.height) ** 0.5
        picture = self._at(image, image.width * shrink, image.height * shrink)
        own = self._patches(self.model, picture, layer)

        def over(colours: torch.Tensor) -> Image.Image:
            mask = _shown(colours, image.size, Image.Resampling.BICUBIC)
            return Image.blend(image.resize(mask.size, Image.Resampling.LANCZOS), mask, strength)

        found = Inside(layer, tuple(own.shape[:2]), over(principal_colours([own])[0]), None, None, None)
        if self.teacher is None:
            return found
        theirs = self._patches(self.teacher, picture)
        decoded = None
        if self.vision_decoder and theirs.shape[-1] == self.model.config.vision_decoder_config.output_size:
            last = own if layer == self.layers else self._patches(self.model, picture)
            with torch.inference_mode():
                decoded = self.model.vision_decoder(last.flatten(0, 1)[None])[0].unflatten(0, last.shape[:2])
        if decoded is None or decoded.shape != theirs.shape:
            found.teacher = over(principal_colours([theirs])[0])
            return found
        one, other = principal_colours([decoded, theirs])
        found.decoded, found.teacher = over(one), over(other)
        found.likeness = likeness(decoded, theirs)
        return found

    # ------------------------------------------------------------------------------------------ parts

    def _at(self, image: Image.Image, width: float, height: float) -> Image.Image:
        """The picture resized to the nearest size of whole patches."""
        height, width = nearest_supported_size(self.model.config, height, width)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    @torch.inference_mode()
    def _patches(self, model, picture: Image.Image, layer: int = -1) -> torch.Tensor:
        """Features `(rows, cols, D)` of a picture whose sides are whole patches."""
        pixels = torch.from_numpy(self.image_processor.normalize(picture))[None]
        (found,) = layer_features(model, pixels, [layer])
        return found.spatial[0].permute(1, 2, 0).float()

    def _line(self, image: Image.Image) -> Image.Image:
        """The widest line of a page that still fits when enlarged, as the reader sees it."""
        from modeling_unit.layout_unit import analyse_page

        layout = analyse_page(image, self.reader.settings)
        most = self.reader.settings.max_width / max(TEXT_FACTORS)
        crops = sorted((layout.crop(chunk) for chunk in layout.chunks()), key=lambda crop: crop.width)
        if not crops:
            raise Refused('No text was found in this picture; choose "picture" to compare all of it.')
        fitting = [crop for crop in crops if crop.width <= most]
        return (fitting[-1] if fitting else crops[0]).convert("RGB")


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean cosine of two grids of features `(rows, cols, D)`, each averaged down to the coarser of the two."""
    grid = tuple(min(a, b) for a, b in zip(one.shape[:2], other.shape[:2], strict=True))
    pooled = [F.adaptive_avg_pool2d(each.permute(2, 0, 1)[None], grid) for each in (one, other)]  # (1, D, rows, cols)
    return float(F.cosine_similarity(*pooled, dim=1).mean())


def _shown(colours: torch.Tensor, size: Sequence[int], resampling=Image.Resampling.NEAREST) -> Image.Image:
    """Colours `(rows, cols, 3)` as a picture of the given aspect, its longer side `SHOWN`."""
    factor = SHOWN / max(size)
    shape = tuple(max(1, round(side * factor)) for side in size)
    return Image.fromarray(colours.numpy()).resize(shape, resampling)
