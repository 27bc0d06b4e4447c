"""Scores of every supervised token against the model's own full logits in float64."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_tokenizer

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.callbacks import TokenScores
from dft_lightning.data.batch import Collator
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.weighting import DFT, ImportanceWeighted, TokenStats, Uniform

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "use_distributed_sampler": False,
}


def predict(model_dir, rows_file, tmp_path, weighting, **data):
    options = {"num_samples": 9, "micro_batch_size": 4, "max_length": 60} | data
    module, rows = FineTuner(str(model_dir), weighting), NuminaMathDataModule(str(rows_file), **options)
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[TokenScores()], **QUIET)
    trainer.predict(module, rows, return_predictions=False)
    return pq.read_table(tmp_path / "predictions").to_pandas(), rows


@pytest.mark.parametrize("weighting", [DFT(0.1), Uniform(), ImportanceWeighted()], ids=repr)
def test_one_row_for_every_supervised_token(model_dir, rows_file, tmp_path, weighting):
    """1e-5 in nats: some eighty units of float32 rounding of logits of about this size."""
    table, data = predict(model_dir, rows_file, tmp_path, weighting)
    model = load_model(ModelSource(str(model_dir), torch.float64)).eval()
    assert len(table) == int(data.train_rows.targets.sum())
    assert sorted(table.row.unique()) == data.origin["train"].tolist() != list(range(9))
    for index in range(9):
        row = data.train_rows[index]
        ids = torch.from_numpy(row["input_ids"])
        at = torch.tensor([place for place in range(1, len(ids)) if row["supervised"][place]])
        with torch.no_grad():
            every = model(ids[None]).logits[0].log_softmax(1)[at - 1]
        logp = every.gather(1, ids[at, None])
        got = table[table.row == data.origin["train"][row["row"]]].sort_values("position")
        assert got.position.tolist() == list(range(len(at)))
        assert got.token_id.tolist() == ids[at].tolist()
        assert got["rank"].tolist() == (every > logp).sum(1).tolist()
        np.testing.assert_allclose(got.logp, logp[:, 0], atol=1e-5)
        np.testing.assert_allclose(got.p, logp[:, 0].exp(), rtol=2e-5)
        np.testing.assert_allclose(got.entropy, -(every.exp() * every).sum(1), atol=1e-5)
        weight = logp[:, 0].exp().clamp(min=0.1) if isinstance(weighting, DFT) else torch.ones(len(at))
        np.testing.assert_allclose(got.weight, weight, rtol=2e-5)


def test_rows_are_those_of_the_source(model_dir, rows_file, tmp_path):
    """The answer's tokens are the text of that line of the file."""
    import json

    table, _ = predict(model_dir, rows_file, tmp_path, Uniform(), max_length=200)
    source = [json.loads(line)["solution"] for line in rows_file.read_text().splitlines()]
    for row, tokens in table.groupby("row"):
        assert "".join(tokens.sort_values("position").token) == source[row] + tiny_tokenizer().eos_token


def test_the_folder_has_whole_parts_only(model_dir, rows_file, tmp_path):
    predict(model_dir, rows_file, tmp_path, Uniform())
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["part-00000.parquet"]


def test_parts_of_an_earlier_run_on_more_ranks_do_not_stay(model_dir, rows_file, tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "part-00001.parquet").write_text("of two ranks")
    table, data = predict(model_dir, rows_file, tmp_path, Uniform())
    assert len(table) == int(data.train_rows.targets.sum())


def test_a_rank_with_nothing_to_do_in_a_batch(model_dir, tmp_path):
    """Its empty batch comes first, or last; the columns keep their types."""
    module = FineTuner(str(model_dir), Uniform())
    trainer = SimpleNamespace(
        default_root_dir=tmp_path,
        global_rank=1,
        is_global_zero=False,
        strategy=SimpleNamespace(barrier=lambda: None),
        datamodule=SimpleNamespace(origin={"train": np.array([7])}),
    )
    row = {"row": 0, "input_ids": np.array([5, 6, 7]), "supervised": np.array([False, True, True])}
    scores = TokenScores()
    scores.on_predict_start(trainer, module)
    for rows in ([], [[row]], []):
        batch = Collator()(rows)
        zeros = torch.zeros(len(batch.target))
        tokens = TokenStats(
            logp=zeros,
            target=batch.target,
            sequence=batch.sequence,
            position=batch.position,
            entropy=zeros,
            rank=zeros.long(),
            weight=zeros,
        )
        scores.on_predict_batch_end(trainer, module, (batch, tokens.tensors()))
    scores.on_predict_end(trainer, module)
    assert pq.read_table(tmp_path / "predictions" / "part-00001.parquet")["row"].to_pylist() == [7, 7]
