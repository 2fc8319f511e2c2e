"""layer_norm: every provider against F.layer_norm and F.rms_norm in float64 and in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import column
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from auglocal_ext.ops import layer_norm

OP = "layer_norm"

#: What is given beside x, and the options.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": ("weight bias", {}),
    "layer-residual": ("residual weight bias", {"eps": 1e-12}),
    "no-bias-residual": ("residual weight", {}),
    "no-vectors": ("", {"eps": 0.1}),
    "rms": ("weight", {"rms": True}),
    "rms-residual": ("residual weight", {"rms": True, "eps": 1e-6}),
    "rms-no-vectors-residual": ("residual", {"rms": True}),
}
forms = pytest.mark.parametrize("form", FORMS)
SHAPES = [(2, 3, 7), (5, 1), (33,), (4, 2, 1, 64), (3, 130)]

Tensors = dict[str, Tensor | None]


def inputs(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, vectors: torch.dtype | None = None
) -> Tensors:
    """x, residual, weight and bias, those that the form has; rows that differ in mean and deviation."""
    given = FORMS[form][0].split()
    spread, offset = torch.rand(*shape[:-1], 1, device=device) + 0.1, torch.randn(*shape[:-1], 1, device=device)
    made = {
        "x": torch.randn(shape, device=device) * spread + offset,
        "residual": torch.randn(shape, device=device) if "residual" in given else None,
    }
    tensors: Tensors = {name: None if tensor is None else tensor.to(dtype) for name, tensor in made.items()}
    for name in ("weight", "bias"):
        tensors[name] = torch.randn(shape[-1], device=device).to(vectors or dtype) if name in given else None
    return tensors


def composition(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The ops of torch that the op stands for: y, and the sum that is normalised."""
    total = x if residual is None else x + residual
    if rms:
        return F.rms_norm(total, x.shape[-1:], weight, eps), total
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total


def both(tensors: Tensors, provider: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The op, with x in place of the sum where there is no residual."""
    made = layer_norm(**tensors, provider=provider, **options)
    return (made, tensors["x"]) if tensors["residual"] is None else made


def leaves(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {
        name: None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for name, tensor in tensors.items()
    }


def compare(tensors: Tensors, provider: str, options: dict[str, Any]) -> None:
    """y, total and all gradients against the composition in float64 and in the inputs' dtype."""
    shape, dtype, device = tensors["x"].shape, tensors["x"].dtype, tensors["x"].device
    named = ("y",) if tensors["residual"] is None else ("y", "total")
    upstream = {name: torch.randn(shape, device=device).to(dtype) for name in named}

    def run(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
        given = leaves(tensors, dtype)
        results = dict(zip(("y", "total"), function(given), strict=True))
        results = {name: results[name] for name in upstream}
        inputs_ = {name: tensor for name, tensor in given.items() if tensor is not None}
        grads = torch.autograd.grad(
            list(results.values()),
            list(inputs_.values()),
            [upstream[name].to(result.dtype) for name, result in results.items()],
        )
        return results | dict(zip(inputs_, grads, strict=True))

    ours = run(lambda given: both(given, provider, options), None)
    same = run(lambda given: composition(**given, **options), dtype)
    oracle = run(lambda given: composition(**given, **options), torch.float64)
    if shape[-1] == 1 and not options.get("rms"):  # a row is its own mean, and what torch's gradients have is rounding
        if provider == "aten":
            return
        through = upstream.get("total", torch.zeros(shape, device=device)).double()
        oracle |= {name: through for name in ("x", "residual") if name in oracle}
        oracle |= {"weight": torch.zeros(1, device=device, dtype=torch.float64)} if "weight" in oracle else {}
    for name, exact in oracle.items():
        wanted = dtype if name in ("y", "total") else tensors[name].dtype
        assert ours[name].dtype == wanted and ours[name].is_contiguous(), name
        column.assert_close(name, ours[name], same[name], exact)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@forms
def test_shapes(
    device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], form: str, poison: None
) -> None:
    alone = {"eps": 0.1} if shape[-1] == 1 else {}  # a smaller one is lost beside the square of a value
    compare(inputs(form, shape, dtype, device), provider, {**FORMS[form][1], **alone})


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 8193), (1, 2, 12290)], ids=str)
@pytest.mark.parametrize("form", ["layer-residual", "no-vectors", "rms"])
def test_rows_longer_than_a_block_holds(
    device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], form: str, poison: None
) -> None:
    compare(inputs(form, shape, dtype, device), provider, FORMS[form][1])


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", [(3000, 20), (601, 97), (9001, 1)], ids=str)
@pytest.mark.parametrize("form", ["layer", "layer-residual"])
def test_more_rows_than_one_sum_has(
    device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], form: str, poison: None
) -> None:
    compare(inputs(form, shape, dtype, device), provider, FORMS[form][1])


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1),
    "channel-slice": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every-second": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "row-slice": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "columns": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "unaligned": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
}


@column.cases
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("form", ["layer-residual", "rms-residual"])
def test_strides(device: str, provider: str, stride: str, form: str, poison: None) -> None:
    """Of x, the residual, both vectors and the gradient of y."""
    tensors = inputs(form, (4, 5, 32), torch.float32, device)
    for name in ("x", "residual"):
        compare(
            {**tensors, name: STRIDES[stride](tensors[name]), **_as(stride, tensors, name)}, provider, FORMS[form][1]
        )
    vectors = {name: None if tensors[name] is None else tensors[name].repeat(2)[::2] for name in ("weight", "bias")}
    given = leaves({**tensors, **vectors})
    y, _ = both(given, provider, FORMS[form][1])
    grad = STRIDES[stride](torch.randn(tensors["x"].shape, device=device))
    if grad.shape == y.shape:
        (found,) = torch.autograd.grad(y, given["x"], grad, retain_graph=True)
        assert torch.equal(found, torch.autograd.grad(y, given["x"], grad.contiguous())[0])


def _as(stride: str, tensors: Tensors, name: str) -> Tensors:
    """The other one of x and residual in the shape of a transposed one."""
    other = "residual" if name == "x" else "x"
    return {other: tensors[other].transpose(0, 1).contiguous()} if stride == "transposed" else {}


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("vectors", column.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("form", ["layer", "rms"])
def test_vectors_of_another_dtype(
    device: str, provider: str, low: torch.dtype, vectors: torch.dtype, form: str, poison: None
) -> None:
    """They are read in float32, and results are rounded once."""
    tensors, options = inputs(form, (7, 40), low, device, vectors), FORMS[form][1]
    grad = torch.randn(7, 40, device=device).to(low)

    def run(given: Tensors, function: Callable[[Tensors], tuple[Tensor, Tensor]]) -> list[Tensor]:
        y, _ = function(given)
        return [y, *torch.autograd.grad(y, [t for t in given.values() if t is not None], grad.to(y.dtype))]

    found = run(leaves(tensors), lambda given: both(given, provider, options))
    wide = {name: None if t is None or name == "x" else t.float() for name, t in tensors.items()} | {"x": tensors["x"]}
    exact = run(leaves(wide, torch.float64), lambda given: composition(**given, **options))
    dtypes = [low, low, vectors, vectors]
    for mine, wanted, dtype in zip(found, exact, dtypes, strict=False):
        assert mine.dtype == dtype
        mine = mine if dtype != torch.float64 else mine.float()
        column.assert_close("result", mine, wanted.to(mine.dtype), wanted)


@column.cases
@pytest.mark.parametrize("used", ["y", "total"])
def test_one_result_alone_is_used(device: str, provider: str, used: str) -> None:
    form = "layer-residual"
    tensors, options = inputs(form, (6, 9), torch.float32, device), FORMS[form][1]
    found, exact = leaves(tensors), leaves(tensors, torch.float64)
    which = used == "total"
    both(found, provider, options)[which].square().sum().backward()
    composition(**exact, **options)[which].square().sum().backward()
    for name, tensor in found.items():
        assert (tensor.grad is None) == (exact[name].grad is None), name
        if tensor.grad is not None:
            column.assert_close(name, tensor.grad, exact[name].grad.float(), exact[name].grad)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", [(6, 33), (2, 8200), (5, 1)], ids=str)
@forms
def test_y_is_made_again_to_the_bit(
    device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], form: str, poison: None
) -> None:
    tensors, options = inputs(form, shape, dtype, device), {"eps": 1e-5, "rms": False, **FORMS[form][1]}
    vectors = tensors["weight"], tensors["bias"]
    y, total, mean, rstd = column.op(f"{OP}_forward", provider)(
        tensors["x"], tensors["residual"], *vectors, options["eps"], options["rms"]
    )
    rows = tensors["x"] if tensors["residual"] is None else total
    again = column.op(f"{OP}_apply", provider)(rows, mean, rstd, *vectors, options["rms"])
    assert torch.equal(again, y)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert rstd.shape == shape[:1] and mean.shape == ((0,) if options["rms"] else shape[:1])
    assert mean.dtype == rstd.dtype == wide and (total.shape == shape) == (tensors["residual"] is not None)


@column.cases
@pytest.mark.parametrize("channels", [24, 3000, 9000])
def test_rows_far_from_zero_keep_their_digits(device: str, provider: str, channels: int) -> None:
    x = torch.randn(4, channels, device=device) + torch.tensor([[1e4], [-3e5], [0.0], [1.0]], device=device)
    found = column.op(f"{OP}_forward", provider)(x, None, None, None, 1e-5, False)
    wide = x.double()
    mean, var = wide.mean(1), wide.var(1, correction=0)
    torch.testing.assert_close(found[2].double(), mean, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(found[3].double(), (var + 1e-5).rsqrt(), rtol=2e-5, atol=0)
    torch.testing.assert_close(
        found[0].double(), (wide - mean[:, None]) * found[3].double()[:, None], rtol=0, atol=0.04
    )


@column.cases
def test_a_constant_row_becomes_the_bias(device: str, provider: str) -> None:
    x = torch.tensor([0.1, -7.3, 3e4, 0.0], device=device)[:, None].repeat(1, 41)
    weight, bias = torch.randn(2, 41, device=device)
    y = layer_norm(x, weight, bias, provider=provider)
    torch.testing.assert_close(y, bias.expand_as(y), rtol=1e-5, atol=1e-5)


@column.cases
@pytest.mark.parametrize("form", ["layer-residual", "rms-residual"])
def test_nan_stays_in_its_row(device: str, provider: str, form: str) -> None:
    tensors = inputs(form, (5, 11), torch.float32, device)
    tensors["x"][2, 3] = float("nan")
    given = leaves(tensors)
    y, total = both(given, provider, FORMS[form][1])
    (grad,) = torch.autograd.grad(y.sum(), given["x"])
    for made in (y, grad):
        assert made[2].isnan().all() and not made[[0, 1, 3, 4]].isnan().any()
    assert int(total.isnan().sum()) == 1


@column.cases
@pytest.mark.parametrize("form", ["layer-residual", "rms-residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bitwise_repeatable(device: str, provider: str, dtype: torch.dtype, form: str) -> None:
    tensors = inputs(form, (300, 65), dtype, device)

    def once() -> list[Tensor]:
        given = leaves(tensors)
        y, total = both(given, provider, FORMS[form][1])
        grads = torch.autograd.grad((y * total).sum(), [t for t in given.values() if t is not None])
        return [y.detach(), total.detach(), *grads]

    assert all(torch.equal(first, again) for first, again in zip(once(), once(), strict=True))


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    tensors = inputs("layer-residual", (4096, 1024), torch.float32, device)

    def run(x: Tensor) -> list[Tensor]:
        given = leaves({**tensors, "x": x})
        y, total = both(given, provider, {})
        return [y.detach(), total.detach(), *torch.autograd.grad((y * total).sum(), list(given.values()))]

    column.assert_follows_the_stream(run, tensors["x"])


@column.gpu_cases
def test_graph_capture(device: str, provider: str) -> None:
    given = leaves(inputs("layer-residual", (256, 768), torch.bfloat16, device))

    def step() -> tuple[Tensor, ...]:
        y, total = both(given, provider, {})
        return y, total, *torch.autograd.grad((y * total).sum(), list(given.values()))

    column.assert_replays(step, given["x"])


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(inputs("layer", (5, 96), torch.float32, other), provider, {})
    )


@pytest.mark.large
@column.gpu_cases
def test_more_than_two_billion_elements(device: str, provider: str) -> None:
    x = torch.randn(2**17 + 3, 2**14 + 8, device=device, dtype=torch.float16)
    assert x.numel() > 2**31
    y, _, mean, rstd = column.op(f"{OP}_forward", provider)(x, None, None, None, 1e-5, False)
    last = x[-2:].double()
    wanted = F.layer_norm(last, last.shape[-1:])
    torch.testing.assert_close(y[-2:].double(), wanted, rtol=2e-3, atol=2e-3)
    del y
    grad, _, grad_bias = column.op(f"{OP}_backward", provider)(x, None, x, mean, rstd, None, False, True, False, True)
    last.requires_grad_()
    (exact,) = torch.autograd.grad(F.layer_norm(last, last.shape[-1:]), last, last.detach())
    torch.testing.assert_close(grad[-2:].double(), exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(grad_bias[:8], x[:, :8].sum(0, dtype=torch.float32), rtol=1e-3, atol=1e-2)
