"""Residual blocks that keep their input and their raw convolution outputs, and nothing else."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..ops.batch_norm_passes import passes
from .chain import flattened, run_chain
from .fusable import NOTHING, activation_of, conv_call, conv_hindrance, must_be_eager, norm_call, norm_hindrance
from .norm_act import count_as_updated, norm_act_call
from .norm_act_conv import norm_act_conv_call
from .norm_shortcut_act import norm_shortcut_act_call

#: The parts that are fused, and what says whether they can be. conv1 is called as it is, whatever it is.
_BASIC = (("bn1", norm_hindrance), ("conv2", conv_hindrance), ("bn2", norm_hindrance))
_BOTTLENECK = (*_BASIC, ("conv3", conv_hindrance), ("bn3", norm_hindrance))


def block_hindrance(block: nn.Module, bottleneck: bool | None = None) -> str | None:
    """Why a BasicBlock or Bottleneck stays eager; None where it can be fused."""
    if bottleneck is None:
        bottleneck = hasattr(block, "conv3")
    parts: dict[str, Any] = block.__dict__["_modules"]
    for name, hindrance in _BOTTLENECK if bottleneck else _BASIC:
        reason = hindrance(parts.get(name))
        if reason is not None:
            return f"its {name} {reason}"
    if activation_of(parts.get("relu")) is None:
        return "its relu is not a plain nn.ReLU or nn.LeakyReLU"
    return None


class FusedResidual:
    """Forward of a BasicBlock or Bottleneck with torchvision's names, to stand before the block's class.

    Every call inspects the parts again. If one of them has a hook or was replaced, the block's own forward runs.
    """

    is_bottleneck: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        block = cast(Any, self)
        if must_be_eager(x) or block_hindrance(block, self.is_bottleneck) is not None:
            return cast(Any, super()).forward(x)
        parts = block.__dict__["_modules"]
        slope = activation_of(parts["relu"]).slope  # type: ignore[union-attr]
        bn1 = parts["bn1"]
        norms, convs = [norm_call(bn1), norm_call(parts["bn2"])], [conv_call(parts["conv2"])]
        if self.is_bottleneck:
            norms.append(norm_call(parts["bn3"]))
            convs.append(conv_call(parts["conv3"]))
        downsample = block.downsample
        raw = None if downsample is None else _raw_shortcut(downsample)
        h = parts["conv1"](x)
        bn1._check_input_dim(h)
        count_as_updated(norms)
        run = passes(h)
        autocast = run.autocast_dtype()
        for norm, conv in zip(norms, convs, strict=False):
            h = norm_act_conv_call(run, h, norm, slope, conv, autocast)
            run = passes(h)  # of every map: its shape counts too
        last = norms[-1]
        if raw is None:
            residual = x if downsample is None else downsample(x)
        else:
            shortcut = run_chain(raw[0], x)
            raw[1]._check_input_dim(shortcut)
            norm = norm_call(raw[1])
            count_as_updated([norm])
            if shortcut.dtype is h.dtype and shortcut.shape == h.shape:
                return norm_shortcut_act_call(run, h, last, shortcut, norm, slope)
            residual = norm_act_call(passes(shortcut), shortcut, norm, NOTHING.slope)
        if residual.dtype is not h.dtype:  # in that of the block's own map, as the eager sum, which is written over it
            residual = residual.to(h.dtype)
        return norm_act_call(run, h, last, slope, residual)


def _raw_shortcut(downsample: nn.Module) -> tuple[list[nn.Module], nn.BatchNorm2d] | None:
    """The layers of a shortcut before its last one, and that one, where it is a BatchNorm that can be fused."""
    if not isinstance(downsample, nn.Sequential):
        return None
    layers = list(flattened([downsample]))
    if not layers or norm_hindrance(layers[-1]) is not None:
        return None
    return layers[:-1], cast(nn.BatchNorm2d, layers[-1])
