"""One ``torch.optim`` optimizer, stepped for the parameters of one local module at a time.

The user's factory makes one ordinary optimizer over all parameters. For each module its own ``step`` runs, while its
parameter groups hold the parameters of this module alone. State, options, attributes and hooks are therefore those of
one optimizer. Schedulers and ``state_dict`` need no adapter, and checkpoints are those of a plain loop. On CUDA the
groups use torch's fused and capturable forms.

Other ways are not equal to a plain loop. With an ``Optimizer`` around the user's, hooks that are registered for all
optimizers run twice. One optimizer per module has a ``state_dict`` per module, and other groups if the factory sorts
parameters into groups. A copy of the optimizer does not see attributes that are set later.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import drop_step_hooks, mark_as_stepped
from ..local_modules import LocalModule
from ..nn import is_sharded, shard_like
from .module_optimizer import ModuleOptimizer, changed, slots_of

#: Makes the optimizer of a list of parameters or parameter groups: ``lambda params: torch.optim.SGD(params, lr=0.1)``.
OptimizerFactory = Callable[[list[Any]], torch.optim.Optimizer]


class ModuleOptimizers:
    """``whole``, the user's optimizer over all parameters, and a :class:`ModuleOptimizer` of it for each local module.

    A parameter which several modules train belongs to the last of them. Schedulers, ``param_groups`` and ``state_dict``
    are those of one ordinary optimizer, and its checkpoints are too. ``trained`` are its parameters.

    Args:
        modules: the local modules in order.
        factory: called once, with ``params``.
        params: parameters or parameter groups.

    Raises:
        TypeError: if the factory returns no ``torch.optim.Optimizer``.
        ValueError: if the optimizer needs all gradients at once, or holds a parameter that no module trains.
    """

    def __init__(self, modules: Sequence[LocalModule], factory: OptimizerFactory, params: list[Any]) -> None:
        self.whole = factory(params)
        if not isinstance(self.whole, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be a function of the parameters that returns a torch.optim.Optimizer, such as "
                f"lambda params: torch.optim.SGD(params, lr=0.1); it returned {type(self.whole).__name__}"
            )
        if isinstance(self.whole, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times a step, with all gradients; choose another optimizer"
            )
        self._owner = {p: module.index for module in modules for p in module.parameters()}
        self._views: dict[int, ModuleOptimizer] = {}
        self._written: dict[str, Any] = {}  # attributes that the steps of modules have set
        self._modules = [module.index for module in modules]
        self._layout: list[tuple[int, int]] = []
        self._groups: list[dict[str, Any]] = []
        self._pushed: list[dict[str, Any]] = []
        self.prepare()

    def prepare(self, lr: Sequence[Tensor] | None = None) -> None:
        """Bring the views up to date with ``whole``; before every step.

        Args:
            lr: for each parameter group a tensor that stands for its learning rate, in a captured step.
        """
        self._rebuild_if_changed()
        groups = self.whole.param_groups
        for index, group in enumerate(groups):
            options = {key: value for key, value in group.items() if key != "params"}
            if lr is not None:
                options["lr"] = lr[index]
            # Options an optimizer writes while it steps live on in the views; only what the user changed is pushed.
            pushed = {
                k: v for k, v in options.items() if k not in self._pushed[index] or self._pushed[index][k] is not v
            }
            self._pushed[index].update(pushed)
            if pushed:
                for view in (*self._views.values(), self.everything):
                    view.param_groups[index].update(pushed)

    def view(self, module: int) -> ModuleOptimizer:
        """The optimizer of local module ``module``."""
        return self._views[module]

    def finish(self) -> None:
        """After every step: options and attributes that the optimizer itself has changed are shown in ``whole``."""
        for key, value in self._written.items():
            setattr(self.whole, key, value)
        self._written.clear()
        for index, group in enumerate(self.whole.param_groups):
            for view in (*self._views.values(), self.everything):
                written = {
                    key: value
                    for key, value in view.param_groups[index].items()
                    if key != "params" and self._pushed[index].get(key) is not value
                }
                if written:
                    self._pushed[index].update(written)
                    group.update(written)
                    break
        mark_as_stepped(self.whole)

    def try_step(self) -> str | None:
        """Step a copy of one parameter of each group with the options that :meth:`prepare` has set; nothing changes.

        Returns:
            What the step has changed on the host, a number among attributes, options and state; None for nothing.
        """
        devices = {p.device for p in self._owner if p.is_cuda}
        with torch.random.fork_rng(devices), suppress(Exception):  # what fails on copies alone may do without a graph
            with self._on_copies() as (copied, step):
                before = _on_host(copied)
                step(copied)
                return next((key for key, value in _on_host(copied).items() if before.get(key) != value), None)
        return None

    def refuse_inner(self, why: str) -> None:
        """ValueError for an optimizer around another one, which steps all parameters that have gradients.

        Args:
            why: the option under which modules that are not stepped yet have gradients.
        """
        for name, value in {**vars(self.whole), **slots_of(self.whole)}.items():
            if isinstance(value, torch.optim.Optimizer):
                raise ValueError(
                    f"{why}: {type(self.whole).__name__} steps another optimizer, {name}, and that one would step "
                    "every module that has gradients, with each module again. Leave the option out, or train by "
                    "net(x, y).loss.backward() and optimizer.step() in a loop of your own"
                )

    def refuse_shards(self) -> None:
        """ValueError if the optimizer cannot step sharded parameters; nothing changes. A collective call."""
        try:
            with self._on_copies(of=Tensor.dim) as (copied, step):  # matrices may be stepped unlike vectors
                for _ in range(2):  # the first step of some only makes the state
                    step(copied)
        except Exception as error:
            raise ValueError(
                f"shard=True: {type(self.whole).__name__} cannot step sharded parameters with these options; choose "
                f"another optimizer, or leave out fused=True. torch says: {str(error).splitlines()[0]}"
            ) from error

    def load(self, state: dict[str, Any]) -> None:
        """``load_state_dict`` of the whole optimizer; where parameters are sharded, of whole tensors too."""
        ids = [i for group in state["param_groups"] for i in group["params"]]
        params = [p for group in self.whole.param_groups for p in group["params"]]
        if len(ids) == len(params) and any(map(is_sharded, params)):
            held = dict(zip(ids, params, strict=True))
            values = {
                i: {key: shard_like(value, held.get(i)) for key, value in each.items()}
                for i, each in state["state"].items()
            }
            state = {**state, "state": values}
        self.whole.load_state_dict(state)

    @contextmanager
    def _on_copies(
        self, of: Callable[[Tensor], Any] = lambda parameter: None
    ) -> Iterator[tuple[torch.optim.Optimizer, Callable[..., Any]]]:
        """Within it ``whole`` has a copy of one parameter of each group, and for each value of ``of`` within it.

        Gives ``whole`` and its class's ``step``, around which no hooks of its own run.
        """
        state: dict[Tensor, Any] = defaultdict(dict)
        groups = []
        for group in self.everything.param_groups:
            chosen: dict[Any, Tensor] = {}
            for p in (p for p in group["params"] if p.requires_grad):
                if of(p) not in chosen or (p in self.whole.state and chosen[of(p)] not in self.whole.state):
                    chosen[of(p)] = p
            twins = []
            for original in chosen.values():
                twin = nn.Parameter(original.detach().clone())
                twin.grad = torch.zeros_like(twin)
                twins.append(twin)
                if original in self.whole.state:
                    state[twin] = copy.deepcopy(self.whole.state[original])
            if twins:
                groups.append({**group, "params": twins})
        with changed(self.whole, {}, param_groups=groups, state=state):
            drop_step_hooks(self.whole)
            yield self.whole, type(self.whole).step

    def forget_views(self) -> None:
        """After a step that broke off: views made anew, of which a loss scaler has noted nothing."""
        self._written.clear()
        self._layout = []
        self.prepare()

    def options(self) -> tuple[Any, ...]:
        """All options but the learning rates, and the state's identity: what a captured step has built in."""
        return (
            id(self.whole.state),
            *(
                tuple((k, id(v) if isinstance(v, Tensor) else v) for k, v in group.items() if k not in ("params", "lr"))
                for group in self.whole.param_groups
            ),
        )

    def _rebuild_if_changed(self) -> None:
        groups = self.whole.param_groups
        layout = [(id(group), len(group["params"])) for group in groups]
        if layout == self._layout:
            return
        for group in groups:
            strangers = [p for p in group["params"] if p not in self._owner]
            if strangers:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(strangers[0].shape)} that no local module trains "
                    f"({len(strangers)} in all); give it the parameters of the network alone"
                )
            _fit_to_device(group, self.whole.defaults)
        self._groups, self._layout = list(groups), layout
        self.trained = {p for group in groups for p in group["params"]}
        self._pushed = [{} for _ in groups]
        self._state_to_device()
        self._views = {module: self._new_view(module) for module in self._modules}
        self.everything = self._new_view(None)
        self._make_momentum_buffers()

    def _new_view(self, module: int | None) -> ModuleOptimizer:
        groups = [
            {**group, "params": [p for p in group["params"] if module in (None, self._owner[p])]}
            for group in self._groups
        ]
        return ModuleOptimizer(self.whole, groups, self._written)

    def _make_momentum_buffers(self) -> None:
        """Zeros, which give the same first step: fused SGD leaves its momentum unset if fp16 overflows in it."""
        if type(self.whole) is not torch.optim.SGD:
            return
        for group in self._groups:
            if group["fused"] and group["momentum"] and not group["dampening"]:
                for p in group["params"]:
                    if p.requires_grad and p.is_cuda and self.whole.state[p].get("momentum_buffer") is None:
                        self.whole.state[p]["momentum_buffer"] = torch.zeros_like(
                            p, memory_format=torch.preserve_format
                        )

    def _state_to_device(self) -> None:
        """Step counters of a checkpoint made on the CPU; fused and capturable optimizers have theirs on the device."""
        for group in self._groups:
            if group.get("fused") or group.get("capturable"):
                for p in group["params"]:
                    step = self.whole.state[p].get("step") if p in self.whole.state else None
                    if isinstance(step, Tensor) and step.device != p.device:
                        self.whole.state[p]["step"] = step.to(p.device, torch.float32)


def _on_host(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Numbers among attributes, options and state, and the state's tensors that are not where their parameter is."""
    values: dict[str, Any] = {f"attribute {k!r}": v for k, v in vars(optimizer).items() if type(v) in (int, float)}
    for index, group in enumerate(optimizer.param_groups):
        values.update((f"option {k!r} of group {index}", v) for k, v in group.items() if isinstance(v, (int, float)))
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.device != p.device:
                    value = value.tolist()
                if not isinstance(value, Tensor):
                    values[f"state {key!r} of group {index}"] = value
    return values


def _fit_to_device(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """On CUDA torch's fused and capturable forms, where the user left it open; on the CPU what the user said.

    A checkpoint's groups bring the choice of the device they were saved on. Not every fused form takes shards.
    """
    fit = (p.is_cuda and p.is_floating_point() and not is_sharded(p) for p in group["params"])
    if not group["params"] or not all(fit):
        for key in ("capturable", "fused"):
            if group.get(key):
                group[key] = defaults[key]
        return
    if group.get("capturable") is False:
        group["capturable"] = True
    if "fused" in group and group["fused"] is None and not group.get("foreach") and not group.get("differentiable"):
        group["fused"] = True
