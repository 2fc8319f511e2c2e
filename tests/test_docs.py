"""docs/new_rule.md's example is a rule: it trains, keeps to its module, and its loss is the formula on the page."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from auglocal_ext import LocalSequential, LocalStep, models
from auglocal_ext.cost import count_macs, count_parameters, count_training_macs
from auglocal_ext.memory import estimate_step

PAGE = Path(__file__).resolve().parents[1] / "docs" / "new_rule.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)


@pytest.fixture
def example(monkeypatch):
    module = types.ModuleType("docs_new_rule")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(blocks()[0], str(PAGE), "exec"), module.__dict__)
    return module


def small(rule, **options):
    return LocalSequential(models.resnet_cifar(8, width=4), rule, 10, (3, 16, 16), **options)


def batch(n=8):
    return torch.randn(n, 3, 16, 16), torch.randint(0, 10, (n,))


def test_the_page_has_these_two_blocks(example):
    _, use = blocks()
    exec(compile(use.replace("16, 3, 32", "4, 3, 32").replace("(16,)", "(4,)"), str(PAGE), "exec"), example.__dict__)
    assert example.loss.isfinite()
    assert example.combined.num_modules == 4 and not len(example.combined.context)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_it_trains(example, recompute):
    net = small(example.SelfTaught(), recompute=recompute)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    x, y = batch()
    losses = [step(x, y) for _ in range(8)]
    assert (losses[-1].module_losses < losses[0].module_losses).all()
    assert net.export()(x).shape == (8, 10)


def test_each_loss_trains_its_own_module(example):
    net = small(example.SelfTaught())
    x, y = batch()
    everything = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert not any("teacher" in name for name in everything)
    h, history = x, []
    for module in net.local_modules:
        out = module(h, history)
        gradients = torch.autograd.grad(module.local_loss(out, y, x), list(everything.values()), allow_unused=True)
        trained = {id(p) for p, grad in zip(everything.values(), gradients, strict=True) if grad is not None}
        assert trained == {id(p) for p in module.parameters() if p.requires_grad}
        h = out.detach()


def test_the_loss_is_the_formula(example):
    module = small(example.SelfTaught(decorrelation=0.3)).local_modules[1]
    task = module.auxiliary.task
    torch.nn.init.normal_(task.teacher.head.linear.weight)
    h, (_, y) = torch.randn(8, 4, 16, 16), batch()
    y[2] = -100
    f = h.mean((2, 3))
    logits = F.linear(f, task.student.head.linear.weight, task.student.head.linear.bias)
    teacher = F.linear(f, task.teacher.head.linear.weight, task.teacher.head.linear.bias)
    taught = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    correlation = torch.corrcoef(f[y != -100].t())
    pairs = [correlation[i, j] ** 2 for i in range(4) for j in range(4) if i != j]
    expected = F.cross_entropy(logits, y) + taught + 0.3 * torch.stack(pairs).mean()
    torch.testing.assert_close(module.local_loss(h, y), expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_follows(example):
    net = small(example.SelfTaught(momentum=0.75))
    task = net.auxiliary[0].task
    before = task.teacher.head.linear.weight.clone()
    assert torch.equal(before, task.student.head.linear.weight)
    LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.5))(*batch())
    student = task.student.head.linear.weight
    assert not torch.equal(student, before)
    torch.testing.assert_close(task.teacher.head.linear.weight, 0.75 * before + 0.25 * student)


def test_costs_follow(example):
    net = small(example.SelfTaught())
    encoders, students = (360 + 111 * 4) * 2 + (360 + 111 * 8), 2 * (40 + 10) + (80 + 10)
    assert count_parameters(net) == count_parameters(net.primary) + encoders + students
    heads = 3 * (40 + 40 + 80)  # the student twice, the teacher once
    assert count_training_macs(net, (3, 16, 16)) == count_macs(net, (3, 16, 16)) + heads

    def build():
        fake = small(example.SelfTaught())
        x, y = batch()
        return lambda mark: fake(x, y).loss.backward(), (fake, x, y)

    assert estimate_step(build).peak_bytes > 0
