"""Modules over the ops."""

from __future__ import annotations

from .pooled_linear import PooledLinear

__all__ = ["PooledLinear"]
