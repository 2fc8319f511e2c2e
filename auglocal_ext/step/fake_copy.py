"""A copy of a network without its data: fake CPU tensors of the same shapes, on which a step can be tried out.

It is a deepcopy with a memo that maps every parameter and buffer to a fake tensor of the same form.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from ..local_sequential import LocalSequential


def fake_mode_of(net: nn.Module) -> FakeTensorMode:
    """The fake tensor mode of a network that was built of fake tensors; a new one for any other network."""
    return detect_fake_mode(list(net.parameters())) or FakeTensorMode(allow_non_fake_inputs=True)


class FakeCopy:
    """``net`` on fake CPU tensors, in training mode; to be made and used under :func:`fake_mode_of`.

    Shapes, strides, dtypes, ``requires_grad`` and sharing are those of ``net``, whatever its device. No data is
    copied, and nothing that runs on the copy changes ``net``.

    Attributes:
        net: the copy.
    """

    def __init__(self, net: LocalSequential) -> None:
        self._fakes: dict[int, Tensor] = {id(tensor): _fake(tensor) for tensor in _tensors(net)}
        self.net = copy.deepcopy(net, dict(self._fakes))
        if not net.training:
            self.net.train()

    def groups(self, params: list[Any]) -> list[Any]:
        """Parameters or parameter groups of ``net`` as those of the copy; a stranger to ``net`` stays as it is."""
        return [self._group(item) for item in params]

    def _group(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self._fakes.get(id(item), item)
        if isinstance(item, dict):
            return {**item, "params": self._group(item["params"])}
        if isinstance(item, tuple):  # (name, parameter)
            return tuple(self._group(part) for part in item)
        return [self._group(part) for part in item] if isinstance(item, list) else item


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
