"""Segmentation: a class for every pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.features import Features
from ..ops import labels
from .base import Scored, Task, check_samples, wide
from .classification import check_options

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Segmentation(Task):
    """``CE(output, y)`` per pixel: the mean cross-entropy over the pixels that count, of ``(N, num_classes, h, w)``.

    Targets are class indices ``(N, H, W)``, integers. Logits of another height and width are resized to ``(H, W)``
    before the loss, bilinearly, without aligned corners. That holds for auxiliary networks, whose logits have the
    resolution of their features, and for the network's own output. A batch in which every pixel is ignored has the
    loss 0 and zero gradients.

    Intersection and union of each class are counted; the metric is their mean ratio (mIoU) over the classes that occur
    in predictions or targets.

    Args:
        num_classes: C, at least 2.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        ignore_index: label of pixels that count nowhere.
        upsample: False compares logits with the target at the logits' resolution instead: each takes the label of the
            pixel at its centre. Loss and counts are then over those positions. It needs less memory, most of all where
            features are small.

    Raises:
        ValueError: for an option out of range.

    Source: the local head and loss of InfoPro on Cityscapes (Wang et al., ICLR 2021), whose released code aligns
    corners.
    """

    metric = "mIoU"
    dense = True

    def __init__(
        self, num_classes: int, *, label_smoothing: float = 0.0, ignore_index: int = 255, upsample: bool = True
    ) -> None:
        super().__init__(num_classes)
        check_options(self.outputs, label_smoothing, ignore_index, "an object and its background are two classes")
        if ignore_index == 255 < self.outputs:
            raise ValueError(
                f"ignore_index=255 is one of the {self.outputs} classes, which would count nowhere; choose another, "
                "such as -100"
            )
        self.count_shape = (2, self.outputs)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.upsample = upsample

    @property
    def num_classes(self) -> int:
        """C."""
        return self.outputs

    @property
    def expected_output(self) -> str:
        return (
            f"(N, num_classes, H, W) = (N, {self.outputs}, H, W): logits for every pixel, or for positions that are "
            "resized to the target's"
        )

    def check_output(self, shape: tuple[int, ...], whose: str) -> None:
        if len(shape) != 3 or shape[0] != self.outputs:
            found = ", ".join(["N", *map(str, shape)])
            raise ValueError(f"{whose} has shape ({found}), expected {self.expected_output}")

    def check_form(self, target: Tensor, samples: int) -> None:
        check_samples(target, samples)
        expected = f"class indices ({samples}, H, W), integers"
        found = f"got {tuple(target.shape)} in {target.dtype}"
        if target.dim() != 3:
            hint = "expected one class per pixel"
            if target.dim() == 4 and target.shape[1] == 1:
                hint = "leave the channel out with target.squeeze(1)"
            elif target.dim() == 4:
                hint = "of one-hot or probability maps take target.argmax(1); colours of a palette are no class indices"
            raise ValueError(f"expected {expected}; {found}: {hint}")
        if target.dtype not in _INTEGERS:
            raise TypeError(f"expected {expected}; {found}: convert class indices with target.long()")
        if target.numel() == 0:
            raise ValueError(f"expected {expected}; {found}: there are no pixels")

    def invalid(self, target: Tensor) -> Tensor:
        return labels.bad_labels(target.long(), self.outputs, self.ignore_index)

    def complaint(self, target: Tensor, invalid: Tensor) -> str:
        index = tuple(invalid.nonzero()[0].tolist())
        return (
            f"label {int(target[index])} at (sample, row, column) {index} is out of range: expected "
            f"{labels.expected(self.outputs, self.ignore_index)}; {int(invalid.sum())} of {target.numel()} pixels are "
            "wrong. Check num_classes, ignore_index and the data set's numbering"
        )

    def late_complaint(self, count: int) -> str:
        return (
            f"{count} pixels of earlier batches were out of range: expected "
            f"{labels.expected(self.outputs, self.ignore_index)}. They were treated as ignored. Check num_classes, "
            "ignore_index and the data set's numbering; checking one batch on the CPU names the pixel"
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output, target = self._aligned(output, target)
        total = F.cross_entropy(
            output, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (target != self.ignore_index).sum().clamp(min=1)

    def count(self, output: Tensor, target: Tensor) -> Tensor:
        """``(2, C)``, int64: pixels in the intersection, and in the union, of prediction and target of each class."""
        output, target = self._aligned(output, target)
        found, counts = output.argmax(1), target != self.ignore_index
        right = self._pixels(target, counts & (found == target))
        union = self._pixels(found, counts) + self._pixels(target, counts) - right
        return torch.stack([right, union])

    def _pixels(self, classes: Tensor, counts: Tensor) -> Tensor:
        """Number of pixels of each class ``(C,)``, of those that count."""
        # bincount would wait for the device. What does not count goes into a bin of its own.
        bins = torch.where(counts, classes, self.outputs).flatten()
        found = torch.zeros(self.outputs + 1, dtype=torch.int64, device=bins.device)
        return found.scatter_add_(0, bins, found.new_ones(()).expand(bins.shape))[:-1]

    def counted(self, target: Tensor) -> Tensor:
        """Number of pixels that are not ignored."""
        return (target.long() != self.ignore_index).sum()

    def measure(self, counts: Tensor, counted: Tensor | float) -> Tensor:
        """Mean intersection over union of ``counts`` ``(*, 2, C)``; nan where no class occurs."""
        right, union = counts.double().unbind(-2)
        return torch.where(union > 0, right / union, torch.nan).nanmean(-1)

    def pixel_accuracy(self, counts: Tensor, counted: Tensor | float) -> Tensor:
        """Share of right pixels among those that count, of ``counts`` ``(*, 2, C)`` and :meth:`counted`; float64."""
        right = counts.double().select(-2, 0).sum(-1)
        return right / torch.as_tensor(counted, device=counts.device).clamp(min=1)

    def score(self, output: Tensor, target: Tensor) -> Scored:
        aligned, target = self._aligned(output, target)
        return Scored(self.loss(aligned, target), output.detach(), self.count(aligned.detach(), target))

    def _aligned(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Output and target of one height and width, in the loss's dtypes; labels out of range are ignored.

        What is aligned already stays as it is.
        """
        output, target = wide(output), target.long()
        if output.shape[2:] != target.shape[1:]:
            if self.upsample:
                output = F.interpolate(output, target.shape[1:], mode="bilinear", align_corners=False)
            else:
                pairs = zip(output.shape[2:], target.shape[1:], strict=True)
                rows, columns = (_centres(*sizes, target.device) for sizes in pairs)
                target = target[:, rows[:, None], columns]
        return output, labels.ignoring_bad_labels(target, self.outputs, self.ignore_index)

    def readout(self, x: Tensor, features: Features, linear: nn.Linear) -> Tensor:
        """``linear`` at every position: a 1x1 convolution ``(N, C', h, w) -> (N, num_classes, h, w)``."""
        if not features.is_2d:
            raise ValueError(
                f"{self} needs logits for every pixel, but the last layer of an auxiliary network here receives "
                f"{features}, not maps with height and width"
            )
        return F.conv2d(features.channels_first(x), linear.weight[:, :, None, None], linear.bias)

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        raise ValueError("targets of a segmentation have the height and width of the images: call example_for(...)")

    def example_for(self, inputs: Features | None, samples: int, device: torch.device | None = None) -> Tensor:
        """Targets of the images' height and width."""
        if inputs is None or not inputs.is_2d:
            raise ValueError(
                f"targets of a segmentation have the images' height and width, but the network's inputs are "
                f"{inputs or 'of an unknown layout'}"
            )
        return torch.zeros(samples, *inputs.positions, dtype=torch.int64, device=device)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.outputs}, label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"
            + ("" if self.upsample else ", upsample=False")
        )


def _centres(few: int, many: int, device: torch.device) -> Tensor:
    """Which of ``many`` pixels lie at the centres of ``few`` positions."""
    return (2 * torch.arange(few, device=device) + 1) * many // (2 * few)
