"""Local modules whose parameters are spread over the replicas, and are whole only while they run.

torch's ``fully_shard`` holds the parameters: as shards between uses, gathered in one message for each group of them.
Its groups are thin modules around the submodules that own a local module's parameters, for three reasons. A local
module is a view and no ``nn.Module``. A segment of a model may use parameters of the model itself, such as a position
embedding, while the model's others belong to other segments. And ``fully_shard`` puts hooks on the module that it is
given and changes its class, which would take a user's layers out of the chains that run as one op.

Its hooks for gradients are not used, because they belong to ``backward()`` and wait at its end. The training pass calls
``torch.autograd.grad`` and has each module's gradients at once: they are reduced and scattered in one message per
module and dtype. As with replicas, the step waits for it when the next module's gradients are there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import backward_hooks, foreach_mul_, post_accumulate_hooks, tree_leaves
from ..nn import own_part, waiting_for
from .replicas import Average, Bucket, Message, Replicas, refuse_sparse


class Shards(Replicas):
    """The processes of a mesh, each with a shard of every parameter of one network.

    Args:
        mesh: of one dimension, with at least two processes.
        parameters, buffers: of the network, by name. They may be on the meta device.
        facts: what else must be equal in all processes, as plain values by name.
        modules: all modules of the network, among them the owners of its parameters.

    Raises:
        DisagreementError: in all processes, if parameters, buffers, ``facts`` or torch's version differ.
        ValueError: for a parameter that ``fully_shard`` cannot hold.
    """

    def __init__(
        self,
        mesh: Any,
        parameters: Iterable[tuple[str, nn.Parameter]],
        buffers: Iterable[tuple[str, Tensor]],
        facts: Mapping[str, Any],
        modules: Iterable[nn.Module],
    ) -> None:
        parameters = list(parameters)
        super().__init__(mesh.get_group(), parameters, buffers, facts)
        for name, parameter in parameters:
            _refuse(name, parameter)
        self._mesh = mesh
        self._modules = list(modules)
        self._groups: dict[int, tuple[list[Any], list[Any]]] = {}
        self._parameters: dict[int, list[nn.Parameter]] = {}

    def shard(self, module: int, body: Sequence[nn.Module], auxiliary: Sequence[nn.Module]) -> None:
        """Keep this process's shards of a local module, with the first process's values; a collective call.

        Args:
            module: its index.
            body: what it runs for its output.
            auxiliary: what it runs for its loss alone.
        """
        parts = [*body, *auxiliary]
        names = [self._names[id(p)] for p in _parameters(parts)]
        self.take_first([*_parameters(parts), *_unique(b for part in parts for b in part.buffers())])
        if {id(p) for p in _parameters(body)} & {id(p) for p in _parameters(auxiliary)}:
            body, auxiliary = parts, ()
        before = [weakref.ref(p) for p in _parameters(parts)]
        self._groups[module] = self._sharded(body), self._sharded(auxiliary)
        self._refuse_kept(before, names)
        self._parameters[module] = _parameters(parts)
        self._names.update((id(p), name) for p, name in zip(self._parameters[module], names, strict=True))

    def _sharded(self, parts: Sequence[nn.Module]) -> list[Any]:
        """The groups that hold the parameters of ``parts``: one for each dtype, as torch asks for."""
        from torch.distributed.fsdp import fully_shard

        held = _parameters(parts)
        ours = set(map(id, held))
        owners = [owner for owner in self._modules if not ours.isdisjoint(map(id, owner._parameters.values()))]
        groups = []
        for dtype in dict.fromkeys(p.dtype for p in held):
            # Those of an owner's children too, and the shards of the dtypes before.
            others = {p for p in _parameters(owners) if id(p) not in ours or p.dtype != dtype}
            group = _Group(owners)
            groups.append(fully_shard(group, mesh=self._mesh, reshard_after_forward=False, ignored_params=others))
        return groups

    def _refuse_kept(self, before: Iterable[weakref.ref[Any]], names: Iterable[str]) -> None:
        """ValueError for a whole parameter that a module keeps elsewhere, and would go on using untrained."""
        alive = {id(p): name for p, name in zip((ref() for ref in before), names, strict=True) if p is not None}
        for owner in self._modules if alive else ():
            for key, value in vars(owner).items():
                kept = () if key in ("_parameters", "_modules") else tree_leaves(value)
                for name in (alive[id(each)] for each in kept if id(each) in alive):
                    raise ValueError(
                        f"shard=True: {type(owner).__name__} keeps {name} beside its parameters, in its attribute "
                        f"{key}, where it would stay whole and untrained: let the forward take it from its module"
                    )

    @contextmanager
    def whole(self, module: int, then: int | None = None, *, auxiliary: bool = True) -> Iterator[None]:
        """Within the context the parameters of a local module are whole.

        Args:
            module: its index.
            then: the module that is to run next, whose parameters are asked for meanwhile.
            auxiliary: whether those of the auxiliary network are too.
        """
        # The memory of whole parameters is used again, and what is made in inference mode could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            self._gather(module, then, auxiliary)
        try:
            yield
        finally:
            with torch.inference_mode(False), torch.no_grad():
                self._release(module)

    def _gather(self, module: int, then: int | None, auxiliary: bool) -> None:
        with waiting_for(f"the parameters of local module {module} were not gathered", self.where):
            for index in (module, then):
                for group in () if index is None else self._chosen(index, auxiliary):
                    group.unshard(async_op=True)  # nothing, if it has been asked for before
            for group in self._chosen(module, auxiliary):
                group.unshard()

    def _chosen(self, module: int, auxiliary: bool) -> list[Any]:
        body, head = self._groups[module]
        return [*body, *head] if auxiliary else body

    def _release(self, module: int) -> None:
        for group in self._chosen(module, auxiliary=True):
            group.reshard()

    def trained(self, module: int) -> list[nn.Parameter]:
        """The shards of a local module's parameters that require a gradient, in the module's order."""
        return [p for p in self._parameters[module] if p.requires_grad]

    def scatter(
        self, module: int, gradients: Sequence[tuple[nn.Parameter, Tensor]], buffers: Iterable[Tensor]
    ) -> Average:
        """Begin to average gradients; each process gets its shard of the mean, added to ``.grad``.

        The whole parameters of the module are released.

        Args:
            module: its index.
            gradients: shards of parameters with the gradients of the whole parameters. Which parameters have one must
                not change from step to step.
            buffers: set to the first process's.

        Returns:
            The :class:`Average`, to be waited for.

        Raises:
            DisagreementError: if other parameters have a gradient than in the other processes or in an earlier step.
        """
        self._release(module)
        self._check(module, tuple(self._names[id(p)] for p, _ in gradients))
        alike: dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter, gradient in gradients:
            name = self._names[id(parameter)]
            refuse_sparse(name, gradient)
            if backward_hooks(parameter):
                raise RuntimeError(f"{name} is sharded, and a hook of its gradient would not run: remove the hook")
            alike.setdefault(gradient.dtype, []).append((parameter, gradient))
        moved: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            moved.setdefault(buffer.dtype, []).append(buffer)
        with torch.no_grad():
            scattered = [_Scattered(pairs, self.size) for pairs in alike.values()]
            copied = [Bucket((), each, self._first) for each in moved.values()]
        works = [_reduce_scatter(each.mine, each.rows, group=self._group, async_op=True) for each in scattered]
        works.extend(torch.distributed.all_reduce(each.message, group=self._group, async_op=True) for each in copied)
        messages: list[Message] = [*scattered, *copied]
        return Average(module, works, messages, self.size, self.where)

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> None:
        """``torch.nn.utils.clip_grad_norm_``, by the norm of the whole gradients; a collective call."""
        shards = [own_part(p.grad) for p in parameters]
        norm = torch.nn.utils.get_total_norm(shards)
        norms = norm.new_zeros(self.size)  # not the sum of squares, which overflows in fp16
        norms[torch.distributed.get_rank(self._group)] = norm
        torch.distributed.all_reduce(norms, group=self._group)
        factor = (largest / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
        foreach_mul_(shards, factor)


class _Group(nn.Module):
    """Owners of parameters that travel in one message."""

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        super().__init__()
        self.owners = nn.ModuleList(owners)


class _Scattered:
    """Gradients of one dtype, a row for each process: its shards, padded to the size of the first one's."""

    def __init__(self, gradients: Sequence[tuple[nn.Parameter, Tensor]], processes: int) -> None:
        self._parameters: list[Any] = [parameter for parameter, _ in gradients]
        self._sizes = [-(-g.shape[0] // processes) * g.shape[1:].numel() for _, g in gradients]
        rows = gradients[0][1].new_zeros(processes, sum(self._sizes))
        at = 0
        for (_, gradient), size in zip(gradients, self._sizes, strict=True):
            for row, part in zip(rows, gradient.chunk(processes), strict=False):
                row[at : at + part.numel()].view(part.shape).copy_(part)
            at += size
        self.rows = rows.view(-1)
        self.mine = rows.new_empty(sum(self._sizes))

    def put_back(self, processes: int) -> None:
        from torch.distributed.tensor import DTensor

        self.mine.div_(processes)
        at = 0
        for parameter, size in zip(self._parameters, self._sizes, strict=True):
            local = own_part(parameter)
            gradient = self.mine[at : at + local.numel()].view(local.shape)
            at += size
            if parameter.grad is not None:
                own_part(parameter.grad).add_(gradient)
                continue
            parameter.grad = DTensor.from_local(
                gradient,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )


def _reduce_scatter(*args: Any, **options: Any) -> Any:
    """The sum of rows over the processes, a row for each; torch has renamed it."""
    named = getattr(torch.distributed, "reduce_scatter_single", None)
    return (torch.distributed.reduce_scatter_tensor if named is None else named)(*args, **options)


def _unique(tensors: Iterable[Any]) -> list[Any]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _parameters(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    return _unique(p for part in parts for p in part.parameters())


def _refuse(name: str, parameter: nn.Parameter) -> None:
    """ValueError for a parameter that ``fully_shard`` does not hold, or not as it is."""
    if parameter.dim() == 0:
        raise ValueError(f"shard=True: {name} is a single number, which is not sharded; give it the shape (1,)")
    if not parameter.is_contiguous():
        raise ValueError(
            f"shard=True: {name} is not contiguous, and torch shards contiguous parameters alone: call "
            "net.to(memory_format=torch.contiguous_format). The input may stay channels-last"
        )
    if backward_hooks(parameter) or post_accumulate_hooks(parameter):
        raise ValueError(f"shard=True: {name} has a hook, which would not run: the parameter is replaced by its shards")
