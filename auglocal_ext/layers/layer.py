"""The layers of a network: kinds, shapes, widths and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..nn import eager_type
from ..segments import CrossingError, Segment
from .features import LAYOUTS, Features, Layout
from .groups import (
    classifier_start,
    evaluating,
    group_children,
    has_parameters,
    is_elementwise,
    leaves,
    nesting_hint,
    starts_layer,
)
from .observe import Handed, observe
from .residual import Residual, ResidualFinder

Kind = Literal["basic", "bottleneck", "conv", "linear", "other"]
#: One layout for all layers that hand on positions, or one (or None) for each layer.
LayoutChoice = Layout | Sequence[Layout | None] | None
#: What to do where it is unknown which axis holds the channels.
SAY_LAYOUT = (
    "say layout='channels_first' for (C, *positions), 'channels_last' for (*positions, C) and "
    "tokens (T, C), 'class_token' for tokens of which heads read the first; or one for each layer"
)


@dataclass(frozen=True)
class Layer:
    """One layer of the network: a run of children of the user's ``nn.Sequential``.

    Attributes:
        index: position among the layers, from 0; the stem counts as one.
        start, stop: its children are ``layers[start:stop]``.
        kind: ``"basic"`` or ``"bottleneck"`` (residual blocks), ``"conv"`` (one 2-D convolution), ``"linear"``, or
            ``"other"``.
        block: what an auxiliary block is modelled on: the residual block's form, the convolution or the linear layer.
        shape: shape of its output without the batch dimension.
        features: the same with its axes; None where they are unknown.
        base_width: :attr:`width`; None where it is unknown which axis holds the channels.
        what: what the layer is, in words for messages.
        inside: features after its first child with parameters; for the last layer those before the classifier.
        layout: what the user, or the layer itself, said about its output.
        unknown: why ``features`` is None.
    """

    index: int
    start: int
    stop: int
    kind: Kind
    block: Residual | nn.Conv2d | nn.Linear | None
    shape: tuple[int, ...]
    features: Features | None
    base_width: int | None
    what: str
    inside: Features | None = None
    layout: Layout | None = None
    unknown: str = ""

    @property
    def width(self) -> int:
        """Base width: output channels, for a bottleneck divided by its expansion; ValueError where it is not known."""
        if self.base_width is None:
            raise ValueError(
                f"the width of layer {self.index} ({self.what}) is not known, since {self.unknown} which axis holds "
                f"the channels: {SAY_LAYOUT}"
            )
        return self.base_width

    @property
    def out_channels(self) -> int:
        """Channels, or features, that a block modelled on this layer puts out."""
        return self.block.out_channels if isinstance(self.block, Residual) else self.width


@dataclass(frozen=True)
class Described:
    """A network's layers, and its input.

    Attributes:
        layers: in order.
        input: the input's features; None where it is unknown which axis holds the channels.
        classified: what the network's classifier takes; None where a single layer is all there is.
    """

    layers: tuple[Layer, ...]
    input: Features | None
    classified: Handed | None = None

    def with_classifier_apart(self, layers: nn.Sequential) -> Described:
        """The same with the classifier as a layer of its own, after the one that it belonged to.

        Args:
            layers: the network, of whose children the layers are runs.

        Raises:
            ValueError: where a single layer is all there is.
        """
        last, start = self.layers[-1], classifier_start(layers)
        if self.classified is None or start >= len(layers):
            raise ValueError("the network has a single layer, so that its classifier is no layer of its own")
        shape, features = self.classified.shape, _said(self.classified, last.layout)
        unknown = self.classified.why_unknown if features is None else ""
        hidden = replace(last, stop=start, shape=shape, features=features, unknown=unknown)
        # Its block and width stay those of the layer before it, the network's last ones as heads ask for them.
        classifier = replace(last, index=last.index + 1, start=start, kind="other", what="the classifier")
        return replace(self, layers=(*self.layers[:-1], hidden, classifier))


def describe(layers: nn.Sequential, example: Tensor, layout: LayoutChoice = None) -> Described:
    """The layers of a network with kinds, output features and widths, found by a pass of one example in eval mode.

    Neither the weights nor BatchNorm's running statistics nor the random state are touched.

    Args:
        example: one input, ``(1, ...)``.
        layout: what the layers' outputs are laid out as where they have positions; None: as the layers tell, by an
            attribute ``features_layout`` of one of their modules or else by their types.

    Raises:
        TypeError: if ``layers`` is no ``nn.Sequential``.
        ValueError: if the network does not accept the example, if a layer does not map a tensor to a tensor, or for a
            ``layout`` that the layers contradict.
    """
    ranges = group_children(layers)
    children = list(layers)
    said = [
        each or _own_layout(children[start:stop])
        for each, (start, stop) in zip(_layouts(layout, len(ranges)), ranges, strict=True)
    ]
    with evaluating(layers), ResidualFinder(children) as finder:
        handed = observe(children, example, lambda index, h, error: _refusal(layers, example, index, h, error))
    for index, child in enumerate(children):
        if isinstance(child, Segment):
            continue
        if has_parameters(child) and not starts_layer(child) and handed[index + 1].shape != handed[index].shape:
            raise ValueError(
                f"layers[{index}] ({type(child).__name__}) has one number per channel for parameters, as a "
                f"normalisation, but turns {handed[index].shape} into {handed[index + 1].shape}; put it and the layer "
                "before it into an nn.Sequential of their own"
            )
    if layout == "class_token":  # which maps before the tokens have not
        said = [each if len(handed[stop].shape) <= 2 else None for each, (_, stop) in zip(said, ranges, strict=True)]
    classifier = classifier_start(layers)
    found = []
    for index, (start, stop) in enumerate(ranges):
        try:
            features = handed[stop].features(said[index])
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}; pass one layout (or None) for each layer") from error
        kind, block, what = _classify(children[start : min(stop, classifier)], finder.found)
        inside = _first_output(children, handed, start, stop, said[index])
        width = _width(block, None if inside is None else inside.channels)
        unknown = handed[stop].why_unknown if features is None or width is None else ""
        found.append(
            Layer(
                *(index, start, stop, kind, block, handed[stop].shape, features, width, what),
                *(inside, said[index], unknown),
            )
        )
    if isinstance(layers[0], Segment):
        found = _told_by_later(found)
    taken = handed[0].features()
    if taken is None and isinstance(layout, str) and layout != "class_token":
        taken = Features(handed[0].shape, layout)
    return Described(tuple(found), taken, handed[classifier] if classifier < len(children) else None)


def _told_by_later(layers: list[Layer]) -> list[Layer]:
    """Layers of unknown axes take those of the next one that puts out the same sizes, if C is none of them."""
    told = list(layers)
    for index in range(len(layers) - 2, -1, -1):
        layer, later = told[index], told[index + 1]
        known = later.features
        if layer.features is not None or known is None or layer.shape != later.shape:
            continue
        if known.channels not in known.positions:  # else a permutation between them might not show
            width = _width(layer.block, known.channels)
            told[index] = replace(layer, features=known, base_width=width, unknown="")
    return told


def _layouts(layout: LayoutChoice, count: int) -> list[Layout | None]:
    if layout is None or isinstance(layout, str):
        said: list[Layout | None] = [layout] * count
    else:
        said = list(layout)
    if len(said) != count or any(each is not None and each not in LAYOUTS for each in said):
        raise ValueError(
            f"layout is one of {', '.join(get_args(Layout))}, or a sequence with one of these or None for each of the "
            f"{count} layers; got {layout!r}"
        )
    return said


def _own_layout(children: Sequence[nn.Module]) -> Layout | None:
    """What the last module that says so says of the layer's output, by its attribute ``features_layout``."""
    for part in (part for child in reversed(children) for part in _ended(child)):
        said = getattr(part, "features_layout", None)
        if said in LAYOUTS:
            return said
        if said is not None:
            raise ValueError(f"{type(part).__name__}.features_layout is one of {', '.join(LAYOUTS)}, got {said!r}")
    return None


def _ended(child: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that have run at the end of ``child``, the last ones first."""
    if not isinstance(child, Segment):
        return (child,)
    last = () if child.last is None else child.last.names
    return (*(child.model.get_submodule(name) for name in reversed(last)), *reversed(child.whole))


def _first_output(
    children: Sequence[nn.Module], handed: Sequence[Handed], start: int, stop: int, layout: Layout | None
) -> Features | None:
    """What the first child that has parameters puts out; None if its axes are unknown."""
    position = next((i for i in range(start, stop) if has_parameters(children[i])), stop - 1)
    return _said(handed[position + 1], layout)


def _said(handed: Handed, layout: Layout | None) -> Features | None:
    try:
        return handed.features(layout)
    except ValueError:  # what is said of the layer's output is not true of what is inside it
        return handed.features()


def _classify(
    children: Sequence[nn.Module], residuals: dict[nn.Module, Residual]
) -> tuple[Kind, Residual | nn.Conv2d | nn.Linear | None, str]:
    parts = [leaf for child in children for leaf in leaves(child)]
    weighted = [leaf for leaf in parts if has_parameters(leaf) and not is_elementwise(leaf)]
    names = ", ".join(eager_type(leaf).__name__ for leaf in weighted[:4])
    if len(weighted) > 1:
        names = f"a run of {len(weighted)} layers with weights ({names}{', ...' if len(weighted) > 4 else ''})"
    known = [residuals[leaf] for leaf in weighted if leaf in residuals]
    if known:  # of a stage of blocks the last one, which makes its output
        return known[-1].kind, known[-1], names
    if len(weighted) == 1 and isinstance(weighted[0], nn.Conv2d):
        return "conv", weighted[0], names
    if len(weighted) == 1 and isinstance(weighted[0], nn.Linear):
        return "linear", weighted[0], names
    return "other", None, names or ", ".join(eager_type(leaf).__name__ for leaf in parts[:1])


def _width(block: Residual | nn.Conv2d | nn.Linear | None, channels: int | None) -> int | None:
    # The classifier belongs to the last layer, whose width is therefore read from the block, not from the output.
    if isinstance(block, Residual):
        return block.out_channels // block.expansion
    if isinstance(block, nn.Conv2d):
        return block.out_channels
    if isinstance(block, nn.Linear):
        return block.out_features
    return channels


def _refusal(layers: nn.Sequential, example: Tensor, index: int, h: Tensor, error: Exception) -> Exception:
    """What to say where child ``index`` does not take what it is handed."""
    child = layers[index]
    if isinstance(child, Segment) and isinstance(error, CrossingError):
        return ValueError(
            f"the model cannot be cut after {child.first}: to run what follows, its forward needs more than what "
            f"crosses this cut. {error}"
        )
    shape = tuple(h.shape[1:])
    found = f"layers[{index}] ({type(child).__name__}) does not accept an input of shape {_batched(shape)}"
    leaf = next((part for part in child.modules() if has_parameters(part) and not list(part.children())), None)
    flat = torch.Size(shape).numel()
    if index > 0 and isinstance(leaf, nn.Linear) and leaf.in_features == flat != shape[-1]:
        why = (
            f"; its linear layer takes vectors of {flat} features, which is that shape flattened: it looks like a "
            f"missing nn.Flatten() before layers[{index}] (a model's forward often flattens where its children do not)"
        )
    elif index == 0 and any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in child.modules()):
        size = ", ".join(map(str, shape))
        why = (
            ", which input_shape= makes of floating point: it looks up integer tokens. Say "
            f"example_input=torch.zeros(1, {size}, dtype=torch.int64) in its place"
        )
    elif index > 0:
        why = (
            f", which is what input_shape={tuple(example.shape[1:])} leads to. Children of an "
            "nn.Sequential are called one after another: what else a model's forward does between them must be a child "
            f"of its own{nesting_hint(layers)}"
        )
    else:
        given = tuple(example.shape[1:])
        way = "pass the shape of one input without the batch dimension"
        if len(given) == 3 and isinstance(leaf, nn.Conv2d) and given[-1] == leaf.in_channels != given[0]:
            way = f"the channels come first: input_shape={(given[-1], *given[:-1])}"
        why = f", which is input_shape={given}; {way}"
    return ValueError(f"{found}{why}. torch says: {error}")


def _batched(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, ('N', *shape)))})"
