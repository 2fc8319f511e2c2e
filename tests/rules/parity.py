"""Thirty configurations on exactly reproducible numbers, and what they came to: ``parity.json`` beside this file.

The table was recorded before tasks, loss settings and features were parts of their own, from code that had been held
against the papers' released code in float64. ``python tests/rules/parity.py`` writes it anew, which is right only where
a change of these numbers is what was wanted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auglocal_ext import DGL, MAN, AugLocal, Balanced, ContSup, Greedy, InfoPro, LocalSequential, PredSim, Rule, models

TABLE = Path(__file__).with_name("parity.json")
WEIGHTS = ((5.0, 0.5), (0.5, 1.0))
CLASSES = 10


def residual() -> tuple[nn.Sequential, tuple[int, ...]]:
    return models.resnet_cifar(14, width=4), (3, 12, 12)


def deeper() -> tuple[nn.Sequential, tuple[int, ...]]:
    return models.resnet_cifar(26, width=4), (3, 8, 8)


def bottlenecks() -> tuple[nn.Sequential, tuple[int, ...]]:
    block = models.Bottleneck
    layers = nn.Sequential(
        models.conv_bn_relu(3, 4, max_pool_after=True),
        *(block(4, 16, 1, 4), block(16, 16, 1, 4), block(16, 32, 2, 8, groups=2), block(32, 64, 2, 16)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)),
    )
    return layers, (3, 16, 16)


def flat() -> tuple[nn.Sequential, tuple[int, ...]]:
    parts: list[nn.Module] = []
    for fan_in, width in ((3, 8), (8, 8), (8, 16), (16, 16)):
        parts += [nn.Conv2d(fan_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.1)]
        parts += [nn.MaxPool2d(2)] if width == fan_in else []
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    return nn.Sequential(*parts, head), (3, 12, 12)


def vectors() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = nn.Sequential(
        *(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh()),
        *(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    )
    return layers, (6,)


Case = tuple[Any, Rule, dict[str, Any]]

CASES: dict[str, Case] = {
    "auglocal d=1": (residual, AugLocal(depth=1), {}),
    "auglocal d=2": (residual, AugLocal(depth=2), {}),
    "auglocal d=2 eager": (residual, AugLocal(depth=2), {"fused": False}),
    "auglocal d=3 recompute": (residual, AugLocal(depth=3), {"recompute": "all"}),
    "auglocal d=3 all layers": (residual, AugLocal(depth=3, joint_tail=False), {"fused": False}),
    "auglocal d=5": (deeper, AugLocal(depth=5), {}),
    "auglocal d=4 slope 1, 4 modules": (deeper, AugLocal(depth=4, pyramid=1.0), {"modules": 4}),
    "auglocal bottlenecks": (bottlenecks, AugLocal(depth=3, joint_tail=False), {}),
    "auglocal vgg": (flat, AugLocal(depth=3, joint_tail=False, head="vgg"), {"modules": [0, 2]}),
    "auglocal vectors": (vectors, AugLocal(depth=3, joint_tail=False), {}),
    "auglocal repeated": (residual, AugLocal(depth=3, sampling="repeated", downsampling=True), {}),
    "auglocal conv3x3": (residual, AugLocal(depth=3, sampling="conv3x3"), {}),
    "auglocal smoothing, ignored": (residual, AugLocal(depth=2), {"label_smoothing": 0.1, "ignore_index": 3}),
    "contsup R0 0c2f": (flat, ContSup("R0", head="0c2f"), {}),
    "contsup E": (residual, ContSup("E"), {}),
    "contsup R1E": (residual, ContSup("R1E"), {"fused": False}),
    "contsup R2 2c2f": (residual, ContSup("R2", head="2c2f"), {}),
    "contsup R1E auglocal": (residual, ContSup("R1E", head=AugLocal(depth=3)), {"recompute": "auxiliary"}),
    "greedy": (residual, Greedy(), {}),
    "greedy balanced": (deeper, Greedy(), {"modules": Balanced(3)}),
    "dgl mlp-sr": (residual, DGL("mlp-sr"), {}),
    "dgl cnn": (residual, DGL("cnn"), {"fused": False}),
    "predsim": (residual, PredSim(limit=64), {}),
    "predsim ignored": (residual, PredSim(limit=64), {"ignore_index": 3}),
    "predsim vectors": (vectors, PredSim(beta=0.5), {}),
    "infopro": (residual, InfoPro(*WEIGHTS), {}),
    "infopro contrast": (residual, InfoPro(*WEIGHTS, loss="contrast"), {"ignore_index": 3}),
    "man": (residual, MAN(momentum=0.9), {}),
    "man infopro dgl": (residual, MAN(momentum=0.9, head=InfoPro(*WEIGHTS, head=DGL("mlp"))), {}),
    "one module": (residual, AugLocal(depth=2), {"modules": 1, "fused": False}),
}


def numbers(count: int, seed: int) -> Tensor:
    """Numbers in [-1, 1) that are the same to the bit everywhere."""
    mixed = (torch.arange(count, dtype=torch.int64) + 1) * 2654435761 + seed * 97 * 40503
    mixed = ((mixed ^ (mixed >> 13)) * 1103515245 + 12345) % 2**31
    return mixed.double() / 2**30 - 1


def filled(shape: tuple[int, ...], seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    count = torch.Size(shape).numel()
    return (numbers(count, seed) * scale + offset).reshape(shape)


@torch.no_grad()
def fill(net: LocalSequential) -> None:
    """Weights of reasonable size, alike wherever a parameter lies in memory."""
    for index, parameter in enumerate(net.parameters()):
        if parameter.dim() > 1:
            values = filled(tuple(parameter.shape), index, (3.0 / parameter[0].numel()) ** 0.5)
        else:  # normalisation weights are 1 when fresh, biases and all others are small
            values = filled(tuple(parameter.shape), index, 0.2, float(bool((parameter == 1).all())))
        parameter.copy_(values)


def batch(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    return filled((8, *shape), 1000 + seed), (torch.arange(8) * (seed + 3)) % CLASSES


def parts(net: LocalSequential) -> dict[str, nn.Module]:
    """The pieces whose numbers are told apart: children of the network, auxiliary networks, context supplies."""
    owners = {"primary": net.primary, "auxiliary": net.auxiliary, "context": net.context}
    return {f"{owner}.{name}": part for owner, whole in owners.items() for name, part in whole.named_children()}


def digest(tensors: list[Tensor]) -> list[float]:
    """Norm, and the inner product with fixed numbers, which tells the order too."""
    values = torch.cat([t.detach().double().flatten() for t in tensors]) if tensors else torch.zeros(0).double()
    return [float(values.norm()), float(values @ numbers(len(values), 77))]


def measured(name: str) -> dict[str, Any]:
    """Everything the table holds of a configuration."""
    build, rule, options = CASES[name]
    torch.manual_seed(1234)
    layers, shape = build()
    net = LocalSequential(layers, rule, CLASSES, shape, **options)
    found: dict[str, Any] = {"ends": list(net.network.ends)}
    found["counts"] = {part: sum(p.numel() for p in module.parameters()) for part, module in parts(net).items()}
    found["fresh"] = {part: digest(list(module.parameters())) for part, module in parts(net).items()}
    net.double()
    fill(net)
    for step in range(2):
        out = net(*batch(shape, step))
        net.zero_grad()
        out.loss.backward()
        found[f"losses {step}"] = out.module_losses.tolist()
        found[f"correct {step}"] = out.module_correct.tolist()
        found[f"gradients {step}"] = {
            part: digest([p.grad for p in module.parameters() if p.grad is not None])
            for part, module in parts(net).items()
        }
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad / (1 + parameter.grad.norm())
    found["buffers"] = {part: digest(list(module.buffers())) for part, module in parts(net).items()}
    net.eval()
    with torch.no_grad():
        found["inference"] = digest([net(batch(shape, 5)[0])])
    return found


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(measured(name))}" for name in CASES]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
