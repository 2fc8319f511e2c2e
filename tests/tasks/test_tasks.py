"""Every task: which targets are valid, losses against torch's own, what is counted, one module as backpropagation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import no_waits

from auglocal_ext import (
    AugLocal,
    Binary,
    Classification,
    ContSup,
    Criterion,
    Greedy,
    LocalSequential,
    LocalStep,
    MultiLabel,
    Regression,
    models,
)
from auglocal_ext.layers import Features
from auglocal_ext.ops import deferred
from auglocal_ext.planning import plan_memory
from auglocal_ext.tasks import Task


def probabilities(n, classes=10):
    return torch.rand(n, classes).softmax(1)


TASKS = {
    "classes": (Classification(10), lambda n: torch.randint(0, 10, (n,)), F.cross_entropy),
    "smoothed": (
        Classification(10, label_smoothing=0.1),
        lambda n: torch.randint(0, 10, (n,)),
        lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    ),
    "probabilities": (Classification(10), probabilities, F.cross_entropy),
    "binary": (
        Binary(),
        lambda n: torch.arange(n) % 2,
        lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.to(o.dtype)),
    ),
    "labels": (
        MultiLabel(4),
        lambda n: torch.rand(n, 4) < 0.5,
        lambda o, y: F.binary_cross_entropy_with_logits(o, y.to(o.dtype)),
    ),
    "one number": (Regression(), lambda n: torch.randn(n), lambda o, y: F.mse_loss(o[:, 0], y.to(o.dtype))),
    "numbers": (Regression(3, "huber"), lambda n: torch.randn(n, 3), lambda o, y: F.huber_loss(o, y.to(o.dtype))),
    "criterion": (Criterion(nn.L1Loss(), 3), lambda n: torch.randn(n, 3).double(), F.l1_loss),
}


def network(task, rule=None, modules=None, **options):
    torch.manual_seed(3)
    return LocalSequential(
        models.resnet_cifar(8, num_classes=task.outputs, width=4),
        rule or AugLocal(2),
        task=copy.deepcopy(task),
        input_shape=(3, 16, 16),
        modules=modules,
        **options,
    )


@pytest.mark.parametrize("name", TASKS)
def test_one_module_is_backpropagation_of_torchs_loss_bit_for_bit(name):
    task, targets, loss = TASKS[name]
    net = network(task, modules=1, fused=False).double()
    twin = copy.deepcopy(net.primary)
    x, y = torch.randn(6, 3, 16, 16).double(), targets(6)
    out, expected = net(x, y), loss(twin(x), y)
    assert torch.equal(out.loss.detach(), expected.detach())
    out.loss.backward()
    expected.backward()
    for ours, theirs in zip(net.primary.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("rule", [AugLocal(2), ContSup("R1E"), Greedy("0c2f")], ids=["auglocal", "contsup", "greedy"])
@pytest.mark.parametrize("name", TASKS)
def test_every_module_learns_the_task(name, rule):
    task, targets, loss = TASKS[name]
    net = network(task, rule).double()
    x, y = torch.randn(6, 3, 16, 16).double(), targets(6)
    h, history = x, []
    expected, outputs = [], []
    state = copy.deepcopy(net.state_dict())
    for module in net.local_modules:
        h = module(h, history).detach()
        outputs.append(h if module.auxiliary is None else module.auxiliary(h).detach())
        expected.append(loss(outputs[-1], y))
    net.load_state_dict(state)
    out = net(x, y)
    torch.testing.assert_close(out.module_losses, torch.stack(expected))
    assert torch.equal(out.output, out.logits) and out.output.shape == (6, task.outputs)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    counts = [float(task.count(o, y)) for o in outputs]
    assert out.module_counts.tolist() == pytest.approx(counts)
    assert torch.equal(out.module_counts, out.module_correct)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_trains_and_is_planned(name):
    task, targets, _ = TASKS[name]
    net = network(task, ContSup("R0"), modules=2)
    plan = plan_memory(net, 6, lambda p: torch.optim.SGD(p, lr=0.1))
    assert plan.predicted_bytes > 0
    step = LocalStep(net, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    x, y = torch.randn(6, 3, 16, 16), targets(6)
    losses = [step(x, y) for _ in range(12)]
    assert losses[-1].loss < losses[0].loss and not losses[-1].loss.requires_grad
    assert type(losses[0]) is type(net(x, y))


def test_what_is_counted():
    output = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]])
    task = Classification(3, ignore_index=2)
    y = torch.tensor([0, 1, 1, 2])
    assert (int(task.count(output, y)), int(task.counted(y)), task.metric) == (2, 3, "accuracy")
    soft = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.1, 0.4], [0.0, 0.9, 0.1], [0.2, 0.4, 0.4]])
    assert (int(task.count(output, soft)), task.counted(soft)) == (2, 4)
    labels = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    found = MultiLabel(3)
    assert (int(found.count(output - 0.5, labels)), found.counted(labels), found.metric) == (9, 12, "accuracy")
    assert int(Binary().count(torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([1.0, 0.0, 0.0]))) == 2
    numbers = Regression(2)
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert float(numbers.count(torch.zeros(2, 2), y)) == 10 and numbers.counted(y) == 4
    assert numbers.metric == "mean absolute error"
    assert int(Criterion(F.mse_loss, 2).count(torch.zeros(2, 2), y)) == -1 and not Criterion(F.mse_loss, 2).metric


NAN = math.nan
WRONG = [
    (Classification(3), torch.tensor([0, 1, 3]), ValueError, "label 3 at index 2 is out of range.*1 of 3"),
    (Classification(3), torch.tensor([0.0, 1.0, 2.0]), TypeError, "task=Regression.*task=Binary"),
    (Classification(3), torch.tensor([0, 1, 2]).int(), TypeError, r"target.long\(\)"),
    (Classification(3), torch.tensor([True, False, True]), TypeError, r"target.long\(\)"),
    (Classification(3), torch.eye(3).long(), ValueError, r"one-hot rows are probabilities once .float\(\)"),
    (Classification(3), torch.zeros(3, 1).long(), ValueError, "pass one class per sample"),
    (Classification(3), torch.zeros(3, 4), ValueError, r"class probabilities \(3, 3\).*got \(3, 4\)"),
    (
        Classification(3),
        torch.zeros(3, 3),
        ValueError,
        "row 0 holds no class probabilities.* sum 0.*3 of 3.*MultiLabel",
    ),
    (
        Classification(3),
        torch.tensor([[0.5, 0.5, 0.0], [1.5, -0.5, 0.0], [1.0, 0, 0]]),
        ValueError,
        "row 1 .*-0.5.*1 of 3",
    ),
    (Classification(3), torch.full((3, 3), NAN), ValueError, "row 0 holds no class probabilities"),
    (Classification(3), torch.tensor([0, 1]), ValueError, "one target per input, expected 3"),
    (Classification(3), [0, 1, 2], TypeError, "targets must be a tensor, got list"),
    (Binary(), torch.tensor([0, 1, 2]), ValueError, r"the target at \(2,\) is 2: expected 0 and 1.*1 of 3"),
    (Binary(), torch.tensor([0.0, NAN, 1.0]), ValueError, r"the target at \(1,\) is nan"),
    (Binary(), torch.zeros(3, 2), ValueError, r"expected targets \(3, 1\).*got \(3, 2\)"),
    (MultiLabel(2), torch.zeros(3), ValueError, r"expected targets \(3, 2\)"),
    (MultiLabel(2), torch.tensor([[0, 1], [1, 1], [0, -1]]), ValueError, r"at \(2, 1\) is -1"),
    (MultiLabel(2), torch.zeros(3, 2, dtype=torch.complex64), TypeError, "complex64"),
    (Regression(2), torch.zeros(3), ValueError, r"expected targets \(3, 2\), got \(3,\)"),
    (Regression(1), torch.zeros(3, 2), ValueError, r"expected targets \(3, 1\) or \(3,\)"),
    (Regression(1), torch.zeros(3).long(), TypeError, r"target.float\(\)"),
    (Regression(1), torch.tensor([0.0, NAN, math.inf]), ValueError, r"at \(1,\) is nan.*2 of 3"),
    (Criterion(F.mse_loss, 1), torch.zeros(2, 1), ValueError, "one target per input, expected 3"),
]


@pytest.mark.parametrize(("task", "target", "error", "message"), WRONG)
def test_targets_that_are_not_valid_are_refused_before_any_work(task, target, error, message):
    with pytest.raises(error, match=message):
        task.check(target, 3)
    net = network(task) if task.outputs != 2 or isinstance(task, Regression) else network(task, Greedy())
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        net(torch.randn(3, 3, 16, 16), target)
    with pytest.raises(error, match=message):
        net.local_modules[0].local_loss(net.local_modules[0].layers[0](torch.randn(3, 3, 16, 16)), target)
    for key, value in net.primary[1].state_dict().items():
        assert torch.equal(value, state[f"primary.layer1_0.{key}"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(1), "cross-entropy over one class is 0 whatever.*task=Binary"),
        (lambda: Classification(0), "a number of outputs, at least 1; got 0"),
        (lambda: Classification(True), "a number of outputs, at least 1; got True"),
        (lambda: Classification(2.0), "a number of outputs"),
        (lambda: Classification(3, label_smoothing=1.5), "label_smoothing must be within 0 .. 1, got 1.5"),
        (lambda: Regression(1, "rmse"), "loss is one of mse, l1, huber; got 'rmse'"),
        (lambda: MultiLabel(0), "MultiLabel needs a number of outputs"),
        (lambda: Criterion(nn.Bilinear(2, 2, 1), 2), "Bilinear has trainable parameters"),
    ],
)
def test_wrong_tasks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_criterion_is_called_as_it_is():
    with pytest.raises(TypeError, match="criterion must be callable"):
        Criterion(3, 2)
    net = network(Criterion(nn.MSELoss(reduction="none"), 2), Greedy())
    with pytest.raises(ValueError, match=r'criterion must return a scalar.*reduction="mean".*returned \(4, 2\)'):
        net(torch.randn(4, 3, 16, 16), torch.randn(4, 2))
    weights = torch.rand(10)
    layers = models.resnet_cifar(8, width=4)
    net = LocalSequential(
        layers, Greedy(), criterion=nn.CrossEntropyLoss(weight=weights), outputs=10, input_shape=(3, 16, 16)
    )
    assert net.state_dict()["task.criterion.weight"] is not None  # it moves with the network
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    out = net(x, y)
    torch.testing.assert_close(out.module_losses[-1], F.cross_entropy(out.output, y, weights))
    twin = copy.deepcopy(net).double()
    assert twin.local_modules[0].auxiliary.settings.task is twin.task
    assert twin.task.criterion.weight.dtype == torch.float64


class Ranking(Task):
    """The least that a task of one's own says."""

    def check_form(self, target, samples):
        if target.shape != (samples,):
            raise ValueError("ranks are (N,)")

    def loss(self, output, target):
        return F.margin_ranking_loss(output[:-1, 0], output[1:, 0], (target[:-1] - target[1:]).sign().to(output.dtype))

    def example(self, samples, device=None):
        return torch.arange(samples, device=device)


def test_a_task_of_ones_own():
    net = network(Ranking(1), Greedy())
    x, y = torch.randn(6, 3, 16, 16), torch.randperm(6)
    out = net(x, y)
    out.loss.backward()
    assert out.module_counts.tolist() == [-1, -1, -1, -1]
    with pytest.raises(ValueError, match="ranks are"):
        net(x, y[:5])
    assert plan_memory(net, 4, lambda p: torch.optim.SGD(p, lr=0.1)).predicted_bytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "say what is learned by one of num_classes=N, task=.*got none of them"),
        ({"num_classes": 10, "task": Classification(10)}, "got num_classes and task"),
        ({"task": Regression(10), "label_smoothing": 0.1}, "belong to num_classes=N; say them in the task itself"),
        ({"task": Classification(10), "ignore_index": 3}, "belong to num_classes=N"),
        ({"criterion": F.mse_loss}, "criterion=function goes with outputs=N"),
        ({"num_classes": 10, "outputs": 10}, "criterion=function goes with outputs=N"),
        ({"num_classes": 1}, "cross-entropy over one class is 0"),
        ({"task": Regression(3)}, r"the network's output has shape \(N, 10\), expected \(N, 3\)"),
        ({"task": Binary()}, r"the network's output has shape \(N, 10\), expected \(N, 1\)"),
    ],
)
def test_what_is_learned_is_said_once_and_fits(given, message):
    with pytest.raises(ValueError, match=message):
        LocalSequential(models.resnet_cifar(8, width=4), Greedy(), input_shape=(3, 16, 16), **given)


def test_a_task_must_be_one():
    with pytest.raises(TypeError, match="task must be a task such as Classification.10. or Regression.1., got 'mse'"):
        LocalSequential(models.resnet_cifar(8, width=4), Greedy(), task="mse", input_shape=(3, 16, 16))


def test_values_are_not_looked_at_where_there_are_none():
    with FakeTensorMode():
        Classification(3).check(torch.full((4,), 9), 4)
        with pytest.raises(TypeError):
            Classification(3).check(torch.zeros(4), 4)
    Regression(2).check(torch.zeros(4, 2, device="meta"), 4)


class Event:
    """Stands for a CUDA event that is done."""

    def query(self):
        return True


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Classification(3), "2 targets of earlier batches were not valid: expected 0 <= label < 3.*or class probab"),
        (Regression(3), "2 targets of earlier batches were not finite"),
        (MultiLabel(3), "2 targets of earlier batches were outside 0 .. 1"),
        (Criterion(F.mse_loss, 3), "2 targets of earlier batches were not valid"),
    ],
)
def test_what_is_said_later_on_cuda(task, message):
    deferred._pending.append(deferred._Deferred(Event(), torch.tensor(2), task.late_complaint))
    with pytest.raises(ValueError, match=message):
        deferred.raise_deferred_errors()
    assert not deferred._pending


def test_readouts_are_handed_to_the_task_unevaluated():
    seen = []

    class Watching(Classification):
        def readout_score(self, x, features, linear, target):
            seen.append((tuple(x.shape), features, type(linear)))
            return super().readout_score(x, features, linear, target)

    net = network(Watching(10), Greedy())
    net(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
    assert seen[0] == ((2, 4, 16, 16), Features((4, 16, 16)), nn.Linear) and len(seen) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_on_cuda_without_a_synchronisation(name):
    task, targets, _ = TASKS[name]
    net = network(task).cuda()
    x, y = torch.randn(6, 3, 16, 16).cuda(), targets(6).cuda()
    net(x, y).loss.backward()
    with no_waits():
        net(x, y).loss.backward()
