"""Cuts that something crosses beside the output: ``localize(..., skips="detach")``."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from skip_models import Branching, Dense, FeaturePyramid, Lateral, Nested, Pairs, Remembering, TwoTensors, UNet

from auglocal_ext import AugLocal, ContSup, Greedy, LocalStep, localize
from auglocal_ext.auxiliary.base import LossContext
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.planning import plan_memory, plan_stages

SHAPE = (3, 16, 16)
CUTS = {
    UNet: ["down1", "down2", "bottom", "up2"],
    Dense: ["stem", "layers.0", "layers.2"],
    FeaturePyramid: ["stage1", "stage2", "stage3"],
    Pairs: ["blocks.0", "blocks.1"],
    TwoTensors: ["blocks.0", "blocks.1"],
    Branching: ["one", "two"],
}


def wrapped(make, modules=None, **options):
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return localize(
            make() if isinstance(make, type) else make,
            options.pop("rule", Greedy()),
            5,
            CUTS[make] if modules is None else modules,
            input_shape=SHAPE,
            skips=options.pop("skips", "detach"),
            **options,
        )


def batch(size=4):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(size, *SHAPE, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def sgd(params):
    return torch.optim.SGD(params, lr=0.125, momentum=0.9)


def by_hand(net, x, y):
    """Losses and gradients of a forward in which each cut detaches all that crosses it, by hand in the model."""
    net, losses = copy.deepcopy(net), []

    def cut(h):
        scored = net.auxiliary[len(losses)].loss(h, LossContext(y, x))
        losses.append(scored.loss.detach())
        scored.loss.backward()

    out = net.primary.by_hand(x, cut)
    loss = net.task.score(out, y).loss
    loss.backward()
    return torch.stack([*losses, loss.detach()]), {name: p.grad for name, p in net.named_parameters()}


def assert_equal_to_hand(net, x, y):
    torch.manual_seed(7)
    losses, wanted = by_hand(net, x, y)
    torch.manual_seed(7)
    out = net(x, y)
    out.loss.backward()
    assert torch.equal(out.module_losses, losses)
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, wanted[name]), name


@pytest.mark.parametrize("make", CUTS)
def test_gradients_are_those_of_a_hand_written_chain(make):
    net = wrapped(make)
    model, (x, y) = net.primary, batch()
    keys, before = list(model.state_dict()), model(x)
    assert net.num_modules == len(CUTS[make]) + 1
    assert any(segment.first is not None and segment.first.crossing for segment in net._runs)
    assert_equal_to_hand(net, x, y)
    net.zero_grad()
    assert_equal_to_hand(net.eval(), x, y)
    net.train().zero_grad()
    net.recompute = "all"
    assert_equal_to_hand(net, x, y)
    assert list(model.state_dict()) == keys and torch.equal(model(x), before)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize(
    ("make", "recompute"),
    [(UNet, "none"), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(UNet, "all"), (Dense, "all")])],
)
def test_a_step_and_its_predicted_peak(make, recompute):
    net = wrapped(make, recompute=recompute)
    plain = copy.deepcopy(net)
    plan = plan_memory(net, 16, sgd)
    step, optimizer = LocalStep(net, sgd), sgd(plain.parameters())
    x, y = batch(16)
    for _ in range(2):
        optimizer.zero_grad()
        plain(x, y).loss.backward()
        optimizer.step()
    step(x, y)
    with MemoryMeter() as meter:
        meter.track(net, step.optimizer, x, y)
        step(x, y)
    assert plan.predicted_bytes == meter.peak_bytes
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_what_crosses_is_alive_until_its_last_use():
    """Live bytes when each module begins, beyond those between steps: its input and what crosses with it."""
    net, (x, y) = wrapped(UNet), batch()
    net(x, y).loss.backward()
    live, h = [], x
    with MemoryMeter() as meter:
        meter.track(net, x, y)
        base = meter.live_bytes
        for module in net.local_modules:
            out = module(h)
            module.local_loss(out, y, x).backward()
            h = module.hand_on(out)
            del out
            live.append(meter.live_bytes - base)
    one, two, bottom, up = (4 * 4 * size for size in (8 * 16 * 16, 8 * 8 * 8, 8 * 4 * 4, 8 * 8 * 8))
    scalars = 2048
    for found, wanted in zip(live, (one, one + two, one + two + bottom, one + up, 0), strict=True):
        assert wanted <= found <= wanted + scalars, (live, wanted)


def test_a_loop_of_ones_own_hands_on_what_crosses():
    net, other = wrapped(UNet), wrapped(UNet)
    x, y = batch()
    out = net(x, y)
    out.loss.backward()
    h = x
    for module in other.local_modules:
        out = module(h)
        module.local_loss(out, y, x).backward()
        h = module.hand_on(out)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    first, second, third, *_ = other.local_modules
    with pytest.raises(ValueError, match=r"beside its input \(down1\).*hand_on"):
        third(second(first.hand_on(first(x))).detach())


def test_context_beside_skips_and_export():
    net = wrapped(UNet, rule=ContSup("R1E"))
    x, y = batch()
    net(x, y).loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    assert torch.equal(net.export()(x), net(x))
    again = wrapped(UNet, rule=ContSup("R1E")).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))


def test_export_is_the_model_alone():
    net = wrapped(Dense)
    exported = net.export()
    assert type(exported) is Dense and torch.equal(exported(batch()[0]), net.eval()(batch()[0]))


def test_blocks_are_sampled_behind_a_skip():
    net = wrapped(UNet, rule=AugLocal(2))
    net(*batch()).loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_analyses_run_layer_by_layer():
    from auglocal_ext.analysis.features import layer_outputs

    net, (x, _) = wrapped(UNet).eval(), batch()
    with torch.no_grad():
        *_, last = layer_outputs(net, x)
    assert torch.equal(last, net.primary(x))


def test_streams_are_told_of_what_crosses():
    from auglocal_ext.local_modules import OneStream, local_pass

    class Noting(OneStream):
        def __init__(self):
            self.seen = []

        def handed_on(self, index, h, history):
            self.seen.append([tuple(each.shape[1:]) for each in history])
            assert not any(each.requires_grad for each in (h, *history))

    net, streams = wrapped(UNet), Noting()
    local_pass(net.local_modules, *batch(), streams=streams)
    one, two = (8, 16, 16), (8, 8, 8)
    assert streams.seen == [[], [one], [one, two], [one], []]


def test_fused_parts_change_nothing_but_rounding():
    net, other = wrapped(UNet), wrapped(UNet, fused=True)
    for each in (net, other):
        each(*batch()).loss.backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_copies_and_pickles_train_alike():
    net, buffer = wrapped(UNet), io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for each in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert torch.equal(each(*batch()).module_losses, net(*batch()).module_losses)


def test_stages_are_not_cut_across_a_skip():
    net = wrapped(UNet)
    message = r"before local module 2: the outputs of down1 cross .* before \[1\]"
    with pytest.raises(ValueError, match=message):
        plan_stages(net, 4, sgd, stages=2, stage_cuts=[2])
    with pytest.raises(ValueError, match=message):
        LocalStep(net, sgd, delay=1, stage_cuts=[2])
    assert plan_stages(net, 4, sgd, stages=2, stage_cuts=[1]).cuts == (1,)


REFUSED = {
    "not asked for": (UNet, ["down2"], {"skips": "refuse"}, 'skips="detach" allows it, with no gradient'),
    "unknown": (UNet, ["down2"], {"skips": "cut"}, 'must be "refuse" or "detach"'),
    "a number": (UNet, 3, {}, "name the submodules"),
    "untrained": (Lateral, ["two"], {}, r"after two, detached, depends on lateral\.bias, lateral\.weight: no loss"),
    "random": (lambda: Nested("dropout"), ["two"], {}, "random and would be drawn again"),
    "in place": (lambda: Nested("in place"), ["two"], {}, "is changed in place by add_"),
    "of a parameter": (
        lambda: Nested("parameter"),
        ["two"],
        {},
        "computed again from scale, which a training step changes",
    ),
    "kept by a submodule": (Remembering, ["two"], {}, "which one keeps and does not return"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    make, modules, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        wrapped(make(), modules, **options)


def test_untrained_parameters_may_be_frozen():
    model = Lateral()
    model.lateral.requires_grad_(False)
    net = wrapped(model, ["two"])
    net(*batch()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_a_layer_that_begins_in_place_is_recomputed():
    from skip_models import BeginsInPlace

    from auglocal_ext import LocalSequential

    net, other = (localize(copy.deepcopy(m), Greedy(), 5, input_shape=SHAPE) for m in [BeginsInPlace()] * 2)
    other.auxiliary.load_state_dict(net.auxiliary.state_dict())
    assert any(segment.first is not None and segment.first.overwritten for segment in net._runs)
    other.recompute = "all"
    for each in (net, other):
        each(*batch()).loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    sequence = LocalSequential(BeginsInPlace().layers(), Greedy(), 5, SHAPE, fused=False, recompute="all")
    with pytest.raises(RuntimeError, match="changes its input in place"):
        sequence(*batch())


@pytest.mark.slow
def test_dense_blocks_of_torchvision_are_cut_inside():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.DenseNet(8, (4, 4), 16, num_classes=5)
    cuts = ["features.denseblock1.denselayer2", "features.denseblock2.denselayer2"]
    net = localize(model, Greedy(), 5, cuts, input_shape=(3, 32, 32), skips="detach")
    x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4,))
    from chains import assert_equal_to_chain

    assert_equal_to_chain(net, x, y)
    net.zero_grad()
    net.recompute = "all"
    assert_equal_to_chain(net, x, y)


@pytest.mark.slow
def test_a_detection_backbone_is_cut_below_its_pyramid():
    torchvision = pytest.importorskip("torchvision")
    from chains import assert_equal_to_chain
    from skip_models import WithPyramid

    torch.manual_seed(0)
    model = WithPyramid(torchvision)
    net = localize(model, Greedy(), 5, ["body.layer1", "body.layer2", "body.layer3"], input_shape=(3, 32, 32),
                   skips="detach")  # fmt: skip
    assert_equal_to_chain(net, torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4,)))
