"""Decoders and encoders of Hugging Face, cut into local modules as they come."""

from __future__ import annotations

import copy
import os
import warnings
import weakref

import pytest
import torch
from chains import assert_equal_to_chain
from torch import nn
from torch.nn import functional as F

from auglocal_ext import AugLocal, Greedy, LocalStep, localize
from auglocal_ext.tasks import LanguageModelling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
VOCABULARY = 31
#: Readout and loss are one op, which is equal up to rounding.
READOUT = 1e-5


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return transformers


def gpt2(hf, **options):
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 3}
    return hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options)


def llama(hf, **options):
    return hf.LlamaConfig(vocab_size=VOCABULARY, **{**SIZES, **options})


def bert(hf):
    return hf.BertConfig(vocab_size=VOCABULARY, num_labels=5, max_position_embeddings=16, **SIZES)


def vit(hf):
    return hf.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIZES)


#: The model, the path of its blocks, and whether it learns the next token.
MODELS = {
    "gpt2": (lambda hf: hf.GPT2LMHeadModel(gpt2(hf)), "transformer.h", True),
    "gpt2 without cache, eager": (
        lambda hf: hf.GPT2LMHeadModel(gpt2(hf, use_cache=False, attn_implementation="eager")),
        "transformer.h",
        True,
    ),
    "llama": (lambda hf: hf.LlamaForCausalLM(llama(hf)), "model.layers", True),
    "llama, grouped queries": (
        lambda hf: hf.LlamaForCausalLM(llama(hf, num_key_value_heads=1, use_cache=False)),
        "model.layers",
        True,
    ),
    "bert": (lambda hf: hf.BertForSequenceClassification(bert(hf)), "bert.encoder.layer", False),
    "vit": (lambda hf: hf.ViTForImageClassification(vit(hf)), "vit.layers", False),
}


def tokens(samples=4, length=8):
    return torch.randint(1, VOCABULARY, (samples, length))


def wrapped(model, rule, modules, x, predicts_tokens=True, **options):
    what = {"task": LanguageModelling(VOCABULARY)} if predicts_tokens else {"num_classes": 5}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "local modules .* share a parameter")  # GPT-2's embedding and readout
        return localize(model, rule, modules=modules, example_input=x[:1], **{"output": "logits", **what, **options})


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_detached_chain(hf, name):
    make, path, predicts_tokens = MODELS[name]
    model = make(hf)
    x = torch.randn(4, 3, 16, 16) if name == "vit" else tokens()
    y = tokens() if predicts_tokens else torch.randint(0, 5, (4,))
    before = copy.deepcopy(model).eval()
    layout = None if predicts_tokens else "class_token"
    for rule, modules in ((AugLocal(depth=2), [f"{path}.0", f"{path}.1"]), (Greedy(), 2)):
        net = wrapped(model, rule, modules, x, predicts_tokens, layout=layout)
        assert net.num_modules == (2 if modules == 2 else 3)
        assert_equal_to_chain(net, x, y, READOUT if predicts_tokens else 0.0)
        assert (net(x, y).output.shape[-1] == 0) == predicts_tokens  # without logits
        net.zero_grad()
        net.eval()
        assert torch.equal(net(x), before(x).logits) and torch.equal(model(x).logits, before(x).logits)
        net.train()
    assert model.state_dict().keys() == before.state_dict().keys()


def test_recomputation_gives_the_same_gradients(hf):
    x, y = tokens(), tokens()
    model = hf.GPT2LMHeadModel(gpt2(hf))  # with dropout and a cache
    net = wrapped(model, Greedy(), ["transformer.h.0", "transformer.h.1"], x)
    found = []
    for way in ("none", "all"):
        net.recompute = way
        net.zero_grad()
        torch.manual_seed(3)
        net(x, y).loss.backward()
        found.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *found))


def peak_of(net, x, y):
    """Largest number of bytes that autograd keeps at a time, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in net.parameters()}
    alive, peak = {}, 0

    def pack(tensor):
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            holder = tensor.detach()
            alive[weakref.ref(holder)] = (storage.data_ptr(), storage.nbytes())
            for reference in [each for each in alive if each() is None]:
                del alive[reference]
            peak = max(peak, sum(dict(alive.values()).values()))
            return holder
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        net(x, y).loss.backward()
    return peak


def test_activations_of_a_module_are_released_before_the_next_runs(hf):
    x, y = tokens(16), tokens(16)
    peaks = {}
    for cache in (True, False):
        model = hf.LlamaForCausalLM(llama(hf, use_cache=cache, num_hidden_layers=6))
        cuts = [f"model.layers.{i}" for i in range(5)]
        peaks[cache] = [peak_of(wrapped(model, Greedy(), cut, x), x, y) for cut in (1, cuts)]
    assert peaks[True] == peaks[False]
    whole, local = peaks[True]
    assert local < 0.35 * whole, peaks


def test_generation_goes_on_after_training(hf):
    x, y = tokens(), tokens()
    model = hf.LlamaForCausalLM(llama(hf)).eval()
    written = model.generate(x, max_new_tokens=4, do_sample=False)
    net = wrapped(model, Greedy(), ["model.layers.0"], x)
    step = LocalStep(net.train(), lambda params: torch.optim.AdamW(params, lr=0.0, weight_decay=0.0))
    step(x, y)
    assert torch.equal(model.eval().generate(x, max_new_tokens=4, do_sample=False), written)


def test_hooks_that_a_model_installs_at_its_first_call_are_there_once(hf):
    model = hf.LlamaForCausalLM(llama(hf, output_hidden_states=True))
    x = tokens()
    net = wrapped(model, AugLocal(depth=2), ["model.layers.0", "model.layers.1"], x)
    net(x, tokens()).loss.backward()
    assert len(model(x).hidden_states) == 4


class Masked(nn.Module):
    """A decoder with its padding, token 0, masked out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, attention_mask=(ids != 0).long()).logits


def test_padding_masks_cross_cuts_only_when_asked_for(hf):
    cuts, x = ["model.model.layers.0", "model.model.layers.1"], tokens()
    x[1, :3] = 0

    def masked(**options):
        return Masked(hf.LlamaForCausalLM(llama(hf, **options)))

    with pytest.raises(ValueError, match='cannot be cut after .*layers.0.*where in model.model.*skips="detach" allows'):
        wrapped(masked(attn_implementation="eager"), Greedy(), cuts, x, output=None)
    net = wrapped(masked(attn_implementation="eager"), Greedy(), cuts, x, output=None, skips="detach")
    assert [str(crossing) for crossing in net._segment(0).last.crossing] == ["the input"]
    assert_equal_to_chain(net, x, tokens(), READOUT)
    # SDPA leaves out a mask of nothing but ones, which it finds out by reading it.
    with pytest.raises(ValueError, match="cannot be cut after .*its forward needs more.*reads a value"):
        wrapped(masked(), Greedy(), cuts, x, output=None, skips="detach")


def test_a_classifier_that_finds_the_last_token_by_the_ids(hf):
    model, x = hf.GPT2ForSequenceClassification(gpt2(hf, num_labels=5, pad_token_id=0)), tokens()
    x[1, 5:] = 0
    cuts = ["transformer.h.0", "transformer.h.1"]
    with pytest.raises(ValueError, match='can be cut nowhere.*the model\'s input.*skips="detach" allows some'):
        wrapped(model, Greedy(), cuts, x, False)
    assert_equal_to_chain(wrapped(model, Greedy(), cuts, x, False, skips="detach"), x, torch.randint(0, 5, (4,)))


class OlderBlock(nn.Module):
    """As blocks of earlier releases: keyword arguments, and a tuple with a cache that is handed on in a list."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, hidden_states, *, attention_mask, position_embeddings, use_cache=False, past=None):
        cos, sin = position_embeddings
        q, k, v = self.qkv(self.norm(hidden_states)).chunk(3, -1)
        q, k = q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin
        if past is not None:
            past.append((k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = (hidden_states + mixed, None)
        return (*out, (k, v)) if use_cache else out


class OlderDecoder(nn.Module):
    def __init__(self, cache, width=12):
        super().__init__()
        self.embedding, self.readout = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.blocks = nn.ModuleList(OlderBlock(width) for _ in range(3))
        self.cache = cache

    def forward(self, ids):
        h, kept, past = self.embedding(ids), [], [] if self.cache == "object" else None
        length, width = h.shape[1:]
        angles = torch.outer(torch.arange(length, device=ids.device), torch.ones(width, device=ids.device) / width)
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None]
        for block in self.blocks:
            h, _, *rest = block(
                h,
                attention_mask=mask,
                position_embeddings=(angles.cos(), angles.sin()),
                use_cache=self.cache == "tuples",
                past=past,
            )
            kept += rest
        return {"logits": self.readout(h), "past": kept or past}


@pytest.mark.parametrize(("cache", "rule"), [("tuples", AugLocal(depth=2)), ("object", Greedy())])
def test_blocks_that_return_tuples_and_take_masks_and_caches(cache, rule):
    torch.manual_seed(0)
    x, y = tokens(), tokens()
    net = wrapped(OlderDecoder(cache), rule, ["blocks.0", "blocks.1"], x)
    assert net.num_modules == 3
    assert_equal_to_chain(net, x, y, READOUT)
