"""Networks as ``nn.Sequential`` of their layers; convolutional ones split as AugLocal and ContSup split them.

The last child with parameters is the classifier, or readout, which belongs to the last local layer. ``build(name)``
makes a network by name; ``input_shape(name)`` is the image size it was designed for. ``network_by_name`` also makes
those of torchvision and timm. ``gpt`` makes decoders for language modelling.
"""

from .blocks import BasicBlock, Bottleneck, conv_bn_relu
from .catalogue import NAMES, build, input_shape, resnet8, resnet20, resnet32, resnet56, resnet110
from .fused import FusedBasicBlock, FusedBottleneck
from .gpt import DecoderBlock, gpt
from .named import check_name, default_classes, default_input_shape, is_segmentation, network_by_name
from .resnet import resnet18, resnet34, resnet50, resnet101, resnet_cifar
from .torchvision_weights import from_torchvision
from .vgg import vgg13, vgg19
from .vit import EncoderBlock, vit, vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_s_16, vit_t_16

__all__ = [
    "NAMES",
    "BasicBlock",
    "Bottleneck",
    "DecoderBlock",
    "EncoderBlock",
    "FusedBasicBlock",
    "FusedBottleneck",
    "build",
    "check_name",
    "conv_bn_relu",
    "default_classes",
    "default_input_shape",
    "from_torchvision",
    "gpt",
    "input_shape",
    "is_segmentation",
    "network_by_name",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet_cifar",
    "vgg13",
    "vgg19",
    "vit",
    "vit_b_16",
    "vit_b_32",
    "vit_l_16",
    "vit_l_32",
    "vit_s_16",
    "vit_t_16",
]
