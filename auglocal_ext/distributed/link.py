"""Features on their way from one stage to the next: sent as soon as they exist, received one batch ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .times import spent


@dataclass(frozen=True)
class Form:
    """How a tensor of features lies in a message.

    Attributes:
        shape: without the batch axis.
        order: axes from the outermost in memory to the innermost, so that channels-last maps arrive as such.
        dtype: of the elements.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Form:
        order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])
        if order[0] != 0 or not tensor.permute(order).is_contiguous():
            order = list(range(tensor.dim()))
        return Form(tuple(tensor.shape[1:]), tuple(order), tensor.dtype)

    def fits(self, first: Form) -> bool:
        """Whether such a tensor can travel as ``first``; the order of few samples, or positions, is arbitrary."""
        return self.shape == first.shape and self.dtype == first.dtype

    def empty(self, batch: int, device: torch.device) -> Tensor:
        """A message of ``batch`` samples, contiguous; :meth:`as_features` shows it as features."""
        shape = (batch, *self.shape)
        return torch.empty([shape[axis] for axis in self.order], dtype=self.dtype, device=device)

    def as_message(self, features: Tensor) -> Tensor:
        return features.permute(self.order).contiguous()

    def as_features(self, message: Tensor) -> Tensor:
        return message.permute([self.order.index(axis) for axis in range(len(self.order))])


#: In place of a batch's size: none comes any more.
_END = -1


class Link:
    """What leaves one stage and arrives at the next.

    Both ends meet in the first batch, whose size is the largest there may be: smaller ones travel in messages of that
    size. From then on the receiver has always asked for the next batch before it works on this one, and the sender
    waits before it sends a batch until the one before has arrived. So at most two batches are in flight.

    A number goes before the features: how many samples they are of, or that the run ends.

    Args:
        group: process group of the stages.
        sender, receiver: ranks of both ends within the group.
        names: of the tensors that travel, for messages.
        reads: whether the receiver reads that number where it is not on the CPU, which waits for the device.
    """

    def __init__(self, group: Any, sender: int, receiver: int, names: Sequence[str], reads: bool) -> None:
        self._group = group
        self._names = tuple(names)
        self._reads = reads
        self._ends = sender, receiver
        self._batch = 0
        self._sender = torch.distributed.get_global_rank(group, sender)
        self._receiver = torch.distributed.get_global_rank(group, receiver)
        self._forms: list[Form] | None = None
        self._largest = 0
        self._sending: list[tuple[Any, Tensor]] = []
        self._asked: list[tuple[Any, Tensor]] = []

    def check(self, batch: int) -> None:
        """ValueError for a batch that the messages do not hold; in every stage alike, before any work."""
        if self._forms is not None and batch > self._largest:
            raise ValueError(
                f"a batch of {batch} samples after a first one of {self._largest}: messages between stages have the "
                "size of the first batch; begin with the largest"
            )

    @spent("sending")
    def send(self, tensors: Sequence[Tensor]) -> None:
        """Begin to send the features of one batch."""
        forms, batch = [Form.of(tensor) for tensor in tensors], len(tensors[0])
        if self._forms is None:
            self._forms, self._largest = forms, batch
            with self._named("did not take"):
                torch.distributed.send_object_list([(forms, batch)], self._receiver, group=self._group)
        changed = next((i for i, form in enumerate(forms) if not form.fits(self._forms[i])), None)
        if changed is not None:
            raise ValueError(
                f"{self._names[changed]} had the form {self._forms[changed]} in the first batch and has "
                f"{forms[changed]} now: what stages hand on must not change during a run"
            )
        self.finish()
        self._send(_number(batch, tensors[0].device))
        for form, tensor in zip(self._forms, tensors, strict=True):
            message = form.as_message(tensor.detach())
            if batch < self._largest:
                whole = form.empty(self._largest, tensor.device)
                whole[:batch] = message
                whole[batch:] = 0
                message = whole
            self._send(message)
        self._batch += 1

    def _send(self, message: Tensor) -> None:
        with self._named("did not take"):
            self._sending.append((torch.distributed.isend(message, self._receiver, group=self._group), message))

    def finish(self) -> None:
        """Wait until what was sent has arrived."""
        self._wait([work for work, _ in self._sending], "did not take")
        self._sending.clear()

    def _wait(self, works: Sequence[Any], failed: str) -> None:
        with self._named(failed):
            for work in works:
                work.wait()

    @contextmanager
    def _named(self, failed: str) -> Iterator[None]:
        """Name the stage that was waited for, this one and the batch, where torch's error does not."""
        try:
            yield
        except RuntimeError as error:
            sender, receiver = self._ends
            ours, theirs = (sender, receiver) if failed == "did not take" else (receiver, sender)
            raise RuntimeError(
                f"stage {theirs} {failed} the features of batch {self._batch} (stage {ours} is rank "
                f"{torch.distributed.get_rank()}): it has ended, or works on another batch for longer than the "
                f"time-out of the process group. {error}"
            ) from error

    def receive(self, batch: int, device: torch.device) -> list[Tensor]:
        """The features of one batch; those of the next one are asked for."""
        if self._forms is None:
            told: list[Any] = [None]
            with spent("waiting"), self._named("did not send"):
                torch.distributed.recv_object_list(told, self._sender, group=self._group)
            forms, largest = told[0]
            self._same(largest, batch)
            self._forms, self._largest = forms, largest
            self._ask(device)
        assert self._forms is not None
        with spent("waiting"):
            self._wait([work for work, _ in self._asked], "did not send")
        (_, number), *features = self._asked
        sent = int(number) if number.is_cpu or self._reads else batch
        if sent == _END:
            self._forget()
            raise RuntimeError(
                f"stage {self._ends[0]} has ended its run (step.close(), or it failed), and this stage is called with "
                "a further batch: give every stage the same batches"
            )
        self._same(sent, batch)
        self._batch += 1
        arrived = [form.as_features(message)[:batch] for (_, message), form in zip(features, self._forms, strict=True)]
        self._ask(device)
        return arrived

    def _same(self, theirs: int, ours: int) -> None:
        if ours != theirs:
            raise ValueError(
                f"this stage was given {ours} samples in batch {self._batch} and the one before it {theirs}: every "
                "stage must be given the same batches"
            )

    def _ask(self, device: torch.device) -> None:
        assert self._forms is not None
        self._asked = []
        for message in (_number(0, device), *(form.empty(self._largest, device) for form in self._forms)):
            with self._named("did not send"):
                work = torch.distributed.irecv(message, self._sender, group=self._group)
            self._asked.append((work, message))

    def close(self, device: torch.device) -> None:
        """End the run, at both ends: the receiver has asked for a batch that will not come, and is sent zeros."""
        if self._forms is None:
            return
        if torch.distributed.get_rank() == self._sender:
            self.finish()
            self._send(_number(_END, device))
            for form in self._forms:
                self._send(form.empty(self._largest, device).zero_())
            self.finish()
        else:
            self._wait([work for work, _ in self._asked], "did not close")
            if int(self._asked[0][1]) != _END:
                raise RuntimeError(
                    f"stage {self._ends[0]} has sent batch {self._batch}, which this stage was not called with: give "
                    "every stage the same batches"
                )
        self._forget()

    def _forget(self) -> None:
        self._asked, self._forms, self._batch = [], None, 0


def _number(value: int, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=torch.int64, device=device)


def send_now(tensors: Sequence[Tensor], group: Any, to: int) -> None:
    """Send tensors of any size to a rank of a group, and wait until they have arrived."""
    forms = [Form.of(tensor) for tensor in tensors]
    to = torch.distributed.get_global_rank(group, to)
    torch.distributed.send_object_list([(forms, len(tensors[0]))], to, group=group)
    for form, tensor in zip(forms, tensors, strict=True):
        torch.distributed.send(form.as_message(tensor.detach()), to, group=group)


def receive_now(device: torch.device, group: Any, sender: int) -> list[Tensor]:
    """What :func:`send_now` has sent."""
    told: list[Any] = [None]
    sender = torch.distributed.get_global_rank(group, sender)
    torch.distributed.recv_object_list(told, sender, group=group)
    forms, batch = told[0]
    arrived = []
    for form in forms:
        message = form.empty(batch, device)
        torch.distributed.recv(message, sender, group=group)
        arrived.append(form.as_features(message))
    return arrived
