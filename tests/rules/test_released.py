"""Options that choose the released code's way: formulas in float64, published counts, initial values, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from seen import network
from torch import nn

from auglocal_ext import (
    DGL,
    MAN,
    AugLocal,
    Balanced,
    Classification,
    ContSup,
    Greedy,
    InfoPro,
    LocalSequential,
    PredSim,
    localize,
    models,
)
from auglocal_ext.auxiliary import LossContext
from auglocal_ext.layers import Features
from auglocal_ext.rules import ConvHead, DGLHead, PredictionHead
from auglocal_ext.tasks import SupervisedContrast

WEIGHTS = ((5.0, 0.5), (0.5, 1.0))


def small(rule, modules=None, size=16, **options):
    torch.manual_seed(3)
    return LocalSequential(
        models.resnet_cifar(8, width=4), rule, 10, (3, size, size), modules=modules, **options
    ).double()


def counted(rule, name="resnet32", modules=None):
    with torch.device("meta"):
        return LocalSequential(models.build(name), rule, 10, (3, 32, 32), modules=modules)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def kinds(module, kind):
    return [part for part in module.modules() if isinstance(part, kind)]


# The contrastive loss


def released_contrast(z, y, kept):
    z, y = F.normalize(z[kept], dim=1), y[kept]
    similar = z @ z.t() / 0.07
    others = ~torch.eye(len(y), dtype=torch.bool)
    log_p = similar - (similar.exp() * others).sum(1, keepdim=True).log()
    positive = (y[:, None] == y) & others
    return -((positive * log_p).sum(1) / positive.sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize("y", [[0, 0, 1, 2, 3, 4, 4, 4], [0, 1, 2, 3, 4, 5, 6, 7], [9, 9, 1, 9, 1, 2, 3, 4], [9] * 8])
def test_contrast_over_the_batch(y):
    task = SupervisedContrast(6, Classification(10, ignore_index=9), mean_over="batch")
    y = torch.tensor(y)
    ours, theirs = (torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double() for _ in range(2))
    ours.requires_grad_()
    theirs.requires_grad_()
    loss = task.loss(ours, y)
    loss.backward()
    if (y == 9).all():
        assert loss == 0 and not ours.grad.any()
        return
    expected = released_contrast(theirs, y, y != 9)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_infopro_divides_by_the_batch_on_request():
    h, y = torch.rand(8, 16, 8, 8, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    losses = []
    for loss in ("contrast", "contrast_batch"):
        torch.manual_seed(0)
        made = InfoPro((0, 1), (0, 1), loss).build_auxiliary(network(Features((16, 8, 8))), 0).double()
        losses.append(made.loss(h, LossContext(y)).loss)
    torch.testing.assert_close(losses[1], losses[0] * 2 / 8)  # of eight samples two have another one of their class
    with pytest.raises(ValueError, match="mean_over is 'anchors' or 'batch'"):
        SupervisedContrast(6, Classification(10), mean_over="pairs")


# DGL


def test_auglocals_dgl_head():
    net = counted(DGL("mlp-sr-auglocal"))
    assert parameters(net) == 1_305_200
    head = DGL("mlp-sr-auglocal").build_auxiliary(network(Features((4, 16, 16))), 0).head.double()
    assert [linear.bias is None for linear in kinds(head.hidden, nn.Linear)] == [True, True]
    head.eval()
    z = h = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    z = z.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    for block in kinds(head.hidden, nn.Sequential)[1:]:
        z = block.bn(F.conv2d(z, block.conv.weight)).relu()
    z = z.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(1)
    for linear, norm in zip(kinds(head.hidden, nn.Linear), kinds(head.hidden, nn.BatchNorm1d), strict=True):
        z = norm(z @ linear.weight.t()).relu()
    torch.testing.assert_close(head(h), z @ head.linear.weight.t() + head.linear.bias)
    few = network(Features((8, 4, 4)))  # of 4x4 positions a quarter is one
    found = [DGL(kind).build_auxiliary(few, 0).head.linear.in_features for kind in ("mlp-sr-auglocal", "mlp-sr")]
    assert found == [8, 32]


def test_dgls_convolutions_as_torch_makes_them():
    def std(rule):
        torch.manual_seed(0)
        made = rule.build_auxiliary(network(Features((64, 8, 8))), 0)
        return kinds(made, nn.Conv2d)[0].weight.std().item()

    assert std(DGL()) == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert std(DGL(init="released")) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert std(DGL("mlp-sr-auglocal", init="released")) == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    with pytest.raises(ValueError, match="init='released' is for DGL's heads by name"):
        DGL("1c2f", init="released")
    with pytest.raises(ValueError, match="init is one of own, released"):
        DGLHead("cnn", init="auglocal")


# MAN


def test_man_initialises_its_copies_again():
    net = small(MAN(init="released"), fused=False)
    copies = net.auxiliary[0].trained, net.auxiliary[0].average
    block = net.local_modules[1].layers[0]
    for layer in ("conv1", "conv2"):
        weights = [getattr(each[0], layer).weight for each in copies] + [getattr(block, layer).weight]
        assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))
    assert all(p.requires_grad for p in copies[0].parameters())
    assert not any(p.requires_grad for p in copies[1].parameters())
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
    with pytest.raises(ValueError, match="a next block here has none: leave init out"):
        LocalSequential(layers, MAN(head="linear", init="released"), 10, (6,))


def test_weights_that_change_by_stage():
    inner = InfoPro((5, 0.5), (0, 0), head="2c2f", stage_steps=14)
    net = counted(MAN(head=inner), modules=[*range(1, 15)])
    assert net.num_modules == 15
    found = [[part.head.weight, *part.head.weights] for part in net.auxiliary]
    stages = [1] * 4 + [2] * 5 + [3] * 5  # of the next block, of ResNet-32's second to its last
    for (task, reconstruction), stage in zip(found, stages, strict=True):
        assert reconstruction == pytest.approx(5 * (1 - stage / 14)) and task == pytest.approx(0.5 * (1 - stage / 14))
    for weights, negative in (((5, 0.5), "-2.5, -0.25"), ((0.5, 5), "-0.25, -2.5"), ((0.5, 0), "-0.25, 0")):
        with pytest.raises(ValueError, match=rf"stage_steps=2 .* local module 1, in stage 3, \({negative}\)"):
            counted(MAN(head=InfoPro(weights, (0, 0), stage_steps=2)), modules=[2, 12])
    with pytest.raises(ValueError, match="at least 1; got 0"):
        InfoPro(*WEIGHTS, stage_steps=0)


# PredSim


@pytest.mark.parametrize(("size", "limit"), [(24, 512), (20, 512), (9, 64), (16, 512), (5, 64)])
def test_predsims_pooling_with_zeros(size, limit):
    channels = 64
    layers = nn.Sequential(
        nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    rules = [Greedy(PredictionHead(limit, zero_padding=zeros)) for zeros in (True, False)]
    padded, adaptive = (LocalSequential(layers, rule, 10, (3, size, size)).auxiliary[0].head for rule in rules)
    window, pooled, axis = [1, 1], [size, size], 0
    while channels * math.prod(pooled) > limit and max(pooled) > 1:  # the height first, then the width, and again
        window[axis] *= 2
        pooled[axis] = -(-size // window[axis])
        axis = 1 - axis
    h = torch.rand(2, channels, size, size, dtype=torch.float64, requires_grad=True)
    sides = [(k - size % k if size % k else 0, k) for k in window]
    (top, height), (left, width) = [(k // 2 if short else 0, k) for short, k in sides]
    grid = F.pad(h, (left, 2 * width, top, 2 * height))[..., : pooled[0] * height, : pooled[1] * width]
    expected = grid.unflatten(3, (pooled[1], width)).unflatten(2, (pooled[0], height)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(padded.features(h), expected)
    assert padded.linear.in_features == adaptive.linear.in_features
    same = all(size % k == 0 for k in window)
    assert torch.allclose(padded.features(h), adaptive.features(h)) == same == (size == 16)


def test_predsims_initial_values():
    def parts(rule):
        torch.manual_seed(0)
        made = rule.build_auxiliary(network(Features((32, 8, 8))), 0)
        return made.network.head.linear, made.terms[0].encoder.weight.std().item()

    default, normal = 1 / math.sqrt(3 * 9 * 32), math.sqrt(2 / (9 * 32))
    for init, weights, biases, std in (
        ("own", False, False, default),
        ("released", False, True, default),
        ("auglocal", True, True, normal),
    ):
        linear, found = parts(PredSim(init=init))
        assert (bool(linear.weight.any()), bool(linear.bias.any())) == (weights, biases), init
        assert found == pytest.approx(std, rel=0.05)
    for options in ({"zero_padding": True}, {"init": "released"}):
        with pytest.raises(ValueError, match="read by PredSim's own prediction layer alone"):
            PredSim(head="linear", **options)


def similarities(z):
    z = z - z.mean(1, keepdim=True)
    z = z / (z.norm(dim=1, keepdim=True) + 1e-8)
    return z @ z.t()


def test_predsim_with_the_classifier_apart():
    net = small(PredSim(beta=0.75, limit=64, classifier_apart=True), fused=False)
    assert net.num_modules == 5 and len(net.auxiliary) == 4  # the stem, three blocks, the classifier
    x, y = torch.rand(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (6,))
    for part in net.auxiliary:
        nn.init.normal_(part.network.head.linear.weight, 0, 0.1)
    *hidden, classifier = net.primary
    out = net(x, y)
    out.loss.backward()
    with torch.no_grad():
        h = nn.Sequential(*hidden[:-1])(x)
    h = hidden[-1](h)
    last = net.auxiliary[-1]
    linear = last.network.head.linear
    pooled = F.avg_pool2d(h, 2).flatten(1)
    similar = similarities(last.terms[0].encoder(h).flatten(2).std(2))
    wanted = similarities(F.one_hot(y, 10).double())
    expected = 0.25 * F.cross_entropy(F.linear(pooled, linear.weight, linear.bias), y)
    expected = expected + 0.75 * F.mse_loss(similar, wanted)
    torch.testing.assert_close(out.module_losses[-2], expected)
    found = torch.autograd.grad(expected, list(hidden[-1].parameters()))
    for parameter, gradient in zip(hidden[-1].parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
    loss = 0.25 * F.cross_entropy(classifier(h.detach()), y)
    torch.testing.assert_close(out.module_losses[-1], loss)
    found = torch.autograd.grad(loss, list(classifier.parameters()))
    for parameter, gradient in zip(classifier.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_cuts_with_the_classifier_apart():
    rule = PredSim(classifier_apart=True)
    assert small(rule, 2).num_modules == 3 and small(rule, [1]).num_modules == 3 and small(rule, 1).num_modules == 1
    assert small(Greedy(rule), 2).num_modules == 3
    with pytest.raises(ValueError, match="MAN makes auxiliary networks of the layers after a module"):
        small(MAN(head=rule))
    with pytest.raises(ValueError, match="say classifier_apart=True here too"):
        PredSim(head=rule)
    with pytest.raises(ValueError, match="which Balanced would join with layers"):
        small(rule, Balanced(2))
    with pytest.raises(ValueError, match="its classifier is no layer of its own"):
        LocalSequential(nn.Sequential(nn.Linear(4, 10)), rule, 10, (4,))
    head = small(PredSim(head="1c2f", classifier_apart=True)).auxiliary[-1].network.blocks
    assert kinds(head, nn.Conv2d)[0].out_channels == 16  # the last stage's width, not the number of classes


class Flattening(nn.Module):
    """A network whose forward does more than calling its children."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        return self.classifier(self.second(self.first(x).relu()).relu().mean((2, 3)))


def test_the_classifier_of_a_localized_model_apart():
    net = localize(Flattening(), PredSim(limit=64, classifier_apart=True), num_classes=10, input_shape=(3, 8, 8))
    assert net.network.ends == (0, 1, 2) and net.network.layers[1].shape == (16, 8, 8)
    x, y = torch.rand(6, 3, 8, 8), torch.randint(0, 10, (6,))
    expected = 0.01 * F.cross_entropy(net.eval()(x), y)
    torch.testing.assert_close(net.train()(x, y).module_losses[-1], expected.detach())


# Widths


def test_widths_of_infopro():
    net = counted(InfoPro(*WEIGHTS, widen=2))
    plain = counted(InfoPro(*WEIGHTS))
    for part, other, c in zip(net.auxiliary, plain.auxiliary, [16] * 6 + [32] * 5 + [64] * 4, strict=True):
        assert parameters(part.terms) == 9 * c * 24 + 24 + 48 + 9 * 24 * 3 + 3
        assert parameters(other.terms) == 108 * c + 363
        width, out = min(2 * c, 64), 2 * min(2 * c, 64)
        assert parameters(part.network) == 9 * c * out + 2 * out + 256 * out + 256 + 2570, (c, width)
    head = counted(InfoPro(*WEIGHTS, loss="contrast", feature_dim=64)).auxiliary[0].network.head
    assert [linear.out_features for linear in kinds(head, nn.Linear)] == [64, 64]
    head = counted(InfoPro(*WEIGHTS, loss="contrast", feature_dim=64, head=ConvHead())).auxiliary[0].network.head
    assert [linear.out_features for linear in kinds(head, nn.Linear)] == [128, 64]
    head = counted(InfoPro(*WEIGHTS, feature_dim=64)).auxiliary[0].network.head
    assert [linear.out_features for linear in kinds(head, nn.Linear)] == [64, 10]
    with pytest.raises(ValueError, match="feature_dim=64 is read by nothing here: head '1c1f' has no layers"):
        InfoPro(*WEIGHTS, head="1c1f", feature_dim=64)
    assert InfoPro((0, 1), (0, 1), head=DGL()).mean == (0, 0, 0) and InfoPro(*WEIGHTS).std == (1, 1, 1)
    with pytest.raises(ValueError, match="widen=2 is read by nothing here: no decoder"):
        InfoPro((0, 1), (0, 1), head=DGL(), widen=2)


def test_widths_of_auglocal():
    net = counted(AugLocal(2, widen=2))
    for part, c in zip(net.auxiliary, [16] * 6 + [32] * 5 + [64] * 3, strict=True):
        block = part.blocks[0]
        assert block.conv2.out_channels == part.head.linear.in_features == 128
        assert block.conv1.stride == ((1, 1) if c == 64 else (2, 2))  # as for blocks of 64 channels
    assert parameters(counted(AugLocal(3, sampling="conv1x1", widen=0.5)).auxiliary[0].blocks[0]) == 16 * 8 + 16
    with pytest.raises(ValueError, match="widen=2 is the width factor of auxiliary blocks, and depth=1 has none"):
        AugLocal(1, widen=2)
    pairs = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)) for _ in range(4)]
    layers = nn.Sequential(*pairs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    for options in ({"widen": 2.0}, {"widen": 0.5}, {"init": "released"}):
        with pytest.raises(ValueError, match="AugLocal copies the layers of this network, each with its own width"):
            LocalSequential(layers, AugLocal(2, joint_tail=False, **options), 10, (3, 8, 8))


# Initial values


def test_biases_of_decoders_and_encoders():
    for rule, drawn in ((ContSup(head=InfoPro(*WEIGHTS)), False), (ContSup(init="released"), True)):
        rule = rule if not drawn else ContSup(init="released", head=InfoPro(*WEIGHTS, init="released"))
        net = small(rule)
        biases = [part.bias for part in kinds(net, nn.Conv2d) if part.bias is not None]
        assert len(biases) > 10 and all(bool(bias.any()) == drawn for bias in biases)


def test_vggs_auxiliary_convolutions_and_classifier():
    parts = []
    for fan_in, width in ((3, 32), (32, 32), (32, 64)):
        parts += [nn.Conv2d(fan_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    layers = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def made(init):
        torch.manual_seed(0)
        rule = AugLocal(2, joint_tail=False, init=init)
        return kinds(LocalSequential(layers, rule, 10, (3, 8, 8)).auxiliary[1], nn.Conv2d)[0]

    own, released = made("own"), made("released")
    assert not own.bias.any() and own.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert released.bias.any() and released.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 9 * 32), rel=0.05)
    with pytest.raises(ValueError, match="sampling='conv3x3' has no released code"):
        AugLocal(sampling="conv3x3", init="released")


def test_infopro_trains_on_what_its_head_computes():
    """A head that is a rule is looked at with the widths of its own."""
    net = small(InfoPro(*WEIGHTS, head=DGL(), widen=2))
    x, y = torch.rand(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (6,))
    h = torch.randn(6, 4, 16, 16, dtype=torch.float64)
    auxiliary = net.auxiliary[0]
    loss = auxiliary.loss(h, LossContext(y, x)).loss
    logits = auxiliary.network(h)
    decoded = auxiliary.terms[0].decoder(h)
    expected = 5 * F.binary_cross_entropy_with_logits(decoded, x) + 0.5 * F.cross_entropy(logits, y)
    torch.testing.assert_close(loss, expected)
