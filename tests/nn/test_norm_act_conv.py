"""norm_act_conv and norm_shortcut_act against torch's own layers, and what they keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from saved import saved_maps
from torch import nn

from auglocal_ext.nn import Branch, norm_act_conv, norm_shortcut_act

CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "1x1": {"kernel_size": 1},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 2), "stride": (2, 1)},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "bias": {"kernel_size": 3, "padding": 1, "bias": True},
}
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 0.15},
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def maps(*shape, dtype=torch.float64, channels_last=False, seed=3):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.5
    return x.to(dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def layers(conv, dtype=torch.float64, seed=5, **options):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4, **options)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.0, 2.0)
        nn.init.normal_(norm.bias)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    conv = nn.Conv2d(4, 8, **{"bias": False, **CONVS[conv]})
    return nn.ModuleList([norm, conv]).to(dtype)


def eager(modules, x, residual=None, act=F.relu):
    norm, conv = modules
    z = norm(x)
    return conv(act(z if residual is None else z + residual))


def fused(modules, x, residual=None, training=None, **options):
    norm, conv = modules
    return norm_act_conv(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        conv.weight,
        conv.bias,
        residual=residual,
        training=norm.training if training is None else training,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        **options,
    )


def gradients(out, inputs):
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, inputs, grad)


@dtypes
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("conv", CONVS)
def test_equal_to_eager(conv, channels_last, dtype):
    ours, theirs = layers(conv, dtype), layers(conv, dtype)
    x = maps(5, 4, 7, 8, dtype=dtype, channels_last=channels_last).requires_grad_()
    out, expected = fused(ours, x), eager(theirs, x)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    assert out.stride() == expected.stride()
    for a, b in zip(
        gradients(out, [x, *ours.parameters()]), gradients(expected, [x, *theirs.parameters()]), strict=True
    ):
        assert a.dtype == b.dtype
        scale = b.abs().max().item()
        torch.testing.assert_close(a / scale, b / scale, **TOLERANCE[dtype])
    for key, value in theirs.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(ours.state_dict()[key], value, **TOLERANCE[dtype])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("activation", "act"), [("relu", F.relu), ("leaky_relu", F.leaky_relu), ("none", lambda z: z)])
def test_activations_residual_and_modes(activation, act, with_residual, training):
    ours, theirs = (layers("bias").train(training) for _ in range(2))
    x = maps(4, 4, 5, 6).requires_grad_()
    residual = maps(4, 4, 5, 6, channels_last=True, seed=4).requires_grad_() if with_residual else None
    out, expected = fused(ours, x, residual, activation=activation), eager(theirs, x, residual, act)
    torch.testing.assert_close(out, expected)
    inputs = [x] if residual is None else [x, residual]
    torch.testing.assert_close(
        gradients(out, [*inputs, *ours.parameters()]), gradients(expected, [*inputs, *theirs.parameters()])
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("alone", range(6))
def test_each_input_alone(alone, training):
    ours, theirs = (layers("bias").train(training) for _ in range(2))
    results = []
    for modules, run in ((ours, fused), (theirs, eager)):
        x, residual = maps(4, 4, 5, 6), maps(4, 4, 5, 6, seed=4)
        tensors = [x, residual, *modules.parameters()]
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index == alone)
        results.append(gradients(run(modules, x, residual), [tensors[alone]]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradcheck(needed):
    modules = layers("stride")
    x, residual = maps(3, 4, 4, 3), maps(3, 4, 4, 3, seed=4)
    x.requires_grad_(needed[0])
    residual.requires_grad_(needed[1])

    def run(x, residual, *_):
        return fused(modules, x, residual)

    assert torch.autograd.gradcheck(run, (x, residual, *modules.parameters()))


@pytest.mark.parametrize("affine", [True, False])
def test_one_map_and_the_cast_of_the_weight_are_kept(affine):
    modules = layers("3x3", torch.float32, affine=affine)
    x = maps(4, 4, 16, 16, dtype=torch.bfloat16).requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fused(modules, x)
    assert out.dtype == torch.bfloat16
    kept, cast = [tensor for tensor in kept if tensor.numel() > 4]
    assert kept.data_ptr() == x.data_ptr()
    assert torch.equal(cast, modules[1].weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast(dtype):
    ours, theirs = layers("bias", torch.float32), layers("bias", torch.float32)
    x = maps(6, 4, 8, 8, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = fused(ours, x), eager(theirs, x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-2)
    found, wanted = gradients(out, [x, *ours.parameters()]), gradients(expected, [x, *theirs.parameters()])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.02 * b.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the weight cache holds nothing that was made without a graph
        fused(ours, x)
        assert ours[1](torch.randn(2, 4, 8, 8)).requires_grad


def test_backward_leaves_no_temporary_behind_and_repeats():
    modules = layers("3x3")
    x = maps(3, 4, 5, 5).requires_grad_()
    out = fused(modules, x)
    first = torch.autograd.grad(out.sum(), [x, *modules.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, *modules.parameters()])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_errors():
    modules = layers("3x3")
    x = maps(3, 4, 5, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once.*create_graph=True.*unfuse"):
        torch.autograd.grad(fused(modules, x).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match=r"shape \(3,\).*got \(4,\)"):
        fused(modules, maps(3, 3, 5, 5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(modules, maps(1, 4, 1, 1))
    before = copy.deepcopy(modules.state_dict())
    fused(modules, x, training=False)
    for key, value in modules.state_dict().items():
        assert torch.equal(value, before[key])


def branch(norm, x):
    return Branch(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
    )


@dtypes
@pytest.mark.parametrize("modes", [(True, True), (False, True), (True, False), (False, False)])
def test_norm_shortcut_act(modes, dtype):
    ours, theirs = (
        nn.ModuleList([layers("1x1", dtype, seed=seed)[0].train(mode) for seed, mode in enumerate(modes)])
        for _ in range(2)
    )
    y = maps(4, 4, 6, 5, dtype=dtype).requires_grad_()
    s = maps(4, 4, 6, 5, dtype=dtype, channels_last=True, seed=4).requires_grad_()
    out = norm_shortcut_act(branch(ours[0], y), branch(ours[1], s))
    expected = F.relu(theirs[0](y) + theirs[1](s))
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    found, wanted = gradients(out, [y, s, *ours.parameters()]), gradients(expected, [y, s, *theirs.parameters()])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= TOLERANCE[dtype]["rtol"] * b.norm()
    assert len(saved_maps(lambda: norm_shortcut_act(branch(ours[0], y), branch(ours[1], s)), ours)) == 2


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_norm_shortcut_act_gradcheck(needed):
    norms = nn.ModuleList([layers("1x1", seed=seed)[0] for seed in range(2)])
    y, s = (maps(3, 4, 3, 4, seed=seed).requires_grad_(need) for seed, need in enumerate(needed))

    def run(y, s, *_):
        return norm_shortcut_act(branch(norms[0], y), branch(norms[1], s), activation="leaky_relu")

    assert torch.autograd.gradcheck(run, (y, s, *norms.parameters()))
    norms.requires_grad_(False)
    assert torch.autograd.gradcheck(run, (y, s))


def test_norm_shortcut_act_errors():
    norms = [layers("1x1")[0] for _ in range(2)]
    y = maps(3, 4, 5, 5).requires_grad_()
    with pytest.raises(ValueError, match="one shape and dtype"):
        norm_shortcut_act(branch(norms[0], y), branch(norms[1], maps(3, 4, 5, 4)))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(norm_shortcut_act(branch(norms[0], y), branch(norms[1], y)).sum(), y, create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_it_casts_as_eager_does(autocast):
    x, weight, bias, kernel = torch.randn(4, 3, 8, 8), torch.rand(3), torch.rand(3), torch.randn(5, 3, 3, 3)

    def run(x):
        return norm_act_conv(x, weight, bias, None, None, kernel, padding=(1, 1), training=True)

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(x)
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
