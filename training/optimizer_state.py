"""An optimiser's state by the names of the parameters, in one safetensors file, however many processes share it.

`optimizer.safetensors` holds each tensor of the state whole, under `<parameter>/<key>`
(`vision_model.layers.0.mlp.fc1.weight/exp_avg`), and in its metadata `groups`: the parameter groups as JSON (their
numbers, and the names of their parameters). So one process, DDP and FSDP2 write the same file, over any number of
processes, and each of them reads it. Tensors that lie in parts are gathered one by one while the file is written, and
each process keeps its part of a tensor as soon as it has read it: never more than one of them is whole in memory.

`optimizer.pt`, of older versions of this package and of plain transformers, is read too.

Of a group's numbers only the learning rate is taken, as far as it has fallen: the first rate, weight decay and the
rest are those of the run that goes on, which are the same unless its recipe was changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

FILE, OLDER_FILE = "optimizer.safetensors", "optimizer.pt"
# names of types in the header of a safetensors file
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
TYPES |= {torch.bool: "BOOL"}
# what wrappers put into the names of parameters: activation checkpointing, torch.compile, DDP
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "module.")


def plain_name(name: str) -> str:
    """A parameter's name as the model alone has it."""
    for wrapper in WRAPPERS[:2]:
        name = name.replace(wrapper, "")
    return name.removeprefix(WRAPPERS[2])


def leaves(optimizer: Any) -> list[torch.optim.Optimizer]:
    """torch's own optimisers inside of accelerate's wrapper and of [`MuonWithAdamW`]."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return list(getattr(optimizer, "inner", [optimizer]))


# -- parts of tensors ---------------------------------------------------------------------------------------------


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every process that has a part of it; each of them must ask."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    device = tensor.device_mesh.device_type
    return (tensor if tensor.device.type == device else tensor.to(device)).full_tensor()


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, laid out as `like` is: on its device, and where that lies in parts this process's part."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor.to(like.device)
    device = like.device_mesh.device_type
    part = distribute_tensor(tensor.to(device), like.device_mesh, like.placements, src_data_rank=None)
    return part.to(like.to_local().device)


# -- writing ------------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path | None,
    layout: dict[str, tuple[torch.dtype, torch.Size]],
    tensors: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> Exception | None:
    """Write a safetensors file tensor by tensor.

    Args:
        path: `None` on a process that does not write, but has parts of the tensors.
        layout: type and shape of each. tensors: gives one of them, whole.

    Returns:
        What went wrong with the file: all tensors are asked for nevertheless, for other processes wait to give parts.
    """
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    place = 0
    for name in names:
        dtype, shape = layout[name]
        end = place + dtype.itemsize * shape.numel()
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    problem, opened = None, None
    try:
        if path is not None:
            try:
                opened = path.open("wb")
                opened.write(len(text).to_bytes(8, "little") + text)
            except OSError as error:
                problem = error
        for name in names:
            tensor = tensors(name)
            if opened is None or problem is not None:
                continue
            try:
                flat = tensor.cpu().contiguous().reshape(-1)
                opened.write(memoryview(flat.view(torch.uint8).numpy()))
            except OSError as error:
                problem = error
    finally:
        if opened is not None:
            try:
                opened.close()
            except OSError as error:
                problem = problem or error
    return problem


def save_state(model: nn.Module, optimizer: Any, path: Path | None) -> Exception | None:
    """Write the state of an optimiser; every process asks, those without a `path` write nothing. Returns what went
    wrong with the file (see [`write_tensors`])."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    groups, found = [], {}
    for leaf in leaves(optimizer):
        for group in leaf.param_groups:
            settings = {key: _for_json(value) for key, value in group.items() if key not in ("params", "names")}
            groups.append(settings | {"names": [names[id(each)] for each in group["params"]]})
            for parameter in group["params"]:
                for key, value in leaf.state.get(parameter, {}).items():
                    found[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    layout = {key: (value.dtype, value.shape) for key, value in found.items()}
    return write_tensors(path, layout, lambda key: whole(found[key]), {"groups": json.dumps(groups)})


def _for_json(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


# -- reading ------------------------------------------------------------------------------------------------------


def load_state(model: nn.Module, optimizer: Any, folder: str | Path, say: Callable[[str], Any] = print) -> bool:
    """Give an optimiser the state that a checkpoint has of it; `False` where there is none.

    Parameters of which the checkpoint has no state, or that of another optimiser (Muon's, AdamW's), begin without one,
    as at the start of a run; `say` gets a line.

    Raises:
        ValueError: an older file that does not tell its parameters, and is of other groups.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        with safe_open(folder / FILE, "pt") as opened:
            groups = json.loads(opened.metadata()["groups"])
            _take(model, optimizer, groups, set(opened.keys()), opened.get_tensor, say)
        return True
    if (folder / OLDER_FILE).is_file():
        state = torch.load(folder / OLDER_FILE, map_location="cpu", weights_only=True)
        groups, tensors = _by_name(model, optimizer, state)
        _take(model, optimizer, groups, set(tensors), tensors.__getitem__, say)
        return True
    return False


def _take(
    model: nn.Module,
    optimizer: Any,
    groups: list[dict[str, Any]],
    known: set[str],
    tensors: Callable[[str], torch.Tensor],
    say: Callable[[str], Any],
) -> None:
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    group_of = {name: group for group in groups for name in group["names"]}
    keys: dict[str, list[str]] = {}
    for entry in sorted(known):
        name, _, key = entry.rpartition("/")
        keys.setdefault(name, []).append(key)
    anew = 0
    for leaf in leaves(optimizer):
        for group in leaf.param_groups:
            own = [names[id(each)] for each in group["params"]]
            before = next((group_of[name] for name in own if name in group_of), {})
            _take_rate(group, before)
            for name, parameter in zip(own, group["params"], strict=True):
                if name not in group_of or bool(group_of[name].get("muon")) != bool(group.get("muon")):
                    anew += 1
                    continue
                # clones, for what is read may lie in the file itself; single numbers (`step`) stay on the CPU, as
                # torch has them, unless the optimiser is a fused one
                on_device = group.get("fused") or group.get("capturable")
                state = {key: tensors(f"{name}/{key}") for key in keys.get(name, [])}
                if state:
                    leaf.state[parameter] = {
                        key: value.clone()
                        if value.ndim == 0 and not on_device
                        else part_like(value, parameter).clone()
                        for key, value in state.items()
                    }
    if anew:
        say(f"The checkpoint has no optimiser state of {anew} of the tensors that train: theirs begins anew.")


def _take_rate(group: dict[str, Any], before: dict[str, Any]) -> None:
    """The learning rate of a saved group, or the share of its first one that is left where that is another one now."""
    if "lr" not in before:
        return
    first, now = before.get("initial_lr"), group.get("initial_lr")
    group["lr"] = before["lr"] if not first or now is None or now == first else now * before["lr"] / first


def load_schedule(scheduler: Any, state: dict[str, Any]) -> None:
    """Where a schedule of learning rates had come to. Its shape, and the rates that it begins from, are those of the
    run that goes on, and so are its groups: a changed recipe may have others."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # inside of accelerate's
    if not isinstance(scheduler, LambdaLR):
        scheduler.load_state_dict(state)
        return
    groups = scheduler.optimizer.param_groups
    spent = [{"spent": each["spent"]} for each in state["lr_lambdas"] if each and "spent" in each]  # see schedule.py
    kept = {key: value for key, value in state.items() if key not in ("base_lrs", "_last_lr")}
    scheduler.load_state_dict(kept | {"lr_lambdas": spent[:1] * len(groups)})
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def _by_name(model: nn.Module, optimizer: Any, state: dict) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The content of an `optimizer.pt`: groups with names, tensors by `<parameter>/<key>`."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    own = leaves(optimizer)
    parts = state.get("inner", [state])
    groups, tensors = [], {}
    for number, part in enumerate(parts):
        for place, group in enumerate(part["param_groups"]):
            told = group.get("names")
            if told is None:  # as this run would number them
                fits = number < len(own) and place < len(own[number].param_groups)
                told = [names[id(each)] for each in own[number].param_groups[place]["params"]] if fits else []
            told = [plain_name(each) for each in told]
            if len(told) != len(group["params"]):
                raise ValueError("The saved optimiser has other parts than this one: the recipe changed between runs.")
            groups.append({key: value for key, value in group.items() if key != "params"} | {"names": told})
            for name, index in zip(told, group["params"], strict=True):
                for key, value in part["state"].get(index, {}).items():
                    tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return groups, tensors
