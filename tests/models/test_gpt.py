"""The decoder: against its formulas, against Hugging Face's GPT-2 and Llama, and as a network of local modules."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from auglocal_ext import AugLocal, LocalSequential, LocalStep, models
from auglocal_ext.layers import describe

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GPT2 = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True, "tied": True}
KINDS = {"llama": {}, "gpt2": GPT2}


def small(**options):
    torch.manual_seed(0)
    net = models.gpt(2, 12, 3, vocab_size=11, context=7, **options)
    for parameter in net.parameters():  # biases and scales that are not 0 and 1, so that one left out shows
        nn.init.normal_(parameter, 0.0, 0.3)
    return net.double()


def tokens(count=3, length=7):
    return torch.randint(0, 11, (count, length), generator=torch.Generator().manual_seed(1))


def reference(w, x, options, layers=2, heads=3):
    """The decoder's formulas, a sample, a head and a position at a time, on the state dict ``w``."""

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name, h):
        if options.get("norm") == "layer":
            h = h - h.mean(-1, keepdim=True)
        return h / ((h * h).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def rotated(v, t):
        half = len(v) // 2
        turned = torch.view_as_complex(torch.stack((v[:half], v[half:]), -1)) * torch.exp(
            1j * t * 10_000.0 ** (-torch.arange(half, dtype=v.dtype) / half)
        )
        return torch.cat((turned.real, turned.imag))

    def attention(name, h):
        length, width = h.shape
        parts = linear(f"{name}.qkv", h).view(length, 3, heads, width // heads)
        rows = []
        for t in range(length):
            row = []
            for head in range(heads):
                turn = (lambda v, _: v) if options.get("positions") == "learned" else rotated
                q = turn(parts[t, 0, head], t)
                scores = torch.stack([q @ turn(parts[s, 1, head], s) for s in range(t + 1)])
                row.append(torch.softmax(scores / math.sqrt(width // heads), 0) @ parts[: t + 1, 2, head])
            rows.append(torch.cat(row))
        return linear(f"{name}.out", torch.stack(rows))

    def mlp(name, h):
        if options.get("mlp") == "gelu":
            u = linear(f"{name}.up", h)
            cube = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
            return linear(f"{name}.down", 0.5 * u * (1 + torch.tanh(cube)))
        gate, up = linear(f"{name}.gate_up", h).tensor_split(2, -1)
        return linear(f"{name}.down", gate * torch.sigmoid(gate) * up)

    out = []
    for sample in x:
        h = w["embedding.tokens.weight"][sample]
        if options.get("positions") == "learned":
            h = h + w["embedding.positions.weight"][: len(sample)]
        for i in range(layers):
            h = h + attention(f"block_{i}.attention", norm(f"block_{i}.norm1", h))
            h = h + mlp(f"block_{i}.mlp", norm(f"block_{i}.norm2", h))
        out.append(linear("readout", norm("norm", h)))
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_formulas(kind):
    net, x = small(**KINDS[kind]), tokens()
    out = net(x)
    expected = reference(dict(net.state_dict(keep_vars=True)), x, KINDS[kind])
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), list(net.parameters()))
    want = torch.autograd.grad((expected * weights).sum(), list(net.parameters()))
    torch.testing.assert_close(got, want)


def test_no_position_sees_a_later_one():
    for options in KINDS.values():
        net, x = small(**options), tokens(1)
        changed = x.clone()
        changed[0, 4] = (x[0, 4] + 1) % 11
        before, after = net(x), net(changed)
        assert torch.equal(before[0, :4], after[0, :4]) and not torch.equal(before[0, 4:], after[0, 4:])


def of_gpt2(theirs, key):
    """The parameter of Hugging Face's GPT-2 that is ours of the name ``key``."""
    parts = {"embedding.tokens.": "wte.", "embedding.positions.": "wpe.", "norm.": "ln_f.", "readout.": "wte."}
    inside = {"norm1": "ln_1", "norm2": "ln_2", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj"}
    inside |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for ours, name in parts.items():
        if key.startswith(ours):
            return theirs.transformer.get_parameter(name + key.removeprefix(ours))
    block, _, rest = key.partition(".")
    name, _, field = rest.rpartition(".")
    found = theirs.transformer.h[int(block.removeprefix("block_"))].get_parameter(f"{inside[name]}.{field}")
    return found.T if "norm" not in name and field == "weight" else found  # Conv1D holds its transpose


def of_llama(theirs, key):
    """The same of Llama, whose products are apart where ours are one."""
    whole = {"embedding.tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    whole["readout.weight"] = "lm_head.weight"
    if key in whole:
        return theirs.get_parameter(whole[key])
    inside = {
        "norm1": ["input_layernorm"],
        "norm2": ["post_attention_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.out": ["self_attn.o_proj"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    block, _, rest = key.partition(".")
    layer = theirs.model.layers[int(block.removeprefix("block_"))]
    return torch.cat([layer.get_parameter(f"{name}.weight") for name in inside[rest.removesuffix(".weight")]])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_hugging_face(kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=7, n_embd=12, n_layer=2, n_head=3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        theirs, find = transformers.GPT2LMHeadModel(config), of_gpt2
    else:
        config = transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=12,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=3,
            rms_norm_eps=1e-5,
            max_position_embeddings=7,
        )
        theirs, find = transformers.LlamaForCausalLM(config), of_llama
    theirs.double()
    ours, x = small(**KINDS[kind]), tokens()
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
        for name, parameter in ours.named_parameters():
            parameter.copy_(find(theirs, name))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    out, expected = ours(x), theirs(x, use_cache=False).logits
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # Llama makes its angles and RMSNorm in fp32
    torch.testing.assert_close(out, expected, **tolerance)
    names, own = zip(*ours.named_parameters(), strict=True)
    got = torch.autograd.grad(F.cross_entropy(out.flatten(0, 1), x.roll(-1, 1).flatten()), own)
    F.cross_entropy(expected.flatten(0, 1), x.roll(-1, 1).flatten()).backward()
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    for name, grad in zip(names, got, strict=True):
        torch.testing.assert_close(grad, find(theirs, name).detach(), **tolerance, msg=f"the gradient of {name}")


def test_initialised_as_gpt2():
    torch.manual_seed(0)
    for options in KINDS.values():
        net = models.gpt(8, 128, 4, vocab_size=300, context=200, **options)
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            elif "norm" in name:
                assert (parameter == 1).all()
            else:
                expected = 0.02 / 4 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
                assert abs(parameter.std().item() / expected - 1) < 0.05, name


def test_shape_of_the_network():
    net = models.gpt(2, 64, 4)
    assert [name for name, _ in net.named_children()] == ["embedding", "block_0", "block_1", "norm", "readout"]
    assert net.block_0.mlp.down.in_features == 192 and net.readout.weight is not net.embedding.tokens.weight
    assert net(torch.zeros(1, 300, dtype=torch.int64)).shape == (1, 300, 256)  # rotary positions have no end
    layers = describe(net, torch.zeros(1, 9, dtype=torch.int64)).layers
    assert [(layer.start, layer.stop) for layer in layers] == [(0, 1), (1, 2), (2, 5)]
    assert all(layer.features.is_tokens for layer in layers)
    tied = models.gpt(1, 8, 2, mlp="gelu", mlp_width=24, tied=True)
    assert tied.readout.weight is tied.embedding.tokens.weight and tied.block_0.mlp.up.out_features == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is at least 1, got 0"),
        ({"width": 10, "heads": 4}, "heads must divide the width, got 4 heads and a width of 10"),
        ({"width": 12, "heads": 4}, "an even number of features per head, got 12 / 4 = 3"),
        ({"norm": "batch"}, "norm is one of 'rms', 'layer', got 'batch'"),
        ({"positions": "sine"}, "positions is one of 'rotary', 'learned', got 'sine'"),
        ({"mlp": "relu"}, "mlp is one of 'swiglu', 'gelu', got 'relu'"),
        ({"mlp_width": 0}, "mlp_width is at least 1, got 0"),
        ({"dropout": 1.0}, "dropout is a probability.*got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.gpt(**{"layers": 1, **options})


def test_learned_positions_end_with_the_context():
    net = models.gpt(1, 8, 2, context=5, positions="learned")
    net(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions for a context of 5 tokens, got 6"):
        net(torch.zeros(1, 6, dtype=torch.int64))


def test_dropout_acts_everywhere_in_training_alone():
    x = torch.zeros(1, 64, dtype=torch.int64)
    for place in ("embedding.dropout", "block_0.dropout", "block_0.attention"):
        net = models.gpt(1, 32, 2, dropout=0.5)
        for name, part in net.named_modules():
            if hasattr(part, "dropout") and isinstance(part.dropout, float):
                part.dropout = 0.5 if name == place else 0.0
            elif isinstance(part, nn.Dropout):
                part.p = 0.5 if name == place else 0.0
        assert not torch.equal(net(x), net(x)), place
        net.eval()
        assert torch.equal(net(x), net(x))


class Classifier(nn.Linear):
    """Of the mean over the positions."""

    def forward(self, h):
        return super().forward(h.mean(1))


def test_auglocal_samples_fresh_causal_blocks():
    net = models.gpt(5, 16, 2, vocab_size=11, context=6, **GPT2 | {"tied": False})
    layers = nn.Sequential(*list(net)[:-1], Classifier(16, 4))
    local = LocalSequential(layers, AugLocal(depth=3), 4, example_input=torch.zeros(1, 6, dtype=torch.int64))
    assert local.num_modules == 4
    blocks = local.auxiliary[0].blocks  # of blocks 2 and 4, the last with the norm after it
    assert [type(block).__name__ for block in blocks] == ["DecoderBlock", "Sequential"]
    fresh, source = blocks[0], net.block_2
    assert fresh.attention.causal and not fresh.attention.rotary_positions
    for (name, ours), theirs in zip(fresh.named_parameters(), source.parameters(), strict=True):
        assert ours is not theirs and ours.shape == theirs.shape
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            assert not torch.equal(ours, theirs) and abs(ours.std().item() / (0.02 / math.sqrt(10)) - 1) < 0.2
    h = torch.randn(1, 6, 16)
    moved = h.clone()
    moved[0, 3] += 1
    assert torch.equal(fresh(h)[0, :3], fresh(moved)[0, :3])
    local(torch.randint(0, 11, (3, 6)), torch.randint(0, 4, (3,))).loss.backward()
    assert all(parameter.grad is not None for parameter in local.parameters())


def test_a_tied_embedding_is_trained_by_both_of_its_modules_in_one_update():
    net = models.gpt(2, 16, 2, vocab_size=11, context=6, tied=True)
    net.append(nn.Flatten(1))  # (N, T, V) as T V outputs
    x, y = tokens(4, 6), torch.randint(0, 66, (4,))

    def wrapped():
        with pytest.warns(UserWarning, match=r"local modules 0 and 2 share a parameter of shape \(11, 16\)"):
            return LocalSequential(copy.deepcopy(net), AugLocal(depth=1), 66, example_input=x, modules=[0, 1])

    local, stepped = wrapped(), wrapped()
    stepped.load_state_dict(local.state_dict())
    weight, losses = local.primary.embedding.tokens.weight, []
    h = x
    for module in local.local_modules:
        out = module(h)
        losses.append(module.local_loss(out, y))
        h = module.hand_on(out)
    first, last = (torch.autograd.grad(losses[i], weight)[0] for i in (0, 2))
    assert first.any() and last.any()
    LocalStep(stepped, lambda params: torch.optim.SGD(params, lr=0.5))(x, y)
    torch.testing.assert_close(stepped.primary.readout.weight, weight - 0.5 * (first + last))
    assert stepped.primary.readout.weight is stepped.primary.embedding.tokens.weight
