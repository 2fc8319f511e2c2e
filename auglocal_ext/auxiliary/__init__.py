"""Parts of which learning rules are composed: sampling, fresh blocks, heads, local losses and context encoders."""

from .adapter import Adapter
from .base import Auxiliary, LossContext, LossSettings, Part
from .blocks import BlockFactory, make_block
from .context import ContextSupply, ImageEncoder, InputEncoder, parse_context, supplied_inputs
from .followed import Followed
from .fresh import fresh_copy
from .heads import AuxiliaryNetwork, Head, preceded
from .objectives import Objectives, ReconstructionLoss, SimilarityLoss, Term
from .sampling import inferred_strides, pyramid_depth, sampled_layers

__all__ = [
    "Adapter",
    "Auxiliary",
    "AuxiliaryNetwork",
    "BlockFactory",
    "ContextSupply",
    "Followed",
    "Head",
    "ImageEncoder",
    "InputEncoder",
    "LossContext",
    "LossSettings",
    "Objectives",
    "Part",
    "ReconstructionLoss",
    "SimilarityLoss",
    "Term",
    "fresh_copy",
    "inferred_strides",
    "make_block",
    "parse_context",
    "preceded",
    "pyramid_depth",
    "sampled_layers",
    "supplied_inputs",
]
