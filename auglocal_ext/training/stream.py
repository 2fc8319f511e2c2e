"""Batches read from image files: cropped, flipped, resized by worker processes, normalised on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import Augmentation, channel_constants, normalise
from .data import ImageFiles
from .folder import FileList, read_image
from .interrupt import ignore_interrupts
from .order import epoch_order, mixed_seed, steps_per_epoch
from .torchvision_files import import_torchvision


class _Files(Dataset):
    """Item ``(index, seed)``: the image through ``transform``, whose random choices depend on the seed alone.

    So an image's crop is the same in whichever worker it is read, and an epoch can be taken up in its middle.
    """

    def __init__(self, files: FileList, transform: torch.nn.Module):
        self.files, self.transform = files, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = item
        image = read_image(self.files.paths[index])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), self.files.labels[index]


class StreamedBatches:
    """Train: RandomResizedCrop and flip; test: shorter side to 256/224 of the image size, centre crop."""

    def __init__(
        self,
        data: ImageFiles,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        channels_last: bool = False,
        workers: int = 0,
    ):
        import_torchvision()
        from torchvision import transforms

        size = data.image_size
        self.steps = steps_per_epoch(data.train_count, batch_size)
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._channels_last, self._workers = channels_last, workers
        self._mean, self._std = channel_constants(augmentation, device)
        shrink = transforms.Compose(
            [transforms.RandomResizedCrop(size, antialias=True), transforms.RandomHorizontalFlip()]
        )
        centre = transforms.Compose(
            [transforms.Resize(round(size * 256 / 224), antialias=True), transforms.CenterCrop(size)]
        )
        self._train, self._test = _Files(data.train, shrink), _Files(data.test, centre)

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self._train.files.paths), self._seed, epoch).tolist()
        items = [(index, mixed_seed(self._seed, epoch, index)) for index in order]
        yield from self._load(self._train, items[first * self._batch_size : self.steps * self._batch_size])

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._load(self._test, [(index, 0) for index in range(len(self._test.files.paths))])

    def _load(self, files: _Files, items: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            files,
            batch_size=self._batch_size,
            sampler=items,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=ignore_interrupts,
            # The loader draws a seed for its workers; not from the global state, which a checkpoint holds.
            generator=torch.Generator(),
        )
        for images, labels in loader:
            batch = images.to(self._device, non_blocking=True)
            yield (
                normalise(batch, self._mean, self._std, channels_last=self._channels_last),
                labels.to(self._device, non_blocking=True),
            )

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore: every choice follows from seed, epoch and image."""
