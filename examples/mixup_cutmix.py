"""Mixup and CutMix by torchvision: the targets are then class probabilities, which the local losses take as they are.

`--data DIR` holds `train/<class>/*` (see cifar10_folder.py).
"""

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from auglocal_ext import AugLocal, LocalSequential, LocalStep, models


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with train/<class>/*")
    parser.add_argument("--network", default="resnet32", help="resnet8, 20, 32, 56 or 110")
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    normalize = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *tensor])
    try:
        train = ImageFolder(f"{args.data}/train", augment)
    except FileNotFoundError as error:
        parser.error(f"--data {args.data}: {error}")
    classes = len(train.classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])
    batches = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)

    layers = models.build(args.network, num_classes=classes)
    net = LocalSequential(layers, AugLocal(depth=3), num_classes=classes, input_shape=(3, 32, 32)).to(device)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizer, args.epochs)

    for epoch in range(args.epochs):
        for x, y in batches:
            x, y = mix(x.to(device), y.to(device))  # y is now (N, classes), a row of probabilities for each image
            out = step(x, y)
        scheduler.step()
        losses = " ".join(f"{loss:.3f}" for loss in out.module_losses.tolist())
        print(f"epoch {epoch}: local losses {losses}")
    torch.save(net.state_dict(), "mixup.pt")


if __name__ == "__main__":
    main()
