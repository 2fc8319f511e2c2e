"""A LocalSequential on a GPU: no wait for it, labels out of range, and the figures of the CPU."""

from __future__ import annotations

import pytest
import torch
from test_local_sequential import batch, grads, small
from waits import no_waits

from auglocal_ext import AugLocal, ContSup


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [AugLocal(3), ContSup("R1E")], ids=["auglocal", "contsup"])
def test_no_synchronisation_on_cuda(rule):
    net = small(rule).cuda()
    x, y = (t.cuda() for t in batch())
    net(x, y).loss.backward()  # library initialisation may synchronise
    with no_waits():
        net(x, y).loss.backward()


@pytest.mark.gpu
def test_labels_out_of_range_on_cuda_are_reported_later():
    net = small().cuda()
    x, y = (t.cuda() for t in batch())
    net(x, y + 10)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="labels"):
        net(x, y)
    net(x, y).loss.backward()  # the device is still usable


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    net = small(ContSup("R1E"))
    x, y = batch()
    net(x, y).loss.backward()
    expected = {name: grad.clone() for name, grad in grads(net).items()}
    twin = small(ContSup("R1E")).cuda()
    torch.backends.cudnn.allow_tf32 = False
    twin(x.cuda(), y.cuda()).loss.backward()
    for name, grad in grads(twin).items():
        torch.testing.assert_close(grad.cpu(), expected[name], rtol=1e-3, atol=1e-4)
