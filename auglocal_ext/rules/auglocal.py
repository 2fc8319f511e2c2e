"""AugLocal: auxiliary networks made of uniformly sampled later layers, with pyramidal depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ..auxiliary.blocks import BlockFactory, make_block, output_channels
from ..auxiliary.heads import AuxiliaryNetwork, Head, LinearHead, VGGHead
from ..auxiliary.sampling import inferred_strides, pyramid_depth, sampled_layers
from ..models.blocks import conv_bn_relu
from ..partition import Layer, cut_points
from .base import Network, Rule

Sampling = Literal["uniform", "sequential", "repeated", "conv1x1", "conv3x3"]
SAMPLING: tuple[str, ...] = get_args(Sampling)
_KERNELS = {"conv1x1": 1, "conv3x3": 3}


@dataclass(frozen=True)
class AugLocal(Rule):
    """Each local module is trained through fresh copies of uniformly sampled later layers and a classifier.

    Module k, ending in layer l, gets blocks of the kinds and widths of the layers ``round(l + (L-1-l)/m * i)``,
    i = 1..m, where m tapers over the modules (pyramidal depth). No weight is shared or copied.

    Args:
        depth: d of the paper: sampled layers plus the classifier, so m = d - 1 layers are sampled. 1 samples none
            (a linear classifier on the pooled output: greedy local learning).
        pyramid: slope tau of the pyramidal depth in [0, 1]; 0 gives every module the same depth. 0.5 in the paper.
        joint_tail: with one module per layer (``modules=None``), train the last m + 1 layers as one module
            (K = L - m local modules, as the released CIFAR code) instead of every layer by itself (K = L, as the
            paper's figure and the ImageNet code).
        head: ``"linear"`` (global average pool, linear) or ``"vgg"`` (flatten, pool to 512, two hidden linear
            layers; the head of the released ImageNet VGG).
        single_layer_norm: put a BatchNorm between pooling and linear layer where one layer is sampled, as the CIFAR
            code does and the ImageNet code does not.
        sampling: which layers the auxiliary blocks are modelled on, for the paper's ablation: ``"uniform"``, the
            ``"sequential"`` next ones, the module's own layer ``"repeated"``; or ``"conv1x1"`` or ``"conv3x3"``
            convolutions with BatchNorm and ReLU.
        downsampling: whether the blocks have the widths and strides of the sampled layers, or the module's own width
            and stride 1. None: they do for uniform and sequential sampling. ``"repeated"`` and the convolutions with
            True take those of uniformly sampled layers.
        block: ``factory(in_channels, out_channels, stride, layer)`` that makes the auxiliary blocks instead, for
            layers of a kind not known here.

    Raises:
        ValueError: for depth < 1, a slope outside [0, 1] or an unknown head; when wrapped, for layers no block can
            be made of, for sampled layers narrower than the module's output, and for a network too shallow.

    Source: Ma et al., Scaling Supervised Local Learning with Augmented Auxiliary Networks, ICLR 2024.
    """

    depth: int = 6
    pyramid: float = 0.5
    joint_tail: bool = True
    head: Literal["linear", "vgg"] = "linear"
    single_layer_norm: bool = True
    block: BlockFactory | None = None
    sampling: Sampling = "uniform"
    downsampling: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(
                f"depth is the number of layers of an auxiliary network including its classifier, an integer of at "
                f"least 1; got {self.depth!r}"
            )
        if not 0.0 <= self.pyramid <= 1.0:
            raise ValueError(f"pyramid is the slope of the pyramidal depth, within 0 .. 1; got {self.pyramid!r}")
        if self.head not in ("linear", "vgg"):
            raise ValueError(f"head is 'linear' or 'vgg'; got {self.head!r}")
        if self.sampling not in SAMPLING:
            raise ValueError(f"sampling is one of {', '.join(SAMPLING)}; got {self.sampling!r}")

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        if modules is not None or not self.joint_tail:
            return cut_points(num_layers, modules)
        count = num_layers - (self.depth - 1)
        if count < 2:
            raise ValueError(
                f"AugLocal(depth={self.depth}) trains the last {self.depth} layers as one module, but the network has "
                f"{num_layers} layers, which leaves no layer to be trained locally; choose depth <= {num_layers - 1}, "
                "joint_tail=False, or a number of modules"
            )
        return (*range(count - 1), num_layers - 1)

    def sampled(self, network: Network, module: int) -> list[int]:
        """Indices of the layers sampled for the auxiliary network of local module ``module``."""
        count = pyramid_depth(module, network.num_modules, self.depth - 1, self.pyramid)
        end = network.ends[module]
        if self.sampling == "sequential":
            return list(range(end + 1, min(end + 1 + count, len(network.layers))))
        return sampled_layers(end, len(network.layers), count)

    @property
    def _downsamples(self) -> bool:
        if self.downsampling is None:
            return self.sampling in ("uniform", "sequential")
        return self.downsampling

    def strides(self, network: Network, module: int) -> list[int]:
        """Strides of the auxiliary blocks of local module ``module``.

        Convolution layers (VGG) halve the map once wherever the width changes; residual blocks follow
        :func:`auglocal_ext.auxiliary.inferred_strides`; vectors have none.
        """
        here = network.last_layer(module)
        layers = [network.layers[i] for i in self.sampled(network, module)]
        if not self._downsamples:
            return [1] * len(layers)
        width = here.width
        _refuse_narrowing(here, layers)
        if all(layer.kind == "conv" for layer in layers):
            widths = [layer.width for layer in layers]
            return [2 if a != b else 1 for a, b in zip([width, *widths], widths, strict=False)]
        return inferred_strides(width, [layer.width for layer in layers])

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        here = network.last_layer(module)
        channels, rank = here.shape[0], len(here.shape)
        blocks: list[nn.Module] = []
        for index, stride in zip(self.sampled(network, module), self.strides(network, module), strict=True):
            sampled = network.layers[index]
            model = sampled if self.sampling in ("uniform", "sequential") else here
            sized = sampled if self._downsamples else here
            if self.sampling in _KERNELS:
                blocks.append(conv_bn_relu(channels, output_channels(sized), _KERNELS[self.sampling], stride))
                channels = output_channels(sized)
                continue
            if model.kind == "linear" and rank > 1 and self.block is None:
                blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
                rank = 1
            children = network.children_of(model)
            blocks.append(make_block(model, children, channels, stride, self.block, sized.width))
            channels = output_channels(model) * sized.width // model.width
        head: Head
        if self.head == "vgg":
            head = VGGHead(network.num_classes)
        else:
            head = LinearHead(channels, network.num_classes, self.single_layer_norm and len(blocks) == 1)
        return AuxiliaryNetwork(nn.Sequential(*blocks), head)


def _refuse_narrowing(here: Layer, sampled: Sequence[Layer]) -> None:
    width, previous = here.width, here
    for layer in sampled:
        if layer.kind == "linear":
            return  # widths of vectors carry no downsampling
        if layer.width < width:
            raise ValueError(
                f"layer {layer.index} is narrower ({layer.width}) than layer {previous.index} before it ({width}); "
                "AugLocal infers the downsampling of its auxiliary networks from widths that do not decrease. "
                "Use explicit modules that end past the wide layers, or another rule"
            )
        width, previous = layer.width, layer
