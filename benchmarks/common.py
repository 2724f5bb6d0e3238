"""What the benchmarks share: the machine's own speed, operation counts, interleaved timing.

A floating point operation (FLOP) is one multiplication or one addition; a matrix product (m, k) x (k, n) has 2 m k n.
Rates are in FLOP a second, times in seconds.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from training.evaluation.measuring import interleave, synchronise

__all__ = [
    "decoder_flops",
    "encoder_flops",
    "interleave",
    "matmul_rate",
    "peak_memory",
    "ratio",
    "shuffled_documents",
    "synchronise",
    "training_flops",
]

# ---------------------------------------------------------------------------------------------------------------------
# Operation counts
# ---------------------------------------------------------------------------------------------------------------------


def encoder_flops(config, rows: int, cols: int) -> int:
    """FLOPs of one forward pass of a vision transformer over one image of ``rows`` x ``cols`` patches.

    Counted are the patch embedding, the four projections of attention, its two products (over all tokens, prefix
    included), and the two layers of the MLP. Norms, softmax and activations are left out: under 3% at any size here.

    Args:
        config: with ``hidden_size, intermediate_size, num_hidden_layers, patch_size`` and, where it has them,
            ``num_channels`` and ``num_prefix_tokens`` (else 3 and 1): ``UnitVisionConfig``, ``CLIPVisionConfig``.
    """
    patches = rows * cols
    tokens = patches + getattr(config, "num_prefix_tokens", 1)
    width, hidden = config.hidden_size, config.intermediate_size
    embedding = 2 * patches * getattr(config, "num_channels", 3) * config.patch_size**2 * width
    projections = 2 * tokens * 4 * width * width
    attention = 2 * 2 * tokens * tokens * width
    mlp = 2 * tokens * 2 * width * hidden
    return embedding + config.num_hidden_layers * (projections + attention + mlp)


def decoder_flops(config, tokens: int, labelled: int | None = None) -> int:
    """FLOPs of one forward pass of a causal language model over one sequence of ``tokens`` positions.

    Attention is counted as a causal kernel does it, over (tokens + 1) / 2 positions on average.

    Args:
        config: of OPT (``ffn_dim``, a two-layer MLP) or of a Llama or Qwen kind (``intermediate_size``, a gated MLP).
        labelled: positions that get logits; all when ``None``.
    """
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    gated = not hasattr(config, "ffn_dim")
    hidden = config.intermediate_size if gated else config.ffn_dim
    head_dim = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    embedded = getattr(config, "word_embed_proj_dim", width) or width  # OPT-350M projects between the two
    labelled = tokens if labelled is None else labelled
    projections = 2 * tokens * width * head_dim * (2 * heads + 2 * groups)
    attention = 2 * tokens * (tokens + 1) * heads * head_dim
    mlp = 2 * tokens * width * hidden * (3 if gated else 2)
    logits = 2 * labelled * embedded * config.vocab_size
    bridge = 0 if embedded == width else 2 * (tokens + labelled) * width * embedded
    return layers * (projections + attention + mlp) + logits + bridge


def training_flops(forward: int) -> int:
    """FLOPs of a forward and a backward pass: the backward pass does each product twice, once for either factor."""
    return 3 * forward


# ---------------------------------------------------------------------------------------------------------------------
# The machine's own speed
# ---------------------------------------------------------------------------------------------------------------------


def matmul_rate(
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    sides: Sequence[int] = (512, 1024, 2048),
    seconds: float = 1.0,
) -> float:
    """The best rate, FLOP a second, at which this machine multiplies two square matrices of ``dtype``.

    For each side the median over ``seconds`` of repetitions is taken, of the sides the best: what a model's matrix
    products can at most reach here. Uses as many threads as torch has.
    """
    device = torch.device(device)
    best = 0.0
    for side in sides:
        generator = torch.Generator().manual_seed(side)
        left = torch.randn(side, side, generator=generator).to(device, dtype)
        right = torch.randn(side, side, generator=generator).to(device, dtype)
        times = []
        torch.mm(left, right)
        synchronise(device)
        until = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            torch.mm(left, right)
            synchronise(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * side**3 / statistics.median(times))
    return best


def peak_memory(usage: resource.struct_rusage) -> int:
    """Peak resident memory in bytes of a process, from its ``rusage`` (Linux counts kilobytes, macOS bytes)."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median time of ``one`` over that of ``other``: below 1 means that ``one`` is faster."""
    return statistics.median(times[one]) / statistics.median(times[other])


# ---------------------------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------------------------


def shuffled_documents(packages: Sequence[str], rng) -> Iterator[tuple[Path, Any]]:
    """Path and opened `pypdfium2.PdfDocument` of every PDF of Debian packages that opens, in the order that ``rng``
    (a `random.Random`) gives them.

    Raises:
        ValueError: a package cannot be had.
    """
    import pypdfium2 as pdfium

    from training.data.sources import fetch_deb

    paths = sorted(path for name in packages for path in fetch_deb(name).rglob("*.pdf"))
    rng.shuffle(paths)
    for path in paths:
        try:
            document = pdfium.PdfDocument(path)
        except pdfium.PdfiumError:
            continue
        yield path, document
