"""A copy of a network on which a step can run: of fake CPU tensors of the same shapes, or with its data.

It is a deepcopy with a memo that maps every parameter and buffer to a tensor of the same form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .._torch import FakeTensorMode, detect_fake_mode

_Net = TypeVar("_Net", bound=nn.Module)


def fake_mode_of(net: nn.Module) -> FakeTensorMode:
    """The fake tensor mode of a network that was built of fake tensors; a new one for any other network."""
    return detect_fake_mode(list(net.parameters())) or FakeTensorMode(allow_non_fake_inputs=True)


class _Copy(Generic[_Net]):
    """``net`` in training mode, on tensors of its own; nothing that runs on the copy changes ``net``.

    Shapes, strides, dtypes, ``requires_grad`` and sharing are those of ``net``.

    Attributes:
        net: the copy.
    """

    def __init__(self, net: _Net, made: Callable[[Tensor], Tensor]) -> None:
        self._made: dict[int, Tensor] = {id(tensor): made(tensor) for tensor in _tensors(net)}
        self.net = copy.deepcopy(net, dict(self._made))
        if not net.training:
            self.net.train()

    def groups(self, params: list[Any]) -> list[Any]:
        """Parameters or parameter groups of ``net`` as those of the copy; a stranger to ``net`` stays as it is."""
        return [self._group(item) for item in params]

    def _group(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self._made.get(id(item), item)
        if isinstance(item, dict):
            return {**item, "params": self._group(item["params"])}
        if isinstance(item, tuple):  # (name, parameter)
            return tuple(self._group(part) for part in item)
        return [self._group(part) for part in item] if isinstance(item, list) else item


class FakeCopy(_Copy[_Net]):
    """``net`` on fake CPU tensors, whatever its device; to be made and used under :func:`fake_mode_of`."""

    def __init__(self, net: _Net) -> None:
        super().__init__(net, _fake)


class DataCopy(_Copy[_Net]):
    """``net`` with its data, on its device."""

    def __init__(self, net: _Net) -> None:
        super().__init__(net, _cloned)


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()
    for module in net.modules():  # and what is neither, but hangs on a module
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def _cloned(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
