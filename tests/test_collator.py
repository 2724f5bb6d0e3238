"""Rows to model inputs, by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE_TOKEN, PROMPTS, byte_ids, document_row, image_processor, noise, picture_row, png, processor

from modeling_unit.image_processing_unit import to_rgb
from training.collator import (
    CHARACTERS,
    NUM_CHARACTER_CLASSES,
    OTHER_CHARACTER,
    TEXT_STEP,
    GroupCollator,
    character_targets,
    normalized_pixels,
)
from training.data.augment import augment_document, augment_line, black_and_white, coarse, composite_picture
from training.data.schema import OPTIONAL


def class_of(character: str) -> int:
    return 1 + ord(character) - 33  # printable ASCII from "!" on; 0 is no character


def collator(kind="document", scale=4, slots=0, **changes) -> GroupCollator:
    return GroupCollator(processor(**changes), kind, scale, slots)


def test_classes_are_printable_ascii_and_two_more():
    assert (CHARACTERS[0], CHARACTERS[-1], len(CHARACTERS)) == ("!", "~", 94)
    assert (NUM_CHARACTER_CLASSES, OTHER_CHARACTER) == (96, 95)


# -- where characters are --------------------------------------------------------------------------


def test_characters_are_named_in_the_patch_of_their_middle():
    # patches of 8 pixels; "ab" over the border of two patches, "c" in the third, one line
    boxes = np.array([[0, 0, 6, 8], [6, 0, 12, 8], [17, 0, 22, 8]], dtype=np.float32)  # middles at 3, 9 and 19.5
    classes, places = character_targets("abc", boxes, 1, 3, 8, 2)
    assert classes.tolist() == [[class_of("a"), 0], [class_of("b"), 0], [class_of("c"), 0]]
    assert places.tolist() == [0, 1, 2]


def test_a_crowded_patch_keeps_its_first_characters():
    boxes = np.array([[0, 0, 2, 8], [2, 0, 4, 8], [4, 0, 6, 8]], dtype=np.float32)
    classes, places = character_targets("xyz", boxes, 1, 1, 8, 2)
    assert classes.tolist() == [[class_of("x"), class_of("y")]]
    assert places.tolist() == [0, 0, 0]


def test_the_row_is_that_of_the_line():
    # a comma hangs below the line: its own middle (y = 9) lies in the second row of patches
    boxes = np.array([[0, 1, 3, 8], [3, 1, 6, 8], [6, 7, 8, 11]], dtype=np.float32)
    _, places = character_targets("ab,", boxes, 2, 1, 8, 3)
    assert places.tolist() == [0, 0, 0]


def test_the_row_is_where_the_middle_of_the_line_is():
    boxes = np.array(
        [[0, 5, 4, 13], [4, 6, 8, 12]], dtype=np.float32
    )  # tops in the first row, middles (9) in the second
    _, places = character_targets("ab", boxes, 2, 1, 8, 2)
    assert places.tolist() == [1, 1]


def test_white_space_and_line_breaks_have_no_place():
    boxes = np.zeros((5, 4), dtype=np.float32)
    boxes[0], boxes[2], boxes[4] = [0, 0, 4, 8], [8, 0, 12, 8], [0, 8, 4, 16]
    classes, places = character_targets("a b\nc", boxes, 2, 2, 8, 1)
    assert places.tolist() == [0, -1, 1, -1, 2]
    assert classes.tolist() == [[class_of("a")], [class_of("b")], [class_of("c")], [0]]


def test_characters_beyond_ascii_share_a_class():
    boxes = np.array([[0, 0, 4, 8], [8, 0, 12, 8]], dtype=np.float32)
    classes, _ = character_targets("é€", boxes, 1, 2, 8, 1)
    assert classes.tolist() == [[OTHER_CHARACTER], [OTHER_CHARACTER]]


def test_without_boxes_nothing_is_known():
    classes, places = character_targets("ab", np.zeros((0, 4)), 1, 2, 8, 1)
    assert classes.tolist() == [[0], [0]]
    assert places.tolist() == [-1, -1]


def test_boxes_at_the_edge_stay_inside():
    boxes = np.array([[14, 14, 20, 20]], dtype=np.float32)  # middle at (17, 17), the grid ends at 16
    _, places = character_targets("a", boxes, 2, 2, 8, 1)
    assert places.tolist() == [3]


# -- a whole batch ---------------------------------------------------------------------------------


def test_the_worked_example():
    """ "Hi" on a grid of 1 x 2, one visual token a patch."""
    row = document_row(
        "Hi", width=16, height=8
    )  # boxes of 4 x 8 pixels: H at x = 0, i at x = 4: both in the first patch
    row["char_boxes"] = [0, 0, 4, 8, 9, 0, 13, 8]  # and now i in the second
    batch = collator(slots=2)([row], None)
    head = [IMAGE_TOKEN, IMAGE_TOKEN, PROMPTS["ocr"]]
    target = [*byte_ids("Hi"), 1]
    rest = 2 + TEXT_STEP - 6  # two visual tokens and a multiple of TEXT_STEP
    assert batch["input_ids"].tolist() == [head + target + [0] * rest]
    assert batch["labels"].tolist() == [[-100] * 3 + target + [-100] * rest]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * rest]
    assert batch["token_places"].tolist() == [[-1] * 3 + [0, 1, -1] + [-1] * rest]
    assert batch["character_classes"].tolist() == [[[class_of("H"), 0], [class_of("i"), 0]]]
    assert batch["pixel_values"].shape == (1, 3, 8, 16)


def test_places_are_those_of_the_bytes():
    """One character of two bytes: two labels, one place."""
    row = document_row("é!", width=16, height=8)
    row["char_boxes"] = [0, 0, 4, 8, 9, 0, 13, 8]
    batch = collator()([row], None)
    assert batch["token_places"][0, 3:7].tolist() == [0, 0, 1, -1]
    assert "character_classes" not in batch


@pytest.mark.parametrize("null", [False, True])
def test_rows_without_the_optional_columns_are_trained_on(null):
    """Of a set that has no boxes: the same batch as from empty ones, and no label looks anywhere."""
    row = document_row("Hi", width=16, height=8)
    bare = {key: value for key, value in row.items() if key not in OPTIONAL} | (
        dict.fromkeys(OPTIONAL) if null else {}
    )
    batch = collator(slots=1)([bare], np.random.default_rng(0))
    expected = collator(slots=1)([row | {"char_boxes": [], "x_height": 0.0}], np.random.default_rng(0))
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert (batch["token_places"] == -1).all()


def test_rows_of_a_batch_share_one_grid_and_one_length():
    rows = [document_row("ab\nc", 30, 16), document_row("x" * 70, 48, 8, seed=1)]
    batch = collator(slots=1)(rows, None)
    assert batch["pixel_values"].shape == (2, 3, 16, 48)
    visual = 2 * 6
    assert batch["input_ids"].shape == (2, visual + 96)  # 70 bytes, a prompt and an end need three steps of 32
    assert batch["attention_mask"].sum(dim=1).tolist() == [visual + 1 + 4 + 1, visual + 1 + 70 + 1]
    assert batch["character_classes"].shape == (2, visual, 1)


def test_a_given_shape_is_kept():
    batch = collator()([document_row("ab", 30, 16)], None, (3, 7, 2 * TEXT_STEP))
    assert batch["pixel_values"].shape == (1, 3, 24, 56)
    assert batch["input_ids"].shape == (1, 21 + 2 * TEXT_STEP)


def test_documents_get_the_pixels_of_the_image_processor():
    """What is trained on is what is read: same values for an image that needs no padding."""
    row = document_row("ab", 48, 16)
    page = to_rgb(Image.open(io.BytesIO(row["image"]["bytes"])))
    expected = image_processor()(page, kind="document")["pixel_values"]
    torch.testing.assert_close(collator()([row], None)["pixel_values"], expected, atol=1e-6, rtol=0)


def test_large_documents_shrink_with_their_boxes():
    row = document_row("ab", 192, 48)  # more than the 64 patches of x4, wider than 128 pixels
    row["char_boxes"] = [0, 0, 8, 8, 184, 40, 192, 48]
    batch = collator(slots=1)([row], None)
    rows, cols = (size // 8 for size in batch["pixel_values"].shape[-2:])
    assert rows * cols <= 64
    assert cols <= 16
    named = batch["character_classes"][0, :, 0].reshape(rows, cols)
    assert int(named[:, 0].max()) == class_of("a")
    last = (128 * 188 // 192) // 8  # 188 is the middle of b, the page is shrunk to 128 pixels
    assert class_of("b") in named[:, last - 1 : last + 1].flatten().tolist()


def test_the_paper_fills_the_padding():
    row = document_row("a", 8, 8)
    row["image"] = {"bytes": png(Image.new("L", (8, 8), 200)), "path": None}
    pixels = collator(do_normalize=False)([row], None, (2, 3, 0))["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((1, 3, 16, 24), 200 / 255))


def test_pictures_are_squares_of_their_scale_with_a_small_copy_for_the_teacher():
    small = collator("natural", 1)([picture_row("A dog.")], None)
    assert small["pixel_values"].shape == (1, 3, 32, 32)
    assert "teacher_pixel_values" not in small
    large = collator("natural", 4)([picture_row("A dog.")], None)
    assert large["pixel_values"].shape == (1, 3, 64, 64)
    assert large["teacher_pixel_values"].shape == (1, 3, 32, 32)
    assert large["labels"][0, 64 + 1 : 64 + 1 + 7].tolist() == [*byte_ids("A dog."), 1]
    assert (large["token_places"] == -1).all()


def test_pictures_are_drawn_as_evaluation_sees_them_without_a_generator():
    row = picture_row("a")
    picture = Image.open(io.BytesIO(row["image"]["bytes"]))
    expected = image_processor()(composite_picture(picture, None, 32))["pixel_values"]
    torch.testing.assert_close(collator("natural", 1)([row], None)["pixel_values"], expected)


def test_unshuffled_visual_tokens_have_no_places():
    batch = collator(unshuffle=2)([document_row("ab", 32, 16)], None)
    assert (batch["token_places"] == -1).all()
    assert (batch["input_ids"] == IMAGE_TOKEN).sum() == 2


def test_a_qformer_has_its_queries_in_front():
    batch = collator(connector="qformer")([document_row("ab", 32, 16)], None)
    assert (batch["input_ids"] == IMAGE_TOKEN).sum() == 5


def test_same_generator_state_same_batch():
    rows = [document_row("ab\ncd", 40, 16, seed) for seed in range(3)]
    pictures = [picture_row("a dog", seed=seed) for seed in range(3)]
    for kind, scale, given in (("document", 4, rows), ("natural", 4, pictures)):
        first, second, other = (
            collator(kind, scale, 2 if kind == "document" else 0)(given, np.random.default_rng(seed), (4, 8, 0))
            for seed in (1, 1, 2)
        )
        for key in first:
            assert torch.equal(first[key], second[key]), key
        assert not torch.equal(first["pixel_values"], other["pixel_values"])


@pytest.mark.parametrize("seed", range(6))
def test_boxes_move_with_the_augmented_text(seed):
    """The one dark block of a page is where its box says, whatever was done to the page."""
    page = np.full((24, 48), 255, dtype=np.uint8)
    page[8:16, 24:32] = 0
    row = document_row("a", 48, 24)
    row["image"] = {"bytes": png(Image.fromarray(page)), "path": None}
    row["char_boxes"] = [24, 8, 32, 16]
    batch = collator(slots=1, do_normalize=False)([row], np.random.default_rng(seed), (5, 9, 0))
    patches = batch["pixel_values"][0, 0].unfold(0, 8, 8).unfold(1, 8, 8).mean(dim=(2, 3)).flatten()
    paper = patches.median()
    darkest = (patches - paper).abs().topk(4).indices.tolist()  # the block may touch four patches
    place = int(batch["token_places"][0, 45 + 1])
    assert place in darkest
    assert int(batch["character_classes"][0, place, 0]) == class_of("a")


# -- lines as the Reader cuts them -------------------------------------------------------------------

STRIPS = {"reading_line_height": 16, "reading_baseline": 12.0}  # two patches high


def block_row(width: int, height: int, box: tuple[int, int, int, int]) -> dict:
    """A row of one character: a black block where `box` says, on white."""
    page = np.full((height, width), 255, dtype=np.uint8)
    page[box[1] : box[3], box[0] : box[2]] = 0
    row = document_row("a", width, height)
    return row | {"image": {"bytes": png(Image.fromarray(page)), "path": None}, "char_boxes": list(box)}


def lower_edges(height: int, seeds=range(40), **settings) -> list[float]:
    """Rows of pixels in which a block ends that stood at 12, on a grid of 4 rows, for several seeds."""
    row, edges = block_row(60, height, (20, 4, 40, 12)), []
    collate = collator(do_normalize=False, **settings)
    for seed in seeds:
        pixels = collate([row], np.random.default_rng(seed), (4, 9, 0))["pixel_values"][0, 0].numpy()
        profile = np.abs(pixels - np.median(pixels)).sum(axis=1)
        edges.append(np.flatnonzero(profile > 0.5 * profile.max())[-1] + 1)
    return edges


def test_a_strip_keeps_its_baseline_row_and_a_chunk_need_not():
    # augmentation moves a baseline by 1.4 pixels at most, and an edge of half ink may count or not
    assert max(abs(edge - 12) for edge in lower_edges(16, **STRIPS)) <= 2
    # 20 pixels in a grid of 32: anywhere in the 8 pixels of a patch
    assert max(lower_edges(20, **STRIPS)) >= 17


def test_chunks_of_another_height_are_treated_as_before():
    for row in (document_row("ab\ncd", 40, 24), document_row("ab", 40, 8)):
        for seed in range(3):
            given = [
                collator(slots=1, **settings)([row], np.random.default_rng(seed), (4, 8, 0))
                for settings in (STRIPS, {})
            ]
            assert all(torch.equal(given[0][key], given[1][key]) for key in given[1])


def test_a_strip_stands_at_the_top_without_a_generator_too():
    pixels = collator(do_normalize=False, **STRIPS)([block_row(60, 16, (20, 4, 40, 12))], None, (4, 9, 0))
    dark = pixels["pixel_values"][0, 0].numpy() < 0.5
    assert np.argwhere(dark).min(axis=0).tolist() == [4, 20]
    assert np.argwhere(dark).max(axis=0).tolist() == [11, 39]


@pytest.mark.parametrize(
    ("width", "cols", "expected"),
    [
        (70, 9, 72),  # the columns of the grid
        (60, 0, 128),  # of no given grid: max_side
        (300, 9, 300),  # is shrunk as it is
    ],
)
def test_a_strip_never_grows_so_wide_that_it_would_be_shrunk(monkeypatch, width, cols, expected):
    asked = []

    def widened(image, boxes, rng, baseline, widest):
        asked.append((image.width, baseline, widest))
        return image, boxes

    monkeypatch.setattr("training.collator.augment_line", widened)
    collator(**STRIPS)([document_row("ab", width, 16)], np.random.default_rng(0), (2 if cols else 0, cols, 0))
    assert asked == [(width, 12.0, expected)]


# -- augmentation ----------------------------------------------------------------------------------


def changed_line(seed: int, **given) -> tuple[np.ndarray, np.ndarray]:
    """A strip of 160 x 16 with blocks that stand on y = 12, changed: pixels and boxes."""
    page = np.full((16, 160), 255, dtype=np.uint8)
    boxes = np.array([[40, 5, 46, 12], [0, 0, 0, 0], [100, 3, 108, 12]], dtype=np.float32)
    for x0, y0, x1, y1 in boxes.astype(int):
        page[y0:y1, x0:x1] = 0
    image, moved = augment_line(Image.fromarray(page), boxes, np.random.default_rng(seed), 12.0, **given)
    assert boxes[0].tolist() == [40, 5, 46, 12]  # what was given is not changed
    return np.asarray(image), moved


@pytest.mark.parametrize("seed", range(40))
def test_boxes_of_a_line_stay_on_their_ink(seed):
    pixels, boxes = changed_line(seed)
    assert boxes[1].tolist() == [0, 0, 0, 0]  # white space
    ink = np.median(pixels) - pixels.astype(np.float64)
    ink[ink < 0.4 * ink.max()] = 0  # noise
    for box in boxes[[0, 2]]:
        left, right = int(box[0]) - 6, int(box[2]) + 7
        rows, columns = ink[:, left:right].sum(axis=1), ink[:, left:right].sum(axis=0)
        middle_y = (rows * (np.arange(16) + 0.5)).sum() / rows.sum()
        middle_x = (columns * (np.arange(left, right) + 0.5)).sum() / columns.sum()
        assert middle_x == pytest.approx((box[0] + box[2]) / 2, abs=0.75)
        assert middle_y == pytest.approx((box[1] + box[3]) / 2, abs=0.75)


def test_a_line_keeps_its_height_and_nearly_its_size_and_baseline():
    widths, baselines = [], []
    for seed in range(200):
        pixels, boxes = changed_line(seed)
        assert pixels.shape[0] == 16
        assert pixels.dtype == np.uint8
        widths.append(pixels.shape[1] / 160)
        baselines.append(boxes[0, 3] - 12)
    assert 0.93 * 0.92 - 0.01 <= min(widths) < 0.95
    assert 1.05 < max(widths) <= 1.07 * 1.08 + 0.01
    assert np.abs(baselines).max() <= 1.41
    assert np.std(baselines) == pytest.approx(0.5, rel=0.25)
    assert np.mean(baselines) == pytest.approx(0.0, abs=0.12)


def test_a_line_is_never_wider_than_it_may_be():
    widths = [changed_line(seed, widest=163)[0].shape[1] for seed in range(40)]
    assert max(widths) == 163
    assert min(widths) < 155
    _, boxes = changed_line(int(np.argmax(widths)), widest=163)
    assert boxes[2, 2] <= 163 * 108 / 160 + 1.5  # its boxes are as narrow as it is


def test_same_generator_state_same_line():
    for seed in range(20):
        (first, boxes), (second, same) = changed_line(seed), changed_line(seed)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(boxes, same)
    assert len({changed_line(seed)[0].tobytes() for seed in range(20)}) == 20


def test_a_strip_with_nothing_to_read_is_changed_too():
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(16, 64), dtype=np.uint8))
    for seed in range(20):
        image, boxes = augment_line(strip, np.zeros((0, 4), np.float32), np.random.default_rng(seed), 12.1)
        assert (image.mode, image.height) == ("L", 16)
        assert boxes.shape == (0, 4)


def test_augmented_documents_stay_readable_in_size():
    page, boxes = (
        Image.fromarray(np.full((40, 100), 255, dtype=np.uint8)),
        np.array([[10, 10, 20, 20]], dtype=np.float32),
    )
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(200):
        changed, moved = augment_document(page, boxes, rng)
        assert changed.mode == "L"
        assert 0.84 * 40 <= changed.height <= 1.13 * 40
        assert 0.79 * 100 <= changed.width <= 1.19 * 100
        expected = boxes.copy()
        expected[:, 0::2] *= changed.width / 100
        expected[:, 1::2] *= changed.height / 40
        np.testing.assert_allclose(moved, expected, rtol=1e-5)
        sizes.add(changed.size)
    assert len(sizes) > 50
    assert boxes.tolist() == [[10, 10, 20, 20]]  # what was given is not changed


def test_pictures_lie_whole_on_white_without_a_generator():
    flat = np.asarray(composite_picture(Image.new("RGB", (40, 20), (10, 20, 30)), None, 50))
    assert flat.shape == (50, 50, 3)
    inside = (flat == (10, 20, 30)).all(axis=2)
    assert inside.sum() == 46 * 23  # 92% of 50, aspect kept
    assert (flat[~inside] == 255).all()
    rows, cols = np.where(inside)
    assert abs((rows.min() + rows.max()) / 2 - 24.5) <= 1  # centred
    assert abs((cols.min() + cols.max()) / 2 - 24.5) <= 1


def test_pictures_keep_their_size_whatever_the_generator_says():
    rng = np.random.default_rng(0)
    for size in ((30, 30), (100, 7), (3, 90)):
        for _ in range(20):
            made = composite_picture(noise(*size), rng, 32)
            assert made.size == (32, 32)
            assert made.mode == "RGB"


def test_coarse_type_keeps_its_size_and_loses_its_detail():
    stripes = np.zeros((40, 100), dtype=np.uint8)
    stripes[:, ::2] = 255
    page = Image.fromarray(stripes)
    blurred = coarse(page, 0.25, np.random.default_rng(0))
    assert blurred.size == page.size
    assert np.asarray(blurred, dtype=np.float32).std() < 0.2 * stripes.std()
    assert coarse(page, 1.0, np.random.default_rng(0)) is page  # never enlarged beyond what was there


def test_a_scan_in_black_and_white_has_the_two_tones_and_what_lies_between_at_edges():
    ramp = np.tile(np.linspace(20, 220, 100).astype(np.uint8), (40, 1))
    scan = np.asarray(black_and_white(Image.fromarray(ramp), np.random.default_rng(0)))
    assert scan.shape == ramp.shape
    inner = np.concatenate([scan[:, :25].ravel(), scan[:, -20:].ravel()])  # the threshold lies at 35 to 75%
    assert len(np.unique(inner)) == 2


def test_raw_pixels_become_what_the_collator_gives_otherwise():
    for kind, scale, row in (
        ("document", 4, document_row("Hi", width=30, height=20)),
        ("natural", 4, picture_row("A dog.")),
    ):
        plain, raw = collator(kind, scale), collator(kind, scale)
        raw.raw = True
        wanted, given = plain([row], np.random.default_rng(3)), raw([row], np.random.default_rng(3))
        for key in ("pixel_values", "teacher_pixel_values"):
            if key in wanted:
                assert given[key].dtype == torch.uint8
                assert given[key].shape[1] == (1 if kind == "document" else 3)
                torch.testing.assert_close(normalized_pixels(given[key], raw.image_processor), wanted[key])
        assert torch.equal(given["input_ids"], wanted["input_ids"])
