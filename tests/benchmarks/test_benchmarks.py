"""What the benchmarks conclude from their measurements: exponents, agreement of losses, ratios, memory, tokens/s."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import sums, write_jsonl

from dft_lightning.data.packing import Packed
from dft_lightning.data.steps import Geometry, StepSampler

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scaling
import step_vs_peers as versus
from peers import meter

SIZES = [1 << power for power in range(10, 18)]
EPS = 2.0**-7  # of bfloat16


def measured(law):
    return [{"seconds": law(size), "bytes": 1000 * size} for size in SIZES]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.7])
def test_the_exponent_of_a_power_is_that_power(power):
    assert scaling.exponent(SIZES, [3e-6 * size**power for size in SIZES]) == pytest.approx(power, abs=1e-12)


def test_noise_that_leans_neither_way_leaves_the_exponent_alone():
    noise = [1.1, 0.9, 0.9, 1.1, 1.1, 0.9, 0.9, 1.1]  # orthogonal to 1 and to the place, up to 1 %
    assert scaling.exponent(SIZES, [size * one for size, one in zip(SIZES, noise, strict=True)]) == pytest.approx(
        1, abs=0.01
    )


def test_a_quadratic_law_is_not_called_linear():
    assert "| 2.00 | 2.00 | 1.00 | NOT linear |" in scaling.table_row("x", SIZES, measured(lambda n: 1e-9 * n * n))
    assert "| 1.00 | 1.00 | 1.00 | linear |" in scaling.table_row("x", SIZES, measured(lambda n: 1e-6 * n))
    hidden = scaling.table_row("x", SIZES, measured(lambda n: 1e-2 + 1e-12 * n * n))
    assert "NOT linear" not in hidden
    assert float(hidden.split("|")[6]) > 0.5  # the largest three show it: a quarter of the time is quadratic by then


def test_the_plan_that_is_timed_deals_out_every_row():
    lengths = scaling.some_lengths(500)
    sampler = StepSampler(lengths, Geometry(64, 1), 0, Packed(scaling.CAPACITY))
    assert scaling.plan(500, 64)() == len(sampler) > 8
    assert sorted(one for batch in sampler for row in batch for one in row) == list(range(500))
    assert lengths.max() <= scaling.CAPACITY < scaling.some_lengths(1 << 14).astype(int).sum()


def test_the_rows_that_are_tokenised_are_those_of_the_file_over_and_over(tmp_path, model_dir):
    rows = sums(5)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    found = pq.read_table(scaling.write_rows(12, str(tmp_path / "own.parquet"), tmp_path)).to_pylist()
    assert [row["problem"] for row in found] == [rows[index % 5]["problem"] for index in range(12)]
    run = scaling.tokenising(12, str(tmp_path / "own.parquet"), str(model_dir))
    assert run() == run() == 12
    assert scaling.tokenising(12, None, str(model_dir))() == 12


def test_the_loss_head_that_is_timed_makes_both_gradients(monkeypatch):
    kept = []
    original = scaling.weighted_nll
    monkeypatch.setattr(scaling, "weighted_nll", lambda *given: (kept.extend(given[:2]), original(*given))[1])
    run = scaling.head(32, 64)
    run()
    first = [one.grad.clone() for one in kept]
    run()
    assert [one.shape for one in first] == [(32, scaling.WIDTH), (64, scaling.WIDTH)]
    assert all(one.abs().sum() > 0 for one in first)
    assert all(torch.equal(one.grad, then) for one, then in zip(kept[2:], first, strict=True))  # not added up


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be forgotten")
def test_memory_is_the_peak_above_what_was_there():
    size = 64 << 20

    def run():
        np.ones(size, np.uint8).sum()

    np.ones(3 * size, np.uint8).sum()  # an earlier and higher peak is forgotten
    found = scaling.measure(run, 2, run)
    pages = 1 << 20  # that others give back meanwhile
    assert size - pages <= found["bytes"] < 1.2 * size  # what else a sum allocates is less than a fifth of 64 MiB


def test_the_meter_counts_tokens_of_the_steps_after_the_warm_up(monkeypatch, tmp_path):
    clock = iter([10.0, 20.0, 22.0, 24.0])  # slow first steps
    watch = meter.Meter(2)
    watch.loaded(torch.nn.Linear(2, 2))
    cores = iter([7.0, 8.0, 8.5, 9.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(meter.time, "process_time", lambda: next(cores))
    for _ in range(4):
        watch.step_done()
    watch.write(tmp_path / "found.json", [1000, 1000, 30, 50])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["seconds"], found["tokens_per_s"], found["tokens_per_cpu_s"]) == (4.0, 20.0, 80.0)
    with pytest.raises(ValueError, match="4 steps were done, 3 expected"):
        watch.write(tmp_path / "found.json", [1000, 30, 50])


def test_losses_that_differ_by_rounding_agree():
    ours = [1.5, 1.4, 9.9]
    assert versus.check_losses(ours, [1.5 * (1 + 0.9 * EPS), 1.4, 1.0], 2, "bfloat16") == pytest.approx(
        0.9 * EPS, rel=0.01
    )
    assert (
        versus.check_losses(ours, [1.5, 1.4 / (1 + 1.8 * EPS), 1.0], 2, "bfloat16") > EPS
    )  # one more update's rounding


@pytest.mark.parametrize(
    ("peer", "dtype", "match"),
    [
        ([1.5 * 0.11, 1.4], "bfloat16", "loss of step 1"),  # DFT for SFT
        ([1.5 * (1 + 1.1 * EPS), 1.4], "bfloat16", "step 1 .* apart by 0.8"),
        ([1.5, 1.4 * (1 - 2.2 * EPS)], "bfloat16", "loss of step 2"),
        ([1.5 * (1 + 1e-3), 1.4], "float32", "loss of step 1"),  # within bfloat16's rounding, not within float32's
        ([float("nan"), 1.4], "bfloat16", "loss of step 1"),
        ([1.5], "bfloat16", "1 of the peer's"),
    ],
)
def test_another_loss_is_refused(peer, dtype, match):
    with pytest.raises(versus.DisagreementError, match=match):
        versus.check_losses([1.5, 1.4], peer, 2, dtype)


def test_ratios_are_of_neighbours_and_the_median_is_of_ratios():
    def run(held, speed, cores):
        return {"bytes": held, "tokens_per_s": speed, "tokens_per_cpu_s": speed / cores}

    pairs = [
        (run(1, 100, 2), run(4, 50, 1)),
        (run(1, 300, 2), run(2, 100, 1)),
        (run(1, 10, 2), run(1, 1, 1)),
    ]
    assert versus.ratios(pairs, "tokens_per_s") == (3.0, [2.0, 3.0, 10.0])
    assert versus.ratios(pairs, "bytes") == (0.5, [0.25, 0.5, 1.0])
    assert "| 100 | 50 | 3.00 | 2.00 3.00 10.00 | 1.50 |" in versus.table_row("dft", "fast", pairs, 0.0)


def test_the_peer_gets_the_same_tokens_and_masks_in_the_same_steps(tmp_path, model_dir, rows_file):
    options = argparse.Namespace(path=str(rows_file), max_length=200, steps=3, rows=4)
    rows, source_rows = versus.take_rows(options, str(model_dir))
    assert (len(rows), source_rows) == (12, 12)
    versus.write_rows(rows, 4, tmp_path / "rows.jsonl")
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for start in range(0, 12, 4):
        step, own = written[start : start + 4], [rows[index] for index in range(start, start + 4)]
        lengths = [len(row["input_ids"]) for row in step]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(row["input_ids"] for row in step) == sorted(row["input_ids"].tolist() for row in own)
        assert sum(one != -100 for row in step for one in row["labels"]) == sum(
            int(row["supervised"].sum()) for row in own
        )
        assert all(
            label in (-100, one) for row in step for one, label in zip(row["input_ids"], row["labels"], strict=True)
        )


def test_too_few_rows_end_the_benchmark(model_dir, rows_file):
    options = argparse.Namespace(path=str(rows_file), max_length=200, steps=9, rows=4)
    with pytest.raises(SystemExit, match="26 usable rows, 36 are needed"):
        versus.take_rows(options, str(model_dir))


def test_a_failed_run_ends_the_benchmark_with_its_words(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such trainer')"]
    with pytest.raises(SystemExit, match=r"TRL failed \(1\):\s+no such trainer"):
        versus._measured("TRL", command, tmp_path / "none.json", {})


@pytest.mark.slow
def test_our_side_is_dft_fit_with_the_first_loss_of_the_model_itself(tmp_path, model_dir):
    """Both losses of step 1 against the dense formula on the rows that the peer is given."""
    path = write_jsonl(tmp_path / "rows.jsonl", sums(12))
    options = argparse.Namespace(path=str(path), max_length=200, steps=3, rows=4, dtype="float32", device="cpu")
    options.lr, options.warmup, options.ours = 1e-3, 1, versus.PADDING_FREE
    rows, source_rows = versus.take_rows(options, str(model_dir))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    logp = []
    for row in (rows[index] for index in range(4)):
        ids = torch.tensor(row["input_ids"])
        all_of_them = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        logp.append(all_of_them[torch.tensor(row["supervised"][1:])])
    logp = torch.cat(logp).detach()
    for loss, expected in (("nll", -logp.mean()), ("dft", -(logp.exp() * logp).mean())):
        found = versus.run_ours(options, str(model_dir), loss, source_rows)
        assert len(found["losses"]) == 3
        versus.check_losses(found["losses"], [float(expected)], 1, "float32")
        assert found["tokens_per_s"] == pytest.approx(float(rows.lengths[4:].sum()) / found["seconds"])
