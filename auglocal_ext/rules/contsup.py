"""ContSup: greedy local modules that are supplied with context beside the previous module's output."""

from __future__ import annotations

from dataclasses import dataclass

from ..auxiliary.base import Auxiliary
from ..auxiliary.context import ContextSupply, parse_context, supplied_inputs
from .base import Head, Network, Rule
from .heads import sized_head, unread_widths, why_unread, widened
from .options import head_option, option


@dataclass(frozen=True)
class ContSup(Rule):
    """Module k >= 1 receives ``h + E(image) + sum_i R_i(earlier module inputs)`` instead of ``h`` alone.

    ``h`` and the context are detached; the encoders belong to module k, are trained by its loss alone and are part
    of inference. The local classifier is InfoPro's.

    Args:
        context: ``"R0"`` none (greedy local learning), ``"E"`` the image, ``"R<n>"`` the last n merged module inputs
            (reaching back to the image), ``"R<n>E"`` both.
        head: the classifier on a module's output: ``0c1f``, ``0c2f``, ``1c1f``, ``1c2f``, ``1c3f`` or ``2c2f``
            (convolutions, linear layers: :class:`auglocal_ext.rules.ConvHead`) or any other head; or a rule whose
            auxiliary networks are used, such as ``AugLocal(depth=3)``, or ``InfoPro(...)`` for the paper's experiments
            with a decoder.
        widen: width factor of the image encoders (12 channels inside) and of a head given by name.
        feature_dim: features of the hidden linear layers of a head given by name; default 128.
        init: ``"released"`` leaves the biases of the encoders' convolutions as torch makes them; ``"own"`` has zeros.

    Raises:
        ValueError: for an unknown context, head or ``init``, a factor that is not positive or leaves no channels, and
            an option that nothing uses: a head that is a rule has its own ``widen`` and ``feature_dim``.

    Source: Go beyond End-to-End Training: Boosting Greedy Local Learning with Context Supply, arXiv 2312.07636;
    cross-entropy as local loss, without InfoPro's decoder.
    """

    name = "contsup"

    context: str = option("R1E", "R0, E, R1, R1E, R2, R4, R8, R16, ...", metavar="C")
    head: Head = head_option("1c2f")
    widen: float = option(1.0, "width factor of the image encoders and of a named head", above=0)
    feature_dim: int | None = option(None, "features of a named head's hidden layers, by default 128", least=1)
    init: str = option("own", "initial values of the auxiliary networks", choices=("own", "released"))

    def __post_init__(self) -> None:
        super().__post_init__()
        _, image = parse_context(self.context)
        unread = unread_widths(self.head)
        if self.feature_dim is not None and "feature_dim" in unread:
            raise ValueError(f"feature_dim={self.feature_dim} is read by nothing here: {why_unread(self.head)}")
        if self.widen != 1 and "widen" in unread and not image:
            raise ValueError(f"widen={self.widen} is read by nothing here: {why_unread(self.head)}")

    @property
    def head_rule(self) -> Rule:
        return sized_head(self.head, self.widen, self.feature_dim)

    @property
    def supplies_context(self) -> bool:
        return parse_context(self.context) != (0, False)

    def build_auxiliary(self, network: Network, module: int) -> Auxiliary:
        return self.head_rule.build_auxiliary(network, module)

    def build_context(self, network: Network, module: int) -> ContextSupply | None:
        count, image = parse_context(self.context)
        if count == 0 and not image:
            return None
        who = f"context {self.context!r}"

        # Module j >= 1 receives what module j - 1 puts out, so that is the input whose index is j.
        inputs = {
            index: network.features(index - 1) if index > 0 else network.image(who)
            for index in supplied_inputs(module, count, image)
        }
        hidden = widened(12, self.widen) if image else 12
        image_features = network.image(who) if image else None
        zero_biases = self.init == "own"
        return ContextSupply(network.features(module - 1), image_features, inputs, hidden, zero_biases)
