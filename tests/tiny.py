"""Models, processors and rows so small that a test of them takes milliseconds."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modeling_unit import (
    UnitConfig,
    UnitForPreTraining,
    UnitImageProcessor,
    UnitProcessor,
    UnitVisionConfig,
)
from training.data.schema import make_row
from training.tokenizer import TASK_TOKENS, byte_tokenizer

PATCH = 8
IMAGE_TOKEN = 2  # the byte tokenizer's
PROMPTS = {"ocr": 3, "caption": 4, "markdown": 5}  # its ids of the task tokens
OPT = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 2, "vocab_size": 262, "max_position_embeddings": 256, "dropout": 0.0}
OPT |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
QWEN3 = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
QWEN3 |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 262}
QWEN3 |= {"max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
QWEN3 |= {"tie_word_embeddings": True}


def vision_config(**changes) -> UnitVisionConfig:
    """Two layers of width 32, patches of 8; the table of positions has 8 x 8 entries and covers the nominal size."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    settings |= {"patch_size": PATCH, "image_size": 64, "cpe_max_size": 64}
    return UnitVisionConfig(**(settings | changes))


def unit_config(vision=None, text=None, connector="mlp", unshuffle=1, **changes) -> UnitConfig:
    """`vision`, `text`: configurations or dicts; a UNIT encoder and an OPT decoder by default."""
    shape = {"connector_type": connector, "unshuffle": unshuffle, "num_queries": 5}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    return UnitConfig(
        vision_config=vision_config() if vision is None else vision,
        text_config=dict(OPT if text is None else text),
        connector_config=shape,
        **({"image_token_id": IMAGE_TOKEN} | changes),
    )


def unit_model(*args, model_class=UnitForPreTraining, **kwargs):
    """A random model in evaluation mode; see `unit_config`."""
    return model_class(unit_config(*args, **kwargs)).eval()


def image_processor(**changes) -> UnitImageProcessor:
    """x1 is 32 x 32 pixels, x4 the area of 64 x 64."""
    settings = {"patch_size": PATCH, "base_size": 32, "scale_as": "area", "max_side": 128}
    return UnitImageProcessor(**(settings | changes))


def processor(connector="mlp", unshuffle=1, **changes) -> UnitProcessor:
    """The processor of `unit_model` with the same connector."""
    return UnitProcessor(
        image_processor(**changes),
        byte_tokenizer(),
        task_prompts=TASK_TOKENS,
        unshuffle=unshuffle,
        num_queries=5 if connector == "qformer" else None,
    )


def byte_ids(text: str) -> list[int]:
    """Ids of the byte tokenizer for ASCII: six special tokens, then the bytes in the order of their stand-ins."""
    table = byte_tokenizer().get_vocab()
    return [table[{" ": "Ġ", "\n": "Ċ"}.get(character, character)] for character in text]


def draw_page(text: str, width: int, height: int, size: int = 10) -> Image.Image:
    """Dark text on light paper, mode L."""
    page = Image.new("L", (width, height), 245)
    ImageDraw.Draw(page).multiline_text((1, 0), text, fill=10, font=ImageFont.load_default(size=size), spacing=2)
    return page


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with something everywhere, RGB."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def document_row(text: str, width: int = 48, height: int = 16, seed: int = 0) -> dict:
    """A row of the schema: noise on paper, with a box of 4 x 8 pixels for each character, lines 8 pixels apart."""
    pixels = np.random.default_rng(seed).integers(200, 256, size=(height, width), dtype=np.uint8)
    boxes, x, y = [], 0, 0
    for character in text:
        if character == "\n":
            boxes.append([0, 0, 0, 0])
            x, y = 0, y + 8
            continue
        boxes.append([0, 0, 0, 0] if character == " " else [x, y, x + 4, y + 8])
        x += 4
    return make_row(
        pixels,
        text,
        task="ocr",
        kind="document",
        source=f"test/{seed}",
        license="CC0-1.0",
        split="train",
        char_boxes=np.array(boxes, dtype=np.int16).reshape(-1, 4),
        x_height=5.0,
    )


def picture_row(text: str, side: int = 20, seed: int = 0) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    return make_row(
        pixels, text, task="caption", kind="natural", source=f"test/{seed}", license="CC0-1.0", split="train"
    )


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
