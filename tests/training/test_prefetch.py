"""Batches made beside the step: the same ones, no memory handed on too early, and the wait for them told truly."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest
import torch
from runs import RULES, interrupt_after, log, trainer, waiting
from waits import no_waits

from auglocal_ext.training import Interrupted
from auglocal_ext.training.config.recipes import RECIPES
from auglocal_ext.training.data import prefetch
from auglocal_ext.training.data.batches import make_batches
from auglocal_ext.training.data.prefetch import InlineFeed, StreamFeed, make_feed


class Timeline:
    """What ``torch.cuda`` has of streams and events, on a clock: a host that is infinitely far ahead of its device."""

    class Stream:
        def __init__(self, device=None):
            self.now = 0.0

        def work(self, milliseconds):
            self.now += milliseconds

        def wait_event(self, event):
            self.now = max(self.now, event.at)

        def wait_stream(self, stream):
            self.now = max(self.now, stream.now)

    class Event:
        def __init__(self, enable_timing=False):
            self.timed = enable_timing

        def record(self, stream):
            self.at = stream.now

        def elapsed_time(self, later):
            assert self.timed and later.timed
            return later.at - self.at

    def __init__(self):
        self.steps = self.current = self.Stream()

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def timeline(monkeypatch):
    timeline = Timeline()
    monkeypatch.setattr(prefetch, "cuda", timeline)
    return timeline


def run(timeline, count, making, step):
    """``count`` steps of ``step`` ms on batches of ``making`` ms; begin of each making, end of each step, the wait."""
    begins, ends = [], []

    def source():
        for k in range(count):
            begins.append(timeline.current.now)
            timeline.current.work(making)
            yield torch.tensor([k]), torch.tensor([k])

    feed = StreamFeed(torch.device("cuda"))
    for images, labels in feed(source()):
        assert timeline.current is timeline.steps
        assert images.item() == labels.item() == len(ends)
        timeline.steps.work(step)
        ends.append(timeline.steps.now)
    assert len(ends) == count
    return begins, ends, feed.waited()


@pytest.mark.parametrize(
    ("making", "step", "waited"),
    [(3.0, 10.0, 3.0), (0.0, 10.0, 0.0), (10.0, 10.0, 10.0), (14.0, 10.0, 14.0 + 4 * 4.0)],
)
def test_only_what_does_not_fit_beside_the_step_is_waited_for(timeline, making, step, waited):
    _, ends, measured = run(timeline, 5, making, step)
    assert measured == pytest.approx(waited / 1000)
    assert ends[-1] == pytest.approx(5 * step + waited)


@pytest.mark.parametrize(("making", "step"), [(3.0, 10.0), (1.0, 100.0), (14.0, 10.0)])
def test_a_batch_is_made_after_the_step_whose_memory_it_takes(timeline, making, step):
    timeline.steps.work(50.0)  # the data set's own copy to the device
    begins, ends, _ = run(timeline, 6, making, step)
    assert begins[0] >= 50.0
    for k in range(2, 6):
        assert begins[k] >= ends[k - 2]  # of batch k - 2 nothing is read any more
        assert begins[k] == pytest.approx(max(ends[k - 2], begins[k - 1] + making))  # and no later than it may


def test_a_step_that_has_moved_to_another_stream_waits_there(timeline):
    """As after a caller has changed the current stream, or anything has left another one current."""
    making = 10.0

    def source():
        for k in range(4):
            timeline.current.work(making)
            yield torch.tensor([k]), torch.tensor([k])

    ends = []
    for k, _ in enumerate(StreamFeed(torch.device("cuda"))(source())):
        assert timeline.current.now >= (k + 1) * making  # the batch is there
        timeline.current.work(1.0)
        ends.append(timeline.current.now)
        moved = timeline.Stream()
        moved.wait_stream(timeline.current)
        timeline.current = moved
    assert ends == sorted(ends)


def test_waits_are_told_once(timeline):
    feed = StreamFeed(torch.device("cuda"))
    for _ in feed(iter([(torch.zeros(1), torch.zeros(1))] * 3)):
        timeline.steps.work(1.0)
    feed.waited()
    assert feed.waited() == 0


@pytest.mark.parametrize("feed", ["inline", "stream"])
def test_no_batch_is_drawn_before_the_step_before_it_was_launched(timeline, feed):
    """So the state of a source is that of the steps done, at whichever step a checkpoint is written."""
    feed = InlineFeed() if feed == "inline" else StreamFeed(torch.device("cuda"))
    drawn = 0

    def source():
        nonlocal drawn
        for _ in range(4):
            drawn += 1
            yield torch.zeros(1), torch.zeros(1)

    for done, _ in enumerate(feed(source())):
        assert drawn == done + 1
    assert drawn == 4


@pytest.mark.parametrize("rule", RULES)
def test_a_run_on_streams_is_the_run_without_and_resumes_exactly(config, separable, tmp_path, timeline, rule):
    plain = trainer(config(output=str(tmp_path / "plain"), **rule), separable)
    plain.fit()

    settings = config(output=str(tmp_path / "streams"), **rule)
    first = trainer(settings, separable)
    first._feed = StreamFeed(torch.device("cuda"))
    interrupt_after(first, 6)
    with pytest.raises(Interrupted):
        first.fit()
    second = trainer(settings, separable)
    second._feed = StreamFeed(torch.device("cuda"))
    second.resume()
    second.fit()
    assert log(settings) == log(plain.config)
    for (name, expected), found in zip(
        plain.network.state_dict().items(), second.network.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name


def slow(batches, seconds):
    """The training batches, each of which takes ``seconds`` more to make."""
    take = batches.train

    def train(epoch, first=0):
        for batch in take(epoch, first):
            time.sleep(seconds)
            yield batch

    batches.train = train


@pytest.mark.slow
def test_a_slow_source_shows_in_the_log_and_a_quick_one_does_not(config, separable, tmp_path):
    quick, starved = (config(output=str(tmp_path / name), epochs=2) for name in ("quick", "starved"))
    for settings, seconds in ((quick, 0.0), (starved, 0.3)):
        run = trainer(settings, separable)
        slow(run._batches, seconds)
        step = run._learner.step
        run._learner.step = lambda *arguments, step=step: (time.sleep(0.05), step(*arguments))[1]
        run.fit()
    assert all(share < 0.3 for share, _ in waiting(quick))
    assert all(0.6 < share <= 1 for share, _ in waiting(starved))


def test_the_wait_before_an_interruption_counts(config, separable):
    settings = config(epochs=1)
    run = trainer(settings, separable)
    slow(run._batches, 0.2)
    interrupt_after(run, 3)
    with pytest.raises(Interrupted):
        run.fit()
    again = trainer(settings, separable)
    again.resume()
    assert again._sums.waiting == run._sums.waiting >= 0.6
    again.fit()
    ((share, seconds),) = waiting(settings)
    assert 0.6 <= share * seconds <= seconds


def test_on_the_cpu_nothing_is_prefetched():
    assert isinstance(make_feed(torch.device("cpu")), InlineFeed)


def cuda_batches(data, recipe="cifar10"):
    return make_batches(
        data, RECIPES[recipe].augmentation, batch_size=8, seed=3, device=torch.device("cuda"), channels_last=True
    )


@pytest.mark.gpu
def test_on_cuda_the_batches_are_those_made_inline(separable):
    """Steps take long, so that the host is far ahead and each batch's memory is wanted again while it is in use."""
    source, feed, found = cuda_batches(separable), make_feed(torch.device("cuda")), []
    for epoch in range(1, 9):
        for images, labels in feed(source.train(epoch)):
            torch.cuda._sleep(10_000_000)
            found.append((images.clone(), labels.clone()))
    inline = cuda_batches(separable)
    expected = [batch for epoch in range(1, 9) for batch in inline.train(epoch)]
    for (a, b), (c, d) in zip(expected, found, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.gpu
def test_on_cuda_memory_does_not_grow_with_the_hosts_lead():
    def source():
        for _ in range(40):
            yield torch.zeros(2**22, device="cuda"), torch.zeros(1, device="cuda")

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for images, _ in make_feed(torch.device("cuda"))(source()):
        torch.cuda._sleep(20_000_000)
        images.add_(1)
    assert torch.cuda.max_memory_allocated() - before <= 3 * 2**24
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_on_cuda_a_batch_asks_for_no_synchronisation(separable):
    feed = make_feed(torch.device("cuda"))
    batches = feed(cuda_batches(separable).train(1))
    next(batches)  # the epoch's order goes to the device
    with no_waits():
        assert len(list(batches)) == 3
    torch.cuda.synchronize()
    assert feed.waited() >= 0


@pytest.mark.gpu
def test_on_cuda_a_resident_data_set_is_not_waited_for(separable):
    many = type(separable)(
        "folder",
        separable.classes,
        separable.train_images.repeat(400, 1, 2, 2),
        separable.train_labels.repeat(400),
        separable.test_images.repeat(1, 1, 2, 2),
        separable.test_labels,
    )
    source = make_batches(
        many, RECIPES["cifar10"].augmentation, batch_size=1024, seed=3, device=torch.device("cuda"), channels_last=True
    )
    feed = make_feed(torch.device("cuda"))

    def epoch():
        """Seconds of an epoch, and those of them waited."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in feed(source.train(1)):
            torch.cuda._sleep(50_000_000)  # a step of about 25 ms
        torch.cuda.synchronize()
        return time.perf_counter() - start, feed.waited()

    epoch()  # the first one allocates memory and loads kernels
    seconds, waited = epoch()
    assert waited < 0.05 * seconds


@pytest.mark.gpu
def test_on_cuda_a_slow_loader_is_told(separable):
    def source():
        for _ in range(5):
            time.sleep(0.1)
            yield torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")

    feed = make_feed(torch.device("cuda"))
    for _ in feed(source()):
        pass
    torch.cuda.synchronize()
    assert 0.4 < feed.waited() < 1.0
