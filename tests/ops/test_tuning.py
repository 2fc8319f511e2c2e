"""The automatic choice measures once for each form, never where that would disturb, and its decisions are kept.

``tuned.py`` replaces times, so that none decides.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from tuned import RIVALS, Races, new_process, tune

from auglocal_ext import fuse
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.nn import recomputed
from auglocal_ext.ops import (
    batch_norm_act,
    batch_norm_act_max_pool,
    decisions,
    layer_norm,
    pooled_cross_entropy,
    providers,
    reconstruction_loss,
    registry,
    similarity_loss,
    supervised_contrast,
    tuning,
)

CPU = torch.device("cpu")
OP = "batch_norm_act"

rivals = providers.rivals


@pytest.fixture(autouse=True)
def races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Races:
    return tune(monkeypatch, tmp_path)


def norm(x: torch.Tensor, **options) -> torch.Tensor:
    ones = torch.ones(x.shape[1], dtype=x.dtype)
    return batch_norm_act(x, ones, ones, None, None, training=True, **options)


def chosen(x: torch.Tensor, op: str = OP) -> str:
    """The provider that runs the op."""
    return str(registry.chosen(op, x, None)).rpartition(".")[2]


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (8, 4, 6, 6)))


def test_the_fastest_runs_and_is_measured_once_for_each_form(races):
    x = image()
    assert torch.equal(norm(x), norm(x, provider="reference"))
    for _ in range(3):
        norm(x)
        norm(image(7, 3, 5, 7))  # of the same class in each size
    assert len(races) == 1 and set(races.runs[0]) == set(RIVALS)
    norm(image(9, 4, 6, 6))
    norm(x.double())
    norm(x.to(memory_format=torch.channels_last))
    norm(x[:, :, ::2])
    assert len(races) == 5
    assert sorted(tuning.decided()) == [
        "batch_norm_act float32 channels-last 8x4x64 cpu",
        "batch_norm_act float32 contiguous 16x4x64 cpu",
        "batch_norm_act float32 contiguous 8x4x64 cpu",
        "batch_norm_act float32 strided 8x4x32 cpu",
        "batch_norm_act float64 contiguous 8x4x64 cpu",
    ]


@pytest.mark.parametrize(("reference", "expected"), [(0.96, "cpu"), (0.94, "reference"), (1.5, "cpu")])
def test_a_tie_is_decided_by_the_fixed_order(races, reference, expected):
    races.seconds = {"cpu": 1.0, "reference": reference}
    assert chosen(image()) == expected


def test_a_name_wins(races, monkeypatch):
    x = image()
    assert torch.equal(norm(x, provider="cpu"), norm(x, provider="cpu"))
    monkeypatch.setenv(providers.ENVIRONMENT, "cpu")
    assert chosen(x) == "cpu" and not races and not tuning.decided()
    monkeypatch.setenv(providers.ENVIRONMENT, "reference")
    assert chosen(x) == "reference" and torch.equal(norm(x), norm(x, provider="reference"))
    monkeypatch.setattr(os, "environ", {**os.environ, providers.ENVIRONMENT: "aten"})
    assert chosen(x) == "aten" and torch.equal(norm(x), norm(x, provider="aten"))


def test_zero_is_the_fixed_order(races, monkeypatch):
    tuning.adopt({tuning.form_of(OP, image()): "reference"})
    monkeypatch.setenv("AUGLOCAL_TUNE", "0")
    assert chosen(image()) == "cpu" and not races
    assert set(tuning.decided().values()) == {"cpu"}


def test_zero_that_comes_later_leaves_a_form_as_it_was_decided(races, monkeypatch):
    assert chosen(image()) == "reference"
    monkeypatch.setenv("AUGLOCAL_TUNE", "0")
    assert chosen(image(7, 3, 5, 7)) == chosen(image()) == "reference"
    assert chosen(image(9, 4, 6, 6)) == "cpu" and len(races) == 1


@pytest.mark.parametrize("value", ["false", "off", "2"])
def test_a_switch_that_is_not_understood_is_refused(races, monkeypatch, value):
    monkeypatch.setenv("AUGLOCAL_TUNE", value)
    with pytest.raises(ValueError, match=f"AUGLOCAL_TUNE='{value}': expected 0, with which nothing is timed, or 1"):
        norm(image())
    assert not races and not tuning.decided()


def test_one_provider_needs_no_measurement(races, monkeypatch):
    monkeypatch.setattr(providers, "rivals", lambda op, device, dtype: ["cpu"])
    assert chosen(image()) == "cpu" and not races


def test_the_reference_and_an_interpreter_are_no_rivals(monkeypatch):
    for name in providers.NAMES:
        monkeypatch.setitem(providers._REASONS, name, lambda: None)
    everywhere = [providers.Provider(name, None, providers.ALL) for name in ("cuda", "cpu", "triton", "reference")]
    monkeypatch.setitem(providers.TABLES, OP, providers.Table(OP, tuple(everywhere)))
    assert rivals(OP, CPU, torch.float32) == ["cuda", "cpu"]
    assert rivals(OP, torch.device("cuda", 7), torch.float32) == ["cuda", "cpu", "triton"]


CALLS = {
    "batch_norm_act": lambda x: norm(x),
    "batch_norm_act_max_pool": lambda x: batch_norm_act_max_pool(x, None, None, None, None, training=True),
    "layer_norm": lambda x: layer_norm(x, x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])),
    "pooled_cross_entropy": lambda x: pooled_cross_entropy(
        x, torch.ones(5, x.shape[1], dtype=x.dtype, requires_grad=True), None, torch.arange(len(x)) % 5
    ),
    "reconstruction_loss": lambda x: reconstruction_loss(x, x.detach(), torch.ones(4), torch.ones(4)),
    "similarity_loss": lambda x: similarity_loss(x, torch.arange(len(x)) % 5, 5),
    "supervised_contrast": lambda x: supervised_contrast(x.flatten(1), torch.arange(len(x)) % 5, 0.1),
}


def test_every_op_is_measured():
    assert set(CALLS) == set(tuning.TRIALS) <= set(providers.TABLES)


@pytest.mark.parametrize("op", CALLS)
def test_a_measurement_leaves_no_trace(races, op):
    x = image(16, 4, 8, 8).requires_grad_()
    before, version = torch.get_rng_state(), x._version
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        CALLS[op](x)
        first = len(saved)
        CALLS[op](x)
    assert len(races) == 1
    assert len(saved) == 2 * first
    assert torch.equal(torch.get_rng_state(), before) and x._version == version and x.grad is None
    assert torch.is_grad_enabled()


def allocated(work: Callable[[], object], folder: Path) -> int:
    """The most bytes that ``work`` holds at a time, what operators allocate and free inside included."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda each: each["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", CALLS)
def test_a_measurement_needs_no_more_memory_than_the_call(races, monkeypatch, tmp_path, op, dtype):
    monkeypatch.setattr(providers, "rivals", lambda op, device, dtype: ["cpu", "aten"])
    races.seconds = {"cpu": 1.0, "aten": 2.0}
    x = image(16, 4, 32, 32).to(dtype).requires_grad_()

    def result() -> torch.Tensor:
        out = CALLS[op](x)
        return getattr(out, "loss", out)

    grad = torch.ones_like(result())

    most = allocated(lambda: torch.autograd.grad(result(), x, grad), tmp_path)
    if op == "pooled_cross_entropy" and dtype == torch.bfloat16:
        most += x.nbytes // 2  # a quarter of the map in float32, as documented
    with torch.no_grad():
        for provider, run in races.runs[-1].items():
            assert 0 < allocated(run, tmp_path) <= most, provider


@pytest.mark.parametrize("where", ["dispatch mode", "tracing", "forward-mode AD"])
def test_nothing_is_measured_where_it_would_be_recorded(races, where):
    x = image()
    if where == "dispatch mode":
        with MemoryMeter():
            norm(x)
    elif where == "tracing":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(lambda x: norm(x), x, check_trace=False)
    else:
        with torch.autograd.forward_ad.dual_level():
            norm(x)
    assert not races and not tuning.decided()
    assert chosen(x) == "reference" and len(races) == 1
    with MemoryMeter():
        assert chosen(x) == "reference"  # what has been decided holds


def test_fake_tensors_have_the_fixed_order(races):
    with torch._subclasses.FakeTensorMode():
        assert chosen(torch.empty(8, 4, 6, 6)) == "cpu"
    assert not races


@pytest.mark.slow
def test_compiled_code_has_the_fixed_order(races):
    x = image()
    compiled = torch.compile(lambda x: norm(x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), norm(x, provider="cpu")) and not races


def test_deterministic_mode_measures_nothing_and_reads_no_earlier_measurement(races):
    norm(image())
    new_process()
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(image()) == "cpu"
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen(image()) == "cpu" and len(races) == 1  # equal calls of a process run alike


def test_a_process_that_loads_data_does_not_measure(races, monkeypatch):
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "worker 0")
    assert chosen(image()) == "cpu" and not races


@pytest.mark.parametrize("images", [1, 3])
def test_a_small_batch_leaves_no_room_for_a_measurement(races, images):
    assert chosen(image(images, 4, 6, 6)) == "cpu" and not races


def test_one_value_per_channel_of_what_is_timed_fails_no_provider(races):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm(image(4, 3))
    assert [set(runs) for runs in races.runs] == [set(RIVALS)]


def test_a_provider_that_fails_is_left_out(races, monkeypatch):
    trial = tuning.TRIALS[OP]

    def prepare(kernel, x, beside):
        if kernel.args == ("cpu",):
            raise RuntimeError("no such kernel")
        return trial.prepare(kernel, x, beside)

    monkeypatch.setitem(tuning.TRIALS, OP, trial._replace(prepare=prepare))
    with pytest.warns(UserWarning, match="batch_norm_act: provider 'cpu' is left out.*no such kernel"):
        assert chosen(image()) == "reference"
    assert not list(decisions.read_all(decisions.environment(CPU)))  # it may work next time


def test_layers_of_a_network_choose_for_each_of_their_maps(races):
    def net(stride: int) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride), nn.BatchNorm2d(4)]
        return nn.Sequential(*layers, nn.ReLU())

    fused = net(2)
    fuse(fused)
    fused(image(8, 4, 16, 16))
    assert [form.split()[3] for form in tuning.decided()] == ["8x4x256", "8x4x64"]


def test_recomputation_runs_the_provider_of_the_forward_pass(races):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    fuse(net)
    recomputed(net, image().requires_grad_()).sum().backward()
    assert len(races) == 1


def test_only_so_many_calls_are_remembered():
    tuning.lookups.update(((number,), None) for number in range(4096))
    norm(image())
    assert 0 < len(tuning.lookups) < 9


def test_runs_take_turns_and_the_least_time_counts(monkeypatch):
    monkeypatch.undo()
    times = iter([4.0, 5.0, 3.0, 2.0, 9.0, 1.0, 8.0, 8.0])
    order = []

    def seconds_of(run, device):
        run()
        return next(times)

    monkeypatch.setattr(tuning, "seconds_of", seconds_of)
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    assert tuning.race(runs, CPU) == {"a": 2.0, "b": 1.0}
    assert "".join(order) == "ab" + "ba" + "ab" + "ba"


def test_time_is_measured():
    def run() -> None:
        sum(range(20000))

    assert 1e-5 < tuning.seconds_of(run, CPU) < 10
