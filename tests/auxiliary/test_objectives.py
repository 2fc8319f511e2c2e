"""Local losses beside the classifier's against slow, literal implementations of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from seen import network, settings

from auglocal_ext import Classification, Regression
from auglocal_ext.auxiliary import LossContext, Objectives, ReconstructionLoss, SimilarityLoss, objectives
from auglocal_ext.layers import Features, vectors
from auglocal_ext.ops import supervised_contrast
from auglocal_ext.rules import LinearHead
from auglocal_ext.tasks import SupervisedContrast

MAP = Features((4, 5, 5))


def linear(task=3):
    return LinearHead().build_auxiliary(network(MAP, task), 0)


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


SEEN = {
    "map": Features((4, 5, 3)),
    "1-D map": Features((4, 6)),
    "3-D map": Features((4, 2, 3, 2)),
    "channels-last map": Features((5, 3, 4), "channels_last"),
    "tokens": Features((5, 4), "channels_last"),
    "vector": vectors(4),
}


def literally_encoded(term, features, h):
    if features.is_vector or features.is_tokens:
        z = F.linear(h, term.encoder.weight)
        return z.movedim(-1, 1)
    x = h if features.layout == "channels_first" else h.movedim(-1, 1)
    return getattr(F, f"conv{x.dim() - 2}d")(x, term.encoder.weight, padding=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("features", SEEN.values(), ids=SEEN)
def test_similarity_loss(features, ignored, smoothing):
    task = Classification(3, label_smoothing=smoothing, ignore_index=ignored)
    term = SimilarityLoss(features, settings(task))
    h = torch.randn(6, *features.shape)
    target = torch.tensor([0, 2, 1, ignored, 0, 1])
    with torch.no_grad():
        z = literally_encoded(term, features, h)
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
    labels = [[(1 - smoothing) * (c == label) + smoothing / 3 for c in range(3)] for label in target.tolist()]
    used = [i for i, label in enumerate(target.tolist()) if label != ignored]
    ours, wanted = literal_similarity(rows), literal_similarity(labels)
    expected = sum((ours[i][j] - wanted[i][j]) ** 2 for i in used for j in used) / len(used) ** 2
    assert float(term.loss(h, LossContext(target)).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_map_of_one_position_is_a_vector(axes):
    shape = (4, *[1] * axes)
    term = SimilarityLoss(Features(shape), settings(3))
    h, context = torch.randn(6, *shape), LossContext(torch.tensor([0, 2, 1, -100, 0, 7]))
    plain = SimilarityLoss(vectors(4), settings(3))
    with torch.no_grad():
        plain.encoder.weight.copy_(term.encoder.weight[(..., *[1] * axes)])
    loss = term.loss(h, context)
    torch.testing.assert_close(loss, plain.loss(h.flatten(1), context))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("features", SEEN.values(), ids=SEEN)
def test_vectors_and_standard_deviations_are_what_replicas_gather(features, monkeypatch):
    term = SimilarityLoss(features, settings(3))
    h, context = torch.randn(6, *features.shape), LossContext(torch.tensor([0, 2, 1, 0, 0, 1]))
    expected, handed = term.loss(h, context), []
    monkeypatch.setattr(objectives, "gathering", lambda: True)
    monkeypatch.setattr(objectives, "gathered", lambda z, target: (handed.append(z), (z, target))[1])
    torch.testing.assert_close(term.loss(h, context), expected)
    assert [z.shape for z in handed] == [(6, 4)]


def test_similarity_is_of_classes_alone():
    with pytest.raises(ValueError, match="similarity loss compares samples by class.*got Regression"):
        SimilarityLoss(MAP, settings(Regression(2)))
    term = SimilarityLoss(MAP, settings(3))
    term.check_target(torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="needs class indices .* got class probabilities .*mixup"):
        term.check_target(torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="maps of 1 to 3 axes"):
        SimilarityLoss(Features((4, 2, 2, 2, 2)), settings(3))


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


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_reconstruction_against_the_image_before_normalisation(layout):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    shape = (4, 4, 4)
    term = ReconstructionLoss(Features(shape, layout), Features((3, 8, 8)), mean, std, settings(3))
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
    handed = h if layout == "channels_first" else h.permute(0, 2, 3, 1)
    with torch.no_grad():
        probability = term.decoder(resized).sigmoid()
        expected = -(pixels * probability.log() + (1 - pixels) * (1 - probability).log()).mean()
        torch.testing.assert_close(term.loss(handed, LossContext(torch.zeros(2), image)), expected)
    assert sum(p.numel() for p in term.parameters()) == 108 * 4 + 363
    assert not term.state_dict().keys() & {"mean", "std"}
    with pytest.raises(ValueError, match="pass the network's input, local_loss\\(out, y, x\\)"):
        term.loss(handed, LossContext(torch.zeros(2)))
    with pytest.raises(ValueError, match="feature maps with height and width, but a module here puts out vectors"):
        ReconstructionLoss(vectors(4), Features((3, 8, 8)), mean, std, settings(3))


def test_weights_of_objectives():
    torch.manual_seed(0)
    head = linear()
    similarity = SimilarityLoss(MAP, settings(3))
    both = Objectives(head, 0.25, [(0.5, similarity), (0.0, SimilarityLoss(MAP, settings(3)))])
    assert len(both.terms) == 1
    h, y = torch.randn(6, 4, 5, 5, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    found = both.loss(h, LossContext(y))
    logits = F.linear(h.mean((2, 3)), head.head.linear.weight, head.head.linear.bias)
    expected = 0.25 * F.cross_entropy(logits, y) + 0.5 * similarity.loss(h, LossContext(y))
    torch.testing.assert_close(found.loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, [h, *both.parameters()]),
        torch.autograd.grad(expected, [h, *both.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert int(found.tally) == int((logits.argmax(1) == y).sum())
    torch.testing.assert_close(both(h), logits)
    alone = Objectives(head, 0.25, [(0.0, similarity)])
    torch.testing.assert_close(alone.loss(h, LossContext(y)).loss, 0.25 * F.cross_entropy(logits, y))


def test_a_network_of_weight_zero_only_counts():
    head = linear()
    similarity = SimilarityLoss(MAP, settings(3))
    both = Objectives(head, 0.0, [(2.0, similarity)])
    h, y = torch.randn(6, 4, 5, 5, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    found = both.loss(h, LossContext(y))
    (grad,) = torch.autograd.grad(found.loss, h)
    (expected,) = torch.autograd.grad(2 * similarity.loss(h, LossContext(y)), h)
    torch.testing.assert_close(grad, expected)
    assert not any(p.requires_grad for p in head.parameters())
    assert int(found.tally) == int((head(h).argmax(1) == y).sum())


@pytest.mark.parametrize("ignored", [-100, 2])
def test_contrastive_heads_have_features_and_no_hits(ignored):
    contrast = SupervisedContrast(7, Classification(3, ignore_index=ignored))
    head = linear(contrast)
    h, y = torch.randn(6, 4, 5, 5), torch.tensor([0, 1, 2, 0, 1, ignored])
    assert head(h).shape == (6, 7)
    found = head.loss(h, LossContext(y))
    expected = literal_contrast(head(h).detach(), y, 0.07, ignored)
    assert float(found.loss) == pytest.approx(expected, rel=1e-4)
    assert int(found.tally) == -1 and not contrast.metric
    with pytest.raises(TypeError, match="contrastive loss compares samples by class and needs class indices"):
        head.head.check_target(torch.full((6, 3), 1 / 3))


def test_contrast_refuses_what_it_cannot_honour():
    with pytest.raises(ValueError, match="cannot smooth labels .label_smoothing=0.1"):
        SupervisedContrast(7, Classification(3, label_smoothing=0.1))
    with pytest.raises(ValueError, match="compares samples by class.*got Regression"):
        SupervisedContrast(7, Regression(3))


def test_terms_start_as_documented():
    features = Features((32, 4, 4))
    std = SimilarityLoss(features, settings(3)).encoder.weight.detach().std()
    assert float(std) == pytest.approx(1 / math.sqrt(3 * 9 * 32), rel=0.05)  # as torch makes it
    decoder = ReconstructionLoss(features, Features((3, 9, 9)), (0.0,) * 3, (1.0,) * 3, settings(3)).decoder
    assert not decoder[0].bias.any() and not decoder[3].bias.any()


@pytest.mark.parametrize("name", ["similarity", "reconstruction"])
def test_terms_recompute_to_the_same_numbers(name):
    def made(recompute):
        torch.manual_seed(0)
        if name == "similarity":
            return SimilarityLoss(MAP, settings(3, recompute))
        return ReconstructionLoss(MAP, Features((3, 9, 9)), (0.0,) * 3, (1.0,) * 3, settings(3, recompute))

    kept, results = [], []
    for recompute in (False, True):
        term = made(recompute)
        torch.manual_seed(1)
        h = torch.randn(6, 4, 5, 5, requires_grad=True)
        context = LossContext(torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(6, 3, 9, 9))
        known = {
            t.untyped_storage()._cdata for t in (h, context.input, context.target, *term.parameters(), *term.buffers())
        }
        saved = {}

        def pack(tensor, saved=saved, known=known):
            if tensor.untyped_storage()._cdata not in known:
                saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = term.loss(h, context)
        kept.append(sum(saved.values()))
        results.append((loss, *torch.autograd.grad(loss, [h, *term.parameters()]), *term.buffers()))
    assert kept[1] == 0 < kept[0]
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_weights_that_train_nothing_are_refused():
    with pytest.raises(ValueError, match="all losses of a local module have weight 0"):
        Objectives(linear(), 0, [(0, SimilarityLoss(MAP, settings(3)))])
