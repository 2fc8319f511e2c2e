"""``LocalStep`` on localized models: planned, recomputed, captured, over stages."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import odd_models as odd
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import DGL, AugLocal, ContSup, Greedy, LocalSequential, LocalStep, localize
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.planning import plan_memory

sys.path += [str(Path(__file__).parents[1] / "step"), str(Path(__file__).parents[1] / "distributed")]

SHAPE = (3, 8, 8)


class Residual(nn.Module):
    """A small residual network, whose forward flattens by itself."""

    def __init__(self, blocks=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.blocks(x).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def sgd(params):
    return torch.optim.SGD(params, lr=0.125, momentum=0.9)


def batches(count, size=4):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randn(size, *SHAPE, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def build(name, **options):
    torch.manual_seed(1)
    if name == "tokens":
        return localize(odd.Tokens(), Greedy(), 5, input_shape=SHAPE, layout="class_token", **options)
    rule = {"augLocal": AugLocal(3), "dgl": DGL(), "context": ContSup("R1E")}[name]
    return localize(Residual(), rule, 5, input_shape=SHAPE, **options)


NAMES = ("augLocal", "context", "tokens")


def plain_step(net, optimizer, x, y):
    optimizer.zero_grad()
    out = net(x, y)
    out.loss.backward()
    optimizer.step()
    return out


def assert_same_state(net, other):
    state = other.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_steps_are_those_of_the_plain_loop(name, recompute):
    net, other = build(name, recompute=recompute), build(name)
    step, optimizer = LocalStep(net, sgd), sgd(other.parameters())
    for index, (x, y) in enumerate(batches(3)):
        torch.manual_seed(index)  # of dropout
        ours = step(x, y)
        torch.manual_seed(index)
        theirs = plain_step(other, optimizer, x, y)
        assert torch.equal(ours.module_losses, theirs.module_losses)
    assert_same_state(net, other)


@pytest.mark.parametrize("name", ["augLocal", "context"])
def test_a_captured_step_is_the_eager_one(name, monkeypatch):
    from operator_tape import OperatorTape, watch_for_reads

    monkeypatch.setattr("auglocal_ext.step.graph.CapturedGraph", OperatorTape)
    monkeypatch.setattr("auglocal_ext.step.graph.can_capture", lambda device: True)
    monkeypatch.setattr("auglocal_ext.step.graph.watch_for_waits", watch_for_reads)
    net, other = build(name), build(name)
    step = LocalStep(net, lambda p: torch.optim.SGD(p, lr=0.125, fused=True))
    eager = LocalStep(other, lambda p: torch.optim.SGD(p, lr=0.125, fused=True), graph=False)
    for x, y in batches(5):
        assert torch.equal(step(x, y).module_losses, eager(x, y).module_losses)
    assert step.graphed, step.eager_reason
    assert_same_state(net, other)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("augLocal", "all"),
        ("context", "none"),
        ("tokens", "all"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("augLocal", "none"), ("context", "all"), ("tokens", "none"))
        ),
    ],
)
def test_the_predicted_peak_is_the_meters_on_real_tensors(name, recompute):
    net = build(name, recompute=recompute)
    plan = plan_memory(net, 16, sgd)
    step = LocalStep(net, sgd)
    (x, y), *_ = batches(1, 16)
    step(x, y)
    with MemoryMeter() as meter:
        meter.track(net, step.optimizer, x, y)
        step(x, y)
    assert plan.predicted_bytes == meter.peak_bytes


def test_the_predicted_peak_is_a_hand_made_sequentials():
    model = Residual()
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    layers = nn.Sequential(model.stem, model.norm, nn.ReLU(), *model.blocks, *tail)
    hand = LocalSequential(copy.deepcopy(layers), Greedy(), 5, SHAPE, 3, fused=False)
    net = localize(model, Greedy(), 5, 3, input_shape=SHAPE)
    ours, theirs = (plan_memory(each, 16, sgd).predicted_bytes for each in (net, hand))
    assert abs(ours - theirs) <= 0.05 * theirs


def resnet_layers(model):
    stages = [block for name in ("layer1", "layer2", "layer3", "layer4") for block in getattr(model, name)]
    return nn.Sequential(
        model.conv1, model.bn1, model.relu, model.maxpool, *stages, model.avgpool, nn.Flatten(), model.fc
    )


def vgg_layers(model):
    return nn.Sequential(*model.features, model.avgpool, nn.Flatten(), *model.classifier)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers_of", "cuts"),
    [
        ("resnet50", resnet_layers, ["layer1", "layer2", "layer3"]),
        ("vgg19", vgg_layers, ["features.9", "features.18", "features.27"]),  # behind pools
    ],
)
def test_the_predicted_peak_of_torchvisions_models_is_a_hand_made_sequentials(name, layers_of, cuts):
    torchvision = pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision")
    with FakeTensorMode():
        hand = layers_of(getattr(torchvision.models, name)())
        model = getattr(torchvision.models, name)()
        shape = (3, 224, 224)
        net = localize(model, Greedy(), 1000, cuts, input_shape=shape)
        hand = LocalSequential(hand, Greedy(), 1000, shape, net.network.ends[:-1], fused=False)
    for recompute in ("none", "all"):
        ours, theirs = (plan_memory(each, 32, sgd, recompute=recompute).predicted_bytes for each in (net, hand))
        assert abs(ours - theirs) <= 0.05 * theirs


@pytest.mark.parametrize("fused", [True, False])
def test_balanced_modules(fused):
    from auglocal_ext import Balanced

    net = localize(Residual(), Greedy(), 5, Balanced(3), input_shape=SHAPE, fused=fused)
    assert net.num_modules == 3 and type(net.primary) is Residual
    assert all(type(part) in (nn.Sequential, Block) for part in (net.primary.blocks, *net.primary.blocks))


def _over_stages(rank, wanted):
    from torch.distributed.device_mesh import init_device_mesh

    for name, (state, losses, output) in wanted.items():
        net = build(name)
        step = LocalStep(net, sgd, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("stage",)))
        stage = step._processes.stage
        ours = torch.stack([step(*batch).module_losses for batch in batches(3)])
        assert torch.equal(ours, losses[:, stage.first : stage.last + 1]), name
        held = {key: value for key, value in net.state_dict().items() if not value.is_meta}
        assert 0 < len(held) < len(state)
        for key, value in held.items():
            assert torch.equal(value, state[key]), key
        net.eval()
        found = step.predict(next(batches(1))[0])
        assert found is None or torch.equal(found, output)
        step.close()


@pytest.mark.slow
def test_two_stages_equal_one_process_to_the_bit():
    from ranks import run

    wanted = {}
    for name in ("augLocal", "context"):
        net = build(name)
        step = LocalStep(net, sgd)
        losses = torch.stack([step(*batch).module_losses for batch in batches(3)])
        net.eval()
        with torch.no_grad():
            wanted[name] = (net.state_dict(), losses, net(next(batches(1))[0]))
    run(2, _over_stages, wanted)


def test_analyses_read_the_layers_of_the_model():
    from auglocal_ext.analysis.features import layer_features, layer_names, layer_outputs

    net = build("dgl").eval()
    x, _ = next(batches(1))
    with torch.no_grad():
        outputs = list(layer_outputs(net, x))
    assert layer_names(net) == ("norm", "blocks.0", "blocks.1", "blocks.2", "blocks", "output")
    assert [f.shape for f in layer_features(net, SHAPE)] == [tuple(out.shape[1:]) for out in outputs]
    assert torch.equal(outputs[-1], net.primary(x))
    assert torch.equal(outputs[1], net.primary.blocks[0](torch.relu(net.primary.norm(net.primary.stem(x)))))


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs/wrap-your-own.md").read_text()
    pytest.importorskip("torchvision")
    scope = {}
    exec(re.search(r"```python\n(.*?)```", page, flags=re.S)[1], scope)
    net, model = scope["net"], scope["model"]
    net(torch.randn(2, 3, 64, 64), torch.tensor([1, 2])).loss.backward()
    assert net.num_modules == 4 and net.primary is model


def test_built_on_meta_and_given_values_later():
    from auglocal_ext.nn import deferred

    with deferred(0):
        net = localize(Residual(), DGL(), 5, input_shape=SHAPE)
    assert all(p.is_meta for p in net.parameters())
    net.materialise("cpu")
    out = plain_step(net, sgd(net.parameters()), *next(batches(1)))
    assert out.loss.isfinite() and not any(p.is_meta for p in net.parameters())


def test_accumulation_clipping_and_autocast():
    net, other = build("dgl"), build("dgl")
    step = LocalStep(net, sgd, accumulate=2, clip_norm=0.5, autocast=torch.bfloat16)
    twice = LocalStep(other, sgd, accumulate=2, clip_norm=0.5, autocast=torch.bfloat16, recompute="all")
    for x, y in batches(4):
        step(x, y)
        twice(x, y)
    assert_same_state(net, other)
