"""Small models whose forward is no chain of submodules."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def conv(i, o, stride=1):
    return nn.Conv2d(i, o, 3, stride=stride, padding=1)


class Functional(nn.Module):
    """Activations, pooling and flattening are code between submodules."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = conv(3, 8), conv(8, 8), conv(8, 12)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x):
        x = F.relu(self.one(x))
        x = F.max_pool2d(F.relu(self.two(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.three(x)), 2)
        return self.head(torch.flatten(x, 1))


class Twice(nn.Module):
    """One block runs twice, and one activation everywhere."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.act = conv(3, 8), nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)), nn.ReLU()
        self.last, self.head = conv(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(self.block(x))
        x = self.act(self.block(x))
        return self.head(self.act(self.last(x)).mean((2, 3)))


class Tied(nn.Module):
    """The weight of the first linear layer is that of the third."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.layers[2].weight = self.layers[0].weight
        self.stem, self.head = nn.Linear(3 * 64, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x.flatten(1))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@dataclass
class Result:
    hidden: torch.Tensor
    scores: torch.Tensor


Pair = namedtuple("Pair", "scores features")


class Outputs(Functional):
    """Returns a dictionary, a tuple, a named tuple or a dataclass; the features are kept in an outer list."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        kept = [F.relu(self.one(x))]
        kept.append(F.relu(self.two(kept[-1])))
        kept.append(F.relu(self.three(kept[-1])))
        scores = self.head(F.adaptive_avg_pool2d(kept[-1], 2).flatten(1))
        if self.kind == "dict":
            return OrderedDict(hidden=kept, scores=scores)
        if self.kind == "tuple":
            return kept[1], scores
        if self.kind == "named":
            return Pair(scores, kept[1])
        return Result(kept[1], scores)


class KeywordBlock(nn.Module):
    """Takes keyword arguments and returns a tuple; a scale that the forward makes of no data."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.dropout = nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, *, tokens, scale, extra=None):
        return (tokens + self.dropout(torch.tanh(self.linear(tokens) * scale)), None)


class Tokens(nn.Module):
    """A small transformer: position embedding and class token as parameters, a table made of no data."""

    def __init__(self, trained_table=False):
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 9, 16))
        self.register_buffer("steps", torch.arange(9.0))
        self.table = Table(trained_table)
        self.blocks = nn.ModuleList(KeywordBlock(16) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x.flatten(1).unflatten(1, (8, 24)))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        table = self.table(self.steps)
        for block in self.blocks:
            x = block(tokens=x, scale=table, extra=[x.shape[0]])[0]
        return self.head(self.norm(x)[:, 0])


class Table(nn.Module):
    def __init__(self, trained):
        super().__init__()
        self.frequency = nn.Parameter(torch.rand(16), requires_grad=trained)

    def forward(self, steps):
        return torch.cos(steps[:, None] * self.frequency)


class Checkpointed(nn.Module):
    """Runs its blocks under torch.utils.checkpoint, one by one or two at a time."""

    def __init__(self, together=1, reentrant=False):
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(8, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.2)) for _ in range(4)
        )
        self.together, self.reentrant, self.plain = together, reentrant, False

    def forward(self, x):
        x = self.stem(x)
        for start in range(0, 4, self.together):
            blocks = self.blocks[start : start + self.together]
            run = blocks[0] if len(blocks) == 1 else lambda h, blocks=blocks: blocks[1](blocks[0](h))
            x = run(x) if self.plain else checkpoint(run, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


class DropPath(nn.Module):
    """Stochastic depth; in training it leaves out a block for some samples."""

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)


class Stochastic(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(conv(8, 8) for _ in range(3))
        self.path, self.end = DropPath(), nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.path(F.relu(block(x)))
            x = F.dropout(x, 0.2, self.training)
            x = F.relu_(self.end(x))
        return self.head(x.mean((2, 3)))


class Blocks(nn.Module):
    """Residual blocks, with what stochastic depth leaves out decided by Python if ``skips``."""

    def __init__(self, skips=False):
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4))
        self.skips = skips

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if not (self.skips and self.training and torch.rand(()) < 0.5):
                x = block(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle, self.up = conv(3, 8), conv(8, 8, 2), conv(16, 8)
        self.bottom, self.head = conv(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        skip = F.relu(self.down(x))
        x = F.relu(self.bottom(F.relu(self.middle(skip))))
        x = torch.cat([F.interpolate(x, scale_factor=2), skip], 1)
        return self.head(F.relu(self.up(x)).mean((2, 3)))


class SequenceFirst(nn.Module):
    """Hands on (T, N, C)."""

    def __init__(self):
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x.flatten(1).unflatten(1, (8, 24)).transpose(0, 1))
        return self.head(self.two(F.relu(self.one(x))).mean(0))


class ReadsValues(Functional):
    def forward(self, x):
        x = F.relu(self.one(x))
        if x.sum().item() > 1e9:
            x = x * 0
        return self.head(F.adaptive_avg_pool2d(self.three(F.relu(self.two(x))), 2).flatten(1))


class ReadsRealValues(Functional):
    """Its forward reads a value before a cut, which it does not do with fake tensors."""

    def forward(self, x):
        x = F.relu(self.one(x))
        if type(x) is not FakeTensor and bool((x > 1e9).any()):
            x = x * 0
        return self.head(F.adaptive_avg_pool2d(self.three(F.relu(self.two(x))), 2).flatten(1))


class NoiseAcross(Functional):
    """One draw of noise is added in two places."""

    def forward(self, x):
        noise = torch.rand(8, 1, 1)
        x = F.relu(self.one(x)) * noise
        x = F.relu(self.two(x)) * noise
        return self.head(F.adaptive_avg_pool2d(self.three(x), 2).flatten(1))


class Counting(Functional):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class RemembersCalls(Functional):
    """The second call in Python's eyes is not the first."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Averaging(Functional):
    """Replaces a buffer by another in the forward of the model itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        x = F.relu(self.one(x))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3)).detach()
        x = F.relu(self.two(x - self.mean[:, None, None]))
        return self.head(F.adaptive_avg_pool2d(self.three(x), 2).flatten(1))


class Keeping(Functional):
    """Keeps its features as attributes."""

    def forward(self, x):
        self.low = F.relu(self.one(x))
        self.middle = F.relu(self.two(self.low))
        return self.head(F.adaptive_avg_pool2d(self.three(self.middle), 2).flatten(1))


class Scaled(nn.Module):
    """The first block returns a number beside the features, which is used at the end."""

    def __init__(self, number):
        super().__init__()
        self.number, self.one, self.head = number, NumberBlock(number), nn.Linear(8, 5)
        self.two, self.three = conv(8, 8), conv(8, 8)

    def forward(self, x):
        x, number = self.one(x)
        x = F.relu(self.three(F.relu(self.two(x))))
        return self.head(x.mean((2, 3)) * number)


class NumberBlock(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.conv = number, conv(3, 8)

    def forward(self, x):
        return F.relu(self.conv(x)), self.number(len(x))


class Contained(nn.Module):
    """A container of which several segments are made."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class TableOfInput(Functional):
    """Makes a table in the input's dtype."""

    def forward(self, x):
        table = torch.sin(torch.arange(8).to(x.dtype) * 1.2345 + 100.3)[:, None, None]
        x = F.relu(self.two(F.relu(self.one(x)))) * table
        return self.head(F.adaptive_avg_pool2d(self.three(x), 2).flatten(1))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Unused(Functional):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


class PreActivation(nn.Module):
    """Blocks that begin with a norm, behind which a cut is legal, but within the block."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(PreActivationBlock() for _ in range(3)))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PreActivationBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.shortcut = nn.BatchNorm2d(8), conv(8, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.norm(x))
        return self.shortcut(x) + self.conv(x)
