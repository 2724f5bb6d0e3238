"""The processor: prompts of tasks, placeholders, padding on the left, and what is refused."""

import pytest
import torch
from tiny import IMAGE_TOKEN, PROMPTS, byte_ids, image_processor, noise, processor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from modeling_unit import UnitProcessor
from training.tokenizer import byte_tokenizer


@pytest.mark.parametrize("task", ["ocr", "caption", "markdown"])
def test_a_task_is_placeholders_and_its_prompt(task):
    inputs = processor()(images=noise(24, 16), task=task, kind="document")
    assert inputs["input_ids"].tolist() == [[IMAGE_TOKEN] * 6 + [PROMPTS[task]]]  # 2 x 3 patches
    assert inputs["attention_mask"].tolist() == [[1] * 7]
    assert inputs["pixel_values"].shape == (1, 3, 16, 24)
    assert inputs["spatial_shapes"].tolist() == [[2, 3]]


def test_batches_are_padded_on_the_left():
    inputs = processor()(images=[noise(8, 8), noise(24, 16)], task="ocr")
    assert inputs["input_ids"].tolist() == [[0] * 5 + [IMAGE_TOKEN, 3], [IMAGE_TOKEN] * 6 + [3]]
    assert inputs["attention_mask"].tolist() == [[0] * 5 + [1, 1], [1] * 7]


def test_unshuffle_and_queries_decide_the_number_of_placeholders():
    picture = noise(40, 24)  # 3 x 5 patches
    assert (processor(unshuffle=2)(picture, task="ocr")["input_ids"] == IMAGE_TOKEN).sum() == 2 * 3
    assert (processor(connector="qformer")(picture, task="ocr")["input_ids"] == IMAGE_TOKEN).sum() == 5


def test_tasks_choose_the_kind_of_image():
    picture = noise(100, 100)  # larger than x1 (4 x 4 patches) and x4 (8 x 8)
    assert processor()(picture, task="caption")["spatial_shapes"].tolist() == [[4, 4]]
    assert processor()(picture, task="ocr")["spatial_shapes"].tolist() == [[8, 8]]
    assert processor()(picture, task="markdown")["spatial_shapes"].tolist() == [[8, 8]]
    assert processor()(picture, task="ocr", scale=1)["spatial_shapes"].tolist() == [[4, 4]]
    assert processor()(picture, task="ocr", kind="natural")["spatial_shapes"].tolist() == [[4, 4]]


@pytest.mark.parametrize("text", ["hi", "<image>hi", "<image><image>hi"])
def test_text_gets_the_placeholders_in_front_with_and_without_the_image_token(text):
    inputs = processor()(images=noise(32, 32), text=text)
    assert inputs["input_ids"].tolist() == [[IMAGE_TOKEN] * 16 + byte_ids("hi")]


def test_one_text_serves_all_images_and_each_may_have_its_own():
    pictures = [noise(32, 32), noise(32, 32, 1)]
    shared = processor()(images=pictures, text="a b")["input_ids"]
    assert shared[0].tolist() == shared[1].tolist() == [IMAGE_TOKEN] * 16 + byte_ids("a b")
    own = processor()(images=pictures, text=["a", "bcd"])
    assert own["input_ids"][0].tolist() == [0, 0] + [IMAGE_TOKEN] * 16 + byte_ids("a")
    assert own["attention_mask"][0].tolist() == [0, 0] + [1] * 17


def test_a_prompt_given_as_text_reads_like_its_task():
    page = noise(100, 100)
    by_task, by_text = processor()(page, task="ocr"), processor()(page, text="<image><ocr>")
    for key in by_task:
        assert torch.equal(by_task[key], by_text[key]), key


def messages(image, prompt):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]


def test_messages_give_the_inputs_of_the_plain_prompt(tmp_path):
    """An image and the path of one; one conversation and two; before and after saving."""
    made, picture = processor(), noise(40, 24)
    picture.save(tmp_path / "picture.png")
    made.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").is_file()
    wanted = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for one in (made, UnitProcessor.from_pretrained(tmp_path / "saved")):
        for prompt in (made.task_prompts["ocr"], "What is this?"):
            expected = made(images=[picture], text=prompt)
            for image in (picture, str(tmp_path / "picture.png")):
                found = one.apply_chat_template(messages(image, prompt), **wanted)
                assert found.keys() == expected.keys()
                for name, tensor in expected.items():
                    assert torch.equal(found[name], tensor), name
        both = one.apply_chat_template([messages(picture, made.task_prompts["ocr"])] * 2, **wanted)
        assert torch.equal(both["input_ids"], made(images=[picture] * 2, task="ocr")["input_ids"])


def test_a_conversation_that_is_none_of_ours_is_refused():
    made, said = processor(), messages(noise(40, 24), "Read the text:")
    with pytest.raises(Exception, match="one message of the user"):
        made.apply_chat_template([*said, {"role": "assistant", "content": "It says"}])
    said[0]["content"] += [{"type": "image", "image": noise(40, 24)}]
    with pytest.raises(ValueError, match="exactly one image, got 2"):
        made.apply_chat_template(said, tokenize=True, return_dict=True)


def test_text_alone_is_tokenised():
    inputs = processor()(text=["a", "bcd"])
    assert inputs["input_ids"].tolist() == [[0, 0] + byte_ids("a"), byte_ids("bcd")]
    assert "pixel_values" not in inputs


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"images": noise(8, 8), "task": "translate"},
            "Unknown task 'translate'. This model knows: caption, markdown, ocr",
        ),
        ({"images": noise(8, 8)}, "exactly one of task and text"),
        ({"images": noise(8, 8), "task": "ocr", "text": "a"}, "exactly one of task and text"),
        ({}, "Give images"),
        ({"images": [], "task": "ocr"}, "No image"),
        ({"images": [], "text": "a"}, "No image"),
        ({"images": [noise(8, 8)], "text": ["a", "b"]}, "1 images but 2 texts"),
        ({"images": ["page.png"], "task": "ocr"}, "Open files with PIL"),
        ({"images": noise(8, 8), "task": "ocr", "kind": "photo"}, "kind must be one of"),
    ],
)
def test_wrong_calls_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        processor()(**given)


def test_arrays_in_a_batch_are_taken_as_the_image_processor_takes_them():
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    inputs = processor()(images=pixels, task="caption")
    assert inputs["pixel_values"].shape[0] == 2


def test_decode_new_gives_what_came_behind_the_prompt():
    read = processor()
    inputs = read(images=[noise(8, 8), noise(24, 16)], task="ocr")
    made = torch.tensor([byte_ids("hi") + [1], byte_ids("a b")])
    assert read.decode_new(torch.cat([inputs["input_ids"], made], dim=1), inputs) == ["hi", "a b"]


def test_prompts_travel_with_the_model(tmp_path):
    read = UnitProcessor(image_processor(), byte_tokenizer(), task_prompts={"ocr": "read!"}, unshuffle=3)
    read.save_pretrained(tmp_path)
    for loaded in (UnitProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is UnitProcessor
        assert loaded.task_prompts == {"ocr": "read!"}
        assert (loaded.unshuffle, loaded.num_queries, loaded.image_token) == (3, None, "<image>")
        assert loaded.tokenizer.padding_side == "left"
        page = noise(40, 40)
        for key, value in read(page, task="ocr").items():
            assert torch.equal(loaded(page, task="ocr")[key], value), key


def test_the_image_token_is_added_to_a_tokenizer_that_lacks_it():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "read": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<kept>"]})
    before = tokenizer.convert_tokens_to_ids("<kept>")
    read = UnitProcessor(image_processor(), tokenizer, task_prompts={"ocr": "read"}, unshuffle=1)
    assert read.image_token_id == 4
    assert read(images=noise(8, 8), task="ocr")["input_ids"].tolist() == [[4, 1]]
    assert tokenizer.convert_tokens_to_ids("<kept>") == before
    assert tokenizer("<kept>")["input_ids"] == [before]  # special tokens of its own stay special


def test_the_byte_tokenizer_gives_back_every_text():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 262
    for text in ("Hello, world", "two\nlines", "  spaces  ", "naïve café – 价格 😀", "<ocr"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    names = ["<pad>", "<eos>", "<image>", "<ocr>", "<caption>", "<markdown>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5]
