"""What the test of every op shares: providers as a parameter, layouts, comparison with an oracle, checks on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.ops import providers

CASES = [
    pytest.param(device, name, id=f"{device}-{name}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for device, names in (
        ("cpu", ("reference", "aten", "cpu", "triton")),
        ("cuda", ("reference", "aten", "cuda", "triton")),
    )
    for name in names
]
cases = pytest.mark.parametrize(("device", "provider"), CASES)
gpu_cases = pytest.mark.parametrize(("device", "provider"), [case for case in CASES if case.values[0] == "cuda"])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
activations = pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])

# On top of the error that torch makes in the same dtype: relative to the largest element of the oracle, and absolute.
TOLERANCE = {
    torch.float64: (1e-13, 1e-16),
    torch.float32: (1e-6, 1e-8),
    torch.float16: (1e-3, 6e-8),
    torch.bfloat16: (8e-3, 1e-8),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel-slice": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "image-slice": lambda x: torch.cat([x, x]).repeat_interleave(2, 0)[1::2][: x.shape[0]],
    "row-slice": lambda x: torch.cat([x, x, x], 2)[:, :, x.shape[2] : 2 * x.shape[2]],
    "column-slice": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded-positions": lambda x: x[:, :, :1, :1].expand_as(x),
    "expanded-images": lambda x: x[:1].expand_as(x),
    "unaligned-images": lambda x: F.pad(x.flatten(1), (0, 1))[:, :-1].unflatten(1, x.shape[1:]),
    "unaligned-start": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
}


def need(device: str, name: str) -> None:
    """Skip where a provider cannot run, with its reason; fail where the environment promises that it was built."""
    reason = providers.missing(name, device)
    if reason is not None:
        if os.environ.get("AUGLOCAL_FORCE_EXT") == "1" and name in ("cpu", "cuda"):
            pytest.fail(f"{name} must be there: {reason}")
        pytest.skip(reason)


def op(name: str, provider: str) -> Any:
    """The overload itself, without the function in front of it."""
    return getattr(getattr(torch.ops.auglocal_ext, name), provider)


def assert_close(what: str, ours: Tensor, same_dtype: Tensor, oracle: Tensor) -> None:
    """|oracle - ours| <= |oracle - torch in the same dtype| + tolerance: torch's own error and little more."""
    assert ours.shape == oracle.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    relative, absolute = TOLERANCE[ours.dtype]
    tolerance = relative * oracle.abs().max() + absolute
    ours_wide, same_wide = ours.detach().to(oracle), same_dtype.detach().to(oracle)
    excess = (oracle - ours_wide).abs() - (oracle - same_wide).abs() - tolerance
    excess = torch.where(ours_wide.isnan() & ~oracle.isnan(), float("inf"), excess)
    worst = int(excess.flatten().argmax())
    assert not (excess > 0).any(), (
        f"{what}[{worst}]: ours {ours_wide.flatten()[worst]:.9g}, torch in the same dtype "
        f"{same_wide.flatten()[worst]:.9g}, oracle {oracle.flatten()[worst]:.9g}, tolerance {float(tolerance):.3g}"
    )


def assert_compiles(step: Callable[..., Tensor], leaves: Sequence[Tensor], running: Sequence[Tensor]) -> None:
    """``step(leaves, running)`` as one graph: output, running statistics and gradients are those of eager mode."""
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        fresh = [leaf.detach().requires_grad_() for leaf in leaves]
        updated = [statistic.clone() for statistic in running]
        y = function(fresh, updated)
        (y * y).sum().backward()
        results.append([y.detach(), *updated, *(leaf.grad for leaf in fresh)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def assert_repeatable(
    step: Callable[..., Tensor], leaves: Sequence[Tensor], running: Sequence[Tensor], grad: Tensor
) -> None:
    """``step(leaves, running)`` twice: output, running statistics and gradients agree to the bit."""

    def once() -> list[Tensor]:
        fresh = [leaf.detach().requires_grad_() for leaf in leaves]
        updated = [statistic.clone() for statistic in running]
        y = step(fresh, updated)
        return [y.detach(), *updated, *torch.autograd.grad(y, fresh, grad)]

    for first, again in zip(once(), once(), strict=True):
        assert torch.equal(first, again)


def assert_follows_the_stream(run: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> None:
    """On a side stream on which x is written late, ``run`` makes of it what it makes of an x long there."""
    expected = run(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = run(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_replays(step: Callable[[], Sequence[Tensor]], x: Tensor, *state: Tensor) -> None:
    """A CUDA graph of ``step`` makes of new values of x what ``step`` makes of them; it updates ``state`` alike."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    start = [tensor.clone() for tensor in state]
    graph.replay()
    found = [tensor.clone() for tensor in (*captured, *state)]
    for tensor, value in zip(state, start, strict=True):
        tensor.copy_(value)
    wanted = (*step(), *state)
    for replayed, made in zip(found, wanted, strict=True):
        assert torch.equal(replayed, made)


def assert_runs_beside_the_current_device(check: Callable[[str], None]) -> None:
    """``check`` holds on a GPU that is not the current one, which it leaves the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.cuda.set_device(0)
    check("cuda:1")
    assert torch.cuda.current_device() == 0


class GradientNeeds(TorchDispatchMode):
    """Records for each call of an op whether it is asked for the gradient, its fifth argument."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self._op = op
        self.needs: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self._op in str(function):
            self.needs.append(args[4])
        return function(*args, **(kwargs or {}))
