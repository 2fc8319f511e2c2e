"""Transformer layers before and after ``fuse``, what they return, and what they keep."""

from __future__ import annotations

import copy

import torch
from kept import saved_bytes
from torch import nn

from auglocal_ext import fuse

WIDTH = 8


class Reads(nn.Module):
    """A normalisation, read by ``readers`` linear layers, each after what stands between."""

    def __init__(self, norm, between=(), readers=3):
        super().__init__()
        self.norm = norm
        self.between = nn.Sequential(*between)
        self.readers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i != 1) for i in range(readers))

    def forward(self, x):
        y = self.between(self.norm(x))
        return sum((reader(y) * (i + 1)).sin() for i, reader in enumerate(self.readers))


def pair(make, dtype=torch.float64):
    torch.manual_seed(0)
    theirs = make()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    report = fuse(ours)
    assert report.fused and not report.left
    return ours, theirs


def tokens(dtype=torch.float64, shape=(2, 5, WIDTH)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def results(module, x, call=lambda module, x: module(x), autocast=False):
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(module, x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
    for tensor in wanted:
        tensor.grad = None
    out.backward(grad)
    return [out.detach(), *(tensor.grad for tensor in wanted)]


def assert_same(ours, theirs, x, tolerance=1e-12, **options):
    for found, expected in zip(results(ours, x, **options), results(theirs, x, **options), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def widths(module, x, call=lambda module, x: module(x)):
    """What ``call(module, x)`` keeps beside parameters and x, in tensors as x."""
    x = x.detach().requires_grad_()
    return (saved_bytes(lambda: call(module, x), module) - x.untyped_storage().nbytes()) / (
        x.numel() * x.element_size()
    )
