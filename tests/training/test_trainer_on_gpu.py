"""Training on a GPU."""

from __future__ import annotations

import pytest
import torch
from runs import RULES, interrupt_after, log, trainer
from waits import no_waits

from auglocal_ext.training import Interrupted, Trainer


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("rule", RULES)
def test_on_cuda(config, separable, tmp_path, rule, amp):
    settings = config(device="cuda", amp=amp, channels_last=True, epochs=3, **rule)
    run = trainer(settings, separable)
    interrupt_after(run, 6)
    with pytest.raises(Interrupted):
        run.fit()
    again = trainer(settings, separable)
    again.resume()
    summary = again.fit()
    assert summary.peak_bytes > 0 and len(log(settings)) == 3
    assert all(torch.isfinite(p).all() and p.is_cuda for p in again.network.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_step_on_cuda_never_waits_for_the_device(config, separable, rule):
    run = trainer(config(device="cuda", **rule), separable)
    batches = run._feed(run._batches.train(1))
    images, labels = next(batches)
    for _ in range(6):  # a local rule's step is captured after some eager ones
        run._learner.step(images, labels)
    with no_waits():
        images, labels = next(batches)
        run._sums.add(run._learner.step(images, labels), len(labels))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES[1:])
def test_on_cuda_the_steps_run_as_one_graph_and_the_run_says_so(config, separable, rule):
    said = []
    run = Trainer(config(device="cuda", batch_size=10, **rule), separable, bars=False, say=said.append)
    assert run.launch() == "one CUDA graph each, captured after the first few"
    run.fit()
    assert said[0].startswith("steps: 0 of 3 as one CUDA graph (captured after")
    assert run._learner.outcome() == "steps: 9 of 12 as one CUDA graph"


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES[1:])
def test_on_cuda_graph_and_overlap_train_as_eager_steps_do(config, separable, tmp_path, rule):
    losses = []
    for name, how in (("eager", {"graph": "off", "overlap": False}), ("graph", {"graph": "on", "overlap": True})):
        settings = config(device="cuda", batch_size=10, output=str(tmp_path / name), **how, **rule)
        trainer(settings, separable).fit()
        losses.append([float(row["local_loss_sum"]) for row in log(settings)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
