"""Heads: counts of the papers, shapes, gradients, and the layouts and tasks they take."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from seen import network
from torch import nn
from torch.nn import functional as F

from auglocal_ext import (
    DGL,
    MAN,
    AugLocal,
    Classification,
    ContSup,
    Greedy,
    InfoPro,
    LocalSequential,
    PredSim,
    Regression,
    models,
)
from auglocal_ext.auxiliary import LossContext
from auglocal_ext.layers import Features, vectors
from auglocal_ext.rules import (
    CONV_HEADS,
    HEADS,
    RULES,
    ConvHead,
    DGLHead,
    FCNHead,
    LinearHead,
    PredictionHead,
    VGGHead,
    resolved,
)

TOKENS = Features((7, 16), "channels_last")
CLASS_TOKEN = Features((7, 16), "class_token")


def count(module):
    return sum(p.numel() for p in module.parameters())


def built(rule, features, task=10, last_width=64):
    return rule.build_auxiliary(network(features, task, last_width), 0)


@pytest.mark.parametrize(("width", "parameters"), [(16, 10_186), (32, 28_170), (64, 46_602)])
def test_1c2f_has_the_published_size(width, parameters):
    head = built(ConvHead("1c2f"), Features((width, 8, 8)))
    assert count(head) == parameters
    conv = head.blocks[0].conv
    assert conv.stride == ((2, 2) if width < 64 else (1, 1))


@pytest.mark.parametrize("kind", CONV_HEADS)
@pytest.mark.parametrize("widen", [1.0, 2.0])
def test_conv_heads(kind, widen):
    reads = {"widen": widen, "feature_dim": 24}
    head = built(
        ConvHead(kind, **{k: v for k, v in reads.items() if k not in ConvHead.unread_of(kind)}), Features((16, 8, 8))
    )
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert (len(convs), len(linears)) == (int(kind[0]), int(kind[2]))
    assert all(c.out_channels == int(32 * widen) for c in convs)
    assert all(m.out_features == int(24 * widen) for m in linears[:-1])
    assert not any(isinstance(m, nn.BatchNorm1d) for m in head.modules())
    x, y = torch.randn(4, 16, 8, 8, requires_grad=True), torch.randint(0, 10, (4,))
    logits = head(x)
    result = head.loss(x, LossContext(y))
    torch.testing.assert_close(result.loss, F.cross_entropy(logits, y))
    torch.testing.assert_close(result.output, logits.detach())


def test_conv_head_errors():
    with pytest.raises(ValueError, match="unknown auxiliary head '3c1f'"):
        ConvHead("3c1f")
    with pytest.raises(ValueError, match=r"widen \(.*\) is a number above 0"):
        ConvHead(widen=0)
    for kind, options, unread in (
        ("0c1f", {"widen": 2.0}, "widen and no feature_dim"),
        ("0c1f", {"widen": 0.5}, "widen and no feature_dim"),
        ("0c1f", {"feature_dim": 64}, "widen and no feature_dim"),
        ("1c1f", {"feature_dim": 64}, "feature_dim"),
    ):
        with pytest.raises(ValueError, match=f"head '{kind}' reads no {unread}"):
            ConvHead(kind, **options)
    with pytest.raises(ValueError, match="widen=0.01 leaves none of 32 channels"):
        built(ConvHead("1c1f", widen=0.01), Features((16, 8, 8)))
    for features, found in ((vectors(16), "vectors of 16"), (TOKENS, "7 tokens of 16"), (Features((16, 9)), "maps")):
        with pytest.raises(ValueError, match=f"needs feature maps with height and width, but .* puts out {found}"):
            built(ConvHead("1c1f"), features)


def test_widths_and_limits_of_one():
    head = built(ConvHead("1c2f", widen=1 / 32, feature_dim=32), Features((16, 8, 8)))
    assert (head.blocks[0].conv.out_channels, head.head.hidden[0].out_features) == (1, 1)
    assert built(ConvHead("0c2f", feature_dim=1), Features((16, 8, 8))).head.linear.in_features == 1
    assert built(PredictionHead(limit=1), Features((16, 8, 8))).head.linear.in_features == 16
    for make in (lambda: ConvHead(feature_dim=0), lambda: PredictionHead(limit=0)):
        with pytest.raises(ValueError, match="at least 1; got .*0"):
            make()


def test_linear_head_norm_and_vgg_head():
    y = torch.randint(0, 5, (6,))
    for rule, x in (
        (LinearHead(norm=True), torch.randn(6, 8, 4, 4)),
        (VGGHead(), torch.randn(6, 32, 7, 7)),
    ):
        head = built(rule, Features(tuple(x.shape[1:])), 5)
        torch.testing.assert_close(head.loss(x, LossContext(y)).loss, F.cross_entropy(head(x), y))
    assert isinstance(built(LinearHead(norm=True), Features((8, 4, 4))).head.norm, nn.BatchNorm1d)
    assert count(built(VGGHead(), Features((32, 7, 7)), 1000)) == 2 * (512 * 512 + 512 + 1024) + 513_000


@pytest.mark.parametrize(
    ("features", "width"),
    [
        (Features((16, 32, 32)), 2048),
        (Features((16, 5, 7)), 560),
        (Features((64, 8, 8)), 2048),
        (Features((4096, 2, 2)), 4096),
        (Features((16, 300)), 1200),  # 300, 150, 75
        (Features((4, 8, 16, 16)), 2048),
        (Features((300, 16), "channels_last"), 1200),
        (Features((300, 16), "class_token"), 16),
        (vectors(5000), 5000),
    ],
)
def test_predsim_pools_to_at_most_so_many_features(features, width):
    head = built(PredictionHead(), features)
    assert head.head.linear.in_features == width
    x = torch.randn(2, *features.shape)
    assert head.head.features(x).shape == (2, width)


@pytest.mark.parametrize(
    ("kind", "pools", "narrow", "convolutions", "hidden"),
    [
        ("mlp-sr", [(2, 3), (2, 2)], [(1, 3), (2, 2)], 3, 3),
        ("mlp", [(2, 2)], [(2, 2)], 0, 3),
        ("cnn", [(2, 2)], [(2, 2)], 2, 0),
        ("mlp-sr-auglocal", [(2, 3), (2, 2)], [(1, 3), (1, 2)], 3, 2),
    ],
)
def test_dgls_heads_round_a_quarter_of_each_axis_up(kind, pools, narrow, convolutions, hidden):
    for shape, sizes in (((8, 6, 10), pools), ((8, 4, 10), narrow)):
        head = built(DGLHead(kind), Features(shape)).head
        assert [m.output_size for m in head.modules() if isinstance(m, nn.AdaptiveAvgPool2d)] == sizes
        assert sum(isinstance(m, nn.Conv2d) for m in head.modules()) == convolutions
        width = 8 * sizes[-1][0] * sizes[-1][1]
        assert [m.in_features for m in head.modules() if isinstance(m, nn.Linear)] == [width] * (hidden + 1)


@pytest.mark.parametrize("kind", ["mlp-sr", "mlp", "cnn"])
def test_dgls_heads_recompute_to_the_same_numbers(kind):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        seen = replace(network(Features((4, 8, 8))), recompute=(recompute, recompute))
        head = DGLHead(kind).build_auxiliary(seen, 0).double()
        h = torch.rand(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        loss = head.loss(h, LossContext(torch.tensor([0, 1, 2]))).loss
        results.append([loss, *torch.autograd.grad(loss, [h, *head.parameters()]), *head.buffers()])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


LAYOUTS = {
    "vectors": vectors(16),
    "1-D": Features((16, 9)),
    "2-D": Features((16, 6, 5)),
    "3-D": Features((16, 4, 3, 5)),
    "channels last": Features((6, 5, 16), "channels_last"),
    "tokens": TOKENS,
    "class token": CLASS_TOKEN,
}


def literally_pooled(x, features):
    if features.layout == "class_token":
        return x[:, 0]
    x = x if features.layout == "channels_first" else x.movedim(-1, 1)
    return torch.stack([image.flatten(1).mean(1) if image.dim() > 1 else image for image in x])


@pytest.mark.parametrize("features", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("task", [Classification(5, label_smoothing=0.1), Regression(3)], ids=["classes", "numbers"])
def test_linear_heads_pool_over_positions_whatever_they_are(features, task):
    head = built(LinearHead(), features, task).double()
    x = torch.randn(4, *features.shape, dtype=torch.float64, requires_grad=True)
    y = task.example(4) if isinstance(task, Classification) else torch.randn(4, 3, dtype=torch.float64)
    linear = head.head.linear
    expected = F.linear(literally_pooled(x, features), linear.weight, linear.bias)
    torch.testing.assert_close(head(x), expected)
    loss = F.cross_entropy(expected, y, label_smoothing=0.1) if task.outputs == 5 else F.mse_loss(expected, y)
    found = head.loss(x, LossContext(y)).loss
    torch.testing.assert_close(found, loss)
    inputs = [x, linear.weight, linear.bias]
    for ours, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", [ConvHead("1c2f"), DGLHead("mlp-sr"), DGLHead("cnn"), VGGHead(), PredictionHead(64)])
def test_channels_last_maps_are_read_as_channels_first_ones(rule):
    last, first = built(rule, Features((6, 8, 16), "channels_last")), built(rule, Features((16, 6, 8)))
    for ours, theirs in zip(last.parameters(), first.parameters(), strict=True):
        nn.init.normal_(theirs, std=0.1)
        ours.data.copy_(theirs)
    x = torch.randn(4, 6, 8, 16)
    torch.testing.assert_close(last(x), first(x.permute(0, 3, 1, 2)))


def test_every_name_is_a_rule_and_a_head_supplies_no_context():
    for name in HEADS:
        assert resolved(name).build_auxiliary(network(Features((16, 8, 8))), 0)(torch.randn(2, 16, 8, 8)).shape == (
            2,
            10,
        )
    assert resolved("1c2f") == ConvHead("1c2f") and resolved("linear") == LinearHead()
    with pytest.raises(ValueError, match="cannot be a head: it supplies modules with context"):
        resolved(ContSup("R1", head=Greedy()))
    assert resolved(ContSup("R0")) == ContSup("R0")
    for head in ("9c9f", 3, None):
        with pytest.raises(ValueError, match="unknown auxiliary head .*linear.*mlp-sr.*AugLocal"):
            resolved(head)


def test_rules_and_heads_are_values():
    assert PredictionHead() == PredictionHead(2048, zero_padding=False, init="own")
    rules = [rule() for name, rule in RULES.items() if name != "infopro"]
    for rule in (*map(resolved, HEADS), PredictionHead(), InfoPro((5, 1), (0, 0)), *rules):
        assert {rule: True}[copy.deepcopy(rule)]


def test_a_head_means_the_same_to_every_rule():
    """A name, its rule, and a rule around it are one and the same network."""
    features = Features((16, 8, 8))
    for rule in (Greedy("1c2f"), Greedy(ConvHead("1c2f")), Greedy(Greedy("1c2f")), AugLocal(1, head="1c2f")):
        torch.manual_seed(0)
        made = built(rule, features)
        torch.manual_seed(0)
        plain = built(ConvHead("1c2f"), features)
        assert [n for n, _ in made.named_parameters()] == [n for n, _ in plain.named_parameters()]
        for ours, theirs in zip(made.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_dgl_takes_heads_of_dgl_by_name_and_others_as_they_are():
    assert DGL("mlp-sr", init="released").head_rule == DGLHead("mlp-sr", "released")
    assert DGL(DGLHead("cnn")).head_rule == DGLHead("cnn") and DGL("linear").head_rule == LinearHead()
    with pytest.raises(ValueError, match="init='released' is for DGL's heads by name.*head='linear' has options"):
        DGL("linear", init="released")


@pytest.mark.parametrize(("channels", "width"), [(7, 3), (6, 3), (1, 1)])
def test_the_head_for_segmentation_halves_the_channels(channels, width):
    (conv,) = (m for m in built(FCNHead(), Features((channels, 8, 8))).modules() if isinstance(m, nn.Conv2d))
    assert conv.out_channels == width


def test_a_head_sees_other_features_in_place_of_a_modules_output():
    first, last = network(Features((16, 8, 8))).layers
    seen = replace(network(Features((16, 8, 8))), layers=(first, first, last))
    assert seen.last_width == 64
    changed = seen.with_features(0, Features((4, 2, 2)))
    assert changed.layers[1:] == (first, last) and changed.features(0) == Features((4, 2, 2)) != seen.features(0)


def test_a_rule_takes_its_cuts_and_the_last_weight_from_its_head():
    for outer in (MAN, Greedy):
        assert outer(head=PredSim(beta=0.75)).classifier_weight == 0.25
        assert outer(head=AugLocal(3)).ends(6, None) == AugLocal(3).ends(6, None) == (0, 1, 2, 5)
    assert LinearHead().classifier_weight == 1 and LinearHead().ends(4, 2) == (1, 3)


def test_layers_after_a_module_are_no_auxiliary_network_of_the_last_one():
    with pytest.raises(ValueError, match="MAN makes auxiliary networks of the layers after a module"):
        LocalSequential(models.resnet_cifar(8, width=4), MAN(head=PredSim(classifier_apart=True)), 10, (3, 16, 16))


def test_the_input_as_a_task_is_told_it():
    images = network(Features((16, 8, 8)))
    assert images.described_input == images.input == Features((3, 8, 8))
    assert replace(images, input_shape=(5,), input=None, input_dtype=torch.int64).described_input == Features((5,))
