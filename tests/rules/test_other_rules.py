"""Greedy, DGL, PredSim, InfoPro, MAN and AugLocal's ablations: published counts, formulas, combinations, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from seen import network
from torch import nn

from auglocal_ext import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, LocalSequential, LocalStep, PredSim, models
from auglocal_ext.auxiliary import LossContext
from auglocal_ext.cost import count_macs
from auglocal_ext.layers import Features
from auglocal_ext.rules import INFOPRO_WEIGHTS, ConvHead, DGLHead, FCNHead
from auglocal_ext.rules.man import MomentumNetwork
from auglocal_ext.tasks import Classification, SupervisedContrast


def wrap(name, rule, modules=None):
    with torch.device("meta"):
        return LocalSequential(models.build(name), rule, 10, (3, 32, 32), modules=modules)


def small(rule, modules=None, **options):
    torch.manual_seed(3)
    return LocalSequential(models.resnet_cifar(8, width=4), rule, 10, (3, 16, 16), modules=modules, **options)


def batch(n=6):
    return torch.rand(n, 3, 16, 16), torch.randint(0, 10, (n,))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_greedy_heads():
    net = wrap("resnet32", Greedy(), 16)
    widths = [16] * 6 + [32] * 5 + [64] * 4
    assert [count(a) for a in net.auxiliary] == [10 * w + 10 for w in widths]
    x, y = batch()
    net = small(Greedy())
    module = net.local_modules[1]
    h = torch.randn(6, 4, 16, 16)
    linear = module.auxiliary.head.linear
    expected = F.cross_entropy(F.linear(h.mean((2, 3)), linear.weight, linear.bias), y)
    torch.testing.assert_close(module.local_loss(h, y), expected)


@pytest.mark.parametrize(("width", "millions"), [(128, 0.85), (256, 3.36), (512, 13.4)])
def test_dgl_heads_have_the_published_size(width, millions):
    head = DGLHead("mlp-sr").build_auxiliary(network(Features((width, 32, 32))), 0)
    assert count(head) == 3 * (width**2 + 2 * width) + 3 * (16 * width**2 + 12 * width) + 40 * width + 10
    assert count(head) / 1e6 == pytest.approx(millions, rel=0.01)
    imagenet = DGLHead("mlp-sr").build_auxiliary(network(Features((512, 28, 28)), 1000), 0)
    assert count(imagenet) / 1e6 == pytest.approx(15.4, rel=0.01)


def test_dgl_heads_position_by_position():
    net = small(DGL("mlp-sr"))
    assert [type(m) for m in net.auxiliary[0].head.hidden][:1] == [nn.AdaptiveAvgPool2d]
    head = net.auxiliary[0].head.eval()
    h = torch.randn(2, 4, 16, 16)
    z = h.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))  # a quarter of 16x16
    for block in list(head.hidden)[1:4]:
        z = block.bn(F.conv2d(z, block.conv.weight)).relu()
    z = z.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(1)
    for linear, norm, _ in zip(*[iter(list(head.hidden)[6:])] * 3, strict=True):
        z = norm(linear(z)).relu()
    torch.testing.assert_close(head(h), F.linear(z, head.linear.weight, head.linear.bias), rtol=1e-4, atol=1e-5)


def test_predsim_loss():
    net = small(PredSim(beta=0.75, limit=64))
    module = net.local_modules[1]
    x, y = batch()
    h = torch.randn(6, 4, 16, 16)
    prediction, similarity = module.auxiliary.network, module.auxiliary.terms[0]
    assert prediction.head.linear.in_features == 64
    assert not prediction.head.linear.weight.any() and not prediction.head.linear.bias.any()
    nn.init.normal_(prediction.head.linear.weight)
    pooled = h.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5)).flatten(1)
    logits = F.linear(pooled, prediction.head.linear.weight, prediction.head.linear.bias)
    ours = torch.corrcoef(similarity.encoder(h).flatten(2).std(2))
    wanted = torch.corrcoef(F.one_hot(y, 10).float())
    expected = 0.25 * F.cross_entropy(logits, y) + 0.75 * F.mse_loss(ours, wanted)
    torch.testing.assert_close(module.local_loss(h, y), expected, rtol=1e-4, atol=1e-5)
    last = net.local_modules[-1]
    logits = torch.randn(6, 10)
    torch.testing.assert_close(last.local_loss(logits, y), 0.25 * F.cross_entropy(logits, y))


def test_predsims_last_loss_may_keep_its_weight():
    x, y = batch()
    for scaled, weight in ((True, 0.25), (False, 1.0)):
        out = small(PredSim(beta=0.75, limit=64, scale_classifier=scaled))(x, y)
        assert float(out.module_losses[-1]) == pytest.approx(weight * float(F.cross_entropy(out.logits, y)), rel=1e-5)


# Decoders cost the multiply-accumulates of ContSup's image encoders, of which they are mirror images.
@pytest.mark.parametrize(
    ("name", "k", "millions"), [("resnet32", 2, 3.87), ("resnet32", 16, 61.60), ("resnet110", 8, 30.63)]
)
def test_infopro_decoders_have_the_published_cost(name, k, millions):
    net = LocalSequential(models.build(name), InfoPro((1, 1), (1, 1)), 10, (3, 32, 32), modules=k)
    macs = 0
    for auxiliary in net.auxiliary:
        (decoder,) = (term.decoder for term in auxiliary.terms)
        macs += count_macs(decoder, (decoder[0].in_channels, 32, 32))
    assert macs / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_infopro_weights_are_linear_over_the_modules(k):
    first, last = INFOPRO_WEIGHTS["cifar10", "resnet32"][k]
    rule = InfoPro(first, last)
    net = wrap("resnet32", rule, k)
    weights = [rule.weights(net.network, m) for m in range(k - 1)]
    assert weights[0] == first
    for m, found in enumerate(weights):
        for a, b, value in zip(first, last, found, strict=True):
            assert value == pytest.approx(a if k == 2 else a + (b - a) * m / (k - 2))
    if k > 2:
        assert weights[-1] == pytest.approx(last)


@pytest.mark.parametrize("loss", ["softmax", "contrast"])
def test_infopro_loss(loss):
    net = small(InfoPro((2, 0.5), (1, 1), loss=loss, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    x, y = batch()
    module = net.local_modules[0]
    h = torch.randn(6, 4, 16, 16)
    auxiliary = module.auxiliary
    decoder, head = auxiliary.terms[0], auxiliary.network
    found = module.local_loss(h, y, x)
    context = LossContext(y, x)
    reconstruction = decoder.loss(h, context)
    classification = head.loss(h, context).loss
    torch.testing.assert_close(found, 2 * reconstruction + 0.5 * classification, rtol=1e-4, atol=1e-5)
    assert decoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    correct = net(x, y).module_correct
    assert (correct[:-1] == -1).all() == (loss == "contrast") and correct[-1] >= 0


def test_man_follows_the_next_block():
    net = small(MAN(momentum=0.75), fused=False)
    auxiliary = net.auxiliary[0]
    following = net.local_modules[1].layers[0]
    assert isinstance(auxiliary, MomentumNetwork)
    for copied in (auxiliary.trained, auxiliary.average):
        for (name, ours), (_, theirs) in zip(copied[0].named_parameters(), following.named_parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert not any(p is q for p in auxiliary.parameters() for q in following.parameters())
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.5))
    x, y = batch()
    h = torch.randn(6, 4, 16, 16)
    twin = copy.deepcopy(auxiliary)
    z = twin.trained(h) + twin.average(h)
    torch.testing.assert_close(auxiliary(h), twin.head(z))
    torch.testing.assert_close(auxiliary.loss(h, LossContext(y)).loss, F.cross_entropy(twin.head(z), y))
    average = [p.clone() for p in auxiliary.average.parameters()]
    for _ in range(3):
        block = [p.detach().clone() for p in following.parameters()]
        step(x, y)
        assert not torch.equal(block[0], next(following.parameters()))
        average = [0.75 * a + 0.25 * b for a, b in zip(average, block, strict=True)]  # the block before its own step
        for ours, theirs in zip(auxiliary.average.parameters(), average, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert all(p.grad is None for p in auxiliary.average.parameters())


def test_an_average_of_momentum_1_stays():
    auxiliary = small(MAN(momentum=1.0), modules=2).auxiliary[0]
    kept = [p.clone() for p in auxiliary.average.parameters()]
    for parameter in auxiliary._followed.layers[0].parameters():
        parameter.data.add_(1)
    auxiliary.after_step()
    assert all(map(torch.equal, auxiliary.average.parameters(), kept))


def test_man_before_the_classifier():
    """The last module's block is copied without the classifier that belongs to its layer."""
    net = small(MAN())
    last = net.auxiliary[-1]
    assert last(torch.randn(2, 8, 8, 8)).shape == (2, 10)
    assert not any(isinstance(m, nn.Linear) for m in last.trained.modules())
    copied = copy.deepcopy(net)
    assert copied.auxiliary[0]._followed.layers[0][0] is copied.local_modules[1].layers[0]


def test_sampling_strategies():
    plans = {}
    for sampling in ("uniform", "sequential", "repeated", "conv1x1", "conv3x3"):
        for downsampling in (True, False):
            rule = AugLocal(3, pyramid=0.0, sampling=sampling, downsampling=downsampling)
            net = wrap("resnet32", rule, modules=(2,))
            blocks = net.auxiliary[0].blocks  # after the second residual block
            convs = [[m for m in block.modules() if isinstance(m, nn.Conv2d)][0] for block in blocks]
            plans[sampling, downsampling] = [(c.out_channels, c.stride[0], c.kernel_size[0]) for c in convs]
    uniform = [(32, 2, 3), (64, 2, 3)]  # layers round(2 + 13/2) = 8 and 15
    assert plans["uniform", True] == plans["repeated", True] == plans["conv3x3", True] == uniform
    assert plans["conv1x1", True] == [(32, 2, 1), (64, 2, 1)]
    own = [(16, 1, 3), (16, 1, 3)]
    assert plans["sequential", True] == own  # layers 3 and 4
    for sampling in ("uniform", "sequential", "repeated", "conv3x3"):
        assert plans[sampling, False] == own
    assert plans["conv1x1", False] == [(16, 1, 1), (16, 1, 1)]
    defaults = {s: AugLocal(3, sampling=s)._downsamples for s in ("uniform", "sequential", "repeated", "conv1x1")}
    assert defaults == {"uniform": True, "sequential": True, "repeated": False, "conv1x1": False}


@pytest.mark.parametrize("sampling", ["repeated", "conv1x1", "sequential"])
@pytest.mark.parametrize("downsampling", [pytest.param(None, marks=pytest.mark.slow), True, False])
@pytest.mark.parametrize("name", ["resnet50", "vgg13"])
def test_sampling_strategies_on_other_networks(name, sampling, downsampling):
    with torch.device("meta"):
        rule = AugLocal(3, joint_tail=False, sampling=sampling, downsampling=downsampling)
        net = LocalSequential(models.build(name), rule, 1000, (3, 64, 64))
    assert net.num_modules > 3


COMBINATIONS = {
    "contsup + auglocal": ContSup("R1E", head=AugLocal(depth=2)),
    "contsup + infopro": ContSup("R1E", head=InfoPro((5, 0.05), (0.2, 0.5))),
    "infopro + auglocal": InfoPro((5, 0.05), (0.2, 0.5), loss="contrast", head=AugLocal(depth=2)),
    "man + dgl": MAN(head=DGL("mlp")),
    "man + infopro": MAN(head=InfoPro((5, 0.05), (0.2, 0.5))),
    "predsim + auglocal": PredSim(head=AugLocal(depth=2)),
}


@pytest.mark.parametrize("rule", [*COMBINATIONS.values(), Greedy(), DGL(), PredSim(), MAN()], ids=repr)
@pytest.mark.parametrize("recompute", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_every_rule_trains(rule, recompute):
    net = small(rule, recompute=recompute)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9))
    x, y = batch(8)
    losses = [float(step(x, y).loss) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert net(x).shape == (8, 10)
    assert net.export()(x).shape == (8, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DGL("mlp_sr"), "unknown auxiliary head 'mlp_sr'"),
        (lambda: PredSim(beta=1.5), "within 0 .. 1"),
        (lambda: PredSim(limit=0), "at least 1"),
        (lambda: PredSim(head="3c"), "unknown auxiliary head"),
        (lambda: InfoPro((1, -1), (0, 0)), "neither negative"),
        (lambda: InfoPro((math.nan, 1), (1, 1)), "finite and neither negative"),
        (lambda: InfoPro((1, 1), (1, math.inf)), "finite and neither negative"),
        (lambda: InfoPro((1, 1), (0, 0), std=(1.0, math.nan, 1.0)), "mean and std must be finite"),
        (lambda: InfoPro((1, 1), (0, 0), stage_steps=1.5), "whole number of at least 1; got 1.5"),
        (lambda: InfoPro((1, 1), (0, 0), feature_dim=1.5), "whole number of at least 1; got 1.5"),
        (lambda: ConvHead("1c2f", feature_dim=math.nan), "whole number of at least 1; got nan"),
        (lambda: AugLocal(2, widen=math.inf), "a number above 0; got inf"),
        (lambda: small(AugLocal(2, widen=1e30)), r"widen=1e\+30 makes 1.6e\+31 of 16 channels; take less"),
        (lambda: PredSim(limit=math.nan), "of at least 1; got nan"),
        (lambda: SupervisedContrast(8, Classification(3), temperature=0.0), "temperature must be positive and finite"),
        (lambda: InfoPro((1, 1), (0, 0), loss="ce"), "loss is one of softmax, contrast, contrast_batch"),
        (lambda: InfoPro((1, 1), (0, 0), mean=(0.5,)), "one value per channel"),
        (lambda: InfoPro((1, 1), (0, 0), head="x"), "unknown auxiliary head"),
        (lambda: MAN(momentum=2), "within 0 .. 1"),
        (lambda: MAN(head="x"), "unknown auxiliary head"),
        (lambda: AugLocal(sampling="random"), "sampling is one of"),
        (lambda: small(InfoPro((1, 1), (0, 0), mean=(0.5,), std=(0.5,))), "one value per channel"),
        (lambda: InfoPro((1, 1), (0, 0), head="1c1f", feature_dim=64), "feature_dim=64 is read by nothing here"),
        (lambda: PredSim(limit=64, head="1c2f"), "limit=64 is read by PredSim's own prediction layer alone"),
        (lambda: ContSup("R0", head="linear", widen=2), "widen=2 is read by nothing here"),
        (lambda: ContSup("E", head=AugLocal(2), feature_dim=64), "feature_dim=64 is read by nothing here"),
        (lambda: ContSup("R1", head=ContSup("E")), "cannot be a head: it supplies modules with context"),
        (lambda: MAN(head=MAN(head=ContSup("R1"))), "cannot be a head"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda value: MAN(momentum=value),
        lambda value: PredSim(beta=value),
        lambda value: AugLocal(6, pyramid=value),
        lambda value: FCNHead(dropout=value),
    ],
    ids=["momentum", "beta", "pyramid", "dropout"],
)
def test_shares_are_within_0_and_1(make):
    assert make(0) != make(1.0)
    for value in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"within 0 .. 1; got {value}"):
            make(value)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: AugLocal(depth=value),
        lambda value: PredSim(limit=value),
        lambda value: ContSup(feature_dim=value),
        lambda value: InfoPro((0, 0), (1, 1), feature_dim=value),
        lambda value: InfoPro((0, 0), (1, 1), stage_steps=value),
    ],
    ids=["depth", "limit", "contsup feature_dim", "infopro feature_dim", "stage_steps"],
)
def test_counts_are_at_least_1(make):
    assert make(1) != make(2)
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1; got .*{value}"):
            make(value)


@pytest.mark.parametrize("rule", [DGL(), InfoPro((1, 1), (1, 1))], ids=repr)
def test_rules_of_feature_maps_refuse_vectors(rule):
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="Greedy"):
        LocalSequential(layers, rule, 3, (8,))


@pytest.mark.parametrize("rule", [Greedy(), PredSim()], ids=repr)
def test_rules_on_vectors(rule):
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    net = LocalSequential(layers, rule, 3, (8,))
    out = net(torch.randn(6, 8), torch.randint(0, 3, (6,)))
    out.loss.backward()
    assert out.module_losses.shape == (net.num_modules,)
