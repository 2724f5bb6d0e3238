"""Every kind of file that strangers send is read rightly or refused with one line that names it."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pypdfium2 as pdfium
import pytest
from PIL import Image

from modeling_unit.image_input_unit import UnreadableInput, open_image
from unit_cli.inputs import is_pdf, open_inputs

RED, WHITE = (255, 0, 0), (255, 255, 255)


def refused(source, **settings):
    with pytest.raises(UnreadableInput) as caught:
        open_image(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def save(path, image, **settings):
    image.save(path, **settings)
    return path


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_missing_file_is_refused(tmp_path):
    assert refused(tmp_path / "gone.png") == f"{tmp_path / 'gone.png'}: no such file"


def test_a_folder_is_refused_with_advice(tmp_path):
    assert refused(tmp_path) == f"{tmp_path}: is a folder; name the files in it, for example {tmp_path}/*"


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    assert refused(path) == f"{path}: the file is empty"
    assert refused(b"", name="upload") == "upload: the file is empty"


def test_what_is_no_image_is_refused(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture at all\n" * 10)
    assert refused(path) == f"{path}: not an image in a format that can be read"


def test_a_tiff_whose_second_page_has_no_width_is_refused(tmp_path):
    """Pillow opens it, and finds out only when the pages are counted."""
    path = tmp_path / "page.tif"
    page = Image.new("L", (30, 20))
    page.save(path, save_all=True, append_images=[page])
    content = path.read_bytes()
    at = max(content.rfind(struct.pack("<HH", 256, kind)) for kind in (3, 4))  # the tag ImageWidth, short or long
    path.write_bytes(content[:at] + struct.pack("<H", 255) + content[at + 2 :])
    assert "page.tif: the file is damaged (Missing dimensions)" in refused(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    path = save(tmp_path / f"whole.{suffix}", noise)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refused(cut).startswith(f"{cut}: ")


def test_every_prefix_of_a_png_is_read_or_refused():
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), RED).save(stream, "PNG")
    whole = stream.getvalue()
    for length in range(len(whole)):
        with contextlib.suppress(UnreadableInput):
            assert open_image(whole[:length]).size == (5, 4)  # only the end marker is missing


def png_header(width, height):
    """A PNG of that size in name only: 50 bytes."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + part(b"IDAT", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_000), (12_000, 9_000)])
def test_a_bomb_is_refused_by_its_header(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert "more than the 100 megapixels" in message


def test_the_limit_of_pixels_is_a_setting(tmp_path):
    path = save(tmp_path / "small.png", Image.new("L", (30, 20)))
    assert "30 x 20 pixels" in refused(path, max_pixels=599)
    assert open_image(path, max_pixels=600).size == (30, 20)


def test_a_number_is_refused_as_an_input():
    assert refused(3) == "input: cannot open int; give a path, the bytes of a file or a PIL image"


# ---------------------------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20), (20, 20_000)])
def test_odd_sizes_are_read(tmp_path, size):
    assert open_image(save(tmp_path / "odd.png", Image.new("L", size, 255))).size == size


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    path = save(tmp_path / "deep.png", Image.fromarray(values))
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_is_converted(tmp_path):
    path = save(tmp_path / "print.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    red, green, blue = open_image(path).getpixel((8, 8))
    assert red > 220
    assert max(green, blue) < 40


def test_transparency_is_put_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black
    opened = open_image(save(tmp_path / "clear.png", image))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [WHITE, RED, (204, 204, 204)]


def test_a_palette_with_a_transparent_colour_is_put_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    opened = open_image(save(tmp_path / "few.png", image, transparency=0))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [WHITE, RED]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    opened = open_image(save(tmp_path / "turned.png", image, exif=exif))
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5)) == RED
    assert opened.getpixel((10, 35)) == WHITE


def test_of_an_animation_the_first_picture_is_taken_and_noted(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE, RED)]
    path = save(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    opened = open_image(path)
    assert opened.getpixel((4, 4)) == RED
    assert opened.info["unit_note"] == "the first of 3 pictures in the file"


def test_a_pil_image_is_not_changed(tmp_path):
    image = Image.new("RGB", (4, 4), RED)
    open_image(image).putpixel((0, 0), WHITE)
    assert image.getpixel((0, 0)) == RED


def test_a_bilevel_fax_is_read(tmp_path):
    fax = Image.new("1", (16, 8), 1)
    fax.putpixel((3, 3), 0)
    assert open_image(save(tmp_path / "fax.tif", fax, compression="group4")).getpixel((3, 3)) == (0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------- PDFs


@pytest.fixture
def two_pages(tmp_path):
    """A PDF of two empty pages, 72 by 36 and 36 by 72 points."""
    document = pdfium.PdfDocument.new()
    document.new_page(72, 36)
    document.new_page(36, 72)
    path = tmp_path / "two.pdf"
    document.save(path)
    return str(path)


# Encrypted as the PDF reference has it in 3.5 (RC4, 40 bits), with keys of no one's, so that no password opens it.
ENCRYPTED = b"""%PDF-1.4
1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj
2 0 obj <</Type/Pages/Kids[3 0 R]/Count 1>> endobj
3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>> endobj
4 0 obj <</Filter/Standard/V 1/R 2/O<KEY>/U<KEY>/P -4>> endobj
trailer <</Root 1 0 R/Size 5/Encrypt 4 0 R/ID[<00><00>]>>
%%EOF
""".replace(b"KEY", b"41" * 32)


def test_a_pdf_gives_its_pages_at_the_resolution_asked_for(two_pages):
    items = list(open_inputs([two_pages], dpi=144))
    assert [(item.page, item.image.size) for item in items] == [(1, (144, 72)), (2, (72, 144))]
    assert items[1].name == f"{two_pages}, page 2"


def test_a_pdf_is_known_by_its_mark_not_by_its_name(two_pages, tmp_path):
    renamed = tmp_path / "page.png"
    os.rename(two_pages, renamed)
    assert is_pdf(renamed)
    assert len(list(open_inputs([str(renamed)]))) == 2


def test_an_encrypted_pdf_is_refused(tmp_path):
    path = tmp_path / "secret.pdf"
    path.write_bytes(ENCRYPTED)
    (item,) = open_inputs([str(path)])
    assert item.image is None
    assert item.error == f"{path}: the PDF is encrypted; save a copy without a password first"


def test_a_damaged_pdf_is_refused(tmp_path):
    path = tmp_path / "torn.pdf"
    path.write_bytes(b"%PDF-1.7\n% and no more")
    (item,) = open_inputs([str(path)])
    assert item.error.startswith(f"{path}: the PDF is damaged")


def test_a_poster_is_rendered_smaller(tmp_path):
    document = pdfium.PdfDocument.new()
    document.new_page(14_000, 14_000)  # nearly five metres a side
    path = tmp_path / "poster.pdf"
    document.save(path)
    (item,) = open_inputs([str(path)])
    assert item.image.width == pytest.approx(6325, abs=2)  # the root of 40 megapixels


def test_a_bad_input_does_not_stop_the_others(tmp_path, two_pages):
    picture = save(tmp_path / "fine.png", Image.new("L", (8, 8)))
    items = list(open_inputs([str(tmp_path / "gone.png"), str(picture), str(tmp_path), two_pages]))
    assert [item.image is not None for item in items] == [False, True, False, True, True]
    assert all((item.error is None) == (item.image is not None) for item in items)
