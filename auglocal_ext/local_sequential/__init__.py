"""The wrappers: ``LocalSequential`` for an ``nn.Sequential``, ``localize`` for any model."""

from .inference import InferenceNetwork
from .localized import LocalizedModel, localize
from .sequential import LocalSequential

__all__ = ["InferenceNetwork", "LocalSequential", "LocalizedModel", "localize"]
