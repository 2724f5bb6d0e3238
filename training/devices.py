"""Many devices: what a run under `accelerate launch` needs beside the Trainer. Configurations are in
`training/accelerate/`.

- DDP: each process holds the whole model.
- FSDP2: encoder and decoder layers lie in parts, layer by layer; the rest of the model is one more part. Nothing else
  changes: checkpoints and the final model are whole, and each of these reads the checkpoints of the others.
- DeepSpeed ZeRO-2 and ZeRO-3: checkpoints keep DeepSpeed's own state, for the same number of processes; the final
  model is whole, in the type that DeepSpeed trained in.

The teacher is whole on every process: frozen, it costs its weights alone (ViT-H: 2.5 GB), and gathering it in parts
would cost as much communication as the student's forward pass.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .optimizer_state import part_like, plain_name, whole

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def check_launch(arguments: TrainingArguments) -> None:
    """Whether this package can run under what `accelerate launch` was told.

    Raises:
        ValueError: in one line, what it cannot.
    """
    fsdp, deepspeed = _is_set("ACCELERATE_USE_FSDP"), _is_set("ACCELERATE_USE_DEEPSPEED")
    if arguments.fsdp or arguments.deepspeed:
        raise ValueError(
            "training.fsdp and training.deepspeed: a recipe is for any devices; give `accelerate launch` one of the "
            "configurations in training/accelerate/ instead."
        )
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP version 1 is not supported, for its checkpoints do not move: set fsdp_version: 2, as in "
            "training/accelerate/fsdp2.yaml."
        )
    if fsdp and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false: it leaves the teacher of all processes but one empty."
        )
    if deepspeed and getattr(arguments, "optimizer", "adamw") == "muon":
        raise ValueError(
            "training.optimizer=muon needs whole matrices, which DeepSpeed's ZeRO does not keep: use "
            "training/accelerate/fsdp2.yaml or ddp.yaml, or optimizer: adamw."
        )
    if deepspeed and _is_set("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        raise ValueError("zero3_init_flag must be false: models are put together before they are divided.")


def speak_once(arguments: TrainingArguments) -> None:
    """Progress bars on one process of a machine."""
    if arguments.local_process_index != 0:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def load_whole_models(arguments: TrainingArguments) -> None:
    """Have transformers load models whole: under ZeRO-3 it would load all in parts, the teacher as well."""
    if getattr(arguments, "deepspeed_plugin", None) is not None:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def layer_classes(model: nn.Module) -> set[str]:
    """Names of the classes of a model's repeated layers, whichever encoder and decoder it is of."""
    return {type(each).__name__ for each in model.modules() if isinstance(each, GradientCheckpointingLayer)}


def empty_copy(model: nn.Module) -> nn.Module:
    """A model of the same modules whose parameters have no memory; buffers are copied, tied ones stay tied."""
    memo = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def whole_state(model: nn.Module, keep: bool, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The weights of a model that lies in parts, gathered tensor by tensor to the CPU; every process must ask.

    Args:
        keep: whether this process wants them; it gets none otherwise.
        names: of those that are wanted, as the model alone has them; all by default.
    """
    wanted = None if names is None else set(names)
    found: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}  # tied ones come once
    for name, tensor in model.state_dict(keep_vars=True).items():
        name = plain_name(name)
        if wanted is not None and name not in wanted:
            continue
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            gathered = whole(tensor)
            if keep:
                seen[id(tensor)] = gathered.cpu()
        if keep:
            found[name] = seen[id(tensor)]
    return found


def names_in_adapter(model: nn.Module) -> dict[str, str]:
    """Name in a saved adapter -> name in the model, of all tensors that peft saves."""
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    places = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
    name_of = {id(tensor): name for name, tensor in places.items()}
    saved = get_peft_model_state_dict(model, state_dict=places, save_embedding_layers=False)
    return {name: name_of[id(tensor)] for name, tensor in saved.items()}


@torch.no_grad()
def load_parts(model: nn.Module, folder: str | Path) -> None:
    """Read a checkpoint's weights into a model that lies in parts: each process keeps its own of each tensor.

    Raises:
        ValueError: no whole weights there, or of another model.
    """
    folder = Path(folder)
    adapted = isinstance(model, PeftModel)
    path = folder / (ADAPTER_WEIGHTS if adapted else SAFE_WEIGHTS_NAME)
    files = sorted(folder.glob("model-*.safetensors")) if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file() else [path]
    if not all(each.is_file() for each in files):
        raise ValueError(f"{folder} has no {path.name} to go on from.")
    own = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    name_of = names_in_adapter(model) if adapted else {name: name for name in own}
    left = {id(own[name]) for name in name_of.values()}  # tied ones are in the file once
    for file in files:
        with safe_open(file, "pt") as opened:
            found = list(opened.keys())
            for saved in found:
                if saved not in name_of:
                    raise ValueError(f"{file}: {saved} is not of this model.")
                tensor = own[name_of[saved]]
                value = part_like(opened.get_tensor(saved), tensor)
                target, value = (each.to_local() if hasattr(each, "to_local") else each for each in (tensor, value))
                target.copy_(value)
                left.discard(id(tensor))
    if left:
        missing = [name for name, tensor in own.items() if id(tensor) in left]
        raise ValueError(f"{folder}: {len(missing)} tensors of this model are missing, {missing[0]} among them.")


class ManyDevices(Trainer):
    """A `Trainer` whose model may lie in parts over many devices: see this module's text.

    Raises:
        ValueError: launched in a way that this package cannot run under ([`check_launch`]).
    """

    def __init__(self, *args, **kwargs):
        self._empty: nn.Module | None = None  # the model's modules, to be filled with whole weights
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self):
        check_launch(self.args)
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if _is_set("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate would give CPU processes DDP without a word
            state.fsdp_plugin, state.distributed_type = FullyShardedDataParallelPlugin(), DistributedType.FSDP
            for shared in (AcceleratorState._shared_state, PartialState._shared_state):
                shared["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            # features are slices of the encoder's output; nothing writes into what a model returns
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        if self.is_fsdp_enabled and self.accelerator.mixed_precision == "bf16":
            # as under DDP: weights and their sums over devices in float32, autocast between (accelerate's own policy
            # would round the losses and the teacher's features to bf16, and sum gradients in it)
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    @property
    def lies_in_parts(self) -> bool:
        """Whether the weights of one process are not all of the model."""
        if self.is_fsdp_enabled:
            return True
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    def _prepare_for_training(self, *args, **kwargs):
        if self.lies_in_parts and self._empty is None:
            self._empty = empty_copy(self.model)
            if self.is_fsdp_enabled:
                plugin = self.accelerator.state.fsdp_plugin
                if plugin.transformer_cls_names_to_wrap is None:
                    plugin.transformer_cls_names_to_wrap = sorted(layer_classes(self.model))
                if self.accelerator.native_amp:
                    forward = self.model.forward

                    def autocast_forward(*inputs, **settings):
                        with self.accelerator.autocast():
                            return forward(*inputs, **settings)

                    self.model.forward = convert_outputs_to_fp32(autocast_forward)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.args.world_size > 1:
            self.seed_rank()
        return prepared

    def seed_rank(self) -> None:
        """Random numbers of this process's own, dropout's and others': all processes have drawn the same weights."""
        set_seed((self.args.seed * 1_000_003 + self.state.global_step * 4099 + self.args.process_index) % 2**32)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        return grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm

    def whole_model(self) -> nn.Module | None:
        """The model with all of its weights, no longer wrapped, for the processes that save; every process must ask.
        `None` on the others where the weights lie in parts. It is not for further training."""
        if not self.lies_in_parts:
            return self.model
        if self.is_deepspeed_enabled:
            tensors = self.accelerator.get_state_dict(self.deepspeed)
        else:
            tensors = whole_state(self.model, self.args.should_save)
        if not self.args.should_save:
            return None
        self._empty.load_state_dict(tensors, assign=True)
        model = self._empty.get_base_model() if isinstance(self._empty, PeftModel) else self._empty
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        return self._empty
