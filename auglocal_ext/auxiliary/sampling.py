"""Which later layers an auxiliary network is made of, how many, and with which strides (AugLocal)."""

from __future__ import annotations

from collections.abc import Sequence


def sampled_layers(layer: int, num_layers: int, count: int) -> list[int]:
    """Uniformly sampled later layers: ``round(l + (L - 1 - l) / m * i)`` for i = 1..m, rounding half to even.

    Args:
        layer: l, index of the layer the auxiliary network is attached to, from 0.
        num_layers: L, number of layers of the network.
        count: m, number of sampled layers (the paper's d without the classifier). With m >= L - 1 - l all
            later layers are taken.

    Returns:
        Ascending layer indices; the last one is L - 1 whenever there is one.

    Source: AugLocal (ICLR 2024), section 3.2 and Figure 2; Python's half-to-even rounding is part of the rule.
    """
    later = num_layers - 1 - layer
    if count >= later:
        return list(range(layer + 1, num_layers))
    return [round(layer + later / count * i) for i in range(1, count + 1)]


def pyramid_depth(module: int, num_modules: int, count: int, slope: float) -> int:
    """Pyramidal depth ``max(1, round(m (1 - tau k / (K - 2)) + tau k / (K - 2)))``, rounding half to even.

    Args:
        module: k, index of the local module, 0 .. K - 2 (the last module has no auxiliary network).
        num_modules: K, number of local modules. With K <= 2 there is nothing to taper and the depth is m.
        count: m, sampled layers of the first auxiliary network; 0 stays 0.
        slope: tau in [0, 1]; 0 gives every auxiliary network m layers, 1 tapers to one layer.

    Source: AugLocal (ICLR 2024), section 3.3; tau = 0.5 in its CIFAR experiments.
    """
    if num_modules <= 2 or count == 0:
        return count
    fraction = slope * module / (num_modules - 2)
    return max(1, round(count * (1 - fraction) + 1 * fraction))


def inferred_strides(width: int, widths: Sequence[int]) -> list[int]:
    """Stride of each sampled residual block, inferred from base widths alone.

    Each doubling of the width owes one downsampling; a block pays at most one (stride 2), the rest carries over
    to the next block, and what is owed after the last block is dropped.

    Args:
        width: base width of the feature map the auxiliary network starts from.
        widths: base widths of the sampled layers, not narrowing.

    Source: AugLocal's released networks.
    """
    strides, owed = [], 0
    for target in widths:
        owed += (target // width).bit_length() - 1
        width = target
        stride = 2 if owed >= 1 else 1
        owed -= stride - 1
        strides.append(stride)
    return strides
