"""A small copy of a picture data set, to carry to another machine: the same rows, each picture a lossy WebP.

``unit data shrink pictures-train OUT`` writes the parquet shards of the source with only the pictures' files changed,
and beside them ``sentences.safetensors``: ``sentence`` (distinct captions, 384) f16 of length 1, and ``row`` (n,)
int32, which of them each row has. The classifier's cached targets stay behind: live distillation makes its own.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from training.data.schema import shard_paths

SENTENCES_FILE = "sentences.safetensors"
ALPHA_QUALITY = 80  # ours: an eighth of the bytes less than lossless edges, and no difference that shows at 160 px


def webp_bytes(picture: bytes, max_side: int, quality: int) -> bytes:
    """A picture's file as lossy WebP, transparency kept, no side longer than ``max_side`` px; never enlarged."""
    image = Image.open(io.BytesIO(picture))
    image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P", "PA") else "RGB")
    if max(image.size) > max_side:
        scale = max_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        # premultiplied, or the colour hidden under transparent pixels bleeds into the edge
        between = image.convert("RGBa") if image.mode == "RGBA" else image
        image = between.resize(size, Image.Resampling.LANCZOS).convert(image.mode)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, alpha_quality=ALPHA_QUALITY, method=6)
    return buffer.getvalue()


def shrink(source: Path, out: Path, max_side: int = 256, quality: int = 85, workers: int = 2) -> dict[str, int]:
    """Write the small copy of ``source`` to ``out``, which takes its place whole when the last file is done.

    Args:
        source: folder of parquet shards of pictures.
        out: made when missing; a folder that holds anything else than a data set is refused.
        max_side: px, larger pictures are scaled down to it.
        quality: of WebP, 1 to 100.
        workers: threads.

    Returns:
        ``{"rows": …, "bytes": …}`` of the copy.

    Raises:
        ValueError: no shards, the source as its own copy, a folder with other files, or settings out of range.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, out = Path(source).absolute(), Path(out).absolute()
    shards = shard_paths(source)
    if not 1 <= quality <= 100 or max_side < 16:
        raise ValueError(f"quality must be 1 to 100 and max_side 16 or more, not {quality} and {max_side}")
    if source.resolve() == out.resolve():
        raise ValueError(f"{out} is the source itself: name another folder for the copy")
    kinds = {each.suffix for each in out.iterdir()} if out.exists() else set()
    if kinds and not {".parquet"} <= kinds <= {".parquet", ".safetensors", ".json"}:
        raise ValueError(f"{out} holds more than a data set: name another folder for the copy")
    out.parent.mkdir(parents=True, exist_ok=True)
    captions: list[str] = []
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as staging:
        target = Path(staging) / out.name
        target.mkdir()
        total = sum(pq.ParquetFile(shard).metadata.num_rows for shard in shards)
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=total, desc="pictures", unit=" pictures", mininterval=2.0) as bar,
        ):
            for shard in shards:
                table = pq.read_table(shard)
                if not {"image", "text"} <= set(table.column_names):
                    raise ValueError(f"{shard} has no columns image and text: it is no picture data set")
                captions += table["text"].to_pylist()
                pictures = []
                images = table["image"].to_pylist()
                for small, image in zip(
                    pool.map(lambda each: webp_bytes(each["bytes"], max_side, quality), images), images, strict=True
                ):
                    pictures.append({"bytes": small, "path": image["path"]})
                    bar.update()
                place = table.schema.get_field_index("image")
                column = table.schema.field(place)
                table = table.set_column(place, column, pa.array(pictures, type=column.type))
                pq.write_table(table, target / shard.name, row_group_size=256, compression="zstd")
        sentences = _sentences(source, captions)
        if sentences is not None:
            save_file(sentences, target / SENTENCES_FILE)
        if out.exists():
            shutil.rmtree(out)
        target.rename(out)
    return {"rows": len(captions), "bytes": sum(each.stat().st_size for each in out.iterdir())}


def _sentences(source: Path, captions: list[str]) -> dict[str, torch.Tensor] | None:
    """Embedding of each distinct caption, from what lies beside the source; None where nothing does."""
    embeddings = read_sentences(source)
    if embeddings is None:
        return None
    if len(embeddings) != len(captions):
        raise ValueError(f"{source} has embeddings of {len(embeddings)} captions, and {len(captions)} rows")
    first: dict[str, int] = {}
    row = torch.tensor([first.setdefault(caption, len(first)) for caption in captions], dtype=torch.int32)
    wanted = {int(place): index for index, place in reversed(list(enumerate(row.tolist())))}
    return {"sentence": embeddings[[wanted[place] for place in range(len(first))]].half(), "row": row}


def read_sentences(folder: Path) -> torch.Tensor | None:
    """(n, 384) f16, the captions' embeddings row by row, of a built data set or of a small copy; None without any."""
    small, built = Path(folder) / SENTENCES_FILE, Path(folder) / "targets.safetensors"
    for path in (small, built):
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                sentence = file.get_tensor("sentence")
                return sentence[file.get_tensor("row").long()] if path == small else sentence
    return None
