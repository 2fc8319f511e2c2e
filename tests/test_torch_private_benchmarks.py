"""Canaries for ``benchmarks/_torch_private.py``."""

from __future__ import annotations

import pytest
import torch

from auglocal_ext._torch import FakeTensor, FakeTensorMode


@pytest.fixture
def private(load_benchmark):
    return load_benchmark("_torch_private")


def test_a_fake_tensor_mode_can_be_left_for_a_while(private):
    with private.unset_fake_temporarily() as found:
        assert found is None
    with FakeTensorMode() as mode:
        with private.unset_fake_temporarily() as found:
            assert found is mode and torch.arange(3).tolist() == [0, 1, 2]
        assert isinstance(torch.ones(1), FakeTensor)


def test_the_store_of_a_group_that_is_not_there(private):
    torch.distributed.init_process_group("fake", rank=1, world_size=3, store=private.fake_store())
    try:
        assert torch.distributed.get_world_size() == 3 and torch.distributed.get_rank() == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_function_with_a_backward_pass_compiles(private):
    def gradient(x, w):
        return torch.autograd.grad((x * w).sum(), w)[0]

    x, w = torch.ones(2), torch.ones(2, requires_grad=True)
    with private.whole_step_compiles(0.5):
        assert torch._functorch.config.activation_memory_budget == 0.5
        assert torch.equal(torch.compile(gradient, backend="eager", fullgraph=True)(x, w), x)
    assert torch._functorch.config.activation_memory_budget == 1.0
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):  # which is why the setting is needed
        torch.compile(gradient, backend="eager", fullgraph=True)(x, w)


@pytest.mark.gpu
def test_a_sleep_keeps_the_stream_busy(private):
    event = torch.cuda.Event()
    private.sleep_on_device(10**9)
    event.record()
    assert not event.query()
    event.synchronize()
