"""An independent forward pass of the released UNIT checkpoints, for parity tests.

Written from the facts about their format alone (the table of `unit_cli/convert.py` and the rules beside it), in plain
torch on a state dict with the released names. It shares no code with `modeling_unit/`, on purpose: nothing may be
imported from there, and the same thing is computed another way where there is one (patches by a convolution, bilinear
sampling in training by weights worked out here, attention head by head).

`args`: the `args` of their `config.json`. B images, H x W pixels, P patch side, R x R table, D width.
"""

import math
import re

import torch

# width, layers, heads of the sizes that `args.model` can name
NAMED = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "huge": (1280, 32, 16)}


def patch_and_side(args):
    """`vit_SIZE_patchP_N` -> P, N."""
    patch, side = re.search(r"_patch(\d+)_(\d+)", args["model"]).groups()
    return int(patch), int(side)


def heads_of(args):
    return NAMED[args["model"].split("_")[1]][2]


def table_side(args):
    """R: `M = round(cpe_max_size / P) * P` pixels, `R = ceil(M / P)`."""
    patch, _ = patch_and_side(args)
    covered = round(args["cpe_max_size"] / patch) * patch
    return math.ceil(covered / patch), covered


def prefix_count(num_cls, multiple):
    """Class tokens and registers: with `register_multiple = m > 0`, `m - num_cls mod m` registers."""
    return num_cls + (multiple - num_cls % multiple if multiple else 0)


def make(args, num_cls, seed=0, layers=None):
    """A random state dict in the released format. Weights of a spread that makes the outputs of order one, for pixels
    normalised twice too, so that a difference anywhere shows and float32 can be asked for 1e-5."""
    width, depth, _ = NAMED[args["model"].split("_")[1]]
    depth = layers or depth
    pixels = 3 * patch_and_side(args)[0] ** 2
    side, _ = table_side(args)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=generator) * std

    state = {
        "input_conditioner.norm_mean": torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1),
        "model.patch_generator.embedder.weight": normal(width, pixels, std=0.25 * pixels**-0.5),
        "model.patch_generator.pos_embed": normal(1, side * side, width, std=0.5),
        "model.patch_generator.cls_token.token": normal(prefix_count(num_cls, args.get("register_multiple")), width),
    }
    norms = ["model.fc_norm" if args.get("gp") == "avg" else "model.norm"]
    for index in range(depth):
        block = f"model.blocks.{index}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for name, rows, cols, gain in (
            ("attn.qkv", 3 * width, width, 1.0),
            ("attn.proj", width, width, 0.5),
            ("mlp.fc1", 4 * width, width, 1.0),
            ("mlp.fc2", width, 4 * width, 0.5),
        ):
            state[f"{block}.{name}.weight"] = normal(rows, cols, std=gain * cols**-0.5)
            state[f"{block}.{name}.bias"] = normal(rows, std=0.1)
    for name in norms:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(width, std=0.3), normal(width, std=0.3)
    return {f"unit_model.{name}": tensor for name, tensor in state.items()}


def sample_weights(size, places):
    """`(points, size)`: how much of each of `size` entries is in the line at `places`, in entries, linear between two;
    nothing is taken from outside of the line."""
    distance = (places[..., None] - torch.arange(size, dtype=torch.float64)).abs()
    return (1 - distance).clamp(min=0)


def resize(table, rows, cols):
    """`(R, C, D) -> (rows, cols, D)`, bilinear, corners on corners, in float32 as the format has it: over a table of
    146 x 146 its rounding is larger than that of all blocks together, so an exact one would not be the same."""
    grid = table.permute(2, 0, 1)[None].float()
    grid = torch.nn.functional.interpolate(grid, (rows, cols), mode="bilinear", align_corners=True)
    return grid[0].permute(1, 2, 0).to(table.dtype)


def positions(table, rows, cols, covered, nominal):
    """At evaluation, `(rows * cols, D)`: the table where it fits; resized to the longer side squared and cut where
    the size that it covers is not the nominal one; cut, and resized only where it is too small, where it is."""
    side = math.isqrt(table.shape[1])
    grid = table[0].reshape(side, side, -1)
    if (rows, cols) == (side, side):
        pass
    elif covered != nominal:
        longer = max(rows, cols)
        grid = resize(grid, longer, longer)[:rows, :cols]
    else:
        grid = grid[:rows, :cols]
        if grid.shape[:2] != (rows, cols):
            grid = resize(grid, rows, cols)
    return grid.reshape(rows * cols, -1)


def training_positions(table, rows, cols, draws):
    """In training, `(B, rows * cols, D)`: of each image a crop of the table, or nothing.

    Args:
        draws: of each image `(scale, aspect, top, left, drop)`, each uniform in [0, 1): the crop has a share scale
            squared of the table's area, scale from sqrt(0.1) to 1, and a width over height of aspect, from 3/4 to 4/3
            evenly in the logarithm; it lies anywhere that it fits; one image in ten gets no positions.
    """
    side = math.isqrt(table.shape[1])
    grid = table[0].reshape(side, side, -1).double()
    out = []
    for scale, aspect, top, left, drop in draws.double().tolist():
        scale = math.sqrt(0.1) + scale * (1 - math.sqrt(0.1))
        aspect = (3 / 4) ** (1 - aspect) * (4 / 3) ** aspect
        height, width = min(1, scale / math.sqrt(aspect)), min(1, scale * math.sqrt(aspect))
        ends = []
        for begin, extent, points in ((top, height, rows), (left, width, cols)):
            line = torch.linspace(0, extent, points, dtype=torch.float64) if points > 1 else torch.zeros(1).double()
            ends.append(sample_weights(side, (begin * (1 - extent) + line) * (side - 1)))
        crop = torch.einsum("yr,xc,rcd->yxd", *ends, grid).reshape(rows * cols, -1)
        out.append(torch.zeros_like(crop) if drop < 0.1 else crop)
    return torch.stack(out).to(table.dtype)


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def forward(state, args, pixels, draws=None):
    """First class token and patch tokens, `(B, 1 + rows * cols, D)`.

    Args:
        pixels: `(B, 3, H, W)`, as the model is fed: normalised here by the input conditioner.
        draws: for training mode, see `training_positions`.
    """
    state = {name.removeprefix("unit_model."): tensor for name, tensor in state.items()}
    patch, nominal = patch_and_side(args)
    _, covered = table_side(args)
    heads = heads_of(args)
    rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    x = (pixels - state["input_conditioner.norm_mean"]) / state["input_conditioner.norm_std"]
    # a patch flattened as channel, row, column, times a matrix: a convolution that steps by whole patches
    embedder = state["model.patch_generator.embedder.weight"]
    x = torch.nn.functional.conv2d(x, embedder.reshape(-1, 3, patch, patch), stride=patch)
    x = x.flatten(2).transpose(1, 2)
    table = state["model.patch_generator.pos_embed"]
    if draws is None:
        x = x + positions(table, rows, cols, covered, nominal)
    else:
        x = x + training_positions(table, rows, cols, draws)
    prefix = state["model.patch_generator.cls_token.token"]
    x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.blocks."))
    for index in range(depth):
        block = {
            name.removeprefix(f"model.blocks.{index}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"model.blocks.{index}.")
        }
        width = x.shape[-1]
        size = width // heads
        y = layer_norm(x, block["norm1.weight"], block["norm1.bias"])
        y = y @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]
        query, key, value = y[..., :width], y[..., width : 2 * width], y[..., 2 * width :]
        mixed = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = query[..., own] @ key[..., own].transpose(1, 2) / math.sqrt(size)
            scores = (scores - scores.amax(-1, keepdim=True)).exp()
            mixed.append(scores / scores.sum(-1, keepdim=True) @ value[..., own])
        x = x + torch.cat(mixed, dim=-1) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
        y = layer_norm(x, block["norm2.weight"], block["norm2.bias"])
        y = gelu(y @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
        x = x + y @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
    if "model.norm.weight" in state:
        x = layer_norm(x, state["model.norm.weight"], state["model.norm.bias"])
    return torch.cat([x[:, :1], x[:, len(prefix) :]], dim=1)
