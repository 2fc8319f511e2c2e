"""The training pass: forward, local loss, gradients and release, local module by local module.

Each module runs forward and loss, then ``torch.autograd.grad``. Its finished gradients are kept, its graph is
dropped, and its detached output goes to the next module.

- **Gradients leave through one autograd node.** ``out.loss`` is the output of a ``Function`` whose inputs are the
  parameters. Its backward multiplies the finished gradients in place by the incoming gradient (one ``foreach`` call,
  no host read) and returns them. ``AccumulateGrad`` therefore runs once per parameter, after the pass: DDP reduces
  each gradient once; accumulation, scaling and post-accumulate hooks work; nothing is copied. A second ``backward()``
  finds the node empty and raises.
- **Tensor hooks on parameters run once.** ``autograd.grad`` would run them inside the pass, and the node would run
  them again, so they are held back inside.
- **fp16.** With ``grad_scaler=`` the inner backward starts from the loss scale, and the node divides by it again. So
  ``scaler.scale(out.loss).backward()`` is exact for any scale, and nothing underflows in between.
- **Autocast's weight cache is off inside the pass.** It would keep the low-precision copies of all modules' weights
  alive until the end.
- **Context is added out of place.** An earlier input is released once no later module needs it.
- **Targets are checked before any work**: at once on the CPU. On CUDA the number of invalid ones is copied to pinned
  host memory and reported by a later call, so the pass never synchronises.
- **The last module keeps the network's own classifier and torch's loss**, so one module (K = 1) is backpropagation,
  to the bit when not fused. A task may make the classifier's last product and the loss in one op, as language modelling
  does, whose logits are too large to exist; K = 1 is then backpropagation up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._torch import backward_hooks, foreach_mul_
from ..auxiliary.base import LossContext
from ..segments import carried, detached
from .local_module import PassModule, Relay


class LocalOutput(NamedTuple):
    """Result of one pass over the local modules, or of one training step.

    Attributes:
        loss: scalar, the sum of the local losses. After ``net(x, y)`` its ``backward()`` hands the gradients to
            ``.grad``, once. After a :class:`auglocal_ext.LocalStep` it is detached.
        output: ``(N, outputs)``, or ``(N, outputs, H, W)`` of a segmentation: that of the last module, detached. Of
            :class:`auglocal_ext.LanguageModelling` it is empty, ``(N, T, 0)``, where its logits were never made.
        module_losses: ``(K,)``, detached.
        module_counts: ``(K,)``, what the task counts in each module's output, summed over the batch: top-1 hits for
            classification; ``(K, 2, C)`` for segmentation. -1 if nothing is counted. ``task.measure`` makes the metric
            of it.
    """

    loss: Tensor
    output: Tensor
    module_losses: Tensor
    module_counts: Tensor

    @property
    def logits(self) -> Tensor:
        """:attr:`output`, under its name in classification."""
        return self.output

    @property
    def module_correct(self) -> Tensor:
        """:attr:`module_counts`, under its name in classification: correct samples per module."""
        return self.module_counts


class Gradients:
    """The finished gradients of one pass, handed out once."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self.parameters: list[Tensor] = []
        self._values: list[Tensor | None] | None = []

    def add(self, parameters: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
        """Record gradients; those of a parameter shared by several modules are summed."""
        assert self._values is not None
        for parameter, value in zip(parameters, values, strict=True):
            at = self._index.setdefault(id(parameter), len(self.parameters))
            if at == len(self.parameters):
                self.parameters.append(parameter)
                self._values.append(value)
            elif value is not None:
                earlier = self._values[at]
                self._values[at] = value if earlier is None else earlier + value

    def take(self) -> list[Tensor | None]:
        if self._values is None:
            raise RuntimeError(
                "out.loss.backward() was called a second time for one pass: the gradients of the local modules were "
                "handed over by the first call and their graphs are gone. Call net(x, y) again for new gradients; "
                "to accumulate over batches call backward() once per pass"
            )
        values, self._values = self._values, None
        return values


class _HandOver(torch.autograd.Function):
    """Identity of the summed loss whose backward scales finished gradients and hands them to the parameters."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor | None, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values = ctx.gradients.take()
        factor = grad if ctx.scale is None else grad / ctx.scale
        by_device: dict[torch.device, list[Tensor]] = {}
        for value in values:
            if value is not None:
                by_device.setdefault(value.device, []).append(value)
        for device, group in by_device.items():
            foreach_mul_(group, factor.to(device, non_blocking=True))
        return (None, None, None, *values)


@contextmanager
def _hooks_held_back(parameters: Sequence[Tensor]) -> Any:
    """Within the context the parameters' tensor hooks do not run: they run when gradients are handed over."""
    held = []
    for parameter in parameters:
        hooks = backward_hooks(parameter)
        if hooks:
            held.append((hooks, dict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in held:
            hooks.update(saved)


def _uncached_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The surrounding autocast without its weight cache, which would keep every module's casts to the end."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False)


#: ``take(module, parameters, gradients)`` is given each module's finished gradients right after its backward. It calls
#: ``module.after_step()`` when it has used them.
Take = Callable[[PassModule, Sequence[nn.Parameter], Sequence[Tensor | None]], None]


class OneStream:
    """Where the modules of a pass run: one after the other, on the current stream.

    Attributes:
        current: the module that runs, or that failed; None before the first.
    """

    current: int | None = None

    def module(self, index: int) -> AbstractContextManager[Any]:
        """Entered for the whole of local module ``index``: forward, loss, backward, ``take``."""
        self.current = index
        return nullcontext()

    def handed_on(self, index: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        """Module ``index`` has made its output ``h``; the next may receive it, ``history`` and what ``h`` carries."""

    def join(self) -> None:
        """The pass is over: what it made is ready for the current stream."""


def local_pass(
    modules: Sequence[PassModule],
    x: Tensor,
    target: Tensor,
    scale: Tensor | None = None,
    take: Take | None = None,
    streams: OneStream | None = None,
    relay: Relay | None = None,
) -> LocalOutput:
    """One pass over the local modules; with gradients enabled each module's are finished before the next runs.

    The graph of module k lives from its forward to its own backward and is gone before module k + 1 runs: at
    most one module's activations exist at a time.

    Args:
        modules: the local modules in order.
        x: input batch.
        target: of the network's task, checked by the caller.
        scale: 0-dimensional factor for the inner backward (fp16 loss scale); taken out again when the gradients
            are handed over, but not for ``take``. None is 1.
        take: is given the gradients of each module at once; ``loss.backward()`` then has none to hand over.
        streams: where the modules run; default on the current stream.
        relay: what the first of ``modules`` takes in, where modules before it have run elsewhere; default ``x``.
    """
    streams = OneStream() if streams is None else streams
    with_gradients = torch.is_grad_enabled()
    gradients = Gradients()
    context = LossContext(target, x)
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    relay = Relay(modules, x) if relay is None else relay
    output = x
    for module in modules:
        with streams.module(module.index):
            with _uncached_autocast(x.device.type):
                h = relay.through(module.loss_input)
                passed = detached(h)
                streams.handed_on(module.index, passed, (*(relay.history or ()), *carried(passed)))
                scored = module.objective(h, context)
            relay.h = h = passed
            output = scored.output
            losses.append(scored.loss.detach())
            counts.append(scored.tally)
            if with_gradients:
                parameters = [p for p in module.parameters() if p.requires_grad]
                if take is None:
                    gradients.add(parameters, _gradients(parameters, scored.loss, scale, hooks=False))
                    module.after_step()
                else:
                    take(module, parameters, _gradients(parameters, scored.loss, scale, hooks=True))
            del scored
    streams.join()
    module_losses = torch.stack(losses)
    loss = losses[0] if len(losses) == 1 else module_losses.sum()
    if gradients.parameters:
        loss = _HandOver.apply(loss, scale, gradients, *gradients.parameters)
    return LocalOutput(loss, output.detach(), module_losses, torch.stack(counts))


def _gradients(
    parameters: Sequence[nn.Parameter], loss: Tensor, scale: Tensor | None, hooks: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of ``scale * loss``; ``hooks``: whether the parameters' tensor hooks run here or at the hand-over."""
    if not parameters:
        return ()
    outer = None if scale is None else scale.to(loss.dtype)
    held_back = nullcontext() if hooks else _hooks_held_back(parameters)
    with torch.autocast(loss.device.type, enabled=False), held_back:
        return torch.autograd.grad(loss, parameters, outer, allow_unused=True)
