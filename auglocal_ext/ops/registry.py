"""How an op is made known to torch: an overload per provider, each with schema, fake kernel, implementation, autograd.

The implementations of ``reference``, ``aten`` and ``triton`` are functions of ``reference/<op>.py``, ``aten/<op>.py``
and ``triton/<op>.py``, the last two imported when they first run. Those of ``cpu`` and ``cuda`` register themselves
when ``native`` loads their libraries. An op that calls several kernels of its library from Python has a
``cpu/<op>.py`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._torch import below_autograd, current_dispatch_mode, graph_is_kept, schema
from . import providers, tuning

_library = torch.library.Library("auglocal_ext", "FRAGMENT")


def table(op: str, aten: tuple[str, ...] = ("cpu", "cuda")) -> providers.Table:
    """The provider table of an op that has all five, in their order of preference, known to ``info`` from now on.

    ``aten`` names the devices on which torch's kernels keep the op's contract.
    """
    return providers.register(
        providers.Table(
            op,
            (
                providers.Provider("cuda", ("cuda",), providers.SINGLE),
                providers.Provider("cpu", ("cpu",), providers.ALL),
                providers.Provider(
                    "triton", ("cuda", "cpu") if providers.interpreted() else ("cuda",), providers.SINGLE
                ),
                providers.Provider("aten", aten, providers.ALL),
                providers.Provider("reference", None, providers.ALL),
            ),
        )
    )


def plain_table(op: str) -> providers.Table:
    """The provider table of an op whose work is matrix products: torch's own kernels on every device but a CPU."""
    rows = (providers.Provider(name, None, providers.ALL) for name in ("aten", "reference"))
    return providers.register(providers.Table(op, (providers.Provider("cpu", ("cpu",), providers.ALL), *rows)))


def overload(name: str, provider: str) -> Any:
    """``torch.ops.auglocal_ext.<name>.<provider>``."""
    return getattr(getattr(torch.ops.auglocal_ext, name), provider)


_overloads: dict[tuple[str, str], Any] = {}


def kernel(name: str, provider: str) -> Any:
    """:func:`overload` for code that runs at every step and that ``torch.compile`` does not read."""
    found = _overloads.get((name, provider))
    if found is None:
        found = _overloads[name, provider] = overload(name, provider)
    return found


def chosen(op: str, x: Tensor, provider: str | None, name: str | None = None, beside: tuple[Any, ...] = ()) -> Any:
    """The overload that runs ``op``, or its primitive ``name``, for the feature map x; see ``tuning.pick``."""
    if torch.compiler.is_compiling() or type(x) not in tuning.PLAIN:
        return overload(name or op, providers.choose(op, x.device, x.dtype, provider))
    key = name or op, x.shape, x.stride(), x.dtype, x.device, provider, providers.asked()
    found = tuning.lookups.get(key)
    if found is None:
        picked, settled = tuning.pick(op, x, provider, beside)
        found = overload(name or op, picked)
        if settled:
            tuning.remember(key, found)
    return found


def is_settled(op: str, x: Tensor, provider: str | None) -> bool:
    """Whether :func:`chosen` finds the same again, until a decision changes."""
    key = op, x.shape, x.stride(), x.dtype, x.device, provider, providers.asked()
    return type(x) in tuning.PLAIN and key in tuning.lookups


def primitive(table: providers.Table, name: str, signature: str, fake: Callable[..., Any], function: str) -> None:
    """Define ``name``, a kernel of every provider: in those written in Python it is called ``function``."""
    for provider in table.providers:
        _define(f"{name}.{provider.name}", signature, fake)
        if provider.name == "reference":
            module = import_module(f"{__package__}.reference.{table.op}")
            _library.impl(f"{name}.reference", getattr(module, function), "CompositeExplicitAutograd")
        elif provider.name in ("aten", "triton"):
            _implement(table, name, provider, function)


def composite(
    table: providers.Table,
    name: str,
    signature: str,
    fake: Callable[..., Any],
    forward: Callable[..., Any],
    aten: str | None = None,
) -> None:
    """Define ``name`` over the op's primitives, by ``forward(provider, *arguments)``.

    The compiled libraries may have a kernel of it, which then runs in its place. So does ``aten``'s function of the
    name ``aten``.
    """
    for provider in table.providers:
        overload_name = f"{name}.{provider.name}"
        _define(overload_name, signature, fake)
        _library.impl(overload_name, partial(forward, provider.name), "CompositeExplicitAutograd")
    if aten is not None:
        _implement(table, name, table.row("aten"), aten)


def steered(table: providers.Table, name: str, function: str, kernels: dict[str, str]) -> None:
    """Give ``name`` of the provider ``cpu`` an implementation in Python, ``function`` of ``cpu/<op>.py``.

    ``kernels``: what it calls, functions of the compiled library that write to their arguments, with their signatures.
    """
    _implement(table, name, table.row("cpu"), function)
    for kernel_name, signature in kernels.items():
        _library.define(f"{kernel_name}.cpu{signature}")


_recorded: dict[int, Callable[..., Any]] = {}  # by the overload's id, because its hash is a function of Python's


def enter(overload: Any, call: Callable[..., Any]) -> None:
    """Let :func:`run` run ``overload`` by ``call``, which records it for backward."""
    _recorded[id(overload)] = call


def run(overload: Any, *inputs: Any) -> Any:
    """``overload(*inputs)``, of an op that has gradients, in compiled code; else what was entered for it.

    torch's own node for a custom op goes over the schema at every call, for tracers too. Ours take the host less than
    half as long.
    """
    if torch.compiler.is_compiling():
        return overload(*inputs)
    return _recorded[id(overload)](*inputs)


def first(overload: Any, *inputs: Any) -> Tensor:
    """The first result of :func:`run`, for an op of which callers get no other."""
    made: Tensor | tuple[Tensor, ...] = run(overload, *inputs)
    return made if isinstance(made, Tensor) else made[0]


def recorder(overload: Any) -> Callable[..., Any]:
    """What :func:`run` runs for ``overload``, outside of compiled code."""
    return _recorded[id(overload)]


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give the overload ``op`` the gradients that compiled code uses."""
    name = f"{schema(op).name}.{schema(op).overload_name}"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)


def autograd(
    table: providers.Table,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    instead: str,
    results: int | None = None,
) -> None:
    """Give the op its gradients, by ``backward(provider, ctx, *gradients)``; ``instead`` has second derivatives.

    Of several results :func:`run` returns the first ``results``. The others are there for ``setup_context``.
    """
    for provider in table.providers:
        op = overload(table.op, provider.name)

        def once(ctx: Any, *gradients: Tensor | None, provider: str = provider.name) -> Any:
            refuse_create_graph(table.op, instead)
            return backward(provider, ctx, *gradients)

        register_autograd(op, once, setup_context)
        enter(op, _recorded_by(op, once, setup_context, results))


def _recorded_by(
    op: Any, once: Callable[..., Any], setup_context: Callable[..., None], results: int | None
) -> Callable[..., Any]:
    """``op`` with a node of our own, in place of the one that torch has for it."""

    class Recorded(torch.autograd.Function):
        backward = staticmethod(once)

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with below_autograd():
                made = op(*inputs)
            setup_context(ctx, inputs, made)
            return made if results is None else made[:results]

    def call(*inputs: Any) -> Any:
        return Recorded.apply(*inputs) if torch.is_grad_enabled() else op(*inputs)

    return call


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """``factor * grad``, for a backward pass whose graph keeps ``grad``.

    ``grad`` itself, without a pass over it, where the host sees that the factor is 1 and no second backward pass will
    read what callers may write to.
    """
    if type(factor) is Tensor and factor.device.type == "cpu" and not graph_is_kept():
        # Whatever records or counts operators is not to see one that depends on a value.
        if current_dispatch_mode() is None and _is_one(factor):
            return grad
    return factor * grad


def _is_one(factor: Tensor) -> bool:
    try:
        return factor.item() == 1
    except RuntimeError:  # one of a batch of factors, under vmap
        return False


def refuse_create_graph(name: str, instead: str) -> None:
    """RuntimeError in a backward pass that is recorded for second derivatives, which ``name`` does not have."""
    if torch.is_grad_enabled():
        raise RuntimeError(differentiable_once(name, instead))


def differentiable_once(name: str, instead: str) -> str:
    """The message of :func:`refuse_create_graph`."""
    return (
        f"{name} is differentiable once. Call backward without create_graph=True, or for second derivatives use "
        f"{instead}"
    )


def flops(name: str, formula: Callable[..., int]) -> None:
    """Tell torch's FLOP counter what matrix products the op ``name`` makes inside, by ``formula(*arguments)``."""

    def count(*arguments: Any, out_val: Any = None) -> int:
        return formula(*arguments)

    register_flop_formula(getattr(torch.ops.auglocal_ext, name), get_raw=True)(count)


def _define(overload_name: str, signature: str, fake: Callable[..., Any]) -> None:
    _library.define(overload_name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"auglocal_ext::{overload_name}", fake, lib=_library)


def _implement(table: providers.Table, name: str, provider: providers.Provider, function: str) -> None:
    late = partial(_late, f"{__package__}.{provider.name}.{table.op}", function)
    keys = ("CompositeExplicitAutograd",) if provider.devices is None else map(str.upper, provider.devices)
    for key in keys:
        _library.impl(f"{name}.{provider.name}", late, key)


def _late(module: str, function: str, *arguments: Any) -> Any:
    return getattr(import_module(module), function)(*arguments)
