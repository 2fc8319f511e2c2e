"""Max pooling behind a normalisation in fused chains: what is fused, equality with eager, what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from saved import saved_maps
from torch import Tensor, nn

from auglocal_ext import fuse, models, unfuse


def chain(*behind: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), *behind)


def twins(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, -0.5, 1.5)
            nn.init.normal_(part.bias)
    module.double()
    return module, copy.deepcopy(module)


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for training in (True, False):
        out, expected = ours.train(training)(x), theirs.train(training)(x)
        torch.testing.assert_close(out, expected)
        grad = torch.randn(out.shape, dtype=out.dtype)
        found = torch.autograd.grad(out, list(ours.parameters()), grad)
        torch.testing.assert_close(found, torch.autograd.grad(expected, list(theirs.parameters()), grad))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    ("behind", "fused"),
    [
        ([nn.ReLU(), nn.MaxPool2d(3, 2, 1)], "1, 2, 3"),
        ([nn.ReLU(inplace=True), nn.MaxPool2d(2)], "1, 2, 3"),
        ([nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0)), nn.ReLU()], "1, 2"),
        ([nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding_mode="reflect", padding=1)], "1, 2, 3"),
        ([nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)], "1, 2"),
        ([nn.ReLU(), nn.MaxPool2d(3, 2, dilation=2)], "1, 2"),
        ([nn.ReLU(), nn.MaxPool2d(17, 1)], "1, 2"),
        ([nn.ReLU(), nn.AvgPool2d(2)], "1, 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(repr, value)),
)
def test_chains_equal_eager(behind: list[nn.Module], fused: str) -> None:
    ours, theirs = twins(chain(*copy.deepcopy(behind)))
    report = fuse(ours)
    assert report.fused == (fused,)
    assert_same(ours, theirs, torch.randn(3, 3, 19, 20, dtype=torch.float64))
    unfuse(ours)
    assert type(ours) is nn.Sequential


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.MaxPool2d(3, 2, ceil_mode=True), "rounds its size up"),
        (nn.MaxPool2d(3, dilation=2), "is dilated"),
        (nn.MaxPool2d(3, return_indices=True), "returns indices"),
        (nn.MaxPool2d((16, 17)), "more than 256"),
        (nn.MaxPool2d(2, padding=2), "more than half"),
    ],
    ids=repr,
)
def test_a_pooling_that_stays_eager_is_reported(pool: nn.MaxPool2d, reason: str) -> None:
    left = dict(fuse(chain(nn.ReLU(), pool)).left)
    assert list(left) == ["3"] and reason in left["3"]


def test_a_hooked_pooling_is_called() -> None:
    ours, theirs = twins(chain(nn.ReLU(), nn.MaxPool2d(2)))
    fuse(ours)
    seen: list[Tensor] = []
    ours[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert_same(ours, theirs, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert len(seen) == 2 and bool((seen[0] >= 0).all())


def test_the_stem_of_a_residual_network_keeps_its_raw_map_and_bytes() -> None:
    stem = models.build("resnet18", num_classes=10)[0]
    ours, theirs = twins(stem)
    assert fuse(ours).fused == ("bn, relu, maxpool",)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert_same(ours, theirs, x)

    def kept(net: nn.Module) -> tuple[list[tuple[int, ...]], int]:
        sizes: dict[int, int] = {}
        own = {p.untyped_storage()._cdata for p in net.state_dict().values()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
            return tensor

        alive: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x)
        return saved_maps(lambda: net(x), net), sum(sizes.values())

    (fused_maps, fused_bytes), (eager_maps, eager_bytes) = kept(ours.train()), kept(theirs.train())
    raw, pooled = (2, 64, 20, 20), (2, 64, 10, 10)
    assert sorted(fused_maps) == sorted([tuple(x.shape), raw, pooled])
    vectors = 2 * 64 * 8
    assert fused_bytes == x.nbytes + 2 * 64 * 20 * 20 * 8 + 2 * 64 * 10 * 10 + vectors
    assert eager_maps.count(raw) == 2 and eager_bytes > 1.8 * fused_bytes
