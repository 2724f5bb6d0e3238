"""Where an encoder's weights come from, and how it is saved again: checkpoints of transformers, UNIT's own, OpenCLIP.

What differs from architecture to architecture stands in `architectures_unit.py`.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .architectures_unit import FULL_MODELS, architecture, known_architecture
from .configuration_unit import UnitConfig, UnitVisionConfig
from .encoder_unit import UnitVisionModel

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OPENCLIP_WEIGHTS, OPENCLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# Width of one attention head where it is not OpenCLIP's usual 64: ViT-H, ViT-g and ViT-bigG, by width of the tokens
OPENCLIP_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}

# -- where the weights come from ----------------------------------------------------------------------------------


@dataclass
class VisionSource:
    """An encoder somewhere, found and checked, not loaded yet.

    Args:
        where: as it was named. config: the encoder's configuration.
        image_settings: `patch_size`, `base_size`, `image_mean`, `image_std`, `do_normalize` of the
            [`UnitImageProcessor`] that suits it, or all settings of the one saved beside it.
        load: `dtype -> encoder`, in evaluation mode.
    """

    where: str
    config: PreTrainedConfig
    load: Callable[[torch.dtype | None], PreTrainedModel]
    image_settings: dict[str, Any] = field(default_factory=dict)


def find_vision_source(
    source: str | Path | VisionSource,
    hidden_act: str | None = None,
    num_attention_heads: int | None = None,
    **hub,
) -> VisionSource:
    """Look at a folder, a file or a Hub id and say which encoder it holds. No code of a repository is run, no pickle
    is read.

    Args:
        source: one of
            - a checkpoint of transformers of an architecture in `ARCHITECTURES`, or of one that has such an encoder
              inside (`clip`, `siglip`, `siglip2`, `unit`);
            - UNIT's encoder;
            - OpenCLIP weights in safetensors: the file, or a folder or repository with `open_clip_model.safetensors`
              (and `open_clip_config.json`). See [`openclip_vision_config`].
            - what this function returned.
        hidden_act, num_attention_heads: of OpenCLIP weights, where the file does not say: `"quick_gelu"` for OpenAI's.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as `from_pretrained` takes them.

    Raises:
        ValueError: nothing there, an architecture outside of the table, weights only as a pickle, a width that is no
            multiple of the heads.
    """
    if isinstance(source, VisionSource):
        return source
    where, path = str(source), Path(source)
    if path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir()):
        _refuse_pickle(path)
        if not path.is_file():
            raise ValueError(f"There is no file {where}.")
        return _openclip_source(where, path, path.parent / OPENCLIP_CONFIG, hidden_act, num_attention_heads)
    settings = _json_file(where, "config.json", hub)
    if settings is None or "model_type" not in settings:
        found = _openclip_file(where, hub)
        if found is not None:
            beside = cached_file(where, OPENCLIP_CONFIG, _raise_exceptions_for_missing_entries=False, **hub)
            return _openclip_source(where, found, beside, hidden_act, num_attention_heads)
        _refuse_strange_folder(where, settings)
    if hidden_act is not None or num_attention_heads is not None:
        raise ValueError(
            f"{where}: its config.json states the activation and the heads; hidden_act and num_attention_heads are "
            "for OpenCLIP weights."
        )
    return _transformers_source(where, settings, hub)


def find_model_type(source: str | Path, **hub) -> str | None:
    """`model_type` of a folder or Hub id, `None` for a file and where no `config.json` states one."""
    if Path(source).is_file():
        return None
    return (_json_file(str(source), "config.json", hub) or {}).get("model_type")


def _refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is read, and is refused. Load it where you trust it "
            "and save the tensors with safetensors.torch.save_file."
        )


def _refuse_strange_folder(where: str, settings: dict | None) -> None:
    """A folder or repository without a `config.json` of transformers, and without OpenCLIP weights."""
    folder = Path(where)
    if settings is not None and "args" in settings:
        raise ValueError(
            f"{where} is a checkpoint in the format of the released UNIT weights: convert it first (`unit convert`)."
        )
    if settings is not None:
        raise ValueError(f"{where}: config.json has no model_type, and there is no {OPENCLIP_WEIGHTS} beside it.")
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            _refuse_pickle(file)
    raise ValueError(
        f"{where}: neither config.json nor OpenCLIP weights ({OPENCLIP_WEIGHTS}) were found there. Name a folder, a "
        ".safetensors file or an id on the Hub."
    )


def _json_file(where: str, name: str, hub: dict) -> dict | None:
    """A JSON file of a folder or repository; `None` when it is not there."""
    try:
        found = cached_file(where, name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError as error:
        raise ValueError(f"{where} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    if found is None:
        return None
    try:
        content = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: {name} is not valid JSON ({error}).") from error
    return content if isinstance(content, dict) else None


def _transformers_source(where: str, settings: dict[str, Any], hub: dict) -> VisionSource:
    model_type = settings["model_type"]
    if model_type in FULL_MODELS:
        inside = settings.get("vision_config") or {}
        inside_type = inside.get("model_type", f"{model_type}_vision_model")
    else:
        inside, inside_type = settings, model_type
    entry = known_architecture(inside_type, where)
    _check_heads(where, inside)
    if entry.ours:
        config_class, encoder_class = UnitVisionConfig, UnitVisionModel
    else:
        encoder_class = getattr(transformers, entry.class_name, None)
        if inside_type not in CONFIG_MAPPING or encoder_class is None:
            raise ValueError(
                f"{where}: this version of transformers ({transformers.__version__}) lacks {inside_type}."
            )
        config_class = CONFIG_MAPPING[inside_type]
    if model_type == UnitConfig.model_type:
        config = UnitConfig.from_dict(settings).vision_config
    else:
        config = config_class.from_dict(inside)
    check_config(config)

    def load(dtype: torch.dtype | None) -> PreTrainedModel:
        special = FULL_MODELS.get(model_type)
        if special is not None:
            return special(where, dtype=dtype, **hub).eval()
        _require_safetensors(where)
        keywords = {"config": config, "dtype": dtype or "auto", "use_safetensors": True} | hub
        try:
            with _quiet():
                encoder, report = encoder_class.from_pretrained(where, output_loading_info=True, **keywords)
        except (OSError, RuntimeError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"{where}: the encoder cannot be loaded: {lines[0] if lines else error}") from error
        missing = sorted(name for name in report["missing_keys"] if not name.startswith(entry.unread or ("\0",)))
        if missing:
            raise ValueError(
                f"{where}: the weights lack {len(missing)} of the keys of {entry.class_name}: {_some(missing)}."
            )
        return encoder.eval()

    return VisionSource(where, config, load, image_settings(config, _preprocessing(where, hub)))


def _require_safetensors(where: str) -> None:
    folder = Path(where)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    for file in sorted(folder.iterdir()):
        _refuse_pickle(file)
    raise ValueError(f"{where}: there are no weights (*.safetensors) beside config.json.")


@contextmanager
def _quiet():
    """Without the report of every weight of a text tower that is left unread; what lacks is told apart below."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_heads(where: str, settings: dict[str, Any]) -> None:
    width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        raise ValueError(f"{where}: hidden_size ({width}) must be a multiple of num_attention_heads ({heads}).")


def check_config(config: PreTrainedConfig) -> None:
    """Raise `ValueError` for an encoder's configuration that UNIT cannot use."""
    architecture(config)
    if not isinstance(config.patch_size, int):
        raise ValueError(f"patch_size must be one whole number (square patches), got {config.patch_size!r}.")
    _check_heads(config.model_type, {key: getattr(config, key) for key in ("hidden_size", "num_attention_heads")})


# -- preprocessing ------------------------------------------------------------------------------------------------


def _preprocessing(where: str, hub: dict) -> dict[str, Any] | None:
    """The image processor's settings saved with a checkpoint, in either of the places where transformers keeps
    them."""
    nested = (_json_file(where, PROCESSOR, hub) or {}).get("image_processor")
    return nested or _json_file(where, PREPROCESSOR, hub)


def image_settings(config: PreTrainedConfig, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings of the [`UnitImageProcessor`] that brings images to an encoder as it is used to them.

    Args:
        config: the encoder's.
        saved: settings of the image processor that came with it, whichever class that is. Without them, the
            architecture's own defaults.

    Returns:
        `patch_size`; `base_size`, the side that the saved processor makes (without one, the nominal size), in whole
        patches; `image_mean`, `image_std`, with another rescaling than 1 / 255 folded in; `do_normalize`.
    """
    entry, saved = architecture(config), dict(saved or {})
    if saved.get("image_processor_type") == "UnitImageProcessor":
        plumbing = ("image_processor_type", "auto_map", "processor_class")
        return {key: value for key, value in saved.items() if key not in plumbing} | {"patch_size": config.patch_size}
    patch = config.patch_size
    side = _saved_side(saved) or _nominal_side(config)
    normalises_inside = getattr(config, "normalize_pixels", False)
    mean = saved.get("image_mean") or getattr(config, "image_mean", entry.image_mean)
    std = saved.get("image_std") or getattr(config, "image_std", entry.image_std)
    do_normalize = bool(saved.get("do_normalize", entry.do_normalize and not normalises_inside))
    # (x * factor - mean) / std = (x / 255 - mean / (255 factor)) / (std / (255 factor))
    factor = 255 * (saved.get("rescale_factor", 1 / 255) if saved.get("do_rescale", True) else 1.0)
    if math.isclose(factor, 1.0, rel_tol=1e-6):
        factor = 1.0
    elif not do_normalize:
        mean, std, do_normalize = (0.0,) * len(mean), (1.0,) * len(std), True
    return {
        "patch_size": patch,
        "base_size": max(1, side // patch) * patch,
        "image_mean": [value / factor for value in mean],
        "image_std": [value / factor for value in std],
        "do_normalize": do_normalize,
    }


def _saved_side(saved: dict[str, Any]) -> int | None:
    """Side in pixels of the square images that a saved image processor makes, `None` where it does not say."""
    if "max_num_patches" in saved and "patch_size" in saved:
        return math.isqrt(saved["max_num_patches"]) * saved["patch_size"]
    size = (saved.get("crop_size") if saved.get("do_center_crop", True) else None) or saved.get("size")
    if isinstance(size, int):
        return size
    if isinstance(size, (list, tuple)):
        return min(size)
    sides = [size[key] for key in ("height", "width", "shortest_edge") if size.get(key)] if size else []
    return min(sides) if sides else None


def _nominal_side(config: PreTrainedConfig) -> int:
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)):
        size = min(size)
    return size or math.isqrt(config.num_patches) * config.patch_size  # SigLIP2 counts patches, not pixels


def native_processor(config: PreTrainedConfig, image_processor: Any = None) -> dict[str, Any]:
    """`preprocessor_config.json` of transformers' own image processor for an encoder: the architecture's class (see
    `ARCHITECTURES`), readable with and without torchvision, by transformers 4 and 5.

    Args:
        image_processor: the [`UnitImageProcessor`] that the encoder was trained with: its mean, deviation and side
            are kept. The side is the nominal one where the class takes no other.
    """
    entry = architecture(config)
    settings = image_settings(config)
    if image_processor is not None:
        settings |= {key: getattr(image_processor, key) for key in ("base_size", "image_mean", "image_std")}
        settings["do_normalize"] = image_processor.do_normalize
    side = _nominal_side(config) if entry.fixed_size else settings["base_size"]
    normalisation = {key: settings[key] for key in ("do_normalize", "image_mean", "image_std")}
    return entry.native_processor(config, side, normalisation)


# -- OpenCLIP -----------------------------------------------------------------------------------------------------


def _openclip_file(where: str, hub: dict) -> Path | None:
    """The OpenCLIP weights of a folder or repository: `open_clip_model.safetensors`, or a folder's only safetensors
    file that holds `visual.*`."""
    found = cached_file(where, OPENCLIP_WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub)
    if found is not None:
        return Path(found)
    files = sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else []
    return files[0] if len(files) == 1 and _is_openclip(_shapes(files[0])) else None


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a safetensors file, from its header alone."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error


def _is_openclip(shapes: dict[str, tuple[int, ...]]) -> bool:
    return any(name.startswith("visual.") for name in shapes)


def openclip_vision_config(
    shapes: dict[str, tuple[int, ...]], hidden_act: str = "gelu", num_attention_heads: int | None = None
) -> CLIPVisionConfig:
    """Configuration of the `CLIPVisionModel` that OpenCLIP's vision transformer is, from the shapes of its tensors.

    Args:
        shapes: name without `visual.` -> shape. Width from `conv1`, patch from its kernel, nominal size from
            `positional_embedding`, layers and MLP from `transformer.resblocks`.
        hidden_act: OpenCLIP's is `"gelu"`; models trained by OpenAI, and those that OpenCLIP calls `-quickgelu`, have
            `"quick_gelu"`. The tensors do not tell.
        num_attention_heads: `None` for a head width of 64 (B, L), 80 (H: width 1280), 88 (g: 1408), 104 (bigG: 1664).

    Raises:
        ValueError: naming keys that lack, that are too many or that have a strange shape.
    """
    start = "transformer.resblocks."
    layers = len({name.split(".")[2] for name in shapes if name.startswith(start)})
    wanted = {"conv1.weight", "class_embedding", "positional_embedding"}
    norms = {"ln_pre", "ln_post"} | {f"{start}{layer}.{norm}" for layer in range(layers) for norm in ("ln_1", "ln_2")}
    linear = {
        f"{start}{layer}.{name}" for layer in range(layers) for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    }
    wanted |= {f"{name}.{kind}" for name in norms | linear for kind in ("weight", "bias")}
    wanted |= {f"{start}{layer}.attn.in_proj_{kind}" for layer in range(layers) for kind in ("weight", "bias")}
    missing, extra = sorted(wanted - set(shapes)), sorted(set(shapes) - wanted - {"proj"})
    if missing or extra or not layers:
        raise ValueError(
            "These are not the weights of an OpenCLIP vision transformer (visual.conv1, visual.class_embedding, "
            "visual.transformer.resblocks.*, ...): "
            f"missing: {_some(missing) or 'none'}; not known: {_some(extra) or 'none'}. "
            "ResNets, timm trunks, attention pooling and layer scale are not supported."
        )
    width, _, patch, _ = shapes["conv1.weight"] if len(shapes["conv1.weight"]) == 4 else (0, 0, 0, 0)
    hidden = shapes[f"{start}0.mlp.c_fc.weight"][0]
    positions = shapes["positional_embedding"][0]
    side = math.isqrt(positions - 1)
    expected = {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": (side * side + 1, width),
    } | {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    for layer in range(layers):
        block = f"{start}{layer}."
        expected |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}mlp.c_fc.weight": (hidden, width),
            f"{block}mlp.c_fc.bias": (hidden,),
            f"{block}mlp.c_proj.weight": (width, hidden),
            f"{block}mlp.c_proj.bias": (width,),
        }
    wrong = sorted(name for name, shape in expected.items() if tuple(shapes[name]) != shape)
    if wrong:
        name = wrong[0]
        raise ValueError(f"visual.{name} has the shape {tuple(shapes[name])}, expected was {expected[name]}.")
    heads = num_attention_heads or max(1, width // OPENCLIP_HEAD_WIDTH.get(width, 64))
    _check_heads("OpenCLIP weights", {"hidden_size": width, "num_attention_heads": heads})
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=side * patch,
        hidden_act=hidden_act,
        layer_norm_eps=1e-5,  # torch's own, which OpenCLIP leaves
        projection_dim=shapes["proj"][1] if "proj" in shapes else width,
    )


def openclip_to_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of `CLIPVisionModel` from OpenCLIP's vision transformer, names without `visual.`:

    | OpenCLIP | CLIPVisionModel |
    |---|---|
    | `conv1.weight` | `embeddings.patch_embedding.weight` |
    | `class_embedding` | `embeddings.class_embedding` |
    | `positional_embedding` | `embeddings.position_embedding.weight` |
    | `ln_pre`, `ln_post` | `pre_layrnorm`, `post_layernorm` |
    | `transformer.resblocks.i.ln_1`, `.ln_2` | `encoder.layers.i.layer_norm1`, `.layer_norm2` |
    | `….attn.in_proj_weight`, `….attn.in_proj_bias` | `….self_attn.q_proj`, `k_proj`, `v_proj`: the thirds in order |
    | `….attn.out_proj` | `….self_attn.out_proj` |
    | `….mlp.c_fc`, `….mlp.c_proj` | `….mlp.fc1`, `….mlp.fc2` |
    | `proj` | left out: the projection to the text tower's space is no part of `CLIPVisionModel` |
    """
    outer = {
        "conv1.weight": "embeddings.patch_embedding.weight",
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    converted = {}
    for name, tensor in tensors.items():
        if name in outer:
            converted[outer[name]] = tensor
        elif name.startswith("transformer.resblocks."):
            layer, rest = name.removeprefix("transformer.resblocks.").split(".", 1)
            block = f"encoder.layers.{layer}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, third in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{block}.self_attn.{part}_proj.{kind}"] = third
            else:
                stem, kind = rest.rsplit(".", 1)
                converted[f"{block}.{inner[stem]}.{kind}"] = tensor
    return converted


def _openclip_source(
    where: str, file: Path, beside: str | Path | None, hidden_act: str | None, num_attention_heads: int | None
) -> VisionSource:
    shapes = _shapes(file)
    if not _is_openclip(shapes):
        raise ValueError(f"{where}: none of its keys begins with visual., as OpenCLIP's do: {_some(sorted(shapes))}.")
    settings: dict[str, Any] = {}
    if beside is not None and Path(beside).is_file():
        settings = json.loads(Path(beside).read_text(encoding="utf-8"))
    model, preprocessing = settings.get("model_cfg", {}), settings.get("preprocess_cfg", {})
    if hidden_act is None:
        hidden_act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    visual = {name.removeprefix("visual."): shape for name, shape in shapes.items() if name.startswith("visual.")}
    head_width = model.get("vision_cfg", {}).get("head_width")
    if num_attention_heads is None and head_width and "conv1.weight" in visual:
        num_attention_heads = visual["conv1.weight"][0] // head_width
    try:
        config = openclip_vision_config(visual, hidden_act, num_attention_heads)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

    def load(dtype: torch.dtype | None) -> PreTrainedModel:
        with safe_open(file, "pt") as tensors:
            read = {name: tensors.get_tensor(f"visual.{name}") for name in visual}
        encoder = CLIPVisionModel(config)
        encoder.load_state_dict(openclip_to_clip(read))
        return encoder.to(dtype or read["conv1.weight"].dtype).eval()

    saved = {"image_mean": preprocessing.get("mean"), "image_std": preprocessing.get("std")}
    saved["size"] = preprocessing.get("size")
    return VisionSource(where, config, load, image_settings(config, saved))


# -- saving -------------------------------------------------------------------------------------------------------


def merged(encoder: nn.Module) -> nn.Module:
    """The encoder without adapters: itself, or a copy with its LoRA layers merged into the plain ones."""
    if not any(hasattr(module, "get_base_layer") for module in encoder.modules()):
        return encoder
    encoder = copy.deepcopy(encoder)
    adapted = [name for name, module in encoder.named_modules() if hasattr(module, "get_base_layer")]
    for name in adapted:
        layer = encoder.get_submodule(name)
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(encoder.get_submodule(parent), last, layer.get_base_layer())
    return encoder


def save_encoder(
    encoder: nn.Module, directory: str | Path, image_processor: Any = None, max_shard_size: int | str | None = None
) -> Path:
    """Write an encoder alone. One of transformers' is saved as the plain class that it is, with no code of ours and
    with its own image processor: `AutoModel` and `AutoImageProcessor` load it, exactly equal. UNIT's own comes with
    its code.

    LoRA adapters are merged in the copy that is saved. The folder is written beside and then put in place, so that an
    interruption leaves what was there before; files of an earlier encoder in it are replaced.

    Args:
        image_processor: the [`UnitImageProcessor`] that the encoder was trained with.
        max_shard_size: of one file of weights, as in transformers, whose own choice is left by `None`.

    Raises:
        ValueError: when `directory` is a file.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"{directory} is a file; name a folder.")
    entry, encoder = architecture(encoder.config), merged(encoder)
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.absolute().parent / f".{directory.absolute().name}.{os.getpid()}"
    try:
        encoder.save_pretrained(beside, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        _put_prefix(beside, entry.saved_prefix)
        if entry.ours and image_processor is not None:
            image_processor.save_pretrained(beside)
        else:
            processor = native_processor(encoder.config, image_processor)
            (beside / PREPROCESSOR).write_text(json.dumps(processor, indent=2, sort_keys=True) + "\n")
        _put_in_place(beside, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return directory


def _put_prefix(folder: Path, prefix: str) -> None:
    """Name the weights as transformers 4 expects them of this class; 5 leaves the prefix away or not, depending on
    where it had read them, and understands both."""
    if not prefix:
        return
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if not all(name.startswith(prefix) for name in tensors):
            renamed = {name if name.startswith(prefix) else prefix + name: value for name, value in tensors.items()}
            save_file(renamed, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {
            name if name.startswith(prefix) else prefix + name: file for name, file in content["weight_map"].items()
        }
        index.write_text(json.dumps(content, indent=2))


def _put_in_place(beside: Path, directory: Path) -> None:
    if not directory.exists():
        beside.rename(directory)
        return
    written = {file.name for file in beside.iterdir()}
    for file in beside.iterdir():
        os.replace(file, directory / file.name)
    for stale in directory.glob("model*.safetensors*"):
        if stale.name not in written:
            stale.unlink()
