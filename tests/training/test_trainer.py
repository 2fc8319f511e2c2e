"""Whole runs on a toy data set: they learn, resume exactly, and refuse what cannot work."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from runs import RULES, interrupt_after, log, trainer

from auglocal_ext.planning import plan_memory
from auglocal_ext.training import CheckpointError, DivergedError, Interrupted, SettingsError
from auglocal_ext.training.config.schedule import learning_rate
from auglocal_ext.training.run import checkpoint
from auglocal_ext.training.run.metrics import EpochSums, StepResult


@pytest.mark.parametrize("rule", RULES)
def test_learns(config, separable, rule):
    settings = config(epochs=12, lr=0.1, recipe="stl10", **rule)
    run = trainer(settings, separable)
    summary = run.fit()
    assert summary.last_accuracy > 0.8  # chance is a third
    rows = log(settings)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    losses = [float(loss) for loss in rows[3]["module_losses"].split()]
    assert len(losses) == {"bp": 1, "auglocal": 3, "contsup": 4}[rule["rule"]]
    assert sum(losses) == pytest.approx(float(rows[3]["local_loss_sum"]), rel=1e-5)
    assert losses[-1] == float(rows[3]["train_loss"])  # the network's own
    accuracies = [[float(accuracy) for accuracy in row["module_accuracies"].split()] for row in rows]
    assert {len(row) for row in accuracies} == {len(losses)}
    assert [row[-1] for row in accuracies] == [float(row["train_accuracy"]) for row in rows]
    assert all(sum(column[-3:]) > sum(column[:3]) for column in zip(*accuracies, strict=True))  # each module learns


def test_the_networks_own_loss_is_without_the_rules_weight(config, separable):
    """PredSim weights the last module's cross-entropy, by 0.1 here."""
    settings = config(epochs=1, rule="predsim", beta=0.9)
    trainer(settings, separable).fit()
    (row,) = log(settings)
    assert 10 * float(row["module_losses"].split()[-1]) == pytest.approx(float(row["train_loss"]))
    settings = config(epochs=1, rule="predsim", beta=1.0, output=settings.output + "-1")
    trainer(settings, separable).fit()
    assert log(settings)[0]["train_loss"] == "nan"  # it is not trained, nor known


def test_a_module_without_classifier_has_no_accuracy(config, separable):
    settings = config(epochs=1, rule="infopro", modules=3, loss="contrast", weights=(1.0, 1.0, 1.0, 1.0))
    trainer(settings, separable).fit()
    (row,) = log(settings)
    first, second, last = row["module_accuracies"].split()
    assert first == second == "nan" and last == row["train_accuracy"]


def test_hits_of_each_module_are_counted_over_the_images():
    sums = EpochSums(3, torch.device("cpu"))
    for correct, images in (([2, -1, 4], 4), ([0, -1, 1], 2)):
        sums.add(StepResult(torch.tensor(6.0), torch.tensor([1.0, 2.0, 3.0]), torch.tensor(correct), images), images)
    reading = sums.read()
    assert reading.loss == 6 and reading.module_losses == (1, 2, 3)
    first, second, last = reading.module_accuracies
    assert first == 2 / 6 and math.isnan(second) and last == reading.accuracy == 5 / 6
    again = EpochSums(3, torch.device("cpu"))
    again.load_state_dict(sums.state_dict())
    assert again.read().module_losses == reading.module_losses


def test_recompute_at_the_peak_trains_as_without(config, separable, tmp_path):
    logs = []
    for name in ("none", "peak"):
        settings = config(rule="auglocal", depth=2, epochs=2, output=str(tmp_path / name), recompute=name)
        run = trainer(settings, separable)
        assert (run.memory_plan is not None) == (name == "peak")
        run.fit()
        logs.append(log(settings))
    assert logs[0] == logs[1]


def test_a_memory_budget_that_cannot_be_met_is_refused_before_training(config, separable, tmp_path):
    with pytest.raises(SettingsError, match="[Ll]east|smallest|feasible"):
        trainer(config(rule="auglocal", depth=2, memory_budget="1KiB"), separable)
    run = trainer(config(rule="auglocal", depth=2, memory_budget="8GiB"), separable)
    assert run.memory_plan.budget_bytes == 2**33 and run.predicted_peak() == run.memory_plan.predicted_bytes
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", RULES[:2])
def test_the_predicted_peak_is_the_planners_and_touches_nothing(config, separable, rule):
    settings = config(amp="bf16", channels_last=True, **rule)
    run = trainer(settings, separable)
    weights = {name: value.clone() for name, value in run.network.state_dict().items()}
    random = torch.get_rng_state()
    found = run.predicted_peak()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in run.network.state_dict().items())
    if rule["rule"] == "bp":
        parameters = 4 * sum(p.numel() for p in run.network.parameters())
        assert found > 3 * parameters  # with gradients and momentum
        assert trainer(config(**rule), separable).predicted_peak() > found  # half of the activations' bytes
    else:
        plan = plan_memory(
            run.network, 8, lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), autocast=torch.bfloat16
        )
        assert found == plan.predicted_bytes
        run._learner._config = replace(run.config, overlap=True)  # two modules' activations
        assert run.predicted_peak() > found


def test_the_prediction_is_for_the_batches_there_are(config, separable):
    whole, more = (trainer(config(batch_size=size), separable).predicted_peak() for size in (30, 1024))
    assert whole == more  # the data set has 30 images


def test_resume_with_other_data_is_refused(config, separable):
    run = trainer(config(), separable)
    interrupt_after(run, 1)
    with pytest.raises(Interrupted):
        run.fit()
    fewer = type(separable)(
        "folder",
        separable.classes,
        separable.train_images[:20],
        separable.train_labels[:20],
        separable.test_images,
        separable.test_labels,
    )
    with pytest.raises(CheckpointError, match="train_images was 30, now 20"):
        trainer(config(), fewer).resume()


def test_a_folder_with_a_run_is_not_overwritten(config, separable):
    trainer(config(epochs=1), separable).fit()
    with pytest.raises(SettingsError, match="holds a run: continue it with --resume"):
        trainer(config(epochs=1), separable).fit()


def test_an_output_folder_that_cannot_be_made_is_named(config, separable, tmp_path):
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SettingsError, match=f"--output {taken}: this folder cannot be made: .*; choose another"):
            trainer(config(output=str(taken), epochs=1), separable).fit()


def test_same_seed_same_run(config, separable, tmp_path):
    logs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        settings = config(output=str(tmp_path / name), epochs=1, seed=seed)
        trainer(settings, separable).fit()
        logs.append(log(settings))
    assert logs[0] == logs[1] != logs[2]


def test_config_and_checkpoint_hold_the_resolved_settings(config, separable):
    settings = config(epochs=1, lr=None, rule="auglocal", depth=2, device="auto")
    run = trainer(settings, separable)
    run.fit()
    with open(f"{settings.output}/config.json") as file:
        written = json.load(file)
    expected = {
        "lr": 0.8,
        "weight_decay": 1e-4,
        "warmup": 0,
        "pyramid": 0.5,
        "joint_tail": True,
        "recipe": "cifar10",
    }
    assert expected.items() <= written["settings"].items()
    assert written["settings"]["device"] in ("cpu", "cuda")
    assert written["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert written["data"]["local_modules"] == 3
    assert checkpoint.load(run.output / "checkpoint.pt")["settings"] == written["settings"]


@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_nesterov_on_everything(config, separable, rule):
    run = trainer(config(**rule), separable)
    (group,) = run._learner.optimizer.param_groups
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 1e-4)
    assert len(group["params"]) == len(list(run.network.parameters()))


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("rule", RULES[1:])
def test_a_local_rules_steps_are_those_of_its_network_and_one_optimizer(config, separable, rule, amp):
    """The trainer against the ten lines it stands for, to the bit."""
    settings = config(amp=amp, epochs=2, **rule)
    run, plain = trainer(settings, separable), trainer(settings, separable)
    plain.network.load_state_dict(run.network.state_dict())
    optimizer = torch.optim.SGD(plain.network.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
    run.fit()

    plain.network.train()
    for epoch in (1, 2):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, 2, 0.05, run.config.warmup, "short")
        for images, labels in plain._batches.train(epoch):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
                loss = plain.network(images, labels).loss
            loss.backward()
            optimizer.step()
    for (name, expected), found in zip(
        plain.network.state_dict().items(), run.network.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("rule", RULES)
def test_rates_are_those_of_the_schedule(config, separable, tmp_path, rule):
    settings = config(epochs=8, lr=0.1, schedule="published", **rule)
    run = trainer(settings, separable)
    run._train = lambda epoch: run._sums.read()  # rates alone
    rates = []
    for _ in range(8):
        run._sums.seconds, run._sums.images = 1, 1
        rates.append(run._epoch().lr)
        assert {group["lr"] for group in run._learner.optimizer.param_groups} == {rates[-1]}
    assert rates[0] == pytest.approx(0.01) and rates[7] == pytest.approx(0.0)
    assert rates[3] == pytest.approx(0.05)  # the cosine's middle, after two epochs of warm-up


def test_every_epoch_of_a_short_run_trains(config, separable):
    settings = config(epochs=2, lr=0.1)
    run = trainer(settings, separable)
    weights, train = [], run._train

    def watched(epoch):
        weights.append(next(run.network.parameters()).detach().clone())
        return train(epoch)

    run._train = watched
    run.fit()
    assert not torch.equal(weights[1], next(run.network.parameters()))
    rates = [float(row["lr"]) for row in log(settings)]
    assert rates == pytest.approx([0.0853553, 0.0146447], rel=1e-5)
    assert run.config.schedule == "short" and trainer(config(epochs=100), separable).config.schedule == "published"


def test_images_too_small_for_the_recipe_are_refused(config, separable):
    tiny = type(separable)(
        "folder",
        separable.classes,
        separable.train_images[..., :4, :4],
        separable.train_labels,
        separable.test_images[..., :4, :4],
        separable.test_labels,
    )
    with pytest.raises(SettingsError, match="reflected pixels, too many for images of 4 x 4"):
        trainer(config(), tiny)


def test_a_diverging_loss_stops_the_run(config, separable, tmp_path):
    run = trainer(config(lr=1e30), separable)
    with pytest.raises(DivergedError, match=r"lower --lr or lengthen --warmup \(nothing was saved\)"):
        run.fit()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def wreck(run, epoch, weight=math.inf):
    """Has the last step of an epoch leave a weight that is not finite."""
    step, last, count = run._learner.step, epoch * run.steps, 0

    def wrecking(*arguments):
        nonlocal count
        result, count = step(*arguments), count + 1
        if count == last:
            with torch.no_grad():
                next(run.network.parameters()).view(-1)[0] = weight
        return result

    run._learner.step = wrecking


@pytest.mark.parametrize("epoch", [1, 2, 3], ids=["first", "middle", "last"])
def test_a_run_that_diverges_in_an_epochs_last_step_keeps_the_checkpoint_before(config, separable, tmp_path, epoch):
    settings = config(epochs=3, rule="auglocal", depth=2, amp="bf16")
    run = trainer(settings, separable)
    wreck(run, epoch)
    file = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(DivergedError) as stopped:
        run.fit()
    said, ways = str(stopped.value), "lower --lr, lengthen --warmup or turn off --amp"
    assert re.match(rf"the test loss is (nan|inf) after epoch {epoch}: ", said)
    if epoch == 1:
        assert said.endswith(f": {ways} (nothing was saved)")
    else:
        assert said.endswith(f"another --output and {ways} ({file} holds the run after epoch {epoch - 1})")
    assert len(log(settings)) == epoch - 1
    assert file.exists() == (tmp_path / "run" / "curves.png").exists() == (epoch > 1)
    if epoch > 1:
        state = checkpoint.load(file)
        assert state["progress"]["epochs"] == epoch - 1
        assert all(value.isfinite().all() for value in state["network"].values())
        again = trainer(settings, separable)
        again.resume()
        again.fit()


def test_ctrl_c_saves_no_wrecked_weights(config, separable, tmp_path):
    run = trainer(config(epochs=2), separable)
    wreck(run, 1)
    interrupt_after(run, 4)
    evaluate = run.evaluate
    run.evaluate = lambda: evaluate() and run._sums.read()  # a test loss that hides it
    with pytest.raises(DivergedError, match="is not finite after 4 of 4 steps of epoch 1"):
        run.fit()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_last_batch_of_one_image_is_left_out(config, separable):
    run = trainer(config(epochs=1, batch_size=29), separable)
    assert run._batches.steps == 1
    run.fit()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("rule", RULES)
def test_mixed_precision(config, separable, rule, amp):
    settings = config(amp=amp, epochs=2, channels_last=True, **rule)
    run = trainer(settings, separable)
    run.fit()
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in run.network.parameters())
    if amp == "fp16":
        again = trainer(settings, separable)
        again.resume()
        assert again._learner.grad_scaler.get_scale() == run._learner.grad_scaler.get_scale()


def test_evaluation_never_runs_auxiliary_networks(config, separable):
    run = trainer(config(rule="auglocal", depth=2), separable)
    for module in run.network.auxiliary.modules():
        module.register_forward_hook(lambda *_: pytest.fail("an auxiliary network ran"))
    reading = run.evaluate()
    with torch.no_grad():
        logits = torch.cat([run.network.eval()(images) for images, _ in run._batches.test()])
    labels = separable.test_labels
    assert reading.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert reading.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network": "resnet9"}, "--network names no network: unknown network 'resnet9', did you mean resnet8"),
        ({"rule": "dni"}, "--rule is one of auglocal, contsup, .*, predsim, solo, bp, not 'dni'"),
        ({"rule": "bp", "depth": 3}, "--depth belongs to the rule auglocal, not to bp"),
        ({"rule": "auglocal", "context": "E"}, "--context belongs to the rule contsup"),
        ({"rule": "auglocal", "depth": 0}, "depth"),
        ({"rule": "contsup", "context": "Q"}, "context"),
        ({"lr": -1.0}, "--lr must be positive"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"epochs": 3, "warmup": 4}, "--warmup 4 is longer"),
        ({"amp": "fp8"}, "--amp is one of none, bf16, fp16"),
        ({"rule": "auglocal", "graph": "maybe"}, "--graph is one of auto, on, off, not 'maybe'"),
        ({"rule": "bp", "recompute": "peak"}, "--recompute belongs to the local rules, not to bp"),
        ({"rule": "bp", "memory_budget": "1GiB"}, "--memory-budget belongs to the local rules, not to bp"),
        ({"rule": "contsup", "memory_budget": "1GiB", "recompute": "peak"}, "leave out --recompute"),
        ({"rule": "contsup", "recompute": "most"}, "--recompute is one of none, auxiliary, all, peak, or a number"),
        ({"rule": "contsup", "recompute": 3}, """must be text, such as "peak", "3" or "3,3,all", got 3"""),
        ({"rule": "contsup", "recompute": "2,peak"}, "a list with one of these but peak for each.*; not '2,peak'"),
        ({"rule": "bp", "graph": "off"}, "--graph belongs to the local rules, not to bp"),
        ({"rule": "bp", "overlap": False}, "--overlap belongs to the local rules, not to bp"),
    ],
)
def test_wrong_settings_are_refused_when_made(config, settings, said):
    with pytest.raises(SettingsError, match=said):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "auglocal", "depth": 6}, "depth"),
        ({"rule": "contsup", "modules": 9}, "modules"),
        ({"network": "vgg13", "width": 8}, "width"),
        ({"network": "vgg13", "width": None}, "vgg13"),
        ({"device": "tpu"}, "--device is auto, cpu, cuda"),
        ({"device": "cuda:77"}, "torch sees .* CUDA devices"),
        ({"rule": "auglocal", "graph": "on"}, "--graph on needs a CUDA device, this run is on cpu"),
        ({"rule": "contsup", "overlap": True}, "--overlap needs a CUDA device, this run is on cpu"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(config, separable, tmp_path, settings, said):
    with pytest.raises(SettingsError, match=said):
        trainer(config(**settings), separable)
    assert not (tmp_path / "run").exists()
