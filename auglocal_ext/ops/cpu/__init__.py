"""Ops whose compiled kernels are called from Python. A module here is imported when its op first runs."""
