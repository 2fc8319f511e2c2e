"""Local learning in Accelerate: the loop of any network, with `net(x, y)` in the place of forward pass and loss.

Trains on random images, in one process or, by `accelerate launch`, in several.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from auglocal_ext import AugLocal, LocalSequential, models

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=2048)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--output", default="accelerate_run")
args = parser.parse_args()

set_seed(0)
accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate)
data = TensorDataset(torch.randn(args.images, 3, 32, 32), torch.randint(0, 10, (args.images,)))
net = LocalSequential(models.resnet8(), AugLocal(depth=2), num_classes=10, input_shape=(3, 32, 32))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=100)
net, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, scheduler, DataLoader(data, 64, shuffle=True))

for epoch in range(args.epochs):
    net.train()
    for x, y in loader:
        with accelerator.accumulate(net):
            out = net(x, y, grad_scaler=accelerator.scaler)  # the scaler is None but for fp16
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    net.eval()
    with torch.inference_mode():
        hits = [accelerator.gather_for_metrics(net(x).argmax(1) == y) for x, y in loader]
    accuracy = 100 * torch.cat(hits).float().mean()
    accelerator.print(f"epoch {epoch}: loss {out.loss.item():.3f}, accuracy on the training images {accuracy:.1f} %")

accelerator.save_state(args.output)  # network, optimizer, scheduler, scaler and random states
accelerator.save(accelerator.unwrap_model(net).primary.state_dict(), f"{args.output}/primary.pt")
