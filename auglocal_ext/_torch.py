"""The private parts of torch that the package uses, each with the reason. Everything else imports them from here.

``tests/test_torch_private*.py`` have a canary for each name, which checks what the part does. A new torch that changes
one fails there first. What runs very often is torch's own object, without a function around it.

Some private names are public in practice, and are used directly:

- ``_parameters``, ``_buffers`` and ``_modules`` of ``nn.Module``: every pickled module holds its tensors and children
  under these names, so torch cannot change them.
- ``_apply``, ``_load_from_state_dict`` and ``_check_input_dim``: methods of modules that torch calls by name so that
  subclasses can override them, and its own do.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from operator import itemgetter
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvBase
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeBase
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

_Function = TypeVar("_Function", bound=Callable[..., Any])

__all__ = [
    # Tensors without data: torch documents them for its compiler alone, and has no public way to make one.
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "detect_fake_mode",
    # Every operator that runs passes through a dispatch mode; torch.overrides sees calls of Python alone.
    "TorchDispatchMode",
    "current_dispatch_mode",
    "without_dispatch_modes",
    # Nested containers as lists; there is no public module for them.
    "TreeSpec",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
    # Base classes, for isinstance: users derive layers from them, which no list of public classes would hold.
    "BatchNormBase",
    "ConvBase",
    "ConvTransposeBase",
    "NormBase",
    # Described where they are defined, below.
    "COMPILED_CALL",
    "MODULE_HOOKS",
    "RESETS",
    "backward_hooks",
    "below_autograd",
    "call_hooks",
    "clear_cublas_workspaces",
    "constant_when_compiled",
    "default_store",
    "disabled_torch_function",
    "drop_step_hooks",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul_",
    "foreach_zero_",
    "functorch_active",
    "graph_is_kept",
    "give_back_pool",
    "group_timeout",
    "has_global_hooks",
    "is_compiled",
    "is_fsdp_managed",
    "is_replica",
    "let_step_scale_gradients",
    "log_softmax_backward",
    "looked_into",
    "make_wrapper_subclass",
    "mark_as_stepped",
    "mark_as_wrapped",
    "non_persistent",
    "plain_call",
    "post_accumulate_hooks",
    "schema",
    "skipped_init",
    "step_scales_gradients",
    "storage_id",
    "transforms_active",
    "version",
    "versions",
    "written_tensors",
]

#: Makes a tensor without memory, of a subclass whose ``__torch_dispatch__`` does the work.
make_wrapper_subclass = Tensor._make_wrapper_subclass
#: A context in which operators skip autograd's kernels, which for a custom op are Python.
below_autograd = torch._C._AutoDispatchBelowAutograd
#: Whether the backward pass that runs now keeps its graph for another; true outside of one.
graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
#: What autograd runs for ``log_softmax``, for a loss that makes its gradient itself: (gradient, result, dim, dtype).
log_softmax_backward = torch.ops.aten._log_softmax_backward_data
#: As ``__torch_function__`` of a subclass: operators see it, functions of Python do not.
disabled_torch_function = torch._C._disabled_torch_function_impl
#: In place on a list of tensors, one kernel for all. Documented for torch's optimizers, with the underscore.
foreach_copy_ = torch._foreach_copy_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul_ = torch._foreach_mul_
foreach_zero_ = torch._foreach_zero_
#: Whether ``torch.func`` transforms what is called now; torch.compiler knows of compilation alone.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: Names under which ``nn.Module`` holds its hooks, each a dictionary; torch has no way to list or leave out hooks.
MODULE_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if name.endswith("hooks") and isinstance(value, dict)
)
#: Of ``module.__dict__``: the hooks for which ``module(...)`` does more than ``forward``.
call_hooks: Callable[[dict[str, Any]], tuple[dict[int, Any], ...]] = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
#: Key of ``module.__dict__`` for what ``module(...)`` runs in place of forward and hooks; ``compile()`` sets it.
COMPILED_CALL = "_compiled_call_impl"
#: Methods that initialise a module anew; ``nn.MultiheadAttention`` and ``nn.Transformer`` have the second alone.
RESETS = ("reset_parameters", "_reset_parameters")


def storage_id(storage: torch.UntypedStorage) -> int:
    """The address of a storage itself, the same for all tensors over it; ``data_ptr()`` is 0 where there is no data."""
    return storage._cdata


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place, which autograd counts and torch shows nowhere else."""
    return tensor._version


def versions(tensors: Iterable[Tensor | None]) -> list[int]:
    """:func:`version` of those that are tensors."""
    return [tensor._version for tensor in tensors if tensor is not None]


def backward_hooks(tensor: Tensor) -> dict[int, Any] | None:
    """The hooks of a tensor by number, the very dictionary, or None; ``register_hook`` adds one and lists none."""
    return tensor._backward_hooks


def post_accumulate_hooks(tensor: Tensor) -> dict[int, Any] | None:
    """The same for ``register_post_accumulate_grad_hook``."""
    return tensor._post_accumulate_grad_hooks


def schema(operator: Any) -> Any:
    """Name and arguments of an operator (``OpOverload``), and which of them it writes to; only ``tags`` are public."""
    return operator._schema


def written_tensors(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call of an operator writes to, by its schema."""
    for place, argument in enumerate(schema(operator).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            yield from (each for each in tree_flatten(value)[0] if isinstance(each, Tensor))


def transforms_active() -> bool:
    """Whether ``torch.func`` transforms what is called now, or a level of forward-mode AD is open."""
    # forward_ad can open and close levels but does not say whether one is open.
    return functorch_active() or forward_ad._current_level >= 0


def looked_into() -> bool:
    """Whether calls of modules and operators are compiled, traced, transformed, or met by hooks of all modules.

    One call in place of torch's five. torch.jit.is_tracing asks the same C function.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return functorch_active() or forward_ad._current_level >= 0 or bool(has_global_hooks())


def plain_call(module: nn.Module) -> Callable[..., Any]:
    """What ``module(...)`` runs where nothing stands under ``COMPILED_CALL``: hooks and forward."""
    return module._call_impl


def non_persistent(module: nn.Module) -> set[str]:
    """Names of a module's buffers that are in no state dict; ``register_buffer`` takes this and nothing returns it."""
    return module._non_persistent_buffers_set


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned this module; its class has no public name."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes over a second, and without it nothing is compiled
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made this module for one of its devices, which it notes in this attribute alone."""
    return module.__dict__.get("_is_replica", False)


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether one of torch's FSDP wrappers shards this module; parameters do not show it while they are whole."""
    return getattr(module, "_is_fsdp_managed_module", False)


def skipped_init(func: Any, out: Any) -> FrameType | None:
    """The frame of a function of ``torch.nn.init`` that is about to do nothing, as its tensor is on the meta device.

    To be called by the ``__torch_function__`` of a mode, with ``func`` and what it returned. Of such a function a mode
    sees nothing else: it asks for ``is_meta`` and returns at once.
    """
    if out is True and func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
        asking = sys._getframe(2)
        return asking if asking.f_globals.get("__name__") == "torch.nn.init" else None
    return None


def constant_when_compiled(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result`` without its import of torch._dynamo, over a second at each start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def mark_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """A scheduler warns of steps in the wrong order unless the wrapper it puts around ``step`` has noted this."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def mark_as_wrapped(step: Callable[..., Any]) -> None:
    """Keep schedulers from wrapping this ``step``: they wrap bound methods alone, and skip what is marked so."""
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def step_scales_gradients(optimizer: Any) -> bool:
    """Whether a ``GradScaler`` leaves scaling to ``step``, as constructors of fused optimizers say here alone."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def let_step_scale_gradients(optimizer: Any) -> None:
    """Say so of an optimizer whose groups became fused later."""
    optimizer._step_supports_amp_scaling = True


def drop_step_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Put empty dictionaries in place of an optimizer's hooks around ``step``; torch removes hooks by handles alone."""
    vars(optimizer).update(_optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())


def clear_cublas_workspaces() -> None:
    """Free cuBLAS's workspaces of all streams, which no public function does."""
    # Only a torch built with CUDA has these functions, so they are looked up at the call.
    torch._C._cuda_clearCublasWorkspaces()


def give_back_pool(device: int, pool: Any) -> None:
    """End a capture's allocations in a memory pool, and its hold on it; ``CUDAGraph`` does so only if it ends well."""
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)


def default_store() -> Any:
    """The store over which the processes of the default group found each other; a group has no public way to it."""
    return torch.distributed.distributed_c10d._get_default_store()


def group_timeout(group: Any) -> timedelta | None:
    """The time-out of a process group; None for torch's "fake" backend. It can be given and set, not read."""
    options = group._get_backend(group._device_types[0]).options
    return None if options is None else options._timeout
