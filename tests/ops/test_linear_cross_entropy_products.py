"""linear_cross_entropy: bfloat16 products on a CPU, and gradients that backward hands on as they were made."""

from __future__ import annotations

import column
import pytest
import torch
from test_linear_cross_entropy import IGNORE, OP, cases, compare, inputs, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.memory import MemoryMeter
from auglocal_ext.ops import linear_cross_entropy, registry


class Names(TorchDispatchMode):
    """Which ops of the package ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "auglocal_ext":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("provider", ["cpu"])
@pytest.mark.parametrize("rows, width, classes", [(1, 1, 1), (7, 33, 50), (40, 64, 17), (64, 31, 48), (35, 6, 33)])
def test_logits_of_bfloat16_factors_are_float32(provider: str, rows: int, width: int, classes: int) -> None:
    x, weight = torch.randn(rows, width).bfloat16(), torch.randn(classes, width).bfloat16()
    exact, found, threads = x.double() @ weight.double().t(), [], torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(torch.full((rows, classes), float("nan")))
        made = column.op(f"{OP}_logits_", provider)(found[-1], x, weight)
    torch.set_num_threads(threads)
    if not made:
        pytest.skip("this processor does not multiply bfloat16")
    assert all(torch.equal(logits, found[0]) for logits in found)
    assert float((found[0] - exact).abs().max()) <= 1e-6 * width**0.5 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "classes", "small"),
    [((1, 1), 1, True), ((2, 3, 5), 7, True), ((64, 16), 16, True), ((65, 16), 16, False)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_small_problems_are_solved_by_one_compiled_call(shape, classes, small, dtype, bias) -> None:
    def ops_of(**options: float) -> list[str]:
        with Names() as used:
            linear_cross_entropy(x, weight, added, target, provider="cpu", **options)
        return used.names

    x, weight, added, target = inputs(shape, classes, dtype, "cpu", bias)
    compare(x, weight, added, target, "cpu")
    assert (ops_of() == [f"auglocal_ext.{OP}_small.cpu"]) is small
    for options in ({"z_loss": 1e-3}, {"label_smoothing": 0.1}):
        compare(x, weight, added, target, "cpu", **options)
        assert f"auglocal_ext.{OP}.cpu" in ops_of(**options)
    target.fill_(IGNORE)
    arguments = leaves(x, weight, added)
    out = linear_cross_entropy(*arguments, target, provider="cpu")
    grads = torch.autograd.grad(out.loss, [each for each in arguments if each is not None])
    assert out.loss == out.nll == out.correct == 0 and not any(grad.any() for grad in grads)


@cases
def test_gradients_that_are_handed_on_as_they_were_made(device: str, provider: str) -> None:
    """With an upstream gradient of 1, unless the graph is kept: then callers may add to them, or backward run again."""
    x, weight, bias, target = inputs((4, 6), 5, torch.float32, device)
    arguments = leaves(x, weight, bias)
    loss = linear_cross_entropy(*arguments, target, provider=provider).loss
    twice = torch.autograd.grad(loss * 2, arguments, retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(arguments, twice, strict=True))


def test_a_factor_is_left_out_where_it_is_one_and_nothing_can_tell() -> None:
    made, found = torch.randn(3), []

    class Scales(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx, factor: Tensor) -> Tensor:
            found.append(registry.scaled(made, factor))
            return found[-1]

    loss = Scales.apply(torch.randn(3, requires_grad=True))
    loss.backward(retain_graph=True)
    (loss * 2).backward(retain_graph=True)
    loss.backward()
    with MemoryMeter():
        Scales.apply(torch.randn(3, requires_grad=True)).backward()
    assert [grad is made for grad in found] == [False, False, True, False]
    assert torch.equal(found[0], made) and torch.equal(found[1], 2 * made)


@cases
def test_gradients_of_a_batch_of_factors(device: str, provider: str) -> None:
    """``is_grads_batched`` runs backward under vmap, where no value can be read."""
    x, weight, bias, target = inputs((4, 6), 5, torch.float32, device)
    arguments = leaves(x, weight, bias)
    loss = linear_cross_entropy(*arguments, target, provider=provider).loss
    factors = torch.tensor([1.0, 2.0], device=device)
    batched = torch.autograd.grad(loss, arguments, factors, is_grads_batched=True)
    loss = linear_cross_entropy(*arguments, target, provider=provider).loss
    for grads, grad in zip(batched, torch.autograd.grad(loss, arguments), strict=True):
        assert torch.equal(grads, torch.stack([grad, 2 * grad]))


@cases
def test_recorded_small_problems_have_shapes_and_gradients(device: str, provider: str) -> None:
    """Of a graph of operators, which knows neither nodes of our own nor that the problem was small."""

    def loss_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, bias, target, provider=provider, check_labels=False).loss

    x, weight, bias, target = inputs((4, 6), 5, torch.float32, device)
    arguments = leaves(x, weight, bias)
    graph = make_fx(loss_of)(*arguments)
    found, expected = (torch.autograd.grad(run(*arguments), arguments) for run in (graph, loss_of))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(weight)
        assert loss_of(x, fake, bias).shape == ()
