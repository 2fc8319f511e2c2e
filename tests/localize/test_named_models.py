"""Models of torchvision and timm: gradients equal the detached chain's, and the model stays as it is."""

from __future__ import annotations

import pytest
import torch
from chains import assert_equal_to_chain

from auglocal_ext import DGL, Greedy, localize

QUICK = ("resnet18",)
TORCHVISION = {
    "alexnet": 64,
    "vgg11_bn": 32,
    "squeezenet1_1": 64,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "densenet121": 32,
    "googlenet": 64,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "shufflenet_v2_x0_5": 32,
    "mnasnet0_5": 32,
    "convnext_tiny": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vit_b_32": 224,
    "maxvit_t": 224,
}
TIMM = {
    "resnet10t": 32,
    "convnext_atto": 64,
    "mobilenetv3_small_050": 32,
    "efficientnet_lite0": 32,
    "regnety_002": 32,
    "repvgg_a0": 32,
    "densenet121": 64,
    "darknet53": 32,
    "ghostnet_050": 32,
    "hrnet_w18_small": 64,
    "nfnet_l0": 32,
    "vit_tiny_patch16_224": 224,
    "cait_xxs24_224": 224,
    "eva02_tiny_patch14_224": 224,
    "mixer_s32_224": 224,
    "resmlp_12_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "levit_128s": 224,
    "mobilevit_xxs": 64,
    "edgenext_xx_small": 64,
    "poolformer_s12": 64,
    "pvt_v2_b0": 64,
    "fastvit_t8": 64,
    "xcit_nano_12_p16_224": 224,
}
#: Where nothing tells which axis holds the channels.
LAYOUT = {
    "vit_b_32": "class_token",
    "cait_xxs24_224": "channels_last",
    "eva02_tiny_patch14_224": "channels_last",
}


def check(model, size, layout=None):
    torch.manual_seed(0)
    net = localize(model, Greedy(), 10, modules=4, input_shape=(3, size, size), layout=layout)
    x, y = torch.randn(3, 3, size, size), torch.randint(0, 10, (3,))
    assert_equal_to_chain(net.train(), x, y)
    net.zero_grad()
    with torch.no_grad():
        net.eval()
        assert torch.equal(net(x), model(x))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TORCHVISION]
)
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    check(models.get_model(name, weights=None, num_classes=10, **options), TORCHVISION[name], LAYOUT.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    check(timm.create_model(name, num_classes=10), TIMM[name], LAYOUT.get(name))


@pytest.mark.slow
def test_fused_parts_change_nothing_but_rounding():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10)
    net = localize(model, DGL(), 10, modules=4, input_shape=(3, 32, 32), fused=True)
    assert_equal_to_chain(net, torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)), tolerance=1e-5)
