"""Heads: the rules that end an auxiliary network, by themselves or after another rule's blocks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..auxiliary.base import LossSettings
from ..auxiliary.blocks import fresh_norm
from ..auxiliary.heads import AuxiliaryNetwork, Head
from ..layers import Features, padded_pooling, pooled_size, pooling, vectors
from ..models.blocks import conv_bn_relu
from .base import HEADS, Network, Rule, resolved
from .options import option

#: Kinds of :class:`ConvHead`.
CONV_HEADS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")


def widened(width: int, factor: float) -> int:
    """``int(width * factor)``, as released code has it; ValueError if that is none, or beyond 2^31."""
    if width * factor >= 2**31:  # torch's own error would come with the frames of its C++ stack
        raise ValueError(f"widen={factor:g} makes {width * factor:.3g} of {width} channels; take less")
    if int(width * factor) < 1:
        raise ValueError(f"widen={factor:g} leaves none of {width} channels; take at least {1 / width:.3g}")
    return int(width * factor)


def refuse_pooling(network: Network, head: str) -> None:
    """ValueError if the task's outputs have positions, which ``head`` pools."""
    if network.task.keeps_positions:
        raise ValueError(
            f"{head} pools tokens to one vector, but {network.task} has an output for every token; take 'linear', "
            "'0c2f', or AugLocal"
        )
    if network.task.dense:
        raise ValueError(
            f"{head} pools features to one vector, but {network.task} has an output for every position; take a head "
            f"that keeps positions: 'linear', 'fcn', {', '.join(map(repr, CONV_HEADS))}, or AugLocal"
        )


def alone(head: Head) -> AuxiliaryNetwork:
    """A head without blocks before it."""
    return AuxiliaryNetwork(nn.Sequential(), head)


@dataclass(frozen=True)
class LinearHead(Rule):
    """``W mean_p(h) + b``: pooled over the positions (of a class token, it alone), then a linear layer.

    For a task whose outputs have positions nothing is pooled, and the linear layer is at every position. For language
    modelling it is the network's own readout, fresh: a normalisation of the kind of the network's last LayerNorm or
    RMSNorm (LayerNorm if it has none), and a linear layer with a bias if the network's last one has one.

    Args:
        norm: a BatchNorm before the linear layer.

    Raises:
        ValueError: when wrapped, for ``norm`` in language modelling: its statistics are over all positions.
    """

    norm: bool = False

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        features, settings = network.features(module), network.settings(module)
        if not network.task.keeps_positions:
            return alone(_Linear(features, settings, self.norm))
        if self.norm:
            raise ValueError(
                f"a BatchNorm has statistics over all positions, and {network.task} needs an output at each that comes "
                "from no later one: leave norm out (of AugLocal: single_layer_norm)"
            )
        linear = [part for part in _last_parts(network) if isinstance(part, nn.Linear)]
        bias = not linear or linear[-1].bias is not None
        return alone(Readout(features, settings, readout_norm(network, features.channels), bias))


class Readout(Head):
    """``W norm(h) + b`` at every position.

    Args:
        features: those of ``h``, tokens.
        settings: of a task whose outputs have positions.
        norm: a normalisation of each token; None: there is none.
        bias: whether the linear layer has one.
    """

    def __init__(self, features: Features, settings: LossSettings, norm: nn.Module | None, bias: bool) -> None:
        super().__init__(settings)
        self.read = features
        self.norm = norm
        self.linear = nn.Linear(features.channels, settings.task.outputs, bias)

    def features(self, h: Tensor) -> Tensor:
        return h if self.norm is None else self.norm(h)


def is_token_norm(part: nn.Module) -> bool:
    """Whether a module is torch's LayerNorm or RMSNorm over the last axis."""
    kinds = (nn.LayerNorm, nn.RMSNorm)
    return type(part) in kinds and isinstance(part, kinds) and len(part.normalized_shape) == 1


def readout_norm(network: Network, width: int) -> nn.Module:
    """A fresh normalisation of tokens of the kind of the network's last LayerNorm or RMSNorm; LayerNorm without one."""
    norms = [part for part in _last_parts(network) if is_token_norm(part)]
    made = fresh_norm(norms[-1], width) if norms else None
    return nn.LayerNorm(width) if made is None else made


def _last_parts(network: Network) -> list[nn.Module]:
    return [part for child in network.children_of(network.layers[-1]) for part in child.modules()]


class _Linear(Head):
    def __init__(self, features: Features, settings: LossSettings, norm: bool) -> None:
        super().__init__(settings)
        self.read = _read(features, features.channels, settings) if norm else features
        self._pooled = features
        self.norm = nn.BatchNorm1d(features.channels) if norm else None
        self.linear = nn.Linear(features.channels, settings.task.outputs)

    def features(self, h: Tensor) -> Tensor:
        if self.norm is None:
            return h
        if not self.settings.task.dense:
            return self.norm(self._pooled.pooled(h))
        h = self._pooled.channels_first(h)
        return self.norm(h.flatten(2)).reshape(h.shape) if h.dim() > 2 else self.norm(h)


def _read(features: Features, width: int, settings: LossSettings) -> Features:
    """What the last layer receives from a head of ``features`` and hidden layers of ``width``."""
    return Features((width, *features.positions)) if settings.task.dense else vectors(width)


@dataclass(frozen=True)
class ConvHead(Rule):
    """The local classifiers ``<a>c<b>f`` of InfoPro and ContSup: a convolutions, pooling, b linear layers.

    The first convolution (3x3, no bias, BatchNorm, ReLU) doubles the width with stride 2, or keeps the width of the
    network's last stage with stride 1; hidden linear layers have ``feature_dim`` features and ReLU. ``widen``
    multiplies both. For a task whose outputs have positions nothing is pooled, and the linear layers are at every
    position.

    Args:
        kind: one of ``0c1f`` (greedy local learning), ``0c2f``, ``1c1f``, ``1c2f`` (the default of both papers),
            ``1c3f``, ``2c2f``.
        widen: width factor (``aux_net_widen`` in the released code).
        feature_dim: features of the hidden linear layers.

    Raises:
        ValueError: for another kind, or a factor that is not positive; when wrapped, for convolutions on anything but
            maps with height and width.
    """

    kind: str = "1c2f"
    widen: float = option(1.0, "width factor", above=0)
    feature_dim: int = option(128, "features of the hidden linear layers", least=1)

    def __post_init__(self) -> None:
        if self.kind not in CONV_HEADS:
            raise ValueError(f"unknown auxiliary head {self.kind!r}; choose one of {', '.join(CONV_HEADS)}")
        super().__post_init__()
        unread = self.unread_of(self.kind)
        if (self.widen != 1 and "widen" in unread) or (self.feature_dim != 128 and "feature_dim" in unread):
            raise ValueError(
                f"head {self.kind!r} reads no {' and no '.join(unread)}; got widen={self.widen} and "
                f"feature_dim={self.feature_dim}"
            )

    @staticmethod
    def unread_of(kind: str) -> tuple[str, ...]:
        """Options that a kind does not use: hidden linear layers use both, convolutions only ``widen``."""
        if not kind.endswith("1f"):
            return ()
        return ("widen", "feature_dim") if kind.startswith("0c") else ("feature_dim",)

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        features, settings = network.features(module), network.settings(module)
        match = re.fullmatch(r"(\d)c(\d)f", self.kind)
        assert match is not None
        num_convs, num_linear = int(match[1]), int(match[2])
        if num_convs and not features.is_2d:
            raise ValueError(
                f"head {self.kind!r} needs feature maps with height and width, but local module {module} puts out "
                f"{features}; use a head without convolutions: '0c1f' or '0c2f'"
            )
        width = features.channels
        blocks: list[nn.Module] = []
        for i in range(num_convs):
            if i == 0:
                base = min(2 * width, max(width, network.last_width))
                out, stride = widened(base, self.widen), 2 if base > width else 1
                blocks.append(to_channels_first(features, conv_bn_relu(width, out, stride=stride)))
                width = out
            else:
                blocks.append(conv_bn_relu(width, width))
        if num_convs:
            features = Features((width, *features.positions))  # of other sizes, which pooling does not ask for
        if num_linear == 1:
            head: Head = _Linear(features, settings, norm=False)
        else:
            head = _Hidden(features, widened(self.feature_dim, self.widen), num_linear - 1, settings)
        return AuxiliaryNetwork(nn.Sequential(*blocks), head)


def unread_widths(head: Rule | str) -> tuple[str, ...]:
    """Of a rule's ``widen`` and ``feature_dim``, those that its ``head`` does not use.

    A rule as head has options of its own.
    """
    if isinstance(head, str) and head in CONV_HEADS:
        return ConvHead.unread_of(head)
    return ("widen", "feature_dim")


def why_unread(head: Rule | str) -> str:
    """The reason for :func:`unread_widths`, for messages."""
    if isinstance(head, str) and head in CONV_HEADS:
        return f"head {head!r} has no layers of such a width"
    return f"head={head!r} has options of its own, such as ConvHead('1c2f', widen=2)"


def sized_head(head: Rule | str, widen: float, feature_dim: int | None) -> Rule:
    """The rule that ``head`` is or names; a name in ``CONV_HEADS`` with these widths, where it has such layers."""
    unread = unread_widths(head)
    if len(unread) == 2:
        return resolved(head)
    assert isinstance(head, str)
    return ConvHead(head, widen, 128 if feature_dim is None or "feature_dim" in unread else feature_dim)


class _Hidden(Head):
    """Pooling, linear layers with ReLU, and the last linear layer."""

    def __init__(self, features: Features, hidden: int, num_hidden: int, settings: LossSettings) -> None:
        super().__init__(settings)
        self._pooled = features
        parts: list[nn.Module] = []
        width = features.channels
        for _ in range(num_hidden):
            parts += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
            width = hidden
        self.hidden = nn.Sequential(*parts)
        self.read = _read(features, width, settings)
        self.linear = nn.Linear(width, settings.task.outputs)

    def features(self, h: Tensor) -> Tensor:
        if self.settings.task.dense:
            return self.hidden(self._pooled.channels_first(h).movedim(1, -1)).movedim(-1, 1)
        return self.hidden(self._pooled.pooled(h))


class _ChannelsFirst(nn.Module):
    """A view of channels-last maps with the channels first."""

    def forward(self, h: Tensor) -> Tensor:
        return h.movedim(-1, 1)


def to_channels_first(features: Features, block: nn.Module) -> nn.Module:
    """``block`` on features of any layout."""
    return block if features.layout == "channels_first" else nn.Sequential(_ChannelsFirst(), block)


@dataclass(frozen=True)
class VGGHead(Rule):
    """Flatten, average pool of the flat vector to 512, twice (linear 512, BatchNorm, ReLU), linear.

    The pooling runs along the flattened ``C*H*W`` vector.

    Raises:
        ValueError: when wrapped, for a task whose outputs have positions.

    Source: AugLocal's released ImageNet VGG networks.
    """

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        refuse_pooling(network, "head 'vgg'")
        return alone(_VGG(network.features(module), network.settings(module)))


class _VGG(Head):
    def __init__(self, features: Features, settings: LossSettings) -> None:
        super().__init__(settings)
        self._flat = features
        self.pool = nn.AdaptiveAvgPool1d(512)
        self.hidden = nn.Sequential(
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
        )
        self.read = vectors(512)
        self.linear = nn.Linear(512, settings.task.outputs)

    def features(self, h: Tensor) -> Tensor:
        flat = self._flat.seen(h).flatten(1)
        return self.hidden(self.pool(flat.unsqueeze(1)).squeeze(1))


@dataclass(frozen=True)
class PredictionHead(Rule):
    """PredSim's classifier: average pool until at most ``limit`` features are left, flatten, linear from zeros.

    The longest axis of positions is halved in turn; tokens have one.

    Args:
        limit: largest number of features (``dim_in_decoder`` in the released code); channels are never pooled.
        zero_padding: pool windows of a power of two over positions padded with zeros, as the released code does, rather
            than adaptively. It changes only axes whose size is no multiple of their window.
        init: the linear layer starts from zeros (``"own"``), from weights of 0 and torch's random biases
            (``"released"``), or as torch makes it (``"auglocal"``: AugLocal's version of PredSim).

    Raises:
        ValueError: for a limit below 1 or an unknown ``init``; when wrapped, for features of more than three position
            axes, and for a task whose outputs have positions.

    Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019.
    """

    limit: int = option(2048, "largest number of features", least=1)
    zero_padding: bool = option(False, "pool over positions padded with zeros")
    init: str = option("own", "initial values", choices=("own", "released", "auglocal"))

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        refuse_pooling(network, "PredSim's prediction layer")
        return alone(_Prediction(self, network.features(module), network.settings(module)))


class _Prediction(Head):
    def __init__(self, rule: PredictionHead, features: Features, settings: LossSettings) -> None:
        super().__init__(settings)
        self._map = features
        size = pooled_size(features.channels, features.seen_positions, rule.limit)
        make = padded_pooling if rule.zero_padding else pooling
        pool = make(features.seen_positions, size)
        if pool is None:
            raise ValueError(f"PredSim's prediction layer pools maps of 1 to 3 axes, not {features}")
        self.pool = pool
        width = features.channels * math.prod(size)
        self.read = vectors(width)
        self.linear = nn.Linear(width, settings.task.outputs)
        if rule.init != "auglocal":
            nn.init.zeros_(self.linear.weight)
        if rule.init == "own":
            nn.init.zeros_(self.linear.bias)

    def features(self, h: Tensor) -> Tensor:
        return self.pool(self._map.seen(h))


HEADS |= {
    "linear": LinearHead,
    **{kind: partial(ConvHead, kind) for kind in CONV_HEADS},
    "vgg": VGGHead,
}
