"""Residual blocks that keep their input and their raw convolution outputs, and nothing else."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..ops import batch_norm_act
from .chain import flattened, run_chain
from .fusable import activation_of, conv_arguments, conv_hindrance, must_be_eager, norm_arguments, norm_hindrance
from .norm_act_conv import norm_act_conv
from .norm_shortcut_act import Branch, norm_shortcut_act


def block_hindrance(block: nn.Module) -> str | None:
    """Why a BasicBlock or Bottleneck stays eager; None where it can be fused."""
    parts = ["bn1", "conv2", "bn2", *(("conv3", "bn3") if hasattr(block, "conv3") else ())]
    for name in parts:  # conv1 is called as it is, whatever it is
        part = getattr(block, name)
        reason = norm_hindrance(part) if name.startswith("bn") else conv_hindrance(part)
        if reason is not None:
            return f"its {name} {reason}"
    if activation_of(cast(nn.Module, block.relu)) is None:
        return "its relu is not a plain nn.ReLU or nn.LeakyReLU"
    return None


class FusedResidual:
    """Forward of a BasicBlock or Bottleneck with torchvision's names, to stand before the block's class.

    Every call looks at the parts again: with a hook on one of them, or another layer in the place of one, this call
    runs the block's own forward.
    """

    def forward(self, x: Tensor) -> Tensor:
        block = cast(Any, self)
        if must_be_eager(x) or block_hindrance(block) is not None:
            return cast(Any, super()).forward(x)
        name, slope = cast("tuple[str, float]", activation_of(block.relu))
        act: dict[str, Any] = {"activation": name, "negative_slope": slope}
        h = block.conv1(x)
        h = norm_act_conv(h, **norm_arguments(block.bn1, h), **conv_arguments(block.conv2), **act)
        norm = block.bn2
        if hasattr(block, "conv3"):
            h = norm_act_conv(h, **norm_arguments(norm, h), **conv_arguments(block.conv3), **act)
            norm = block.bn3
        raw = _raw_shortcut(block.downsample)
        if raw is None:
            residual = x if block.downsample is None else block.downsample(x)
        else:
            shortcut = run_chain(raw[0], x)
            branch = Branch(x=shortcut, **norm_arguments(raw[1], shortcut))
            if shortcut.dtype == h.dtype:
                return norm_shortcut_act(Branch(x=h, **norm_arguments(norm, h)), branch, **act)
            residual = batch_norm_act(**branch._asdict(), activation="none")
        # In the dtype of the block's own map, as the eager sum, which is written over it.
        return batch_norm_act(h, **norm_arguments(norm, h), residual=residual.to(h.dtype), **act)


def _raw_shortcut(downsample: nn.Module | None) -> tuple[list[nn.Module], nn.BatchNorm2d] | None:
    """The layers of a shortcut before its last one, and that one, where it is a BatchNorm that can be fused."""
    if not isinstance(downsample, nn.Sequential):
        return None
    layers = list(flattened([downsample]))
    if not layers or norm_hindrance(layers[-1]) is not None:
        return None
    return layers[:-1], cast(nn.BatchNorm2d, layers[-1])
