"""Export a trained network to ONNX and compare it with PyTorch. Needs the packages onnx and onnxscript.

`net.export()` is the plain network for inference: no auxiliary networks, and for ContSup with its context encoders.
"""

import argparse

import numpy
import torch
from onnx.reference import ReferenceEvaluator

from auglocal_ext import ContSup, LocalSequential, models

try:
    import onnxruntime
except ImportError:  # the evaluator of onnx itself is slow, but enough to compare
    onnxruntime = None

parser = argparse.ArgumentParser()
parser.add_argument("--network", default="resnet32")
parser.add_argument("--weights", help="state dict of the LocalSequential; random weights without it")
parser.add_argument("--output", default="network.onnx")
args = parser.parse_args()

net = LocalSequential(models.build(args.network), ContSup("R1E"), num_classes=10, input_shape=(3, 32, 32), modules=4)
if args.weights:
    net.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))

plain = net.export()  # a copy, in eval mode
x = torch.randn(2, 3, 32, 32)
batch = torch.export.Dim("batch")
torch.onnx.export(plain, (x,), args.output, input_names=["x"], dynamic_shapes=({0: batch},), verbose=False)

x = torch.randn(5, 3, 32, 32)  # another batch size
with torch.inference_mode():
    expected = plain(x).numpy()
if onnxruntime:
    (found,) = onnxruntime.InferenceSession(args.output).run(None, {"x": x.numpy()})
else:
    (found,) = ReferenceEvaluator(args.output).run(None, {"x": x.numpy()})
print(f"{args.output}: largest difference {numpy.abs(found - expected).max():.2e}")
assert numpy.allclose(found, expected, rtol=1e-3, atol=1e-5)
