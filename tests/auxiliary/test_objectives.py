"""Local losses beside the classifier's against slow, literal implementations of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.auxiliary import (
    AuxiliaryNetwork,
    ContrastiveNetwork,
    LinearHead,
    Objectives,
    ReconstructionLoss,
    SimilarityLoss,
    supervised_contrast,
)


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


def literal_similarity(rows):
    """Python floats, pair by pair."""
    rows = [[float(v) - sum(map(float, row)) / len(row) for v in row] for row in rows]
    norms = [math.sqrt(dot(row, row)) + 1e-8 for row in rows]
    n = range(len(rows))
    return [[max(-1.0, min(1.0, dot(rows[i], rows[j]) / norms[i] / norms[j])) for j in n] for i in n]


def literal_contrast(features, target, temperature, ignore_index=-100):
    z = [[float(v) for v in row] for row in features]
    z = [[v / math.sqrt(dot(row, row)) for v in row] for row in z]
    used = [i for i, label in enumerate(target.tolist()) if label != ignore_index]
    losses = []
    for i in used:
        similar = {
            a: math.exp(sum(p * q for p, q in zip(z[i], z[a], strict=True)) / temperature) for a in used if a != i
        }
        positives = [a for a in similar if target[a] == target[i]]
        if positives:
            losses.append(-sum(math.log(similar[p] / sum(similar.values())) for p in positives) / len(positives))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (6, 4)], ids=["map", "vector"])
def test_similarity_loss(shape):
    term = SimilarityLoss(4, 3, is_map=len(shape) == 4)
    h = torch.randn(shape)
    target = torch.tensor([0, 2, 1, -100, 0, 1])
    with torch.no_grad():
        z = term.encoder(h)
    rows = []
    for image in z:
        if image.dim() == 1:
            rows.append(image.tolist())
            continue
        row = []
        for channel in image.flatten(1).tolist():
            mean = sum(channel) / len(channel)
            row.append(math.sqrt(sum((v - mean) ** 2 for v in channel) / (len(channel) - 1)))
        rows.append(row)
    labels = [[float(c == label) for c in range(3)] for label in target.tolist()]
    used = [i for i, label in enumerate(target.tolist()) if label != -100]
    ours, wanted = literal_similarity(rows), literal_similarity(labels)
    expected = sum((ours[i][j] - wanted[i][j]) ** 2 for i in used for j in used) / len(used) ** 2
    assert float(term(h, target, None, -100).detach()) == pytest.approx(expected, rel=1e-4)


def test_a_map_of_one_position_is_a_vector():
    term = SimilarityLoss(4, 3)
    h, target = torch.randn(6, 4, 1, 1), torch.tensor([0, 2, 1, -100, 0, 7])
    vectors = SimilarityLoss(4, 3, is_map=False)
    with torch.no_grad():
        vectors.encoder.weight.copy_(term.encoder.weight[:, :, 1, 1])
    loss = term(h, target, None, -100)
    torch.testing.assert_close(loss, vectors(h.flatten(1), target, None, -100))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(
    "target", [[0, 1, 0, 1, 1, 0], [0, 1, 2, 0, 3, -100], [0, 1, 2, 3, 4, 5]], ids=["pairs", "lonely ones", "no pairs"]
)
def test_supervised_contrast(temperature, target):
    features = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(target)
    loss = supervised_contrast(features, target, temperature)
    assert float(loss.detach()) == pytest.approx(literal_contrast(features.detach(), target, temperature), rel=1e-4)
    (grad,) = torch.autograd.grad(loss, features)
    assert torch.isfinite(grad).all()
    assert bool((grad[target == -100] == 0).all())


def test_supervised_contrast_of_ignored_images_alone_is_zero():
    features = torch.randn(3, 5, requires_grad=True)
    loss = supervised_contrast(features, torch.full((3,), -100), 0.07)
    (grad,) = torch.autograd.grad(loss, features)
    assert float(loss) == 0 and torch.isfinite(grad).all()


def test_reconstruction_against_the_image_before_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    term = ReconstructionLoss(4, 3, mean, std)
    pixels = torch.rand(2, 3, 8, 8)
    image = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    h = torch.randn(2, 4, 4, 4)
    # Bilinear with aligned corners, by hand: position i of 8 lies at i * 3/7 of 4.
    at = torch.arange(8) * 3 / 7
    low = at.floor().long().clamp(max=2)
    share = (at - low)[:, None]
    rows = h[:, :, low] * (1 - share) + h[:, :, low + 1] * share
    resized = rows[..., low] * (1 - share[:, 0]) + rows[..., low + 1] * share[:, 0]
    term.decoder.eval()
    with torch.no_grad():
        probability = term.decoder(resized).sigmoid()
        expected = -(pixels * probability.log() + (1 - pixels) * (1 - probability).log()).mean()
        torch.testing.assert_close(term(h, torch.zeros(2), image, -100), expected)
    assert sum(p.numel() for p in term.parameters()) == 108 * 4 + 363
    assert not term.state_dict().keys() & {"mean", "std"}
    with pytest.raises(ValueError, match="image=x"):
        term(h, torch.zeros(2), None, -100)


def test_weights_of_objectives():
    torch.manual_seed(0)
    task = AuxiliaryNetwork(nn.Sequential(), LinearHead(4, 3))
    similarity = SimilarityLoss(4, 3)
    both = Objectives(task, 0.25, [(0.5, similarity), (0.0, SimilarityLoss(4, 3))])
    assert len(both.terms) == 1
    h, y = torch.randn(6, 4, 5, 5, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    found = both.loss(h, y, ignore_index=-100)
    logits = F.linear(h.mean((2, 3)), task.head.linear.weight, task.head.linear.bias)
    expected = 0.25 * F.cross_entropy(logits, y) + 0.5 * similarity(h, y, None, -100)
    torch.testing.assert_close(found.loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, [h, *both.parameters()]),
        torch.autograd.grad(expected, [h, *both.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert int(found.correct) == int((logits.argmax(1) == y).sum())
    torch.testing.assert_close(both(h), logits)


def test_a_task_of_weight_zero_only_counts():
    task = AuxiliaryNetwork(nn.Sequential(), LinearHead(4, 3))
    similarity = SimilarityLoss(4, 3)
    both = Objectives(task, 0.0, [(2.0, similarity)])
    h, y = torch.randn(6, 4, 5, 5, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    found = both.loss(h, y)
    (grad,) = torch.autograd.grad(found.loss, h)
    (expected,) = torch.autograd.grad(2 * similarity(h, y, None, -100), h)
    torch.testing.assert_close(grad, expected)
    assert not any(p.requires_grad for p in task.parameters())
    assert int(found.correct) == int((task(h).argmax(1) == y).sum())


def test_contrastive_networks_have_features_and_no_hits():
    network = ContrastiveNetwork(AuxiliaryNetwork(nn.Sequential(), LinearHead(4, 7)))
    h, y = torch.randn(6, 4, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    assert network(h).shape == (6, 7) and not network.classifies
    found = network.loss(h, y, label_smoothing=0.1, check_labels=False, recompute=True)
    assert float(found.loss) == pytest.approx(literal_contrast(network(h).detach(), y, 0.07), rel=1e-4)
    assert int(found.correct) == -1
