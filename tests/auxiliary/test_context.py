"""Context encoders: counts of the papers, which inputs are supplied, layouts."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from auglocal_ext.auxiliary import ContextSupply, ImageEncoder, InputEncoder, parse_context, supplied_inputs
from auglocal_ext.layers import Features


def count(module):
    return sum(p.numel() for p in module.parameters())


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
    assert count(ContextSupply(Features((channels, 8, 8)), Features((3, 8, 8)), {})) == parameters


def test_nothing_is_supplied_twice():
    assert supplied_inputs(1, 1, True) == ()  # R1E after the first module: the image is there already
    assert supplied_inputs(4, 2, True) == (3, 2)
    assert supplied_inputs(4, 16, True) == (3, 2, 1)
    assert supplied_inputs(4, 16, False) == (3, 2, 1, 0)
    assert supplied_inputs(4, 0, False) == ()


def test_supply_adds_and_writes_nothing():
    shapes = {1: (4, 8, 8), 0: (3, 16, 16)}
    supply = ContextSupply(Features((8, 4, 4)), None, {i: Features(shape) for i, shape in shapes.items()})
    assert supply.image is None and supply.needed == {0, 1}
    history = [torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)]
    h = torch.randn(2, 8, 4, 4)
    copies = [t.clone() for t in (*history, h)]
    merged = supply(h, history)
    expected = h + sum(
        F.adaptive_avg_pool2d(encoder.encoder(history[i]), 4) for i, encoder in zip(shapes, supply.inputs, strict=True)
    )
    torch.testing.assert_close(merged, expected)
    for tensor, copy in zip((*history, h), copies, strict=True):
        assert torch.equal(tensor, copy)


def convolved(encoder, x):
    """Each convolution of an encoder with BatchNorm and ReLU, at the size of ``x``."""
    for conv, norm, _ in zip(*[iter(encoder.encoder)] * 3, strict=True):
        z = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
        x = F.relu(F.batch_norm(z, None, None, norm.weight, norm.bias, training=True))
    return x


def test_an_image_is_encoded_by_two_convolutions_and_an_input_by_one():
    supply = ContextSupply(Features((8, 4, 3)), Features((3, 16, 9)), {1: Features((5, 8, 6))})
    assert supply.needed == {0, 1}
    x, source, h = torch.randn(2, 3, 16, 9), torch.randn(2, 5, 8, 6), torch.randn(2, 8, 4, 3)
    image, (earlier,) = supply.image, supply.inputs
    assert [conv.weight.shape for conv in image.encoder[::3]] == [(12, 3, 3, 3), (8, 12, 3, 3)]
    assert earlier.encoder[0].weight.shape == (8, 5, 1, 1)
    expected = h + F.adaptive_avg_pool2d(convolved(image, x), (4, 3))
    expected = expected + F.adaptive_avg_pool2d(convolved(earlier, source), (4, 3))
    torch.testing.assert_close(supply(h, [x, source]), expected)


def test_encoders_by_themselves_have_12_channels_inside_and_biases_of_zero():
    for encoder in (ImageEncoder(3, 8), InputEncoder(3, 8)):
        convolutions = encoder.encoder[::3]
        assert not any(conv.bias.any() for conv in convolutions)
        assert [conv.out_channels for conv in convolutions] == [12, 8][-len(convolutions) :]


@pytest.mark.parametrize("size", [(4, 3), (8, 3), (2, 9), (4, 4), (3, 3)])
def test_while_compiling_sizes_that_divide_are_pooled_by_a_mean(monkeypatch, size):
    encoder, source, size = InputEncoder(5, 6), torch.randn(2, 5, 8, 9), torch.Size(size)
    with patch.object(F, "adaptive_avg_pool2d", wraps=F.adaptive_avg_pool2d) as pooling:
        expected = encoder(source, size)
        assert pooling.call_count == 1
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(encoder(source, size), expected)
        assert pooling.call_count == (2 if 8 % size[0] or 9 % size[1] else 1)


def test_channels_last_maps_are_supplied_as_channels_first_ones():
    last = ContextSupply(
        Features((4, 4, 8), "channels_last"), Features((3, 16, 16)), {1: Features((8, 8, 4), "channels_last")}
    )
    first = ContextSupply(Features((8, 4, 4)), Features((3, 16, 16)), {1: Features((4, 8, 8))})
    first.load_state_dict(last.state_dict())
    x, source, h = torch.randn(2, 3, 16, 16), torch.randn(2, 8, 8, 4), torch.randn(2, 4, 4, 8)
    found = last(h, [x, source])
    expected = first(h.permute(0, 3, 1, 2), [x, source.permute(0, 3, 1, 2)])
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("shape", [(8,), (16, 8), (8, 4, 4, 4)])
def test_what_has_no_height_and_width_is_refused(shape):
    layout = "channels_last" if len(shape) == 2 else "channels_first"
    with pytest.raises(ValueError, match="needs images and feature maps, not (vectors|16 tokens|maps .* 4 x 4 x 4)"):
        ContextSupply(Features(shape, layout), Features((3, 16, 16)), {})
