"""Replicas of a network, each on its part of a batch: gradients are averaged local module by local module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._torch import foreach_copy_
from ..nn import waiting_for
from .agreement import DisagreementError, agree, shapes_of
from .times import spent


class Message(Protocol):
    """Gradients, or buffers, on their way."""

    def put_back(self, replicas: int) -> None:
        """Put what has arrived in place; sums over the replicas become means."""


class Average:
    """An average over the replicas that is under way; :meth:`wait` puts it in place."""

    def __init__(
        self, module: int, works: Sequence[Any], buckets: Sequence[Message], replicas: int, where: str
    ) -> None:
        self._module = module
        self._where = where
        self._works = works
        self._buckets = buckets
        self._replicas = replicas

    @spent("averaging")
    def wait(self) -> None:
        """The gradients become the mean of the replicas' and the buffers those of the first one.

        The current stream waits, not the host; with gloo the host does.
        """
        for work, bucket in zip(self._works, self._buckets, strict=True):
            with _waiting(self._module, self._where):
                work.wait()
            bucket.put_back(self._replicas)


def _waiting(module: int, where: str) -> AbstractContextManager[None]:
    return waiting_for(f"the gradients of local module {module} were not averaged", where, (DisagreementError,))


class Bucket:
    """Gradients, and buffers, of one dtype in one run of memory, so that they travel in one message."""

    def __init__(self, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], first: bool) -> None:
        self._parameters, self._buffers = parameters, buffers
        gradients = [p.grad for p in parameters if p.grad is not None]
        like = gradients[0] if gradients else buffers[0]
        self._trained = sum(g.numel() for g in gradients)
        self.memory = like.new_empty(self._trained + sum(b.numel() for b in buffers))
        # Bytes of one process and zeros have a sum in every library of communication, whatever the dtype.
        self.message = self.memory if gradients else self.memory.view(torch.uint8)
        self._gradients, at = [], 0
        for gradient in gradients:
            place = _place(self.memory, at, gradient)
            place.copy_(gradient)
            self._gradients.append(place)
            at += gradient.numel()
        for parameter, place in zip(parameters, self._gradients, strict=True):
            parameter.grad = place
        self._places = []
        for buffer in buffers:
            place = self.memory[at : at + buffer.numel()].view(buffer.shape)
            # The sum over all replicas is then the first one's value, to the bit.
            place.copy_(buffer) if first else place.zero_()
            self._places.append(place)
            at += buffer.numel()

    def put_back(self, replicas: int) -> None:
        if self._trained:
            self.memory[: self._trained].div_(replicas)
        if self._buffers:
            foreach_copy_(list(self._buffers), self._places)


def _place(memory: Tensor, at: int, like: Tensor) -> Tensor:
    """``like.numel()`` numbers of ``memory``, shaped and, where it is dense, laid out as ``like``."""
    part = memory[at : at + like.numel()]
    dense = torch.empty_like(like, memory_format=torch.preserve_format, device="meta")
    return part.as_strided(like.shape, dense.stride()) if like.numel() else part.view(like.shape)


def refuse_sparse(name: str, gradient: Tensor) -> None:
    """TypeError for a gradient of which only some rows are stored."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"{name} has a gradient of layout {gradient.layout}, which is not averaged over replicas: make the layer "
            "with sparse=False"
        )


class Replicas:
    """The processes of a group, each with a replica of one network.

    Once :meth:`take_first` has run, parameters stay equal, because every replica makes the same update with the same
    averaged gradients; the buffers that a module's forward pass moves, such as BatchNorm's running statistics, are set
    to the first replica's with every update, as DistributedDataParallel does.

    Args:
        group: process group of at least two processes.
        parameters, buffers: of the whole network, by name.
        facts: what else must be equal in all processes, as plain values by name.

    Attributes:
        size: how many replicas there are.
        where: this process and its batch, for messages.

    Raises:
        DisagreementError: in all processes, if parameters, buffers, ``facts`` or torch's version differ.
    """

    def __init__(
        self,
        group: Any,
        parameters: Iterable[tuple[str, nn.Parameter]],
        buffers: Iterable[tuple[str, Tensor]],
        facts: Mapping[str, Any],
    ) -> None:
        self._group = group
        self._first = torch.distributed.get_rank(group) == 0
        self.size = torch.distributed.get_world_size(group)
        self.where = f"rank {torch.distributed.get_rank()}"
        named = [*parameters, *buffers]
        agree({"torch": torch.__version__, **facts, **shapes_of(named)}, group)
        self._names = {id(tensor): name for name, tensor in named}
        self._trained: dict[int, tuple[str, ...]] = {}

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Parameters and buffers become those of the first replica; a collective call."""
        source = torch.distributed.get_global_rank(self._group, 0)
        for tensor in tensors:
            # Strided or expanded tensors do not travel as they are.
            whole = tensor.detach().clone(memory_format=torch.contiguous_format)
            torch.distributed.broadcast(whole.view(-1).view(torch.uint8), source, group=self._group)
            if not self._first:
                tensor.detach().copy_(whole)

    def average(self, module: int, parameters: Sequence[nn.Parameter], buffers: Iterable[Tensor]) -> Average:
        """Begin to average the gradients of a local module; they must not be used before :meth:`Average.wait`.

        Args:
            module: its index.
            parameters: whose ``.grad`` is averaged. Which of them have one must not change from step to step.
            buffers: set to the first replica's.

        Raises:
            DisagreementError: if other parameters have a gradient than in the other replicas or in an earlier step.
        """
        trained = [p for p in parameters if p.grad is not None]
        self._check(module, tuple(self._names.get(id(p), "a parameter of its own") for p in trained))
        by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[nn.Parameter], list[Tensor]]] = {}
        for p in trained:
            assert p.grad is not None
            refuse_sparse(self._names.get(id(p), "a parameter"), p.grad)
            by_kind.setdefault((p.grad.device, p.grad.dtype), ([], []))[0].append(p)
        for buffer in buffers:
            by_kind.setdefault((buffer.device, buffer.dtype), ([], []))[1].append(buffer)
        with torch.no_grad():
            buckets = [Bucket(*kind, self._first) for kind in by_kind.values()]
        works = [self._reduce(b.message) for b in buckets]
        return Average(module, works, buckets, self.size, self.where)

    def _reduce(self, message: Tensor) -> Any:
        return torch.distributed.all_reduce(message, group=self._group, async_op=True)

    def _check(self, module: int, trained: tuple[str, ...]) -> None:
        known = self._trained.get(module)
        if known is None:
            with _waiting(module, self.where):
                agree({f"the parameters of local module {module} that have a gradient": trained}, self._group)
            self._trained[module] = trained
        elif known != trained:
            changed = sorted(set(known) ^ set(trained))
            raise DisagreementError(
                f"local module {module} trains other parameters than in its first step: {', '.join(changed)} "
                "changed. Replicas must all train the same ones in every step: make a new LocalStep after freezing "
                "or unfreezing, and give layers that are skipped now and then a gradient of zero"
            )
