"""What is looked at before every replay: that it sees each change, and that it runs no bytecode per parameter."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from step_nets import small
from torch import nn

from auglocal_ext import AugLocal, LocalSequential, models
from auglocal_ext.step import LocalStep
from auglocal_ext.step.built_in import NetworkState


def state_of(net, gradients=False):
    return NetworkState(list(net.modules()), list(net.parameters()), gradients)


def change_eval(net):
    list(net.modules())[-1].eval()


def change_freeze(net):
    list(net.parameters())[-1].requires_grad_(False)


def change_memory(net):
    parameter = next(net.parameters())
    parameter.data = parameter.detach().clone()


@pytest.mark.parametrize("change", [change_eval, change_freeze, change_memory])
@pytest.mark.parametrize("copied", [False, True], ids=["", "in a copy"])
def test_each_change_is_seen(change, copied):
    net = small()
    state = state_of(net)
    if copied:
        net, state = copy.deepcopy((net, state))
    before = state.read()
    assert state.read() == before
    change(net)
    assert state.read() != before


def test_gradients_are_looked_at_where_they_stay():
    net = small()
    states = [state_of(net, gradients) for gradients in (False, True)]
    before = [state.read() for state in states]
    parameter = next(net.parameters())
    parameter.grad = torch.zeros_like(parameter)
    assert [state.read() == old for state, old in zip(states, before, strict=True)] == [True, False]
    first = states[1].read()
    parameter.grad = parameter.grad.clone()
    assert states[1].read() != first


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_modules_are_looked_at():
    net = nn.Sequential(torch.jit.script(nn.Dropout()), nn.Linear(2, 2))
    state = state_of(net)
    before = state.read()
    net[0].eval()
    assert state.read() != before


def instructions(function):
    """How many bytecode instructions ``function()`` runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    for _ in range(2):  # Python 3.12 tells of instructions from the second trace of a process on
        count = 0
        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(before)
    return count


def test_the_look_before_a_replay_does_not_grow_with_the_network():
    """Instructions instead of time: a network of ten times as many parameters takes as many."""
    counts = []
    for blocks in (8, 50):
        net = LocalSequential(models.resnet_cifar(blocks, width=2), AugLocal(2), 10, (3, 8, 8))
        step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1))
        counts.append(
            (instructions(lambda step=step: step._built_in(torch.device("cpu"))), len(list(net.parameters())))
        )
    (short, few), (deep, many) = counts
    assert many > 5 * few
    assert short == deep < 300
