"""What is looked for once, in a network that has just been wrapped."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from .._torch import BatchNormBase
from ..layers import evaluating
from ..local_modules import LocalModule, run_forward


def warn_of_shared_parameters(modules: Sequence[LocalModule]) -> None:
    """Warn of parameters that several local modules train."""
    owner: dict[int, int] = {}
    for module in modules:
        for parameter in (p for p in module.parameters() if p.requires_grad):
            first = owner.setdefault(id(parameter), module.index)
            if first != module.index:
                warnings.warn(
                    f"local modules {first} and {module.index} share a parameter of shape "
                    f"{tuple(parameter.shape)}: both local losses train it",
                    stacklevel=4,
                )


def norms_of_one_value(net: nn.Module, modules: Sequence[LocalModule], example: Tensor) -> list[str]:
    """Runs every part on one example; names BatchNorm layers that see one value per channel and sample.

    Raises:
        ValueError: for an auxiliary network whose output is not of its task.
    """
    single: list[str] = []
    names = {module: name for name, module in net.named_modules()}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dim() == 2 or args[0].shape[2:].numel() == 1:
            single.append(names[module])

    def check(module: LocalModule, h: Tensor) -> None:
        if module.auxiliary is not None:
            output = module.auxiliary(h)
            whose = f"the output of local module {module.index}'s auxiliary network"
            module.auxiliary.settings.task.check_output(tuple(output.shape[1:]), whose)

    norms = [m for m in names if isinstance(m, BatchNormBase)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        with evaluating(net):
            run_forward(modules, example, check)
    finally:
        for hook in hooks:
            hook.remove()
    return single
