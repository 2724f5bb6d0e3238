"""What it costs: the encoder beside the one it started from ("cost-free" as a table), and reading a page beside peers.

| figure | of | how |
|---|---|---|
| parameters | encoder, whole model | exact |
| forward_flops | encoder, one image at x1 and x4 | matrix products and attention, counted by torch as they run |
| latency | the same | median of repeated passes, one image a pass; of model and start both timed in turns |
| peak_memory | the same | weights, and what a pass holds beyond them, in a fresh process |
| disk_size | encoder, whole model | bytes of its weights |
| architecture_equal | encoder against the start's | 1 where class and the shapes of all weights are the same |
| parameters_ratio, forward_flops_ratio | encoder over the start's | exact |
| latency_ratio | encoder over the start's | median of the ratios of pairs, timed in turns on the same pixels |
| seconds_per_page, pages_per_second | readers, peers too | the same pages, one after the other, a process each |
| cold_start, peak_memory, word_f1 | the same | process and weights; engine and weights; of the same pages |

Times are of the machine at hand, with as many threads as torch takes; every reader gets as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.evaluation.cache import hash_of
from training.evaluation.contract import (
    ENCODE,
    READ,
    Evaluator,
    Figure,
    NotMeasured,
    Options,
    Subject,
    TextSample,
    Work,
)
from training.evaluation.tokens import tower

if TYPE_CHECKING:
    import torch

    from training.evaluation.subjects import PictureEncoder

SCALES = ("x1", "x4")
ROUNDS, SECONDS = 9, 3.0  # of timing, at each scale: at least so many, for at least so long [ours]
PAGE_HEIGHTS = (14.0, 7.0)  # x-heights in pixels of the pages that are timed, where the set has them [ours]
PAGES = 4  # of each [ours]
RESAMPLES = 1000
MEGA, GIGA = 1e6, 1e9
SHIPPED_PAGES = Path(__file__).resolve().parents[2] / "spaces_demo" / "samples" / "pages"


def evaluators(options: Options) -> list[Evaluator]:
    """Encoder alone, encoder against the start's, and reading pages."""
    return [EncoderCost(), AgainstStart(), ReadingCost(options)]


# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------


class EncoderCost(Evaluator):
    """Size, operations, time and memory of an encoder on its own.

    Where there is a start, model and start are timed by :class:`AgainstStart` alone: a minute later the machine may be
    a quarter slower, and two times stand beside each other in a table only if they were taken in turns.
    """

    suite, name, needs = "cost", "encoder", frozenset({ENCODE})
    roles = frozenset({"model", "teacher", "start"})
    beside = "start"

    def fingerprint(self) -> Mapping[str, Any]:
        return {"rounds": ROUNDS, "seconds": SECONDS}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.measuring import interleave

        encoder = subject.encoder()
        own = tower(encoder)
        whole = encoder.model
        for part, module in [("encoder", own)] + [("whole model", whole)] * (whole is not own):
            yield exact("parameters", count_parameters(module), "", {"part": part})
            # of a whole model what lies on the disk, of its encoder what would if it were saved alone
            size = weights_size(module) if part == "encoder" else disk_size(subject.path, weights_size(module))
            yield exact("disk_size", size / MEGA, "MB", {"part": part})
        memory = _in_a_process(subject, work)
        start = work.subjects.get("start")
        alone = start is None or ENCODE not in start.can or (subject.role != "model" and subject is not start)
        bar = work.bar(len(SCALES), "timing the encoder", "scale")
        for scale, side in sides(encoder).items():
            at = {"scale": scale, "resolution": side}
            pixels = blank_pixels(encoder, side)
            yield exact("forward_flops", count_flops(own, pixels) / GIGA, "GFLOP", at)
            if alone:
                timed = in_one_precision(own, encoder.device)
                passes = {"encoder": lambda pixels=pixels, timed=timed: forward(timed, pixels)}
                times = interleave(passes, rounds=ROUNDS, seconds=SECONDS / 2, device=encoder.device)["encoder"]
                yield latency(times, at, work.seed)
            if scale in memory:
                yield exact("peak_memory", memory[scale] / MEGA, "MB", at)
            bar.update()
        bar.close()


class AgainstStart(Evaluator):
    """The encoder beside the one that training started from, both timed in turns on the same pixels.

    ``latency`` is of the model and, as the start's own figure, of the start; a stage has its ratio alone.
    """

    suite, name, needs = "cost", "encoder against its start", frozenset({ENCODE})
    roles = frozenset({"model", "stage"})
    against = "start"

    def fingerprint(self) -> Mapping[str, Any]:
        return {"rounds": ROUNDS, "seconds": SECONDS}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.measuring import interleave

        start = work.subjects.get("start") or work.subjects.get("teacher")
        if start is None or ENCODE not in start.can:
            raise NotMeasured("no start is known: --start MODEL names the encoder that training began with")
        encoder, other = subject.encoder(), start.encoder()
        ours, theirs = tower(encoder), tower(other)
        difference = architecture_difference(ours, theirs)
        if difference:
            work.notes.append(f"{subject.name} and {start.name} differ: {difference}.")
        yield exact("architecture_equal", float(not difference), "", {}, better="higher")
        yield exact("parameters_ratio", count_parameters(ours) / count_parameters(theirs), "", {})
        ours, theirs = in_one_precision(ours, encoder.device), in_one_precision(theirs, other.device)
        bar = work.bar(len(SCALES), "timing both encoders", "scale")
        for scale, side in sides(encoder).items():
            at = {"scale": scale, "resolution": side}
            mine, its = blank_pixels(encoder, side), blank_pixels(other, side)
            if mine.shape != its.shape:
                work.notes.append(
                    f"{scale}: an image of {side} px is {tuple(mine.shape[-2:])} pixels to {subject.name} and "
                    f"{tuple(its.shape[-2:])} to {start.name}, whose patches differ."
                )
            yield exact("forward_flops_ratio", count_flops(ours, mine) / count_flops(theirs, its), "", at)
            times = interleave(
                {
                    "ours": lambda pixels=mine: forward(ours, pixels),
                    "start": lambda pixels=its: forward(theirs, pixels),
                },
                rounds=ROUNDS,
                seconds=SECONDS,
                device=encoder.device,
            )
            if subject.role == "model":
                yield latency(times["ours"], at, work.seed)
                yield latency(times["start"], at, work.seed, of="start")
            ratios = np.array(times["ours"]) / np.array(times["start"])
            middle, low, high = median_interval(ratios, work.seed)
            yield Figure("latency_ratio", middle, low, high, len(ratios), unit="", at=at, better="lower")
            bar.update()
        bar.close()


def in_one_precision(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """A copy in the precision that all are timed in: float32 on a CPU, bfloat16 on a GPU [ours]. Checkpoints are saved
    in either, and a model in bfloat16 beside its start in float32 would be half as slow for that reason alone."""
    import copy

    import torch

    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return copy.deepcopy(module).to(dtype)


def latency(times: Sequence[float], at: Mapping[str, Any], seed: int, of: str = "") -> Figure:
    """The median of seconds, in milliseconds; ``of`` as :class:`~training.evaluation.contract.Figure` has it."""
    middle, low, high = median_interval(1000.0 * np.array(times), seed)
    return Figure("latency", middle, low, high, items=len(times), unit="ms", at=at, better="lower", of=of)


def exact(name: str, value: float, unit: str, at: Mapping[str, Any], better: str = "lower") -> Figure:
    """A figure that is counted, not sampled."""
    return Figure(name, float(value), unit=unit, at=at, better=better)


def sides(encoder: PictureEncoder) -> dict[str, int]:
    """``"x1"``, ``"x4"`` -> side in pixels of a square image, in whole patches, as the image processor means it."""
    processor, patch = encoder.processor, encoder.patch_size
    if not hasattr(processor, "area"):  # of transformers, which knows one size: x4 is the area then, as in 224 -> 448
        return {"x1": encoder.resolution, "x4": 2 * encoder.resolution}
    return {f"x{scale}": max(1, round(processor.area(scale) ** 0.5 / patch)) * patch for scale in (1, 4)}


def blank_pixels(encoder: PictureEncoder, side: int) -> torch.Tensor:
    """(1, 3, side, side) of a grey picture: time does not depend on what is to be seen."""
    from PIL import Image

    # the model's own size would go through its processor, which may crop
    return encoder.pixels([Image.new("RGB", (side, side), (128, 128, 128))], side)


def forward(module: torch.nn.Module, pixels: torch.Tensor) -> Any:
    """One pass over one image."""
    import torch

    from modeling_unit.architectures_unit import run_encoder

    with torch.inference_mode():
        return run_encoder(module, pixels).last_hidden_state


def count_parameters(module: torch.nn.Module) -> int:
    """Numbers that are learned, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def weights_size(module: torch.nn.Module) -> int:
    """Bytes of its weights, each once, in the type they are held in."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def disk_size(path: str, otherwise: int) -> int:
    """Bytes of the weights in a folder or in the local copy of a repository; ``otherwise`` where there is none."""
    from training.evaluation.subjects import _local

    files = [file for file in _local(path).glob("*.safetensors") if file.name != "visual_projection.safetensors"]
    return sum(file.stat().st_size for file in files) or otherwise


def count_flops(module: torch.nn.Module, pixels: torch.Tensor) -> int:
    """FLOPs of one pass, a multiplication and an addition being two: matrix products, convolutions, attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(query, key, value)

    # torch's counter does not know the CPU's own attention
    ours = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        forward(module, pixels)
    return counter.get_total_flops()


def architecture_difference(one: torch.nn.Module, other: torch.nn.Module) -> str:
    """What tells two encoders' architectures apart, in a few words; ``""`` where class and all shapes are the same."""
    if type(one) is not type(other):
        return f"a {type(one).__name__} and a {type(other).__name__}"
    mine, its = ({key: tuple(value.shape) for key, value in each.state_dict().items()} for each in (one, other))
    if mine == its:
        return ""
    key = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))[0]
    return f"{key} is {mine.get(key, 'absent')} and {its.get(key, 'absent')}"


def median_interval(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Median of (n,) values and its 95% interval, bootstrapped over them."""
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def _in_a_process(subject: Subject, work: Work) -> dict[str, int]:
    """Scale -> bytes, measured in a fresh process; a note where that cannot be done."""
    from training.evaluation.measuring import in_a_process

    try:
        return in_a_process("training.evaluation.cost", "measure_memory", subject.path, subject.device)
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        work.notes.append(f"{subject.name}: peak memory could not be measured here ({error}).")
        return {}


def measure_memory(path: str, device: str) -> dict[str, int]:
    """Scale -> bytes of an encoder's weights and of what a pass over one image holds beyond them; alone in its
    process. Raises OSError where the system does not tell peaks (none but Linux does, without a GPU)."""
    from training.evaluation.measuring import begin_peak, read_peak
    from training.evaluation.subjects import PictureEncoder

    encoder = PictureEncoder(path, device)
    module, kind = in_one_precision(tower(encoder), device), device.partition(":")[0]
    found = {}
    small = blank_pixels(encoder, encoder.patch_size)
    forward(module, small)  # the buffers of libraries
    for scale, side in sides(encoder).items():
        pixels = blank_pixels(encoder, side)
        before = begin_peak(kind)
        forward(module, pixels)
        found[scale] = weights_size(module) + max(0, read_peak(kind) - before)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class ReadingCost(Evaluator):
    """Seconds and memory of a page, for the model and for peers: one page after the other, a process for each reader.

    The process's start, with the loading of weights and two words read, is told apart (``cold_start``).
    """

    suite, name, needs = "cost", "reading a page", frozenset({READ})

    def __init__(self, options: Options):
        self.options = options

    def fingerprint(self) -> Mapping[str, Any]:
        from training.evaluation.sets import default_sets

        try:
            (pages,) = [each for each in default_sets(self.options) if each.name == "pages"]
            data = dict(pages.fingerprint())
        except (NotMeasured, ValueError):
            data = {"set": "shipped pages", "data": hash_of(SHIPPED_PAGES)} if SHIPPED_PAGES.is_dir() else None
        if data is None:
            raise NotMeasured("there are no pages to read; `unit data evaluation-sets` builds some")
        return data | {"pages": self.options.limit or PAGES, "heights": PAGE_HEIGHTS}

    def figures(self, subject: Subject, work: Work) -> Iterator[Figure]:
        from training.evaluation.peers.checkpoint import CheckpointReader
        from training.evaluation.peers.worker import WorkerSubject

        samples = pages_to_time(self.options, work)
        reader = subject
        if not isinstance(subject, WorkerSubject):
            # in this process other weights lie in memory, and the peak would be theirs
            reader = CheckpointReader(subject.path, subject.name, subject.hash(), subject.device)
        bar = work.bar(len(samples), f"timing {subject.name}", "page")
        try:
            reader.start()
            cold, readings = reader.startup, []
            for sample in samples:
                readings += reader.readings([sample])
                bar.update()
        finally:
            bar.close()
            reader.release()
        errors = [reading.error for reading in readings if reading.error]
        if len(errors) == len(samples):
            raise NotMeasured(f"{subject.name} read none of {len(samples)} pages: {errors[0]}")
        work.notes += [note for note in getattr(reader, "notes", ()) if note not in work.notes]
        work.items += [
            {
                "index": sample.index,
                "source": sample.source,
                "x_height": sample.x_height,
                "seconds": round(reading.seconds, 3),
                "peak": reading.peak,
            }
            | ({"error": reading.error} if reading.error else {})
            for sample, reading in zip(samples, readings, strict=True)
        ]
        work.notes.append(timed_on(subject.device))
        yield Figure("cold_start", cold, unit="s", better="lower")
        peak = max(reading.peak for reading in readings)
        if peak:
            yield exact("peak_memory", peak / MEGA, "MB", {})
        for height in sorted({sample.x_height for sample in samples}, reverse=True):
            chosen = [
                (sample, reading)
                for sample, reading in zip(samples, readings, strict=True)
                if sample.x_height == height
            ]
            yield from self._at(chosen, {"x_height": height} if height else {}, work.seed)

    def _at(self, chosen: Sequence[tuple[TextSample, Any]], at: Mapping[str, Any], seed: int) -> Iterator[Figure]:
        """Figures of the pages of one x-height."""
        from training.evaluation.text import count, summarise

        failed = sum(bool(reading.error) for _, reading in chosen)
        seconds = np.array([reading.seconds for _, reading in chosen if not reading.error])
        told = {"items": len(chosen), "failed": failed, "at": at}
        if len(seconds):
            draws = np.random.default_rng(seed).integers(len(seconds), size=(RESAMPLES, len(seconds)))
            low, high = np.percentile(seconds[draws].mean(axis=1), [2.5, 97.5])
            mean = float(seconds.mean())
            yield Figure("seconds_per_page", mean, float(low), float(high), unit="s", better="lower", **told)
            yield Figure("pages_per_second", 1 / mean, 1 / float(high), 1 / float(low), unit="pages/s", **told)
        rows = summarise([count(reading.text, sample.text) for sample, reading in chosen], seed)
        yield Figure("word_f1", rows[0].value, rows[0].low, rows[0].high, **told)


def timed_on(device: str) -> str:
    """What a table of times must say."""
    from training.evaluation.report import processor

    return f"Readers are timed on {processor(device)}: one page after the other, each reader in a process of its own."


def pages_to_time(options: Options, work: Work) -> list[TextSample]:
    """Held-out pages at two sizes; where the set has not been built, those that ship with the demo.

    Raises:
        NotMeasured: there are none at all.
    """
    from training.evaluation.sets import default_sets

    try:
        (pages,) = [each for each in default_sets(options) if each.name == "pages"]
        found = pages.samples(options.limit or PAGES)
        heights = [height for height in PAGE_HEIGHTS if height in pages.heights]
        if heights:
            found = [sample for sample in found if sample.x_height in heights]
        else:
            found = found[: 2 * PAGES]
        return [replace(sample, layout="page") for sample in found if sample.image is not None]
    except NotMeasured as missing:
        if not SHIPPED_PAGES.is_dir():
            raise
        work.notes.append(f"{missing}; the pages that ship with the demo are timed instead.")
    return shipped_pages()


def shipped_pages() -> list[TextSample]:
    """The demo's pages with their texts, of unknown x-height."""
    from PIL import Image

    found = []
    for index, file in enumerate(sorted(SHIPPED_PAGES.glob("*.png"))):
        with Image.open(file) as picture:
            text = file.with_suffix(".txt").read_text(encoding="utf-8")
            found.append(TextSample(index, picture.convert("RGB"), text, source=file.stem, layout="page"))
    return found
