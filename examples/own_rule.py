"""A learning rule of your own: each module is trained through a fixed random classifier.

    CE(W mean_p(h) + b, y),    W, b drawn once and never trained

So only the network itself is trained (Mostafa, Ramesh and Cauwenberghs, Deep Supervised Learning Using Local Errors,
Frontiers in Neuroscience 2018). The images are noise, and those of class 1 are brighter.
"""

from dataclasses import dataclass

import torch

from auglocal_ext import LocalSequential, LocalStep, Rule, models
from auglocal_ext.rules import Head, head_option, option, resolved


@dataclass(frozen=True)
class FixedHeads(Rule):
    """Fields are the rule's options, checked when it is made."""

    name = "fixed"

    gain: float = option(1.0, "factor of the random weights")
    head: Head = head_option("linear")

    def __post_init__(self):
        if not self.gain > 0:
            raise ValueError(f"gain must be positive; got {self.gain!r}")
        resolved(self.head)  # raises for an unknown head

    def build_auxiliary(self, network, module):
        """Auxiliary network of local module `module`, with the loss of the network's task."""
        auxiliary = resolved(self.head).build_auxiliary(network, module)
        for parameter in auxiliary.parameters():
            parameter.data.mul_(self.gain)
            parameter.requires_grad_(False)
        return auxiliary


torch.manual_seed(0)
y = torch.randint(0, 2, (128,))
x = torch.randn(128, 3, 32, 32) + y.view(-1, 1, 1, 1)
net = LocalSequential(models.resnet8(num_classes=2), FixedHeads(gain=2.0), num_classes=2, input_shape=(3, 32, 32))
step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
for i in range(5):
    out = step(x, y)
    print(f"step {i}: local losses {[round(loss, 3) for loss in out.module_losses.tolist()]}")
