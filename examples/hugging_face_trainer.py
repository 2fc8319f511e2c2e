"""Local learning in the Trainer of Hugging Face: a module whose forward takes labels and returns loss and logits.

Trains on random images. `--resume` goes on from the last checkpoint in `--output`.
"""

import argparse

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from auglocal_ext import AugLocal, LocalSequential, models


class LocalClassifier(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        if not self.training:
            output = {"logits": self.net(pixel_values)}
            return output if labels is None else {"loss": self.net.task.loss(output["logits"], labels), **output}
        if labels is None:  # TrainingArguments(label_smoothing_factor=) takes them out of the batch
            raise ValueError("local losses need labels; smooth them by LocalSequential(label_smoothing=)")
        out = self.net(pixel_values, labels)
        return {"loss": out.loss, "logits": out.logits}


def random_images(n):
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(0, 10, ()).item()} for _ in range(n)]


parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=2048)
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--output", default="trainer_run")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
net = LocalSequential(models.resnet8(), AugLocal(2), num_classes=10, input_shape=(3, 32, 32), label_smoothing=0.1)
arguments = TrainingArguments(
    args.output,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=32,
    gradient_accumulation_steps=2,
    eval_strategy="epoch",
    save_strategy="epoch",
)
trainer = Trainer(
    LocalClassifier(net),
    arguments,
    train_dataset=random_images(args.images),
    eval_dataset=random_images(256),
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
)
trainer.train(resume_from_checkpoint=args.resume)
print(trainer.evaluate())
trainer.save_model(f"{args.output}/model")
