"""Fused residual blocks against the blocks themselves: results, statistics, what is kept, when they step aside."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from saved import saved_maps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext import fuse, models
from auglocal_ext.models import BasicBlock, Bottleneck, FusedBasicBlock
from auglocal_ext.nn import PooledLinear

BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "basic, stride": lambda: BasicBlock(8, 16, 2),
    "bottleneck": lambda: Bottleneck(16, 16),
    "bottleneck, width": lambda: Bottleneck(8, 16),
    "bottleneck, stride, groups": lambda: Bottleneck(8, 16, 2, mid_channels=8, groups=4),
}
KEPT = {"basic": 3, "basic, stride": 4, "bottleneck": 4, "bottleneck, width": 5, "bottleneck, stride, groups": 5}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
blocks = pytest.mark.parametrize("name", BLOCKS)


def pair(name, dtype=torch.float64, seed=3, **options):
    """A fused block and its eager twin, with parameters and statistics that are no ones and zeros."""
    torch.manual_seed(seed)
    block = BLOCKS[name]()
    for path, norm in list(block.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            made = nn.BatchNorm2d(norm.num_features, **options)
            if made.affine:
                nn.init.uniform_(made.weight, 0.3, 1.5)
                nn.init.normal_(made.bias, std=0.3)
            if made.running_mean is not None:
                nn.init.normal_(made.running_mean, std=0.2)
                nn.init.uniform_(made.running_var, 0.5, 2.0)
            owner, _, child = path.rpartition(".")
            setattr(block.get_submodule(owner), child, made)
    block.to(dtype)
    twin = copy.deepcopy(block)
    report = fuse(block)
    assert not report.left and len(report.fused) == 1
    return block, twin


def image(block, n=4, dtype=torch.float64, channels_last=False):
    x = torch.randn(n, block.conv1.in_channels, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def assert_same_step(ours, theirs, x, tolerance):
    x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(x), theirs(other)
    assert out.dtype == expected.dtype
    assert (out - expected).norm() <= tolerance * expected.norm()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    out.backward(grad)
    expected.backward(grad)
    wanted = dict(theirs.named_parameters()) | {"x": other}
    for name, tensor in [*ours.named_parameters(), ("x", x)]:
        assert tensor.grad.dtype == tensor.dtype
        assert (tensor.grad - wanted[name].grad).norm() <= tolerance * wanted[name].grad.norm(), name
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=tolerance, atol=tolerance)


@blocks
@dtypes
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_equal_to_the_block(name, dtype, channels_last):
    ours, theirs = pair(name, dtype)
    assert_same_step(ours, theirs, image(ours, 6, dtype, channels_last), TOLERANCE[dtype])


@blocks
def test_bfloat16_is_as_close_to_double_as_the_block_is(name):
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):  # masks flip where rounding differs: one sample says little
        ours, theirs = pair(name, torch.bfloat16, seed)
        exact = copy.deepcopy(theirs).double()
        x = image(ours, 6, torch.bfloat16)
        grads = []
        for block in (ours, theirs, exact):
            h = x.to(block.conv1.weight.dtype, copy=True).requires_grad_()
            out = block(h)
            assert out.dtype == h.dtype
            out.square().mean().backward()
            grads.append([out.detach(), h.grad, *(parameter.grad for parameter in block.parameters())])
        for index in range(2):
            errors[index] += sum((a - b).norm() / b.norm() for a, b in zip(grads[index], grads[2], strict=True))
    assert errors[0] <= 1.2 * errors[1]
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=2e-2, atol=2e-2)


@blocks
@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1, "momentum": 0.7}],
    ids=str,
)
def test_batch_norms_options(name, options):
    ours, theirs = pair(name, **options)
    for seed in range(3):  # statistics of several batches, one of them in eval mode
        x = image(ours) + seed
        ours.zero_grad()
        theirs.zero_grad()
        assert_same_step(ours.train(seed != 1), theirs.train(seed != 1), x, 1e-10)


@blocks
def test_eval_mode_and_frozen_norms(name):
    ours, theirs = pair(name)
    assert_same_step(ours.eval(), theirs.eval(), image(ours), 1e-10)
    for block in (ours.train(), theirs.train()):
        block.zero_grad()
        block.bn2.eval()
        block.bn2.requires_grad_(False)
    x = image(ours)
    out, expected = ours(x), theirs(x)
    out.square().sum().backward()
    expected.square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if key.startswith("bn2"):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, wanted[key].grad)
    assert torch.equal(ours.bn2.running_mean, theirs.bn2.running_mean) and ours.bn2.num_batches_tracked == 0
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@blocks
def test_gradcheck(name):
    ours, _ = pair(name)
    x = torch.randn(3, ours.conv1.in_channels, 3, 3, dtype=torch.float64, requires_grad=True)
    some = [ours.conv2.weight, ours.bn1.weight, ours.bn2.bias]
    if ours.downsample is not None:
        some += [ours.downsample[0].weight, ours.downsample[1].weight]
    for parameter in ours.parameters():
        parameter.requires_grad_(any(parameter is one for one in some))
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *some), fast_mode=True)


@blocks
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_input_and_raw_convolution_outputs_are_kept(name, autocast):
    ours, theirs = pair(name, torch.float32)
    x = image(ours, 2, torch.bfloat16 if autocast else torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kept = saved_maps(lambda: ours(x), ours)
        eager = saved_maps(lambda: theirs(x), theirs)
    kept = [shape for shape in kept if shape[0] == len(x) and shape[2] > 3]  # and no weight cast for conv1
    assert len(kept) == KEPT[name]
    assert len(eager) > len(kept)


@blocks
def test_autocast(name):
    ours, theirs = pair(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = image(ours, 8, torch.float32)
        out, expected = ours(x), theirs(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert (out - expected).norm() < 2e-2 * expected.norm()
    out.float().square().mean().backward()
    expected.float().square().mean().backward()
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ours_p.grad.dtype == torch.float32
        assert (ours_p.grad - theirs_p.grad).norm() < 0.1 * theirs_p.grad.norm()


def test_a_gradient_constant_over_positions_is_never_a_map():
    block, _ = pair("basic", torch.float32)
    head = PooledLinear(8, 10)
    x, y = torch.randn(64, 8, 32, 32), torch.randint(0, 10, (64,))
    out = block(x)
    loss = head.loss(out, y).loss
    strides = []
    out.register_hook(lambda grad: strides.append(grad.stride()))
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 4 * out.numel():
                    made.append(func._schema.name.split("::")[1])
            return result

    with Watch():
        loss.backward()
    assert strides[0][2:] == (0, 0)
    # gradient of conv2's output, conv2's input made again, its gradient, and that of conv1's output: no other map
    assert made == ["batch_norm_act_backward", "batch_norm_act_apply", "convolution_backward"] + made[:1]


def hook_on(child):
    def change(block):
        getattr(block, child).register_forward_hook(lambda *_: seen.append(child))

    seen = []
    change.seen = seen
    return change


@pytest.mark.parametrize("child", ["conv1", "bn1", "relu", "conv2", "bn2"])
def test_hooks_on_parts_registered_later_run(child):
    ours, theirs = pair("basic")
    change = hook_on(child)
    change(ours)
    assert_same_step(ours, theirs, image(ours), 1e-10)
    assert change.seen == [child] * (2 if child == "relu" else 1)


def test_the_first_convolution_may_be_anything():
    ours, theirs = pair("basic")
    for block in (ours, theirs):
        block.conv1.padding_mode = "reflect"
    assert not fuse(ours).left
    assert_same_step(ours, theirs, image(ours), 1e-10)
    assert len(saved_maps(lambda: ours(image(ours)), ours)) < len(saved_maps(lambda: theirs(image(ours)), theirs))


def test_shortcut_hooks_and_parts_replaced_later():
    ours, theirs = pair("basic, stride")
    seen = []
    ours.downsample.register_forward_hook(lambda *_: seen.append(1))
    assert_same_step(ours, theirs, image(ours), 1e-10)
    assert seen == [1]
    shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(8, 16, 1)).double()
    for block in (ours, theirs):
        block.zero_grad()
        block.bn1 = nn.GroupNorm(4, 16).double()
        block.downsample = copy.deepcopy(shortcut)
    assert_same_step(ours, theirs, image(ours), 1e-10)
    for block in (ours, theirs):
        block.zero_grad()
        block.bn1 = nn.BatchNorm2d(16).double()
    assert_same_step(ours, theirs, image(ours), 1e-10)


def test_shortcut_of_a_norm_alone_under_autocast():
    ours, theirs = pair("basic", torch.float32)
    ours.downsample = nn.Sequential(nn.BatchNorm2d(8))
    theirs.downsample = copy.deepcopy(ours.downsample)
    x = image(ours, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = ours(x), theirs(x)
    assert out.dtype == expected.dtype
    assert (out - expected).norm() < 2e-2 * expected.norm()


def test_frozen_batch_statistics_errors_and_empty_batches_are_torchs():
    ours, theirs = pair("basic")
    for block in (ours, theirs):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(torch.randn(1, 8, 1, 1, dtype=torch.double))
        assert block.eval()(torch.randn(0, 8, 4, 4, dtype=torch.double)).shape == (0, 8, 4, 4)


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.LeakyReLU(inplace=True)], ids=str)
def test_leaky_blocks(activation):
    ours, theirs = pair("bottleneck")
    ours.relu, theirs.relu = activation, copy.deepcopy(activation)
    assert_same_step(ours, theirs, image(ours), 1e-10)


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_torchvision_blocks(name):
    resnet = pytest.importorskip("torchvision.models.resnet", exc_type=Exception)
    torch.manual_seed(0)
    width = 16 * getattr(resnet, name).expansion
    downsample = nn.Sequential(nn.Conv2d(8, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    theirs = getattr(resnet, name)(8, 16, 2, downsample).double()
    ours = copy.deepcopy(theirs)
    report = fuse(ours)
    assert report.fused == (f"{type(theirs).__name__} ({name})",) and not report.left
    assert isinstance(ours, type(theirs)) and type(ours) is not type(theirs)
    assert_same_step(ours, theirs, image(ours), 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_fifty_steps_of_training_are_those_of_the_eager_network(seed, dtype, tolerance):
    """Plain SGD: with momentum single runs part by a few 1e-4, as those of eager networks in two layouts do."""
    torch.manual_seed(seed)
    ours = models.resnet_cifar(8, width=8).to(dtype)
    theirs = copy.deepcopy(ours)
    report = fuse(ours)
    assert not report.left and sum(name.endswith("(BasicBlock)") for name in report.fused) == 3
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.005) for net in (ours, theirs)]
    prototypes = torch.randn(10, 3, 12, 12)
    history = []
    for _ in range(50):
        y = torch.randint(0, 10, (32,))
        x = (prototypes[y] + torch.randn(32, 3, 12, 12)).to(dtype)
        losses = [F.cross_entropy(net(x), y) for net in (ours, theirs)]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append([loss.item() for loss in losses])
    assert sum(a for a, _ in history[-10:]) < 0.99 * sum(a for a, _ in history[:10])
    assert max(abs(a - b) for a, b in history) < tolerance


def test_the_class_is_all_that_differs():
    block, twin = pair("basic")
    assert type(block) is FusedBasicBlock and isinstance(block, BasicBlock)
    assert vars(block).keys() == vars(twin).keys()
