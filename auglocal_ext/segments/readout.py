"""The linear layer in which a model's forward ends, apart from what is before it.

A task that makes logits and loss in one op takes the input of that layer. While a segment runs for it, the layer's call
returns a :class:`Product`, which the model's own code hands on as it would the logits. Whatever else the code does with
it makes the logits, by the layer's own call, and the segment returns what it returns otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .._torch import FakeTensor, call_hooks, make_wrapper_subclass, tree_flatten, tree_unflatten
from ..nn import eager_type
from ..nn.fusable import must_be_eager

_ATTRIBUTE = "_auglocal_readout"
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
#: What is known of logits that have not been made.
_KNOWN = (Tensor.shape.__get__, Tensor.size, Tensor.dim, Tensor.ndim.__get__, Tensor.device.__get__)  # type: ignore[attr-defined]


class Product(Tensor):
    """Logits ``call(x)`` that are made once something is done with them; from then on it stands for those.

    Args:
        x: hidden states ``(N, T, C)``.
        linear: whose product with ``x`` they are.
        call: makes them.

    Attributes:
        blind: whether they were asked for while gradients were off, as they are in the forward of an autograd function.
    """

    x: Tensor
    linear: nn.Linear
    blind: bool
    _logits: Tensor | None
    _call: Callable[[Tensor], Tensor]
    _mode: tuple[bool, bool, torch.dtype]

    @staticmethod
    def __new__(cls, x: Tensor, linear: nn.Linear, call: Callable[[Tensor], Tensor]) -> Product:
        shape = (*x.shape[:-1], linear.weight.shape[0])
        self = make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device, storage_size=0)
        self.x, self.linear, self.blind, self._logits, self._call = x, linear, False, None, call
        device = x.device.type
        self._mode = torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return self

    def logits(self) -> Tensor:
        """As the layer's own call would have made them where it was called."""
        gradients, autocast, dtype = self._mode
        self.blind = self.blind or (gradients and not torch.is_grad_enabled())
        if self._logits is None:
            # The cache may hold casts that were made without gradients.
            casting = torch.autocast(self.x.device.type, dtype, enabled=autocast, cache_enabled=False)
            with torch.set_grad_enabled(gradients), casting:
                self._logits = self._call(self.x)
        return self._logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs or {}))
        args, kwargs = tree_unflatten([each.logits() if isinstance(each, Product) else each for each in leaves], spec)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"{func} was given logits that are not made, past torch's functions: localize the model again after a "
            "change of its forward"
        )

    def apart(self) -> Tensor:
        """``x``, of which :func:`readout_of` gives the layer; the logits where they have been made."""
        if self._logits is not None:
            return self._logits
        out = self.x.view_as(self.x)
        setattr(out, _ATTRIBUTE, self.linear)
        return out


def readout_of(h: Tensor) -> nn.Linear | None:
    """The linear layer that is left to do with what a segment returned; None where it returned its output."""
    linear: nn.Linear | None = getattr(h, _ATTRIBUTE, None)
    return linear


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is an ``nn.Linear`` without hooks, parametrizations and a forward of its own."""
    own = vars(module)
    return eager_type(module) is nn.Linear and not any(call_hooks(own)) and "forward" not in own


def may_wait(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a layer makes the product of tokens ``(N, T, C)`` and plain weights, and no more."""
    if not is_linear(linear) or len(args) != 1 or kwargs:
        return False
    x = args[0]
    plain = all(type(each) in _PLAIN for each in (x, *linear.parameters()))
    return plain and x.dim() == 3 and not x.is_meta and not must_be_eager(x)


class BeforeReadout(nn.Module):
    """A segment without the linear layer in which it ends; what it returns is for :func:`readout_of`."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment
        self.first = getattr(segment, "first", None)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.segment(h, apart=True)
        return out
