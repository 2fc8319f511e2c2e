"""What is easily wrong without a word, dropped or refused misleadingly: right, or refused with the way out."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import (
    DGL,
    MAN,
    AugLocal,
    Balanced,
    ContSup,
    ConvHead,
    Greedy,
    InfoPro,
    LocalSequential,
    LocalStep,
    PredSim,
    models,
)
from auglocal_ext.auxiliary import Auxiliary
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.rules import Rule

WEIGHTS = ((5.0, 0.5), (0.5, 1.0))


def network(rule, modules=None, **options):
    torch.manual_seed(3)
    return LocalSequential(models.resnet_cifar(14, width=4), rule, 10, (3, 16, 16), modules=modules, **options)


def batch(n=6):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, 3, 16, 16, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


# Settings that were dropped

RECOMPUTING = {
    "infopro contrast": InfoPro(*WEIGHTS, loss="contrast"),
    "infopro": InfoPro(*WEIGHTS),
    "man": MAN(),
    "dgl": DGL("cnn"),
    "predsim": PredSim(head="1c2f"),
    "man + infopro": MAN(head=InfoPro(*WEIGHTS, loss="contrast")),
}


@pytest.mark.parametrize("rule", RECOMPUTING.values(), ids=RECOMPUTING)
def test_every_auxiliary_network_recomputes(rule):
    """Fewer bytes, the same numbers to the bit."""

    def kept(recompute):
        """Bytes that the auxiliary network's loss holds for its backward, beside the module's output."""
        with FakeTensorMode():
            layers = models.resnet_cifar(14, width=16)
            net = LocalSequential(layers, rule, 10, (3, 32, 32), modules=[0], recompute=recompute)
            x, y = torch.empty(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64)
            h = torch.empty(64, 16, 32, 32, requires_grad=True)
            with MemoryMeter() as meter:
                meter.track(net, x, y, h)
                before = meter.live_bytes
                loss = net.local_modules[0].local_loss(h, y, x)
                return meter.live_bytes - before, loss.shape

    assert kept("auxiliary")[0] < 0.5 * kept("none")[0]

    nets = [network(rule, recompute=recompute) for recompute in ("none", "auxiliary", "all")]
    plain, *others = [(net(*batch()), net) for net in nets]
    for out, _ in (plain, *others):
        out.loss.backward()
    for out, net in others:
        assert torch.equal(out.module_losses, plain[0].module_losses)
        for ours, theirs in zip(net.parameters(), plain[1].parameters(), strict=True):
            assert ours.grad is None and theirs.grad is None or torch.equal(ours.grad, theirs.grad)
        for ours, theirs in zip(net.buffers(), plain[1].buffers(), strict=True):
            assert torch.equal(ours, theirs)


def test_recomputation_set_later_reaches_every_part():
    net = network(MAN(head=InfoPro(*WEIGHTS, head=DGL("cnn"))))
    net.recompute = ["auxiliary", "none", *["none"] * 5]
    momentum = net.auxiliary[0]
    parts = [momentum, momentum.head, momentum.head.network, momentum.head.network.head, momentum.head.terms[0]]
    assert all(part.settings.recompute for part in parts)
    assert not any(part.settings.recompute for part in net.auxiliary[1].modules() if hasattr(part, "settings"))
    net.recompute = "none"
    assert not any(part.settings.recompute for part in parts)


class Forgetful(Auxiliary):
    """Of one's own: it says nothing of recomputation."""

    def __init__(self, settings, width):
        super().__init__(settings)
        self.linear = nn.Linear(width, settings.task.outputs)

    def forward(self, h):
        return self.linear(h.mean((2, 3)))

    def loss(self, h, context):
        return self.settings.task.score(self(h), context.target)


class Own(Rule):
    def build_auxiliary(self, network, module):
        return Forgetful(network.settings(module), network.features(module).channels)


def test_a_part_that_cannot_honour_a_setting_says_so_when_it_is_built():
    with pytest.raises(ValueError, match="Forgetful cannot recompute.*can_recompute = True"):
        network(Own(), recompute="auxiliary")
    net = network(Own())
    with pytest.raises(ValueError, match="Forgetful cannot recompute"):
        net.recompute = "all"
    assert net.recompute == ("none",) * 7 and not net.auxiliary[0].settings.recompute
    with pytest.raises(ValueError, match="contrastive loss cannot smooth labels"):
        network(InfoPro(*WEIGHTS, loss="contrast"), label_smoothing=0.1)
    with pytest.raises(TypeError, match="SimilarityLoss is built with LossSettings, got 10"):
        from auglocal_ext.auxiliary import SimilarityLoss
        from auglocal_ext.layers import vectors

        SimilarityLoss(vectors(3), 10)


def test_the_ignored_label_reaches_every_loss_that_looks_at_labels():
    """In eval mode, where samples do not influence each other, ignored ones might as well not be there."""
    x, y = batch(8)
    y[2:4] = 7
    kept = torch.tensor([0, 1, 4, 5, 6, 7])
    for rule in (AugLocal(2), PredSim(limit=64), InfoPro((0, 1), (0, 1), loss="contrast"), MAN(head="0c2f")):
        net = network(rule, ignore_index=7).eval()
        y_kept = y[kept].clone()
        y_kept[y_kept == 7] = 0
        everyone = y.clone()
        everyone[[i for i in kept.tolist() if everyone[i] == 7]] = 0
        torch.testing.assert_close(net(x, everyone).module_losses, net(x[kept], y_kept).module_losses)


@pytest.mark.parametrize("rule", [AugLocal(2), ContSup("R1E"), DGL(), MAN(), Greedy()], ids=repr)
def test_label_smoothing_reaches_every_auxiliary_network(rule):
    net = network(rule, label_smoothing=0.3).eval()
    x, y = batch()
    h, history = x, []
    for module in net.local_modules:
        h = module(h, history).detach()
        logits = h if module.auxiliary is None else module.auxiliary(h)
        expected = F.cross_entropy(logits, y, label_smoothing=0.3)
        torch.testing.assert_close(module.local_loss(h, y, x), expected)
        assert (expected - F.cross_entropy(logits, y)).abs() > 1e-4


def test_options_of_a_head():
    with pytest.raises(ValueError, match="ContSup.*cannot be a head: it supplies modules with context"):
        ContSup("R1", head=ContSup("E"))
    net = network(ContSup("R0", head=ContSup("R0", head="0c1f")))
    assert len(net.context) == 0 and net.auxiliary[0].head.linear.in_features == 4
    wide = network(ContSup("E", widen=2))
    assert wide.context["1"].image.encoder[0].out_channels == 24
    assert (
        wide.auxiliary[0].blocks[0].conv.out_channels == 16
        and network(ContSup("E")).context["1"].image.encoder[0].out_channels == 12
    )
    own = network(ContSup("E", head=ConvHead("1c2f", widen=2), widen=3))
    assert own.context["1"].image.encoder[0].out_channels == 36 and own.auxiliary[0].blocks[0].conv.out_channels == 16
    for options in ({"widen": 2.0, "context": "R1"}, {"feature_dim": 64}):
        with pytest.raises(ValueError, match="is read by nothing here: head=.* has options of its own"):
            ContSup(head=AugLocal(2), **options)


def test_the_weight_of_the_last_loss_is_the_heads():
    """PredSim weights the last cross-entropy by 1 - beta, as a head too."""
    assert ContSup("R0", head=PredSim(beta=0.75)).classifier_weight == 0.25
    assert MAN(head=PredSim(beta=0.75, scale_classifier=False)).classifier_weight == 1
    net = network(ContSup("R0", head=PredSim(beta=0.75)))
    out = net(*batch())
    torch.testing.assert_close(out.module_losses[-1], 0.25 * F.cross_entropy(out.output, batch()[1]))


# One task: class indices


def test_binary_labels_and_soft_ones():
    layers = models.resnet_cifar(8, num_classes=1, width=4)
    with pytest.raises(ValueError, match="cross-entropy over one class is 0 whatever the network does.*task=Binary"):
        LocalSequential(layers, Greedy(), 1, (3, 16, 16))
    net = network(AugLocal(2))
    x, y = batch()
    soft = F.one_hot(y, 10).float()
    torch.testing.assert_close(net.eval()(x, soft).module_losses, net(x, y).module_losses)
    assert torch.equal(net(x, soft).module_counts, net(x, y).module_counts)
    for rule in (PredSim(), InfoPro(*WEIGHTS, loss="contrast"), MAN(head=PredSim())):
        with pytest.raises(TypeError, match="needs class indices .N,., int64; got class probabilities"):
            network(rule)(x, soft)


def test_backpropagation_taken_for_local_learning_warns_once():
    net = network(AugLocal(2))
    x, y = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)
        with torch.no_grad():
            net(x)
        net(x, y).loss.backward()
        F.cross_entropy(net.primary(x), y).backward()  # meant
        F.cross_entropy(net.eval()(x), y).backward()  # as for a saliency map
        F.cross_entropy(network(AugLocal(2), modules=1)(x), y).backward()
    net.train()
    with pytest.warns(UserWarning, match="net.x. in training mode is ordinary backpropagation.*net.x, y.") as record:
        F.cross_entropy(net(x), y).backward()
        F.cross_entropy(net(x), y).backward()
    assert len(record) == 1


def test_the_output_in_training_mode_is_like_any_other(tmp_path):
    net = network(AugLocal(2))
    out = net(batch()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(out, tmp_path / "out.pt")
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None and out.requires_grad


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", [Greedy(), ContSup("R1E"), InfoPro(*WEIGHTS)], ids=repr)
def test_balanced_modules_of_any_dtype(rule, dtype):
    layers = models.resnet_cifar(14, width=4).to(dtype)
    net = LocalSequential(layers, rule, 10, (3, 16, 16), modules=Balanced(3))
    assert net.num_modules == 3 and {p.dtype for p in net.parameters()} == {dtype}
    assert net.network.ends == network(rule, Balanced(3)).network.ends


@pytest.mark.parametrize("depth", [14, 20, 26])
@pytest.mark.parametrize("modules", [2, 3, 4, 5])
def test_balanced_cuts_do_not_depend_on_fused(depth, modules):
    def ends(fused):
        layers = models.resnet_cifar(depth, width=4)
        net = LocalSequential(layers, ContSup("R1E"), 10, (3, 16, 16), modules=Balanced(modules), fused=fused)
        assert any("Fused" in type(m).__name__ for m in net.primary) == fused
        return net.network.ends

    assert ends(True) == ends(False)


def test_accumulated_thirds_of_doubles():
    net, twin = (network(Greedy(), fused=False).double() for _ in range(2))
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=1.0), accumulate=3)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    x, y = batch()
    for _ in range(3):
        step(x.double(), y)
        (twin(x.double(), y).loss / 3).backward()
    optimizer.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_clipping_is_of_unscaled_gradients():
    """A clipped step with a loss scaler is the step without one: the norm is that of gradients before the scale."""
    nets = [network(Greedy(), fused=False) for _ in range(2)]
    scalers = (None, torch.amp.GradScaler("cpu", init_scale=1024.0))
    for clip in ("module", "global"):
        x, y = batch()
        for net, scaler in zip(nets, scalers, strict=True):
            LocalStep(net, sgd, clip_norm=0.05, clip=clip, grad_scaler=scaler)(x, y)
        for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# Isolation and context, seen from inside


def test_what_a_module_is_fed_carries_no_graph():
    net = network(ContSup("R2E"))
    fed = []
    for child in net.primary:
        child.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    context = []
    for supply in net.context.values():
        supply.register_forward_pre_hook(lambda _, args: context.append((args[0], list(args[1]))))
    net(*batch())
    assert len(fed) == 8 and len(context) == 6
    starts = fed[:1]  # of the others the input is merged with context, which has a graph of its own encoders
    assert not any(h.requires_grad for h in starts)
    for k, (h, history) in enumerate(context, 1):
        kept = [t for t in history if t is not None]
        assert len(kept) == min(k, 3) and not h.requires_grad and not any(t.requires_grad for t in kept)


@pytest.mark.parametrize("rule", [Greedy(), AugLocal(2)], ids=repr)
def test_the_pass_detaches_between_modules(rule):
    net = network(rule, fused=False)
    fed = []
    for module in net.local_modules:
        module.layers[0].register_forward_pre_hook(lambda _, args: fed.append(args[0].requires_grad))
    net(*batch())
    assert fed == [False] * net.num_modules


def test_supplied_inputs_are_merged_ones():
    """R1 of module 2 reads what module 1 was fed: the output of module 0 with its own context added."""
    net = network(ContSup("R1"), fused=False).eval()
    x, y = batch()
    seen = {}

    def note(name):
        return lambda _, args, *out: seen.__setitem__(name, out[0] if out else args[0])

    net.context["2"].inputs[0].register_forward_pre_hook(note("supplied"))
    net.primary[1].register_forward_pre_hook(note("fed"))
    net.primary[0].register_forward_hook(note("unmerged"))
    net(x, y)
    assert torch.equal(seen["supplied"], seen["fed"]) and not torch.equal(seen["supplied"], seen["unmerged"])
