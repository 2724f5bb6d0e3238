"""Averages of weights: of a run's own steps, of a run and its teacher, of models on disk.

- `training.ema_decay`: a moving average of what trains, in float32, with the decay of update t at
  min(ema_decay, (1 + t) / (10 + t)), so that the first steps do not stay in it [ours: the usual warm-up]. The run
  trains on as it would without; evaluation looks at the average, and the model of the end is the average. Each
  checkpoint holds the weights as they train, and the average beside them, in `ema.safetensors`.
- `training.teacher_interpolation` alpha: at the end the encoder is `(1 - alpha) * trained + alpha * teacher`, which
  gives back some of what the teacher recognised for some of what was learned to read: weight-space ensembles of a
  start and its fine-tuning (WiSE-FT, arXiv 2109.01903); the paper does not do it [ours].
- `unit average`: the same of folders, see [`average_models`].

The weights as they were trained stay in `OUTPUT_DIR/raw/weights.safetensors` where one of the first two is on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

EMA_FILE = "ema.safetensors"  # of a checkpoint
RAW = "raw"  # folder of a run


class WeightAverage:
    """Moving average of a model's trained parameters, by name, in float32 on their devices.

    Args:
        decay: of the average, at its highest.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.shadow = {name: each.detach().float().clone() for name, each in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [each.detach().float() for each in self.parameters.values()]
        if current:
            torch._foreach_lerp_(list(self.shadow.values()), current, 1.0 - decay)

    @torch.no_grad()
    def put_in(self) -> dict[str, torch.Tensor]:
        """Write the average into the model; returns what was there."""
        raw = {name: each.detach().clone() for name, each in self.parameters.items()}
        for name, each in self.parameters.items():
            each.copy_(self.shadow[name])
        return raw

    @torch.no_grad()
    def take_out(self, raw: dict[str, torch.Tensor]) -> None:
        """Write back what [`put_in`] returned."""
        for name, each in self.parameters.items():
            each.copy_(raw[name])

    def save(self, path: Path) -> None:
        save_file(self.shadow, str(path), metadata={"updates": str(self.updates)})

    def load(self, path: Path) -> int:
        """Go on from a saved average; returns how many of the tensors that train it does not have. Theirs begins with
        what they are now.

        Raises:
            ValueError: it is of another model.
        """
        with safe_open(path, "pt") as opened:
            updates = int((opened.metadata() or {})["updates"])
        saved = load_file(path)
        known = saved.keys() & self.shadow.keys()
        if not known or any(saved[name].shape != self.shadow[name].shape for name in known):
            raise ValueError(f"{path} averages another model than the one that trains now.")
        self.updates = updates
        for name in known:
            self.shadow[name].copy_(saved[name])
        return len(self.shadow) - len(known)


class WeightAverages(Trainer):
    """A `Trainer` whose final weights are averages, by `ema_decay` and `teacher_interpolation` of its arguments.

    Raises:
        ValueError: `ema_decay` under FSDP or DeepSpeed, which spread the weights over processes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.average: WeightAverage | None = None
        self.anchor: dict[str, torch.Tensor] = {}  # the teacher's weights, for `teacher_interpolation`
        self._average_is_in = False
        if self.args.ema_decay:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "training.ema_decay works in one process and under DDP, not under FSDP or DeepSpeed: leave it "
                    "out, and average late checkpoints with `unit average`."
                )
            self.add_callback(_Averaging(self))

    def keep_anchor(self, teacher: nn.Module | None) -> None:
        """Remember the teacher's weights as they are now, where `teacher_interpolation` wants them at the end.

        Raises:
            ValueError: there is no teacher, it is of another shape than the encoder, the model has adapters.
        """
        if not self.args.teacher_interpolation:
            return
        if teacher is None:
            raise ValueError("training.teacher_interpolation needs a teacher (and training.vision_weight above 0).")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "training.teacher_interpolation works in one process and under DDP, not under FSDP or DeepSpeed: use "
                "`unit average MODEL TEACHER` when the run is over."
            )
        encoder = dict(_encoder(self.model).named_parameters())
        if any(".lora_" in name for name, _ in self.model.named_parameters()):  # what they lie on would move
            raise ValueError(
                "training.teacher_interpolation needs a model without adapters: use `unit average MODEL TEACHER` "
                "with the merged model when the run is over."
            )
        anchor = dict(teacher.named_parameters())
        if problem := _unlike(encoder, anchor):
            raise ValueError(f"training.teacher_interpolation: the teacher is no start of this encoder: {problem}.")
        self.anchor = {name: each.detach().float().cpu().clone() for name, each in anchor.items()}

    @contextmanager
    def with_average(self) -> Iterator[None]:
        """The model as its average, for a while."""
        if self.average is None or self._average_is_in:
            yield
            return
        raw = self.average.put_in()
        self._average_is_in = True
        try:
            yield
        finally:
            self.average.take_out(raw)
            self._average_is_in = False

    def evaluate(self, *args, **kwargs):
        with self.with_average():
            return super().evaluate(*args, **kwargs)

    def train(self, *args, **kwargs):
        if self.args.teacher_interpolation and not self.anchor:
            raise ValueError("training.teacher_interpolation needs a stage with a teacher (intra_scale, inter_scale).")
        self._average_is_in = False
        output = super().train(*args, **kwargs)
        self._finish_weights()
        return output

    @torch.no_grad()
    def _finish_weights(self) -> None:
        alpha = self.args.teacher_interpolation if self.anchor else 0.0
        if self.average is None and not alpha:
            return
        model = _unwrapped(self.model)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / RAW
            folder.mkdir(parents=True, exist_ok=True)
            raw = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
            save_file({name: each.contiguous() for name, each in raw.items()}, str(folder / "weights.safetensors"))
        say = print if self.is_world_process_zero() else (lambda line, flush: None)
        if self.average is not None:
            self.average.put_in()
            self._average_is_in = True
            say(
                f"The weights are the average of {self.average.updates} steps, decay {self.average.decay:g}; those of "
                f"the last step are in {RAW}/weights.safetensors.",
                flush=True,
            )
        if alpha:
            for name, each in _encoder(self.model).named_parameters():
                each.copy_(torch.lerp(each.float(), self.anchor[name].to(each.device), alpha))
            say(f"The encoder is {1 - alpha:g} of what was trained and {alpha:g} of the teacher.", flush=True)

    # -- with the checkpoint ------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.average is not None and self.args.should_save:
            self.average.save(Path(output_dir) / EMA_FILE)

    def rank_files(self, rank: int) -> list[str]:
        return [*super().rank_files(rank), *([EMA_FILE] if self.args.ema_decay and rank == 0 else [])]


class _Averaging(TrainerCallback):
    """Begins the average with the run, and takes in every step."""

    def __init__(self, trainer: WeightAverages):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.average = WeightAverage(_unwrapped(trainer.model), args.ema_decay)
        resumed = trainer._resumed
        if resumed is None:
            return
        say = print if trainer.is_world_process_zero() else (lambda line, flush: None)
        if not (resumed / EMA_FILE).is_file():
            say(f"{resumed} holds no average: it begins with the weights of step {state.global_step}.", flush=True)
        elif anew := trainer.average.load(resumed / EMA_FILE):
            say(f"{resumed} holds no average of {anew} of the tensors that train: theirs begins anew.", flush=True)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.average.update()


def _unwrapped(model: nn.Module) -> nn.Module:
    while hasattr(model, "module"):
        model = model.module
    return model


def _encoder(model: nn.Module) -> nn.Module:
    model = _unwrapped(model)
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).vision_model


def _unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """How tensors (or their shapes) differ from others in name or shape, in a few words; `None` where they do not."""
    shapes = [{name: tuple(getattr(each, "shape", each)) for name, each in given.items()} for given in (ours, theirs)]
    if lacking := sorted(set(shapes[0]) - set(shapes[1])):
        return f"it has no {lacking[0]}" + (f" ({len(lacking)} tensors lack)" if len(lacking) > 1 else "")
    if more := sorted(set(shapes[1]) - set(shapes[0])):
        return f"it has {more[0]} as well" + (f" ({len(more)} tensors more)" if len(more) > 1 else "")
    for name, shape in shapes[0].items():
        if shapes[1][name] != shape:
            return f"its {name} is {shapes[1][name]}, not {shape}"
    return None


# -- models on disk -----------------------------------------------------------------------------------------------

INSIDE = "vision_model."  # in front of an encoder's names in a whole model
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of a configuration, what says nothing about what the weights mean
IDLE_KEYS = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache")
# Files of a run or a checkpoint that are of its way and not of its model
OF_THE_RUN = ("manifest.json", "trainer_state.json", "recipe.json", "refusals.json", "log.jsonl", "README.md")


def average_models(
    models: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None
) -> dict[str, Any]:
    """Write the weighted mean of models of one architecture, tensor by tensor in float32, in the first one's dtype.

    The first model gives the configuration, processor and code, and says what is averaged. The others hold the same
    tensors; or, one being an encoder alone and the other a whole UNIT model, they share the encoder: of a whole first
    model the other parts stay as they are.

    Args:
        models: two folders or more, of models or of checkpoints (`checkpoint-N`), in safetensors.
        out: the folder to write; must be missing or empty.
        weights: one for each model, not negative; divided by their sum. Equal by default.

    Returns:
        `tensors` averaged, `kept` as they are in the first, the `weights` used.

    Raises:
        ValueError: fewer than two models, none there or a pickle, adapters alone, other names, shapes or
            configurations, weights that are none.
    """
    from .llava_tower import written_whole

    folders = [Path(each) for each in models]
    if len(folders) < 2:
        raise ValueError("An average takes two models or more.")
    shares = [1.0] * len(folders) if weights is None else [float(each) for each in weights]
    if len(shares) != len(folders):
        raise ValueError(f"{len(shares)} weights for {len(folders)} models: give one for each.")
    if min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise ValueError(f"Weights must not be negative, and not all be zero, got {shares}.")
    shares = [each / sum(shares) for each in shares]
    places = [tensor_files(folder) for folder in folders]
    shapes = [{name: shape for name, (_, shape) in each.items()} for each in places]
    names = {name: [name] for name in shapes[0]}  # of the first -> the names in all
    for folder, given in zip(folders[1:], shapes[1:], strict=True):
        theirs = _names_in(folders[0], shapes[0], folder, given)
        names = {name: [*known, theirs[name]] for name, known in names.items() if name in theirs}
    _check_configurations(folders)
    with written_whole(out) as staging:
        for each in folders[0].iterdir():
            if each.is_file() and each.suffix in (".json", ".py", ".txt", ".jinja", ".model") and _is_of_model(each):
                shutil.copyfile(each, staging / each.name)
        opened = {}
        for file in sorted({file for file, _ in places[0].values()}):
            tensors = {}
            with safe_open(file, "pt") as first:
                metadata = first.metadata() or {"format": "pt"}
                for name in list(first.keys()):
                    tensor = first.get_tensor(name)
                    if name in names:
                        others = []
                        for place, other in zip(places[1:], names[name][1:], strict=True):
                            source = place[other][0]
                            if source not in opened:
                                opened[source] = safe_open(source, "pt")
                            others.append(opened[source].get_tensor(other))
                        tensor = _mean(name, [tensor, *others], shares)
                    tensors[name] = tensor
            save_file(tensors, str(staging / file.name), metadata=metadata)
    return {"tensors": len(names), "kept": len(shapes[0]) - len(names), "weights": shares}


def _is_of_model(file: Path) -> bool:
    return file.name not in OF_THE_RUN and not file.name.startswith(("log-state-", "data-state-"))


def _mean(name: str, tensors: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        if any(not torch.equal(first, each) for each in tensors[1:]):
            raise ValueError(f"{name} holds whole numbers that differ: these models have no average.")
        return first
    total = torch.zeros_like(first, dtype=torch.float32)
    for tensor, share in zip(tensors, shares, strict=True):
        total += share * tensor.float()
    return total.to(first.dtype)


def tensor_files(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of each tensor of a model's folder.

    Raises:
        ValueError: no folder, no safetensors, an adapter alone, a file that cannot be opened.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder.")
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        else:
            files = [each for each in [folder / "model.safetensors"] if each.is_file()]
        if not files and (folder / ADAPTER_WEIGHTS).is_file():
            raise ValueError(
                f"{folder}: adapters alone, whose average is not that of what they do: merge them first (unit merge)."
            )
        if not files:
            raise ValueError(f"{folder}: no model.safetensors there (pickles are not read).")
        found = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in list(opened.keys()):
                    found[name] = (file, tuple(opened.get_slice(name).get_shape()))
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{folder}: its weights cannot be read: {error}") from error
    return found


def _names_in(first: Path, wanted: dict[str, Any], folder: Path, given: dict[str, Any]) -> dict[str, str]:
    """What the tensors of the first model, all or those of its encoder, are called in another one."""
    problem = _unlike(wanted, given)
    if problem is None:
        return {name: name for name in wanted}
    ours, theirs = _encoder_names(wanted), _encoder_names(given)
    if ours and theirs and not (_is_whole(wanted) and _is_whole(given)):
        problem = _unlike(
            {key: wanted[name] for key, name in ours.items()}, {key: given[name] for key, name in theirs.items()}
        )
        if problem is None:
            return {name: theirs[key] for key, name in ours.items()}
    raise ValueError(f"{folder} is not of the architecture of {first}: {problem}.")


def _is_whole(names: dict[str, Any]) -> bool:
    """Whether these are tensors of a whole UNIT model."""
    return any(name.startswith("connector.") for name in names)


def _encoder_names(names: dict[str, Any]) -> dict[str, str]:
    """Tensors of the encoder: their names in its own class -> here. All of an encoder alone, which transformers may
    have saved below `vision_model.`; of a model with an encoder inside, those below it."""
    inside = [name for name in names if name.startswith(INSIDE)]
    return {name.removeprefix(INSIDE): name for name in inside or names}


def _check_configurations(folders: list[Path]) -> None:
    """That settings which no shape shows (heads, activations, positions) are the same."""
    try:
        found = [json.loads((folder / "config.json").read_text()) for folder in folders]
    except (OSError, ValueError) as error:
        raise ValueError(f"config.json is missing or cannot be read: {error}") from error
    if len({"vision_config" in each for each in found}) == 2:  # an encoder alone beside a model with one inside
        found = [each.get("vision_config", each) for each in found]
    first = _leaves(found[0])
    for folder, each in zip(folders[1:], found[1:], strict=True):
        other = _leaves(each)
        for key in first.keys() & other.keys():
            if first[key] != other[key]:
                raise ValueError(
                    f"{folder} is not of the architecture of {folders[0]}: its {key} is {other[key]!r}, not "
                    f"{first[key]!r}."
                )


def _leaves(given: dict[str, Any], above: str = "") -> dict[str, Any]:
    found = {}
    for key, value in given.items():
        if key not in IDLE_KEYS:
            found |= _leaves(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found
