"""`unit convert SRC DST`: a released UNIT checkpoint to ours, or ours back to the released format, losslessly.

SRC says which way: a `config.json` with `args` and no `model_type` is the released format, `model_type`
`unit_vision_model` is ours. Every tensor but two is renamed, its bytes copied as they are (`i` counts blocks, `.*` is
weight and bias):

    released (all under `unit_model.`)         ours
    input_conditioner.norm_mean, norm_std      config.json: image_mean, image_std, normalize_pixels
    model.patch_generator.embedder.weight      embeddings.projection.weight
    model.patch_generator.pos_embed            embeddings.position_embedding
    model.patch_generator.cls_token.token      embeddings.prefix_tokens
    model.blocks.{i}.norm1.*                   blocks.{i}.norm1.*
    model.blocks.{i}.attn.qkv.*                blocks.{i}.attn.qkv.*
    model.blocks.{i}.attn.proj.*               blocks.{i}.attn.proj.*
    model.blocks.{i}.norm2.*                   blocks.{i}.norm2.*
    model.blocks.{i}.mlp.fc1.*                 blocks.{i}.mlp.fc1.*
    model.blocks.{i}.mlp.fc2.*                 blocks.{i}.mlp.fc2.*
    model.norm.*                               norm.*     (args.gp "token"; use_final_norm)
    model.fc_norm.*                            fc_norm.*  (args.gp "avg"; keep_fc_norm: held, applied by neither)

    args.model                                 hidden_size, num_hidden_layers, num_attention_heads,
                                               intermediate_size, patch_size, image_size
    args.cpe_max_size, args.register_multiple  the same
    args.teachers, args.cls_token_per_teacher  num_cls_tokens
    version and every other argument           released: the text of config.json, word for word

A tensor that is missing, not in this table, or of another shape than `config.json` implies ends the command; nothing
is written then. An encoder that came from a released checkpoint gets its `config.json` back as it was. One of ours
gets `args` written anew, with our `config.json` under `unit`, for the way back. Of other files of SRC none is copied,
and the command says which. No tensor is ever loaded: memory does not grow with the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common import CommandError, Progress, quiet

CHUNK = 1 << 20  # bytes copied at a time; one buffer of a size that stays in the processor's cache [ours, measured]
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(subparsers) -> None:
    """Add `convert` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a released UNIT checkpoint into ours, or ours into the released format",
        description="Convert an encoder between the released format and ours, bit for bit; SRC says which way.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="a folder, or an id on the Hugging Face Hub")
    parser.add_argument("destination", metavar="DST", help="the folder to write; must not be there yet")
    parser.add_argument(
        "--max-shard-size",
        type=size,
        metavar="SIZE",
        help="split the weights into files of at most this size, for example 2GB (default: the files of SRC)",
    )
    parser.add_argument(
        "--pixels",
        choices=("normalized", "unit-range"),
        default="normalized",
        help="what the image processor written beside a converted encoder feeds it, which normalises inside as well: "
        "pixels already normalised, as the authors' page does, or pixels in [0, 1] (default: normalized)",
    )


def size(text: str) -> int:
    """Bytes of an argument such as `5GB`, `500MB`, `2GiB` or a bare number."""
    found = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.strip().upper())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 500MB, got {text!r}")
    return int(found[1]) * UNITS[found[2] or ""]


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was done."""
    quiet(args.source)
    from modeling_unit.released_unit import CheckpointError

    try:
        source = local_folder(args.source)
        with Progress("converting", "B") as progress:
            progress.bar.unit_scale = True
            report = convert(source, args.destination, args.max_shard_size, args.pixels == "normalized", progress)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{args.destination}: not written ({error})") from error
    files = f"{report.files} file{'s' if report.files != 1 else ''}"
    print(f"{args.destination}: {report.tensors} tensors in {files}, {report.direction}")
    if report.left:
        print(f"not taken along: {', '.join(report.left)}")
    return 0


def local_folder(source: str) -> Path:
    """SRC as a folder; what the Hub has is fetched.

    Raises:
        CheckpointError: it is a file, or neither here nor on the Hub.
    """
    from modeling_unit.released_unit import PICKLES, CheckpointError, refuse_pickle, released_folder

    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in PICKLES:
            refuse_pickle(path)
        raise CheckpointError(f"{path}: is a file; name the folder that holds config.json and the weights.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        folder = released_folder(source)
        if folder is not None:
            return folder
        raise CheckpointError(
            f"{source}: no such folder here, and on the Hub no checkpoint in the released format that can be reached."
        )
    raise CheckpointError(f"{source}: no such folder.")


@dataclass(frozen=True)
class Report:
    """What `convert` did. `left`: names of the files of the source that have no counterpart."""

    direction: str
    tensors: int
    files: int
    left: list[str]


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its name and what its bytes are, a range of a file or bytes at hand."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int
    file: Path | None = None
    begin: int = 0
    data: bytes = b""


def convert(
    source: str | Path,
    destination: str | Path,
    max_shard_size: int | None = None,
    double_normalize: bool = True,
    progress: Callable[[int, int], Any] | None = None,
) -> Report:
    """Write the checkpoint in `source` to `destination` in the other format; see the module's docstring.

    Args:
        source, destination: folders; `destination` must be missing or empty. It appears when all is written.
        max_shard_size: bytes of weights in a file; `None` keeps the division into files of the source.
        double_normalize: whether the image processor written beside an encoder of ours normalises too.
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: the source is none of both formats, or not what its `config.json` says.
        OSError: the destination cannot be written.
    """
    from modeling_unit.released_unit import CheckpointError, is_released, read_config

    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: is already there; remove it or name another.")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"{destination}: there is no folder {destination.absolute().parent}.")
    text, config = read_config(source)
    if is_released(config):
        make, direction = from_released, "released format to ours"
    elif config.get("model_type") == "unit_vision_model":
        make, direction = to_released, "ours to the released format"
    elif config.get("model_type") == "unit":
        raise CheckpointError(
            f"{source}: a whole UNIT model, and the released format holds an encoder alone; save that one first: "
            "UnitVisionModel.from_pretrained(SRC).save_pretrained(FOLDER)."
        )
    else:
        said = f"model_type {config['model_type']!r}" if "model_type" in config else "neither args nor model_type"
        raise CheckpointError(
            f"{source}: not a UNIT encoder (config.json has {said}); convert takes the released format (args, no "
            "model_type) and ours (unit_vision_model)."
        )
    temporary = destination.absolute().with_name(f".{destination.name}.{os.getpid()}")  # renamed when it is whole
    try:
        pieces, files, finish = make(source, text, config, double_normalize)
        groups = split(pieces, max_shard_size)
        needed = sum(piece.length for piece in pieces)
        free = shutil.disk_usage(destination.absolute().parent).free
        if needed > free:
            raise CheckpointError(
                f"{destination}: needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room."
            )
        temporary.mkdir()
        names = write_weights(temporary, groups, progress)
        finish(temporary)
        temporary.replace(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    taken = {"config.json", "model.safetensors.index.json", *(path.name for path in files)}
    left = sorted(path.name for path in source.iterdir() if path.is_file() and path.name not in taken)
    if direction.startswith("ours"):
        left = [name for name in left if not name.endswith("_unit.py")]  # our own code, which every folder gets
    return Report(direction, len(pieces), len(names), left)


def from_released(source: Path, text: str, released: dict, double_normalize: bool) -> tuple:
    """The tensors of an encoder of ours, the files they come from, and what to write beside the weights."""
    from modeling_unit.hub_unit import ENCODER_AUTO_MAP, write_code
    from modeling_unit.image_processing_unit import UnitImageProcessor
    from modeling_unit.released_unit import TORCH_DTYPES, read_released, tensor_names

    config, entries, _ = read_released(source)
    pieces = [
        Piece(ours, entry.dtype, entry.shape, entry.end - entry.begin, entry.file, entry.begin)
        for theirs, (ours, _) in tensor_names(config).items()
        for entry in [entries[theirs]]
    ]
    if "unit" in released:
        said = released["unit"]["config"]
    else:
        sizes: dict[str, int] = {}
        for piece in pieces:
            sizes[piece.dtype] = sizes.get(piece.dtype, 0) + piece.length
        config.architectures, config.auto_map = ["UnitVisionModel"], dict(ENCODER_AUTO_MAP)
        config.dtype = TORCH_DTYPES.get(max(sizes, key=sizes.__getitem__))
        said = config.to_json_string()
    processor = UnitImageProcessor(
        patch_size=config.patch_size,
        base_size=max(config.patch_size, config.image_size),
        max_side=max(config.patch_size, config.position_side * config.patch_size),
        image_mean=config.image_mean,
        image_std=config.image_std,
        do_normalize=double_normalize or not config.normalize_pixels,
    )

    def finish(folder: Path) -> None:
        (folder / "config.json").write_text(said, encoding="utf-8")
        processor.save_pretrained(folder)
        write_code(folder)

    return pieces, sorted({entry.file for entry in entries.values()}), finish


def to_released(source: Path, text: str, config: dict, double_normalize: bool) -> tuple:
    """The tensors of a released checkpoint, the files they come from, and what to write beside the weights."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    from modeling_unit.configuration_unit import UnitVisionConfig
    from modeling_unit.released_unit import (
        MEAN,
        STD,
        TORCH_DTYPES,
        CheckpointError,
        check_entries,
        read_entries,
        released_from_config,
        statistics,
        statistics_dtype,
        tensor_names,
        weight_files,
    )

    try:
        ours = UnitVisionConfig.from_dict(config)
        said = released_from_config(ours, text)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{source}: {' '.join(str(error).split())}") from error
    files = weight_files(source)
    entries, table = read_entries(files), tensor_names(ours)
    check_entries(entries, dict(table.values()), str(source))
    pieces = []
    dtype = statistics_dtype(ours)
    for name, values in zip((MEAN, STD), statistics(ours), strict=True):
        tensor = torch.tensor(values, dtype=torch.float64).to(TORCH_DTYPES[dtype])
        data = bytes(tensor.view(torch.uint8).tolist())
        pieces.append(Piece(name, dtype, (len(values), 1, 1), len(data), data=data))
    for theirs, (name, _) in table.items():
        entry = entries[name]
        pieces.append(Piece(theirs, entry.dtype, entry.shape, entry.end - entry.begin, entry.file, entry.begin))

    def finish(folder: Path) -> None:
        (folder / "config.json").write_text(said, encoding="utf-8")

    return pieces, files, finish


def split(pieces: list[Piece], max_shard_size: int | None) -> list[list[Piece]]:
    """Which tensors go into one file: as in the source, bytes at hand into the first; or as many as fit, in order."""
    if max_shard_size is None:
        files = sorted({piece.file for piece in pieces if piece.file is not None})
        return [[piece for piece in pieces if (piece.file or files[0]) == file] for file in files]
    groups: list[list[Piece]] = [[]]
    for piece in pieces:
        if groups[-1] and sum(other.length for other in groups[-1]) + piece.length > max_shard_size:
            groups.append([])
        groups[-1].append(piece)
    return groups


def write_weights(folder: Path, groups: list[list[Piece]], progress: Callable[[int, int], Any] | None) -> list[str]:
    """`model.safetensors`, or several files and their index; returns the names of the weight files."""
    total = sum(piece.length for group in groups for piece in group)
    done, index, names = 0, {}, []
    if progress is not None:
        progress(0, total)
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        names.append(name)
        index |= {piece.name: name for piece in group}
        for count in write_safetensors(folder / name, group):
            done += count
            if progress is not None:
                progress(done, total)
    if len(groups) > 1:
        said = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return names


def write_safetensors(path: Path, pieces: list[Piece]) -> Iterable[int]:
    """A safetensors file (8 bytes of length, a JSON header, the tensors without gaps), written piece by piece so that
    no tensor has to be in memory; yields the number of bytes after each write."""
    # Wide numbers first, as the library writes them, so that each tensor is aligned to its own size
    pieces = sorted(pieces, key=lambda piece: (-_width(piece.dtype), piece.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape)}
        header[piece.name]["data_offsets"] = [offset, offset + piece.length]
        offset += piece.length
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "wb") as out:
        out.write(len(written).to_bytes(8, "little") + written)
        for piece in pieces:
            if piece.file is None:
                out.write(piece.data)
                yield piece.length
                continue
            with open(piece.file, "rb", buffering=0) as file:
                file.seek(piece.begin)
                left = piece.length
                while left:
                    count = file.readinto(buffer[: min(CHUNK, left)])
                    if not count:
                        raise OSError(f"{piece.file} became shorter while it was read")
                    out.write(buffer[:count])
                    left -= count
                    yield count


def _width(dtype: str) -> int:
    """Bits of a safetensors dtype: F32, BF16, F8_E4M3, BOOL."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8
