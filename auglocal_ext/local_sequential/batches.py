"""What a batch must be for a network, and what is said of one that is not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from ..auxiliary.base import Part, parts_of
from ..auxiliary.heads import Head
from ..nn import must_be_eager, refuse_sharding
from ..rules.base import Network, Rule
from ..tasks import Task
from .holding import Held


def warn_once(warned: set[str], about: str, message: str) -> None:
    """Warn, unless it was said before."""
    if about not in warned:
        warned.add(about)
        warnings.warn(message, stacklevel=3)


def warn_of_backpropagation(warned: set[str], out: Tensor) -> None:
    """Let the output's backward warn, once: ``net(x)`` in training mode is easily taken for local learning.

    Args:
        warned: of the network; not the network itself, which the output would keep alive.
    """
    if "backpropagation" in warned or must_be_eager(out) or not out.requires_grad:
        return

    @unserializable_hook
    def backpropagates(grad: Tensor) -> None:
        warn_once(
            warned,
            "backpropagation",
            "a backward through net(x) in training mode is ordinary backpropagation through the whole network: its "
            "auxiliary networks are not trained and all activations are kept. For local learning call net(x, y) and "
            "out.loss.backward(), or LocalStep; if backpropagation is meant, train net.primary",
        )

    out.register_hook(backpropagates)


class CheckedBatches(Held):
    """Checks the batches of a network before anything runs on them."""

    network: Network
    rule: Rule
    task: Task
    auxiliary: nn.ModuleList
    _one_image_norms: list[str]
    _choosy: tuple[Part, ...]
    _followed: Sequence[nn.Module]
    _warned: set[str]

    def _followable(self) -> Sequence[nn.Module]:
        raise NotImplementedError

    def warn_of_fp16(self, x: Tensor) -> None:
        """Warn, once, if a training pass on ``x`` would run in fp16: it has no loss scaler."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if dtype == torch.float16:
            warn_once(
                self._warned,
                "fp16",
                "a training pass in fp16 without grad_scaler: small gradients of the local modules underflow to "
                "zero. Pass net(x, y, grad_scaler=scaler), or use bfloat16",
            )

    def check_input(self, x: Tensor, *, training_pass: bool = False) -> None:
        """Raise TypeError or ValueError for inputs that the network was not wrapped for."""
        wanted = self.network.input_dtype
        if wanted is not None and (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"x must be integers, as the {wanted} this network was wrapped for; got {x.dtype}")
        if wanted is None and not x.is_floating_point():
            raise TypeError(
                f"x must be floating point, got {x.dtype}; convert and normalise images first, for example "
                "x.float().div(255). A network on integer tokens is wrapped with example_input="
            )
        expected = self.network.input_shape
        fits = x.dim() == len(expected) + 1
        if fits and training_pass:
            fits = tuple(x.shape[1:]) == expected
        elif fits and self.network.input is not None:
            axis = 1 if self.network.input.layout == "channels_first" else -1
            fits = x.shape[axis] == self.network.input.channels
        if not fits:
            raise ValueError(
                f"x must have shape (N, {', '.join(map(str, expected))}), the input_shape this network was wrapped "
                f"for; got {tuple(x.shape)}"
            )

    def check_batch(self, x: Tensor, y: Tensor, *, values: bool = True, merged: bool = False) -> None:
        """Raise for a batch that no training pass can run on, as :meth:`forward` does.

        ``values=False`` leaves out the values of ``y``, whose check on CUDA is a handful of kernels. ``merged``:
        BatchNorm takes its statistics over the batches of several processes, so one image is enough in each.
        """
        self.refuse_empty()
        self.check_input(x, training_pass=True)
        if len(x) == 0:
            raise ValueError("the batch is empty (N = 0); drop it before the training pass")
        self.check_target(y, len(x), values=values)
        if y.device != x.device:
            raise ValueError(f"x is on {x.device} and y on {y.device}; move y to {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires a gradient, but local modules hand none to their input; pass x.detach()")
        if not self.sharded:
            refuse_sharding(self)
        if any(child is not before for child, before in zip(self._followable(), self._followed, strict=False)):
            raise RuntimeError(
                "a layer was put in the place of another since the network was wrapped, but auxiliary networks follow "
                f"the layers of then ({self.rule!r}): wrap the network again"
            )
        if len(x) == 1 and not merged and self.training and self._one_image_norms:
            active = [n for n in self._one_image_norms if self.get_submodule(n).training]
            if active:
                raise ValueError(
                    f"a batch of one image: {active[0]} is a BatchNorm layer that sees one value per channel in it, "
                    "whose variance is undefined. Use a batch of at least 2 (drop_last=True in the DataLoader)"
                )

    def check_target(self, y: Tensor, samples: int, *, values: bool = True) -> None:
        """Raise TypeError or ValueError for targets that the task, or a part of an auxiliary network, does not take."""
        self.task.check(y, samples, values=values)
        for part in self._choosy:
            part.check_target(y)

    def _choosy_parts(self) -> tuple[Part, ...]:
        """Parts that do not take every target the network's task does."""
        return tuple(
            part
            for part in parts_of(self.auxiliary)
            if type(part).check_target is not Part.check_target
            and not (isinstance(part, Head) and part.settings.task is self.task)
        )
