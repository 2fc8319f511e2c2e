"""Local learning in Lightning: manual optimization, whose steps are those of LocalStep.

Trains on random images. `--resume FILE` goes on from a checkpoint, with the optimizer's state.
"""

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from auglocal_ext import AugLocal, LocalSequential, LocalStep, models


class LocalLearner(lightning.LightningModule):
    def __init__(self, accumulate=1):
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.net = LocalSequential(models.resnet8(), AugLocal(depth=2), num_classes=10, input_shape=(3, 32, 32))

    def configure_optimizers(self):
        options = {"accumulate": self.accumulate, "clip_norm": 5.0}
        self.step = LocalStep(self.net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), **options)
        steps = self.trainer.estimated_stepping_batches
        return [self.step.optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(self.step.optimizer, steps)]

    def training_step(self, batch, batch_idx):
        out = self.step(*batch)
        if self.step.updated:
            self.optimizers().step()  # changes nothing; Lightning counts it for max_steps and checkpoints
            self.lr_schedulers().step()
        self.log("loss", out.loss, prog_bar=True)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())


parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=2048)
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--checkpoint-every", type=int, default=20)
parser.add_argument("--output", default="lightning_run")
parser.add_argument("--resume")
args = parser.parse_args()

lightning.seed_everything(0)
data = TensorDataset(torch.randn(args.images, 3, 32, 32), torch.randint(0, 10, (args.images,)))
checkpoints = ModelCheckpoint(every_n_train_steps=args.checkpoint_every, save_top_k=-1)
trainer = lightning.Trainer(max_steps=args.max_steps, default_root_dir=args.output, callbacks=[checkpoints])
trainer.fit(LocalLearner(), DataLoader(data, 64), DataLoader(data, 64), ckpt_path=args.resume)
print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss']:.3f}, saved {checkpoints.best_model_path}")
