"""Fine-tune a ResNet-18 with torchvision's weights to the classes of an image folder.

`--data DIR` holds `train/<class>/*` and `test/<class>/*`. This writes the weights to a file:

    torch.save(torchvision.models.resnet18(weights="DEFAULT").state_dict(), "resnet18.pth")
"""

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from auglocal_ext import AugLocal, LocalSequential, LocalStep, models


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--weights", required=True, help="file with a state dict of torchvision's resnet18")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
    augment = v2.Compose([v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip(), *tensor])
    train = ImageFolder(f"{args.data}/train", augment)
    test = ImageFolder(f"{args.data}/test", v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size), *tensor]))
    batches = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    test_batches = DataLoader(test, args.batch_size, num_workers=args.workers)
    classes = len(train.classes)
    layers = models.resnet18(num_classes=classes)
    weights = torch.load(args.weights, map_location="cpu", weights_only=True)
    layers.load_state_dict(models.from_torchvision("resnet18", weights, num_classes=classes))  # with a new last layer
    shape = (3, args.size, args.size)
    net = LocalSequential(layers, AugLocal(depth=2), num_classes=classes, input_shape=shape, modules=4).to(device)

    # The new layers, the classifier and the auxiliary networks, learn faster than the pretrained ones.
    new = [*net.auxiliary.parameters(), *net.primary.classifier.parameters()]
    pretrained = [p for name, p in net.primary.named_parameters() if not name.startswith("classifier.")]
    groups = [{"params": new, "lr": 0.01}, {"params": pretrained, "lr": 0.001}]
    step = LocalStep(net, lambda groups: torch.optim.SGD(groups, momentum=0.9), params=groups)

    for epoch in range(args.epochs):
        net.train()
        loss = sum(step(x.to(device), y.to(device)).loss for x, y in batches) / len(batches)
        net.eval()
        with torch.inference_mode():
            found = [(net(x.to(device)).argmax(1).cpu() == y).sum() for x, y in test_batches]
        print(f"epoch {epoch}: sum of local losses {loss:.3f}, test accuracy {100 * sum(found) / len(test):.2f} %")
    torch.save(net.primary.state_dict(), "finetuned.pt")


if __name__ == "__main__":
    main()
