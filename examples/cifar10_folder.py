"""Train a CIFAR-10 ResNet by AugLocal in a loop of your own, on images in folders.

`--data DIR` holds `train/<class>/*` and `test/<class>/*`. This writes CIFAR-10 like that:

    for split in ("train", "test"):
        images = torchvision.datasets.CIFAR10("raw", train=split == "train", download=True)
        for i, (image, label) in enumerate(images):
            folder = Path("cifar10", split, images.classes[label])
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:05}.png")
"""

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from auglocal_ext import AugLocal, LocalSequential, LocalStep, models


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--network", default="resnet32", help="resnet8, 20, 32, 56 or 110")
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", default="cifar10.pt")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tensor = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    train = ImageFolder(f"{args.data}/train", transforms.Compose([*augment, *tensor]))
    test = ImageFolder(f"{args.data}/test", transforms.Compose(tensor))
    batches = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    test_batches = DataLoader(test, 500, num_workers=args.workers)

    classes = len(train.classes)
    layers = models.build(args.network, num_classes=classes)
    net = LocalSequential(layers, AugLocal(depth=3), num_classes=classes, input_shape=(3, 32, 32)).to(device)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizer, args.epochs)

    for epoch in range(args.epochs):
        net.train()
        loss = sum(step(x.to(device), y.to(device)).loss for x, y in batches) / len(batches)
        scheduler.step()
        net.eval()
        with torch.inference_mode():
            hits = sum((net(x.to(device)).argmax(1).cpu() == y).sum() for x, y in test_batches)
        print(f"epoch {epoch}: sum of local losses {loss:.3f}, test accuracy {100 * hits / len(test):.2f} %")
        state = {"net": net.state_dict(), "step": step.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(state, args.output)


if __name__ == "__main__":
    main()
