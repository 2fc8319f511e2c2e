"""``fuse``: the same network with its normalisations and activations run by the fused ops, and the way back.

``fuse`` changes classes and nothing else. ``FusedBasicBlock`` is a ``BasicBlock`` with another forward, and
``FusedSequential`` an ``nn.Sequential`` with another forward; both can be imported by name. So state dicts, hooks,
deepcopy and pickle need no special handling, and ``unfuse`` has only the class to restore. ``models/fused.py``
registers the blocks of this package; those of other libraries are registered when ``fuse`` meets one. Transformers keep
their blocks' forward; the classes of their parts change (``lean.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .._torch import NormBase
from .chain import FusedSequential, is_container, units
from .fusable import conv_hindrance, norm_hindrance, pool_hindrance
from .lean import EAGER, know_library, make_lean, plain_type
from .residual import block_hindrance
from .sharding import own_type

_NORMS = (NormBase, nn.GroupNorm)
_SHARDED = "is sharded; fuse before fully_shard"
#: Classes whose forward is replaced, each with the subclass that replaces it: what differs is the class alone, so
#: parameters, buffers, hooks, copies and pickles of a module are as before.
_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.Sequential: FusedSequential}
EAGER[FusedSequential] = nn.Sequential


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` changed; ``str()`` of it is a readable list.

    Attributes:
        fused: what runs fused, by path: ``"layer1_0 (BasicBlock)"``, ``"stem.bn, stem.relu"``.
        left: ``(path, reason)`` of parts that could be fused but stay eager.
    """

    fused: tuple[str, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}", *(f"  {name}" for name in self.fused), f"left eager: {len(self.left)}"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.left)])


def register(eager: type[nn.Module], fused: type[nn.Module]) -> None:
    """Let :func:`fuse` turn modules whose class is ``eager`` into ``fused``, a subclass with another forward."""
    _FUSED[eager] = fused
    EAGER[fused] = eager


def eager_type(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` before :func:`fuse`."""
    return EAGER.get(type(module), type(module))


def fuse(module: nn.Module) -> FusionReport:
    """Run the module's normalisations and activations by nodes that keep one tensor per convolution or linear layer.

    Of a convolutional network it changes, in place, BasicBlocks and Bottlenecks (of :mod:`auglocal_ext.models` and
    torchvision) and every ``nn.Sequential`` with an ``nn.BatchNorm2d``, which becomes one unit with the ReLU or
    LeakyReLU and the convolution or max pooling that follow. Between forward and backward a convolution's raw output is
    kept. Its normalised and rectified versions are made again in backward.

    Of a transformer it changes ``nn.LayerNorm``, ``nn.RMSNorm``, ``nn.GELU``, the gate of SwiGLU, ``nn.Dropout``,
    ``nn.Linear`` and ``nn.MultiheadAttention``, in any block, and their counterparts in Hugging Face's Llama and GPT-2
    and in timm. A linear layer makes its input again in backward from what the layer before keeps anyway. So a block
    keeps its input, q, k, v, the attention's output and statistics, and one raw product before each nonlinearity.
    Dropout draws its mask again from the random state at its call; in a captured CUDA graph it keeps the mask. Networks
    without such a normalisation or activation stay as they are.

    Only how the parts run changes: parameters, buffers, state dict, hooks on the changed modules, copies, pickles and,
    up to rounding, results are as before. Every call inspects the parts again: one that was given hooks, or was
    replaced, runs eagerly, as do ``torch.compile``, ``torch.export`` and ``torch.func`` transforms. Gradients are
    differentiable once. With the same seed, dropout drops the same elements as before, except after an
    ``nn.MultiheadAttention``, whose output then has other strides.

    With FSDP2, fuse before ``fully_shard`` and shard whole blocks. A layer, block or ``nn.Sequential`` that is sharded
    already has a class of its own and stays eager, which the report says.

    :func:`unfuse` reverts it.
    """
    walk = _Walk({id(part): name for name, part in reversed(list(module.named_modules()))})
    walk.visit(module)
    fused, left = make_lean(module, walk.path)
    return FusionReport((*walk.fused, *fused), (*walk.left, *left))


def unfuse(module: nn.Module) -> None:
    """Take :func:`fuse` back, in place: every part has the class it had."""
    for part in module.modules():
        if type(part) in EAGER:
            part.__class__ = eager_type(part)


def _sharded_eager(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has given the module a class of its own, and ``fuse`` had given it none before."""
    own = own_type(module)
    return own is not type(module) and own not in EAGER


class _Walk:
    """One pass of :func:`fuse` over a module; ``names`` are the paths by ``id``."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.fused: list[str] = []
        self.left: list[tuple[str, str]] = []
        self._seen: set[int] = set()

    def visit(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        know_library(own_type(module))
        eager = plain_type(module)
        if (
            issubclass(eager, nn.Sequential)
            and eager.forward is nn.Sequential.forward
            and "forward" not in vars(module)
        ):
            self._sequential(module)
        elif eager in _FUSED:
            self._block(module, eager)
        elif isinstance(module, _NORMS):
            reason = norm_hindrance(module) or "is not in an nn.Sequential or a known residual block"
            self.left.append((self.path(module), reason))
        else:
            for child in module.children():
                self.visit(child)

    def _block(self, block: nn.Module, eager: type[nn.Module]) -> None:
        if _sharded_eager(block):
            reason: str | None = _SHARDED
        else:
            reason = "has a forward of its own" if "forward" in block.__dict__ else block_hindrance(block)
        if reason is not None:
            self.left.append((self.path(block), reason))
            return
        if type(block) is eager:
            block.__class__ = _FUSED[eager]
        self.fused.append(f"{self.path(block)} ({eager.__name__})")
        downsample = getattr(block, "downsample", None)
        if downsample is not None:
            self._shortcut(downsample)

    def _shortcut(self, downsample: nn.Module) -> None:
        """The block runs its shortcut itself where it can; what it cannot, is looked at as any other module."""
        norms = [part for part in downsample.modules() if isinstance(part, _NORMS)]
        if not is_container(downsample) or any(norm_hindrance(norm) is not None for norm in norms):
            self.visit(downsample)

    def _sequential(self, root: nn.Module) -> None:
        """A Sequential, with those in it that are called through it: their layers are one chain."""
        if _sharded_eager(root):
            self._sharded_sequential(root)
            return
        found = after_norm = False
        for unit in units(root.children()):
            if unit.call is None:
                self.fused.append(", ".join(map(self.path, unit.parts)))
                found = True
            else:
                for kind, hindrance in ((nn.Conv2d, conv_hindrance), (nn.MaxPool2d, pool_hindrance)):
                    if after_norm and isinstance(unit.call, kind):
                        self.left.append((self.path(unit.call), hindrance(unit.call) or "stays eager"))
                self.visit(unit.call)
            after_norm = unit.call is None and unit.conv is None and unit.pool is None
        if found:
            self._swap(root)

    def _sharded_sequential(self, root: nn.Module) -> None:
        """Of a Sequential that must keep its class, the children by themselves."""
        norms = [child for child in root.children() if isinstance(child, _NORMS) and norm_hindrance(child) is None]
        if norms:
            self.left.append((self.path(root), _SHARDED))
        for child in root.children():
            if child not in norms:
                self.visit(child)

    def _swap(self, sequential: nn.Module) -> None:
        self._seen.add(id(sequential))
        if not any(unit.norm for unit in units(sequential.children())):
            return
        if type(sequential) is nn.Sequential:
            sequential.__class__ = FusedSequential
        for child in sequential.children():
            if is_container(child):
                self._swap(child)

    def path(self, module: nn.Module) -> str:
        return self.names.get(id(module)) or plain_type(module).__name__
