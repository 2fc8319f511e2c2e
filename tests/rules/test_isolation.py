"""No gradient crosses a module boundary: for every rule, module k's loss trains module k's own parts and no other."""

from __future__ import annotations

import pytest
import torch

from auglocal_ext import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, LocalSequential, PredSim, models

RULES = {
    "auglocal-d1": AugLocal(depth=1),
    "auglocal-d2": AugLocal(depth=2),
    "auglocal-d3": AugLocal(depth=3),
    "auglocal-full": AugLocal(depth=3, joint_tail=False),
    "contsup-R0": ContSup("R0"),
    "contsup-E": ContSup("E"),
    "contsup-R1": ContSup("R1"),
    "contsup-R1E": ContSup("R1E"),
    "contsup-R4": ContSup("R4", head="0c1f"),
    "contsup-R2E": ContSup("R2E", head="2c2f"),
    "greedy": Greedy(),
    "dgl-mlp-sr": DGL("mlp-sr"),
    "dgl-mlp": DGL("mlp"),
    "dgl-cnn": DGL("cnn"),
    "predsim": PredSim(),
    "infopro": InfoPro((5, 0.5), (1, 1)),
    "infopro-contrast": InfoPro((5, 0.5), (1, 1), loss="contrast"),
    "infopro-no-labels": InfoPro((5, 0), (1, 1)),
    "man": MAN(),
    "auglocal-repeated": AugLocal(depth=3, sampling="repeated", downsampling=True),
    "auglocal-conv": AugLocal(depth=3, sampling="conv1x1"),
    "contsup-auglocal": ContSup("R1E", head=AugLocal(depth=3)),
    "contsup-infopro": ContSup("R1", head=InfoPro((5, 0.5), (1, 1))),
    "infopro-auglocal": InfoPro((5, 0.5), (1, 1), loss="contrast", head=AugLocal(depth=3)),
    "predsim-auglocal": PredSim(head=AugLocal(depth=2)),
    "man-infopro-dgl": MAN(head=InfoPro((5, 0.5), (1, 1), head=DGL("mlp"))),
}


def wrap(rule, modules=None):
    torch.manual_seed(3)
    return LocalSequential(models.resnet_cifar(14, width=4), rule, 10, (3, 16, 16), modules=modules)


def batch(n=4):
    return torch.randn(n, 3, 16, 16), torch.randint(0, 10, (n,))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("modules", [None, [1, 4]], ids=["layers", "cuts"])
def test_each_local_loss_trains_its_own_module_only(rule, modules):
    net = wrap(rule, modules)
    x, y = batch()
    everything = {name: p for name, p in net.named_parameters() if p.requires_grad}
    owned: set[str] = set()
    history: list = []
    h = x
    for module in net.local_modules:
        out = module(h, history)
        loss = module.local_loss(out, y, x)
        grads = torch.autograd.grad(loss, list(everything.values()), allow_unused=True)
        trained = {name for name, grad in zip(everything, grads, strict=True) if grad is not None}
        mine = {id(p) for p in module.parameters() if p.requires_grad}
        assert trained == {name for name, p in everything.items() if id(p) in mine}
        assert not trained & owned
        owned |= trained
        h = out.detach()
    assert owned == set(everything)  # and nothing is left untrained


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_wrapper_equals_a_loop_of_ones_own(rule):
    net = wrap(rule)
    x, y = batch()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    losses, h, history = [], x, []
    for module in net.local_modules:
        out = module(h, history)
        loss = module.local_loss(out, y, x)
        loss.backward()
        losses.append(loss.detach())
        module.after_step()
        h = out.detach()
    expected = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    net.load_state_dict(state)
    result = net(x, y)
    result.loss.backward()
    assert torch.equal(result.module_losses, torch.stack(losses))
    assert torch.equal(result.logits, h)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("rule", [RULES["contsup-R1E"], RULES["contsup-R4"]], ids=["R1E", "R4"])
def test_context_is_detached_and_part_of_inference(rule):
    net = wrap(rule).eval()
    x, _ = batch()
    with torch.no_grad():
        before = net(x)
        for parameter in net.context.parameters():
            parameter.add_(0.3)
        assert not torch.equal(net(x), before)
        torch.testing.assert_close(net.export()(x), net(x), rtol=1e-4, atol=1e-4)


def test_another_modules_output_is_not_written():
    """Outputs of earlier modules keep their values while later ones merge context into them."""
    net = wrap(ContSup("R2E")).train()
    x, y = batch()
    outputs = []
    original = x.clone()

    def keep(_module, _args, output):
        outputs.append((output, output.detach().clone()))

    handles = [child.register_forward_hook(keep) for child in net.primary]
    net(x, y)
    for handle in handles:
        handle.remove()
    assert torch.equal(x, original)
    for output, copy in outputs:
        assert torch.equal(output, copy)
