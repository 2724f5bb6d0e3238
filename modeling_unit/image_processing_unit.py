"""Images to pixels for UNIT: any size and aspect, natural pictures and documents each at their own scale."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_unit import CLIP_MEAN, CLIP_STD
from .hub_unit import IMAGE_PROCESSOR_AUTO_MAP, CodeUploaded, write_code
from .vision_sources_unit import find_vision_source

KINDS = ("natural", "document")


def to_rgb(image: Any) -> Image.Image:
    """A PIL image, an array `(H, W)`, `(H, W, C)` or `(C, H, W)` of uint8 or of floats in [0, 1], or a tensor, as RGB.

    EXIF rotation is applied, transparency composited on white, 16 bits scaled to 8.

    Raises:
        ValueError: for anything else, with the type or shape that was given.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().float().numpy() if image.dtype == torch.bfloat16 else image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        image = _array_to_pil(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"An image must be a PIL image, a numpy array or a tensor, got {type(image).__name__}. "
            "Open files with PIL.Image.open first."
        )
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _array_to_pil(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in shape:
        raise ValueError(f"An image array must be (H, W), (H, W, 3 or 4) or (3 or 4, H, W), got {shape}.")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= -1e-3 and array.max() <= 1.0 + 1e-3):  # put so that NaN is refused too
            raise ValueError(
                f"A float image must hold values in [0, 1], got {array.min():.3g} to {array.max():.3g}. "
                "Pass 0-255 images as uint8."
            )
        array = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        array = np.clip(array, 0, 255).astype(np.uint8)
    return Image.fromarray(array)


class UnitImageProcessor(CodeUploaded, BaseImageProcessor):
    """Resizes, pads and normalises images of any size for UNIT.

    Two kinds of image, two base scales [paper]: natural pictures at x1, documents at x4. "x4" is ambiguous in the
    paper (side or area): `scale_as` decides.

    * natural: resized, aspect kept, to the area of the scale (x1: `base_size` squared), sides rounded to whole
      patches.
    * document: never enlarged; shrunk only if larger than the area of the scale or wider or higher than `max_side`;
      padded at the bottom and right to whole patches with the colour of its border.

    Images of a batch may differ in size: smaller ones are padded with zeros (after normalisation) and `spatial_shapes`
    says what belongs to each; or, with `return_packed`, their patches come one after another and nothing is padded.

    Args:
        patch_size: side of a patch in pixels.
        base_size: side in pixels of a square image at x1 (paper: 224).
        scale_factor: what x4 means, 4.
        scale_as: `"side"` (x4 of 224 is 896) or `"area"` (448).
        max_side: longest side in pixels that the encoder's positions cover.
        image_mean, image_std: channel statistics for pixels in [0, 1].
        do_normalize: off for encoders that normalise inside (`normalize_pixels`).
        reading_x_height, reading_lines: how the `Reader` brings pages to this model: height in pixels of a lower-case
            x, and most lines in a chunk; saved here so that a model is asked as suits it best. `None`: the `Reader`'s
            own.
        reading_line_height, reading_baseline: every line is read alone, in a strip so many pixels high, whole patches,
            its baseline so many pixels from the top. Both or neither; `None`: chunks as high as their ink.
        reading_looks: how often the `Reader` looks at such a line while it is not sure of it. `None`: once.
        reading_evidence: how much evidence the blocks of a page must have together for the `Reader` to believe that
            there is text on it, see [`Block`]. `None`: none.

    Raises:
        ValueError: a setting that cannot be, in one line.
    """

    model_input_names = ["pixel_values", "spatial_shapes"]

    def __init__(
        self,
        patch_size: int = 14,
        base_size: int = 224,
        scale_factor: int = 4,
        scale_as: str = "side",
        max_side: int = 2048,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        do_normalize: bool = True,
        reading_x_height: float | None = None,
        reading_lines: int | None = None,
        reading_line_height: int | None = None,
        reading_baseline: float | None = None,
        reading_looks: int | None = None,
        reading_evidence: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if scale_as not in ("side", "area"):
            raise ValueError(f'scale_as must be "side" or "area", got {scale_as!r}.')
        sizes = {"patch_size": patch_size, "base_size": base_size, "scale_factor": scale_factor, "max_side": max_side}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        for name, values in {"image_mean": image_mean, "image_std": image_std}.items():
            if len(values) != 3 or (name == "image_std" and min(values) <= 0):
                raise ValueError(
                    f"{name} needs one value for each of the 3 channels (a deviation above 0), got {values}."
                )
        if base_size < patch_size or max_side < patch_size:
            raise ValueError(
                f"base_size ({base_size}) and max_side ({max_side}) must be at least patch_size ({patch_size})."
            )
        if (reading_line_height is None) != (reading_baseline is None):
            raise ValueError(
                "reading_line_height and reading_baseline go together, got "
                f"{reading_line_height!r} and {reading_baseline!r}."
            )
        if reading_line_height is not None:
            whole = isinstance(reading_line_height, int) and reading_line_height > 0
            if not whole or reading_line_height % patch_size:
                raise ValueError(
                    f"reading_line_height must be a multiple of patch_size ({patch_size}), "
                    f"got {reading_line_height!r}."
                )
            if not isinstance(reading_baseline, (int, float)) or not 0 < reading_baseline < reading_line_height:
                raise ValueError(
                    f"reading_baseline must lie within reading_line_height ({reading_line_height}), "
                    f"got {reading_baseline!r}."
                )
        if reading_looks is not None and (type(reading_looks) is not int or reading_looks < 1):
            raise ValueError(f"reading_looks must be a positive whole number or None, got {reading_looks!r}.")
        if reading_evidence is not None and not (isinstance(reading_evidence, (int, float)) and reading_evidence >= 0):
            raise ValueError(f"reading_evidence must be a number from 0 on or None, got {reading_evidence!r}.")
        self.patch_size = patch_size
        self.base_size = base_size
        self.scale_factor = scale_factor
        self.scale_as = scale_as
        self.max_side = max_side
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_normalize = do_normalize
        self.reading_x_height = reading_x_height
        self.reading_lines = reading_lines
        self.reading_line_height = reading_line_height
        self.reading_baseline = reading_baseline
        self.reading_looks = reading_looks
        self.reading_evidence = reading_evidence

    @classmethod
    def from_vision_pretrained(cls, source, hub: dict[str, Any] | None = None, **settings) -> "UnitImageProcessor":
        """The image processor that suits an encoder: its patch size, its nominal side as x1, its mean and deviation,
        from the image processor saved with it or its architecture's own. The weights are not read.

        Args:
            source: as of [`UnitForPreTraining.from_vision_pretrained`]. hub: `revision`, `token`, ... of its
                repository.
            settings: what is to differ, as of this class.
        """
        return cls(**(find_vision_source(source, **(hub or {})).image_settings | settings))

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, and the code beside it, for `trust_remote_code=True`."""
        self.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)
        saved = super().save_pretrained(save_directory, **kwargs)
        write_code(save_directory)
        return saved

    def area(self, scale: int | None = None) -> int:
        """Pixels of an image at a scale: 1 for x1, `scale_factor` for x4."""
        scale = 1 if scale is None else scale
        factor = scale if self.scale_as == "area" else scale * scale
        return self.base_size * self.base_size * factor

    @property
    def document_area(self) -> int:
        """Most pixels of a document read in one go (x4)."""
        return self.area(self.scale_factor)

    @property
    def max_width(self) -> int:
        return self.max_side

    def grid_for(self, width: int, height: int, kind: str, scale: int) -> tuple[int, int]:
        """Rows and columns in patches that an image of this size gets."""
        patch, most = self.patch_size, self.max_side // self.patch_size
        budget = max(1, self.area(scale) // (patch * patch))
        if kind == "natural":
            ideal = math.sqrt(budget * height / width)
            rows = min(max(1, round(ideal)), most, budget)
            cols = min(max(1, round(budget / rows)), most, max(1, budget // rows))
            return rows, cols
        width, height = self._document_size(width, height, scale)
        return math.ceil(height / patch), math.ceil(width / patch)

    def _document_size(self, width: int, height: int, scale: int) -> tuple[int, int]:
        """Size in pixels after shrinking, before padding; the padded size keeps within the budget of patches."""
        patch = self.patch_size
        budget, most = max(1, self.area(scale) // (patch * patch)), self.max_side // patch
        factor = 1.0
        while True:
            new_width, new_height = max(1, round(width * factor)), max(1, round(height * factor))
            rows, cols = math.ceil(new_height / patch), math.ceil(new_width / patch)
            if rows <= most and cols <= most and rows * cols <= budget:
                return new_width, new_height
            wanted = min(1.0, most / rows, most / cols, math.sqrt(budget / (rows * cols)))
            factor *= min(wanted, 0.99)
            # a strip thinner than a patch cannot shrink below one patch: give up its length instead
            if new_width == 1 or new_height == 1:
                return min(new_width, most * patch, budget * patch), min(new_height, most * patch, budget * patch)

    def resize(self, image: Image.Image, kind: str, scale: int) -> Image.Image:
        """An RGB image whose sides are whole patches."""
        patch = self.patch_size
        if kind == "natural":
            rows, cols = self.grid_for(image.width, image.height, kind, scale)
            return image.resize((cols * patch, rows * patch), Image.Resampling.BICUBIC)
        size = self._document_size(image.width, image.height, scale)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        rows, cols = math.ceil(image.height / patch), math.ceil(image.width / patch)
        if (cols * patch, rows * patch) == image.size:
            return image
        padded = Image.new("RGB", (cols * patch, rows * patch), border_colour(image))
        padded.paste(image, (0, 0))
        return padded

    def __call__(self, images: Any, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        kind: str = "natural",
        scale: int | None = None,
        return_tensors: str | None = "pt",
        return_packed: bool = False,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: one image or a list of them; see [`to_rgb`].
            kind: `"natural"` or `"document"`.
            scale: 1 or `scale_factor`; by default 1 for natural pictures and `scale_factor` for documents [paper].
            return_packed: the same pixels as a pack, without padding; see `packing_unit`.

        Returns:
            `pixel_values` `(B, 3, H, W)` float32 and `spatial_shapes` `(B, 2)` (rows, columns in patches); packed,
            `pixel_values` `(sum N_i, 3 * P * P)` float32 and `image_grid_hw` `(B, 2)`.

        Raises:
            ValueError: unknown kind or scale, something that is no image.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
        if scale is None:
            scale = 1 if kind == "natural" else self.scale_factor
        if scale not in (1, self.scale_factor):
            raise ValueError(f"scale must be 1 or {self.scale_factor}, got {scale!r}.")
        if not isinstance(images, (list, tuple)):
            batched = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
            images = list(images) if batched else [images]
        if not images:
            raise ValueError("No image was given.")
        pixels = [self.normalize(self.resize(to_rgb(image), kind, scale)) for image in images]
        batch = (pack_batch if return_packed else pad_batch)(pixels, self.patch_size)
        return BatchFeature(batch, tensor_type=return_tensors)

    def normalize(self, image: Image.Image) -> np.ndarray:
        """RGB image to float32 `(3, H, W)`, normalised by `image_mean` and `image_std`."""
        array = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
        if self.do_normalize:
            array = (array - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(array.transpose(2, 0, 1))


def load_image_processor(source, **hub):
    """The image processor of a folder or a repository: ours, as this module has it, wherever a file says that ours was
    saved (an encoder's repository calls itself CLIP's to those who do not trust remote code), else transformers' own.

    Args:
        hub: `revision`, `token`, `local_files_only`... as of `AutoImageProcessor.from_pretrained`.

    Raises:
        OSError, ValueError: none there that can be read.
    """
    from transformers import AutoImageProcessor

    settings, _ = BaseImageProcessor.get_image_processor_dict(source, **hub)
    named = (settings.get("auto_map") or {}).get("AutoImageProcessor")
    if isinstance(named, str) and named.rpartition(".")[2] == UnitImageProcessor.__name__:
        return UnitImageProcessor.from_pretrained(source, **hub)
    return AutoImageProcessor.from_pretrained(source, **hub)


def border_colour(image: Image.Image) -> tuple[int, int, int]:
    """Median colour of an RGB image's outermost pixels: the paper's, as a rule."""
    array = np.asarray(image)
    border = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
    red, green, blue = (int(value) for value in np.median(border, axis=0))
    return red, green, blue


def pad_batch(pixels: list[np.ndarray], patch_size: int) -> dict[str, np.ndarray]:
    """Arrays `(3, H, W)` of whole patches to one batch: `pixel_values` padded with zeros and `spatial_shapes`."""
    height = max(array.shape[1] for array in pixels)
    width = max(array.shape[2] for array in pixels)
    batch = np.zeros((len(pixels), pixels[0].shape[0], height, width), dtype=np.float32)
    for row, array in zip(batch, pixels, strict=True):
        row[:, : array.shape[1], : array.shape[2]] = array
    shapes = np.array(
        [[array.shape[1] // patch_size, array.shape[2] // patch_size] for array in pixels], dtype=np.int64
    )
    return {"pixel_values": batch, "spatial_shapes": shapes}


def pack_batch(pixels: list[np.ndarray], patch_size: int) -> dict[str, np.ndarray]:
    """Arrays `(3, H, W)` of whole patches to one pack: `pixel_values` `(sum N_i, 3 * P * P)`, image after image, patch
    after patch row by row, each as channel, row, column, and `image_grid_hw`."""
    patches = []
    for array in pixels:
        channels, height, width = array.shape
        grid = array.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
        patches.append(grid.transpose(1, 3, 0, 2, 4).reshape(-1, channels * patch_size * patch_size))
    grids = [[array.shape[1] // patch_size, array.shape[2] // patch_size] for array in pixels]
    return {"pixel_values": np.concatenate(patches), "image_grid_hw": np.array(grids, dtype=np.int64)}
