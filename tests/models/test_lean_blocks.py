"""Transformer blocks after ``fuse``: equal to the eager block, and one tensor kept per product."""

from __future__ import annotations

import copy

import pytest
import torch
from kept import saved_bytes
from torch import nn

from auglocal_ext import SOLO, AugLocal, Greedy, LocalSequential, LocalStep, fuse, models, unfuse
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.models import DecoderBlock, EncoderBlock
from auglocal_ext.nn import eager_type
from auglocal_ext.nn.lean import EAGER
from auglocal_ext.planning import plan_memory
from auglocal_ext.tasks import LanguageModelling

WIDTH, HEADS, SAMPLES, LENGTH = 16, 2, 2, 6


def torchvision_block(dropout=0.0):
    from torchvision.models.vision_transformer import EncoderBlock as Block

    return Block(HEADS, WIDTH, 4 * WIDTH, dropout, 0.0)


GPT2 = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True}
#: A block, and what it keeps in tensors (N, T, WIDTH): x, q, k, v, the attention's output, x + its product, and the raw
#: products of the hidden layer.
BLOCKS = {
    "vit": (lambda: EncoderBlock(WIDTH, HEADS, 4 * WIDTH), 1 + 3 + 1 + 1 + 4),
    "vit, dropout": (lambda: EncoderBlock(WIDTH, HEADS, 4 * WIDTH, 0.2), 10),
    "gpt": (lambda: DecoderBlock(WIDTH, HEADS, 3 * WIDTH, 2), 1 + 3 + 1 + 1 + 2 * 3),
    "gpt-2": (lambda: DecoderBlock(WIDTH, HEADS, 4 * WIDTH, 2, **GPT2), 10),
    "torchvision": (torchvision_block, 10),
    "torchvision, dropout": (lambda: torchvision_block(0.2), 10),
}


def pair(name, dtype=torch.float64):
    torch.manual_seed(0)
    theirs = BLOCKS[name][0]()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    report = fuse(ours)
    assert report.fused == (f"{type(theirs).__name__} ({type(theirs).__name__})",) and not report.left
    return ours, theirs


def tokens(dtype=torch.float64, shape=(SAMPLES, LENGTH, WIDTH)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def results(block, x, autocast=False):
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x)
    wanted = [t for t in (x, *block.parameters()) if t.requires_grad]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, wanted, grad)]


def assert_same(ours, theirs, x, tolerance=1e-12, **options):
    for found, expected in zip(results(ours, x, **options), results(theirs, x, **options), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "torchvision, dropout"])
def test_results_are_those_of_the_eager_block(name):
    ours, theirs = pair(name)
    assert_same(ours, theirs, tokens())
    assert_same(ours.eval(), theirs.eval(), tokens())
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()))
    assert_same(ours.float().train(), theirs.float().train(), tokens(torch.float32), 2e-5)
    assert_same(ours, theirs, tokens(torch.float32), 0.1, autocast=True)
    assert_same(ours.bfloat16(), theirs.bfloat16(), tokens(torch.bfloat16), 0.1)
    unfuse(ours)
    assert [type(part) for part in ours.modules()] == [type(part) for part in theirs.modules()]


def test_dropout_after_torchs_attention():
    """Eagerly its output lies in memory with the batch second, and the mask is drawn in that order: masks differ."""
    ours, theirs = pair("torchvision, dropout")

    def seeded(x):
        torch.manual_seed(4)
        return ours(x)

    assert torch.autograd.gradcheck(seeded, tokens(shape=(1, 2, WIDTH)).requires_grad_())
    x = tokens(shape=(8, 64, WIDTH))
    dropped = []
    for block in (ours, theirs):
        block.dropout.register_forward_hook(lambda module, args, out: dropped.append((out == 0).double().mean()))
        block(x.detach().requires_grad_())
    # 8192 elements: four standard deviations are 0.018
    assert dropped == pytest.approx([0.2, 0.2], abs=0.018)
    assert_same(ours.eval(), theirs.eval(), x)


@pytest.mark.parametrize("name", ["vit", "gpt", "torchvision"])
def test_each_parameter_alone(name):
    ours, theirs = pair(name)
    for chosen, _ in ours.named_parameters():
        for block in (ours, theirs):
            for other, parameter in block.named_parameters():
                parameter.requires_grad_(other == chosen)
        assert_same(ours, theirs, tokens())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_is_kept_per_product(name, dtype):
    ours, theirs = pair(name, dtype)
    x = tokens(dtype).requires_grad_()
    kept, eager = (saved_bytes(lambda block=block: block(x), block) for block in (ours, theirs))
    # mean and rstd of two normalisations, the attention's statistics, and the angles of rotary positions
    wide = 4 * SAMPLES * LENGTH
    beside = 4 * wide + HEADS * wide
    expected = BLOCKS[name][1] * x.numel() * x.element_size()
    assert expected <= kept <= expected + beside
    assert eager > 1.4 * kept


def test_with_autocast_neither_casts_of_inputs_nor_of_weights_are_kept():
    ours, _ = pair("vit", torch.float32)
    x = tokens(torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: ours(x), ours)
    one = x.numel() * 2
    # x and x + the attention's product stay in float32; the attention's output meets torch's own linear layer, which
    # keeps its weight in bfloat16
    weight = 2 * WIDTH * WIDTH
    statistics = 4 * SAMPLES * LENGTH * (4 + HEADS)
    assert kept <= (2 + 3 + 1 + 2 + 4) * one + weight + statistics


def test_rotary_positions_rotate_queries_and_keys_where_they_lie():
    ours, theirs = pair("gpt")
    hook = ours.attention.qkv.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    seen: list[torch.Tensor] = []
    x = tokens()
    assert_same(ours, theirs, x)
    torch.testing.assert_close(seen[0], theirs.attention.qkv(theirs.norm1(x)).detach())  # who looks at it sees it
    hook.remove()
    assert_same(ours, theirs, x)
    with pytest.raises(RuntimeError, match="differentiable once"):
        x = x.requires_grad_()
        torch.autograd.grad(ours.attention(x).sum(), x, create_graph=True)


def left_eager(net):
    return [name for name, part in net.named_modules() if type(part) in set(EAGER.values()) - {nn.Sequential}]


RULES = {"AugLocal": AugLocal(2), "SOLO": SOLO(), "Greedy": Greedy()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [{}, pytest.param(GPT2, marks=pytest.mark.slow)], ids=["llama", "gpt-2"])
def test_local_modules_and_their_auxiliary_networks(rule, kind):
    losses, grads, kept = [], [], []
    x = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    for fused in (True, False):
        torch.manual_seed(0)
        net = models.gpt(4, WIDTH, HEADS, 11, 7, **kind)
        local = LocalSequential(
            net, RULES[rule], task=LanguageModelling(11), modules=2, example_input=x[:1], fused=fused
        )
        assert bool(left_eager(local)) is not fused
        out = local.double()(x, x)
        out.loss.backward()
        losses.append(out.module_losses)
        grads.append([p.grad for p in local.parameters()])
        module = local.local_modules[0]
        h = module(x)
        kept.append(saved_bytes(lambda h=h, module=module: module.local_loss(h, x), local))
        exported = local.export()
        assert [type(part) for part in exported.modules()] == [eager_type(part) for part in net.modules()]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
    # of Greedy's head torch keeps no more either: norm, and a readout whose loss is one op
    assert kept[0] < kept[1] or rule == "Greedy" and kept[0] <= kept[1]


@pytest.mark.parametrize(
    "kind", [{}, pytest.param(GPT2 | {"dropout": 0.2}, marks=pytest.mark.slow)], ids=["llama", "gpt-2, dropout"]
)
def test_the_plan_is_what_the_meter_reads(kind):
    def sgd(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False)

    x, y = (torch.randint(0, 11, (3, 7)) for _ in range(2))
    net = models.gpt(2, WIDTH, HEADS, 11, 7, **kind)
    local = LocalSequential(net, AugLocal(1), task=LanguageModelling(11), modules=2, example_input=x[:1])
    plan = plan_memory(local, len(x), sgd)
    step = LocalStep(local, sgd, plan=plan)
    step(x, y)
    with MemoryMeter() as meter:
        meter.track(step.net, step.optimizer, x, y)
        step(x, y)
    assert meter.peak_bytes == plan.predicted_bytes
