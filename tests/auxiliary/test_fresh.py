"""A fresh copy has the structure of a module and none of its values; what cannot be initialised is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, weight_norm

from auglocal_ext.auxiliary import fresh_copy
from auglocal_ext.nn import Deferred, deferred, give_memory


class Scaled(nn.Module):
    """A linear layer with a scale, a count and an index."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("order", torch.tensor([3, 2, 1, 0]))
        self.register_buffer("window", torch.hann_window(4), persistent=False)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.norm(self.linear(x)))[:, self.order] * self.scale * self.window


class Resetting(Scaled):
    def reset_parameters(self):
        nn.init.constant_(self.scale, 0.5)
        self.count.zero_()


def spoiled(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    module.norm.running_mean.fill_(math.nan)
    module.norm.num_batches_tracked.fill_(7)
    module.count.fill_(7)
    return module


def test_no_value_comes_from_the_source():
    copies = []
    for source in (Resetting(), spoiled(Resetting())):
        torch.manual_seed(0)
        copies.append(fresh_copy(source, "layer 1"))
    one, other = (copied.state_dict() for copied in copies)
    assert list(one) == list(Resetting().state_dict())
    for name, value in one.items():
        assert torch.equal(value, other[name]) and not value.isnan().any(), name
    assert copies[0].scale.tolist() == [0.5] * 4 and copies[0].count == 0 and copies[1].norm.num_batches_tracked == 0


def test_what_follows_from_the_structure_is_kept_and_nothing_is_shared():
    source = Resetting().eval().requires_grad_(False)
    source.norm.register_forward_hook(lambda *args: pytest.fail("hooks are left out"))
    copied = fresh_copy(source, "layer 1")
    assert copied.order.tolist() == [3, 2, 1, 0] and torch.equal(copied.window, source.window)
    assert copied.drop.p == 0.3 and copied.training and all(part.training for part in copied.modules())
    assert all(parameter.requires_grad for parameter in copied.parameters())
    ours = {tensor.data_ptr() for tensor in (*source.parameters(), *source.buffers())}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in (*copied.parameters(), *copied.buffers()))
    copied(torch.randn(3, 4)).sum().backward()
    assert not source.training and all(parameter.grad is None for parameter in source.parameters())


def test_what_is_shared_within_the_source_is_shared_within_the_copy():
    source = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    source[2].weight = source[0].weight
    copied = fresh_copy(source, "layer 1")
    assert copied[2].weight is copied[0].weight is not source[0].weight


def test_a_part_is_initialised_after_its_own_parts():
    copied = fresh_copy(nn.MultiheadAttention(8, 2), "layer 1")
    assert copied.out_proj.bias.tolist() == [0.0] * 8 and copied.in_proj_bias.tolist() == [0.0] * 24
    assert 0 < copied.in_proj_weight.abs().max() <= math.sqrt(6 / (8 + 24))


def test_a_copy_has_dtype_and_memory_format_of_its_source():
    source = nn.Conv2d(3, 4, 3).to(torch.float64, memory_format=torch.channels_last)
    copied = fresh_copy(source, "layer 1")
    assert copied.weight.dtype == torch.float64 and copied.weight.stride() == source.weight.stride()


class Held(nn.Module):
    """Holds a value as something else than a parameter, buffer or submodule."""

    def __init__(self, value):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.held = value


class Buffered(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("state", value)


class Bad(nn.Linear):
    """Its weight is made of its former values, or in part alone, or not without data."""

    def __init__(self, how):
        super().__init__(4, 4)
        self.how = how

    def reset_parameters(self):
        nn.init.zeros_(self.bias)
        if hasattr(self, "how"):
            self.how(self)


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scaled(), "parameter 'scale', which no reset_parameters.. of Scaled fills.*block=factory"),
        (lambda: nn.Sequential(nn.ReLU(), Buffered(torch.ones(3))), "buffer '1.state', which no .* of Buffered fills"),
        (lambda: Buffered(torch.tensor(0)), "buffer 'state'"),
        (lambda: Bad(lambda self: None), "parameter 'weight', which no reset_parameters"),
        (lambda: Bad(lambda self: nn.init.ones_(self.weight[:3])), "parameter 'weight', which no reset_parameters"),
        (lambda: Bad(lambda self: self.weight.data[1:].fill_(1)), "parameter 'weight', which no reset_parameters"),
        (lambda: Bad(lambda self: self.weight.mul_(2)), "'weight', which the reset_parameters.. of Bad makes of its"),
        (lambda: Bad(lambda self: self.weight.sum().item()), "cannot be initialised anew"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized weights"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "parametrized weights"),
        (old_weight_norm, "holds a Tensor as 'weight'|holds a Parameter as 'weight'"),
        (lambda: Held(torch.ones(3)), "holds a Tensor as 'held' that is no parameter, buffer or submodule"),
        (lambda: Held([{"x": torch.tensor(1)}]), "holds a Tensor as 'held'"),
        (lambda: Held((nn.Linear(4, 4),)), "holds a Linear as 'held'"),
        (lambda: torch.compile(nn.Linear(4, 4), backend="eager"), "compiled or scripted"),
    ],
)
def test_what_cannot_be_made_anew_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"layer 1.*({message})"):
        fresh_copy(make(), "layer 1")


def test_a_weight_that_is_filled_in_parts_is_filled():
    def thirds(self):
        for rows in (slice(0, 1), slice(1, 4)):
            nn.init.xavier_uniform_(self.weight[rows])

    def replaced(self):
        self.weight = nn.Parameter(torch.ones(4, 4))

    def given(self):
        self.weight.data = torch.ones(4, 4)

    for how in (thirds, replaced, given, lambda self: nn.init.trunc_normal_(self.weight)):
        assert not fresh_copy(Bad(how), "layer 1").weight.isnan().any()


def test_what_hangs_on_a_module_but_is_its_own_or_has_no_values_is_copied():
    source = nn.LSTM(4, 4)  # has a list of its parameters
    copied = fresh_copy(source, "layer 1")
    assert copied._flat_weights[0] is copied.weight_ih_l0 is not source.weight_ih_l0
    held = fresh_copy(Held(torch.tensor([1, 0])), "layer 1").held
    assert held.tolist() == [1, 0]


def test_copies_without_data():
    with FakeTensorMode():
        copied = fresh_copy(nn.Sequential(Resetting(), nn.Linear(4, 4)), "layer 1")
        assert copied(torch.randn(2, 4)).shape == (2, 4)
        with pytest.raises(ValueError, match="parameter 'scale'"):
            fresh_copy(Scaled(), "layer 1")
    with torch.device("meta"):
        assert fresh_copy(Resetting(), "layer 1").scale.is_meta
        with pytest.raises(ValueError, match="parameter 'scale'"):
            fresh_copy(Scaled(), "layer 1")


def test_deferred_copies_get_values_of_their_own_later():
    with deferred(0):
        source = Resetting()
        copied = fresh_copy(source, "layer 1")
        recorder = Deferred.active
    for module in (source, copied):
        give_memory([*module.named_parameters(), *module.named_buffers()], torch.device("cpu"), recorder)
    assert copied.order.tolist() == [3, 2, 1, 0] and copied.scale.tolist() == [0.5] * 4
    assert not torch.equal(copied.linear.weight, source.linear.weight)
    assert not any(tensor.isnan().any() for tensor in copied.state_dict().values())
    assert copied.linear.weight.abs().max() <= 0.5 and F.relu(copied.norm.running_var).tolist() == [1.0] * 4
