"""The encoder for other runtimes: an ONNX file for ONNX Runtime and a `torch.export` program, checked against torch.

Both take `pixel_values` `(batch, 3, height, width)`, float32, of any batch, height and width, and give
`last_hidden_state` `(batch, prefix + rows * cols, D)` and, where the encoder has one, `pooler_output` `(batch, D)`.
Height and width are multiples of the patch size; the `torch.export` program wants two patches a side at least.

Needs the extra `export` (onnx, onnxscript, onnxruntime); what it writes needs none of this project.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from modeling_unit.configuration_unit import PREFIX_TOKENS
from modeling_unit.features_unit import any_size

from .evaluation.report import markdown_table

NEEDS = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20  # first with Gelu; ONNX Runtime has it since 1.18
# Largest difference from torch that passes, as a share of the largest value in torch's output, float32 [ours]. Sums in
# another order differ by some 1e-6 in six layers; a wrong position or a missing norm by 1e-2 and more.
TOLERANCE = 1e-4
ATTENTION = "onnx_multi_head_attention"  # what the tracing calls the attention that becomes one ONNX operator
OUTPUTS = ("last_hidden_state", "pooler_output")


class MissingPackages(ImportError):
    """The packages of the extra `export` are not installed."""


class CannotExport(ValueError):
    """The encoder cannot be traced for dynamic sizes; the message is one line."""


class ExportMismatch(ValueError):
    """An exported file does not compute what torch computes; the message says which, where, and by how much."""


@dataclass
class Difference:
    """How far the exported files are from torch on one batch.

    Args:
        shape: of the pixels, `(batch, channels, height, width)`.
        onnx: largest absolute difference of ONNX Runtime, over all outputs.
        program: the same of the `torch.export` program, `None` where it takes no image that small.
        allowed: `TOLERANCE` times torch's largest absolute value, the smallest over the outputs.
    """

    shape: tuple[int, int, int, int]
    onnx: float
    program: float | None
    allowed: float

    @property
    def largest(self) -> float:
        return max(self.onnx, self.program or 0.0)


def check_packages() -> None:
    """
    Raises:
        MissingPackages: naming what is missing and what to install.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise MissingPackages(
            f"exporting needs {', '.join(missing)}: pip install 'unit-vision[export]' (or pip install "
            f"{' '.join(missing)})"
        )


class TraceableEncoder(nn.Module):
    """An encoder as a function of its pixels alone, positions fitted to any size: `(B, C, H, W)` to the tensors of
    `OUTPUTS`."""

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.encoder = encoder
        try:
            self.kwargs = any_size(encoder)
        except ValueError as error:
            raise CannotExport(f"{error}: that cannot be exported") from error

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.encoder(pixel_values, return_dict=True, **self.kwargs)
        return tuple(output[name] for name in OUTPUTS if output.get(name) is not None)


def _onnx_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """Attention, `(B, heads, T, d) -> (B, T, heads, d)`, as one operator of ONNX Runtime: its kernel never holds the
    whole matrix of weights. For tracing only: called as it is, it gives zeros."""
    if attention_mask is not None:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return attended.transpose(1, 2), None
    heads, width = query.shape[1], query.shape[3]
    # (B, heads, T, d) -> (B, T, heads * d), the layout that the operator takes
    rows = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]
    attended = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        rows,
        {"num_heads": heads, "scale": float(scaling if scaling is not None else width**-0.5)},
        dtype=query.dtype,
        shape=rows[0].shape,
        version=1,
    )
    return attended.unflatten(2, (heads, width)), None


@contextmanager
def _attention(encoder: PreTrainedModel, name: str) -> Iterator[None]:
    """The encoder with another attention for a while."""
    before = encoder.config._attn_implementation
    AttentionInterface.register(ATTENTION, _onnx_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    encoder.set_attn_implementation(name)
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of the exporters, which name packages that they would know as well."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(model: TraceableEncoder) -> torch.export.ExportedProgram:
    """The encoder as a program with dynamic batch, height and width."""
    config = model.encoder.config
    patch = config.patch_size
    example = torch.zeros(2, config.num_channels, 3 * patch, 5 * patch)
    shapes = {
        0: torch.export.Dim("batch", min=1),
        2: patch * torch.export.Dim("rows", min=2),
        3: patch * torch.export.Dim("cols", min=2),
    }
    with _sizes_stay_symbols(model.encoder):
        program = torch.export.export(model, (example,), dynamic_shapes={"pixel_values": shapes}, strict=False)
    (pixels,) = (node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0])
    fixed = [name for index, name in ((0, "batch"), (2, "height"), (3, "width")) if _fixed(pixels, index)]
    if fixed:
        raise CannotExport(f"its code fixes the {' and '.join(fixed)} when traced")
    return program


@contextmanager
def _sizes_stay_symbols(encoder: PreTrainedModel) -> Iterator[None]:
    """Steps around the places where transformers' encoders turn a symbolic size into a number or decide by it."""
    code = inspect.getmodule(type(encoder))
    with ExitStack() as stack:
        # several compare the grid with their table's only where nothing is traced
        stack.enter_context(mock.patch("torch.jit.is_tracing", return_value=True))
        if hasattr(code, "torch_int"):
            stack.enter_context(mock.patch.object(code, "torch_int", _whole))
        if encoder.config.model_type == "radio":
            embeddings = code.RadioPatchEmbeddings
            stack.enter_context(mock.patch.object(embeddings, "_interpolate_position_embedding", _radio_positions))
        yield


def _whole(value: float | torch.SymInt) -> int | torch.SymInt:
    return value if isinstance(value, torch.SymInt) else int(value)


def _radio_positions(self, input_dims: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """RADIO's positions of a grid, `(1, rows * cols, D)`: the table stretched to the longer side squared, the top-left
    corner of it. `self`: its patch embeddings."""
    rows, cols = input_dims
    longer = torch.sym_max(rows, cols)
    table = self.position_embedding.unflatten(1, (self.max_rows, self.max_cols)).permute(0, 3, 1, 2)
    grid = F.interpolate(table.float(), size=(longer, longer), mode="bilinear", align_corners=False)
    return grid[..., :rows, :cols].flatten(2).transpose(1, 2).to(dtype)


def _fixed(pixels: torch.fx.Node, index: int) -> bool:
    return isinstance(pixels.meta["val"].shape[index], int)


def export_onnx(encoder: PreTrainedModel, path: str | Path) -> None:
    """Write an encoder in evaluation mode, float32, on the CPU, as an ONNX file for ONNX Runtime.

    Weights beyond what one file may hold (2 GB) go to a second file beside it.

    Raises:
        CannotExport: it cannot be traced.
    """
    model = TraceableEncoder(encoder)
    names = _output_names(model)
    try:
        with torch.no_grad(), _quiet(), _attention(encoder, ATTENTION):
            program = torch.onnx.export(
                _trace(model),
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=names,
                verbose=False,
            )
    except Exception as error:  # the exporter raises what it likes
        raise CannotExport(_cannot(encoder, error)) from error
    program.model.metadata_props.update(
        {
            "model_type": encoder.config.model_type,
            "patch_size": str(encoder.config.patch_size),
            "prefix_tokens": str(PREFIX_TOKENS[encoder.config.model_type](encoder.config)),
        }
    )
    program.save(path)


def export_program(encoder: PreTrainedModel, path: str | Path) -> None:
    """Write an encoder as [`export_onnx`] takes it as a `torch.export` program (`.pt2`).

    Raises:
        CannotExport: it cannot be traced.
    """
    model = TraceableEncoder(encoder)
    try:
        with torch.no_grad(), _quiet(), _attention(encoder, "sdpa"):
            program = _trace(model)
    except Exception as error:
        raise CannotExport(_cannot(encoder, error)) from error
    program.example_inputs = None  # they would be written as a pickle, and nothing needs them
    with _quiet():
        torch.export.save(program, path)


def _cannot(encoder: PreTrainedModel, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (
        f"an encoder of the architecture {encoder.config.model_type} cannot be traced with dynamic height and width "
        f"by torch {torch.__version__}: {lines[0]}"
    )


@torch.no_grad()
def _output_names(model: TraceableEncoder) -> list[str]:
    patch = model.encoder.config.patch_size
    given = model(torch.zeros(1, model.encoder.config.num_channels, 2 * patch, 2 * patch))
    return list(OUTPUTS[: len(given)])


def session(path: str | Path, spinning: bool = True):
    """An ONNX Runtime session on the CPU with as many threads as torch has.

    Args:
        spinning: its threads wait for the next run awake, which is faster, and takes the time of others.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.log_severity_level = 4  # what goes wrong is raised; the log repeats it
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_shapes(config: Any) -> list[tuple[int, int, int, int]]:
    """Shapes that an export is checked at: one patch, the nominal size, wide, high, a batch, beyond the table of
    positions; none of them the one that was traced, none with more tokens than the nominal size has by much."""
    patch, channels = config.patch_size, config.num_channels
    nominal = min(getattr(config, "image_size", None) or 16 * patch, 24 * patch) // patch
    # The table of ours covers `cpe_max_size`, theirs the nominal size; a strip outgrows it with few tokens.
    side = getattr(config, "position_side", nominal)
    grids = [(1, 1, 1), (1, nominal, nominal), (1, 2, 7), (2, 9, 4), (3, 4, 6), (1, 2, side + 3), (1, side + 1, 2)]
    return [(batch, channels, rows * patch, cols * patch) for batch, rows, cols in grids]


@torch.no_grad()
def compare(
    encoder: PreTrainedModel,
    onnx_path: str | Path,
    program_path: str | Path,
    shapes: Sequence[tuple[int, int, int, int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Run the files and the encoder on the same random pixels.

    Raises:
        ExportMismatch: they differ by more than `TOLERANCE`, or a file does not take a size.
    """
    model = TraceableEncoder(encoder)
    names = _output_names(model)
    shapes = check_shapes(encoder.config) if shapes is None else shapes
    runtime = session(onnx_path)
    with _quiet():
        program = torch.export.load(program_path).module()
    found = []
    for index, shape in enumerate(shapes):
        if progress is not None:
            progress(index, len(shapes))
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        expected = [output.numpy() for output in model(pixels)]
        runs = {"ONNX Runtime": lambda pixels=pixels: runtime.run(names, {"pixel_values": pixels.numpy()})}
        if min(shape[2:]) >= 2 * encoder.config.patch_size:
            runs["torch.export"] = lambda pixels=pixels: [output.numpy() for output in program(pixels)]
        worst = {name: _compare_one(name, run, names, expected, shape) for name, run in runs.items()}
        allowed = TOLERANCE * min(float(np.abs(one).max()) for one in expected)
        found.append(Difference(shape, worst["ONNX Runtime"], worst.get("torch.export"), allowed))
    if progress is not None:
        progress(len(shapes), len(shapes))
    return found


def _compare_one(runtime: str, run: Callable, names: list[str], expected: list[np.ndarray], shape: tuple) -> float:
    """Largest absolute difference over the outputs."""
    batch, _, height, width = shape
    where = f"{runtime} at batch {batch}, {height} x {width} pixels"
    try:
        given = run()
    except Exception as error:  # runtimes raise what they like
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise ExportMismatch(f"{where}: does not run ({reason})") from error
    largest = 0.0
    for name, one, other in zip(names, given, expected, strict=True):
        if one.shape != other.shape:
            raise ExportMismatch(f"{where}: {name} has the shape {one.shape}, torch gives {other.shape}")
        difference, allowed = float(np.abs(one - other).max()), TOLERANCE * float(np.abs(other).max())
        if not difference <= allowed:  # put so that NaN fails
            raise ExportMismatch(
                f"{where}: {name} differs from torch by {difference:.2g}, allowed are {allowed:.2g} "
                f"({TOLERANCE:g} of the largest value)"
            )
        largest = max(largest, difference)
    return largest


def export_encoder(
    encoder: PreTrainedModel,
    processor: Any,
    destination: str | Path,
    name: str = "encoder",
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Write a folder with `model.onnx`, `model.pt2`, `config.json`, `preprocessor_config.json` and `README.md`.

    Written beside the destination and renamed when it has been checked: after an error there is nothing.

    Args:
        encoder: `UnitVisionModel` or a vision transformer of transformers, in float32.
        processor: its image processor, or `None`.
        destination: a folder that is not there yet, or is empty.
        name: of the model, for the README.
        progress: called with checks done and checks in all.

    Raises:
        MissingPackages, CannotExport, ExportMismatch: which see.
        FileExistsError: there is something at `destination`.
    """
    check_packages()
    destination = Path(destination)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} is there already; name a folder that is not")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {destination.absolute().parent}")
    encoder = encoder.eval().float().cpu()
    temporary = destination.absolute().with_name(f".{destination.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        export_onnx(encoder, temporary / "model.onnx")
        export_program(encoder, temporary / "model.pt2")
        with _attention(encoder, "sdpa"):
            found = compare(encoder, temporary / "model.onnx", temporary / "model.pt2", progress=progress)
        _write_settings(encoder.config.to_json_string(use_diff=False), temporary / "config.json")
        if processor is not None:
            _write_settings(processor.to_json_string(), temporary / "preprocessor_config.json")
        (temporary / "README.md").write_text(readme(encoder.config, processor, name, found), encoding="utf-8")
        if destination.exists():
            destination.rmdir()
        temporary.replace(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _write_settings(settings: str, path: Path) -> None:
    """JSON without what points to code or folders: neither goes along."""
    kept = {key: value for key, value in json.loads(settings).items() if key not in ("auto_map", "_name_or_path")}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def difference_table(found: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a size each, how far either file is from torch."""
    rows = []
    for one in found:
        batch, _, height, width = one.shape
        program = "-" if one.program is None else f"{one.program:.1e}"
        rows.append([str(batch), f"{height} x {width}", f"{one.onnx:.1e}", program, f"{one.allowed:.1e}"])
    return ["batch", "height x width", "ONNX Runtime", "torch.export", "allowed"], rows


def readme(config: Any, processor: Any, name: str, found: Sequence[Difference]) -> str:
    """The card of an exported folder: what is in it and how it is run, the code tested in `tests/test_export.py`."""
    patch, prefix = config.patch_size, PREFIX_TOKENS[config.model_type](config)
    mean, std = (list(getattr(processor, key, None) or default) for key, default in _STATISTICS.items())
    outside = getattr(processor, "do_normalize", True)
    scale = "x = (x / 255 - mean) / std" if outside else "x = x / 255  # the model normalises inside"
    return _README.format(
        name=name,
        model_type=config.model_type,
        patch=patch,
        prefix=prefix,
        mean=mean,
        std=std,
        scale=scale,
        tolerance=f"{TOLERANCE:g}",
        table=markdown_table(*difference_table(found)),
        torch=torch.__version__,
    )


_STATISTICS = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
_README = """# {name}, exported

The encoder (`{model_type}`) as `model.onnx` for ONNX Runtime and as `model.pt2` for `torch.export.load`, float32, with
dynamic batch, height and width. Sides are multiples of {patch} pixels. Neither file needs the code it was made with.

## ONNX Runtime and numpy

```python
import numpy as np
import onnxruntime

PATCH, PREFIX = {patch}, {prefix}
mean = np.array({mean}, dtype=np.float32)
std = np.array({std}, dtype=np.float32)
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

# image: uint8, (height, width, 3), RGB; here cut to whole patches, better resized to them
height, width = (side // PATCH * PATCH for side in image.shape[:2])
x = image[:height, :width].astype(np.float32)
{scale}
pixel_values = np.ascontiguousarray(x.transpose(2, 0, 1)[None], dtype=np.float32)  # (1, 3, height, width)

tokens = session.run(["last_hidden_state"], {{"pixel_values": pixel_values}})[0]
spatial = tokens[0, PREFIX:].reshape(height // PATCH, width // PATCH, -1)  # (rows, columns, width)
```

`preprocessor_config.json` says how the model's own image processor sizes and normalises images. The attention is ONNX
Runtime's operator `com.microsoft.MultiHeadAttention`, so other ONNX runtimes may not take the file.

## torch.export

```python
import torch

program = torch.export.load("model.pt2").module()
tokens, *pooled = program(torch.zeros(1, 3, {patch} * 4, {patch} * 6))
```

Images have at least two patches a side here. The program was traced on the CPU; for another device use
`torch.export.passes.move_to_device_pass`. This file holds no pickle, but torch unpickles one that a `.pt2` file has:
load those you trust.

## Checked against torch {torch}

Largest absolute difference over all outputs, random pixels; more than {tolerance} of torch's largest value would have
stopped the export.

{table}
"""
