"""Task x rule x layout x network, drawn at random, against slow and literal formulas in float64."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auglocal_ext import (
    MAN,
    AugLocal,
    Binary,
    Classification,
    ContSup,
    Greedy,
    InfoPro,
    LocalSequential,
    MultiLabel,
    PredSim,
    Regression,
)

# The formulas: what is learned


def log_sum_exp(row):
    top = row.max().detach()
    return top + (row - top).exp().sum().log()


def literal_loss(task, output, y):
    """Mean loss of an output, sample by sample and number by number."""
    losses = []
    if isinstance(task, Classification):
        for row, target in zip(output, y, strict=True):
            if y.dtype == torch.int64 and int(target) == task.ignore_index:
                continue
            wanted = target
            if y.dtype == torch.int64:
                wanted = torch.zeros_like(row)
                wanted[int(target)] = 1.0
            wanted = (1 - task.label_smoothing) * wanted + task.label_smoothing / len(row)
            losses.append(sum(w * (log_sum_exp(row) - z) for w, z in zip(wanted, row, strict=True)))
        return sum(losses) / len(losses)
    for z, t in zip(output.flatten(), y.double().flatten(), strict=True):
        if isinstance(task, MultiLabel):
            losses.append(-(t * torch.sigmoid(z).log() + (1 - t) * torch.sigmoid(-z).log()))
        elif task.kind == "mse":
            losses.append((z - t) ** 2)
        elif task.kind == "l1":
            losses.append((z - t).abs())
        else:
            losses.append(0.5 * (z - t) ** 2 if (z - t).abs() <= 1 else (z - t).abs() - 0.5)
    return sum(losses) / len(losses)


def literal_count(task, output, y):
    if isinstance(task, Classification):
        if y.dtype != torch.int64:
            return sum(int(row.argmax()) == int(t.argmax()) for row, t in zip(output, y, strict=True))
        return sum(int(row.argmax()) == int(t) != task.ignore_index for row, t in zip(output, y, strict=True))
    pairs = list(zip(output.flatten(), y.double().flatten(), strict=True))
    if isinstance(task, MultiLabel):
        return sum(bool(z > 0) == bool(t > 0.5) for z, t in pairs)
    return sum(float((z - t).abs()) for z, t in pairs)


# The formulas: who looks at the output


def by_channels(h, layout):
    """For each sample a matrix (C, positions)."""
    if h.dim() == 2:
        return [sample[:, None] for sample in h]
    if layout == "class_token":
        return [sample[0][:, None] for sample in h]
    if layout == "channels_first":
        return [torch.stack([channel.flatten() for channel in sample]) for sample in h]
    return [torch.stack([sample[..., c].flatten() for c in range(sample.shape[-1])]) for sample in h]


def means(h, layout):
    return torch.stack([sample.sum(1) / sample.shape[1] for sample in by_channels(h, layout)])


def affine(x, linear):
    return torch.stack([sum(row[i] * linear.weight[:, i] for i in range(len(row))) + linear.bias for row in x])


def similarity(rows):
    centred = [row - row.sum() / len(row) for row in rows]
    unit = [row / (row.square().sum().sqrt() + 1e-8) for row in centred]
    return torch.stack([torch.stack([(a * b).sum() for b in unit]) for a in unit]).clamp(-1, 1)


def literal_similarity(term, h, y, task, layout):
    weight = term.encoder.weight
    if h.dim() == 2 or isinstance(term.encoder, nn.Linear):
        z = torch.stack(
            [torch.stack([weight @ token for token in sample.reshape(-1, sample.shape[-1])]) for sample in h]
        )
        rows = [sample[0] if len(sample) == 1 else sample.std(0) for sample in z]
    else:
        x = h if layout == "channels_first" else h.movedim(-1, 1)
        z = getattr(nn.functional, f"conv{x.dim() - 2}d")(x, weight, padding=1).flatten(2)
        rows = [sample[:, 0] if sample.shape[1] == 1 else sample.std(1) for sample in z]
    used = [i for i, label in enumerate(y.tolist()) if label != task.ignore_index]
    wanted = [torch.eye(task.num_classes, dtype=torch.float64)[y[i]] for i in used]
    difference = similarity([rows[i] for i in used]) - similarity(wanted)
    return difference.square().sum() / len(used) ** 2


def literal_reconstruction(term, h, x, layout):
    h, x = (z if layout == "channels_first" else z.movedim(-1, 1) for z in (h, x))
    if h.shape[-2:] != x.shape[-2:]:
        h = nn.functional.interpolate(h, x.shape[-2:], mode="bilinear", align_corners=True)
    value = torch.sigmoid(term.decoder(h))
    image = x.clamp(0, 1)
    return -(image * value.log() + (1 - image) * (1 - value).log()).sum() / image.numel()


def literal_auxiliary(rule, auxiliary, task, h, y, x, layout):
    """Loss and output of a module's auxiliary network."""
    if isinstance(rule, PredSim):
        loss, output = literal_auxiliary(Greedy(), auxiliary.network, task, h, y, x, layout)
        return 0.25 * loss + 0.75 * literal_similarity(auxiliary.terms[0], h, y, task, layout), output
    if isinstance(rule, InfoPro):
        loss, output = literal_auxiliary(Greedy(), auxiliary.network, task, h, y, x, layout)
        return 0.5 * loss + 2.0 * literal_reconstruction(auxiliary.terms[0], h, x, layout), output
    if isinstance(rule, MAN):
        h = auxiliary.trained(h) + auxiliary.average(h)
        auxiliary = auxiliary.head
    head = auxiliary.head
    features = means(h, layout)
    if hasattr(head, "hidden"):
        features = affine(features, head.hidden[0]).clamp(min=0)
    output = affine(features, head.linear)
    return literal_loss(task, output, y), output


def literal_context(supply, h, history, layout):
    """``h + E(image) + sum_i R_i(input i)``, pooled block by block."""

    def pooled(z):
        height, width = h.shape[-2:] if layout == "channels_first" else h.shape[1:3]
        rows = z.unflatten(3, (width, -1)).unflatten(2, (height, -1))
        z = rows.sum((3, 5)) / (rows.shape[3] * rows.shape[5])
        return z if layout == "channels_first" else z.movedim(1, -1)

    def first(z):
        return z if layout == "channels_first" else z.movedim(-1, 1)

    if supply.image is not None:
        h = h + pooled(supply.image.encoder(first(history[0])))
    for index, encoder in zip(supply._inputs, supply.inputs, strict=True):
        h = h + pooled(encoder.encoder(first(history[index])))
    return h


# Networks


class Last(nn.Module):
    """A layer over the last axis: tokens, or maps with the channels last."""

    def __init__(self, fan_in, width, halve=False):
        super().__init__()
        self.linear, self.norm, self.halve = nn.Linear(fan_in, width), nn.LayerNorm(width), halve

    def forward(self, x):
        x = self.norm(self.linear(x).tanh())
        return x[:, ::2, ::2] if self.halve else x + x.mean(1, keepdim=True)


class Read(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, x):
        return x[:, 0] if self.layout == "class_token" else x.flatten(1, -2).mean(1)


@st.composite
def networks(draw):
    """Layers, the shape of an input, and the layout of what the modules hand on."""
    kind = draw(st.sampled_from(["vectors", "sound", "images", "volumes", "tokens", "class token", "last"]))
    # Of two channels every centred row is (a, -a), and every similarity lies at the clamp's edge.
    widths = draw(st.lists(st.integers(3, 6), min_size=3, max_size=4))
    fan_in, outputs = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    parts: list[nn.Module] = []
    axes = {"sound": 1, "images": 2, "volumes": 3}.get(kind, 0)
    if axes:
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        for index, (a, b) in enumerate(zip([fan_in, *widths], widths, strict=False)):
            parts += [convolution(a, b, 3, padding=1, stride=2 if index == 1 else 1), nn.Tanh()]
        parts += [nn.Flatten(2), Mean(), nn.Linear(widths[-1], outputs)]
        shape, layout = (fan_in, *([12], [8, 4], [4, 2, 4])[axes - 1]), "channels_first"
    elif kind == "vectors":
        for a, b in zip([fan_in, *widths], widths, strict=False):
            parts += [nn.Linear(a, b), nn.Tanh()]
        parts += [nn.Linear(widths[-1], outputs)]
        shape, layout = (fan_in,), "channels_first"
    else:
        layout = "class_token" if kind == "class token" else "channels_last"
        for index, (a, b) in enumerate(zip([fan_in, *widths], widths, strict=False)):
            parts.append(Last(a, b, halve=kind == "last" and index == 1))
        parts += [Read(layout), nn.Linear(widths[-1], outputs)]
        shape = (8, 4, fan_in) if kind == "last" else (5, fan_in)
    return kind, parts, shape, layout, outputs


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(2)


@st.composite
def tasks(draw, outputs):
    kind = draw(st.sampled_from(["indices", "probabilities", "labels", "numbers"]))
    if kind in ("indices", "probabilities"):
        smoothing = draw(st.sampled_from([0.0, 0.2]))
        ignored = draw(st.sampled_from([-100, 1]))
        task = Classification(outputs, label_smoothing=smoothing, ignore_index=ignored)
    elif kind == "labels":
        task = MultiLabel(outputs)
    else:
        task = Regression(outputs, draw(st.sampled_from(["mse", "l1", "huber"])))
    return kind, task


def targets(kind, outputs, n):
    if kind == "indices":
        return torch.arange(n) * 7 % outputs
    if kind == "probabilities":
        return torch.rand(n, outputs, dtype=torch.float64).softmax(1)
    return (torch.rand(n, outputs) < 0.5) if kind == "labels" else 2 * torch.randn(n, outputs, dtype=torch.float64)


@st.composite
def rules(draw, kind, target):
    names = ["greedy", "auglocal", "0c2f"]
    names += ["predsim"] if target == "indices" else []
    names += ["infopro", "R1", "R2E", "E"] if kind in ("images", "last") else []
    names += ["man"] if kind != "class token" else []
    name = draw(st.sampled_from(names))
    if name == "predsim":
        return PredSim(beta=0.75, head="linear", scale_classifier=False)
    if name == "infopro":
        channels = 3
        return InfoPro((2.0, 0.5), (2.0, 0.5), head="linear", mean=(0.0,) * channels, std=(1.0,) * channels)
    made = {
        "greedy": Greedy(),
        "auglocal": AugLocal(depth=1, joint_tail=False),
        "0c2f": Greedy("0c2f"),
        "man": MAN(0.5, head="linear"),
    }
    return made.get(name) or ContSup(name, head="0c2f")


# The same draws in every run: rounding, which normalisations of nearly equal numbers amplify, has no bound.
draws = partial(settings, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@draws(max_examples=30)
@given(st.data())
def test_losses_and_gradients_are_those_of_the_formulas(data):
    check_losses_and_gradients(data)


@pytest.mark.slow
@draws(max_examples=150)
@given(st.data())
def test_losses_and_gradients_of_more_draws(data):
    check_losses_and_gradients(data)


def check_losses_and_gradients(data):
    kind, parts, shape, layout, outputs = data.draw(networks())
    target, task = data.draw(tasks(outputs))
    rule = data.draw(rules(kind, target))
    if isinstance(rule, InfoPro):
        channels = shape[0] if kind == "images" else shape[-1]
        rule = InfoPro(rule.first, rule.last, head="linear", mean=(0.0,) * channels, std=(1.0,) * channels)
    n = data.draw(st.integers(3, 6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    for part in parts:
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    said = "class_token" if layout == "class_token" else None
    net = LocalSequential(
        nn.Sequential(*parts).double(),
        rule,
        task=task,
        input_shape=shape,
        layout=said,
        recompute=data.draw(st.sampled_from(["none", "auxiliary", "all"])),
        fused=data.draw(st.booleans()),
    )
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, -0.7, 0.7)
    twin = copy.deepcopy(net)
    x, y = torch.rand(n, *shape, dtype=torch.float64), targets(target, outputs, n)
    out = net(x, y)
    out.loss.backward()

    h, history = x, []
    for k, module in enumerate(twin.local_modules):
        if module.context is not None:
            h = literal_context(module.context, h, history, layout)
        history.append(h.detach())
        for layer in module.layers:
            h = layer(h)
        if module.auxiliary is None:
            loss, output = literal_loss(task, h, y), h
        else:
            loss, output = literal_auxiliary(rule, module.auxiliary, task, h, y, x, layout)
        assert float(out.module_losses[k]) == pytest.approx(float(loss.detach()), rel=1e-9, abs=1e-9)
        assert float(out.module_counts[k]) == pytest.approx(literal_count(task, output.detach(), y), rel=1e-9)
        trained = [p for p in module.parameters() if p.requires_grad]
        mine = [p for p in net.local_modules[k].parameters() if p.requires_grad]
        expected = torch.autograd.grad(loss, trained, allow_unused=True)
        for ours, theirs in zip(mine, expected, strict=True):
            if theirs is None:
                assert ours.grad is None or not ours.grad.any()
                continue
            scale = max(1.0, float(theirs.norm()))
            assert (ours.grad - theirs).norm() <= 1e-9 * scale, (rule, task, kind, k)
        h = h.detach()
    assert math.isfinite(float(out.loss.detach()))


def test_binary_is_one_label():
    output, y = torch.randn(5, 1).double(), torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(Binary().loss(output, y), literal_loss(MultiLabel(1), output, y))
