"""The optimizer of a run: SGD with Nesterov momentum for images, AdamW for text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config.train_config import TrainConfig

BETAS = (0.9, 0.95)


def parameter_groups(config: TrainConfig, network: nn.Module) -> list[Any]:
    """The parameters as the optimizer takes them: of text in two groups, matrices with weight decay and the rest.

    Norms, biases and embeddings have none.
    """
    if not config.on_text:
        return list(network.parameters())
    bare = set(_without_decay(network))
    matrices = [p for p in network.parameters() if p not in bare]
    rest = [p for p in network.parameters() if p in bare]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _without_decay(network: nn.Module) -> Iterator[nn.Parameter]:
    for part in network.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.dim() < 2 or isinstance(part, nn.Embedding):
                yield parameter


def make_optimizer(config: TrainConfig, parameters: Any, fused: bool | None = None) -> torch.optim.Optimizer:
    """The optimizer of a resolved configuration, for these parameters or groups."""
    recipe = config.recipe_values
    if config.on_text:
        return torch.optim.AdamW(parameters, lr=recipe.lr, betas=BETAS, weight_decay=recipe.weight_decay, fused=fused)
    assert recipe.momentum is not None  # every recipe of images has one
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )
