"""What a second brings: counts against the rows, times against a clock that the test sets."""

import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from conftest import sums, write_jsonl
from harness import events, fit, logger

from dft_lightning.callbacks import Checkpoints, RunSummary, Throughput, TokenProbabilities
from dft_lightning.callbacks.stopwatch import Stopwatch
from dft_lightning.callbacks.throughput import Speed, _Work
from dft_lightning.data.batch import Collator
from dft_lightning.errors import UserError
from dft_lightning.planning.flops import model_flops

PEAK = 1e11


class Clock:
    """Seconds as a test sets them."""

    now = 0.0

    def __call__(self):
        return self.now


class Kept(Throughput):
    """Remembers each report."""

    def __init__(self, peak_flops=PEAK):
        super().__init__(peak_flops)
        self.speeds = []

    def _speed(self, trainer):
        self.speeds.append(super()._speed(trainer))
        return self.speeds[-1]


class TestStopwatch:
    def test_waiting_is_part_of_the_time_and_pauses_are_not(self):
        clock = Clock()
        watch = Stopwatch(clock)
        clock.now = 5.0  # what comes before the first batch does not count
        watch.fetch_begins()
        clock.now = 6.0
        watch.fetch_ends()
        clock.now = 10.0
        with watch.pause():
            clock.now = 20.0
            with watch.pause():
                clock.now = 30.0
            clock.now = 40.0
        watch.fetch_begins()
        clock.now = 42.0
        watch.fetch_ends()
        assert watch.lap() == (5 + 2, 1 + 2)
        clock.now = 43.0
        assert watch.lap() == (1, 0)

    def test_a_pause_before_the_first_batch_is_not_taken_off(self):
        clock = Clock()
        watch = Stopwatch(clock)
        with watch.pause():
            clock.now = 3.0
        watch.fetch_begins()
        clock.now = 4.0
        assert watch.lap()[0] == 1

    def test_it_waits_for_the_device_around_pauses_only(self):
        waited = []
        watch = Stopwatch(Clock(), lambda: waited.append(1))
        watch.fetch_begins()
        watch.fetch_ends()
        assert not waited
        watch.lap()
        assert not waited
        with watch.pause(), watch.pause():
            assert len(waited) == 1
        assert len(waited) == 2


class TestSpeed:
    speed = Speed(600, 150, 12, 3e12, 3.0, 0.75, ranks=2, memory={"peak_memory": 2**31})

    def test_by_hand(self):
        assert self.speed.metrics(1e12) == {
            "tokens_per_second": 200,
            "supervised_tokens_per_second": 50,
            "sequences_per_second": 4,
            "loader_wait_share": 0.25,
            "peak_memory_gib": 2.0,
            "mfu": 0.5,
        }

    def test_no_peak_no_utilisation(self):
        assert "mfu" not in self.speed.metrics(None)


@pytest.mark.parametrize("packing", [False, True, "padding_free"])
@pytest.mark.parametrize("micro", [3, 8])
def test_every_token_is_counted_once_whatever_the_steps_between_reports(model_dir, rows_file, packing, micro):
    """Four steps, reports after 3 and after the last."""
    throughput = Kept()
    data = {"micro_batch_size": micro, "packing": packing}
    finetuner, _, trainer = fit(
        model_dir,
        rows_file,
        callbacks=[throughput],
        data=data,
        log_every_n_steps=3,
        module={"attn_implementation": "varlen"},
    )
    rows, sampler = trainer.datamodule.train_rows, trainer.datamodule.sampler()
    order = sampler.order(0)
    flops = model_flops(finetuner.network)
    assert len(throughput.speeds) == 2
    for part, speed in zip((order[:24], order[24:]), throughput.speeds, strict=True):
        lengths, supervised = rows.lengths[part].tolist(), int(rows.targets[part].sum())
        assert (speed.tokens, speed.supervised, speed.sequences) == (sum(lengths), supervised, len(part))
        assert speed.flops == flops.of(lengths, supervised)
        assert speed.seconds > speed.waited > 0
        assert speed.memory["peak_memory"] > 2**25  # more than an interpreter with torch needs


def test_what_is_logged_stands_at_steps_done(model_dir, rows_file, tmp_path):
    fit(model_dir, rows_file, callbacks=[Throughput(PEAK)], logger=logger(tmp_path), log_every_n_steps=2)
    found = events(tmp_path)
    names = {tag for tag in found.Tags()["scalars"] if tag.startswith("throughput/")}
    assert names == {
        f"throughput/{name}"
        for name in (
            "tokens_per_second",
            "supervised_tokens_per_second",
            "sequences_per_second",
            "loader_wait_share",
            "mfu",
            "peak_memory_gib",
        )
    }
    for name in names:
        assert [event.step for event in found.Scalars(name)] == [2, 4]
        assert all(event.value > 0 for event in found.Scalars(name))


def test_only_training_is_timed(model_dir, tmp_path):
    """A slow validation, a slow checkpoint and a slow report each take longer than all training steps."""
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(16))

    class SlowCheckpoint(Checkpoints):
        def _write(self, trainer, name):
            time.sleep(0.3)
            super()._write(trainer, name)

    class SlowReport(TokenProbabilities):
        def _compare(self, trainer, module):
            time.sleep(0.3)
            super()._compare(trainer, module)

    class SlowValidation(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            time.sleep(0.3)

        on_validation_end = on_validation_start

    throughput = Kept()
    began = time.perf_counter()
    fit(
        model_dir,
        rows,
        callbacks=[throughput, SlowReport(1, figure=False), SlowCheckpoint(1), SlowValidation()],
        data={"global_batch_size": 4, "micro_batch_size": 2, "val_size": 4},
        val_check_interval=1,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    assert time.perf_counter() - began > 3 * (0.3 + 0.3 + 0.6)
    timed = sum(speed.seconds for speed in throughput.speeds[1:])  # two of three steps
    assert 0 < timed < 0.3  # less than any one of what was left out


def test_a_slow_loader_is_seen(model_dir, rows_file, monkeypatch):
    collate = Collator.__call__

    def slowly(self, rows):
        time.sleep(0.2)
        return collate(self, rows)

    monkeypatch.setattr(Collator, "__call__", slowly)
    throughput = Kept()
    fit(model_dir, rows_file, callbacks=[throughput], data={"micro_batch_size": 4})
    assert len(throughput.speeds) == 4
    for speed in throughput.speeds:
        assert 0.4 <= speed.waited < speed.seconds < speed.waited + 0.4  # two micro-batches a step


def test_a_second_fit_of_the_same_trainer_is_timed_anew(model_dir, rows_file):
    throughput = Kept()
    finetuner, _, trainer = fit(model_dir, rows_file, callbacks=[throughput])
    time.sleep(0.5)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(finetuner, trainer.datamodule)
    assert len(throughput.speeds) == 8
    for speed in throughput.speeds:
        assert speed.waited < speed.seconds < 0.5


def test_utilisation_is_explained_or_its_absence(model_dir, rows_file, tmp_path, capsys):
    fit(model_dir, rows_file, callbacks=[RunSummary(), Throughput()], logger=logger(tmp_path), max_steps=1)
    text = events(tmp_path).Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "mfu is left out: no peak is known of cpu, float32; set --throughput.peak_flops" in text
    assert "throughput/mfu" not in events(tmp_path).Tags()["scalars"]
    fit(model_dir, rows_file, callbacks=[RunSummary(), Throughput(PEAK)], max_steps=1)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("mfu = (", "·supervised tokens", "1e+11 FLOP/s a device (throughput.peak_flops)"):
        assert part in said


def test_a_peak_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"throughput.peak_flops is 0.*more than 0"):
        Throughput(0.0)


def test_no_step_waits_for_the_device(model_dir, rows_file, monkeypatch):
    """Between two reports the callback reads no tensor's value."""
    throughput, read = Kept(), []
    whole = Throughput.on_train_batch_end

    def watched(self, *args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "__float__", "__bool__", "__int__"):
                patch.setattr(torch.Tensor, name, lambda *_, name=name: read.append(name))
            whole(self, *args)

    monkeypatch.setattr(Throughput, "on_train_batch_end", watched)
    fit(model_dir, rows_file, callbacks=[throughput], log_every_n_steps=0)
    assert read == []
    assert throughput.speeds == []
    assert throughput._work.sequences == 26


def test_ranks_are_added_up():
    """Work adds up, times are averaged, of memory the largest counts; how far the ranks are apart is kept."""
    other = torch.tensor([100.0, 10.0, 1.0, 1e6, 4.0, 3.0, 2.0**40], dtype=torch.float64)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=lambda mine: torch.stack([mine, other]))
    clock, throughput = Clock(), Throughput()
    throughput.watch = Stopwatch(clock)
    throughput.watch.fetch_begins()
    clock.now = 1.0
    throughput.watch.fetch_ends()
    clock.now = 2.0
    throughput._work = _Work(200, 20, 2, 3_000_000)
    speed = throughput._speed(SimpleNamespace(strategy=strategy, world_size=2))
    assert (speed.tokens, speed.supervised, speed.sequences, speed.flops, speed.ranks) == (300, 30, 3, 4e6, 2)
    assert (speed.seconds, speed.waited) == (3.0, 2.0)
    assert speed.memory == {"peak_memory": 2.0**40}
    logged, mine = speed.metrics(None), speed.spread["peak_memory_gib_min"]
    assert 2**-5 < mine < 2**10  # of this process
    assert {name: logged[name] for name in logged if name.endswith(("_min", "_mean", "_max"))} == {
        "loader_wait_share_min": 0.5,
        "loader_wait_share_mean": 0.625,
        "loader_wait_share_max": 0.75,
        "peak_memory_gib_min": mine,
        "peak_memory_gib_mean": (mine + 2**10) / 2,
        "peak_memory_gib_max": 2**10,
    }
    assert throughput._work == _Work()
