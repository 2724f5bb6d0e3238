"""LoRA adapters as folders of their own: saved by a run, written for the Hub, merged into the plain architecture.

A run with `lora.parts` leaves `adapter/` beside the merged weights, a folder that
`PeftModel.from_pretrained(base, folder)` takes: `adapter_config.json`, `adapter_model.safetensors`, `README.md`. It
holds the low-rank matrices and, whole, the parts that train in full beside them (`FULL_PARTS` in `training/lora.py`).

The base is what the run started from: the folder (its absolute path) or the Hub id (with the commit) named by the
recipe's `start`. A run that makes a new model around an encoder has no such thing, for its connector and often its
language decoder are drawn at random: it saves the model as it was before training too, as `base/` beside `adapter/`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    PreTrainedModel,
)

from modeling_unit import UnitForPreTraining

from .export import PROVENANCE, save_full
from .llava_tower import written_whole
from .lora import FULL_PARTS

ADAPTER, BASE = "adapter", "base"  # folders of a run
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FINGERPRINT = "base.json"  # beside an adapter: the hash of the weights that it was trained on
PREFIX = "base_model.model."  # peft's, in front of every name in an adapter
# Parts that a base may lack without being another model: the auxiliary head is left out of exported models, the vision
# decoder is not there in `UnitForConditionalGeneration`
DISPENSABLE = ("character_head", "vision_decoder")


# -- a run leaves its adapter -------------------------------------------------------------------------------------


def is_adapted(model: nn.Module) -> bool:
    """Whether `add_lora` has wrapped the model."""
    return hasattr(model, "merge_and_unload")


def base_of(start: str | Path) -> tuple[str, str | None]:
    """What an adapter names as its base, and the revision: a folder's absolute path, or a Hub id and the commit that
    the cache holds. Ask when the model has just been loaded from there."""
    if Path(start).is_dir():
        return str(Path(start).resolve()), None
    cached = try_to_load_from_cache(str(start), "config.json")
    return str(start), Path(cached).parent.name if isinstance(cached, str) else None


def save_adapter(model: nn.Module, folder: str | Path, base: str, revision: str | None = None) -> Path:
    """Write the adapter of a model that `add_lora` has wrapped, in the place of an earlier one.

    Args:
        base, revision: of the model that the adapter belongs on, see [`base_of`].
    """
    folder = Path(folder)
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path, config.revision = base, revision
    with replaced(folder) as staging:
        # what peft would do about embeddings is to ask the Hub for the base: none of ours is adapted or resized
        model.save_pretrained(staging, safe_serialization=True, save_embedding_layers=False)
        write_card(staging, license_of(base, revision, local_files_only=True))
        if (found := fingerprint(base, revision)) is not None:
            (staging / FINGERPRINT).write_text(json.dumps({"sha256": found}) + "\n", encoding="utf-8")
    return folder


def save_base(model: nn.Module, processor: Any, folder: str | Path) -> Path:
    """Write the model that `add_lora` has wrapped as it was before: what training has not moved, below and beside the
    adapters. For a base that is nowhere else; the folder takes the place of an earlier one."""
    folder = Path(folder)
    tensors = {}
    for name, tensor in model.get_base_model().state_dict().items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            tensors[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    with replaced(folder) as staging:
        model.get_base_model().save_pretrained(staging, state_dict=tensors)
        processor.save_pretrained(staging)
    return folder


def fingerprint(base: str | Path, revision: str | None = None) -> str | None:
    """Hash of a base's weights: names, shapes, and values as float32, however they are divided into files; without the
    parts that a base may lack (`DISPENSABLE`). `None` where there are no safetensors on this machine; nothing is
    fetched."""
    folder = Path(base)
    if not folder.is_dir():
        cached = None if is_folder(str(base)) else try_to_load_from_cache(str(base), "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != WEIGHTS)
    places: dict[str, Path] = {}
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        if not places:
            return None
        digest = hashlib.sha256()
        with ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
            for name in sorted(places):
                if name.split(".")[0] in DISPENSABLE:
                    continue
                tensor = opened[places[name]].get_tensor(name)
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().contiguous().reshape(-1).view(torch.uint8).numpy())
    except (OSError, SafetensorError):  # a damaged file is for those to report who load it
        return None
    return digest.hexdigest()


def other_base(adapter: Path, base: str | Path, revision: str | None = None) -> bool:
    """Whether an adapter's folder records that it was trained on other weights than those of `base`; `False` where it
    records none (adapters of before, or of others), or where they are not on this machine."""
    try:
        recorded = json.loads((adapter / FINGERPRINT).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    found = fingerprint(base, revision)
    return found is not None and found != recorded


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes its place at the end, of an earlier one as well, and vanishes
    after an error."""
    folder = folder.absolute()
    staging, earlier = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for left in (staging, earlier):
        shutil.rmtree(left, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if folder.exists():
            folder.rename(earlier)
        staging.rename(folder)
    finally:
        for left in (staging, earlier):
            shutil.rmtree(left, ignore_errors=True)


# -- for the Hub --------------------------------------------------------------------------------------------------


def export_adapter(
    run: str | Path,
    folder: str | Path,
    base: str | None = None,
    license: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write a run's adapter as a repository folder: adapter, its card, the run's recipe, log and curve.

    Args:
        run: folder of a run, or of an adapter. folder: made; must be missing or empty.
        base: Hub id of the base model in place of the recorded one; needed where that is a folder of this machine.
        license: identifier of the Hub; by default what the base's own card says, and none where it says nothing.
        local_files_only: the Hub is not asked for that card.

    Raises:
        ValueError: no adapter there, an adapter only as a pickle, a base that others cannot fetch, `folder` not empty.
    """
    source = adapter_of(run)
    settings = read_settings(source)
    recorded, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if base is not None:
        settings |= {"base_model_name_or_path": str(base), "revision": None}
    elif not recorded:
        raise ValueError(f"{source}: {CONFIG} names no base model; name its id on the Hub (--base).")
    elif is_folder(recorded):
        raise ValueError(
            f"{source}: its base model is the folder {recorded}, which others do not have: publish that one first, "
            "and name its id on the Hub (--base OWNER/BASE)."
        )
    if license is None:
        license = license_of(settings["base_model_name_or_path"], settings.get("revision"), local_files_only)
    if license is None and recorded:
        license = license_of(recorded, revision, local_files_only)
    with written_whole(folder) as staging:
        (staging / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(source / WEIGHTS, staging / WEIGHTS)
        if (source / FINGERPRINT).is_file():
            shutil.copyfile(source / FINGERPRINT, staging / FINGERPRINT)
        write_card(staging, license)
        copy_provenance(source, staging)
    return Path(folder)


def adapter_of(run: str | Path) -> Path:
    """The folder of a run's adapter, or of an adapter itself.

    Raises:
        ValueError: see [`find_adapter`].
    """
    run = Path(run)
    return find_adapter(run if (run / CONFIG).is_file() or not (run / ADAPTER / CONFIG).is_file() else run / ADAPTER)


def is_folder(base: str | None) -> bool:
    """Whether a base is named by a path, of a folder that may be gone, and not by an id on the Hub."""
    return bool(base) and (Path(base).is_absolute() or Path(base).is_dir() or base.startswith((".", "~")))


def write_card(folder: Path, license: str | None = None) -> None:
    """`README.md` of an adapter's folder, from its `adapter_config.json`: base model, how to load it; the licence."""
    settings = read_settings(folder)
    base, revision = settings["base_model_name_or_path"], settings.get("revision")
    known = {} if is_folder(base) else {"base_model": base, "base_model_relation": "adapter"}
    if license:
        known["license"] = license
    data = ModelCardData(
        library_name="peft", tags=["lora", "unit", "vision"], pipeline_tag="image-text-to-text", **known
    )
    llava = (settings.get("auto_mapping") or {}).get("base_model_class") == "LlavaForConditionalGeneration"
    auto = "AutoModelForImageTextToText" if llava else "AutoModelForPreTraining"
    named = f"{base!r}" + (f", revision={revision!r}" if revision else "")
    named += "" if llava or is_folder(base) else ", trust_remote_code=True"
    full = ", ".join(settings.get("modules_to_save") or []) or "none"
    method = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    text = f"""# {method} adapter of {base}

Rank {settings["r"]}, alpha {settings["lora_alpha"]}; trained in full beside the adapter and part of it: {full}.

```python
{"" if llava or not is_folder(base) else "import modeling_unit" + chr(10)}from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({named})
model = PeftModel.from_pretrained(base, ADAPTER)  # this folder or repository
```

`unit merge ADAPTER OUT` (package `unit-vision`) gives the plain architecture, without peft.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def license_of(base: str, revision: str | None = None, local_files_only: bool = False) -> str | None:
    """The licence that a model's card states, `None` where there is no card or it states none. local_files_only: the
    Hub is not asked."""
    try:
        if is_folder(base):
            card = Path(base) / "README.md"
        else:
            card = Path(hf_hub_download(base, "README.md", revision=revision, local_files_only=local_files_only))
        stated = ModelCard.load(card).data.to_dict().get("license") if card.is_file() else None
    except (OSError, ValueError, HfHubHTTPError):
        return None
    return stated if isinstance(stated, str) else None


def copy_provenance(adapter: Path, folder: Path) -> None:
    """Recipe, log and curve of the run that an adapter came from, where they are known."""
    for name in PROVENANCE:
        beside = [adapter / name, adapter.parent / name] if adapter.name == ADAPTER else [adapter / name]
        for file in beside:
            if file.is_file():
                shutil.copyfile(file, folder / name)
                break


# -- back to the plain architecture -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """What [`merge_adapter`] did.

    Args:
        base: where the base came from. model_class: of what was written. dtype: of the weights on disk.
        layers: number of layers whose adapter was merged. full_parts: parts that came whole with the adapter.
        other_base: the adapter was trained on other weights, as far as it records them, see [`other_base`].
    """

    base: str
    model_class: str
    dtype: torch.dtype
    layers: int
    full_parts: list[str]
    other_base: bool = False


def merge_adapter(
    adapter: str | Path,
    destination: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Merge a LoRA adapter into its base and write the plain architecture with its processor, tokenizer and code, as
    an export is: the auxiliary character head is left out.

    Merging happens in float32. One matrix `W + s B A` in place of two rounds otherwise than adapter and base do apart:
    outputs differ by 1e-5 or less in float32, more after rounding to a shorter `dtype`. What is written is exactly
    what was merged.

    Args:
        adapter: folder or Hub id. destination: must be missing or empty; appears when all is written.
        base: folder or Hub id in place of the recorded base.
        dtype: of the weights on disk; the base's by default.

    Raises:
        ValueError: no adapter there, another kind than LoRA, weights only as a pickle, no base there, a base that the
            adapter does not fit, `destination` not empty.
    """
    folder = find_adapter(adapter)
    settings = read_settings(folder)
    revision = settings.get("revision") if base is None else None
    base = settings.get("base_model_name_or_path") if base is None else str(base)
    if not base:
        raise ValueError(f"{adapter}: {CONFIG} names no base model; name one as the base.")
    with written_whole(destination) as staging:
        model, missing = load_base(base, revision, (settings.get("auto_mapping") or {}).get("base_model_class"))
        try:
            wrapped, full_parts = put_on(model, folder, missing)
        except ValueError as error:
            raise ValueError(f"{adapter} does not fit the base {base}: {error}") from error
        layers = sum(hasattr(module, "lora_A") for module in wrapped.modules())
        try:
            plain = wrapped.merge_and_unload(safe_merge=True)
        except ValueError as error:  # not a number after merging
            raise ValueError(f"{adapter}: {error}") from error
        if dtype is None:
            dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
        dtype = dtype or torch.float32
        try:
            processor = AutoProcessor.from_pretrained(base, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"{base}: no processor can be loaded from there: {_line(error)}") from error
        save_full(plain, processor, staging, dtype)
        copy_provenance(folder, staging)
    return Merged(str(base), type(plain).__name__, dtype, layers, full_parts, other_base(folder, base, revision))


def find_adapter(source: str | Path) -> Path:
    """The folder of an adapter; what the Hub has is fetched, its configuration and its safetensors alone.

    Raises:
        ValueError: none there, or its weights are only there as a pickle.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            hint = f"; did you mean {folder / ADAPTER}?" if (folder / ADAPTER / CONFIG).is_file() else ""
            raise ValueError(f"{source}: no adapter there (the folder has no {CONFIG}){hint}")
    elif not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        try:
            folder = Path(hf_hub_download(str(source), CONFIG)).parent
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(f"{source}: no such folder, and no adapter on the Hub: {_line(error)}") from error
        with suppress(OSError, HfHubHTTPError):  # adapters of before, and of others, have none
            hf_hub_download(str(source), FINGERPRINT, revision=folder.name)
        try:
            hf_hub_download(str(source), WEIGHTS, revision=folder.name)
        except (OSError, ValueError, HfHubHTTPError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise ValueError(f"{source}: no {WEIGHTS} there; a pickle is never opened.") from None
            raise ValueError(f"{source}: {WEIGHTS} cannot be fetched: {_line(error)}") from error
    else:
        raise ValueError(f"{source}: no such folder.")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"{source}: its weights are a pickle ({PICKLE}), which can run code and is never opened; save it "
                "again with safetensors."
            )
        raise ValueError(f"{source}: its weights are missing ({WEIGHTS}).")
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`.

    Raises:
        ValueError: not JSON, or another kind of adapter than LoRA.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON: {_line(error)}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise ValueError(f"{folder}: a LoRA adapter is needed, peft_type is {kind!r}.")
    if settings.get("megatron_config"):
        raise ValueError(f"{folder}: megatron_config names a module to import, which is refused.")
    return settings


def load_base(
    base: str, revision: str | None, model_class: str | None, **kept: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The base in float32, without the auxiliary head; and the names of its tensors that it does not hold.

    Args:
        model_class: of the model that the adapter was trained in; a UNIT model is loaded with its vision decoder when
            either has one.
        kept: `num_character_classes`, of a model that keeps the auxiliary head.

    Raises:
        ValueError: there is none, or it is neither UNIT nor LLaVA.
    """
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(f"{base}: the base model is not there (any more); name where it is as the base.")
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{base}: the base model cannot be found: {_line(error)}") from error
    auto, changes = AutoModelForImageTextToText, {}
    if config.model_type == "unit":
        changes = {"num_character_classes": 0} | kept
        if UnitForPreTraining.__name__ in (model_class, *(config.architectures or [])):
            auto = AutoModelForPreTraining
    elif config.model_type != "llava":
        raise ValueError(f"{base}: the base must be a UNIT or LLaVA model, it is {config.model_type!r}.")
    try:
        model, report = auto.from_pretrained(
            base,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **changes,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{base}: the base model cannot be loaded: {_line(error)}") from error
    model.config.dtype = config.dtype
    return model.eval(), sorted(report["missing_keys"])


def go_on_with(model: PreTrainedModel, source: str | Path) -> nn.Module:
    """The model with an adapter on it that goes on training, as [`add_lora`] of `training/lora.py` gives one. Parts
    that train in full and that the adapter does not bring start from the model's own.

    Raises:
        ValueError: no adapter there, or one that does not fit.
    """
    folder = find_adapter(source)
    read_settings(folder)
    try:
        return put_on(model, folder, trainable=True)[0]
    except ValueError as error:
        raise ValueError(f"lora.adapter {source} does not fit the start: {error}") from error


def check_continued(source: str | Path, start: str | Path | None) -> None:
    """Whether an adapter that a run is to go on with belongs on its start.

    Raises:
        ValueError: no start, or other weights than the adapter was trained on, as far as it records them.
    """
    folder = find_adapter(source)
    base = read_settings(folder).get("base_model_name_or_path")
    if start is None:
        raise ValueError(f"lora.adapter {source} needs `start`, the model it was trained on; it names {base}.")
    if other_base(folder, start):
        raise ValueError(f"lora.adapter {source} was trained on other weights than {start} holds; it names {base}.")


def merged_on_base(folder: Path, base: str, revision: str | None, model_class: str, **changes: Any) -> PreTrainedModel:
    """Base in float32 and adapter as one plain model. changes: of the base's configuration, see [`load_base`]."""
    model, missing = load_base(base, revision, model_class, **changes)
    return put_on(model, folder, missing)[0].merge_and_unload()


def put_on(
    model: PreTrainedModel, folder: Path, missing: list[str] = (), trainable: bool = False
) -> tuple[nn.Module, list[str]]:
    """The model with the adapter on it, every tensor of which has found its place; the parts that came whole.

    Args:
        missing: names of tensors that the base did not hold: the adapter must bring them.
        trainable: the adapter goes on training, and every part of `FULL_PARTS` beside it.

    Raises:
        ValueError: the adapter is of another architecture, width, depth or connector; damaged weights.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            keys = list(file.keys())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{WEIGHTS} is damaged: {_line(error)}") from error
    absent = tuple(f"{PREFIX}{name}." for name in DISPENSABLE if not hasattr(model, name))
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(absent)} if absent else tensors
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG} makes no sense to peft: {_line(error)}") from error
    # peft insists on weights of every module listed that the base has
    listed = [name for name in config.modules_to_save or [] if any(f".{name}." in key for key in tensors)]
    if trainable:
        for name in FULL_PARTS:
            if name not in listed and hasattr(model, name):
                own = getattr(model, name).state_dict()
                tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in own.items()}
                listed.append(name)
    config.modules_to_save, config.inference_mode = listed or None, not trainable
    config.base_model_name_or_path = None  # it may be another folder now, which peft would warn of
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, for what peft asks of it
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta")  # of a rehearsal without weights
            wrapped = get_peft_model(model, config)
            result = set_peft_model_state_dict(wrapped, tensors)
    except KeyError as error:
        raise ValueError(f"the adapter has no weights for {error.args[0].removeprefix(PREFIX)}.") from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(_mismatch(error)) from None
    lacking = [key for key in result.missing_keys if "lora_" in key or ".modules_to_save." in key]
    for keys, what in ((lacking, "the adapter has no weights for"), (result.unexpected_keys, "the base has no")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{what} {sorted(keys)[0].removeprefix(PREFIX)}{more}.")
    brought = {key.removeprefix(PREFIX) for key in tensors}
    unknown = [key for key in missing if key not in brought]
    if unknown:
        raise ValueError(f"neither the base nor the adapter holds {unknown[0]}.")
    return wrapped, listed


def _mismatch(error: Exception) -> str:
    """What torch and peft say about a model of another shape, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sizes = [line for line in lines if line.startswith("size mismatch")]
    return sizes[0].replace(PREFIX, "") if sizes else (lines or [type(error).__name__])[0]


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
