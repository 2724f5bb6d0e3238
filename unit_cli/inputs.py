"""Paths on the command line -> pictures: image files as they are, PDFs page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PDF_DPI = 200  # ours: text of 10 points gets an x-height of 12 pixels, a little more than the reader wants
PDF_MAX_PIXELS = 40_000_000  # posters are rendered smaller


@dataclass
class Input:
    """One picture of the command line, or why there is none.

    Args:
        path: as given.
        page: from 1, for PDFs; `None` otherwise.
        image: RGB or grey, `None` when it could not be had.
        error: one line that names the file, `None` when all is well.
        note: something worth saying, such as that only the first picture of an animation is taken.
    """

    path: str
    page: int | None = None
    image: Image.Image | None = None
    error: str | None = None
    note: str | None = None

    @property
    def name(self) -> str:
        return self.path if self.page is None else f"{self.path}, page {self.page}"


def open_inputs(paths: Sequence[str], dpi: float = PDF_DPI) -> Iterator[Input]:
    """Open files one after another, as they are asked for; what cannot be opened comes as an `Input` with `error`."""
    from modeling_unit.image_input_unit import UnreadableInput, check_file, open_image

    for path in paths:
        try:
            check_file(Path(path))
            if is_pdf(path):
                yield from _pdf_pages(path, dpi)
            else:
                image = open_image(path)
                yield Input(path, image=image, note=image.info.get("unit_note"))
        except UnreadableInput as error:
            yield Input(path, error=str(error))


def is_pdf(path: str | Path) -> bool:
    """Whether a file has a PDF's mark within its first kilobyte, where readers of PDFs look for it."""
    with open(path, "rb") as file:
        return b"%PDF-" in file.read(1024)


@contextmanager
def open_pdf(path: str | Path) -> Iterator:
    """A PDF as pypdfium2's document, closed at the end.

    Raises:
        UnreadableInput: encrypted, damaged, or without pages.
    """
    import pypdfium2 as pdfium

    from modeling_unit.image_input_unit import UnreadableInput

    try:
        document = pdfium.PdfDocument(path)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise UnreadableInput(f"{path}: the PDF is encrypted; save a copy without a password first") from error
        raise UnreadableInput(f"{path}: the PDF is damaged ({error})") from error
    try:
        if len(document) == 0:
            raise UnreadableInput(f"{path}: the PDF has no pages")
        yield document
    finally:
        document.close()


def render_page(document, path: str | Path, number: int, dpi: float = PDF_DPI) -> Image.Image:
    """Page `number`, from 1, of an open PDF; smaller than `dpi` says where it would have over `PDF_MAX_PIXELS`.

    Raises:
        UnreadableInput: it cannot be rendered.
    """
    import pypdfium2 as pdfium

    from modeling_unit.image_input_unit import UnreadableInput

    try:
        page = document[number - 1]
        scale = min(dpi / 72, (PDF_MAX_PIXELS / max(1.0, page.get_width() * page.get_height())) ** 0.5)
        image = page.render(scale=scale).to_pil().convert("RGB")
        page.close()
    except (pdfium.PdfiumError, ValueError, MemoryError) as error:
        raise UnreadableInput(f"{path}, page {number}: cannot be rendered ({error})") from error
    return image


def _pdf_pages(path: str, dpi: float) -> Iterator[Input]:
    from modeling_unit.image_input_unit import UnreadableInput

    with open_pdf(path) as document:
        for number in range(1, len(document) + 1):
            try:
                image = render_page(document, path, number, dpi)
            except UnreadableInput as error:
                yield Input(path, number, error=str(error))
            else:
                yield Input(path, number, image)
