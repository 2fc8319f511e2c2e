"""AugLocal on networks whose layers are of no known form: its blocks are fresh copies of the sampled layers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from isolation import assert_gradient_isolated, assert_same_values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import MAN, AugLocal, ContSup, InfoPro, LocalSequential, PredSim, models
from auglocal_ext.nn import deferred, eager_type

Y = torch.tensor([0, 1, 2, 3])


def torchvision():
    return pytest.importorskip("torchvision", exc_type=Exception)


def timm():
    return pytest.importorskip("timm", exc_type=Exception)


class PreActivation(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(fan_in), nn.BatchNorm2d(fan_out)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x):
        h = self.norm1(x).relu()
        return self.conv2(self.norm2(self.conv1(h)).relu()) + self.shortcut(h)


class Tokens(nn.Module):
    """Patches, a class token, positions."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.position


class First(nn.Module):
    def forward(self, x):
        return x[:, 0]


def stem(width):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())


def ended(width, *layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def mobilenet_v2():
    block = torchvision().models.mobilenetv2.InvertedResidual
    return ended(24, stem(16), block(16, 8, 1, 1), block(8, 12, 2, 6), block(12, 12, 1, 6), nn.Conv2d(12, 24, 1))


def mobilenet_v3():
    v3 = torchvision().models.mobilenetv3
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
    blocks = [
        v3.InvertedResidual(v3.InvertedResidualConfig(*sizes, 1.0), norm)
        for sizes in (
            (16, 3, 16, 16, True, "RE", 2, 1),
            (16, 5, 32, 24, True, "HS", 2, 1),
            (24, 5, 48, 24, False, "HS", 1, 1),
        )
    ]
    return ended(24, stem(16), *blocks)


def efficientnet():
    en = torchvision().models.efficientnet
    blocks = [
        en.MBConv(en.MBConvConfig(*sizes, 1), 0.2, nn.BatchNorm2d)
        for sizes in ((1, 3, 1, 16, 8), (6, 3, 2, 8, 16), (6, 5, 1, 16, 16))
    ]
    return ended(16, stem(16), *blocks)


def regnet_y():
    regnet = torchvision().models.regnet
    block = partial(regnet.ResBottleneckBlock, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU, group_width=8)
    blocks = [
        block(*sizes, bottleneck_multiplier=1.0, se_ratio=0.25) for sizes in ((8, 16, 2), (16, 24, 2), (24, 24, 1))
    ]
    return ended(24, stem(8), *blocks)


def convnext():
    cn = torchvision().models.convnext
    down = nn.Sequential(cn.LayerNorm2d(10, eps=1e-6), nn.Conv2d(10, 12, 2, 2))
    blocks = [cn.CNBlock(10, 1e-6, 0.1), cn.CNBlock(10, 1e-6, 0.1), down, cn.CNBlock(12, 1e-6, 0.1)]
    return nn.Sequential(
        nn.Conv2d(3, 10, 4, 4),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Sequential(cn.LayerNorm2d(12), nn.Flatten(), nn.Linear(12, 4)),
    )


def densenet():
    dense = torchvision().models.densenet
    return ended(
        28, stem(8), dense._DenseBlock(2, 8, 2, 4, 0.1), dense._Transition(16, 12), dense._DenseBlock(4, 12, 2, 4, 0.1)
    )


def swin(version):
    sw = torchvision().models.swin_transformer
    block, merge = (
        (sw.SwinTransformerBlock, sw.PatchMerging) if version == 1 else (sw.SwinTransformerBlockV2, sw.PatchMergingV2)
    )
    permute = torchvision().ops.Permute
    first = nn.Sequential(nn.Conv2d(3, 8, 4, 4), permute([0, 2, 3, 1]), nn.LayerNorm(8))
    blocks = [block(8, 2, [4, 4], [0, 0]), block(8, 2, [4, 4], [2, 2]), merge(8), block(16, 2, [4, 4], [0, 0])]
    return ended(16, first, *blocks, nn.LayerNorm(16), permute([0, 3, 1, 2]))


def vit():
    block = torchvision().models.vision_transformer.EncoderBlock
    blocks = [block(2, 8, 16, 0.1, 0.1, nn.LayerNorm) for _ in range(3)]
    return nn.Sequential(Tokens(8), *blocks, nn.LayerNorm(8), First(), nn.Linear(8, 4))


def encoder():
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)]
    return nn.Sequential(Tokens(8), *blocks, First(), nn.Linear(8, 4))


def pre_activation():
    return ended(12, stem(8), PreActivation(8, 8, 1), PreActivation(8, 12, 2), PreActivation(12, 12, 1))


def timm_vit():
    block = timm().models.vision_transformer.Block
    blocks = [block(8, 2, qkv_bias=True, init_values=1e-5, drop_path=0.1) for _ in range(3)]
    return nn.Sequential(Tokens(8), *blocks, nn.LayerNorm(8), First(), nn.Linear(8, 4))


def timm_model(name, parts, options):
    model = timm().create_model(name, num_classes=4, **options)
    layers = []
    for part in parts.split():
        found = model.get_submodule(part)
        layers += found if part in ("blocks", "stages", "layers") else [found]
    return nn.Sequential(*layers)


FAMILIES = {
    "MobileNetV2": mobilenet_v2,
    "MobileNetV3": mobilenet_v3,
    "EfficientNet": efficientnet,
    "RegNetY": regnet_y,
    "ConvNeXt": convnext,
    "DenseNet": densenet,
    "Swin": partial(swin, 1),
    "Swin V2": partial(swin, 2),
    "ViT": vit,
    "TransformerEncoderLayer": encoder,
    "pre-activation": pre_activation,
    "ViT of timm": timm_vit,
}
#: Names, and the parts that follow one another, of which stages are taken apart.
TIMM = {
    "ConvNeXtV2": ("convnextv2_atto", "stem stages head", {}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        "patch_embed layers norm head",
        {"img_size": 64, "window_size": 2, "embed_dim": 12},
    ),
    "EfficientNet": ("efficientnet_b0", "conv_stem bn1 blocks conv_head bn2 global_pool classifier", {}),
    "MobileNetV4": (
        "mobilenetv4_conv_small",
        "conv_stem bn1 blocks global_pool conv_head norm_head act2 flatten classifier",
        {},
    ),
    "ResNetV2": ("resnetv2_50", "stem stages norm head", {"channels": (16, 32, 64, 64), "stem_chs": 16}),
    "MetaFormer": ("poolformerv2_s12", "stem stages head", {}),
    "Inception-NeXt": ("inception_next_atto", "stem stages head", {}),
}


def local(layers, rule=None, modules=None, size=32, **options):
    rule = AugLocal(3, 0.0, joint_tail=False) if rule is None else rule
    return LocalSequential(layers, rule, 4, (3, size, size), modules, **options)


def layout(name):
    return "class_token" if "ViT" in name or name == "TransformerEncoderLayer" else None


def spoil(layers):
    """Not a number for all that training may change."""
    for module in layers.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data.fill_(math.nan)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.fill_(math.nan)
            module.running_var.fill_(math.nan)
            module.num_batches_tracked.fill_(7)
    return layers


def storages(module):
    return {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}


def check(make, **options):
    """Auxiliary networks of copies train, apart from the network, and have no value of it."""
    made = []
    for source in (make(), spoil(make())):
        torch.manual_seed(3)
        made.append(local(source, **options))
    net, other = made
    assert_same_values(net, other)
    assert storages(net.auxiliary).isdisjoint(storages(net.primary))
    net.eval()
    for k, auxiliary in enumerate(net.auxiliary):
        h = torch.zeros(1, *net.network.last_layer(k).shape)
        for index, block in zip(net.rule.sampled(net.network, k), auxiliary.blocks, strict=True):
            taken = []
            copied = getattr(block, "layer", block)
            hook = copied.register_forward_pre_hook(lambda part, args, taken=taken: taken.append(args[0].shape[1:]))
            h = block(h)
            hook.remove()
            assert taken == [net.network.layers[index - 1].shape]  # as in the network
    net.train()
    assert_gradient_isolated(net, torch.randn(4, *net.network.input_shape), Y)
    return net


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    net = check(FAMILIES[name], layout=layout(name), modules=[0, 1, 2])
    assert not any(isinstance(block, models.BasicBlock | models.Bottleneck) for block in net.auxiliary.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_a_module_for_each_layer_and_other_heads(name):
    net = check(FAMILIES[name], layout=layout(name))
    assert net.num_modules == len(net.network.layers)
    x = torch.randn(4, 3, 32, 32)
    for sampling in ("sequential", "repeated"):
        again = local(FAMILIES[name](), AugLocal(3, joint_tail=False, sampling=sampling), [1], layout=layout(name))
        again(x, Y).loss.backward()
    head = "0c2f" if layout(name) else "1c2f"
    local(FAMILIES[name](), AugLocal(2, joint_tail=False, head=head), 2, layout=layout(name))(x, Y).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    check(lambda: timm_model(*TIMM[name]), size=64, modules=3)


def test_stochastic_depth_and_dropout_are_kept():
    for make, kind in ((convnext, "StochasticDepth"), (vit, "Dropout")):
        auxiliary = local(make(), modules=[0], layout=layout("ViT") if make is vit else None).auxiliary
        assert {part.p for part in auxiliary.modules() if eager_type(part).__name__ == kind} == {0.1}


def test_recomputed_copies_train_as_others():
    gradients = []
    for recompute in ("none", "auxiliary"):
        torch.manual_seed(0)
        net = local(pre_activation(), modules=2, recompute=recompute)
        net(torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32), Y).loss.backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_float64_fake_meta_and_deferred_networks():
    net = local(pre_activation().double(), modules=2)
    assert {parameter.dtype for parameter in net.auxiliary.parameters()} == {torch.float64}
    shapes = [parameter.shape for parameter in net.parameters()]
    with FakeTensorMode():
        assert [parameter.shape for parameter in local(pre_activation(), modules=2).parameters()] == shapes
    with torch.device("meta"):
        assert [parameter.shape for parameter in local(pre_activation(), modules=2).parameters()] == shapes
    with deferred(0):
        net = local(pre_activation(), modules=2)
    net.materialise("cpu")
    assert not any(tensor.isnan().any() for tensor in net.auxiliary.state_dict().values())
    net(torch.randn(4, 3, 32, 32), Y).loss.backward()


def test_networks_of_known_forms_have_no_copies():
    layers = models.resnet_cifar(8, num_classes=4, width=8)
    net = local(layers, AugLocal(2, joint_tail=False))
    assert not net.rule._copies(net.network)
    layers[2] = PreActivation(8, 16, 2)
    net = local(layers, AugLocal(2, joint_tail=False))
    assert net.rule._copies(net.network)


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        (((8, 8, 1), (8, 16, 2), (16, 32, 2)), False),
        (((8, 8, 1), (8, 8, 2), (8, 16, 2)), True),  # halves its map without a wider map
        (((8, 16, 1), (16, 16, 1), (16, 32, 2)), True),  # a wider map of the same size
    ],
)
def test_residual_blocks_are_copied_where_widths_do_not_tell_strides(sizes, copies):
    layers = ended(sizes[-1][1], stem(8), *(models.BasicBlock(*size) for size in sizes))
    net = local(layers)
    assert net.rule._copies(net.network) == copies
    h = net.auxiliary[0].blocks.eval()(torch.zeros(1, 8, 16, 16))
    assert h.shape[1:] == net.network.layers[-1].inside.shape
    net.train()(torch.randn(4, 3, 32, 32), Y).loss.backward()
    assert not local(layers, AugLocal(3, joint_tail=False, sampling="repeated")).rule._copies(net.network)


def test_copies_behind_other_rules():
    inner = AugLocal(2, joint_tail=False)
    for rule in (MAN(head=inner), InfoPro((1, 1), (1, 1), head=inner), ContSup("R1E", head=inner), PredSim(head=inner)):
        local(pre_activation(), rule, [0])(torch.randn(4, 3, 32, 32), Y).loss.backward()


class Reaching(nn.Module):
    """Has a function that closes over its weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.run = lambda x: self.conv(x)

    def forward(self, x):
        return self.run(x)


def test_a_layer_that_reaches_its_weights_by_a_closure_is_refused():
    with pytest.raises(ValueError, match=r"layer 1 \(Reaching\) holds a function or an object with parameters"):
        local(ended(8, stem(8), Reaching(), Reaching()), AugLocal(2, joint_tail=False, sampling="sequential"), [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsampling": False}, "leave out downsampling=False with sampling='uniform'"),
        ({"sampling": "repeated", "downsampling": True}, "leave out downsampling=True with sampling='repeated'"),
    ],
)
def test_copies_have_the_width_and_stride_of_their_layers(options, message):
    with pytest.raises(ValueError, match=message):
        local(pre_activation(), AugLocal(2, joint_tail=False, **options), 2)


def test_the_first_layer_of_a_network_on_tokens_is_not_repeated():
    layers = nn.Sequential(nn.Embedding(10, 8), *encoder()[1:])
    options = {"example_input": torch.zeros(1, 5, dtype=torch.int64), "layout": "class_token"}
    rule = AugLocal(2, joint_tail=False, sampling="repeated")
    with pytest.raises(ValueError, match=r"cannot repeat layer 0 \(Embedding\).*torch.int64"):
        LocalSequential(layers, rule, 4, modules=[0], **options)
