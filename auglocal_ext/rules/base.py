"""What a learning rule decides: where the network is cut, a module's auxiliary network, and its context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..auxiliary.base import Auxiliary, LossSettings
from ..auxiliary.context import ContextSupply
from ..layers import SAY_LAYOUT, Features, Layer, classifier_start, modules_of, probe_input
from ..partition import cut_points
from ..segments import Segment
from ..tasks import Task
from .options import Option, check_options, options_of


@dataclass(frozen=True)
class Network:
    """The primary network as a rule sees it.

    Attributes:
        primary: the user's ``nn.Sequential``, or an ``nn.Sequential`` of the segments of the user's model.
        layers: its layers (:class:`auglocal_ext.layers.Layer`).
        input_shape: shape of one input, ``(C, H, W)`` or ``(features,)``, or of tokens ``(T,)``.
        task: what is learned.
        ends: index of the last layer of each local module, ascending.
        input: the input's features; None where it is unknown which axis holds the channels.
        input_dtype: of integer inputs; None of floating-point ones.
        recompute: of each local module, whether its auxiliary network is to recompute.
    """

    primary: nn.Sequential
    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    task: Task
    ends: tuple[int, ...]
    input: Features | None = None
    input_dtype: torch.dtype | None = None
    recompute: tuple[bool, ...] = ()

    @property
    def num_modules(self) -> int:
        return len(self.ends)

    @property
    def last_width(self) -> int:
        """Channels of the last stage: of the deepest layer before the classifier."""
        return self.layers[-1].out_channels

    @property
    def described_input(self) -> Features | None:
        """What a task's ``example_for`` takes: :attr:`input`, or of integers their shape."""
        return self.input if self.input_dtype is None else Features(self.input_shape)

    def settings(self, module: int) -> LossSettings:
        """What the auxiliary network of local module ``module`` is built with."""
        return LossSettings(self.task, bool(self.recompute) and self.recompute[module])

    def last_layer(self, module: int) -> Layer:
        """The layer with which local module ``module`` ends."""
        return self.layers[self.ends[module]]

    def features(self, module: int) -> Features:
        """What local module ``module`` puts out.

        Raises:
            ValueError: where neither the layers nor ``layout=`` tell which axis holds the channels.
        """
        layer = self.last_layer(module)
        if layer.features is None:
            raise ValueError(
                f"layer {layer.index} ({layer.what}), with which local module {module} ends, puts out a shape of "
                f"{layer.shape}, and {layer.unknown} which axis holds the channels: {SAY_LAYOUT}"
            )
        return layer.features

    def image(self, who: str) -> Features:
        """The network's input, where ``who`` needs images.

        Raises:
            ValueError: for integer inputs, and where no layer tells which axis holds the channels.
        """
        if self.input_dtype is not None:
            raise ValueError(
                f"{who} needs images of channels, height and width, but the network's inputs are of shape "
                f"{self.input_shape} in {self.input_dtype}"
            )
        if self.input is None:
            raise ValueError(
                f"{who} needs images of channels, height and width; the network's inputs are of shape "
                f"{self.input_shape}, and no layer tells which axis holds the channels: say "
                "layout='channels_first' or 'channels_last', which holds for the input too"
            )
        return self.input

    def with_features(self, module: int, features: Features) -> Network:
        """The network as seen by a head that takes ``features`` instead of module ``module``'s output."""
        layer = replace(self.last_layer(module), shape=features.shape, features=features)
        return replace(self, layers=(*self.layers[: layer.index], layer, *self.layers[layer.index + 1 :]))

    def children_of(self, layer: Layer) -> list[nn.Module]:
        """The modules that form ``layer``: children of ``primary``, or those that run from beginning to end in it."""
        return _modules(list(self.primary)[layer.start : layer.stop])

    def body_of(self, layer: Layer) -> list[nn.Module]:
        """:meth:`children_of` without the classifier, which belongs to the last layer."""
        return _modules(list(self.primary)[layer.start : min(layer.stop, classifier_start(self.primary))])

    def refuse_gaps(self, layer: Layer, who: str) -> None:
        """ValueError where a layer of a localized model is more than the modules in it, called one after another."""
        body = list(self.primary)[layer.start : min(layer.stop, classifier_start(self.primary))]
        if any(isinstance(child, Segment) and not child.chained for child in body):
            raise ValueError(
                f"{who} layer {layer.index} ({layer.what}), but the model's forward computes something between its "
                "submodules or passes them more than one input, which no copy would repeat. Choose other modules, or "
                "another rule"
            )


def _modules(children: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for child in children for module in modules_of(child)]


class Rule(ABC):
    """A local learning rule: builds the auxiliary network and the context of each local module.

    A subclass composes parts of :mod:`auglocal_ext.auxiliary`; the training pass is the same for all rules. If it has a
    field ``head``, a rule or the name of one, the auxiliary networks of that rule take the output of this rule's
    blocks. Cuts and the weight of the last loss are then those of the head, unless the subclass overrides them.
    """

    #: Name on the command line and in recipes, once the rule is in ``RULES``.
    name: ClassVar[str] = ""
    #: Whether its auxiliary networks are made of the layers after a module's last one.
    follows_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """ValueError for an option's value that it cannot have, and for an unknown head."""
        check_options(self)
        # The class has the default; None is a head where it is that.
        if any(getattr(owner, "head", None) is not None for owner in (self, type(self))):
            resolved(self.head)  # type: ignore[attr-defined]

    @classmethod
    def options(cls) -> list[Option]:
        """The rule's options on the command line and in recipes."""
        return options_of(cls)

    @classmethod
    def of_options(cls, values: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> Rule:
        """The rule with these values of its options; options that are left out keep their defaults.

        Args:
            values: by name of the option.
            mean: per channel, in units of [0, 1]: the network's input is ``(image - mean) / std``.
            std: per channel, in the same units.
        """
        fields = {each.name: each.field for each in cls.options()}
        return cls(**{fields[name]: value for name, value in values.items()})

    def option_values(self) -> dict[str, Any]:
        """The inverse of :meth:`of_options`."""
        return {each.name: getattr(self, each.field) for each in self.options()}

    @property
    def head_rule(self) -> Rule | None:
        """The rule whose auxiliary networks this one's end in; None where there is none."""
        head = getattr(self, "head", None)
        return None if head is None else resolved(head)

    @property
    def with_heads(self) -> list[Rule]:
        """The rule, its head, the head of its head, and so on."""
        head = self.head_rule
        return [self] if head is None else [self, *head.with_heads]

    @property
    def classifier_weight(self) -> float:
        """Weight of the last module's loss, which goes through the network's own classifier."""
        return 1.0 if self.head_rule is None else self.head_rule.classifier_weight

    @property
    def classifier_apart(self) -> bool:
        """Whether the network's own classifier is a local module by itself, after that of the last layer."""
        return self.head_rule is not None and self.head_rule.classifier_apart

    def refuse_classifier_apart(self) -> None:
        """ValueError for a rule made of the layers after a module, to which the classifier would be one of them."""
        for rule in self.with_heads:
            if rule.follows_layers:
                raise ValueError(
                    f"{type(rule).__name__} makes auxiliary networks of the layers after a module, which the "
                    "classifier as a local module by itself (PredSim(classifier_apart=True)) is not: leave it out"
                )

    @property
    def supplies_context(self) -> bool:
        """Whether :meth:`build_context` ever builds anything; a head must not."""
        return type(self).build_context is not Rule.build_context

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        """Index of the last layer of each local module for the user's ``modules`` argument."""
        if self.head_rule is not None:
            return self.head_rule.ends(num_layers, modules)
        return cut_points(num_layers, modules)

    @abstractmethod
    def build_auxiliary(self, network: Network, module: int) -> Auxiliary:
        """Fresh auxiliary network of local module ``module``; never called for the last one.

        Returns:
            ``forward(h)`` makes the task's output, ``loss(h, context)`` the local loss; often an
            :class:`auglocal_ext.auxiliary.AuxiliaryNetwork`. It is built with ``network.settings(module)``.
        """

    def build_context(self, network: Network, module: int) -> ContextSupply | None:
        """Fresh context encoders of local module ``module``, or None; never called for the first one."""
        return None


Made = TypeVar("Made", bound=nn.Module | None)


def made_like(primary: nn.Module, make: Callable[[], Made]) -> Made:
    """What ``make()`` builds, on the device and in the dtype of the network ``primary``."""
    template = probe_input(primary, (), 0)
    with template.device:
        made = make()
    # Left out where nothing changes, since fake tensors refuse it.
    if made is not None and template.dtype != torch.get_default_dtype():
        made.to(template.dtype)
    return made


#: The classifier of an auxiliary network: a rule, or a name in ``HEADS``.
Head = Rule | str
#: Heads by name; filled by the files of heads.
HEADS: dict[str, Any] = {}


def resolved(head: Head) -> Rule:
    """The rule that ``head`` is or names.

    Raises:
        ValueError: for an unknown name, an object that is no rule, or a rule that supplies context.
    """
    if isinstance(head, str) and head in HEADS:
        return HEADS[head]()
    if not isinstance(head, Rule):
        raise ValueError(
            f"unknown auxiliary head {head!r}; choose one of {', '.join(HEADS)}, or a rule such as AugLocal(depth=3)"
        )
    if head.supplies_context:
        raise ValueError(
            f"{head!r} cannot be a head: it supplies modules with context, and a head only looks at their output. "
            "Make it the outer rule, with the other one as its head"
        )
    return head
