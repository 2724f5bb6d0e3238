"""The released UNIT checkpoints: their tensor names, their `config.json`, and a check that every key is accounted for.

A released folder holds `config.json` (everything under `args`, besides `version`; no `model_type`) and safetensors,
one file or several with `model.safetensors.index.json`. [code] is the inference code that UNIT's authors released.

`UnitVisionModel.from_pretrained` loads such a folder as it is; `unit convert` rewrites it as ours, and back.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_unit import UnitVisionConfig

PREFIX = "unit_model."
MEAN, STD = PREFIX + "input_conditioner.norm_mean", PREFIX + "input_conditioner.norm_std"
_PATCHES = PREFIX + "model.patch_generator."

# Released name -> ours, `{i}` a block, `.*` weight and bias. The statistics of the input conditioner become
# `image_mean` and `image_std` of the configuration and are the only tensors that change their place.
NAMES = {
    _PATCHES + "embedder.weight": "embeddings.projection.weight",
    _PATCHES + "pos_embed": "embeddings.position_embedding",
    _PATCHES + "cls_token.token": "embeddings.prefix_tokens",
    PREFIX + "model.blocks.{i}.norm1.*": "blocks.{i}.norm1.*",
    PREFIX + "model.blocks.{i}.attn.qkv.*": "blocks.{i}.attn.qkv.*",
    PREFIX + "model.blocks.{i}.attn.proj.*": "blocks.{i}.attn.proj.*",
    PREFIX + "model.blocks.{i}.norm2.*": "blocks.{i}.norm2.*",
    PREFIX + "model.blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.fc1.*",
    PREFIX + "model.blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.fc2.*",
    PREFIX + "model.norm.*": "norm.*",
    PREFIX + "model.fc_norm.*": "fc_norm.*",
}

# The same for transformers' `from_pretrained(key_mapping=...)`, which takes regular expressions
KEY_MAPPING = {
    "^" + re.escape(theirs).partition(r"\{i\}")[0].removesuffix(r"\*"): ours.partition("{i}")[0].removesuffix("*")
    for theirs, ours in NAMES.items()
}

# `args.model` names the shape. Widths, depths and heads of `vit_*` are the field's own (ViT, arXiv 2010.11929, DeiT,
# arXiv 2012.12877); the released checkpoints are vit_huge_patch14_224 and vit_huge_patch14_224_1B, 50 layers [code].
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
SIZES |= {"huge": (1280, 32, 16)}
_MODEL = re.compile(r"vit_(tiny|small|base|large|huge)_patch([1-9]\d*)_([1-9]\d*)(_1B)?")
KNOWN_MODELS = (
    "vit_huge_patch14_224 (UNIT-600M), vit_huge_patch14_224_1B (UNIT-1B), and the pattern "
    "vit_{tiny,small,base,large,huge}_patch{patch}_{side}"
)

# What decides the output at evaluation and stands in `args` or in the shapes; `shape_of_name` and `_prefix` below
_SAID_BY_ARGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
_SAID_BY_ARGS += ("image_size", "cpe_max_size", "num_prefix_tokens", "use_final_norm", "keep_fc_norm")
# What the format has no word for: its readers assume these values [code]
_ASSUMED = {"num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What `from_pretrained` may be told about where a checkpoint lies
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar")


class CheckpointError(ValueError):
    """A folder is not the checkpoint it should be. The message is one line: what is wrong, and what to do."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: `dtype` as safetensors writes it, where its bytes `[begin, end)` lie."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


# -- reading a folder ------------------------------------------------------------------------------


def refuse_pickle(path: Path) -> None:
    """Raise for a file whose reading can run code of whoever made it."""
    raise CheckpointError(
        f"{path}: a pickle, which can run code when it is read, is not opened; write it as safetensors where you "
        'trust it: safetensors.torch.save_file(torch.load(PATH, weights_only=True), "model.safetensors").'
    )


def read_config(folder: Path) -> tuple[str, dict]:
    """The text of `config.json`, and what it says.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no checkpoint there (no config.json).") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(config).__name__}.")
    return text, config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or those that its index names.

    Raises:
        CheckpointError: there are none, or a file is missing; a folder with pickled weights alone is refused.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            refuse_pickle(pickled[0])
        raise CheckpointError(f"{folder}: no weights there (no model.safetensors, no model.safetensors.index.json).")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: must hold an object with a weight_map ({error}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}, which is no safetensors file of this folder.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing, which the index names; download it again.")
    if not names:
        raise CheckpointError(f"{index}: the weight_map is empty.")
    return [folder / name for name in names]


def check_format(folder: Path) -> None:
    """Raise `CheckpointError` for a folder whose `config.json` is of no format known here: transformers would take
    every default, and random weights with a warning."""
    if (folder / "config.json").is_file() and "model_type" not in read_config(folder)[1]:
        raise CheckpointError(
            f"{folder}: config.json is neither UNIT's (model_type) nor the released one (args, a dict)."
        )


def check_index(folder: Path) -> None:
    """Raise `CheckpointError` for an index that `from_pretrained` cannot take though it names every file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "metadata" not in json.loads(index.read_text(encoding="utf-8")):
        raise CheckpointError(
            f"{index}: has no metadata, which transformers asks for; convert it first: unit convert {folder} FOLDER."
        )


def read_entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Every tensor of the files by its name, from their headers alone.

    Raises:
        CheckpointError: a file is damaged, or two hold the same name.
    """
    entries: dict[str, TensorEntry] = {}
    for path in files:
        try:
            with safe_open(path, "pt"):  # checks that the header is sound and covers the file to its last byte
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged, download or write it again ({error}).") from error
        header.pop("__metadata__", None)
        for name, said in header.items():
            if name in entries:
                raise CheckpointError(f"{path}: holds {name}, and so does {entries[name].file.name}.")
            begin, end = (8 + length + offset for offset in said["data_offsets"])
            entries[name] = TensorEntry(said["dtype"], tuple(said["shape"]), path, begin, end)
    return entries


def read_statistics(entries: Mapping[str, TensorEntry]) -> tuple[list[float], list[float], str]:
    """Mean and standard deviation of the input conditioner, and their dtype; a float64 holds each value exactly.

    Raises:
        CheckpointError: they are missing, of another shape than (3, 1, 1), or no numbers.
    """
    values = []
    for name in (MEAN, STD):
        entry = entries.get(name)
        if entry is None:
            raise CheckpointError(f"1 missing key: {name}; this is not the whole of a released checkpoint.")
        if entry.shape != (3, 1, 1) or entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{name} must be floats of shape (3, 1, 1), got {entry.dtype} {entry.shape}.")
        with safe_open(entry.file, "pt") as file:
            values.append(file.get_tensor(name).double().flatten().tolist())
    if not all(math.isfinite(value) for value in values[0]) or not all(0 < value < math.inf for value in values[1]):
        raise CheckpointError(f"{MEAN} and {STD} must be finite, the second above 0, got {values[0]}, {values[1]}.")
    if entries[MEAN].dtype != entries[STD].dtype:
        raise CheckpointError(f"{MEAN} is {entries[MEAN].dtype} and {STD} is {entries[STD].dtype}; they must agree.")
    return values[0], values[1], entries[MEAN].dtype


def released_folder(name_or_path, **hub) -> Path | None:
    """The folder of a checkpoint in the released format, fetched first if it is on the Hub; `None` for any other.

    Args:
        hub: `revision`, `cache_dir`, `subfolder` and so on, as `transformers.utils.cached_file` takes them.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        path = folder / hub.get("subfolder", "") / "config.json"
    else:
        path = _fetched(name_or_path, "config.json", hub)
    try:
        config = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # transformers says what it thinks of it
    if not isinstance(config, dict) or not is_released(config):
        return None
    if not folder.is_dir() and _fetched(name_or_path, "model.safetensors", hub) is None:
        index = _fetched(name_or_path, "model.safetensors.index.json", hub)
        if index is not None:
            get_checkpoint_shard_files(str(name_or_path), index, **hub)
    return Path(path).parent


def _fetched(repository, name: str, hub: dict) -> str | None:
    """A file of a repository in the cache, or `None` where it has none."""
    try:
        return cached_file(str(repository), name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError:
        return None


def read_released(folder: Path) -> tuple[UnitVisionConfig, dict[str, TensorEntry], dict]:
    """Our configuration of a released folder, its tensors, and its `config.json`, all of it checked.

    Raises:
        CheckpointError: something is missing, unknown, of a wrong shape, or contradicts the rest.
    """
    text, released = read_config(folder)
    entries = read_entries(weight_files(folder))
    try:
        config = config_from_released(released, text, entries, read_statistics(entries))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    check_released(config, entries, folder)
    return config, entries, released


def check_released(config: UnitVisionConfig, entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Raise `CheckpointError` unless the tensors are exactly those that this encoder has in the released format."""
    expected = {name: shape for name, (_, shape) in tensor_names(config).items()}
    check_entries(entries, expected | {MEAN: (3, 1, 1), STD: (3, 1, 1)}, str(folder))


# -- names and shapes ------------------------------------------------------------------------------


def tensor_names(config: UnitVisionConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Released name -> our name and shape, for every tensor of an encoder but the input conditioner's."""
    width, mlp, side = config.hidden_size, config.intermediate_size, config.position_side
    shapes = {
        "projection.weight": (width, config.num_channels * config.patch_size**2),
        "position_embedding": (1, side * side, width),
        "prefix_tokens": (config.num_prefix_tokens, width),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "mlp.fc1.weight": (mlp, width),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (width, mlp),
    }
    absent = set()
    if not config.use_final_norm:
        absent.add("norm.*")
    if not config.keep_fc_norm:
        absent.add("fc_norm.*")
    table = {}
    for theirs, ours in NAMES.items():
        if ours in absent:
            continue
        for block in range(config.num_hidden_layers) if "{i}" in ours else (None,):
            for kind in ("weight", "bias") if ours.endswith("*") else (None,):
                names = [name.replace("{i}", str(block)) for name in (theirs, ours)]
                names = [name.replace("*", kind) if kind else name for name in names]
                tail = next((tail for tail in shapes if names[1].endswith("." + tail)), None)
                table[names[0]] = (names[1], shapes[tail] if tail else (width,))
    return table


def check_entries(entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise unless the tensors are exactly the expected ones.

    Args:
        expected: name -> shape. what: names the checkpoint in the message.

    Raises:
        CheckpointError: keys are missing, keys are unknown, or shapes are wrong; all of them in one line.
    """
    wrong = []
    missing, unknown = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if missing:
        wrong.append(f"{_count(missing, 'missing key')}: {_listed(missing)}")
    if unknown:
        wrong.append(f"{_count(unknown, 'unknown key')}: {_listed(unknown)}")
    shaped = sorted(name for name in expected.keys() & entries.keys() if entries[name].shape != tuple(expected[name]))
    if shaped:
        said = [f"{name} is {entries[name].shape} and should be {tuple(expected[name])}" for name in shaped]
        wrong.append(f"{_count(shaped, 'wrong shape')}: {_listed(said)}")
    if wrong:
        raise CheckpointError(f"{what}: {'; '.join(wrong)}. The shapes follow from config.json; check both.")


def _count(items: list, what: str) -> str:
    return f"{len(items)} {what}{'s' if len(items) != 1 else ''}"


def _listed(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


# -- configuration ---------------------------------------------------------------------------------


def is_released(config: Mapping) -> bool:
    """Whether this is the `config.json` of a released checkpoint: everything under `args`, no `model_type` [code]."""
    return isinstance(config.get("args"), dict) and "model_type" not in config


def _shape_of_name(model) -> dict[str, int]:
    """`args.model` to settings of `UnitVisionConfig`."""
    found = _MODEL.fullmatch(model) if isinstance(model, str) else None
    if not found or (found[4] and found[1] != "huge"):
        raise CheckpointError(f"config.json: args.model {model!r} is unknown. Known are {KNOWN_MODELS}.")
    width, layers, heads = SIZES[found[1]]
    return {
        "hidden_size": width,
        "num_hidden_layers": 50 if found[4] else layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "patch_size": int(found[2]),
        "image_size": int(found[3]),
    }


def _name_of_shape(config: UnitVisionConfig) -> str:
    """The other way round."""
    for size, (width, layers, heads) in [*SIZES.items(), ("huge", (1280, 50, 16))]:
        shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
        if shape == (width, layers, heads, 4 * width):
            return f"vit_{size}_patch{config.patch_size}_{config.image_size}" + ("_1B" if layers == 50 else "")
    raise CheckpointError(
        f"The released format has no name for an encoder of width {config.hidden_size}, "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads and an MLP of "
        f"{config.intermediate_size}. Known are {KNOWN_MODELS}."
    )


def _class_tokens(args: Mapping, multiple: int | None, prefix: int) -> int:
    """Class tokens among the `prefix` rows of `cls_token.token`; the rest are registers.

    One for each distinct teacher where `cls_token_per_teacher` says so, else one. Where `args` have neither, the rows
    decide: all of them without registers; with registers any number fits that leaves at least one register and less
    than a whole multiple more, and the smallest is taken: the output is the first token and the patches in any case.
    """
    teachers = args["teachers"] if isinstance(args.get("teachers"), list) else []
    if args.get("cls_token_per_teacher") and teachers:
        return len({str(teacher.get("name") if isinstance(teacher, dict) else teacher) for teacher in teachers})
    if "cls_token_per_teacher" in args and not args["cls_token_per_teacher"]:
        return 1
    return max(1, prefix - multiple) if multiple else max(1, prefix)


def config_from_released(
    released: Mapping, text: str, entries: Mapping[str, TensorEntry], conditioner: tuple[list[float], list[float], str]
) -> UnitVisionConfig:
    """Our configuration of a released checkpoint.

    Args:
        released: their `config.json`; text: the same, word for word: kept in `config.released`, so that every argument
            that means nothing to us is there again on the way back.
        entries: the tensors: they have the number of prefix tokens and the name of the final norm.
        conditioner: as `read_statistics` returns them.

    Raises:
        CheckpointError: `args` lack something, name an unknown model, or contradict the tensors.
    """
    args = released["args"]
    shape = _shape_of_name(args.get("model"))
    cpe_max_size, multiple, pooling = args.get("cpe_max_size"), args.get("register_multiple") or None, args.get("gp")
    for name, value in (("cpe_max_size", cpe_max_size), ("register_multiple", multiple or 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: args.{name} must be a positive whole number, got {value!r}.")
    if pooling not in ("token", "avg", "", None):
        raise CheckpointError(f'config.json: args.gp must be "token" or "avg", got {pooling!r}.')
    # with "avg" the norm is called fc_norm, and the forward pass does not apply that one [code]
    unapplied = pooling == "avg" if pooling else PREFIX + "model.fc_norm.weight" in entries
    mean, std, dtype = conditioner
    tokens = entries.get(_PATCHES + "cls_token.token")
    prefix = tokens.shape[0] if tokens and tokens.shape else 1
    config = UnitVisionConfig(
        **shape,
        cpe_max_size=cpe_max_size,
        num_cls_tokens=_class_tokens(args, multiple, prefix),
        register_multiple=multiple,
        use_final_norm=not unapplied,
        keep_fc_norm=unapplied,
        normalize_pixels=True,
        image_mean=mean,
        image_std=std,
        released={"config": text, "statistics_dtype": dtype},
    )
    return _carried_config(released, config) if "unit" in released else config


def _carried_config(released: Mapping, said: UnitVisionConfig) -> UnitVisionConfig:
    """The configuration of ours that `released_from_config` put into their `config.json`, if it still fits."""
    try:
        carried = UnitVisionConfig.from_dict(json.loads(released["unit"]["config"]))
    except Exception as error:  # wrong types are told by exceptions of huggingface_hub's own
        raise CheckpointError(f"config.json: the entry `unit` is damaged; remove it ({error}).") from error
    differing = _differing(carried, said)
    # compared as the encoder's own buffers hold them: float32
    if not torch.equal(torch.tensor(statistics(carried)), torch.tensor(statistics(said))):
        differing.append("the input conditioner")
    if differing:
        raise CheckpointError(
            f"config.json: the entry `unit` disagrees with the rest about {', '.join(differing)}; remove it."
        )
    return carried


def _differing(one: UnitVisionConfig, other: UnitVisionConfig) -> list[str]:
    names = (*_SAID_BY_ARGS, *_ASSUMED)
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def statistics(config: UnitVisionConfig) -> tuple[list[float], list[float]]:
    """Mean and standard deviation for the input conditioner of the released format: 0 and 1 to leave pixels alone."""
    if config.normalize_pixels:
        return list(config.image_mean), list(config.image_std)
    return [0.0] * config.num_channels, [1.0] * config.num_channels


def statistics_dtype(config: UnitVisionConfig) -> str:
    """The dtype that the statistics came in, if it still holds them exactly; else float32, as the encoder's own."""
    dtype = (config.released or {}).get("statistics_dtype", "F32")
    values = torch.tensor(statistics(config), dtype=torch.float64)
    exact = dtype in TORCH_DTYPES and torch.equal(values.to(TORCH_DTYPES[dtype]).double(), values)
    return dtype if exact else "F32"


def released_from_config(config: UnitVisionConfig, text: str) -> str:
    """The text of `config.json` in the released format.

    For an encoder that came from there it is the one it came with, word for word. For one of ours `args` are written
    anew. What the format has no place for, such as the statistics of training crops, goes along as an entry `unit`
    that its readers pass over: our own `config.json`, word for word, so that nothing is lost on the way back.

    Args:
        text: our `config.json`.

    Raises:
        CheckpointError: the format cannot say what this encoder computes.
    """
    for name, assumed in _ASSUMED.items():
        if getattr(config, name) != assumed:
            raise CheckpointError(
                f"The released format cannot say {name}={getattr(config, name)!r}; it assumes {assumed!r}."
            )
    if config.use_final_norm == config.keep_fc_norm:
        raise CheckpointError(
            "The released format has exactly one of norm (use_final_norm) and fc_norm (keep_fc_norm), and this "
            f"encoder has {'both' if config.use_final_norm else 'neither'}."
        )
    kept = (config.released or {}).get("config")
    if kept is None:
        several = range(config.num_cls_tokens) if config.num_cls_tokens > 1 else ()
        args = {
            "model": _name_of_shape(config),
            "cpe_max_size": config.cpe_max_size,
            "register_multiple": config.register_multiple or 0,
            "cls_token_per_teacher": bool(several),
            "teachers": [{"name": f"class_token_{index}"} for index in several],
            "gp": "avg" if config.keep_fc_norm else "token",
        }
        return _json({"args": args, "version": "unit-vision", "unit": {"config": text}})
    try:
        released = json.loads(kept)
        released.pop("unit", None)
        nowhere = {name: TensorEntry("F32", shape, Path(), 0, 0) for name, (_, shape) in tensor_names(config).items()}
        said = config_from_released(released, kept, nowhere, (*statistics(config), statistics_dtype(config)))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"config.json: the released configuration kept under `released` is damaged; remove it ({error})."
        ) from error
    differing = _differing(config, said)
    if differing:
        raise CheckpointError(
            f"config.json: {', '.join(differing)} changed since this encoder came from a released checkpoint; remove "
            "`released` from config.json to have the arguments written anew."
        )
    if _meaning(config) == _meaning(said):
        return kept
    return _json(released | {"unit": {"config": text}})


def _meaning(config: UnitVisionConfig) -> dict:
    """The configuration without what saving and loading write into it."""
    written = ("transformers_version", "dtype", "architectures", "auto_map", "_name_or_path", "released")
    return {name: value for name, value in config.to_dict().items() if name not in written}


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
