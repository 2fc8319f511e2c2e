"""One call of a segment: what the model's submodules run in place of their own calls meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._torch import COMPILED_CALL, plain_call, tree_flatten, tree_unflatten
from ..nn import FusedSequential, run_chain
from .boundaries import runs_compiled
from .calls import Call, Form, Linear
from .carried import carried
from .ghost import CrossingError, Ghost
from .readout import Product, is_linear, may_wait
from .script import Action, Script

#: Models of which a segment runs, by ``id``.
_RUNNING: set[int] = set()


def runs_segment(model: nn.Module) -> bool:
    """Whether a segment of ``model`` runs now."""
    return id(model) in _RUNNING


class Reached(BaseException):  # no Exception, which a model might catch
    """The end of a segment, with its output."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out = out


class Run:
    """One call of a segment.

    Args:
        model: of the segment.
        script: of what its submodules do.
        h: the segment's input.
        apart: whether the product of a linear layer in which the model ends may wait, as a :class:`Product`.
    """

    def __init__(self, model: nn.Module, script: Script, h: Tensor, apart: bool = False) -> None:
        self._model = model
        self._script = script
        self._h = h
        self._readout = self._readout_of(model, script) if apart else None
        self._products: list[Product] = []
        self._thread = get_ident()
        self._left = {name: iter(actions) for name, actions in script.actions.items()}
        self._values = dict(zip(script.takes, (h, *carried(h)), strict=True))
        recorded = script.input if script.first is None else script.first.leaves[script.takes[0][2]]
        self._recorded: torch.dtype = recorded.dtype

    def ghost(self, form: Form) -> Ghost:
        # Converted models and autocast hand on another dtype than the dry run did.
        dtype = self._h.dtype if form.dtype == self._recorded else form.dtype
        return Ghost(form.meta(len(self._h), dtype), self._h.device)

    def input(self) -> Tensor:
        """The network's input; a ghost of it, which autocast leaves as it is, where it is not needed."""
        if ("", 0, 0) in self._values:
            return self._values["", 0, 0]
        form = self._script.input
        if not self._h.is_meta and torch.is_autocast_enabled(self._h.device.type):
            return Ghost(form.meta(len(self._h), form.dtype), self._h.device)
        return self.ghost(form)

    @contextmanager
    def patched(self) -> Iterator[None]:
        if id(self._model) in _RUNNING:
            raise RuntimeError("a segment of this model runs already: segments run one at a time")
        _RUNNING.add(id(self._model))
        before: list[tuple[nn.Module, Any]] = []
        partly = [self._model.get_submodule(name) for name in self._script.partly]
        attributes = [(module, dict(vars(module))) for module in partly]
        try:
            for name in self._script.actions:
                module = self._model.get_submodule(name)
                compiled = module.__dict__.get(COMPILED_CALL)
                before.append((module, compiled))
                module.__dict__[COMPILED_CALL] = self._patch(name, module, compiled)
            if self._readout is not None:
                before.append((self._readout, None))
                self._readout.__dict__[COMPILED_CALL] = self._waiting(self._readout)
            yield
        finally:
            for module, compiled in before:
                if compiled is None:
                    module.__dict__.pop(COMPILED_CALL, None)
                else:
                    module.__dict__[COMPILED_CALL] = compiled
            for module, held in attributes:  # what a forward keeps of an earlier segment is not there
                for key in [key for key, value in vars(module).items() if isinstance(value, Ghost)]:
                    if key in held:
                        module.__dict__[key] = held[key]
                    else:
                        del module.__dict__[key]
            _RUNNING.discard(id(self._model))

    def _patch(self, name: str, module: nn.Module, compiled: Any) -> Callable[..., Any]:
        as_always = plain_call(module) if compiled is None else compiled
        left = self._left[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != self._thread:
                return as_always(*args, **kwargs)
            action = next(left, None)
            if action is None:
                raise self.differs(f"{name} was called once more")
            if action.does == "skip":
                return self._returned(action.call)
            if action.children is None:
                out = as_always(*args, **kwargs)
            else:
                out = self._of_children(cast("nn.Sequential", module), action, args, kwargs)
            for leaf in self._script.keeps.get(action.call.key, ()):
                self._values[action.call.returned(leaf)] = tree_flatten(out)[0][leaf]
            if action.does == "stop":
                raise self._reached(out)
            return out

        return call

    @staticmethod
    def _readout_of(model: nn.Module, script: Script) -> nn.Linear | None:
        """The linear layer in which the model ends, if nothing of what calls it is compiled."""
        call = script.readout
        if call is None or call.name in script.actions:
            return None
        readout, *around = (model.get_submodule(each.name) for each in (call, *call.ancestors()))
        if not is_linear(readout) or any(map(runs_compiled, (readout, *around))):
            return None
        return readout

    def _waiting(self, readout: nn.Linear) -> Callable[..., Any]:
        as_always = plain_call(readout)

        def call(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != self._thread or not may_wait(readout, args, kwargs):
                return as_always(*args, **kwargs)
            self._products.append(Product(args[0], readout, as_always))
            return self._products[-1]

        return call

    def apart(self, out: Tensor) -> Tensor:
        """``out``, the model's output; of a product what :func:`auglocal_ext.segments.readout_of` takes."""
        if isinstance(out, Product):
            return out.apart()
        if any(product.blind for product in self._products):
            raise RuntimeError(
                f"the forward of {type(self._model).__name__} reads its logits without gradients and returns others, "
                "which it did not do when it was cut: localize the model again"
            )
        return out

    def _reached(self, out: Any) -> Reached:
        return Reached(tree_flatten(out)[0][self._script.returns[0][2]])

    def kept(self) -> list[Tensor]:
        """What the segment returns beside its output."""
        for key in self._script.returns[1:]:
            if key not in self._values:
                raise CrossingError(f"{key[0]} crosses the end of a segment that neither runs it nor is given it")
        return [self._values[key] for key in self._script.returns[1:]]

    def _returned(self, call: Call) -> Any:
        """What a skipped call returns: what the segment is given of it, and ghosts."""
        assert call.spec is not None
        leaves: list[Any] = []
        for index, leaf in enumerate(call.leaves):
            if call.returned(index) in self._values:
                leaves.append(self._values[call.returned(index)])
            elif isinstance(leaf, Form):
                leaves.append(self.ghost(leaf))
            else:
                leaves.append(leaf.at(len(self._h)) if isinstance(leaf, Linear) else leaf)
        return tree_unflatten(leaves, call.spec)

    def _of_children(self, module: nn.Sequential, action: Action, args: Any, kwargs: Any) -> Any:
        which = action.children
        assert which is not None

        def forward(x: Tensor) -> Tensor:
            if get_ident() != self._thread:
                return cast("Tensor", type(module).forward(module, x))
            if which.start > 0:
                x = self._returned(action.call.children[which.start - 1])
            children = list(module)[which.start : which.stop]
            if isinstance(module, FusedSequential):
                x = run_chain(children, x)
            else:
                for child in children:
                    x = child(x)
            if which.ends:
                raise self._reached(x)
            return x

        module.__dict__["forward"] = forward
        try:
            return plain_call(module)(*args, **kwargs)
        finally:
            del module.__dict__["forward"]

    def check(self) -> None:
        """RuntimeError if a call of the dry run did not happen."""
        for name, left in self._left.items():
            if next(left, None) is not None:
                raise self.differs(f"{name} was called less often")

    def differs(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self._model).__name__} called other submodules than when it was cut: {what}. A forward whose calls "
            "depend on values, or on random numbers, cannot be run in segments"
        )
