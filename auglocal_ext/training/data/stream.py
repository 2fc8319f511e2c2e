"""Batches read from image files: cropped, flipped, resized by worker processes, normalised on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import DataError, WorkerError
from ..interrupt import ignore_interrupts
from .augment import Augmentation, channel_constants, normalise
from .datasets import ImageFiles, MaskFiles
from .folder import FileList, read_image
from .joint_crop import JointCrop
from .mask_file import read_mask
from .mask_pairs import PairList
from .order import WHOLE, Part, epoch_order, mixed_seed, steps_per_epoch
from .torchvision_files import import_torchvision

_Splits = dict[str, tuple[FileList | PairList, Callable[..., Any]]]

MASK_SCALES = (0.5, 2.0)
"""Of an image with a mask in training: InfoPro's on Cityscapes, and torchvision's."""

COPIES_AHEAD = 4
"""Batches whose copy to the GPU may be pending; a host far ahead of the GPU would fill its memory with pinned ones."""


class _Files(Dataset):
    """Item ``(split, index, seed)``: an image through its split's transform, whose random choices depend on the seed.

    So an image's crop is the same in whichever worker it is read, and an epoch can be taken up in its middle.
    """

    def __init__(self, splits: _Splits):
        self._splits = splits

    def __getitem__(self, item: tuple[str, int, int]) -> tuple[Tensor, Tensor] | str:
        """The image and its label, or why it cannot be read: an error raised in a worker comes with its traceback."""
        split, index, seed = item
        files, transform = self._splits[split]
        try:
            image = read_image(files.paths[index])
            target = read_mask(files.masks[index]) if isinstance(files, PairList) else files.labels[index]
        except DataError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return transform(image, target) if isinstance(files, PairList) else (transform(image), target)


def _next(loaded: Iterator[Any]) -> Any:
    """The next batch, None after the last; WorkerError if a process that reads images was killed."""
    try:
        return next(loaded, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"a process that reads images was killed ({str(error).splitlines()[0]}): if memory has run out, take fewer "
            "--workers"
        ) from error


def _batch(items: list[tuple[Tensor, Tensor] | str]) -> Any:
    """Images and labels as tensors, or the first error."""
    return next((item for item in items if isinstance(item, str)), None) or default_collate(items)


def _of_classes(data: ImageFiles) -> _Splits:
    import_torchvision()
    from torchvision import transforms

    size = data.image_size
    shrink = transforms.Compose([transforms.RandomResizedCrop(size, antialias=True), transforms.RandomHorizontalFlip()])
    centre = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224), antialias=True), transforms.CenterCrop(size)]
    )
    return {"train": (data.train, shrink), "test": (data.test, centre)}


def _with_masks(data: MaskFiles, augmentation: Augmentation) -> _Splits:
    size, mean = data.image_size, augmentation.mean
    train = JointCrop(size, mean, MASK_SCALES, augmentation.flip)
    return {"train": (data.train, train), "test": (data.test, JointCrop(size, mean))}


class StreamedBatches:
    """Train: RandomResizedCrop and flip; test: shorter side to 256/224 of the image size, centre crop.

    Images with masks: a crop at a random scale and a flip; test: the whole image, its longer side resized to the image
    size (:class:`auglocal_ext.training.data.joint_crop.JointCrop`).

    One set of worker processes serves both splits in every epoch, so only one pass may be under way at a time.
    """

    def __init__(
        self,
        data: ImageFiles | MaskFiles,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        channels_last: bool = False,
        workers: int = 0,
        part: Part = WHOLE,
    ):
        self.steps = steps_per_epoch(data.train_count, batch_size, part.count)
        self._part = part
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._channels_last = channels_last
        self._mean, self._std = channel_constants(augmentation, device)
        self._counts = {"train": data.train_count, "test": data.test_count}
        self._batches: list[list[tuple[str, int, int]]] = []
        self._loader = DataLoader(
            _Files(_with_masks(data, augmentation) if isinstance(data, MaskFiles) else _of_classes(data)),
            batch_sampler=self._batches,
            collate_fn=_batch,
            num_workers=workers,
            persistent_workers=workers > 0,  # starting them takes tens of milliseconds each
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_interrupts,
            # The loader draws a seed for its workers; not from the global state, which a checkpoint holds.
            generator=torch.Generator(),
        )

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(self._counts["train"], self._seed, epoch).tolist()
        items = [("train", index, mixed_seed(self._seed, epoch, index)) for index in order]
        starts = range(first * self._batch_size, min(self.steps * self._batch_size, len(items)), self._batch_size)
        batches = [items[start : start + self._batch_size] for start in starts]
        yield from self._load([self._part_of(batch) for batch in batches])

    def _part_of(self, batch: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        places = self._part.train(len(batch))
        return batch[places] if isinstance(places, slice) else [batch[place] for place in places]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._part.test(self._counts["test"], self._batch_size)
        yield from self._load([[("test", index, 0) for index in range(b.start, b.stop)] for b in batches])

    def _load(self, batches: list[list[tuple[str, int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        self._batches[:] = batches
        pending: deque[torch.cuda.Event] = deque()
        loaded = iter(self._loader)
        while (batch := _next(loaded)) is not None:
            if isinstance(batch, str):
                raise DataError(batch)
            images, labels = batch
            yield self._to_device(images, labels, pending)

    def _to_device(self, images: Tensor, labels: Tensor, pending: deque[torch.cuda.Event]) -> tuple[Tensor, Tensor]:
        images = images.to(self._device, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True).long()
        if images.is_cuda:
            copied = torch.cuda.Event(blocking=True)
            copied.record(torch.cuda.current_stream(self._device))
            pending.append(copied)
            if len(pending) > COPIES_AHEAD:
                pending.popleft().synchronize()
        return normalise(images, self._mean, self._std, channels_last=self._channels_last), labels

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore: every choice follows from seed, epoch and image."""
