"""AugLocal: auxiliary networks made of uniformly sampled later layers, with pyramidal depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from ..auxiliary.base import Auxiliary
from ..auxiliary.blocks import BlockFactory, make_block, why_unknown
from ..auxiliary.fresh import FACTORY
from ..auxiliary.heads import preceded
from ..auxiliary.sampling import inferred_strides, pyramid_depth, sampled_layers
from ..layers import Features, Layer, evaluating, probe_input, vectors
from ..models.blocks import conv_bn_relu
from ..partition import cut_points
from .base import Head, Network, Rule, resolved
from .copied import copied_block, taken_by
from .heads import LinearHead, Readout, is_token_norm, widened
from .options import head_option, option

Sampling = Literal["uniform", "sequential", "repeated", "conv1x1", "conv3x3"]
#: Values of AugLocal's ``sampling``.
SAMPLING: tuple[str, ...] = get_args(Sampling)
_KERNELS = {"conv1x1": 1, "conv3x3": 3}


@dataclass(frozen=True)
class AugLocal(Rule):
    """Each local module is trained through fresh copies of uniformly sampled later layers and a classifier.

    Module k, ending in layer l, gets blocks of the kinds and widths of the layers ``round(l + (L-1-l)/m * i)``,
    i = 1..m, where m tapers over the modules (pyramidal depth). No weight is shared or copied.

    Where all layers that may be sampled are residual blocks, convolutions or linear layers, widths do not decrease, and
    residual blocks halve their map where they double the width, the blocks are made as in the released code, with
    strides inferred from the widths. In any other network each block is a copy of the sampled layer with fresh values
    (:func:`auglocal_ext.auxiliary.fresh_copy`). It takes features of the size that the layer takes in the network: an
    :class:`auglocal_ext.auxiliary.Adapter` in front pools them, and maps them to its width, where they differ.

    Args:
        depth: d of the paper: sampled layers plus the classifier, so m = d - 1 layers are sampled. 1 samples none
            (a linear classifier on the pooled output: greedy local learning).
        pyramid: slope tau of the pyramidal depth in [0, 1]; 0 gives every module the same depth. 0.5 in the paper.
        joint_tail: with one module per layer (``modules=None``), train the last m + 1 layers as one module
            (K = L - m local modules, as the released CIFAR code) instead of every layer by itself (K = L, as the
            paper's figure and the ImageNet code).
        head: the classifier on the last block's output: ``"linear"`` (global average pool, linear), ``"vgg"`` (flatten,
            pool to 512, two hidden linear layers; the head of the released ImageNet VGG), any other head, or a rule.
        single_layer_norm: where at most one layer is sampled, put a BatchNorm between pooling and linear layer, as the
            CIFAR code does and the ImageNet code does not. None: only with the linear head, as other heads have no such
            place, only where exactly one layer is sampled, and not for language modelling.
        sampling: which layers the auxiliary blocks are modelled on, for the paper's ablation: ``"uniform"``, the
            ``"sequential"`` next ones, the module's own layer ``"repeated"``; or ``"conv1x1"`` or ``"conv3x3"``
            convolutions with BatchNorm and ReLU.
        downsampling: whether the blocks have the widths and strides of the sampled layers, or the module's own width
            and stride 1. None: True for uniform and sequential sampling, else False. If True, ``"repeated"`` and the
            convolutions take the widths and strides of uniformly sampled layers.
        block: ``factory(in_channels, out_channels, stride, layer)`` that makes the auxiliary blocks in place of all
            this. It does not go with sampling of convolutions, which copy no layer.
        widen: width factor of the blocks (``aux_net_widen`` in the released code); strides stay those of the sampled
            widths.
        init: ``"released"`` leaves the convolutions of blocks modelled on single convolutions (VGG) as torch makes
            them, weights and biases; ``"own"`` initialises all convolutions alike. Residual blocks and linear layers
            are the same either way.

    Raises:
        ValueError: for depth < 1, a slope outside [0, 1], an unknown head or ``init``, a head that is itself made of
            later layers, or options that exclude each other; when wrapped, for layers of which no fresh copy can be
            made, for widths, strides and an ``init`` that a copy cannot take, for strides of a factory or of
            convolutions where the sampled layers become narrower, and for a network too shallow.

    Source: Ma et al., Scaling Supervised Local Learning with Augmented Auxiliary Networks, ICLR 2024.
    """

    name = "auglocal"
    follows_layers = True

    depth: int = option(6, "layers of an auxiliary network with its classifier", metavar="D", least=1)
    pyramid: float = option(0.5, "slope of the pyramidal depth", metavar="TAU", least=0, most=1)
    joint_tail: bool = option(True, "train the last layers, as many as --depth, as one module")
    head: Head = head_option("linear")
    single_layer_norm: bool | None = option(None, "BatchNorm before the linear layer where at most a layer is sampled")
    block: BlockFactory | None = None
    sampling: Sampling = option("uniform", "layers that auxiliary blocks are modelled on", kind=str, choices=SAMPLING)
    downsampling: bool | None = option(None, "auxiliary blocks take widths and strides of the sampled layers")
    widen: float = option(1.0, "width factor of the auxiliary blocks", above=0)
    init: str = option("own", "initial values of the auxiliary networks", choices=("own", "released"))

    def __post_init__(self) -> None:
        super().__post_init__()
        head = resolved(self.head)
        if any(rule.follows_layers for rule in head.with_heads):
            raise ValueError(
                f"head={self.head!r} makes auxiliary networks of the layers after its input, and after sampled "
                "layers there are none. Make it the outer rule, or raise depth"
            )
        if self.single_layer_norm and type(head) is not LinearHead:
            raise ValueError(
                f"single_layer_norm puts a BatchNorm before the linear head's layer; head={self.head!r} has no such "
                "place"
            )
        if self.single_layer_norm is False and isinstance(head, LinearHead) and head.norm:
            raise ValueError(f"single_layer_norm=False leaves out the BatchNorm that head={head!r} asks for")
        if self.block is not None and self.sampling in _KERNELS:
            raise ValueError(f"sampling={self.sampling!r} makes all blocks itself: leave out block=factory")
        if self.widen != 1 and self.depth == 1:
            raise ValueError(f"widen={self.widen:g} is the width factor of auxiliary blocks, and depth=1 has none")
        if self.init == "released" and (self.block is not None or self.sampling in _KERNELS):
            made = "block=factory" if self.block is not None else f"sampling={self.sampling!r}"
            raise ValueError(f"init='released' is for blocks modelled on layers; {made} has no released code")

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        if modules is not None or not self.joint_tail:
            return cut_points(num_layers, modules)
        count = num_layers - (self.depth - 1)
        if num_layers < 2:
            raise ValueError("the network has one layer, which leaves none to be trained locally")
        if count < 2:
            raise ValueError(
                f"AugLocal(depth={self.depth}) trains the last {self.depth} layers as one module, but the network has "
                f"{num_layers} layers, which leaves no layer to be trained locally; choose depth <= {num_layers - 1}, "
                "joint_tail=False, or a number of modules (of the command: --depth, --no-joint-tail, --modules)"
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
        """Strides of the auxiliary blocks of local module ``module``, where they are no copies.

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

    def build_auxiliary(self, network: Network, module: int) -> Auxiliary:
        here, features = network.last_layer(module), network.features(module)
        blocks: list[nn.Module] = []
        chosen = self.sampled(network, module)
        if not chosen:
            return self._ended(network, module, blocks, features)
        if self._copies(network):
            self._refuse_options_of_blocks()
            for index in chosen:
                repeated = self.sampling == "repeated"
                block, features = copied_block(network, here.index if repeated else index, features, "AugLocal")
                blocks.append(block)
            return self._ended(network, module, blocks, features)
        for index, stride in zip(chosen, self.strides(network, module), strict=True):
            sampled = network.layers[index]
            model = sampled if self.sampling in ("uniform", "sequential") else here
            sized = sampled if self._downsamples else here
            if self.sampling in _KERNELS:
                _needs_map(features, f"sampling={self.sampling!r} makes convolutions")
                channels = widened(sized.out_channels, self.widen)
                blocks.append(conv_bn_relu(features.channels, channels, _KERNELS[self.sampling], stride))
                features = features.with_channels(channels)
                continue
            if self.block is None:
                features = self._fit(model, features, blocks)
            children, width = network.children_of(model), widened(sized.width, self.widen)
            blocks.append(
                make_block(model, children, features.channels, stride, self.block, width, self.init == "released")
            )
            features = features.with_channels(model.out_channels * width // model.width)
        if blocks and type(resolved(self.head)) is not LinearHead:
            features = _output(nn.Sequential(*blocks), network, module, features)
        return self._ended(network, module, blocks, features)

    def _ended(self, network: Network, module: int, blocks: list[nn.Module], features: Features) -> Auxiliary:
        """The blocks, which put out ``features``, with the head after them."""
        head = resolved(self.head)
        seen = network.with_features(module, features)
        if type(head) is LinearHead:
            wanted = self.single_layer_norm
            usual = len(blocks) == 1 and wanted is not False and not network.task.keeps_positions
            head = LinearHead(head.norm or usual or (len(blocks) <= 1 and wanted is True))
        made = preceded(blocks, head.build_auxiliary(seen, module))
        if isinstance(made.head, Readout) and blocks and is_token_norm(list(blocks[-1].modules())[-1]):
            made.head.norm = None  # the copy of the last layer ends in it
        return made

    def _copies(self, network: Network) -> bool:
        """Whether the blocks are copies: some layer is of no known form, or widths do not tell the strides."""
        if self.block is not None or self.sampling in _KERNELS:
            return False
        start = network.ends[0] + (self.sampling != "repeated")
        for layer in network.layers[start:]:
            taken = taken_by(network, layer.index)
            is_map = taken is not None and taken.layout == "channels_first" and taken.is_2d
            if (layer.kind != "linear" and not is_map) or why_unknown(layer, network.children_of(layer)):
                return True
        seen = network.layers[network.ends[0] :]
        if seen[0].base_width is None:
            return True
        told = all(_width_tells_stride(*pair) for pair in pairwise(seen))
        return self._downsamples and not (told and _narrower(seen[0], seen[1:]) is None)

    def _refuse_options_of_blocks(self) -> None:
        for name, own, value in (("widen", 1.0, self.widen), ("init", "own", self.init)):
            if value != own:
                raise ValueError(
                    f"AugLocal copies the layers of this network, each with its own width and initialisation: leave "
                    f"out {name}={value!r}, or pass {FACTORY}"
                )
        if self._downsamples == (self.sampling == "repeated"):
            raise ValueError(
                "AugLocal copies the layers of this network, and a copy has the width and stride of its layer: leave "
                f"out downsampling={self.downsampling} with sampling={self.sampling!r}, or pass {FACTORY}"
            )

    def _fit(self, model: Layer, features: Features, blocks: list[nn.Module]) -> Features:
        """What a block modelled on ``model`` takes after ``blocks``; pooled where it takes vectors."""
        if model.kind in ("conv", "basic", "bottleneck"):
            _needs_map(features, f"layer {model.index} is {model.what}, a convolution of maps")
        elif model.kind == "linear" and not features.is_vector:
            inside = model.inside
            per_token = inside is not None and not inside.is_vector and inside.layout != "channels_first"
            if per_token and features.layout != "channels_first":
                return features
            blocks.append(_Pool(features))
            return vectors(features.channels)
        return features


class _Pool(nn.Module):
    """The mean over all positions."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self._features = features

    def forward(self, h: Tensor) -> Tensor:
        return self._features.pooled(h)


def _needs_map(features: Features, why: str) -> None:
    if features.layout != "channels_first" or not features.is_2d:
        raise ValueError(
            f"{why}, but the auxiliary network receives {features}; pass AugLocal(block=factory), explicit "
            "modules, or another rule"
        )


def _output(blocks: nn.Module, network: Network, module: int, features: Features) -> Features:
    """What blocks make of local module ``module``'s output, of the layout of ``features``: their sizes by a pass."""
    template = probe_input(network.primary, network.last_layer(module).shape)
    blocks.to(template.dtype)
    with evaluating(blocks):
        shape = tuple(int(size) for size in blocks(template).shape[1:])
    if len(shape) == 1:
        return vectors(shape[0])
    found = Features(shape, features.layout)
    if found.channels != features.channels:
        raise ValueError(
            f"the auxiliary blocks of local module {module} put out a shape of {shape}, expected {features.channels} "
            f"channels in the layout {features.layout!r}"
        )
    return found


def _width_tells_stride(previous: Layer, layer: Layer) -> bool:
    """Whether a residual block halves its map as often as it doubles the width."""
    sizes = [each.inside if each is layer else each.features for each in (previous, layer)]
    if layer.kind not in ("basic", "bottleneck") or any(size is None or not size.is_2d for size in sizes):
        return True
    before, after = (max(size.positions) for size in sizes if size is not None)
    return before == 1 or round(math.log2(before / after)) == (layer.width // previous.width).bit_length() - 1


def _narrower(here: Layer, later: Sequence[Layer]) -> tuple[Layer, Layer] | None:
    """The first layer that is narrower than the one before it, with that one before; None where none is."""
    previous = here
    for layer in later:
        if layer.kind == "linear":
            return None  # widths of vectors carry no downsampling
        if layer.width < previous.width:
            return previous, layer
        previous = layer
    return None


def _refuse_narrowing(here: Layer, sampled: Sequence[Layer]) -> None:
    found = _narrower(here, sampled)
    if found is not None:
        previous, layer = found
        raise ValueError(
            f"layer {layer.index} is narrower ({layer.width}) than layer {previous.index} before it "
            f"({previous.width}); strides of auxiliary blocks that are no copies are inferred from widths that do not "
            "decrease. Use explicit modules that end past the wide layers, leave out block= and sampling=, or take "
            "another rule"
        )
