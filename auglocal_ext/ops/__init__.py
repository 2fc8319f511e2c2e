"""The ops: each a function of one file, with the providers reference, cpu, cuda and triton behind it."""

from __future__ import annotations

from .labels import check_labels, raise_deferred_errors
from .pooled_cross_entropy import PooledCrossEntropy, pooled_cross_entropy

__all__ = ["PooledCrossEntropy", "check_labels", "pooled_cross_entropy", "raise_deferred_errors"]
