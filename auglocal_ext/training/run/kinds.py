"""Which kind of run a network is for."""

from __future__ import annotations

from ...models import is_segmentation
from ..config.language_models import is_language_model
from .image_kinds import ImageRuns, MaskRuns
from .kind import Kind
from .text_kind import TextRuns


def kind_of(network: str) -> Kind:
    """Of a network by its name."""
    if is_language_model(network):
        return TextRuns()
    return MaskRuns() if is_segmentation(network) else ImageRuns()
