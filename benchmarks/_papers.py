"""Accuracies that papers report, to stand beside ours: for which data set, network, row and cut, and from where.

All are test accuracies in percent, mean and deviation as printed. A difference is to be taken to the backpropagation of
the same paper, whose training may differ from the others'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

#: Training and test images of the whole data sets; a run on fewer is not what the papers did.
IMAGES = {"cifar10": (50_000, 10_000), "svhn": (73_257, 26_032), "stl10": (5_000, 8_000)}

LAYERS = {"resnet32": 16, "resnet110": 55}


@dataclass(frozen=True)
class Source:
    """A paper, and what its figures are."""

    name: str
    what: str


AUGLOCAL = Source(
    "Ma et al., ICLR 2024 (poster)", "400 epochs, the best epoch on the test set; number of seeds not known"
)
INFOPRO = Source("Wang et al., ICLR 2021, Table 2", "160 epochs, five runs; errors, here as accuracies")
MAN = Source(
    "Su et al., ECCV 2024",
    "400 epochs; errors, here as accuracies; 16 modules there have the stem in the first block's",
)


@dataclass(frozen=True)
class Figure:
    """An accuracy and that of the same paper's backpropagation, in percent; ``modules`` local modules."""

    accuracy: float
    deviation: float | None
    bp: float
    modules: int
    source: Source

    @property
    def difference(self) -> float:
        """To backpropagation, in points."""
        return self.accuracy - self.bp


_DATA = ("cifar10", "svhn", "stl10")

# Per network and row: accuracy and deviation on CIFAR-10, SVHN and STL-10.
_AUGLOCAL: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    "resnet32": {
        "BP": ((93.73, 0.04), (97.01, 0.03), (80.80, 0.17)),
        "PredSim": ((79.29, 0.37), (92.02, 0.35), (70.67, 0.39)),
        "InfoPro": ((87.26, 0.16), (93.30, 0.73), (70.85, 0.14)),
        "DGL": ((86.30, 0.12), (95.14, 0.09), (73.13, 1.08)),
        "AugLocal d=2": ((91.12, 0.24), (95.86, 0.04), (78.58, 0.66)),
        "AugLocal d=3": ((92.26, 0.20), (96.43, 0.02), (79.79, 0.27)),
        "AugLocal d=4": ((93.08, 0.10), (96.79, 0.08), (80.65, 0.16)),
        "AugLocal d=5": ((93.38, 0.11), (96.87, 0.03), (80.73, 0.18)),
        "AugLocal d=6": ((93.47, 0.09), (96.85, 0.08), (80.95, 0.55)),
    },
    "resnet110": {
        "BP": ((94.61, 0.18), (97.10, 0.05), (80.41, 0.74)),
        "PredSim": ((74.95, 0.36), (89.90, 0.76), (68.91, 0.48)),
        "InfoPro": ((86.95, 0.46), (92.26, 0.59), (70.61, 0.50)),
        "DGL": ((85.69, 0.32), (95.12, 0.06), (72.27, 0.51)),
        "AugLocal d=2": ((90.98, 0.05), (95.92, 0.10), (78.29, 0.37)),
        "AugLocal d=3": ((92.62, 0.22), (96.45, 0.08), (79.30, 0.26)),
        "AugLocal d=4": ((93.22, 0.17), (96.74, 0.11), (80.77, 0.33)),
        "AugLocal d=5": ((93.75, 0.20), (96.85, 0.05), (80.20, 0.56)),
        "AugLocal d=6": ((93.96, 0.15), (96.96, 0.01), (80.40, 0.17)),
    },
}

# Greedy SL in 16 modules, and end-to-end training: test errors.
_GREEDY = {
    ("cifar10", "resnet32"): (24.59, 0.83, 7.37),
    ("cifar10", "resnet110"): (18.92, 1.27, 6.50),
    ("svhn", "resnet110"): (6.37, 0.42, 3.07),
    ("stl10", "resnet110"): (30.38, 0.39, 22.27),
}

# DGL with MAN, and backpropagation.
_MAN_DGL = {("cifar10", "resnet32"): (90.89, 93.63), ("cifar10", "resnet110"): (90.27, 94.58)}


def _auglocal_modules(row: str, network: str) -> int:
    """Local modules in AugLocal's tables: one per layer, but its own rows join the last d layers (released code)."""
    if row == "BP":
        return 1
    depth = int(row.partition("d=")[2] or 1)
    return LAYERS[network] - (depth - 1)


def _all() -> dict[tuple[str, str, str], Figure]:
    found = {}
    for network, rows in _AUGLOCAL.items():
        for row, figures in rows.items():
            for data, figure, bp in zip(_DATA, figures, rows["BP"], strict=True):
                modules = _auglocal_modules(row, network)
                found[data, network, row] = Figure(*figure, bp[0], modules, AUGLOCAL)
    for (data, network), (error, deviation, bp) in _GREEDY.items():
        found[data, network, "Greedy"] = Figure(round(100 - error, 2), deviation, round(100 - bp, 2), 16, INFOPRO)
    for (data, network), (accuracy, other) in _MAN_DGL.items():
        found[data, network, "MAN + DGL"] = Figure(accuracy, None, other, LAYERS[network], MAN)
    return found


FIGURES = _all()


def find_figure(data: str | None, network: str, row: str, modules: int | None) -> Figure | None:
    """What a paper has for the same data set, network, row and number of local modules."""
    figure = FIGURES.get((data or "", network, row))
    return figure if figure is not None and figure.modules == modules else None


def dataset_of(config: dict[str, Any]) -> str | None:
    """The papers' data set that a run was made on, whole; None for another or a part. ``config`` is its config.json.

    A folder of images is CIFAR-10 if its classes have CIFAR-10's names and its images are as many.
    """
    facts, name = config["data"], config["settings"]["dataset"]
    if name == "folder" and tuple(facts["classes"]) == CIFAR10_CLASSES:
        name = "cifar10"
    whole = IMAGES.get(name) == (facts["train_images"], facts["test_images"])
    return name if whole else None
