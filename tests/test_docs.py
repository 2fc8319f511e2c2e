"""The examples of docs/extend run, and compute the formulas on their pages."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import MAN, LocalSequential, LocalStep, models
from auglocal_ext.cost import count_macs, count_parameters, count_training_macs
from auglocal_ext.memory import estimate_step
from auglocal_ext.planning import plan_memory

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "extend"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.S)


@pytest.fixture
def example(request, monkeypatch):
    """The first block of a page as a module; its second block is the attribute ``use``."""
    first, second = blocks(request.param)
    module = types.ModuleType(f"docs_{request.param}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(first, request.param, "exec"), module.__dict__)
    module.use = second
    return module


def use(example):
    small = re.sub(r"randn\(16,|\(16,\)", lambda m: m[0].replace("16", "4"), example.use)
    exec(compile(small, "use", "exec"), example.__dict__)


def small(rule, **options):
    return LocalSequential(models.resnet_cifar(8, width=4), rule, 10, (3, 16, 16), **options)


def batch(n=8):
    return torch.randn(n, 3, 16, 16), torch.randint(0, 10, (n,))


@pytest.mark.parametrize("example", ["rule", "term", "task"], indirect=True)
def test_every_page_has_these_two_blocks(example):
    use(example)
    for name in ("loss", "accuracy"):
        assert not hasattr(example, name) or getattr(example, name).isfinite().all()
    assert example.net.num_modules >= 3


@pytest.mark.parametrize("example", ["rule"], indirect=True)
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_the_rule_trains(example, recompute):
    net = small(example.SelfTaught(), recompute=recompute)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    x, y = batch()
    losses = [step(x, y) for _ in range(8)]
    assert (losses[-1].module_losses < losses[0].module_losses).all()
    assert net.export()(x).shape == (8, 10)


@pytest.mark.parametrize("example", ["rule", "term"], indirect=True)
def test_each_loss_trains_its_own_module(example):
    rule = example.SelfTaught() if hasattr(example, "SelfTaught") else example.Decorrelated()
    net = small(rule)
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


@pytest.mark.parametrize("example", ["rule"], indirect=True)
def test_the_rules_loss_is_the_formula(example):
    module = small(example.SelfTaught(teaching=0.3)).local_modules[1]
    auxiliary = module.auxiliary
    nn.init.normal_(auxiliary.teacher.head.linear.weight)
    h, (_, y) = torch.randn(8, 4, 16, 16), batch()
    f = h.mean((2, 3))
    logits, taught = (
        F.linear(f, part.head.linear.weight, part.head.linear.bias) for part in (auxiliary.student, auxiliary.teacher)
    )
    expected = F.cross_entropy(logits, y) + 0.3 * (logits - taught).square().mean()
    torch.testing.assert_close(module.local_loss(h, y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", ["rule"], indirect=True)
def test_the_teacher_follows(example):
    net = small(example.SelfTaught(decay=0.75))
    teacher, student = net.auxiliary[0].teacher.head.linear, net.auxiliary[0].student.head.linear
    before = teacher.weight.clone()
    assert torch.equal(before, student.weight)
    LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.5))(*batch())
    assert not torch.equal(student.weight, before)
    torch.testing.assert_close(teacher.weight, 0.75 * before + 0.25 * student.weight)


@pytest.mark.parametrize("example", ["rule"], indirect=True)
def test_costs_of_the_rule_follow(example):
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


@pytest.mark.parametrize("example", ["rule"], indirect=True)
def test_the_rules_options_and_its_place_as_a_head(example):
    assert [(o.name, o.kind, o.default) for o in example.SelfTaught.options()] == [
        ("decay", float, 0.99),
        ("teaching", float, 0.1),
        ("head", str | dict, "linear"),
    ]
    with pytest.raises(ValueError, match=r"decay \(m in .*\) is a number within 0 .. 1; got 2"):
        example.SelfTaught(decay=2)
    with pytest.raises(ValueError, match="cannot be a head: it supplies modules with context"):
        MAN(head=example.SelfTaught())


REGISTER = """
import sys
{code}
from auglocal_ext import rules
rules.RULES["selftaught"] = SelfTaught  # what a line in auglocal_ext/rules/__init__.py does
from auglocal_ext.training import TrainConfig
from auglocal_ext.training.config.train_config import make_rule
from auglocal_ext.training.config.settings import TABLES
config = TrainConfig(data=".", output="run", rule="selftaught", decay=0.5, head="auglocal:depth=2")
assert make_rule(config) == SelfTaught(0.5, head=rules.AugLocal(depth=2)), make_rule(config)
assert TABLES["rule"]["teaching"] is float
from auglocal_ext.cli import main
print(f"package: {{rules.__file__}}.", flush=True)
main(["train", "--help"])
"""


def test_a_registered_rule_reaches_the_command_line(tmp_path):
    code = blocks("rule")[0]
    (tmp_path / "registered.py").write_text(REGISTER.format(code=code))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # else an installed package would be imported
    command = [sys.executable, tmp_path / "registered.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "--decay" in text and "selftaught: m in teacher = m teacher + (1 - m) head, 0..1 (default 0.99)" in text
    assert text.startswith(f"package: {ROOT / 'auglocal_ext' / 'rules' / '__init__.py'}.")


@pytest.mark.parametrize("option", ["scale_classifier", "average_momentum", "joint_tail", "sampling", "beta"])
def test_a_rules_options_stand_in_its_own_file(option):
    package = ROOT / "auglocal_ext"
    files = {
        p.relative_to(package).as_posix() for p in package.rglob("*.py") if re.search(rf"\b{option}\b", p.read_text())
    }
    rules = {name for name in files if name.startswith("rules/") and name != "rules/__init__.py"}
    assert len(rules) == 1 and len(files - {"training/data/mixing.py"}) <= 2, files  # sampling is a part's name too


@pytest.mark.parametrize("example", ["term"], indirect=True)
def test_the_term_is_the_formula(example):
    module = small(example.Decorrelated(weight=0.3)).local_modules[1]
    h, (_, y) = torch.randn(8, 4, 16, 16), batch()
    y[2] = -100
    f = h.mean((2, 3))
    linear = module.auxiliary.network.head.linear
    correlation = torch.corrcoef(f[y != -100].t())
    pairs = [correlation[i, j] ** 2 for i in range(4) for j in range(4) if i != j]
    expected = F.cross_entropy(F.linear(f, linear.weight, linear.bias), y) + 0.3 * torch.stack(pairs).mean()
    torch.testing.assert_close(module.local_loss(h, y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", ["term"], indirect=True)
def test_the_term_recomputes_to_the_same_numbers(example):
    nets = [small(example.Decorrelated()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].recompute = "all"
    x, y = batch()
    for net in nets:
        net(x, y).loss.backward()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("example", ["task"], indirect=True)
def test_the_task_is_the_formula_and_learns(example):
    task = example.Ordinal(5)
    output, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 4, 2])
    losses = [
        -F.logsigmoid(z if grade > j else -z)
        for row, grade in zip(output, y.tolist(), strict=True)
        for j, z in enumerate(row)
    ]
    torch.testing.assert_close(task.loss(output, y), torch.stack(losses).mean())
    sure = torch.where(y[:, None] > torch.arange(4), 3.0, -3.0)
    assert (
        int(task.count(sure, y)) == 6 and int(task.count(-sure, y)) == 2
    )  # those of grade 2, of whose questions half are no
    for target, error, message in (
        (y.float(), TypeError, "grades are int64"),
        (y[:, None], ValueError, "a grade per sample"),
        (y + 1, ValueError, "grade 5 at index 4 is not in 0 .. 4"),
    ):
        with pytest.raises(error, match=message):
            task.check(target, 6)
    from auglocal_ext import AugLocal

    net = LocalSequential(
        models.resnet_cifar(8, num_classes=4, width=4), AugLocal(2), task=task, input_shape=(3, 16, 16)
    )
    assert plan_memory(net, 4, lambda p: torch.optim.SGD(p, lr=0.1)).predicted_bytes > 0
    twin = copy.deepcopy(net)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    x = torch.randn(6, 3, 16, 16)
    found = [step(x, y).loss for _ in range(12)]
    assert found[-1] < found[0] and twin(x, y).module_counts.dtype == torch.int64


OP = """
import sys, types
from auglocal_ext import ops
reference = types.ModuleType("auglocal_ext.ops.reference.squared_relu")
sys.modules[reference.__name__] = reference
exec({reference!r}, reference.__dict__)
names = {{}}
exec({op!r}, names)
exec({use!r}, names)
torch, x, y = names["torch"], names["x"], names["y"]
assert torch.equal(y, x.relu().square()) and torch.equal(x.grad, 2 * x.relu())
half = torch.randn(3, 5).half()
assert names["squared_relu"](half, provider="reference").dtype == torch.float16
try:
    names["squared_relu"](torch.arange(3))
except TypeError as error:
    assert "got torch.int64" in str(error)
else:
    raise AssertionError("integers were taken")
"""


@pytest.mark.slow
def test_the_op_runs():
    # In a process of its own: what is registered with torch cannot be taken back.
    reference, op, use = blocks("op")
    code = OP.format(reference=reference, op=op, use=use)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
