"""Providers made of torch's own kernels."""
