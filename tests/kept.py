"""How many bytes autograd keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(run: Callable[[], Tensor], *modules: nn.Module) -> int:
    """Bytes of all storages that ``run()`` keeps for backward, those of the modules' own tensors left out."""
    own = {t.untyped_storage()._cdata for module in modules for t in (*module.parameters(), *module.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(storage.nbytes() for storage in found.values())
