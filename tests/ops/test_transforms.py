"""torch.func and forward-mode AD: the ops refuse them with the way out, modules run as torch's own layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from auglocal_ext import fuse, ops
from auglocal_ext.nn import BatchNormAct2d, Branch, must_be_eager, norm_act_conv, norm_shortcut_act
from auglocal_ext.ops.similarity_loss import channel_std
from auglocal_ext.ops.transforms import transforms_active

_X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
_ONES, _LABELS = torch.ones(3), torch.tensor([0, 1, 0, 1])
_BRANCH = (_ONES, None, None, None, True, 0.1, 1e-5)

OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm_act": lambda x: ops.batch_norm_act(x, _ONES, None, None, None, training=True),
    "batch_norm_act_max_pool": lambda x: ops.batch_norm_act_max_pool(x, _ONES, None, None, None, training=True),
    "layer_norm": lambda x: ops.layer_norm(x, torch.ones(5)),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x[..., 0, 0], torch.eye(3), None, _LABELS).loss,
    "pooled_cross_entropy": lambda x: ops.pooled_cross_entropy(x, torch.eye(3), None, _LABELS).loss,
    "reconstruction_loss": lambda x: ops.reconstruction_loss(x, torch.zeros_like(x), 0 * _ONES, _ONES),
    "similarity_loss": lambda x: ops.similarity_loss(x, _LABELS, 2),
    "supervised_contrast": lambda x: ops.supervised_contrast(x.flatten(1), _LABELS, 0.1),
    "channel_std": channel_std,
    "norm_act_conv": lambda x: norm_act_conv(x, _ONES, None, None, None, torch.ones(2, 3, 1, 1), training=True),
    "norm_shortcut_act": lambda x: norm_shortcut_act(Branch(x, *_BRANCH), Branch(x, *_BRANCH)),
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(_X),
    "vmap": lambda f: torch.func.vmap(f)(_X.expand(2, *_X.shape)),
    "jvp": lambda f: torch.func.jvp(f, (_X,), (_X,)),
    "jacrev": lambda f: torch.func.jacrev(f)(_X),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_transforms_are_refused_with_the_way_out(op: str, transform: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{op} does not work under torch.func .*backward\(\).* use "):
        TRANSFORMS[transform](OPS[op])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_tangents_are_refused_with_the_way_out(op: str, requires_grad: bool) -> None:
    """Without a parameter to train there was no node, and the tangent was left out without a word."""
    with forward_ad.dual_level():
        OPS[op](_X)  # which has none
        x = forward_ad.make_dual(_X.clone().requires_grad_(requires_grad), torch.ones_like(_X))
        with pytest.raises(NotImplementedError, match=rf"^{op} has no forward-mode derivative.*backward\(\).* use "):
            OPS[op](x)


def test_a_tangent_of_a_weight_is_one_too() -> None:
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        ops.batch_norm_act(_X, forward_ad.make_dual(_ONES, _ONES), None, None, None, training=True)


def test_a_level_is_seen_while_it_is_open() -> None:
    """What is asked is private to torch."""
    assert not transforms_active()
    with forward_ad.dual_level():
        assert transforms_active() and must_be_eager(_X)
    assert not transforms_active()
    assert torch.func.vmap(lambda x: x + transforms_active())(torch.zeros(2)).tolist() == [1, 1]


def tangent(net: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(_X, _X.flip(0)))).tangent


@pytest.mark.slow  # torch compiles the formula of its BatchNorm
def test_modules_have_the_tangents_of_torchs_layers() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    expected = tangent(plain)
    assert expected.abs().sum() > 0
    fuse(plain)
    torch.testing.assert_close(tangent(plain), expected)
    torch.testing.assert_close(
        tangent(BatchNormAct2d(3, activation="leaky_relu")), tangent(nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU()))
    )


def test_a_module_is_transformed_as_torchs_layer_is() -> None:
    ours, theirs = BatchNormAct2d(3).eval(), nn.BatchNorm2d(3).eval()
    found = torch.func.jacrev(lambda x: ours(x).sum())(_X)
    torch.testing.assert_close(found, torch.func.jacrev(lambda x: F.relu(theirs(x)).sum())(_X))


def test_batched_gradients_of_a_reconstruction() -> None:
    x = _X.clone().requires_grad_()
    loss = OPS["reconstruction_loss"](x)
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    (two,) = torch.autograd.grad(loss, x, torch.tensor([1.0, 3.0]), is_grads_batched=True)
    torch.testing.assert_close(two, torch.stack([one, 3 * one]))
