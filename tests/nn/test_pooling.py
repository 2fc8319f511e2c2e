"""Global average pooling: the mean, and a gradient that is never a map; tracers and transforms get torch's own."""

from __future__ import annotations

import io

import pytest
import torch
from torch.autograd import forward_ad

from auglocal_ext.nn import PooledLinear, global_average_pool


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 7), (2, 3, 2, 3, 4), (5, 8)], ids=str)
def test_is_the_mean_over_the_positions(shape):
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    assert torch.equal(global_average_pool(x), x.flatten(2).mean(2) if len(shape) > 2 else x)
    torch.autograd.gradcheck(global_average_pool, (x,), check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda x: global_average_pool(x).square(), (x,))


@pytest.mark.parametrize("function", [global_average_pool, PooledLinear(4, 5)], ids=["pool", "PooledLinear"])
def test_gradient_is_a_broadcast(function):
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    seen = []
    h = x * 1
    h.register_hook(lambda grad: seen.append(grad.stride()))
    function(h).sum().backward()
    assert seen[0][2:] == (0, 0)
    expected = torch.ones(4) if function is global_average_pool else function.weight.detach().sum(0)
    torch.testing.assert_close(x.grad, (expected / 30)[:, None, None].expand_as(x))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and still there
def test_tracers_and_transforms_find_torchs_own_mean():
    head, x = PooledLinear(4, 5), torch.randn(3, 4, 5, 6)
    expected = head(x)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(head, (x,)), saved)
    saved.seek(0)
    torch.testing.assert_close(torch.jit.load(saved)(x), expected)
    torch.testing.assert_close(torch.vmap(head)(x.unsqueeze(0)), expected.unsqueeze(0))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(head(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, head.weight.sum(1).expand_as(expected))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((head, compiled), leaves, strict=True):
        function(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
