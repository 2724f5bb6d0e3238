"""The reader with a model that says what it is told to, then with a real one of random weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import GenerationConfig

from modeling_unit import UnitForConditionalGeneration
from modeling_unit.image_input_unit import UnreadableInput
from modeling_unit.layout_unit import LayoutSettings
from modeling_unit.reading_unit import Block, Page, Reader
from training.tokenizer import TASK_TOKENS, byte_tokenizer

END = 1
SETTINGS = LayoutSettings(document_area=65536, max_width=1024, patch_size=8, max_lines=1)


class Parrot:
    """Stands in for a model: says `script(width in pixels of the image's ink)`, with probability `sure` a piece.

    Pieces are those of the byte tokenizer. A script that returns `None` goes on for ever without repeating itself.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, script, sure=0.5):
        self.script, self.sure = script, sure
        self.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0)
        self.calls = []

    def generate(self, input_ids, attention_mask, pixel_values, spatial_shapes, **settings):
        self.calls.append({"rows": len(input_ids), **settings})
        assert settings["do_sample"] is False
        scripts = []
        for pixels, (rows, cols) in zip(pixel_values, spatial_shapes.tolist(), strict=True):
            columns = (pixels[0, : rows * 8, : cols * 8] < 0).any(dim=0).nonzero().flatten().tolist()
            said = self.script(columns[-1] - columns[0] + 1 if columns else 0)
            endless = [6 + i * i * 7919 % 251 for i in range(5000)]
            scripts.append(endless if said is None else [*tiny.byte_ids(said), END])
        ids, done = input_ids, torch.zeros(len(input_ids), dtype=torch.bool)
        for step in range(settings["max_new_tokens"]):
            wanted = torch.tensor([script[min(step, len(script) - 1)] for script in scripts])
            logits = torch.full((len(ids), 262), math.log((1 - self.sure) / 261))
            logits[torch.arange(len(ids)), wanted] = math.log(self.sure)
            for process in settings["logits_processor"]:
                logits = process(ids, logits)
            chosen = logits.argmax(dim=-1).masked_fill(done, 0)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            done |= chosen == END
            for criterion in settings["stopping_criteria"]:
                done |= criterion(ids, None)
            if done.all():
                break
        return ids


def draw(lines, size=20, width=700):
    """A page of lines `(y, text)`."""
    page = Image.new("L", (width, 400), 255)
    for y, text in lines:
        ImageDraw.Draw(page).text((30, y), text, font=ImageFont.load_default(size), fill=0)
    return page


def ink_width(text, size=20):
    x0, _, x1, _ = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=ImageFont.load_default(size))
    return x1 - x0


def parrot_of(texts, **changes):
    """Knows each text by the width of its ink on a chunk, whatever the scale."""
    widths = {text: ink_width(text) for text in texts}
    scale = []

    def script(width):
        return min(texts, key=lambda text: abs(widths[text] * scale[0] - width))

    model = Parrot(script, **changes)
    # x-height of the font at size 20 is 11 pixels, of a chunk 9.5
    scale.append(9.5 / 11)
    return model


def reader_of(model, **settings):
    processor = tiny.processor(base_size=128, max_side=1024)
    return Reader(model, processor, settings=SETTINGS, **settings)


# Each at least 30 pixels longer than the one before.
POEM = [
    "moss",
    "quiet moss",
    "a quiet mossy river",
    "a quiet mossy river runs by",
    "a quiet mossy river runs by my home",
]


# ----------------------------------------------------------------------------------------------------------- by parrot


def test_lines_are_joined_by_newlines_and_blocks_by_blank_lines():
    model = parrot_of(POEM)
    page = reader_of(model).read(draw([(30, POEM[2]), (57, POEM[4]), (160, POEM[1]), (187, POEM[3])]))
    assert page.text == f"{POEM[2]}\n{POEM[4]}\n\n{POEM[1]}\n{POEM[3]}"
    assert [len(block.lines) for block in page.blocks] == [2, 2]
    assert page.size == (700, 400)


def test_markdown_has_the_texts_in_the_layouts_structure():
    said = ["- quiet moss", POEM[4], "- a quiet mossy river"]
    model = parrot_of(said)
    page = reader_of(model).read(draw([(30, said[1]), (160, said[0]), (187, said[2])]))
    assert page.markdown == f"{POEM[4]}\n\n- quiet moss\n- a quiet mossy river"
    assert "read" not in page.to_dict()["blocks"][0]
    assert Page([], (10, 10)).markdown == ""


def test_lines_that_nobody_can_tell_apart_stand_on_the_first_of_their_chunk():
    settings = LayoutSettings(document_area=65536, max_width=1024, patch_size=8, max_lines=3)
    for said, lines in ((POEM[2] + "\n" + POEM[4], POEM[2:5:2]), (POEM[3], [POEM[3], ""])):
        model = Parrot(lambda width, said=said: said)
        reader = Reader(model, tiny.processor(base_size=128, max_side=1024), settings=settings)
        page = reader.read(draw([(30, POEM[2]), (57, POEM[4])]))
        assert [line.text for line in page.blocks[0].read] == lines


def test_confidence_is_the_geometric_mean_of_the_pieces():
    page = reader_of(parrot_of(POEM, sure=0.7)).read(draw([(30, POEM[2])]))
    assert page.blocks[0].confidence == pytest.approx(0.7, rel=1e-5)
    assert page.confidence == pytest.approx(0.7, rel=1e-5)


def test_boxes_of_blocks_lie_on_their_ink():
    page = reader_of(parrot_of(POEM)).read(draw([(30, POEM[2]), (160, POEM[1])]))
    x0, y0, x1, y1 = page.blocks[1].box
    assert (x0, x1 - x0) == (pytest.approx(31, abs=2), pytest.approx(ink_width(POEM[1]), abs=2))
    assert 155 < y0 < y1 < 190


@pytest.mark.parametrize("size", [(1, 1), (300, 200)])
def test_a_blank_page_gives_no_text_and_asks_no_model(size):
    model = parrot_of(POEM)
    page = reader_of(model).read(Image.new("RGB", size, "white"))
    assert (page.text, page.blocks, page.confidence) == ("", [], 0.0)
    assert model.calls == []


def test_chunks_of_all_pages_share_batches_and_go_back_to_their_page():
    model = parrot_of(POEM)
    pages = reader_of(model, batch_size=4).read_many(
        [draw([(30, POEM[0]), (57, POEM[3])]), Image.new("L", (50, 50), 255), draw([(30, t) for t in POEM[4:]])]
    )
    assert [page.text for page in pages] == [f"{POEM[0]}\n{POEM[3]}", "", POEM[4]]
    assert [call["rows"] for call in model.calls] == [3]


def test_a_stream_ends_with_the_whole_page_and_comes_in_reading_order():
    lines = [(30, POEM[2]), (57, POEM[4]), (160, POEM[1]), (187, POEM[3]), (290, POEM[0])]
    model = parrot_of(POEM)
    parts = list(reader_of(model, batch_size=4).stream(draw(lines)))
    assert [(part.done, part.total) for part in parts] == [(0, 5), (1, 5), (3, 5), (5, 5)]
    assert [call["rows"] for call in model.calls] == [1, 2, 2]
    assert parts[0].page.text == ""
    assert parts[1].page.text == POEM[2]
    assert parts[2].page.text == f"{POEM[2]}\n{POEM[4]}\n\n{POEM[1]}"
    whole = reader_of(parrot_of(POEM)).read(draw(lines))
    assert parts[-1].page.text == whole.text
    assert parts[-1].page.blocks == whole.blocks
    assert [len(part.waiting) for part in parts] == [3, 2, 1, 0]
    assert parts[0].waiting == [block.box for block in whole.blocks]


def test_a_stream_of_a_blank_page_is_one_empty_page():
    (part,) = reader_of(parrot_of(POEM)).stream(Image.new("RGB", (300, 200), "white"))
    assert (part.page.text, part.waiting, part.done, part.total) == ("", [], 0, 0)


def test_a_picture_is_read_at_exactly_its_size():
    seen = []

    class Sized(Parrot):
        def generate(self, pixel_values, **settings):
            seen.append(tuple(pixel_values.shape))
            return super().generate(pixel_values=pixel_values, **settings)

    reader = reader_of(Sized(lambda width: "moss"))
    assert reader.read_resized(Image.new("RGB", (40, 24), "black"), "ocr") == "moss"
    assert seen == [(1, 3, 24, 40)]


def test_batches_are_no_larger_than_asked_for():
    model = parrot_of(POEM)
    lines = [(30 + 27 * i, text) for i, text in enumerate(POEM)]
    assert reader_of(model, batch_size=2).read(draw(lines)).text == "\n".join(POEM)
    assert [call["rows"] for call in model.calls] == [2, 2, 1]


def test_progress_starts_at_nothing_and_ends_at_all():
    seen = []
    lines = [(30 + 27 * i, text) for i, text in enumerate(POEM)]
    reader_of(parrot_of(POEM), batch_size=2).read_many([draw(lines)], lambda done, total: seen.append((done, total)))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_a_loop_is_stopped_told_and_cut_and_its_neighbours_are_not():
    chant = "and again " * 40
    model = Parrot(lambda width: chant if width > 150 else "moss")
    page = reader_of(model).read(draw([(30, POEM[4]), (160, POEM[0])]))
    looping, sound = page.blocks
    assert (looping.text, looping.repetition_stopped, looping.truncated) == ("and again", True, False)
    assert (sound.text, sound.repetition_stopped, sound.truncated) == ("moss", False, False)


def test_no_chunk_is_read_longer_than_it_can_hold():
    page = reader_of(Parrot(lambda width: None)).read(draw([(30, POEM[0])]))
    assert page.blocks[0].truncated
    assert not page.blocks[0].repetition_stopped
    assert 4 < len(page.blocks[0].text.encode()) < 60  # four letters are drawn


def test_a_long_chunk_does_not_let_a_short_one_run_on():
    model = Parrot(lambda width: None if width < 100 else POEM[4])
    page = reader_of(model).read(draw([(30, POEM[4]), (160, POEM[0])]))
    assert page.blocks[0].text == POEM[4]
    assert page.blocks[1].truncated
    assert len(page.blocks[1].text.encode()) < 60


def test_parts_of_a_long_line_are_joined_by_a_blank():
    settings = LayoutSettings(document_area=65536, max_width=128, patch_size=8, max_lines=1)
    model = Parrot(lambda width: "part")
    page = Reader(model, tiny.processor(base_size=128), settings=settings).read(draw([(30, POEM[4])]))
    assert set(page.text) == set("part ")
    assert page.text == " ".join(["part"] * sum(call["rows"] for call in model.calls))
    assert len(page.text) > 4


def test_what_is_read_as_nothing_leaves_no_block():
    assert reader_of(Parrot(lambda width: "  ")).read(draw([(30, POEM[0])])).blocks == []


def test_the_placeholder_of_images_is_never_read():
    model = parrot_of(POEM)
    reader_of(model).read(draw([(30, POEM[0])]))
    assert model.calls[0]["suppress_tokens"] == [tiny.IMAGE_TOKEN]


def test_a_page_is_written_as_json():
    page = Page([Block((1, 2, 30, 40), "moss\nriver", 0.5, [(1, 2, 30, 20)], 9.5)], (50, 60), 0.25)
    assert json.loads(json.dumps(page.to_dict())) == {
        "width": 50,
        "height": 60,
        "seconds": 0.25,
        "confidence": 0.5,
        "text": "moss\nriver",
        "blocks": [
            {
                "box": [1, 2, 30, 40],
                "text": "moss\nriver",
                "confidence": 0.5,
                "lines": [[1, 2, 30, 20]],
                "x_height": 9.5,
                "repetition_stopped": False,
                "truncated": False,
            }
        ],
    }


def test_a_page_is_as_sure_as_its_blocks_by_their_length():
    blocks = [Block((0, 0, 1, 1), "a" * 30, 0.9), Block((0, 0, 1, 1), "b" * 10, 0.5)]
    assert Page(blocks, (9, 9)).confidence == pytest.approx(0.8)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UnreadableInput, match=r"gone\.png: no such file"):
        reader_of(parrot_of(POEM)).read(tmp_path / "gone.png")


def test_a_caption_is_one_line():
    reader = reader_of(Parrot(lambda width: " a  red\nfox"))
    (caption,) = reader.describe([draw([(30, POEM[0])])])
    assert (caption.text, caption.confidence) == ("a red fox", pytest.approx(0.5, rel=1e-5))


def test_a_model_that_takes_larger_documents_gets_more_lines_at_once():
    assert reader_of(None).settings.max_lines == 1
    processor = tiny.processor(scale_as="side", base_size=224, max_side=1024)  # x4 is 896 x 896
    settings = Reader(None, processor).settings
    assert (settings.document_area, settings.max_width, settings.max_lines) == (896 * 896, 1024, 36)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        reader_of(None, batch_size=0)


# ------------------------------------------------------------------------------------------------------ looking again

STRIPS = LayoutSettings(
    document_area=65536, max_width=256, patch_size=8, max_lines=1, x_height=8.0, line_height=16, baseline=12.0
)


class Squinter(Parrot):
    """Answers each image it is shown with the next of `answers`, `(text, probability of each piece)`."""

    def __init__(self, *answers):
        super().__init__(None)
        self.answers, self.shown = list(answers), []

    def generate(self, input_ids, attention_mask, pixel_values, spatial_shapes, **settings):
        assert len(input_ids) == 1
        self.shown.append(pixel_values[0])
        text, self.sure = self.answers[min(len(self.shown), len(self.answers)) - 1]
        self.script = lambda width: text
        return super().generate(input_ids, attention_mask, pixel_values, spatial_shapes, **settings)


def look(model, looks=4, texts=("rain",), settings=STRIPS, **kept):
    processor = tiny.processor(base_size=128, max_side=1024, **kept)
    reader = Reader(model, processor, settings=settings, batch_size=1, looks=looks)
    return reader.read(draw([(50 + 60 * i, text) for i, text in enumerate(texts)]))


def test_a_doubtful_line_is_looked_at_again_and_its_surest_reading_stays():
    model = Squinter(("ram", 0.6), ("rein", 0.7), ("rain", 0.9), ("roin", 0.8))
    page = look(model)
    assert (page.text, len(model.shown)) == ("rain", 4)
    assert page.confidence == pytest.approx(0.9)


def test_each_look_shows_the_line_otherwise():
    model = Squinter(("rain", 0.6))
    look(model, looks=6)
    first, *others = model.shown
    assert len(others) == 5
    for index, shown in enumerate(others):
        assert not any(shown.shape == one.shape and torch.equal(shown, one) for one in [first, *others[:index]])


@pytest.mark.parametrize(("text", "sure"), [("rain", 0.995), ("", 0.5)])
def test_a_line_that_is_sure_or_empty_is_looked_at_once(text, sure):
    model = Squinter((text, sure))
    assert look(model).text == text
    assert len(model.shown) == 1


def test_only_the_lines_in_doubt_are_looked_at_again():
    model = Squinter(("moss", 0.5), ("mess", 0.4), ("a quiet mossy river", 0.995))  # narrow ones are read first
    assert look(model, looks=2, texts=[POEM[0], POEM[2]]).text == "moss\n\na quiet mossy river"
    assert len(model.shown) == 3


def test_a_finished_reading_beats_a_surer_one_that_was_cut_short():
    model = Squinter((None, 0.98), ("rain", 0.4), (None, 0.99), (None, 0.99))
    page = look(model)
    assert (page.text, page.blocks[0].truncated) == ("rain", False)


def test_a_reading_that_stutters_is_looked_at_again_however_sure_it_is():
    model = Squinter(("the file the file was", 0.999), ("the file was", 0.95), ("the fire was", 0.9))
    assert look(model, texts=POEM[3:4]).text == "the file was"
    assert len(model.shown) == 4


def test_what_is_printed_twice_is_read_twice():
    model = Squinter(("the file the file was", 0.95))
    assert look(model, texts=POEM[3:4]).text == "the file the file was"


def test_no_look_is_wider_than_the_model_takes():
    model = Squinter(("rain", 0.6))
    look(model, looks=6, texts=["a quiet mossy river runs by my home"], settings=STRIPS)
    assert max(shown.shape[-1] for shown in model.shown) <= STRIPS.max_width


def test_looks_are_as_the_model_was_saved_and_one_otherwise():
    once, thrice = Squinter(("rain", 0.6)), Squinter(("rain", 0.6))
    look(once, looks=None)
    look(thrice, looks=None, reading_looks=3)
    assert (len(once.shown), len(thrice.shown)) == (1, 3)


def test_models_that_read_chunks_look_once():
    model = Squinter(("rain", 0.6))
    look(model, settings=SETTINGS)
    assert len(model.shown) == 1


@pytest.mark.parametrize("looks", [0, 7])
def test_looks_that_there_are_not_are_refused(looks):
    with pytest.raises(ValueError, match=f"looks must lie between 1 and 6, got {looks}"):
        look(None, looks=looks)


# ------------------------------------------------------------------------------------------------ what is no text


def test_evidence_grows_with_letters_and_with_confidence():
    blocks = [
        Block((0, 0, 9, 9), text, sure) for text, sure in [("1", 0.9), ("rain", 0.9), ("rain", 0.99), ("- * |", 0.99)]
    ]
    assert [block.evidence for block in blocks] == pytest.approx([9, 36, 396, 0])
    assert Block((0, 0, 9, 9), "1", 1.0).evidence > 1e5


@pytest.mark.parametrize(("text", "sure", "read"), [("1", 0.9, ""), ("rain", 0.5, ""), ("rain", 0.9, "rain")])
def test_nothing_is_read_on_a_page_of_little_evidence(text, sure, read):
    processor = tiny.processor(base_size=128, max_side=1024, reading_evidence=14.0)
    model = Squinter((text, sure))
    page = draw([(30, POEM[2])])
    assert Reader(model, processor, settings=SETTINGS, batch_size=1).read(page).text == read
    assert Reader(model, processor, settings=SETTINGS, batch_size=1, evidence=0).read(page).text == text


def test_the_evidence_is_that_of_the_whole_page():
    model = Squinter(("1", 0.9), ("a quiet mossy river", 0.99))
    page = draw([(30, "1"), (200, POEM[2])])
    read = Reader(model, tiny.processor(base_size=128, max_side=1024), settings=SETTINGS, batch_size=1, evidence=14)
    assert read.read(page).text == "1\n\na quiet mossy river"


@pytest.mark.parametrize("evidence", [-1, math.nan])
def test_evidence_below_nothing_is_refused(evidence):
    with pytest.raises(ValueError, match="evidence must be at least 0"):
        reader_of(None, evidence=evidence)


# -------------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def real():
    """A random model, float64 so that the order of sums decides nothing; and a reader for chunks of 64 x 64."""
    torch.manual_seed(0)
    model = tiny.unit_model(text=tiny.QWEN3, model_class=UnitForConditionalGeneration).double()
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0)
    settings = LayoutSettings(
        document_area=4096, max_width=128, patch_size=8, max_lines=1, x_height=6.0, min_x_height=5.0
    )
    return model, tiny.processor(), settings


def test_a_page_reads_alike_alone_and_in_company(real):
    model, processor, settings = real
    pages = [draw([(30, POEM[1])]), draw([(30, POEM[2]), (100, POEM[0])]), draw([(30, "x")])]
    together = Reader(model, processor, settings=settings).read_many(pages)
    alone = [Reader(model, processor, batch_size=1, settings=settings).read(page) for page in pages]
    assert [page.text for page in together] == [page.text for page in alone]
    assert [page.confidence for page in together] == pytest.approx([page.confidence for page in alone], rel=1e-5)


def test_the_confidence_of_a_caption_is_what_the_model_says_of_it(real):
    model, processor, settings = real
    picture = tiny.noise(40, 40)
    (read,) = Reader(model, processor, settings=settings)._generate([picture], "caption", [7])
    inputs = processor(images=[picture], task="caption")
    ids = model.generate(**inputs, max_new_tokens=7, do_sample=False, suppress_tokens=[tiny.IMAGE_TOKEN])
    prompt = inputs["input_ids"].shape[1]
    assert ids.shape[1] == prompt + 7  # seven pieces, no end
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**inputs).logits[0, prompt - 1 : -1]
    logits[:, tiny.IMAGE_TOKEN] = -math.inf
    wanted = torch.log_softmax(logits, dim=-1)[torch.arange(7), ids[0, prompt:]].mean().exp().item()
    assert read.confidence == pytest.approx(wanted, rel=1e-4)
    assert read.truncated


def test_labels_are_ranked_by_their_mean_likelihood(real):
    model, processor, settings = real
    picture = tiny.noise(40, 40)
    labels = ["cat", "a very large dog", "é", "house"]
    ranked = Reader(model, processor, batch_size=3, settings=settings).rank_labels(picture, labels)
    wanted = {}
    for label in labels:  # one by one, the loss as the model itself computes it
        inputs = processor(images=[picture], task="caption")
        added = [*byte_tokenizer()(label)["input_ids"], END]
        given = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([added])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        answer = inputs["input_ids"].clone()
        answer[:, :given] = -100
        wanted[label] = math.exp(-model(**inputs, labels=answer).loss.item())
    assert [one.label for one in ranked] == sorted(labels, key=lambda label: -wanted[label])
    assert {one.label: one.likelihood for one in ranked} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("labels", [[], ["dog", " "]])
def test_labels_must_say_something(real, labels):
    model, processor, settings = real
    with pytest.raises(ValueError, match="at least one label"):
        Reader(model, processor, settings=settings).rank_labels(tiny.noise(20, 20), labels)


def test_the_prompt_asked_with_is_that_of_the_task(real):
    model, processor, _ = real
    assert processor.prompt_ids("ocr") == byte_tokenizer()(TASK_TOKENS["ocr"])["input_ids"]
    assert np.isfinite(model(**processor(images=[tiny.noise(20, 20)], task="ocr")).logits.detach().numpy()).all()
