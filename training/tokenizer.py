"""Tokenizers of language decoders that start from scratch."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, IMAGE = "<pad>", "<eos>", "<image>"
TASK_TOKENS = {"ocr": "<ocr>", "caption": "<caption>", "markdown": "<markdown>"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One piece for each byte of UTF-8, with one special token for each task prompt.

    For unit-tiny [ours]: a hundred frequent pieces are learned within minutes, no text is out of vocabulary, and a
    piece is a character, so that its place on the page is known. Ids: 0 padding, 1 end, 2 image, 3-5 tasks, then the
    256 bytes.
    """
    specials = [PAD, EOS, IMAGE, *TASK_TOKENS.values()]
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, additional_special_tokens=specials[2:]
    )
