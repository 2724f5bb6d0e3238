"""Reading models of transformers, in a process of our own environment: `python hub_worker.py SETTINGS`, JSON of
`source`, `revision`, `family`, `device`, `threads`.

Prompts and settings of generation are those that each family's own documentation in transformers uses; greedy.
"""

import json
import re
import sys

from training.evaluation.peers.workers.serve import peak_memory, serve

MOST_PIECES = 4096  # of one page, where the model itself has no limit
LINES = 8  # of TrOCR at once [ours]
# What Donut was told in its training on text of all kinds, then in that on receipts; the first that it knows is used.
DONUT_PROMPTS = ("<s_synthdog>", "<s_iitcdip>", "<s_cord-v2>")


def start(settings):
    """`(version, read)` of :func:`serve`."""
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(settings["threads"])
    transformers.logging.disable_progress_bar()
    family, device = settings["family"], settings["device"]
    source, revision = settings["source"], settings["revision"]
    # neither class runs code of a repository
    kinds = {"got_ocr2": transformers.GotOcr2ForConditionalGeneration}
    kind = kinds.get(family, transformers.VisionEncoderDecoderModel)
    processor = transformers.AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    dtype = torch.float32 if device == "cpu" else "auto"
    model = kind.from_pretrained(source, revision=revision, use_safetensors=True, dtype=dtype).eval().to(device)
    read_picture = {"trocr": trocr, "donut": donut, "nougat": nougat, "got_ocr2": got_ocr2}[family](model, processor)

    def read(pixels, request):
        image = Image.frombytes("RGB", (request["width"], request["height"]), pixels)
        with torch.inference_mode():
            text = read_picture(image)
        return text, torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_memory()

    return f"transformers {transformers.__version__}", read


def trocr(model, processor):
    """One line at a time; the page is cut by UNIT's layout, cells of one row stay on one line."""
    from modeling_unit.layout_unit import analyse_page

    most = longest(model, 0)

    def read(image):
        layout = analyse_page(image)
        rows, crops = [], []
        for block in layout.blocks:
            before = None
            for line in block.lines:
                margin = round(line.x_height / 2)
                x0, y0, x1, y1 = line.box
                box = (max(0, x0 - margin), max(0, y0 - margin), x1 + margin, y1 + margin)
                crops.append(layout.image.crop((*box[:2], *map(min, box[2:], layout.image.size))).convert("RGB"))
                rows.append(before is not None and line.row == before)
                before = line.row
        texts = []
        for first in range(0, len(crops), LINES):
            pixels = processor(images=crops[first : first + LINES], return_tensors="pt").pixel_values
            made = model.generate(pixels.to(model.device, model.dtype), max_new_tokens=most, do_sample=False)
            texts += processor.batch_decode(made, skip_special_tokens=True)
        return "".join((" " if joined else "\n") + text for joined, text in zip(rows, texts, strict=True)).strip()

    return read


def donut(model, processor):
    """The whole picture, after a prompt that its tokenizer knows; the values of its fields, one a line."""
    tokenizer = processor.tokenizer
    known = [prompt for prompt in DONUT_PROMPTS if prompt in tokenizer.get_vocab()]
    ids = [tokenizer.convert_tokens_to_ids(known[0]) if known else model.generation_config.decoder_start_token_id]
    most = longest(model, len(ids))

    def read(image):
        import torch

        pixels = processor(images=image, return_tensors="pt").pixel_values
        made = model.generate(
            pixels.to(model.device, model.dtype),
            decoder_input_ids=torch.tensor([ids], device=model.device),
            max_new_tokens=most,
            do_sample=False,
            bad_words_ids=None if tokenizer.unk_token_id is None else [[tokenizer.unk_token_id]],
        )
        text = tokenizer.batch_decode(made[:, len(ids) :])[0]
        for special in (tokenizer.eos_token, tokenizer.pad_token):
            text = text.replace(special, "") if special else text
        # Some models write their prompt's end, some another field first: tags are no text.
        return "\n".join(part.strip() for part in re.split(r"<[^<>\s]*>", text) if part.strip())

    return read


def nougat(model, processor):
    """The whole page as Markdown, put in order by the tokenizer's own rules where the packages for them are there."""
    tokenizer = processor.tokenizer
    most = longest(model, 1)

    def read(image):
        pixels = processor(images=image, return_tensors="pt").pixel_values
        made = model.generate(
            pixels.to(model.device, model.dtype),
            max_new_tokens=most,
            do_sample=False,
            bad_words_ids=None if tokenizer.unk_token_id is None else [[tokenizer.unk_token_id]],
        )
        text = tokenizer.batch_decode(made, skip_special_tokens=True)[0]
        try:
            return processor.post_process_generation(text, fix_markdown=False)
        except ImportError:  # nltk and Levenshtein, which nothing else needs
            return text.strip()

    return read


def got_ocr2(model, processor):
    """The whole picture as plain text."""
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), processor.tokenizer.get_vocab().get("<|im_end|>")}
    ends = sorted(end for end in ends if end is not None)

    def read(image):
        inputs = processor(images=image, return_tensors="pt").to(model.device, model.dtype)
        made = model.generate(**inputs, do_sample=False, max_new_tokens=MOST_PIECES, eos_token_id=ends)
        new = made[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip()

    return read


def longest(model, given):
    """Pieces that may follow ``given`` ones: as many as the decoder has positions for."""
    positions = getattr(model.config.decoder, "max_position_embeddings", None) or MOST_PIECES
    return max(1, min(MOST_PIECES, positions) - max(1, given))


if __name__ == "__main__":
    serve(lambda: start(json.loads(sys.argv[1])))
