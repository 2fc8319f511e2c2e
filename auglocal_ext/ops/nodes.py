"""Autograd nodes of ops whose backward pass is one call of another op, or scales what the forward pass made.

A description of the gradients is all that an op gives. A node in C++, of the library ``nodes``, records calls on
tensors of torch's own classes. Where there is no library, and for other classes, a node in Python does the same and
takes the host several times as long. Compiled code has the node that torch makes for custom ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from .._torch import below_autograd, schema
from . import providers, registry
from .batch_norm_checks import cast_to


class Gradients(NamedTuple):
    """How the gradients of an op are made by one call of another. Names are those of the two ops' schemas.

    An argument of the other op is the input or the result of the same name, if nothing else is said.

    Attributes:
        op: the name of the other op. None for a loss whose own results are its gradients: backward scales those by the
            gradient of the loss, and expands what has fewer dimensions than its input over the last ones.
        of: by the input, the result of ``op`` that is its gradient, or one of ``incoming``, which is passed on.
        incoming: the arguments that are gradients of results, in their order.
        others: how many results callers get beside those that have gradients.
        needs: by the argument, inputs. True where one of them needs its gradient.
        fixed: by the argument, what it is always.
        renamed: by the argument, the input or result that it is.
        alone: by the input, the one of ``incoming`` that is its gradient where the first result has none.
    """

    op: str | None
    of: Mapping[str, str]
    incoming: tuple[str, ...] = ("grad",)
    others: int = 0
    needs: Mapping[str, tuple[str, ...]] = {}
    fixed: Mapping[str, Any] = {}
    renamed: Mapping[str, str] = {}
    alone: Mapping[str, str] = {}


class From(IntEnum):
    """Where an argument of the other op comes from; ``csrc/nodes/nodes.cpp`` has the same numbers."""

    GRADIENT = 0
    INPUT = 1
    RESULT = 2
    NEEDS = 3
    FIXED = 4


class _Argument(NamedTuple):
    kind: From
    place: int  # for NEEDS the inputs, a bit each
    fixed: Any


class _Gradient(NamedTuple):
    input: int
    place: int  # of a result of the other op, or of an incoming gradient; without another op, of an argument
    passed: bool


class _Recipe(NamedTuple):
    """A description with places for names."""

    op: str | None
    inputs: int
    incoming: int
    results: int  # that callers get
    arguments: tuple[_Argument, ...]  # of the other op; without one, the results that are gradients
    gradients: tuple[_Gradient, ...]
    alone: tuple[_Gradient, ...] = ()


def _recipe(op: Any, how: Gradients, provider: str) -> _Recipe:
    forward = schema(op)
    inputs, results = [each.name for each in forward.arguments], [each.name for each in forward.returns]
    sizes = len(inputs), len(how.incoming), len(how.incoming) + how.others
    if how.op is None:
        places = sorted((inputs.index(name), results.index(made)) for name, made in how.of.items())
        return _Recipe(
            *(None, *sizes),
            tuple(_Argument(From.RESULT, place, None) for _, place in places),
            tuple(_Gradient(name, place, False) for place, (name, _) in enumerate(places)),
        )
    backward = schema(registry.overload(how.op, provider))
    made = [each.name for each in backward.returns]

    def argument(name: str) -> _Argument:
        if name in how.incoming:
            return _Argument(From.GRADIENT, how.incoming.index(name), None)
        if name in how.fixed:
            return _Argument(From.FIXED, 0, how.fixed[name])
        if name in how.needs:
            return _Argument(From.NEEDS, sum(1 << inputs.index(each) for each in how.needs[name]), None)
        name = how.renamed.get(name, name)
        if name in inputs:
            return _Argument(From.INPUT, inputs.index(name), None)
        return _Argument(From.RESULT, results.index(name), None)

    def gradients(of: Mapping[str, str]) -> tuple[_Gradient, ...]:
        found = []
        for name, source in of.items():
            passed = source in how.incoming
            place = how.incoming.index(source) if passed else made.index(source)
            found.append(_Gradient(inputs.index(name), place, passed))
        return tuple(sorted(found))

    return _Recipe(
        *(how.op, *sizes),
        tuple(argument(each.name) for each in backward.arguments),
        gradients(how.of),
        gradients(how.alone),
    )


def _keep(ctx: Any, recipe: _Recipe, inputs: Sequence[Any], made: Sequence[Tensor]) -> None:
    """Save on ``ctx`` what :func:`_made` needs of a call."""
    ctx.set_materialize_grads(False)
    kept = [
        (inputs if each.kind is From.INPUT else made)[each.place]
        for each in recipe.arguments
        if each.kind is From.INPUT or each.kind is From.RESULT
    ]
    tensors = [each if isinstance(each, Tensor) else None for each in kept]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(each, Tensor) else each for each in kept]
    ctx.forms = {
        each.input: None if (x := inputs[each.input]) is None else (x.dtype, x.shape) for each in recipe.gradients
    }
    ctx.recipe = recipe
    ctx.mark_non_differentiable(*made[recipe.incoming :])


def _made(provider: str, ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs, those that are needed."""
    recipe: _Recipe = ctx.recipe
    needs = ctx.needs_input_grad
    made: list[Tensor | None] = [None] * recipe.inputs
    if incoming[0] is None:
        for each in recipe.alone:
            if needs[each.input]:
                made[each.input] = incoming[each.place]
        return tuple(made)
    if recipe.op is None:
        for each, tensor in zip(recipe.gradients, ctx.saved_tensors, strict=True):
            if needs[each.input]:
                made[each.input] = _scaled(tensor, incoming[0], ctx.forms[each.input], each.input)
        return tuple(made)
    kept = iter(zip(ctx.saved_tensors, ctx.others, strict=True))
    arguments: list[Any] = []
    for kind, place, fixed in recipe.arguments:
        if kind is From.GRADIENT:
            arguments.append(incoming[place])
        elif kind is From.NEEDS:
            arguments.append(any(needs[i] for i in range(recipe.inputs) if place >> i & 1))
        elif kind is From.FIXED:
            arguments.append(fixed)
        else:
            tensor, other = next(kept)
            arguments.append(other if tensor is None else tensor)
    results = registry.kernel(recipe.op, provider)(*arguments)
    for each in recipe.gradients:
        if needs[each.input]:
            gradient = incoming[each.place] if each.passed else results[each.place]
            made[each.input] = None if gradient is None else cast_to(ctx.forms[each.input][0], gradient)
    return tuple(made)


def _scaled(made: Tensor, factor: Tensor, form: tuple[torch.dtype, torch.Size], place: int) -> Tensor:
    """The gradient of the input at ``place``, of this dtype and shape, from what the forward pass made."""
    dtype, shape = form
    if not made.numel():
        raise RuntimeError(f"the gradient of input {place} was not made; set the need_* argument for it")
    # Scaled before it is rounded, so that a loss scale keeps a float16 gradient from underflowing.
    grad = cast_to(dtype, registry.scaled(made, factor))
    return grad.reshape(*grad.shape, *(1,) * (len(shape) - grad.dim())).expand(shape) if grad.shape != shape else grad


def autograd(
    table: providers.Table,
    gradients: Sequence[Gradients],
    which: Callable[[Sequence[Any]], int],
    instead: str,
    name: str,
    primitive: str | None = None,
) -> None:
    """Give the op ``name`` its gradients, for callers of :func:`registry.run` and for compiled code.

    Args:
        table: of the public op, for messages, and its providers.
        gradients: the ways to make them, of which ``which(inputs)`` is the number of one.
        instead: what has second derivatives.
        primitive: the forward pass, which takes the op's first inputs; for a loss the op itself. None for an op that is
            never in compiled code.
    """
    for provider in table.providers:
        op = registry.overload(name, provider.name)
        recipes = [_recipe(op, each, provider.name) for each in gradients]
        if primitive is not None:
            _for_compiled_code(op, table.op, provider.name, recipes, which, instead)
        forward = op if primitive is None else registry.overload(primitive, provider.name)
        registry.enter(op, _node(forward, table.op, provider.name, recipes, which, instead))


def _for_compiled_code(
    op: Any, public: str, provider: str, recipes: Sequence[_Recipe], which: Callable[..., int], instead: str
) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _keep(ctx, recipes[which(inputs)], inputs, _several(output))

    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        registry.refuse_create_graph(public, instead)
        return _made(provider, ctx, *incoming)

    registry.register_autograd(op, backward, setup_context)


def _node(
    forward: Any, public: str, provider: str, recipes: Sequence[_Recipe], which: Callable[..., int], instead: str
) -> Callable[..., Any]:
    """Runs ``forward`` with a node: returns its first result, or a tuple of those that have gradients."""
    taken = len(schema(forward).arguments)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            recipe = recipes[which(inputs)]
            with below_autograd():  # where the op itself has a node of torch's
                made = _several(forward(*inputs[:taken]))
            _keep(ctx, recipe, inputs, made)
            return made[0] if recipe.results == 1 else made[: recipe.results]

        @staticmethod
        def backward(ctx: Any, *incoming: Tensor | None) -> Any:
            registry.refuse_create_graph(public, instead)
            return _made(provider, ctx, *incoming)

    in_python = Recorded.apply
    begun = False
    run: Any = None
    numbers: list[int] = []

    def begin() -> None:
        nonlocal begun, run, numbers
        library, refusal = native.nodes(), registry.differentiable_once(public, instead)
        if not isinstance(library, str):
            numbers = [_define(library, forward, provider, each, taken, refusal) for each in recipes]
            run = library.run
        begun = True

    def call(*inputs: Any) -> Any:
        if not begun:
            begin()
        made = None if run is None else run(numbers[which(inputs)], *inputs)
        return in_python(*inputs) if made is None else made

    def number(*inputs: Any) -> int | None:
        if not begun:
            begin()
        return None if run is None else numbers[which(inputs)]

    call.in_python = in_python  # type: ignore[attr-defined]  # for tests
    call.number = number  # type: ignore[attr-defined]  # for calls that are remembered
    return call


def _define(library: Any, forward: Any, provider: str, recipe: _Recipe, taken: int, refusal: str) -> int:
    name = schema(forward).name
    return int(
        library.define(
            (name, provider),
            None if recipe.op is None else (f"auglocal_ext::{recipe.op}", provider),
            *(taken, recipe.incoming, recipe.results, recipe.arguments, recipe.gradients, recipe.alone, refusal),
        )
    )


def _several(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)
