"""The wrapper: parity with backpropagation, handing over gradients, precision, state, errors."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import auglocal_ext
from auglocal_ext import AugLocal, ContSup, LocalSequential, models
from auglocal_ext.auxiliary import LossContext


def small(rule=None, modules=None, **options):
    torch.manual_seed(7)
    layers = models.resnet_cifar(8, width=4)
    return LocalSequential(layers, rule or AugLocal(2), 10, (3, 16, 16), modules=modules, **options)


def batch(n=6):
    generator = torch.Generator().manual_seed(11)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def grads(net):
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("rule", [AugLocal(2), ContSup("R1E")], ids=["auglocal", "contsup"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_module_is_backpropagation_bit_for_bit(rule, smoothing):
    net = small(rule, modules=1, label_smoothing=smoothing, fused=False)
    twin = copy.deepcopy(net.primary)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4) for m in (net, twin)]
    for step in range(3):
        torch.manual_seed(step)
        x, y = torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,))
        out = net(x, y)
        logits = twin(x)
        loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
        assert torch.equal(out.loss.detach(), loss.detach()) and torch.equal(out.logits, logits.detach())
        for optimizer, value in zip(optimizers, (out.loss, loss), strict=True):
            optimizer.zero_grad()
            value.backward()
        for (name, ours), theirs in zip(net.primary.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name
        for optimizer in optimizers:
            optimizer.step()
    for key, value in net.primary.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


@pytest.mark.parametrize("rule", [AugLocal(2), ContSup("R1E")], ids=["auglocal", "contsup"])
@pytest.mark.parametrize("modules", [1, 3, None])
def test_fused_is_eager_within_rounding(rule, modules):
    fused, eager = small(rule, modules).double(), small(rule, modules, fused=False).double()
    eager.load_state_dict(fused.state_dict())
    x, y = batch()
    for _ in range(3):
        outs = []
        for net in (fused, eager):
            net.zero_grad()
            outs.append(net(x.double(), y))
            outs[-1].loss.backward()
        for found, expected in zip(*outs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        expected = grads(eager)
        for name, grad in grads(fused).items():
            assert (grad - expected[name]).norm() <= 1e-9 * (expected[name].norm() + 1e-3), name
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-9, atol=1e-9)
    fused.eval(), eager.eval()
    torch.testing.assert_close(fused(x.double()), eager(x.double()), rtol=1e-9, atol=1e-9)


def test_one_fused_module_is_backpropagation_within_rounding():
    net = small(modules=1)
    twin = copy.deepcopy(net.primary)
    auglocal_ext.unfuse(twin)
    x, y = batch()
    out = net(x, y)
    loss = F.cross_entropy(twin(x), y)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-5, atol=1e-5)
    out.loss.backward()
    loss.backward()
    for (name, ours), theirs in zip(net.primary.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * (1 + theirs.grad.norm()), name


def test_fused_changes_the_class_of_parts_alone():
    layers = models.resnet_cifar(8, width=4)
    kinds = [type(module) for module in layers.modules()]
    names = [name for name, _ in layers.named_modules()]
    net = LocalSequential(layers, AugLocal(2), 10, (3, 16, 16))
    assert net.primary is layers and [name for name, _ in layers.named_modules()] == names
    assert any(type(module) is models.FusedBasicBlock for module in net.auxiliary.modules())
    assert any(type(module) is models.FusedBasicBlock for module in layers)
    assert [type(module) for module in net.export().modules()] == kinds
    again = LocalSequential(layers, AugLocal(2), 10, (3, 16, 16), fused=False)
    assert [type(module) for module in layers.modules()] == kinds
    assert not any(type(module) is models.FusedBasicBlock for module in again.modules())
    assert [layer.kind for layer in net.network.layers] == [layer.kind for layer in again.network.layers]


def test_flat_layers_are_one_chain():
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    net = LocalSequential(layers, ContSup("R0", "0c1f"), 10, (3, 16, 16), modules=1)
    kept = []
    x, y = batch()

    def pack(tensor):
        if tensor.dim() == 4 and len(tensor) == len(x):
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net.local_modules[0].local_loss(net.local_modules[0](x), y)
    assert len(set(kept)) == 3  # the image and the two raw convolution outputs
    assert net.local_modules[0].fused
    auglocal_ext.unfuse(net)
    assert not net.local_modules[0].fused


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_output(modules):
    net = small(modules=modules)
    x, y = batch()
    out = net(x, y)
    assert out.loss.dim() == 0 and out.loss.requires_grad
    assert out.logits.shape == (6, 10) and not out.logits.requires_grad
    assert out.module_losses.shape == (modules,) and not out.module_losses.requires_grad
    torch.testing.assert_close(out.loss.detach(), out.module_losses.sum())
    assert out.module_correct.shape == (modules,) and out.module_correct.dtype == torch.int64
    assert int(out.module_correct[-1]) == int((out.logits.argmax(1) == y).sum())


def test_ignored_labels_count_nowhere():
    net = small(ignore_index=-1).eval()  # in eval mode images do not influence each other
    x, y = batch()
    y[2:4] = -1
    kept = torch.tensor([0, 1, 4, 5])
    out, reference = net(x, y), net(x[kept], y[kept])
    torch.testing.assert_close(out.module_losses, reference.module_losses)
    assert torch.equal(out.module_correct, reference.module_correct)


def test_a_modules_graph_is_gone_before_the_next_runs():
    net, (x, y) = small(ContSup("R0")), batch()
    alive, seen = [], []
    lasting = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers(), x, y)}

    def living():
        return {storage._cdata for ref in alive if (storage := ref()) is not None}

    def pack(tensor):
        # What autograd keeps for backward, by weak reference to its storage.
        if tensor.untyped_storage()._cdata not in lasting:
            alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    for child in list(net.primary)[:-1]:
        child.register_forward_pre_hook(lambda *_: seen.append(living()))
    gc.disable()  # nothing may wait for the garbage collector
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = net(x, y)
        seen.append(living())
        out.loss.backward()
    finally:
        gc.enable()
    assert len(alive) > 20
    # A head whose loss makes its gradients in the forward pass saves them, and hands them on as they are.
    gradients = {parameter.grad.untyped_storage()._cdata for parameter in net.parameters()}
    maps = [len(found - gradients) for found in seen]
    # The detached output, however many layers saved it; after the last module the logits.
    assert maps[0] == 0 and max(maps) <= 1, maps


def test_auxiliary_networks_never_run_in_inference():
    net = small(ContSup("R1E"))

    def refuse(*_):
        raise AssertionError("an auxiliary network ran")

    for auxiliary in net.auxiliary:
        for module in auxiliary.modules():
            module.register_forward_pre_hook(refuse)
    x, _ = batch()
    assert net(x).shape == (6, 10)
    assert net.eval()(x).shape == (6, 10)
    assert net.export()(x).shape == (6, 10)


def test_second_backward_is_refused():
    net = small()
    out = net(*batch())
    out.loss.backward(retain_graph=True)
    before = {name: grad.clone() for name, grad in grads(net).items()}
    with pytest.raises(RuntimeError, match="second time for one pass.*net\\(x, y\\) again"):
        out.loss.backward()
    for name, grad in grads(net).items():
        assert torch.equal(grad, before[name])


def test_gradients_of_gradients_are_refused():
    net, factor = small(), torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(net(*batch()).loss * factor, next(net.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_are_handed_over_without_a_copy():
    net = small()
    out = net(*batch())
    inside = {v.data_ptr() for v in out.loss.grad_fn.gradients._values}
    out.loss.backward()
    assert {p.grad.data_ptr() for p in net.parameters()} <= inside


def test_scaling_accumulation_and_clipping():
    net = small()
    x, y = batch()
    net.eval()  # the same normalisation in both passes
    net(x, y).loss.backward()
    once = {name: grad.clone() for name, grad in grads(net).items()}
    net.zero_grad()
    for _ in range(2):
        (net(x, y).loss / 4).backward()
    for name, grad in grads(net).items():
        torch.testing.assert_close(grad, once[name] / 2)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    expected = torch.stack([g.norm() for g in once.values()]).norm() / 2
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(nn.utils.get_total_norm([p.grad for p in net.parameters()]), torch.tensor(1e-3))


def test_tensor_hooks_run_once_and_accumulation_hooks_too():
    net = small()
    x, y = batch()
    net.eval()
    net(x, y).loss.backward()
    expected = {name: grad.clone() for name, grad in grads(net).items()}
    net.zero_grad()
    accumulated = []
    handles = [p.register_hook(lambda g: g * 2) for p in net.parameters()]
    handles += [p.register_post_accumulate_grad_hook(lambda p: accumulated.append(1)) for p in net.parameters()]
    net(x, y).loss.backward()
    assert len(accumulated) == len(expected)
    for name, grad in grads(net).items():
        torch.testing.assert_close(grad, expected[name] * 2)


def test_frozen_and_shared_parameters():
    net = small()
    frozen = net.primary[1]
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    net(*batch()).loss.backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)

    shared = nn.Linear(8, 8)
    layers = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), shared, nn.ReLU(), nn.Sequential(shared), nn.ReLU(), nn.Linear(8, 3)
    )
    with pytest.warns(UserWarning, match="local modules 1 and 2 share a parameter"):
        tied = LocalSequential(layers, ContSup("R0", "0c1f"), 3, (6,))
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    tied(x, y).loss.backward()
    combined = shared.weight.grad.clone()
    tied.zero_grad()
    h, history = x, []
    for module in tied.local_modules:
        out = module(h, history)
        module.local_loss(out, y).backward()
        h = out.detach()
    torch.testing.assert_close(combined, shared.weight.grad)


def test_no_grad_gives_the_loss_only():
    net = small()
    x, y = batch()
    with torch.no_grad():
        out = net(x, y)
    assert not out.loss.requires_grad
    with torch.inference_mode():
        assert not net(x, y).loss.requires_grad
    net.eval()
    with torch.no_grad():
        silent = net(x, y)
    torch.testing.assert_close(net(x, y).module_losses, silent.module_losses)


def test_repr_names_rule_and_modules():
    text = repr(small(AugLocal(2)))
    assert "rule=AugLocal(depth=2" in text and "module_ends=(0, 1, 3)" in text


def test_errors_when_built():
    layers = models.resnet_cifar(8, width=4)
    with pytest.raises(TypeError, match="rule must be a learning rule.*got 'auglocal'"):
        LocalSequential(layers, "auglocal", 10, (3, 16, 16))
    with pytest.raises(TypeError, match="layers must be an nn.Sequential"):
        LocalSequential(nn.Linear(3, 3), AugLocal(2), 10, (3, 16, 16))
    with pytest.raises(ValueError, match="layers\\[0\\] \\(Sequential\\) does not accept.*input_shape=\\(4, 16, 16\\)"):
        LocalSequential(layers, AugLocal(2), 10, (4, 16, 16))
    with pytest.raises(ValueError, match="output has shape \\(N, 10\\), expected \\(N, num_classes\\) = \\(N, 100\\)"):
        LocalSequential(layers, AugLocal(2), 100, (3, 16, 16))
    with pytest.raises(ValueError, match="modules=9: the network has 4 layers"):
        LocalSequential(layers, AugLocal(2), 10, (3, 16, 16), modules=9)
    with pytest.raises(ValueError, match="label_smoothing"):
        LocalSequential(layers, AugLocal(2), 10, (3, 16, 16), label_smoothing=1.5)
    bad = AugLocal(2, block=lambda i, o, s, layer: nn.Conv2d(i, o + 1, 1))
    with pytest.raises((ValueError, RuntimeError)):
        LocalSequential(layers, bad, 10, (3, 16, 16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x, y.float()), TypeError, "int64"),
        (lambda x, y: (x, y.int()), TypeError, "int64"),
        (lambda x, y: (x, F.one_hot(y, 10)), ValueError, "one-hot rows are probabilities once .float\\(\\)"),
        (lambda x, y: (x, y + 10), ValueError, "range|0 .. 9|\\[0, 10\\)"),
        (lambda x, y: (x, y - 11), ValueError, "range|0 .. 9|\\[0, 10\\)"),
        (lambda x, y: (x, y[:-1]), ValueError, "one target per input, expected 6"),
        (lambda x, y: (x[:, :2], y), ValueError, "x must have shape \\(N, 3, 16, 16\\)"),
        (lambda x, y: (x[:, :, :8], y), ValueError, "x must have shape \\(N, 3, 16, 16\\)"),
        (lambda x, y: (x[0], y), ValueError, "x must have shape"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "empty"),
        (lambda x, y: ((x * 10).byte(), y), TypeError, "floating point"),
        (lambda x, y: (x.requires_grad_(), y), ValueError, "x.detach\\(\\)"),
    ],
)
def test_wrong_batches_are_refused_before_any_work(change, error, message):
    net = small()
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        net(*change(*batch()))
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_batch_of_one_image():
    net = small(AugLocal(2))  # one sampled layer: BatchNorm1d in the head
    x, y = batch(1)
    with pytest.raises(ValueError, match="batch of one image: auxiliary.0.head.norm is a BatchNorm"):
        net(x, y)
    net.eval()(x, y).loss.backward()
    small(ContSup("R0"))(x, y).loss.backward()  # maps have many values per channel


def test_history_is_checked():
    net = small(ContSup("E"))
    x, _ = batch()
    first, second = net.local_modules[:2]
    with pytest.raises(ValueError, match="pass the list of earlier module inputs"):
        second(first(x))
    with pytest.raises(ValueError, match="holds 0 module inputs, expected 1"):
        second(first(x), [])


def test_import_is_silent_and_light():
    import subprocess
    import sys

    heavy = ("torchvision", "matplotlib", "tensorboard", "torch._dynamo")
    code = "import sys, auglocal_ext, auglocal_ext.ops, auglocal_ext.nn; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""
    assert auglocal_ext.__version__


def test_export_of_fake_weights_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(RuntimeError, match="built of fake tensors"):
        small().export()


def test_the_last_modules_loss_ignores_bad_labels_that_were_not_checked():
    """On CUDA labels are checked later; until then a wrong one must not stop the device."""
    last = small().local_modules[-1]
    logits, (_, y) = torch.randn(6, 10), batch()
    wrong, ignored = y.clone(), y.clone()
    wrong[2], wrong[3], ignored[2:4] = 10, -5, -100
    ours, expected = (last.objective(logits, LossContext(target)) for target in (wrong, ignored))
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.tally, expected.tally)
    with pytest.raises(ValueError, match="label 10 at index 2"):
        last.local_loss(logits, wrong)
