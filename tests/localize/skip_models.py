"""Small models with connections past their submodules; ``by_hand`` detaches all that crosses the cuts of the tests.

``cut(h)`` trains what has run since the last cut by the local loss of ``h``.
"""

from __future__ import annotations

import torch
from odd_models import conv
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Two levels; what skips is an activation that the forward computes by itself."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.bottom = conv(3, 8), conv(8, 8, 2), conv(8, 8, 2)
        self.up2, self.up1 = conv(16, 8), conv(16, 8)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(one))
        x = F.relu(self.bottom(two))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2), two], 1))
        x = self.up1(torch.cat([F.interpolate(F.relu(x), scale_factor=2), one], 1))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))

    def by_hand(self, x, cut):
        down1 = self.down1(x)
        cut(down1)
        one = F.relu(down1.detach())
        down2 = self.down2(one)
        cut(down2)
        one, two = one.detach(), F.relu(down2.detach())
        bottom = self.bottom(two)
        cut(bottom)
        up2 = self.up2(torch.cat([F.interpolate(F.relu(bottom.detach()), scale_factor=2), two.detach()], 1))
        cut(up2)
        x = self.up1(torch.cat([F.interpolate(F.relu(up2.detach()), scale_factor=2), one.detach()], 1))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Dense(nn.Module):
    """Each layer takes the outputs of all before it."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.layers = nn.ModuleList(conv(8 + 4 * i, 4) for i in range(4))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(F.relu(torch.cat(features, 1))))
        return self.head(F.relu(torch.cat(features, 1)).mean((2, 3)))

    def by_hand(self, x, cut):
        features = [self.stem(x)]
        cut(features[-1])
        features = [feature.detach() for feature in features]
        for index, layer in enumerate(self.layers):
            features.append(layer(F.relu(torch.cat(features, 1))))
            if index in (0, 2):
                cut(features[-1])
                features = [feature.detach() for feature in features]
        return self.head(F.relu(torch.cat(features, 1)).mean((2, 3)))


class FeaturePyramid(nn.Module):
    """A backbone whose stages all go into a neck."""

    def __init__(self):
        super().__init__()
        self.stage1, self.stage2, self.stage3 = conv(3, 8), conv(8, 8, 2), conv(8, 8, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        features = [F.relu(self.stage1(x))]
        features.append(F.relu(self.stage2(features[-1])))
        features.append(F.relu(self.stage3(features[-1])))
        return self.neck(features)

    def neck(self, features):
        x = self.lateral[2](features[2])
        for index in (1, 0):
            x = F.interpolate(x, scale_factor=2) + self.lateral[index](features[index])
        return self.head(x.mean((2, 3)))

    def by_hand(self, x, cut):
        features = []
        for stage in (self.stage1, self.stage2, self.stage3):
            out = stage(x)
            cut(out)
            x = F.relu(out.detach())
            features.append(x)
        return self.neck(features)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.side = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, pair):
        main, side = pair
        side = torch.tanh(self.side(side))
        return torch.tanh(self.main(main) + side), side


class Pairs(nn.Module):
    """Blocks that take and return two tensors, one after another in a container."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(768, 16), nn.Linear(32, 5)
        self.blocks = nn.Sequential(*(Pair() for _ in range(3)))

    def forward(self, x):
        x = self.embed(x.flatten(1))
        return self.head(torch.cat(self.blocks((x, x)), 1))

    def by_hand(self, x, cut):
        x = self.embed(x.flatten(1))
        pair = (x, x)
        for index, block in enumerate(self.blocks):
            pair = block(pair)
            if index < 2:
                cut(pair[0])
                pair = tuple(each.detach() for each in pair)
        return self.head(torch.cat(pair, 1))


class Numbers(nn.Module):
    """Returns which entries are large before its features."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, previous=None):
        x = self.linear(x)
        if previous is not None:
            x = x.gather(1, previous)
        return x.argsort(1), x


class TwoTensors(nn.Module):
    """Blocks called one by one that return integers, which need no gradient, and features."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(768, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(Numbers() for _ in range(3))

    def forward(self, x):
        x, order = self.embed(x.flatten(1)), None
        for block in self.blocks:
            order, x = block(x, order)
        return self.head(torch.tanh(x.gather(1, order)))

    def by_hand(self, x, cut):
        x, order = self.embed(x.flatten(1)), None
        for index, block in enumerate(self.blocks):
            order, x = block(x, order)
            if index < 2:
                cut(x)
                x = x.detach()
        return self.head(torch.tanh(x.gather(1, order)))


class Branching(nn.Module):
    """The input itself is used again at the end, and a block runs twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = conv(3, 8), conv(8, 8), conv(11, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        x = F.relu(self.two(F.relu(self.one(image))))
        return self.head(F.relu(self.three(torch.cat([x, image], 1))).mean((2, 3)))

    def by_hand(self, image, cut):
        one = self.one(image)
        cut(one)
        two = self.two(F.relu(one.detach()))
        cut(two)
        x = F.relu(two.detach())
        return self.head(F.relu(self.three(torch.cat([x, image], 1))).mean((2, 3)))


class Lateral(nn.Module):
    """A convolution before the cut whose output is used behind it alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.lateral = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.one(x)
        side = self.lateral(x)
        return self.head((self.three(self.two(x)) + side).mean((2, 3)))


class Nested(nn.Module):
    """What crosses is random, is changed in place, or is computed of a parameter by the forward itself."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.one, self.two, self.three, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        side = x = self.one(x)
        if self.kind == "parameter":
            side = x = x * self.scale
        if self.kind == "dropout":
            side = torch.bernoulli(torch.sigmoid(x)) * x
        x = self.three(self.two(F.relu(x * self.scale)))
        side = side.add_(1.0) if self.kind == "in place" else side
        return self.head((x + side).mean((2, 3)))


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)

    def forward(self, x):
        self.kept = self.conv(x)
        return F.relu(self.kept)


class Remembering(nn.Module):
    """A submodule keeps what the forward uses later."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.head = Keeper(), conv(8, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.three(self.two(self.one(x)))
        return self.head((x + self.one.kept).mean((2, 3)))


class Leap(nn.Module):
    """Begins with an operator in place."""

    def __init__(self):
        super().__init__()
        self.conv = conv(8, 8)

    def forward(self, x):
        return self.conv(torch.tanh_(x))


class BeginsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.head = conv(3, 8), Leap(), Leap(), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))

    def layers(self):
        pool = nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(self.stem, self.one, self.two, pool, nn.Flatten(), self.head)


class WithPyramid(nn.Module):
    """A residual backbone of torchvision with its feature pyramid."""

    def __init__(self, torchvision):
        super().__init__()
        backbone = torchvision.models.resnet18()
        names = {f"layer{i}": str(i) for i in range(1, 5)}
        self.body = torchvision.models._utils.IntermediateLayerGetter(backbone, names)
        self.neck = torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 16)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        found = self.neck(self.body(x))
        return self.head(torch.cat([each.mean((2, 3)) for each in found.values()], 1))
