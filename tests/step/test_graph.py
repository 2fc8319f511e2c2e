"""When steps are captured, and that a captured step is the eager one; on the CPU with a stand-in for the CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import inspect

import pytest
import torch
from operator_tape import OperatorTape, watch_for_reads
from step_nets import RULES, assert_same_state, batches, plain_step, small, twins

from auglocal_ext.step import GraphCaptureError, LocalStep
from auglocal_ext.step.graph import MAX_CAPTURES


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    monkeypatch.setattr("auglocal_ext.step.graph.CapturedGraph", OperatorTape)
    monkeypatch.setattr("auglocal_ext.step.graph.can_capture", lambda device: True)
    monkeypatch.setattr("auglocal_ext.step.graph.watch_for_waits", watch_for_reads)
    monkeypatch.setattr(OperatorTape, "made", 0)
    monkeypatch.setattr(OperatorTape, "streams", [])


def sgd(params, lr=0.125):
    """The form that is used on CUDA; its learning rate may be a tensor, and 1/8 is the same number in fp32."""
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=1e-4, fused=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"recompute": "auxiliary"}], ids=str)
def test_captured_steps_are_the_plain_loops_to_the_bit(rule, options):
    net, other = twins(rule, **options)
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    kept = []
    for x, y in batches(8):
        theirs, ours = plain_step(other, plain, x, y), step(x, y)
        kept.append((ours.loss, theirs.loss.detach()))
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.module_losses, theirs.module_losses)
        assert torch.equal(ours.module_correct, theirs.module_correct)
    assert step.graphed and step.eager_reason is None
    assert OperatorTape.made == 1
    assert_same_state(net, other)
    assert all(torch.equal(a, b) for a, b in kept)  # no later step has overwritten an earlier output


def test_warm_up_and_captures_share_a_stream_of_the_networks_device(monkeypatch):
    class Stream:
        def __init__(self, device):
            self.device = device
            made.append(self)

    @contextlib.contextmanager
    def on(stream):
        ran.append(stream)
        yield

    made, ran = [], []
    monkeypatch.setattr("auglocal_ext.step.graph.make_stream", Stream)
    monkeypatch.setattr("auglocal_ext.step.graph.on_stream", on)
    step = LocalStep(small(), sgd)
    for _ in range(2):
        for n in (6, 6, 6, 6, 3):
            step(*next(batches(1, n)))
    assert [stream.device for stream in made] == [torch.device("cpu")]
    assert ran == made * 4  # three steps and the first small batch
    assert OperatorTape.streams == made * 2


def test_a_learning_rate_changes_without_a_new_capture():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for index, (x, y) in enumerate(batches(10)):
        plain.param_groups[0]["lr"] = step.optimizer.param_groups[0]["lr"] = 2.0**-index
        plain_step(other, plain, x, y)
        step(x, y)
    assert OperatorTape.made == 1
    assert_same_state(net, other)


def test_smaller_last_batches_are_captured_when_they_come_again():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    graphed = []
    for _ in range(3):
        for index, (x, y) in enumerate(batches(6)):
            x, y = (x[:3], y[:3]) if index == 5 else (x, y)
            theirs, ours = plain_step(other, plain, x, y), step(x, y)
            assert torch.equal(ours.module_losses, theirs.module_losses)
            graphed.append(step.graphed)
    assert OperatorTape.made == 2
    assert graphed == [False] * 3 + [True] * 2 + [False] + [True] * 12
    assert_same_state(net, other)


def test_epochs_of_few_batches_are_captured_too():
    step = LocalStep(small(), sgd)
    graphed = []
    for _ in range(4):
        for n in (6, 6, 3):
            step(*next(batches(1, n)))
            graphed.append(step.graphed)
    assert graphed == [False] * 4 + [True, False] + [True] * 6
    assert OperatorTape.made == 2


def test_smaller_batches_of_many_sizes_have_one_graph_beside_that_of_the_largest():
    step = LocalStep(small(), sgd)
    for _ in range(4):
        for n in (6, 6, 6, 6, 3, 6, 4, 6, 5):
            step(*next(batches(1, n)))
    assert OperatorTape.made == 2
    assert not step.graphed and "one size" in step.eager_reason


def test_last_batches_of_accumulating_steps():
    """Of five batches per epoch the last, smaller one is by turns the first and the second of two calls."""
    net, other = twins()
    ours, theirs = LocalStep(net, sgd, accumulate=2), LocalStep(other, sgd, accumulate=2, graph=False)
    for _ in range(5):
        for n in (6, 6, 6, 6, 3):
            x, y = next(batches(1, n))
            ours(x, y)
            theirs(x, y)
    assert ours.graphed and OperatorTape.made == 4
    assert_same_state(net, other)


def test_another_batch_size_is_captured_when_it_stays():
    step = LocalStep(small(), sgd)
    for n in (6, 4):
        for x, y in batches(6, n):
            step(x, y)
        assert step.graphed
    assert OperatorTape.made == 2


def test_an_option_that_changes_at_every_step_ends_in_eager_steps():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for index, (x, y) in enumerate(batches(4 * MAX_CAPTURES + 8)):
        momentum = 0.5 + index // 4 / 100
        plain.param_groups[0]["momentum"] = step.optimizer.param_groups[0]["momentum"] = momentum
        plain_step(other, plain, x, y)
        step(x, y)
    assert OperatorTape.made == MAX_CAPTURES
    assert not step.graphed and "keep changing" in step.eager_reason
    assert_same_state(net, other)


@pytest.mark.parametrize("change", ["eval", "freeze", "recompute", "state", "weights", "providers"])
def test_a_change_that_the_graph_has_built_in(change):
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)

    def steps(count):
        for x, y in batches(count):
            plain_step(other, plain, x, y)
            step(x, y)

    steps(5)
    saved = copy.deepcopy((step.state_dict(), plain.state_dict()))
    steps(3)
    for n in (net, other):
        if change == "eval":
            n.primary.layer1_0.eval()
        elif change == "freeze":
            next(n.parameters()).requires_grad_(False)
        elif change == "recompute":
            n.recompute = "all"
        elif change == "weights":
            for p in n.parameters():
                p.data = p.detach().clone()
    if change == "providers":
        step._graphs.outdate()
    if change == "state":
        step.load_state_dict(saved[0])
        plain.load_state_dict(saved[1])
    steps(1)
    assert not step.graphed
    steps(4)
    assert step.graphed and OperatorTape.made == 2
    assert_same_state(net, other)


def test_gradients_of_several_calls_have_a_graph_for_each_kind_of_call():
    net, other = twins()
    ours, theirs = LocalStep(net, sgd, accumulate=3), LocalStep(other, sgd, accumulate=3, graph=False)
    for x, y in batches(15):
        ours(x, y)
        theirs(x, y)
    assert ours.graphed and OperatorTape.made == 2
    assert_same_state(net, other)


@pytest.mark.parametrize("options", [{"clip_norm": 0.1}, {"clip_norm": 0.1, "clip": "global"}, {"params": "groups"}])
def test_options_of_the_step_are_captured(options):
    net, other = twins()
    steps = []
    for n, graph in ((net, True), (other, False)):
        mine = dict(options)
        if "params" in mine:
            parameters = list(n.parameters())
            mine["params"] = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.25}]
        steps.append(LocalStep(n, sgd, graph="auto" if graph else False, **mine))
    for x, y in batches(7):
        for step in steps:
            step(x, y)
    assert steps[0].graphed
    assert_same_state(net, other)


def host_read(module, args, out):
    return out * (1.0 if float(out.detach().sum()) == float("inf") else 1.0)


def test_a_step_that_waits_for_the_device_is_found_before_it_is_captured():
    net, other = twins()
    for n in (net, other):
        n.local_modules[1].layers[0].register_forward_hook(host_read)
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for x, y in batches(7):
        plain_step(other, plain, x, y)
        step(x, y)
    assert not step.graphed and OperatorTape.made == 0
    line = inspect.getsourcelines(host_read)[1] + 1
    assert f"local module 1 waits for the device ({__file__}:{line})" in step.eager_reason
    assert_same_state(net, other)


def test_a_required_graph_of_a_step_that_waits_raises_and_changes_nothing():
    net = small()
    net.local_modules[1].layers[0].register_forward_hook(host_read)
    step = LocalStep(net, sgd, graph=True)
    stream = batches(4)
    for _ in range(3):
        step(*next(stream))
    before = copy.deepcopy(net.state_dict())
    x, y = next(stream)
    for _ in range(2):
        with pytest.raises(GraphCaptureError, match='local module 1 .*graph="auto"'):
            step(x, y)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.parameters())


def broken_capture(module, args, out):
    if OperatorTape.recording:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_norm": 0.1, "clip": "global"}], ids=str)
def test_a_capture_that_fails_leaves_the_step_eager_and_exact(options):
    net, other = twins()
    net.local_modules[1].layers[0].register_forward_hook(broken_capture)
    step, eager = LocalStep(net, sgd, **options), LocalStep(other, sgd, graph=False, **options)
    for x, y in batches(9):
        eager(x, y)
        step(x, y)
    assert not step.graphed and OperatorTape.made == 1
    assert "capturing local module 1 failed" in step.eager_reason and "not permitted" in step.eager_reason
    assert_same_state(net, other)


def test_a_required_graph_whose_capture_fails_raises_and_changes_nothing():
    net = small()
    net.local_modules[1].layers[0].register_forward_hook(broken_capture)
    step = LocalStep(net, sgd, graph=True)
    stream = batches(4)
    for _ in range(3):
        step(*next(stream))
    before = copy.deepcopy(net.state_dict())
    x, y = next(stream)
    for _ in range(2):
        with pytest.raises(GraphCaptureError, match='local module 1 .*graph="auto"'):
            step(x, y)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("hook", [host_read, broken_capture], ids=["waits", "fails"])
def test_a_last_batch_that_cannot_be_captured_runs_eagerly_beside_the_graph(hook):
    net, other = twins()
    for n in (net, other):
        n.local_modules[1].layers[0].register_forward_hook(lambda *args: hook(*args) if len(args[2]) == 3 else None)
    plain, step = sgd(other.parameters()), LocalStep(net, sgd, graph=True)
    graphed = []
    for _ in range(4):
        for n in (6, 6, 6, 6, 3):
            x, y = next(batches(1, n))
            plain_step(other, plain, x, y)
            step(x, y)
            graphed.append(step.graphed)
    assert graphed == [False] * 3 + [True, False] + 3 * ([True] * 4 + [False])
    assert "local module 1" in step.eager_reason
    assert_same_state(net, other)


class HostCount(torch.optim.Optimizer):
    """Counts its steps in Python, as optimizers of one's own often do; draws random numbers as it steps."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.125})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    p.sub_(group["lr"] * p.grad / state["step"] * (1 + torch.rand(())))


class Average(torch.optim.Optimizer):
    """Weighs its steps by what it counts in an attribute."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.125})
        self.count = 0

    @torch.no_grad()
    def step(self):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / self.count)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Average, "Average keeps attribute 'count'"),
        (lambda params: torch.optim.SGD(params, lr=0.1, fused=False), "SGD waits for the device"),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True), "SGD waits for the device"),
        (HostCount, "HostCount keeps state 'step'"),
    ],
    ids=["count in an attribute", "for-loop", "foreach", "count in the state"],
)
def test_an_optimizer_that_a_graph_cannot_hold_is_found_before_the_capture(make, reason):
    net, other = twins()
    step, eager = LocalStep(net, make), LocalStep(other, make, graph=False)
    for index, (x, y) in enumerate(batches(6)):
        for one in (eager, step):
            torch.manual_seed(index)
            one(x, y)
    assert not step.graphed and reason in step.eager_reason
    assert OperatorTape.made == 0
    assert_same_state(net, other)


def test_labels_out_of_range_are_reported_a_call_later():
    net = small()
    step = LocalStep(net, sgd)
    x, y = next(batches(1))
    for _ in range(5):
        step(x, y)
    assert step.graphed
    wrong = y.clone()
    wrong[1:3] = 10
    step(x, wrong)
    with pytest.raises(ValueError, match="2 targets of earlier batches"):
        step(x, y)
    step(x, y)
    with pytest.raises(TypeError, match="int64"):
        step(x, y.float())


def test_dropout_is_captured_only_where_nothing_is_recomputed(monkeypatch):
    position = iter(range(10**6))
    monkeypatch.setattr("auglocal_ext.step.local_step._random_position", lambda device: next(position))
    for recompute, graphed in (("none", True), ("all", False)):
        step = LocalStep(small(), sgd, recompute=recompute)
        for x, y in batches(5):
            step(x, y)
        assert step.graphed is graphed
    assert "random" in step.eager_reason
    step.net.recompute = "none"
    for x, y in batches(5):
        step(x, y)
    assert step.graphed
