"""layer_norm as an op of torch: needed gradients, what is kept, compilation, fake tensors, autocast, wrong use."""

from __future__ import annotations

import column
import pytest
import torch
import torch.nn.functional as F
from test_layer_norm import FORMS, both, composition, forms, inputs, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.ops import layer_norm

OP = "layer_norm"


class Needs(TorchDispatchMode):
    """Records which gradients backward is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if f"{OP}_backward" in str(function):
            self.found.append(tuple(args[7:10]))
        return function(*args, **(kwargs or {}))


@column.cases
@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias"])
def test_each_gradient_alone(device: str, provider: str, name: str, poison: None) -> None:
    tensors = inputs("layer-residual", (3, 5, 12), torch.float32, device)
    grads = torch.randn(2, 3, 5, 12, device=device)[: 2 if name in ("x", "residual") else 1]
    results = {}
    for wanted in ([name], list(tensors)):
        given = {key: tensor.detach().requires_grad_(key in wanted) for key, tensor in tensors.items()}
        y, total = both(given, provider, {})
        with Needs() as needs:
            torch.autograd.backward([y, total][: len(grads)], list(grads))
        results[len(wanted)] = given[name].grad
        assert all((tensor.grad is not None) == (key in wanted) for key, tensor in given.items())
        of_x = bool({"x", "residual"} & set(wanted))
        assert needs.found == [(of_x, "weight" in wanted, "bias" in wanted)]
    torch.testing.assert_close(results[1], results[4])  # sums alone may be added in another order


@column.cases
@forms
def test_without_gradients(device: str, provider: str, form: str, poison: None) -> None:
    tensors, options = inputs(form, (4, 6), torch.float32, device), FORMS[form][1]
    plain, total = both(tensors, provider, options)
    with torch.no_grad():
        silent, _ = both(leaves(tensors), provider, options)
    needed, same = both(leaves(tensors), provider, options)
    assert plain.grad_fn is None and silent.grad_fn is None and needed.requires_grad
    assert torch.equal(plain, silent) and torch.equal(plain, needed) and torch.equal(total, same)
    rms, numbers = options.get("rms", False), torch.ones(4, device=device)
    statistics = numbers[:0] if rms else numbers, numbers
    made = column.op(f"{OP}_backward", provider)(plain, None, plain, *statistics, None, rms, False, False, False)
    assert [each.numel() for each in made] == [0, 0, 0]


@column.cases
@forms
def test_rows_and_statistics_alone_are_kept(device: str, provider: str, form: str) -> None:
    given = leaves(inputs(form, (3, 4, 10), torch.bfloat16, device))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, rows = both(given, provider, FORMS[form][1])
    passed = [tensor for tensor in (rows, given["weight"]) if tensor is not None]
    ours = [t for t in kept if all(t.data_ptr() != tensor.data_ptr() for tensor in passed)]
    assert len(kept) - len(ours) == len(passed)
    sizes = [(0,), (12,)] if FORMS[form][1].get("rms") else [(12,), (12,)]
    assert [(tuple(t.shape), t.dtype) for t in ours] == [(size, torch.float32) for size in sizes]


@column.cases
def test_results_may_be_changed_in_place(device: str, provider: str) -> None:
    """As torch's: they are views for nobody."""
    tensors = inputs("layer", (2, 3, 8), torch.float32, device)
    given, other = leaves(tensors), leaves(tensors)
    both(given, provider, {})[0].mul_(2).sum().backward()
    (both(other, provider, {})[0] * 2).sum().backward()
    assert torch.equal(given["x"].grad, other["x"].grad)


@pytest.mark.parametrize("provider", ["reference", "aten", "cpu"])
@pytest.mark.parametrize("form", ["layer-residual", "rms-residual"])
def test_gradcheck(provider: str, form: str) -> None:
    given = leaves(inputs(form, (2, 2, 5), torch.float64, "cpu"))
    names = [name for name, tensor in given.items() if tensor is not None]

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = {**given, **dict(zip(names, tensors, strict=True))}
        return both(changed, provider, FORMS[form][1])[: 2 if "residual" in names else 1]

    torch.autograd.gradcheck(results, [given[name] for name in names])


@column.cases
@pytest.mark.parametrize("form", ["layer-residual", pytest.param("rms", marks=pytest.mark.slow)])
def test_opcheck(device: str, provider: str, form: str) -> None:
    x, residual, weight, bias = leaves(inputs(form, (2, 3, 6), torch.float32, device)).values()
    strided = [None if tensor is None else tensor.transpose(0, 1) for tensor in (x, residual)]
    torch.library.opcheck(column.op(OP, provider), (*strided, weight, bias, 1e-5, form == "rms"))


@column.cases
@pytest.mark.slow
@pytest.mark.parametrize("form", ["layer-residual", "rms"])
def test_opcheck_of_the_passes(device: str, provider: str, form: str) -> None:
    rows, added, *vectors = inputs(form, (6, 5), torch.float32, device).values()
    rms = form == "rms"
    torch.library.opcheck(column.op(f"{OP}_forward", provider), (rows, added, *vectors, 1e-5, rms))
    y, _, *statistics = column.op(f"{OP}_forward", provider)(rows, added, *vectors, 1e-5, rms)
    torch.library.opcheck(column.op(f"{OP}_apply", provider), (rows, *statistics, *vectors, rms))
    for needs in ((True, True, not rms), (False, True, False), (True, False, False)):
        backward = y, added, rows, *statistics, vectors[0], rms, *needs
        torch.library.opcheck(column.op(f"{OP}_backward", provider), backward)


@column.cases
@pytest.mark.slow
@forms
def test_compiles_as_one_graph(device: str, provider: str, form: str) -> None:
    tensors, options = inputs(form, (4, 3, 6), torch.float32, device), FORMS[form][1]

    def step(given: dict[str, Tensor]) -> Tensor:
        y, total = both({**given, "x": given["x"] * 2}, provider, options)
        return (y * total.cos()).sum()

    torch._dynamo.reset()
    found, expected = leaves(tensors), leaves(tensors)
    torch.compile(step, fullgraph=True, backend="aot_eager")(found).backward()
    step(expected).backward()
    for name, tensor in expected.items():
        if tensor is not None:
            torch.testing.assert_close(found[name].grad, tensor.grad)


def test_automatic_choice_compiles() -> None:
    x, weight = torch.randn(4, 6), torch.randn(6)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, rms=True), F.rms_norm(x, (6,), weight, 1e-5))


@column.cases
@pytest.mark.parametrize("form", ["layer-residual", "rms"])
def test_fake_tensors(device: str, provider: str, form: str) -> None:
    with FakeTensorMode():
        given = leaves(inputs(form, (4, 3, 6), torch.float16, device, torch.float32))
        given["x"] = torch.empty(3, 4, 6, dtype=torch.float16, device=device, requires_grad=True)
        made = layer_norm(**{**given, "x": given["x"].transpose(0, 1)}, provider=provider, **FORMS[form][1])
        results = made if given["residual"] is not None else (made,)
        leaves_ = [tensor for tensor in given.values() if tensor is not None]
        grads = torch.autograd.grad(sum(result.sum() for result in results), leaves_)
    for result in results:
        assert (result.shape, result.dtype, result.is_contiguous()) == ((4, 3, 6), torch.float16, True)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in leaves_]


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["layer-residual", "rms"])
def test_autocast_changes_nothing(device: str, provider: str, low: torch.dtype, form: str) -> None:
    for dtype in (torch.float32, low):
        tensors, options = inputs(form, (4, 6), dtype, device, torch.float32), FORMS[form][1]
        given, other = leaves(tensors), leaves(tensors)
        with torch.autocast(device, low):
            found = both(given, provider, options)
        expected = both(other, provider, options)
        for results in (found, expected):
            (results[0] * results[1]).sum().backward()
        assert found[0].dtype == dtype and all(map(torch.equal, found, expected))
        for name, tensor in other.items():
            assert tensor is None or torch.equal(given[name].grad, tensor.grad)


@column.cases
def test_scaled_loss_does_not_underflow(device: str, provider: str) -> None:
    tensors = inputs("layer", (40, 96), torch.float16, device)
    given, exact = leaves(tensors), leaves(tensors, torch.float64)
    scale = 2.0**16 / 40 / 96
    (both(given, provider, {})[0].float().cos().sum() * scale).backward()
    (composition(**exact)[0].cos().sum() * scale).backward()
    for name in ("x", "weight", "bias"):
        error = (given[name].grad.double() - exact[name].grad).abs().max()
        assert error <= 4e-3 * exact[name].grad.abs().max(), name


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    given = leaves(inputs("layer", (4, 6), torch.float32, device))
    wanted = [tensor for tensor in given.values() if tensor is not None]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(both(given, provider, {})[0].sum(), wanted, create_graph=True)
    y, _ = both(given, provider, {})
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), wanted)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"expected x of shape \(\.\.\., C\) with elements, got \(\)"),
        ({"x": torch.zeros(0, 6)}, ValueError, "with elements"),
        ({"x": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "expected x in float16"),
        ({"weight": torch.zeros(5)}, ValueError, r"expected weight of shape \(6,\) for x \(4, 6\), got \(5,\)"),
        ({"weight": torch.zeros(4, 6)}, ValueError, "expected weight of shape"),
        ({"bias": torch.zeros(1)}, ValueError, r"expected bias of shape \(6,\)"),
        ({"weight": torch.zeros(6, dtype=torch.int64)}, TypeError, "expected weight in float16"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, r"expected bias on cpu as x.*\.to"),
        ({"weight": None}, ValueError, "expected a weight beside the bias.*pass ones"),
        ({"rms": True}, ValueError, "no bias for rms"),
        (
            {"residual": torch.zeros(4, 1)},
            ValueError,
            r"expected residual \(4, 6\) in torch.float32 as x, got \(4, 1\)",
        ),
        ({"residual": torch.zeros(4, 6, dtype=torch.float16)}, TypeError, "expected residual .* in torch.float32 as x"),
        ({"residual": torch.zeros(4, 6, device="meta")}, ValueError, "expected residual on cpu"),
        ({"eps": 0.0}, ValueError, "expected a positive eps, for torch.float32 of at least 1.18e-38, got 0.0"),
        ({"eps": float("nan")}, ValueError, "expected a positive eps"),
        ({"eps": 1e-50}, ValueError, "for torch.float32 of at least 1.18e-38, got 1e-50"),
        ({"eps": None}, TypeError, "expected eps as a number, got None"),
        ({"weight": (4,)}, TypeError, "expected weight as a tensor, got tuple; .* leave it out"),
        ({"residual": [1.0]}, TypeError, "expected residual as a tensor, got list"),
        (
            {"x": torch.eye(4).to_sparse()},
            TypeError,
            "expected x as a dense tensor, got one of layout torch.sparse_coo",
        ),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "triton"}, (ValueError, RuntimeError), "triton"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(
    changes: dict, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"x": torch.zeros(4, 6), "weight": torch.ones(6), "bias": torch.zeros(6), **changes}
    with pytest.raises(error, match=message):
        layer_norm(**arguments)
