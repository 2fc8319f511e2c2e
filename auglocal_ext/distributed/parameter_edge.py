"""Parameters on their way back, from the stage that trains them to an earlier stage whose rule reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import version
from ..nn import is_sharded, own_part


class ParameterEdge:
    """Hands parameters of one stage to an earlier one, renewed every ``every`` steps and read ``lag`` steps later.

    Versions are numbered by the steps (training passes) of the reader. Version v are the parameters with which the
    owner begins the call in which the reader takes step v; it is sent once the owner has updated them in the call
    before. Step u reads version ``max(0, every * floor((u - lag) / every))``.

    There is no deadlock. The reader waits for what the owner has sent in an earlier call. Before the owner sends a
    version, it waits until the previous one has arrived, which the reader has requested in an earlier call. The reader
    holds ``ceil(lag / every) + 1`` versions, and the owner one.

    Args:
        group: process group of the stages, in which these two send nothing else: receives that were requested ahead
            hold up what is sent after them.
        owner, reader: the two stages, by rank in the group.
        parameters: the parameters as they are now; in the reader they have no memory.
        every, lag: numbers of steps.
        device: of the reader's copies.
        module: local module that reads them, for messages.
        shards: the mesh of replicas that share the parameters. Each sends its shards to the reader's replica of the
            same number, which gets ``DTensor``s of them. None: parameters are whole.
    """

    def __init__(
        self,
        group: Any,
        owner: int,
        reader: int,
        parameters: Callable[[], Sequence[nn.Parameter]],
        every: int,
        lag: int,
        device: torch.device,
        module: int,
        shards: Any = None,
    ) -> None:
        ranks = [torch.distributed.get_global_rank(group, stage) for stage in (owner, reader)]
        self.owner, self.reader = owner, reader
        self.owns = torch.distributed.get_rank() == ranks[0]
        self._group, self._peer = group, ranks[1] if self.owns else ranks[0]
        self._parameters, self._module, self._device = parameters, module, device
        self._every, self._ahead = every, -(-lag // every) * every
        self._lag = lag
        self._shards = shards
        self._forms = [_Form(self._own(p)) for p in parameters()]
        self._sending: list[tuple[Any, Tensor]] = []
        self._sent: list[tuple[int, int]] | None = None  # which tensors, as they were when they were last sent
        self._copies: dict[int, list[Tensor]] = {}
        self._asked: deque[tuple[int, list[Any], list[Tensor]]] = deque()
        self._next: int | None = None  # version to be asked for
        self._step = 0

    def begin(self, step: int) -> None:
        """The reader's step ``step`` begins; in both stages."""
        self._step = step
        if not self.owns:
            self._ask(step)
        elif self._sent is None:
            if step % self._every == 0:
                self._send()
            self._sent = _marks(self._parameters())
        elif self._sent != _marks(self._parameters()):
            raise RuntimeError(
                f"parameters that local module {self._module} follows have changed since the last step, and stage "
                f"{self.reader} has received them as they were before: call step.close() in all stages before you "
                "change weights by hand"
            )

    def end(self, step: int) -> None:
        """The owner has made the update of the call in which the reader takes step ``step``."""
        if self.owns and (step + 1) % self._every == 0:
            self._send()
        if self.owns:
            self._sent = _marks(self._parameters())

    def values(self) -> list[Tensor]:
        """What the reader's present step reads."""
        version = self._version(self._step)
        while version not in self._copies:
            self._arrive()
        return self._copies[version]

    def kept(self, versions: Sequence[int]) -> dict[int, list[Tensor]]:
        """Versions for steps to come, of those that the owner has sent."""
        while any(v not in self._copies for v in versions):
            self._arrive()
        return {v: self._copies[v] for v in versions}

    def resume(self, copies: Mapping[int, list[Tensor]]) -> None:
        """Begin the next run with these versions; after :meth:`close`."""
        self._copies = dict(copies)

    def close(self, step: int, kept: Sequence[int]) -> None:
        """End the run before step ``step``; in both stages. ``kept``: versions that a further run reads."""
        last = self._version(step) + self._ahead
        if self.owns:
            if self._sent is not None:
                for _ in range(step // self._every * self._every + self._every, last + 1, self._every):
                    self._send()  # has been asked for, and is not read
                self._finish()
            self._sent = None
            return
        if self._next is not None:
            self._ask(step)
            while self._asked:
                self._arrive()
            self._next = None
        self._copies = {v: copies for v, copies in self._copies.items() if v in kept}

    def _version(self, step: int) -> int:
        """Which one the reader's step reads."""
        return max(0, (step - self._lag) // self._every * self._every)

    def _send(self) -> None:
        self._finish()
        for message, tensors in _in_messages(self._forms, self._device):
            for at, place in tensors:
                place.copy_(self._form_of(at))
            if message.numel() == 0:
                continue
            work = torch.distributed.isend(message, self._peer, group=self._group)
            self._sending.append((work, message))

    def _form_of(self, index: int) -> Tensor:
        parameter, form = self._own(self._parameters()[index]), self._forms[index]
        if parameter.dtype != form.dtype or parameter.shape != form.shape:
            raise ValueError(
                f"a parameter that local module {self._module} follows was {form.dtype} {list(form.shape)} when the "
                f"step was built and is {parameter.dtype} {list(parameter.shape)} now: make a new LocalStep"
            )
        return parameter

    def _own(self, parameter: Tensor) -> Tensor:
        """This process's part of a parameter, or in the reader the form of it."""
        if self._shards is None or is_sharded(parameter):
            return own_part(parameter)
        parts = parameter.detach().chunk(self._shards.size())
        number = self._shards.get_local_rank()
        return parts[number] if number < len(parts) else parameter.detach()[:0]

    def _finish(self) -> None:
        self._wait([work for work, _ in self._sending])
        self._sending.clear()

    def _ask(self, step: int) -> None:
        needed = self._version(step)
        for old in [v for v in self._copies if v < needed]:
            del self._copies[old]
        if self._next is None:
            self._next = -(-step // self._every) * self._every
        while self._next <= needed + self._ahead:
            tensors: list[Tensor] = [torch.empty(0)] * len(self._forms)
            works = []
            for message, places in _in_messages(self._forms, self._device):
                if message.numel() > 0:
                    works.append(torch.distributed.irecv(message, self._peer, group=self._group))
                for at, place in places:
                    tensors[at] = place
            self._asked.append((self._next, works, tensors))
            self._next += self._every

    def _arrive(self) -> None:
        if not self._asked:
            raise RuntimeError(f"local module {self._module} reads parameters of another stage outside of a step")
        version, works, tensors = self._asked.popleft()
        self._wait(works)
        if self._shards is not None:
            tensors = [_sharded(p, t, self._shards) for p, t in zip(self._parameters(), tensors, strict=True)]
        self._copies[version] = tensors

    def _wait(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            theirs, did = (self.reader, "take") if self.owns else (self.owner, "send")
            raise RuntimeError(
                f"stage {theirs} did not {did} the parameters that local module {self._module} follows, in step "
                f"{self._step} (this is rank {torch.distributed.get_rank()}): it has ended, or works on another batch "
                f"for longer than the time-out of the process group. {error}"
            ) from error


class _Form:
    """Shape, dtype and, where it is dense, layout of a parameter."""

    def __init__(self, parameter: Tensor) -> None:
        self.shape, self.dtype = parameter.shape, parameter.dtype
        self.stride = torch.empty_like(parameter, memory_format=torch.preserve_format, device="meta").stride()
        self.numel = parameter.numel()


def _in_messages(forms: Sequence[_Form], device: torch.device) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
    """Memory for tensors, a run of it for each dtype, and for each of these the tensors in it with their indices."""
    messages = []
    for dtype in dict.fromkeys(form.dtype for form in forms):
        members = [(at, form) for at, form in enumerate(forms) if form.dtype == dtype]
        message = torch.empty(sum(form.numel for _, form in members), dtype=dtype, device=device)
        places, begin = [], 0
        for at, form in members:
            places.append((at, message[begin : begin + form.numel].as_strided(form.shape, form.stride)))
            begin += form.numel
        messages.append((message, places))
    return messages


def _marks(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes if a parameter is written to or put in another's place."""
    return [(part.data_ptr(), version(part)) for part in map(own_part, parameters)]


def _sharded(whole: Tensor, shard: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
