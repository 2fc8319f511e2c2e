"""What is easily wrong without a word, dropped or refused misleadingly: right, or refused with the way out."""

from __future__ import annotations

import copy
import gc
import os
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
from auglocal_ext.auxiliary import Auxiliary, LossContext, Term
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.rules import LinearHead, Rule

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


# Networks that rules did not know


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


@pytest.mark.parametrize(
    "tail",
    [
        lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)],
        lambda: [nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(16 * 64, 10)],
        lambda: [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(16, 10)],
        lambda: [nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(16, 10))],
        lambda: [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))],
    ],
)
def test_man_copies_no_tail_of_pooling_and_flatten(tail):
    layers = nn.Sequential(*list(convolutions())[:-3], *tail())
    net = LocalSequential(layers, MAN(), 10, (3, 16, 16))
    last = net.auxiliary[-1]
    assert last.trained(torch.randn(2, 8, 16, 16)).shape == (2, 16, 16, 16)
    assert [type(m).__name__ for m in last.trained.modules() if not list(m.children())] == ["Conv2d", "ReLU"]
    x, y = batch()
    step = LocalStep(net, sgd)
    before = [p.clone() for p in last.average.parameters()]
    assert step(x, y).loss.isfinite() and step(x, y).loss.isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, last.average.parameters(), strict=True))


def test_man_copies_no_tail_inside_a_child():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 10),
    )
    net = LocalSequential(layers, MAN(), 10, (3, 16, 16))
    assert net.auxiliary[0].trained(torch.randn(2, 8, 14, 14)).shape == (2, 8, 12, 12)
    assert net.auxiliary[0]._followed.layers[0][0][0] is layers[1][0]


def test_man_in_the_middle_of_a_network_keeps_its_pooling():
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 10)),
    )
    net = LocalSequential(layers, MAN(head="linear"), 10, (3, 16, 16))
    shapes = [a.trained(torch.randn(2, *net.network.layers[k].shape)).shape[1:] for k, a in enumerate(net.auxiliary)]
    assert shapes == [(8, 8, 8), (8, 6, 6), (12,)]  # the flatten before the linear layer is left out


def test_man_of_fake_tensors():
    with FakeTensorMode():
        net = network(MAN())
        out = net(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
        out.loss.backward()
    assert out.output.shape == (4, 10)
    with torch.device("meta"):
        assert network(MAN()).num_modules == 7


def sound():
    return nn.Sequential(
        *(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def volumes():
    return nn.Sequential(
        *(nn.Conv3d(2, 6, 2), nn.ReLU(), nn.Conv3d(6, 6, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 10)),
    )


class Mixer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.norm(x)) + x.mean(1, keepdim=True)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def tokens():
    return nn.Sequential(nn.Linear(6, 8), Mixer(8), Mixer(8), Mean(), nn.Linear(8, 10))


def last_axis_maps():
    return nn.Sequential(
        nn.Linear(6, 8), Mixer(8), Mixer(8), nn.LayerNorm(8), nn.Flatten(1, 2), Mean(), nn.Linear(8, 10)
    )


OTHERS = {
    "sound": (sound, (2, 20)),
    "volumes": (volumes, (2, 6, 5, 4)),
    "tokens": (tokens, (5, 6)),
    "channels last": (last_axis_maps, (4, 5, 6)),
}
RULES_OF_ANYTHING = [
    Greedy(),
    AugLocal(depth=1, joint_tail=False),
    ContSup("R0", head="0c1f"),
    ContSup("R0", head="0c2f"),
    PredSim(limit=16),
    PredSim(head="linear"),
    MAN(head="linear"),
    Greedy("vgg"),
]


@pytest.mark.parametrize("rule", RULES_OF_ANYTHING, ids=repr)
@pytest.mark.parametrize("name", OTHERS)
def test_features_that_are_no_channels_first_images(name, rule):
    """Every module's own output is read along its channels."""
    make, shape = OTHERS[name]
    torch.manual_seed(0)
    layers = make()
    net = LocalSequential(layers, rule, 10, shape).double()
    x, y = torch.randn(6, *shape).double(), torch.randint(0, 10, (6,))
    out = net(x, y)
    out.loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    linear = next((m for m in net.auxiliary[0].modules() if isinstance(m, nn.Linear) and m.out_features == 10), None)
    if rule in RULES_OF_ANYTHING[:3]:
        module = net.local_modules[0]
        h = module(x)
        channels = h.flatten(2).mean(2) if name in ("sound", "volumes") else h.flatten(1, -2).mean(1)
        torch.testing.assert_close(module.local_loss(h, y), F.cross_entropy(linear(channels), y))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Greedy("1c2f"), "head '1c2f' needs feature maps with height and width.*'0c1f' or '0c2f'"),
        (DGL(), "DGL's heads pool feature maps with height and width.*or Greedy"),
        (InfoPro(*WEIGHTS), "InfoPro reconstructs images from feature maps with height and width.*Greedy"),
        (ContSup("R1", head="0c1f"), "encoded by 2-D convolutions and needs images and feature maps, not"),
        (ContSup("E", head="0c1f"), "encoded by 2-D convolutions and needs images and feature maps, not"),
        (
            AugLocal(2, joint_tail=False, sampling="conv3x3"),
            "sampling='conv3x3' makes convolutions, but .* is fed with",
        ),
    ],
)
@pytest.mark.parametrize("name", ["sound", "volumes", "tokens"])
def test_rules_of_images_refuse_other_features(name, rule, message):
    make, shape = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        LocalSequential(make(), rule, 10, shape)


def halving():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "context", "fused"),
    [
        (halving, "R1E", True),
        *((lambda: models.resnet_cifar(14, width=4), *case) for case in (("R1E", False), ("R1E", True), ("R2", False))),
    ],
)
def test_a_compiled_network_with_context(make, context, fused):
    torch.manual_seed(3)
    net = LocalSequential(make(), ContSup(context), 10, (3, 16, 16), fused=fused).eval()
    x, _ = batch()
    with torch.no_grad():
        expected = net(x)
        torch._dynamo.reset()
        compiled = torch.compile(net)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(x[:3]), expected[:3], rtol=1e-4, atol=1e-4)


# Several processes


@pytest.fixture
def process_group(request):
    """A process group of the asked size whose other processes are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("process_group", [2], indirect=True)
def test_a_step_among_several_processes_is_refused(process_group):
    with pytest.raises(RuntimeError, match="one of 2 processes, and without mesh= .*mesh_dim_names="):
        LocalStep(network(Greedy()), sgd)


def test_a_step_that_comes_to_be_among_several_processes_is_refused():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    step = LocalStep(network(Greedy()), sgd)
    step(*batch())
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RuntimeError, match="one of 2"):
            step(*batch())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("process_group", [1], indirect=True)
def test_one_process_of_a_group_steps(process_group):
    assert LocalStep(network(Greedy()), sgd)(*batch()).loss.isfinite()


def _shard(parts, one_by_one):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in list(parts) if one_by_one else [parts]:
        fully_shard(part, mesh=mesh)


SHARDED = "parameters of this network are sharded.*Leave fully_shard"


@pytest.mark.parametrize("process_group", [2], indirect=True)
@pytest.mark.parametrize("which", ["one by one", "the network"])
def test_sharded_layers_are_refused(process_group, which):
    net = network(MAN(), fused=False)
    _shard(net.primary if which == "one by one" else net, which == "one by one")
    with pytest.raises(RuntimeError, match=SHARDED):
        net(*batch())
    if which == "one by one":
        with pytest.raises(RuntimeError, match="MAN's average cannot follow a block whose parameters are sharded"):
            net.local_modules[0].after_step()


@pytest.mark.parametrize("process_group", [2], indirect=True)
@pytest.mark.parametrize("rule", [Greedy(), MAN()], ids=repr)
@pytest.mark.parametrize("one_by_one", [True, False])
def test_layers_that_were_sharded_before_are_refused(process_group, rule, one_by_one):
    layers = models.resnet_cifar(14, width=4)
    _shard(layers, one_by_one)
    with pytest.raises(RuntimeError, match=SHARDED):
        LocalSequential(layers, rule, 10, (3, 16, 16))


@pytest.mark.parametrize("process_group", [1], indirect=True)
def test_layers_in_fullyshardeddataparallel_are_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = network(Greedy(), fused=False)
    net.primary[1] = FullyShardedDataParallel(net.primary[1], use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=SHARDED):
        net(*batch())
    with pytest.raises(RuntimeError, match=SHARDED):
        LocalSequential(net.primary, Greedy(), 10, (3, 16, 16))
    other = network(Greedy())
    other.primary[1] = nn.Identity()  # fewer parameters are not sharded ones
    other(*batch())


def test_a_list_of_layers_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"must be an nn.Sequential .* got list; nn.Sequential\(\*layers\) makes one"):
        LocalSequential([nn.Linear(3, 4), nn.Linear(4, 10)], Greedy(), 10, (3,))


def test_wrapped_networks_and_optimizers_that_are_none():
    net = network(Greedy())
    with pytest.raises(TypeError, match="net must be a LocalSequential, got Sequential; wrap the network first"):
        LocalStep(net.primary, sgd)
    with pytest.raises(TypeError, match="optimizer must be a function .*lambda params: torch.optim.SGD.*got SGD"):
        LocalStep(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be a function .* got str"):
        LocalStep(net, "sgd")


def _in_ddp(rank, path):
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=1)
    try:
        LocalStep(DistributedDataParallel(network(Greedy())), sgd)
    except TypeError as error:
        assert "hand the step the network itself, and mesh=" in str(error), error
    else:
        raise AssertionError("not refused")
    os._exit(0)  # gloo's threads sometimes abort a process that tears them down on a busy machine


def test_a_step_around_ddp_is_refused_with_the_way_out(tmp_path):
    import torch.multiprocessing as mp

    mp.spawn(_in_ddp, (str(tmp_path / "meeting"),), nprocs=1)


def test_data_parallel_is_refused_with_the_way_out():
    net = network(Greedy())
    replica = net._replicate_for_data_parallel()  # what DataParallel calls on each of several GPUs
    with pytest.raises(RuntimeError, match="no parameters of their own.*DistributedDataParallel"):
        replica(*batch())
    assert replica.eval()(batch()[0]).shape == (6, 10)
    with pytest.raises(TypeError, match="got DataParallel; hand the step the network itself"):
        LocalStep(nn.DataParallel(net), sgd)


# Words that misled


def test_a_network_too_shallow():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(ValueError, match="the network has one layer, which leaves none to be trained locally$"):
        LocalSequential(layers, AugLocal(2), 10, (3, 2, 2))


def test_a_layer_of_several_convolutions():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    net = LocalSequential(layers, AugLocal(2, joint_tail=False), 10, (3, 16, 16))
    assert net.network.layers[1].what == "a run of 2 layers with weights (Conv2d, Conv2d)"
    assert repr(net.auxiliary[0].blocks[0]) == repr(layers[1])


class Squash(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("odd", [Squash, lambda: nn.LayerNorm([8, 16, 16])])
def test_what_an_auxiliary_convolution_does_not_have_is_not_left_out(odd):
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), odd()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    net = LocalSequential(layers, AugLocal(2, joint_tail=False), 10, (3, 16, 16))
    assert [repr(part) for part in net.auxiliary[0].blocks[0]] == [repr(part) for part in layers[1:3]]


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        ([nn.GroupNorm(2, 8), nn.SiLU()], ["Conv2d", "GroupNorm", "SiLU"]),
        ([nn.InstanceNorm2d(8, affine=True), nn.ReLU()], ["Conv2d", "InstanceNorm2d", "ReLU"]),
        ([nn.BatchNorm2d(8), nn.PReLU(8)], ["Conv2d", "BatchNorm2d", "PReLU"]),
        ([nn.LocalResponseNorm(3), nn.Dropout(), nn.ELU(), nn.MaxPool2d(1)], ["Conv2d", "LocalResponseNorm", "ELU"]),
        ([], ["Conv2d", "ReLU"]),
    ],
)
def test_auxiliary_convolutions_have_the_layers_norm_and_activation(parts, kinds):
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), *parts),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    net = LocalSequential(layers, AugLocal(2, joint_tail=False), 10, (3, 16, 16), fused=False)
    assert [type(m).__name__ for m in net.auxiliary[0].blocks[0]] == kinds
    net(*batch()).loss.backward()


# A term of one's own


class Small(Term):
    def loss(self, h, context):
        return h.square().mean()


def test_a_term_of_ones_own_is_not_recomputed_without_a_word():
    class Decayed(Rule):
        def build_auxiliary(self, network, module):
            from auglocal_ext.auxiliary import Objectives

            head = LinearHead().build_auxiliary(network, module)
            return Objectives(head, 1.0, [(0.5, Small(network.settings(module)))])

    net = network(Decayed())
    h = torch.randn(4, 4, 16, 16)
    both, head = (
        part.loss(h, LossContext(torch.tensor([0, 1, 2, 3]))).loss
        for part in (net.auxiliary[0], net.auxiliary[0].network)
    )
    torch.testing.assert_close(both, head + 0.5 * h.square().mean())
    with pytest.raises(ValueError, match="Small cannot recompute"):
        network(Decayed(), recompute="auxiliary")
    assert copy.deepcopy(net)(*batch()).loss.isfinite()
