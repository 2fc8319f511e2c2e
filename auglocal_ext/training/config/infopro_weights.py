"""InfoPro's weights for the experiments of its paper: by data set, network and where it is cut."""

from __future__ import annotations

import torch

from ...layers import group_children
from ...models import build
from ...partition import CONTSUP_BALANCED, cut_points
from ...rules import INFOPRO_WEIGHTS, Rule
from ..errors import SettingsError


def infopro_weights(dataset: str, network: str, rule: Rule, modules: int | tuple[int, ...] | None) -> tuple[float, ...]:
    """InfoPro's ``(lambda1, lambda2, lambda1, lambda2)`` for an experiment of its paper; SettingsError for another."""
    if (dataset, network) not in INFOPRO_WEIGHTS:
        raise _unpublished(f"{network} on {dataset}")
    with torch.random.fork_rng(devices=[]):
        layers = len(group_children(build(network)))
    try:
        ends = rule.ends(layers, modules)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    count = len(ends)
    known = INFOPRO_WEIGHTS[dataset, network] if ends == cut_points(layers, count) else {}
    if ends[:-1] == _balanced_cuts(dataset, layers, count):
        known = INFOPRO_WEIGHTS.get((dataset, f"{network}, balanced"), {})
    if count not in known:
        raise _unpublished(f"{network} on {dataset} in {count} modules cut after {', '.join(map(str, ends[:-1]))}")
    first, last = known[count]
    return tuple(float(weight) for weight in (*first, *last))


def _unpublished(experiment: str) -> SettingsError:
    known = "; ".join(
        f"{network} on {dataset} in {', '.join(map(str, table))}"
        for (dataset, network), table in INFOPRO_WEIGHTS.items()
    )
    return SettingsError(
        f"no weights of InfoPro are known for {experiment}: give them (--weights A,B,C,D, or in a head "
        f"infopro:weights=A,B,C,D). Known: {known} modules"
    )


def _balanced_cuts(dataset: str, layers: int, count: int) -> tuple[int, ...] | None:
    # STL-10's three modules of ResNet-110 are cut elsewhere than CIFAR-10's in the released configuration.
    if (dataset, layers, count) == ("stl10", 55, 3):
        return (9, 20)
    return CONTSUP_BALANCED.get((layers, count))
