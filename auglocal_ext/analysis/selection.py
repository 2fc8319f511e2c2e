"""Which runs are analysed how: settings are checked, runs, curves and images loaded, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..local_sequential import LocalSequential
from ..training import CheckpointError, ImageArrays, ImageFiles, SavedRun, SettingsError, Text, load_run
from ..training.data.batches import Batches
from ..training.data.datasets import MASKS, MaskFiles
from ..training.data.folder import FileList, few
from ..training.run.curves import Curves, read_curves
from .cka import LEAST

ANALYSES = ("cka", "probes", "information", "curves")

_OWN_OPTIONS = {
    "against": ("cka",),
    "images": ("cka",),
    "probe_epochs": ("probes",),
    "information_epochs": ("information",),
    "probe_blocks": ("information",),
    "train_images": ("probes", "information"),
}


@dataclass(frozen=True)
class Settings:
    """The options of ``python -m auglocal_ext analyze``, which describes them; None stands for the default.

    Raises SettingsError for a value that cannot be, and for an option of an analysis that is not made.
    """

    checkpoint: tuple[str, ...]
    against: str | None = None
    analyses: tuple[str, ...] = ANALYSES
    data: str | None = None
    images: int | None = None
    train_images: int | None = None
    probe_epochs: int | None = None
    information_epochs: int | None = None
    probe_blocks: int | None = None
    batch_size: int = 256
    seed: int = 0
    device: str = "auto"
    output: str = "runs/analysis"

    def __post_init__(self) -> None:
        for name in self.analyses:
            if name not in ANALYSES:
                raise SettingsError(f"--analyses are of {', '.join(ANALYSES)}, not {name!r}")
        for name, owners in _OWN_OPTIONS.items():
            if getattr(self, name) is not None and not set(owners) & set(self.analyses):
                raise SettingsError(f"{_flag(name)} belongs to {' and '.join(owners)}, not among --analyses")
        least_images = LEAST if "cka" in self.analyses else 2
        for name, least in (
            ("images", LEAST),
            ("train_images", 2),
            ("probe_epochs", 1),
            ("information_epochs", 1),
            ("probe_blocks", 1),
            ("batch_size", least_images),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{_flag(name)} must be at least {least}, got {value}")


@dataclass(frozen=True, eq=False)
class Selection:
    """What is analysed. Keys are the runs' names, as short as they tell the runs apart.

    ``reference`` is the key of the run the others are compared with, which ``runs`` need not hold; None: each run is
    compared with itself. ``curves`` is empty where none are drawn. The images' test split is in random order.
    """

    settings: Settings
    runs: dict[str, SavedRun]
    reference: str | None
    reference_run: SavedRun | None
    curves: dict[str, Curves]
    images: dict[str, ImageArrays | ImageFiles]

    def source(self, run: str) -> Batches:
        """Batches of a run's images."""
        return self.runs[run].source(self.images[run], self.settings.batch_size, self.settings.seed)


def select(settings: Settings, bars: bool = True) -> Selection:
    """Load what ``settings`` name, and raise a TrainingError for what cannot be compared or is not there."""
    paths = list(settings.checkpoint) + ([settings.against] if settings.against is not None else [])
    loaded = {path: load_run(path, settings.device) for path in dict.fromkeys(paths)}
    for path, run in loaded.items():
        if run.config.dataset == MASKS:
            raise SettingsError(
                f"{path} was trained on images with masks, but analyses are of networks that classify images; the mIoU "
                "of each local module is in its log.csv and curves.png"
            )
        if run.config.on_text:
            raise SettingsError(
                f"{path} was trained on text, but analyses are of networks that classify images; the loss of each "
                "local module is in its log.csv and curves.png"
            )
        if not isinstance(run.network, LocalSequential | nn.Sequential):
            raise SettingsError(
                f"{path}: backpropagation trained {run.config.network} as a whole, whose layers are not known; train "
                "it with --rule greedy --modules 1, which is backpropagation too"
            )
    names = _names([loaded[path].path for path in settings.checkpoint], settings.checkpoint)
    runs = {name: loaded[path] for name, path in zip(names, settings.checkpoint, strict=True)}
    reference, reference_run = None, None
    if settings.against is not None:
        reference, reference_run = _as_reference(loaded[settings.against], runs)
    _check_alike([*runs.values()] + ([reference_run] if reference_run is not None else []))
    if reference_run is not None:
        _check_normalisation(runs, reference_run)
    curves = {name: read_curves(run.path) for name, run in runs.items()} if "curves" in settings.analyses else {}
    return Selection(settings, runs, reference, reference_run, curves, _load_images(settings, runs, bars))


def _as_reference(reference: SavedRun, runs: dict[str, SavedRun]) -> tuple[str, SavedRun]:
    """Its name beside those of the runs; one of the runs itself, if it is among them."""
    for name, run in runs.items():
        if run.path.resolve() == reference.path.resolve():
            return name, run
    folders = [run.path for run in runs.values()] + [reference.path]
    return _names(folders, [str(folder) for folder in folders])[-1], reference


def _names(folders: Sequence[Path], given: Sequence[str]) -> list[str]:
    """The last parts of the folders' paths, as few as make them differ."""
    parts = [folder.resolve().parts for folder in folders]
    for i, one in enumerate(parts):
        if one in parts[:i]:
            raise SettingsError(f"--checkpoint {given[i]} is given twice, as {given[parts.index(one)]}")
    count = 1
    while len({one[-count:] for one in parts}) < len(parts):
        count += 1
    return ["/".join(one[-count:]) for one in parts]


def _check_alike(runs: Sequence[SavedRun]) -> None:
    first = runs[0]
    for other in runs[1:]:
        for what, one, two in (
            ("images of shape", first.input_shape, other.input_shape),
            ("classes", first.classes, other.classes),
        ):
            if one != two:
                ours, theirs = (few([*map(str, values)]) for values in (one, two))
                raise CheckpointError(
                    f"{first.path} was trained on {what} {ours}, {other.path} on {theirs}: analyse runs on one data "
                    "set at a time"
                )


def _check_normalisation(runs: dict[str, SavedRun], reference: SavedRun) -> None:
    """CKA feeds two networks with one batch."""
    expected = reference.config.augmentation
    for run in runs.values():
        own = run.config.augmentation
        if (own.mean, own.std) != (expected.mean, expected.std):
            raise CheckpointError(
                f"{run.path} was trained on images normalised by mean {own.mean} and std {own.std}, {reference.path} "
                f"by {expected.mean} and {expected.std}: compare with a run of the same --mean and --std"
            )


def _load_images(settings: Settings, runs: dict[str, SavedRun], bars: bool) -> dict[str, ImageArrays | ImageFiles]:
    """Each run's images, read once where runs share them."""
    read: dict[tuple[object, ...], ImageArrays | ImageFiles] = {}
    found = {}
    for name, run in runs.items():
        config = run.images_config(settings.data, settings.train_images, settings.seed)
        key = (config.data, config.dataset, config.image_size, run.input_shape, config.train_images, config.seed)
        if key not in read:
            images = run.images(settings.data, settings.train_images, settings.seed, bars)
            assert not isinstance(images, MaskFiles | Text)  # refused before
            read[key] = _shuffled(images, settings.seed)
        run.check(read[key])
        found[name] = read[key]
    return found


def _shuffled(images: ImageArrays | ImageFiles, seed: int) -> ImageArrays | ImageFiles:
    """With the test split in random order: a folder's is by classes, and a batch of one class is like no other."""
    order = torch.randperm(images.test_count, generator=torch.Generator().manual_seed(seed))
    if isinstance(images, ImageArrays):
        return replace(images, test_images=images.test_images[order], test_labels=images.test_labels[order])
    files = FileList(tuple(images.test.paths[i] for i in order.tolist()), images.test.labels[order])
    return ImageFiles(images.name, images.classes, images.train, files, images.image_size)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
