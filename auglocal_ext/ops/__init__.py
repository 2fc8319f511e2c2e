"""The ops: each a function of one file, with the providers reference, aten, cpu, cuda and triton behind it."""

from __future__ import annotations

from . import trials  # noqa: F401
from .batch_norm_act import (
    batch_norm_act,
    batch_norm_act_apply,
    batch_norm_act_input_grad,
    batch_norm_act_reduce,
    batch_norm_factors,
    batch_norm_stats,
)
from .batch_norm_act_max_pool import (
    batch_norm_act_max_pool,
    batch_norm_act_max_pool_apply,
    batch_norm_act_max_pool_input_grad,
    batch_norm_act_max_pool_reduce,
)
from .deferred import raise_deferred_errors
from .labels import check_labels
from .layer_norm import layer_norm
from .linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .pooled_cross_entropy import PooledCrossEntropy, pooled_cross_entropy
from .reconstruction_loss import reconstruction_loss
from .similarity_loss import similarity_loss
from .supervised_contrast import supervised_contrast

__all__ = [
    "LinearCrossEntropy",
    "PooledCrossEntropy",
    "batch_norm_act",
    "batch_norm_act_apply",
    "batch_norm_act_input_grad",
    "batch_norm_act_max_pool",
    "batch_norm_act_max_pool_apply",
    "batch_norm_act_max_pool_input_grad",
    "batch_norm_act_max_pool_reduce",
    "batch_norm_act_reduce",
    "batch_norm_factors",
    "batch_norm_stats",
    "check_labels",
    "layer_norm",
    "linear_cross_entropy",
    "pooled_cross_entropy",
    "raise_deferred_errors",
    "reconstruction_loss",
    "similarity_loss",
    "supervised_contrast",
]
