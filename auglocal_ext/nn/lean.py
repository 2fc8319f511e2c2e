"""The layers of which transformers are made, by class: what stands in for each, and what is left as it is.

Blocks keep their own forward; only the classes of their parts change. Every part is called as before, with its hooks,
and what one part notes beside its output (:mod:`.remade`) the linear layer that reads it finds. So it does not matter
how a block puts its parts together, and blocks that nobody has seen are lean too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .fusable import SHARDED_ALONE
from .lean_act import FusedGELU
from .lean_attention import FusedMultiheadAttention, attention_refusal
from .lean_dropout import FusedDropout
from .lean_linear import FusedLinear
from .lean_norm import FusedLayerNorm, FusedRMSNorm, norm_refusal
from .sharding import own_type


class Part(NamedTuple):
    """What stands in for a class.

    Attributes:
        fused: the subclass with another forward.
        refusal: why a module of the class stays as it is; None where it need not.
        begins: whether linear layers can make its output again.
    """

    fused: type[nn.Module]
    refusal: Callable[[nn.Module], str | None]
    begins: bool


#: By class.
_PARTS: dict[type[nn.Module], Part] = {}
#: The class of a module before ``fuse``, by the one after.
EAGER: dict[type[nn.Module], type[nn.Module]] = {}
#: Blocks that are reported as a whole, by where their class is defined; nothing of these is imported.
_BLOCKS = {
    ("auglocal_ext.models.transformer", "TransformerBlock"),
    ("torchvision.models.vision_transformer", "EncoderBlock"),
    ("timm.models.vision_transformer", "Block"),
    ("transformers.models.gpt2.modeling_gpt2", "GPT2Block"),
    ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"),
}
#: What stands in for classes of other libraries, by where they are defined: imported when one is met.
_LIBRARIES = {
    "torchvision.models.resnet": ".torchvision_blocks",
    "timm.layers.norm": ".timm_layers",
    "transformers.activations": ".hugging_face",
    "transformers.pytorch_utils": ".hugging_face",
    "transformers.models.llama.modeling_llama": ".hugging_face_llama",
}
#: Parts of known blocks that keep nothing which ``fuse`` could save, by name where they are another library's.
_KEEP_LITTLE = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Linear, nn.Dropout)
_KEEP_LITTLE_NAMES = {"DropPath", "LayerScale", "StochasticDepth"}
#: Where a configuration of Hugging Face names its attention; there is no public name.
_IMPLEMENTATION = "_attn_implementation"


def register_lean(
    eager: type[nn.Module],
    fused: type[nn.Module],
    refusal: Callable[[nn.Module], str | None] = lambda module: None,
    begins: bool = False,
) -> None:
    """Let :func:`auglocal_ext.fuse` turn modules whose class is ``eager`` into ``fused``; see :class:`Part`."""
    _PARTS[eager] = Part(fused, refusal, begins)
    EAGER[fused] = eager


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module before ``fuse`` and ``fully_shard``."""
    own = own_type(module)
    return EAGER.get(own, own)


def know_library(kind: type[nn.Module]) -> None:
    """Register what stands in for the classes of a library, of which a module has been met."""
    if (found := _LIBRARIES.get(kind.__module__)) is not None:
        importlib.import_module(found, __package__)


def make_lean(root: nn.Module, path: Callable[[nn.Module], str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Swap the classes of the parts of ``root``; what was swapped, and what was left and why, by ``path(module)``.

    Without a normalisation or an activation whose output can be made again nothing is changed.
    """
    modules = list(root.modules())
    for module in modules:
        know_library(own_type(module))
    kinds = [plain_type(module) for module in modules]
    if not any(kind in _PARTS and _PARTS[kind].begins for kind in kinds):
        return [], [(path(m), _strange_norm(kind)) for m, kind in zip(modules, kinds, strict=True) if _is_norm(kind)]
    blocks = {id(part): module for module in reversed(modules) if _is_block(module) for part in module.modules()}
    fused: dict[str, None] = {}
    left: list[tuple[str, str]] = []
    for module, kind in zip(modules, kinds, strict=True):
        reason = _swap(module, kind, id(module) in blocks)
        if reason is not None:
            left.append((path(module), reason))
        elif kind in _PARTS:
            whole = blocks.get(id(module), module)
            fused[f"{path(whole)} ({plain_type(whole).__name__})"] = None
    return list(fused), left


def _swap(module: nn.Module, kind: type[nn.Module], in_block: bool) -> str | None:
    """Change the class of ``module`` where it can be; else why a part stays that keeps more than it need."""
    part = _PARTS.get(kind)
    if part is not None:
        if own_type(module) is not type(module):
            return SHARDED_ALONE
        reason = "has a forward of its own" if "forward" in vars(module) else part.refusal(module)
        if reason is None:
            module.__class__ = part.fused
        return reason
    if _is_norm(kind):
        return _strange_norm(kind)
    if not in_block:
        return None
    if (reason := _weights_kept(module)) is not None:
        return reason
    unknown = next(module.children(), None) is None and not isinstance(module, _KEEP_LITTLE)
    if unknown and kind.__name__ not in _KEEP_LITTLE_NAMES and not _gate_of_fused(module):
        return f"is of type {kind.__name__}, which fuse does not know"
    return None


def _is_norm(kind: type[nn.Module]) -> bool:
    return issubclass(kind, nn.LayerNorm | nn.RMSNorm) and kind not in _PARTS


def _strange_norm(kind: type[nn.Module]) -> str:
    return f"is of type {kind.__name__}, not nn.LayerNorm or nn.RMSNorm"


def _gate_of_fused(module: nn.Module) -> bool:
    """SiLU: known as the gate of a gated MLP, which replaces its call."""
    return "SiLU" in type(module).__name__


def _weights_kept(module: nn.Module) -> str | None:
    """Why an attention keeps its (T, T) weights; None where it is not known to."""
    implementation = getattr(getattr(module, "config", None), _IMPLEMENTATION, None)
    if type(module).__name__.endswith("Attention"):
        if implementation == "eager":
            return "keeps the attention's weights: its attn_implementation is 'eager', not 'sdpa'"
        if getattr(module, "fused_attn", None) is False:
            return "keeps the attention's weights: its fused_attn is False"
    return None


def _is_block(module: nn.Module) -> bool:
    return any((kind.__module__, kind.__name__) in _BLOCKS for kind in type(module).__mro__)


register_lean(nn.LayerNorm, FusedLayerNorm, norm_refusal, begins=True)
register_lean(nn.RMSNorm, FusedRMSNorm, norm_refusal, begins=True)
register_lean(nn.GELU, FusedGELU, begins=True)
register_lean(nn.Linear, FusedLinear)
register_lean(nn.Dropout, FusedDropout)
register_lean(nn.MultiheadAttention, FusedMultiheadAttention, attention_refusal)
