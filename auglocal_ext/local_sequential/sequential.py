"""``LocalSequential``: a drop-in wrapper that trains an ``nn.Sequential`` module by module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from .._torch import FakeTensor, is_replica
from ..auxiliary.base import Auxiliary, can_recompute, followed_by, parts_of, set_recompute
from ..auxiliary.context import ContextSupply
from ..layers import Described, LayoutChoice, describe, group_children, probe_input
from ..local_modules import (
    RECOMPUTE,
    LocalModule,
    LocalOutput,
    Recompute,
    Relay,
    local_pass,
    recomputes_auxiliary,
    run_forward,
)
from ..nn import Deferred, FusedSequential, fuse, refuse_sharding, unfuse, unsync_batch_norm
from ..partition import Balanced
from ..rules.base import Network, Rule, made_like
from ..segments import Segment
from ..tasks import Scored, Task
from .arguments import ends_of_modules, one_input, recompute_per_module, refuse_own_task, what_is_learned
from .batches import CheckedBatches, warn_of_backpropagation
from .checks import norms_of_one_value, warn_of_shared_parameters
from .inference import InferenceNetwork


class LocalSequential(CheckedBatches):
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
        layers: the network. Each child is a layer; children without parameters and those with one number per channel
            (normalisations, PReLU) join the layer before them; the last child with other parameters is the classifier
            and joins the last layer.
        rule: the learning rule, for example :class:`auglocal_ext.AugLocal` or :class:`auglocal_ext.ContSup`.
        num_classes: short for ``task=Classification(num_classes)``; ``label_smoothing`` and ``ignore_index`` below are
            arguments of that task.
        input_shape: shape of one input, ``(channels, height, width)`` or ``(features,)``.
        modules: None for one local module per layer (AugLocal joins its last layers, see there); K for K contiguous
            modules of equal counts; explicit cut points (index of the last layer of each module but the last); or
            :class:`auglocal_ext.Balanced` for K modules of balanced memory or FLOPs. One module is ordinary
            backpropagation.
        task: what is learned (:mod:`auglocal_ext.tasks`): :class:`auglocal_ext.Classification`,
            :class:`auglocal_ext.Binary`, :class:`auglocal_ext.MultiLabel`, :class:`auglocal_ext.Regression`,
            :class:`auglocal_ext.Segmentation`, or your own.
        criterion: with ``outputs``, short for ``task=Criterion(criterion, outputs)``: any
            ``criterion(output, target) -> scalar``.
        outputs: outputs of the network, and of every head, per sample.
        example_input: an input ``(1, *input_shape)`` in place of ``input_shape``, such as integer tokens ``(1, T)``; of
            a batch the first one is used.
        layout: how the layers' outputs are laid out where they have positions: ``"channels_first"``,
            ``"channels_last"`` (tokens ``(T, C)`` too), or ``"class_token"``: tokens of which heads read the first
            (maps stay). One for all layers, or one (or None) for each. None: inferred from the types of the layers.
        label_smoothing: of every local cross-entropy, in [0, 1].
        ignore_index: label that counts nowhere.
        recompute: what keeps only its input and runs a second time for its backward: ``"none"``; the blocks of the
            ``"auxiliary"`` networks; a number n, for the first n layers of every module, and its context encoders; or
            ``"all"``; or one of these per module. The results are the same, to the bit on the CPU.
        fused: run BatchNorm with its activation and convolution by ops that keep one tensor per convolution
            (:func:`auglocal_ext.fuse`): of ``layers``, whose parts change class but nothing else, of auxiliary
            networks and of context encoders. False runs all of them as torch does.

    Attributes:
        primary: the ``layers`` object itself, with its own state-dict keys under ``primary.``.
        auxiliary: auxiliary networks of modules 0 .. K-2, keys under ``auxiliary.``.
        context: context encoders of modules 1 .. K-1 where the rule has them, keys under ``context.``.
        network: what the rule was given: layers with kinds, features and widths, the task, and module ends.
        task: what is learned.
        empty: whether parameters are allocated but have no values yet, see :meth:`materialise`.
        sharded: whether :class:`auglocal_ext.LocalStep` has spread the parameters over processes (``shard=True``).

    Raises:
        TypeError: if ``layers`` is no ``nn.Sequential``, ``rule`` no rule or ``task`` no task.
        ValueError: if the network does not fit its input or the task, if it cannot be cut as asked, if the rule cannot
            make an auxiliary network for it, or if a part cannot honour a setting.
        RuntimeError: for layers whose parameters are sharded over processes.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        rule: Rule,
        num_classes: int | None = None,
        input_shape: Sequence[int] | None = None,
        modules: int | Sequence[int] | Balanced | None = None,
        *,
        task: Task | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        outputs: int | None = None,
        example_input: Tensor | None = None,
        layout: LayoutChoice = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        recompute: Recompute | Sequence[Recompute] = "none",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a learning rule such as AugLocal(depth=6) or ContSup('R1E'), got {rule!r}")
        what = what_is_learned(num_classes, task, criterion, outputs, label_smoothing, ignore_index)
        group_children(layers)  # raises for what has no layers, in its own words
        refuse_sharding(layers)
        example = one_input(layers, input_shape, example_input)
        unfuse(layers)
        self._wrap(layers, layers, describe(layers, example, layout), rule, what, example, modules, recompute, fused)

    def _wrap(
        self,
        primary: nn.Module,
        layers: nn.Sequential,
        described: Described,
        rule: Rule,
        what: Task,
        example: Tensor,
        modules: int | Sequence[int] | Balanced | None,
        recompute: Recompute | Sequence[Recompute],
        fused: bool,
    ) -> None:
        """Cut ``primary``, whose layers are runs of the children of ``layers``, and build what trains it."""
        what.refuse_parameters()
        if next(what.buffers(), None) is not None:
            template = probe_input(primary, (), 0)
            what.to(template.device, template.dtype)
        what.check_output(described.layers[-1].shape, "the network's output")
        if rule.classifier_apart:
            rule.refuse_classifier_apart()
            if isinstance(modules, Balanced):
                raise ValueError(
                    f"{rule!r} makes the classifier a local module by itself, which Balanced would join with layers: "
                    "give a number of modules, or cut points"
                )
            described = described.with_classifier_apart(layers)
        network = Network(
            primary=layers,
            layers=described.layers,
            input_shape=tuple(example.shape[1:]),
            task=what,
            ends=(),
            input=described.input if example.is_floating_point() else None,
            input_dtype=None if example.is_floating_point() else example.dtype,
        )
        ends = ends_of_modules(network, rule, example, modules)
        unfuse(primary)
        self.network = replace(network, ends=ends)
        chosen = recompute_per_module(recompute, self._layer_counts)
        self.rule = rule
        self.network = replace(self.network, recompute=tuple(map(recomputes_auxiliary, chosen)))
        self.primary = primary
        self._recompute = chosen
        last = self.network.num_modules - 1
        auxiliary = [made_like(primary, partial(rule.build_auxiliary, self.network, k)) for k in range(last)]
        contexts = [made_like(primary, partial(rule.build_context, self.network, k)) for k in range(1, last + 1)]
        for k, made in enumerate(auxiliary):
            if not isinstance(made, Auxiliary):
                raise TypeError(f"{rule!r} made {type(made).__name__} for local module {k}, which is no Auxiliary")
            for part in parts_of(made):
                refuse_own_task(part, what, k)
        self.auxiliary = nn.ModuleList(auxiliary)
        self._follows = tuple(tuple(followed_by(made)) for made in auxiliary)
        self.context = nn.ModuleDict({str(k): made for k, made in enumerate(contexts, 1) if made is not None})
        self.task = what
        if fused:
            for fusable in (primary, self.auxiliary, self.context):
                fuse(fusable)
        warn_of_shared_parameters(self.local_modules)
        self._one_image_norms = norms_of_one_value(self, self.local_modules, example)
        self._choosy = self._choosy_parts()
        follow = any(isinstance(part, Auxiliary) and part.follows_layers for part in parts_of(self.auxiliary))
        self._followed = tuple(self._followable()) if follow else ()
        self._warned: set[str] = set()
        self._held: tuple[int, int] | None = None
        self._deferred = Deferred.active
        self.empty = False
        self.sharded = False

    def _children(self) -> list[nn.Module]:
        """What the layers are runs of: the children of ``primary``."""
        return list(cast("nn.Sequential", self.primary))

    def _followable(self) -> list[nn.Module]:
        """The modules that auxiliary networks may follow."""
        return self._children()

    def _segment(self, k: int) -> Segment | None:
        """What runs the layers of local module ``k`` at once; None: they are called one after another."""
        return None

    def _infer(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.primary(x))

    @property
    def _layer_counts(self) -> list[int]:
        """How many layers each local module has."""
        return [end - begin for begin, end in pairwise((-1, *self.network.ends))]

    @property
    def num_modules(self) -> int:
        """K, the number of local modules."""
        return self.network.num_modules

    @property
    def local_modules(self) -> tuple[LocalModule, ...]:
        """The local modules in order, for a training loop of your own (:class:`auglocal_ext.LocalModule`)."""
        children = self._children()
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
                    task=self.task,
                    weight=self.rule.classifier_weight,
                    recompute=self._recompute[k],
                    fused=isinstance(self.primary, FusedSequential),
                    followed=self._follows[k] if k < self.num_modules - 1 else (),
                    segment=self._segment(k),
                )
            )
            first = end + 1
        return tuple(modules)

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, grad_scaler: torch.amp.GradScaler | None = None
    ) -> LocalOutput | Tensor:
        """Output of the primary network, or with targets one training pass over the local modules.

        Args:
            x: inputs ``(N, *input_shape)``, floating point, or integers if the network was wrapped with an integer
                example.
            y: targets of the network's task; for classification class indices ``(N,)``, int64, or class probabilities
                ``(N, num_classes)``. None: inference, in training or eval mode.
            grad_scaler: for fp16: its scale is handed to the inner backward so that nothing underflows. Use it
                with ``grad_scaler.scale(out.loss).backward()`` as usual.

        Returns:
            Without ``y`` the output ``(N, outputs)``, whose backward in training mode is ordinary backpropagation and
            warns of it once (not under ``torch.compile``); with ``y`` a :class:`auglocal_ext.LocalOutput`. Under
            ``torch.no_grad`` the losses alone, without gradients.

        Raises:
            TypeError: if ``x`` or ``y`` has an unsupported dtype.
            ValueError: if a shape is wrong, the batch is empty, a target is not valid (on CUDA raised by a later
                call, without a synchronisation; such labels count as ignored), ``x`` requires a gradient, or
                a BatchNorm layer would see a single value per channel.
            RuntimeError: for parameters that are sharded, or held by another process, and for ``net(x, y)`` in
                ``nn.DataParallel``.
        """
        self._refuse_parted()
        if y is None:
            self.refuse_empty()
            self.check_input(x)
            out = self._infer(x) if len(self.context) == 0 else run_forward(self.local_modules, x)
            if self.training and self.num_modules > 1:
                warn_of_backpropagation(self._warned, out)
            return out
        if is_replica(self):
            raise RuntimeError(
                "net(x, y) in nn.DataParallel, whose replicas have no parameters of their own to train: use "
                "DistributedDataParallel with a process per GPU (torchrun), or show this process one GPU "
                "(CUDA_VISIBLE_DEVICES=0)"
            )
        self.check_batch(x, y)
        scale = None
        if grad_scaler is not None:
            scale = grad_scaler.scale(torch.ones((), device=x.device))
        elif torch.is_grad_enabled():
            self.warn_of_fp16(x)
        return local_pass(self.local_modules, x, y, scale)

    def _refuse_parted(self) -> None:
        if self._held is not None:
            raise RuntimeError(
                f"this process holds local modules {self._held[0]} to {self._held[1]} of {self.num_modules}: train by "
                "step(x, y) and infer by step.predict(x), in all stages"
            )
        if self.sharded:
            raise RuntimeError(
                "this process holds shards of the network: train by step(x, y) and infer by step.predict(x), in all "
                "processes"
            )

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> Scored:
        """Loss and count of the network's output for a test batch, without its auxiliary networks.

        The same as ``net.task.score(net(x), y)``; a language model's logits are not made. BatchNorm and dropout follow
        the mode of the network.

        Raises:
            TypeError, ValueError: as :meth:`forward`, for inputs and targets.
            RuntimeError: for parameters that are sharded, or held by another process.
        """
        self._refuse_parted()
        self.check_batch(x, y)
        *earlier, last = self.local_modules
        relay = Relay(self.local_modules, x)
        for module in earlier:
            relay.through(module)
        return last.score(relay.through(last.loss_input), y)

    def export(self) -> nn.Module:
        """A plain copy for inference, in eval mode: no auxiliary networks, context encoders where the rule has them.

        Without context this is a copy of :attr:`primary` with the user's own state-dict keys; with context an
        :class:`InferenceNetwork`. Both can be given to ``torch.export.export`` and ``torch.onnx.export``.

        Raises:
            RuntimeError: if the network was built under a fake tensor mode and so has no weights to copy, or if other
                processes hold some of them.
        """
        if self._held is not None:
            raise RuntimeError(
                f"export() copies all weights, and this process holds those of local modules {self._held[0]} to "
                f"{self._held[1]} of {self.num_modules} alone: load the state dicts of all stages into a network "
                "wrapped anew, and export that"
            )
        if self.sharded:
            raise RuntimeError(
                "export() copies all weights, and this process holds shards of them: save them by step.save(folder), "
                "load them by step.load(folder) in one process, and export there"
            )
        if any(isinstance(p, FakeTensor) for p in self.primary.parameters()):
            raise RuntimeError("export() copies weights, but this network was built of fake tensors, which have none")
        primary, context, modules = self._copied()
        for part in (primary, context):
            unfuse(part)
            unsync_batch_norm(part)
        if len(self.context) == 0:
            return primary.eval()
        return InferenceNetwork(primary, modules, context).eval()

    def _copied(self) -> tuple[nn.Module, nn.ModuleDict, Sequence[LocalModule]]:
        """Copies for export: the network, the context encoders, and the local modules that run them."""
        return copy.deepcopy(self.primary), copy.deepcopy(self.context), self.local_modules

    @property
    def recompute(self) -> tuple[Recompute, ...]:
        """What each local module recomputes in backward; may be set to one choice, or to one per module.

        ``"none"``, ``"auxiliary"``, ``"all"``, or a number of layers, from the module's first on.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: Recompute | Sequence[Recompute]) -> None:
        chosen = recompute_per_module(recompute, self._layer_counts)
        again = tuple(map(recomputes_auxiliary, chosen))
        pairs = zip(self.auxiliary, again, strict=False)  # the last module has no auxiliary network
        set_recompute([(part, choice) for auxiliary, choice in pairs for part in parts_of(auxiliary)])
        self._recompute = chosen
        self.network = replace(self.network, recompute=again)

    @property
    def recompute_ways(self) -> tuple[tuple[Recompute, ...], ...]:
        """Allowed values of :attr:`recompute` for each local module, the numbers of layers last.

        Where a part of the auxiliary network cannot recompute, ``"auxiliary"`` and ``"all"`` are missing. The last
        module has none, so its ``"all"`` is the number of all its layers.
        """
        able = [can_recompute(auxiliary) for auxiliary in self.auxiliary]
        ways: list[tuple[Recompute, ...]] = [RECOMPUTE if each else ("none",) for each in (*able, True)]
        numbers = [range(1, count + 1) for count in self._layer_counts]
        numbers[-1] = numbers[-1][:-1]
        return tuple((*way, *number) for way, number in zip(ways, numbers, strict=True))

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, modules={self.num_modules}, module_ends={self.network.ends}"
