"""What a network costs: parameters, multiply-accumulates of a forward pass, operations of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from auglocal_ext._torch import ConvBase, ConvTransposeBase, FakeTensorMode, TorchDispatchMode, detect_fake_mode
from auglocal_ext.layers import evaluating, probe_input
from auglocal_ext.segments import Ghost


def count_parameters(module: nn.Module, *, inference: bool = False) -> int:
    """Number of trainable parameter elements; a parameter shared by several modules counts once.

    Args:
        module: any module.
        inference: count what is deployed instead: every parameter, trainable or not, except those that only a
            local-learning wrapper's ``auxiliary`` networks have.
    """
    if not inference:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)
    kept = [child for name, child in module.named_children() if name != "auxiliary"]
    parameters = set(module.parameters(recurse=False)).union(*(child.parameters() for child in kept))
    return sum(p.numel() for p in parameters)


def count_macs(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of the convolution and linear layers in one forward pass, per image.

    A layer counts as often as it is called: ``k * k * (C_in / groups) * C_out`` per output position of a convolution,
    ``in_features * out_features`` per row of a linear layer (anything with these two attributes).
    Biases, normalisation, activation and pooling are not counted. The pass runs in eval mode on fake tensors:
    no memory, no change to the module.

    Args:
        module: called with one tensor of shape (1, *input_shape).
        input_shape: (C, H, W) of one image, or the shape of one sample.

    Raises:
        ValueError: a size in ``input_shape`` is not positive.
    """
    return _macs(module, input_shape, lambda image: module(image))


def count_training_macs(net: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of the forward part of a local training step, per image.

    Counted as by :func:`count_macs`: layers, context encoders and auxiliary networks with all that their losses run
    (decoders, similarity encoders, moving averages). Products of images with one another, as in a similarity matrix,
    depend on the batch and are not counted.

    Args:
        net: a :class:`auglocal_ext.LocalSequential`, of fake or real tensors: called with one image and its target.
        input_shape: (C, H, W) of one image, or the shape of one sample.

    Raises:
        ValueError: a size in ``input_shape`` is not positive.
    """
    task, described = cast(Any, net.task), cast(Any, net.network).described_input
    return _macs(net, input_shape, lambda image: net(image, task.example_for(described, 1, image.device)))


def _macs(module: nn.Module, input_shape: Sequence[int], run: Callable[[Tensor], Any]) -> int:
    if any(size < 1 for size in input_shape):
        raise ValueError(f"expected positive sizes in input_shape, got {tuple(input_shape)}")
    macs = 0

    def add(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(layer, ConvTransposeBase):  # every input element meets the kernel once
            macs += inputs[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, ConvBase):
            macs += output.numel() * layer.weight[0].numel()
        else:
            macs += output.numel() * cast(int, layer.in_features)

    layers = [m for m in module.modules() if isinstance(m, ConvBase) or _is_linear(m)]
    mode = detect_fake_mode(list(module.parameters())) or FakeTensorMode(allow_non_fake_inputs=True)
    heads = _LossHeads()
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        with mode, evaluating(module), heads:
            wrapped = getattr(module, "network", None)  # of a network on integers, their dtype
            run(probe_input(module, input_shape, 1, getattr(wrapped, "input_dtype", None)))
    finally:
        for handle in handles:
            handle.remove()
    return macs + heads.macs


_LOSSES_WITH_LINEAR = ("auglocal_ext::pooled_cross_entropy", "auglocal_ext::linear_cross_entropy")


class _LossHeads(TorchDispatchMode):
    """Counts linear layers that run inside the op that makes their loss, where no forward hook sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name().startswith(_LOSSES_WITH_LINEAR):
            x, weight = args[:2]
            self.macs += len(x) * weight.numel()
        return func(*args, **(kwargs or {}))


def _convolution_backward(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any,
    **out: Any,
) -> int:  # fmt: skip
    """Each of the gradients of input and weight that is asked for costs as much as the forward pass."""
    sizes = [tuple(getattr(each, "shape", each)) for each in (grad, x, weight)]
    once = 2 * math.prod(sizes[1 if transposed else 0]) * math.prod(sizes[2][1:])
    mask = rest[2]
    return once * (bool(mask[0]) + bool(mask[1]))


_FORMULAS: dict[Any, Any] = {torch.ops.aten.convolution_backward: _convolution_backward}


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of ``function()``, 2 per multiply-accumulate, forward and backward.

    Counted by ``torch.utils.flop_counter`` (convolutions and matrix products; the backward of convolutions in groups,
    which it takes for one group, by a formula of its own) on fake tensors, so a whole training step costs no memory and
    needs no GPU. ``function`` makes its modules and tensors itself, or is
    called under the ``FakeTensorMode`` they were made in; tensors with real data are refused by torch.
    """
    mode = detect_fake_mode() or FakeTensorMode()
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with mode, counter:
        function()
    return counter.get_total_flops()


class FlopMeter(TorchDispatchMode):
    """Counts as :func:`count_flops` does while it is active; the count can be read at any time.

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        formula = _FORMULAS.get(packet, flop_registry.get(packet))
        if formula is not None and not isinstance(out, Ghost):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")
