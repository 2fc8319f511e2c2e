"""Training on real images and text: data, augmentation, recipes, checkpoints and logs.

config = TrainConfig(data="cifar10", output="runs/first", network="resnet32", rule="auglocal", depth=3)
summary = Trainer(config).fit()
config = TrainConfig.from_recipe("infopro", data="cifar10", output="runs/second", epochs=20)
network = load_run("runs/first").network
"""

from __future__ import annotations

from .config.recipes import RECIPES, Recipe
from .config.train_config import TrainConfig
from .data.datasets import ImageArrays, ImageFiles, MaskFiles, load_data
from .data.text import Text, load_text
from .errors import CheckpointError, DataError, DivergedError, Interrupted, SettingsError, TrainingError
from .run.progress import Summary
from .run.saved_run import SavedRun, load_run
from .run.trainer import Trainer

__all__ = [
    "RECIPES",
    "CheckpointError",
    "DataError",
    "DivergedError",
    "ImageArrays",
    "ImageFiles",
    "Interrupted",
    "MaskFiles",
    "Recipe",
    "SavedRun",
    "SettingsError",
    "Summary",
    "Text",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "load_data",
    "load_run",
    "load_text",
]
