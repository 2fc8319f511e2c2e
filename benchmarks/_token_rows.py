"""The rows of ``benchmarks/memory.py`` for transformers: backpropagation, checkpointing and local learning.

Local modules have equal numbers of blocks. The embedding belongs to the first one, the last norm and the classifier or
readout to the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from _memory_rows import Row
from _networks import Loss
from _token_networks import transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from auglocal_ext import SOLO, AugLocal, Greedy, LocalSequential, LocalStep, Rule, fuse
from auglocal_ext.memory.meter import INPUTS
from auglocal_ext.ops import linear_cross_entropy
from auglocal_ext.planning import plan_memory
from auglocal_ext.training.run.networks import cut

OPTIMIZER = "AdamW fused"
#: Of ``activation_memory_budget``: the peak is not monotonic in it, so the best of several is the rival.
BUDGETS = (0.05, 0.15, 0.35, 0.5)
#: How a row updates: all parameters after the backward pass, each in the backward pass, or module by module
#: (``LocalStep``).
Update = Literal["end", "backward", "module"]
_RECOMPUTED = {"none": "", "all": " recompute", "peak": " recompute peak"}


@dataclass(frozen=True)
class TokenRow(Row):
    """``only_text``: of language models alone."""

    update: Update = "end"
    only_text: bool = False

    def fits(self, network: str) -> bool:
        return transformer(network).is_text or not self.only_text

    def build_step(self, network: str, batch: int, dtype: str) -> tuple[Callable[..., None], Sequence[Any]]:
        return build_step(self, network, batch, dtype)


def backpropagation(network: str, fused: bool = False, chunked: bool = True) -> tuple[nn.Module, Loss]:
    """``chunked``: the readout and the loss of a language model are one op, which makes no logits."""
    net = transformer(network).build()
    if fused:
        fuse(net)
    return net, _loss(network, net, net[:-1], chunked)


def checkpointing(network: str, fused: bool = False, chunked: bool = True) -> tuple[nn.Module, Loss]:
    """Embedding, blocks and last norm each keep their input alone and run again in the backward pass."""
    net = transformer(network).build()
    if fused:
        fuse(net)

    def features(x: Tensor) -> Tensor:
        for part in net[:-1]:
            x = cast("Tensor", checkpoint(part, x, use_reentrant=False, preserve_rng_state=False))
        return x

    return net, _loss(network, net, features, chunked)


def compiled_backpropagation(network: str) -> tuple[nn.Module, Loss]:
    net = transformer(network).build()
    return net, _loss(network, net, torch.compile(net[:-1]), chunked=True)


def _loss(network: str, net: nn.Sequential, features: Callable[[Tensor], Tensor], chunked: bool) -> Loss:
    """The loss of ``net``, whose children but the last make the features."""
    last = net[-1]
    if not transformer(network).is_text:
        return lambda x, y: F.cross_entropy(last(features(x)), y)
    if chunked:
        return lambda x, y: linear_cross_entropy(features(x), last.weight, last.bias, y).loss
    return lambda x, y: F.cross_entropy(last(features(x)).flatten(0, 1), y.flatten())


def local(network: str, rule: Rule, modules: int | None, fused: bool, recompute: str) -> tuple[LocalSequential, Loss]:
    """The network under a rule, cut between blocks into ``modules``, or one for each block."""
    model = transformer(network)
    count = model.blocks if modules is None else modules
    if model.blocks % count:
        raise ValueError(f"{count} local modules cannot have equal numbers of {model.blocks} blocks")
    cuts = [k * model.blocks // count for k in range(1, count)]  # layer 0 is the embedding
    net = cut(model.build(), rule, model.task(), model.input_shape, cuts, fused=fused)
    if recompute != "peak":
        net.recompute = recompute
    return net, lambda x, y: net(x, y).loss


def token_rows(cuda: bool) -> list[TokenRow]:
    """Rows named "eager" run torch's layers; other local rows run fused ones, the default of ``LocalSequential``."""
    plain: dict[str, Any] = {"only_text": True}
    lean: dict[str, Any] = {"fused": True}
    again: dict[str, Any] = {"recompute": "block"}
    table = [
        TokenRow("BP", "BP", backpropagation),
        TokenRow("BP fused", "BP", partial(backpropagation, fused=True), **lean),
        TokenRow("BP plain logits", "BP", partial(backpropagation, chunked=False), **plain),
        TokenRow("BP checkpointing", "checkpointing", checkpointing, **again),
        TokenRow("BP checkpointing fused", "checkpointing", partial(checkpointing, fused=True), **again, **lean),
        TokenRow(
            "BP checkpointing fused, update in backward",
            *("checkpointing", partial(checkpointing, fused=True)),
            update="backward",
            **again,
            **lean,
        ),
        TokenRow(
            *("BP checkpointing plain logits", "checkpointing", partial(checkpointing, chunked=False)), **again, **plain
        ),
    ]
    if cuda:
        table.append(TokenRow("BP compile", "compile", compiled_backpropagation, compiled=True))
        for budget in BUDGETS:
            name = f"BP compile, budget {budget}"
            table.append(TokenRow(name, "compile", compiled_backpropagation, compiled=True, budget=budget))
    table += _local_rows("Greedy", Greedy(), 2)
    table += _local_rows("Greedy", Greedy(), 4, eager=("none", "all"))
    table += _local_rows("Greedy", Greedy(), None)
    late = partial(local, rule=Greedy(), modules=4, fused=True, recompute="all")
    table.append(TokenRow("Greedy K=4 recompute, update at the end", "Greedy", late, fused=True, recompute="all"))
    two = AugLocal(depth=2, pyramid=0.0, joint_tail=False, single_layer_norm=False)
    for modules in (4, None):
        table += _local_rows("AugLocal d=2", two, modules)
    table += _local_rows("SOLO", SOLO(), 2, eager=())
    table += _local_rows("SOLO", SOLO(), 4)
    return table


def _local_rows(name: str, rule: Rule, modules: int | None, eager: Sequence[str] = ("none",)) -> Iterator[TokenRow]:
    """A row for each way of recomputation, by ``LocalStep``; of those in ``eager`` one more with torch's layers."""
    family, name = name.split()[0], f"{name} K={'L' if modules is None else modules}"
    for recompute, what in _RECOMPUTED.items():
        for fused in (True, False) if recompute in eager else (True,):
            make = partial(local, rule=rule, modules=modules, fused=fused, recompute=recompute)
            title = f"{name}{'' if fused else ' eager'}{what}"
            yield TokenRow(title, family, make, fused=fused, recompute=recompute, update="module")


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    # fused makes no temporaries, which others would as large as the gradients
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def build_step(row: TokenRow, network: str, batch: int, dtype: str) -> tuple[Callable[..., None], Sequence[Any]]:
    """One training step: gradients to none, loss, backward pass, and AdamW as ``row.update`` says."""
    half = torch.bfloat16 if dtype == "bf16" else None
    with _default_dtype(torch.bfloat16 if dtype == "pure-bf16" else torch.float32):
        net, loss_of = row.make(network)
        x, y = transformer(network).random_batch(batch)
    tracked: list[Any] = [net, {INPUTS: (x, y)}]
    if row.update == "module":
        owner = _local_step(cast("LocalSequential", net), batch, half, row.recompute)
        return partial(_run_local, owner, x, y), [*tracked, owner.optimizer]
    optimizers = [adamw(net.parameters())]
    if row.update == "backward":
        optimizers = [_updated_in_backward(parameter) for parameter in net.parameters()]

    def step(mark: Callable[[str], None]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        mark("forward")
        with torch.autocast(x.device.type, dtype=half, enabled=half is not None):
            loss = loss_of(x, y)
        mark("backward")
        loss.backward()
        del loss
        mark("optimizer")
        if row.update == "end":
            optimizers[0].step()

    return step, [*tracked, *optimizers]


def _local_step(net: LocalSequential, batch: int, half: torch.dtype | None, recompute: str) -> LocalStep:
    with torch.device("cpu"):  # as in a user's program: the tensors may be on a GPU, the default device is not
        plan = None
        if recompute == "peak":
            plan = plan_memory(net, batch, adamw, autocast=half, recompute="peak", overlap=False)
        # Not captured: the allocator counts what a graph uses once, when it is captured.
        return LocalStep(net, adamw, graph=False, overlap=False, autocast=half, plan=plan)


def _run_local(owner: LocalStep, x: Tensor, y: Tensor, mark: Callable[[str], None]) -> None:
    mark("modules")
    owner(x, y)


def _updated_in_backward(parameter: Tensor) -> torch.optim.Optimizer:
    """An optimizer of this parameter alone, stepped as soon as its gradient is there, which is then dropped."""
    optimizer = adamw([parameter])

    def update(parameter: Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(update)
    return optimizer


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
