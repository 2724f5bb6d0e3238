"""The contract of LLaVA's two original repositories with their vision towers, as far as the tests need it.

Only what is called and read, written from that: `builder.build_vision_tower(vision_tower_cfg, **kwargs)`, the module
`llava_arch` that takes it by name, and a model that encodes images with its tower and a projector.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

FLAVOURS = ("LLaVA", "LLaVA-NeXT")


class OwnTower:
    """What the repository builds for names of its own."""

    def __init__(self, name, delay_load=False):
        self.name, self.delay_load = name, delay_load


def install(monkeypatch_setitem, flavour: str) -> SimpleNamespace:
    """Put a package `llava` into `sys.modules` by `monkeypatch_setitem(mapping, key, value)`; returns its modules."""
    modules = {}
    for name in ("llava", "llava.model", "llava.model.multimodal_encoder"):
        modules[name] = ModuleType(name)
        modules[name].__path__ = []
    builder = modules["llava.model.multimodal_encoder.builder"] = ModuleType("llava.model.multimodal_encoder.builder")
    arch = modules["llava.model.llava_arch"] = ModuleType("llava.model.llava_arch")

    def build_vision_tower(vision_tower_cfg, **kwargs):
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if not name.startswith("openai/"):
            raise ValueError(f"Unknown vision tower: {name}")
        return OwnTower(name, **kwargs)

    builder.build_vision_tower = build_vision_tower
    arch.build_vision_tower = build_vision_tower  # from .multimodal_encoder.builder import build_vision_tower

    class LlavaMetaModel(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            if hasattr(config, "mm_vision_tower"):  # a saved LLaVA: weights come later
                delay = getattr(config, "delay_load", False) if flavour == "LLaVA-NeXT" else True
                self.vision_tower = arch.build_vision_tower(config, delay_load=delay)
                self.mm_projector = nn.Linear(config.mm_hidden_size, 6)

        def initialize_vision_modules(self, model_args):
            if getattr(self, "vision_tower", None) is None:
                self.vision_tower = arch.build_vision_tower(model_args)
            else:
                self.vision_tower.load_model()
            self.config.mm_vision_tower = model_args.vision_tower
            self.config.mm_hidden_size = self.vision_tower.hidden_size
            self.config.mm_vision_select_layer = model_args.mm_vision_select_layer
            self.config.mm_vision_select_feature = model_args.mm_vision_select_feature
            self.mm_projector = nn.Linear(self.config.mm_hidden_size, 6)

        def encode_images(self, images):
            return self.mm_projector(self.vision_tower(images))

        def pooled_by_two(self, images):
            """LLaVA-NeXT's pooling of a frame: the tokens must be a square of `num_patches_per_side`."""
            side = self.vision_tower.num_patches_per_side
            features = self.encode_images(images)
            grid = features.view(features.shape[0], side, side, -1).permute(0, 3, 1, 2)
            return nn.functional.avg_pool2d(grid, 2).permute(0, 2, 3, 1).flatten(1, 2)

    arch.LlavaMetaModel = LlavaMetaModel
    for name, module in modules.items():
        monkeypatch_setitem(sys.modules, name, module)
    return SimpleNamespace(builder=builder, arch=arch)


def model_arguments(folder, **changes) -> SimpleNamespace:
    """What `llava.train` passes."""
    settings = {"vision_tower": str(folder), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    return SimpleNamespace(**(settings | changes))


def process_images(images, image_processor) -> torch.Tensor:
    """`llava.mm_utils.process_images` with `image_aspect_ratio: pad`: squares in the mean colour, preprocessed."""
    from PIL import Image

    made = []
    for image in images:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in image_processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        made.append(image_processor.preprocess(square, return_tensors="pt")["pixel_values"][0])
    return torch.stack(made)
