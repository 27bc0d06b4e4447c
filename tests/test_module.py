"""Steps of real runs: the gradient is that of the formula, and does not depend on how a step is cut up."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import sums, write_jsonl
from harness import fit

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import LoRA
from dft_lightning.weighting import DFT, ImportanceWeighted, TokenWeighting, Uniform


@dataclass(frozen=True)
class Sentence(TokenWeighting):
    """A user's weighting of sequence scope."""

    scope = "sequence"

    def weights(self, tokens):
        return tokens.sequence_mean(tokens.logp).exp()


WEIGHTINGS = [Uniform(), DFT(), DFT(0.1), ImportanceWeighted(), ImportanceWeighted(level="token"), Sentence()]


def relative(ours, truth):
    return float((ours - truth).norm() / truth.norm())


def oracle(model_dir, rows_file, weighting, normalize="tokens", dtype=torch.float64, micro=8):
    """Loss and gradient of the first step, from the rows, by the model's own full logits."""
    data = NuminaMathDataModule(str(rows_file), global_batch_size=8, micro_batch_size=micro, max_length=200)
    finetuner = FineTuner(str(model_dir), weighting)
    data.tokenizer = finetuner.tokenizer
    data.prepare_data()
    data.setup("fit")
    model = load_model(ModelSource(str(model_dir), dtype))
    loaded = list(data.train_dataloader())[: 8 // micro]
    total, units = 0.0, 0
    for batch in loaded:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.supervised].double()
        logp = logits.log_softmax(1).gather(1, batch.target[:, None])[:, 0]
        counts = torch.bincount(batch.sequence)
        weight = weight_by_hand(weighting, logp.detach(), batch.sequence, counts)
        each = {"tokens": 1.0, "sequences": 1.0 / counts.double()[batch.sequence], "micro_batch": 1.0 / len(logp)}[
            normalize
        ]
        units += {"tokens": len(logp), "sequences": len(counts), "micro_batch": 1}[normalize]
        loss = (each * weight * -logp).sum()
        loss.backward()  # of the sum: the division comes last, as the norms of transformers round to float32 in between
        total += loss.item()
    return total / units, torch.cat([p.grad.flatten().double() for p in model.parameters()]) / units


def weight_by_hand(weighting, logp, sequence, counts):
    if isinstance(weighting, DFT):
        return logp.exp().clamp(min=weighting.floor)
    if isinstance(weighting, Sentence):
        return (logp.new_zeros(len(counts)).index_add_(0, sequence, logp) / counts).exp()[sequence]
    return torch.ones_like(logp)  # importance weights are 1 before the first step


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "micro_batch"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_the_first_step_is_the_formula(model_dir, rows_file, weighting, normalize):
    """In float64 to 1e-10, in float32 to 1e-5: rounding of a sum over a few hundred tokens and two layers."""
    loss, gradient = oracle(model_dir, rows_file, weighting, normalize, micro=4)
    for precision, bound in (("64-true", 1e-10), ("32-true", 1e-5)):
        _, recorder, _ = fit(
            model_dir,
            rows_file,
            weighting,
            module={"normalize": normalize},
            data={"micro_batch_size": 4},
            precision=precision,
            max_steps=1,
        )
        assert recorder.logged[0]["train/objective"] == pytest.approx(loss, rel=max(bound, 1e-6))
        assert relative(recorder.gradients[0], gradient) < bound


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_how_a_step_is_cut_up_changes_nothing(model_dir, rows_file, weighting, normalize):
    """Traps 1, 2, 3 and 17: micro-batch size, grouping, the shorter last step; before and after clipping.

    Bound: 1e-5 relative L2 is some hundred units of float32 rounding, for sums in another order over 26 rows of very
    unequal length; a mean of micro-batch means is off by more than 1e-2 here.
    """

    def run(micro, grouping="length", clip=None):
        data = {"micro_batch_size": micro, "grouping": grouping}
        return fit(model_dir, rows_file, weighting, module={"normalize": normalize}, data=data, gradient_clip_val=clip)[
            1
        ]

    half = min(float(gradient.norm()) for gradient in run(8).gradients) / 2
    for clip in (None, half):
        whole = run(8, clip=clip)
        assert len(whole.gradients) == 4  # 26 rows: three steps of 8, and one of 2
        for other in (run(4, clip=clip), run(3, "plain", clip), run(1, clip=clip)):
            for ours, truth in zip(other.gradients, whole.gradients, strict=True):
                assert relative(ours, truth) < 1e-5
            for mine, theirs in zip(other.logged, whole.logged, strict=True):
                for name in ("objective", "nll", "p_mean", "weight_mean", "effective_sample_size", "grad_norm"):
                    assert mine[f"train/{name}"] == pytest.approx(theirs[f"train/{name}"], rel=2e-5), name
        if clip:
            for gradient, logged in zip(whole.gradients, whole.logged, strict=True):
                norm = logged["train/grad_norm"]  # before clipping; torch divides by the norm + 1e-6
                assert norm > clip
                assert gradient.norm() == pytest.approx(clip * norm / (norm + 1e-6), rel=1e-5)


def test_the_papers_normaliser_depends_on_the_micro_batch_size(model_dir, rows_file):
    """That is what `micro_batch` is for, and why it is not the default."""
    runs = [
        fit(model_dir, rows_file, module={"normalize": "micro_batch"}, data={"micro_batch_size": micro}, max_steps=1)[1]
        for micro in (8, 2)
    ]
    assert relative(runs[1].gradients[0], runs[0].gradients[0]) > 1e-2


def test_clipping_by_value(model_dir, rows_file):
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    plain, clipped = (fit(model_dir, rows_file, max_steps=1, **more)[1] for more in ({}, clip))
    assert torch.allclose(clipped.gradients[0], plain.gradients[0].clamp(-1e-3, 1e-3))
    assert clipped.logged[0]["train/grad_norm"] == plain.logged[0]["train/grad_norm"]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_norm_is_that_of_float64_whatever_the_precision(model_dir, rows_file, clip):
    """A norm in bfloat16 would be off by up to 2⁻⁹, and so would everything that is clipped by it."""
    runs = [
        fit(model_dir, rows_file, max_steps=1, precision="bf16-true", gradient_clip_val=value)[1]
        for value in (None, clip)
    ]
    norm = float(runs[0].gradients[0].norm())
    assert runs[1].logged[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    if clip:  # each entry is rounded, their norm is not
        assert float(runs[1].gradients[0].norm()) == pytest.approx(clip, rel=2e-4)


def test_fast_dev_run_does_whole_steps(model_dir, rows_file):
    _, recorder, trainer = fit(model_dir, rows_file, data={"micro_batch_size": 2}, fast_dev_run=2)
    assert (trainer.global_step, len(recorder.gradients)) == (2, 2)
    truth = fit(model_dir, rows_file, data={"micro_batch_size": 8}, max_steps=1)[1]
    assert relative(recorder.gradients[0], truth.gradients[0]) < 1e-5


def test_every_step_is_logged_with_what_happened(model_dir, rows_file):
    _, recorder, _ = fit(model_dir, rows_file, DFT(0.1))
    assert len(recorder.logged) == 4
    for logged in recorder.logged:
        assert set(logged) == {
            f"train/{name}"
            for name in (
                "objective",
                "nll",
                "p_mean",
                "weight_mean",
                "effective_sample_size",
                "grad_norm",
                "lr",
                "skipped_steps",
            )
        }
        assert logged["train/weight_mean"] > 0.1
        assert logged["train/nll"] > logged["train/objective"]
        assert 0 < logged["train/effective_sample_size"] <= 1


def test_the_schedule_is_cosine_to_zero_after_a_warm_up_from_zero(model_dir, rows_file):
    _, recorder, _ = fit(
        model_dir, rows_file, data={"global_batch_size": 2, "micro_batch_size": 2}, module={"warmup_ratio": 0.2}
    )
    rates = [logged["train/lr"] for logged in recorder.logged]
    assert len(rates) == 13
    assert rates[0] == 0.0
    assert rates[2] == pytest.approx(0.01)  # int(0.2 · 13) = 2 steps of warm-up
    assert rates[5] == pytest.approx(0.005 * (1 + np.cos(np.pi * 3 / 11)), rel=1e-5)


class TestValidation:
    def fit(self, model_dir, rows_file, tmp_path, micro, **more):
        val = write_jsonl(tmp_path / "val.jsonl", sums(11, seed=5))
        _, _, trainer = fit(
            model_dir, rows_file, data={"val_path": str(val), "micro_batch_size": micro}, max_steps=2, **more
        )
        return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}

    def test_means_are_over_tokens_whatever_the_batches(self, model_dir, rows_file, tmp_path):
        """Trap 14: the last batch is uneven."""
        more = {"val_check_interval": 2}
        four, eleven = (self.fit(model_dir, rows_file, tmp_path, micro, **more) for micro in (4, 8))
        assert set(four) == {
            f"val/{name}" for name in ("objective", "nll", "p_mean", "top1", "weight_mean", "effective_sample_size")
        }
        for name, value in four.items():
            assert value == pytest.approx(eleven[name], rel=1e-5), name

    def test_the_interval_counts_optimizer_steps(self, model_dir, rows_file, tmp_path):
        assert self.fit(model_dir, rows_file, tmp_path, 2, val_check_interval=2)
        assert not self.fit(model_dir, rows_file, tmp_path, 2, val_check_interval=3)


class TestReference:
    def test_at_the_start_iw_sft_is_sft_to_the_bit_with_the_adapter_off(self, model_dir, rows_file):
        runs = [
            fit(model_dir, rows_file, weighting, module={"lora": LoRA(rank=4)}, max_steps=1)[1]
            for weighting in (Uniform(), ImportanceWeighted(), ImportanceWeighted(level="token"))
        ]
        for run in runs[1:]:
            assert torch.equal(run.gradients[0], runs[0].gradients[0])
            assert run.logged[0]["train/weight_mean"] == 1.0

    @pytest.mark.parametrize("level", ["sequence", "token"])
    def test_from_the_cache_within_rounding(self, model_dir, rows_file, level):
        """The cache is filled in batches of another shape, so log p differs by rounding: float32, 1e-5."""
        plain = fit(model_dir, rows_file, Uniform(), max_steps=1)[1]
        cached = fit(model_dir, rows_file, ImportanceWeighted(level=level), max_steps=1, data={"micro_batch_size": 3})[
            1
        ]
        assert cached.logged[0]["train/weight_mean"] == pytest.approx(1.0, abs=1e-5)
        assert relative(cached.gradients[0], plain.gradients[0]) < 1e-5

    def test_the_cache_holds_the_rows_of_the_run_and_is_used_again(self, model_dir, rows_file, tmp_path):
        def run():
            _, recorder, trainer = fit(model_dir, rows_file, ImportanceWeighted(), max_steps=2)
            return trainer.datamodule.reference["train"], recorder

        (values, first), (again, second) = run(), run()
        assert len(values) == 16  # two steps of eight, of 26 rows
        assert values.folder == again.folder
        assert [*(tmp_path / "cache" / "reference").iterdir()] == [values.folder]
        assert torch.equal(first.gradients[1], second.gradients[1])
        with pytest.raises(KeyError, match="not in the reference cache"):
            values[10_000]

    def test_another_model_under_the_same_name_gets_another_cache(self, model_dir, rows_file, tmp_path):
        import shutil

        folder = shutil.copytree(model_dir, tmp_path / "model")
        fit(folder, rows_file, ImportanceWeighted(), max_steps=1)
        model = load_model(ModelSource(str(folder)))
        with torch.no_grad():
            model.lm_head.weight[5, 5] += 0.25
        model.save_pretrained(folder)
        _, recorder, _ = fit(folder, rows_file, ImportanceWeighted(), max_steps=1)
        assert len([*(tmp_path / "cache" / "reference").iterdir()]) == 2
        assert recorder.logged[0]["train/weight_mean"] == pytest.approx(1.0, abs=1e-5)

    def test_the_reference_stays_while_the_model_moves(self, model_dir, rows_file):
        fast = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "warmup_ratio": 0.0}
        for more in ({}, {"lora": LoRA(rank=4)}):
            _, recorder, _ = fit(model_dir, rows_file, ImportanceWeighted(), module=fast | more)
            assert abs(recorder.logged[-1]["train/weight_mean"] - 1.0) > 0.01

    def test_validating_a_trained_model_compares_with_the_initial_one(self, model_dir, rows_file, tmp_path):
        """Not with itself: right after a fit, and from a checkpoint."""
        val = write_jsonl(tmp_path / "val.jsonl", sums(5, seed=5))
        fast = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "warmup_ratio": 0.0}
        finetuner, _, trainer = fit(
            model_dir, rows_file, ImportanceWeighted(), module=fast, data={"val_path": str(val)}, max_steps=3
        )
        (after,) = trainer.validate(finetuner, trainer.datamodule, verbose=False)
        assert abs(after["val/weight_mean"] - 1.0) > 0.01
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        back = FineTuner.load_from_checkpoint(tmp_path / "x.ckpt")
        (again,) = trainer.validate(back, trainer.datamodule, verbose=False)
        assert again["val/weight_mean"] == pytest.approx(after["val/weight_mean"], rel=1e-6)


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
    def test_positions_are_not_rounded(self, model_dir, rows_file, precision):
        """Rotary frequencies in bfloat16 are wrong positions, by radians after some hundred tokens."""
        finetuner, _, _ = fit(model_dir, rows_file, DFT(), max_steps=1, precision=precision)
        loaded = load_model(ModelSource(str(model_dir)))
        buffers = dict(loaded.named_buffers())
        assert any("inv_freq" in name for name in buffers)
        for name, buffer in finetuner.model.named_buffers():
            assert buffer.dtype == buffers[name].dtype
            assert torch.equal(buffer, buffers[name]), name

    def test_what_is_exported_gives_the_same_logits_in_bfloat16(self, model_dir, rows_file, tmp_path):
        finetuner, _, _ = fit(model_dir, rows_file, DFT(), max_steps=2, precision="bf16-true")
        finetuner.model.save_pretrained(tmp_path / "export")
        exported = load_model(ModelSource(str(tmp_path / "export"), torch.bfloat16)).eval()
        ids = torch.arange(3, 200)[None]
        with torch.no_grad():
            live = finetuner.model.eval()(ids, use_cache=False).logits
            assert torch.equal(live, exported(ids, use_cache=False).logits)

    @pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
    def test_statistics_stay_in_float32(self, model_dir, rows_file, precision):
        """The weights are rounded to bfloat16 (8 bits), so log p moves by a few 2⁻⁸; a statistic in bf16 would show."""
        exact = fit(model_dir, rows_file, DFT(), max_steps=1)[1].logged[0]
        finetuner, recorder, _ = fit(model_dir, rows_file, DFT(), max_steps=1, precision=precision)
        assert finetuner.trained_on.logp.dtype == torch.float32
        assert finetuner.trained_on.weight.dtype == torch.float32
        for name in ("nll", "p_mean", "objective"):
            value = recorder.logged[0][f"train/{name}"]
            assert value == pytest.approx(exact[f"train/{name}"], rel=2**-5)
            assert torch.tensor(value).bfloat16().item() != value, "rounded to bfloat16 on its way to the log"
        assert finetuner.model.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)

    def test_cached_references_are_not_rounded_on_the_way(self, model_dir, rows_file):
        """Lightning would cast the floating-point tensors of a batch to the run's precision."""
        seen = []

        class Look(ImportanceWeighted):
            def weights(self, tokens):
                seen.append(tokens.ref_logp)
                return super().weights(tokens)

        fit(model_dir, rows_file, Look(), max_steps=1, precision="bf16-true")
        got = seen[-1]
        assert got.dtype == torch.float32
        assert not torch.equal(got, got.bfloat16().float())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"weighting": type("Mean", (TokenWeighting,), {"weights": lambda s, t: t.p / t.p.mean()})()},
                "decorate it",
            ),
            ({"reference": "adapter_off"}, "there is no adapter"),
            ({"warmup_ratio": 1.0}, "expected a share"),
        ],
    )
    def test_options(self, model_dir, options, message):
        with pytest.raises((UserError, ValueError), match=message):
            FineTuner(str(model_dir), **({"weighting": DFT()} | options))

    def test_a_weighting_that_looks_further_than_it_says(self, model_dir):
        @dataclass(frozen=True)
        class Mean(TokenWeighting):
            def weights(self, tokens):
                return tokens.p / tokens.p.mean()

        with pytest.raises(UserError, match="declare `scope = 'step'`"):
            FineTuner(str(model_dir), Mean())

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"accumulate_grad_batches": 2}, "leave it out"),
            ({"data": {"drop_last": True, "global_batch_size": 99}}, "do not fill one step"),
            ({"module": {"lr_schedule": "zigzag"}}, "model.lr_schedule is 'zigzag'"),
            ({"max_epochs": -1}, "the run has no end"),
            ({"gradient_clip_val": -1.0}, "expected 0 or more"),
            ({"limit_train_batches": 3}, "would cut optimizer steps: use data.num_samples, or trainer.max_steps"),
            ({"overfit_batches": 2}, "would cut optimizer steps"),
            ({"val_check_interval": "00:00:00:05"}, "val_check_interval is a time"),
            ({"val_check_interval": 1000}, "is 1000 optimizer steps, an epoch has 4"),
            ({"data": {"num_workers": -1}}, "data.num_workers is -1"),
            ({"data": {"packing": "yes"}}, "data.packing is 'yes'; expected true, false or padding_free"),
            ({"data": {"packing": True, "pack_length": 100}}, "data.pack_length is 100, shorter than data.max_length"),
            ({"module": {"chunk_rows": 0}}, "model.chunk_rows is 0"),
        ],
    )
    def test_runs(self, model_dir, rows_file, more, message):
        with pytest.raises(UserError, match=message):
            fit(model_dir, rows_file, **more)


class TestCheckpoint:
    def test_built_in_python_it_reloads_without_pickle(self, model_dir, rows_file, tmp_path):
        finetuner, _, trainer = fit(model_dir, rows_file, DFT(0.25), module={"lora": LoRA(rank=2)}, max_steps=2)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert stored["hyper_parameters"]["weighting"]["init_args"] == {"floor": 0.25}
        back = FineTuner.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        assert back.weighting == DFT(0.25)
        assert back.lora == LoRA(rank=2)
        for (name, ours), theirs in zip(
            back.network.state_dict().items(), finetuner.network.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        other = FineTuner.load_from_checkpoint(tmp_path / "x.ckpt", weighting=Uniform())
        assert other.weighting == Uniform()

    def test_going_on_with_other_steps_is_refused(self, model_dir, rows_file, tmp_path):
        """They would repeat rows and leave others out; another micro-batch size does not."""
        _, _, trainer = fit(model_dir, rows_file, max_steps=2, data={"micro_batch_size": 4})
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        for change in ({"global_batch_size": 4}, {"seed": 1}, {"num_samples": 20}):
            with pytest.raises(UserError, match=r"run with other options \(data.*--allow_changes '\[data\]'"):
                fit(model_dir, rows_file, data={"micro_batch_size": 4} | change, ckpt_path=str(tmp_path / "x.ckpt"))

    def test_a_trainer_fits_twice(self, model_dir, rows_file):
        finetuner, recorder, trainer = fit(model_dir, rows_file, data={"micro_batch_size": 4}, max_epochs=1)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(finetuner, trainer.datamodule)
        assert len(recorder.gradients) == 8

    @pytest.mark.parametrize("logits", ["float32", "bfloat16"])
    def test_the_reference_has_the_policys_logits(self, model_dir, rows_file, logits):
        """With the adapter off it is the policy at the start, to the bit: all weights are 1."""
        module = {"lora": {"rank": 2}, "logits": logits}
        recorder = fit(
            model_dir, rows_file, ImportanceWeighted("token"), module=module, max_steps=1, precision="bf16-true"
        )[1]
        assert recorder.logged[0]["train/weight_mean"] == 1.0
        assert recorder.logged[0]["train/effective_sample_size"] == pytest.approx(1.0, abs=1e-12)

    def test_narrow_logits_of_wide_products_are_refused(self, model_dir, rows_file):
        for precision in ("32-true", "64-true"):
            with pytest.raises(
                UserError, match=r"model.logits is bfloat16, but the products are in torch.float(32|64)"
            ):
                fit(model_dir, rows_file, module={"logits": "bfloat16"}, precision=precision)
