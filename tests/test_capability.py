"""The cuda provider is taken on GPUs that the library was built for, and the others are told why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import native
from auglocal_ext.cli import info
from auglocal_ext.native.architectures import from_ptx, misfit, runs, targets
from auglocal_ext.ops import pooled_cross_entropy, providers, registry

OP = "pooled_cross_entropy"
GPUS = {"A100": (8, 0), "Tesla T4": (7, 5), "H200": (9, 0)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with the GPUs above, and a library that loads and was built for sm_80 and sm_86."""
    names, capabilities = list(GPUS), list(GPUS.values())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    library = {"built": True, "reason": "", "nvcc": "13.0", "targets": ["sm_80", "sm_86"]}
    monkeypatch.setattr(native, "build", lambda: native.Build(Path(), {"libraries": {"cuda": library}}))
    monkeypatch.setattr(native, "path", lambda name: Path(name))
    monkeypatch.setattr(native, "cuda_versions", lambda: (13000, 13020))
    for name in providers.NAMES:
        monkeypatch.setitem(providers._REASONS, name, lambda: None)
    monkeypatch.delenv(providers.ENVIRONMENT, raising=False)
    native._device_reason.cache_clear()
    yield
    native._device_reason.cache_clear()


@pytest.mark.parametrize(
    ("target", "fits"),
    [
        ("sm_80", {(8, 0), (8, 6), (8, 9)}),
        ("sm_86", {(8, 6), (8, 9)}),
        ("sm_87", {(8, 7)}),
        ("sm_90", {(9, 0)}),
        ("sm_90a", {(9, 0)}),
        ("sm_100", {(10, 0), (10, 3)}),
        ("sm_100a", {(10, 0)}),
        ("sm_100f", {(10, 0), (10, 3)}),
        ("sm_120", {(12, 0), (12, 1)}),
        ("compute_87", {(8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}),
        ("compute_90", {(9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}),
        ("compute_90a", {(9, 0)}),
        ("compute_100f", {(10, 0), (10, 3)}),
    ],
)
def test_what_runs_where(target: str, fits: set[tuple[int, int]]) -> None:
    known = {(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}
    assert {capability for capability in known if runs(target, capability)} == fits


def test_a_target_that_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a target such as sm_90, .* got '9.0'"):
        runs("9.0", (9, 0))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("10.0 8.6 9.0a", ["sm_86", "sm_100", "sm_90a"]),
        ("Hopper", ["sm_90", "compute_90"]),
    ],
)
def test_targets_are_read_from_the_flags_that_nvcc_gets(
    listed: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    flags = cpp_extension._get_cuda_arch_flags()
    assert targets(flags) == expected
    assert cpp_extension._get_cuda_arch_flags(["-O3", *flags]) == []  # torch adds none to flags of ours


def test_reasons_tell_what_to_do() -> None:
    assert misfit(["sm_80", "compute_80"], (9, 0), 13000, 13000) is None
    assert misfit(["sm_80"], (8, 6), 13020, 13000) is None
    missing = misfit(["sm_80", "sm_86"], (9, 0), 13000, 13000)
    assert missing is not None and "is 9.0, the library was built for sm_80, sm_86; build with" in missing
    assert missing.endswith("TORCH_CUDA_ARCH_LIST=9.0")
    old = misfit(["sm_80", "compute_80"], (9, 0), 13020, 13000)
    assert old is not None and "driver for CUDA 13.2" in old and "up to 13.0; update the driver" in old


def test_ptx_runs_where_no_machine_code_does() -> None:
    built_for = ["sm_80", "sm_90", "compute_90"]
    assert from_ptx(built_for, (10, 0))
    assert not any(from_ptx(built_for, capability) for capability in ((7, 5), (8, 6), (9, 0)))


def test_each_gpu_has_its_own_choice(machine: None) -> None:
    chosen = [providers.choose(OP, torch.device("cuda", index), torch.float32) for index in range(len(GPUS))]
    assert chosen == ["cuda", "triton", "triton"]
    assert providers.choose(OP, "cuda", torch.float32) == "triton"  # the current one's
    assert providers.choose(OP, "cpu", torch.float32) == "cpu"
    assert providers.missing("cuda") is None and providers.missing("cuda", "cpu") is None
    assert "cuda:1 (Tesla T4): its compute capability is 7.5" in str(providers.missing("cuda", "cuda:1"))


def test_the_tensor_says_which_gpu(machine: None) -> None:
    with FakeTensorMode():
        maps = [torch.empty(2, 3, device=f"cuda:{index}") for index in (0, 2)]
    found = [registry.chosen(OP, x, None) for x in maps]
    assert found == [registry.overload(OP, "cuda"), registry.overload(OP, "triton")]


def test_named_provider_raises_where_it_does_not_run(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = r"it is not available here: cuda:2 \(H200\): its compute capability is 9.0, .* TORCH_CUDA_ARCH_LIST=9.0"
    with FakeTensorMode():
        x, weight = torch.empty(2, 3, device="cuda:2"), torch.empty(4, 3, device="cuda:2")
        target = torch.empty(2, dtype=torch.int64, device="cuda:2")
    with pytest.raises(RuntimeError, match=f"provider='cuda' was asked for, but {reason}"):
        pooled_cross_entropy(x, weight, None, target, provider="cuda")
    monkeypatch.setenv(providers.ENVIRONMENT, "cuda")
    with pytest.raises(RuntimeError, match=f"AUGLOCAL_PROVIDER=cuda was asked for, but {reason}"):
        pooled_cross_entropy(x, weight, None, target)
    assert providers.choose(OP, "cuda:0", torch.float32) == "cuda"


def test_a_library_that_does_not_load_says_that_first(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers._REASONS, "cuda", lambda: "not built: no compiler")
    assert providers.missing("cuda", "cuda:1") == "not built: no compiler"


def test_a_device_that_is_not_there_is_not_asked(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert providers.choose(OP, "cuda:7", torch.float32) == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("there is none"))
    assert providers.choose(OP, "cuda", torch.float32) == "cuda"


def test_info_tells_the_gpus_apart(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        {"name": name, "capability": "{}.{}".format(*capability), "memory_gib": 80} for name, capability in GPUS.items()
    ]
    monkeypatch.setattr(info, "_gpus", lambda: gpus)
    found = json.loads(json.dumps(info.report()))
    assert found["providers"]["cuda"]["available"] and found["providers"]["cuda"]["devices"]["cuda:0"] is None
    assert found["ops"][OP] == {"cpu": "cpu", "cuda:0": "cuda", "cuda:1": "triton", "cuda:2": "triton"}
    text = info.as_text(found)
    assert "available (nvcc 13.0, for sm_80 sm_86)" in text
    assert "not on cuda:1 (Tesla T4): its compute capability is 7.5" in text and "not on cuda:0" not in text
    heading, row = (next(line for line in text.splitlines() if start in line) for start in ("op (float32)", f"  {OP} "))
    for device, provider in found["ops"][OP].items():
        assert row[heading.index(f"on {device}") :].split()[0] == provider


def test_info_says_how_to_build_for_more_gpus(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [{"name": "B200", "capability": "10.0", "memory_gib": 180}, {"name": "L4", "capability": "8.9"}]
    gpus[1]["memory_gib"] = 24
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((10, 0), (8, 9))[index])
    monkeypatch.setattr(info, "_gpus", lambda: gpus)
    library = native.build().info["libraries"]["cuda"]
    library |= {"targets": ["sm_80", "sm_90", "compute_90"], "every_architecture": "8.0;9.0;10.0+PTX"}
    found = json.loads(json.dumps(info.report()))
    assert found["providers"]["cuda"]["from_ptx"] == ["cuda:0"]
    text = info.as_text(found)
    assert "on cuda:0 from PTX, which the driver compiles at first use" in text
    assert "TORCH_CUDA_ARCH_LIST='8.9;10.0' pip install ." in text
    assert "for more GPUs, in the source folder: TORCH_CUDA_ARCH_LIST='8.0;9.0;10.0+PTX' pip install ." in text
    library["targets"] = ["sm_80", "sm_90", "sm_100", "compute_100"]
    found = info.report()
    assert found["providers"]["cuda"]["from_ptx"] == [] and "pip install" not in info.as_text(found)


def test_info_where_no_gpu_fits(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_gpus", lambda: [{"name": "A100", "capability": "8.0", "memory_gib": 80}])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    found = info.report()["providers"]["cuda"]
    assert not found["available"] and found["reason"].startswith("cuda:0 (A100): its compute capability is 7.5")


def test_import_leaves_cuda_alone() -> None:
    """A process that will fork must not have touched CUDA."""
    script = (
        "import torch\n"
        "def touched(*_, **__): raise AssertionError('CUDA was touched')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = touched\n"
        "torch.cuda.get_device_capability = torch.cuda.current_device = touched\n"
        "import auglocal_ext, auglocal_ext.cli, auglocal_ext.ops, auglocal_ext.nn, auglocal_ext.training\n"
        "from auglocal_ext import native\n"
        "assert native._device_reason.cache_info().currsize == 0 and native.reason.cache_info().currsize == 0\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
def test_this_gpu() -> None:
    """A GPU that the library is said to fit runs it."""
    reason = providers.missing("cuda", "cuda")
    if reason is not None:
        pytest.skip(reason)
    x, weight = torch.randn(2, 3, device="cuda"), torch.randn(4, 3, device="cuda")
    out = pooled_cross_entropy(x, weight, None, torch.tensor([0, 1], device="cuda"), provider="cuda")
    assert out.loss.isfinite()
