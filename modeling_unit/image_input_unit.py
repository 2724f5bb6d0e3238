"""Open pictures that strangers send: any file to an RGB image, or one clear line saying why not."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from .image_processing_unit import to_rgb

# Ours: an A3 page at 600 dpi has 70 megapixels, and 100 take 300 MB once decoded.
MAX_PIXELS = 100_000_000


class UnreadableInput(ValueError):
    """An input that cannot be read. The message is one line that names the input and says what is wrong."""


def open_image(source: Any, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """An image as the models want it: upright, RGB, 8 bits a channel, on white where it was transparent.

    EXIF rotation is applied, 16 bits are scaled to 8, CMYK and palettes converted. Of an animation or a file of
    several pages the first picture is taken, and `image.info["unit_note"]` says so.

    Args:
        source: a path, the bytes of a file, or a PIL image.
        max_pixels: larger pictures are refused, by their header, before anything is decoded.
        name: what messages call the input, by default the path.

    Raises:
        UnreadableInput: missing, a folder, empty, truncated, no image, too large.
    """
    if isinstance(source, Image.Image):
        name = name or getattr(source, "filename", "") or "image"
        _check_size(source.size, max_pixels, name)
        return _finish(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, size, stream = name or "bytes", len(source), io.BytesIO(bytes(source))
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name, size, stream = name or str(path), check_file(path), path
    else:
        raise UnreadableInput(
            f"{name or 'input'}: cannot open {type(source).__name__}; give a path, the bytes of a file or a PIL image"
        )
    if size == 0:
        raise UnreadableInput(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is max_pixels
            image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise UnreadableInput(f"{name}: {_too_large(max_pixels)}") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableInput(f"{name}: not an image in a format that can be read") from error
    except Exception as error:  # decoders of broken headers raise what they like
        raise UnreadableInput(f"{name}: cannot be read as an image ({_reason(error)})") from error
    with image:
        _check_size(image.size, max_pixels, name)
        return _finish(image, name)


def check_file(path: Path) -> int:
    """Size of a file in bytes.

    Raises:
        UnreadableInput: there is no file at `path`, or it may not be read.
    """
    try:
        if path.is_dir():
            raise UnreadableInput(f"{path}: is a folder; name the files in it, for example {path}/*")
        if not path.exists():
            raise UnreadableInput(f"{path}: no such file")
        if not path.is_file():
            raise UnreadableInput(f"{path}: not a regular file")
        if not os.access(path, os.R_OK):
            raise UnreadableInput(f"{path}: may not be read (permission denied)")
        return path.stat().st_size
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableInput):
            raise
        raise UnreadableInput(f"{path}: cannot be opened ({_reason(error)})") from error


def _check_size(size: tuple, max_pixels: int, name: str) -> None:
    if size[0] * size[1] > max_pixels:
        raise UnreadableInput(f"{name}: {size[0]} x {size[1]} pixels, {_too_large(max_pixels)}")


def _too_large(max_pixels: int) -> str:
    return f"more than the {max_pixels / 1e6:g} megapixels that are opened; make the picture smaller first"


def _finish(image: Image.Image, name: str) -> Image.Image:
    try:
        frames = getattr(image, "n_frames", 1)  # counts them, and so reads the file
        if frames > 1:
            image.seek(0)
        image.load()
        rgb = to_rgb(image)
    except Exception as error:  # decoders of broken data raise what they like
        problem = "the file is truncated or damaged" if "truncated" in str(error) else "the file is damaged"
        raise UnreadableInput(f"{name}: {problem} ({_reason(error)})") from error
    if rgb is image:
        rgb = image.copy()
    rgb.info = {"unit_note": f"the first of {frames} pictures in the file"} if frames > 1 else {}
    return rgb


def _reason(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
