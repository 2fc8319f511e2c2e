"""One training step of a batch: by local losses, or end to end."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ...distributed import DisagreementError, Mesh, StepTimes
from ...layers import Features
from ...local_modules import Recompute
from ...local_sequential import LocalSequential
from ...memory import MemoryMeter
from ...memory.copies import FakeCopy, fake_mode_of
from ...planning import plan_memory
from ...planning.estimate import StepEstimate
from ...step import GraphCaptureError, LocalStep, MemoryPlan
from ...tasks import Classification, Scored
from ..config.recomputation import read_recompute
from ..config.settings import AMP, GRAPH
from ..config.train_config import TrainConfig, make_rule
from ..errors import CheckpointError, SettingsError
from .kind import RunTask
from .kinds import kind_of
from .metrics import StepResult
from .networks import cut, example_input
from .optimizers import make_optimizer, parameter_groups


class Learner(Protocol):
    """A network and the way it is trained: ``modules`` local modules, of which this process trains its ``own``."""

    modules: int
    own: range
    grad_scaler: torch.amp.GradScaler | None

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What was chosen to be recomputed, where it was planned."""

    @property
    def classifier_weight(self) -> float:
        """Weight of the network's own loss in the last module's."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """For the learning rate in its ``param_groups``."""

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """Train on a batch; on CUDA without waiting for the device."""

    def predict(self, images: Tensor) -> Tensor | None:
        """The network's output, without gradients; None in a process that does not have the last module."""

    def score(self, images: Tensor, labels: Tensor) -> Scored | None:
        """Loss and count of the network's output, without gradients; None as for ``predict``."""

    def finish(self) -> None:
        """No batch follows for now: at the end of an epoch, and before a checkpoint."""

    @property
    def times(self) -> StepTimes | None:
        """Where this process's time goes, among several on CPUs."""

    def launch(self) -> str:
        """How steps will be launched, for a person."""

    def predicted_peak(self, images: int) -> int:
        """Peak bytes of the tensors of a step on ``images`` images, predicted in seconds on any machine.

        As :func:`auglocal_ext.planning.plan_memory` counts them; the weights and the random state are not touched.
        """

    def outcome(self) -> str | None:
        """How the steps so far ran."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the network: optimizer and loss scaler."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write what all processes hold; see :meth:`auglocal_ext.LocalStep.save`."""

    def load(self, folder: Path) -> None: ...


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast region of ``--amp``, for both training and evaluation."""
    dtype = AMP[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def make_network(config: TrainConfig, input_shape: tuple[int, ...], task: RunTask, device: torch.device) -> nn.Module:
    """The network of the resolved ``config`` on ``device``, with fresh weights or those of its file: as it is for
    backpropagation, cut into local modules for a rule. SettingsError if they do not fit.
    """
    rule = make_rule(config)
    try:
        network = kind_of(config.network).network(config, task, input_shape)
        if rule is not None:
            network = cut(network, rule, task, input_shape, config.modules, fused=config.fused)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes beyond this machine, or any
        width = "" if config.width is None else f" --width {config.width}"
        raise SettingsError(f"--network {config.network}{width} cannot be made here: {_said(error)}") from error
    if config.network_weights is not None:
        for name, value in network.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                raise SettingsError(f"--network-weights {config.network_weights}: {name} is not finite")
    network.to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    return network


def try_network(config: TrainConfig, input_shape: tuple[int, ...], task: RunTask) -> None:
    """SettingsError for a resolved ``config`` whose network cannot be made or cut; it is made without values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when it is made
        make_network(config, input_shape, task, torch.device("meta"))


def _said(error: BaseException) -> str:
    """An error's first line, without the place in torch's source that it came from."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[enforce fail at [^]]*\][^.]*\.\s*", "", line)


def make_learner(
    config: TrainConfig,
    input_shape: tuple[int, ...],
    task: RunTask,
    device: torch.device,
    mesh: Mesh | None = None,
) -> Learner:
    """The network of the resolved ``config`` on ``device`` and its training, among the processes of ``mesh``.

    SettingsError if they do not fit.
    """
    network = make_network(config, input_shape, task, device)
    if isinstance(network, LocalSequential):
        if config.mixes and isinstance(task, Classification):
            _try_mixed(network, task)
        return LocalLearner(network, config, device, mesh)
    _try(network, config.network, input_shape, task, device)
    return EndToEndLearner(network, task, config, input_shape, device, mesh)


def _try_mixed(network: LocalSequential, task: Classification) -> None:
    """Whether every local loss takes class probabilities."""
    try:
        network.check_target(torch.full((2, task.num_classes), 1 / task.num_classes), 2)
    except TypeError as error:
        raise SettingsError(f"--mixup and --cutmix make class probabilities of labels: {error}") from error


def _try(network: nn.Module, name: str, input_shape: tuple[int, ...], task: RunTask, device: torch.device) -> None:
    """One image through the network shows a fully connected part made for another size before training."""
    network.eval()
    try:
        with torch.no_grad():
            found = _output(network(example_input(task, input_shape).to(device)))
    except (RuntimeError, AssertionError) as error:  # as vision transformers refuse other sizes
        size = " x ".join(map(str, input_shape[1:]))
        raise SettingsError(f"{name} does not take images of {size}: {error}") from error
    try:
        if not isinstance(found, Tensor):
            raise ValueError(f"it is a {type(found).__name__}")
        task.check_output(tuple(found.shape[1:]), "it")
    except ValueError as error:
        raise SettingsError(
            f"{name} does not learn this task: its output is no tensor {task.expected_output}"
        ) from error


def _output(found: Any) -> Any:
    """What is learned of a network's output: ``"out"`` of the dictionary that networks for segmentation return."""
    return found["out"] if isinstance(found, Mapping) and "out" in found else found


class EndToEndLearner:
    """Backpropagation of the task's loss through the whole network; over replicas by DistributedDataParallel."""

    modules = 1
    own = range(1)
    times: StepTimes | None = None
    memory_plan: MemoryPlan | None = None
    classifier_weight = 1.0

    def __init__(
        self,
        network: nn.Module,
        task: RunTask,
        config: TrainConfig,
        input_shape: tuple[int, ...],
        device: torch.device,
        mesh: Mesh | None = None,
    ):
        self._trained = network if mesh is None else nn.parallel.DistributedDataParallel(network)
        self.network, self._task, self._amp, self._device = network, task, config.amp, device
        self._config, self._input_shape = config, input_shape
        # The fused form reads the loss scaler's verdict on the device.
        self.optimizer = make_optimizer(
            config, parameter_groups(config, network), fused=True if device.type == "cuda" else None
        )
        self.grad_scaler = torch.amp.GradScaler(device.type) if config.amp == "fp16" else None

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        scored = self._scored(self._trained, images, labels)
        if self.grad_scaler is None:
            scored.loss.backward()
            self._clip()
            self.optimizer.step()
        else:
            self.grad_scaler.scale(scored.loss).backward()
            if self._config.clip_norm is not None:
                self.grad_scaler.unscale_(self.optimizer)
            self._clip()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        return StepResult.of_one_module(scored, self._task.counted(labels))

    def _clip(self) -> None:
        if self._config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self._config.clip_norm)

    def _scored(self, network: nn.Module, images: Tensor, labels: Tensor) -> Scored:
        """Loss and count of the network's output, which a language model in one process does not make."""
        # A replica's part of a test batch may be empty.
        if self._task.fuses_readout and isinstance(network, nn.Sequential) and len(images):
            with autocast(self._amp, images.device):
                return self._task.score_of(network, images, labels)
        with autocast(self._amp, images.device):
            logits = _output(network(images))
        return self._task.score(logits.float(), labels)

    def predict(self, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self._amp, self._device):
            return cast("Tensor", _output(self.network(images)))

    def score(self, images: Tensor, labels: Tensor) -> Scored:
        with torch.no_grad():
            return self._scored(self.network, images, labels)

    def finish(self) -> None:
        pass

    def launch(self) -> str:
        return "eager"

    def predicted_peak(self, images: int) -> int:
        memory_format = torch.channels_last if self._config.channels_last else torch.contiguous_format
        with fake_mode_of(self.network):
            network = FakeCopy(self.network).net
            optimizer = make_optimizer(self._config, parameter_groups(self._config, network))
            x = example_input(self._task, self._input_shape, images).contiguous(memory_format=memory_format)
            y = self._task.example_for(Features(self._input_shape), images)

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                self._scored(network, x, y).loss.backward()
                optimizer.step()

            step()  # makes the optimizer's state
            with MemoryMeter() as meter:
                meter.track(network, optimizer, x, y)
                step()
        return meter.peak_bytes

    def outcome(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.grad_scaler is None else self.grad_scaler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        raise NotImplementedError("every process holds the whole of it: state_dict() of one is enough")

    def load(self, folder: Path) -> None:
        raise CheckpointError(f"{folder} was written by local modules; backpropagation has none")


class LocalLearner:
    """Each local module by its own loss (:class:`auglocal_ext.step.LocalStep`)."""

    def __init__(self, network: LocalSequential, config: TrainConfig, device: torch.device, mesh: Mesh | None = None):
        self._alone = mesh is None
        self.network, self._device, self._config = network, device, config
        self.modules = network.num_modules
        self._batch_size = config.recipe_values.batch_size
        self._groups = parameter_groups(config, network)
        try:
            self.memory_plan = self._plan()
            self._step = LocalStep(
                network,
                partial(make_optimizer, config),
                params=self._groups,
                clip_norm=config.clip_norm,
                graph=GRAPH[config.graph],
                overlap="auto" if config.overlap is None else config.overlap,
                autocast=AMP[config.amp],
                recompute=None if self.memory_plan is not None else self._recompute(),
                plan=self.memory_plan,
                mesh=mesh,
                sync_batch_norm=config.sync_batch_norm and config.replicas > 1,
                stage_cuts=config.stage_cuts,
                shard=config.shard and config.replicas > 1,
                gather_features=config.gather_features and config.replicas > 1,
            )
        except (ValueError, DisagreementError) as error:
            raise SettingsError(str(error)) from error
        first, last = network.held or (0, self.modules - 1)
        self.own = range(first, last + 1)
        self.optimizer, self.grad_scaler = self._step.optimizer, self._step.grad_scaler
        self._steps = self._graphed = 0
        self._eager_reason: str | None = None

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        try:
            out = self._step(images, labels)
        except GraphCaptureError as error:
            raise SettingsError(f"--graph on: {error}") from error
        self._steps += 1
        self._graphed += self._step.graphed
        if len(labels) == self._batch_size:  # an epoch's smaller last batch is captured later than the others
            self._eager_reason = self._step.eager_reason
        return StepResult(out.loss, out.module_losses, out.module_counts, self.network.task.counted(labels))

    def predict(self, images: Tensor) -> Tensor | None:
        with autocast(self._config.amp, self._device):
            return self._step.predict(images)

    def score(self, images: Tensor, labels: Tensor) -> Scored | None:
        task = self.network.task
        if self._alone and task.fuses_readout:
            with autocast(self._config.amp, self._device):
                return self.network.score(images, labels)
        logits = self.predict(images)
        return None if logits is None else task.score(logits.float(), labels)

    def finish(self) -> None:
        self._step.close()

    @property
    def times(self) -> StepTimes | None:
        return self._step.times

    def _plan(self) -> MemoryPlan | None:
        """What ``recompute="peak"`` or ``memory_budget`` asks for."""
        config, budget = self._config, self._config.memory_budget
        if read_recompute(config.recompute) != "peak" and budget is None:
            return None
        if not self._alone:
            raise SettingsError(
                "--recompute peak and --memory-budget are planned for one process, not for several: name the "
                "recomputation, or leave them out"
            )
        overlap: bool | Literal["auto"] = False  # there are no streams on a CPU
        if self._device.type == "cuda":
            overlap = "auto" if config.overlap is None else config.overlap
        return plan_memory(
            self.network,
            self._batch_size,
            partial(make_optimizer, config),
            params=self._groups,
            clip_norm=config.clip_norm,
            autocast=AMP[config.amp],
            recompute="peak" if budget is None else None,
            memory_budget=budget,
            overlap=overlap,
        )

    def _recompute(self) -> Recompute | Sequence[Recompute]:
        return cast("Recompute | tuple[Recompute, ...]", read_recompute(self._config.recompute))

    @property
    def classifier_weight(self) -> float:
        return self.network.rule.classifier_weight

    def launch(self) -> str:
        if not self._alone:
            return "eager (several processes)"
        if self._config.graph == "off":
            return "eager (--graph off)"
        if self._device.type != "cuda":
            return "eager (CUDA graphs need a CUDA device)"
        return "one CUDA graph each, captured after the first few"

    def predicted_peak(self, images: int) -> int:
        if self.memory_plan is not None:
            return self.memory_plan.predicted_bytes
        clip_norm, amp = self._config.clip_norm, AMP[self._config.amp]
        optimizer = partial(make_optimizer, self._config)
        if self._config.overlap:
            return plan_memory(
                self.network,
                images,
                optimizer,
                params=self._groups,
                clip_norm=clip_norm,
                autocast=amp,
                overlap=True,
            ).predicted_bytes
        # Of one choice of recomputation, the one that runs: a plan tries out all of them, which takes seconds.
        cost = StepEstimate(
            self.network,
            images,
            optimizer,
            params=self._groups,
            autocast=amp,
            clip_norm=clip_norm,
            clip="module",
            accumulate=1,
        ).cost(self.network.recompute)
        return max(cost.end, *(module.peak for module in cost.modules))

    def outcome(self) -> str | None:
        """On CUDA, where a graph was wanted: how many steps ran as one, and why not all."""
        if not self._alone or self._config.graph == "off" or self._device.type != "cuda":
            return None
        line = f"steps: {self._graphed} of {self._steps} as one CUDA graph"
        return line if self._eager_reason is None else f"{line} ({self._eager_reason})"

    def state_dict(self) -> dict[str, Any]:
        return self._step.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step.load_state_dict(state)

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        self._step.save(folder, extra)

    def load(self, folder: Path) -> None:
        self._step.load(folder)
