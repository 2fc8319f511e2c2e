"""Parts of which learning rules are composed: sampling, fresh blocks, heads and context encoders."""

from .blocks import BlockFactory, make_block
from .context import ContextSupply, ImageEncoder, InputEncoder, parse_context
from .heads import CONV_HEADS, AuxiliaryNetwork, Head, LinearHead, VGGHead, conv_head
from .sampling import inferred_strides, pyramid_depth, sampled_layers

__all__ = [
    "CONV_HEADS",
    "AuxiliaryNetwork",
    "BlockFactory",
    "ContextSupply",
    "Head",
    "ImageEncoder",
    "InputEncoder",
    "LinearHead",
    "VGGHead",
    "conv_head",
    "inferred_strides",
    "make_block",
    "parse_context",
    "pyramid_depth",
    "sampled_layers",
]
