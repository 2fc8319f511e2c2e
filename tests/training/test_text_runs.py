"""Language models trained on a text: what they leave, how they go on, and what is refused."""

from __future__ import annotations

import io
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launched import launch
from runs import TIMES, interrupt_after, log, trainer
from texts import settings, text

from auglocal_ext.cli import main
from auglocal_ext.cli.train import _say
from auglocal_ext.training import (
    CheckpointError,
    Interrupted,
    SettingsError,
    TrainConfig,
    Trainer,
    TrainingError,
    load_run,
)
from auglocal_ext.training.config.schedule import rate_of_step
from auglocal_ext.training.data.text import IGNORED
from auglocal_ext.training.run.curves import read_curves
from auglocal_ext.training.run.processes import Alone
from auglocal_ext.training.run.text_samples import SAMPLES, TextSampler
from auglocal_ext.training.run.trainer import _quoted

TEXT_TIMES = {*TIMES, "tokens_per_second"}
RULES = [
    pytest.param({"rule": "bp"}, id="bp"),
    pytest.param({"rule": "auglocal", "depth": 2, "modules": 2}, id="auglocal"),
]

OF_RESNET = {"network": "resnet8", **dict.fromkeys(("layers", "heads", "width", "context_length", "sample"))}


def rows(config):
    return [{name: value for name, value in row.items() if name not in TEXT_TIMES} for row in log(config)]


def weights(run):
    return run.network.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_to_the_bit_in_the_middle_of_an_epoch(tmp_path, rule):
    straight = trainer(settings(tmp_path, output=str(tmp_path / "straight"), **rule), None)
    straight.fit()
    config = settings(tmp_path, **rule)
    stopped = trainer(config, None)
    interrupt_after(stopped, stopped.steps + 2)
    with pytest.raises(Interrupted):
        stopped.fit()
    again = trainer(config, None)
    again.resume()
    assert again.resumed_after == f"2 of {again.steps} steps of epoch 2"
    again.fit()
    assert same(weights(straight), weights(again)) and rows(straight.config) == rows(config)
    samples = [Path(run.output, "samples.txt").read_text() for run in (straight.config, config)]
    assert samples[0] == samples[1] and samples[0].count("=== epoch") == 2


def test_what_a_run_measures(tmp_path):
    run = trainer(settings(tmp_path, epochs=1), None)
    summary = run.fit()
    content = Path(run.config.data).read_bytes()
    begin, network = len(content) - len(content) // 20, run.network.eval()
    total, context = 0.0, 16
    for start in range(begin - 1, len(content) - 1, context):  # each byte of the last 5 % by those of its window
        window = torch.tensor(list(content[start : start + context + 1]))
        logits = network(window[None, :-1]).detach()
        total += float(F.cross_entropy(logits[0], window[1:], reduction="sum"))
    nats = total / (len(content) // 20)
    (row,) = log(run.config)
    assert float(row["test_loss"]) == pytest.approx(nats, rel=1e-5)
    assert float(row["test_bits_per_byte"]) == pytest.approx(nats / math.log(2), rel=1e-5)
    assert float(row["module_bits_per_byte"]) == pytest.approx(float(row["train_loss"]) / math.log(2), rel=1e-5)
    assert summary.last_bits_per_byte == float(row["test_bits_per_byte"]) and summary.last_perplexity is None
    assert "tokens_per_second" in row and "images_per_second" not in row and "test_perplexity" not in row
    assert float(row["lr"]) == pytest.approx(1e-4)  # a tenth of the peak in the last step
    form, _, tested, _ = read_curves(run.config.output).metric
    assert form.name == "bits per byte" and tested.tolist() == [summary.last_bits_per_byte]


def test_more_bits_are_not_better(tmp_path):
    run = trainer(settings(tmp_path, epochs=3), None)
    measured = iter([(5.0, 1), (4.0, 2), (4.5, 3)])
    evaluate = run.evaluate

    def told():
        reading = evaluate()
        bits, _ = next(measured)
        form, _ = reading.metric
        return type(reading)(reading.loss, reading.module_losses, reading.measured | {form: (bits,)})

    run.evaluate = told
    summary = run.fit()
    assert (summary.best_epoch, summary.best_bits_per_byte, summary.last_bits_per_byte) == (2, 4.0, 4.5)


def test_samples_do_not_disturb_training(tmp_path):
    runs = [trainer(settings(tmp_path, output=str(tmp_path / str(n)), sample=n, epochs=1), None) for n in (0, 5)]
    for run in runs:
        run.fit()
    assert same(*map(weights, runs)) and not (tmp_path / "0" / "samples.txt").exists()
    assert len((tmp_path / "5" / "samples.txt").read_text()) > len("=== epoch 1 ===\n\n\n")


def test_the_optimizer_and_its_schedule(tmp_path):
    run = trainer(settings(tmp_path, rule="auglocal", depth=2, modules=2, epochs=20, weight_decay=0.3), None)
    network, optimizer = run.network, run._learner.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert len(decay) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.dim() < 2 or "embedding" in name else 0.3), name
    assert run._learner._step._updates.clip_norm == 1.0
    rates = [run.learning_rate(epoch, step) for epoch in range(1, 21) for step in range(1, run.steps + 1)]
    warmup = len(rates) // 10
    assert rates[:warmup] == [1e-3 * (step + 1) / warmup for step in range(warmup)] and rates[warmup] == 1e-3
    assert rates[-1] == pytest.approx(1e-4) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rate_of_step(1, 1, 0.5, 100) == 0.5


def test_a_language_model_out_of_its_run(tmp_path):
    run = trainer(settings(tmp_path, rule="auglocal", depth=2, modules=2, epochs=1, norm="layer", mlp="gelu"), None)
    run.fit()
    saved = load_run(tmp_path / "run", device="cpu")
    tokens = torch.randint(256, (2, 16))
    assert torch.equal(saved.network(tokens), run.network.eval()(tokens))
    assert (saved.classes, saved.input_shape, saved.facts["vocabulary"]) == ((), (16,), 256)
    targets = torch.cat([y.flatten() for _, y in saved.source().test()])
    content = Path(run.config.data).read_bytes()
    assert bytes(targets[targets != IGNORED].tolist()) == content[len(content) - len(content) // 20 :]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mixup": 0.2}, "--mixup belongs to a run on images, not to one with --network gpt"),
        ({"mean": (1.0, 1.0, 1.0)}, "--mean belongs to a run on images"),
        ({"channels_last": True}, "--channels-last belongs to a run on images"),
        ({"train_images": 5}, "--train-images belongs to a run on images"),
        ({"schedule": "short"}, "--schedule belongs to a run on images"),
        ({"warmup": 3}, "--warmup belongs to a run on images, .*: take --warmup-steps"),
        ({**OF_RESNET, "warmup_steps": 3}, "--warmup-steps belongs to a run on text, .*: take --warmup"),
        ({**OF_RESNET, "context_length": 16}, "--context-length belongs to a run on text, .*: leave it out"),
        ({"norm": "batch"}, "--norm is one of rms, layer"),
        ({"recipe": "cifar10"}, "the recipe cifar10 is for images"),
        ({"heads": 3}, "heads"),
    ],
)
def test_settings_of_images_and_of_text_are_told_apart(tmp_path, given, said):
    with pytest.raises(SettingsError, match=said):
        trainer(settings(tmp_path, **given), None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"heads": 3}, "heads must divide the width, got 3 heads and a width of 16"),
        ({"rule": "greedy", "modules": 9}, "modules=9: the network has 3 layers"),
        ({"rule": "predsim"}, "PredSim's similarity loss compares samples by class"),
        ({"recipe": "cifar10"}, "the recipe cifar10 is for images"),
        ({"rule": "greedy", "graph": "on"}, "--graph on needs a CUDA device"),
        ({"context_length": 400}, "tokens are too few: .* windows of --context 400 need 800"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_tokens_are_written(tmp_path, given, said):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(text(100))
    with pytest.raises(TrainingError, match=said):
        trainer(settings(tmp_path, data=str(tmp_path / "texts"), **given), None)
    assert not list(tmp_path.glob("run/*"))


def test_networks_and_data_that_do_not_go_together(tmp_path, image_folder, config):
    with pytest.raises(SettingsError, match="--network gpt is a language model, but .* holds images"):
        Trainer(settings(tmp_path, data=str(image_folder())), bars=False)
    with pytest.raises(SettingsError, match="--network resnet8 takes images, but .* is a text: choose --network gpt"):
        Trainer(config(data=settings(tmp_path).data), bars=False)


def test_another_text_is_another_run(tmp_path):
    config = settings(tmp_path, epochs=1)
    trainer(config, None).fit()
    data = Path(config.data)
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(Exception, match="data: checksum was .* now"):
        trainer(config, None).resume()


@pytest.mark.parametrize("resumed", [True, False])
def test_another_text_leaves_the_tokens_of_the_run(tmp_path, capsys, resumed):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(text(200))
    config = settings(tmp_path, data=str(tmp_path / "texts"), epochs=1)
    trainer(config, None).fit()
    before = {path.name: path.read_bytes() for path in Path(config.output).iterdir() if path.is_file()}
    assert before["tokens.bin"]
    (tmp_path / "texts" / "b.txt").write_text(text(300, seed=2))
    if resumed:
        assert main(["train", "--output", config.output, "--resume"]) == 1
        said = capsys.readouterr().err
    else:
        with pytest.raises(CheckpointError) as error:
            trainer(config, None)
        said = str(error.value)
    assert re.search("belongs to a run with other settings:\n  data: checksum was '.*', now '.*'", said)
    assert {path.name: path.read_bytes() for path in Path(config.output).iterdir() if path.is_file()} == before
    (tmp_path / "texts" / "b.txt").write_text(text(200))
    Path(config.output, "tokens.bin").unlink()  # of the same text they are made again
    again = trainer(config, None)
    again.resume()
    assert Path(config.output, "tokens.bin").read_bytes() == before["tokens.bin"]


def test_the_command(tmp_path, capsys):
    """Trains, goes on for longer, and says the right words."""
    data = settings(tmp_path).data
    options = "--network gpt --layers 2 --width 16 --heads 2 --context 16 --rule greedy --batch-size 16 --sample 8"
    run = str(tmp_path / "out")
    assert main(["train", "--data", data, *options.split(), "--epochs", "1", "--output", run, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "bits/B  tokens/s" in said and "\n  | " in said and "waiting for text" in said
    assert "bits per byte" in said and "samples " in said and "image" not in said
    assert main(["train", "--output", run, "--resume", "--epochs", "2"]) == 0
    assert "2 epochs in place of 1" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples.txt").read_text().count("=== epoch") == 2
    assert main(["train", "--data", data, *options.split(), "--mixup", "1", "--output", f"{run}2"]) == 1
    assert capsys.readouterr().err == (
        "error: --mixup belongs to a run on images, not to one with --network gpt: leave it out\n"
    )


def test_what_a_tied_readout_warns_of_is_a_line(tmp_path, capsys):
    options = "--network gpt --layers 2 --width 16 --heads 2 --context 16 --rule greedy --modules 2 --tied --epochs 1"
    data, run = settings(tmp_path).data, str(tmp_path / "out")
    assert main(["train", "--data", data, *options.split(), "--sample", "0", "--output", run, "--device", "cpu"]) == 0
    assert capsys.readouterr().err == (
        "warning: local modules 0 and 1 share a parameter of shape (256, 16): both local losses train it\n"
    )


def test_the_recipe_of_a_text(tmp_path, capsys):
    made = settings(tmp_path)
    assert main(["train", "--data", made.data, "--network", "gpt", "--context", "16", "--config"]) == 0
    written = tmp_path / "mine.toml"
    written.write_text(capsys.readouterr().out)
    config = TrainConfig.from_recipe(str(written), output=str(tmp_path / "run"))
    assert (config.recipe, config.layers, config.width, config.context_length) == ("text", 12, 512, 16)
    assert (config.clip_norm, config.warmup_steps, config.weight_decay, config.lr) == (1.0, 100, 0.1, 1e-3)


@pytest.mark.filterwarnings("ignore:.* of the text's tokens are <unk>")
def test_a_tokenizer_measures_perplexity_and_bits_per_byte(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"<unk>": 0, "the": 1, "of": 2, "and": 3}, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    config = settings(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), context_length=8, epochs=1)
    run = trainer(config, None)
    run.fit()
    (row,) = log(config)
    loss, per_token = float(row["test_loss"]), os.path.getsize(config.data) / run.data.file.tokens
    assert float(row["test_perplexity"]) == pytest.approx(math.exp(loss), rel=1e-5)
    assert float(row["test_bits_per_byte"]) == pytest.approx(loss / math.log(2) / per_token, rel=1e-5)
    assert run.network[-1].out_features == 4
    again = trainer(config, None)
    again.resume()
    assert same(weights(run), weights(again))


def test_samples_keep_their_line_ends_in_a_resumed_run(tmp_path):
    sampler = TextSampler(9, 16, None, 1)
    for epoch in (1, 2):
        sampler.write(tmp_path, epoch, "a\r\nb\rc")
    before = (tmp_path / SAMPLES).read_bytes()
    sampler.open(tmp_path, 2)
    assert (tmp_path / SAMPLES).read_bytes() == before
    sampler.open(tmp_path, 1)
    assert (tmp_path / SAMPLES).read_bytes() == before[: len(before) // 2]


def test_a_sample_ends_when_the_run_is_asked_to_stop():
    asked = iter([False, True])
    sampler, team = TextSampler(50, 16, None, 1), Alone(torch.device("cpu"))
    assert len(sampler.sample(lambda x: torch.zeros(1, 16, 256), 1, team, lambda: next(asked))) in (1, 2)


def test_what_a_terminal_shows_of_a_sample(monkeypatch):
    mark = "\N{REPLACEMENT CHARACTER}"
    assert _quoted("a\tb\r\nc\x1b[2J\rd") == f"  | a       b\n  | c{mark}[2J{mark}d"
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    _say(f"caf\xe9 {mark}")
    assert shown.getvalue() == b"caf\xe9 ?\n"


def test_a_diverged_run_names_options_that_it_has(tmp_path):
    run = trainer(settings(tmp_path, amp="bf16"), None)
    assert "lower --lr, lengthen --warmup-steps or turn off --amp" in str(run._diverged("it"))


def test_an_infinite_perplexity_is_no_damage(tmp_path):
    config = settings(tmp_path, epochs=1)
    run = trainer(config, None)
    run.fit()
    run._done.last_perplexity = math.inf  # of a loss above 709
    run.save()
    assert load_run(tmp_path / "run", device="cpu").epochs == 1


def test_an_empty_part_of_the_validation_text_counts_nothing(tmp_path):
    """A replica's part of a test batch, where each has one window of a batch."""
    learner = trainer(settings(tmp_path), None)._learner
    empty = torch.zeros(0, 16, dtype=torch.int64)
    assert learner.score(empty, empty).tally.tolist() == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["stages", "replicas"])
def test_two_processes_train_as_one_does(tmp_path, grid):
    data = settings(tmp_path).data
    Path(data).write_bytes(
        Path(data).read_bytes()[:1095]
    )  # 64 windows: of a part of a batch replicas may leave out one
    options = "--network gpt --layers 2 --width 16 --heads 2 --context 16 --rule greedy --batch-size 16 --sample 8"
    common = ["train", "--data", data, *options.split(), "--epochs", "2", "--device", "cpu", "--output"]
    assert main([*common, str(tmp_path / "one")]) == 0
    done = launch(2, [*common, str(tmp_path / "two"), f"--{grid}", "2"])
    assert done.returncode == 0, done.stderr
    one, two = (load_run(tmp_path / name, "cpu").network.state_dict() for name in ("one", "two"))
    for name, expected in one.items():
        difference = (two[name] - expected).abs()
        # Replicas add up gradients in another order, and where one is almost 0 Adam steps by its sign.
        assert float(difference.max() if grid == "stages" else difference.mean()) <= (
            0 if grid == "stages" else 1e-5
        ), name
    losses = [
        [float(row["test_loss"]) for row in log(settings(tmp_path, output=str(tmp_path / n)))] for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (tmp_path / "two" / "samples.txt").read_text().count("=== epoch") == 2
