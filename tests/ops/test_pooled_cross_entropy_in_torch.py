"""pooled_cross_entropy as an op of torch: compilation, fake tensors, autocast, wrong use; streams and graphs."""

from __future__ import annotations

import column
import pytest
import torch
import torch.nn.functional as F
from test_pooled_cross_entropy import IGNORE, compare, composition, inputs, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext.nn import PooledLinear
from auglocal_ext.ops import PooledCrossEntropy, pooled_cross_entropy, providers

OP = "pooled_cross_entropy"


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(provider: str, reduction: str, smoothing: float) -> None:
    x, weight, bias, target = inputs((3, 4, 2, 3), 5, torch.float64, "cpu")

    def loss(*arguments: Tensor) -> Tensor:
        out = pooled_cross_entropy(
            *arguments, target, reduction=reduction, label_smoothing=smoothing, provider=provider
        )
        return out.loss

    torch.autograd.gradcheck(loss, leaves(x, weight, bias))


@column.cases
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck(device: str, provider: str, bias: bool) -> None:
    x, weight, bias_, target = inputs((4, 6, 3, 2), 5, torch.float32, device, bias)
    arguments = (*leaves(x.transpose(2, 3), weight, bias_), target, IGNORE, 0.1, True, True, True, bias)
    torch.library.opcheck(column.op(OP, provider), arguments)
    torch.library.opcheck(column.op(OP, provider), (x, *arguments[1:7], False, True, bias))


@column.cases
def test_compiles_as_one_graph(device: str, provider: str) -> None:
    tensors = inputs((4, 6, 3, 2), 5, torch.float32, device)

    def step(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> PooledCrossEntropy:
        return pooled_cross_entropy(x * 2, weight, bias, target, label_smoothing=0.1, provider=provider)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = leaves(*tensors[:3]), leaves(*tensors[:3])
    out, wanted = compiled(*found, tensors[3]), step(*expected, tensors[3])
    (out.loss * 2).backward()
    (wanted.loss * 2).backward()
    torch.testing.assert_close(out.logits, wanted.logits)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_automatic_choice_compiles() -> None:
    x, weight, bias, target = inputs((4, 6, 3, 2), 5, torch.float32, "cpu")
    compiled = torch.compile(pooled_cross_entropy, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, bias, target).loss, composition(x, weight, bias, target)[0])


@column.cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6, 3, 2, dtype=torch.float16, device=device, requires_grad=True)
        weight = torch.empty(5, 6, dtype=torch.float16, device=device, requires_grad=True)
        target = torch.empty(4, dtype=torch.int64, device=device)
        out = pooled_cross_entropy(x, weight, None, target, provider=provider)
        grads = torch.autograd.grad(out.loss, (x, weight))
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    assert out.logits.shape == (4, 5) and out.correct.dtype == torch.int64
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype), (weight.shape, weight.dtype)]
    assert grads[0].stride() == (6, 1, 0, 0)


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_lets_dtypes_meet(device: str, provider: str, low: torch.dtype) -> None:
    x, weight, bias, target = inputs((5, 7, 3, 4), 6, torch.float32, device)
    x = x.to(low)
    arguments, wide = leaves(x, weight, bias), leaves(x.float(), weight, bias)
    with torch.autocast(device, low):
        out = pooled_cross_entropy(*arguments, target, provider=provider)
    expected = pooled_cross_entropy(*wide, target, provider=provider)
    grads, wanted = torch.autograd.grad(out.loss, arguments), torch.autograd.grad(expected.loss, wide)
    assert [g.dtype for g in grads] == [low, torch.float32, torch.float32]
    torch.testing.assert_close(out.logits, expected.logits)  # nothing was rounded to autocast's dtype on the way
    for found, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, exact.to(found.dtype))
    with pytest.raises(TypeError, match="run under torch.autocast"):
        pooled_cross_entropy(*arguments, target, provider=provider)


@column.cases
def test_scaled_loss_does_not_underflow(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((4, 6, 32, 32), 5, torch.float16, device)
    arguments = leaves(x, weight * 1e-2, bias)
    (pooled_cross_entropy(*arguments, target, provider=provider).loss * 65536).backward()
    exact = leaves(*(a.double() for a in arguments))
    (composition(*exact, target)[0] * 65536).backward()
    for name, found, oracle in zip(("x", "weight", "bias"), arguments, exact, strict=True):
        column.assert_close(name, found.grad, oracle.grad.half(), oracle.grad)
    # The same gradient, unscaled, is mostly below what float16 can hold.
    assert ((exact[0].grad / 65536).half() == 0).float().mean() > (found.grad == 0).float().mean()


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((4, 6, 3, 2), 5, torch.float32, device)
    arguments = leaves(x, weight, bias)
    with pytest.raises(RuntimeError, match="differentiable once"):
        loss = pooled_cross_entropy(*arguments, target, provider=provider).loss
        torch.autograd.grad(loss, arguments, create_graph=True)
    loss = pooled_cross_entropy(*arguments, target, provider=provider).loss
    first = torch.autograd.grad(loss, arguments, retain_graph=True)
    again = torch.autograd.grad(loss, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def _with(**changes):
    x, weight, bias, target = inputs((4, 6, 3, 2), 5, torch.float32, "cpu")
    return {"x": x, "weight": weight, "bias": bias, "target": target, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"expected x of shape \(N, C\)"),
        ({"x": torch.zeros(0, 6, 3, 2)}, ValueError, "at least one image"),
        ({"x": torch.zeros(4, 6, 0)}, ValueError, "at least one image"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"expected weight of shape \(K, 6\).*\(5, 7\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"expected bias of shape \(5,\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected 4 labels"),
        ({"target": torch.zeros(4, 5, dtype=torch.int64)}, ValueError, r"labels of shape \(N,\)"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, r"target\.long\(\)"),
        ({"target": torch.tensor([0, 1, 7, 2])}, ValueError, "label 7 at index 2"),
        ({"weight": torch.zeros(5, 6, dtype=torch.float16)}, TypeError, "expected weight in torch.float32"),
        ({"x": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "expected x in float16"),
        ({"weight": torch.zeros(5, 6, device="meta")}, ValueError, "expected weight on cpu"),
        ({"reduction": "none"}, ValueError, "expected reduction 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing between 0 and 1"),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "cuda"}, (ValueError, RuntimeError), "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    arguments = _with(**changes)
    positional = [arguments.pop(name) for name in ("x", "weight", "bias", "target")]
    with pytest.raises(error, match=message):
        pooled_cross_entropy(*positional, **arguments)


def test_pooled_linear_is_a_linear_layer_over_the_mean() -> None:
    torch.manual_seed(3)
    head = PooledLinear(6, 5)
    torch.manual_seed(3)
    linear = torch.nn.Linear(6, 5)
    assert list(head.state_dict()) == list(linear.state_dict()) == ["weight", "bias"]
    assert torch.equal(head.weight, linear.weight) and torch.equal(head.bias, linear.bias)
    x, target = torch.randn(4, 6, 3, 2), torch.tensor([0, 4, IGNORE, 2])
    logits = head(x)
    torch.testing.assert_close(logits, linear(F.adaptive_avg_pool2d(x, 1).flatten(1)))
    torch.testing.assert_close(head(x.mean((2, 3))), logits)
    out = head.loss(x, target, label_smoothing=0.1)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, target, label_smoothing=0.1))
    out.loss.backward()
    assert head.weight.grad is not None and head.bias.grad is not None
    assert PooledLinear(6, 5, bias=False).loss(x, target).loss.requires_grad


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((64, 128, 32, 32), 10, torch.float32, device)

    def run(x: Tensor) -> list[Tensor]:
        return [pooled_cross_entropy(x, weight, bias, target, provider=provider, check_labels=False).loss]

    column.assert_follows_the_stream(run, x)


@column.gpu_cases
def test_graph_capture(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((16, 32, 8, 8), 10, torch.float32, device)
    arguments = leaves(x, weight, bias)

    def step() -> tuple[Tensor, ...]:
        out = pooled_cross_entropy(*arguments, target, provider=provider)
        return (out.loss, out.correct, *torch.autograd.grad(out.loss, arguments))

    column.assert_replays(step, x)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((5, 7, 3, 4), 6, torch.float32, other), provider)
    )


@pytest.mark.large
@column.gpu_cases
def test_more_than_two_billion_elements(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((33, 64, 1024, 1024), 10, torch.float16, device, ignored=False)
    assert x.numel() > 2**31
    logits = F.linear(x.mean((2, 3), dtype=torch.float32), weight.float(), bias.float())
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        out = pooled_cross_entropy(layout, weight, bias, target, provider=provider)
        torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compiled_provider_is_there(name: str) -> None:
    column.need(name, name)
    assert providers.available(name)
