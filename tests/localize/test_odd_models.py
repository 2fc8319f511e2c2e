"""Models of one's own: right, or refused with the reason."""

from __future__ import annotations

import copy
import io
import threading
import types
import warnings

import odd_models as odd
import pytest
import torch
from chains import assert_equal_to_chain
from torch import nn
from torch.nn.utils import parametrizations, prune

from auglocal_ext import DGL, Greedy, LocalStep, localize, segments

SHAPE = (3, 8, 8)


def wrapped(model, modules=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that modules share
        return localize(model, Greedy(), 5, modules, input_shape=SHAPE, layout=options.pop("layout", None), **options)


def batch(dtype=torch.float32):
    return torch.randn(4, *SHAPE, dtype=dtype), torch.randint(0, 5, (4,))


MODELS = {
    "functional": (odd.Functional, {}),
    "called twice": (odd.Twice, {}),
    "tied weights": (odd.Tied, {}),
    "dictionary": (lambda: odd.Outputs("dict"), {"output": "scores"}),
    "tuple": (lambda: odd.Outputs("tuple"), {"output": 1}),
    "named tuple": (lambda: odd.Outputs("named"), {"output": "scores"}),
    "dataclass": (lambda: odd.Outputs("dataclass"), {"output": "scores"}),
    "tokens": (odd.Tokens, {"layout": "class_token"}),
    "checkpointed": (odd.Checkpointed, {}),
    "stochastic depth": (odd.Stochastic, {}),
    "blocks": (odd.Blocks, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_detached_chain(name):
    make, options = MODELS[name]
    model = make()
    net = wrapped(model, **options)
    assert net.num_modules > 1
    x, y = batch()
    before = copy.deepcopy(model)
    assert_equal_to_chain(net, x, y)
    net.zero_grad()
    net.eval()
    assert_equal_to_chain(net, x, y)
    before.load_state_dict(model.state_dict())
    wanted, found = before.eval()(x), net(x)
    assert torch.equal(found, net._infer(x)) and str(type(wanted)) == str(type(model(x)))


def test_a_shared_parameter_belongs_to_both_modules_and_is_told_of():
    with pytest.warns(UserWarning, match="share a parameter of shape"):
        net = localize(odd.Tied(), Greedy(), 5, input_shape=SHAPE)
    weight = net.primary.layers[0].weight
    holding = [m.index for m in net.local_modules if any(p is weight for p in m.parameters())]
    assert len(holding) == 2


def test_parameters_used_by_the_forward_itself_belong_to_a_module():
    net = wrapped(odd.Tokens(trained_table=True), layout="class_token")
    of = [{id(p) for p in m.parameters()} for m in net.local_modules]
    model = net.primary
    assert id(model.position) in of[1] and id(model.token) in of[1]  # behind the embedding, where the first module ends
    assert all(id(model.table.frequency) in each for each in of[1:4])  # each block's module makes the table itself


REFUSED = {
    "skip": (odd.UNet, {"modules": ["middle"]}, "the output of .* which cat in the forward of the model uses later"),
    "batch is not first": (odd.SequenceFirst, {}, "does not have the batch as its first axis"),
    "reads values": (odd.ReadsValues, {}, "a dry run of ReadsValues on fake tensors"),
    "reads values of real tensors": (odd.ReadsRealValues, {}, "cannot be cut after .*needs more than.*reads a value"),
    "noise in two places": (odd.NoiseAcross, {"modules": ["one"]}, "mul in the forward of the model uses later"),
    "buffer of the forward": (odd.Counting, {}, "changes calls before it"),
    "replaced buffer": (odd.Averaging, {}, "the model around it replaces its buffer mean"),
    "a number of the batch": (
        lambda: odd.Scaled(lambda n: 1.0 / n),
        {"modules": ["two"]},
        "one before it returns a float that differs from call to call",
    ),
    "half the batch": (lambda: odd.Scaled(lambda n: n // 2), {}, "depend on the batch size otherwise than linearly"),
    "no such output": (lambda: odd.Outputs("tuple"), {"output": -5}, "output="),
    "state of Python": (odd.RemembersCalls, {}, "do not give what the model gives"),
    "reentrant checkpoint": (lambda: odd.Checkpointed(reentrant=True), {}, "use_reentrant=False"),
    "inside a checkpoint": (
        lambda: odd.Checkpointed(together=2),
        {"modules": ["blocks.0"]},
        "torch.utils.checkpoint runs it together with others",
    ),
    "unused parameters": (odd.Unused, {}, "does not depend on spare.weight"),
    "no tensor": (lambda: odd.Outputs("dict"), {}, "output="),
    "no such submodule": (odd.Functional, {"modules": ["four"]}, "cannot be cut after 'four'"),
    "scripted": (lambda: torch.jit.script(odd.Functional()), {}, "scripted"),
    "compiled as a whole": (lambda: torch.compile(odd.Functional()), {}, "compile its blocks"),
    "no parameters": (nn.ReLU, {}, "no parameters"),
    "one layer": (lambda: nn.Linear(8, 5), {}, "can be cut nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    make, options, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        wrapped(make(), **options)


def test_calls_that_differ_from_the_dry_run_raise():
    """A block that Python leaves out at random: the dry run has seen other calls than a pass makes."""
    torch.manual_seed(0)
    try:
        net = wrapped(odd.Blocks(skips=True))
    except ValueError:
        return  # the dry runs already differed
    x, y = batch()
    with pytest.raises(RuntimeError, match="called other submodules"):
        for _ in range(20):
            net(x, y)
    assert all("forward" not in vars(m) and "_compiled_call_impl" not in vars(m) for m in net.primary.modules())


def test_frozen_parts_stay_and_the_rest_is_trained():
    model = odd.Functional()
    model.two.requires_grad_(False)
    model.spare = nn.Linear(2, 2).requires_grad_(False)
    net = wrapped(model)
    x, y = batch()
    assert_equal_to_chain(net, x, y)
    assert model.two.weight.grad is None and model.one.weight.grad is not None


def test_no_grad_gives_losses_alone():
    net = wrapped(odd.Functional())
    with torch.no_grad():
        out = net(*batch())
    assert not out.loss.requires_grad and out.module_losses.shape == (net.num_modules,)


def test_float64_before_and_after():
    x, y = batch(torch.float64)
    assert_equal_to_chain(wrapped(odd.Tokens().double(), layout="class_token"), x, y)
    assert_equal_to_chain(wrapped(odd.Tokens(), layout="class_token").double(), x, y)


def test_copies_and_pickles_train_alike():
    net = wrapped(odd.Stochastic())
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    x, y = batch()
    results = []
    for each in (net, copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        torch.manual_seed(3)
        out = each(x, y)
        out.loss.backward()
        results.append([out.module_losses, *(p.grad for p in each.parameters())])
        assert each._segment(1).model is each.primary
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_averaged_copy_of_the_model_is_an_ordinary_one():
    model = odd.Functional()
    net = wrapped(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    step = LocalStep(net, lambda p: torch.optim.SGD(p, lr=0.1))
    x, y = batch()
    for _ in range(2):
        step(x, y)
        average.update_parameters(model)
    assert average(x).shape == model(x).shape and not torch.equal(average(x), model(x))


def test_blocks_that_are_compiled():
    model, plain = odd.Blocks(), odd.Blocks()
    plain.load_state_dict(model.state_dict())
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    net, reference = wrapped(model, 3), wrapped(plain, 3)
    reference.auxiliary.load_state_dict(net.auxiliary.state_dict())
    x, y = batch()
    out, wanted = net(x, y), reference(x, y)
    torch.testing.assert_close(out.module_losses, wanted.module_losses)
    with pytest.raises(ValueError, match="compiled"):
        wrapped(model, ["blocks.0._orig_mod.0"])


def test_hooks_of_the_user_run_once_with_what_is_there():
    model, seen = odd.Blocks(), []
    net = wrapped(model)
    handles = [block.register_forward_hook(lambda m, a, out: seen.append(type(out))) for block in model.blocks]
    net(*batch())
    assert seen == [torch.Tensor] * len(handles)


def test_a_failure_inside_leaves_nothing_behind():
    net = wrapped(odd.Functional())
    x, y = batch()

    def fail(module, args):
        raise KeyError("from a hook")

    handle = net.primary.three.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="from a hook"):
        net(x, y)
    handle.remove()
    assert all("_compiled_call_impl" not in vars(m) for m in net.primary.modules())
    assert_equal_to_chain(net, x, y)


def test_a_segment_within_a_segment_of_the_model_is_refused():
    net = wrapped(odd.Functional())
    x, y = batch()
    handle = net.primary.two.register_forward_pre_hook(lambda module, args: net(x, y) and None)
    with pytest.raises(RuntimeError, match="runs already"):
        net(x, y)
    handle.remove()


def test_activations_of_earlier_segments_are_gone():
    from auglocal_ext.memory import MemoryMeter

    net = wrapped(odd.Outputs("dict"), output="scores")  # whose forward keeps all features in a list
    x, y = batch()
    net(x, y).loss.backward()
    live = []
    with MemoryMeter() as meter:
        meter.track(net, x, y)
        base = meter.live_bytes
        h = x
        for module in net.local_modules:
            out = module(h)
            module.local_loss(out, y, x).backward()
            h = out.detach()
            del out
            live.append(meter.live_bytes - base - h.untyped_storage().nbytes())
    assert max(live) <= 512 * 4, live  # what is left is the boundary tensor and a few scalars


def test_a_rule_that_supplies_context():
    from auglocal_ext import ContSup

    net = localize(odd.Functional(), ContSup("R1E"), 5, input_shape=SHAPE)
    x, y = batch()
    out = net(x, y)
    out.loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    exported = net.export()
    assert torch.equal(exported(x), net(x)) and exported.primary is not net.primary


def test_export_is_a_copy_of_the_model():
    net = wrapped(odd.Functional())
    x, _ = batch()
    exported = net.export()
    assert type(exported) is odd.Functional and exported is not net.primary
    assert torch.equal(exported(x), net.eval()(x))


def test_dgl_heads_learn_a_small_problem():
    torch.manual_seed(0)
    net = localize(odd.Functional(), DGL(), 5, input_shape=SHAPE)
    step = LocalStep(net, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    x, y = batch()
    losses = [step(x, y).loss.item() for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_layers_end_where_blocks_do():
    """Although a cut behind a block's first norm is legal, that norm belongs to its own block."""
    net = wrapped(odd.PreActivation())
    assert [str(segment.last) for segment in net._runs] == ["stem", "blocks.0", "blocks.1", "None"]
    assert "blocks.1.norm" in [str(each) for each in net.passage.boundaries]
    assert_equal_to_chain(net, *batch())


def test_a_layer_with_code_between_its_submodules_is_not_copied():
    from auglocal_ext import MAN

    localize(odd.PreActivation(), MAN(), 5, input_shape=SHAPE)
    with pytest.raises(ValueError, match="computes something between its submodules"):
        localize(odd.Functional(), MAN(), 5, ["one"], input_shape=SHAPE)


def test_a_number_that_grows_with_the_batch_is_right_for_any():
    net = wrapped(odd.Scaled(lambda n: 2 * n + 1))
    assert_equal_to_chain(net, torch.randn(7, *SHAPE), torch.randint(0, 5, (7,)))


def test_features_that_the_model_keeps_are_real_after_a_pass():
    model = odd.Keeping()
    x, y = batch()
    net = wrapped(model)
    assert not hasattr(model, "low") and not hasattr(model, "middle")  # what localize has run itself
    net(x, y)
    assert {type(model.low), type(model.middle)} == {torch.Tensor}
    low, middle = model.low, model.middle
    model(x)
    assert torch.equal(low, model.low) and torch.equal(middle, model.middle)


def test_a_forward_that_the_user_gave_a_container_stays():
    model, calls = odd.Contained(), []

    def forward(self, x):
        calls.append(1)
        return nn.Sequential.forward(self, x)

    mine = model.features.forward = types.MethodType(forward, model.features)
    net = wrapped(model)
    assert_equal_to_chain(net, *batch())
    assert vars(model.features)["forward"] is mine
    calls.clear()
    net(*batch())
    assert calls


def test_inference_by_another_thread_during_a_pass():
    model = odd.Contained()
    net = wrapped(model)
    x, y = batch()
    wanted, found = model(x).detach(), []

    def infer():
        with torch.no_grad():
            found.append(model(x))

    def during(module, args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=infer)
            thread.start()
            thread.join()

    for child in model.features:
        child.register_forward_pre_hook(during)
    net(x, y)
    assert len(found) == len(model.features) and all(torch.equal(each, wanted) for each in found)


@pytest.mark.parametrize("change", ["weight_norm", "prune"])
def test_a_parameter_that_is_replaced_after_wrapping_is_not_left_untrained(change):
    model = odd.Functional()
    net = wrapped(model)
    if change == "prune":
        prune.l1_unstructured(model.two, "weight", 0.5)
    else:
        parametrizations.weight_norm(model.two)
    with pytest.raises(RuntimeError, match=r"the model has no two\.weight any more"):
        net(*batch())
    again = wrapped(model)
    again(*batch()).loss.backward()
    assert all(p.grad is not None for p in again.parameters())


def test_autocast_leaves_the_dtype_of_the_input():
    net = wrapped(odd.TableOfInput())
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_to_chain(net, x, y)


def test_wrapping_changes_no_buffer():
    model = odd.Contained()
    model.features[1] = odd.Counter()
    wrapped(model)
    assert model.features[1].calls == 0


def test_all_that_segments_names_is_there():
    assert all(hasattr(segments, name) for name in segments.__all__)
