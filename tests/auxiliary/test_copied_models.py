"""AugLocal's copies in models of torchvision, timm and transformers whose forward is more than its modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auglocal_ext import AugLocal, localize

pytestmark = pytest.mark.slow
TOKENS = torch.ones(1, 8, dtype=torch.int64)


class Mean(nn.Module):
    """The mean over the last hidden states, classified."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x).last_hidden_state.mean(1))


def llama(t):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return Mean(t.LlamaModel(t.LlamaConfig(vocab_size=50, num_hidden_layers=2, use_cache=False, **sizes)))


def gpt2(t):
    special = {"bos_token_id": 1, "eos_token_id": 1}
    config = t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False, **special)
    return Mean(t.GPT2Model(config))


def bert(t):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return t.BertForSequenceClassification(t.BertConfig(vocab_size=50, num_labels=4, **sizes))


def convnext(t):
    return t.ConvNextForImageClassification(
        t.ConvNextConfig(hidden_sizes=[8, 12, 12, 16], depths=[1] * 4, num_labels=4)
    )


def swin(t):
    sizes = {"image_size": 32, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2}
    return t.SwinForImageClassification(t.SwinConfig(num_labels=4, **sizes))


def dinov2(t):
    sizes = {"image_size": 28, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = t.Dinov2ForImageClassification(t.Dinov2Config(num_labels=4, **sizes))
    model.dinov2.embeddings.mask_token.requires_grad_(False)  # which no output depends on
    return model


def vit(t):
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32}
    return t.ViTForImageClassification(t.ViTConfig(num_hidden_layers=2, num_attention_heads=2, num_labels=4, **sizes))


#: An input, the layout, and the standard deviation of a weight of the copy, by the end of its name.
TRANSFORMERS = {
    llama: (TOKENS, "channels_last", {"q_proj.weight": 0.02, "down_proj.weight": 0.02}),
    gpt2: (TOKENS, "channels_last", {"c_attn.weight": 0.02, "mlp.c_proj.weight": 0.01}),
    bert: (TOKENS, "class_token", {"dense.weight": 0.02}),
    convnext: (torch.zeros(1, 3, 64, 64), None, {"pwconv1.weight": 0.02}),
    swin: (torch.zeros(1, 3, 32, 32), None, {"q_proj.weight": 0.02, "fc1.weight": 0.02}),
    dinov2: (torch.zeros(1, 3, 28, 28), "class_token", {"q_proj.weight": 0.02, "fc1.weight": 0.02}),
    vit: (torch.zeros(1, 3, 32, 32), "class_token", {"q_proj.weight": 0.02, "fc1.weight": 0.02}),
}


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_transformers(make):
    example, layout, stds = TRANSFORMERS[make]
    model = make(pytest.importorskip("transformers"))
    output = None if isinstance(model, Mean) else "logits"
    rule = AugLocal(2, joint_tail=False)
    net = localize(model, rule, 4, [0], example_input=example, layout=layout, output=output)
    copied = net.auxiliary[0].blocks
    found = {end: p.std() for end in stds for name, p in copied.named_parameters() if name.endswith(end)}
    assert list(found) == list(stds)
    for end, std in stds.items():
        assert 0.7 * std < found[end] < 1.4 * std, (end, found[end])
    names = {name for name, _ in copied.named_parameters()}
    assert names and names == {name for name in copied.state_dict() if name in names}
    x = torch.randint(2, 50, (4, 8)) if example.dtype == torch.int64 else torch.randn(4, *example.shape[1:])
    net(x, torch.arange(4)).loss.backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())


def check(model, size):
    """The last layer, which ends in code between submodules, is copied for each local module."""
    net = localize(model, AugLocal(2), 4, 3, input_shape=(3, size, size))
    assert all(len(auxiliary.blocks) == 1 for auxiliary in net.auxiliary)


def test_mobilenet_v3_of_torchvision():
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    with torch.device("meta"):
        check(models.mobilenet_v3_large(num_classes=4), 64)
    net = localize(models.mobilenet_v3_small(num_classes=4), AugLocal(2), 4, 3, input_shape=(3, 64, 64))
    net(torch.randn(4, 3, 64, 64), torch.arange(4)).loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("name", ["mixer_b16_224", "resmlp_12_224", "xcit_nano_12_p16_224"])
def test_models_of_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        check(timm.create_model(name, num_classes=4), 224)
