"""UNIT's encoder as a vision tower of the original LLaVA (haotian-liu/LLaVA) and of LLaVA-NeXT.

One line before those repositories build their model makes both accept folders and Hub ids of UNIT:

```python
>>> from modeling_unit.llava_unit import register_llava; register_llava()
```

Both are tied to transformers 4.37-4.4x: this file, and what it imports, asks for nothing that 4.37 lacks.

Shapes: B images, S the side in pixels of the square that LLaVA shows its tower, P patch side, N = (S / P)^2, D width.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import cached_file

from .compat_unit import OLD_TRANSFORMERS
from .configuration_unit import CLIP_MEAN, CLIP_STD, UnitVisionConfig
from .encoder_unit import UnitVisionModel

UNIT_MODEL_TYPES = ("unit", "unit_vision_model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SELECT_FEATURES = ("patch", "cls_patch")


def clip_image_processor(size: int, mean=CLIP_MEAN, std=CLIP_STD, do_normalize: bool = True):
    """transformers' `CLIPImageProcessor`, which LLaVA knows: the shorter edge to `size`, the centre cut out,
    normalised."""
    # Not above: where torchvision is missing, transformers 5 warns as soon as the name is looked up
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
        do_normalize=do_normalize,
    )


def processor_settings(name_or_folder: str) -> dict:
    """What the image processor's file in a folder (or a Hub repository) says; empty where there is none."""
    for file in PROCESSOR_FILES:
        try:
            settings = json.loads(Path(cached_file(name_or_folder, file)).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no such file here or there, no network
            continue
        return settings.get("image_processor", settings)
    return {}


def tower_size(config: UnitVisionConfig, settings: dict, wanted: int | None = None) -> int:
    """Side S in pixels of the square that LLaVA shows the encoder.

    `wanted`, or else twice the side of a picture at x1 (`base_size` of the image processor; x4 as area, 448 for the
    paper's 224) [ours: LLaVA needs one size, and the paper does not state which], or the nominal size of an encoder
    that comes without our image processor; in whole patches.

    Raises:
        ValueError: `wanted` is no positive multiple of the patch size.
    """
    patch = config.patch_size
    if wanted is not None:
        if not isinstance(wanted, int) or wanted <= 0 or wanted % patch:
            raise ValueError(
                f"The tower's image size must be a positive multiple of the patch size {patch}, got {wanted!r}."
            )
        return wanted
    size = 2 * settings["base_size"] if "base_size" in settings else config.image_size
    return max(patch, size // patch * patch)


class UnitVisionTower(nn.Module):
    """A vision tower with the constructor, the attributes and the call of LLaVA's `CLIPVisionTower`.

    Args:
        vision_tower: folder or Hub id of an encoder repository or of a full UNIT repository.
        args: LLaVA's model arguments or configuration. Read: `mm_vision_select_layer` (an index into the input of the
            first block and the outputs of all; the last is without the final norm unless the encoder's configuration
            says `tie_last_hidden_states`), `mm_vision_select_feature` (`"patch"`, the default, or `"cls_patch"`),
            `unfreeze_mm_vision_tower`, and of our own `mm_vision_image_size` (S, see [`tower_size`]).
        delay_load: read only the configuration; `load_model` reads the weights later. An unfrozen tower loads now.

    Raises:
        ValueError: an unknown selection, S2 (an encoder of any size has no use for it), a size that does not divide
            into patches.
    """

    def __init__(self, vision_tower: str, args, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = str(vision_tower)
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        self.unfrozen = bool(getattr(args, "unfreeze_mm_vision_tower", False))
        if self.select_feature not in SELECT_FEATURES:
            raise ValueError(
                f"mm_vision_select_feature must be one of {', '.join(SELECT_FEATURES)}, got {self.select_feature!r}."
            )
        if getattr(args, "s2", False):
            raise ValueError("S2 is not for this tower: it takes larger images as they are (mm_vision_image_size).")
        self.cfg_only = UnitVisionConfig.from_pretrained(self.vision_tower_name)
        layers = self.cfg_only.num_hidden_layers
        if not isinstance(self.select_layer, int) or not -layers - 1 <= self.select_layer <= layers:
            raise ValueError(
                f"mm_vision_select_layer must lie between {-layers - 1} and {layers}, got {self.select_layer!r}."
            )
        settings = processor_settings(self.vision_tower_name)
        self._image_size = tower_size(self.cfg_only, settings, getattr(args, "mm_vision_image_size", None))
        # The encoder's own `image_size` decides how it looks up positions and stays as it is; LLaVA reads this one's
        self.cfg_only.image_size = self._image_size
        self.image_processor = clip_image_processor(
            self._image_size,
            settings.get("image_mean", CLIP_MEAN),
            settings.get("image_std", CLIP_STD),
            settings.get("do_normalize", not self.cfg_only.normalize_pixels),
        )
        if not delay_load or self.unfrozen:
            self.load_model()

    def load_model(self, device_map=None) -> None:
        """Read the weights as float32, from safetensors alone; a second call does nothing. LLaVA casts as it needs."""
        if self.is_loaded:
            print(f"{self.vision_tower_name} is already loaded, `load_model` called again, skipping.")
            return
        settings = {"torch_dtype" if OLD_TRANSFORMERS else "dtype": torch.float32, "use_safetensors": True}
        if device_map is not None:
            settings["device_map"] = device_map
        self.vision_tower = UnitVisionModel.from_pretrained(self.vision_tower_name, **settings)
        self.vision_tower.requires_grad_(self.unfrozen)
        self.is_loaded = True
        self.train(self.training)

    def train(self, mode: bool = True) -> UnitVisionTower:
        """A frozen tower stays in evaluation mode: in training the encoder crops and drops positions at random."""
        super().train(mode)
        if self.is_loaded and not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def feature_select(self, image_forward_outs) -> torch.Tensor:
        """The chosen layer's tokens, without the class token for `"patch"`."""
        features = image_forward_outs.hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """`(B, 3, H, W)` to `(B, N, D)`, or a list of `(3, H, W)` of any sizes to a list of `(1, N, D)`, in the
        images' dtype. Gradients are recorded as far as the weights (or the images) ask for them.
        """
        if isinstance(images, (list, tuple)):
            return [self.forward(image.unsqueeze(0)) for image in images]
        outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        return self.feature_select(outputs).to(images.dtype)

    @property
    def dummy_feature(self) -> torch.Tensor:
        """`(1, D)` zeros, for a sample without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> UnitVisionConfig:
        """The encoder's configuration with the tower's `image_size`."""
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        return self._image_size

    @property
    def num_patches_per_side(self) -> int:
        return self._image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """N, the tokens of an image; one more with the class token, as LLaVA-NeXT counts."""
        return self.num_patches_per_side**2 + (self.select_feature == "cls_patch")


def is_unit(name_or_folder: str) -> bool:
    """Whether a folder or Hub id is an encoder or a full model of UNIT, by its `config.json`."""
    try:
        config, _ = PretrainedConfig.get_config_dict(name_or_folder)
    except (OSError, ValueError):  # no such folder or repository, no network: another tower's business
        return False
    return config.get("model_type") in UNIT_MODEL_TYPES


def register_llava(package: str = "llava") -> None:
    """Make `build_vision_tower` of the installed LLaVA or LLaVA-NeXT build a [`UnitVisionTower`] for UNIT's folders.

    All other towers are built as before; a Hub id is looked up only if the repository does not claim it (LLaVA-NeXT
    takes whatever has "clip" or "siglip" in its name). Modules that took the function by name (`llava_arch.py`) get
    the new one. Calling it twice changes nothing more.

    Args:
        package: name of the package, for a fork that is called otherwise.

    Raises:
        ImportError: the package, or its builder, is not installed.
    """
    builder = importlib.import_module(f"{package}.model.multimodal_encoder.builder")
    original = builder.build_vision_tower
    if getattr(original, "builds_unit", False):
        return

    @functools.wraps(original)
    def build_vision_tower(vision_tower_cfg, **kwargs):
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if name is not None and Path(name).is_dir() and is_unit(name):
            return UnitVisionTower(name, args=vision_tower_cfg, **kwargs)
        try:
            return original(vision_tower_cfg, **kwargs)
        except ValueError:
            # a name that the repository does not know: asked for on the Hub only now, so that its own need no network
            if name is None or Path(name).exists() or not is_unit(name):
                raise
        return UnitVisionTower(name, args=vision_tower_cfg, **kwargs)

    build_vision_tower.builds_unit = True
    for module in list(sys.modules.values()):
        # a module's own dictionary: getattr would wake the lazy modules of transformers
        if getattr(module, "__dict__", {}).get("build_vision_tower") is original:
            module.build_vision_tower = build_vision_tower
