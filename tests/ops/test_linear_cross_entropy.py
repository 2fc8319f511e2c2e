"""linear_cross_entropy: every provider against F.linear and F.cross_entropy, and as an op of torch."""

from __future__ import annotations

import column
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from auglocal_ext.memory import MemoryMeter
from auglocal_ext.ops import LinearCrossEntropy, linear_cross_entropy
from auglocal_ext.ops.aten import linear_cross_entropy as aten
from auglocal_ext.ops.cpu import linear_cross_entropy as cpu

OP = "linear_cross_entropy"
IGNORE = -100
cases = pytest.mark.parametrize(
    ("device", "provider"),
    [
        pytest.param(device, name, id=f"{device}-{name}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device, names in (("cpu", ("cpu", "aten", "reference")), ("cuda", ("aten", "reference")))
        for name in names
    ],
)


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "LEAST_ROWS", 4)
    monkeypatch.setattr(cpu, "FULL_SPEED", 4)
    monkeypatch.setattr(cpu, "SMALL", 0)


def composition(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float = 0.0, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hits and plain NLL of all logits at once, by torch's own functions."""
    logits = F.linear(x.flatten(0, -2), weight, bias)
    labels = target.flatten()
    counts = labels != options.get("ignore_index", IGNORE)
    loss = F.cross_entropy(logits, labels, **options)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(1).square()[counts].mean()
    plain = {name: value for name, value in options.items() if name == "ignore_index"}
    nll = F.cross_entropy(logits, labels, reduction="sum", **plain)
    return loss, ((logits.argmax(1) == labels) & counts).sum(), nll


def inputs(
    shape: tuple[int, ...], classes: int, dtype: torch.dtype, device: str, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x = torch.randn(shape, device=device).to(dtype)
    weight = (torch.randn(classes, shape[-1], device=device) / shape[-1] ** 0.5).to(dtype)
    target = torch.randint(classes, shape[:-1], device=device)
    if target.numel() > 1:
        target.view(-1)[::3] = IGNORE
    return x, weight, torch.randn(classes, device=device).to(dtype) if bias else None, target


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, provider: str, **options) -> None:
    """Loss, hits, NLL and every gradient against the composition in float64 and in the inputs' dtype."""

    def run(function, dtype):
        arguments = leaves(*(None if t is None else t.to(dtype) for t in (x, weight, bias)))
        out = function(*arguments, target)
        # An upstream gradient other than 1, as in a sum of losses.
        return out, torch.autograd.grad(out[0] * 3, [a for a in arguments if a is not None])

    ours, grads = run(lambda *a: linear_cross_entropy(*a, provider=provider, **options), x.dtype)
    same, same_grads = run(lambda *a: composition(*a, **options), x.dtype)
    oracle, oracle_grads = run(lambda *a: composition(*a, **options), torch.float64)

    assert ours.loss.dtype == ours.nll.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert ours.correct.dtype == torch.int64 and not ours.nll.requires_grad and not ours.correct.requires_grad
    column.assert_close("loss", ours.loss, same[0], oracle[0])
    column.assert_close("nll", ours.nll, same[2], oracle[2])
    if x.dtype.itemsize >= 4:
        assert int(ours.correct) == int(oracle[1])
    for name, tensor, mine, other, exact in zip(
        ("x", "weight", "bias"), (x, weight, bias), grads, same_grads, oracle_grads, strict=False
    ):
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape
        column.assert_close(f"gradient of {name}", mine, other, exact)


@cases
@column.dtypes
@pytest.mark.parametrize("shape", [(3, 7, 5), (13, 8), (1, 1), (2, 3, 2, 6)], ids=lambda s: "x".join(map(str, s)))
def test_shapes(device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], poison: None) -> None:
    compare(*inputs(shape, 11, dtype, device), provider, label_smoothing=0.1, z_loss=1e-2)


@cases
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 1.0}, {"z_loss": 0.5}, {"ignore_index": 2}, {"label_smoothing": 0.3}], ids=str
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_options(device: str, provider: str, options: dict, bias: bool) -> None:
    x, weight, bias_, target = inputs((3, 5, 6), 9, torch.float64, device, bias)
    compare(x, weight, bias_, target.where(target >= 0, options.get("ignore_index", IGNORE)), provider, **options)


@cases
def test_strided_hidden_states(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((5, 4, 12), 9, torch.float32, device)
    compare(x.transpose(0, 1)[..., ::2], weight[:, ::2], bias, target.t(), provider)


@cases
@pytest.mark.parametrize("product", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_factors_are_summed_in_float32(device: str, provider: str, product: torch.dtype) -> None:
    """What CUDA's autocast asks for; the gradient of a mean over many rows does not underflow."""
    x, weight, bias, _ = inputs((64, 32), 300, torch.float32, device)
    x, weight = x.to(product), weight.to(product)
    target = torch.arange(64, device=device) % 300
    op = column.op(OP, provider)
    found = op(x, weight, bias, target, IGNORE, 0.1, 1e-3, product, True, True, True)
    wanted = column.op(OP, "reference")(
        *(x.double(), weight.double(), bias.double(), target),
        *(IGNORE, 0.1, 1e-3, torch.float64, True, True, True),
    )
    step = torch.finfo(product).eps
    for index, (mine, exact) in enumerate(zip(found, wanted, strict=True)):
        assert float((mine.double() - exact).abs().max()) <= 2 * step * float(exact.abs().max()), index


@cases
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)], ids=str)
def test_only_needed_gradients(device: str, provider: str, wanted: tuple[int, ...]) -> None:
    tensors = inputs((5, 3, 7), 6, torch.float32, device)
    everything = leaves(*tensors[:3])
    full = torch.autograd.grad(linear_cross_entropy(*everything, tensors[3], provider=provider).loss, everything)
    some = [t.detach().requires_grad_(bool(w)) for t, w in zip(tensors[:3], wanted, strict=True)]
    with Needs() as calls:
        loss = linear_cross_entropy(*some, tensors[3], provider=provider).loss
    assert calls.needs == [tuple(map(bool, wanted))]
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for tensor, expected, want in zip(some, full, wanted, strict=True):
        assert torch.equal(tensor.grad, expected) if want else tensor.grad is None


class Needs(TorchDispatchMode):
    """Records which gradients the op is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if OP in str(function):
            self.needs.append(tuple(args[8:11]))
        return function(*args, **(kwargs or {}))


@cases
def test_a_layer_that_is_only_read(device: str, provider: str) -> None:
    """A detached weight gets no gradient, and none is stored; that of the hidden states is the same."""
    x, weight, bias, target = inputs((4, 3, 8), 500, torch.float32, device)
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight.requires_grad_(), bias, target, provider=provider).loss
    (expected,) = torch.autograd.grad(loss, x)
    read = weight.detach()
    with MemoryMeter() as meter:
        meter.track(x, read, bias, target)
        before = meter.live_bytes
        loss = linear_cross_entropy(x, read, bias, target, provider=provider).loss
        kept = meter.live_bytes - before
    assert 0 < kept < weight.numel() * 4
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@cases
def test_all_targets_ignored(device: str, provider: str, poison: None) -> None:
    x, weight, bias, target = inputs((2, 3, 4), 5, torch.float32, device)
    arguments = leaves(x, weight, bias)
    out = linear_cross_entropy(*arguments, target.fill_(IGNORE), z_loss=0.1, label_smoothing=0.1, provider=provider)
    assert float(out.loss.detach()) == float(out.nll) == int(out.correct) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(out.loss, arguments))


@cases
def test_labels_out_of_range_are_ignored_when_unchecked(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((6, 4), 5, torch.float32, device)
    bad = target.clone()
    bad[target == IGNORE] = torch.tensor([5, -1], device=device)
    expected = linear_cross_entropy(x, weight, bias, target, provider=provider)
    found = linear_cross_entropy(x, weight, bias, bad, provider=provider, check_labels=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@cases
def test_large_logits_stay_finite(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((7, 6), 5, torch.float32, device)
    compare(x * 3000, weight, bias, target, provider, label_smoothing=0.1)


@cases
def test_first_of_equal_logits_is_the_prediction(device: str, provider: str) -> None:
    target = (torch.arange(70, device=device) % 35 - 3).clamp(min=0)
    x, weight = torch.ones(70, 4, device=device), torch.zeros(35, 4, device=device)
    assert int(linear_cross_entropy(x, weight, None, target, provider=provider).correct) == 8


@cases
def test_bitwise_repeatable(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((9, 5, 33), 40, torch.float32, device)

    def once() -> list[Tensor]:
        arguments = leaves(x, weight, bias)
        out = linear_cross_entropy(*arguments, target, provider=provider)
        return [out.loss.detach(), out.nll, *torch.autograd.grad(out.loss, arguments)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)], ids=str)
def test_the_logits_of_a_chunk_are_the_only_workspace(needs: tuple[bool, bool]) -> None:
    x, weight, _, target = inputs((1024, 32), 256, torch.float32, "cpu")
    with MemoryMeter() as meter:
        meter.track(x, weight, target)
        before = meter.live_bytes
        out = aten.forward(x, weight, None, target, IGNORE, 0.1, 0.1, torch.float32, *needs, False)
        made = sum(-(-each.untyped_storage().nbytes() // 512) * 512 for each in out)
    per_row = 1024 * 16 * 4  # some numbers per row
    assert x.nbytes <= meter.peak_bytes - before - made <= x.nbytes + per_row < 1024 * 256 * 4 / 4


@pytest.mark.parametrize(
    ("rows", "width", "classes", "itemsize", "expected"),
    [(16384, 1024, 32000, 4, 524), (16384, 1024, 32000, 2, 262), (512, 512, 8192, 4, 128), (20, 512, 8192, 4, 20)],
)
def test_rows_of_a_chunk(
    rows: int, width: int, classes: int, itemsize: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert aten.chunk_rows(rows, width, classes, itemsize) == expected


def test_products_are_counted() -> None:
    x, weight, bias, target = inputs((6, 4), 5, torch.float32, "cpu")
    for needs, products in (((True, True), 3), ((True, False), 2), ((False, False), 1)):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(x.requires_grad_(needs[0]), weight.requires_grad_(needs[1]), bias, target)
        assert counter.get_total_flops() == products * 2 * 6 * 4 * 5


@pytest.mark.parametrize("provider", ["cpu", "aten", "reference"])
def test_gradcheck(provider: str) -> None:
    x, weight, bias, target = inputs((3, 4, 4), 5, torch.float64, "cpu")

    def loss(*arguments: Tensor) -> Tensor:
        return linear_cross_entropy(*arguments, target, label_smoothing=0.1, z_loss=0.3, provider=provider).loss

    torch.autograd.gradcheck(loss, leaves(x, weight, bias))


@cases
def test_opcheck(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((6, 4), 5, torch.float16, device)
    arguments = (*leaves(x, weight, bias), target, IGNORE, 0.1, 0.1, torch.float32, True, True, True)
    torch.library.opcheck(column.op(OP, provider), arguments)
    torch.library.opcheck(column.op(OP, provider), (x, weight, None, *arguments[3:8], True, False, False))


@cases
def test_compiles_as_one_graph(device: str, provider: str) -> None:
    tensors = inputs((4, 3, 6), 5, torch.float32, device)

    def step(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> LinearCrossEntropy:
        return linear_cross_entropy(x * 2, weight, bias, target, z_loss=0.1, provider=provider)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = leaves(*tensors[:3]), leaves(*tensors[:3])
    for out in (compiled(*found, tensors[3]), step(*expected, tensors[3])):
        (out.loss * 2).backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 3, 6, dtype=torch.float16, device=device, requires_grad=True)
        weight = torch.empty(5, 6, dtype=torch.float16, device=device, requires_grad=True)
        out = linear_cross_entropy(x, weight, None, torch.empty(4, 3, dtype=torch.int64, device=device))
        grads = torch.autograd.grad(out.loss, (x, weight))
    assert out.loss.shape == () and out.loss.dtype == torch.float32 and out.correct.dtype == torch.int64
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype), (weight.shape, weight.dtype)]


@pytest.mark.parametrize("provider", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_lets_dtypes_meet(provider: str, low: torch.dtype) -> None:
    x, weight, bias, target = inputs((5, 3, 7), 6, torch.float32, "cpu")
    x = x.to(low)
    arguments, wide = leaves(x, weight, bias), leaves(x.float(), weight, bias)
    with torch.autocast("cpu", low):
        out = linear_cross_entropy(*arguments, target, provider=provider)
    expected = linear_cross_entropy(*wide, target, provider=provider)
    grads, wanted = torch.autograd.grad(out.loss, arguments), torch.autograd.grad(expected.loss, wide)
    assert [g.dtype for g in grads] == [low, torch.float32, torch.float32]
    torch.testing.assert_close(out.loss, expected.loss)  # nothing was rounded to autocast's dtype on the way
    for found, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, exact.to(found.dtype))
    with pytest.raises(TypeError, match=r"run under torch\.autocast"):
        linear_cross_entropy(*arguments, target, provider=provider)


@cases
def test_scaled_loss_does_not_underflow(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((512, 6), 50, torch.float16, device)
    arguments = leaves(x, weight * 1e-2, bias)
    (linear_cross_entropy(*arguments, target, provider=provider).loss * 65536).backward()
    exact = leaves(*(a.double() for a in arguments))
    (composition(*exact, target)[0] * 65536).backward()
    for name, found, oracle in zip(("x", "weight", "bias"), arguments, exact, strict=True):
        column.assert_close(name, found.grad, oracle.grad.half(), oracle.grad)


@cases
def test_differentiable_once(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((4, 6), 5, torch.float32, device)
    arguments = leaves(x, weight, bias)
    loss = linear_cross_entropy(*arguments, target, provider=provider).loss
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, arguments, create_graph=True)
    loss = linear_cross_entropy(*arguments, target, provider=provider).loss
    first = torch.autograd.grad(loss, arguments, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, arguments)))
    with pytest.raises(NotImplementedError, match=r"F\.linear and F\.cross_entropy"):
        torch.func.grad(lambda x: linear_cross_entropy(x, weight, bias, target, provider=provider).loss)(x)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, 0, 6), "target": torch.zeros(4, 0, dtype=torch.int64)}, ValueError, "one position"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"weight of shape \(V, 6\).*\(5, 7\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"expected bias of shape \(5,\)"),
        ({"target": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"a target per position of x, \(4, 3\)"),
        ({"target": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, r"target\.long\(\)"),
        ({"target": torch.full((4, 3), 7)}, ValueError, "label 7 at index 0"),
        ({"weight": torch.zeros(5, 6, dtype=torch.float16)}, TypeError, "expected weight in torch.float32"),
        ({"x": torch.zeros(4, 3, 6, dtype=torch.int32)}, TypeError, "expected x in float16"),
        ({"weight": torch.zeros(5, 6, device="meta")}, ValueError, "expected weight on cpu"),
        ({"z_loss": -1.0}, ValueError, "z_loss of at least 0"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing between 0 and 1"),
        ({"provider": "cuda"}, ValueError, "has no provider 'cuda'; it has cpu, aten, reference"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    x, weight, bias, target = inputs((4, 3, 6), 5, torch.float32, "cpu")
    arguments = {"x": x, "weight": weight, "bias": bias, "target": target, **changes}
    positional = [arguments.pop(name) for name in ("x", "weight", "bias", "target")]
    with pytest.raises(error, match=message):
        linear_cross_entropy(*positional, **arguments)
