"""Modules over the ops, and ``fuse``, which runs those of a network by them."""

from __future__ import annotations

from .batch_norm_act import BatchNormAct1d, BatchNormAct2d
from .chain import FusedSequential, run_chain
from .deferred import Deferred, deferred, give_memory
from .fusable import must_be_eager
from .fuse import FusionReport, eager_type, fuse, unfuse
from .gathered import gathered, gathered_features, gathering
from .norm_act_conv import norm_act_conv
from .norm_shortcut_act import Branch, norm_shortcut_act
from .pooled_linear import PooledLinear
from .pooling import global_average_pool
from .recompute import recomputed
from .residual import FusedResidual
from .sharding import in_process_group, is_sharded, own_part, refuse_sharding, shard_like, sharded
from .synced_norm import sync_batch_norm, synced_statistics, unsync_batch_norm
from .waiting import waiting_for

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "Branch",
    "Deferred",
    "FusedResidual",
    "FusedSequential",
    "FusionReport",
    "PooledLinear",
    "deferred",
    "eager_type",
    "fuse",
    "gathered",
    "gathered_features",
    "gathering",
    "give_memory",
    "global_average_pool",
    "in_process_group",
    "is_sharded",
    "must_be_eager",
    "norm_act_conv",
    "norm_shortcut_act",
    "own_part",
    "recomputed",
    "refuse_sharding",
    "run_chain",
    "shard_like",
    "sharded",
    "sync_batch_norm",
    "synced_statistics",
    "unfuse",
    "unsync_batch_norm",
    "waiting_for",
]
