"""What a run writes of its probe beside the distribution of p: against full logits, after a resume, and the page."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from harness import events, fit, logger
from tensorboard.plugins.custom_scalar import layout_pb2
from test_initial import FAST, logits_of
from test_step_weights import Share

from dft_lightning.callbacks import Checkpoints, Throughput, TokenProbabilities
from dft_lightning.callbacks.looks.change import pushes
from dft_lightning.callbacks.looks.probe import Probe
from dft_lightning.callbacks.looks.report import Seen
from dft_lightning.callbacks.looks.tally import P_EDGES, P_LABELS, POSITION_LABELS, Tally
from dft_lightning.callbacks.looks.writing import LAYOUT, write
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.token_classes import CLASSES, class_of
from dft_lightning.weighting import TokenStats

PICTURES = ("weights", "calibration", "positions", "solutions")


class Truth:
    """The probe's tokens by a model's full logits, in float64."""

    def __init__(self, model, rows):
        every = [logits_of(model, rows[index]) for index in range(len(rows))]
        whole = torch.cat(every)
        ids = [torch.from_numpy(rows[index]["input_ids"]) for index in range(len(rows))]
        masks = [torch.from_numpy(np.array(rows[index]["supervised"])) for index in range(len(rows))]
        self.targets = torch.cat([one[1:][mask[1:]] for one, mask in zip(ids, masks, strict=True)])
        self.positions = torch.cat([torch.arange(len(one)) for one in every])
        self.logp = whole.gather(1, self.targets[:, None])[:, 0]
        self.top_p = whole.amax(1).exp().numpy()
        self.right = (whole.argmax(1) == self.targets).numpy()
        self.p = self.logp.exp().numpy()


@pytest.fixture
def ran(model_dir, rows_file, tmp_path):
    """Reports after each of 4 steps, with pictures at first, after the third and at last; 16 rows in the probe."""
    callback = TokenProbabilities(1, pictures_every=3)
    data = {"micro_batch_size": 4, "max_length": 60}
    options = {"module": FAST, "data": data, "callbacks": [callback], "logger": logger(tmp_path)}
    finetuner, _, _ = fit(model_dir, rows_file, **options)
    before = Truth(load_model(ModelSource(str(model_dir))), callback._probe.rows)
    return events(tmp_path), before, Truth(finetuner.model, callback._probe.rows), callback


def last(found, tag):
    return found.Scalars(tag)[-1].value


def test_numbers_are_those_of_full_logits(ran):
    found, _, now, _ = ran
    bins = np.minimum((now.top_p * 10).astype(int), 9)
    error = sum(abs(now.right[bins == n].sum() - now.top_p[bins == n].sum()) for n in range(10)) / len(bins)
    assert last(found, "probe/calibration_error") == pytest.approx(error, rel=1e-3)
    weight = np.histogram(now.p, P_EDGES, weights=now.p)[0]  # of DFT
    logged = [last(found, f"probe_weight_by_p/{n:02d} {label}") for n, label in enumerate(P_LABELS)]
    assert logged == pytest.approx((100 * weight / weight.sum()).tolist(), rel=1e-3, abs=1e-6)
    classes = class_of(tiny_tokenizer()).numpy()[now.targets]
    for number, name in enumerate(CLASSES):
        own = now.p[classes == number]
        assert last(found, f"probe_weight_by_class/{name}") == pytest.approx(100 * own.sum() / now.p.sum(), rel=1e-3)
        if len(own):
            assert last(found, f"probe_p_by_class/{name}") == pytest.approx(own.mean(), rel=1e-3)
        else:
            assert f"probe_p_by_class/{name}" not in found.Tags()["scalars"]


def test_loss_and_p_by_position(ran):
    found, before, now, _ = ran
    low = 0
    for number, label in enumerate(POSITION_LABELS[:5]):
        high = 2**number
        own = ((now.positions >= low) & (now.positions < high)).numpy()
        for truth, when in ((before, 0), (now, -1)):
            logged = found.Scalars(f"probe_nll_by_position/{number:02d} {label}")[when].value
            assert logged == pytest.approx(-truth.logp[own].mean().item(), rel=1e-4)
            logged = found.Scalars(f"probe_p_by_position/{number:02d} {label}")[when].value
            assert logged == pytest.approx(truth.p[own].mean(), rel=1e-4)
        low = high


def text(found, when=-1):
    return found.Tensors("probe/pushed_tokens/text_summary")[when].tensor_proto.string_val[0].decode()


def test_pushed_tokens_are_those_of_full_logits(ran):
    found, before, now, callback = ran
    truth = pushes(now.targets, before.logp, now.logp)
    assert len(truth) > 5
    assert abs(truth[0].mean) > 0.01
    listed = re.findall(r"^\| (\S+) \| (\d+) \| (\S+) \| (\S+) to (\S+) \| (\d+) \|$", text(found), re.MULTILINE)
    by_id = {int(token): [float(number) for number in numbers] for _, token, *numbers in listed}
    up = [push for push in truth if push.mean > 0]
    assert {push.token for push in up[:10]} <= by_id.keys()
    for push in truth:
        if push.token in by_id:
            expected = [push.mean, push.mean - push.half_width, push.mean + push.half_width, push.count]
            assert by_id[push.token] == pytest.approx(expected, abs=1e-3)
    assert [event.step for event in found.Tensors("probe/pushed_tokens/text_summary")] == [1, 2, 3, 4]
    assert callback._texts[now.targets[0]] == tiny_tokenizer().decode([now.targets[0]])


def test_pictures_are_there_at_their_steps(ran):
    found, *_ = ran
    for name in PICTURES:
        assert [event.step for event in found.Images(f"probe_pictures/{name}")] == [0, 3, 4], name
    assert [event.step for event in found.Images("probe_pictures/pushed_tokens")] == [3, 4]
    assert [event.step for event in found.Images("probe/token_probabilities")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"figure": False}, {"pictures_every": 0}])
def test_pictures_can_be_left_out(model_dir, rows_file, tmp_path, options):
    fit(model_dir, rows_file, callbacks=[TokenProbabilities(4, **options)], logger=logger(tmp_path))
    images = events(tmp_path).Tags()["images"]
    assert images == ([] if "figure" in options else ["probe/token_probabilities"])


def test_every_chart_of_the_page_has_values(model_dir, rows_file, tmp_path):
    """And the page is written once, a chart for each entry."""
    callbacks = [TokenProbabilities(2), Throughput()]
    data = {"micro_batch_size": 4, "val_size": 6}
    fit(model_dir, rows_file, data=data, callbacks=callbacks, logger=logger(tmp_path), val_check_interval=2)
    found = events(tmp_path)
    (event,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    shown = {
        (category.title, chart.title): list(chart.multiline.tag)
        for category in layout.category
        for chart in category.chart
    }
    assert shown == {(c, t): tags for c, charts in LAYOUT.items() for t, (_, tags) in charts.items()}
    tags = found.Tags()["scalars"]
    for patterns in shown.values():
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in tags), pattern


def test_a_resumed_run_ends_with_the_same_numbers(model_dir, rows_file, tmp_path):
    """What it is compared with is step 0 also where the whole run is made longer, and with it the rows it reads."""
    for folder, stages in (("whole", [4]), ("cut", [2, 4])):
        for steps in stages:
            callbacks = [TokenProbabilities(1, probe_rows=4, pictures_every=0), Checkpoints()]
            path = tmp_path / folder / "checkpoints" / "last.ckpt"
            fit(
                model_dir,
                rows_file,
                module=FAST,
                data={"micro_batch_size": 4, "val_size": 4},
                max_steps=steps,
                callbacks=callbacks,
                logger=logger(tmp_path / folder),
                default_root_dir=tmp_path / folder,
                enable_checkpointing=True,
                ckpt_path=path if path.exists() else None,
            )
    whole, cut = events(tmp_path / "whole"), events(tmp_path / "cut")
    for tag in whole.Tags()["scalars"]:
        if tag.startswith(("probe", "trained")):
            ours, theirs = ([(e.step, e.value) for e in found.Scalars(tag)] for found in (cut, whole))
            assert ours == theirs, tag
    assert text(cut) == text(whole)


def test_a_longer_run_keeps_its_probe(model_dir, rows_file, tmp_path):
    """Without validation rows the probe is of the rows that the run reads: more, where it is longer."""
    kept = []
    for steps in (2, 4):
        callback = TokenProbabilities(1, probe_rows=5, figure=False)
        path = tmp_path / "checkpoints" / "last.ckpt"
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "logger": logger(tmp_path)}
        options |= {"callbacks": [callback, Checkpoints()], "ckpt_path": path if path.exists() else None}
        fit(model_dir, rows_file, module=FAST, max_steps=steps, **options)
        kept.append((callback._probe.sources, callback.start.logp.tolist(), callback.start.step))
    assert kept[0] == kept[1]


def test_another_probe_is_compared_with_where_it_began(model_dir, rows_file, tmp_path, recwarn):
    first, second = (TokenProbabilities(1, figure=False) for _ in range(2))
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "logger": logger(tmp_path)}
    fit(model_dir, rows_file, max_steps=1, callbacks=[first, Checkpoints()], **options)
    state = first.state_dict()
    second.load_state_dict(state | {"probe": "of other rows"})
    path = tmp_path / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    key = next(name for name in stored["callbacks"] if name.startswith("TokenProbabilities"))
    stored["callbacks"][key] = second.state_dict()
    torch.save(stored, path)
    fit(model_dir, rows_file, max_steps=2, callbacks=[second], ckpt_path=path, **options)
    assert second.start.step == 1
    assert any("the probe has other rows by now" in str(warning.message) for warning in recwarn)


class Doubled:
    """A strategy of two ranks that see the same."""

    @staticmethod
    def reduce(values, reduce_op):
        assert reduce_op == "sum"
        Doubled.messages += 1
        return 2 * values


def test_one_message_brings_all_ranks_together():
    Doubled.messages = 0
    given = TokenStats(
        logp=torch.tensor([-1.0, -2.0]),
        target=torch.tensor([0, 1]),
        sequence=torch.tensor([0, 0]),
        position=torch.tensor([0, 1]),
        weight=torch.tensor([0.5, 1.0]),
    )
    one, other = Tally.of(given, torch.tensor([1])), Tally.of(given[:1], torch.tensor([1]))
    kl = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=torch.float64)
    trainer = type("Trainer", (), {"strategy": Doubled})()
    for trained in (None, other):
        for known in (None, kl):
            seen = Seen(one, torch.arange(5).double(), trained, known).together(trainer)
            for ours, theirs in zip(seen.probe.tensors(), one.tensors(), strict=True):
                assert torch.equal(ours, 2 * theirs)
            assert seen.logp.tolist() == [0, 2, 4, 6, 8]
            assert (seen.trained is None) == (trained is None)
            assert (seen.kl is None) == (known is None)
            if trained is not None:
                assert torch.equal(seen.trained.sums, 2 * other.sums)
            assert seen.kl_initial == (None if known is None else 0.5)
    assert Doubled.messages == 4


def test_every_rank_puts_its_tokens_at_their_places(model_dir, rows_file):
    """Batches in any order, with rows from anywhere; other places stay zero."""
    callback = TokenProbabilities(4, probe_rows=7, figure=False)
    fit(model_dir, rows_file, data={"micro_batch_size": 2}, callbacks=[callback], max_steps=1)
    probe = callback._probe
    assert len(probe.batches) > 2
    ids = probe.spread([batch.target for batch in probe.batches])
    assert torch.equal(ids.long(), probe.targets())
    assert torch.equal(probe.spread([b.position for b in probe.batches]).long(), probe.positions())
    halves = [Probe(probe.rows, probe.batches[start::2]) for start in (1, 0)]
    parts = [half.spread([batch.target for batch in half.batches]) for half in halves]
    assert torch.equal(sum(parts), ids)
    assert not (parts[0] * parts[1]).any()


def test_weights_that_are_all_zero_have_no_shares(tmp_path):
    """As those of a target over the vocabulary."""
    given = TokenStats(
        logp=torch.tensor([-1.0]), target=torch.tensor([0]), sequence=torch.tensor([0]), weight=torch.zeros(1)
    )
    into = logger(tmp_path)
    tally = Tally.of(given, torch.tensor([1]), torch.tensor([3], dtype=torch.uint8))
    write(into.experiment, "probe", tally, 0)
    into.save()
    tags = events(tmp_path).Tags()["scalars"]
    assert not [tag for tag in tags if "weight_by" in tag]
    assert f"probe_p_by_class/{CLASSES[3]}" in tags


def test_weightings_of_step_scope_have_everything(model_dir, rows_file, tmp_path):
    callback = TokenProbabilities(2, probe_rows=6, pictures_every=1)
    data = {"micro_batch_size": 2, "packing": True, "max_length": 120}
    module = FAST | {"attn_implementation": "varlen"}
    fit(
        model_dir,
        rows_file,
        Share(),
        module=module,
        data=data,
        callbacks=[callback],
        logger=logger(tmp_path),
        max_steps=2,
    )
    found = events(tmp_path)
    assert {f"probe_pictures/{name}" for name in PICTURES} <= set(found.Tags()["images"])
    assert last(found, "probe/weight_mean") == pytest.approx(1.0, rel=1e-5)
    assert last(found, "probe/kl_initial") > 0


COMMON = ("probe", "trained", "val/", "train/")


@pytest.mark.slow
def test_two_ranks_are_one(model_dir, rows_file, tmp_path):
    """Five rows of the probe over two ranks in micro-batches of two: unequal, and one batch is empty."""
    command = [sys.executable, "-m", "dft_lightning", "fit", "--trainer.accelerator", "cpu", "--model.weighting", "DFT"]
    command += ["--model.model_name", str(model_dir), "--data", "NuminaMathDataModule", "--data.path", str(rows_file)]
    command += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5", "--data.global_batch_size", "8"]
    command += ["--data.micro_batch_size", "2", "--data.max_length", "200", "--trainer.max_steps", "3"]
    command += ["--token_probabilities.every_n_steps", "2", "--token_probabilities.probe_rows", "5"]
    command += ["--export.enabled", "false", "--checkpoints.save_best", "false", "--data.val_size", "5"]
    for name in ("one", "ddp", "fsdp2"):
        ranks = [] if name == "one" else ["--trainer.devices", "2", "--trainer.strategy", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *ranks, "--run_dir", name], check=True, cwd=tmp_path, env=environment, timeout=300)
    one = events(tmp_path / "one")
    assert last(one, "probe/kl_initial") > 1e-3
    for name in ("ddp", "fsdp2"):
        (_,) = (tmp_path / name / "tensorboard").glob("events*")  # of one writer
        assert_same_looks(one, events(tmp_path / name))


def assert_same_looks(one, two):
    """Scalars of all ranks' tokens to rounding, how many tokens lie where exactly, and the same pictures."""
    tags = [tag for tag in one.Tags()["scalars"] if tag.startswith(COMMON)]
    assert len(tags) > 120
    assert sorted(tags) == sorted(t for t in two.Tags()["scalars"] if t.startswith(COMMON))
    for tag in tags:
        for ours, theirs in zip(two.Scalars(tag), one.Scalars(tag), strict=True):
            assert ours.value == pytest.approx(theirs.value, rel=1e-4, abs=1e-6), (tag, ours.step)
    for tag in one.Tags()["histograms"]:
        for ours, theirs in zip(two.Histograms(tag), one.Histograms(tag), strict=True):
            assert ours.histogram_value.bucket == theirs.histogram_value.bucket, (tag, ours.step)
            assert ours.histogram_value.num == theirs.histogram_value.num > 0
    assert len(one.Tags()["histograms"]) == 8
    assert set(one.Tags()["histograms"]) == set(two.Tags()["histograms"])
    assert one.Tags()["images"] == two.Tags()["images"]
    first, second = ([float(number) for number in re.findall(r"[-+]?\d+\.?\d*", text(found))] for found in (one, two))
    assert first == pytest.approx(second, abs=2e-3)
    assert len(first) > 10
    assert {f"throughput/{what}_{of}" for what in ("peak_memory_gib", "loader_wait_share") for of in OF_RANKS} <= set(
        two.Tags()["scalars"]
    )


OF_RANKS = ("min", "mean", "max")
