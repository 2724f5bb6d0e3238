"""Micro-batches whose images keep their own sizes: collated one by one, then put into one pack (`packing_unit`).

An option of a group in a recipe (`packed: true`), off by default: on a CPU it gains little, for rows of one padded
grid come together already, and many small runs of attention keep threads waiting for each other. Measured with
`benchmarks/packed.py` on chunks of pages, bfloat16: 1.06 times the padded rate in time of one core [ours].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from modeling_unit.packing_unit import pack_images, unpatchify

# what fills the rest of a row of text, by the collator's names
FILL = {"labels": -100, "attention_mask": 0, "token_places": -1}


def pack_rows(rows: Sequence[dict[str, torch.Tensor]], patch_size: int, pad_token_id: int, step: int):
    """Batches of one row each, as the collator makes them, to one pack.

    Keys in: those of `GroupCollator`, with a first dimension of 1. Keys out: `pixel_values` (sum N_i, 3 * P * P) and
    `image_grid_hw` (B, 2), likewise `teacher_pixel_values` and `teacher_grid`; `character_classes`
    (1, sum N_i, slots); texts (B, T) padded on the right, T a multiple of `step`; `task_ids` and `row_seeds` (B,).
    """
    pack = pack_images([row["pixel_values"][0] for row in rows], patch_size)
    if "teacher_pixel_values" in rows[0]:
        teacher = pack_images([row["teacher_pixel_values"][0] for row in rows], patch_size)
        pack |= {"teacher_pixel_values": teacher["pixel_values"], "teacher_grid": teacher["image_grid_hw"]}
    if "character_classes" in rows[0]:
        pack["character_classes"] = torch.cat([row["character_classes"] for row in rows], dim=1)
    for name in ("task_ids", "row_seeds"):
        if name in rows[0]:
            pack[name] = torch.cat([row[name] for row in rows])
    used = [int(row["attention_mask"].sum()) for row in rows]
    length = -(-max(used) // step) * step
    for name in ("input_ids", "labels", "attention_mask", "token_places"):
        fill = FILL.get(name, pad_token_id)
        texts = [row[name][0, :count] for row, count in zip(rows, used, strict=True)]
        pack[name] = torch.stack([F.pad(text, (0, length - len(text)), value=fill) for text in texts])
    return pack


def repacked(pack: torch.Tensor, grids: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a pack in patches of another size: pixels `(sum N_i, 3 * P * P)` and grids `(B, 2)`.

    Raises:
        ValueError: an image that is not whole patches of that size.
    """
    own = round((pack.shape[1] / 3) ** 0.5)
    if own == patch_size:
        return pack, grids
    sizes = grids.tolist()
    images = pack.split([rows * cols for rows, cols in sizes])
    found = pack_images(
        [unpatchify(each[None], *size, own)[0] for each, size in zip(images, sizes, strict=True)], patch_size
    )
    return found["pixel_values"], found["image_grid_hw"].to(grids.device)


def first_tokens(grids: torch.Tensor, prefix: int) -> torch.Tensor:
    """Where the images of a pack begin in a sequence of their tokens, `prefix` ones and patches of each, `(B,)`."""
    return F.pad((grids.prod(dim=1) + prefix).cumsum(0)[:-1], (1, 0))
