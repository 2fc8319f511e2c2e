"""Every local module by its own loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ...distributed import DisagreementError, Mesh, StepTimes
from ...local_modules import Recompute
from ...local_sequential import LocalSequential
from ...planning import plan_memory
from ...planning.estimate import StepEstimate
from ...step import GraphCaptureError, LocalStep, MemoryPlan
from ...tasks import Scored
from ..config.recomputation import read_recompute
from ..config.settings import AMP, GRAPH
from ..config.train_config import TrainConfig
from ..errors import SettingsError
from .learner import autocast
from .metrics import StepResult
from .optimizers import make_optimizer, parameter_groups


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
