"""Features that are no channels-first images, and tails that are no classifier, under every rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_nothing_silent import WEIGHTS, batch, network, sgd
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import (
    DGL,
    MAN,
    AugLocal,
    ContSup,
    Greedy,
    InfoPro,
    LocalSequential,
    LocalStep,
    PredSim,
    models,
)


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


@pytest.mark.parametrize(
    "tail",
    [
        lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)],
        lambda: [nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(16 * 64, 10)],
        lambda: [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(16, 10)],
        lambda: [nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(16, 10))],
        lambda: [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))],
    ],
)
def test_man_copies_no_tail_of_pooling_and_flatten(tail):
    layers = nn.Sequential(*list(convolutions())[:-3], *tail())
    net = LocalSequential(layers, MAN(), 10, (3, 16, 16))
    last = net.auxiliary[-1]
    assert last.trained(torch.randn(2, 8, 16, 16)).shape == (2, 16, 16, 16)
    assert [type(m).__name__ for m in last.trained.modules() if not list(m.children())] == ["Conv2d", "ReLU"]
    x, y = batch()
    step = LocalStep(net, sgd)
    before = [p.clone() for p in last.average.parameters()]
    assert step(x, y).loss.isfinite() and step(x, y).loss.isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, last.average.parameters(), strict=True))


def test_man_copies_no_tail_inside_a_child():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 10),
    )
    net = LocalSequential(layers, MAN(), 10, (3, 16, 16))
    assert net.auxiliary[0].trained(torch.randn(2, 8, 14, 14)).shape == (2, 8, 12, 12)
    assert net.auxiliary[0]._followed.layers[0][0][0] is layers[1][0]


def test_man_in_the_middle_of_a_network_keeps_its_pooling():
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 10)),
    )
    net = LocalSequential(layers, MAN(head="linear"), 10, (3, 16, 16))
    shapes = [a.trained(torch.randn(2, *net.network.layers[k].shape)).shape[1:] for k, a in enumerate(net.auxiliary)]
    assert shapes == [(8, 8, 8), (8, 6, 6), (12,)]  # the flatten before the linear layer is left out


def test_man_of_fake_tensors():
    with FakeTensorMode():
        net = network(MAN())
        out = net(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
        out.loss.backward()
    assert out.output.shape == (4, 10)
    with torch.device("meta"):
        assert network(MAN()).num_modules == 7


def sound():
    return nn.Sequential(
        *(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def volumes():
    return nn.Sequential(
        *(nn.Conv3d(2, 6, 2), nn.ReLU(), nn.Conv3d(6, 6, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 10)),
    )


class Mixer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.norm(x)) + x.mean(1, keepdim=True)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def tokens():
    return nn.Sequential(nn.Linear(6, 8), Mixer(8), Mixer(8), Mean(), nn.Linear(8, 10))


def last_axis_maps():
    return nn.Sequential(
        nn.Linear(6, 8), Mixer(8), Mixer(8), nn.LayerNorm(8), nn.Flatten(1, 2), Mean(), nn.Linear(8, 10)
    )


OTHERS = {
    "sound": (sound, (2, 20)),
    "volumes": (volumes, (2, 6, 5, 4)),
    "tokens": (tokens, (5, 6)),
    "channels last": (last_axis_maps, (4, 5, 6)),
}
RULES_OF_ANYTHING = [
    Greedy(),
    AugLocal(depth=1, joint_tail=False),
    ContSup("R0", head="0c1f"),
    ContSup("R0", head="0c2f"),
    PredSim(limit=16),
    PredSim(head="linear"),
    MAN(head="linear"),
    Greedy("vgg"),
]


@pytest.mark.parametrize("rule", RULES_OF_ANYTHING, ids=repr)
@pytest.mark.parametrize("name", OTHERS)
def test_features_that_are_no_channels_first_images(name, rule):
    """Every module's own output is read along its channels."""
    make, shape = OTHERS[name]
    torch.manual_seed(0)
    layers = make()
    net = LocalSequential(layers, rule, 10, shape).double()
    x, y = torch.randn(6, *shape).double(), torch.randint(0, 10, (6,))
    out = net(x, y)
    out.loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    linear = next((m for m in net.auxiliary[0].modules() if isinstance(m, nn.Linear) and m.out_features == 10), None)
    if rule in RULES_OF_ANYTHING[:3]:
        module = net.local_modules[0]
        h = module(x)
        channels = h.flatten(2).mean(2) if name in ("sound", "volumes") else h.flatten(1, -2).mean(1)
        torch.testing.assert_close(module.local_loss(h, y), F.cross_entropy(linear(channels), y))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Greedy("1c2f"), "head '1c2f' needs feature maps with height and width.*'0c1f' or '0c2f'"),
        (DGL(), "DGL's heads pool feature maps with height and width.*or Greedy"),
        (InfoPro(*WEIGHTS), "InfoPro reconstructs images from feature maps with height and width.*Greedy"),
        (ContSup("R1", head="0c1f"), "encoded by 2-D convolutions and needs images and feature maps, not"),
        (ContSup("E", head="0c1f"), "encoded by 2-D convolutions and needs images and feature maps, not"),
        (
            AugLocal(2, joint_tail=False, sampling="conv3x3"),
            "sampling='conv3x3' makes convolutions, but .* receives",
        ),
    ],
)
@pytest.mark.parametrize("name", ["sound", "volumes", "tokens"])
def test_rules_of_images_refuse_other_features(name, rule, message):
    make, shape = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        LocalSequential(make(), rule, 10, shape)


def halving():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "context", "fused"),
    [
        (halving, "R1E", True),
        *((lambda: models.resnet_cifar(14, width=4), *case) for case in (("R1E", False), ("R1E", True), ("R2", False))),
    ],
)
def test_a_compiled_network_with_context(make, context, fused):
    torch.manual_seed(3)
    net = LocalSequential(make(), ContSup(context), 10, (3, 16, 16), fused=fused).eval()
    x, _ = batch()
    with torch.no_grad():
        expected = net(x)
        torch._dynamo.reset()
        compiled = torch.compile(net)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(x[:3]), expected[:3], rtol=1e-4, atol=1e-4)
