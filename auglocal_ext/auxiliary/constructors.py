"""Classes of torchvision and timm that initialise tensors in their constructors alone, and what these do.

Where the value is an argument of the constructor it is the argument's default, as a module does not keep it.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

#: Parameters that start at one value, by class.
_CONSTANTS: dict[str, dict[str, float]] = {
    "timm.layers.grn.GlobalResponseNorm": {"weight": 0.0, "bias": 0.0},
    "timm.models.cait.LayerScaleBlock": {"gamma_1": 1e-4, "gamma_2": 1e-4},
    "timm.models.cait.LayerScaleBlockClassAttn": {"gamma_1": 1e-4, "gamma_2": 1e-4},
    "timm.models.convit.GPSA": {"gating_param": 1.0},
    "timm.models.convnext.ConvNeXtBlock": {"gamma": 1e-6},
    "timm.models.edgenext.ConvBlock": {"gamma": 1e-6},
    "timm.models.edgenext.CrossCovarianceAttn": {"temperature": 1.0},
    "timm.models.edgenext.SplitTransposeBlock": {"gamma": 1e-6, "gamma_xca": 1e-6},
    "timm.models.efficientformer.Attention": {"attention_biases": 0.0},
    "timm.models.fastvit.LayerScale2d": {"gamma": 1e-5},
    "timm.models.inception_next.MetaNeXtBlock": {"gamma": 1e-6},
    "timm.models.metaformer.Scale": {"scale": 1.0},
    "timm.models.metaformer.StarReLU": {"scale": 1.0, "bias": 0.0},
    "timm.models.mlp_mixer.Affine": {"alpha": 1.0, "beta": 0.0},
    "timm.models.mlp_mixer.ResBlock": {"ls1": 1e-4, "ls2": 1e-4},
    "timm.models.xcit.ClassAttentionBlock": {"gamma1": 1.0, "gamma2": 1.0},
    "timm.models.xcit.XCA": {"temperature": 1.0},
    "timm.models.xcit.XCABlock": {"gamma1": 1.0, "gamma2": 1.0, "gamma3": 1.0},
    "torchvision.models.convnext.CNBlock": {"layer_scale": 1e-6},
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": {"logit_scale": math.log(10)},
}
#: Parameters that start from a truncated normal distribution of standard deviation 0.02.
_NORMAL = {
    "timm.models.cait.Cait": ("cls_token",),
    "timm.models.mvitv2.MultiScaleAttention": ("rel_pos_h", "rel_pos_w"),
    "timm.models.xcit.Xcit": ("cls_token",),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": ("relative_position_bias_table",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("relative_position_bias_table",),
}
#: Methods that make a buffer anew.
_METHODS = {
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": "define_relative_position_bias_table",
}


def initialise_as_constructor(module: Any) -> None:
    """Initialise those tensors of a module, and of none of its parts, that the tables of this file name."""
    for cls in type(module).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in _METHODS:
            getattr(module, _METHODS[name])()
        for parameter, value in _CONSTANTS.get(name, {}).items():
            if getattr(module, parameter) is not None:
                nn.init.constant_(getattr(module, parameter), value)
        for parameter in _NORMAL.get(name, ()):
            if getattr(module, parameter, None) is not None:  # a subclass may do without
                nn.init.trunc_normal_(getattr(module, parameter), std=0.02)
