"""The layers of a network: which children form one, of what kind it is, and what it hands on."""

from .features import LAYOUTS, Features, Layout, padded_pooling, pooled_size, pooling, vectors
from .groups import (
    classifier_start,
    evaluating,
    first_leaves,
    group_children,
    has_parameters,
    is_elementwise,
    leaves,
    modules_of,
    nesting_hint,
    probe_input,
    starts_layer,
)
from .layer import SAY_LAYOUT, Described, Layer, LayoutChoice, describe
from .observe import Handed, observe
from .readout import split_readout
from .residual import Residual, ResidualFinder

__all__ = [
    "LAYOUTS",
    "SAY_LAYOUT",
    "Described",
    "Features",
    "Handed",
    "Layer",
    "Layout",
    "LayoutChoice",
    "Residual",
    "ResidualFinder",
    "classifier_start",
    "describe",
    "evaluating",
    "first_leaves",
    "group_children",
    "has_parameters",
    "is_elementwise",
    "leaves",
    "modules_of",
    "nesting_hint",
    "observe",
    "padded_pooling",
    "pooled_size",
    "pooling",
    "probe_input",
    "split_readout",
    "starts_layer",
    "vectors",
]
