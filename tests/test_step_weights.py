"""Weightings that look at the whole optimizer step: of all micro-batches and all ranks, and once (trap 16).

Two ranks are in exactness.py.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from exactness import Median
from harness import fit

from dft_lightning.callbacks import TokenProbabilities
from dft_lightning.models import LoRA
from dft_lightning.step_weights import weigh_together
from dft_lightning.weighting import TokenStats, TokenWeighting


@dataclass(frozen=True)
class Share(TokenWeighting):
    """p over the step's mean p; keeps what it was asked about."""

    scope = "step"

    def weights(self, tokens):
        if tokens.logp.dtype == torch.float32:  # not the proof
            SEEN.append((tokens, tokens.p / tokens.p.mean()))
        return tokens.p / tokens.p.mean()


SEEN = []


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TokenStats(
        logp=-3 * torch.rand(count, generator=generator),
        target=torch.arange(count),
        sequence=torch.arange(count) // 4,
        position=torch.arange(count) % 4,
    )


def test_parts_get_the_weights_of_the_whole_to_the_bit():
    """In whatever order and parts: the weighting always sees sequence by sequence."""
    whole = tokens(40)
    (expected,) = weigh_together(Share(), [whole])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = whole[order]
    for sizes in ([40], [1, 39], [13, 0, 27], [1] * 40):
        starts = torch.tensor([0, *sizes]).cumsum(0)
        parts = [shuffled[int(start) : int(start) + size] for start, size in zip(starts, sizes, strict=False)]
        got = weigh_together(Share(), parts)
        assert [len(part) for part in got] == sizes
        assert torch.equal(torch.cat(got), expected[order])


def test_it_is_asked_once_a_step_about_all_of_its_tokens(model_dir, rows_file):
    data = {"micro_batch_size": 2, "global_batch_size": 8}
    _, _, trainer = fit(model_dir, rows_file, Share(), data=data)
    targets = trainer.datamodule.train_rows.targets
    assert len(SEEN) == 4
    for number, (seen, _) in enumerate(SEEN):
        rows = trainer.datamodule.sampler().order(0)[8 * number : 8 * number + 8]
        assert sorted(set(seen.sequence.tolist())) == sorted(rows.tolist())
        assert len(seen) == targets[rows].sum()


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, dropout=0.3)])
def test_the_weights_are_those_of_the_gradient_pass_with_its_dropout(rows_file, tmp_path, lora):
    """The pass before has drawn the same dropout, so log p is the same to the bit."""
    tiny_model(attention_dropout=0.3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    module = {"lora": lora, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "warmup_ratio": 0.0}
    trained = []

    class Keep(TokenProbabilities):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rows = batch.row[pl_module.trained_on.sequence]
            trained.append(replace(pl_module.trained_on, sequence=rows))

    data = {"micro_batch_size": 2}
    fit(tmp_path / "model", rows_file, Share(), module=module, data=data, max_steps=2, callbacks=[Keep(0)])
    for step, (seen, weights) in enumerate(SEEN):
        whole = TokenStats.concatenate(trained[4 * step : 4 * step + 4])
        order = torch.argsort(whole.sequence * 1000 + whole.position)
        assert torch.equal(whole.logp[order], seen.logp)
        assert torch.equal(whole.weight[order], weights)
    assert not torch.equal(trained[0].logp, trained[4].logp)


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_the_validation_set_is_looked_at_as_one_step(model_dir, rows_file, tmp_path, normalize):
    val = write_jsonl(tmp_path / "val.jsonl", sums(9, seed=5))
    logged = []
    for micro in (9, 2):
        data = {"val_path": str(val), "micro_batch_size": micro}
        _, _, trainer = fit(
            model_dir, rows_file, Share(), module={"normalize": normalize}, data=data, max_steps=1, val_check_interval=1
        )
        logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
    assert logged[0]["val/weight_mean"] == pytest.approx(1.0, rel=1e-6)
    assert logged[0]["val/effective_sample_size"] < 0.9
    seen, weights = max(SEEN, key=lambda pair: len(pair[0]) * (pair[0].sequence.max() < 9))  # that of the validation
    loss = weights * -seen.logp
    if normalize == "tokens":
        assert logged[0]["val/objective"] == pytest.approx(float(loss.mean()), rel=1e-5)
    else:
        means = [float(loss[seen.sequence == row].mean()) for row in range(9)]
        assert logged[0]["val/objective"] == pytest.approx(sum(means) / 9, rel=1e-5)
    for name, value in logged[0].items():
        assert logged[1][name] == pytest.approx(value, rel=2e-5), name


def test_so_is_the_probe(model_dir, rows_file):
    callback = TokenProbabilities(every_n_steps=1, probe_rows=6, figure=False)
    fit(model_dir, rows_file, Share(), data={"micro_batch_size": 2}, max_steps=1, callbacks=[callback])
    rows = {len(set(seen.sequence.tolist())) for seen, _ in SEEN}
    assert rows == {6, 8}  # the probe at the start and the end; the step


def test_it_needs_a_data_module_that_knows_its_steps(model_dir, rows_file):
    from dft_lightning import FineTuner
    from dft_lightning.errors import UserError

    module = FineTuner(str(model_dir), Median())
    module._trainer = type("Trainer", (), {"gradient_clip_val": None, "datamodule": None})()
    with pytest.raises(UserError, match="Median looks at whole optimizer steps: train with a ChatDataModule"):
        module.on_fit_start()
