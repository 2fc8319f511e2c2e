"""The rows of ``benchmarks/memory.py --rules``: every learning rule as one step of the papers' loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from _memory_rows import CONTEXT_MODULES, Loss, Row, auglocal, backpropagation, contsup, local
from torch import nn

from auglocal_ext import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, PredSim, Rule
from auglocal_ext.rules import INFOPRO_WEIGHTS, Head

AUGLOCAL_DEPTHS = (2, 3, 6)


def infopro(network: str, loss: Literal["softmax", "contrast"] = "softmax", head: Head = "1c2f") -> InfoPro:
    """InfoPro with its paper's weights for CIFAR-10: what has weight 0 is not trained, so they matter to the costs.

    They are those of the contrastive loss, with softmax too, as in ContSup's released configurations.
    """
    known = INFOPRO_WEIGHTS.get(("cifar10", network), {})
    if CONTEXT_MODULES not in known:
        found = ", ".join(name for data, name in INFOPRO_WEIGHTS if data == "cifar10")
        raise ValueError(f"InfoPro's weights for {CONTEXT_MODULES} modules are known of {found}, not of {network}")
    first, last = known[CONTEXT_MODULES]
    return InfoPro(first, last, loss=loss, head=head)


# Each makes the rule for a network; all cut it into CONTEXT_MODULES modules of equal counts.
RULES: dict[str, tuple[str, Callable[[str], Rule]]] = {
    "Greedy": ("Greedy", lambda network: Greedy()),
    "DGL mlp-sr": ("DGL", lambda network: DGL("mlp-sr")),
    "PredSim": ("PredSim", lambda network: PredSim()),
    "InfoPro softmax": ("InfoPro", infopro),
    "InfoPro contrast": ("InfoPro", partial(infopro, loss="contrast")),
    "MAN": ("MAN", lambda network: MAN()),
}
COMBINATIONS: dict[str, Callable[[str], Rule]] = {
    "MAN + DGL": lambda network: MAN(head=DGL()),
    "ContSup R1E + InfoPro": lambda network: ContSup("R1E", head=infopro(network)),
    "ContSup R1E + AugLocal d=2": lambda network: ContSup("R1E", head=AugLocal(depth=2)),
    "InfoPro contrast + AugLocal d=2": partial(infopro, loss="contrast", head=AugLocal(depth=2)),
}


def equal_modules(network: str, rule: Callable[[str], Rule]) -> tuple[nn.Module, Loss]:
    return local(network, rule(network), CONTEXT_MODULES, fused=True)


def rule_rows() -> list[Row]:
    table = [
        Row("BP", "BP", backpropagation, paper="BP"),
        Row("BP fused", "BP", partial(backpropagation, fused=True), fused=True),
    ]
    for name, (family, rule) in RULES.items():
        table.append(Row(name, family, partial(equal_modules, rule=rule), fused=True))
    for context in ("R0", "R1", "E", "R1E"):
        table.append(Row(f"ContSup {context}", "ContSup", partial(contsup, context=context, fused=True), fused=True))
    for depth in AUGLOCAL_DEPTHS:
        make = partial(auglocal, depth=depth, fused=True)
        table.append(Row(f"AugLocal d={depth}", "AugLocal", make, fused=True))
    for name, rule in COMBINATIONS.items():
        table.append(Row(name, "combination", partial(equal_modules, rule=rule), fused=True))
    return table
