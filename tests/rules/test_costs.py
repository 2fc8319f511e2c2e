"""Parameters and multiply-accumulates of every rule's auxiliary networks, against formulas written out by hand.

ResNet-32 in 16 local modules: the outputs that get an auxiliary network are 6 of 16x32x32, 5 of 32x16x16 and 4 of
64x8x8, and the blocks that follow them lead to 16 (5 times), 32 (5) and 64 (5) channels.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import DGL, MAN, AugLocal, Greedy, InfoPro, LocalSequential, PredSim, models
from auglocal_ext.cost import count_macs, count_parameters, count_training_macs

OUTPUTS = [(16, 32)] * 6 + [(32, 16)] * 5 + [(64, 8)] * 4  # channels, height
CLASSES = 10
WEIGHTS = ((5, 0.05), (0.2, 0.5))
Cost = tuple[int, int]


def add(*costs: Cost) -> Cost:
    return sum(c[0] for c in costs), sum(c[1] for c in costs)


def linear(fan_in: int, fan_out: int) -> Cost:
    return fan_in * fan_out + fan_out, fan_in * fan_out


def conv(fan_in: int, fan_out: int, size: int, kernel: int = 3, bias: bool = False) -> Cost:
    weights = kernel * kernel * fan_in * fan_out
    return weights + bias * fan_out, size * size * weights


def norm(width: int) -> Cost:
    return 2 * width, 0


def block(fan_in: int, width: int, size: int) -> Cost:
    """A residual block that puts out ``width`` maps of ``size``."""
    parts = [conv(fan_in, width, size), norm(width), conv(width, width, size), norm(width)]
    if fan_in != width:
        parts += [conv(fan_in, width, size, kernel=1), norm(width)]
    return add(*parts)


def greedy(width: int, size: int) -> Cost:
    return linear(width, CLASSES)


def dgl_mlp(width: int, size: int) -> Cost:
    hidden = add(linear(4 * width, 4 * width), norm(4 * width))
    return add(hidden, hidden, hidden, linear(4 * width, CLASSES))


def dgl_mlp_sr(width: int, size: int) -> Cost:
    small = add(conv(width, width, size // 4, kernel=1), norm(width))
    return add(small, small, small, dgl_mlp(width, size))


def dgl_cnn(width: int, size: int) -> Cost:
    full = add(conv(width, width, size), norm(width))
    return add(full, full, norm(width), linear(4 * width, CLASSES))


def predsim(width: int, size: int) -> Cost:
    features = min(2048, width * size * size)
    return add(linear(features, CLASSES), conv(width, width, size))


def classifier(width: int, size: int, out: int = CLASSES) -> Cost:
    """The head 1c2f."""
    doubled = min(2 * width, 64)
    size = size // 2 if doubled > width else size
    return add(conv(width, doubled, size), norm(doubled), linear(doubled, 128), linear(128, out))


def decoder(width: int, size: int) -> Cost:
    return add(conv(width, 12, 32, bias=True), norm(12), conv(12, 3, 32, bias=True))


def infopro(width: int, size: int) -> Cost:
    return add(classifier(width, size), decoder(width, size))


def contrast(width: int, size: int) -> Cost:
    return add(classifier(width, size, out=128), decoder(width, size))


CASES = {
    "greedy": (Greedy(), greedy),
    "dgl mlp-sr": (DGL("mlp-sr"), dgl_mlp_sr),
    "dgl mlp": (DGL("mlp"), dgl_mlp),
    "dgl cnn": (DGL("cnn"), dgl_cnn),
    "predsim": (PredSim(), predsim),
    "infopro softmax": (InfoPro(*WEIGHTS), infopro),
    "infopro contrast": (InfoPro(*WEIGHTS, loss="contrast"), contrast),
}


def found(rule, modules: int | None = 16) -> Cost:
    """Trained parameters and training multiply-accumulates beyond those of the network itself."""
    # Fake tensors are quick, but torch cannot copy them, as MAN does with blocks.
    with nullcontext() if isinstance(rule, MAN) else FakeTensorMode():
        net = LocalSequential(models.build("resnet32"), rule, CLASSES, (3, 32, 32), modules=modules)
        backbone = count_macs(net.primary, (3, 32, 32))
        assert count_parameters(net, inference=True) == count_parameters(net.primary) == 466_906
        assert count_macs(net, (3, 32, 32)) == backbone
        return count_parameters(net) - 466_906, count_training_macs(net, (3, 32, 32)) - backbone


@pytest.mark.parametrize("case", CASES)
def test_auxiliary_networks(case):
    rule, of_one = CASES[case]
    assert found(rule) == add(*(of_one(width, size) for width, size in OUTPUTS))


def test_momentum_networks():
    """Two copies of the next block run; one is trained, and so is the head on what they put out."""
    following = [*OUTPUTS[1:], (64, 8)]
    parameters = macs = 0
    for (fan_in, _), (width, size) in zip(OUTPUTS, following, strict=True):
        copied, head = block(fan_in, width, size), classifier(width, size)
        parameters += copied[0] + head[0]
        macs += 2 * copied[1] + head[1]
    assert found(MAN()) == (parameters, macs)


def test_one_sampled_layer():
    """AugLocal d = 2: a block as the last layer, which halves the map once, BatchNorm, and a linear classifier."""
    auxiliary = [
        add(block(width, 64, size // 2 if width < 64 else size), norm(64), linear(64, CLASSES))
        for width, size in OUTPUTS[:-1]  # the last two layers are one module
    ]
    assert found(AugLocal(depth=2), modules=None) == add(*auxiliary)


def test_published_sizes_of_the_formulas():
    """The formulas above give the counts that were published of two kinds of heads."""
    assert [classifier(width, size)[0] for width, size in ((16, 32), (32, 16), (64, 8))] == [10_186, 28_170, 46_602]
    assert [classifier(w, s)[1] / 1e6 for w, s in ((16, 32), (32, 16), (64, 8))] == pytest.approx(
        [1.19, 1.19, 2.37], abs=0.0051
    )
    assert [decoder(width, 32)[0] for width in (16, 32, 64)] == [108 * width + 363 for width in (16, 32, 64)]
    assert sum(decoder(width, size)[1] for width, size in OUTPUTS) / 1e6 == pytest.approx(61.60, abs=0.0051)
    assert [dgl_mlp_sr(width, 32)[0] / 1e6 for width in (128, 256, 512)] == pytest.approx([0.85, 3.36, 13.4], rel=0.01)
