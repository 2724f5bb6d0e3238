"""What the encoder takes from transformers 5, with stand-ins for transformers 4.37 to 4.57.

LLaVA's original repository and LLaVA-NeXT are tied to transformers 4.37-4.4x, and their vision tower lives in their
process: the encoder, its configuration and its tower must therefore load there too. Nothing else of UNIT does; the
reader, the connectors and the training need transformers 5.
"""

import copy
import functools
import inspect

import torch
import torch.nn.functional as F
import transformers
from torch import nn

OLD_TRANSFORMERS = int(transformers.__version__.partition(".")[0]) < 5

if not OLD_TRANSFORMERS:
    from transformers import PreTrainedConfig
    from transformers import initialization as init
    from transformers.masking_utils import create_bidirectional_mask
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.import_utils import is_torchdynamo_exporting
else:
    from transformers import PretrainedConfig

    class PreTrainedConfig(PretrainedConfig):
        """A configuration whose fields are annotated class attributes, as those of transformers 5 are."""

        sub_configs = {}
        base_config_key = ""

        def __init__(self, **kwargs):
            fields = {}
            for base in reversed(type(self).__mro__):
                if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig:
                    fields |= {name: base.__dict__.get(name) for name in inspect.get_annotations(base)}
            for name, default in fields.items():
                setattr(self, name, kwargs.pop(name, copy.deepcopy(default)))
            kwargs.pop("dtype", None)  # the spelling of 5 for `torch_dtype`: the dtype of the file, not a setting
            super().__init__(**kwargs)
            self.__post_init__()

        def __post_init__(self, **kwargs):
            pass

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
            """As in transformers 5: the part's configuration is also found inside that of the whole."""
            config, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if isinstance(config.get(cls.base_config_key), dict):
                config = config[cls.base_config_key]
            return cls.from_dict(config, **kwargs)

    class _Initialization:
        """`torch.nn.init` and `copy_` under the names of transformers 5; there a loaded weight is left alone by the
        functions, in 4 by the caller.
        """

        normal_ = staticmethod(nn.init.normal_)
        trunc_normal_ = staticmethod(nn.init.trunc_normal_)
        zeros_ = staticmethod(nn.init.zeros_)
        ones_ = staticmethod(nn.init.ones_)
        constant_ = staticmethod(nn.init.constant_)

        @staticmethod
        def copy_(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return tensor.copy_(other)

    init = _Initialization()

    def create_bidirectional_mask(config=None, inputs_embeds=None, attention_mask=None, **kwargs):
        """`(B, T)`, true where a token may be attended, to `(B, 1, 1, T)` to be added to the logits."""
        if attention_mask is None:
            return None
        added = torch.zeros(attention_mask.shape, dtype=inputs_embeds.dtype, device=inputs_embeds.device)
        added = added.masked_fill(~attention_mask.bool(), torch.finfo(inputs_embeds.dtype).min)
        return added[:, None, None, :]

    class GradientCheckpointingLayer(nn.Module):
        """A layer that recomputes itself in the backward pass when transformers has switched that on."""

        gradient_checkpointing = False

        def __call__(self, *args, **kwargs):
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(functools.partial(super().__call__, **kwargs), *args)
            return super().__call__(*args, **kwargs)

    def _sdpa_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return attended.transpose(1, 2).contiguous(), None

    class _AttentionFunctions:
        """The attention interface of transformers 5, of which the encoder needs two implementations."""

        @staticmethod
        def get_interface(implementation, default):
            return _sdpa_attention if implementation == "sdpa" else default

    ALL_ATTENTION_FUNCTIONS = _AttentionFunctions()

    def is_torchdynamo_exporting() -> bool:
        return False  # `unit export` needs transformers 5


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "OLD_TRANSFORMERS",
    "GradientCheckpointingLayer",
    "PreTrainedConfig",
    "create_bidirectional_mask",
    "init",
    "is_torchdynamo_exporting",
]
