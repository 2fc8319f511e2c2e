"""Segmentation: losses against torch's own, mIoU, targets, and what each rule makes of outputs with positions."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import (
    DGL,
    MAN,
    AugLocal,
    Classification,
    ContSup,
    Greedy,
    InfoPro,
    LocalSequential,
    LocalStep,
    PredSim,
    Regression,
    Segmentation,
    Task,
    models,
)
from auglocal_ext.analysis import module_scores
from auglocal_ext.cost import count_training_macs
from auglocal_ext.layers import Features
from auglocal_ext.planning import plan_memory
from auglocal_ext.rules import HEADS, FCNHead, LinearHead, Rule

WEIGHTS = ((1.0, 0.5), (0.5, 1.0))


def fcn(classes=5, upsample=True):
    """A fully convolutional network: 8 channels, then 16 at half the resolution, and the image's again."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for width, out, stride in ((8, 8, 1), (8, 16, 2), (16, 16, 1)):
        layers.append(models.BasicBlock(width, out, stride))
    layers.append(nn.Conv2d(16, classes, 1))
    if upsample:
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
    return nn.Sequential(*layers)


def network(rule, task=None, upsample=True, **options):
    torch.manual_seed(3)
    task = Segmentation(5) if task is None else task
    return LocalSequential(fcn(task.outputs, upsample), rule, task=task, input_shape=(3, 12, 16), **options)


def batch(n=4, ignored=0.2):
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(0, 5, (n, 12, 16), generator=generator)
    y[torch.rand(y.shape, generator=generator) < ignored] = 255
    return torch.rand(n, 3, 12, 16, generator=generator), y


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


RULES = {
    "greedy": Greedy(),
    "greedy fcn": Greedy("fcn"),
    "greedy norm": Greedy(LinearHead(norm=True)),
    "greedy 0c2f": Greedy("0c2f"),
    "auglocal": AugLocal(2, joint_tail=False),
    "auglocal, two blocks": AugLocal(3, pyramid=0, joint_tail=False, head="fcn"),
    "contsup": ContSup("R1E"),
    "infopro": InfoPro(*WEIGHTS, head="fcn"),
    "man": MAN(),
    "man of infopro": MAN(head=InfoPro(*WEIGHTS)),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_module_is_backpropagation_of_torchs_loss_bit_for_bit(smoothing):
    net = network(Greedy(), Segmentation(5, label_smoothing=smoothing), modules=1, fused=False).double()
    twin = copy.deepcopy(net.primary)
    x, y = batch()
    out = net(x.double(), y)
    expected = F.cross_entropy(twin(x.double()), y, ignore_index=255, label_smoothing=smoothing)
    assert torch.equal(out.loss.detach(), expected.detach())
    out.loss.backward()
    expected.backward()
    for ours, theirs in zip(net.primary.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_module_learns_the_pixels_and_counts_them(rule, upsample):
    task = Segmentation(5, upsample=upsample)
    net = network(rule, task).double().eval()
    x, y = batch()
    x, h, history = x.double(), x.double(), []
    out = net(x, y)
    assert out.output.shape == (4, 5, 12, 16) and out.module_counts.shape == (net.num_modules, 2, 5)
    for k, module in enumerate(net.local_modules):
        h = module(h, history).detach()
        output = h if module.auxiliary is None else module.auxiliary(h).detach()
        assert output.shape[:2] == (4, 5)
        target = y
        if upsample:
            output = F.interpolate(output, (12, 16), mode="bilinear")
        elif output.shape[2:] != y.shape[1:]:
            target = F.interpolate(y[:, None].double(), output.shape[2:], mode="nearest-exact")[:, 0].long()
        expected = F.cross_entropy(output, target, ignore_index=255)
        if not isinstance(rule, InfoPro) and not isinstance(rule.head_rule, InfoPro):
            torch.testing.assert_close(out.module_losses[k], expected)
        found = output.argmax(1)
        for c in range(5):
            right = int(((found == c) & (target == c)).sum())
            union = int((((found == c) | (target == c)) & (target != 255)).sum())
            assert out.module_counts[k, :, c].tolist() == [right, union]
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("auglocal", {}),
        ("infopro", {"recompute": "all"}),
        *(
            pytest.param(rule, options, marks=pytest.mark.slow)
            for rule in ("auglocal", "contsup", "infopro")
            for options in ({}, {"recompute": "all"}, {"modules": 2})
        ),
    ],
)
def test_a_step_trains_and_is_planned(rule, options):
    net = network(RULES[rule], **options)
    x, y = batch()
    assert plan_memory(net, 4, sgd).predicted_bytes > 0 and count_training_macs(net, (3, 12, 16)) > 0
    step = LocalStep(net, sgd)
    losses = [step(x, y) for _ in range(8)]
    assert losses[-1].module_losses[-1] < losses[0].module_losses[-1]
    assert losses[0].module_counts.shape == (net.num_modules, 2, 5)


REFUSED = {
    "PredSim's similarity loss compares samples by class": [PredSim(), PredSim(head="fcn")],
    "contrastive loss compares samples by class": [InfoPro(*WEIGHTS, loss="contrast")],
    "DGL's head 'mlp-sr' pools features to one vector, but Segmentation": [DGL(), MAN(head=DGL())],
    "head 'vgg' pools features .*take a head that keeps positions: 'linear', 'fcn'": [Greedy("vgg")],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_rule_that_cannot_is_refused_by_name(message):
    for rule in REFUSED[message]:
        with pytest.raises(ValueError, match=message):
            network(rule)


def test_every_head_keeps_positions_or_is_refused():
    for name in HEADS:
        try:
            net = network(Greedy(name))
        except ValueError as error:
            assert "pools features" in str(error) and name in ("vgg", "mlp-sr", "mlp-sr-auglocal", "mlp", "cnn")
        else:
            assert net.auxiliary[0](torch.rand(2, 8, 12, 16)).shape[1] == 5


def test_networks_that_pool_are_refused():
    for layers, why in (
        (models.resnet_cifar(8, num_classes=5), r"has shape \(N, 5\), expected \(N, num_classes, H, W\) = \(N, 5, H"),
        (fcn(4), r"has shape \(N, 4, 12, 16\), expected .* \(N, 5, H, W\)"),
    ):
        with pytest.raises(ValueError, match=why):
            LocalSequential(layers, Greedy(), task=Segmentation(5), input_shape=(3, 12, 16))
    tokens = nn.Sequential(
        *(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(12, 12), nn.Unflatten(2, (3, 4)), nn.Conv2d(8, 5, 1)),
    )
    with pytest.raises(ValueError, match="Segmentation.* receives .*, not maps with height and width"):
        LocalSequential(tokens, Greedy(), task=Segmentation(5), input_shape=(3, 12, 16), layout=None)


def test_an_output_of_another_resolution_is_resized():
    net = network(Greedy(), upsample=False).eval()
    x, y = batch()
    out = net(x, y)
    assert out.output.shape == (4, 5, 6, 8)
    resized = F.interpolate(out.output, (12, 16), mode="bilinear")
    torch.testing.assert_close(out.module_losses[-1], F.cross_entropy(resized, y, ignore_index=255))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_batches_of_ignored_pixels_train_nothing(label_smoothing):
    net = network(Greedy(), Segmentation(5, label_smoothing=label_smoothing))
    x, y = batch()
    out = net(x, torch.full_like(y, 255))
    assert out.module_losses.eq(0).all() and out.module_counts.eq(0).all()
    out.loss.backward()
    assert all(p.grad.eq(0).all() for p in net.parameters())
    assert net.task.measure(out.module_counts, net.task.counted(torch.full_like(y, 255))).isnan().all()


def test_miou_adds_over_batches():
    task = Segmentation(4)
    y = torch.tensor([[[0, 0, 1], [1, 255, 2]], [[0, 0, 0], [0, 0, 0]]])
    found = torch.tensor([[[0, 1, 1], [1, 3, 1]], [[0, 0, 0], [0, 0, 1]]])
    output = F.one_hot(found, 4).movedim(-1, 1).float()
    counts = task.count(output, y)
    assert counts.tolist() == [[6, 2, 0, 0], [8, 5, 1, 0]] and int(task.counted(y)) == 11
    assert float(task.measure(counts, 11)) == pytest.approx((6 / 8 + 2 / 5 + 0) / 3)  # class 3 occurs nowhere
    parts = sum(task.count(output[i : i + 1], y[i : i + 1]) for i in range(2))
    assert torch.equal(parts, counts)
    both = task.measure(torch.stack([counts, counts]), 11)
    assert both.shape == (2,) and both[0] == both[1] and task.metric == "mIoU"
    plain = Classification(4)
    shares = plain.measure(torch.tensor([3, -1]), 4)
    assert float(shares[0]) == 0.75 and math.isnan(float(shares[1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_masks_may_be_any_integers(dtype):
    for ignore_index in (255, -100):
        task = Segmentation(5, ignore_index=ignore_index)
        x, y = batch(ignored=0.2 if ignore_index == 255 else 0)
        output = torch.randn(4, 5, 6, 8)
        task.check(y.to(dtype), 4)
        assert torch.equal(task.loss(output, y.to(dtype)), task.loss(output, y))
        assert torch.equal(task.count(output, y.to(dtype)), task.count(output, y))
        assert int(task.counted(y.to(dtype))) == int((y != ignore_index).sum())
    with pytest.raises(ValueError, match="label 156 at"):  # which is -100 in eight bits
        Segmentation(5, ignore_index=-100).check(torch.full((1, 2, 2), 156, dtype=torch.uint8), 1)


def test_targets_that_do_not_fit_are_refused():
    task = Segmentation(5)
    for wrong, error, message in (
        (torch.zeros(2, dtype=torch.int64), ValueError, r"expected class indices \(2, H, W\).*got \(2,\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), ValueError, r"got \(2, 1, 4, 4\).*target.squeeze\(1\)"),
        (torch.zeros(2, 5, 4, 4), ValueError, r"target.argmax\(1\)"),
        (torch.zeros(2, 4, 4), TypeError, r"torch.float32: convert class indices with target.long\(\)"),
        (torch.zeros(2, 4, 4, dtype=torch.bool), TypeError, r"target.long\(\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "one target per input, expected 2"),
        (torch.zeros(2, 0, 4, dtype=torch.int64), ValueError, "no pixels"),
        ([0, 1], TypeError, "targets must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            task.check(wrong, 2)
    y = torch.zeros(2, 4, 4, dtype=torch.int64)
    y[1, 2, 3], y[1, 3, 0] = 5, 254
    with pytest.raises(ValueError, match=r"label 5 at \(sample, row, column\) \(1, 2, 3\).*ignored label 255; 2 of 32"):
        task.check(y, 2)
    assert "3 pixels of earlier batches" in task.late_complaint(3)
    # As on CUDA, where the host hears of them later: they count nowhere.
    output = torch.randn(2, 5, 4, 4)
    ignored = y.masked_fill(y > 4, 255)
    assert torch.equal(task.loss(output, y), task.loss(output, ignored))
    assert torch.equal(task.count(output, y), task.count(output, ignored))


def test_options_that_cannot_be_are_refused():
    for options, message in (
        ({"num_classes": 1}, "an object and its background are two classes"),
        ({"num_classes": 5, "label_smoothing": 2}, "label_smoothing must be within"),
        ({"num_classes": 5, "ignore_index": None}, "ignore_index must be an integer"),
        ({"num_classes": 300}, "ignore_index=255 is one of the 300 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            Segmentation(**options)
    assert Segmentation(300, ignore_index=-100).outputs == 300
    with pytest.raises(ValueError, match=r"dropout \(probability .*\) is a number within 0 .. 1"):
        FCNHead(1.5)


def test_nothing_waits_for_the_device():
    """Fake tensors have no values to read, as a captured graph has none."""
    for upsample in (True, False):
        with FakeTensorMode():
            task = Segmentation(5, upsample=upsample)
            scored = task.score(torch.empty(2, 5, 6, 8, requires_grad=True), torch.empty(2, 12, 16, dtype=torch.int64))
            assert task.measure(scored.tally, task.counted(torch.empty(2, 12, 16, dtype=torch.int64))).shape == ()
            scored.loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_16_bit_outputs_are_summed_in_float32(dtype):
    task, (_, y) = Segmentation(5), batch()
    output = torch.randn(4, 5, 6, 8).to(dtype)
    assert task.loss(output, y).dtype == torch.float32
    assert torch.equal(task.loss(output, y), task.loss(output.float(), y))


def test_predictions_have_targets_of_the_images_size():
    task = Segmentation(5)
    assert task.example_for(Features((3, 12, 16)), 2).shape == (2, 12, 16)
    assert task.example_for(Features((12, 16, 3), "channels_last"), 2).shape == (2, 12, 16)
    for inputs, found in ((Features((7,)), "vectors of 7 features"), (None, "of an unknown layout")):
        with pytest.raises(ValueError, match=found):
            task.example_for(inputs, 2)
    with pytest.raises(ValueError, match="example_for"):
        task.example(2)


def test_module_scores_leave_the_accuracy_open():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = module_scores(network(Greedy()), [batch()])
    assert len(found) == 4 and all(math.isfinite(score.loss) and math.isnan(score.accuracy) for score in found)


def test_a_head_that_learns_another_task_is_refused_when_built():
    """Its counts would not be of one shape with the others'."""

    @dataclass(frozen=True)
    class Other(Rule):
        task: Task

        def build_auxiliary(self, network, module):
            return LinearHead().build_auxiliary(replace(network, task=self.task), module)

    for task, own in ((Regression(2), r"\(\)"), (Segmentation(4), r"\(2, 4\)")):
        with pytest.raises(ValueError, match=rf"of local module 0 learns .* in the shape {own}, .*\(2, 5\)"):
            network(Other(task))
    net = network(Other(Segmentation(5, upsample=False)), modules=2)
    assert net(*batch()).module_counts.shape == (2, 2, 5)


def test_pixel_accuracy_is_the_share_of_right_pixels():
    net = network(Greedy(), modules=2).eval()
    x, y = batch()
    out, task = net(x, y), net.task
    right = (out.output.argmax(1) == y)[y != 255].double().mean()
    torch.testing.assert_close(task.pixel_accuracy(out.module_counts, task.counted(y))[-1], right)
