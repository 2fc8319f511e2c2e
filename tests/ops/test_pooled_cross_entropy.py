"""pooled_cross_entropy: every provider against F.cross_entropy in float64 and in the same dtype."""

from __future__ import annotations

import itertools

import column
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.nn import PooledLinear
from auglocal_ext.ops import PooledCrossEntropy, pooled_cross_entropy, providers

OP = "pooled_cross_entropy"
IGNORE = -100
SHAPES = [
    (5, 7, 3, 4),
    (4, 19, 7, 7),
    (3, 16, 8, 8),
    (2, 130, 6, 5),
    (33, 10),
    (2, 5, 11),
    (1, 1, 1, 1),
    (2, 3, 2, 3, 4),
]


def composition(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The three ops of torch that the op stands for: loss and logits."""
    pooled = x.mean(dim=tuple(range(2, x.dim()))) if x.dim() > 2 else x
    logits = F.linear(pooled, weight, bias)
    return F.cross_entropy(logits, target, **options), logits


def inputs(
    shape: tuple[int, ...], classes: int, dtype: torch.dtype, device: str, bias: bool = True, ignored: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(classes, shape[1], device=device).to(dtype)
    target = torch.randint(classes, shape[:1], device=device)
    if ignored and shape[0] > 1:
        target[::3] = IGNORE
    return x, weight, torch.randn(classes, device=device).to(dtype) if bias else None, target


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, provider: str, **options) -> None:
    """Loss, logits, hits and every gradient against the composition in float64 and in the inputs' dtype."""

    def run(function, dtype):
        arguments = leaves(*(None if t is None else t.to(dtype) for t in (x, weight, bias)))
        # .to keeps a view's strides where the dtype stays
        if dtype == x.dtype:
            arguments[0] = x.detach().requires_grad_()
        out = function(*arguments, target)
        # An upstream gradient other than 1, as in a sum of losses.
        return out, torch.autograd.grad(out[0] * 3, [a for a in arguments if a is not None])

    ours, grads = run(lambda *a: pooled_cross_entropy(*a, provider=provider, **options), x.dtype)
    same, same_grads = run(lambda *a: composition(*a, **options), x.dtype)
    oracle, oracle_grads = run(lambda *a: composition(*a, **options), torch.float64)

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert ours.loss.dtype == ours.logits.dtype == wide and ours.correct.dtype == torch.int64
    assert not ours.logits.requires_grad and not ours.correct.requires_grad
    column.assert_close("loss", ours.loss, same[0], oracle[0])
    column.assert_close("logits", ours.logits, same[1], oracle[1])
    ignore_index = options.get("ignore_index", IGNORE)
    hits = (ours.logits.argmax(1) == target) & (target != ignore_index)
    assert int(ours.correct) == int(hits.sum())
    for name, tensor, mine, other, exact in zip(
        ("x", "weight", "bias"), (x, weight, bias), grads, same_grads, oracle_grads, strict=False
    ):
        assert mine.dtype == tensor.dtype
        column.assert_close(f"gradient of {name}", mine, other, exact)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], poison: None) -> None:
    compare(*inputs(shape, 6, dtype, device), provider, label_smoothing=0.1)


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", column.LAYOUTS)
def test_layouts(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    x, *rest = inputs((4, 24, 4, 8), 33, dtype, device)
    compare(column.LAYOUTS[layout](x), *rest, provider)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 17, 19), (2, 8, 16, 36), (1, 320, 9, 16)], ids=str)
def test_maps_larger_than_one_pass_of_a_block(
    device: str, provider: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...], poison: None
) -> None:
    x, *rest = inputs(shape, 6, dtype, device, ignored=False)
    compare(column.LAYOUTS[layout](x), *rest, provider)


@column.cases
@pytest.mark.parametrize("channels_last", [False, True])
def test_slice_of_an_aligned_row(device: str, provider: str, channels_last: bool) -> None:
    x, weight, bias, target = inputs((3, 32, 64), 6, torch.float32, device)
    if channels_last:
        compare(x.mT.contiguous().mT[:, :30], weight[:, :30], bias, target, provider)
    else:
        compare(x[..., :62], weight, bias, target, provider)


@column.cases
def test_first_of_equal_logits_is_the_prediction(device: str, provider: str) -> None:
    target = (torch.arange(70, device=device) % 35 - 3).clamp(min=0)
    x, weight = torch.ones(70, 4, device=device), torch.zeros(35, 4, device=device)
    assert int(pooled_cross_entropy(x, weight, None, target, provider=provider).correct) == 8


@column.cases
@pytest.mark.parametrize("classes", [1, 2, 31, 32, 100, 1000])
def test_classes(device: str, provider: str, classes: int, poison: None) -> None:
    compare(*inputs((5, 12, 3, 3), classes, torch.float32, device), provider, label_smoothing=0.2)


@column.cases
@pytest.mark.parametrize(
    ("reduction", "smoothing", "bias", "ignore_index"),
    list(itertools.product(("mean", "sum"), (0.0, 0.1, 1.0), (True, False), (IGNORE, 0))),
)
def test_options(
    device: str, provider: str, reduction: str, smoothing: float, bias: bool, ignore_index: int, poison: None
) -> None:
    x, weight, bias_, target = inputs((7, 5, 2, 3), 4, torch.float32, device, bias, ignored=ignore_index < 0)
    target[0] = ignore_index
    compare(
        *(x, weight, bias_, target, provider),
        **{"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index},
    )


@column.cases
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)], ids=str)
def test_only_needed_gradients(device: str, provider: str, wanted: tuple[int, ...], poison: None) -> None:
    tensors = inputs((5, 7, 3, 4), 6, torch.float32, device)
    everything = leaves(*tensors[:3])
    full = torch.autograd.grad(pooled_cross_entropy(*everything, tensors[3], provider=provider).loss, everything)
    some = [t.detach().requires_grad_(bool(w)) for t, w in zip(tensors[:3], wanted, strict=True)]
    with Calls() as calls:
        loss = pooled_cross_entropy(*some, tensors[3], provider=provider).loss
    assert calls.needs == [tuple(map(bool, wanted))]
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for tensor, expected, want in zip(some, full, wanted, strict=True):
        assert torch.equal(tensor.grad, expected) if want else tensor.grad is None
    made = column.op(OP, provider)(*some, tensors[3], IGNORE, 0.0, True, *map(bool, wanted))[3:]
    assert [m.numel() > 0 for m in made] == list(map(bool, wanted))


class Calls(TorchDispatchMode):
    """Records which gradients the op is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if OP in str(function):
            self.needs.append(tuple(args[7:10]))
        return function(*args, **(kwargs or {}))


@column.cases
def test_no_graph_under_no_grad(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((5, 7, 3, 4), 6, torch.float32, device)
    with Calls() as calls, torch.no_grad():
        out = pooled_cross_entropy(*leaves(x, weight, bias), target, provider=provider)
    assert calls.needs == [(False, False, False)]
    assert out.loss.grad_fn is None


@column.cases
def test_gradient_of_x_is_a_broadcast_of_its_channels(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((4, 6, 16, 16), 5, torch.float16, device)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(pooled_cross_entropy(x, weight, bias, target, provider=provider).loss, x)
    assert grad.stride() == (6, 1, 0, 0)
    assert grad.untyped_storage().nbytes() == 4 * 6 * x.element_size()


@column.cases
def test_bitwise_repeatable(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((70, 33, 5, 5), 40, torch.float32, device)

    def once() -> list[Tensor]:
        arguments = leaves(x, weight, bias)
        out = pooled_cross_entropy(*arguments, target, provider=provider)
        return [out.loss.detach(), out.logits, *torch.autograd.grad(out.loss, arguments)]

    for first, again in zip(once(), once(), strict=True):
        assert torch.equal(first, again)


@column.cases
def test_labels_out_of_range_are_ignored_when_unchecked(device: str, provider: str, poison: None) -> None:
    x, weight, bias, target = inputs((6, 4, 2, 2), 5, torch.float32, device)
    bad = target.clone()
    bad[target == IGNORE] = torch.tensor([5, -1], device=device)
    expected = pooled_cross_entropy(x, weight, bias, target, provider=provider)
    found = pooled_cross_entropy(x, weight, bias, bad, provider=provider, check_labels=False)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.correct, expected.correct)


@column.cases
def test_all_labels_ignored(device: str, provider: str, poison: None) -> None:
    x, weight, bias, target = inputs((3, 4, 2, 2), 5, torch.float32, device)
    target.fill_(IGNORE)
    arguments = leaves(x, weight, bias)
    out = pooled_cross_entropy(*arguments, target, provider=provider)
    assert out.loss.isnan() and composition(x, weight, bias, target)[0].isnan() and int(out.correct) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(out.loss, arguments))
    assert float(pooled_cross_entropy(x, weight, bias, target, reduction="sum", provider=provider).loss) == 0


@column.cases
def test_large_logits_stay_finite(device: str, provider: str, poison: None) -> None:
    x, weight, bias, target = inputs((5, 7, 3, 4), 6, torch.float32, device)
    compare(x * 3000, weight, bias, target, provider, label_smoothing=0.1)


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
