"""One training step carried out without numbers: what it allocates, multiplies and moves.

The recipe's own trainer runs its own `training_step` (forward, losses, backward, gradient checkpointing) on tensors
that have a shape and no content (torch's fake tensors), and every operator is noted. So the count follows the code,
for any encoder and decoder, in seconds and without memory. What no shape can tell is answered as it is in training:
masks are full, labels are there.

Exact: operators, their shapes and types, FLOPs of matrix products and attention, lifetime of every tensor.
Not seen: workspace inside of kernels, what an allocator keeps back, the framework itself.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from modeling_unit import UnitForPreTraining, UnitImageProcessor
from modeling_unit.architectures_unit import freeze_unread

from .arguments import UnitTrainingArguments
from .freezing import freeze_parts, unread_parts
from .teacher_cache import TeacherFeatures, teacher_dtype
from .trainer import UnitTrainer

aten = torch.ops.aten
CPU = torch.device("cpu")
# Operators that only look at a tensor in another way, or make room that the next one fills
FREE = {
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
FREE |= {"device", "set_", "resize_"}


@dataclass
class GroupShape:
    """A group of a micro-batch.

    Args:
        name: `"natural_x1"`, `"document_x4"`, ... rows: images. grid: rows and columns of patches of each.
        text: text positions behind the visual tokens. teacher: the teacher's grid where it sees another scale.
    """

    name: str
    rows: int
    grid: tuple[int, int]
    text: int
    teacher: tuple[int, int] | None = None

    @property
    def patches(self) -> int:
        return self.rows * self.grid[0] * self.grid[1]


@dataclass
class Step:
    """What one micro-batch takes.

    Args:
        operators: `(name, type of numbers, shapes of tensor arguments)` -> [calls, FLOPs, bytes read and written], all
            calls together.
        peak: most bytes alive at once beside the weights, gradients among them.
        kept: bytes alive when the backward pass begins: what was saved for it.
        casts: bytes of `peak` that are copies of weights in the type of autocast.
        gradients: bytes of `peak` that are gradients of weights.
        logits: bytes of the decoder's logits, in all their copies, within `peak`.
    """

    operators: dict[tuple, list[int]] = field(default_factory=dict)
    peak: int = 0
    kept: int = 0
    casts: int = 0
    gradients: int = 0
    logits: int = 0

    @property
    def flops(self) -> int:
        return sum(flops for _, flops, _ in self.operators.values())

    @property
    def moved(self) -> int:
        return sum(moved for _, _, moved in self.operators.values())

    @property
    def calls(self) -> int:
        return sum(calls for calls, _, _ in self.operators.values())


class Ledger(TorchDispatchMode):
    """Notes every operator and the life of every storage. `known`: tensors that were there before, the weights."""

    def __init__(self, known: list[torch.Tensor], vocabulary: int = -1):
        super().__init__()
        self.weights = {_storage(each) for each in known}
        self.vocabulary = vocabulary
        self.operators: dict[tuple, list[int]] = {}
        self.events: list[
            tuple[int, int]
        ] = []  # number of the storage, bytes: positive when made, negative when freed
        self.alive: dict[int, int] = {}  # address -> number
        self.sizes: list[int] = []
        self.casts: set[int] = set()
        self.logits: set[int] = set()
        self._answers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = operator._overloadpacket
        if operator is aten._local_scalar_dense.default:
            number = args[0]
            if number.dtype != torch.bool:
                return 1
            return self._answers.get(number, True)
        if operator is aten.index.Tensor and args[1] and args[1][0] is not None and args[1][0].dtype == torch.bool:
            # a full mask keeps everything
            made = args[0].flatten(0, args[1][0].dim() - 1).clone()
        else:
            made = operator(*args, **kwargs)
        made_here = [each for each in (made if isinstance(made, (tuple, list)) else [made]) if _is_tensor(each)]
        if packet is aten.all:
            for each in made_here:
                self._answers[each] = False  # "is nothing padded?": something is
        for each in made_here:
            self._watch(each, operator, args)
        if not operator.is_view and packet.__name__ not in FREE:
            read = list(_tensors((args, tuple(kwargs.values()))))
            count = flop_registry.get(packet)
            flops = count(*args, **kwargs, out_val=made) if count else _attention_flops(packet, args)
            moved = sum(each.numel() * each.element_size() for each in read + made_here)
            floats = [each.dtype for each in read + made_here if each.is_floating_point()]
            shapes = tuple(tuple(each.shape) for each in read[:3]) if flops else ()
            key = (packet.__name__, str(floats[0] if floats else torch.int64).removeprefix("torch."), shapes)
            entry = self.operators.setdefault(key, [0, 0, 0])
            entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + int(flops), entry[2] + moved
        return made

    def _watch(self, tensor: torch.Tensor, operator, args) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.alive or address in self.weights:
            return
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.alive[address] = number
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._free, address).atexit = False
        if operator._overloadpacket is aten._to_copy and _storage(args[0]) in self.weights:
            self.casts.add(number)
        if tensor.dim() >= 2 and tensor.shape[-1] == self.vocabulary and tensor.dtype != torch.bool:
            self.logits.add(number)

    def _free(self, address: int) -> None:
        number = self.alive.pop(address)
        self.events.append((number, -self.sizes[number]))

    def mark(self) -> int:
        """Now, as a place in `events`."""
        return len(self.events)

    def at(self, place: int) -> set[int]:
        """Storages alive at a place."""
        alive: set[int] = set()
        for number, size in self.events[:place]:
            (alive.add if size >= 0 and number not in alive else alive.discard)(number)
        return alive

    def highest(self, begin: int = 0) -> tuple[int, int]:
        """The most bytes alive from `begin` on, and where."""
        now = best = place = 0
        for index, (_, size) in enumerate(self.events):
            now += size
            if index >= begin and now > best:
                best, place = now, index + 1
        return best, place

    def size(self, numbers: set[int]) -> int:
        return sum(self.sizes[number] for number in numbers)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if _is_tensor(value):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _attention_flops(packet, args) -> int:
    """The CPU's own attention, which torch's counter does not know; counted as torch counts the GPU's: in full, also
    where it is causal."""
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(each.shape for each in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(each.shape for each in args[:4]))
    return 0


class AutocastOfGpus(TorchFunctionMode):
    """Autocast on a GPU runs norms and softmax in float32, on a CPU it does not (torch, "Autocast Op Reference"). A
    teacher in bfloat16 runs outside of it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        widened = (nn.functional.layer_norm, nn.functional.softmax, nn.functional.log_softmax)
        if function in widened and torch.is_autocast_enabled("cpu"):
            args = tuple(map(_widened, args))
            kwargs = {key: _widened(each) for key, each in kwargs.items()}
        return function(*args, **kwargs)


def _widened(given):
    return given.float() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


class _Rehearsal(UnitTrainer):
    """A trainer whose model stays where it is."""

    def _move_model_to_device(self, model, device):
        pass


def emptied(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A model on the meta device with all its weights and buffers as fake tensors of a CPU, in place."""
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in memo:
                fake = FakeTensor(mode, weight.detach(), CPU)
                memo[id(weight)] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            module._parameters[name] = memo[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer, CPU)
    return model


def rehearse(
    model: nn.Module,
    teacher: nn.Module | None,
    arguments: UnitTrainingArguments,
    image_processor: UnitImageProcessor,
    groups: list[GroupShape],
    *,
    like_gpu: bool = False,
    gradients_kept: bool = False,
) -> Step:
    """Run one training step on shapes alone.

    Args:
        model, teacher: on the meta device; [`UnitForPreTraining`], with adapters or without, and an encoder.
        arguments: of the recipe; its precision, weights of the losses and gradient checkpointing hold.
        groups: the micro-batch.
        like_gpu: autocast as on a GPU.
        gradients_kept: gradients are there already, of a micro-batch before (accumulation).
    """
    mode = FakeTensorMode()
    _forget(model, teacher)
    emptied(model, mode)
    if teacher is not None:
        if teacher.dtype != teacher_dtype(arguments):
            teacher.to(teacher_dtype(arguments))  # before it is emptied: what is fake cannot be cast in place
        emptied(teacher, mode)
    with mode:
        trains = [each.requires_grad for each in model.parameters()]
        trainer = _Rehearsal(model=model, args=arguments, image_processor=image_processor, train_dataset=[0])
        for each, wanted in zip(model.parameters(), trains, strict=True):  # the teacher comes only now
            each.requires_grad_(wanted)
        freeze_unread(_core(model).vision_model)
        freeze_parts(model, unread_parts(arguments, teacher is not None))
        trainer.text_behind = True
        if teacher is not None:
            trainer.teacher = teacher.requires_grad_(False).eval()
            uncached = copy.copy(arguments)
            uncached.teacher_cache = False
            trainer.teacher_features = TeacherFeatures(trainer.teacher, uncached)
        trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        forward = model.forward
        wrapped = trainer.accelerator.prepare_model(model, device_placement=False)
        core = _core(model)
        parameters = [*model.parameters(), *model.buffers()]
        parameters += [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
        trained = [each for each in model.parameters() if each.requires_grad]
        marks: list[int] = []
        backward = trainer.accelerator.backward
        for attempt in range(2 if gradients_kept else 1):
            if attempt:
                parameters += [each.grad for each in trained if each.grad is not None]
            ledger = Ledger(parameters, core.config.text_config.vocab_size)

            def marked(loss, ledger=ledger, **kwargs):
                marks.append(ledger.mark())
                return backward(loss, **kwargs)

            trainer.accelerator.backward = marked
            inputs = {group.name: _inputs(core, group, arguments) for group in groups}
            with ledger, AutocastOfGpus() if like_gpu and arguments.bf16 else nullcontext():
                trainer.training_step(wrapped, inputs)
        peak, place = ledger.highest()
        alive = ledger.at(place)
        gradients = {ledger.alive.get(_storage(each.grad)) for each in trained if each.grad is not None}
        step = Step(
            operators=ledger.operators,
            peak=peak,
            kept=ledger.size(ledger.at(marks[-1])),
            casts=ledger.size(alive & ledger.casts),
            gradients=ledger.size(alive & gradients),
            logits=ledger.size(alive & ledger.logits),
        )
        if gradients_kept:
            kept = sum(each.numel() * each.element_size() for each in trained)
            step.peak, step.gradients = step.peak + kept, step.gradients + kept
        model.forward = forward
    _forget(model, teacher)
    return step


def _forget(*models: nn.Module | None) -> None:
    """Empty the caches of functions beside the models' classes: tensors of one rehearsal (DINOv3's coordinates) must
    not come up in another, or in a real run."""
    names = {type(module).__module__ for model in models if model is not None for module in model.modules()}
    for name in names:
        for value in list(vars(sys.modules[name]).values()):
            # transformers hides some of them in a wrapper
            inside = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
            for each in (value, *inside):
                if isinstance(each, functools._lru_cache_wrapper):
                    each.cache_clear()


def _core(model: nn.Module) -> UnitForPreTraining:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(model: UnitForPreTraining, group: GroupShape, arguments: UnitTrainingArguments) -> dict[str, torch.Tensor]:
    """What the collator gives a group, raw, without content."""
    patch = model.config.vision_config.patch_size
    rows, cols = group.grid
    channels = 1 if group.name.startswith("document") else 3
    text = (group.rows, model.connector.num_visual_tokens(rows, cols) + group.text)
    inputs = {"pixel_values": torch.empty(group.rows, channels, rows * patch, cols * patch, dtype=torch.uint8)}
    if group.teacher:
        sides = (side * patch for side in group.teacher)
        inputs["teacher_pixel_values"] = torch.empty(group.rows, 3, *sides, dtype=torch.uint8)
    if arguments.character_weight and channels == 1:
        slots = model.config.character_slots
        inputs["character_classes"] = torch.zeros(group.rows, rows * cols, slots, dtype=torch.long)
    for key in ("input_ids", "labels", "attention_mask", "token_places"):
        inputs[key] = torch.zeros(text, dtype=torch.long)
    return inputs


def scratch_arguments(settings: dict[str, Any]) -> UnitTrainingArguments:
    """The arguments of a recipe for a rehearsal: on the CPU, nothing evaluated, nothing written to its folder."""
    left_out = ("output_dir", "fsdp", "fsdp_config", "tf32", "load_best_model_at_end", "metric_for_best_model")
    beginnings = ("eval_", "early_stopping_")
    settings = {
        key: value for key, value in settings.items() if key not in left_out and not key.startswith(beginnings)
    }
    if settings.get("save_strategy") == "best":
        settings["save_strategy"] = "no"
    settings |= {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 1, "torch_compile": False}
    settings |= {"remove_unused_columns": False, "deepspeed": None, "output_dir": tempfile.gettempdir()}
    return UnitTrainingArguments(**settings)
