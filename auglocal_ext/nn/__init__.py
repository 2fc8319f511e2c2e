"""Modules over the ops, and how modules are run."""

from __future__ import annotations

from .pooled_linear import PooledLinear
from .recompute import recomputed

__all__ = ["PooledLinear", "recomputed"]
