"""Canaries: each private part of torch in ``auglocal_ext/_torch.py`` does what it is used for. First, tensors."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import test_torch_private_modules
import torch
from canaries import GUARDED, Writes, canary
from torch import nn

from auglocal_ext import _torch as private


def test_every_name_has_a_canary():
    assert test_torch_private_modules and set(private.__all__) == GUARDED


@canary("FakeTensorMode", "FakeTensor", "DataDependentOutputException", "detect_fake_mode")
def test_fake_tensors_have_shapes_and_neither_memory_nor_values():
    assert private.detect_fake_mode() is None
    weight = torch.ones(3, 2**20)
    with private.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = torch.empty(2**40, 2**20, dtype=torch.bfloat16)
        out = x @ weight.T.to(torch.bfloat16)  # takes a tensor with data
        assert private.detect_fake_mode() is mode
        with pytest.raises(private.DataDependentOutputException):
            out.sum().item()
        assert torch.empty(2, device="cuda").device.type == "cuda"  # whether or not there is one
    assert isinstance(out, private.FakeTensor) and not isinstance(weight, private.FakeTensor)
    assert out.shape == (2**40, 3) and out.dtype is torch.bfloat16 and out.device.type == "cpu"
    assert private.detect_fake_mode([weight]) is None and private.detect_fake_mode([weight, out]) is mode
    with private.FakeTensorMode(), pytest.raises(AssertionError, match="FakeTensor"):
        x @ weight.T  # of another mode, and with data
    gradient = torch.ones(2, requires_grad=True)
    fake = private.FakeTensorMode().from_tensor(gradient)
    assert fake.requires_grad and fake.stride() == (1,)


@canary("TorchDispatchMode", "current_dispatch_mode", "without_dispatch_modes", "schema", "written_tensors")
def test_dispatch_modes_see_every_operator_until_they_are_switched_off():
    assert private.current_dispatch_mode() is None
    x = torch.ones(2, requires_grad=True)
    with Writes() as outer, Writes() as inner:
        assert private.current_dispatch_mode() is inner
        (x * 2).relu_().sum().backward()  # backward too
        with private.without_dispatch_modes():
            assert private.current_dispatch_mode() is None
            x.detach().mul_(2)
        assert private.current_dispatch_mode() is inner
    assert inner.names == outer.names
    assert inner.names[:2] == ["aten::mul", "aten::relu_"] and "aten::threshold_backward" in inner.names
    assert inner.written == ["aten::relu_"]
    assert [each.name for each in private.schema(torch.ops.aten.add_.Tensor).arguments] == ["self", "other", "alpha"]
    out, other = torch.empty(2), torch.ones(2)
    written = private.written_tensors(torch.ops.aten.add.out, (x, other), {"out": out})
    assert [id(each) for each in written] == [id(out)]
    written = private.written_tensors(torch.ops.aten._foreach_add_.Scalar, ([out, other], 1), {})
    assert [id(each) for each in written] == [id(out), id(other)]
    assert not list(private.written_tensors(torch.ops.aten.add.Tensor, (x, other), {}))


@canary("tree_flatten", "tree_unflatten", "tree_leaves", "TreeSpec")
def test_trees_come_back_as_they_were():
    pair = namedtuple("pair", "a b")
    tree = ({"b": [1, None], "a": (x := torch.ones(2),)}, OrderedDict(z=pair(3, "four"), y=()))
    leaves, spec = private.tree_flatten(tree)
    assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in private.tree_leaves(tree)]
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in (1, None, x, 3, "four")} and len(leaves) == 5
    assert isinstance(spec, private.TreeSpec) and spec == private.tree_flatten(tree)[1]
    back = private.tree_unflatten([repr(leaf) for leaf in leaves], spec)
    assert back[0]["b"] == ["1", "None"] and back[1]["z"] == pair("3", "'four'") and back[1]["y"] == ()
    assert private.tree_leaves(x)[0] is x
    assert private.tree_flatten([1])[1] != private.tree_flatten((1,))[1]


@canary("graph_is_kept")
def test_a_backward_pass_says_whether_it_keeps_its_graph():
    found = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            found.append(private.graph_is_kept())
            return grad

    y = Asks.apply(torch.ones(2, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert found == [True, False] and private.graph_is_kept()


@canary("storage_id")
def test_a_storage_has_one_identity():
    for device in ("cpu", "meta"):
        x, other = torch.empty(4, device=device), torch.empty(4, device=device)
        assert private.storage_id(x.untyped_storage()) == private.storage_id(x[1:].detach().untyped_storage())
        assert private.storage_id(x.untyped_storage()) != private.storage_id(other.untyped_storage())


@canary("version", "versions")
def test_a_version_counts_writes():
    x = torch.zeros(4)
    before, view = private.version(x), x[1:]
    (x + 1).mul_(2)
    assert private.version(x) == before
    view.add_(1)
    x.data.add_(1)  # which torch leaves out
    assert private.version(x) == private.version(view) == private.version(x.detach()) == before + 1
    assert private.versions([x, None, x + 1]) == [before + 1, 0]


@canary("backward_hooks", "post_accumulate_hooks")
def test_hooks_of_a_parameter_can_be_found_and_held_back():
    p, seen = nn.Parameter(torch.ones(2)), []
    assert not private.backward_hooks(p) and not private.post_accumulate_hooks(p)
    p.register_hook(lambda grad: seen.append("hook"))
    post = p.register_post_accumulate_grad_hook(lambda p: seen.append("post"))
    assert len(private.backward_hooks(p)) == len(private.post_accumulate_hooks(p)) == 1
    hooks = private.backward_hooks(p)
    held = dict(hooks)
    hooks.clear()
    (p * 2).sum().backward()
    assert seen == ["post"]
    hooks.update(held)
    (p * 2).sum().backward()
    assert seen == ["post", "hook", "post"]
    post.remove()
    assert not private.post_accumulate_hooks(p)


class Shape(torch.Tensor):
    """Has a shape and a device; notes the operators that run on it, which return numbers."""

    __torch_function__ = private.disabled_torch_function
    seen: list[str] = []

    @staticmethod
    def __new__(cls, like, device):
        options = {"strides": like.stride(), "storage_offset": like.storage_offset(), "dtype": like.dtype}
        return private.make_wrapper_subclass(cls, like.shape, device=device, storage_size=0, **options)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(private.schema(func).name)
        return torch.ones(1)


@canary("make_wrapper_subclass", "disabled_torch_function")
def test_a_wrapper_has_a_shape_and_sees_operators():
    made = Shape(torch.empty(4, 6, dtype=torch.float16).T[1:], torch.device("cuda"))
    assert made.shape == (5, 4) and made.stride() == (1, 6) and made.storage_offset() == 1
    assert made.dtype is torch.float16 and made.device.type == "cuda" and made.untyped_storage().nbytes() == 0
    # What an operator returns would be made a Shape, were __torch_function__ not switched off.
    assert [type(out) for out in (nn.functional.gelu(made), made + 1)] == [torch.Tensor] * 2
    assert Shape.seen == ["aten::gelu", "aten::add"]


@canary("foreach_copy_", "foreach_lerp_", "foreach_mul_", "foreach_zero_")
def test_foreach_works_in_place_on_all_tensors():
    xs = [torch.arange(3.0), torch.full((2, 2), 5.0)]
    memory = [x.data_ptr() for x in xs]
    with Writes() as writes:
        private.foreach_mul_(xs, torch.tensor(2.0))
        private.foreach_lerp_(xs, [torch.zeros(3), torch.zeros(2, 2)], 0.5)
        assert torch.equal(xs[0], torch.arange(3.0)) and bool((xs[1] == 5).all())
        private.foreach_copy_(xs, [torch.ones(3), torch.full((2, 2), 7.0)])
        assert bool((xs[0] == 1).all()) and bool((xs[1] == 7).all())
        private.foreach_zero_(xs)
    assert not any(bool(x.any()) for x in xs) and [x.data_ptr() for x in xs] == memory
    assert [name.removeprefix("aten::_foreach_") for name in writes.written] == ["mul_", "lerp_", "copy_", "zero_"]


@canary("below_autograd")
def test_below_autograd_nothing_is_recorded():
    x = torch.ones(2, requires_grad=True)
    with private.below_autograd(), Writes() as writes:
        y = x * 2
    assert writes.names == ["aten::mul"] and y.grad_fn is None and not y.requires_grad
    assert (x * 2).requires_grad


@canary("log_softmax_backward")
def test_the_gradient_of_log_softmax_is_made_from_its_result():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grad, log_p = torch.randn_like(x), x.log_softmax(1)
    (expected,) = torch.autograd.grad(log_p, x, grad)
    torch.testing.assert_close(private.log_softmax_backward(grad, log_p.detach(), 1, x.dtype), expected)


@canary("functorch_active", "transforms_active", "looked_into")
def test_transforms_are_noticed():
    def now():
        assert private.looked_into() == private.transforms_active()
        return private.functorch_active(), private.transforms_active()

    found = []

    def function(x):
        found.append(now())
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    with torch.autograd.forward_ad.dual_level():
        found.append(now())
    assert found == [(True, True), (True, True), (False, True)]
    assert now() == (False, False)

    torch.jit.trace(lambda x: found.append(private.looked_into()) or x + 1, torch.ones(2), check_trace=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    found.append(private.looked_into())
    handle.remove()
    assert found[3:] == [True, True] and not private.looked_into()
