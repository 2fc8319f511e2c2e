"""Every rule by its options, heads that are rules, and InfoPro's weights."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from runs import log, trainer

from auglocal_ext.rules import (
    DGL,
    INFOPRO_WEIGHTS,
    MAN,
    SOLO,
    AugLocal,
    ContSup,
    DGLHead,
    Greedy,
    InfoPro,
    PredictionHead,
    PredSim,
)
from auglocal_ext.training import SettingsError, TrainConfig
from auglocal_ext.training.config.rule_options import (
    OPTIONS,
    RULE_OPTIONS,
    RULES,
    help_of,
    includes,
    read_head,
    write_head,
)
from auglocal_ext.training.config.train_config import differences, from_dict, make_rule, resolve, to_dict
from auglocal_ext.training.config.values import reader

WEIGHTS = (5.0, 0.05, 0.2, 0.5)

MADE = [
    ({"rule": "greedy"}, Greedy()),
    ({"rule": "dgl"}, DGL()),
    ({"rule": "dgl", "head": "cnn"}, DGL(head="cnn")),
    ({"rule": "greedy", "head": "dgl"}, Greedy(head=DGL())),
    ({"rule": "auglocal", "depth": 2, "head": "1c2f"}, AugLocal(depth=2, head="1c2f")),
    ({"rule": "predsim", "beta": 0.9, "limit": 64}, PredSim(beta=0.9, limit=64)),
    ({"rule": "predsim", "head": "0c1f", "scale_classifier": False}, PredSim(head="0c1f", scale_classifier=False)),
    ({"rule": "infopro", "weights": WEIGHTS}, InfoPro(WEIGHTS[:2], WEIGHTS[2:])),
    (
        {"rule": "infopro", "weights": WEIGHTS, "loss": "contrast", "head": "auglocal:depth=2"},
        InfoPro(WEIGHTS[:2], WEIGHTS[2:], "contrast", AugLocal(depth=2)),
    ),
    ({"rule": "dgl", "head": "mlp-sr-auglocal", "init": "released"}, DGL("mlp-sr-auglocal", "released")),
    ({"rule": "auglocal", "depth": 1, "single_layer_norm": True}, AugLocal(1, single_layer_norm=True)),
    ({"rule": "auglocal", "widen": 2.0, "init": "released"}, AugLocal(widen=2, init="released")),
    ({"rule": "contsup", "widen": 2.0, "feature_dim": 64}, ContSup(widen=2, feature_dim=64)),
    (
        {"rule": "infopro", "weights": WEIGHTS, "loss": "contrast_batch", "widen": 2.0, "stage_steps": 14},
        InfoPro(WEIGHTS[:2], WEIGHTS[2:], "contrast_batch", widen=2, stage_steps=14),
    ),
    (
        {"rule": "predsim", "zero_padding": True, "classifier_apart": True, "init": "auglocal"},
        PredSim(zero_padding=True, classifier_apart=True, init="auglocal"),
    ),
    ({"rule": "man", "average_momentum": 0.5}, MAN(momentum=0.5)),
    ({"rule": "solo", "solo_blocks": 1, "readout_every": 5}, SOLO(1, every=5)),
    ({"rule": "man", "head": "dgl:head=mlp"}, MAN(head=DGL(head="mlp"))),
    (
        {"rule": "auglocal", "depth": 3, "sampling": "conv3x3", "downsampling": True},
        AugLocal(depth=3, sampling="conv3x3", downsampling=True),
    ),
    ({"rule": "contsup", "head": "auglocal:depth=3"}, ContSup(head=AugLocal(depth=3))),
    (
        {
            "rule": "contsup",
            "context": "E",
            "head": "infopro:weights=5,0.05,0.2,0.5,head=auglocal:joint-tail=no,depth=2",
        },
        ContSup("E", head=InfoPro(WEIGHTS[:2], WEIGHTS[2:], head=AugLocal(depth=2, joint_tail=False))),
    ),
]


@pytest.mark.parametrize(("settings", "rule"), MADE)
def test_options_make_the_rule(config, settings, rule):
    assert make_rule(config(**settings)) == rule


def test_the_table_is_that_of_the_rules():
    kinds = {field.name: field.type for field in fields(TrainConfig)}
    for name, option in OPTIONS.items():
        assert kinds[name] == option.kind | None, name
    missing = {"block", "mean", "std", "first", "last"}
    for rule, cls in RULES.items():
        owns = {name: OPTIONS[name].rules[rule] for name in RULE_OPTIONS[rule]}
        assert {own.field for own in owns.values()} - {""} == {field.name for field in fields(cls)} - missing, rule


def test_whole_numbers_may_be_of_any_length():
    assert PredSim(limit=10**400).limit == 10**400
    with pytest.raises(ValueError, match=r"pyramid .* within 0 .. 1; got 10+$"):
        AugLocal(pyramid=10**400)


def test_help_names_rules_and_defaults():
    assert help_of("depth") == "auglocal: layers of an auxiliary network with its classifier, at least 1 (default 6)"
    assert help_of("pyramid").endswith("slope of the pyramidal depth, 0..1 (default 0.5)")
    assert "predsim: initial values of the auxiliary networks: own, released, auglocal (default own)" in help_of("init")
    assert "contsup, infopro, man: a head or a rule (default 1c2f)" in help_of("head")
    assert "dgl: a head or a rule (default mlp-sr)" in help_of("head") and "Heads: linear, 0c1f" in help_of("head")


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("1c2f", "1c2f"),
        ("greedy", "greedy"),
        ("auglocal:depth=3", {"rule": "auglocal", "depth": 3}),
        ("auglocal:depth=3,joint-tail=no", {"rule": "auglocal", "depth": 3, "joint_tail": False}),
        (
            "infopro:weights=5,0,0.5,1,loss=contrast,head=man:head=dgl",
            {
                "rule": "infopro",
                "weights": (5, 0, 0.5, 1),
                "loss": "contrast",
                "head": {"rule": "man", "head": "dgl"},
            },
        ),
        (
            "predsim:beta=0.5,head=auglocal:depth=2,pyramid=0",
            {"rule": "predsim", "beta": 0.5, "head": {"rule": "auglocal", "depth": 2, "pyramid": 0}},
        ),
    ],
)
def test_heads_as_text_are_tables(text, head):
    assert read_head(text) == read_head(head) == head
    assert read_head(write_head(head)) == head


def test_a_head_may_leave_out_what_was_filled_in():
    stored = read_head("man:average_momentum=0.5,head=infopro:loss=contrast,weights=5,0,0.5,1")
    assert includes(stored, read_head("man:average_momentum=0.5,head=infopro:loss=contrast"))
    assert includes(stored, read_head("man:head=infopro"))
    assert not includes(stored, read_head("man:average_momentum=0.4,head=infopro:loss=contrast"))
    assert not includes(stored, read_head("man:head=infopro:loss=softmax"))
    assert not includes("1c2f", "0c1f") and not includes(stored, "dgl")


def test_a_run_that_stored_its_head_as_text_goes_on(config):
    text = "infopro:loss=contrast,weights=5,0,0.5,1,head=auglocal:depth=2"
    made = config(rule="contsup", head=text)
    stored = to_dict(made)
    assert stored["head"] == {
        "rule": "infopro",
        "loss": "contrast",
        "weights": [5, 0, 0.5, 1],
        "head": {"rule": "auglocal", "depth": 2},
    }
    assert from_dict(stored) == from_dict(stored | {"head": text}) == made
    assert differences(stored, {"head": text}) == differences(stored | {"head": text}, stored) == []
    assert differences(stored | {"head": text}, {"head": "dgl"}) == [f"--head: {text!r} in the checkpoint, now 'dgl'"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "contsup", "head": "auglocal:deep=3"}, "'deep=3' is no option of auglocal; .* auglocal:depth=3"),
        ({"rule": "contsup", "head": "auglocal:3"}, "'3' is no option of auglocal"),
        ({"rule": "contsup", "head": "auglocal:depth=few"}, "depth: expected a whole number, got 'few'"),
        (
            {"rule": "contsup", "head": "auglocal:depth=0"},
            r"depth \(layers .*\) is a whole number of at least 1",
        ),
        ({"rule": "contsup", "head": "auglocal:depth=2,depth=3"}, "depth is given twice"),
        ({"rule": "contsup", "head": "auglocal:joint_tail=maybe"}, "expected yes or no, got 'maybe'"),
        ({"rule": "man", "head": "infopro:head=auglocal:deep=1"}, "'deep=1' is no option of auglocal"),
        (
            {"rule": "man", "head": {"rule": "auglocal", "deep": 1}},
            r"\[rule.head\]: deep is no option of .* mean depth",
        ),
        ({"rule": "man", "head": {"rule": "auglocal", "depth": "3"}}, 'depth expected a whole number, got "3"'),
        ({"rule": "man", "head": {"rule": "auglocal", "depth": True}}, "depth expected a whole number, got true"),
        ({"rule": "man", "head": {"depth": 3}}, "rule expected one of auglocal, .* got nothing"),
        ({"rule": "man", "head": {"rule": "dgl", "modules": 3}}, "modules is no option of dgl"),
        ({"rule": "man", "head": {"rule": "man", "head": {"rule": "bp"}}}, r'\[rule.head.head\]: rule .* got "bp"'),
        ({"rule": "man", "head": ["dgl"]}, r'head expected the name of a head, or a table .* got \["dgl"\]'),
        ({"rule": "man", "head": "contsup:context=E"}, "cannot be a head: it supplies modules with context"),
        ({"rule": "man", "head": "bp"}, "unknown auxiliary head 'bp'"),
        ({"rule": "auglocal", "head": "dense"}, "unknown auxiliary head 'dense'"),
        ({"rule": "greedy", "depth": 2}, "--depth belongs to the rule auglocal, not to greedy"),
        ({"rule": "predsim", "head": "1c2f", "limit": 64}, "limit=64 is read by PredSim's own"),
        ({"rule": "bp", "mixup": -0.1}, "--mixup must be at least 0, got -0.1"),
        ({"rule": "predsim", "beta": 1.5}, r"beta \(weight of .*\) is a number within 0 .. 1; got 1.5"),
        ({"rule": "infopro", "weights": (1.0, 2.0)}, "four numbers"),
        ({"rule": "infopro", "weights": (1.0, 2.0, -1.0, 0.0)}, "neither negative"),
        ({"rule": "infopro", "loss": "hinge"}, "loss is one of softmax, contrast, contrast_batch; got 'hinge'"),
        ({"rule": "man", "average_momentum": 2.0}, r"^average_momentum \(m in .*\) is a number within 0 .. 1; got 2"),
        (
            {"rule": "solo", "solo_blocks": -1},
            r"^solo_blocks \(fresh blocks .*\) is a whole number of at least 0; got -1",
        ),
        (
            {"rule": "solo", "readout": "private", "readout_every": 2},
            "^readout_every=2 and readout_lag=0 are of a shared readout; readout='private' has neither",
        ),
        ({"rule": "auglocal", "sampling": "random"}, "sampling is one of uniform"),
    ],
)
def test_wrong_options_are_refused_when_made(config, settings, said):
    with pytest.raises(SettingsError, match=said):
        config(**settings)


def infopro(dataset, modules=None, network="resnet110", **settings):
    made = TrainConfig(
        data=".", output="run", device="cpu", network=network, modules=modules, **{"rule": "infopro", **settings}
    )
    return resolve(made, dataset, False)


@pytest.mark.parametrize(("dataset", "network"), [key for key in INFOPRO_WEIGHTS if "," not in key[1]])
def test_infopros_weights_follow_from_the_experiment(dataset, network):
    for modules, (first, last) in INFOPRO_WEIGHTS[dataset, network].items():
        assert infopro(dataset, modules, network).weights == (*first, *last)


def test_infopros_weights_of_balanced_cuts():
    assert infopro("cifar10", (7, 15, 27)).weights == (5, 0, 5, 0.1)
    assert infopro("cifar10", (10, 21)).weights == (5, 0, 5, 0.1)
    assert infopro("stl10", (9, 20)).weights == (20, 0.5, 5, 2)
    assert infopro("cifar10", None, "resnet32").weights == WEIGHTS  # one module per layer is 16


def test_infopros_weights_reach_a_head_and_the_images_normalisation_the_decoder():
    settings = infopro("svhn", 8, rule="contsup", head="man:head=infopro:loss=contrast")
    inner = {"rule": "infopro", "loss": "contrast", "weights": (5, 0, 0.5, 2)}
    assert settings.head == {"rule": "man", "head": inner}
    inner = make_rule(settings).head.head
    assert (inner.first, inner.last) == ((5, 0), (0.5, 2))
    assert inner.mean == inner.std == (0.5, 0.5, 0.5)
    assert infopro("cifar10", 2).weights == (5, 0.5, 0, 0)
    assert make_rule(infopro("cifar10", 2)).mean == pytest.approx((125.3 / 255, 123 / 255, 113.9 / 255))


@pytest.mark.parametrize(
    ("dataset", "modules", "network"),
    [
        ("svhn", 16, "resnet32"),
        ("cifar10", 5, "resnet110"),
        ("folder", 16, "resnet32"),
        ("cifar10", (3, 9), "resnet32"),
    ],
)
def test_weights_that_nobody_published_are_asked_for(dataset, modules, network):
    with pytest.raises(SettingsError, match="no weights of InfoPro are known .* give them .--weights A,B,C,D"):
        infopro(dataset, modules, network)
    assert infopro(dataset, modules, network, weights=(1.0, 1.0, 0.0, 2.0)).weights == (1, 1, 0, 2)


def test_what_was_left_out_is_resolved():
    settings = resolve(TrainConfig(data=".", output="run", rule="predsim", device="cpu"), "cifar10", False)
    assert (settings.beta, settings.limit, settings.scale_classifier, settings.head) == (0.99, 2048, True, None)
    settings = resolve(TrainConfig(data=".", output="run", rule="man", head="dgl", device="cpu"), "cifar10", False)
    assert (settings.average_momentum, settings.head, settings.momentum) == (0.995, "dgl", 0.9)


@pytest.mark.parametrize("text", ["", "few", "1,x"])
def test_numbers_are_read_strictly(text):
    for kind in (int, float, tuple[float, ...], int | tuple[int, ...]):
        with pytest.raises(ValueError, match="expected"):
            reader(kind)(text)


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "greedy"},
        {"rule": "dgl"},
        {"rule": "predsim", "beta": 0.5},
        {"rule": "infopro", "weights": (1.0, 1.0, 0.5, 1.0), "loss": "contrast", "recipe": "stl10"},
        {"rule": "man", "head": "dgl"},
        {"rule": "contsup", "head": "auglocal:depth=2", "context": "E"},
    ],
    ids=lambda rule: rule["rule"],
)
def test_every_rule_trains_and_resumes(config, separable, tmp_path, rule):
    straight = config(epochs=2, output=str(tmp_path / "straight"), **rule)
    trainer(straight, separable).fit()
    settings = config(epochs=2, **rule)
    first = trainer(settings, separable)
    first._epoch()
    first.save()
    again = trainer(settings, separable)
    again.resume()
    again.fit()
    assert log(settings) == log(straight)[1:]
    assert log(straight)[1]["train_loss"] != log(straight)[0]["train_loss"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AugLocal(depth=True), "is a whole number of at least 1; got True"),
        (lambda: AugLocal(depth=2.0), "is a whole number of at least 1; got 2.0"),
        (lambda: AugLocal(joint_tail="no"), r"joint_tail \(.*\) is True or False; got 'no'"),
        (lambda: AugLocal(init=None), "init is one of own, released; got None"),
        (lambda: AugLocal(widen=float("inf")), r"widen \(.*\) is a number above 0; got inf"),
        (lambda: PredSim(beta=float("nan")), "within 0 .. 1; got nan"),
        (lambda: PredSim(beta="0.5"), "within 0 .. 1; got '0.5'"),
        (lambda: PredSim(beta=None), "within 0 .. 1; got None"),
        (lambda: Greedy(head=None), "unknown auxiliary head None"),
        (lambda: DGLHead(init="auglocal"), "init is one of own, released; got 'auglocal'"),
        (lambda: PredictionHead(zero_padding=1), r"zero_padding \(.*\) is True or False; got 1"),
    ],
)
def test_values_of_a_wrong_kind_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_bounds_are_those_of_the_field():
    own = {each.name: each for each in PredSim.options()}
    assert (own["beta"].least, own["beta"].most, own["init"].choices) == (0, 1, ("own", "released", "auglocal"))
    for beta in (0, 1, np.float32(0.5)):
        assert PredSim(beta=beta).beta == beta
    assert PredSim(limit=np.int64(3)).limit == 3 and PredSim(limit=None).limit is None
