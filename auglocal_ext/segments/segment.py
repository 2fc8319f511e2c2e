"""``Segment``: the part of a model's own forward between two boundaries, as a module that runs alone.

A call runs the model's ``forward``. Submodules that finish before the segment return ghosts at once. The submodule
after which it begins returns the segment's input; the one after which it ends breaks off the forward with its output.
Where more than one tensor crosses a cut, the submodules that made them return them. Everything between is the model's
own code, functional parts, dropout and control flow included. A call changes one entry in the ``__dict__`` of each of
these submodules, and changes it back. In a process that does not hold the whole model, ghosts also stand for the
parameters and buffers that only other segments use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn import is_sharded
from .boundaries import Boundary, Passage
from .carried import carried, carry
from .ghost import CrossingError, Ghost, Standing, standing
from .recording import picked_output
from .run import Reached, Run
from .script import Script


class Segment(nn.Module):
    """The part of ``model.forward`` after boundary ``first`` and up to ``last``; None is its beginning, or its end.

    ``(N, *shape) -> (N, *shape)``, with what else crosses the two boundaries on these tensors
    (:func:`auglocal_ext.segments.carried`). Its parameters and buffers are those that are used in it, under the names
    that they have in the model, and its modules are those that it runs. The model is left as it is.

    Args:
        model: whose forward is run; not copied.
        passage: what was found of the model.
        own: names of the segment's parameters and buffers.
        shared: those of them that other segments use too; they stay where they are if the segment is moved.

    Attributes:
        spread: whether other segments' parameters and buffers may be sharded over processes, or on the meta device.

    Raises:
        CrossingError: when called, if the output depends on something that was skipped.
        RuntimeError: when called, if the model calls other submodules than in the dry run, or if it runs already.
    """

    def __init__(
        self,
        model: nn.Module,
        passage: Passage,
        first: Boundary | None,
        last: Boundary | None,
        own: tuple[str, ...],
        shared: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.model = model
        self.first, self.last = first, last
        self.passage = passage
        self._own = tuple(name.rpartition(".") for name in own)
        self._shared = shared
        self._scripts = tuple(Script(model, passage, (first, last), training) for training in (False, True))
        self.shape = passage.input_shape if first is None else first.shape
        self.spread = False
        self._others: list[tuple[nn.Module, str]] | None = None

    @property
    def whole(self) -> tuple[nn.Module, ...]:
        """The outermost submodules that run from beginning to end, in order."""
        return tuple(self.model.get_submodule(name) for name in dict.fromkeys(self._scripts[1].whole))

    @property
    def running(self) -> list[nn.Module]:
        """The modules that compute something: :attr:`whole` with all inside, and those whose tensors it uses."""
        inside = {part for whole in self.whole for part in whole.modules()}
        own = {id(tensor) for tensor in (*self.parameters(), *self.buffers())}
        return [
            part
            for part in self.model.modules()
            if part in inside
            or any(id(tensor) in own for tensor in (*part._parameters.values(), *part._buffers.values()))
        ]

    @property
    def entered(self) -> tuple[nn.Module, ...]:
        """The model, and those of its submodules that run in part."""
        names = dict.fromkeys(name for script in self._scripts for name in script.partly)
        return tuple(self.model.get_submodule(name) for name in names)

    @property
    def parts(self) -> list[Segment]:
        """Segments between all boundaries within it that one tensor crosses, in order."""
        inside = [each for each in self.passage.between(self.first, self.last) if not each.crossing]
        ends = zip([self.first, *inside], [*inside, self.last], strict=True)
        return [Segment(self.model, self.passage, a, b, *self.passage.owned(a, b)) for a, b in ends]

    def until(self, last: Boundary | None) -> Segment:
        """The part of it that ends at ``last``."""
        return Segment(self.model, self.passage, self.first, last, *self.passage.owned(self.first, last))

    @property
    def chained(self) -> bool:
        """Whether it calls :attr:`whole` one after another, each on the output of the one before, and does no more."""
        if any(end is not None and end.crossing for end in (self.first, self.last)):
            return False
        return self.passage.chained(self.first, self.last)

    def __repr__(self) -> str:
        return f"Segment({self.first or 'input'} .. {self.last or 'output'})"

    def forward(self, h: Tensor, apart: bool = False) -> Tensor:
        """The segment's output; ``apart``: what :func:`auglocal_ext.segments.readout_of` takes, if that is possible."""
        if self.shape is not None and tuple(h.shape[1:]) != self.shape:
            raise ValueError(f"{self!r} takes (N, {', '.join(map(str, self.shape))}), got {tuple(h.shape)}")
        script = self._scripts[self.model.training]
        if len(carried(h)) != len(script.takes) - 1:
            names = ", ".join(map(str, self.first.crossing)) if self.first is not None else "none"
            raise ValueError(
                f"{self!r} needs what crosses its beginning beside its input ({names}) and is given {len(carried(h))} "
                "such tensors: pass on module.hand_on(out), which keeps them, instead of out.detach()"
            )
        run = Run(self.model, script, h, apart)
        with run.patched(), standing(self._standing(h.device)):
            try:
                out = self.model(run.input())
            except Reached as reached:
                out, reached.out = reached.out, None
                reached.__traceback__ = None  # whose frames hold activations
                run.check()
            else:
                if self.last is not None:
                    raise run.differs(f"{self.last} was not reached")
                run.check()
                out = run.apart(picked_output(out, self.passage.output))
        beside = run.kept()
        if any(isinstance(each, Ghost) for each in (out, *beside)):
            raise CrossingError(f"the output of {self!r} depends on something before it that its input does not carry")
        return carry(out.view_as(out) if beside and out is h else cast("Tensor", out), beside)

    def _standing(self, device: torch.device) -> list[Standing]:
        """Ghosts for tensors that the code takes, but other segments use, where they are not whole here."""
        if not self.spread:
            return []
        if self._others is None:
            self._others = list(self._taken_of_others())
        ghosts: list[Standing] = []
        for module, key in self._others:
            tensors: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            tensor = tensors.get(key)
            if tensor is not None and (is_sharded(tensor) or (tensor.is_meta and device.type != "meta")):
                shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                ghosts.append((tensors, key, Ghost(shape, device)))
        return ghosts

    def _taken_of_others(self) -> Iterator[tuple[nn.Module, str]]:
        """Where the model has tensors that the segment's code takes without depending on them, under every name."""
        runs = self._scripts[False].runs | self._scripts[True].runs
        own = {path + dot + key for path, dot, key in self._own}
        taken = {name for name, takers in self.passage.takers.items() if name not in own and takers & runs}
        model = self.model
        named = dict((*model.named_parameters(), *model.named_buffers()))
        others = {id(named[name]) for name in taken if name in named}
        for module in model.modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) in others:
                    yield module, key

    def _tensors(self) -> Iterator[tuple[str, nn.Module, str]]:
        for path, dot, key in self._own:
            yield path + dot + key, self.model.get_submodule(path), key

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        start = prefix + ("." if prefix else "") + "model."
        for name, owner, key in self._tensors():
            if (parameter := owner._parameters.get(key)) is not None:
                yield start + name, parameter
            elif key not in owner._parameters and key not in owner._buffers:
                raise RuntimeError(
                    f"the model has no {name} any more, which it had when it was cut: localize it after adapters, "
                    "pruning and parametrizations are added, not before"
                )

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        start = prefix + ("." if prefix else "") + "model."
        for name, owner, key in self._tensors():
            if (buffer := owner._buffers.get(key)) is not None:
                yield start + name, buffer

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        memo = set() if memo is None else memo
        if self not in memo:
            memo.add(self)
            yield prefix, self
            start = prefix + ("." if prefix else "") + "model."
            for name in dict.fromkeys(self._scripts[1].whole):
                yield from self.model.get_submodule(name).named_modules(memo, start + name, remove_duplicate)

    def constants(self) -> Iterator[Tensor]:
        """Its buffers that no forward changes."""
        for name, owner, key in self._tensors():
            if name not in self.passage.changed and (buffer := owner._buffers.get(key)) is not None:
                yield buffer

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Segment:
        """Converts the segment's own tensors, under every name that they have in the model."""
        made: dict[int, Tensor] = {}
        for name, owner, key in self._tensors():
            tensor = owner._parameters.get(key) if key in owner._parameters else owner._buffers.get(key)
            if tensor is None or name in self._shared:
                continue
            new = fn(tensor)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in list(tensors.items()):
                    if tensor is not None and id(tensor) in made:
                        setattr(module, key, made[id(tensor)])  # an LSTM has them in a list too
        return self
