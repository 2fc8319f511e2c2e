"""Blocks of Hugging Face's Llama and GPT-2 and of timm after ``fuse``."""

from __future__ import annotations

import copy
import os
import pickle
import warnings

import pytest
import torch
from kept import saved_bytes
from torch import nn

from auglocal_ext import AugLocal, fuse, localize, unfuse
from auglocal_ext.nn.lean import EAGER
from auglocal_ext.tasks import LanguageModelling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WIDTH, HEADS, HIDDEN, SAMPLES, LENGTH = 16, 2, 48, 2, 6


def llama_config(hf, **options):
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 3}
    return hf.LlamaConfig(vocab_size=11, **{**sizes, "use_cache": False, **options})


def gpt2_config(hf, **options):
    sizes = {"vocab_size": 11, "n_positions": 16, "n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": 3, "n_head": HEADS}
    return hf.GPT2Config(
        **{**sizes, "use_cache": False, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0, **options}
    )


def hugging_face():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    transformers.logging.set_verbosity_error()
    return transformers


class Llama(nn.Module):
    """A block of Llama with what its model gives it."""

    def __init__(self, **options):
        super().__init__()
        hf = hugging_face()
        from transformers.models.llama import modeling_llama

        config = llama_config(hf, **options)
        config._attn_implementation = options.get("attn_implementation", "sdpa")
        self.block = modeling_llama.LlamaDecoderLayer(config, 0)
        self.rotary = modeling_llama.LlamaRotaryEmbedding(config)

    def forward(self, x):
        positions = torch.arange(x.shape[1]).expand(len(x), -1)
        out = self.block(x, position_embeddings=self.rotary(x, positions), position_ids=positions)
        return out[0] if isinstance(out, tuple) else out


class GPT2(nn.Module):
    def __init__(self, **options):
        super().__init__()
        hf = hugging_face()
        from transformers.models.gpt2 import modeling_gpt2

        config = gpt2_config(hf, **options)
        config._attn_implementation = options.get("attn_implementation", "sdpa")
        self.block = modeling_gpt2.GPT2Block(config, 0)

    def forward(self, x):
        out = self.block(x)
        return out[0] if isinstance(out, tuple) else out


class Timm(nn.Module):
    def __init__(self, **options):
        super().__init__()
        timm = pytest.importorskip("timm", exc_type=Exception)
        self.block = timm.models.vision_transformer.Block(WIDTH, HEADS, HIDDEN / WIDTH, qkv_bias=True, **options)

    def forward(self, x):
        return self.block(x)


#: A block, what it keeps in tensors (N, T, WIDTH), and the class that is reported.
BLOCKS = {
    "llama": (Llama, 1 + 3 + 1 + 1 + 2 * 3, "LlamaDecoderLayer"),
    "gpt2": (lambda: GPT2(resid_pdrop=0.0), 1 + 3 + 1 + 1 + 3, "GPT2Block"),
    "gpt2, dropout": (lambda: GPT2(resid_pdrop=0.2), 1 + 3 + 1 + 1 + 3, "GPT2Block"),
    "timm": (Timm, 1 + 3 + 1 + 1 + 3, "Block"),
    "timm, dropout": (lambda: Timm(proj_drop=0.2, drop_path=0.3), 1 + 3 + 1 + 1 + 3, "Block"),
    # the gradients of two scales need what they scale
    "timm, scaled": (lambda: Timm(init_values=0.5), 1 + 3 + 1 + 1 + 3 + 2, "Block"),
}


def pair(name):
    torch.manual_seed(0)
    theirs = BLOCKS[name][0]()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    ours = copy.deepcopy(theirs)
    report = fuse(ours)
    assert report.fused == (f"block ({BLOCKS[name][2]})",) and not report.left
    return ours, theirs


def tokens(dtype=torch.float32):
    return torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def results(block, x, autocast=False):
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in (x, *block.parameters()) if t.requires_grad], grad)]


def assert_same(ours, theirs, x, tolerance, **options):
    for found, expected in zip(results(ours, x, **options), results(theirs, x, **options), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", BLOCKS)
def test_results_are_those_of_the_eager_block(name):
    ours, theirs = pair(name)
    assert_same(ours, theirs, tokens(), 3e-5)
    for chosen, _ in ours.named_parameters():
        for block in (ours, theirs):
            for other, parameter in block.named_parameters():
                parameter.requires_grad_(other == chosen)
        assert_same(ours, theirs, tokens(), 3e-5)
    ours.requires_grad_(True), theirs.requires_grad_(True)
    assert_same(ours, theirs, tokens(), 0.2, autocast=True)
    assert_same(ours.double(), theirs.double(), tokens(torch.float64), 1e-5 if name == "llama" else 1e-12)
    assert_same(ours.eval(), theirs.eval(), tokens(torch.float64), 1e-5 if name == "llama" else 1e-12)
    again = pickle.loads(pickle.dumps(ours))
    assert_same(again, theirs, tokens(torch.float64), 1e-5)
    unfuse(ours)
    assert [type(part) for part in ours.modules()] == [type(part) for part in theirs.modules()]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_is_kept_per_product(name, dtype):
    ours, theirs = pair(name)
    ours.to(dtype), theirs.to(dtype)
    x = tokens(dtype).requires_grad_()
    kept, eager = (saved_bytes(lambda block=block: block(x), block) for block in (ours, theirs))
    wide = 4 * SAMPLES * LENGTH
    # mean and rstd of two normalisations, the attention's statistics, angles of rotary positions, masks of samples
    beside = 4 * wide + HEADS * wide + 2 * wide * WIDTH // HEADS + 2 * 4 * SAMPLES
    expected = BLOCKS[name][1] * x.numel() * x.element_size()
    assert expected <= kept <= expected + beside
    assert eager > 1.3 * kept


def test_what_is_left():
    for made, part in ((Llama, "self_attn"), (GPT2, "attn")):
        report = fuse(made(attn_implementation="eager"))
        assert report.left == (
            (f"block.{part}", "keeps the attention's weights: its attn_implementation is 'eager', not 'sdpa'"),
        )
    report = fuse(Llama(hidden_act="relu"))
    assert report.left[0] == ("block.mlp", "its gate is a ReLU, not SiLU")
    report = fuse(GPT2(activation_function="quick_gelu"))
    assert report.left == (("block.mlp.act", "is of type QuickGELUActivation, which fuse does not know"),)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_localized_models(name):
    hf = hugging_face()
    x = torch.randint(1, 11, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    grads, kept = [], []
    for fused in (True, False):
        torch.manual_seed(0)
        if name == "llama":
            model = hf.LlamaForCausalLM(llama_config(hf))
        else:
            model = hf.GPT2LMHeadModel(gpt2_config(hf, resid_pdrop=0.0, embd_pdrop=0.0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "local modules .* share a parameter")
            local = localize(
                *(model, AugLocal(1)),
                **{"modules": 2, "task": LanguageModelling(11), "example_input": x[:1], "output": "logits"},
                fused=fused,
            )
        eager = [part for part in local.modules() if type(part) in set(EAGER.values()) - {nn.Sequential}]
        assert bool(eager) is not fused
        out = local(x, x)
        out.loss.backward()
        grads.append([out.module_losses, *(p.grad for p in local.parameters())])
        module = local.local_modules[0]
        kept.append(saved_bytes(lambda module=module: module.local_loss(module(x), x), local))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert kept[0] < 0.75 * kept[1]
