"""What a run will take, before it runs: parameters, tokens, FLOPs, memory a device, time a step, days.

The model, term by term:

- parameters (exact): the recipe's model is built without numbers (torch's meta device) and its weights are counted.
- tokens of a micro-batch (exact, or assumed): the plan of the recipe's own data where it is on disk (the first 64
  micro-batches); else the recipe's rows and patches, documents filling their scale's area, text as long as the
  options say.
- FLOPs of a step (exact): one training step of the recipe's trainer on shapes alone (`plan_step.py`): matrix products
  and attention, forward and backward, teacher, what checkpointing does again; attention counted in full, also where
  it is causal.
- weights (exact): 4 bytes each, trained or frozen: they are float32, autocast makes copies; the teacher's 2 in a run
  in bf16, unless `teacher_dtype` says otherwise.
- optimiser (exact): AdamW 8 bytes a trained weight, Muon 4 for its matrices, an average 4 more; on a GPU AdamW takes
  4 more while it steps (torch: "foreach uses ~ sizeof(params) more peak memory").
- gradients, activations (exact for torch's operators; workspace within kernels is not seen): of the same step, the
  most that is alive at once: what is saved for the backward pass, logits and their gradients, copies of weights in
  bfloat16, gradients as they come.
- DDP ([spec] torch's DistributedDataParallel): every device holds all; gradients once more in buckets, 4 bytes a
  trained weight.
- FSDP ([ours], not measured): weights, gradients and optimiser in equal parts; whole at once: the weights outside of
  the blocks and two blocks; the teacher stays whole.
- room of a device ([ours]): 93% of what its name says, in GiB, less 1 GiB for the runtime.
- time of an operator (model): the longer of FLOPs / (rate x efficiency) and bytes read and written / (bandwidth x
  efficiency).
- rate, bandwidth, memory ([spec]): `DEVICES`, dense, float32 accumulation, as their makers state.
- efficiency on a GPU ([ours], not measured): 0.6 of the rate, 0.8 of the bandwidth; at least 10 microseconds an
  operator, which Python needs.
- on `cpu` ([measured] there, [ours]): rates of the step's own largest products and attention are measured first, and
  how many bytes a second the operators that are no products move, kind by kind, into memory they have just been given,
  as in a step (its pages cost as much as the numbers); 4 microseconds an operator.
- optimiser's time ([spec] torch's AdamW, operator by operator): 96 bytes moved for a weight, clipping of gradients
  among them; Muon's five iterations of three products besides.
- exchange between devices ([ours]): gradients once a step (DDP), or weights twice and gradients once a micro-batch
  (FSDP), over the link's rate one way, hidden behind the backward pass, which is two thirds of a micro-batch.
- waiting for data, evaluation, saving (assumed): none.
- days of the paper's stages (assumed): its rows [paper] x epochs over the rows of a step; epochs 3 and batch 512 are
  Vary-tiny's, the nearest recipe that states them.

Checked against real runs on a CPU by `python -m benchmarks.plan`. GPU figures follow from the specifications and have
not been checked against a run.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig

from modeling_unit import UnitConfig, UnitForPreTraining, UnitImageProcessor, UnitProcessor, UnitVisionConfig
from modeling_unit.architectures_unit import architecture
from modeling_unit.encoder_unit import UnitVisionModel
from modeling_unit.vision_sources_unit import find_model_type, find_vision_source, image_settings

from .aligned_attention import return_first_head
from .arguments import LoraArguments, UnitTrainingArguments
from .collator import NUM_CHARACTER_CLASSES, TEXT_STEP
from .data.mixture import MixtureDataset
from .data.settings import SourceArguments
from .data.sources import data_folder
from .lora import add_lora
from .optim import is_matrix, part_of
from .plan_step import GroupShape, Step, rehearse, scratch_arguments
from .publish import take_hub_settings
from .recipe import (
    Recipe,
    data_settings,
    groups_of,
    new_image_processor,
    pretrained_tokenizer,
    read_recipe,
    stage_data,
    with_settings,
)
from .teacher_cache import teacher_dtype
from .tokenizer import TASK_TOKENS, byte_tokenizer
from .trainer import freeze_parts

GIB = 2**30
LOOKED_AT, REHEARSED = 64, 5  # micro-batches whose shapes are looked at, and that are rehearsed for the mean


# -- devices ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device's makers' figures [spec].

    Args:
        name: bfloat16, float32: FLOP/s, dense; float32 without TF32, which torch leaves off by default.
        bandwidth: of its memory, bytes/s. memory: GiB. link: to its neighbours, bytes/s one way.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    link: float

    @property
    def room(self) -> int:
        """Bytes that a run may take."""
        return int((0.93 * self.memory - 1) * GIB)


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA H100 (SXM), H200, A100 (SXM), L40S data sheets: dense, half of the figures "with sparsity"
        Device("H100-80GB", 989e12, 67e12, 3.35e12, 80, 450e9),
        Device("H200-141GB", 989e12, 67e12, 4.8e12, 141, 450e9),
        Device("A100-40GB", 312e12, 19.5e12, 1.555e12, 40, 300e9),
        Device("A100-80GB", 312e12, 19.5e12, 2.039e12, 80, 300e9),
        Device("L40S-48GB", 362e12, 91.6e12, 0.864e12, 48, 32e9),  # PCIe 4.0 x16
        # NVIDIA Ada and Ampere GA102 white papers: bfloat16 with float32 accumulation
        Device("RTX4090-24GB", 165e12, 82.6e12, 1.008e12, 24, 32e9),
        Device("RTX3090-24GB", 71e12, 35.6e12, 0.936e12, 24, 32e9),
        Device("MI300X-192GB", 1307e12, 163.4e12, 5.3e12, 192, 448e9),  # AMD Instinct MI300X data sheet
    )
}
MATRIX_EFFICIENCY, MEMORY_EFFICIENCY = 0.6, 0.8
GPU_CALL, CPU_CALL = 10e-6, 4e-6  # seconds that an operator takes at least


def parse_hardware(text: str) -> tuple[Device | None, int]:
    """`8xH100-80GB`, `RTX4090`, `cpu` -> device and how many; `None` is this machine's CPU.

    Raises:
        ValueError: for a device that the table lacks, or one with several memories and none named.
    """
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text.strip(), re.IGNORECASE)
    count, name = int(found[1] or 1) if found else 0, found[2].upper().replace(" ", "") if found else ""
    if name == "CPU" and count == 1:
        return None, 1
    matching = [known for known in DEVICES if name in (known.upper(), known.upper().partition("-")[0])]
    if len(matching) != 1 or count < 1:
        which = f"{' or '.join(matching)}?" if matching else f"Known: {', '.join(DEVICES)}, cpu."
        raise ValueError(f"--hardware {text!r}: a number, x and a device, as 8xH100-80GB. {which}")
    return DEVICES[matching[0]], count


@dataclass
class Speed:
    """How fast operators run: a device's figures, or what was measured here.

    Args:
        rates: FLOP/s by type of numbers. bandwidth: bytes/s. call: seconds an operator takes at least.
        own: FLOP/s of single operators, by their key in [`Step`].
        kinds: bytes/s of operators that are no products, by name and type of numbers; `bandwidth` of the others.
    """

    rates: dict[str, float]
    bandwidth: float
    call: float
    own: dict[tuple, float] = field(default_factory=dict)
    kinds: dict[tuple[str, str], float] = field(default_factory=dict)

    def seconds(self, step: Step) -> float:
        """Of one micro-batch."""
        total = 0.0
        for key, (calls, flops, moved) in step.operators.items():
            rate = self.own.get(key) or self.rates["bfloat16" if key[1] in ("bfloat16", "float16") else "float32"]
            width = self.bandwidth if flops else self.kinds.get(key[:2], self.bandwidth)
            total += max(flops / rate, moved / width, calls * self.call)
        return total


def gpu_speed(device: Device) -> Speed:
    rates = {key: MATRIX_EFFICIENCY * getattr(device, key) for key in ("bfloat16", "float32")}
    return Speed(rates, MEMORY_EFFICIENCY * device.bandwidth, GPU_CALL)


def cpu_speed(step: Step, most: int = 24, seconds: float = 0.1) -> Speed:
    """This machine's, measured with the step's own largest matrix products and attention, `most` of them."""
    kinds = kinds_measured(step, seconds)
    bandwidth = _probe("add", torch.float32, seconds)
    heavy = sorted(step.operators.items(), key=lambda item: -item[1][1])[:most]
    own: dict[tuple, float] = {}
    sums: dict[str, list[float]] = {}
    for key, (calls, flops, _) in heavy:
        work = _stand_in(key)
        if work is None or not flops:
            continue
        taken = _median_time(work, seconds)
        own[key] = flops / calls / taken
        entry = sums.setdefault(key[1], [0.0, 0.0])
        entry[0], entry[1] = entry[0] + flops, entry[1] + taken * calls
    rates = {name: flops / taken for name, (flops, taken) in sums.items()}
    some = max(rates.values(), default=1e10)
    return Speed({"bfloat16": some, "float32": some} | rates, bandwidth, CPU_CALL, own, kinds)


# Operators that are no products, by the names that torch gives them: two tensors of one shape -> the result
PROBED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": torch.add,
    "mul": torch.mul,
    "add_": lambda one, other: one.add_(other),
    "clone": lambda one, other: one.clone(),
    "cat": lambda one, other: torch.cat([one, other], dim=-1),
    "_to_copy": lambda one, other: one.to(torch.float32 if one.dtype == torch.bfloat16 else torch.bfloat16),
    "gelu": lambda one, other: nn.functional.gelu(one),
    "gelu_backward": lambda one, other: torch.ops.aten.gelu_backward(one, other),
    "relu": lambda one, other: torch.relu(one),
    "silu": lambda one, other: nn.functional.silu(one),
    "native_layer_norm": lambda one, other: torch.native_layer_norm(one, one.shape[-1:], None, None, 1e-6),
    "_softmax": lambda one, other: torch.softmax(one, dim=-1),
    "_softmax_backward_data": lambda one, other: torch._softmax_backward_data(one, other, -1, one.dtype),
    "_log_softmax": lambda one, other: torch.log_softmax(one, dim=-1),
    "sum": lambda one, other: one.sum(dim=0),
}
PROBE = (8192, 256)  # a stage of a small model: 8 MB in float32


def _probe(name: str, dtype: torch.dtype, seconds: float) -> float:
    """Bytes/s read and written by an operator on this machine, counted as a step's are."""
    one, other = torch.rand(PROBE).to(dtype), torch.rand(PROBE).to(dtype)
    work = PROBED[name]
    made = work(one, other)
    made = [each for each in (made if isinstance(made, tuple) else [made]) if isinstance(each, torch.Tensor)]
    read = 2 if name in ("add", "mul", "add_", "cat", "gelu_backward", "_softmax_backward_data") else 1
    moved = read * one.numel() * one.element_size() + sum(each.numel() * each.element_size() for each in made)
    return moved / _median_time(lambda: work(one, other), seconds)


def kinds_measured(step: Step, seconds: float) -> dict[tuple[str, str], float]:
    """Bytes/s of the kinds in [`PROBED`] that a step has."""
    wanted = {key[:2] for key, (_, flops, _) in step.operators.items() if not flops and key[0] in PROBED}
    floats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {(name, kind): _probe(name, floats[kind], seconds / 2) for name, kind in sorted(wanted) if kind in floats}


def _stand_in(key: tuple) -> Callable[[], Any] | None:
    """The operator of a key, ready to run on made-up numbers."""
    name, dtype, shapes = key
    made = [torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes]
    if name == "mm" and len(made) == 2:
        # weights are stored transposed to how they multiply
        left, right = made[0], made[1].t().contiguous().t()
        return lambda: torch.mm(left, right)
    if name == "addmm" and len(made) == 3:
        bias, left, right = made[0], made[1], made[2].t().contiguous().t()
        return lambda: torch.addmm(bias, left, right)
    if name == "bmm" and len(made) == 2:
        return lambda: torch.bmm(*made)
    if name == "_scaled_dot_product_flash_attention_for_cpu" and len(made) == 3:
        return lambda: nn.functional.scaled_dot_product_attention(*made)
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        query = made[0]
        query, key_, value = (torch.randn_like(query).requires_grad_() for _ in range(3))
        out = nn.functional.scaled_dot_product_attention(query, key_, value)
        slope = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, (query, key_, value), slope, retain_graph=True)
    return None


def _median_time(work: Callable[[], Any], seconds: float) -> float:
    work()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


# -- models without weights ---------------------------------------------------------------------------------------

# Configurations of encoders and decoders that recipes start from, so that a plan needs no network. [spec]: the
# config.json of each repository; what is not named is the class's default in transformers.
_CLIP_L = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_CLIP_L |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 224, "projection_dim": 768}
_SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
_SO400M |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 224}
ENCODERS: dict[str, dict[str, Any]] = {
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _CLIP_L
    | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1024}
    | {"hidden_act": "gelu"},
    "openai/clip-vit-large-patch14": _CLIP_L,
    "openai/clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
    "google/siglip2-so400m-patch14-224": _SO400M,
    "google/siglip2-so400m-patch14-384": _SO400M | {"image_size": 384},
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {"model_type": "dinov3_vit", "hidden_size": 1024}
    | {"intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16}
    | {"image_size": 224, "num_register_tokens": 4, "key_bias": False},
}
# UnitConfig's own default is OPT-125M
DECODERS: dict[str, dict[str, Any] | None] = {"facebook/opt-125m": None}


@dataclass
class Described:
    """A recipe's model, without weights."""

    config: UnitConfig
    images: UnitImageProcessor
    teacher: PreTrainedConfig | None


def _encoder(source: str, settings: dict[str, Any], beside: dict[str, tuple[Recipe, Path]]):
    """Configuration and image processor's settings of an encoder that a recipe names."""
    if source in beside:
        recipe, path = beside[source]
        if recipe.stage == "teacher":
            config = UnitVisionConfig(**recipe.model.get("vision_config", {}))
            images = new_image_processor(recipe)
            return config, image_settings(config, images.to_dict() | {"image_processor_type": "UnitImageProcessor"})
        inner = describe(recipe, path)
        return inner.config.vision_config, inner.images.to_dict()
    if source in ENCODERS and not Path(source).exists():
        kind = ENCODERS[source]
        config = AutoConfig.for_model(**kind)
        return config, image_settings(config)
    found = find_vision_source(source, **settings)
    return found.config, found.image_settings


def written_beside(path: Path) -> dict[str, tuple[Recipe, Path]]:
    """What the recipes in the same folder will write."""
    out = {}
    for other in sorted(path.parent.glob("*.yaml")):
        if other.resolve() == path.resolve():
            continue
        try:
            recipe = read_recipe(other)
        except ValueError:
            continue
        folder = recipe.training.get("output_dir")
        if folder and not (Path(folder) / "config.json").is_file():
            out[folder] = (recipe, other)
    return out


def _settings_of(images: dict[str, Any]) -> dict[str, Any]:
    plumbing = ("image_processor_type", "auto_map", "processor_class")
    return {key: value for key, value in images.items() if key not in plumbing}


def describe(recipe: Recipe, path: Path) -> Described:
    """The model that a recipe trains, from configurations alone. What another recipe of the folder has still to write
    is taken from that recipe.

    Raises:
        ValueError: no start and no teacher, nothing there, settings that do not go together.
    """
    source = recipe.start or recipe.teacher
    if source is None:
        raise ValueError("A plan needs `start` or `teacher`: the encoder that a new model begins with.")
    beside = written_beside(path)
    classes = NUM_CHARACTER_CLASSES if recipe.training.get("character_weight") else 0
    if source in beside and beside[source][0].stage != "teacher":
        inner = describe(*beside[source])
        config, images = inner.config, inner.images
        config.num_character_classes = classes
    elif source not in beside and source not in ENCODERS and find_model_type(source) == UnitConfig.model_type:
        config = UnitConfig.from_pretrained(source)
        config.num_character_classes = classes
        images = with_settings(UnitImageProcessor.from_pretrained(source), recipe.image_processor)
    else:
        which = recipe.start_settings if recipe.start else recipe.teacher_settings
        vision, settings = _encoder(source, which, beside)
        images = UnitImageProcessor(**(_settings_of(settings) | recipe.image_processor))
        rest = dict(recipe.model)
        text = rest.pop("text_config", None)
        if recipe.language_decoder:
            if recipe.language_decoder not in DECODERS or Path(recipe.language_decoder).exists():
                text = AutoConfig.from_pretrained(recipe.language_decoder, trust_remote_code=False)
            else:
                text = DECODERS[recipe.language_decoder]
        else:
            text = dict(text or {"model_type": "opt"}) | {"vocab_size": len(byte_tokenizer())}
        config = UnitConfig(vision_config=vision, text_config=text, num_character_classes=classes, **rest)
    teacher = None
    if recipe.training.get("vision_weight", 1.0):
        teacher = config.vision_config
        if recipe.teacher:
            teacher = _encoder(recipe.teacher, recipe.teacher_settings, beside)[0]
    return Described(config, images, teacher)


def empty_models(described: Described, recipe: Recipe, arguments: UnitTrainingArguments):
    """Model and teacher on the meta device, with adapters and what is frozen, as `unit train` makes them."""
    with torch.device("meta"):
        model = UnitForPreTraining(described.config)
        if arguments.alignment_weight:
            return_first_head(model.language_model)
        teacher = None
        if described.teacher is not None:
            ours = architecture(described.teacher).ours
            teacher = (UnitVisionModel._from_config if ours else AutoModel.from_config)(described.teacher)
        wrapped = add_lora(model, LoraArguments(**recipe.lora))
    if described.config.projection_dim:
        freeze_parts(wrapped, ["projection"])
    freeze_parts(wrapped, arguments.freeze)
    return wrapped, teacher


# -- micro-batches ------------------------------------------------------------------------------------------------


@dataclass
class Assumed:
    """Text lengths in tokens, prompt and end included, where the data is not at hand. A page of the paper's documents
    has over 500 words [paper], about 1,000 pieces of OPT's [ours]; a caption under 30 [paper]; a page at x1 has large
    letters and a quarter of the words [ours]."""

    document: int = 1024
    caption: int = 64

    def of(self, kind: str, scale: int) -> int:
        tokens = self.caption if kind == "natural" else self.document if scale == 4 else self.document / 4
        return math.ceil(tokens / TEXT_STEP) * TEXT_STEP


def assumed_batch(recipe: Recipe, described: Described, assumed: Assumed) -> list[GroupShape]:
    """The micro-batch by the recipe alone: documents fill their scale's area, texts are as long as `assumed` says."""
    images, positions = described.images, getattr(described.config.text_config, "max_position_embeddings", None)
    connector = described.config.connector_config
    shapes = []
    for group in groups_of(recipe, images):
        side = round(images.area(group.scale) ** 0.5)
        grid = images.grid_for(side, side, "natural", group.scale)
        text = assumed.of(group.kind, group.scale)
        visual = connector.num_queries
        if connector.connector_type == "mlp":
            visual = math.prod(math.ceil(each / connector.unshuffle) for each in grid)
        if positions and visual + text > positions:
            text = (positions - visual) // TEXT_STEP * TEXT_STEP
            if text < TEXT_STEP:
                raise ValueError(
                    f"Group {group.name}: {visual} visual tokens leave no room for text in the decoder's {positions} "
                    "positions: use the qformer connector, or a larger unshuffle."
                )
        small = None
        if group.kind == "natural" and group.scale != 1 and recipe.training.get("teacher_scale", 1) == 1:
            small_side = round(images.area(1) ** 0.5)
            small = images.grid_for(small_side, small_side, "natural", 1)
        rows = group.rows or max(1, group.patches // math.prod(grid))
        shapes.append(GroupShape(group.name, rows, grid, text, small))
    if not shapes:
        raise ValueError("The recipe has no `groups` and no `data.sources`: there is nothing to plan.")
    return shapes


def planned_batches(data: MixtureDataset, count: int = LOOKED_AT) -> list[list[GroupShape]]:
    """The shapes of the first micro-batches of a plan. A pack counts as images of its mean size, as many."""
    out = []
    for step in range(min(count, len(data))):
        batch = []
        for plan in data.groups:
            (rows, cols, text), members = plan.batch(step)
            if not rows and plan.arguments.kind == "natural":
                rows, cols = plan.measure.picture_grid
            elif not rows:
                sizes = [plan.shapes[source][position] for source, position in members]
                rows, cols = (max(1, round(sum(float(size[axis]) for size in sizes) / len(sizes))) for axis in (0, 1))
                text = int(max(size[2] for size in sizes))
            small = None
            if plan.arguments.kind == "natural" and plan.arguments.scale != 1 and plan.collator.teacher_scale == 1:
                images = plan.collator.image_processor
                side = round(images.area(1) ** 0.5)
                small = images.grid_for(side, side, "natural", 1)
            batch.append(GroupShape(plan.arguments.name, len(members), (rows, cols), max(text, TEXT_STEP), small))
        out.append(batch)
    return out


def _is_here(source: SourceArguments) -> bool:
    """Whether a source's rows are on this machine: a folder, a file, files by a pattern, a set in the cache."""
    given = source.name
    path = Path(given).expanduser()
    if path.exists() or data_folder(given).is_dir():
        return True
    return bool(source.dataset) and glob.has_magic(given) and bool(glob.glob(str(path), recursive=True))


def _tokenizer(recipe: Recipe, path: Path):
    """The tokenizer of the model that a recipe trains, and its prompts: of its start, where that is a UNIT model or
    will be written by another recipe of the folder.

    Raises:
        ValueError: a language decoder whose tokenizer is not here.
    """
    beside = written_beside(path)
    if recipe.start in beside and beside[recipe.start][0].stage != "teacher":
        return _tokenizer(*beside[recipe.start])
    if recipe.language_decoder:
        return pretrained_tokenizer(recipe.language_decoder), None
    if recipe.start and recipe.start not in ENCODERS and find_model_type(recipe.start) == UnitConfig.model_type:
        processor = AutoProcessor.from_pretrained(recipe.start)
        return processor.tokenizer, processor.task_prompts
    return byte_tokenizer(), TASK_TOKENS


def own_batches(recipe: Recipe, described: Described, arguments: UnitTrainingArguments, path: Path):
    """Micro-batches of the recipe's data, `None` where it is not all on disk or is streamed."""
    settings = data_settings(recipe)
    sources = [source for group in groups_of(recipe, described.images) for source in group.sources]
    if settings.streaming or not sources or not all(map(_is_here, sources)):
        return None
    try:
        tokenizer, prompts = _tokenizer(recipe, path)
    except ValueError:
        return None
    if len(tokenizer) > described.config.text_config.vocab_size:
        return None
    connector = described.config.connector_config
    processor = UnitProcessor(described.images, tokenizer, task_prompts=prompts)
    processor.unshuffle = connector.unshuffle
    processor.num_queries = connector.num_queries if connector.connector_type == "qformer" else None
    return planned_batches(stage_data(recipe, arguments, processor, described.config))


def _size(batch: list[GroupShape]) -> int:
    return sum(group.patches + group.rows * group.text for group in batch)


# -- the plan -----------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Parameters of a part of the model."""

    name: str
    parameters: int
    trained: int


@dataclass
class Plan:
    """What a run takes. Bytes, seconds, FLOPs; memory is of one device, the rest of all together where it says so."""

    recipe: str
    hardware: str
    devices: int
    strategy: str
    parts: list[Part]
    batch: list[GroupShape]
    batch_from: str
    rows_per_step: int
    flops_per_step: int
    memory: dict[str, int]
    room: int
    step_seconds: float
    utilisation: float
    steps: int
    paper: dict[str, float] = field(default_factory=dict)
    checkpointing: bool = False

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.room

    @property
    def days(self) -> float:
        return self.steps * self.step_seconds / 86400

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return dataclasses.asdict(self) | {"needed": self.needed, "fits": self.fits, "days": self.days}


# Rows of each stage [paper]: captions and documents; stage 2 adds ShareGPT4V, large letters, Markdown, a million each
PAPER_ROWS = {"intra_scale": 3_000_000 + 2_000_000, "inter_scale": 3_000_000 + 2_000_000 + 3 * 1_000_000}
PAPER_EPOCHS = 3  # assumed: Vary-tiny's; the paper does not say


def static_memory(model: nn.Module, teacher: nn.Module | None, arguments: UnitTrainingArguments) -> dict[str, int]:
    """Bytes of weights, teacher, optimiser, and of what an optimiser's step takes besides on a GPU."""
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    muon = sum(each.numel() for name, each in trained if arguments.optimizer == "muon" and is_matrix(name, each))
    count = sum(each.numel() for _, each in trained)
    return {
        "weights": 4 * sum(each.numel() for each in model.parameters()),
        "teacher": 0
        if teacher is None
        else teacher_dtype(arguments).itemsize * sum(each.numel() for each in teacher.parameters()),
        "optimiser": 8 * (count - muon) + 4 * muon + (4 * count if arguments.ema_decay else 0),
        "gradients": 4 * count,
        "optimiser_step": 4 * (count - muon),
    }


def _blocks(model: nn.Module) -> tuple[int, int]:
    """Parameters of the largest block, and of all that is in no block."""
    largest = inside = 0
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                own = [each for each in block.parameters() if id(each) not in seen]
                seen |= {id(each) for each in own}
                count = sum(each.numel() for each in own)
                largest, inside = max(largest, count), inside + count
    return largest, sum(each.numel() for each in model.parameters()) - inside


def device_memory(
    model: nn.Module,
    teacher: nn.Module | None,
    arguments: UnitTrainingArguments,
    step: Step,
    *,
    devices: int = 1,
    strategy: str = "ddp",
    gpu: bool = True,
) -> dict[str, int]:
    """Bytes on one device at the worst moment, by term: either in the backward pass or in the optimiser's step."""
    still = static_memory(model, teacher, arguments)
    activations = step.peak - step.gradients - step.casts
    casts, gradients = step.casts, step.gradients
    memory = {key: still[key] for key in ("weights", "teacher", "optimiser")}
    stepping = still["gradients"] + (still["optimiser_step"] if gpu else 0)
    if devices > 1 and strategy == "fsdp":
        memory["weights"] //= devices
        memory["optimiser"] //= devices
        stepping //= devices
        largest, outside = _blocks(model)
        width = 2 if arguments.bf16 else 4
        memory["gathered"] = width * (outside + 2 * largest) + 4 * 2 * largest
        # their copies in bfloat16 are what is gathered
        casts, gradients = 0, still["gradients"] // devices
    elif devices > 1:
        memory["buckets"] = still["gradients"]
    backward = activations + casts + gradients
    if stepping > backward:
        return (
            memory
            | {"gradients": still["gradients"] // (devices if strategy == "fsdp" else 1)}
            | {"optimiser's step": stepping - still["gradients"] // (devices if strategy == "fsdp" else 1)}
        )
    memory |= {"gradients": gradients, "weights in bfloat16": casts}
    return memory | {"activations": activations - step.logits, "logits": step.logits}


def step_seconds(
    micro: float, step: Step, still: dict[str, int], arguments, speed: Speed, device: Device | None, devices, strategy
) -> float:
    """Seconds of an optimiser step: its micro-batches of `micro` seconds, the exchange, the optimiser."""
    accumulated = arguments.gradient_accumulation_steps
    parts = devices if strategy == "fsdp" else 1
    count = still["gradients"] / 4
    matrices = (2 * count - still["optimiser"] / 4) / parts  # Muon's
    optimiser = (96 * count / parts) / speed.bandwidth
    if matrices:
        # five iterations of three products with the smaller side, for which the encoder's width stands: 6 d each
        optimiser += 15 * 2 * matrices * 512 / speed.rates["bfloat16"]
    exchange = 0.0
    if devices > 1 and device is not None:
        share = (devices - 1) / devices / device.link
        if strategy == "fsdp":
            exchange = accumulated * (2 * still["weights"] / 2 + still["gradients"]) * share
        else:
            exchange = 2 * still["gradients"] * share
    hidden = micro * 2 / 3 * (accumulated if strategy == "fsdp" else 1)
    return accumulated * micro + max(0.0, exchange - hidden) + optimiser


def make_plan(
    path: str | Path,
    hardware: str = "8xH100-80GB",
    *,
    strategy: str = "ddp",
    overrides: list[str] | None = None,
    assumed: Assumed | None = None,
    speed: Speed | None = None,
) -> Plan:
    """The plan of a recipe.

    Args:
        path: of the recipe; overrides: `key=value`, as of `unit train`.
        hardware: `"8xH100-80GB"`, see `DEVICES`, or `"cpu"`, which measures this machine first.
        strategy: `"ddp"` or `"fsdp"`.
        assumed: text lengths where the recipe's data is not on disk.
        speed: in place of the hardware's.

    Raises:
        ValueError: no such hardware, a stage without a plan, what the recipe lacks.
    """
    device, devices = parse_hardware(hardware)
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"--strategy must be ddp or fsdp, got {strategy!r}.")
    path = Path(path)
    recipe = read_recipe(path, overrides)
    if recipe.stage not in PAPER_ROWS:
        raise ValueError(f"unit plan knows the stages {' and '.join(PAPER_ROWS)}, not {recipe.stage}.")
    if recipe.threads and device is None:
        torch.set_num_threads(recipe.threads)
    arguments = scratch_arguments(take_hub_settings(recipe.training)[0])
    described = describe(recipe, path)
    batches, batch_from = own_batches(recipe, described, arguments, path), "the recipe's data"
    if batches is None:
        batches, batch_from = [assumed_batch(recipe, described, assumed or Assumed())], "assumed: the data is not here"
    batches.sort(key=_size)
    places = {round((index + 0.5) / REHEARSED * len(batches) - 0.5) for index in range(REHEARSED)}
    gpu = device is not None
    kept = arguments.gradient_accumulation_steps > 1 or (devices > 1 and strategy == "ddp")

    def rehearsed(batch: list[GroupShape]):
        model, teacher = empty_models(described, recipe, arguments)
        step = rehearse(model, teacher, arguments, described.images, batch, like_gpu=gpu, gradients_kept=kept)
        return step, model, teacher

    worst, model, teacher = rehearsed(batches[-1])
    steps = [worst if place == len(batches) - 1 else rehearsed(batches[place])[0] for place in sorted(places)]
    if speed is None:
        speed = gpu_speed(device) if device else cpu_speed(steps[len(steps) // 2])
    still = static_memory(model, teacher, arguments)
    micro = statistics.mean(speed.seconds(step) for step in steps)
    seconds = step_seconds(micro, worst, still, arguments, speed, device, devices, strategy)
    together = arguments.gradient_accumulation_steps * devices
    flops = int(statistics.mean(step.flops for step in steps)) * together
    rows = round(statistics.mean(sum(group.rows for group in batch) for batch in batches)) * together
    parts: dict[str, Part] = {}
    for name, weight in model.named_parameters():
        part = parts.setdefault(part_of(name), Part(part_of(name), 0, 0))
        part.parameters += weight.numel()
        part.trained += weight.numel() if weight.requires_grad else 0
    if teacher is not None:
        parts["teacher"] = Part("teacher", sum(each.numel() for each in teacher.parameters()), 0)
    epochs_steps = math.ceil(PAPER_ROWS[recipe.stage] * PAPER_EPOCHS / rows)
    peak = (device.bfloat16 if device else speed.rates["bfloat16" if arguments.bf16 else "float32"]) * devices
    return Plan(
        recipe=str(path),
        hardware=hardware,
        devices=devices,
        strategy=strategy if devices > 1 else "one device",
        parts=list(parts.values()),
        batch=batches[len(batches) // 2],
        batch_from=batch_from,
        rows_per_step=rows,
        flops_per_step=flops,
        memory=device_memory(model, teacher, arguments, worst, devices=devices, strategy=strategy, gpu=gpu),
        room=device.room if device else _machine_memory(),
        step_seconds=seconds,
        utilisation=flops / seconds / peak,
        steps=arguments.max_steps,
        paper={
            "rows": PAPER_ROWS[recipe.stage],
            "epochs": PAPER_EPOCHS,
            "steps": epochs_steps,
            "days": epochs_steps * seconds / 86400,
        },
        checkpointing=arguments.gradient_checkpointing,
    )


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan_text(plan: Plan) -> str:
    """The plan as `unit plan` prints it."""
    lines = [f"{plan.recipe} on {plan.hardware}, {plan.strategy}", ""]
    lines.append(f"{'part':<18}{'parameters':>14}{'trained':>14}")
    for part in plan.parts:
        lines.append(f"{part.name:<18}{part.parameters:>14,}{part.trained:>14,}")
    lines += ["", f"micro-batch of one device ({plan.batch_from})"]
    lines.append(f"{'group':<16}{'rows':>6}{'grid':>10}{'patches':>10}{'text':>8}")
    for group in plan.batch:
        grid = f"{group.grid[0]}x{group.grid[1]}"
        lines.append(f"{group.name:<16}{group.rows:>6}{grid:>10}{group.patches:>10,}{group.rows * group.text:>8,}")
    lines += ["", f"memory of one device at its worst{', with gradient checkpointing' if plan.checkpointing else ''}"]
    for name, size in plan.memory.items():
        lines.append(f"{name:<24}{size / GIB:>9.2f} GiB")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"{'all':<24}{plan.needed / GIB:>9.2f} GiB of {plan.room / GIB:.1f}: {verdict}")
    lines += ["", f"a step: {plan.rows_per_step:,} rows, {plan.flops_per_step / 1e12:,.2f} TFLOP, "]
    lines[-1] += f"{plan.step_seconds:.3f} s, {100 * plan.utilisation:.0f}% of the devices' bfloat16 rate"
    lines.append(f"the recipe's {plan.steps:,} steps: {plan.days:.3g} days")
    lines.append(
        f"the paper's {plan.paper['rows']:,} rows [paper], {plan.paper['epochs']} epochs [assumed]: "
        f"{plan.paper['steps']:,} steps of this size, {plan.paper['days']:.3g} days"
    )
    if not plan.fits:
        lines += ["", refusal(plan.needed, plan.room)]
    return "\n".join(lines)


def refusal(needed: int, room: int) -> str:
    """One line: the batch does not fit, and what to do."""
    return (
        f"The batch does not fit: the plan is {needed / GIB:.1f} GiB, there are {room / GIB:.1f} GiB. Smaller `rows` "
        "or `patches` with more training.gradient_accumulation_steps, or training.gradient_checkpointing=true."
    )


# -- before step 1 ------------------------------------------------------------------------------------------------


def check_fits(path: str | Path, overrides: list[str] | None, world: int) -> None:
    """Compare a recipe's plan with what a GPU has free, before anything is loaded.

    Up to 15% above, which is the plan's own tolerance, a line warns. Where no plan can be made, nothing is said: the
    run itself will tell what lacks.

    Raises:
        ValueError: the batch does not fit by more than that.
    """
    plan = planned_apart(path, overrides, world)
    if plan is None:
        return
    free = torch.cuda.mem_get_info()[0]
    if plan["needed"] > 1.15 * free:
        raise ValueError(refusal(plan["needed"], free))
    if plan["needed"] > free:
        print(
            f"It will be close: the plan is {plan['needed'] / GIB:.1f} GiB, {free / GIB:.1f} GiB are free.", flush=True
        )


def planned_apart(
    path: str | Path, overrides: list[str] | None, world: int, hardware: str | None = None
) -> dict[str, Any] | None:
    """A recipe's plan by a process of its own, on the CPU: a rehearsal sets up accelerate, of which there is one."""
    command = [sys.executable, "-m", "unit_cli", "plan", str(path), *(overrides or [])]
    command += ["--hardware", hardware or f"{world}xH100-80GB", "--json"]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        key: value for key, value in os.environ.items() if key not in ranks and not key.startswith("ACCELERATE_")
    }
    root = str(Path(__file__).resolve().parents[1])
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    begin = made.stdout.find("{")
    return json.loads(made.stdout[begin:]) if made.returncode in (0, 1) and begin >= 0 else None
