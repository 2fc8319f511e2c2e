"""Parts of batches: what replicas see together is what one process sees, to the bit."""

from __future__ import annotations

import pytest
import torch

from auglocal_ext.training import SettingsError, load_data
from auglocal_ext.training.data.augment import Augmentation
from auglocal_ext.training.data.batches import make_batches
from auglocal_ext.training.data.mixing import MixedBatches
from auglocal_ext.training.data.order import Part
from auglocal_ext.training.run.metrics import EpochSums, StepResult

AUGMENTATION = Augmentation(2, "reflect", True, (120.0, 121.0, 122.0), (60.0, 61.0, 62.0))


def batches(data, part, batch_size=12, mixed=False):
    source = make_batches(
        data, AUGMENTATION, batch_size=batch_size, seed=3, device=torch.device("cpu"), workers=0, part=part
    )
    return MixedBatches(source, 2, mixup=0.5, cutmix=1.0, seed=3, led=part.led) if mixed else source


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "files"])
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("replicas", [2, 3])
def test_parts_make_up_the_batches_of_one_process(image_folder, replicas, mixed, streamed):
    root = image_folder(train=15, test=7, size=(8, 8))
    data = load_data(root, image_size=10 if streamed else None, workers=0, progress=False)
    parts = [batches(data, Part(index, replicas, mixed), mixed=mixed) for index in range(replicas)]
    one = batches(data, Part(), mixed=mixed)
    for epoch, first in ((1, 0), (2, 1)):
        whole, shares = list(one.train(epoch, first)), [list(part.train(epoch, first)) for part in parts]
        assert [len(share) for share in shares] == [len(whole)] * replicas == [3 - first] * replicas
        for batch, of_parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert len({len(labels) for _, labels in of_parts}) == 1
            for expected, found in zip(batch, zip(*of_parts, strict=True), strict=True):
                assert torch.equal(torch.cat(found), expected)
        states = [part.state_dict() for part in (one, *parts)]
        assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])

    tested = [list(part.test()) for part in parts]
    assert len({len(share) for share in tested}) == 1, "replicas that share parameters must run as many batches"
    images = torch.cat([images for share in tested for images, _ in share])
    assert torch.equal(images, torch.cat([images for images, _ in one.test()]))


def test_a_last_batch_that_does_not_divide_loses_the_rest(image_folder):
    data = load_data(image_folder(train=17, test=3, size=(8, 8)), workers=0, progress=False)  # 12 + 12 + 10 images
    sizes = [[len(labels) for _, labels in batches(data, Part(i, 4)).train(1)] for i in range(4)]
    assert sizes == [[3, 3, 2]] * 4
    sizes = [[len(labels) for _, labels in batches(data, Part(i, 6)).train(1)] for i in range(6)]
    assert sizes == [[2, 2]] * 6, "10 images are one for each of six, in which BatchNorm finds no variance"


@pytest.mark.parametrize(
    ("replicas", "batch_size", "message"),
    [
        (5, 12, "choose a multiple of 5"),
        (12, 12, "BatchNorm needs batches of two or more: batch size 12, 30 images, 12 replicas"),
        (5, 20, "4 test images are too few for 5 replicas"),
    ],
)
def test_parts_that_cannot_be(image_folder, replicas, batch_size, message):
    data = load_data(image_folder(train=15, test=2, size=(8, 8)), workers=0, progress=False)
    with pytest.raises(SettingsError, match=message):
        batches(data, Part(0, replicas), batch_size)


def test_sums_of_processes_are_those_of_one():
    """Two stages of two replicas; one module of three counts nothing."""

    def result(first, last, losses, hits):
        losses = torch.tensor(losses[first:last])
        return StepResult(losses.sum(), losses, torch.tensor(hits[first:last]), 4)

    cpu = torch.device("cpu")
    whole, own = EpochSums(3, cpu), {}
    for replica, (losses, hits) in enumerate((([1.0, 2.0, 3.0], [2, -1, 3]), ([2.0, 4.0, 5.0], [1, -1, 4]))):
        whole.add(result(0, 3, losses, hits), 4)
        for stage, (first, last) in enumerate(((0, 1), (1, 3))):
            own[stage, replica] = EpochSums(last - first, cpu)
            own[stage, replica].add(result(first, last, losses, hits), 4)

    def joined():
        parts = [(stage, stage, sums.state_dict()) for (stage, _), sums in own.items()]  # stage 1 begins at module 1
        return EpochSums.joined(parts, own[0, 0], 3)

    def same(one, other):
        return str(one.read()) == str(other.read()) and one.images == other.images  # a module's accuracy is nan

    assert same(joined(), whole)
    # Taken up by as many processes again, and by one.
    state = joined().state_dict()
    for (stage, replica), sums in own.items():
        sums.load_part(state, stage, replica, stage)
    assert same(joined(), whole)
    again = EpochSums(3, cpu)
    again.load_part(state, 0, 0, 0)
    assert same(again, whole)
