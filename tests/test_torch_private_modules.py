"""Canaries for ``auglocal_ext/_torch.py``: modules, torch.compile, optimizers, CUDA, torch.distributed."""

from __future__ import annotations

import inspect
import os
import warnings
from collections import OrderedDict
from datetime import timedelta

import pytest
import torch
from canaries import Writes, canary
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from auglocal_ext import _torch as private


def _classes(*names):
    return [getattr(nn, name) for name in names]


@canary("BatchNormBase", "NormBase", "ConvBase", "ConvTransposeBase")
def test_base_classes_hold_the_public_ones():
    batch = _classes("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LazyBatchNorm2d")
    instance = _classes("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
    transposed = _classes("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "LazyConvTranspose2d")
    plain = _classes("Conv1d", "Conv2d", "Conv3d", "LazyConv2d")
    others = _classes("GroupNorm", "LayerNorm", "RMSNorm", "Linear", "Unfold", "MaxPool2d")
    every = [*batch, *instance, *transposed, *plain, *others]
    for base, members in {
        private.BatchNormBase: batch,
        private.NormBase: batch + instance,
        private.ConvBase: plain + transposed,
        private.ConvTransposeBase: transposed,
    }.items():
        assert [cls for cls in every if issubclass(cls, base)] == [cls for cls in every if cls in members], base
    assert {"in_channels", "out_channels", "kernel_size", "groups"} <= vars(private.ConvBase(*_CONV)).keys()
    assert {"eps", "momentum", "affine", "track_running_stats"} <= vars(private.NormBase(2)).keys()


_CONV = (2, 2, (1,), (1,), (0,), (1,), False, (0,), 1, True, "zeros")


@canary("MODULE_HOOKS", "call_hooks", "has_global_hooks")
def test_hooks_of_modules_are_noticed():
    for register, called in {
        "register_forward_hook": True,
        "register_forward_pre_hook": True,
        "register_full_backward_hook": True,
        "register_full_backward_pre_hook": True,
        "register_state_dict_pre_hook": False,
        "register_state_dict_post_hook": False,
        "register_load_state_dict_pre_hook": False,
        "register_load_state_dict_post_hook": False,
    }.items():
        module = nn.Linear(1, 1)
        assert not any(private.call_hooks(vars(module))) and not any(vars(module)[n] for n in private.MODULE_HOOKS)
        getattr(module, register)(lambda *args: None)
        assert any(private.call_hooks(vars(module))) == called, register
        assert any(vars(module)[name] for name in private.MODULE_HOOKS), register
    every = torch.nn.modules.module
    for register in (every.register_module_forward_hook, every.register_module_full_backward_hook):
        assert not private.has_global_hooks()
        handle = register(lambda *args: None)
        assert private.has_global_hooks()
        handle.remove()
    assert not private.has_global_hooks()


@canary("COMPILED_CALL", "plain_call")
def test_a_call_can_be_replaced_and_still_made():
    module, seen = nn.Linear(2, 3), []
    module.register_forward_hook(lambda *args: seen.append("hook"))
    vars(module)[private.COMPILED_CALL] = lambda *args: seen.append("instead") or private.plain_call(module)(*args)
    assert module(torch.ones(1, 2)).shape == (1, 3) and seen == ["instead", "hook"]
    del vars(module)[private.COMPILED_CALL]
    assert module(torch.ones(1, 2)).shape == (1, 3) and seen[2:] == ["hook"]


@canary("is_compiled", "constant_when_compiled")
def test_what_is_compiled_is_noticed_and_constants_are_kept():
    @private.constant_when_compiled
    def looked_up(key):
        return float(os.environ.get(key, "3"))  # a string from outside, which torch.compile does not trace

    module = nn.Linear(2, 2)
    assert not private.is_compiled(module)
    assert private.is_compiled(torch.compile(module, backend="eager")) and not private.is_compiled(module)
    module.compile(backend="eager")
    assert vars(module)[private.COMPILED_CALL] is not None
    graph = []

    def backend(found, example):
        graph.append(str(found.code))
        return found.forward

    x = torch.ones(2)
    assert torch.equal(torch.compile(lambda x: x * looked_up("no such key"), backend=backend, fullgraph=True)(x), 3 * x)
    assert "3.0" in graph[0]


@canary("non_persistent")
def test_buffers_in_no_state_dict_are_known():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("made", torch.ones(1), persistent=False)
    assert private.non_persistent(module) == {"made"} and list(module.state_dict()) == ["kept"]


@canary("RESETS")
def test_modules_initialise_themselves_by_these_methods():
    public, other = private.RESETS
    linear, attention = nn.Linear(2, 2), nn.MultiheadAttention(4, 2)
    for module, weight, reset in ((linear, linear.weight, public), (attention, attention.in_proj_weight, other)):
        nn.init.zeros_(weight)
        getattr(module, reset)()
        assert bool(weight.any())
    assert not hasattr(attention, public) and not hasattr(nn.Transformer(4, 2, 1, 1, 4, batch_first=True), public)


@canary("is_replica")
def test_replicas_of_data_parallel_are_noticed():
    module = nn.Linear(1, 1)
    assert not private.is_replica(module) and private.is_replica(module._replicate_for_data_parallel())


@canary("is_fsdp_managed")
def test_sharded_modules_are_noticed(fake_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert not any(map(private.is_fsdp_managed, module.modules()))
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    assert all(map(private.is_fsdp_managed, module.modules()))


@pytest.fixture
def fake_group():
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@canary("group_timeout")
def test_the_timeout_of_a_group_can_be_read(fake_group):
    assert private.group_timeout(fake_group) is None
    if torch.distributed.is_gloo_available():
        torch.distributed.destroy_process_group()
        options = {"rank": 0, "world_size": 1, "store": torch.distributed.HashStore()}
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=77), **options)
        assert private.group_timeout(torch.distributed.group.WORLD) == timedelta(seconds=77)
        other = torch.distributed.new_group([0], timeout=timedelta(seconds=78))
        assert private.group_timeout(other) == timedelta(seconds=78)


@canary("default_store")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
def test_the_store_of_the_default_group_keeps_the_first_value():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        assert private.default_store().compare_set("key", "", "first") == b"first"
        assert private.default_store().compare_set("key", "", "second") == b"first"
        assert store.num_keys() > 0
    finally:
        torch.distributed.destroy_process_group()


class Skipped(TorchFunctionMode):
    """Notes what :func:`skipped_init` finds."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (frame := private.skipped_init(func, out)) is not None:
            parameters = inspect.signature(getattr(nn.init, frame.f_code.co_name)).parameters
            self.calls.append({name: frame.f_locals[name] for name in parameters})
        return out


@canary("skipped_init")
@pytest.mark.parametrize("name", [n for n in dir(nn.init) if n.endswith("_") and not n.startswith("_")])
def test_initialisation_on_the_meta_device_is_an_operator_or_is_noticed(name):
    function, given = getattr(nn.init, name), {"val": 2.0, "sparsity": 0.5, "std": 0.25}
    tensor = torch.empty(4, 4, *((3,) if name == "dirac_" else ()), device="meta")
    given = {key: value for key, value in given.items() if key in inspect.signature(function).parameters}
    with Skipped() as skipped, Writes() as writes:
        assert tensor.is_meta  # asked for by somebody else
        function(tensor, **given)
    assert bool(writes.written) != bool(skipped.calls)
    if skipped.calls:
        (call,) = skipped.calls
        assert call["tensor"] is tensor and given.items() <= call.items()


def _stepped(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    return optimizer


@canary("mark_as_stepped", "mark_as_wrapped")
def test_schedulers_take_the_marks_of_a_step():
    def warnings_of(mark):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        step = type(optimizer).step

        def ours():
            return step(optimizer)

        private.mark_as_wrapped(ours)
        optimizer.step = ours
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        assert optimizer.step is ours
        if mark:
            private.mark_as_stepped(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        return [str(each.message) for each in caught]

    assert "before `optimizer.step()`" in warnings_of(mark=False)[0] and not warnings_of(mark=True)


@canary("step_scales_gradients", "let_step_scale_gradients")
def test_a_scaler_leaves_scaling_to_the_step():
    class Scaling(torch.optim.SGD):
        def step(self, closure=None):
            self.seen = self.grad_scale.item(), self.found_inf.item(), self.param_groups[0]["params"][0].grad.item()

    optimizer = _stepped(Scaling([nn.Parameter(torch.ones(1))], lr=0.1))
    assert not private.step_scales_gradients(optimizer)
    assert private.step_scales_gradients(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, fused=True))
    private.let_step_scale_gradients(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    scaler.step(optimizer)
    assert optimizer.seen == (4.0, 0.0, 1.0)


@canary("drop_step_hooks")
def test_step_hooks_are_dropped():
    optimizer, seen = _stepped(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    vars(other).update(vars(optimizer))
    private.drop_step_hooks(other)
    other.step()
    assert seen == []
    optimizer.step()
    assert seen == ["pre", "post"]


@canary("clear_cublas_workspaces", "give_back_pool")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_functions_of_cuda_take_what_they_are_given():
    private.clear_cublas_workspaces()  # without a device there is none to clear
    for function in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        device, pool = function.__doc__.split("->")[0].split("arg1: ")
        assert "Int" in device and pool.startswith("tuple[") and pool.count("Int") >= 2


def test_what_is_used_directly_is_there():
    class Module(nn.BatchNorm2d):
        def _check_input_dim(self, x):
            self.checked = x.shape

        def _apply(self, fn, recurse=True):
            self.applied = fn(torch.ones(1)).dtype
            return self

        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.loaded = prefix, list(state_dict)

    parent = nn.Sequential(OrderedDict(child=Module(2)))
    child = parent._modules["child"]
    assert child._parameters["weight"] is child.weight and child._buffers["running_mean"] is child.running_mean
    parent.to(torch.float64).load_state_dict({"child.weight": torch.ones(2)}, strict=False)
    parent(torch.ones(2, 2, 1, 1))
    assert child.applied is torch.float64 and child.loaded == ("child.", ["child.weight"])
    assert child.checked == (2, 2, 1, 1)
