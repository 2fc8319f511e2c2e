"""Heads and context encoders: counts of the papers, shapes, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from auglocal_ext.auxiliary import CONV_HEADS, ContextSupply, LinearHead, VGGHead, conv_head, parse_context


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("width", "parameters"), [(16, 10_186), (32, 28_170), (64, 46_602)])
def test_1c2f_has_the_published_size(width, parameters):
    head = conv_head("1c2f", width, 64, 10)
    assert count(head) == parameters
    conv = head.blocks[0].conv
    assert conv.stride == ((2, 2) if width < 64 else (1, 1))


@pytest.mark.parametrize("config", CONV_HEADS)
@pytest.mark.parametrize("widen", [1.0, 2.0])
def test_conv_heads(config, widen):
    head = conv_head(config, 16, 64, 10, widen=widen, feature_dim=24)
    convs = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    linears = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    assert (len(convs), len(linears)) == (int(config[0]), int(config[2]))
    assert all(c.out_channels == int(32 * widen) for c in convs)
    assert all(m.out_features == int(24 * widen) for m in linears[:-1])
    x, y = torch.randn(4, 16, 8, 8, requires_grad=True), torch.randint(0, 10, (4,))
    logits = head(x)
    result = head.loss(x, y)
    torch.testing.assert_close(result.loss, F.cross_entropy(logits, y))
    torch.testing.assert_close(result.logits, logits.detach())


def test_conv_head_errors():
    with pytest.raises(ValueError, match="unknown auxiliary head '3c1f'"):
        conv_head("3c1f", 16, 64, 10)
    with pytest.raises(ValueError, match="needs a feature map"):
        conv_head("1c1f", 16, 64, 10, is_map=False)


def test_linear_head_norm_and_vgg_head():
    y = torch.randint(0, 5, (6,))
    for head, x in (
        (LinearHead(8, 5, norm=True), torch.randn(6, 8, 4, 4)),
        (VGGHead(5), torch.randn(6, 32, 7, 7)),
    ):
        twin = F.cross_entropy(head(x), y)
        torch.testing.assert_close(head.loss(x, y).loss, twin)
    assert isinstance(LinearHead(8, 5, norm=True).norm, torch.nn.BatchNorm1d)
    assert count(VGGHead(1000)) == 2 * (512 * 512 + 512 + 1024) + 513_000


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("R0", (0, False)),
        ("E", (0, True)),
        ("R1", (1, False)),
        ("R1E", (1, True)),
        ("R16", (16, False)),
        ("R4E", (4, True)),
    ],
)
def test_parse_context(text, parsed):
    assert parse_context(text) == parsed


@pytest.mark.parametrize("text", ["", "r1", "ER1", "R", "R1EE", None, 3])
def test_parse_context_errors(text):
    with pytest.raises(ValueError, match="unknown context structure"):
        parse_context(text)


@pytest.mark.parametrize(("channels", "parameters"), [(16, 2136), (32, 3912), (64, 7464)])
def test_image_encoder_size(channels, parameters):
    assert count(ContextSupply(channels, [3], 0, True)) == parameters


def test_nothing_is_built_that_is_not_used():
    supply = ContextSupply(32, [3], 1, True)  # R1E after the first module: the image is there already
    assert supply.sources == () and len(supply.inputs) == 0
    assert ContextSupply(32, [3, 16, 16, 32], 2, True).sources == (3, 2)
    assert ContextSupply(32, [3, 16, 16, 32], 16, True).sources == (3, 2, 1)
    assert ContextSupply(32, [3, 16, 16, 32], 16, False).sources == (3, 2, 1, 0)
    assert ContextSupply(32, [3, 16], 1, False).image is None


def test_supply_adds_and_writes_nothing():
    supply = ContextSupply(8, [3, 4], 2, False)
    history = [torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)]
    h = torch.randn(2, 8, 4, 4)
    copies = [t.clone() for t in (*history, h)]
    merged = supply(h, history)
    expected = h + sum(
        F.adaptive_avg_pool2d(encoder.encoder(history[i]), 4)
        for i, encoder in zip(supply.sources, supply.inputs, strict=True)
    )
    torch.testing.assert_close(merged, expected)
    for tensor, copy in zip((*history, h), copies, strict=True):
        assert torch.equal(tensor, copy)
