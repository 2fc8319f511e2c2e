"""ContSup: greedy local modules that are supplied with context beside the previous module's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..auxiliary.base import Auxiliary
from ..auxiliary.context import ContextSupply, parse_context
from .base import HeadOrRule, Network, Rule, build_task, check_head, head_ends


@dataclass(frozen=True)
class ContSup(Rule):
    """Module k >= 1 is fed ``h + E(image) + sum_i R_i(earlier module inputs)`` instead of ``h`` alone.

    ``h`` and the context are detached; the encoders belong to module k, are trained by its loss alone and are part
    of inference. The local classifier is InfoPro's.

    Args:
        context: ``"R0"`` none (greedy local learning), ``"E"`` the image, ``"R<n>"`` the last n merged module inputs
            (reaching back to the image), ``"R<n>E"`` both.
        head: local classifier ``0c1f``, ``0c2f``, ``1c1f``, ``1c2f``, ``1c3f`` or ``2c2f``: convolutions, linear
            layers (:func:`auglocal_ext.auxiliary.conv_head`); or a rule whose auxiliary networks are taken, such as
            ``AugLocal(depth=3)``, or ``InfoPro(...)`` for the paper's experiments with a decoder.
        widen: width factor of the local classifier.
        feature_dim: features of its hidden linear layers.

    Raises:
        ValueError: for an unknown context or head, or a factor that is not positive.

    Source: Go beyond End-to-End Training: Boosting Greedy Local Learning with Context Supply, arXiv 2312.07636;
    cross-entropy as local loss, without InfoPro's decoder.
    """

    context: str = "R1E"
    head: HeadOrRule = "1c2f"
    widen: float = 1.0
    feature_dim: int = 128

    def __post_init__(self) -> None:
        parse_context(self.context)
        check_head(self.head)
        if self.widen <= 0 or self.feature_dim < 1:
            raise ValueError(
                f"widen must be positive and feature_dim at least 1; got {self.widen} and {self.feature_dim}"
            )

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        return head_ends(self.head, num_layers, modules)

    def build_auxiliary(self, network: Network, module: int) -> Auxiliary:
        return build_task(self.head, network, module, self.widen, self.feature_dim)

    def build_context(self, network: Network, module: int) -> ContextSupply | None:
        count, image = parse_context(self.context)
        if count == 0 and not image:
            return None
        shapes = [network.input_shape] + [network.last_layer(k).shape for k in range(module)]
        for shape in shapes:
            if len(shape) != 3:
                raise ValueError(
                    f"context {self.context!r} is encoded by convolutions and needs images and feature maps (C, H, W); "
                    f"a module here has an input of shape {shape}. Use context='R0' for networks on vectors"
                )
        # Module j >= 1 is fed what module j-1 puts out, so these are the channels of the inputs of modules 0 .. k-1.
        history = [shape[0] for shape in shapes[:-1]]
        return ContextSupply(shapes[-1][0], history, count, image)
