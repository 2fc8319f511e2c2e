"""SOLO: auxiliary networks that read the network's final readout, against the formula written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from language import LENGTH, VOCABULARY, WIDTH, decoder, literal_loss, tokens, wrapped
from torch import nn

from auglocal_ext import SOLO, AugLocal, Classification, LocalSequential, LocalStep, models
from auglocal_ext.cost import count_parameters
from auglocal_ext.nn import eager_type

READOUTS = ["shared", "private", "random"]


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


def readout_of(net):
    return net.primary[-1]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("recompute", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_formula(readout, recompute):
    net = wrapped(SOLO(readout=readout), [0, 2], decoder(bias=True).double(), recompute=recompute)
    with torch.no_grad():
        for auxiliary in net.auxiliary:
            auxiliary.head.scale.fill_(0.7)
    x, y = tokens()
    losses, h = [], x
    for module in net.local_modules[:-1]:
        out = module(h)
        block_0, block_1 = module.auxiliary.blocks
        head = module.auxiliary.head
        linear = readout_of(net) if readout == "shared" else head.own
        read = head.scale * head.norm(block_1(block_0(out)))
        losses.append(literal_loss(F.linear(read, linear.weight.detach(), linear.bias.detach()), y))
        if readout == "private":
            losses[-1] = literal_loss(F.linear(read, linear.weight, linear.bias), y)
        h = out.detach()
    losses.append(literal_loss(net.local_modules[-1](h), y))
    parameters = [p for p in net.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum(losses), parameters)
    out = net(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.module_losses, torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("readout", READOUTS)
def test_each_loss_trains_its_own_module_alone(readout):
    net = wrapped(SOLO(readout=readout), [1, 2])
    x, y = tokens()
    everything = {name: p for name, p in net.named_parameters() if p.requires_grad}
    h = x
    for module in net.local_modules:
        out = module(h)
        grads = torch.autograd.grad(module.local_loss(out, y), list(everything.values()), allow_unused=True)
        trained = {name for name, grad in zip(everything, grads, strict=True) if grad is not None}
        mine = {id(p) for p in module.parameters() if p.requires_grad}
        assert trained == {name for name, p in everything.items() if id(p) in mine}
        h = out.detach()


def test_parameters_of_each_kind_of_readout():
    """Two blocks, a norm and a scale; a readout of its own where it is private."""
    block = count_parameters(decoder()[1])
    own = 2 * block + WIDTH + 1
    for readout, trained, held in (("shared", 0, 0), ("private", 1, 1), ("random", 0, 1)):
        (auxiliary,) = wrapped(SOLO(readout=readout), [1]).auxiliary
        assert count_parameters(auxiliary) == own + trained * VOCABULARY * WIDTH
        assert sum(p.numel() for p in auxiliary.parameters()) == own + held * VOCABULARY * WIDTH
        assert eager_type(auxiliary.head.norm) is nn.RMSNorm


def test_no_blocks_leave_norm_and_scale():
    net = wrapped(SOLO(blocks=0), [1])
    (auxiliary,) = net.auxiliary
    assert count_parameters(auxiliary) == WIDTH + 1
    net(*tokens()).loss.backward()


def test_a_shared_readout_is_read_as_it_was():
    """With every and lag, against a plain list of what it was when each step began."""
    for every, lag in ((1, 0), (3, 0), (3, 2)):
        net = wrapped(SOLO(every=every, lag=lag), [1])
        head, step, began = net.auxiliary[0].head, LocalStep(net, sgd), []
        for u in range(7):
            began.append(readout_of(net).weight.detach().clone())
            for followed in net.local_modules[0].followed:
                followed.begin()
            seen = head.readout.weight
            assert torch.equal(seen, began[max(0, (u - lag) // every * every)]) and not seen.requires_grad
            step(*tokens(seed=u))


def test_a_random_readout_stays_and_a_private_one_learns():
    for readout, moves in (("random", False), ("private", True)):
        net = wrapped(SOLO(readout=readout), [1])
        step, before = LocalStep(net, sgd), net.auxiliary[0].head.own.weight.detach().clone()
        scale = net.auxiliary[0].head.scale.detach().clone()
        step(*tokens())
        assert torch.equal(net.auxiliary[0].head.own.weight, before) == (not moves)
        assert not torch.equal(net.auxiliary[0].head.scale, scale)


def test_no_output_depends_on_later_tokens():
    net = wrapped(SOLO(), [1])
    x, _ = tokens()
    later = x.clone()
    later[:, 5:] = (x[:, 5:] + 1) % VOCABULARY
    module = net.local_modules[0]
    first, second = (module.auxiliary(module(each)) for each in (x, later))
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5:], second[:, 5:])


def test_no_logits_and_no_gradient_of_a_shared_readout_are_made():
    net = wrapped(SOLO(), [1])
    readout_of(net).requires_grad_(False)  # so that the last module makes none either
    x, y = tokens()
    sizes = set()

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "linear_cross_entropy" in str(function):
                sizes.update(each.numel() for each in out)
            return out

    with Made():
        net(x, y).loss.backward()
    assert sizes == {0, 1, 3 * LENGTH * WIDTH}


@pytest.mark.slow
def test_it_learns():
    net = wrapped(SOLO(), [1])
    step = LocalStep(net, lambda params: torch.optim.AdamW(params, lr=3e-2))
    x = torch.arange(LENGTH).expand(4, LENGTH) % VOCABULARY
    for _ in range(40):
        out = step(x, (x + 1) % VOCABULARY)
    assert bool((net.task.measure(out.module_counts, net.task.counted(x)) < 2).all())


def test_classification_of_tokens():
    torch.manual_seed(3)
    layers = decoder()
    net = LocalSequential(
        nn.Sequential(*layers[:-1], Pool(), nn.Linear(WIDTH, 4)),
        SOLO(),
        task=Classification(4),
        modules=2,
        example_input=torch.zeros(1, LENGTH, dtype=torch.int64),
    )
    out = net(tokens()[0], torch.tensor([0, 1, 3]))
    out.loss.backward()
    assert out.output.shape == (3, 4) and net.auxiliary[0].head.scale.grad is not None


class Pool(nn.Module):
    def forward(self, h):
        return h.mean(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SOLO(readout="borrowed"), "readout"),
        (lambda: SOLO(readout="private", every=3), "are of a shared readout"),
        (lambda: SOLO(every=0), "every"),
        (lambda: LocalSequential(models.resnet_cifar(8), SOLO(), 10, (3, 32, 32)), "reads tokens"),
        (lambda: wrapped(SOLO(), 2, nn.Sequential(*decoder(), nn.Tanh())), "ends in something else"),
        (lambda: wrapped(AugLocal(depth=2, head=SOLO()), 2), "Make it the outer rule"),
    ],
    ids=["readout", "private", "every", "images", "end", "head"],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
