"""What is done with a local module's finished gradients: accumulate, unscale, clip, step, drop; and a pass with it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .._torch import foreach_zero_, mark_as_wrapped
from ..distributed import Average, Replicas, Shards
from ..local_modules import LocalOutput, OneStream, PassModule, Relay, local_pass
from .optimizers import ModuleOptimizers

Clip = Literal["module", "global"]

#: BatchNorm's, which is the same in all replicas and would need a message of its own.
_COUNTER = "num_batches_tracked"


class Updates:
    """Steps each local module's optimizer as soon as its gradients are there, and drops them.

    Args:
        optimizers: the optimizer and its views.
        scaler: fp16 loss scaler; a module whose gradients overflow is left unchanged, the others are stepped.
        clip_norm: largest 2-norm of the gradients, None for no clipping.
        clip: ``"module"``: of each local module's by itself; ``"global"``: of all together, for which all
            gradients are kept to the end of the pass (as many bytes as the parameters).
        accumulate: calls per optimizer step, over which gradients are averaged; above 1 all gradients are kept.
        replicas: over which gradients are averaged with the last call of a step: those of a module while the next one
            runs, so gradients of two modules exist at a time. Of :class:`Shards` every call averages, and each process
            keeps its shard of the gradients.

    Raises:
        ValueError: if ``clip_norm`` is not positive, ``clip`` is unknown or ``accumulate`` is less than 1; and if the
            optimizer steps another one while several modules have gradients.
    """

    def __init__(
        self,
        optimizers: ModuleOptimizers,
        scaler: torch.amp.GradScaler | None,
        clip_norm: float | None,
        clip: Clip,
        accumulate: int,
        replicas: Replicas | None = None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping; got {clip_norm}")
        if clip not in get_args(Clip):
            raise ValueError(f"clip must be one of {', '.join(get_args(Clip))}, got {clip!r}")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate is the number of calls per optimizer step, at least 1; got {accumulate!r}")
        self.optimizers = optimizers
        self.scaler = scaler
        self.clip_norm = clip_norm
        self.clip = clip
        self.accumulate = accumulate
        self.replicas = replicas
        self._shards = replicas if isinstance(replicas, Shards) else None
        if accumulate > 1 and not self.all_at_once:
            optimizers.refuse_inner(f"accumulate={accumulate}")
        if replicas is not None and not self.all_at_once:
            optimizers.refuse_inner("replicas")
        self.calls = 0
        self.updated = False  # by the last call
        self._begun = False
        self._averaging: list[tuple[PassModule, Average]] = []
        self._shares: dict[torch.device, Tensor] = {}

    @property
    def due(self) -> bool:
        """Whether this call ends in an optimizer step."""
        return self.calls == self.accumulate - 1

    def scale(self, device: torch.device) -> Tensor | None:
        """0-dimensional factor of the losses: the scaler's scale over ``accumulate``; None for 1."""
        if self.scaler is None and self.accumulate == 1:
            return None
        share = self._shares.get(device)
        if share is None:
            # In float64 so that a double loss is divided exactly; the pass rounds it to the loss's dtype.
            share = torch.full((), 1 / self.accumulate, dtype=torch.float64, device=device)
            self._shares[device] = share
        return share if self.scaler is None else self.scaler.scale(share)

    def begin(self) -> None:
        """Before the first module: gradients that some other pass has left are dropped."""
        if self.calls == 0 and (self.accumulate == 1 or not self._begun):
            self.drop()
        self._begun = True

    def take(self, module: PassModule, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """The finished gradients of ``module``: with the last call of a step its parameters are updated at once.

        Gradients of parameters that the optimizer does not hold are dropped. Among replicas parameters are updated
        when the next module's gradients are there.
        """
        if self._shards is not None:
            self._scatter(self._shards, module, gradients)
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None or parameter not in self.optimizers.trained:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        if self.due and self.replicas is not None:
            owned = [p for group in self.optimizers.view(module.index).param_groups for p in group["params"]]
            self._averaging.append((module, self.replicas.average(module.index, owned, _moved(module))))
            if not self.all_at_once:
                self._finish(self._averaging[:-1])
                del self._averaging[:-1]
            return
        if self.due and not self.all_at_once:
            self._step(self.optimizers.view(module.index))
        module.after_step()

    def _scatter(self, shards: Shards, module: PassModule, gradients: Sequence[Tensor | None]) -> None:
        """Average the gradients of whole parameters, of which this process keeps its shard."""
        pairs = zip(shards.trained(module.index), gradients, strict=True)
        kept = [(p, g) for p, g in pairs if g is not None and p in self.optimizers.trained]
        buffers = _moved(module) if self.due else []
        self._averaging.append((module, shards.scatter(module.index, kept, buffers)))
        self._finish(self._averaging[:-1])  # which releases the whole gradients of the module before
        del self._averaging[:-1]

    def end(self) -> None:
        """After the last module."""
        self._finish(self._averaging)
        self._averaging.clear()
        if self.due:
            if self.all_at_once:
                self._step(self.optimizers.everything)
            if self.scaler is not None:
                self.scaler.update()

    def drop(self) -> None:
        """Forget all gradients and start counting calls anew."""
        self.calls = 0
        self._averaging.clear()
        self.updated = False
        self.optimizers.whole.zero_grad(set_to_none=True)

    def count(self) -> None:
        """One more call is done."""
        self.updated = self.due
        if self.updated:
            self.optimizers.finish()
        self.calls = (self.calls + 1) % self.accumulate

    @property
    def all_at_once(self) -> bool:
        """Whether all modules are updated together at the end of the pass."""
        return self.clip_norm is not None and self.clip == "global"

    def _finish(self, averaging: Sequence[tuple[PassModule, Average]]) -> None:
        for module, average in averaging:
            average.wait()
            if self.due and not self.all_at_once:
                self._step(self.optimizers.view(module.index))
            module.after_step()

    def _step(self, optimizer: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not trained:
            return
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if self.clip_norm is not None:
            clip = torch.nn.utils.clip_grad_norm_ if self._shards is None else self._shards.clip
            clip(trained, self.clip_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
        if self.accumulate == 1:
            for parameter in trained:
                parameter.grad = None
        else:  # the buffers are used again, by a captured step at the same address
            foreach_zero_([p.grad for p in trained])


def _moved(module: PassModule) -> list[Tensor]:
    """Buffers that the forward pass of a module moves."""
    return [b for part in module.parts() for name, b in part.named_buffers() if not name.endswith(_COUNTER)]


def guard_steps_by_hand(updates: Updates) -> None:
    """Make ``step()`` of the whole optimizer do nothing after a call that has updated the parameters.

    Frameworks count optimizer steps by it. Without gradients most optimizers do nothing anyway, but some count steps,
    and the zeros that an accumulation keeps would move the parameters by momentum and weight decay. Gradients of
    another pass are applied as usual.
    """
    # No references to either: a cycle would keep the optimizer's state until the garbage collector runs.
    updates_ref, whole_ref = weakref.ref(updates), weakref.ref(updates.optimizers.whole)
    plain = type(updates.optimizers.whole).step

    @functools.wraps(plain)
    def step(closure: Callable[[], Any] | None = None) -> Any:
        updates, whole = updates_ref(), whole_ref()
        assert whole is not None
        with torch.enable_grad():
            result = None if closure is None else closure()
        if updates is not None and updates.calls > 0:
            raise RuntimeError(
                f"step.optimizer.step() after {updates.calls} of the {updates.accumulate} calls of an accumulation: "
                "LocalStep steps the optimizer itself, in the last of them. A framework that counts steps by it is to "
                "call it only where step.updated is true"
            )
        ours = updates is not None and updates.accumulate > 1 and updates.updated  # the zeros
        if not ours and any(p.grad is not None for group in whole.param_groups for p in group["params"]):
            if updates is not None and updates.replicas is not None:
                raise RuntimeError(
                    "step.optimizer.step() with gradients of a pass of your own: they are this replica's alone, and "
                    "its weights would drift from the others'. Train by step(x, y), which averages them"
                )
            plain(whole)
        return result

    mark_as_wrapped(step)
    updates.optimizers.whole.step = step  # type: ignore[method-assign]


@contextmanager
def updating(updates: Updates, autocast: torch.dtype | None, device: torch.device) -> Iterator[Tensor | None]:
    """Around the passes of one step, which hand gradients to ``updates.take``; gives the factor of their losses.

    Args:
        autocast: None leaves it to a surrounding ``torch.autocast``.
        device: of the batch.
    """
    region = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    updates.begin()
    with torch.enable_grad(), region:
        yield updates.scale(device)
    updates.end()


def updating_pass(
    modules: Sequence[PassModule],
    x: Tensor,
    y: Tensor,
    updates: Updates,
    autocast: torch.dtype | None,
    streams: OneStream,
    relay: Relay | None = None,
) -> LocalOutput:
    """A pass over the local modules in which each is updated as soon as its gradients are there.

    Args:
        autocast: None leaves it to a surrounding ``torch.autocast``.
        streams: where the modules run.
        relay: what the first of ``modules`` takes in; default ``x``.
    """
    with updating(updates, autocast, x.device) as scale:
        return local_pass(modules, x, y, scale, updates.take, streams, relay)
