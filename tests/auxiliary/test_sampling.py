"""Sampling, pyramid and strides of AugLocal against the published facts."""

from __future__ import annotations

import itertools

import pytest

from auglocal_ext.auxiliary import inferred_strides, pyramid_depth, sampled_layers


@pytest.mark.parametrize(
    ("layer", "total", "count", "expected"),
    [
        # Figure 2 of the paper, layers counted from 1 there: 1 -> {3, 6, 8}, 2 -> {4, 6, 8}, 3 (two sampled) -> {5, 8}
        (0, 8, 3, [2, 5, 7]),
        (1, 8, 3, [3, 5, 7]),
        (2, 8, 2, [4, 7]),
        (0, 16, 5, [3, 6, 9, 12, 15]),
        (1, 16, 5, [4, 7, 9, 12, 15]),
        (9, 16, 5, [10, 11, 13, 14, 15]),
        (0, 55, 5, [11, 22, 32, 43, 54]),
        (36, 55, 5, [40, 43, 47, 50, 54]),
        (7, 16, 1, [15]),
        (13, 16, 5, [14, 15]),
        (15, 16, 5, []),
        (3, 16, 0, []),
    ],
)
def test_sampled_layers(layer, total, count, expected):
    assert sampled_layers(layer, total, count) == expected


def test_sampled_layers_ascend_and_end_in_the_last():
    for total, count in itertools.product(range(2, 60), range(1, 8)):
        for layer in range(total - 1):
            found = sampled_layers(layer, total, count)
            assert found == sorted(set(found)) and found[0] > layer and found[-1] == total - 1
            assert len(found) == min(count, total - 1 - layer)


@pytest.mark.parametrize(
    ("modules", "count", "runs"),
    [
        (11, 5, [(5, 3), (4, 4), (3, 3)]),
        (12, 4, [(4, 4), (3, 6), (2, 1)]),
        (13, 3, [(3, 6), (2, 6)]),
        (14, 2, [(2, 13)]),
        (50, 5, [(5, 12), (4, 25), (3, 12)]),
        (51, 4, [(4, 17), (3, 32), (2, 1)]),
        (53, 2, [(2, 52)]),
    ],
)
def test_pyramid_of_the_released_networks(modules, count, runs):
    """K = L - m modules of ResNet-32 (L = 16) and ResNet-110 (L = 55), slope 0.5; the last has no auxiliary net."""
    found = [pyramid_depth(k, modules, count, 0.5) for k in range(modules - 1)]
    assert [(depth, len(list(group))) for depth, group in itertools.groupby(found)] == runs


def test_pyramid_edges():
    assert [pyramid_depth(k, 12, 5, 0.0) for k in range(11)] == [5] * 11
    assert pyramid_depth(10, 12, 5, 1.0) == 1
    assert pyramid_depth(0, 2, 5, 0.5) == 5  # K - 2 = 0: nothing to taper
    assert [pyramid_depth(k, 3, 5, 0.5) for k in range(2)] == [5, 3]
    assert pyramid_depth(0, 5, 0, 0.5) == 0


@pytest.mark.parametrize(
    ("width", "widths", "expected"),
    [
        (16, [16, 32, 32, 64, 64], [1, 2, 1, 2, 1]),
        (16, [64], [2]),  # two downsamplings are owed, one block pays one, the other is dropped
        (16, [64, 64], [2, 2]),  # the second carries over
        (64, [128, 256, 256, 512], [2, 2, 1, 2]),
        (64, [512, 512], [2, 2]),
        (32, [32, 32], [1, 1]),
        (64, [96], [1]),
    ],
)
def test_inferred_strides(width, widths, expected):
    assert inferred_strides(width, widths) == expected
