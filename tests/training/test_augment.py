"""Batched augmentation against the same thing done to one image after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from auglocal_ext.training.config.recipes import RECIPES
from auglocal_ext.training.data.augment import Augmentation, Draw, channel_constants, crop_and_flip, draw, normalise


def one_image(image, top, left, mirrored, augmentation):
    """Pad, cut out, mirror, the way it is described."""
    height, width = image.shape[1:]
    p = augmentation.padding
    mode = "reflect" if augmentation.padding_mode == "reflect" else "constant"
    padded = F.pad(image.double()[None], (p, p, p, p), mode=mode)[0]
    cut = padded[:, top : top + height, left : left + width]
    return (cut.flip(-1) if mirrored else cut).to(image.dtype)


@pytest.mark.parametrize("recipe", ["cifar10", "svhn", "stl10", "imagenet"])
@pytest.mark.parametrize("size", [(9, 9), (8, 11)])
def test_batched_equals_per_image(recipe, size):
    augmentation = RECIPES[recipe].augmentation
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (20, 3, *size), generator=generator, dtype=torch.uint8)
    picked = torch.randperm(20, generator=generator)[:15]
    choice = draw(15, augmentation, generator)
    batch = crop_and_flip(images, picked, choice, augmentation)
    assert batch.dtype == torch.uint8
    for i in range(15):
        expected = one_image(
            images[picked[i]], int(choice.top[i]), int(choice.left[i]), bool(choice.mirrored[i]), augmentation
        )
        assert torch.equal(batch[i], expected), i


def test_every_corner_of_the_padded_image_is_reached():
    augmentation = RECIPES["cifar10"].augmentation
    images = torch.randint(0, 256, (1, 3, 6, 6), dtype=torch.uint8)
    tops, lefts = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    for mirrored in (False, True):
        choice = Draw(tops.flatten(), lefts.flatten(), torch.full((81,), mirrored))
        batch = crop_and_flip(images, torch.zeros(81, dtype=torch.int64), choice, augmentation)
        for i in range(81):
            expected = one_image(images[0], i // 9, i % 9, mirrored, augmentation)
            assert torch.equal(batch[i], expected), (i, mirrored)


def test_images_of_a_batch_are_drawn_independently_and_uniformly():
    choice = draw(18_000, RECIPES["cifar10"].augmentation, torch.Generator().manual_seed(3))
    for offsets in (choice.top, choice.left):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9  # 0 .. 2 * padding
        assert (counts - 2000).abs().max() < 250  # over five standard deviations
    assert abs(choice.mirrored.float().mean() - 0.5) < 0.02
    assert torch.corrcoef(torch.stack([choice.top, choice.left]).float())[0, 1].abs() < 0.05


def test_svhn_digits_are_never_mirrored():
    assert not draw(1000, RECIPES["svhn"].augmentation, torch.Generator().manual_seed(0)).mirrored.any()


def test_a_restored_generator_repeats_the_choices():
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    first = draw(50, RECIPES["stl10"].augmentation, generator)
    generator.set_state(state)
    second = draw(50, RECIPES["stl10"].augmentation, generator)
    assert torch.equal(first.top, second.top) and torch.equal(first.mirrored, second.mirrored)


def test_normalise_uses_the_table_of_the_recipe():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    augmentation = RECIPES["cifar10"].augmentation
    mean, std = channel_constants(augmentation, torch.device("cpu"))
    out = normalise(images, mean, std, channels_last=True)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.float32
    for channel, (m, s) in enumerate([(125.3, 63.0), (123.0, 62.1), (113.9, 66.7)]):
        torch.testing.assert_close(out[:, channel], (images[:, channel].float() / 255 - m / 255) / (s / 255))


def test_images_too_small_to_reflect_are_refused():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    augmentation = RECIPES["cifar10"].augmentation
    with pytest.raises(ValueError, match="reflect padding by 4 .* 4 x 4"):
        crop_and_flip(images, torch.tensor([0]), draw(1, augmentation, torch.Generator()), augmentation)


@pytest.mark.parametrize("wrong", [{"padding_mode": "wrap"}, {"padding": -1}])
def test_wrong_augmentation_is_refused(wrong):
    values = {"padding": 1, "padding_mode": "zero", "flip": True, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    with pytest.raises(ValueError, match="padding"):
        Augmentation(**{**values, **wrong})
