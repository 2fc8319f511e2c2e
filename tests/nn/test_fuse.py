"""fuse and unfuse: what they find and report, what they leave as it is, copies, hooks, tracers."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from saved import saved_maps
from torch import nn

import auglocal_ext
from auglocal_ext import FusionReport, fuse, models, unfuse
from auglocal_ext.auxiliary import ImageEncoder
from auglocal_ext.models import FusedBasicBlock, conv_bn_relu
from auglocal_ext.nn import FusedSequential, eager_type, run_chain


def kinds(module):
    return [type(part) for part in module.modules()]


def twins(module, seed=0):
    torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, -0.5, 1.5)
            nn.init.normal_(part.bias)
    module.double()
    return module, copy.deepcopy(module)


def assert_same(ours, theirs, x, **tolerance):
    for training in (True, False):
        out, expected = ours.train(training)(x), theirs.train(training)(x)
        torch.testing.assert_close(out, expected, **tolerance)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found = torch.autograd.grad(out, list(ours.parameters()), grad)
        wanted = torch.autograd.grad(expected, list(theirs.parameters()), grad)
        torch.testing.assert_close(found, wanted, **tolerance)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def images(n=3, channels=3, size=16, dtype=torch.float64):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=dtype)


CHAINS = {
    "conv, bn, relu": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()],
    "leaky, inplace": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.3, inplace=True)],
    "no activation": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)],
    "two units": lambda: [
        *nn.Sequential(*CHAINS["conv, bn, relu"]()),
        nn.Conv2d(4, 5, 1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
    ],
    "bn, conv": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding="same"), nn.Tanh()],
    "max pool between": lambda: [
        *CHAINS["conv, bn, relu"](),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding="valid"),
        nn.BatchNorm2d(6),
    ],
    "pre-activation": lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4)],
    "two norms": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU()],
    "other activation": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 1)],
    "in place after": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardtanh(inplace=True), nn.Conv2d(4, 4, 1)],
    "reflect": lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")],
    "same, even": lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2, padding="same")],
    "nested": lambda: [conv_bn_relu(3, 4), nn.Sequential(conv_bn_relu(4, 4, pool_before=True), conv_bn_relu(4, 6))],
    "group norm": lambda: [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains(chain):
    ours, theirs = twins(nn.Sequential(*CHAINS[chain]()))
    before = kinds(ours)
    report = fuse(ours)
    assert report.fused and type(ours) is FusedSequential
    assert_same(ours, theirs, images())
    unfuse(ours)
    assert kinds(ours) == before
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(images()), theirs(images()))


@pytest.mark.parametrize(
    ("chain", "count"), [("conv, bn, relu", 2), ("two units", 3), ("nested", 4), ("pre-activation", 2)]
)
def test_one_map_is_kept_per_convolution(chain, count):
    ours, theirs = twins(nn.Sequential(*CHAINS[chain]()))
    fuse(ours)
    x = images()
    kept, eager = (saved_maps(lambda net=net: net(x), net) for net in (ours, theirs))
    kept = [shape for shape in kept if shape[0] == len(x)]
    # the input, each raw convolution output and, where a max pool stands between, its indices and its output
    assert len(kept) == count + (2 if chain == "nested" else 0)
    assert len(eager) > len(kept)


def test_chains_of_a_list_and_of_containers_with_hooks():
    modules = [conv_bn_relu(3, 4), conv_bn_relu(4, 4)]
    ours, theirs = twins(nn.Sequential(*modules))
    torch.testing.assert_close(run_chain(list(ours), images()), theirs(images()))
    fuse(ours)
    seen = []
    ours[0].register_forward_hook(lambda module, args, out: seen.append(out))
    assert_same(ours, theirs, images())
    assert len(seen) == 2 and bool((seen[0] >= 0).all())  # what a hook sees is the activation, as in eager
    ours[1].bn.register_forward_pre_hook(lambda module, args: seen.append("norm"))
    assert_same(ours, theirs, images())
    assert seen.count("norm") == 2


def test_report():
    net = nn.Sequential(
        OrderedDict(
            stem=conv_bn_relu(3, 8, max_pool_after=True),
            block=models.BasicBlock(8, 16, 2),
            other=nn.Sequential(nn.Conv2d(16, 16, 1), nn.GroupNorm(4, 16), nn.ReLU()),
            grouped=models.Bottleneck(16, 16),
            own=ImageEncoder(16, 8).encoder,
            sync=nn.Sequential(nn.Conv2d(8, 8, 1), nn.SyncBatchNorm(8)),
            lone=_Lone(),
        )
    )
    net.grouped.bn2 = nn.GroupNorm(2, net.grouped.conv2.out_channels)
    net.own[1].register_forward_hook(lambda *_: None)
    net.own[3].padding_mode = "reflect"
    report = fuse(net)
    assert isinstance(report, FusionReport)
    assert report.fused == ("stem.bn, stem.relu, stem.maxpool", "block (BasicBlock)", "own.4, own.5, sync.0")
    assert dict(report.left) == {
        "other.1": "is of type GroupNorm, not nn.BatchNorm2d",
        "grouped": "its bn2 is of type GroupNorm, not nn.BatchNorm2d",
        "own.1": "has hooks",
        "sync.1": "is of type SyncBatchNorm, not nn.BatchNorm2d",
        "lone.norm": "is not in an nn.Sequential or a known residual block",
    }
    lines = str(report).splitlines()
    assert "fused: 3" in lines and "left eager: 5" in lines
    assert "  grouped: its bn2 is of type GroupNorm, not nn.BatchNorm2d" in lines
    with pytest.raises(AttributeError):
        report.fused = ()
    assert fuse(net) == report  # again: nothing changes, and the same is said
    assert type(net.other) is nn.Sequential


class _Lone(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(x)


def test_a_convolution_that_stays_eager_is_reported():
    net = nn.Sequential(*CHAINS["reflect"]())
    report = fuse(net)
    assert report.fused == ("0, 1",)
    assert report.left == (("2", "pads with 'reflect'"),)


def test_what_has_a_forward_of_its_own_is_left():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class MyBlock(models.BasicBlock):
        pass

    net = nn.Sequential(Doubled(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), MyBlock(3, 3), models.BasicBlock(3, 3))
    net[2].forward = lambda x: x
    ours, theirs = twins(net)
    report = fuse(ours)
    assert report.fused == ()
    assert [name for name, _ in report.left] == ["0.1", "1.bn1", "1.bn2", "2"]
    x = images()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_a_plain_subclass_of_sequential_is_part_of_the_chain():
    class Named(nn.Sequential):
        pass

    ours, theirs = twins(nn.Sequential(Named(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 4, 1)))
    assert fuse(ours).fused == ("0.1, 0.2, 1",)
    assert type(ours[0]) is Named
    assert_same(ours, theirs, images())


def test_nothing_but_the_class_changes():
    net = models.resnet_cifar(14, width=4)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    names = [name for name, _ in net.named_parameters()], [name for name, _ in net.named_modules()]
    attributes = [set(vars(part)) for part in net.modules()]
    before, pointers = kinds(net), [p.data_ptr() for p in net.parameters()]
    fuse(net)
    assert kinds(net) != before and isinstance(net[1], models.BasicBlock)
    assert [set(vars(part)) for part in net.modules()] == attributes
    assert names == ([name for name, _ in net.named_parameters()], [name for name, _ in net.named_modules()])
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)
    assert [eager_type(part) for part in net.modules()] == before
    unfuse(net)
    assert kinds(net) == before


def test_hooks_on_fused_modules_run():
    ours, theirs = twins(models.resnet_cifar(8, width=4))
    fuse(ours)
    seen = []
    for name in ("stem", "layer2_0"):
        part = ours.get_submodule(name)
        part.register_forward_pre_hook(lambda module, args, name=name: seen.append(("before", name)))
        part.register_forward_hook(lambda module, args, out, name=name: seen.append(("after", name)))
        part.register_full_backward_hook(lambda module, inp, out, name=name: seen.append(("backward", name)))
    assert_same(ours, theirs, images())
    assert len(seen) == 12 and seen[:2] == [("before", "stem"), ("after", "stem")]
    ours.layer2_0.register_forward_hook(lambda module, args, out: 0 * out)
    assert not ours.get_submodule("layer2_0")(images(channels=4)).any()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies(duplicate):
    net, theirs = twins(models.resnet_cifar(8, width=4))
    fuse(net)
    twin = duplicate(net)
    assert kinds(twin) == kinds(net) and type(twin.layer1_0) is FusedBasicBlock
    assert_same(twin, theirs, images())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in net.parameters()}
    unfuse(twin)
    assert kinds(twin) == kinds(theirs)


def test_saving_a_whole_module():
    net = models.resnet_cifar(8, width=4).eval()
    fuse(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    x = images(dtype=torch.float32)
    assert torch.equal(twin(x), net(x))


@pytest.mark.parametrize("name", ["resnet32", "resnet50", "vgg13"])
def test_everything_in_our_networks_is_fused(name):
    with torch.device("meta"):
        net = models.build(name)
    report = fuse(net)
    assert report.fused and not report.left


def test_inference_is_eager_within_rounding():
    ours, theirs = twins(models.resnet_cifar(14, width=4))
    ours.float(), theirs.float()
    fuse(ours)
    x = images(8, dtype=torch.float32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_torchvision_networks():
    resnet = pytest.importorskip("torchvision.models.resnet", exc_type=Exception)
    for make in (resnet.resnet18, resnet.resnext50_32x4d):
        ours, theirs = twins(make(num_classes=7))
        report = fuse(ours)
        assert len(report.fused) == sum(kind.__name__.startswith("Fused") for kind in kinds(ours)) > 7
        assert [name for name, _ in report.left] == ["bn1"]  # its forward is a function of torchvision's
        x = images(4, size=96)
        out, expected = ours(x), theirs(x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.conv1.weight.grad, theirs.conv1.weight.grad)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        assert kinds(twin) == kinds(ours)
        unfuse(ours)
        assert kinds(ours) == kinds(theirs)


def test_torch_func_and_export_and_trace_run_eagerly():
    ours, theirs = twins(models.resnet_cifar(8, width=4))
    fuse(ours)
    x = images()
    parameters = dict(ours.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(ours.eval(), parameters, x).square().sum()

    found = torch.func.grad(loss)(parameters)
    theirs.eval()(x).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    program = torch.export.export(ours.eval(), (x,))
    torch.testing.assert_close(program.module()(x), theirs(x))
    assert not any("auglocal_ext" in str(node.target) for node in program.graph.nodes)
    traced = torch.jit.trace(ours, x)
    torch.testing.assert_close(traced(x), theirs(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), theirs(x))


@pytest.mark.slow
def test_compile():
    ours, theirs = twins(models.resnet_cifar(8, width=4))
    fuse(ours)
    x = images()
    out = torch.compile(ours, backend="aot_eager")(x)
    expected = theirs(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_global_hooks_see_every_module():
    ours, theirs = twins(models.resnet_cifar(8, width=4))
    fuse(ours)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        assert_same(ours, theirs, images())
    finally:
        handle.remove()
    assert seen.count(nn.BatchNorm2d) == 2 * sum(
        isinstance(part, nn.BatchNorm2d) for net in (ours, theirs) for part in net.modules()
    )


def test_exported_names():
    assert {"fuse", "unfuse", "FusionReport"} <= set(auglocal_ext.__all__)
