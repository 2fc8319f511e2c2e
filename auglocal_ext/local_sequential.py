"""``LocalSequential``: a drop-in wrapper that trains an ``nn.Sequential`` module by module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .auxiliary.base import Auxiliary
from .auxiliary.context import ContextSupply
from .local_modules import RECOMPUTE, LocalModule, LocalOutput, LossOptions, Recompute, local_pass, run_forward
from .nn import FusedSequential, fuse, unfuse
from .ops.labels import check_form, check_labels
from .partition import Balanced, describe, evaluating, probe_input
from .rules.balance import balanced_ends
from .rules.base import Network, Rule


class LocalSequential(nn.Module):
    """A network cut into gradient-isolated local modules, each trained on its own local loss.

    ::

        net = LocalSequential(layers, rule=AugLocal(depth=6, pyramid=0.5), num_classes=10, input_shape=(3, 32, 32))
        out = net(x, y)        # forward, auxiliary network, loss, gradients and release, module by module
        out.loss.backward()    # hands the finished gradients to .grad
        logits = net(x)        # the primary network; auxiliary networks never run

    ``net(x, y)`` runs the local modules in order. The graph of each lives only until its own backward, so at most
    one module's activations exist at a time; no gradient crosses a module boundary. ``out.loss`` is the sum of
    the local losses; its ``backward()`` scales the finished gradients by the incoming gradient and adds them to
    ``.grad`` through autograd, once, so optimizers, clipping, accumulation, GradScaler and DDP hooks work as
    usual. Nothing in the pass synchronises the host with the GPU.

    Args:
        layers: the network. Each child is a layer; children without parameters and normalisation layers join the
            layer before them; the last child with parameters is the classifier and joins the last layer.
        rule: the learning rule, for example :class:`auglocal_ext.AugLocal` or :class:`auglocal_ext.ContSup`.
        num_classes: number of classes C; the network's output is ``(N, C)``.
        input_shape: shape of one input, ``(channels, height, width)`` or ``(features,)``.
        modules: None for one local module per layer (AugLocal joins its tail, see there); K for K contiguous
            modules of equal counts; explicit cut points (index of the last layer of each module but the last); or
            :class:`auglocal_ext.Balanced` for K modules of balanced memory. One module is ordinary
            backpropagation.
        label_smoothing: of every local cross-entropy, in [0, 1].
        ignore_index: label that counts nowhere.
        recompute: what keeps only its input and runs a second time for its backward: ``"none"``, the blocks of the
            ``"auxiliary"`` networks, or ``"all"`` (also layers and context encoders); or one of these per module. The
            results are the same, to the bit on the CPU.
        fused: run BatchNorm with its activation and convolution by ops that keep one tensor per convolution
            (:func:`auglocal_ext.fuse`): of ``layers``, whose parts change class but nothing else, of auxiliary
            networks and of context encoders. False runs all of them as torch does.

    Attributes:
        primary: the ``layers`` object itself, with its own state-dict keys under ``primary.``.
        auxiliary: auxiliary networks of modules 0 .. K-2, keys under ``auxiliary.``.
        context: context encoders of modules 1 .. K-1 where the rule has them, keys under ``context.``.
        network: what the rule saw: layers with kinds, shapes and widths, and module ends.

    Raises:
        TypeError: if ``layers`` is no ``nn.Sequential`` or ``rule`` no rule.
        ValueError: if the network does not fit ``input_shape`` or ``num_classes``, if it cannot be cut as asked,
            or if the rule cannot make an auxiliary network for it.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        rule: Rule,
        num_classes: int,
        input_shape: Sequence[int],
        modules: int | Sequence[int] | Balanced | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        recompute: Recompute | Sequence[Recompute] = "none",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a learning rule such as AugLocal(depth=6) or ContSup('R1E'), got {rule!r}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be within 0 .. 1, got {label_smoothing}")
        shape = tuple(int(s) for s in input_shape)
        unfuse(layers)
        described = describe(layers, shape, num_classes)
        if isinstance(modules, Balanced):
            ends = balanced_ends(layers, rule, described, shape, num_classes, modules.modules, fused)
        else:
            ends = rule.ends(len(described), modules)
        self.rule = rule
        self.network = Network(layers, described, shape, num_classes, ends)
        self.primary = layers
        self._options = LossOptions(ignore_index, label_smoothing, rule.classifier_weight)
        self._recompute = _recompute_per_module(recompute, self.network.num_modules)
        last = self.network.num_modules - 1
        template = probe_input(layers, shape, 0)
        # Parts are made where they are used; .to() is left out where nothing changes, since fake tensors refuse it.
        with template.device:
            auxiliary = [rule.build_auxiliary(self.network, k) for k in range(last)]
            supplies = {str(k): rule.build_context(self.network, k) for k in range(1, last + 1)}
        self.auxiliary = nn.ModuleList(auxiliary)
        self.context = nn.ModuleDict({k: supply for k, supply in supplies.items() if supply is not None})
        if template.dtype != torch.get_default_dtype():
            self.auxiliary.to(template.dtype)
            self.context.to(template.dtype)
        if fused:
            for part in (layers, self.auxiliary, self.context):
                fuse(part)
        self._warn_of_shared_parameters()
        self._one_image_norms = self._dry_run()
        self._warned_fp16 = False

    def _warn_of_shared_parameters(self) -> None:
        owner: dict[int, int] = {}
        for module in self.local_modules:
            for parameter in module.parameters():
                first = owner.setdefault(id(parameter), module.index)
                if first != module.index:
                    warnings.warn(
                        f"local modules {first} and {module.index} share a parameter of shape "
                        f"{tuple(parameter.shape)}: both local losses train it",
                        stacklevel=3,
                    )

    def _dry_run(self) -> list[str]:
        """Runs every part on one image of zeros; names BatchNorm layers that see one value per channel and image."""
        single: list[str] = []
        names = {module: name for name, module in self.named_modules()}

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].dim() == 2 or args[0].shape[2:].numel() == 1:
                single.append(names[module])

        norms = [m for m in names if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        hooks = [norm.register_forward_pre_hook(note) for norm in norms]
        try:
            with evaluating(self):
                h = probe_input(self.primary, self.network.input_shape)
                history: list[Tensor | None] = []
                for module in self.local_modules:
                    h = module(h, history)
                    if module.auxiliary is not None and module.auxiliary.classifies:
                        logits = module.auxiliary(h)
                        if logits.shape[1:] != (self.network.num_classes,):
                            raise ValueError(
                                f"the auxiliary network of local module {module.index} puts out "
                                f"{tuple(logits.shape[1:])} per image, expected ({self.network.num_classes},)"
                            )
        finally:
            for hook in hooks:
                hook.remove()
        return single

    @property
    def num_modules(self) -> int:
        """K, the number of local modules."""
        return self.network.num_modules

    @property
    def local_modules(self) -> tuple[LocalModule, ...]:
        """The local modules in order, for a training loop of one's own (:class:`auglocal_ext.LocalModule`)."""
        children = list(self.primary)
        contexts = [
            cast("ContextSupply", self.context[str(k)]) if str(k) in self.context else None
            for k in range(self.num_modules)
        ]
        needed_later: list[frozenset[int]] = [frozenset()]
        for context in reversed(contexts[1:]):
            needed_later.append(needed_later[-1].union(() if context is None else context.needed))
        modules, first = [], 0
        for k, end in enumerate(self.network.ends):
            modules.append(
                LocalModule(
                    index=k,
                    groups=tuple(
                        tuple(children[layer.start : layer.stop]) for layer in self.network.layers[first : end + 1]
                    ),
                    context=contexts[k],
                    auxiliary=cast("Auxiliary", self.auxiliary[k]) if k < self.num_modules - 1 else None,
                    kept=needed_later[-1 - k],
                    options=self._options,
                    recompute=self._recompute[k],
                    fused=isinstance(self.primary, FusedSequential),
                )
            )
            first = end + 1
        return tuple(modules)

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, grad_scaler: torch.amp.GradScaler | None = None
    ) -> LocalOutput | Tensor:
        """Logits of the primary network, or with labels one training pass over the local modules.

        Args:
            x: inputs ``(N, *input_shape)``, floating point.
            y: class indices ``(N,)``, int64. None: inference, in training or eval mode.
            grad_scaler: for fp16: its scale is handed to the inner backward so that nothing underflows. Use it
                with ``grad_scaler.scale(out.loss).backward()`` as usual.

        Returns:
            Without ``y`` logits ``(N, num_classes)``; with ``y`` a :class:`auglocal_ext.LocalOutput`. Under
            ``torch.no_grad`` the losses alone, without gradients.

        Raises:
            TypeError: if ``x`` is not floating point or ``y`` not int64.
            ValueError: if a shape is wrong, the batch is empty, a label is out of range (on CUDA raised by a later
                call, without a synchronisation; such labels count as ignored), ``x`` requires a gradient, or
                a BatchNorm layer would see a single value per channel.
        """
        if y is None:
            self._check_input(x, training_pass=False)
            if len(self.context) == 0:
                return self.primary(x)
            return run_forward(self.local_modules, x)
        self.check_batch(x, y)
        scale = None
        if grad_scaler is not None:
            scale = grad_scaler.scale(torch.ones((), device=x.device))
        elif torch.is_grad_enabled():
            self.warn_of_fp16(x)
        return local_pass(self.local_modules, x, y, scale)

    def warn_of_fp16(self, x: Tensor) -> None:
        """Warn, once, if a training pass on ``x`` would run in fp16: it has no loss scaler."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if dtype == torch.float16 and not self._warned_fp16:
            self._warned_fp16 = True
            warnings.warn(
                "a training pass in fp16 without grad_scaler: small gradients of the local modules underflow to "
                "zero. Pass net(x, y, grad_scaler=scaler), or use bfloat16",
                stacklevel=3,
            )

    def _check_input(self, x: Tensor, training_pass: bool) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating point, got {x.dtype}; convert and normalise images first, for example "
                "x.float().div(255)"
            )
        expected = self.network.input_shape
        fits = x.dim() == len(expected) + 1 and x.shape[1] == expected[0]
        if training_pass:
            fits = fits and tuple(x.shape[1:]) == expected
        if not fits:
            raise ValueError(
                f"x must have shape (N, {', '.join(map(str, expected))}), the input_shape this network was wrapped "
                f"for; got {tuple(x.shape)}"
            )

    def check_batch(self, x: Tensor, y: Tensor, *, labels: bool = True) -> None:
        """Raise for a batch that no training pass can run on, as :meth:`forward` does.

        ``labels=False`` leaves out the values of ``y``, whose check on CUDA is a handful of kernels.
        """
        self._check_input(x, training_pass=True)
        if labels:
            check_labels(y, self.network.num_classes, self.ignore_index)
        else:
            check_form(y)
        if len(x) == 0:
            raise ValueError("the batch is empty (N = 0); drop it before the training pass")
        if len(y) != len(x):
            raise ValueError(f"y must hold one label per input, expected ({len(x)},), got {tuple(y.shape)}")
        if y.device != x.device:
            raise ValueError(f"x is on {x.device} and y on {y.device}; move y to {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires a gradient, but local modules hand none to their input; pass x.detach()")
        if len(x) == 1 and self.training and self._one_image_norms:
            active = [n for n in self._one_image_norms if self.get_submodule(n).training]
            if active:
                raise ValueError(
                    f"a batch of one image: {active[0]} is a BatchNorm layer that sees one value per channel in it, "
                    "whose variance is undefined. Use a batch of at least 2 (drop_last=True in the DataLoader)"
                )

    def export(self) -> nn.Module:
        """A plain copy for inference, in eval mode: no auxiliary networks, context encoders where the rule has them.

        Without context this is an ``nn.Sequential`` with the user's own state-dict keys; with context an
        :class:`InferenceNetwork`. Both can be given to ``torch.export.export`` and ``torch.onnx.export``.

        Raises:
            RuntimeError: if the network was built under a fake tensor mode and so has no weights to copy.
        """
        if any(isinstance(p, FakeTensor) for p in self.primary.parameters()):
            raise RuntimeError("export() copies weights, but this network was built of fake tensors, which have none")
        primary, context = copy.deepcopy(self.primary), copy.deepcopy(self.context)
        unfuse(primary)
        unfuse(context)
        if len(self.context) == 0:
            return primary.eval()
        return InferenceNetwork(primary, self.local_modules, context).eval()

    @property
    def recompute(self) -> tuple[Recompute, ...]:
        """What each local module runs a second time; may be set to one choice, or to one for each module."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: Recompute | Sequence[Recompute]) -> None:
        self._recompute = _recompute_per_module(recompute, self.num_modules)

    @property
    def ignore_index(self) -> int:
        """The label that counts nowhere."""
        return self._options.ignore_index

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, modules={self.num_modules}, module_ends={self.network.ends}"


def _recompute_per_module(recompute: Recompute | Sequence[Recompute], modules: int) -> tuple[Recompute, ...]:
    chosen = (recompute,) * modules if isinstance(recompute, str) else tuple(recompute)
    if len(chosen) != modules or any(choice not in RECOMPUTE for choice in chosen):
        raise ValueError(
            f"recompute is one of {', '.join(RECOMPUTE)}, or a sequence with one of these for each of the {modules} "
            f"local modules; got {recompute!r}"
        )
    return chosen


class InferenceNetwork(nn.Module):
    """The primary network with its context encoders, for inference: ``(N, *input_shape) -> (N, num_classes)``."""

    def __init__(self, primary: nn.Sequential, modules: Sequence[LocalModule], context: nn.ModuleDict) -> None:
        super().__init__()
        self.primary = primary
        self.context = context
        self._runs: list[tuple[int, int, frozenset[int]]] = []
        start = 0
        for module in modules:
            self._runs.append((start, start + len(module.layers), module.kept))
            start += len(module.layers)

    def forward(self, x: Tensor) -> Tensor:
        children = list(self.primary)
        history: list[Tensor | None] = []
        h = x
        for k, (start, stop, kept) in enumerate(self._runs):
            if str(k) in self.context:
                h = self.context[str(k)](h, history)
            history.append(h)
            for i in range(len(history)):
                if i not in kept:
                    history[i] = None
            for child in children[start:stop]:
                h = child(h)
        return h
