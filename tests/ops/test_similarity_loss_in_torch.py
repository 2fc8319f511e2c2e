"""similarity_loss as an op of torch: needed gradients, compilation, fake tensors, autocast, wrong use; streams."""

from __future__ import annotations

import column
import pytest
import torch
from test_similarity_loss import IGNORE, compare, composition, inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.ops import similarity_loss
from auglocal_ext.ops.similarity_loss import channel_std

OP = "similarity_loss"


class Calls(TorchDispatchMode):
    """Records whether the op is asked for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if f"{OP}." in str(function):
            self.needs.append(args[4])
        return function(*args, **(kwargs or {}))


@column.cases
@pytest.mark.parametrize("shape", [(5, 7, 3, 4), (5, 7)], ids=["map", "vectors"])
def test_no_gradient_is_made_where_none_is_needed(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 6, torch.float32, device)
    with Calls() as calls:
        plain = similarity_loss(z, target, 6, provider=provider)
        with torch.no_grad():
            silent = similarity_loss(z.clone().requires_grad_(), target, 6, provider=provider)
        needed = similarity_loss(z.clone().requires_grad_(), target, 6, provider=provider)
    assert calls.needs == [False, False, True]
    assert plain.grad_fn is None and silent.grad_fn is None and needed.requires_grad
    assert torch.equal(plain, silent) and torch.equal(plain, needed)
    made = column.op(OP, provider)(z, target, 6, IGNORE, False)[1:]
    assert [m.numel() for m in made] == [0, 0]


@column.cases
@pytest.mark.parametrize("shape", [(19, 33, 5, 5), (19, 33)], ids=["map", "vectors"])
def test_bitwise_repeatable(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 4, torch.float32, device)

    def once() -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        loss = similarity_loss(leaf, target, 4, provider=provider)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    for first, again in zip(once(), once(), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(4, 5, 2, 3), (4, 5)], ids=["map", "vectors"])
def test_gradcheck(provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 3, torch.float64, "cpu")
    torch.autograd.gradcheck(lambda leaf: similarity_loss(leaf, target, 3, provider=provider), z.requires_grad_())


@column.cases
@pytest.mark.parametrize("shape", [(4, 6, 3, 2), (4, 6)], ids=["map", "vectors"])
def test_opcheck(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 5, torch.float32, device)
    leaf = (z.transpose(2, 3) if z.dim() > 2 else z).detach().requires_grad_()
    torch.library.opcheck(column.op(OP, provider), (leaf, target, 5, IGNORE, True))
    torch.library.opcheck(column.op(OP, provider), (z, target, 5, IGNORE, False))
    if z.dim() > 2:
        _, mean, factor = column.op(OP, provider)(z, target, 5, IGNORE, True)
        for map_ in (z.transpose(2, 3), z.contiguous(memory_format=torch.channels_last)):
            grad = torch.tensor(2.0, device=device)
            torch.library.opcheck(column.op(f"{OP}_input_grad", provider), (map_, mean, factor, grad))


@column.cases
@pytest.mark.parametrize("shape", [(4, 6, 3, 2), (4, 6)], ids=["map", "vectors"])
def test_compiles_as_one_graph(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 5, torch.float32, device)

    def step(z: Tensor) -> Tensor:
        return similarity_loss(z * 2, target, 5, provider=provider)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = z.clone().requires_grad_(), z.clone().requires_grad_()
    (compiled(found) * 2).backward()
    (step(expected) * 2).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_automatic_choice_compiles() -> None:
    z, target = inputs((4, 6, 3, 2), 5, torch.float32, "cpu")
    compiled = torch.compile(similarity_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, target, 5), composition(z, target, 5))


@column.cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        z = torch.empty(4, 6, 3, 2, dtype=torch.float16, device=device).requires_grad_()
        z_last = torch.empty_like(z, memory_format=torch.channels_last).requires_grad_()
        vectors = torch.empty(4, 6, dtype=torch.float16, device=device).requires_grad_()
        target = torch.empty(4, dtype=torch.int64, device=device)
        for leaf in (z, z_last, vectors):
            loss = similarity_loss(leaf, target, 5, provider=provider)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert loss.shape == () and loss.dtype == torch.float32
            assert (grad.shape, grad.dtype, grad.stride()) == (leaf.shape, leaf.dtype, leaf.stride())


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 7, 3, 4), (5, 7)], ids=["map", "vectors"])
def test_autocast_changes_nothing(device: str, provider: str, low: torch.dtype, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 6, torch.float32, device)
    for leaf in (z.requires_grad_(), z.detach().to(low).requires_grad_()):
        expected = similarity_loss(leaf, target, 6, provider=provider)
        with torch.autocast(device, low):
            found = similarity_loss(leaf, target, 6, provider=provider)
        assert torch.equal(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaf), torch.autograd.grad(expected, leaf), strict=True):
            assert a.dtype == leaf.dtype and torch.equal(a, b)


@column.cases
def test_scaled_loss_does_not_underflow(device: str, provider: str) -> None:
    z, target = inputs((6, 4, 32, 32), 5, torch.float16, device)
    z.requires_grad_()
    (similarity_loss(z, target, 5, provider=provider) * 65536).backward()
    exact = z.detach().double().requires_grad_()
    (composition(exact, target, 5) * 65536).backward()
    column.assert_close("z", z.grad, exact.grad.half(), exact.grad)
    # The same gradient, unscaled, is mostly below what float16 can hold with its digits.
    assert ((exact.grad / 65536).abs() < 6e-5).float().mean() > 0.5


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    z, target = inputs((4, 6, 3, 2), 5, torch.float32, device)
    z.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(similarity_loss(z, target, 5, provider=provider), z, create_graph=True)
    loss = similarity_loss(z, target, 5, provider=provider)
    first = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, z)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z": torch.zeros(4)}, ValueError, r"expected z of shape \(N, C\)"),
        ({"z": torch.zeros(0, 6, 3, 2)}, ValueError, "at least one image"),
        ({"z": torch.zeros(4, 6, 0)}, ValueError, "at least one image"),
        ({"z": torch.zeros(4, 6, 1, 1)}, ValueError, r"at least two positions.*z\.flatten\(1\)"),
        ({"z": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "expected z in float16"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected 4 labels"),
        ({"target": torch.zeros(4, 5, dtype=torch.int64)}, ValueError, r"labels of shape \(N,\)"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, r"target\.long\(\)"),
        ({"target": torch.tensor([0, 1, 7, 2])}, ValueError, "label 7 at index 2"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "expected target on cpu"),
        ({"num_classes": 0}, ValueError, "num_classes of at least 1"),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "cuda"}, (ValueError, RuntimeError), "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    z, target = inputs((4, 6, 3, 2), 5, torch.float32, "cpu")
    arguments = {"z": z, "target": target, "num_classes": 5, **changes}
    positional = [arguments.pop(name) for name in ("z", "target", "num_classes")]
    with pytest.raises(error, match=message):
        similarity_loss(*positional, **arguments)


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    z, target = inputs((64, 128, 32, 32), 10, torch.float32, device)

    def run(z: Tensor) -> list[Tensor]:
        leaf = z.detach().requires_grad_()
        loss = similarity_loss(leaf, target, 10, provider=provider, check_labels=False)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    column.assert_follows_the_stream(run, z)


@column.gpu_cases
def test_graph_capture(device: str, provider: str) -> None:
    z, target = inputs((16, 32, 8, 8), 10, torch.float32, device)
    z.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = similarity_loss(z, target, 10, provider=provider)
        return (loss, *torch.autograd.grad(loss, z))

    column.assert_replays(step, z)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((5, 7, 3, 4), 6, torch.float32, other), 6, provider)
    )


@pytest.mark.large
@column.gpu_cases
def test_more_than_two_billion_elements(device: str, provider: str) -> None:
    z, target = inputs((33, 64, 1024, 1024), 10, torch.float16, device)
    assert z.numel() > 2**31
    features = torch.stack([image.float().std((1, 2)) for image in z])
    expected = composition(features, target, 10)
    for layout in (z, z.contiguous(memory_format=torch.channels_last)):
        leaf = layout.detach().requires_grad_()
        loss = similarity_loss(leaf, target, 10, provider=provider)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert bool((grad[-2].flatten(1) != 0).any(1).all())
        del grad, leaf, loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_deviation_alone_has_the_gradient_of_the_op(dtype):
    """Replicas gather deviations: the loss of these vectors is the loss of the maps."""
    z = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    z[1, 2] = 0.5  # a constant channel
    y, maps = torch.tensor([0, 1, 0, 2, 1, 0]), [z.clone().requires_grad_() for _ in range(2)]
    losses = similarity_loss(maps[0], y, 3), similarity_loss(channel_std(maps[1]), y, 3)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(maps[1].grad, maps[0].grad)
    assert maps[1].grad.dtype == dtype and not maps[1].grad[1, 2].any()
