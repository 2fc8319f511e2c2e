"""In which order an epoch visits the images: by seed and epoch alone, so it can be taken up anywhere."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def mixed_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers: a CPU generator looks at the lower 32 bits of its seed only."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def steps_per_epoch(count: int, batch_size: int) -> int:
    """``ceil(count / batch_size)``, less a last batch of one image, in which BatchNorm finds no variance."""
    return max(1, count // batch_size + (count % batch_size > 1))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` image indices, int64 on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
