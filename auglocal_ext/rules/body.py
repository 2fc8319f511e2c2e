"""The body of a layer, of which rules make a copy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import (
    Features,
    Handed,
    evaluating,
    first_leaves,
    has_parameters,
    leaves,
    observe,
    probe_input,
    starts_layer,
)
from .base import Network


def body(network: Network, index: int, rule: str) -> tuple[nn.Module, Features]:
    """Layer ``index`` as a block of the network's own modules, and what it puts out.

    The classifier is left out, and a tail of pooling and flattening that ends the map: of the last layer what follows
    the last weights, from the first part that changes the shape; of another layer that too where it turns a map into
    vectors. A normalisation of what is pooled belongs to the tail.
    """
    layer = network.layers[index]
    network.refuse_gaps(layer, f"{rule} copies")
    children = network.body_of(layer)
    parts = [leaf for child in children for leaf in leaves(child)]
    example = probe_input(network.primary, network.layers[index - 1].shape)

    def failed(part: int, h: Tensor, error: Exception) -> Exception:
        return ValueError(
            f"{rule} copies layer {index} ({layer.what}), which does not take what it receives here, a shape of "
            f"{tuple(h.shape[1:])}. torch says: {error}"
        )

    with evaluating(*parts):
        handed = observe(parts, example, failed)

    count = without_tail(parts, handed, index == len(network.layers) - 1)
    block = nn.Sequential(*first_leaves(children, count))
    return block, features_of(network, index, rule, parts, handed, count)


def without_tail(parts: Sequence[nn.Module], handed: Sequence[Handed], last: bool) -> int:
    """How many of a layer's ``parts``, which hand on ``handed``, stand before a tail that ends the map.

    Args:
        last: whether it is the network's last layer.
    """

    def ends_in_map(part: int) -> bool:
        return starts_layer(parts[part]) or (has_parameters(parts[part]) and _has_positions(handed[part].shape))

    weighted = max((part for part in range(len(parts)) if ends_in_map(part)), default=-1)
    ends_map = len(handed[-1].shape) < len(handed[weighted + 1].shape)
    if not ends_map and not last:
        return len(parts)
    changes = (i for i in range(weighted + 1, len(parts)) if handed[i + 1].shape != handed[weighted + 1].shape)
    return next(changes, len(parts))


def features_of(
    network: Network, index: int, rule: str, parts: Sequence[nn.Module], handed: Sequence[Handed], count: int
) -> Features:
    """What the first ``count`` of the parts of layer ``index`` put out.

    Raises:
        ValueError: where it is unknown which axis holds the channels.
    """
    layer = network.layers[index]
    if count == len(parts) and layer.features is not None and layer.shape == handed[-1].shape:
        return layer.features
    features = handed[count].features(layer.layout)
    if features is None:
        raise ValueError(
            f"{rule} copies layer {index} ({layer.what}) without its pooling and classifier, which puts out a shape of "
            f"{handed[count].shape}, and {handed[count].why_unknown} which axis holds the channels: say layout= for "
            f"layer {index}, take another rule, or fewer modules"
        )
    return features


def _has_positions(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) > 1
