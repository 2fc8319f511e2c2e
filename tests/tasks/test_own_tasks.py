"""Tasks of one's own, targets that are not valid on a GPU, and what is out of what in the sums of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import (
    AugLocal,
    Binary,
    Classification,
    Criterion,
    Greedy,
    LocalSequential,
    LocalStep,
    MultiLabel,
    PredSim,
    Regression,
    Task,
    models,
)
from auglocal_ext.analysis import module_scores
from auglocal_ext.planning import plan_memory
from auglocal_ext.rules import LinearHead, Rule
from auglocal_ext.tasks.regression import _met_where_not_finite
from auglocal_ext.training.run.metrics import EpochSums, StepResult


def network(task, rule=None, **options):
    torch.manual_seed(3)
    layers = models.resnet_cifar(8, num_classes=task.outputs, width=4)
    return LocalSequential(layers, rule or Greedy(), task=task, input_shape=(3, 16, 16), **options)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


class Far(Classification):
    """A loss of its own."""

    def loss(self, output, target):
        return 100 + super().loss(output, target)


class Sharp(Classification):
    """An output of its own."""

    def readout(self, x, features, linear):
        return 10 * super().readout(x, features, linear)


class Never(Classification):
    """A count of its own."""

    def count(self, output, target):
        return torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize("task", [Far, Sharp, Never])
def test_what_a_subclass_changes_holds_for_every_module(task):
    net = network(task(10)).eval()
    x, y = torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,))
    out, h = net(x, y), x
    for k, module in enumerate(net.local_modules):
        h = module(h).detach()
        output = h if module.auxiliary is None else module.auxiliary(h).detach()
        torch.testing.assert_close(out.module_losses[k], net.task.loss(output, y))
        assert int(out.module_counts[k]) == int(net.task.count(output, y))


class Dense(Task):
    """A class for every position: an output ``(N, outputs, H, W)``."""

    metric = "accuracy"

    def check_form(self, target, samples):
        if target.dtype != torch.int64 or target.dim() != 3 or len(target) != samples:
            raise ValueError("labels are (N, H, W), int64")

    def check_output(self, shape, whose):
        if len(shape) != 3 or shape[0] != self.outputs:
            raise ValueError(f"{whose} has shape {shape}, expected ({self.outputs}, H, W)")

    def readout(self, x, features, linear):
        return linear(features.channels_first(x).movedim(1, -1)).movedim(-1, 1)

    def loss(self, output, target):
        return F.cross_entropy(F.interpolate(output, target.shape[1:]), target)

    def count(self, output, target):
        return (F.interpolate(output, target.shape[1:]).argmax(1) == target).sum()

    def counted(self, target):
        return target.numel()

    def example(self, samples, device=None):
        return torch.zeros(samples, 16, 16, dtype=torch.int64, device=device)


def dense_layers():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)),
    )


@pytest.mark.parametrize("rule", [Greedy(), AugLocal(2, single_layer_norm=False, joint_tail=False)], ids=repr)
def test_outputs_may_have_positions(rule):
    net = LocalSequential(dense_layers(), rule, task=Dense(5), input_shape=(3, 16, 16))
    step = LocalStep(net, sgd)
    x, y = torch.randn(2, 3, 16, 16), torch.randint(0, 5, (2, 16, 16))
    losses = [step(x, y) for _ in range(6)]
    assert losses[-1].loss < losses[0].loss and losses[0].output.shape == (2, 5, 8, 8)
    with pytest.raises(ValueError, match=r"the output of local module 0's auxiliary network has shape \(5,\)"):
        LocalSequential(dense_layers(), Greedy("0c2f"), task=Dense(5), input_shape=(3, 16, 16))


def test_tasks_that_would_be_trained_are_refused():
    class Learned(Classification):
        def __init__(self, classes):
            super().__init__(classes)
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="Learned has a trainable parameter, scale"):
        network(Learned(10))


@dataclass(frozen=True)
class Elsewhere(Rule):
    """Its heads learn a task of their own."""

    task: nn.Module

    def build_auxiliary(self, network, module):
        return LinearHead().build_auxiliary(replace(network, task=self.task), module)


def test_tasks_that_would_not_move_with_the_network_are_refused():
    weighted = Criterion(nn.CrossEntropyLoss(weight=torch.ones(10)), 10)
    with pytest.raises(ValueError, match="local module 0 learns a task of its own, .* that has buffers"):
        network(Classification(10), Elsewhere(weighted))
    assert network(Classification(10), Elsewhere(Regression(2))).num_modules == 4


def test_a_tasks_buffers_have_the_networks_dtype():
    layers = models.resnet_cifar(8, width=4).double()
    criterion = nn.CrossEntropyLoss(weight=torch.rand(10))
    net = LocalSequential(layers, Greedy(), criterion=criterion, outputs=10, input_shape=(3, 16, 16))
    net(torch.randn(4, 3, 16, 16).double(), torch.randint(0, 10, (4,))).loss.backward()


def test_wrong_settings_are_found_when_a_task_is_made():
    for wrong in (None, 1.5, True):
        with pytest.raises(ValueError, match="ignore_index must be an integer"):
            Classification(10, ignore_index=wrong)
    with pytest.raises(ValueError, match="label_smoothing must be within 0 .. 1, got None"):
        Classification(10, label_smoothing=None)
    with pytest.raises(TypeError, match="criterion must be callable .*make one, MSELoss"):
        Criterion(nn.MSELoss, 1)
    for count in (np.int64(5), torch.tensor(5)):
        assert Classification(count).outputs == 5 and type(Classification(count).outputs) is int
    with pytest.raises(TypeError, match=r"float8_e4m3fn: convert them with target.float\(\)"):
        Classification(3).check(torch.eye(3).to(torch.float8_e4m3fn), 3)


def test_planning_says_what_targets_of_a_criterion_are_like():
    layers = models.resnet_cifar(8, width=4)
    for loss in (nn.NLLLoss(), lambda output, target: F.one_hot(target, 10).float().mean() * output.sum()):
        net = LocalSequential(layers, Greedy(), criterion=loss, outputs=10, input_shape=(3, 16, 16))
        with pytest.raises(ValueError, match=r"on targets of shape \(4, 10\) in torch.float32.*example=targets of one"):
            plan_memory(net, 4, sgd)
    task = Criterion(F.cross_entropy, 10, example=torch.zeros(1, dtype=torch.int64))
    net = LocalSequential(layers, Greedy(), task=task, input_shape=(3, 16, 16))
    assert plan_memory(net, 4, sgd).predicted_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("task", "target"),
    [
        (Classification(4), torch.tensor([0, 1, 2, 3, 0, 1])),
        (Classification(4), torch.rand(6, 4).softmax(1)),
        (MultiLabel(4), torch.rand(6, 4) < 0.5),
        (Binary(), torch.tensor([0, 1, 1, 0, 1, 0])),
        (Regression(4), torch.randn(6, 4)),
    ],
    ids=["classes", "probabilities", "labels", "binary", "numbers"],
)
def test_losses_of_16_bit_outputs_are_summed_in_float32(task, target, dtype):
    output = torch.randn(6, task.outputs).to(dtype)
    loss = task.loss(output, target)
    assert loss.dtype == torch.float32 and torch.equal(loss, task.loss(output.float(), target))


def test_what_is_not_valid_spoils_nothing_until_the_host_hears_of_it():
    """What the losses do on CUDA, by the functions that do it."""
    output = torch.randn(4, 2, requires_grad=True)
    target = torch.tensor([[0.0, 1.0], [float("nan"), 2.0], [float("inf"), 0.0], [1.0, 1.0]])
    valid = target.isfinite()
    loss = F.mse_loss(output, _met_where_not_finite(output, target))
    loss.backward()
    expected = (output.detach() - target)[valid].square().sum() / 8
    torch.testing.assert_close(loss.detach(), expected)
    assert output.grad[~valid].eq(0).all() and output.grad[valid].ne(0).all()

    for smoothing in (0.0, 0.2):
        task = Classification(3, label_smoothing=smoothing)
        logits = torch.randn(4, 3, requires_grad=True)
        rows = torch.tensor([[1.0, 0.0, 0.0], [float("nan")] * 3, [0.5, 0.5, 0.0], [3.0, 0.0, 0.0]])
        loss = task._of_valid_rows(logits, rows)
        loss.backward()
        kept = F.cross_entropy(logits[[0, 2]], rows[[0, 2]], label_smoothing=smoothing, reduction="sum") / 4
        torch.testing.assert_close(loss, kept)
        assert logits.grad[[1, 3]].eq(0).all() and logits.grad[[0, 2]].ne(0).any()


def test_shares_are_out_of_what_was_counted():
    sums = EpochSums(1, torch.device("cpu"))
    for hits, counted in ((3, 3), (0, 1)):
        sums.add(StepResult(torch.tensor(1.0), torch.tensor([1.0]), torch.tensor([hits]), torch.tensor(counted)), 4)
    assert sums.read().accuracy == 0.75
    x, labels = torch.randn(6, 3, 16, 16), torch.ones(6, 4)
    net = network(MultiLabel(4)).eval()
    found = module_scores(net, [(x, labels)])
    out = net(x, labels)
    assert [score.accuracy for score in found] == pytest.approx((out.module_counts / 24).tolist())
    ignoring = network(Classification(10, ignore_index=3)).eval()
    y = torch.tensor([3, 3, 3, 0, 1, 2])
    hits = ignoring(x, y).module_counts
    assert [score.accuracy for score in module_scores(ignoring, [(x, y)])] == pytest.approx((hits / 3).tolist())
    numbers = module_scores(network(Regression(4)).eval(), [(x, labels)])
    assert all(score.accuracy != score.accuracy for score in numbers)  # nan: what is counted are no hits


def test_a_loop_of_ones_own_is_told_what_a_part_does_not_take():
    net = network(Classification(10), PredSim())
    module = net.local_modules[0]
    with pytest.raises(TypeError, match="PredSim's similarity loss compares samples by class"):
        module.local_loss(module(torch.randn(4, 3, 16, 16)), torch.rand(4, 10).softmax(1))
