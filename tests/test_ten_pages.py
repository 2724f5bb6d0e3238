"""The test that comes before anything larger: ten pages are learned by heart and read back, word by word.

Public reports of the nearest recipe (Vary-tiny: a small OPT and the HF Trainer) stuck at a loss of 2.7 over whole
epochs. A wrong shift of the labels, a mask over the wrong tokens, a frozen part or an image that never reaches the
decoder would each show here within seconds.
"""

import numpy as np
import torch
from tiny import OPT, draw_page, processor, unit_model, vision_config
from transformers import Trainer, TrainingArguments

from benchmarks import ten_pages
from training.collator import GroupCollator
from training.data.schema import png_bytes

TEXTS = [
    "red fox",
    "blue whale",
    "ten small\nducks",
    "a quick owl",
    "old stone\nbridge",
    "green tea",
    "two cats",
    "long winter\nnight",
    "paper boat",
    "one more\nday",
]


def test_ten_pages_are_overfitted_and_read_back(tmp_path):
    torch.manual_seed(0)
    pages = [draw_page(text, 64, 24) for text in TEXTS]
    read = processor(max_side=64)
    vision = vision_config(hidden_size=64, intermediate_size=128, cpe_crop=False, cpe_drop_prob=0.0)
    decoder = OPT | {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "max_position_embeddings": 128}
    model = unit_model(vision=vision, text=decoder)
    rows = [
        {"image": {"bytes": png_bytes(np.asarray(page))}, "text": text, "task": "ocr", "char_boxes": []}
        for page, text in zip(pages, TEXTS, strict=True)
    ]
    batch = GroupCollator(read, "document", 4)(rows, None)
    batch.pop("token_places")
    examples = [{key: value[index] for key, value in batch.items()} for index in range(len(rows))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=400,
        per_device_train_batch_size=10,
        learning_rate=3e-3,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 2.0
    assert losses[-1] < 0.05
    model.eval()
    inputs = read(images=pages, task="ocr")
    made = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=1)
    assert read.decode_new(made, inputs) == TEXTS
    alone = read(images=pages[7], task="ocr")
    assert read.decode_new(model.generate(**alone, max_new_tokens=24, eos_token_id=1), alone) == [TEXTS[7]]


def test_the_command_says_what_it_missed(capsys):
    """Two steps of a small decoder are not enough: the verdict is in the words and in the exit status."""
    threads = torch.get_num_threads()
    assert ten_pages.main(["--layers", "1", "--width", "64", "--steps", "2"]) == 1
    told = capsys.readouterr().out
    assert "decoder: OPT, 1 layers, width 64, 1 heads" in told
    assert "MISSED: loss" in told
    assert "0 of 10 pages exact" in told
    assert torch.get_num_threads() == threads


def test_the_commands_pages_cannot_be_told_apart_without_their_images():
    assert len(set(ten_pages.PAGES)) == 10
    # prompt and end beside the text: all ten are padded to one length, so that no page shows in its mask
    assert all(len(page.encode()) + 2 <= 64 for page in ten_pages.PAGES)
    # by heart alone, a page chosen at random costs ln(10) once: more than the loss at which the run may end
    longest = max(len(page.encode()) + 1 for page in ten_pages.PAGES)
    assert np.log(10) / longest > ten_pages.ENOUGH
