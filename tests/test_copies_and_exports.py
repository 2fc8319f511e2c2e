"""State dicts, copies and exports of a LocalSequential."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from test_local_sequential import batch, small
from test_precision import mlp
from torch import nn
from torch.nn import functional as F

from auglocal_ext import AugLocal, ContSup, LocalSequential, models


def test_state_dict_keys():
    layers = models.resnet_cifar(8, width=4)
    keys = set(layers.state_dict())
    net = LocalSequential(layers, ContSup("R1E"), 10, (3, 16, 16))
    assert net.primary is layers and set(layers.state_dict()) == keys
    prefixes = {key.split(".")[0] for key in net.state_dict()}
    assert prefixes == {"primary", "auxiliary", "context"}
    assert {key.removeprefix("primary.") for key in net.state_dict() if key.startswith("primary.")} == keys
    assert set(LocalSequential(layers, AugLocal(2), 10, (3, 16, 16)).export().state_dict()) == keys


@pytest.mark.parametrize("rule", [AugLocal(3), ContSup("R1E")], ids=["auglocal", "contsup"])
def test_copies_are_independent_and_equal(rule):
    net = small(rule)
    x, y = batch()
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    reloaded = LocalSequential(models.resnet_cifar(8, width=4), rule, 10, (3, 16, 16))
    reloaded.load_state_dict(torch.load(buffer, weights_only=True))
    expected = net.eval()(x, y)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), reloaded.eval()):
        assert torch.equal(twin(x, y).module_losses, expected.module_losses)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in net.parameters()}
        assert twin.network.primary is twin.primary
        twin(x, y).loss.backward()
    assert all(p.grad is None for p in net.parameters())


def test_export_is_a_copy_in_eval_mode():
    net = small(ContSup("R1E")).train()
    exported = net.export()
    assert net.training and not any(m.training for m in exported.modules())
    x, _ = batch()
    expected = exported(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(exported(x), expected)
    assert not any("auxiliary" in key for key in exported.state_dict())


def test_an_exported_networks_child_may_be_replaced():
    exported = small(ContSup("R1E")).export()
    x, _ = batch()
    before = exported(x)
    exported.primary[1] = nn.Identity()
    assert not torch.equal(exported(x), before)


def test_function_transforms_of_inference():
    net = mlp().train()
    x, y = torch.randn(5, 12), torch.randint(0, 4, (5,))

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x,)), y)

    assert torch.func.grad(loss)(dict(net.named_parameters()))["primary.0.weight"].isfinite().all()


# Without context a network is exported as its own layers.
exported_rules = pytest.mark.parametrize(
    "rule", [pytest.param(AugLocal(2), marks=pytest.mark.slow), ContSup("R1E")], ids=["auglocal", "contsup"]
)


@exported_rules
def test_torch_export(rule):
    exported = small(rule).export()
    x, _ = batch()
    program = torch.export.export(exported, (x,))
    torch.testing.assert_close(program.module()(x), exported(x))


@exported_rules
def test_onnx_export(rule, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    exported = small(rule).export()
    x, _ = batch(2)
    path = tmp_path / "net.onnx"
    torch.onnx.export(exported, (x,), path, dynamo=True, verbose=False)
    (found,) = ReferenceEvaluator(onnx.load(path)).run(None, {onnx.load(path).graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), exported(x).detach(), rtol=1e-3, atol=1e-4)


def test_compile_of_the_exported_network():
    exported = small(ContSup("R1E")).export()
    x, _ = batch()
    compiled = torch.compile(exported, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), exported(x))
