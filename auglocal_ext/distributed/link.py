"""Features on their way from one stage to the next: sent as soon as they exist, requested ahead of time."""

from __future__ import annotations

from collections import deque
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


#: In place of a batch's size: the run has ended.
_END = -1


class _Message:
    """The features of a batch that have been asked for: a number, then the tensors.

    The number says of how many samples they are, or that the run ends.
    """

    def __init__(self, forms: Sequence[Form], batch: int, device: torch.device, sender: int, group: Any) -> None:
        self.number = _number(0, device)
        self.tensors = [form.empty(batch, device) for form in forms]
        self.works = [torch.distributed.irecv(t, sender, group=group) for t in (self.number, *self.tensors)]


class Link:
    """The channel from one stage to the next.

    With the first batch the sender tells the receiver its form and size, which is the largest there may be: smaller
    batches travel in messages of that size. The receiver takes a batch ``delay`` calls after it was sent. Before it
    works on one, it has requested the next ``delay + 1``. Before the sender sends a batch, it waits until the previous
    one has arrived. So the sender is at most two calls ahead. The receiver holds at most ``delay + 1`` batches of
    features besides the one it works on; the sender holds one.

    Args:
        group: process group of the stages.
        sender, receiver: ranks of both ends within the group.
        names: of the tensors that travel, for messages.
        reads: whether the receiver reads a message's number where it is not on the CPU, which waits for the device.
        delay: calls from sending to receiving.
    """

    def __init__(
        self, group: Any, sender: int, receiver: int, names: Sequence[str], reads: bool, delay: int = 0
    ) -> None:
        self._group = group
        self._names = tuple(names)
        self._reads = reads
        self._delay = delay
        self._ends = sender, receiver
        self._batch = 0
        self._sender = torch.distributed.get_global_rank(group, sender)
        self._receiver = torch.distributed.get_global_rank(group, receiver)
        self._forms: list[Form] | None = None
        self._largest = 0
        self._sending: list[tuple[Any, Tensor]] = []
        self._asked: deque[_Message] = deque()
        self._arrived = 0  # how many of these have
        self._resumed: deque[list[Tensor]] = deque()  # of a checkpoint, before what was asked for

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

    def receive(self, batch: int, device: torch.device, sent: int | None) -> list[Tensor]:
        """The features that were sent ``delay`` calls ago, of ``batch`` samples; further ones are asked for.

        ``sent``: of how many samples the sender sends features in this call; None where it sends none.
        """
        if sent is not None:
            self._meet(sent, device)
        if self._resumed:
            arrived = self._resumed.popleft()
            self._same(len(arrived[0]), batch)
        else:
            arrived = self._take(0, batch)
            self._asked.popleft()
            self._arrived -= 1
        self._batch += 1
        if self._forms is not None:
            self._ask(device)
        return arrived

    def fill(self, batch: int, device: torch.device) -> None:
        """Wait for the features that are sent in this call, of ``batch`` samples, and which a later call receives."""
        self._meet(batch, device)
        self._take(self._arrived, batch)

    def in_flight(self, sizes: Sequence[int]) -> list[list[Tensor]]:
        """The features that were sent and not yet received, as many as ``sizes``, of so many samples each."""
        resumed = list(self._resumed)
        return resumed + [self._take(at, size) for at, size in enumerate(sizes[len(resumed) :])]

    def resume(self, in_flight: Sequence[list[Tensor]]) -> None:
        """Begin the next run with features that :meth:`in_flight` returned; after :meth:`close`."""
        self._resumed.extend(in_flight)

    def _meet(self, batch: int, device: torch.device) -> None:
        """The first contact of a run."""
        if self._forms is None:
            told: list[Any] = [None]
            with spent("waiting"), self._named("did not send"):
                torch.distributed.recv_object_list(told, self._sender, group=self._group)
            forms, largest = told[0]
            self._same(largest, batch)
            self._forms, self._largest = forms, largest
            self._ask(device)

    def _take(self, at: int, batch: int) -> list[Tensor]:
        """The features of a message that was asked for, once they have arrived."""
        assert self._forms is not None
        for message in [self._asked[i] for i in range(self._arrived, at + 1)]:
            with spent("waiting"):
                self._wait(message.works, "did not send")
            self._arrived += 1
        message = self._asked[at]
        sent = int(message.number) if message.number.is_cpu or self._reads else batch
        if sent == _END:
            self._forget()
            raise RuntimeError(
                f"stage {self._ends[0]} has ended its run (step.close(), or it failed), and this stage is called with "
                "a further batch: give every stage the same batches"
            )
        self._same(sent, batch)
        return [form.as_features(t)[:batch] for t, form in zip(message.tensors, self._forms, strict=True)]

    def _same(self, theirs: int, ours: int) -> None:
        if ours != theirs:
            raise ValueError(
                f"this stage was given {ours} samples in batch {self._batch} and the one before it {theirs}: every "
                "stage must be given the same batches"
            )

    def _ask(self, device: torch.device) -> None:
        assert self._forms is not None
        while len(self._resumed) + len(self._asked) < self._delay + 1:
            with self._named("did not send"):
                self._asked.append(_Message(self._forms, self._largest, device, self._sender, self._group))

    def close(self, device: torch.device, left: int = 0) -> None:
        """End the run, at both ends: the receiver has asked for batches that will not come, and is sent zeros.

        ``left``: how many batches were sent and not received; their features are dropped.
        """
        if self._forms is None:
            self._resumed.clear()
            return
        if torch.distributed.get_rank() == self._sender:
            self.finish()
            for _ in range(self._delay + 1 - left):
                self._send(_number(_END, device))
                for form in self._forms:
                    self._send(form.empty(self._largest, device).zero_())
            self.finish()
        else:
            dropped = left - len(self._resumed)
            for message in list(self._asked)[self._arrived :]:
                self._wait(message.works, "did not close")
            ends = [int(message.number) == _END for message in self._asked]
            if ends != [at >= dropped for at in range(len(ends))]:
                what = "has sent batch" if ends.count(False) > dropped else "has not sent batch"
                raise RuntimeError(
                    f"stage {self._ends[0]} {what} {self._batch + min(dropped, ends.count(False))}, which this stage "
                    f"was {'not ' * (ends.count(False) > dropped)}called with: give every stage the same batches"
                )
        self._forget()

    def _forget(self) -> None:
        self._forms, self._batch, self._arrived = None, 0, 0
        self._asked.clear()
        self._resumed.clear()


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
