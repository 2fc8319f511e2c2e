"""What autograd keeps: the maps of a forward pass, each storage once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_maps(run: Callable[[], Tensor], *modules: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the tensors with positions, (N, C, H, W) with H W > 1, that ``run()`` keeps for backward."""
    own = {t.untyped_storage()._cdata for module in modules for t in (*module.parameters(), *module.buffers())}
    found: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own and tensor.dim() == 4:
            found[storage] = (tensor, tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return [shape for _, shape in found.values()]
