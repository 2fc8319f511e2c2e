"""The network of a run, and what trains it."""

from __future__ import annotations

import re
import warnings

import torch
from torch import Tensor, nn

from ...distributed import Mesh
from ...local_sequential import LocalSequential
from ...tasks import Classification
from ..config.train_config import TrainConfig, make_rule
from ..errors import SettingsError
from .end_to_end_learner import EndToEndLearner, output_of
from .kind import RunTask
from .kinds import kind_of
from .learner import Learner
from .local_learner import LocalLearner
from .networks import cut, example_input


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
            found = output_of(network(example_input(task, input_shape).to(device)))
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
