"""Private parts of torch are used in ``auglocal_ext/_torch.py`` alone, and in ``benchmarks/_torch_private.py``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for room in ("auglocal_ext", "benchmarks", "examples") for path in (ROOT / room).rglob("*.py"))
HOMES = {ROOT / "auglocal_ext" / "_torch.py", ROOT / "benchmarks" / "_torch_private.py"}
#: Public in practice, for the reasons given in ``_torch.py``.
DIRECT = {"_parameters", "_buffers", "_modules", "_apply", "_load_from_state_dict", "_check_input_dim"}
#: Of Python: namedtuples, os (``environ._data``), sys, threading. ``_init_weights`` is of Hugging Face's models.
PYTHON = {"_asdict", "_fields", "_replace", "_exit", "_getframe", "_data", "_DummyThread", "_init_weights"}
#: Calls whose string argument is the name of an attribute.
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "itemgetter", "methodcaller", "get", "pop"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def names_of_torch() -> set[str]:
    """Private names of the objects of torch that a network and its training meet."""
    tensor, model = torch.ones(1), nn.Sequential(nn.BatchNorm2d(1), nn.MultiheadAttention(2, 1), nn.Conv2d(1, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    things = [tensor, tensor.untyped_storage(), nn.Parameter, *model.modules(), optimizer, optimizer.step, scheduler]
    things += [torch.ops.aten.add.Tensor, torch.amp.GradScaler("cpu"), torch, torch.cuda, torch._C, torch.distributed]
    return {name for thing in things for name in dir(thing) if is_private(name)}


def nodes_of(code: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(code)))


def own_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that the code defines: functions, classes, attributes of ``self`` and of classes, variables."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return found


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def root(node: ast.AST) -> str:
    """``torch`` of ``torch.cuda._sleep``; empty where there is no such name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def imported_of_torch(nodes: list[ast.AST]) -> Iterator[str]:
    """Names that stand for modules, classes and functions of torch."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (
                (alias.asname or alias.name).split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] == "torch"
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            yield from (alias.asname or alias.name for alias in node.names)


def private_uses(nodes: list[ast.AST], of_torch: set[str], own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each use of a private part of torch.

    Args:
        of_torch: private names of torch's objects.
        own: names that the code around defines; a private attribute that it does not define is torch's.
    """
    roots, known = set(imported_of_torch(nodes)), own | DIRECT | PYTHON
    suspect = of_torch - known
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = "" if isinstance(node, ast.Import) or node.level else node.module or ""
            paths = [f"{module}.{alias.name}".strip(".").split(".") for alias in node.names]
            names = [part for path in paths if path[0] == "torch" for part in path[1:] if is_private(part)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in DIRECT | PYTHON:
            torchs = root(node) in roots
            others = node.attr in of_torch and not is_self(node.value)
            names = [node.attr] if torchs or others or node.attr not in own else []
        elif isinstance(node, ast.Call | ast.Subscript):
            values = [node.slice] if isinstance(node, ast.Subscript) else []
            if isinstance(node, ast.Call) and called(node) in BY_NAME:
                values = list(node.args)
            texts = [
                value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)
            ]
            names = [text for text in texts if is_private(text) and text not in known]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value in suspect else []
        yield from ((node.lineno, name) for name in names)


def test_private_parts_of_torch_are_in_one_place():
    files = {path: nodes_of(path.read_text()) for path in FILES if path not in HOMES}
    of_torch, own = names_of_torch(), own_names(chain.from_iterable(files.values()))
    found = [
        f"{path.relative_to(ROOT)}:{line} uses {name}"
        for path, nodes in files.items()
        for line, name in sorted(set(private_uses(nodes, of_torch, own)))
    ]
    assert not found, "put it into auglocal_ext/_torch.py, with a canary:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "def f():\n    from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch\ntorch._foreach_add_([], 1)",
        "import torch as t\nt.cuda._sleep(1)",
        "from torch import nn\nclass A(nn.modules.conv._ConvNd): ...",
        "storage = x.untyped_storage()._cdata",
        "optimizer._opt_called = True",
        "step._wrapped_by_lr_sched = True",
        "x = func._schema.name",
        "group._get_backend('cpu')",
        "x = getattr(module, '_is_fsdp_managed_module', False)",
        "x = module.__dict__['_compiled_call_impl']",
        "hooks = itemgetter('_forward_hooks')",
        "SLOT = '_compiled_call_impl'",
    ],
)
def test_each_way_of_using_one_is_found(code):
    nodes = nodes_of(code)
    assert list(private_uses(nodes, names_of_torch(), own_names(nodes)))


@pytest.mark.parametrize(
    "code",
    [
        "from ._version import __version__",
        "from .._torch import version",
        "import torch\nx = torch.__version__",
        "class A:\n    def f(self):\n        self._values = 1\n        return self._values",
        "def _mine(): ...\nx = module._mine",
        "x = owner._parameters['weight']",
        "super()._apply(fn)",
        "x = run._replace(loss=1)",
    ],
)
def test_what_is_not_private_to_torch_is_left_alone(code):
    nodes = nodes_of(code)
    assert not list(private_uses(nodes, names_of_torch(), own_names(nodes)))
