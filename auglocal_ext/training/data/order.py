"""In which order an epoch visits the images, by seed and epoch alone, and a replica's part of each batch."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


def mixed_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers: a CPU generator looks at the lower 32 bits of its seed only."""
    return zlib.crc32("/".join(map(str, parts)).encode())


@dataclass(frozen=True)
class Part:
    """A replica's part of every batch: parts of training batches are equally large, so up to ``count - 1`` images of an
    epoch's smaller last batch are in none.

    Attributes:
        index: the replica's number.
        count: of replicas.
        led: whether a part begins with the image before it, with which mixing pairs its first image. The first part
            begins with the last image.
    """

    index: int = 0
    count: int = 1
    led: bool = False

    def train(self, size: int) -> list[int] | slice:
        """Places in a training batch of ``size`` images."""
        if self.count == 1:
            return slice(None)
        share = size // self.count
        start = self.index * share
        if self.led and self.index == 0:
            return [share * self.count - 1, *range(share)]
        return slice(start - self.led, start + share)

    def test(self, images: int, batch_size: int) -> list[slice]:
        """Batches of test images, as many in each part; every image is in one."""
        if self.count == 1:
            return [slice(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
        start, end = (index * images // self.count for index in (self.index, self.index + 1))
        batches = math.ceil(math.ceil(images / self.count) / (batch_size // self.count))
        bounds = [start + batch * (end - start) // batches for batch in range(batches + 1)]
        return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


#: That of a run without replicas.
WHOLE = Part()


def steps_per_epoch(count: int, batch_size: int, parts: int = 1) -> int:
    """``ceil(count / batch_size)``, but no last batch of one image per part: BatchNorm would find no variance in it."""
    return max(1, count // batch_size + (count % batch_size // parts > 1))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` image indices, int64 on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
