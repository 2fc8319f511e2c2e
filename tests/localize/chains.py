"""What a localized model must equal: hooks on the untouched model that train and detach at each cut.

What crosses a cut beside the output, as submodules returned it, is detached in place.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from auglocal_ext.auxiliary.base import LossContext


def detached_chain(net, x, y):
    """Losses and gradients by name, from forward hooks at the cuts of a copy of ``net``; no segment runs in it."""
    net = copy.deepcopy(net)
    model, losses = net.primary, []
    model.plain = True  # no hook can train within torch.utils.checkpoint
    boundaries = [net._segment(k).last for k in range(net.num_modules - 1)]
    leaves = net.passage.leaves[model.training]
    handles, returned = [], {}
    for k, boundary in enumerate(boundaries):
        calls = []

        def train(module, args, output, k=k, boundary=boundary, calls=calls):
            calls.append(1)
            if len(calls) - 1 != boundary.nth:
                return None
            flat, spec = tree_flatten(output)
            leaf = leaves[boundary.key]
            scored = net.auxiliary[k].loss(flat[leaf], LossContext(y, x))
            losses.append(scored.loss.detach())
            scored.loss.backward()
            flat[leaf] = flat[leaf].detach()
            for crossing in (each for each in boundary.crossing if each.name):  # the input has no gradient
                tree_flatten(returned[crossing.name, crossing.nth])[0][crossing.leaf].detach_()
            return tree_unflatten(flat, spec)

        handles.append(model.get_submodule(boundary.name).register_forward_hook(train))
    for name in {crossing.name for boundary in boundaries for crossing in boundary.crossing} - {""}:
        calls = itertools.count()

        def note(module, args, output, name=name, calls=calls):
            returned[name, next(calls)] = output

        handles.append(model.get_submodule(name).register_forward_hook(note))
    loss = net.task.score(net._infer(x), y).loss * net.rule.classifier_weight
    losses.append(loss.detach())
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return torch.stack(losses), gradients, {name: b.clone() for name, b in net.named_buffers()}


def assert_equal_to_chain(net, x, y, tolerance=0.0):
    """One pass of ``net`` gives the detached chain's losses, gradients and buffers, and leaves the model as it was."""
    model = net.primary
    keys, dicts = list(model.state_dict()), [set(vars(m)) for m in model.modules()]
    torch.manual_seed(7)
    losses, gradients, buffers = detached_chain(net, x, y)
    torch.manual_seed(7)
    out = net(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.module_losses, losses, rtol=tolerance, atol=0)
    found = {name: p.grad for name, p in net.named_parameters()}
    for name, wanted in gradients.items():
        grad = found[name]
        assert (grad is None) == (wanted is None), name
        if wanted is None:
            continue
        if tolerance:
            torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
        else:
            assert torch.equal(grad, wanted), name
    trained = [name for name, p in net.named_parameters() if p.requires_grad and found[name] is None]
    assert not trained, f"{trained} have no gradient"
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert list(model.state_dict()) == keys
    assert [set(vars(m)) for m in model.modules()] == dicts
