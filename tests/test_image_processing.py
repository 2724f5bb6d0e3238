"""Images of every kind to pixels: colour modes, budgets, padding, and what is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PATCH, image_processor, noise

from modeling_unit import UnitImageProcessor
from modeling_unit.image_processing_unit import border_colour, pad_batch, to_rgb


def reopened(image: Image.Image, file_format: str, **options) -> Image.Image:
    """Through a file and back, as pictures come."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    buffer.seek(0)
    return Image.open(buffer)


# -- colour ----------------------------------------------------------------------------------------


def test_rgb_stays_as_it_is():
    picture = noise(5, 4)
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture))


def test_gray_is_the_same_in_every_channel():
    gray = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    expected = np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4, 1) * 20, 3, axis=2)
    assert np.array_equal(np.asarray(to_rgb(gray)), expected)


def test_black_and_white_is_0_and_255():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    assert np.asarray(to_rgb(bits))[..., 0].tolist() == [[0, 255], [255, 0]]


def test_transparency_lies_on_white():
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    # opaque; invisible; black at 51 / 255 = a fifth: 255 * 4 / 5
    expected = [[[200, 100, 0], [255, 255, 255], [204, 204, 204]]]
    assert np.asarray(to_rgb(Image.fromarray(pixels))).tolist() == expected
    assert np.asarray(to_rgb(pixels)).tolist() == expected


def test_gray_with_alpha_lies_on_white():
    picture = Image.fromarray(np.array([[[80, 255], [80, 0]]], dtype=np.uint8), "LA")
    assert np.asarray(to_rgb(picture)).tolist() == [[[80, 80, 80], [255, 255, 255]]]


def test_palette_with_a_transparent_entry_lies_on_white():
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    opened = reopened(picture, "PNG", transparency=1)
    assert opened.mode == "P"
    assert np.asarray(to_rgb(opened)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_one_transparent_colour_of_rgb_lies_on_white():
    picture = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
    opened = reopened(picture, "PNG", transparency=(1, 2, 3))
    assert opened.mode == "RGB"
    assert np.asarray(to_rgb(opened)).tolist() == [[[255, 255, 255], [9, 9, 9]]]


def test_cmyk_is_converted():
    cmyk = Image.new("CMYK", (2, 1), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    red, green, blue = np.asarray(to_rgb(reopened(cmyk, "TIFF")))[0, 0].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_to_8(file_format):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    opened = reopened(Image.fromarray(values), file_format)
    assert opened.mode.startswith("I")
    assert np.asarray(to_rgb(opened))[0, :, 0].tolist() == [0, 100, 255]


def test_16_bit_arrays_are_scaled_to_8():
    assert np.asarray(to_rgb(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(("orientation", "expected"), [(1, [[1, 2]]), (3, [[2, 1]]), (6, [[1], [2]]), (8, [[2], [1]])])
def test_exif_rotation_is_applied(orientation, expected):
    picture = Image.fromarray(np.array([[10, 20]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = reopened(picture, "PNG", exif=exif)
    assert (np.asarray(to_rgb(opened))[..., 0] // 10).tolist() == expected


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    opened = reopened(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(to_rgb(opened))[0, 0].tolist() == [255, 0, 0]


# -- arrays and tensors ----------------------------------------------------------------------------


def test_arrays_and_tensors_are_taken_in_either_layout():
    picture = noise(6, 5)
    array = np.asarray(picture)
    forms = [
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    forms += [array.astype(np.float32) / 255, array.astype(np.float64) / 255, array.astype(np.int64)]
    forms += [torch.from_numpy(array.copy()).double() / 255]
    for form in forms:
        assert np.array_equal(np.asarray(to_rgb(form)), array), getattr(form, "dtype", None)


def test_bfloat16_and_float16_tensors_are_taken():
    for dtype in (torch.bfloat16, torch.float16):
        assert np.asarray(to_rgb(torch.ones(3, 5, 6, dtype=dtype))).tolist() == np.full((5, 6, 3), 255).tolist()


def test_one_channel_arrays_are_gray():
    for shape in ((5, 6), (5, 6, 1), (1, 5, 6)):
        assert to_rgb(np.full(shape, 7, dtype=np.uint8)).size == (6, 5)


def test_masks_are_black_and_white():
    assert np.asarray(to_rgb(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("page.png", "got str"),
        (b"\x89PNG", "got bytes"),
        (None, "got NoneType"),
        (np.zeros((2, 3, 4, 5)), r"got \(2, 3, 4, 5\)"),
        (np.zeros((7, 5, 2), dtype=np.uint8), r"got \(7, 5, 2\)"),
        (np.zeros((0, 5, 3), dtype=np.uint8), r"got \(0, 5, 3\)"),
        (np.zeros(5, dtype=np.uint8), r"got \(5,\)"),
        (np.full((4, 4, 3), 255.0), "values in \\[0, 1\\], got 255 to 255"),
        (np.full((4, 4, 3), -0.5), "values in \\[0, 1\\]"),
        (np.full((4, 4, 3), np.nan), "values in \\[0, 1\\]"),
    ],
)
def test_what_is_no_image_is_refused(given, words):
    with pytest.raises(ValueError, match=words) as error:
        to_rgb(given)
    assert "\n" not in str(error.value)


# -- budgets ---------------------------------------------------------------------------------------


SIZES = [(1, 1), (7, 5), (64, 64), (100, 30), (30, 100), (850, 1100), (2000, 2000), (20000, 20), (3, 5000), (129, 127)]


@pytest.mark.parametrize("scale_as", ["side", "area"])
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("kind", ["natural", "document"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_image_exceeds_the_area_or_the_longest_side(size, kind, scale, scale_as):
    processor = image_processor(scale_as=scale_as)
    # x4 as side: four times the side, sixteen times the area
    budget = 32 * 32 * {1: 1, 4: 16 if scale_as == "side" else 4}[scale]
    assert processor.area(scale) == budget
    width, height = processor.resize(Image.new("RGB", size, "white"), kind, scale).size
    assert width % PATCH == 0
    assert height % PATCH == 0
    assert width * height <= budget
    assert max(width, height) <= 128
    rows, cols = processor.grid_for(*size, kind, scale)
    assert (cols * PATCH, rows * PATCH) == (width, height)


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (1000, 250), (333, 333), (90, 700)])
def test_natural_pictures_fill_their_area_and_keep_their_aspect(size):
    processor = UnitImageProcessor(patch_size=4, base_size=224, scale_as="area", max_side=1024)
    width, height = processor.resize(Image.new("RGB", size), "natural", 1).size
    assert width * height > 0.93 * 224 * 224
    assert width / height == pytest.approx(size[0] / size[1], rel=0.06)  # sides are rounded to whole patches


def test_small_natural_pictures_are_enlarged():
    assert image_processor().resize(noise(10, 10), "natural", 1).size == (32, 32)


@pytest.mark.parametrize("size", [(850, 1100), (1100, 850), (600, 300), (517, 519), (1024, 200)])
def test_large_documents_shrink_no_more_than_needed_and_keep_their_aspect(size):
    processor = UnitImageProcessor(patch_size=16, base_size=128, scale_as="area", max_side=1024)
    width, height = processor._document_size(*size, 4)
    assert width < size[0]
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
    rows, cols = processor.grid_for(*size, "document", 4)
    assert 0.8 * 256 <= rows * cols <= 256


def test_documents_that_fit_are_not_touched_but_padded_with_their_paper():
    page = Image.new("RGB", (20, 11), (250, 240, 230))
    page.paste(Image.new("RGB", (6, 4), "black"), (5, 3))
    padded = np.asarray(image_processor().resize(page, "document", 4))
    assert padded.shape == (16, 24, 3)
    assert np.array_equal(padded[:11, :20], np.asarray(page))
    assert (padded[11:] == (250, 240, 230)).all()
    assert (padded[:, 20:] == (250, 240, 230)).all()


def test_the_paper_is_the_median_of_the_border():
    page = Image.new("RGB", (9, 9), (200, 100, 50))
    page.paste(Image.new("RGB", (7, 7), "black"), (1, 1))
    page.putpixel((0, 0), (0, 0, 0))
    assert border_colour(page) == (200, 100, 50)


def test_documents_are_never_enlarged():
    processor = image_processor()
    for width, height in [(1, 1), (8, 8), (9, 30), (60, 60)]:
        assert processor._document_size(width, height, 4) == (width, height)


# -- pixels ----------------------------------------------------------------------------------------


def test_pixels_are_normalised_channel_by_channel():
    processor = image_processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 1.0])
    pixels = processor(Image.new("RGB", (32, 32), (51, 102, 255)))["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == torch.float32
    # 51 / 255 = 0.2, 102 / 255 = 0.4
    expected = [(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (1.0 - 0.3) / 1.0]
    torch.testing.assert_close(pixels.amin(dim=(0, 2, 3)), torch.tensor(expected))
    torch.testing.assert_close(pixels.amax(dim=(0, 2, 3)), torch.tensor(expected))


def test_normalisation_can_be_left_to_the_model():
    pixels = image_processor(do_normalize=False)(Image.new("RGB", (32, 32), (51, 102, 255)))["pixel_values"]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.2, 0.4, 1.0]))


def test_a_batch_is_padded_with_zeros_and_says_what_belongs_to_each():
    pages = [Image.new("RGB", (40, 8), "white"), Image.new("RGB", (10, 20), "white")]
    batch = image_processor()(pages, kind="document")
    assert batch["spatial_shapes"].tolist() == [[1, 5], [3, 2]]
    assert batch["pixel_values"].shape == (2, 3, 24, 40)
    assert (batch["pixel_values"][0, :, 8:] == 0).all()
    assert (batch["pixel_values"][1, :, :, 16:] == 0).all()
    assert (batch["pixel_values"][0, :, :8] != 0).all()


def test_pad_batch_by_hand():
    out = pad_batch([np.ones((1, 2, 4)), np.full((1, 4, 2), 2.0)], 2)
    assert out["pixel_values"][:, 0].tolist() == [
        [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[2, 2, 0, 0], [2, 2, 0, 0], [2, 2, 0, 0], [2, 2, 0, 0]],
    ]
    assert out["spatial_shapes"].tolist() == [[1, 2], [2, 1]]


def test_each_kind_has_its_own_scale_by_default():
    processor = image_processor()
    picture = noise(200, 200)
    assert processor(picture)["spatial_shapes"].tolist() == [[4, 4]]  # natural at x1
    assert processor(picture, kind="document")["spatial_shapes"].tolist() == [[8, 8]]  # documents at x4
    assert processor(picture, kind="document", scale=1)["spatial_shapes"].tolist() == [[4, 4]]
    assert processor(picture, scale=4)["spatial_shapes"].tolist() == [[8, 8]]


def test_one_image_a_list_and_a_batch_are_taken_alike():
    array = np.stack([np.asarray(noise(16, 16, seed)) for seed in range(2)])
    processor = image_processor()
    expected = processor([Image.fromarray(array[0]), Image.fromarray(array[1])])["pixel_values"]
    for form in (array, torch.from_numpy(array), list(array), tuple(array)):
        torch.testing.assert_close(processor(form)["pixel_values"], expected)
    torch.testing.assert_close(processor(array[0])["pixel_values"], expected[:1])


def test_arrays_are_returned_as_numpy_when_asked():
    assert isinstance(image_processor()(noise(8, 8), return_tensors="np")["pixel_values"], np.ndarray)


@pytest.mark.parametrize(
    ("images", "settings", "words"),
    [
        ([], {}, "No image"),
        (noise(8, 8), {"kind": "photo"}, "kind must be one of"),
        (noise(8, 8), {"scale": 2}, "scale must be 1 or 4"),
        (["page.png"], {}, "Open files with PIL"),
    ],
)
def test_wrong_calls_are_refused(images, settings, words):
    with pytest.raises(ValueError, match=words):
        image_processor()(images, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale_as", "volume"),
        ("patch_size", 0),
        ("base_size", 4),
        ("max_side", 4),
        ("scale_factor", 0),
        ("image_mean", [0.5]),
        ("image_std", [0.0, 0.5, 0.5]),
        ("reading_looks", 0),
        ("reading_looks", 2.0),
        ("reading_evidence", -1.0),
        ("reading_evidence", "much"),
    ],
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        image_processor(**{name: value})


@pytest.mark.parametrize(
    ("line_height", "baseline", "words"),
    [
        (16, None, "go together, got 16 and None"),
        (None, 12.1, "go together, got None and 12.1"),
        (20, 12.1, r"reading_line_height must be a multiple of patch_size \(8\), got 20"),
        (0, 12.1, "reading_line_height must be a multiple"),
        (16.0, 12.1, "reading_line_height must be a multiple"),
        (16, 16, r"reading_baseline must lie within reading_line_height \(16\), got 16"),
        (16, 0.0, "reading_baseline must lie within"),
        (16, "12", "reading_baseline must lie within"),
        (16, float("nan"), "reading_baseline must lie within"),
    ],
)
def test_strips_that_no_line_can_be_read_in_are_refused_in_one_line(line_height, baseline, words):
    with pytest.raises(ValueError, match=words) as error:
        image_processor(reading_line_height=line_height, reading_baseline=baseline)
    assert "\n" not in str(error.value)


def test_settings_survive_saving(tmp_path):
    reading = {"reading_x_height": 7.5, "reading_line_height": 16, "reading_baseline": 12.1, "reading_looks": 4}
    reading["reading_evidence"] = 14.0
    processor = image_processor(image_mean=[0.1, 0.2, 0.3], do_normalize=False, scale_as="side", **reading)
    processor.save_pretrained(tmp_path)
    loaded = UnitImageProcessor.from_pretrained(tmp_path)
    for name in ("patch_size", "base_size", "scale_factor", "scale_as", "max_side", "image_mean", "image_std"):
        assert getattr(loaded, name) == getattr(processor, name), name
    assert loaded.do_normalize is False
    assert {name: getattr(loaded, name) for name in reading} == reading
    picture = noise(50, 20)
    torch.testing.assert_close(loaded(picture)["pixel_values"], processor(picture)["pixel_values"])
