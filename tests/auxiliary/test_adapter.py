"""An adapter maps features to those of another shape, by pooling and a pointwise map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.auxiliary.adapter import Adapter, adapter
from auglocal_ext.layers import Features

MAP, LAST, TOKEN = "channels_first", "channels_last", "class_token"


@pytest.mark.parametrize(
    ("source", "target", "parts"),
    [
        (Features((4, 8, 8)), Features((4, 4, 2)), {"pool": nn.AvgPool2d}),
        (Features((4, 7, 7)), Features((6, 4, 4)), {"pool": nn.AdaptiveAvgPool2d, "project": nn.Conv2d}),
        (Features((4, 4, 4)), Features((6, 4, 4)), {"project": nn.Conv2d}),
        (Features((4, 2, 2)), Features((4, 4, 4)), {"pool": nn.AdaptiveAvgPool2d}),
        (Features((4, 8)), Features((6, 4)), {"pool": nn.AvgPool1d, "project": nn.Conv1d}),
        (Features((4, 4, 4, 4)), Features((6, 2, 2, 2)), {"pool": nn.AvgPool3d, "project": nn.Conv3d}),
        (Features((8, 8, 4), LAST), Features((4, 4, 6), LAST), {"pool": nn.AvgPool2d, "project": nn.Linear}),
        (Features((4, 8, 8)), Features((8, 8, 4), LAST), {}),
        (Features((8, 8, 4), LAST), Features((6, 8, 8)), {"project": nn.Conv2d}),
        (Features((16, 4), LAST), Features((4, 6), LAST), {"pool": nn.AvgPool1d, "project": nn.Linear}),
        (Features((17, 4), TOKEN), Features((5, 6), TOKEN), {"pool": nn.AvgPool1d, "project": nn.Linear}),
        (Features((4, 4, 4)), Features((17, 6), TOKEN), {"project": nn.Linear}),
        (Features((16, 4), LAST), Features((4, 4, 4)), {}),
        (Features((4, 4, 4)), Features((6,)), {"project": nn.Linear}),
        (Features((17, 4), TOKEN), Features((6,)), {"project": nn.Linear}),
        (Features((4,)), Features((6,)), {"project": nn.Linear}),
    ],
    ids=str,
)
def test_adapters(source, target, parts):
    made = adapter(source, target)
    assert {name: type(part) for name, part in made.named_children()} == parts
    h = torch.randn(2, *source.shape, requires_grad=True)
    out = made(h)
    assert out.shape == (2, *target.shape)
    out.sum().backward()
    assert h.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Features((4, 8, 8)), Features((4, 8, 8))),
        (Features((17, 4), TOKEN), Features((17, 4), LAST)),
        (Features((4,)), Features((4,), LAST)),
    ],
)
def test_alike_features_need_none(source, target):
    assert adapter(source, target) is None


def test_values():
    h = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(Adapter(Features((4, 8, 8)), Features((4, 4, 4)))(h), F.avg_pool2d(h, 2))
    torch.testing.assert_close(Adapter(Features((4, 8, 8)), Features((4,)))(h), h.mean((2, 3)))
    rows = Adapter(Features((4, 8, 8)), Features((64, 4), LAST))(h)
    torch.testing.assert_close(rows, h.flatten(2).transpose(1, 2))
    torch.testing.assert_close(Adapter(Features((64, 4), LAST), Features((4, 8, 8)))(rows), h)
    made = Adapter(Features((4, 8, 8)), Features((65, 4), TOKEN))(h)
    torch.testing.assert_close(made, torch.cat([rows.mean(1, keepdim=True), rows], 1))
    pooled = Adapter(Features((65, 4), TOKEN), Features((33, 4), TOKEN))(made)
    torch.testing.assert_close(pooled[:, 0], made[:, 0])
    torch.testing.assert_close(pooled[:, 1:], (rows[:, ::2] + rows[:, 1::2]) / 2)
    torch.testing.assert_close(Adapter(Features((65, 4), TOKEN), Features((4,)))(made), made[:, 0])
    torch.testing.assert_close(Adapter(Features((65, 4), TOKEN), Features((64, 4), LAST))(made), rows)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Features((4,)), Features((4, 8, 8))),
        (Features((12, 4), LAST), Features((4, 4, 4))),
        (Features((1, 2, 2, 2, 4), LAST), Features((1, 2, 2, 1, 4), LAST)),
        (Features((4, 2, 2, 2, 2)), Features((5, 2, 2, 2, 2))),
    ],
    ids=str,
)
def test_what_does_not_follow_is_refused(source, target):
    with pytest.raises(ValueError, match="cannot be made into|there is no (pooling|convolution)"):
        adapter(source, target)
