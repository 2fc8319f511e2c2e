"""Labels: at once on the CPU, deferred and without a synchronisation on CUDA, not at all while tracing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import no_waits

from auglocal_ext.ops import check_labels, deferred, labels, pooled_cross_entropy, raise_deferred_errors


@pytest.fixture(autouse=True)
def _nothing_pending() -> Iterator[None]:
    deferred._pending.clear()
    yield
    deferred._pending.clear()


def test_good_labels_pass() -> None:
    check_labels(torch.tensor([0, 9, -100]), 10)
    check_labels(torch.tensor([0, 9, 255]), 10, ignore_index=255)
    check_labels(torch.empty(0, dtype=torch.int64), 10)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0, 10, 3, -1], r"label 10 at index 1 .*0 <= label < 10.*2 of 4"),
        ([0, 1, -1], r"label -1 at index 2 .*ignored label -100.*1 of 3"),
    ],
)
def test_out_of_range_names_the_first_bad_label(target: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(target), 10)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_dtype(dtype: torch.dtype) -> None:
    hint = "class numbers are whole" if dtype.is_floating_point else r"target\.long\(\)"
    with pytest.raises(TypeError, match=rf"torch\.int64.*{hint}"):
        check_labels(torch.zeros(3).to(dtype), 10)


@pytest.mark.parametrize("shape", [(), (3, 1), (3, 10)])
def test_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"labels of shape \(N,\)"):
        check_labels(torch.zeros(shape, dtype=torch.int64), 10)


def test_fake_and_meta_labels_are_not_read() -> None:
    with FakeTensorMode():
        check_labels(torch.full((3,), 99), 10)
        with pytest.raises(TypeError):
            check_labels(torch.zeros(3), 10)
    check_labels(torch.zeros(3, dtype=torch.int64, device="meta"), 10)


def test_compiled_code_does_not_read_labels() -> None:
    def step(target: torch.Tensor) -> torch.Tensor:
        check_labels(target, 10)
        return target + 1

    assert torch.compile(step, fullgraph=True, backend="eager")(torch.tensor([99])).item() == 100


class Event:
    """Stands for a CUDA event."""

    def __init__(self, done: bool) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def pending(done: bool, bad: int) -> deferred._Deferred:
    message = partial(labels.late, 10, -100, of=64)
    return deferred._Deferred(Event(done), torch.tensor(bad), message)  # type: ignore[arg-type]


def test_deferred_count_is_raised_once_its_event_is_done() -> None:
    entry = pending(False, 3)
    deferred._pending.extend([pending(True, 0), entry])
    raise_deferred_errors()
    assert list(deferred._pending) == [entry]
    entry.event.synchronize()
    with pytest.raises(ValueError, match=r"3 of 64 labels of an earlier batch.*0 <= label < 10"):
        raise_deferred_errors()
    raise_deferred_errors()


def test_waiting_for_deferred_counts() -> None:
    deferred._pending.append(pending(False, 1))
    with pytest.raises(ValueError, match="1 of 64 labels"):
        raise_deferred_errors(wait=True)


@pytest.mark.gpu
def test_cuda_labels_are_reported_later() -> None:
    bad = torch.tensor([0, 10, 3], device="cuda")
    check_labels(bad, 10)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="1 of 3 labels of an earlier batch"):
        check_labels(torch.tensor([1], device="cuda"), 10)


@pytest.mark.gpu
def test_cuda_check_does_not_synchronise() -> None:
    target = torch.randint(10, (1024,), device="cuda")
    check_labels(target, 10)
    raise_deferred_errors(wait=True)
    with no_waits():
        check_labels(target, 10)


@pytest.mark.gpu
def test_bad_cuda_label_is_no_device_assert() -> None:
    x, weight = torch.randn(3, 4, 2, 2, device="cuda"), torch.randn(10, 4, device="cuda")
    target = torch.tensor([0, 1000, 3], device="cuda")
    out = pooled_cross_entropy(x, weight, None, target)
    assert out.loss.isfinite()
    with pytest.raises(ValueError, match="earlier batch"):
        raise_deferred_errors(wait=True)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_capture_skips_the_check() -> None:
    target = torch.full((3,), 99, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        check_labels(target, 10)
        _ = target + 1
    assert not deferred._pending


def test_counting_labels_where_the_host_cannot_be_asked() -> None:
    counter = deferred.BadValueCounter(torch.device("cpu"))

    def late(count: int) -> str:
        return f"{count} labels of earlier batches"

    def add(*target: int) -> None:
        counter.add(labels.bad_labels(torch.tensor(target), 10))

    add(0, 9, -100)
    counter.raise_if_any(late)
    add(10, -1, 3)
    add(11)
    with pytest.raises(ValueError, match="3 labels of earlier batches"):
        counter.raise_if_any(late)
    counter.raise_if_any(late)  # told once


def test_bad_labels_turn_into_ignored_ones() -> None:
    target = torch.tensor([0, 10, -1, 255, 9])
    assert labels.ignoring_bad_labels(target, 10, 255).tolist() == [0, 255, 255, 255, 9]
    assert target.tolist() == [0, 10, -1, 255, 9]
