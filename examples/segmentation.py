"""Segmentation of made-up shapes: every local module learns a class for each pixel.

Each image holds a disc (class 1) and a square (class 2) on noise. Outlines are ignored, as in many data sets. The
network is any nn.Sequential whose output is (N, classes, H, W).
"""

import argparse

import torch
from torch import nn

from auglocal_ext import AugLocal, LocalSequential, LocalStep, Segmentation, models

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=150)
SIZE, CLASSES, IGNORED = 24, 3, 255


def shapes(count, generator):
    """Images (count, 3, SIZE, SIZE) and masks (count, SIZE, SIZE)."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for image, mask in zip(images, masks, strict=True):
        for label in (1, 2):
            row, column = torch.randint(5, SIZE - 5, (2,), generator=generator)
            down, right = (rows - row).abs(), (columns - column).abs()
            distance = (down**2 + right**2).sqrt() if label == 1 else torch.maximum(down, right).float()
            image += 1.0 * (distance <= 4)
            mask[distance <= 4] = label
            mask[(distance > 3.5) & (distance < 4.5)] = IGNORED
    return images, masks


torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
layers = nn.Sequential(
    models.conv_bn_relu(3, 8),
    models.BasicBlock(8, 8),
    models.BasicBlock(8, 16, stride=2),
    models.BasicBlock(16, 16),
    nn.Conv2d(16, CLASSES, 1),
    nn.Upsample(scale_factor=2, mode="bilinear"),
)
task = Segmentation(CLASSES, ignore_index=IGNORED)
net = LocalSequential(layers, AugLocal(depth=2), task=task, input_shape=(3, SIZE, SIZE))
step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))

for i in range(parser.parse_args().steps):
    out = step(*shapes(16, generator))
    if i % 50 == 49:
        print(f"step {i + 1}: local losses {[round(loss, 3) for loss in out.module_losses.tolist()]}")

net.eval()
counts = counted = 0
for _ in range(4):  # counts add up over batches
    x, y = shapes(16, generator)
    with torch.no_grad():
        counts, counted = counts + net(x, y).module_counts, counted + task.counted(y)
print("mIoU of each local module:", " ".join(f"{score:.2f}" for score in task.measure(counts, counted)))
