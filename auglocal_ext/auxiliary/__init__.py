"""Parts of which learning rules are composed: sampling, fresh blocks, heads, local losses and context encoders."""

from ..ops.supervised_contrast import supervised_contrast
from .base import Auxiliary, LocalLoss
from .blocks import BlockFactory, make_block
from .context import ContextSupply, ImageEncoder, InputEncoder, parse_context
from .heads import (
    CONV_HEADS,
    DGL_HEADS,
    AuxiliaryNetwork,
    DGLHead,
    Head,
    LinearHead,
    PredictionHead,
    VGGHead,
    conv_head,
)
from .objectives import (
    ContrastiveNetwork,
    Objectives,
    ReconstructionLoss,
    SimilarityLoss,
    Term,
)
from .sampling import inferred_strides, pyramid_depth, sampled_layers

__all__ = [
    "CONV_HEADS",
    "DGL_HEADS",
    "Auxiliary",
    "AuxiliaryNetwork",
    "BlockFactory",
    "ContextSupply",
    "ContrastiveNetwork",
    "DGLHead",
    "Head",
    "ImageEncoder",
    "InputEncoder",
    "LinearHead",
    "LocalLoss",
    "Objectives",
    "PredictionHead",
    "ReconstructionLoss",
    "SimilarityLoss",
    "Term",
    "VGGHead",
    "conv_head",
    "inferred_strides",
    "make_block",
    "parse_context",
    "pyramid_depth",
    "sampled_layers",
    "supervised_contrast",
]
