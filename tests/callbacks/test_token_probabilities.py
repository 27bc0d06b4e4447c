"""The distribution of token probabilities, by hand from full logits, and in the event files of real runs."""

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from harness import events, fit, logger

from dft_lightning.callbacks import Checkpoints, TokenProbabilities
from dft_lightning.callbacks.looks.tally import P_EDGES, P_LABELS, WEIGHT_EDGES, Tally, histogram, is_stop
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import LoRA
from dft_lightning.weighting import DFT, ImportanceWeighted, TokenStats

PAPERS_BINS = [0, 1e-4, 1e-3, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]


def stats(p, **more):
    logp = torch.tensor(p, dtype=torch.float64).log()
    fields = {"target": torch.zeros(len(p), dtype=torch.long), "sequence": torch.zeros(len(p), dtype=torch.long)}
    return TokenStats(logp=logp, **(fields | {"weight": logp.exp()} | more))


def by_hand(model_dir, rows, stop_id):
    """p of every supervised token in float64 by the model's own full logits, and of the stop tokens among them."""
    model = load_model(ModelSource(str(model_dir), torch.float64)).eval()
    p, stops = [], []
    for row in (rows[index] for index in range(len(rows))):
        ids = torch.from_numpy(row["input_ids"])
        with torch.no_grad():
            every = model(ids[None]).logits[0].softmax(1)
        at = [place for place in range(1, len(ids)) if row["supervised"][place]]
        p += [float(every[place - 1, ids[place]]) for place in at]
        if ids[at[-1]] == stop_id:
            stops.append(p[-1])
    return np.array(p), np.array(stops)


class TestHistogram:
    def test_the_bins_are_the_papers(self):
        assert list(P_EDGES) == PAPERS_BINS
        assert len(P_LABELS) == len(PAPERS_BINS) - 1 == 13

    @pytest.mark.parametrize("edges", [P_EDGES, WEIGHT_EDGES])
    def test_it_is_that_of_numpy(self, edges):
        random = np.random.default_rng(0)
        below = [np.nextafter(edge, -1) for edge in edges[1:]]
        values = np.concatenate([random.uniform(0, edges[-1], 500), 10 ** random.uniform(-6, 0, 500), edges, below])
        ours = histogram(torch.from_numpy(values), edges)
        assert ours.tolist() == np.histogram(values, edges)[0].tolist()
        assert ours.dtype == torch.float64

    def test_ends_and_what_lies_outside(self):
        assert histogram(torch.tensor([0.0, 1.0]), P_EDGES).tolist() == [1, *[0] * 11, 1]
        assert histogram(torch.tensor([-1.0, 99.0]), WEIGHT_EDGES)[[0, -1]].tolist() == [1, 1]
        assert histogram(torch.zeros(0), P_EDGES).tolist() == [0] * 13


class TestTally:
    def test_scalars_by_hand(self):
        tokens = stats(
            [0.5, 0.25, 0.125, 0.5],
            weight=torch.tensor([1.0, 2.0, 0.0, 1.0]),
            entropy=torch.tensor([1.0, 2.0, 3.0, 2.0]),
            rank=torch.tensor([0, 3, 1, 0]),
            sequence=torch.tensor([0, 0, 1, 2]),
            target=torch.tensor([9, 9, 4, 9]),
        )
        special = torch.tensor([9])
        assert is_stop(tokens, special).tolist() == [False, True, False, True]
        scalars = (Tally.of(tokens[:2], special) + Tally.of(tokens[2:], special)).scalars()
        assert scalars["effective_sample_size"] == pytest.approx(4**2 / (4 * 6))  # (Σw)²/(n·Σw²)
        assert scalars["p_stop"] == pytest.approx((0.25 + 0.5) / 2)
        assert (scalars["entropy_mean"], scalars["top1"], scalars["weight_mean"]) == (2.0, 0.5, 1.0)
        assert scalars["nll"] == pytest.approx(np.mean(-np.log([0.5, 0.25, 0.125, 0.5])))

    def test_no_tokens(self):
        nothing = Tally.of(stats([]), torch.tensor([9]))
        assert set(nothing.scalars().values()) == {0.0}
        assert "p_stop" not in nothing.scalars()
        assert sum(nothing.shares()) == 0

    def test_shares_sum_to_100(self):
        assert sum(Tally.of(stats([0.3, 0.01, 1.0]), torch.tensor([9])).shares()) == pytest.approx(100)


class TestRun:
    @pytest.fixture
    def ran(self, model_dir, rows_file, tmp_path):
        """Reports before the first step and after steps 2 and 4; some rows are truncated before their stop token."""
        callback = TokenProbabilities(2, probe_rows=99)
        data = {"micro_batch_size": 4, "max_length": 48}
        _, recorder, trainer = fit(model_dir, rows_file, data=data, callbacks=[callback], logger=logger(tmp_path))
        return events(tmp_path), recorder, trainer, callback

    def test_the_probe_is_what_full_logits_say(self, ran, model_dir):
        found, _, trainer, callback = ran
        p, stops = by_hand(model_dir, trainer.datamodule.train_rows, tiny_tokenizer().eos_token_id)
        assert 0 < len(stops) < 26
        shares = 100 * np.histogram(p, PAPERS_BINS)[0] / len(p)
        logged = [found.Scalars(f"probe_p_bins/{n:02d} {label}")[0].value for n, label in enumerate(P_LABELS)]
        assert logged == pytest.approx(shares.tolist(), rel=1e-6)
        assert callback.before == pytest.approx(shares.tolist())
        assert found.Scalars("probe/p_stop")[0].value == pytest.approx(stops.mean(), rel=1e-4)
        assert found.Scalars("probe/nll")[0].value == pytest.approx(-np.log(p).mean(), rel=1e-5)
        weights = found.Histograms("probe_histograms/p")[0].histogram_value
        assert sum(weights.bucket) == weights.num == len(p)

    def test_everything_is_there_at_its_steps(self, ran):
        found, recorder, _, _ = ran
        tags = found.Tags()
        for name, steps in (("probe", [0, 2, 4]), ("trained", [2, 4])):
            bins = [tag for tag in tags["scalars"] if tag.startswith(f"{name}_p_bins/")]
            assert len(bins) == 13
            for number in range(len(steps)):
                assert sum(found.Scalars(tag)[number].value for tag in bins) == pytest.approx(100, rel=1e-5)
            for tag in (*bins, *(f"{name}/{key}" for key in ("nll", "p_mean", "p_stop", "top1", "entropy_mean"))):
                assert [event.step for event in found.Scalars(tag)] == steps, tag
            for key in ("p", "weight", "entropy"):
                assert [event.step for event in found.Histograms(f"{name}_histograms/{key}")] == steps
        assert [event.step for event in found.Images("probe/token_probabilities")] == [0, 2, 4]
        assert found.Images("probe/token_probabilities")[0].encoded_image_string.startswith(b"\x89PNG")
        for event in found.Scalars("trained/nll"):  # both micro-batches of that step, no others
            assert event.value == pytest.approx(recorder.logged[event.step - 1]["train/nll"], rel=1e-5)

    def test_zero_is_off_and_no_figure_is_no_figure(self, model_dir, rows_file, tmp_path):
        finetuner, _, _ = fit(model_dir, rows_file, callbacks=[TokenProbabilities(0)], logger=logger(tmp_path))
        tags = events(tmp_path).Tags()
        assert not [tag for kind in ("scalars", "images", "histograms") for tag in tags[kind] if "prob" in tag]
        assert finetuner.trained_on.entropy is None
        fit(model_dir, rows_file, callbacks=[TokenProbabilities(4, figure=False)], logger=logger(tmp_path / "b"))
        assert events(tmp_path / "b").Tags()["images"] == []

    @pytest.mark.parametrize("lora", [None, LoRA(dropout=0.3)])
    def test_training_does_not_notice(self, rows_file, tmp_path, lora):
        """To the bit with dropout: mode and random numbers are as without."""
        tiny_model(attention_dropout=0.2).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        data = {"micro_batch_size": 4, "val_size": 4}
        modes = []

        class Mode(TokenProbabilities):
            def _report(self, trainer, module):
                super()._report(trainer, module)
                modes.append({part.training for part in module.modules()})

        plain, watched = (
            fit(tmp_path / "model", rows_file, module={"lora": lora}, data=data, callbacks=callbacks, logger=into)[1]
            for callbacks, into in (([], False), ([Mode(1, pictures_every=1)], logger(tmp_path)))
        )
        assert modes == [{True}] * 4
        for ours, theirs in zip(plain.gradients, watched.gradients, strict=True):
            assert torch.equal(ours, theirs)

    def test_the_probe_of_a_short_run_has_references(self, model_dir, rows_file, tmp_path):
        """Only the rows that a run reads have cached references."""
        fit(
            model_dir,
            rows_file,
            ImportanceWeighted(),
            max_steps=1,
            callbacks=[TokenProbabilities(1)],
            logger=logger(tmp_path),
        )
        weights = [event.value for event in events(tmp_path).Scalars("probe/weight_mean")]
        assert weights[0] == pytest.approx(1.0, abs=1e-5)

    def test_a_resumed_run_compares_with_the_first_look(self, model_dir, rows_file, tmp_path):
        first, second = TokenProbabilities(2), TokenProbabilities(2)
        more = {
            "module": {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)},
            "data": {"micro_batch_size": 4},
            "weighting": DFT(),
        }
        saving = {"callbacks": [first, Checkpoints()], "enable_checkpointing": True, "default_root_dir": tmp_path}
        fit(model_dir, rows_file, max_steps=2, **saving, **more)
        options = {"callbacks": [second], "max_steps": 4, "logger": logger(tmp_path)}
        fit(model_dir, rows_file, ckpt_path=tmp_path / "checkpoints/last.ckpt", **options, **more)
        assert second.before == first.before
        assert [event.step for event in events(tmp_path).Scalars("probe/nll")] == [4]  # not step 2 again


@pytest.mark.parametrize("name", ["every_n_steps", "probe_rows", "pictures_every", "kl_tokens"])
def test_options_out_of_range(name):
    with pytest.raises(UserError, match=f"expected .*{name} >= [01]"):
        TokenProbabilities(**{name: -1})
