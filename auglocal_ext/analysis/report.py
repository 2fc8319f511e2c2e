"""A folder of results: the analyses of several runs as CSV files and figures, written run by run."""

from __future__ import annotations

import inspect
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..training import SavedRun, SettingsError
from ..training.config.train_config import to_dict
from ..training.paths import user_path
from ..training.run.versions import versions
from ..training.run.writing import to
from . import plots
from .cka import CKA, cka
from .curves import ModuleScore, module_scores
from .information import Information, information
from .probes import LayerProbe, linear_probes
from .selection import Selection, Settings
from .tables import Table, aligned, layer_table, number, thinned

IMAGES = 10_000
PROBE_EPOCHS = 30
INFORMATION_EPOCHS = 10
PROBE_BLOCKS = 5

FACTS = "analysis.json"


class Report:
    """Results of a selection of runs in the folder ``settings.output``.

    A run's rows are on the disk, and the figures drawn again with it, as soon as it is analysed. ``say`` receives the
    lines for the terminal. SettingsError if the folder holds results already, OutputError if it cannot be written.
    """

    def __init__(self, selection: Selection, *, bars: bool = True, say: Callable[[str], None] = print):
        self._selection, self._settings = selection, selection.settings
        self._bars, self._say = bars, say
        self.output = user_path(self._settings.output)
        with to(self.output):
            if (self.output / FACTS).exists():
                raise SettingsError(f"{self.output} holds results: choose another --output, or delete {FACTS} there")
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / FACTS).write_text(json.dumps(self.describe(), indent=2) + "\n")

    def write(self) -> None:
        """All analyses, each with its table for the terminal; OutputError if a file cannot be written."""
        with to(self.output):
            self._write()

    def _write(self) -> None:
        makers = {"cka": self._cka, "probes": self._probes, "information": self._information, "curves": self._curves}
        for name, make in makers.items():
            if name in self._settings.analyses:
                table = make()
                self._say(f"\n{table}")

    def describe(self) -> dict[str, Any]:
        """What analysis.json holds: command, protocol of each analysis, runs, machine and versions."""
        selection, settings = self._selection, self._settings
        protocols: dict[str, Callable[..., object]] = {
            "cka": cka,
            "probes": linear_probes,
            "information": information,
            "curves": module_scores,
        }
        return {
            "command": _command(settings),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "settings": asdict(settings) | {"images": self._images, **self._training},
            "protocol": {name: _protocol(protocols[name]) for name in settings.analyses},
            "runs": {name: _run_facts(run) for name, run in selection.runs.items()},
            "against": None
            if selection.reference_run is None
            else {selection.reference: _run_facts(selection.reference_run)},
            "images": {
                name: {"train": images.train_count, "test": images.test_count}
                for name, images in selection.images.items()
            },
            "machine": _machine(next(iter(selection.runs.values())).device),
            "versions": versions(),
        }

    @property
    def _images(self) -> int:
        there = min(images.test_count for images in self._selection.images.values())
        return min(there, self._settings.images or IMAGES)

    @property
    def _training(self) -> dict[str, int]:
        settings = self._settings
        return {
            "probe_epochs": settings.probe_epochs or PROBE_EPOCHS,
            "information_epochs": settings.information_epochs or INFORMATION_EPOCHS,
            "probe_blocks": settings.probe_blocks or PROBE_BLOCKS,
        }

    def _each(self, analysis: str) -> Iterator[tuple[str, SavedRun]]:
        """The runs, each told of when it is done."""
        for i, (name, run) in enumerate(self._selection.runs.items()):
            started = time.perf_counter()
            yield name, run
            done = f"{analysis}: {name}, {i + 1} of {len(self._selection.runs)}"
            self._say(f"{done}, {time.perf_counter() - started:,.1f} s")

    def _cka(self) -> str:
        selection, found = self._selection, {}
        table = Table(self.output / "cka.csv", ("run", "layer", "reference_layer", "cka"))
        reference = selection.reference
        for name, run in self._each("cka"):
            other = run if selection.reference_run is None else selection.reference_run
            test = selection.source(name).test()
            result = found[name] = cka(run.network, other.network, test, images=self._images, bars=self._bars)
            table.add(
                (name, layer, against, value)
                for layer, row in zip(result.names_a, result.matrix.tolist(), strict=True)
                for against, value in zip(result.names_b, row, strict=True)
            )
            plots.draw_cka(self._figure(f"cka-{name}"), result, name, reference or name)
            if matched := self._matched(found):
                plots.draw_matched(self._figure("cka-matched"), matched, str(reference))
        return self._cka_table(found)

    def _matched(self, found: dict[str, CKA]) -> dict[str, CKA]:
        """Runs with as many layers as the reference."""
        if self._selection.reference is None:
            return {}
        return {name: result for name, result in found.items() if len(result.names_a) == len(result.names_b)}

    def _cka_table(self, found: dict[str, CKA]) -> str:
        """Layers beside the same layer of the reference; of networks with other layers, beside its classifier."""
        matched, reference = self._matched(found), self._selection.reference
        rest = {name: result for name, result in found.items() if name not in matched}
        lines = []
        if matched:
            lines.append(f"CKA of each layer with the same layer of {reference}")
            lines.append(_cka_lines(matched, {name: result.matched for name, result in matched.items()}))
        if rest:
            whose = "its own network" if reference is None else reference
            lines.append(f"CKA of each layer with the classifier of {whose}")
            lines.append(_cka_lines(rest, {name: result.matrix[:, -1] for name, result in rest.items()}))
        return "\n".join(lines)

    def _probes(self) -> str:
        columns = ("run", "layer", "features", "train_accuracy", "test_accuracy", "test_loss")
        table, found = Table(self.output / "probes.csv", columns), dict[str, list[LayerProbe]]()
        for name, run in self._each("probes"):
            found[name] = linear_probes(
                run.network,
                self._selection.source(name),
                len(run.classes),
                run.input_shape,
                epochs=self._training["probe_epochs"],
                seed=self._settings.seed,
                bars=self._bars,
            )
            table.add(
                (name, probe.name, probe.features, probe.train_accuracy, probe.test_accuracy, probe.test_loss)
                for probe in found[name]
            )
            plots.draw_probes(self._figure("probes"), found)
        names = {name: [probe.name for probe in probes] for name, probes in found.items()}
        values = {name: [100 * probe.test_accuracy for probe in probes] for name, probes in found.items()}
        return "test accuracy of a linear classifier on each layer, %\n" + layer_table(names, values, "{:.2f}")

    def _information(self) -> str:
        layer_columns = ("reconstruction_error", "image_information", "label_information", "accuracy")
        scale = ("label_entropy", "blank_error", "perfect_error")
        table = Table(self.output / "information.csv", ("run", "layer", *layer_columns, *scale))
        found: dict[str, Information] = {}
        for name, run in self._each("information"):
            augmentation = run.config.augmentation
            result = found[name] = information(
                run.network,
                self._selection.source(name),
                len(run.classes),
                cast("tuple[int, int, int]", run.input_shape),
                augmentation.mean,
                augmentation.std,
                epochs=self._training["information_epochs"],
                probe_blocks=self._training["probe_blocks"],
                seed=self._settings.seed,
                bars=self._bars,
            )
            scales = [getattr(result, column) for column in scale]
            table.add(
                (name, layer.name, *(getattr(layer, column) for column in layer_columns), *scales)
                for layer in result.layers
            )
            plots.draw_information(self._figure("information"), found)
        names = {name: [layer.name for layer in result.layers] for name, result in found.items()}
        image = {name: [layer.image_information for layer in result.layers] for name, result in found.items()}
        label = {name: [layer.label_information for layer in result.layers] for name, result in found.items()}
        return (
            f"I(h, x), nats per value of the image\n{layer_table(names, image, '{:.4f}')}\n\n"
            f"I(h, y), nats\n{layer_table(names, label)}"
        )

    def _curves(self) -> str:
        curves, found = self._selection.curves, dict[str, list[ModuleScore]]()
        table = Table(self.output / "curves.csv", ("run", "epoch", "module", "loss", "accuracy"))
        for name, curve in curves.items():
            per_epoch = zip(curve.epochs.tolist(), curve.module_losses.tolist(), curve.metric[3].tolist(), strict=True)
            table.add(
                (name, int(epoch), k, loss, accuracy)
                for epoch, losses, accuracies in per_epoch
                for k, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
            )
        plots.draw_curves(self._figure("curves"), curves)
        scores = Table(self.output / "modules.csv", ("run", "module", "layers", "loss", "accuracy"))
        lines = [["run", "module", "last layer", "training loss", "accuracy", "test loss", "accuracy"]]
        for name, run in self._each("curves"):
            found[name] = module_scores(run.network, self._selection.source(name).test(), bars=self._bars)
            scores.add((name, s.index, " ".join(s.layers), s.loss, s.accuracy) for s in found[name])
            plots.draw_modules(self._figure("modules"), found)
            last = curves[name]
            for k in thinned(len(found[name])):
                score = found[name][k]
                training = float(last.module_losses[-1, k]), float(last.metric[3][-1, k])
                cells = [
                    text
                    for loss, accuracy in (training, (score.loss, score.accuracy))
                    for text in (number(loss, "{:.3f}"), number(accuracy, "{:.2%}"))
                ]
                lines.append([name, str(k), score.layers[-1], *cells])
        return "loss and accuracy of each local module, in training (last epoch) and on test images\n" + aligned(lines)

    def _figure(self, name: str) -> Path:
        return self.output / f"{name.replace('/', '-')}.png"


def _cka_lines(found: dict[str, CKA], values: dict[str, Tensor]) -> str:
    names = {name: result.names_a for name, result in found.items()}
    return layer_table(names, {name: column.tolist() for name, column in values.items()})


def _command(settings: Settings) -> str:
    words = ["python", "-m", "auglocal_ext", "analyze"]
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if value is not None and value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return shlex.join(words)


def _protocol(function: Callable[..., object]) -> str:
    """The docstring up to its arguments: it says how the figures are made."""
    return (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()


def _run_facts(run: SavedRun) -> dict[str, Any]:
    """Without the folders, which say nothing of the run."""
    settings = {
        name: value
        for name, value in to_dict(run.config).items()
        if value is not None and name not in ("data", "output")
    }
    return {"epochs": run.epochs, "classes": len(run.classes), "settings": settings}


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
    }
